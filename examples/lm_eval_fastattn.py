"""Evaluate with lm-eval, generating over PagedCache.

    python examples/lm_eval_fastattn.py                          # the bundled model on the tasks in eval/tasks
    python examples/lm_eval_fastattn.py --model NAME --tasks arc_easy,gsm8k --limit 100 --batch-size 16

For fastattn alone no code is needed: `python -m hf_fastattn run -m lm_eval --model hf --model_args
pretrained=NAME,attn_implementation=fastattn ...` generates over transformers' default cache. A cache is an object that
lm-eval's command line cannot pass on to generate(), and every batch needs a fresh one; so a small subclass of lm-eval's
model hands it over.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

import hf_fastattn

ROOT = Path(__file__).parent.parent


class PagedHFLM(HFLM):
    """lm-eval's model for transformers, with fastattn and a fresh PagedCache for every batch it generates."""

    def __init__(self, pretrained: Any, **kwargs: Any) -> None:
        if isinstance(pretrained, str):
            kwargs.setdefault("attn_implementation", "fastattn")
        super().__init__(pretrained, **kwargs)
        self.last_cache: hf_fastattn.PagedCache | None = None
        self.batches = 0

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        self.last_cache = hf_fastattn.PagedCache(self.model.config)
        self.batches += 1
        return super()._model_generate(context, max_length, stop, past_key_values=self.last_cache, **kwargs)


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
        lm = PagedHFLM(args.model, device=args.device, dtype=dtype, batch_size=args.batch_size)
    except (OSError, ValueError) as error:
        sys.exit(f"cannot load the model {args.model!r}: {error}")
    results = simple_evaluate(lm, tasks=tasks, limit=args.limit, task_manager=manager, bootstrap_iters=0)
    print(make_table(results))
    print(f"{args.model} in {dtype} on {args.device}, {lm.model.config._attn_implementation}")
    print(f"batches generated over a PagedCache: {lm.batches}; the last one: {lm.last_cache}")


if __name__ == "__main__":
    main()
