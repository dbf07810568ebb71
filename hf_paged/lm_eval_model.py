"""lm-evaluation-harness with the engine behind it: the model class `hf-paged`.

    hf-paged-lm-eval run --model hf-paged --model_args pretrained=gpt2,dtype=float32 --tasks arc_easy

is `lm_eval run ...` with this class registered (not installed: `python -m hf_paged.lm_eval_model run ...`).
(lm_eval up to 0.4.13 knows no models but its own. Later versions read the entry point `lm_eval.models` of this package:
`lm_eval run --model hf-paged` works by itself.) `--model hf --model_args attn_implementation=paged_flash,...` works the
same way, without the engine. From Python:

    import hf_paged.lm_eval_model
    lm_eval.simple_evaluate(model="hf-paged", model_args={"pretrained": "gpt2"}, tasks=["arc_easy"])

Texts, tokens, truncation and stop sequences are those of `--model hf`, of which this is a subclass.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils.logging import tqdm

from .engine import Engine, EngineConfig
from .errors import UnsupportedModelError
from .generation.patch import base_model, patch_generate
from .hooks import reason_in_adapter

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError('hf_paged.lm_eval_model needs lm-evaluation-harness: pip install "hf-paged[lm-eval]"') from error

Tokens = Sequence[int]


@register_model("hf-paged")
class PagedLM(HFLM):
    """`--model hf` whose log-likelihoods and generations come from a :class:`hf_paged.Engine`.

    Args:
        pretrained: name, folder or model.
        generate_batch: texts that `generate_until` hands over at a time; log-likelihoods are all handed over at once.
        batch_size, max_batch_size: no effect: the engine makes its own batches. lm_eval always passes them.
        page_size, kv_dtype, max_batch_tokens, max_num_seqs, memory_fraction, num_pages: of
            :class:`hf_paged.EngineConfig`.
        kwargs: as for `--model hf`.

    Raises:
        UnsupportedModelError: the engine cannot serve the model, or the adapter that ``peft`` names.
        ValueError: an argument is not valid: ``mixed_precision_dtype``, and a ``softmax_dtype`` that is not float32,
            belong to forwards that the engine does not run.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        generate_batch: int = 256,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        page_size: int = 16,
        kv_dtype: str = "auto",
        max_batch_tokens: int = 8192,
        max_num_seqs: int = 256,
        memory_fraction: float = 0.9,
        num_pages: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(generate_batch, Integral) or isinstance(generate_batch, bool) or generate_batch < 1:
            raise ValueError(f"generate_batch must be an int of at least 1, got {generate_batch!r}.")
        super().__init__(pretrained, backend="causal", batch_size=generate_batch, **kwargs)
        if self.mixed_precision_dtype is not None:
            raise ValueError(
                f"mixed_precision_dtype is {self.mixed_precision_dtype}: the engine computes in the dtype of the "
                f"weights. Load them in it (dtype=), or use --model hf."
            )
        if self.softmax_dtype not in (None, torch.float32):
            raise ValueError(
                f"softmax_dtype is {self.softmax_dtype}: the engine's log-probabilities are float32. Leave it out, or "
                f"use --model hf."
            )
        reason = reason_in_adapter(self.model)
        if reason is not None:
            raise UnsupportedModelError(f"the engine cannot serve this model: {reason}. Use --model hf.")
        self._options: EngineConfig = EngineConfig(
            page_size=page_size, kv_dtype=kv_dtype, max_batch_tokens=max_batch_tokens, max_num_seqs=max_num_seqs,
            memory_fraction=memory_fraction, num_pages=num_pages, max_model_len=self.max_length + 1,
        )  # fmt: skip
        self._engine: Engine | None = None
        patch_generate(self.model, self._options)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, Tokens, Tokens]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        **options: Any,
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is what greedy decoding gives) of each request.

        Args:
            requests: (context and continuation or None, their tokens); where they are too long together, the beginning
                is cut off, as in `--model hf`.
            disable_tqdm: no progress bar.
            override_bs, options: no effect: the engine makes its own batches.

        Raises:
            ValueError: a continuation without tokens.
        """
        for texts, _, scored in requests:
            if not scored:
                raise ValueError(f"the request {texts!r} has an empty continuation: there is no token to score")
        if self._engine is None:
            self._engine = Engine(base_model(self.model), self._options, background=False)
        else:
            self._engine.wake()
        try:
            handles = [self._submit([*before, *scored]) for _, before, scored in requests]
            answers = []
            bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="loglikelihood requests")
            for handle, (texts, _, scored) in zip(handles, requests):
                output = handle.result()
                if output.error is not None:
                    raise output.error
                known = [*output.prompt_logprobs, *(output.logprobs if handle.forced else [])][-len(scored) :]
                total = sum(item.logprob for item in known)
                answers.append((total, all(item.top_ids[0] == item.token_id for item in known)))
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
                bar.update()
            bar.close()
        finally:
            # generate_until has an engine of its own, which then has the memory.
            self._engine.sleep(keep_graphs=True)
        return answers

    def _submit(self, tokens: list[int]) -> "_Scored":
        """Ask for the log-probabilities of a text; one token more than the model has positions for is not fed."""
        assert self._engine is not None
        tokens = tokens[-(self.max_length + 1) :]
        config = GenerationConfig(max_new_tokens=1, do_sample=False, num_beams=1)
        if len(tokens) <= self.max_length:
            return _Scored(self._engine.submit(tokens, generation_config=config, prompt_logprobs=1), False)
        *prompt, last = tokens
        handle = self._engine.submit(
            prompt, generation_config=config, prompt_logprobs=1, logprobs=1,
            # The last token is the one that is generated; log-probabilities are the model's own, before this.
            prefix_allowed_tokens_fn=lambda _, history: [last],
        )  # fmt: skip
        return _Scored(handle, True)


class _Scored:
    """A request for log-probabilities, and whether its last token is generated."""

    __slots__ = ("forced", "handle")

    def __init__(self, handle: Any, forced: bool) -> None:
        self.handle, self.forced = handle, forced

    def result(self) -> Any:
        return self.handle.result()


def main() -> None:
    """`lm_eval`, with `hf-paged` among its models."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
