"""Checks: what DWDP does not work with, said in one line before anything is loaded."""

from typing import Any

from vllm import envs
from vllm.config import KVTransferConfig, VllmConfig
from vllm.platforms import current_platform

from vllm_dwdp.config import Options
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.integration import joining
from vllm_dwdp.placement import Placement

TESTED_VLLM = ("0.32", "0.33")  # minor versions whose contract test passes
UNTESTED = "DWDP_ALLOW_UNTESTED_VLLM"
# MoE backends that fuse dispatch or replace RoutedExperts.
BYPASSING_BACKENDS = ("mega_moe", "moe_ep", "moonep")
# Parts of models' names, and why a forward of such a model is none that DWDP can stream.
MODELS = {
    "FlintForCausalLM": "its decode kernels read experts past the layer that waits for them",
    "Ernie4_5_VL": "its text and vision experts get rows of their own or none, where ranks run every layer on every row",
}
# Load formats that copy tensors as they were saved, past the loaders that keep a rank's share.
WHOLE_TENSORS = ("ipc_cache", "modelexpress", "runai_streamer_sharded", "sharded_state", "tensorizer")
# The workers that DWDP's extends, and its own, which a config may have from before.
WORKERS = (
    "vllm.v1.worker.cpu_worker.CPUWorker", "vllm.v1.worker.gpu_worker.Worker", "vllm_dwdp.integration.worker.DWDPWorker",
)
EXECUTORS = (None, "mp", "uni")
REWRITING = (
    "DWDP ranks map each other's experts and stream them through slots: they cannot be saved, moved, loaded or rewritten "
    "while the group serves; restart it instead"
)


def refuse_rewriting(*args: Any, **kwargs: Any) -> Any:
    """Stands in for whatever of vLLM's would write, move or save experts. Raises DWDPError."""
    raise DWDPError(REWRITING)


def refuse_version(version: str, allow_untested: bool) -> None:
    """Raises DWDPError for a vLLM whose hooks were not tested."""
    if not allow_untested and ".".join(version.split(".")[:2]) not in TESTED_VLLM:
        raise DWDPError(
            f"vLLM {version} is not one that vllm-dwdp was tested with ({', '.join(TESTED_VLLM)}): install one of "
            f"those, or set {UNTESTED}=1 to try"
        )


def refuse_unsupported(vllm_config: VllmConfig, options: Options) -> None:
    """Raises DWDPError naming the first setting that DWDP cannot serve and what to change."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    name = model.model
    if not model.is_moe:
        raise DWDPError(f"{name} has no MoE layers: there are no experts to stream; drop --parallel dwdp")
    if options.size is None or options.size < 2:
        raise DWDPError("--parallel dwdp needs at least two ranks: set --data-parallel-size to 2 or more")
    if parallel.data_parallel_size not in (1, options.size):
        raise DWDPError(
            f"--dwdp-size {options.size} differs from --data-parallel-size {parallel.data_parallel_size}: the group is "
            f"vLLM's data-parallel ranks; drop --dwdp-size, which is for ranks that vLLM does not count"
        )
    if options.rank is not None and parallel.data_parallel_size > 1:
        raise DWDPError(
            f"--dwdp-rank {options.rank} with --data-parallel-size {parallel.data_parallel_size}: it is for ranks that vLLM "
            f"does not count, and would give every engine of this command that rank; drop it"
        )
    most = vllm_config.scheduler_config.max_num_batched_tokens // options.size
    if (options.dispatch_max_tokens or 0) > most:
        raise DWDPError(
            f"--dwdp-dispatch-max-tokens {options.dispatch_max_tokens} is above --max-num-batched-tokens over {options.size} "
            f"ranks: a round brings so many tokens of every rank together; lower it to {most}, raise that, or leave it to DWDP"
        )
    if model.get_num_experts() > 0:
        Placement(num_experts=model.get_num_experts(), size=options.size, experts_per_rank=options.experts_per_rank)
    offload, load = vllm_config.offload_config, vllm_config.load_config
    engram, speculative = getattr(vllm_config, "engram_config", None), vllm_config.speculative_config
    for refused, reason in (
        (not (current_platform.is_cuda() or current_platform.is_cpu()),
         f"vLLM for {current_platform.device_name}: peers' experts are mapped by CUDA's virtual memory; drop --parallel dwdp"),
        (vllm_config.is_mm_encoder_only,
         "--mm-encoder-only, or an --ec-transfer-config that only produces: no experts run there; drop --parallel dwdp"),
        (parallel.tensor_parallel_size > 1,
         f"--tensor-parallel-size {parallel.tensor_parallel_size}: a DWDP rank is one GPU; set it to 1"),
        (parallel.pipeline_parallel_size > 1,
         f"--pipeline-parallel-size {parallel.pipeline_parallel_size}: a DWDP rank runs every layer; set it to 1"),
        (parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1,
         "context parallelism: a DWDP rank computes its own tokens alone; drop it"),
        (parallel.enable_expert_parallel,
         "--enable-expert-parallel: DWDP takes its place; choose one"),
        (parallel.enable_eplb, "--enable-eplb: it moves experts between ranks, which peers have mapped; drop it"),
        (parallel.enable_elastic_ep, "--enable-elastic-ep: peers map each other's memory for good; drop it"),
        (parallel.use_ubatching,
         "--enable-dbo or --ubatch-size: a step in parts runs each layer several times, with nothing to overlap; drop it"),
        (parallel.enable_fault_tolerance,
         "--enable-fault-tolerance: a rank that is scaled away takes experts along which its peers read; drop it"),
        (parallel.distributed_executor_backend not in EXECUTORS,
         f"--distributed-executor-backend {parallel.distributed_executor_backend}: a DWDP rank is one worker; use mp or "
         f"uni"),
        (parallel.worker_cls not in WORKERS,
         f"--worker-cls {parallel.worker_cls}: DWDP puts its own worker there; drop it, or add to DWDP's by "
         f"--worker-extension-cls"),
        (str(load.load_format) in WHOLE_TENSORS,
         f"--load-format {load.load_format}: it copies tensors of all experts at once; load the model's own checkpoint"),
        (is_offline_rank(parallel) and not envs.VLLM_ENABLE_V1_MULTIPROCESSING,
         "VLLM_ENABLE_V1_MULTIPROCESSING=0 and VLLM_DP_SIZE together: in one process vLLM keeps such ranks in lockstep; "
         "drop one; without VLLM_DP_SIZE give each rank size, rank and rendezvous"),
        (envs.VLLM_USE_RUST_FRONTEND and has_remote_engines(parallel),
         "VLLM_USE_RUST_FRONTEND=1 and ranks on other nodes: that front end ends at a rank's sign of life; drop it, or give "
         "every node a server with --data-parallel-hybrid-lb"),
        (parallel.data_parallel_backend == "ray",
         "--data-parallel-backend ray: only the default backend (mp) starts independent ranks here; drop it"),
        (model.enable_sleep_mode or model.enable_cumem_allocator,
         "--enable-sleep-mode / cumem allocator: it would move weights that peers have mapped; drop it"),
        (vllm_config.scheduler_config.prefill_schedule_interval > 1,
         "--prefill-schedule-interval: it holds prompts back so that those of all ranks come together, for which no rank waits here; "
         "drop it"),
        (vllm_config.cache_config.kv_sharing_fast_prefill,
         "--kv-sharing-fast-prefill: its last layers run fewer tokens, and a forward has one view; drop it"),
        (getattr(speculative, "enable_adaptive_verification", False),
         "enable_adaptive_verification in --speculative-config: it takes tokens out of a step that ranks have agreed on; "
         "set it to false"),
        (speculative is not None and speculative.use_ngram_gpu() and not vllm_config.use_v2_model_runner,
         "ngram_gpu in --speculative-config: vLLM's older runner takes tokens out of a step that ranks have agreed on; use ngram, or "
         "drop VLLM_USE_V2_MODEL_RUNNER=0"),
        (vllm_config.lora_config is not None,
         "--enable-lora: adapters wrap the expert layers that are streamed; drop it"),
        (vllm_config.weight_transfer_config is not None,
         "weight transfer: it would rewrite weights that peers have mapped; drop it"),
        (offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0,
         "weight offloading: expert weights already come from peers; drop the offload options"),
        (any(part in str(vllm_config.kernel_config.moe_backend) for part in BYPASSING_BACKENDS),
         f"--moe-backend {vllm_config.kernel_config.moe_backend}: it bypasses RoutedExperts; use auto or triton"),
        (parallel.data_parallel_size > 1 and "MoRIIOConnector" in _connectors(vllm_config.kv_transfer_config),
         "--kv-transfer-config with MoRIIOConnector: it numbers ports by a data-parallel rank, which is 0 in every "
         "independent engine; start each rank with --dwdp-size and --dwdp-rank, and ports of its own"),
        (engram is not None and (engram.dp_shared_memory or engram.embedding_across_dp),
         "an Engram table that data-parallel ranks share (dp_shared_memory, embedding_across_dp): each rank is an "
         "engine of its own; set both to false in --engram-config"),
        *((part in architecture, f"{architecture}: {why}; serve it without --parallel dwdp")
          for architecture in model.architectures for part, why in MODELS.items()),
    ):
        if refused:
            raise DWDPError(f"--parallel dwdp does not go with {reason}")
    if options.rendezvous is None and _ranks_start_apart(parallel):
        raise DWDPError(
            "ranks started by separate commands need a meeting point: give every one the same "
            "--dwdp-rendezvous HOST:PORT, a free port on rank 0's host"
        )
    if parallel.data_parallel_size == 1 and options.rank is None:
        raise DWDPError(
            "an engine started as one rank of a DWDP group must be told which: set --dwdp-rank, or rank in additional_config"
        )


def _connectors(transfer: KVTransferConfig | None) -> set[str | None]:
    """The names of a KV transfer's connector and of those inside it."""
    if transfer is None:
        return set()
    inside = transfer.kv_connector_extra_config.get("connectors", [])
    return {transfer.kv_connector, *(each.get("kv_connector") for each in inside)}


def _ranks_start_apart(parallel) -> bool:
    return not is_offline_rank(parallel) and not joining.are_together() and (
        parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb
        or parallel.data_parallel_size_local < parallel.data_parallel_size or parallel.data_parallel_size == 1
    )


def has_remote_engines(parallel) -> bool:
    """Whether this server's requests go to engines of another launcher, too."""
    is_alone = parallel.local_engines_only or is_offline_rank(parallel)
    return parallel.data_parallel_size_local < parallel.data_parallel_size and not is_alone


def is_offline_rank(parallel) -> bool:
    """Whether this process was told by VLLM_DP_RANK and friends which rank it is: no launcher starts the others."""
    return parallel.data_parallel_size > 1 and parallel.data_parallel_rank_local is not None
