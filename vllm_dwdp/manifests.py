"""Manifests: what a rank says of itself, of what it has loaded and of what it dispatches, for all ranks to say alike."""

from typing import Any, ClassVar

import msgspec


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank says of itself before it loads. All of it must be alike but `OWN`."""

    OWN: ClassVar = ("rank", "host", "boot", "network", "user", "device_name", "handles")

    rank: int
    size: int
    plugin: str
    vllm: str
    model: dict[str, Any]
    options: dict[str, Any]
    device: str
    host: str
    boot: str  # id of the running kernel: containers have host names of their own
    network: int  # namespace
    user: int
    device_name: str
    handles: str


class TensorManifest(msgspec.Struct, frozen=True, kw_only=True):
    """One expert tensor of one layer: its shape and strides (elements) for a single expert, and how it is held."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    streamed: bool


class LayerManifest(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    num_experts: int
    residents: int
    tensors: list[TensorManifest]


class DispatchManifest(msgspec.Struct, frozen=True, kw_only=True):
    """Which steps a rank dispatches: the largest, whose rows an inbox has, and the rows of its graphs."""

    dispatch_max_tokens: int
    helped_max_tokens: int
    cudagraph_capture_sizes: list[int]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank has loaded. `dispatch` is None where no step dispatches."""

    page_bytes: int
    layers: list[LayerManifest]
    dispatch: DispatchManifest | None
