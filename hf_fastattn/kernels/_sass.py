"""Machine code of compiled kernels: instructions, jumps and loops. For eval and tests, as kernels/_compile.py."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import triton


@dataclass(frozen=True)
class Sass:
    """A kernel's machine code.

    Attributes:
        instructions: their texts, predicates included.
        jumps: (from, to, whether it has a predicate) of each branch to a label, by index of the instructions.
    """

    instructions: list[str]
    jumps: list[tuple[int, int, bool]]

    @property
    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of each loop of more than one, as far as the last jump back to its first."""
        ends = {to: at for at, to, _ in self.jumps if to < at}
        return list(ends.items())

    @property
    def inner_loops(self) -> list[tuple[int, int]]:
        """The loops that hold no other loop."""
        return [(a, b) for a, b in self.loops if not any(a < begin and end <= b for begin, end in self.loops)]


def parse(text: str) -> Sass:
    """Read the output of ``nvdisasm -c`` of one kernel."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(found[1])
        elif found := re.match(r"(\.L\w+):", line):
            labels[found[1]] = len(instructions)
    jumps = [
        (at, labels[found[1]], instruction.startswith("@"))
        for at, instruction in enumerate(instructions)
        if (found := re.search(r"\bBRA\b.*`\((\.L\w+)\)", instruction)) and found[1] in labels
    ]
    return Sass(instructions, jumps)


def disassemble(kernel: Any) -> str:
    """Return the machine code of a kernel that Triton compiled, as text; Triton's wheel holds the disassembler."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
