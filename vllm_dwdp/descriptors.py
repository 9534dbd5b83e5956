"""Descriptors: how many files a rank must be able to hold open, known before it reads weights, and had or refused."""

import contextlib
import errno
import os
import resource
from collections.abc import Iterator, Sequence

from vllm_dwdp.budget import LayerSize
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.layout import Layout

OTHERS = 64  # sockets, libraries and logs that are opened later


def provide(layers: Sequence[LayerSize], rank: int, residents: Sequence[int], *, page_bytes: int, kept: bool) -> None:
    """Raise this process's limit to what memory handles need, where it is lower and may be raised.

    With `kept` a block holds a descriptor as long as it lives, else while it is handed over, a layer at a time.
    Raises DWDPError naming the number needed.
    """
    by_layer = []
    for layer, count in zip(layers, residents, strict=True):
        layouts = [
            Layout(placement=layer.placement, expert_bytes=nbytes, page_bytes=page_bytes, residents=count)
            for nbytes in layer.expert_bytes if nbytes
        ]
        # Slots are at most two blocks a tensor, residents two more.
        by_layer.append(sum(4 + sum(len(each.segments(r)) for r in range(layer.placement.size)) for each in layouts))
    need = (sum(by_layer) if kept else 0) + 2 * max(by_layer) + OTHERS
    need += len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft in (resource.RLIM_INFINITY, -1) or soft >= need:
        return
    if hard not in (resource.RLIM_INFINITY, -1) and hard < need:
        raise DWDPError(
            f"rank {rank} needs {need} open files for the memory that ranks hand over, and may have {hard}: raise the "
            f"limit with ulimit -n {need}, LimitNOFILE of a service, or --ulimit nofile of a container"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Raises DWDPError that names the limit where the body runs out of descriptors in spite of `provide`."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise DWDPError(f"{limit} open files are too few for this model's memory: raise ulimit -n") from error
