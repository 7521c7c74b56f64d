"""A smaller model that guesses what a larger one will say. Knows sequences; its cache and blocks are its own.

It draws by the random numbers with which the sequence's next tokens will be drawn: where both models agree on the
probabilities, they draw the same token. The guess decides nothing, so it may be wrong in any way.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kiloq.cache import BLOCK_SIZE, BlockManager, KeyChain, KVCache, cache_dtype, pool_blocks
from kiloq.errors import ConfigError
from kiloq.model import ModelConfig, Transformer, ntk_alpha

from .batch import Part, flat_batch
from .runner import Runner
from .sampler import BadLogitsError, sample_batch
from .sequence import Sequence

_STEP_TOKENS = 512
_MOST_SPARE_ROWS = 1024  # Qwen's sizes differ in how far their rows are filled up


@dataclass(slots=True)
class _State:
    """What the draft's cache holds of a sequence: its first `num_computed` tokens, and then some guesses."""

    table: list[int]
    num_computed: int
    chain: KeyChain
    alpha: float
    guesses: tuple[int, ...] = ()


class Draft:
    """A model that guesses for several sequences at once; `main` is the model that is to be guessed."""

    def __init__(self, model: Transformer, main: ModelConfig, *, max_batch: int, max_context: int) -> None:
        if abs(model.config.vocab_size - main.vocab_size) > _MOST_SPARE_ROWS:
            raise ConfigError(
                f"the draft model has {model.config.vocab_size:,} tokens and the model {main.vocab_size:,}; "
                "a draft needs the same vocabulary."
            )
        self._config = model.config
        self._vocab_size = main.vocab_size
        self._max_context = min(max_context, model.config.max_length)
        self._device = next(model.parameters()).device
        dtype = cache_dtype("auto", model)
        self._dtype = str(dtype)
        blocks = pool_blocks(model.config, dtype, self._device, max_context=self._max_context, max_batch=max_batch)
        self._blocks = BlockManager(blocks)
        self._runner = Runner(model, KVCache.for_model(model, blocks, dtype))
        self._states: dict[Sequence, _State] = {}

    def propose(self, wanted: Items[tuple[Sequence, int]]) -> dict[Sequence, tuple[int, ...]]:
        """Guesses for each sequence, as many as it wants; none where there is no room."""
        counts = {sequence: count for sequence, count in wanted if self._prepare(sequence, count)}
        found: dict[Sequence, list[int]] = {sequence: [] for sequence in counts}
        try:
            rows = self._catch_up(list(counts))
            for ahead in range(max(counts.values(), default=0)):
                active = [sequence for sequence, count in counts.items() if count > ahead]
                previews = [sequence.sampler.preview(found[sequence]) for sequence in active]
                drawn = sample_batch(torch.stack([rows[sequence] for sequence in active]), previews)
                for sequence, sampled in zip(active, drawn, strict=True):
                    found[sequence].append(sampled.token_id)
                rows = self._feed({sequence: found[sequence] for sequence in active if counts[sequence] > ahead + 1})
        except BaseException as error:
            for sequence in counts:
                self.release(sequence, poisoned=True)
            if isinstance(error, BadLogitsError):  # a guess is not worth a request
                return {}
            raise
        for sequence, guesses in found.items():
            self._states[sequence].guesses = tuple(guesses[:-1])  # the last one was not fed
        return {sequence: tuple(guesses) for sequence, guesses in found.items()}

    def release(self, sequence: Sequence, *, poisoned: bool = False) -> None:
        """Forget a sequence that has ended; what was computed of it stays cached, unless that is `poisoned`."""
        state = self._states.pop(sequence, None)
        if state is not None:
            if poisoned:
                self._blocks.forget(state.table)
            self._blocks.close(state.table)

    def check_integrity(self) -> None:
        """No block is lost, and known sequences hold all that is held."""
        self._blocks.check_integrity(state.table for state in self._states.values())

    def _prepare(self, sequence: Sequence, count: int) -> bool:
        """Room for a sequence and its guesses, and a state that knows what is computed of it."""
        ids = sequence.ids
        length = len(ids) + count
        if length > self._max_context:
            return False
        alpha = ntk_alpha(self._config, length)
        state = self._states.get(sequence)
        if state is not None and state.alpha != alpha:
            self.release(sequence)
            state = None
        if state is None:
            if max(ids) >= self._config.vocab_size:
                return False
            chain = KeyChain(alpha, "", self._dtype)
            opened = self._blocks.open(chain.first((len(ids) - 1) // BLOCK_SIZE, ids), length)
            if opened is None:
                return False
            self._states[sequence] = _State(*opened, chain, alpha)
            return True
        for guess in state.guesses:
            if state.num_computed == len(ids) - 1 or guess != ids[state.num_computed]:
                break
            state.num_computed += 1
        state.guesses = ()
        return max(ids[state.num_computed :]) < self._config.vocab_size and self._blocks.cover(state.table, length)

    def _catch_up(self, sequences: list[Sequence]) -> dict[Sequence, Tensor]:
        """Compute what is not computed of each; the logits [V] behind its last token."""
        rows: dict[Sequence, Tensor] = {}
        while waiting := [sequence for sequence in sequences if sequence not in rows]:
            parts: list[Part] = []
            ended: list[Sequence] = []
            budget = _STEP_TOKENS
            for sequence in waiting:
                state, ids = self._states[sequence], sequence.ids
                start, stop = state.num_computed, min(len(ids), state.num_computed + budget)
                if start < stop:
                    parts.append(Part(ids[start:stop], start, state.table, state.alpha, int(stop == len(ids))))
                    state.num_computed = stop
                    budget -= stop - start
                    if stop == len(ids):
                        ended.append(sequence)
            rows |= zip(ended, self._logits(parts), strict=True)
        for sequence in sequences:
            state = self._states[sequence]
            keys = state.chain.first(state.num_computed // BLOCK_SIZE, sequence.ids)
            for block, key in zip(state.table, keys, strict=False):
                self._blocks.publish(block, key)
        return rows

    def _feed(self, guesses: dict[Sequence, list[int]]) -> dict[Sequence, Tensor]:
        """Compute the newest guess of each; the logits [V] behind it."""
        parts = []
        for sequence, made in guesses.items():
            state = self._states[sequence]
            parts.append(Part(made[-1:], len(sequence.ids) + len(made) - 1, state.table, state.alpha, 1))
        return dict(zip(guesses, self._logits(parts), strict=True)) if parts else {}

    def _logits(self, parts: list[Part]) -> Tensor:
        """[N, V], V of the model that is to be guessed."""
        logits = self._runner.logits(flat_batch(parts, self._device, []))
        spare = self._vocab_size - logits.shape[1]
        return F.pad(logits, (0, spare), value=-torch.inf) if spare else logits
