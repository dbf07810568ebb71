"""LoRA adapters that requests name: the tokens that the model gives with each adapter made active, one prompt alone."""

import contextlib
import threading

import pytest
import torch
from random_requests import tiny_model
from small_engines import alone, config, engine_of, make_engine, prompt
from torch import nn

import hf_paged

peft = pytest.importorskip("peft")

PROMPT = prompt(21)
NAMES = ("a", "b", "c", None)


def plain_engine(model, **options):
    defaults = dict(num_pages=64, page_size=8, max_num_seqs=8, max_batch_tokens=32, self_check=False)
    return hf_paged.Engine(model, hf_paged.EngineConfig(**(defaults | options)), background=False)


KINDS = {
    "plain": plain_engine,
    "captured": lambda model, **options: make_engine(model, **({"num_pages": 64} | options)),
    "fused": engine_of,
}


def randomise(model, names=None, std=0.3, seed=0):
    """Weights of adapters that change tokens."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and (names is None or any(f".{x}." in name for x in names)):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def adapted(family="llama", **more):
    """A PEFT model with three adapters of different ranks, scalings and layers; ``more``: configs of others, or others
    for these."""
    configs = {
        "a": dict(r=4, target_modules=["q_proj", "down_proj"], lora_alpha=8),
        "b": dict(r=3, target_modules=["q_proj", "v_proj", "up_proj"], lora_alpha=5, use_rslora=True),
        "c": dict(r=17, target_modules=["o_proj", "v_proj"], lora_alpha=17, lora_dropout=0.5),
    } | more
    model = None
    for name, options in configs.items():
        options = peft.LoraConfig(**({"init_lora_weights": False} | options))
        if model is None:
            model = peft.get_peft_model(tiny_model(family), options, adapter_name=name)
        else:
            model.add_adapter(name, options)
    randomise(model)
    return model.eval()


@contextlib.contextmanager
def chosen(model, name):
    """The model with one adapter active, or none; as it was afterwards."""
    before = model.base_model.active_adapter
    if name is None:
        with model.disable_adapter():
            yield model.get_base_model()
    else:
        model.set_adapter(name)
        yield model.get_base_model()
    model.base_model.set_adapter(before)


def expected_tokens(model, name, ids=PROMPT, options=None):
    with chosen(model, name) as base:
        return alone(base, ids, options or config(8))


def all_expected(model, ids=PROMPT, names=NAMES):
    found = {name: expected_tokens(model, name, ids) for name in names}
    assert len({tuple(tokens) for tokens in found.values()}) == len(found), "adapters that give the same prove nothing"
    return found


def tokens_of(outputs):
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_step_have_adapters_of_their_own(kind):
    model = adapted()
    prompts = [prompt(length, seed) for seed, length in enumerate((21, 3, 40, 9, 1, 17, 26))]
    names = ["a", None, "b", "c", "a", "b", "c"]
    expected = [expected_tokens(model, name, ids) for name, ids in zip(names, prompts)]
    base = [expected_tokens(model, None, ids) for ids in prompts]
    assert sum(x != y for x, y in zip(expected, base)) >= 5
    with KINDS[kind](model.get_base_model()) as engine:
        assert tokens_of(engine.generate(prompts, generation_config=config(8), adapter=names)) == expected
        # Again, with what is active on the model ("a") in between, and one adapter for all.
        names[1] = None
        handles = [engine.submit(prompts[2], generation_config=config(8)), engine.submit(prompts[2], adapter="b",
                   generation_config=config(8))]  # fmt: skip
        assert [handle.result().token_ids for handle in handles] == [
            expected_tokens(model, "a", prompts[2]), expected[2]
        ]  # fmt: skip
        same = engine.generate(prompts[:2], generation_config=config(8), adapter="c")
        assert tokens_of(same) == [expected_tokens(model, "c", ids) for ids in prompts[:2]]
        engine._core.check()


@pytest.mark.parametrize("kind", KINDS)
def test_no_pages_of_another_adapter_are_reused(kind):
    model = adapted()
    expected = all_expected(model)
    with KINDS[kind](model.get_base_model()) as engine:
        cached = {}
        for _ in range(2):
            for name in NAMES:
                output = engine.generate([PROMPT], generation_config=config(8), adapter=name)[0]
                assert output.token_ids == expected[name]
                cached.setdefault(name, []).append(output.cached_tokens)
        assert set(map(tuple, cached.values())) == {(0, 16)}
        # Prompts that begin alike in one step do not share with other adapters either.
        engine.drop_prefixes()
        outputs = engine.generate([PROMPT] * 8, generation_config=config(8), adapter=[*NAMES, *NAMES])
        assert tokens_of(outputs) == [expected[name] for name in (*NAMES, *NAMES)]
        # A salt of the caller's still counts.
        salted = engine.submit(PROMPT, adapter="a", cache_salt="x", generation_config=config(8)).result()
        assert (salted.token_ids, salted.cached_tokens) == (expected["a"], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_preempted_rows_go_on_with_their_adapters(kind):
    model = adapted()
    with KINDS[kind](model.get_base_model(), num_pages=11, swap_space_gib=0.01 if kind == "plain" else 0) as engine:
        prompts = [prompt(20, seed) for seed in range(6)]
        names = ["a", "b", None, "c", "b", "a"]
        outputs = engine.generate(prompts, generation_config=config(16), adapter=names)
        assert sum(output.timing.preemptions for output in outputs)
        assert tokens_of(outputs) == [
            expected_tokens(model, name, ids, config(16)) for name, ids in zip(names, prompts)
        ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_samples_beams_and_drafts(kind):
    model = adapted()
    beams = config(8, num_beams=3, num_return_sequences=2)
    drafts = config(12, prompt_lookup_num_tokens=3)
    repetitive = [5, 9, 7, 11] * 6
    with KINDS[kind](model.get_base_model()) as engine:
        handles = {}
        for name in ("b", None):
            handles[name] = (
                engine.submit(PROMPT, adapter=name, generation_config=beams),
                engine.submit(repetitive, adapter=name, generation_config=drafts),
            )
        sampled = engine.submit(
            PROMPT, adapter="c", seed=3, generation_config=config(8, do_sample=True, num_return_sequences=2, top_k=1)
        ).result()  # fmt: skip
        assert [sequence.token_ids for sequence in sampled.sequences] == [expected_tokens(model, "c")] * 2
        for name, (searched, drafted) in handles.items():
            with chosen(model, name) as base:
                found = base.generate(torch.tensor([PROMPT]), generation_config=beams)[:, len(PROMPT) :].tolist()
            got = [sequence.token_ids for sequence in searched.result().sequences]
            assert got == [row[: len(own)] for own, row in zip(got, found)]
            assert drafted.result().token_ids == expected_tokens(model, name, repetitive, config(12))


OTHER_LAYERS = {
    "qwen3_next": (["q_proj", "o_proj", "out_proj"], ["v_proj"], ["o_proj", "v_proj"]),
    "mixtral": (["q_proj", "o_proj"], ["v_proj"], ["o_proj", "v_proj"]),
    "gpt2": (["c_attn", "c_proj"], ["c_fc"], ["c_attn"]),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "mistral", *OTHER_LAYERS])
def test_families(family):
    """Norms per head, windows of every second layer and of all, recurrent states, experts that no adapter changes,
    layers whose weights lie the other way."""
    some = {
        name: dict(r=5, lora_alpha=15, target_modules=targets)
        for name, targets in zip("abc", OTHER_LAYERS.get(family, ()))
    }
    model = adapted(family, **some)
    prompts = [prompt(length, seed) for seed, length in enumerate((33, 5, 18))]
    names = ["a", None, "c"]
    with plain_engine(model.get_base_model()) as engine:
        outputs = engine.generate(prompts, generation_config=config(6), adapter=names)
    assert tokens_of(outputs) == [expected_tokens(model, name, x, config(6)) for name, x in zip(names, prompts)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_the_head(kind):
    """The head sees the last tokens of rows alone."""
    model = adapted(head=dict(r=4, target_modules=["lm_head", "q_proj"]))
    prompts = [prompt(length, seed) for seed, length in enumerate((33, 5, 18, 2))]
    names = ["head", None, "b", "head"]
    assert expected_tokens(model, "head", prompts[0]) != expected_tokens(model, None, prompts[0])
    with KINDS[kind](model.get_base_model()) as engine:
        outputs = engine.generate(prompts, generation_config=config(6), adapter=names)
        scored = engine.submit(prompts[0], adapter="head", generation_config=config(2), prompt_logprobs=0).result()
    assert tokens_of(outputs) == [expected_tokens(model, name, x, config(6)) for name, x in zip(names, prompts)]
    with chosen(model, "head") as base, torch.no_grad():
        logprobs = base(torch.tensor([prompts[0]])).logits[0].log_softmax(-1)
    found = torch.tensor([entry.logprob for entry in scored.prompt_logprobs[1:]])
    torch.testing.assert_close(found, logprobs[:-1].gather(1, torch.tensor(prompts[0][1:])[:, None])[:, 0])


def test_several_active_adapters_beside_a_named_one():
    """What is active may be more than one."""
    model = adapted()
    model.base_model.set_adapter(["a", "c"])
    both = alone(model.get_base_model(), PROMPT, config(8))
    model.set_adapter("a")
    expected = all_expected(model)
    model.base_model.set_adapter(["a", "c"])
    assert both not in expected.values()
    with plain_engine(model.get_base_model()) as engine:
        handles = [engine.submit(PROMPT, generation_config=config(8)),
                   engine.submit(PROMPT, generation_config=config(8), adapter="b")]  # fmt: skip
        assert [handle.result().token_ids for handle in handles] == [both, expected["b"]]
        with model.disable_adapter():
            handles = [engine.submit(PROMPT, generation_config=config(8)),
                       engine.submit(PROMPT, generation_config=config(8), adapter="b")]  # fmt: skip
            assert [handle.result().token_ids for handle in handles] == [expected[None], expected["b"]]


# Adapters that change


def doubled(model):
    randomise(model, ["b"], seed=1)


def rescaled(model):
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and "b" in module.scaling:
            module.scaling["b"] *= 3.0


def moved(model):
    for name, parameter in model.named_parameters():
        if ".b." in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))


def replaced(model):
    model.delete_adapter("b")
    model.add_adapter("b", peft.LoraConfig(r=6, target_modules=["k_proj"], init_lora_weights=False, lora_alpha=30))
    randomise(model, ["b"], seed=2)
    model.eval()


def swapped(model):
    """As PEFT's hot swap does: the weights of another adapter, of another rank, in the same parameters."""
    generator = torch.Generator().manual_seed(9)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and "b" in module.scaling:
            for matrix, shape in (
                (module.lora_A["b"], (2, module.in_features)), (module.lora_B["b"], (module.out_features, 2))
            ):  # fmt: skip
                torch.utils.swap_tensors(matrix.weight, nn.Parameter(torch.randn(shape, generator=generator) * 0.5))
            module.scaling["b"] = 1.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [doubled, rescaled, moved, replaced, swapped])
def test_an_adapter_that_changes(kind, change):
    model = adapted()
    with KINDS[kind](model.get_base_model()) as engine:
        before = engine.generate([PROMPT], generation_config=config(8), adapter="b")[0].token_ids
        assert before == expected_tokens(model, "b")
        change(model)
        expected = all_expected(model)
        assert expected["b"] != before
        outputs = engine.generate([PROMPT] * 4, generation_config=config(8), adapter=NAMES)
        assert tokens_of(outputs) == list(expected.values())


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_changes_beside_running_requests(kind):
    model = adapted()
    with KINDS[kind](model.get_base_model()) as engine:
        handles = {name: engine.submit(PROMPT, generation_config=config(24), adapter=name) for name in ("b", "c")}
        for _ in range(6):
            engine.step()
        so_far = {}
        for name, handle in handles.items():
            engine.loop.collect_pending()
            row = handle._request.sequences[0]
            so_far[name] = engine._core.slots.tokens(row.slot).tolist()
            assert len(so_far[name]) > len(PROMPT)
        doubled(model)
        for name, handle in handles.items():
            left = len(PROMPT) + 24 - len(so_far[name])
            rest = expected_tokens(model, name, so_far[name], config(left))
            assert PROMPT + handle.result().token_ids == so_far[name] + rest


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_is_deleted_or_added(kind):
    model = adapted()
    with KINDS[kind](model.get_base_model()) as engine:
        handles = {name: engine.submit(PROMPT, generation_config=config(20), adapter=name) for name in ("b", "c")}
        waiting = engine.submit(PROMPT, generation_config=config(4), adapter="b", priority=-9)
        for _ in range(4):
            engine.step()
        model.delete_adapter("b")
        for handle in (handles["b"], waiting):
            assert "adapter='b' is not loaded" in str(handle.result().error)
        assert handles["c"].result().token_ids == expected_tokens(model, "c", options=config(20))
        with pytest.raises(ValueError, match=r"adapter='b' is not loaded into the model: 'a', 'c' are"):
            engine.submit(PROMPT, adapter="b")
        model.add_adapter("d", peft.LoraConfig(r=5, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
        randomise(model, ["d"], seed=8)
        model.eval()
        names = ("d", "c", "a", None)
        outputs = engine.generate([PROMPT] * 4, generation_config=config(8), adapter=names)
        assert tokens_of(outputs) == list(all_expected(model, names=names).values())
        engine._core.check()


def test_adapters_that_come_while_the_base_model_is_asked_for():
    base = tiny_model("llama")
    plain = alone(base, PROMPT, config(20))
    with make_engine(base) as engine:
        handle = engine.submit(PROMPT, generation_config=config(20), adapter=None)
        for _ in range(4):
            engine.step()
        options = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, lora_alpha=64)
        model = peft.get_peft_model(base, options).eval()
        assert handle.result().token_ids == plain
        assert alone(base, PROMPT, config(20)) != plain
        assert engine.generate([PROMPT], generation_config=config(20))[0].token_ids == alone(base, PROMPT, config(20))
        assert list(engine.adapters()) == ["default"]
        del model


@pytest.mark.parametrize("kind", ["plain", "captured"])
def test_a_pause_in_which_adapters_change(kind):
    model = adapted()
    with KINDS[kind](model.get_base_model()) as engine:
        assert engine.generate([PROMPT], generation_config=config(8), adapter="c")[0].token_ids == expected_tokens(
            model, "c"
        )
        handle = engine.submit(PROMPT, generation_config=config(20), adapter="c")
        for _ in range(4):
            engine.step()
        engine.pause()
        model.delete_adapter("a")  # The numbers of the others change.
        late = engine.submit(PROMPT, generation_config=config(8), adapter="b")
        engine.resume()
        assert handle.result().token_ids == expected_tokens(model, "c", options=config(20))
        assert late.result().token_ids == expected_tokens(model, "b")
        engine.sleep(keep_graphs=kind == "captured")
        engine.wake()
        again = engine.generate([PROMPT], generation_config=config(8), adapter="b")
        assert tokens_of(again) == [late.result().token_ids]


# Other users of the model


def test_a_forward_of_another_thread_runs_what_is_active():
    model = adapted()
    base, batch = model.get_base_model(), torch.tensor([PROMPT])
    with torch.no_grad():
        expected = base(batch, use_cache=False).logits
    seen, engines = [], []

    def look():
        with torch.no_grad():
            seen.append(base(batch, use_cache=False).logits)

    class Look(nn.Module):
        def forward(self, x):
            if threading.current_thread() is threading.main_thread() and len(seen) < 3 and engines:
                # In the middle of the engine's forward.
                thread = threading.Thread(target=look)
                thread.start()
                thread.join()
            return x

    base.model.layers[1].mlp.act_fn = nn.Sequential(base.model.layers[1].mlp.act_fn, Look())
    expected_by_name = all_expected(model)
    with plain_engine(base) as engine:
        engines.append(engine)
        outputs = engine.generate([PROMPT] * 4, generation_config=config(8), adapter=NAMES)
        assert tokens_of(outputs) == list(expected_by_name.values())
    assert len(seen) == 3
    for logits in seen:
        assert torch.equal(logits, expected)
    assert not any("forward" in module.__dict__ for module in base.modules())


def test_two_engines_on_one_model():
    model = adapted()
    expected = all_expected(model)
    base = model.get_base_model()
    with plain_engine(base) as one, make_engine(base) as other:
        handles = [(engine.submit(PROMPT, generation_config=config(8), adapter=name), name)
                   for name in NAMES for engine in (one, other)]  # fmt: skip
        while one.step() | other.step():
            pass
        for handle, name in handles:
            assert handle.result().token_ids == expected[name]
    with hf_paged.Engine(base, hf_paged.EngineConfig(num_pages=64, self_check=False)) as one:
        threads = [threading.Thread(target=lambda: one.generate([PROMPT] * 4, adapter=NAMES,
                   generation_config=config(8)))]  # fmt: skip
        threads[0].start()
        with plain_engine(base) as other:
            got = other.generate([PROMPT] * 4, generation_config=config(8), adapter=NAMES)
        threads[0].join()
        assert tokens_of(got) == list(expected.values())


def test_the_integration_of_transformers(monkeypatch):
    """Adapters without a PEFT model around the model."""
    # transformers 5.24 asks for a version that has not been released.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0", raising=False)
    model = tiny_model("llama")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False), "x")
    model.add_adapter(peft.LoraConfig(r=9, target_modules=["v_proj"], init_lora_weights=False), "y")
    randomise(model)
    model.eval()
    expected = {}
    for name in ("x", "y"):
        model.set_adapter(name)
        expected[name] = alone(model, PROMPT, config(8))
    model.disable_adapters()
    expected[None] = alone(model, PROMPT, config(8))
    assert len(set(map(tuple, expected.values()))) == 3
    with plain_engine(model) as engine:
        assert engine.adapters() == {"x": None, "y": None}
        outputs = engine.generate([PROMPT] * 3, generation_config=config(8), adapter=list(expected))
        assert tokens_of(outputs) == list(expected.values())
        model.enable_adapters()
        model.set_adapter("y")
        handles = [engine.submit(PROMPT, generation_config=config(8)),
                   engine.submit(PROMPT, generation_config=config(8), adapter="x")]  # fmt: skip
        assert [handle.result().token_ids for handle in handles] == [expected["y"], expected["x"]]


def test_matrices_of_another_dtype_than_the_model():
    """PEFT keeps them in float32 by default; what it computes with them is not rounded to the model's dtype before it
    is added."""
    base = tiny_model("llama").to(torch.bfloat16)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), "a")
    model.add_adapter("b", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    randomise(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.float32 if ".a." in name else torch.bfloat16)
    model.eval()
    with plain_engine(base) as engine:
        for name in ("a", "b"):
            scored = engine.submit(PROMPT, adapter=name, generation_config=config(1), prompt_logprobs=0).result()
            with chosen(model, name), torch.no_grad():
                own = engine.submit(PROMPT, generation_config=config(1), prompt_logprobs=0, cache_salt=name).result()
            found, expected = (torch.tensor([e.logprob for e in x.prompt_logprobs[1:]]) for x in (scored, own))
            assert (found - expected).abs().max() < 0.1 * (expected.std() + 1)


# Refusals


REFUSED = {
    "DoRA": (dict(use_dora=True), "DoraLinearVariant"),
    "embeddings": (dict(target_modules=["embed_tokens", "q_proj"]), r"weights in model.embed_tokens, a Embedding"),
    "bias": (dict(lora_bias=True), "lora_bias"),
    "modules to save": (dict(modules_to_save=["lm_head"]), r"weights in lm_head, a ModulesToSaveWrapper"),
    "aLoRA": (dict(alora_invocation_tokens=[4]), "ALoraLinearVariant"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_mixed_is_refused_by_name(kind):
    """Other adapters beside it are served; what is active must not be one that cannot be mixed."""
    options, reason = REFUSED[kind]
    model = adapted(d={"r": 4, "target_modules": ["q_proj"]} | options)
    if kind == "modules to save":
        with torch.no_grad():
            model.get_base_model().lm_head.modules_to_save["d"].weight.mul_(-1)
    expected = all_expected(model)
    with plain_engine(model.get_base_model()) as engine:
        assert [name for name, why in engine.adapters().items() if why is not None] == ["d"]
        with pytest.raises(hf_paged.RequestError, match=f"adapter='d' cannot be served by name: .*{reason}"):
            engine.submit(PROMPT, adapter="d")
        outputs = engine.generate([PROMPT] * 4, generation_config=config(8), adapter=NAMES)
        assert tokens_of(outputs) == list(expected.values())
        if kind == "aLoRA":
            return
        running = engine.submit(PROMPT, generation_config=config(20), adapter="c")
        engine.step()
        model.set_adapter("d")
        active = alone(model.get_base_model(), PROMPT, config(8))
        assert engine.generate([PROMPT], generation_config=config(8))[0].token_ids == active
        assert "the adapter 'd' is active" in str(running.result().error)
        with pytest.raises(hf_paged.RequestError, match=r"adapter='a' cannot be served: the adapter 'd' is active"):
            engine.submit(PROMPT, adapter="a")
        model.set_adapter("a")
        assert engine.submit(PROMPT, adapter="b", generation_config=config(8)).result().token_ids == expected["b"]


def test_merged_adapters_are_refused():
    model = adapted()
    with plain_engine(model.get_base_model()) as engine:
        model.merge_adapter(["a"])
        for name in ("b", None):
            with pytest.raises(hf_paged.RequestError, match=r"merged into the weights \('a' in model.*unmerge"):
                engine.submit(PROMPT, adapter=name)
        model.unmerge_adapter()
        running = engine.submit(PROMPT, adapter="b", generation_config=config(20))
        engine.step()
        model.merge_adapter(["a"])
        assert "merged into the weights" in str(running.result().error)


def test_other_methods_of_peft_are_refused():
    model = tiny_model("llama")
    peft.get_peft_model(model, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])).eval()
    with plain_engine(model) as engine:
        for name in ("default", None):
            with pytest.raises(ValueError, match=r"k_proj is a Linear of peft.tuners.ia3.layer"):
                engine.submit(PROMPT, adapter=name)
        assert engine.generate([PROMPT], generation_config=config(8))[0].token_ids == alone(model, PROMPT, config(8))


def test_arguments_are_checked():
    model = adapted()
    with plain_engine(model.get_base_model()) as engine:
        with pytest.raises(ValueError, match=r"adapter='z' is not loaded into the model: 'a', 'b', 'c' are"):
            engine.submit(PROMPT, adapter="z")
        with pytest.raises(TypeError, match="adapter must be the name"):
            engine.submit(PROMPT, adapter=3)
        with pytest.raises(ValueError, match="one for each of 2 prompts, got 1"):
            engine.generate([PROMPT, PROMPT], adapter=["a"])
        assert not engine._core.runner.adapters
    with plain_engine(tiny_model("llama")) as engine:
        with pytest.raises(ValueError, match="adapter='a' is not loaded into the model: none is"):
            engine.submit(PROMPT, adapter="a")
        assert engine.adapters() == {}
    base = model.get_base_model()
    with plain_engine(base, compile=True) as engine, pytest.raises(hf_paged.RequestError, match="compile"):
        engine.submit(PROMPT, adapter="a")
    model.train()
    with plain_engine(base) as engine, pytest.raises(hf_paged.RequestError, match="training mode and has dropout"):
        engine.submit(PROMPT, adapter="c")


class Experts(nn.Module):
    """Computes some of the tokens, as a router's experts do."""

    def __init__(self, inner, size):
        super().__init__()
        self.inner, self.one = inner, nn.Linear(size, size, bias=False)

    def forward(self, x):
        x = self.inner(x)
        some = x[..., 0] > 0
        out = x.clone()
        out[some] = out[some] + self.one(x[some])
        return out


@pytest.mark.parametrize("is_tried", [True, False])
def test_layers_that_do_not_see_each_token_are_refused(monkeypatch, is_tried):
    """Before a request runs; where that has not shown it, the step does."""
    base = tiny_model("llama")
    mlp = base.model.layers[1].mlp
    mlp.act_fn = Experts(mlp.act_fn, mlp.up_proj.out_features)
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["one"], init_lora_weights=False)).eval()
    expected = alone(base, PROMPT, config(4))
    with plain_engine(base) as engine:
        if not is_tried:
            monkeypatch.setattr(engine._core.runner, "try_adapters", lambda: None)
        output = engine.submit(PROMPT, adapter="default", generation_config=config(4)).result()
        assert "act_fn.one computes" in str(output.error)
        assert engine.generate([PROMPT], generation_config=config(4))[0].token_ids == expected
        with pytest.raises(hf_paged.RequestError, match="which tokens they are of is not known"):
            engine.submit(PROMPT, adapter="default")
        assert "which tokens they are of is not known" in engine.adapters()["default"]


def test_adapters_that_cannot_be_read_end_their_requests_alone(monkeypatch):
    model = adapted()
    with plain_engine(model.get_base_model()) as engine:
        other = engine.submit(PROMPT, generation_config=config(8))
        named = engine.submit(PROMPT, adapter="b", generation_config=config(8))
        with monkeypatch.context() as patch:
            patch.setattr(engine._core.runner, "try_adapters", lambda: 1 / 0)
            assert isinstance(named.result().error, ZeroDivisionError)
        assert other.result().token_ids == expected_tokens(model, "a")
        again = engine.submit(PROMPT, adapter="b", generation_config=config(8)).result()
        assert again.token_ids == expected_tokens(model, "b")


def test_sharded_models_are_refused(monkeypatch):
    with plain_engine(adapted().get_base_model()) as engine:
        monkeypatch.setattr(type(engine._core.ranks), "is_joint", True)
        for name in ("a", None):
            with pytest.raises(hf_paged.RequestError, match="the model is sharded over processes"):
                engine.admission.check_adapter(name)


def test_graphs_and_modes_of_an_engine():
    """Without a named adapter the model runs as it is; one graph serves all mixes afterwards."""
    model = adapted()
    with make_engine(model.get_base_model()) as engine:
        engine.generate([PROMPT], generation_config=config(4))
        assert engine._core.runner.adapters is None
        engine.generate([PROMPT] * 4, generation_config=config(4), adapter=NAMES)
        graphs = dict(engine._core.runner.graphs._replays)
        assert graphs
        engine.generate([PROMPT] * 4, generation_config=config(4), adapter=[None, None, "c", "b"])
        engine.generate([PROMPT] * 4, generation_config=config(4))
        after = engine._core.runner.graphs._replays
        assert all(after[size] is graph for size, graph in graphs.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_the_kernels_of_a_gpu_in_an_engine(monkeypatch):
    """In Triton's interpreter: matrices are found by their addresses, in each adapter's own layers."""
    pytest.importorskip("triton")
    from hf_paged_kernels.linear import lora, lora_triton

    launches, own = [], lora_triton.lora_linear_launch
    monkeypatch.setattr(lora, "uses_triton", lambda tensor: True)
    monkeypatch.setattr(lora_triton, "lora_linear_launch", lambda *args: launches.append(1) or own(*args))
    model = adapted()
    model.base_model.set_adapter(["a", "c"])
    both = alone(model.get_base_model(), PROMPT, config(4))
    expected = [expected_tokens(model, name, PROMPT, config(4)) for name in NAMES]
    with make_engine(model.get_base_model(), num_pages=64) as engine:
        active = engine.submit(PROMPT, generation_config=config(4))
        outputs = engine.generate([PROMPT] * 4, generation_config=config(4), adapter=NAMES)
        assert tokens_of(outputs) == expected
        assert active.result().token_ids == both
        replaced(model)
        outputs = engine.generate([PROMPT] * 4, generation_config=config(4), adapter=NAMES)
        assert tokens_of(outputs) == [expected_tokens(model, name, PROMPT, config(4)) for name in NAMES]
    assert launches


@pytest.mark.gpu
@pytest.mark.parametrize("fuse", [False, None])
def test_on_a_gpu(fuse):
    """Captured decode steps and chunks, whose rows have other adapters in each replay."""
    model = adapted().to("cuda")
    prompts = [prompt(length, seed) for seed, length in enumerate((70, 3, 40, 9, 1, 17, 26, 55))]
    expected = {}
    for name in NAMES:
        with chosen(model, name) as base:
            expected[name] = [
                base.generate(torch.tensor([ids], device="cuda"), generation_config=config(12))[0, len(ids) :].tolist()
                for ids in prompts
            ]
    options = hf_paged.EngineConfig(num_pages=256, page_size=8, max_num_seqs=8, max_batch_tokens=64, fuse=fuse)
    with hf_paged.Engine(model.get_base_model(), options) as engine:
        engine.generate(prompts[:1], adapter=None, generation_config=config(2))
        engine.warm_up()
        for shift in range(4):
            names = [NAMES[(shift + i) % 4] for i in range(len(prompts))]
            outputs = engine.generate(prompts, generation_config=config(12), adapter=names)
            assert tokens_of(outputs) == [expected[name][i] for i, name in enumerate(names)]
        assert engine._core.runner.graphs._replays
        engine.check()
