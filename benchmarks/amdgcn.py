"""AMD's machine code: what the assembly that LLVM writes says of a kernel and its loops."""

from __future__ import annotations

import re
from dataclasses import dataclass

from . import sass

_LABEL = re.compile(r"^(\.?\w+):")
_INSTRUCTION = re.compile(r"^\s+([a-z]\w+)(?:\s+([^;]*))?")
_KEYS = {
    "vgprs": "vgpr_count",
    "agprs": "agpr_count",
    "sgprs": "sgpr_count",
    "vgpr_spills": "vgpr_spill_count",
    "sgpr_spills": "sgpr_spill_count",
    "scratch_bytes": "private_segment_fixed_size",
    "lds_bytes": "group_segment_fixed_size",
}
_WIDTHS = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4}
PIPES = {"vector": "vector", "special function": "special", "scalar": "scalar", "memory": "memory", "lds": "lds"}
_SPECIAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")


@dataclass(frozen=True)
class Instruction(sass.Instruction):
    """One instruction; its address is its place in the text, and so are the targets of branches."""

    target: int | None = None

    @property
    def base(self) -> str:
        return {"s_endpgm": "EXIT", "s_nop": "NOP"}.get(self.opcode, self.opcode)

    @property
    def branch(self) -> int | None:
        return self.target

    @property
    def conditional(self) -> bool:
        return self.opcode.startswith("s_cbranch")

    @property
    def pipe(self) -> str:
        if self.opcode.startswith("s_"):
            return "scalar"
        if _SPECIAL.match(self.opcode):
            return "special function"
        return "vector" if self.opcode.startswith("v_") else "lds" if self.opcode.startswith("ds_") else "memory"

    @property
    def kind(self) -> str:
        return self.pipe

    @property
    def access(self) -> str:
        found = re.match(r"(?:global|buffer|flat)_(load|store)_", self.opcode)
        return found[1] if found else ""

    @property
    def width(self) -> int:
        name = re.sub(r"_(d16|d16_hi|hi)$", "", self.opcode.split("_d16")[0]).rpartition("_")[2]
        found = re.match(r"(dword)x(\d)$", name)
        return 4 * int(found[2]) if found else _WIDTHS.get(name, 4)


def resources(text: str) -> dict[str, int]:
    """Registers, spills and memory, from the metadata behind the code."""
    found = {name: re.search(rf"\.{key}:\s+(\d+)", text) for name, key in _KEYS.items()}
    return {name: int(match[1]) for name, match in found.items() if match}


def parse(text: str, name: str, arch: str) -> sass.Kernel:
    """The kernel's instructions, with branches resolved."""
    code = text.partition(f"\n{name}:")[2].partition(".Lfunc_end")[0]
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := _INSTRUCTION.match(line):
            found.append((instruction[1], (instruction[2] or "").strip()))
    instructions: list[sass.Instruction] = [
        Instruction(place, opcode, operands, target=labels.get(operands) if "branch" in opcode else None)
        for place, (opcode, operands) in enumerate(found)
    ]
    kernel = sass.Kernel(name, arch, instructions)
    numbers = resources(text)
    kernel.registers, kernel.stack = numbers.get("vgprs", 0), numbers.get("scratch_bytes", 0)
    kernel.shared = numbers.get("lds_bytes", 0)
    return kernel
