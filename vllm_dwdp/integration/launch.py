"""Engine: the launch side. A MoE model goes down vLLM's branch for independent data-parallel ranks.

vLLM runs the ranks of a dense model on their own and those of a MoE model in lockstep: waves, dummy batches, a process
group, a collective each step. The hooks below send a MoE model with DWDP the first way; a config without DWDP passes
through them unchanged.
"""

import functools
import inspect
import os
import time
from collections.abc import Callable
from typing import Any

import msgspec
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.engine import core
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_dwdp import config
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.integration import checks, graphs, hooks, joining

logger = init_logger("vllm.dwdp.launch")
WORKER = "vllm_dwdp.integration.worker.DWDPWorker"
# How often an idle rank looks whether a round asks for it: while rounds do and for some time after, and else.
HOT_LOOK_S, HOT_S, LOOK_S = 50e-6, 0.05, 2e-3
_WAVES, _LOCKSTEP = "enable_wave_coordination", "coordinated_dp"


def prepare(vllm_config: VllmConfig) -> None:
    """Check a config that has the switch on, and make its engines DWDP ranks. Raises DWDPError in one line."""
    options = config.parse(vllm_config.additional_config)
    if options is None:
        return
    import vllm

    checks.refuse_version(vllm.__version__, os.environ.get(checks.UNTESTED) == "1")
    parallel = vllm_config.parallel_config
    if options.size is None and parallel.data_parallel_size > 1:
        options = msgspec.structs.replace(options, size=parallel.data_parallel_size)
    checks.refuse_unsupported(vllm_config, options)
    if vllm_config.model_config.quantization == "gpt_oss_mxfp4" and vllm_config.kernel_config.moe_backend == "auto":
        vllm_config.kernel_config.moe_backend = "marlin"
        logger.info("DWDP chooses --moe-backend marlin for MXFP4: in other kernels' layouts an expert cannot be moved")
    options = msgspec.structs.replace(options, direct_max_tokens=graphs.direct_max_tokens(vllm_config, options))
    # JSON values that stay the same from start to start: vLLM hashes them into the compile cache's key.
    vllm_config.additional_config[config.KEY] = msgspec.to_builtins(options)
    parallel.worker_cls = WORKER
    if options.rendezvous is None and not checks.is_offline_rank(parallel):
        joining.give_token()
    install()


def install() -> None:
    """Put the launch hooks in place and make sure that they are."""
    for hook, wrapper in (
        (hooks.RUN_ENGINE_CORE, lambda _: run_engine_core),
        (hooks.COORDINATOR, _without(_WAVES)),
        (hooks.WAIT_FOR_STARTUP, _without(_LOCKSTEP)),
        (hooks.SYNC_CLIENT, _without_waves),
    ):
        hook.install(wrapper)
        hook.verify()
    _refuse_first()


def _refuse_first() -> None:
    """An engine core refuses what its worker would, before it pauses, aborts or forgets anything on the way there."""

    def wrapper(original: Callable) -> Callable:
        @functools.wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(original).bind(self, *args, **kwargs)
            given.apply_defaults()
            only_pauses = given.arguments.get("level") == 0
            if self.vllm_config.parallel_config.worker_cls == WORKER and not only_pauses:
                raise DWDPError(checks.REWRITING)
            return original(self, *args, **kwargs)

        return call

    for hook in (hooks.SLEEP, hooks.RELEASE_CACHE):
        hook.install(wrapper)
        hook.verify()


def _without(flag: str) -> Callable[[Callable], Callable]:
    """A wrapper that passes False for `flag` when the call's parallel_config is DWDP's."""

    def wrapper(original: Callable) -> Callable:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            if bound.arguments["parallel_config"].worker_cls == WORKER:
                bound.arguments[flag] = False
            return original(*bound.args, **bound.kwargs)

        return call

    return wrapper


def _without_waves(original: Callable) -> Callable:
    """A client of LLM's that does not wait for the end of a wave after its last answer: independent ranks have none."""

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.is_dp &= self.vllm_config.parallel_config.worker_cls != WORKER

    return init


class IndependentEngineCore(core.EngineCoreProc):
    """The engine of one DWDP rank: stands in for vLLM's DPEngineCoreProc, and has no peers as far as vLLM knows."""

    def __init__(self, *args: Any, vllm_config: VllmConfig, **kwargs: Any):
        rank = vllm_config.parallel_config.data_parallel_index
        vllm_config.parallel_config.reconfigure_for_independent_dp_rank()
        super().__init__(*args, vllm_config=vllm_config, engine_index=rank, **kwargs)
        self._active_s = 0.0  # when this engine last had work or helped

    def _process_input_queue(self) -> None:
        if self.has_work():
            self._active_s = time.monotonic()
        else:
            self._help_until_work()
        super()._process_input_queue()

    def _help_until_work(self) -> None:
        """Without a request, help the peers' rounds until one comes. A worker in another process does by itself."""
        if not isinstance(self.model_executor, UniProcExecutor):
            self.model_executor.collective_rpc("dwdp_help")
            return
        self.process_input_queue_block = False
        while not self.has_work() and self.is_running() and self.input_queue.empty() and not self._idle_state_callbacks:
            (helped,) = self.model_executor.collective_rpc("dwdp_help")
            if helped is None:
                self.process_input_queue_block = True
                return
            if helped:
                self._active_s = time.monotonic()
            quiet_s = time.monotonic() - self._active_s
            with self.input_queue.not_empty:
                if not self.input_queue.queue:
                    self.input_queue.not_empty.wait(HOT_LOOK_S if quiet_s < HOT_S else LOOK_S)


_run_engine_core = core.EngineCoreProc.run_engine_core


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """The engine process's entry point. A spawned child unpickles it by this module's name: it imports DWDP first."""
    if config.parse(kwargs["vllm_config"].additional_config) is None:
        return _run_engine_core(*args, **kwargs)
    _refuse_first()  # a spawned child has not been through `install`
    with hooks.LOCKSTEP_ENGINE.during(lambda _: IndependentEngineCore):
        _run_engine_core(*args, **kwargs)
