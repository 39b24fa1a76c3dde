"""The same call 250 times: every output and gradient must have the same bits each time."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu import equivalence, rivals, shapes
from benchmarks.gpu.job import Job
from gptk.bench import gate

TIMES, SAVED_EVERY = 250, 50
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

        place = len(job.rows)
        for times, different in counts(call, 3 if job.dry else TIMES, job):
            job.put(place, op=op, case=case, dtype=dtype, times=times, different=different)


def counts(call: Callable[[], list[Tensor]], times: int, job: Job) -> Iterator[tuple[int, int]]:
    """(calls made, calls with any bit that the first did not have), now and then and at the end;
    fewer calls where time is short."""
    first = call()
    made, different = 1, 0
    while made < times and job.left() > 3:
        again = call()
        same = all(torch.equal(bits(a), bits(b)) for a, b in zip(first, again, strict=True))
        made, different = made + 1, different + (not same)
        if made % SAVED_EVERY == 0 and made < times:
            yield made, different
    yield made, different


def bits(t: Tensor) -> Tensor:
    """The tensor's bits as integers: NaN equals itself, 0.0 is not -0.0."""
    return t.contiguous().view(BITS[t.element_size()])
