"""gelu as a custom op (see gptk/ops/compiled.py)."""

from torch import Tensor

from gptk.ops.compiled import custom_op, differentiable
from gptk.ops.contract import implementation
from gptk.ops.tensors import readable


def gelu(input: Tensor, approximate: str, backend: str) -> Tensor:
    return implementation("gelu", backend).forward(readable(input), approximate)


def gelu_fake(input: Tensor, approximate: str, backend: str) -> Tensor:
    return input.new_empty(input.shape)


def gelu_backward(
    dy: Tensor, input: Tensor, approximate: str, backend: str, needs: list[bool]
) -> list[Tensor]:
    impl = implementation("gelu", backend)
    return [impl.backward(readable(dy), readable(input), approximate)]


def gelu_backward_fake(
    dy: Tensor, input: Tensor, approximate: str, backend: str, needs: list[bool]
) -> list[Tensor]:
    return [input.new_empty(input.shape)]


op = differentiable(
    custom_op(gelu, gelu_fake),
    custom_op(gelu_backward, gelu_backward_fake),
    inputs=(0,),
    given=lambda inputs, outputs: inputs,
)
