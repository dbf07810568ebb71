"""``EngineConfig(compile=True)``: which modules are compiled, the same tokens, and a model that stays as it is."""


import pytest
import torch
from random_requests import tiny_model
from small_engines import alone, config, prompt

import hf_paged
from hf_paged.engine.execution.compiled import as_written


@pytest.fixture
def compiled_forwards(monkeypatch):
    """Forwards handed to torch.compile; compiled without a code generator, which is what takes long on a CPU."""
    found = []
    real = torch.compile

    def compile_fast(forward, **options):
        found.append(type(forward.__self__).__name__)
        return real(forward, backend="aot_eager", **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compile_fast)
    yield found
    torch._dynamo.reset()


def engine_of(model) -> hf_paged.Engine:
    options = hf_paged.EngineConfig(
        num_pages=32, page_size=8, max_num_seqs=8, max_batch_tokens=32, self_check=False, compile=True
    )
    return hf_paged.Engine(model, options, background=False)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mixtral", "gpt2"])
def test_tokens_are_those_of_generate(family, compiled_forwards):
    model = tiny_model(family)
    prompts = [prompt(n, n) for n in (1, 3, 9, 17, 30)]
    expected = [alone(model, ids, config(6)) for ids in prompts]
    before = [dict(module.__dict__) for module in model.modules()]
    with engine_of(model) as engine:
        for _ in range(2):
            assert [output.token_ids for output in engine.generate(prompts, generation_config=config(6))] == expected
        engine.check()
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert compiled_forwards
    assert not any(name.endswith(("Attention", "DecoderLayer", "GPT2Block", "Model")) for name in compiled_forwards)


def test_one_compilation_serves_every_layer_and_length(compiled_forwards):
    model = tiny_model("llama")
    counts = []
    with engine_of(model) as engine:
        for lengths in ((4, 9), (3, 20), (7, 13, 25), (1,), (30, 30)):
            engine.generate([prompt(n, n) for n in lengths], generation_config=config(5))
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[-1] == counts[-2] == counts[2]


def test_hooks_added_later_are_called(compiled_forwards):
    model = tiny_model("llama")
    ids = prompt(9)
    with engine_of(model) as engine:
        engine.generate([ids], generation_config=config(4))
        called = []
        handle = model.model.layers[0].mlp.up_proj.register_forward_hook(
            hf_paged.row_wise(lambda *_: called.append(1))
        )
        engine.generate([ids], generation_config=config(4))
        handle.remove()
    assert called


def test_other_modules_are_seen_by_an_idle_engine(compiled_forwards):
    model = tiny_model("llama")
    ids = prompt(9)
    with engine_of(model) as engine:
        engine.generate([ids], generation_config=config(4))
        mlp = model.model.layers[0].mlp
        forward = mlp.forward
        mlp.forward = lambda x: forward(x) * -3
        expected = alone(model, ids, config(4))
        assert engine.generate([ids], generation_config=config(4))[0].token_ids == expected


@pytest.mark.parametrize("how", ["model", "layers", "forward"])
def test_what_its_owner_has_compiled_runs_as_it_is_written(how):
    """torch.compile would trace the engine's bookkeeping, for a minute."""
    model, graphs = tiny_model("llama"), []
    ids = torch.tensor([prompt(9)])
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    if how == "forward":
        model.forward = torch.compile(model.forward, backend=backend)
    for module in {"model": [model], "layers": model.model.layers, "forward": []}[how]:
        module.compile(backend=backend)
    double = torch.compile(lambda x: 2 * x, backend=backend)
    hf_paged.patch_generate(model, hf_paged.EngineConfig(num_pages=32, page_size=8, max_num_seqs=4, fuse=False))
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    with as_written(model):
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
        assert double(3 * torch.ones(1)) == 6
    assert not graphs
    assert double(torch.ones(1)) == 2
    assert len(graphs) == 1
    hf_paged.unpatch_generate(model)
    torch.compiler.reset()
