"""The CUDA kernels without a GPU: the same source, run by threads of the CPU.

tests/native/stand_in/cuda/device.h says what a run on the CPU shows, and what it cannot. Blocks are small here, since
each of their threads is one of the system.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from itertools import count, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from native_checks import DTYPES, HOSTILE, INF, NAN, SPREADS, Exact, Result, compute_dtype, hostile, same_bits
from torch import Tensor

pytestmark = [
    pytest.mark.usefixtures("_single_thread"),
    pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="programs of their own, with sanitizers"),
]

ROOT = Path(__file__).resolve().parents[1]
MAIN = "tests/native/cuda_rows_main.cpp"
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread"]
FLAGS += ["-Itests/native/stand_in", "-Icsrc"]

IDS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the order of prsl::Dtype
STATS = 6  # prsl::kStats
PLAIN: dict[str, Any] = {"ignore_index": -100, "label_smoothing": 0.0}
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

Run = Callable[..., list["Output"]]


# ---- problems, and how they travel -----------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where rows (N0, N1, V) lie in an array, in units of elements; between them is what nobody may touch."""

    offset: int
    strides: tuple[int, int, int]
    count: int

    @staticmethod
    def of(shape: tuple[int, int, int], offset: int = 0, gap: int = 0, step: int = 1) -> Layout:
        """``gap`` elements between the rows, ``step`` from class to class."""
        row = (shape[2] - 1) * step + 1 + gap
        return Layout(offset, (row * shape[1], row, step), offset + row * shape[0] * shape[1])

    def view(self, array: Tensor, shape: tuple[int, int, int]) -> Tensor:
        return array.as_strided(shape, self.strides, self.offset)

    def encode(self) -> bytes:
        return struct.pack("=5q", self.count, self.offset, *self.strides)


class Problem(NamedTuple):
    """Logits (N, V), or (N0, N1, V) whose rows are in the order of the targets, and how to compute their gradient."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    upstream: Tensor  # (N,), of the loss c + b d
    b: float
    options: dict[str, Any]
    threads: int = 64
    blocks: int = 2
    resident: bool = True
    place: Layout | None = None  # of the logits
    gradient: Layout | None = None
    in_place: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1, *self.logits.shape) if self.logits.dim() == 2 else tuple(self.logits.shape)

    def places(self) -> tuple[Layout, Layout]:
        place = self.place or Layout.of(self.shape)
        return place, place if self.in_place else self.gradient or Layout.of(self.shape)

    def arrays(self) -> tuple[Tensor, Tensor]:
        """What the logits and the gradient lie in, beforehand."""
        dtype, (place, to) = self.logits.dtype, self.places()
        logits = torch.full((place.count,), 7.0, dtype=dtype)
        place.view(logits, self.shape).copy_(self.logits.view(self.shape))
        return logits, logits if self.in_place else torch.full((to.count,), 7.0, dtype=dtype)

    def encode(self) -> bytes:
        o, (place, to) = self.options, self.places()
        weighted = self.weight is not None
        header = struct.pack(
            "=12q",
            *(IDS.index(self.logits.dtype), *self.shape, o["k"], o["space"] == "log_prob", o["distance"] == "l1"),
            *(o["ignore_index"], weighted, self.resident, self.threads, self.blocks),
        )
        header += place.encode() + (struct.pack("=5q", *(0,) * 5) if self.in_place else to.encode())
        total = 0.0 if self.weight is None else self.weight.double().sum().item()
        header += struct.pack("=2d", o["label_smoothing"], total)
        logits, gradient = self.arrays()
        tensors = [logits, *([] if self.in_place else [gradient]), self.target]
        tensors += [*([] if self.weight is None else [self.weight]), self.upstream, self.upstream * self.b]
        return header + b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)


class Output(NamedTuple):
    result: Result
    stats: Tensor  # (N, 6)


def decode(output: bytes, problems: list[Problem]) -> list[Output]:
    at = 0

    def take(dtype: torch.dtype, *shape: int) -> Tensor:
        nonlocal at
        size = torch.Size(shape).numel() * dtype.itemsize
        tensor = torch.frombuffer(bytearray(output[at : at + size]), dtype=dtype)
        at += size
        return tensor.view(shape)

    outputs = []
    for problem in problems:
        dtype, compute, rows = problem.logits.dtype, compute_dtype(problem.logits.dtype), problem.target.numel()
        terms = [take(compute, rows) for _ in range(2)]
        stats = take(compute, rows, STATS)
        to = problem.places()[1]
        array, untouched = take(dtype, to.count), problem.arrays()[1]
        gradient = to.view(array, problem.shape).clone()
        to.view(untouched, problem.shape).copy_(gradient)
        assert same_bits(array, untouched), "something was written between the rows"
        outputs.append(Output(Result(*terms, gradient.reshape(rows, -1)), stats))
    assert at == len(output)
    return outputs


def compile_main(folder: Path, *options: str) -> Path:
    program = folder / "cuda_rows_main"
    subprocess.run(["g++", *FLAGS, *options, MAIN, "-o", str(program)], cwd=ROOT, check=True)
    return program


def compute(command: list[str], problems: list[Problem], **variables: str) -> list[Output]:
    data = b"".join(problem.encode() for problem in problems)
    result = subprocess.run(command, input=data, capture_output=True, env=os.environ | variables, timeout=900)
    assert result.returncode == 0, result.stderr.decode(errors="replace")[-4000:]
    return decode(result.stdout, problems)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    program = compile_main(tmp_path_factory.mktemp("cuda"), "-O2")
    return lambda problems: compute([str(program)], problems)


def check(problems: list[Problem], outputs: list[Output]) -> None:
    """Exact within the bounds of the arithmetic."""
    for problem, (result, _) in zip(problems, outputs, strict=True):
        rows = problem.logits.view(-1, problem.shape[2])
        exact = Exact(rows, problem.target, problem.weight, **problem.options)
        where = f"{tuple(rows.shape)}, {problem.options}, {problem.threads} threads, resident={problem.resident}"
        exact.check(where, result, problem.upstream, problem.b)


def random_problem(
    dtype: torch.dtype, rows: int, width: int, k: int, space: str, distance: str, **changes: Any
) -> Problem:
    target = torch.randint(width, (rows,))
    z = torch.randn(rows, width).to(dtype)
    options = {"k": k, "space": space, "distance": distance, **PLAIN}
    upstream = torch.randn(rows).to(compute_dtype(dtype))
    return Problem(z, target, None, upstream, 0.7, options)._replace(**changes)


# ---- values ----------------------------------------------------------------------------------------------------------


def hostile_problems(dtype: torch.dtype, widths: tuple[int, ...]) -> list[Problem]:
    """Few members of K and many, and rows in shared memory and not, in turn."""
    problems, kinds, turn = [], list(HOSTILE), count()
    for width in widths:
        for k, (space, distance) in product(sorted({min(k, width - 1) for k in (1, 2, 6, 20, width)}), SPREADS):
            at = next(turn)
            few = kinds[at % 4 :: 4]
            target = torch.randint(width, (len(few),))
            z = hostile(few, target, width, k).to(dtype)
            upstream = torch.randn(len(few)).to(compute_dtype(dtype))
            options = {"k": k, "space": space, "distance": distance, **PLAIN}
            problems.append(Problem(z, target, None, upstream, 0.7, options)._replace(resident=at % 3 != 0))
    return problems


@by_dtype
def test_hostile_rows(dtype: torch.dtype, run: Run) -> None:
    problems = hostile_problems(dtype, (2, 17, 130))
    check(problems, run(problems))


@pytest.mark.slow
@by_dtype
@pytest.mark.parametrize("threads", [32, 128, 256])
def test_hostile_rows_in_blocks_of_any_size(threads: int, dtype: torch.dtype, run: Run) -> None:
    """And of lengths at which the candidates are few, and too many."""
    problems = [
        problem._replace(threads=threads)
        for width in (1031, 2100)
        for problem in hostile_problems(dtype, (width,))[threads % 7 :: 7]
    ]
    check(problems, run(problems))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_label_smoothing_and_weights(weighted: bool, smoothing: float, run: Run) -> None:
    """With ignored rows, of which some are NaN."""
    problems = []
    for at, (dtype, width, (b, k)) in enumerate(product(DTYPES, (9, 131), ((0.0, 0), (-0.7, 7)))):
        kinds = list(HOSTILE)[at % 3 :: 3]
        target = torch.randint(width, (len(kinds),))
        ignored = torch.rand(len(kinds)) < 0.2
        z = hostile(kinds, target, width, k).to(dtype)
        target[ignored] = 2**62
        weight = None
        if weighted:
            weight = (3 * torch.rand(width)).to(compute_dtype(dtype))
            weight[::3] = 0
        options: dict[str, Any] = {"k": k, "space": "prob", "distance": "l2"}
        options |= {"ignore_index": 2**62, "label_smoothing": smoothing}
        upstream = torch.randn(len(kinds)).to(compute_dtype(dtype))
        problems.append(Problem(z, target, weight, upstream, b, options)._replace(resident=width == 9))
    check(problems, run(problems))


@pytest.mark.parametrize("classes", [1, 2, 300])
def test_targets_that_are_no_classes(classes: int, run: Run) -> None:
    """Nothing is read through them, and all of the row is NaN; the sanitizers see the rest."""
    k = min(classes - 1, 5)
    weight, target = torch.rand(classes), torch.tensor([-1, 0, classes, 2**31, 2**32, -(2**63), 2**63 - 1, -100])
    problems = []
    for smoothing, resident in product((0.0, 0.1), (False, True)):
        problem = random_problem(torch.float32, len(target), classes, k, "prob", "l2", target=target, weight=weight)
        options = problem.options | {"label_smoothing": smoothing}
        problems.append(problem._replace(options=options, resident=resident))
    for problem, (result, stats) in zip(problems, run(problems), strict=True):
        wrong = torch.tensor([True, False, True, True, True, True, True, False])
        assert torch.equal(result.cross_entropy.isnan(), wrong)
        assert torch.equal(result.penalty.isnan(), wrong & (k > 0))
        assert torch.equal(result.gradient.isnan(), wrong[:, None].expand_as(result.gradient))
        assert (result.gradient[-1] == 0).all()
        assert (stats[-1] == 0).all()
        at = slice(1, 2)
        exact = Exact(problem.logits[at], target[at], weight, **problem.options)
        exact.check("a class", Result(*(x[at] for x in result)), problem.upstream[at], problem.b)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_does_what_it_does_in_cross_entropy(value: float, run: Run) -> None:
    """In every place of a row, by itself and in the target: to this row alone."""
    width = 37
    z = torch.randn(width + 2, width)
    z[torch.arange(width), torch.arange(width)] = value
    z[width] = value
    target = torch.randint(width, (width + 2,))
    target[::7] = torch.arange(0, width + 2, 7).clamp(max=width - 1)
    expected = z.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(expected, target, reduction="none")
    loss.sum().backward()
    assert expected.grad is not None
    ones = torch.ones(len(target))
    problems = [
        Problem(z, target, None, ones, 0.5, {"k": k, "space": space, "distance": distance, **PLAIN}, threads=threads)
        for k, threads, (space, distance) in ((5, 64, SPREADS[0]), (30, 32, SPREADS[1]), (5, 64, SPREADS[2]))
    ]
    for result, _ in run(problems):
        assert torch.equal(result.cross_entropy.isnan(), loss.isnan())
        assert torch.equal(result.cross_entropy.isinf(), loss.isinf())
        assert torch.equal(result.gradient.isnan(), expected.grad.isnan())


def test_extremes_of_float(run: Run) -> None:
    """Up to the largest number, and down to where differences are still numbers in full."""
    z = torch.randn(9, 50, dtype=torch.float64)
    z[0] *= 3e37
    z[1] = torch.where(z[1] > 0, 1e38, -1e38)
    z[2] = z[2].sign() * 65504
    z[3] *= 1e-36
    z[4] = (z[4] > 0) * 1e-30
    z[5] = torch.where(torch.rand(50) < 0.9, -0.0, 0.0)
    z[5, 20:22] = 1.0
    z[6] = z[6].clamp(max=0) * 1e4
    z[7] = -3e38
    z[8] = 3e38
    target = torch.randint(50, (9,))
    problems = [
        Problem(z.to(dtype), target, None, torch.ones(9), 0.7, {"k": k, "space": space, "distance": "l2", **PLAIN})
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for space, k in product(("prob", "log_prob"), (3, 40))
    ]
    finite = [p for p in problems if p.logits.isfinite().all() and p.options["space"] == "prob"]
    outputs = dict(zip(map(id, problems), run(problems), strict=True))
    check(finite, [outputs[id(problem)] for problem in finite])
    for problem in problems:
        (result, stats), rows = outputs[id(problem)], problem.logits.isfinite().all(-1)
        assert not any(x[rows].isnan().any() for x in result), problem.options
        assert stats[rows, 4].isfinite().all(), problem.options  # what backward divides by
        assert not stats[stats[:, 3] == 0, 3].signbit().any(), problem.options  # or it would be either, as it comes


def test_where_there_is_no_penalty_its_gradient_may_be_infinite(run: Run) -> None:
    """As after an overflow in AMP: k = 1, and equal logits."""
    z = torch.cat((torch.randn(3, 20), torch.ones(3, 20)))
    options: dict[str, Any] = {"k": 1, "space": "prob", "distance": "l2", **PLAIN}
    problem = Problem(z, torch.arange(6), None, torch.ones(6), 0.0, options)
    without, infinite = run([problem, problem._replace(b=INF)])
    assert same_bits(without.result.gradient, infinite.result.gradient)


# ---- where the rows lie ----------------------------------------------------------------------------------------------


@by_dtype
def test_rows_start_anywhere(dtype: torch.dtype, run: Run) -> None:
    """At any multiple of an element; the gradient as far from a multiple of 16 bytes, or not."""
    problems, lanes = [], 16 // dtype.itemsize
    for offset, width in product(range(lanes), (5, 3 * lanes + 1, 700)):
        logits = Layout.of((1, 2, width), offset, gap=0)
        for gradient in (logits, Layout.of((1, 2, width), 2 * offset + 1, gap=3)):
            problem = random_problem(dtype, 2, width, 4, "prob", "l2", place=logits, gradient=gradient)
            problems.append(problem._replace(resident=len(problems) % 3 != 0))
    check(problems, run(problems))


@by_dtype
def test_layouts(dtype: torch.dtype, run: Run) -> None:
    """Strides of any kind, for the logits and for the gradient."""
    shape, rows = (3, 2, 70), 6
    layouts = [
        Layout.of(shape, 1, gap=3),
        Layout.of(shape, 0, gap=0, step=3),
        Layout(2, (70, 210, 1), 2 + 420),  # the first two dimensions transposed
        Layout(5, (2, 1, 6), 5 + 420),  # classes before all
    ]
    problems = []
    for place, gradient, resident in product(layouts, layouts, (False, True)):
        z = torch.randn(shape).to(dtype)
        target = torch.randint(70, (rows,))
        upstream = torch.randn(rows).to(compute_dtype(dtype))
        options: dict[str, Any] = {"k": 6, "space": "prob", "distance": "l2", **PLAIN}
        problem = Problem(z, target, None, upstream, 0.7, options, place=place, gradient=gradient)
        problems.append(problem._replace(resident=resident))
    check(problems, run(problems))


@by_dtype
def test_in_place(dtype: torch.dtype, run: Run) -> None:
    """The same bits; what is between the rows stays."""
    kinds = list(HOSTILE)
    problems = []
    for layout in (Layout.of((1, len(kinds), 67), 1, gap=2), Layout.of((1, len(kinds), 67), 0, gap=0, step=2)):
        target = torch.randint(67, (len(kinds),))
        target[::5] = -100
        z = hostile(kinds, target.clamp(min=0), 67, 5).to(dtype)
        upstream = torch.randn(len(kinds)).to(compute_dtype(dtype))
        options: dict[str, Any] = {"k": 5, "space": "prob", "distance": "l2", **PLAIN}
        problems.append(Problem(z, target, None, upstream, 0.7, options, place=layout, gradient=layout))
    outputs = run(problems)
    check(problems, outputs)
    in_place = run([problem._replace(in_place=True) for problem in problems])
    for a, b in zip(outputs, in_place, strict=True):
        assert all(same_bits(*pair) for pair in zip(flat(a), flat(b), strict=True))


def flat(output: Output) -> tuple[Tensor, ...]:
    return (*output.result, output.stats)


# ---- the same bits, and the same statistics --------------------------------------------------------------------------


def test_the_same_bits_every_time(run: Run) -> None:
    """Whatever the pace of the threads, in whose order the candidates are found, and whatever a block did before."""
    kinds = list(HOSTILE)
    target = torch.randint(300, (len(kinds),))
    z, upstream = hostile(kinds, target, 300, 20).float(), torch.randn(len(kinds))
    options: dict[str, Any] = {"k": 20, "space": "prob", "distance": "l2", **PLAIN}
    problem = Problem(z, target, None, upstream, 0.7, options, threads=128)
    outputs = run([problem._replace(blocks=blocks) for blocks in (1, 1, 1, 2, 7, len(kinds))])
    for output in outputs[1:]:
        assert all(same_bits(*pair) for pair in zip(flat(outputs[0]), flat(output), strict=True))


@pytest.mark.usefixtures("_native")
@by_dtype
def test_the_statistics_are_those_of_the_cpu(dtype: torch.dtype, run: Run) -> None:
    """So that either backward can follow either forward, and the conventions are the same where there is no penalty."""
    problems = []
    for at, ((space, distance), k) in enumerate(product(SPREADS, (1, 9, 129))):
        options: dict[str, Any] = {"k": k, "space": space, "distance": distance, **PLAIN}
        kinds = list(HOSTILE)[at % 4 :: 4]
        target = torch.randint(130, (len(kinds),))
        upstream = torch.ones(len(kinds), dtype=compute_dtype(dtype))
        z = hostile(kinds, target, 130, k).to(dtype)
        problems.append(Problem(z, target, None, upstream, 1.0, options, threads=128))
    for problem, (_, stats) in zip(problems, run(problems), strict=True):
        o = problem.options
        arguments = (o["k"], o["space"], o["distance"], o["ignore_index"], o["label_smoothing"])
        want = torch.ops.prsl_native.token_terms(problem.logits, problem.target, None, *arguments)[2]
        rtol = 1e-5 if stats.dtype == torch.float32 else 1e-13
        torch.testing.assert_close(stats, want, rtol=rtol, atol=1e-30, equal_nan=True)


# ---- long rows -------------------------------------------------------------------------------------------------------


@by_dtype
def test_rows_of_gpt2(dtype: torch.dtype, run: Run) -> None:
    problems = []
    for k, resident in product((20, 100, 50_256), (False, True)):
        problems.append(random_problem(dtype, 1, 50_257, k, "prob", "l2", threads=256, resident=resident))
    check(problems, run(problems))


@pytest.mark.slow
def test_a_row_of_a_million_classes(run: Run) -> None:
    problems = [random_problem(dtype, 1, 2**20, 20, "prob", "l2", threads=256, resident=False) for dtype in DTYPES]
    check(problems, run(problems))


# ---- sanitizers ------------------------------------------------------------------------------------------------------


def all_paths() -> list[Problem]:
    """Small, and by every way through the kernels."""
    problems = []
    for dtype in DTYPES:
        problems += hostile_problems(dtype, (130,))[::9]
        target = torch.tensor([3, -100, 69, -1, 70, 5])
        z = torch.randn(6, 70).to(dtype)
        upstream = torch.ones(6, dtype=compute_dtype(dtype))
        for at, k in enumerate((0, 5, 40)):
            options: dict[str, Any] = {"k": k, "space": "prob", "distance": "l2", **PLAIN, "label_smoothing": 0.1 * at}
            problem = Problem(z, target, torch.ones(70, dtype=upstream.dtype), upstream, 0.7, options)
            for layout in (Layout.of(problem.shape, 1, gap=2), Layout.of(problem.shape, 1, gap=1, step=2)):
                problems.append(problem._replace(place=layout, gradient=layout))
                problems.append(problem._replace(place=layout, in_place=True, resident=False, threads=32))
    return problems


def test_no_access_is_out_of_bounds(tmp_path: Path) -> None:
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    program = compile_main(tmp_path, "-O1", "-g", *sanitizers)
    compute([str(program)], all_paths())


@pytest.mark.slow
def test_no_thread_reads_what_another_one_is_about_to_write(tmp_path: Path) -> None:
    program = compile_main(tmp_path, "-O1", "-g", "-fsanitize=thread")
    # Its memory is at fixed addresses, where some kernels' randomized ones may be.
    fixed = ["setarch", "-R"]
    works = shutil.which("setarch") and subprocess.run([*fixed, "true"], capture_output=True).returncode == 0
    compute([*(fixed if works else []), str(program)], all_paths(), TSAN_OPTIONS="halt_on_error=1")
