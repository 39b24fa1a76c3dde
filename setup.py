"""Builds the native extension with CMake; everything else about the package is in pyproject.toml.

Without a C++ compiler, CMake or pybind11, or with GPTK_NO_NATIVE=1, the package installs as pure
Python and one sentence says what is missing: every op then runs on torch (or Triton). Where a
compiler exists, a build that breaks stops the install: a broken build is a bug to see, not a
missing tool to work around. torch is never imported.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_compiler() -> str | None:
    """The C++ compiler that CMake would take: $CXX, else the first of the usual names on PATH."""
    if wanted := os.environ.get("CXX", "").split():
        return shutil.which(wanted[0])
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def find_cmake() -> str | None:
    """The executable of the cmake wheel where it is installed, else the one on PATH."""
    if importlib.util.find_spec("cmake"):
        from cmake import CMAKE_BIN_DIR

        return str(Path(CMAKE_BIN_DIR, "cmake"))
    return shutil.which("cmake")


def reason_for_pure_python() -> str | None:
    if os.environ.get("GPTK_NO_NATIVE", "0") not in ("", "0"):
        return "GPTK_NO_NATIVE is set"
    if not find_compiler():
        return f"no C++ compiler was found ({os.environ.get('CXX') or 'c++, g++, clang++'})"
    if not find_cmake():
        return "cmake was not found"
    if not importlib.util.find_spec("pybind11"):
        return "pybind11 is not installed"
    return None


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """One CMake tree per Python version in build/, kept: a rebuild compiles what changed."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        tree = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        tree.mkdir(parents=True, exist_ok=True)
        configure = [
            find_cmake(),
            "-S",
            str(ROOT),
            "-B",
            str(tree),
            f"-DCMAKE_CXX_COMPILER={find_compiler()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if ninja := shutil.which("ninja", path=self.tool_path()):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(self.parallel or os.cpu_count())
        self.run_logged(configure, tree, "configure.log")
        self.run_logged([configure[0], "--build", str(tree), "-j", jobs], tree, "build.log")
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(next(tree.glob("_C*.so")), output)

    @staticmethod
    def tool_path() -> str:
        return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

    @staticmethod
    def run_logged(command: list[str], tree: Path, log_name: str) -> None:
        log = tree / log_name
        with log.open("w") as stream:
            done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            sys.exit(
                f"{tail}\ngptk: building the C++ extension failed, the whole log is in {log}; "
                "set GPTK_NO_NATIVE=1 to install without it"
            )


reason = reason_for_pure_python()
if reason:
    print(f"gptk: installing without the C++ extension (backend cpp): {reason}", flush=True)
setup(
    ext_modules=[] if reason else [CMakeExtension("gptk._C")],
    cmdclass={} if reason else {"build_ext": CMakeBuild},
)
