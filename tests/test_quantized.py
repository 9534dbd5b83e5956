"""Invariant: quantized experts answer as stock vLLM's do, and it is their small rows that move, scales with them."""

from pathlib import Path

import pytest

from harness import Group, differences, generate, reference, stats
from quantized import SCHEMES, SHAPE, SHAPES, quantize

pytestmark = pytest.mark.engine

ENGINE = dict(
    dtype="bfloat16", max_model_len=1024, max_num_batched_tokens=512, max_num_seqs=16, kv_cache_memory_bytes=2**28,
    gpu_memory_utilization=0.3, enable_prefix_caching=False,
)
LONG = dict(lengths=[5, 300, 64, 17, 700, 40, 129, 1], tokens=16)
# Marlin's order of sums seems to change from run to run once an expert has more than a block of 8 tokens.
SHORT = dict(lengths=[5, 8, 3, 1, 7, 2, 6, 4], tokens=16, one_by_one=True)
EXPERT_BITS = {"fp8_block": 8, "fp8_channel": 8, "fp8_static": 8, "fp8": 8, "int4": 4.5, "awq": 4.5, "gptq": 4.5, "mxfp4": 4.25}
OPTIONS = {
    "streamed": {"direct_max_tokens": 0}, "both views": {"direct_max_tokens": 4}, "resident": {"cache_gib": 1},
}


ALL = [*SCHEMES, "fp8"]


def prepare(models, folder: Path, scheme: str) -> tuple[str, dict, dict]:
    """A model in this format, engine arguments, and a question."""
    model, engine = models("gpt_oss" if scheme == "mxfp4" else "qwen3_moe", **SHAPES.get(scheme, SHAPE)), dict(ENGINE)
    if scheme == "fp8":
        engine["quantization"] = "fp8"  # while it loads
    else:
        model = quantize(model, scheme, folder / scheme)
    if scheme == "mxfp4":
        engine["moe_backend"] = "marlin"  # which DWDP chooses by itself
    return model, engine, LONG if scheme.startswith("fp8") else SHORT


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ALL)
def test_schemes(models, tmp_path: Path, scheme: str) -> None:
    """Token for token as one engine that holds everything, with every view and cache; bytes are the format's."""
    model, engine, question = prepare(models, tmp_path, scheme)
    expected = reference(model, engine, **question)
    assert len({tuple(tokens) for tokens in expected}) > len(expected) / 2, "the model answers much alike"
    for name, options in OPTIONS.items():
        with Group(model, 2, options, engine=engine) as group:
            assert differences(group.run(generate, **question), expected) == [], name
            for s in group.run(stats):
                values = 4 * 16 * 3 * 512 * 256  # layers, owned experts, matrices
                held = s["memory_bytes"]["shard"] + s["memory_bytes"]["replicated"] / 2
                assert 1 <= held * 8 / values / EXPERT_BITS[scheme] < 1.1, s["memory_bytes"]
                streams = name != "resident"
                assert (s["forwards"]["streamed"] > 0) == (s["prefetch_bytes"] > 0) == streams and s["refills"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ALL)
def test_schemes_in_dispatched_steps(models, tmp_path: Path, scheme: str) -> None:
    """Most answers begin as one engine's: sums are rounded in parts, but nothing is summed that a kernel has not written.

    Kernels that would do so do not dispatch; the log names one that does.
    """
    model, engine, question = prepare(models, tmp_path, scheme)
    engine |= {"fp8": {"moe_backend": "marlin"}, "fp8_channel": {"moe_backend": "triton"}}.get(scheme, {})
    with Group(model, 2, {"dispatch_max_tokens": 256}, engine=engine) as group:
        answers = group.run(generate, **question)
        dispatched = [s["forwards"]["dispatched"] for s in group.run(stats)]
    assert min(dispatched) > 0
    begins = [found[0] == wanted[0] for own in answers for found, wanted in zip(own, reference(model, engine, **question), strict=True)]
    assert sum(begins) >= 0.75 * len(begins), answers
