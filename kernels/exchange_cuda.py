"""The two Triton kernels of a dispatched layer: they write to peers' inboxes and wait for what peers write into this one's.

Who takes part, how many rows each rank has and the round's number are read from `control`, int64 [2 + 2 * size] of device
memory: the first layer's epoch, the members' mask, every rank's rows and where they begin. So one CUDA graph serves a step
alone and a dispatched one. Rows that a sender has few of travel as stamped words, others behind flags (`tokens`).
"""

import triton
import triton.language as tl

from vllm_dwdp.kernels.arrivals_cuda import THREADS, raise_flag, settle, stamped, wait_for_flag, wait_for_words


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
def _rows(address, first, stride, BLOCK_H: tl.constexpr, R: tl.constexpr):
    """Pointers to R rows from `first` on, [R, BLOCK_H]."""
    return address + (first + tl.arange(0, R)[:, None]) * stride + tl.arange(0, BLOCK_H)[None, :]


@triton.jit
def _inside(first, rows, H: tl.constexpr, BLOCK_H: tl.constexpr, R: tl.constexpr):
    """Which of R rows from `first` on are below `rows`, and which of their places are numbers."""
    return ((first + tl.arange(0, R)) < rows)[:, None] & (tl.arange(0, BLOCK_H) < H)[None, :]


@triton.jit
def _word(address, row, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """Pointers to the words of one row of W, [BLOCK_W]."""
    return address + row * W + tl.arange(0, BLOCK_W)


@triton.jit
def _choice(address, row, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Pointers to a row's ids and weights, [BLOCK_K, 2]."""
    return address + row * 2 * K + tl.arange(0, BLOCK_K)[:, None] * 2 + tl.arange(0, 2)[None, :]


@triton.jit
def _numbers(words, dtype: tl.constexpr):
    """float32: the numbers of `dtype` that lie in int32 words, one or two in each."""
    if dtype.primitive_bitwidth == 32:
        numbers = words.to(dtype, bitcast=True)
    else:
        numbers = tl.interleave(words.to(tl.int16).to(dtype, bitcast=True), (words >> 16).to(tl.int16).to(dtype, bitcast=True))
    return numbers.to(tl.float32)


@triton.jit
def _routed(e, w, is_k, owners, ME: tl.constexpr, IS_OWN: tl.constexpr):
    """The ids and weights that this rank computes; -1 and 0 for those of another member."""
    owner = tl.load(owners + e, mask=is_k & (e >= 0), other=-2)
    is_mine = owner == ME
    if IS_OWN:
        is_mine = is_mine | (owner == -1)
    return tl.where(is_mine, e, -1), tl.where(is_mine, w, 0.0)


@triton.jit(do_not_specialize=["layer", "num_rows", "rows"])
def dispatch_rows(hidden, ids, weights, out_hidden, out_ids, out_weights, control, peers, owners, failed, error,
                  layer, num_rows, rows, stride_hidden, E: tl.constexpr, ME: tl.constexpr, N: tl.constexpr, STAMPED: tl.constexpr,
                  SEAT_H: tl.constexpr, SEAT_K: tl.constexpr, SEAT_W: tl.constexpr, SEAT_C: tl.constexpr, H: tl.constexpr,
                  K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, R: tl.constexpr, AT_IDS: tl.constexpr,
                  AT_WEIGHTS: tl.constexpr, AT_HIDDEN: tl.constexpr, AT_STAMPED: tl.constexpr, AT_CHOICES: tl.constexpr,
                  LANES: tl.constexpr, LIMIT_NS: tl.constexpr):
    """Push own rows, `num_rows` at most, to every member; then gather own ones and theirs into `out_*`, with empty ones up to `rows`."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    dtype: tl.constexpr = hidden.dtype.element_ty
    W: tl.constexpr = H * dtype.primitive_bitwidth // 32
    BLOCK_W: tl.constexpr = BLOCK_H * dtype.primitive_bitwidth // 32
    BLOCK_C: tl.constexpr = max(BLOCK_K, THREADS // 2)  # a word for each thread
    is_word, place = tl.arange(0, BLOCK_W) < W, tl.arange(0, BLOCK_C)
    is_place = place < K
    is_choice = is_place[:, None] & (tl.arange(0, 2) < 2)[None, :]
    epoch, mask = tl.load(control) + layer, tl.load(control + 1)
    owners = owners + mask * E
    mine = tl.minimum(tl.load(control + 2 + ME), num_rows)
    if mask == 1 << ME:
        pass
    elif mine <= STAMPED:
        stride = stride_hidden * dtype.primitive_bitwidth // 32
        for row in range(program, mine, programs):
            x = tl.load(hidden.to(tl.pointer_type(tl.int32)) + row * stride + tl.arange(0, BLOCK_W), mask=is_word)
            e = tl.load(ids + row * K + place, mask=is_place).to(tl.int32)
            w = tl.load(weights + row * K + place, mask=is_place).to(tl.float32)
            choice = tl.join(e, w.to(tl.int32, bitcast=True))
            for peer in tl.static_range(N):
                if peer != ME:
                    if (mask >> peer) & 1 != 0:
                        base, seat = tl.load(peers + peer), _seat(ME, peer)
                        to, chosen = _at(base, AT_STAMPED, tl.int64) + seat * SEAT_W, _at(base, AT_CHOICES, tl.int64) + seat * SEAT_C
                        tl.store(_word(to, row, W, BLOCK_W), stamped(x, epoch), mask=is_word)
                        tl.store(_choice(chosen, row, K, BLOCK_C), stamped(choice, epoch), mask=is_choice)
    else:
        for lane in range(program, _lanes(mine, R, LANES), programs):
            for peer in tl.static_range(N):
                if peer != ME:
                    if (mask >> peer) & 1 != 0:
                        base = tl.load(peers + peer)
                        to_hidden = _at(base, AT_HIDDEN, dtype) + _seat(ME, peer) * SEAT_H
                        to_ids = _at(base, AT_IDS, tl.int32) + _seat(ME, peer) * SEAT_K
                        to_weights = _at(base, AT_WEIGHTS, tl.float32) + _seat(ME, peer) * SEAT_K
                        for row in range(lane * R, mine, LANES * R):
                            is_h, is_k = _inside(row, mine, H, BLOCK_H, R), _inside(row, mine, K, BLOCK_K, R)
                            x = tl.load(_rows(hidden, row, stride_hidden, BLOCK_H, R), mask=is_h)
                            e = tl.load(_rows(ids, row, K, BLOCK_K, R), mask=is_k).to(tl.int32)
                            w = tl.load(_rows(weights, row, K, BLOCK_K, R), mask=is_k).to(tl.float32)
                            tl.store(_rows(to_hidden, row, H, BLOCK_H, R), x, mask=is_h)
                            tl.store(_rows(to_ids, row, K, BLOCK_K, R), e, mask=is_k)
                            tl.store(_rows(to_weights, row, K, BLOCK_K, R), w, mask=is_k)
            settle()
            for peer in tl.static_range(N):
                if peer != ME:
                    if (mask >> peer) & 1 != 0:
                        raise_flag(_flag(tl.load(peers + peer), 0, ME, lane, N, LANES), epoch)
    here, filled = tl.load(peers + ME), mine * 0
    for turn in tl.static_range(N):  # own rows are gathered while those of others are under way
        sender = (ME + turn) % N
        count = tl.load(control + 2 + sender)
        if turn == 0:
            count = mine
        if (mask >> sender) & 1 == 0:
            count = count * 0
        filled, begin = filled + count, tl.load(control + 2 + N + sender)
        lanes = _lanes(count, R, LANES)
        if turn > 0:
            if count <= STAMPED:
                lanes = lanes * 0
                came = _at(here, AT_STAMPED, tl.int64) + _seat(sender, ME) * SEAT_W
                chosen = _at(here, AT_CHOICES, tl.int64) + _seat(sender, ME) * SEAT_C
                for row in range(program, count, programs):
                    x = wait_for_words(_word(came, row, W, BLOCK_W), is_word, epoch, sender, failed, error, LIMIT_NS)
                    choice = wait_for_words(_choice(chosen, row, K, BLOCK_C), is_choice, epoch, sender, failed, error, LIMIT_NS)
                    e, w = tl.split(choice)
                    e, w = _routed(e, w.to(tl.float32, bitcast=True), is_place, owners, ME, False)
                    tl.store(_word(out_hidden.to(tl.pointer_type(tl.int32)), begin + row, W, BLOCK_W), x, mask=is_word)
                    tl.store(out_ids + (begin + row) * K + place, e.to(out_ids.dtype.element_ty), mask=is_place)
                    tl.store(out_weights + (begin + row) * K + place, w.to(out_weights.dtype.element_ty), mask=is_place)
        for lane in range(program, lanes, programs):
            if turn > 0:
                wait_for_flag(_flag(here, 0, sender, lane, N, LANES), epoch, sender, failed, error, LIMIT_NS)
            for row in range(lane * R, count, LANES * R):
                is_h, is_k = _inside(row, count, H, BLOCK_H, R), _inside(row, count, K, BLOCK_K, R)
                if turn == 0:
                    e = tl.load(_rows(ids, row, K, BLOCK_K, R), mask=is_k, other=-1).to(tl.int32)
                    w = tl.load(_rows(weights, row, K, BLOCK_K, R), mask=is_k, other=0.0).to(tl.float32)
                    x = tl.load(_rows(hidden, row, stride_hidden, BLOCK_H, R), mask=is_h, other=0.0)
                else:
                    from_ids = _rows(_at(here, AT_IDS, tl.int32) + _seat(sender, ME) * SEAT_K, row, K, BLOCK_K, R)
                    from_weights = _rows(_at(here, AT_WEIGHTS, tl.float32) + _seat(sender, ME) * SEAT_K, row, K, BLOCK_K, R)
                    from_hidden = _rows(_at(here, AT_HIDDEN, dtype) + _seat(sender, ME) * SEAT_H, row, H, BLOCK_H, R)
                    e = tl.load(from_ids, mask=is_k, other=-1, cache_modifier=".cg")
                    w = tl.load(from_weights, mask=is_k, other=0.0, cache_modifier=".cg")
                    x = tl.load(from_hidden, mask=is_h, other=0.0, cache_modifier=".cg")
                e, w = _routed(e, w, is_k, owners, ME, turn == 0)
                tl.store(_rows(out_hidden, begin + row, H, BLOCK_H, R), x, mask=is_h)
                tl.store(_rows(out_ids, begin + row, K, BLOCK_K, R), e.to(out_ids.dtype.element_ty), mask=is_k)
                tl.store(_rows(out_weights, begin + row, K, BLOCK_K, R), w.to(out_weights.dtype.element_ty), mask=is_k)
    for row in range(filled + program * R, rows, programs * R):  # empty ones, which no expert computes
        is_h, is_k = _inside(row, rows, H, BLOCK_H, R), _inside(row, rows, K, BLOCK_K, R)
        tl.store(_rows(out_hidden, row, H, BLOCK_H, R), tl.zeros([R, BLOCK_H], dtype), mask=is_h)
        tl.store(_rows(out_ids, row, K, BLOCK_K, R), tl.full([R, BLOCK_K], -1, out_ids.dtype.element_ty), mask=is_k)
        tl.store(_rows(out_weights, row, K, BLOCK_K, R), tl.zeros([R, BLOCK_K], out_weights.dtype.element_ty), mask=is_k)


@triton.jit(do_not_specialize=["layer", "num_rows"])
def combine_sums(partial, out, control, peers, failed, error, layer, num_rows, stride_partial, ME: tl.constexpr, N: tl.constexpr,
                 STAMPED: tl.constexpr, SEAT_H: tl.constexpr, SEAT_W: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
                 R: tl.constexpr, AT_SUMS: tl.constexpr, AT_STAMPED: tl.constexpr, LANES: tl.constexpr, LIMIT_NS: tl.constexpr):
    """Push back every member's rows of `partial`; then add own ones and those that come, in rank order, into `out`, `num_rows` rows."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    dtype: tl.constexpr = partial.dtype.element_ty
    W: tl.constexpr = H * dtype.primitive_bitwidth // 32
    BLOCK_W: tl.constexpr = BLOCK_H * dtype.primitive_bitwidth // 32
    is_word = tl.arange(0, BLOCK_W) < W
    epoch, mask = tl.load(control) + layer, tl.load(control + 1)
    told = tl.where(tl.load(failed) == 0, epoch, 0)  # what is computed from rows that did not come is nobody's sum
    for peer in tl.static_range(N):
        if peer != ME:
            if (mask >> peer) & 1 != 0:
                begin, theirs = tl.load(control + 2 + N + peer), tl.load(control + 2 + peer)
                base = tl.load(peers + peer)
                if theirs <= STAMPED:
                    stride = stride_partial * dtype.primitive_bitwidth // 32
                    stamps = _at(base, AT_STAMPED, tl.int64) + _seat(ME, peer) * SEAT_W
                    for row in range(program, theirs, programs):
                        x = tl.load(partial.to(tl.pointer_type(tl.int32)) + (begin + row) * stride + tl.arange(0, BLOCK_W), mask=is_word)
                        tl.store(_word(stamps, row, W, BLOCK_W), stamped(x, told), mask=is_word)
                else:
                    to = _at(base, AT_SUMS, dtype) + _seat(ME, peer) * SEAT_H
                    for lane in range(program, _lanes(theirs, R, LANES), programs):
                        for row in range(lane * R, theirs, LANES * R):
                            is_h = _inside(row, theirs, H, BLOCK_H, R)
                            x = tl.load(_rows(partial, begin + row, stride_partial, BLOCK_H, R), mask=is_h)
                            tl.store(_rows(to, row, H, BLOCK_H, R), x, mask=is_h)
                        settle()
                        raise_flag(_flag(base, 1, ME, lane, N, LANES), told)
    begin = tl.load(control + 2 + N + ME)
    mine = tl.minimum(tl.load(control + 2 + ME), num_rows)
    base = tl.load(peers + ME)
    if mine <= STAMPED:
        is_number = tl.arange(0, BLOCK_H) < H
        for row in range(program, num_rows, programs):
            total = tl.zeros([BLOCK_H], tl.float32)
            if row < mine:
                for rank in tl.static_range(N):
                    if rank == ME:
                        own = partial + (begin + row) * stride_partial + tl.arange(0, BLOCK_H)
                        total += tl.load(own, mask=is_number, other=0.0).to(tl.float32)
                    elif (mask >> rank) & 1 != 0:
                        at = _word(_at(base, AT_STAMPED, tl.int64) + _seat(rank, ME) * SEAT_W, row, W, BLOCK_W)
                        total += _numbers(wait_for_words(at, is_word, epoch, rank, failed, error, LIMIT_NS), dtype)
            tl.store(out + row * H + tl.arange(0, BLOCK_H), total.to(dtype), mask=is_number)
    else:
        here = _at(base, AT_SUMS, dtype)
        for lane in range(program, _lanes(num_rows, R, LANES), programs):
            if lane * R < mine:
                for peer in tl.static_range(N):
                    if peer != ME:
                        if (mask >> peer) & 1 != 0:
                            wait_for_flag(_flag(base, 1, peer, lane, N, LANES), epoch, peer, failed, error, LIMIT_NS)
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
                        sums = _rows(here + _seat(rank, ME) * SEAT_H, row, H, BLOCK_H, R)
                        total += tl.load(sums, mask=came, other=0.0, cache_modifier=".cg").to(tl.float32)
                tl.store(_rows(out, row, H, BLOCK_H, R), total.to(dtype), mask=is_h)
