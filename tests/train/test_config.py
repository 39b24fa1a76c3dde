"""Settings: where they come from, and one sentence for each wrong one."""

import json

import pytest

from gptk.flags import UsageError
from gptk.train import config, options


def resolved(*argv):
    return config.flatten(config.resolve(options.parse(list(argv)).config))


def test_zero_is_a_float_and_one_a_learning_rate():
    values = resolved("--dropout=0", "--learning-rate", "1")
    assert type(values["dropout"]) is float
    assert values["dropout"] == 0.0
    assert values["learning_rate"] == 1.0


@pytest.mark.parametrize("words", [["--bias=False"], ["--bias", "False"], ["--no-bias"]])
def test_false_is_false(words):
    assert resolved(*words)["bias"] is False


@pytest.mark.parametrize("words", [["--bias=True"], ["--bias", "true"], ["--bias"], []])
def test_true_is_true(words):
    assert resolved(*words)["bias"] is True


def test_only_the_first_equals_sign_splits():
    values = resolved("--out=a=b", "--data", "c=d")
    assert (values["out"], values["data"]) == ("a=b", "c=d")


def test_underscores_and_repeats():
    assert resolved("--batch_size=3", "--batch-size", "5")["batch_size"] == 5


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--batchsize=4"], ["--batchsize", "--batch-size"]),
        (["--lr", "1"], ["--lr", "--learning-rate"]),
        (["--max_iters", "1"], ["--max_iters", "--max-steps"]),
        (["--zzz"], ["--zzz", "--help"]),
        (["--max-steps=ten"], ["--max-steps", "ten", "integer"]),
        (["--max-steps=1.5"], ["--max-steps", "1.5", "integer"]),
        (["--max-steps=0"], ["--max-steps", "0", "at least 1"]),
        (["--max-steps"], ["--max-steps", "no value"]),
        (["--dropout=hot"], ["--dropout", "hot", "number"]),
        (["--dropout=nan"], ["--dropout", "nan", "from 0 to 1"]),
        (["--dropout=1"], ["--dropout", "1.0", "below 1"]),
        (["--dropout=-0.1"], ["--dropout", "-0.1"]),
        (["--learning-rate=inf"], ["--learning-rate", "inf"]),
        (["--learning-rate=0"], ["--learning-rate", "more than 0"]),
        (["--min-lr=1", "--learning-rate=0.5"], ["--min-lr 1", "--learning-rate 0.5"]),
        (["--n-embd=10", "--n-head=3"], ["--n-embd 10", "--n-head 3", "divisible"]),
        (["--n-embd=1024", "--n-head=1"], ["--n-embd 1024", "256"]),
        (["--backend=trition"], ["--backend", "trition", "torch, triton, cpp", "mean triton"]),
        (["--tokenizer="], ["--tokenizer", "byte, char, bpe"]),
        (["--dtype=int8"], ["--dtype", "int8", "bfloat16"]),
        (["--device=gpu"], ["--device", "gpu", "cuda"]),
        (["--preset=gpt5"], ["--preset", "gpt5", "laptop"]),
        (["--bias=maybe"], ["--bias", "maybe", "True or False"]),
        (["--vocab-size=3"], ["--vocab-size", "3", "257"]),
        (["--seed=-1"], ["--seed", "-1"]),
        (["stray"], ["stray"]),
        (["--resume"], ["--resume", "--out"]),
        (["--resume=a", "--out=b"], ["--resume a", "--out b"]),
        (["--config=absent.json"], ["--config", "absent.json"]),
    ],
)
def test_a_wrong_setting_is_one_sentence(words, parts):
    with pytest.raises(UsageError) as caught:
        resolved(*words)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert [part for part in parts if part not in sentence] == []


def test_flag_beats_file_beats_preset_beats_default(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"n-layer": 3, "n_head": 2, "dropout": 0}))
    words = ["--preset=shakespeare", f"--config={file}", "--n-layer=5"]
    values = resolved(*words)
    assert values["n_layer"] == 5  # flag
    assert (values["n_head"], values["dropout"]) == (2, 0.0)  # file
    assert values["n_embd"] == config.PRESETS["shakespeare"]["n_embd"]  # preset
    assert values["weight_decay"] == config.OptimConfig.weight_decay  # default
    assert options.parse(words).explicit == {
        "n_layer": 5,
        "n_head": 2,
        "dropout": 0.0,
        "preset": "shakespeare",
    }


@pytest.mark.parametrize(
    "content, part",
    [
        ('{"n_layr": 1}', "--n-layer"),
        ('{"n_layer": "two"}', "integer"),
        ('{"bias": 1}', "True or False"),
        ("[1]", "object"),
        ("{", "JSON"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, content, part):
    file = tmp_path / "settings.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=part):
        resolved(f"--config={file}")


def test_the_stored_configuration_comes_back(tmp_path):
    before = config.resolve(options.parse(["--preset=gpt2", "--out=x"]).config)
    text = json.dumps(config.to_json(before))
    assert config.from_json(json.loads(text)) == before
    file = tmp_path / "config.json"
    file.write_text(text)
    assert config.resolve(options.parse([f"--config={file}"]).config) == before


@pytest.mark.parametrize("preset", config.PRESETS)
def test_presets_are_valid(preset):
    values = resolved(f"--preset={preset}")
    assert values["min_lr"] <= values["learning_rate"]


@pytest.mark.parametrize(
    "field, value",
    [
        ("n_layer", 10**9),
        ("n_layer", -1),
        ("dropout", float("nan")),
        ("n_embd", "8"),
        ("max_steps", True),
    ],
)
def test_a_hostile_stored_configuration_is_refused(field, value):
    stored = config.to_json(config.resolve(config.build()))
    stored[config.OWNER[field]][field] = value
    with pytest.raises(UsageError, match=config.flag(field)):
        config.from_json(stored)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        options.parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    flags = [
        config.flag(n)
        for n in (*config.FIELDS, "preset", "resume", "config", "extend", "breakdown")
    ]
    assert [flag for flag in flags if flag not in text] == []
