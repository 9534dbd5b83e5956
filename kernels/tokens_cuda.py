"""The token exchange of NVIDIA GPUs: two Triton kernels a layer that write to peers' memory and wait for what peers write.

Both can be captured in a CUDA graph: who takes part, how many rows each rank has and the round's number are read from
device memory, so one graph serves a step alone and a dispatched one.
"""

from collections.abc import Sequence

import torch
import triton

from vllm_dwdp.kernels.arrivals_cuda import WARPS
from vllm_dwdp.kernels.exchange_cuda import combine_sums, dispatch_rows
from vllm_dwdp.kernels.tokens import FEW, LANES, WAIT_S, InboxMap, RoundLayout, TokenExchange, alone, did_not_come

RING = 16  # steps whose control words may be under way at once
TILE = 8192  # numbers that a program moves at once where rows are many: 16 KB in flight on every SM


class CudaTokens(TokenExchange):
    """`inboxes` are the addresses at which this rank maps every rank's inbox; `owners` are `tokens.owners_of`, by layer."""

    def __init__(self, device: torch.device, rank: int, at: InboxMap, inboxes: Sequence[int],
                 owners: Sequence[list[list[int]]]):
        self._rank, self._at = rank, at
        self._peers = torch.tensor(inboxes, dtype=torch.int64, device=device)
        self._owners = [torch.tensor(table, dtype=torch.int32, device=device) for table in owners]
        self._control = torch.zeros(2 + 2 * at.size, dtype=torch.int64, device=device)
        self._failed = torch.zeros(1, dtype=torch.int32, device=device)
        self._staged = torch.zeros(RING, 2 + 2 * at.size, dtype=torch.int64, pin_memory=True)
        self._error = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._rows = list(zip(self._staged, self._staged.numpy(), strict=True))  # numpy's views cost the host least
        self._error_word = self._error.numpy()
        self._turn = 0
        self.begin(alone(rank, at.size, at.rows))  # of forwards outside of steps

    def begin(self, layout: RoundLayout) -> None:
        staged, words = self._rows[self._turn % RING]
        self._turn += 1
        words[:] = (layout.number * len(self._owners) + 1, layout.mask, *layout.tokens, *layout.starts)
        self._control.copy_(staged, non_blocking=True)

    def dispatch(
        self, layer: int, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        at, (num_rows, width), top_k = self._at, hidden.shape, ids.shape[1]
        gathered, new_ids, new_weights = hidden.new_empty(rows, width), ids.new_empty(rows, top_k), weights.new_empty(rows, top_k)
        assert ids.is_contiguous() and weights.is_contiguous() and hidden.stride(1) == 1
        owners = self._owners[layer]
        dispatch_rows[self._programs(rows),](
            hidden, ids, weights, gathered, new_ids, new_weights, self._control, self._peers, owners, self._failed,
            self._error.data_ptr(), layer, num_rows, rows, hidden.stride(0), E=owners.shape[1], ME=self._rank, N=at.size,
            ROWS=at.rows, STAMPED=at.stamped, H=width, K=top_k, BLOCK_H=triton.next_power_of_2(width),
            BLOCK_K=triton.next_power_of_2(top_k), R=self._tile(rows, width), AT_IDS=at.ids, AT_WEIGHTS=at.weights,
            AT_HIDDEN=at.hiddens, AT_STAMPED=at.stamped_hiddens, AT_CHOICES=at.stamped_choices, LANES=LANES,
            LIMIT_NS=int(WAIT_S * 1e9), num_warps=WARPS,
        )
        return gathered, new_weights, new_ids

    def combine(self, layer: int, partial: torch.Tensor, num_rows: int) -> torch.Tensor:
        at, width = self._at, partial.shape[1]
        out = partial.new_empty(num_rows, width)
        combine_sums[self._programs(partial.shape[0]),](
            partial, out, self._control, self._peers, self._failed, self._error.data_ptr(), layer, num_rows,
            partial.stride(0), ME=self._rank, N=at.size, ROWS=at.rows, STAMPED=at.stamped, H=width,
            BLOCK_H=triton.next_power_of_2(width), R=self._tile(partial.shape[0], width), AT_SUMS=at.sums,
            AT_STAMPED=at.stamped_sums, LANES=LANES, LIMIT_NS=int(WAIT_S * 1e9), num_warps=WARPS,
        )
        return out

    @staticmethod
    def _programs(num_rows: int) -> int:
        return max(min(num_rows // 2, LANES), 1)

    def _tile(self, rows: int, width: int) -> int:
        """Rows that go to a lane at once, which all members must have alike: of few, graphs may have more than agreed."""
        return 1 if rows <= FEW * self._at.size else max(TILE // triton.next_power_of_2(width), 1)

    def check(self) -> None:
        if whom := self._error_word[0]:
            raise did_not_come(int(whom) - 1)

    def close(self) -> None:
        torch.cuda.synchronize(self._control.device)
