"""The public functions: documented contracts and checks around the custom ops."""

from collections.abc import Sequence

import torch

from . import checks
from .attention import ops, shared_prefix
from .attention.shared_prefix import SharedPrefix
from .backend import MAX_GRID
from .checks import check_tensor, require
from .settings import split_plan_size


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention without an attention matrix, dense or of packed sequences; differentiable.

    The forward and the backward pass are deterministic: the same inputs give the same bits every time.

    The last query is aligned with the last key. With 2 queries, 4 keys and ``causal=True`` query row sees key column::

        1 1 1 0
        1 1 1 1

    Args:
        q: queries ``[B, Lq, Hq, D]``, or packed ``[Tq, Hq, D]`` with ``cu_seqlens_q``. float16, bfloat16 or float32.
        k: keys ``[B, Lk, Hk, D]`` or ``[Tk, Hk, D]``; Hq is a multiple of Hk (grouped-query attention).
        v: values ``[B, Lk, Hk, Dv]`` or ``[Tk, Hk, Dv]``; Dv may differ from D. Head dims 1 to 512.
        cu_seqlens_q: int32 ``[num_seqs + 1]``, prefix sums of the query lengths.
        cu_seqlens_k: the same of the key lengths; default ``cu_seqlens_q``.
        max_seqlen_q: an upper bound of the query lengths; default the number of packed tokens. Dense: not needed.
        max_seqlen_k: accepted for symmetry; the kernels need no bound of the key lengths.
        causal: hide the keys to the right of each query.
        window: tokens that a query sees to each side, itself counted (``window=1``: itself only), or a pair
            ``(left, right)`` of neighbours, itself not counted, None for no bound.
        softcap: ``softcap * tanh(scores / softcap)`` before the mask (Gemma 2).
        sinks: ``[Hq]``, one learned logit per head that takes part in the softmax without a value (gpt-oss).
        scale: factor on ``q @ k``; default ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the scaled scores, sinks included; it is differentiable too.

    Returns:
        Attention ``[B, Lq, Hq, Dv]`` or ``[Tq, Hq, Dv]`` in q's dtype. With ``return_lse`` also float32 ``[B, Hq, Lq]``
        or ``[Hq, Tq]``, natural logarithm. A query without keys gives zeros, and its sink as lse; -inf without a sink,
        and with a sink of -inf. A NaN that a query sees gives NaN, as in plain PyTorch.

    Raises:
        ValueError: shapes, devices, lengths or options that do not fit; TypeError: dtypes that are not supported;
            NotImplementedError: tensors with forward-mode derivatives.

    Source: Dao, "FlashAttention-2" (2023), algorithms 1 and 2.
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k, sinks)
    longest, window_left, window_right, softcap, scale = checks.once(
        _check_flash, tensors, max_seqlen_q, max_seqlen_k, causal, window, softcap, scale
    )
    checks.refuse_tangents(q=q, k=k, v=v, sinks=sinks)
    if cu_seqlens_q is not None and cu_seqlens_k is not None and checks.may_read_values(q, cu_seqlens_q, cu_seqlens_k):
        checks.check_cu_seqlens_values("cu_seqlens_q", cu_seqlens_q, q.shape[0], longest)
        checks.check_cu_seqlens_values("cu_seqlens_k", cu_seqlens_k, k.shape[0], None)
    out, lse = ops.flash_attention_op(
        _unit_stride(q), _unit_stride(k), _unit_stride(v), cu_seqlens_q, cu_seqlens_k, longest, window_left,
        window_right, softcap, sinks, scale,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check_flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    sinks: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    window: int | tuple[int | None, int | None] | None,
    softcap: float | None,
    scale: float | None,
) -> tuple[int, int | None, int | None, float | None, float]:
    """``(longest query, window to the left, to the right, softcap, scale)`` of arguments that fit."""
    varlen = cu_seqlens_q is not None
    dims = ("[Tq, Hq, D]", "[Tk, Hk, D]") if varlen else ("[B, Lq, Hq, D]", "[B, Lk, Hk, D]")
    check_tensor("q", q, dims[0])
    check_tensor("k", k, dims[1])
    check_tensor("v", v, dims[1])
    checks.check_heads(q, k, v, k.shape[-2], v.shape[-2])
    require(k.shape[:-1] == v.shape[:-1], f"k and v must hold the same tokens, got {list(k.shape)}, {list(v.shape)}.")
    checks.check_sinks(sinks, q.shape[-2])
    window_left, window_right = checks.resolve_window(window, causal)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        checks.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q)
        checks.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k)
        require(
            cu_seqlens_q.shape == cu_seqlens_k.shape,
            f"cu_seqlens_q and cu_seqlens_k must have the same length, got {list(cu_seqlens_q.shape)} and "
            f"{list(cu_seqlens_k.shape)}.",
        )
    else:
        require(cu_seqlens_k is None, "cu_seqlens_k needs cu_seqlens_q: packed queries [Tq, Hq, D].")
        require(q.shape[0] == k.shape[0], f"q and k must have the same batch size, got {q.shape[0]}, {k.shape[0]}.")
    checks.check_same_device(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, sinks=sinks)
    longest = q.shape[0 if varlen else 1]
    if max_seqlen_q is not None:
        max_seqlen_q = checks.count("max_seqlen_q", max_seqlen_q, 0)
        longest = max_seqlen_q if varlen else longest
    if max_seqlen_k is not None:
        checks.count("max_seqlen_k", max_seqlen_k, 0)
    return (
        longest, window_left, window_right, checks.check_softcap(softcap), checks.resolve_scale(scale, q.shape[-1])
    )  # fmt: skip


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    max_query_len: int,
    causal: bool = True,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    plan: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of new tokens to all tokens of their sequence, read in place from pages: prefill, decode and mixed.

    The new tokens' keys and values must be in the pages already (:func:`write_pages`); they are the last of their
    sequence::

        tokens in the cache   0 ............ seq_len - query_len ....... seq_len
                              |    context   |    this step's query      |

    Args:
        q: packed queries ``[T, Hq, D]``. float16, bfloat16 or float32.
        k_pages: keys ``[num_pages, Hk, page_size, D]`` by any strides with a contiguous last dimension, so memory
            ``[page, slot, head, dim]`` is passed as a transposed view. Page size 8 to 256, a power of two. In q's
            dtype, or float8_e4m3fn or int8 with scales.
        v_pages: values ``[num_pages, Hk, page_size, Dv]``.
        page_table: int32 ``[num_seqs, max_pages_per_seq]``, logical page -> physical page. Entries past a sequence's
            end, or wholly left of its window, are not read. Any strides; columns that are apart cost a copy.
        seq_lens: int32 ``[num_seqs]``, tokens of each sequence in the cache, the new ones counted.
        cu_seqlens_q: int32 ``[num_seqs + 1]``, prefix sums of the query lengths; a sequence may have none.
        max_query_len: an upper bound of the query lengths; it chooses the kernel, never the result's meaning.
        causal: hide the keys to the right of each query.
        window: as in :func:`flash_attention`.
        softcap: as in :func:`flash_attention`.
        sinks: as in :func:`flash_attention`.
        scale: as in :func:`flash_attention`.
        k_scale: float32 ``[num_pages, Hk, page_size]`` for quantised pages; a key is ``page * scale``, multiplied
            inside the kernel. INT8 pages hold keys rotated, as :func:`write_pages` writes them; queries are rotated
            alike inside the kernel, in float32, and rounded once.
        v_scale: the same for values.
        plan: from :func:`make_split_plan`, made once for all layers of a step; None: made in the call where needed.
        return_lse: also return the log-sum-exp of the scaled scores, sinks included.

    Returns:
        Attention ``[T, Hq, Dv]`` in q's dtype, with ``return_lse`` also float32 ``[Hq, T]``.

    Raises:
        ValueError: shapes, devices, options, lengths or pages that do not fit; TypeError: dtypes that are not
            supported. Lengths and pages are checked where they are in host memory. On an accelerator a look at them
            would wait for all that runs: there they are checked with ``HF_PAGED_CHECK_VALUES=1`` in the environment,
            except during graph capture, and a page outside of the pool is read wherever it would be.

    Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023).
    """
    tensors = (q, k_pages, v_pages, page_table, seq_lens, cu_seqlens_q, sinks, k_scale, v_scale, plan)
    max_query_len, window_left, window_right, softcap, scale = checks.once(
        _check_paged_call, tensors, max_query_len, causal, window, softcap, scale
    )
    checks.refuse_tangents(q=q, k_pages=k_pages, v_pages=v_pages, sinks=sinks)
    if checks.may_read_values(q, page_table, seq_lens, cu_seqlens_q):
        checks.check_cu_seqlens_values("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_query_len)
        checks.check_page_table_values(
            page_table, seq_lens, cu_seqlens_q, k_pages.shape[0], k_pages.shape[2], window_left
        )
    out, lse = ops.paged_attention_op(
        _unit_stride(q), k_pages, v_pages, page_table, seq_lens, cu_seqlens_q, max_query_len,
        window_left, window_right, softcap, sinks, scale, k_scale, v_scale, plan,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check_paged_call(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    plan: torch.Tensor | None,
    max_query_len: int,
    causal: bool,
    window: int | tuple[int | None, int | None] | None,
    softcap: float | None,
    scale: float | None,
) -> tuple[int, int | None, int | None, float | None, float]:
    """``(longest query, window to the left, to the right, softcap, scale)`` of arguments that fit."""
    _check_paged(
        q, k_pages, v_pages, page_table, seq_lens, cu_seqlens_q, sinks, k_scale, v_scale
    )  # fmt: skip
    max_query_len = checks.count("max_query_len", max_query_len)
    size = split_plan_size(page_table.shape[0], page_table.shape[1] * k_pages.shape[2])
    require(
        plan is None or (plan.dtype == torch.int32 and plan.shape == (size,) and plan.device == q.device),
        f"plan must be what make_split_plan() gave for this page table, int32 {[size]}, "
        f"got {None if plan is None else (plan.dtype, list(plan.shape), plan.device)}.",
    )
    window_left, window_right = checks.resolve_window(window, causal)
    return (
        max_query_len, window_left, window_right, checks.check_softcap(softcap),
        checks.resolve_scale(scale, q.shape[-1]),
    )  # fmt: skip


def make_split_plan(
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    *,
    causal: bool = True,
    window: int | tuple[int | None, int | None] | None = None,
) -> torch.Tensor:
    """The work list of a decode step, made on the device: pass it to :func:`paged_attention` of every layer.

    A sequence is cut into splits of a length that depends on the sequence alone, so a row's result never depends on
    what else is in the batch. The list is as long as the page table allows, so it can be made inside a captured graph.
    On a GPU without the Gluon kernels it is read for quantised pages only.

    Args:
        seq_lens: int32 ``[num_seqs]``, as in :func:`paged_attention`.
        cu_seqlens_q: int32 ``[num_seqs + 1]``.
        page_table: int32 ``[num_seqs, max_pages_per_seq]``; its width bounds the lengths.
        page_size: tokens of a page.
        causal: as in :func:`paged_attention`.
        window: of the layers that will use the plan. A plan without a window serves every layer, only slower.

    Returns:
        int32, to be passed on as it is. Kernels count in it what they have begun: calls that share a plan must run one
        after the other, as those on one stream do.

    Raises:
        ValueError, TypeError: tensors of other shapes or dtypes.
    """
    max_tokens, window_left = checks.once(
        _check_split_plan, (seq_lens, cu_seqlens_q, page_table), page_size, causal, window
    )
    return ops.split_plan_op(seq_lens, cu_seqlens_q, max_tokens, window_left)


def _check_split_plan(
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    causal: bool,
    window: int | tuple[int | None, int | None] | None,
) -> tuple[int, int | None]:
    """``(tokens that a row of the table has room for, window to the left)`` of arguments that fit."""
    _check_same_sequences(page_table, seq_lens, cu_seqlens_q)
    checks.check_same_device(seq_lens=seq_lens, cu_seqlens_q=cu_seqlens_q, page_table=page_table)
    page_size = checks.check_page_size(page_size)
    window_left, _ = checks.resolve_window(window, causal)
    return page_table.shape[1] * page_size, window_left


def make_shared_prefix(
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    groups: Sequence[tuple[int, int, int]],
    page_size: int,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    max_query_len: int,
    max_runs: int | None = None,
    max_prefix_pages: int | None = None,
    max_suffix_pages: int | None = None,
) -> SharedPrefix:
    """The step plan of :func:`shared_prefix_attention`, made once and passed to every layer.

    ``groups`` are copied from the host: make it outside of a captured graph. Inside, call
    ``prefix.next_step(page_table, seq_lens, cu_seqlens_q)``, which keeps the groups and reads everything else on the
    device: pages and lengths may change from replay to replay. Groups may change too where the three bounds are given:
    make a plan with the same bounds, and copy its ``run_starts`` and ``prefix_pages`` into those of the captured one.

    Args:
        page_table: int32 ``[num_seqs, max_pages_per_seq]``, as in :func:`paged_attention`.
        seq_lens: int32 ``[num_seqs]``, prefix counted.
        cu_seqlens_q: int32 ``[num_seqs + 1]``.
        groups: ``(first_sequence, num_sequences, prefix_pages)`` each: neighbours whose first ``prefix_pages`` pages
            are the same, and full; new tokens are never in them. Disjoint; sequences in no group share nothing.
        page_size: tokens of a page.
        num_q_heads: of the layers; with ``num_kv_heads`` it decides how many sequences read a prefix together.
        num_kv_heads: of the layers.
        max_query_len: an upper bound of the query lengths.
        max_runs: rows of the plan's tables of prefixes; default as many as ``groups`` need.
        max_prefix_pages: their width; default the longest prefix.
        max_suffix_pages: width of the table of what follows the prefixes; default what the shortest prefix leaves of
            ``page_table``.

    Raises:
        ValueError: groups, shapes, lengths or pages that do not fit; TypeError: dtypes that are not supported. Lengths
            and pages are checked as in :func:`paged_attention`.
    """
    _check_same_sequences(page_table, seq_lens, cu_seqlens_q)
    checks.check_same_device(page_table=page_table, seq_lens=seq_lens, cu_seqlens_q=cu_seqlens_q)
    num_seqs, max_pages = page_table.shape
    require(num_seqs > 0 and max_pages > 0, f"page_table must not be empty, got {list(page_table.shape)}.")
    page_size = checks.check_page_size(page_size)
    num_q_heads = checks.count("num_q_heads", num_q_heads)
    num_kv_heads = checks.count("num_kv_heads", num_kv_heads)
    max_query_len = checks.count("max_query_len", max_query_len)
    require(
        num_q_heads % num_kv_heads == 0,
        f"num_q_heads must be a multiple of num_kv_heads, got {num_q_heads} and {num_kv_heads}.",
    )
    max_runs, max_prefix_pages, max_suffix_pages = (
        None if bound is None else checks.count(name, bound)
        for name, bound in (
            ("max_runs", max_runs),
            ("max_prefix_pages", max_prefix_pages),
            ("max_suffix_pages", max_suffix_pages),
        )
    )
    groups = checks.check_groups(groups, num_seqs, max_pages)
    require(
        page_table.device.type != "cuda" or not torch.cuda.is_current_stream_capturing(),
        "make_shared_prefix copies groups from the host, which a graph cannot capture: call it before, and "
        "prefix.next_step() inside.",
    )
    prefix = shared_prefix.plan_groups(
        page_table, seq_lens, cu_seqlens_q, groups, page_size, num_q_heads // num_kv_heads, max_query_len, max_runs,
        max_prefix_pages, max_suffix_pages,
    )  # fmt: skip
    if checks.may_read_values(page_table, seq_lens, cu_seqlens_q):
        checks.check_cu_seqlens_values("cu_seqlens_q", cu_seqlens_q, int(cu_seqlens_q[-1]), max_query_len)
        prefix.check_values(page_table, seq_lens, cu_seqlens_q)
    return prefix


def shared_prefix_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    prefix: SharedPrefix,
    max_query_len: int,
    window: None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal :func:`paged_attention` of a step in which sequences share their first pages, read once for many of them.

    For decode and short queries, where reading keys and values is the cost: n samples of one prompt, a system prompt
    that all requests have. The result is that of :func:`paged_attention` up to rounding, both parts being rounded to
    q's dtype before they are merged; a row's bits depend on its own lengths and prefix only.

    Args:
        q: packed queries ``[T, Hq, D]``.
        k_pages: keys ``[num_pages, Hk, page_size, D]``.
        v_pages: values ``[num_pages, Hk, page_size, Dv]``.
        page_table: int32 ``[num_seqs, max_pages_per_seq]``, the whole of every sequence, prefix and what follows.
        seq_lens: int32 ``[num_seqs]``, prefix counted.
        cu_seqlens_q: int32 ``[num_seqs + 1]``.
        prefix: from :func:`make_shared_prefix` or ``prefix.next_step`` of these very tensors; it holds what the kernels
            read of the page table and lengths, which are themselves only checked.
        max_query_len: an upper bound of the query lengths.
        window: refused unless None.
        softcap: as in :func:`flash_attention`.
        sinks: as in :func:`flash_attention`.
        scale: as in :func:`flash_attention`.
        k_scale: as in :func:`paged_attention`.
        v_scale: as in :func:`paged_attention`.
        return_lse: also return the log-sum-exp of the scaled scores, sinks included.

    Returns:
        As :func:`paged_attention`.

    Raises:
        ValueError, TypeError: as :func:`paged_attention`, and a ``prefix`` of another step where values are checked.
    """
    require(
        window is None,
        f"window must be None, got {window!r}: a sliding window would cut the shared prefix, each sequence elsewhere. "
        f"Call paged_attention() for layers with a window: it reads the window's pages only.",
    )
    if not isinstance(prefix, SharedPrefix):
        raise TypeError(f"prefix must be what make_shared_prefix() gave, got {type(prefix).__name__}.")
    _check_paged(
        q, k_pages, v_pages, page_table, seq_lens, cu_seqlens_q, sinks, k_scale, v_scale
    )  # fmt: skip
    max_query_len = checks.count("max_query_len", max_query_len)
    checks.refuse_tangents(q=q, k_pages=k_pages, v_pages=v_pages, sinks=sinks)
    num_seqs, page_size = page_table.shape[0], k_pages.shape[2]
    require(
        prefix.suffix_lens.shape[0] == num_seqs and prefix.page_size == page_size,
        f"prefix must be made for this step, got one of {prefix.suffix_lens.shape[0]} sequences and pages of "
        f"{prefix.page_size} tokens for {num_seqs} sequences and pages of {page_size}.",
    )
    checks.check_same_device(q=q, prefix=prefix.page_table)
    if checks.may_read_values(q, page_table, seq_lens, cu_seqlens_q):
        checks.check_cu_seqlens_values("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_query_len)
        checks.check_page_table_values(page_table, seq_lens, cu_seqlens_q, k_pages.shape[0], page_size, None)
        prefix.check_values(page_table, seq_lens, cu_seqlens_q)
    out, lse = shared_prefix.attend_shared_prefix(
        _unit_stride(q), k_pages, v_pages, cu_seqlens_q, prefix, max_query_len, checks.check_softcap(softcap), sinks,
        checks.resolve_scale(scale, q.shape[-1]), k_scale, v_scale,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def write_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Write new keys and values into their slots, in place.

    Args:
        k: ``[T, Hk, D]``.
        v: ``[T, Hk, Dv]``.
        k_pages: ``[num_pages, Hk, page_size, D]``, as in :func:`paged_attention`; written in place.
        v_pages: ``[num_pages, Hk, page_size, Dv]``; written in place.
        slot_mapping: int64 ``[T]``, ``page * page_size + offset`` of each token; -1: do not write. No slot twice.
        k_scale: float32 ``[num_pages, Hk, page_size]`` for float8_e4m3fn and int8 pages, written in place: one scale
            per token and head, its largest magnitude over 448 or 127; NaN where that holds a NaN or an infinity.
            Keys for int8 pages are rotated first: each run of R channels is multiplied by the Hadamard matrix over
            sqrt(R), in float32. R is the largest power of two that divides D; below 16 there is no rotation.
        v_scale: the same for values.

    Raises:
        ValueError: shapes, devices or slots that do not fit; TypeError: dtypes that are not supported. Slots are
            checked where pages are in :func:`paged_attention`.

    Source of the rotation: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (2024).
    """
    checks.once(_check_write, (k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale))
    checks.refuse_tangents(k=k, v=v, k_pages=k_pages, v_pages=v_pages)
    num_slots = k_pages.shape[0] * k_pages.shape[2]
    if checks.may_read_values(k, slot_mapping) and slot_mapping.numel():
        low, high = (int(x) for x in slot_mapping.aminmax())
        require(
            low >= -1 and high < num_slots,
            f"slot_mapping holds {low if low < -1 else high}, outside of the pool's {num_slots} slots "
            f"(accepted: -1 to {num_slots - 1}).",
        )
    ops.write_pages_op(_unit_stride(k), _unit_stride(v), k_pages, v_pages, slot_mapping, k_scale, v_scale)


def _check_write(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    check_tensor("k", k, "[T, Hk, D]")
    check_tensor("v", v, "[T, Hk, Dv]")
    checks.check_pages(k_pages, v_pages)
    check_tensor("slot_mapping", slot_mapping, "[T]", (torch.int64,))
    for name, new, pages in (("k", k, k_pages), ("v", v, v_pages)):
        require(
            new.shape[1] == pages.shape[1]
            and new.shape[2] == pages.shape[3]
            and (new.dtype == pages.dtype or k_scale is not None),
            f"{name} must fit its pages in heads, head dim and dtype, got {list(new.shape)} {new.dtype} for pages "
            f"{list(pages.shape)} {pages.dtype}.",
        )
    require(
        k.shape[0] == v.shape[0] == slot_mapping.shape[0],
        f"k, v and slot_mapping must hold the same tokens, got {k.shape[0]}, {v.shape[0]} and {slot_mapping.shape[0]}.",
    )
    checks.check_scales(k_pages, k_scale, v_scale)
    checks.check_same_device(
        k=k, v=v, k_pages=k_pages, v_pages=v_pages, slot_mapping=slot_mapping, k_scale=k_scale, v_scale=v_scale
    )


def copy_pages(k_pages: torch.Tensor, v_pages: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy whole pages inside one pool, in place: ``pages[target[i]] = pages[source[i]]``.

    Args:
        k_pages: ``[num_pages, Hk, page_size, D]``, written in place.
        v_pages: ``[num_pages, Hk, page_size, Dv]``, written in place.
        source: int32 or int64 ``[n]``, pages to read.
        target: the same dtype ``[n]``, pages to write; none twice, and none that is also a source.

    Raises:
        ValueError: shapes, devices or pages that do not fit; TypeError: dtypes that are not supported. Which pages
            ``source`` and ``target`` hold is checked where pages are in :func:`paged_attention`.
    """
    checks.check_pages(k_pages, v_pages)
    for name, pages in (("source", source), ("target", target)):
        check_tensor(name, pages, "[n]", (torch.int32, torch.int64))
    require(
        source.shape == target.shape,
        f"source and target must pair up, got {list(source.shape)} and {list(target.shape)} pages.",
    )
    checks.check_same_device(k_pages=k_pages, v_pages=v_pages, source=source, target=target)
    checks.refuse_tangents(k_pages=k_pages, v_pages=v_pages)
    if checks.may_read_values(source, target) and source.numel():
        num_pages = k_pages.shape[0]
        sources, targets = source.tolist(), target.tolist()
        for name, values in (("source", sources), ("target", targets)):
            bad = [page for page in values if not 0 <= page < num_pages]
            require(not bad, f"{name} holds page {bad[0] if bad else 0}, outside of the pool (0 to {num_pages - 1}).")
        require(len(set(targets)) == len(targets), "target holds a page twice: which copy wins would be undefined.")
        both = set(sources) & set(targets)
        require(not both, f"page {min(both, default=0)} is in source and in target: the copies would race.")
    ops.copy_pages_op(k_pages, v_pages, source, target)


def merge_attention_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the attention of the same queries over two disjoint sets of keys.

    Args:
        out_a: ``[T, H, Dv]`` over the first set.
        lse_a: float32 ``[H, T]``, its log-sum-exp; -inf where it holds no key (its ``out`` may then hold anything).
        out_b: ``[T, H, Dv]`` over the second set, same dtype.
        lse_b: float32 ``[H, T]``. With sinks, at most one of the two sides may include them.

    Returns:
        ``(out [T, H, Dv], lse [H, T])`` over both sets.

    Raises:
        ValueError: shapes or devices that do not fit; TypeError: dtypes that are not supported.
    """
    check_tensor("out_a", out_a, "[T, H, Dv]")
    check_tensor("out_b", out_b, "[T, H, Dv]")
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_tensor(name, lse, "[H, T]", (torch.float32,))
        require(
            lse.shape == (out_a.shape[1], out_a.shape[0]),
            f"{name} must be [H, T] = {[out_a.shape[1], out_a.shape[0]]}, got {list(lse.shape)}.",
        )
    require(
        out_a.shape == out_b.shape and out_a.dtype == out_b.dtype,
        f"out_a and out_b must agree in shape and dtype, got {list(out_a.shape)} {out_a.dtype}, "
        f"{list(out_b.shape)} {out_b.dtype}.",
    )
    require(
        out_a.shape[1] <= MAX_GRID, f"out_a must have at most {MAX_GRID} heads, got {out_a.shape[1]}."
    )
    checks.check_same_device(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    checks.refuse_tangents(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    return ops.merge_attention_states_op(_unit_stride(out_a), lse_a, _unit_stride(out_b), lse_b)


def _check_paged(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """What every call over pages asks of its tensors, short of their values."""
    check_tensor("q", q, "[T, Hq, D]")
    checks.check_pages(k_pages, v_pages)
    checks.check_heads(q, k_pages, v_pages, k_pages.shape[1], v_pages.shape[1])
    checks.check_sinks(sinks, q.shape[1])
    _check_same_sequences(page_table, seq_lens, cu_seqlens_q)
    checks.check_same_device(
        q=q, k_pages=k_pages, v_pages=v_pages, page_table=page_table, seq_lens=seq_lens,
        cu_seqlens_q=cu_seqlens_q, sinks=sinks,
    )  # fmt: skip
    checks.check_scales(k_pages, k_scale, v_scale)


def _check_same_sequences(page_table: torch.Tensor, seq_lens: torch.Tensor, cu_seqlens_q: torch.Tensor) -> None:
    check_tensor("page_table", page_table, "[num_seqs, max_pages_per_seq]", (torch.int32,))
    check_tensor("seq_lens", seq_lens, "[num_seqs]", (torch.int32,))
    checks.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q)
    require(
        page_table.shape[0] == seq_lens.shape[0] == cu_seqlens_q.shape[0] - 1,
        f"page_table, seq_lens and cu_seqlens_q must speak of the same sequences, got {page_table.shape[0]} rows, "
        f"{seq_lens.shape[0]} lengths and {cu_seqlens_q.shape[0]} prefix sums (one more than sequences).",
    )


def _unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The kernels read rows of a head contiguously; every other stride is free."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
