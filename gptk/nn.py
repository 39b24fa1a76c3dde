"""Drop-in layers: torch's constructors, parameters and state, gptk's kernels underneath."""

from typing import Any

import torch
from torch import Tensor, nn

import gptk.functional as GF
from gptk.random import Seed


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm that can also add a dropped-out branch to a residual stream first.

    layer(x) is LayerNorm(x). layer(branch, residual=x) returns (LayerNorm(h), h) with
    h = x + dropout(branch); the dropout acts in training only.
    """

    ops = ("layer_norm",)

    def __init__(
        self, *args: Any, dropout: float = 0.0, backend: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.dropout, self.backend = dropout, backend

    def forward(
        self, input: Tensor, residual: Tensor | None = None, seed: Seed | None = None
    ) -> Any:
        p = self.dropout if self.training and residual is not None else 0.0
        return GF.layer_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            residual=residual,
            dropout_p=p,
            seed=seed,
            backend=self.backend,
        )


class GELU(nn.GELU):
    """torch.nn.GELU."""

    ops = ("gelu",)

    def __init__(self, approximate: str = "none", *, backend: str | None = None) -> None:
        super().__init__(approximate)
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        return GF.gelu(input, self.approximate, backend=self.backend)


class Linear(nn.Linear):
    """torch.nn.Linear with an optional activation: None, "gelu" or "gelu_tanh"."""

    ops = ("linear",)

    def __init__(
        self,
        *args: Any,
        activation: str | None = None,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.activation, self.backend = activation, backend

    def forward(self, input: Tensor) -> Tensor:
        return GF.linear(
            input, self.weight, self.bias, activation=self.activation, backend=self.backend
        )


class MLP(nn.Module):
    """GPT-2's MLP: c_fc (C -> hidden, 4 C by default), activation, c_proj (hidden -> C)."""

    ops = ("mlp",)

    def __init__(
        self,
        n_embd: int,
        hidden: int | None = None,
        bias: bool = True,
        activation: str | None = "gelu_tanh",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * n_embd if hidden is None else hidden
        self.c_fc = nn.Linear(n_embd, hidden, bias=bias)
        self.c_proj = nn.Linear(hidden, n_embd, bias=bias)
        self.activation, self.backend = activation, backend

    def forward(self, input: Tensor) -> Tensor:
        return GF.mlp(
            input,
            self.c_fc.weight,
            self.c_fc.bias,
            self.c_proj.weight,
            self.c_proj.bias,
            activation=self.activation,
            backend=self.backend,
        )


class KVCache:
    """Keys and values of the tokens seen so far: (L, B, H, block_size, D) each."""

    def __init__(
        self,
        shape: tuple[int, int, int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        """The most tokens it holds."""
        return self.k.shape[3]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, T, D) behind the `length` tokens of this layer; return all of them.

        Raises:
            ValueError: another batch size, or more tokens than there is room for.
        """
        end = self.length + k.shape[2]
        if k.shape[0] != self.k.shape[1]:
            raise ValueError(f"a batch of {k.shape[0]} for a cache of {self.k.shape[1]} sequences")
        if end > self.capacity:
            raise ValueError(f"{end} tokens for a cache of {self.capacity}")
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end].to(k.dtype), self.v[layer, :, :, :end].to(v.dtype)

    def reset(self) -> None:
        """Forget every token."""
        self.length = 0


class CausalSelfAttention(nn.Module):
    """GPT-2's attention: packed c_attn (C -> 3 C), n_head causal heads, c_proj."""

    ops = ("linear", "attention", "linear")

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        dropout: float = 0.0,
        bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd={n_embd} is not a multiple of n_head={n_head}")
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.n_head, self.dropout, self.backend = n_head, dropout, backend

    def forward(
        self,
        input: Tensor,
        seed: Seed | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        B, T, C = input.shape
        qkv = GF.linear(input, self.c_attn.weight, self.c_attn.bias, backend=self.backend)
        # (B, H, T, D) views of one buffer
        q, k, v = qkv.view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        p = self.dropout if self.training else 0.0
        y = GF.attention(q, k, v, causal=True, dropout_p=p, seed=seed, backend=self.backend)
        y = y.transpose(1, 2).reshape(B, T, C)
        return GF.linear(y, self.c_proj.weight, self.c_proj.bias, backend=self.backend)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss with an optional softcap of the logits and an optional z-loss."""

    ops = ("cross_entropy",)

    def __init__(
        self,
        *args: Any,
        softcap: float | None = None,
        z_loss: float = 0.0,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.softcap, self.z_loss, self.backend = softcap, z_loss, backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return GF.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            z_loss=self.z_loss,
            backend=self.backend,
        )


class LinearCrossEntropyLoss(nn.Linear):
    """A language-model head and its loss in one; the logits are never held as a whole.

    loss = layer(input, target), input (..., in_features), target (...) in [0, out_features).
    """

    ops = ("linear_cross_entropy",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **kwargs)
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing, self.backend = label_smoothing, backend
        self.softcap, self.z_loss = softcap, z_loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        return GF.linear_cross_entropy(
            input,
            self.weight,
            target,
            linear_bias=self.bias,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            z_loss=self.z_loss,
            backend=self.backend,
        )
