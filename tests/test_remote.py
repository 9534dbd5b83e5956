"""Invariant: a rank on another node that gives no sign of life is named in every answer, soon; the others serve on."""

import asyncio
import functools
import json
import os
import time
import types
import urllib.error
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import pytest
from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import FinishReason
from vllm.v1.engine.output_processor import RequestState

from vllm_dwdp.entrypoints.server import VLLM, free_port
from vllm_dwdp.integration import remote

from forks import ForkedServer, ForkedSession
from harness import ARGUMENTS

ENGINES = [rank.to_bytes(2, "little") for rank in range(3)]


class Client:
    """What the watch uses of vLLM's client: ranks 0 and 1 here, rank 2 on another node."""

    def __init__(self) -> None:
        self.engine_ranks_managed, self.core_engines = [0, 1, 2], ENGINES
        self.vllm_config = types.SimpleNamespace(
            parallel_config=types.SimpleNamespace(data_parallel_size_local=2), model_config=types.SimpleNamespace(runner_type="generate"),
        )
        self.reqs_in_flight: dict[str, bytes] = {}
        self.engine_inflight: Counter[bytes] = Counter()
        self.outputs_queue: asyncio.Queue = asyncio.Queue()
        self.lb_engines = [[0, 0, 0.0] for _ in ENGINES]
        self.aborted: list[tuple[list[str], bytes]] = []

    async def _abort_requests(self, requests: list[str], engine: bytes) -> None:
        self.aborted.append((requests, engine))

    def send(self, request: str, rank: int) -> None:
        self.reqs_in_flight[request] = ENGINES[rank]
        self.engine_inflight[ENGINES[rank]] += 1


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TICK_S", 0.01)


async def until_lost(client: Client) -> remote.Watch:
    watch = remote.watch(client)
    while not watch.is_lost(2):
        await asyncio.sleep(0.01)
    return watch


def test_requests_of_a_lost_rank_are_answered_and_those_of_others_are_not() -> None:
    """Those that wait for it and those that still come, each once, and it is told to forget them."""

    async def lose() -> None:
        client = Client()
        for request, rank in (("a", 0), ("b", 1), ("c", 2)):
            client.send(request, rank)
        watch = await until_lost(client)
        assert watch.lost == [2] and not watch.is_lost(0)
        (first,) = (await client.outputs_queue.get()).outputs
        client.send("d", 2)
        (second,) = (await client.outputs_queue.get()).outputs
        assert (first.request_id, second.request_id) == ("c", "d")
        assert first.finish_reason == FinishReason.ERROR and "rank 2 has given no sign" in first.stop_reason
        await asyncio.sleep(0.1)
        assert client.outputs_queue.empty() and set(client.reqs_in_flight) == {"a", "b"}
        assert client.aborted == [(["c"], ENGINES[2]), (["d"], ENGINES[2])] and client.engine_inflight[ENGINES[2]] == 0

    asyncio.run(lose())


def test_a_rank_that_is_heard_is_never_lost_and_one_that_comes_back_is_used_again() -> None:
    async def hear() -> None:
        client = Client()
        outputs = types.SimpleNamespace(engine_index=2)
        listen = functools.partial(remote._listen, lambda self, outputs: asyncio.sleep(0))
        for _ in range(4 * remote.TICKS):
            await listen(client, outputs)
            await asyncio.sleep(0.01)
        watch = remote.watch(client)
        assert not watch.lost
        choose = functools.partial(remote._choose, lambda self, request: ENGINES[min(range(3), key=lambda rank: self.lb_engines[rank])])
        client.lb_engines[0][0] = client.lb_engines[1][0] = 5
        assert choose(client, None) == ENGINES[2]
        await until_lost(client)
        assert choose(client, None) != ENGINES[2]
        await listen(client, outputs)
        client.lb_engines[2] = [0, 0, 0.0]  # the coordinator's next report
        assert choose(client, None) == ENGINES[2] and not watch.lost

    asyncio.run(hear())


def test_a_call_to_a_lost_rank_raises_and_others_return() -> None:
    """Endpoints that ask every rank would otherwise wait for ever."""

    async def call() -> None:
        async def answer(self, method: str, *, engine: bytes) -> str:
            await asyncio.sleep(0.03 if engine != ENGINES[2] else 3600)
            return method

        client, bounded = Client(), functools.partial(remote._call, answer)
        assert await bounded(client, "ping", engine=ENGINES[1]) == "ping"
        with pytest.raises(GracefulHTTPError, match="rank 2 has given no sign of life"):
            await bounded(client, "ping", engine=ENGINES[2])

    asyncio.run(call())


def test_the_answer_names_the_rank() -> None:
    """Not vLLM's "Internal server error"; an output that stopped for a reason of vLLM's passes."""

    async def generate() -> None:
        async def outputs(self):
            for reason in (None, "stop", 7, remote.SAID + remote.explain(2)):
                yield types.SimpleNamespace(outputs=[types.SimpleNamespace(stop_reason=reason)])

        seen = []
        with pytest.raises(GracefulHTTPError, match="rank 2 has given") as raised:
            async for output in remote._answer(outputs, None):
                seen.append(output)
        assert len(seen) == 3 and raised.value.http_status == 503

    asyncio.run(generate())


def test_the_answer_to_a_pooling_request_names_the_rank_too() -> None:
    """Through vLLM's own processor of outputs, which knows no error of an embedding."""

    async def encode() -> None:
        client = Client()
        client.vllm_config.model_config = types.SimpleNamespace(runner_type="pooling")
        client.send("waits", 2)
        await until_lost(client)
        (ended,) = (await asyncio.wait_for(client.outputs_queue.get(), 5)).outputs
        state = types.SimpleNamespace(
            output_kind=RequestOutputKind.FINAL_ONLY, external_req_id="waits", prompt_token_ids=[1], num_cached_tokens=0,
            prompt="", stats=None, is_prefilling=False, stream_interval=1, routed_experts_chunks=[], kv_transfer_params=None,
            prompt_embeds=None, lora_request=None,
        )
        for name in ("make_request_output", "_new_request_output", "_new_pooling_output"):
            setattr(state, name, types.MethodType(getattr(RequestState, name), state))

        async def outputs(self):
            yield state.make_request_output([], ended.pooling_output, ended.finish_reason, ended.stop_reason)

        async for _ in remote._answer(outputs, None):
            raise AssertionError("an embedding came")

    with pytest.raises(GracefulHTTPError, match="rank 2 has given") as raised:
        asyncio.run(encode())
    assert raised.value.http_status == 503


def test_engines_beat_for_every_front_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BEAT_S", 0.01)
    queue: Queue = Queue()
    remote.beat(queue, 2)
    found = [queue.get(timeout=5) for _ in range(4)]
    assert [client for client, _ in found] == [0, 1, 0, 1] and not any(outputs.outputs for _, outputs in found)


@pytest.mark.engine
def test_a_headless_node_dies(models, tmp_path: Path) -> None:
    """A request that it has is answered within 10 s with its rank; those that name nobody are served meanwhile and after."""
    model = models("qwen3_moe")
    group = [*ARGUMENTS, "--data-parallel-size", "2", "--data-parallel-size-local", "1", "--parallel", "dwdp",
             "--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(free_port()),
             "--dwdp-rendezvous", f"127.0.0.1:{free_port()}", "--dwdp-dispatch", "off"]
    node_command = [*VLLM, "serve", model, *group, "--headless", "--data-parallel-start-rank", "1"]
    with (
        ForkedServer(model, [*group, "--api-server-count", "1"], tmp_path / "head.log", environment=os.environ) as head,
        ForkedSession(node_command, tmp_path / "node.log", environment=os.environ) as node, ThreadPoolExecutor(1) as pool,
    ):
        head.wait_until_ready(300)

        def ask(rank: int | None, tokens: int = 8) -> tuple[int, str]:
            body = {"prompt": "A mixture", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
            try:
                return 200, json.load(head.post("v1/completions", body, rank))["choices"][0]["text"]
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()

        expected = ask(0)
        assert expected == ask(1) and expected[0] == 200
        members = node.members()  # found beforehand: on a busy machine that takes longer than the answer
        waiting = pool.submit(ask, 1, 1500)
        time.sleep(0.2)
        start_s = time.monotonic()
        for process in members:
            process.kill()
        node.end()
        status, said = waiting.result(60)
        assert status == 503 and "rank 1 has given no sign of life" in said and time.monotonic() - start_s < 12
        assert [ask(None) for _ in range(4)] == [expected] * 4 and head.is_healthy()
        assert ask(1)[0] == 503
