"""Make the tasks' questions from the bundled model's held-out text, the same ones at every run.

    python eval/tasks/make_data.py

The held-out text is Python's standard library: Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved,
under the licence in examples/tiny-llama/LICENSE-PSF.txt. So are the lines of it in the files written here.
"""

import ast
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
HELD_OUT = FOLDER.parent.parent / "examples" / "tiny-llama" / "heldout.txt"
CONTEXT_LINES = 10
QUESTIONS = 48
PIECE_BYTES = (600, 1200, 2400, 4800)
"""Sizes of the texts to score, in turn: at the tokenizer's 3.5 bytes per token, the last is longer than the context."""


def code_lines(lines: list[str]) -> list[int]:
    """Return the indices of lines that stand on their own: code of a useful length with enough lines before it."""
    return [
        i
        for i, line in enumerate(lines)
        if i >= CONTEXT_LINES and 12 <= len(line.strip()) <= 60 and line.startswith("    ") and is_statement(line)
    ]


def is_statement(line: str) -> bool:
    """Return whether a line parses by itself or with a body, as prose and halves of statements do not."""
    try:
        node = ast.parse(line.strip() + (" pass" if line.endswith(":") else "")).body
    except SyntaxError:
        return False
    return bool(node) and not (isinstance(node[0], ast.Expr) and isinstance(node[0].value, ast.Constant | ast.Name))


def mixed_words(line: str, rng: random.Random, count: int = 3) -> list[str]:
    """Return other lines of the same indentation, words and signs, in other orders; fewer where there are no more."""
    parts = re.split(r"(\w+)", line)
    mixed: dict[str, None] = {}
    for _ in range(50):
        words = rng.sample(parts[1::2], len(parts) // 2)
        new = "".join(sign + word for sign, word in zip(parts[::2], [*words, ""], strict=True))
        if new != line and len(mixed) < count:
            mixed[new] = None
    return list(mixed)


def next_line_questions(lines: list[str], rng: random.Random) -> Iterable[dict[str, Any]]:
    """Yield a context, the next line among three with its words in other orders, and its index."""
    for i in rng.sample(code_lines(lines), QUESTIONS):
        choices = [lines[i], *mixed_words(lines[i], rng)]
        if len(choices) < 4:
            continue
        rng.shuffle(choices)
        context = "\n".join(lines[i - CONTEXT_LINES : i]) + "\n"
        yield {"context": context, "choices": choices, "answer": choices.index(lines[i])}


def line_completions(lines: list[str], rng: random.Random) -> Iterable[dict[str, Any]]:
    """Yield a context that ends inside a line, and the rest of that line.

    Lines are cut behind their last word, so that brackets and colons are left, or in front of it. Contexts differ in
    length, so that batches are padded.
    """
    candidates = [i for i in code_lines(lines) if re.search(r"\w\W+$", lines[i])]
    for i in rng.sample(candidates, QUESTIONS):
        last_word = list(re.finditer(r" ?\w+", lines[i]))[-1]
        cut = last_word.start() if rng.random() < 0.25 else last_word.end()
        context = [*lines[i - rng.randint(2, CONTEXT_LINES) : i], lines[i][:cut]]
        yield {"context": "\n".join(context), "rest": lines[i][cut:]}


def texts(lines: list[str], count: int = 12) -> Iterable[dict[str, Any]]:
    """Yield pieces of the source of several lengths, spread over it."""
    for k in range(count):
        start = k * len(lines) // count
        piece = ""
        for line in lines[start:]:
            if len(piece.encode()) + len(line.encode()) >= PIECE_BYTES[k % len(PIECE_BYTES)]:
                break
            piece += line + "\n"
        yield {"text": piece}


def main() -> None:
    """Write the three files."""
    lines = HELD_OUT.read_bytes().decode("utf-8").split("\n")
    data = {
        "next_line": next_line_questions(lines, random.Random(0)),
        "complete_line": line_completions(lines, random.Random(1)),
        "text": texts(lines),
    }
    for name, rows in data.items():
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (FOLDER / f"{name}.jsonl").write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
