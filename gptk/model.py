"""GPT-2's architecture, written once in fused ops: every backend trains the same graph."""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptk.functional import attention, dropout, layer_norm, linear, linear_cross_entropy, mlp
from gptk.random import Seed, derive_seed, draw_seed


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


class KVCache:
    """Keys and values of the tokens seen so far: (L, B, H, block_size, D) each."""

    def __init__(self, config: GPTConfig, batch: int, dtype: torch.dtype, device: Any) -> None:
        shape = (
            config.n_layer,
            batch,
            config.n_head,
            config.block_size,
            config.n_embd // config.n_head,
        )
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def reset(self) -> None:
        """Forget every token."""
        self.length = 0


class Attention(nn.Module):
    """Causal self-attention with GPT-2's packed projection."""

    ops = ("linear", "attention", "linear")

    def __init__(self, config: GPTConfig, backend: str | None) -> None:
        super().__init__()
        C = config.n_embd
        self.c_attn = nn.Linear(C, 3 * C, bias=config.bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.n_head, self.dropout, self.backend = config.n_head, config.dropout, backend

    def forward(self, x: Tensor, seed: Seed, layer: int, cache: KVCache | None) -> Tensor:
        B, T, C = x.shape
        qkv = linear(x, self.c_attn.weight, self.c_attn.bias, backend=self.backend)
        q, k, v = qkv.view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        if cache is not None:
            end = cache.length + T
            cache.k[layer, :, :, cache.length : end] = k
            cache.v[layer, :, :, cache.length : end] = v
            k, v = cache.k[layer, :, :, :end].to(q.dtype), cache.v[layer, :, :, :end].to(q.dtype)
        p = self.dropout if self.training else 0.0
        y = attention(q, k, v, causal=True, dropout_p=p, seed=seed, backend=self.backend)
        y = y.transpose(1, 2).reshape(B, T, C)
        return linear(y, self.c_proj.weight, self.c_proj.bias, backend=self.backend)


class MLP(nn.Module):
    """Two projections around GPT-2's tanh GELU."""

    ops = ("mlp",)

    def __init__(self, config: GPTConfig, backend: str | None) -> None:
        super().__init__()
        C = config.n_embd
        self.c_fc = nn.Linear(C, 4 * C, bias=config.bias)
        self.c_proj = nn.Linear(4 * C, C, bias=config.bias)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        fc, proj = self.c_fc, self.c_proj
        return mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, backend=self.backend)


class AddNorm(nn.LayerNorm):
    """LayerNorm that first adds the dropped-out branch to the residual stream."""

    ops = ("layer_norm",)

    def __init__(self, config: GPTConfig, backend: str | None) -> None:
        super().__init__(config.n_embd, bias=config.bias)
        self.dropout, self.backend = config.dropout, backend

    def forward(self, branch: Tensor | None, x: Tensor, seed: Seed) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        parameters = (self.normalized_shape, self.weight, self.bias, self.eps)
        if branch is None:
            return layer_norm(x, *parameters, backend=self.backend), x
        p = self.dropout if self.training else 0.0
        return layer_norm(
            branch, *parameters, residual=x, dropout_p=p, seed=seed, backend=self.backend
        )


class Block(nn.Module):
    """x += attn(ln_1(x)); x += mlp(ln_2(x)), each sum fused into the norm that follows it."""

    def __init__(self, config: GPTConfig, backend: str | None) -> None:
        super().__init__()
        self.ln_1 = AddNorm(config, backend)
        self.attn = Attention(config, backend)
        self.ln_2 = AddNorm(config, backend)
        self.mlp = MLP(config, backend)

    def forward(
        self, branch: Tensor | None, x: Tensor, seed: Seed, layer: int, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        y, x = self.ln_1(branch, x, derive_seed(seed, layer, 0))
        branch = self.attn(y, derive_seed(seed, layer, 1), layer, cache)
        y, x = self.ln_2(branch, x, derive_seed(seed, layer, 2))
        return self.mlp(y), x


class GPT(nn.Module):
    """model(idx) -> logits (B, T, V); model(idx, targets) -> the loss, logits not stored."""

    ops = ("linear", "linear_cross_entropy")

    def __init__(self, config: GPTConfig, backend: str | None = None) -> None:
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} is not a multiple of n_head={config.n_head}")
        self.config, self.backend = config, backend
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, backend) for _ in range(config.n_layer))
        self.ln_f = AddNorm(config, backend)
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
        past = 0 if cache is None else cache.length
        T = idx.shape[1]
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens for block_size={self.config.block_size}")
        p = self.config.dropout if self.training else 0.0
        seed = (draw_seed() if p else 0) if seed is None else seed
        x = F.embedding(idx, self.wte.weight) + self.wpe.weight[past : past + T]
        x = dropout(x, p, derive_seed(seed, self.config.n_layer, 0))
        branch = None
        for layer, block in enumerate(self.h):
            branch, x = block(branch, x, seed, layer, cache)
        y, _ = self.ln_f(branch, x, derive_seed(seed, self.config.n_layer, 1))
        if cache is not None:
            cache.length += T
        weight = self.lm_head.weight
        if targets is None:
            return linear(y, weight, backend=self.backend)
        return linear_cross_entropy(y, weight, targets, reduction=reduction, backend=self.backend)

    def new_cache(self, batch_size: int, dtype: Any = None, device: Any = None) -> KVCache:
        """An empty cache of block_size tokens."""
        like = self.wte.weight
        return KVCache(self.config, batch_size, dtype or like.dtype, device or like.device)

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
