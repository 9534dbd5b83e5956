"""Hooks: every attribute of vLLM that is replaced, how it is replaced, and how it is known that the replacement took."""

import contextlib
import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from vllm_dwdp.errors import DWDPError

_MARK = "_dwdp_hook"


@dataclasses.dataclass(frozen=True)
class Hook:
    """An attribute of vLLM, `module`.`path`, where `path` is a name or Class.name.

    `parameters` are those of the original that the replacement relies on.
    """

    module: str
    path: str
    parameters: tuple[str, ...] = ()

    def install(self, around: Callable[..., Any] | None = None, *, instead: Any = None) -> None:
        """Have `around(original, ...)` called, or `instead`, in the attribute's place, once, for the life of the process.

        Raises DWDPError naming the attribute when it is gone or takes other parameters.
        """
        if not self._is_installed():
            self._replace(around, instead)

    @contextlib.contextmanager
    def during(self, around: Callable[..., Any] | None = None, *, instead: Any = None) -> Iterator[None]:
        """`install` while the body runs. Raises DWDPError as that does, and where the body has replaced the attribute in turn."""
        owner, name = self._locate()
        original = inspect.getattr_static(owner, name)
        self._replace(around, instead)
        try:
            yield
            if not self._is_installed():
                raise DWDPError(
                    f"hook {self.path} did not take: another plugin has replaced it; DWDP stops rather than run without"
                )
        finally:
            setattr(owner, name, original)

    def _is_installed(self) -> bool:
        owner, name = self._locate()
        return _MARK in vars(getattr(owner, name))

    def _replace(self, around: Callable[..., Any] | None, instead: Any) -> None:
        owner, name = self._locate()
        original = getattr(owner, name)
        accepted = inspect.signature(original).parameters
        variadic = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        if absent := [p for p in self.parameters if p not in accepted and not variadic]:
            raise DWDPError(
                f"vLLM's {self.module}.{self.path} no longer takes {', '.join(absent)}: this vLLM is not supported"
            )
        hooked = instead if around is None else _wrapped(original, around)
        setattr(hooked, _MARK, True)
        is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
        setattr(owner, name, staticmethod(hooked) if is_static else hooked)

    def _locate(self) -> tuple[Any, str]:
        owner: Any = importlib.import_module(self.module)
        *classes, name = self.path.split(".")
        try:
            for part in classes:
                owner = getattr(owner, part)
            getattr(owner, name)
        except AttributeError:
            raise DWDPError(f"vLLM has no {self.module}.{self.path}: this vLLM is not supported") from None
        return owner, name


def _wrapped(original: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    return hooked


_ARGUMENTS, _CORE, _UTILS = "vllm.engine.arg_utils", "vllm.v1.engine.core", "vllm.v1.engine.utils"
_CLIENT = "vllm.v1.engine.core_client"
_GPT_OSS = "vllm.model_executor.models.gpt_oss"

ADD_CLI_ARGS = Hook(_ARGUMENTS, "EngineArgs.add_cli_args", ("parser",))
CREATE_ENGINE_CONFIG = Hook(_ARGUMENTS, "EngineArgs.create_engine_config", ("self",))
RUN_ENGINE_CORE = Hook(_CORE, "EngineCoreProc.run_engine_core", ("dp_rank", "vllm_config"))
LOCKSTEP_ENGINE = Hook(_CORE, "DPEngineCoreProc", ("vllm_config",))
ENGINE = Hook(_CORE, "EngineCoreProc", ("vllm_config", "engine_index"))
COORDINATOR = Hook(_UTILS, "DPCoordinator", ("parallel_config", "enable_wave_coordination"))
WAIT_FOR_STARTUP = Hook(_UTILS, "wait_for_engine_startup", ("parallel_config", "coordinated_dp"))
SLEEP = Hook(_CORE, "EngineCore.sleep", ("self", "level"))
RELEASE_CACHE = Hook(_CORE, "EngineCore.release_kv_cache_memory", ("self",))
RUN_COORDINATOR = Hook("vllm.v1.engine.coordinator", "DPCoordinatorProc.run_coordinator", ("engine_count",))
RUN_HEADLESS = Hook("vllm.entrypoints.cli.serve", "run_headless", ("args",))
SUPERVISE = Hook("vllm.entrypoints.launchers.dp_supervisor", "DPSupervisor.run", ("self",))
START_HANDSHAKE = Hook(_CORE, "EngineCoreProc.startup_handshake", ("local_client",))
SYNC_CLIENT = Hook(_CLIENT, "SyncMPClient.__init__", ("vllm_config",))
CHOOSE_ENGINE = Hook(_CLIENT, "DPLBAsyncMPClient.get_core_engine_for_request", ("self", "request"))
ENGINE_OUTPUTS = Hook(_CLIENT, "DPLBAsyncMPClient.process_engine_outputs", ("self", "outputs"))
CALL_UTILITY = Hook(_CLIENT, "AsyncMPClient._call_utility_async", ("self", "method", "engine"))
GENERATE = Hook("vllm.v1.engine.async_llm", "AsyncLLM.generate", ("self",))
ENCODE = Hook("vllm.v1.engine.async_llm", "AsyncLLM.encode", ("self",))
WORKER_LOOP = Hook("vllm.v1.executor.multiproc_executor", "WorkerProc.worker_busy_loop", ("self",))
CHOOSE_GRAPH = Hook(
    "vllm.v1.worker.gpu.model_runner", "dispatch_cg_and_sync_dp",
    ("num_reqs", "num_tokens", "uniform_token_count", "max_query_len", "need_eager"),
)
BUILD_EXPERTS = Hook(
    "vllm.model_executor.layers.fused_moe.routed_experts", "RoutedExperts.__init__", ("moe_config", "expert_map_manager")
)
SELECT_FILES = Hook(
    "vllm.model_executor.model_loader.default_loader", "DefaultModelLoader._init_ep_weight_filter", ("model_config",)
)
LOAD_GPT_OSS = Hook(_GPT_OSS, "GptOssModel.load_weights", ("weights",))
LOAD_GPT_OSS_MXFP4 = Hook(_GPT_OSS, "GptOssModel._load_weights_mxfp4", ("self",))

HOOKS = tuple(value for value in globals().values() if isinstance(value, Hook))
