"""A GGUF file as an ordinary model folder: config, tokenizer and bfloat16 weights in safetensors.

Two architectures, "llama" and "gemma3", with the tokenizers that their files hold. transformers reads such files as
well; this reads the header in a second, where the `GGUFReader` of the package `gguf` takes minutes for a large
vocabulary, and gives the same folder with every version of transformers. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

STRING, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of a header's values, as `struct` names them."""
CONTROL, USER_DEFINED = 3, 4
"""Types of tokens that no merge makes."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the file: `shape` as torch has it, outermost first; `kind` is the number of its quantisation."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the weights.

    Attributes:
        metadata: by key, as "llama.block_count".
        tensors: in the order of the file.
        data_offset: bytes before the first weight.
    """

    metadata: dict[str, Any]
    tensors: tuple[Tensor, ...]
    data_offset: int


def read_header(path: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        ValueError: the file is no GGUF file of version 2 or 3.
    """
    with path.open("rb") as file:
        magic, version, num_tensors, num_keys = struct.unpack("<4sIQQ", file.read(24).ljust(24, b"\0"))
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(
                f"{str(path)!r} begins with {magic!r}, version {version}; pass a GGUF file, version 2 or 3"
            )
        metadata = {}
        for _ in range(num_keys):
            key = _string(file)
            metadata[key] = _value(file, _numbers(file, "I")[0])
        tensors = []
        for _ in range(num_tensors):
            name = _string(file)
            dims = _numbers(file, f"{_numbers(file, 'I')[0]}Q")
            kind, offset = struct.unpack("<IQ", file.read(12))
            tensors.append(Tensor(name, tuple(reversed(dims)), kind, offset))
        alignment = metadata.get("general.alignment", 32)
        return Header(metadata, tuple(tensors), -(-file.tell() // alignment) * alignment)


def _numbers(file: BinaryIO, kinds: str) -> tuple[Any, ...]:
    return struct.unpack("<" + kinds, file.read(struct.calcsize("<" + kinds)))


def _string(file: BinaryIO) -> str:
    return file.read(_numbers(file, "Q")[0]).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        return _numbers(file, NUMBERS[kind])[0]
    item_kind, count = struct.unpack("<IQ", file.read(12))
    if item_kind == STRING:
        return [_string(file) for _ in range(count)]
    return list(_numbers(file, f"{count}{NUMBERS[item_kind]}"))


def convert(path: Path, folder: Path, *, source: str = "") -> None:
    """Write the model of a GGUF file as a folder for `from_pretrained`: dequantised, rounded to bfloat16.

    Args:
        path: the file.
        folder: where to; made if need be.
        source: kept in the config as `hf_paged_source`: where the weights come from.

    Raises:
        ImportError: the package `gguf` is not installed.
        ValueError: no GGUF file, or an architecture or a tokenizer that this does not read.
    """
    header = read_header(path)
    architecture = header.metadata.get("general.architecture")
    if architecture not in CONFIGS:
        raise ValueError(
            f"{str(path)!r} has the architecture {architecture!r}; pass one of {tuple(CONFIGS)}, or load the file with "
            "transformers (gguf_file=) and save_pretrained()"
        )
    config = CONFIGS[architecture](header.metadata)
    tokenizer = TOKENIZERS[architecture](header.metadata)
    if config.vocab_size != len(header.metadata["tokenizer.ggml.tokens"]):
        raise ValueError(f"{str(path)!r} has {config.vocab_size} embeddings and another number of tokens")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in _weights(path, header, config, architecture)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    config.dtype = torch.bfloat16
    config.hf_paged_source = source
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)


def _llama_config(metadata: dict[str, Any]) -> PreTrainedConfig:
    heads = metadata["llama.attention.head_count"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        head_dim=metadata["llama.rope.dimension_count"],
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=round(metadata["llama.attention.layer_norm_rms_epsilon"], 10),
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        **_special_ids(metadata),
    )


def _gemma3_config(metadata: dict[str, Any]) -> PreTrainedConfig:
    head_dim = metadata["gemma3.attention.key_length"]
    num_layers = metadata["gemma3.block_count"]
    kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(num_layers)]
    return Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=metadata["gemma3.embedding_length"],
        intermediate_size=metadata["gemma3.feed_forward_length"],
        num_hidden_layers=num_layers,
        layer_types=kinds,
        num_attention_heads=metadata["gemma3.attention.head_count"],
        num_key_value_heads=metadata["gemma3.attention.head_count_kv"],
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        max_position_embeddings=metadata["gemma3.context_length"],
        rms_norm_eps=round(metadata["gemma3.attention.layer_norm_rms_epsilon"], 10),
        sliding_window=metadata["gemma3.attention.sliding_window"],
        # The file names one base; that of the sliding layers is the architecture's.
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": metadata["gemma3.rope.freq_base"]},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        tie_word_embeddings=True,
        **_special_ids(metadata),
    )


CONFIGS = {"llama": _llama_config, "gemma3": _gemma3_config}


def _special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: metadata[f"tokenizer.ggml.{key}_token_id"] for name, key in names.items()}


PARTS = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""Modules by their names in a file; `ffn_norm` depends on the architecture."""
FFN_NORM = {"llama": "post_attention_layernorm", "gemma3": "pre_feedforward_layernorm"}


def _weights(
    path: Path, header: Header, config: PreTrainedConfig, architecture: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 weight) of each tensor."""
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape
    except ImportError as error:
        raise ImportError('converting a GGUF file needs the package gguf: pip install "hf-paged[real]"') from error
    parts = {**PARTS, "ffn_norm": FFN_NORM[architecture]}
    with _mapped(path) as data:
        for tensor in header.tensors:
            found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
            if found is None or found[2] not in parts:
                raise ValueError(
                    f"{str(path)!r} holds {tensor.name!r}, which no module of {architecture!r} is known for"
                )
            kind = GGMLQuantizationType(tensor.kind)
            if kind.name == "F32":
                count = int(np.prod(tensor.shape))
                array = np.frombuffer(data, np.float32, count, header.data_offset + tensor.offset).reshape(tensor.shape)
            else:
                shape = quant_shape_to_byte_shape(tensor.shape, kind)
                count = int(np.prod(shape))
                raw = np.frombuffer(data, np.uint8, count, header.data_offset + tensor.offset).reshape(shape)
                array = dequantize(raw, kind)
            weight = torch.tensor(array)
            if architecture == "llama" and found[2] in ("attn_q", "attn_k"):
                weight = _halves_of_rotary(weight, config.head_dim)
            if architecture == "gemma3" and weight.ndim == 1:
                weight = weight - 1  # the file holds 1 + weight
            layer = "" if found[1] is None else f"layers.{found[1]}."
            yield f"model.{layer}{parts[found[2]]}.weight", weight


@contextmanager
def _mapped(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        # Not closed by hand: arrays that look into the mapping keep it.
        yield mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # type: ignore[misc]


def _halves_of_rotary(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[heads * head_dim, hidden]: llama.cpp turns neighbouring rows, transformers a row of each half of a head."""
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()


def _byte_level_tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    _check_tokenizer(metadata, "gpt2")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return _tokenizer(backend, metadata)


def _sentencepiece_tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """BPE whose merges are those that the vocabulary implies, in the order of its tokens."""
    _check_tokenizer(metadata, "llama")
    # Runs of spaces stand in the file as they are, and in a merge as the sign for a space.
    tokens = ["▁" * len(t) if t and not t.strip(" ") else t for t in metadata["tokenizer.ggml.tokens"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in halves if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    unknown = tokens[metadata["tokenizer.ggml.unknown_token_id"]]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _tokenizer(backend, metadata)


TOKENIZERS = {"llama": _byte_level_tokenizer, "gemma3": _sentencepiece_tokenizer}


def _check_tokenizer(metadata: dict[str, Any], kind: str) -> None:
    found = metadata.get("tokenizer.ggml.model")
    if found != kind:
        raise ValueError(f"the tokenizer is of the kind {found!r}; of this architecture {kind!r} is read")


def _tokenizer(backend: Tokenizer, metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    known = backend.get_vocab()  # runs of spaces are spelled otherwise there: no token may be added twice
    found = [(token, kind) for token, kind in zip(tokens, kinds) if token in known]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in found if k == CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in found if k == USER_DEFINED])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]] for name, key in names.items()}
    if metadata.get("tokenizer.ggml.add_bos_token"):
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    length = metadata[f"{metadata['general.architecture']}.context_length"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=length, padding_side="left", **special
    )
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer
