"""Launch configurations come from a table: each call has one, by its sizes and the GPU alone."""

import json

import pytest

from gptk.ops import tuning
from gptk.ops.tuning import tuned

OPS = sorted(path.parent.name for path in tuning.Path(tuning.__file__).parent.glob("*/tuning.json"))


def rows(op):
    path = tuning.Path(tuning.__file__).parent / op / "tuning.json"
    table = json.loads(path.read_text("utf-8"))
    return [(kernel, row) for kernel, found in table.items() for row in found]


@pytest.mark.parametrize("op", OPS)
def test_the_table_is_well_formed(op):
    seen = set()
    for kernel, row in rows(op):
        assert set(row) == {"arch", "bits", "size", "kinds", "config"}
        block_q, block_k, warps, stages = row["config"]
        for block in (block_q, block_k):
            assert 16 <= block <= 128
            assert block & (block - 1) == 0
        assert warps in (4, 8)
        assert stages >= 1
        for kind in row["kinds"]:
            key = (kernel, row["arch"], row["bits"], row["size"], kind)
            assert key not in seen, "two rows for the same calls"
            seen.add(key)


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
def test_every_call_has_a_configuration(kernel):
    for arch in (0, 75, 80, 86, 89, 90, 100, 103, 120):
        for bits in (16, 32, 64):
            for kind in ("plain", "packed", "dropout"):
                for D in (1, 16, 64, 65, 128, 129, 256):
                    assert len(tuned("attention", kernel, arch, bits, D, kind)) == 4
    with pytest.raises(LookupError, match="size 257"):
        tuned("attention", kernel, 90, 16, 257, "plain")


def test_the_nearest_row_is_taken(monkeypatch):
    def row(arch, size, config):
        return {"arch": arch, "bits": 16, "size": size, "kinds": ["plain"], "config": config}

    table = {"forward": [row(80, 64, [1]), row(80, 256, [2]), row(90, 64, [3])]}
    monkeypatch.setattr(tuning, "_table", lambda op: table)
    tuned.cache_clear()
    try:
        asked = [(80, 64), (80, 65), (86, 64), (90, 64), (90, 65), (120, 1), (0, 1), (75, 1)]
        found = [tuned("x", "forward", arch, 16, size, "plain") for arch, size in asked]
        assert found == [(1,), (2,), (1,), (3,), (2,), (3,), (1,), (1,)]
    finally:
        tuned.cache_clear()
