"""Tokenizers: bytes, characters, or byte-level BPE (the `tokenizers` package). Saved as JSON."""

import hashlib
import json
from pathlib import Path
from typing import Any


class Tokenizer:
    """Ids for text. `table` is the character list (char) or the BPE's own JSON (bpe)."""

    def __init__(self, kind: str, table: Any = None) -> None:
        self.kind, self.table = kind, table
        if kind == "char":
            self.pieces = [c.encode() for c in table]
            self._ids = {c: i for i, c in enumerate(table)}
        elif kind == "byte":
            self.pieces = [bytes([i]) for i in range(256)]
        else:
            import tokenizers

            self._bpe = tokenizers.Tokenizer.from_str(table)
            alphabet = _byte_of_symbol()
            names = (self._bpe.id_to_token(i) for i in range(self._bpe.get_vocab_size()))
            self.pieces = [bytes(alphabet[c] for c in name) for name in names]
        self.vocab_size = len(self.pieces)
        self.token_bytes = [len(p) for p in self.pieces]

    @classmethod
    def make(cls, kind: str, text: str, vocab_size: int = 1024) -> "Tokenizer":
        """Build from training text; bpe learns at most vocab_size tokens from it."""
        if kind == "char":
            return cls("char", sorted(set(text)))
        if kind == "byte":
            return cls("byte")
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=symbols, show_progress=False
        )
        bpe.train_from_iterator([text], trainer)
        return cls("bpe", bpe.to_str())

    def encode(self, text: str) -> list[int]:
        """Ids of the text; nothing in it is ever a control token."""
        if self.kind == "byte":
            return list(text.encode())
        if self.kind == "bpe":
            return self._bpe.encode(text).ids
        try:
            return [self._ids[c] for c in text]
        except KeyError as error:
            c = error.args[0]
            raise ValueError(
                f"character {c!r} (U+{ord(c):04X}) at {text.index(c)} is not in the vocabulary"
            ) from None

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes of the ids; an id outside the vocabulary is a ValueError."""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
        return b"".join(self.pieces[i] for i in ids)

    def decode(self, ids: list[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD after joining."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @property
    def sha256(self) -> str:
        """Of what save() writes."""
        return hashlib.sha256(self._json().encode()).hexdigest()

    def _json(self) -> str:
        return json.dumps({"kind": self.kind, "table": self.table}, sort_keys=True)

    def save(self, path: Path) -> None:
        """Write JSON."""
        Path(path).write_text(self._json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read what save() wrote."""
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(stored["kind"], stored["table"])


def _byte_of_symbol() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}
