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
    "mode", "tokens/s/GPU", "min - max", "vs ep", "vs single", "exposed ms/step", "copies GB/s", "experts GiB/GPU",
    "KV tokens/GPU",
)


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one mode over all its prompts. `ranks` and `stats` are in rank order; `stats` is DWDP's only."""

    mode: str
    max_num_batched_tokens: int
    round: int
    repeat: int
    num_gpus: int
    prompt_tokens: int
    output_tokens: int
    elapsed_s: float
    tokens_per_s_per_gpu: float
    exposed_wait_ms_per_step: float | None
    copy_gb_per_s: float | None
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
    """One mode at one number of batched tokens; None where nothing was measured. Medians over `num_readings`."""

    mode: str
    max_num_batched_tokens: int
    num_readings: int = 0
    tokens_per_s_per_gpu: float | None = None
    lowest: float | None = None
    highest: float | None = None
    ratio_to_ep: float | None = None
    ratio_to_single: float | None = None
    exposed_wait_ms_per_step: float | None = None
    copy_gb_per_s: float | None = None
    expert_bytes_per_gpu: float | None = None
    kv_cache_tokens_per_gpu: float | None = None
    failed: str | None = None


def reading(
    *, mode: str, max_num_batched_tokens: int, round: int, repeat: int, num_gpus: int, ranks: list[Ran],
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]],
) -> Reading:
    """Tokens/s count prompt tokens, from the first rank's start to the last rank's end.

    `before` and `after` are the ranks' cumulative DWDP statistics around the run, empty for other modes.
    """
    elapsed_s = max(ran.end_s for ran in ranks) - min(ran.start_s for ran in ranks)
    prompt_tokens = sum(ran.prompt_tokens for ran in ranks)
    pairs = list(zip(before, after, strict=True))
    waits = [ratio(grown(a, b, "exposed_wait_ms"), grown(a, b, "forwards", "streamed")) for a, b in pairs]
    bytes_per_ms = [ratio(grown(a, b, "prefetch_bytes"), grown(a, b, "copy_ms")) for a, b in pairs]
    return Reading(
        mode=mode, max_num_batched_tokens=max_num_batched_tokens, round=round, repeat=repeat, num_gpus=num_gpus,
        prompt_tokens=prompt_tokens, output_tokens=sum(ran.output_tokens for ran in ranks), elapsed_s=elapsed_s,
        tokens_per_s_per_gpu=prompt_tokens / elapsed_s / num_gpus,
        exposed_wait_ms_per_step=average(waits), copy_gb_per_s=ratio(average(bytes_per_ms), 1e6),
        ranks=ranks, stats=list(after),
    )


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
    modes: Sequence[str], token_counts: Sequence[int], readings: Sequence[Reading], startups: Sequence[Startup],
    failures: Sequence[Failure],
) -> list[Row]:
    """One row a mode and number of batched tokens, in the order given; ratios are of medians."""

    def of(items: Sequence[Any], mode: str, tokens: int) -> list[Any]:
        return [item for item in items if item.mode == mode and item.max_num_batched_tokens == tokens]

    rows = []
    for tokens in token_counts:
        typical = {mode: median(r.tokens_per_s_per_gpu for r in of(readings, mode, tokens)) for mode in modes}
        for mode in modes:
            found, started = of(readings, mode, tokens), of(startups, mode, tokens)
            speeds = [r.tokens_per_s_per_gpu for r in found]
            rows.append(Row(
                mode=mode, max_num_batched_tokens=tokens, num_readings=len(found),
                tokens_per_s_per_gpu=typical[mode], lowest=min(speeds, default=None),
                highest=max(speeds, default=None),
                ratio_to_ep=ratio(typical[mode], typical.get("ep")),
                ratio_to_single=ratio(typical[mode], typical.get("single")),
                exposed_wait_ms_per_step=median(r.exposed_wait_ms_per_step for r in found),
                copy_gb_per_s=median(r.copy_gb_per_s for r in found),
                expert_bytes_per_gpu=median(s.expert_bytes_per_gpu for s in started),
                kv_cache_tokens_per_gpu=median(s.kv_cache_tokens_per_gpu for s in started),
                failed=next((failure.reason for failure in of(failures, mode, tokens)), None),
            ))
    return rows


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def cells(row: Row) -> list[str]:
    """A measured row's text, in the order of COLUMNS."""
    return [
        row.mode,
        number(row.tokens_per_s_per_gpu, ",.0f"),
        f"{number(row.lowest, ',.0f')} - {number(row.highest, ',.0f')}",
        number(row.ratio_to_ep, ".2f"),
        number(row.ratio_to_single, ".2f"),
        number(row.exposed_wait_ms_per_step, ".2f"),
        number(row.copy_gb_per_s, ".0f"),
        number(ratio(row.expert_bytes_per_gpu, GIB), ".3g"),
        number(row.kv_cache_tokens_per_gpu, ",.0f"),
    ]


def table(rows: Sequence[Row]) -> str:
    """All rows as aligned text, grouped by batched tokens; a mode without a reading says why it failed."""
    texts = {id(row): cells(row) for row in rows}
    measured = [texts[id(row)] for row in rows if row.num_readings]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *measured)]
    widths[0] = max(len(row.mode) for row in rows)

    def line(values: Sequence[str]) -> str:
        aligned = [value.rjust(width) for value, width in zip(values[1:], widths[1:], strict=True)]
        return "  ".join([values[0].ljust(widths[0]), *aligned])

    lines, group = [], None
    for row in rows:
        if row.max_num_batched_tokens != group:
            group = row.max_num_batched_tokens
            lines += ["", f"{group} batched tokens a step", line(COLUMNS)]
        if row.num_readings:
            lines.append(line(texts[id(row)]) + ("  *" if row.failed else ""))
        else:
            lines.append(f"{row.mode.ljust(widths[0])}  {failure_text(row)}")
    notes = [row for row in rows if row.num_readings and row.failed]
    lines += [f"* {row.mode}, {row.max_num_batched_tokens}: later {failure_text(row)}" for row in notes]
    return "\n".join(lines[1:])


def failure_text(row: Row) -> str:
    if row.failed is None:
        return "not measured"
    reason = " ".join(row.failed.split())
    return "failed: " + (reason if len(reason) <= MAX_REASON_CHARS else reason[: MAX_REASON_CHARS - 3] + "...")


def chart(rows: Sequence[Row], title: str, path: Path) -> None:
    """Bars of tokens/s per GPU by mode, grouped by batched tokens, whiskers from lowest to highest reading.

    Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    counts = list(dict.fromkeys(row.max_num_batched_tokens for row in rows))
    modes = list(dict.fromkeys(row.mode for row in rows))
    width = 0.8 / len(modes)
    figure = Figure(figsize=(max(6.0, 1.0 + 0.9 * len(counts) * len(modes)), 4.5), layout="constrained")
    axes = figure.subplots()
    for index, mode in enumerate(modes):
        bars = [row for row in rows if row.mode == mode and row.num_readings]
        offset = (index - (len(modes) - 1) / 2) * width
        at = [counts.index(row.max_num_batched_tokens) + offset for row in bars]
        heights = [row.tokens_per_s_per_gpu for row in bars]
        spread = [[row.tokens_per_s_per_gpu - row.lowest for row in bars],
                  [row.highest - row.tokens_per_s_per_gpu for row in bars]]
        if bars:
            axes.bar(at, heights, width * 0.92, color=COLORS[mode], yerr=spread, capsize=3, ecolor="#333333")
        for row in rows:
            if row.mode == mode and not row.num_readings:
                label = f"{mode}\n{'failed' if row.failed else 'not measured'}"
                x = counts.index(row.max_num_batched_tokens) + offset
                axes.annotate(label, (x, 0), (0, 4), textcoords="offset points", ha="center", fontsize=8,
                              color=COLORS[mode])
        for x, row in zip(at, bars, strict=True):
            label = f"{row.tokens_per_s_per_gpu:,.0f}"
            if row.ratio_to_ep is not None and mode != "ep":
                label += f"\n{row.ratio_to_ep:.2f}x ep"
            axes.annotate(label, (x, row.highest), (0, 4), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
    axes.set_xlim(-0.5, len(counts) - 0.5)
    axes.margins(y=0.18)
    axes.set_xlabel("batched tokens a step")
    axes.set_ylabel("prompt tokens/s per GPU")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(handles=[Patch(color=COLORS[mode], label=mode) for mode in modes], frameon=False, ncols=len(modes),
                loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.savefig(path, dpi=150)
