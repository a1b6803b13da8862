"""NVIDIA machine code: what cuobjdump says of a kernel, its loops, and which unit executes what.

Blocks and loops are those of the control flow graph (natural loops, by dominators), not of the order of the text, so a
loop that is entered by a jump, left in its middle or closed by a predicated branch is one all the same.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from .report import BenchmarkError

_LINE = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*);"
)
_FUNCTION = re.compile(r"^\s*Function : (?P<name>\S+)")
_ARCH = re.compile(r"^\s*code for (?P<arch>sm_\w+)")
_USAGE = re.compile(r"\b(REG|STACK|SHARED|LOCAL):(\d+)")
_THREADS = re.compile(r"EIATTR_(REQNTID|MAX_THREADS)\s*\n.*\n\s*Value:\s*(0x\w+) (0x\w+) (0x\w+)")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")

# Which pipeline executes an instruction: Nsight Compute's Profiling Guide, "Pipelines" (ALU: bits, logic, compare,
# minimum, select, integers but for IMAD, and the fast conversion of float32 to 16 bits; FMA: float32 and 16-bit
# arithmetic; FMA heavy: integer multiplications; XU: special functions and conversions between int and float). What is
# not listed counts as ALU, so that an unknown instruction is not free.
_PIPES = {
    "fma": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 FADD32I FMUL32I FFMA32I HADD2 HMUL2 HFMA2 HADD2_32I HFMA2_32I",
    "fma_heavy": "IMAD IMAD32I IMUL IDP IDP4A",
    "xu": "MUFU F2F F2I I2F FRND I2I POPC FLO BREV",
    "lsu": "LD ST LDG STG LDS STS LDL STL LDGSTS LDSM STSM ATOM ATOMG ATOMS RED REDG SHFL MATCH UBLKCP",
    # The schedulers alone, as far as is known.
    "issue": "BAR BRA BREAK BRX BSSY BSYNC CALL CCTL CCTLL DEPBAR ELECT ERRBAR EXIT FENCE JMP LDC LDCU LDGDEPBAR "
    "MEMBAR NANOSLEEP NOP PREEXIT ACQBULK R2UR RET S2R S2UR CS2R CS2UR SYNCS VOTE VOTEU WARPSYNC YIELD ENDCOLLECTIVE",
}
PIPE_OF = {opcode: pipe for pipe, opcodes in _PIPES.items() for opcode in opcodes.split()}
PIPES = ("issue", "fma", "fma_heavy", "alu", "xu", "lsu")

# What the instructions are for, in the counts that are shown.
_CLASSES = {
    "compare/select": "FMNMX FMNMX3 FSETP FSEL FSET SEL ISETP IMNMX VIMNMX VIMNMX3 HMNMX2 HSETP2 HSET2 VIADDMNMX PLOP3",
    "special function": "MUFU",
    "conversion": "F2F F2FP F2I I2F I2FP FRND I2I F2IP I2IP",
    "float arithmetic": _PIPES["fma"],
    "global memory": "LDG STG LD ST LDGSTS ATOMG ATOM RED REDG UBLKCP",
    "shared memory": "LDS STS LDSM STSM ATOMS",
    "local memory": "LDL STL",
    "across lanes": "SHFL VOTE MATCH REDUX",
    "control": _PIPES["issue"],
}
# What is in two of them belongs to the first.
CLASS_OF = {opcode: name for name, opcodes in reversed(_CLASSES.items()) for opcode in opcodes.split()}

_GLOBAL = {"LDG": "load", "STG": "store", "LD": "load", "ST": "store", "LDGSTS": "copy"}
_NEVER_FALLS = ("EXIT", "RET", "BRX", "JMX", "JMP", "BPT", "KILL")


@dataclass(frozen=True)
class Instruction:
    """One line of the disassembly."""

    address: int
    opcode: str
    operands: str = ""
    predicate: str = ""

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def pipe(self) -> str:
        """The pipeline, or "issue" if only the scheduler is kept busy; uniform instructions are among these."""
        return PIPE_OF.get(self.base, "issue" if self.base.startswith("U") else "alu")

    @property
    def kind(self) -> str:
        return CLASS_OF.get(self.base, "uniform" if self.base.startswith("U") else "integer and bits")

    @property
    def branch(self) -> int | None:
        """The address that a branch may go to."""
        found = _TARGET.search(self.operands) if self.base == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def conditional(self) -> bool:
        """Whether the next instruction may follow, too: a predicate, or a condition among a branch's operands."""
        guarded = self.predicate not in ("", "PT", "UPT")
        return guarded or (self.base == "BRA" and "," in self.operands)

    @property
    def width(self) -> int:
        """Bytes that one lane moves; 4 unless the opcode says otherwise."""
        parts = self.opcode.split(".")
        for part in parts[1:]:
            if part in ("U8", "S8", "U16", "S16", "32", "64", "128", "256"):
                return int(part.lstrip("US")) // 8
        return 4

    @property
    def access(self) -> str:
        """ "load", "store" or "copy" (to shared memory) if it touches global memory, else nothing."""
        return _GLOBAL.get(self.base, "")


@dataclass
class Block:
    """Instructions that are executed one after the other."""

    instructions: list[Instruction]
    fall: int | None = None  # the block that follows where no branch is taken
    jump: int | None = None

    @property
    def successors(self) -> list[int]:
        """The blocks that may follow, the straight way first."""
        return [number for number in (self.fall, self.jump) if number is not None]


@dataclass
class Loop:
    """One natural loop. Instructions of loops inside of it are theirs."""

    header: int
    blocks: set[int]
    own: set[int] = field(default_factory=set)
    depth: int = 0
    innermost: bool = True


@dataclass
class Kernel:
    """One function of a cubin."""

    name: str
    arch: str
    instructions: list[Instruction]
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    threads: int | None = None  # a block's, where the code says so

    @property
    def spills(self) -> dict[str, int]:
        """Accesses to local memory: spilled registers, and arrays that are indexed."""
        return {name: sum(i.base == base for i in self.instructions) for name, base in LOCAL_ACCESSES}

    @cached_property
    def blocks(self) -> list[Block]:
        return split_blocks(self.instructions)

    @cached_property
    def loops(self) -> list[Loop]:
        return find_loops(self.blocks)

    def outside(self) -> list[Instruction]:
        """What is in no loop, and can be reached: executed at most once by each thread."""
        inside = {number for loop in self.loops for number in loop.blocks}
        reached = _reachable(self.blocks)
        numbers = [number for number in range(len(self.blocks)) if number in reached and number not in inside]
        return [i for number in numbers for i in self.blocks[number].instructions if i.base != "NOP"]

    def body(self, loop: Loop) -> list[Instruction]:
        """All instructions of a loop, on every path."""
        return [i for number in sorted(loop.own) for i in self.blocks[number].instructions]

    def path(self, loop: Loop, which: str = "straight") -> list[Instruction]:
        """One iteration, on one of `PATHS`."""
        return iteration(self.blocks, loop, which)


LOCAL_ACCESSES = (("loads", "LDL"), ("stores", "STL"))


def tool(name: str) -> Path:
    """A program of the CUDA toolkit: the one in Triton's wheel, or that of the system."""
    spec = find_spec("triton")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "backends" / "nvidia" / "bin" / name
        if path.is_file():
            return path
    if found := shutil.which(name):
        return Path(found)
    raise BenchmarkError(f"{name} is missing: it comes with pip install triton, or with the CUDA toolkit")


def read(path: Path, arch: str | None = None) -> list[Kernel]:
    """The kernels of a cubin, an object file or a library; of one architecture (sm_90, which sm_90a is, too) if given.

    Raises:
        BenchmarkError: there is no machine code, or none for this architecture.
    """

    def run(*options: str) -> str:
        done = subprocess.run([tool("cuobjdump"), *options, path], capture_output=True, text=True)
        if done.returncode:
            raise BenchmarkError(f"cuobjdump {' '.join(options)} {path}: {(done.stderr or done.stdout).strip()[-300:]}")
        return done.stdout

    everything = parse(run("-sass"))
    kernels = [kernel for kernel in everything if arch is None or re.fullmatch(f"{arch}[af]?", kernel.arch)]
    if not kernels:
        there = ", ".join(sorted({kernel.arch for kernel in everything})) or "none at all"
        raise BenchmarkError(f"{path}: no machine code for {arch or 'a GPU'} in it, but {there}")
    only = [] if path.suffix == ".cubin" else ["-arch", kernels[0].arch]
    usage, details = run(*only, "-res-usage"), run(*only, "-elf")
    for kernel in kernels:
        found = re.search(rf"Function {re.escape(kernel.name)}:\s*\n(.*)", usage)
        numbers = dict(_USAGE.findall(found[1])) if found else {}
        kernel.registers, kernel.stack = int(numbers.get("REG", 0)), int(numbers.get("STACK", 0))
        kernel.shared, kernel.local = int(numbers.get("SHARED", 0)), int(numbers.get("LOCAL", 0))
        kernel.threads = _threads(details, kernel.name)
    return kernels


def _threads(details: str, name: str) -> int | None:
    """The block's size that a kernel was compiled for, from the section of its attributes."""
    section = re.search(rf"^\.nv\.info\.{re.escape(name)}\b(.*?)(?=^\.\w)", details, re.MULTILINE | re.DOTALL)
    found = _THREADS.search(section[1]) if section else None
    if not found:
        return None
    x, y, z = (int(number, 16) for number in found.groups()[1:])
    return x * y * z


def readable(name: str) -> str:
    """A C++ function's name with its template arguments, where c++filt is installed."""
    if not name.startswith("_Z") or not shutil.which("c++filt"):
        return name
    text = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    depth, end = 0, len(text)
    for place, character in enumerate(text):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0 and not text.startswith("(anonymous", place):
            end = place
            break
    return text[:end].removeprefix("void ").replace("(anonymous namespace)::", "")


def parse(text: str) -> list[Kernel]:
    """The functions of cuobjdump's disassembly."""
    kernels: list[Kernel] = []
    arch = ""
    for line in text.splitlines():
        if found := _LINE.match(line):
            if kernels:
                operands = found["operands"].strip()
                instruction = Instruction(
                    int(found["address"], 16), found["opcode"], operands, found["predicate"] or ""
                )
                kernels[-1].instructions.append(instruction)
        elif found := _FUNCTION.match(line):
            kernels.append(Kernel(found["name"], arch, []))
        elif found := _ARCH.match(line):
            arch = found["arch"]
    return [kernel for kernel in kernels if kernel.instructions]


def split_blocks(instructions: Sequence[Instruction]) -> list[Block]:
    """The basic blocks in the order of their addresses, with what may follow each.

    A call comes back, so the next instruction follows it; where an indirect branch goes is not known.
    """
    place = {instruction.address: number for number, instruction in enumerate(instructions)}
    leaders = {0}
    for number, instruction in enumerate(instructions):
        if instruction.branch is not None or instruction.base in _NEVER_FALLS:
            leaders.add(number + 1)
        if instruction.branch in place:
            leaders.add(place[instruction.branch])
    starts = sorted(leader for leader in leaders if leader < len(instructions))
    block_at = {start: number for number, start in enumerate(starts)}
    blocks = []
    for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True):
        last = instructions[end - 1]
        block = Block(list(instructions[start:end]))
        if last.branch in place:
            block.jump = block_at[place[last.branch]]
        ends = last.branch is not None or last.base in _NEVER_FALLS
        if end < len(instructions) and (last.conditional or not ends):
            block.fall = block_at[end]
        blocks.append(block)
    return blocks


def _reachable(blocks: Sequence[Block]) -> set[int]:
    seen, waiting = {0}, [0]
    while waiting:
        new = [number for number in blocks[waiting.pop()].successors if number not in seen]
        seen.update(new)
        waiting += new
    return seen


def find_loops(blocks: Sequence[Block]) -> list[Loop]:
    """The natural loops, outer ones before those inside of them."""
    reached = sorted(_reachable(blocks))
    before: dict[int, set[int]] = {number: set() for number in reached}
    for number in reached:
        for successor in blocks[number].successors:
            before[successor].add(number)
    everything = set(reached)
    dominators = dict.fromkeys(reached, everything) | {0: {0}}
    changed = True
    while changed:
        changed = False
        for number in reached[1:]:
            common = set.intersection(*(dominators[other] for other in before[number])) | {number}
            if common != dominators[number]:
                dominators[number], changed = common, True
    loops: dict[int, Loop] = {}
    for number in reached:
        for header in blocks[number].successors:
            if header in dominators[number]:
                members = {header, *_into(before, number, header)}
                loops.setdefault(header, Loop(header, set())).blocks |= members
    ordered = sorted(loops.values(), key=lambda loop: (-len(loop.blocks), loop.header))
    for loop in ordered:
        inside = [other for other in ordered if other is not loop and other.header in loop.blocks - {loop.header}]
        loop.own = loop.blocks - {number for other in inside for number in other.blocks}
        loop.innermost = not inside
        loop.depth = sum(loop.header in other.blocks for other in ordered if other is not loop)
    return sorted(ordered, key=lambda loop: (loop.header, loop.depth))


def _into(before: dict[int, set[int]], last: int, header: int) -> Iterator[int]:
    """The blocks from which ``last`` can be reached without passing ``header``."""
    seen, waiting = {header}, [last]
    while waiting:
        number = waiting.pop()
        if number not in seen:
            seen.add(number)
            waiting += before[number]
            yield number


def _steps(blocks: Sequence[Block], loop: Loop) -> dict[int, list[int | None]]:
    """What may follow each block within one iteration; None where the iteration is complete.

    Branches back to the start of a loop inside are left out: it is passed once, and its instructions count nothing.
    """
    steps: dict[int, list[int | None]] = {}
    order = _postorder(blocks, loop)
    rank = {number: place for place, number in enumerate(order)}
    for number in order:
        steps[number] = []
        for successor in blocks[number].successors:
            if successor == loop.header:
                steps[number].append(None)
            elif successor in rank and rank[successor] < rank[number]:
                steps[number].append(successor)
    # Only what leads to a complete iteration: the others leave the loop.
    for number in order:
        steps[number] = [step for step in steps[number] if step is None or steps[step]]
    return steps


def _postorder(blocks: Sequence[Block], loop: Loop) -> list[int]:
    """The loop's blocks such that each comes after all that may follow it in the same iteration."""
    order: list[int] = []
    seen = {loop.header}
    waiting = [(loop.header, iter(blocks[loop.header].successors))]
    while waiting:
        number, successors = waiting[-1]
        new = next((s for s in successors if s in loop.blocks and s not in seen), None)
        if new is None:
            order.append(number)
            waiting.pop()
        else:
            seen.add(new)
            waiting.append((new, iter(blocks[new].successors)))
    return order


PATHS = ("straight", "shortest", "longest")


def iteration(blocks: Sequence[Block], loop: Loop, path: str = "straight") -> list[Instruction]:
    """The instructions of one iteration, but for those of loops inside, on one of `PATHS`.

    The straight one takes no branch unless the iteration needs it.
    """
    steps = _steps(blocks, loop)
    best: dict[int | None, tuple[int, int | None]] = {None: (0, None)}  # the length from here on, and the next block
    for number in _postorder(blocks, loop):
        if steps[number]:
            own = sum(i.base != "NOP" for i in blocks[number].instructions) if number in loop.own else 0
            if path == "straight":
                # Further on in the iteration before back to its start: `continue` is the exception.
                after = next((step for step in steps[number] if step is not None), None)
            else:
                choose = min if path == "shortest" else max
                after = choose(steps[number], key=lambda step: best[step][0])
            best[number] = (own + best[after][0], after)
    found: list[Instruction] = []
    here: int | None = loop.header
    while here is not None:
        if here in loop.own:
            found += blocks[here].instructions
        here = best[here][1]
    return [instruction for instruction in found if instruction.base != "NOP"]


def count(instructions: Iterable[Instruction], by: str) -> dict[str, int]:
    """How many instructions there are of each pipe, kind or opcode, the most frequent first."""
    counts: dict[str, int] = {}
    for instruction in instructions:
        name = getattr(instruction, by)
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
