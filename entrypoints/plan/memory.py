"""Memory: what a rank of DWDP holds by part, and what vLLM is left for the KV cache. Pure arithmetic."""

import dataclasses
from collections import Counter

from vllm_dwdp.budget import GIB, LayerSize, plan_cache
from vllm_dwdp.entrypoints.plan.model import Model
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.layout import Layout
from vllm_dwdp.placement import Placement

PAGE_BYTES = 2**21  # CUDA's
ACTIVATION_BYTES = 2
BLOCK_TOKENS = 16  # of vLLM's KV cache
UTILIZATION = 0.92  # vLLM's --gpu-memory-utilization, where it is not given
STEPS_UNDER_WAY = 2  # with vLLM's asynchronous scheduling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of the fullest rank. `streamed` is what it fetches from its peers in a step, over all layers."""

    replicated: int
    shard: int
    residents: int
    slots: int
    streamed: int
    activations: int

    @property
    def total(self) -> int:
        return self.replicated + self.shard + self.residents + self.slots + self.activations


def dwdp(model: Model, placement: Placement, *, slots: int, cache_gib: float, tokens: int) -> Held:
    """Whole pages, as the layout cuts them; `cache_gib` is spent evenly over the layers.

    Raises DWDPError for a model of which no layer has experts.
    """
    if not model.num_moe_layers:
        raise DWDPError(f"{model.name}: no layer of it has experts")
    layers = [LayerSize(placement=placement, expert_bytes=model.expert_bytes)] * model.num_moe_layers
    wanted = int(min(cache_gib * GIB, sum(layer.remote_bytes for layer in layers)))
    counts = plan_cache(layers, wanted)
    each = {count: pages(model, placement, count) for count in set(counts)}
    shard = sum(each[count][0] for count in counts)
    residents = sum(each[count][1] for count in counts) - shard
    missing = [each[count][2] for count in counts]
    return Held(
        replicated=model.replicated_bytes, shard=shard, residents=residents, activations=activations(model, tokens),
        slots=min(slots, len(missing)) * max(missing), streamed=sum(missing),
    )


def pages(model: Model, placement: Placement, residents: int) -> tuple[int, int, int]:
    """Bytes of one layer in whole pages that a rank owns, holds, and lacks: each the most that any rank has."""
    layouts = [
        Layout(placement=placement, expert_bytes=nbytes, page_bytes=PAGE_BYTES, residents=residents)
        for nbytes in model.expert_bytes
    ]
    ranks = range(placement.size)
    return (
        max(sum(len(layout.owned_pages(rank)) for layout in layouts) for rank in ranks) * PAGE_BYTES,
        max(sum(len(layout.held_pages(rank)) for layout in layouts) for rank in ranks) * PAGE_BYTES,
        max(sum(len(part) for layout in layouts for part in layout.missing(rank)) for rank in ranks) * PAGE_BYTES,
    )


def expert_parallel(model: Model, size: int, tokens: int) -> Held:
    """Expert parallelism's rank; of size 1, a full replica."""
    most = -(-model.num_experts // size)
    return Held(
        replicated=model.replicated_bytes, shard=model.num_moe_layers * most * sum(model.expert_bytes), residents=0,
        slots=0, streamed=0, activations=activations(model, tokens),
    )


def activations(model: Model, tokens: int) -> int:
    """The largest that live at once: both GEMMs' outputs of a layer's experts, and a few hidden states."""
    width, hidden = model.expert_width, model.hidden
    return tokens * (model.top_k * (max(2 * width, hidden) + width) + 4 * hidden) * ACTIVATION_BYTES


def kv_tokens(
    model: Model, held: Held, *, memory_bytes: float, utilization: float, process_bytes: float, length: int, tokens: int
) -> int:
    """Tokens of KV cache as vLLM counts them, for requests of `length` tokens in steps of `tokens`; negative: no room.

    A request takes blocks for its length where a layer sees all, else for the window and the steps under way. Layers
    are dealt out to groups of one size and one window; all groups draw on one pool of blocks, of a group's layers each.
    """
    layers = Counter(model.windows)
    least, most = min(layers.values()), max(layers.values())
    size, blocks = (most if most < 1.5 * least else least), 0
    for window, count in layers.items():
        kept = length if window is None else min(window - 1 + STEPS_UNDER_WAY * tokens, length)
        blocks += -(-count // size) * (-(-kept // BLOCK_TOKENS) + (window is not None))
    room = utilization * memory_bytes - process_bytes - held.total
    return int(room // (size * model.kv_bytes_per_layer * BLOCK_TOKENS) / blocks * length)
