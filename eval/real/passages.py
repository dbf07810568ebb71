"""Is a passage found again that stands far back? Scores by depth and length, of the model's own text.

A passage stands once in other text, and its beginning again at the end: a model that looks back goes on with the rest
of it. The score is the share of these tokens that are the most likely ones, each after the right ones before it. So it
needs no generation and no question that a small model may not understand; what counts is that every attention scores
alike.
"""

from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import hf_paged
from eval.loading import set_attention
from eval.quality.retrieval import Grid
from eval.quality.scoring import engine_scores, scored_logits

PASSAGE, CUE = 64, 16
"""Tokens of a passage, and those of them that are given again."""


def passage_prompt(ids: Sequence[int], length: int, depth: float, number: int, beginning: Sequence[int]) -> list[int]:
    """A prompt of `length` tokens, the passage included twice.

    Args:
        ids: tokens of a text.
        length: of the prompt.
        depth: where the passage stands, 0: at the beginning, 1: at the end.
        number: which passage; they are taken from the end of the text, what is around them from its beginning.
        beginning: special tokens at the start.

    Raises:
        ValueError: the text or the length is too short.
    """
    room = length - 2 * PASSAGE - len(beginning)
    if room < 0 or room + PASSAGE * (number + 1) > len(ids):
        raise ValueError(
            f"length={length} (--lengths) with a text (--data) of {len(ids):,} tokens; pass lengths of at least "
            f"{2 * PASSAGE + len(beginning)}, and a text of {room + PASSAGE * (number + 1):,} tokens or more"
        )
    passage = list(ids[len(ids) - PASSAGE * (number + 1) : len(ids) - PASSAGE * number])
    around = list(ids[:room])
    cut = round(depth * room)
    return [*beginning, *around[:cut], *passage, *around[cut:], *passage]


@torch.no_grad()
def passage_grid(
    model: PreTrainedModel,
    ids: Sequence[int],
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    way: str,
    kv_dtype: str = "auto",
    num_passages: int = 2,
    beginning: Sequence[int] = (),
) -> Grid:
    """Share of a passage's tokens that are predicted, by depth and length.

    Args:
        model: on its device; its attention implementation is left changed.
        ids: of a text.
        lengths, depths: of the prompts.
        way: an attention implementation, in one forward, or "engine".
        kv_dtype: of the engine's pages.
        num_passages: for each cell.
        beginning: special tokens at the start of a text.
    """
    cells = [(depth, length) for depth in depths for length in lengths]
    prompts = {
        cell: [torch.tensor(passage_prompt(ids, cell[1], cell[0], number, beginning)) for number in range(num_passages)]
        for cell in cells
    }
    num_scored = PASSAGE - CUE
    set_attention(model, "paged_flash" if way == "engine" else way)
    scores: dict[tuple[float, int], float] = {}
    with tqdm(total=len(cells), desc=f"passages {way} {kv_dtype}", unit="cell") as bar:
        if way == "engine":
            # Without the prefix cache: the text around the passage is the same for many cells.
            config = hf_paged.EngineConfig(
                kv_dtype=kv_dtype, max_model_len=max(lengths), max_num_seqs=16, prefix_caching=False
            )
            with hf_paged.Engine(model, config, background=False) as engine:
                for cell, found in zip(cells, engine_scores(engine, prompts.values(), [num_scored] * len(cells))):
                    hits = [_hits(top1, row) for (_, top1), row in zip(found, prompts[cell])]
                    scores[cell] = sum(hits) / len(hits)
                    bar.update()
        else:
            for cell in cells:
                hits = []
                for row in prompts[cell]:
                    parts = scored_logits(model, row[None].to(model.device), num_scored, "prefill", None, chunk=512)
                    hits.append(_hits(torch.cat([part.argmax(dim=-1) for part in parts], dim=1)[0].tolist(), row))
                scores[cell] = sum(hits) / len(hits)
                bar.update()
    name = way if kv_dtype == "auto" else f"{way}, {kv_dtype} pages"
    return Grid(name, tuple(lengths), tuple(depths), tuple(tuple(scores[d, n] for n in lengths) for d in depths))


def _hits(predicted: Sequence[int], row: torch.Tensor) -> float:
    expected = row[CUE - PASSAGE :].tolist()
    return sum(a == b for a, b in zip(predicted, expected, strict=True)) / len(expected)
