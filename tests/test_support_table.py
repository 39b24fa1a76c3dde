"""The support table says what the tests and the stored results say, and no more."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("support_table", ROOT / "docs/support_table.py")
support_table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(support_table)


def bench(device, cuda, *rows):
    """A file of `gptk bench --json`."""
    facts = {"device": device, "cuda": cuda}
    return {"machine_info": {"gptk": facts}, "benchmarks": [{"extra_info": row} for row in rows]}


def timing(op, provider, dtype="bfloat16", **more):
    return {"op": op, "provider": provider, "dtype": dtype, **more}


@pytest.fixture
def results(tmp_path):
    """One kernel compiled for two GPUs, one op timed on a CPU, nothing on a GPU."""
    rows = [{"case": "gelu none bf16", "arch": arch} for arch in (80, 90)]
    (tmp_path / "aot.json").write_text(json.dumps({"triton": "3", "rows": rows}))
    timed = [timing("gelu", "gptk cpp"), timing("gelu", "PyTorch"), timing("gelu", "gptk triton")]
    (tmp_path / "cpu.json").write_text(json.dumps(bench("A CPU", None, *timed)))
    return tmp_path


def run_on_gpu(results, dry):
    """A folder of `make gpu`."""
    stages = results / "gpu-a-run" / "stages"
    stages.mkdir(parents=True)
    (stages.parent / "run.json").write_text(json.dumps({"dry_run": dry, "parts": []}))
    timed = [timing("gelu", "gptk triton"), timing("mlp", "gptk triton", refused="why")]
    for stage, facts, rows in (("environment", {"card": "H100"}, []), ("benchmarks", {}, timed)):
        content = {"stage": stage, "part": "", "facts": facts, "rows": rows}
        (stages / f"{stage}.json").write_text(json.dumps(content))


def cell(results, op, backend):
    return support_table.cell(op, backend, support_table.checks(results)).split("<br>")


def test_the_definition_is_checked_by_nothing_else(results):
    assert cell(results, "gelu", "torch")[1:] == ["fp32 bf16 fp16 fp64: the definition"]


def test_without_a_gpu_triton_is_compiled_and_interpreted(results):
    lines = cell(results, "gelu", "triton")[1:]
    assert lines == ["fp32 fp16 fp64: interpreted", "bf16: interpreted, compiled for sm_80, sm_90"]
    assert "not yet timed on a GPU" in support_table.table(results)


def test_a_kernel_that_was_not_compiled_is_not_said_to_be(results):
    assert cell(results, "mlp", "triton")[1:] == ["fp32 bf16 fp16 fp64: interpreted"]


def test_a_cpu_is_named_only_where_it_was_timed(results):
    assert cell(results, "gelu", "cpp")[1:] == [
        "fp32 fp16 fp64: tested",
        "bf16: tested, timed on A CPU",
    ]


def test_what_no_test_compares_is_said(results):
    known = support_table.checks(results)._replace(tested=set())
    assert support_table.how("mlp", "cpp", "float32", known) == "not checked"


def test_a_run_of_make_gpu_is_named(results):
    run_on_gpu(results, dry=False)
    assert cell(results, "gelu", "triton")[-1].endswith("sm_80, sm_90, timed on H100")
    assert "timed" not in "".join(cell(results, "mlp", "triton"))
    text = support_table.table(results)
    assert "timed on H100" in text
    assert "not yet timed on a GPU" not in text


def test_a_dry_run_is_no_timing(results):
    run_on_gpu(results, dry=True)
    assert "not yet timed on a GPU" in support_table.table(results)


def test_the_readmes_copy_goes_stale_with_the_results(results):
    fresh = support_table.with_table((ROOT / "README.md").read_text("utf-8"), results)
    assert support_table.with_table(fresh, results) == fresh
    run_on_gpu(results, dry=False)
    assert support_table.with_table(fresh, results) != fresh
