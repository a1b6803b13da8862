"""What the machine code of one kernel says: resources, and for each loop what it is for and what it costs.

A loop's role is read from what it moves, since the code does not say how often it runs:

- ``stream``: it loads logits, and is taken for a sweep over the classes of a row;
- ``remainder``: the rounds that are left of an unrolled sweep;
- ``fill``: it only stores, as is done for ignored rows;
- ``search``: it touches no global memory;
- ``rows``: it goes from row to row, around sweeps;
- ``ragged``: it is for the ends of a row that are not aligned (of libraries alone, see :func:`mark_ragged`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from . import sass


def accesses(instructions: Sequence[sass.Instruction]) -> list[dict[str, Any]]:
    """The accesses to global memory by direction and width, the widest first."""
    found: dict[tuple[str, int], int] = {}
    for one in instructions:
        if one.access:
            found[one.access, one.width] = found.get((one.access, one.width), 0) + 1
    ordered = sorted(found.items(), key=lambda item: (item[0][0], -item[0][1]))
    return [{"access": access, "bytes": width, "count": number} for (access, width), number in ordered]


def count_loop(
    kernel: sass.Kernel, loop: sass.Loop, element_size: int, which: str, *, row_in_shared: bool
) -> dict[str, Any]:
    """One loop: what it is for, and its instructions and bytes per element of one iteration of one thread."""
    path, straight = kernel.path(loop, which), kernel.path(loop)
    moved = {access: sum(i.width for i in straight if i.access == access) for access in ("load", "copy", "store")}
    loaded = moved["load"] + moved["copy"]
    from_shared = not loaded and row_in_shared
    if from_shared:
        loaded = sum(i.width for i in straight if i.base == "LDS" and i.width >= 8)
    role = "stream" if loaded else "fill" if moved["store"] else "search"
    # One element is stored for each that is loaded; what is loaded beyond that are weights or statistics.
    both = loaded / 4 <= moved["store"] <= loaded
    elements = (moved["store"] if both else loaded or moved["store"]) / element_size
    counted: dict[str, Any] = {
        "address": f"0x{kernel.blocks[loop.header].instructions[0].address:04x}",
        "role": role,
        "innermost": loop.innermost,
        "depth": loop.depth,
        "instructions": len(path),
        "shortest_path": len(kernel.path(loop, "shortest")),
        "longest_path": len(kernel.path(loop, "longest")),
        "elements": elements,
        "searches": 0,
        "from_shared": from_shared,
        "accesses": accesses(kernel.body(loop)),
        "by_pipe": sass.count(path, "pipe"),
        "by_kind": sass.count(path, "kind"),
        "by_opcode": sass.count(path, "opcode"),
    }
    if elements:
        counted["per_element"] = {
            "instructions": len(path) / elements,
            "bytes_loaded": (moved["load"] + moved["copy"]) / elements,
            "bytes_stored": moved["store"] / elements,
        }
    return counted


def mark_rows(kernel: sass.Kernel, loops: Sequence[dict[str, Any]]) -> None:
    """A loop around sweeps that reads single numbers itself goes from row to row; it does not search.

    ``searches``: how many searches each loop is in.
    """
    pairs = list(zip(kernel.loops, loops, strict=True))
    for loop, counted in pairs:
        inside = [other for inner, other in pairs if inner is not loop and inner.header in loop.blocks]
        single = counted["accesses"] and all(one["bytes"] < 16 for one in counted["accesses"])
        if single and any(other["role"] in ("stream", "fill") for other in inside):
            counted["role"] = "rows"
    for loop, counted in pairs:
        around = [other for outer, other in pairs if outer is not loop and loop.header in outer.blocks]
        counted["searches"] = sum(other["role"] == "search" for other in around)


def mark_ragged(loops: Sequence[dict[str, Any]]) -> None:
    """Beside a loop with wide accesses, one with narrow ones is for the ends of a row, if the author says so."""
    wide = [loop for loop in loops if loop["role"] == "stream" and all(one["bytes"] >= 16 for one in loop["accesses"])]
    for loop in loops:
        moves = {one["access"] for one in loop["accesses"]}
        scalar = loop["role"] in ("stream", "fill") and moves and all(one["bytes"] < 16 for one in loop["accesses"])
        if scalar and any(moves <= {one["access"] for one in other["accesses"]} for other in wide):
            loop["role"] = "ragged"


def mark_remainders(loops: Sequence[dict[str, Any]]) -> None:
    """Of a loop that was unrolled, the rounds at its end (or at its start) are not another pass over the row."""

    def per_element(loop: Mapping[str, Any], pipe: str) -> float:
        return loop["by_pipe"].get(pipe, 0) / loop["elements"]

    for pair in itertools.pairwise(loops):
        large, small = sorted(pair, key=lambda loop: -loop["elements"])
        alike = all(loop["role"] == "stream" for loop in pair) and large["elements"] >= 2 * small["elements"]
        alike = alike and large["depth"] == small["depth"] and large["from_shared"] == small["from_shared"]
        alike = alike and {one["access"] for one in large["accesses"]} == {one["access"] for one in small["accesses"]}
        # The same arithmetic; what steers the loop counts more in the small one.
        if alike and all(abs(per_element(large, pipe) - per_element(small, pipe)) <= 0.25 for pipe in ("xu", "fma")):
            small["role"] = "remainder"


def count_kernel(
    kernel: sass.Kernel, element_size: int, which: str = "straight", *, ragged: bool = False
) -> dict[str, Any]:
    """Everything that the machine code of one kernel says; with ``ragged``, see :func:`mark_ragged`."""
    bulk = sum(i.base == "UBLKCP" for i in kernel.instructions)
    bodies = [kernel.body(loop) for loop in kernel.loops]
    filled = any({"LDG", "STS"} <= {i.base for i in body if i.width >= 8} for body in bodies)
    row_in_shared = bulk > 0 or filled or any(i.base == "LDGSTS" for i in kernel.instructions)
    loops = [count_loop(kernel, loop, element_size, which, row_in_shared=row_in_shared) for loop in kernel.loops]
    mark_rows(kernel, loops)
    mark_remainders(loops)
    if ragged:
        mark_ragged(loops)
    outside = kernel.outside()
    unknown = sorted({i.opcode for i in kernel.instructions if i.base in ("BRX", "JMX", "CALL")})
    return {
        "kernel": kernel.name,
        "arch": kernel.arch,
        "registers": kernel.registers,
        "stack_bytes": kernel.stack,
        "local_bytes": kernel.local,
        "static_shared_bytes": kernel.shared,
        "local_memory": kernel.spills,
        "spills": any(kernel.spills.values()) or kernel.stack > 0 or kernel.local > 0,
        "bulk_copies": bulk,  # to shared memory, of a size that the code does not say
        "loops": loops,
        "outside": {
            "instructions": len(outside),
            "accesses": accesses(outside),
            "by_pipe": sass.count(outside, "pipe"),
        },
        "not_followed": unknown,  # calls and indirect branches, whose instructions are not counted
    }


def narrow(kernel: Mapping[str, Any]) -> list[str]:
    """The accesses to global memory that are not 128 bits wide, in loops over the classes."""
    return [
        f"{kernel['kernel']} {loop['address']}: {one['count']} x {one['access']} of {one['bytes']} bytes"
        for loop in kernel["loops"]
        for one in loop["accesses"]
        if one["bytes"] < 16 and loop["role"] not in ("rows", "ragged", "not counted")
    ]
