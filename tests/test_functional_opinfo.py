"""With b=0, the loss is torch.nn.functional.cross_entropy: on PyTorch's own samples for it, in all its dtypes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from running import KERNELS, RUNNING
from torch import Tensor

from prsl_kernels import PRSLoss, prsl_cross_entropy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

pytestmark = pytest.mark.usefixtures("_single_thread")

OPINFO = next(op for op in op_db if op.name == "nn.functional.cross_entropy")
DTYPES = sorted(OPINFO.dtypes, key=str)


def samples(dtype: torch.dtype, smoothings: tuple[float, ...] = (0.0, 0.3), backend: str = "auto") -> list[Any]:
    """PyTorch's samples, and the same with label smoothing and with class weights where they have none."""
    out = []
    for smoothing in smoothings:
        for sample in OPINFO.sample_inputs("cpu", dtype, requires_grad=True):
            if backend in KERNELS and sample.args[0].is_floating_point():  # class probabilities
                continue
            options = dict(sample.kwargs, label_smoothing=smoothing)
            out.append((sample.input, sample.args[0], options))
            if smoothing and "weight" not in options:
                weight = torch.rand(sample.input.shape[1]).to(dtype)
                out.append((sample.input, sample.args[0], dict(options, weight=weight)))
    return out


def reference(z: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
    """PyTorch's result, in float32 for half precision."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    weight = options.get("weight")
    options = dict(options, weight=None if weight is None else weight.to(dtype))
    return F.cross_entropy(z.to(dtype), target.to(dtype) if target.is_floating_point() else target, **options)


@pytest.mark.parametrize("backend", ["auto", *RUNNING])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, backend: str) -> None:
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for z, target, options in samples(dtype, backend=backend):
        inputs = [z, target] if target.is_floating_point() else [z]
        for x in inputs:
            x.requires_grad_()
        # k may be anything
        loss = prsl_cross_entropy(z, target, k=1000, b=0, backend=backend, **options)
        expected = reference(z, target, options)
        assert loss.dtype == expected.dtype
        assert loss.shape == expected.shape
        torch.testing.assert_close(loss, expected, rtol=8 * eps, atol=8 * eps)
        upstream = torch.randn_like(loss)
        for got, want in zip(
            torch.autograd.grad(loss, inputs, upstream),
            torch.autograd.grad(expected, inputs, upstream),
            strict=True,
        ):
            assert got.dtype == want.dtype == dtype
            unit = 8 * eps if dtype.itemsize >= 4 else torch.finfo(dtype).eps
            torch.testing.assert_close(got, want, rtol=unit, atol=8 * eps)


@pytest.mark.parametrize("backend", ["auto", *RUNNING])
@pytest.mark.parametrize("b", [0, 0.8])
def test_derivatives(b: float, backend: str) -> None:
    """First and second derivatives, in reverse and forward mode, where there is one, of every sample in float64."""
    forward_mode = backend not in KERNELS
    for z, target, options in samples(torch.float64, (0.3,), backend):
        k = min(2, z.shape[1] - 1)

        def loss(*inputs: Tensor, k: int = k, target: Tensor = target, options: dict[str, Any] = options) -> Tensor:
            z, target = (*inputs, target)[:2]
            return prsl_cross_entropy(z, target, k=k, b=b, backend=backend, **options)

        inputs = [z.detach().requires_grad_()]
        if target.is_floating_point():
            inputs.append(target.detach().requires_grad_())
        torch.autograd.gradcheck(loss, inputs, check_forward_ad=forward_mode, fast_mode=True)
        if z.dim() < 4:
            torch.autograd.gradgradcheck(loss, inputs, check_fwd_over_rev=forward_mode, fast_mode=True)


def test_module() -> None:
    """PRSLoss with b=0 is torch.nn.CrossEntropyLoss."""
    for z, target, options in samples(torch.float32):
        expected = torch.nn.CrossEntropyLoss(**options)(z, target)
        torch.testing.assert_close(PRSLoss(b=0, **options)(z, target), expected, rtol=1e-6, atol=1e-6)
