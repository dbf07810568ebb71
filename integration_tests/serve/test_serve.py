"""The server with the real gateway and the openai client, on loopback, offline."""

import concurrent.futures
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hf_paged
from hf_paged.serve import EXTRA, serve

ROOT = Path(__file__).parent.parent.parent
SMALL_MODEL = ROOT / "integration_tests" / "assets" / "small_model"


def missing() -> list[str]:
    """Distributions that these tests need and that are not installed."""
    found = {d.metadata["Name"].lower().replace("_", "-") for d in importlib.metadata.distributions()}
    return [name for name in (*EXTRA, "openai") if name not in found]


pytestmark = pytest.mark.skipif(bool(missing()), reason=f"the extra serve or openai is not installed: {missing()}")
if not missing():
    import openai

TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
PROMPT = "def main():"


@pytest.fixture(scope="module")
def tokenizer():
    made = AutoTokenizer.from_pretrained(SMALL_MODEL)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(SMALL_MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def engine(model):
    config = hf_paged.EngineConfig(num_pages=2000, max_num_seqs=8)
    with hf_paged.Engine(model, config) as made:
        yield made
        made.check()


@pytest.fixture(scope="module")
def server(engine, tokenizer):
    with serve(engine, tokenizer, port=0, model_name="small", metrics_port=0, api_key="secret") as made:
        yield made


def client_of(server, key="secret"):
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=0, timeout=240)


@pytest.fixture
def client(server):
    with client_of(server) as made:
        yield made


@pytest.fixture
def ask(client):
    def ask(prompt=PROMPT, *, max_tokens=8, temperature=0.0, extra=None, **options):
        return client.completions.create(
            model="small", prompt=prompt, max_tokens=max_tokens, temperature=temperature, extra_body=extra, **options
        )

    return ask


@pytest.fixture
def chat(client):
    def chat(*, max_tokens=8, temperature=0.0, extra=None, **options):
        messages = [{"role": "user", "content": PROMPT}]
        return client.chat.completions.create(
            model="small", messages=messages, max_tokens=max_tokens, temperature=temperature, extra_body=extra,
            **options,
        )  # fmt: skip

    return chat


@pytest.fixture
def generated(model, tokenizer):
    """Text of ``model.generate``."""

    def generated(prompt=PROMPT, count=8, **options):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        config = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=1, **options)
        return tokenizer.decode(model.generate(ids, generation_config=config)[0, ids.shape[1] :])

    return generated


def test_completions_are_those_of_generate(ask, generated):
    answer = ask()
    assert answer.choices[0].text == generated()
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 8, 12)
    several = ask([PROMPT, "import os"])
    assert [choice.text for choice in several.choices] == [generated(), generated("import os")]


def test_chat_and_models(chat, client, generated):
    answer = chat()
    assert answer.choices[0].message.content == generated(f"{PROMPT}\n")
    assert [model.id for model in client.models.list()] == ["small"]


def test_streams_are_the_whole_in_pieces(ask, generated):
    parts = list(ask(max_tokens=12, stream=True, stream_options={"include_usage": True}))
    texts = [choice.text for part in parts for choice in part.choices]
    assert "".join(texts) == generated(count=12)
    assert len([text for text in texts if text]) > 3
    assert [choice.finish_reason for part in parts for choice in part.choices if choice.finish_reason] == ["length"]
    assert parts[-1].usage.completion_tokens == 12


def test_async_streams_beside_one_another(server, generated):
    import asyncio

    async def one(client, prompt):
        stream = await client.completions.create(
            model="small", prompt=prompt, max_tokens=10, temperature=0, stream=True
        )
        return "".join([choice.text async for part in stream for choice in part.choices])

    async def every(prompts):
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="secret", timeout=240) as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    prompts = [f"x{i} = " for i in range(12)]
    assert asyncio.run(every(prompts)) == [generated(prompt, 10) for prompt in prompts]


def test_samples(ask):
    first, again = (ask(n=3, temperature=1.0, seed=7) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) > 1
    parts = [choice for part in ask(n=3, temperature=1.0, seed=7, stream=True) for choice in part.choices]
    assert ["".join(part.text for part in parts if part.index == i) for i in range(3)] == texts


def test_stops(ask, generated):
    whole = generated(count=20)
    stop = whole.split()[2]
    answer = ask(max_tokens=20, stop=[stop])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.usage.completion_tokens < 20


def test_logprobs_of_chat(chat, engine, tokenizer):
    entries = chat(logprobs=True, top_logprobs=3, max_tokens=4).choices[0].logprobs.content
    ids = tokenizer(f"{PROMPT}\n").input_ids
    config = GenerationConfig(max_new_tokens=4, do_sample=False)
    output = engine.submit(ids, generation_config=config, logprobs=3).result()
    for entry, expected in zip(entries, output.logprobs, strict=True):
        assert entry.token == tokenizer.decode([expected.token_id])
        assert entry.logprob == pytest.approx(expected.logprob, abs=1e-4)
        top = [(item.token, item.logprob) for item in entry.top_logprobs]
        wanted = [(tokenizer.decode([t]), v) for t, v in zip(expected.top_ids, expected.top_logprobs)]
        assert [token for token, _ in top] == [token for token, _ in wanted]
        assert [value for _, value in top] == pytest.approx([value for _, value in wanted], abs=1e-4)


def test_penalties_are_the_engines(chat, engine, tokenizer):
    text = chat(frequency_penalty=1.5, presence_penalty=0.5, max_tokens=20).choices[0].message.content
    config = GenerationConfig(max_new_tokens=20, do_sample=False)
    ids = tokenizer(f"{PROMPT}\n").input_ids
    with_both = engine.submit(ids, generation_config=config, frequency_penalty=1.5, presence_penalty=0.5).result()
    without = engine.submit(ids, generation_config=config).result()
    assert text == tokenizer.decode(with_both.token_ids) != tokenizer.decode(without.token_ids)


def test_other_parameters(ask, generated):
    assert ask(extra={"repetition_penalty": 1.3}, max_tokens=16).choices[0].text == generated(
        count=16, repetition_penalty=1.3
    )
    assert ask(extra={"top_k": 1}, temperature=1.0).choices[0].text == generated()
    ended = ask(extra={"stop_token_ids": [198, 199]}, max_tokens=30)
    assert ended.usage.completion_tokens <= 30


SCHEMA = {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a", "b"],
    "additionalProperties": False,
}  # fmt: skip


def test_structured_output(ask, chat):
    schema = {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": SCHEMA}}
    value = json.loads(chat(response_format=schema, max_tokens=200).choices[0].message.content)
    assert isinstance(value["a"], int)
    assert value["b"] in ("x", "y")
    assert re.fullmatch("[ab]{3}c", ask(extra={"regex": "[ab]{3}c"}, max_tokens=20).choices[0].text)
    with pytest.raises(openai.BadRequestError, match="regex is not accepted"):
        ask(extra={"regex": "a("})


def test_cached_tokens_are_reported(ask):
    prompt = "import sys  # once more\n" * 12
    ask(prompt, max_tokens=1)
    assert ask(prompt, max_tokens=1).usage.prompt_tokens_details.cached_tokens > 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {"5": 3}}, "logit_bias is not served here"),
        ({"logprobs": 1}, "logprobs is not served here"),
        ({"logprobs": 0}, "logprobs is not served here"),
        ({"suffix": "x"}, "suffix is not served here"),
        ({"best_of": 2}, "best_of=2 is not served"),
        ({"prompt": [5, 6]}, "the gateway does not take token ids"),
        ({"prompt": [[5, 6]]}, "the gateway does not take token ids"),
        ({"extra": {"prompt_logprobs": 0}}, "prompt_logprobs is not served here"),
        ({"extra": {"cache_salt": "a"}}, "cache_salt is not served here"),
        ({"extra": {"include_stop_str_in_output": True}}, "include_stop_str_in_output is not served here"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 10**6}, "ask for fewer new tokens"),
        ({"n": 2}, "n must be 1 with temperature 0"),
        ({"n": 100, "temperature": 1.0}, "n must be at most 16"),
        ({"stop": ["a"], "extra": {"min_tokens": 3}}, "min_tokens with stop strings is not served"),
    ],
    ids=str,
)
def test_what_is_not_served_says_why(ask, options, message):
    with pytest.raises(openai.BadRequestError, match=re.escape(message)):
        ask(**options)


def test_what_chat_does_not_serve(chat):
    for name, value in {"logit_bias": {"5": 3}, "prompt_logprobs": 1, "priority": 2}.items():
        with pytest.raises(openai.BadRequestError, match=f"{name} is not served here"):
            chat(extra={name: value})


def test_keys(server):
    with client_of(server, "wrong") as client, pytest.raises(openai.AuthenticationError):
        client.completions.create(model="small", prompt="a", max_tokens=1)


def test_control_routes_are_not_there(server):
    for path in ("/workers", "/flush_cache", "/get_loads", "/v1/tokenizers", "/v1/models/../../workers"):
        request = urllib.request.Request(f"{server.address}{path}", headers={"Authorization": "Bearer secret"})
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(request, timeout=60)
        assert raised.value.code == 404


def test_other_models(client):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")


def test_clients_that_leave_are_cancelled(ask, engine):
    stream = ask(max_tokens=1500, temperature=1.0, stream=True, extra={"ignore_eos": True})
    next(iter(stream))
    before = engine.stats().finished.get("cancelled", 0)
    stream.close()
    end = time.monotonic() + 60
    while engine.stats().running and time.monotonic() < end:
        time.sleep(0.05)
    assert engine.stats().finished.get("cancelled", 0) == before + 1


def post(server, data: bytes, **headers: str):
    head = {"Authorization": "Bearer secret", "Content-Type": "application/json"} | headers
    return urllib.request.urlopen(urllib.request.Request(f"{server.address}/v1/completions", data, head), timeout=60)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b'{"model": 5}', b"{" * 5000])
def test_malformed_bodies(server, data, ask, generated):
    with pytest.raises(urllib.error.HTTPError) as raised:
        post(server, data)
    assert 400 <= raised.value.code < 500
    assert ask().choices[0].text == generated()


def test_good_clients_beside_bad_ones(server, engine, generated):
    """Those that leave, ask for too much, send nonsense or read nothing harm no other."""
    body = {"model": "small", "temperature": 0, "stream": True}

    def good(i):
        with client_of(server) as client:
            prompt = f"x{i % 4} = "
            return client.completions.create(model="small", prompt=prompt, max_tokens=10, temperature=0).choices[0].text

    def leaves(i):
        host, port = server.address.removeprefix("http://").split(":")
        data = json.dumps(body | {"prompt": f"y{i}", "max_tokens": 1000}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer secret\r\n"
        head += f"Content-Length: {len(data)}\r\nContent-Type: application/json\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(head.encode() + data[: None if i % 3 else 20])
            if i % 3 == 1:
                connection.recv(100)
        return None

    def wrong(i):
        with contextlib.suppress(urllib.error.HTTPError):
            post(server, json.dumps(body | {"prompt": "z", "max_tokens": [10**7, "a", -1, {}][i % 4]}).encode())
        return None

    kinds = [good, leaves, wrong, good]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        got = list(pool.map(lambda i: kinds[i % 4](i // 4), range(48)))
    expected = {i: generated(f"x{i} = ", 10) for i in range(4)}
    assert [got[i] for i in range(48) if kinds[i % 4] is good] == [
        expected[i // 4 % 4] for i in range(48) if kinds[i % 4] is good
    ]
    end = time.monotonic() + 60
    while engine.health().unfinished and time.monotonic() < end:
        time.sleep(0.05)
    assert engine.health().unfinished == 0
    engine.check()
    assert engine.stats().pages_used == engine.stats().pages_cached


def test_metrics(server, ask):
    ask()
    text = urllib.request.urlopen(server.metrics_address, timeout=60).read().decode()
    seen = dict(re.findall(r"^(\S+) (\S+)$", text, re.M))
    assert float(seen['hf_paged_requests_total{finish_reason="length"}']) >= 1
    assert float(seen["hf_paged_generated_tokens_total"]) >= 8
    assert float(seen["hf_paged_time_to_first_token_seconds_count"]) >= 1
    assert float(seen["hf_paged_serving"]) == 1
    assert float(seen['hf_paged_requests_refused_total{reason="invalid"}']) >= 0


def test_the_dashboard_names_metrics_that_there_are(server, ask):
    ask()
    with pytest.raises(openai.BadRequestError):
        ask(max_tokens=0)
    text = urllib.request.urlopen(server.metrics_address, timeout=60).read().decode()
    there = set(re.findall(r"^(hf_paged_\w+)", text, re.M))
    dashboard = json.loads(Path(hf_paged.serve.__code__.co_filename).with_name("dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in dashboard["templating"]["list"]]
    named = set(re.findall(r"hf_paged_\w+", " ".join(queries)))
    assert named <= there
    # And each metric is in it, but for what Prometheus' client adds.
    assert {name for name in there if not re.search("_(created|sum|count)$", name)} == named


def test_a_full_queue_is_429(model, tokenizer):
    config = hf_paged.EngineConfig(num_pages=500, max_num_seqs=1, max_waiting=1)
    with hf_paged.Engine(model, config) as engine, serve(engine, tokenizer, port=0, model_name="small") as server:
        client = client_of(server)
        elsewhere = urllib.request.Request(f"{server.address}/v1/models", headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(elsewhere, timeout=60)
        assert raised.value.code == 421

        def one(i):
            try:
                answer = client.completions.create(model="small", prompt=f"x{i}", max_tokens=100, temperature=0)
                return answer.choices[0].finish_reason
            except openai.RateLimitError as error:
                return 429 if "try again later" in str(error) else str(error)

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            got = list(pool.map(one, range(6)))
        assert 429 in got
        assert set(got) <= {429, "length", "stop"}
        # It drains: what runs ends.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            last = pool.submit(one, 0)
            end = time.monotonic() + 60
            while not engine.stats().running and time.monotonic() < end:
                time.sleep(0.01)
            server.close()
            assert last.result() in ("length", "stop")
        engine.check()


def test_without_a_gateway(engine, tokenizer):
    import grpc
    from smg_grpc_proto import vllm_engine_pb2 as pb
    from smg_grpc_proto import vllm_engine_pb2_grpc

    ids = tokenizer(PROMPT).input_ids
    params = pb.SamplingParams(temperature=0.0, max_tokens=6, logprobs=1, logit_bias={68: 100.0})
    with (
        serve(engine, tokenizer, port=0, gateway="none") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        request = pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=ids), sampling_params=params)
        [answer] = list(stub.Generate(request, timeout=120))
        assert list(answer.complete.output_ids) == [68] * 6
        assert list(answer.complete.output_logprobs.token_ids) == [68] * 6
        request.stream = True
        *chunks, last = list(stub.Generate(request, timeout=120))
        assert [token for chunk in chunks for token in chunk.chunk.token_ids] == [68] * 6
        assert (last.complete.finish_reason, last.complete.completion_tokens) == ("length", 6)
        assert stub.HealthCheck(pb.HealthCheckRequest()).healthy
        with pytest.raises(grpc.RpcError) as raised:
            list(stub.Generate(pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[10**6]))))
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        params.structural_tag = "x"
        request.sampling_params.CopyFrom(params)
        with pytest.raises(grpc.RpcError, match="structural_tag is not served"):
            list(stub.Generate(request))


def test_page_events_of_the_service(engine, tokenizer):
    import grpc
    from smg_grpc_proto import vllm_engine_pb2 as pb
    from smg_grpc_proto import vllm_engine_pb2_grpc
    from smg_grpc_proto.generated import common_pb2

    engine.drop_prefixes()
    size = engine.config.page_size
    ids = list(range(100, 100 + 2 * size + 3))
    params = pb.SamplingParams(temperature=0.0, max_tokens=1)
    with (
        serve(engine, tokenizer, port=0, gateway="none") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        stream = stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest(start_sequence_number=7), timeout=120)
        first = next(stream)
        assert (first.snapshot.count, first.snapshot.blocks) == (1, 0)
        assert [event.WhichOneof("data") for event in first.events] == ["cleared"]
        list(stub.Generate(pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=ids), sampling_params=params)))
        second = next(stream)
        assert second.sequence_number == first.sequence_number + 1
        assert not second.HasField("snapshot")
        [stored] = [event.stored for event in second.events]
        assert not stored.HasField("parent_block_hash")
        assert [list(block.token_ids) for block in stored.blocks] == [ids[:size], ids[size : 2 * size]]
        assert {block.block_size for block in stored.blocks} == {size}
        late = stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest(), timeout=120)
        snapshot = next(late)
        assert (snapshot.snapshot.blocks, snapshot.sequence_number) == (2, second.sequence_number)
        assert [event.WhichOneof("data") for event in snapshot.events] == ["cleared", "stored"]
        assert snapshot.events[1].stored.blocks == stored.blocks
        engine.drop_prefixes()
        for one in (stream, late):
            assert [event.WhichOneof("data") for event in next(one).events] == ["cleared"]
        late.cancel()
        stream.cancel()


@contextlib.contextmanager
def started(*options):
    """The command's process, which does not outlive the test."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "hf_paged.cli", "serve", str(SMALL_MODEL), "--port", "0", "--no-warm-up"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=environment) as child:
        try:
            yield child
        finally:
            child.kill()


def test_the_command_serves_until_sigterm(tmp_path):
    trace = tmp_path / "trace.json"
    with started("--trace", str(trace)) as child:
        lines = []
        for line in child.stdout:
            lines.append(line)
            if found := re.search(r"is served at (http\S+)", line):
                break
        # The gateway would name an address of its own, which clients must not use.
        assert not re.search(r"listening|:\d{4,5}\b", "".join(lines[:-1]))
        with openai.OpenAI(base_url=found[1], api_key="none", timeout=240) as client:
            [model] = client.models.list().data
            assert client.completions.create(model=model.id, prompt=PROMPT, max_tokens=3).choices[0].text
        child.send_signal(signal.SIGTERM)
        assert child.wait(120) == 0
    assert {event["name"] for event in json.loads(trace.read_text())["traceEvents"]} >= {"prefill", "decode"}


def test_a_gateway_that_ends_is_told(engine, tokenizer):
    with serve(engine, tokenizer, port=0, model_name="small") as server:
        assert server.is_running
        server._gateway._children[0].kill()
        with pytest.raises(RuntimeError, match="the gateway has ended, the guard runs"):
            server.wait()
        assert not server.is_running
    assert engine.health().is_serving


def health_of(address):
    """Status and answer of ``/health``, None: nothing answers."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
    except (urllib.error.URLError, OSError):
        return None


def ended_requests(text: str) -> int:
    """Requests that ended by their length, in an engine's metrics."""
    found = re.search(r'^hf_paged_requests_total\{finish_reason="length"\} (\S+)$', text, re.M)
    return 0 if found is None else int(float(found[1]))


def processes_of(parent: int) -> dict[int, str]:
    """Command lines of a process' children."""
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return {int(child): Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ") for child in listed}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and asks Linux to end children with their parent")
def test_replicas_go_on_without_one_and_end_with_their_parent():
    with started("--replicas", "2", "--metrics-port", "0", "--served-model-name", "small") as parent:
        lines = []
        for line in parent.stdout:
            lines.append(line)
            if "served at http" in line:
                break
        address = re.search(r"served at (http\S+)/v1", lines[-1])[1]
        metrics = re.findall(r"metrics: (\S+)", "".join(lines))
        serves = {"replica": 0, "state": "serves"}
        assert health_of(address) == (200, {"status": "ok", "replicas": [serves, serves | {"replica": 1}]})

        def ask(prompt, count=1, **options):
            body = {"model": "small", "prompt": prompt, "max_tokens": count, "temperature": 0} | options
            request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode())
            request.add_header("Content-Type", "application/json")
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    return answer.read().decode()
            except urllib.error.HTTPError as error:
                return error.read().decode()

        # What begins alike goes to one engine, which has it cached; each engine counts its own.
        prompts = ["import os\n" * 90, "x = 1\n" * 90, "def f():\n" * 90]
        for i in range(12):
            ask(prompts[i % 3] + str(i))
        texts = [urllib.request.urlopen(where, timeout=60).read().decode() for where in metrics]
        before = [ended_requests(text) for text in texts]
        assert (len(before), sum(before)) == (2, 12)
        hits = [float(re.search(r"^hf_paged_prefix_hit_rate (\S+)$", text, re.M)[1]) for text in texts]
        assert min(hit for hit, count in zip(hits, before) if count) > 0.3

        # Many at a time are shared among the engines, however alike, also where there is no page to find.
        for prompt in ("a = ", prompts[1]):
            with concurrent.futures.ThreadPoolExecutor(24) as pool:
                answers = list(pool.map(ask, [prompt] * 24, [150] * 24))
                assert len({json.loads(answer)["choices"][0]["text"] for answer in answers}) == 1
            after = [ended_requests(urllib.request.urlopen(where, timeout=60).read().decode()) for where in metrics]
            counts, before = [new - old for new, old in zip(after, before)], after
            assert sum(counts) == 24
            assert min(counts) >= 8

        # One is killed amid streams: each of these ends or has an error; all that come later are served.
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            streams = [pool.submit(ask, f"y{i}", 500, stream=True, ignore_eos=True) for i in range(8)]
            time.sleep(0.5)
            replicas = [child for child, line in processes_of(parent.pid).items() if "--gateway none" in line]
            os.kill(replicas[0], signal.SIGKILL)
            later = [pool.submit(ask, f"z{i}", 3) for i in range(8)]
            for stream in streams:
                text = stream.result()
                assert '"finish_reason":"length"' in text or '"error"' in text
            assert all('"finish_reason":"length"' in one.result() for one in later)
        end = time.monotonic() + 60
        # For a moment it may only be silent.
        while "has ended" not in str(health_of(address)) and time.monotonic() < end:
            time.sleep(0.1)
        status, answer = health_of(address)
        assert (status, answer["status"]) == (200, "degraded")
        states = [entry["state"] for entry in answer["replicas"]]
        assert sorted(states) == ["has ended with status -9", "serves"]

        left = list(processes_of(parent.pid))
        parent.kill()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{child}/stat").exists() for child in left) and time.monotonic() < end:
        time.sleep(0.1)
    assert health_of(address) is None
    assert not [child for child in left if Path(f"/proc/{child}/stat").exists()]


def test_grammars_in_both_notations(engine, tokenizer):
    from hf_paged.serve.grammar import Grammars

    grammars = Grammars(tokenizer, engine.core.num_logits, [tokenizer.eos_token_id], 1000)
    for text in ('start: "a" /[bc]+/', 'root ::= "a" [bc]+'):
        for word, is_allowed in {"abcb": True, "b": False, "ad": False}.items():
            matcher = grammars.prepared("grammar", text)()
            assert all(matcher.accept(token) for token in tokenizer(word).input_ids) == is_allowed
    for text in ("root ::= (", "::=", "start: ("):
        with pytest.raises(ValueError, match=r"grammar (cannot be read|is not accepted)"):
            grammars.prepared("grammar", text)


# LoRA adapters


@pytest.fixture(scope="module")
def adapted():
    """A model with two adapters that change its tokens."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(SMALL_MODEL, dtype=torch.float32)
    targets = ["q_proj", "v_proj", "down_proj"]
    made = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets), adapter_name="first")
    made.add_adapter("second", peft.LoraConfig(r=8, target_modules=targets))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return made.eval()


def texts_by_adapter(adapted, tokenizer, count=8, prompt=PROMPT):
    """What ``generate`` gives with each adapter active, and with none."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    config = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=1)

    def text():
        return tokenizer.decode(adapted.get_base_model().generate(ids, generation_config=config)[0, ids.shape[1] :])

    found = {}
    for name in ("first", "second"):
        adapted.set_adapter(name)
        found[name] = text()
    with adapted.disable_adapter():
        found["small"] = text()
    assert len(set(found.values())) == 3
    return found


def test_adapters_are_models_of_their_names(adapted, tokenizer):
    expected, replies = (texts_by_adapter(adapted, tokenizer, prompt=prompt) for prompt in (PROMPT, f"{PROMPT}\n"))
    names = ["first", "second"]
    with hf_paged.Engine(adapted.get_base_model(), hf_paged.EngineConfig(num_pages=2000, max_num_seqs=16)) as engine:
        with (
            serve(engine, tokenizer, port=0, model_name="small", adapters=names, api_key="secret") as server,
            client_of(server) as client,
        ):
            assert sorted(model.id for model in client.models.list().data) == sorted(expected)

            options = dict(max_tokens=8, temperature=0)

            def ask(name, **others):
                return client.completions.create(model=name, prompt=PROMPT, **options, **others)

            def chat(name, **others):
                messages = [{"role": "user", "content": PROMPT}]
                return client.chat.completions.create(model=name, messages=messages, **options, **others)

            with concurrent.futures.ThreadPoolExecutor(12) as pool:
                asked = [*expected] * 4
                answers = list(pool.map(ask, asked))
                assert [answer.choices[0].text for answer in answers] == [expected[name] for name in asked]
                assert [answer.model for answer in answers] == asked
            for name, text in expected.items():
                parts = [part for part in ask(name, stream=True) if part.choices]
                assert "".join(part.choices[0].text for part in parts) == text
                assert chat(name).choices[0].message.content == replies[name]
                parts = [part for part in chat(name, stream=True) if part.choices]
                assert "".join(part.choices[0].delta.content or "" for part in parts) == replies[name]
            # Never the base model for a name that there is not.
            for name in ("third", "", "First", "first ", "small/first", "default", "*"):
                for one in (ask, chat):
                    for is_streamed in (False, True):
                        with pytest.raises(openai.NotFoundError, match=re.escape(repr(name))):
                            one(name, stream=is_streamed)
            for name in (None, ["first"], 1):
                for one in (ask, chat):
                    with pytest.raises(openai.BadRequestError, match="model"):
                        one(name)
            for one in (ask, chat):
                with pytest.raises(openai.BadRequestError, match="lora_path is not served here: name the adapter as"):
                    one("small", extra_body={"lora_path": "first"})
            adapted.delete_adapter("second")
            with pytest.raises(openai.BadRequestError, match="adapter='second' is not loaded"):
                ask("second")
            assert ask("first").choices[0].text == expected["first"]
        for options, message in (
            (dict(adapters=["third"]), "adapter='third' is not loaded"),
            (dict(adapters=["first"], gateway="none"), "no field for them"),
            (dict(adapters=["first"], model_name="first"), "different names"),
            (dict(adapters="first"), "list of names"),
        ):
            with pytest.raises(ValueError, match=message):
                serve(engine, tokenizer, port=0, **options)
        engine.check()


def test_the_command_serves_adapters(tmp_path, tokenizer):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(SMALL_MODEL, dtype=torch.float32)
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), adapter_name="first")
    made.add_adapter("second", peft.LoraConfig(r=8, target_modules=["v_proj"]))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    made.eval().save_pretrained(tmp_path)
    expected = texts_by_adapter(made, tokenizer)
    options = [f"--adapter={name}={tmp_path / name}" for name in ("first", "second")]
    with started("--served-model-name=small", "--dtype=float32", *options) as child:
        found = next(filter(None, (re.search(r"is served at (http\S+)", line) for line in child.stdout)))
        with openai.OpenAI(base_url=found[1], api_key="none", timeout=240) as client:
            for name, text in expected.items():
                answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=8, temperature=0)
                assert answer.choices[0].text == text
        child.send_signal(signal.SIGTERM)
        assert child.wait(120) == 0
    with started("--adapter=first") as child:
        assert child.wait(120) == 2
