"""The kernels' machine code for GPUs that need not be there, and what reads it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the benchmarks are not installed

from benchmarks import amdgcn, counts, gpu_model, machine_code, sass, slow_path
from benchmarks.ahead_of_time import Call
from benchmarks.report import BenchmarkError

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
VOCAB = 50_257


def run(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: Triton decides when it is imported whether it compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def read_code(folder: Path, *arguments: str) -> dict[str, Any]:
    run("-m", "benchmarks.machine_code", "--dump", str(folder), "--slow-share", "0.01", *arguments)
    return json.loads((folder / "machine_code.json").read_text())


# ---- the kernels of this package -------------------------------------------------------------------------------------


@needs_triton
def test_the_code_for_an_h100_is_within_its_budget(tmp_path: Path) -> None:
    found = read_code(tmp_path, "--target", "sm_90", "--dtype", "bf16", "--vocab", str(VOCAB), "--k", "20")
    prsl = found["implementations"]["prsl"]
    fast = [kernel for kernel in prsl["kernels"] if not kernel["slow"]]
    for kernel in fast:
        assert not kernel["spills"], kernel["kernel"]
        assert kernel["stack_bytes"] == kernel["local_bytes"] == 0, kernel["kernel"]
        assert not kernel["not_followed"], kernel["kernel"]
    assert prsl["narrow_accesses"] == []
    streams = [loop for kernel in fast for loop in kernel["loops"] if loop["role"] == "stream"]
    assert len(streams) == 2  # one sweep forward, one backward
    assert [one["access"] for loop in streams for one in loop["accesses"]] == ["load", "load", "store"]
    assert all(one["bytes"] == 16 for loop in streams for one in loop["accesses"])
    # Every thread loads classes of its own, so that what it loads are elements.
    for kernel in fast:
        for loop in kernel["loops"]:
            if loop["role"] == "stream":
                tile = math.prod(kernel["options"][name] for name in ("UNROLL", "LANES", "VEC"))
                assert loop["elements"] * kernel["threads"] == tile
    assert prsl["per_element"]["longest_path"] <= machine_code.BUDGET
    assert 8 <= prsl["per_element"]["instructions"] <= prsl["per_element"]["longest_path"]
    assert prsl["per_element"]["bytes_loaded"] + prsl["per_element"]["bytes_stored"] == 6
    # A group's number is in the low bits of its maximum, which is subnormal where that is 0: it must not be flushed.
    (scan,) = tmp_path.glob("*scan_kernel.ptx")
    comparisons = re.findall(r"\b(?:min|max|setp)\.\S*f32", scan.read_text())
    assert comparisons
    assert not any("ftz" in one for one in comparisons)
    # What is written down is what was read.
    slow = [kernel for kernel in prsl["kernels"] if kernel["slow"]]
    assert slow
    assert all(kernel["file"].endswith("_slow") == kernel["slow"] for kernel in prsl["kernels"])
    assert {path.stem for path in tmp_path.glob("*.cubin")} == {kernel["file"] for kernel in prsl["kernels"]}
    assert {path.stem for path in tmp_path.glob("*.ptx")} == {kernel["file"] for kernel in prsl["kernels"]}
    assert {result["label"] for result in prsl["modelled"]} == {"modelled"}


@needs_triton
@pytest.mark.parametrize(
    ("target", "dtype", "k"),
    [("sm_80", "bf16", 20), ("sm_100", "bf16", 20), ("sm_90", "fp32", 20), ("sm_90", "fp16", 100)],
)
def test_no_spills_and_wide_accesses_elsewhere(tmp_path: Path, target: str, dtype: str, k: int) -> None:
    found = read_code(tmp_path, "--target", target, "--dtype", dtype, "--k", str(k))
    prsl = found["implementations"]["prsl"]
    assert prsl["spills"] == []
    assert prsl["narrow_accesses"] == []
    assert prsl["per_element"]["longest_path"] <= machine_code.BUDGET


@needs_triton
def test_the_code_for_amd_can_be_compiled_and_read(tmp_path: Path) -> None:
    found = read_code(tmp_path, "--target", "gfx942")
    prsl = found["implementations"]["prsl"]
    assert prsl["spills"] == []
    assert prsl["narrow_accesses"] == []
    assert all(kernel["resources"]["vgprs"] > 0 for kernel in prsl["kernels"])
    assert prsl["modelled"] == []
    for kernel in prsl["kernels"]:
        assert (tmp_path / f"{kernel['file']}.amdgcn").is_file()
        assert (tmp_path / f"{kernel['file']}.hsaco").read_bytes().startswith(b"\x7fELF")


@needs_triton
def test_another_library_is_counted_alike_or_left_out(tmp_path: Path) -> None:
    found = read_code(tmp_path, "--no-prsl", "--peers", "liger")
    if find_spec("liger_kernel") is None:
        assert found["implementations"] == {}
        assert "pip install liger-kernel" in found["left_out"]["liger"]
        pytest.skip("Liger-Kernel is not installed")
    liger = found["implementations"]["liger"]
    assert liger["narrow_accesses"]  # its rows of 50,257 are not aligned
    assert liger["per_element"]["instructions"] > machine_code.BUDGET


# ---- what reads it can tell good from bad ----------------------------------------------------------------------------

KERNELS = """
import json, sys
from pathlib import Path
import torch, triton
import triton.language as tl
from benchmarks import ahead_of_time, machine_code

@triton.jit
def stream(z, out, classes, TILE: tl.constexpr):
    total = tl.zeros((TILE,), tl.float32)
    for start in range(0, classes, TILE):
        total += tl.exp2(tl.load(z + start + tl.arange(0, TILE)).to(tl.float32))
    tl.store(out, tl.sum(total, 0))

@triton.jit
def crowded(z, out, classes, TILE: tl.constexpr, KEEP: tl.constexpr):
    best = ()
    for _ in tl.static_range(KEEP):
        best = best + (tl.full((TILE,), 0.0, tl.float32),)
    for start in range(0, classes, TILE):
        value = tl.load(z + start + tl.arange(0, TILE)).to(tl.float32)
        kept = ()
        for i in tl.static_range(KEEP):
            kept = kept + (tl.maximum(best[i], value),)
            value = tl.minimum(best[i], value)
        best = kept
    for i in tl.static_range(KEEP):
        tl.store(out + i * TILE + tl.arange(0, TILE), best[i])

folder = Path(sys.argv[1])
target = ahead_of_time.gpu_target("sm_90")
call = ahead_of_time.Call("bf16", 4096, 20, 16)
z = torch.empty(16, 8192, dtype=torch.bfloat16, device="meta")
out = torch.empty(65536, device="meta")
compiled = {}
with ahead_of_time.pretending(target):
    for name, kernel, source, options in (
        ("wide", stream, z, {"TILE": 1024, "num_warps": 4}),
        ("narrow", stream, MISALIGNED, {"TILE": 1024, "num_warps": 4}),
        ("spilling", crowded, z, {"TILE": 2048, "KEEP": 3, "num_warps": 4, "maxnreg": 32}),
    ):
        made = kernel.warmup(source, out, 4096, grid=(16,), **options)
        compiled[name] = ahead_of_time.describe(made, (16,), slow=False, options=options)
found = {}
for name, one in compiled.items():
    kernels = machine_code.analyse([one], call, folder, "sm_90")
    found[name] = machine_code.summarize(kernels, call, "sm_90", 0.0)
print(json.dumps(found))
"""
# A pointer that Triton takes for one that is no multiple of 16.
MISALIGNED = "type('Odd', (), {'dtype': torch.bfloat16, 'data_ptr': lambda self: 2})()"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    folder = tmp_path_factory.mktemp("small")
    script = folder / "kernels.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + KERNELS.replace("MISALIGNED", MISALIGNED))
    return folder, json.loads(run(str(script), str(folder)).stdout)


def test_a_loop_with_wide_loads(small: tuple[Path, dict[str, Any]]) -> None:
    wide = small[1]["wide"]
    (kernel,) = wide["kernels"]
    (loop,) = [loop for loop in kernel["loops"] if loop["role"] == "stream"]
    assert {(one["access"], one["bytes"]) for one in loop["accesses"]} == {("load", 16)}
    assert loop["elements"] % 8 == 0
    assert loop["by_opcode"]["MUFU.EX2"] == loop["elements"]
    assert loop["per_element"] == pytest.approx(
        {"instructions": loop["instructions"] / loop["elements"], "bytes_loaded": 2, "bytes_stored": 0}
    )
    assert loop["instructions"] == sum(loop["by_pipe"].values()) == sum(loop["by_kind"].values())
    assert wide["spills"] == wide["narrow_accesses"] == []


def test_narrow_accesses_are_reported(small: tuple[Path, dict[str, Any]]) -> None:
    narrow = small[1]["narrow"]
    assert narrow["narrow_accesses"]
    assert all("load of 2 bytes" in text for text in narrow["narrow_accesses"])
    assert narrow["per_element"]["instructions"] > small[1]["wide"]["per_element"]["instructions"]


def test_spills_are_reported(small: tuple[Path, dict[str, Any]]) -> None:
    spilling = small[1]["spilling"]
    assert spilling["spills"] == ["crowded"]
    (kernel,) = spilling["kernels"]
    assert kernel["local_memory"]["loads"] > 0
    assert kernel["local_memory"]["stores"] > 0
    assert kernel["stack_bytes"] > 0


def test_a_library_is_read_like_a_compiled_kernel(small: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, found = small
    arguments = ("--no-prsl", "--cuda-library", str(folder / "0_stream.cubin"), "--dtype", "bf16", "--vocab", "4096")
    library = read_code(tmp_path, *arguments)["implementations"]["cuda-library"]
    # The last one of this name that was written.
    assert library["per_element"] == found["narrow"]["per_element"]
    assert library["kernels"][0]["threads"] == 128  # as its attributes say
    assert library["narrow_accesses"] == found["narrow"]["narrow_accesses"]


LOOPS = """
        code for sm_90
                Function : nested
        /*0000*/                   MOV R0, RZ ;                        /* 0x0 */
                                                                       /* 0x0 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;    /* 0x0 */
        /*0020*/              @!P1 FADD R1, R1, R4 ;                   /* 0x0 */
        /*0030*/               @P0 BRA 0x60 ;                          /* 0x0 */
        /*0040*/                   FMNMX R1, R1, R5, !PT ;             /* 0x0 */
        /*0050*/                   FADD R1, R1, R5 ;                   /* 0x0 */
        /*0060*/                   IADD3 R9, R9, 0x1, RZ ;             /* 0x0 */
        /*0070*/               @P2 BRA 0x60 ;                          /* 0x0 */
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R4 ;    /* 0x0 */
        /*0090*/                   BRA.U !UP0, 0xb0 ;                  /* 0x0 */
        /*00a0*/                   BRA 0x10 ;                          /* 0x0 */
        /*00b0*/                   STG.E.U16 desc[UR4][R2.64], R4 ;    /* 0x0 */
        /*00c0*/                   EXIT ;                              /* 0x0 */
        /*00d0*/                   BRA 0xd0;                           /* 0x0 */
        /*00e0*/                   NOP;                                /* 0x0 */
                Function : entered_by_a_jump
        /*0000*/                   BRA 0x30 ;                          /* 0x0 */
        /*0010*/                   MUFU.EX2 R1, R1 ;                   /* 0x0 */
        /*0020*/              @!P0 EXIT ;                              /* 0x0 */
        /*0030*/                   LDG.E.U16 R1, desc[UR4][R2.64] ;    /* 0x0 */
        /*0040*/                   BRA.DIV UR4, 0x60 ;                 /* 0x0 */
        /*0050*/                   BRA 0x10 ;                          /* 0x0 */
        /*0060*/                   WARPSYNC.COLLECTIVE R5, 0x70 ;      /* 0x0 */
        /*0070*/                   SHFL.BFLY R1, R1, 0x1, 0x1f ;       /* 0x0 */
        /*0080*/                   BRA 0x50 ;                          /* 0x0 */
"""


def test_loops_are_found_by_the_flow_of_control() -> None:
    nested, jumped = sass.parse(LOOPS)
    assert (nested.name, nested.arch, jumped.name) == ("nested", "sm_90", "entered_by_a_jump")
    outer, inner = nested.loops  # not the endless one behind the end
    assert (outer.depth, outer.innermost, inner.depth, inner.innermost) == (0, False, 1, True)
    assert [i.address for i in nested.path(inner)] == [0x60, 0x70]
    # The inner loop's instructions are its own, and the branch around two of the outer one's is not taken.
    assert [i.address for i in nested.path(outer)] == [0x10, 0x20, 0x30, 0x40, 0x50, 0x80, 0x90, 0xA0]
    assert [i.address for i in nested.path(outer, "shortest")] == [0x10, 0x20, 0x30, 0x80, 0x90, 0xA0]
    assert nested.path(outer, "longest") == nested.path(outer)
    assert [i.address for i in nested.outside()] == [0x00, 0xB0, 0xC0]
    (loop,) = jumped.loops
    assert [i.opcode for i in jumped.path(loop)] == ["LDG.E.U16", "BRA.DIV", "BRA", "MUFU.EX2", "EXIT"]
    assert jumped.path(loop, "shortest") == jumped.path(loop)
    assert {"SHFL.BFLY", "MUFU.EX2"} < {i.opcode for i in jumped.path(loop, "longest")}
    counted = counts.count_kernel(nested, element_size=2)
    assert [one["role"] for one in counted["loops"]] == ["stream", "search"]
    assert counted["loops"][0]["elements"] == 8
    assert counts.narrow(counted) == []  # the store of two bytes is in no loop
    assert counted["outside"]["accesses"] == [{"access": "store", "bytes": 2, "count": 1}]
    assert counts.narrow(counts.count_kernel(jumped, 2)) == ["entered_by_a_jump 0x0030: 1 x load of 2 bytes"]


def test_pipes_and_widths() -> None:
    text = [
        "FFMA",
        "IMAD.U32",
        "FMNMX",
        "MUFU.EX2",
        "STS.128",
        "BRA",
        "ULEA.HI.X",
        "F2FP.BF16.F32.PACK_AB",
        "I2F",
        "SOMETHING.NEW",
    ]
    pipes = [sass.Instruction(0, opcode).pipe for opcode in text]
    assert pipes == ["fma", "fma_heavy", "alu", "xu", "lsu", "issue", "issue", "alu", "xu", "alu"]
    widths = {"LDG.E": 4, "LDG.E.64": 8, "LDG.E.U8.CONSTANT": 1, "STG.E.EF.128": 16, "LDGSTS.E.BYPASS.128": 16}
    assert {opcode: sass.Instruction(0, opcode).width for opcode in widths} == widths


AMD = """
kernel:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:
	global_load_dwordx4 v[2:5], v1, s[2:3]
	v_exp_f32_e32 v2, v2
	global_store_short_d16_hi v1, v2, s[2:3]
	s_cbranch_scc1 .LBB0_1
	s_endpgm
.Lfunc_end0:
    .vgpr_count:     12
    .vgpr_spill_count: 3
    .private_segment_fixed_size: 16
"""


def test_amds_assembly_is_read() -> None:
    kernel = amdgcn.parse(AMD, "kernel", "gfx942")
    assert (kernel.registers, kernel.stack) == (12, 16)
    assert amdgcn.resources(AMD)["vgpr_spills"] == 3
    (loop,) = kernel.loops
    accesses = counts.accesses(kernel.body(loop))
    assert [(one["access"], one["bytes"]) for one in accesses] == [("load", 16), ("store", 2)]
    assert sass.count(kernel.path(loop), "pipe") == {"memory": 2, "special function": 1, "scalar": 1}
    assert counts.count_kernel(kernel, 2)["spills"]


# ---- the model -------------------------------------------------------------------------------------------------------


def test_occupancy_is_what_the_limits_allow() -> None:
    h100 = next(chip for chip in gpu_model.CHIPS if chip.arch == "sm_90")
    assert gpu_model.occupancy(h100, 1024, 64, 0) == {
        "blocks": 1,
        "warps": 32,
        "share": 0.5,
        "limited_by": "registers",
    }
    assert gpu_model.occupancy(h100, 256, 32, 0)["share"] == 1
    assert gpu_model.occupancy(h100, 32, 16, 0) | {"share": 0} == {
        "blocks": 32,
        "warps": 32,
        "share": 0,
        "limited_by": "blocks",
    }
    assert gpu_model.occupancy(h100, 128, 33, 0)["blocks"] == 12  # registers come in units of eight per thread
    assert gpu_model.occupancy(h100, 512, 32, 100 * 1024)["limited_by"] == "shared memory"


def test_the_modelled_time_is_that_of_the_busiest_resource() -> None:
    h100 = next(chip for chip in gpu_model.CHIPS if chip.arch == "sm_90")
    rows, row = 1000, 2 * VOCAB
    light = gpu_model.Work("light", 2 * row, {"issue": 20.0 * VOCAB})
    (copy,) = [gpu_model.model(h100, [light], rows, 2 * row)]
    assert copy["share_of_floor"] == 1
    assert copy["kernels"][0]["bound_by"] == "memory"
    # The figure of the design: 38 instructions per element of two bytes, at the peak, are as slow as memory is.
    per_element = 4 / h100.bandwidth * h100.rates["issue"] * h100.sms * h100.clock
    assert 34 < per_element < 40
    heavy = gpu_model.Work("heavy", 2 * row, {"issue": 2 * per_element * VOCAB, "xu": 1.0 * VOCAB})
    slower = gpu_model.model(h100, [light, heavy], rows, 2 * row)
    assert slower["kernels"][1]["bound_by"] == "issue"
    assert slower["kernels"][1]["us"] == pytest.approx(2 * copy["us"] * gpu_model.ACHIEVABLE)
    assert light.scaled(0.5).bytes == row


def test_a_row_that_is_read_again_comes_from_the_cache_or_not() -> None:
    text = LOOPS[: LOOPS.index("                Function : entered")]
    (kernel,) = sass.parse(text)
    counted = counts.count_kernel(kernel, 2)
    twice = counted | {"loops": [counted["loops"][0]] * 2, "threads": 256, "programs_per_row": 1, "shared_bytes": 0}
    h100 = next(chip for chip in gpu_model.CHIPS if chip.arch == "sm_90")
    for vocab, reads in ((1000, 1), (VOCAB, 2)):
        work = machine_code.work_of(twice, Call("bf16", vocab, 20, 8192), h100, rounds=0)
        assert work.bytes == pytest.approx(2 * vocab * (reads + 2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "sm90"], ["--target", "sm90", "gfx"]),
        (["--cuda-library", "nowhere.so", "--no-prsl"], ["--cuda-library", "nowhere.so"]),
        (["--cuda-library", "x", "--target", "gfx942", "--no-prsl"], ["--cuda-library", "sm_90"]),
    ],
)
@needs_triton
def test_errors_name_the_argument(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert machine_code.main(arguments) == 1
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


# ---- the slow path ---------------------------------------------------------------------------------------------------

FORWARD = """
import sys
import torch
from prsl_kernels.backends import triton as backend
logits, target, k = torch.load(sys.argv[1])
torch.save(backend.token_terms(logits, target, None, k, "prob", "l2", -100, 0.0)[-1], sys.argv[2])
"""


@needs_triton
@pytest.mark.parametrize(("dtype", "rows", "k"), [("bf16", 7, 20), ("fp32", 5, 6), ("bf16", 2, 30)])
def test_the_marks_are_those_of_the_kernels(tmp_path: Path, dtype: str, rows: int, k: int) -> None:
    type_ = slow_path.DTYPES[dtype]
    classes = 20_011
    selection = slow_path.Selection.of_kernels(rows, classes, type_, k, processors=1)
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, classes, generator=generator)).to(type_)
    target = torch.randint(classes, (rows,), generator=generator)
    # Of one slot, as many large groups as it keeps, and one less: the last is the last that is harmless.
    stride = selection.vec * selection.slots
    for row, number in ((0, selection.keep), (1, selection.keep - 1)):
        first = -row * classes % selection.vec
        logits[row, [first + 8 + i * stride for i in range(number)]] = 50.0
    if rows > 2:
        logits[2] = 1.0  # ties without end
        logits[3, ::7] = -torch.inf
        logits[4] = -torch.inf
    torch.save((logits, target, k), tmp_path / "in.pt")
    run("-c", FORWARD, str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), interpret=True)
    kernels = torch.load(tmp_path / "out.pt").bool()
    emulated = slow_path.slow_rows(logits, target, k, selection)
    assert emulated.slow.tolist() == kernels.tolist()
    if selection.parts == 1:  # else these groups are not all in one part
        assert kernels[0]
        assert not kernels[1]
        assert emulated.tied[2]
        assert emulated.lowest[4]


@needs_triton
@pytest.mark.parametrize("k", [6, 20, 100])
def test_few_random_rows_are_slow(k: int) -> None:
    share = slow_path.random_share("bf16", VOCAB, k, rows=512)
    assert share <= 0.01 + 3 * math.sqrt(0.01 / 512)


@needs_triton
def test_where_every_row_is_slow_is_said() -> None:
    with pytest.raises(BenchmarkError, match="every row"):
        slow_path.Selection.of_kernels(100, VOCAB, torch.float64, 20)
