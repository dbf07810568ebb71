"""An induction model built by hand: a Llama whose weights are written down, not trained, and whose answer is known.

Given a string of distinct random tokens twice, the model copies the second from the first with accuracy 1.000, at any
length and depth within its 131,072 positions, in float32 as in bfloat16. So every miss is a fault of the attention or
of the cache under test, and its place says which tokens were lost. It sees far context, where a small trained model
(`eval.small_model`) is nearly blind. It does not see faults too small to change an argmax, a scale wrong by a tenth.

The circuit is the one of Olsson et al. 2022, "In-context Learning and Induction Heads"
(https://transformer-circuits.pub/2022/in-context-learning-and-induction-heads/), in two layers without MLP:

    tokens       ... A  B  ...  A            layer 0: each position attends to the one before it and copies its code.
    layer 0         (A) (B)    (.)           layer 1: the query "A" finds the key "the token before me is A", which is
    layer 1          ^----------'               B's position; its value says "I am B", and B is predicted.

Residual stream, `hidden_size` 512 = 4 heads of 128: what a feature holds, and who writes it:

    code      [0, 128)     the own token as two codes of 64 entries +-1, one for each KV head; embedding
    previous  [128, 256)   the codes of the previous token; layer 0
    digits    [256, 288)   the own token as four digits, each one-hot in 8 places; embedding
    answer    [288, 320)   the digits of the predicted token, read by the LM head; layer 1
    one       320          always 1; embedding

Four query heads share the work such that none can be missing nor read the wrong KV head unnoticed. KV head `g` holds
code `g` and digits `2g` and `2g + 1`; query head `2g + j` moves half `j` of code `g` in layer 0, and digit `2g + j` in
layer 1. Each half of a code names only half of the token, its row or its column when the vocabulary is laid out as
a square (code 1: column and row), and neither half alone finds the one token.

A half is one of 64 biorthogonal vectors: the 32 rows of a Hadamard matrix and their negatives. So two codes have the
scalar product 64 if the tokens are the same, and at most 32 if not.

RoPE turns the pair (i, i + 64) of a head by the angle `position * w_i`, w_i = theta^(-i / 64). With theta = 1e12 the
first pairs are fast and the last ones stand nearly still: w_0 = 1, w_16 = 1e-3, w_32 = 1e-6.
  - Layer 0 uses the first 16 pairs. Query and key are constant vectors, the query turned back by one position, so that
    the score of position s seen from t is a sum of cos(w_i (t - 1 - s)): greatest at s = t - 1 (at t = 0, s = 0).
  - Layer 1 uses the last 32 pairs, in which content is compared as if there were no positions. Its key is the previous
    token's code minus a quarter of the own token's. The second term settles position 0, which takes itself for its
    predecessor and would else answer A with A. The right key scores at least 64 - 32/4 = 56, any other at most
    32 + 64/4 = 48.

RMSNorm divides by a root mean square which is the same for every token, since codes are +-1 and digits are one-hot.
It is known beforehand and written into the norm's weight, so that a norm passes its input on unchanged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, LlamaConfig, LlamaForCausalLM

from eval.loading import with_cache

HEAD_DIM, NUM_Q_HEADS, NUM_KV_HEADS = 128, 4, 2
HALF_HEAD = HEAD_DIM // 2
CODE_LEN, HALF_CODE = 64, 32
MAX_BASE = 8
MIN_VOCAB_SIZE, MAX_VOCAB_SIZE = 16, 4096  # 4096 is both 8 ** 4, four digits, and 64 ** 2, two halves of a code
ROPE_THETA = 1e12

# First features of the parts of the residual stream.
CODE = 0
PREVIOUS = CODE + NUM_KV_HEADS * CODE_LEN
DIGITS = PREVIOUS + NUM_KV_HEADS * CODE_LEN
ANSWER = DIGITS + NUM_Q_HEADS * MAX_BASE
ONE = ANSWER + NUM_Q_HEADS * MAX_BASE
HIDDEN_SIZE = NUM_Q_HEADS * HEAD_DIM

FAST_PAIRS = torch.arange(16)
# The dimensions of the 32 slowest pairs, both members: one for each place of a code.
SLOW_DIMS = torch.cat([torch.arange(32, 64), torch.arange(96, 128)])

# Softmax sharpness. Layer 0 prefers the previous position to its neighbours by 0.8 of its scale, 32; layer 1 the right
# key to any other by 8/64 of its logit, 48: far above log(number of keys), and low enough for scores in bfloat16.
PREVIOUS_LOGIT_SCALE = 40.0
MATCH_LOGIT = 384.0
ANSWER_LOGIT = 16.0


def induction_model(
    vocab_size: int = 4096,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "eager",
) -> LlamaForCausalLM:
    """Build the model; nothing is trained or loaded.

    Args:
        vocab_size: `MIN_VOCAB_SIZE` to `MAX_VOCAB_SIZE`; the string to copy can be as long.
        dtype: of the weights: torch.float32, torch.bfloat16 or torch.float16.
        attn_implementation: handed to transformers.

    Returns:
        A model in eval mode on the CPU, without end-of-text token: `generate` runs to `max_new_tokens`.

    Raises:
        ValueError: `vocab_size` or `dtype` is none of the above.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size={vocab_size}: must be {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={dtype}: must be torch.float32, torch.bfloat16 or torch.float16")
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=NUM_Q_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        _write_embedding_and_head(model)
        _write_previous_token_layer(model)
        _write_induction_layer(model)
        _write_norms(model)
    return model.eval()


def _digits(vocab_size: int, num_digits: int) -> Tensor:
    """Token ids as digits in the smallest base that has room for all: int64 `[vocab_size, num_digits]`."""
    base = next(base for base in range(2, vocab_size + 1) if base**num_digits >= vocab_size)
    ids = torch.arange(vocab_size)
    return torch.stack([ids // base**place % base for place in range(num_digits)], dim=1)


def _codes(vocab_size: int) -> Tensor:
    """The codes of all tokens, for both KV heads: float32 `[vocab_size, 2 * CODE_LEN]`, entries +-1."""
    hadamard = torch.ones(1, 1)
    while hadamard.shape[0] < HALF_CODE:
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    halves = torch.cat([hadamard, -hadamard])  # [64, HALF_CODE]
    row, column = _digits(vocab_size, 2).unbind(dim=1)  # the vocabulary laid out as a square
    return torch.cat([halves[row], halves[column], halves[column], halves[row]], dim=1)


def _write_embedding_and_head(model: LlamaForCausalLM) -> None:
    """Embedding: code, digits and one. Head: how many of the answer's digits are the token's."""
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight  # both [vocab_size, hidden_size]
    vocab_size = embedding.shape[0]
    embedding[:, CODE:PREVIOUS] = _codes(vocab_size).to(embedding.dtype)
    embedding[:, ONE] = 1
    rows = torch.arange(vocab_size)
    for q_head, digit in enumerate(_digits(vocab_size, NUM_Q_HEADS).unbind(dim=1)):
        embedding[rows, DIGITS + q_head * MAX_BASE + digit] = 1
        head[rows, ANSWER + q_head * MAX_BASE + digit] = ANSWER_LOGIT


def _write_previous_token_layer(model: LlamaForCausalLM) -> None:
    """Layer 0: attend to the previous position by RoPE phase alone, and copy its codes into `previous`."""
    attention = model.model.layers[0].self_attn
    frequency = ROPE_THETA ** (-FAST_PAIRS.double() / HALF_HEAD)  # [16], radians per position
    # Query and key get the same length, and the score's division by sqrt(head_dim) is made up for.
    length = math.sqrt(PREVIOUS_LOGIT_SCALE * math.sqrt(HEAD_DIM))
    for q_head in range(NUM_Q_HEADS):
        row = q_head * HEAD_DIM
        attention.q_proj.weight[row + FAST_PAIRS, ONE] = (length * frequency.cos()).to(model.dtype)
        attention.q_proj.weight[row + HALF_HEAD + FAST_PAIRS, ONE] = (-length * frequency.sin()).to(model.dtype)
    half_code = torch.arange(HALF_CODE)
    for kv_head in range(NUM_KV_HEADS):
        attention.k_proj.weight[kv_head * HEAD_DIM + FAST_PAIRS, ONE] = length
        for half in range(2):
            place = kv_head * CODE_LEN + half * HALF_CODE + half_code
            value_dim = half * HALF_HEAD + half_code
            q_head = 2 * kv_head + half
            attention.v_proj.weight[kv_head * HEAD_DIM + value_dim, CODE + place] = 1
            attention.o_proj.weight[PREVIOUS + place, q_head * HEAD_DIM + value_dim] = 1


def _write_induction_layer(model: LlamaForCausalLM) -> None:
    """Layer 1: attend to where the previous token is the own token, and copy that position's digits into `answer`."""
    attention = model.model.layers[1].self_attn
    sharpness = MATCH_LOGIT * math.sqrt(HEAD_DIM) / CODE_LEN
    place, digit = torch.arange(CODE_LEN), torch.arange(MAX_BASE)
    for kv_head in range(NUM_KV_HEADS):
        row, code = kv_head * HEAD_DIM, kv_head * CODE_LEN + place
        attention.k_proj.weight[row + SLOW_DIMS, PREVIOUS + code] = 1
        attention.k_proj.weight[row + SLOW_DIMS, CODE + code] = -0.25
        for half in range(2):
            q_head, value_dim = 2 * kv_head + half, half * HALF_HEAD + digit
            attention.q_proj.weight[q_head * HEAD_DIM + SLOW_DIMS, CODE + code] = sharpness
            attention.v_proj.weight[row + value_dim, DIGITS + q_head * MAX_BASE + digit] = 1
            attention.o_proj.weight[ANSWER + q_head * MAX_BASE + digit, q_head * HEAD_DIM + value_dim] = 1


def _write_norms(model: LlamaForCausalLM) -> None:
    """Norm weights that undo the division by the root mean square, from the squared length of each norm's input."""
    embedded = NUM_KV_HEADS * CODE_LEN + NUM_Q_HEADS + 1  # codes, digits, one
    after_layer_0 = embedded + NUM_KV_HEADS * CODE_LEN
    after_layer_1 = after_layer_0 + NUM_Q_HEADS
    layers = model.model.layers
    for norm, squared_length in (
        (layers[0].input_layernorm, embedded),
        (layers[1].input_layernorm, after_layer_0),
        (model.model.norm, after_layer_1),
    ):
        norm.weight.fill_(math.sqrt(squared_length / HIDDEN_SIZE))


def copy_prompt(
    vocab_size: int, length: int, seed: int, *, batch_size: int = 1, string_len: int | None = None, depth: float = 0.0
) -> Tensor:
    """Random tokens that end with a string seen before: int64 `[batch_size, length]`.

        | filler | string | filler | string |      depth 0: no filler before, depth 1: none between

    The tokens of a string are distinct, for a repeated one would have two answers; the filler is drawn from all others.
    For `generate`, cut the prompt behind the first token of the second string: the rest is what must come out.

    Args:
        vocab_size: of the model.
        length: tokens of the prompt.
        seed: seeds strings and filler.
        batch_size: prompts.
        string_len: tokens of the string, from 2; `length // 2`, all there is room for, when None.
        depth: where the first string stands, 0 to 1.

    Raises:
        ValueError: an argument is out of range; the string has more tokens than the vocabulary, or leaves none for the
            filler that `length` calls for.
    """
    string_len = length // 2 if string_len is None else string_len
    num_filler = length - 2 * string_len
    # Filler needs a token of its own.
    max_string_len = min(length // 2, vocab_size - (num_filler > 0))
    if not 2 <= string_len <= max_string_len:
        raise ValueError(
            f"string_len={string_len}: must be 2 to {max_string_len} for length={length}, vocab_size={vocab_size}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth}: must be 0 to 1")
    generator = torch.Generator().manual_seed(seed)
    num_before = round(depth * num_filler)
    prompts: list[Tensor] = []
    for _ in range(batch_size):
        shuffled = torch.randperm(vocab_size, generator=generator)
        string, others = shuffled[:string_len], shuffled[string_len:]
        filler = others[torch.randint(max(others.numel(), 1), (num_filler,), generator=generator)]
        prompts.append(torch.cat([filler[:num_before], string, filler[num_before:], string]))
    return torch.stack(prompts)


@torch.no_grad()
def copy_hits(
    model: LlamaForCausalLM,
    length: int,
    seed: int,
    *,
    batch_size: int = 1,
    string_len: int | None = None,
    depth: float = 0.0,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Which tokens of the second string are predicted in one forward pass: bool `[batch_size, string_len - 1]`.

    Entry i is about token `i + 1` of the string. Its first token cannot be known and is not scored.

    Args:
        model: of `induction_model`, or the same model after what is under test was done to it.
        length, seed, batch_size, string_len, depth: of the prompt, see `copy_prompt`.
        attention_mask: handed to the model; a mask of four dimensions replaces the causal one.
        cache: an empty cache to run through, or None for a pass without one.

    Raises:
        ValueError: an argument is out of range, see `copy_prompt`.
    """
    vocab_size = model.config.vocab_size
    prompt = copy_prompt(vocab_size, length, seed, batch_size=batch_size, string_len=string_len, depth=depth)
    prompt = prompt.to(model.device)
    string_len = length // 2 if string_len is None else string_len
    output = model(
        prompt,
        attention_mask=attention_mask,
        **with_cache(model, cache),
        use_cache=cache is not None,
        logits_to_keep=string_len,
    )
    predicted = output.logits[:, :-1].argmax(dim=-1)  # [batch_size, string_len - 1]
    return predicted == prompt[:, length - string_len + 1 :]


def copy_accuracy(
    model: LlamaForCausalLM,
    length: int,
    seed: int,
    *,
    batch_size: int = 1,
    string_len: int | None = None,
    depth: float = 0.0,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
) -> float:
    """Share of the second string that is predicted: 1.0 unless something is broken. Arguments, errors: `copy_hits`."""
    hits = copy_hits(
        model,
        length,
        seed,
        batch_size=batch_size,
        string_len=string_len,
        depth=depth,
        attention_mask=attention_mask,
        cache=cache,
    )
    return hits.float().mean().item()
