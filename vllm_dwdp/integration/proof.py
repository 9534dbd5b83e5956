"""Proof: that no kernel keeps a tensor which its layer does not show, and that a rebuilt kernel has lost nothing.

Streamed weights change their address from step to step, and a shard has fewer rows than the layer shows: whatever a
kernel keeps besides the layer's own parameters would be stale, without a word. The rules know no format by name.
"""

import functools
import gc
import types
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_dwdp.errors import DWDPError
from vllm_dwdp.experts import ExpertLayer

_PLAIN = (type(None), bool, int, float, str, Enum, torch.dtype)
_OPAQUE = (*_PLAIN, type, types.ModuleType)
_EMPTY = types.CellType()
# What vLLM's configs of a kernel call the scales of activations that a checkpoint fixes.
_STATIC = ("a1_scale", "a2_scale", "a1_gscale", "a2_gscale")


class Following(TorchDispatchMode):
    """Follows `sources` while the body runs: knows every tensor made of one, as a view or by computing.

    Raises DWDPError when a source is written, or becomes a number that nobody could follow.
    """

    def __init__(self, what: str, sources: Iterable[torch.Tensor]):
        super().__init__()
        self._what = what
        self._made = list(sources)  # kept alive: an address that is used again would be taken for theirs
        self._addresses = {_address(tensor) for tensor in self._made}

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.numel() > 0 and _address(tensor) in self._addresses

    def __torch_dispatch__(self, func: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(tensor in self for tensor in _tensors((args, kwargs))):
            made = _tensors(result)
            if not made or func._schema.is_mutable:
                raise DWDPError(f"{self._what} reads or writes streamed weights while it is made ({func}): {_ADVICE}")
            self._made += made
            self._addresses.update(_address(tensor) for tensor in made if tensor.numel())
        return result


_ADVICE = "DWDP cannot stream to this kernel; choose another --moe-backend, such as triton or marlin"


def kept(layer: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that can be reached from `layer`, its quantization method and its kernel, as (Class.attribute, it).

    Goes through attributes, containers, closures and bound methods, and stops at other modules.
    """
    own = {id(module) for module in layer.modules()}
    seen: dict[int, Any] = {}
    open_ends: list[tuple[str, Any]] = [(type(layer).__name__, layer)]
    while open_ends:
        name, value = open_ends.pop()
        if id(value) in seen or isinstance(value, _OPAQUE):
            continue
        seen[id(value)] = value
        if isinstance(value, torch.Tensor):
            yield name, value
        elif not isinstance(value, torch.nn.Module) or id(value) in own:
            open_ends += _parts(name, value)


def prove(layer: ExpertLayer, rank: int, following: Following) -> None:
    """Raises DWDPError naming what keeps a tensor of the shard's size, of streamed weights, or a static scale."""
    module, num_experts = layer.module, layer.placement.num_experts
    num_owned = len(layer.placement.owned(rank))
    shown = {id(parameter) for parameter in module.parameters()}
    for name, tensor in kept(module):
        if id(tensor) in shown:
            continue
        reason = None
        if tensor in following:
            reason = "is made of streamed weights, which change their address from step to step"
        elif num_owned != num_experts and tensor.dim() and tensor.shape[0] == num_owned:
            reason = f"has a row for each of this rank's {num_owned} experts where all {num_experts} are computed"
        if reason:
            raise DWDPError(f"{layer.name}: {name}, {tuple(tensor.shape)}, {reason}: {_ADVICE}")
    config = module.quant_method.moe_quant_config
    for name in _STATIC:
        scale = getattr(config, name, None)
        if scale is not None and not (layer.has_agreed_scales and scale.numel() == 1):
            raise DWDPError(
                f"{layer.name}: {type(config).__name__}.{name} is a static activation scale that ranks have not agreed on, "
                f"so they would differ; use a checkpoint with dynamic activation scales"
            )


def refuse_old_memory(layer: ExpertLayer) -> None:
    """Raises DWDPError naming what still holds memory that the layer's parameters had before they were moved."""
    if any(not memory.expired() for memory in layer.sources.values()):
        gc.collect()  # a kernel that was replaced may wait in a cycle
    for source, memory in layer.sources.items():
        if not memory.expired():
            holders = [name for name, t in kept(layer.module) if StorageWeakRef(t.untyped_storage()).cdata == memory.cdata]
            raise DWDPError(
                f"{layer.name}: {holders[0] if holders else type(layer.module.quant_method).__name__} still holds the memory "
                f"from which {source} was moved: {_ADVICE}"
            )


def refuse_loss(layer: ExpertLayer, rank: int, loaded: Any, rebuilt: Any) -> None:
    """Raises DWDPError when `rebuilt`, made for all experts, lacks what `loaded`, made for the shard, had.

    vLLM's `process_weights_after_loading` may set attributes of an experts object, and is not repeated.
    """
    owned, num_experts = layer.placement.owned(rank), layer.placement.num_experts
    shown = {id(parameter) for parameter in layer.module.parameters()}

    def is_alike(before: Any, after: Any) -> bool:
        if before is after or isinstance(before, bool):
            return before is after
        if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
            if id(before) in shown or id(after) in shown:
                return False
            rows = after[owned.start : owned.stop] if after.dim() and len(after) == num_experts else after
            same = after if before.shape == after.shape else rows
            return before.shape == same.shape and torch.equal(before, same)
        if isinstance(before, torch.Tensor) or isinstance(after, torch.Tensor):
            return False
        if isinstance(before, _PLAIN) or callable(before):
            return before == after or (before, after) == (len(owned), num_experts)
        return type(before) is type(after)

    for name in vars(loaded) | vars(rebuilt):
        if not is_alike(vars(loaded).get(name), vars(rebuilt).get(name)):
            raise DWDPError(
                f"{layer.name}: {type(loaded).__name__}.{name} was set while weights were loaded and is not the same in "
                f"a kernel made for all experts: {_ADVICE}"
            )


def _parts(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(name, part) for part in value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [(name, part) for part in value]
    if isinstance(value, functools.partial):
        return [(name, part) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, types.MethodType):
        return [(name, value.__self__), (name, value.__func__)]
    if isinstance(value, types.FunctionType):
        filled = [cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY]
        return [(name, part) for part in (filled, value.__defaults__)]
    attributes = dict(getattr(value, "__dict__", {}))
    for slot in (slot for kind in type(value).__mro__ for slot in getattr(kind, "__slots__", ())):
        attributes[slot] = getattr(value, slot, None)
    if isinstance(value, torch.nn.Module):
        attributes |= attributes.pop("_parameters") | attributes.pop("_buffers")
    return [(f"{type(value).__name__}.{attribute}", part) for attribute, part in attributes.items()]


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
