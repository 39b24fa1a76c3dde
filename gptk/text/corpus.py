"""The corpus: the Python reference and docstrings on this disk, or the user's own text."""

import ast
import hashlib
import importlib
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".txt", ".md", ".py", ".rst")
"""Files of a folder that count as text."""
SKIPPED = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
"""Folders of the standard library without prose of their own."""
SHORTEST = 80
"""Characters of the shortest docstring that is kept."""
EXTRA = set("\n\u2026\u2018\u2019\u201c\u201d")
"""Characters besides printable ASCII; a piece that holds another one is left out."""
BOUNDARY = "\n\n"
"""Between two paragraphs, docstrings or files."""


class CorpusError(ValueError):
    """The text cannot be used; the message names the file and the fault."""


@dataclass(frozen=True)
class Corpus:
    """Text, split into training and validation; sha256 of all of it."""

    name: str
    train: str
    val: str
    sha256: str


def load(data: str | Path | None) -> Corpus:
    """The default corpus (None), a file, or the text files below a folder in sorted order.

    A file's characters are its bytes decoded as UTF-8: line ends stay as they are, whatever the
    locale. The first int(0.9 * n) characters are for training, the rest is held out.

    Raises:
        CorpusError: missing, empty, unreadable, or not UTF-8 (with file and byte offset).
    """
    if data is None:
        return _default()
    path = Path(data)
    try:
        if path.is_dir():
            text = _read_folder(path)
        elif path.exists():
            text = _read(path)
        else:
            raise CorpusError(f"--data {data}: there is no such file or folder")
    except OSError as error:  # not even looked up: too long a name, a folder of another user
        shown = str(data) if len(str(data)) <= 80 else f"{str(data)[:77]}..."
        raise CorpusError(f"--data {shown}: cannot be read ({error.strerror})") from None
    if not text:
        raise CorpusError(f"--data {data}: the file is empty")
    cut = int(len(text) * 0.9)
    return Corpus(str(data), text[:cut], text[cut:], _sha256(text.encode()))


def _read_folder(folder: Path) -> str:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise CorpusError(f"--data {folder}: no {', '.join(SUFFIXES)} file below this folder")
    documents = [document for document in map(_read, files) if document]
    if not documents:
        raise CorpusError(f"--data {folder}: the {len(files)} text files below it are all empty")
    return BOUNDARY.join(documents)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise CorpusError(
            f"--data {path}: not UTF-8: byte 0x{byte:02x} at offset {error.start}"
        ) from None
    except OSError as error:
        raise CorpusError(f"--data {path}: cannot be read ({error.strerror})") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _default() -> Corpus:
    """Language reference and standard-library docstrings, each piece once. About a tenth, chosen
    by the piece's own hash, is held out: no piece changes sides when others come or go."""
    version = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    reference = _reference()
    name = f"{version} reference and docstrings"
    if not reference:
        name = f"{version} docstrings (its reference, pydoc_data.topics, is not installed)"
    pieces = _clean([*reference, *_docstrings(Path(sysconfig.get_path("stdlib")))])
    if not pieces:
        raise CorpusError(
            "no default text: this Python has neither pydoc_data nor its library's sources; "
            "name a text file with --data FILE"
        )
    held_out = [_sha256(piece.encode()) < "1a" for piece in pieces]  # 26 of 256
    train = BOUNDARY.join(p for p, out in zip(pieces, held_out, strict=True) if not out)
    val = BOUNDARY.join(p for p, out in zip(pieces, held_out, strict=True) if out)
    return Corpus(name, train, val, _sha256(f"{train}\0{val}".encode()))


def _reference() -> list[str]:
    """Paragraphs of the language reference; none where it is not installed."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        return []
    return [piece for _, text in sorted(topics.items()) for piece in text.split(BOUNDARY)]


def _docstrings(library: Path) -> list[str]:
    """Docstrings of the sources below the folder, in the order of files and lines."""
    found = []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(library.rglob("*.py")):
        if SKIPPED & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # not a source of this Python: its text is not part of the corpus
        documented = [node for node in ast.walk(tree) if isinstance(node, kinds)]
        documented.sort(key=lambda node: getattr(node, "lineno", 0))
        found += [ast.get_docstring(node) or "" for node in documented]
    return [doc for doc in found if len(doc) >= SHORTEST]


def _clean(pieces: Iterable[str]) -> list[str]:
    """Each piece once, in order, without those that hold control or rare characters."""
    stripped = dict.fromkeys(piece.expandtabs().strip("\n") for piece in pieces)
    return [p for p in stripped if p.strip() and all(" " <= c <= "~" for c in set(p) - EXTRA)]
