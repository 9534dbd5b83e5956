"""Invariant: a plan's bytes are those of checkpoints, and its times those that were measured and published."""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vllm_dwdp.budget import GIB
from vllm_dwdp.entrypoints import cli
from vllm_dwdp.entrypoints.plan import calibrate, memory, model, rates, roofline, run
from vllm_dwdp.entrypoints.plan.roofline import Load
from vllm_dwdp.placement import Placement

from conftest import ROOT

QWEN3 = {  # Qwen3-30B-A3B
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "head_dim": 128,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 151936,
}
FP8_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head", "model.layers.0.self_attn*"]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
R1 = {  # DeepSeek-R1 as published, in blocks of FP8
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "first_k_dense_replace": 3, "moe_layer_freq": 1, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "num_attention_heads": 128, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "vocab_size": 129280, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "quantization_config": FP8_BLOCKS,
}
GPT_OSS = {  # gpt-oss-120b
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "num_local_experts": 128, "num_experts_per_tok": 4,
    "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 18, "vocab_size": 201088,
    "tie_word_embeddings": False, "quantization_config": MXFP4,
}
MIXTRAL = {  # Mixtral-8x7B
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "sliding_window": None, "vocab_size": 32000, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}
OLMOE = {  # OLMoE-1B-7B
    "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
    "vocab_size": 50304, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}
GLM = {  # GLM-4.5
    "model_type": "glm4_moe", "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "num_hidden_layers": 92, "first_k_dense_replace": 3, "n_routed_experts": 160, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151552, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}
V2_LITE = R1 | {  # DeepSeek-V2-Lite
    "model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "first_k_dense_replace": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "num_attention_heads": 16, "q_lora_rank": None, "vocab_size": 102400,
    "quantization_config": None,
}


def held_by_dwdp(described: model.Model, size: int, tokens: int = 16384, **options: Any) -> memory.Held:
    placement = Placement(num_experts=described.num_experts, size=size)
    return memory.dwdp(described, placement, **{"slots": 2, "cache_gib": 0.0, "tokens": tokens} | options)


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
        (compressed(type="float", num_bits=8, strategy="block", block_structure=[128, 128]), WEIGHTS + 4 * WEIGHTS // 128**2),
        (compressed(type="int", num_bits=4, strategy="group", group_size=128, symmetric=True), WEIGHTS // 2 + 2 * WEIGHTS // 128),
        (compressed(type="int", num_bits=8, strategy="channel", symmetric=True), WEIGHTS + 2 * (1536 + 2048)),
        (compressed(type="float", num_bits=4, strategy="tensor_group", group_size=16), WEIGHTS // 2 + WEIGHTS // 16),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, WEIGHTS // 2 + 2.5 * WEIGHTS // 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": 64, "sym": True}, WEIGHTS + 2 * WEIGHTS // 64),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, WEIGHTS),
        (NVFP4, WEIGHTS // 2 + WEIGHTS // 16),
        (MXFP4, WEIGHTS // 2 + WEIGHTS // 32),
    ],
    ids=["bf16", "fp8-blocks", "fp8", "fp8-channels", "fp8-blocks-ct", "int4", "int8-channels", "nvfp4-ct", "awq", "gptq",
         "fp8-modelopt", "nvfp4", "mxfp4"],
)
def test_expert_bytes_are_the_formats(given, nbytes) -> None:
    """Weights and the scales that travel with them; a scale per tensor does not."""
    assert sum(model.parse("m", QWEN3 | {"quantization_config": given}).expert_bytes) == nbytes


def test_what_a_checkpoint_leaves_plain_is_counted_plain() -> None:
    """MXFP4 and NVFP4 checkpoints keep attention in bf16; the published sizes of gpt-oss-120b and R1 bear that out."""
    assert total_bytes(GPT_OSS) / GIB == pytest.approx(60.8, rel=5e-3)
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
        (QWEN3 | {"quantization_config": {"quant_method": "exl9"}}, "exl9"),
        (QWEN3 | {"quantization_config": {"quant_method": "gptq", "bits": 3}}, "3 bits"),
        (QWEN3 | {"torch_dtype": "int7"}, "int7"),
        (QWEN3 | {"mlp_only_layers": list(range(48))}, "no layer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_plan_does_not_know_is_refused_in_one_line(config, named, tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["plan", str(tmp_path), "--gpu", "h100"]) == 2
    printed = capsys.readouterr()
    assert named in printed.err and printed.err.count("\n") == 1 and not printed.out


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
            process_bytes=table.process_gib * GIB,
        )
        assert left == pytest.approx(measured[mode]["kv_cache_tokens"], rel=0.03), mode


def test_residents_take_their_share_off_the_link_and_the_slots() -> None:
    described = model.parse("m", QWEN3)
    none, half, full = (held_by_dwdp(described, 2, cache_gib=gib) for gib in (0.0, 13.5, 100.0))
    assert half.streamed == none.streamed / 2 and half.slots == none.slots / 2 and half.residents == none.shard / 2
    assert full.streamed == full.slots == 0 and full.shard + full.residents == described.all_expert_bytes


# What was measured on two H100s: kind of engine, layers, tokens a step, prompt tokens/s per GPU of the single GPU that
# holds all, of DWDP and of expert parallelism. Prompts of 6.5K to 8K tokens, of 8K in the servers of 24 layers.
MEASURED = [
    ("eager", 12, 16384, 197_462, 192_475, 146_886), ("eager", 12, 16384, 201_005, 194_443, 152_401),
    ("eager", 12, 8192, 190_855, 180_482, 124_707), ("eager", 12, 4096, 169_017, 138_996, 96_595),
    ("eager", 48, 16384, 50_400, 48_673, 38_948), ("eager", 48, 16384, None, 48_700, 30_900),
    ("compiled", 12, 16384, 210_233, 202_830, 180_305), ("compiled", 12, 8192, 201_315, 185_606, 168_669),
    ("compiled", 24, 8192, None, 90_602, 84_339),
]


def points(measured: list[tuple]) -> list[calibrate.Point]:
    found = []
    for _, layers, tokens, *values in measured:
        described = model.parse("m", QWEN3 | {"num_hidden_layers": layers})
        load = Load(tokens=tokens, input_len=8192, ratio=1.0 if layers == 24 else 0.8)
        found += [
            calibrate.Point(
                mode=mode, load=load, value=value, model=described, size=2,
                streamed_bytes=held_by_dwdp(described, 2).streamed,
            )
            for mode, value in zip(("single", "dwdp", "ep"), values, strict=True) if value
        ]
    return found


def told(what: str, errors: Mapping[str, float]) -> tuple[float, float]:
    """The median and the worst error, printed."""
    sizes = {name: abs(error) for name, error in errors.items()}
    median, worst = statistics.median(sizes.values()), max(sizes, key=sizes.get)
    print(f"plan against {what}: {len(errors)} points, median error {median:.1%}, worst {errors[worst]:+.1%} ({worst})")
    return median, sizes[worst]


def test_measured_steps_are_predicted() -> None:
    """Median under 3%, worst under 25%: stock expert parallelism of 48 layers was measured at 30,900 and at 38,948."""
    table, errors = rates.read(None), {}
    for row in MEASURED:
        for point in points([row]):
            predicted = point.predict(table.gpus["h100"], table.rates[row[0]])
            errors[f"{point.mode}, {row[0]}, {row[1]} layers, {row[2]} tokens, {point.value:,}"] = predicted / point.value - 1
    median, worst = told("two H100s", errors)
    assert len(errors) == 25 and median < 0.03 and worst < 0.25
    assert sorted(map(abs, errors.values()))[-2] < 0.12, "all but that one"


def test_rates_of_12_layers_predict_the_whole_model() -> None:
    """Out of sample: spoilt rates, refitted to the readings of 12 layers, predict 48 layers within 10%."""
    table = rates.read(None)
    spoilt = table.rates["eager"].scaled(0.6)
    spoilt = msgspec.structs.replace(spoilt, interference=0.4, all2all=0.6, layer_us=300, step_ms=1)
    gpu = table.gpus["h100"]
    fitted = calibrate.refit(spoilt, gpu, points(MEASURED[:4]))
    errors = {point.mode: point.predict(gpu, fitted) / point.value - 1 for point in points(MEASURED[4:5])}
    before = [abs(point.predict(gpu, spoilt) / point.value - 1) for point in points(MEASURED[4:5])]
    _, worst = told("48 layers by 12", errors)
    assert worst < 0.10 < min(before)


R1_NVFP4 = R1 | {"quantization_config": NVFP4}
PEAKS = rates.Rates(
    dense=1, attention=1, experts=1, memory=1, link=1, interference=0, all2all=1, layer_us=0, step_ms=0
)


def r1_step(rate: rates.Rates, load: Load, size: int = 4, **fields: int) -> roofline.Step:
    described = model.parse("m", R1_NVFP4 | fields)
    streamed = held_by_dwdp(described, size).streamed
    return roofline.step(described, rates.read(None).gpus["gb200"], rate, load, size=size, streamed_bytes=streamed)


def test_published_compute_to_prefetch_ratios_are_the_rooflines() -> None:
    """A layer of DeepSeek-R1 in NVFP4 on four GB200, batch 1, its GEMMs and attention at peaks: within 5%."""
    published, errors = {1024: 0.19, 8192: 0.62, 16384: 1.52, 32768: 4.77}, {}
    for tokens, ratio in published.items():
        step = r1_step(PEAKS, Load(tokens=tokens, input_len=tokens), first_k_dense_replace=0)
        errors[f"{tokens} tokens"] = (step.compute.total - step.compute.other) / step.prefetch / ratio - 1
    median, worst = told("the paper's roofline", errors)
    assert median < 0.03 and worst < 0.05


def published_rates() -> tuple[rates.Rates, float, float]:
    """Rates, imbalance and merge copy (in parts of a step) by the paper's breakdown of one step: 32K tokens of 8K prompts."""
    load = Load(tokens=32768, input_len=8192, ratio=0.8)
    ideal, link = r1_step(PEAKS, load), 0.83
    second = ideal.prefetch / link / 429.00  # of the breakdown's unit
    dep = {"attention": 269.67, "experts": 342.40, "dense": 177.50, "memory": 241.69}
    parts = {"attention": ideal.compute.attention, "experts": ideal.compute.experts, "dense": ideal.compute.dense,
             "memory": ideal.compute.other}
    slowed = 320.56 + 337.42 + 189.28 + 284.32
    fitted = {name: parts[name] / (dep[name] * second) for name in parts}
    rate = rates.Rates(
        **fitted, link=link, interference=(slowed - sum(dep.values())) / 429.00,
        all2all=ideal.all2all / (126.74 * second), layer_us=0, step_ms=0,
    )
    by_length = r1_step(rate, load).waiting / second
    return rate, (161.85 - by_length) / dep["experts"], 34.00 / slowed


def test_published_gains_are_predicted() -> None:
    """DWDP over attention data parallelism with expert parallelism, by one breakdown: median under 3%, worst under 6%."""
    rate, imbalance, merge = published_rates()

    def gain(tokens: int = 32768, input_len: int = 8192, deviation: float = 0.0, size: int = 4, ratio: float = 1.0) -> float:
        if deviation:  # of prompts uniform in [ratio, 1] * longest with this mean
            half = min(deviation * 3**0.5, 0.99 * input_len)
            input_len, ratio = int(input_len + half), (input_len - half) / (input_len + half)
        step = r1_step(rate, Load(tokens=tokens, input_len=input_len, ratio=ratio, imbalance=imbalance), size)
        return step.ep / (step.dwdp * (1 + merge))

    published = {
        **{f"prompts of {k}K": (gain(input_len=k * 1024, ratio=0.8), value)
           for k, value in ((1, 1.11), (8, 1.10), (16, 1.09), (32, 1.09))},
        "16K a step": (gain(tokens=16384, ratio=0.8), 1.01),
        **{f"deviation {k}K": (gain(input_len=16384, deviation=k * 1024), value)
           for k, value in ((0, 1.09), (1, 1.08), (2, 1.11), (4, 1.15))},
        **{f"group of {size}": (gain(input_len=16384, size=size), value) for size, value in ((3, 1.093), (4, 1.091))},
        "ratio 0.5, 16K": (gain(tokens=16384, ratio=0.5), 1.081), "ratio 0.5, 32K": (gain(ratio=0.5), 1.139),
        "ratio 0.8, 16K": (gain(tokens=16384, ratio=0.8), 1.053), "ratio 0.8, 32K": (gain(ratio=0.8), 1.109),
    }
    median, worst = told("the paper's gains", {name: mine / theirs - 1 for name, (mine, theirs) in published.items()})
    assert len(published) == 15 and median < 0.03 and worst < 0.06


def test_contention_is_the_papers() -> None:
    assert [round(100 * chance, 1) for chance in roofline.contention(4)] == [44.4, 44.4, 11.1]
    assert [round(100 * chance, 1) for chance in roofline.contention(8)[:5]] == [39.7, 39.7, 16.5, 3.7, 0.5]
    assert roofline.contention(2) == [1.0]


def test_steps_follow_the_link_and_the_work() -> None:
    """Copies are waited for when computing is shorter, and never again from the number of tokens that plan names."""
    described, gpu = model.parse("m", QWEN3), rates.read(None).gpus["h100"]

    def step(tokens: int, **load: Any) -> roofline.Step:
        load = Load(tokens=tokens, input_len=8192, **load)
        return roofline.step(described, gpu, rates.read(None).rates["compiled"], load, size=2, streamed_bytes=29e9)

    few, many = step(512), step(32768)
    assert few.exposed > 0 and few.dwdp == pytest.approx(few.prefetch, rel=0.1) and few.dwdp > few.ep > few.single
    assert many.exposed == 0 and many.single < many.dwdp < many.ep
    uneven = step(32768, imbalance=0.4)
    assert uneven.ep > many.ep and uneven.dwdp == many.dwdp, "only the ranks that meet wait"
    assert many.waiting == 0 < step(32768, ratio=0.8).waiting < step(32768, ratio=0.2).waiting
    alone, shared = (roofline.compute(described, gpu, PEAKS, Load(tokens=64, input_len=64), ranks) for ranks in (1, 2))
    assert shared.experts == pytest.approx(alone.experts / 2, rel=0.02), "a rank reads its own half alone"
    four = roofline.step(described, gpu, PEAKS, Load(tokens=16384, input_len=8192), size=4, streamed_bytes=0)
    each = 4 * 16384 * 2048 * 3 * (1 - 0.75**8)  # to a token's ranks and back, two bytes an element
    assert four.all2all == pytest.approx(48 * each / 450e9)
    hidden_from = run.first(lambda tokens: step(tokens).exposed == 0)
    assert step(hidden_from).exposed == 0 < step(hidden_from - run.GRID).exposed
    assert run.first(lambda tokens: False) is None and run.first(lambda tokens: True) <= run.GRID


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
    command = [sys.executable, "-c", code, "plan", str(folder), "--gpu", "h200", "--size", "4", "--tokens", "1024,16384"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    for text in ("48 of 48 layers with 128 experts, top 8, bf16", "an expert 9.44 MB", "1: 44.4%, 2: 44.4%, 3: 11.1%"):
        assert text in ended.stdout
    (dwdp,) = [line.split() for line in ended.stdout.splitlines() if line.startswith("DWDP   ")]
    assert dwdp[2:5] == ["13.50", "0.00", "1.69"], "a quarter of 54 GiB, and two slots of three quarters of a layer"
    few, many = [line.split() for line in ended.stdout.splitlines() if line.startswith(("1,024 ", "16,384 "))]
    assert float(few[6]) > 0 == float(many[6]) and float(few[-2]) < 1 < float(many[-2])


def test_what_does_not_fit_says_so(folder, capsys) -> None:
    assert cli.main(["plan", str(folder), "--gpu", "h100", "--gpu-memory-utilization", "0.5"]) == 0
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
        (["--gpu", "h100", "--size", "1"], "--size"),
        (["--gpu", "h100", "--size", "200"], "200 ranks cannot share 128 experts"),
        (["--gpu", "h100", "--tokens", "0"], "--tokens"),
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
    assert named in printed.err and printed.err.count("\n") == 1


def test_a_model_that_is_nowhere_is_named(capsys) -> None:
    """Neither a folder nor in the hub's cache; no network is needed to say so."""
    assert cli.main(["plan", "nobody/no-such-model", "--gpu", "h100"]) == 2
    printed = capsys.readouterr().err
    assert "nobody/no-such-model is no folder" in printed and printed.count("\n") == 1
