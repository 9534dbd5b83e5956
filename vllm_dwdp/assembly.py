"""Assembly: from loaded shards to a rank that streams, phase by phase.

Each phase is a function from one frozen record to the next. What a phase makes is undone in reverse by one ExitStack,
at a failure or when the running model is closed:

    loaded --agree--> agreed --place--> placed --import_peers--> imported --compose--> composed --start--> running
"""

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch

from vllm_dwdp import budget
from vllm_dwdp.config import Options
from vllm_dwdp.dispatch import Dispatch
from vllm_dwdp.experts import ExpertLayer
from vllm_dwdp.handover import import_shards, replicate
from vllm_dwdp.inboxes import open_inboxes
from vllm_dwdp.kernels.device import Device
from vllm_dwdp.kernels.tokens import InboxMap
from vllm_dwdp.limits import Limits
from vllm_dwdp.manifests import Manifest
from vllm_dwdp.prefetch import Prefetcher
from vllm_dwdp.rendezvous import Group, agree_where_common
from vllm_dwdp.rendezvous import agree as agree_on
from vllm_dwdp.schedule import Schedule
from vllm_dwdp.weights import FullTensor, LayerWeights, Slots

logger = logging.getLogger("vllm.dwdp")
EVERYTHING = 2**31  # direct_max_tokens when nothing is remote


@dataclasses.dataclass(frozen=True, kw_only=True)
class Means:
    """What every phase works with. `steps` are those that dispatch, None for none. `undo` takes back what was made."""

    group: Group
    device: Device
    options: Options
    limit: budget.MemoryLimit
    steps: Limits | None
    undo: contextlib.ExitStack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """Layers that hold this rank's shard; `samples` fingerprints, by name, weights that other ranks hold too."""

    layers: Sequence[ExpertLayer]
    samples: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreed:
    """Every rank has the same layers and spends its cache alike."""

    layers: Sequence[ExpertLayer]
    residents: Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed:
    """The shard lies in shareable memory, its source is freed; small tensors are whole, [E, ...], by name."""

    layers: Sequence[ExpertLayer]
    weights: Sequence[LayerWeights]
    replicas: Sequence[dict[str, torch.Tensor]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported(Placed):
    """Peers' shards are imported; edge pages and residents are complete."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Composed(Imported):
    """Both views of every tensor can be read."""

    slots: Slots


class StreamedModel:
    """A rank that streams. Its layers show the full tensors once they are bound (integration/binding.py)."""

    def __init__(
        self, composed: Composed, prefetcher: Prefetcher, dispatch: Dispatch | None, means: Means
    ):
        self.rank, self.size = means.group.rank, means.group.size
        self.layers, self.weights, self.replicas = composed.layers, composed.weights, composed.replicas
        self.slots, self.prefetcher = composed.slots, prefetcher
        self.dispatch = dispatch
        self._device, self._undo = means.device, means.undo

    def start(self) -> None:
        """Fill the first slots. To be called once the layers are bound."""
        self.prefetcher.start()
        own = range(self.prefetcher.schedule.num_layers)  # a draft's layers follow
        streamed = sum(self.weights[at].copied_bytes for at in own)
        logger.info(budget.announce(
            [self.layers[at].size for at in own], rank=self.rank, streamed_bytes=streamed,
            direct_max_tokens=self.prefetcher.direct_max_tokens, held_bytes=sum(self.memory_bytes().values()),
        ))

    def memory_bytes(self) -> dict[str, int]:
        """Expert memory on this rank by kind. `padding` is what whole pages add to the bytes of owned experts."""
        tensors = [tensor for layer in self.weights for tensor in layer.tensors]
        layouts = [tensor.spec.layout for tensor in tensors]
        shard = sum(len(layout.bytes_of(layout.placement.owned(self.rank))) for layout in layouts)
        return {
            "shard": shard,
            "resident": sum(block.nbytes for tensor in tensors for _, block in tensor.residents),
            "slots": self.slots.nbytes,
            "inbox": self.dispatch.inbox.nbytes if self.dispatch else 0,
            "replicated": sum(tensor.nbytes for named in self.replicas for tensor in named.values()),
            "padding": sum(block.nbytes for tensor in tensors for _, block in tensor.shard) - shard,
        }

    def stats(self) -> dict[str, Any]:
        prefetcher, counters = self.prefetcher, self.prefetcher.counters
        prefetcher.stream.drain()
        layout = self.weights[0].tensors[0].spec.layout
        owned, held = layout.placement.owned(self.rank), layout.placement.held(self.rank, layout.residents)
        return {
            "rank": self.rank,
            "size": self.size,
            "experts": {"owned": len(owned), "resident": len(held) - len(owned),
                        "streamed": layout.placement.num_experts - len(held)},
            "memory_bytes": self.memory_bytes(),
            "allocated_bytes": self._device.allocated_bytes,
            "num_slots": prefetcher.schedule.num_slots,
            "slot_tags": prefetcher.held,
            "direct_max_tokens": prefetcher.direct_max_tokens,
            "prefetch_bytes": counters.prefetched_bytes,
            "forwards": dict(counters.forwards),
            "drafts": dict(counters.drafts),
            "replays": counters.replays,
            "refills": counters.refills,
            "exposed_wait_ms": prefetcher.stream.exposed_wait_ms,
            "copy_ms": prefetcher.stream.copy_ms,
            "dispatch": self.dispatch and self.dispatch.report(),
        }

    def close(self) -> None:
        """Stop copying, then unmap and release everything. Peers keep what they have imported. Repeats safely."""
        self._undo.close()


def assemble(
    loaded: Loaded, group: Group, device: Device, options: Options, limit: budget.MemoryLimit, steps: Limits | None
) -> StreamedModel:
    """Go through all phases. `steps` are those that dispatch, None for none. Source weights are freed layer by layer.

    Raises DWDPError on every rank when ranks disagree (before anything is freed) or memory does not suffice; nothing
    that was made is left then.
    """
    means = Means(group=group, device=device, options=options, limit=limit, steps=steps, undo=contextlib.ExitStack())
    try:
        return start(compose(import_peers(place(agree(loaded, means), means), means), means), means)
    except BaseException:
        means.undo.close()
        raise


def agree(loaded: Loaded, means: Means) -> Agreed:
    group, device, options = means.group, means.device, means.options
    sizes = [layer.size for layer in loaded.layers]
    inbox = inbox_map(loaded.layers, means)
    mine = budget.cache_bytes(sizes, device, options, means.limit, inbox.nbytes if inbox else 0)
    cache = min(group.gather("cache", mine))
    residents = budget.plan_cache(sizes, cache)
    if cache:
        logger.info(budget.describe_cache(sizes, cache))
    described = [layer.manifest(count) for layer, count in zip(loaded.layers, residents, strict=True)]
    dispatch = means.steps.manifest() if means.steps is not None else None
    agree_on(group, "manifest", Manifest(page_bytes=device.page_bytes, layers=described, dispatch=dispatch))
    agree_where_common(group, "weights", loaded.samples)
    return Agreed(layers=loaded.layers, residents=residents)


def place(agreed: Agreed, means: Means) -> Placed:
    """One layer's source is gone before the next layer's memory is made."""
    replicas, device = replicate(means.group, means.device, agreed.layers), means.device
    means.undo.callback(device.release_cached)
    weights = []
    for ordinal, (layer, residents) in enumerate(zip(agreed.layers, agreed.residents, strict=True)):
        tensors = []
        for name in layer.streamed:
            spec = layer.spec(name, residents=residents, page_bytes=device.page_bytes)
            tensors.append(tensor := FullTensor(spec, means.group.rank))
            means.undo.callback(tensor.close)
            parameter = layer.parameter(name)
            tensor.migrate(device, parameter.data)
            parameter.data = parameter.data.new_empty(0)
            device.release_cached()
        weights.append(LayerWeights(ordinal, layer.name, tensors))
    return Placed(layers=agreed.layers, weights=weights, replicas=replicas)


def import_peers(placed: Placed, means: Means) -> Imported:
    means.group.barrier("shard in place")
    import_shards(means.group, means.device, placed.weights)
    for layer in placed.weights:
        for tensor in layer.tensors:
            tensor.fill(means.device)
    return Imported(**vars(placed))


def compose(imported: Imported, means: Means) -> Composed:
    num_layers = sum(not layer.is_draft for layer in imported.layers)
    schedule = Schedule(num_layers=num_layers, max_slots=means.options.slots)
    slots = Slots(means.device, imported.weights, schedule, means.group.rank)
    means.undo.callback(slots.close)
    for layer in imported.weights:
        for tensor in layer.tensors:
            tensor.compose(means.device, slots.of(layer, tensor.spec.name))
        layer.plan(means.options.slice_bytes)
    return Composed(**vars(imported), slots=slots)


def start(composed: Composed, means: Means) -> StreamedModel:
    options, layers = means.options, composed.weights
    is_remote = any(layer.copies for layer in layers)
    stream = means.device.stream(timing=options.timing)
    prefetcher = Prefetcher(
        layers, stream, schedule=composed.slots.schedule,
        direct_max_tokens=(options.direct_max_tokens or 0) if is_remote else EVERYTHING,
    )
    means.undo.callback(stream.close)
    dispatch, inbox = None, inbox_map(composed.layers, means)
    if inbox is not None and means.steps is not None:
        placements = [layer.placement for layer in composed.layers]
        dispatch = Dispatch(*open_inboxes(means.group, means.device, means.undo, inbox, placements), stream, means.steps)
    model = StreamedModel(composed, prefetcher, dispatch, means)
    everyone = means.group.gather("pages complete", model.memory_bytes())
    if means.group.rank == 0:
        logger.info("DWDP expert memory\n%s", budget.table(everyone))
    return model


def inbox_map(layers: Sequence[ExpertLayer], means: Means) -> InboxMap | None:
    """What a rank's inbox holds, for the largest step that dispatches; None where none does."""
    if means.steps is None:
        return None
    return InboxMap(
        size=means.group.size, rows=means.steps.helped_max_tokens, hidden=max(layer.hidden_size for layer in layers),
        top_k=max(layer.top_k for layer in layers), itemsize=max(layer.itemsize for layer in layers),
    )
