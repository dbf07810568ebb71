"""A small real language model, trained in minutes on a CPU, so that quality can be measured without any download.

    python -m eval.small_model --output integration_tests/assets/small_model

trains a Llama on the sources of the Python standard library and saves an ordinary `from_pretrained` folder. Attention
code is then judged by the *paired* difference of the negative log-likelihood it gives on the same held-out windows as
the reference attention; the absolute perplexity of so small a model means little.

What faults of attention do to the committed model (every sixth held-out window; nats per label, paired with the right
attention, whose perplexity there is 14.14):

    fault                          perplexity   mean difference    standard error   greatest
    mask lets see one token ahead       11.42           -0.2139            0.0133       10.1
    mask one token short                15.48           +0.0906            0.0036        5.5
    window of 64 tokens                 14.60           +0.0321            0.0040        6.7
    first token lost                    14.23           +0.0065            0.0013        7.7
    16 tokens lost, 96 to 111           14.56           +0.0293            0.0026        9.3
    scale x 1.1                         14.17           +0.0018            0.0008        1.2
    query head h reads KV head h % 2    50.48           +1.2725            0.0250       10.0

Life of a run: `corpus` -> `train_tokenizer` -> `encode` -> `bigram_warm_start` -> `train` -> `save` -> `evaluate`.

The recipe, and why:
  - Embedding and head are first fitted to the bigram table of the training text. While every `o_proj` and `down_proj`
    is zero the network *is* that factorised bigram model, so gradient steps on whole windows are spent only on what a
    bigram table cannot know.
  - Then Muon (K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; `torch.optim.Muon`) moves the matrices
    of the layers, AdamW the embedding, the head and the norms. AdamW alone stays behind a bigram table at this budget.
  - The budget counts steps, never seconds, so that a busy computer makes the same model, only later. Two runs of the
    default recipe, one taking more than twice as long as the other, wrote the same bytes.

RoPE is trained on positions below `CONTEXT` only. `max_position_embeddings` allows more, but what the model says beyond
`CONTEXT` is not to be judged by its likelihood; `eval.quality.induction_model` is the instrument for long context.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval import command_line

CONTEXT = 256
"""Tokens of a training window and of a scored window."""

VOCAB_SIZE = 1024
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"

HELDOUT_ONE_IN = 25
"""One file in so many is held out, by the hash of its path."""

# Not what a model should spend its few bytes on: tests, code-page tables, generated texts, and what the build wrote.
EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "__pycache__", "encodings", "pydoc_data"})
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True, slots=True)
class Corpus:
    """Text split by file.

    Attributes:
        train: one string per training file.
        heldout: the held-out files, joined by two newlines.
        heldout_files: their paths relative to the corpus folder, in the order in which they are joined.
        sha256: hash over every path and every byte, both splits.
    """

    train: tuple[str, ...]
    heldout: str
    heldout_files: tuple[str, ...]
    sha256: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides which model comes out, the corpus and the library versions aside.

    Attributes:
        steps: optimizer steps on windows, after the warm start.
        warm_start_steps: AdamW steps on the bigram table.
        batch_size: windows of `CONTEXT` labels in a step.
        muon_lr: peak learning rate of the layers' matrices.
        adamw_lr: peak learning rate of embedding, head and norms.
        seed: seeds the weights and the order of the windows.
    """

    steps: int = 800
    warm_start_steps: int = 600
    batch_size: int = 8
    muon_lr: float = 0.02
    adamw_lr: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.warm_start_steps < 0:
            raise ValueError(f"warm_start_steps={self.warm_start_steps}: must be at least 0 (0: no warm start)")
        for name in ("muon_lr", "adamw_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")


@dataclass(frozen=True, slots=True)
class HeldoutFigures:
    """Figures over disjoint windows of one text; the tail shorter than a window is dropped.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a label.
        bits_per_byte: mean negative log-likelihood in bits, times tokens per UTF-8 byte of the text.
        num_labels: labels scored, `CONTEXT - 1` in each window.
    """

    perplexity: float
    bits_per_byte: float
    num_labels: int


def corpus(root: Path | None = None) -> Corpus:
    """Read the Python sources below `root` without tests, and hold out one file in `HELDOUT_ONE_IN`.

    Which file is held out depends on its path alone, so it is the same on every computer with the same Python version.

    Args:
        root: a folder of .py files; the standard library of the running interpreter when None.

    Raises:
        ValueError: `root` is no folder, or its files leave either split empty.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    if not root.is_dir():
        raise ValueError(f"root={str(root)!r}: not a folder; give a folder of .py files, or None")
    digest = hashlib.sha256()
    train: list[str] = []
    heldout: dict[str, str] = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if EXCLUDED_FOLDERS.intersection(relative.parts) or relative.parts[0].startswith(EXCLUDED_PREFIXES):
            continue
        name, content = relative.as_posix(), path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
        if int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELDOUT_ONE_IN == 0:
            heldout[name] = content.decode()
        else:
            train.append(content.decode())
    if not train or not heldout:
        found = f"{len(train)} training and {len(heldout)} held-out files"
        raise ValueError(f"root={str(root)!r}: {found}; at least one of each is needed")
    return Corpus(tuple(train), "\n\n".join(heldout.values()), tuple(heldout), digest.hexdigest())


def train_tokenizer(texts: Sequence[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; any text survives encode and decode unchanged, and no token is added to it.

    Args:
        texts: the training texts.
        vocab_size: tokens in all: 2 special ones, 256 bytes, the rest merges.

    Raises:
        ValueError: `vocab_size` leaves no room for the bytes, or the texts are too short to fill it.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size={vocab_size}: at least 258 are needed, 256 bytes and 2 special tokens")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise ValueError(f"vocab_size={vocab_size}: the texts give only {bpe.get_vocab_size()} tokens; give more text")
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=small_config(vocab_size).max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Tokenise the texts into one stream, each followed by the end-of-text token: int64 `[num_tokens]`."""
    ids: list[int] = []
    for text_ids in tokenizer(list(texts), verbose=False)["input_ids"]:
        ids.extend(text_ids)
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int64)


def small_config(vocab_size: int = VOCAB_SIZE) -> LlamaConfig:
    """The configuration of the small model: 3.67 million parameters at the default vocabulary, GQA of two."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )


def new_model(vocab_size: int, seed: int) -> LlamaForCausalLM:
    """A float32 model with seeded weights whose `o_proj` and `down_proj` are zero, so that every layer adds nothing."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(small_config(vocab_size))
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    return model


def bigram_counts(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often each token follows each: float32 `[vocab_size (token), vocab_size (next token)]`.

    Args:
        tokens: int64 `[num_tokens]`.
        vocab_size: number of rows and columns.
    """
    pairs = tokens[:-1] * vocab_size + tokens[1:]
    return torch.bincount(pairs, minlength=vocab_size**2).view(vocab_size, vocab_size).float()


def bigram_warm_start(model: LlamaForCausalLM, counts: Tensor, steps: int, *, progress: bool = True) -> list[float]:
    """Fit the embedding, the final norm and the head to a bigram table, in place.

    The layers are left out of the computation, which is exact while `o_proj` and `down_proj` are zero (`new_model`).

    Args:
        model: a model of `new_model`.
        counts: `[vocab_size, vocab_size]`, of `bigram_counts`.
        steps: full-batch AdamW steps.
        progress: show a progress bar.

    Returns:
        The cross-entropy before each step, in nats per token.
    """
    embedding, norm, head = model.model.embed_tokens, model.model.norm, model.lm_head
    # [vocab_size, vocab_size], sums to 1: the probability of a pair.
    pair_weight = counts / counts.sum()
    optimizer = torch.optim.AdamW([embedding.weight, norm.weight, head.weight], lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    losses: list[float] = []
    for _ in tqdm(range(steps), desc="bigram warm start", disable=not progress):
        log_probs = F.log_softmax(head(norm(embedding.weight)), dim=-1)  # [vocab_size, vocab_size]
        loss = -(pair_weight * log_probs).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def training_batches(tokens: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches int64 `[batch_size, CONTEXT + 1]` without end: each epoch cuts the stream at another offset and shuffles.

    Args:
        tokens: int64 `[num_tokens]`.
        batch_size: windows in a batch.
        generator: drawn from for offset and order.

    Raises:
        ValueError: the stream is too short for one batch at every offset.
    """
    length = CONTEXT + 1
    if tokens.numel() < (batch_size + 1) * length:
        raise ValueError(f"tokens: {tokens.numel()} of them; a batch of {batch_size} needs {(batch_size + 1) * length}")
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        windows = tokens[offset : offset + (tokens.numel() - offset) // length * length].view(-1, length)
        order = torch.randperm(windows.shape[0], generator=generator)
        for start in range(0, order.numel() - batch_size + 1, batch_size):
            yield windows[order[start : start + batch_size]]


def learning_rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: a short linear rise, then a linear fall to zero at `steps`."""
    warmup = min(20, steps)
    return min((step + 1) / warmup, (steps - step) / steps)


def train(model: LlamaForCausalLM, tokens: Tensor, recipe: Recipe, *, progress: bool = True) -> list[float]:
    """Train in place, in bfloat16 autocast over float32 weights.

    Args:
        model: a model of `new_model`, warm-started or not.
        tokens: the training stream, int64 `[num_tokens]`.
        recipe: steps, batch size, learning rates and seed.
        progress: show a progress bar.

    Returns:
        The cross-entropy of each step's batch, in nats per token.

    Raises:
        ValueError: `tokens` has fewer tokens than a batch needs.
    """
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.1),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, recipe.steps))
        for optimizer in optimizers
    ]
    batches = training_batches(tokens, recipe.batch_size, torch.Generator().manual_seed(recipe.seed))
    losses: list[float] = []
    model.train()
    bar = tqdm(range(recipe.steps), desc="training", disable=not progress)
    for _ in bar:
        batch = next(batches)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch[:, :-1], use_cache=False).logits  # [batch_size, CONTEXT, vocab_size]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
        bar.set_postfix(perplexity=f"{math.exp(losses[-1]):.1f}", refresh=False)
    model.eval()
    return losses


def heldout_windows(tokenizer: PreTrainedTokenizerFast, text: str, context: int = CONTEXT) -> Tensor:
    """Tokenise a text once and cut it into disjoint windows, tail dropped: int64 `[num_windows, context]`.

    Raises:
        ValueError: `context` is below 2, or the text has fewer tokens than one window.
    """
    if context < 2:
        raise ValueError(f"context={context}: a window needs at least 2 tokens, one of them a label")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    num_windows = ids.numel() // context
    if num_windows == 0:
        raise ValueError(f"text: {ids.numel()} tokens; at least context={context} are needed")
    return ids[: num_windows * context].view(num_windows, context)


@torch.no_grad()
def label_nll(
    model: torch.nn.Module, windows: Tensor, *, batch_size: int = 16, description: str | None = None
) -> Tensor:
    """Negative log-likelihood of every label, for paired comparisons: float32 `[num_windows, context - 1]`, in nats.

    Args:
        model: a causal language model of transformers.
        windows: int64 `[num_windows, context]`; the first token of a window is no label.
        batch_size: windows in a forward pass.
        description: shown before a progress bar; no bar when None.
    """
    losses: list[Tensor] = []
    for batch in tqdm(windows.split(batch_size), desc=description, disable=description is None):
        logits = model(batch, use_cache=False).logits[:, :-1].float()  # [batch, context - 1, vocab_size]
        losses.append(F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none"))
    return torch.cat(losses)


def figures(nll: Tensor, bytes_per_token: float) -> HeldoutFigures:
    """Sum up the negative log-likelihoods of `label_nll` (any shape, in nats)."""
    mean = nll.double().mean().item()
    return HeldoutFigures(math.exp(mean), mean / math.log(2) / bytes_per_token, nll.numel())


def bytes_per_token(tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    """UTF-8 bytes of the text over its tokens."""
    return len(text.encode()) / len(tokenizer(text, verbose=False)["input_ids"])


def evaluate(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, text: str, *, progress: bool = True
) -> HeldoutFigures:
    """Held-out figures of a model on a text, in disjoint windows of `CONTEXT` tokens.

    Raises:
        ValueError: the text has fewer tokens than one window.
    """
    windows = heldout_windows(tokenizer, text)
    nll = label_nll(model, windows, description="held-out" if progress else None)
    return figures(nll, bytes_per_token(tokenizer, text))


def baselines(counts: Tensor, tokenizer: PreTrainedTokenizerFast, text: str) -> dict[str, float]:
    """What tables of counts and gzip make of the held-out text: the marks a model has to pass.

    Args:
        counts: bigram counts of the training stream, `[vocab_size, vocab_size]`.
        tokenizer: the tokenizer of the counts.
        text: the held-out text, scored in the windows that `evaluate` scores.
    """
    windows = heldout_windows(tokenizer, text)
    token, label = windows[:, :-1], windows[:, 1:]
    unigram = counts.sum(0) + 1
    unigram = unigram / unigram.sum()  # [vocab_size]
    # Each row is mixed with the unigram table as if it had been seen `prior` times more: rare rows lean on it.
    prior = 100.0
    bigram = (counts + prior * unigram) / (counts.sum(1, keepdim=True) + prior)  # [vocab_size, vocab_size]
    return {
        "uniform_perplexity": float(counts.shape[0]),
        "unigram_perplexity": torch.exp(-unigram[label].log().mean()).item(),
        "bigram_perplexity": torch.exp(-bigram[token, label].log().mean()).item(),
        "gzip_bits_per_byte": 8 * len(gzip.compress(text.encode(), 9, mtime=0)) / len(text.encode()),
    }


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write a `from_pretrained` folder with bfloat16 weights; the model handed in is left in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def model_card(record: dict[str, Any]) -> str:
    """The README of the folder, from the record that goes into `training.json`."""
    data, heldout, base, recipe = record["corpus"], record["heldout"], record["baselines"], record["recipe"]
    context, max_positions = record["context"], record["max_position_embeddings"]
    train_size = f"{data['train_files']} files, {data['train_bytes'] / 1e6:.1f} MB"
    heldout_size = f"{len(data['heldout_files'])} files, {data['heldout_bytes'] / 1e6:.2f} MB"
    return f"""# A small Llama for tests and evaluations

An ordinary `LlamaForCausalLM` ({record["num_parameters"] / 1e6:.2f} million parameters, bfloat16) with a byte-level BPE
tokenizer of {record["vocab_size"]} tokens: 4 layers, hidden size 256, 4 query and 2 key/value heads of 64, untied.
It writes something that looks like Python. It is an instrument for comparing implementations, of no other use.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("integration_tests/assets/small_model")
tokenizer = AutoTokenizer.from_pretrained("integration_tests/assets/small_model")
```

## How it was made
`python -m eval.small_model --output integration_tests/assets/small_model`; `eval/small_model.py` explains the recipe.
{recipe["steps"]} steps of {recipe["batch_size"]} windows of {context} tokens with Muon and AdamW, after a bigram warm
start of {recipe["warm_start_steps"]} steps; seed {recipe["seed"]}.

Corpus: the standard library of Python {data["python"]} without tests, code-page tables and generated files;
{train_size} to train, {heldout_size} held out by file and joined in `../heldout.txt`.
`training.json` has hashes, versions, the held-out files and every setting.

## Figures
Held-out text tokenised once, disjoint windows of {context} tokens, tail dropped, {context - 1} labels scored in each,
{heldout["num_labels"]:,} in all; the saved weights, read into float32; eager attention.

| | perplexity | bits per byte |
|---|---|---|
| **this model** | **{heldout["perplexity"]:.2f}** | **{heldout["bits_per_byte"]:.3f}** |
| bigram table of the training text | {base["bigram_perplexity"]:.1f} | |
| unigram table | {base["unigram_perplexity"]:.0f} | |
| uniform | {base["uniform_perplexity"]:.0f} | |
| gzip -9 of the held-out text | | {base["gzip_bits_per_byte"]:.3f} |

## Limits
- RoPE was trained on positions below {context} only. The configuration allows {max_positions}, so that longer inputs
  can be run, but their likelihood is no measure of anything. For long context see `eval/quality/induction_model.py`.
- The perplexity belongs to this tokenizer and this text. Compare implementations on the same windows.
- Most of what it knows is near by: a fault that touches only far context moves the mean likelihood little. Look at the
  paired difference with its standard error and at the greatest difference of any label, not at the perplexity.

## Licence
The weights were trained on, and `../heldout.txt` consists of, files of the Python standard library: copyright the
Python Software Foundation and contributors, under the PSF License Agreement (https://docs.python.org/3/license.html).
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: train, save, evaluate what was saved, and record how it came about."""
    parser = command_line.make_parser(
        "small_model", "Train the small evaluation model on the Python standard library."
    )
    parser.add_argument("--output", type=command_line.output_folder, required=True, help="folder of the model")
    parser.add_argument("--corpus", type=Path, help="folder of .py files (default: the standard library)")
    parser.add_argument("--heldout", type=Path, help="file of the held-out text (default: heldout.txt beside --output)")
    for name, default in asdict(Recipe()).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default, help=f"see Recipe (default: {default})")
    options = parser.parse_args(arguments)
    try:
        recipe = Recipe(**{name: getattr(options, name) for name in asdict(Recipe())})
    except ValueError as error:
        parser.error(str(error))
    heldout_path = options.heldout or options.output.parent / "heldout.txt"
    # Not to find out after the training.
    options.output.mkdir(parents=True, exist_ok=True)
    heldout_path.parent.mkdir(parents=True, exist_ok=True)

    started = time.perf_counter()
    texts = corpus(options.corpus)
    tokenizer = train_tokenizer(texts.train)
    tokens = encode(tokenizer, texts.train)
    counts = bigram_counts(tokens, VOCAB_SIZE)
    model = new_model(VOCAB_SIZE, recipe.seed)
    bigram_warm_start(model, counts, recipe.warm_start_steps)
    train(model, tokens, recipe)
    save(model, tokenizer, options.output)
    print(f"trained and saved in {time.perf_counter() - started:.0f} s")

    heldout_path.write_text(texts.heldout, encoding="utf-8", newline="\n")
    # What is measured is what others will load: the rounded weights, not those in memory.
    saved = AutoModelForCausalLM.from_pretrained(options.output, dtype=torch.float32, attn_implementation="eager")
    heldout = evaluate(saved, tokenizer, texts.heldout)
    record = {
        "heldout": asdict(heldout),
        "baselines": baselines(counts, tokenizer, texts.heldout),
        "recipe": asdict(recipe),
        "context": CONTEXT,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": saved.config.max_position_embeddings,
        "num_parameters": saved.num_parameters(),
        "train_tokens": tokens.numel(),
        "num_threads": torch.get_num_threads(),
        "corpus": {
            "python": platform.python_version(),
            "sha256": texts.sha256,
            "train_files": len(texts.train),
            "train_bytes": sum(len(text.encode()) for text in texts.train),
            "heldout_files": texts.heldout_files,
            "heldout_bytes": len(texts.heldout.encode()),
            "heldout_sha256": hashlib.sha256(texts.heldout.encode()).hexdigest(),
        },
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (options.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (options.output / "README.md").write_text(model_card(record), encoding="utf-8")
    print(f"held-out perplexity {heldout.perplexity:.2f}, {heldout.bits_per_byte:.3f} bits per byte")


if __name__ == "__main__":
    command_line.run(main)
