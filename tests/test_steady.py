"""Invariant: ranks that fall out of step are in step again within a few steps, whatever their steps are expected to take.

Real meetings and hosts that run one step ahead, in virtual time: of all ranks' threads the one that wakes first runs. Steps on
the simulated devices take what the costs say, or `off` times that where they go alone.
"""

import functools
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from vllm_dwdp import dispatch, large_steps, meeting
from vllm_dwdp.convoy import Round
from vllm_dwdp.costs import H100, Costs
from vllm_dwdp.dispatch import Dispatch
from vllm_dwdp.kernels.tokens import FEW
from vllm_dwdp.limits import Limits

from virtual_time import TICK_S, Clock

HOST_S, HELP_S, STEPS = 1e-3, 1e-2, 40
LARGE = 8192
End = Callable[[], float | None]  # when a step ends on the device; None until that is known


class World:
    """Ranks of one host, with the layers of Qwen3-30B-A3B."""

    def __init__(self, size: int, layers: int, off: float, clock: Clock):
        self.clock, self.off = clock, off
        self.costs = Costs(
            rates=H100, num_layers=layers, num_experts=128, top_k=8, expert_bytes=9_437_184, hidden_size=2048, itemsize=2, size=size,
            graph_tokens=LARGE,
        )
        self.limits = Limits(
            max_tokens=self.costs.max_tokens((LARGE + FEW * (size - 1)) // size),
            helped_max_tokens=self.costs.helped_max_tokens(LARGE), most_rows=LARGE,
            graph_sizes=(), alone_graph_tokens=0,
            patience_s=functools.cache(self.costs.patience_s), helped_s=self.costs.helped_s, alone_s=functools.cache(self.costs.alone_s),
            spare_s=self.costs.spare_s,
        )
        self.members: dict[int, dict[int, End]] = {}  # by round and rank: when its device reaches the round
        fd = meeting.create(size)
        self.ranks = [Rank(self, fd, rank) for rank in range(size)]
        os.close(fd)

    def run(self, steps: Sequence[Sequence[int]], late_s: Sequence[float]) -> list[str]:
        """What each rank's steps were: l for large, L for one with help, r for a round, a for alone; it helps where they are 0.

        It stops when the first rank has no more.
        """
        def drive(rank: "Rank") -> None:
            self.clock.sleep(late_s[rank.number])
            rank.run(steps[rank.number])

        self.is_over = False
        began_s = self.clock.monotonic()
        self.clock.run([functools.partial(drive, rank) for rank in self.ranks])
        self.took_s = self.clock.monotonic() - began_s
        return [rank.kinds for rank in self.ranks]

    def round_s(self, made: Round) -> float:
        rows, among = sum(made.tokens), len(made.members)
        slowest_us = max(self.costs.dispatched_us(max(made.tokens[rank], 1), rows, among) for rank in made.members)
        return self.costs.num_layers * slowest_us * 1e-6


class Rank:
    """One rank. Its token exchange and its stream are itself; an event is the number of a step on the device."""

    def __init__(self, world: World, fd: int, number: int):
        self.world, self.number, self.kinds = world, number, ""
        self.first: list[Any] = []  # when it had its first step, and the End of that
        self.meeting = meeting.Meeting(fd, number, world.costs.size)
        self._ends: list[End] = [lambda: 0.0]
        self._own: list[int] = []  # its own steps
        self._round: Round | None = None
        self._dispatch = Dispatch(self, self, self.meeting, self, world.limits)
        self._dispatch.meets = True
        self._dispatch.help_out = self._launch

    def check(self) -> None: ...

    def begin(self, layout: Round) -> None:
        self._round = layout if layout.number else None

    def event(self) -> list[int]:
        return [0]

    def compute_record(self, event: list[int]) -> None:
        event[0] = len(self._ends) - 1

    def is_done(self, event: list[int]) -> bool:
        end_s = self._ends[event[0]]()
        return end_s is not None and end_s <= self.world.clock.monotonic()

    def run(self, steps: Sequence[int]) -> None:
        was_busy = False
        for tokens in steps:
            if not tokens:
                if was_busy:
                    while not self.is_done(self._own[-1:]) and not self.world.is_over:
                        self.world.clock.sleep(TICK_S)
                    self.world.clock.sleep(HOST_S)  # it takes the output before it is idle
                    was_busy = False
                self._dispatch.help(HELP_S, lambda: self.world.is_over)
                continue
            if not was_busy:
                self._dispatch.expect()
            was_busy = True
            self.first = self.first or [self.world.clock.monotonic()]
            while not self.is_done(self._own[-2:-1] or [0]) and not self.world.is_over:
                self.world.clock.sleep(TICK_S)
            if self.world.is_over:
                break
            self.world.clock.sleep(HOST_S)
            self._dispatch.begin_step(tokens)
            self.kinds += ("lL" if tokens > self.world.limits.max_tokens else "ar")[self._round is not None]
            self._launch(tokens)
            self._own.append(len(self._ends) - 1)
            self.first[1:] = self.first[1:] or [self._ends[-1]]
            self._dispatch.end_step()
        self.world.is_over = True
        self.meeting.leave()
        self.meeting.close()

    def _launch(self, tokens: int = 0) -> None:
        world, made, before, now_s = self.world, self._round, self._ends[-1], self.world.clock.monotonic()
        takes_s = world.round_s(made) if made else world.off * world.limits.alone_s(tokens)
        among = world.members.setdefault(made.number, {}) if made else {}

        def starts() -> float | None:
            end_s = before()
            return None if end_s is None else max(end_s, now_s)

        among[self.number] = starts
        known: list[float] = []

        def ends() -> float | None:
            if not known and len(among) == (len(made.members) if made else 1):
                all_s = [start() for start in among.values()]
                if None not in all_s:
                    known.append(max(all_s) + takes_s)
            return known[0] if known else None

        self._ends.append(ends)
        self._round = None


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    def make(size: int, layers: int = 24, off: float = 1.0) -> World:
        clock = Clock()
        for module in (meeting, dispatch, large_steps):
            monkeypatch.setattr(module, "time", clock)
        return World(size, layers, off, clock)

    return make


def apart(world: World, tokens: int, seed: int) -> list[float]:
    """Starts, in seconds, as far apart as a step alone takes."""
    rng = random.Random(seed)
    return [rng.random() * world.costs.alone_s(tokens) for _ in world.ranks]


@pytest.mark.parametrize("tokens", [4, 128, 1000])
@pytest.mark.parametrize(("size", "layers"), [(2, 24), (2, 48), (3, 48), (4, 24), (4, 48)])
def test_ranks_that_begin_apart_go_on_together(world, size: int, layers: int, tokens: int) -> None:
    made = world(size, layers)
    tokens = min(tokens, made.limits.max_tokens // 2)  # beyond, little is lost alone
    for kinds in made.run([[tokens] * STEPS] * size, apart(made, tokens, 0)):
        assert kinds.count("a") <= 4 and "r" * 30 in kinds, kinds


@pytest.mark.parametrize("off", [0.5, 0.7, 1.4, 2.0])
@pytest.mark.parametrize("tokens", [16, 1500])
def test_expectations_that_are_wrong_are_put_right(world, tokens: int, off: float) -> None:
    for seed in range(2):
        made = world(2, off=off)
        for kinds in made.run([[tokens] * STEPS] * 2, apart(made, tokens, seed)):
            assert kinds.count("a") <= 6, kinds


@pytest.mark.parametrize("off", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_come_together_after_large_steps(world, size: int, off: float) -> None:
    made, rng = world(size, off=off), random.Random(1)
    found = made.run([[LARGE if rng.random() < 0.05 else 64 for _ in range(2 * STEPS)] for _ in range(size)], [0.0] * size)
    large, alone = (sum(kinds.count(kind) for kinds in found for kind in either) for either in ("lL", "a"))
    assert alone <= 2 * large + 2 * size, found


@pytest.mark.parametrize("tokens", [(1, 2000), (2, 512), (1, 128), (64, 600)])
def test_steps_of_different_sizes_keep_step(world, tokens: tuple[int, int]) -> None:
    """The shorter step alone is not a reason to go alone: its peer's would take far longer then."""
    made = world(2)
    found = made.run([[count] * STEPS for count in tokens], [0.0, 0.011])
    assert all(kinds.count("a") <= 0.15 * STEPS for kinds in found), found
    together_s = made.round_s(Round(1, (0, 1), tokens)) + HOST_S
    assert made.took_s < 1.15 * STEPS * together_s


def test_a_long_prefill_keeps_nobody(world) -> None:
    """The other rank's small steps go alone meanwhile, as fast as they do alone, and do not wait for their own device."""
    made = world(2)
    made.run([[LARGE] * 20, [16] * 200], [0.0, 0.0])
    kinds, busy_s = made.ranks[1].kinds, made.ranks[1].meeting.stats.waited_s
    assert len(kinds) >= 0.9 * made.took_s / (made.costs.alone_s(16)), kinds
    assert busy_s < 0.1 * made.took_s


@pytest.mark.parametrize("size", [2, 4])
def test_prompts_take_ranks_along_that_decode(world, size: int) -> None:
    """Nearly every prompt, but not with two steps of it."""
    made = world(size)
    large, *small = made.run([([LARGE] * 2 + [16] * 5) * 8, *[[16] * 100] * (size - 1)], [0.0] * size)
    assert large.count("L") >= 6 and "LL" not in large, large
    assert all(kinds.count("a") <= 2.5 * 8 for kinds in small), small


@pytest.mark.parametrize("size", [2, 3])
def test_a_long_prompt_takes_idle_ranks_along(world, size: int) -> None:
    """Its steps follow each other on all devices, each as short as all ranks can make it."""
    made = world(size)
    most = made.limits.helped_max_tokens
    kinds, *_ = made.run([[most] * 20, *[[0] * 1000] * (size - 1)], [0.01] + [0.0] * (size - 1))
    assert kinds == "L" * 20 and made.took_s < 20.5 * made.round_s(Round(1, tuple(range(size)), (most, *[0] * (size - 1))))


@pytest.mark.parametrize("size", [2, 4])
def test_a_large_step_that_went_alone_keeps_no_later_one_from_help(world, size: int) -> None:
    made = world(size)
    most = made.limits.helped_max_tokens
    kinds, *_ = made.run([[most] * 20, [16] * 3 + [0] * 1000, *[[0] * 1000] * (size - 2)], [0.0] * size)
    assert "l" in kinds and kinds.endswith("L" * 15), kinds


@pytest.mark.parametrize("apart_s", [0.003, 0.02])
@pytest.mark.parametrize("tokens", [6144, LARGE])
def test_prompts_that_come_one_after_the_other_help_each_other(world, tokens: int, apart_s: float) -> None:
    """Who has helped gets help, though the other rank is idle only once its host has seen its own end."""
    made = world(2)
    helped_s = made.round_s(Round(1, (0, 1), (tokens, 0)))
    assert made.run([[0] * 5 + [tokens] + [0] * 30] * 2, [0.0, apart_s]) == ["L", "L"]
    request_s, end = made.ranks[1].first
    assert end() - request_s < 2 * helped_s + 6 * HOST_S


@pytest.mark.parametrize("apart_s", [0.0, 0.001])
@pytest.mark.parametrize("tokens", [6144, LARGE])
def test_prompts_that_come_at_once_wait_for_nobody(world, tokens: int, apart_s: float) -> None:
    """The second would wait for all of the first."""
    made = world(2)
    assert made.run([[0] * 5 + [tokens] + [0] * 30] * 2, [0.0, apart_s]) == ["l", "l"]
    assert all(end() - request_s < made.costs.alone_s(tokens) + 4 * HOST_S for request_s, end in (rank.first for rank in made.ranks))


@pytest.mark.parametrize("apart_s", [0.0, 0.0005, 0.001])
def test_prompts_of_half_a_batch_that_come_at_once_go_together(world, apart_s: float) -> None:
    made = world(2, 48)
    assert made.run([[0] * 5 + [LARGE // 2] + [0] * 30] * 2, [0.0, apart_s]) == ["r", "r"]
    took_s = [end() - request_s for request_s, end in (rank.first for rank in made.ranks)]
    assert max(took_s) < 0.95 * made.costs.alone_s(LARGE // 2)


def test_a_rank_that_helped_is_kept_no_longer_than_two_large_steps(world) -> None:
    """Once it has steps of its own they do not wait for its peer's large ones, nor those for them."""
    made = world(2)
    most = made.limits.helped_max_tokens
    helped_s, alone_s = made.round_s(Round(1, (0, 1), (most, 0))), made.costs.alone_s(most)
    large, small = made.run([[most] * 12, [0] * 20 + [16] * 400], [0.01, 0.0])
    helped, alone = large.count("L"), large.count("l")
    assert large == "L" * helped + "l" * alone and helped >= 3 and alone >= 6 and "r" not in small
    assert made.took_s < 1.02 * (helped * helped_s + alone * alone_s)
    assert len(small) > 0.8 * (alone * alone_s - helped_s) / made.costs.alone_s(16)
    request_s, end = made.ranks[1].first
    assert 0 < end() - request_s < 2 * helped_s + made.costs.alone_s(16) + 4 * HOST_S
