"""Graphs: which batches read peers' memory in place, and how vLLM's CUDA graphs carry both views.

The direct view's addresses never change and it needs no event: a graph captures it as it is. A graph of the streamed
view captures the copies and events with the kernels (prefetch.py). vLLM tells when it captures or launches a graph by
two methods of its offloader, which this rank replaces. Graphs are kept to the direct view where vLLM breaks graphs off
without telling, as a graph must wait for its copies before it ends.
"""

from collections.abc import Iterable, Sequence

import torch
from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.offloader import BaseOffloader

from vllm_dwdp.config import Options
from vllm_dwdp.prefetch import Prefetcher
from vllm_dwdp.schedule import default_direct_max_tokens

logger = init_logger("vllm.dwdp.graphs")

MAX_TOKENS = 8192  # of more the device has enough to do, whatever the host takes
USUAL_TOP_K = 8  # where a model's config calls it what vLLM does not know


def direct_max_tokens(vllm_config: VllmConfig, options: Options) -> int:
    """The user's number, or the break-even of this model, raised to the next size that vLLM captures."""
    if options.direct_max_tokens is not None:
        return options.direct_max_tokens
    model = vllm_config.model_config
    num_experts, top_k = model.get_num_experts(), model.get_num_experts_per_tok() or USUAL_TOP_K
    tokens = default_direct_max_tokens(num_experts, top_k) if num_experts > 0 else 1
    if has_graphs(vllm_config):
        tokens = min((s for s in vllm_config.compilation_config.cudagraph_capture_sizes if s >= tokens), default=tokens)
    return tokens


def has_graphs(vllm_config: VllmConfig) -> bool:
    mode = vllm_config.compilation_config.cudagraph_mode
    return not vllm_config.model_config.enforce_eager and mode != CUDAGraphMode.NONE


def has_pieces(vllm_config: VllmConfig) -> bool:
    """Whether graphs of prompts, where there are graphs, are in pieces."""
    return vllm_config.compilation_config.cudagraph_mode.mixed_mode() == CUDAGraphMode.PIECEWISE


def most_tokens(vllm_config: VllmConfig, wanted: int) -> int:
    """The largest graph that this engine may have where graphs of up to `wanted` tokens are added; 0 where it has none."""
    if not has_graphs(vllm_config):
        return 0
    captured = max(vllm_config.compilation_config.cudagraph_capture_sizes, default=0)
    return captured if _why_none_added(vllm_config) else max(captured, wanted)


def _why_none_added(vllm_config: VllmConfig) -> str | None:
    if not has_pieces(vllm_config):
        return f"cudagraph_mode={vllm_config.compilation_config.cudagraph_mode.name} has none of prompts in pieces"
    if is_breakable_cudagraph_enabled():
        return "vLLM breaks graphs off"
    return "a model drafts, over padded rows" if vllm_config.speculative_config is not None else None


def add_graphs(vllm_config: VllmConfig, bounds: Sequence[int]) -> None:
    """Capture the sizes `bounds`, ascending, and sizes between them and vLLM's: without a graph such a step takes the host longer
    than the device.

    `max_cudagraph_capture_size` stays: attention up to it is laid out for decoding.
    """
    compilation = vllm_config.compilation_config
    largest, last = compilation.max_cudagraph_capture_size, bounds[-1]
    if reason := _why_none_added(vllm_config):
        if last > largest:
            logger.info("DWDP adds no CUDA graphs to vLLM's of up to %d tokens, so larger steps take the host longer: %s", largest, reason)
        return
    steps = *range(0, 1024, 128), *range(1024, 4096, 256), *range(4096, last, 512)
    if added := sorted(size for size in {*bounds, *steps} if largest < size <= last):
        compilation.cudagraph_capture_sizes = [*compilation.cudagraph_capture_sizes, *added]
        logger.info("DWDP captures CUDA graphs of up to %d tokens, vLLM of %d (--dwdp-graph-max-tokens)", last, largest)


def fit_graphs(vllm_config: VllmConfig, largest: int) -> None:
    """Capture the size `largest`, the direct view's last, so that no smaller batch is padded beyond it."""
    compilation = vllm_config.compilation_config
    if not has_graphs(vllm_config) or compilation.max_cudagraph_capture_size <= largest:
        return
    captured = [size for size in compilation.cudagraph_capture_sizes if size <= compilation.max_cudagraph_capture_size]
    added = compilation.cudagraph_capture_sizes[len(captured) :]
    sizes = [size for size in captured if size < largest] + [largest] * (largest > 0)
    if is_breakable_cudagraph_enabled():
        logger.info(
            "DWDP keeps CUDA graphs to batches of %d tokens (direct view): breakable graphs may end before their copies", largest
        )
    else:
        sizes += [size for size in captured if size > largest]
    compilation.cudagraph_capture_sizes = sizes
    compilation.max_cudagraph_capture_size = max(sizes, default=0)
    if not sizes:
        compilation.cudagraph_mode = CUDAGraphMode.NONE
    compilation.post_init_cudagraph_sizes()
    compilation.cudagraph_capture_sizes = [*sizes, *added]


class GraphHooks(BaseOffloader):
    """What vLLM calls before it captures or launches a CUDA graph, and before a capture ends. Offloads nothing."""

    def __init__(self, prefetcher: Prefetcher):
        self._prefetcher = prefetcher

    def sync_prev_onload(self) -> None:
        self._prefetcher.before_graph()

    def join_after_forward(self) -> None:
        self._prefetcher.join_graph()

    def wrap_modules(self, modules_generator: Iterable[torch.nn.Module], prefix: str = "") -> list[torch.nn.Module]:
        return list(modules_generator)
