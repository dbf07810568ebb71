"""The start of an engine: the model is checked, a page is measured, pages are made."""

from typing import Any

from transformers.utils import logging

from ...fusion import FusedModel
from ...mixed_precision import enables_autocast
from ...transformers_internals import is_tested_version, tensor_parallel_group
from ..config import EngineConfig
from ..core import EngineCore, no_gradients
from ..execution.compiled import as_written
from ..execution.decode_graphs import capture_blocker
from ..execution.model_fingerprint import read_buffers, written_buffers
from ..group import RankGroup
from ..ranks import ALONE, Alone
from ..scheduling.page_budget import PageRoom, choose_num_pages, working_bytes
from .compile_ahead import compile_ahead
from .fusion_steps import fuse
from .self_check import probe, run_reference

logger = logging.get_logger(__name__)


def make_ranks(model: Any, config: EngineConfig) -> Alone:
    """The processes that hold the model; all of them make an engine now.

    Raises:
        RankError: they have other options.
        ValueError: an option is for whole models only.
    """
    process_group = tensor_parallel_group(model)
    if process_group is None:
        return ALONE
    for name in ("fuse", "compile"):
        if getattr(config, name):
            raise ValueError(f"{name}=True cannot be: the model is sharded over processes. Leave it out.")
    group = RankGroup(process_group)
    group.watch()
    try:
        group.meet(lambda: (repr(config), None))
    except BaseException:
        group.leave()
        raise
    return group


def start(
    model: Any, config: EngineConfig, max_model_len: int, ranks: Alone = ALONE
) -> tuple[EngineCore, FusedModel | None]:
    """Check the model, see what a page costs, make the pages."""
    fused = None
    with no_gradients(), as_written(model):
        if not ranks.is_joint:
            compile_ahead(model, config, max_model_len)
        reference = run_reference(model) if config.self_check else None
        try:
            buffers = read_buffers(model)
            learned = probe(model, config, reference)
            written = written_buffers(model, buffers)
            if not ranks.is_joint:
                fused = _fuse(model, config, learned.needs_lengths, max_model_len)
            pages_of_one = -(-max_model_len // config.page_size)
            num_pages = config.num_pages
            reserve = working_bytes(model, config) if any(d.type == "cuda" for d in learned.page_bytes) else 0
            if num_pages is None:
                # One more: rows that share a prompt copy its last page before they write into it.
                most = config.max_num_seqs * pages_of_one + 1
                num_pages = choose_num_pages(learned.page_bytes, config.memory_fraction, most, reserve)
            core = EngineCore(model, config, ranks.least(num_pages), max_model_len, ranks=ranks)
            room = PageRoom(reserve, learned.page_bytes, ranks)
            core.commit_as_used(learned.kinds, room)
            core.runner.needs_lengths = core.cache.may_gather = learned.needs_lengths
            core.runner.ignore_buffers(written)
            if fused is not None:
                core.runner.use_fused(fused)
            if config.cuda_graphs is not False:
                reason = core.use_graphs()
                if reason is not None and config.cuda_graphs:
                    raise ValueError(f"cuda_graphs=True cannot be: {reason}. Leave it None.")
                if reason is not None and core.device.type == "cuda":
                    logger.warning_once(f"decode steps run without CUDA graphs: {reason}.")
            if core.device.type == "cuda":
                largest = min(config.max_batch_tokens, config.max_num_seqs * max_model_len)
                with core.on_device():
                    step_bytes = room.measure(lambda: core.runner.warm_up_prompts(largest))
                room.reserve = working_bytes(model, config, step_bytes)
            return core, fused
        except BaseException:
            if fused is not None:
                fused.restore()
            raise


def _fuse(model: Any, config: EngineConfig, needs_lengths: bool, max_model_len: int) -> FusedModel | None:
    """Modules that run fused; None: none do.

    Raises:
        ValueError: some were asked for, and there are none.
    """
    wanted = config.fuse
    device = model.get_input_embeddings().weight.device
    if wanted is False or (wanted is None and capture_blocker(model, device) is not None):
        return None
    if enables_autocast(model):
        raise ValueError("fuse=True cannot be: the model's forward enables autocast. Leave it None.")
    fused = fuse(model, config, needs_lengths, max_model_len)
    # On an untested version of transformers, what no longer matches a pattern is said aloud.
    say = logger.info if is_tested_version() or not fused.refusals else logger.warning_once
    say(f"{type(model).__name__} in the engine: {fused}")
    if not len(fused) and wanted:
        raise ValueError(f"fuse=True cannot be: {fused}. Leave it None.")
    return fused if len(fused) else None
