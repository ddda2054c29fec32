"""PrefixStore: keys and values of finished sequences, kept so that generate() prefills only what is new.

A tree of blocks over one pool. A node's key is a sha256 over its parent's key and its tokens; the root's is one over
all else that keys and values depend on (weights, dtype, active adapters) and the tenant's salt. A hit is believed only
when the tokens are equal too. Source of the idea: Zheng et al., "SGLang: Efficient Execution of Structured Language
Model Programs", 2024 (a tree of prefixes), in the block form of PagedAttention. The one decision: only prefixes from a
sequence's first token on are kept, whose positions are then the same in every call.
"""

import hashlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .block_pool import NO_BLOCK
from .cache import BLOCK_SIZE, PagedCache
from .kv_pool import KVPool, LayerBlocks
from .model_config import text_config
from .pool_lock import locked

SAMPLES = 16
"""Elements of each weight that are compared, see PrefixStore."""

PLACEHOLDERS = tuple(f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index"))
"""What configs call the tokens that stand for something else."""


@dataclass(eq=False)
class _Node:
    """One block of a known prefix; a root has none. Children that are filled in part have no children themselves."""

    key: bytes
    tokens: tuple[int, ...]
    block: int
    parent: "_Node | None"
    children: dict[bytes, "_Node"] = field(default_factory=dict)
    partial: list["_Node"] = field(default_factory=list)
    used: int = 0

    @property
    def is_leaf(self) -> bool:
        return not self.children and not self.partial


@dataclass(frozen=True)
class PrefixStats:
    """What a store did so far.

    Attributes:
        asked: tokens that caches were asked for. reused: those of them that were known.
        kept_blocks: blocks in the store at the moment. evicted_blocks: blocks that it gave up.
    """

    asked: int
    reused: int
    kept_blocks: int
    evicted_blocks: int

    @property
    def hit_rate(self) -> float:
        """Share of the tokens that were known."""
        return self.reused / self.asked if self.asked else 0.0


class PrefixStore:
    """Keep the blocks of finished sequences of one model and hand them out to prompts that begin the same way.

    ::

        store = hf_fastattn.PrefixStore(model)
        cache = store.cache(input_ids, attention_mask)
        out = model.generate(input_ids, attention_mask=attention_mask, past_key_values=cache)
        store.add(cache, out)

    Args:
        model: the model; changed weights, dtypes or adapters make everything kept for the old ones unreachable. Of
            weights that were written through ``.data`` some elements are compared. clear() where only few have changed,
            or forward hooks change what the model computes.
        max_tokens: tokens kept at most; the least recently used ones go first, blocks that a cache uses never.
        num_blocks: blocks of the pool under the store and its caches, fixed; None lets it grow.
        block_size: tokens per block.

    Raises:
        ValueError: a bad size, a model that a PagedCache refuses, or one whose rotary embedding depends on the length
            of the sequence, so that equal prefixes have different keys.
    """

    def __init__(
        self, model: nn.Module, *, max_tokens: int = 2**16, num_blocks: int | None = None, block_size: int = BLOCK_SIZE
    ) -> None:
        if max_tokens < block_size:
            raise ValueError(f"max_tokens must be at least one block of {block_size} tokens, got {max_tokens}")
        config: Any = model.config
        self.config = text_config(config)
        rope = str(getattr(self.config, "rope_parameters", None) or getattr(self.config, "rope_scaling", None))
        if "dynamic" in rope or "longrope" in rope:
            raise ValueError("the model's rotary embedding depends on the sequence's length: prefixes cannot be reused")
        PagedCache(config, block_size=block_size, num_blocks=num_blocks)  # the checks of sizes and model
        self.model, self.max_tokens = model, max_tokens
        self._placeholders = {token for name in PLACEHOLDERS if (token := getattr(config, name, None)) is not None}
        self.pool = KVPool(block_size, num_blocks, [LayerBlocks() for _ in range(self.config.num_hidden_layers)])
        self.pool.users.add(self)
        self.lock = self.pool.lock
        self._roots: dict[bytes, tuple[str, _Node]] = {}
        self._clock = 0
        self._asked = self._reused = self._evicted = 0

    @locked
    def cache(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, salt: str = "", copies: int = 1, **sizes: Any
    ) -> PagedCache:
        """Return a cache that holds the longest known prefix of each prompt, to be passed to generate().

        All prompts of a batch continue in the same column. A prompt whose known prefix reaches further than another's
        uses it up to there. At least one column of each prompt is left to be computed.

        Args:
            input_ids: (num_seqs, columns) prompts.
            attention_mask: (num_seqs, columns), 0 at padding; None when there is none.
            salt: the tenant, and whatever keys depend on besides the tokens; nothing is shared between different salts.
            copies: sequences per prompt (num_beams, num_return_sequences).
            sizes: max_length and reserve of :class:`~hf_fastattn.PagedCache`.

        Raises:
            BlockPoolExhausted: no room for the partly filled last blocks. ValueError: shapes that do not fit, or tokens
                that stand for images, videos or audio, without a salt.
        """
        real = _real_tokens(input_ids, attention_mask)
        if not salt and any(self._placeholders.intersection(tokens) for tokens, _ in real):
            raise ValueError(
                "a prompt has tokens that stand for an image, a video or audio, which its keys depend on: give its "
                "content a name in salt"
            )
        root = self._root(salt)
        cache = PagedCache(self.config, pool=self.pool, sequences_per_prompt=copies, **sizes)
        rows, ends = [], []
        for tokens, columns in real:
            blocks, count = self._match(root, tokens[:-1])
            rows.append(blocks)
            ends.append(columns[count] if columns else input_ids.shape[1])  # the first column to be computed
            if columns and cache.state.padding.keep_hidden:  # holes are stored too: only what is before fits
                gap = next((i for i, column in enumerate(columns) if column != columns[0] + i), len(columns))
                ends[-1] = min(ends[-1], columns[0] + gap)
        end = min(ends, default=0)
        lens = [sum(column < end for column in columns) for _, columns in real]
        cache.state.prefix_hits = (sum(len(tokens) for tokens, _ in real), sum(lens))
        self._asked += cache.state.prefix_hits[0]
        self._reused += cache.state.prefix_hits[1]
        if end and any(lens):
            size = self.pool.block_size
            index = [i for i in range(len(rows)) for _ in range(copies)]
            seen = torch.ones(len(rows), end, dtype=torch.bool)
            if attention_mask is not None:
                seen = attention_mask[:, :end].to("cpu", torch.bool)
            with cache.explain_exhaustion():
                cache.state.adopt(
                    [rows[i][: -(-lens[i] // size)] for i in index], [lens[i] for i in index], seen=seen[index]
                )
            for layer in cache.paged_layers:
                layer.is_initialized = layer.blocks.k_cache is not None
        cache.state.prefix_root, cache.state.prefix_columns = root, input_ids.shape[1]
        return cache

    @locked
    def add(self, cache: PagedCache, token_ids: Tensor) -> int:
        """Keep what a cache of this store holds; the cache may go on being used.

        After beam search only the prompts are kept: what is returned is sorted, and not the rows of the cache.

        Args:
            cache: made by :meth:`cache` of this store.
            token_ids: (num_seqs, at least the cache's columns) the tokens of its sequences, prompts included: what
                generate() returned.

        Returns:
            Blocks that were not known before.

        Raises:
            ValueError: a cache of another origin, or too few tokens.
        """
        state = cache.state
        state.sync()
        if state.memory is not self.pool or state.prefix_root is None:
            raise ValueError("expected a cache that this store's cache() made")
        if token_ids.shape[0] != state.num_seqs or token_ids.shape[1] < state.columns:
            raise ValueError(
                f"expected the tokens of {state.num_seqs} sequences and at least {state.columns} columns, got "
                f"{tuple(token_ids.shape)}"
            )
        root, new = state.prefix_root, 0
        if not self._is_current(root):
            return 0
        columns = min(state.columns, state.prefix_columns) if state.reordered else state.columns
        for row, blocks in enumerate(state.tables.rows):
            tokens = token_ids[row, :columns].tolist()
            known = [tokens[column] for column in state.padding.prefix(row) if column < columns]
            new += self._insert(root, known, blocks)
        self._evict(self._kept() - self.max_tokens // self.pool.block_size)
        return new

    @locked
    def clear(self) -> None:
        """Forget everything; caches keep what they use."""
        for node in list(self._nodes()):
            self.pool.ids.free([node.block])
        self._roots.clear()

    @locked
    def stats(self) -> PrefixStats:
        """Return hits and misses so far, and what is kept."""
        return PrefixStats(self._asked, self._reused, self._kept(), self._evicted)

    def block_rows(self) -> Sequence[Sequence[int]]:
        """Return the kept blocks, each branch together."""
        rows = []
        todo = [root for _, root in self._roots.values()]
        while todo:
            node: _Node | None = todo.pop()
            row = []
            while node is not None:
                if node.parent is not None:
                    row.append(node.block)
                below = [*node.children.values(), *node.partial]
                node = below[0] if below else None
                todo += below[1:]
            rows.append(row)
        return rows

    def renumber(self, moved: Mapping[int, int]) -> None:
        """Follow the pool when it has grown."""
        for node in self._nodes():
            node.block = moved.get(node.block, node.block)

    def reclaim(self, count: int) -> None:
        """Give up to count blocks back to the pool, least recently used first."""
        self._evict(count)

    def pass_thread(self) -> int | None:
        """Nothing to report: a store runs no forward passes."""
        return None

    def _root(self, salt: str) -> _Node:
        """Return the root for the model as it is now, made if there is none."""
        identity = _identity(self.model, salt)
        key = _digest(b"", identity.encode())
        known, root = self._roots.get(key, (identity, None))
        if root is None or known != identity:
            root = _Node(key, (), -1, None)
            if key not in self._roots:  # else the keys collide: what hangs on this root is never found again
                self._roots[key] = identity, root
        root.used = self._tick()
        return root

    def _is_current(self, root: _Node) -> bool:
        """Whether a root is in the tree and what it stands for has not changed since."""
        identity = self._roots.get(root.key, ("", None))
        return identity[1] is root and _identity(self.model, identity[0].split("\0", 1)[0]) == identity[0]

    def _match(self, root: _Node, tokens: list[int]) -> tuple[list[int], int]:
        """Return the blocks of the longest known prefix and its length in tokens."""
        blocks: list[int] = []
        size, node, count = self.pool.block_size, root, 0
        while True:
            part = tuple(tokens[count : count + size])
            child = node.children.get(_digest(node.key, part)) if len(part) == size else None
            if child is None or child.tokens != part:
                break
            node, count = child, count + size
            node.used = self._tick()
            blocks.append(node.block)
        # The rest of it may be the beginning of a block.
        children = [*node.children.values(), *node.partial]
        best = max(children, key=lambda child: _common(child.tokens, part), default=None)
        if best is not None and _common(best.tokens, part):
            best.used = self._tick()
            blocks.append(best.block)
            count += _common(best.tokens, part)
        return blocks, count

    def _insert(self, root: _Node, tokens: list[int], blocks: list[int]) -> int:
        """Add a sequence below a root; return how many of its blocks were new."""
        size, node, new = self.pool.block_size, root, 0
        for start, block in zip(range(0, len(tokens), size), blocks, strict=False):
            part = tuple(tokens[start : start + size])
            full = len(part) == size
            key = _digest(node.key, part)
            child = node.children.get(key) if full else None
            if child is not None and child.tokens != part:
                return new  # two blocks with one key: the first stays
            if not full and any(_common(c.tokens, part) == len(part) for c in [*node.children.values(), *node.partial]):
                return new  # known, as the beginning of another block
            if child is None and block == NO_BLOCK:
                return new  # a sliding window has left it behind: without it, nothing that follows can be found
            if child is None:
                child = _Node(key, part, block, node)
                self.pool.ids.share([block])
                for shorter in [c for c in node.partial if _common(c.tokens, part) == len(c.tokens)]:
                    self._drop(shorter)
                if full:
                    node.children[key] = child
                else:
                    node.partial.append(child)
                new += 1
            child.used = self._tick()
            node = child
        return new

    def _evict(self, count: int) -> None:
        """Free up to count blocks that no cache uses, least recently used leaves first."""
        if count <= 0:
            return
        leaves = [(node.used, id(node), node) for node in self._nodes() if node.is_leaf]
        heapq.heapify(leaves)
        while leaves and count > 0:
            _, _, node = heapq.heappop(leaves)
            if self.pool.ids.num_owners(node.block) > 1:
                continue
            parent = node.parent
            self._drop(node)
            self._evicted += 1
            count -= 1
            if parent is not None and parent.parent is not None and parent.is_leaf:
                heapq.heappush(leaves, (parent.used, id(parent), parent))

    def _drop(self, node: _Node) -> None:
        """Take a leaf out of the tree."""
        parent = node.parent
        assert parent is not None and node.is_leaf
        if node in parent.partial:
            parent.partial.remove(node)
        else:
            del parent.children[node.key]
        self.pool.ids.free([node.block])

    def _nodes(self) -> Iterator[_Node]:
        """Yield all nodes but the roots."""
        todo = [root for _, root in self._roots.values()]
        while todo:
            node = todo.pop()
            if node.parent is not None:
                yield node
            todo += [*node.children.values(), *node.partial]

    def _kept(self) -> int:
        return sum(1 for _ in self._nodes())

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def _digest(parent: bytes, content: Sequence[int] | bytes) -> bytes:
    """Return the key of a node from its parent's and its content."""
    if not isinstance(content, bytes):
        content = b"".join(token.to_bytes(8, "little", signed=True) for token in content)
    return hashlib.sha256(len(parent).to_bytes(1, "little") + parent + content).digest()


def _identity(model: nn.Module, salt: str) -> str:
    """Return everything but the tokens that keys and values depend on; it begins with the salt."""
    config: Any = model.config
    parts: list[object] = [config.to_json_string() if hasattr(config, "to_json_string") else ""]
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        version = 0 if tensor.is_inference() else tensor._version
        parts.append((tensor.data_ptr(), version, str(tensor.dtype), str(tensor.device)))
    parts += [
        _samples([x for x in tensors if x.device == device]) for device in dict.fromkeys(x.device for x in tensors)
    ]
    for device_type in dict.fromkeys(x.device.type for x in tensors):
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            parts.append(str(torch.get_autocast_dtype(device_type)))
    for name, module in model.named_modules():
        layer: Any = module
        if hasattr(layer, "active_adapters") and hasattr(layer, "disable_adapters"):  # PEFT's
            state = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
            parts.append((name, *(str(getattr(layer, attribute, None)) for attribute in state)))
    return salt.replace("\0", "\\0") + "\0" + hashlib.sha256(repr(parts).encode()).hexdigest()


def _samples(tensors: list[Tensor]) -> bytes:
    """Return some elements of each tensor on one device, evenly spaced: writing through ``.data`` shows there."""
    found = []
    for tensor in tensors:
        try:
            count = min(SAMPLES, tensor.numel())
            room = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
            step = max(min(tensor.numel(), room) // max(count, 1), 1)
            part = tensor.detach().as_strided((min(count, room),), (step,), tensor.storage_offset())
            found.append(part.contiguous().view(torch.uint8))
        except (RuntimeError, NotImplementedError, TypeError):  # of a class of its own, or without storage
            continue
    return torch.cat(found).cpu().numpy().tobytes() if found else b""


def _real_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> list[tuple[list[int], list[int]]]:
    """Return each prompt's tokens without padding and the columns that they stand in."""
    if input_ids.dim() != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
        mask = None if attention_mask is None else tuple(attention_mask.shape)
        raise ValueError(
            f"expected input_ids (num_seqs, columns) and a mask like them, got {tuple(input_ids.shape)} and {mask}"
        )
    rows = []
    for row, tokens in enumerate(input_ids.tolist()):
        columns = list(range(len(tokens)))
        if attention_mask is not None:
            columns = attention_mask[row].nonzero().flatten().tolist()
        rows.append(([tokens[column] for column in columns], columns))
    return rows


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """Return how many items two sequences begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
