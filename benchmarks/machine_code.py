"""What a call would launch on a GPU, read from the machine code: ``python -m benchmarks.machine_code``.

Compiles the kernels for a GPU that need not be there, writes them down, and counts: registers, spills, the width of
each access to global memory, and instructions per element in each loop, by pipe. From these a time is modelled, which
is no measurement. See gpu_model.py for the chips and the assumptions, and sass.py for how loops and pipes are found.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import ahead_of_time, amdgcn, counts, gpu_model, machine, report, sass, slow_path
from .ahead_of_time import DTYPES, Call, Compiled
from .cli import exit_status, positive
from .report import BenchmarkError

# What the machine code does not say, and the model needs. It goes into the JSON as it is.
ASSUMED = {
    "rounds of each loop without global memory (searches)": 16,
    "stream loops": "a loop that loads logits runs over all classes of its row",
    "fill loops": "a loop that only stores is for ignored rows, and is not counted",
    "reloads": "a row that a kernel reads again comes from L2, where the rows in flight take less than half of it",
    "ratio of the peak bandwidth that is reached": gpu_model.ACHIEVABLE,
    "straight path": "takes no branch unless the iteration needs it",
    "slow rows": "cost what the slow kernels' loops cost per row; a slow kernel costs nothing for the other rows",
}
ROUNDS = "rounds of each loop without global memory (searches)"
BUDGET = 22  # instructions per element that forward and backward together may have on an H100, bf16
PEERS: dict[str, Callable[[Call, Any], list[Compiled]]] = {"liger": ahead_of_time.liger}

# ---- compiling and reading -------------------------------------------------------------------------------------------


def read_compiled(one: Compiled, place: Path, target: str) -> sass.Kernel:
    """Write one kernel's code to files that begin with ``place``, and take it apart."""
    written = {name: code for name, code in one.code.items() if name in ("ptx", "cubin", "amdgcn", "hsaco", "ttgir")}
    for name, code in written.items():
        path = place.with_name(f"{place.name}.{name}")
        path.write_bytes(code if isinstance(code, bytes) else str(code).encode())
    if "amdgcn" in written:
        return amdgcn.parse(one.code["amdgcn"], one.name, target)
    return sass.read(place.with_name(f"{place.name}.cubin"))[0]


def analyse(
    compiled: Sequence[Compiled], call: Call, folder: Path, target: str, which: str = "straight"
) -> list[dict[str, Any]]:
    """Count the kernels of a call, in the order in which they are launched."""
    kernels = []
    for number, one in enumerate(compiled):
        slow = "_slow" if one.slow and not one.name.endswith("_slow") else ""
        place = folder / f"{number}_{one.name}{slow}"
        kernel = read_compiled(one, place, target)
        counted = counts.count_kernel(kernel, call.element_size, which)
        # On sm_90 and later the assembler's number includes what the system reserves.
        static = max(0, kernel.shared - gpu_model.RESERVED_SHARED) if target.startswith("sm_") else 0
        launch = {"file": place.name, "slow": one.slow, "grid": one.grid, "threads": one.threads}
        launch |= {"programs_per_row": one.programs / call.rows, "shared_bytes": one.shared + static}
        if "amdgcn" in one.code:
            launch["resources"] = amdgcn.resources(one.code["amdgcn"])
        kernels.append(counted | launch | {"options": one.options})
    return kernels


def analyse_library(path: Path, call: Call, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Count the kernels of a cubin or a library; nothing says how they are launched: one block per row is assumed."""
    kernels = []
    for kernel in sass.read(path, options.target):
        name = sass.readable(kernel.name)
        if not re.search(options.kernels, name):
            continue
        counted = counts.count_kernel(kernel, call.element_size, options.path, ragged=True)
        counted |= {"kernel": name, "symbol": kernel.name}
        for loop in counted["loops"]:
            if options.loops and loop["role"] == "stream" and loop["address"] not in options.loops:
                loop["role"] = "not counted"
        launch = {"file": path.name, "slow": "slow" in name, "grid": (call.rows,), "programs_per_row": 1}
        launch["threads"] = options.threads or kernel.threads or 256
        launch["shared_bytes"] = max(0, kernel.shared - gpu_model.RESERVED_SHARED) + options.shared
        kernels.append(counted | launch)
    if not kernels:
        raise BenchmarkError(f"--kernels {options.kernels}: {path} has no kernel of that name")
    return kernels


# ---- the model -------------------------------------------------------------------------------------------------------


def work_of(kernel: Mapping[str, Any], call: Call, chip: gpu_model.Chip, *, rounds: int) -> gpu_model.Work:
    """What one kernel does for a row."""
    lanes: dict[str, float] = {}

    def add(by_pipe: Mapping[str, int], times: float) -> None:
        for pipe, number in by_pipe.items():
            if pipe != "issue":
                lanes[pipe] = lanes.get(pipe, 0) + number * times
            lanes["issue"] = lanes.get("issue", 0) + number * times

    threads = kernel["threads"] * kernel["programs_per_row"]
    add(kernel["outside"]["by_pipe"], threads)
    held = gpu_model.occupancy(chip, kernel["threads"], kernel["registers"], kernel["shared_bytes"])["blocks"]
    row = call.vocab * call.element_size
    again = row if min(call.rows, held * chip.sms) * row > chip.l2 / 2 else 0
    loaded, stored = 0.0, 0.0
    for loop in kernel["loops"]:
        if loop["role"] == "stream":
            add(loop["by_pipe"], call.vocab / loop["elements"] * (rounds if loop["searches"] else 1))
            if loop["per_element"]["bytes_loaded"]:
                loaded += again if loaded else row
            stored += loop["per_element"]["bytes_stored"] * call.vocab
        elif loop["role"] == "search":
            add(loop["by_pipe"], rounds * threads)
        elif loop["role"] == "rows":
            add(loop["by_pipe"], threads)
    loaded = loaded or (row if kernel["bulk_copies"] else 0.0)
    return gpu_model.Work(kernel["kernel"], loaded + stored, lanes)


def modelled(kernels: Sequence[Mapping[str, Any]], call: Call, slow_share: float) -> list[dict[str, Any]]:
    """The modelled times on all chips, from the code of one target."""
    results = []
    for chip in gpu_model.CHIPS:
        works = [work_of(kernel, call, chip, rounds=ASSUMED[ROUNDS]) for kernel in kernels]  # type: ignore[arg-type]
        works = [
            work.scaled(slow_share) if kernel["slow"] else work for work, kernel in zip(works, kernels, strict=True)
        ]
        floor = 2 * call.vocab * call.element_size
        results.append(gpu_model.model(chip, works, call.rows, floor))
    return results


def summarize(kernels: Sequence[dict[str, Any]], call: Call, target: str, slow_share: float) -> dict[str, Any]:
    """What is said of one implementation."""
    for kernel in kernels:
        if target.startswith("sm_"):
            needs = (kernel["threads"], kernel["registers"], kernel["shared_bytes"])
            kernel["occupancy"] = {chip.arch: gpu_model.occupancy(chip, *needs) for chip in gpu_model.CHIPS}
    fast = [kernel for kernel in kernels if not kernel["slow"]]
    streams = [loop for kernel in fast for loop in kernel["loops"] if loop["role"] == "stream"]
    per_element = dict.fromkeys(("instructions", "shortest_path", "longest_path", "bytes_loaded", "bytes_stored"), 0.0)
    by_pipe: dict[str, float] = {}
    by_kind: dict[str, float] = {}
    for loop in streams:
        for name in ("shortest_path", "longest_path"):
            per_element[name] += loop[name] / loop["elements"]
        for name, value in loop["per_element"].items():
            per_element[name] += value
        for numbers, total in ((loop["by_pipe"], by_pipe), (loop["by_kind"], by_kind)):
            for name, number in numbers.items():
                total[name] = total.get(name, 0) + number / loop["elements"]
    return {
        "kernels": list(kernels),
        "per_element": per_element | {"by_pipe": by_pipe, "by_kind": by_kind},
        "spills": [kernel["kernel"] for kernel in fast if kernel["spills"]],
        "narrow_accesses": [text for kernel in fast for text in counts.narrow(kernel)],
        "slow_share": slow_share,
        "modelled": modelled(kernels, call, slow_share) if target.startswith("sm_") else [],
    }


# ---- tables ----------------------------------------------------------------------------------------------------------


def kernel_table(kernels: Sequence[Mapping[str, Any]]) -> str:
    """Resources, a line for each kernel."""
    rows = []
    for kernel in kernels:
        share = "/".join(f"{one['share']:.0%}" for one in kernel.get("occupancy", {}).values())
        local = kernel["local_memory"]
        name = kernel["file"] if kernel["file"].endswith(kernel["kernel"]) else kernel["kernel"]
        if kernel["slow"] and "slow" not in name:
            name += " (slow)"
        cells = (str(kernel["registers"]), f"{kernel['shared_bytes']:,}", f"{kernel['threads']}")
        spilled = f"{local['loads']}/{local['stores']}"
        if "resources" in kernel:
            spilled = f"{kernel['resources'].get('vgpr_spills', 0)}/{kernel['resources'].get('sgpr_spills', 0)}"
        outside = str(kernel["outside"]["instructions"])
        rows.append((name, *cells, share, spilled, str(kernel["stack_bytes"]), outside))
    header = (
        "kernel",
        "registers",
        "shared",
        "threads",
        "occupancy 80/90/100",
        "spills ld/st",
        "stack",
        "outside loops",
    )
    return report.table("", header, rows)


def loop_table(kernels: Sequence[Mapping[str, Any]]) -> str:
    """A line for each loop: per element where it moves elements, else per iteration."""
    native = any(kernel["arch"].startswith("sm_") for kernel in kernels)
    names = {"fma": "fma", "fma_heavy": "heavy", "alu": "alu", "xu": "xu", "lsu": "lsu"} if native else amdgcn.PIPES
    kinds = {"compare/select": "cmp/sel", "conversion": "conv"} if native else {}
    rows = []
    for kernel in kernels:
        for loop in kernel["loops"]:
            unit = loop["elements"] or 1
            moved = ", ".join(f"{one['count']} {one['access']} x {one['bytes']} B" for one in loop["accesses"])
            by_pipe = [loop["by_pipe"].get(pipe, 0) for pipe in names]
            by_kind = [loop["by_kind"].get(kind, 0) for kind in kinds]
            span = ""
            if loop["shortest_path"] != loop["longest_path"]:
                span = f"{loop['shortest_path'] / unit:.1f}-{loop['longest_path'] / unit:.1f}"
            numbers = [f"{number / unit:.2f}" for number in (loop["instructions"], *by_pipe, *by_kind)]
            where = f"{kernel['kernel']} {loop['address']}{' (slow)' if kernel['slow'] else ''}"
            rows.append((where, loop["role"], f"{loop['elements']:g}", numbers[0], span, *numbers[1:], moved))
    header = ("loop", "is a", "elements", "instr", "paths", *names.values(), *kinds.values(), "global memory")
    return report.table("loops, instructions per element (searches: per iteration):", header, rows)


def model_table(results: Sequence[Mapping[str, Any]], call: Call) -> str:
    """Modelled times, and those of the kernels that take more than a hundredth."""
    rows = []
    for result in results:
        shares = {"share_of_floor": "", "share_of_memory": ""}
        shares |= {name: f"{result[name]:.0%}" for name in shares if result[name]}
        kernels = [one for one in result["kernels"] if one["us"] > result["us"] / 100]
        parts = ", ".join(f"{one['kernel']} {one['us']:.0f} ({one['bound_by']})" for one in kernels)
        rows.append((result["chip"], f"{result['us']:.0f}", f"{result['floor_us']:.0f}", *shares.values(), parts))
    title = f"modelled, {call.rows:,} rows (floor: one read and one write; memory: all that these kernels move):"
    return report.table(title, ("chip", "us", "floor us", "of floor", "of memory", "kernels and what binds them"), rows)


def print_implementation(name: str, summary: Mapping[str, Any], call: Call) -> None:
    """All of the tables, and the sums."""
    print(f"\n{name}\n{kernel_table(summary['kernels'])}\n{loop_table(summary['kernels'])}")
    sums = summary["per_element"]
    pipes = ", ".join(f"{pipe} {number:.2f}" for pipe, number in sorted(sums["by_pipe"].items()))
    span = f"{sums['shortest_path']:.1f} to {sums['longest_path']:.1f}"
    moved = sums["bytes_loaded"] + sums["bytes_stored"]
    print(
        f"  per element, all sweeps together: {sums['instructions']:.1f} instructions ({pipes}; by the path taken "
        f"{span}), {moved:g} bytes"
    )
    print(f"  kernels with spills or local memory: {', '.join(summary['spills']) or 'none'}")
    print(f"  accesses in loops narrower than 128 bits: {'; '.join(summary['narrow_accesses']) or 'none'}")
    if summary["modelled"]:
        print(model_table(summary["modelled"], call))
        if any(kernel["slow"] for kernel in summary["kernels"]):
            print(f"  with {summary['slow_share']:.2%} of the rows on the slow path")


# ---- the program -----------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.machine_code",
        description="Compile what prsl_cross_entropy, forward and backward, would launch on a GPU, and read the "
        "machine code: registers, spills, widths of accesses, instructions per element, and a modelled time.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--target", metavar="X", default="sm_90", help="sm_80, sm_90, sm_100, gfx942, ... (sm_90)")
    add("--dtype", choices=DTYPES, default="bf16", help="of the logits (bf16)")
    add("--vocab", metavar="X", type=positive, default=50_257, help="classes (50257)")
    add("--k", metavar="X", type=positive, default=20, help="(20)")
    add("--rows", metavar="X", type=positive, default=8192, help="tokens (8192)")
    add("--dump", metavar="DIR", type=Path, help="write every cubin, the PTX, and machine_code.json there")
    add("--path", choices=sass.PATHS, default="straight", help="through a loop with branches (straight)")
    add("--peers", nargs="*", choices=PEERS, default=[], help="the same for other libraries, if installed")
    add("--cuda-library", metavar="PATH", type=Path, help="the same for the kernels of a cubin, .o or .so")
    add("--kernels", metavar="REGEX", default="", help="only these of --cuda-library, which add up to one call (all)")
    add("--loops", nargs="+", metavar="0x...", help="of its loops over classes, those that every row takes (all)")
    add("--threads", metavar="X", type=positive, help="a block of --cuda-library (what it was compiled for, or 256)")
    add("--shared", metavar="X", type=int, default=0, help="bytes of shared memory it is launched with (0)")
    add("--slow-share", metavar="X", type=float, help="of the rows on the slow path (that of random logits)")
    add("--no-prsl", action="store_true", help="only the peers and the library")
    return parser


def collect(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compile and count all that is asked for; the contents of the JSON."""
    call = Call(options.dtype, options.vocab, options.k, options.rows)
    if call.k >= call.vocab:
        raise BenchmarkError(f"--k {call.k} is too large for --vocab {call.vocab}; give a smaller k")
    target = ahead_of_time.gpu_target(options.target)
    found: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    slow_share = options.slow_share
    if slow_share is None:
        slow_share = 0.0 if options.no_prsl else slow_path.random_share(call.dtype, call.vocab, call.k)
    makers = ({} if options.no_prsl else {"prsl": ahead_of_time.prsl}) | {name: PEERS[name] for name in options.peers}
    for name, make in makers.items():
        place = folder if name == "prsl" else folder / name
        place.mkdir(parents=True, exist_ok=True)
        try:
            compiled = make(call, target)
        except BenchmarkError as error:
            if name == "prsl":
                raise
            left_out[name] = str(error)
            continue
        kernels = analyse(compiled, call, place, options.target, options.path)
        found[name] = summarize(kernels, call, options.target, slow_share)
    if options.cuda_library:
        if not options.target.startswith("sm_"):
            raise BenchmarkError("--cuda-library: its code is NVIDIA's; choose a --target like sm_90")
        if not options.cuda_library.is_file():
            raise BenchmarkError(f"--cuda-library {options.cuda_library}: no such file")
        kernels = analyse_library(options.cuda_library, call, options)
        found["cuda-library"] = summarize(kernels, call, options.target, slow_share)
    import triton

    versions = {"triton": triton.__version__, **{name: machine.describe_machine()[name] for name in ("prsl", "commit")}}
    about = {"target": options.target, "dtype": call.dtype, "vocab": call.vocab, "k": call.k, "rows": call.rows}
    about["path"] = options.path
    return {**about, **versions, "assumed": ASSUMED, "implementations": found, "left_out": left_out}


def measure(options: argparse.Namespace) -> int:
    """Write and print everything; the exit status."""
    ahead_of_time.without_interpreter()
    call = Call(options.dtype, options.vocab, options.k, options.rows)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.dump or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = collect(options, folder)
        if options.dump:
            text = json.dumps(result, indent=1, allow_nan=False) + "\n"
            (folder / "machine_code.json").write_text(text, encoding="utf-8")
    print(f"{call.dtype} logits of {call.vocab:,} classes, k = {call.k}, for {options.target}")
    for name, summary in result["implementations"].items():
        print_implementation(name, summary, call)
    for name, reason in result["left_out"].items():
        print(f"\nleft out: {name} ({reason})")
    if any(summary["modelled"] for summary in result["implementations"].values()):
        print("\nassumed, where times are modelled:")
        for name, value in ASSUMED.items():
            print(f"  {name}: {value}")
    if options.dump:
        print(f"\nwritten to {folder}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return exit_status(lambda: measure(options), options.dump or Path())


if __name__ == "__main__":
    sys.exit(main())
