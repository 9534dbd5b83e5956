"""Prefetch: the state of the slots, and the one side stream that fills them ahead of use.

A slot's life, with the event that ends each stage (schedule.py: which layer uses which slot):

    copy stream     wait slot_free | copy layer i --> copy_done                 wait slot_free | copy layer i+K --> ...
    compute stream                       wait copy_done | experts of layer i | attention --> slot_free | experts of i+1

A slot is given free not right after its layer's kernels but when the next layer's experts begin: the copy then runs
beside their GEMMs, which it slows less than attention (two H100s: 2% of a prefill step). The last layer's slot is
filled at once, and the last layer is followed by the first: an idle rank already holds the first layers of the next
forward. A layer that is not in its slot (a forward was cut short, or layers ran out of order) is fetched again before
it is read; that costs a wait and is counted, it never yields another layer's weights.

CUDA graphs carry all of this: copies and events are captured with the kernels. A graph finds the first layers in the
slots and leaves them there, so a replay, which runs none of this code, changes nothing. A capture copies nothing: it
works on an overlay of the slots. The computing stream waits for the copies under way before a graph is launched
(`before_graph`), and a graph joins its copies before it ends (`join_graph`), so what runs after the graph needs none
of the graph's events.
"""

import dataclasses
from collections.abc import Sequence

from vllm_dwdp.counters import Counters
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.kernels.device import CopyStream
from vllm_dwdp.profiling import profiled
from vllm_dwdp.schedule import DISPATCHED, STREAMED, Schedule, View, view_of
from vllm_dwdp.slots import Overlay, Slot, State
from vllm_dwdp.weights import LayerWeights


@dataclasses.dataclass(kw_only=True)
class Step:
    """From begin_step to end_step. A step that does not get there has left the slots as nobody knows."""

    view: View | None  # None: the first layer tells
    launched_streaming: bool = False  # a graph


class Prefetcher:
    """Owns the side stream and the slots. Only the thread that runs the model may call it."""

    def __init__(self, layers: Sequence[LayerWeights], stream: CopyStream, *, schedule: Schedule, direct_max_tokens: int):
        self.schedule, self.stream = schedule, stream
        self.direct_max_tokens = direct_max_tokens
        self.counters = Counters()
        self._layers = layers
        self._plans = [stream.plan(layer.copies) for layer in layers]
        ring = layers[: schedule.num_layers]
        self._ring_bytes = sum(layer.copied_bytes for layer in ring if not schedule.is_alone(layer.ordinal))  # that a replay copies
        self._step: Step | None = None
        self._view: View | None = None  # of the forward that has begun
        self._slots, captured = (
            [Slot(is_captured=is_captured, copy_done=stream.event(), slot_free=stream.event()) for _ in schedule.first]
            for is_captured in (False, True)
        )
        self._overlay = Overlay(captured)

    @property
    def held(self) -> list[int | None]:
        """The layer that each slot holds or is being filled with; None if nobody can say."""
        return [None if slot.state is State.LOST else slot.ordinal for slot in self._slots]

    def start(self) -> None:
        """Fill every slot with its first layer."""
        for slot, ordinal in zip(self._slots, self.schedule.first, strict=True):
            self._fill(slot, ordinal)

    def begin_step(self, num_tokens: int, *, exact: bool, dispatched: bool = False) -> None:
        """A step of `num_tokens` begins. `exact`: its graph is one for `direct_max_tokens` if it has no more than that.

        A dispatched one acquires no layer and leaves the slots alone.

        A forward that was cut short has left other layers in the slots than a graph expects.
        """
        self._lose_what_graphs_moved()
        self._overlay.drop()
        if dispatched:
            self._step = Step(view=DISPATCHED)
            return
        view = view_of(num_tokens, self.direct_max_tokens)
        self._view = view if exact or view == STREAMED else None
        self._step = Step(view=self._view)
        self.counters.begin_step()
        for slot, ordinal in zip(self._slots, self.schedule.first, strict=True):
            if not slot.holds(ordinal):
                self.counters.refills += 1
                self._fill(slot, ordinal)

    def acquire(self, layer: LayerWeights, num_rows: int) -> View:
        """Make `layer`'s parameters readable by kernels enqueued from now on; returns the view of the forward.

        At or below `direct_max_tokens` the direct view, whose addresses never change and which needs no event. Raises
        DWDPError for a layer that asks for another view than the forward's first, and for a layer that is captured in a
        graph and not in its slot.
        """
        view = self._keep_view(layer, num_rows)
        layer.bind(view)
        if view == STREAMED:
            capturing = self.stream.is_capturing()
            if capturing:
                self._overlay.carries = True
            else:
                self._lose_what_graphs_moved()
                self._overlay.drop()
                if layer.ordinal == 0:
                    self.counters.forwards[STREAMED] += 1
            slot = self._slot_of(layer, capturing)
            if not slot.holds(layer.ordinal):
                if not self.schedule.is_draft(layer.ordinal):
                    if capturing:
                        raise DWDPError(
                            f"MoE layers of this model run out of order (layer {layer.ordinal} after {slot.ordinal}), "
                            f"which a CUDA graph cannot stream: set --max-cudagraph-capture-size {self.direct_max_tokens}"
                        )
                    self.counters.refills += 1
                self._fill(slot, layer.ordinal)
            must_wait = slot.state is State.FILLED or not capturing
            slot.become(State.READ, layer.ordinal)
            if must_wait:
                self.stream.compute_wait(slot.copy_done)
            self._follow(capturing)
        return view

    def release(self, layer: LayerWeights, view: View) -> None:
        """`layer`'s kernels are enqueued: its slot is for the next layer that uses it."""
        is_last, is_draft = self.schedule.is_last(layer.ordinal), self.schedule.is_draft(layer.ordinal)
        if view == STREAMED:
            capturing = self.stream.is_capturing()
            slot = self._slot_of(layer, capturing)
            slot.become(State.RELEASED, layer.ordinal)
            if self.schedule.is_alone(layer.ordinal):  # no other layer comes: its only copy stays
                slot.state = State.JOINED if capturing else State.FILLED
            if is_last or is_draft:
                self._follow(capturing)
        if is_draft and not self.stream.is_capturing():
            self.counters.drafts[view] += 1
        if is_last:
            self._view = None if self._step is None else self._step.view

    def before_graph(self) -> None:
        """A graph is about to be captured or launched: it begins when the slots are filled."""
        self._overlay.resume()
        step = self._step
        if step is None or step.view in (None, STREAMED) or len(self._layers) > self.schedule.num_layers:  # a draft's, perhaps
            if step is not None:
                step.launched_streaming = self._overlay.carries
            for slot in self._slots:
                self.stream.compute_wait(slot.copy_done)

    def join_graph(self) -> None:
        """The capture of a graph ends: whatever runs after the graph runs after its copies."""
        for slot in self._overlay.slots:
            if slot.state is State.FILLED:
                slot.become(State.JOINED, slot.ordinal)
                self.stream.compute_wait(slot.copy_done)
        self._overlay.commit()

    def end_step(self, num_tokens: int) -> None:
        """The step has ended: graphs that it launched have left the first layers in the slots, as they found them.

        Counts the step, if it had tokens: a replayed graph has called no `acquire`.
        """
        step = self._step
        replayed = step is not None and step.launched_streaming
        if step is not None and step.view == DISPATCHED:
            self.counters.forwards[DISPATCHED] += 1
        elif num_tokens:
            self.counters.end_step(self._ring_bytes if replayed and num_tokens > self.direct_max_tokens else None)
        if self._overlay.strays:
            self._lose_what_graphs_moved()
        self._step = self._view = None

    def _keep_view(self, layer: LayerWeights, num_rows: int) -> View:
        asked = view_of(num_rows, self.direct_max_tokens)
        if self.schedule.is_draft(layer.ordinal):  # each is a forward by itself
            return asked
        is_open = self._step is None or self._step.view is None
        if self._view is None or (is_open and layer.ordinal == 0):
            self._view = asked
        if asked != self._view:
            raise DWDPError(
                f"{layer.name} (MoE layer {layer.ordinal}) has {num_rows} rows in a forward of the {self._view} view: "
                f"direct_max_tokens={self.direct_max_tokens} would read it {asked}, and a forward has one view; set "
                "--dwdp-direct-max-tokens 0 to stream every layer"
            )
        return asked

    def _slot_of(self, layer: LayerWeights, capturing: bool) -> Slot:
        return (self._overlay.slots if capturing else self._slots)[self.schedule.slot(layer.ordinal)]

    def _lose_what_graphs_moved(self) -> None:
        """Graphs were launched and the step did not end: they may have stopped at any layer."""
        if self._step is not None and self._step.launched_streaming:
            self._step.launched_streaming = False
            for slot in self._slots:
                slot.state = State.LOST

    def _follow(self, capturing: bool) -> None:
        """Copy what follows into released slots."""
        for slot in self._overlay.slots if capturing else self._slots:
            if slot.state is State.RELEASED:
                self._fill(slot, self.schedule.following(slot.ordinal))

    def _fill(self, slot: Slot, ordinal: int) -> None:
        """Copy a layer into its slot, behind everything that the computing stream has been given by now."""
        layer = self._layers[ordinal]
        slot.state = State.LOST
        self.stream.compute_record(slot.slot_free)
        self.stream.wait(slot.slot_free)
        with profiled("copy", layer.name):
            self.stream.copy(self._plans[ordinal])
        self.stream.record(slot.copy_done)
        slot.ordinal, slot.state = ordinal, State.FILLED
        if not slot.is_captured:
            self.counters.prefetched_bytes += layer.copied_bytes
