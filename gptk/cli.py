"""The command `gptk`: verbs, exit codes, and one sentence per mistake.

Exit codes: 0 done, 1 the run failed, 2 a wrong command line or setting, 130 and 143 for SIGINT
and SIGTERM. A verb's code is imported when it is called.
"""

import difflib
import os
import sys
from collections.abc import Callable

from gptk.flags import UsageError

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


VERBS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "train a GPT on text"),
    "sample": (_sample, "let a trained GPT continue a prompt"),
    "info": (_info, "what is built, what runs where, and why not elsewhere"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
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


def usage() -> str:
    """What `gptk --help` prints."""
    lines = [f"  {verb:8} {text}" for verb, (_, text) in VERBS.items()]
    return "usage: gptk VERB ...\n\n" + "\n".join(lines) + "\n\nEach verb explains itself: --help."


def _run(verb: str, argv: list[str]) -> int:
    from gptk.ops.contract import Unsupported

    try:
        return VERBS[verb][0](argv)
    except (UsageError, Unsupported) as error:
        return _fail(f"gptk {verb}", str(error), 2)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRAS:
            raise
        missing = f"needs {error.name}, which is not installed; pip install 'gptk[train]'"
        return _fail(f"gptk {verb}", missing, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # whoever read the output is gone; Python would complain again while it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RuntimeError as error:
        if type(error).__name__ != "CheckpointError":
            raise
        return _fail(f"gptk {verb}", str(error), 1)


def _fail(who: str, sentence: str, code: int) -> int:
    print(f"{who}: {sentence}", file=sys.stderr)
    return code
