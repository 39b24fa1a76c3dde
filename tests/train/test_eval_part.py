"""Validation on a part: --eval-tokens, and a default for Triton's interpreter."""

import json

import pytest
import torch

from gptk.text.corpus import Corpus
from gptk.text.tokenizer import Tokenizer
from gptk.train import config, options
from gptk.train.data import RunData

TEXT = Corpus("text", "abcdefgh" * 40, "hgfedcba" * 400, "0" * 64)


def data(*words):
    settings = config.resolve(options.parse(["--tokenizer=byte", "--block-size=10", *words]).config)
    return RunData(settings, TEXT, Tokenizer.make("byte", ""))


def taken(some):
    return torch.cat([idx for idx, _ in some.val_batches(torch.device("cpu"))])


@pytest.mark.parametrize(
    "asked, windows", [(0, 319), (1, 1), (10, 1), (19, 1), (20, 2), (3000, 300), (10**9, 319)]
)
def test_a_part_is_the_first_whole_windows(asked, windows):
    some = data(f"--eval-tokens={asked}", "--backend=torch")
    assert torch.equal(taken(some), taken(data("--backend=torch"))[:windows])
    assert (some.eval_note == "") == (windows == 319)


@pytest.mark.parametrize("interpreter, part", [("1", True), ("0", False)])
def test_triton_in_the_interpreter_takes_a_part_and_says_so(monkeypatch, interpreter, part):
    monkeypatch.setenv("TRITON_INTERPRET", interpreter)
    some = data("--backend=triton")
    assert len(taken(some)) == (102 if part else 319)
    if part:
        assert some.eval_note == (
            "validation: 1,020 of 3,200 tokens, since Triton's interpreter is slow; "
            "--eval-tokens sets it"
        )
    same = data("--backend=torch", "--eval-tokens=1024")
    assert not part or torch.equal(taken(some), taken(same))
    assert len(taken(data("--backend=triton", "--eval-tokens=20"))) == 2
    assert len(taken(data("--backend=torch"))) == 319


def test_a_configuration_from_before_the_field_is_still_read():
    stored = json.loads(json.dumps(config.to_json(config.resolve(config.build()))))
    whole = config.from_json(stored)
    del stored["run"]["eval_tokens"]
    assert config.from_json(stored) == whole
