"""Resume is bit for bit: stopped anywhere, killed, signalled; what differs is refused."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from equivalence import require

sys.path.insert(0, str(Path(__file__).parent))
from kill_and_resume import Trainer, digests, kill_and_resume, log, wait_for_step

from gptk.flags import UsageError
from gptk.text import token_file
from gptk.train import options, start
from gptk.train.checkpoint import CheckpointError
from gptk.train.loop import train
from gptk.train.stop import Stop

BACKENDS = ["torch", "cpp", "triton"]


class StopAt(Stop):
    """A signal that comes when the run has done `step` updates."""

    def __init__(self, run, step):
        super().__init__()
        self.run, self.step = run, step

    def __bool__(self):
        return self.run.at.step >= self.step


def request(folder, *words):
    """Ten windows of 4 tokens, batch 1, dropout, two epochs."""
    data = folder / "data.txt"
    if not data.exists():
        data.write_text("\n\n".join("abcd efgh ijkl mnop"[n % 16 :] + "." for n in range(40)))
    return options.parse(
        (
            "--tokenizer=byte --n-layer=1 --n-head=2 --n-embd=8 --block-size=8 --batch-size=1 "
            "--dropout=0.2 --max-steps=24 --eval-interval=5 --save-interval=4 --device=cpu "
            f"--backend=torch --dtype=float32 --data={data} --out={folder / 'run'}"
        ).split()
        + list(words)
    )


def run_to(folder, step, *words):
    """Run until `step` updates are done; returns the training windows it took."""
    seen = []
    with start.opened(request(folder, *words)) as run:
        real = run.data.train_batch

        def train_batch(cursor, device):
            batch = real(cursor, device)
            seen.extend(row.tolist() for row in batch[0])
            return batch

        run.data.train_batch = train_batch
        train(run, StopAt(run, step))
    return seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(windows, digests, log) of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    seen = run_to(folder, 24)
    return seen, digests(folder / "run"), log(folder / "run")


@pytest.mark.parametrize("stops", [[0], [1], [9], [10], [11], [19], [4, 5, 6, 23], [24]])
def test_stopped_anywhere_it_ends_as_if_never_stopped(tmp_path, whole, stops):
    seen = []
    for step in [*stops, 24]:
        seen += run_to(tmp_path, step, "--resume")
    assert seen == whole[0]
    assert digests(tmp_path / "run") == whole[1]
    assert log(tmp_path / "run") == whole[2]


def test_evaluation_and_sampling_in_between_shift_nothing(tmp_path, whole):
    run_to(tmp_path, 9)
    run_to(tmp_path, 24, "--resume", "--eval-interval=1", "--save-interval=3")
    assert digests(tmp_path / "run") == whole[1]


def test_a_damaged_newest_checkpoint_costs_steps_but_not_bits(tmp_path, whole, capsys):
    run_to(tmp_path, 14)  # leaves step-12 and step-14
    weights = tmp_path / "run/checkpoints/step-14/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    run_to(tmp_path, 24, "--resume")
    assert "step-14/model.safetensors has SHA-256" in capsys.readouterr().out
    assert digests(tmp_path / "run") == whole[1]
    assert log(tmp_path / "run") == whole[2]


# ---- real processes, real signals ----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_killed_at_random_moments_it_ends_as_if_never_killed(tmp_path, backend):
    require(backend)
    done = kill_and_resume(tmp_path, backend, kills=2, max_steps=120, draw=random.Random())
    assert done == 2


@pytest.mark.slow
def test_killed_under_the_triton_interpreter(tmp_path):
    if os.environ.get("TRITON_INTERPRET") != "1":
        need_triton_module()
    settings = (
        "--tokenizer=byte --n-layer=1 --n-head=1 --n-embd=16 --block-size=8 --batch-size=1 "
        "--grad-accum=2 --dropout=0.2 --eval-interval=100 --save-interval=1 --device=cpu"
    ).split()
    kill_and_resume(
        tmp_path,
        "triton",
        kills=1,
        max_steps=3,
        draw=random.Random(),
        settings=settings,
        environment={"TRITON_INTERPRET": "1"},
        n_paragraphs=2,
    )


def need_triton_module():
    pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on_as_if_never_stopped(tmp_path, signum, code):
    trainer = Trainer(tmp_path, "torch", 150)
    run = tmp_path / "run"
    process = trainer.start(run)
    wait_for_step(process, run, 20)
    process.send_signal(signum)
    assert process.wait() == code, trainer.output()
    steps = [int(p.name.removeprefix("step-")) for p in (run / "checkpoints").iterdir()]
    assert 20 <= max(steps) == log(run)[-1]["step"] < 150
    assert f"gptk train --resume {run}" in trainer.output()
    trainer.finish(run, "--resume")
    trainer.finish(tmp_path / "whole")
    assert digests(run) == digests(tmp_path / "whole")
    assert log(run) == log(tmp_path / "whole")


def test_a_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal, time\n"
        "from gptk.train.stop import Stop\n"
        "with Stop() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stop and stop.exit_code == 143\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root})
    assert done.returncode == 130


# ---- what is refused -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    run_to(folder, 3)
    return folder


@pytest.mark.parametrize(
    "word, old",
    [
        ("--n-embd=16", "8"),
        ("--batch-size=2", "1"),
        ("--grad-accum=2", "1"),
        ("--dropout=0.1", "0.2"),
        ("--learning-rate=1", "0.002"),
        ("--seed=1", "1337"),
        ("--tokenizer=char", "byte"),
        ("--preset=gpt2", "laptop"),
        ("--dtype=bfloat16", "float32"),
        ("--max-steps=30", "24"),
        ("--max-steps=10", "24"),
    ],
)
def test_a_changed_setting_is_refused_with_old_and_new(stopped, word, old):
    flag, _, new = word.partition("=")
    with (
        pytest.raises(UsageError, match="refused") as caught,
        start.opened(request(stopped, "--resume", word)),
    ):
        pass
    line = next(text for text in str(caught.value).splitlines() if flag[2:] in text)
    assert old in line
    assert new in line
    assert ("--extend" in str(caught.value)) == (word == "--max-steps=30")


def test_more_steps_are_allowed_when_asked_for(tmp_path):
    run_to(tmp_path, 3)
    run_to(tmp_path, 30, "--resume", "--extend", "--max-steps=30")
    assert log(tmp_path / "run")[-1]["step"] == 30
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert stored["optim"]["max_steps"] == 30


def test_fewer_steps_are_refused_even_with_extend(stopped):
    with (
        pytest.raises(UsageError, match="max-steps: 24 in the run, 10 now"),
        start.opened(request(stopped, "--resume", "--extend", "--max-steps=10")),
    ):
        pass


def test_changed_data_is_refused_with_both_hashes(tmp_path):
    run_to(tmp_path, 3)
    before = json.loads((tmp_path / "run/checkpoints/step-3/state.json").read_text())
    with (tmp_path / "data.txt").open("a") as file:
        file.write("\n\nmore")
    with (
        pytest.raises(UsageError, match=before["data"]["corpus sha256"]),
        start.opened(request(tmp_path, "--resume")),
    ):
        pass


def test_a_damaged_token_file_is_made_anew_and_named(tmp_path, capsys):
    run_to(tmp_path, 3)
    file = tmp_path / "run/tokens-train.bin"
    raw = bytearray(file.read_bytes())
    raw[-2] ^= 1
    file.write_bytes(raw)
    with start.opened(request(tmp_path, "--resume")):
        pass
    assert "tokens-train.bin: damaged" in capsys.readouterr().out
    assert token_file.read(file, 256).tolist()[-1] == raw[-2] ^ 1


def test_token_files_of_another_text_are_replaced_at_step_0(tmp_path):
    run_to(tmp_path, 1)
    stale = (tmp_path / "run/tokens-train.bin").read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    (other / "run").mkdir()
    (other / "run/tokens-train.bin").write_bytes(stale)
    (other / "data.txt").write_text((tmp_path / "data.txt").read_text()[::-1])
    run_to(other, 1, f"--data={other / 'data.txt'}", "--resume")
    assert (other / "run/tokens-train.bin").read_bytes() != stale


def test_the_same_text_elsewhere_is_the_same_run(tmp_path, whole):
    run_to(tmp_path, 9)
    (tmp_path / "data.txt").rename(tmp_path / "moved.txt")
    (tmp_path / "data.txt").write_text("not this")
    run_to(tmp_path, 24, "--resume", f"--data={tmp_path / 'moved.txt'}")
    assert digests(tmp_path / "run") == whole[1]


def test_a_changed_tokenizer_is_refused_with_both_hashes(tmp_path):
    run_to(tmp_path, 3, "--tokenizer=char")
    before = json.loads((tmp_path / "run/checkpoints/step-3/state.json").read_text())
    file = tmp_path / "run/tokenizer.json"
    file.write_text(file.read_text().replace('"a"', '"A"'))
    with (
        pytest.raises(UsageError, match=before["data"]["tokenizer sha256"]),
        start.opened(request(tmp_path, "--tokenizer=char", "--resume")),
    ):
        pass


def test_another_backend_is_allowed_with_a_warning(tmp_path, capsys):
    require("cpp")
    run_to(tmp_path, 3)
    run_to(tmp_path, 5, "--resume", "--backend=cpp")
    assert "backend torch -> cpp" in capsys.readouterr().out


def test_a_folder_without_checkpoint_starts_and_says_so(tmp_path, capsys):
    run_to(tmp_path, 1, "--resume")
    assert "starting at step 0" in capsys.readouterr().out


def test_a_run_that_is_not_there_is_refused(tmp_path):
    with (
        pytest.raises(UsageError, match="no run is there"),
        start.opened(options.parse([f"--resume={tmp_path / 'absent'}"])),
    ):
        pass
    assert not (tmp_path / "absent").exists()


def test_nothing_is_overwritten(tmp_path):
    run_to(tmp_path, 1)
    with pytest.raises(UsageError, match="--resume"), start.opened(request(tmp_path)):
        pass


def test_only_damaged_checkpoints_are_an_error(tmp_path):
    run_to(tmp_path, 1)
    for folder in (tmp_path / "run/checkpoints").iterdir():
        (folder / "state.json").write_text("{}")
    with (
        pytest.raises(CheckpointError, match="damaged"),
        start.opened(request(tmp_path, "--resume")),
    ):
        pass


def test_two_runs_in_one_folder_refuse(tmp_path):
    run_to(tmp_path, 1)
    code = (
        "import sys\nfrom gptk.cli import main\n"
        f"sys.exit(main(['train', '--resume', {str(tmp_path / 'run')!r}]))"
    )
    root = str(Path(__file__).resolve().parents[2])
    with start.opened(request(tmp_path, "--resume")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": root},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 2
    assert f"process {os.getpid()}" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_before_step_1(tmp_path):
    (tmp_path / "run").mkdir(mode=0o555)
    with pytest.raises(UsageError, match="cannot be written"), start.opened(request(tmp_path)):
        pass


def test_a_file_in_the_way_is_refused_before_step_1(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UsageError, match="cannot be written"), start.opened(request(tmp_path)):
        pass


def test_torch_generators_come_back(tmp_path):
    run_to(tmp_path, 3)
    with start.opened(request(tmp_path, "--resume")):
        first = torch.rand(2)
    with start.opened(request(tmp_path, "--resume")):
        assert torch.equal(torch.rand(2), first)
