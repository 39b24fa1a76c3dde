"""GPT-2's architecture, written once in fused ops: every backend trains the same graph."""

import dataclasses
import functools
import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptk import block_native
from gptk.block import OPS, BlockFunction, Plan, decode, parameter_sizes
from gptk.functional import dropout, linear, linear_cross_entropy
from gptk.nn import MLP, CausalSelfAttention, KVCache, LayerNorm
from gptk.ops.contract import kernels_of, transformed
from gptk.ops.tensors import addressable, autocast_dtype, tracing
from gptk.random import Seed, check_probability, derive_seed, draw_seed


@dataclasses.dataclass
class GPTConfig:
    """Sizes of a GPT; the names are nanoGPT's. The default is GPT-2 124M, vocabulary padded."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


def check_config(config: GPTConfig) -> None:
    """Raise ValueError for sizes that no model can have."""
    for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd={config.n_embd} is not a multiple of n_head={config.n_head}")
    check_probability(config.dropout)


class Block(nn.Module):
    """x += attn(ln_1(x)); x += mlp(ln_2(x)), each sum fused into the norm that follows it."""

    fuses = True  # one call of one backend's kernels (gptk/block.py), whatever the size

    def __init__(self, config: GPTConfig, backend: str | None) -> None:
        super().__init__()
        C, p, bias = config.n_embd, config.dropout, config.bias
        self.ln_1 = LayerNorm(C, bias=bias, dropout=p, backend=backend)
        self.attn = CausalSelfAttention(C, config.n_head, p, bias, backend)
        self.ln_2 = LayerNorm(C, bias=bias, dropout=p, backend=backend)
        self.mlp = MLP(C, bias=bias, backend=backend)

    def forward(
        self, branch: Tensor | None, x: Tensor, seed: Seed, layer: int, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        """x: residual stream (B, T, C); branch: what is still to be added to it."""
        kernels = None
        if cache is None or not torch.is_grad_enabled():
            alike = branch is None or branch.shape == x.shape
            kernels = self._kernels(x) if alike and addressable(branch) else None
        if kernels is not None:
            return self._fused(kernels, branch, x, seed, layer, cache)
        seeds = _seeds(seed, layer)
        if branch is None:
            y = self.ln_1(x)
        else:
            y, x = self.ln_1(branch, x, seeds[0])
        branch = self.attn(y, seeds[1], cache, layer)
        y, x = self.ln_2(branch, x, seeds[2])
        return self.mlp(y), x

    def _layers(self) -> tuple[Any, ...]:
        """ln_1, attn, ln_2, mlp, and the linear layers in their order."""
        held: dict[str, Any] = self._modules  # nn.Module's own attribute lookup is slow
        ln_1, attn, ln_2, mlp = held["ln_1"], held["attn"], held["ln_2"], held["mlp"]
        inside, within = attn._modules, mlp._modules
        return (
            ln_1, attn, ln_2, mlp,
            inside.get("c_attn"), inside.get("c_proj"), within.get("c_fc"), within.get("c_proj"),
        )  # fmt: skip

    def _kernels(self, x: Tensor) -> tuple[ModuleType, ...] | None:
        """The kernels of the whole block, if one backend has them all and nobody looks inside."""
        layers = self._layers()
        if tuple(map(type, layers)) != BLOCK_PARTS:
            return None
        for layer in layers:
            if layer._forward_hooks or layer._forward_pre_hooks:
                return None
            if layer._backward_hooks or layer._backward_pre_hooks:
                return None
        ln_1, attn, ln_2, mlp = layers[:4]
        norms = (ln_1._parameters, ln_2._parameters)
        kinds = {t.dtype for norm in norms for t in norm.values() if t is not None}
        if len(kinds) > 1 or x.numel() == 0:
            return None
        if len({part.training and part.dropout for part in (ln_1, attn, ln_2)}) > 1:
            return None
        if not ln_1.backend == attn.backend == ln_2.backend == mlp.backend:
            return None
        parameters, device = _parameters(layers), x.device
        if any(parameters[place] is None for place in block_native.MATRICES):
            return None  # they are kept elsewhere
        if transformed() or not addressable(x, *parameters):
            return None
        sizes = parameter_sizes(x.shape[-1], layers[6].weight.shape[0])
        for t, size in zip(parameters, sizes, strict=True):
            if t is not None and (t.shape != size or t.device != device):
                return None  # the ops have the words for it
        if x.dim() != 3 or x.shape[-1] % attn.n_head:
            return None
        return kernels_of(OPS, attn.backend, device.type, autocast_dtype(x) or x.dtype)

    def _fused(
        self,
        kernels: tuple[ModuleType, ...],
        branch: Tensor | None,
        x: Tensor,
        seed: Seed,
        layer: int,
        cache: KVCache | None,
    ) -> Any:
        layers = self._layers()
        ln_1, attn, ln_2, mlp = layers[:4]
        p = attn.dropout if attn.training else 0.0
        seeds = _seeds(seed, layer) if p else (0, 0, 0)
        eps = (ln_1.eps, ln_2.eps)
        plan = Plan(kernels, attn.n_head, p, seeds, eps, mlp.activation, autocast_dtype(x))
        parameters = _parameters(layers)
        shape = block_native.shape_of(plan, branch, x, parameters, backward=cache is None)
        if cache is not None:
            room = block_native.LayerCache(cache.k[layer], cache.v[layer], cache.length)
            if shape is not None and block_native.has_room(room, shape):
                return block_native.decode(plan, shape, branch, x, parameters, room)
            return decode(plan, branch, x, parameters, functools.partial(cache.append, layer))
        if shape is not None:
            return block_native.NativeBlockFunction.apply(plan, shape, branch, x, *parameters)
        return BlockFunction.apply(plan, branch, x, *parameters)


def _seeds(seed: Seed, layer: int) -> tuple[Any, Any, Any]:
    """Of a block's branch, its attention, and the attention's projection."""
    branch, attention, projection = (derive_seed(seed, layer, site) for site in range(3))
    return branch, attention, projection


def _parameters(layers: tuple[Any, ...]) -> list[Tensor | None]:
    """The weights and biases of a block's _layers, in the order in which they are used."""
    ln_1, _, ln_2, _, c_attn, c_proj, c_fc, c_proj_2 = layers
    order = (ln_1, c_attn, c_proj, ln_2, c_fc, c_proj_2)
    return [layer._parameters.get(name) for layer in order for name in ("weight", "bias")]


BLOCK_PARTS = (LayerNorm, CausalSelfAttention, LayerNorm, MLP, *(nn.Linear,) * 4)


class DenseGradient(torch.autograd.Function):
    """The weight itself; what all its uses give as a gradient leaves as one dense tensor."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.to_dense() if gradient.is_sparse else gradient


class GPT(nn.Module):
    """model(idx) -> logits (B, T, V); model(idx, targets) -> the loss, logits not stored."""

    ops = ("linear", "linear_cross_entropy")

    def __init__(self, config: GPTConfig, backend: str | None = None) -> None:
        super().__init__()
        check_config(config)
        self.config, self.backend = config, backend
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, backend) for _ in range(config.n_layer))
        C = config.n_embd
        self.ln_f = LayerNorm(C, bias=config.bias, dropout=config.dropout, backend=backend)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() >= 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "mean",
        seed: Seed | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V), or the loss over targets != -100; `seed` governs every dropout mask."""
        if idx.dim() != 2:
            raise ValueError(f"idx {tuple(idx.shape)}: must be (B, T)")
        if idx.device != self.wte.weight.device:  # torch's embedding does not look
            raise ValueError(f"idx is on {idx.device}, the model on {self.wte.weight.device}")
        past = 0 if cache is None else cache.length
        T = idx.shape[1]
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens for block_size={self.config.block_size}")
        p = self.config.dropout if self.training else 0.0
        seed = (draw_seed() if p else 0) if seed is None else seed
        table, weight = self.wte.weight, self.lm_head.weight
        sparse = targets is not None and self._few_rows(idx)
        if sparse:
            table = weight = DenseGradient.apply(weight)
        x = F.embedding(idx, table, sparse=sparse) + self.wpe.weight[past : past + T]
        x = dropout(x, p, derive_seed(seed, self.config.n_layer, 0))
        branch: Tensor | None = None
        for layer, block in enumerate(self.h):
            branch, x = block(branch, x, seed, layer, cache)
        assert branch is not None  # n_layer >= 1
        y, _ = self.ln_f(branch, x, derive_seed(seed, self.config.n_layer, 1))
        if cache is not None:
            cache.length += T
        if targets is None:
            return linear(y, weight, backend=self.backend)
        return linear_cross_entropy(y, weight, targets, reduction=reduction, backend=self.backend)

    def _few_rows(self, idx: Tensor) -> bool:
        """The tied weight's gradient is V x C from the head. To add a few rows to it is cheaper
        than to make a second one, of zeros but for these rows, and to add that."""
        weight = self.lm_head.weight
        return (
            not tracing()
            and not transformed()
            and weight.numel() > 16 * idx.numel() * self.config.n_embd
            and weight is self.wte.weight
            and idx.device.type == "cpu"
            and kernels_of(("linear_cross_entropy",), self.backend, "cpu", weight.dtype) is not None
        )

    def new_cache(
        self,
        batch_size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KVCache:
        """An empty cache for block_size tokens of batch_size sequences."""
        c, like = self.config, self.wte.weight
        shape = (c.n_layer, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head)
        return KVCache(shape, dtype or like.dtype, device or like.device)

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Matrices decay; biases and norms do not."""
        params = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]

    def num_params(self, non_embedding: bool = True) -> int:
        """Parameters, the tied matrix once; without the position table if non_embedding."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.wpe.weight.numel() if non_embedding else n

    def flops_per_token(self, T: int) -> int:
        """6 N + 12 L C T: forward and backward, attention counted in full."""
        return 6 * self.num_params() + 12 * self.config.n_layer * self.config.n_embd * T
