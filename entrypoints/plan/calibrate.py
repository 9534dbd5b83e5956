"""Calibrate: rates refitted to what `vllm-dwdp bench` measured. Pure but for reading bench.json."""

import dataclasses
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from vllm_dwdp.entrypoints.plan import memory
from vllm_dwdp.entrypoints.plan.model import Model, load
from vllm_dwdp.entrypoints.plan.rates import Gpu, Positive, Rates, Table
from vllm_dwdp.entrypoints.plan.roofline import Load, step
from vllm_dwdp.entrypoints.plan.source import RESIZING
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.placement import Placement

FITTED = {"single": (), "dwdp": ("interference",), "ep": ("all2all", "layer_us")}  # beside compute and step_ms
Size = Annotated[int, Meta(gt=0)]
MOST_OTHERS = 0.25  # dispatched or direct steps for each streamed one, as a last step of a few tokens is
KEEP = 1e-3  # how much a squared deviation from the old rates weighs: what no reading tells apart stays


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a bench was asked for, as far as plan reads it; what has a default is not in older files."""

    model: str
    size: Size
    eager: bool
    input_len: Size
    ratio: Annotated[float, Meta(gt=0, le=1)]
    hf_overrides: dict[str, Any]
    dwdp: dict[str, Any]
    engine_args: dict[str, Any] = {}
    uneven: float = 1
    output_len: int = 1


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A mode's median, in tokens/s per GPU for prefill."""

    mode: str
    point: Size
    median: Positive | None
    copy_gb_per_s: Positive | None
    views: dict[str, float] = {}

    @property
    def fits(self) -> bool:
        """Whether plan forecasts what was measured: steps that were dispatched it does not."""
        others = sum(number for view, number in self.views.items() if view != "streamed")
        return self.mode in FITTED and self.median is not None and others <= MOST_OTHERS * self.views.get("streamed", others)


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """A bench.json."""

    unit: str
    devices: list[str]
    settings: Asked
    rows: list[Row]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One measured mode: prompt tokens/s per GPU (`value`) of a model under a load."""

    mode: str
    load: Load
    value: float
    model: Model
    size: int
    streamed_bytes: int

    def predict(self, gpu: Gpu, rates: Rates) -> float:
        """What the roofline says in the place of `value`."""
        timed = step(self.model, gpu, rates, self.load, size=self.size, streamed_bytes=self.streamed_bytes)
        return self.load.tokens / getattr(timed, self.mode)


def calibrated(table: Table, paths: Sequence[str], gpu_name: str, planned: str) -> Table:
    """`table` with the rates of each kind of engine that the bench.json files measured refitted to all of them.

    A bench of a model of the same name as `planned` is read by that model's config. Raises DWDPError naming the file.
    """
    gpu = table.gpus[gpu_name]
    points: dict[str, list[Point]] = {}
    copies: dict[str, list[float]] = {}
    for path in paths:
        try:
            measured = read(path, gpu_name)
            found = points_of(measured, planned)
        except DWDPError as error:
            raise DWDPError(f"--calibrate: {path}: {error}") from None
        kind = "eager" if measured.settings.eager else "compiled"
        points.setdefault(kind, []).extend(found)
        copies.setdefault(kind, []).extend(row.copy_gb_per_s for row in measured.rows if row.copy_gb_per_s)
    rates = dict(table.rates)
    for kind, own in points.items():
        link = statistics.median(copies[kind]) / gpu.link_gb_per_s if copies[kind] else rates[kind].link
        rates[kind] = refit(msgspec.structs.replace(rates[kind], link=link), gpu, own)
    return msgspec.structs.replace(
        table, rates=rates, source=f"{table.source}; {' and '.join(points)} refitted to {', '.join(paths)}"
    )


def read(path: str, gpu_name: str) -> Measured:
    """A bench.json of prefill on that GPU. Raises DWDPError for anything else, and for what plan would misread."""
    try:
        measured = msgspec.json.decode(Path(path).read_bytes(), type=Measured)
    except (OSError, ValueError) as error:
        raise DWDPError(f"no bench.json: {error}") from None
    if others := [name for name in measured.devices if gpu_name not in re.split(r"\W+", name.lower())]:
        raise DWDPError(f"measured on {others[0]}, but --gpu is {gpu_name}")
    if measured.unit != "tokens/s/GPU" or not any(row.fits for row in measured.rows):
        raise DWDPError("no prefill reading of ep, single, or dwdp whose steps were streamed")
    asked = measured.settings
    taken = {"cache_gib", "experts_per_rank"} & asked.dwdp.keys() | RESIZING & asked.engine_args.keys()
    taken |= {name for name in ("uneven", "output_len") if getattr(asked, name) != 1}
    if taken:
        raise DWDPError(f"measured with {', '.join(sorted(taken))}; give one measured without")
    return measured


def points_of(measured: Measured, planned: str) -> list[Point]:
    asked = measured.settings
    same = Path(asked.model).name == Path(planned).resolve().name
    model = load(planned if same else asked.model, asked.hf_overrides)
    placement = Placement(num_experts=model.num_experts, size=asked.size)
    streamed = memory.dwdp(model, placement, slots=2, cache_gib=0, tokens=1).streamed
    return [
        Point(
            mode=row.mode, value=row.median, model=model, size=asked.size, streamed_bytes=streamed,
            load=Load(tokens=row.point, input_len=asked.input_len, ratio=asked.ratio),
        )
        for row in measured.rows if row.median and row.fits
    ]


def refit(rates: Rates, gpu: Gpu, points: Sequence[Point]) -> Rates:
    """The rates that come closest to the points, relatively and in the square.

    One factor for all kernels, a step's fixed cost, and what only the measured modes tell, each tried up and down in
    ever smaller steps.
    """
    names = ["compute", "step_ms", *dict.fromkeys(name for point in points for name in FITTED[point.mode])]
    factors = dict.fromkeys(names, 1.0)

    def apply(factors: dict[str, float]) -> Rates:
        rest = {name: getattr(rates, name) * factor for name, factor in factors.items() if name != "compute"}
        return msgspec.structs.replace(rates.scaled(factors["compute"]), **rest)

    def loss(factors: dict[str, float]) -> float:
        errors = sum(math.log(point.predict(gpu, apply(factors)) / point.value) ** 2 for point in points)
        return errors + KEEP * sum(math.log(factor) ** 2 for factor in factors.values())

    best, change = loss(factors), 0.5
    while change > 1e-3:
        tries = [factors | {name: factors[name] * math.exp(sign * change)} for name in names for sign in (1, -1)]
        found = min(tries, key=loss)
        if loss(found) < best:
            best, factors = loss(found), found
        else:
            change /= 2
    return apply(factors)
