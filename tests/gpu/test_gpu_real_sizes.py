"""GPT-2 124M, 1.5B and Llama 8B sizes on the GPU: errors within their bounds, also of inputs x5."""

import pytest
from on_device import DEVICE, DRY, DTYPES, MARKS

from benchmarks.gpu import equivalence, shapes
from gptk.bench import gate

pytestmark = MARKS
SIZES = [
    (op, case) for op in shapes.REAL if op != "adamw" for case in shapes.case_names(op, dry=DRY)
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 5.0], ids=["x1", "x5"])
@pytest.mark.parametrize("op, case", SIZES)
def test_outputs_and_gradients_match_the_reference(op, case, scale, dtype):
    values = shapes.inputs(op, case, shapes.DTYPES[dtype], DEVICE, DRY, scale)
    found = equivalence.compare(op, values)
    assert [one for one in found if not one.passed] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op, case", [(op, case) for op, case in SIZES if case == "gpt2"])
def test_wrong_answers_are_rejected(op, case, dtype):
    kind = shapes.DTYPES[dtype]
    known = equivalence.answers(op, shapes.inputs(op, case, kind, DEVICE, DRY))
    rejected = 0
    for i, truth in enumerate(known.truth):
        for name, wrong in equivalence.wrong(truth).items():
            if gate.error(wrong, truth) <= 2.0**-6 * (1.0 + gate.magnitude([truth])):
                continue  # the wrong answer is nearly the right one: a gradient of a mean, say
            given = [y.to(kind) for y in known.truth]
            given[i] = wrong.to(kind)
            assert not equivalence.judge(known, given)[i].passed, (known.names[i], name)
            rejected += 1
    assert rejected >= 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op, case", [("adamw", "gpt2")])
def test_an_update_matches_the_reference(op, case, dtype):
    values = shapes.inputs(op, case, shapes.DTYPES[dtype], DEVICE, DRY)
    found = equivalence.compare_adamw(values)
    assert [one for one in found if not one.passed] == []
