"""The processes of ``test_distributed.py``: what the calls of each gave is left as a file of JSON.

    torchrun --nproc_per_node 2 distributed_worker.py all results/
    python distributed_worker.py killed results/ 29500 29501
"""

import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, GenerationConfig

import hf_paged

MODEL = Path(__file__).resolve().parent.parent / "assets" / "small_model"
LENGTHS = (3, 41, 7, 1, 19, 30, 3)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(10, 400, (n,), generator=generator).tolist() for n in LENGTHS]


def greedy(new: int = 9, **options: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, pad_token_id=0, **({"do_sample": False} | options))


def configs() -> list[GenerationConfig]:
    """Greedy, sampled, several samples, beams."""
    sampled = greedy(6, do_sample=True)
    return [sampled, greedy(12), greedy(5, do_sample=True, num_return_sequences=3), greedy(4, num_beams=3), sampled,
            greedy(1), sampled]  # fmt: skip


def engine(seed: int | None = None) -> hf_paged.Engine:
    torch.manual_seed(0)  # as a script does: the same in every process
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    return hf_paged.Engine(model, hf_paged.EngineConfig(seed=seed, num_pages=200, max_num_seqs=8, self_check=False))


def tokens(outputs: list[hf_paged.RequestOutput]) -> list[Any]:
    return [[sequence.token_ids for sequence in output.sequences] for output in outputs]


class CannotBeSentError(Exception):
    """Needs two arguments, and an exception is made anew from one."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


class Fails:
    """A processor that raises for prompts of one token."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids[0, 0] == prompts()[3][0]:
            raise CannotBeSentError(1, 2)
        return scores


class Slow:
    """A processor with which the part of a process takes minutes; it leaves a file when it has begun."""

    calls = 0
    begun = Path(sys.argv[2] if len(sys.argv) > 2 else ".", "begun")

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        Slow.calls += 1
        self.begun.touch()
        time.sleep(0.2)
        return scores


def fail_once_others_run(*arguments: Any, **options: Any) -> None:
    while not Slow.begun.exists():
        time.sleep(0.05)
    raise CannotBeSentError(3, 4)


def error_of(*arguments: Any, **options: Any) -> str:
    try:
        hf_paged.generate_distributed(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def run_all(rank: int, count: int) -> dict[str, Any]:
    """Every case that leaves the processes alive."""
    generate, found = hf_paged.generate_distributed, dict[str, Any]()
    with engine(seed=7) as one:
        found["greedy"] = tokens(generate(one, prompts(), generation_config=greedy(), progress=True))
        found["mixed"] = tokens(generate(one, prompts(), generation_config=configs()))
        found["new tokens"] = one.num_new_tokens
        found["few"] = tokens(generate(one, [torch.tensor([prompts()[1]])], generation_config=configs()[:1]))
        found["none"] = generate(one, [])
        found["bad prompt"] = error_of(one, [*prompts(), [-1]])
        found["too long"] = error_of(one, prompts(), generation_config=[*configs()[:6], greedy(10**6)])
        found["other prompts"] = error_of(one, prompts()[rank:])
        outputs = generate(one, prompts(), generation_config=greedy(), logits_processor=[Fails()])
        found["failed"] = [None if x.error is None else f"{type(x.error).__name__}: {x.error}" for x in outputs]
        submit = one.submit
        if rank == 1:
            one.submit = fail_once_others_run
        found["one fails"] = error_of(one, prompts(), generation_config=greedy(1000), logits_processor=[Slow()])
        found["slow calls"] = Slow.calls
        one.submit = submit
        found["later"] = tokens(generate(one, prompts(), generation_config=greedy()))
    found["closed"] = error_of(one, prompts(), generation_config=greedy())
    with engine() as one:
        sampled = greedy(12, do_sample=True)
        found["no seed"] = tokens(generate(one, [prompts()[1]] * 6, generation_config=sampled))
        found["one seed"] = tokens(generate(one, prompts(), generation_config=sampled, seed=11))
    return found


def run_killed(ports: list[str]) -> None:
    """Two processes for each port, of which the first, then the second is killed; prints the status of all.

    Without a launcher, which would end the others. They are forks of this one: loading the libraries takes longest."""
    gc.freeze()
    status = {}
    for killed, port in enumerate(ports):
        for rank in range(2):
            status[os.fork() or run_one(killed, rank, port)] = [killed, rank]
    for _ in range(len(status)):
        pid, code = os.wait()
        status[pid].append(os.waitstatus_to_exitcode(code))
    print(json.dumps(list(status.values())))


def run_one(killed: int, rank: int, port: str) -> NoReturn:
    """A process that does not return."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)
    }  # fmt: skip
    PartialState(cpu=True)
    with engine() as one:
        if rank == killed:
            one.submit = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
        error = error_of(one, prompts(), generation_config=greedy())
    Path(sys.argv[2], f"{killed}-{rank}").write_text(error, encoding="utf-8")
    os._exit(0)


def main() -> None:
    """Command line."""
    if sys.argv[1] == "killed":
        return run_killed(sys.argv[3:])
    state = PartialState(cpu=True)
    index = state.process_index
    found = run_all(index, state.num_processes)
    state.destroy_process_group()
    Path(sys.argv[2], f"{index}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
