"""linear_cross_entropy: a chunk of rows at a time, the matrix product, then the C++ extension's
cross-entropy on the chunk's logits, which become their own gradient in place.

Logits are float32 (float64 for float64) whatever the inputs' dtype. The chunk's buffer is the only
memory that depends on V, and it does not depend on the number of rows. Where the reduction is known
the gradients are formed with the loss (`loss_and_gradients`): three products for each chunk; the
general backward needs the logits again, a fourth.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gptk.native import ACC, empty, workspace
from gptk.ops.cpp_epilogue import own, sum_rows
from gptk.ops.cpp_product import owns, product
from gptk.ops.cpp_product import owns as rounds_float32
from gptk.ops.cross_entropy.cpp_impl import forward as cross_entropy_forward
from gptk.ops.cross_entropy.cpp_impl import write_dlogits

__all__ = ["backward", "forward", "loss_and_gradients", "rounds_float32", "unsupported"]


def unsupported(device_type: str, dtype: torch.dtype, **traits: object) -> str | None:
    """Every shape and every dtype of the catalog runs."""
    return None


def chunk_rows(V: int) -> int:
    """Rows whose logits exist at once: 4M logits, but at least 256 rows and up to 32M logits
    (128 MiB) even 512, so that reading the weight and adding to its gradient, once per chunk, stay
    cheap beside the products."""
    return max(2**22 // V, min(512, max(256, 2**25 // V)))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(loss, lse), each (N,), for x (N, C), weight (V, C)."""
    losses, lses = [], []
    options = (ignore_index, label_smoothing, softcap, z_loss)
    for rows, logits in _Chunks(x, weight, bias).logits():
        loss, lse = cross_entropy_forward(logits, target[rows], *options)
        losses.append(loss)
        lses.append(lse)
    return _joined(losses), _joined(lses)


def backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    needs: tuple[bool, bool, bool],
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias); the two sums over rows are kept in the accumulation dtype."""
    chunks = _Chunks(x, weight, bias, needs)
    options = (ignore_index, label_smoothing, softcap, z_loss)
    for rows, logits in chunks.logits():
        dlogits = chunks.in_place(logits)
        write_dlogits(dlogits, dloss[rows], logits, target[rows], lse[rows], *options)
        chunks.add_gradients(rows, dlogits)
    return chunks.gradients(weight_dtype, bias_dtype)


def loss_and_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    dloss: Tensor,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    needs: tuple[bool, bool, bool],
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """(loss, lse, gradients): forward and, for a dloss (N,) known beforehand, backward."""
    losses, lses = [], []
    chunks = _Chunks(x, weight, bias, needs)
    options = (ignore_index, label_smoothing, softcap, z_loss)
    for rows, logits in chunks.logits():
        loss, lse = cross_entropy_forward(logits, target[rows], *options)
        dlogits = chunks.in_place(logits)
        write_dlogits(dlogits, dloss[rows], logits, target[rows], lse, *options)
        chunks.add_gradients(rows, dlogits)
        losses.append(loss)
        lses.append(lse)
    return _joined(losses), _joined(lses), chunks.gradients(weight_dtype, bias_dtype)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Chunks:
    """The three products of a chunk, by the extension or by torch (then in the sums' dtype)."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, bool, bool] = (False, False, False),
    ) -> None:
        self.x, self.compute, self.acc = x, x.dtype, ACC[x.dtype]
        self.own = owns(x.dtype)
        self.weight = weight if self.own else weight.to(self.acc)  # (V, C)
        self.bias = bias if self.own or bias is None else bias.to(self.acc)
        self.needs, self.first = needs, True
        self.dx = empty(x.shape, x.dtype if self.own else self.acc) if needs[0] else None
        self.dweight = empty(tuple(weight.shape), self.acc) if needs[1] else None
        self.dbias: Tensor | None = None

    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their logits in one buffer used again and again), in order."""
        N, V = self.x.shape[0], self.weight.shape[0]
        step = min(N, chunk_rows(V))
        buffer = workspace("logits", step * V, self.acc)[: step * V].view(step, V)
        for begin in range(0, N, step):
            rows = slice(begin, min(begin + step, N))
            logits = buffer[: rows.stop - begin]
            if own(self.compute, logits.shape[0]):
                product(self.x[rows], self.weight.t(), self.bias, into=logits)
            elif self.bias is None:
                torch.mm(self.x[rows].to(self.acc), self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, self.x[rows].to(self.acc), self.weight.t(), out=logits)
            yield rows, logits

    def in_place(self, logits: Tensor) -> Tensor:
        """Where dlogits go: over the logits. The products round them to the compute dtype, so they
        are written in it where nothing else reads them: half the memory to read, twice."""
        if not self.own or self.compute.itemsize != 2 or self.needs[2]:
            return logits
        return logits.view(self.compute)[:, : logits.shape[1]]

    def add_gradients(self, rows: slice, dlogits: Tensor) -> None:
        """dx of these rows, and their part of dweight and dbias."""
        if self.dx is not None:
            if self.own:
                product(dlogits, self.weight, compute=self.compute, into=self.dx[rows])
            else:
                torch.mm(dlogits, self.weight, out=self.dx[rows])
        if self.dweight is not None:
            if self.own:
                product(
                    dlogits.t(), self.x[rows], compute=self.compute, into=self.dweight,
                    add=not self.first,
                )  # fmt: skip
            else:
                torch.addmm(
                    self.dweight, dlogits.t(), self.x[rows].to(self.acc),
                    beta=0 if self.first else 1, out=self.dweight,
                )  # fmt: skip
        if self.needs[2]:
            part = sum_rows(dlogits, self.acc)
            self.dbias = part if self.dbias is None else self.dbias.add_(part)
        self.first = False

    def gradients(
        self, weight_dtype: torch.dtype, bias_dtype: torch.dtype | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dx, dweight, dbias), the sums rounded once."""
        return (
            None if self.dx is None else self.dx.to(self.compute),
            None if self.dweight is None else self.dweight.to(weight_dtype),
            None if self.dbias is None or bias_dtype is None else self.dbias.to(bias_dtype),
        )
