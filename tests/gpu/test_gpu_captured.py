"""Activations of a model that was trained for a while: what each op meets in earnest."""

import functools

import pytest
import torch
from on_device import DEVICE, DRY, DTYPES, MARKS

import gptk
from benchmarks.gpu import equivalence, shapes
from benchmarks.gpu.training import text
from gptk.model import GPTConfig
from gptk.nn import MLP

pytestmark = MARKS
CONFIG = GPTConfig(8, 256, 1, 2, 8) if DRY else GPTConfig(512, 256, 4, 12, 768)
STEPS = 2 if DRY else 40


@functools.cache
def captured():
    """op -> keyword arguments in float32, from the last block of a GPT after STEPS updates."""
    torch.manual_seed(0)
    model = gptk.GPT(CONFIG, backend="torch").to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = text(2 if DRY else 4, CONFIG.block_size, STEPS, DEVICE)
    for batch in batches:
        optimizer.zero_grad()
        model(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
    block, seen = model.h[-1], {}
    for name, module in {"ln": block.ln_2, "attn": block.attn, "mlp": block.mlp}.items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args}))
    idx, target = batches[-1][:, :-1], batches[-1][:, 1:]
    with torch.no_grad():
        model.ln_f.register_forward_hook(lambda _, args, out: seen.update(ln_f=out[0]))
        logits = model(idx)
    y, x, mlp = seen["attn"][0], seen["mlp"][0], block.mlp
    B, T, C = y.shape
    qkv = torch.nn.functional.linear(y, block.attn.c_attn.weight, block.attn.c_attn.bias)
    q, k, v = qkv.view(B, T, 3, CONFIG.n_head, -1).permute(2, 0, 3, 1, 4)
    assert isinstance(mlp, MLP)
    hidden = torch.nn.functional.linear(x, mlp.c_fc.weight, mlp.c_fc.bias)
    products = dict(fc_weight=mlp.c_fc.weight, fc_bias=mlp.c_fc.bias)
    products |= dict(proj_weight=mlp.c_proj.weight, proj_bias=mlp.c_proj.bias)
    norm = dict(weight=block.ln_2.weight, bias=block.ln_2.bias, dropout_p=0.0)
    branch, residual = seen["ln"][:2]
    made = {
        "layer_norm": dict(input=branch, normalized_shape=(C,), residual=residual, **norm),
        "attention": dict(query=q, key=k, value=v, causal=True)
        | dict(scale=None, dropout_p=0.0, enable_gqa=False),
        "gelu": dict(input=hidden, approximate="tanh"),
        "linear": dict(input=x, weight=mlp.c_fc.weight, bias=mlp.c_fc.bias),
        "mlp": dict(input=x, **products),
        "cross_entropy": dict(input=logits.flatten(0, 1), target=target.flatten()),
        "linear_cross_entropy": dict(input=seen["ln_f"].flatten(0, 1), target=target.flatten())
        | dict(linear_weight=model.wte.weight, linear_bias=None)
        | dict(reduction="mean", label_smoothing=0.0),
    }
    return {
        op: {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        for op, values in made.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [op for op in shapes.REAL if op != "adamw"])
def test_captured_activations_match_the_reference(op, dtype):
    values = shapes.convert(captured()[op], shapes.DTYPES[dtype])
    assert all(v.isfinite().all() for v in values.values() if isinstance(v, torch.Tensor))
    found = equivalence.compare(op, values)
    assert [one for one in found if not one.passed] == []
