"""The corpus: the default text, files byte for byte, and one sentence for each fault."""

import os
import re
import subprocess
import sys

import pytest

from gptk.text import corpus
from gptk.text.corpus import CorpusError


@pytest.fixture(scope="module")
def default():
    return corpus.load(None)


def test_the_default_text_has_the_wanted_size_and_alphabet(default):
    n = len(default.train) + len(default.val)
    assert 1_500_000 < n < 2_300_000
    assert 0.08 < len(default.val) / n < 0.12
    alphabet = set(default.train + default.val)
    assert 96 <= len(alphabet) <= 103
    assert all(" " <= c <= "~" for c in alphabet - corpus.EXTRA)


def test_the_default_text_holds_the_reference_and_docstrings_of_many_lines(default):
    text = default.train + default.val
    assert 'The "assert" statement' in text or "Assert statements" in text
    assert "Return a new" in text
    assert default.name.startswith("Python 3.")


def test_no_held_out_paragraph_is_trained_on(default):
    train = {p for p in default.train.split("\n\n") if len(p) >= 200}
    val = {p for p in default.val.split("\n\n") if len(p) >= 200}
    # docstrings are split as wholes, so that two may share a paragraph
    assert len(train & val) <= 0.02 * len(val)


def test_the_default_text_is_the_same_in_another_process(default):
    code = "from gptk.text import corpus; print(corpus.load(None).sha256)"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.stdout.strip() == default.sha256


def test_a_python_without_its_reference_is_named(monkeypatch):
    monkeypatch.setattr(corpus, "_docstrings", lambda library: ["A docstring. " * 9])
    monkeypatch.setattr(corpus, "_reference", list)
    assert "pydoc_data.topics, is not installed" in corpus.load(None).name
    monkeypatch.setattr(corpus, "_docstrings", lambda library: [])
    with pytest.raises(CorpusError, match=r"no default text.*--data FILE"):
        corpus.load(None)


def test_a_missing_reference_gives_no_pieces(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert corpus._reference() == []


def test_pieces_with_control_characters_are_left_out():
    pieces = ["kept\n  a", "kept\n  a\n", "bell \x07", "\u00df", "   ", "tab\tkept", "\u2026"]
    assert corpus._clean(pieces) == ["kept\n  a", "tab     kept", "\u2026"]


def test_docstrings_are_found_in_order_without_tests(tmp_path):
    long = "Word " * 20 + "end."
    (tmp_path / "b.py").write_text(f'"""Second {long}\n\nMore."""\n')
    (tmp_path / "a.py").write_text(f'def f():\n    """First {long}"""\nclass C:\n    """no"""\n')
    (tmp_path / "bad.py").write_text("def (:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text(f'"""Never {long}"""\n')
    assert corpus._docstrings(tmp_path) == [f"First {long}", f"Second {long}\n\nMore."]


def test_a_file_keeps_every_byte_in_any_locale(shown, tmp_path):
    raw = shown.D2()["inputs"]["file_bytes"]
    path = tmp_path / "text"
    path.write_bytes(raw)
    code = (
        "import sys; from gptk.text import corpus; from gptk.text.tokenizer import Tokenizer\n"
        "c = corpus.load(sys.argv[1]); text = c.train + c.val\n"
        "for kind in ('byte', 'char', 'bpe'):\n"
        "    t = Tokenizer.make(kind, text, 260); print(t.decode_bytes(t.encode(text)).hex())\n"
    )
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=env
    )
    assert run.stdout.split() == [raw.hex()] * 3, run.stderr


def test_a_file_is_split_at_nine_tenths_of_its_characters(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(("\u00e9" * 19).encode())
    found = corpus.load(path)
    assert (len(found.train), len(found.val)) == (17, 2)


def test_tinyshakespeare_is_split_as_elsewhere(shakespeare):
    found = corpus.load(shakespeare)
    assert (len(found.train), len(found.val)) == (1003854, 111540)


def test_a_folder_is_read_sorted_with_a_boundary_between_documents(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name, text in (("b.txt", "BBB"), ("a.md", "AAA"), ("sub/c.rst", "CCC"), ("x.bin", "no")):
        (tmp_path / name).write_text(text)
    (tmp_path / ".hidden" / "d.txt").write_text("no")
    (tmp_path / "empty.txt").write_text("")
    found = corpus.load(str(tmp_path))
    assert found.train + found.val == "AAA\n\nBBB\n\nCCC"


def test_every_fault_is_one_clear_sentence(shown, tmp_path):
    bad, empty = tmp_path / "bad.txt", tmp_path / "empty"
    bad.write_bytes(shown.D2()["inputs"]["bad_file"])
    empty.write_bytes(b"")
    folder, blank = tmp_path / "folder", tmp_path / "blank"
    folder.mkdir()
    blank.mkdir()
    (blank / "a.txt").write_bytes(b"")
    faults = {
        tmp_path / "none": "there is no such file or folder",
        bad: "not UTF-8: byte 0x81 at offset 3",
        empty: "the file is empty",
        folder: "no .txt, .md, .py, .rst file below this folder",
        blank: "the 1 text files below it are all empty",
    }
    for path, sentence in faults.items():
        with pytest.raises(CorpusError, match=re.escape(sentence)) as caught:
            corpus.load(str(path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(CorpusError, match=re.escape(f"{bad}: not UTF-8")):
        corpus.load(str(tmp_path))  # the file is named, not only the folder


def test_a_file_that_cannot_be_read_is_named(monkeypatch, tmp_path):
    path = tmp_path / "text"
    path.write_text("x")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(CorpusError, match=r"text: cannot be read \(Permission denied\)"):
        corpus.load(path)
