"""The processes of ``test_tensor_parallel.py``: they write what their calls gave, as JSON.

    python tensor_parallel_worker.py MODEL results/ 2:run:one_forward_fails 3:states:first_is_killed

The test runs the same scenes in its own process, with the whole model.
"""

import faulthandler
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from amount import EVERYTHING
from engine_machine import PROMPTS, EngineMachine, Part, Reference, seed_of
from engine_machine import config as config_of_mode
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test
from random_requests import AddToToken, StopAtSum, draw
from small_engines import run_again
from tiny_models import build, randomise, tiny_config
from torch import distributed
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.distributed import DistributedConfig
from transformers.generation.streamers import BaseStreamer

import hf_paged
from hf_paged.engine import following
from hf_paged.engine import group as group_module
from hf_paged.engine.scheduling import page_budget
from hf_paged.engine.startup import start

OPTIONS: dict[str, Any] = dict(page_size=8, num_pages=96, max_num_seqs=8, max_batch_tokens=32, seed=7)
NUM_RANDOM = 12
LONG = "\U0001f600" * 400
"""Text of 1,600 bytes in UTF-8."""
NUM_MACHINES = {2: 40, 3: 40} if EVERYTHING else {2: 4, 3: 2}


def make_model(heads: int = 12, kv_heads: int = 6) -> Any:
    """Heads, and a vocabulary, for two and for three ranks."""
    config = tiny_config("llama")
    config.vocab_size = 102
    config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = 2, heads, kv_heads
    config.hidden_size, config.head_dim, config.intermediate_size = 96, 8, 96
    model = build(config, "sdpa")
    randomise(model, 1)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


def prompts(count: int = 7, seed: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [3, 41, 7, 1, 19, 30, 3, 12][:count]
    return [torch.randint(3, 90, (n,), generator=generator).tolist() for n in lengths]


def config(new: int = 9, **options: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, pad_token_id=0, **({"do_sample": False} | options))


def configs() -> list[GenerationConfig]:
    """Greedy, sampled, several samples, beams, drawn beams, candidates from the prompt."""
    sampled = config(6, do_sample=True)
    return [sampled, config(12), config(5, do_sample=True, num_return_sequences=3), config(4, num_beams=3), sampled,
            config(6, num_beams=2, do_sample=True), config(8, prompt_lookup_num_tokens=3)]  # fmt: skip


def tokens(outputs: list[hf_paged.RequestOutput]) -> list[Any]:
    return [[sequence.token_ids for sequence in output.sequences] for output in outputs]


class DrawsNumbers(LogitsProcessor):
    """Draws from a generator of its own, which begins otherwise in each process."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + 4 * torch.randn(scores.shape, generator=self.generator)


class StopsAtRandom(StoppingCriteria):
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.rand(len(input_ids), generator=self.generator) < 0.3


class CannotBeSentError(Exception):
    """Needs two arguments, and an exception is made anew from one."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


class Fails(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > 21:
            raise CannotBeSentError(1, 2)
        return scores


class Collects(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


class OddTokens:
    """A grammar: odd tokens only."""

    def fill_bitmask(self, bitmask: np.ndarray) -> None:
        bitmask[:] = np.int32(-1431655766)

    def accept(self, token_id: int) -> bool:
        return token_id % 2 == 1


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class Scenes:
    """What is done with a model; every rank does it, ``rank`` 0 of 1 is a process alone.

    Args:
        model: whole or sharded.
        rank, size: of this process.
        group: of the test's own, over which the processes wait for one another; None: there is one.
    """

    def __init__(self, model: Any, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.model, self.rank, self.size, self.group = model, rank, size, group
        self.found: dict[str, Any] = {}

    def meet(self) -> None:
        if self.group is not None:
            distributed.barrier(group=self.group)

    def engine(self, **options: Any) -> hf_paged.Engine:
        return hf_paged.Engine(self.model, hf_paged.EngineConfig(**(OPTIONS | options)))

    def run(self) -> dict[str, Any]:
        with self.engine() as engine:
            self.calls(engine)
            self.requests(engine)
            self.code_of_requests(engine)
            self.weights(engine)
            self.wrong_use(engine)
            self.failing_step(engine)
            self.meet()
            engine.check()
            self.found["new tokens"] = engine.num_new_tokens
        self.found["closed"] = error_of(lambda: engine.generate(prompts(2), generation_config=config()))
        if self.size != 2:  # Three ranks are enough for these.
            self.few_pages()
            self.captured()
        if self.size == 3:
            self.failing_start()
        self.patched()
        return self.found

    def calls(self, engine: hf_paged.Engine) -> None:
        """Made by all ranks."""
        self.found["mixed"] = tokens(engine.generate(prompts(), generation_config=configs()))
        outputs = engine.generate(prompts(3), generation_config=config(5, do_sample=True), seed=3, logprobs=2)
        self.found["seed"] = tokens(outputs)
        self.found["top"] = [[entry.top_ids for entry in output.logprobs] for output in outputs]
        long = prompts()[1]
        first = engine.generate([long], generation_config=config(4))
        again = engine.generate([long, [*long[:24], 5, 6]], generation_config=config(4))
        self.found["prefix"] = [tokens(first), tokens(again), [output.cached_tokens for output in again]]
        self.found["none"] = engine.generate([])

    def requests(self, engine: hf_paged.Engine) -> None:
        """Submitted on the first rank, when they like; the others are slow now and then."""
        pause = random.Random(self.rank)
        step = engine.loop._run_step

        def slow(*arguments: Any) -> bool:
            time.sleep(pause.choice([0, 0, 0, 0.01]))
            return step(*arguments)

        engine.loop._run_step = slow
        if self.rank == 0:
            generator = np.random.default_rng(11)
            asked = [draw(generator, False) for _ in range(NUM_RANDOM)]
            order = list(range(NUM_RANDOM))
            if self.size > 1:
                random.Random(self.size).shuffle(order)
            handles: dict[int, Any] = {}
            for number in order:
                one = asked[number]
                handles[number] = engine.submit(
                    one.prompt, generation_config=one.config, seed=one.seed, priority=number % 3, **one.extras
                )
                time.sleep(pause.choice([0, 0.02]) if self.size > 1 else 0)
            self.found["random"] = tokens([handles[number].result() for number in range(NUM_RANDOM)])
            guided = engine.submit(prompts()[0], generation_config=config(6), grammar=OddTokens)
            self.found["guided"] = guided.result().token_ids
            long = engine.submit(prompts()[2], generation_config=config(80))
            stream = iter(long)
            begun = [next(stream) for _ in range(3)]
            long.cancel()
            output = long.result()
            self.found["cancelled"] = [output.finish_reason, output.token_ids[:3] == begun, len(output.token_ids) < 80]
            late = engine.submit(prompts()[2], generation_config=config(80), deadline_s=0.0).result()
            self.found["late"] = [late.finish_reason, str(late.error)]
        self.meet()
        engine.loop._run_step = step

    def code_of_requests(self, engine: hf_paged.Engine) -> None:
        """Processors and criteria that differ among the ranks: the first one's count."""
        made = [
            engine.generate(prompts(4), generation_config=config(6), logits_processor=[DrawsNumbers(self.rank)]),
            engine.generate(prompts(4), generation_config=config(16), stopping_criteria=[StopsAtRandom(self.rank)]),
            engine.generate(prompts(2), generation_config=config(4, num_beams=2), logits_processor=[AddToToken()]),
            engine.generate(prompts(4), generation_config=config(12), stopping_criteria=[StopAtSum()]),
        ]
        self.found["own code"] = [tokens(outputs) for outputs in made]
        alone = engine.generate(prompts(1), generation_config=config(6), logits_processor=[DrawsNumbers(self.rank)])
        self.found["numbers of one"] = tokens(alone)
        failed = engine.generate(prompts(6), generation_config=config(4), logits_processor=[Fails()])
        self.found["failed"] = [None if output.error is None else str(output.error) for output in failed]

    def weights(self, engine: hf_paged.Engine) -> None:
        """Weights change, seen and unseen; the engine sleeps and wakes."""
        head = self.model.get_output_embeddings().weight
        norm = self.model.model.norm.weight
        local = head.to_local() if hasattr(head, "to_local") else head
        long = prompts()[1]

        def run() -> list[Any]:
            return tokens(engine.generate([long, *prompts(2)], generation_config=config(6)))

        found = [run()]
        with torch.no_grad():
            local.mul_(-1.0)
            found.append(run())
            # On one rank alone, where it is seen: all of them start over.
            layer = self.model.model.layers[0].input_layernorm.weight
            layer.mul_(1.5)
            found.append(run())
        norm.data.mul_(-1.0)
        engine.refresh_weights()
        found.append(run())
        engine.sleep()
        engine.wake()
        found.append(run())
        engine.pause(keep_graphs=True)
        norm.data.mul_(-1.0)
        engine.resume()
        found.append(run())
        with torch.no_grad():
            local.mul_(-1.0)
            layer.div_(1.5)
        engine.drop_prefixes()
        found.append(run())
        self.found["weights"] = found

    def wrong_use(self, engine: hf_paged.Engine) -> None:
        self.found["other prompts"] = error_of(
            lambda: engine.generate(prompts(3, seed=self.rank), generation_config=config(3))
        )
        self.found["fewer prompts"] = error_of(
            lambda: engine.generate(prompts(3)[: 3 - self.rank], generation_config=config(3))
        )
        self.found["bad prompt"] = error_of(lambda: engine.generate([[-1]], generation_config=config(3)))
        self.found["bad prompt of one"] = error_of(
            lambda: engine.generate([[5 if self.rank else -1]], generation_config=config(3))
        )
        if self.size > 1 and self.rank:
            self.found["submit"] = error_of(lambda: engine.submit([5, 6]))
        if self.size > 1 and not self.rank:
            self.found["salt"] = error_of(lambda: engine.submit([5, 6], cache_salt=frozenset([1])))
        self.found["later"] = tokens(engine.generate(prompts(3), generation_config=config(3)))

    def failing_step(self, engine: hf_paged.Engine) -> None:
        """A forward raises on all ranks alike: its requests end, others do not."""
        run, calls = engine._core.runner.forward, 0

        def forward(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise CannotBeSentError(3, LONG)
            return run(*arguments, **options)

        runner = engine._core.runner
        change, changes = runner.change, iter([None, None, None, LONG])  # Told to the others with the failure.
        runner.forward, runner.change = forward, lambda look_closely: next(changes, None)
        outputs = engine.generate(prompts(2), generation_config=config(6))
        self.found["failing step"] = [str(output.error) for output in outputs]
        engine.generate(prompts(1), generation_config=config(1))
        self.found["told changes"] = list(changes)
        runner.forward, runner.change = run, change
        self.found["after it"] = tokens(engine.generate(prompts(2), generation_config=config(6)))

    def failing_start(self) -> None:
        """An engine starts on two ranks, and not on the last, which goes on without one."""

        def fail(*_: Any) -> int:
            raise OSError("no page")

        real = start.choose_num_pages
        if self.rank == 2:
            start.choose_num_pages = fail
        self.found["failing start"] = error_of(lambda: self.engine(num_pages=None))
        start.choose_num_pages = real
        self.meet()

    def few_pages(self) -> None:
        with self.engine(num_pages=14, max_num_seqs=4, swap_space_gib=0.001 * self.size) as engine:
            outputs = engine.generate(prompts(8), generation_config=config(20, do_sample=True))
            self.found["few pages"] = tokens(outputs)
            self.found["preemptions"] = sum(output.timing.preemptions for output in outputs)
        real = page_budget.free_bytes
        page_budget.free_bytes = lambda device: (3 - self.rank) * 200_000
        try:
            with self.engine(num_pages=None, memory_fraction=0.5) as engine:
                self.found["pages"] = engine.stats().pages_total
                self.found["own memory"] = tokens(engine.generate(prompts(4), generation_config=config(8)))
        finally:
            page_budget.free_bytes = real

    def captured(self) -> None:
        """Steps that take the captured path, and run ahead."""
        with self.engine() as engine:
            self.meet()
            assert engine._core.use_graphs(run_again) is None
            engine._core.runs_ahead = True
            self.meet()
            self.found["captured"] = tokens(engine.generate(prompts(), generation_config=configs()))

    def patched(self) -> None:
        hf_paged.patch_generate(self.model, hf_paged.EngineConfig(**(OPTIONS | {"seed": None})))
        rows = prompts(4)
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        inputs = dict(input_ids=ids, attention_mask=(ids > 0).long())
        model, made = self.model, []
        model.generate(**inputs, max_new_tokens=2)
        engine = model.generate.engine
        made.append(model.generate(**inputs, max_new_tokens=6))
        made.append(model.generate(**inputs, max_new_tokens=6, do_sample=True, seed=5))
        made.append(model.generate(**inputs, max_new_tokens=4, num_beams=3, num_return_sequences=2))
        torch.manual_seed(self.rank)  # The first rank's seed is that of all.
        made.append(model.generate(**inputs, max_new_tokens=6, do_sample=True))
        criterion = StopsAtRandom(self.rank)
        made.append(model.generate(**inputs, max_new_tokens=20, stopping_criteria=[criterion], eos_token_id=98))
        streamer = Collects()
        made.append(model.generate(ids[:1, -3:], max_new_tokens=5, streamer=streamer))
        self.found["patched"] = [out.tolist() for out in made]
        self.found["streamed"] = streamer.got
        self.found["same engine"] = model.generate.engine is engine
        hf_paged.unpatch_generate(model)
        out = model.generate(ids[:1, -3:], max_new_tokens=5, custom_generate=hf_paged.generate)
        self.found["one call"] = out.tolist()

    def states(self) -> None:
        """Any order of calls and faults; an engine for each."""
        part = RankPart(self)
        if self.rank:
            part.obey()
        else:
            reference = Reference(make_model())
            run_state_machine_as_test(
                lambda: ShardedMachine(part, reference),
                settings=settings(
                    max_examples=NUM_MACHINES[self.size], stateful_step_count=25, phases=[Phase.generate],
                    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck),
                ),
            )  # fmt: skip
            while len(part.descriptors) < 5:
                part.order("open")
                part.order("close")
            part.finish()
        self.found["descriptors"] = part.descriptors

    # Last ones: the processes are of no use behind them

    def one_forward_fails(self) -> None:
        """On the last rank alone, in the middle of the model: the others wait for it there."""
        group_module.FAILED_WAIT_S, following.STUCK_WAIT_S = 1.0, 1.0
        engine = self.engine()
        engine.generate(prompts(2), generation_config=config(3))
        if self.rank == self.size - 1:
            layer = self.model.model.layers[1]
            layer.mlp.down_proj.forward = lambda *arguments: (_ for _ in ()).throw(CannotBeSentError(5, LONG))
        self.last(engine)

    def one_is_killed(self) -> None:
        """The last rank, in the middle of a step."""
        self.kill(self.size - 1)

    def first_is_killed(self) -> None:
        """The rank that decides."""
        self.kill(0)

    def end(self) -> None:
        """In order."""
        distributed.destroy_process_group()

    def kill(self, rank: int) -> None:
        following.STUCK_WAIT_S = 1.0
        engine = self.engine()
        engine.generate(prompts(2), generation_config=config(3))
        if self.rank == rank:
            layer = self.model.model.layers[1]
            layer.mlp.down_proj.forward = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        self.last(engine)

    def last(self, engine: hf_paged.Engine) -> None:
        begun = time.monotonic()
        if self.rank == 0:
            handles = [engine.submit(prompt, generation_config=config(6)) for prompt in prompts(3)]
            outputs = [handle.result(60) for handle in handles]
            self.found["errors"] = [f"{type(output.error).__name__}: {output.error}" for output in outputs]
        else:
            while not engine.mail.is_closed:
                time.sleep(0.05)
        self.found["seconds"] = time.monotonic() - begun
        self.found["after"] = error_of(lambda: engine.generate(prompts(1), generation_config=config(2)))
        self.found["state"] = engine.health().state
        engine.close()


class RankPart(Part):
    """A rank's part in the state machine.

    Args:
        scenes: of this rank.
    """

    def __init__(self, scenes: Scenes) -> None:
        super().__init__(scenes.model, 1000.0 * scenes.rank)
        self.scenes, self.descriptors = scenes, list[int]()

    def open(self) -> None:
        super().open()
        # Steps run where the machine is, so that what comes between two of them is the same in every run.
        self.engine.background = not self.engine.ranks.leads
        pause, run = random.Random(self.scenes.rank), self.engine.core.run

        def slow(work: Any) -> Any:
            time.sleep(pause.choice([0, 0, 0, 0, 0.003]))
            return run(work)

        self.engine.core.run = slow

    def generate(self, asked: list[tuple[int, int, str, list[list[int]]]]) -> None:
        """A call of all ranks."""
        for prompt, new, mode, wanted in asked:
            output = self.engine.generate(
                [PROMPTS[prompt]], generation_config=config_of_mode(new, mode), seed=seed_of(mode)
            )[0]
            if output.error is None:
                assert [sequence.token_ids for sequence in output.sequences] == wanted
            else:
                assert "a forward that fails" in str(output.error)

    def close(self) -> None:
        super().close()
        self.descriptors.append(len(os.listdir("/proc/self/fd")))

    def obey(self) -> None:
        """Do what the first rank does, until it has no more; see :meth:`order`."""
        while (order := self._say(None)) is not None:
            self._do(*order)

    def order(self, name: str, *arguments: Any) -> None:
        """Call a method on all ranks."""
        self._say((name, arguments))
        self._do(name, arguments)

    def finish(self) -> None:
        """There are no more orders."""
        self._say(None)

    def _say(self, order: Any) -> Any:
        said = [order]
        distributed.broadcast_object_list(said, 0, group=self.scenes.group)
        return said[0]

    def _do(self, name: str, arguments: Any) -> None:
        failures: list[str | None] = [None] * self.scenes.size
        try:
            getattr(self, name)(*arguments)
            failure = None
        except BaseException:
            failure = f"rank {self.scenes.rank}: {traceback.format_exc()}"
        distributed.all_gather_object(failures, failure, group=self.scenes.group)
        assert not any(failures), "".join(failure for failure in failures if failure)


class ShardedMachine(EngineMachine):
    """The first rank's, which gives the others orders."""

    part: RankPart

    def act(self, name: str, *arguments: Any) -> None:
        self.part.order(name, *arguments)

    @rule(
        prompt=st.integers(0, len(PROMPTS) - 1), new=st.sampled_from([1, 6]), mode=st.sampled_from(["greedy", "sample"])
    )
    def generate_on_all_ranks(self, prompt, new, mode):
        self.act("generate", [(prompt, new, mode, self.reference.tokens(prompt, new, mode))])


def run_rank(path: str, folder: Path, first: str, last: str) -> None:
    """Of the process that the environment says."""
    faulthandler.dump_traceback_later(150, exit=True)
    size = int(os.environ["WORLD_SIZE"])
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype="float32", distributed_config=DistributedConfig(tp_size=size)
    ).eval()
    rank = distributed.get_rank()
    scenes = Scenes(model, rank, size, distributed.new_group(backend="gloo"))
    for name in (first, last):
        scenes.found = {}
        getattr(scenes, name)()
        (folder / f"{size}.{rank}.{name}.json").write_text(json.dumps(scenes.found), encoding="utf-8")


def fork_ranks(size: int, path: str, folder: Path, first: str, last: str) -> list[int]:
    """Run ``size`` processes, which have imported everything already; returns how they have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "RANK": rank}
            os.environ |= {name: str(value) for name, value in place.items()} | {"LOCAL_RANK": str(rank)}
            try:
                run_rank(path, folder, first, last)
                os._exit(0)  # A thread may wait in the model's communication for a rank that is gone.
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> None:
    """Command line."""
    path, folder, *asked = sys.argv[1:]
    for one in asked:
        size, first, last = one.split(":")
        codes = fork_ranks(int(size), path, Path(folder), first, last)
        Path(folder, f"{size}.{last}.codes.json").write_text(json.dumps(codes), encoding="utf-8")


if __name__ == "__main__":
    main()
