"""GPT-2 in plain PyTorch, as one would write it today: the whole-step baseline.

Fused AdamW, scaled_dot_product_attention, F.cross_entropy over materialised logits. It computes the
function of gptk.GPT with equal sizes, dropout sites included.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptk.model import GPTConfig


class Block(nn.Module):
    """x += dropout(attn(ln_1(x))); x += dropout(mlp(ln_2(x)))."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        C = c.n_embd
        self.n_head, self.p = c.n_head, c.dropout
        self.ln_1, self.ln_2 = (nn.LayerNorm(C, bias=c.bias) for _ in range(2))
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C, bias=c.bias), nn.Linear(C, C, bias=c.bias)
        self.fc, self.proj = nn.Linear(C, 4 * C, bias=c.bias), nn.Linear(4 * C, C, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        p = self.p if self.training else 0.0
        qkv = self.c_attn(self.ln_1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        x = x + F.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)), p)
        hidden = F.gelu(self.fc(self.ln_2(x)), approximate="tanh")
        return x + F.dropout(self.proj(hidden), p)


class GPT(nn.Module):
    """model(idx, targets) -> the loss."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.p = c.dropout
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.block_size, c.n_embd)
        self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd, bias=c.bias)

    def forward(self, idx: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        x = self.wte(idx) + self.wpe.weight[: idx.shape[1]]
        x = F.dropout(x, self.p) if self.training and self.p else x
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def load(model: GPT, ours: nn.Module) -> None:
    """Give the baseline the weights of a gptk.GPT: the same parameters in the same order."""
    with torch.no_grad():
        for to, given in zip(model.parameters(), _in_order(ours), strict=True):
            to.copy_(given)


def _in_order(ours: Any) -> Iterator[Tensor]:
    layers = [ours.wte, ours.wpe]
    for block in ours.h:
        layers += [block.ln_1, block.ln_2, block.attn.c_attn, block.attn.c_proj]
        layers += [block.mlp.c_fc, block.mlp.c_proj]
    for layer in (*layers, ours.ln_f):
        yield from layer.parameters()


class Clipped:
    """PyTorch's fused AdamW, decay on matrices only, after clipping by the global norm."""

    def __init__(self, model: nn.Module) -> None:
        self.params = list(model.parameters())
        groups = [
            {"params": [p for p in self.params if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in self.params if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
        self.zero_grad = self.optimizer.zero_grad

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
