"""What a run says: the facts before it begins; a sample and where everything is at its end."""

import json
import sys
from pathlib import Path

import torch

from gptk.flags import Failure
from gptk.ops import contract
from gptk.train import config, hardware, report
from gptk.train.loop import NonFinite, Run, Training, train
from gptk.train.stop import Stop

SAMPLE_TOKENS = 300
INTERPRETED_SAMPLE_TOKENS = 32
"""In Triton's interpreter, where a token takes a third of a second."""


def describe(a_run: Training, dtype: torch.dtype, reason: str, place: str) -> list[str]:
    """The block of facts that a run begins with; `place` is what is said of its folder."""
    model, data, settings = a_run.model, a_run.data, a_run.config
    optim = settings.optim
    per_step = optim.batch_size * optim.grad_accum * settings.model.block_size
    chosen = contract.chosen(model, dtype)
    backends = "; ".join(f"{backend}: {', '.join(ops)}" for backend, ops in chosen.items())
    peak = "unknown" if a_run.peak is None else f"{a_run.peak / 1e9:,.0f} GFLOP/s"
    return [
        f"configuration  {json.dumps({'preset': settings.preset, **config.flatten(settings)})}",
        f"run folder     {place}",
        f"data           {data.summary}",
        f"tokenizer      {settings.data.tokenizer}, {data.vocab_size:,} tokens, "
        f"{data.bytes_per_token:.2f} bytes of text each"
        + (f"; {data.tokenizer.note}" if data.tokenizer.note else ""),
        f"model          {model.num_params(non_embedding=False):,} parameters "
        f"({model.num_params():,} without position embeddings)",
        f"step           {per_step:,} tokens; {optim.max_steps:,} steps see the training text "
        f"{optim.max_steps * per_step / max(data.n_train, 1):.1f} times",
        f"device         {a_run.device}, {torch.get_num_threads()} threads, "
        f"matrix products {str(dtype).removeprefix('torch.')} ({reason}), peak {peak}",
        f"backend        {backends} (asked: {settings.run.backend}; gptk info says why)",
        *([data.eval_note] if data.eval_note else []),
    ]


def train_and_show(a_run: Run) -> int:
    """Train, then draw the curve, sample, and say where everything is."""
    failed = ""
    with Stop() as stop, a_run.progress:
        try:
            train(a_run, stop)
        except NonFinite as error:
            failed = str(error)
    if failed:
        print(f"gptk train: {failed}", file=sys.stderr)
        return 1
    code = _drawn(a_run.path)
    at = a_run.at
    if stop:
        print(f"stopped by a signal at step {at.step}; saved. To continue:")
        print(f"  gptk train --resume {a_run.path}")
        return stop.exit_code
    try:
        _print_sample(a_run)
    except ValueError as error:  # logits that are not finite
        print(f"\ngptk train: no sample: {error}", file=sys.stderr)
        code = 1
    print(f"done: step {at.step}, {at.bits_per_byte:.4f} bits per byte on the validation text")
    print(f"run folder {a_run.path} (metrics.jsonl, loss.png, checkpoints). To sample:")
    print(f"  gptk sample {a_run.path}")
    return code


def _drawn(path: Path) -> int:
    """Draw loss.png; the exit code: a full disk spoils the picture, not the run."""
    try:
        report.plot_loss(path)
    except Failure as error:
        print(f"gptk train: {error}", file=sys.stderr)
        return 1
    return 0


def _print_sample(a_run: Run) -> None:
    from gptk.chat.generate import Sampling, for_display, start_text, stream

    slow = hardware.interpreted(a_run.config.run.backend)
    n = INTERPRETED_SAMPLE_TOKENS if slow else SAMPLE_TOKENS
    print(f"--- a sample of {n} tokens" + (", since Triton's interpreter is slow" if slow else ""))
    for piece in stream(
        a_run.model,
        a_run.data.tokenizer,
        start_text(a_run.data.tokenizer),
        n,
        Sampling(temperature=0.8),
        seed=a_run.config.run.seed,
    ):
        print(for_display(piece), end="", flush=True)
    print("\n---")
