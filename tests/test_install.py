"""Installing: metadata without torch, a pure-Python install without a compiler, a whole sdist."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__", ".*_cache"
)
TINY = (
    "--tokenizer=byte --n-layer=1 --n-head=1 --n-embd=16 --block-size=16 --batch-size=2"
    " --max-steps=2"
).split()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the tree, so that no build touches the one under test."""
    return Path(shutil.copytree(ROOT, tmp_path / "checkout", ignore=NOT_COPIED))


def run(command: list[str], cwd: Path, **environment: str) -> str:
    env = {key: value for key, value in os.environ.items() if key not in ("CXX", "CC")}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def python_without_torch(code: str, cwd: Path) -> str:
    return run([sys.executable, "-c", f"import sys\nsys.modules['torch'] = None\n{code}"], cwd)


def install(checkout: Path, target: Path, **environment: str) -> str:
    pip = [sys.executable, "-m", "pip", "install", "--verbose", "--no-index", "--no-deps"]
    pip += ["--no-build-isolation", "--target", str(target), str(checkout)]
    return run(pip, checkout, **environment)


def test_the_version_is_known_without_torch(checkout):
    version = python_without_torch(
        "import runpy\nsys.argv = ['setup.py', '--version']\n"
        "runpy.run_path('setup.py', run_name='__main__')",
        checkout,
    )
    line = f'__version__ = "{version.split()[-1]}"'
    assert line in (checkout / "gptk" / "__init__.py").read_text()


def test_the_metadata_is_made_without_torch(checkout, tmp_path):
    python_without_torch(
        f"from setuptools import build_meta\n"
        f"build_meta.prepare_metadata_for_build_wheel({str(tmp_path)!r})",
        checkout,
    )
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    text = metadata.read_text()
    assert "Requires-Dist: torch>=2.10" in text
    assert "License-Expression: MIT" in text


def test_the_source_distribution_holds_the_native_sources(checkout, tmp_path):
    python_without_torch(
        f"from setuptools import build_meta\nbuild_meta.build_sdist({str(tmp_path)!r})", checkout
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {Path(*Path(member).parts[1:]).as_posix() for member in tar.getnames()}
    wanted = {
        path.relative_to(checkout).as_posix()
        for folder in ("csrc", "gptk")
        for path in (checkout / folder).rglob("*")
        if path.suffix in {".h", ".cpp", ".cu", ".cuh", ".py"}
    }
    wanted |= {"setup.py", "pyproject.toml", "CMakeLists.txt", "constraints.txt", "LICENSE"}
    assert wanted - packed == set()


# an editable install's import hook would find the extension of the checkout: it is taken away
WITHOUT_HOOK = (
    "import sys; hook = lambda f: 'editable' in getattr(f, '__module__', ''); "
    "sys.meta_path[:] = [f for f in sys.meta_path if not hook(f)]; exec(sys.argv.pop(1))"
)
ALONE = [sys.executable, "-c", WITHOUT_HOOK]


@pytest.mark.parametrize("why", ["switched off", "no compiler"])
def test_a_pure_python_install_says_so_and_trains(checkout, tmp_path, why):
    if why == "switched off":
        environment, reason = {"GPTK_NO_NATIVE": "1"}, "GPTK_NO_NATIVE is set"
    else:
        empty = tmp_path / "empty"
        empty.mkdir()
        environment, reason = {"PATH": str(empty)}, "no C++ compiler was found"
    target = tmp_path / "site"
    said = install(checkout, target, **environment)
    lines = [line.strip() for line in said.splitlines() if reason in line]
    assert lines, said
    assert "backend cpp" in lines[0]
    assert not list(target.glob("gptk/*.so"))

    run_dir = tmp_path / "run"
    trained = run(
        [
            *ALONE,
            "sys.argv[0] = 'gptk'; from gptk.cli import main; sys.exit(main())",
            "train",
            "--backend=torch",
            f"--out={run_dir}",
            *TINY,
        ],
        tmp_path,
        PYTHONPATH=str(target),
        OMP_NUM_THREADS="1",
    )
    assert (run_dir / "metrics.jsonl").read_text().count("\n") >= 1, trained
    where = run(
        [*ALONE, "import gptk.native as n; print(n.__file__, n.available())"],
        tmp_path,
        PYTHONPATH=str(target),
    )
    assert where.startswith(str(target))
    assert not where.rstrip().endswith("None")
