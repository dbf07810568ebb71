"""The tensors of a step: sent together, as they are; a decode step on a GPU waits for nothing."""

import pytest
import torch

import hf_paged
from hf_paged.cache.step_plan import send_together

pytestmark = pytest.mark.quick

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_that_travel_together_arrive_as_they_are_and_aligned(device):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        sizes = torch.randint(0, 9, (5,), generator=generator).tolist()
        tensors = [
            torch.randint(-(2**30), 2**30, (size,), dtype=dtype, generator=generator)
            for size, dtype in zip(sizes, [torch.int32, torch.int64, torch.int32, torch.int64, torch.int32])
        ]
        tensors.insert(2, None)
        for x, sent in zip(tensors, send_together(tensors, torch.device(device))):
            if x is None:
                assert sent is None
                continue
            assert sent.device.type == device
            assert sent.dtype == x.dtype
            assert torch.equal(sent.cpu(), x)
            # Kernels are compiled once for pointers that are multiples of 16, and again for others.
            assert sent.data_ptr() % 16 == 0 or not len(x)


def test_attention_places_a_layer_of_a_step_once(monkeypatch):
    """The first step of a padded batch, and a decode step."""
    from host import with_cache
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_paged.cache.step_planner import LayerUpdate

    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="paged_flash").eval()
    cache, placed, place = hf_paged.PagedCache(config), [], LayerUpdate.place
    monkeypatch.setattr(LayerUpdate, "place", lambda self, mask: placed.append(self.index) or place(self, mask))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    for length in (6, 1):
        placed.clear()
        with torch.no_grad():
            model(torch.randint(1, 97, (2, length)), attention_mask=mask, **with_cache(cache))
        assert placed == [0, 1, 2]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)


@pytest.mark.gpu
def test_a_decode_step_without_padding_waits_for_nothing():
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, attn_implementation="paged_flash",
    )  # fmt: skip
    cache = hf_paged.PagedCache(config)
    layer = torch.nn.Module()
    layer.layer_idx, layer.is_causal = 1, True

    def step(length):
        for index in range(2):
            q, k, v = (torch.randn(3, h, length, 64, device="cuda", dtype=torch.float16) for h in (4, 2, 2))
            keys, values = cache.update(k, v, index)
            hf_paged.attention.interface.paged_flash_attention(layer, q, keys, values, None, scaling=0.125)

    step(20)
    step(1)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):  # pages are taken meanwhile
            step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    cache.check()
