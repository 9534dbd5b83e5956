"""Invariant: cache and slots never take more than the room beside the shard, and what is refused says how much fits."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dwdp.budget import GIB, LayerSize, MemoryLimit, announce, cache_bytes, describe_cache, plan_cache, table
from vllm_dwdp.config import Options
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.placement import Placement

LAYERS = [LayerSize(placement=Placement(num_experts=128, size=2), expert_bytes=[6 << 20, 3 << 20])] * 48
REMOTE = 64 * (9 << 20)  # bytes of a layer
LIMIT = MemoryLimit(gpu_memory_utilization=0.9, kv_cache_memory_bytes=None)


def device(free_gib: float, others_gib: float = 0) -> SimpleNamespace:
    """80 GiB; what is not free is this process's but for `others_gib`."""
    memory = (int(free_gib * GIB), 80 * GIB, int((80 - free_gib - others_gib) * GIB))
    return SimpleNamespace(memory=lambda: memory, release_cached=lambda: None)


def test_room() -> None:
    """Free memory less vLLM's margin and the slots: a number takes it up to what is remote, auto leaves its floor."""
    room = 40 * GIB - 8 * GIB - 2 * REMOTE
    assert cache_bytes(LAYERS, device(40), Options(size=2), LIMIT) == 0
    assert cache_bytes(LAYERS, device(40), Options(size=2, cache_gib=20), LIMIT) == 20 * GIB
    auto = Options(size=2, cache_gib="auto", cache_floor_gib=10)
    assert abs(cache_bytes(LAYERS, device(40), auto, LIMIT) - (room - 10 * GIB)) <= 1
    assert abs(cache_bytes(LAYERS, device(40), auto, LIMIT, 3 * GIB) - (room - 13 * GIB)) <= 1, "beside an inbox"
    assert cache_bytes(LAYERS, device(75), Options(size=2, cache_gib=60), LIMIT) == 48 * REMOTE, "all that is remote"
    assert cache_bytes(LAYERS, device(12), auto, LIMIT) == 0
    small = LayerSize(placement=Placement(num_experts=8, size=2), expert_bytes=[1])
    assert abs(cache_bytes([*LAYERS, small], device(40), auto, LIMIT) - (room - 10 * GIB)) <= 1, "slots hold the largest layer"


def test_engines_that_share_a_device() -> None:
    """What others hold is not this engine's share; a KV cache given in bytes replaces the share, as it does in vLLM."""
    auto = Options(size=2, cache_gib="auto", cache_floor_gib=0)
    quarter = MemoryLimit(gpu_memory_utilization=0.25, kv_cache_memory_bytes=None)
    assert abs(cache_bytes(LAYERS, device(40, others_gib=30), auto, quarter) - (10 * GIB - 2 * REMOTE)) <= 1
    assert abs(cache_bytes(LAYERS, device(5, others_gib=70), auto, quarter) - (5 * GIB - 2 * REMOTE)) <= 1
    given = MemoryLimit(gpu_memory_utilization=0.1, kv_cache_memory_bytes=8 * GIB)
    assert abs(cache_bytes(LAYERS, device(20, others_gib=50), auto, given) - (12 * GIB - 2 * REMOTE)) <= 1
    with pytest.raises(DWDPError, match=r"kv_cache_memory_bytes=8589934592: the largest cache that does is --dwdp-cache-gib 10.87"):
        cache_bytes(LAYERS, device(20), Options(size=2, cache_gib=12), given)


def test_an_inbox_that_does_not_fit_is_named() -> None:
    with pytest.raises(DWDPError, match=r"2 slots of 0.56 GiB and an inbox of 1.00 GiB do not fit .* ranks, --dwdp-dispatch off or "):
        cache_bytes(LAYERS, device(9.5), Options(size=2), LIMIT, inbox_bytes=GIB)
    assert cache_bytes(LAYERS, device(9.5), Options(size=2), LIMIT) == 0


@pytest.mark.parametrize(
    ("free_gib", "options", "named"),
    [
        (
            9, {"slots": 3},
            "3 slots of 0.56 GiB do not fit .* 0.69 GiB are missing; use more ranks, --dwdp-slots 2 or a higher --gpu-memory-utilization",
        ),
        (20, {"cache_gib": 12}, "--dwdp-cache-gib 12.* the largest cache that does is --dwdp-cache-gib 10.87"),
    ],
)
def test_refusals(free_gib: float, options: dict, named: str) -> None:
    """What does not fit is refused with what is missing, or the largest that would - which then does fit."""
    with pytest.raises(DWDPError, match=named):
        cache_bytes(LAYERS, device(free_gib), Options(size=2, **options), LIMIT)
    assert cache_bytes(LAYERS, device(20), Options(size=2, cache_gib=10.87), LIMIT) == int(10.87 * GIB)


@given(st.integers(0, 48 * REMOTE))
def test_plan(nbytes: int) -> None:
    """Never more residents than the bytes hold, nor fewer by a whole one; and everything when the bytes suffice."""
    assert 0 <= nbytes - sum(plan_cache(LAYERS, nbytes)) * (9 << 20) < 9 << 20
    assert plan_cache(LAYERS, 48 * REMOTE) == [64] * 48


def test_table() -> None:
    """Every rank's memory by kind, and its sum, in GiB."""
    text = table([{"shard": GIB, "slots": GIB // 2}, {"shard": 3 * GIB, "slots": 0}]).splitlines()
    assert [line.split() for line in text] == [
        ["GiB", "shard", "slots", "total"], ["rank", "0", "1.000", "0.500", "1.500"],
        ["rank", "1", "3.000", "0.000", "3.000"],
    ]


def test_cache_says_what_it_took() -> None:
    """A cache that takes every remote expert says so; a small one has a size."""
    tiny = [LayerSize(placement=Placement(num_experts=8, size=2), expert_bytes=[3 << 10])] * 2
    for nbytes, said in ((8 * (3 << 10), "all 8 remote experts are resident, 0.02 MiB"),
                         (2 * (3 << 10), "0.01 MiB, room for 2 of 8 remote experts")):
        assert describe_cache(tiny, nbytes) == f"DWDP cache: {said}"


def test_announcement() -> None:
    """One line a rank, which never prints the number that stands for "always direct"."""
    rest = dict(rank=1, direct_max_tokens=24, held_bytes=30 * GIB)
    assert announce(LAYERS, streamed_bytes=24 * GIB, **rest) == (
        "DWDP on: rank 1 of 2 owns 64 of 128 experts in each of 48 layers, streams 24.00 GiB in a step that is "
        "not dispatched and has more than 24 tokens, holds 30.00 GiB"
    )
    rest["direct_max_tokens"] = 2**31
    text = announce(LAYERS, streamed_bytes=0, **rest)
    assert "streams nothing, as every remote expert is resident" in text and str(2**31) not in text
    mixed = [*LAYERS[:1], LayerSize(placement=Placement(num_experts=8, size=2), expert_bytes=[1])]
    assert "owns 68 of 136 experts in 2 layers" in announce(mixed, streamed_bytes=1, **rest)
