"""Loading: vLLM's RoutedExperts, built and loaded with this rank's shard, and described as one record a layer."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExpertsBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm_dwdp import budget, checkpoint, descriptors
from vllm_dwdp.config import Options
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.experts import ExpertLayer
from vllm_dwdp.integration import hooks
from vllm_dwdp.kernels.device import Device
from vllm_dwdp.placement import Placement

Shards = dict[RoutedExperts, Placement]  # a model's expert layers, in the order in which they were built

# Parameters of RoutedExperts without a row for every expert.
NOT_PER_EXPERT = {"e_score_correction_bias", "hash_indices_table"}
# Experts classes of which a rank cannot load its share, and why.
UNSHARDABLE = {
    "DbrxExperts": "copies checkpoint tensors of all experts at once: try --model-impl transformers",
    "SubstitutedRoutedExperts": "numbers its experts otherwise than the checkpoint does: use the model before pruning",
}
# A tensor with at most this part of the layer's largest is replicated: biases, scales per tensor, sparse block scales.
SMALL = 1 / 64


@contextlib.contextmanager
def sharded(
    rank: int, size: int, experts_per_rank: int | None, before_reading: Callable[[Shards], None],
    gather: Callable[[str, list[float]], list[list[float]]],
) -> Iterator[Shards]:
    """While the body builds and loads a model, every RoutedExperts holds only this rank's experts.

    Yields the layers built, in order; `before_reading` gets them before a checkpoint is read. `gather(what, mine)` is
    what every rank said. Raises DWDPError, also before reading, for a layer that cannot be streamed, and when the model
    has built none.
    """
    shards: Shards = {}

    def build(original: Callable, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(original).bind(*args, **kwargs)
        layer, moe_config = given.arguments["self"], given.arguments["moe_config"]
        placement = Placement(num_experts=moe_config.num_experts, size=size, experts_per_rank=experts_per_rank)
        owned = placement.owned(rank)
        given.arguments["expert_map_manager"] = _own_experts_only(given.arguments["expert_map_manager"], owned)
        moe_config.num_local_experts = len(owned)
        original(*given.args, **given.kwargs)
        _refuse_unstreamable(layer)
        _agree_on_scales(layer, gather)
        shards[layer] = placement

    def select(original: Callable, self: Any, model_config: Any) -> None:
        refuse_bypass(shards, model_config)
        before_reading(shards)
        original(self, model_config)
        counts = [placement.num_experts for placement in shards.values()]
        others = range(min(counts), sum(counts))  # not of every layer, so they may be a second kind that counts on
        self.local_expert_ids = set(others).union(*(placement.owned(rank) for placement in shards.values()))

    def first_owned() -> range:
        return next(iter(shards.values())).owned(rank)

    def load_gpt_oss(original: Callable, self: Any, weights: Any) -> Any:
        owned = first_owned()
        return original(self, ((name, _owned_rows(name, weight, owned)) for name, weight in weights))

    def load_mxfp4(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
        """Its views of the owned rows are shaped by the config's number of experts."""
        num_experts = self.config.num_local_experts
        self.config.num_local_experts = len(first_owned())
        try:
            return original(self, *args, **kwargs)
        finally:
            self.config.num_local_experts = num_experts

    with contextlib.ExitStack() as stack:
        for hook, around in (
            (hooks.BUILD_EXPERTS, build), (hooks.SELECT_FILES, select),
            (hooks.LOAD_GPT_OSS, load_gpt_oss), (hooks.LOAD_GPT_OSS_MXFP4, load_mxfp4),
        ):
            stack.enter_context(hook.during(around))
        yield shards


def refuse_bypass(layers: Iterable[RoutedExperts], model_config: Any) -> None:
    """Raises DWDPError when a MoE model has built none of the layers that DWDP streams."""
    if not layers:
        raise DWDPError(
            f"{model_config.model} built no RoutedExperts layer: its experts take a fused path of their own, which "
            f"DWDP cannot stream; choose another --moe-backend or --model-impl, or drop --parallel dwdp"
        )


def _own_experts_only(manager: Any, owned: range) -> Any:
    """A copy of vLLM's map from global to local expert that knows the owned ones only: loaders drop the rest."""
    if manager.num_fused_shared_experts:
        raise DWDPError("shared experts fused into the routed ones cannot be streamed: switch shared-expert fusion off")
    manager = copy.copy(manager)
    manager._local_num_experts = len(owned)
    manager._expert_map = torch.full((manager.global_num_experts,), -1, dtype=torch.int32, device="cpu")
    manager._expert_map[owned.start : owned.stop] = torch.arange(len(owned), dtype=torch.int32, device="cpu")
    return manager


def _owned_rows(name: str, weight: torch.Tensor, owned: range) -> torch.Tensor:
    """gpt-oss' loader takes checkpoint tensors of all experts and copies them whole: hand it the owned rows."""
    stacked = ".mlp.experts." in name and not name.split(".mlp.experts.")[1][:1].isdigit()
    return weight[owned.start : owned.stop] if stacked else weight


def _refuse_unstreamable(layer: RoutedExperts) -> None:
    method, kind = layer.quant_method, type(layer).__name__
    if kind in UNSHARDABLE:
        raise DWDPError(f"{layer.layer_name}: a rank cannot load its share of {kind}, which {UNSHARDABLE[kind]}")
    # vLLM says itself where experts may change places; Marlin's layout too is made one expert at a time.
    experts = getattr(method, "experts_cls", None)
    is_movable = method.supports_eplb or (isinstance(experts, type) and issubclass(experts, MarlinExpertsBase))
    if not is_movable:
        raise DWDPError(
            f"{layer.layer_name}: {type(method).__name__} keeps its experts in a form whose rows cannot be moved"
            f"{f' ({experts.__name__}); try --moe-backend marlin' if experts else ''}; DWDP streams unquantized and "
            f"FP8 experts, and 4-bit ones of the Marlin backend"
        )


def _static_scales(layer: RoutedExperts) -> dict[str, torch.nn.Parameter]:
    """The scales of activations that a checkpoint fixes."""
    return {name: p for name, p in layer.named_parameters() if "input" in name and "scale" in name}


def _agreed_scales(layer: RoutedExperts) -> dict[str, torch.nn.Parameter]:
    """Those of which ranks use the largest. A global scale is a reciprocal, or vLLM's own of the shard's weights."""
    return {name: scale for name, scale in _static_scales(layer).items() if "global" not in name}


def _agree_on_scales(layer: RoutedExperts, gather: Callable[[str, list[float]], list[list[float]]]) -> None:
    """vLLM converts a layer with the largest activation scale of the experts that it holds: let it be all ranks'."""
    method, scales = layer.quant_method, _agreed_scales(layer)
    if not scales:
        return

    def convert(layer: RoutedExperts) -> None:
        del method.process_weights_after_loading
        mine = [float(scale.max()) for scale in scales.values()]
        everyone = gather(f"activation scales of {layer.layer_name}", mine)
        for scale, said in zip(scales.values(), zip(*everyone, strict=True), strict=True):
            scale.data.fill_(max(said))
        method.process_weights_after_loading(layer)

    method.process_weights_after_loading = convert


def _rows(layer: RoutedExperts, num_owned: int) -> dict[str, torch.nn.Parameter]:
    """The parameters that have a row for every owned expert, in registration order."""
    return {
        name: parameter
        for name, parameter in layer.named_parameters()
        if name not in (*NOT_PER_EXPERT, *_static_scales(layer)) and parameter.dim() and parameter.shape[0] == num_owned
    }


def _streamed(rows: dict[str, torch.nn.Parameter]) -> tuple[str, ...]:
    """The names of those that are large; the others are replicated."""
    row_bytes = {name: p[0].numel() * p.element_size() for name, p in rows.items()}
    return tuple(name for name, nbytes in row_bytes.items() if nbytes > SMALL * max(row_bytes.values()))


def describe(layer: RoutedExperts, placement: Placement, rank: int, *, is_draft: bool = False) -> ExpertLayer:
    """The record of a loaded layer. Raises DWDPError when a parameter is not contiguous by expert."""
    rows = _rows(layer, len(placement.owned(rank)))
    streamed = _streamed(rows)
    for name, p in rows.items():
        span = 1 + sum((n - 1) * stride for n, stride in zip(p.shape[1:], p.stride()[1:], strict=True))
        is_dense = p.stride(0) == p[0].numel() == span and p.untyped_storage().nbytes() >= p.nbytes
        if p.numel() and not is_dense:
            raise DWDPError(
                f"{layer.layer_name}.{name} ({type(layer.quant_method).__name__}) is padded or strided: an "
                f"expert's values do not lie together, which DWDP cannot stream; choose another --moe-backend"
            )
    return ExpertLayer(
        name=layer.layer_name, module=layer, placement=placement, is_draft=is_draft, streamed=streamed,
        has_agreed_scales=bool(_agreed_scales(layer)),
        replicated=tuple(name for name in rows if name not in streamed),
        sources={name: StorageWeakRef(p.untyped_storage()) for name, p in rows.items() if p.numel()},
        hidden_size=layer.moe_config.hidden_dim, top_k=layer.moe_config.experts_per_token,
        itemsize=layer.moe_config.in_dtype.itemsize,
    )


def refuse_oversize(shards: Shards, rank: int, device: Device, options: Options, limit: budget.MemoryLimit) -> None:
    """Raises DWDPError when slots or cache will not fit beside the shards, whose memory the layers have taken already,
    or when memory needs more descriptors than this process may have.

    Layers that are quantized while they load have no memory yet; assembly checks them.
    """
    if not any(parameter.is_meta for layer in shards for parameter in layer.parameters()):
        sizes = [
            ExpertLayer(
                name=layer.layer_name, module=layer, placement=placement, replicated=(),
                streamed=_streamed(_rows(layer, len(placement.owned(rank)))),
            ).size
            for layer, placement in shards.items()
        ]
        cache = budget.cache_bytes(sizes, device, options, limit)
        residents = budget.plan_cache(sizes, cache)
        descriptors.provide(descriptors.needed(
            sizes, rank, residents, slots=options.slots, page_bytes=device.page_bytes, kept=device.keeps_descriptors,
        ), rank)


def samples(model: torch.nn.Module, shards: Shards, rank: int) -> dict[str, str]:
    """Fingerprints of the first bytes of what other ranks hold too: all parameters but the experts', and the rows of
    experts that this rank shares with another owner."""
    experts = {id(p) for layer in shards for p in layer.parameters()}
    found = {
        name: _fingerprints(p.detach().flatten()[None])[0]
        for name, p in model.named_parameters() if id(p) not in experts and p.numel()
    }
    for layer, placement in shards.items():
        owned = placement.owned(rank)
        shared = [e for e in owned if sum(e in placement.owned(peer) for peer in range(placement.size)) > 1]
        for name, p in _rows(layer, len(owned)).items() if shared else ():
            if p.numel():
                dense = torch.as_strided(p.detach(), (len(owned), p.stride(0)), (p.stride(0), 1))
                rows = _fingerprints(dense[:, :checkpoint.SAMPLE_BYTES][[e - owned.start for e in shared]])
                found |= {f"{layer.layer_name}.{name}[{e}]": said for e, said in zip(shared, rows, strict=True)}
    return found


def _fingerprints(rows: torch.Tensor) -> list[str]:
    """Of the head of each row of [n, values]."""
    head = rows[:, : checkpoint.SAMPLE_BYTES // rows.element_size()].contiguous().view(torch.uint8).cpu().numpy()
    return [checkpoint.fingerprint(row.tobytes()) for row in head]
