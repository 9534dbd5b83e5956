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
class Slot:
    ready: Any  # recorded by the copy stream after the copy, waited for by the computing stream
    free: Any  # recorded by the computing stream some time after the last reader, waited for by the copy stream
    tag: int | None = None  # the ordinal it holds, or is being filled with
    reading: bool = False  # acquired since it was filled


class Prefetcher:
    """Owns the side stream and the slots. Only the thread that runs the model may call it."""

    def __init__(self, layers: Sequence[Layer], stream: CopyStream, *, num_slots: int, direct_max_tokens: int):
        self.direct_max_tokens = direct_max_tokens
        self.prefetched_bytes = 0
        self.refills = 0
        self.forwards = {DIRECT: 0, STREAMED: 0}
        self._streamed_before = 0
        self._layers = layers
        self._stream = stream
        self._plans = [stream.plan(layer.copies) for layer in layers]
        self._following: int | None = None  # the layer to fetch once the next experts begin
        self.slots = [Slot(ready=stream.event(), free=stream.event()) for _ in range(min(num_slots, len(layers)))]

    def start(self) -> None:
        """Fill every slot with its first layer."""
        for ordinal in range(len(self.slots)):
            self._fill(ordinal)

    def _slot_of(self, ordinal: int) -> Slot:
        return self.slots[ordinal % len(self.slots)]

    def acquire(self, layer: Layer, num_tokens: int) -> str:
        """Make `layer`'s parameters readable by kernels enqueued from now on; returns the view chosen.

        At or below `direct_max_tokens` the direct view, whose addresses never change and which needs no event.
        """
        view = DIRECT if num_tokens <= self.direct_max_tokens else STREAMED
        layer.bind(view)
        if view == STREAMED:
            self.forwards[STREAMED] += layer.ordinal == 0
            if self._stream.is_capturing():
                raise DWDPError(
                    f"a CUDA graph of {num_tokens} tokens would freeze streamed weights: keep cudagraph_capture_sizes "
                    f"at or below direct_max_tokens={self.direct_max_tokens}"
                )
            slot = self._slot_of(layer.ordinal)
            if self._following is not None and self._slot_of(self._following) is slot:  # layers run out of order
                self._fill_following()
            if slot.tag != layer.ordinal:
                self.refills += 1
                self._fill(layer.ordinal)
            self._stream.compute_wait(slot.ready)
            slot.reading = True
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

    def count_step(self) -> None:
        """A step with tokens has run: direct unless its layers were streamed (a graph's replay calls no `acquire`)."""
        self.forwards[DIRECT] += self.forwards[STREAMED] == self._streamed_before
        self._streamed_before = self.forwards[STREAMED]

    def _fill(self, ordinal: int) -> None:
        slot = self._slot_of(ordinal)
        if slot.reading:  # by a layer that was released, or by a forward that was cut short
            self._stream.compute_record(slot.free)
            slot.reading = False
        if slot.tag == ordinal:  # the slot's only layer
            return
        slot.tag = ordinal
        self._stream.wait(slot.free)
        self._stream.copy(self._plans[ordinal])
        self._stream.record(slot.ready)
        self.prefetched_bytes += self._layers[ordinal].copied_bytes

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
