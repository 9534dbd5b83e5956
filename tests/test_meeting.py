"""Invariant: ranks in processes of their own meet on one page; whoever is killed or stopped leaves the others going, in bounded time."""

import functools
import math
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest

from vllm_dwdp import meeting as page
from vllm_dwdp.convoy import State
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.meeting import Meeting, create

FORK = multiprocessing.get_context("fork")


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
def pair():
    fd = create(2)
    both = [Meeting(fd, rank, 2) for rank in range(2)]
    os.close(fd)
    yield both
    for meeting in both:
        meeting.close()


def test_patience_is_a_bound(pair) -> None:
    """A peer that does not come costs its patience once; then nobody waits for it."""
    a, b = pair
    assert b.join(1, 0) is None, "b is busy now"
    began = time.monotonic()
    assert a.join(1, 0.1) is None
    assert 0.1 <= time.monotonic() - began < 0.2
    assert a.stats.timeouts == [0, 1]
    began = time.monotonic()
    assert a.join(1, 5) is None
    assert time.monotonic() - began < 0.05


def test_idle_rank_helps_before_its_own_step(pair) -> None:
    a, b = pair
    assert b.idle() is None
    made = a.join(7, 0)
    assert made.members == (0, 1) and made.tokens == (7, 0)
    assert b.join(5, 0) == made
    assert b.stats.helper_rounds == 1


@pytest.mark.parametrize("was", ["busy", "idle", "large"])
@pytest.mark.parametrize("step", ["large", "leave", "close"])
def test_no_wait_for_who_does_not_come(pair, step: str, was: str) -> None:
    """Nor is it counted on."""
    a, b = pair
    {"busy": functools.partial(b.join, 1, 0), "idle": b.idle, "large": functools.partial(b.large, 0.5)}[was]()
    assert getattr(b, step)() is None
    assert not a.has_company(5) and not a.are_at_hand()
    began = time.monotonic()
    assert a.join(1, 5) is None
    assert time.monotonic() - began < 0.05


@pytest.mark.parametrize("was", ["busy", "large"])
def test_who_dies_while_it_is_waited_for_is_waited_for_no_longer(pair, was: str) -> None:
    """It says nothing on the page: who waits looks."""
    a, b = pair
    b.join(1, 0) if was == "busy" else b.large(4)
    death = threading.Timer(0.1, b.close)
    began = time.monotonic()
    death.start()
    assert a.join(1, 5) is None
    assert 0.1 <= time.monotonic() - began < 0.6 and a.stats.timeouts == [0, 0]
    death.join()


def test_a_device_that_stays_at_work_is_waited_for_within_a_bound(pair, monkeypatch) -> None:
    """Then patience counts as if it had ended."""
    a, b = pair
    monkeypatch.setattr(page, "WORK_S", 0.1)
    b.join(1, 0)
    began = time.monotonic()
    assert a.join(1, 0.1, is_at_work=lambda: time.monotonic() < began + 2) is None
    assert 0.2 <= time.monotonic() - began < 1


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
def test_a_large_step_takes_a_busy_rank_along_that_comes_and_agrees(pair, is_first: bool, goes_along: bool) -> None:
    """Before or after the large one; who does not go along goes alone, and so does the large step, at once."""
    a, b = pair
    for meeting in pair:
        meeting.large(0.0)
        meeting.large_done()
    made: list = []
    other = threading.Timer(0.0 if is_first else 0.1, lambda: made.append(b.join(3, 0.3, goes_along=goes_along)))
    began = time.monotonic()
    other.start()
    time.sleep(0.05 if is_first else 0.0)
    mine = a.large(1.0, 99, 0.5, goes_along=goes_along)
    assert time.monotonic() - began < 0.2
    other.join()
    assert made == [mine] and (mine is not None) == goes_along
    assert mine is None or mine.tokens == (99, 3)


def test_a_large_step_waits_for_a_busy_rank_within_its_bound(pair) -> None:
    """It loses nothing while its own device is at work, as of its last look.

    Who was waited for in vain is waited for again once it comes.
    """
    a, b = pair
    b.join(1, 0)
    began, ends = time.monotonic(), time.monotonic() + 0.2
    assert a.large(1.0, 99, 0.1, lambda: time.monotonic() < ends) is None
    assert 0.28 <= time.monotonic() - began < 0.4 and a._states() == [State.LARGE, State.AWAY]
    assert not a.are_at_hand()
    b.join(1, 0)
    assert a.are_at_hand() and not a.are_at_hand(are_idle=True)
    b.close()
    a.large_done()
    began = time.monotonic()
    assert a.large(1.0, 99, 5) is None and time.monotonic() - began < 0.05, "b is dead"


def test_an_end_that_comes_near_while_the_own_device_is_at_work_is_waited_for(pair) -> None:
    a, b = pair
    b.large(0.0)
    b.large_done()
    at_work_s = time.monotonic() + 0.3
    slow = [threading.Timer(0.25, b.large, (0.15,)), threading.Timer(0.4, b.large_done), threading.Timer(0.42, b.join, (5, 1))]
    for each in slow:
        each.start()
    made = a.join(4, 0.2, 0.2, lambda: time.monotonic() < at_work_s)
    for each in slow:
        each.join()
    assert made is not None and made.tokens == (4, 5)


def test_what_was_said_last_of_the_end_counts(pair) -> None:
    """Steps that take less than is expected of them do not put off their end further and further."""
    a, b = pair
    for _ in range(100):
        assert b.large(0.1) is None
    began = time.monotonic()
    assert a.join(4, 0.25) is None
    assert time.monotonic() - began >= 0.25, "0.1 s are left"


def test_the_end_of_a_large_step_is_met(pair) -> None:
    """It is waited for where it is expected within the patience, for no longer, and by who has no other company."""
    a, b = pair
    assert b.large(0.2) is None
    ended = threading.Timer(0.2, lambda: (b.large_done(), threads.append(b.join(5, 1))))
    threads: list = []
    ended.start()
    began = time.monotonic()
    made = a.join(4, 1)
    assert made.tokens == (4, 5) and 0.15 < time.monotonic() - began < 0.5
    ended.join()
    assert threads == [made]
    for takes_s, patience_s, waits_s in [(10, 0.3, 0.0), (0.1, 0.3, 0.3), (math.inf, 0.3, 0.0)]:
        assert b.large(takes_s) is None
        began = time.monotonic()
        assert a.join(4, patience_s) is None, "b does not end its step"
        assert waits_s <= time.monotonic() - began < waits_s + 0.05
        began = time.monotonic()
        assert a.join(4, patience_s) is None
        assert time.monotonic() - began < 0.05, "it is waited for once"
        b.large_done()
    assert a.stats.timeouts == [0, 1]
    assert b.large(0.1) is None and b.large(10) is None, "one follows the other on the device"
    began = time.monotonic()
    assert a.join(4, 0.3) is None and time.monotonic() - began < 0.05


def test_stopped_with_the_lock(pair, monkeypatch) -> None:
    """The page is sealed: what was said stands, the rounds owed are launched once, what comes later is void on both sides."""
    a, b = pair
    monkeypatch.setattr(page, "LOCK_TIMEOUT_S", 0.1)
    assert a.idle() is None
    made = b.join(3, 0)
    assert b._acquire(), "b stops here"
    began = time.monotonic()
    assert a.join(4, 1) == made
    assert 0.1 <= time.monotonic() - began < 0.3
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
def test_whose_request_has_come_is_waited_for(pair, num_tokens) -> None:
    """It was idle, and a step that came then would have gone with its help, and its own after that."""
    a, b = pair
    b.idle()
    b.expect()
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(a.join, 7, 5) if num_tokens else pool.submit(a.large, math.inf, 99, 5)
        time.sleep(0.1)
        assert not step.done()
        if num_tokens:
            made = b.join(9, 5)
            assert made == step.result() and made.tokens == (7, 9)
        else:
            assert b.large(math.inf, 99, 5) is None and step.result() is None, "each at once, by itself"


def test_an_idle_rank_rests(pair, monkeypatch) -> None:
    """After a quiet second, on a page that is sealed, too, where it can say no more that it is idle."""
    a, _ = pair
    for is_sealed in (False, True):
        if is_sealed:
            page.seal(a._fd)
            assert a.leave() is None and a._final is not None
        naps = []
        a._last = time.monotonic() - 60
        monkeypatch.setattr(page.time, "sleep", lambda s, naps=naps, nap=time.sleep: (naps.append(s), nap(s)))
        assert a.help(0.05) is None
        monkeypatch.undo()
        assert page._REST_S in naps if is_sealed else max(naps) == page._WARM_S, naps


def test_a_lock_that_changes_hands_is_waited_for(pair, monkeypatch) -> None:
    """Nobody has stopped: the page is not sealed, however often others were faster."""
    a, b = pair
    monkeypatch.setattr(page, "LOCK_TIMEOUT_S", 0.1)
    a.idle()
    lock, end = a._lock, time.monotonic() + 0.4

    def unlucky(byte: int) -> bool:
        if byte == 0 and time.monotonic() < end:
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
        assert time.monotonic() - began < 0.05
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
