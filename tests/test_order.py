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
        slot, kind = divmod(len(self.names), 4)
        self.names.append(f"{('ready', 'free', 'captured ready', 'captured free')[kind]}{slot}")
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


def fill_of(slot: int, ordinal: int, kind: str = "") -> list[tuple]:
    """The calls that fill a slot behind everything that the computing stream has been given."""
    ready, free = f"{kind}ready{slot}", f"{kind}free{slot}"
    return [("compute_record", free), ("wait", free), ("copy", ordinal), ("record", ready)]


SHAPES = [(4, 2), (5, 2), (5, 3), (7, 4), (2, 3), (1, 2)]


@pytest.mark.parametrize(("num_layers", "num_slots"), SHAPES)
def test_order_of_one_forward(num_layers: int, num_slots: int) -> None:
    """Wait ready, kernels; once the next layer is ready, record free; then the slot's next layer: wait free, copy,
    record ready. The last layer's slot does not wait for another layer. Wraps round."""
    prefetcher, layers, trace = make(num_layers, num_slots)
    slots = min(num_slots, num_layers)
    assert trace.calls == [call for i in range(slots) for call in fill_of(i, i)]
    for _ in range(2):
        trace.calls.clear()
        forward(prefetcher, layers, trace)
        expected, fill = [], []
        for i in range(num_layers):
            s = i % slots
            following = i + slots if i + slots < num_layers else s
            expected += [("compute_wait", f"ready{s}"), *fill, ("kernels", i)]
            fill = fill_of(s, following) if following != i else []
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
    prefetcher.begin_step(8, exact=True)
    prefetcher.before_graph()  # pieces of the model may be graphs
    forward(prefetcher, layers, trace, tokens=8)
    assert trace.calls == [("kernels", i) for i in range(4)] and {layer.view for layer in layers} == {DIRECT}
    prefetcher.end_step(8)
    prefetcher.begin_step(9, exact=True)
    forward(prefetcher, layers, trace, tokens=9)
    prefetcher.end_step(9)
    assert {layer.view for layer in layers} == {STREAMED} and prefetcher.refills == 0
    assert prefetcher.forwards == {DIRECT: 1, STREAMED: 1} and prefetcher.replays == 0


def capture(prefetcher: Prefetcher, layers: list[FakeLayer], trace: Trace, pieces: int = 1) -> list[list[tuple]]:
    """The calls inside each graph when a forward is captured, in one graph or one for each part of its layers."""
    graphs = []
    for piece in range(pieces):
        prefetcher.before_graph()
        trace.calls.clear()
        trace.capturing = True
        forward(prefetcher, layers[len(layers) * piece // pieces : len(layers) * (piece + 1) // pieces], trace)
        prefetcher.join_graph()
        trace.capturing = False
        graphs.append(trace.calls.copy())
    return graphs


@pytest.mark.parametrize(("num_layers", "num_slots"), SHAPES)
@pytest.mark.parametrize("pieces", [1, 3])
def test_a_graph_carries_its_copies(num_layers: int, num_slots: int, pieces: int) -> None:
    """Captured forwards use events of their own, wait for every copy inside their graph, and end as they began."""
    prefetcher, layers, trace = make(num_layers, num_slots)
    slots = len(prefetcher.slots)
    moved = prefetcher.prefetched_bytes
    slot_holds: dict[int, int] = dict(enumerate(range(slots)))  # what kernels see, by slot
    for graph in capture(prefetcher, layers, trace, pieces):
        unjoined = set()
        for call in graph:
            match call:
                case ("copy", ordinal):
                    slot_holds[ordinal % slots] = ordinal
                    unjoined.add(f"captured ready{ordinal % slots}")
                case ("compute_wait", event):
                    unjoined.remove(event)
                case ("kernels", ordinal):
                    assert slot_holds[ordinal % slots] == ordinal
                    assert f"captured ready{ordinal % slots}" not in unjoined
                case (_, event):
                    assert event.startswith("captured")
        assert not unjoined, "a capture with copies that nothing waits for is invalid"
    assert slot_holds == dict(enumerate(range(slots))), "what a replay finds is what it leaves"
    assert [slot.tag for slot in prefetcher.slots] == list(range(slots))
    assert prefetcher.forwards[STREAMED] == 0 and prefetcher.prefetched_bytes == moved, "a capture copies nothing"


def test_order_of_a_captured_forward() -> None:
    """As an eager one, but that the first layers need no event and the last copies are waited for at the end."""
    prefetcher, layers, trace = make(4, 2)
    (graph,) = capture(prefetcher, layers, trace)
    assert graph == [
        ("kernels", 0), *fill_of(0, 2, "captured "), ("kernels", 1),
        ("compute_wait", "captured ready0"), *fill_of(1, 3, "captured "), ("kernels", 2),
        ("compute_wait", "captured ready1"), *fill_of(0, 0, "captured "), ("kernels", 3), *fill_of(1, 1, "captured "),
        ("compute_wait", "captured ready0"), ("compute_wait", "captured ready1"),
    ]


def test_a_replay_waits_for_copies_under_way_and_is_counted() -> None:
    """Before a launch the computing stream waits for both slots; copies after it wait for all of it."""
    prefetcher, layers, trace = make(5, 2, direct_max_tokens=8)
    forward(prefetcher, layers, trace)  # vLLM runs the model outside of steps, too
    capture(prefetcher, layers, trace)
    moved = prefetcher.prefetched_bytes
    trace.calls.clear()
    prefetcher.begin_step(64, exact=True)
    prefetcher.before_graph()
    prefetcher.end_step(64)
    assert trace.calls == [("compute_wait", "ready0"), ("compute_wait", "ready1")]
    assert prefetcher.forwards == {DIRECT: 0, STREAMED: 2} and prefetcher.replays == 1
    assert prefetcher.prefetched_bytes == moved + 500 and prefetcher.refills == 0
    trace.calls.clear()
    forward(prefetcher, layers, trace)
    assert trace.calls[:7] == [
        ("compute_wait", "ready0"), ("kernels", 0), ("compute_wait", "ready1"), *fill_of(0, 2),
    ], "the first copy after a replay begins behind everything that was launched"


def test_a_graph_that_may_be_padded_waits() -> None:
    """With several tokens a request, a small batch may replay the graph of a streamed one."""
    prefetcher, layers, trace = make(5, 2, direct_max_tokens=8)
    trace.calls.clear()
    prefetcher.begin_step(8, exact=False)
    prefetcher.before_graph()
    assert trace.calls == [("compute_wait", "ready0"), ("compute_wait", "ready1")]


def test_a_step_after_one_that_was_cut_short_finds_the_first_layers() -> None:
    """A replay cannot see what is in the slots: they are put right before the step."""
    for cut in range(5):
        prefetcher, layers, trace = make(5, 2)
        forward(prefetcher, layers[: cut + 1], trace)
        prefetcher.begin_step(64, exact=True)
        assert [slot.tag for slot in prefetcher.slots] == [0, 1]
        forward(prefetcher, layers, trace)
        replay(trace)


def test_layers_out_of_order_are_not_captured() -> None:
    """A graph of them would leave other layers in the slots than it found."""
    prefetcher, layers, trace = make(4, 2, direct_max_tokens=8)
    trace.capturing = True
    with pytest.raises(DWDPError, match="layer 2 after 0.*--max-cudagraph-capture-size 8"):
        prefetcher.acquire(layers[2], 9)
