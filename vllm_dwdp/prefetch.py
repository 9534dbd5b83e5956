"""Prefetch: the slots, and the one side stream that fills them ahead of use.

Layer i is streamed into slot i mod K. A slot's life, with the event that ends each stage:

    copy stream     wait free | copy layer i --> ready                       wait free | copy layer i+K --> ready
    compute stream                wait ready | experts of layer i | attention --> free | experts of layer i+1

The layer that a slot holds is a host-side tag, checked at every use. A slot is given free not right after its layer's
kernels but when the next layer's experts begin: the copy then runs beside their GEMMs, which it slows less than
attention (two H100s: 2% of a prefill step). The last layer's slot is filled at once, and the last layer is followed by
the first: an idle rank already holds the first layers of the next forward. A layer that is not in its slot (a forward
was cut short, or layers ran out of order) is fetched again before it is read; that costs a wait and is counted, it
never yields another layer's weights.

CUDA graphs carry all of this: copies and events are captured with the kernels. A graph finds the first layers in the
slots and leaves them there, so tags are right before and after a replay, which runs none of this code. The computing
stream waits for the copies under way before a graph is launched (`before_graph`), and a graph joins its copies before
it ends (`join_graph`), so what runs after it needs no event of its.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from vllm_dwdp.errors import DWDPError
from vllm_dwdp.kernels.device import CopyStream

DIRECT, STREAMED = "direct", "streamed"


class Layer(Protocol):
    """What prefetching needs of a layer: see weights.LayerWeights."""

    ordinal: int
    copies: Sequence[tuple[int, int, int]]
    copied_bytes: int

    def bind(self, view: str) -> None: ...


@dataclasses.dataclass(kw_only=True)
class Events:
    ready: Any  # recorded by the copy stream after the copy, waited for by the computing stream
    free: Any  # recorded by the computing stream some time after the last reader, waited for by the copy stream


@dataclasses.dataclass(kw_only=True)
class Slot:
    eager: Events
    captured: Events  # an event that was recorded in a graph means nothing outside
    tag: int | None = None  # the ordinal it holds, or is being filled with
    forked: bool = False  # the graph being captured has a copy into it that it does not wait for yet


class Prefetcher:
    """Owns the side stream and the slots. Only the thread that runs the model may call it."""

    def __init__(self, layers: Sequence[Layer], stream: CopyStream, *, num_slots: int, direct_max_tokens: int):
        self.direct_max_tokens = direct_max_tokens
        self.prefetched_bytes = 0
        self.refills = 0
        self.forwards = {DIRECT: 0, STREAMED: 0}
        self.replays = 0  # the streamed forwards that were replays of graphs
        self._streamed_before = 0
        self._layers = layers
        self._stream = stream
        self._plans = [stream.plan(layer.copies) for layer in layers]
        self._following: int | None = None  # the layer to fetch once the next experts begin
        self._reads_direct = False  # every graph of this step
        self._streamed_graph = False  # this step has launched a graph that may be streamed
        count = min(num_slots, len(layers))
        self.slots = [
            Slot(eager=Events(ready=stream.event(), free=stream.event()),
                 captured=Events(ready=stream.event(), free=stream.event()))
            for _ in range(count)
        ]

    def start(self) -> None:
        """Fill every slot with its first layer."""
        for ordinal in range(len(self.slots)):
            self._fill(ordinal)

    def _slot_of(self, ordinal: int) -> Slot:
        return self.slots[ordinal % len(self.slots)]

    def acquire(self, layer: Layer, num_tokens: int) -> str:
        """Make `layer`'s parameters readable by kernels enqueued from now on; returns the view chosen.

        At or below `direct_max_tokens` the direct view, whose addresses never change and which needs no event. Raises
        DWDPError when a layer that is captured in a graph is not in its slot.
        """
        view = DIRECT if num_tokens <= self.direct_max_tokens else STREAMED
        layer.bind(view)
        if view == STREAMED:
            capturing = self._stream.is_capturing()
            self.forwards[STREAMED] += layer.ordinal == 0 and not capturing
            slot = self._slot_of(layer.ordinal)
            if self._following is not None and self._slot_of(self._following) is slot:  # layers run out of order
                self._fill_following()
            if slot.tag != layer.ordinal:
                if capturing:
                    raise DWDPError(
                        f"MoE layers of this model run out of order (layer {layer.ordinal} after {slot.tag}), which a "
                        f"CUDA graph cannot stream: set --max-cudagraph-capture-size {self.direct_max_tokens}"
                    )
                self.refills += 1
                self._fill(layer.ordinal)
            if not capturing:
                self._stream.compute_wait(slot.eager.ready)
            elif slot.forked:
                self._join(slot)
            self._fill_following()
        return view

    def release(self, layer: Layer, view: str) -> None:
        """`layer`'s kernels are enqueued: its slot is for the next layer that uses it."""
        if view == STREAMED:
            following = layer.ordinal + len(self.slots)
            self._following = following if following < len(self._layers) else layer.ordinal % len(self.slots)
            if layer.ordinal == len(self._layers) - 1:
                self._fill_following()

    def _fill_following(self) -> None:
        if self._following is not None:
            ordinal, self._following = self._following, None
            self._fill(ordinal)

    def _fill(self, ordinal: int) -> None:
        """Copy a layer into its slot, behind everything that the computing stream has been given by now."""
        slot = self._slot_of(ordinal)
        if slot.tag == ordinal:  # the slot's only layer
            return
        slot.tag, slot.forked = ordinal, self._stream.is_capturing()
        events = slot.captured if slot.forked else slot.eager
        self._stream.compute_record(events.free)
        self._stream.wait(events.free)
        self._stream.copy(self._plans[ordinal])
        self._stream.record(events.ready)
        if not slot.forked:
            self.prefetched_bytes += self._layers[ordinal].copied_bytes

    def _join(self, slot: Slot) -> None:
        self._stream.compute_wait(slot.captured.ready)
        slot.forked = False

    def before_graph(self) -> None:
        """A graph is about to be captured or launched: it begins when the slots are filled."""
        if not self._reads_direct:
            self._streamed_graph = True
            for slot in self.slots:
                self._stream.compute_wait(slot.eager.ready)

    def join_graph(self) -> None:
        """The capture of a graph ends: whatever runs after the graph runs after its copies."""
        for slot in self.slots:
            if slot.forked:
                self._join(slot)

    def begin_step(self, num_tokens: int, *, exact: bool) -> None:
        """A step of `num_tokens` begins. `exact`: its graph is one for `direct_max_tokens` if it has no more than that.

        A forward that was cut short has left other layers in the slots than a graph expects.
        """
        self._reads_direct = exact and num_tokens <= self.direct_max_tokens
        self._streamed_graph, self._streamed_before = False, self.forwards[STREAMED]
        self._fill_following()
        for ordinal, slot in enumerate(self.slots):
            self.refills += slot.tag != ordinal
            self._fill(ordinal)

    def end_step(self, num_tokens: int) -> None:
        """Count the step, if it had tokens: a replayed graph has called no `acquire`."""
        if num_tokens and self.forwards[STREAMED] == self._streamed_before:
            replayed = self._streamed_graph and num_tokens > self.direct_max_tokens
            self.forwards[STREAMED if replayed else DIRECT] += 1
            if replayed:
                self.replays += 1
                self.prefetched_bytes += sum(layer.copied_bytes for layer in self._layers if not self._is_alone(layer))
        self._reads_direct = False

    def _is_alone(self, layer: Layer) -> bool:
        """No other layer uses its slot: it was filled once."""
        return layer.ordinal % len(self.slots) + len(self.slots) >= len(self._layers)

    def replan(self, layer: Layer) -> None:
        """`layer.copies` has changed. Only between steps, with the stream drained."""
        self._plans[layer.ordinal] = self._stream.plan(layer.copies)

    def drain(self) -> None:
        """Wait for the copies under way."""
        self._stream.drain()

    def close(self) -> None:
        """Stop copying. Peers may unmap after every rank has done this."""
        self._stream.close()

    @property
    def exposed_wait_ms(self) -> float | None:
        return self._stream.exposed_wait_ms

    @property
    def copy_ms(self) -> float | None:
        return self._stream.copy_ms
