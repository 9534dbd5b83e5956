"""Invariant: a small step meets the peers at hand, a large one all or nobody; whoever dies or stops delays others briefly.

The rules of one rank are traced against a fake convoy; ranks that die, stop or idle are real engines and a real server.
"""

import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_serve import Server
from vllm.config import CUDAGraphMode
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from vllm_dwdp import large_steps
from vllm_dwdp.convoy import Round
from vllm_dwdp.counters import Stats
from vllm_dwdp.dispatch import Dispatch
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.integration import dispatching
from vllm_dwdp.integration.binding import _in_parts
from vllm_dwdp.integration.dispatching import HOST_PATIENCE_S, checked, dispatched_sizes, fit_to_round
from vllm_dwdp.integration.helping import Helper
from vllm_dwdp.integration.hooks import CHOOSE_GRAPH
from vllm_dwdp.kernels.tokens import FEW, did_not_come
from vllm_dwdp.limits import Limits

from harness import WORKERS, Group, await_that, generate, reference, stats, streamed_model
from quantized import SHAPE

MOST = 16
HELPED_MOST = 2 * MOST
SMALL, MEDIUM, LARGE = 3, HELPED_MOST, HELPED_MOST + 1
SPARE_S = 1.5
HELP = [Round(7, (0, 1), (0, 5)), Round(8, (0, 1), (0, 2))]  # owed to rank 1 by rank 0
OURS = Round(9, (0, 1), (SMALL, 6))


class Fakes:
    """Meeting, token exchange and stream of rank 0 in one; `calls` is what they were asked to do, in order."""

    def __init__(
        self, owed: Sequence[Round] = (), joined: Round | None = None, looks: int = 0, company: bool = True,
        helped: Round | None = None, late: int = 0,
    ):
        """`owed` are handed out first; `joined` is the next step's round, `helped` a large one's. After `looks` looks a step has
        ended, after `late` looks peers are at hand.
        """
        self._company, self._helped, self._late = company, helped, late
        self.rank, self.size, self.stats = 0, 2, Stats([0, 0])
        self.calls: list[tuple] = []
        self._owed, self._joined, self._looks, self.events = list(owed), joined, looks, 0

    def note(self, *call: Any) -> None:
        self.calls.append(call)

    def said(self) -> list[tuple]:
        """The calls since it was asked last."""
        calls, self.calls = self.calls, []
        return calls

    def _next(self, *call: Any, otherwise: Round | None = None) -> Round | None:
        self.note(*call)
        return self._owed.pop(0) if self._owed else otherwise

    def large(
        self, takes_s: float, num_tokens: int, patience_s: float, is_at_work: Callable[[], bool], goes_along: bool
    ) -> Round | None:
        self.goes_along = goes_along
        offered = (num_tokens, patience_s) if num_tokens or patience_s else ()
        return self._next("large", takes_s, *offered, otherwise=self._helped if num_tokens else None)

    def are_at_hand(self, are_idle: bool) -> bool:
        self.are_idle = are_idle
        self._late -= 1
        return self._late < 0

    def join(
        self, num_tokens: int, patience_s: float, end_s: float, is_at_work: Callable[[], bool], goes_along: bool
    ) -> Round | None:
        self.goes_along = goes_along
        return self._next("join", num_tokens, patience_s, otherwise=self._joined)

    def has_company(self, patience_s: float) -> bool:
        self.note("company", patience_s)
        return self._company

    def leave(self) -> Round | None:
        return self._next("leave")

    def expect(self) -> Round | None:
        return self._next("expect")

    def help(self, timeout_s: float, wake: Callable[[], bool]) -> Round | None:
        return self._next("help", timeout_s)

    def large_done(self) -> None:
        self.note("large done")

    def begin(self, layout: Round) -> None:
        self.note("begin", layout.number, layout.members, layout.tokens)

    def check(self) -> None:
        self.note("check")

    def event(self) -> str:
        self.events += 1
        return f"event {self.events}"  # 1: the end of every step, 2: the last layer of large ones

    def compute_record(self, event: str) -> None:
        if event != "event 1":
            self.note("record", event)

    def is_done(self, event: str) -> bool:
        self.note("look", event)
        self._looks -= 1
        return self._looks < 0


def make(fakes: Fakes, graph_sizes: tuple[int, ...] = (4, 8), small_s: float = 0.0) -> Dispatch:
    limits = Limits(
        max_tokens=MOST, helped_max_tokens=HELPED_MOST, most_rows=HELPED_MOST, graph_sizes=graph_sizes, alone_graph_tokens=4,
        patience_s=lambda tokens: tokens / 1000,
        helped_s=lambda _: 4.0, alone_s=lambda tokens: 7.0 if tokens > MOST else small_s, spare_s=lambda _: SPARE_S,
    )
    made = Dispatch(fakes, fakes, fakes, fakes, limits)
    made.help_out = lambda: fakes.note("help out", made.padded, made.rows(1))
    made.meets = True
    return made


HELPED = [  # padded to the largest step of the round, as its other members are
    [("begin", 7, (0, 1), (0, 5)), ("help out", 8, 16)],
    [("begin", 8, (0, 1), (0, 2)), ("help out", 4, 8)],
]


def test_a_large_step_first_launches_what_it_owes_and_meets_nobody() -> None:
    fakes = Fakes(HELP)
    assert not make(fakes).begin_step(LARGE)
    assert fakes.said() == [("check",), ("large", 7.0), *HELPED[0], ("large", 7.0), *HELPED[1], ("large", 7.0)]


def test_a_large_step_takes_peers_along() -> None:
    """In one round, beyond graphs, after which its rank may be met again; it goes alone where they do not come."""
    fakes = Fakes(HELP[:1], helped=(whole := Round(9, (0, 1), (MEDIUM, 0))))
    made = make(fakes)
    assert made.begin_step(MEDIUM) and made.is_beyond_graphs and made.rows(MEDIUM) == MEDIUM
    assert fakes.said() == [
        ("check",), offer := ("large", 7.0, MEDIUM, SPARE_S), *HELPED[0], offer, ("begin", 9, whole.members, whole.tokens)
    ]
    made.end_step()
    assert not [call for call in fakes.said() if call[0] == "record"], "no peer waits for its end"
    fakes._joined = OURS
    assert made.begin_step(SMALL) and ("large done",) not in fakes.said()
    made.end_step()
    fakes._helped = None
    assert not made.begin_step(MEDIUM)
    made.end_step()
    assert ("record", "event 2") in fakes.said()


def test_a_large_step_that_is_not_ready_asks_nobody() -> None:
    """Its end is told behind the one that peers take part in now."""
    fakes = Fakes(helped=Round(9, (0, 1), (MEDIUM, 0)))
    made = make(fakes)
    made.begin_step(MEDIUM)
    made.end_step()
    fakes.said()
    made.begin_step(MEDIUM, is_ready=False)
    assert fakes.said() == [("check",), ("large", pytest.approx(11.0, abs=0.5))]


def test_a_small_step_that_is_not_ready_goes_alone() -> None:
    """No peer's device waits in a round for a prompt's images to be encoded, or for KV to be loaded."""
    made = make(fakes := Fakes(joined=OURS))
    made.begin_step(SMALL, is_ready=False)
    assert fakes.said()[:2] == [("check",), ("large", pytest.approx(0.0, abs=0.5))] and made.padded == 4
    made.end_step()
    assert ("record", "event 2") in fakes.said(), "peers know when its device has ended it"


def test_a_small_step_goes_with_a_large_one_and_not_with_two_in_a_row() -> None:
    """Whichever of the two comes first."""
    fakes = Fakes(joined=(whole := Round(9, (0, 1), (SMALL, MEDIUM))))
    made = make(fakes)
    made.begin_step(SMALL)
    assert fakes.goes_along
    assert made.is_beyond_graphs and made.padded == 0 and fakes.said()[-1] == ("begin", 9, (0, 1), whole.tokens)
    made.end_step()
    made.begin_step(MEDIUM)
    assert not fakes.goes_along
    made.end_step()
    fakes._joined = OURS
    made.begin_step(SMALL)
    made.end_step()
    assert not fakes.goes_along, "that round was the first without one"
    made.begin_step(MEDIUM)
    assert fakes.goes_along


@pytest.mark.parametrize(("looks", "late", "takes_s"), [(0, 1, 7.0), (9, 0, 3.5), (9, 1, 14.0)])
def test_a_large_step_that_has_ended_stands_in_no_peers_way(looks: int, late: int, takes_s: float) -> None:
    """The next one may take them along, and waits for its end while they are at hand; else it is launched behind, alone."""
    fakes = Fakes(looks=looks, late=late)
    made = make(fakes)
    made.begin_step(LARGE)
    made.end_step()
    fakes.said()
    assert not made.begin_step(MEDIUM)
    said, large = [call for call in fakes.said() if call[0] != "look"], ("large", pytest.approx(takes_s, rel=0.01), MEDIUM, SPARE_S)
    assert said == [("check",), *([("large done",)] if takes_s < 14.0 else []), large]
    assert fakes.events == 2, "the driver frees none"


@pytest.mark.parametrize("theirs", [6, MEDIUM], ids=["small", "large"])
def test_after_a_round_with_a_large_step_the_next_one_counts_on_idle_ranks_alone(theirs: int) -> None:
    """No small step goes with two large ones in a row: a busy rank would be waited for in vain."""
    fakes = Fakes(joined=Round(9, (0, 1), (SMALL, theirs)), looks=10**9, late=1)
    made = make(fakes)
    for tokens in (SMALL, LARGE, MEDIUM):
        made.begin_step(tokens)
        made.end_step()
    assert fakes.are_idle == (theirs == MEDIUM)


def test_a_small_step_first_launches_what_it_owes_then_joins_again() -> None:
    fakes = Fakes(HELP, OURS)
    made = make(fakes)
    assert made.begin_step(SMALL) and made.padded == 8
    join = ("join", SMALL, SMALL / 1000)
    assert fakes.said() == [
        ("check",), join, *HELPED[0], join, *HELPED[1], join, ("begin", 9, (0, 1), (SMALL, 6))
    ]
    made.begin_step(MOST)
    assert fakes.said()[1] == ("join", MOST, MOST / 1000), "the largest of the small"


@pytest.mark.parametrize("what", ["leave", "expect"])
def test_a_rank_that_goes_first_launches_what_it_owes(what: str) -> None:
    fakes = Fakes(HELP)
    getattr(make(fakes), what)()
    assert fakes.said() == [(what,), *HELPED[0], (what,), *HELPED[1], (what,)]


def test_an_engine_that_warms_up_meets_nobody() -> None:
    """Its small steps are in graphs or not, as later those that go alone."""
    fakes = Fakes(HELP, OURS)
    made = make(fakes)
    made.meets = False
    assert not made.begin_step(LARGE) and made.begin_step(SMALL)
    assert fakes.said() == [("check",), ("check",), ("begin", 0, (0,), (SMALL, 0))]


@pytest.mark.parametrize("is_graph", [False, True])
def test_after_a_large_step_peers_are_met_when_the_device_is_at_its_last_layer(is_graph: bool) -> None:
    """The host runs ahead: large steps leave one event, in the last of them, and nobody waits between them."""
    fakes = Fakes(joined=OURS, looks=4)
    made = make(fakes)
    for _ in range(3):
        made.begin_step(LARGE)
        if not is_graph:
            made.reach_last_layer()
        fakes.note("last layer")
        made.end_step()
    step = [("record", "event 2"), ("last layer",)]
    step = step[::-1] if is_graph else step
    first, behind_another = ("large", 7.0), ("large", 14.0)
    assert fakes.said() == [("check",), first, *step, *[("check",), ("look", "event 2"), behind_another, *step] * 2]
    made.begin_step(SMALL)
    assert [name for name, *_ in fakes.said()] == ["check", "look", "company", "look", "look", "large done", "join", "begin"]
    assert fakes.stats.waited_s > 0, "for the device"
    made.reach_last_layer()
    made.end_step()
    made.begin_step(SMALL)
    assert [name for name, *_ in fakes.said()] == ["check", "join", "begin"], "that was said once"


def test_a_step_alone_that_outlasts_the_patience_counts_as_large() -> None:
    """Peers wait for it until it ends, or not at all, and its rank meets nobody before that."""
    fakes = Fakes(looks=1)
    made = make(fakes, small_s=0.002 * SMALL)
    assert made.begin_step(SMALL), "alone in a graph"
    made.end_step()
    assert fakes.said() == [
        ("check",), ("join", SMALL, SMALL / 1000), ("large", 0.002 * SMALL), ("begin", 0, (0,), (SMALL, 0)), ("record", "event 2")
    ]
    made.begin_step(MOST)
    assert [name for name, *_ in fakes.said()] == ["check", "look", "company", "look", "large done", "join"]
    made.end_step()
    assert fakes.said() == [], "16 ms of patience outlast 6 ms alone"


def test_a_step_that_can_meet_nobody_is_launched_behind_a_large_one() -> None:
    fakes = Fakes(looks=10**9, company=False)
    made = make(fakes)
    made.begin_step(LARGE)
    made.end_step()
    fakes.said()
    made.begin_step(SMALL)
    assert [name for name, *_ in fakes.said()] == ["check", "look", "company", "join", "begin"]


def test_a_large_step_without_end_is_waited_for_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank then goes alone: its peers are not told that it takes part again."""
    monkeypatch.setattr(large_steps, "WORK_S", 0.02)
    fakes = Fakes(looks=10**9)
    made = make(fakes)
    made.begin_step(LARGE)
    made.end_step()
    made.begin_step(SMALL)
    assert "large done" not in [name for name, *_ in fakes.said()]


def test_an_idle_rank_never_waits() -> None:
    fakes = Fakes(HELP[:1], looks=1)
    made = make(fakes)
    made._large_steps._is_marked = True
    assert made.help() and not made.help()
    assert fakes.said() == [
        ("check",), ("look", "event 2"), ("help", 0.0), *HELPED[0],
        ("check",), *[("look", "event 2")] * 2, ("large done",), ("help", 0.0),
    ]
    assert made.padded == 0 and made.rows(1) == 2, "the round is over"


def config_of(mode: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(compilation_config=types.SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode]))


@pytest.mark.parametrize(
    ("sizes", "tokens", "rows", "need_eager"),
    [((4, 8), 6, 8, False), ((4, 8), 8, 8, False), ((4, 8), 9, SMALL, True), ((4, 8), None, 4, False),
     ((), 6, SMALL, True), ((), None, SMALL, False)],  # where all graphs are larger than what dispatches
)
def test_vllm_runs_the_graph_that_a_round_has_agreed_on_or_none(
    sizes: tuple[int, ...], tokens: int | None, rows: int, need_eager: bool
) -> None:
    """All members launch the same: a graph of the largest step's, or no graph where none is as large."""
    asked = []

    def choose(
        manager: Any, num_reqs: int, num_tokens: int, uniform_token_count: Any, *, max_query_len: Any, need_eager: bool = False
    ) -> None:
        asked.append((num_reqs, num_tokens, need_eager))

    with pytest.MonkeyPatch.context() as patch:
        runner = types.SimpleNamespace(dispatch_cg_and_sync_dp=choose)
        patch.setitem(sys.modules, CHOOSE_GRAPH.module, runner)
        patch.setattr(dispatching, "has_graphs", lambda _: True)
        for _ in range(2):  # an engine, and one after it in the same process
            made = make(Fakes(joined=tokens and Round(9, (0, 1), (SMALL, tokens))), sizes)
            fit_to_round(config_of("FULL_AND_PIECEWISE"), made)
            made.begin_step(SMALL)
            runner.dispatch_cg_and_sync_dp(None, 2, SMALL, None, need_eager=False)
            made.end_step()
    assert asked == [(2, rows, need_eager)] * 2


@pytest.mark.parametrize(("own", "others", "is_whole"), [(3, 8, False), (4, 8, True), (6, 2, True), (2, 4, True)])
def test_a_step_of_few_rows_beside_a_prompt_has_a_graph_in_pieces(monkeypatch, own: int, others: int, is_whole: bool) -> None:
    """That of a whole decode step attends to as many requests as it has rows, which costs a helper more than its experts."""
    asked = []
    runner = types.SimpleNamespace(dispatch_cg_and_sync_dp=lambda *args, **kwargs: asked.append((*args[1:4], kwargs)))
    monkeypatch.setitem(sys.modules, CHOOSE_GRAPH.module, runner)
    monkeypatch.setattr(dispatching, "has_graphs", lambda _: True)
    monkeypatch.setattr(dispatching, "WHOLE_ROWS", 4)
    made = make(Fakes(joined=Round(9, (0, 1), (own, others))), (4, 8))
    for mode in ("FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"):  # one engine after the other
        fit_to_round(config_of(mode), made)
        made.begin_step(own)
        runner.dispatch_cg_and_sync_dp(None, own, own, 1, max_query_len=1)
        made.end_step()
    rows = made.limits.padded((own, others))
    assert asked[0] == (own, rows, 1, {"max_query_len": 1, "need_eager": False}), "prompts have no graph there"
    said = 1 if is_whole else None
    assert asked[1] == (own, rows, said, {"max_query_len": said, "need_eager": False})


@pytest.mark.parametrize(
    ("length", "dynamic"), [*((n, False) for n in (1, 2, 3, 4, 5, 7, 9, 17)), (2, True), (3, True), (5, True), (8, True)]
)
@pytest.mark.parametrize("most", [100, 256, 512, 600, 2000])
def test_no_graph_that_dispatches_is_chosen_for_a_step_that_does_not(most: int, length: int, dynamic: bool) -> None:
    """Nor the other way round, among vLLM's graphs of requests that decode `length` tokens each, or up to as many.

    Members of a round lay their rows out alike: none has a graph within FEW, or of a small step, where another has not.
    """
    sizes = [1, 2, 4, *range(8, 513, 8), *range(640, 1024, 128), *range(1024, 2049, 256)]
    lengths, helped = range(1, length + 1) if dynamic else [length], max(most, 1500)
    manager = object.__new__(CudaGraphManager)
    speculative = types.SimpleNamespace(
        uses_dynamic_speculative_decoding=lambda: dynamic, num_speculative_tokens_per_batch_size=[
            (4 * i + 1, 4 * i + 4, length - i - 1) for i in range(length)],
    )
    vars(manager).update(
        compilation_config=types.SimpleNamespace(cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=2048),
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, max_num_reqs=1024, decode_query_len=length, varlen_decode=False,
        lora_capture_cases=[0], ubatch_runner=None, _candidates={}, _capture_descs={}, _graphs_captured=True,
        _lora_dispatch_map={}, _max_lora_case=0, vllm_config=types.SimpleNamespace(
            speculative_config=speculative, num_speculative_tokens=length - 1,
            cache_config=types.SimpleNamespace(use_kda_recoverssm=False)),
    )
    manager._init_candidates()
    made = make(Fakes(), tuple(dispatched_sizes(sizes, (most, helped), lengths)))
    assert made.limits.graph_sizes or dynamic or math.lcm(8, length) > most
    for tokens in range(1, 2049):
        padded = made.limits.padded((tokens,))
        for each in (None, *lengths):
            if each is None or tokens % each == 0:
                rows = max(padded, tokens)
                assert padded <= max(2 * tokens, tokens + 128), "a small step is not padded to a large one"
                graph = manager.dispatch(tokens // (each or 1), rows, each, 0)  # the batch's own, but for its rows
                assert graph.cg_mode != CUDAGraphMode.NONE
                assert (made.rows(graph.num_tokens) is None) == (padded == 0), (tokens, graph)
                for bound in (FEW, most, helped):
                    assert not padded or (padded <= bound) == (graph.num_tokens <= bound), (tokens, graph)


@pytest.mark.parametrize(("graph_sizes", "alone"), [((4, 8), 8), ((), None)])
def test_rows(graph_sizes: tuple[int, ...], alone: int | None) -> None:
    """A layer has room for all that a graph may bring together, without a graph for the round; a large step does not dispatch."""
    fakes = Fakes(joined=OURS)
    made = make(fakes, graph_sizes)
    for _ in range(2):  # before any step, and after one: warm-ups and captures
        assert [made.rows(rows) for rows in (1, 8, 9)] == ([2, 16, None] if graph_sizes else [None] * 3)
        assert not [call for call in fakes.said() if call[0] in ("join", "large", "help")]
        assert made.begin_step(SMALL) and made.rows(8) == (16 if graph_sizes else sum(OURS.tokens))
        with pytest.raises(DWDPError, match=f"a MoE layer has {SMALL - 1} rows in a step that was to have {SMALL} tokens"):
            made.rows(SMALL - 1)
        made.end_step()
        fakes.said()
    made.begin_step(LARGE)
    assert made.rows(LARGE) is None and made.rows(4) is None
    made.end_step()
    fakes._joined = None
    assert made.begin_step(SMALL) == bool(graph_sizes)
    assert made.rows(SMALL) == alone and made.padded == (4 if alone else 0)
    if graph_sizes:
        assert fakes.said()[-1] == ("begin", 0, (0,), (SMALL, 0))


@pytest.mark.parametrize(
    ("most", "helped", "largest", "limit", "bounds"),
    [(3447, 8192, 8192, 8192, [3440, 8192]), (3447, 8192, 16384, 8192, [3440, 8192]), (1024, 2048, 2048, 8192, [1024, 2048]),
     (2000, 3900, 4000, 8192, [2000, 3488]), (2000, 4000, 4000, 8192, [2000, 4000]), (128, 128, 2048, 8192, [128]),
     (3447, 8192, 8192, 2000, [2000]), (3447, 8192, 8192, 0, [0])],
)
def test_graphs_are_captured_for_what_vllm_has_buffers_for(most: int, helped: int, largest: int, limit: int, bounds: list[int]) -> None:
    found = dispatching.graph_bounds(most, helped, largest, 2, limit)
    limits = dataclasses.replace(make(Fakes()).limits, max_tokens=most, helped_max_tokens=helped)
    assert found == bounds and (found[-1] == largest or limits.rows(found[-1], 2) <= largest)


@pytest.mark.parametrize(
    ("tokens", "padded", "rows"),
    [((500, 512), 512, 1024), ((512, 600), 640, 1280), ((3000, 3072), 3072, 6144), ((2049, 16), 3072, 6144), ((0, 3000), 3072, 6144),
     ((6000, 500), 6144, 6656), ((6144, 512), 6144, 6656), ((6144, 513), 0, None), ((8192, 16), 8192, 8704), ((8193, 1), 0, None),
     ((3100, 3100), 0, None)],
)
def test_a_graph_of_a_large_step_has_room_for_few_rows_of_others(tokens: tuple[int, int], padded: int, rows: int | None) -> None:
    """Small steps of all ranks have room in one graph. A round that has not runs without."""
    limits = dataclasses.replace(
        make(Fakes()).limits, max_tokens=3447, helped_max_tokens=8192, graph_sizes=(512, 640, 1024, 3072, 4096, 6144, 8192)
    )
    assert limits.padded(tokens) == limits.padded(tokens[::-1]) == padded
    assert rows is None or limits.rows(padded, 2) == rows


def test_a_step_alone_does_not_replay_a_graph_that_reads_in_place_for_longer_than_streaming() -> None:
    """It runs without a graph; the same step in a round, and a helper's forward right after it, have theirs."""
    fakes = Fakes(joined=OURS)
    made = make(fakes)
    assert made.begin_step(8) and not made.is_beyond_graphs
    made.end_step()
    fakes._joined = None
    assert not made.begin_step(8) and made.is_beyond_graphs and made.rows(8) is None and made.padded == 0
    made.end_step()
    made.help_out = lambda: fakes.note("help out", made.is_beyond_graphs)
    fakes._owed = HELP[:1]
    assert made.help() and ("help out", False) in fakes.said()
    assert not made.begin_step(LARGE) and not made.is_beyond_graphs, "vLLM's own graph of that size streams, if it has one"


def test_a_rehearsal_is_steps_alone_in_no_graph_of_counts_that_16_divides_and_does_not() -> None:
    fakes = Fakes(joined=OURS)
    made = make(fakes)
    made.rehearse(lambda tokens: fakes.note("forward", tokens, made.is_beyond_graphs, made.rows(tokens)), LARGE)
    assert MOST % 16 == 0 and fakes.said() == [
        said for tokens in (MOST - 1, MOST, HELPED_MOST - 1, HELPED_MOST)
        for said in [("begin", 0, (0,), (tokens, 0)), ("forward", tokens, True, tokens)]
    ]
    assert made.rows(1) == 2 and not made.is_beyond_graphs, "it is over"
    made.rehearse(lambda tokens: made.rows(tokens - 1), MOST)  # as where a draft model takes a row of each request
    tried: list[int] = []
    made.rehearse(tried.append, MOST)
    assert tried == [MOST - 1, MOST], "no step has more tokens than all its requests at their longest"
    padded = make(graphs := Fakes(), (MOST, HELPED_MOST))
    padded.rehearse(lambda tokens: graphs.note("forward", tokens, padded.rows(tokens)), LARGE)
    rehearsed = [call[1:] for call in graphs.said() if call[0] == "forward"]
    assert rehearsed == [(count, count) for count in (MOST - 1, MOST, HELPED_MOST - 1, HELPED_MOST)], "graphs are captured later"
    made.limits = dataclasses.replace(made.limits, max_tokens=4 * FEW, helped_max_tokens=8 * FEW)
    tried.clear()
    made.rehearse(tried.append, 16 * FEW)
    assert tried == [count - odd for count in (FEW, 4 * FEW, 8 * FEW) for odd in (1, 0)], "on both sides of what goes row by row"


def test_a_member_that_did_not_come_is_named_before_the_next_step() -> None:
    fakes = Fakes(HELP)
    fakes.check = lambda: 1 / 0
    made = make(fakes)
    for step in (lambda: made.begin_step(SMALL), lambda: made.begin_step(LARGE), made.help, made.check):
        with pytest.raises(ZeroDivisionError):
            step()
    assert not fakes.said()


SOON_S = 2.0
LONG = "x" * 1400


def meetings(llm: Any) -> dict[str, Any]:
    return stats(llm)["dispatch"]


def has_helpers(llm: Any) -> bool:
    return streamed_model(llm).dispatch._meeting.are_at_hand(are_idle=True)


def told(llm: Any) -> list[str]:
    """What a step of 200 tokens, which is large, and one of a token tell their Dispatch, in order."""
    dispatch, calls = streamed_model(llm).dispatch, []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("reach_last_layer", "end_step"):
            method = getattr(dispatch, name)
            patch.setattr(dispatch, name, lambda name=name, method=method: [calls.append(name), method()])
        generate(llm, lengths=[200], tokens=2)
    return calls


@pytest.mark.engine
def test_peers_that_stop_or_end_between_rounds(models) -> None:
    """The others go on alone, and meet again whoever comes back."""
    model = models("qwen3_moe")
    expected = reference(model)
    with Group(model, 2) as group:
        first, second = group.ranks
        assert group.run(generate) == [expected] * 2
        before = first.run(meetings)
        assert before["steps"] > 10
        os.kill(second.process.pid, signal.SIGSTOP)
        try:
            assert first.run(generate) == expected
            stopped = first.run(meetings)
            assert stopped["steps"] == before["steps"] and stopped["alone"] >= before["alone"] + 24
            assert stopped["timeouts"][1] <= before["timeouts"][1] + 1, "it is waited for once"
            assert stopped["waited_s"] < before["waited_s"] + HOST_PATIENCE_S + 0.4
        finally:
            os.kill(second.process.pid, signal.SIGCONT)
        assert group.run(generate) == [expected] * 2
        again = first.run(meetings)
        assert again["steps"] > stopped["steps"] + 10
        assert first.run(told)[:3] == ["reach_last_layer", "end_step", "reach_last_layer"], "first from within the forward"
        second.process.kill()
        second.process.join()
        assert first.run(generate) == expected
        assert first.run(meetings)["steps"] == again["steps"]


def offer_all(rank: int) -> None:
    """Steps of up to 256 tokens are offered to all ranks, who take part, on a GPU too, where a tiny model's would not gain."""
    limits = dispatching.limits
    dispatching.limits = lambda *args: dataclasses.replace(
        limits(*args), helped_max_tokens=256, spare_s=lambda _: HOST_PATIENCE_S
    )


def offer_all_and_count(rank: int) -> None:
    """And note each call of vLLM's attention."""
    offer_all(rank)
    init = Helper.__init__

    def counting(self: Helper, worker: Any, dispatch: Dispatch, layers: Iterable[Any]) -> None:
        dispatch.attended, layers = [], list(layers)
        for layer in layers:
            for name in ("forward", "do_kv_cache_update"):
                if method := getattr(getattr(layer, "impl", None), name, None):
                    noted = functools.partial(noting, dispatch.attended, method)
                    setattr(layer.impl, name, functools.wraps(method)(noted))
        init(self, worker, dispatch, layers)

    Helper.__init__ = counting


def noting(calls: list[str], method: Callable, *args: Any, **kwargs: Any) -> Any:
    calls.append(method.__name__)
    return method(*args, **kwargs)


def attended(llm: Any) -> int:
    return len(streamed_model(llm).dispatch.attended)


def lend(llm: Any, over: Path) -> None:
    while not over.exists():
        llm.llm_engine.model_executor.driver_worker.worker.dwdp_help()


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_prompts_with_which_an_idle_rank_helps_are_answered_as_by_stock_vllm(models, tmp_path: Path, kind: str) -> None:
    model, work = models("qwen3_moe", **SHAPE | dict(dtype="float32")), functools.partial(generate, lengths=(200, 255, 90), tokens=6)
    with Group(model, 0) as stock:
        (expected,) = stock.run(work)
    with Group(model, 2, {"dispatch_max_tokens": 16}, setup=offer_all_and_count) as group:
        first, second = group.ranks
        was, calls = first.run(stats)["forwards"], group.run(attended)
        second.send(lend, over := tmp_path / "over")
        await_that(lambda: first.run(has_helpers), "rank 1 to be idle")
        assert first.run(work) == expected
        over.touch()
        second.answer(60)
        assert first.run(attended) > calls[0] and second.run(attended) == calls[1], "a helper attends to nothing"
        now, (met, helped) = first.run(stats)["forwards"], group.run(meetings)
    steps = now["dispatched"] - was["dispatched"]
    assert steps >= 8 and now["streamed"] == was["streamed"] and now["direct"] == was["direct"]
    assert met["rounds"] == helped["helper_rounds"] == steps


def count_mixed(llm: Any) -> list[Round]:
    """Note the rounds from now on in which this rank's step and a large one of a peer are together."""
    dispatch, found = streamed_model(llm).dispatch, []
    begin = dispatch._begin

    def noting(layout: Round) -> None:
        if all(layout.tokens) and max(layout.tokens) > dispatch.limits.max_tokens:
            found.append(layout)
        begin(layout)

    dispatch._begin, dispatch.mixed = noting, found
    return found


def mixed(llm: Any) -> list[Round]:
    return streamed_model(llm).dispatch.mixed


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_prompts_that_a_rank_that_decodes_goes_along_with_are_answered_as_by_stock_vllm(models, kind: str) -> None:
    """Both ranks have both kinds of step, by turns; never two large ones in a row. Some rounds have more rows than a step may have."""
    model = models("qwen3_moe", **SHAPE | dict(dtype="float32"))
    works = [functools.partial(generate, lengths=lengths, tokens=40, one_by_one=True) for lengths in (
        (9, 200, 12, 256, 90, 10), (256, 8, 130, 11, 256, 9))]
    engine = {"max_model_len": 512}
    with Group(model, 0, engine=engine) as stock:
        expected = [stock.run(work)[0] for work in works]
    with Group(model, 2, {"dispatch_max_tokens": 16}, engine=engine, setup=offer_all) as group:
        group.run(count_mixed)
        for rank, work in zip(group.ranks, works, strict=True):
            rank.send(work)
        assert [rank.answer() for rank in group.ranks] == expected
        first, second = group.run(mixed)
    print(first)
    assert first == second and len(first) >= 2 and max(sum(made.tokens) for made in first) > 256
    numbers = [made.number for made in first]
    assert all(later - sooner > 1 for sooner, later in itertools.pairwise(numbers))


@pytest.mark.parametrize(("count", "parts"), [(4, [4]), (5, [3, 2]), (8, [4, 4])], ids=str)
def test_a_round_of_more_rows_than_a_step_has_computes_shared_experts_once(count: int, parts: list[int]) -> None:
    """With each part go the weights and ids of its rows; shared experts are for own rows, which are not parted."""
    own, asked, computed = torch.randn(2, 3), [], []

    def forward(
        rows: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, shared_experts: Callable | None,
        shared_experts_input: torch.Tensor,
    ) -> torch.Tensor:
        computed.append(len(rows))
        if shared_experts is not None:
            shared_experts(shared_experts_input)
        return rows * topk_weights + topk_ids

    rows, weights, ids = torch.randn(count, 3), torch.randn(count, 1), torch.arange(count).view(-1, 1)
    given = dict(topk_weights=weights, topk_ids=ids, shared_experts=asked.append, shared_experts_input=own)
    assert torch.equal(_in_parts(forward, rows, given, most=4), rows * weights + ids)
    assert computed == parts and len(asked) == 1 and asked[0] is own


@pytest.mark.parametrize("is_async", [False, True])
def test_no_tokens_of_a_round_that_a_member_did_not_come_to(is_async: bool) -> None:
    """An output that a GPU has yet to make is held against the round when the engine takes it."""
    class Later(AsyncModelRunnerOutput):
        def get_output(self) -> str:
            wrong.append("known by now")
            return "tokens"

        def get_kv_connector_output(self) -> str:
            return "blocks"

    class Rounds:
        def check(self) -> None:
            if wrong:
                raise did_not_come(1)

    wrong: list[str] = [] if is_async else ["known"]
    with pytest.raises(DWDPError, match="rank 1 did not come"):
        taken = checked(Later() if is_async else "tokens", Rounds())
        assert is_async and taken.get_kv_connector_output() == "blocks"
        taken.get_output()


def end_inside_a_round(kind: str, rank: int) -> None:
    """Rank 1 ends, or stops for ever, inside a round: after its rows have been sent, before its sums."""
    from vllm_dwdp.kernels import tokens_host

    tokens_host.WAIT_S = SOON_S
    if rank == 0:
        return
    combine, seen = tokens_host.HostTokens.combine, iter(range(10**9))

    def end(self: Any, *args: Any) -> Any:
        if self._peers and next(seen) == 9:
            os.kill(os.getpid(), signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
        return combine(self, *args)

    tokens_host.HostTokens.combine = end


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["killed", "stopped"])
def test_a_member_that_ends_inside_a_round(models, kind: str) -> None:
    """The others' step ends in one line that names it: at once when it has died, else within the bound."""
    with Group(models("qwen3_moe"), 2, setup=functools.partial(end_inside_a_round, kind)) as group:
        for rank in group.ranks:
            rank.send(generate)
        began = time.monotonic()
        with pytest.raises(RuntimeError) as failed:
            group.ranks[0].answer(SOON_S + 30)
        took = time.monotonic() - began
        group.ranks[1].process.kill()
        assert str(failed.value).startswith("DWDPError: rank 1 did not come to a round that it had agreed to")
        assert "\n" not in str(failed.value)
        assert took < SOON_S + 5 if kind == "stopped" else took < SOON_S, took


@pytest.fixture(scope="module", name="server")
def serving(models, tmp_path_factory: pytest.TempPathFactory):
    """Two ranks; a chunk of a prompt, of 64 tokens, is large, a decode is small."""
    folder: Path = tmp_path_factory.mktemp("dispatch")
    with Server(models("qwen3_moe"), folder, "--data-parallel-size", "2", "--parallel", "dwdp", *WORKERS) as server:
        yield server


def seen(server: Server, rank: int) -> collections.Counter[str]:
    """What /metrics says of a rank's steps and meetings; its steps by view too."""
    found: collections.Counter[str] = collections.Counter()
    for name, labels, value in server.metrics():
        if name.startswith("vllm:dwdp_") and labels["engine"] == str(rank):
            found[name.removeprefix("vllm:dwdp_").removesuffix("_total")] += value
            found[labels.get("view", "")] += value
    return found


def during(server: Server, work: Any) -> tuple[Any, list[collections.Counter[str]]]:
    """What `work()` returns, and what both ranks have done meanwhile."""
    time.sleep(0.3)  # counters of what came before settle
    before = [seen(server, rank) for rank in (0, 1)]
    result = work()
    time.sleep(0.3)
    after = [seen(server, rank) for rank in (0, 1)]
    for was, now in zip(before, after, strict=True):
        now.subtract(was)
    return result, after


def cpu_s(server: Server) -> float:
    """CPU seconds that the server's processes have used."""
    return sum(sum(process.cpu_times()[:2]) for process in server.members())


@pytest.mark.engine
def test_an_idle_rank_helps_and_takes_no_step(server: Server) -> None:
    """It computes its experts for rank 0's steps; its scheduler runs none; its own request is answered."""
    server.complete("hello", 2, rank=1)
    time.sleep(2.0)  # the ranks look less and less often
    began, used_s = time.monotonic(), cpu_s(server)
    time.sleep(2.0)
    assert cpu_s(server) - used_s < 0.3 * (time.monotonic() - began), "of one core, by all processes"
    text, (busy, idle) = during(server, lambda: server.complete("hello", 100, rank=0))
    assert busy["dispatched"] > 0.95 * busy["forwards"] and busy["forwards"] in (100, 101)
    assert idle["forwards"] == 0 and idle["helper_rounds"] == idle["rounds"] == busy["rounds"] > 95
    assert busy["participants"] == 2 * busy["rounds"] and busy["helper_rounds"] == 0
    with server.request("hello", 400, rank=0, stream=True) as long:
        assert long.readline().startswith(b"data:")
        assert server.complete("hello", 100, rank=1) == text
        assert b"[DONE]" in long.read()


@pytest.mark.engine
def test_an_idle_rank_helps_with_a_long_prompt(server: Server) -> None:
    """Every large step of it is a round of both ranks, which streams nothing; a rank that decodes takes no part."""
    text, (busy, idle) = during(server, lambda: server.complete(LONG, 4, rank=0))
    assert busy["dispatched"] == busy["forwards"] == busy["rounds"] >= 25 and busy["prefetch_bytes"] == 0
    assert idle["forwards"] == 0 and idle["helper_rounds"] == busy["rounds"]
    with server.request("hello", 400, rank=1, stream=True) as decoding:
        assert decoding.readline().startswith(b"data:")
        again, (alone, _) = during(server, lambda: server.complete(LONG, 4, rank=0))
        decoding.close()
    assert again == text and alone["streamed"] > 15


@pytest.mark.engine
def test_ranks_that_decode_dispatch(server: Server) -> None:
    """Nearly every step of two busy ranks is a round of both."""
    def both() -> list[str]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda rank: server.complete("hello", 150, rank=rank), (0, 1)))

    texts, ranks = during(server, both)
    assert texts[0] == texts[1]
    for rank in ranks:
        assert rank["dispatched"] > 0.95 * rank["forwards"] and rank["forwards"] >= 150
        assert rank["participants"] == 2 * rank["rounds"]


@pytest.mark.engine
def test_a_rank_that_holds_kv_for_a_decoder_helps(models, tmp_path: Path) -> None:
    """Its engine steps on, without a token: no peer waits for it, and every step has its help."""
    connector = {"kv_connector": "HoldingConnector", "kv_connector_module_path": "holding", "kv_role": "kv_both",
                 "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)}}
    asked = ["--data-parallel-size", "2", "--parallel", "dwdp", "--kv-transfer-config", json.dumps(connector), *WORKERS]
    with Server(models("qwen3_moe"), tmp_path, *asked) as server:
        server.complete("hello", 2, rank=1)
        _, (busy, holding) = during(server, lambda: server.complete("hello", 100, rank=0))
        assert busy["dispatched"] > 0.95 * busy["forwards"] and busy["forwards"] in (100, 101)
        assert holding["forwards"] == 0 and holding["helper_rounds"] > 95 and busy["timeouts"] == 0
        assert server.complete("hello", 2, rank=1)


@pytest.mark.engine
def test_a_long_prefill_is_not_waited_for(server: Server) -> None:
    """While rank 1 prefills prompt after prompt in large steps, rank 0's steps do not wait for those."""
    def work() -> str:
        with ThreadPoolExecutor(1) as pool:
            prompts = pool.map(lambda i: server.complete(f"{i}" + LONG, 1, rank=1), range(4))
            text = server.complete("hello", 100, rank=0)
            list(prompts)
            return text

    text, (decoding, prefilling) = during(server, work)
    assert text == server.complete("hello", 100, rank=0)
    assert prefilling["forwards"] >= 4 * 22 and prefilling["streamed"] > 22, "but for those that begin when rank 0 is idle"
    assert decoding["alone"] > 10
    assert decoding["meeting_seconds"] < 1.0, "a wait for each large step would be many times as long"
    print(decoding, prefilling)
