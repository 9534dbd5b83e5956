"""Inboxes: the memory into which peers write tokens, and the convoy's page: made, handed round and mapped at start.

An inbox holds activations of requests, never weights; it is the one memory that peers map writable.
"""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from vllm_dwdp.handover import close_all, serving
from vllm_dwdp.kernels.device import Block, Device
from vllm_dwdp.kernels.tokens import InboxMap, TokenExchange, owners_of
from vllm_dwdp.meeting import Meeting, create
from vllm_dwdp.placement import Placement
from vllm_dwdp.rendezvous import Group


def open_inboxes(
    group: Group, device: Device, undo: contextlib.ExitStack, at: InboxMap, placements: Sequence[Placement]
) -> tuple[Block, TokenExchange, Meeting]:
    """This rank's inbox, its exchange with its peers and its place in the convoy; rank 0 makes the page.

    `placements` are the layers'. Everything made is closed by `undo`.
    """
    nbytes = -(-at.nbytes // device.page_bytes) * device.page_bytes
    block = device.allocate(nbytes)
    undo.callback(block.close)
    device.zero(block)
    pages = [create(group.size)] if group.rank == 0 else []

    def handles(_: int) -> list[Any]:
        return [device.export(block, writable=True), *map(os.dup, pages)]

    regions = []
    with contextlib.ExitStack() as stack:
        stack.callback(close_all, pages)
        peers = stack.enter_context(serving(group, "inboxes", handles=handles))
        for rank in range(group.size):
            region = device.reserve(nbytes)
            undo.callback(region.close)
            regions.append(region)
            if rank == group.rank:
                region.map(0, block, writable=True)
                continue
            with peers[rank].fetch(0, 1 + (rank == 0)) as fds:
                inbox = device.adopt(fds[0], nbytes)
                undo.callback(inbox.close)
                region.map(0, inbox, writable=True)
                if rank == 0:
                    pages.append(os.dup(fds[1]))
        meeting = Meeting(pages[0], group.rank, group.size)
        undo.callback(meeting.close)
    owners = [owners_of(tuple(p.owned(rank) for rank in range(group.size)), p.num_experts) for p in placements]
    tokens = device.tokens(group.rank, at, [region.address for region in regions], owners, meeting.is_alive)
    undo.callback(tokens.close)
    return block, tokens, meeting
