"""lm-evaluation-harness: `hf-paged` gives the scores of `hf` with eager attention, on tasks made here."""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager  # noqa: E402

import hf_paged  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "integration_tests" / "assets" / "small_model"
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
target_delimiter: ""
doc_to_choice: "{{[good, bad, ugly]}}"
doc_to_target: 0
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "word": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}, {metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "answer": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{good}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
DOCUMENTS = [
    {"question": "import os\nimport", "good": " sys", "bad": " zzqx", "ugly": "}}", "text": "import os\nimport sys\n"},
    {"question": "    def __init__(", "good": "self", "bad": "for", "ugly": ":=", "text": "class A:\n    pass\n" * 9},
    {"question": "if x is not", "good": " None", "bad": " import", "ugly": " ((", "text": "x = 1\n" * 40},
    {"question": "for i in", "good": " range", "bad": " def", "ugly": " #", "text": "return None"},
    {"question": "return", "good": " self", "bad": " =", "ugly": " class", "text": "def f(a, b):\n    return a + b\n"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "documents.jsonl"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)), encoding="utf-8")
    for name, body in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: hf_paged_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            f"test_split: test\n{body.strip()}\n",
            encoding="utf-8",
        )
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def evaluate(folder: Path, model: str, tasks=tuple(TASKS), **arguments):
    return lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(MODEL), "dtype": "float32", "max_length": 64, **arguments},
        tasks=[f"hf_paged_{name}" for name in tasks],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0, log_samples=True, device="cpu", verbosity="ERROR",
    )  # fmt: skip


@pytest.fixture(scope="module")
def eager(folder):
    return evaluate(folder, "hf", attn_implementation="eager")


def scores(results: dict) -> dict[str, dict[str, float]]:
    return {
        task: {name: value for name, value in found.items() if isinstance(value, float)}
        for task, found in results["results"].items()
    }


def responses(results: dict, task: str) -> list:
    return [sample["filtered_resps"] for sample in sorted(results["samples"][task], key=lambda s: s["doc_id"])]


def test_the_engine_gives_the_scores_of_eager(folder, eager):
    import hf_paged.lm_eval_model  # noqa: F401  registers the model

    paged = evaluate(folder, "hf-paged")
    expected, got = scores(eager), scores(paged)
    assert set(got) == {f"hf_paged_{name}" for name in TASKS}
    for task in expected:
        assert got[task] == pytest.approx(expected[task], rel=1e-5), task
    assert scores(paged)["hf_paged_choice"]["acc,none"] > 0.5
    assert responses(paged, "hf_paged_answer") == responses(eager, "hf_paged_answer")
    for a, b in zip(responses(paged, "hf_paged_choice"), responses(eager, "hf_paged_choice")):
        # (log-probability, is greedy) of each choice.
        for (logprob, greedy), (expected_logprob, expected_greedy) in zip(a, b):
            assert float(logprob) == pytest.approx(float(expected_logprob), abs=1e-4)
            assert greedy == expected_greedy


def test_hf_with_paged_flash_gives_the_scores_of_eager(folder, eager):
    import hf_paged  # noqa: F401  registers the attention

    found = scores(evaluate(folder, "hf", tasks=["choice", "rolling"], attn_implementation="paged_flash"))
    assert len(found) == 2
    for task in found:
        assert found[task] == pytest.approx(scores(eager)[task], rel=1e-5), task


def test_perplexity_of_the_convention_lm_eval_is_that_of_lm_eval(folder, eager):
    from eval.perplexity import main

    report = main(
        ["--model", str(MODEL), "--data", str(folder / "documents.jsonl"), "--convention", "lm-eval", "--window", "64",
         "--attn", "eager", "paged_flash", "--dtype", "float32", "--device", "cpu"]
    )  # fmt: skip
    expected = scores(eager)["hf_paged_rolling"]
    for row in report["results"]:
        for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
            assert row[name] == pytest.approx(expected[f"{name},none"], rel=1e-5), (row["attn"], name)


def test_the_convention_last_word_is_what_lm_eval_reports_of_lambada(folder, eager):
    from eval.perplexity import main

    report = main(
        ["--model", str(MODEL), "--data", str(folder / "documents.jsonl"), "--convention", "last-word", "--window",
         "64", "--attn", "eager", "paged_flash", "--path", "prefill", "engine", "--dtype", "float32", "--device", "cpu"]
    )  # fmt: skip
    expected = scores(eager)["hf_paged_word"]
    assert len(report["results"]) == 3
    for row in report["results"]:
        assert row["last_word_perplexity"] == pytest.approx(expected["perplexity,none"], rel=1e-5)
        assert row["last_word_accuracy"] == expected["acc,none"]


def test_the_engine_really_ran(folder, monkeypatch):
    import hf_paged
    from hf_paged.lm_eval_model import PagedLM

    steps = []
    step = hf_paged.Engine.step
    monkeypatch.setattr(hf_paged.Engine, "step", lambda self: (steps.append(self), step(self))[1])
    model = PagedLM(str(MODEL), dtype="float32", device="cpu", max_length=64)
    assert model._loglikelihood_tokens([(None, [5, 6], [7])], disable_tqdm=True)[0][0] < 0
    of_loglikelihood = len(steps)
    out = model._model_generate(torch.tensor([[5, 6, 7]]), max_length=8, stop=["\n"])
    assert 0 < of_loglikelihood < len(steps)
    assert out.shape[1] <= 8


def test_a_text_longer_than_the_model_is_cut_as_hf_cuts_it(eager):
    from lm_eval.models.huggingface import HFLM

    from hf_paged.lm_eval_model import PagedLM

    tokens = torch.randint(5, 1000, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    requests = [(None, tokens[:a], tokens[a:b]) for a, b in ((80, 90), (54, 64), (54, 65))]
    arguments = {"dtype": "float32", "device": "cpu", "max_length": 64}
    expected = HFLM(str(MODEL), attn_implementation="eager", **arguments)._loglikelihood_tokens(requests, True)
    got = PagedLM(str(MODEL), **arguments)._loglikelihood_tokens(requests, True)
    assert [score for score, _ in got] == pytest.approx([score for score, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]


def test_a_batch_that_is_no_number():
    from hf_paged.lm_eval_model import PagedLM

    with pytest.raises(ValueError, match="generate_batch must be an int of at least 1, got 0"):
        PagedLM(str(MODEL), generate_batch=0)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (dict(mixed_precision_dtype="bfloat16"), r"mixed_precision_dtype is torch\.bfloat16.*Load them in it"),
        (dict(softmax_dtype="float64"), r"softmax_dtype is torch\.float64"),
    ],
)
def test_precisions_that_the_engine_does_not_have_are_refused(arguments, error):
    from hf_paged.lm_eval_model import PagedLM

    with pytest.raises(ValueError, match=error):
        PagedLM(str(MODEL), device="cpu", **arguments)


def test_adapters_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from hf_paged.lm_eval_model import PagedLM

    configs = dict(
        lora=peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_alpha=32),
        prompt=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        alora=peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[7, 8]),
    )
    for name, config in configs.items():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        peft.get_peft_model(base, config).save_pretrained(tmp_path / name)
    tokens = torch.randint(5, 1000, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    requests = [(None, tokens[:a], tokens[a:b]) for a, b in ((20, 30), (4, 14))]
    arguments = {"dtype": "float32", "device": "cpu", "max_length": 64}
    plain = HFLM(str(MODEL), attn_implementation="eager", **arguments)._loglikelihood_tokens(requests, True)
    arguments["peft"] = str(tmp_path / "lora")
    expected = HFLM(str(MODEL), attn_implementation="eager", **arguments)._loglikelihood_tokens(requests, True)
    got = PagedLM(str(MODEL), **arguments)._loglikelihood_tokens(requests, True)
    assert [score for score, _ in got] == pytest.approx([score for score, _ in expected], rel=1e-4)
    assert [score for score, _ in plain] != pytest.approx([score for score, _ in expected], rel=1e-2)
    for name in ("prompt", "alora"):
        arguments["peft"] = str(tmp_path / name)
        with pytest.raises(hf_paged.UnsupportedModelError, match="its adapter"):
            PagedLM(str(MODEL), **arguments)


OWN_TASKS_ONLY = """
from functools import partialmethod
from lm_eval.tasks import TaskManager
TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
"""
"""For a command in a process of its own: reading the files of its own tasks takes lm_eval 20 seconds."""


def run(folder: Path, code: str, model: str, model_args: str = "") -> dict[str, float]:
    """The command line in a process of its own that runs `code`; returns the scores it writes."""
    output = Path(tempfile.mkdtemp(dir=folder))
    arguments = [
        "run", "--model", model, "--model_args", f"pretrained={MODEL},dtype=float32,max_length=64{model_args}",
        "--tasks", "hf_paged_choice", "--include_path", str(folder), "--device", "cpu", "--output_path", str(output),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OWN_TASKS_ONLY + code, *arguments], cwd=folder, env=environment, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = output.rglob("results_*.json")
    found = json.loads(written.read_text(encoding="utf-8"))["results"]["hf_paged_choice"]
    return {name: value for name, value in found.items() if name.startswith("acc") and "stderr" not in name}


def declared(table: str, name: str) -> str:
    """The object that pyproject.toml gives for a name."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split(f"[{table}]", 1)[1].split("\n[", 1)[0]
    return re.search(rf'^{name} = "(.+)"$', section, re.MULTILINE)[1]


def test_the_command_gives_the_score_of_hf_with_eager_attention(folder, eager):
    module, function = declared("project.scripts", "hf-paged-lm-eval").split(":")
    code = f"from {module} import {function}; {function}()"
    expected = {name: eager["results"]["hf_paged_choice"][name] for name in ("acc,none", "acc_norm,none")}
    assert run(folder, code, "hf-paged") == expected
    assert run(folder, code, "hf", ",attn_implementation=paged_flash") == expected


def test_the_entry_point_is_one_that_lm_eval_resolves(folder, eager):
    """Later versions of lm_eval register entry points as this does, before they look for the model."""
    target = declared('project.entry-points."lm_eval.models"', "hf-paged")
    code = (
        f"from lm_eval.api.registry import model_registry; model_registry.register('hf-paged', target='{target}')\n"
        "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    )
    assert run(folder, code, "hf-paged")["acc,none"] == eager["results"]["hf_paged_choice"]["acc,none"]


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    monkeypatch.delitem(sys.modules, "hf_paged.lm_eval_model", raising=False)
    with pytest.raises(ImportError, match=r'pip install "hf-paged\[lm-eval\]"'):
        importlib.import_module("hf_paged.lm_eval_model")
