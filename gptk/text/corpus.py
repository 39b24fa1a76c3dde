"""The corpus: the Python reference and docstrings on this disk, or the user's own text."""

import ast
import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

SKIPPED = {"test", "tests", "idlelib", "encodings", "site-packages", "lib2to3"}
SUFFIXES = (".txt", ".md", ".py", ".rst")


class CorpusError(ValueError):
    """The text cannot be used; the message names the file and the fault."""


@dataclass
class Corpus:
    """Text, split into training and validation; sha256 of all of it."""

    name: str
    train: str
    val: str
    sha256: str


def load(data: str | None) -> Corpus:
    """The default corpus (None), a file, or every text file below a folder, sorted."""
    if data is None:
        return _default()
    path = Path(data)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
        if not files:
            raise CorpusError(f"--data {data}: no {', '.join(SUFFIXES)} file below this folder")
        text = "\n\n".join(_read(p) for p in files)
    elif path.is_file():
        text = _read(path)
    else:
        raise CorpusError(f"--data {data}: no such file or folder")
    if not text:
        raise CorpusError(f"--data {data}: the text is empty")
    cut = int(len(text) * 0.9)  # nanoGPT's split: the last tenth is held out
    return Corpus(data, text[:cut], text[cut:], _sha256(text))


def _read(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 at byte offset {error.start}") from None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _default() -> Corpus:
    """Language reference and standard-library docstrings, once each, split by paragraph hash."""
    from pydoc_data.topics import topics

    pieces = [p for _, text in sorted(topics.items()) for p in text.split("\n\n")]
    pieces += _docstrings(Path(sysconfig.get_path("stdlib")))
    pieces = list(dict.fromkeys(p.strip("\n") for p in pieces if p.strip()))
    held = [hashlib.sha256(p.encode()).digest()[0] < 26 for p in pieces]  # 26 of 256: a tenth
    train = "\n\n".join(p for p, out in zip(pieces, held, strict=True) if not out)
    val = "\n\n".join(p for p, out in zip(pieces, held, strict=True) if out)
    return Corpus("Python reference and docstrings", train, val, _sha256(train + "\0" + val))


def _docstrings(root: Path) -> list[str]:
    found = []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py")):
        if SKIPPED & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        docs = (ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, kinds))
        found += [d for d in docs if d and len(d) >= 80 and d.isprintable() | ("\n" in d)]
    return found
