"""Launch configurations come from a table: each call has one, by its sizes and the GPU alone."""

import json
import re

import pytest
import torch

from gptk.ops import tuning, tuning_file
from gptk.ops.tuning import tuned, user_row
from gptk.ops.tuning_file import KERNELS, NO_LIMIT, TuningFileError

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
        *blocks, warps, stages, maxnreg = row["config"]
        assert len(blocks) == {"attention": 2, "linear_cross_entropy": 3}[op]
        for block in blocks:
            assert 16 <= block <= 256
            assert block & (block - 1) == 0
        assert warps in (4, 8)
        assert stages >= 1
        # a limit lets two programs run where one would
        assert maxnreg == NO_LIMIT or 2 * maxnreg * 32 * warps == 2**16
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
                    assert len(tuned("attention", kernel, arch, bits, D, kind)) == 5
    with pytest.raises(LookupError, match="size 257"):
        tuned("attention", kernel, 90, 16, 257, "plain")


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_every_call_of_linear_cross_entropy_has_a_configuration(pass_):
    for arch in (0, 75, 80, 86, 89, 90, 100, 103, 120):
        for kind in ("plain", "extras", "softcap"):
            assert len(tuned("linear_cross_entropy", pass_, arch, 16, 0, kind)) == 6


def test_the_nearest_row_is_taken(monkeypatch):
    def row(arch, size, config):
        return {"arch": arch, "bits": 16, "size": size, "kinds": ["plain"], "config": config}

    table = {"forward": [row(80, 64, [1]), row(80, 256, [2]), row(90, 64, [3]), row(100, 64, [4])]}
    monkeypatch.setattr(tuning, "_table", lambda op: table)
    tuned.cache_clear()
    try:
        asked = [(80, 64), (80, 65), (86, 64), (90, 64), (90, 65), (0, 1), (75, 1)]
        asked += [(100, 1), (103, 1), (120, 1), (121, 1)]
        found = [tuned("x", "forward", arch, 16, size, "plain") for arch, size in asked]
        assert found == [(c,) for c in (1, 2, 1, 3, 2, 1, 1, 4, 4, 1, 1)]
    finally:
        tuned.cache_clear()


def row(config, size, kind="plain", bits=16):
    return {"bits": bits, "size": size, "kind": kind, "config": config}


OWN = row([64, 32, 4, 3, 128], 128)


def content(kernel="attention.forward", rows=(OWN,), **changes):
    """A user's file with the rows of one kernel."""
    part = {"parameters": list(KERNELS[kernel].parameters), "rows": list(rows)}
    words = {"gpu": "a GPU", "date": "today", **tuning_file.versions()}
    return {"format": 1, "arch": 90, **words, "kernels": {kernel: part}, **changes}


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Makes a file with this content (text as it is) the user's; `to` is its place."""

    def write(content, to=tmp_path / "own.json", named=True):
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        monkeypatch.delenv("GPTK_TUNING")
        if named:
            monkeypatch.setenv("GPTK_TUNING", str(to))
        tuning.forget()
        return to

    yield write
    tuning.forget()


def test_a_user_row_wins_for_its_own_bucket_alone(use):
    shipped = {D: tuned("attention", "forward", 90, 16, D, "plain") for D in (64, 128, 256)}
    use(content())
    own = (64, 32, 4, 3, 128)
    assert own not in shipped.values()
    found = [tuned("attention", "forward", 90, 16, D, "plain") for D in (64, 65, 128, 129)]
    assert found == [shipped[64], own, own, shipped[256]]
    assert tuned("attention", "forward", 90, 16, 128, "packed") != own
    assert tuned("attention", "forward", 90, 32, 128, "plain") != own
    assert tuned("attention", "dq", 90, 16, 128, "plain") != own
    with pytest.raises(LookupError, match="size 257"):
        tuned("attention", "forward", 90, 16, 257, "plain")


def test_a_kernel_that_ships_with_a_function_has_the_row_or_none(use):
    use(content("layer_norm.forward", [row([2, 1024, 8], 1024), row([1, 4096, 8], 65536)]))
    sizes = (512, 513, 768, 1024, 1025, 32769, 65536, 10**6)
    found = [user_row("layer_norm.forward", 90, 16, N, "plain") for N in sizes]
    narrow, wide = (2, 1024, 8), (1, 4096, 8)
    assert found == [None, narrow, narrow, narrow, None, wide, wide, wide]
    assert user_row("gelu.forward", 90, 16, 0, "gelu") is None


def test_the_file_is_read_once(use):
    path = use(content())
    first = tuned("attention", "forward", 90, 16, 128, "plain")
    path.unlink()
    assert tuned("attention", "forward", 90, 16, 65, "plain") == first


def ask(arch=90):
    """What a launch asks first."""
    return user_row("attention.forward", arch, 16, 128, "plain")


@pytest.fixture
def cards(monkeypatch):
    """Makes this machine one with these GPUs, of (name, compute capability)."""

    def have(*gpus):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: gpus[i][0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: gpus[i][1])

    return have


HERE = {name: re.escape(version) for name, version in tuning_file.versions().items()}
CHANGES = {
    "gpu": ({"gpu": "NVIDIA H200"}, "gpu NVIDIA H200 then, NVIDIA H100 now"),
    "triton": ({"triton": "2"}, rf"triton 2 then, {HERE['triton']} now"),
    "gptk": ({"gptk": "0.0"}, rf"gptk 0\.0 then, {HERE['gptk']} now"),
    "more": ({"gptk": "0.0", "triton": "2"}, r"gptk 0\.0 then, .* now, triton 2 then, .* now"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_of_another_gpu_or_version_is_used_with_one_warning(use, cards, name):
    changes, words = CHANGES[name]
    cards(("NVIDIA A100", (8, 0)), ("NVIDIA H100", (9, 0)))
    path = use(content(**({"gpu": "NVIDIA H100"} | changes)))
    with pytest.warns(RuntimeWarning, match=words) as given:
        assert ask() == tuple(OWN["config"])
    (warning,) = given
    assert str(warning.message).startswith(f"the tuning file {path} was measured on another GPU")
    assert str(warning.message).endswith(tuning_file.REMEDY)
    tuning.forget()
    ask()  # any further one would be an error


def test_a_file_of_what_is_here_is_used_without_a_warning(use, cards):
    cards(("NVIDIA A100", (8, 0)), ("NVIDIA H100", (9, 0)))
    use(content(gpu="NVIDIA H100", torch="1"))
    assert ask() == tuple(OWN["config"])
    use(content(gpu="NVIDIA H200", triton="2", gptk="0.0"))
    assert ask(arch=0) == tuple(OWN["config"]), "the interpreter takes that of any GPU"


def test_what_a_file_was_measured_with_is_compared_when_it_is_read_alone(use, monkeypatch):
    compared = []
    monkeypatch.setattr(tuning_file, "changes", lambda content, arch: compared.append(arch) or {})
    use(content())
    for D in (64, 128, 64, 256):
        tuned("attention", "forward", 90, 16, D, "plain")
        user_row("attention.dq", 90, 16, D, "plain")
    assert compared == [90]


@pytest.mark.parametrize("named, reads", [(False, True), (True, False)])
def test_the_default_place_is_read_unless_the_variable_is_set(
    use, monkeypatch, tmp_path, named, reads
):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert tuning_file.default_place(90) == tmp_path / "gptk" / "tuning-sm_90.json"
    use(content(), tuning_file.default_place(90), named=False)
    if named:
        monkeypatch.setenv("GPTK_TUNING", "")
    own = user_row("attention.forward", 90, 16, 128, "plain")
    assert own == ((64, 32, 4, 3, 128) if reads else None)
    # another GPU has a place of its own, the interpreter none
    assert user_row("attention.forward", 80, 16, 128, "plain") is None
    assert user_row("attention.forward", 0, 16, 128, "plain") is None


def test_a_default_place_that_cannot_be_looked_at_has_no_file(monkeypatch):
    monkeypatch.delenv("GPTK_TUNING")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/" + "x" * 300)  # as a home that others may not enter
    assert tuning_file.in_use(90) is None


def test_the_interpreter_takes_a_named_file_of_any_gpu(use):
    use(content())
    assert tuned("attention", "forward", 0, 16, 128, "plain") == (64, 32, 4, 3, 128)


GELU = [row([1024, 4], 0, "gelu")]
REFUSED = {
    "another GPU": (content(arch=80, gpu="NVIDIA A100"), r"NVIDIA A100 \(sm_80\).* sm_90"),
    "another format": (content(format=2), "format 2.* reads format 1"),
    "no format": ({"kernels": {}}, "names no format"),
    "no JSON": ("{", "not JSON"),
    "a list": ([], "names no format"),
    "no GPU": (content(gpu=None), "'gpu' is missing"),
    "unknown kernels": (content(kernels={"swish.up": {}, "rope": {}}), "has not: rope, swish.up"),
    "no rows": (content(kernels={"gelu.forward": {}}), "gelu.forward has no rows"),
    "other parameters": (
        content(kernels={"gelu.forward": {"parameters": ["BLOCK"], "rows": []}}),
        r"\['BLOCK'\], and this gptk takes \['BLOCK', 'num_warps'\]",
    ),
    "half a row": (content("gelu.forward", [{"bits": 16}]), "not a row with bits"),
    "bits": (content("gelu.forward", [row([1024, 4], 0, "gelu", bits=8)]), "bits 8"),
    "size": (content("gelu.forward", [row([1024, 4], 16, "gelu")]), "size 16, which no call"),
    "a size between": (content(rows=[row([64, 32, 4, 3, 128], 96)]), "size 96, which no call"),
    "kind": (content("gelu.forward", [row([1024, 4], 0, "relu")]), "kind 'relu'"),
    "short": (content("gelu.forward", [row([1024], 0, "gelu")]), "is not BLOCK, num_warps"),
    "maxnreg": (
        content(rows=[row([64, 32, 4, 3, 300], 128)]),
        "maxnreg 300, which is not a number",
    ),
    "no power": (content("gelu.forward", [row([1000, 4], 0, "gelu")]), "BLOCK 1000, which is"),
    "too high": (
        content("linear.epilogue", [row([128, 64, 4], 1024, "gelu")]),
        "BLOCK_M 128, which is not a power of two from 1 to 64",
    ),
    "true": (content("gelu.forward", [row([1024, True], 0, "gelu")]), "num_warps True"),
    "twice": (content("gelu.forward", GELU * 2), "two rows for gelu.forward, 16 bits, gelu"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(use, name):
    text, words = REFUSED[name]
    path = use(text)
    for _ in range(2):  # it is not forgotten after the first refusal
        with pytest.raises(TuningFileError, match=words) as error:
            user_row("gelu.forward", 90, 16, 0, "gelu")
    said = str(error.value)
    assert said.startswith(f"the tuning file {path} ")
    assert "GPTK_TUNING=" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "name, words",
    [
        ("none.json", r"no tuning file .*none\.json; make it: gptk tune"),
        ("file/own.json", r"no tuning file .*own\.json; make it: gptk tune"),
        ("folder", r"folder is a folder, not a tuning file; name a file: GPTK_TUNING=FILE; or go"),
        ("x" * 300, r"x cannot be read \(File name too long\)"),
    ],
    ids=["missing", "in a file", "a folder", "long"],
)
def test_a_named_file_that_is_none_is_refused(monkeypatch, tmp_path, name, words):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv("GPTK_TUNING", str(tmp_path / name))
    tuning.forget()
    with pytest.raises(TuningFileError, match=words):
        tuned("attention", "forward", 90, 16, 64, "plain")
    tuning.forget()
