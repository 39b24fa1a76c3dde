"""The static roofline: its counter on code with known counts, its stored rows, its guard."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from gptk.aot import findings, lanes, needs, roofline, sass, summary, table, work

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def listing(*lines):
    """Lines as nvdisasm prints them; those that end in a colon are labels."""
    at = [f"/*{16 * n:04x}*/" for n in range(len(lines))]
    return "\n".join(
        line if line.endswith(":") else f"        {at[n]}      {line} ;"
        for n, line in enumerate(lines)
    )


COPY = listing(  # each of 128 threads copies 8 bf16
    "S2R R0, SR_TID.X",
    "S2R R3, SR_CTAID.X",
    "LDC.64 R4, c[0x0][0x210]",
    "IMAD R0, R3, 0x80, R0",
    "IMAD.WIDE R4, R0, 0x10, R4",
    "LDG.E.128 R8, desc[UR4][R4.64]",
    "IMAD.WIDE R6, R0, 0x10, R6",
    "STG.E.128 desc[UR4][R6.64], R8",
    "EXIT",
    ".L_x_0:",
    "BRA `(.L_x_0)",
    "NOP",
)


def test_a_copy_moves_16_bytes_twice_for_8_bf16():
    found = work.unit_work(sass.parse(COPY), "program", warps=4)
    assert (found.loaded, found.stored) == (128 * 16, 128 * 16)
    assert found.counts["instructions"] == 9
    assert found.counts["fp32"] == found.products == 0


LOOP = listing(
    "S2R R0, SR_TID.X",
    "LDC.64 R2, c[0x0][0x210]",
    "LDG.E R9, desc[UR4][R2.64]",  # one number for all threads
    "IMAD.WIDE R4, R0, 0x10, R2",
    "ISETP.GE.AND P0, PT, R9, 0x1, PT",
    "@!P0 BRA `(.L_x_2)",
    ".L_x_1:",
    "@P1 LDG.E.64 R6, desc[UR4][R4.64]",
    "LDGSTS.E.BYPASS.LTC128B.128 [R20+UR8], desc[UR4][R4.64]",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",
    "HMMA.16816.F32.BF16 R24, R4, R8, R24",
    "FFMA R6, R6, R6, R7",
    "FADD R6, R6, R7",
    "MUFU.EX2 R6, R6",
    "F2FP.BF16.F32.PACK_AB R6, R6, R7",
    "STS.128 [R20], R24",
    "SHFL.BFLY PT, R7, R6, 0x1, 0x1f",
    "VIADD R21, R21, 0x80",
    "ISETP.LT.AND P0, PT, R21, R9, PT",
    "@P0 BRA `(.L_x_1)",
    ".L_x_2:",
    "STG.E.U16 desc[UR4][R4.64], R6",
    "EXIT",
)


def test_a_loop_is_counted_once_around():
    found = work.unit_work(sass.parse(LOOP), "loop", warps=8)
    assert (found.loaded, found.stored) == (256 * (8 + 16), 0)
    assert found.products == 2 * 64 * 64 * 16 * 2 + 2 * 16 * 8 * 16 * 8
    assert found.counts == {
        "instructions": 13, "fp32": 2, "fma": 1, "fp64": 0, "mufu": 1, "conversions": 1,
        "shared": 1, "shuffles": 1, "bulk": 0,
    }  # fmt: skip


def test_a_program_passes_its_loops_once_and_shared_addresses_count_once():
    found = work.unit_work(sass.parse(LOOP), "program", warps=8)
    assert (found.loaded, found.stored) == (256 * (8 + 16) + 4, 256 * 2)


def test_a_loop_that_the_compiler_unrolled_counts_as_its_iterations():
    graph = sass.parse(LOOP)
    assert work.unit_work(graph, "loop", 8, step=32).loaded == 256 * (8 + 16) // 4
    assert work.unit_work(graph, "loop", 8, step=128).loaded == 256 * (8 + 16)


NESTED = listing(
    "S2R R0, SR_TID.X",
    "IMAD.WIDE R4, R0, 0x10, R2",
    ".L_x_1:",
    "MOV R8, RZ",
    ".L_x_2:",
    "LDG.E.128 R12, desc[UR4][R4.64]",
    "@P0 BRA `(.L_x_2)",
    ".L_x_3:",
    "LDG.E.64 R12, desc[UR4][R4.64]",
    "STG.E.64 desc[UR4][R4.64], R12",
    "@P1 BRA `(.L_x_3)",
    "@P2 EXIT",
    "BRA `(.L_x_1)",
)


def test_sweeps_are_the_inner_loops_together():
    graph = sass.parse(NESTED)
    assert len(graph.loops) == 3
    found = work.unit_work(graph, "sweeps", warps=1)
    assert (found.loaded, found.stored) == (32 * (16 + 8), 32 * 8)
    assert work.unit_work(graph, "loop", warps=1).loaded in (32 * 16, 32 * 8)


def test_a_wait_for_a_copy_is_no_loop_of_its_own():
    code = listing(
        ".L_x_1:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R6",
        "@!P0 BRA `(.L_x_2)",
        ".L_x_3:",
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24",
        "UTMALDG.2D [UR8], [UR4]",
        "@P1 BRA `(.L_x_1)",
        "EXIT",
        ".L_x_2:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R6",
        "@!P0 BRA `(.L_x_2)",
        "BRA `(.L_x_3)",
    )
    graph = sass.parse(code)
    assert len(graph.loops) == 2
    found = work.unit_work(graph, "loop", warps=8)
    assert found.products == 2 * 64 * 256 * 16 * 2
    assert found.counts["bulk"] == 1


BRANCHES = listing(
    "S2R R0, SR_TID.X",
    "IMAD.WIDE R4, R0, 0x10, R2",
    "@P0 BRA `(.L_x_1)",
    "STG.E.64 desc[UR4][R4.64], RZ",
    "EXIT",
    ".L_x_1:",
    "LDG.E.64 R8, desc[UR4][R4.64]",
    "STG.E.64 desc[UR4][R4.64], R8",
    "EXIT",
)


def test_the_heaviest_way_is_taken():
    found = work.unit_work(sass.parse(BRANCHES), "program", warps=1)
    assert (found.loaded, found.stored) == (32 * 8, 32 * 8)
    assert found.counts["instructions"] == 6


@pytest.mark.parametrize(
    "line,differs",
    [
        ("IADD3 R4, P1, R0, UR4, RZ", True),
        ("LOP3.LUT R4, R3, 0x7f, RZ, 0xc0, !PT", False),
        ("F2F.F32.F64 R3, UR4", False),  # writes one register: R4 is not touched
        ("CS2R R4, SRZ", False),
        ("SHFL.BFLY PT, R4, R0, 0x1, 0x1f", True),
        ("@P0 MOV R4, R3", True),  # P0 differs
        ("LDS R4, [UR4]", False),
        ("LDS R4, [R0]", True),
    ],
)
def test_what_differs_between_threads(line, differs):
    code = sass.parse(listing("S2R R0, SR_TID.X", "ISETP.GE.AND P0, PT, R0, 0x7, PT", line))
    state = 0
    for one in code.code(code.blocks):
        state = lanes.step(one, state)
    assert bool(state >> 4 & 1) is differs


@pytest.mark.parametrize(
    "line,words",
    [
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10]", "does not say its shape"),
        ("BRX R2 -0x10", "a branch to an address that is computed"),
    ],
)
def test_what_cannot_be_counted_is_said(line, words):
    with pytest.raises(ValueError, match=words):
        work.unit_work(sass.parse(listing(line, "EXIT")), "program", warps=4)


def test_a_kernel_that_cannot_be_counted_has_a_row_that_says_so():
    code = listing("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10]", "EXIT")
    arguments = {"BLOCK": 1024, "x_ptr": needs.Array((4096,), 2)}
    row = roofline.row("gelu none bf16", "gelu_forward_kernel", code, 4, arguments)
    assert "does not say its shape" in row["not_counted"]
    new = roofline.row("new", "new_kernel", code, 4, arguments)
    assert "needs.py" in new["not_counted"]


def test_beside_a_bulk_copy_no_bytes_are_compared():
    code = listing("UTMALDG.2D [UR8], [UR4]", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8]", "EXIT")
    done = work.unit_work(sass.parse(code), "program", warps=4)
    need = needs.Need("program", 64 * 64, 4096, products=2 * 64 * 64 * 16)
    row = roofline.compared(need, 1, done, warps=4)
    assert (row["bytes_ratio"], row["products_ratio"]) == (None, 1.0)
    assert "tma" in roofline.cells(row | {"case": "a", "kernel": "k", "unit": "program"})


def test_the_bound_is_the_slowest_resource():
    need = needs.Need("loop", 128 * 64, 16384, products=4 * 128 * 64 * 64, dram=1 / 32)
    counts = dict.fromkeys(work.KINDS, 0)
    done = work.Work(16384, 0, 4 * 128 * 64 * 64, counts | {"instructions": 100, "mufu": 34})
    row = roofline.compared(need, 1, done, warps=8)
    assert (row["bytes_ratio"], row["products_ratio"]) == (1.0, 1.0)
    assert row["clocks"]["tensor"] == pytest.approx(512, rel=1e-3)
    assert row["clocks"]["mufu"] == 34 * 256 / 16
    assert row["bound"] == "mufu"
    assert row["at_most"] == pytest.approx(512 / 544, abs=1e-3)


# ---- live -----------------------------------------------------------------------------------

LIVE = """
import json, sys
import torch, triton, triton.language as tl
from gptk.aot import roofline, sass, work
from gptk.aot.__main__ import main
from gptk.aot.compile import compiling

@triton.jit
def copy(y_ptr, x_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))

x = torch.zeros(4096, dtype=torch.bfloat16)
with compiling(90) as made:
    copy[(4,)](torch.empty_like(x), x, BLOCK=1024, num_warps=4)
found = work.unit_work(sass.parse(made[0].sass), "program", 4)
print(json.dumps([found.loaded, found.stored]))
flags = ["--roofline", "--jobs", "1", "--quiet", "--compare", sys.argv[1]]
sys.exit(main([*flags, "--case", "gelu tanh bf16"]))
"""


def test_a_copy_and_a_kernel_compiled_now_are_as_stored(tmp_path):
    script = tmp_path / "live.py"
    script.write_text(LIVE)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(script), str(RESULTS / "roofline.json")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[0]) == [2 * 1024, 2 * 1024]
    assert "2 kernels compiled, 0 faults" in done.stdout
    assert "not compared" not in done.stdout, "store the table with this triton: make aot"


# ---- what is stored -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored():
    return roofline.read(RESULTS / "roofline.json")["rows"]


def test_every_kernel_that_ships_is_in_the_roofline(stored):
    rows = table.read(RESULTS / "aot.json")["rows"]
    shipped = {(r["case"], r["kernel"]) for r in rows if r["arch"] == roofline.ARCH}
    assert {roofline.key(row) for row in stored} == shipped, "make aot stores both"


def test_every_kernel_is_counted_but_those_of_single_numbers(stored):
    reasons = {r["kernel"]: r["not_counted"] for r in stored if "not_counted" in r}
    assert set(reasons) == needs.SCALARS, f"{reasons}: see gptk/aot/needs.py"


def test_every_outlier_is_explained_and_every_explanation_is_needed(stored):
    rows = roofline.counted(stored)
    unknown = [
        f"{row['case']}, {row['kernel']}: {of} {row.get(f'{of}_ratio', row['at_most'])}"
        for row, of in findings.outliers(rows)
        if findings.finding(row, of) is None
    ]
    assert unknown == [], "mend the kernel, or say in gptk/aot/findings.py why"
    assert set(findings.explained(rows)) == set(findings.FINDINGS)


def test_no_kernel_moves_less_than_it_needs(stored):
    """A ratio below one is a wrong count, or a wrong need."""
    for row in roofline.counted(stored):
        assert (row["bytes_ratio"] or 1) >= 0.999, roofline.key(row)
        assert (row["products_ratio"] or 1) >= 0.999, roofline.key(row)
        assert 0 < row["at_most"] <= 1, roofline.key(row)


ROW = {
    "case": "a", "kernel": "k", "bytes_ratio": 1.0, "products_ratio": None,
    "per_element": {"instructions": 20.0},
}  # fmt: skip


@pytest.mark.parametrize(
    "change,words",
    [
        ({"bytes_ratio": 2.0}, "bytes 1.00 -> 2.00 times what is needed"),
        ({"products_ratio": 1.5}, "products 0.00 -> 1.50 times"),
        ({"per_element": {"instructions": 30.0}}, "instructions for an element 20.0 -> 30.0"),
        ({"case": "b"}, "not in the stored roofline"),
        ({"not_counted": "hides"}, "was counted, but now hides"),
    ],
)
def test_a_loss_is_said_with_both_numbers(change, words):
    assert roofline.losses([ROW], [ROW]) == []
    assert roofline.losses([ROW | {"bytes_ratio": 1.5}], [ROW]) == []
    said = roofline.losses([ROW], [ROW | change])
    assert len(said) == 1
    assert words in said[0]


def test_a_file_that_is_no_roofline_is_refused(tmp_path):
    path = tmp_path / "roofline.json"
    path.write_text('{"rows": [{}]}')
    with pytest.raises(roofline.UsageError, match="cannot be read as a roofline"):
        roofline.read(path)


def test_the_stored_summary_is_that_of_the_stored_table():
    made = summary.table(table.read(RESULTS / "aot.json"))
    kept = (RESULTS / "aot.md").read_text("utf-8")
    assert kept == made, "python -m gptk.aot --summary > benchmarks/results/aot.md"


def test_a_summary_shows_the_worst_case_of_each_kernel():
    row = {"kernel": "k_kernel", "occupancy": 0.5, "registers": 64, "spills": 0}
    row |= {"wgmma": 2, "tcgen05": 0, "mma": 0, "arch": 90}
    worse = row | {"case": "op D 128 bf16", "occupancy": 0.25, "mma": 4, "registers": 200}
    rows = [row | {"case": "op D 64 bf16"}, worse, row | {"case": "op fp32", "wgmma": 0}]
    rows += [rows[2] | {"case": "op fp16"}]
    text = summary.table({"triton": "3", "rows": rows})
    assert "| `k` | bf16 | 200 regs, 25%, wgmma, mma |" in text
    assert "| `k` | fp32 fp16 | 64 regs, 50% |" in text
    assert "0 of 4 spill" in text
