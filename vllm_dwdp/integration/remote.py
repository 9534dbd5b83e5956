"""Remote: signs of life from engines on other nodes, and what a server answers for a rank that gives none.

vLLM's front end watches the processes that its own launcher started. Of engines behind another launcher it would never
know that they are gone: requests for them would wait for ever. Its Rust front end is refused: it takes an empty output for
an error, and ends.
"""

import asyncio
import contextlib
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from queue import Queue
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError
from vllm.logger import init_logger
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

from vllm_dwdp.integration import checks, hooks

logger = init_logger("vllm.dwdp.remote")
BEAT_S, TICK_S = 2.0, 1.0
TICKS = 8  # of silence, after which a rank is given up
SAID = "DWDP: "  # how a stop reason of ours begins


def beat(output_queue: Queue, num_clients: int) -> None:
    """From now on send every front end of an engine an empty output every `BEAT_S`; vLLM's own do nothing with one."""

    def send() -> None:
        while True:
            time.sleep(BEAT_S)
            for client in range(num_clients):
                output_queue.put_nowait((client, EngineCoreOutputs()))

    threading.Thread(target=send, name="dwdp-beat", daemon=True).start()


class Watch:
    """The remote ranks of one client of vLLM's, and for how many ticks each has been silent.

    Ticks of the client's own loop: one that was held up itself takes nobody for dead.
    """

    def __init__(self, client: Any):
        ranks, local = client.engine_ranks_managed, client.vllm_config.parallel_config.data_parallel_size_local
        self.silent = dict.fromkeys(ranks[local:], 0)
        self._engines = dict(zip(ranks, client.core_engines, strict=True))
        self._client = weakref.ref(client)
        self._task = asyncio.get_running_loop().create_task(self._run())

    def is_lost(self, rank: int) -> bool:
        return self.silent.get(rank, 0) >= TICKS

    @property
    def lost(self) -> list[int]:
        return [rank for rank in self.silent if self.is_lost(rank)]

    def rank_of(self, engine: bytes) -> int:
        return next(rank for rank, each in self._engines.items() if each == engine)

    def heard(self, rank: int) -> None:
        if self.is_lost(rank):
            logger.warning("DWDP rank %d gives signs of life again", rank)
        if rank in self.silent:
            self.silent[rank] = 0

    async def _run(self) -> None:
        while self._client() is not None:
            await asyncio.sleep(TICK_S)
            for rank in self.silent:
                self.silent[rank] += 1
                if self.silent[rank] == TICKS:
                    logger.error("DWDP %s; its requests are answered so, others go to living ranks", explain(rank))
                if self.is_lost(rank):
                    await self._answer(rank)

    async def _answer(self, rank: int) -> None:
        """End the requests of a lost rank, and let it forget them, should it live on."""
        if (client := self._client()) is None:
            return
        mine = [request for request, engine in client.reqs_in_flight.items() if engine == self._engines[rank]]
        if mine:
            reason, is_pooling = SAID + explain(rank), client.vllm_config.model_config.runner_type == "pooling"
            ended = [
                EngineCoreOutput(
                    request, [], finish_reason=FinishReason.ERROR, stop_reason=reason,
                    pooling_output=_Reason.of(reason) if is_pooling else None,
                ) for request in mine
            ]
            for request in mine:
                client.engine_inflight[client.reqs_in_flight.pop(request)] -= 1
            client.outputs_queue.put_nowait(EngineCoreOutputs(engine_index=rank, outputs=ended))
            await client._abort_requests(mine, self._engines[rank])


class _Reason(torch.Tensor):
    """What stands for an embedding that does not come; vLLM's pooling outputs have no stop reason."""

    text: str

    @staticmethod
    def of(text: str) -> "_Reason":
        made = torch.empty(0).as_subclass(_Reason)
        made.text = text
        return made


def explain(rank: int) -> str:
    return (
        f"rank {rank} has given no sign of life for {TICKS * TICK_S:.0f} s: its node, launcher or network is gone; "
        f"restart the group to have it back"
    )


_watches: weakref.WeakKeyDictionary[Any, Watch] = weakref.WeakKeyDictionary()


def watch(client: Any) -> Watch:
    """The client's watch, begun at the first call, in its loop."""
    if client not in _watches:
        _watches[client] = Watch(client)
    return _watches[client]


def install(vllm_config: VllmConfig) -> None:
    """Watch over the ranks of other nodes, where this server has any."""
    if checks.has_remote_engines(vllm_config.parallel_config):
        for hook, around in (
            (hooks.CHOOSE_ENGINE, _choose), (hooks.ENGINE_OUTPUTS, _listen), (hooks.CALL_UTILITY, _call),
            (hooks.GENERATE, _answer), (hooks.ENCODE, _answer),
        ):
            hook.install(around)


def _choose(original: Callable, self: Any, request: Any) -> bytes:
    """Lost ranks look full. A request that names one goes there all the same and is answered within a tick."""
    ranks = self.engine_ranks_managed
    for rank in watch(self).lost:
        self.lb_engines[ranks.index(rank)] = [2**30, 0, 0.0]
    return original(self, request)


async def _listen(original: Callable, self: Any, outputs: Any) -> None:
    watch(self).heard(outputs.engine_index)
    await original(self, outputs)


async def _call(original: Callable, self: Any, method: str, *args: Any, engine: bytes) -> Any:
    """To a lost rank it raises: some of vLLM's endpoints ask every rank."""
    seen = watch(self)
    rank = seen.rank_of(engine)
    answer = asyncio.ensure_future(original(self, method, *args, engine=engine))
    try:
        while not answer.done():
            if seen.is_lost(rank):
                raise _unavailable(explain(rank))
            await asyncio.wait({answer}, timeout=TICK_S)
        return answer.result()
    finally:
        answer.cancel()


async def _answer(original: Callable, self: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
    """vLLM answers for a request that ended in an error without a reason; ours has one."""
    async with contextlib.aclosing(original(self, *args, **kwargs)) as outputs:
        async for output in outputs:
            if reason := _reason(output.outputs):
                raise _unavailable(reason)
            yield output


def _reason(outputs: Any) -> str | None:
    """Ours, for which a request for tokens or for an embedding has ended."""
    if not isinstance(outputs, list):
        return outputs.data.text if isinstance(outputs.data, _Reason) else None
    reasons = [each.stop_reason for each in outputs if isinstance(each.stop_reason, str)]
    return next((reason for reason in reasons if reason.startswith(SAID)), None)


def _unavailable(reason: str) -> GracefulHTTPError:
    return GracefulHTTPError(reason, HTTPStatus.SERVICE_UNAVAILABLE)
