"""A model that transformers has sharded over processes, on the CPU: tokens of one process on every rank, and errors
that end the work on all of them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tensor_parallel_worker as worker

import hf_paged
from hf_paged.engine.ranks import Alone

ROOT = Path(__file__).resolve().parent.parent.parent
LAST = {2: "one_forward_fails", 3: "one_is_killed"}
LAUNCHES = [
    *((size, "run", last) for size, last in LAST.items()),
    (2, "states", "first_is_killed"), (3, "states", "end"),
]  # fmt: skip
"""Processes, the scenes that they run first, and the one behind which they are of no use."""
KILLED = {"one_is_killed": 2, "first_is_killed": 0}


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    """The same scenes with the whole model."""
    return json.loads(json.dumps(worker.Scenes(worker.make_model()).run()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the processes wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    worker.make_model().save_pretrained(folder / "model")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", Path(worker.__file__).parent)))
    asked = [":".join(map(str, launch)) for launch in LAUNCHES]
    done = subprocess.run(
        [sys.executable, worker.__file__, folder / "model", folder, *asked],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    for size, _, last in LAUNCHES:
        codes = json.loads((folder / f"{size}.{last}.codes.json").read_text("utf-8"))
        expected = [-signal.SIGKILL if rank == KILLED.get(last) else 0 for rank in range(size)]
        assert codes == expected, done.stderr[-4000:]
    return folder


def read(folder: Path, size: int, name: str = "run") -> list[dict[str, Any]]:
    """What the processes found that have written it."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob(f"{size}.*.{name}.json"))]


@pytest.fixture(params=sorted(LAST))
def ranks(request, folder) -> list[dict[str, Any]]:
    """What each of the processes found."""
    return read(folder, request.param)


@pytest.fixture
def three(folder) -> list[dict[str, Any]]:
    return read(folder, 3)


@pytest.mark.parametrize(
    "case",
    ["mixed", "seed", "top", "prefix", "none", "weights", "later", "after it", "patched", "streamed", "one call"],
)
def test_calls_give_the_tokens_of_one_process_on_every_rank(ranks, one, case):
    expected = one[case]
    assert [found[case] for found in ranks] == [expected] * len(ranks)


def test_requests_of_the_first_rank_give_the_tokens_of_one_process(ranks, one):
    """Random ones, in another order, while other ranks are slow."""
    for case in ("random", "guided", "cancelled", "late"):
        assert ranks[0][case] == one[case], case
    assert one["cancelled"] == ["cancelled", True, True]
    assert one["late"] == ["deadline", "the deadline of 0 seconds has passed."]
    assert all(token % 2 for token in one["guided"])
    assert [found["new tokens"] for found in ranks] == [ranks[0]["new tokens"]] * len(ranks)


def test_code_of_a_request_is_that_of_the_first_rank(ranks, one):
    """Its processors and criteria draw numbers that are others on each rank."""
    assert [found["own code"] for found in ranks] == [ranks[0]["own code"]] * len(ranks)
    # Of one prompt it is known in which order they are drawn.
    assert [found["numbers of one"] for found in ranks] == [one["numbers of one"]] * len(ranks)
    # Those that draw no numbers. In which order others draw them depends on when requests come.
    assert ranks[0]["own code"][2:] == one["own code"][2:]
    expected = [None, "CannotBeSentError: 1 and 2", None, None, "CannotBeSentError: 1 and 2"]
    assert [found["failed"][:5] for found in ranks] == [expected] * len(ranks)


@pytest.mark.parametrize("case", ["few pages", "own memory", "captured"])
def test_three_ranks_give_the_tokens_of_one_process(three, one, case):
    """Of requests that lose their pages, and of steps that are launched ahead."""
    assert [found[case] for found in three] == [one[case]] * 3


def test_pages_are_those_of_the_rank_with_least_memory(three, one):
    assert one["preemptions"] > 0
    assert all(found["preemptions"] > 0 for found in three)
    page = 2 * 2 * 2 * 8 * 8 * 4  # keys and values, layers, heads of a rank, head dim, tokens, bytes
    least = 1 * 200_000
    assert [found["pages"] for found in three] == [least // 2 // page] * 3


def test_the_tokens_of_a_step_are_those_of_the_smallest_shard(monkeypatch):
    class Others(Alone):
        def least(self, number: int) -> int:
            return min(number, 1000)

    model = worker.make_model()
    assert sum(weight.numel() for weight in model.parameters()) > 1000
    monkeypatch.setattr("hf_paged.engine.engine.make_ranks", lambda *_: Others())
    with hf_paged.Engine(model) as engine:
        assert engine.core.num_parameters == 1000


def test_prefixes_are_found_on_every_rank(ranks, one):
    assert one["prefix"][2] == [40, 24]
    assert [found["prefix"] for found in ranks] == [one["prefix"]] * len(ranks)


def test_an_engine_that_does_not_start_on_one_rank_starts_on_none(three):
    told = "RankError: rank 2 of 3 could not start its engine: no page"
    assert [found["failing start"] for found in three] == [told, told, "OSError: no page"]


def test_changes_of_weights_are_seen_by_all(one):
    """And they change tokens: the comparison with one process says that every rank saw them."""
    first, negated, on_one_layer, refreshed, woken, resumed, back = one["weights"]
    assert first != negated != on_one_layer != refreshed
    assert woken == refreshed
    assert resumed == on_one_layer
    assert back == first


def test_a_step_that_fails_on_all_ranks_ends_its_requests_alone(ranks):
    error = f"3 and {worker.LONG}"
    assert [found["failing step"] for found in ranks] == [[error] * 2] * len(ranks)
    assert [found["told changes"] for found in ranks] == [[]] * len(ranks)


def test_wrong_use_raises_on_every_rank(ranks):
    size = len(ranks)
    for found in ranks:
        for case in ("other prompts", "fewer prompts"):
            assert found[case].startswith(f"RankError: rank 1 of {size} makes another call than rank 0"), case
        assert found["bad prompt"].startswith("ValueError: prompt_ids[0] must be 0 to 101")
        assert found["closed"] == "RequestError: the engine is closed: make another, hf_paged.Engine(model)."
        assert found["same engine"]
    assert ranks[0]["bad prompt of one"].startswith("RankError: the call is not served on rank 0: ValueError: prompt_")
    for found in ranks[1:]:
        assert found["bad prompt of one"].startswith(f"RankError: rank 0 of {size} has ended the call: ValueError: ")
        assert found["submit"].startswith("RankError: submit() was called on rank ")
    assert ranks[0]["salt"].startswith("RequestError: cache_salt=frozenset({1}) cannot be sent to the other ranks")


def test_a_forward_that_fails_on_one_rank_ends_the_engine_on_all(folder):
    words = f"CannotBeSentError: 5 and {worker.LONG}"[:400]
    text = f"RankError: rank 1 of 2 has failed in a step, and not all others have: {words}"
    first, second = read(folder, 2, "one_forward_fails")
    # The others are told as many bytes as there is room for, and no part of a character.
    told = first["after"]
    assert text.startswith(told)
    assert 1020 <= len(told.removeprefix("RankError: ").encode()) <= 1023
    assert first["errors"] == [told] * 3
    assert second["after"] in (text, told)
    for found in (first, second):
        assert found["state"] == "broken"
        assert found["seconds"] < 60


def test_a_rank_that_is_killed_leaves_no_other_waiting(folder):
    first, second = read(folder, 3, "one_is_killed")
    text = "RankError: one of the 3 processes of the model has died"
    assert all(error.startswith(text) for error in first["errors"])
    for found in (first, second):
        assert found["after"].startswith(text)
        assert found["state"] == "broken"
        assert found["seconds"] < 60


def test_the_first_rank_is_killed_and_leaves_no_other_waiting(folder):
    (second,) = read(folder, 2, "first_is_killed")
    assert second["after"].startswith("RankError: one of the 2 processes of the model has died")
    assert second["state"] == "broken"
    assert second["seconds"] < 60


@pytest.mark.parametrize("size", [2, 3])
def test_any_order_of_calls_and_faults_and_engines_leave_no_descriptors(folder, size):
    """The state machine of ``engine_machine`` over all ranks; it asserts there."""
    found = read(folder, size, "states")
    assert len(found) == size
    for rank in found:
        counts = rank["descriptors"]
        assert len(counts) >= 5
        assert max(counts) == counts[0], "connections of engines that are closed"
