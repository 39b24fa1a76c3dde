"""From a request to a run: checks, data, model, optimizer, the resumed state; then train and show.

With --breakdown the same training is measured instead, in memory. Everything that can be wrong is
found here, before step 1, and said in one sentence.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gptk.model import GPT, GPTConfig
from gptk.ops import contract
from gptk.optim import AdamW
from gptk.train import breakdown, checkpoint, config, folder, hardware, state
from gptk.train.config import ConfigError, TrainConfig
from gptk.train.data import RunData, load_text, load_tokenizer, make_tokenizer
from gptk.train.loop import Position, Run, Training
from gptk.train.metrics import Metrics
from gptk.train.options import Request
from gptk.train.progress import Progress, steady_display
from gptk.train.show import describe, train_and_show


def run(request: Request) -> int:
    """Do what `gptk train` was asked; the exit code: 0, 1 (the run failed) or 130/143 (signal).

    Raises:
        ConfigError: the request cannot be met; nothing was trained.
        CheckpointError: no usable checkpoint, or a save failed.
    """
    with steady_display("gptk train"):
        if request.breakdown:
            return breakdown.measure_and_show(in_memory(request))
        with opened(request) as a_run:
            return train_and_show(a_run)


@contextlib.contextmanager
def opened(request: Request) -> Iterator[Run]:
    """The run that `request` asks for, at step 0 or where its newest checkpoint is, locked."""
    named = request.resume or request.config.run.out
    made = folder.missing(Path(named or "runs"))
    path, settings = folder.prepare(request)
    made = [path, *made] if named is None else made
    option = "--out" if request.resume is None else "--resume"
    with folder.locked(path, option), contextlib.ExitStack() as at_end:
        if made:
            at_end.callback(folder.remove_unused, path, made)
        if request.resume is None:
            folder.refuse_taken(path)  # again: another run may have come and gone meanwhile
        check_backend(settings.run.backend)
        device = hardware.choose_device(settings.run.device)
        checkpoint.recover(path / folder.CHECKPOINTS)
        training, resumed, facts = _prepared(request, settings, device, path)
        log = path / "metrics.jsonl"
        if resumed is None:
            _keep_log(log)
        # the configuration first: a folder with anything of a run in it can then be resumed
        folder.save_config(path, settings)
        training.data.save(path)
        metrics = Metrics(log, training.at.step if resumed else None)
        at_end.callback(metrics.close)
        _say(facts, request)
        yield Run(**vars(training), path=path, metrics=metrics)


def in_memory(request: Request) -> Training:
    """The training that `request` asks for, as `opened` has it, with no file made or changed."""
    settings, _ = folder.settings(request)
    check_backend(settings.run.backend)
    device = hardware.choose_device(settings.run.device)
    breakdown.check_measurable(settings, device)
    training, _, facts = _prepared(request, settings, device, None)
    _say(facts, request)
    return training


def _prepared(
    request: Request, settings: TrainConfig, device: torch.device, path: Path | None
) -> tuple[Training, Path | None, list[str]]:
    """(the training, the checkpoint that it continues from, the facts about it); only reads.

    `path` is the folder that will keep the run, None for none.
    """
    if device.type == "cpu":
        hardware.keep_freed_memory()
    dtype, dtype_reason = hardware.choose_dtype(settings.run.dtype, device)
    source, resumed = request.resume, None
    if source is not None:
        resumed = checkpoint.newest(source / folder.CHECKPOINTS, print)
        if resumed is None:
            print(f"{source} has no checkpoint yet: starting at step 0")
    stored = state.read(resumed) if resumed else None
    data = _load_data(settings, source, resumed, stored)
    training = _assemble(settings, data, device, dtype, resumed, stored)
    place = "none, for --breakdown writes nothing" if path is None else str(path)
    place += f", continuing from {resumed.name}" if resumed is not None else ""
    return training, resumed, describe(training, dtype, dtype_reason, place)


def _say(facts: list[str], request: Request) -> None:
    for line in (*facts, *request.notes):
        print(line)
    sys.stdout.flush()


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
    settings: TrainConfig, path: Path | None, resumed: Path | None, stored: dict[str, Any] | None
) -> RunData:
    """The data; of a resumed run with the checkpoint's tokenizer, and refused if it differs."""
    if path is None or resumed is None or stored is None:
        text = load_text(settings)
        return RunData(settings, text, make_tokenizer(settings, text))
    try:
        text = load_text(settings)
    except ConfigError as error:
        raise ConfigError(f"{error}; name the run's text with --data if it has moved") from None
    before = {k: stored["data"].get(k) for k in ("corpus sha256", "tokenizer sha256")}
    now = {**before, "corpus sha256": text.sha256}
    file = path / state.TOKENIZER
    try:
        now["tokenizer sha256"] = load_tokenizer(file).sha256
    except ConfigError as error:
        if file.exists():
            print(f"warning: {error}; the copy in {resumed.name} takes its place")
    differing = {f"data {k}": (old, now[k]) for k, old in before.items() if old != now[k]}
    if differing:
        raise ConfigError(folder.refusal(differing))
    return RunData(settings, text, load_tokenizer(resumed / state.TOKENIZER), path)


def _assemble(
    settings: TrainConfig,
    data: RunData,
    device: torch.device,
    dtype: torch.dtype,
    resumed: Path | None,
    stored: dict[str, Any] | None,
) -> Training:
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
        known = {f.name for f in dataclasses.fields(Position)} & stored.keys()
        at = Position(**{name: stored[name] for name in known})
        at.bits_per_byte = math.nan if at.bits_per_byte is None else at.bits_per_byte
    torch.manual_seed(settings.run.seed)
    optim = settings.optim
    _check_memory(model_config, device)
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
    peak = hardware.matmul_peak(device, dtype)
    return Training(
        settings,
        data,
        model,
        optimizer,
        scaler,
        autocast,
        device,
        peak,
        identity,
        at,
        Progress(optim.max_steps, at.step, data.bytes_per_token),
    )


def _keep_log(log: Path) -> None:
    """Set aside the log of a run whose checkpoints are gone. The first checkpoint, of step 0, comes
    before the second line, so a run that was killed before it has none to lose."""
    if log.exists() and log.read_bytes().count(b"\n") > 1:
        free = next(n for n in itertools.count(1) if not log.with_suffix(f".{n}.jsonl").exists())
        print(
            f"the log of an earlier run stays as {log.replace(log.with_suffix(f'.{free}.jsonl'))}"
        )


def _check_memory(model: GPTConfig, device: torch.device) -> None:
    """MemoryError where weights, gradients and moments alone are more than the machine has: the
    system would end the process without a word."""
    C = model.n_embd
    n = (model.vocab_size + model.block_size + 12 * model.n_layer * C) * C
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cpu" and 16 * n > have:
        raise MemoryError(f"{n:,} parameters take {16 * n / 1e9:,.0f} of {have / 1e9:,.0f} GB")


def _check_same_run(stored: dict[str, Any], now: dict[str, Any], settings: TrainConfig) -> None:
    """ConfigError with old and new of all that differs; a mere warning where bits may differ."""
    differing = {}
    for part in ("model", "data"):
        old, new = stored.get(part, {}), now[part]
        names = {*old, *new} - {f.name for f in dataclasses.fields(config.ModelConfig)}
        for name in sorted(names):  # the model's settings are compared as settings, below
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
