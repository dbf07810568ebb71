"""``patch_generate``: a model's ``generate()`` runs in the engine, with the arguments and results it always had."""

import contextlib
import copy
import functools
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteriaList
from transformers.utils import logging

from ..engine import Engine, EngineConfig, is_supported
from ..engine.sampling.request_params import INDEXING, check_token_ids, checked_seed, num_logits_of
from ..engine.sampling.stop_strings import StopStrings
from ..errors import RequestError, UnsupportedModelError
from ..hooks import active_hooks, foreign_forwards
from ..mixed_precision import enables_autocast
from ..transformers_internals import hooks_of, resolve_generation_config
from .fallback_reasons import reason_in_arguments, reason_in_config, reason_in_model
from .loop import log_original, refuse_seed, run_loop

logger = logging.get_logger(__name__)

SIGNATURE = inspect.signature(GenerationMixin.generate)


class PatchedGenerate:
    """What stands in the place of ``model.generate``: transformers' preparation around the engine's loop.

    Kept in the model's ``__dict__``, from where :func:`unpatch_generate` takes it away again. As a bound method does,
    it keeps the model alive. Copies and pickles of the model have the original ``generate``.
    """

    def __init__(self, model: PreTrainedModel, config: EngineConfig, keep_awake: bool) -> None:
        self._model = model
        self.config, self.keep_awake = config, keep_awake
        self.engine: Engine | None = None
        self._seen: _Seen | None = None
        self._is_checked = False
        self._refusal: tuple[_Seen, list[int], str] | None = None
        self._calls: list[int] = []
        self._is_closed = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        functools.update_wrapper(self, type(model).generate, updated=())
        self.__signature__ = inspect.signature(self.original)

    @property
    def original(self) -> Any:
        """The model's own ``generate``, as it was before."""
        return type(self._model).generate.__get__(self._model)

    def __call__(self, *args: Any, seed: int | None = None, **kwargs: Any) -> Any:
        """``GenerationMixin.generate``, and ``seed``: of the sampled tokens, 0 <= seed < 2**64."""
        original, model = self.original, self._model
        if seed is not None:
            seed = checked_seed(seed)
        arguments = SIGNATURE.bind(model, *args, **kwargs).arguments
        if arguments.get("custom_generate") is generate:
            # That is what a patched model does anyway.
            arguments.pop("custom_generate")
            kwargs.pop("custom_generate", None)
        config_keywords = dict(arguments.pop("kwargs", {}))
        tokenizer = config_keywords.pop("tokenizer", None)
        config_keywords.pop("trust_remote_code", None)
        streamer = arguments.get("streamer")
        config, rest = resolve_generation_config(model, arguments.get("generation_config"), **config_keywords)
        check_token_ids(config, num_logits_of(model), INDEXING)
        reason = (
            reason_in_arguments(model, arguments, rest)
            or self._why_unsupported()
            or reason_in_config(config, streamer is not None)
        )
        if reason is not None:
            refuse_seed(seed, reason)
            log_original(reason)
            return original(*args, **kwargs)
        if config.stop_strings is not None and tokenizer is not None:
            # transformers does not hand the tokenizer on to a loop that is given to it.
            _stop_strings_as_criterion(arguments, kwargs, config, tokenizer, model)
        kwargs.pop("inputs", None)
        kwargs |= {name: value for name, value in arguments.items() if name not in ("self", "inputs")}
        kwargs["custom_generate"] = functools.partial(run_loop, self.serving, seed=seed, streamer=streamer)
        return original(arguments.get("inputs"), **kwargs)

    def _why_unsupported(self) -> str | None:
        """Told once from the model's class and config, and by an engine that refused the model as it is now."""
        if self._is_closed:
            return "generate() is not patched any more"
        if not self._is_checked:
            self._is_checked = True
            self._refuse("; ".join(is_supported(self._model)))
        if self._refusal is not None:
            seen, hooks, reason = self._refusal
            if (seen, hooks) == (_seen(self._model), active_hooks(hooks_of(self._model))):
                return reason
        return None

    def _refuse(self, reason: str) -> None:
        if reason:
            self._refusal = _seen(self._model), active_hooks(hooks_of(self._model)), reason

    @contextlib.contextmanager
    def serving(self) -> Iterator[Engine]:
        """The engine, made by the first call that needs it; it sleeps between calls, or pauses if it is kept awake.

        Calls from several threads share it. Training and everything else find the model as it was, also meanwhile. An
        engine that sleeps gives its pages back.

        Raises:
            UnsupportedModelError: it cannot serve the model; later calls go to transformers at once.
            RequestError: :meth:`close` was called.
        """
        with self._lock:
            if self._is_closed:
                raise RequestError("generate() is not patched any more")
            engine = self._awake_engine()
            self._calls.append(threading.get_ident())
        try:
            yield engine
        finally:
            with self._lock:
                self._calls.remove(threading.get_ident())
                if not self._calls:
                    self._rest()
                    self._changed.notify_all()

    def _rest(self) -> None:
        """No call is left."""
        if self._is_closed:
            self._end()
        elif self.engine is not None:
            with contextlib.suppress(RequestError):  # it was closed meanwhile, or has broken
                if self.keep_awake:
                    # Weights may be others in the next call: no key or value of today's is used then.
                    self.engine.drop_prefixes()
                    self.engine.pause(keep_graphs=True)
                else:
                    self.engine.sleep(keep_graphs=True)

    def _awake_engine(self) -> Engine:
        if self.engine is not None and self._calls:
            return self.engine
        seen = _seen(self._model)
        if self._seen != seen:
            # Pages have the dtype and the device of the weights, and forwards that are new have not been compared.
            self._end()
        if self.engine is not None:
            try:
                self.engine.wake()  # after a pause as well
                return self.engine
            except RequestError as error:
                logger.warning(f"generate() starts a new engine: {error}")
        try:
            # Steps run in the calling threads: hooks, contexts and thread-local settings are those of the call.
            self.engine = Engine(self._model, self.config, background=False)
        except UnsupportedModelError as error:
            self._refuse(str(error).rstrip("."))
            raise
        self._seen = seen
        return self.engine

    def _end(self) -> None:
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.close()

    def close(self) -> None:
        """End the engine once the calls that are in flight have ended; later ones go to transformers.

        Waits for calls of other threads. From inside a call (a streamer, a processor) it returns at once.
        """
        with self._lock:
            self._is_closed = True
            if threading.get_ident() not in self._calls:
                self._changed.wait_for(lambda: not self._calls)
                self._end()

    def __reduce__(self) -> Any:
        # Unpickled before the model has its state: what is found then is the method of its class.
        return getattr, (self._model, "generate")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._model))
        return self if copied is None else type(copied).generate.__get__(copied)


_Seen = tuple[frozenset[Any], frozenset[Any], bool]


def _seen(model: PreTrainedModel) -> _Seen:
    """What an engine sees of a model when it starts, and takes for granted: dtypes and devices, code of its own,
    autocast."""
    weights = frozenset((weight.dtype, weight.device) for weight in model.parameters())
    return weights, foreign_forwards(model), enables_autocast(model)


def _stop_strings_as_criterion(
    arguments: dict[str, Any], kwargs: dict[str, Any], config: GenerationConfig, tokenizer: Any, model: Any
) -> None:
    """Replace stop strings, in place, by a criterion for them."""
    criterion = StopStrings(tokenizer, config.stop_strings)
    arguments["stopping_criteria"] = StoppingCriteriaList([*(arguments.get("stopping_criteria") or []), criterion])
    given = arguments.get("generation_config")
    if given is not None and given.stop_strings is not None:
        given = copy.deepcopy(given)
        given.stop_strings = None
        arguments["generation_config"] = given
    if "stop_strings" in kwargs or given is None or model.generation_config.stop_strings is not None:
        kwargs["stop_strings"] = None


def patch_generate(model: Any, config: EngineConfig | None = None, *, keep_awake: bool = False) -> None:
    """Let ``model.generate()`` run in continuous batches.

    Same signature, arguments and results as before, and one argument more: ``seed``. Each prompt of a batch is
    computed without its padding and leaves the batch when it ends. Calls that the engine does not run (contrastive
    search, inputs that are not text, scores asked for, a model that it cannot serve, steps that the model overrides,
    forward hooks that are not marked by :func:`row_wise`, an autocast around the call, ...) go to transformers' own
    loop, with one line in the log that says why.

    Samples are drawn by noise from the call's seed, which comes from torch's global generator where none is given:
    repeatable by ``torch.manual_seed``, but not the samples of ``torch.multinomial``. A logits processor of another
    library is called with one row, ``[1, L]``, at a time: in a batch of several it must have an attribute
    ``row_wise = True``, or the call goes to transformers. Stopping criteria of another library see the whole batch
    after each step, as always.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.
        config: the engine's options. Patching a patched model again takes the new ones.
        keep_awake: between calls, keep the memory of the pages as well as the captured decode steps, so that the next
            call starts at once: for many calls in a row, on a GPU with room. False: a call gives the memory of the
            pages back when it ends; captured steps stay. Cached prefixes are dropped either way, and weights may be
            trained or exchanged; see :meth:`Engine.pause` for the changes that are not seen.

    Raises:
        TypeError: not such a model, not an :class:`EngineConfig`, or not a bool.
        ValueError: something else has replaced ``model.generate``.
    """
    base = base_model(model)
    if config is not None and not isinstance(config, EngineConfig):
        raise TypeError(f"config is {config!r}: an EngineConfig or None is accepted.")
    if not isinstance(keep_awake, bool):
        raise TypeError(f"keep_awake is {keep_awake!r}: True or False is accepted.")
    unpatch_generate(base)
    other = base.__dict__.get("generate")
    if other is not None and getattr(other, "__func__", None) is not type(base).generate:
        raise ValueError(f"model.generate has been replaced by {other!r}: undo that first, only one can stand there.")
    base.generate = PatchedGenerate(base, config or EngineConfig(), keep_awake)


def unpatch_generate(model: Any) -> None:
    """Undo :func:`patch_generate`: the original ``generate``, no pages held.

    A model that is not patched stays as it is.
    """
    base = base_model(model)
    patched = base.__dict__.get("generate")
    if isinstance(patched, PatchedGenerate):
        del base.generate
        patched.close()


def generate(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    seed: int | None = None,
    **model_kwargs: Any,
) -> Any:
    """The engine for one call, without a patch: ``model.generate(..., custom_generate=hf_paged.generate)``.

    ``seed`` may be given to that ``generate`` as well. A patched model's engine is used where there is one; otherwise
    an engine lives as long as the call. transformers does not hand a streamer on to a loop of this kind: with one, use
    :func:`patch_generate`.
    """
    patched = model.__dict__.get("generate")

    @contextlib.contextmanager
    def temporary() -> Iterator[Engine]:
        reason = reason_in_model(model)
        if reason is not None:
            raise UnsupportedModelError(reason)
        # No larger than the call can use; and one call does not make up for comparing fused modules first.
        rows = min(len(input_ids), EngineConfig().max_num_seqs)
        length = generation_config.max_length
        config = EngineConfig(max_num_seqs=rows, max_model_len=length, fuse=False, compile_ahead=False)
        with Engine(model, config, background=False) as engine:
            yield engine

    return run_loop(
        patched.serving if isinstance(patched, PatchedGenerate) else temporary,
        model,
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        seed=seed,
        **model_kwargs,
    )


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT model, whose ``generate`` PEFT calls; any other as it is.

    Raises:
        TypeError: not a transformers model that can generate.
    """
    base = (
        model if isinstance(model, PreTrainedModel) or not hasattr(model, "get_base_model") else model.get_base_model()
    )
    if not isinstance(base, PreTrainedModel) or not isinstance(base, GenerationMixin):
        raise TypeError(f"model is a {type(model).__name__}: a transformers model with generate() is accepted.")
    return base
