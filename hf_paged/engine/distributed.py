"""One list of prompts, several processes with an engine each: `torchrun` or `accelerate launch` starts them.

Prompts are dealt out, nothing else is shared: no process waits for another between the beginning of a call and its end.
"""

import dataclasses
import hashlib
import itertools
import os
import pickle
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from transformers import GenerationConfig

from ..errors import RequestError
from ..transformers_internals import default_store
from .admission import OfflineBatch
from .engine import Engine
from .offline import configs_of, generate
from .scheduling.request import RequestOutput

LONGEST_WAIT = timedelta(days=1)
"""A process waits so long for the others at the end of its part; one that has died has closed its connections, which is
noticed at once."""

T = TypeVar("T")
_exchanges = itertools.count()
_group: tuple[Any, Any] | None = None
"""The default process group, and a gloo group of the same processes, which is made once."""


def generate_distributed(
    engine: Engine,
    prompts: Sequence[Sequence[int] | torch.Tensor],
    *,
    generation_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
    progress: bool = False,
    **options: Any,
) -> list[RequestOutput]:
    """:meth:`Engine.generate` over the processes that `torchrun` or `accelerate launch` has started.

    Every process calls it with the same arguments and an engine of its own on the same weights. Prompts are sorted by
    length and dealt out; every process gets all outputs, in the order of the prompts. Tokens are those of one process:
    requests are numbered as there, so samples with ``EngineConfig(seed=)`` or ``seed=`` are the same; without a seed,
    process 0 draws one for the call from torch's global generator. Outputs travel over gloo, on the CPU.

    Args:
        engine: of this process.
        prompts: token ids, the same in every process.
        generation_config: one for all, or one for each.
        progress: process 0 shows a bar of its own part.
        options: as for :meth:`Engine.submit`, the same for all. ``output.timing`` and ``request_id`` are of the process
            that ran the prompt.

    Raises:
        ImportError: accelerate is not installed.
        RequestError: another process has ended the call, and the message has its error; or the processes have different
            prompts or seeds. The call ends in all of them.
        RequestError, ValueError, TypeError: as :meth:`Engine.generate`.
        RuntimeError: the processes do not know of each other, or one has died.

    Example::

        state = accelerate.PartialState()
        model = AutoModelForCausalLM.from_pretrained(name).to(state.device)
        with hf_paged.Engine(model) as engine:
            outputs = hf_paged.generate_distributed(engine, prompts, generation_config=config)
    """
    if not isinstance(engine, Engine):
        raise TypeError(f"engine must be an hf_paged.Engine of this process, got {type(engine).__name__}.")
    if engine.ranks.is_joint:
        raise ValueError(
            "generate_distributed gives every process other prompts, and the model of this engine is sharded over "
            "processes that compute all of them together: use engine.generate() on every rank."
        )
    rank, count = _rank_and_count(engine.core.device)
    if count == 1:
        return engine.generate(prompts, generation_config=generation_config, progress=progress, **options)
    peers = _Peers(rank, count)
    checked, configs = list[Any](), list[Any]()

    def begin() -> tuple[int, int, str, list[int]]:
        checked.extend(engine.admission.checked_prompt(prompt) for prompt in prompts)
        configs.extend(configs_of(checked, generation_config))
        digest = hashlib.sha256(repr((engine.config.seed, options.get("seed"))).encode())
        for prompt in checked:
            digest.update(len(prompt).to_bytes(8, "little") + prompt.tobytes())
        # Drawn only where it is used: a greedy call leaves torch's global generator alone.
        is_greedy = all(c is not None and c.do_sample is False for c in configs)
        drawn = 0 if is_greedy or engine.config.seed is not None else int(torch.randint(0, 2**63 - 1, ()))
        lengths = [len(prompt) + (getattr(c, "max_new_tokens", None) or 0) for prompt, c in zip(checked, configs)]
        return engine.admission.next_number(), drawn, digest.hexdigest(), lengths

    begun = peers.exchange(begin)
    if len({digest for _, _, digest, _ in begun}) > 1:
        raise RequestError(
            "generate_distributed got different prompts or seeds in its processes: give every process the same list, "
            "EngineConfig(seed=) and seed=."
        )
    first = max(number for number, _, _, _ in begun)
    engine.admission.skip_to(first + len(checked))
    mine = deal(begun[0][3], count)[rank]

    def run() -> list[tuple[int, RequestOutput]]:
        batch = OfflineBatch(engine.core.clock(), numbers=iter([first + i for i in mine]), seed=begun[0][1])
        outputs = generate(
            engine, [checked[i] for i in mine], [configs[i] for i in mine], progress and rank == 0, batch=batch,
            check=peers.check, **options,
        )  # fmt: skip
        return [(i, _sendable(output)) for i, output in zip(mine, outputs)]

    found = dict(itertools.chain.from_iterable(peers.exchange(run)))
    return [found[i] for i in range(len(checked))]


def deal(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Which prompts each of ``count`` processes gets: the longest first, back and forth over the processes."""
    parts: list[list[int]] = [[] for _ in range(count)]
    for place, index in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        turn, seat = divmod(place, count)
        parts[seat if turn % 2 == 0 else count - 1 - seat].append(index)
    return [sorted(part) for part in parts]


def _rank_and_count(device: torch.device) -> tuple[int, int]:
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError('generate_distributed needs accelerate: pip install "hf-paged[distributed]".') from error
    state = PartialState(cpu=device.type == "cpu")
    started = distributed.get_world_size() if distributed.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != started:
        raise RuntimeError(
            f"accelerate's state has {state.num_processes} processes, and {started} were started: every one of them "
            f"would run all prompts. Make accelerate.PartialState(cpu={device.type == 'cpu'}) at the beginning of the "
            f"script, and start it with torchrun or accelerate launch."
        )
    return state.process_index, state.num_processes


class _OtherFailedError(RuntimeError):
    """Another process has ended the call: this one's own part of it is of no use."""


class _Peers:
    """The processes of a call.

    Args:
        rank: of this one.
        count: how many there are.
    """

    CHECK_S = 1.0

    def __init__(self, rank: int, count: int) -> None:
        global _group
        self.rank, self.count = rank, count
        world = distributed.group.WORLD
        if _group is None or _group[0] is not world:
            # Not the default group: Python objects go through the GPU there, and NCCL ends a wait after minutes.
            _group = world, distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
        self.group = _group[1]
        self.store = default_store()
        self.key, self.checked = "", 0.0

    def check(self) -> None:
        """Raises where another process has failed meanwhile."""
        if time.monotonic() - self.checked >= self.CHECK_S:
            self.checked = time.monotonic()
            if self.store.check([self.key]):
                raise _OtherFailedError

    def exchange(self, make: Callable[[], T]) -> list[T]:
        """What ``make`` returns in each process, in all of them. Where it raises in one, this raises in all.

        Raises:
            RequestError: it has raised in another process.
        """
        self.key = f"hf_paged_failed_{next(_exchanges)}"
        own, error = b"", None
        try:
            own = pickle.dumps(make())
        except BaseException as raised:
            error = raised
            self.store.set(self.key, "1")
        text = None if error is None or isinstance(error, _OtherFailedError) else f"{type(error).__name__}: {error}"
        parts: list[Any] = [None] * self.count
        # Polled, for a wait inside gloo does not hear Ctrl-C.
        arrival = distributed.barrier(group=self.group, async_op=True)
        while not arrival.is_completed():
            time.sleep(0.01)
        arrival.wait()
        distributed.all_gather_object(parts, (own, text), group=self.group)
        if error is not None and not isinstance(error, _OtherFailedError):
            raise error
        for rank, (_, failure) in enumerate(parts):
            if failure is not None:
                raise RequestError(f"process {rank} of {self.count} has ended generate_distributed: {failure}")
        return [pickle.loads(part) for part, _ in parts]


def _sendable(output: RequestOutput) -> RequestOutput:
    """An error of a caller's own code may not survive the way to another process: its words do."""
    try:
        pickle.loads(pickle.dumps(output.error))
        return output
    except Exception:
        return dataclasses.replace(output, error=RequestError(f"{type(output.error).__name__}: {output.error}"))
