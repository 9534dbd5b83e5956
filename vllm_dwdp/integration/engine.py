"""Engine: that of one rank, which has no peers as far as vLLM knows, and keeps DWDP's peers waiting for nothing but its steps."""

import time
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreRequestType, core
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_dwdp.integration import remote, watchdog
from vllm_dwdp.meeting import look_s

LOOKS = frozenset(("is_scheduler_paused", "is_sleeping", "get_weight_version"))  # calls that the engine answers out of its own state


def make_independent(vllm_config: VllmConfig) -> int:
    """Tell an engine that it has no peers. Returns its rank; docs/operate.md lists who asks for size and rank."""
    parallel, multimodal = vllm_config.parallel_config, vllm_config.model_config.multimodal_config
    if multimodal is not None and parallel.data_parallel_size > 1 and not parallel.data_parallel_external_lb:
        multimodal.mm_processor_cache_gb = 0  # its front end sees several ranks, and keeps the cache to itself
    on_this_host = parallel.data_parallel_size_local
    parallel.reconfigure_for_independent_dp_rank()
    parallel.data_parallel_size_local = on_this_host  # by it threads are shared out
    return parallel.data_parallel_index


class IndependentEngineCore(core.EngineCoreProc):
    """Stands in for vLLM's DPEngineCoreProc."""

    def __init__(self, *args: Any, vllm_config: VllmConfig, engine_index: int | None = None, **kwargs: Any):
        rank = make_independent(vllm_config)
        super().__init__(*args, vllm_config=vllm_config, engine_index=rank if engine_index is None else engine_index, **kwargs)
        self._active_s = 0.0  # when this engine last had work or helped
        self._meets = False  # steps may dispatch
        self._expected: Any = None  # the future of telling peers of a step to come
        self._said_idle = False  # to peers, since the last step and call, though there are requests

    def process_output_sockets(self, output_paths: list[str], *args: Any, **kwargs: Any) -> None:
        if any(path.startswith("tcp:") for path in output_paths):  # a front end on another node cannot see this process
            remote.beat(self.output_queue, len(output_paths))
        super().process_output_sockets(output_paths, *args, **kwargs)

    def _process_input_queue(self) -> None:
        if self.has_work():
            self._active_s = time.monotonic()
        else:
            self._hear_of_telling()
            self._help_until_work()
        super()._process_input_queue()

    def _process_engine_step(self) -> bool:
        """Requests that no step can take yet, as while a grammar is compiled or KV arrives, keep no peer waiting."""
        executed = super()._process_engine_step()
        self._hear_of_telling()
        self._said_idle &= not executed
        if not executed and (isinstance(self.model_executor, UniProcExecutor) or self._may_say_idle()):
            self._help()
            self._said_idle = True
        return executed

    def _may_say_idle(self) -> bool:
        """Whether a worker in another process has yet to hear, which helps by itself from then on. Not beside a step that is under way."""
        under_way = any(step.total_num_scheduled_tokens for _, step, _ in self.batch_queue or ())
        return self._meets and not self._said_idle and not under_way

    def _hear_of_telling(self) -> None:
        """Peers have been told of the step that was to come, if they were to be. Raises what went wrong as they were."""
        expected, self._expected = self._expected, None
        if expected is not None:
            expected.result()

    def _handle_client_request(self, request_type: EngineCoreRequestType, request: Any) -> None:
        """Calls that are no requests may take long: peers do not count on this rank meanwhile. A look waits for no step.

        Of an idle rank's first request peers hear before its step is scheduled: of two that come at once neither waits for the
        other's step. Not while the scheduler is paused: then it is no work yet.
        """
        is_call, was_idle = request_type == EngineCoreRequestType.UTILITY, self._said_idle or not self.has_work()
        if is_call and request[2] in LOOKS:
            return super()._handle_client_request(request_type, request)
        if is_call:
            self.model_executor.collective_rpc("dwdp_leave")
            self._said_idle = False
        super()._handle_client_request(request_type, request)
        if is_call and not self.has_work():
            self._help()
        elif not is_call and self._meets and was_idle and self.has_work():
            self._said_idle = False
            self._expected = self.model_executor.collective_rpc("dwdp_expect", non_block=True)

    def _help(self) -> bool | None:
        """Let the worker take part in a round that asks for this rank: whether one did; None where no step dispatches."""
        helped: bool | None
        (helped,) = self.model_executor.collective_rpc("dwdp_help")
        self._meets = helped is not None
        return helped

    def _help_until_work(self) -> None:
        """Without a request, help the peers' rounds until one comes. A worker in another process does by itself."""
        if not isinstance(self.model_executor, UniProcExecutor):
            self._help()
            return
        self.process_input_queue_block = False
        with watchdog.paused():
            while not self.has_work() and self.is_running() and self.input_queue.empty() and not self._idle_state_callbacks:
                helped = self._help()
                if helped is None:
                    self.process_input_queue_block = True
                    return
                if helped:
                    self._active_s = time.monotonic()
                nap_s = look_s(time.monotonic() - self._active_s)
                with self.input_queue.not_empty:
                    if not self.input_queue.queue:
                        self.input_queue.not_empty.wait(nap_s)
