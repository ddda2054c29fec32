"""warmup: compile what generate() will need on a model before anybody waits for it.

Triton compiles a kernel at its first launch for a combination of dtype, head sizes, options and batch size, and
transformers compiles the decode step in the second call of a size. The one decision: nothing is predicted. The model
itself runs, through generate(), on prompts of a few tokens that take every way through the ops.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .compile_policy import compiling_at_once
from .generate import CACHE_NAME
from .ops import MAX_DECODE_QUERY_LEN

PROMPT = 24
"""Tokens of a prompt; a kernel serves every length."""

NEW_TOKENS = 3


def warmup(
    model: Any,
    *,
    batch_sizes: Sequence[int] = (1,),
    max_length: int = 1024,
    candidates: int = 0,
    disable_compile: bool = False,
    progress: bool = True,
) -> int:
    """Run a model until all kernels of its generate() calls are compiled, and the compiled decode step is recorded.

    Afterwards the model has an idle pool for the largest of these calls; :func:`hf_fastattn.release` frees it.

    Args:
        model: on "fastattn" from an Auto class, or given to :func:`hf_fastattn.paged`.
        batch_sizes: rows of the calls to come, returned sequences included.
        max_length: columns of these calls, prompt and new tokens together.
        candidates: tokens that an assistant or prompt lookup will propose at once; 0 for no such calls.
        disable_compile: leave the decode step to eager PyTorch, as in generate().
        progress: show a progress bar.

    Returns:
        The calls of generate() made: 0 on a CPU, where there is nothing to compile.

    Raises:
        ValueError: a batch size below 1, or a max_length that has no room for a prompt and its tokens.

    Tests: tests/test_warmup.py.
    """
    from tqdm import tqdm  # not while the package is imported

    least = 2 * (PROMPT + NEW_TOKENS) + MAX_DECODE_QUERY_LEN
    if not batch_sizes or min(batch_sizes) < 1 or max_length < least:
        raise ValueError(
            f"expected batch sizes of at least 1 and a max_length of at least {least}, got {list(batch_sizes)} and "
            f"{max_length}"
        )
    if not _compiles(model.device):
        tqdm.write(f"warmup: nothing to compile on {model.device.type}, PyTorch's own kernels run there", sys.stderr)
        return 0
    jobs = [job for size in batch_sizes for job in _jobs(size, candidates)]
    with torch.no_grad(), compiling_at_once(model):  # few tokens, so that compiling would not pay otherwise
        for name, rows in tqdm(jobs, desc="warmup", unit="call", disable=not progress):
            cache = _run(model, name, rows, max_length, disable_compile)
            if name == "candidates":
                _check_candidates(model, cache, candidates)
    return len(jobs)


def _jobs(rows: int, candidates: int) -> Iterator[tuple[str, int]]:
    """Yield the calls for a batch size: (what for, rows)."""
    yield "prompt", rows
    yield "prompt", rows  # the decode step is compiled from the second call on
    yield "second turn", rows  # many queries over blocks
    if rows > 1:
        yield "padding", rows
    if candidates and rows == 1:  # all that transformers' assisted generation takes
        yield "candidates", rows


def _check_candidates(model: Any, cache: Any, candidates: int) -> None:
    """Run every number of queries with which proposals are checked."""
    for queries in range(2, candidates + 2):
        model(torch.ones(1, queries, dtype=torch.long, device=model.device), use_cache=True, **{CACHE_NAME: cache})
        cache.crop(-queries)


def _run(model: Any, name: str, rows: int, max_length: int, disable_compile: bool) -> Any:
    """Generate a few tokens, in a cache for max_length columns; return the cache."""
    columns = PROMPT
    ids = torch.ones(rows, columns, dtype=torch.long, device=model.device)
    ids[:, -1] = torch.arange(rows) % model.get_input_embeddings().num_embeddings  # else one row would do for all
    mask = torch.ones_like(ids)
    if name == "padding":
        mask[0, : PROMPT // 2] = 0
    cache = None
    for turn in range(2 if name == "second turn" else 1):
        if turn:
            columns = ids.shape[1] + MAX_DECODE_QUERY_LEN + 1
            ids = ids.new_ones(rows, columns)
            mask = torch.ones_like(ids)
        out = model.generate(
            ids,
            attention_mask=mask,
            **{CACHE_NAME: cache},
            max_length=max_length,
            stopping_criteria=[_after(columns + NEW_TOKENS)],
            do_sample=False,
            num_beams=1,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            disable_compile=disable_compile or name == "candidates",
        )
        ids, cache = out.sequences, out[CACHE_NAME]
    return cache


def _after(columns: int) -> Any:
    """Return a stopping criterion: so many columns."""

    def stop(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= columns, device=input_ids.device)

    return stop


def _compiles(device: torch.device) -> bool:
    return device.type == "cuda"
