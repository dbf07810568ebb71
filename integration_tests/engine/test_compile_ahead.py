"""Kernels compiled before they are needed: the first layers of a model, and what is left to compile after them."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from random_requests import tiny_model

from hf_paged.engine.startup.compile_ahead import with_first_layers

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_the_first_layers_are_those_of_the_model(family):
    model = tiny_model(family)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        whole = model(input_ids=ids, output_hidden_states=True)
        few = with_first_layers(model)
        got = few(input_ids=ids, output_hidden_states=True)
        again = model(input_ids=ids, output_hidden_states=True)
    assert (len(few.model.layers), len(model.model.layers)) == (2, 3)
    # As far as its layers go it is the model; the last of hidden_states is normed.
    for ours, theirs in zip(got.hidden_states[:2], whole.hidden_states):
        assert torch.equal(ours, theirs)
    assert torch.equal(again.logits, whole.logits)
    assert all(a is b for a, b in zip(few.model.layers, model.model.layers))


def test_the_first_layers_hold_every_kind(monkeypatch):
    model = tiny_model("gpt_oss")
    monkeypatch.setattr(model.config, "layer_types", ["sliding_attention", "sliding_attention", "full_attention"])
    assert len(with_first_layers(model).model.layers) == 3


def test_a_model_without_a_list_of_layers_is_taken_whole():
    model = tiny_model("llama")
    layers, model.model.layers = model.model.layers, torch.nn.ModuleList([])
    try:
        assert with_first_layers(model) is model
    finally:
        model.model.layers = layers


COUNTING = """
    import json, sys, threading
    import torch, triton
    from triton import knobs
    compiled = []
    def listener(*, metadata, cache_hit, **rest):
        if not cache_hit and threading.current_thread().name != "compile-ahead":
            compiled.append(metadata["name"])
    knobs.compilation.listener = listener
    import hf_paged
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=4096,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16).cuda().eval()
    options = GenerationConfig(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    with hf_paged.Engine(model, hf_paged.EngineConfig(max_num_seqs=32, compile_ahead=True)) as engine:
        for count in (1, 7, 32):
            engine.generate([[5, 6, 7] * (n + 1) for n in range(count)], generation_config=options)
    print(json.dumps(compiled))
"""


@pytest.mark.gpu
def test_nothing_is_compiled_in_the_foreground(tmp_path):
    """An empty cache: what steps launch has been compiled by other processes and threads. A second one finds all."""
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    runs = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(COUNTING)], cwd=ROOT, env=env, capture_output=True, text=True,
            timeout=240, check=False,
        )
        for _ in range(2)
    ]  # fmt: skip
    for run in runs:
        assert run.returncode == 0, run.stderr[-3000:]
        assert json.loads(run.stdout.splitlines()[-1]) == []
    assert any(tmp_path.iterdir())


WORKER = """
    import contextlib, io, json, pickle
    import torch
    from eval.kernel_bench.stub_gpu import pretend_hopper
    pretend_hopper()
    from hf_paged_kernels import backend, compile_worker, copy_pages, write_pages
    from hf_paged_kernels.launch_triton import compilation_of
    jobs = []
    def record(key, kernel, arguments, constants):
        jobs.append(compilation_of(kernel, arguments, constants))
    pages = [torch.randn(4, 2, 16, 64, dtype=torch.bfloat16) for _ in "kv"]
    new = torch.randn(3, 2, 64, dtype=torch.bfloat16)
    backend.on_references = contextlib.nullcontext
    with backend.recording(record):
        write_pages(new, new, *pages, torch.arange(3))
        copy_pages(*pages, *(torch.tensor([x], dtype=torch.int32) for x in (0, 3)))
    write, copy = jobs[0], jobs[-1]
    assert (write.name, copy.name) == ("_write_pages", "_copy_pages")
    compile_worker.SLOW = (copy.name,)
    told = [write, write._replace(name="no_kernel"), copy]
    given = io.BytesIO(b"".join(pickle.dumps((n, tuple(one))) for n, one in enumerate(told)))
    answers = io.BytesIO()
    compile_worker.serve(1, given, answers)
    answers.seek(0)
    print(json.dumps([pickle.load(answers) for _ in told] + [len(answers.read())]))
"""
ONCE = """
    import contextlib, itertools, json
    import torch
    from eval.kernel_bench.stub_gpu import pretend_hopper
    pretend_hopper()
    from hf_paged_kernels import backend, compile_ahead, write_pages
    class Bar:
        total = 0
        update = staticmethod(lambda: None)
    loaded = []
    compile_ahead._use = lambda device: None
    compile_ahead._compile = lambda kernel, *rest: loaded.append(kernel.fn.__name__)
    compile_ahead.MAX_PROCESSES = 1
    backend.on_references = contextlib.nullcontext
    own, keys = backend.recording, itertools.count()
    # No two launches have one key.
    compile_ahead.recording = lambda record: own(lambda key, *rest: record(next(keys), *rest))
    pages = [torch.randn(4, 2, 16, 64, dtype=torch.bfloat16) for _ in "kv"]
    with compile_ahead.compiling(torch.device("cpu"), Bar):
        for heads in (3, 5, 9):
            new = torch.randn(3, heads, 64, dtype=torch.bfloat16)[:, :2]
            assert new.stride(0) % 16 == 0
            write_pages(new, new, *pages, torch.arange(3))
        before = Bar.total
        for dtype in (torch.float16, torch.float32):
            write_pages(new.to(dtype), new.to(dtype), *(x.to(dtype) for x in pages), torch.arange(3))
    print(json.dumps([before, Bar.total, loaded]))
"""


def on_stub(program: str, cache: Path):
    """What a program prints that compiles for a GPU which is not there."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_launches_that_are_compiled_alike_are_compiled_once(tmp_path):
    once, thrice, loaded = on_stub(ONCE, tmp_path)
    assert (once, thrice) == (1, 3)
    assert loaded == ["_write_pages"] * 3
    assert len(list(tmp_path.glob("*/*.cubin"))) == 3


def test_kernels_that_take_long_are_those_of_the_package():
    from hf_paged_kernels.compile_ahead import FIRST
    from hf_paged_kernels.compile_worker import SLOW

    sources = "".join(path.read_text() for path in (ROOT / "kernels").rglob("*.py"))
    assert [name for name in (*FIRST, *SLOW) if f"def {name}(" not in sources] == []


def test_what_takes_long_is_begun_first(tmp_path):
    """One process: the first job is begun as it comes, then those of slow kernels. Each has an answer."""
    first, second, (number, error), rest = on_stub(WORKER, tmp_path)
    assert [first, second, rest] == [[0, None], [2, None], 0]
    assert number == 1
    assert error.startswith("AttributeError")
    assert len(list(tmp_path.glob("*/*.cubin"))) == 2
