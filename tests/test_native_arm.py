"""The row kernels without PyTorch, on this machine and on an emulated Arm, compiled by GCC and by Clang.

On Arm the level "baseline" is NEON code. To run it, nothing but a C++ compiler for it and QEMU's user mode is needed:
on Debian ``apt-get install g++-aarch64-linux-gnu qemu-user``. The program that is compiled, tests/native/rows_main.cpp,
runs here, too, so that a fault of the program is not taken for one of Arm.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import struct
import subprocess
from functools import cache
from itertools import cycle, product
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from prsl_kernels import closed_form, eager

pytestmark = [
    pytest.mark.usefixtures("_single_thread"),
    pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="programs of their own, not sanitized"),
]

ROOT = Path(__file__).resolve().parents[1]
ROWS = "csrc/cpu/rows.cpp"
SOURCES = ["csrc/cpu/dispatch.cpp", "tests/native/rows_main.cpp"]
# As in setup.py.
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-Icsrc"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86_LEVELS = {"baseline": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}

ARM_COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
OLDEST_ARM = "cortex-a53"  # Armv8.0: an instruction of a later one is an illegal one there

INF = torch.inf
IGNORED = -100
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the order of prsl::Dtype
STATS = 6  # prsl::kStats: what backward needs of a row


# ---- problems, and how they travel ----------------------------------------------------------------------------------


class Problem(NamedTuple):
    logits: Tensor  # (N, V)
    target: Tensor
    weight: Tensor | None
    upstream: Tensor  # (2, N): of the cross entropy and of the penalty
    options: dict[str, Any]

    def encode(self) -> bytes:
        o = self.options
        rows, classes = self.logits.shape
        weighted = self.weight is not None
        header = struct.pack(
            "=8q2d",
            *(DTYPES.index(self.logits.dtype), rows, classes, o["k"]),
            *(o["space"] == "log_prob", o["distance"] == "l1", o["ignore_index"], weighted),
            *(o["label_smoothing"], classes if self.weight is None else self.weight.double().sum().item()),
        )
        tensors = [self.logits, self.target, *([] if self.weight is None else [self.weight]), *self.upstream]
        return header + b"".join(raw(tensor) for tensor in tensors)


class Result(NamedTuple):
    cross_entropy: Tensor
    penalty: Tensor
    gradient: Tensor


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def decode(output: bytes, problems: list[Problem]) -> list[Result]:
    at = 0

    def take(dtype: torch.dtype, *shape: int) -> Tensor:
        nonlocal at
        count = torch.Size(shape).numel()
        tensor = torch.frombuffer(bytearray(output[at : at + count * dtype.itemsize]), dtype=dtype)
        at += count * dtype.itemsize
        return tensor.view(shape)

    results = []
    for problem in problems:
        (rows, classes), dtype = problem.logits.shape, problem.logits.dtype
        cross_entropy, penalty, _ = (take(computed_in(dtype), rows, n) for n in (1, 1, STATS))
        results.append(Result(cross_entropy[:, 0], penalty[:, 0], take(dtype, rows, classes)))
    assert at == len(output)
    return results


def computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def hostile(classes: int) -> tuple[Tensor, Tensor]:
    """Rows of logits, in float64, and their targets."""
    random = torch.randn(12, classes, dtype=torch.float64)
    ascending = torch.linspace(-9, 9, classes, dtype=torch.float64)
    z = torch.stack(
        [
            3 * random[0],
            (1.5 * random[1]).round(),  # tied here and there
            random[2].clamp(max=0.5),  # tied for long
            torch.full_like(ascending, 1.5),
            ascending,
            ascending.flip(0),
            30 * random[6],  # some of the exponentials are subnormal, or zero
            1e4 + random[7],
            random[8].masked_fill(torch.rand(classes) < 0.9, -INF),
            random[9].masked_fill(torch.rand(classes) < 0.9, -INF),
            random[10].masked_fill(torch.rand(classes) < 0.1, torch.nan),  # ignored
            3 * random[11],
        ]
    )
    z[8:10, classes // 2] = 0.25  # one at least is finite
    target = torch.randint(classes, (len(z),))
    target[8] = z[8].argmax()  # but that of 9 may be masked
    target[10] = IGNORED
    target[11] = z[11].argmax()
    return z, target


@cache
def problems() -> list[Problem]:
    """All of them, small, so that the emulator needs no time; one row of each dtype is as long as a real one."""
    generated = []
    ranks = cycle([1, 5, 20, 0, 64, 10**9])
    spreads = list(product(("prob", "log_prob"), ("l2", "l1")))
    modes = [(0.0, False), (0.0, True), (0.1, False), (0.1, True)]
    for dtype, classes in product(DTYPES, (2, 5, 16, 33, 64, 129, 1000, 50257)):
        for (space, distance), (smoothing, weighted) in product(spreads, modes):
            z, target = hostile(classes)
            if classes > 1000:
                if (space, smoothing, weighted) != ("prob", 0.1, True) or distance != "l2":
                    continue
                z, target = z[[0, 4]], target[[0, 4]]
            weight = torch.rand(classes, dtype=computed_in(dtype)) if weighted else None
            upstream = torch.randn(2, len(z), dtype=computed_in(dtype))
            options = {"k": min(next(ranks), classes - 1), "space": space, "distance": distance}
            options |= {"ignore_index": IGNORED, "label_smoothing": smoothing}
            generated.append(Problem(z.to(dtype), target, weight, upstream, options))
    return generated


# ---- what is right --------------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    exact: Result  # in float64, of the logits as they are in their own dtype
    allowed: Result  # how far from it each number may be


@cache
def expected() -> list[Expected]:
    return [expect(problem) for problem in problems()]


def expect(problem: Problem) -> Expected:
    """From the definition. The bounds are first-order: a few roundings of each result, and of what it is a sum of."""
    dtype, computed = problem.logits.dtype, torch.finfo(computed_in(problem.logits.dtype))
    z, target, options = problem.logits.double(), problem.target, problem.options
    weight = None if problem.weight is None else problem.weight.double()
    cross_entropy, penalty = eager.token_terms(z, target, weight, **options)
    no, yes = torch.zeros_like(cross_entropy), torch.ones_like(cross_entropy)
    of_cross_entropy = closed_form.token_gradient(z, target, weight, yes, no, **options)
    of_penalty = closed_form.token_gradient(z, target, weight, no, yes, **options)
    u_c, u_d = problem.upstream.double().unsqueeze(-1)
    exact = Result(cross_entropy, penalty, u_c * of_cross_entropy + u_d * of_penalty)

    classes, k, smoothing = z.shape[-1], options["k"], options["label_smoothing"]
    ignored = target == IGNORED
    y = target.masked_fill(ignored, 0).unsqueeze(-1)
    log_p = z.masked_fill(ignored.unsqueeze(-1), 0).log_softmax(-1)
    p, size = log_p.exp(), 1 + log_p.abs().nan_to_num(posinf=0)
    # The roundings of n numbers that are added up grow like the square root of n; there are 8 lanes and more.
    eps = computed.eps * (4 + (classes / 8) ** 0.5)
    w = torch.ones(classes, dtype=torch.float64) if weight is None else weight
    q = (smoothing / classes * w).expand_as(z).scatter_add(-1, y, (1 - smoothing) * w[y])
    lost = 16 * computed.tiny  # what is smaller may be zero, or have fewer digits

    term = eps * (q * size).sum(-1) + lost
    top = p.scatter(-1, y, 0).amax(-1).clamp(min=computed.tiny)
    far = 1 - top.log() if options["space"] == "prob" else torch.ones_like(top)
    distance = eps * far * penalty + lost
    # For each class the sizes of what is added and subtracted.
    gradient = u_c.abs() * (p * q.sum(-1, keepdim=True) + q) * size
    if k > 0:
        parts = of_penalty.abs() + (p * penalty.unsqueeze(-1) if options["space"] == "prob" else 0)
        gradient = gradient + u_d.abs() * parts * (size + far.unsqueeze(-1))
    gradient = eps * gradient + lost
    if dtype != computed_in(dtype):
        stored = torch.finfo(dtype)
        gradient = gradient * 2 + exact.gradient.abs() * stored.eps / 2 + stored.tiny * stored.eps
    return Expected(exact, Result(term, distance, gradient))


def check(got: Result, problem: Problem, expected: Expected) -> None:
    for name, x, exact, allowed in zip(Result._fields, got, *expected, strict=True):
        error = (x.double() - exact).abs()
        right = (error <= allowed) | (x == exact) | (x.isnan() & exact.isnan())
        if not right.all():
            at = [tuple(index) for index in (~right).nonzero().tolist()[:5]]
            found = [(i, x[i].item(), exact[i].item(), allowed[i].item()) for i in at]
            case = (*problem.logits.shape, problem.logits.dtype, problem.options, problem.weight is not None)
            raise AssertionError(f"{name} of {case}: (index, result, exact, allowed) = {found}")
    assert (got.gradient[problem.target == IGNORED] == 0).all()


# ---- programs -------------------------------------------------------------------------------------------------------


def build(compiler: list[str], levels: dict[str, list[str]], folder: Path) -> Path:
    """The program for some levels; skips where the compiler cannot make programs, as for lack of a C++ library."""
    empty = folder / "empty.cpp"
    empty.write_text("#include <cstdio>\nint main() { return 0; }\n")
    program = folder / "rows_main"
    link = [*compiler, "-o", str(program)]
    probe = subprocess.run([*link, str(empty)], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"{shlex.join(compiler)} makes no programs: {probe.stderr.strip()}")
    objects = {str(folder / f"{level}.o"): [f"-DPRSL_LEVEL={level}", *flags] for level, flags in levels.items()}
    with ThreadPool(os.cpu_count()) as pool:
        pool.map(run, [[*compiler, *FLAGS, *flags, "-c", ROWS, "-o", to] for to, flags in objects.items()])
    run([*link, *FLAGS, *["-DPRSL_X86_LEVELS=1"] * (len(levels) > 1), *SOURCES, *objects])
    return program


def run(command: list[str], problems: bytes = b"") -> bytes:
    result = subprocess.run(command, input=problems, capture_output=True, cwd=ROOT)
    assert result.returncode == 0, f"{shlex.join(command)}: {result.stderr.decode(errors='replace')}"
    return result.stdout


def check_level(command: list[str]) -> None:
    output = run(command, b"".join(problem.encode() for problem in problems()))
    for got, problem, exact in zip(decode(output, problems()), problems(), expected(), strict=True):
        check(got, problem, exact)


def found(program: str) -> str:
    return shutil.which(program) or pytest.skip(f"{program} is not installed")


@pytest.mark.parametrize("compiler", ["g++", pytest.param("clang++", marks=pytest.mark.slow)])
def test_this_machine(compiler: str, tmp_path: Path) -> None:
    """Of GCC the lowest level: the others are what the tests of the library run."""
    x86 = platform.machine() == "x86_64" and compiler == "clang++"
    program = build([found(compiler)], X86_LEVELS if x86 else {"baseline": []}, tmp_path)
    for level in run([str(program)]).decode().split():
        check_level([str(program), level])


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is one, and needs no emulator")
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_emulated_arm(compiler: str, tmp_path: Path) -> None:
    cross = found(ARM_COMPILER)  # Clang needs its C++ library, too
    emulator = next(filter(None, map(shutil.which, EMULATORS)), None)
    if emulator is None:
        pytest.skip(f"neither of {', '.join(EMULATORS)} is installed")
    command = [cross] if compiler == "g++" else [found(compiler), "--target=aarch64-linux-gnu"]
    program = build([*command, "-static"], {"baseline": []}, tmp_path)
    check_level([emulator, "-cpu", OLDEST_ARM, str(program), "baseline"])
