"""Invariant: the hot cache swaps pages under unchanging addresses: bytes stay their expert's, and fewer are fetched."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_transport import DEVICES, Shards, run, torch_device

from vllm_dwdp import hot
from vllm_dwdp.hot import HotCache
from vllm_dwdp.layout import bundle_size
from vllm_dwdp.placement import spread_residents
from vllm_dwdp.schedule import DIRECT, STREAMED

from harness import Group, generate, reference, stats, streamed_model

pytestmark = pytest.mark.engine

HOT_EXPERTS = [1, 4, 8, 10]


def check_swaps(rank: int, size: int, port: int, kind: str, cached: float, **shape) -> None:
    hot.REFRESH_STEPS, num_experts = 3, shape["num_experts"]
    shards = Shards(rank, size, port, kind, **shape)
    page, layers = shards.device.page_bytes, shards.layers
    remote_pages = sum(len(pages) for layer in layers for tensor in layer.tensors for _, pages in tensor.missing())
    cache = HotCache(layers, shards.device, shards.stream, shards.prefetcher, rank=rank, slice_bytes=0,
                     num_pages=int(cached * remote_pages))
    held = shards.device.allocated_bytes
    cache.start()
    rng = np.random.default_rng(rank)
    for phase in range(4):
        favourite, noise = rng.choice(num_experts, 2, replace=False).tolist()
        for step in range(60):
            for layer in layers:
                read = [[favourite, noise]] if step % 10 == 0 else [[favourite]]
                cache.count(layer, torch.tensor(read, device=torch_device(shards.device)))
            cache.advance()
            if step % 5 == 0:
                shards.prefetcher.drain()
                assert all(shards.same(layer, DIRECT) for layer in layers), f"phase {phase}, step {step}"
                layer = layers[step % len(layers)]
                view = shards.prefetcher.acquire(layer, 1)
                assert shards.same(layer, STREAMED)
                shards.prefetcher.release(layer, view)
            used = [number for pages in cache._resident.values() for number in pages] + cache._free
            used += [number for pages in cache._staged.values() for number in pages]
            assert sorted(used) == list(range(len(cache._blocks))), "every page is one bundle's, or free"
        cache.bill()
        before = cache.direct_bytes
        for layer in layers:
            cache.count(layer, torch.tensor([[favourite]], device=torch_device(shards.device)))
        cache.bill()
        assert cache.direct_bytes == before, "what is read all the time is read here"
    assert cache.swapped > 0 and shards.device.allocated_bytes == held, "nothing is allocated while serving"
    local = sum(len(pages) for pages in cache._resident.values()) * page
    tail = sum(-t.spec.layout.total_bytes % page for layer in layers for t in layer.tensors)
    served = sum(layer.copied_bytes for layer in layers)
    assert 0 <= remote_pages * page - local - served <= tail, "slots are filled from here, too"
    if kind == "host":  # whose plans are the copies themselves
        copied, copy = [], shards.stream.copy
        shards.stream.copy = lambda plan: (copied.append(plan), copy(plan))
        shards.prefetcher.begin_step(1, exact=True)
        copied.clear()
        for layer in layers:
            shards.prefetcher.release(layer, shards.prefetcher.acquire(layer, 1))
        order = [shards.prefetcher.schedule.following(layer.ordinal) for layer in layers]
        moved = [layers[i].copies for i in order if not shards.prefetcher.schedule.is_alone(i)]
        assert copied == moved, "no copy spans a peer's pages and ours"
    shards.group.barrier("swapped")
    cache.close()
    shards.close()
    assert shards.device.allocated_bytes == 0


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize(
    ("size", "shape"),
    [
        (2, {"num_experts": 12, "rows": {"w13": 2048, "w2": 1024}, "bundle": 1, "cached": 0.6}),
        (2, {"num_experts": 9, "rows": {"w13": 3000, "w2": 1500}, "bundle": 2, "cached": 0.8}),
        (3, {"num_experts": 10, "rows": {"w13": 2000}, "bundle": 1, "cached": 0.6, "num_layers": 5, "num_slots": 3}),
    ],
    ids=["pages", "straddling", "uneven"],
)
def test_bytes_stay_while_pages_swap(kind: str, size: int, shape: dict) -> None:
    """Both views are exact after every stage; experts read all the time end up here, and memory never grows."""
    if kind == "cuda":
        shape = shape | {"rows": {name: 512 * row for name, row in shape["rows"].items()}}
    run(check_swaps, size, kind, **shape)


def skewed(model: str, folder: Path) -> str:
    """The same model with a router that prefers a few experts."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("mlp.gate.weight"):
            tensors[name][HOT_EXPERTS] *= 5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def refresh_often(rank: int) -> None:
    hot.REFRESH_STEPS = 8


def one_round(llm) -> dict:
    """Generate; what the direct view took from peers meanwhile, and what it would have with the even cache."""
    model = streamed_model(llm)
    before, reads = stats(llm)["direct_bytes"], model.hot._billed_at.copy()
    answers = generate(llm)
    after, reads = stats(llm)["direct_bytes"], model.hot._billed_at - reads
    cache = model.hot.nbytes // model.hot._uncached_bytes.max()
    even = 0
    for layer, residents in zip(model.weights, spread_residents(cache, len(model.weights)), strict=True):
        held = layer.tensors[0].spec.layout.placement.held(model.rank, residents)
        remote = [expert for expert in range(12) if expert not in held]
        even += int((reads[layer.ordinal] * model.hot._uncached_bytes[layer.ordinal])[remote].sum())
    return {"answers": answers, "hot": after - before, "even": even, "swapped": model.hot.swapped}


def test_hot_reads_less_than_even(models, tmp_path: Path) -> None:
    """With a skewed router the same memory takes fewer bytes from peers, and no answer changes while it refills."""
    model = skewed(models("qwen3_moe"), tmp_path / "skewed")
    expected = reference(model)
    options = {"cache_gib": 200 * 4096 / 2**30, "cache_policy": "hot"}
    with Group(model, 2, options, setup=refresh_often) as group:
        rounds = [group.run(one_round) for _ in range(4)]
        memory = [s["memory_bytes"]["resident"] for s in group.run(stats)]
    assert [[rank["answers"] for rank in ranks] for ranks in rounds] == [[expected] * 2] * 4
    assert memory == [200 * 4096] * 2
    for rank in range(2):
        first, last = rounds[0][rank], rounds[-1][rank]
        assert last["swapped"] > first["swapped"] > 0
        assert 0 < last["hot"] < 0.75 * last["even"], (last["hot"], last["even"])


def test_bundles_fill_pages() -> None:
    """The fewest experts that fill whole pages of all tensors; at least four pages where no few do."""
    assert bundle_size([6 << 20, 3 << 20], 2 << 20) == 2
    assert bundle_size([4 << 20, 2 << 20], 2 << 20) == 1
    assert bundle_size([3000, 1000], 4096) == 17
