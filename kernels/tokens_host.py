"""The token exchange of a machine without a GPU: the same protocol, by the thread that computes, over shared memory.

The CPU build's expert kernel takes no masked ids: a masked place gets an expert that this rank computes, and weight 0.
"""

import ctypes
import time
from collections.abc import Callable, Sequence

import torch

from vllm_dwdp.convoy import Round
from vllm_dwdp.kernels.tokens import WAIT_S, InboxMap, TokenExchange, alone, did_not_come, seat

POLL_S = 20e-6


class HostTokens(TokenExchange):
    """`inboxes` are the addresses at which this rank maps every rank's inbox; `owners` are `tokens.owners_of`, by layer.

    `is_alive` tells whether a rank's process still runs.
    """

    def __init__(self, rank: int, at: InboxMap, inboxes: Sequence[int], owners: Sequence[list[list[int]]],
                 is_alive: Callable[[int], bool]):
        self._rank, self._at, self._is_alive = rank, at, is_alive
        self._owners = [torch.tensor(table, dtype=torch.int64) for table in owners]
        self._bytes = [
            torch.frombuffer((ctypes.c_char * at.nbytes).from_address(address), dtype=torch.uint8) for address in inboxes
        ]
        self._flags = [
            [[ctypes.c_int64.from_address(address + at.flag(phase, sender)) for sender in range(at.size)]
             for phase in range(2)]
            for address in inboxes
        ]
        self.begin(alone(rank, at.size, at.rows))  # of forwards outside of steps

    def _area(self, inbox: int, offset: int, sender: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """[rows, columns] of what `sender` puts into an inbox at `offset`."""
        row_bytes = self._at.row_bytes if offset >= self._at.hiddens else 4 * self._at.top_k
        start = offset + seat(sender, inbox) * self._at.rows * row_bytes
        return self._bytes[inbox][start : start + shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)

    def begin(self, layout: Round) -> None:
        self._layout = layout
        self._peers = [rank for rank in layout.members if rank != self._rank]
        self._senders = [rank for rank in self._peers if layout.tokens[rank]]

    def _meet(self, phase: int, layer: int, told: Sequence[int], awaited: Sequence[int]) -> None:
        epoch = self._layout.number * len(self._owners) + 1 + layer
        for peer in told:
            self._flags[peer][phase][self._rank].value = epoch
        deadline = time.monotonic() + WAIT_S
        for peer in awaited:
            while self._flags[self._rank][phase][peer].value != epoch:
                if not self._is_alive(peer) or time.monotonic() > deadline:
                    raise did_not_come(peer)
                time.sleep(POLL_S)

    def dispatch(
        self, layer: int, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        at, layout, me, (num_rows, width), top_k = self._at, self._layout, self._rank, hidden.shape, ids.shape[1]
        mine = min(layout.tokens[me], num_rows)
        for peer in self._peers:
            self._area(peer, at.hiddens, me, (mine, width), hidden.dtype).copy_(hidden[:mine])
            self._area(peer, at.ids, me, (mine, top_k), torch.int32).copy_(ids[:mine])
            self._area(peer, at.weights, me, (mine, top_k), torch.float32).copy_(weights[:mine])
        self._meet(0, layer, told=self._peers if mine else (), awaited=self._senders)
        owners = self._owners[layer][layout.mask]
        spare = next(iter((owners == me).nonzero().flatten().tolist()), 0)
        gathered, new_weights = hidden.new_zeros(rows, width), weights.new_zeros(rows, top_k)
        new_ids = ids.new_full((rows, top_k), spare)
        for sender in layout.members:
            count = mine if sender == me else layout.tokens[sender]
            there = slice(layout.starts[sender], layout.starts[sender] + count)
            if sender == me:
                gathered[there], asked, given = hidden[:mine], ids[:mine], weights[:mine]
            else:
                gathered[there] = self._area(me, at.hiddens, sender, (count, width), hidden.dtype)
                asked = self._area(me, at.ids, sender, (count, top_k), torch.int32)
                given = self._area(me, at.weights, sender, (count, top_k), torch.float32)
            owner = torch.where(asked >= 0, owners[asked.clamp_min(0).long()], -2)
            is_mine = (owner == me) | ((owner == -1) & (sender == me))
            new_ids[there] = torch.where(is_mine, asked, spare).to(ids.dtype)
            new_weights[there] = torch.where(is_mine, given, 0).to(weights.dtype)
        return gathered, new_weights, new_ids

    def combine(self, layer: int, partial: torch.Tensor, num_rows: int) -> torch.Tensor:
        at, layout, me, width = self._at, self._layout, self._rank, partial.shape[1]
        start = layout.starts
        for peer in self._peers:
            count = layout.tokens[peer]
            self._area(peer, at.sums, me, (count, width), partial.dtype).copy_(partial[start[peer] : start[peer] + count])
        mine = min(layout.tokens[me], num_rows)
        self._meet(1, layer, told=self._senders, awaited=self._peers if mine else ())
        total = torch.zeros(num_rows, width, dtype=torch.float32)
        for rank in layout.members:
            came = self._area(me, at.sums, rank, (mine, width), partial.dtype) if rank != me else None
            total[:mine] += partial[start[me] : start[me] + mine] if came is None else came
        return total.to(partial.dtype)

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass
