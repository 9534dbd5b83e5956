"""Invariants of placement and layout: everything is owned, everything missing is served, and no byte moves twice."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dwdp.errors import DWDPError
from vllm_dwdp.layout import Layout, covers, interleave
from vllm_dwdp.placement import Placement, spread_residents

PAGE = 4096


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    num_experts = draw(st.integers(2, 140))
    size = draw(st.integers(2, min(num_experts, 8)))
    overlap = draw(st.one_of(st.none(), st.integers(-(-num_experts // size), num_experts)))
    return Placement(num_experts=num_experts, size=size, experts_per_rank=overlap)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    placement = draw(placements())
    return Layout(
        placement=placement, page_bytes=PAGE, expert_bytes=draw(st.integers(1, 5 * PAGE)),
        residents=draw(st.integers(0, placement.num_experts)),
    )


def check(layout: Layout) -> None:
    placement, page = layout.placement, layout.page_bytes
    ranks = range(placement.size)
    owned = [placement.owned(r) for r in ranks]
    assert set().union(*owned) == set(range(placement.num_experts)), "every expert has an owner"
    counts = {len(o) for o in owned}
    assert max(counts) - min(counts) <= (placement.experts_per_rank is None), "shares differ by one at most"
    last = -(-layout.total_bytes // page)
    for r in ranks:
        held = placement.held(r, layout.residents)
        assert covers(held, owned[r])
        assert len(held) == min(placement.num_experts, len(owned[r]) + layout.residents)
        pages, missing = layout.held_pages(r), layout.missing(r)
        assert sorted([*pages, *missing[0], *missing[1]]) == list(range(last)), "held and missing pages are all pages"
        assert [p for s in layout.segments(r) for p in s] == list(layout.owned_pages(r))
        for part in missing:
            sources = layout.sources(r, part)
            assert [p for _, s in sources for p in s] == list(part), "every missing page is copied once"
            for owner, piece in sources:
                assert piece in layout.segments(owner), "from one block of a rank that holds it"
        fills = layout.fills(r)
        own, top = layout.bytes_of(owned[r]), min(pages.stop * page, layout.total_bytes)
        assert sum(len(b) for _, b in fills) == top - pages.start * page - len(own), "what is held is owned or filled"
        for owner, piece in fills:
            assert owner != r and covers(layout.bytes_of(owned[owner]), piece)
            assert piece.stop <= own.start or own.stop <= piece.start


@settings(max_examples=150, deadline=None)
@given(layouts())
def test_any_layout(layout: Layout) -> None:
    """For any sizes, ranges, page straddles and residents the layout is complete and consistent on every rank."""
    check(layout)


@pytest.mark.parametrize("num_experts", [128, 60, 8])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("extra", [None, 1])
@pytest.mark.parametrize("expert_bytes", [PAGE * 3 // 2, 3 * PAGE, 1000])
def test_known_groups(num_experts: int, size: int, extra: int | None, expert_bytes: int) -> None:
    """The sizes in use, with and without overlapping ranges."""
    per_rank = None if extra is None else -(-num_experts // size) + extra
    placement = Placement(num_experts=num_experts, size=size, experts_per_rank=per_rank)
    for residents in (0, 1, num_experts // 3, num_experts):
        check(Layout(placement=placement, expert_bytes=expert_bytes, page_bytes=PAGE, residents=residents))


@given(placements(), st.integers(0, 140))
def test_traffic_is_minimal(placement: Placement, residents: int) -> None:
    """With page-multiple experts a rank copies exactly the experts that it does not hold."""
    layout = Layout(placement=placement, expert_bytes=PAGE, page_bytes=PAGE, residents=residents)
    for rank in range(placement.size):
        moved = sum(len(p) for part in layout.missing(rank) for _, p in layout.sources(rank, part))
        assert moved == placement.num_experts - len(placement.held(rank, residents))


@given(st.integers(2, 8), st.integers(0, 7), st.integers(0, 50), st.data())
def test_interleave(size: int, rank: int, slice_bytes: int, data: st.DataObject) -> None:
    """Every byte is copied once, sources start after the reader, slices alternate between sources."""
    rank %= size
    owners = [r for r in range(size) if r != rank]
    lengths = data.draw(st.lists(st.integers(1, 200), min_size=len(owners), max_size=len(owners)))
    pieces, at = [], 0
    for owner, length in zip(owners, lengths, strict=True):
        pieces.append((owner, range(at, at + length)))
        at += length
    order = interleave(pieces, rank, size, slice_bytes)
    assert sorted(byte for span in order for byte in span) == list(range(at))
    of = {byte: owner for owner, span in pieces for byte in span}
    first = [of[span.start] for span in order[: len(owners)]]
    assert first == sorted(owners, key=lambda o: (o - rank) % size), "one turn over all sources, from rank + 1 on"
    if slice_bytes:
        assert max(map(len, order)) <= slice_bytes


@pytest.mark.parametrize(
    ("slice_bytes", "order"),
    [(0, [(2, 4), (6, 9), (0, 2), (4, 6)]), (2, [(2, 4), (0, 2), (6, 8), (4, 6), (8, 9)]), (9, [(2, 4), (0, 2), (6, 9), (4, 6)])],
    ids=str,
)
def test_whole_ranges_come_source_by_source_and_slices_by_turns(slice_bytes: int, order: list[tuple[int, int]]) -> None:
    """On rank 1 of 3."""
    pieces = [(0, range(2)), (2, range(2, 4)), (0, range(4, 6)), (2, range(6, 9))]
    assert interleave(pieces, 1, 3, slice_bytes) == [range(*span) for span in order]


@pytest.mark.parametrize(
    ("reader", "owners", "server"), [(0, [1, 2], 1), (3, [0, 1], 0), (2, [0, 1], 0), (2, [0, 1, 3], 3), (1, [0, 2, 3], 2), (1, [0], 0)],
    ids=str,
)
def test_the_first_owner_after_a_reader_serves_it(reader: int, owners: list[int], server: int) -> None:
    """Counting round, in whatever order owners are named."""
    placement = Placement(num_experts=8, size=4, experts_per_rank=4)
    assert placement.server(reader, owners) == placement.server(reader, owners[::-1]) == server


@pytest.mark.parametrize(
    ("rank", "residents", "held"),
    [(1, 0, (4, 8)), (1, 2, (3, 9)), (1, 3, (3, 10)), (0, 2, (0, 6)), (2, 3, (5, 12)), (1, 7, (1, 12)), (1, 12, (0, 12))],
    ids=str,
)
def test_residents_are_held_on_both_sides_of_the_owned(rank: int, residents: int, held: tuple[int, int]) -> None:
    """Of 12 experts on three ranks; at an end of the layer all are on the other side."""
    assert Placement(num_experts=12, size=3).held(rank, residents) == range(*held)


@given(st.integers(0, 500), st.integers(1, 60))
def test_residents_are_spread(total: int, num_layers: int) -> None:
    """The longest remaining prefetch is as short as the memory allows."""
    counts = spread_residents(total, num_layers)
    assert sum(counts) == total and max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("num_experts", "size", "per_rank"), [(4, 5, None), (128, 2, 63), (128, 2, 129)])
def test_impossible_placements(num_experts: int, size: int, per_rank: int | None) -> None:
    """More ranks than experts, and ranges that leave a gap, are refused in one line."""
    with pytest.raises(DWDPError) as error:
        Placement(num_experts=num_experts, size=size, experts_per_rank=per_rank)
    assert "\n" not in str(error.value) and str(num_experts) in str(error.value)
