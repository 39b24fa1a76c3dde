"""A run's data: text, tokenizer, and batches as a pure function of the position."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptk.text import corpus, tokenizer, windows
from gptk.train.config import TrainConfig


@dataclass
class RunData:
    tokenizer: Any
    train: Any
    val: Any
    identity: dict[str, Any]
    summary: str
    token_bytes: Tensor
    bytes_per_token: float
    n_train: int
    batch_size: int

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def tokenizer_summary(self) -> str:
        return f"{self.tokenizer.kind}, {self.vocab_size} tokens"

    def save_tokenizer(self, path: Path) -> None:
        self.tokenizer.save(path)

    def train_batch(self, cursor: int, device: torch.device) -> tuple[Tensor, Tensor]:
        x, y = self.train.batch(cursor)
        return x.to(device), y.to(device)

    def val_batches(self, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.val.ordered(batch_size):
            yield x.to(device), y.to(device)


def load_data(settings: TrainConfig, stored_tokenizer: Path | None) -> RunData:
    text = corpus.load(settings.data.data)
    tok = (
        tokenizer.Tokenizer.load(stored_tokenizer)
        if stored_tokenizer
        else tokenizer.Tokenizer.make(settings.data.tokenizer, text.train)
    )
    tr, va = tok.encode(text.train), tok.encode(text.val)
    T = settings.model.block_size
    return RunData(
        tok,
        windows.Windows(tr, T, settings.optim.batch_size, settings.run.seed),
        windows.Windows(va, T, 1, 0),
        {"corpus sha256": text.sha256, "tokenizer sha256": tok.sha256},
        f"{text.name} sha {text.sha256}",
        torch.tensor(tok.token_bytes),
        len(text.train.encode()) / len(tr),
        len(tr),
        settings.optim.batch_size,
    )
