"""Room: the modes whose weights cannot fit a GPU, known from the model's sizes before anything loads."""

from vllm_dwdp import config
from vllm_dwdp.budget import GIB
from vllm_dwdp.entrypoints.bench.modes import Settings, is_dwdp, kind, short
from vllm_dwdp.entrypoints.plan import memory
from vllm_dwdp.entrypoints.plan.model import Model
from vllm_dwdp.entrypoints.plan.source import RESIZING
from vllm_dwdp.placement import Placement

ENGINE_BYTES = 5 * GIB // 2  # a context, CUDA graphs and the workspace of 16,384 tokens, roughly


def too_large(settings: Settings, model: Model, gpu_bytes: int) -> dict[str, str]:
    """Why, by mode, for those that need more of a GPU of `gpu_bytes` than vLLM would take. Activations are left out.

    None with --engine-args under which weights take other bytes than `model` says.
    """
    given, found = settings.engine_args, {}
    if RESIZING & given.keys():
        return {}
    kv_bytes, taken, beside = given.get("kv_cache_memory_bytes") or 0, 0, list[str]()
    for mode in settings.modes:
        share = given.get("gpu_memory_utilization") or settings.memory_share(mode)
        room = gpu_bytes - kv_bytes if kv_bytes else int(share * gpu_bytes)
        of = f"beside a KV cache of {kv_bytes / GIB:.1f} GiB" if kv_bytes else f"within gpu_memory_utilization={share:g}"
        need = weight_bytes(settings, model, mode)
        if need > room:
            found[mode] = (
                f"its weights take {need / GIB:.1f} GiB a GPU, which has {room / GIB:.1f} GiB for them {of}: not loaded; "
                f"use more GPUs or fewer layers (--hf-overrides)"
            )
        elif settings.load_together and taken + need + kv_bytes + ENGINE_BYTES > gpu_bytes:
            found[mode] = (
                f"{need / GIB:.1f} GiB of weights, a KV cache of {kv_bytes / GIB:.1f} and about {ENGINE_BYTES / GIB:.1f} of an engine "
                f"have no room beside {', '.join(beside)}, which take {taken / GIB:.1f} GiB of a GPU's {gpu_bytes / GIB:.1f}: not loaded; "
                f"leave out --side-by-side or modes, or use fewer layers (--hf-overrides)"
            )
        else:
            taken += need + kv_bytes + ENGINE_BYTES
            beside.append(short(mode))
    return found


def weight_bytes(settings: Settings, model: Model, mode: str) -> int:
    """Of one GPU, slots and residents included."""
    if is_dwdp(mode):
        options = config.parse({config.KEY: settings.dwdp_options(mode, rank=0)})
        assert options is not None
        placement = Placement(
            num_experts=model.num_experts, size=settings.size, experts_per_rank=options.experts_per_rank
        )
        cache_gib = options.cache_gib if options.cache_gib != "auto" else 0.0
        return memory.dwdp(model, placement, slots=options.slots, cache_gib=cache_gib, tokens=0).total
    if kind(mode) == "tp":
        return (model.replicated_bytes + model.all_expert_bytes) // settings.size
    return memory.expert_parallel(model, settings.size if kind(mode) == "ep" else 1, 0).total
