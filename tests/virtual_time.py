"""Time that passes when all threads sleep: the one that wakes first runs. A busy machine changes nothing of what happens when."""

import heapq
import itertools
import threading
from collections.abc import Callable, Sequence

TICK_S, READ_S = 5e-4, 1e-6  # what a sleep takes at least; what a look at the clock takes


class Clock:
    """Stands in for the module `time`. A loop that only reads it ends, too."""

    def __init__(self) -> None:
        self._now_s, self._count = 1000.0, itertools.count()
        self._waking: list[tuple[float, int, threading.Semaphore]] = []
        self._failed: list[BaseException] = []

    def monotonic(self) -> float:
        self._now_s += READ_S
        return self._now_s

    def sleep(self, seconds: float) -> None:
        turn = threading.Semaphore(0)
        heapq.heappush(self._waking, (self._now_s + max(seconds, TICK_S), next(self._count), turn))
        self._hand_over()
        turn.acquire()

    def _hand_over(self) -> None:
        when_s, _, turn = heapq.heappop(self._waking)
        self._now_s = max(self._now_s, when_s)
        turn.release()

    def run(self, bodies: Sequence[Callable[[], object]]) -> None:
        """Each in a thread of its own, until all have ended."""
        def body(work: Callable[[], object], turn: threading.Semaphore) -> None:
            turn.acquire()
            try:
                work()
            except BaseException as error:
                self._failed.append(error)
            if self._waking:
                self._hand_over()

        threads = []
        for work in bodies:
            turn = threading.Semaphore(0)
            heapq.heappush(self._waking, (self._now_s, next(self._count), turn))
            threads.append(threading.Thread(target=body, args=(work, turn)))
            threads[-1].start()
        self._hand_over()
        for thread in threads:
            thread.join(60)
        if self._failed:
            raise self._failed[0]
