"""Write the config.json of models that people serve on Hopper GPUs, by format, for engines with dummy weights.

    python tests/true_shapes.py FOLDER    # tests/visit.sh MODEL OUT formats

Fields beyond those that `vllm-dwdp plan` reads are transformers' defaults. vLLM's dummy weights are nearly all zero in FP8 and leave 4-bit
ones as they are allocated, on which GPUs draw less power and may run faster than on real ones, in every mode.
"""

import json
import sys
from pathlib import Path
from typing import Any

import transformers

import conftest  # noqa: F401  (vLLM's environment)
from forecasts import QWEN3_235B
from plan_models import FP8_BLOCKS, GPT_OSS, QWEN3, V2_LITE
from quantized import compressed

INT4 = compressed(num_bits=4, type="int", strategy="group", group_size=128)
FP8 = FP8_BLOCKS | {"modules_to_not_convert": ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(94))]}
GPT_OSS_KEPT = {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b-fp8": QWEN3 | {"quantization_config": FP8},
    "qwen3-30b-a3b-int4": QWEN3 | {"quantization_config": INT4},
    "gpt-oss-120b": GPT_OSS | {"quantization_config": GPT_OSS["quantization_config"] | GPT_OSS_KEPT},
    "deepseek-v2-lite": V2_LITE | {"max_position_embeddings": 32768},
    "qwen3-235b-a22b-fp8": QWEN3_235B | {"quantization_config": FP8},  # what two H200 hold, and one does not
}
ARCHITECTURES = {"qwen3_moe": "Qwen3MoeForCausalLM", "gpt_oss": "GptOssForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}


def write(folder: Path) -> list[Path]:
    made = []
    for name, fields in SHAPES.items():
        kind = fields["model_type"]
        given = {key: value for key, value in fields.items() if key not in ("model_type", "torch_dtype")}
        if given.get("quantization_config", ...) is None:
            del given["quantization_config"]
        config = transformers.AutoConfig.for_model(kind, **given)
        written = config.to_dict() | {"architectures": [ARCHITECTURES[kind]], "torch_dtype": "bfloat16"}
        (folder / name).mkdir(parents=True, exist_ok=True)
        made.append(folder / name)
        (made[-1] / "config.json").write_text(json.dumps(written, default=str))
    return made


if __name__ == "__main__":
    print(*write(Path(sys.argv[1])), sep="\n")
