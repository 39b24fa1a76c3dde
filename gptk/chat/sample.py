"""`gptk sample RUN`: continue a prompt, streamed to the terminal."""

import os
from dataclasses import dataclass
from typing import Literal

from gptk.chat import generate, load
from gptk.flags import Failure, Flags, UsageError, flag_name
from gptk.train import hardware
from gptk.train.config import CHOICES
from gptk.train.start import check_backend


@dataclass(frozen=True)
class SampleConfig:
    """Let a trained GPT continue a prompt. RUN, before or after the flags, is a run folder or the
    folder of one of its checkpoints."""

    prompt: str = ""
    """Text to continue; empty: a new line, or the first character that the model knows."""
    temperature: float = 0.8
    """0 is greedy; below 1 is safer than the model's own distribution, above 1 wilder."""
    top_k: int = 0
    """Draw from the k most probable tokens only; 0 is off."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probabilities reach p; 1 is off."""
    max_new_tokens: int = 300
    """Tokens to draw."""
    seed: int | None = None
    """The same seed gives the same text; unset: another text each time."""
    backend: Literal["auto", "torch", "triton", "cpp"] = "auto"
    """Who computes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


WANTED = {
    "temperature": "a number, at least 0 (0 is greedy)",
    "top_k": "an integer, at least 0 (0 is off)",
    "top_p": "a number above 0 and up to 1 (1 is off)",
    "max_new_tokens": "an integer, at least 0",
    "seed": "an integer from 0 to 2**63 - 1",
    "backend": "one of " + ", ".join(CHOICES["backend"]),
    "device": "auto, cpu, cuda, cuda:N (N up to 999) or mps",
    "prompt": "a text",
}
KINDS: dict[str, type] = {
    "prompt": str,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "max_new_tokens": int,
    "seed": int,
    "backend": str,
    "device": str,
}
FLAGS = Flags("sample", KINDS, WANTED.__getitem__, {"backend": CHOICES["backend"]})


def main(argv: list[str]) -> int:
    """Print the prompt and its continuation; returns the exit code."""
    run, config = parse(argv)
    sampling = generate.Sampling(config.temperature, config.top_k, config.top_p)
    check_backend(config.backend)
    device = hardware.choose_device(config.device)
    model, tokenizer, _ = load.load(run, config.backend, device)
    prompt = _as_utf8(config.prompt) or generate.start_text(tokenizer)
    try:
        tokenizer.encode(prompt)
    except ValueError as error:
        raise UsageError(f"--prompt: {error}") from None
    print(generate.for_display(prompt), end="", flush=True)
    pieces = generate.stream(
        model, tokenizer, prompt, config.max_new_tokens, sampling, seed=config.seed
    )
    try:
        for piece in pieces:
            print(generate.for_display(piece), end="", flush=True)
    except ValueError as error:
        raise Failure(f"{run}: {error}; train it anew with a lower --learning-rate") from None
    print()
    return 0


def _as_utf8(word: str) -> str:
    """A word of the command line in UTF-8, whatever the locale took its bytes for."""
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeEncodeError:  # not from a command line: text that the locale cannot say
        return word
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt: not UTF-8 at byte {error.start}") from None


def parse(argv: list[str]) -> tuple[str, SampleConfig]:
    """(RUN, settings), checked; UsageError on any mistake."""
    if any(word in ("-h", "--help") for word in argv):
        _tyro(["--help"])
    run, words = _take_run(argv)
    found = FLAGS.split(words)
    config = _tyro(FLAGS.words(found))
    ranges = {
        "max_new_tokens": config.max_new_tokens >= 0,
        "seed": config.seed is None or 0 <= config.seed < 2**63,
    }
    for name, good in ranges.items():
        if not good:
            raise UsageError(f"--{flag_name(name)} {found[name]}: must be {WANTED[name]}")
    for name in ("temperature", "top_k", "top_p"):
        try:
            generate.Sampling(**{name: getattr(config, name)})
        except ValueError:
            raise UsageError(f"--{flag_name(name)} {found[name]}: must be {WANTED[name]}") from None
    return run, config


def _take_run(argv: list[str]) -> tuple[str, list[str]]:
    """The one word that is neither a flag nor a flag's value, and the others."""
    words = list(argv)
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        is_value = before.startswith("--") and "=" not in before
        if word and not word.startswith("-") and not is_value:
            return word, words[:i] + words[i + 1 :]
    raise UsageError("RUN is missing: gptk sample RUN, a run folder or a checkpoint's folder")


def _tyro(args: list[str]) -> SampleConfig:
    import tyro

    os.environ.setdefault("COLUMNS", "100")  # tyro's width where there is no terminal
    return tyro.cli(SampleConfig, prog="gptk sample RUN", args=args)
