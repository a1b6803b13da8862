"""What machine code would take on a GPU that is not there: occupancy, and a time that no unit can undercut.

Every figure that comes from here is modelled: the time of a kernel is that of its busiest resource, as if memory, the
schedulers and each pipeline were always busy and nothing ever waited. A measured time is longer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Chip:
    """A GPU. ``rates`` are lane-instructions per clock and SM, by the pipes of `sass.PIPES`."""

    name: str
    arch: str
    sms: int
    clock: float  # Hz, the boost clock
    bandwidth: float  # bytes per second, peak
    l2: int  # bytes
    shared: int  # bytes per SM that blocks can have
    rates: Mapping[str, int]


# Lane-instructions per clock and SM. "issue": four schedulers, one warp instruction each (the white papers of the three
# architectures). The others: "Throughput of Native Arithmetic Instructions" in NVIDIA's CUDA C++ Programming Guide (in
# the Best Practices Guide since CUDA 13), columns 8.0, 9.0 and 10.0: float32 add, multiply, fma 64, 128, 128; integer
# multiply-add, compare, minimum, maximum, shifts and logic 64; special functions 16; shuffles 32. The rows of the table
# are instructions of the source; which pipe an instruction of the machine is on is in sass.py. Assumptions:
# - integer addition takes the ALU (64);
# - float32 minimum and maximum are at 64 on 10.0, too, for which newer editions of the table say 128;
# - 32 lanes per clock for loads and stores, as for shuffles; the bytes are counted against memory alone.
_HOPPER = {"issue": 128, "fma": 128, "fma_heavy": 64, "alu": 64, "xu": 16, "lsu": 32}
_AMPERE = _HOPPER | {"fma": 64}

# SMs, boost clock, peak bandwidth and L2: NVIDIA's data sheets of the A100 80GB SXM and the H100 SXM, and the white
# papers; for the B200, of which NVIDIA publishes the bandwidth alone, what its users read from the device.
CHIPS = (
    Chip("A100 80GB SXM", "sm_80", 108, 1.410e9, 2.039e12, 40 * 2**20, 164 * 1024, _AMPERE),
    Chip("H100 SXM", "sm_90", 132, 1.755e9, 3.35e12, 50 * 2**20, 228 * 1024, _HOPPER),
    Chip("B200", "sm_100", 148, 1.850e9, 8.0e12, 126 * 2**20, 228 * 1024, _HOPPER),
)
# An assumption: what a copy reaches of the peak. Published copies get 0.88 to 0.94 on A100 and H100.
ACHIEVABLE = 0.9

# Technical specifications per compute capability in the Programming Guide: the same for 8.0, 9.0 and 10.0.
REGISTERS, WARPS, BLOCKS = 65_536, 64, 32
REGISTER_UNIT = 256  # registers are given to a warp in such units
RESERVED_SHARED = 1024  # of a block's shared memory, for the system


def occupancy(chip: Chip, threads: int, registers: int, shared: int) -> dict[str, Any]:
    """Blocks and warps that an SM holds at once, and what there is too little of for more.

    ``shared`` is what a block takes, without what the system reserves.
    """
    warps = math.ceil(threads / 32)
    per_warp = max(REGISTER_UNIT, math.ceil(registers * 32 / REGISTER_UNIT) * REGISTER_UNIT)
    limits = {
        "registers": REGISTERS // (per_warp * warps),
        "shared memory": chip.shared // (shared + RESERVED_SHARED),
        "warps": WARPS // warps,
        "blocks": BLOCKS,
    }
    limit = min(limits, key=lambda name: limits[name])
    blocks = limits[limit]
    return {"blocks": blocks, "warps": blocks * warps, "share": blocks * warps / WARPS, "limited_by": limit}


@dataclass(frozen=True)
class Work:
    """What one kernel does for one row of logits: bytes from and to memory, and lane-instructions by pipe."""

    name: str
    bytes: float
    lanes: Mapping[str, float]

    def scaled(self, share: float) -> Work:
        """For a share of the rows."""
        return Work(self.name, self.bytes * share, {pipe: number * share for pipe, number in self.lanes.items()})


def seconds(chip: Chip, work: Work, rows: int) -> dict[str, float]:
    """The time of each resource, for so many rows."""
    times = {"memory": rows * work.bytes / (chip.bandwidth * ACHIEVABLE)}
    for pipe, rate in chip.rates.items():
        times[pipe] = rows * work.lanes.get(pipe, 0) / (rate * chip.sms * chip.clock)
    return times


def model(chip: Chip, works: Sequence[Work], rows: int, floor_bytes: float) -> dict[str, Any]:
    """The modelled time of kernels that run one after the other, and how near it is to one read and one write.

    ``floor_bytes`` are a row's. Launches, the ends of grids and waiting cost nothing here.
    """
    kernels, total = [], 0.0
    for work in works:
        times = seconds(chip, work, rows)
        bound = max(times, key=lambda name: times[name])
        total += times[bound]
        microseconds = {name: time * 1e6 for name, time in times.items()}
        kernels.append({"kernel": work.name, "us": times[bound] * 1e6, "bound_by": bound, "resources_us": microseconds})
    floor = rows * floor_bytes / (chip.bandwidth * ACHIEVABLE)
    needed = rows * sum(work.bytes for work in works) / (chip.bandwidth * ACHIEVABLE)
    return {
        "label": "modelled",
        "chip": chip.name,
        "us": total * 1e6,
        "floor_us": floor * 1e6,
        "share_of_floor": floor / total if total else None,
        "memory_us": needed * 1e6,
        "share_of_memory": needed / total if total else None,
        "kernels": kernels,
    }
