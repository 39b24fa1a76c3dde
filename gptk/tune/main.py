"""`gptk tune`: measure launch configurations on this machine's GPU and write those that won."""

import argparse
import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gptk.flags import Failure, UsageError
from gptk.ops import tuning, tuning_file
from gptk.ops.tuning_file import FORMAT, KERNELS, VARIABLE, Content, Key
from gptk.tune.ahead import MOST_JOBS, Ahead, default_jobs
from gptk.tune.cases import Case, cases, shipped, work
from gptk.tune.cases import candidates as candidates_of
from gptk.tune.choose import Choice, Refused, Runner, choose
from gptk.tune.gpu import GpuRunner, first_line, refusing
from gptk.tune.progress import Progress, Watched

ROUNDS, QUICK_ROUNDS = 50, 20
OPS = sorted({kernel.partition(".")[0] for kernel in KERNELS})
Measured = dict[Key, Choice]


def parser() -> argparse.ArgumentParser:
    """The flags of the verb."""
    every = cases(torch.bfloat16)
    quick = [case for case in every if case.quick]
    made = argparse.ArgumentParser(
        prog="gptk tune",
        description="Measures launch configurations of the Triton kernels on this machine's GPU "
        "and writes a file that every later process reads. What ships is kept unless another "
        "configuration computes the same, spills no registers and is faster by more than the "
        "noise: the largest of 2 % and the interquartile ranges of both, in two measurements. "
        f"There are {_counted(every)}, with --quick {_counted(quick)}; each candidate is compiled, "
        "which takes seconds of a core, so that --quick takes minutes and the whole may take "
        "hours. Each row is written when it is measured: --op after --op gives the same file.",
        epilog=f"{VARIABLE}=FILE names the file to write and to use, {VARIABLE}= uses none; where "
        f"it is not set, the place is {tuning_file.default_place(90)} (for sm_90).",
    )
    made.add_argument(
        "--op", action="append", choices=OPS, help="more than once for several; default all"
    )
    made.add_argument("--out", type=Path, help="the file to write; other rows that it has stay")
    made.add_argument(
        "--quick", action="store_true", help="fewer sizes, 16 bits only, fewer repetitions"
    )
    made.add_argument(
        "--jobs",
        type=_jobs,
        default=default_jobs(),
        help="processes that compile at the same time, before a row is measured; default as many "
        f"as there are cores, up to {MOST_JOBS}; 1: none, each is compiled when it is run",
    )
    return made


def _jobs(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not an integer of at least 1")
    return int(word)


def _counted(chosen: Sequence[Case]) -> str:
    return f"{len(chosen)} rows with {sum(len(candidates_of(c)) for c in chosen):,} candidates"


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options = parser().parse_args(argv)
    _need_a_gpu()
    try:
        arch = _architecture()
        header = _facts(arch)
    except RuntimeError as error:
        words = f"the GPU cannot be used ({first_line(error)}); nvidia-smi shows what else uses it"
        raise Failure(words) from None
    named = os.environ.get(VARIABLE)
    place = options.out or (Path(named) if named else tuning_file.default_place(arch))
    check_place(place)
    held = before(place, header)
    half = torch.bfloat16 if arch >= 80 else torch.float16
    chosen = [
        case
        for case in cases(half)
        if (not options.op or case.op in options.op) and (case.quick or not options.quick)
    ]
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    measured: Measured = {}
    for key, choice in _choices(chosen, arch, rounds, options.jobs):
        measured[key] = choice
        write(place, content(header, held, measured))  # at once: what is measured stays
    if measured:
        used = tuning_file.in_use(arch)
        print(f"{place}: {len(measured)} rows written; {_use(place, used)}")
    if len(measured) < len(chosen):
        missing = f"{len(chosen) - len(measured)} of {len(chosen)} rows were not measured"
        raise Failure(f"{missing}, for the reasons above, and stay as they were")
    return 0


def _choices(
    chosen: Sequence[Case], arch: int, rounds: int, jobs: int
) -> Iterator[tuple[Key, Choice]]:
    """What was chosen for each row that could be measured; all of it is shown."""
    with tuning.trial({}):
        plans = {c: list(dict.fromkeys([shipped(c, arch), *candidates_of(c)])) for c in chosen}
    with Progress(list(map(len, plans.values()))) as progress, Ahead(arch, jobs) as ahead:

        def runner(case: Case) -> Runner:
            lost = ahead.compile(case, plans[case], progress.compiled)
            if lost:
                progress.say(lost)
            return _runner(case, rounds)

        for key, result in measure(chosen, arch, runner, progress):
            for line in described(key, result):
                progress.say(line)
            if isinstance(result, Choice):
                yield key, result


def _need_a_gpu() -> None:
    """UsageError unless compiled Triton kernels run here."""
    from gptk.ops.contract import availability

    if not torch.cuda.is_available():
        words = "there is none that torch can use; what ships stays in use"
        raise UsageError(f"needs a GPU to measure on, and {words}")
    reason = availability("triton")
    if reason is None and os.environ.get("TRITON_INTERPRET") == "1":
        reason = "TRITON_INTERPRET=1 has the kernels interpreted; unset it"
    if reason is not None:
        raise UsageError(f"needs the Triton kernels: {reason}")


def _architecture() -> int:
    from gptk.ops.triton_launch import architecture

    return architecture(torch.device("cuda", torch.cuda.current_device()))


def _runner(case: Case, rounds: int) -> Runner:
    return GpuRunner(case, work(case, "cuda"), rounds)


def measure(
    chosen: Sequence[Case],
    arch: int,
    runner: Callable[[Case], Runner],
    progress: Progress,
) -> Iterator[tuple[Key, Choice | Refused]]:
    """Each case's choice, or why it has none."""
    for case in chosen:
        progress.begin(tuning_file.shown(case.key))
        with tuning.trial({}):  # no user's file, and no earlier row, has a part in it
            result = _measured(case, arch, lambda case: Watched(runner(case), progress))
        yield case.key, result


def _measured(case: Case, arch: int, runner: Callable[[Case], Runner]) -> Choice | Refused:
    try:
        with refusing(case.kernel):
            return choose(shipped(case, arch), candidates_of(case), runner(case))
    except Refused as error:
        return Refused(str(error))  # another one: the traceback of this one holds the row's tensors


def described(key: Key, choice: Choice | Refused) -> list[str]:
    """A row in words: what was chosen, what was left out and why."""
    if isinstance(choice, Refused):
        return [f"{tuning_file.shown(key)}: not measured: {choice}"]
    was = f"{list(choice.shipped)} {choice.shipped_ms:.4f} ms"
    kept = choice.config == choice.shipped
    now = "kept" if kept else f"-> {list(choice.config)} {choice.config_ms:.4f} ms"
    lines = [f"{tuning_file.shown(key)}: {was} {now}"]
    return lines + [f"    left out {list(c)}: {why}" for c, why in choice.left_out.items()]


def _facts(arch: int) -> Content:
    """What a file says of where it was measured."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "format": FORMAT,
        "gpu": torch.cuda.get_device_name(),
        "arch": arch,
        **tuning_file.versions(),
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
    }


def check_place(place: Path) -> None:
    """UsageError unless a file can be written there; known before anything is measured."""
    try:
        if place.exists() and not place.is_file():
            kind = "a folder" if place.is_dir() else "no regular file"
            raise UsageError(f"the tuning file {place} is {kind}; name another place: --out FILE")
        place.parent.mkdir(parents=True, exist_ok=True)
        with _draft(place) as draft:
            draft.write_text("", "utf-8")
    except OSError as error:
        raise UsageError(_unwritten(place, error)) from None


@contextlib.contextmanager
def _draft(place: Path) -> Iterator[Path]:
    """Where to write what then takes the place at once; gone at the end."""
    draft = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _unwritten(place: Path, error: OSError) -> str:
    reason = error.strerror or type(error).__name__
    return f"the tuning file {place} cannot be written ({reason}); name another place: --out FILE"


def before(place: Path, header: Content) -> Content | None:
    """The file that is already there, whose other rows stay; None where there is none.

    Raises:
        UsageError: it was measured elsewhere or with other versions, or cannot be read.
    """
    if not place.exists():
        return None
    held = tuning_file.read(place, header["arch"])
    for name in ("gpu", "gptk", "torch", "triton"):
        if held[name] != header[name]:
            is_now = f"{name} {held[name]}, and this is {header[name]}"
            raise UsageError(f"{place} was measured with {is_now}; move it away or name --out FILE")
    return held


def content(header: Content, held: Content | None, measured: Measured) -> Content:
    """The file: the rows measured now, and of `held` those of other calls."""
    rows: dict[Key, dict[str, Any]] = {}
    for kernel, part in ({} if held is None else held["kernels"]).items():
        rows |= {(kernel, row["bits"], row["size"], row["kind"]): row for row in part["rows"]}
    for (kernel, bits, size, kind), choice in measured.items():
        rows[kernel, bits, size, kind] = {
            "bits": bits,
            "size": size,
            "kind": kind,
            "config": list(choice.config),
            "config_ms": round(choice.config_ms, 5),
            "shipped": list(choice.shipped),
            "shipped_ms": round(choice.shipped_ms, 5),
        }
    kernels = {}
    for kernel in KERNELS:
        own = [row for key, row in sorted(rows.items()) if key[0] == kernel]
        if own:
            kernels[kernel] = {"parameters": list(KERNELS[kernel].parameters), "rows": own}
    return header | {"kernels": kernels}


def write(place: Path, made: Content) -> None:
    """Store a file, one row a line, whole or not at all.

    Raises:
        Failure: there is no room, say.
    """
    head = {name: value for name, value in made.items() if name != "kernels"}
    parts = []
    for kernel, part in made["kernels"].items():
        lines = ",\n    ".join(json.dumps(row) for row in part["rows"])
        names = json.dumps(part["parameters"])
        parts.append(f' {json.dumps(kernel)}: {{"parameters": {names}, "rows": [\n    {lines}]}}')
    text = json.dumps(head)[:-1] + ',\n"kernels": {\n' + ",\n".join(parts) + "\n}}\n"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _draft(place) as draft:
            draft.write_text(text, "utf-8")
            os.replace(draft, place)
    except OSError as error:
        raise Failure(_unwritten(place, error)) from None


def _use(place: Path, used: Path | None) -> str:
    """Whether later processes read what was written."""
    if used is not None and used.absolute() == place.absolute():
        return "later processes use it"
    return f"to use it: {VARIABLE}={place}"
