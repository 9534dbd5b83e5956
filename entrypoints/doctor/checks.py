"""Doctor's checks: each a function from facts to a verdict. Pure but for the package's own rules, which they ask."""

import mmap
from typing import Literal

import msgspec

from vllm_dwdp.budget import GIB, LayerSize
from vllm_dwdp.config import Options
from vllm_dwdp.descriptors import needed
from vllm_dwdp.entrypoints.doctor.facts import SHM, Facts
from vllm_dwdp.entrypoints.plan import memory as plan
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.placement import Placement

# Descriptors beside experts' memory: a rank offline on CPU has 75; a server has its sockets, CUDA its driver.
OWN_DESCRIPTORS = 256
QUEUE_BYTES = 160 * 2**20  # of vLLM's message queue to a worker in another process: ten chunks of 16 MiB
SLOW = 0.5  # of the fastest link's speed


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What was found, and what to do about it; `figures` have their unit in the name."""

    name: str = ""
    verdict: Literal["ok", "warn", "fail"]
    found: str
    do: str = ""
    figures: dict[str, float] = {}


def ok(found: str, **figures: float) -> Verdict:
    return Verdict(verdict="ok", found=found, figures=figures)


def warn(found: str, do: str, **figures: float) -> Verdict:
    return Verdict(verdict="warn", found=found, do=do, figures=figures)


def fail(found: str, do: str, **figures: float) -> Verdict:
    return Verdict(verdict="fail", found=found, do=do, figures=figures)


NO_GPU = ok("does not apply: this vLLM is built for CPU")


def vllm(facts: Facts) -> Verdict:
    from vllm_dwdp.integration import checks  # imports vLLM

    version = facts.versions["vllm"]
    try:
        checks.refuse_version(version, allow_untested=False)
    except DWDPError as error:
        if facts.environment.get(checks.UNTESTED) == "1":
            return warn(f"{version} is untested, allowed by {checks.UNTESTED}=1", "compare its answers first")
        found, _, do = str(error).rpartition(": ")
        return fail(found, do)
    return ok(f"{version}, tested")


def torch(facts: Facts) -> Verdict:
    version = facts.versions["torch"]
    if facts.is_cpu or facts.torch_cuda:
        return ok(version + (f", CUDA {facts.torch_cuda}" if facts.torch_cuda else ""))
    return fail(f"{version} has no CUDA, which vLLM {facts.versions['vllm']} needs here", "install vLLM's own torch")


def plugin(facts: Facts) -> Verdict:
    version, chosen = facts.versions["vllm-dwdp"], facts.environment.get("VLLM_PLUGINS")
    if "dwdp" not in facts.plugins:
        return fail(f"vllm-dwdp {version} is not among vLLM's plugins", "install it with pip into vLLM's environment")
    if chosen is not None and "dwdp" not in chosen.split(","):
        return fail(f"VLLM_PLUGINS={chosen} leaves vllm-dwdp {version} out", "add dwdp to VLLM_PLUGINS, or unset it")
    return ok(f"vllm-dwdp {version}, which vLLM loads as a plugin")


def hooks(facts: Facts) -> Verdict:
    if facts.lost_hooks:
        return fail("; ".join(facts.lost_hooks), "install a vLLM that vllm-dwdp was tested with")
    return ok("all take")


def gpus(facts: Facts) -> Verdict:
    if not facts.gpus:
        return fail("none is seen", "see what nvidia-smi says, and what CUDA_VISIBLE_DEVICES is set to")
    names = [f"{index}: {gpu.name}" for index, gpu in enumerate(facts.gpus)]
    return ok(", ".join(names))


def visible(facts: Facts) -> Verdict:
    """GPUs that a rank would not see."""
    given = facts.environment.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        if len(facts.gpus) < facts.size:
            return fail(f"{len(facts.gpus)} GPUs for {facts.size} ranks", "use fewer ranks: a rank is one GPU")
        return ok("CUDA_VISIBLE_DEVICES is not set: every rank sees all GPUs")
    count = len([each for each in given.split(",") if each.strip()])
    if count < facts.size:
        return fail(
            f"CUDA_VISIBLE_DEVICES={given} shows {count} of the GPUs of {facts.size} ranks",
            "list all GPUs of the group; for ranks started apart each rank's own first (CUDA_VISIBLE_DEVICES=1,0)",
        )
    return ok(f"CUDA_VISIBLE_DEVICES={given} shows the GPUs of {facts.size} ranks")


def peers(facts: Facts) -> Verdict:
    """Peer access between every pair."""
    if not facts.links:
        return ok("does not apply: fewer than two GPUs are seen")
    if cut := [f"GPU {link.reader} from GPU {link.owner}" for link in facts.links if not link.has_access]:
        return fail(
            f"no copy is possible by {', '.join(cut)}",
            "see `nvidia-smi topo -p2p r`: peer access needs NVLink, or PCIe without an IOMMU or ACS in between",
        )
    return ok("every GPU reads every other's memory")


def links(facts: Facts) -> Verdict:
    """Kind and measured bandwidth, by direction."""
    if unmeasured := [link.fault for link in facts.links if link.fault]:
        return warn(f"not measured: {unmeasured[0]}", "end what else uses the GPUs, and see the check of peers")
    if not facts.links:
        return ok("does not apply: fewer than two GPUs are seen")
    figures = {f"{link.reader}_from_{link.owner}_gb_per_s": round(link.gb_per_s, 1) for link in facts.links}
    slowest, fastest = (pick(facts.links, key=lambda link: link.gb_per_s) for pick in (min, max))
    kinds = " and ".join(sorted({link.kind for link in facts.links}))
    found = f"{kinds}, {slowest.gb_per_s:.0f} to {fastest.gb_per_s:.0f} GB/s a copy"
    if slowest.gb_per_s < SLOW * fastest.gb_per_s:
        found += f"; GPU {slowest.reader} from GPU {slowest.owner} is slowest"
        return warn(found, "group GPUs that are linked alike: a rank waits for its slowest peer", **figures)
    if kinds != "NVLink":
        do = "DWDP was measured on NVLink alone: ask `vllm-dwdp plan` from how many tokens a step copies are hidden"
        return warn(found, do, **figures)
    return ok(found, **figures)


def virtual_memory(facts: Facts) -> Verdict:
    if faults := [gpu.fault for gpu in facts.gpus if gpu.fault]:
        return fail("; ".join(faults), "install a newer driver; in a virtual machine, pass whole GPUs through")
    return ok("CUDA maps memory page by page")


def handles(facts: Facts) -> Verdict:
    """How memory is handed to peers."""
    kinds = frozenset.intersection(*(gpu.handles for gpu in facts.gpus)) if facts.gpus else frozenset()
    if not kinds:
        return fail("the driver gives neither POSIX descriptors nor FABRIC handles", "update it, and use whole GPUs")
    if "fd" not in kinds:
        return warn("FABRIC handles alone, no POSIX descriptors, by which ranks of one host share memory", "update the driver")
    if "fabric" in kinds:
        return ok("FABRIC handles, for ranks on several hosts, which do not dispatch; within one host ranks use POSIX descriptors")
    channel = "there is an IMEX channel" if facts.has_imex else "no IMEX channel is there"
    return Verdict(
        verdict="ok", found=f"POSIX descriptors, which serve within a host; FABRIC handles are refused ({channel})",
        do="ranks on several hosts need GPUs of one NVLink domain, nvidia-imex running on each host, and a channel in "
        "/dev/nvidia-caps-imex-channels that this user may open",
    )


def descriptors(facts: Facts) -> Verdict:
    """By the hard limit, up to which a rank raises its own."""
    need, whom = OWN_DESCRIPTORS, "a rank"
    if facts.model and (placement := placed(facts)):
        layers = [LayerSize(placement=placement, expert_bytes=facts.model.expert_bytes)] * facts.model.num_moe_layers
        page_bytes, empty = mmap.PAGESIZE if facts.is_cpu else plan.PAGE_BYTES, [0] * len(layers)
        need += max(
            needed(layers, rank, empty, slots=Options().slots, page_bytes=page_bytes, kept=facts.is_cpu)
            for rank in range(facts.size)
        )
        whom = f"a rank of {facts.model.name}"
    soft, hard = facts.descriptors
    figures = dict(limit=soft, hard_limit=hard, needed=need)
    if 0 <= hard < need:
        return fail(f"{hard} open files are allowed, {whom} needs {need}",
                    f"run `ulimit -n {max(need, 65536)}` before, or raise LimitNOFILE or a container's nofile", **figures)
    raised = "" if soft < 0 or soft >= need else ", raised at start"
    return ok(f"{soft if soft >= 0 else 'any number of'} open files are allowed{raised}, {whom} needs {need}", **figures)


def shared_memory(facts: Facts) -> Verdict:
    do = f"make {SHM} larger: --shm-size or --ipc=host for docker, an emptyDir with medium Memory for Kubernetes"
    if facts.shm is None:
        return fail(f"{SHM} is not a folder that this user can write to", "mount a tmpfs there")
    total, free = facts.shm
    found, need = f"{size_text(free)} of {size_text(total)} are free in {SHM}", QUEUE_BYTES * facts.size
    figures = dict(total_bytes=total, free_bytes=free)
    if free == 0:
        return fail(found, do, **figures)
    if free < need:
        return warn(f"{found}; vLLM takes up to {size_text(need)} for {facts.size} ranks", do, **figures)
    return ok(found, **figures)


def convoy(facts: Facts) -> Verdict:
    """The page on which ranks meet."""
    if facts.convoy_fault:
        return fail(facts.convoy_fault, "use Linux 5.1 or newer, and a container runtime that allows memfd_create")
    return ok("memfd seals and locks of open files work")


def moe(facts: Facts) -> Verdict:
    if facts.model_fault:
        return fail(facts.model_fault, "name a MoE model, by folder or hub name; serve others without --parallel dwdp")
    if facts.model_gap:
        return warn(facts.model_gap, "DWDP may serve it all the same; memory and descriptors are not checked")
    if facts.model is None:
        return ok("does not apply: no model is named")
    try:
        placement = Placement(num_experts=facts.model.num_experts, size=facts.size)
    except DWDPError as error:
        found, _, do = str(error).rpartition("; ")
        return fail(found, do)
    owned = len(placement.owned(0))
    return ok(f"{facts.model.name}: rank 0 of {facts.size} owns {owned} of {placement.num_experts} experts in "
              f"{facts.model.num_moe_layers} layers")


def memory(facts: Facts) -> Verdict:
    """What a rank takes for good against what is free, on CPU for all ranks."""
    placement = placed(facts)
    if facts.model is None or placement is None:
        return ok("does not apply: no model whose sizes are known")
    held = plan.dwdp(facts.model, placement, slots=Options().slots, cache_gib=0, tokens=0)
    sizes = [size_text(nbytes) for nbytes in (held.replicated, held.shard, held.slots)]
    parts = "{} replicated, {} of shard, {} of slots".format(*sizes)
    if facts.is_cpu:
        need, room, whom = facts.size * held.total, facts.ram[1], f"{facts.size} ranks take"
        where = f"{size_text(room)} of RAM are free"
    else:
        least = min(facts.gpus, key=lambda gpu: room_of(gpu.free_bytes, gpu.total_bytes), default=None)
        if least is None:
            return fail("no GPU is seen", "see the check of gpus")
        need, room, whom = held.total, room_of(least.free_bytes, least.total_bytes), "a rank takes"
        where = f"{size_text(room)} are free within {plan.UTILIZATION} of {least.name}"
    found, figures = f"{whom} {size_text(need)} ({parts} each), {where}", dict(needed_bytes=need, room_bytes=room)
    if need >= room:
        return fail(found, "use more ranks, or end what else holds memory", **figures)
    return ok(f"{found}: {size_text(room - need)} are left to activations and KV cache", **figures)


def room_of(free_bytes: int, total_bytes: int) -> int:
    return min(free_bytes, int(plan.UTILIZATION * total_bytes))


def placed(facts: Facts) -> Placement | None:
    if facts.model is None or facts.model_fault or facts.size > facts.model.num_experts:
        return None
    return Placement(num_experts=facts.model.num_experts, size=facts.size)


def size_text(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:.0f} MiB"


ON_GPUS = (gpus, visible, peers, links, virtual_memory, handles)
CHECKS = (vllm, torch, plugin, hooks, *ON_GPUS, descriptors, shared_memory, convoy, moe, memory)


def examine(facts: Facts) -> list[Verdict]:
    found = [NO_GPU if facts.is_cpu and check in ON_GPUS else check(facts) for check in CHECKS]
    return [msgspec.structs.replace(each, name=check.__name__) for each, check in zip(found, CHECKS, strict=True)]
