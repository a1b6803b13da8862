"""Which backends the tests can run, and where.

The device is the CPU, or what ``PRSL_TEST_DEVICE`` names. On the CPU the Triton kernels run with ``TRITON_INTERPRET=1``
alone.
"""

from __future__ import annotations

import os

import torch

from prsl_kernels.functional import BACKENDS

DEVICE = os.environ.get("PRSL_TEST_DEVICE", "cpu")


def _runs(name: str) -> bool:
    logits = torch.zeros(1, 2, device=DEVICE)
    return BACKENDS[name].refusal(logits, logits[:, 0].long(), None) is None


RUNNING = tuple(filter(_runs, BACKENDS))

# Those with kernels of their own, which take class indices alone and have no forward mode.
KERNELS = tuple(name for name in RUNNING if name != "eager")
