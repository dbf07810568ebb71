"""The engine: requests in from any thread, tokens out, one loop over steps.

Two locks. ``drive`` is held by the thread that runs a step, or changes what steps run on; everything below it
(:class:`EngineCore`) is touched under it only. Waiting threads get it after the running step, in the order of asking.
``mail.changed`` guards the small state that other threads see: new and cancelled requests, streams, outputs. No thread
waits for ``drive`` while it holds ``mail.changed``.

A request's own code (processors, criteria) may raise anything, SystemExit and KeyboardInterrupt too: it ends that
request. Ctrl-C in the main thread is another matter: it waits for the end of the step, so that no books are left half
written, and then reaches the caller. A second one does not wait.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from ..errors import RankError, RequestError, UnsupportedModelError
from ..fusion import FusedModel
from .admission import Admission, OfflineBatch
from .config import EngineConfig
from .controls import EngineControls
from .core import EngineCore, no_gradients
from .following import follow, wait_for_end, watcher
from .group import RankGroup
from .handle import RequestHandle
from .loop import StepLoop
from .loop_thread import loop_thread
from .news import StepNews, likeness, packed
from .offline import generate
from .process import held_interrupts, register, wait_if_exiting
from .sampling.grammar import Grammar
from .sampling.request_params import RequestParams
from .scheduling.page_budget import model_length
from .scheduling.request import ACTIVE, Adapter, Request, RequestOutput
from .startup.start import make_ranks, start
from .startup.support import is_supported
from .turn_lock import TurnLock
from .waiting import Mailbox, wait_for

FORKED = (
    "the process was forked while the engine had requests, and they run in the parent alone: make an engine of the "
    "child's own there."
)


class Engine(EngineControls):
    """Continuous batching for one model: the same weights, the same module objects.

    The engine's forwards run "paged_flash", whatever the model's attention implementation is. Forwards of other code
    run that one, in other threads meanwhile too.

    Of a model that transformers has sharded (tensor parallel) every process makes an engine, with the same options. The
    first rank takes requests, and all other calls; :meth:`generate` is called by all ranks with the same arguments, and
    returns the same on each. The other ranks follow in a thread until the first one closes its engine.

    Args:
        model: a causal LM of transformers.
        config: options.
        background: steps run in a thread of the engine while it has requests. False: they run in the threads that wait
            for results, or call :meth:`step`. Engines of sharded models always have a thread.

    Raises:
        UnsupportedModelError: the model cannot be served exactly; the message says why.

    Example::

        with hf_paged.Engine(model) as engine:
            handle = engine.submit(prompt_ids, generation_config=GenerationConfig(max_new_tokens=64))
            for token in handle: ...
    """

    def __init__(self, model: Any, config: EngineConfig | None = None, *, background: bool = True) -> None:
        if config is not None and not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig or None, got {type(config).__name__}.")
        wait_if_exiting()
        self.config = EngineConfig() if config is None else config
        self.model, self.background = model, bool(background)
        reasons = is_supported(model)
        if reasons:
            raise UnsupportedModelError(
                f"the engine cannot serve this model: {'; '.join(reasons)}. Use the model's own generate()."
            )
        self.max_model_len = self.config.max_model_len or model_length(model.config)
        self.ranks = make_ranks(model, self.config)
        self.background |= self.ranks.is_joint
        try:
            self._core, self.fused = start(model, self.config, self.max_model_len, self.ranks)
        except BaseException as error:
            if isinstance(self.ranks, RankGroup):
                self.ranks.fail(f"could not start its engine: {error}")
            raise
        self.drive, self.mail = TurnLock(), Mailbox()
        self.loop = StepLoop(self._core, self.mail, self.fused)
        self.admission = Admission(self._core)
        self._thread: threading.Thread | None = None
        self._stop: str | None = None
        self._in_step = False
        if isinstance(self.ranks, RankGroup):
            self.ranks.tell(watcher(weakref.ref(self)))
        register(self)
        if not self.ranks.leads:
            self._thread = loop_thread(self)
            self._thread.start()

    @property
    def core(self) -> EngineCore:
        """The sequences and steps, for measurements; it is touched between steps only."""
        return self._core

    fused: FusedModel | None
    """Modules that run fused while the engine computes, and why others do not; None: none do."""

    # Requests

    def submit(  # noqa: PLR0913
        self,
        prompt_ids: Sequence[int] | torch.Tensor,
        *,
        generation_config: GenerationConfig | None = None,
        request_id: str | None = None,
        priority: float = 0,
        deadline_s: float | None = None,
        logits_processor: Sequence[Any] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        seed: int | None = None,
        tokenizer: Any = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        grammar: Grammar | None = None,
        cache_salt: Any = None,
        adapter: Adapter = ACTIVE,
        rules: RequestParams | None = None,
        _batch: OfflineBatch | None = None,
    ) -> RequestHandle:
        """Hand over a request; it runs as soon as there is room.

        Args:
            prompt_ids: at least one token; ``[L]`` or ``[1, L]``.
            generation_config: as for ``generate()``; None: the model's own.
            request_id: a name, unique among the requests that have not ended; None: one is made.
            priority: larger goes first; see :class:`EngineConfig` for ageing.
            deadline_s: seconds from now after which the request ends with what it has, and ``finish_reason`` is
                "deadline".
            logits_processor, stopping_criteria, prefix_allowed_tokens_fn: as for ``generate()``, called with the full
                history of one sequence.
            seed: of the sampled tokens.
            tokenizer: needed for ``stop_strings``.
            logprobs, prompt_logprobs: report log-probabilities, and this many of the best tokens'.
            presence_penalty, frequency_penalty: lower the logits of generated tokens, once and for each time they came:
                as in the OpenAI API and vLLM.
            logit_bias: added to the logits of tokens, by id.
            grammar: makes a matcher for each sequence, see ``GrammarMatcher``; tokens that it does not accept are not
                chosen.
            cache_salt: cached prefixes are shared only among requests with an equal salt.
            adapter: the name of a LoRA adapter of PEFT that is loaded into the model, see :meth:`adapters`; None: the
                base model, without any. Not given: what is active on the model when a step runs.
            rules: made beforehand, in the place of the arguments from ``generation_config`` to ``grammar``.

        Raises:
            RequestError: it can never be served (too long for the model or the pool, too many rows), its id is taken,
                or the engine is closed.
            QueueFullError: ``EngineConfig(max_waiting=)`` requests wait already.
            ValueError, TypeError: an argument is not valid.
        """
        wait_if_exiting()
        if _batch is None:
            self._check_leads("submit()")
        request = self.prepare(
            prompt_ids, request_id=request_id, priority=priority, deadline_s=deadline_s, cache_salt=cache_salt,
            adapter=adapter, _batch=_batch, rules=rules, seed=seed, generation_config=generation_config,
            logits_processor=logits_processor, stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn, tokenizer=tokenizer, logprobs=logprobs,
            prompt_logprobs=prompt_logprobs, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
            logit_bias=logit_bias, grammar=grammar,
        )  # fmt: skip
        if _batch is None:
            self.hand_over([request], is_limited=True)
        else:
            _batch.add(request)
        return RequestHandle(self, request)

    def prepare(
        self,
        prompt_ids: Sequence[int] | torch.Tensor,
        *,
        request_id: str | None = None,
        priority: float = 0,
        deadline_s: float | None = None,
        cache_salt: Any = None,
        adapter: Adapter = ACTIVE,
        seed: int | None = None,
        rules: RequestParams | None = None,
        _batch: OfflineBatch | None = None,
        **options: Any,
    ) -> Request:
        """What :meth:`submit` hands over."""
        self.loop.check_open()
        return self.admission.request(
            prompt_ids, request_id=request_id, priority=priority, deadline_s=deadline_s, cache_salt=cache_salt,
            batch=_batch, rules=rules, seed=seed, adapter=adapter, **options,
        )  # fmt: skip

    def submit_together(self, make: Callable[[], list[Request]]) -> list[RequestHandle]:
        """Hand over the requests that ``make`` prepares: on all ranks of a sharded model at the same time, the same.

        Raises:
            RankError: the ranks do not have the same requests.
        """
        joint, requests = self.loop.joint, list[Request]()
        assert joint is not None, "the model is whole"
        group = joint.group

        def prepared() -> tuple[Any, list[int]]:
            self.loop.check_open()
            requests.extend(make())
            return [likeness(request) for request in requests], [request.number for request in requests]

        numbers = group.meet(prepared)
        if not group.leads:
            with self.mail.changed:
                self.loop.check_open()
                joint.claim(numbers, requests)
        group.pass_together()
        group.decide_call(lambda: self.hand_over(requests))
        return [RequestHandle(self, request) for request in requests]

    def _check_leads(self, name: str) -> None:
        if not self.ranks.leads:
            raise RankError(
                f"{name} was called on rank {self.ranks.rank} of a sharded model: rank 0 calls it, the others follow. "
                f"generate() is called on all ranks, with the same arguments."
            )

    def hand_over(self, requests: list[Request], *, is_limited: bool = False) -> None:
        """Let the loop have requests; ``is_limited``: if no more wait than may."""
        for request in requests if self.ranks.is_joint else ():
            request.message = packed(request)
        with self.mail.changed:
            self.loop.check_open()
            for request in requests if is_limited else ():
                self.loop.check_room(request)
            self.mail.put(requests, self.admission.rename)
            self.wake_loop()

    def generate(
        self,
        prompts: Sequence[Sequence[int] | torch.Tensor],
        *,
        generation_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        progress: bool = False,
        adapter: Adapter | Sequence[Adapter] = ACTIVE,
        **options: Any,
    ) -> list[RequestOutput]:
        """Serve many prompts; outputs come in the order of the prompts. A failed request has its error in its output.

        The call returns when all have ended, so the longest go first. Where every request has a known length (there is
        no eos token, and no criterion that may end it), nothing else runs, and there are slots and pages for all at
        once, steps of larger models all get about as many tokens: shorter requests wait, before their first token and
        between others, and all end together. First tokens come later, the last one earlier.

        Args:
            prompts: token ids.
            generation_config: one for all, or one for each.
            progress: show a bar.
            adapter: as for :meth:`submit`; one for all, or one for each.
            options: as for :meth:`submit`, the same for all.

        Raises:
            RequestError, ValueError, TypeError: a prompt cannot be served; none of them is then.
        """
        return generate(self, prompts, generation_config, progress, adapter=adapter, **options)

    @property
    def num_new_tokens(self) -> int:
        """New tokens since the start."""
        return self.loop.counters.new_tokens

    def advance(self) -> None:
        """Launch a step if no other thread does and none is on its way."""
        if not self.background and self.drive.acquire(blocking=False):
            try:
                if not self._in_step and (self.loop.pending is None or self.loop.pending.has_arrived):
                    self.step()
            finally:
                self.drive.release()

    def cancel(self, request_id: str) -> bool:
        """End a request with what it has; returns whether it had not ended yet."""
        self._check_leads("cancel()")
        request = self.mail.unfinished.get(request_id)
        return request is not None and self.cancel_request(request)

    def cancel_request(self, request: Request) -> bool:
        """As :meth:`cancel`, of this request: another one may have its id by now. Of a call that all ranks make, the
        first rank does it."""
        if not self.ranks.leads:
            return False
        with self.mail.changed:
            if self.mail.unfinished.get(request.request_id) is not request:
                return False
            self.mail.cancels.append(request)
            self.wake_loop()
        if not self.background and self.drive.acquire(blocking=False):
            try:
                if not self._in_step:
                    self.loop.intake(self._core.clock())
                    self.loop.publish()
            finally:
                self.drive.release()
        return True

    # The loop

    def wake_loop(self) -> None:
        """Have a thread run steps; ``mail.changed`` is held."""
        self.mail.changed.notify_all()
        if self.background and self._thread is None and self.mail.unfinished and not self.mail.is_closed:
            self._thread = loop_thread(self)
            self._thread.start()

    def turn(self) -> bool:
        """One turn of the background loop; False: the thread may end, there is nothing left to do."""
        if isinstance(self.ranks, RankGroup) and not self.ranks.leads:
            return follow(self, self.ranks)
        if self.step():
            return True
        with self.mail.changed:
            if self.mail.incoming or self.mail.cancels:
                return True
            if not self.mail.unfinished:
                self._thread = None
                return False
            timeout = 1.0
            if self.loop.deadlines:
                timeout = min(timeout, max(0.0, self.loop.deadlines[0][0] - self._core.clock()))
            self.mail.changed.wait(timeout)
        return True

    def step(self) -> bool:
        """Run one step, if there is anything to compute; returns whether there was."""
        if threading.current_thread() is not self._thread:
            wait_if_exiting()
        self._check_leads("step()")
        return self.step_with(None)

    def step_with(self, news: StepNews | None) -> bool:
        """As :meth:`step`; ``news`` is what the first rank has sent, on the others."""
        with self.drive:
            if self._in_step:
                raise RequestError("a step cannot run inside another: do not wait for results in a logits processor.")
            self._in_step = True
            try:
                with held_interrupts(), no_gradients(), self._core.on_device():
                    moved = self.loop.step(news)
            finally:
                self._in_step = False
                if self._stop is not None and not self.mail.is_closed:
                    self.loop.command("close_now", self._stop)
            error = self.loop.take_error()
            if error is not None and not self.background:
                raise error
            return moved

    @property
    def may_run(self) -> bool:
        """Whether a thread of the engine's own, or any other one, runs steps."""
        return self._thread is not None or self.drive.is_held or (self.ranks.is_joint and not self.mail.is_closed)

    def after_fork(self) -> None:
        """In a forked child: the threads that hold the locks and run the loop are not there."""
        is_busy = bool(self.mail.unfinished) or (self.drive.is_held and not self._in_step) or self.ranks.is_joint
        self.drive, self.mail.changed = TurnLock(), threading.Condition(threading.Lock())
        self._thread, self._in_step = None, False
        if isinstance(self.ranks, RankGroup):
            self.ranks.hold()
        if not is_busy or self.mail.is_closed:
            return
        self.loop.broken, self.mail.is_closed = RequestError(FORKED), True
        for request in list(self.mail.unfinished.values()):
            if request.output is None:
                self._core.endings.end_unaccounted(request, self.loop.broken)
        self.loop.publish()

    # Life

    def close(self, *, drain: bool = False) -> None:
        """End the engine: what has not ended gets the result "cancelled".

        Of a sharded model the first rank ends it on all ranks; on the others this waits until it does.

        Args:
            drain: let requests end first.
        """
        if isinstance(self.ranks, RankGroup) and not self.ranks.leads:
            wait_for_end(self, self._thread, self.ranks)
        else:
            self._close(drain)
        if isinstance(self.ranks, RankGroup) and self.mail.is_closed:  # Otherwise at the end of the step.
            self.ranks.leave()

    def _close(self, drain: bool) -> None:
        if drain and not self.mail.is_closed:
            wait_for(self, lambda: not self.mail.unfinished, None, "the engine")
        with self.drive:
            if self._in_step:
                self._stop = "cancelled"  # Called from a request's own code: at the end of the step.
                return
            with held_interrupts(), contextlib.suppress(RankError):  # The others have ended already.
                if not self.mail.is_closed:
                    self.loop.command("close_now", "cancelled")
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def __enter__(self) -> "Engine":
        self.loop.check_open()
        return self

    def __exit__(self, kind: Any, error: Any, *traceback: object) -> None:
        if error is not None and isinstance(self.ranks, RankGroup) and not self.mail.is_closed and not self.ranks.leads:
            self.ranks.fail(f"has left its engine: {type(error).__name__}: {error}")
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError(
            "an Engine cannot be pickled or copied, it has a thread, locks and pages of this process: send the model, "
            "or its name, and engine.config to the worker, and make one there, hf_paged.Engine(model, config)."
        )
