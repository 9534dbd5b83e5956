"""Descriptors: how many files a rank must be able to hold open, known before it reads weights, and had or refused."""

import contextlib
import errno
import os
import resource
from collections.abc import Iterator, Sequence

from vllm_dwdp.budget import LayerSize
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.layout import Layout

OTHERS = 64  # libraries and logs that are opened later
PER_PEER = 6  # its inbox, sockets to it and from it while memory is handed over, the rendezvous


def needed(
    layers: Sequence[LayerSize], rank: int, residents: Sequence[int], *, slots: int, page_bytes: int, kept: bool
) -> int:
    """Descriptors that `rank` has open at most for experts' memory, and for its peers.

    A layer's are handed to all peers at once, and come from one. With `kept` a block of memory holds one for life: of
    the shard, of its peers' shards, of residents and slots.
    """
    ranks, blocks, handed, sides = range(layers[0].placement.size), 0, 0, 0
    for layer, count in zip(layers, residents, strict=True):
        layouts = [
            Layout(placement=layer.placement, expert_bytes=nbytes, page_bytes=page_bytes, residents=count)
            for nbytes in layer.expert_bytes
        ]
        shards = [sum(len(layout.segments(each)) for layout in layouts) for each in ranks]
        blocks += sum(shards) + sum(_residents(layout, rank) for layout in layouts)
        handed = max(handed, len(ranks[1:]) * shards[rank] + max(shards))
        sides = max(sides, sum(bool(pages) for layout in layouts for pages in layout.missing(rank)))
    peers = PER_PEER * len(ranks)
    if not kept:
        return handed + peers
    return blocks + max(handed, min(slots, len(layers)) * sides) + peers


def _residents(layout: Layout, rank: int) -> int:
    held, owned = layout.held_pages(rank), layout.owned_pages(rank)
    return (held.start < owned.start) + (held.stop > owned.stop)


def provide(number: int, rank: int) -> None:
    """Raise this process's limit, where it is lower and may be raised, so that `number` more can be open.

    Raises DWDPError naming the number needed.
    """
    need = number + OTHERS + len(os.listdir("/proc/self/fd"))
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
