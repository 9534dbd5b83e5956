"""Invariant: a kernel never reads a slot byte that is not the tagged layer's, however slow copies or kernels are.

Each rank's copy stream is made to fill a slot with NaN before it is copied into, and to dawdle; layers are made to
dawdle before they read. The engines are real; the comparison is with the stock engine.
"""

import ctypes
import random
import time

import pytest
from harness import Group, generate, reference, stats, streamed_model

LENGTHS = [3, 60, 9, 31, 1, 22, 50, 5]


def poison(copy_s: float, before_kernels_s: float, after_release: bool) -> None:
    from vllm_dwdp.kernels.host import HostStream
    from vllm_dwdp.prefetch import Prefetcher

    copy, acquire, release = HostStream._copy, Prefetcher.acquire, Prefetcher.release

    def ruin(copies) -> None:
        for target, _, nbytes in copies:
            ctypes.memset(target, 0xFF, nbytes)

    def slow_copy(self, copies) -> None:
        ruin(copies)
        time.sleep(random.random() * copy_s)
        copy(self, copies)

    def slow_acquire(self, layer, num_tokens):
        view = acquire(self, layer, num_tokens)
        time.sleep(random.random() * before_kernels_s)
        return view

    def ruining_release(self, layer, view):
        if after_release and view == "streamed":  # whoever reads the layer now without asking for it again reads NaN
            ruin(layer.copies)
        release(self, layer, view)

    HostStream._copy, Prefetcher.acquire, Prefetcher.release = slow_copy, slow_acquire, ruining_release


def slow_copies(rank: int) -> None:
    poison(0.004, 0.0, True)


def slow_kernels(rank: int) -> None:
    poison(0.0, 0.004, True)


def cut_short(llm) -> str:
    """Let layer 2 of one forward fail after its weights were acquired, then let it work again."""
    weights = streamed_model(llm).layers[2]
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    modules = [m for m in runner.get_model().modules() if getattr(m, "layer_name", None) == weights.name]
    (layer,) = [m for m in modules if hasattr(m, "quant_method")]
    forward = layer.quant_method.apply

    def fail(*args, **kwargs):
        raise RuntimeError("injected")

    layer.quant_method.apply = fail
    try:
        runner._dummy_run(64)
    except RuntimeError as error:
        return str(error)
    finally:
        layer.quant_method.apply = forward
    return "it did not fail"


def out_of_order(llm) -> None:
    """Acquire and release the layers backwards, as a model that runs them in another order would."""
    model = streamed_model(llm)
    for layer in reversed(model.layers):
        model.prefetcher.release(layer, model.prefetcher.acquire(layer, 1000))


@pytest.mark.parametrize("setup", [slow_copies, slow_kernels])
def test_poisoned_slots_change_nothing(models, setup) -> None:
    """NaN in every slot between uses, slow copies, slow kernels, cut-short and disordered forwards: answers stay."""
    model = models("qwen3_moe")
    question = dict(lengths=LENGTHS, tokens=12)
    expected = reference(model, **question)
    with Group(model, 2, {"direct_max_tokens": 0}, setup=setup) as group:
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


def test_mixed_batch_sizes_switch_views(models) -> None:
    """Batches around direct_max_tokens alternate between both views, one by one and together: answers stay."""
    model = models("qwen3_moe")
    with Group(model, 2, {"direct_max_tokens": 4}, setup=slow_copies) as group:
        for seed, lengths in enumerate([[1, 2], [64, 1, 1], [3], [30] * 6]):
            question = dict(lengths=lengths, tokens=6, seed=seed)
            assert group.run(generate, **question) == [reference(model, **question)] * 2
        for s in group.run(stats):
            assert s["forwards"]["direct"] > 5 and s["forwards"]["streamed"] > 2 and s["refills"] == 0
