"""Stored results name no machine and stay readable; README's tables say what they say."""

import copy
import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from gptk.bench import measure, report, stored
from gptk.bench.main import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SPEC = importlib.util.spec_from_file_location("results_table", ROOT / "docs/results_table.py")
results_table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(results_table)

FACTS = {"device": "A Processor", "isa": "avx2", "threads": 2, "torch": "2.10.0", "cores": 2}
EMPTY = f"# gptk\n\n{results_table.BEGIN}{results_table.END}\nThe end.\n"


# ---- a stored run ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A file of `gptk bench gelu --json`, made on a machine that has a name."""
    path = tmp_path_factory.mktemp("results") / "new" / "run.json"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
            patch.delenv(name, raising=False)
        patch.setattr(measure, "LEAST_SECONDS", 0.0)
        patch.setattr(measure, "copy_bandwidth", lambda device: 1e10)
        patch.setattr(measure, "read_bandwidth", lambda device: 1e10)
        patch.setattr(measure, "product_peak", lambda dtype, device: 1e11)
        patch.setattr(platform, "node", lambda: "the-name-of-this-machine")
        asked = ["--case=nano", "--dtype=float32", "--backend=torch"]
        assert main(["gelu", *asked, f"--json={path}"]) == 0
        seen = copy.deepcopy(report.ROWS)
    return path, seen


def test_a_stored_run_does_not_name_the_machine(run):
    text = run[0].read_text()
    assert "the-name-of-this-machine" not in text
    content = json.loads(text)
    assert set(content["machine_info"]) <= set(stored.MACHINE)
    assert content["machine_info"]["gptk"]["threads"] == measure.facts("cpu")["threads"]
    assert set(content["commit_info"]) <= {"id", "time", "dirty"}
    assert all("options" not in one for one in content["benchmarks"])


def test_a_stored_run_holds_what_was_measured(run):
    path, seen = run
    again = report.rows_of(path)
    assert [report.key(row) for row in again] == [report.key(row) for row in seen]
    for before, after in zip(seen, again, strict=True):
        assert after["n"] == before["n"] >= measure.LEAST_RUNS
        for name in ("median", "p20", "p80", "ratio", "share"):
            assert after[name] == pytest.approx(before[name], rel=2e-3)
    for one in json.loads(path.read_text())["benchmarks"]:
        assert one["stats"]["data"] == [float(f"{x:.4g}") for x in one["stats"]["data"]]


def test_a_stored_run_is_shown_and_compared(run, capsys):
    assert main([f"--show={run[0]}", f"--compare={run[0]}"]) == 0
    text = capsys.readouterr().out
    assert "gptk torch" in text
    assert "1.00x" in text


def test_pytest_benchmark_compares_stored_runs(run, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(run[0].read_text())
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(run[0]), str(other)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Failed to load" not in done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("test_op[gelu-nano")]
    assert len(rows) == 2 * len(json.loads(other.read_text())["benchmarks"])


def test_only_floats_are_rounded():
    given = {
        "a": [1.23456, 123456, True, None],
        "b": {"c": 1.23456e-7},
        "d": float("inf"),
        "e": "x",
    }
    wanted = {"a": [1.235, 123456, True, None], "b": {"c": 1.235e-7}, "d": float("inf"), "e": "x"}
    assert stored.rounded(given) == wanted


# ---- README's tables ------------------------------------------------------------------------


def benchmark(op, mode, provider, seconds, **columns):
    info = {"op": op, "case": "nano", "dtype": "float32", "mode": mode, "provider": provider}
    info |= {"flops": 2_000_000, "bytes": None, "roof": 1e9, "peak_bytes": 3 * 2**19}
    info |= {"error_ratio": 1.0, "baseline": 0.004, **columns}
    return {"stats": {"data": [seconds] * 3}, "extra_info": info}


BENCHMARKS = [
    benchmark("step", "train", "PyTorch fp32", 0.004),
    benchmark("step", "train", "compile fp32", 0.0032),
    benchmark("step", "train", "gptk cpp fp32", 0.0024, peak_bytes=2**20),
    benchmark("generate", "token", "transformers", 0.25, tokens=1),
    benchmark("generate", "token", "gptk cpp", 0.004, tokens=1),
    benchmark("generate", "token", "gptk cpp", 0.002, tokens=1, dtype="bfloat16"),
    benchmark("gelu", "forward", "PyTorch", 0.001),
    benchmark("gelu", "forward", "gptk cpp", 0.001),
    benchmark("gelu", "forward+backward", "PyTorch", 0.002),
    benchmark("gelu", "forward+backward", "gptk cpp", 0.0025),
    benchmark("gelu", "forward+backward", "gptk triton", 0.002),
    benchmark("mlp", "forward+backward", "gptk cpp", 0.0025),
]


@pytest.fixture
def folder(tmp_path):
    """A results folder with one run."""
    made = tmp_path / "results"
    made.mkdir()
    content = {"machine_info": {"gptk": FACTS}, "commit_info": {}, "benchmarks": BENCHMARKS}
    (made / "one.json").write_text(json.dumps(content))
    return made


def cells(text, first):
    """The cells of the table rows that begin with a cell."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_readme_says_what_the_results_say():
    made = results_table.with_tables(README, results_table.RESULTS)
    assert made == README, "run: python docs/results_table.py"


def test_steps_are_compared_with_the_faster_of_pytorchs(folder):
    found = cells(results_table.tables(folder), "nano")
    wanted = ["nano", "fp32", "cpp", "3.20", "2.40", "0.75", "83%", "1.50 MiB", "1.00 MiB"]
    assert found[0] == wanted


def test_generation_is_told_in_tokens_per_second(folder):
    text = results_table.tables(folder)
    assert "| dtype | transformers | gptk cpp |" in text
    assert cells(text, "nano")[1:] == [
        ["nano", "fp32", "4.00 (1%)", "250 (50%)"],
        ["nano", "bf16", "-", "500 (100%)"],
    ]


def test_ops_are_told_with_their_backward_slower_ones_too(folder):
    text = results_table.tables(folder)
    head = ["`gelu`", "nano", "fp32"]
    assert cells(text, "`gelu`") == [
        [*head, "cpp", "2 ms", "2.5 ms", "**1.25**", "80%", "-"],
        [*head, "triton", "2 ms", "2 ms", "1.00", "100%", "-"],
    ]
    assert "`mlp`" not in text  # PyTorch's answer is missing: there is nothing to compare with


def test_the_machine_and_the_command_are_named(folder):
    text = results_table.tables(folder)
    for part in ("A Processor", "avx2", "threads: 2", "torch 2.10.0"):
        assert part in text
    assert "`gptk bench --json benchmarks/results/one.json`" in text


def test_several_files_are_several_sections(folder):
    other = json.loads((folder / "one.json").read_text())
    other["machine_info"]["gptk"] = {**FACTS, "device": "Another"}
    (folder / "two.json").write_text(json.dumps({**other, "benchmarks": BENCHMARKS[5:]}))
    row = {"curve": "c", "provider": "gptk cpp", "median": 1.0, "peak_bytes": 5}
    grown = [{**row, "size": 2}, {**row, "size": 4, "median": 4.0}]
    curve = {"axis": "T", "time_power": 2, "memory_power": 1}
    (folder / "three.json").write_text(
        json.dumps({"facts": FACTS, "curves": {"c": curve}, "rows": grown})
    )
    text = results_table.tables(folder)
    assert text.index("one.json") < text.index("gptk bench curves") < text.index("Another")
    assert text.count("training step") == 1
    assert cells(text, "c") == [["c", "gptk cpp", "T 2 to 4", "T^2.00", "T^2", "T^0.00", "T^1"]]


def test_without_results_one_sentence_says_so(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        text = results_table.with_tables(EMPTY, folder)
        assert "No results are stored." in text
        assert "|" not in text
        assert text.startswith("# gptk\n")
        assert text.endswith("The end.\n")


def test_a_stale_readme_is_found_and_made_anew(folder, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(EMPTY)
    assert results_table.main(["--check"], readme, folder) == 1
    assert readme.read_text() == EMPTY
    assert results_table.main([], readme, folder) == 0
    assert results_table.main(["--check"], readme, folder) == 0
    fresh = readme.read_text()
    assert "| 0.75 |" in fresh
    readme.write_text(fresh.replace("| 0.75 |", "| 0.57 |"))
    assert results_table.main(["--check"], readme, folder) == 1
    readme.write_text(fresh)
    path = folder / "one.json"
    path.write_text(path.read_text().replace("0.0024", "0.0023"))
    assert results_table.main(["--check"], readme, folder) == 1
    assert "python docs/results_table.py" in capsys.readouterr().out
    assert results_table.main(["--chekc"], readme, folder) == 2


def test_a_readme_without_its_markers_is_refused(folder):
    for text in ("# gptk\n", EMPTY.replace(results_table.END, "")):
        with pytest.raises(ValueError, match=r"README\.md needs"):
            results_table.with_tables(text, folder)


def test_numbers_have_three_digits_and_no_exponent():
    given = {0.01234: "0.0123", 1.5: "1.50", 24.04: "24.0", 2412.3: "2,412", 0.0: "0"}
    assert {x: results_table.number(x) for x in given} == given


# ---- a stored training run ------------------------------------------------------------------


def test_a_training_run_is_stored_without_the_paths_of_its_machine(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    config = {"data": {"data": str(tmp_path / "plays.txt")}, "run": {"out": str(run), "seed": 1}}
    (run / "config.json").write_text(json.dumps(config))
    lines = [{"step": 0, "val_loss": 4.00001, "bits_per_byte": 5.5}]
    lines += [{"step": n, "loss": float(n), "ms": 500.0} for n in range(1, 26)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (run / "loss.png").write_bytes(b"a picture")
    folder = tmp_path / "results"
    script = ROOT / "benchmarks" / "store_run.py"
    subprocess.run([sys.executable, script, run, folder], check=True, cwd=ROOT)
    text = (folder / "curve.json").read_text()
    stored_run = json.loads(text)
    assert str(tmp_path) not in text
    assert stored_run["config"]["data"]["data"] == "plays.txt"
    assert stored_run["validation"] == [{"step": 0, "loss": 4.0, "bits_per_byte": 5.5}]
    assert stored_run["training"] == [[10, 5.5], [20, 15.5]]
    assert stored_run["seconds_in_steps"] == 12.5
    assert (folder / "loss.png").read_bytes() == b"a picture"


def test_the_committed_run_reached_what_the_readme_says():
    path = ROOT / "benchmarks" / "results" / "shakespeare" / "curve.json"
    best = min(json.loads(path.read_text())["validation"], key=lambda one: one["loss"])
    assert f"{best['loss']:.3f}" in README
    assert best["loss"] <= 1.5
