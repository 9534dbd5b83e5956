"""Expert layers as loading leaves them: one record a MoE layer, from which everything later is made."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from vllm_dwdp.budget import LayerSize
from vllm_dwdp.layout import Layout
from vllm_dwdp.manifests import LayerManifest, TensorManifest
from vllm_dwdp.placement import Placement
from vllm_dwdp.weights import TensorSpec


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ExpertLayer:
    """One MoE layer that holds this rank's shard.

    `module` carries the parameters; those named in `streamed` and `replicated` have the shape [owned, ...].
    `hidden_size`, `top_k` and `itemsize` (bytes) are of the rows that it computes on.
    `is_draft`: a draft model's. Such layers follow the model's own.
    `has_agreed_scales`: ranks have converted it with one and the same static activation scale.
    `sources` are their memory, by name, to be gone once the layer shows all experts.
    """

    name: str
    module: Any  # vLLM's, a torch.nn.Module
    placement: Placement
    streamed: tuple[str, ...]
    replicated: tuple[str, ...]
    is_draft: bool = False
    has_agreed_scales: bool = False
    sources: Mapping[str, StorageWeakRef] = dataclasses.field(default_factory=dict)
    hidden_size: int = 0
    top_k: int = 0
    itemsize: int = 0

    def parameter(self, name: str) -> torch.nn.Parameter:
        return getattr(self.module, name)

    @property
    def size(self) -> LayerSize:
        """The memory of the streamed parameters, as they are now."""
        return LayerSize(placement=self.placement, expert_bytes=[self._row_bytes(name) for name in self.streamed])

    def _row_bytes(self, name: str) -> int:
        row = self.parameter(name)[0]
        return row.numel() * row.element_size()

    def spec(self, name: str, *, residents: int, page_bytes: int) -> TensorSpec:
        """The full tensor that a streamed parameter becomes."""
        parameter = self.parameter(name)
        layout = Layout(
            placement=self.placement, expert_bytes=self._row_bytes(name), page_bytes=page_bytes, residents=residents,
        )
        shape = (self.placement.num_experts, *parameter.shape[1:])
        return TensorSpec(name=name, shape=shape, stride=tuple(parameter.stride()), dtype=parameter.dtype, layout=layout)

    def manifest(self, residents: int) -> LayerManifest:
        """What every rank must say of this layer alike."""
        tensors = [
            TensorManifest(
                name=name, shape=tuple(p.shape[1:]), stride=tuple(p.stride()), dtype=str(p.dtype),
                streamed=name in self.streamed,
            )
            for name in (*self.streamed, *self.replicated) for p in (self.parameter(name),)
        ]
        return LayerManifest(
            name=self.name, num_experts=self.placement.num_experts, residents=residents, tensors=tensors
        )
