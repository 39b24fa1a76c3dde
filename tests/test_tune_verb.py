"""The verb `gptk tune`: what it says, what it refuses, what it leaves when something fails."""

import errno
import json
import os
import re
import weakref
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


from mocked_runner import HEADER, Mocked, about

from gptk import cli, info
from gptk.flags import Failure
from gptk.ops import tuning, tuning_file
from gptk.tune import ahead as ahead_module
from gptk.tune import gpu as gpu_module
from gptk.tune import main as tune
from gptk.tune import progress as progress_module
from gptk.tune.ahead import Ahead
from gptk.tune.cases import candidates, cases, shipped


class OneRunner(Mocked):
    """Every candidate but the first takes half of the shipped time; `failing` ops do not run."""

    def __init__(self, case, failing=()):
        super().__init__({}, refused={shipped(case, 90): "no room"} if case.op in failing else {})

    def times(self, configs):
        return [about(1.0), *(about(0.5 + i / 100) for i in range(len(configs) - 1))]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """As much of an sm_90 as the verb asks for; its runners are mocked."""
    monkeypatch.setattr(tune, "_need_a_gpu", lambda: None)
    monkeypatch.setattr(tune, "default_jobs", lambda: 1)
    monkeypatch.setattr(tune, "_architecture", lambda: 90)
    monkeypatch.setattr(tune, "_facts", lambda arch: dict(HEADER))
    monkeypatch.setattr(tune, "_runner", lambda case, rounds: OneRunner(case))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("GPTK_TUNING")
    return tmp_path / "gptk" / "tuning-sm_90.json"


def test_the_verb_writes_what_later_processes_use(gpu, capsys, monkeypatch):
    assert cli.main(["tune", "--quick", "--op", "gelu", "--op=linear"]) == 0
    said = capsys.readouterr().out
    assert f"{gpu}: 4 rows written; later processes use it" in said
    assert "gelu.forward, 16 bits, gelu_tanh: [1024, 4] 1.0000 ms -> [512, 2] 0.5000 ms" in said
    tuning.forget()
    with pytest.warns(RuntimeWarning, match="gptk 1 then"):
        assert tuning.user_row("gelu.forward", 90, 16, 0, "gelu_tanh") == (512, 2)
    tuning.forget()
    assert info._tuning(90).startswith(f"{gpu}: 4 rows, a GPU (sm_90), today; gptk 1 then, ")
    assert "no GPU" in info._tuning(0)
    monkeypatch.setenv("GPTK_TUNING", "")
    assert info._tuning(90) == "what ships (GPTK_TUNING is empty)"
    monkeypatch.setenv("GPTK_TUNING", str(gpu))
    assert "refused: " in info._tuning(80)


def test_info_compares_the_gpu(gpu, monkeypatch):
    gpu.parent.mkdir()
    tune.write(gpu, tune.content(HEADER | tuning_file.versions(), None, {}))
    monkeypatch.setattr(tuning_file, "_gpus", lambda arch: ["a GPU"] if arch == 90 else [])
    assert info._tuning(90) == f"{gpu}: 0 rows, a GPU (sm_90), today"
    monkeypatch.setattr(tuning_file, "_gpus", lambda arch: ["a GPU", "another"])
    assert info._tuning(90).endswith("today; gpu a GPU then, another now")


def test_a_run_says_what_is_to_come_and_where_it_is(gpu, capsys, monkeypatch):
    seconds = iter(range(0, 10**6, 4))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(seconds))
    assert cli.main(["tune", "--quick", "--op", "gelu"]) == 0
    first, *said = capsys.readouterr().out.splitlines()
    with tuning.trial({}):
        found = [case for case in cases(torch.bfloat16) if case.op == "gelu" and case.quick]
        forward, backward = (len({shipped(c, 90), *candidates(c)}) for c in found)
    assert first.startswith(f"2 rows, {forward + backward} configurations, each of which is comp")
    rows = [line for line in said if line.startswith("row ")]
    assert rows[0] == f"row 1 of 2: gelu.forward, 16 bits, gelu_tanh, {forward} configurations"
    assert rows[1].startswith(f"row 2 of 2: gelu.backward, 16 bits, gelu_tanh, {backward} conf")
    assert re.search(r"about \d+:\d\d left$", rows[1])
    steps = [line for line in said if line.startswith("    configuration ")]
    assert len(steps) >= 4
    assert re.fullmatch(rf"    configuration 3 of {forward}: \[\d+, \d\]", steps[0])
    assert any(line.startswith("    timing ") for line in said)


def test_on_a_terminal_a_bar_counts_the_configurations(capsys):
    pytest.importorskip("rich")
    with progress_module.Progress([2, 3], bar=True) as shown:
        for name, size in (("a [b]", 2), ("c", 3)):
            shown.begin(name)
            for i in range(size):
                shown.tries((i, 4))
        shown.say("left out [256, 4]: why")
        (task,) = shown._bar.tasks
    assert (task.completed, task.total, task.description) == (4, 5, "row 2 of 2: c")
    assert "left out [256, 4]: why\n" in capsys.readouterr().out


def test_what_is_compiled_ahead_is_what_a_launch_looks_for(monkeypatch, tmp_path):
    def kernels():
        return [path.stem for path in tmp_path.glob("*/*.cubin")]

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = next(c for c in cases(torch.bfloat16) if c.kernel == "layer_norm.forward")
    told = []
    with Ahead(90, 2) as ahead:
        assert ahead.compile(case, [(1, 128, 2)], told.append) is None
        assert kernels() == ["_layer_norm_forward_kernel"] * 2, "with and without the residual"
        ahead.compile(case, [(1, 128, 2)], told.append, "cpu")
        assert len(kernels()) == 2, "tensors with memory need other kernels"
        ahead.compile(case, [(2, 128, 4)], told.append, "cpu")
        assert len(kernels()) == 4
        assert "(RuntimeError: " in ahead.compile(case, [(1, 128, 2)], told.append, "none")
    assert told == [0, 0, 0, 0]


def test_processes_that_are_lost_are_said_and_missed_by_nobody(gpu, capsys, monkeypatch):
    class Broken:
        def __init__(self, *args, **kwargs):
            asked.append(self)

        def submit(self, *args):
            raise BrokenProcessPool

    asked = []
    monkeypatch.setattr(ahead_module, "ProcessPoolExecutor", Broken)
    assert cli.main(["tune", "--quick", "--op=gelu", "--jobs=2"]) == 0
    assert capsys.readouterr().out.count("was killed or could not start") == 1
    assert len(asked) == 1
    assert len(tuning_file.read(gpu, 90)["kernels"]) == 2
    assert cli.main(["tune", "--quick", "--op=gelu", "--jobs=1"]) == 0
    assert len(asked) == 1, "one job needs no processes"


@pytest.mark.parametrize("word", ["0", "-1", "two"])
def test_a_wrong_number_of_jobs_is_one_sentence(gpu, capsys, word):
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", f"--jobs={word}"])
    assert stop.value.code == 2
    assert f"'{word}' is not an integer of at least 1" in capsys.readouterr().err


def test_help_counts_the_rows_and_candidates(capsys):
    with pytest.raises(SystemExit):
        cli.main(["tune", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    every = cases(torch.bfloat16)
    quick = [case for case in every if case.quick]
    for found, words in ((every, "There are"), (quick, "with --quick")):
        count = sum(len(candidates(case)) for case in found)
        assert f"{words} {len(found)} rows with {count:,} candidates" in said


def test_out_names_another_file(gpu, capsys, tmp_path):
    out = tmp_path / "mine.json"
    assert cli.main(["tune", "--quick", "--op", "gelu", "--out", str(out)]) == 0
    assert f"to use it: GPTK_TUNING={out}" in capsys.readouterr().out
    assert json.loads(out.read_text())["gpu"] == "a GPU"
    assert not gpu.exists()


WRONG_PLACES = {
    "no such folder": (Path("/proc/nothing/own.json"), "cannot be written (No such file"),
    "a file as its folder": (Path("file/own.json"), "cannot be written (File exists)"),
    "a file as a folder above": (Path("file/new/own.json"), "cannot be written (Not a directory)"),
    "a long name": (Path("x" * 300), "cannot be written (File name too long)"),
    "a folder": (Path("folder"), "is a folder"),
    "a device": (Path(os.devnull), "is no regular file"),
}


@pytest.mark.parametrize("variable", [False, True], ids=["--out", "GPTK_TUNING"])
@pytest.mark.parametrize("name", WRONG_PLACES)
def test_where_no_file_can_be_written_nothing_is_measured(
    gpu, monkeypatch, capsys, tmp_path, name, variable
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    place, words = WRONG_PLACES[name]
    if variable:
        monkeypatch.setenv("GPTK_TUNING", str(place))
    assert cli.main(["tune", "--op=gelu", *([] if variable else [f"--out={place}"])]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"gptk tune: the tuning file {place} {words}")
    assert said.err.endswith("; name another place: --out FILE\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_disk_that_fills_up_is_a_sentence_and_keeps_the_rows(gpu, monkeypatch, capsys):
    def full(draft, text, encoding):
        if "gelu.backward" in text:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(draft, text, encoding)

    write_text = Path.write_text
    monkeypatch.setattr(Path, "write_text", full)
    assert cli.main(["tune", "--quick", "--op=gelu"]) == 1
    words = f"the tuning file {gpu} cannot be written (No space left on device); name another"
    assert capsys.readouterr().err.startswith(f"gptk tune: {words}")
    assert list(tuning_file.read(gpu, 90)["kernels"]) == ["gelu.forward"]
    assert [p.name for p in gpu.parent.iterdir()] == [gpu.name], "a draft is left"


def test_a_row_that_cannot_be_measured_is_said_and_the_others_are_kept(gpu, capsys, monkeypatch):
    monkeypatch.setattr(tune, "_runner", lambda case, rounds: OneRunner(case, ("linear",)))
    assert cli.main(["tune", "--quick", "--op", "gelu", "--op=linear"]) == 1
    said = capsys.readouterr()
    assert "linear.epilogue, 16 bits, size 1024, gelu_tanh: not measured" in said.out
    assert "no room" in said.out
    assert "2 of 4 rows were not measured, for the reasons above, and stay as they" in said.err
    assert len(tuning_file.read(gpu, 90)["kernels"]) == 2


FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"


@pytest.mark.parametrize("where", ["the work", "its times"])
def test_a_row_that_finds_no_memory_is_refused_and_frees_what_it_held(
    gpu, capsys, monkeypatch, where
):
    held, alive = [], []

    class Full(OneRunner):
        def times(self, configs):
            return fills_up(self) if where == "its times" else super().times(configs)

    def fills_up(runner):
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError(f"{FULL}\nsecond line")

    def runner(case, rounds):
        alive.append([ref() is not None for ref in held])
        if case.kernel == "gelu.forward":
            return Full(case) if where == "its times" else fills_up(None)
        return OneRunner(case)

    monkeypatch.setattr(gpu_module, "_works", lambda: True)
    monkeypatch.setattr(tune, "_runner", runner)
    assert cli.main(["tune", "--quick", "--op", "gelu"]) == 1
    said = capsys.readouterr()
    row = "gelu.forward, 16 bits, gelu_tanh: not measured: OutOfMemoryError: " + FULL
    assert row in said.out.splitlines()
    assert said.err.startswith("gptk tune: 1 of 2 rows were not measured")
    assert list(tuning_file.read(gpu, 90)["kernels"]) == ["gelu.backward"]
    assert alive == [[], [False]], "the next row finds the memory of this one taken"


def test_a_gpu_that_is_lost_while_it_is_timed_is_a_sentence(gpu, capsys, monkeypatch):
    def times(runner, configs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_module, "_works", lambda: False)
    monkeypatch.setattr(OneRunner, "times", times)
    assert cli.main(["tune", "--quick", "--op", "gelu"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("gptk tune: gelu.forward broke this process's use of the GPU (Runtime")
    assert said.count("\n") == 1


def test_a_gpu_that_cannot_be_reached_is_a_sentence(gpu, capsys, monkeypatch):
    def architecture():
        raise RuntimeError("CUDA error: out of memory\nsecond line")

    monkeypatch.setattr(tune, "_architecture", architecture)
    assert cli.main(["tune"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("gptk tune: the GPU cannot be used (RuntimeError: CUDA error: out of")
    assert said.endswith("; nvidia-smi shows what else uses it\n")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_remedy_for_too_little_memory_is_one_of_the_verb(capsys, monkeypatch, verb):
    def fails(argv):
        raise MemoryError("no room")

    monkeypatch.setitem(cli.VERBS, verb, (fails, ""))
    assert cli.main([verb]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"gptk {verb}: out of memory (no room); ")
    assert ("--n-embd" in said) == (verb == "train")


def test_rows_measured_before_a_failure_are_kept(gpu, monkeypatch, capsys):
    def runner(case, rounds):
        if case.kernel == "gelu.backward":
            raise Failure("the GPU is gone")
        return OneRunner(case)

    monkeypatch.setattr(tune, "_runner", runner)
    assert cli.main(["tune", "--quick", "--op", "gelu"]) == 1
    assert capsys.readouterr().err == "gptk tune: the GPU is gone\n"
    assert list(tuning_file.read(gpu, 90)["kernels"]) == ["gelu.forward"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_verb_says_so(capsys):
    assert cli.main(["tune"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gptk tune: needs a GPU to measure on")
    assert said.count("\n") == 1


def test_a_file_that_cannot_be_used_is_one_sentence_of_any_verb(capsys, monkeypatch):
    def fails(argv):
        raise tuning_file.TuningFileError("the tuning file x is not one")

    monkeypatch.setitem(cli.VERBS, "train", (fails, ""))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "gptk train: the tuning file x is not one\n"
