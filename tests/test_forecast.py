"""Invariant: the plan's times are those that were measured on two H100s and that the paper published."""

import statistics
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from vllm_dwdp.entrypoints.plan import calibrate, model, rates, roofline, run
from vllm_dwdp.entrypoints.plan.roofline import Load

import forecasts
from plan_models import NVFP4, QWEN3, R1, held_by_dwdp

# What was measured on two H100s: kind of engine, layers, tokens a step, prompt tokens/s per GPU of the single GPU that
# holds all, of DWDP and of expert parallelism, whose empty steps after its last token are left out where it has graphs.
# Prompts of 6.5K to 8K tokens, of 8K in the servers of 24 layers.
MEASURED = [
    ("eager", 12, 16384, 197_462, 192_475, 146_886), ("eager", 12, 16384, 201_005, 194_443, 152_401),
    ("eager", 12, 8192, 190_855, 180_482, 124_707), ("eager", 12, 4096, 169_017, 138_996, 96_595),
    ("eager", 48, 16384, 50_400, 48_673, 38_948), ("eager", 48, 16384, None, 48_700, 30_900),
    ("compiled", 12, 16384, 210_233, 202_830, None), ("compiled", 12, 8192, 201_315, 185_606, None),
    ("compiled", 24, 8192, None, 90_602, 84_339),
    # with dispatch, other machines: examples/results/two-h100-prefill.json and two-h100-serve-saturated.json
    ("compiled", 12, 16384, 211_095, 189_919, 181_412), ("compiled", 12, 8192, 200_971, 182_472, 180_167),
    ("compiled", 24, 8192, None, 90_058, 83_717),
]


def points(measured: list[tuple]) -> list[calibrate.Point]:
    found = []
    for _, layers, tokens, *values in measured:
        described = model.parse("m", QWEN3 | {"num_hidden_layers": layers})
        load = Load(tokens=tokens, input_len=8192, ratio=1.0 if layers == 24 else 0.8)
        found += [
            calibrate.Point(
                mode=mode, load=load, value=value, model=described, size=2,
                streamed_bytes=held_by_dwdp(described, 2).streamed,
            )
            for mode, value in zip(("single", "dwdp", "ep"), values, strict=True) if value
        ]
    return found


def told(what: str, errors: Mapping[str, float]) -> tuple[float, float]:
    """The median and the worst error, printed."""
    sizes = {name: abs(error) for name, error in errors.items()}
    median, worst = statistics.median(sizes.values()), max(sizes, key=sizes.get)
    print(f"plan against {what}: {len(errors)} points, median error {median:.1%}, worst {errors[worst]:+.1%} ({worst})")
    return median, sizes[worst]


def test_measured_steps_are_predicted() -> None:
    """Median under 3%, worst under 25%: stock expert parallelism of 48 layers was measured at 30,900 and at 38,948."""
    table, errors = rates.read(None), {}
    for row in MEASURED:
        for point in points([row]):
            predicted = point.predict(table.gpus["h100"], table.rates[row[0]])
            name = f"{point.mode}, {row[0]}, {row[1]} layers, {row[2]} tokens, {point.value:,}"
            errors[name] = predicted / point.value - 1
    median, worst = told("two H100s", errors)
    assert len(errors) == 31 and median < 0.03 and worst < 0.25
    assert sorted(map(abs, errors.values()))[-2] < 0.12, "all but that one"


def test_gains_of_compiled_engines_are_predicted() -> None:
    """DWDP over expert parallelism, where one visit measured both: within 7%."""
    table, errors = rates.read(None), {}
    for row in (row for row in MEASURED if row[0] == "compiled" and row[-1]):
        predicted = {point.mode: point.predict(table.gpus["h100"], table.rates["compiled"]) for point in points([row])}
        errors[f"{row[1]} layers, {row[2]} tokens, {row[4]:,}"] = predicted["dwdp"] / predicted["ep"] / (row[4] / row[5]) - 1
    _, worst = told("gains on two H100s", errors)
    assert len(errors) == 4 and worst < 0.07


def test_rates_of_12_layers_predict_the_whole_model() -> None:
    """Out of sample: spoilt rates, refitted to the readings of 12 layers, predict 48 layers within 10%."""
    table = rates.read(None)
    spoilt = table.rates["eager"].scaled(0.6)
    spoilt = msgspec.structs.replace(spoilt, interference=0.4, all2all=0.6, layer_us=300, step_ms=1)
    gpu = table.gpus["h100"]
    fitted = calibrate.refit(spoilt, gpu, points(MEASURED[:4]))
    errors = {point.mode: point.predict(gpu, fitted) / point.value - 1 for point in points(MEASURED[4:5])}
    before = [abs(point.predict(gpu, spoilt) / point.value - 1) for point in points(MEASURED[4:5])]
    _, worst = told("48 layers by 12", errors)
    assert worst < 0.10 < min(before)


R1_NVFP4 = R1 | {"quantization_config": NVFP4}
PEAKS = rates.Rates(
    dense=1, attention=1, experts=1, memory=1, link=1, interference=0, all2all=1, layer_us=0, step_ms=0
)


def r1_step(rate: rates.Rates, load: Load, size: int = 4, **fields: int) -> roofline.Step:
    described = model.parse("m", R1_NVFP4 | fields)
    streamed = held_by_dwdp(described, size).streamed
    return roofline.step(described, rates.read(None).gpus["gb200"], rate, load, size=size, streamed_bytes=streamed)


def test_published_compute_to_prefetch_ratios_are_the_rooflines() -> None:
    """A layer of DeepSeek-R1 in NVFP4 on four GB200, batch 1, its GEMMs and attention at peaks: within 5%."""
    published, errors = {1024: 0.19, 8192: 0.62, 16384: 1.52, 32768: 4.77}, {}
    for tokens, ratio in published.items():
        step = r1_step(PEAKS, Load(tokens=tokens, input_len=tokens), first_k_dense_replace=0)
        errors[f"{tokens} tokens"] = (step.compute.total - step.compute.other) / step.prefetch / ratio - 1
    median, worst = told("the paper's roofline", errors)
    assert median < 0.03 and worst < 0.05


def published_rates() -> tuple[rates.Rates, float, float]:
    """Rates, imbalance and merge copy (in parts of a step) by the paper's breakdown of 32K tokens of 8K prompts."""
    load = Load(tokens=32768, input_len=8192, ratio=0.8)
    ideal, link = r1_step(PEAKS, load), 0.83
    second = ideal.prefetch / link / 429.00  # of the breakdown's unit
    dep = {"attention": 269.67, "experts": 342.40, "dense": 177.50, "memory": 241.69}
    parts = {"attention": ideal.compute.attention, "experts": ideal.compute.experts, "dense": ideal.compute.dense,
             "memory": ideal.compute.other}
    slowed = 320.56 + 337.42 + 189.28 + 284.32
    fitted = {name: parts[name] / (dep[name] * second) for name in parts}
    rate = rates.Rates(
        **fitted, link=link, interference=(slowed - sum(dep.values())) / 429.00,
        all2all=ideal.all2all / (126.74 * second), layer_us=0, step_ms=0,
    )
    by_length = r1_step(rate, load).waiting / second
    return rate, (161.85 - by_length) / dep["experts"], 34.00 / slowed


def test_published_gains_are_predicted() -> None:
    """DWDP over data and expert parallelism, all by one breakdown: median under 3%, worst under 6%."""
    rate, imbalance, merge = published_rates()

    def gain(
        tokens: int = 32768, input_len: int = 8192, deviation: float = 0.0, size: int = 4, ratio: float = 1.0
    ) -> float:
        if deviation:  # of prompts uniform in [ratio, 1] * longest with this mean
            half = min(deviation * 3**0.5, 0.99 * input_len)
            input_len, ratio = int(input_len + half), (input_len - half) / (input_len + half)
        step = r1_step(rate, Load(tokens=tokens, input_len=input_len, ratio=ratio, imbalance=imbalance), size)
        return step.ep / (step.dwdp * (1 + merge))

    published = {
        **{f"prompts of {k}K": (gain(input_len=k * 1024, ratio=0.8), value)
           for k, value in ((1, 1.11), (8, 1.10), (16, 1.09), (32, 1.09))},
        "16K a step": (gain(tokens=16384, ratio=0.8), 1.01),
        **{f"deviation {k}K": (gain(input_len=16384, deviation=k * 1024), value)
           for k, value in ((0, 1.09), (1, 1.08), (2, 1.11), (4, 1.15))},
        **{f"group of {size}": (gain(input_len=16384, size=size), value) for size, value in ((3, 1.093), (4, 1.091))},
        "ratio 0.5, 16K": (gain(tokens=16384, ratio=0.5), 1.081), "ratio 0.5, 32K": (gain(ratio=0.5), 1.139),
        "ratio 0.8, 16K": (gain(tokens=16384, ratio=0.8), 1.053), "ratio 0.8, 32K": (gain(ratio=0.8), 1.109),
    }
    median, worst = told("the paper's gains", {name: mine / theirs - 1 for name, (mine, theirs) in published.items()})
    assert len(published) == 15 and median < 0.03 and worst < 0.06


def test_contention_is_the_papers() -> None:
    assert [round(100 * chance, 1) for chance in roofline.contention(4)] == [44.4, 44.4, 11.1]
    assert [round(100 * chance, 1) for chance in roofline.contention(8)[:5]] == [39.7, 39.7, 16.5, 3.7, 0.5]
    assert roofline.contention(2) == [1.0]


def test_steps_follow_the_link_and_the_work() -> None:
    """Copies are waited for when computing is shorter, and never again from the number of tokens that plan names."""
    described, gpu = model.parse("m", QWEN3), rates.read(None).gpus["h100"]

    def step(tokens: int, **load: Any) -> roofline.Step:
        load = Load(tokens=tokens, input_len=8192, **load)
        return roofline.step(described, gpu, rates.read(None).rates["compiled"], load, size=2, streamed_bytes=29e9)

    few, many = step(512), step(32768)
    assert few.exposed > 0 and few.dwdp == pytest.approx(few.prefetch, rel=0.1) and few.dwdp > few.ep > few.single
    assert many.exposed == 0 and many.single < many.dwdp < many.ep
    uneven = step(32768, imbalance=0.4)
    assert uneven.ep > many.ep and uneven.dwdp == many.dwdp, "only the ranks that meet wait"
    assert many.waiting == 0 < step(32768, ratio=0.8).waiting < step(32768, ratio=0.2).waiting
    alone, shared = (roofline.compute(described, gpu, PEAKS, Load(tokens=64, input_len=64), ranks) for ranks in (1, 2))
    assert shared.experts == pytest.approx(alone.experts / 2, rel=0.02), "a rank reads its own half alone"
    four = roofline.step(described, gpu, PEAKS, Load(tokens=16384, input_len=8192), size=4, streamed_bytes=0)
    each = 4 * 16384 * 2048 * 3 * (1 - 0.75**8)  # to a token's ranks and back, two bytes an element
    assert four.all2all == pytest.approx(48 * each / 450e9)
    mesh = roofline.step(
        described, rates.read(None).gpus["mi355x"], PEAKS, Load(tokens=16384, input_len=8192), size=4, streamed_bytes=76.8e9
    )
    assert mesh.all2all == pytest.approx(48 * each / (3 * 76.8e9)) and mesh.prefetch == 1, "a link to each peer"
    hidden_from = run.first(lambda tokens: step(tokens).exposed == 0)
    assert step(hidden_from).exposed == 0 < step(hidden_from - run.GRID).exposed
    assert run.first(lambda tokens: False) is None and run.first(lambda tokens: True) <= run.GRID


def test_the_page_of_forecasts_is_what_plan_says() -> None:
    """`python tests/forecasts.py` writes it again."""
    assert forecasts.PAGE.read_text() == forecasts.page()
