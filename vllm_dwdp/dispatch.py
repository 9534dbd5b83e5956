"""Dispatch: the steps whose tokens travel. Meets the peers before a step, and says how its layers are laid out.

A step of at most `max_tokens` is worth meeting for: it takes part in a round with the ranks that are at hand, or goes
alone. A larger one goes with all other ranks, if it has at most `helped_max_tokens` and each of them is idle or comes with
a small step and the last round had no large one, else alone, and then its rank takes part again when its device has reached
the last layer of it: the host then prepares the next step while that layer runs, for which peers may have to wait. A step
that went alone and takes longer than its rank waits for peers counts as large, too: peers who took it for a short one would
give up just before it ends and go alone in turn, without end. An idle rank helps.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

from vllm_dwdp.convoy import Round
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.kernels.device import Block, CopyStream
from vllm_dwdp.kernels.tokens import FEW, TokenExchange, alone
from vllm_dwdp.large_steps import LargeSteps
from vllm_dwdp.limits import Limits
from vllm_dwdp.meeting import Meeting

APART = 0.55  # of two ranks that go alone by turns, one waits for the other: half a step alone at most, and some more


class Dispatch:
    """One rank's dispatched steps. Only the thread that runs the model may call it, but for `report`.

    `help_out`, which the worker sets, runs a forward of dummy rows, in which this rank computes its experts for the members of a round.
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
        self._large_steps = LargeSteps(meeting, stream, limits)
        self._was_large = False  # the last round had a large step

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
        self._in_step = True
        self._large_steps.begin_step()
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
        alone_s = self._large_steps.alone_s(num_tokens)
        end_s = max(patience_s, APART * alone_s)
        if not self._large_steps.are_under_way or self._meeting.has_company(end_s):
            self._large_steps.end()
        join = functools.partial(self._meeting.join, num_tokens, patience_s, end_s, self._is_at_work)
        while (made := join(not self._was_large)) is not None and not made.tokens[rank]:
            self._launch(made)
        if made is None and alone_s > patience_s:
            self._announce(num_tokens)
        return made

    def _is_at_work(self) -> bool:
        return not self._stream.is_done(self._last)

    def _offer(self, num_tokens: int) -> Round | None:
        """The round of a large step in which all other ranks take part; None: it goes alone."""
        if num_tokens > self.limits.helped_max_tokens:
            return self._announce(num_tokens)
        if not self._large_steps.are_under_way or self._meeting.are_at_hand(are_idle=self._was_large):
            self._large_steps.end()
        return self._announce(num_tokens, num_tokens)

    def _announce(self, num_tokens: int, offered: int = 0) -> Round | None:
        """Go alone as a large step, whose end peers are told, or in the round that takes the `offered` tokens."""
        now_s, takes_s = time.monotonic(), self._large_steps.alone_s(num_tokens)
        ends_in = self._large_steps.ends_in(takes_s)
        spare_s = self.limits.spare_s(offered) if offered else 0.0
        large = functools.partial(self._meeting.large, ends_in, offered, spare_s, self._is_at_work)
        while self.meets and (made := large(not self._was_large)) is not None:
            if made.tokens[self._meeting.rank]:
                return made
            self._launch(made)
        ends_in = max(ends_in, time.monotonic() - now_s + takes_s)
        self._large_steps.announced(num_tokens, now_s, takes_s, ends_in)
        return None

    def reach_last_layer(self) -> None:
        """All of the step but its last layer is enqueued. Not told of a step that replays a graph."""
        self._large_steps.reach_last_layer()

    def end_step(self) -> None:
        """The step's kernels are enqueued."""
        self.reach_last_layer()
        self._stream.compute_record(self._last)
        self._round, self._in_step, self._is_streamed = None, False, False

    def help(self, timeout_s: float = 0.0, wake: Callable[[], bool] = lambda: False) -> bool:
        """No request: launch the round that asks for this rank, once one does within `timeout_s` and before `wake()`."""
        self.tokens.check()
        if not (at_large := self._large_steps.are_under_way):
            self._large_steps.end()
        made = self._meeting.help(timeout_s, lambda: wake() or (at_large and not self._large_steps.are_under_way))
        if made is not None:
            self._launch(made)
        return made is not None

    def expect(self) -> None:
        """A request has come, and its step comes soon: peers that come with a step wait for it."""
        self._launch_owed(self._meeting.expect)

    def leave(self) -> None:
        """Before this rank does something else than steps: peers do not count on it until it comes again."""
        self._launch_owed(self._meeting.leave)

    def rehearse(self, forward: Callable[[int], Any], most: int) -> None:
        """Run the largest steps that dispatch, and of few rows, alone and without a graph: no request waits for kernels to be compiled.

        No step has more than `most` tokens.

        Triton compiles a kernel anew for a count that 16 does not divide, and the exchange for few rows.
        """
        small, helped = self.limits.max_tokens, self.limits.helped_max_tokens
        even = {count // 16 * 16 or count for count in (min(FEW, small), small, helped, -(-helped // 2))}
        self._in_step = True
        for num_tokens in sorted({min(count, most) for count in even | {count - 1 or count for count in even}}):
            with self._laid_out(self._alone(num_tokens)):
                self._padded = 0
                forward(num_tokens)
        self._in_step = False

    def rows(self, num_rows: int) -> int | None:
        """The rows, own and received, that a layer of `num_rows` own ones dispatches; None: it does not.

        Outside of steps vLLM warms up and captures graphs, alone. Raises DWDPError where the step has lost tokens since it met peers,
        which would wait for them; a rehearsal may, where a draft model takes some of vLLM's buffers.
        """
        if not self._in_step:
            return self.limits.rows(num_rows, self._meeting.size) if self.limits.padded((num_rows,)) else None
        if self._round is None:
            return None
        if len(self._round.members) > 1 and num_rows < (agreed := self._round.tokens[self._meeting.rank]):
            raise DWDPError(f"a MoE layer has {num_rows} rows in a step that was to have {agreed} tokens, as its peers know: something "
                            "in vLLM's runner or the model has dropped some; set --dwdp-dispatch off")
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
                self._large_steps.helped(self.limits.helped_s(made.num_rows))

    def _alone(self, num_tokens: int) -> Round:
        return alone(self._meeting.rank, self._meeting.size, num_tokens)
