"""Calibrate: rates refitted to what `vllm-dwdp bench` measured. Pure but for reading bench.json."""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from vllm_dwdp.entrypoints.plan import memory
from vllm_dwdp.entrypoints.plan.model import Model, load
from vllm_dwdp.entrypoints.plan.rates import Gpu, Rates, Table
from vllm_dwdp.entrypoints.plan.roofline import Load, step
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.placement import Placement

FITTED = {"single": (), "dwdp": ("interference",), "ep": ("all2all", "layer_us")}  # beside compute and step_ms
KEEP = 1e-3  # how much a squared deviation from the old rates weighs: what no reading tells apart stays


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
        content = read(path, gpu_name)
        kind = "eager" if content["settings"]["eager"] else "compiled"
        points.setdefault(kind, []).extend(points_of(content, planned))
        copies.setdefault(kind, []).extend(row["copy_gb_per_s"] for row in content["rows"] if row["copy_gb_per_s"])
    rates = dict(table.rates)
    for kind, measured in points.items():
        link = statistics.median(copies[kind]) / gpu.link_gb_per_s if copies[kind] else rates[kind].link
        rates[kind] = refit(msgspec.structs.replace(rates[kind], link=link), gpu, measured)
    return msgspec.structs.replace(
        table, rates=rates, source=f"{table.source}; {' and '.join(points)} refitted to {', '.join(paths)}"
    )


def read(path: str, gpu_name: str) -> dict[str, Any]:
    """A bench.json of prefill on that GPU. Raises DWDPError for anything else."""
    try:
        content = json.loads(Path(path).read_text())
        settings, unit = content["settings"], content["unit"]
        others = [name for name in content["devices"] if gpu_name not in re.split(r"\W+", name.lower())]
        found = [row["mode"] for row in content["rows"] if row["mode"] in FITTED and row["median"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DWDPError(f"--calibrate: {path} is no bench.json: {type(error).__name__}: {error}") from None
    if others:
        raise DWDPError(f"--calibrate: {path} was measured on {others[0]}, but --gpu is {gpu_name}")
    if unit != "tokens/s/GPU" or not found:
        raise DWDPError(f"--calibrate: {path} has no prefill reading of dwdp, ep or single")
    if taken := settings["dwdp"].keys() & {"cache_gib", "experts_per_rank"}:
        raise DWDPError(f"--calibrate: {path} measured DWDP with {', '.join(sorted(taken))}; give one measured without")
    return content


def points_of(content: dict[str, Any], planned: str) -> list[Point]:
    settings = content["settings"]
    same = Path(settings["model"]).name == Path(planned).resolve().name
    model = load(planned if same else settings["model"], settings["hf_overrides"])
    placement = Placement(num_experts=model.num_experts, size=settings["size"])
    streamed = memory.dwdp(model, placement, slots=2, cache_gib=0, tokens=1).streamed
    return [
        Point(
            mode=row["mode"], value=row["median"], model=model, size=settings["size"], streamed_bytes=streamed,
            load=Load(tokens=row["point"], input_len=settings["input_len"], ratio=settings["ratio"]),
        )
        for row in content["rows"] if row["mode"] in FITTED and row["median"]
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
