"""Formats: how many bytes a checkpoint's linear layers take, and in which arithmetic they are computed. Pure."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vllm_dwdp.errors import DWDPError

DTYPE_BITS = {"bfloat16": 16, "float16": 16, "half": 16, "float32": 32}
FP8_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """Bits of a weight, and the bytes that belong to each block of (rows, columns); 0 columns mean a whole row.

    `tile` is what the kernel rounds an expert's width and the hidden size up to.
    `compute` is the arithmetic of the kernels that vLLM has for it: 4-bit integers and MXFP4 are computed in bf16.
    Scales per tensor count nothing: they are replicated.
    """

    name: str
    bits: float
    block: tuple[int, int] = (1, 0)
    scale_bytes: float = 0.0
    compute: str = "bf16"
    tile: tuple[int, int] = (1, 1)

    def tensors(self, rows: int, columns: int) -> list[int]:
        """Bytes of a [rows, columns] weight and, if it has one, of its tensor of scales."""
        blocks = -(-rows // self.block[0]) * -(-columns // (self.block[1] or columns))
        return [nbytes for nbytes in (int(rows * columns * self.bits / 8), int(blocks * self.scale_bytes)) if nbytes]


def plain(config: Mapping[str, Any]) -> Format:
    """The format of what is not quantized. Raises DWDPError for a dtype that is none of vLLM's."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if name not in DTYPE_BITS:
        raise DWDPError(f"config.json: dtype is {name}; plan knows {', '.join(DTYPE_BITS)}")
    return Format(name={"bfloat16": "bf16"}.get(name, name), bits=DTYPE_BITS[name])


def quantized(config: Mapping[str, Any]) -> Format:
    """The experts' format, by `quantization_config`. Raises DWDPError naming the field that plan does not know."""
    given = config.get("quantization_config") or {}
    method = given.get("quant_method", "modelopt" if "quant_algo" in given else None)
    if not given:
        return plain(config)
    if method == "fp8":
        return fp8(given.get("weight_block_size"))
    if method == "mxfp4":
        return Format(name="mxfp4", bits=4, block=(1, 32), scale_bytes=1, tile=(128, 256))  # of Marlin
    if method == "modelopt" and given.get("quant_algo") == "NVFP4":
        return nvfp4(given.get("group_size") or 16)
    if method == "modelopt" and given.get("quant_algo") in FP8_ALGORITHMS:
        return fp8([128, 128] if given["quant_algo"] == "FP8_PB_WO" else None)
    if method in ("awq", "gptq", "awq_marlin", "gptq_marlin"):
        has_zeros = given.get("zero_point", not given.get("sym", True))
        return integers(given.get("bits") or given.get("w_bit"), given.get("group_size"), has_zeros)
    if method == "compressed-tensors":
        return compressed(given)
    detail = f" with quant_algo {given['quant_algo']}" if "quant_algo" in given else ""
    raise DWDPError(f"config.json: quantization_config.quant_method is {method}{detail}, which plan does not know")


def compressed(given: Mapping[str, Any]) -> Format:
    """compressed-tensors: its first group's weights."""
    groups = [*(given.get("config_groups") or {}).values(), {}]
    weights = groups[0].get("weights") or {}
    kind, bits, strategy = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
    if (kind, bits) == ("float", 8):
        return fp8(weights.get("block_structure") if strategy == "block" else None, channels=strategy == "channel")
    if (kind, bits) == ("float", 4):
        return nvfp4(weights.get("group_size") or 16)
    if kind == "int":
        group_size = weights.get("group_size") if strategy == "group" else None
        return integers(bits, group_size, not weights.get("symmetric", True))
    raise DWDPError(f"config.json: plan does not know config_groups with {bits}-bit weights of type {kind}")


def fp8(block: list[int] | None, channels: bool = False) -> Format:
    if block:
        return Format(name="fp8 blocks", bits=8, block=(block[0], block[1]), scale_bytes=4, compute="fp8")
    return Format(name="fp8 channels" if channels else "fp8", bits=8, scale_bytes=4 * channels, compute="fp8")


def nvfp4(group: int) -> Format:
    return Format(name="nvfp4", bits=4, block=(1, group), scale_bytes=1, compute="fp4")


def integers(bits: int | None, group: int | None, has_zeros: bool) -> Format:
    """AWQ, GPTQ and the like: a 16-bit scale for each group or row, and a zero point of as many bits as a weight."""
    if bits not in (4, 8):
        raise DWDPError(f"config.json: quantization_config has integers of {bits} bits; plan knows 4 and 8")
    columns = group if group and group > 0 else 0
    return Format(name=f"int{bits}", bits=bits, block=(1, columns), scale_bytes=2 + has_zeros * bits / 8)


def keeps_plain(config: Mapping[str, Any], part: str) -> bool:
    """Whether the checkpoint leaves modules named `part` unquantized; MXFP4 is a format of experts alone."""
    given = config.get("quantization_config") or {}
    lists = ("ignore", "modules_to_not_convert", "exclude_modules", "ignored_layers")
    named = [entry for name in lists for entry in given.get(name) or ()]
    return given.get("quant_method") == "mxfp4" or any(part in entry for entry in named)
