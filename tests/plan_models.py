"""What tests of the plan share: published configs, cut to the fields that it reads, and what a rank of DWDP holds."""

from typing import Any

from vllm_dwdp.entrypoints.plan import memory, model
from vllm_dwdp.placement import Placement

QWEN3 = {  # Qwen3-30B-A3B
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "head_dim": 128,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 151936,
}
FP8_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16,
         "ignore": ["lm_head", "model.layers.0.self_attn*"]}
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
    "num_experts_per_tok": 6, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "n_group": 1, "topk_group": 1,
    "vocab_size": 102400, "quantization_config": None,
}
HYBRIDS = {  # by the field that tells: not all of their layers have softmax attention
    "hybrid_override_pattern": {  # Nemotron-3-Nano: Mamba, attention and experts, each a layer of its own
        "model_type": "nemotron_h", "hidden_size": 2688, "num_hidden_layers": 52, "num_attention_heads": 32,
        "head_dim": 128, "num_key_value_heads": 2, "n_routed_experts": 128, "num_experts_per_tok": 6,
        "moe_intermediate_size": 1856, "intermediate_size": 1856, "n_shared_experts": 1, "vocab_size": 131072,
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    },
    "full_attention_interval": QWEN3 | {  # Qwen3-Next, whose layer_types transformers makes up
        "model_type": "qwen3_next", "full_attention_interval": 4, "num_experts": 512, "num_experts_per_tok": 10,
    },
    "linear_attn_config": V2_LITE | {  # Kimi-Linear
        "model_type": "kimi_linear", "linear_attn_config": {"full_attn_layers": [4, 8, 12, 16, 20, 24, 27], "num_heads": 32},
    },
}


def held_by_dwdp(described: model.Model, size: int, tokens: int = 16384, **options: Any) -> memory.Held:
    placement = Placement(num_experts=described.num_experts, size=size)
    return memory.dwdp(described, placement, **{"slots": 2, "cache_gib": 0.0, "tokens": tokens} | options)
