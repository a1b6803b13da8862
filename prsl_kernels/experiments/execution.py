"""How a stage becomes a folder of the run directory, whole or not at all.

A stage works in `<its folder>.partial`, where an interrupted attempt is found again, and becomes its folder in one
rename. Its marker, written last, holds the key and the checksum of every file, so that a second run only compares.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from prsl_kernels.experiments import ranks
from prsl_kernels.experiments.console import say
from prsl_kernels.experiments.errors import UserError
from prsl_kernels.experiments.files import sha256, write_json, write_text

if TYPE_CHECKING:
    from prsl_kernels.experiments.pipeline import Stage


# Of larger files (bytes) the content is read again only where size or time of change differ: models of many gigabytes
# for each arm would take minutes at every start.
_LARGE = 1 << 28


def _marker(run: Path, stage: Stage) -> Path:
    return run / "stages" / (stage.name.replace("/", "--") + ".json")


def is_fresh(run: Path, stage: Stage) -> bool:
    """Whether the stage's result is there, whole, and made from what it depends on now."""
    try:
        marker = json.loads(_marker(run, stage).read_text(encoding="utf-8"))
        if marker["key"] != stage.key:
            return False
        stamps = marker.get("stamps", {})
        for name, expected in marker["files"].items():
            if name in stamps and _stamp(run / name) == stamps[name]:
                continue
            if sha256(run / name) != expected:
                say(f"{run / name}: its content changed since it was written; the stage {stage.name} is made again")
                return False
    except FileNotFoundError as error:
        if Path(str(error.filename)) != _marker(run, stage):
            say(f"{error.filename}: missing; the stage {stage.name} is made again")
        return False
    except (ValueError, KeyError, AttributeError, TypeError):
        say(f"{_marker(run, stage)}: damaged; the stage {stage.name} is made again")
        return False
    return True


def execute(run: Path, stage: Stage) -> None:
    """Makes one stage's result and then its marker. Interrupted at any moment, it leaves the earlier result whole.

    Several ranks make the call together: all of them build, but for a stage in place, and rank 0 does the rest.
    """
    with ranks.together():
        if not ranks.is_main():
            if not stage.in_place:
                ranks.barrier()
                for folder in (*(run / need.name for need in stage.needs), _partial(run, stage)):
                    ranks.await_path(folder)
                stage.build(_partial(run, stage))
                ranks.barrier()
        else:
            _execute(run, stage)
        ranks.barrier()


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _partial(run: Path, stage: Stage) -> Path:
    folder = run / stage.name
    return folder.with_name(folder.name + ".partial")


def _execute(run: Path, stage: Stage) -> None:
    marker = _marker(run, stage)
    started = time.monotonic()
    if stage.in_place:
        marker.unlink(missing_ok=True)
        written = stage.build(run)
        files = sorted(written) if written is not None else []
    else:
        folder, partial = run / stage.name, _partial(run, stage)
        key_file = marker.with_suffix(".partial")  # what the partial work is an attempt at
        if partial.exists() and not (key_file.is_file() and key_file.read_text() == stage.key):
            shutil.rmtree(partial)  # an attempt at something else
        partial.mkdir(parents=True, exist_ok=True)
        write_text(key_file, stage.key)
        ranks.barrier()
        stage.build(partial)
        ranks.barrier()
        marker.unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        key_file.unlink()
    write_json(
        marker,
        {
            "key": stage.key,
            "seconds": round(time.monotonic() - started, 1),
            "files": {path.relative_to(run).as_posix(): sha256(path) for path in files},
            "stamps": {
                path.relative_to(run).as_posix(): _stamp(path) for path in files if path.stat().st_size > _LARGE
            },
        },
    )


@contextmanager
def locked(run: Path, stages: Iterable[Stage]) -> Iterator[None]:
    """One process per arm of a task in a run directory: two would tear each other's partial results."""
    run.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        for name in sorted({f"{stage.task}-{stage.arm}" for stage in stages if stage.arm is not None}):
            try:
                held.enter_context(FileLock(run / f".lock-{name}").acquire(timeout=0))
            except Timeout:
                raise UserError(
                    f"{run}: another prsl process is working on {name} there; wait for it, or choose another --out, "
                    "--task or --arm"
                ) from None
        yield
