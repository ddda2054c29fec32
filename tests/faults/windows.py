"""Seeded faults in what stops growing (sliding windows, finished rows) and in what threads share."""

from .faults import Fault

STATE, CACHE = "hf_fastattn/paged_state.py", "hf_fastattn/cache.py"
DENSE = "hf_fastattn/dense_reading.py"
STORE, LOCK = "hf_fastattn/prefix_store.py", "hf_fastattn/pool_lock.py"
TORCH, GENERATION = "hf_fastattn/ops/_torch.py", "hf_fastattn/paged_generation.py"
CONFIG = "hf_fastattn/model_config.py"
WINDOWS, FINISHED, THREADS = (f"tests/test_{name}.py" for name in ("windows", "finished", "threads"))


def _in(file: str, tests: tuple[str, ...], *faults: tuple[str, str, str]) -> list[Fault]:
    return [Fault(name, file, old, new, tests) for name, old, new in faults]


WINDOW_FAULTS = [
    *_in(
        STATE,
        (WINDOWS, "-k", "not runTest and not ops_read"),
        ("blocks behind a window stay", "if self.frees and step.attended and", "if False and"),
        ("a block too many is freed", "seq_len - reach for seq_len", "seq_len - reach + self.block_size for seq_len"),
        ("no margin behind the window", "reach = self.window - 1 + WINDOW_MARGIN", "reach = self.window - 1"),
        ("crop goes behind freed blocks", "if not self.can_go_back(columns):", "if False:"),
        ("a converted cache frees what nobody has looked at", "self.frees and step.attended and", "self.frees and"),
        ("a layer may look further back", "if self.frees and window > self.window:", "if False:"),
        (
            "places of freed blocks are taken for blocks",
            "return [[block for block in row if block != NO_BLOCK] for row in self.tables.rows]",
            "return self.tables.rows",
        ),
        (
            "a fork forgets the window",
            "            window=self.window,\n        )\n        twin",
            "        )\n        twin",
        ),
    ),
    *_in(
        DENSE,
        (WINDOWS, "-k", "dense or mask or another or keep_prefix"),
        ("dense readers get another's keys", "missing = (~stored | (slots < 0))", "missing = (~stored)"),
        (
            "masks may show freed keys",
            "if bool((shown & (stored & (slots < 0))",
            "if False and bool((shown & (stored & (slots < 0))",
        ),
    ),
    *_in(
        CACHE,
        (WINDOWS, "-k", "dense or mask or another or keep_prefix"),
        ("keep_prefix keeps what is gone", "if not self.state.can_go_back(kept):", "if False:"),
    ),
    *_in(
        TORCH,
        (WINDOWS, "-k", "ops"),
        (
            "the window's first token is not read",
            "max(position - window + 1, 0) // size",
            "(max(position - window, 0) + size) // size",
        ),
        ("the mask is not moved with the keys", "key_mask[row : row + 1, first * size :]", "key_mask[row : row + 1]"),
        ("positions are not moved with the keys", "positions = positions - first * size", "pass"),
    ),
    *_in(
        STORE, (WINDOWS, "-k", "store"), ("a chain with a gap", "if child is None and block == NO_BLOCK:", "if False:")
    ),
    *_in(
        CONFIG,
        (WINDOWS, "-k", "window_counts"),
        ("a full layer does not count", 'if window and all(kind == "sliding', 'if window and any(kind == "sliding'),
    ),
    *_in(
        STATE,
        (FINISHED,),
        ("finished rows keep their blocks", "            self.tables.empty(newly)\n", "            pass\n"),
    ),
    *_in(
        CACHE,
        (WINDOWS,),
        (
            "freed blocks are counted in a view",
            "tokens = step.lens[0] - runs.freed * self.state.block_size",
            "tokens = step.lens[0]",
        ),
    ),
    *_in(
        "hf_fastattn/columns.py",
        (FINISHED,),
        ("finished rows go on growing", "        self.finished = list(finished)\n", "        self.finished = None\n"),
        (
            "columns of finished rows count as seen",
            "            self.seen[emptied] = self.stored[emptied] = False\n",
            "            pass\n",
        ),
        (
            "rows that are chosen rest on",
            "        self.finished = None\n        self.seen = None if self.seen is None else self.seen[list(index)]\n",
            "        self.seen = None if self.seen is None else self.seen[list(index)]\n",
        ),
    ),
    *_in(
        GENERATION,
        (FINISHED,),
        (
            "rows rest under returned caches",
            "if steps and rows > 1 and unseen and not foreign:",
            "if steps and rows > 1 and not foreign:",
        ),
        ("real tokens rest", 'any(hasattr(criterion, "eos_token_id") for criterion in criteria)', "criteria"),
        ("a finished row is forgotten", "done if self.finished is None else self.finished | done", "done"),
        ("a GPU is asked at every step", "self.calls % LOOK_EVERY == 0", "True"),
    ),
    *_in(
        LOCK,
        (THREADS,),
        (
            "growth does not wait",
            "while any(thread != me and in_forward_pass(thread) for thread in others()):",
            "while False:",
        ),
        ("growth waits for passes that failed", "thread != me and in_forward_pass(thread)", "thread != me"),
        ("new passes go before growth", "        while self._growing:\n            self._wait()", "        pass"),
        (
            "garbage is freed in the middle",
            "self._dropped.extend(rows)",
            "[self._free(row) for row in rows]",
        ),
    ),
    *_in(
        STATE,
        (THREADS,),
        ("two threads use one cache", "elif self.thread != me and in_forward_pass(self.thread):", "elif False:"),
    ),
]
