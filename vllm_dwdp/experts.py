"""Experts: vLLM's RoutedExperts, loaded with this rank's shard, then shown the full tensors.

`sharded` wraps what vLLM builds and loads while a model is made; `bind` re-points the finished layers and puts
acquire and release around their forward.
"""

import contextlib
import copy
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models import gpt_oss

from vllm_dwdp.budget import LayerSize
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.hot import HotCache
from vllm_dwdp.placement import Placement
from vllm_dwdp.prefetch import DIRECT, Prefetcher
from vllm_dwdp.weights import LayerWeights

# Parameters of RoutedExperts without a row for every expert.
NOT_PER_EXPERT = {"e_score_correction_bias", "hash_indices_table"}
# Where vLLM keeps which kernels a quantized format uses, and those whose rows can be moved although EPLB does not.
BACKENDS, MOVABLE_BACKEND = ("mxfp4_backend", "wna16_backend", "wna16_moe_backend"), "MARLIN"
# Experts classes of which a rank cannot load its share, and why.
UNSHARDABLE = {
    "DbrxExperts": "copies checkpoint tensors of all experts at once: try --model-impl transformers",
    "SubstitutedRoutedExperts": "numbers its experts otherwise than the checkpoint does: use the model before pruning",
}
# A tensor with at most this part of the layer's largest is replicated: biases, scales per tensor, sparse block scales.
SMALL = 1 / 64


@contextlib.contextmanager
def sharded(
    rank: int, size: int, experts_per_rank: int | None, before_reading: Callable[[list[RoutedExperts]], None],
) -> Iterator[list[RoutedExperts]]:
    """While the body builds and loads a model, every RoutedExperts holds only this rank's experts.

    Yields the list of layers built, in order; `before_reading` gets it before a checkpoint is read. Raises DWDPError,
    also before that, for a layer that cannot be streamed, and when the model has built none.
    """
    layers: list[RoutedExperts] = []
    build, select_files = RoutedExperts.__init__, DefaultModelLoader._init_ep_weight_filter
    load_gpt_oss, load_mxfp4 = gpt_oss.GptOssModel.load_weights, gpt_oss.GptOssModel._load_weights_mxfp4

    @functools.wraps(build)
    def build_shard(self: RoutedExperts, *args: Any, **kwargs: Any) -> None:
        moe_config = kwargs.get("moe_config", args[2] if len(args) > 2 else None)
        placement = Placement(num_experts=moe_config.num_experts, size=size, experts_per_rank=experts_per_rank)
        kwargs["expert_map_manager"] = _own_experts_only(kwargs["expert_map_manager"], placement.owned(rank))
        moe_config.num_local_experts = len(placement.owned(rank))
        build(self, *args, **kwargs)
        _refuse_unstreamable(self)
        self.dwdp_placement = placement
        layers.append(self)

    @functools.wraps(select_files)
    def select_owned(self: DefaultModelLoader, model_config: Any) -> None:
        refuse_bypass(layers, model_config)
        before_reading(layers)
        select_files(self, model_config)
        self.local_expert_ids = set().union(*(layer.dwdp_placement.owned(rank) for layer in layers))

    @functools.wraps(load_gpt_oss)
    def load_owned_rows(self: Any, weights: Any) -> Any:
        owned = layers[0].dwdp_placement.owned(rank)
        return load_gpt_oss(self, ((name, _owned_rows(name, weight, owned)) for name, weight in weights))

    @functools.wraps(load_mxfp4)
    def load_owned_mxfp4(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Its views of the owned rows are shaped by the config's number of experts."""
        num_experts = self.config.num_local_experts
        self.config.num_local_experts = len(layers[0].dwdp_placement.owned(rank))
        try:
            return load_mxfp4(self, *args, **kwargs)
        finally:
            self.config.num_local_experts = num_experts

    RoutedExperts.__init__ = build_shard
    DefaultModelLoader._init_ep_weight_filter = select_owned
    gpt_oss.GptOssModel.load_weights, gpt_oss.GptOssModel._load_weights_mxfp4 = load_owned_rows, load_owned_mxfp4
    try:
        yield layers
    finally:
        RoutedExperts.__init__ = build
        DefaultModelLoader._init_ep_weight_filter = select_files
        gpt_oss.GptOssModel.load_weights, gpt_oss.GptOssModel._load_weights_mxfp4 = load_gpt_oss, load_mxfp4


def refuse_bypass(layers: Sequence[RoutedExperts], model_config: Any) -> None:
    """Raises DWDPError when a MoE model has built none of the layers that DWDP streams."""
    if not layers:
        raise DWDPError(
            f"{model_config.model} built no RoutedExperts layer: its experts take a fused path of their own, which "
            f"DWDP cannot stream; choose another --moe-backend or --model-impl, or drop --parallel dwdp"
        )


def _own_experts_only(manager: Any, owned: range) -> Any:
    """A copy of vLLM's map from global to local expert that knows the owned ones only: loaders drop the rest."""
    if manager.num_fused_shared_experts:
        raise DWDPError("shared experts fused into the routed ones cannot be streamed: switch shared-expert fusion off")
    manager = copy.copy(manager)
    manager._local_num_experts = len(owned)
    manager._expert_map = torch.full((manager.global_num_experts,), -1, dtype=torch.int32, device="cpu")
    manager._expert_map[owned.start : owned.stop] = torch.arange(len(owned), dtype=torch.int32, device="cpu")
    return manager


def _owned_rows(name: str, weight: torch.Tensor, owned: range) -> torch.Tensor:
    """gpt-oss' loader takes checkpoint tensors of all experts and copies them whole: hand it the owned rows."""
    stacked = ".mlp.experts." in name and not name.split(".mlp.experts.")[1][:1].isdigit()
    return weight[owned.start : owned.stop] if stacked else weight


def _refuse_unstreamable(layer: RoutedExperts) -> None:
    method, kind = layer.quant_method, type(layer).__name__
    if kind in UNSHARDABLE:
        raise DWDPError(f"{layer.layer_name}: a rank cannot load its share of {kind}, which {UNSHARDABLE[kind]}")
    backends = {getattr(method, name).name for name in BACKENDS if hasattr(method, name)}
    if not method.supports_eplb and MOVABLE_BACKEND not in backends:
        raise DWDPError(
            f"{layer.layer_name}: {type(method).__name__} keeps its experts in a form whose rows cannot be moved"
            f"{f' ({min(backends)}); try --moe-backend marlin' if backends else ''}; DWDP streams unquantized and FP8 "
            f"experts, and 4-bit ones of the Marlin backend"
        )
    static = [name for name, _ in layer.named_parameters() if name.endswith("input_scale")]
    if static:
        raise DWDPError(
            f"{layer.layer_name}: {static[0]} is a static activation scale, which vLLM reduces over the experts that a "
            f"rank holds, so ranks would differ; use a checkpoint with dynamic activation scales"
        )


def per_expert(layer: RoutedExperts, rank: int) -> dict[str, torch.nn.Parameter]:
    """The parameters that have a row for every expert that `rank` owns, in registration order."""
    owned = layer.dwdp_placement.owned(rank)
    return {
        name: parameter
        for name, parameter in layer.named_parameters()
        if name not in NOT_PER_EXPERT and parameter.dim() and parameter.shape[0] == len(owned)
    }


def expert_parameters(layer: RoutedExperts, rank: int) -> tuple[list[str], list[str]]:
    """(streamed, replicated) names of the parameters per expert, in registration order.

    Raises DWDPError when one is not contiguous by expert.
    """
    rows = per_expert(layer, rank)
    largest = max(p[0].numel() * p.element_size() for p in rows.values())
    streamed = [n for n, p in rows.items() if p[0].numel() * p.element_size() > SMALL * largest]
    for name, p in rows.items():
        is_dense = p.stride(0) == p[0].numel() and p.untyped_storage().nbytes() >= p.nbytes
        if p.numel() and not is_dense:
            raise DWDPError(f"{layer.layer_name}.{name} is padded or strided between experts: DWDP cannot stream it")
    return streamed, [name for name in rows if name not in streamed]


def size_of(layer: RoutedExperts, names: Iterable[str]) -> LayerSize:
    """The memory of the parameters `names` of `layer`, as they are now."""
    rows = (getattr(layer, name)[0] for name in names)
    return LayerSize(placement=layer.dwdp_placement, expert_bytes=[row.numel() * row.element_size() for row in rows])


def bind(
    layer: RoutedExperts, weights: LayerWeights, replicated: dict[str, torch.Tensor], prefetcher: Prefetcher,
    hot: HotCache | None,
) -> None:
    """Show `layer` all E experts: parameters over the full tensors, a kernel built for E, and a forward that waits.

    `replicated` maps parameter names to [E, ...] tensors.
    """
    num_experts = layer.global_num_experts
    for name, tensor in replicated.items():
        getattr(layer, name).data = tensor
    weights.parameters = [getattr(layer, tensor.spec.name) for tensor in weights.tensors]
    weights.bind("streamed")
    layer.moe_config.num_local_experts = layer.local_num_experts = num_experts
    layer._expert_map = None
    _rebuild_kernel(layer)
    if hot is not None and layer.quant_method.is_monolithic:
        raise DWDPError(
            f"cache_policy=hot needs the routed experts, which {type(layer.quant_method.moe_kernel).__name__} of "
            f"{layer.layer_name} keeps to itself: use --dwdp-cache-policy even, or --moe-backend triton"
        )
    for name in ("forward_modular", "forward_monolithic"):
        setattr(layer, name, _ahead_of_use(getattr(layer, name), weights, prefetcher, hot))


def keep_opaque(model: torch.nn.Module) -> None:
    """Call every MoE layer through vLLM's custom op, which torch.compile does not look into. Only CPU lacks it."""
    for module in model.modules():
        if isinstance(module, MoERunner):
            ops = torch.ops.vllm
            module._forward_entry = ops.moe_forward if module.shared_experts is None else ops.moe_forward_shared


def _rebuild_kernel(layer: RoutedExperts) -> None:
    """Kernels remember the number of experts and their scales when they are made: make this layer's anew."""
    method = layer.quant_method
    kernel = method.moe_kernel
    if kernel is None:
        raise DWDPError(f"{layer.layer_name}: {type(method).__name__} has no modular kernel that DWDP could rebuild")
    method.moe_quant_config = method.get_fused_moe_quant_config(layer)
    experts = type(kernel.fused_experts)(moe_config=layer.moe_config, quant_config=method.moe_quant_config)
    experts.post_gemm2_hook = getattr(kernel.fused_experts, "post_gemm2_hook", None)  # from vLLM 0.33; models set it
    method.moe_kernel = mk.FusedMoEKernel(kernel.prepare_finalize, experts)


def _ahead_of_use(
    forward: Callable, weights: LayerWeights, prefetcher: Prefetcher, hot: HotCache | None
) -> Callable:
    @functools.wraps(forward)
    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        view = prefetcher.acquire(weights, x.shape[0])
        if hot is not None and view == DIRECT:
            hot.count(weights, kwargs["topk_ids"])
        output = forward(x, *args, **kwargs)
        prefetcher.release(weights, view)
        return output

    return run


def digest(model: torch.nn.Module, layers: Sequence[RoutedExperts]) -> str:
    """A fingerprint of the weights that every rank holds alike: the first bytes of every parameter but the experts'."""
    experts = {id(p) for layer in layers for p in layer.parameters()}
    total = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if id(parameter) not in experts and parameter.numel():
            head = parameter.detach().flatten()[:64].contiguous().view(torch.uint8).cpu()
            total.update(name.encode() + bytes(head.tolist()))
    return total.hexdigest()
