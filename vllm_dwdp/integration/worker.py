"""Worker: vLLM's worker of the running platform, which loads a shard and then shares memory with its peers.

vLLM resolves `DWDPWorker` by name in each engine; nothing else in an engine process is touched once a model is loaded.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Sized
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.offloader import set_offloader
from vllm.platforms import current_platform

from vllm_dwdp import assembly, config, descriptors, launcher
from vllm_dwdp.budget import MemoryLimit
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.integration import binding, checks, dispatching, helping, joining, loading, metrics
from vllm_dwdp.integration.graphs import GraphHooks, fit_graphs
from vllm_dwdp.kernels.device import Device
from vllm_dwdp.rendezvous import Group

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

logger = init_logger("vllm.dwdp.worker")
HELP_S = 0.01  # between looks whether a member has stayed away from a round


def _telling(method: Callable) -> Callable:
    """An error is told to the launcher: an executor in another process passes on less."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            launcher.tell(error)
            raise

    return call


class DWDPWorker(PlatformWorker):
    """One rank. `dwdp` is set once the model is loaded."""

    dwdp: assembly.StreamedModel
    _group: Group
    _is_idle = False  # the engine has no request

    @_telling
    def load_model(self, **kwargs: Any) -> None:
        """Meet the peers, load this rank's shard, share it, and fill the first slots.

        Raises DWDPError when a peer differs, fails or does not come, or when memory does not suffice.
        """
        if launcher.launcher() != os.getpid():  # else this is a person's own process, with the engine inside
            launcher.follow_parent()
        options, rank, size = membership(self.vllm_config)
        device = make_device(self.device)
        self._group = group = joining.connect(self.vllm_config, options, rank, size)
        with group.reporting(), descriptors.named():
            joining.meet(group, self.vllm_config, options, device)
            cache = self.vllm_config.cache_config
            limit = MemoryLimit(
                gpu_memory_utilization=cache.gpu_memory_utilization, kv_cache_memory_bytes=cache.kv_cache_memory_bytes
            )
            with loading.sharded(
                rank, size, options.experts_per_rank,
                before_reading=lambda shards: loading.refuse_oversize(shards, rank, device, options, limit),
                gather=group.gather,
            ) as shards:
                super().load_model(**kwargs)
            loading.refuse_bypass(shards, self.model_config)
            model, draft = self.model_runner.get_model(), draft_model(self.model_runner)
            own, drafts = {id(module) for module in model.modules()}, self.vllm_config.speculative_config is not None
            layers = [
                loading.describe(layer, placement, rank, is_draft=drafts and id(layer) not in own)
                for layer, placement in shards.items()
            ]
            loaded = assembly.Loaded(
                layers=sorted(layers, key=lambda layer: layer.is_draft),
                samples=loading.samples(model, shards, rank) if joining.reads_checkpoint(self.vllm_config) else {},
            )
            decode_tokens = getattr(self.model_runner, "decode_query_len", 1)  # vLLM's older runner has no graphs that dispatch
            steps = dispatching.limits(self.vllm_config, options, device, loaded.layers, decode_tokens)
            self.dwdp = assembly.assemble(loaded, group, device, options, limit, steps)
            try:
                binding.bind(self.dwdp)
                for part in (model, draft):
                    binding.keep_opaque(part)
                    binding.refuse_loading(part)
                self.model_runner.reload_weights = checks.refuse_rewriting
                self.dwdp.start()
                group.settle()
            except BaseException:
                self.dwdp.close()
                raise
        prefetcher = self.dwdp.prefetcher
        fit_graphs(self.vllm_config, prefetcher.direct_max_tokens)
        set_offloader(GraphHooks(prefetcher))
        if self.dwdp.dispatch is not None:
            called = self.vllm_config.compilation_config.static_forward_context.values()
            self.dwdp.dispatch.help_out = helping.Helper(self, self.dwdp.dispatch, called)
            dispatching.fit_to_round(self.vllm_config, self.dwdp.dispatch)
            helping.help_between_calls()
        self._end_metrics = metrics.export(self.dwdp)

    def compile_or_warm_up_model(self) -> Any:
        dispatch = self.dwdp.dispatch
        if dispatch is not None and not current_platform.is_cpu():
            most = self.vllm_config.scheduler_config.max_num_seqs * self.vllm_config.model_config.max_model_len
            dispatch.rehearse(self.model_runner._dummy_run, most)  # before vLLM watches for kernels that are compiled late
        times = super().compile_or_warm_up_model()
        if dispatch is not None:
            dispatch.meets = True
        return times

    @_telling
    def execute_model(self, scheduler_output: Any) -> Any:
        num_tokens, dispatch = scheduler_output.total_num_scheduled_tokens, self.dwdp.dispatch
        if not num_tokens:
            return super().execute_model(scheduler_output)
        self._is_idle = False
        is_ready = not (
            scheduler_output.scheduled_encoder_inputs or scheduler_output.has_sync_kv_loads
            or _asks_for_something(scheduler_output.ec_connector_metadata)
        )
        dispatched = dispatch is not None and dispatch.begin_step(num_tokens, is_ready=is_ready)
        # Where a request decodes several tokens, vLLM may pad a batch to a graph larger than the next captured size.
        exact = self.vllm_config.speculative_config is None
        self.dwdp.prefetcher.begin_step(num_tokens, exact=exact, dispatched=dispatched)
        output = super().execute_model(scheduler_output)
        self.dwdp.prefetcher.end_step(num_tokens)
        if dispatch is not None:
            dispatch.end_step()
        return self._checked(output)

    @_telling
    def sample_tokens(self, grammar_output: Any) -> Any:
        return self._checked(super().sample_tokens(grammar_output))

    @_telling
    def dwdp_help(self) -> bool | None:
        """No request: take part in a round of the peers', if one asks for this rank.

        Returns whether one did; None where no step dispatches.
        """
        if self.dwdp.dispatch is None:
            return None
        self._is_idle = True
        return self.dwdp.dispatch.help()

    @_telling
    def dwdp_expect(self) -> None:
        """The idle engine has a request: its step comes soon."""
        self._is_idle = False
        if self.dwdp.dispatch is not None:
            self.dwdp.dispatch.expect()

    @_telling
    def dwdp_leave(self) -> None:
        """A call that is no step comes: peers do not count on this rank until its engine has a step, or asks it to help."""
        self._is_idle = False
        if self.dwdp.dispatch is not None:
            self.dwdp.dispatch.leave()

    @_telling
    def dwdp_help_until(self, wake: Callable[[], bool]) -> None:
        """While the engine has no request, take part in the peers' rounds, until `wake()`."""
        dispatch = self.dwdp.dispatch
        while dispatch is not None and self._is_idle and not wake():
            dispatch.help(HELP_S, wake)

    def _checked(self, output: Any) -> Any:
        """What a step returns, tokens or a pooling model's embeddings; None where they are sampled later."""
        dispatch = self.dwdp.dispatch
        return output if dispatch is None or output is None else dispatching.checked(output, dispatch)

    def profile(self, is_start: bool = True, profile_prefix: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Into files with this rank in their names: for vLLM every rank is rank 0."""
        own = f"dwdp{self._group.rank}"
        super().profile(is_start, f"{profile_prefix}_{own}" if profile_prefix else own, *args, **kwargs)

    def dwdp_stats(self) -> dict[str, Any]:
        """Memory by kind (bytes), bytes prefetched, forwards by view, exposed wait and copy time (ms), refills."""
        return self.dwdp.stats()

    def shutdown(self) -> None:
        with contextlib.ExitStack() as ending:
            ending.callback(super().shutdown)
            if hasattr(self, "dwdp"):
                ending.callback(self._group.close)
                ending.callback(self.dwdp.close)
                with contextlib.suppress(Exception):  # of an engine that ends for an error
                    self.dwdp_leave()
                    self._end_metrics()

    reload_weights = start_weight_update = update_weights = reset_weights = compute_weight_checksums = checks.refuse_rewriting
    save_sharded_state = save_tensorized_model = sleep = wake_up = discard = checkpoint_prepare = add_lora = checks.refuse_rewriting


def _asks_for_something(transfer: Any) -> bool:
    """Whether an encoder cache's transfer, which each connector describes in its own words, has anything to do in a step."""
    def is_something(value: Any) -> bool:
        return len(value) > 0 if isinstance(value, Sized) else value is not None and value is not False

    return transfer is not None and any(map(is_something, getattr(transfer, "__dict__", {"unknown": True}).values()))


def membership(vllm_config: VllmConfig) -> tuple[config.Options, int, int]:
    """This engine's options, its rank and the group's size. Raises DWDPError when vLLM did not start it as an independent rank."""
    options = config.parse(vllm_config.additional_config)
    parallel = vllm_config.parallel_config
    if options is None or options.size is None:
        raise DWDPError("hook create_engine_config did not take: the engine was started without DWDP's group size")
    if parallel.data_parallel_size != 1:
        raise DWDPError(
            f"hook run_engine_core or wait_for_engine_startup did not take: this engine is one of "
            f"{parallel.data_parallel_size} coordinated ranks, DWDP ranks are independent"
        )
    rank = parallel.data_parallel_index if options.rank is None else options.rank
    if not rank < options.size:
        raise DWDPError(f"rank={rank} is outside the group of size={options.size}: ranks count from 0")
    return options, rank, options.size


def draft_model(runner: Any) -> torch.nn.Module:
    """The model that proposes tokens, in vLLM's older runner or its newer one; empty where none does."""
    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    model = getattr(drafter, "model", None)
    return model if isinstance(model, torch.nn.Module) else torch.nn.Module()


def make_device(device: torch.device) -> Device:
    if device.type == "cpu":
        from vllm_dwdp.kernels.host import HostDevice

        return HostDevice()
    from vllm_dwdp.kernels.cuda import CudaDevice

    return CudaDevice(device.index or 0)
