"""Byte pair encoding by the `tokenizers` package: GPT-2's splitting rule, training, encoding.

Training: the text is split into pieces (no merge crosses one); at each merge the pair with the
highest count over all pieces becomes the next id, from 256 up. "aaa" counts the pair (a, a)
twice; of equal counts the smallest pair of ids wins, so the result is the same on every run.
Reference: Sennrich et al. 2016, arXiv:1508.07909; Radford et al. 2019 (GPT-2), section 2.2.
"""

import json
import re

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

Pair = tuple[int, int]

CHUNK = 1 << 20
"""Characters that the encoder takes at once; bounds its memory."""
SAFE_CUT = re.compile(r"(?<=\S)\n(?=\S)")
"""A newline that is a piece of its own: the pieces on both sides do not depend on each other."""


def _symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte value."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(rest)) for byte in range(256)]


SYMBOLS = _symbols()
BYTE_OF_SYMBOL = {symbol: byte for byte, symbol in enumerate(SYMBOLS)}


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def split(text: str) -> list[bytes]:
    """The pieces of the text under GPT-2's pattern, as UTF-8; joined they are the text."""
    splitter = _splitter()
    return [
        bytes(BYTE_OF_SYMBOL[symbol] for symbol in piece)
        for part in chunks(text)
        for piece, _ in splitter.pre_tokenize_str(part)
    ]


def chunks(text: str) -> list[str]:
    """The text in parts of about CHUNK characters that split, and encode, as the whole does."""
    parts, start = [], 0
    while len(text) - start > CHUNK:
        cut = SAFE_CUT.search(text, start + CHUNK)
        if cut is None:
            break
        parts.append(text[start : cut.end()])
        start = cut.end()
    return [*parts, text[start:]]


def train(text: str, n_merges: int) -> list[Pair]:
    """At most n_merges merges, fewer where the pieces hold no further pair."""
    # every merge makes the text a token shorter at least, and the library reserves room for all
    n_merges = min(n_merges, len(text.encode()))
    # the library breaks ties in the order of its symbols: give it one that is the bytes' order
    symbols = [chr(0x100 + byte) for byte in range(256)]
    ordered = dict(enumerate(symbols))
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + n_merges, initial_alphabet=symbols, show_progress=False
    )
    lines = (
        " ".join(piece.decode("latin-1").translate(ordered) for piece in split(part))
        for part in chunks(text)
    )
    learner.train_from_iterator(lines, trainer)
    ids = {symbol: byte for byte, symbol in ordered.items()}
    merges: list[Pair] = []
    for left, right in json.loads(learner.to_str())["model"]["merges"]:
        ids[left + right] = 256 + len(merges)
        merges.append((ids[left], ids[right]))
    return merges


def tokens(merges: list[Pair]) -> list[bytes]:
    """The bytes of each id: the 256 bytes, then one token per merge.

    Raises:
        ValueError: a merge of ids that do not exist before it, or of bytes that have an id.
            Training makes neither: no merge crosses the ends of a token, so its bytes merge in
            every place as they do alone.
    """
    found = [bytes([byte]) for byte in range(256)]
    known = set(found)
    for left, right in merges:
        if not (0 <= left < len(found) and 0 <= right < len(found)):
            raise ValueError(f"merge {len(found)} joins {left} and {right}, which come later")
        token = found[left] + found[right]
        if token in known:
            raise ValueError(f"merge {len(found)} makes {token!r} a second time")
        known.add(token)
        found.append(token)
    return found


def encoder(merges: list[Pair], table: list[bytes]) -> Tokenizer:
    """The encoder with these ids; it knows no special tokens, so it reads all text as text."""
    names = ["".join(SYMBOLS[byte] for byte in token) for token in table]
    vocabulary = {name: n for n, name in enumerate(names)}
    model = models.BPE(vocabulary, [(names[left], names[right]) for left, right in merges])
    built = Tokenizer(model)
    built.pre_tokenizer = _splitter()
    return built
