"""Test set-up: Triton's interpreter where there is no GPU, NaN in fresh memory, shared paths."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
os.environ["GPTK_TUNING"] = ""  # what ships is tested, not what was measured on this machine

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(Path(__file__).parent))  # tests import `equivalence` by name


WANTED = {
    "text/test_stream.py": "hypothesis",
    "text/test_tokenizer.py": "hypothesis",
    "train/test_checkpoint.py": "safetensors",
}
ABSENT = {file: name for file, name in WANTED.items() if importlib.util.find_spec(name) is None}
collect_ignore = list(ABSENT)


def pytest_report_header() -> list[str]:
    return [f"not collected: {file}, {name} is not installed" for file, name in ABSENT.items()]


def pytest_configure(config: pytest.Config) -> None:
    """The marks of plugins that may be absent."""
    for mark in ("timeout", "benchmark"):
        config.addinivalue_line("markers", f"{mark}: needs pytest-{mark}")
    check_triton(config)


def check_triton(config: pytest.Config) -> None:
    """What the tests need in other versions of Triton than the pinned one."""
    wanted = os.environ.get("GPTK_TEST_TRITON")  # set by `make test-triton`
    if importlib.util.find_spec("triton") is None:
        if wanted:
            raise pytest.UsageError(f"triton {wanted} is wanted and none is installed")
        return
    import triton

    if wanted not in (None, triton.__version__):
        raise pytest.UsageError(f"triton {wanted} is wanted, {triton.__file__} is another")
    if triton.__version__.startswith("3.6."):
        # its interpreter makes numbers of arrays of one element; 3.7 says which element
        config.addinivalue_line(
            "filterwarnings",
            "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning",
        )


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Without pytest-timeout (`make gpu` needs pytest alone) its setting is known, but idle."""
    if not (pluginmanager.hasplugin("timeout") or pluginmanager.hasplugin("pytest_timeout")):
        parser.addini("timeout", "seconds a test may take; needs pytest-timeout")


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory() -> Iterator[None]:
    """torch.empty is filled with NaN, so an element that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shown() -> ModuleType:
    """The public failures of other projects, with right values."""
    folder = SHARED / "cases"
    if not (folder / "shown.py").exists():
        pytest.skip(f"needs the case files in {folder.name} beside the checkout")
    sys.path.insert(0, str(folder))
    threads = torch.get_num_threads()
    import shown as cases

    torch.set_num_threads(threads)  # the case files set one thread
    return cases


@pytest.fixture(scope="session")
def shakespeare() -> Path:
    """tinyshakespeare, where the checkout has it beside itself."""
    path = SHARED / "data" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip("needs tinyshakespeare.txt beside the checkout")
    return path
