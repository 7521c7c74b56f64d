"""Requests in, events out: the loop that everything which generates text runs on. Knows token ids and stop rules.

One thread at a time. A step never waits for a request, and a request never sees another: what its rows compute and draw
depends on its own tokens, parameters and seed.
"""

from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from kiloq.cache import BLOCK_SIZE, BlockManager, KVCache, cache_dtype, pool_blocks
from kiloq.errors import KiloqError, NumericsError, RequestError
from kiloq.model import Transformer, ntk_alpha
from kiloq.model.lora import Adapter
from kiloq.tokenizer import Tokenizer

from .batch import Draw, build_batch
from .events import EngineStats, Event, FinishReason, Usage
from .intake import Intake
from .limits import EngineConfig, Limits, step_tokens
from .params import Constraint, SamplingParams
from .runner import Runner
from .sampler import BadLogitsError, Sampled, sample_batch
from .scheduler import Scheduler, Work
from .sequence import Request, Sequence
from .speculate import Speculation

LogitsObserver = Callable[[str, int, int, Tensor], None]
"""(request id, index, number of tokens seen, logits [V]): called for every row before its token is drawn."""


class Engine:
    """Continuous batching over one model and one paged cache.

    `stop_ids` are the model's own; `tokenizer` turns ids into text and is needed for stop strings; `draft` is a smaller
    model of the same vocabulary, whose guesses are verified.
    """

    def __init__(
        self,
        model: Transformer,
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        stop_ids: Collection[int] = (),
        draft: Transformer | None = None,
        adapters: Mapping[str, Adapter] | None = None,
        logits_observer: LogitsObserver | None = None,
    ) -> None:
        config = config or EngineConfig()
        weight = next(model.parameters())
        on_gpu = weight.device.type == "cuda"
        self.max_batch = max_batch = config.max_batch or (64 if on_gpu else 16)
        self.kv_dtype = kv_dtype = cache_dtype(config.kv_dtype, model)
        context = config.max_context or model.config.max_length
        blocks = pool_blocks(
            model.config, kv_dtype, weight.device, max_context=context, max_batch=max_batch, kv_memory=config.kv_memory
        )
        self.model_config = model.config
        self.max_context = min(context, blocks * BLOCK_SIZE)
        self._observer = logits_observer
        self._device = weight.device
        self._blocks = BlockManager(blocks)
        self._runner = Runner(model, KVCache.for_model(model, blocks, kv_dtype), adapters)
        self._speculation = Speculation(
            model.config,
            draft,
            rows_are_cheap=self._runner.is_native,
            max_batch=max_batch,
            max_context=self.max_context,
        )
        self._intake = Intake(
            Limits(vocab_size=model.config.vocab_size, max_context=self.max_context, asked_context=context),
            self._speculation,
            tokenizer=tokenizer,
            stop_ids=stop_ids,
            adapters=adapters or (),
            seed=config.seed,
        )
        on_cpu = step_tokens(model.config.num_parameters, torch.get_num_threads(), short=config.short_steps)
        most = config.step_tokens or (4096 if on_gpu else on_cpu)
        self._scheduler = Scheduler(
            self._blocks,
            lambda length: ntk_alpha(model.config, length),
            cache_dtype=str(kv_dtype),
            max_batch=max_batch,
            step_tokens=max(most, max_batch),
            propose=self._speculation.propose,
        )
        self._requests: dict[str, Request] = {}
        self._events: list[Event] = []
        self._cancelled: list[str] = []  # whose cancel came and is not yet done
        self._is_busy = False  # a step or a cancel is under way
        self._num_added = self._num_steps = self._num_computed = self._num_generated = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self._events) or self._scheduler.has_work

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=self._scheduler.num_waiting,
            blocks=self._blocks.num_blocks,
            blocks_available=self._blocks.num_available,
            blocks_cached=self._blocks.num_cached,
            steps=self._num_steps,
            computed_tokens=self._num_computed,
            generated_tokens=self._num_generated,
            preempted=self._scheduler.num_preempted,
            guessed=self._speculation.num_guessed,
            guessed_right=self._speculation.num_right,
        )

    def add(
        self, prompt_ids: Items[int], params: SamplingParams, *, request_id: str | None = None, adapter: str = ""
    ) -> str:
        """Queue a request, or refuse it with a RequestError; its events bear the id returned."""
        number = self._num_added
        request_id = f"request-{number}" if request_id is None else request_id
        if request_id in self._requests:
            raise RequestError(f"a request named {request_id!r} is running already; give each its own name.")
        request = self._intake.request(prompt_ids, params, request_id=request_id, number=number, adapter=adapter)
        for sequence in request.sequences:
            self._scheduler.add(sequence)
        self._requests[request_id] = request
        self._num_added += 1
        return request_id

    def compile(self, constraint: Constraint) -> None:
        """Prepare a constraint for `add`, which would wait for it otherwise; any thread may call this at any time."""
        self._intake.compile(constraint)

    def cancel(self, request_id: str) -> None:
        """End a request before the next step, which tells so; one that has ended already is let be."""
        # A garbage collector that closes an abandoned stream may call this in the middle of anything below.
        self._cancelled.append(request_id)
        if not self._is_busy:
            self._end_cancelled()

    def step(self) -> list[Event]:
        """Take every running request one token further, or its prompt one part further."""
        self._is_busy = True
        try:
            works = self._scheduler.schedule()
            if works:
                self._run(works)
        except BaseException:
            self._scheduler.abandon()
            raise
        finally:
            self._end_cancelled()
        events, self._events = self._events, []
        return events

    def fail_abandoned(self, error: KiloqError) -> None:
        """End the requests whose step raised, or all if it is not known whose; the next step tells so."""
        all_of_them = [request.sequences[0] for request in self._requests.values()]
        for sequence in self._scheduler.abandoned or all_of_them:
            self._fail(sequence, error)

    def check_integrity(self) -> None:
        """Assert that no block of the cache is lost or held by nobody."""
        self._scheduler.check_integrity()
        self._speculation.check_integrity()

    def _end_cancelled(self) -> None:
        self._is_busy = True
        while self._cancelled:
            request = self._requests.get(self._cancelled.pop())
            for sequence in request.sequences if request else ():
                if not sequence.is_finished:
                    self._tell(sequence, text=sequence.text.flush(), finish_reason="cancelled")
        self._is_busy = False

    def _run(self, works: Items[Work]) -> None:
        batch = build_batch(works, self._device)
        logits = self._runner.logits(batch)  # [N, V]
        self._scheduler.commit(works)
        self._num_steps += 1
        self._num_computed += len(batch.ids)
        draws = batch.draws
        while draws:
            draws = self._draw(logits, draws)

    def _draw(self, logits: Tensor, draws: list[Draw]) -> list[Draw]:
        """A token for each; where it is what was guessed, the guess's own row comes next."""
        rows = [draw.row for draw in draws]
        chosen = logits if rows == list(range(len(logits))) else logits[rows]  # [N, V]
        if self._observer:
            for sequence, row in zip((draw.sequence for draw in draws), chosen, strict=True):
                self._observer(sequence.request.id, sequence.index, len(sequence.ids), row)
        try:
            drawn = sample_batch(chosen, [draw.sequence.sampler for draw in draws])
        except BadLogitsError as error:
            for row in error.rows:
                self._fail(draws[row].sequence, _no_logits(draws[row].sequence))
            good = [row for row in range(len(draws)) if row not in error.rows]
            draws = [draws[row] for row in good]
            drawn = sample_batch(chosen[good], [draw.sequence.sampler for draw in draws])
        following = []
        for draw, sampled in zip(draws, drawn, strict=True):
            if draw.sequence.is_finished:  # with the request of a row whose logits are not numbers
                continue
            self._accept(draw.sequence, sampled)
            if draw.is_right(sampled.token_id) and not draw.sequence.is_finished:
                self._scheduler.confirm(draw.sequence)
                following.append(draw.next())
            else:
                self._speculation.learn(draw.sequence, draw.guesses, draw.num_right)
        return following

    def _accept(self, sequence: Sequence, sampled: Sampled) -> None:
        """Add a drawn token to its answer, and end the answer where its rules say so."""
        request, token_id = sequence.request, sampled.token_id
        self._num_generated += 1
        request.completion_tokens += 1
        if token_id in request.stop_ids:
            self._tell(sequence, text=sequence.text.flush(), finish_reason="stop", stop_id=token_id)
            return
        sequence.ids.append(token_id)
        matcher = sequence.sampler.matcher
        if matcher is not None and matcher.error is not None:
            self._fail(sequence, RequestError(f"the answer cannot go on as its constraint wants it: {matcher.error}"))
            return
        text = sequence.text.push(token_id)
        is_whole = matcher is not None and matcher.is_over
        reason: FinishReason | None = None
        if sequence.text.stopped:
            reason = "stop"
        elif is_whole or len(sequence.ids) == request.max_length:
            text += sequence.text.flush()
            reason = "stop" if is_whole or sequence.text.stopped else "length"
        self._tell(sequence, text=text, sampled=sampled, finish_reason=reason)

    def _tell(
        self,
        sequence: Sequence,
        *,
        text: str,
        sampled: Sampled | None = None,
        finish_reason: FinishReason | None = None,
        stop_id: int | None = None,
    ) -> None:
        """Make it an event, and let the sequence go if that is its last."""
        request = sequence.request
        usage = self._end(sequence) if finish_reason else None
        self._events.append(
            Event(
                request_id=request.id,
                index=sequence.index,
                token_ids=(sampled.token_id,) if sampled else (),
                text=text,
                logprobs=(sampled,) if sampled and sampled.logprob is not None else (),
                finish_reason=finish_reason,
                stop_id=stop_id,
                usage=usage,
            )
        )

    def _fail(self, sequence: Sequence, error: KiloqError) -> None:
        """End the whole request of a sequence that cannot go on."""
        request = sequence.request
        if request.is_finished:
            return
        for other in request.sequences:
            if not other.is_finished:
                usage = self._end(other, poisoned=isinstance(error, NumericsError))
        self._events.append(
            Event(request_id=request.id, index=sequence.index, finish_reason="error", usage=usage, error=error)
        )

    def _end(self, sequence: Sequence, *, poisoned: bool = False) -> Usage | None:
        """Free what a sequence holds; its request's usage, if it was the last of it."""
        request = sequence.request
        sequence.is_finished = True
        self._speculation.release(sequence)
        self._scheduler.remove(sequence, poisoned=poisoned)
        if not request.is_finished:
            return None
        del self._requests[request.id]
        return request.usage


def _no_logits(sequence: Sequence) -> NumericsError:
    return NumericsError(
        f"the model gave no finite logits after token {len(sequence.ids):,} of {sequence.request.id!r}. "
        "Check the weights, or use bfloat16 or float32 in place of float16."
    )
