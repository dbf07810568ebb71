"""What tests of a patched generate() share: batches of prompts, and both results of a call."""

import copy

import torch
from explicit_models import prompts
from host import CACHE, cache_of
from transformers.generation.streamers import BaseStreamer

import hf_paged
from hf_paged import EngineConfig

EOS = [3, 7, 19, 40, 55, 56]
CONFIG = EngineConfig(page_size=8, max_num_seqs=8, max_batch_tokens=32)


def batch(*lengths, side="left", pad=0):
    rows = prompts(*lengths)
    longest = max(lengths)
    filled = [[pad] * (longest - len(row)) for row in rows]
    ids = [p + row if side == "left" else row + p for row, p in zip(rows, filled)]
    mask = [
        [0] * len(p) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(p)
        for row, p in zip(rows, filled)
    ]
    return dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))


def both(model, *args, config=CONFIG, **kwargs):
    """Results without and with the patch; criteria and processors are copied, as some remember what they saw."""
    expected = model.generate(*args, **copy.deepcopy(kwargs))
    hf_paged.patch_generate(model, config)
    got = model.generate(*args, **copy.deepcopy(kwargs))
    hf_paged.unpatch_generate(model)
    return got, expected


def assert_same(got, expected):
    assert type(got) is type(expected)
    if isinstance(got, torch.Tensor):
        assert got.dtype == expected.dtype
        assert got.device == expected.device
        assert got.tolist() == expected.tolist()
        return
    missing = {CACHE} if cache_of(got) is None else set()
    assert set(got) | missing == set(expected)
    for name in got:
        if isinstance(got[name], torch.Tensor):
            assert_same(got[name], expected[name])


class Recorder(BaseStreamer):
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append("end")
