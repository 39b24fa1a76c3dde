"""Command-line words, brought into one form and checked before tyro reads them.

Every mistake is one sentence that names the flag, the value and what is allowed. `--flag=False`,
`--flag False` and `--no-flag` are the same, only the first '=' splits, `--batch_size` is
`--batch-size`, of a repeated flag the last counts, and an unknown one names its close match.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


class UsageError(ValueError):
    """A wrong command line or setting, in one sentence."""


class Failure(RuntimeError):
    """What was asked is right but failed (a full disk, a damaged file), in one sentence."""


@dataclass(frozen=True)
class Flags:
    """The flags of one verb."""

    verb: str
    kinds: Mapping[str, type]  # field name -> int, float, bool or str
    describe: Callable[[str], str] = lambda name: "a value"
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    optional_value: tuple[str, ...] = ()  # str flags that may stand alone, which gives ""
    hints: Mapping[str, str] = field(default_factory=dict)  # unknown name -> the flag meant
    stray: str = ""  # the field that a word without a flag was probably meant for

    def split(self, argv: Sequence[str]) -> dict[str, str]:
        """{field name: raw value}, checked; UsageError on anything that is not a flag."""
        found: dict[str, str] = {}
        words = list(argv)
        while words:
            word = words.pop(0)
            if not word.startswith("--") or word == "--":
                raise UsageError(f"unexpected argument {word!r}; {self._meant(word)}")
            option, equals, value = word.partition("=")
            name = option[2:].replace("-", "_")
            positive = name.removeprefix("no_")
            if name not in self.kinds and self.kinds.get(positive) is bool:
                if equals:
                    raise UsageError(f"{option}={value}: takes no value; --{flag_name(positive)}=")
                found[positive] = "False"
                continue
            if name not in self.kinds:
                raise UsageError(self.unknown(option))
            if not equals:
                value = self._next_value(name, words)
            self._check(name, value)
            found[name] = value
        return found

    def words(self, found: Mapping[str, str]) -> list[str]:
        """The words for tyro."""
        return [self._word(name, value) for name, value in found.items()]

    def unknown(self, option: str) -> str:
        """The sentence for a flag that does not exist, with the one that was probably meant."""
        name = flag_name(option.removeprefix("--").lower())
        names = [flag_name(kind) for kind in self.kinds]
        close = difflib.get_close_matches(name, names, n=1)
        meant = self.hints.get(name) or (close[0] if close else None)
        hint = f"did you mean --{meant}?" if meant else f"see gptk {self.verb} --help"
        return f"there is no option {option}; {hint}"

    def _meant(self, word: str) -> str:
        """What a word in the wrong place was probably to be."""
        name = word.lstrip("-").partition("=")[0].replace("_", "-")
        names = [flag_name(kind) for kind in self.kinds]
        if word.startswith("-") and len(name) > 1:
            close = difflib.get_close_matches(name.lower(), names, n=1)
            meant = self.hints.get(name) or (close[0] if close else None)
            if meant:
                return f"did you mean --{meant}?"
        elif not word.startswith("-") and self.stray:
            return f"did you mean --{flag_name(self.stray)} {word}?"
        return f"see gptk {self.verb} --help"

    def _next_value(self, name: str, words: list[str]) -> str:
        has_next = bool(words) and not words[0].startswith("--")
        if self.kinds[name] is bool:
            return words.pop(0) if has_next and _is_bool(words[0]) else "True"
        if has_next:
            return words.pop(0)
        if name in self.optional_value:
            return ""
        raise UsageError(f"--{flag_name(name)}: has no value; must be {self.describe(name)}")

    def _check(self, name: str, value: str) -> None:
        """UsageError unless `value` reads as the field's type and is among its choices."""
        kind = self.kinds[name]
        readable = _is_bool(value) if kind is bool else _reads_as(kind, value)
        allowed = self.choices.get(name)
        if readable and (allowed is None or value in allowed):
            return
        close = difflib.get_close_matches(value, allowed or (), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"--{flag_name(name)} {value}: must be {self.describe(name)}{hint}")

    def _word(self, name: str, value: str) -> str:
        if self.kinds[name] is bool:
            return f"--{'' if value.lower() in _TRUE else 'no-'}{flag_name(name)}"
        return f"--{flag_name(name)}={value}"


_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def flag_name(name: str) -> str:
    """batch_size -> batch-size."""
    return name.replace("_", "-")


def _is_bool(word: str) -> bool:
    return word.lower() in (*_TRUE, *_FALSE)


def _reads_as(kind: type, value: str) -> bool:
    try:
        kind(value)
    except ValueError:
        return False
    return True
