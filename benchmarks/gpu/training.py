"""GPT-2 124M trained for 50 steps by one provider: tokens per second, memory, every loss.

torch: the same GPT in plain PyTorch (gptk/bench/baseline.py: SDPA, fused AdamW); compile: that,
compiled; triton: gptk's. All start from the same weights and see the same text, which is Python's
own documentation as bytes. bf16 autocast is timed; losses are compared in float32, too.
"""

import functools
import pydoc_data.topics
from collections.abc import Callable
from typing import Any

import torch

import gptk
from benchmarks.gpu import clock
from benchmarks.gpu.job import Job
from gptk.bench import baseline
from gptk.model import GPTConfig
from gptk.optim import AdamW

STEPS, UNTIMED, SAVED_EVERY = 50, 15, 10
REAL = GPTConfig(1024, 50304, 12, 12, 768)
TINY = GPTConfig(8, 256, 1, 1, 8)
BATCH = {"bfloat16": 8, "float32": 2}


def run(job: Job) -> None:
    config, steps = (TINY, 1) if job.dry else (REAL, STEPS)
    job.note(parameters=sum(p.numel() for p in _weights(config).parameters()))
    for dtype in ("bfloat16", "float32"):
        if job.part == "compile" and dtype == "float32":
            continue  # it is a rival in speed, which is measured in bfloat16
        batch = 1 if job.dry else BATCH[dtype]
        train = _provider(job.part, config, job.device)
        _train(job, dtype, train, text(batch, config.block_size, steps, job.device))
        del train
        torch.cuda.empty_cache()


def _train(
    job: Job, dtype: str, train: Callable[[torch.Tensor, bool], torch.Tensor], words: torch.Tensor
) -> None:
    steps, batch, T = words.shape[0], words.shape[1], words.shape[2] - 1
    cuda = job.device == "cuda"
    row: dict[str, Any] = dict(provider=job.part, dtype=dtype, batch=batch, context=T, steps=steps)
    place = len(job.rows)
    losses: list[torch.Tensor] = []
    times: list[Callable[[], float]] = []
    for step in range(steps):
        if cuda and step == UNTIMED:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        one = functools.partial(train, words[step], dtype == "bfloat16")
        seconds, loss = _timed(one, job.device)
        times.append(seconds)
        losses.append(loss)
        if cuda and step < 2:
            torch.cuda.synchronize()  # compiling is over, and a failure shows here
        if (step + 1) % SAVED_EVERY == 0 or step + 1 == steps:
            clock.synchronize(job.device)
            job.put(place, **row, **_so_far(losses, times, batch * T, cuda))


def _so_far(
    losses: list[torch.Tensor], times: list[Callable[[], float]], tokens: int, cuda: bool
) -> dict[str, Any]:
    """Every loss, and the time of a step once it is steady."""
    spent = sorted(t() for t in times[UNTIMED:] or times)
    median = spent[len(spent) // 2]
    return dict(
        seconds=median,
        p20=spent[int(0.2 * (len(spent) - 1))],
        p80=spent[int(0.8 * (len(spent) - 1))],
        n=len(spent),
        tokens_per_second=tokens / median,
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else None,
        losses=[float(x) for x in losses],
    )


def _timed(
    step: Callable[[], torch.Tensor], device: str
) -> tuple[Callable[[], float], torch.Tensor]:
    """(its seconds, to be asked for once all is done; the loss, on the device)."""
    if device == "cpu":
        found: list[torch.Tensor] = []
        taken = clock.host_seconds(lambda: found.append(step()), device)
        return (lambda: taken), found[0]
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    loss = step()
    stop.record()
    return (lambda: start.elapsed_time(stop) / 1e3), loss


def _weights(config: GPTConfig) -> gptk.GPT:
    torch.manual_seed(0)
    return gptk.GPT(config)


def _provider(
    name: str, config: GPTConfig, device: str
) -> Callable[[torch.Tensor, bool], torch.Tensor]:
    """train(batch, mixed) -> the loss of one step."""
    weights = _weights(config)
    model: Any
    optimizer: Any
    if name == "triton":
        model = gptk.GPT(config, backend="triton")
        model.load_state_dict(weights.state_dict())
        model = model.to(device)
        groups = model.param_groups(0.1)
        optimizer = AdamW(groups, lr=1e-3, betas=(0.9, 0.95), max_grad_norm=1.0, backend="triton")
    else:
        module = baseline.GPT(config)
        baseline.load(module, weights)
        module = module.to(device)
        optimizer = baseline.Clipped(module)
        model = module
        if name == "compile":  # a dry run has no use for the minutes of compiling
            model = torch.compile(module, backend="inductor" if device == "cuda" else "eager")

    def train(batch: torch.Tensor, mixed: bool) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train


def text(batch: int, T: int, steps: int, device: str) -> torch.Tensor:
    """(steps, batch, T + 1) bytes of Python's documentation, from its start and round again."""
    pages = pydoc_data.topics.topics
    raw = "\n".join(pages[name] for name in sorted(pages)).encode()
    ids = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
    wanted = torch.arange(steps * batch * (T + 1)) % ids.numel()
    return ids[wanted].view(steps, batch, T + 1).to(device)
