"""Test processes that share a GPU: who waits for whom, and how much memory each counts on."""

import fcntl
import threading
import time

import pytest
import torch
from shared_card import Card, equal_share

pytestmark = pytest.mark.quick


def test_a_test_that_wants_the_card_alone_waits_and_goes_before_those_that_come_later(tmp_path):
    card = Card(tmp_path, "card")
    order: list[str] = []

    def hold(name: str, alone: bool) -> threading.Thread:
        def work():
            with card.held(alone=alone):
                order.append(f"{name} in")
                order.append(f"{name} out")

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    with card.held(alone=False):
        hold("shared", False).join(timeout=60)
        assert order == ["shared in", "shared out"], "two share the card"
        whole = hold("whole", True)
        with (tmp_path / "card-gate.lock").open() as gate:
            for _ in range(1000):
                try:
                    fcntl.flock(gate, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    break  # it has closed the gate, and waits
                fcntl.flock(gate, fcntl.LOCK_UN)
                time.sleep(0.01)
            else:
                pytest.fail("who wants the card alone does not close the gate")
        late = hold("late", False)
        late.join(timeout=0.3)
        order.append("first out")
    whole.join(timeout=60)
    late.join(timeout=60)
    assert order[2:] == ["first out", "whole in", "whole out", "late in", "late out"]


def test_an_engine_counts_on_its_share_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (900, 1000))
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert equal_share(lambda device: 900, 4)(gpu) == 250
    assert equal_share(lambda device: 100, 4)(gpu) == 100
    assert equal_share(lambda device: 900, 4)(cpu) == 900


def test_tests_of_the_whole_card_need_a_gpu(pytestconfig, request):
    for item in request.session.items:
        if item.get_closest_marker("whole_card"):
            assert item.get_closest_marker("gpu"), item.nodeid
