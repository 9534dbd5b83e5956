"""Fields: what plan reads of a config.json, each of its type, and what tells of a layout that plan does not know. Pure."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from vllm_dwdp import config
from vllm_dwdp.errors import DWDPError

Count = Annotated[int, Meta(ge=0)] | None
Positive = Annotated[int, Meta(gt=0)]
Block = Annotated[tuple[Positive, ...], Meta(min_length=2, max_length=2)] | None
Texts = tuple[str, ...] | None


class Weights(msgspec.Struct):
    """Of compressed-tensors: how a group of layers is quantized."""

    type: str | None = None
    num_bits: int | None = None
    strategy: str | None = None
    block_structure: Block = None
    group_size: int | None = None
    symmetric: bool | None = None


class Group(msgspec.Struct):
    weights: Weights | None = None


UNKNOWN = {
    "index_topk": "sparse attention",
    "hybrid_override_pattern": "layers of several kinds",
    "layers_block_type": "layers of several kinds",
    "attn_layer_period": "layers of several kinds",
    "attn_type_list": "layers of several kinds",
    "full_attention_interval": "linear attention",
    "linear_attn_config": "linear attention",
    "layer_group_size": "linear attention",
    "conv_L_cache": "convolutions",
    "hybrid_layer_pattern": "attention that differs by layer",
    "num_attention_heads_per_layer": "attention that differs by layer",
    "attention_other_setting": "attention that differs by layer",
    "enable_moe_block": "an MLP beside the experts",
    "mova_num_experts": "experts in attention",
    "moe_shared_expert_intermediate_size": "shared experts of another width",
    "share_expert_dim": "shared experts of another width",
}
# What says which layers have a window; plan knows layer_types alone, or a window in all layers.
WINDOWED = ("sliding_window_pattern", "global_attn_every_n_layers", "max_window_layers", "interleaved_sliding_window")

MODEL = msgspec.defstruct("Model", [
    *((name, Positive | None, None) for name in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
        "moe_intermediate_size", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "decoder_sparse_step",
    )),
    *((name, Count, None) for name in (
        "intermediate_size", "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok",
        "num_experts_per_token", "experts_per_token", "moe_topk", "top_k_experts", "kv_lora_rank", "q_lora_rank",
        "shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts", "first_k_dense_replace",
        "num_dense_layers", "sliding_window",
    )),
    *((name, str | None, None) for name in ("model_type", "dtype", "torch_dtype")),
    *((name, bool | None, None) for name in ("use_sliding_window", "tie_word_embeddings")),
    ("moe_layer_freq", Positive | tuple[int, ...] | None, None),
    ("mlp_only_layers", tuple[int, ...] | None, None),
    ("mlp_layer_types", tuple[Literal["dense", "sparse"], ...] | None, None),
    ("layer_types", Texts, None),
    ("quantization_config", dict[str, Any] | None, None),
])
QUANTIZATION = msgspec.defstruct("Quantization", [
    *((name, str | None, None) for name in ("quant_method", "quant_algo")),
    *((name, int | None, None) for name in ("group_size", "bits", "w_bit")),
    *((name, bool | None, None) for name in ("zero_point", "sym")),
    *((name, Texts, None) for name in ("ignore", "modules_to_not_convert", "exclude_modules", "ignored_layers")),
    ("weight_block_size", Block, None), ("config_groups", dict[str, Group] | None, None),
])


def check(name: str, given: Mapping[str, Any]) -> None:
    """Raises DWDPError naming the field of model `name` that has another type, or that tells of an unknown layout."""
    for field, layout in UNKNOWN.items():
        if given.get(field):
            raise DWDPError(f"{name}: plan does not know {layout} (config.json has {field})")
    read(MODEL, given, f"{name}: config.json's ")
    read(QUANTIZATION, given.get("quantization_config") or {}, f"{name}: config.json's quantization_config.")


def read(kind: type[msgspec.Struct], given: Mapping[str, Any], spelt: str) -> None:
    known = {field: given[field] for field in kind.__struct_fields__ if field in given}
    config.read(kind, known, lambda field: f"{spelt}{field}")
