"""A step of one new token a sequence: what the layers of a cache share is looked up once, by the first of them."""

from typing import Any, NamedTuple

import torch

from .. import backend
from ..eager import computes_now


class _Opened(NamedTuple):
    """Launches of layers that differ in memory only; ``kept`` is what they hold the addresses of."""

    write: Any
    forward: Any
    merge: Any
    kept: tuple


class DecodeStep:
    """New keys and values written to their pages, and attention over these, in two or three launches a layer.

    Args:
        page_table: int32 ``[num_seqs, max_pages]``.
        seq_lens: int32 ``[num_seqs]``, with the new tokens.
        cu_seqlens_q: int32 ``[num_seqs + 1]``: one token a sequence.
        slot_mapping: int64 ``[num_seqs]``.
    """

    def __init__(
        self,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        self.page_table, self.seq_lens, self.cu_seqlens_q = page_table, seq_lens, cu_seqlens_q
        self.slot_mapping = slot_mapping
        self._opened: dict[tuple, _Opened | None] = {}
        self._plans: dict[int | None, torch.Tensor] = {}

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        window_left: int | None,
        window_right: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor | None:
        """A layer's step on checked arguments.

        Args:
            q: ``[num_seqs, Hq, 1, D]``.
            k: ``[num_seqs, Hk, 1, D]``, written to ``k_pages``; ``v`` to ``v_pages``. Pages are not quantised.
            window_left: and the others: as in ``paged_attention_op``.

        Returns:
            ``[num_seqs, 1, Hq, D]``. None, and nothing is done: the step is one for ``write_pages_op`` and
            ``paged_attention_op``, which serve every device and every kind of call, and compile what is missing here.
        """
        if not backend.has_gluon(q.device) or not computes_now((q, k, v, sinks)):
            return None
        from ..launch_triton import current_stream

        with backend.device_guard(q):
            stream = current_stream()
            key = (
                q.shape, q.stride(), q.dtype, k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype,
                k_pages.shape, k_pages.stride(), k_pages.dtype, v_pages.stride(), backend.layout(sinks),
                window_left, window_right, softcap, scale, stream,
            )  # fmt: skip
            opened = self._opened.get(key)
            if opened is None:
                # A refusal holds for all layers like this one; what is not compiled yet may be so for the next.
                if key in self._opened:
                    return None
                if not self._serves(q, k, k_pages, v_pages, sinks, scale):
                    self._opened[key] = None
                    return None
                opened = self._open(q, k, v, k_pages, v_pages, window_left, window_right, softcap, sinks, scale)
                if opened is None:
                    return None
                self._opened[key] = opened
            num_seqs, heads, _, head_dim = q.shape
            out = q.new_empty((num_seqs, 1, heads, head_dim))
            to, q_at, k_at, v_at = out.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr()
            k_pages_at, v_pages_at = k_pages.data_ptr(), v_pages.data_ptr()
            more = () if sinks is None else (sinks.data_ptr(),)
            if (to | q_at | k_at | v_at | k_pages_at | v_pages_at | (more[0] if more else 0)) & 15:
                return None
            torch.autograd.graph.increment_version([k_pages, v_pages])
            opened.write.start(stream, k_at, v_at, k_pages_at, v_pages_at)
            opened.forward.start(stream, q_at, k_pages_at, v_pages_at, to, *more)
            if opened.merge is not None:
                opened.merge.start(stream, *more, to)
        return out

    def _serves(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        sinks: torch.Tensor | None,
        scale: float,
    ) -> bool:
        """Whether these kernels are for layers like this one, whose memory is aligned."""
        return (
            q.shape[0] == self.slot_mapping.shape[0]
            and q.shape[2] == k.shape[2] == 1
            and q.numel() > 0
            and self.page_table.stride(-1) == 1
            and (sinks is None or sinks.is_contiguous())
            and backend.uses_gluon(q.squeeze(2), k_pages, v_pages, scale)
        )

    def _open(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        window_left: int | None,
        window_right: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        scale: float,
    ) -> _Opened | None:
        """The launches for layers like this one; None where they are not compiled."""
        from ..launch_triton import OPEN
        from .hopper_gluon import prepare_paged
        from .pages_triton import prepare_write
        from .split_plan_triton import empty_partials, make_split_plan_launch

        table, lens, cu_seqlens_q, slots = self.page_table, self.seq_lens, self.cu_seqlens_q, self.slot_mapping
        q, k, v = q.squeeze(2), k.squeeze(2), v.squeeze(2)
        out, lse = q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
        options = window_left, window_right, softcap, sinks, scale
        step = prepare_paged(q, k_pages, v_pages, out, lse, table, lens, cu_seqlens_q, 1, *options)
        if not step.max_partials:
            return None
        if window_left not in self._plans:
            max_tokens = table.shape[1] * k_pages.shape[2]
            self._plans[window_left] = make_split_plan_launch(lens, cu_seqlens_q, max_tokens, window_left)
        plan = self._plans[window_left]
        partials = empty_partials(out, step.max_partials, k_pages.shape[1], step.pack, q.shape[2])
        sink = None if sinks is None else OPEN
        write = prepare_write(k, v, k_pages, v_pages, None, None, slots).with_memory(
            OPEN, OPEN, OPEN, OPEN, None, None, slots
        )
        forward = step.forward.with_memory(
            OPEN, OPEN, OPEN, OPEN, lse, sink, *partials, cu_seqlens_q, lens, table, plan, plan, plan
        )
        merge = step.merge and step.merge.with_memory(*partials, plan, cu_seqlens_q, sink, OPEN, lse)
        if write is None or forward is None or (step.merge is not None and merge is None):
            return None
        return _Opened(write, forward, merge, (lse, *partials, plan))
