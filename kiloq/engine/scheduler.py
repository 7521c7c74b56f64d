"""Whose tokens go through the model next. Knows sequences and blocks; nothing of tensors, sampling or text.

First come, first served: older sequences get their blocks first, and when none are left the youngest gives up its own
and is computed again later. A step takes the next token of every sequence that is decoding and fills the rest of its
token budget with prompts, oldest first, cut where the budget ends.

Full blocks are published when their work is planned, not when it is done: within a step every key is written before any
is read, so requests that begin together share their common prefix too. Work that is not done must be abandoned, or
others would share keys that were never written.
"""

import heapq
import time
from bisect import insort
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from kiloq.cache import BlockManager, KeyChain

from .sequence import Sequence

_CHEAP_ROWS = 16  # of a step, guesses included: beyond, each costs arithmetic that nobody waits for otherwise


@dataclass(frozen=True, slots=True)
class Work:
    """Positions start..stop-1 of a sequence, to go through the model in one step, and what may stand behind them."""

    sequence: Sequence
    start: int
    stop: int
    guesses: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.stop - self.start + len(self.guesses)

    @property
    def is_last(self) -> bool:
        """Whether the next token can be drawn after this."""
        return self.stop == len(self.sequence.ids)


Wanted = list[tuple[Sequence, int]]
"""Sequences of whose next tokens at most so many may be guessed."""


class Scheduler:
    """Waiting and running sequences; `alpha_of` gives the NTK factor of a sequence's length.

    `propose` guesses next tokens. Guesses take blocks and rows that nobody else needs, and are never published.
    """

    def __init__(
        self,
        blocks: BlockManager,
        alpha_of: Callable[[int], float],
        *,
        cache_dtype: str,
        max_batch: int,
        step_tokens: int,
        propose: Callable[[Wanted], Items[tuple[int, ...]]] | None = None,
    ) -> None:
        assert step_tokens >= max_batch, (step_tokens, max_batch)
        self.running: list[Sequence] = []  # oldest first
        self.num_preempted = 0
        self.abandoned: list[Sequence] = []  # those of the latest step that failed
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []  # a heap; the finished are dropped as they surface
        self._blocks = blocks
        self._alpha_of = alpha_of
        self._cache_dtype = cache_dtype
        self._max_batch = max_batch
        self._step_tokens = step_tokens
        self._propose = propose
        self._planned: list[Work] = []  # of the latest step

    @property
    def num_waiting(self) -> int:
        return sum(not sequence.is_finished for _, sequence in self._waiting)

    @property
    def has_work(self) -> bool:
        self._drop_finished()
        return bool(self.running or self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence by its order; a preempted one comes before all that came after it."""
        heapq.heappush(self._waiting, (sequence.order, sequence))

    def remove(self, sequence: Sequence, *, poisoned: bool = False) -> None:
        """Let a finished sequence go; what it computed stays cached, unless that is `poisoned`."""
        assert sequence.is_finished, sequence.order
        if sequence in self.running:
            self.running.remove(sequence)
            self._give_back(sequence, poisoned=poisoned)

    def schedule(self) -> list[Work]:
        """The next step's work, with blocks for all of it. The caller does it all and commits, or abandons it.

        An exception here, such as Ctrl-C, leaves a part of it planned: that is to be abandoned too.
        """
        works: list[Work] = []
        self._planned = works
        preempted = self.num_preempted
        for sequence in tuple(self.running):
            if sequence.table and self._alpha_of(len(sequence.ids)) != sequence.alpha:
                # Cached keys are turned by a factor that the sequence has outgrown, so all is computed again.
                self._give_back(sequence)
            self._secure(sequence)
        budget = self._step_tokens
        guesses = self._guesses()
        for sequence in sorted(self.running, key=lambda running: running.num_pending > 1):  # decoding first
            budget -= self._plan(sequence, budget, works, guesses.get(sequence, ()))
        # Blocks were short a moment ago: a newcomer would only be the next to give them up.
        if self.num_preempted == preempted:
            while budget and (newcomer := self._admit()) is not None:
                budget -= self._plan(newcomer, budget, works)
        assert works or not self.has_work, "there is work, but none was found"
        return works

    def commit(self, works: Items[Work]) -> None:
        """The work was done: its keys and values are in the cache."""
        for work in works:
            work.sequence.num_computed = work.stop

    def confirm(self, sequence: Sequence) -> None:
        """The oldest guess was right: its id is the sequence's newest, and its keys and values are in the cache."""
        sequence.num_computed += 1
        if sequence.num_computed % self._blocks.block_size == 0:
            self._publish(sequence, sequence.num_computed - 1, sequence.num_computed)

    def abandon(self) -> None:
        """The latest step failed half-way: no key or value of its sequences can be trusted, and they start again."""
        self.abandoned = [work.sequence for work in self._planned if work.sequence in self.running]
        for sequence in self.abandoned:
            self.running.remove(sequence)
            self._give_back(sequence, poisoned=True)
            self.add(sequence)
        for _, sequence in self._waiting:
            self._give_back(sequence, poisoned=True)  # blocks that it got while it was being admitted
        self._planned = []

    def check_integrity(self) -> None:
        """No block is lost, and running sequences hold all that is held."""
        self._blocks.check_integrity(sequence.table for sequence in self.running)
        assert all(not sequence.table for _, sequence in self._waiting), "a waiting sequence holds blocks"

    def _secure(self, sequence: Sequence) -> None:
        """Blocks for all tokens of a running sequence, at the expense of younger ones if need be."""
        while sequence in self.running and not self._take_blocks(sequence, reserve=0):
            youngest = self.running.pop()
            self._give_back(youngest)
            self.add(youngest)
            self.num_preempted += 1

    def _take_blocks(self, sequence: Sequence, *, reserve: int) -> bool:
        ids = sequence.ids
        if sequence.table:
            return self._blocks.cover(sequence.table, len(ids))
        alpha = self._alpha_of(len(ids))
        if sequence.chain is None or sequence.alpha != alpha:
            sequence.alpha = alpha
            sequence.chain = KeyChain(alpha, sequence.request.adapter, self._cache_dtype, self._blocks.block_size)
        # The last token is computed even when all of it is cached: its logits are needed.
        keys = sequence.chain.first((len(ids) - 1) // self._blocks.block_size, ids)
        opened = self._blocks.open(keys, len(ids), reserve=reserve)
        if opened is None:
            return False
        sequence.table, sequence.num_computed = opened
        if sequence.request.cached_tokens is None:
            sequence.request.cached_tokens = sequence.num_computed
            sequence.request.admitted = time.perf_counter()
        return True

    def _give_back(self, sequence: Sequence, *, poisoned: bool = False) -> None:
        if poisoned:
            self._blocks.forget(sequence.table)
        self._blocks.close(sequence.table)
        sequence.num_computed = 0

    def _plan(self, sequence: Sequence, budget: int, works: list[Work], guesses: tuple[int, ...] = ()) -> int:
        """Add what fits of a sequence's pending tokens, and then of guesses; how many."""
        count = min(sequence.num_pending, budget)
        if not count:
            return 0
        start = sequence.num_computed
        guesses = guesses[: budget - count]
        if guesses and not self._blocks.cover(sequence.table, len(sequence.ids) + len(guesses)):
            guesses = ()
        works.append(Work(sequence, start, start + count, guesses))
        self._publish(sequence, start, start + count)
        return count + len(guesses)

    def _guesses(self) -> dict[Sequence, tuple[int, ...]]:
        """Guesses for sequences that decode: in the cheap rows that are left when each that runs has one."""
        ready = [sequence for sequence in self.running if sequence.num_pending == 1 and sequence.guesser]
        if self._propose is None or not ready:
            return {}
        most = (min(self._step_tokens, _CHEAP_ROWS) - len(self.running)) // len(ready)
        wanted = [(sequence, count) for sequence in ready if (count := min(most, self._room(sequence, most))) > 0]
        return {sequence: guesses for (sequence, _), guesses in zip(wanted, self._propose(wanted), strict=True)}

    def _room(self, sequence: Sequence, most: int) -> int:
        """How many tokens behind its last can be guessed: one more is drawn, and all under one NTK factor."""
        assert sequence.guesser is not None
        most = min(most, sequence.request.max_length - len(sequence.ids) - 1, sequence.guesser.most)
        while most > 0 and self._alpha_of(len(sequence.ids) + most) != sequence.alpha:
            most -= 1
        return most

    def _publish(self, sequence: Sequence, start: int, stop: int) -> None:
        """Share the blocks that positions start..stop-1 fill up."""
        first, last = start // self._blocks.block_size, stop // self._blocks.block_size
        if first < last:
            assert sequence.chain is not None
            keys = sequence.chain.first(last, sequence.ids)
            for i in range(first, last):
                self._blocks.publish(sequence.table[i], keys[i])

    def _admit(self) -> Sequence | None:
        """Start the oldest waiting sequence, if the pool has room for it and a next block for all that run."""
        self._drop_finished()
        if not self._waiting or len(self.running) == self._max_batch:
            return None
        sequence = self._waiting[0][1]
        if not self._take_blocks(sequence, reserve=len(self.running)):
            return None
        heapq.heappop(self._waiting)
        insort(self.running, sequence, key=lambda running: running.order)
        return sequence

    def _drop_finished(self) -> None:
        while self._waiting and self._waiting[0][1].is_finished:
            heapq.heappop(self._waiting)
