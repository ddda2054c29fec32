"""One lock per pool, so that threads may use caches that share it.

Bookkeeping takes the lock; forward passes run outside it, each over blocks of its own. The one exception is growth,
which moves the blocks of every cache: it waits until no other thread is in the middle of a forward pass.
"""

import functools
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn

P = ParamSpec("P")
T = TypeVar("T")

GROWTH_WAIT = 60.0
"""Seconds that growth waits for the forward passes of other threads."""

POLL = 0.05
"""Seconds after which a waiting thread looks again: a forward pass that raised tells nobody that it ended."""


class PoolLock:
    """Lock of a pool, with the blocks that garbage collection gave back while it was taken.

    Args:
        free: takes a row of blocks back; called with the lock held.
    """

    def __init__(self, free: Callable[[Sequence[int]], None]) -> None:
        self._condition = threading.Condition(threading.RLock())
        self._free = free
        self._depth = 0  # how often the thread that holds the lock has taken it
        self._growing = 0  # threads that wait to let the pool grow
        self._dropped: deque[Sequence[int]] = deque()

    def __enter__(self) -> None:
        """Hold the lock; a thread may take it again."""
        self._condition.acquire()
        self._depth += 1
        if self._dropped:
            self._take_back()

    def __exit__(self, *_: object) -> None:
        try:
            if self._dropped:
                self._take_back()
        finally:
            self._depth -= 1
            self._condition.release()

    def drop(self, rows: Sequence[Sequence[int]]) -> None:
        """Free rows of blocks as soon as the lock is free: garbage collection may run in the middle of bookkeeping."""
        self._dropped.extend(rows)
        if self._condition.acquire(blocking=False):
            try:
                if self._depth == 0:
                    with self:
                        pass
            finally:
                self._condition.release()

    def begin_pass(self) -> None:
        """Let growth that waits go first; the lock is held."""
        while self._growing:
            self._wait()

    def end_pass(self) -> None:
        """Tell who waits; the lock is held."""
        if self._growing:
            self._condition.notify_all()

    def wait_for(self, others: Callable[[], list[int]]) -> None:
        """Wait until no other thread is in a forward pass; the lock is held, and not held while waiting.

        Args:
            others: returns the threads that have begun a forward pass over the pool.

        Raises:
            RuntimeError: they are still busy after GROWTH_WAIT seconds.
        """
        me, rounds = threading.get_ident(), 0
        self._growing += 1
        try:
            while any(thread != me and in_forward_pass(thread) for thread in others()):
                if rounds * POLL >= GROWTH_WAIT:
                    raise RuntimeError(
                        f"the block pool has to grow, but another thread has been in a forward pass over it for "
                        f"{GROWTH_WAIT:.0f} seconds: give the pool a fixed size (num_blocks), or each thread its own"
                    )
                rounds += 1
                self._wait()
        finally:
            self._growing -= 1
            self._condition.notify_all()

    def _wait(self) -> None:
        depth, self._depth = self._depth, 0
        try:
            self._condition.wait(POLL)
        finally:
            self._depth = depth

    def _take_back(self) -> None:
        while self._depth == 1 and self._dropped:
            self._free(self._dropped.popleft())


def locked(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Let a method hold the PoolLock that its object has as ``lock``."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.lock:
            return method(self, *args, **kwargs)

    return wrapped


def in_forward_pass(thread: int) -> bool:
    """Return whether a thread is running an nn.Module at the moment; passes that raised leave no other trace."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            return True
        frame = frame.f_back
    return False
