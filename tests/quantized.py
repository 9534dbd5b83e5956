"""Seeded checkpoints with quantized experts, in the layouts that vLLM reads: everything but the experts stays bf16."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 32
SHAPE = dict(
    hidden_size=512, moe_intermediate_size=256, num_experts=32, num_experts_per_tok=4, num_hidden_layers=4, head_dim=64,
    num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=2048, dtype="bfloat16",
)
SHAPES: dict[str, dict[str, Any]] = {  # scheme: config overrides; gpt-oss calls its experts' width intermediate_size
    "mxfp4": {name: value for name, value in SHAPE.items() if name not in ("moe_intermediate_size",
                                                                           "max_position_embeddings")}
    | dict(intermediate_size=256, sliding_window=128),
}


def fp8_block(name: str, weight: torch.Tensor, _: torch.Generator) -> dict[str, torch.Tensor]:
    rows, columns = (n // 128 for n in weight.shape)
    tiles = weight.view(rows, 128, columns, 128)
    scale = tiles.abs().amax(dim=(1, 3), keepdim=True) / 448
    fp8 = (tiles / scale).to(torch.float8_e4m3fn).view(weight.shape)
    return {name: fp8, f"{name}_scale_inv": scale.view(rows, columns)}


def fp8_channel(name: str, weight: torch.Tensor, _: torch.Generator) -> dict[str, torch.Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}


def fp8_static(name: str, weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    scale = weight.abs().max() / 448
    inputs = 0.02 * (1 + torch.rand((), generator=generator))  # another for every expert, of which vLLM takes the largest
    stem = name.removesuffix(".weight")
    return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale, f"{stem}.input_scale": inputs}


def random_int32(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)


def scales(rows: int, columns: int, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Of random 4-bit numbers, whose deviation is about 4.6: so that products have the weight's."""
    return (torch.rand(rows, columns, generator=generator) + 0.5) * weight.std() / 4.6


def int4(name: str, weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    return {
        f"{name}_packed": random_int32((rows, columns // 8), generator),
        f"{name}_scale": scales(rows, columns // GROUP, weight, generator),
        f"{name}_shape": torch.tensor([rows, columns]),
    }


def awq(name: str, weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    stem = name.removesuffix(".weight")
    return {
        f"{stem}.qweight": random_int32((columns, rows // 8), generator),
        f"{stem}.qzeros": torch.full((columns // GROUP, rows // 8), 0x77777777, dtype=torch.int32),
        f"{stem}.scales": scales(columns // GROUP, rows, weight, generator),
    }


def gptq(name: str, weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """As AWQ, but that a number of qweight holds eight of a column, not of a row."""
    rows, columns = weight.shape
    stem, made = name.removesuffix(".weight"), awq(name, weight, generator)
    made[f"{stem}.qweight"] = made[f"{stem}.qweight"].view(columns // 8, rows)
    return made | {f"{stem}.g_idx": torch.arange(columns, dtype=torch.int32) // GROUP}


def mxfp4(name: str, weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    experts, columns, rows = weight.shape  # gpt-oss keeps its bf16 weights transposed
    exponent = 127 + int(torch.log2(weight.std() / 2.5))
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    scale = torch.randint(exponent - 1, exponent + 2, blocks.shape[:3], generator=generator, dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": scale}


def compressed(**weights: Any) -> dict[str, Any]:
    """compressed-tensors' config; `input_activations` among `weights` is taken out."""
    inputs = weights.pop("input_activations", None)
    weights = {"symmetric": True, "dynamic": False} | weights
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors", "config_groups": {"group_0": group},
        "format": "float-quantized" if inputs else "pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp[.]gate$"], "quantization_status": "compressed",
    }


SCHEMES: dict[str, tuple[Callable, dict[str, Any]]] = {
    "fp8_block": (fp8_block, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}),
    "fp8_static": (fp8_static, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8_channel": (fp8_channel, compressed(num_bits=8, type="float", strategy="channel", input_activations={
        "num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True})),
    "int4": (int4, compressed(num_bits=4, type="int", strategy="group", group_size=GROUP)),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True,
                    "dynamic": {"-:.*self_attn.*": {}, "-:.*mlp[.]gate$": {}}}),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4"}),
}


def is_expert_matrix(name: str) -> bool:
    return ".mlp.experts." in name and "bias" not in name


def quantize(model: str, scheme: str, folder: Path) -> str:
    """A copy of the checkpoint `model` with experts of `scheme`."""
    make, quantization = SCHEMES[scheme]
    shutil.copytree(model, folder)
    generator = torch.Generator().manual_seed(0)
    tensors, kept = {}, []
    for name, tensor in load_file(folder / "model.safetensors").items():
        if is_expert_matrix(name):
            made = make(name, tensor.float(), generator)
            tensors |= {n: t.to(torch.bfloat16) if t.dtype == torch.float32 and "scale_inv" not in n else t
                        for n, t in made.items()}
        else:
            tensors[name] = tensor
            if name.endswith(("proj.weight", "mlp.gate.weight")):
                kept.append(name.removesuffix(".weight"))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if quantization["quant_method"] in ("fp8", "awq", "mxfp4"):
        quantization = quantization | {"modules_to_not_convert": kept}
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
