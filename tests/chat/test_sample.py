"""gptk sample: default prompts, odd bytes, broken weights; one sentence where it cannot go on."""

import contextlib
import io
import math
import os
import sys

import pytest
import torch

from gptk import cli
from gptk.chat import load, sample
from gptk.chat.generate import for_display, start_text
from gptk.text.tokenizer import Tokenizer
from gptk.train import options, start
from gptk.train.loop import train
from gptk.train.stop import Stop


def command(*argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a text without a new line."""
    place = tmp_path_factory.mktemp("sample")
    (place / "data.txt").write_text("to be, or not to be " * 20)
    words = (
        f"--data={place / 'data.txt'} --out={place / 'run'} --tokenizer=char --n-layer=1 "
        "--n-head=1 --n-embd=8 --block-size=8 --batch-size=2 --max-steps=1 --warmup-steps=1 "
        "--device=cpu --backend=torch"
    )
    with start.opened(options.parse(words.split())) as a_run:
        train(a_run, Stop())
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            assert start.train_and_show(a_run) == 0
    assert "a sample of 300 tokens" in shown.getvalue()
    return place / "run"


def test_the_start_is_a_new_line_or_the_first_known_character():
    assert start_text(Tokenizer.make("byte", "")) == "\n"
    assert start_text(Tokenizer.make("char", "b\na")) == "\n"
    assert start_text(Tokenizer.make("char", "cba")) == "a"


@pytest.mark.parametrize("prompt", [[], ["--prompt", ""], ["--prompt="]])
def test_no_prompt_is_the_start(run, prompt):
    code, out, _ = command("sample", run, "--max-new-tokens=5", "--seed=1", *prompt)
    assert (code, len(out), out[0]) == (0, 7, " ")


@pytest.mark.parametrize(
    "words, part",
    [
        (["--prompt=\u00e9"], "--prompt: character '\u00e9'"),
        (["--prompt=\udcff"], "--prompt: not UTF-8"),
        (["-seed", "1"], "did you mean --seed"),
    ],
)
def test_a_wrong_word_is_one_sentence(run, words, part):
    code, _, said = command("sample", run, *words)
    assert (code, said.count("\n")) == (2, 1)
    assert part in said


@pytest.mark.parametrize("name", ["", "absent", "o" * 300])
def test_no_run_is_one_sentence(name):
    code, _, said = command("sample", name)
    assert (code, said.count("\n")) == (2, 1)
    assert len(said) < 150


def test_a_prompt_is_utf_8_whatever_the_locale():
    taken = "\u00e9".encode().decode("ascii", "surrogateescape")
    if os.fsencode(taken) == "\u00e9".encode():
        assert sample._as_utf8(taken) == "\u00e9"
    assert sample._as_utf8("\u00e9\u2192") == "\u00e9\u2192"


def test_weights_that_are_not_finite_are_one_sentence(run, monkeypatch):
    real = load.load

    def broken(*args):
        model, *rest = real(*args)
        with torch.no_grad():
            model.ln_f.weight.fill_(math.nan)
        return (model, *rest)

    monkeypatch.setattr(load, "load", broken)
    code, _, said = command("sample", run)
    assert (code, said.count("\n")) == (1, 1)
    assert "NaN" in said


def test_control_characters_are_written_out_on_a_terminal_only(monkeypatch):
    text = "a\n\tb\x1b[2J\x07\x7f\x9b\u00e9"
    assert for_display(text) == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert for_display(text) == "a\n\tb\\x1b[2J\\x07\\x7f\\x9b\u00e9"
