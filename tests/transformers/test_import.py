"""What importing the package does to a process: nothing that shows, loads little, needs no Triton."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hf_fastattn import IMPLEMENTATION
from hf_fastattn.continuous import CONTINUOUS, TAKES_PREFIX

ROOT = Path(__file__).resolve().parents[2]

BLOCKED_TRITON = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "triton":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Blocker())
"""

GENERATE = """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    import hf_fastattn

    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=None)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    ids = torch.randint(3, 64, (2, 9))
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.set_attn_implementation("fastattn")
    cache = hf_fastattn.PagedCache(model.config, block_size=16)
    out = model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=cache)
    assert torch.equal(out, wanted)
    assert cache.get_seq_length() == 16
"""


def _python(*scripts):
    """Run scripts, one after the other, in a fresh process; return it when it ended well."""
    program = "\n".join(textwrap.dedent(script) for script in scripts)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def _import():
    """Import the package in a fresh process; return what it printed, loaded and registered, and how long it took."""
    done = _python("""
        import json, sys, time
        from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
        modules = set(sys.modules)
        names = set(AttentionInterface().keys()), set(AttentionMaskInterface().keys())
        start = time.process_time()
        import hf_fastattn
        seconds = time.process_time() - start
        print("imported")
        print(json.dumps({
            "seconds": seconds,
            "modules": sorted(set(sys.modules) - modules),
            "attention": sorted(set(AttentionInterface().keys()) - names[0]),
            "masks": sorted(set(AttentionMaskInterface().keys()) - names[1]),
        }))
    """)
    printed, facts = done.stdout.split("imported\n")
    return json.loads(facts) | {"printed": printed + done.stderr}


@pytest.fixture(scope="module")
def imported():
    return _import()


def test_import_prints_nothing(imported):
    assert imported["printed"] == ""


def test_import_loads_no_kernels_and_nothing_big(imported):
    assert "hf_fastattn.attention" in imported["modules"]
    assert not [name for name in imported["modules"] if name.startswith("hf_fastattn.kernels")]
    big = {"triton", "lm_eval", "matplotlib", "accelerate", "pandas", "peft", "tqdm", "datasets"}
    assert not big & {name.split(".")[0] for name in imported["modules"]}


def test_import_registers_one_name_and_that_of_continuous_batching(imported):
    assert imported["attention"] == sorted([IMPLEMENTATION, CONTINUOUS])
    assert IMPLEMENTATION == "fastattn"
    assert imported["masks"] == ([IMPLEMENTATION] if TAKES_PREFIX else imported["attention"])
    assert "flash" not in IMPLEMENTATION  # transformers would look for a kernel package


def test_import_is_quick(imported):
    """One of three stays below half a second on top of transformers, which loads its big modules lazily."""
    seconds = [imported["seconds"]]
    while len(seconds) < 3 and min(seconds) > 0.5:
        seconds.append(_import()["seconds"])
    assert min(seconds) <= 0.5, seconds


def test_generate_on_a_cpu_loads_no_kernels():
    _python(GENERATE, """
        import sys
        assert not [name for name in sys.modules if name.startswith("hf_fastattn.kernels.")]
    """)  # fmt: skip


def test_package_works_without_triton():
    _python(BLOCKED_TRITON, GENERATE, """
        assert "triton" not in sys.modules
    """)  # fmt: skip
