"""Meeting: the page of shared memory on which the ranks of one host keep the convoy's record.

A lock of the page's first byte, taken for tens of microseconds, makes changes one at a time; the kernel frees it when its holder
dies. A record is written beside the old one, then the page's first word is moved on to it. A rank holds the lock of a byte of its
own for life: that is how peers see that it lives. A holder that is stopped with the lock is not waited for beyond LOCK_TIMEOUT_S:
the page is sealed, which the kernel does before or after the holder's last word, never during it; what it then says stands, every
round that is owed is launched, and all ranks go alone from then on.
"""

import contextlib
import fcntl
import functools
import logging
import math
import mmap
import os
import struct
import time
import weakref
from collections.abc import Callable

from vllm_dwdp import convoy
from vllm_dwdp.convoy import Answer, Record, Round, State
from vllm_dwdp.counters import Stats
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.records import Format

logger = logging.getLogger("vllm.dwdp.meeting")

LOCK_TIMEOUT_S = 1.0
WORK_S = 60.0  # how long a step waits for its own device, before it goes alone or counts its patience
_LOOK_S, _REST_S, _CHECK_S = 20e-6, 2e-3, 2e-3  # between looks: at least, at most; between checks that peers live
_HOT_S, _WARM_S = 1.0, 1e-4  # for so long after work an idle rank looks at least so often
_SPIN_S = 200e-6  # a holder's change takes less, unless it has lost its core; so does a peer's next step, as a rule
_SEAL = 0x0010  # F_SEAL_FUTURE_WRITE: every later write to the file fails
# offsets: changes so far; how often the lock was taken, times ranks, plus its last holder; ranks; two records; then by rank
# the microsecond when its large steps end
_WORD, _HOLDER, _SIZE, _RECORDS = 0, 8, 16, 64
_NEVER_S = 1e12


class Meeting:
    """One rank's place in the convoy; for one thread. A rank launches the Round that it is given before it calls again."""

    def __init__(self, fd: int, rank: int, size: int):
        """`fd` is a page made by `create(size)`, here or in a peer; it stays the caller's. DWDPError if another has the place."""
        self.rank, self.size, self.stats = rank, size, Stats([0] * size)
        self._format = Format(size)
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)  # a description of its own: locks belong to it
        self._close = weakref.finalize(self, os.close, self._fd)
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)  # of the caller's: a mapping would keep the locks of ours in a child
        self._words = memoryview(self._map).cast("q")
        self._final: Record | None = None  # once the page is sealed
        self._seen, self._last = -1, time.monotonic()
        self._began = 0.0  # since when this rank has waited at a loss
        self._end_s = 0.0  # when this rank's large steps are expected to have ended
        self._overdue: dict[int, int] = {}  # by rank: the end of a large step that was waited for in vain
        if (found := self._words[_SIZE // 8]) != size:
            raise DWDPError(f"the convoy's page is for {found} ranks, data_parallel_size={size}: use one size on all ranks")
        if not self._lock(1 + rank):
            raise DWDPError(f"rank {rank} is in the convoy already: give each rank of the host a number of its own")
        os.register_at_fork(after_in_child=self._close)  # a child would keep the place
        self._change(lambda record: convoy.come(record, rank))

    def join(
        self, num_tokens: int, patience_s: float, end_s: float = 0.0, is_at_work: Callable[[], bool] = lambda: False,
        goes_along: bool = False,
    ) -> Round | None:
        """Before a small step: the round that takes it; None: go alone. A helper's round has no tokens of its own: launch it, join again.

        Peers are waited for while this rank's device `is_at_work`, which costs nothing, and for `patience_s` after that; the end
        of a large step for `end_s`, if that is more, and only where it is expected by then. `goes_along`: convoy.join's.
        """
        soon = self._within(end_s := max(end_s, patience_s))
        rule = functools.partial(convoy.join, rank=self.rank, tokens=num_tokens, alive=self.is_alive, ends_soon=soon, goes_along=goes_along)

        def give_up(record: Record) -> convoy.Outcome:
            return self._give_up(record, soon, blame=patience_s > 0)

        answer = self._wait(rule, give_up, lambda: patience_s if State.BUSY in self._states() else end_s, is_at_work)
        self.stats.alone += answer is convoy.GO
        return self._count(answer)

    def large(
        self, takes_s: float = math.inf, num_tokens: int = 0, patience_s: float = 0.0,
        is_at_work: Callable[[], bool] = lambda: False, goes_along: bool = False,
    ) -> Round | None:
        """Before a step that the device is expected to end in `takes_s` alone: None, launch it; a Round: launch that, call again.

        Not again after a Round of this rank's `num_tokens`, in which all other ranks take part: it takes the step. For them it is
        waited as in `join`; 0 offers nothing. `goes_along`: convoy.large's.
        """
        self._end_s = time.monotonic() + takes_s
        self._tell_end(self._end_s)  # before peers see that the step is large
        ends_soon = self._within(patience_s)

        def offer(record: Record, offered: int = num_tokens) -> convoy.Outcome:
            return convoy.large(record, self.rank, offered, self.is_alive, ends_soon, goes_along)

        def give_up(record: Record) -> convoy.Outcome:
            after, answer = convoy.give_up(record, self.rank) if patience_s else (record, convoy.GO)
            return offer(after, 0) if answer is convoy.GO else (after, answer)

        return self._count(self._wait(offer, give_up, lambda: patience_s, is_at_work))

    def _wait(
        self, rule: Callable[[Record], convoy.Outcome], give_up: Callable[[Record], convoy.Outcome], bound_s: Callable[[], float],
        is_at_work: Callable[[], bool],
    ) -> Round | Answer:
        """Apply a rule until it does not say WAIT, or give up `bound_s()` after the device was last at work."""
        entered = looked = self._began = time.monotonic()
        answer = self._change(rule)
        while answer is convoy.WAIT:
            now, most_s = time.monotonic(), bound_s()
            if is_free := now - entered < WORK_S and is_at_work():
                self._began = now
            if not is_free and now - self._began >= most_s:
                answer = self._change(give_up)
            elif self._words[0] != self._seen or now - looked > _CHECK_S:
                looked, answer = now, self._change(rule)
            else:
                time.sleep(0 if now - entered < _SPIN_S else _LOOK_S)
        self.stats.waited_s += time.monotonic() - entered
        return answer

    def has_company(self, patience_s: float) -> bool:
        """Whether a small step might meet somebody within `patience_s` of the end of this rank's large steps. One look may be wrong."""
        if self._final is not None:
            return False
        end_s = max(self._end_s, time.monotonic()) + patience_s
        return any(
            self._ends_by(end_s, rank) if state == State.LARGE else state != State.AWAY
            for rank, state in enumerate(self._states()) if rank != self.rank and self.is_alive(rank)
        )

    def are_at_hand(self, are_idle: bool = False) -> bool:
        """Whether all other ranks might take part in a large step, or, if asked, `are_idle`. One look may be wrong."""
        able = (State.IDLE,) if are_idle else (State.IDLE, State.BUSY, State.WAITING)
        others = [(rank, state) for rank, state in enumerate(self._states()) if rank != self.rank]
        return self._final is None and all(state in able and self.is_alive(rank) for rank, state in others)

    def large_done(self) -> None:
        """The device has finished all large steps: this rank takes part again."""
        self._change(lambda record: convoy.large_done(record, self.rank))

    def idle(self) -> Round | None:
        """No request: ready to help. Only for a rank that goes on to call `help`."""
        if self._final is None:  # else it would be idle for the first time each time
            self._last = time.monotonic()
        return self._count(self._change(lambda record: convoy.idle(record, self.rank, self.is_alive)))

    def help(self, timeout_s: float, wake: Callable[[], bool] = lambda: False) -> Round | None:
        """Idle: the next round that asks for this rank; None after `timeout_s` or once `wake()` is true."""
        end = time.monotonic() + timeout_s
        if self._states()[self.rank] != State.IDLE and (made := self.idle()):
            return made
        while not self._owes():
            now = time.monotonic()
            if now >= end or wake():
                return None
            time.sleep(min(look_s(now - self._last), end - now))
        return self.idle()

    def expect(self) -> Round | None:
        """A step of this rank's comes soon, for which peers that come wait: None; a Round is owed: launch that and call again."""
        return self._count(self._change(lambda record: convoy.expect(record, self.rank)))

    def leave(self) -> Round | None:
        """Before this rank does something else than steps: None; a Round is owed: launch that and call again."""
        self._tell_end(_NEVER_S)  # where its device is still at a large step
        return self._count(self._change(lambda record: convoy.leave(record, self.rank, self.is_alive)))

    def close(self) -> None:
        """Leave for good: peers see it as they see a death. May be repeated."""
        self._close()

    def _give_up(self, record: Record, ends_soon: Callable[[int], bool], blame: bool) -> convoy.Outcome:
        """Who was waited for in vain is not waited for again: until it comes, or until its next large step."""
        after, answer = convoy.give_up(record, self.rank)
        if answer is convoy.GO:
            for rank, (was, now) in enumerate(zip(record.states, after.states, strict=True)):
                if is_overdue := was is State.LARGE and ends_soon(rank):
                    self._overdue[rank] = self._words[self._end_of(rank)]
                self.stats.timeouts[rank] += blame and (is_overdue or (was is State.BUSY and now is State.AWAY))
        return after, answer

    def _count(self, answer: Round | Answer) -> Round | None:
        if isinstance(answer, Answer):
            return None
        self._last = time.monotonic()
        self.stats.rounds += 1
        self.stats.helper_rounds += answer.tokens[self.rank] == 0
        self.stats.participants += len(answer.members)
        return answer

    def _change(self, rule: Callable[[Record], convoy.Outcome]) -> Round | Answer:
        """One change of the record, made by `rule` under the lock."""
        if self._final is None and self._acquire():
            try:
                word = self._words[0]
                record = self._format.unpack(self._map, self._offset(word))
                after, answer = rule(record)
                if after != record:
                    os.pwrite(self._fd, self._format.pack(after), self._offset(word + 1))
                    os.pwrite(self._fd, struct.pack("<q", word + 1), _WORD)
                self._seen = self._words[0]
                return answer
            except PermissionError:
                pass  # sealed while this rank had stopped: nothing of this change was said
            finally:
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, 0))
        if self._final is None:
            self._final = self._format.unpack(self._map, self._offset(self._words[0]))
            holder = self._words[_HOLDER // 8] % self.size
            logger.warning("rank %d stopped while it changed the convoy: all ranks go alone from now on", holder)
        made = self._final.due[self.rank]
        self._final = self._final._replace(due=(None,) * self.size)
        return made or convoy.GO

    def _acquire(self) -> bool:
        """Take the record's lock; False: the page is sealed, by this rank if it must."""
        held, began = -1, 0.0  # by whom, and since when this rank has seen it
        while not self._lock(0):
            if (now_held := self._words[_HOLDER // 8]) != held:
                held, began = now_held, time.monotonic()
            if (waited_s := time.monotonic() - began) < _SPIN_S:
                continue
            if fcntl.fcntl(self._fd, fcntl.F_GET_SEALS) & _SEAL:
                return False
            if waited_s > LOCK_TIMEOUT_S:
                with contextlib.suppress(PermissionError):
                    seal(self._fd)
                return False
            time.sleep(_LOOK_S)
        self._words[_HOLDER // 8] = (self._words[_HOLDER // 8] // self.size + 1) * self.size + self.rank
        return True

    def _lock(self, byte: int) -> bool:
        with contextlib.suppress(BlockingIOError):
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, byte))
            return True
        return False

    def is_alive(self, rank: int) -> bool:
        """Whether the process that has the place runs."""
        if rank == self.rank:
            return True
        found = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, 1 + rank))
        return struct.unpack_from("h", found)[0] != fcntl.F_UNLCK

    def _owes(self) -> bool:
        """Seen without the lock: a record that is being replaced may mislead one look, not the next."""
        if self._final is not None:
            return self._final.due[self.rank] is not None
        return self._words[self._offset(self._words[0]) // 8 + 1 + 2 * self.size + self.rank] != 0

    def _states(self) -> list[int]:
        """Seen without the lock, as in `_owes`."""
        at = self._offset(self._words[0]) // 8 + 1
        return self._words[at : at + self.size].tolist()

    def _tell_end(self, end_s: float) -> None:
        self._words[self._end_of(self.rank)] = int(min(end_s, _NEVER_S) * 1e6)

    def _ends_by(self, end_s: float, rank: int) -> bool:
        """Whether a rank's large steps are expected to have ended by then, and have not been waited for in vain."""
        end = self._words[self._end_of(rank)]
        return end != self._overdue.get(rank) and end <= end_s * 1e6

    def _within(self, wait_s: float) -> Callable[[int], bool]:
        return lambda rank: self._ends_by(self._began + wait_s, rank)

    def _end_of(self, rank: int) -> int:
        return (_RECORDS + 2 * self._format.nbytes) // 8 + rank

    def _offset(self, word: int) -> int:
        return _RECORDS + word % 2 * self._format.nbytes


def look_s(quiet_s: float) -> float:
    """Seconds until an idle rank looks for rounds again: often for a second after work, as vLLM's workers look for calls."""
    return min(max(_LOOK_S, quiet_s / 100), _WARM_S if quiet_s < _HOT_S else _REST_S)


def create(size: int) -> int:
    """The file descriptor of a page for `size` ranks, for the caller to hand round and to close."""
    fd = os.memfd_create("dwdp-convoy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _RECORDS + 2 * Format(size).nbytes + 8 * size)  # zeros are a record: nobody has come
    os.pwrite(fd, struct.pack("<q", size), _SIZE)
    return fd


def seal(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEAL)


@functools.cache
def _flock(kind: int, byte: int) -> bytes:
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)
