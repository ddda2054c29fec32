"""Which launch configs a GPU takes, that those for little shared memory fit it, and what happens if one does not.

Also what a launch compiles anew for: never for a longer block table.
"""

import os
import types
import warnings

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from eval.compile_report import spills
from hf_fastattn.kernels import decode_attention, decode_schedule, packed_attention, prefill_attention, store_kv
from hf_fastattn.kernels._compile import compile_case
from hf_fastattn.kernels._launch import SHARED_BYTES, SMALL, Unsupported, configs_of, device_arch
from hf_fastattn.ops import _library

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process without TRITON_INTERPRET=1", allow_module_level=True)

pytestmark = pytest.mark.compile

SMALL_GPUS = (86, 120)
"""sm_89 compiles as sm_86 does: the largest cases show it."""

LIMIT = 101376
"""Bytes of shared memory that a program can have on sm_86, sm_89 and sm_120."""

MODULES = (decode_attention, decode_schedule, packed_attention, prefill_attention, store_kv)

CASES = [
    pytest.param(case, gpu, module is decode_attention, id=f"{module.__name__.split('.')[-1]}-{case.name}-sm{gpu}")
    for module in MODULES
    for case in module.compile_cases(SMALL)
    for gpu in (*SMALL_GPUS, *((89,) if "d256" in case.name or "rows128" in case.name else ()))
]


@pytest.mark.parametrize(("case", "gpu", "decodes"), CASES)
def test_configs_for_little_shared_memory_fit_and_do_not_spill(case, gpu, decodes):
    result = compile_case(case, gpu)
    assert result.shared_bytes <= LIMIT
    assert not spills(result)
    if decodes:
        assert result.shared_bytes // case.info["tile_bytes"] >= 2  # one is loaded while another is multiplied


@pytest.mark.parametrize("rows", [4, 32])
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 256), (torch.float16, 256), (torch.bfloat16, 16)])
def test_other_sizes_fit_little_shared_memory(dtype, head_dim, rows):
    case = decode_attention._compile_case(SMALL, dtype, head_dim, rows, 64)
    assert compile_case(case, SMALL).shared_bytes <= LIMIT


@pytest.mark.parametrize(
    ("capability", "shared_bytes", "arch"),
    [
        (75, 65536, SMALL),
        (80, 166912, 80),
        (86, LIMIT, SMALL),
        (87, 166912, 80),
        (89, LIMIT, SMALL),
        (90, 232448, 90),
        (90, 65536, SMALL),
        (100, 232448, 100),
        (103, 232448, 100),
        (120, LIMIT, SMALL),
        (121, LIMIT, SMALL),
    ],
)
def test_configs_follow_from_shared_memory_as_well(capability, shared_bytes, arch):
    assert configs_of(capability, shared_bytes) == arch
    assert SHARED_BYTES[arch] <= shared_bytes or arch == SMALL


@pytest.mark.parametrize(
    ("capability", "shared_bytes", "arch", "known"),
    [
        ((8, 9), LIMIT, SMALL, True),
        ((12, 0), LIMIT, SMALL, True),
        ((9, 0), 232448, 90, True),
        ((8, 7), 166912, 80, False),
    ],
)
def test_a_device_says_how_much_shared_memory_it_has(monkeypatch, capability, shared_bytes, arch, known):
    """An unknown GPU brings one warning."""
    properties = types.SimpleNamespace(shared_memory_per_block=49152, shared_memory_per_block_optin=shared_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device_arch.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert [device_arch(torch.device("cuda", 0)) for _ in range(2)] == [arch, arch]
        assert len(caught) == (not known)
    finally:
        device_arch.cache_clear()


@pytest.mark.parametrize("error", [OutOfResources(110592, LIMIT, "shared memory"), Unsupported("not this one")])
def test_a_launch_that_cannot_be_goes_to_pytorch_with_one_warning(monkeypatch, error):
    def launch(*args):
        raise error

    monkeypatch.setattr(decode_attention, "launch", launch)
    _library._warn_slow.cache_clear()
    on_cuda = _library._kernel_or("decode_attention", lambda *args: ("pytorch", *args))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [on_cuda(1, 2) for _ in range(2)] == [("pytorch", 1, 2)] * 2
    assert [str(w.message) for w in caught] == [f"decode_attention runs through PyTorch, slower: {error}"]
    _library._warn_slow.cache_clear()


def test_other_errors_of_a_launch_are_errors(monkeypatch):
    def launch(*args):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(decode_attention, "launch", launch)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        _library._kernel_or("decode_attention", lambda *args: None)(1)


def test_a_longer_block_table_compiles_nothing_anew():
    """Widths of one entry, of a multiple of 16 and others are one kernel."""
    made = [decode_attention._compile_case(90, torch.bfloat16, 128, 4, 64, max_blocks=n) for n in (1, 2, 16, 17)]
    for name in ("signature", "constexprs", "divisible"):
        assert all(getattr(case, name) == getattr(made[0], name) for case in made[1:]), name


@pytest.mark.parametrize(
    "kernel",
    [
        decode_attention._decode_kernel,
        decode_schedule._schedule_kernel,
        prefill_attention.prefill_attention_kernel,
        store_kv.store_kv_kernel,
    ],
    ids=lambda kernel: kernel.__name__,
)
def test_what_changes_from_call_to_call_is_not_specialized(kernel):
    changing = {
        "query_len",
        "seq_len",
        "max_len",
        "max_blocks",
        "window",
        "num_seqs",
        "num_query_tiles",
        "num_row_tiles",
    }
    changing |= {"stride_table_seq", "stride_mask_seq", "stride_pos_seq"}
    assert [p.name for p in kernel.params if p.name in changing and not p.do_not_specialize] == []
