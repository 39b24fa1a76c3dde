"""The kernels that ship, compiled for GPUs without a GPU: none spills, none got worse than stored.

`make aot` stores the table in benchmarks/results/aot.json, and roofline.json beside it, which the
same compilation for sm_90 is compared with. All cases are compiled again where a kernel, a launcher
or a configuration is not what the table was made from; a sample of them otherwise.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from gptk.aot import cubin, table

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "benchmarks" / "results" / "aot.json"
ROW = {
    "arch": 90, "case": "attention", "kernel": "forward", "warps": 8, "stages": 2, "registers": 128,
    "stack": 0, "spills": 0, "shared": 65536, "occupancy": 0.25, "seconds": 1.0, "tma": 0,
    "instructions": 900, "wgmma": 16, "tcgen05": 0, "mma": 0, "load128": 10, "load": 10,
    "store128": 4, "store": 0,
}  # fmt: skip


def run(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "gptk.aot", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", table.ARCHITECTURES)
def test_no_kernel_that_ships_spills_or_got_worse(arch):
    known = table.read(STORED).get("sources") == table.sources()
    sample = [word for case in SAMPLE for word in ("--case", case)] if known else []
    done = run("--arch", str(arch), "--compare", str(STORED), "--quiet", "--jobs", "1", *sample)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not compared" not in done.stdout, "store the table with this triton: make aot"


SAMPLE = (
    "attention D 64 causal bf16",
    "attention D 128 packed, 4 heads share k, v bf16",
    "attention D 128 decode, 4 heads share k, v bf16",
    "layer_norm N 768 residual dropout bf16",
    "gelu tanh bf16",
    "mlp gelu N 3072 bf16",
    " V 50304 bf16",
    "adamw fp32 masters bf16",
)


def test_a_table_is_known_by_what_it_is_made_from(tmp_path):
    kernel, other = tmp_path / "ops" / "x" / "triton_impl.py", tmp_path / "ops" / "x" / "y.py"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("1")
    other.write_text("1")
    before = table.sources(tmp_path)
    other.write_text("2")
    assert table.sources(tmp_path) == before
    for name in ("triton_impl.py", "triton_new.py", "tuning.json"):
        (kernel.parent / name).write_text("2")
        assert table.sources(tmp_path) != before
        before = table.sources(tmp_path)


def test_a_rare_configuration_may_spill_outside_its_loop_and_not_in_it():
    assert table.faults([ROW | {"spills": 9, "stack": 8, "loop_spills": 0}]) == []
    assert "2 accesses" in table.faults([ROW | {"spills": 2, "stack": 8, "loop_spills": 2}])[0]
    done = run(
        "--rare",
        "--arch",
        "90",
        "--case",
        "attention D 192 packed, 4 heads share k, v bf16",
        "--jobs",
        "1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attention_dkdv_kernel" in done.stdout
    assert run("--rare", "--json", "x.json").returncode == 2


SPILLS = """
.L_x_0:
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0010*/                   {} ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   {} ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
"""


@pytest.mark.parametrize("inside, outside", [(1, 0), (0, 1)])
def test_spills_of_the_loop_with_the_products_are_counted(inside, outside):
    from gptk.aot.rare import spills_in_loop

    code = ["IADD3 R1, R1, R2, RZ", "LDL R3, [R1]"]
    assert spills_in_loop(SPILLS.format(code[inside], code[outside])) == inside


def test_every_kernel_that_ships_is_stored():
    from gptk.aot.shipping import cases

    stored = table.read(STORED)
    assert table.faults(stored["rows"]) == []
    assert {row["case"] for row in stored["rows"]} == set(cases())
    assert {row["arch"] for row in stored["rows"]} == set(table.ARCHITECTURES)
    products = [r for r in stored["rows"] if r["kernel"] in ATTENTION_PRODUCTS]
    assert products
    for row in products:
        half = row["case"].endswith(("bf16", "fp16"))
        if half and row["arch"] == 90 and "D 256" not in row["case"]:
            assert row["wgmma"], table.place(row)
        elif half:
            # at 256, accumulators of wgmma's 64 rows leave dk and dv no registers
            assert row["mma"] or row["wgmma"] or row["tcgen05"], table.place(row)


ATTENTION_PRODUCTS = ("attention_forward_kernel", "attention_dq_kernel", "attention_dkdv_kernel")


def test_every_triton_kernel_ships():
    """Each @triton.jit function that is launched is in the table."""
    import re

    defined = set()
    for path in (ROOT / "gptk" / "ops").rglob("triton_*.py"):
        defined |= set(re.findall(r"^def _?(\w+_kernel)\(", path.read_text("utf-8"), re.MULTILINE))
    assert defined == {row["kernel"] for row in table.read(STORED)["rows"]}


@pytest.mark.parametrize(
    "change,words",
    [
        ({"wgmma": 0, "mma": 64}, "wgmma instructions 16 -> 0"),
        ({"load128": 5, "load": 15}, "loads of 128 bits 50% -> 25%"),
        ({"store128": 0, "store": 16}, "stores of 128 bits 100% -> 0%"),
        ({"occupancy": 0.125}, "occupancy 25% -> 12%"),
        ({"case": "new"}, "not in the stored table"),
    ],
)
def test_a_loss_is_said_with_both_numbers(change, words):
    assert table.losses([ROW], [ROW]) == []
    said = table.losses([ROW], [ROW | change])
    assert len(said) == 1
    assert words in said[0]


def test_a_gain_is_no_loss():
    better = {"occupancy": 0.5, "load128": 20, "load": 0, "tcgen05": 4, "registers": 100}
    assert table.losses([ROW], [ROW | better]) == []


def test_faults():
    assert table.faults([ROW]) == []
    assert "3 accesses of local memory" in table.faults([ROW | {"spills": 3}])[0]
    assert "8 bytes of stack" in table.faults([ROW | {"stack": 8}])[0]
    assert "no block fits" in table.faults([ROW | {"occupancy": 0.0}])[0]


@pytest.mark.parametrize(
    "arch,warps,registers,shared,expected",
    [
        (80, 4, 255, 0, 8 / 64),  # 8192 registers a warp: 8 warps
        (80, 4, 32, 0, 1.0),  # 16 blocks of 4 warps
        (80, 1, 32, 0, 0.5),  # 32 blocks at most
        (80, 8, 64, 48 * 1024, 24 / 64),  # 3 x 49 KiB of 164
        (90, 8, 64, 48 * 1024, 32 / 64),  # 4 x 49 KiB of 228
        (90, 4, 128, 227 * 1024, 4 / 64),
        (90, 4, 128, 228 * 1024, 0.0),
        (80, 4, 33, 0, 48 / 64),  # 33 registers count as 40: 51 warps, 12 blocks
    ],
)
def test_occupancy(arch, warps, registers, shared, expected):
    assert cubin.occupancy(arch, warps, registers, shared) == expected


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR8][R4.64] ;
        /*0030*/                   LDG.E.U16 R5, desc[UR4][R2.64] ;
        /*0040*/              @P1  STG.E.64 desc[UR4][R2.64], R8 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/                   HMMA.16816.F32.BF16 R24, R4, R8, R24 ;
        /*0070*/                   STL [R1], R2 ;
        /*0080*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0090*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10] ;
"""


def test_instructions_are_counted():
    assert cubin.count(SASS) == {
        "instructions": 10, "local": 1, "load128": 2, "load": 1, "store128": 0, "store": 1,
        "tma": 1, "wgmma": 1, "mma": 1, "tcgen05": 1,
    }  # fmt: skip


def test_says_what_is_wrong_with_its_arguments(tmp_path):
    assert "no case has 'nonsense'" in run("--case", "nonsense").stderr
    assert "no folder" in run("--case", "gelu", "--json", str(tmp_path / "a" / "b")).stderr
    missing = run("--case", "gelu none bf16", "--compare", str(tmp_path / "none.json"))
    assert missing.returncode == 2
    assert "cannot be read" in missing.stderr
