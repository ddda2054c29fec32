"""Faults that only show in compiled kernels, and faults of the machine that runs them (tests/ptx)."""

from .faults import Fault

KERNELS = ("tests/ptx/test_kernels.py", "-k", "sm_80 or sm_90")
PREFILL = ("tests/ptx/test_kernels.py", "-k", "prefill")
MACHINE = ("tests/ptx/test_machine.py",)
MEMORY = "tests/ptx/memory.py"


def _faults(file: str, tests: tuple[str, ...], *faults: tuple[str, str, str]) -> list[Fault]:
    return [Fault(f"ptx: {name}", file, old, new, tests) for name, old, new in faults]


PTX_FAULTS = [
    *_faults(
        "hf_fastattn/kernels/_decode_combine.py",
        KERNELS,
        ("lanes sum other roundings of one product", "return tl.math.fma(a, b, 0.0)", "return a * b"),
    ),
    *_faults(
        "hf_fastattn/kernels/_prefill_tiles.py",
        PREFILL,
        (
            "the table is read past its end by loads ahead",
            "entry = tl.minimum(start // KV_BLOCK_SIZE, max_blocks - 1)",
            "entry = start // KV_BLOCK_SIZE",
        ),
    ),
    *_faults(
        "tests/ptx/traffic.py",
        MACHINE,
        ("bank conflicts are not seen", "np.bincount(words % BANKS).max()", "np.bincount(words % BANKS).min()"),
        (
            "a sector is as large as an access",
            "np.arange(0, size, piece)) // SECTOR",
            "np.arange(0, size, piece)) // size",
        ),
    ),
    *_faults(
        MEMORY,
        MACHINE,
        ("reads of shared memory do not wait", 'self._by_others(self._written[where], now), "read', 'now < 0, "read'),
        ("writes of shared memory do not wait", 'self._by_others(self._read[where], now), "wr', 'now < 0, "wr'),
        ("copies land at once", "        self._filling[where] = True\n", ""),
        ("other programs' words are seen at once", "if constant or not memory.is", "if constant and not memory.is"),
        ("global memory needs no barriers within a program", "return epoch < who.epoch or warp == by", "return True"),
        ("what an atomic saw is seen by all warps at once", "if acquirer == by]", "]"),
        ("memory has no end", "part.begin <= address.min() and address.max() + size <= part.end", "True"),
    ),
    *_faults(
        "tests/ptx/machine.py",
        MACHINE,
        ("all threads follow the first", "if (found != found[0]).any():", "if False:"),
        ("threads that skip a branch lose registers", "values[:, waiting] = before[name][:, waiting]", "pass"),
        ("copies need not be waited for", "if self._issued or any(self._groups) or any(self._products):", "if False:"),
    ),
    *_faults(
        "tests/ptx/arithmetic.py",
        MACHINE,
        ("integers are shifted without their sign", "kinds[-1], np.right_shift", '"u" + kinds[-1][1:], np.right_shift'),
        ("NaN is less than all", "np.logical_not(function(a, b), out=target)", "np.less_equal(a, b, out=target)"),
    ),
    *_faults(
        "tests/ptx/tensor_memory.py",
        (*MACHINE, "-k", "tensor_memory"),
        ("stores to tensor memory arrive at once", "self._stored[cells] = UNDER_WAY", "pass"),
        ("products are done at once", "self._busy[cells] += 1\n", "pass\n"),
        ("barriers report nothing", "            state.reports.append(self._commits)\n", ""),
        ("tensor memory is kept", "if self.columns or self._issued", "if self._issued"),
    ),
    *_faults(
        "tests/ptx/matrix.py",
        MACHINE,
        ("rows of a result exchanged", "lane // 4 + 8 * (register // 2 % 2)", "lane // 4 + 8 * (register % 2)"),
        ("bfloat16 is cut off", "rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16", "rounded = bits >> 16"),
    ),
]
