"""Kill a training run at random moments, resume it, compare it with one that was never stopped.

    python tests/train/kill_and_resume.py --kills 20 --backend torch

Each run is started with one and the same command, killed with SIGKILL at a random moment (during
start-up, a step, an evaluation or a save), started again, and so on until it finishes. Its final
weights and moments must have the SHA-256 of the uninterrupted run's, its log the same values.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("ms", "tokens_per_s", "mfu")
SETTINGS = (
    "--tokenizer=char --n-layer=2 --n-head=2 --n-embd=32 --block-size=32 --batch-size=3 "
    "--grad-accum=2 --dropout=0.2 --learning-rate=1e-3 --warmup-steps=10 --eval-interval=25 "
    "--save-interval=7 --seed=7 --device=cpu --dtype=float32"
).split()


def text(n_paragraphs):
    """Words in a fixed pseudo-random order; short enough for several epochs."""
    draw = random.Random(5)
    words = "the a king queen speaks walks to of and night day sword crown old new".split()
    paragraphs = (" ".join(draw.choices(words, k=20)) for _ in range(n_paragraphs))
    return "\n\n".join(paragraphs) + "\n"


class Trainer:
    """Runs `gptk train` in processes of its own, in `folder`."""

    def __init__(
        self, folder, backend, max_steps, settings=SETTINGS, environment=None, n_paragraphs=120
    ):
        self.folder = Path(folder)
        self.data = self.folder / "data.txt"
        self.data.write_text(text(n_paragraphs))
        self.words = [*settings, f"--backend={backend}", f"--max-steps={max_steps}"]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self.environment |= environment or {}

    def start(self, run, *more):
        """Start the run in `run`, or continue it."""
        command = [sys.executable, "-m", "gptk", "train", f"--data={self.data}", f"--out={run}"]
        with (self.folder / "output.txt").open("ab") as output:
            return subprocess.Popen(
                [*command, *self.words, *more],
                env=self.environment,
                cwd=self.folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def finish(self, run, *more):
        """Run to the end."""
        code = self.start(run, *more).wait()
        assert code == 0, (self.folder / "output.txt").read_text()[-3000:]

    def output(self):
        """All that was printed so far."""
        return (self.folder / "output.txt").read_text()


def digests(run):
    """SHA-256 of the final weights and moments."""
    folders = (Path(run) / "checkpoints").glob("step-*")
    last = max(folders, key=lambda path: int(path.name.removeprefix("step-")))
    return {
        name: hashlib.sha256((last / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "optim.safetensors")
    }


def log(run):
    """The records of metrics.jsonl without what depends on the clock."""
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def lines(run):
    """How many whole lines the log has."""
    path = Path(run) / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_step(process, run, beyond=0):
    """Wait until the log holds more than `beyond` lines, or the process is over."""
    while process.poll() is None and lines(run) <= beyond:
        time.sleep(0.005)


def kill_and_resume(folder, backend, kills, max_steps, draw, say=print, **options):
    """Kill `kills` times in all, over as many runs as it takes; AssertionError if one differs."""
    trainer = Trainer(folder, backend, max_steps, **options)
    begun = time.monotonic()
    trainer.finish(trainer.folder / "whole")
    seconds = time.monotonic() - begun
    expected = digests(trainer.folder / "whole"), log(trainer.folder / "whole")
    done, finished = 0, 0
    while done < kills or finished == 0:
        run = trainer.folder / f"killed-{finished}"
        while True:
            before = lines(run)
            process = trainer.start(run, "--resume")
            if done < kills:
                if draw.random() < 0.8:  # else any moment, start-up included
                    wait_for_step(process, run, before)
                    moment = draw.uniform(0, seconds / 8)
                else:
                    moment = draw.uniform(0, seconds)
                try:
                    process.wait(moment)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    done += 1
            code = process.wait()
            if code == 0:
                break
            assert code == -signal.SIGKILL, trainer.output()[-3000:]
        assert (digests(run), log(run)) == expected, f"run {finished} differs after {done} kills"
        finished += 1
        say(f"{backend}: {done} kills, {finished} runs finished, all equal to the whole run")
    return done


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=None, help="of the moments; default: new ones")
    arguments = parser.parse_args()
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    print(f"moments from seed {seed}")
    with tempfile.TemporaryDirectory() as folder:
        kill_and_resume(
            folder,
            arguments.backend,
            arguments.kills,
            arguments.max_steps,
            random.Random(seed),
        )


if __name__ == "__main__":
    main()
