"""README.md is true: its commands and snippets run, its table is fresh, its tree exists."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from gptk.ops.catalog import CATALOG
from gptk.ops.contract import availability, why_not

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
FENCE = re.compile(
    r"(<!-- not run: [^\n]+ -->\n)?^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE
)
BLOCKS = [(kind, code) for marker, kind, code in FENCE.findall(README) if not marker]
COMMANDS = [code for kind, code in BLOCKS if kind == "bash"]
SNIPPETS = [code for kind, code in BLOCKS if kind == "python"]


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    scripts = sysconfig.get_path("scripts")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env["PATH"] = f"{scripts}{os.pathsep}{env['PATH']}"
    return subprocess.run(
        command, cwd=cwd, env=env, text=True, capture_output=True, check=False, timeout=240
    )


def test_the_blocks_are_found():
    assert len(COMMANDS) >= 2
    assert len(SNIPPETS) >= 3


def test_the_command_is_installed():
    gptk = Path(sysconfig.get_path("scripts"), "gptk")
    assert gptk.is_file(), "install the package first: make test, or pip install -e ."


@pytest.mark.parametrize("code", COMMANDS, ids=range(len(COMMANDS)))
def test_commands_run(code, tmp_path):
    if "TRITON_INTERPRET=1" in code and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    shutil.copy(ROOT / "README.md", tmp_path)
    done = run(["bash", "-euo", "pipefail", "-c", code], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for run_dir in re.findall(r"--out (\S+)", code):
        assert (tmp_path / run_dir / "config.json").is_file()
        assert (tmp_path / run_dir / "metrics.jsonl").is_file()


@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_run(code, tmp_path):
    done = run([sys.executable, "-W", "error", "-c", code], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"\bmake (train|test|help|gpu)\b", README)))
)
def test_make_targets_exist(target):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = run(["make", "--dry-run", "VENV=absent", target], ROOT)
    assert done.returncode == 0, done.stderr


def test_the_support_table_is_fresh():
    spec = importlib.util.spec_from_file_location("support_table", ROOT / "docs/support_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.with_table(README) == README, "run: python docs/support_table.py --write"
    assert module.table() in README


@pytest.mark.parametrize("row", CATALOG, ids=lambda row: f"{row.op}-{row.backend}")
def test_a_backend_accepts_what_the_table_says(row):
    reason = availability(row.backend)
    if reason is not None:
        pytest.skip(reason)
    devices = row.devices or ("cpu",)
    for device in devices if torch.cuda.is_available() else set(devices) & {"cpu"}:
        for dtype in row.dtypes:
            assert why_not(row.op, row.backend, device, getattr(torch, dtype)) is None


def test_the_tree_exists():
    tree = README.split("## The tree")[1].split("```")[1]
    paths = [
        path for line in tree.strip().splitlines() for path in re.split(r"\s{2,}", line)[0].split()
    ]
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_verbs_are_those_of_the_command_line(tmp_path):
    done = run([sys.executable, "-m", "gptk", "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    verbs = re.findall(r"^\| `gptk (\w+)", README, re.MULTILINE)
    assert len(verbs) >= 3
    assert [verb for verb in verbs if verb not in done.stdout] == []
