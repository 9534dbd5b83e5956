"""Dispatch: the steps whose tokens travel. Meets the peers before a step, and says how its layers are laid out.

A step of at most `max_tokens` is worth meeting for: it takes part in a round with the ranks that are at hand, or goes
alone. A larger one goes with all other ranks, if it has at most `helped_max_tokens` and each of them is idle or comes with
a small step and the last round had no large one, else alone, and then its rank takes part again when its device has reached
the last layer of it: the host then prepares the next step while that layer runs, for which peers may have to wait. A step
that went alone and takes longer than its rank waits for peers counts as large, too: peers who took it for a short one would
give up just before it ends and go alone in turn, without end. An idle rank helps.
"""

import bisect
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from vllm_dwdp.convoy import Round
from vllm_dwdp.kernels.device import Block, CopyStream
from vllm_dwdp.kernels.tokens import FEW, TokenExchange, alone
from vllm_dwdp.meeting import WORK_S, Meeting
from vllm_dwdp.rendezvous import DispatchManifest

_LOOK_S = 50e-6
APART = 0.55  # of two ranks that go alone by turns, one waits for the other: half a step alone at most, and some more
MOST_PACE = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Which steps meet, and for how long they wait for it.

    `graph_sizes` are the rows of the graphs that dispatch, ascending. `most_rows` are the most that vLLM's expert buffers hold: a
    larger round is computed in halves. A step without peers that has more than `alone_graph_tokens` runs without a graph.

    `helped_max_tokens`, no less than `max_tokens`, are of steps in which all other ranks take part; `helped_s` and `alone_s` are
    how long such a step, and one that goes without peers, are expected to take on the device; `spare_s` is how long a large step
    waits for ranks that come soon.
    """

    max_tokens: int
    helped_max_tokens: int
    most_rows: int
    graph_sizes: Sequence[int]
    alone_graph_tokens: int
    patience_s: Callable[[int], float]
    helped_s: Callable[[int], float]
    alone_s: Callable[[int], float]
    spare_s: Callable[[int], float]

    def manifest(self) -> DispatchManifest:
        """What has to be alike on all ranks, whose rows and flags lie in each other's inboxes."""
        return DispatchManifest(
            dispatch_max_tokens=self.max_tokens, helped_max_tokens=self.helped_max_tokens,
            cudagraph_capture_sizes=list(self.graph_sizes),
        )

    def padded(self, tokens: Sequence[int]) -> int:
        """What ranks with so many rows pad them to, so that all launch the same graph; 0 where none has room for all."""
        at = bisect.bisect_left(self.graph_sizes, max(tokens))
        found = self.graph_sizes[at] if at < len(self.graph_sizes) else 0
        return found if sum(tokens) <= self.rows(found, len(tokens)) else 0

    def rows(self, padded: int, size: int) -> int:
        """The rows of a graph's layers, own and received: where a step is large, the peers' are few."""
        return padded * size if padded <= self.max_tokens else min(padded * size, padded + FEW * (size - 1))


class Announced(NamedTuple):
    """What peers were told of the last large step, in seconds."""

    at: float = 0.0
    takes: float = 0.0  # by itself
    ends_in: float = 0.0  # behind the one before it
    is_small: bool = False


class Dispatch:
    """One rank's dispatched steps. Only the thread that runs the model may call it, but for `report`.

    `help_out`, which the worker sets, runs a forward of a dummy row, in which this rank computes its experts for the members of a round.
    `meets` is set once the engine has warmed up: its steps until then go alone, however long they compile kernels.
    """

    def __init__(self, inbox: Block, tokens: TokenExchange, meeting: Meeting, stream: CopyStream, limits: Limits):
        self.inbox, self.tokens, self.limits = inbox, tokens, limits
        self.help_out: Callable[[], None] = lambda: None
        self.meets = False
        self._meeting, self._stream = meeting, stream
        self._round: Round | None = None  # of the step under way, if its layers dispatch
        self._padded = 0
        self._in_step = self._is_streamed = False  # a step is under way; alone, and must not replay the graph of its size
        self._last = stream.event()  # the end of the last step
        self._ending = stream.event()  # the last layer of the last large step
        self._is_large = False  # peers know of one
        self._announced = Announced()
        self._was_large = False  # the last round had a large step
        self._helped_until_s = 0.0  # when the last large step in which all ranks took part is expected to have ended
        self._paces = {False: 1.0, True: 1.0}  # what large, and small, steps alone have taken, as a part of what was expected
        self._end_is_due = False  # the step under way is large, and its last layer not reached

    def report(self) -> dict[str, Any]:
        """Counts so far: dispatched steps (rounds with tokens of this rank's), helper rounds, and what meeting took."""
        seen = self._meeting.stats
        return {
            "max_tokens": self.limits.max_tokens, "steps": seen.rounds - seen.helper_rounds, "rounds": seen.rounds,
            "helper_rounds": seen.helper_rounds, "participants": seen.participants, "alone": seen.alone,
            "waited_s": seen.waited_s, "timeouts": list(seen.timeouts),
        }

    @property
    def padded(self) -> int:
        """The rows to which the step under way must be padded; 0 for no more than its own."""
        return self._padded if self._round is not None else 0

    @property
    def is_beyond_graphs(self) -> bool:
        """Whether the step under way must run without a graph: none has room for the round, or that of a step alone would read
        peers in place where a step alone is faster streamed.
        """
        return self._is_streamed if self._round is None else not self._padded

    def begin_step(self, num_tokens: int, is_ready: bool = True) -> bool:
        """Meet the peers, if the step is worth it. Returns whether its layers dispatch: with peers, or alone in a graph.

        A step that is not ready, as it has inputs to encode or KV to load first, is nobody's to wait for: it goes alone.
        """
        self.tokens.check()
        self._in_step, self._end_is_due = True, False
        if not is_ready:
            made = self._announce(num_tokens)
        elif num_tokens > self.limits.max_tokens:
            made = self._offer(num_tokens)
        else:
            made = self._meet(num_tokens) if self.meets else None
        if made is not None:
            self._begin(made)
        elif self.limits.padded((num_tokens,)):
            self._is_streamed = num_tokens > self.limits.alone_graph_tokens
            if not self._is_streamed:
                self._begin(self._alone(num_tokens))
        return self._round is not None

    def _meet(self, num_tokens: int) -> Round | None:
        """The round that takes a small step; None: it goes alone."""
        patience_s, rank = self.limits.patience_s(num_tokens), self._meeting.rank
        alone_s = self._alone_s(num_tokens)
        end_s = max(patience_s, APART * alone_s)
        if not self._is_at_large_step() or self._meeting.has_company(end_s):
            self._end_large_step()
        join = functools.partial(self._meeting.join, num_tokens, patience_s, end_s, self._is_at_work)
        while (made := join(not self._was_large)) is not None and not made.tokens[rank]:
            self._launch(made)
        if made is None and alone_s > patience_s:
            self._announce(num_tokens)
        return made

    def _alone_s(self, num_tokens: int) -> float:
        return self._paces[num_tokens <= self.limits.max_tokens] * self.limits.alone_s(num_tokens)

    def _is_at_work(self) -> bool:
        return not self._stream.is_done(self._last)

    def _is_at_large_step(self) -> bool:
        return self._is_large and not self._stream.is_done(self._ending)

    def _offer(self, num_tokens: int) -> Round | None:
        """The round of a large step in which all other ranks take part; None: it goes alone."""
        if num_tokens > self.limits.helped_max_tokens:
            return self._announce(num_tokens)
        if not self._is_at_large_step() or self._meeting.are_at_hand(are_idle=self._was_large):
            self._end_large_step()
        return self._announce(num_tokens, num_tokens)

    def _announce(self, num_tokens: int, offered: int = 0) -> Round | None:
        """Go alone as a large step, whose end peers are told, or in the round that takes the `offered` tokens."""
        now_s, takes_s = time.monotonic(), self._alone_s(num_tokens)
        before_s = self._announced.takes if self._is_at_large_step() else 0.0  # the host is one step ahead at most
        ends_in = max(before_s, self._helped_until_s - now_s) + takes_s
        spare_s = self.limits.spare_s(offered) if offered else 0.0
        large = functools.partial(self._meeting.large, ends_in, offered, spare_s, self._is_at_work)
        while self.meets and (made := large(not self._was_large)) is not None:
            if made.tokens[self._meeting.rank]:
                return made
            self._launch(made)
        ends_in = max(ends_in, time.monotonic() - now_s + takes_s)
        self._announced = Announced(now_s, takes_s, ends_in, num_tokens <= self.limits.max_tokens)
        self._end_is_due = True
        return None

    def reach_last_layer(self) -> None:
        """All of the step but its last layer is enqueued. Not told of a step that replays a graph."""
        if self._end_is_due:
            self._is_large, self._end_is_due = True, False
            self._stream.compute_record(self._ending)

    def end_step(self) -> None:
        """The step's kernels are enqueued."""
        self.reach_last_layer()
        self._stream.compute_record(self._last)
        self._round, self._in_step, self._is_streamed = None, False, False

    def help(self, timeout_s: float = 0.0, wake: Callable[[], bool] = lambda: False) -> bool:
        """No request: launch the round that asks for this rank, once one does within `timeout_s` and before `wake()`."""
        self.tokens.check()
        if not (at_large := self._is_at_large_step()):
            self._end_large_step()
        made = self._meeting.help(timeout_s, lambda: wake() or (at_large and not self._is_at_large_step()))
        if made is not None:
            self._launch(made)
        return made is not None

    def expect(self) -> None:
        """A request has come, and its step comes soon: peers that come with a step wait for it."""
        self._launch_owed(self._meeting.expect)

    def leave(self) -> None:
        """Before this rank does something else than steps: peers do not count on it until it comes again."""
        self._launch_owed(self._meeting.leave)

    def rehearse(self, forward: Callable[[int], Any]) -> None:
        """Run the largest steps that dispatch, alone and without a graph: no request waits for their kernels to be compiled.

        Triton compiles a kernel anew for a count that 16 does not divide.
        """
        helped = self.limits.helped_max_tokens
        even = {count // 16 * 16 or count for count in (self.limits.max_tokens, helped, -(-helped // 2))}
        self._in_step = True
        for num_tokens in sorted(even | {count - 1 or count for count in even}):
            with self._laid_out(self._alone(num_tokens)):
                self._padded = 0
                forward(num_tokens)
        self._in_step = False

    def rows(self, num_rows: int) -> int | None:
        """The rows, own and received, that a layer of `num_rows` own ones dispatches; None: it does not.

        Outside of steps vLLM warms up and captures graphs, alone.
        """
        if not self._in_step:
            return self.limits.rows(num_rows, self._meeting.size) if self.limits.padded((num_rows,)) else None
        if self._round is None:
            return None
        return self.limits.rows(self._padded, self._meeting.size) if self._padded else self._round.num_rows

    def check(self) -> None:
        """Raises DWDPError naming a member of a round that did not come."""
        self.tokens.check()

    def _launch_owed(self, ask: Callable[[], Round | None]) -> None:
        while (owed := ask()) is not None:
            self._launch(owed)

    def _launch(self, owed: Round) -> None:
        """Help the members of a round."""
        in_step, self._in_step = self._in_step, True
        with self._laid_out(owed):
            self.help_out()
        self._stream.compute_record(self._last)
        self._in_step = in_step

    @contextlib.contextmanager
    def _laid_out(self, made: Round) -> Iterator[None]:
        self._begin(made)
        try:
            yield
        finally:
            self._round = None

    def _begin(self, made: Round) -> None:
        self._round, self._padded = made, self.limits.padded(made.tokens)
        self.tokens.begin(made)
        if made.number:
            self._was_large = max(made.tokens) > self.limits.max_tokens
            if self._was_large:
                self._helped_until_s = time.monotonic() + self.limits.helped_s(made.num_rows)

    def _alone(self, num_tokens: int) -> Round:
        return alone(self._meeting.rank, self._meeting.size, num_tokens)

    def _end_large_step(self) -> None:
        """A rank whose device is still at a large step must not be met: its peers' kernels would wait for all of it."""
        if not self._is_large:
            return
        entered, is_seen = time.monotonic(), False
        while self._is_at_large_step():
            if time.monotonic() > entered + WORK_S:
                return
            is_seen = True
            time.sleep(_LOOK_S)
        now, told = time.monotonic(), self._announced
        self._meeting.stats.waited_s += now - entered
        if is_seen and 0 < told.ends_in < math.inf:
            pace = self._paces[told.is_small] * (1 + (now - told.at) / told.ends_in) / 2
            self._paces[told.is_small] = min(max(pace, 1 / MOST_PACE), MOST_PACE)
        self._is_large = False
        self._meeting.large_done()
