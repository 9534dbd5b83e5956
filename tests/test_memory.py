"""Invariant: a rank holds replicas + shard + residents + K slots, also while loading, and reads its shard only."""

import os

import pytest

from harness import Group, stats, streamed_model

pytestmark = pytest.mark.engine

BIG = {"hidden_size": 256, "moe_intermediate_size": 512}  # 1.5 MiB an expert in float32
PEAK = {"bytes": 0}
READ: list[str] = []


def watch(rank: int) -> None:
    """Record expert bytes at every allocation of shareable memory, and every tensor taken from the checkpoint."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from vllm_dwdp import assembly
    from vllm_dwdp.kernels.host import HostDevice

    allocate, assemble = HostDevice.allocate, assembly.assemble
    modules: list = []

    def watched_assemble(loaded, *args, **kwargs):
        modules.extend(layer.module for layer in loaded.layers)
        return assemble(loaded, *args, **kwargs)

    def watched_allocate(self, nbytes):
        block = allocate(self, nbytes)
        own = sum(p.untyped_storage().nbytes() for m in modules for p in m.parameters())  # not yet migrated
        PEAK["bytes"] = max(PEAK["bytes"], self.allocated_bytes + own)
        return block

    HostDevice.allocate, assembly.assemble = watched_allocate, watched_assemble
    weights = DefaultModelLoader.get_all_weights

    def watched_weights(self, *args, **kwargs):
        for name, tensor in weights(self, *args, **kwargs):
            READ.append(name)
            yield name, tensor

    DefaultModelLoader.get_all_weights = watched_weights


def small_device(rank: int) -> None:
    """48 of 64 MiB are free; and no tensor can be read."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from vllm_dwdp.kernels.host import HostDevice

    HostDevice.memory = lambda self: (48 << 20, 64 << 20, 16 << 20)
    DefaultModelLoader.get_all_weights = None


def measured(llm) -> dict:
    """Bytes of this process's shared memory, by the kernel's count; what was seen while loading."""
    model = streamed_model(llm)
    own = [block.fd for layer in model.weights for tensor in layer.tensors for _, block in tensor.held]
    own += [block.fd for block in model.slots._blocks.values()]
    own += [model.dispatch.inbox.fd] if model.dispatch else []
    held = sum(os.fstat(fd).st_blocks * 512 for fd in own)
    return {"held": held, "peak": PEAK["bytes"], "read": sorted(READ)}


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_gib": 0.01}, {"slots": 3, "experts_per_rank": 8}],
    ids=lambda o: "-".join(o) or "default",
)
def test_memory_is_what_the_formula_says(models, options: dict) -> None:
    """Measured by the kernel: shard + residents + slots (+ under two pages a tensor); the peak is within one layer."""
    with Group(models("qwen3_moe", **BIG), 2, options, setup=watch) as group:
        found = list(zip(group.run(stats), group.run(measured), strict=True))
    for rank, (s, m) in enumerate(found):
        memory, layers = s["memory_bytes"], 4
        expert = 3 * 256 * 512 * 4
        owned = s["experts"]["owned"]
        assert memory["shard"] == layers * owned * expert
        assert memory["padding"] <= 2 * 2 * layers * 4096
        expected = sum(memory[kind] for kind in ("shard", "resident", "slots", "inbox", "padding"))
        assert m["held"] == s["allocated_bytes"] == expected
        missing = 12 - owned - s["experts"]["resident"]
        assert memory["slots"] >= s["num_slots"] * missing * expert
        assert memory["slots"] <= s["num_slots"] * (missing + 1) * expert + 8 * 4096
        assert m["peak"] <= expected + owned * expert + 8 * 4096, "loading needs at most one layer more"
        assert m["peak"] >= expected, "the peak was really watched"
        start = s["rank"] * (12 - owned)
        mine = {f".experts.{e}." for e in range(start, start + owned)}
        experts = [name for name in m["read"] if ".experts." in name]
        assert len(experts) == layers * owned * 3, f"rank {rank} reads only its own experts"
        assert all(any(part in name for part in mine) for name in experts)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"slots": 8},
            "8 slots of 0.01 GiB do not fit beside the shard within kv_cache_memory_bytes=5242880: 0.03 GiB are "
            "missing; use more ranks, --dwdp-slots 2 or a lower --kv-cache-memory-bytes",
        ),
        ({"cache_gib": 1}, "the largest cache that does is --dwdp-cache-gib 0.02"),
    ],
    ids=["slots", "cache"],
)
def test_what_cannot_fit_is_refused(models, options: dict, named: str) -> None:
    """One line with figures, before any tensor is read."""
    engine = {"kv_cache_memory_bytes": 5 << 20}
    with Group(models("qwen3_moe", **BIG), 2, options, engine=engine, setup=small_device, wait=False) as group:
        outcomes = group.outcomes(60)
    assert all(named in outcome and "\n" not in outcome for outcome in outcomes), outcomes
