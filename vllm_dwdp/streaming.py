"""The streamed model of one rank: agrees with its peers, migrates the shard, and starts prefetching."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm_dwdp import budget, experts
from vllm_dwdp.config import Options
from vllm_dwdp.hot import HotCache
from vllm_dwdp.kernels.device import Device
from vllm_dwdp.layout import Layout
from vllm_dwdp.prefetch import Prefetcher
from vllm_dwdp.rendezvous import Group, LayerManifest, Manifest, TensorManifest, agree
from vllm_dwdp.weights import FullTensor, LayerWeights, Slots, TensorSpec, exchange, replicate

logger = init_logger("vllm.dwdp")
EVERYTHING = 2**31  # direct_max_tokens when nothing is remote


class StreamedModel:
    """Everything that a rank holds for DWDP: layers, slots, prefetcher. Made by `build`."""

    def __init__(self, group: Group, device: Device, layers: list[LayerWeights]):
        self.rank, self.size = group.rank, group.size
        self.layers = layers
        self._group, self._device = group, device
        self.slots: Slots | None = None
        self.prefetcher: Prefetcher | None = None
        self.hot: HotCache | None = None
        self.replicated_bytes = 0

    @classmethod
    def build(
        cls, model: torch.nn.Module, modules: Sequence[RoutedExperts], group: Group, device: Device, options: Options,
        limit: budget.Limit,
    ) -> "StreamedModel":
        """Turn a model loaded with shards into one that streams. Source weights are freed layer by layer.

        Raises DWDPError on every rank when ranks disagree (before anything is freed) or memory does not suffice.
        """
        names = [experts.expert_parameters(module, group.rank) for module in modules]
        sizes = [experts.size_of(module, streamed) for module, (streamed, _) in zip(modules, names, strict=True)]
        cache = min(group.gather("cache", budget.cache_bytes(sizes, device, options, limit)))
        plan = budget.plan_cache(sizes, cache, options.cache_policy, device.page_bytes)
        agree(group, "manifest", describe(model, modules, names, plan.residents, device.page_bytes))
        layers = [
            LayerWeights(i, module.layer_name, [
                FullTensor(spec_of(module, name, plan.residents[i], plan.bundle, device), group.rank)
                for name in streamed
            ])
            for i, (module, (streamed, _)) in enumerate(zip(modules, names, strict=True))
        ]
        self = cls(group, device, layers)
        try:
            small = self._replicate(modules, names)
            for module, layer in zip(modules, layers, strict=True):
                self._migrate(module, layer)
            self._share(options, plan)
            for module, layer, (_, replicated) in zip(modules, layers, names, strict=True):
                tensors = {name: small[module.layer_name, name] for name in replicated}
                experts.bind(module, layer, tensors, self.prefetcher, self.hot)
            experts.keep_opaque(model)
            if self.hot is not None:
                self.hot.start()
            self.prefetcher.start()
            self._report()
        except BaseException:
            self.close()
            raise
        return self

    def _replicate(self, modules: Sequence[RoutedExperts], names: Sequence[tuple[list[str], list[str]]]) -> dict:
        keys = [(m.layer_name, n) for m, (_, replicated) in zip(modules, names, strict=True) for n in replicated]
        by_name = {m.layer_name: m for m in modules}
        full = replicate(
            self._group,
            [getattr(by_name[layer], name).data for layer, name in keys],
            [by_name[layer].dwdp_placement for layer, _ in keys],
        )
        self.replicated_bytes = sum(tensor.nbytes for tensor in full)
        return dict(zip(keys, full, strict=True))

    def _migrate(self, module: RoutedExperts, layer: LayerWeights) -> None:
        """Move one layer's shard into shareable memory; its source is gone before the next layer's memory is made."""
        for tensor in layer.tensors:
            parameter = getattr(module, tensor.spec.name)
            tensor.migrate(self._device, parameter.data)
            parameter.data = parameter.data.new_empty(0)
            self._device.release_cached()

    def _share(self, options: Options, plan: budget.CachePlan) -> None:
        """Import the peers' shards, complete edge pages and residents, make the slots and both views."""
        self._group.barrier("shard in place")
        exchange(self._group, self._device, self.layers)
        tensors = [tensor for layer in self.layers for tensor in layer.tensors]
        for tensor in tensors:
            tensor.fill(self._device)
        self.slots = Slots(self._device, self.layers, options.slots, self.rank)
        for layer in self.layers:
            for tensor in layer.tensors:
                tensor.compose(self._device, self.slots.of(layer, tensor.spec.name))
            layer.plan(options.slice_bytes)
        remote = any(layer.copies for layer in self.layers)
        stream = self._device.stream(timing=options.timing)
        self.prefetcher = Prefetcher(
            self.layers, stream, num_slots=options.slots,
            direct_max_tokens=(options.direct_max_tokens or 0) if remote else EVERYTHING,
        )
        if plan.bundle:
            self.hot = HotCache(
                self.layers, self._device, stream, self.prefetcher, rank=self.rank, num_pages=plan.hot_pages,
                slice_bytes=options.slice_bytes,
            )
        everyone = self._group.gather("pages complete", self.memory_bytes())
        if self.rank == 0:
            logger.info("DWDP expert memory\n%s", budget.table(everyone))

    def memory_bytes(self) -> dict[str, int]:
        """Expert memory on this rank by kind. `padding` is what whole pages add to the bytes of owned experts."""
        tensors = [tensor for layer in self.layers for tensor in layer.tensors]
        layouts = [tensor.spec.layout for tensor in tensors]
        shard = sum(len(layout.bytes_of(layout.placement.owned(self.rank))) for layout in layouts)
        return {
            "shard": shard,
            "resident": sum(block.nbytes for tensor in tensors for _, block in tensor.residents)
            + (self.hot.nbytes if self.hot else 0),
            "slots": self.slots.nbytes if self.slots else 0,
            "replicated": self.replicated_bytes,
            "padding": sum(block.nbytes for tensor in tensors for _, block in tensor.shard) - shard,
        }

    def stats(self) -> dict[str, Any]:
        prefetcher = self.prefetcher
        prefetcher.drain()
        if self.hot is not None:
            self.hot.bill()
        layout = self.layers[0].tensors[0].spec.layout
        owned, held = layout.placement.owned(self.rank), layout.placement.held(self.rank, layout.residents)
        return {
            "rank": self.rank,
            "size": self.size,
            "experts": {"owned": len(owned), "resident": len(held) - len(owned),
                        "streamed": layout.placement.num_experts - len(held)},
            "memory_bytes": self.memory_bytes(),
            "allocated_bytes": self._device.allocated_bytes,
            "num_slots": len(prefetcher.slots),
            "slot_tags": [slot.tag for slot in prefetcher.slots],
            "direct_max_tokens": prefetcher.direct_max_tokens,
            "prefetch_bytes": prefetcher.prefetched_bytes,
            "forwards": dict(prefetcher.forwards),
            "replays": prefetcher.replays,
            "refills": prefetcher.refills,
            "exposed_wait_ms": prefetcher.exposed_wait_ms,
            "copy_ms": prefetcher.copy_ms,
            "direct_bytes": self.hot and self.hot.direct_bytes,
            "swapped": self.hot and self.hot.swapped,
        }

    def _report(self) -> None:
        logger.info(
            "DWDP rank %d of %d: %d MoE layers, %d slots, direct view up to %d tokens", self.rank, self.size,
            len(self.layers), len(self.prefetcher.slots), self.prefetcher.direct_max_tokens,
        )

    def close(self) -> None:
        """Stop copying, then unmap and release everything. Peers keep what they have imported. Repeats safely."""
        if self.prefetcher is not None:
            self.prefetcher.close()
            self.prefetcher = None
        self._device.release_cached()
        for tensor in (tensor for layer in self.layers for tensor in layer.tensors):
            tensor.close()
        for memory in (self.slots, self.hot):
            if memory is not None:
                memory.close()


def refuse_oversize(
    modules: Sequence[RoutedExperts], rank: int, device: Device, options: Options, limit: budget.Limit
) -> None:
    """Raises DWDPError when slots or cache will not fit beside the shards, whose memory `modules` have taken already.

    Layers that are quantized while they load have no memory yet; `StreamedModel.build` checks them.
    """
    if not any(parameter.is_meta for module in modules for parameter in module.parameters()):
        sizes = [experts.size_of(module, experts.per_expert(module, rank)) for module in modules]
        budget.cache_bytes(sizes, device, options, limit)


def spec_of(module: RoutedExperts, name: str, residents: int, bundle: int, device: Device) -> TensorSpec:
    parameter, placement = getattr(module, name), module.dwdp_placement
    layout = Layout(
        placement=placement, expert_bytes=parameter[0].numel() * parameter.element_size(),
        page_bytes=device.page_bytes, residents=residents, bundle=bundle,
    )
    shape = (placement.num_experts, *parameter.shape[1:])
    return TensorSpec(name=name, shape=shape, stride=tuple(parameter.stride()), dtype=parameter.dtype, layout=layout)


def describe(
    model: torch.nn.Module, modules: Sequence[RoutedExperts], names: Sequence[tuple[list[str], list[str]]],
    residents: Sequence[int], page_bytes: int,
) -> Manifest:
    """This rank's manifest; every rank must come to the same."""

    def tensor(module: RoutedExperts, name: str, streamed: bool) -> TensorManifest:
        parameter = getattr(module, name)
        return TensorManifest(
            name=name, shape=tuple(parameter.shape[1:]), stride=tuple(parameter.stride()),
            dtype=str(parameter.dtype), streamed=streamed,
        )

    return Manifest(
        digest=experts.digest(model, modules),
        page_bytes=page_bytes,
        layers=[
            LayerManifest(
                name=module.layer_name, num_experts=module.global_num_experts, residents=count,
                tensors=[tensor(module, n, True) for n in streamed] + [tensor(module, n, False) for n in replicated],
            )
            for module, (streamed, replicated), count in zip(modules, names, residents, strict=True)
        ],
    )
