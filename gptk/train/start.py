"""From a request to a run: checks, data, model, optimizer, the resumed state; then train and show.

Everything that can be wrong is found here, before step 1, and said in one sentence.
"""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gptk.model import GPT, GPTConfig
from gptk.ops import contract
from gptk.optim import AdamW
from gptk.train import checkpoint, config, folder, hardware, report, state
from gptk.train.config import ConfigError, TrainConfig
from gptk.train.data import RunData, load_text, load_tokenizer, make_tokenizer
from gptk.train.loop import NonFinite, Position, Run, train
from gptk.train.metrics import Metrics
from gptk.train.options import Request
from gptk.train.progress import Progress
from gptk.train.stop import Stop

SAMPLE_TOKENS = 300
INTERPRETED_SAMPLE_TOKENS = 32
"""In Triton's interpreter, where a token takes a third of a second."""


def run(request: Request) -> int:
    """Do what `gptk train` was asked; the exit code: 0, 1 (the run failed) or 130/143 (signal).

    Raises:
        ConfigError: the request cannot be met; nothing was trained.
        CheckpointError: no usable checkpoint, or a save failed.
    """
    with opened(request) as a_run:
        return train_and_show(a_run)


@contextlib.contextmanager
def opened(request: Request) -> Iterator[Run]:
    """The run that `request` asks for, at step 0 or where its newest checkpoint is, locked."""
    path, settings = folder.prepare(request)
    check_backend(settings.run.backend)
    device = hardware.choose_device(settings.run.device)
    dtype, dtype_reason = hardware.choose_dtype(settings.run.dtype, device)
    with folder.locked(path):
        root = path / folder.CHECKPOINTS
        checkpoint.recover(root)
        resumed = checkpoint.newest(root, print) if request.resume is not None else None
        if request.resume is not None and resumed is None:
            print(f"{path} has no checkpoint yet: starting at step 0")
        stored = state.read(resumed) if resumed else None
        data = _load_data(settings, path, resumed, stored)
        a_run = _assemble(path, settings, data, device, dtype, resumed, stored)
        try:
            folder.save_config(path, settings)
            data.save(path)
            for line in describe(a_run, dtype, dtype_reason, resumed):
                print(line)
            sys.stdout.flush()
            yield a_run
        finally:
            a_run.metrics.close()


def check_backend(name: str) -> None:
    """ConfigError with the reason and the remedy unless the named backend can run here."""
    try:
        reason = contract.availability("cpp" if name == "auto" else name)
    except ValueError as error:  # GPTK_ISA names what this CPU or build does not have
        raise ConfigError(f"--backend {name}: {error}") from None
    if name == "auto":
        return
    if reason is not None:
        raise ConfigError(f"--backend {name}: {reason}")


def _load_data(
    settings: TrainConfig, path: Path, resumed: Path | None, stored: dict[str, Any] | None
) -> RunData:
    """The data; of a resumed run with the checkpoint's tokenizer, and refused if it differs."""
    text = load_text(settings)
    if resumed is None or stored is None:
        return RunData(settings, text, make_tokenizer(settings, text))
    before = {k: stored["data"].get(k) for k in ("corpus sha256", "tokenizer sha256")}
    now = {
        "corpus sha256": text.sha256,
        "tokenizer sha256": load_tokenizer(path / state.TOKENIZER).sha256
        if (path / state.TOKENIZER).exists()
        else before["tokenizer sha256"],
    }
    differing = {f"data {k}": (old, now[k]) for k, old in before.items() if old != now[k]}
    if differing:
        raise ConfigError(folder.refusal(differing))
    return RunData(settings, text, load_tokenizer(resumed / state.TOKENIZER), path)


def _assemble(
    path: Path,
    settings: TrainConfig,
    data: RunData,
    device: torch.device,
    dtype: torch.dtype,
    resumed: Path | None,
    stored: dict[str, Any] | None,
) -> Run:
    model_config = GPTConfig(vocab_size=data.vocab_size, **dataclasses.asdict(settings.model))
    identity: dict[str, Any] = {
        "config": config.to_json(settings),
        "model": dataclasses.asdict(model_config),
        "data": data.identity,
        "dtype": str(dtype).removeprefix("torch."),
        "environment": hardware.environment(device),
        "backend": settings.run.backend,
    }
    at = Position()
    if stored is not None:
        _check_same_run(stored, identity, settings)
        at = Position(**{f.name: stored[f.name] for f in dataclasses.fields(Position)})
        at.bits_per_byte = math.nan if at.bits_per_byte is None else at.bits_per_byte
    torch.manual_seed(settings.run.seed)
    optim = settings.optim
    model = GPT(model_config, backend=settings.run.backend).to(device)
    optimizer = AdamW(
        model.param_groups(optim.weight_decay),
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        max_grad_norm=optim.grad_clip or math.inf,
        backend=settings.run.backend,
    )
    scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
    if resumed is not None and stored is not None:
        state.restore(resumed, stored, model, optimizer)
        if scaler is not None:
            scaler.load_state_dict(stored["scaler"])
    autocast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if dtype != torch.float32:
        autocast = torch.autocast(device.type, dtype=dtype)
    return Run(
        settings,
        path,
        data,
        model,
        optimizer,
        scaler,
        autocast,
        device,
        hardware.matmul_peak(device, dtype),
        identity,
        at,
        Metrics(path / "metrics.jsonl", at.step if resumed else None),
        Progress(optim.max_steps, at.step, data.bytes_per_token),
    )


def _check_same_run(stored: dict[str, Any], now: dict[str, Any], settings: TrainConfig) -> None:
    """ConfigError with old and new of all that differs; a mere warning where bits may differ."""
    differing = {}
    for part in ("model", "data"):
        old, new = stored.get(part, {}), now[part]
        for name in sorted(set(old) | set(new)):
            if old.get(name) != new.get(name):
                differing[f"{part} {name}"] = (old.get(name), new.get(name))
    if stored.get("dtype") != now["dtype"]:
        differing["dtype"] = (stored.get("dtype"), now["dtype"])
    # config.json, from which `settings` comes, was compared with the command line before; it
    # must also be the file that the checkpoint was written under, up to an extended max_steps
    before = config.flatten(config.from_json(stored["config"]))
    for name, value in config.flatten(settings).items():
        if name not in (*folder.FREE, "max_steps", "dtype") and before[name] != value:
            differing[config.flag(name)] = (before[name], value)
    if differing:
        raise ConfigError(folder.refusal(differing))
    old_place = {**stored["environment"], "backend": stored["backend"]}
    new_place = {**now["environment"], "backend": now["backend"]}
    changes = [f"{k} {old_place[k]} -> {v}" for k, v in new_place.items() if old_place[k] != v]
    if changes:
        print(f"warning: results may differ in the last bits from here on: {', '.join(changes)}")


def describe(a_run: Run, dtype: torch.dtype, reason: str, resumed: Path | None) -> list[str]:
    """The block of facts that a run begins with."""
    model, data, settings = a_run.model, a_run.data, a_run.config
    optim = settings.optim
    per_step = optim.batch_size * optim.grad_accum * settings.model.block_size
    chosen = contract.chosen(model, dtype)
    backends = "; ".join(f"{backend}: {', '.join(ops)}" for backend, ops in chosen.items())
    peak = "unknown" if a_run.peak is None else f"{a_run.peak / 1e9:,.0f} GFLOP/s"
    return [
        f"configuration  {json.dumps({'preset': settings.preset, **config.flatten(settings)})}",
        f"run folder     {a_run.path}"
        + (f", continuing from {resumed.name}" if resumed is not None else ""),
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
    report.plot_loss(a_run.path)
    at = a_run.at
    if stop:
        print(f"stopped by a signal at step {at.step}; saved. To continue:")
        print(f"  gptk train --resume {a_run.path}")
        return stop.exit_code
    _print_sample(a_run)
    print(f"done: step {at.step}, {at.bits_per_byte:.4f} bits per byte on the validation text")
    print(f"run folder {a_run.path} (metrics.jsonl, loss.png, checkpoints). To sample:")
    print(f"  gptk sample {a_run.path}")
    return 0


def _print_sample(a_run: Run) -> None:
    from gptk.chat.generate import Sampling, stream

    slow = hardware.interpreted(a_run.config.run.backend)
    n = INTERPRETED_SAMPLE_TOKENS if slow else SAMPLE_TOKENS
    print(f"--- a sample of {n} tokens" + (", since Triton's interpreter is slow" if slow else ""))
    for piece in stream(
        a_run.model,
        a_run.data.tokenizer,
        "\n",
        n,
        Sampling(temperature=0.8),
        seed=a_run.config.run.seed,
    ):
        print(piece, end="", flush=True)
    print("\n---")
