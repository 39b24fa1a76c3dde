"""What a wrong command line or settings file is answered: one sentence, exit 2, no folder."""

import contextlib
import io
import json

import pytest

from gptk import cli
from gptk.text.corpus import Corpus
from gptk.text.tokenizer import Tokenizer
from gptk.train import config, hardware, options
from gptk.train.config import ConfigError
from gptk.train.data import RunData


def answer(*argv):
    """(exit code, standard error)."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = cli.main(list(argv))
    return code, said.getvalue()


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--data="], ["--data", "empty"]),
        (["--out="], ["--out", "empty"]),
        (["--config="], ["--config"]),
        (["--data", "None"], ["/None: there is no such file"]),
        (["--config", "None"], ["--config None"]),
        (["--resume", "None"], ["--resume None", "no run is there"]),
        (["--out", "o" * 300], ["--out ooo", "too long"]),
        (["--resume", "o" * 300], ["--resume ooo", "too long"]),
        (["--data", "o" * 300], ["--data ", "too long"]),
        (["d.txt"], ["did you mean --data d.txt"]),
        (["-n-layer", "2"], ["did you mean --n-layer"]),
        (["-lr", "2"], ["did you mean --learning-rate"]),
        (["--extend"], ["--extend", "--resume"]),
        (["--resume", "r", "--out", "q"], ["--resume r", "--out q"]),
        (["--resume", "r/checkpoints/step-4"], ["--resume r\n"]),
        (["--seed", str(2**63)], ["9223372036854775807"]),
        (["--max-steps", str(2**41)], [str(2**40)]),
        (["--grad-clip", "inf"], ["finite"]),
        (["--learning-rate", "0"], ["more than 0"]),
        (["--learning-rate", "nan"], ["above 0 and up to 1000"]),
    ],
)
def test_one_sentence_and_no_folder(tmp_path, words, parts):
    code, said = answer("train", *words)
    assert code == 2
    assert said.count("\n") == 1
    assert len(said) < 250
    assert [part for part in parts if part not in said] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content, part",
    [
        ('{"preset": ["a"]}', "--preset"),
        ('{"preset": 5}', "--preset 5"),
        ('{"data": 5}', "--data 5: must be a path"),
        ('{"model": {"n_layer": {"a": 1}}}', "--n-layer"),
        ('{"learning_rate": 1' + "0" * 400 + "}", "--learning-rate 1000"),
        ('{"n_layer": null}', "--n-layer None"),
        ('{"tokenizer": "zz"}', "--tokenizer zz: must be one of byte"),
        ('{"out": ""}', "--out is empty"),
        ('{"dropout": NaN}', "--dropout nan"),
        ('{"resume": "R"}', "--resume belongs on the command line"),
        ("[" * 100_000, "JSON"),
        ("\udcff", "JSON"),
    ],
)
def test_a_wrong_settings_file_is_one_sentence(tmp_path, content, part):
    (tmp_path / "c.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    code, said = answer("train", "--config", "c.json")
    assert (code, said.count("\n")) == (2, 1)
    assert part in said
    assert len(said) < 250


def test_settings_of_a_run_come_without_its_place(tmp_path):
    stored = config.to_json(config.resolve(config.build("laptop", {"out": "runs/a", "n_layer": 3})))
    run = tmp_path / "runs/a"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(stored))
    asked = options.parse(["--config=runs/a/config.json"]).config
    assert (asked.run.out, asked.model.n_layer) == (None, 3)
    assert options.parse(["--config=runs/a/config.json", "--out=b"]).config.run.out == "b"
    (tmp_path / "mine.json").write_text('{"out": "b"}')
    assert options.parse(["--config=mine.json"]).config.run.out == "b"


def test_none_is_a_name_and_the_same_folder_the_same_run(tmp_path):
    assert options.parse(["--data", "None"]).config.data.data == "None"
    (tmp_path / "r").mkdir()
    assert str(options.parse(["--resume", "r", "--out", "./r/"]).resume) == "r"


def test_a_setting_without_effect_is_noted():
    asked = options.parse(["--vocab-size=300", "--tokenizer=char"])
    assert [("--vocab-size" in note, "char" in note) for note in asked.notes] == [(True, True)]
    assert options.parse(["--vocab-size=300"]).notes == ()


def test_the_help_speaks_no_python(capsys):
    with pytest.raises(SystemExit):
        options.parse(["--help"])
    text = capsys.readouterr().out
    assert "None" not in text
    assert "--data PATH" in text


@pytest.mark.parametrize(
    "device", ["gpu", "CPU", "cpu:0", "", "cuda:", "cuda:-1", "cuda:1000", "cuda:\u0663", "mps:0"]
)
def test_a_device_is_checked_in_one_way(device):
    with pytest.raises(ConfigError, match="--device"):
        hardware.choose_device(device)
    with pytest.raises(ConfigError, match="--device"):
        config.resolve(config.build("laptop", {"device": device}))
    assert answer("sample", "R", "--device", device)[0] == 2


def test_an_absent_gpu_is_refused_by_number():
    with pytest.raises(ConfigError, match=r"--device cuda:999: PyTorch sees \d+ CUDA"):
        hardware.choose_device("cuda:999")


@pytest.mark.parametrize("train, val, most", [(100, 9, 8), (9, 9, 8), (5, 100, 4), (1, 1, None)])
def test_a_short_text_names_the_largest_block(train, val, most):
    settings = config.resolve(config.build("laptop", {"tokenizer": "byte", "block_size": 20}))
    text = Corpus("short.txt", "a" * train, "b" * val, "0")
    with pytest.raises(ConfigError, match=r"--data short\.txt.*--block-size 20") as caught:
        RunData(settings, text, Tokenizer.make("byte", ""))
    assert most is None or f"at most --block-size {most}," in str(caught.value)
    if most is not None:
        fits = config.replace(settings, {"block_size": most})
        RunData(fits, text, Tokenizer.make("byte", ""))


def test_a_huge_vocabulary_is_as_large_as_the_text_allows():
    made = Tokenizer.make("bpe", "ab ab ab abc", 2**31 - 1)
    assert 256 < made.vocab_size < 300
    assert made.note
