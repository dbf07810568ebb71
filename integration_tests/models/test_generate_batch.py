"""transformers' own continuous batching (``generate_batch``, ``ContinuousBatchingManager``) through our attention.

The answer is ``generate()`` with eager attention, one prompt at a time.
"""

import importlib
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from explicit_models import prompts
from explicit_models import tiny_model as tiny_model_on_cpu
from helpers import DEVICE, TOLERANCE, error, softmax_attention
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

import hf_paged
from hf_paged.attention import continuous_batching, interface

GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
LENGTHS = (1, 5, 23, 40, 11)
# The size of a page is called page_size from 5.18 on.
PAGE_SIZE = "page_size" if "page_size" in inspect.signature(ContinuousBatchingConfig).parameters else "block_size"


def tiny_model(family: str, attn_implementation: str) -> PreTrainedModel:
    """On the GPU where there is one: transformers' batching takes streams of whatever accelerator it finds."""
    return tiny_model_on_cpu(family, attn_implementation).to(DEVICE)


def batching_config(page_size: int = 8, **options: Any) -> ContinuousBatchingConfig:
    """A pool that holds all the requests below, and steps of 16 tokens: longer prompts come in chunks.

    Without graphs, which pad steps, and which the experts of gpt_oss do not allow.
    """
    sizes = {PAGE_SIZE: page_size, "num_blocks": 64, "max_batch_tokens": 16, "use_cuda_graph": False}
    return ContinuousBatchingConfig(**sizes | options)


def generate_one_by_one(model: PreTrainedModel, all_prompts: list[list[int]]) -> list[list[int]]:
    tokens = []
    for prompt in all_prompts:
        ids = torch.tensor([prompt], device=model.device)
        tokens.append(model.generate(ids, generation_config=GREEDY)[0, len(prompt) :].tolist())
    return tokens


def generate_batch(model: PreTrainedModel, all_prompts: list[list[int]], **options: Any) -> list[list[int]]:
    outputs = model.generate_batch(
        inputs=all_prompts, generation_config=GREEDY, continuous_batching_config=batching_config(**options),
        progress_bar=False,
    )  # fmt: skip
    assert [o.error for o in outputs.values()] == [None] * len(all_prompts)
    return [o.generated_tokens for o in outputs.values()]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """What each call of our attention on a batching cache saw: tokens, sequences, whether by block table."""
    seen: list[SimpleNamespace] = []
    original = interface.attend_batched

    def spy(module, query, key, value, cache, options, kwargs):
        num_seqs = kwargs["cu_seq_lens_q"].shape[0] - 1
        seen.append(SimpleNamespace(tokens=query.shape[2], seqs=num_seqs, table=kwargs["block_table"] is not None))
        return original(module, query, key, value, cache, options, kwargs)

    monkeypatch.setattr(interface, "attend_batched", spy)
    return seen


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_generate_batch_gives_the_tokens_of_generate(family, steps):
    expected = generate_one_by_one(tiny_model(family, "eager"), prompts(*LENGTHS))
    model = tiny_model(family, "paged_flash")
    assert generate_batch(model, prompts(*LENGTHS)) == expected
    assert max(step.tokens for step in steps) == 16, "a step is filled to the limit"
    assert any(1 < step.seqs < step.tokens for step in steps), "a step mixes prefill and decode"
    assert model.config._attn_implementation == "paged_flash", "transformers gives the model back as it was"
    assert generate_one_by_one(model, prompts(*LENGTHS)) == expected, "generate() still works afterwards"


def test_a_prompt_in_chunks_equals_the_prompt_at_once(steps):
    model = tiny_model("gemma2", "paged_flash")
    expected = generate_batch(model, prompts(61), max_batch_tokens=64)
    assert steps[0].tokens == 61
    steps.clear()
    assert generate_batch(model, prompts(61), max_batch_tokens=7) == expected
    assert steps[0].tokens == 7


def test_a_shared_prefix_is_read_from_the_cache():
    start = prompts(24)[0]
    together = [start + tail for tail in prompts(3, 9, 1)]
    expected = generate_one_by_one(tiny_model("llama", "eager"), together)
    assert generate_batch(tiny_model("llama", "paged_flash"), together) == expected


def test_requests_that_arrive_while_others_run():
    expected = generate_one_by_one(tiny_model("gemma2", "eager"), prompts(*LENGTHS))
    model = tiny_model("gemma2", "paged_flash")
    manager = model.init_continuous_batching(
        generation_config=GREEDY, continuous_batching_config=batching_config(max_requests_per_batch=4)
    )
    results: dict[str, list[int]] = {}
    manager.start()
    try:
        ids = [manager.add_request(prompts(*LENGTHS)[0], max_new_tokens=12)]
        for prompt in prompts(*LENGTHS)[1:]:
            ids.append(manager.add_request(prompt, max_new_tokens=12))
            result = manager.get_result(timeout=0.05)
            if result is not None:
                results[result.request_id] = result.generated_tokens
        while len(results) < len(ids):
            result = manager.get_result(timeout=30)
            assert result is not None, "no result within 30 s"
            assert result.error is None
            results[result.request_id] = result.generated_tokens
    finally:
        manager.stop(block=True, timeout=30)
    assert [results[i] for i in ids] == expected


# The block table, which transformers opens for names like ".*flash.*[23]" on an accelerator only.


@pytest.fixture
def block_tables_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks two questions before it makes a block table; say that a device which has them is there."""
    if not torch.cuda.is_available():
        name = "transformers.generation.continuous_batching.initialization"
        monkeypatch.setattr(importlib.import_module(name), "is_torch_xpu_available", lambda *_, **__: True)


@pytest.mark.usefixtures("block_tables_on_cpu")
def test_block_table_decode_gives_the_tokens_of_generate(steps):
    expected = generate_one_by_one(tiny_model("llama", "eager"), prompts(*LENGTHS))
    model = tiny_model("llama", "paged_flash_2")
    options = dict(use_cuda_graph=False, max_blocks_per_request=8)
    assert generate_batch(model, prompts(*LENGTHS), **options) == expected
    assert any(step.table and step.seqs == len(LENGTHS) for step in steps), "all requests decode by block table"


@pytest.mark.usefixtures("block_tables_on_cpu")
def test_a_page_size_that_the_kernels_lack_fails_the_requests_with_the_reason():
    model = tiny_model("llama", "paged_flash_2")
    outputs = model.generate_batch(
        inputs=prompts(5), generation_config=GREEDY, progress_bar=False,
        continuous_batching_config=batching_config(page_size=24, max_blocks_per_request=8, use_cuda_graph=False),
    )  # fmt: skip
    assert all("page_size must be one of" in str(output.error) for output in outputs.values())


@pytest.fixture
def filled_inputs(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Wait until transformers' batching has filled its inputs; gives a function that makes the filling late, by cycles.

    transformers 5.17 to 5.23 fills them on the default stream and copies the first step's over them on another one,
    without waiting. On a GPU that is busy with other processes the filling may come last, and that step is computed
    from zeros: wrong tokens, whatever the attention. A warm-up of its own waits, but fails for models with windows.
    """
    module = importlib.import_module("transformers.generation.continuous_batching.input_outputs")
    reset, cycles = module.ContinuousBatchingIOs._reset_static_tensors, [0]

    def reset_and_wait(self: Any, full_reset: bool = False) -> None:
        if full_reset and cycles[0]:
            torch.cuda._sleep(cycles[0])
        reset(self, full_reset)
        if full_reset:
            torch.cuda.synchronize()

    monkeypatch.setattr(module.ContinuousBatchingIOs, "_reset_static_tensors", reset_and_wait)
    return lambda late: cycles.__setitem__(0, late)


@pytest.mark.gpu
@pytest.mark.usefixtures("filled_inputs")
@pytest.mark.parametrize("use_cuda_graph", [False, True])
@pytest.mark.parametrize("name", ["paged_flash", "paged_flash_2"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generate_batch_on_a_gpu(family, name, use_cuda_graph, steps):
    all_prompts = prompts(*LENGTHS, 70, 3)
    expected = generate_one_by_one(tiny_model(family, "eager"), all_prompts)
    model = tiny_model(family, name)
    options = dict(page_size=16, use_cuda_graph=use_cuda_graph, max_blocks_per_request=8)
    assert generate_batch(model, all_prompts, max_batch_tokens=64, **options) == expected
    # transformers has no block table for models with windows.
    assert any(step.table for step in steps) == (name == "paged_flash_2" and family == "llama")


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_inputs_that_are_filled_late_do_not_change_the_first_step(family, filled_inputs):
    all_prompts = prompts(*LENGTHS, 70, 3)
    expected = generate_one_by_one(tiny_model(family, "eager"), all_prompts)
    filled_inputs(300_000_000)
    model = tiny_model(family, "paged_flash")
    assert generate_batch(model, all_prompts, max_batch_tokens=64, page_size=16, use_cuda_graph=True) == expected


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_padded_steps_that_are_replayed_give_the_tokens_of_generate(family, monkeypatch):
    """What a captured graph does, without one: steps are padded, and a replay computes the step that was captured, with
    the tensors it had then. Nothing of that step's values may be left in it, and padding may hold anything.
    """
    runner, inputs = (
        importlib.import_module(f"transformers.generation.continuous_batching.{name}")
        for name in ("model_runner", "input_outputs")
    )
    replays: list[int] = []

    class Graph:
        def __init__(self, *step: Any) -> None:
            self.step = step

        def replay(self) -> None:
            replays.append(1)
            self.step[0](*self.step[1:])

        def reset(self) -> None:
            pass

    def capture(self: Any, step: Callable[..., None], stream: Any, *arguments: Any) -> None:
        step(*arguments)
        self.inputs_and_outputs.set_graph(Graph(step, *arguments))

    def with_attribute(cls: type, name: str) -> None:
        original = cls.__init__

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            setattr(self, name, True)

        monkeypatch.setattr(cls, "__init__", init)

    with_attribute(runner.ModelRunner, "pad_inputs")
    with_attribute(inputs.ContinuousBatchingIOs, "use_cuda_graph_varlen")
    choose = runner.ModelRunner._get_forward_fn
    monkeypatch.setattr(runner.ModelRunner, "_get_forward_fn", lambda *args, **how: (choose(*args, **how)[0], True))
    monkeypatch.setattr(runner.ModelRunner, "_capture_graph", capture)
    # Padding brings more keys than the lengths say, which is refused where lengths can be looked at.
    monkeypatch.setattr("hf_paged_kernels.checks.may_read_values", lambda *tensors: False)

    all_prompts = prompts(*LENGTHS, 70, 3)
    expected = generate_one_by_one(tiny_model(family, "eager"), all_prompts)
    model = tiny_model(family, "paged_flash")
    assert generate_batch(model, all_prompts, max_batch_tokens=64, page_size=16) == expected
    assert len(replays) > 5


# One block-table step by hand, against attention computed element by element.


class CacheOf523:
    """``update`` completes the keyword arguments; a block-table step leaves keys and values alone."""

    def __init__(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        self.pages = (k_cache, v_cache)

    def update(self, key_states, value_states, layer_idx: int, kwargs: dict[str, Any]):
        assert layer_idx == 3
        kwargs["cu_seq_lens_k"] = kwargs["cu_seq_lens_k"]["full_attention"]
        kwargs["max_length_k"] = kwargs["max_length_k"]["full_attention"]
        kwargs["block_table"] = kwargs["block_table"][1]
        kwargs["k_cache"], kwargs["v_cache"] = self.pages
        return key_states, value_states

    @staticmethod
    def arguments(cu_seqlens_k: torch.Tensor) -> dict[str, Any]:
        return dict(
            cu_seq_lens_k={"full_attention": cu_seqlens_k}, max_length_q=1, max_length_k={"full_attention": 1},
            is_causal=True,
        )  # fmt: skip


class CacheOf517:
    """``update`` takes one argument per index and is for steps without a block table."""

    def __init__(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        _, self.block_size, self.num_key_value_heads, self.head_dim = k_cache.shape
        flat = (-1, self.num_key_value_heads, self.head_dim)
        # Layer 3 is the first of the second group.
        self.layer_index_to_group_indices = {0: (0, 0), 1: (0, 1), 2: (0, 2), 3: (1, 0)}
        self.key_cache, self.value_cache = [k_cache.view(flat)], [v_cache.view(flat)]

    def update(self, key_states, value_states, layer_idx: int, read_index, write_index):
        raise AssertionError("a block-table step writes its keys itself")

    @staticmethod
    def arguments(cu_seqlens_k: torch.Tensor) -> dict[str, Any]:
        return dict(cu_seq_lens_k=cu_seqlens_k, max_seqlen_q=1, max_seqlen_k=1)


class CacheOf518(CacheOf517):
    """As in 5.17, and a method gives the views of the pages."""

    def __init__(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        self.pages = (k_cache, v_cache)

    def get_cache_for_block_table(self, layer_idx: int):
        assert layer_idx == 3
        return 1, *self.pages


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both implementations of the ops, the Triton one through its interpreter where there is no GPU."""
    monkeypatch.setattr("hf_paged_kernels.attention.ops.uses_triton", lambda _: request.param == "triton")


PAGES, SIZE, HEADS, KV_HEADS, DIM = 12, 8, 4, 2, 16
OPTIONS = [{}, {"sliding_window": 3}, {"sliding_window": 11, "softcap": 2.0, "s_aux": True, "scaling": 0.6}]


@pytest.mark.usefixtures("kernels", "poison")
@pytest.mark.parametrize("make_cache", [CacheOf517, CacheOf518, CacheOf523])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize(
    ("seq_lens", "unallocated"),
    [
        ([1], []),
        ([3, 8, 9, 17, 24], []),
        # Rows that only pad the batch: no tokens, and a table of -1.
        ([9, 16, 0, 0], [2, 3]),
        ([0, 0], [0, 1]),
        # A padding row that still names a block, as block 0 would be named by zeros.
        ([5, 0], []),
    ],
    ids=str,
)
def test_block_table_step_against_dense_attention(make_cache, options, seq_lens, unallocated):
    num_seqs = len(seq_lens)
    k_cache, v_cache = (torch.randn(PAGES, SIZE, KV_HEADS, DIM, device=DEVICE) for _ in range(2))
    query = torch.randn(1, HEADS, num_seqs, DIM, device=DEVICE)
    key, value = (torch.randn(1, KV_HEADS, num_seqs, DIM, device=DEVICE) for _ in range(2))
    table = torch.full((2, num_seqs, 4), -1, dtype=torch.int32)
    free = torch.randperm(PAGES).tolist()
    for row, length in enumerate(seq_lens):
        if row not in unallocated:
            for column in range(max(1, -(-length // SIZE))):
                table[1, row, column] = free.pop()
    expected, k_after, v_after = dense_step(query, key, value, k_cache, v_cache, table[1], seq_lens, options)

    kwargs = dict(options)
    if "s_aux" in kwargs:
        kwargs["s_aux"] = sinks()
    cu_seqlens_k = torch.tensor([0, *torch.tensor(seq_lens).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    out, weights = interface.paged_flash_attention(
        SimpleNamespace(layer_idx=3, is_causal=True), query, key, value, None,
        cache=make_cache(k_cache, v_cache), block_table=table.to(DEVICE), read_index=[], write_index=[],
        cu_seq_lens_q=torch.arange(num_seqs + 1, dtype=torch.int32, device=DEVICE), use_cache=False,
        position_ids=torch.tensor([seq_lens]) - 1, **make_cache.arguments(cu_seqlens_k), **kwargs,
    )  # fmt: skip

    assert weights is None
    assert out.shape == (1, num_seqs, HEADS, DIM)
    held = torch.tensor(seq_lens) > 0
    if held.any():
        assert error(out[0].cpu()[held], expected[held]) < TOLERANCE[torch.float32]
    assert not out[0].cpu()[~held].any(), "padding rows are zeros"
    assert torch.equal(k_cache.cpu(), k_after), "each new key is in its slot, and nothing else changed"
    assert torch.equal(v_cache.cpu(), v_after)


def sinks() -> torch.Tensor:
    return torch.linspace(-1.0, 1.5, HEADS, device=DEVICE)


def dense_step(query, key, value, k_cache, v_cache, table, seq_lens, options):
    """The attention of each sequence's last token, and the caches after the step."""
    k_after, v_after = k_cache.cpu().clone(), v_cache.cpu().clone()
    out = torch.zeros(len(seq_lens), HEADS, DIM, dtype=torch.float64)
    window, scale = options.get("sliding_window"), options.get("scaling", DIM**-0.5)
    for row, length in enumerate(seq_lens):
        if length == 0:
            continue
        page, offset = int(table[row, (length - 1) // SIZE]), (length - 1) % SIZE
        k_after[page, offset], v_after[page, offset] = key[0, :, row].cpu(), value[0, :, row].cpu()
        pages = table[row, : -(-length // SIZE)].long()
        keys, values = (x[pages].flatten(0, 1)[:length] for x in (k_after, v_after))
        out[row] = softmax_attention(
            query[0, :, row][None], keys, values, left=None if window is None else window - 1, right=0,
            softcap=options.get("softcap"), sinks=sinks() if "s_aux" in options else None, scale=scale,
        )[0][0]  # fmt: skip
    return out, k_after, v_after


def test_the_caches_by_hand_have_the_signatures_of_their_versions():
    """The installed transformers' cache must look like one of those that the steps above were tried on."""
    cache = importlib.import_module("transformers.generation.continuous_batching.cache").PagedAttentionCache
    parameters: Callable[[Any], list[str]] = lambda cls: list(inspect.signature(cls.update).parameters)  # noqa: E731
    assert parameters(cache) in (parameters(CacheOf517), parameters(CacheOf523))
    if parameters(cache) == parameters(CacheOf517) and not hasattr(cache, "get_cache_for_block_table"):
        assert "self.layer_index_to_group_indices" in inspect.getsource(cache)


def test_the_alias_is_the_same_implementation():
    ids = torch.tensor(prompts(9), device=DEVICE)
    out = [tiny_model("llama", name)(ids).logits for name in ("paged_flash", "paged_flash_2")]
    assert torch.equal(*out)
    assert hf_paged.__version__


def test_layers_of_a_step_share_its_rows_and_a_step_starts_at_its_first_layer():
    """A graph is captured in a second pass over the same tensors: what layers share must be computed in it again."""
    tables = torch.tensor([[[3, 1], [2, -1], [-1, -1]], [[5, 4], [0, -1], [-1, -1]]], dtype=torch.int32)
    bounds = torch.tensor([0, 9, 13, 13], dtype=torch.int32)
    queries = torch.tensor([0, 1, 2, 2], dtype=torch.int32)

    def rows(layer: int, group: int, queries=queries):
        return continuous_batching.decode_rows(queries, layer, tables[group], bounds, 8, None)

    first = rows(0, 0)
    assert first.slots.tolist() == [1 * 8 + 0, 2 * 8 + 3, -1]
    assert first.seq_lens.tolist() == [9, 4, 0]
    assert rows(1, 0) is first
    assert rows(2, 1).slots.tolist() == [4 * 8 + 0, 0 * 8 + 3, -1]
    assert rows(3, 0) is first
    bounds += torch.tensor([0, 1, 2, 2], dtype=torch.int32)
    again = rows(0, 0)
    assert again.seq_lens.tolist() == [10, 5, 0], "the second pass starts anew"
    assert rows(1, 0) is again
    other = queries.clone()
    assert rows(2, 0, other) is not again, "another step has other lengths"
    assert rows(2, 0) is again, "and may run between the layers of this one"
    steps = len(continuous_batching._steps)
    del other
    assert len(continuous_batching._steps) == steps - 1, "what a step shares goes with it"


@pytest.mark.usefixtures("block_tables_on_cpu")
def test_rows_are_computed_once_a_step(steps, monkeypatch):
    made, make = [], continuous_batching._make_rows
    monkeypatch.setattr(continuous_batching, "_make_rows", lambda *args: made.append(1) or make(*args))
    model = tiny_model("llama", "paged_flash_2")
    generate_batch(model, prompts(*LENGTHS), use_cuda_graph=False, max_blocks_per_request=8)
    assert len(made) * model.config.num_hidden_layers == sum(step.table for step in steps) > 0
