"""Token files: ids unchanged, published whole, every fault named."""

import hashlib
import os
import re

import numpy as np
import pytest

from gptk.text import token_file
from gptk.text.token_file import HEADER, MAGIC, TokenFileError


def test_ids_come_back_unchanged(shown, tmp_path):
    ids = shown.D2()["inputs"]["ids"]
    path = tmp_path / "tokens.bin"
    token_file.write(path, ids, 119_547)
    read = token_file.read(path, 119_547)
    assert read.tolist() == ids
    assert read.dtype == np.uint32
    token_file.write(path, ids[:5], 65_536)  # over the file that is mapped
    assert token_file.read(path).tolist() == ids[:5]
    assert token_file.read(path).dtype == np.uint16
    assert read.tolist() == ids
    assert [p.name for p in tmp_path.iterdir()] == ["tokens.bin"]


@pytest.mark.parametrize("size", [0, 1, 7])
def test_lists_and_arrays_of_any_length(size, tmp_path):
    path = tmp_path / "tokens.bin"
    for ids in (list(range(size)), np.arange(2 * size, dtype=np.int64)[:size]):
        token_file.write(path, ids, 10)
        assert token_file.read(path, 10).tolist() == list(range(size))


def test_what_is_read_cannot_be_written(tmp_path):
    token_file.write(tmp_path / "t", [1, 2], 10)
    with pytest.raises(ValueError, match="read-only"):
        token_file.read(tmp_path / "t")[0] = 5


@pytest.mark.parametrize("bad", [65_536, -1])
def test_an_id_outside_the_vocabulary_is_not_written(bad, tmp_path):
    path = tmp_path / "tokens.bin"
    token_file.write(path, [1], 10)
    with pytest.raises(TokenFileError, match=f"id {bad} at position 1 is outside the vocabulary"):
        token_file.write(path, [0, bad], 65_536)
    assert token_file.read(path).tolist() == [1]


def test_numbers_that_are_no_ids_are_refused(tmp_path):
    with pytest.raises(TokenFileError, match="ids must be one row of integers"):
        token_file.write(tmp_path / "t", np.array([1.5]), 10)
    with pytest.raises(TokenFileError, match="vocabulary size 0"):
        token_file.write(tmp_path / "t", [], 0)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "tokens.bin"
    token_file.write(path, [1, 2, 3], 10)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        token_file.write(path, [4], 10)
    assert token_file.read(path).tolist() == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["tokens.bin"]


def stored(ids, vocab, *, size=2, version=1, count=None, magic=MAGIC):
    payload = np.asarray(ids, dtype=f"<u{size}").tobytes()
    digest = hashlib.sha256(payload).digest()
    count = len(ids) if count is None else count
    return HEADER.pack(magic, version, size, vocab, count, digest) + payload


FAULTS = {
    "empty": (b"", "the file is empty"),
    "header": (stored([1], 10)[:40], "truncated within its header, at byte 40"),
    "magic": (stored([1], 10, magic=b"elsewise"), "not a token file"),
    "short-other": (b"hello", "not a token file"),
    "version": (stored([1], 10, version=9), "version 9; this program reads version 1"),
    "size": (stored([1], 10, size=8), "8 bytes per id; only 2 and 4 are known"),
    "odd": (stored([1, 2], 10)[:-1], "3 bytes of ids are no multiple of 2"),
    "truncated": (stored([1, 2], 10)[:-2], "truncated: holds 1 of its 2 ids"),
    "longer": (stored([1, 2], 10) + b"\0\0", "holds 3 ids, its header says 2"),
    "id": (stored([1, 10], 10), "id 10 at position 1 is outside the vocabulary of 10"),
    "dtype": (stored([1], 65_537), "2 bytes per id are too few for its vocabulary of 65537"),
    "vocab": (stored([1], 0), "vocabulary size 0"),
    "hash": (stored([1, 2], 10)[:-2] + b"\3\0", "damaged: its ids do not have the SHA-256"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_clear_sentence(fault, tmp_path):
    content, sentence = FAULTS[fault]
    path = tmp_path / "tokens.bin"
    path.write_bytes(content)
    with pytest.raises(TokenFileError, match=re.escape(sentence)) as caught:
        token_file.read(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_vocabulary_is_refused(tmp_path):
    token_file.write(tmp_path / "t", [1], 10)
    with pytest.raises(TokenFileError, match="for a vocabulary of 10, asked for one of 11"):
        token_file.read(tmp_path / "t", 11)
