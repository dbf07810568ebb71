"""A small tokenizer made on the spot."""

import itertools

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?"


def characters(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token a character, and some of two; ids from 0 to ``vocab_size - 1``, padding is 0."""
    words = ["<pad>", "<s>", *LETTERS, *[a + b for a, b in itertools.pairwise(LETTERS)]][:vocab_size]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")
