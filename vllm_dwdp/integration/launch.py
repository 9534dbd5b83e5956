"""Launch: the hooks that send a MoE model down vLLM's branch for independent data-parallel ranks.

vLLM runs the ranks of a dense model on their own and those of a MoE model in lockstep: waves, dummy batches, a process
group, a collective each step. The hooks below send a MoE model with DWDP the first way; a config without DWDP passes
through them unchanged.
"""

import functools
import inspect
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import msgspec
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.engine import coordinator, core

from vllm_dwdp import config, launcher
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.integration import checks, graphs, hooks, joining, remote
from vllm_dwdp.integration.engine import IndependentEngineCore
from vllm_dwdp.rendezvous import REPORT_S

logger = init_logger("vllm.dwdp.launch")
WORKER = "vllm_dwdp.integration.worker.DWDPWorker"
ENDED = 128 + signal.SIGTERM  # the status of an engine that a signal has ended
# What vLLM's executor says first, and no more, when its worker has ended; one that fails tells its error itself, and earlier.
WORKER_ENDED = ("Executor failed.", "cancelled", "WorkerProc initialization failed")
_WAVES, _LOCKSTEP = "enable_wave_coordination", "coordinated_dp"


def prepare(vllm_config: VllmConfig, chooses_graphs: bool) -> None:
    """Check a config that has the switch on, and make its engines DWDP ranks. Raises DWDPError in one line.

    `chooses_graphs` says that a person has set which sizes vLLM captures.
    """
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
    if options.graph_max_tokens is None:
        options = msgspec.structs.replace(options, graph_max_tokens=0 if chooses_graphs else graphs.MAX_TOKENS)
    options = msgspec.structs.replace(options, direct_max_tokens=graphs.direct_max_tokens(vllm_config, options))
    # JSON values that stay the same from start to start: vLLM hashes them into the compile cache's key.
    vllm_config.additional_config[config.KEY] = msgspec.to_builtins(options)
    parallel.worker_cls = WORKER
    if options.rendezvous is None and not checks.is_offline_rank(parallel):
        joining.give_token()
    install()
    remote.install(vllm_config)


def install() -> None:
    """Put the launch hooks in place. An engine on which they do not act says so: `worker.membership`."""
    hooks.RUN_ENGINE_CORE.install(instead=run_engine_core)
    hooks.RUN_COORDINATOR.install(instead=run_coordinator)
    hooks.COORDINATOR.install(functools.partial(_without, _WAVES))
    hooks.WAIT_FOR_STARTUP.install(functools.partial(_without, _LOCKSTEP))
    hooks.SYNC_CLIENT.install(_init_without_waves)
    _refuse_first()


def _refuse_first() -> None:
    """An engine core refuses what its worker would, before it pauses, aborts or forgets anything on the way there."""
    for hook in (hooks.SLEEP, hooks.RELEASE_CACHE):
        hook.install(_pause_at_most)


def _pause_at_most(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(original).bind(self, *args, **kwargs)
    given.apply_defaults()
    only_pauses = given.arguments.get("level") == 0
    if self.vllm_config.parallel_config.worker_cls == WORKER and not only_pauses:
        checks.refuse_rewriting()
    return original(self, *args, **kwargs)


def _without(flag: str, original: Callable, *args: Any, **kwargs: Any) -> Any:
    """Passes False for `flag` when the call's parallel_config is DWDP's."""
    given = inspect.signature(original).bind(*args, **kwargs)
    if given.arguments["parallel_config"].worker_cls == WORKER:
        given.arguments[flag] = False
    return original(*given.args, **given.kwargs)


def _init_without_waves(original: Callable, self: Any, *args: Any, **kwargs: Any) -> None:
    """A client of LLM's that does not wait for the end of a wave after its last answer: independent ranks have none."""
    original(self, *args, **kwargs)
    self.is_dp &= self.vllm_config.parallel_config.worker_cls != WORKER


class _Awaited:
    """A socket whose wait for an answer is bounded by `timeout_s` and says whom it waits for."""

    def __init__(self, socket: Any, whom: str, timeout_s: float):
        self._socket, self._whom, self._timeout_s = socket, whom, timeout_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def poll(self, timeout: float) -> int:
        """`timeout` is vLLM's, in milliseconds: the smaller counts. Raises DWDPError when it has passed."""
        start, end_s = time.monotonic(), min(self._timeout_s, timeout / 1e3)
        while (left_s := start + end_s - time.monotonic()) > 0:
            if answers := self._socket.poll(1e3 * min(left_s, REPORT_S)):
                return answers
            logger.info("DWDP %s (%.0f s so far)", self._whom, time.monotonic() - start)
        raise DWDPError(
            f"{self._whom}: no answer within {end_s:.0f} s; start that server, check --data-parallel-address and "
            f"--data-parallel-rpc-port, or raise --dwdp-startup-timeout-s"
        )


def _greet(
    options: config.Options, rank: int, original: Callable, socket: Any, local_client: bool, headless: bool, parallel_config: Any = None
) -> Any:
    """An engine waits for another node's front end no longer than for a peer."""
    if not local_client and parallel_config is not None:
        at = f"{parallel_config.data_parallel_master_ip}:{parallel_config.data_parallel_rpc_port}"
        socket = _Awaited(socket, f"rank {rank} waits for the server of rank 0 at {at}", options.startup_timeout_s)
    return original(socket, local_client, headless, parallel_config)


_run_engine_core = core.EngineCoreProc.run_engine_core
_run_coordinator = coordinator.DPCoordinatorProc.run_coordinator


def run_coordinator(*args: Any, **kwargs: Any) -> None:
    """The coordinator process's entry point: a launcher that is killed leaves none behind."""
    launcher.follow_parent()
    _run_coordinator(*args, **kwargs)


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """The engine process's entry point. A spawned child unpickles it by this module's name: it imports DWDP first."""
    if (options := config.parse(kwargs["vllm_config"].additional_config)) is None:
        return _run_engine_core(*args, **kwargs)
    launcher.follow_parent()
    _refuse_first()  # a spawned child has not been through `install`
    greet = functools.partial(_greet, options, kwargs["dp_rank"])
    try:
        with (hooks.START_HANDSHAKE.during(greet), hooks.LOCKSTEP_ENGINE.during(instead=IndependentEngineCore),
              hooks.ENGINE.during(instead=IndependentEngineCore)):  # the second of a rank that vLLM does not count
            _run_engine_core(*args, **kwargs)
    except SystemExit as end:  # a launcher that has not asked for it takes status 0 for an engine that nobody needs
        raise SystemExit(end.code or ENDED) from None
    except Exception as error:  # vLLM's own too: its launcher says no more than that there was one
        launcher.tell(_reason(error, kwargs["dp_rank"]))
        raise


def _reason(error: Exception, rank: int) -> Exception:
    if str(error).startswith(WORKER_ENDED):
        return DWDPError(f"the worker of rank {rank} has ended and said nothing: something killed it, or its host lacks memory; restart")
    return error
