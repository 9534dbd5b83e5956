"""Invariant: a kernel never reads a slot byte that is not the tagged layer's, however slow copies or kernels are.

Each rank's copy stream is made to fill a slot with NaN before it is copied into, and to dawdle; layers are made to
dawdle before they read. The engines are real; the comparison is with the stock engine.
"""

import ctypes
import functools
import random
import time

import pytest
import torch
from test_transport import DEVICES
from torch.profiler import profile

from harness import Group, differences, generate, reference, stats, streamed_model

pytestmark = pytest.mark.engine

LENGTHS = {"host": [3, 60, 9, 31, 1, 22, 50, 5], "cuda": [random.Random(n).randrange(5, 1500) for n in range(64)]}
SHAPES = {  # on GPUs the layers of Qwen3-30B-A3B
    "host": {},
    "cuda": dict(
        hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, num_hidden_layers=4,
        head_dim=128, num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048, dtype="bfloat16",
    ),
}
ENGINES = {
    "host": {},
    "cuda": dict(
        dtype="bfloat16", max_model_len=2048, max_num_batched_tokens=2048, max_num_seqs=16,
        kv_cache_memory_bytes=2**29, gpu_memory_utilization=0.3, enable_prefix_caching=False,
    ),
}
CYCLES_PER_S = 1.7e9


def poison(copy_s: float, before_kernels_s: float, kind: str, rank: int) -> None:
    """Copies fill their targets with NaN first and take up to `copy_s` longer; layers wait before they read."""
    from vllm_dwdp.prefetch import Prefetcher

    ruin, dawdle = (poison_host if kind == "host" else poison_cuda)(copy_s)
    acquire, release = Prefetcher.acquire, Prefetcher.release

    def slow_acquire(self, layer, num_tokens):
        view = acquire(self, layer, num_tokens)
        dawdle(random.random() * before_kernels_s)
        return view

    def ruining_release(self, layer, view):
        if view == "streamed":  # whoever reads the layer now without asking for it again reads NaN
            ruin(layer.copies)
        release(self, layer, view)

    Prefetcher.acquire, Prefetcher.release = slow_acquire, ruining_release


def poison_host(copy_s: float):
    from vllm_dwdp.kernels.host import HostStream

    copy = HostStream._copy

    def ruin(copies) -> None:
        for target, _, nbytes in copies:
            ctypes.memset(target, 0xFF, nbytes)

    def slow_copy(self, copies) -> None:
        ruin(copies)
        time.sleep(random.random() * copy_s)
        copy(self, copies)

    HostStream._copy = slow_copy
    return ruin, time.sleep


def poison_cuda(copy_s: float):
    from cuda.bindings import driver

    from vllm_dwdp.kernels.cuda import CudaStream

    plan = CudaStream.plan

    def ruin(copies) -> None:
        for target, _, nbytes in copies:
            (code,) = driver.cuMemsetD8Async(target, 0xFF, nbytes, torch.cuda.current_stream().cuda_stream)
            assert code == driver.CUresult.CUDA_SUCCESS

    def dawdle(seconds: float) -> None:
        torch.cuda._sleep(int(seconds * CYCLES_PER_S))

    def slow_plan(self, copies):
        issue = plan(self, copies)

        def slow_issue() -> None:
            with torch.cuda.stream(self._stream):
                ruin(copies)
                dawdle(random.random() * copy_s)
            issue()

        return slow_issue

    CudaStream.plan = slow_plan
    return ruin, dawdle


slow_copies = functools.partial(poison, 0.004, 0.0)
slow_kernels = functools.partial(poison, 0.0, 0.004)


def cut_short(llm, num_tokens: int = 64) -> str:
    """Let layer 2 of one forward fail after its weights were acquired, then let it work again."""
    weights = streamed_model(llm).weights[2]
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    modules = [m for m in runner.get_model().modules() if getattr(m, "layer_name", None) == weights.name]
    (layer,) = [m for m in modules if hasattr(m, "quant_method")]
    forward = layer.quant_method.apply

    def fail(*args, **kwargs):
        raise RuntimeError("injected")

    layer.quant_method.apply = fail
    try:
        runner._dummy_run(num_tokens)
    except RuntimeError as error:
        return str(error)
    finally:
        layer.quant_method.apply = forward
    return "it did not fail"


def out_of_order(llm) -> None:
    """Acquire and release the layers backwards, as a model that runs them in another order would."""
    model = streamed_model(llm)
    for layer in reversed(model.weights):
        model.prefetcher.release(layer, model.prefetcher.acquire(layer, 1000))


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("setup", [slow_copies, slow_kernels], ids=["slow_copies", "slow_kernels"])
def test_poisoned_slots_change_nothing(models, setup, kind: str) -> None:
    """NaN in every slot between uses, slow copies, slow kernels, cut-short and disordered forwards: answers stay."""
    model, engine = models("qwen3_moe", **SHAPES[kind]), ENGINES[kind]
    question = dict(lengths=LENGTHS[kind], tokens=12)
    expected = reference(model, engine, **question)
    setup = functools.partial(setup, kind)
    with Group(model, 2, {"direct_max_tokens": 0, "dispatch": "off"}, engine=engine, setup=setup) as group:
        assert group.run(generate, **question) == [expected] * 2
        assert [s["refills"] for s in group.run(stats)] == [0, 0]
        assert [s["slot_tags"] for s in group.run(stats)] == [[0, 1]] * 2, "the next forward's first layers"
        assert group.run(cut_short) == ["injected"] * 2
        assert group.run(generate, **question) == [expected] * 2
        after_cut = [s["refills"] for s in group.run(stats)]
        assert all(count > 0 for count in after_cut), "the layers that were not in place were fetched again"
        group.run(out_of_order)
        assert group.run(generate, **question) == [expected] * 2
        assert all(s["refills"] > cut for s, cut in zip(group.run(stats), after_cut, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("setup", [slow_copies, slow_kernels], ids=["slow_copies", "slow_kernels"])
@pytest.mark.parametrize("mode", ["FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"])
def test_poisoned_slots_change_nothing_in_graphs(models, setup, mode: str) -> None:
    """The same poison, captured: decode replays whole graphs, small prefills and mixed batches pieces of them.

    The pieces are not compiled: Inductor times its way to kernels, so two processes may round differently.
    """
    compilation = {"cudagraph_mode": mode, "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 64, 256]}
    compilation |= {"mode": 0} if mode == "FULL_DECODE_ONLY" else {"mode": 3, "backend": "eager"}
    model = models("qwen3_moe", **SHAPES["cuda"])
    engine = ENGINES["cuda"] | dict(enforce_eager=False, compilation_config=compilation)
    question = dict(lengths=LENGTHS["cuda"], tokens=12)
    expected = reference(model, engine, **question)
    setup = functools.partial(setup, "cuda")
    with Group(model, 2, {"direct_max_tokens": 0, "dispatch": "off"}, engine=engine, setup=setup) as group:
        for _ in range(2):
            assert differences(group.run(generate, **question), expected) == []
        for s in group.run(stats):
            assert s["refills"] == 0 and s["forwards"]["direct"] == 0
            assert 12 < s["replays"] < s["forwards"]["streamed"], "decode in graphs, large prefills without"
        assert group.run(cut_short, 512) == ["injected"] * 2, "no graph is that large"
        assert differences(group.run(generate, **question), expected) == []
        assert all(s["refills"] > 0 for s in group.run(stats))


def layer_names(llm) -> list[str]:
    return [layer.name for layer in streamed_model(llm).weights]


def profiled(llm) -> set[str]:
    """The ranges of ours that a profile of a long prompt and its decoding shows."""
    with profile() as seen:
        generate(llm, lengths=[40], tokens=2)
    return {event.name for event in seen.events() if event.name.startswith("dwdp ")}


def test_mixed_batch_sizes_switch_views(models) -> None:
    """Batches around direct_max_tokens alternate between both views, one by one and together: answers stay."""
    model = models("qwen3_moe")
    with Group(model, 2, {"direct_max_tokens": 4, "dispatch": "off"}, setup=functools.partial(slow_copies, "host")) as group:
        for seed, lengths in enumerate([[1, 2], [64, 1, 1], [3], [30] * 6]):
            question = dict(lengths=lengths, tokens=6, seed=seed)
            assert group.run(generate, **question) == [reference(model, **question)] * 2
        for s in group.run(stats):
            assert s["forwards"]["direct"] > 5 and s["forwards"]["streamed"] > 2 and s["refills"] == 0
        names = group.run(layer_names)[0]
        wanted = {f"dwdp {what} {name}" for what in ("copy", "streamed", "direct") for name in names}
        assert group.run(profiled) == [wanted] * 2
