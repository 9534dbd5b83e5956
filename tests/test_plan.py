"""Invariant: a plan's bytes are those of checkpoints and of measured ranks, and the command says what it lacks."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from vllm_dwdp.budget import GIB
from vllm_dwdp.entrypoints import cli
from vllm_dwdp.entrypoints.plan import fields, formats, memory, model, rates, roofline, source
from vllm_dwdp.entrypoints.plan.roofline import Load
from vllm_dwdp.errors import DWDPError

from conftest import ROOT
from families import FAMILIES
from plan_models import FP8_BLOCKS, GLM, GPT_OSS, HYBRIDS, MIXTRAL, MXFP4, NVFP4, OLMOE, QWEN3, R1, V2_LITE, held_by_dwdp
from true_shapes import SHAPES, write


def total_bytes(config: Mapping[str, Any]) -> int:
    described = model.parse("m", config)
    return described.replicated_bytes + described.all_expert_bytes


@pytest.mark.parametrize(
    ("config", "billions"),
    [(QWEN3, 30.53), (R1 | {"quantization_config": None}, 671.0), (MIXTRAL, 46.70), (OLMOE, 6.919), (GLM, 352.8),
     (V2_LITE, 15.71), (GPT_OSS | {"quantization_config": None}, 116.8)],
    ids=["qwen3", "deepseek-r1", "mixtral", "olmoe", "glm-4.5", "deepseek-v2-lite", "gpt-oss"],
)
def test_parameters_are_those_that_the_makers_name(config, billions) -> None:
    """Within half a percent: biases, norms and what is only for speculation are left out."""
    assert total_bytes(config) / 2e9 == pytest.approx(billions, rel=5e-3)


UNKNOWN = {  # families that plan refuses
    "qwen3_next", "qwen3_5_moe", "ernie4_5_moe", "granitemoe", "granitemoeshared", "granitemoehybrid", "jamba", "lfm2_moe",
    "hunyuan_v1_moe", "flex_olmo", "minimax", "dbrx", "nemotron_h", "cohere2_moe", "llama4", "gemma4", "kimi_linear",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_counted_to_the_last_matrix_or_refused(family, tmp_path) -> None:
    """By its config.json, against the model that transformers makes of it; biases and what sees are left out."""
    import torch
    import transformers

    kind, experts, fields = FAMILIES[family]
    part, _, field = experts.rpartition(".")
    fields = fields | ({part: fields[part] | {field: 12}} if part else {field: 12})
    config = transformers.AutoConfig.for_model(kind, **fields)
    config.save_pretrained(tmp_path)
    if family in UNKNOWN:
        with pytest.raises(DWDPError, match=r"plan does not know|config\.json lacks"):
            model.load(str(tmp_path), {})
        return
    auto = transformers.AutoModelForImageTextToText if part else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        parameters = dict(auto.from_config(config).named_parameters())
    matrices = sum(
        tensor.numel() for name, tensor in parameters.items() if tensor.ndim > 1 and not {"bias", "visual"} & set(name.split("."))
    )
    described = model.load(str(tmp_path), {})
    assert described.replicated_bytes + described.all_expert_bytes == 4 * matrices


WEIGHTS = 3 * 768 * 2048  # of one expert: [1536, 2048] and [2048, 768]


def compressed(**weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


@pytest.mark.parametrize(
    ("given", "nbytes"),
    [
        (None, WEIGHTS * 2),
        (FP8_BLOCKS, WEIGHTS + 4 * WEIGHTS // 128**2),
        ({"quant_method": "fp8"}, WEIGHTS),
        (compressed(type="float", num_bits=8, strategy="channel"), WEIGHTS + 4 * (1536 + 2048)),
        (compressed(type="float", num_bits=8, strategy="block", block_structure=[128, 128]),
         WEIGHTS + 4 * WEIGHTS // 128**2),
        (compressed(type="int", num_bits=4, strategy="group", group_size=128, symmetric=True),
         WEIGHTS // 2 + 2 * WEIGHTS // 128),
        (compressed(type="int", num_bits=8, strategy="channel", symmetric=True), WEIGHTS + 2 * (1536 + 2048)),
        (compressed(type="float", num_bits=4, strategy="tensor_group", group_size=16), WEIGHTS // 2 + WEIGHTS // 16),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
         WEIGHTS // 2 + 2.5 * WEIGHTS // 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": 64, "sym": True}, WEIGHTS + 2 * WEIGHTS // 64),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, WEIGHTS),
        (NVFP4, WEIGHTS // 2 + WEIGHTS // 16),
        (MXFP4, WEIGHTS // 2 + WEIGHTS // 32),
    ],
    ids=["bf16", "fp8-blocks", "fp8", "fp8-channels", "fp8-blocks-ct", "int4", "int8-channels", "nvfp4-ct", "awq",
         "gptq", "fp8-modelopt", "nvfp4", "mxfp4"],
)
def test_expert_bytes_are_the_formats(given, nbytes) -> None:
    """Weights and the scales that travel with them; a scale per tensor does not."""
    assert sum(model.parse("m", QWEN3 | {"quantization_config": given}).expert_bytes) == nbytes


GPT_OSS_EXPERT = 14_413_824  # of 2944 x 3072 for 2880 x 2880


def test_experts_are_padded_as_the_kernel_wants_them() -> None:
    """MXFP4's sizes in vLLM are those of Marlin, which DWDP chooses."""
    from vllm.model_executor.layers.fused_moe.oracle import mxfp4

    marlin = mxfp4.Mxfp4MoeBackend.MARLIN
    assert sum(model.parse("m", GPT_OSS).expert_bytes) == GPT_OSS_EXPERT
    for hidden, width in ((2880, 2880), (2048, 768), (512, 256), (300, 129)):
        rounded = mxfp4.mxfp4_round_up_hidden_size_and_intermediate_size(marlin, hidden, width)
        described = model.parse("m", GPT_OSS | {"hidden_size": hidden, "intermediate_size": width})
        assert sum(described.expert_bytes) == 3 * rounded[0] * rounded[1] * (1 / 2 + 1 / 32)


def test_what_a_checkpoint_leaves_plain_is_counted_plain() -> None:
    """MXFP4 and NVFP4 checkpoints keep attention in bf16; the published sizes of gpt-oss-120b and R1 bear that out."""
    padding = 36 * 128 * (GPT_OSS_EXPERT - 13_219_200)
    assert (total_bytes(GPT_OSS) - padding) / GIB == pytest.approx(60.8, rel=5e-3)
    assert total_bytes(R1) / 1e9 == pytest.approx(671 + 129280 * 7168 * 2 / 1e9, rel=5e-3)
    nvfp4, whole = (model.parse("m", R1 | {"quantization_config": q}) for q in (NVFP4, NVFP4 | {"ignore": []}))
    attention = nvfp4.linears[5][0]
    assert attention.nbytes == 2 * attention.weights and attention.compute == "bf16"
    assert whole.linears[5][0].nbytes == pytest.approx(0.5625 * attention.weights, rel=1e-6)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "new_moe"}, "hidden_size"),
        ({name: value for name, value in QWEN3.items() if name != "num_experts"}, "num_experts"),
        ({name: value for name, value in GLM.items() if name != "moe_intermediate_size"}, "moe_intermediate_size"),
        (MIXTRAL | {"model_type": "new_moe"}, "moe_intermediate_size"),
        ({name: value for name, value in R1.items() if name != "v_head_dim"}, "v_head_dim"),
        (QWEN3 | {"layer_types": ["linear_attention"] * 48}, "layer_types"),
        (R1 | {"index_topk": 2048}, "index_topk"),
        *((config, field) for field, config in HYBRIDS.items()),
        (QWEN3 | {"hybrid_layer_pattern": [0, 1] * 24}, "hybrid_layer_pattern"),
        (QWEN3 | {"head_dim": 192, "v_head_dim": 128}, "v_head_dim"),
        (QWEN3 | {"num_shared_experts": 1, "moe_shared_expert_intermediate_size": 512}, "moe_shared_expert"),
        (GPT_OSS | {"layer_types": None, "sliding_window_pattern": 2}, "sliding_window_pattern"),
        (QWEN3 | {"quantization_config": {"quant_method": "exl9"}}, "exl9"),
        (QWEN3 | {"quantization_config": {"quant_method": "gptq", "bits": 3}}, "3 bits"),
        (QWEN3 | {"torch_dtype": "int7"}, "int7"),
        (QWEN3 | {"mlp_only_layers": list(range(48))}, "no layer"),
        ([], "no JSON object"),
        (QWEN3 | {"text_config": 3}, "text_config is 3"),
        (QWEN3 | {"quantization_config": "fp8"}, "quantization_config is 'fp8'"),
        (QWEN3 | {"quantization_config": {"weight_block_size": [0, 0]}}, "quantization_config.weight_block_size is [0, 0]"),
        (QWEN3 | {"quantization_config": compressed(type=[])}, "quantization_config.config_groups is"),
        (QWEN3 | {"moe_layer_freq": [1]}, "moe_layer_freq is for 1 layers"),
        (QWEN3 | {"layer_types": ["full_attention"]}, "layer_types is for 1 layers"),
        (QWEN3 | {"mlp_layer_types": ["dense", "moe"] * 24}, "mlp_layer_types is"),
        (QWEN3 | {"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0"),
        (QWEN3 | {"num_attention_heads": 4096, "head_dim": None}, "num_attention_heads is 4096"),
        (QWEN3 | {"num_experts_per_tok": 129}, "a token takes 129"),
        (QWEN3 | {"hidden_size": 1.5}, "hidden_size is 1.5"),
        (QWEN3 | {"model_type": "llama", "num_experts": None}, "has no MoE layers (config.json has none of num_experts, "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_plan_does_not_know_is_refused_in_one_line(config, named, tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["plan", str(tmp_path), "--gpu", "h100"]) == 2
    printed = capsys.readouterr()
    assert named in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_a_config_that_vllm_loads_has_the_bytes_of_the_cut_one(tmp_path) -> None:
    for folder in write(tmp_path):
        cut, whole = model.parse("m", SHAPES[folder.name]), model.load(str(folder), {})
        assert (cut.expert_bytes, cut.num_moe_layers) == (whole.expert_bytes, whole.num_moe_layers), folder.name


def test_no_field_is_read_whose_type_is_not_checked() -> None:
    class Asked(dict):
        def get(self, name, default=None):
            found.add(name)
            return super().get(name, default)

    found: set[str] = set()
    for config in (QWEN3, R1, GPT_OSS, MIXTRAL, QWEN3 | {"mlp_only_layers": [0], "quantization_config": FP8_BLOCKS}):
        model.parse("m", Asked(config))
    assert len(found) > 40 and found <= {*fields.MODEL.__struct_fields__, *fields.UNKNOWN, *fields.WINDOWED}
    for given in (FP8_BLOCKS, NVFP4, MXFP4, {"quant_method": "gptq", "bits": 4}, compressed(type="int", num_bits=4)):
        found.clear()
        formats.quantized({"quantization_config": Asked(given)})
        formats.keeps_plain({"quantization_config": Asked(given)}, "attn")
        assert found and found <= {*fields.QUANTIZATION.__struct_fields__}


def test_overrides_are_applied_as_vllm_applies_them(tmp_path) -> None:
    """A nested config field by field, other objects as a whole; what is said at the top does not reach the nested."""
    (tmp_path / "config.json").write_text(json.dumps(
        {"text_config": QWEN3 | {"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "quantization_config": FP8_BLOCKS}
    ))

    def read(**overrides: Any) -> dict[str, Any]:
        return source.read_config(str(tmp_path), overrides)

    assert read(num_hidden_layers=4)["num_hidden_layers"] == 48
    nested = read(text_config={"num_hidden_layers": 4, "rope_parameters": {"factor": 3}})
    assert nested == read() | {
        "text_config": nested["text_config"], "num_hidden_layers": 4, "rope_parameters": {"rope_type": "yarn", "factor": 3}
    }
    assert read(quantization_config={"quant_method": "fp8"})["quantization_config"] == {"quant_method": "fp8"}
    assert len(model.load(str(tmp_path), {"text_config": {"num_hidden_layers": 4}}).windows) == 4


def test_memory_is_what_two_h100s_held() -> None:
    """Experts to the byte; KV cache tokens as vLLM counted them, within 3%, for all three modes."""
    described = model.parse("m", QWEN3)
    table = rates.read(None)
    held = {
        "dwdp": held_by_dwdp(described, 2), "ep": memory.expert_parallel(described, 2, 16384),
        "single": memory.expert_parallel(described, 1, 16384),
    }
    rows = json.loads((ROOT / "examples/results/prefill-48-layers-16384.json").read_text())["rows"]
    measured = {row["mode"]: row["held_per_gpu"] for row in rows}
    for mode, own in held.items():
        assert own.shard + own.residents + own.slots == measured[mode]["expert_bytes"]
        left = memory.kv_tokens(
            described, own, memory_bytes=table.gpus["h100"].memory_gib * GIB, utilization=0.9,
            process_bytes=table.process_gib * GIB, length=8192, tokens=16384,
        )
        assert left == pytest.approx(measured[mode]["kv_cache_tokens"], rel=0.03), mode


@pytest.mark.parametrize(("length", "tokens"), [(131072, 8192), (32768, 8192), (8192, 16384), (1000, 64), (4096, 100)])
@pytest.mark.parametrize(
    "config",
    [QWEN3, R1, MIXTRAL | {"sliding_window": 4096}, GPT_OSS, GPT_OSS | {"layer_types": [*["sliding_attention"] * 5, "full_attention"] * 6},
     GPT_OSS | {"layer_types": ["full_attention"] * 20 + ["sliding_attention"] * 16},
     GPT_OSS | {"layer_types": ["full_attention"] * 11 + ["sliding_attention"] * 25}],
    ids=["all", "latent", "windows", "halves", "sixths", "20 to 16", "11 to 25"],
)
def test_kv_tokens_are_those_that_vllm_counts(config, length, tokens) -> None:
    import torch
    from vllm.v1.core import kv_cache_utils as vllm
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    described, room = model.parse("m", config), 10 * GIB + 12345
    settings = MagicMock(max_in_flight_tokens=2 * tokens)
    settings.model_config.max_model_len, settings.parallel_config.decode_context_parallel_size = length, 1
    settings.scheduler_config.disable_hybrid_kv_cache_manager = False
    settings.attention_config.hisparse_config = settings.speculative_config = settings.cache_config.num_gpu_blocks_override = None
    layout = settings.cache_config.get_resolved_kv_cache_layout.return_value
    layout.is_block_outermost = False
    page = dict(block_size=16, num_kv_heads=1, head_size=described.kv_bytes_per_layer // 2, head_size_v=0, dtype=torch.bfloat16)
    specs = {
        str(layer): SlidingWindowSpec(**page, sliding_window=window) if window else FullAttentionSpec(**page)
        for layer, window in enumerate(described.windows)
    }
    groups = vllm.get_kv_cache_groups(settings, specs)
    blocks = int(room) // vllm._get_kv_cache_bytes_per_block(groups, layout)
    counted, _ = vllm.get_kv_cache_capacity(settings, MagicMock(kv_cache_groups=groups, num_blocks=blocks))
    nothing = memory.Held(replicated=0, shard=0, residents=0, slots=0, streamed=0, activations=0)
    own = memory.kv_tokens(described, nothing, memory_bytes=room, utilization=1, process_bytes=0, length=length, tokens=tokens)
    assert own == counted


def test_residents_take_their_share_off_the_link_and_the_slots() -> None:
    described = model.parse("m", QWEN3)
    none, half, full = (held_by_dwdp(described, 2, cache_gib=gib) for gib in (0.0, 13.5, 100.0))
    assert half.streamed == none.streamed / 2 and half.slots == none.slots / 2 and half.residents == none.shard / 2
    assert full.streamed == full.slots == 0 and full.shard + full.residents == described.all_expert_bytes


@pytest.mark.parametrize("window", [None, 1, 128, 8192, 9000])
def test_a_window_ends_what_a_token_sees(window) -> None:
    prompt = range(1, 8193)
    seen = sum(position if window is None else min(position, window) for position in prompt) / len(prompt)
    assert roofline.seen(Load(tokens=1, input_len=8192).context, window) == pytest.approx(seen, rel=1e-3)
    assert model.parse("m", GPT_OSS).windows == [128, None] * 18
    assert model.parse("m", QWEN3 | {"sliding_window": 4096}).windows == [None] * 48, "use_sliding_window is false"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "qwen3-30b-a3b").mkdir()
    (tmp_path / "qwen3-30b-a3b" / "config.json").write_text(json.dumps(QWEN3))
    return tmp_path / "qwen3-30b-a3b"


def test_the_command_needs_neither_vllm_nor_torch(folder) -> None:
    """One process, no GPU, no weights: the tables, from a folder with a config alone."""
    code = (
        "import sys; from vllm_dwdp.entrypoints import cli; status = cli.main(sys.argv[1:]);"
        "assert not {'vllm', 'torch', 'transformers'} & set(sys.modules); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "plan", str(folder), "--gpu", "h200", "--size", "4"]
    command += ["--tokens", "1024,16384"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    for text in ("48 of 48 layers with 128 experts, top 8, bf16", "an expert 9.44 MB", "1: 44.4%, 2: 44.4%, 3: 11.1%"):
        assert text in ended.stdout
    (dwdp,) = [line.split() for line in ended.stdout.splitlines() if line.startswith("DWDP   ")]
    assert dwdp[2:5] == ["13.50", "0.00", "1.69"], "a quarter of 54 GiB, and two slots of three quarters of a layer"
    few, many = [line.split() for line in ended.stdout.splitlines() if line.startswith(("1,024 ", "16,384 "))]
    assert float(few[6]) > 0 == float(many[6]) and float(few[-2]) < 1 < float(many[-2])


def test_a_gpu_on_which_dwdp_does_not_run_is_told(folder, capsys) -> None:
    assert cli.main(["plan", str(folder), "--gpu", "mi355x", "--size", "8"]) == 0
    printed = capsys.readouterr().out
    assert "DWDP does not run on mi355x yet" in printed and "pull from one source" not in printed
    assert rates.read(None).gpus["mi355x"].to_peers(7) == rates.read(None).gpus["mi355x"].to_peers(9) == 537.6e9


def test_what_does_not_fit_says_so(folder, capsys) -> None:
    assert cli.main(["plan", str(folder), "--gpu", "H100", "--gpu-memory-utilization", "0.5"]) == 0
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["full replica"].endswith("does not fit") and not lines["DWDP"].endswith("does not fit")


def test_a_plot_is_a_picture(folder, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["plan", str(folder), "--gpu", "h100", "--plot", str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_bench_refits_the_rates(folder, tmp_path, capsys) -> None:
    """Rates saved after --calibrate are read by --rates, change the eager kind alone, and carry the copies' speed."""
    results = ROOT / "examples" / "results"
    benches = ",".join(str(results / f"prefill-{name}.json") for name in ("12-layers-16384", "12-layers-8192-4096"))
    saved = str(tmp_path / "rates.json")
    asked = ["plan", str(folder), "--gpu", "h100", "--eager", "--tokens", "16384"]
    assert cli.main([*asked, "--calibrate", benches, "--save-rates", saved]) == 0
    first = capsys.readouterr().out
    assert cli.main([*asked, "--rates", saved]) == 0
    assert first == capsys.readouterr().out + f"{saved} written\n"
    old, new = rates.read(None), rates.read(saved)
    assert new.rates["compiled"] == old.rates["compiled"] and new.rates["eager"] != old.rates["eager"]
    assert new.rates["eager"].link * 450 == pytest.approx(352.5, abs=1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--gpu", "a100"], "--gpu is a100"),
        (["--gpu", "h100", "--size", "1"], "--size is '1': it must be a whole number from 2"),
        (["--gpu", "h100", "--size", "200"], "200 ranks cannot share 128 experts"),
        (["--gpu", "h100", "--tokens", "0"], "--tokens is ['0']"),
        (["--gpu", "h100", "--cache-gib", "inf"], "--cache-gib is 'inf'"),
        (["--gpu", "h100", "--imbalance", "inf"], "--imbalance is 'inf'"),
        (["--gpu", "h100", "--save-rates", "nowhere/rates.json"], "--save-rates is nowhere/rates.json, which cannot be"),
        (["--gpu", "h100", "--save-rates", "/"], "--save-rates is /, which cannot be written: Is a directory"),
        (["--gpu", "h100", "--plot", "nowhere/plan.png"], "--plot is nowhere/plan.png, which cannot be written"),
        (["--gpu", "h100", "--plot", "plan.foo"], "--plot is plan.foo: its ending must be one of"),
        (["--gpu", "h100", "--rates", "nowhere.json"], "nowhere.json"),
        (["--gpu", "h100", "--calibrate", "nowhere.json"], "nowhere.json"),
        (["--gpu", "h200", "--calibrate", "PREFILL"], "measured on NVIDIA H100"),
        (["--gpu", "h100", "--calibrate", "DECODE"], "no prefill reading"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_settings_are_refused_in_one_line(folder, options, named, capsys) -> None:
    results = ROOT / "examples" / "results"
    files = {"PREFILL": results / "prefill-12-layers-16384.json", "DECODE": results / "decode-12-layers.json"}
    assert cli.main(["plan", str(folder), *(str(files.get(option, option)) for option in options)]) == 2
    printed = capsys.readouterr()
    assert named in printed.err and printed.err.count("\n") == 1 and not printed.out


DISPATCHED = {"mode": "dwdp", "point": 2048, "median": 9e4, "copy_gb_per_s": None, "views": {"dispatched": 80, "streamed": 8}}
SHIPPED, BENCH = ROOT / "entrypoints/plan/rates.json", ROOT / "examples/results/prefill-12-layers-16384.json"


@pytest.mark.parametrize(
    ("file", "field", "value", "named"),
    [
        (SHIPPED, "rates.compiled", None, "rates lack compiled"),
        (SHIPPED, "gpus.h100.tflops", {}, "tflops lack bf16"),
        (SHIPPED, "gpus.h100.link_gb_per_s", 0, "link_gb_per_s"),
        (SHIPPED, "rates.eager.dense", 0, "dense"),
        *((BENCH, f"settings.{name}", None, name) for name in ("eager", "dwdp", "model", "size", "input_len", "ratio")),
        (BENCH, "settings.size", 0, "size"),
        (BENCH, "rows.0.median", -1, "median"),
        (BENCH, "rows.0.point", None, "point"),
        (BENCH, "rows", [DISPATCHED], "no prefill reading of ep, single, or dwdp whose steps were streamed"),
        (BENCH, "settings.uneven", 4.0, "measured with uneven"),
        (BENCH, "settings.output_len", 64, "measured with output_len"),
        (BENCH, "settings.engine_args.quantization", "fp8", "measured with quantization"),
        (BENCH, "settings.dwdp.cache_gib", 4, "measured with cache_gib"),
        (BENCH, "settings.hf_overrides.mlp_only_layers", list(range(48)), "no layer of it has experts"),
    ],
    ids=lambda value: str(getattr(value, "name", value))[:40],
)
def test_a_wrong_file_is_refused_in_one_line(folder, file, field, value, named, capsys) -> None:
    """One field of a good file is replaced, or left out for None."""
    content = part = json.loads(file.read_text())
    *way, last = field.split(".")
    for name in way:
        part = part[int(name) if isinstance(part, list) else name]
    if value is None:
        del part[last]
    else:
        part[last] = value
    wrong = folder / "wrong.json"
    wrong.write_text(json.dumps(content))
    option = "--rates" if file == SHIPPED else "--calibrate"
    assert cli.main(["plan", str(folder), "--gpu", "h100", option, str(wrong)]) == 2
    printed = capsys.readouterr()
    assert named in printed.err and option in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_a_model_that_is_nowhere_is_named(capsys) -> None:
    """Neither a folder nor in the hub's cache; no network is needed to say so."""
    assert cli.main(["plan", "nobody/no-such-model", "--gpu", "h100"]) == 2
    printed = capsys.readouterr().err
    assert "nobody/no-such-model is no folder" in printed and printed.count("\n") == 1
