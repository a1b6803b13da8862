"""The folders that a report writes: whole or not there, and nothing left of a process that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prsl_kernels.experiments.files import atomic_directory

_HOLD = """
import sys, time
from pathlib import Path
from prsl_kernels.experiments.files import atomic_directory
with atomic_directory(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print(folder.name, flush=True)
    time.sleep(120)
"""


def hold(path: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process inside of `atomic_directory(path)`, and its temporary directory."""
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, path.parent / process.stdout.readline().strip()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locks that die with their process")
def test_what_a_killed_process_left_is_removed_and_what_a_live_one_holds_is_not(tmp_path: Path) -> None:
    path = tmp_path / "figures"
    dead, left = hold(path)
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert (left / "half").is_file()
    others = [
        tmp_path / name for name in (".figures.short", ".figures.UPPERCAS", ".tables.abcd1234", "figures.abcd1234")
    ]
    for other in others:
        other.mkdir()
    link = tmp_path / ".figures.linklink"
    link.symlink_to(others[0], target_is_directory=True)
    live, held = hold(path)
    try:
        assert not left.exists()
        with atomic_directory(path) as folder:
            (folder / "whole").write_text("whole")
        assert (path / "whole").is_file()
        assert (held / "half").is_file()
        assert all(other.is_dir() for other in others)
        assert link.is_symlink()
    finally:
        live.kill()
        live.wait()


def test_a_directory_made_after_the_call_is_nobodys_leftover(tmp_path: Path) -> None:
    newer = tmp_path / ".figures.abcd1234"
    newer.mkdir()
    os.utime(newer, (2**33, 2**33))
    with atomic_directory(tmp_path / "figures"):
        pass
    assert newer.is_dir()


def test_directories_within_one_process_do_not_take_each_other_away(tmp_path: Path) -> None:
    path = tmp_path / "figures"
    with atomic_directory(path) as outer:
        (outer / "a").write_text("outer")
        with atomic_directory(path) as inner:
            (inner / "a").write_text("inner")
        assert (path / "a").read_text() == "inner"
    assert (path / "a").read_text() == "outer"
    assert [entry.name for entry in tmp_path.iterdir()] == ["figures"]
