"""Large steps: those that this rank's device works through alone, while peers do not count on it, and how long they take.

A small step that goes alone for longer than its rank waits for peers is one of them. The rank takes part again once its device has
reached the last layer of the last one: the host then prepares the next step while that layer runs, for which peers may have to wait.
"""

import math
import time
from typing import NamedTuple

from vllm_dwdp.kernels.device import CopyStream
from vllm_dwdp.limits import Limits
from vllm_dwdp.meeting import WORK_S, Meeting

_LOOK_S = 50e-6
MOST_PACE = 4.0


class Announced(NamedTuple):
    """What peers were told of the last one, in seconds."""

    at: float = 0.0
    takes: float = 0.0  # by itself
    ends_in: float = 0.0  # behind the one before it
    is_small: bool = False


class LargeSteps:
    """One rank's."""

    def __init__(self, meeting: Meeting, stream: CopyStream, limits: Limits):
        self._meeting, self._stream, self._limits = meeting, stream, limits
        self._ending = stream.event()  # the last layer of the last one
        self._is_marked = False  # peers know of one, and its last layer is enqueued
        self._is_due = False  # one is under way, and its last layer not enqueued
        self._announced = Announced()
        self._helped_until_s = 0.0  # when the last one in which all ranks took part is expected to have ended
        self._paces = {False: 1.0, True: 1.0}  # what large, and small, steps alone have taken, as a part of what was expected

    def alone_s(self, num_tokens: int) -> float:
        """How long a step is expected to take without peers."""
        return self._paces[self._is_small(num_tokens)] * self._limits.alone_s(num_tokens)

    @property
    def are_under_way(self) -> bool:
        return self._is_marked and not self._stream.is_done(self._ending)

    def ends_in(self, takes_s: float) -> float:
        """Seconds until a step ends that takes so many by itself, launched now behind those under way."""
        before_s = self._announced.takes if self.are_under_way else 0.0  # the host is one step ahead at most
        return max(before_s, self._helped_until_s - time.monotonic()) + takes_s

    def begin_step(self) -> None:
        self._is_due = False

    def announced(self, num_tokens: int, at: float, takes_s: float, ends_in: float) -> None:
        """Peers know that the step under way is one: when that was, and when it is expected to end."""
        self._announced, self._is_due = Announced(at, takes_s, ends_in, self._is_small(num_tokens)), True

    def helped(self, takes_s: float) -> None:
        """All ranks take part in one, which is none of those that go alone."""
        self._helped_until_s = time.monotonic() + takes_s

    def reach_last_layer(self) -> None:
        """All of the step under way but its last layer is enqueued."""
        if self._is_due:
            self._is_marked, self._is_due = True, False
            self._stream.compute_record(self._ending)

    def end(self) -> None:
        """Take part again. A rank whose device is still at one must not be met: its peers' kernels would wait for all of it."""
        if not self._is_marked:
            return
        entered, is_seen = time.monotonic(), False
        while self.are_under_way:
            if time.monotonic() > entered + WORK_S:
                return
            is_seen = True
            time.sleep(_LOOK_S)
        now, told = time.monotonic(), self._announced
        self._meeting.stats.waited_s += now - entered
        if is_seen and 0 < told.ends_in < math.inf:
            pace = self._paces[told.is_small] * (1 + (now - told.at) / told.ends_in) / 2
            self._paces[told.is_small] = min(max(pace, 1 / MOST_PACE), MOST_PACE)
        self._is_marked = False
        self._meeting.large_done()

    def _is_small(self, num_tokens: int) -> bool:
        return num_tokens <= self._limits.max_tokens
