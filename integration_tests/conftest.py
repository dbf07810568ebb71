"""Shared fixtures: Triton's interpreter without a GPU, NaN-poisoned allocations, one GPU for several processes."""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "support"))

HAS_GPU = torch.cuda.is_available()
if "PYTEST_XDIST_WORKER" in os.environ:
    # One process a core: several with all threads each wait for one another, many times slower.
    torch.set_num_threads(1)
if not HAS_GPU:
    # Must be set before any kernel file is imported: @triton.jit reads it when it decorates.
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.repair()


NUM_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is none, with a reason in the summary."""
    changing = [item.nodeid for item in items if " object at 0x" in item.nodeid]
    if changing:
        raise pytest.UsageError(f"names of tests must be the same in every process: {changing[0]}")
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish() -> None:
    """Libraries and collected tests stay: each collection of garbage would look at these millions of objects again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Fresh inputs in every test, reproducible by the test's order-independent seed."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _usual_verbosity() -> None:
    """Commands that other tests, and fixtures of modules, ran in this process have set transformers' verbosity."""
    logging.getLogger("transformers").setLevel(logging.WARNING)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Processes that run tests side by side share a GPU. What PyTorch keeps cached in one, the others cannot have."""
    if not HAS_GPU:
        yield
        return
    from shared_card import this_card

    with this_card().held(alone=item.get_closest_marker("whole_card") is not None):
        yield
        if item.get_closest_marker("gpu"):
            # pytest leaves the last failure here, and its frames hold the tensors of that test.
            for name in ("last_exc", "last_value", "last_traceback"):
                vars(sys).pop(name, None)
            gc.collect()
            torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _equal_share_of_the_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines size their pool by the memory that is free: each process counts on its share of the card only."""
    if HAS_GPU and NUM_PROCESSES > 1 and not request.node.get_closest_marker("whole_card"):
        from shared_card import equal_share

        from hf_paged.engine.scheduling import page_budget

        monkeypatch.setattr(page_budget, "free_bytes", equal_share(page_budget.free_bytes, NUM_PROCESSES))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every uninitialised float allocation NaN, so that an element nobody wrote is seen."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    # torch.device as a context remembers the allocators of its first use: those must not be the ones made here.
    with torch.device("meta"):
        torch.empty(0)

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))

    from hf_paged.paging import LayerPages

    grow = LayerPages.grow

    def grow_poisoned(self, num_pages, shown=None):
        # Pages that are shown may have no memory yet.
        had = min(self.k.shape[0], self.num_poisoned) if hasattr(self, "k") else 0
        grow(self, num_pages, shown)
        self.arena.buffer[had * self.page_bytes : num_pages * self.page_bytes] = 0xFF  # NaN in every float format
        self.num_poisoned = num_pages

    monkeypatch.setattr(LayerPages, "grow", grow_poisoned)
