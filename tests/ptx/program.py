"""PTX text as instructions in basic blocks."""

import re
from dataclasses import dataclass, field

_BITS = {"p": 1, "rs": 16, "r": 32, "rd": 64}
"""Register files by the letters of their registers."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: e.g. ``ld.global.v4.b32``.
        operands: as written; a vector or an address is one operand.
        predicate: register whose lanes take part, None for all.
        negated: the lanes whose predicate is false take part.
        where: file and line of the kernel's source.
    """

    opcode: str
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    where: str

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.predicate} " if self.predicate else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}"


@dataclass
class Program:
    """One kernel.

    Attributes:
        params: types of the parameters by name, in their order, e.g. ``u64``.
        num_threads: of a program.
        registers: number of registers of each file (p, rs, r, rd).
        blocks: basic blocks: nothing but the last instruction branches. Another ends behind every atomic.
        labels: the block that each label stands before.
    """

    params: dict[str, str] = field(default_factory=dict)
    num_threads: int = 0
    registers: dict[str, int] = field(default_factory=dict)
    blocks: list[list[Instruction]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def opcodes(self) -> set[str]:
        """All that occur."""
        return {each.opcode for block in self.blocks for each in block}


def parse(ptx: str) -> Program:
    """Return the kernel of a module that Triton wrote.

    Raises:
        ValueError: a line is none of those that Triton writes.
    """
    program, where = Program(), ""
    block: list[Instruction] = []
    depth = 0
    guard: tuple[str | None, bool] = (None, False)  # of a wait for a barrier, which Triton writes as a loop

    def end_block() -> None:
        nonlocal block
        if block:
            program.blocks.append(block)
            block = []

    for number, raw in enumerate(ptx.splitlines(), 1):
        line = raw.split("//")[0].strip()
        if found := re.match(r"\.param \.(\w+).*?(\w+_param_\d+)", line):
            program.params[found[2]] = found[1]
        elif found := re.match(r"\.reqntid (\d+)", line):
            program.num_threads = int(found[1])
        elif line == "{":
            depth += 1
        elif line == "}":
            depth, guard = depth - 1, (None, False)
            if depth == 0:
                break
        elif not depth or not line:
            continue
        elif depth > 1 and (found := re.match(r"@(!?)(%p\d+)\s+bra\.uni skipWait;$", line)):
            guard = found[2], not found[1]  # who does not skip the wait
        elif depth > 1 and line in (".reg .pred complete;", "waitLoop:", "skipWait:", "@!complete bra.uni waitLoop;"):
            continue
        elif depth > 1 and (found := re.match(r"(mbarrier\.try_wait[\w.:]*)\s+(complete,.*);$", line)):
            block.append(Instruction(found[1], tuple(_operands(found[2])), *guard, where))
        elif found := re.match(r"\.reg \.\w+\s+%(\w+?)<(\d+)>;", line):
            program.registers[found[1]] = int(found[2])
        elif line.startswith(".pragma"):
            continue
        elif line.startswith(".loc"):
            where = raw.partition("//")[2].strip() or where
        elif found := re.match(r"(\$\w+):", line):
            end_block()
            program.labels[found[1]] = len(program.blocks)
        elif found := re.match(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*);$", line):
            block.append(Instruction(found[3], tuple(_operands(found[4])), found[2], bool(found[1]), where))
            if found[3].split(".")[0] in ("bra", "ret", "atom"):
                end_block()
        else:
            raise ValueError(f"line {number} of the PTX is not understood: {raw!r}")
    end_block()
    missing = set(program.registers) - set(_BITS)
    if missing or not program.num_threads:
        raise ValueError(f"the PTX has registers %{missing} and {program.num_threads} threads, which is not understood")
    return program


def _operands(text: str) -> list[str]:
    """Split at the commas outside of braces and brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]
