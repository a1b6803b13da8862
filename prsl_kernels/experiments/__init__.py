"""The experiment: fine-tune, attack, score, report. Needs the extra `prsl_kernels[experiments]`."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the command `prsl`."""
    try:
        from prsl_kernels.experiments.cli import main as run
    except ModuleNotFoundError as error:
        sys.exit(
            f"prsl: the package {error.name!r} is missing; the command line needs "
            "`pip install 'prsl_kernels[experiments]'`"
        )
    run()
