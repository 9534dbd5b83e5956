"""Invariant: what DWDP cannot serve is refused in one line that names the setting, before anything is loaded."""

import contextlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from vllm.config import KVTransferConfig
from vllm.config.engram import EngramConfig
from vllm.engine.arg_utils import EngineArgs

import vllm_dwdp.entrypoints.plugin as plugin
from vllm_dwdp import config
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.integration import checks

from families import ENGINES, FAMILIES, TORCHVISION
from quantized import quantize

APART = {"data_parallel_size": 1}
MORIIO = {"kv_connector": "MoRIIOConnector", "kv_role": "kv_both"}


@pytest.fixture(scope="module")
def configure(models):
    """`configure(dwdp, **engine_args)`: the config that vLLM makes, on two ranks unless told otherwise."""
    plugin.register()

    def make(dwdp: dict | None = None, **engine_args: Any):
        settings = dict(
            model=models("qwen3_moe"), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=64,
            data_parallel_size=2, additional_config={"dwdp": dwdp or {}},
        )
        return EngineArgs(**settings | engine_args).create_engine_config()

    return make


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    import transformers

    folder: Path = tmp_path_factory.mktemp("dense")
    transformers.Qwen3Config(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        intermediate_size=128, max_position_embeddings=512, architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3"
    return str(folder)


def assert_refused(raised: pytest.ExceptionInfo, *named: str) -> None:
    text = str(raised.value)
    assert "\n" not in text and len(text) < 500, text
    assert not [name for name in named if name not in text], text


@pytest.mark.parametrize(
    ("engine_args", "dwdp", "named"),
    [
        ({"data_parallel_size": 1}, {}, "--data-parallel-size"),
        ({"data_parallel_size": 13}, {}, "12 experts"),
        ({}, {"size": 3}, "--dwdp-size 3 differs from --data-parallel-size 2"),
        ({}, {"rank": 0}, "--dwdp-rank 0 with --data-parallel-size 2"),
        ({"data_parallel_external_lb": True, "data_parallel_rank": 1}, {"rank": 0, "rendezvous": "127.0.0.1:1"}, "drop it"),
        ({"max_num_batched_tokens": 257}, {"dispatch_max_tokens": 129}, "lower it to 128"),
        ({"max_num_batched_tokens": 257, **APART}, {"dispatch_max_tokens": 86, "size": 3, "rank": 0}, "lower it to 85"),
        ({"tensor_parallel_size": 2}, {}, "--tensor-parallel-size 2"),
        ({"pipeline_parallel_size": 2}, {}, "--pipeline-parallel-size 2"),
        ({"enable_expert_parallel": True}, {}, "--enable-expert-parallel"),
        ({"enable_lora": True}, {}, "--enable-lora"),
        ({"kv_sharing_fast_prefill": True}, {}, "--kv-sharing-fast-prefill"),
        ({"prefill_schedule_interval": 4}, {}, "--prefill-schedule-interval"),
        ({"cpu_offload_gb": 1}, {}, "offload"),
        ({"offload_group_size": 2, "offload_num_in_group": 1}, {}, "offload"),
        ({"weight_transfer_config": {"backend": "nccl"}}, {}, "weight transfer"),
        ({"worker_cls": "mine.Worker"}, {}, "--worker-cls mine.Worker"),
        ({"distributed_executor_backend": "external_launcher", **APART}, {"size": 2, "rank": 0},
         "--distributed-executor-backend external_launcher"),
        ({"load_format": "sharded_state"}, {}, "--load-format sharded_state"),
        ({"load_format": "ipc_cache"}, {}, "--load-format ipc_cache"),
        ({"load_format": "modelexpress"}, {}, "--load-format modelexpress"),
        ({"moe_backend": "mega_moe"}, {}, "--moe-backend mega_moe"),
        ({"moe_backend": "deep_gemm_mega_moe"}, {}, "--moe-backend deep_gemm_mega_moe"),
        ({"data_parallel_external_lb": True, "data_parallel_rank": 0}, {}, "--dwdp-rendezvous"),
        ({"data_parallel_hybrid_lb": True, "data_parallel_size_local": 1}, {}, "--dwdp-rendezvous"),
        ({"data_parallel_size_local": 1}, {}, "--dwdp-rendezvous"),
        (APART, {"size": 2, "rank": 0}, "--dwdp-rendezvous"),
        (APART, {"size": 2, "rendezvous": "127.0.0.1:1"}, "rank"),
        ({}, {"experts_per_rank": 5}, "experts_per_rank is 5"),
        ({}, {"experts_per_rank": 13}, "experts_per_rank is 13"),
        ({}, {"slotz": 2}, "slotz"),
        ({"additional_config": {"dwdp": False}}, {}, "must be an object"),
        ({}, {"slots": 1}, "['slots']"),
        ({}, {"slots": 9}, "['slots']"),
        ({}, {"slots": "many"}, "['slots']"),
        ({}, {"cache_gib": -1}, "['cache_gib']"),
        ({}, {"cache_gib": "all"}, "['cache_gib']"),
        ({}, {"dispatch": "lru"}, "['dispatch']"),
        ({}, {"rendezvous": "nowhere"}, "['rendezvous']"),
        ({}, {"startup_timeout_s": 0}, "['startup_timeout_s']"),
        ({}, {"startup_timeout_s": float("inf")}, "['startup_timeout_s'] is inf"),
        ({}, {"cache_gib": float("nan")}, "['cache_gib'] is nan"),
    ],
    ids=str,
)
def test_engine_args(configure, engine_args: dict, dwdp: dict, named: str) -> None:
    """A setting that vLLM takes and DWDP does not is refused while the config is made."""
    with pytest.raises(DWDPError) as raised:
        configure(dwdp, **engine_args)
    assert_refused(raised, named)


def test_offline_ranks_in_one_process_each(configure, monkeypatch) -> None:
    """In-process engines that VLLM_DP_RANK makes ranks would run in lockstep: the settings are named, not a hook."""
    for name, value in {"SIZE": "2", "RANK": "0", "RANK_LOCAL": "0", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(f"VLLM_DP_{name}", value)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    configure(**APART)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with pytest.raises(DWDPError) as raised:
        configure(**APART)
    assert_refused(raised, "VLLM_ENABLE_V1_MULTIPROCESSING=0", "VLLM_DP_SIZE")


def test_the_rust_front_end(configure, monkeypatch) -> None:
    """Is refused where engines of other nodes would send it signs of life, and served where each node has its own."""
    rendezvous = {"rendezvous": "127.0.0.1:1"}
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    configure()
    configure(rendezvous, data_parallel_size=4, data_parallel_hybrid_lb=True, data_parallel_size_local=2)
    with pytest.raises(DWDPError) as raised:
        configure(rendezvous, data_parallel_size_local=1)
    assert_refused(raised, "VLLM_USE_RUST_FRONTEND=1", "--data-parallel-hybrid-lb")
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    configure(rendezvous, data_parallel_size_local=1)


def test_dense_model(configure, dense: str) -> None:
    """A model without experts is refused by name."""
    with pytest.raises(DWDPError) as raised:
        configure(model=dense)
    assert_refused(raised, dense, "no MoE layers")


@pytest.mark.parametrize("is_adaptive", [False, True])
def test_drafts_whose_verification_shrinks_a_step(configure, monkeypatch, is_adaptive: bool) -> None:
    made = configure()
    monkeypatch.setattr(made, "speculative_config", SimpleNamespace(
        enable_adaptive_verification=is_adaptive, use_ngram_gpu=lambda: False
    ))
    with pytest.raises(DWDPError) if is_adaptive else contextlib.nullcontext() as raised:
        checks.refuse_unsupported(made, config.parse(made.additional_config))
    if is_adaptive:
        assert_refused(raised, "enable_adaptive_verification in --speculative-config")


@pytest.mark.parametrize(("method", "runner", "is_refused"), [("ngram_gpu", "0", True), ("ngram_gpu", "1", False), ("ngram", "0", False)])
def test_drafts_that_an_older_runner_takes_out_of_a_step(configure, monkeypatch, method: str, runner: str, is_refused: bool) -> None:
    """The newer one, which needs Triton, does not."""
    made = configure(speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3})
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    made.speculative_config.method = method
    with pytest.raises(DWDPError) if is_refused else contextlib.nullcontext() as raised:
        checks.refuse_unsupported(made, config.parse(made.additional_config))
    if is_refused:
        assert_refused(raised, "ngram_gpu in --speculative-config: vLLM's older runner")


@pytest.mark.parametrize(
    ("part", "field", "value", "named"),
    [
        ("parallel_config", "enable_eplb", True, "--enable-eplb"),
        ("parallel_config", "enable_elastic_ep", True, "--enable-elastic-ep"),
        ("parallel_config", "enable_dbo", True, "--enable-dbo"),
        ("parallel_config", "ubatch_size", 2, "--ubatch-size"),
        ("parallel_config", "enable_fault_tolerance", True, "--enable-fault-tolerance"),
        ("parallel_config", "distributed_executor_backend", "ray", "--distributed-executor-backend ray"),
        ("parallel_config", "data_parallel_backend", "ray", "--data-parallel-backend ray"),
        ("parallel_config", "prefill_context_parallel_size", 2, "context parallelism"),
        ("parallel_config", "decode_context_parallel_size", 2, "context parallelism"),
        ("model_config", "enable_sleep_mode", True, "--enable-sleep-mode"),
        ("model_config", "enable_cumem_allocator", True, "cumem"),
    ],
)
def test_settings_of_other_platforms(configure, monkeypatch, part: str, field: str, value: Any, named: str) -> None:
    """What vLLM itself takes on CUDA only is refused too: set on a config that was good."""
    made = configure()
    options = config.parse(made.additional_config)
    checks.refuse_unsupported(made, options)
    monkeypatch.setattr(getattr(made, part), field, value)  # the model's config is a cached object
    with pytest.raises(DWDPError) as raised:
        checks.refuse_unsupported(made, options)
    assert_refused(raised, named)


@pytest.mark.parametrize("name", ["FlintForCausalLM", "Ernie4_5_VLMoeForConditionalGeneration"])
def test_models(configure, monkeypatch, name: str) -> None:
    """A model whose forward reads experts otherwise than layer by layer, on every row, is refused by name."""
    made = configure()
    monkeypatch.setattr(made.model_config.model_arch_config, "architectures", [name])
    with pytest.raises(DWDPError) as raised:
        checks.refuse_unsupported(made, config.parse(made.additional_config))
    assert_refused(raised, f"--parallel dwdp does not go with {name}: its ")


@pytest.mark.parametrize(
    "connector",
    [MORIIO, MORIIO | {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [MORIIO]}}],
    ids=["alone", "inside"],
)
def test_a_connector_that_numbers_ports_by_rank(configure, monkeypatch, connector: dict) -> None:
    """Is refused where one command has the ranks, and served where each has its own ports."""
    made = configure()
    options = config.parse(made.additional_config)
    monkeypatch.setattr(made, "kv_transfer_config", KVTransferConfig(**connector))
    with pytest.raises(DWDPError) as raised:
        checks.refuse_unsupported(made, options)
    assert_refused(raised, "MoRIIOConnector", "--dwdp-rank")
    monkeypatch.setattr(made.parallel_config, "data_parallel_size", 1)
    checks.refuse_unsupported(made, msgspec.structs.replace(options, rank=0, rendezvous="127.0.0.1:1"))


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder in which vLLM remembers what it found out about a model, in a process that finds torchvision there, too."""
    folder: Path = tmp_path_factory.mktemp("looked-at")
    (folder / "torchvision.py").write_text(TORCHVISION)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine_args",
    [{"mm_encoder_only": True}, {"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_producer"}}],
    ids=["asked for", "producer"],
)
def test_instances_that_only_encode(configure, models, engine_args: dict, looked_at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are refused as such, not after loading for the experts that they have not built; a model that does both passes."""
    monkeypatch.setenv("PYTHONPATH", looked_at)
    monkeypatch.setenv("VLLM_CACHE_ROOT", looked_at)
    seeing = dict(model=models(FAMILIES["qwen3_vl_moe"]), **ENGINES["qwen3_vl_moe"])
    configure(**seeing)
    with pytest.raises(DWDPError) as raised:
        configure(**seeing, **engine_args)
    assert_refused(raised, "--mm-encoder-only", "no experts run there; drop --parallel dwdp")


@pytest.mark.parametrize("shared", ["dp_shared_memory", "embedding_across_dp"])
def test_tables_that_ranks_share(configure, monkeypatch, shared: str) -> None:
    """An Engram table of the group's is refused, one of the rank's own is not."""
    made, engram = configure(), EngramConfig(cpu_offload=True, dp_shared_memory=False)
    monkeypatch.setattr(made, "engram_config", engram)
    options = config.parse(made.additional_config)
    checks.refuse_unsupported(made, options)
    monkeypatch.setattr(engram, shared, True)
    with pytest.raises(DWDPError) as raised:
        checks.refuse_unsupported(made, options)
    assert_refused(raised, shared)


@pytest.mark.parametrize("draft", ["moe", "dense", "ngram"])
def test_speculation(configure, models, dense: str, draft: str) -> None:
    """Draft models pass, with experts of their own or without, as does ngram, which has no model."""
    drafts = {"moe": models("qwen3_moe"), "dense": dense}
    method = {"method": "draft_model", "model": drafts[draft]} if draft in drafts else {"method": "ngram"}
    speculative = {**method, "num_speculative_tokens": 1}
    assert configure(speculative_config=speculative).additional_config["dwdp"]["size"] == 2


@pytest.mark.parametrize(
    ("engine_args", "dwdp"),
    [
        ({}, {}),
        ({"data_parallel_external_lb": True, "data_parallel_rank": 1}, {"rendezvous": "127.0.0.1:1"}),
        (APART, {"size": 2, "rank": 0, "rendezvous": "127.0.0.1:1"}),
        ({}, {"size": 2}),
        ({"kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"}}, {}),
        ({"data_parallel_size": 12}, {"experts_per_rank": 1}),
        ({}, {"experts_per_rank": 12}),
        ({"max_num_batched_tokens": 257}, {"dispatch_max_tokens": 128}),
    ],
    ids=str,
)
def test_what_is_served(configure, engine_args: dict, dwdp: dict) -> None:
    """The neighbours of what is refused pass, become DWDP ranks, and keep the user's options."""
    made = configure(dwdp, **engine_args)
    assert made.parallel_config.worker_cls == "vllm_dwdp.integration.worker.DWDPWorker"
    size = dwdp.get("size", engine_args.get("data_parallel_size", 2))
    assert made.additional_config["dwdp"] == {**dwdp, "size": size, "direct_max_tokens": 7, "graph_max_tokens": 8192}


@pytest.mark.parametrize(("given", "chosen"), [({}, "marlin"), ({"moe_backend": "triton"}, "triton")])
def test_kernels_of_gpt_oss(models, configure, tmp_path: Path, given: dict, chosen: str) -> None:
    """MXFP4 experts get kernels that DWDP can stream, unless the user has named some."""
    made = configure(model=quantize(models("gpt_oss"), "mxfp4", tmp_path / "mxfp4"), dtype="bfloat16", **given)
    assert made.kernel_config.moe_backend == chosen


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0", "0.320.0"])
def test_version(configure, monkeypatch, version: str) -> None:
    """A vLLM that was not tested is refused by version, unless DWDP_ALLOW_UNTESTED_VLLM=1."""
    monkeypatch.setattr("vllm.__version__", version)
    monkeypatch.setenv(checks.UNTESTED, "0")
    with pytest.raises(DWDPError, match=f"vLLM {re.escape(version)}.*DWDP_ALLOW_UNTESTED_VLLM=1") as raised:
        configure()
    assert_refused(raised)
    monkeypatch.setenv(checks.UNTESTED, "1")
    configure()


def test_gpus_that_are_not_nvidia_s(configure, monkeypatch) -> None:
    made = configure()
    monkeypatch.setattr(checks, "current_platform", SimpleNamespace(is_cuda=lambda: False, is_cpu=lambda: False, device_name="rocm"))
    with pytest.raises(DWDPError) as raised:
        checks.refuse_unsupported(made, config.parse(made.additional_config))
    assert_refused(raised, "vLLM for rocm: peers' experts are mapped by CUDA's virtual memory")
