"""Tokenizers: bytes, characters, or byte-level BPE. Tokens are bytes; saved as JSON."""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

KINDS = ("byte", "char", "bpe")


class Tokenizer:
    """Ids for text; decode(encode(text)) == text.

    Attributes:
        kind: one of KINDS.
        pieces: the bytes of each id; special tokens come last.
        token_bytes: bytes of text in each id; 0 for special tokens, which are no text.
        note: one line about what was not as asked, or "".
    """

    def __init__(self, kind: str, table: Any = None, special: Sequence[str] = ()) -> None:
        if kind not in KINDS:
            raise ValueError(f"tokenizer kind {kind!r}: must be one of {', '.join(KINDS)}")
        if not all(special) or len(set(special)) != len(special):
            raise ValueError(f"special tokens {list(special)}: must be distinct and not empty")
        self.kind, self.table, self.special, self.note = kind, table, tuple(special), ""
        if kind == "char":
            self.pieces = [c.encode() for c in table]
            self._ids = {c: i for i, c in enumerate(table)}
        elif kind == "byte":
            self.pieces = [bytes([i]) for i in range(256)]
        else:
            from gptk.text import bpe

            merges = [(int(left), int(right)) for left, right in table]
            self.pieces = bpe.tokens(merges)
            self._chunks, self._encoder = bpe.chunks, bpe.encoder(merges, self.pieces)
        self.token_bytes = [len(p) for p in self.pieces] + [0] * len(special)
        self._special_ids = {name: len(self.pieces) + i for i, name in enumerate(special)}
        self.pieces += [name.encode() for name in special]
        self.vocab_size = len(self.pieces)

    @classmethod
    def make(
        cls, kind: str, text: str, vocab_size: int = 1024, special: Sequence[str] = ()
    ) -> "Tokenizer":
        """Build from training text.

        Args:
            vocab_size: of bpe, special tokens included; a text with too few pairs gives fewer
                tokens and a `note`. The others' sizes follow from the text.
            special: names of control tokens; they get the last ids.

        Raises:
            ValueError: no text to learn from, or too small a vocabulary.
        """
        _check(text)
        if kind in ("char", "bpe") and not text:
            raise ValueError(f"a {kind} tokenizer cannot be built: the text is empty")
        if kind == "char":
            return cls("char", sorted(set(text)), special)
        if kind != "bpe":
            return cls(kind, None, special)
        from gptk.text import bpe

        least = 256 + len(special)
        if vocab_size < least:
            raise ValueError(
                f"vocabulary size {vocab_size}: bpe needs at least {least} tokens, "
                "one for each byte and special token"
            )
        made = cls("bpe", bpe.train(text, vocab_size - least), special)
        if made.vocab_size < vocab_size:
            made.note = (
                f"bpe: the text holds only {made.vocab_size - least} pairs to merge, so the "
                f"vocabulary has {made.vocab_size} tokens instead of {vocab_size}"
            )
        return made

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Ids of the text. The name of a special token is plain text like any other, unless the
        caller lists it in allowed_special.

        Raises:
            ValueError: a character without UTF-8 form or outside the vocabulary of char, or an
                allowed name that is no special token.
        """
        _check(text)
        for name in allowed_special:
            if name not in self._special_ids:
                raise ValueError(f"{name!r} is not a special token of this tokenizer")
        if not allowed_special:
            return self._encode(text, 0)
        longest_first = sorted(allowed_special, key=len, reverse=True)
        ids: list[int] = []
        offset = 0
        for part in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text):
            known = part in allowed_special
            ids += [self._special_ids[part]] if known else self._encode(part, offset)
            offset += len(part)
        return ids

    def _encode(self, text: str, offset: int) -> list[int]:
        if self.kind == "byte":
            return list(text.encode())
        if self.kind == "bpe":
            parts = (self._encoder.encode(part).ids for part in self._chunks(text))
            return [i for part in parts for i in part]
        try:
            return [self._ids[c] for c in text]
        except KeyError as error:
            c = error.args[0]
            raise ValueError(
                f"character {c!r} (U+{ord(c):04X}) at offset {offset + text.index(c)} "
                "is not in the vocabulary"
            ) from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids, joined.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        ids = list(ids)
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
        return b"".join([self.pieces[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD, after joining."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @property
    def sha256(self) -> str:
        """Of what save() writes."""
        return hashlib.sha256(self._json().encode()).hexdigest()

    def _json(self) -> str:
        stored = {"kind": self.kind, "table": self.table, "special": self.special}
        return json.dumps(stored, sort_keys=True)

    def save(self, path: Path) -> None:
        """Write JSON, ASCII only, whole or not at all; a file that holds it already stays.

        Raises:
            OSError: it cannot be written; an older file at that path is as it was.
        """
        path, raw = Path(path), self._json().encode("ascii")
        if path.is_file() and path.read_bytes() == raw:
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with temporary.open("wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read what save() wrote.

        Raises:
            ValueError: the file holds something else.
            OSError: it cannot be read.
        """
        raw = Path(path).read_bytes()
        try:
            stored = json.loads(raw)
            return cls(stored["kind"], stored["table"], stored.get("special", ()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{Path(path).name} is not a saved tokenizer ({error!r})") from None


def _check(text: str) -> None:
    """ValueError for a lone surrogate, the only character without UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"character U+{code:04X} at offset {error.start} is a lone surrogate: "
            "it has no UTF-8 form"
        ) from None
