"""What a benchmark measured: readings, their statistics, the table and the chart. Pure but for the chart's file."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import msgspec

from vllm_dwdp.entrypoints.bench.modes import kind, short
from vllm_dwdp.entrypoints.bench.rank import Held, Ran

GIB = 2**30
MAX_REASON_CHARS = 160
COLORS = {"dwdp": "#2a7f62", "ep": "#b5533c", "tp": "#4a6fa5", "single": "#9a9a9a"}  # dwdp with options: its own
POINTS = {False: "tokens/step", True: "batch/GPU"}  # what tells rows of one mode apart, for prefill and for decode
UNITS = {False: "tokens/s/GPU", True: "ms/step"}
FORMATS = {False: ",.0f", True: ",.2f"}


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of one mode, at a number of batched tokens or a batch size per GPU (`point`).

    `value` is prompt tokens/s per GPU, or milliseconds per decode step.
    """

    mode: str
    point: int
    round: int
    value: float
    exposed_wait_ms_per_step: float | None
    copy_gb_per_s: float | None
    spent: dict[str, float]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One mode at one point; None where nothing was measured. Ratios are of speeds: above 1 is faster than that mode.

    `ratio_to_ep` is that to the fastest of expert parallelism's modes.

    `views` are DWDP's forwards by view, of all ranks and readings.
    """

    mode: str
    point: int
    num_readings: int
    median: float | None
    lowest: float | None
    highest: float | None
    ratio_to_ep: float | None
    ratio_to_single: float | None
    exposed_wait_ms_per_step: float | None
    copy_gb_per_s: float | None
    views: dict[str, float]
    held_per_gpu: Held | None
    failed: str | None


def total(before: Sequence[Ran], after: Sequence[Ran]) -> dict[str, float]:
    """What a run of all ranks took: seconds from the first start to the last end, those in which all of them only
    decoded, with the steps that a rank took in these, and sums of the rest.

    `before` is the ranks' previous run: their statistics accumulate. Where ranks did not decode at the same time, the
    one that took longest counts.
    """
    begin_s, end_s = max(ran.first_s for ran in after), min(ran.end_s for ran in after)
    if begin_s >= end_s:
        longest = max(after, key=lambda ran: ran.end_s - ran.first_s)
        begin_s, end_s = longest.first_s, longest.end_s
    steps = [sum(begin_s < step_s <= end_s for step_s in ran.steps_s) for ran in after]
    return less(summed(after), summed(before)) | {
        "elapsed_s": max(ran.end_s for ran in after) - min(ran.start_s for ran in after),
        "decode_s": end_s - begin_s, "decode_steps": statistics.mean(filter(None, steps)) if any(steps) else 0,
        "prompt_tokens": sum(ran.prompt_tokens for ran in after), "output_tokens": sum(ran.output_tokens for ran in after),
    }


def summed(ranks: Sequence[Ran]) -> dict[str, float]:
    """Their statistics, added up."""
    return {name: sum(ran.stats.get(name, 0) for ran in ranks) for name in {name for ran in ranks for name in ran.stats}}


def less(spent: Mapping[str, float], first: Mapping[str, float]) -> dict[str, float]:
    """What a run took beyond another."""
    return {name: value - first.get(name, 0) for name, value in spent.items()}


def reading(*, mode: str, point: int, round: int, num_gpus: float, spent: Mapping[str, float], decode: bool = False) -> Reading:
    """One run's figures: of prefill, or of the steps that only decoded. Copies and waits in CUDA graphs are not timed."""
    steps = spent.get("streamed", 0) - spent.get("replays", 0)
    return Reading(
        mode=mode, point=point, round=round, spent=dict(spent),
        value=1e3 * spent["decode_s"] / spent["decode_steps"] if decode else
        spent["prompt_tokens"] / spent["elapsed_s"] / num_gpus,
        exposed_wait_ms_per_step=spent["exposed_wait_ms"] / steps if steps > 0 else None,
        copy_gb_per_s=spent["prefetch_bytes"] * steps / spent["streamed"] / spent["copy_ms"] / 1e6
        if steps > 0 and spent["copy_ms"] > 0 else None,
    )


def summarize(
    modes: Sequence[str], points: Sequence[int], decode: bool, readings: Sequence[Reading],
    held: Mapping[tuple[str, int], Held], failures: Mapping[tuple[str, int], str],
) -> list[Row]:
    """One row a point and mode, in the order given; `held` is per GPU, by mode and point, ratios those of medians."""
    rows = []
    for point in points:
        found = {mode: [r for r in readings if (r.mode, r.point) == (mode, point)] for mode in modes}
        medians = {mode: median([r.value for r in own]) for mode, own in found.items()}
        fastest = min if decode else max
        best = {base: fastest([value for mode, value in medians.items() if value and kind(mode) == base],
                              default=None) for base in ("ep", "single")}
        for mode, own in found.items():
            values = [r.value for r in own]
            versus = {base: ratio(medians[mode], best[base], decode) for base in ("ep", "single")}
            rows.append(Row(
                mode=mode, point=point, num_readings=len(own),
                median=medians[mode], lowest=min(values, default=None), highest=max(values, default=None),
                ratio_to_ep=versus["ep"], ratio_to_single=versus["single"],
                exposed_wait_ms_per_step=median([r.exposed_wait_ms_per_step for r in own]),
                copy_gb_per_s=median([r.copy_gb_per_s for r in own]),
                views={view: n for view in ("direct", "streamed", "dispatched") if (n := sum(r.spent.get(view, 0) for r in own)) > 0},
                held_per_gpu=held.get((mode, point)), failed=failures.get((mode, point)),
            ))
    return rows


def ratio(own: float | None, other: float | None, decode: bool) -> float | None:
    """How many times as fast as another mode."""
    if not own or not other:
        return None
    return other / own if decode else own / other


def median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def table(rows: Sequence[Row], decode: bool) -> str:
    """All rows as aligned text; a mode without a reading says why it failed."""
    header = ["mode", POINTS[decode], UNITS[decode], "min - max", "vs ep", "vs single", "exposed ms/step",
              "copies GB/s", "view", "experts GiB/GPU", "KV tokens/GPU"]
    lines = [header, *(cells(row, FORMATS[decode]) for row in rows)]
    texts = aligned(lines)
    return "\n".join([texts[0], *(text + outcome(row) for text, row in zip(texts[1:], rows, strict=True))])


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Each line's cells in columns, the first to the left, the others to the right; lines may end early."""
    widths = [max(map(len, column)) for column in zip_longest(*lines, fillvalue="")]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]


def cells(row: Row, form: str) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    name = [short(row.mode), format(row.point, ",")]
    if not (row.num_readings or row.held_per_gpu):
        return name
    held = row.held_per_gpu
    spread = f"{number(row.lowest, form)} - {number(row.highest, form)}" if row.num_readings else "-"
    forwards = sum(row.views.values())
    return name + [  # noqa: RUF005
        number(row.median, form), spread,
        number(row.ratio_to_ep, ".2f"), number(row.ratio_to_single, ".2f"),
        number(row.exposed_wait_ms_per_step, ".2f"), number(row.copy_gb_per_s, ".0f"),
        ", ".join(f"{100 * count / forwards:.0f}% {view}" for view, count in row.views.items()) or "-",
        number(held.expert_bytes / GIB if held else None, ".3g"), number(held.kv_cache_tokens if held else None, ",.0f"),
    ]


def outcome(row: Row) -> str:
    """What a row's line ends with: why its mode failed."""
    if row.failed is None:
        return "" if row.num_readings else "  not measured"
    short = row.failed if len(row.failed) <= MAX_REASON_CHARS else row.failed[: MAX_REASON_CHARS - 3] + "..."
    return f"  {'later failed' if row.num_readings else 'failed'}: {short}"


def chart(rows: Sequence[Row], decode: bool, title: str, path: Path) -> None:
    """Bars of the medians, each with its mode's name, grouped by point, whiskers from lowest to highest reading.

    Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    points = list(dict.fromkeys(row.point for row in rows))
    modes = list(dict.fromkeys(row.mode for row in rows))
    width = 0.8 / len(modes)
    figure = Figure(figsize=(max(6.0, 1.0 + 0.9 * len(points) * len(modes)), 4.5), layout="constrained")
    axes = figure.subplots()
    places: dict[float, str] = {}  # of the modes' names
    for index, mode in enumerate(modes):
        own = [row for row in rows if row.mode == mode and row.num_readings]
        where = {point: at + (index - (len(modes) - 1) / 2) * width for at, point in enumerate(points)}
        read = {row.point for row in own}
        named = short(mode).replace("+", "\n+")
        places |= {at: named if point in read else f"{named}\n(none)" for point, at in where.items()}
        medians, lowest, highest = ([getattr(row, name) for row in own] for name in ("median", "lowest", "highest"))
        below, above = ([b - a for a, b in zip(*pair, strict=True)] for pair in ((lowest, medians), (medians, highest)))
        bars = axes.bar(
            [where[row.point] for row in own], medians, width * 0.92, color=color(mode, modes), yerr=[below, above], capsize=3,
        )
        axes.bar_label(bars, [format(value, FORMATS[decode]) for value in medians], padding=3, fontsize=8)
    axes.set_xticks(list(places), list(places.values()), minor=True, fontsize=7)
    axes.tick_params(axis="x", which="both", length=0)
    axes.tick_params(axis="x", which="major", pad=14 + 8 * max(mode.count("+") for mode in modes) + 8)
    axes.set_xticks(range(len(points)), [format(point, ",") for point in points])
    axes.set(xlabel=POINTS[decode], ylabel=UNITS[decode], title=title)
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("bars: medians; whiskers: lowest to highest reading", fontsize=8)
    figure.savefig(path, dpi=150)


def color(mode: str, modes: Sequence[str]) -> str:
    """A mode's color in every picture; one with options has its own."""
    return COLORS.get(mode, f"C{modes.index(mode)}")
