"""What a call would launch on a GPU that is not there: Triton's own binder and compiler, for a target in name only."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from .report import BenchmarkError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
B = 1e-4


@dataclass(frozen=True)
class Call:
    """The arguments of a call."""

    dtype: str
    vocab: int
    k: int
    rows: int

    @property
    def element_size(self) -> int:
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel of a call; ``code`` by the name of the stage (ptx, cubin, amdgcn, hsaco)."""

    name: str
    grid: tuple[int, ...]
    threads: int
    shared: int  # bytes of dynamic shared memory
    slow: bool
    options: dict[str, Any]
    code: dict[str, Any]

    @property
    def programs(self) -> int:
        return math.prod(self.grid)


class _Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)  # by which Triton keeps what it has compiled

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def needs_triton() -> None:
    """Raise where Triton is missing."""
    if find_spec("triton") is None:
        raise BenchmarkError("Triton is missing: pip install triton (Linux)")


def gpu_target(name: str) -> Any:
    """Triton's target of sm_90, gfx942 and the like."""
    needs_triton()
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_") and name[3:].isdigit():
        return GPUTarget("cuda", int(name[3:]), 32)
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    raise BenchmarkError(f"--target {name}: neither sm_<number> nor gfx<number>")


def without_interpreter() -> None:
    """Raise where Triton interprets: its kernels are Python functions then, with nothing to compile."""
    if os.environ.get("TRITON_INTERPRET"):
        raise BenchmarkError("TRITON_INTERPRET is set, and nothing is compiled then; unset it")


@contextlib.contextmanager
def pretending(target: Any) -> Iterator[None]:
    """Make Triton compile for a target, whatever this machine has."""
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_Driver(target))
    try:
        yield
    finally:
        driver._active = before


def describe(kernel: Any, grid: tuple[int, ...], *, slow: bool, options: dict[str, Any]) -> Compiled:
    """What is known of a kernel that Triton has compiled."""
    metadata = kernel.metadata
    threads = metadata.num_warps * metadata.target.warp_size
    plain = {name: value for name, value in options.items() if isinstance(value, (bool, int, float, str, type(None)))}
    return Compiled(metadata.name, tuple(grid), threads, metadata.shared, slow, plain, dict(kernel.asm))


def prsl(call: Call, target: Any) -> list[Compiled]:
    """The kernels that forward and backward of `prsl_cross_entropy` launch, those of the rare path included."""
    try:
        from prsl_kernels.backends import triton as backend
    except ImportError as error:
        raise BenchmarkError(f"the Triton kernels cannot be imported: {error}") from None
    with pretending(target):
        return [
            describe(
                launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options),
                launch.grid,
                slow=launch.slow,
                options=launch.options,
            )
            for launch in _launches(backend, call, target)
        ]


def _launches(backend: Any, call: Call, target: Any) -> list[Any]:
    """Forward's and backward's launches for logits that have a shape and a dtype but no memory."""
    logits = torch.empty(call.rows, call.vocab, dtype=DTYPES[call.dtype], device="meta")
    classes = torch.empty(call.rows, dtype=torch.int64, device="meta")
    options = (call.k, "prob", "l2", -100, 0.0)
    architecture = f"sm_{target.arch}" if target.backend == "cuda" else target.arch
    outputs, forward = backend.forward_launches(logits, classes, None, *options, architecture=architecture)
    upstream = [torch.empty(call.rows, dtype=torch.float32, device="meta") for _ in range(2)]
    _, _, *saved = outputs
    backward = backend.gradient_launches(
        logits, backend.new_gradient(logits), classes, None, *saved, *upstream, *options, architecture=architecture
    )
    return [*forward, *backward]


@contextlib.contextmanager
def _recorded(target: Any) -> Iterator[list[Compiled]]:
    """Compile what is launched within, in the order of the launches, and launch nothing."""
    from triton.runtime.jit import JITFunction

    run: Callable[..., Any] = JITFunction.run
    launched: list[Compiled] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if callable(grid):
            grid = grid(inspect.signature(self.fn).bind_partial(*args).arguments | kwargs)
        launched.append(describe(kernel, grid, slow=False, options=kwargs))
        return kernel

    JITFunction.run = compile_only
    try:
        with pretending(target):
            yield launched
    finally:
        JITFunction.run = run


def liger(call: Call, target: Any) -> list[Compiled]:
    """Liger-Kernel's plain cross entropy: one kernel, which leaves the gradient in the logits' storage.

    Its backward launches a second one over all logits unless the upstream gradient is 1; it is not counted here.
    """
    try:
        from liger_kernel.ops import cross_entropy
    except ImportError:
        raise BenchmarkError("not installed: pip install liger-kernel") from None
    # It asks values of its targets, so the tensors have memory. The kernel depends on no number of rows.
    logits = torch.zeros(2, call.vocab, dtype=DTYPES[call.dtype]).requires_grad_()
    major = target.arch // 10 if isinstance(target.arch, int) else None
    # By this it chooses the number of warps, from the device that is there.
    names = {8: "ampere", 9: "hopper", 10: "blackwell"}
    replaced = {"infer_device_arch": lambda: names.get(major or 0, ""), "is_hip": lambda: major is None}
    before = {name: getattr(cross_entropy, name) for name in replaced if hasattr(cross_entropy, name)}
    try:
        for name in before:
            setattr(cross_entropy, name, replaced[name])
        with _recorded(target) as launched, torch.no_grad():
            zeros = torch.zeros(2, dtype=torch.int64)
            cross_entropy.cross_entropy_forward(logits, zeros, None, -100, 0.0, 0.0, "mean", None, False)
    finally:
        for name, function in before.items():
            setattr(cross_entropy, name, function)
    # The grid is one program a row.
    return [Compiled(one.name, (call.rows,), one.threads, one.shared, False, one.options, one.code) for one in launched]
