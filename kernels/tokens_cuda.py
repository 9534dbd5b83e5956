"""The token exchange of NVIDIA GPUs: two Triton kernels a layer that write to peers' memory and wait for what peers write.

Both can be captured in a CUDA graph: who takes part, how many rows each rank has and the round's number are read from
device memory, so one graph serves a step alone and a dispatched one.
"""

from collections.abc import Sequence

import torch
import triton

from vllm_dwdp.convoy import Round
from vllm_dwdp.kernels.arrivals_cuda import THREADS, WARPS
from vllm_dwdp.kernels.exchange_cuda import combine_sums, dispatch_rows
from vllm_dwdp.kernels.tokens import FEW, LANES, WAIT_S, InboxMap, TokenExchange, alone, did_not_come

RING = 16  # steps whose control words may be under way at once
REGISTERS = 128  # of a thread at most, so that two programs find room on every SM: a waiting one keeps out none that has to send
WIDE = 32768  # numbers of a row, times ranks: of more, compilers take more registers
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
        self._staged, self._error = self._pinned((RING, 2 + 2 * at.size), torch.int64), self._pinned((1,), torch.int32)
        self._rows = list(zip(self._staged, self._staged.numpy(), strict=True))  # numpy's views cost the host least
        self._error_word = self._error.numpy()
        self._turn = 0
        self._most = self._room(device)
        self.begin(alone(rank, at.size, at.rows))  # of forwards outside of steps

    def begin(self, layout: Round) -> None:
        staged, words = self._rows[self._turn % RING]
        self._turn += 1
        words[:] = (layout.number * len(self._owners) + 1, layout.mask, *layout.tokens, *layout.starts)
        self._control.copy_(staged, non_blocking=True)

    def dispatch(
        self, layer: int, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        at, (num_rows, width), top_k = self._at, hidden.shape, ids.shape[1]
        gathered, new_ids, new_weights = hidden.new_empty(rows, width), ids.new_empty(rows, top_k), weights.new_empty(rows, top_k)
        assert ids.is_contiguous() and weights.is_contiguous() and _has_words(hidden)
        owners, block = self._owners[layer], _block(hidden)
        dispatch_rows[self._programs(rows),](
            hidden, ids, weights, gathered, new_ids, new_weights, self._control, self._peers, owners, self._failed,
            self._error.data_ptr(), layer, num_rows, rows, hidden.stride(0), E=owners.shape[1], ME=self._rank, N=at.size,
            STAMPED=at.stamped, SEAT_H=at.rows * at.row_bytes // hidden.itemsize, SEAT_K=at.rows * at.top_k,
            SEAT_W=at.stamped * at.row_bytes // 4, SEAT_C=at.stamped * at.top_k * 2, H=width, K=top_k, BLOCK_H=block,
            BLOCK_K=triton.next_power_of_2(top_k), R=self._tile(rows, block), AT_IDS=at.ids, AT_WEIGHTS=at.weights,
            AT_HIDDEN=at.hiddens, AT_STAMPED=at.stamped_hiddens, AT_CHOICES=at.stamped_choices, LANES=LANES,
            LIMIT_NS=int(WAIT_S * 1e9), num_warps=WARPS, maxnreg=self._registers(block),
        )
        return gathered, new_weights, new_ids

    def combine(self, layer: int, partial: torch.Tensor, num_rows: int) -> torch.Tensor:
        at, width, block = self._at, partial.shape[1], _block(partial)
        assert _has_words(partial)
        out = partial.new_empty(num_rows, width)
        combine_sums[self._programs(partial.shape[0]),](
            partial, out, self._control, self._peers, self._failed, self._error.data_ptr(), layer, num_rows,
            partial.stride(0), ME=self._rank, N=at.size, STAMPED=at.stamped, SEAT_H=at.rows * at.row_bytes // partial.itemsize,
            SEAT_W=at.stamped * at.row_bytes // 4, H=width, BLOCK_H=block, R=self._tile(partial.shape[0], block),
            AT_SUMS=at.sums, AT_STAMPED=at.stamped_sums, LANES=LANES, LIMIT_NS=int(WAIT_S * 1e9), num_warps=WARPS,
            maxnreg=self._registers(block),
        )
        return out

    @staticmethod
    def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    @staticmethod
    def _room(device: torch.device) -> int:
        """How many programs run at once: every one that waits, and those of the rows that peers wait for."""
        return 2 * torch.cuda.get_device_properties(device).multi_processor_count

    def _programs(self, num_rows: int) -> int:
        return max(min(num_rows // 2, LANES, self._most), 1)

    def _registers(self, block: int) -> int | None:
        return REGISTERS if block * self._at.size > WIDE else None

    def _tile(self, rows: int, block: int) -> int:
        """Rows that go to a lane at once, which all members must have alike: of few, graphs may have more than agreed."""
        return 1 if rows <= FEW * self._at.size else max(TILE // block, 1)

    def check(self) -> None:
        if whom := self._error_word[0]:
            raise did_not_come(int(whom) - 1)

    def close(self) -> None:
        torch.cuda.synchronize(self._control.device)


def _block(numbers: torch.Tensor) -> int:
    """The numbers of a row that a program takes: a power of two, and four bytes for each thread at least."""
    return max(triton.next_power_of_2(numbers.shape[1]), 4 * THREADS.value // numbers.itemsize)


def _has_words(numbers: torch.Tensor) -> bool:
    """Whether every row is whole words of four bytes, one after the other."""
    sizes = (numbers.shape[1] * numbers.itemsize, numbers.stride(0) * numbers.itemsize, numbers.data_ptr())
    return numbers.stride(1) == 1 and not any(size % 4 for size in sizes)
