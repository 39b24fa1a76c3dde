"""Generation, token by token with a KV cache, batch 1: tokens per second of GPT-2 124M.

What bounds it is reading the weights once per token: bytes of the weights over the bandwidth at
which this machine reads memory, measured in the same run. Weights are random and stored in the
dtype that is measured; every provider draws greedily TOKENS tokens after a prompt of PROMPT.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gptk
from gptk.bench.gate import FORWARD, Verdict, accepted, error
from gptk.chat.generate import Sampling, generate
from gptk.model import GPT, GPTConfig

SIZES = {"gpt2": GPTConfig(1024, 50304, 12, 12, 768)}
PROMPT, TOKENS = 16, 64
TRANSFORMERS = "transformers"


class Provider(NamedTuple):
    """run: generate TOKENS tokens; logits: of the token after the prompt, or None."""

    run: Callable[[], Any]
    logits: Callable[[], Tensor] | None


def providers(
    size: str, dtype: torch.dtype, backends: list[str], device: str = "cpu"
) -> dict[str, Provider]:
    """Name -> provider; plain PyTorch is gptk's torch backend, and transformers where installed."""
    config = SIZES[size]
    torch.manual_seed(0)
    prompt = torch.randint(config.vocab_size, (1, PROMPT)).to(device)
    weights = GPT(config).state_dict()
    made: dict[str, Provider] = {}
    if importlib.util.find_spec("transformers") is not None:
        made[TRANSFORMERS] = Provider(_transformers(config, dtype, prompt), None)
    for backend in ("torch", *(b for b in backends if b not in ("torch", "compile"))):
        model = GPT(config, backend=backend)
        model.load_state_dict(weights)
        model = model.to(device, dtype).eval()
        made[f"gptk {backend}"] = Provider(*_calls(model, prompt))
    return made


def _calls(model: GPT, prompt: Tensor) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
    def run() -> list[Tensor]:
        return list(generate(model, prompt, TOKENS, Sampling(temperature=0.0), seed=0))

    def logits() -> Tensor:
        cache = model.new_cache(1)
        with torch.no_grad():
            model(prompt[:, :-1], cache=cache)
            return model(prompt[:, -1:], cache=cache)

    return run, logits


def _transformers(config: GPTConfig, dtype: torch.dtype, prompt: Tensor) -> Callable[[], Any]:
    """`generate` of the same architecture and sizes in Hugging Face's transformers."""
    library: Any = importlib.import_module("transformers")
    model = library.GPT2LMHeadModel(
        library.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
        )
    )
    model = model.to(prompt.device, dtype).eval()
    options = dict(max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(prompt)
    return lambda: model.generate(prompt, attention_mask=mask, **options)


def verdicts(size: str, found: dict[str, Provider], device: str = "cpu") -> dict[str, Verdict]:
    """Are each backend's logits after cached tokens within twice the error of plain PyTorch?"""
    torch.manual_seed(0)
    config = SIZES[size]
    prompt = torch.randint(config.vocab_size, (1, PROMPT)).to(device)
    exact = GPT(config, backend="torch").double().to(device).eval()
    _, logits = _calls(exact, prompt)
    truth = logits()
    plain = found["gptk torch"].logits
    assert plain is not None
    own = plain()
    made = {}
    for name, provider in found.items():
        if provider.logits is None:
            made[name] = Verdict(True, math.nan)
            continue
        value = provider.logits()
        made[name] = Verdict(
            accepted(value, truth, own, FORWARD), error(value, truth) / error(own, truth)
        )
    return made


def weight_bytes(size: str, dtype: torch.dtype) -> int:
    """Read for each token: every weight but the two tables, and the output matrix (the first of
    the tables, tied)."""
    with torch.device("meta"):
        model = gptk.GPT(SIZES[size])
    return model.num_params() * dtype.itemsize
