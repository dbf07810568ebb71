"""A script ends with its own status whatever its engine does, and a forked child is told at once."""

import subprocess
import sys
import textwrap
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "support"

SCRIPT = textwrap.dedent(
    """
    import atexit, os, sys, threading, time
    sys.path[:0] = [{folder!r}]
    import torch
    from random_requests import tiny_model
    from transformers import GenerationConfig
    import hf_paged

    torch.set_num_threads(1)
    model = tiny_model("llama")
    config = GenerationConfig(max_new_tokens=24, do_sample=False, pad_token_id=0)
    options = hf_paged.EngineConfig(num_pages=64, page_size=8, max_num_seqs=4, self_check=False)

    def start(background=True):
        engine = hf_paged.Engine(model, options, background=background)
        handles = [engine.submit([5, 6, 7, n], generation_config=config) for n in range(20)]
        return engine, handles

    def end_of_file():
        start()[1][0].result()

    def leave_the_stream():
        for token in start()[1][0]:
            break

    def uncaught():
        engine, handles = start()
        next(iter(handles[0]))
        raise KeyError("a bug of mine")

    def exit_with_3():
        global kept
        kept = engine, handles = start()
        next(iter(handles[0]))
        sys.exit(3)

    def in_a_thread_of_the_script():
        engine, handles = start(background=False)
        threading.Thread(target=lambda: [handle.result() for handle in handles], daemon=True).start()
        while not handles[0].is_done:
            time.sleep(0.001)

    def patched():
        hf_paged.patch_generate(model)
        ids = torch.tensor([[5, 6, 7]])
        def loop():
            while True:
                model.generate(ids, generation_config=config)
        threading.Thread(target=loop, daemon=True).start()
        model.generate(ids, generation_config=config)
        sys.exit(4)

    def fork_when_busy():
        engine, handles = start()
        stream = iter(handles[0])
        next(stream)
        if os.fork() == 0:
            told = 0
            assert handles[-1].result().finish_reason == "error"
            assert "make an engine of the child's own" in str(handles[-1].result().error)
            for call in (lambda: list(stream), lambda: engine.submit([5]), engine.pause, engine.__enter__):
                try:
                    call()
                except hf_paged.RequestError as error:
                    told += "forked" in str(error)
            assert told == 4, told
            engine.close()
            assert engine.stats().running >= 0
            with hf_paged.Engine(model, options) as own:
                assert own.submit([5, 6, 7, 0], generation_config=config).result(60).finish_reason == "length"
            sys.exit(5)
        status = os.waitstatus_to_exitcode(os.wait()[1])
        assert handles[0].result(60).finish_reason == "length"
        sys.exit(status)

    def fork_when_idle():
        engine = hf_paged.Engine(model, options)
        wanted = engine.submit([5, 6, 7], generation_config=config).result().token_ids
        if os.fork() == 0:
            got = engine.submit([5, 6, 7], generation_config=config).result(60).token_ids
            sys.exit(6 if got == wanted else 7)
        sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))

    name = sys.argv[1]
    globals()[name]()
    print("last line")
    """
)

STATUS = {
    "end_of_file": 0,
    "leave_the_stream": 0,
    "uncaught": 1,
    "exit_with_3": 3,
    "in_a_thread_of_the_script": 0,
    "patched": 4,
    "fork_when_busy": 5,
    "fork_when_idle": 6,
}


def test_every_script_gives_its_own_status(tmp_path):
    # One process loads the libraries, and each way to end is a fork of it that goes through the interpreter's own end.
    runner = tmp_path / "runner.py"
    runner.write_text(
        SCRIPT.format(folder=str(FOLDER)).replace(
            "name = sys.argv[1]",
            textwrap.dedent(
                """
                import gc
                gc.freeze()  # a child's last collection would copy all pages of the libraries
                for name in sys.argv[1:]:
                    if os.fork() == 0:
                        break
                    status = os.waitstatus_to_exitcode(os.wait()[1])
                    print(name, status, flush=True)
                else:
                    os._exit(0)
                """
            ),
        )
    )
    run = subprocess.run(
        [sys.executable, str(runner), *STATUS], capture_output=True, text=True, timeout=300, cwd=FOLDER.parent.parent
    )
    lines = [line.split() for line in run.stdout.splitlines() if line != "last line"]
    assert {name: int(status) for name, status in lines} == STATUS, run.stderr[-3000:]
    assert "terminate called" not in run.stderr
    assert run.stdout.count("last line") == 3
