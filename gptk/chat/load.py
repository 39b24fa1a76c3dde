"""A trained model from a run folder or from one checkpoint of it."""

from pathlib import Path
from typing import Any

import torch

from gptk.flags import UsageError
from gptk.model import GPT, GPTConfig
from gptk.text.tokenizer import Tokenizer
from gptk.train import checkpoint, folder, state
from gptk.train.checkpoint import CheckpointError
from gptk.train.data import load_tokenizer


def load(
    run: Path | str, backend: str = "auto", device: torch.device | str = "cpu"
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """(model in eval mode, tokenizer, state.json) of the newest whole checkpoint.

    Args:
        run: a run folder, or the folder of one checkpoint.

    Raises:
        UsageError: there is no run or checkpoint.
        CheckpointError: there is one, but it is damaged or does not fit.
    """
    found = find(Path(run))
    stored = state.read(found)
    tensors = checkpoint.load_tensors(found / state.MODEL)
    try:
        config = GPTConfig(**stored["model"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{found}: not a model's configuration ({error})") from None
    _check_sizes(found, config, tensors)
    model = GPT(config, backend=backend)
    checkpoint.load_model(model, tensors, stored["tied"])
    return model.to(device).eval(), load_tokenizer(found / state.TOKENIZER), stored


def find(run: Path) -> Path:
    """The checkpoint folder that `run` means, verified."""
    try:
        is_folder = run.is_dir()
    except OSError as error:
        shown = str(run) if len(str(run)) <= 80 else f"{str(run)[:77]}..."
        raise UsageError(f"RUN {shown}: cannot be used ({error.strerror})") from None
    if not is_folder:
        raise UsageError(f"{run}: there is no such folder")
    if (run / checkpoint.MANIFEST).exists():
        reason = checkpoint.damage(run)
        if reason is not None:
            raise CheckpointError(f"damaged checkpoint: {reason}")
        return run
    newest = checkpoint.newest(run / folder.CHECKPOINTS, print)
    if newest is None:
        raise UsageError(f"{run}: neither a run folder with checkpoints nor a checkpoint")
    return newest


def _check_sizes(found: Path, config: GPTConfig, tensors: dict[str, torch.Tensor]) -> None:
    """CheckpointError unless the configuration is that of the tensors; checked before a model of
    that size is built, so that a false number costs no memory."""
    wte, wpe = tensors.get("wte.weight"), tensors.get("wpe.weight")
    layers = {key.split(".")[1] for key in tensors if key.startswith("h.")}
    if (
        wte is None
        or wpe is None
        or tuple(wte.shape) != (config.vocab_size, config.n_embd)
        or tuple(wpe.shape) != (config.block_size, config.n_embd)
        or len(layers) != config.n_layer
    ):
        raise CheckpointError(f"{found}: the configuration {config} is not that of its tensors")
