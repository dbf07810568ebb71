"""One list of prompts over several processes on the CPU: tokens of one process, and errors that end the call in all."""

import itertools
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_worker as worker
import pytest

import hf_paged
from hf_paged.engine.distributed import deal

accelerate = pytest.importorskip("accelerate")
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def _no_state_is_left():
    """accelerate keeps its first state, of the CPU here, for all that this process runs later."""
    yield
    accelerate.PartialState._reset_state()


def environment() -> dict[str, str]:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(count: int, *arguments: Any) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    return subprocess.run(
        [*command, worker.__file__, *map(str, arguments)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    with worker.engine(seed=7) as engine:
        assert hf_paged.generate_distributed(engine, []) == []
        return {
            "greedy": worker.tokens(engine.generate(worker.prompts(), generation_config=worker.greedy())),
            "mixed": worker.tokens(engine.generate(worker.prompts(), generation_config=worker.configs())),
            "new tokens": engine.num_new_tokens,
            "few": worker.tokens(engine.generate([worker.prompts()[1]], generation_config=worker.configs()[:1])),
        }


@pytest.fixture(scope="module", params=[3])
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    done = launch(request.param, "all", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "prompt/s" in done.stderr  # the bar of process 0
    return [json.loads((folder / f"{i}.json").read_text("utf-8")) for i in range(request.param)]


@pytest.mark.parametrize("case", ["greedy", "mixed", "few"])
def test_tokens_are_those_of_one_process_in_every_process(ranks, one, case):
    assert [found[case] for found in ranks] == [one[case]] * len(ranks)


def test_each_process_runs_its_part_only(ranks, one):
    made = [found["new tokens"] for found in ranks]
    assert sum(made) == one["new tokens"]
    assert min(made) > 0
    assert [found["none"] for found in ranks] == [[]] * len(ranks)


def test_a_failed_request_has_its_error_in_every_process(ranks):
    expected: list[str | None] = [None] * 7
    expected[3] = "RequestError: CannotBeSentError: 1 and 2"
    assert [found["failed"] for found in ranks] == [expected] * len(ranks)


def test_an_error_ends_the_call_in_all_processes(ranks):
    for found in ranks:
        assert found["bad prompt"].startswith("ValueError: prompt_ids[0] must be 0 to 1023")
        assert found["other prompts"].startswith("RequestError: generate_distributed got different prompts")
        assert "the engine is closed" in found["closed"]
    too_long = [found["too long"] for found in ranks]
    own = [text for text in too_long if text.startswith("RequestError: the prompt of 3 tokens and its new ones")]
    others = [text for text in too_long if text.startswith(f"RequestError: process {too_long.index(own[0])} of")]
    assert (len(own), len(others)) == (1, len(ranks) - 1)
    assert all(own[0].removeprefix("RequestError: ") in text for text in others)


def test_an_error_midway_ends_the_work_of_the_others(ranks):
    text = f"RequestError: process 1 of {len(ranks)} has ended generate_distributed: CannotBeSentError: 3 and 4"
    expected = [text] * len(ranks)
    expected[1] = "CannotBeSentError: 3 and 4"
    assert [found["one fails"] for found in ranks] == expected
    assert 0 < max(found["slow calls"] for found in ranks) < 1000  # 2,000 and more without that
    assert all(found["later"] == found["greedy"] for found in ranks)


def test_samples_of_one_prompt_differ_without_a_seed(ranks):
    """The generators of all processes begin alike."""
    assert len({json.dumps(tokens) for tokens in ranks[0]["no seed"]}) == 6
    assert all(found["no seed"] == ranks[0]["no seed"] for found in ranks)


def test_a_seed_of_the_call_gives_the_samples_of_one_process(ranks):
    with worker.engine() as engine:
        outputs = engine.generate(worker.prompts(), generation_config=worker.greedy(12, do_sample=True), seed=11)
    assert [found["one seed"] for found in ranks] == [worker.tokens(outputs)] * len(ranks)


def test_a_process_that_is_killed_leaves_no_other_waiting(tmp_path):
    """Process 0 holds what they find each other by."""
    with socket.socket() as one, socket.socket() as two:
        ports = []
        for free in (one, two):
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    command = [sys.executable, worker.__file__, "killed", str(tmp_path), *ports]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, errors = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    status = {(killed, rank): code for killed, rank, code in json.loads(out)}
    assert set(status) == {(0, 0), (0, 1), (1, 0), (1, 1)}, errors[-3000:]
    for killed in range(2):
        assert status[killed, killed] == -signal.SIGKILL, errors[-3000:]
        assert (tmp_path / f"{killed}-{1 - killed}").read_text("utf-8") not in ("", "no error")


def test_processes_that_do_not_know_of_each_other_are_told(monkeypatch):
    """One process, for a second group on a launcher's store may find the addresses of the first one."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    accelerate.PartialState(cpu=False)  # knows of no other process on a CPU
    with worker.engine() as engine, pytest.raises(RuntimeError, match="accelerate's state has 1 processes, and 3 were"):
        hf_paged.generate_distributed(engine, worker.prompts())


def test_one_process_is_a_plain_call(one):
    with worker.engine(seed=7) as engine:
        outputs = hf_paged.generate_distributed(engine, worker.prompts(), generation_config=worker.greedy())
    assert worker.tokens(outputs) == one["greedy"]


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(TypeError, match=r"engine must be an hf_paged\.Engine of this process, got NoneType"):
        hf_paged.generate_distributed(None, [])
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with (
        worker.engine() as engine,
        pytest.raises(ImportError, match=r'needs accelerate: pip install "hf-paged\[distributed\]"'),
    ):
        hf_paged.generate_distributed(engine, worker.prompts())


def test_prompts_are_dealt_out_evenly():
    draw = random.Random(3)
    for count in (1, 2, 3, 8):
        lengths = [draw.randint(1, 900) for _ in range(draw.randint(0, 40))]
        parts = deal(lengths, count)
        assert sorted(itertools.chain.from_iterable(parts)) == list(range(len(lengths)))
        assert all(part == sorted(part) for part in parts)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        sums = [sum(lengths[i] for i in part) for part in parts]
        assert max(sums) - min(sums) <= max(lengths, default=0)


@pytest.mark.parametrize("error", [hf_paged.OutOfPagesError(3, 1, 9), hf_paged.QueueFullError(4, 2)])
def test_errors_with_figures_can_be_sent(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
