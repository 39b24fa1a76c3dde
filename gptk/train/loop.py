"""The training loop: `train` on one screen, then the parts that it names."""

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptk.flags import Failure
from gptk.model import GPT
from gptk.optim import AdamW
from gptk.train import folder, state
from gptk.train.checkpoint import CheckpointError
from gptk.train.config import TrainConfig
from gptk.train.data import RunData
from gptk.train.evaluate import Interrupted, Score, evaluate
from gptk.train.metrics import Metrics
from gptk.train.progress import Progress
from gptk.train.schedule import learning_rate
from gptk.train.step import accumulate
from gptk.train.stop import Stop


class NonFinite(RuntimeError):
    """The loss or a gradient is NaN or infinite; the update was not applied."""


@dataclass
class Position:
    """How far a run is; what a checkpoint stores besides tensors and settings."""

    step: int = 0  # optimizer updates done
    tokens: int = 0  # targets trained on
    cursor: int = 0  # micro-batches taken from the training data
    evaluated: int = -1  # the last step after which the validation split was evaluated
    bits_per_byte: float = math.nan  # of that evaluation
    saved: int = -1  # the last step that a checkpoint holds
    skipped: int = 0  # updates that float16 gradients spoilt


@dataclass
class Training:
    """All that a step needs, in memory: settings, live objects, position."""

    config: TrainConfig
    data: RunData
    model: GPT
    optimizer: AdamW
    scaler: torch.amp.GradScaler | None
    autocast: contextlib.AbstractContextManager[object]
    device: torch.device
    peak: float | None  # FLOP/s of this machine, None if unknown
    identity: dict[str, Any]  # what must be equal on resume
    at: Position
    progress: Progress

    def mfu(self, tokens_per_s: float) -> float | None:
        """The step's FLOP/s over the peak; None where the peak is unknown, or lower than that:
        then the probe has not found it (float16 on a CPU, whose probe is no fast path)."""
        if self.peak is None:
            return None
        mfu = self.model.flops_per_token(self.config.model.block_size) * tokens_per_s / self.peak
        return mfu if mfu <= 1 else None


@dataclass
class Run(Training):
    """A training with the folder that keeps it."""

    path: Path
    metrics: Metrics


class Done(NamedTuple):
    """What a step has come to."""

    loss: float
    lr: float
    grad_norm: float  # before clipping
    n_tokens: int


def train(run: Run, stop: Stop) -> None:
    """Train to max_steps or until `stop`; the last position is saved either way.

    Raises:
        NonFinite: the run cannot go on; the last checkpoint is as it was.
        CheckpointError: a save failed; the checkpoints before it are intact.
    """
    settings, at = run.config.run, run.at
    run.model.train()
    with _quiet_garbage_collector() as freeze:
        while True:
            last = at.step == run.config.optim.max_steps
            if (last or at.step % settings.eval_interval == 0) and at.evaluated != at.step:
                _validate(run, stop)
            if last or stop or at.step % settings.save_interval == 0:
                save(run)
            if last or stop:
                return
            start = time.perf_counter()
            done = one_step(run)
            _log(run, done, time.perf_counter() - start)
            freeze()


def one_step(run: Training) -> Done:
    """Train on the next micro-batches, one optimizer step, and move the position past it.

    Raises:
        NonFinite: with nothing changed.
    """
    optim, at = run.config.optim, run.at
    lr = learning_rate(
        at.step,
        max_lr=optim.learning_rate,
        min_lr=optim.min_lr or 0.0,
        warmup_steps=optim.warmup_steps,
        max_steps=optim.max_steps,
    )
    batches = [run.data.train_batch(at.cursor + i, run.device) for i in range(optim.grad_accum)]
    loss, n_tokens = accumulate(
        run.model,
        batches,
        seed=run.config.run.seed,
        step=at.step,
        autocast=run.autocast,
        scaler=run.scaler,
    )
    grad_norm = _update(run, lr, float(loss))
    at.step += 1
    at.tokens += n_tokens
    at.cursor += len(batches)
    return Done(float(loss), lr, grad_norm, n_tokens)


def _update(run: Training, lr: float, loss: float) -> float:
    """One optimizer step at `lr`; returns the gradient norm before clipping.

    Raises:
        NonFinite: with nothing changed, no parameter, no moment, no step count.
    """
    optimizer, scaler = run.optimizer, run.scaler
    for group in optimizer.param_groups:
        group["lr"] = lr
    if not math.isfinite(loss):
        raise NonFinite(_non_finite(run, f"the loss is {loss}"))
    if scaler is None:
        optimizer.step()
        if bool(optimizer.skipped):
            raise NonFinite(_non_finite(run, f"the gradient norm is {optimizer.grad_norm}"))
    else:
        before = scaler.get_scale()
        scaler.step(optimizer)  # float16 overflows now and then: the scale halves, the run goes on
        scaler.update()
        scale = scaler.get_scale()
        if scale < 1.0:
            raise NonFinite(_non_finite(run, "float16 gradients overflow even unscaled"))
        if scale < before:
            run.at.skipped += 1
            run.progress.say(
                f"step {run.at.step + 1}: the update was skipped, for a float16 gradient "
                f"overflowed; the loss is scaled by {scale:g} from here on"
            )
    optimizer.zero_grad(set_to_none=True)
    assert optimizer.grad_norm is not None  # max_grad_norm is always set
    return float(optimizer.grad_norm)


def _non_finite(run: Training, what: str) -> str:
    first = run.at.cursor
    batches = f"{first} to {first + run.config.optim.grad_accum - 1}"
    return (
        f"step {run.at.step + 1}: {what} (micro-batches {batches}); the update was not applied and "
        f"the run stops. {_last_checkpoint(run)}; a lower --learning-rate or --grad-clip usually "
        "helps"
    )


def _last_checkpoint(run: Training) -> str:
    saved = run.at.saved
    return f"The last checkpoint is of step {saved}" if saved >= 0 else "There is no checkpoint yet"


def _validate(run: Run, stop: Stop) -> Score | None:
    """Evaluate the validation split and log it; None if a signal came first (a resumed run
    then begins with it).

    Raises:
        NonFinite: the weights are no good state; nothing is logged or saved of them.
    """
    start = time.perf_counter()
    batches = run.data.val_batches(run.device)
    try:
        score = evaluate(run.model, batches, run.data.token_bytes, run.autocast, stop)
    except Interrupted:
        return None
    at = run.at
    if not math.isfinite(score.nats):
        raise NonFinite(
            f"step {at.step}: the validation loss is {score.nats}; the run stops and this state is "
            f"not saved. {_last_checkpoint(run)}; a lower --learning-rate or --grad-clip usually "
            "helps"
        )
    record = {"val_loss": score.nats, "bits_per_byte": score.bits_per_byte}
    _write(run, {"step": at.step, **record})
    at.evaluated, at.bits_per_byte = at.step, score.bits_per_byte
    run.progress.validated(at.step, *score[:2], time.perf_counter() - start)
    return score


def _log(run: Run, done: Done, seconds: float) -> None:
    tokens_per_s = done.n_tokens / seconds
    record: dict[str, Any] = {
        "step": run.at.step,
        "loss": done.loss,
        "lr": done.lr,
        "grad_norm": done.grad_norm,
        "tokens": run.at.tokens,
        "tokens_per_s": tokens_per_s,
        "mfu": run.mfu(tokens_per_s),
        "ms": seconds * 1e3,
    }
    if run.scaler is not None:
        record["skipped"] = run.at.skipped
    _write(run, record)
    run.progress.step(record)


def _write(run: Run, record: dict[str, Any]) -> None:
    """Write a record; where that fails the position is saved before the run ends."""
    try:
        run.metrics.write(record)
    except OSError as error:
        try:
            save(run)
            rest = f"the run is saved at step {run.at.step}"
        except CheckpointError:
            rest = f"nor can a checkpoint be written, and the last one is of step {run.at.saved}"
        raise Failure(
            f"cannot write {run.metrics.path}: {error.strerror}; {rest}; make room, then "
            f"gptk train --resume {run.path}"
        ) from None


def save(run: Run) -> None:
    """Publish a checkpoint of the position, unless there is one."""
    if run.at.saved == run.at.step:
        return
    content = {
        **dataclasses.asdict(run.at),
        "saved": run.at.step,
        "bits_per_byte": None if math.isnan(run.at.bits_per_byte) else run.at.bits_per_byte,
        **run.identity,
        "scaler": None if run.scaler is None else run.scaler.state_dict(),
    }
    root = run.path / folder.CHECKPOINTS
    state.save(root, run.model, run.optimizer, content, run.data.tokenizer.save)
    run.at.saved = run.at.step


@contextlib.contextmanager
def _quiet_garbage_collector() -> Iterator[Any]:
    """Python's cyclic collector pauses a step for up to half a second; after the first step what
    is alive stays alive, so it is frozen and the collector is off until the loop ends."""
    was_enabled = gc.isenabled()

    def freeze() -> None:
        if gc.isenabled():
            gc.collect()
            gc.freeze()
            gc.disable()

    try:
        yield freeze
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
