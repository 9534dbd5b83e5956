"""Helping: an idle rank's worker looks for peers' rounds between its engine's calls, and runs forwards whose rows are nobody's.

Such a forward is there for the experts. vLLM's common attention is left out wherever vLLM calls it from Python, which is in all graphs
but those of whole decode steps: launching it takes the host as long as the device needs for a layer's experts, and peers wait for both.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.model_executor.layers.attention import Attention, MLAAttention

from vllm_dwdp.dispatch import Dispatch
from vllm_dwdp.integration import hooks, watchdog

REQUEST_ROWS = 128  # of each request of a forward in a graph


class StandIn(NamedTuple):
    """What takes the place of an object's method."""

    attributes: dict[str, Any]  # the object's own
    name: str
    method: Callable[..., Any]


def stand_ins(layer: object) -> list[StandIn]:
    """For a layer's attention, zeros [rows, ...]; for what it does to the KV cache, nothing. Of other layers and operators, none.

    Nor of attention that takes no `output`: all of vLLM's own does.
    """
    if isinstance(layer, MLAAttention):
        target, attend, update = layer, "forward_impl", "update_kv_cache"
    elif isinstance(layer, Attention):
        target, attend, update = layer.impl, "forward", "do_kv_cache_update"
    else:
        return []
    if "output" not in (taken := list(inspect.signature(getattr(target, attend)).parameters)):
        return []
    zeros = StandIn(vars(target), attend, _zeros(taken.index("output")))
    return [zeros, StandIn(vars(target), update, lambda *args, **kwargs: None)] if hasattr(target, update) else [zeros]


def _zeros(at: int) -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: (kwargs["output"] if "output" in kwargs else args[at]).zero_()


class Helper:
    """What a worker runs for its peers: called, a forward of rows that are nobody's, in which `layers` have their stand-ins."""

    def __init__(self, worker: Any, dispatch: Dispatch, layers: Iterable[object]):
        self._worker, self._dispatch = worker, dispatch
        self._stand_ins = [(each, each.attributes.get(each.name)) for layer in layers for each in stand_ins(layer)]

    def __call__(self) -> None:
        for each, _ in self._stand_ins:
            each.attributes[each.name] = each.method
        try:
            self._forward()
        finally:
            for each, own in self._stand_ins:
                del each.attributes[each.name]
                if own is not None:
                    each.attributes[each.name] = own

    def _forward(self) -> None:
        """As requests of few rows where it is more than that: those of one would be laid out like a long prompt's."""
        requests, runner = self._dispatch.padded // REQUEST_ROWS, self._worker.model_runner
        if requests <= 1:
            self._worker.execute_dummy_batch()
        else:
            requests = min(requests, self._worker.vllm_config.scheduler_config.max_num_seqs)
            runner._dummy_run(requests * runner.decode_query_len, uniform_decode=True)


def help_between_calls() -> None:
    """Let a worker process whose engine has no request take part in rounds until the engine calls."""
    hooks.WORKER_LOOP.install(_help_and_execute)


def _help_and_execute(_: Callable, self: Any) -> None:
    calls = self.rpc_broadcast_mq
    while True:
        with watchdog.paused():
            self.worker.dwdp_help_until(lambda: _has_message(calls))
            call = calls.dequeue(indefinite=True)
        self._execute_worker_rpc(call)
        del call


def _has_message(queue: MessageQueue) -> bool:
    """Whether the queue's reader, in this process, would read at once."""
    with queue.buffer.get_metadata(queue.current_idx) as flags:
        return queue.shutting_down or bool(flags[0] and not flags[queue.local_reader_rank + 1])
