"""`import gptk` loads torch and nothing heavier, and works where the optional parts are missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = ("triton", "tyro", "rich", "tokenizers", "safetensors", "matplotlib", "transformers")
TINY = (
    "--tokenizer=byte --n-layer=1 --n-head=1 --n-embd=16 --block-size=16 --batch-size=2"
    " --max-steps=2"
).split()


def run_python(
    code: str, missing: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new process in which every module of `missing` cannot be imported."""
    # None in sys.modules is Python's own mark for "not importable"; find_spec respects it, too
    hide = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in missing)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, "-c", hide + code],
        env=env,
        text=True,
        capture_output=True,
        check=False,
        timeout=120,
    )


def test_import_loads_torch_and_nothing_heavier():
    names = [*OPTIONAL, "starlette", "uvicorn", "gptk._C", "gptk.cli", "gptk.train", "gptk.text"]
    done = run_python(
        f"import torch\nbefore = set(sys.modules)\nimport gptk\n"
        f"print([n for n in {names} if n in sys.modules and n not in before])\n"
        f"print('torch' in before)"
    )
    assert done.stdout.split("\n")[:2] == ["[]", "True"], done.stdout + done.stderr


def test_a_model_trains_where_nothing_optional_can_be_imported():
    done = run_python(
        "import torch, gptk, gptk.functional, gptk.nn, gptk.optim\n"
        "model = gptk.GPT(gptk.GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1,"
        " n_embd=8))\n"
        "optimizer = gptk.optim.AdamW(model.param_groups(0.1), lr=1e-2)\n"
        "idx = torch.arange(9).reshape(1, 9)\n"
        "losses = []\n"
        "for _ in range(20):\n"
        "    loss = model(idx[:, :-1], idx[:, 1:])\n"
        "    optimizer.zero_grad()\n"
        "    loss.backward()\n"
        "    optimizer.step()\n"
        "    losses.append(loss.item())\n"
        "print(losses[-1] < losses[0] - 0.1)\n",
        missing=(*OPTIONAL, "gptk._C"),
    )
    assert done.stdout.strip() == "True", done.stdout + done.stderr


@pytest.mark.parametrize(
    "backend, missing, remedy",
    [("triton", "triton", "pip install"), ("cpp", "gptk._C", "compiler")],
)
def test_a_named_backend_that_is_missing_raises_with_the_remedy(backend, missing, remedy):
    done = run_python(
        "import torch, gptk, gptk.functional\n"
        "try:\n"
        f"    gptk.functional.gelu(torch.ones(3), backend={backend!r})\n"
        "except gptk.Unsupported as error:\n"
        "    print(error)\n",
        missing=(missing,),
    )
    assert backend in done.stdout, done.stderr
    assert remedy in done.stdout


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_an_op_runs_without_the_extension(backend):
    done = run_python(
        "import torch, gptk, gptk.functional\n"
        f"print(gptk.functional.gelu(torch.zeros(3), backend={backend!r}).tolist())",
        missing=("gptk._C", "triton"),
    )
    assert done.stdout.strip() == "[0.0, 0.0, 0.0]", done.stderr


def test_the_command_line_names_the_remedy_for_a_missing_triton(tmp_path):
    argv = ["gptk", "train", "--backend=triton", f"--out={tmp_path / 'run'}", *TINY]
    done = run_python(
        f"sys.argv = {argv}\nimport gptk.cli\nsys.exit(gptk.cli.main())", missing=("triton",)
    )
    said = done.stdout + done.stderr
    assert done.returncode not in (0, -6, -11), said
    assert "triton" in said
    assert "pip install" in said
    assert "Traceback" not in said


def test_the_command_line_names_the_remedy_for_triton_without_a_gpu(tmp_path):
    argv = ["gptk", "train", "--backend=triton", f"--out={tmp_path / 'run'}", *TINY]
    done = run_python(
        f"sys.argv = {argv}\nimport gptk.cli\nsys.exit(gptk.cli.main())",
        CUDA_VISIBLE_DEVICES="",
        TRITON_INTERPRET="0",
    )
    said = done.stdout + done.stderr
    assert done.returncode not in (0, -6, -11), said
    assert "TRITON_INTERPRET=1" in said
    assert "Traceback" not in said
