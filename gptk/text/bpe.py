"""Byte pair encoding: GPT-2's splitting rule, exact training, and the fast encoder.

Training: the text is split into pieces (no merge crosses one); at each merge the pair of ids with
the highest count over all pieces becomes the next id, from 256 up. "aaa" counts the pair (a, a)
twice; of equal counts the smallest pair of ids wins, so the result is the same on every run.
Reference: Sennrich et al. 2016, arXiv:1508.07909; Radford et al. 2019 (GPT-2), section 2.2.
"""

import heapq
import itertools
import re
from collections import Counter, defaultdict

from tokenizers import Tokenizer, models, pre_tokenizers

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
    frequency = Counter(split(text))
    words = [list(word) for word in frequency]
    weights = list(frequency.values())
    count: Counter[Pair] = Counter()
    holders: defaultdict[Pair, set[int]] = defaultdict(set)  # words that may hold the pair
    for n, word in enumerate(words):
        for pair in itertools.pairwise(word):
            count[pair] += weights[n]
            holders[pair].add(n)
    heap = [(-total, pair) for pair, total in count.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(merges) < n_merges:
        negative, best = heapq.heappop(heap)
        if count[best] != -negative:
            continue  # an old count; the present one has its own entry
        new = 256 + len(merges)
        merges.append(best)
        changed: Counter[Pair] = Counter()
        for n in holders.pop(best):
            old, word = words[n], _merge(words[n], best, new)
            for pair in itertools.pairwise(old):
                changed[pair] -= weights[n]
            for pair in itertools.pairwise(word):
                changed[pair] += weights[n]
                if new in pair:
                    holders[pair].add(n)
            words[n] = word
        for pair, difference in changed.items():
            if difference:
                count[pair] += difference
                if count[pair]:
                    heapq.heappush(heap, (-count[pair], pair))
    return merges


def _merge(word: list[int], pair: Pair, new: int) -> list[int]:
    merged, i = [], 0
    while i < len(word):
        if word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


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
