"""The command `gptk`: verbs, exit codes, and one sentence per mistake.

Exit codes: 0 done, 1 the run failed, 2 a wrong command line or setting, 130 and 143 for SIGINT
and SIGTERM. A verb's code is imported when it is called.
"""

import contextlib
import difflib
import os
import sys
from collections.abc import Callable

from gptk.flags import Failure, UsageError

EXTRAS = {"tyro", "rich", "safetensors", "tokenizers", "matplotlib"}
"""Modules that `pip install 'gptk[train]'` brings."""


def _train(argv: list[str]) -> int:
    from gptk.train import options, start

    return start.run(options.parse(argv))


def _sample(argv: list[str]) -> int:
    from gptk.chat import sample

    return sample.main(argv)


def _info(argv: list[str]) -> int:
    from gptk import info

    return info.main(argv)


def _bench(argv: list[str]) -> int:
    from gptk.bench import main as bench

    return bench.main(argv)


def _tune(argv: list[str]) -> int:
    from gptk.tune import main as tune

    return tune.main(argv)


SMALLER = {"train": "take a smaller --n-embd, --n-layer, --block-size or --batch-size"}
"""How a verb does with less memory."""
VERBS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "train a GPT on text"),
    "sample": (_sample, "let a trained GPT continue a prompt"),
    "bench": (_bench, "time ops and training steps against PyTorch on this machine"),
    "tune": (_tune, "measure the Triton kernels' launch configurations on this machine's GPU"),
    "info": (_info, "what is built, what runs where, and why not elsewhere"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    _prepare_streams()
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from gptk import __version__

        print(f"gptk {__version__}")
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return _fail("gptk", f"there is no verb {verb!r} (verbs: {', '.join(VERBS)}){hint}", 2)
    return _run(verb, rest)


def _prepare_streams() -> None:
    """Output that is closed goes nowhere; what its encoding cannot say is shown as "?"."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def usage() -> str:
    """What `gptk --help` prints."""
    lines = [f"  {verb:8} {text}" for verb, (_, text) in VERBS.items()]
    return "usage: gptk VERB ...\n\n" + "\n".join(lines) + "\n\nEach verb explains itself: --help."


def _run(verb: str, argv: list[str]) -> int:
    from gptk.ops.contract import Unsupported
    from gptk.ops.tuning_file import TuningFileError

    try:
        code = VERBS[verb][0](argv)
        sys.stdout.flush()  # here, where a failure is still a sentence
        return code
    except (UsageError, Unsupported, TuningFileError) as error:
        return _fail(f"gptk {verb}", str(error), 2)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRAS:
            raise
        missing = f"needs {error.name}, which is not installed; pip install 'gptk[train]'"
        return _fail(f"gptk {verb}", missing, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _drop_output()
        return 0  # whoever read the text has enough; train goes on by itself
    except OSError as error:
        _drop_output()
        place = error.filename or "the output"
        return _fail(f"gptk {verb}", f"{place}: {error.strerror or error}", 1)
    except Failure as error:
        return _fail(f"gptk {verb}", str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        first = str(error).strip().splitlines()[:1] or ["no memory is left"]
        remedy = SMALLER.get(verb, "end other programs that use it, or take a machine with more")
        return _fail(f"gptk {verb}", f"out of memory ({first[0]}); {remedy}", 1)


def _drop_output() -> None:
    """Python would complain once more, in its own words, when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """torch says so in a RuntimeError: by class on a GPU, by words on a CPU."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "Storage size calc")
    return isinstance(error, MemoryError) or any(w in str(error) for w in words)


def _fail(who: str, sentence: str, code: int) -> int:
    print(f"{who}: {sentence}", file=sys.stderr)
    return code
