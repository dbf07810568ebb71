"""The engine on a GPU: tokens of generate(), captured decode steps at any lengths, steps that nothing waits for."""


import pytest
import torch
from random_requests import tiny_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import hf_paged
from hf_paged.engine.execution.decode_graphs import CaptureError, CudaCapture

pytestmark = pytest.mark.gpu


def config(new: int = 8, **options) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, pad_token_id=0, **({"do_sample": False} | options))


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def make_engine(model, **options) -> hf_paged.Engine:
    defaults = dict(num_pages=200, page_size=8, max_num_seqs=16, max_batch_tokens=64)
    return hf_paged.Engine(model, hf_paged.EngineConfig(**(defaults | options)), background=False)


def alone(model, ids: list[int], new: int) -> list[int]:
    out = model.generate(torch.tensor([ids], device="cuda"), generation_config=config(new))
    return out[0, len(ids) :].tolist()


def graphs_of(engine):
    graphs = engine._core.runner.graphs
    assert graphs is not None
    assert graphs.failure is None, graphs.failure
    return graphs


def random_llama(dtype: torch.dtype, num_heads: int) -> LlamaForCausalLM:
    shape = LlamaConfig(
        vocab_size=500, hidden_size=512, intermediate_size=512, num_hidden_layers=3, num_attention_heads=num_heads,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(shape, dtype=dtype).eval()
    model.generation_config = GenerationConfig()
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama").cuda()


@pytest.mark.parametrize("cuda_graphs", [None, False])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "qwen3", "gpt2", "deepseek_v3", "qwen3_next"])
def test_greedy_tokens_are_those_of_generate(family, cuda_graphs):
    model = tiny_model(family).cuda()
    prompts = [prompt(n, n) for n in (1, 3, 9, 17, 30, 40)]
    expected = [alone(model, ids, 20) for ids in prompts]
    with make_engine(model, num_pages=14, cuda_graphs=cuda_graphs) as engine:
        assert [output.token_ids for output in engine.generate(prompts, generation_config=config(20))] == expected
        engine.check()
        if cuda_graphs is None and family in ("llama", "gemma3_text", "qwen3"):
            assert len(graphs_of(engine)) > 0


def test_a_graph_captured_at_short_lengths_serves_long_ones(model):
    with make_engine(model) as engine:
        engine.warm_up([1, 3])
        graphs = graphs_of(engine)
        made = dict(graphs._replays)
        assert len(made) == 2
        for lengths in ((2, 4, 6), (60, 1, 33), (40, 40, 7)):
            prompts = [prompt(n, n) for n in lengths]
            expected = [alone(model, ids, 24) for ids in prompts]
            assert [o.token_ids for o in engine.generate(prompts, generation_config=config(24))] == expected
        assert all(graphs._replays[size] is made[size] for size in made), "a graph was captured again"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_captured_chunks_of_prompts_give_the_tokens_of_generate(family):
    model = tiny_model(family).cuda()
    with make_engine(model, max_batch_tokens=100, prefix_caching=False) as engine:
        engine.warm_up()
        graphs = engine._core.runner.chunk_graphs
        assert graphs.failure is None, graphs.failure
        assert graphs._replays.keys() == {(16, 0), (32, 0), (64, 0), (100, 0), (100, 32)}
        made = dict(graphs._replays)
        for lengths in ((5,), (9, 17, 3), (60, 1, 33), (90, 2), (110, 40)):
            prompts = [prompt(n, n) for n in lengths]
            expected = [alone(model, ids, 12) for ids in prompts]
            assert [o.token_ids for o in engine.generate(prompts, generation_config=config(12))] == expected
        assert all(graphs._replays[bucket] is made[bucket] for bucket in made), "a graph was captured again"


@pytest.mark.parametrize("cuda_graphs", [None, False])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_prompts_of_a_step_share_their_beginning(family, cuda_graphs):
    """Keys are read in the step, and by the launch of attention, that comes right behind their being written."""
    model, beginning = tiny_model(family).cuda(), prompt(37, 5)
    prompts = [beginning + prompt(n, n) for n in (3, 9, 1, 9, 20)] + [beginning, prompt(20)]
    expected = [alone(model, ids, 12) for ids in prompts]
    with make_engine(model, max_batch_tokens=256, cuda_graphs=cuda_graphs) as engine:
        engine.warm_up()
        for _ in range(3):
            engine.drop_prefixes()
            handles = [engine.submit(ids, generation_config=config(12)) for ids in prompts]
            assert [handle.result().token_ids for handle in handles] == expected
            assert sum(handle.result().cached_tokens for handle in handles) >= 5 * 32
        engine.check()


def test_what_a_decode_step_gave_is_whole_when_a_chunk_of_the_same_step_has_run(model):
    """Chunks are captured first, and leave memory that decode steps would take if it was theirs to take."""
    prompts = [prompt(n, n) for n in (20, 33, 7, 50, 15, 41, 28, 3, 60, 11, 36, 24)]
    expected = [alone(model, ids, 30) for ids in prompts]
    with make_engine(model, num_pages=400, prefix_caching=False) as engine:
        engine._core.runner.chunk_graphs.warm_up()
        engine.warm_up()
        handles = []
        for ids in prompts:
            handles.append(engine.submit(ids, generation_config=config(30), logprobs=0))
            for _ in range(3):
                engine.step()
        while engine.step():
            pass
        for handle, ids, tokens in zip(handles, prompts, expected):
            output = handle.result()
            assert output.token_ids == tokens
            with torch.no_grad():
                logits = model(torch.tensor([ids + tokens], device="cuda")).logits[0, len(ids) - 1 : -1]
            wanted = logits.log_softmax(-1).gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
            got = torch.tensor([entry.logprob for entry in output.logprobs], device="cuda")
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_graphs_are_captured_again_after_all_were_dropped(model):
    ids = prompt(20)
    expected = alone(model, ids, 12)
    with make_engine(model) as engine:
        for _ in range(3):
            engine.warm_up([1])
            assert engine.generate([ids], generation_config=config(12))[0].token_ids == expected
            assert len(graphs_of(engine)) == 1
            engine.refresh_weights()


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_experts_in_float32_run_eagerly_and_leave_nothing_behind(family):
    """Grouped matmuls of other dtypes than bfloat16 read their offsets back: found out before a capture begins."""
    model = tiny_model(family).cuda()
    ids = prompt(20)
    expected = alone(model, ids, 12)
    with make_engine(model) as engine:
        engine.warm_up()
        assert engine.generate([ids], generation_config=config(12))[0].token_ids == expected
        assert "CaptureError" in engine._core.runner.graphs.failure
    torch.randn(3, device="cuda")  # A capture that failed half way would leave the generator behind.


def test_inputs_outlive_what_ran_ahead_of_a_failed_capture():
    """Its memory is free for others when the capture has failed, and must not be read after that."""
    written = torch.zeros(8, device="cuda")

    def step(slots):
        torch.cuda._sleep(int(2e8))
        written[slots] = 1.0
        return slots.sum().item()

    slots = torch.full((4,), 7, device="cuda")
    with pytest.raises(CaptureError, match="reads values back"):
        CudaCapture()(step, slots)
    del slots
    others = torch.zeros(4, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    assert written.tolist() == [0.0] * 7 + [1.0]
    assert others.tolist() == [0] * 4


def test_what_a_module_keeps_of_a_captured_step_has_its_values():
    """A table for each size, made in the first step of that size."""
    tables = {}

    def step(slots):
        if len(slots) not in tables:
            tables[len(slots)] = torch.arange(len(slots), device="cuda") * 3
        return (tables[len(slots)] + slots, torch.rand(len(slots), device="cuda"))

    capture = CudaCapture()
    inputs = [torch.full((size,), 100, device="cuda") for size in (64, 32, 16, 1)]
    replays = [capture(step, x) for x in inputs]
    noise = [torch.full((size,), -1, device="cuda") for size in (64, 32, 16, 1) for _ in range(20)]
    torch.cuda.synchronize()
    for size, table in tables.items():
        assert table.tolist() == list(range(0, 3 * size, 3))
    for x, replay in reversed(list(zip(inputs, replays))):
        x.fill_(7)
        assert replay()[0].tolist() == list(range(7, 7 + 3 * len(x), 3))
    for size, table in tables.items():
        assert table.tolist() == list(range(0, 3 * size, 3))
    assert all((x == -1).all() for x in noise)


def test_nothing_is_compiled_after_the_warm_up():
    from triton import knobs

    model, compiled = random_llama(torch.bfloat16, num_heads=4), []
    with make_engine(model, num_pages=4000, max_model_len=4096, max_batch_tokens=2048) as engine:
        assert engine.warm_up() > 0
        assert knobs.compilation.listener is None
        knobs.compilation.listener = lambda src, **rest: compiled.append(src.name)
        try:
            for how in ({}, {"do_sample": True, "top_p": 0.9, "num_return_sequences": 3}):
                for lengths in ((5,), (2500,), (1, 40, 300, 17), (3000, 100, 7)):
                    handles = [engine.submit(prompt(n, n), generation_config=config(12, **how)) for n in lengths]
                    assert all(len(one.token_ids) == 12 for h in handles for one in h.result().sequences)
        finally:
            knobs.compilation.listener = None
    assert compiled == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_those_of_eager_steps(dtype):
    """Heads of 64 take the Hopper kernels where there are any, split plan and all."""
    model = random_llama(dtype, num_heads=8)
    lengths = (1, 7, 300, 1500, 33)
    outputs = []
    for cuda_graphs in (True, False):
        with make_engine(model, num_pages=600, cuda_graphs=cuda_graphs, max_batch_tokens=2048) as engine:
            handles = [engine.submit(prompt(n, n), generation_config=config(12), logprobs=3) for n in lengths]
            outputs.append([handle.result() for handle in handles])
            assert not cuda_graphs or len(graphs_of(engine)) > 0
    for captured, eager in zip(*outputs):
        ours, theirs = ([entry.logprob for entry in output.logprobs] for output in (captured, eager))
        same = next((i for i, (a, b) in enumerate(zip(captured.token_ids, eager.token_ids)) if a != b), 12)
        assert max((abs(a - b) for a, b in zip(ours[:same], theirs[:same])), default=0.0) < 0.05
        assert same >= 1


def test_steady_decode_does_not_synchronise(model):
    with make_engine(model, max_batch_tokens=256) as engine:
        handles = [engine.submit(prompt(n, n), generation_config=config(40)) for n in (3, 9, 20, 31)]
        handles += [
            engine.submit(prompt(n, n), generation_config=config(40, do_sample=True, top_p=0.9, top_k=20), seed=n)
            for n in (4, 12)
        ]
        for _ in range(10):
            engine.step()
        graphs_of(engine)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                engine.step()
            # Nor do plain requests that arrive.
            handles += [engine.submit(prompt(7, 7), generation_config=config(40, do_sample=i > 0)) for i in range(2)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert [len(handle.result().token_ids) for handle in handles] == [40] * 8
        assert handles[1].result().token_ids == alone(model, prompt(9, 9), 40)


def test_a_step_is_launched_before_the_tokens_of_the_last_are_there(model):
    with make_engine(model) as engine:
        handle = engine.submit(prompt(9), generation_config=config(10, eos_token_id=[alone(model, prompt(9), 10)[6]]))
        order, core = [], engine._core
        run, collect = core.run, core.collect
        core.run = lambda work: (order.append("run"), run(work))[1]
        core.collect = lambda launched: (order.append("collect"), collect(launched))[1]
        while engine.step():
            engine.check()
        assert order[:3] == ["run", "run", "collect"]
        tokens = alone(model, prompt(9), 10)
        assert handle.result().token_ids == tokens[: tokens.index(tokens[6]) + 1]


def test_sampled_tokens_do_not_depend_on_graphs_or_company(model):
    options = config(20, do_sample=True, temperature=1.2, top_p=0.95)
    results = []
    for cuda_graphs, company in ((True, 5), (False, 0), (True, 0)):
        with make_engine(model, cuda_graphs=cuda_graphs) as engine:
            others = [engine.submit(prompt(n + 2, n), generation_config=options) for n in range(company)]
            results.append(engine.submit(prompt(11), generation_config=options, seed=7).result().token_ids)
            for other in others:
                other.result()
    assert results[0] == results[1] == results[2]


def test_swapped_and_recomputed_requests_on_the_device(model):
    prompts = [prompt(n, n) for n in (20, 25, 30, 16)]
    expected = [alone(model, ids, 30) for ids in prompts]
    for options in (dict(swap_space_gib=0.01), {}):
        with make_engine(model, num_pages=16, prefix_caching=False, **options) as engine:
            outputs = engine.generate(prompts, generation_config=config(30))
            assert [output.token_ids for output in outputs] == expected
            assert engine.stats().preemptions > 0
            engine.check()


def test_a_model_that_reads_from_the_device_runs_eagerly():
    model = tiny_model("llama").cuda()
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) * (1.0 if float(x.sum()) == float(x.sum()) else 0.0)
    expected = alone(model, prompt(5), 8)
    with make_engine(model) as engine:
        assert engine.generate([prompt(5)], generation_config=config(8))[0].token_ids == expected
        assert "reads values back" in engine._core.runner.graphs.failure
    torch.randn(4, device="cuda")


def test_graphs_survive_threads(model):
    expected = alone(model, prompt(9), 16)
    options = hf_paged.EngineConfig(num_pages=64, page_size=8, max_num_seqs=8)
    with hf_paged.Engine(model, options) as engine:
        handles = [engine.submit(prompt(9), generation_config=config(16)) for _ in range(6)]
        assert [handle.result().token_ids for handle in handles] == [expected] * 6
        graphs_of(engine)
