"""Evaluate with lm-eval on fastattn, and count what was generated over a PagedCache.

    python examples/lm_eval_fastattn.py                          # the bundled model on the tasks in eval/tasks
    python examples/lm_eval_fastattn.py --model NAME --tasks arc_easy,gsm8k --limit 100 --batch-size 16

No code is needed for it: `python -m hf_fastattn run -m lm_eval --model hf --model_args
pretrained=NAME,attn_implementation=fastattn ...` does the same from the command line.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from hf_fastattn import CACHE_NAME, PagedCache

ROOT = Path(__file__).parent.parent


class CacheCounter:
    """Counts the caches that a model starts to fill, by type."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.counts: Counter[type] = Counter()
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get(CACHE_NAME)
        if cache is not None and cache.get_seq_length() == 0:
            self.counts[type(cache)] += 1


def main() -> None:
    """Evaluate, print lm-eval's table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "examples" / "tiny-llama"), help="a hub name or a folder")
    parser.add_argument("--tasks", default="py_offline", help="names of lm-eval tasks, separated by commas")
    parser.add_argument("--include-path", default=str(ROOT / "eval" / "tasks"), help="a folder with more tasks")
    parser.add_argument("--limit", type=int, default=None, help="questions per task; default: all")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="default: float32 on a CPU, else bfloat16")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("cuda was asked for, but PyTorch sees no GPU here: pass --device cpu")
    manager = TaskManager(include_path=args.include_path)
    tasks = args.tasks.split(",")
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        sys.exit(f"no task of the name {', '.join(unknown)}: `lm_eval ls tasks` and {args.include_path} have the names")
    dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    try:
        lm = HFLM(
            args.model, device=args.device, dtype=dtype, batch_size=args.batch_size, attn_implementation="fastattn"
        )
    except (OSError, ValueError) as error:
        sys.exit(f"cannot load the model {args.model!r}: {error}")
    caches = CacheCounter(lm.model)
    results = simple_evaluate(lm, tasks=tasks, limit=args.limit, task_manager=manager, bootstrap_iters=0)
    print(make_table(results))
    print(f"{args.model} in {dtype} on {args.device}, {lm.model.config._attn_implementation}")
    print(f"batches generated over a PagedCache: {caches.counts[PagedCache]}")


if __name__ == "__main__":
    main()
