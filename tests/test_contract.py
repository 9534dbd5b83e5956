"""Invariant: the installed vLLM has every class, function, attribute and parameter that the plugin touches.

A new vLLM that moves one fails here by name, and is refused at start-up until `checks.TESTED_VLLM` lists it.
"""

import ast
import importlib.util
import inspect
import itertools
import re
from pathlib import Path

import pytest
import torch
import vllm
from vllm import envs
from vllm.config import CacheConfig

from vllm_dwdp.entrypoints.plan import memory
from vllm_dwdp.integration import checks, hooks, launch, loading, proof

from conftest import ROOT

CORE = "vllm.v1.engine.core:"
MOE, CONFIG = "vllm.model_executor.layers.fused_moe.", "vllm.config:"
WORKER, QUANTIZATION = "vllm.v1.worker.gpu_worker:Worker.", "vllm.model_executor.layers.quantization."

# What is called, and the parameters that are given.
CALLED = {
    CORE + "EngineCoreProc.__init__": "vllm_config engine_index",
    CORE + "EngineCoreProc.process_output_sockets": "output_paths",
    CORE + "EngineCoreProc.is_running": "self",
    CONFIG + "CUDAGraphMode.mixed_mode": "self",
    CONFIG + "SpeculativeConfig.uses_dynamic_speculative_decoding": "self",
    CONFIG + "SpeculativeConfig.use_ngram_gpu": "self",
    MOE + "experts.triton_moe:TritonExperts.apply": "topk_ids expert_map",
    MOE + "experts.marlin_moe:MarlinExperts.apply": "topk_ids expert_map",
    MOE + "fused_moe_method_base:FusedMoEMethodBase.process_weights_after_loading": "layer",
    "vllm.distributed.device_communicators.shm_broadcast:MessageQueue.dequeue": "indefinite",
    "vllm.distributed.device_communicators.shm_broadcast:ShmRingBuffer.get_metadata": "current_idx",
    "vllm.v1.executor.multiproc_executor:WorkerProc._execute_worker_rpc": "self",
    "vllm.v1.worker.worker_base:WorkerBase.get_model": "self",
    "vllm.v1.worker.gpu_worker:Worker.execute_dummy_batch": "self",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner._dummy_run": "num_tokens",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._dummy_run": "num_tokens",
    WORKER + "profile": "is_start profile_prefix",
    CONFIG + "ParallelConfig.reconfigure_for_independent_dp_rank": "self",
    CONFIG + "ModelConfig.get_num_experts": "self",
    CONFIG + "ModelConfig.get_num_experts_per_tok": "self",
    CONFIG + "CompilationConfig.post_init_cudagraph_sizes": "self",
    MOE + "routed_experts:RoutedExperts.__init__": "layer_name params_dtype moe_config expert_map_manager",
    MOE + "routed_experts:RoutedExperts.forward_modular": "x topk_ids",
    MOE + "routed_experts:RoutedExperts.forward_monolithic": "x",
    MOE + "fused_moe_method_base:FusedMoEMethodBase.get_fused_moe_quant_config": "layer",
    MOE + "modular_kernel:FusedMoEKernel.__init__": "prepare_finalize fused_experts",
    MOE + "modular_kernel:FusedMoEExperts.__init__": "moe_config quant_config",
    "vllm.model_executor.offloader:set_offloader": "instance",
    "vllm.model_executor.offloader:BaseOffloader.sync_prev_onload": "self",
    "vllm.model_executor.offloader:BaseOffloader.join_after_forward": "self",
    "vllm.model_executor.offloader:BaseOffloader.wrap_modules": "modules_generator prefix",
    "vllm.v1.executor.uniproc_executor:UniProcExecutor.collective_rpc": "method args non_block",
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor.collective_rpc": "method args non_block",
    "vllm.v1.executor.multiproc_executor:FutureWrapper.result": "self",
    CORE + "EngineCoreProc.has_work": "self",
    "vllm.v1.worker.cpu_worker:CPUWorker.load_model": "self",
    "vllm.v1.worker.cpu_worker:CPUWorker.execute_model": "scheduler_output",
    "vllm.v1.worker.cpu_worker:CPUWorker.shutdown": "self",
    "vllm.v1.worker.cpu_worker:CPUWorker.sample_tokens": "grammar_output",
    WORKER + "sample_tokens": "grammar_output",
    "vllm.v1.outputs:AsyncModelRunnerOutput.get_output": "self",
    "vllm.v1.attention.backend:AttentionImpl.forward": "output",
    "vllm.model_executor.layers.attention:MLAAttention.forward_impl": "output",
    "vllm.model_executor.layers.attention:MLAAttention.update_kv_cache": "kv_cache",
    WORKER + "load_model": "self",
    WORKER + "execute_model": "scheduler_output",
    WORKER + "shutdown": "self",
    **{WORKER + name: "self" for name in (
        "reload_weights", "start_weight_update", "update_weights", "reset_weights", "compute_weight_checksums", "sleep",
        "save_sharded_state", "save_tensorized_model", "wake_up", "discard", "checkpoint_prepare", "add_lora",
    )},
}
# Attributes that are read or set, by the class whose body or constructor names them; `test_all_that_is_touched_is_listed` finds others.
ATTRIBUTES = {
    CONFIG + "VllmConfig": "model_config parallel_config cache_config kernel_config offload_config lora_config "
                           "is_mm_encoder_only scheduler_config "
                           "kv_transfer_config speculative_config weight_transfer_config compilation_config load_config additional_config "
                           "use_v2_model_runner engram_config",
    "vllm.config.engram:EngramConfig": "dp_shared_memory embedding_across_dp",
    "vllm.config.kv_transfer:KVTransferConfig": "kv_connector kv_connector_extra_config",
    CORE + "EngineCoreProc": "batch_queue input_queue output_queue engine_index process_input_queue_block _idle_state_callbacks "
                             "scheduler model_executor vllm_config",
    "vllm.distributed.device_communicators.shm_broadcast:MessageQueue": "buffer current_idx local_reader_rank shutting_down",
    "vllm.v1.executor.multiproc_executor:WorkerProc": "rpc_broadcast_mq",
    "vllm.entrypoints.launchers.dp_supervisor:DPSupervisor": "_processes",
    "vllm.v1.engine:EngineCoreOutput": "stop_reason",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": "speculator decode_query_len",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": "drafter",
    CONFIG + "ParallelConfig": "worker_cls tensor_parallel_size pipeline_parallel_size prefill_context_parallel_size "
                               "decode_context_parallel_size enable_expert_parallel enable_eplb enable_elastic_ep "
                               "use_ubatching enable_fault_tolerance distributed_executor_backend data_parallel_backend data_parallel_size data_parallel_size_local "  # noqa: E501
                               "data_parallel_rank_local data_parallel_index data_parallel_external_lb "
                               "data_parallel_hybrid_lb data_parallel_master_ip data_parallel_master_port "
                               "_coord_store_port local_engines_only _api_process_count data_parallel_rpc_port",
    CONFIG + "ModelConfig": "is_moe model architectures dtype quantization hf_config enforce_eager "
                            "enable_sleep_mode enable_cumem_allocator multimodal_config runner_type max_model_len",
    CONFIG + "MultiModalConfig": "mm_processor_cache_gb",
    "vllm.v1.engine.core_client:DPLBAsyncMPClient": "engine_ranks_managed core_engines reqs_in_flight engine_inflight "
                                                    "outputs_queue lb_engines _abort_requests",
    CONFIG + "CompilationConfig": "cudagraph_mode cudagraph_capture_sizes max_cudagraph_capture_size static_forward_context",
    "vllm.model_executor.layers.attention:Attention": "impl",
    CONFIG + "CUDAGraphMode": "NONE PIECEWISE",
    "vllm.v1.engine:EngineCoreRequestType": "UTILITY",
    CONFIG + "SchedulerConfig": "max_num_batched_tokens max_num_seqs prefill_schedule_interval",
    CONFIG + "CacheConfig": "gpu_memory_utilization kv_cache_memory_bytes kv_sharing_fast_prefill",
    CONFIG + "KernelConfig": "moe_backend",
    CONFIG + "LoadConfig": "load_format",
    "vllm.config.offload:OffloadConfig": "uva prefetch",
    "vllm.config.offload:UVAOffloadConfig": "cpu_offload_gb",
    "vllm.config.offload:PrefetchOffloadConfig": "offload_group_size",
    CONFIG + "SpeculativeConfig": "method enable_adaptive_verification",
    MOE + "expert_map_manager:ExpertMapManager": "_local_num_experts _expert_map global_num_experts "
                                                 "num_fused_shared_experts",
    MOE + "routed_experts:RoutedExperts": "layer_name weight_loader expert_map_manager quant_method moe_config _expert_map local_num_experts "  # noqa: E501
                                          "global_num_experts",
    MOE + "config:FusedMoEConfig": "num_experts num_local_experts hidden_dim experts_per_token in_dtype",
    MOE + "modular_kernel:FusedMoEExperts": "quant_dtype a2_scale block_shape per_act_token_quant",
    MOE + "fused_moe_method_base:FusedMoEMethodBase": "supports_eplb moe_kernel moe_quant_config "
                                                             "is_monolithic",
    MOE + "modular_kernel:FusedMoEKernel": "prepare_finalize fused_experts",
    MOE + "runner.moe_runner:MoERunner": "_forward_entry shared_experts",
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader": "local_expert_ids",
    "vllm.v1.core.sched.output:SchedulerOutput": "total_num_scheduled_tokens scheduled_encoder_inputs has_sync_kv_loads "
                                                 "ec_connector_metadata",
    "vllm.model_executor.models.gpt_oss:GptOssModel": "config",
    MOE + "config:FusedMoEQuantConfig": " ".join(proof._STATIC),
    QUANTIZATION + "mxfp4:GptOssMxfp4MoEMethod": "experts_cls",
    QUANTIZATION + "auto_awq:AutoAWQMoEMethod": "experts_cls",
    QUANTIZATION + "auto_gptq:AutoGPTQMoEMethod": "experts_cls",
    QUANTIZATION + "compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16:"
                   "CompressedTensorsWNA16MoEMethod": "experts_cls",
}

ELSEWHERE = {  # that `integration` asks for
    "to_json_string", "_commit_hash",  # a transformers config's
    "not_empty", "queue", "_schema", "reasons",  # a queue's, an operator's, a hook's of our own
    "moe_forward", "moe_forward_shared",  # see `test_custom_ops`
    "get_watch_dog", "post_gemm2_hook",  # from vLLM 0.33
}

EXPERTS = loading.UNSHARDABLE.keys() | {
    "DeepseekV4HeterogeneousSharedRoutedExperts", "GptOssRoutedExperts", "MuseSparkConsolidatedRoutedExperts",
    "MuseSparkRoutedExperts", "TransformersRoutedExperts",
}


def absent(where: str, *, parameters: str = "", attributes: str = "") -> list[str]:
    """The dotted names under `where`, itself included, that this vLLM does not have."""
    module, path = where.split(":")
    name = where.replace(":", ".")
    try:
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return [name]
    if found is launch.run_engine_core:  # another test has put the hook in place
        found = launch._run_engine_core
    if parameters:
        accepted = inspect.signature(found).parameters
        return [f"{name}({p})" for p in parameters.split() if p not in accepted]
    written = set()
    for base in found.__mro__:
        for node in ast.walk(ast.parse(inspect.getsource(base))) if base.__module__.startswith("vllm") else ():
            if isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
                written.add(node.attr if isinstance(node, ast.Attribute) else node.id)
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "register_buffer":
                written.add(ast.literal_eval(node.args[0]))
    return [f"{name}.{a}" for a in attributes.split() if not (hasattr(found, a) or a in written)]


@pytest.mark.parametrize("hook", hooks.HOOKS, ids=lambda hook: hook.path)
def test_replaced(hook: hooks.Hook) -> None:
    """What the plugin replaces is there, takes the parameters that the replacement relies on, and can be replaced."""
    with hook.during(lambda original, *args, **kwargs: original(*args, **kwargs)):
        pass


@pytest.mark.parametrize("where", CALLED)
def test_called(where: str) -> None:
    """What the plugin calls or gives way to is there and takes these parameters."""
    assert absent(where, parameters=CALLED[where]) == []


@pytest.mark.parametrize("where", ATTRIBUTES)
def test_attributes(where: str) -> None:
    """What the plugin reads or sets is a field, property or attribute of that class."""
    assert absent(where, attributes=ATTRIBUTES[where]) == []


TREES = {path: ast.parse(path.read_text()) for room in ("vllm_dwdp", "kernels", "entrypoints") for path in (ROOT / room).rglob("*.py")}


def imports() -> list[str]:
    return sorted({
        f"{node.module}:{name.name}" for tree in TREES.values() for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm" for name in node.names
    })


def own() -> set[str]:
    """Names that this package gives to something that has it as an attribute."""
    found = set()
    for node in itertools.chain(*map(ast.walk, TREES.values())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef | ast.Module):
            found |= {name.id for line in node.body for name in ast.walk(line)
                      if isinstance(line, ast.Assign | ast.AnnAssign) and isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


def others() -> set[str]:
    """Attributes of the modules that this package imports beside vLLM's, and of their classes."""
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    found = set()
    for name in names | {"builtins", "torch.nn", "torch._ops"}:
        if name.split(".")[0] not in ("vllm", "vllm_dwdp", "triton"):
            module = importlib.import_module(name)
            found |= set(dir(module)).union(*(dir(each) for each in vars(module).values() if isinstance(each, type)))
    return found


def touched() -> dict[str, str]:
    """Attributes that `integration` asks for by name, and where."""
    found = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree) if path.parent.name == "integration" else ():
            if isinstance(node, ast.Attribute):
                found[node.attr] = f"{path.name}:{node.lineno}"
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr") and isinstance(node.args[1], ast.Constant):
                found[node.args[1].value] = f"{path.name}:{node.lineno}"
    return found


def test_all_that_is_touched_is_listed() -> None:
    """Above, or as a hook or an import. What this package or another module has an attribute of that name of cannot be told apart."""
    listed = {name for names in ATTRIBUTES.values() for name in names.split()} | {name for where in imports() for name in where.split(":")}
    listed |= set(itertools.chain(*(re.split("[.:]", where) for where in [*CALLED, *(hook.path for hook in hooks.HOOKS)])))
    unlisted = touched().keys() - listed - own() - others() - ELSEWHERE
    assert [(name, touched()[name]) for name in unlisted if not (name.startswith("VLLM_") and hasattr(envs, name))] == []
    assert len(touched().keys() & listed) > 150, "the scan finds what is listed"


def extensions() -> list[type]:
    """Classes of this package that extend one of vLLM's."""
    modules = [importlib.import_module(f"vllm_dwdp.integration.{p.stem}") for p in (ROOT / "vllm_dwdp/integration").glob("[!_]*.py")]
    made = {each for module in modules for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__}
    return sorted((each for each in made if any(base.__module__.startswith("vllm.") for base in each.__mro__)), key=str)


@pytest.mark.parametrize("made", extensions(), ids=lambda made: made.__name__)
def test_extensions_have_all_that_vllm_asks_of_them(made: type) -> None:
    """Else Python refuses to make one, at the first step that needs it."""
    assert not inspect.isabstract(made), made.__abstractmethods__


@pytest.mark.parametrize("where", imports())
def test_imports(where: str) -> None:
    """Every name that the package imports from vLLM is there."""
    module, name = where.split(":")
    found = hasattr(importlib.import_module(module), name)
    assert found or importlib.util.find_spec(f"{module}.{name}"), where


def test_experts() -> None:
    """Every kind of routed experts is one whose loader and forward were read: those that do not shard are refused."""
    source = "\n".join(path.read_text() for path in Path(vllm.__file__).parent.rglob("*.py"))
    assert set(re.findall(r"^class (\w+)\([^)]*RoutedExperts\b", source, re.MULTILINE)) <= EXPERTS


def test_kinds_of_experts() -> None:
    """No model but those refused has two kinds of experts in a layer, of which a step may leave one out."""
    sources = [path.read_text() for path in Path(vllm.__file__).parent.rglob("*.py")]
    two = [source for source in sources if source.count("FusedMoEFactory(") > 1]
    names = re.findall(r"^class (\w+For[A-Z]\w+)\(", "\n".join(two), re.MULTILINE)
    assert names and not [name for name in names if not any(part in name for part in checks.MODELS)]


@pytest.mark.parametrize("op", ["moe_forward", "moe_forward_shared"])
def test_custom_ops(op: str) -> None:
    """The custom ops that hide a MoE layer from torch.compile are registered."""
    importlib.import_module(MOE + "runner.moe_runner")
    assert hasattr(torch.ops.vllm, op)


def test_memory_that_vllm_takes_by_default() -> None:
    """Is what `plan` and `doctor` count with."""
    assert CacheConfig().gpu_memory_utilization == memory.UTILIZATION


def test_version() -> None:
    """This vLLM is one that the plugin takes."""
    checks.refuse_version(vllm.__version__, allow_untested=False)


@pytest.mark.parametrize(
    ("where", "given", "named"),
    [
        (CORE + "EngineCoreProc.gone", {"parameters": "a"}, "vllm.v1.engine.core.EngineCoreProc.gone"),
        ("vllm.gone:Thing", {"attributes": "a"}, "vllm.gone.Thing"),
        (CORE + "EngineCoreProc.run_engine_core", {"parameters": "dp_rank gone"},
         "vllm.v1.engine.core.EngineCoreProc.run_engine_core(gone)"),
        (CONFIG + "ParallelConfig", {"attributes": "worker_cls gone"}, "vllm.config.ParallelConfig.gone"),
    ],
)
def test_names_what_moved(where: str, given: dict, named: str) -> None:
    """Something that vLLM does not have is reported by its full name, alone."""
    assert absent(where, **given) == [named]
