"""The same call 250 times: every output and gradient must have the same bits each time."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu import equivalence, rivals, shapes
from benchmarks.gpu.job import Job
from gptk.bench import gate

TIMES = 250
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def run(job: Job) -> None:
    op = job.part
    cases = [name for name in shapes.case_names(op, job.dry) if name.startswith("gpt2")][:2]
    for dtype, case in itertools.product(("bfloat16", "float32"), cases):
        values = shapes.inputs(op, case, shapes.DTYPES[dtype], job.device, job.dry)

        def call(given: dict[str, object] = values) -> list[Tensor]:
            if op == "adamw":
                return list(equivalence.updated(given, "triton").values())
            return gate.answer(op, rivals.ours(op), given)

        times, different = count(call, 3 if job.dry else TIMES, job)
        job.add(op=op, case=case, dtype=dtype, times=times, different=different)


def count(call: Callable[[], list[Tensor]], times: int, job: Job) -> tuple[int, int]:
    """(calls made, calls with any bit that the first did not have); fewer where time is short."""
    first = call()
    different = 0
    for made in range(1, times):
        if job.left() < 3:
            return made, different
        again = call()
        same = all(torch.equal(bits(a), bits(b)) for a, b in zip(first, again, strict=True))
        different += not same
    return times, different


def bits(t: Tensor) -> Tensor:
    """The tensor's bits as integers: NaN equals itself, 0.0 is not -0.0."""
    return t.contiguous().view(BITS[t.element_size()])
