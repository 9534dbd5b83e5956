"""Dispatching: which steps of this engine dispatch and why, and vLLM's padding told what a round has agreed on."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm_dwdp.config import Options
from vllm_dwdp.dispatch import Dispatch, Limits
from vllm_dwdp.integration import hooks
from vllm_dwdp.integration.graphs import has_graphs
from vllm_dwdp.kernels.device import Device

logger = init_logger("vllm.dwdp.dispatching")
MAX_TOKENS = 4096  # above, a step computes for as long as its experts travel (two H100s, Qwen3-30B-A3B's layer)
PATIENCE_S = 0.05  # about what a step of a few requests saves in a whole model


def limits(
    vllm_config: VllmConfig, options: Options, device: Device, layers: Iterable[RoutedExperts]
) -> Limits | None:
    """The steps that dispatch; None, and a line in the log that says why, where none can."""
    reason = why_not(vllm_config, options, device, layers)
    if reason:
        logger.info("DWDP dispatch is off: %s; small steps read peers' experts in place", reason)
        return None
    budget = vllm_config.scheduler_config.max_num_batched_tokens
    assert options.size is not None
    most = options.dispatch_max_tokens or min(MAX_TOKENS, budget // options.size)  # kernels' memory is profiled up to the budget
    sizes = vllm_config.compilation_config.cudagraph_capture_sizes if has_graphs(vllm_config) else []
    logger.info(
        "DWDP dispatch is on: steps of up to %d tokens send them to their experts' owners, with the ranks at hand", most
    )
    return Limits(
        max_tokens=most, graph_sizes=sorted(size for size in sizes if size <= most), patience_s=lambda _: PATIENCE_S
    )


def why_not(vllm_config: VllmConfig, options: Options, device: Device, layers: Iterable[RoutedExperts]) -> str | None:
    if options.dispatch == "off":
        return "--dwdp-dispatch off"
    if options.cache_policy == "hot":
        return "--dwdp-cache-policy hot swaps the pages that it would read"
    if device.handle_kind != "fd":
        return "ranks hand over memory by FABRIC handles, and rounds are agreed within one host"
    if any(layer.quant_method.is_monolithic for layer in layers):
        return "the expert kernel routes by itself; --moe-backend triton does not"
    if has_graphs(vllm_config) and not vllm_config.use_v2_model_runner:
        return "vLLM's older model runner pads batches by itself; use its default one, or --enforce-eager"
    return None


def pad_to_round(vllm_config: VllmConfig, dispatch: Dispatch) -> None:
    """Let vLLM choose the graph of the rows that a round has agreed on, where that is more than the batch has."""
    if not dispatch.limits.graph_sizes:
        return

    def wrapper(original: Callable) -> Callable:
        @functools.wraps(original)
        def pad(manager: Any, num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
            return original(manager, num_reqs, max(num_tokens, dispatch.padded), *args, **kwargs)

        return pad

    hooks.PAD_BATCH.install(wrapper)
    hooks.PAD_BATCH.verify()
