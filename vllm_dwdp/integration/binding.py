"""Binding: vLLM's expert layers shown the full tensors, their kernels rebuilt, and a forward that waits."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from vllm_dwdp.assembly import StreamedModel
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.hot import HotCache
from vllm_dwdp.prefetch import Prefetcher
from vllm_dwdp.ranges import named
from vllm_dwdp.schedule import DIRECT, STREAMED
from vllm_dwdp.weights import LayerWeights


def bind(model: StreamedModel) -> None:
    """Show every layer all E experts: parameters over the full tensors, a kernel built for E, a forward that waits."""
    for layer, weights, replicas in zip(model.layers, model.weights, model.replicas, strict=True):
        module = layer.module
        for name, tensor in replicas.items():
            layer.parameter(name).data = tensor
        weights.parameters = [layer.parameter(name) for name in layer.streamed]
        weights.bind(STREAMED)
        module.moe_config.num_local_experts = module.local_num_experts = layer.placement.num_experts
        module._expert_map = None
        _rebuild_kernel(module)
        if model.hot is not None and module.quant_method.is_monolithic:
            raise DWDPError(
                f"cache_policy=hot needs the routed experts, which {type(module.quant_method.moe_kernel).__name__} of "
                f"{layer.name} keeps to itself: use --dwdp-cache-policy even, or --moe-backend triton"
            )
        for name in ("forward_modular", "forward_monolithic"):
            setattr(module, name, _ahead_of_use(getattr(module, name), weights, model.prefetcher, model.hot))


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
        with named(view, weights.name):
            output = forward(x, *args, **kwargs)
        prefetcher.release(weights, view)
        return output

    return run
