"""traffic() of the ops' cases.py: the bytes of the tensors themselves, counted one by one."""

import torch

from gptk.ops.adamw import cases as adamw
from gptk.ops.attention import cases as attention
from gptk.ops.layer_norm import cases as layer_norm
from gptk.ops.linear import cases as linear
from gptk.ops.mlp import cases as mlp

BF16 = torch.bfloat16


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_attention():
    case = dict(B=2, H=4, Hkv=2, Tq=5, Tk=7, D=8, Dv=3)
    values = attention.inputs(**case, dtype=BF16)
    q, k, v = (values[name] for name in ("query", "key", "value"))
    out, lse = torch.empty(2, 4, 5, 3, dtype=BF16), torch.empty(2, 4, 5)
    assert attention.traffic(**case, itemsize=2, backward=False) == size(q, k, v, out, lse)
    gradients = size(q, k, v)
    read = size(q, k, v, out, out, lse)
    assert attention.traffic(**case, itemsize=2, backward=True) == read + gradients


def test_layer_norm():
    x = torch.empty(3, 5, dtype=BF16)

    def traffic(backward, **options):
        return layer_norm.traffic((3, 5), itemsize=2, backward=backward, **options)

    assert traffic(False) == size(x, x)  # y
    assert traffic(False, residual=True) == size(x, x, x, x)  # residual, h, y
    assert traffic(True) == size(x, x, x)  # dy, h, dx
    assert traffic(True, residual=True) == size(x, x, x, x)  # dh; dresidual is dx
    assert traffic(True, residual=True, dropout_p=0.1) == size(x, x, x, x, x)


def test_linear_and_its_epilogue():
    case = dict(shape=(2, 5, 7), N=13, activation="gelu")
    values = linear.inputs(**case, dtype=BF16)
    x, w, b = (values[name] for name in ("input", "weight", "bias"))
    y = pre = torch.empty(10, 13, dtype=BF16)
    assert linear.traffic(**case, itemsize=2, backward=False) == size(x, w, b, y, pre)
    assert linear.traffic(**case, itemsize=2, backward=True) == size(y, pre, x, w, x, w, b)
    assert linear.epilogue_traffic(10, 13, 2, False) == size(pre, y)
    assert linear.epilogue_traffic(10, 13, 2, True, need_y=True) == size(y, pre, pre, y)


def test_mlp():
    values = mlp.inputs(shape=(5, 4), hidden=6, out=3, dtype=BF16)
    x = values["input"]
    weights = [values[f"{layer}_{kind}"] for layer in ("fc", "proj") for kind in ("weight", "bias")]
    y, pre = torch.empty(5, 3, dtype=BF16), torch.empty(5, 6, dtype=BF16)
    case = dict(shape=(5, 4), hidden=6, out=3, itemsize=2)
    assert mlp.traffic(**case, backward=False) == size(x, *weights, pre, pre, pre, y)
    read = size(y, x, pre, weights[0], weights[2])
    between = size(pre, pre, pre, pre)  # dpre and act(pre), written and read
    assert mlp.traffic(**case, backward=True) == read + between + size(x, *weights)


def test_adamw():
    values = adamw.inputs(shapes=((5, 7), (3,)), dtype=BF16)
    state = [*values["params"], *values["exp_avgs"], *values["exp_avg_sqs"], *values["masters"]]
    moved = size(*values["grads"], *state, *state)
    assert adamw.traffic(((5, 7), (3,)), grad=2, param=2, state=4, master=True) == moved
