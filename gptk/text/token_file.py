"""Token ids on disk: a header that says what they are, then the ids, read through a memory map.

Header, 64 bytes, little endian: magic (8 bytes), version (uint32), bytes per id (uint32; 2 up to
65,536 tokens of vocabulary, else 4), vocabulary size (uint64), number of ids (uint64), SHA-256 of
the ids as stored (32 bytes).
"""

import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MAGIC = b"gptktok\n"
VERSION = 1
HEADER = struct.Struct("<8sIIQQ32s")
CHUNK = 1 << 22
"""Ids that are checked at once, so that reading a large file takes little memory."""


class TokenFileError(ValueError):
    """The ids cannot be written, or the file is not what its header says; names file and fault."""


def id_bytes(vocab_size: int) -> int:
    """Bytes that hold every id below vocab_size: 2 or 4."""
    if not 1 <= vocab_size <= 1 << 32:
        raise TokenFileError(f"vocabulary size {vocab_size}: must be from 1 to 2**32")
    return 2 if vocab_size <= 1 << 16 else 4


def write(path: Path | str, ids: Sequence[int] | np.ndarray, vocab_size: int) -> None:
    """Publish the ids whole or not at all; an older file at that path survives any failure.

    Raises:
        TokenFileError: an id outside the vocabulary.
        OSError: the disk refuses; no temporary file stays.
    """
    path, size = Path(path), id_bytes(vocab_size)
    given = np.asarray(ids)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise TokenFileError(f"{path}: ids must be one row of integers")
    if given.size:
        _check_ids(path, given, vocab_size)
    stored = np.ascontiguousarray(given, dtype=f"<u{size}")
    digest = hashlib.sha256(stored.data if stored.size else b"").digest()
    header = HEADER.pack(MAGIC, VERSION, size, vocab_size, stored.size, digest)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(header)
            file.write(stored.data if stored.size else b"")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path | str, vocab_size: int | None = None) -> np.ndarray:
    """The ids, verified: read-only, in the file's own unsigned type.

    Args:
        vocab_size: if given, the file must have been written for a vocabulary of this size.

    Raises:
        TokenFileError: the file is damaged, or is another one than asked for.
        OSError: it cannot be opened.
    """
    path = Path(path)
    with open(path, "rb") as file:
        raw = file.read(HEADER.size)
        length = os.fstat(file.fileno()).st_size
    if length == 0:
        raise TokenFileError(f"{path}: the file is empty")
    if raw[: len(MAGIC)] != MAGIC[: len(raw)]:
        raise TokenFileError(f"{path}: not a token file (it begins with {raw[:8]!r})")
    if len(raw) < HEADER.size:
        raise TokenFileError(f"{path}: truncated within its header, at byte {length}")
    _, version, size, vocab, count, digest = HEADER.unpack(raw)
    _check_header(path, version, size, vocab, count, length - HEADER.size)
    if vocab_size is not None and vocab != vocab_size:
        raise TokenFileError(
            f"{path}: written for a vocabulary of {vocab}, asked for one of {vocab_size}"
        )
    if count == 0:
        ids = np.empty(0, dtype=f"<u{size}")
    else:
        ids = np.memmap(path, dtype=f"<u{size}", mode="r", offset=HEADER.size, shape=(count,))
    found = hashlib.sha256()
    for start in range(0, count, CHUNK):
        part = ids[start : start + CHUNK]
        found.update(part.data)
        _check_ids(path, part, vocab, start)
    if found.digest() != digest:
        raise TokenFileError(f"{path}: damaged: its ids do not have the SHA-256 of its header")
    return ids


def _check_header(path: Path, version: int, size: int, vocab: int, count: int, held: int) -> None:
    if version != VERSION:
        raise TokenFileError(f"{path}: version {version}; this program reads version {VERSION}")
    if size not in (2, 4):
        raise TokenFileError(f"{path}: {size} bytes per id; only 2 and 4 are known")
    if size < id_bytes(vocab):
        raise TokenFileError(
            f"{path}: {size} bytes per id are too few for its vocabulary of {vocab}"
        )
    if held % size:
        raise TokenFileError(f"{path}: {held} bytes of ids are no multiple of {size} bytes per id")
    if held < count * size:
        raise TokenFileError(f"{path}: truncated: holds {held // size} of its {count} ids")
    if held > count * size:
        raise TokenFileError(f"{path}: holds {held // size} ids, its header says {count}")


def _check_ids(path: Path, ids: np.ndarray, vocab_size: int, start: int = 0) -> None:
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        at = int(np.argmax((ids < 0) | (ids >= vocab_size)))
        raise TokenFileError(
            f"{path}: id {int(ids[at])} at position {start + at} is outside the vocabulary "
            f"of {vocab_size}"
        )
