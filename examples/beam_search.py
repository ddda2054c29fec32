"""Beam search over blocks: reordering beams moves rows of the block table, not keys and values.

python examples/beam_search.py                          # the bundled model, 4 beams
python examples/beam_search.py --model NAME --prompt "..." --beams 8 --max-new-tokens 60
"""

import sys

import torch
from loading import load, parser_for
from torch import Tensor

from hf_fastattn import CACHE_NAME, PagedCache

PROMPT = (
    "import os\nimport sys\n\n\ndef find_files(folder, suffix):\n"
    '    """Return the paths below a folder that end with a suffix, sorted by name."""\n'
    "    paths = []\n    for base, folders, names in os.walk(folder):\n        for name in names:\n"
)


class WatchedCache(PagedCache):
    """A PagedCache that counts what reordering moves and what it copies."""

    reorders = rows_moved = blocks_copied = dense_tokens = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder, and count: a row whose last block is another one than its source's got a copy of it."""
        tables = self.state.tables
        sources = [list(tables.rows[i]) for i in beam_idx.tolist()]
        self.dense_tokens += self.state.num_seqs * self.state.columns
        super().reorder_cache(beam_idx)
        self.reorders += 1
        self.rows_moved += sum(i != source for i, source in enumerate(beam_idx.tolist()))
        self.blocks_copied += sum(row[-1] != old[-1] for row, old in zip(tables.rows, sources, strict=True))


def main() -> None:
    """Search with a watched PagedCache and with transformers' default cache, show both."""
    parser = parser_for(__doc__)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--block-size", type=int, default=16, choices=[16, 32, 64, 128, 256])
    args = parser.parse_args()
    if args.beams < 2 or args.max_new_tokens < 2:
        sys.exit("beams are reordered from 2 of them and 2 new tokens on: pass larger --beams and --max-new-tokens")
    model, tokenizer = load(args)
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    options = {"num_beams": args.beams, "max_new_tokens": args.max_new_tokens, "do_sample": False}

    cache = WatchedCache(model.config, block_size=args.block_size)
    with torch.inference_mode():
        found = model.generate(**inputs, **options, **{CACHE_NAME: cache})[0]
        expected = model.generate(**inputs, **options, cache_implementation="dynamic")[0]
    print(f"{args.prompt}[{tokenizer.decode(found[inputs['input_ids'].shape[1] :], skip_special_tokens=True)}]\n")

    state = cache.state
    separate = sum(len(row) for row in state.tables.rows)
    in_use = len({block for row in state.tables.rows for block in row})
    print(f"{args.beams} beams of {state.columns} tokens, blocks of {args.block_size}; at the end of the search:")
    print(f"blocks as separate copies: {separate}\nblocks in use:             {in_use}\n")
    print(f"{cache.reorders} reorderings gave {cache.rows_moved} beams another beam's table row")
    print(f"tokens copied by them:       {cache.blocks_copied * args.block_size} (partly filled last blocks)")
    print(f"tokens a dense cache copies: {cache.dense_tokens} (every beam, every time)")
    print(f"same text as with transformers' default cache: {'yes' if torch.equal(found, expected) else 'no'}")


if __name__ == "__main__":
    main()
