"""Binding: vLLM's expert layers shown the full tensors, their kernels rebuilt, and a forward that waits."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from vllm_dwdp.assembly import StreamedModel
from vllm_dwdp.dispatch import Dispatch
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.experts import ExpertLayer
from vllm_dwdp.integration import proof
from vllm_dwdp.integration.checks import refuse_rewriting
from vllm_dwdp.prefetch import Prefetcher
from vllm_dwdp.profiling import profiled
from vllm_dwdp.schedule import DIRECT, STREAMED
from vllm_dwdp.weights import LayerWeights


def bind(model: StreamedModel) -> None:
    """Show every layer all E experts: parameters over the full tensors, a kernel built for E, a forward that waits.

    Raises DWDPError when a layer's kernel would keep anything else, and from then on when somebody loads into a layer.
    """
    for layer, weights, replicas in zip(model.layers, model.weights, model.replicas, strict=True):
        module, num_experts = layer.module, layer.placement.num_experts
        for name, tensor in replicas.items():
            layer.parameter(name).data = tensor
        weights.parameters = [layer.parameter(name) for name in layer.streamed]
        weights.bind(STREAMED)
        module.moe_config.num_local_experts = module.local_num_experts = num_experts
        module._expert_map = module.expert_map_manager._expert_map = None
        module.expert_map_manager._local_num_experts = num_experts
        _rebuild_kernel(layer, model.rank, [view for tensor in weights.tensors for view in tensor.views.values()])
        forward = module.forward_modular
        for name in ("forward_modular", "forward_monolithic"):
            setattr(module, name, _ahead_of_use(getattr(module, name), weights, model.prefetcher))
        if model.dispatch is not None and not layer.is_draft:
            module.forward_modular = _dispatching(
                module.forward_modular, forward, layer, weights, model.dispatch,
                is_last=model.prefetcher.schedule.is_last(weights.ordinal),
            )
        _refuse_loading(module)


def refuse_loading(model: torch.nn.Module) -> None:
    """Every `load_weights` in `model` raises DWDPError, before it writes anything and on every rank alike."""
    for module in model.modules():
        if hasattr(module, "load_weights"):
            vars(module)["load_weights"] = refuse_rewriting


def keep_opaque(model: torch.nn.Module) -> None:
    """Call every MoE layer through vLLM's custom op, which torch.compile does not look into. Only CPU lacks it."""
    for module in model.modules():
        if isinstance(module, MoERunner):
            ops = torch.ops.vllm
            module._forward_entry = ops.moe_forward if module.shared_experts is None else ops.moe_forward_shared


class _Bound(dict):
    """A layer's parameters by name, which stay the tensors that are streamed."""

    __setitem__: Any = refuse_rewriting
    __delitem__: Any = refuse_rewriting
    __ior__: Any = refuse_rewriting
    clear: Any = refuse_rewriting
    pop: Any = refuse_rewriting
    popitem: Any = refuse_rewriting
    setdefault: Any = refuse_rewriting
    update: Any = refuse_rewriting


def _refuse_loading(layer: Any) -> None:
    """Whatever vLLM would load this layer with raises DWDPError: its rows are peers', or bytes of a slot."""
    for parameter in layer.parameters():
        for name in [name for name in vars(parameter) if name.endswith("weight_loader")]:
            setattr(parameter, name, refuse_rewriting)
    layer.weight_loader = layer.quant_method.process_weights_after_loading = refuse_rewriting
    layer._parameters = _Bound(layer._parameters)


def _rebuild_kernel(layer: ExpertLayer, rank: int, views: list[torch.Tensor]) -> None:
    """Kernels remember the number of experts and their scales when they are made: make this layer's anew, and prove it.

    `views` are the streamed tensors, [E, ...], as either view shows them.
    """
    module = layer.module
    method = module.quant_method
    kernel = method.moe_kernel
    if kernel is None:
        raise DWDPError(f"{layer.name}: {type(method).__name__} has no modular kernel that DWDP could rebuild")
    loaded = kernel.fused_experts
    with proof.Following(f"{layer.name}: {type(loaded).__name__}", views) as following:
        method.moe_quant_config = method.get_fused_moe_quant_config(module)
        experts = type(loaded)(moe_config=module.moe_config, quant_config=method.moe_quant_config)
        experts.post_gemm2_hook = getattr(loaded, "post_gemm2_hook", None)  # from vLLM 0.33; models set it
        method.moe_kernel = mk.FusedMoEKernel(kernel.prepare_finalize, experts)
    proof.prove(layer, rank, following)
    proof.refuse_loss(layer, rank, loaded, experts)
    del kernel, loaded  # with what they hold
    proof.refuse_old_memory(layer)


def _ahead_of_use(forward: Callable, weights: LayerWeights, prefetcher: Prefetcher) -> Callable:
    @functools.wraps(forward)
    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        view = prefetcher.acquire(weights, x.shape[0])
        with profiled(view, weights.name):
            output = forward(x, *args, **kwargs)
        prefetcher.release(weights, view)
        return output

    return run


def _in_parts(forward: Callable, rows: torch.Tensor, own: dict[str, Any], most: int) -> torch.Tensor:
    """`forward` over `rows`, in halves if they are more than `most`: a round may have more rows than vLLM has buffers for."""
    if (total := rows.shape[0]) <= most:
        return forward(rows, **own)
    sums, weights, ids = torch.empty_like(rows), own.pop("topk_weights"), own.pop("topk_ids")
    for part in (slice(-(-total // 2)), slice(-(-total // 2), total)):
        sums[part] = forward(rows[part], topk_weights=weights[part], topk_ids=ids[part], **own)
        own["shared_experts"] = None  # of own rows, once
    return sums


def _dispatching(
    run: Callable, forward: Callable, layer: ExpertLayer, weights: LayerWeights, dispatch: Dispatch, *, is_last: bool
) -> Callable:
    """`forward` over own and received rows where the step dispatches, else `run`, over own rows.

    Expert ids may be -1 then, which vLLM's kernels look up in the map: a -1 before its first entry makes that valid.
    """
    module, num_experts = layer.module, layer.placement.num_experts
    guarded = torch.arange(-1, num_experts, dtype=torch.int32, device=next(module.parameters()).device)[1:]

    @functools.wraps(forward)
    def exchange(
        x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> Any:
        own = dict(topk_weights=topk_weights, topk_ids=topk_ids, shared_experts=shared_experts,
                   shared_experts_input=shared_experts_input)
        total = dispatch.rows(x.shape[0])
        if total is None:
            module._expert_map = None
            if is_last:
                dispatch.reach_last_layer()
            return run(x, **own)
        weights.bind(DIRECT)
        module._expert_map = guarded
        if shared_experts_input is None:
            own["shared_experts_input"] = x
        with profiled("dispatch", weights.name):
            rows, own["topk_weights"], own["topk_ids"] = dispatch.tokens.dispatch(
                weights.ordinal, x, topk_weights, topk_ids, total
            )
            partial = _in_parts(forward, rows, own, dispatch.limits.most_rows)
            return dispatch.tokens.combine(weights.ordinal, partial, x.shape[0])

    return exchange
