"""A run's data: its text, its tokenizer, and batches as a pure function of the position."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptk.text import corpus, token_file
from gptk.text.corpus import Corpus
from gptk.text.tokenizer import Tokenizer
from gptk.text.windows import Windows
from gptk.train import hardware
from gptk.train.checkpoint import written
from gptk.train.config import ConfigError, TrainConfig

TOKENS = "tokens-{}.bin"
"""Token file of a split, in the run folder."""
EVAL_TOKENS = 8192
"""Tokens in one batch of the validation pass, whatever the batch size of the training."""
INTERPRETED_EVAL_TOKENS = 1024
"""--eval-tokens in Triton's interpreter, unless it is set: about 20 seconds of a small model."""


class RunData:
    """Training and validation windows of one corpus under one tokenizer.

    Args:
        stored: a run folder that holds the token files of this very text and tokenizer. Where
            there is none, or a damaged one, the text is encoded.
    """

    def __init__(
        self,
        settings: TrainConfig,
        text: Corpus,
        tokenizer: Tokenizer,
        stored: Path | None = None,
    ) -> None:
        T = settings.model.block_size
        self.tokenizer, self.block_size = tokenizer, T
        self._encoded: dict[str, np.ndarray] = {}
        ids: dict[str, np.ndarray] = {}
        windows = {}
        for split in ("train", "val"):
            found = None
            if stored is not None:
                found = _stored_ids(stored / TOKENS.format(split), tokenizer.vocab_size)
            if found is None:
                with _one_sentence(f"{split} split of {text.name}: "):
                    found = np.asarray(tokenizer.encode(getattr(text, split)), dtype=np.int64)
                self._encoded[split] = found
            ids[split] = found
        _check_lengths(text.name, len(ids["train"]), len(ids["val"]), T)
        for split, batch_size in (("train", settings.optim.batch_size), ("val", 1)):
            windows[split] = Windows(ids[split], T, batch_size, settings.run.seed)
        self._train, self._val = windows["train"], windows["val"]
        self.n_train = len(ids["train"])
        self._eval_windows, self.eval_note = self._part(settings, len(ids["val"]))
        self.token_bytes = torch.tensor(tokenizer.token_bytes)  # (V,) int64
        self.bytes_per_token = len(text.train.encode()) / self.n_train
        self.identity = {"corpus sha256": text.sha256, "tokenizer sha256": tokenizer.sha256}
        self.summary = (
            f"{text.name}: {len(text.train) + len(text.val):,} characters, sha256 {text.sha256}; "
            f"{self.n_train:,} training tokens, {len(ids['val']):,} held out"
        )

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, and the token files unless they were read from here."""
        with written(folder / "tokenizer.json"):
            self.tokenizer.save(folder / "tokenizer.json")
        for split, ids in self._encoded.items():
            file = folder / TOKENS.format(split)
            with written(file):
                token_file.write(file, ids, self.vocab_size)

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer; a bpe that finds few pairs has fewer tokens than it was asked for."""
        return self.tokenizer.vocab_size

    def _part(self, settings: TrainConfig, n_val: int) -> tuple[int, str]:
        """(windows of a validation pass, a line that says so where they are not all)."""
        asked, why = settings.run.eval_tokens, "as --eval-tokens says"
        if asked == 0 and hardware.interpreted(settings.run.backend):
            asked = INTERPRETED_EVAL_TOKENS
            why = "since Triton's interpreter is slow; --eval-tokens sets it"
        windows = max(1, asked // self.block_size)
        if asked == 0 or windows >= self._val.count:
            return self._val.count, ""
        part = windows * self.block_size
        return windows, f"validation: {part:,} of {n_val:,} tokens, {why}"

    def train_batch(self, cursor: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Micro-batch number `cursor` of the run: (idx, targets), each (B, T) int64."""
        idx, targets = self._train.batch(cursor)
        return idx.to(device), targets.to(device)

    def val_batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Every window of the validation split, or of its part, once, in order."""
        at_once = max(1, EVAL_TOKENS // self.block_size)
        for idx, targets in self._val.ordered(at_once, self._eval_windows):
            yield idx.to(device), targets.to(device)


def load_text(settings: TrainConfig) -> Corpus:
    """The corpus; ConfigError if it cannot be used."""
    with _one_sentence(""):
        return corpus.load(settings.data.data)


def make_tokenizer(settings: TrainConfig, text: Corpus) -> Tokenizer:
    """The tokenizer that --tokenizer asks for. A bpe learns from the training split only; the
    alphabet of char is that of the whole text, for nothing is learned from it."""
    kind = settings.data.tokenizer
    learned_from = text.train + text.val if kind == "char" else text.train
    with _one_sentence(f"--tokenizer {kind}: "):
        return Tokenizer.make(kind, learned_from, settings.data.vocab_size)


def _stored_ids(file: Path, vocab_size: int) -> np.ndarray | None:
    """None where the file is not there or no good: the text itself has been verified."""
    try:
        return token_file.read(file, vocab_size)
    except FileNotFoundError:
        return None
    except (token_file.TokenFileError, OSError) as error:
        print(f"warning: {error}; the text is encoded anew")
        return None


def _check_lengths(name: str, n_train: int, n_val: int, T: int) -> None:
    """ConfigError, with the largest block that would do, if a split has no whole window."""
    split, n = ("training", n_train) if n_train <= n_val else ("validation", n_val)
    if n >= T + 1:
        return
    do = f"at most --block-size {n - 1}, or more text" if n > 1 else "more text"
    raise ConfigError(
        f"--data {name}: its {split} split has {n} tokens, too few for --block-size {T}, which "
        f"needs {T + 1}; take {do}"
    )


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint or run folder."""
    with _one_sentence(f"{path}: "):
        return Tokenizer.load(path)


@contextlib.contextmanager
def _one_sentence(before: str) -> Iterator[None]:
    """What the text side refuses is a wrong setting here."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigError(f"{before}{error}") from None
