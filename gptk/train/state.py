"""What a checkpoint of a run holds, and how it gets in and out of the live objects.

model.safetensors   the weights, tied ones once
optim.safetensors   exp_avg/NAME, exp_avg_sq/NAME, step/NAME for every parameter NAME
state.json          step, tokens, data cursor, configuration, hashes, scaler, generator states, ...
tokenizer.json      so that a checkpoint alone can be sampled from
"""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptk.train import checkpoint
from gptk.train.checkpoint import CheckpointError, clean_key

MODEL, OPTIM, STATE, TOKENIZER = (
    "model.safetensors",
    "optim.safetensors",
    "state.json",
    "tokenizer.json",
)
KEEP = 2  # checkpoints that stay; the second is there in case the newest gets damaged


def save(
    root: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    save_tokenizer: Callable[[Path], object],
) -> Path:
    """Publish `root/step-N` with N = state["step"].

    Raises:
        CheckpointError: it cannot be written; the ones before are intact.
    """
    tensors, tied = checkpoint.model_tensors(model)
    moments = {
        f"{kind}/{name}": value
        for name, entry in _optimizer_state(model, optimizer).items()
        for kind, value in entry.items()
    }
    content = {**state, "tied": tied, "generators": _generators()}
    writers: dict[str, Callable[[Path], object]] = {
        MODEL: lambda path: checkpoint.save_tensors(path, tensors, {}),
        OPTIM: lambda path: checkpoint.save_tensors(path, moments, {}),
        STATE: lambda path: checkpoint.write_json(path, content),
        TOKENIZER: save_tokenizer,
    }
    return checkpoint.publish(root, state["step"], writers, KEEP)


def read(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint.

    Raises:
        CheckpointError: it is not there or not of this form.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        step, _ = state["step"] + 0, state["model"]["n_layer"] + 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / STATE} is not a gptk training state ({type(error).__name__}: {error})"
        ) from None
    if not isinstance(step, int) or step < 0:
        raise CheckpointError(f"{folder / STATE}: step {step!r} is not a step count")
    return state


def restore(
    folder: Path, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put weights, moments and generator states of a verified checkpoint into the live objects."""
    checkpoint.load_model(model, checkpoint.load_tensors(folder / MODEL), state["tied"])
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in checkpoint.load_tensors(folder / OPTIM).items():
        kind, _, name = key.partition("/")
        moments.setdefault(name, {})[kind] = tensor
    names = _names(model, optimizer)
    if moments and set(moments) != set(names):
        odd = sorted(set(moments) ^ set(names))
        raise CheckpointError(f"{folder / OPTIM} does not fit the model; differing: {odd}")
    for name, parameter in zip(names, _parameters(optimizer), strict=True):
        for kind, value in moments.get(name, {}).items():
            if value.dim() and value.shape != parameter.shape:
                raise CheckpointError(
                    f"{folder / OPTIM}: {kind} of {name} is {tuple(value.shape)}, "
                    f"the parameter {tuple(parameter.shape)}"
                )
    groups = optimizer.state_dict()["param_groups"]
    by_index = {i: moments[name] for i, name in enumerate(names) if name in moments}
    optimizer.load_state_dict({"state": by_index, "param_groups": groups})
    _set_generators(state["generators"])


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The parameters' names in the optimizer's order."""
    names = {id(p): clean_key(name) for name, p in model.named_parameters()}
    return [names[id(p)] for p in _parameters(optimizer)]


def _optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, torch.Tensor]]:
    state = optimizer.state_dict()["state"]
    names = _names(model, optimizer)
    return {names[i]: entry for i, entry in state.items()}


def _generators() -> dict[str, Any]:
    """torch's default generators. Training draws nothing from them (seeds are derived from the
    run's seed and the step), but code that a user adds to a run may."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {k: base64.b64encode(v.numpy().tobytes()).decode() for k, v in states.items()}


def _set_generators(stored: dict[str, Any]) -> None:
    states = {
        k: torch.frombuffer(bytearray(base64.b64decode(v)), dtype=torch.uint8)
        for k, v in stored.items()
    }
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
