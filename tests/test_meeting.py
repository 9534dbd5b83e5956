"""Invariant: ranks in processes of their own meet on one page; whoever is killed or stopped leaves the others going, in bounded time."""

import functools
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from vllm_dwdp import meeting as page
from vllm_dwdp.convoy import State
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.meeting import Meeting, create

from virtual_time import Clock

FORK = multiprocessing.get_context("fork")
SOON_S = 4e-3  # a look or two


def wander(fd: int, rank: int, size: int, seed: int, steps: int, out) -> None:
    """Random steps of every kind. Says of each launch what it was, and the longest operation beyond its patience."""
    meeting, rng, late = Meeting(fd, rank, size), random.Random(seed), 0.0
    for _ in range(steps):
        what = rng.choice(["join"] * 4 + ["large", "help", "leave", "expect"])
        patience, tokens = rng.choice([0.001, 0.005, 0.02]), rng.randint(1, 99)
        while True:
            began = time.monotonic()
            if what == "join":
                made = meeting.join(tokens, patience, goes_along=rng.random() < 0.5)
            elif what == "large":
                offered = rng.choice([0, tokens])
                made = meeting.large(rng.choice([0.0, 0.01, math.inf]), offered, patience, goes_along=rng.random() < 0.5)
            elif what in ("leave", "expect"):
                made, patience = getattr(meeting, what)(), 0
            else:
                made, patience = meeting.help(0.002), 0.002
            late = max(late, time.monotonic() - began - patience)
            if made:
                out.send((rank, made, tokens if what in ("join", "large") else 0))
            if what == "help" or made is None or made.tokens[rank]:
                break
        if what == "large":
            meeting.large_done()
    while made := meeting.large():
        out.send((rank, made, 0))
    out.send((rank, "done", late))
    meeting.close()


SOME = 20  # rounds


def run(size: int, steps: int, harm: signal.Signals | None, seed: int) -> tuple[dict, dict]:
    """The rounds, as each rank saw them, and how late the survivors were; rank 0 comes to harm at a random moment, after some rounds."""
    fd, rounds, late = create(size), defaultdict(dict), {}
    pipes = [FORK.Pipe(duplex=False) for _ in range(size)]
    endless = {0: sys.maxsize} if harm else {}  # whom harm must find under way, however late it comes
    ranks = [FORK.Process(target=wander, args=(fd, r, size, seed + r, endless.get(r, steps), pipes[r][1])) for r in range(size)]
    for rank, (_, end) in zip(ranks, pipes, strict=True):
        rank.start()
        end.close()
    os.close(fd)
    before = SOME + random.Random(seed).randrange(80)  # harm: the survivors' steps make some 300
    survivors = list(range(1 if harm else 0, size))
    waiting = {pipes[r][0] for r in range(size)}
    end = time.monotonic() + 30
    try:
        while set(survivors) - set(late):
            assert time.monotonic() < end, "a survivor does not go on"
            if harm and len(rounds) > before:
                os.kill(ranks[0].pid, harm)
                harm = None
            for pipe in multiprocessing.connection.wait(list(waiting), 0.01):
                try:
                    rank, made, said = pipe.recv()
                except EOFError:
                    waiting.discard(pipe)
                    continue
                if made == "done":
                    late[rank] = said
                else:
                    rounds[made.number][rank] = (made, said)
        assert harm is None, "no harm has come"
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return rounds, late


@pytest.mark.parametrize(
    ("size", "harm", "seed"),
    [(2, None, 1), (4, None, 2), *((3, signal.SIGKILL, s) for s in range(10, 14)), *((3, signal.SIGSTOP, s) for s in range(20, 24))],
)
def test_random_steps(size: int, harm: signal.Signals | None, seed: int) -> None:
    """All members know one round; each launches it once, with its own tokens; no operation lasts beyond its bound."""
    rounds, late = run(size, 400, harm, seed)
    assert len(rounds) > SOME and (not harm or 0 not in late)
    hurt = {0} if harm else set()
    for number, seen in rounds.items():
        (made,) = {made for made, _ in seen.values()}
        assert made.number == number
        assert set(made.members) - hurt <= set(seen) <= set(made.members)
        assert all(made.tokens[rank] in (0, said) for rank, (_, said) in seen.items())
    assert max(late.values()) < page.LOCK_TIMEOUT_S + 0.5


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(page, "time", made := Clock())
    return made


@pytest.fixture
def timed(clock: Clock) -> Callable[[Callable[[], Any]], tuple[Any, Any]]:
    """What a call returns, and its seconds, to compare."""
    def call(work: Callable[[], Any]) -> tuple[Any, Any]:
        began_s = clock.monotonic()
        answer = work()
        return answer, pytest.approx(clock.monotonic() - began_s, abs=SOON_S)

    return call


@pytest.fixture
def pair(clock: Clock):
    """In virtual time."""
    fd = create(2)
    both = [Meeting(fd, rank, 2) for rank in range(2)]
    os.close(fd)
    yield both
    for meeting in both:
        meeting.close()


def test_patience_is_a_bound(pair, timed) -> None:
    """A peer that does not come costs its patience once; then nobody waits for it."""
    a, b = pair
    assert b.join(1, 0) is None, "b is busy now"
    assert timed(lambda: a.join(1, 0.1)) == (None, 0.1)
    assert a.stats.timeouts == [0, 1]
    assert timed(lambda: a.join(1, 5)) == (None, 0)


def test_who_steps_is_waited_for_by_patience_and_who_ends_a_large_step_by_that(pair, timed) -> None:
    a, b = pair
    b.join(1, 0)
    assert timed(lambda: a.join(1, 0.1, 0.3)) == (None, 0.1)
    b.large(0.25)
    assert timed(lambda: a.join(1, 0.1, 0.3)) == (None, 0.3)


def test_idle_rank_helps_before_its_own_step(pair) -> None:
    a, b = pair
    assert b.idle() is None
    made = a.join(7, 0)
    assert made.members == (0, 1) and made.tokens == (7, 0)
    assert b.join(5, 0) == made
    assert b.stats.helper_rounds == 1


@pytest.mark.parametrize("was", ["busy", "idle", "large"])
@pytest.mark.parametrize("step", ["large", "leave", "close"])
def test_no_wait_for_who_does_not_come(pair, timed, step: str, was: str) -> None:
    """Nor is it counted on."""
    a, b = pair
    {"busy": functools.partial(b.join, 1, 0), "idle": b.idle, "large": functools.partial(b.large, 0.5)}[was]()
    assert getattr(b, step)() is None
    assert not a.has_company(5) and not a.are_at_hand()
    assert timed(lambda: a.join(1, 5)) == (None, 0)


@pytest.mark.parametrize("was", ["busy", "large"])
def test_who_dies_while_it_is_waited_for_is_waited_for_no_longer(pair, clock, timed, was: str) -> None:
    """It says nothing on the page: who waits looks."""
    a, b = pair
    b.join(1, 0) if was == "busy" else b.large(4)
    found: list[Any] = []
    clock.run([lambda: found.extend(timed(lambda: a.join(1, 5))), lambda: (clock.sleep(0.1), b.close())])
    assert found == [None, 0.1] and a.stats.timeouts == [0, 0]


def test_a_device_that_stays_at_work_is_waited_for_within_a_bound(pair, clock, timed, monkeypatch) -> None:
    """Then patience counts as if it had ended."""
    a, b = pair
    monkeypatch.setattr(page, "WORK_S", 0.1)
    b.join(1, 0)
    free_s = clock.monotonic() + 2
    assert timed(lambda: a.join(1, 0.1, is_at_work=lambda: clock.monotonic() < free_s)) == (None, 0.2)


def test_who_has_no_patience_blames_nobody(pair) -> None:
    """Time-outs are of peers that were waited for in vain; the end of a large step may be missed by who waits for it alone."""
    a, b = pair
    b.join(1, 0)
    assert a.join(1, 0) is None
    b.large(0.02)
    assert a.join(1, 0, 0.05) is None
    assert a.stats.timeouts == [0, 0]


def test_company_is_who_may_be_met_when_the_own_large_step_ends(pair) -> None:
    a, b = pair
    assert not a.has_company(10), "nobody has come"
    assert b.large(1.0) is None
    assert a.has_company(1.1) and not a.has_company(0.5)
    assert a.large(0.9) is None
    assert a.has_company(0.5), "both end at about the same time"
    for step in (b.large_done, b.idle):
        step()
        assert a.has_company(0)
    b.close()
    assert not a.has_company(10)


@pytest.mark.parametrize("goes_along", [False, True])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_large_step_takes_a_busy_rank_along_that_comes_and_agrees(pair, clock, timed, is_first: bool, goes_along: bool) -> None:
    """Before or after the large one; who does not go along goes alone, and so does the large step, at once."""
    a, b = pair
    for meeting in pair:
        meeting.large(0.0)
        meeting.large_done()
    found: dict[Meeting, Any] = {}

    def begin(rank: Meeting, step: Callable[[], Any], after_s: float) -> None:
        clock.sleep(after_s)
        found[rank] = timed(step)

    clock.run([
        lambda: begin(a, lambda: a.large(1.0, 99, 0.5, goes_along=goes_along), 0.05),
        lambda: begin(b, lambda: b.join(3, 0.3, goes_along=goes_along), 0.0 if is_first else 0.15),
    ])
    (made, large_s), (same, small_s) = found[a], found[b]
    assert made == same and (made is not None) == goes_along
    assert made is None or made.tokens == (99, 3)
    assert (large_s, small_s) == ((0, 0.05) if is_first else (0.1, 0))


def test_a_large_step_waits_for_a_busy_rank_within_its_bound(pair, clock, timed) -> None:
    """It loses nothing while its own device is at work, as of its last look.

    Who was waited for in vain is waited for again once it comes.
    """
    a, b = pair
    b.join(1, 0)
    ends_s = clock.monotonic() + 0.2
    assert timed(lambda: a.large(1.0, 99, 0.1, lambda: clock.monotonic() < ends_s)) == (None, 0.3)
    assert a._states() == [State.LARGE, State.AWAY]
    assert not a.are_at_hand()
    b.join(1, 0)
    assert a.are_at_hand() and not a.are_at_hand(are_idle=True)
    b.close()
    a.large_done()
    assert timed(lambda: a.large(1.0, 99, 5)) == (None, 0), "b is dead"


def test_an_end_that_comes_near_while_the_own_device_is_at_work_is_waited_for(pair, clock) -> None:
    a, b = pair
    b.large(0.0)
    b.large_done()
    free_s, made = clock.monotonic() + 0.3, []

    def slow() -> None:
        clock.sleep(0.25)
        b.large(0.15)
        clock.sleep(0.15)
        b.large_done()
        clock.sleep(0.02)
        b.join(5, 1)

    clock.run([lambda: made.append(a.join(4, 0.2, 0.2, lambda: clock.monotonic() < free_s)), slow])
    assert made[0].tokens == (4, 5)


def test_what_was_said_last_of_the_end_counts(pair, timed) -> None:
    """Steps that take less than is expected of them do not put off their end further and further."""
    a, b = pair
    for _ in range(100):
        assert b.large(0.1) is None
    assert timed(lambda: a.join(4, 0.25)) == (None, 0.25), "0.1 s are left"


def test_the_end_of_a_large_step_is_met(pair, clock, timed) -> None:
    """It is waited for where it is expected within the patience, for no longer, and by who has no other company."""
    a, b = pair
    assert b.large(0.2) is None
    mine: list[Any] = []
    theirs: list[Any] = []
    clock.run([
        lambda: mine.extend(timed(lambda: a.join(4, 1))),
        lambda: (clock.sleep(0.2), b.large_done(), theirs.append(b.join(5, 1))),
    ])
    assert mine == [theirs[0], 0.2] and mine[0].tokens == (4, 5)
    for takes_s, patience_s, waits_s in [(10, 0.3, 0.0), (0.1, 0.3, 0.3), (math.inf, 0.3, 0.0)]:
        assert b.large(takes_s) is None
        assert timed(lambda patience_s=patience_s: a.join(4, patience_s)) == (None, waits_s), "b does not end its step"
        assert timed(lambda patience_s=patience_s: a.join(4, patience_s)) == (None, 0), "it is waited for once"
        b.large_done()
    assert a.stats.timeouts == [0, 1]
    assert b.large(0.1) is None and b.large(10) is None, "one follows the other on the device"
    assert timed(lambda: a.join(4, 0.3)) == (None, 0)


def test_stopped_with_the_lock(pair, timed, monkeypatch) -> None:
    """The page is sealed: what was said stands, the rounds owed are launched once, what comes later is void on both sides."""
    a, b = pair
    monkeypatch.setattr(page, "LOCK_TIMEOUT_S", 0.1)
    assert a.idle() is None
    made = b.join(3, 0)
    assert b._acquire(), "b stops here"
    assert timed(lambda: a.join(4, 1)) == (made, 0.1)
    assert a.join(4, 5) is None
    b._lock(0)  # b goes on
    assert b.join(9, 5) is None
    with pytest.raises(PermissionError):
        os.pwrite(b._fd, b"x", 0)


def test_nobody_is_met_on_a_sealed_page(pair) -> None:
    """Whatever it said last."""
    a, b = pair
    b.idle()
    assert a.has_company(0) and a.are_at_hand()
    page.seal(a._fd)
    a.expect()
    assert b.is_alive(0) and a.is_alive(1) and a._states()[1] == State.IDLE
    assert not a.has_company(10) and not a.are_at_hand() and not a.are_at_hand(are_idle=True)


@pytest.mark.parametrize("then", ["leave", "expect"])
def test_who_goes_first_launches_what_it_owes(pair, then) -> None:
    a, b = pair
    b.idle()
    made = a.join(7, 0)
    assert getattr(b, then)() == made and getattr(b, then)() is None


@pytest.mark.parametrize("num_tokens", [7, 0], ids=["small", "large"])
def test_whose_request_has_come_is_waited_for(pair, clock, timed, num_tokens) -> None:
    """It was idle, and a step that came then would have gone with its help, and its own after that."""
    a, b = pair
    b.idle()
    b.expect()
    step = functools.partial(a.join, 7, 5) if num_tokens else functools.partial(a.large, math.inf, 99, 5)
    late = functools.partial(b.join, 9, 5) if num_tokens else functools.partial(b.large, math.inf, 99, 5)
    mine: list[Any] = []
    theirs: list[Any] = []
    clock.run([lambda: mine.extend(timed(step)), lambda: (clock.sleep(0.1), theirs.append(late()))])
    assert mine == [theirs[0], 0.1]
    if num_tokens:
        assert theirs[0].tokens == (7, 9)
    else:
        assert theirs == [None], "each at once, by itself"


def test_an_idle_rank_rests(pair, clock, monkeypatch) -> None:
    """After a quiet second, on a page that is sealed, too, where it can say no more that it is idle."""
    a, _ = pair
    naps: list[float] = []
    monkeypatch.setattr(clock, "sleep", lambda s, nap=clock.sleep: (naps.append(s), nap(s)))
    for is_sealed in (False, True):
        if is_sealed:
            assert a.leave() is None
            page.seal(a._fd)
            assert a.idle() is None and a._final is not None and a._states()[0] == State.AWAY
        naps.clear()
        a._last = clock.monotonic() - 60
        assert a.help(0.05) is None
        assert page._REST_S in naps if is_sealed else max(naps) == page._WARM_S, naps


def test_a_lock_that_changes_hands_is_waited_for(pair, clock, monkeypatch) -> None:
    """Nobody has stopped: the page is not sealed, however often others were faster."""
    a, b = pair
    monkeypatch.setattr(page, "LOCK_TIMEOUT_S", 0.01)
    a.idle()
    lock, end = a._lock, clock.monotonic() + 0.04

    def unlucky(byte: int) -> bool:
        if byte == 0 and clock.monotonic() < end:
            b.join(1, 0)
            return False
        return lock(byte)

    monkeypatch.setattr(a, "_lock", unlucky)
    assert a.leave() is not None and a._final is None and b._final is None


def test_a_child_does_not_hold_the_place() -> None:
    """A rank that dies is dead although a process that it forked lives on."""
    fd, (mine, theirs) = create(2), FORK.Pipe()

    def rank_1() -> None:
        place = Meeting(fd, 1, 2)
        place.join(1, 0)
        if (child := os.fork()) == 0:
            time.sleep(60)
        theirs.send(child)
        time.sleep(60)

    process = FORK.Process(target=rank_1)
    process.start()
    child = mine.recv()
    try:
        meeting = Meeting(fd, 0, 2)
        time.sleep(0.05)
        assert meeting.is_alive(1)
        process.kill()
        process.join()
        os.kill(child, 0)
        began = time.monotonic()
        assert meeting.join(1, 5) is None
        assert time.monotonic() - began < 2.5
    finally:
        os.kill(child, signal.SIGKILL)


def test_places(pair) -> None:
    """One place a rank; one size on all."""
    fd = pair[0]._fd
    with pytest.raises(DWDPError, match="rank 1 is in the convoy already"):
        Meeting(fd, 1, 2)
    with pytest.raises(DWDPError, match="for 2 ranks, data_parallel_size=3"):
        Meeting(fd, 1, 3)


def test_cost(pair) -> None:
    """An operation alone on the page costs tens of microseconds."""
    a, _ = pair
    began = time.perf_counter()
    for _ in range(2000):
        a.join(1, 0)
    each_us = (time.perf_counter() - began) / 2000 * 1e6
    print(f"{each_us:.0f} us an operation")
    assert each_us < 500
