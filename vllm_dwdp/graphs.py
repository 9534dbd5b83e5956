"""Graphs: which batches read peers' memory in place, and so which batches CUDA graphs may capture.

The direct view's addresses never change and it needs no event: a graph captures it as it is. Streamed weights are
ordered by events and host-side tags, which a replay would skip. So vLLM captures up to `direct_max_tokens` and runs
larger batches, whose steps last as long as the copies, compiled but without graphs. A rank that holds every expert
streams none: all its batches are direct, and vLLM's own sizes stay.
"""

import math

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.logger import init_logger

from vllm_dwdp.config import Options

logger = init_logger("vllm.dwdp.graphs")

# Reading in place moves the experts that a batch routes to, streaming moves all; the SMs read a peer at about this
# part of the copy engines' speed less what the local experts cost meanwhile (two H100s, NVLink 4).
DIRECT_BREAK_EVEN = 0.75
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "top_k")


def default_direct_max_tokens(num_experts: int, top_k: int) -> int:
    """The batch that routes to `DIRECT_BREAK_EVEN` of the experts, if tokens choose `top_k` of them evenly."""
    if top_k >= num_experts:
        return 1
    return max(int(math.log(1 - DIRECT_BREAK_EVEN) / math.log(1 - top_k / num_experts)), 1)


def direct_max_tokens(vllm_config: VllmConfig, options: Options) -> int:
    """The user's number, or the break-even of this model. Logs which."""
    if options.direct_max_tokens is not None:
        return options.direct_max_tokens
    text = vllm_config.model_config.hf_text_config
    nested = getattr(text, "ffn_config", text)  # dbrx keeps its experts there
    top_k = next((value for name in _TOP_K_NAMES if isinstance(value := getattr(nested, name, None), int)), 8)
    num_experts = vllm_config.model_config.get_num_experts()
    tokens = default_direct_max_tokens(num_experts, top_k) if num_experts > 0 else 1
    logger.info_once(
        "DWDP direct_max_tokens=%d: a batch of that size routes to %.0f%% of %d experts at top-%d; larger ones stream",
        tokens, 100 * DIRECT_BREAK_EVEN, num_experts, top_k,
    )
    return tokens


def limit_graphs(vllm_config: VllmConfig, largest: int) -> None:
    """Keep CUDA graphs to batches of at most `largest` tokens, and capture that size itself."""
    compilation = vllm_config.compilation_config
    if vllm_config.model_config.enforce_eager or compilation.cudagraph_mode == CUDAGraphMode.NONE:
        return
    if compilation.max_cudagraph_capture_size <= largest:
        return
    kept = [size for size in compilation.cudagraph_capture_sizes if size < largest] + [largest] * (largest > 0)
    logger.info_once(
        "DWDP keeps CUDA graphs to batches of %d tokens (direct view); larger ones stream weights without graphs",
        largest,
    )
    compilation.cudagraph_capture_sizes = kept
    compilation.max_cudagraph_capture_size = largest
    if not kept:
        compilation.cudagraph_mode = CUDAGraphMode.NONE
    compilation.post_init_cudagraph_sizes()
