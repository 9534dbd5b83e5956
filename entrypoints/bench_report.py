"""What a benchmark measured: readings, their statistics, the table and the chart. Pure but for the chart's file."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vllm_dwdp.entrypoints.bench_rank import Ran

GIB = 2**30
MAX_REASON_CHARS = 160
COLORS = {"dwdp": "#2a7f62", "ep": "#b5533c", "tp": "#4a6fa5", "single": "#9a9a9a"}
COLUMNS = (
    "mode", "median", "min - max", "vs ep", "vs single", "exposed ms/step", "copies GB/s", "steps read in place",
    "experts GiB/GPU", "KV tokens/GPU",
)


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured of an engine: prefill in tokens/s per GPU, or, of `batch` requests on each, ms a decode step."""

    max_num_batched_tokens: int
    batch: int | None = None

    @property
    def title(self) -> str:
        if self.batch is None:
            return f"prefill, {self.max_num_batched_tokens} batched tokens a step: tokens/s per GPU"
        return f"decode, {self.batch} requests per GPU: ms a step"

    def describe(self, value: float) -> str:
        return f"{value:,.0f} tokens/s per GPU" if self.batch is None else f"{value:.2f} ms a step of {self.batch}"

    def ratio(self, value: float | None, base: float | None) -> float | None:
        """How many times as fast as `base`."""
        return ratio(value, base) if self.batch is None else ratio(base, value)


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one mode. `value` is in the case's unit; lists are in rank order, `stats` is DWDP's only."""

    mode: str
    case: Case
    round: int
    repeat: int
    num_gpus: int
    value: float
    exposed_wait_ms_per_step: float | None
    copy_gb_per_s: float | None
    direct_share: float | None
    prefilled: list[Ran]
    ranks: list[Ran]
    stats: list[dict[str, Any]]


class Startup(msgspec.Struct, frozen=True, kw_only=True):
    """One start of one mode. Both amounts are averages over its GPUs."""

    mode: str
    max_num_batched_tokens: int
    round: int
    load_s: float
    kv_cache_tokens_per_gpu: float
    expert_bytes_per_gpu: float | None


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A mode that could not go on, at one number of batched tokens."""

    mode: str
    max_num_batched_tokens: int
    round: int
    rank: int
    phase: str
    reason: str
    log: str


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One mode in one case; None where nothing was measured. Medians over `num_readings`; ratios above 1 are faster."""

    mode: str
    case: Case
    num_readings: int = 0
    value: float | None = None
    lowest: float | None = None
    highest: float | None = None
    ratio_to_ep: float | None = None
    ratio_to_single: float | None = None
    exposed_wait_ms_per_step: float | None = None
    copy_gb_per_s: float | None = None
    direct_share: float | None = None
    expert_bytes_per_gpu: float | None = None
    kv_cache_tokens_per_gpu: float | None = None
    failed: str | None = None


def reading(
    *, mode: str, case: Case, round: int, repeat: int, num_gpus: int, ranks: list[Ran], prefilled: list[Ran],
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]],
) -> Reading:
    """Prefill counts prompt tokens; decode the steps that `ranks` took beyond `prefilled`, the same with one token.

    `before` and `after` are the ranks' cumulative DWDP statistics around the run, empty for other modes.
    """
    if case.batch is None:
        value = sum(ran.prompt_tokens for ran in ranks) / elapsed_s(ranks) / num_gpus
    else:
        steps = sum(ran.output_tokens for ran in ranks) / sum(ran.output_tokens for ran in prefilled) - 1
        value = 1e3 * (elapsed_s(ranks) - elapsed_s(prefilled)) / steps
    pairs = list(zip(before, after, strict=True))
    waits = [ratio(grown(a, b, "exposed_wait_ms"), grown(a, b, "forwards", "streamed")) for a, b in pairs]
    bytes_per_ms = [ratio(grown(a, b, "prefetch_bytes"), grown(a, b, "copy_ms")) for a, b in pairs]
    views = [(grown(a, b, "forwards", "direct"), grown(a, b, "forwards", "streamed")) for a, b in pairs]
    return Reading(
        mode=mode, case=case, round=round, repeat=repeat, num_gpus=num_gpus, value=value,
        exposed_wait_ms_per_step=average(waits), copy_gb_per_s=ratio(average(bytes_per_ms), 1e6),
        direct_share=average(ratio(direct, direct + streamed) for direct, streamed in views if direct is not None),
        prefilled=prefilled, ranks=ranks, stats=list(after),
    )


def elapsed_s(ranks: Sequence[Ran]) -> float:
    """From the first rank's start to the last rank's end."""
    return max(ran.end_s for ran in ranks) - min(ran.start_s for ran in ranks)


def grown(before: dict[str, Any], after: dict[str, Any], *path: str) -> float | None:
    """How much the statistic at `path` grew, or None when either side lacks it."""
    values: list[Any] = [before, after]
    for key in path:
        values = [value.get(key) if isinstance(value, dict) else None for value in values]
    return None if None in values else values[1] - values[0]


def ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def average(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def summarize(
    modes: Sequence[str], cases: Sequence[Case], readings: Sequence[Reading], startups: Sequence[Startup],
    failures: Sequence[Failure],
) -> list[Row]:
    """One row a case and mode, in the order given; ratios are of medians."""

    def of(items: Sequence[Any], mode: str, tokens: int) -> list[Any]:
        return [item for item in items if item.mode == mode and item.max_num_batched_tokens == tokens]

    rows = []
    for case in cases:
        tokens = case.max_num_batched_tokens
        readings_of = {mode: [r for r in readings if r.mode == mode and r.case == case] for mode in modes}
        typical = {mode: median(r.value for r in found) for mode, found in readings_of.items()}
        for mode, found in readings_of.items():
            started = of(startups, mode, tokens)
            values = [r.value for r in found]
            rows.append(Row(
                mode=mode, case=case, num_readings=len(found), value=typical[mode],
                lowest=min(values, default=None), highest=max(values, default=None),
                ratio_to_ep=case.ratio(typical[mode], typical.get("ep")),
                ratio_to_single=case.ratio(typical[mode], typical.get("single")),
                exposed_wait_ms_per_step=median(r.exposed_wait_ms_per_step for r in found),
                copy_gb_per_s=median(r.copy_gb_per_s for r in found),
                direct_share=median(r.direct_share for r in found),
                expert_bytes_per_gpu=median(s.expert_bytes_per_gpu for s in started),
                kv_cache_tokens_per_gpu=median(s.kv_cache_tokens_per_gpu for s in started),
                failed=next((failure.reason for failure in of(failures, mode, tokens)), None),
            ))
    return rows


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def cells(row: Row) -> list[str]:
    """A measured row's text, in the order of COLUMNS."""
    form = ",.0f" if row.case.batch is None else ".2f"
    return [
        row.mode,
        number(row.value, form),
        f"{number(row.lowest, form)} - {number(row.highest, form)}",
        number(row.ratio_to_ep, ".2f"),
        number(row.ratio_to_single, ".2f"),
        number(row.exposed_wait_ms_per_step, ".2f"),
        number(row.copy_gb_per_s, ".0f"),
        number(row.direct_share, ".0%"),
        number(ratio(row.expert_bytes_per_gpu, GIB), ".3g"),
        number(row.kv_cache_tokens_per_gpu, ",.0f"),
    ]


def table(rows: Sequence[Row]) -> str:
    """All rows as aligned text, grouped by case; a mode without a reading says why it failed."""
    texts = {id(row): cells(row) for row in rows}
    measured = [texts[id(row)] for row in rows if row.num_readings]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *measured)]
    widths[0] = max(len(row.mode) for row in rows)

    def line(values: Sequence[str]) -> str:
        aligned = [value.rjust(width) for value, width in zip(values[1:], widths[1:], strict=True)]
        return "  ".join([values[0].ljust(widths[0]), *aligned])

    lines, group = [], None
    for row in rows:
        if row.case != group:
            group = row.case
            lines += ["", group.title, line(COLUMNS)]
        if row.num_readings:
            lines.append(line(texts[id(row)]) + ("  *" if row.failed else ""))
        else:
            lines.append(f"{row.mode.ljust(widths[0])}  {failure_text(row)}")
    notes = [row for row in rows if row.num_readings and row.failed]
    lines += [f"* {row.mode}, {row.case.title.partition(':')[0]}: later {failure_text(row)}" for row in notes]
    return "\n".join(lines[1:])


def failure_text(row: Row) -> str:
    if row.failed is None:
        return "not measured"
    reason = " ".join(row.failed.split())
    return "failed: " + (reason if len(reason) <= MAX_REASON_CHARS else reason[: MAX_REASON_CHARS - 3] + "...")


def chart(rows: Sequence[Row], title: str, path: Path) -> None:
    """Bars of the medians by mode, grouped by case, whiskers from lowest to highest reading; one workload a chart.

    Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cases = list(dict.fromkeys(row.case for row in rows))
    is_decode = cases[0].batch is not None
    modes = list(dict.fromkeys(row.mode for row in rows))
    width = 0.8 / len(modes)
    figure = Figure(figsize=(max(6.0, 1.0 + 0.9 * len(cases) * len(modes)), 4.5), layout="constrained")
    axes = figure.subplots()
    for index, mode in enumerate(modes):
        bars = [row for row in rows if row.mode == mode and row.num_readings]
        offset = (index - (len(modes) - 1) / 2) * width
        at = [cases.index(row.case) + offset for row in bars]
        heights = [row.value for row in bars]
        spread = [[row.value - row.lowest for row in bars],
                  [row.highest - row.value for row in bars]]
        if bars:
            axes.bar(at, heights, width * 0.92, color=COLORS[mode], yerr=spread, capsize=3, ecolor="#333333")
        for row in rows:
            if row.mode == mode and not row.num_readings:
                label = f"{mode}\n{'failed' if row.failed else 'not measured'}"
                x = cases.index(row.case) + offset
                axes.annotate(label, (x, 0), (0, 4), textcoords="offset points", ha="center", fontsize=8,
                              color=COLORS[mode])
        for x, row in zip(at, bars, strict=True):
            label = f"{row.value:.1f}" if is_decode else f"{row.value:,.0f}"
            if row.ratio_to_ep is not None and mode != "ep":
                label += f"\n{row.ratio_to_ep:.2f}x ep"
            axes.annotate(label, (x, row.highest), (0, 4), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xticks(range(len(cases)), [f"{case.batch or case.max_num_batched_tokens:,}" for case in cases])
    axes.set_xlim(-0.5, len(cases) - 0.5)
    axes.margins(y=0.18)
    axes.set_xlabel("decoding requests per GPU" if is_decode else "batched tokens a step")
    axes.set_ylabel("ms a step (lower is better)" if is_decode else "prompt tokens/s per GPU")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(handles=[Patch(color=COLORS[mode], label=mode) for mode in modes], frameon=False, ncols=len(modes),
                loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.savefig(path, dpi=150)
