"""Invariant: every layer has one slot and one layer after it there, and the tables say which."""

import pytest

from vllm_dwdp.schedule import DIRECT, STREAMED, Schedule, default_direct_max_tokens, view_of


@pytest.mark.parametrize(
    ("num_layers", "max_slots", "slots", "following", "alone"),
    [
        (4, 2, [0, 1, 0, 1], [2, 3, 0, 1], []),
        (5, 2, [0, 1, 0, 1, 0], [2, 3, 4, 1, 0], []),
        (5, 3, [0, 1, 2, 0, 1], [3, 4, 2, 0, 1], [2]),
        (7, 4, [0, 1, 2, 3, 0, 1, 2], [4, 5, 6, 3, 0, 1, 2], [3]),
        (2, 2, [0, 1], [0, 1], [0, 1]),
        (2, 3, [0, 1], [0, 1], [0, 1]),
        (1, 8, [0], [0], [0]),
        (3, 1, [0, 0, 0], [1, 2, 0], []),
    ],
)
def test_table(num_layers: int, max_slots: int, slots: list[int], following: list[int], alone: list[int]) -> None:
    """The slot of each layer, the layer after it there, and the layers that share their slot with none."""
    schedule = Schedule(num_layers=num_layers, max_slots=max_slots)
    layers = range(num_layers)
    assert [schedule.slot(i) for i in layers] == slots
    assert [schedule.following(i) for i in layers] == following
    assert [i for i in layers if schedule.is_alone(i)] == alone
    assert [i for i in layers if schedule.is_last(i)] == [num_layers - 1]
    assert list(schedule.first) == [slots.index(s) for s in range(schedule.num_slots)]


@pytest.mark.parametrize("num_layers", range(1, 20))
@pytest.mark.parametrize("max_slots", range(1, 9))
def test_a_forward_ends_as_it_began(num_layers: int, max_slots: int) -> None:
    """Whoever fills each slot with what follows finds every layer in its slot, for ever, and each slot in use."""
    schedule = Schedule(num_layers=num_layers, max_slots=max_slots)
    held = list(schedule.first)
    for _ in range(2):
        for ordinal in range(num_layers):
            assert held[schedule.slot(ordinal)] == ordinal
            held[schedule.slot(ordinal)] = schedule.following(ordinal)
        assert held == list(schedule.first) == list(range(schedule.num_slots))


@pytest.mark.parametrize(
    ("num_rows", "direct_max_tokens", "view"),
    [(1, 0, STREAMED), (8, 8, DIRECT), (9, 8, STREAMED), (1, 8, DIRECT), (16384, 2**31, DIRECT)],
)
def test_view(num_rows: int, direct_max_tokens: int, view: str) -> None:
    """Up to direct_max_tokens a forward reads in place."""
    assert view_of(num_rows, direct_max_tokens) == view


@pytest.mark.parametrize(
    ("num_experts", "top_k", "tokens"),
    [(128, 8, 21), (256, 8, 43), (12, 2, 7), (8, 2, 4), (32, 4, 10), (2, 1, 2), (128, 127, 1), (8, 8, 1),
     (4, 6, 1), (1, 1, 1)],
)
def test_break_even(num_experts: int, top_k: int, tokens: int) -> None:
    """The default is the largest batch that routes to three quarters of the experts, and at least one token."""
    assert default_direct_max_tokens(num_experts, top_k) == tokens
    missed = 1 - top_k / num_experts
    assert tokens == 1 or missed**tokens >= 0.25 * (1 - 1e-9) > missed ** (tokens + 1)
