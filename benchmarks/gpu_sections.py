"""The sections of the GPU check, as the program sees them: processes to start, and what their ends mean."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import gpu_checks, gpu_times, machine
from .gpu_parts import GRACE, Ended, Record, environment, part_command, run, run_together

# The tests that run the loss on the device that PRSL_TEST_DEVICE names.
TESTS = (
    *("tests/test_triton*.py", "tests/test_functional*.py", "tests/test_closed_form.py"),
    *("tests/test_linear*.py", "tests/test_pytorch.py"),
)
DRY_TESTS = ("tests/test_functional.py", "-k", "test_reductions_and_terms")  # that pytest is called, and understood
SANITIZERS = ("memcheck", "racecheck", "initcheck")
SANITIZER_FOUND = 99  # its exit status where it found errors
WORKER_MEMORY = 16 << 30  # bytes of the GPU's for each worker of the checks
STRAY_LINES = 40


@dataclass
class Context:
    """What a section needs: its part of the document, which it fills, and a function to save that."""

    dry: bool
    seconds: float
    section: Record
    save: Callable[[], None]
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self.section.setdefault("records", [])

    def add(self, record: Record) -> None:
        """Keep a record, and save."""
        with self._lock:
            self.section["records"].append(record)
            self.save()

    def take(self, line: str, worker: int = 0) -> None:
        """Keep what a part says in a line; one that is no record was cut off, or is a sanitizer's."""
        try:
            record = json.loads(line)
        except ValueError:
            return
        with self._lock:
            under_way = self.section.setdefault("under_way", {})
            if "begin" in record:
                under_way[str(worker)] = record["begin"]
            else:
                under_way.pop(str(worker), None)
                self.section["records"].append(record)
                self.say(describe(record))
            self.save()


def describe(record: Record) -> str:
    """A record in a line."""
    name = record.get("check") or record.get("point") or record.get("what") or "done"
    word = {True: "passed", False: "FAILED", None: ""}[record.get("passed")]
    if "check" in record and record["passed"] is None:
        word = "not done"
    if both := next((r for r in record.get("results", []) if (r["contender"], r["phase"]) == ("prsl", "both")), None):
        word = f"{both['median_ms']:.3f} ms, {both['ratio_to_copy']:.2f} copies"
    return " ".join(filter(None, (f"{name}:", word, record.get("reason") and f"({record['reason']})")))


# ---- the environment -------------------------------------------------------------------------------------------------


def gpu_description(dry: bool) -> Record:
    """The GPU, the software, and the machine."""
    about = machine.describe_machine()
    wanted = ("machine", "cores", "torch", "python", "prsl", "commit")
    found: Record = {name: about[name] for name in wanted} | {"date": machine.now(), "triton": _version("triton")}
    found |= {"liger_kernel": _version("liger_kernel"), "cuda": torch.version.cuda, "hip": torch.version.hip}
    if dry:
        return found | {"gpu": "none: a dry run on the CPU"}
    properties = torch.cuda.get_device_properties(0)
    names = ("multi_processor_count", "total_memory", "L2_cache_size", "major", "minor", "gcnArchName")
    found |= {"gpu": properties.name} | {name: getattr(properties, name) for name in names if hasattr(properties, name)}
    return found | {"nvidia_smi": nvidia_smi()}


def _version(module: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module)
    except PackageNotFoundError:
        return None


def nvidia_smi() -> Record:
    """Driver, clocks and limits, or why they are not known."""
    asked = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu", "pstate")
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"reason": "there is no nvidia-smi"}
    lines: list[str] = []
    command = [tool, f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "--id=0"]
    ended = run(command, 20, environment(False), lines.append)
    if ended.reason or not lines:
        return {"reason": f"nvidia-smi: {ended.reason or 'said nothing'}{': ' + lines[0] if lines else ''}"}
    return dict(zip(asked, (value.strip() for value in lines[0].split(",")), strict=False))


# ---- sections --------------------------------------------------------------------------------------------------------


def settle(section: Record, ended: Sequence[Ended], *, must_finish: bool) -> None:
    """Write into a section how its processes ended, and whether what it checked is right, as far as it came."""
    section["seconds"] = round(max(one.seconds for one in ended), 1)
    done = {record.get("check") or record.get("point") for record in section["records"]}
    missing = [name for name in section.get("planned", []) if name not in done]
    reasons = [one.reason for one in ended if one.reason]
    crashed = any(one.reason and not one.timed_out for one in ended)
    wrong = any(record.get("passed") is False for record in section["records"])
    under_way = list(section.pop("under_way", {}).values())
    if missing:
        section["not_done"] = missing
    if under_way:
        reasons.append(f"under way: {', '.join(under_way)}")
    if reasons:
        section["reason"] = "; ".join(reasons)
    section["status"] = "failed" if crashed else "incomplete" if missing or reasons else "complete"
    section["passed"] = not (wrong or crashed or (must_finish and missing))


def parts(context: Context, name: str, planned: Sequence[str], workers: int = 1, *, must_finish: bool = False) -> None:
    """Run a part in so many processes at a time; ``planned`` are the names of its records."""
    context.section["planned"] = list(planned)
    commands = [
        (
            part_command(name, context.seconds - GRACE, context.dry, worker, workers),
            partial(context.take, worker=worker),
        )
        for worker in range(workers)
    ]
    settle(
        context.section,
        run_together(commands, context.seconds, environment(context.dry)),
        must_finish=must_finish,
    )


def correctness(context: Context) -> None:
    """The checks at real sizes. Several at a time, since the kernels they compile take longer than they do."""
    workers = 2
    if not context.dry:
        memory = torch.cuda.get_device_properties(0).total_memory
        workers = max(1, min(4, machine.CORES // 2, memory // WORKER_MEMORY))
    parts(context, "correctness", list(gpu_checks.planned()), workers, must_finish=True)


def times(context: Context) -> None:
    """The races."""
    context.section |= {"notes": gpu_times.NOTES, "left_out": gpu_times.LEFT_OUT}
    context.section["contenders"] = {name: one.what for name, one in gpu_times.CONTENDERS.items()}
    parts(context, "times", [point.name for point in gpu_times.points(context.dry)])
    if not context.dry:
        context.section["nvidia_smi_after"] = nvidia_smi()


def first_call(context: Context) -> None:
    """What the first step of a process costs, with an empty cache of compiled kernels, and with a full one."""
    began: list[Ended] = []
    with tempfile.TemporaryDirectory() as cache:
        for what in ("an empty cache", "a full cache"):
            seconds = context.seconds - sum(one.seconds for one in began)

            def take(line: str, what: str = what) -> None:
                record: Record | None = _json(line)
                if record is not None:
                    context.add({"what": what} | record)
                    context.say(f"{what}: first step {record['first_s']:.2f} s, next one {record['next_s']:.4f} s")

            variables = environment(context.dry, TRITON_CACHE_DIR=cache)
            began.append(run(part_command("first-call", seconds, context.dry), max(1.0, seconds), variables, take))
    settle(context.section, began, must_finish=False)


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def tests(context: Context) -> None:
    """The test-suite on the device, with workers where pytest-xdist is there."""
    if find_spec("pytest") is None:
        context.section |= {"status": "not available", "passed": None, "reason": "pytest is missing"}
        return
    chosen: list[str] = list(DRY_TESTS)
    if not context.dry:
        chosen = sorted({str(path.relative_to(machine.ROOT)) for glob in TESTS for path in machine.ROOT.glob(glob)})
        if find_spec("xdist") is not None and machine.CORES > 2:
            chosen += ["-n", str(min(8, machine.CORES))]
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "tests.xml"
        flags = ["-q", "-m", "not slow", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={xml}"]
        command = [sys.executable, "-m", "pytest", *flags, *chosen]
        context.section["command"] = ["pytest", "-m", "not slow", *chosen]
        device = {"PRSL_TEST_DEVICE": "cpu" if context.dry else "cuda"}
        lines: list[str] = []
        ended = run(command, context.seconds, environment(context.dry, **device), lines.append)
        counts = read_junit(xml)
    settle(context.section, [ended], must_finish=False)
    context.section |= {"counts": counts, "output": [] if ended.status == 0 else lines[-STRAY_LINES:]}
    if ended.timed_out:  # its status is not one of its own then
        context.section["passed"] = None if counts is None else not counts["failed"]
    context.say(f"{counts or 'no counts'}{'; ' + context.section['reason'] if 'reason' in context.section else ''}")


def read_junit(path: Path) -> Record | None:
    """How many tests passed, failed and were skipped, and the names of those that failed; None where nobody knows."""
    try:
        cases = list(ET.parse(path).getroot().iter("testcase"))
    except (OSError, ET.ParseError):
        return None
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname', '')}::{case.get('name', '')}" for case in failed]
    passed = len(cases) - len(failed) - skipped
    return {"passed": passed, "failed": len(failed), "skipped": skipped, "names_of_failed": names}


def sanitizer(context: Context) -> None:
    """Every kernel under compute-sanitizer's tools, without torch's cache, whose blocks would hide what is amiss."""
    variables = environment(context.dry, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    began = [run(part_command("small", 0, context.dry), context.seconds, variables, context.take)]  # compiles
    settle(context.section, began, must_finish=False)
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if began[0].reason or tool is None:
        if tool is None and not began[0].reason:
            context.section |= {"status": "not available", "passed": None, "reason": "there is no compute-sanitizer"}
        return
    for name in SANITIZERS:
        left = context.seconds - sum(one.seconds for one in began)
        if left < 2 * GRACE:
            context.add({"what": name, "passed": None, "reason": "the time of this section was up"})
            continue
        lines: list[str] = []
        command = [
            tool,
            "--tool",
            name,
            "--error-exitcode",
            str(SANITIZER_FOUND),
            *part_command("small", 0, context.dry),
        ]
        began.append(run(command, left - GRACE, variables, lines.append))
        record: Record = {"what": name, "passed": began[-1].status == 0, "seconds": round(began[-1].seconds, 1)}
        if began[-1].status != 0:
            # Where the tool could not run, nothing was found out.
            record |= {"passed": False if began[-1].status == SANITIZER_FOUND else None, "reason": began[-1].reason}
            record["output"] = lines[:STRAY_LINES]
        context.add(record)
        context.say(describe(record))
    settle(context.section, began[:1], must_finish=False)
    context.section["seconds"] = round(sum(one.seconds for one in began), 1)


# Each with the seconds it may count on; what the earlier ones leave is the later ones'.
SECTIONS: dict[str, tuple[Callable[[Context], None], float]] = {
    "correctness": (correctness, 140),
    "first call": (first_call, 50),
    "times": (times, 140),
    "tests": (tests, 170),
    "sanitizer": (sanitizer, 60),
}
