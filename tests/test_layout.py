"""The rules of CONTRIBUTING.md that a machine can check, as tests over the files of the tree."""

import ast
import io
import re
import tokenize
from pathlib import Path

from gptk.ops.catalog import BACKENDS, CATALOG, OPS

ROOT = Path(__file__).resolve().parent.parent
OPS_DIR = ROOT / "gptk" / "ops"
FILE_LINES = 500
LINE_COLUMNS = 100
REFERENCE_LINES = 40
KERNEL_LINES = 120
BANNED_NAMES = {"utils.py", "helpers.py", "misc.py", "triton.py", "torch.py"}

FOLDERS = ("gptk", "csrc", "tests", "benchmarks", "docs", ".ci")
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".toml", ".txt", ".yaml", ".in", ".html", ""}
SOURCES = sorted(
    path
    for path in [
        *(p for p in ROOT.iterdir() if not p.name.startswith(".git")),
        *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*")),
    ]
    if path.is_file() and path.suffix in SUFFIXES and "__pycache__" not in path.parts
)
PYTHON = [path for path in SOURCES if path.suffix == ".py"]
PACKAGE = [path for path in PYTHON if path.is_relative_to(ROOT / "gptk")]
NATIVE = [path for path in SOURCES if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def matches(pattern: str, paths: list[Path]) -> list[str]:
    """`file:line: text` for every line of `paths` that the pattern matches."""
    return [
        f"{name(path)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]


def code_lines(function: ast.FunctionDef, source: str) -> int:
    """Lines of a function that hold code: no docstring, no comment, no blank line."""
    body = function.body
    first = body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    skipped = range(first.lineno, first.end_lineno + 1) if is_docstring else ()
    lines = source.splitlines()
    return sum(
        bool(lines[n - 1].strip()) and not lines[n - 1].lstrip().startswith("#")
        for n in range(function.lineno, function.end_lineno + 1)
        if n not in skipped
    )


def test_the_tree_is_seen():
    seen = {name(path) for path in SOURCES}
    assert {"README.md", "Makefile", "gptk/__init__.py", "csrc/gptk.h", ".ci/run"} <= seen


def test_no_file_is_too_long():
    limited = [path for path in SOURCES if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}]
    lengths = {name(path): len(path.read_text("utf-8").splitlines()) for path in limited}
    assert {path: n for path, n in lengths.items() if n > FILE_LINES} == {}


def test_no_native_line_is_too_long():
    assert matches(f".{{{LINE_COLUMNS + 1},}}", NATIVE) == []


def test_no_module_has_a_banned_name():
    assert [name(path) for path in PYTHON if path.name in BANNED_NAMES] == []


def test_every_op_folder_is_complete():
    folders = {path.parent.name for path in OPS_DIR.glob("*/__init__.py")}
    assert folders == set(OPS)
    wanted = [f"{op}/{file}.py" for op in OPS for file in ("__init__", "reference", "cases")]
    assert [file for file in wanted if not (OPS_DIR / file).is_file()] == []


def test_the_catalog_and_the_files_agree():
    rows = {row.module for row in CATALOG}
    assert len(rows) == len(CATALOG)
    files = {
        f"{path.parent.name}.{path.stem}"
        for path in OPS_DIR.glob("*/*.py")
        if path.stem == "reference" or path.stem.endswith("_impl")
    }
    assert rows == files
    assert {row.backend for row in CATALOG} <= set(BACKENDS)


def test_the_package_of_ops_is_empty():
    # a re-exported function `layer_norm` would shadow the subpackage of that name
    assert (OPS_DIR / "__init__.py").read_text("utf-8").strip() == ""


def test_a_reference_is_short():
    too_long = {}
    for path in OPS_DIR.glob("*/reference.py"):
        source = path.read_text("utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                lines = code_lines(node, source)
                if lines > REFERENCE_LINES:
                    too_long[f"{name(path)}:{node.name}"] = lines
    assert too_long == {}


def test_a_triton_kernel_fits_two_screens():
    too_long = {}
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list
            ):
                lines = node.end_lineno - node.lineno + 1
                if lines > KERNEL_LINES:
                    too_long[f"{name(path)}:{node.name}"] = lines
    assert too_long == {}


def test_no_open_end_without_a_number():
    assert matches(r"\b(TO" + r"DO(?!\(#\d+)|FIX" + r"ME|XX" + r"X)\b", SOURCES) == []


def test_no_machine_path():
    assert matches(r"(?<![\w.~$}])/(?:work|root|tmp|home)/", SOURCES) == []


def test_comments_are_ascii():
    found = [line for line in matches(r"[^\x00-\x7f]", NATIVE)]
    for path in PYTHON:
        for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline):
            if token.type == tokenize.COMMENT and not token.string.isascii():
                found.append(f"{name(path)}:{token.start[0]}: {token.string}")
    assert found == []


def test_the_package_never_unpickles():
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "joblib"}
    found = []
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]}
            else:
                names = set()
            is_torch_pickle = (
                isinstance(node, ast.Attribute)
                and node.attr in {"load", "save"}
                and isinstance(node.value, ast.Name)
                and node.value.id == "torch"
            )
            if names & modules or is_torch_pickle:
                found.append(f"{name(path)}:{node.lineno}")
    assert found == []
    assert matches(r"allow_pickle\s*=\s*True", PACKAGE) == []


def test_the_package_catches_no_exception_blindly():
    found = []
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                if caught in {"", "Exception", "BaseException"}:
                    found.append(f"{name(path)}:{node.lineno}")
    assert found == []
