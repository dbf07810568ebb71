"""Engines of tests, what they are asked, and what ``generate()`` makes of a prompt alone."""

import torch
from transformers import GenerationConfig

import hf_paged

GRAPH_FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt_oss", "mistral", "mixtral", "gpt2")
"""Families without recurrent states, whose steps are captured and run ahead."""


def config(new: int = 8, **options) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, pad_token_id=0, **({"do_sample": False} | options))


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model, ids: list[int], options: GenerationConfig) -> list[int]:
    return model.generate(torch.tensor([ids]), generation_config=options)[0, len(ids) :].tolist()


def run_again(step, slots):
    """Stands for a capture: the step itself, over the same static buffer."""
    step(slots)
    return lambda: step(slots)


def make_engine(model, **options) -> hf_paged.Engine:
    """An engine whose decode steps take the captured path, and whose steps run ahead."""
    defaults = dict(num_pages=32, page_size=8, max_num_seqs=8, max_batch_tokens=32, self_check=False)
    engine = hf_paged.Engine(model, hf_paged.EngineConfig(**(defaults | options)), background=False)
    assert engine._core.use_graphs(run_again) is None
    engine._core.runs_ahead = True
    return engine


def engine_of(model, **options) -> hf_paged.Engine:
    """An engine whose modules run fused."""
    defaults = dict(num_pages=48, page_size=8, max_num_seqs=8, max_batch_tokens=32, self_check=False, fuse=True)
    return hf_paged.Engine(model, hf_paged.EngineConfig(**(defaults | options)), background=False)
