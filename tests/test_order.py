"""Invariant: a slot is filled after its last reader and read after its fill; the whole order of calls is compared."""

import dataclasses
from collections.abc import Iterator

import pytest
from torch.profiler import profile

from vllm_dwdp.errors import DWDPError
from vllm_dwdp.kernels.device import CopyStream
from vllm_dwdp.prefetch import Prefetcher
from vllm_dwdp.schedule import DIRECT, DISPATCHED, STREAMED, Schedule
from vllm_dwdp.slots import Slot, State


class Trace(CopyStream):
    """A stream that writes down what it is asked to do: in `calls`, or in `graph` while one is captured."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.calls: list[tuple] = []
        self.graph: list[tuple] | None = None
        self._events = (
            f"{world}{kind}{slot}"
            for world in ("", "captured ") for slot in range(num_slots) for kind in ("copy_done", "slot_free")
        )

    def note(self, *call) -> None:
        (self.calls if self.graph is None else self.graph).append(call)

    def event(self) -> str:
        return next(self._events)

    def plan(self, copies):
        return copies

    def copy(self, plan) -> None:
        self.note("copy", *plan)

    def record(self, event) -> None:
        self.note("record", event)

    def wait(self, event) -> None:
        self.note("wait", event)

    def compute_record(self, event) -> None:
        self.note("compute_record", event)

    def compute_wait(self, event) -> None:
        self.note("compute_wait", event)

    def is_done(self, event) -> bool:
        return True

    def is_capturing(self) -> bool:
        return self.graph is not None

    def drain(self) -> None: ...

    def close(self) -> None: ...

    def slots(self) -> list[int | None]:
        """The layer whose bytes lie in each slot after all calls so far, each of which found its own layer there."""
        held: list[int | None] = [None] * self.num_slots
        under_way: dict[str, int] = {}  # event: the layer whose copy it ends
        for call in self.calls:
            match call:
                case ("copy", ordinal):
                    held[ordinal % self.num_slots] = copied = ordinal
                case ("record", event):
                    under_way[event] = copied
                case ("compute_wait", event):
                    under_way.pop(event, None)
                case ("kernels", ordinal):
                    found = held[ordinal % self.num_slots]
                    assert found == ordinal, f"layer {ordinal} would read layer {found}"
                    assert ordinal not in under_way.values(), f"layer {ordinal} is read while it is copied"
        return held


@dataclasses.dataclass
class FakeLayer:
    ordinal: int
    copied_bytes: int = 100
    view: str | None = None

    @property
    def name(self) -> str:
        return f"model.layers.{self.ordinal}.experts"

    @property
    def copies(self):
        return [self.ordinal]

    def bind(self, view: str) -> None:
        self.view = view


def make(
    num_layers: int, num_slots: int, direct_max_tokens: int = 0, num_drafts: int = 0
) -> tuple[Prefetcher, list[FakeLayer], Trace]:
    schedule = Schedule(num_layers=num_layers, max_slots=num_slots)
    trace = Trace(schedule.num_slots)
    layers = [FakeLayer(i) for i in range(num_layers + num_drafts)]
    prefetcher = Prefetcher(layers, trace, schedule=schedule, direct_max_tokens=direct_max_tokens)
    assert prefetcher.held == [None] * schedule.num_slots
    prefetcher.start()
    return prefetcher, layers, trace


def forward(prefetcher: Prefetcher, layers: list[FakeLayer], trace: Trace, tokens: int = 100) -> None:
    for layer in layers:
        view = prefetcher.acquire(layer, tokens)
        trace.note("kernels" if view == STREAMED else "kernels in place", layer.ordinal)
        prefetcher.release(layer, view)


def fill_of(slot: int, ordinal: int, world: str = "") -> list[tuple]:
    """The calls that fill a slot behind everything that the computing stream has been given."""
    copy_done, slot_free = f"{world}copy_done{slot}", f"{world}slot_free{slot}"
    return [("compute_record", slot_free), ("wait", slot_free), ("copy", ordinal), ("record", copy_done)]


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
            expected += [("compute_wait", f"copy_done{s}"), *fill, ("kernels", i)]
            fill = fill_of(s, following) if following != i else []
        expected += fill
        assert trace.calls == expected
        assert prefetcher.held == list(range(slots)), "the first layers of the next forward"
    assert prefetcher.counters.refills == 0
    copies = slots + 2 * (num_layers if num_layers > slots else 0)
    alone = sum(s + slots >= num_layers for s in range(slots)) if num_layers > slots else 0  # slots with one layer
    assert prefetcher.counters.prefetched_bytes == 100 * (copies - 2 * alone)


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
            trace.slots()


@pytest.mark.parametrize("order", [[2, 0, 1, 3], [3, 2, 1, 0], [0, 2, 0, 3], [0, 0, 1, 1]])
def test_out_of_order_layers_are_fetched_again(order: list[int]) -> None:
    """A layer that is not in its slot is copied before its kernels, and counted."""
    prefetcher, layers, trace = make(4, 2)
    forward(prefetcher, [layers[i] for i in order], trace)
    trace.slots()
    assert prefetcher.counters.refills > 0


@pytest.mark.parametrize("captured", [False, True])
def test_a_draft_gives_its_slot_back(captured: bool) -> None:
    """A draft model's layer is copied when it is needed; then the slot's first layer is again, and the ring runs on.

    Its forwards run outside of steps, any of its layers any number of times, each in the view of its own rows.
    """
    prefetcher, layers, trace = make(4, 2, direct_max_tokens=8, num_drafts=2)
    target, drafts = layers[:4], layers[4:]
    forward(prefetcher, target, trace)
    world = "captured " * captured
    visit = [*fill_of(0, 4, world), ("compute_wait", f"{world}copy_done0"), ("kernels", 4), *fill_of(0, 0, world)]
    trace.calls.clear()
    if captured:
        prefetcher.before_graph()
        graph = capture_piece(prefetcher, drafts[:1], trace)
        assert graph == [*visit, ("compute_wait", "captured copy_done0")]
        trace.calls.clear()
        launch(prefetcher, trace, [graph, graph])
    else:
        forward(prefetcher, drafts[:1], trace)
        assert trace.calls == visit
    forward(prefetcher, [drafts[1], drafts[0], drafts[0]], trace)
    forward(prefetcher, drafts, trace, tokens=8)
    assert {draft.view for draft in drafts} == {DIRECT} and prefetcher.counters.drafts == {DIRECT: 2, STREAMED: 4 - captured}
    for _ in range(2):
        prefetcher.begin_step(100, exact=False)
        forward(prefetcher, target, trace)
        prefetcher.end_step(100)
    trace.calls[:0] = fill_of(1, 1)  # as the first forward left it
    assert trace.slots() == prefetcher.held == [0, 1] and prefetcher.counters.refills == 0


def test_a_draft_s_graph_waits_for_copies_that_a_step_before_has_left() -> None:
    """Although the step dispatches, which touches no slot."""
    prefetcher, layers, trace = make(4, 2, num_drafts=1)
    prefetcher.before_graph()
    graph = capture_piece(prefetcher, layers[4:], trace)
    prefetcher.begin_step(100, exact=True)
    forward(prefetcher, layers[:4], trace)
    prefetcher.end_step(100)
    prefetcher.begin_step(1, exact=True, dispatched=True)
    trace.calls.clear()
    launch(prefetcher, trace, [graph])
    assert trace.calls[:2] == [("compute_wait", "copy_done0"), ("compute_wait", "copy_done1")]


def test_a_slot_is_what_its_layer_and_its_last_state_allow() -> None:
    """Waiting checks the layer that the event protects."""
    slot = Slot(is_captured=False, copy_done=0, slot_free=0, ordinal=2, state=State.FILLED)
    with pytest.raises(DWDPError, match="layer 0 cannot be read: its slot is filled with layer 2"):
        slot.become(State.READ, 0)
    slot.state = State.LOST
    with pytest.raises(DWDPError, match="layer 2 cannot be read: its slot is lost with layer 2"):
        slot.become(State.READ, 2)


def test_a_reader_is_waited_for_even_when_its_forward_was_cut_short() -> None:
    """The slot of an acquired, never released layer is refilled only behind a free event recorded after its kernels."""
    prefetcher, layers, trace = make(4, 2)
    prefetcher.acquire(layers[0], 100)
    trace.calls.clear()
    prefetcher.acquire(layers[2], 100)
    assert trace.calls[:3] == [("compute_record", "slot_free0"), ("wait", "slot_free0"), ("copy", 2)]


def test_direct_view_needs_no_event_and_keeps_what_is_prefetched() -> None:
    """Small batches touch neither stream; the next large one finds its first layers in place."""
    prefetcher, layers, trace = make(4, 2, direct_max_tokens=8)
    trace.calls.clear()
    prefetcher.begin_step(8, exact=True)
    prefetcher.before_graph()  # pieces of the model may be graphs
    forward(prefetcher, layers, trace, tokens=8)
    assert trace.calls == [("kernels in place", i) for i in range(4)] and {layer.view for layer in layers} == {DIRECT}
    prefetcher.end_step(8)
    prefetcher.begin_step(9, exact=True)
    forward(prefetcher, layers, trace, tokens=9)
    prefetcher.end_step(9)
    assert {layer.view for layer in layers} == {STREAMED} and prefetcher.counters.refills == 0
    assert prefetcher.counters.forwards == {DIRECT: 1, STREAMED: 1, DISPATCHED: 0} and prefetcher.counters.replays == 0


def capture(prefetcher: Prefetcher, layers: list[FakeLayer], trace: Trace, pieces: int = 1) -> list[list[tuple]]:
    """The calls inside each graph when a forward is captured, in one graph or one for each part of its layers."""
    graphs = []
    for piece in range(pieces):
        prefetcher.before_graph()
        part = layers[len(layers) * piece // pieces : len(layers) * (piece + 1) // pieces]
        graphs.append(capture_piece(prefetcher, part, trace))
    return graphs


def capture_piece(prefetcher: Prefetcher, part: list[FakeLayer], trace: Trace, tokens: int = 100) -> list[tuple]:
    graph = trace.graph = []
    try:
        forward(prefetcher, part, trace, tokens)
        prefetcher.join_graph()
    finally:
        trace.graph = None
    return graph


def launch(prefetcher: Prefetcher, trace: Trace, graphs: list[list[tuple]]) -> None:
    for graph in graphs:
        prefetcher.before_graph()
        trace.calls += graph


@pytest.mark.parametrize(("num_layers", "num_slots"), SHAPES)
@pytest.mark.parametrize("pieces", [1, 3])
def test_a_graph_carries_its_copies(num_layers: int, num_slots: int, pieces: int) -> None:
    """Captured forwards use events of their own, wait for every copy inside their graph, and end as they began."""
    prefetcher, layers, trace = make(num_layers, num_slots)
    moved, made = prefetcher.counters.prefetched_bytes, trace.calls.copy()
    graphs = capture(prefetcher, layers, trace, pieces)
    waits = [("compute_wait", f"copy_done{s}") for s in range(trace.num_slots)]
    assert trace.calls == made + waits * pieces, "a capture copies nothing"
    for graph in graphs:
        unjoined = set()
        for call in graph:
            match call:
                case ("copy", ordinal):
                    unjoined.add(f"captured copy_done{ordinal % trace.num_slots}")
                case ("compute_wait", event):
                    unjoined.remove(event)
                case ("kernels", ordinal):
                    assert f"captured copy_done{ordinal % trace.num_slots}" not in unjoined
                case (_, event):
                    assert event.startswith("captured")
        assert not unjoined, "a capture with copies that nothing waits for is invalid"
    assert prefetcher.held == list(prefetcher.schedule.first)
    assert prefetcher.counters.forwards[STREAMED] == 0 and prefetcher.counters.prefetched_bytes == moved
    for _ in range(2):
        prefetcher.begin_step(100, exact=True)
        launch(prefetcher, trace, graphs)
        prefetcher.end_step(100)
        assert trace.slots() == prefetcher.held == list(prefetcher.schedule.first), "a replay leaves what it found"
    assert prefetcher.counters.replays == 2


def test_order_of_a_captured_forward() -> None:
    """As an eager one, but that the first layers need no event and the last copies are waited for at the end."""
    prefetcher, layers, trace = make(4, 2)
    (graph,) = capture(prefetcher, layers, trace)
    assert graph == [
        ("kernels", 0), *fill_of(0, 2, "captured "), ("kernels", 1),
        ("compute_wait", "captured copy_done0"), *fill_of(1, 3, "captured "), ("kernels", 2),
        ("compute_wait", "captured copy_done1"), *fill_of(0, 0, "captured "), ("kernels", 3),
        *fill_of(1, 1, "captured "),
        ("compute_wait", "captured copy_done0"), ("compute_wait", "captured copy_done1"),
    ]


def test_a_replay_waits_for_copies_under_way_and_is_counted() -> None:
    """Before a launch the computing stream waits for both slots; copies after it wait for all of it."""
    prefetcher, layers, trace = make(5, 2, direct_max_tokens=8)
    forward(prefetcher, layers, trace)  # vLLM runs the model outside of steps, too
    capture(prefetcher, layers, trace)
    moved = prefetcher.counters.prefetched_bytes
    trace.calls.clear()
    prefetcher.begin_step(64, exact=True)
    prefetcher.before_graph()
    prefetcher.end_step(64)
    assert trace.calls == [("compute_wait", "copy_done0"), ("compute_wait", "copy_done1")]
    assert prefetcher.counters.forwards == {DIRECT: 0, STREAMED: 2, DISPATCHED: 0} and prefetcher.counters.replays == 1
    assert prefetcher.counters.prefetched_bytes == moved + 500 and prefetcher.counters.refills == 0
    trace.calls.clear()
    forward(prefetcher, layers, trace)
    assert trace.calls[:7] == [
        ("compute_wait", "copy_done0"), ("kernels", 0), ("compute_wait", "copy_done1"), *fill_of(0, 2),
    ], "the first copy after a replay begins behind everything that was launched"


def test_a_graph_that_may_be_padded_waits() -> None:
    """With several tokens a request, a small batch may replay the graph of a streamed one."""
    prefetcher, layers, trace = make(5, 2, direct_max_tokens=8)  # noqa: RUF059
    trace.calls.clear()
    prefetcher.begin_step(8, exact=False)
    prefetcher.before_graph()
    assert trace.calls == [("compute_wait", "copy_done0"), ("compute_wait", "copy_done1")]


def test_a_step_after_one_that_was_cut_short_finds_the_first_layers() -> None:
    """A replay cannot see what is in the slots: they are put right before the step."""
    for cut in range(5):
        prefetcher, layers, trace = make(5, 2)
        forward(prefetcher, layers[: cut + 1], trace)
        prefetcher.begin_step(64, exact=True)
        assert prefetcher.held == [0, 1]
        forward(prefetcher, layers, trace)
        assert trace.slots() == [0, 1]


def test_layers_out_of_order_are_not_captured() -> None:
    """A graph of them would leave other layers in the slots than it found."""
    prefetcher, layers, trace = make(4, 2, direct_max_tokens=8)
    trace.graph = []
    with pytest.raises(DWDPError, match=r"layer 2 after 0.*--max-cudagraph-capture-size 8"):
        prefetcher.acquire(layers[2], 9)


def test_a_forward_that_would_mix_views_is_not_captured() -> None:
    """Last layers on fewer tokens: a graph of such a forward leaves {2, 1} in the slots and nobody hears of it."""
    prefetcher, layers, trace = make(4, 2, direct_max_tokens=8)
    prefetcher.before_graph()
    first = capture_piece(prefetcher, layers[:2], trace)
    prefetcher.before_graph()
    with pytest.raises(DWDPError, match=r"layers.2.experts .MoE layer 2. has 5 rows .*dwdp-direct-max-tokens 0"):
        capture_piece(prefetcher, layers[2:], trace, tokens=5)
    prefetcher.begin_step(100, exact=True)
    launch(prefetcher, trace, [first])  # whoever caught the error goes on with what was captured
    prefetcher.end_step(100)
    assert prefetcher.held == [None, None], "no graph of this forward brought the first layers back"
    forward(prefetcher, layers, trace)
    assert trace.slots() == [0, 1] and prefetcher.counters.refills == 2


@pytest.mark.parametrize(("tokens", "later"), [(100, 5), (5, 100)])
@pytest.mark.parametrize("in_step", [True, False])
def test_a_forward_keeps_its_view(tokens: int, later: int, in_step: bool) -> None:
    """The first layer or the step chooses; a later layer with other rows is named; the next forward chooses anew."""
    prefetcher, layers, trace = make(4, 2, direct_max_tokens=8)
    if in_step:
        prefetcher.begin_step(tokens, exact=True)
        with pytest.raises(DWDPError, match=r"MoE layer 0. has"):
            prefetcher.acquire(layers[0], later)
    forward(prefetcher, layers[:3], trace, tokens)
    bound = layers[3].view
    with pytest.raises(DWDPError, match=f"layers.3.experts .MoE layer 3. has {later} rows .*direct_max_tokens=8"):
        prefetcher.acquire(layers[3], later)
    assert layers[3].view == bound
    if in_step:
        prefetcher.begin_step(later, exact=True)
    forward(prefetcher, layers, trace, later)
    if in_step:
        prefetcher.end_step(later)
    forward(prefetcher, layers[::-1], trace, tokens)  # no first layer: the last forward's end tells
    trace.slots()


def test_a_step_that_may_be_padded_takes_its_first_layers_view() -> None:
    """Its number of tokens is not its number of rows."""
    prefetcher, layers, trace = make(4, 2, direct_max_tokens=8)
    for tokens, rows in ((6, 8), (6, 16), (16, 16)):
        prefetcher.begin_step(tokens, exact=False)
        forward(prefetcher, layers, trace, rows)
        prefetcher.end_step(tokens)
    assert prefetcher.counters.forwards == {DIRECT: 1, STREAMED: 2, DISPATCHED: 0}
    prefetcher.begin_step(16, exact=False)
    with pytest.raises(DWDPError, match="of the streamed view"):
        prefetcher.acquire(layers[0], 8)


class Injected(Exception):
    pass


def forward_that_fails(prefetcher: Prefetcher, places: Iterator[int], part: list[FakeLayer]) -> None:
    """Fails before or after a layer's kernels, as soon as there are no more `places`."""
    for layer in part:
        view = prefetcher.acquire(layer, 100)
        if next(places, None) is None:
            raise Injected
        prefetcher.release(layer, view)
        if next(places, None) is None:
            raise Injected


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize("afterwards", ["eager", "step", "capture"])
def test_a_capture_that_fails_changes_no_slot(pieces: int, afterwards: str) -> None:
    """Wherever it fails, before or after a layer's kernels or between pieces: all that was captured has never run."""
    for fail_at in range(15):
        prefetcher, layers, trace = make(5, 2)
        places = iter(range(fail_at + 1))
        with pytest.raises(Injected):
            for piece in range(pieces):
                prefetcher.before_graph()
                trace.graph = []
                forward_that_fails(prefetcher, places, layers[5 * piece // pieces : 5 * (piece + 1) // pieces])
                prefetcher.join_graph()
                trace.graph = None
                if next(places, None) is None:
                    raise Injected  # what runs between pieces
            raise Injected
        trace.graph = None
        assert prefetcher.held == trace.slots() == [0, 1]
        if afterwards == "step":
            prefetcher.begin_step(100, exact=True)
        if afterwards == "capture":
            prefetcher.begin_step(0, exact=True)
            prefetcher.end_step(0)
            graphs = capture(prefetcher, layers, trace, pieces)
            prefetcher.begin_step(100, exact=True)
            launch(prefetcher, trace, graphs)
        else:
            forward(prefetcher, layers, trace)
            capture(prefetcher, layers, trace, pieces)
        assert prefetcher.held == trace.slots() == [0, 1] and prefetcher.counters.refills == 0


@pytest.mark.parametrize("afterwards", ["eager", "step"])
def test_a_step_whose_graphs_did_not_all_run_leaves_no_tag_that_lies(afterwards: str) -> None:
    """Pieces were launched and something between them failed: nobody can say what is in the slots."""
    for launched in range(4):
        prefetcher, layers, trace = make(5, 2)
        graphs = capture(prefetcher, layers, trace, pieces=3)
        prefetcher.begin_step(100, exact=True)
        launch(prefetcher, trace, graphs[:launched])
        if afterwards == "step":
            prefetcher.begin_step(100, exact=True)
        forward(prefetcher, layers, trace)
        assert trace.slots() == prefetcher.held == [0, 1]
        assert prefetcher.counters.refills == (2 if launched else 0)


def test_graphs_without_layers_cost_nothing() -> None:
    """Layers may run eagerly between the pieces of a step, and graphs of a draft model before it or after it."""
    prefetcher, layers, trace = make(5, 2)
    prefetcher.before_graph()
    capture_piece(prefetcher, [], trace)
    for _ in range(2):
        prefetcher.begin_step(100, exact=True)
        for layer in layers:
            prefetcher.before_graph()
            forward(prefetcher, [layer], trace)
        prefetcher.end_step(100)
        prefetcher.before_graph()
    assert trace.slots() == [0, 1] and prefetcher.counters.refills == 0
    capture(prefetcher, layers, trace)
    prefetcher.before_graph()
    prefetcher.begin_step(100, exact=True)
    assert prefetcher.counters.refills == 0


def test_a_layer_is_released_once_and_after_it_was_acquired() -> None:
    """Whoever gives away a slot that is read, or not its own, is told so."""
    prefetcher, layers, _ = make(4, 2)
    for wrong in (0, 2):
        with pytest.raises(DWDPError, match=f"layer {wrong} cannot be released: its slot is filled with layer 0"):
            prefetcher.release(layers[wrong], STREAMED)
    prefetcher.release(layers[0], prefetcher.acquire(layers[0], 100))
    with pytest.raises(DWDPError, match="layer 0 cannot be released: its slot is released with layer 0"):
        prefetcher.release(layers[0], STREAMED)


def test_a_copy_that_fails_leaves_no_tag(monkeypatch) -> None:
    """The slot is nobody's until its copy is enqueued as a whole."""
    prefetcher, layers, trace = make(4, 2)
    copy = trace.copy
    prefetcher.release(layers[0], prefetcher.acquire(layers[0], 100))

    def fail(plan) -> None:
        raise Injected

    monkeypatch.setattr(trace, "copy", fail)
    with pytest.raises(Injected):
        prefetcher.acquire(layers[1], 100)
    assert prefetcher.held == [None, 1]
    monkeypatch.setattr(trace, "copy", copy)
    forward(prefetcher, layers, trace)
    assert trace.slots() == [0, 1]


def test_a_profile_names_copies() -> None:
    """While a profiler runs, and only then: a range each costs 12 us."""
    prefetcher, layers, trace = make(4, 2)
    with profile() as seen:
        forward(prefetcher, layers, trace)
    names = [event.name for event in seen.events() if event.name.startswith("dwdp")]
    assert names == [f"dwdp copy model.layers.{i}.experts" for i in (2, 3, 0, 1)]
