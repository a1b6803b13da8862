"""What importing the package costs: torch, and nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after running the code."""
    report = "import sys; print(' '.join({name.partition('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_import_needs_torch_alone() -> None:
    more = modules_after("import prsl_kernels") - modules_after("import torch")
    assert more == {"prsl_kernels"}
    assert not more & {"transformers", "triton", "safetensors", "scipy", "pandas", "pyarrow"}


def test_the_loss_needs_torch_alone() -> None:
    code = "import torch, prsl_kernels\nprsl_kernels.prsl_cross_entropy(torch.randn(2, 9), torch.tensor([0, 1]), k=3)"
    assert not modules_after(code) & {"transformers", "triton", "scipy"}


def test_exports() -> None:
    import prsl_kernels

    assert {"prsl_cross_entropy", "PRSLoss", "apply_prsl"} <= set(prsl_kernels.__all__)
    for name in prsl_kernels.__all__:
        assert getattr(prsl_kernels, name) is not None
    assert prsl_kernels.__version__ == "0.1.0"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = prsl_kernels.no_such_name
