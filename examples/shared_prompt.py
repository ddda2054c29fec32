"""One system prompt under many questions: computed once and forked, then found again by a prefix store.

python examples/shared_prompt.py                        # the bundled model
python examples/shared_prompt.py --model NAME --system FILE --picture blocks.png
"""

import sys
from pathlib import Path

import torch
from loading import load, parser_for

import hf_fastattn

SYSTEM = (
    '"""Small helpers for text.\n\nEvery function takes a string and returns a new one."""\n\n'
    "import re\n\n\ndef squeeze(text):\n"
    '    """Return the text with each run of white space replaced by one space."""\n'
    '    return re.sub(r"\\s+", " ", text).strip()\n\n\n'
)
QUESTIONS = ["def reverse(text):\n", "def count_words(text):\n", "def upper_first(text):\n", "def is_empty(text):\n"]


def main() -> None:
    """Answer questions behind one system prompt in three ways, and compare what each computes and stores."""
    parser = parser_for(__doc__)
    parser.add_argument("--system", type=Path, help="a text file; default: the beginning of a Python module")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--picture", type=Path, help="draw who owns which block of the forked cache")
    args = parser.parse_args()
    if args.system is not None and not args.system.is_file():
        sys.exit(f"expected a text file as --system, got {args.system}")
    model, tokenizer = load(args)
    system = SYSTEM if args.system is None else args.system.read_text(encoding="utf-8")
    prompts = tokenizer([system + question for question in QUESTIONS], return_tensors="pt", padding=True)
    prompts = {name: prompts[name].to(model.device) for name in ("input_ids", "attention_mask")}
    # The rows begin with the same tokens, so their padding, if any, has to be behind them: ask for equal lengths.
    shortest = int(prompts["attention_mask"].sum(1).min())
    ids = torch.stack([row[mask.bool()][:shortest] for row, mask in zip(*prompts.values(), strict=True)])
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
    options |= {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0}
    common = int((ids == ids[:1]).all(0).cumprod(0).sum())

    with torch.inference_mode():
        separate = model.generate(ids, **options)
        parent = hf_fastattn.PagedCache(model.config, block_size=16)
        model(ids[:1, :common], **{hf_fastattn.CACHE_NAME: parent})
        forked = model.generate(ids, **{hf_fastattn.CACHE_NAME: parent.fork(len(ids))}, **options)
        store = hf_fastattn.PrefixStore(model, block_size=16)
        for row in ids:  # one after the other, as they come
            one = options | {"attention_mask": torch.ones_like(row[None])}
            cache = store.cache(row[None])
            store.add(cache, model.generate(row[None], **{hf_fastattn.CACHE_NAME: cache}, **one).sequences)

    stats, tokens = store.stats(), ids.numel()
    print(f"{len(ids)} prompts of {ids.shape[1]} tokens, the first {common} of them the same")
    print(
        f"prompt tokens computed: {tokens} separately, {common + len(ids) * (ids.shape[1] - common)} with a fork, "
        f"{stats.asked - stats.reused} one by one with a prefix store"
    )
    print(f"separately: {separate[hf_fastattn.CACHE_NAME].stats()}")
    print(f"forked:     {forked[hf_fastattn.CACHE_NAME].stats()}")
    print(f"same text: {'yes' if torch.equal(separate.sequences, forked.sequences) else 'no'}")
    if args.picture is not None:
        hf_fastattn.plot_blocks(forked[hf_fastattn.CACHE_NAME]).savefig(args.picture)


if __name__ == "__main__":
    main()
