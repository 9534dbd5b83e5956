"""Helping: an idle rank's worker looks for peers' rounds between its engine's calls, and runs forwards whose rows are nobody's.

Such a forward is there for the experts. Its attention is left out wherever vLLM calls it from Python, which is in all graphs but those
of whole decode steps: launching it takes the host as long as the device needs for a layer's experts, and a peer waits for both.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.model_executor.layers.attention import Attention, MLAAttention

from vllm_dwdp.dispatch import Dispatch
from vllm_dwdp.integration import hooks, watchdog

REQUEST_ROWS = 128  # of each request of a forward in a graph


class Helper:
    """What a worker runs for its peers: called, a forward of rows that are nobody's."""

    def __init__(self, worker: Any, dispatch: Dispatch, layers: Iterable[object]):
        """`layers` are vLLM's: attention among them writes zeros [rows, ...] in such forwards and leaves the KV cache as it is.

        Other operators that keep a state, such as linear attention, run as ever.
        """
        self._worker, self._dispatch, self._is_helping = worker, dispatch, False
        for layer in layers:
            if isinstance(layer, MLAAttention):
                layer.forward_impl = self._zeros(layer.forward_impl)
                layer.update_kv_cache = self._nothing(layer.update_kv_cache)
            elif isinstance(layer, Attention):
                layer.impl.forward = self._zeros(layer.impl.forward)
                if hasattr(layer.impl, "do_kv_cache_update"):
                    layer.impl.do_kv_cache_update = self._nothing(layer.impl.do_kv_cache_update)

    def __call__(self) -> None:
        """As requests of few rows where it is more than that: those of one would be laid out like a long prompt's."""
        self._is_helping = True
        try:
            self._forward()
        finally:
            self._is_helping = False

    def _forward(self) -> None:
        requests, runner = self._dispatch.padded // REQUEST_ROWS, self._worker.model_runner
        if requests <= 1:
            self._worker.execute_dummy_batch()
        else:
            requests = min(requests, self._worker.vllm_config.scheduler_config.max_num_seqs)
            runner._dummy_run(requests * runner.decode_query_len, uniform_decode=True)

    def _zeros(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, output: torch.Tensor, **kwargs: Any) -> Any:
            return output.zero_() if self._is_helping else original(*args, output=output, **kwargs)

        return forward

    def _nothing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def update(*args: Any, **kwargs: Any) -> Any:
            return None if self._is_helping else original(*args, **kwargs)

        return update


def help_between_calls() -> None:
    """Let a worker process whose engine has no request take part in rounds until the engine calls."""

    def wrapper(_: Callable) -> Callable:
        def worker_busy_loop(self: Any) -> None:
            calls = self.rpc_broadcast_mq
            while True:
                with watchdog.paused():
                    self.worker.dwdp_help_until(lambda: _has_message(calls))
                    call = calls.dequeue(indefinite=True)
                self._execute_worker_rpc(call)
                del call

        return worker_busy_loop

    hooks.WORKER_LOOP.install(wrapper)
    hooks.WORKER_LOOP.verify()


def _has_message(queue: MessageQueue) -> bool:
    """Whether the queue's reader, in this process, would read at once."""
    with queue.buffer.get_metadata(queue.current_idx) as flags:
        return queue.shutting_down or bool(flags[0] and not flags[queue.local_reader_rank + 1])
