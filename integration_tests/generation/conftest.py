"""The model of these tests, which each leaves unpatched."""

import pytest
from explicit_models import tiny_model

import hf_paged


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama", "sdpa", num_hidden_layers=2)
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(autouse=True)
def restored(model):
    yield
    hf_paged.unpatch_generate(model)
    assert "generate" not in model.__dict__
    assert model.config._attn_implementation == "sdpa"


@pytest.fixture
def reasons(monkeypatch):
    """Reasons for which calls went to transformers' own loop."""
    found = []
    for module in ("loop", "patch"):
        monkeypatch.setattr(f"hf_paged.generation.{module}.log_original", found.append)
    return found
