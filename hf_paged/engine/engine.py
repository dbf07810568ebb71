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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from ..errors import RequestError, UnsupportedModelError
from ..fusion import FusedModel
from .admission import Admission, OfflineBatch
from .config import EngineConfig
from .core import EngineCore, no_gradients
from .handle import RequestHandle
from .loop import StepLoop
from .loop_thread import loop_thread
from .offline import generate
from .process import held_interrupts, register, wait_if_exiting
from .sampling.grammar import Grammar
from .sampling.request_params import RequestParams
from .scheduling.page_budget import model_length
from .scheduling.request import Request, RequestOutput
from .startup.start import start
from .startup.support import is_supported
from .turn_lock import TurnLock
from .views import EngineViews
from .waiting import Mailbox, wait_for

FORKED = (
    "the process was forked while the engine had requests, and they run in the parent alone: make an engine of the "
    "child's own there."
)


class Engine(EngineViews):
    """Continuous batching for one model: the same weights, the same module objects.

    The engine's forwards run "paged_flash", whatever the model's attention implementation is. Forwards of other code
    run that one, in other threads meanwhile too.

    Args:
        model: a causal LM of transformers.
        config: options.
        background: steps run in a thread of the engine while it has requests. False: they run in the threads that wait
            for results, or call :meth:`step`.

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
        self._core, self.fused = start(model, self.config, self.max_model_len)
        self.drive, self.mail = TurnLock(), Mailbox()
        self._loop = StepLoop(self._core, self.mail, self.fused)
        self.admission = Admission(self._core)
        self._thread: threading.Thread | None = None
        self._stop: str | None = None
        self._in_step = False
        register(self)

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
            rules: made beforehand, in the place of the arguments from ``generation_config`` to ``grammar``.

        Raises:
            RequestError: it can never be served (too long for the model or the pool, too many rows), its id is taken,
                or the engine is closed.
            QueueFullError: ``EngineConfig(max_waiting=)`` requests wait already.
            ValueError, TypeError: an argument is not valid.
        """
        wait_if_exiting()
        self._loop.check_open()
        request = self.admission.request(
            prompt_ids, request_id=request_id, priority=priority, deadline_s=deadline_s, cache_salt=cache_salt,
            batch=_batch, rules=rules, seed=seed, generation_config=generation_config,
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

    def hand_over(self, requests: list[Request], *, is_limited: bool = False) -> None:
        """Let the loop have requests; ``is_limited``: if no more wait than may."""
        with self.mail.changed:
            self._loop.check_open()
            for request in requests if is_limited else ():
                self._loop.check_room(request)
            self.mail.put(requests, self.admission.rename)
            self.wake_loop()

    def generate(
        self,
        prompts: Sequence[Sequence[int] | torch.Tensor],
        *,
        generation_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        progress: bool = False,
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
            options: as for :meth:`submit`, the same for all.

        Raises:
            RequestError, ValueError, TypeError: a prompt cannot be served; none of them is then.
        """
        return generate(self, prompts, generation_config, progress, **options)

    @property
    def num_new_tokens(self) -> int:
        """New tokens since the start."""
        return self._loop.counters.new_tokens

    def advance(self) -> None:
        """Launch a step if no other thread does and none is on its way."""
        if not self.background and self.drive.acquire(blocking=False):
            try:
                if not self._in_step and (self._loop.pending is None or self._loop.pending.has_arrived):
                    self.step()
            finally:
                self.drive.release()

    def cancel(self, request_id: str) -> bool:
        """End a request with what it has; returns whether it had not ended yet."""
        request = self.mail.unfinished.get(request_id)
        return request is not None and self.cancel_request(request)

    def cancel_request(self, request: Request) -> bool:
        """As :meth:`cancel`, of this request: another one may have its id by now."""
        with self.mail.changed:
            if self.mail.unfinished.get(request.request_id) is not request:
                return False
            self.mail.cancels.append(request)
            self.wake_loop()
        if not self.background and self.drive.acquire(blocking=False):
            try:
                if not self._in_step:
                    self._loop.intake()
                    self._loop.publish()
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
        if self.step():
            return True
        with self.mail.changed:
            if self.mail.incoming or self.mail.cancels:
                return True
            if not self.mail.unfinished:
                self._thread = None
                return False
            timeout = 1.0
            if self._loop.deadlines:
                timeout = min(timeout, max(0.0, self._loop.deadlines[0][0] - self._core.clock()))
            self.mail.changed.wait(timeout)
        return True

    def step(self) -> bool:
        """Run one step, if there is anything to compute; returns whether there was."""
        if threading.current_thread() is not self._thread:
            wait_if_exiting()
        with self.drive:
            if self._in_step:
                raise RequestError("a step cannot run inside another: do not wait for results in a logits processor.")
            self._in_step = True
            try:
                with held_interrupts(), no_gradients(), self._core.on_device():
                    moved = self._loop.step()
            finally:
                self._in_step = False
                if self._stop is not None and not self.mail.is_closed:
                    self._loop.close_now(self._stop)
            error = self._loop.take_error()
            if error is not None and not self.background:
                raise error
            return moved

    @property
    def may_run(self) -> bool:
        """Whether a thread of the engine's own, or any other one, runs steps."""
        return self._thread is not None or self.drive.is_held

    def after_fork(self) -> None:
        """In a forked child: the threads that hold the locks and run the loop are not there."""
        is_busy = bool(self.mail.unfinished) or (self.drive.is_held and not self._in_step)
        self.drive, self.mail.changed = TurnLock(), threading.Condition(threading.Lock())
        self._thread, self._in_step = None, False
        if not is_busy or self.mail.is_closed:
            return
        self._loop.broken, self.mail.is_closed = RequestError(FORKED), True
        for request in list(self.mail.unfinished.values()):
            if request.output is None:
                self._core.endings.end_unaccounted(request, self._loop.broken)
        self._loop.publish()

    # Life

    def close(self, *, drain: bool = False) -> None:
        """End the engine: what has not ended gets the result "cancelled".

        Args:
            drain: let requests end first.
        """
        if drain and not self.mail.is_closed:
            wait_for(self, lambda: not self.mail.unfinished, None, "the engine")
        with self.drive:
            if self._in_step:
                self._stop = "cancelled"  # Called from a request's own code: at the end of the step.
                return
            with held_interrupts():
                self._loop.close_now("cancelled")
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def __enter__(self) -> "Engine":
        self._loop.check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError(
            "an Engine cannot be pickled or copied, it has a thread, locks and pages of this process: send the model, "
            "or its name, and engine.config to the worker, and make one there, hf_paged.Engine(model, config)."
        )

    def pause(self, *, keep_graphs: bool = False, weights_change: bool = True) -> None:
        """Stop once the running step has ended; requests keep their pages.

        What happens to weights, modules and PEFT adapters meanwhile is seen by :meth:`resume`, which then drops what
        was computed before: prefixes, captured steps, and the keys and values of running requests, which compute their
        tokens again. Other changes to what the model computes (an attribute of a module, say) are not seen: call
        :meth:`refresh_weights`. Without a pause, changes are seen by the next step; those that leave no trace (through
        ``parameter.data``, or by custom kernels) when a request finds a prefix of its prompt in an engine
        that was idle, and not while requests run.

        Args:
            keep_graphs: captured decode steps are replayed again after :meth:`resume`, if nothing has changed. False:
                they are captured again.
            weights_change: False: nothing writes to the weights meanwhile, so :meth:`resume` need not compare all of
                their bytes.
        """
        with self._between_steps("pause"):
            self._loop.pause(keep_graphs, weights_change)

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        with self.drive:
            self._loop.check_open()
            if self._loop.is_asleep:
                raise RequestError("the engine sleeps: call wake().")
            self._loop.resume()
        with self.mail.changed:
            self.wake_loop()

    def warm_up(self, batch_sizes: Sequence[int] | None = None, *, progress: bool = False) -> int:
        """Capture the decode steps of these batch sizes before they are needed.

        Args:
            batch_sizes: None: all up to ``max_num_seqs``, and steps over chunks of prompts as well. On a GPU a step of
                ``max_batch_tokens`` is run too, so that its kernels are compiled.
            progress: show a progress bar.

        Returns:
            CUDA graphs that the engine now has; 0 where it captures none.
        """
        sizes = None if batch_sizes is None else list(batch_sizes)
        for size in sizes or ():
            if not 1 <= size <= self.config.max_num_seqs:
                raise ValueError(f"batch_sizes must be 1 to {self.config.max_num_seqs} (max_num_seqs), got {size!r}.")
        with self._between_steps("warm_up"), no_gradients(), self._core.on_device():
            return self._loop.warm_up(sizes, progress)

    def refresh_weights(self) -> None:
        """Say that the model has changed in a way that the engine does not see, see :meth:`pause`.

        Prefixes are dropped, running requests compute their tokens again.
        """
        with self._between_steps("refresh_weights"):
            self._loop.start_over(None)

    def drop_prefixes(self) -> None:
        """Forget every cached prefix; running requests keep their pages."""
        with self._between_steps("drop_prefixes"):
            self._core.drop_prefixes()

    def sleep(self, *, keep_graphs: bool = False) -> None:
        """Give the memory of the pages back, and pause.

        Requests wait, and compute their tokens again after :meth:`wake`.

        Args:
            keep_graphs: captured steps stay, with the memory of their intermediate results, so that :meth:`wake` need
                not capture them again; see :meth:`pause` for the changes of the model that are seen.
        """
        with self._between_steps("sleep"):
            self._loop.sleep(keep_graphs)

    def wake(self) -> None:
        """Go on after :meth:`sleep`."""
        with self.drive:
            self._loop.check_open()
            self._loop.wake()
            self.resume()

    @contextlib.contextmanager
    def _between_steps(self, name: str) -> Iterator[None]:
        """No step runs meanwhile.

        Raises:
            RequestError: the engine is closed, or a request's own code asks.
        """
        wait_if_exiting()
        with self.drive:
            if self._in_step:
                raise RequestError(
                    f"{name}() was called inside a step, by a request's own code (a logits processor or a criterion): "
                    f"call it from outside."
                )
            self._loop.check_open()
            yield
            self._loop.note_counts()
