"""The scripts and the notebook of ``examples/`` run on the small model, each where its packages are installed."""

import io
import json
import os
import runpy
import socket
import sys
from functools import partial
from pathlib import Path

import notebook
import pytest
from host import CACHE
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_paged

ROOT = Path(__file__).resolve().parent.parent
MODEL = str(ROOT / "integration_tests" / "assets" / "small_model")
TASK = """task: next_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def run(monkeypatch):
    """Run a script as its command does."""

    def run(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, "--model", MODEL, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")

    return run


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_print_what_it_shows(path):
    pytest.importorskip("matplotlib")
    kept = json.loads(path.read_text("utf-8"))
    run = notebook.run(path, CACHE)
    cells = [(a, b) for a, b in zip(kept["cells"], run["cells"], strict=True) if a["cell_type"] == "code"]
    assert any(notebook.printed(cell) for cell, _ in cells)
    for shown, now in cells:
        assert notebook.printed(now) == notebook.printed(shown)
        kinds = [[output["output_type"] for output in cell["outputs"]] for cell in (shown, now)]
        assert kinds[0] == kinds[1]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_is_run_here(path):
    assert len(path.read_text("utf-8").splitlines()) <= 60
    assert f'run("{path.name}"' in Path(__file__).read_text("utf-8").replace("'", '"')


def test_batch(run, tmp_path, capsys):
    prompts = ["def main():", "import os", "class Parser:"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    run("batch.py", "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "out.jsonl", "--max-new-tokens", "9")
    entries = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [entry["prompt"] for entry in entries] == prompts
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 answers, 27 tokens")
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL)
    for entry in entries:
        ids = tokenizer(entry["prompt"], return_tensors="pt")
        own = model.generate(**ids, max_new_tokens=9, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert entry["answer"] == tokenizer.decode(own, skip_special_tokens=True)


def test_chat_finds_earlier_turns(run, monkeypatch, capsys):
    lines = "def read_lines(path):", "    return open(path)", "class A:", "", "not read"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    run("chat.py", "--max-new-tokens", "24")
    found = [line for line in capsys.readouterr().out.splitlines() if "were found in the cache]" in line]
    assert len(found) == 3
    counts = [int(line.split()[0].strip("[")) for line in found]
    assert counts[0] == 0
    assert 16 <= counts[1] < counts[2]


def test_evaluate(run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    from lm_eval import tasks

    # Reading the files of its own tasks takes lm_eval 20 seconds.
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    data = tmp_path / "documents.jsonl"
    data.write_text(json.dumps({"question": "def __init__(", "good": "self", "bad": "zzqx"}) + "\n", encoding="utf-8")
    (tmp_path / "next_word.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    run("evaluate.py", "--tasks", "next_word", "--include-path", tmp_path, "--dtype", "float32")
    assert "next_word  acc,none  1.0000" in capsys.readouterr().out


def test_grpo(run, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    made = []
    submit = hf_paged.Engine.submit
    monkeypatch.setattr(hf_paged.Engine, "submit", lambda self, *a, **k: made.append(1) or submit(self, *a, **k))
    run("grpo.py", "--steps", "2", "--max-new-tokens", "8", "--output", tmp_path / "trained")
    assert made, "the engine made no completion"
    before, after = (AutoModelForCausalLM.from_pretrained(p, dtype="float32") for p in (MODEL, tmp_path / "trained"))
    assert any(not a.equal(b) for a, b in zip(before.parameters(), after.parameters()))


@pytest.fixture
def ray(monkeypatch):
    """Ray on this machine; its processes find the packages where this one does."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))))
    ray.init(num_cpus=4, num_gpus=0, include_dashboard=False, object_store_memory=200 << 20)
    yield ray
    ray.shutdown()


def own_answers(prompts: list[str], new: int) -> list[str]:
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL)
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        own = model.generate(**ids, max_new_tokens=new, do_sample=False)[0, ids.input_ids.shape[1] :]
        answers.append(tokenizer.decode(own, skip_special_tokens=True))
    return answers


def test_ray_data(run, ray, tmp_path):
    prompts = [f"def f{i}({'a, ' * (i % 5)}b):" for i in range(23)]
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    answers = tmp_path / "answers"
    sizes = ["--actors", "2", "--batch-size", "3", "--max-new-tokens", "9"]
    run("ray_data.py", "--input", tmp_path / "prompts.jsonl", "--output", answers, *sizes)
    found = [json.loads(x) for p in answers.iterdir() for x in p.read_text("utf-8").splitlines()]
    assert {entry["prompt"]: entry["answer"] for entry in found} == dict(zip(prompts, own_answers(prompts, 9)))
    assert len(found) == len(prompts)
    assert {entry["error"] for entry in found} == {""}


def test_ray_serve(run, ray, monkeypatch):
    serve, requests = pytest.importorskip("ray.serve"), pytest.importorskip("requests")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    start = serve.run
    monkeypatch.setattr(serve, "run", lambda app, blocking: start(app))
    try:
        run("ray_serve.py", "--replicas", "2")
        prompts = ["def main():", "import os", "class Parser:"]
        for prompt, own in zip(prompts, own_answers(prompts, 9)):
            answer = requests.post(f"{url}/generate", json={"prompt": prompt, "max_new_tokens": 9}, timeout=60)
            assert (answer.status_code, answer.text) == (200, own)
        refused = requests.post(f"{url}/generate", json={"prompt": "a", "max_new_tokens": 10**6}, timeout=60)
        assert refused.status_code == 400
        assert "set EngineConfig(max_model_len=)" in refused.text
        body = {"prompt": prompts[0], "max_new_tokens": 2000}
        # Serve asks the replica that has less to do: one long request for each, so that either has one.
        streams = [requests.post(f"{url}/generate", json=body, stream=True, timeout=60) for _ in range(2)]
        chunks = [stream.iter_content(None) for stream in streams]  # without its iterator a connection is closed
        assert all(next(texts) for texts in chunks)
        assert requests.get(f"{url}/running", timeout=60).json()[0] >= 1
        for stream in streams:
            stream.close()
        idle = 0
        while idle < 20:
            number, tokens = requests.get(f"{url}/running", timeout=60).json()
            assert tokens < 2000, "the request ran to its end"
            idle = idle + 1 if number == 0 else 0
    finally:
        serve.shutdown()
