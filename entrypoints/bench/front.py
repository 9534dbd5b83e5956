"""What servers gave: medians by load and mode, the table, and the front of tokens/s per user and per GPU."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec

from vllm_dwdp.entrypoints.bench.loads import FIGURES
from vllm_dwdp.entrypoints.bench.modes import short
from vllm_dwdp.entrypoints.bench.report import aligned, color

HEADER = ("in:out:rate:count", "mode", "requests/s", "tokens/s/GPU", "tokens/s/user", "TTFT ms", "TTFT p99", "TPOT ms",
          "TPOT p99", "ITL p99")


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One load on one mode's server. Throughputs are the server's, of prompt and generated tokens.

    `dwdp` is what DWDP's counters counted meanwhile, over all ranks.
    """

    mode: str
    load: str
    repeat: int
    request_throughput: float
    total_token_throughput: float
    median_ttft_ms: float
    p99_ttft_ms: float
    median_tpot_ms: float
    p99_tpot_ms: float
    p99_itl_ms: float
    dwdp: dict[str, float]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Medians of one mode under one load; tokens/s per user is None where a request generates one token."""

    mode: str
    load: str
    requests_per_s: float
    tokens_per_s_per_gpu: float
    tokens_per_s_per_user: float | None
    latencies_ms: list[float]


def summarize(modes: Sequence[str], loads: Sequence[str], measured: Sequence[Measured], num_gpus: int) -> list[Row]:
    """One row for each load and mode that was measured, in the order given."""
    rows = []
    for load in loads:
        for mode in modes:
            own = [m for m in measured if (m.load, m.mode) == (load, mode)]
            if own:
                medians = {name: statistics.median(getattr(m, name) for m in own) for name in FIGURES}
                tpot_ms = medians["median_tpot_ms"]
                rows.append(Row(
                    mode=mode, load=load, requests_per_s=medians["request_throughput"],
                    tokens_per_s_per_gpu=medians["total_token_throughput"] / num_gpus,
                    tokens_per_s_per_user=1e3 / tpot_ms if tpot_ms > 0 else None,
                    latencies_ms=[medians[name] for name in FIGURES[2:]],
                ))
    return rows


def table(rows: Sequence[Row]) -> str:
    """All rows as aligned text."""
    lines = [[
        row.load, short(row.mode), f"{row.requests_per_s:.2f}", f"{row.tokens_per_s_per_gpu:,.0f}",
        "-" if row.tokens_per_s_per_user is None else f"{row.tokens_per_s_per_user:.1f}",
        *(f"{ms:,.1f}" for ms in row.latencies_ms),
    ] for row in rows]
    return "\n".join(aligned([HEADER, *lines]))


def label(load: str) -> str:
    """A point's: how many requests come a second."""
    rate = load.split(":")[2]
    return "all at once" if rate == "inf" else f"{rate}/s"


def points(rows: Sequence[Row]) -> list[Row]:
    """Rows with a place on the front: of loads that generate, that all ranks shared, and that came alone."""
    return [row for row in rows if row.tokens_per_s_per_user is not None and not ("@" in row.load or " beside " in row.load)]


def picture(rows: Sequence[Row], title: str, path: Path) -> None:
    """The front: a panel for each length of prompts and outputs, a line a mode, a point a rate. At least one row is one of `points`.

    Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    shown = points(rows)
    modes = list(dict.fromkeys(row.mode for row in shown))
    lengths = list(dict.fromkeys(":".join(row.load.split(":")[:2]) for row in shown))
    figure = Figure(figsize=(5.5 * len(lengths), 4.5), layout="constrained")
    for axes, length in zip(figure.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True):
        for mode in modes:
            own = [row for row in shown if row.mode == mode and row.load.startswith(f"{length}:")]
            own.sort(key=lambda row: float(row.load.split(":")[2]))
            users, gpus = [row.tokens_per_s_per_user for row in own], [row.tokens_per_s_per_gpu for row in own]
            axes.plot(users, gpus, "o-", color=color(mode, modes), label=short(mode))
            for row in own:
                axes.annotate(
                    label(row.load),
                    (row.tokens_per_s_per_user, row.tokens_per_s_per_gpu), (4, 4), textcoords="offset points", fontsize=7,
                )
        axes.set(xlabel="tokens/s per user (1000 / median TPOT in ms)", ylabel="tokens/s per GPU, prompts included",
                 title=f"{length.replace(':', ' tokens in, ')} out")
        axes.set_xlim(0, 1.2 * axes.dataLim.x1)
        axes.set_ylim(0, 1.3 * axes.dataLim.y1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower left")
    figure.suptitle(f"{title}; points: requests/s")
    figure.savefig(path, dpi=150)
