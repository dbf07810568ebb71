"""Stop strings found in the text of the last tokens, beside transformers' criterion."""

from pathlib import Path

import numpy as np
import pytest
import torch
from random_requests import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers_of_tests import characters
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, StopStringCriteria

import hf_paged
from hf_paged.engine.sampling.stop_strings import StopStrings

pytestmark = pytest.mark.quick

SMALL_MODEL = Path(__file__).parent.parent / "assets" / "small_model"


def word_pieces() -> PreTrainedTokenizerFast:
    """Pieces with a prefix that is no text of theirs."""
    words = ["[UNK]", "ab", "cd", "ef", "a", "b", "c", "##a", "##b", "##ab", "##c", "##f", ".", "##."]
    words += [f"##{x}" for x in "de"] + [*"def"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def sentence_pieces() -> PreTrainedTokenizerFast:
    """Spaces written as an underscore, and bytes for what has no token."""
    words = ["<unk>", "<0xE2>", "<0x82>", "<0xAC>", "<0x0A>", *"\u2581abcdef.", "\u2581a", "\u2581ab", "cd", "ef."]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [("\u2581", "a"), ("\u2581a", "b"), ("c", "d")], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


TOKENIZERS = {
    "bytes": lambda: AutoTokenizer.from_pretrained(SMALL_MODEL),
    "characters": lambda: characters(97),
    "word pieces": word_pieces,
    "sentence pieces": sentence_pieces,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_as_transformers_criterion(name):
    tokenizer, random = TOKENIZERS[name](), np.random.default_rng(0)
    ids = torch.from_numpy(random.integers(0, len(tokenizer) + 2, (400, 14)))
    # Texts that occur: pieces of what the sequences say, across tokens, from one character on.
    texts = tokenizer.batch_decode(ids.clamp(max=len(tokenizer) - 1))
    found = 0
    for _ in range(3):
        stops = []
        for _ in range(3):
            text = texts[random.integers(400)]
            start, length = random.integers(0, max(1, len(text) - 6)), random.integers(1, 7)
            stops.append(text[start : start + length] or "a")
        mine, theirs = StopStrings(tokenizer, stops), StopStringCriteria(tokenizer, stops)
        for length in (1, 3, 7, 14):
            got, expected = mine(ids[:, :length], None), theirs(ids[:, :length], None)
            assert torch.equal(got, expected), (stops, texts[int((got != expected).nonzero()[0, 0])])
            found += int(expected.sum())
    assert found > 20


def test_whole_strings_across_tokens_and_inside_one():
    tokenizer = TOKENIZERS["bytes"]()
    ids = tokenizer("def f(x):\n    return x\n", add_special_tokens=False).input_ids
    stops = {"return": True, "urn x": True, "\n    ret": True, "nothing": False, "x\n": True}
    for stop, is_there in stops.items():
        criterion, text = StopStrings(tokenizer, stop), ""
        ends = [n for n in range(1, len(ids) + 1) if criterion.is_stopped(ids[:n])]
        assert bool(ends) == is_there
        if is_there:
            text = tokenizer.decode(ids[: ends[0]])
            assert stop in text
            assert stop not in tokenizer.decode(ids[: ends[0] - 1])
    with pytest.raises(ValueError, match="none of them empty"):
        StopStrings(tokenizer, ["a", ""])


def test_a_request_looks_at_the_tokens_that_come(monkeypatch):
    """Not at the vocabulary: that is seconds for each new set of strings."""
    model, tokenizer = tiny_model("llama"), characters(97)
    prompt = [5, 6, 7, 8]
    options = GenerationConfig(max_new_tokens=30, do_sample=False, pad_token_id=0)
    whole = model.generate(torch.tensor([prompt]), generation_config=options)[0, len(prompt) :].tolist()
    stops = [tokenizer.decode(whole[n : n + 2]) for n in (4, 9, 17)]
    expected = []
    for stop in stops:
        stopping = GenerationConfig(max_new_tokens=30, do_sample=False, pad_token_id=0, stop_strings=stop)
        expected.append(
            model.generate(torch.tensor([prompt]), generation_config=stopping, tokenizer=tokenizer)[0, 4:].tolist()
        )
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: pytest.fail("looked at the whole vocabulary"))
    with hf_paged.Engine(model, hf_paged.EngineConfig(num_pages=24, self_check=False), background=False) as engine:
        for stop, tokens in zip(stops, expected):
            stopping = GenerationConfig(max_new_tokens=30, do_sample=False, pad_token_id=0, stop_strings=stop)
            output = engine.submit(prompt, generation_config=stopping, tokenizer=tokenizer).result(timeout_s=60)
            assert (output.token_ids, output.finish_reason) == (tokens, "stop")
