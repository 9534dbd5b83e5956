"""Invariant: expected costs are near what was measured on two GPUs, and what dispatches and waits follows from them."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from vllm.config import CUDAGraphMode

from vllm_dwdp.budget import LayerSize
from vllm_dwdp.config import Options
from vllm_dwdp.costs import H100, LEAST_PATIENCE_S, MOST_PATIENCE_S, WORTH, Costs
from vllm_dwdp.integration import dispatching
from vllm_dwdp.kernels.tokens import FEW
from vllm_dwdp.limits import Limits
from vllm_dwdp.placement import Placement

QWEN3 = Costs(  # Qwen3-30B-A3B in bf16 on two H100s
    rates=H100, num_layers=48, num_experts=128, top_k=8, expert_bytes=3 * 2048 * 768 * 2, hidden_size=2048, itemsize=2,
    size=2,
)
WITH_GRAPHS = dataclasses.replace(QWEN3, graph_tokens=8192)
MEDIAN, WORST = 0.05, 0.15

# Microseconds of a layer's experts by rows a GPU: all local, and dispatched with an alike peer.
EXPERTS = {
    1: (37, 62), 4: (111, 139), 16: (274, 211), 64: (412, 262), 128: (438, 271), 256: (448, 302), 512: (465, 349),
    2048: (630, 663), 4096: (970, 1192),
}
# Milliseconds a step of 12 layers by tokens (direct at 64: of 48 layers).
DIRECT = {1: 2.77, 4: 7.05, 16: 17.3, 64: 96 / 4}
STREAMED = {32: 24.0, 64: 24.1, 128: 23.7, 8192: 8192 / 185.606, 16384: 16384 / 202.830}
LOCAL = {4: 2.28, 16: 4.41, 64: 6.12, 128: 6.58, 8192: 8192 / 201.315, 16384: 16384 / 210.233}


def points() -> list[tuple[str, float, float]]:
    """(what, expected, measured), in microseconds a layer."""
    found = []
    for rows, (local, dispatched) in EXPERTS.items():
        rest = QWEN3.rest_us(rows)
        found += [(f"experts, local, {rows}", QWEN3.local_us(rows) - rest, local),
                  (f"experts, dispatched, {rows}", QWEN3.dispatched_us(rows, 2 * rows, 2) - rest, dispatched)]
    for what, expected, steps in [
        ("direct", QWEN3.direct_us, DIRECT), ("streamed", QWEN3.streamed_us, STREAMED),
        ("local", QWEN3.local_us, LOCAL),
    ]:
        found += [(f"{what}, {tokens}", expected(tokens), 1000 * ms / 12) for tokens, ms in steps.items()]
    return found


def test_near_what_was_measured() -> None:
    errors = {}
    for what, expected, measured in points():
        errors[what] = expected / measured - 1
        print(f"{what:28} expected {expected:6.0f} us, measured {measured:6.0f} us, {errors[what]:+.0%}")
    sizes = [abs(error) for error in errors.values()]
    print(f"median {statistics.median(sizes):.1%}, worst {max(sizes):.1%}")
    assert statistics.median(sizes) < MEDIAN and max(sizes) < WORST


def test_order_of_the_views() -> None:
    """Where one view was measured to be the better by a tenth and more, the model says so too."""
    for rows, (_, dispatched) in EXPERTS.items():
        expected = QWEN3.dispatched_us(rows, 2 * rows, 2)
        assert expected < QWEN3.local_us(rows) or rows not in (16, 64, 128, 256, 512)
        if dispatched < 1000:  # at 4,096 tokens the rest of the layer hides what travels
            assert expected < min(QWEN3.streamed_us(rows), QWEN3.direct_us(rows))
    assert QWEN3.streamed_us(1) >= 1630, "the copies alone"
    assert QWEN3.direct_us(16) < QWEN3.streamed_us(16) and QWEN3.streamed_us(128) < QWEN3.direct_us(128)
    unread = dataclasses.replace(QWEN3, rates=dataclasses.replace(H100, memory=math.inf, direct=math.inf))
    assert unread.direct_us(4096) == pytest.approx(unread.local_us(4096)), "as much is computed, wherever experts lie"


def test_max_tokens() -> None:
    """Medium steps dispatch until their experts' copies hide, never above the bound; a slower link moves that up."""
    most = QWEN3.max_tokens(8192)
    assert 2048 <= most < 4096
    part = [QWEN3.saved_us(own) / QWEN3.alone_us(own) for own in (most, most + 1)]
    assert part[0] > WORTH >= part[1]
    assert dataclasses.replace(QWEN3, size=4).max_tokens(2048) == 2048, "with all ranks; a pair reads from the others in place"
    assert QWEN3.max_tokens(1000) == 1000
    slow = dataclasses.replace(QWEN3, rates=dataclasses.replace(H100, link=H100.link / 4))
    assert slow.max_tokens(16384) > 2 * most
    tiny = dataclasses.replace(QWEN3, expert_bytes=1000, hidden_size=32)
    assert tiny.max_tokens(8192) == 0, "weights that travel faster than two exchanges"


def test_a_step_alone_reads_in_place_in_a_graph_or_is_launched() -> None:
    """Measured, 48 layers of bf16: two steps of 4,096 tokens alone take 90 to 135 ms, and copies that hide would have let them take 80.

    So where a dispatched step replays a graph it gains, whatever the weights' format, and alone a small format reads in place for long.
    """
    int4 = dataclasses.replace(WITH_GRAPHS, expert_bytes=QWEN3.expert_bytes // 4)
    for costs in (WITH_GRAPHS, int4):
        most = costs.in_place_max_tokens()
        assert costs.alone_us(most) == costs.dispatched_us(most, most, 1) <= H100.launch_us
        assert costs.alone_us(most + 1) == H100.launch_us == costs.alone_us(4096) < costs.dispatched_us(most + 1, most + 1, 1)
        assert costs.max_tokens(4096) == 4096
    assert 512 <= WITH_GRAPHS.in_place_max_tokens() < 1024 < 2 * WITH_GRAPHS.in_place_max_tokens() < int4.in_place_max_tokens()
    assert WITH_GRAPHS.alone_us(8192) == QWEN3.alone_us(8192), "the device has enough to do"
    assert dataclasses.replace(int4, graph_tokens=0).max_tokens(4096) < 1024, "everything is launched"
    assert QWEN3.in_place_max_tokens() == 0


def test_patience() -> None:
    """What all layers save together, within bounds."""
    assert QWEN3.patience_s(16) == pytest.approx(48e-6 * QWEN3.saved_us(16)) == pytest.approx(0.05, rel=0.2)
    assert dataclasses.replace(QWEN3, num_layers=12).patience_s(16) == pytest.approx(QWEN3.patience_s(16) / 4)
    assert LEAST_PATIENCE_S < QWEN3.patience_s(1) < QWEN3.patience_s(4) < QWEN3.patience_s(16)
    assert QWEN3.patience_s(8192) == LEAST_PATIENCE_S
    assert dataclasses.replace(QWEN3, num_layers=200).patience_s(64) == MOST_PATIENCE_S


def test_helped_max_tokens() -> None:
    """A large step gains by idle ranks whatever its size: their experts are computed beside its own, and nothing streams."""
    for size in (2, 4, 8):
        costs = dataclasses.replace(QWEN3, size=size)
        assert costs.helped_max_tokens(8192) == 8192 > costs.max_tokens(8192 // size)
        assert costs.helped_s(8192) < 0.9 * costs.alone_s(8192)
    rare = dataclasses.replace(QWEN3, rates=dataclasses.replace(H100, exchange=H100.exchange / 10))
    assert rare.helped_max_tokens(8192) < 4096, "a slow exchange"


def limits_of(
    monkeypatch, options: Options, layers: list[SimpleNamespace], largest: int, captured: Sequence[int] = (), drafts: bool = False
) -> Limits | None:
    """Of an engine on H100s that captures these sizes itself, if any."""
    platform = SimpleNamespace(is_cpu=lambda: False, get_device_name=lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(dispatching, "current_platform", platform)
    speculative = SimpleNamespace(uses_dynamic_speculative_decoding=lambda: False) if drafts else None
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=largest), speculative_config=speculative, use_v2_model_runner=True,
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, cudagraph_capture_sizes=[*captured],
            max_cudagraph_capture_size=max([0, *captured]),
        ),
        model_config=SimpleNamespace(enforce_eager=not captured),
    )
    return dispatching.limits(config, options, SimpleNamespace(handle_kind="fd"), layers, 1)


def layer_of(hidden: int, expert_bytes: int, num_experts: int = 128, size: int = 2, is_draft: bool = False) -> SimpleNamespace:
    placement = Placement(num_experts=num_experts, size=size)
    return SimpleNamespace(
        module=SimpleNamespace(quant_method=SimpleNamespace(is_monolithic=is_draft, moe_kernel=None)),
        placement=placement, hidden_size=hidden, top_k=8,
        itemsize=2, is_draft=is_draft, size=LayerSize(placement=placement, expert_bytes=[2 * expert_bytes // 3, expert_bytes // 3]),
    )


@pytest.mark.parametrize(("size", "hidden", "most"), [(2, 7168, 8192), (8, 7168, 5349), (8, 2048, 8192)])
def test_an_inbox_has_a_bound(monkeypatch, size: int, hidden: int, most: int) -> None:
    """2**30 bytes of activations and sums, of whatever many ranks."""
    limits = limits_of(monkeypatch, Options(size=size), [layer_of(hidden, 6 * hidden * 2048, 256, size)] * 58, 8192)
    assert limits and limits.helped_max_tokens == most


def test_members() -> None:
    """Of four ranks, each that takes part spares reads in place; a round of this rank alone costs what direct does."""
    four = dataclasses.replace(QWEN3, size=4)
    costs = [four.dispatched_us(16, 16 * members, members) for members in (1, 2, 3, 4)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == pytest.approx(four.direct_us(16) + H100.dispatch_us + H100.exchange_us)
    assert four.dispatched_us(16, 16, 2) < costs[1], "an idle peer brings no rows"


@pytest.mark.parametrize(
    ("captured", "largest", "drafts", "graph_max_tokens", "most", "last"),
    [(512, 8192, False, 8192, WITH_GRAPHS.max_tokens(4352), 8192), (8192, 8192, False, 0, WITH_GRAPHS.max_tokens(4352), 8192),
     (512, 7000, False, 8192, 3756, 7000), (512, 8192, True, 8192, QWEN3.max_tokens(4096), 512),
     (512, 8192, False, 0, QWEN3.max_tokens(4096), 512), (512, 8192, False, 4096, 4096, 4096), (256, 256, False, 8192, 256, 256)],
)
def test_limits_depend_on_graphs(
    monkeypatch, captured: int, largest: int, drafts: bool, graph_max_tokens: int, most: int, last: int
) -> None:
    """Those that are added, and those that the user asks for. Where the largest step has one, small steps have its rows."""
    options = Options(size=2, graph_max_tokens=graph_max_tokens)
    limits = limits_of(monkeypatch, options, [layer_of(2048, QWEN3.expert_bytes)] * 48, largest, (1, captured), drafts)
    assert limits and (limits.max_tokens, limits.graph_sizes[-1]) == (most, last)
    assert most <= largest >= last and 2 * most <= limits.most_rows == max(largest, limits.rows(last, 2))
    assert limits.alone_graph_tokens == dataclasses.replace(QWEN3, graph_tokens=max(captured, last)).in_place_max_tokens() > 64


@pytest.mark.parametrize(
    ("size", "hidden", "graph_max_tokens", "most"),
    [(2, 2048, 8192, 4352), (2, 2048, 4096, 4096), (4, 2048, 8192, 2432), (4, 2048, 4096, 2048), (8, 7168, 8192, 1024)],
)
def test_small_steps_have_the_rows_of_the_largest_graph(monkeypatch, size: int, hidden: int, graph_max_tokens: int, most: int) -> None:
    """Of a model that gains at any size: not where the largest step has no graph, as none is wanted or the inbox does not hold it."""
    layers = [layer_of(hidden, 8 * QWEN3.expert_bytes, size=size)] * 48
    limits = limits_of(monkeypatch, Options(size=size, graph_max_tokens=graph_max_tokens), layers, 8192, (1, 512))
    assert limits and limits.max_tokens == most


def test_large_steps_without_a_graph_are_launched_with_help_and_alone(monkeypatch) -> None:
    """On eight ranks graphs end at 4,608 tokens where not all of 8,192 gain."""
    layers = [layer_of(2048, QWEN3.expert_bytes // 2, size=8)] * 48
    limits = limits_of(monkeypatch, Options(size=8, graph_max_tokens=8192), layers, 8192, (1, 512))
    assert limits and limits.helped_max_tokens == limits.graph_sizes[-1] == 8192 - 7 * FEW


def test_what_reads_in_place_otherwise_does_so_alone_in_a_graph(monkeypatch) -> None:
    for given in (None, 2000):
        options = Options(size=2, graph_max_tokens=8192, direct_max_tokens=given)
        limits = limits_of(monkeypatch, options, [layer_of(2048, QWEN3.expert_bytes)] * 48, 8192, (1, 512))
        assert limits and limits.alone_graph_tokens == (given or WITH_GRAPHS.in_place_max_tokens())
        for name in ("helped_s", "spare_s", "patience_s", "alone_s"):
            assert getattr(limits, name)(4096) == getattr(WITH_GRAPHS, name)(4096) > 0


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, None),
        ({"dispatch": "off"}, "--dwdp-dispatch off"),
        ({"handles": "fabric"}, "rounds are agreed within one host and one network"),
        ({"routes": True}, "the expert kernel routes by itself"),
        ({"hook": print}, "the model changes what each expert made"),
        ({"kernel": "CutlassExpertsFp8"}, "the expert kernel CutlassExpertsFp8 has not been seen to skip tokens"),
        ({"kernel": "TritonWNA16Experts"}, "the expert kernel TritonWNA16Experts has not been seen to skip tokens"),
        ({"kernel": "CPUExpertsFp8", "module": "vllm.experts.cpu_moe"}, None),
        ({"kernel": "MarlinExperts", "quant_dtype": "fp8"}, None),
        ({"quant_dtype": "fp8"}, "the expert kernel scales all activations by their largest"),
        ({"quant_dtype": "fp8", "a2_scale": 1.0}, None),
        ({"quant_dtype": "fp8", "block_shape": [128, 128]}, None),
        ({"quant_dtype": "fp8", "per_act_token_quant": True}, None),
        ({"invariant": True}, "VLLM_BATCH_INVARIANT=1: "),
        ({"is_v2": False}, "vLLM's older model runner pads batches by itself"),
        ({"is_v2": False, "eager": True}, None),
        ({"is_v2": False, "mode": CUDAGraphMode.NONE}, None),
    ],
    ids=str,
)
def test_why_no_step_of_an_engine_dispatches(monkeypatch, given: dict, reason: str | None) -> None:
    """One layer whose kernel does not fit is enough; the older model runner pads graphs alone."""
    monkeypatch.setattr(dispatching.envs, "VLLM_BATCH_INVARIANT", given.get("invariant", False), raising=False)
    config = SimpleNamespace(
        use_v2_model_runner=given.get("is_v2", True), model_config=SimpleNamespace(enforce_eager=given.get("eager", False)),
        compilation_config=SimpleNamespace(cudagraph_mode=given.get("mode", CUDAGraphMode.FULL_AND_PIECEWISE)),
    )
    options, device = Options(size=2, dispatch=given.get("dispatch", "auto")), SimpleNamespace(handle_kind=given.get("handles", "fd"))
    scales = dict(quant_dtype=None, a2_scale=None, block_shape=None, per_act_token_quant=False)
    methods = []
    for own in ({}, given):
        module = {"__module__": own.get("module", "vllm.experts.some_moe")}
        experts = type(own.get("kernel", "TritonExperts"), (), module | {name: own.get(name, none) for name, none in scales.items()})()
        experts.post_gemm2_hook = own.get("hook")
        kernel = SimpleNamespace(fused_experts=experts)
        methods.append(SimpleNamespace(is_monolithic=own.get("routes", False), moe_kernel=kernel))
    layers = [SimpleNamespace(module=SimpleNamespace(quant_method=method)) for method in methods]
    said = dispatching.why_not(config, options, device, layers)
    assert said is None if reason is None else said and said.startswith(reason)




@pytest.mark.parametrize(
    ("hidden", "batched", "given", "most", "said"),
    [
        (2048, 16384, None, QWEN3.max_tokens(8192), "above, a step alone is expected to take less"),
        (2048, 4096, None, 2048, "--max-num-batched-tokens sets"),
        (2048, 16384, 77, 77, "--dwdp-dispatch-max-tokens"),
        (1, 16384, None, None, "no step of up to 8192 tokens is expected to gain"),
    ],
)
def test_limits(monkeypatch, hidden: int, batched: int, given: int | None, most: int | None, said: str) -> None:
    """An engine on two H100s takes its limit and its patience from the model, no draft, and says why the limit is what it is."""
    lines = []
    logger = SimpleNamespace(info=lambda text, *args: lines.append(text % args))
    monkeypatch.setattr(dispatching, "logger", logger)
    layer, draft = (layer_of(hidden, 6 * hidden * 768, is_draft=is_draft) for is_draft in (False, True))
    limits = limits_of(monkeypatch, Options(size=2, dispatch_max_tokens=given), [*[layer] * 48, draft], batched)
    assert len(lines) == 1 and said in lines[0]
    assert (limits and limits.max_tokens) == most
    if limits:
        assert limits.helped_max_tokens == (given or QWEN3.helped_max_tokens(batched))
        assert f"up to {most} tokens" in lines[0] and limits.patience_s(16) == QWEN3.patience_s(16)
