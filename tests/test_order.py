"""Invariant: a slot is filled after its last reader and read after its fill; the whole order of calls is compared."""

import dataclasses

import pytest

from vllm_dwdp.errors import DWDPError
from vllm_dwdp.kernels.device import CopyStream
from vllm_dwdp.prefetch import DIRECT, STREAMED, Prefetcher


class Trace(CopyStream):
    """A stream that writes down what it is asked to do."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.names: list[str] = []
        self.capturing = False

    def event(self) -> str:
        self.names.append(f"{('ready', 'free')[len(self.names) % 2]}{len(self.names) // 2}")
        return self.names[-1]

    def plan(self, copies):
        return copies

    def copy(self, plan) -> None:
        self.calls.append(("copy", *plan))

    def record(self, event) -> None:
        self.calls.append(("record", event))

    def wait(self, event) -> None:
        self.calls.append(("wait", event))

    def compute_record(self, event) -> None:
        self.calls.append(("compute_record", event))

    def compute_wait(self, event) -> None:
        self.calls.append(("compute_wait", event))

    def is_done(self, event) -> bool:
        return True

    def is_capturing(self) -> bool:
        return self.capturing

    def drain(self) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass
class FakeLayer:
    ordinal: int
    trace: Trace
    copied_bytes: int = 100
    view: str | None = None

    @property
    def copies(self):
        return [self.ordinal]

    def bind(self, view: str) -> None:
        self.view = view


def make(num_layers: int, num_slots: int, direct_max_tokens: int = 0) -> tuple[Prefetcher, list[FakeLayer], Trace]:
    trace = Trace()
    layers = [FakeLayer(i, trace) for i in range(num_layers)]
    prefetcher = Prefetcher(layers, trace, num_slots=num_slots, direct_max_tokens=direct_max_tokens)
    prefetcher.start()
    return prefetcher, layers, trace


def forward(prefetcher: Prefetcher, layers: list[FakeLayer], trace: Trace, tokens: int = 100) -> None:
    for layer in layers:
        view = prefetcher.acquire(layer, tokens)
        trace.calls.append(("kernels", layer.ordinal))
        prefetcher.release(layer, view)


@pytest.mark.parametrize(("num_layers", "num_slots"), [(4, 2), (5, 2), (5, 3), (7, 4), (2, 3), (1, 2)])
def test_order_of_one_forward(num_layers: int, num_slots: int) -> None:
    """Wait ready, kernels; once the next layer is ready, record free; then the slot's next layer: wait free, copy,
    record ready. The last layer's slot does not wait for another layer. Wraps round."""
    prefetcher, layers, trace = make(num_layers, num_slots)
    slots = min(num_slots, num_layers)
    start = [c for i in range(slots) for c in (("wait", f"free{i}"), ("copy", i), ("record", f"ready{i}"))]
    assert trace.calls == start
    for _ in range(2):
        trace.calls.clear()
        forward(prefetcher, layers, trace)
        expected, fill = [], []
        for i in range(num_layers):
            s = i % slots
            following = i + slots if i + slots < num_layers else s
            expected += [("compute_wait", f"ready{s}"), *fill, ("kernels", i)]
            fill = [("compute_record", f"free{s}")]
            if following != i:
                fill += [("wait", f"free{s}"), ("copy", following), ("record", f"ready{s}")]
        expected += fill
        assert trace.calls == expected
        assert [slot.tag for slot in prefetcher.slots] == list(range(slots)), "the first layers of the next forward"
    assert prefetcher.refills == 0
    copies = slots + 2 * (num_layers if num_layers > slots else 0)
    alone = sum(s + slots >= num_layers for s in range(slots)) if num_layers > slots else 0  # slots with one layer
    assert prefetcher.prefetched_bytes == 100 * (copies - 2 * alone)


def test_every_layer_reads_its_own_bytes_when_a_forward_is_cut_short() -> None:
    """A forward that ends after any layer, acquired or released, leaves no layer with another's bytes."""
    for cut in range(5):
        for released in (True, False):
            prefetcher, layers, trace = make(5, 2)
            for layer in layers[: cut + 1]:
                view = prefetcher.acquire(layer, 100)
                if layer.ordinal < cut or released:
                    prefetcher.release(layer, view)
            forward(prefetcher, layers, trace)
            replay(trace)


def replay(trace: Trace) -> None:
    """Follow all calls from the start and check that kernels find their own layer in the slot that they waited for."""
    slot_of: dict[str, int] = {}
    pending = current = None
    for call in trace.calls:
        match call:
            case ("copy", ordinal):
                pending = ordinal
            case ("record", ready):
                slot_of[ready] = pending
            case ("compute_wait", ready):
                current = slot_of[ready]
            case ("kernels", ordinal):
                assert current == ordinal, f"layer {ordinal} would read layer {current}"


@pytest.mark.parametrize("order", [[2, 0, 1, 3], [3, 2, 1, 0], [0, 0, 1, 1]])
def test_out_of_order_layers_are_fetched_again(order: list[int]) -> None:
    """A layer that is not in its slot is copied before its kernels, and counted."""
    prefetcher, layers, trace = make(4, 2)
    forward(prefetcher, [layers[i] for i in order], trace)
    replay(trace)
    assert prefetcher.refills > 0


def test_a_reader_is_waited_for_even_when_its_forward_was_cut_short() -> None:
    """The slot of an acquired, never released layer is refilled only behind a free event recorded after its kernels."""
    prefetcher, layers, trace = make(4, 2)
    prefetcher.acquire(layers[0], 100)
    trace.calls.clear()
    prefetcher.acquire(layers[2], 100)
    assert trace.calls[:3] == [("compute_record", "free0"), ("wait", "free0"), ("copy", 2)]


def test_direct_view_needs_no_event_and_keeps_what_is_prefetched() -> None:
    """Small batches touch neither stream; the next large one finds its first layers in place."""
    prefetcher, layers, trace = make(4, 2, direct_max_tokens=8)
    trace.calls.clear()
    forward(prefetcher, layers, trace, tokens=8)
    assert trace.calls == [("kernels", i) for i in range(4)] and {layer.view for layer in layers} == {DIRECT}
    prefetcher.count_step()
    forward(prefetcher, layers, trace, tokens=9)
    prefetcher.count_step()
    assert {layer.view for layer in layers} == {STREAMED} and prefetcher.refills == 0
    assert prefetcher.forwards == {DIRECT: 1, STREAMED: 1}


def test_streamed_weights_are_not_captured() -> None:
    """A graph would replay without events and tags: capturing a batch above direct_max_tokens fails."""
    prefetcher, layers, trace = make(4, 2, direct_max_tokens=8)
    trace.capturing = True
    assert prefetcher.acquire(layers[0], 8) == DIRECT
    with pytest.raises(DWDPError, match="direct_max_tokens=8"):
        prefetcher.acquire(layers[0], 9)
