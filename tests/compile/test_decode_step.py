"""A decode step as inductor writes it for an H100: launches per layer, no copy of a pool, CUDA graphs not refused.

No GPU is needed. The model, its cache and the step's inputs are fake CUDA tensors, what inductor asks of the device is
answered as an H100 would, and its Triton kernels are compiled for sm_90; nothing is launched. All of that happens in a
process of its own, because inductor keeps what it was told. Counts come as a slope between two numbers of layers.
"""

import contextlib
import ctypes
import inspect
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import types
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process without TRITON_INTERPRET=1", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("fakes the GPU, which is there: see tests/gpu", allow_module_level=True)

pytestmark = pytest.mark.compile

FEW, MANY = 2, 3

H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=80 * 2**30,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
"""
"""A CPU build of PyTorch has no guard for CUDA devices, without which no fake CUDA tensor can be viewed."""

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}


class CannotFake(Exception):
    """This PyTorch has something else where a probe of the device is replaced."""


@dataclass(frozen=True)
class Code:
    """What inductor made of a step.

    Attributes:
        text: the Python that runs it.
        static: inputs whose addresses do not change from step to step.
        mutated: inputs that it writes to.
        skips: reasons against CUDA graphs that inductor gave.
        compiled: Triton kernels of inductor's that were compiled for sm_90.
        pool: shape of one layer's keys.
    """

    text: str
    static: tuple[int, ...]
    mutated: tuple[int, ...]
    skips: tuple[str, ...]
    compiled: tuple[str, ...]
    pool: tuple[int, ...]

    @property
    def lines(self):
        """The statements of the function that is captured."""
        [body] = re.findall(r"^def (?:partition_\d+|call)\(args\):\n(.*?)^\S", self.text, re.MULTILINE | re.DOTALL)
        return [line.strip() for line in body.splitlines() if not line.lstrip().startswith("#")]

    @property
    def launches(self):
        """Count the calls by kind."""
        kinds = {
            "generated": r"triton_\w+\.run\(",
            "products": r"extern_kernels\.(mm|addmm|bmm)\(",
            "attention": r"\w+ = torch\.ops\.hf_fastattn\.decode_attention\.",
            "schedules": r"\w+ = torch\.ops\.hf_fastattn\.decode_schedule\.",
            "others": r"(\w+ = )?(torch\.ops|aten|extern_kernels)\.",
        }
        found = (next((kind for kind, text in kinds.items() if re.match(text, line)), None) for line in self.lines)
        return Counter(kind for kind in found if kind)


class _Driver:
    """Triton's view of an H100: kernels are compiled and loaded nowhere."""

    class launcher_cls:
        def __init__(self, src, metadata):
            pass

    class utils:
        load_binary = staticmethod(lambda name, kernel, shared, device: (1, 1, 32, 0, 1024))
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132})

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def _load_guard(folder):
    """Register a guard that does nothing for CUDA devices."""
    root = Path(torch.__file__).parent
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    paths = [f"-I{root / 'include'}", f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}"]
    command = ["c++", "-std=c++20", "-shared", "-fPIC", *paths, str(source), "-lc10", "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    ctypes.CDLL(str(library))


def _h100(stack):
    """Let PyTorch, inductor and Triton take this machine for one with an H100, until the stack is closed."""
    import torch._inductor.runtime.triton_helpers as helpers
    import torch._inductor.utils as inductor_utils
    from torch._dynamo import device_interface
    from torch._subclasses import fake_tensor
    from triton.runtime import driver

    always = {
        "get_device_properties": H100,
        "get_device_capability": (9, 0),
        "current_device": 0,
        "device": contextlib.nullcontext(),
        "device_count": 1,
        "is_available": True,
        "synchronize": None,
        "set_rng_state": None,
        "get_rng_state": torch.get_rng_state(),
        "_lazy_init": None,
        "is_current_stream_capturing": False,
    }
    interface = {
        "current_device": 0,
        "set_device": None,
        "device_count": 1,
        "synchronize": None,
        "get_device_properties": H100,
        "get_raw_stream": 0,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "is_bf16_supported": True,
        "get_compute_capability": 90,
    }

    def give(owner, answers, make=lambda function: function, **kwargs):
        for name, answer in answers.items():
            function = make(lambda *_args, answer=answer, **_kwargs: answer)
            stack.enter_context(mock.patch.object(owner, name, function, **kwargs))

    try:
        give(torch.cuda, always)
        stack.enter_context(mock.patch.object(torch.version, "cuda", torch.version.cuda or "12.8"))
        give(device_interface.CudaInterface, interface, staticmethod)
        workers = {name: interface[name] for name in ("current_device", "set_device", "get_device_properties")}
        give(device_interface.CudaInterface.Worker, workers, staticmethod)
        # Of the bandwidth and speed of an H100, by which inductor decides whether to try padded products.
        give(inductor_utils, {"get_gpu_dram_gbps": 3352, "get_device_tflops": 989})
        give(torch._C, {"_cuda_getCurrentRawStream": 0, "_cuda_cudaCachingAllocator_is_enabled": True}, create=True)
        give(helpers, {"set_driver_to_gpu": None})
        give(fake_tensor, {"init_gpu_context": None})
        stack.enter_context(mock.patch.object(fake_tensor.FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(mock.patch.object(driver, "_active", _Driver()))
    except AttributeError as error:
        raise CannotFake(f"PyTorch {torch.__version__}: {error}") from error


class _Done(BaseException):
    """Everything was compiled; raised where the step would be captured, or would not."""


def _code(folder, config_name, sizes, num_seqs, *, compile_kernels, options=None):
    """Return what inductor writes for a decode step; in a process that is used for nothing else.

    Args:
        folder: for files.
        config_name: of the model's config in transformers.
        sizes: its arguments.
        num_seqs: rows of the batch.
        compile_kernels: compile inductor's Triton kernels too.
        options: for inductor, in place of the mode that generate() asks for.
    """
    with contextlib.ExitStack() as stack:
        if not torch.cuda._is_compiled():
            _load_guard(folder)
        _h100(stack)
        return _fake_step(stack, config_name, sizes, num_seqs, compile_kernels, options)


def _fake_step(stack, config_name, sizes, num_seqs, compile_kernels, options):
    import transformers
    from torch._inductor import async_compile, compile_fx, output_code
    from torch._inductor import config as inductor_config
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._device import DeviceContext
    from transformers import CompileConfig

    from hf_fastattn import PagedCache
    from hf_fastattn.generate import CACHE_NAME

    texts, skips, compiled, captures = [], [], [], []

    def capture(_model, static_input_idxs=(), **kwargs):
        captures.append((tuple(static_input_idxs), tuple(kwargs["mutated_input_idxs"])))
        raise _Done

    def skip(reason):
        skips.append(reason)
        raise _Done

    real = async_compile.AsyncCompile.triton

    def triton(self, name, *args, **kwargs):
        kernel = real(self, name, *args, **kwargs) if compile_kernels else None
        assert not compile_kernels or kernel.launchers, f"{name} was not compiled"
        compiled.append(name)
        return kernel

    for owner, name, value in (
        (compile_fx, "cudagraphify", capture),
        (GraphLowering, "save_output_code", staticmethod(texts.append)),
        (async_compile.AsyncCompile, "triton", triton),
        (output_code, "log_cudagraph_skip_and_bump_counter", skip),
    ):
        stack.enter_context(mock.patch.object(owner, name, value))
    settings = {"force_disable_caches": True, "use_static_cuda_launcher": False, "compile_threads": 1}
    stack.enter_context(inductor_config.patch(settings))

    mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    stack.enter_context(torch.no_grad())
    config = getattr(transformers, config_name)(**sizes, attn_implementation="fastattn")
    device = stack.enter_context(contextlib.ExitStack())
    device.enter_context(DeviceContext(torch.device("cuda")))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    device.close()
    cache = PagedCache(model.config, max_length=1024)
    token, position = (torch.ones(num_seqs, 1, dtype=torch.long, device="cuda") for _ in range(2))
    inputs = {"input_ids": token, CACHE_NAME: cache, "use_cache": True}
    model(**inputs)
    assert mode.is_our_fake(cache.layers[0].k_cache)
    setting = CompileConfig(fullgraph=True).to_dict()
    if options is not None:
        setting |= {"mode": None, "options": options | {"triton.cudagraphs": True}}
    step = torch.compile(model.__call__, **setting)
    with contextlib.suppress(_Done):
        step(**inputs, position_ids=position, attention_mask=None, logits_to_keep=1, return_dict=True)
    if not captures:
        captures.append(((), ()))
    [text], [(static, mutated)] = texts, captures
    return Code(text, static, mutated, tuple(skips), tuple(compiled), tuple(cache.layers[0].k_cache.shape))


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The code for FEW layers, whose kernels are compiled, and for MANY; two sequences."""
    if shutil.which("c++") is None and not torch.cuda._is_compiled():
        pytest.skip("needs a C++ compiler, for a guard for CUDA devices")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        calls = {}
        for layers in (FEW, MANY):
            folder, sizes = tmp_path_factory.mktemp("step"), LLAMA_8B | {"num_hidden_layers": layers}
            calls[layers] = pool.submit(_code, folder, "LlamaConfig", sizes, 2, compile_kernels=layers == FEW)
        try:
            return {layers: call.result() for layers, call in calls.items()}
        except CannotFake as error:
            pytest.skip(str(error))


def test_launches_per_layer_and_step(steps):
    """Between the products of a layer: two norms, queries' rotary embedding, keys' with both stores, activation."""
    few, many = steps[FEW].launches, steps[MANY].launches
    per_layer = {kind: (many[kind] - few[kind]) / (MANY - FEW) for kind in many | few}
    assert per_layer == {"generated": 5, "products": 7, "attention": 1, "schedules": 0}
    beside = {kind: few[kind] - FEW * count for kind, count in per_layer.items()}
    by_product = " @ " in inspect.getsource(
        LlamaRotaryEmbedding.forward
    )  # angles, in transformers 5.17: one launch more
    assert beside == {"generated": 4 + by_product, "products": 1 + by_product, "attention": 0, "schedules": 1}


def test_one_kernel_stores_keys_and_values_of_a_layer(steps):
    for layers, code in steps.items():
        pools = [
            re.search(r"decode_attention\.default\(\w+, (\w+), (\w+),", line).groups()
            for line in code.lines
            if "= torch.ops.hf_fastattn.decode_attention." in line
        ]
        assert len(set(pools)) == layers
        for pool in pools:
            users = [line for line in code.lines if ".run(" in line and re.search(rf"\b({'|'.join(pool)})\b", line)]
            assert len(users) == 1
            assert all(re.search(rf"\b{name}\b", users[0]) for name in pool)
            assert "index_put" in users[0]


def test_no_pool_is_copied(steps):
    for code in steps.values():
        made = [re.search(r"empty_strided\w*\(\((.*?)\)", line) for line in code.lines]
        sizes = [[int(size) for size in found[1].split(",") if size.strip()] for found in made if found]
        assert sizes  # a size with a symbol is not a number
        assert max(map(math.prod, sizes)) < math.prod(code.pool)


def test_nothing_speaks_against_cuda_graphs(steps):
    for layers, code in steps.items():
        assert code.skips == ()
        assert len(code.mutated) == 2 * layers + 3  # pools, past_lens, seq_lens and columns
        assert set(code.mutated) <= set(code.static)


def test_kernels_compile_for_sm_90(steps):
    code = steps[FEW]
    assert set(code.compiled) == set(re.findall(r"(triton_\w+)\.run\(", "\n".join(code.lines)))
