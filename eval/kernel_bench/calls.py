"""What ``eval.bench_kernels`` times: the inputs of a row and a call per column, ours and the peers'."""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property, lru_cache
from importlib.util import find_spec
from typing import Any

import hf_paged_kernels as hpk
import torch
from hf_paged_kernels.backend import uses_gluon
from torch.nn.attention import SDPBackend, sdpa_kernel

from .rows import (
    CUDNN,
    DENSE,
    FA2,
    FA3,
    FA4,
    FLASHINFER,
    FLEX,
    INDEX_PUT,
    NOT_SHARED,
    OURS,
    PLAN_INSIDE,
    PORTABLE,
    SDPA_FLASH,
    Row,
)

Call = Callable[[], object]
Columns = dict[str, Callable[[], list[Call]]]
"""For each column what makes its calls, one per set of buffers."""

DEVICE = "cuda"
ROTATED_BYTES = 256 * 2**20
"""Keys and values of all sets of buffers: several times the L2 of any card."""
MAX_SETS = 64
PAGE_DTYPES = {"bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
MODULES = {
    FA2: ("flash_attn",),
    FA3: ("flash_attn_interface", "flash_attn_3.flash_attn_interface"),
    FA4: ("flash_attn.cute",),
    FLASHINFER: ("flashinfer",),
    FLEX: ("torch.nn.attention.flex_attention",),
}
"""The modules that a peer may be imported as."""
COMPILED_PEERS = {
    FLEX: ("prefill",),
    FA4: ("prefill", "backward"),
    FLASHINFER: ("paged", "decode", "verify"),
}
"""Peers that compile when they are first called, and the tables that they are in."""
FLEX_LENGTHS = (4096, 16384, 32768)
"""Of D 128, causal: FlexAttention compiles for every shape."""


def _is_importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def find_peers(quick: bool) -> tuple[set[str], dict[str, str]]:
    """Peers that can be imported, and why each other one is left out."""
    skipped = {name: "not installed" for name, modules in MODULES.items() if not any(map(_is_importable, modules))}
    if quick and FLEX not in skipped:
        skipped[FLEX] = "compiles too long for a quick run"
    return set(MODULES) - set(skipped), skipped


@lru_cache
def _import(name: str) -> Any:
    """A peer's module."""
    return importlib.import_module(next(module for module in MODULES[name] if _is_importable(module)))


def our_columns(variant: str) -> tuple[str, ...]:
    """The columns of forward attention: what a call chooses, and portable Triton where that is something else."""
    if variant == "triton":
        return (PORTABLE,)
    probe = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16, device=DEVICE)
    return (OURS, PORTABLE) if uses_gluon(probe, probe, probe, 1.0) else (OURS,)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)


def _int32(numbers: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(numbers), dtype=torch.int32, device=DEVICE)


def _sdpa(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """``q [B, Hq, Lq, D]``, ``k`` and ``v [B, Hk, Lk, D]``."""
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )


SDPA = {SDPA_FLASH: SDPBackend.FLASH_ATTENTION, CUDNN: SDPBackend.CUDNN_ATTENTION}


def _portable_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Call:
    """The Triton kernel on dense tensors, whatever the device would choose."""
    from hf_paged_kernels.attention.flash_forward_triton import flash_attention_launch

    scale, right = q.shape[-1] ** -0.5, 0 if causal else None
    return lambda: flash_attention_launch(q, k, v, None, None, q.shape[1], None, right, None, None, scale)


class DenseInputs:
    """q, k, v ``[B, L, H, D]`` of a dense row."""

    def __init__(self, row: Row) -> None:
        self.row = row
        batch, length = len(row.seq_lens), row.seq_lens[0]
        self.q = _random(batch, length, row.q_heads, row.head_dim)
        self.k, self.v = (_random(batch, length, row.kv_heads, row.head_dim) for _ in range(2))

    @property
    def qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v."""
        return self.q, self.k, self.v

    def flex(self) -> list[Call]:
        """FlexAttention, compiled for this shape."""
        module, length = _import(FLEX), self.row.seq_lens[0]
        mask = module.create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=DEVICE)
        run = torch.compile(module.flex_attention, dynamic=False)
        q, k, v = (x.transpose(1, 2) for x in self.qkv)
        return [lambda: run(q, k, v, block_mask=mask, enable_gqa=self.row.group > 1)]


def has_flex(row: Row) -> bool:
    """Whether a dense row has a column for FlexAttention."""
    return row.causal and row.head_dim == 128 and row.seq_lens[0] in FLEX_LENGTHS


def _prefill(row: Row, ours: tuple[str, ...]) -> Columns:
    x = DenseInputs(row)
    q, k, v = x.qkv
    heads_first = [y.transpose(1, 2) for y in x.qkv]
    columns: Columns = {}
    if OURS in ours:
        columns[OURS] = lambda: [lambda: hpk.flash_attention(q, k, v, causal=row.causal)]
    if PORTABLE in ours:
        columns[PORTABLE] = lambda: [_portable_flash(q, k, v, row.causal)]
    for name, backend in SDPA.items():
        columns[name] = lambda backend=backend: [lambda: _sdpa(backend, *heads_first, row.causal)]
    for name in (FA2, FA3, FA4):
        columns[name] = lambda name=name: [_flash_attn(name, q, k, v, row.causal)]
    if has_flex(row):
        columns[FLEX] = x.flex
    return columns


def _flash_attn(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Call:
    function = _import(name).flash_attn_func
    return lambda: function(q, k, v, causal=causal)


def _backward(row: Row, ours: tuple[str, ...]) -> Columns:
    x = DenseInputs(row)
    leaves = [y.requires_grad_() for y in x.qkv]
    q, k, v = leaves
    upstream = torch.randn_like(q)

    def backward_of(forward: Callable[[], Any]) -> list[Call]:
        with torch.enable_grad():
            out = forward()
        out = out[0] if isinstance(out, tuple) else out
        return [lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)]

    def sdpa(backend: SDPBackend) -> torch.Tensor:
        return _sdpa(backend, *(y.transpose(1, 2) for y in leaves), row.causal).transpose(1, 2)

    columns: Columns = {OURS: lambda: backward_of(lambda: hpk.flash_attention(q, k, v, causal=True))}
    for name, backend in SDPA.items():
        columns[name] = lambda backend=backend: backward_of(lambda: sdpa(backend))
    for name in (FA2, FA3, FA4):
        columns[name] = lambda name=name: backward_of(_flash_attn(name, q, k, v, True))
    return columns


class PagedInputs:
    """Queries, pages and page tables of a row: ``num_sets`` sets of pages in one pool, shuffled.

    Attributes:
        k_pages: ``[num_pages, Hk, page_size, D]``; a page's keys lie before its values, as in a PagedCache.
        v_pages: the same of values.
        k_scale: ``[num_pages, Hk, page_size]``, None for BF16 pages.
        v_scale: the same of values.
        tables: int32 ``[num_seqs, max_pages_per_seq]`` of each set.
    """

    def __init__(self, row: Row, num_sets: int) -> None:
        assert row.page_size is not None
        self.row, size = row, row.page_size
        counts = [-(-length // size) for length in row.seq_lens]
        shared = row.prefix // size
        pages_per_set = sum(counts) - shared * (len(counts) - 1)
        num_pages = num_sets * pages_per_set
        shape = (num_pages, 2, row.kv_heads, size, row.head_dim)
        dtype = PAGE_DTYPES[row.kv_dtype]
        if row.kv_dtype == "int8":
            pool = torch.randint(-127, 128, shape, dtype=dtype, device=DEVICE)
        else:
            pool = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE).to(dtype)
        self.k_pages, self.v_pages = pool[:, 0], pool[:, 1]
        self.k_scale: torch.Tensor | None = None
        self.v_scale: torch.Tensor | None = None
        if row.kv_dtype != "bfloat16":
            self.k_scale, self.v_scale = torch.rand(2, *shape[:1], *shape[2:4], device=DEVICE) / 64 + 1e-3
        order = torch.randperm(num_pages, device=DEVICE).int()
        self.tables = [self._table(order[i * pages_per_set :], counts, shared) for i in range(num_sets)]
        self.seq_lens = _int32(row.seq_lens)
        self.cu_seqlens_q = _int32([0, *torch.tensor(row.query_lens).cumsum(0).tolist()])
        # [T, Hq, D]
        self.q = _random(sum(row.query_lens), row.q_heads, row.head_dim)
        self.max_query_len = max(row.query_lens)

    @staticmethod
    def _table(order: torch.Tensor, counts: list[int], shared: int) -> torch.Tensor:
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32, device=DEVICE)
        table[:, :shared] = order[:shared]
        at = shared
        for i, count in enumerate(counts):
            table[i, shared:count] = order[at : at + count - shared]
            at += count - shared
        return table

    @cached_property
    def dense(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Contiguous keys and values ``[B, Hk, L, D]`` of each set; all sequences have one length."""
        row = self.row
        shape = (len(row.seq_lens), row.kv_heads, row.seq_lens[0], row.head_dim)
        return [(_random(*shape), _random(*shape)) for _ in self.tables]

    def ours(self, plan: torch.Tensor | None) -> list[Call]:
        """What a call of the public function takes."""
        return [lambda table=table: self.attend(table, plan) for table in self.tables]

    def attend(self, table: torch.Tensor, plan: torch.Tensor | None) -> object:
        """One call of the public function."""
        return hpk.paged_attention(
            self.q, self.k_pages, self.v_pages, table, self.seq_lens, self.cu_seqlens_q,
            max_query_len=self.max_query_len, k_scale=self.k_scale, v_scale=self.v_scale, plan=plan,
        )  # fmt: skip

    def plan(self) -> torch.Tensor:
        """The split plan of a step, good for every set."""
        assert self.row.page_size is not None
        return hpk.make_split_plan(self.seq_lens, self.cu_seqlens_q, self.tables[0], self.row.page_size)

    def portable(self) -> list[Call]:
        """The Triton kernel, whatever the device would choose."""
        from hf_paged_kernels.attention.paged_quantized_triton import quantized_paged_attention_launch
        from hf_paged_kernels.attention.paged_triton import paged_attention_launch

        launch: Callable[..., object] = (
            paged_attention_launch if self.k_scale is None else quantized_paged_attention_launch
        )

        def attend(table: torch.Tensor) -> object:
            return launch(
                self.q, self.k_pages, self.v_pages, table, self.seq_lens, self.cu_seqlens_q, self.max_query_len,
                None, 0, None, None, self.row.head_dim**-0.5, self.k_scale, self.v_scale,
            )  # fmt: skip

        return [lambda table=table: attend(table) for table in self.tables]

    def sdpa(self, backend: SDPBackend, causal: bool) -> list[Call]:
        """SDPA over contiguous keys and values."""
        # [B, Hq, L, D]
        q = self.q.view(len(self.row.seq_lens), -1, *self.q.shape[1:]).transpose(1, 2)
        return [lambda k=k, v=v: _sdpa(backend, q, k, v, causal) for k, v in self.dense]

    def flash_attn(self, name: str) -> list[Call]:
        """FlashAttention over pages ``[num_pages, page_size, Hk, D]``."""
        q = self.q.view(len(self.row.seq_lens), -1, *self.q.shape[1:])
        k, v = self.k_pages.transpose(1, 2), self.v_pages.transpose(1, 2)
        function, argument = _import(name).flash_attn_with_kvcache, "page_table" if name == FA3 else "block_table"
        return [
            lambda table=table: function(q, k, v, cache_seqlens=self.seq_lens, causal=True, **{argument: table})
            for table in self.tables
        ]

    def flashinfer(self) -> list[Call]:
        """FlashInfer, planned on the host before the graph."""
        module, row = _import(FLASHINFER), self.row
        size, calls = row.page_size, []
        assert size is not None
        counts = [-(-length // size) for length in row.seq_lens]
        indptr = _int32([0, *torch.tensor(counts).cumsum(0).tolist()])
        last = _int32((length - 1) % size + 1 for length in row.seq_lens)
        for table in self.tables:
            workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=DEVICE)
            pages = torch.cat([table[i, :count] for i, count in enumerate(counts)])
            heads = (row.q_heads, row.kv_heads, row.head_dim, size)
            dtypes = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
            if self.max_query_len == 1:
                wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
                wrapper.plan(indptr, pages, last, *heads, **dtypes)
            else:
                wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
                wrapper.plan(self.cu_seqlens_q, indptr, pages, last, *heads, causal=True, **dtypes)
            calls.append(lambda wrapper=wrapper: wrapper.run(self.q, (self.k_pages, self.v_pages)))
        return calls


def _paged(row: Row, ours: tuple[str, ...]) -> Columns:
    x = PagedInputs(row, 1)
    columns: Columns = {}
    if OURS in ours:
        columns[OURS] = lambda: x.ours(None)
    if PORTABLE in ours:
        columns[PORTABLE] = x.portable

    def dense() -> list[Call]:
        # [1, L, H, D]; the last queries are aligned with the last keys.
        q, (k, v) = x.q[None], (y.transpose(1, 2).contiguous() for y in x.dense[0])
        if OURS in ours:
            return [lambda: hpk.flash_attention(q, k, v, causal=True)]
        return [_portable_flash(q, k, v, True)]

    columns[DENSE] = dense
    if row.query_lens == row.seq_lens:
        for name, backend in SDPA.items():
            columns[name] = lambda backend=backend: x.sdpa(backend, True)
    if row.page_size == 256:
        columns[FA2] = lambda: x.flash_attn(FA2)
    columns[FA3] = lambda: x.flash_attn(FA3)
    columns[FLASHINFER] = x.flashinfer
    return columns


def _split(row: Row, ours: tuple[str, ...], num_sets: int | None = None) -> Columns:
    """Decode and verification."""
    x = PagedInputs(row, num_sets or min(MAX_SETS, max(1, -(-ROTATED_BYTES // row.bytes))))
    columns: Columns = {}
    if OURS in ours:
        columns[OURS] = lambda: x.ours(x.plan())
        columns[PLAN_INSIDE] = lambda: x.ours(None)
    if PORTABLE in ours:
        columns[PORTABLE] = x.portable
    if row.kv_dtype != "bfloat16":
        return columns
    if len(set(row.seq_lens)) == 1:
        for name, backend in SDPA.items():
            columns[name] = lambda backend=backend: x.sdpa(backend, False)
    columns[FA3] = lambda: x.flash_attn(FA3)
    columns[FLASHINFER] = x.flashinfer
    return columns


def _shared_prefix(row: Row, ours: tuple[str, ...]) -> Columns:
    x = PagedInputs(row, 1)
    table, size = x.tables[0], row.page_size
    assert size is not None

    def shared() -> list[Call]:
        prefix = hpk.make_shared_prefix(
            table, x.seq_lens, x.cu_seqlens_q, [(0, len(row.seq_lens), row.prefix // size)], size,
            num_q_heads=row.q_heads, num_kv_heads=row.kv_heads, max_query_len=1,
        )  # fmt: skip
        return [
            lambda: hpk.shared_prefix_attention(
                x.q, x.k_pages, x.v_pages, table, x.seq_lens, x.cu_seqlens_q, prefix=prefix, max_query_len=1
            )
        ]

    return {OURS: shared, NOT_SHARED: lambda: x.ours(x.plan())}


def _write_pages(row: Row, ours: tuple[str, ...]) -> Columns:
    assert row.page_size is not None
    tokens, size = sum(row.query_lens), row.page_size
    x = PagedInputs(replace(row, query_lens=(1,), seq_lens=(max(tokens, 4096),)), 1)
    new = [tuple(_random(tokens, row.kv_heads, row.head_dim) for _ in range(2)) for _ in range(4)]
    slots = torch.randperm(x.k_pages.shape[0] * size, device=DEVICE)[:tokens]
    page, slot = slots // size, slots % size

    def index_put(k: torch.Tensor, v: torch.Tensor) -> None:
        x.k_pages[page, :, slot] = k
        x.v_pages[page, :, slot] = v

    columns: Columns = {
        OURS: lambda: [
            lambda k=k, v=v: hpk.write_pages(
                k, v, x.k_pages, x.v_pages, slots, k_scale=x.k_scale, v_scale=x.v_scale
            )
            for k, v in new
        ]
    }  # fmt: skip
    if row.kv_dtype == "bfloat16":
        columns[INDEX_PUT] = lambda: [lambda k=k, v=v: index_put(k, v) for k, v in new]
    return columns


MAKERS: dict[str, Callable[..., Columns]] = {
    "prefill": _prefill, "paged": _paged, "decode": _split, "verify": _split, "write_pages": _write_pages,
    "backward": _backward, "shared_prefix": _shared_prefix,
}  # fmt: skip


def columns_of(row: Row, peers: set[str], ours: tuple[str, ...], **options: Any) -> Columns:
    """The columns of a row with the peers that are there; allocates the row's inputs."""
    columns = MAKERS[row.table](row, ours, **options)
    return {name: make for name, make in columns.items() if name not in MODULES or name in peers}
