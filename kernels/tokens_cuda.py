"""The token exchange of NVIDIA GPUs: two Triton kernels a layer that write to peers' memory and meet by flags there.

Both can be captured in a CUDA graph: who takes part, how many rows each rank has and the round's number are read from
device memory, so one graph serves a step alone and a dispatched one.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from vllm_dwdp.kernels.tokens import FEW, LANES, WAIT_S, InboxMap, RoundLayout, TokenExchange, alone, did_not_come

RING = 16  # steps whose control words may be under way at once
WARPS = 8
THREADS = tl.constexpr(32 * WARPS)
TILE = 8192  # numbers that a program moves at once where rows are many: 16 KB in flight on every SM


@triton.jit
def _at(address, offset: tl.constexpr, dtype: tl.constexpr):
    """A pointer into an inbox, whose areas are aligned."""
    return tl.multiple_of((address + offset).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _seat(sender, receiver):
    """`tokens.seat`, int64: what lies before it may be more than 2 GiB."""
    return tl.cast(sender - (sender > receiver) * 1, tl.int64)


@triton.jit
def _lanes(rows, R: tl.constexpr, LANES: tl.constexpr):
    """How many lanes have some of `rows`: R at a time go to one after the other."""
    return tl.minimum(tl.cdiv(rows, R), LANES)


@triton.jit
def _flag(inbox, phase, sender, lane, N: tl.constexpr, LANES: tl.constexpr):
    return inbox.to(tl.pointer_type(tl.int64)) + (phase * N + sender) * LANES + lane


@triton.jit
def _wait(flag, epoch, peer, failed, error, LIMIT_NS: tl.constexpr):
    """Wait until a peer's lane has pushed the rows that this program reads next.

    Once a wait has ended in vain none waits any more: the host learns of it by `error` and stops.
    """
    deadline = globaltimer() + LIMIT_NS
    if tl.load(failed) != 0:
        deadline = deadline - LIMIT_NS
    waiting = tl.atomic_add(flag, 0, sem="acquire", scope="sys") != epoch
    while waiting:
        waiting = tl.atomic_add(flag, 0, sem="acquire", scope="sys") != epoch
        if globaltimer() > deadline:
            waiting = False
            tl.store(failed, 1)
            tl.atomic_cas(error.to(tl.pointer_type(tl.int32)), 0, peer + 1, sem="relaxed", scope="sys")
    tl.debug_barrier()


@triton.jit
def _settle():
    """All that this program has stored is at the peers when this ends: every thread waits for its own stores.

    One thread's release, after a barrier, should cover those of all. On two H100s that other processes use, too, its flag came
    before some 128 to 512 bytes that other warps had stored last.
    """
    tl.inline_asm_elementwise("fence.acq_rel.sys; mov.u32 $0, $1;", "=r,r", [tl.arange(0, THREADS)], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def _rows(address, first, stride, BLOCK_H: tl.constexpr, R: tl.constexpr):
    """Pointers to R rows from `first` on, [R, BLOCK_H]."""
    return address + (first + tl.arange(0, R)[:, None]) * stride + tl.arange(0, BLOCK_H)[None, :]


@triton.jit
def _inside(first, rows, H: tl.constexpr, BLOCK_H: tl.constexpr, R: tl.constexpr):
    """Which of R rows from `first` on are below `rows`, and which of their places are numbers."""
    return ((first + tl.arange(0, R)) < rows)[:, None] & (tl.arange(0, BLOCK_H) < H)[None, :]


@triton.jit(do_not_specialize=["layer", "num_rows", "rows"])
def _dispatch(hidden, ids, weights, out_hidden, out_ids, out_weights, control, peers, owners, failed, error,
              layer, num_rows, rows, stride_hidden, E: tl.constexpr, ME: tl.constexpr, N: tl.constexpr,
              ROWS: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
              R: tl.constexpr, AT_IDS: tl.constexpr, AT_WEIGHTS: tl.constexpr, AT_HIDDEN: tl.constexpr,
              LANES: tl.constexpr, LIMIT_NS: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    dtype: tl.constexpr = hidden.dtype.element_ty
    epoch, mask = tl.load(control) + layer, tl.load(control + 1)
    mine = tl.minimum(tl.load(control + 2 + ME), num_rows)
    for lane in range(program, _lanes(mine, R, LANES), programs):
        for peer in tl.static_range(N):
            if peer != ME:
                if (mask >> peer) & 1 != 0:
                    base = tl.load(peers + peer)
                    first = _seat(ME, peer) * ROWS
                    to_hidden = _at(base, AT_HIDDEN, dtype) + first * H
                    to_ids = _at(base, AT_IDS, tl.int32) + first * K
                    to_weights = _at(base, AT_WEIGHTS, tl.float32) + first * K
                    for row in range(lane * R, mine, LANES * R):
                        is_h, is_k = _inside(row, mine, H, BLOCK_H, R), _inside(row, mine, K, BLOCK_K, R)
                        x = tl.load(_rows(hidden, row, stride_hidden, BLOCK_H, R), mask=is_h)
                        e = tl.load(_rows(ids, row, K, BLOCK_K, R), mask=is_k).to(tl.int32)
                        w = tl.load(_rows(weights, row, K, BLOCK_K, R), mask=is_k).to(tl.float32)
                        tl.store(_rows(to_hidden, row, H, BLOCK_H, R), x, mask=is_h)
                        tl.store(_rows(to_ids, row, K, BLOCK_K, R), e, mask=is_k)
                        tl.store(_rows(to_weights, row, K, BLOCK_K, R), w, mask=is_k)
        _settle()
        for peer in tl.static_range(N):
            if peer != ME:
                if (mask >> peer) & 1 != 0:
                    flag = _flag(tl.load(peers + peer), 0, ME, lane, N, LANES)
                    tl.atomic_xchg(flag, epoch, sem="release", scope="sys")
    here, filled = tl.load(peers + ME), mine * 0
    for turn in tl.static_range(N):  # own rows are gathered while those of others are under way
        sender = (ME + turn) % N
        count = tl.load(control + 2 + sender)
        if turn == 0:
            count = mine
        if (mask >> sender) & 1 == 0:
            count = count * 0
        filled, begin = filled + count, tl.load(control + 2 + N + sender)
        for lane in range(program, _lanes(count, R, LANES), programs):
            if turn > 0:
                _wait(_flag(here, 0, sender, lane, N, LANES), epoch, sender, failed, error, LIMIT_NS)
            for row in range(lane * R, count, LANES * R):
                is_h, is_k = _inside(row, count, H, BLOCK_H, R), _inside(row, count, K, BLOCK_K, R)
                if turn == 0:
                    e = tl.load(_rows(ids, row, K, BLOCK_K, R), mask=is_k, other=-1).to(tl.int32)
                    w = tl.load(_rows(weights, row, K, BLOCK_K, R), mask=is_k, other=0.0).to(tl.float32)
                    x = tl.load(_rows(hidden, row, stride_hidden, BLOCK_H, R), mask=is_h, other=0.0)
                else:
                    first = _seat(sender, ME) * ROWS
                    from_ids = _rows(_at(here, AT_IDS, tl.int32) + first * K, row, K, BLOCK_K, R)
                    from_weights = _rows(_at(here, AT_WEIGHTS, tl.float32) + first * K, row, K, BLOCK_K, R)
                    from_hidden = _rows(_at(here, AT_HIDDEN, dtype) + first * H, row, H, BLOCK_H, R)
                    e = tl.load(from_ids, mask=is_k, other=-1, cache_modifier=".cg")
                    w = tl.load(from_weights, mask=is_k, other=0.0, cache_modifier=".cg")
                    x = tl.load(from_hidden, mask=is_h, other=0.0, cache_modifier=".cg")
                owner = tl.load(owners + mask * E + e, mask=is_k & (e >= 0), other=-2)
                is_mine = owner == ME
                if turn == 0:
                    is_mine = is_mine | (owner == -1)
                e, w = tl.where(is_mine, e, -1), tl.where(is_mine, w, 0.0)
                tl.store(_rows(out_hidden, begin + row, H, BLOCK_H, R), x, mask=is_h)
                tl.store(_rows(out_ids, begin + row, K, BLOCK_K, R), e.to(out_ids.dtype.element_ty), mask=is_k)
                tl.store(_rows(out_weights, begin + row, K, BLOCK_K, R), w.to(out_weights.dtype.element_ty), mask=is_k)
    for row in range(filled + program * R, rows, programs * R):  # empty ones, which no expert computes
        is_h, is_k = _inside(row, rows, H, BLOCK_H, R), _inside(row, rows, K, BLOCK_K, R)
        tl.store(_rows(out_hidden, row, H, BLOCK_H, R), tl.zeros([R, BLOCK_H], dtype), mask=is_h)
        tl.store(_rows(out_ids, row, K, BLOCK_K, R), tl.full([R, BLOCK_K], -1, out_ids.dtype.element_ty), mask=is_k)
        tl.store(_rows(out_weights, row, K, BLOCK_K, R), tl.zeros([R, BLOCK_K], out_weights.dtype.element_ty), mask=is_k)


@triton.jit(do_not_specialize=["layer", "num_rows"])
def _combine(partial, out, control, peers, failed, error, layer, num_rows, stride_partial,
             ME: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
             R: tl.constexpr, AT_SUMS: tl.constexpr, LANES: tl.constexpr, LIMIT_NS: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    dtype: tl.constexpr = partial.dtype.element_ty
    epoch, mask = tl.load(control) + layer, tl.load(control + 1)
    for peer in tl.static_range(N):
        if peer != ME:
            if (mask >> peer) & 1 != 0:
                begin, theirs = tl.load(control + 2 + N + peer), tl.load(control + 2 + peer)
                base = tl.load(peers + peer)
                to = _at(base, AT_SUMS, dtype) + _seat(ME, peer) * ROWS * H
                for lane in range(program, _lanes(theirs, R, LANES), programs):
                    for row in range(lane * R, theirs, LANES * R):
                        is_h = _inside(row, theirs, H, BLOCK_H, R)
                        x = tl.load(_rows(partial, begin + row, stride_partial, BLOCK_H, R), mask=is_h)
                        tl.store(_rows(to, row, H, BLOCK_H, R), x, mask=is_h)
                    _settle()
                    tl.atomic_xchg(_flag(base, 1, ME, lane, N, LANES), epoch, sem="release", scope="sys")
    begin = tl.load(control + 2 + N + ME)
    mine = tl.minimum(tl.load(control + 2 + ME), num_rows)
    base = tl.load(peers + ME)
    here = _at(base, AT_SUMS, dtype)
    for lane in range(program, _lanes(num_rows, R, LANES), programs):
        if lane * R < mine:
            for peer in tl.static_range(N):
                if peer != ME:
                    if (mask >> peer) & 1 != 0:
                        _wait(_flag(base, 1, peer, lane, N, LANES), epoch, peer, failed, error, LIMIT_NS)
        for row in range(lane * R, num_rows, LANES * R):
            is_h = _inside(row, num_rows, H, BLOCK_H, R)
            has_h = is_h & _inside(row, mine, H, BLOCK_H, R)
            total = tl.zeros([R, BLOCK_H], tl.float32)
            for rank in tl.static_range(N):
                if rank == ME:
                    sums = _rows(partial, begin + row, stride_partial, BLOCK_H, R)
                    total += tl.load(sums, mask=has_h, other=0.0).to(tl.float32)
                else:
                    came = has_h & (((mask >> rank) & 1) != 0)
                    sums = _rows(here + _seat(rank, ME) * ROWS * H, row, H, BLOCK_H, R)
                    total += tl.load(sums, mask=came, other=0.0, cache_modifier=".cg").to(tl.float32)
            tl.store(_rows(out, row, H, BLOCK_H, R), total.to(dtype), mask=is_h)


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
        _dispatch[self._programs(rows),](
            hidden, ids, weights, gathered, new_ids, new_weights, self._control, self._peers, owners, self._failed,
            self._error.data_ptr(), layer, num_rows, rows, hidden.stride(0), E=owners.shape[1], ME=self._rank, N=at.size,
            ROWS=at.rows, H=width, K=top_k, BLOCK_H=triton.next_power_of_2(width), BLOCK_K=triton.next_power_of_2(top_k),
            R=self._tile(rows, width), AT_IDS=at.ids, AT_WEIGHTS=at.weights, AT_HIDDEN=at.hiddens, LANES=LANES,
            LIMIT_NS=int(WAIT_S * 1e9), num_warps=WARPS,
        )
        return gathered, new_weights, new_ids

    def combine(self, layer: int, partial: torch.Tensor, num_rows: int) -> torch.Tensor:
        at, width = self._at, partial.shape[1]
        out = partial.new_empty(num_rows, width)
        _combine[self._programs(partial.shape[0]),](
            partial, out, self._control, self._peers, self._failed, self._error.data_ptr(), layer, num_rows,
            partial.stride(0), ME=self._rank, N=at.size, ROWS=at.rows, H=width, BLOCK_H=triton.next_power_of_2(width),
            R=self._tile(partial.shape[0], width), AT_SUMS=at.sums, LANES=LANES, LIMIT_NS=int(WAIT_S * 1e9), num_warps=WARPS,
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
