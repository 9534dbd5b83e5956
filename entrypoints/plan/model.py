"""Model: the shapes and bytes of a MoE model, read from its config.json. Pure but for reading the file."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_dwdp.entrypoints.plan import fields
from vllm_dwdp.entrypoints.plan.formats import Format, keeps_plain, plain, quantized
from vllm_dwdp.entrypoints.plan.source import read_config, read_json
from vllm_dwdp.errors import DWDPError

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "top_k_experts")
GATED_ATTENTION = ("afmoe",)  # whose every output has a gate, as wide as the queries
EXPERTS_ARE_THE_MLP = ("mixtral", "olmoe", "gpt_oss", "phimoe", "minimax_m2")  # whose intermediate_size is an expert's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linears:
    """Linear layers that are computed one after the other: weights, their bytes, the arithmetic."""

    weights: int
    nbytes: int
    compute: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Sizes of one model. Lists have an entry a layer; bytes are those of the checkpoint's format.

    `expert_bytes` are one expert's bytes in each streamed tensor. `windows` are how many tokens attention looks back,
    None for all. `qk_dim` and `v_dim` are a token's elements over all query heads; `kv_bytes_per_layer` are what
    it leaves in the KV cache.
    """

    name: str
    format: Format
    num_experts: int
    top_k: int
    expert_weights: int
    expert_bytes: list[int]
    expert_width: int
    hidden: int
    qk_dim: int
    v_dim: int
    windows: list[int | None]
    is_moe: list[bool]
    linears: list[list[Linears]]
    vocabulary_bytes: int
    kv_bytes_per_layer: int

    @property
    def num_moe_layers(self) -> int:
        return sum(self.is_moe)

    @property
    def replicated_bytes(self) -> int:
        """What every rank holds whole, DWDP's and expert parallelism's alike: all but the routed experts."""
        return self.vocabulary_bytes + sum(part.nbytes for layer in self.linears for part in layer)

    @property
    def all_expert_bytes(self) -> int:
        return self.num_moe_layers * self.num_experts * sum(self.expert_bytes)


def load(name: str, overrides: Mapping[str, Any]) -> Model:
    """From a folder's config.json or a hub's, with fields replaced as vLLM's --hf-overrides does.

    Raises DWDPError for what cannot be found or read, naming the field that is missing.
    """
    config = read_config(name, overrides)
    if "quantization_config" not in config and (other := read_json(name, "hf_quant_config.json", missing=True)):
        if not isinstance(other, dict) or not isinstance(other.get("quantization"), dict):
            raise DWDPError(f"{name}: hf_quant_config.json has no quantization")
        config["quantization_config"] = other["quantization"] | {"quant_method": "modelopt"}
    return parse(Path(name).name, config)


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether any part of it has a number of experts, whatever that is called."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return any(part.get(field) for part in parts for field in (*EXPERTS, "moe_num_experts"))


def no_experts(name: str) -> str:
    return f"{name} has no MoE layers (config.json has none of {', '.join(EXPERTS)})"


def parse(name: str, config: Mapping[str, Any]) -> Model:
    """Raises DWDPError naming the field that the model lacks or that plan does not know."""

    def field(*names: str) -> int:
        value = next((config[n] for n in names if config.get(n)), None)
        if value is None:
            raise DWDPError(f"{name}: config.json lacks {' or '.join(names)}, which plan needs of {kind}")
        return value

    fields.check(name, config)
    kind = config.get("model_type") or "a model without model_type"
    hidden, layers, heads = field("hidden_size"), field("num_hidden_layers"), field("num_attention_heads")
    if not has_experts(config):
        raise DWDPError(no_experts(name))
    num_experts, top_k = field(*EXPERTS), field(*TOP_K)
    if top_k > num_experts:
        raise DWDPError(f"{name}: config.json has {num_experts} experts, of which a token takes {top_k}")
    width = field("intermediate_size") if kind in EXPERTS_ARE_THE_MLP else field("moe_intermediate_size")
    form, bare = quantized(config), plain(config)
    attention_form = bare if keeps_plain(config, "attn") else form
    shared_form = bare if keeps_plain(config, "shared_expert") else form

    if config.get("kv_lora_rank"):
        projections, qk_dim, v_dim, cached = latent_attention(field, config.get("q_lora_rank"), hidden, heads)
    else:
        head_dim = config.get("head_dim") or hidden // heads
        if not head_dim:
            raise DWDPError(f"{name}: config.json's num_attention_heads is {heads}, above hidden_size, {hidden}")
        if (config.get("v_head_dim") or head_dim) != head_dim:
            raise DWDPError(f"{name}: plan does not know values unlike keys (config.json has v_head_dim, no kv_lora_rank)")
        kv_dim = (config.get("num_key_value_heads") or heads) * head_dim
        qk_dim = v_dim = heads * head_dim
        projections = [(qk_dim * (1 + (kind in GATED_ATTENTION)) + 2 * kv_dim, hidden), (hidden, qk_dim)]
        cached = 2 * kv_dim
    is_moe = moe_layers(name, config, layers)
    num_shared = next((config[n] for n in SHARED_EXPERTS if config.get(n)), 0)
    shared = config.get("shared_expert_intermediate_size") or num_shared * width
    attention = linears(projections, attention_form)
    router = linears([(num_experts, hidden)], bare)
    mlp = {True: [router, *([linears(gated(shared, hidden), shared_form)] if shared else [])]}
    if not all(is_moe):
        mlp[False] = [linears(gated(field("intermediate_size"), hidden), form)]
    padded = [-(-size // tile) * tile for size, tile in zip((width, hidden), form.tile, strict=True)]
    vocabulary = linears([(field("vocab_size"), hidden)], bare).nbytes
    return Model(
        name=name, format=form, num_experts=num_experts, top_k=top_k, expert_width=width, hidden=hidden,
        expert_weights=3 * width * hidden, qk_dim=qk_dim, v_dim=v_dim, is_moe=is_moe,
        expert_bytes=[nbytes for shape in gated(*padded) for nbytes in form.tensors(*shape)],
        windows=windows(name, config, layers), linears=[[attention, *mlp[moe]] for moe in is_moe],
        vocabulary_bytes=vocabulary * (1 if config.get("tie_word_embeddings") else 2),
        kv_bytes_per_layer=cached * int(bare.bits) // 8,
    )


def latent_attention(
    field: Callable[[str], int], q_rank: int | None, hidden: int, heads: int
) -> tuple[list[tuple[int, int]], int, int, int]:
    """MLA, expanded as in prefill: projections, elements of queries, of values, and those that are cached."""
    kv_rank, rope, nope = field("kv_lora_rank"), field("qk_rope_head_dim"), field("qk_nope_head_dim")
    value = field("v_head_dim")
    query = [(q_rank, hidden), (heads * (nope + rope), q_rank)] if q_rank else [(heads * (nope + rope), hidden)]
    rest = [(kv_rank + rope, hidden), (heads * (nope + value), kv_rank), (hidden, heads * value)]
    return [*query, *rest], heads * (nope + rope), heads * value, kv_rank + rope


def linears(shapes: list[tuple[int, int]], form: Format) -> Linears:
    return Linears(
        weights=sum(rows * columns for rows, columns in shapes), compute=form.compute,
        nbytes=sum(nbytes for shape in shapes for nbytes in form.tensors(*shape)),
    )


def gated(width: int, hidden: int) -> list[tuple[int, int]]:
    """The two matrices of a gated MLP: gate and up in one, then down."""
    return [(2 * width, hidden), (hidden, width)]


def moe_layers(name: str, config: Mapping[str, Any], layers: int) -> list[bool]:
    """Which layers have experts."""
    step = config.get("decoder_sparse_step") or 1
    every = config.get("moe_layer_freq") or 1
    dense = max(config.get("first_k_dense_replace") or 0, config.get("num_dense_layers") or 0)
    without = config.get("mlp_only_layers") or ()
    pattern = [layer % every == 0 for layer in range(layers)] if isinstance(every, int) else every
    pattern = by_layer(name, "moe_layer_freq", pattern, layers)
    kinds = by_layer(name, "mlp_layer_types", config.get("mlp_layer_types") or ["sparse"] * layers, layers)
    return [
        bool(pattern[layer]) and kinds[layer] == "sparse" and layer >= dense and layer not in without
        and (layer + 1) % step == 0
        for layer in range(layers)
    ]


def windows(name: str, config: Mapping[str, Any], layers: int) -> list[int | None]:
    """Each layer's attention window in tokens, None for all."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    kinds = config.get("layer_types")
    if window and not kinds and (found := [field for field in fields.WINDOWED if config.get(field)]):
        raise DWDPError(f"{name}: plan does not know which layers have a window (config.json has {found[0]}, no layer_types)")
    kinds = by_layer(name, "layer_types", kinds or ["sliding_attention" if window else "full_attention"] * layers, layers)
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise DWDPError(f"{name}: plan does not know {', '.join(sorted(unknown))} (config.json's layer_types)")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def by_layer(name: str, field: str, entries: Sequence[Any], layers: int) -> Sequence[Any]:
    """An entry for each layer. Raises DWDPError for fewer; config.json lists also the layers that an override cuts off."""
    if len(entries) < layers:
        raise DWDPError(f"{name}: config.json's {field} is for {len(entries)} layers, but num_hidden_layers is {layers}")
    return entries[:layers]
