"""Write small seeded MoE checkpoints with a byte-level tokenizer, for tests and the demo.

    python examples/tiny_models.py FAMILY FOLDER

Each is 1-3 M float32 parameters with at least 4 MoE layers of 12 experts, top-2, in the layout of that family's real
checkpoints. Greedy text is printable ASCII and never ends early, so two engines that differ anywhere say so.
"""
import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.initialization import no_init_weights

SEED = 0
VOCAB = 512  # rows of the embedding; the tokenizer uses the first 259
PRINTABLE = slice(32, 127)  # token ids, equal to their byte, that greedy decoding can choose
BOS, EOS, PAD = 256, 257, 258
LAYERS = 4
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

BASE = dict(
    vocab_size=VOCAB, hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1,
    num_experts_per_tok=2, max_position_embeddings=512, tie_word_embeddings=False,
    bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, dtype="float32",
)
MLA = BASE | dict(
    num_hidden_layers=LAYERS + 1, first_k_dense_replace=1, intermediate_size=128, moe_intermediate_size=96,
    n_shared_experts=1, num_key_value_heads=2,
    # The only head size that MLA has on CPU is 512 + 64.
    kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=32, v_head_dim=32,
)
_QWEN3 = BASE | dict(head_dim=32, intermediate_size=128, moe_intermediate_size=96, norm_topk_prob=True)

Family = tuple[str, str, dict[str, Any]]  # model type; the field of the number of experts, PART.FIELD if nested; config
_FAMILIES: dict[str, Family] = {
    "qwen3_moe": ("qwen3_moe", "num_experts", _QWEN3),
    "qwen2_moe": ("qwen2_moe", "num_experts", BASE | dict(
        intermediate_size=128, moe_intermediate_size=96, shared_expert_intermediate_size=128)),
    "mixtral": ("mixtral", "num_local_experts", BASE | dict(intermediate_size=96)),
    "olmoe": ("olmoe", "num_experts", BASE | dict(intermediate_size=96)),
    "deepseek_v2": ("deepseek_v2", "n_routed_experts", MLA | dict(
        q_lora_rank=None, n_group=2, topk_group=1, topk_method="group_limited_greedy")),
    "deepseek_v3": ("deepseek_v3", "n_routed_experts", MLA | dict(
        q_lora_rank=32, n_group=2, topk_group=1, num_nextn_predict_layers=0,
        topk_method="noaux_tc", scoring_func="sigmoid")),
    "gpt_oss": ("gpt_oss", "num_local_experts", BASE | dict(
        head_dim=32, intermediate_size=96, sliding_window=32, max_position_embeddings=131072)),
    # vLLM's Transformers backend, whose experts are a subclass of RoutedExperts.
    "transformers_moe": ("qwen3_moe", "num_experts", _QWEN3),
}
FAMILIES = tuple(_FAMILIES)

# What a family needs of `LLM(...)` beyond its folder.
ENGINE_ARGS: dict[str, dict[str, Any]] = {family: {} for family in FAMILIES}
for _family in ("deepseek_v2", "deepseek_v3"):  # the CPU build's rotary kernel errs on MLA's 3-D query
    ENGINE_ARGS[_family] = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
ENGINE_ARGS["transformers_moe"] = {"model_impl": "transformers"}


def make_model(family: str | Family, folder: Path, **config_overrides: Any) -> Path:
    """Write `family`'s checkpoint and tokenizer into `folder`, unless it holds that very model already.

    `num_experts` is understood by every family; other overrides are fields of its transformers config.
    """
    model_type, experts_field, fields = family if isinstance(family, tuple) else _FAMILIES[family]
    num_experts = config_overrides.pop("num_experts", 12)
    if "n_group" in fields and num_experts % fields["n_group"]:
        fields = fields | {"n_group": 1}
    part, _, field = experts_field.rpartition(".")
    fields = fields | ({part: fields[part] | {field: num_experts}} if part else {field: num_experts}) | config_overrides
    recipe = hashlib.sha256(Path(__file__).read_bytes() + json.dumps([family, fields], sort_keys=True).encode())
    stamp = folder / "tiny_model.sha256"
    if stamp.exists() and stamp.read_text() == recipe.hexdigest():
        return folder
    shutil.rmtree(folder, ignore_errors=True)

    with no_init_weights():  # all are drawn below
        config = transformers.AutoConfig.for_model(model_type, **fields)
        is_text = type(config) in transformers.AutoModelForCausalLM._model_mapping
        kind = transformers.AutoModelForCausalLM if is_text else transformers.AutoModelForImageTextToText
        model = kind.from_config(config)
    _draw_weights(model)
    if "architectures" in fields:  # as vLLM knows the model, where transformers' class is called otherwise
        model.__class__ = type(fields["architectures"][0], (type(model),), {})
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    if model_type == "qwen3_vl_moe":  # real ones have their experts' matrices the other way
        tensors = load_file(folder / "model.safetensors")
        turned = {name: tensor.transpose(1, 2).contiguous() for name, tensor in tensors.items() if ".experts." in name}
        save_file(tensors | turned, folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer().save_pretrained(folder)
    stamp.write_text(recipe.hexdigest())
    return folder


def _draw_weights(model: torch.nn.Module) -> None:
    """Seeded weights under which attention, router and experts all matter to the next token."""
    generator = torch.Generator().manual_seed(SEED)
    for name, tensor in sorted(model.state_dict().items()):
        if "norm" in name:
            tensor.fill_(1.0)
        elif name == "lm_head.weight":
            tensor.zero_()[PRINTABLE].normal_(std=0.5, generator=generator)
        elif not tensor.is_floating_point():
            continue
        elif "embed_tokens" in name or "wte" in name:
            tensor.normal_(generator=generator)
        elif name.endswith(("gate.weight", "router.weight", "router.layer.weight")):
            tensor.normal_(std=0.5, generator=generator)
        elif "bias" in name or "sinks" in name:
            tensor.normal_(std=0.2, generator=generator)
        else:
            tensor.normal_(std=2.0 * tensor.shape[-1] ** -0.5, generator=generator)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per byte, its id the byte's value, then bos, eos and pad."""
    names = set(pre_tokenizers.ByteLevel.alphabet())  # a byte is named by its character, or in order from U+0100
    renamed = iter(sorted(name for name in names if ord(name) >= 256))
    vocab = {chr(byte) if chr(byte) in names else next(renamed): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(make_model(arguments.family, arguments.folder))
