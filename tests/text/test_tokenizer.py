"""Tokenizers: GPT-2's pieces, exact BPE training, round trips, and refusals."""

import json
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptk.text import bpe
from gptk.text.tokenizer import Tokenizer

TEXT = "I'll say: they're 1234 caf\u00e9s, don't WE'LL?\n\n  low lower lowest newest widest\n" * 9
NAMES = ("<|end|>", "<|end|>|", "<|user|>")
TOKENIZERS = [
    Tokenizer.make("byte", TEXT),
    Tokenizer.make("bpe", TEXT, 300),
    Tokenizer.make("bpe", TEXT, 300, NAMES),
]
QUICK = settings(derandomize=True, max_examples=150, deadline=None, database=None)
ANY = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
TRICKY = st.text(
    st.sampled_from(
        "'sdmtlvreSD aZ1_\u00b2\u00bd\u2163 \n\t\r\u00a0\u0085\u2028\u1680\u3000"
        "\x1c\u200b\u0301\U0001f415"
    ),
    max_size=30,
)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: f"{t.kind}-{t.vocab_size}")
@QUICK
@given(text=ANY | TRICKY)
def test_decode_inverts_encode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert sum(tokenizer.token_bytes[i] for i in ids) == len(text.encode())


@QUICK
@given(text=ANY.filter(bool))
def test_char_inverts_its_own_text(text):
    tokenizer = Tokenizer.make("char", text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(set(text))


def test_pieces_are_those_of_gpt2(shown):
    for text, pieces in shown.K2()["expect"]["pieces"].items():
        assert [piece.decode() for piece in bpe.split(text)] == pieces
    case = shown.K7()
    assert [p.decode() for p in bpe.split(case["inputs"]["user_text"])] == case["expect"]["pieces"]


@QUICK
@given(text=TRICKY | st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=30))
def test_any_assigned_text_splits_as_gpt2_does(shown, text):
    assert [piece.decode() for piece in bpe.split(text)] == shown.R.gpt2_split(text)


def test_no_merge_crosses_a_piece():
    tokenizer = Tokenizer.make("bpe", "x\u00b2y \u00bd!! ab" * 50, 300)
    for piece in tokenizer.pieces[256:]:
        assert any(piece in whole for whole in bpe.split("x\u00b2y \u00bd!! ab" * 2))


def test_parts_of_a_long_text_encode_as_the_whole(monkeypatch):
    tokenizer = TOKENIZERS[1]
    whole = tokenizer.encode(TEXT + " \n 's\n'll\n\nx\n y")
    monkeypatch.setattr(bpe, "CHUNK", 3)
    assert len(bpe.chunks(TEXT + " \n 's\n'll\n\nx\n y")) > 5
    assert tokenizer.encode(TEXT + " \n 's\n'll\n\nx\n y") == whole


def test_training_and_encoding_of_the_classic_example(shown):
    case = shown.K6()
    text = case["inputs"]["text"].decode()
    tokenizer = Tokenizer.make("bpe", text, 256 + case["inputs"]["merges"])
    assert tokenizer.encode(text) == case["expect"]["ids"]
    assert tuple(tokenizer.table[0]) == case["expect"]["first_merge"]


@QUICK
@given(text=st.text("ab ", max_size=40) | st.text("aab\u00e9 '\n", max_size=60))
def test_every_merge_has_the_highest_count_recounted_from_scratch(shown, text):
    reference, sequences = shown.R.bpe_train([list(p) for p in bpe.split(text)], 30, True)
    merges = bpe.train(text, 30)
    assert merges == [pair for pair, _ in reference]
    ids = bpe.encoder(merges, bpe.tokens(merges)).encode(text).ids
    assert ids == [i for sequence in sequences for i in sequence]


def test_no_two_ids_have_the_same_bytes():
    table = bpe.tokens(bpe.train("aaaa aaa aaab baaa abab aabaa " * 5, 60))
    assert len(set(table)) == len(table) > 260
    with pytest.raises(ValueError, match="merge 259 makes b'aaa' a second time"):
        bpe.tokens([(97, 97), (256, 97), (98, 98), (97, 256)])


@pytest.mark.parametrize("text, merges", [(" ", 0), ("a", 0), ("ab", 1)])
def test_too_little_text_gives_fewer_merges_and_says_so(text, merges):
    tokenizer = Tokenizer.make("bpe", text, 300)
    assert tokenizer.vocab_size == 256 + merges
    assert f"{256 + merges} tokens instead of 300" in tokenizer.note
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert Tokenizer.make("bpe", text, 256).note == ""


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_an_empty_text_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=f"{kind} tokenizer cannot be built: the text is empty"):
        Tokenizer.make(kind, "")


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocabulary size 258: bpe needs at least 259"):
        Tokenizer.make("bpe", TEXT, 258, NAMES)


def test_training_is_the_same_on_every_run():
    assert Tokenizer.make("bpe", TEXT, 320).sha256 == Tokenizer.make("bpe", TEXT, 320).sha256


def test_a_lone_byte_counts_as_one(shown):
    case = shown.K4()
    tokenizer = TOKENIZERS[1]
    assert tokenizer.token_bytes[0x80] == case["expect"]["byte_token_length"]
    ids = tokenizer.encode(case["inputs"]["text"])
    assert sum(tokenizer.token_bytes[i] for i in ids) == case["expect"]["sum_of_token_bytes"]
    dog = "\U0001f415".encode()
    assert [tokenizer.decode([b]) for b in dog] == ["\ufffd"] * 4
    assert tokenizer.decode(dog) == "\U0001f415"


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_control_text_is_plain_text_unless_allowed(kind):
    alphabet = "".join(sorted(set("".join(NAMES) + TEXT)))
    tokenizer = Tokenizer.make(kind, alphabet + TEXT, 300, NAMES)
    control = set(range(tokenizer.vocab_size - 3, tokenizer.vocab_size))
    text = "user<|end|> and <|user|>"
    plain = tokenizer.encode(text)
    assert not control & set(plain)
    assert tokenizer.decode(plain) == text
    allowed = tokenizer.encode(text, allowed_special={"<|end|>"})
    assert [i for i in allowed if i in control] == [tokenizer.vocab_size - 3]
    assert tokenizer.decode(allowed) == text
    longest = tokenizer.encode("<|end|>|", allowed_special=NAMES)
    assert longest == [tokenizer.vocab_size - 2]
    assert [tokenizer.token_bytes[i] for i in sorted(control)] == [0, 0, 0]
    with pytest.raises(ValueError, match=r"'<\|no\|>' is not a special token"):
        tokenizer.encode(text, allowed_special=["<|no|>"])


def test_without_special_tokens_none_is_parsed(shown):
    text = shown.K7()["inputs"]["user_text"]
    tokenizer = TOKENIZERS[1]
    assert b"".join(tokenizer.pieces[i] for i in tokenizer.encode(text)) == text.encode()
    assert tokenizer.vocab_size == 300


@pytest.mark.parametrize("name", ["a", "caret", "letters"])
def test_long_repeats_take_linear_time(shown, name):
    tokenizer = Tokenizer.make("bpe", "aaaaaaaa ^^^^^^^^ " * 9 + TEXT, 320)
    text = shown.K8()["inputs"][name]
    seconds = []
    for doubled in (text, text * 2):
        start = time.perf_counter()
        ids = tokenizer.encode(doubled)
        seconds.append(time.perf_counter() - start)
        assert tokenizer.decode(ids) == doubled
    assert seconds[0] < 5
    assert seconds[1] < 3 * seconds[0] + 1  # a second for whatever else the machine does


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: f"{t.kind}-{t.vocab_size}")
@pytest.mark.parametrize("beyond", [-1, 0, 47])
def test_an_id_outside_the_vocabulary_is_named(tokenizer, beyond):
    bad = -1 if beyond < 0 else tokenizer.vocab_size + beyond
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary"):
        tokenizer.decode([65, bad])


def test_an_unknown_character_is_named_with_its_place():
    tokenizer = Tokenizer.make("char", "abc<>", special=["<>"])
    with pytest.raises(ValueError, match=r"'\u00e9' \(U\+00E9\) at offset 3 is not in the vocab"):
        tokenizer.encode("abc\u00e9")
    with pytest.raises(ValueError, match=r"\(U\+00E9\) at offset 5 is not in the vocabulary"):
        tokenizer.encode("abc<>\u00e9", allowed_special=["<>"])


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: f"{t.kind}-{t.vocab_size}")
def test_a_lone_surrogate_is_named_with_its_place(tokenizer):
    with pytest.raises(ValueError, match=r"U\+D800 at offset 2 is a lone surrogate"):
        tokenizer.encode("ab\ud800")


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_a_saved_tokenizer_is_the_same_one(kind, tmp_path):
    tokenizer = Tokenizer.make(kind, TEXT, 300, NAMES)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert json.loads(path.read_bytes())["kind"] == kind
    loaded = Tokenizer.load(path)
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert loaded.pieces == tokenizer.pieces


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff",
        b'{"kind": "x", "table": 0}',
        b'{"kind": "bpe", "table": [[300, 1]]}',
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^tokenizer\.json is not a saved tokenizer"):
        Tokenizer.load(path)


def test_an_unknown_kind_and_double_names_are_refused():
    with pytest.raises(ValueError, match="tokenizer kind 'word': must be one of byte, char, bpe"):
        Tokenizer.make("word", TEXT)
    with pytest.raises(ValueError, match="must be distinct and not empty"):
        Tokenizer.make("byte", TEXT, special=["a", "a"])


def test_byte_and_char_need_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.delitem(sys.modules, "gptk.text.bpe")
    assert Tokenizer.make("byte", TEXT).encode("ab") == [97, 98]
    assert Tokenizer.make("char", "ab").encode("ba") == [1, 0]
