"""Invariant: ranks that fall out of step are soon in step again: a step alone does not make the peer's next one go alone.

Real meetings and hosts that run one step ahead of simulated devices, whose steps take as long as is expected of them.
"""

import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from vllm_dwdp.dispatch import Dispatch, Limits
from vllm_dwdp.kernels.tokens import RoundLayout
from vllm_dwdp.meeting import Meeting, create

SMALL, MOST, LARGE = 8, 16, 100
ALONE_S, ROUND_S, LARGE_S = 23e-3, 5e-3, 30e-3  # half of what 24 layers take at 128 requests per GPU
PATIENCE_S = ALONE_S - ROUND_S
End = Callable[[], float | None]  # when a step ends on the device; None until that is known


class Rank:
    """One rank. Its token exchange and stream are itself."""

    def __init__(self, fd: int, rank: int, size: int, rounds: dict[int, dict[int, End]]):
        self.meeting, self.kinds = Meeting(fd, rank, size), ""
        limits = Limits(
            max_tokens=MOST, graph_sizes=(SMALL,), patience_s=lambda _: PATIENCE_S,
            alone_s=lambda tokens: ALONE_S if tokens <= MOST else LARGE_S,
        )
        self._dispatch = Dispatch(self, self, self.meeting, self, limits)
        self._dispatch.meets = True
        self._rounds, self._ends = rounds, [lambda: 0.0]
        self._layout: RoundLayout | None = None

    def check(self) -> None: ...

    def begin(self, layout: RoundLayout) -> None:
        self._layout = layout

    def event(self) -> list[int]:
        return [0]

    def compute_record(self, event: list[int]) -> None:
        event[0] = len(self._ends) - 1

    def is_done(self, event: list[int]) -> bool:
        end_s = self._ends[event[0]]()
        return end_s is not None and end_s <= time.monotonic()

    def run(self, steps: list[int]) -> None:
        for tokens in steps:
            while not self.is_done([max(len(self._ends) - 2, 0)]):
                time.sleep(1e-4)
            self._layout = None
            self._dispatch.begin_step(tokens)
            number = self._layout.number if self._layout else 0
            self.kinds += "l" if tokens > MOST else "r" if number else "a"
            self._launch(number, ROUND_S if number else LARGE_S if tokens > MOST else ALONE_S)
            self._dispatch.end_step()

    def _launch(self, number: int, takes_s: float) -> None:
        before, now, alike = self._ends[-1], time.monotonic(), len(self._layout.members) if number else 1
        known: list[float] = []

        def starts() -> float | None:
            end_s = before()
            return None if end_s is None else max(end_s, now)

        members = self._rounds.setdefault(number, {}) if number else {}
        members[self.meeting.rank] = starts

        def ends() -> float | None:
            if not known and len(members) == alike:
                all_start = [start() for start in list(members.values())]
                if None not in all_start:
                    known.append(max(all_start) + takes_s)
            return known[0] if known else None

        self._ends.append(ends)


def run(steps: list[list[int]], late_s: float) -> list[str]:
    """What each rank's steps were: l for large, r for a round, a for alone. Each begins `late_s` after the one before."""
    size, rounds = len(steps), {}
    fd = create(size)
    ranks = [Rank(fd, rank, size, rounds) for rank in range(size)]
    os.close(fd)

    def drive(number: int) -> None:
        time.sleep(number * late_s)
        ranks[number].run(steps[number])
        ranks[number].meeting.close()

    with ThreadPoolExecutor(size) as pool:
        for done in [pool.submit(drive, number) for number in range(size)]:
            done.result(60)
    return [rank.kinds for rank in ranks]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_that_begin_apart_go_on_together(size: int) -> None:
    for kinds in run([[SMALL] * 60] * size, ALONE_S / 4):
        assert kinds.count("a") <= 6, kinds


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_come_together_after_large_steps(size: int) -> None:
    rng = random.Random(1)
    found = run([[LARGE if rng.random() < 0.07 else SMALL for _ in range(100)] for _ in range(size)], ALONE_S / 2)
    assert sum(kinds.count("a") for kinds in found) <= 2.5 * sum(kinds.count("l") for kinds in found) + 8, found
