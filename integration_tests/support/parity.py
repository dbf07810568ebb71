"""One row of the support matrix: a family's greedy ``generate()`` with "paged_flash" against its own eager attention.

``python integration_tests/support/parity.py`` examines every family and writes ``eval/results/model_support.md``.
"""

import argparse
import datetime
import logging
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent)]

import hf_paged_kernels  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from host import cache_of, with_cache  # noqa: E402
from tiny_models import WINDOW, WINDOW_OFF, build, copy_weights, families, randomise, tiny_config  # noqa: E402
from transformers import AttentionInterface, GenerationConfig, PreTrainedModel  # noqa: E402

import hf_paged  # noqa: E402
from hf_paged.attention import interface  # noqa: E402
from hf_paged.cache.lazy_states import LazyStates  # noqa: E402

SUPPORT_FILE = ROOT / "eval" / "results" / "model_support.md"
STATUSES = ("works", "refused", "not built")
CALLS = ("single", "padded", "continued")
COLUMNS = ("family", "class", "single", "left-padded", "continued", "paged cache", "note")

PROMPT, NEW_TOKENS, MORE = 13, 10, 4
PADDING = (0, 4, 9)
"""Padded columns of each row of the batch of prompts: the last row has fewer tokens than a window."""

LEAST_MARGIN = 1e-3
"""Of eager's two best logits, in standard deviations of the logits: below it, equal tokens would be luck."""
LEAST_TOKENS = 3
"""Different tokens that eager must generate in each call."""
MAX_DIFFERENCE = 2e-4
"""Between the logits, in standard deviations. Rounding is below 3e-5."""
SEEDS = 20
LEAST_AUTOCAST_ERROR = 0.01
"""Of bfloat16 logits, by token and relative: an error of this size is never too much."""


class Mismatch(AssertionError):
    """The family is not refused and does not do what eager does."""


@dataclass
class Row:
    """What is known of a family; ``status`` is one of :data:`STATUSES`."""

    family: str
    model_class: str = "-"
    status: str = "works"
    single: str = "-"
    padded: str = "-"
    continued: str = "-"
    cache: str = "-"
    notes: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        """The row's text, in the order of :data:`COLUMNS`."""
        note = "; ".join(self.notes).replace("|", "\\|")
        return [self.family, self.model_class, self.single, self.padded, self.continued, self.cache, note]


@dataclass
class Spy:
    """What ran while :func:`watch` watched."""

    calls: Counter[int] = field(default_factory=Counter)
    gathers: int = 0
    dense_masks: int = 0
    warnings: list[str] = field(default_factory=list)


class _Keep(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def watch(change: Callable[..., Any] | None = None) -> Iterator[Spy]:
    """Count what reaches "paged_flash"; ``change`` takes its place, to see whether the matrix would notice."""
    spy = Spy()
    dense, with_dense_mask, called = LazyStates.dense, interface.with_dense_mask, interface.paged_flash_attention

    def count_call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        spy.calls[id(module)] += 1
        return (change or called)(module, *args, **kwargs)

    def count_gather(states: LazyStates) -> torch.Tensor:
        spy.gathers += 1
        return dense(states)

    def count_dense_mask(*args: Any) -> torch.Tensor:
        spy.dense_masks += 1
        return with_dense_mask(*args)

    logger, handler = logging.getLogger("hf_paged.registration"), _Keep(spy.warnings)
    type(logger).warning_once.cache_clear()  # type: ignore[attr-defined]
    level = logger.level
    AttentionInterface.register("paged_flash", count_call)
    LazyStates.dense, interface.with_dense_mask = count_gather, count_dense_mask
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        yield spy
    finally:
        AttentionInterface.register("paged_flash", called)
        LazyStates.dense, interface.with_dense_mask = dense, with_dense_mask
        logger.removeHandler(handler)
        logger.setLevel(level)


def generate_all(model: PreTrainedModel) -> dict[str, Any]:
    """The outputs of the calls of :data:`CALLS`; the continued one goes on from the padded batch's cache."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (len(PADDING), PROMPT), generator=generator)
    more = torch.randint(3, 90, (len(PADDING), MORE), generator=generator)
    mask = torch.ones_like(ids)
    for row, padding in enumerate(PADDING):
        mask[row, :padding] = 0
    model.generation_config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, bos_token_id=1, use_cache=True,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    outputs = {"single": model.generate(ids[:1], attention_mask=mask[:1])}
    outputs["padded"] = model.generate(ids * mask, attention_mask=mask)
    longer = torch.cat([outputs["padded"].sequences, more], dim=1)
    longer_mask = torch.cat([mask, mask.new_ones(len(PADDING), NEW_TOKENS + MORE)], dim=1)
    cache = cache_of(outputs["padded"])
    outputs["continued"] = model.generate(longer, attention_mask=longer_mask, **with_cache(cache))
    return outputs


def is_telling(output: Any) -> bool:
    """Whether equal tokens mean something: several of them, each chosen with a margin."""
    logits = torch.stack(output.logits)
    best = logits.topk(2, dim=-1).values
    margin = (best[..., 0] - best[..., 1]).min() / logits.std()
    return output.sequences[:, -NEW_TOKENS:].unique().numel() >= LEAST_TOKENS and bool(margin > LEAST_MARGIN)


def telling_weights(model: PreTrainedModel) -> dict[str, Any]:
    """Give a model the first weights under which every call of eager is telling; returns eager's outputs."""
    for seed in range(SEEDS):
        randomise(model, seed)
        outputs = generate_all(model)
        if all(is_telling(outputs[call]) for call in CALLS):
            return outputs
    raise Mismatch(f"none of {SEEDS} seeds gives eager {LEAST_TOKENS} tokens with a margin")


def compare(expected: dict[str, Any], got: dict[str, Any]) -> None:
    """The same tokens from the same logits, in every call."""
    for call in CALLS:
        wanted, logits = torch.stack(expected[call].logits), torch.stack(got[call].logits)
        difference = float((wanted - logits).abs().max() / wanted.std())
        if not torch.equal(expected[call].sequences, got[call].sequences):
            raise Mismatch(f"{call}: other tokens than eager, logits differ by {difference:.1e} standard deviations")
        if not difference < MAX_DIFFERENCE:
            raise Mismatch(f"{call}: eager's tokens, but logits that differ by {difference:.1e} standard deviations")


def check_autocast(eager: PreTrainedModel, paged: PreTrainedModel) -> None:
    """Under bfloat16 autocast: a training step, and greedy tokens over a cache, as near to float32 as eager's.

    Errors are medians over tokens: a close choice of a router may be another one, for eager too.
    """
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 90, (2, PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def train(model: PreTrainedModel, autocast: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
        if autocast and model is paged:
            out.loss.backward()
            gradients = [x.grad for x in model.parameters() if x.grad is not None]
            model.zero_grad()
            if not gradients or not all(bool(x.isfinite().all()) for x in gradients):
                raise Mismatch("training under autocast: no gradients, or not finite ones")
        return out.logits.detach()[mask.bool()]

    def decode(model: PreTrainedModel, autocast: bool) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model.generate(ids, attention_mask=mask, max_new_tokens=2, min_new_tokens=2)
        return torch.cat(out.logits).float()

    for name, run in (("training", train), ("generation", decode)):
        exact = run(eager, False)
        try:
            rounded = run(eager, True)
        except RuntimeError:
            continue  # The family's own code does not run under autocast.
        errors = [
            float(((x - exact).norm(dim=-1) / exact.norm(dim=-1)).median()) for x in (rounded, run(paged, True))
        ]
        if not errors[1] <= 2 * errors[0] + LEAST_AUTOCAST_ERROR:
            raise Mismatch(f"{name} under autocast: an error of {errors[1]:.1e}, eager's is {errors[0]:.1e}")


def check_calls(spy: Spy, forwards: int, num_layers: int) -> None:
    """Every caller must have called in every forward, and for as many layers as eager's cache has keys in."""
    if not num_layers or not spy.calls or sum(spy.calls.values()) < forwards * num_layers:
        raise Mismatch(f"{sum(spy.calls.values())} calls of paged_flash, not {forwards} forwards x {num_layers} layers")
    if min(spy.calls.values()) < forwards:
        raise Mismatch(f"a layer called paged_flash {min(spy.calls.values())} times in {forwards} forwards")


def cache_column(outputs: dict[str, Any], spy: Spy) -> str:
    """Yes, or the class of the cache that was used instead."""
    cache = cache_of(outputs["continued"])
    for call in CALLS:
        if isinstance(cache_of(outputs[call]), hf_paged.PagedCache):
            cache_of(outputs[call]).check()
    if isinstance(cache, hf_paged.PagedCache):
        return "yes"
    if type(cache) is transformers.DynamicCache and not any("DynamicCache" in text for text in spy.warnings):
        raise Mismatch("generate() kept a DynamicCache without a warning")
    return f"no: {type(cache).__name__}"


def is_clear(error: Exception) -> bool:
    """Whether an error is this package's own and says what to do."""
    frames = traceback.extract_tb(error.__traceback__)
    packages = [Path(package.__file__).parent for package in (hf_paged, hf_paged_kernels)]
    ours = any(package in Path(frame.filename).parents for frame in frames[-2:] for package in packages)
    return ours and isinstance(error, ValueError) and "attn_implementation=" in str(error)


def short(error: Exception, length: int = 150) -> str:
    """An error in one line of a table."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= length else text[: length - 3] + "..."


def examine(family: str) -> Row:
    """Build, run and compare one family.

    Raises:
        Mismatch: wrong tokens, a layer that went its own way, a cache that was replaced silently.
        Exception: whatever the family raised under "paged_flash", unless it is a refusal (:func:`is_clear`).
    """
    row = Row(family)
    try:
        config = tiny_config(family)
        eager = build(config, "eager")
    except Exception as error:  # transformers' own: whatever it is, it is the reason.
        return _without_result(row, "not built", error)
    row.model_class = type(eager).__name__
    try:
        paged = build(config, "paged_flash")
    except Exception as error:
        return _refused(row, error)
    try:
        generate_all(eager)
    except Exception as error:
        return _without_result(row, "not built", error)
    expected = telling_weights(eager)
    copy_weights(eager, paged)
    forwards: list[None] = []
    paged.register_forward_pre_hook(lambda *_: forwards.append(None))
    try:
        with watch() as spy:
            got = generate_all(paged)
    except Exception as error:
        return _refused(row, error)
    compare(expected, got)
    layers = cache_of(expected["single"]).layers
    check_calls(spy, len(forwards), sum(getattr(layer, "keys", None) is not None for layer in layers))
    row.single = row.padded = row.continued = "same"
    row.cache = cache_column(got, spy)
    row.notes = _notes(row, spy)
    check_autocast(eager, paged)
    return row


def _without_result(row: Row, status: str, error: Exception) -> Row:
    row.status, row.notes = status, [short(error)]
    return row


def _refused(row: Row, error: Exception) -> Row:
    if not is_clear(error):
        raise error
    return _without_result(row, "refused", error)


def _notes(row: Row, spy: Spy) -> list[str]:
    # What generate() warned of where it kept transformers' cache, without the advice behind the semicolon.
    notes = [warning.split(": ", 1)[-1].split(";")[0] for warning in spy.warnings[:1]]
    if row.cache != "yes" and not notes:
        notes.append("the model makes its own cache")
    if spy.gathers and not spy.dense_masks:
        notes.append("the model changes what its cache returns: keys are gathered, not read in place")
    if spy.dense_masks:
        notes.append("4D masks: reference path")
    if row.family in WINDOW_OFF:
        notes.append("a window shorter than the sequence is refused: the model does not pass it to attention")
    return notes


def render(rows: list[Row]) -> str:
    """The text of ``model_support.md``."""
    counts = Counter(row.status for row in rows)
    num_paged = sum(row.cache == "yes" for row in rows)
    lengths = ", ".join(str(PROMPT - padding) for padding in PADDING)
    text = f"""# Model support

transformers {transformers.__version__}, torch {torch.__version__.split("+")[0]}, hf_paged {hf_paged.__version__}, \
{datetime.date.today().isoformat()}.
Written by `python integration_tests/support/parity.py`; `integration_tests/models/test_parity.py` runs the same.

Every causal LM of transformers, built small from its config with random weights: {counts["works"]} families give with
`paged_flash` the tokens that their eager attention gives ({num_paged} of them on a `PagedCache`), \
{counts["refused"]} are refused with an error
that says what to do, {counts["not built"]} could not be tried.

Float32 on CPU, greedy, {NEW_TOKENS} new tokens, sliding windows of {WINDOW} tokens. single: one prompt of {PROMPT}
tokens; left-padded: prompts of {lengths} tokens; continued: a second call with {MORE} more tokens each, from the
cache of the first.
"same": equal tokens, logits within rounding, no close choices of eager's, and every attention layer was seen to run
`paged_flash` in every forward. A cache that is not paged is transformers' own: the family has layers whose states do
not fit into pages.
"""
    for status in STATUSES:
        chosen = [row.cells() for row in rows if row.status == status]
        # Without a result there are only a family, a class and a reason.
        columns = range(len(COLUMNS)) if status == "works" else (0, 1, len(COLUMNS) - 1)
        text += f"\n## {status.capitalize()} ({len(chosen)})\n\n"
        text += _line(COLUMNS[i] for i in columns) + _line("---" for _ in columns)
        text += "".join(_line(cells[i] for i in columns) for cells in chosen)
    return text


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def committed() -> dict[str, str]:
    """Status by family, as the committed file has it."""
    status, found = "", {}
    for line in SUPPORT_FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            status = line[3:].rsplit(" (", 1)[0].lower()
        elif line.startswith("| ") and not line.startswith(("| family ", "| --- ")):
            found[line[2:].split(" | ", 1)[0]] = status
    return found


def main() -> None:
    """Command line: examine every family and write the file."""
    parser = argparse.ArgumentParser(description="Write the support matrix.")
    parser.add_argument("--output", type=Path, default=SUPPORT_FILE)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # Tiny matrices: threads cost more than they give.
    rows = [examine(family) for family in families()]
    options.output.write_text(render(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
