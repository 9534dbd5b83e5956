"""What doctor finds out about this machine, the installed packages and a model, before anything is judged."""

import contextlib
import dataclasses
import importlib.metadata
import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from vllm_dwdp import meeting
from vllm_dwdp.entrypoints.bench.origin import on_cpu
from vllm_dwdp.entrypoints.plan import model as plan
from vllm_dwdp.entrypoints.plan.source import read_config
from vllm_dwdp.errors import DWDPError

VARIABLES = ("CUDA_VISIBLE_DEVICES", "DWDP_ALLOW_UNTESTED_VLLM", "VLLM_PLUGINS")
SHM, IMEX = "/dev/shm", "/dev/nvidia-caps-imex-channels"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU that this process sees. `fault` is why it has no CUDA virtual memory, if it has none."""

    name: str
    free_bytes: int
    total_bytes: int
    fault: str = ""
    handles: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """How GPU `reader` reaches `owner`'s memory, by their numbers here. `fault` is why no copy was measured."""

    reader: int
    owner: int
    kind: str
    has_access: bool = True
    gb_per_s: float = 0.0
    fault: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """Sizes are bytes. Texts are empty where nothing is wrong or set."""

    size: int
    versions: dict[str, str]  # by distribution
    is_cpu: bool
    torch_cuda: str
    environment: dict[str, str]
    plugins: tuple[str, ...]
    lost_hooks: tuple[str, ...]
    gpus: tuple[Gpu, ...]
    links: tuple[Link, ...]
    has_imex: bool
    descriptors: tuple[int, int]  # open files allowed now, and at most; below 0: without end
    shm: tuple[int, int] | None  # in all, free; None: no folder that this user can write to
    convoy_fault: str
    ram: tuple[int, int]  # in all, free
    model: plan.Model | None
    model_fault: str  # DWDP cannot serve it
    model_gap: str  # plan cannot compute its sizes


def gather(model: str | None, size: int | None, gpus: Sequence[Gpu] = (), links: Sequence[Link] = ()) -> Facts:
    """Look at everything but the GPUs, which are given. Without `size` it is their number, and at least 2."""
    described, fault, gap = describe(model) if model else (None, "", "")
    memory = psutil.virtual_memory()
    return Facts(
        size=size or max(len(gpus), 2), is_cpu=on_cpu(), torch_cuda=torch_cuda(), lost_hooks=tuple(lost_hooks()),
        versions={name: importlib.metadata.version(name) for name in ("vllm", "torch", "vllm-dwdp")},
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        plugins=tuple(e.name for e in importlib.metadata.entry_points(group="vllm.general_plugins")),
        gpus=tuple(gpus), links=tuple(links), has_imex=os.path.isdir(IMEX) and bool(os.listdir(IMEX)),
        descriptors=resource.getrlimit(resource.RLIMIT_NOFILE), shm=shared_memory(), convoy_fault=convoy_fault(),
        ram=(memory.total, memory.available), model=described, model_fault=fault, model_gap=gap,
    )


def torch_cuda() -> str:
    import torch

    return torch.version.cuda or ""


def lost_hooks() -> Iterator[str]:
    """Why each hook that does not take does not: all are put in place and taken away again."""
    from vllm_dwdp.integration import hooks

    for hook in hooks.HOOKS:
        try:
            with hook.during(lambda original, *args, **kwargs: original(*args, **kwargs)):
                pass
        except Exception as error:  # whatever importing a part of an unknown vLLM raises
            yield " ".join(str(error).split()) or f"{hook.path}: {type(error).__name__}"


def shared_memory(path: str = SHM) -> tuple[int, int] | None:
    if not os.access(path, os.W_OK) or not Path(path).is_dir():
        return None
    usage = shutil.disk_usage(path)
    return usage.total, usage.free


def convoy_fault() -> str:
    """What this kernel lacks of the page on which ranks meet, tried out: a place that one rank has, and a seal."""
    fds: list[int] = []
    try:
        fds.append(page := meeting.create(2))
        with contextlib.closing(meeting.Meeting(page, 0, 2)), contextlib.suppress(DWDPError):
            meeting.Meeting(page, 0, 2).close()
            return "a lock of an open file (F_OFD_SETLK) keeps nobody out"
        meeting.seal(page)
        try:
            os.pwrite(page, b"0", 0)
        except PermissionError:
            return ""
        return "a sealed memfd (F_SEAL_FUTURE_WRITE) can still be written"
    except OSError as error:
        return f"a memfd that is locked and sealed is refused: {error.strerror}"
    finally:
        for fd in fds:
            os.close(fd)


def describe(name: str) -> tuple[plan.Model | None, str, str]:
    """The model, why DWDP cannot serve it, and why its sizes are not known."""
    try:
        config = read_config(name, {})
    except DWDPError as error:
        return None, str(error), ""
    if not plan.has_experts(config):
        return None, plan.no_experts(name), ""
    try:
        described = plan.load(name, {})
    except DWDPError as error:
        return None, "", str(error)
    return described, "" if any(described.is_moe) else f"{name}: no layer of it has experts", ""
