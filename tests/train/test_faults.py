"""Faults around a run: what a folder holds, damage, full disks, lost output; nothing is lost."""

import contextlib
import errno
import io
import json
import math
import shutil
import sys

import pytest
import torch

from gptk import cli
from gptk.flags import Failure, UsageError
from gptk.train import checkpoint, folder, options, start
from gptk.train.loop import NonFinite, train
from gptk.train.stop import Stop

SIZES = (
    "--tokenizer=byte --n-layer=1 --n-head=1 --n-embd=8 --block-size=8 --batch-size=2 "
    "--warmup-steps=2 --max-steps=4 --save-interval=2 --device=cpu --backend=torch --dtype=float32"
).split()


def words(place, *more):
    if not (place / "data.txt").exists():
        (place / "data.txt").write_text("to be, or not to be: that is the question.\n\n" * 8)
    return [f"--data={place / 'data.txt'}", *SIZES, *more]


def opened(place, *more):
    return start.opened(options.parse(words(place, f"--out={place / 'run'}", *more)))


def command(*argv):
    """(exit code, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    place = tmp_path_factory.mktemp("finished")
    with opened(place) as run:
        train(run, Stop())
    return place


@pytest.fixture
def place(finished, tmp_path):
    """A finished run, in `run`, and its data."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def content(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


# ---- a new run never starts over an old one ------------------------------------------------


@pytest.mark.parametrize("left", folder.OF_A_RUN)
def test_a_new_run_is_refused_where_anything_of_a_run_is(place, left):
    kept = {path.parts[0] for path in map(type(place), [left])}
    for path in (place / "run").iterdir():
        if not any(path.match(name) for name in kept):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if left == "loss.png":
        (place / "run/loss.png").write_bytes(b"")
    before = content(place / "run")
    assert before
    with pytest.raises(UsageError, match=r"--out .*a run is there already.*--resume"):
        folder.prepare(options.parse(words(place, f"--out={place / 'run'}")))
    assert content(place / "run") == before


def test_the_log_of_a_run_without_checkpoints_is_set_aside(place, capsys):
    log = (place / "run/metrics.jsonl").read_bytes()
    shutil.rmtree(place / "run/checkpoints")
    with opened(place, "--resume"):
        pass
    assert (place / "run/metrics.1.jsonl").read_bytes() == log
    assert "metrics.1.jsonl" in capsys.readouterr().out


def publish(root, step):
    checkpoint.publish(root, step, {"x": lambda path: path.write_text("x")}, keep=2)


def test_damaged_and_foreign_checkpoints_take_no_place(tmp_path):
    (tmp_path / "step-99").mkdir()  # foreign: newer than all that is published
    (tmp_path / "step-0").mkdir()
    for step in (1, 2):
        publish(tmp_path, step)
    (tmp_path / "step-2/x").write_text("y")
    publish(tmp_path, 3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-0", "step-1", "step-2", "step-3", "step-99"]
    publish(tmp_path, 4)  # two whole ones now, so those before them go
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-0", "step-3", "step-4", "step-99"]


@pytest.mark.parametrize("out", [[], ["--out", "a/b"]])
@pytest.mark.parametrize("wrong", [["--device=cuda:998"], ["--data=none.txt"]])
def test_a_refused_command_leaves_no_folder(tmp_path, monkeypatch, out, wrong):
    monkeypatch.chdir(tmp_path)
    code, _, _ = command("train", *words(tmp_path), *out, *wrong)
    assert code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["data.txt"]
    (tmp_path / "a/b").mkdir(parents=True)  # the user's own stays
    assert command("train", *words(tmp_path), "--out=a/b", *wrong)[0] == 2
    assert (tmp_path / "a/b").is_dir()


# ---- damage around good checkpoints --------------------------------------------------------


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"preset": 1}'])
def test_a_lost_configuration_is_that_of_the_checkpoint(place, capsys, text):
    file = place / "run/config.json"
    before = json.loads(file.read_text())
    file.unlink()
    if text is not None:
        file.write_text(text)
    with start.opened(options.parse([f"--resume={place / 'run'}"])) as run:
        assert run.at.step == 4
    assert "the settings are those that step-4 holds" in capsys.readouterr().out
    assert json.loads(file.read_text()) == before


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", None])
def test_a_damaged_tokenizer_is_that_of_the_checkpoint(place, capsys, raw):
    file = place / "run/tokenizer.json"
    before = file.read_bytes()
    file.unlink() if raw is None else file.write_bytes(raw)
    with opened(place, "--resume"):
        pass
    assert file.read_bytes() == before
    assert ("the copy in step-4" in capsys.readouterr().out) == (raw is not None)


def test_an_unchanged_tokenizer_is_not_written_again(place):
    before = (place / "run/tokenizer.json").stat()
    with opened(place, "--resume"):
        pass
    assert (place / "run/tokenizer.json").stat().st_mtime_ns == before.st_mtime_ns


def test_a_bad_line_of_the_log_costs_no_run(place, capsys):
    file = place / "run/metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], b"{bad\n", *lines[1:]]))
    with opened(place, "--resume"):
        pass
    assert capsys.readouterr().out.count("line 2 cannot be read") == 1
    assert file.read_bytes() == b"".join(lines)


def test_a_run_resumes_from_another_folder_and_names_lost_data(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    (place / "sub").mkdir()
    fresh = options.parse(["--data=data.txt", *SIZES, "--out=other"])
    with start.opened(fresh) as run:
        train(run, Stop())
    monkeypatch.chdir(place / "sub")
    with start.opened(options.parse(["--resume=../other"])):
        pass
    (place / "data.txt").rename(place / "moved.txt")
    code, _, said = command("train", "--resume", "../other")
    assert (code, "--data" in said, "moved" in said) == (2, True, True)


# ---- failures while it runs ----------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 3])
def test_a_log_that_cannot_be_written_saves_the_run_first(tmp_path, step):
    with opened(tmp_path) as run:
        real = run.metrics.write

        def write(record):
            if record["step"] == step:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(record)

        run.metrics.write = write
        with pytest.raises(Failure, match=rf"metrics\.jsonl: No space.* saved at step {step}"):
            train(run, Stop())
    with opened(tmp_path, "--resume") as run:
        assert run.at.step == step
        assert run.at.evaluated == (-1 if step == 0 else 0)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokens-train.bin"])
def test_a_full_disk_names_the_file(tmp_path, monkeypatch, name):
    import os

    real = os.replace

    def replace(source, target, **how):
        if str(target).endswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(source, target, **how)

    monkeypatch.setattr("os.replace", replace)
    monkeypatch.setattr("pathlib.Path.replace", lambda self, target: replace(self, target))
    code, _, said = command("train", *words(tmp_path), f"--out={tmp_path / 'run'}")
    assert (code, said.count("\n")) == (1, 1)
    assert f"{name}: No space left on device" in said
    assert not list((tmp_path / "run").glob(".*"))


def test_a_validation_loss_that_is_not_finite_is_not_saved(tmp_path):
    with opened(tmp_path, "--eval-interval=2") as run:
        real = run.optimizer.step

        def step():
            real()
            if run.at.step == 1:
                with torch.no_grad():
                    run.model.ln_f.weight[0] = math.nan

        run.optimizer.step = step
        with pytest.raises(NonFinite, match=r"step 2: the validation loss is nan.*of step 0"):
            train(run, Stop())
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-0"]


class Lost(io.StringIO):
    """An output that ends after a few writes."""

    def __init__(self, error, good=3):
        super().__init__()
        self.error, self.good = error, good

    def write(self, text):
        self.good -= 1
        if self.good < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    "error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.ENOSPC, "No space")]
)
def test_losing_the_output_does_not_lose_the_training(tmp_path, monkeypatch, error):
    said = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Lost(error))
    monkeypatch.setattr(sys, "stderr", said)
    assert cli.main(["train", *words(tmp_path), f"--out={tmp_path / 'run'}"]) == 0
    assert "nobody reads the output" in said.getvalue()
    assert said.getvalue().count("\n") == 1
    assert (tmp_path / "run/checkpoints/step-4").is_dir()


def test_losing_the_output_of_info_is_no_error_but_a_full_disk_is(monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(sys, "stdout", Lost(BrokenPipeError(errno.EPIPE, "Broken pipe"), 0))
    assert cli.main(["info", "gelu"]) == 0
    assert said.getvalue() == ""
    monkeypatch.setattr(sys, "stdout", Lost(OSError(errno.ENOSPC, "No space"), 0))
    assert cli.main(["info", "gelu"]) == 1
    assert said.getvalue() == "gptk info: the output: No space\n"


def test_closed_streams_and_narrow_encodings(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", narrow)
    assert cli.main(["\u2192"]) == 2
    print("\u2192")
    narrow.flush()
    assert narrow.buffer.getvalue() == b"?\n"
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["--version"]) == 0
    sys.stdout.close()
    sys.stderr.close()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_too_large_a_model_is_one_sentence(tmp_path, monkeypatch, error):
    def fail(*args, **how):
        raise error

    monkeypatch.setattr(start, "GPT", fail)
    code, _, said = command("train", *words(tmp_path), f"--out={tmp_path / 'run'}")
    assert (code, said.count("\n")) == (1, 1)
    assert all(name in said for name in ("--n-embd", "--n-layer", "--batch-size"))
    assert not (tmp_path / "run").exists()


def test_a_model_beyond_the_machine_is_refused_before_it_is_built(tmp_path):
    large = ("--n-embd=131072", "--n-head=512", "--n-layer=1000", f"--out={tmp_path / 'run'}")
    code, _, said = command("train", *words(tmp_path, *large))
    assert (code, "--n-embd" in said) == (1, True)


def test_a_skipped_float16_step_is_said_and_counted(tmp_path, capsys):
    with opened(tmp_path, "--dtype=float16") as run:
        weight = run.model.wpe.weight
        weight.register_hook(lambda g: g * (math.inf if run.at.step == 1 else 1.0))
        train(run, Stop())
    assert capsys.readouterr().out.count("the update was skipped") == 1
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["skipped"] for r in records[1:]] == [0, 1, 1, 1]
    assert all(r["mfu"] is None or r["mfu"] <= 1 for r in records[1:])
