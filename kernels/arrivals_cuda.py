"""How a kernel knows that what a peer wrote into this GPU's memory is there: flags of lanes, and words that carry the epoch.

A flag is raised after many rows. Of few rows every word says for itself that it is there, which saves the way to the peer and
back that a flag waits for.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

WARPS = 8
THREADS = tl.constexpr(32 * WARPS)


@triton.jit
def _deadline(failed, LIMIT_NS: tl.constexpr):
    """When a wait ends in vain. Once one has, none waits any more: the host learns of it by `error` and stops."""
    deadline = globaltimer() + LIMIT_NS
    if tl.load(failed) != 0:
        deadline = deadline - LIMIT_NS
    return deadline


@triton.jit
def _give_up(peer, failed, error):
    """Who waits in vain first tells the host for whom; of several at the same time, one.

    No atomics: a GPU need not have them on the host's memory, and what they return has barriers, where threads may be apart.
    """
    is_first = tl.load(failed, volatile=True) == 0
    tl.store(error.to(tl.pointer_type(tl.int32)), peer + 1, mask=is_first)
    tl.store(failed, 1)


@triton.jit
def settle():
    """All that this program has stored is at the peers when this ends: every thread waits for its own stores.

    The release of one thread, after a barrier, should cover the stores of all. On two H100s that other processes used, too, its
    flag came before some 128 to 512 bytes that other warps had stored last. The first barrier is for that rule of CUDA's
    memory model: the thread that raises flags has its fence after all stores.
    """
    tl.debug_barrier()
    tl.inline_asm_elementwise("fence.acq_rel.sys; mov.u32 $0, $1;", "=r,r", [tl.arange(0, THREADS)], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def raise_flag(flag, epoch):
    """Tell a peer that what has settled is there."""
    tl.atomic_xchg(flag, epoch, sem="relaxed", scope="sys")


@triton.jit
def wait_for_flag(flag, epoch, peer, failed, error, LIMIT_NS: tl.constexpr):
    """Wait until a peer's lane has pushed the rows that this program reads next."""
    deadline = _deadline(failed, LIMIT_NS)
    waiting = tl.atomic_add(flag, 0, sem="acquire", scope="sys") != epoch
    while waiting:
        waiting = tl.atomic_add(flag, 0, sem="acquire", scope="sys") != epoch
        if globaltimer() > deadline:
            waiting = False
            _give_up(peer, failed, error)
    tl.debug_barrier()


@triton.jit
def stamped(words, epoch):
    """int64: each of `words`, 4 bytes, and the lower half of `epoch` above it, which travel as aligned pieces of 8 bytes."""
    return (words.to(tl.int64) & 0xFFFFFFFF) | (epoch << 32)


@triton.jit
def _is_other(words, epoch):
    """Whether each of `words` has another stamp than `epoch`; of two dimensions, their maximum is that of a flat tensor."""
    return tl.ravel((words >> 32) != (epoch << 32 >> 32)).to(tl.int32)


@triton.jit
def wait_for_words(at, mask, epoch, peer, failed, error, LIMIT_NS: tl.constexpr):
    """The int32 words that a peer has stamped with `epoch` at `at`, once all of them are there; 0 where `mask` is false.

    No fewer than threads: of a smaller tensor several threads have a copy of each word, which they would not load at the same time,
    and only some copies are asked whether they are there.
    """
    tl.static_assert(at.numel >= THREADS)
    deadline = _deadline(failed, LIMIT_NS)
    words = tl.load(at, mask=mask, other=epoch << 32, volatile=True)
    missing = tl.max(_is_other(words, epoch), 0)
    while missing == 1:
        words = tl.load(at, mask=mask, other=epoch << 32, volatile=True)
        late = (globaltimer() > deadline).to(tl.int32)
        missing = tl.max(_is_other(words, epoch) * (1 + late), 0)
        if missing == 2:
            _give_up(peer, failed, error)
    return words.to(tl.int32)
