"""Generate with a model that is split over several processes: each has its share of the heads, and of the cache.

torchrun --nproc-per-node 2 examples/tensor_parallel.py                    # the bundled model: gloo on CPUs, else NCCL
torchrun --nproc-per-node 2 examples/tensor_parallel.py --model NAME_OR_FOLDER

Nothing is asked of the user beyond the plan: a PagedCache is made for each call in every process, and its blocks
hold the key/value heads of that process. The number of key/value heads must be a multiple of the number of processes.
Layers spread over GPUs without processes (device_map="auto") work too: blocks and tables lie where each layer is.
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
from loading import TINY_MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from hf_fastattn import CACHE_NAME  # importing registers "fastattn"

PROMPT = 'def read_lines(path, encoding="utf-8"):\n    """Return the lines of a text file."""\n'


def main() -> None:
    """Load this process's share of the model, generate, and show the first process's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(TINY_MODEL), help="a hub name or a folder; default: the bundled model")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        sys.exit("start me with torchrun: torchrun --nproc-per-node 2 examples/tensor_parallel.py")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        distributed_config=DistributedConfig(tp_plan="auto"),
        attn_implementation="fastattn",
        dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False, return_dict_in_generate=True)
    heads = out[CACHE_NAME].layers[0].k_cache.shape[2]
    if dist.get_rank() == 0:
        print(tokenizer.decode(out.sequences[0], skip_special_tokens=True))
        total = model.config.num_key_value_heads
        print(f"\n{dist.get_world_size()} processes, {heads} of {total} key/value heads in the cache of each")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
