"""Families: a tiny config of every kind of MoE model that vLLM has and transformers can write a checkpoint of."""

from typing import Any

from tiny_models import BASE, ENGINE_ARGS, MLA, Family

_WIDE = BASE | dict(head_dim=32, intermediate_size=128, moe_intermediate_size=96)  # a dense width, an experts' width
_LAYERS = {"num_hidden_layers": 5, "first_k_dense_replace": 1}  # one of them dense
_SPARSE = {"num_hidden_layers": 5, "mlp_layer_types": ["dense", *["sparse"] * 4]}
_GDN = _WIDE | dict(  # three layers of linear attention, one of full
    shared_expert_intermediate_size=128, linear_key_head_dim=128, linear_value_head_dim=128, linear_num_key_heads=1,
    linear_num_value_heads=2,
)
_VISION = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, patch_size=16)

# It does not load beside vLLM's CPU build; models import it for pictures alone, which nobody sends here.
TORCHVISION = """import sys
from unittest.mock import MagicMock

__path__ = []
for name in ("transforms", "transforms.v2", "transforms.v2.functional", "transforms.functional", "io", "ops"):
    sys.modules[f"torchvision.{name}"] = MagicMock()
"""

FAMILIES: dict[str, Family] = {
    "qwen3_next": ("qwen3_next", "num_experts", _GDN),
    "qwen3_5_moe": ("qwen3_5_moe_text", "num_experts", _GDN),
    "glm4_moe": ("glm4_moe", "n_routed_experts", _WIDE | _LAYERS | dict(num_nextn_predict_layers=0, use_qk_norm=True)),
    "ernie4_5_moe": ("ernie4_5_moe", "moe_num_experts", _WIDE | dict(
        num_hidden_layers=5, moe_k=2, moe_num_shared_experts=1, moe_layer_end_index=4)),
    "phimoe": ("phimoe", "num_local_experts", BASE | dict(
        intermediate_size=96, attention_bias=True, lm_head_bias=True, architectures=["PhiMoEForCausalLM"])),
    "granitemoe": ("granitemoe", "num_local_experts", BASE | dict(intermediate_size=96, attention_multiplier=0.2)),
    "granitemoeshared": ("granitemoeshared", "num_local_experts", BASE | dict(
        intermediate_size=96, shared_intermediate_size=128, attention_multiplier=0.2)),
    "granitemoehybrid": ("granitemoehybrid", "num_local_experts", BASE | dict(
        intermediate_size=96, shared_intermediate_size=128, attention_multiplier=0.2, mamba_n_heads=4, mamba_d_head=32,
        mamba_d_state=16, layer_types=["linear_attention", "full_attention"] * 2)),
    "jamba": ("jamba", "num_experts", BASE | dict(
        intermediate_size=96, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=1, expert_layer_offset=0,
        mamba_dt_rank=8)),
    "lfm2_moe": ("lfm2_moe", "num_experts", BASE | dict(
        intermediate_size=128, moe_intermediate_size=96, num_hidden_layers=5, num_dense_layers=1,
        layer_types=["conv", "full_attention", "conv", "full_attention", "conv"])),
    "exaone_moe": ("exaone_moe", "num_experts", _WIDE | _SPARSE | dict(sliding_window=32)),
    "dots1": ("dots1", "n_routed_experts", _WIDE | _LAYERS | dict(n_shared_experts=1)),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", "num_experts", BASE | dict(head_dim=32, intermediate_size=96, moe_topk=2)),
    "flex_olmo": ("flex_olmo", "num_experts", BASE | dict(intermediate_size=96)),
    "solar_open": ("solar_open", "n_routed_experts", _WIDE),
    "minimax": ("minimax", "num_local_experts", BASE | dict(head_dim=32, intermediate_size=96)),
    "dbrx": ("dbrx", "ffn_config.moe_num_experts", dict(
        d_model=64, n_heads=2, n_layers=4, max_seq_len=512, vocab_size=512, tie_word_embeddings=False, dtype="float32",
        attn_config=dict(kv_n_heads=1, clip_qkv=8.0, rope_theta=10000.0), ffn_config=dict(ffn_hidden_size=96, moe_top_k=2))),
    "nemotron_h": ("nemotron_h", "n_routed_experts", _WIDE | dict(
        layers_block_type=["linear_attention", "moe", "full_attention", "moe"] * 2, num_hidden_layers=8,
        ssm_state_size=16, mamba_num_heads=4, mamba_head_dim=32, n_groups=2,
        moe_shared_expert_intermediate_size=128)),
    "afmoe": ("afmoe", "num_experts", _WIDE | dict(
        num_hidden_layers=5, num_dense_layers=1, num_shared_experts=1, sliding_window=32,
        score_func="sigmoid", route_norm=True, n_group=1, topk_group=1)),
    "cohere2_moe": ("cohere2_moe", "num_experts", BASE | dict(
        head_dim=32, intermediate_size=96, tie_word_embeddings=True, num_shared_experts=1)),
    "llama4": ("llama4_text", "num_local_experts", BASE | dict(
        head_dim=32, intermediate_size=96, intermediate_size_mlp=128, num_experts_per_tok=1)),
    "gemma4": ("gemma4_text", "num_experts", _WIDE | dict(
        enable_moe_block=True, top_k_experts=2, hidden_size_per_layer_input=0, sliding_window=32,
        layer_types=["sliding_attention", "full_attention"] * 2, tie_word_embeddings=True)),
    "kimi_linear": ("kimi_linear", "num_experts", MLA | _SPARSE | dict(
        num_experts_per_token=2, linear_head_dim=32, linear_num_heads=2)),
    "qwen3_vl_moe": ("qwen3_vl_moe", "text_config.num_experts", dict(
        text_config=_WIDE | dict(norm_topk_prob=True, rope_parameters=dict(
            rope_type="default", rope_theta=10000.0, mrope_section=[8, 4, 4], mrope_interleaved=True)),
        vision_config=_VISION | dict(deepstack_visual_indexes=[0], num_position_embeddings=16), tie_word_embeddings=False,
        image_token_id=300, video_token_id=301, vision_start_token_id=302, vision_end_token_id=303, dtype="float32")),
    "glm4v_moe": ("glm4v_moe", "text_config.n_routed_experts", dict(
        text_config=_WIDE | _LAYERS | dict(use_qk_norm=False, rope_parameters=dict(
            rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5, mrope_section=[4, 2, 2])),
        vision_config=_VISION, tie_word_embeddings=False, dtype="float32",
        image_token_id=300, video_token_id=301, image_start_token_id=302, image_end_token_id=303)),
    "embedding": ("qwen3_moe", "num_experts", _WIDE | dict(norm_topk_prob=True)),
}
ENGINES: dict[str, dict[str, Any]] = {name: {} for name in FAMILIES} | ENGINE_ARGS
ENGINES["embedding"] = {"runner": "pooling", "convert": "embed", "skip_tokenizer_init": False}
for _name in ("qwen3_vl_moe", "glm4v_moe"):  # their language part
    ENGINES[_name] = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
for _name in ("qwen3_next", "qwen3_5_moe"):  # their linear attention has no other type on CPU
    ENGINES[_name] = {"dtype": "bfloat16"}
ENGINES["kimi_linear"] = ENGINE_ARGS["deepseek_v3"]
