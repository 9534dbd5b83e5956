"""What a plan prints and draws. Pure but for the picture's file."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_dwdp.budget import GIB
from vllm_dwdp.entrypoints.bench.report import COLORS, aligned
from vllm_dwdp.entrypoints.plan.roofline import Step, contention

if TYPE_CHECKING:
    from vllm_dwdp.entrypoints.plan.run import Plan

NAMES = {"dwdp": "DWDP", "ep": "expert parallel", "single": "full replica"}


def text(
    plan: "Plan", steps: Callable[[int], Step], *, hidden_from: int | None, wins_from: int | None, source: str
) -> str:
    """The whole report. `hidden_from` and `wins_from` are tokens a step, None for never."""
    return "\n\n".join([
        headline(plan), memory_table(plan), steps_table(plan, steps), verdict(plan, steps, hidden_from, wins_from),
        f"Rates: {source}. A forecast: measure with vllm-dwdp bench, then --calibrate.",
    ])


def headline(plan: "Plan") -> str:
    model, asked = plan.model, plan.settings
    expert = sum(model.expert_bytes)
    return (
        f"{model.name} on {asked.size} {asked.gpu}: {model.num_moe_layers} of {len(model.is_moe)} layers with "
        f"{model.num_experts} experts, top {model.top_k}, {model.format.name}; an expert {expert / 1e6:.2f} MB, a "
        f"layer's {model.num_experts * expert / 1e9:.3f} GB, all {model.all_expert_bytes / GIB:.1f} GiB"
    )


def memory_table(plan: "Plan") -> str:
    """A mode a line, GiB of its fullest rank."""
    rows = [["GiB per GPU", "replicated", "shard", "residents", "slots", "activations", "total", "KV tokens left"]]
    for mode, held in plan.held().items():
        parts = (held.replicated, held.shard, held.residents, held.slots, held.activations, held.total)
        tokens = plan.kv_tokens(held)
        left = f"{tokens:,}" if tokens > 0 else "does not fit"
        rows.append([NAMES[mode], *(f"{nbytes / GIB:.2f}" for nbytes in parts), left])
    return "\n".join(aligned(rows))


def steps_table(plan: "Plan", steps: Callable[[int], Step]) -> str:
    """A number of tokens a step a line: milliseconds, and ratios of speeds."""
    rows = [["tokens a step", "attention", "dense", "experts", "other", "prefetch", "exposed", "all-to-all", "waiting",
             "DWDP ms", "EP ms", "replica ms", "DWDP tokens/s/GPU", "DWDP / EP", "DWDP / replica"]]
    for tokens in plan.settings.tokens:
        step = steps(tokens)
        spent = (step.compute.attention, step.compute.dense, step.compute.experts, step.compute.other, step.prefetch,
                 step.exposed, step.all2all, step.waiting, step.dwdp, step.ep, step.single)
        rows.append([
            f"{tokens:,}", *(f"{1e3 * seconds:.2f}" for seconds in spent), f"{tokens / step.dwdp:,.0f}",
            f"{step.ep / step.dwdp:.2f}", f"{step.single / step.dwdp:.2f}",
        ])
    return "\n".join(aligned(rows))


def verdict(plan: "Plan", steps: Callable[[int], Step], hidden_from: int | None, wins_from: int | None) -> str:
    """From which size of step copies are hidden and DWDP wins, and how copies meet at their sources."""
    step = steps(max(plan.settings.tokens))
    lines = [
        f"Copies take {1e3 * step.prefetch / plan.model.num_moe_layers:.2f} ms a layer. They are hidden "
        + (f"from {hidden_from:,} tokens a step." if hidden_from else "at no number of tokens a step."),
        f"DWDP is faster than expert parallelism from {wins_from:,} tokens a step." if wins_from else
        "DWDP is faster than expert parallelism at no number of tokens a step.",
        "That is of steps that are streamed; within a host smaller ones are dispatched, which is not forecast. Nor are dispatch's inbox, "
        "of 1 GiB at most, and CUDA graphs, which take from the KV cache.",
    ]
    if plan.model.format.compute == "fp4":
        lines.append("Kernels that compute in FP4 are assumed; so far DWDP streams this format to Marlin's alone, which compute in bf16.")
    if not plan.gpu.has_cuda:
        lines.append(f"DWDP does not run on {plan.settings.gpu} yet: its kernels are CUDA.")
    if plan.settings.size > 2 and plan.gpu.links_gb_per_s is None:
        chances = contention(plan.settings.size)
        mean = sum((n + 1) * chance for n, chance in enumerate(chances))
        shown = ", ".join(f"{n + 1}: {chance:.1%}" for n, chance in enumerate(chances) if chance >= 5e-4)
        lines.append(
            f"Ranks that pull from one source at once, if each chose at random: {shown}. Copies in slices ride that "
            f"out; whole ones would take up to {mean:.2f} times as long, {1e3 * mean * step.prefetch:.1f} ms a step."
        )
    return "\n".join(lines)


def pictures() -> list[str]:
    """Endings of the files that `plot` can write."""
    from matplotlib.backend_bases import FigureCanvasBase

    return sorted(FigureCanvasBase.get_supported_filetypes())


def plot(
    plan: "Plan", steps: Callable[[int], Step], *, hidden_from: int | None, wins_from: int | None, path: Path
) -> None:
    """Throughput of each mode, and compute beside copies, over tokens a step. Needs matplotlib."""
    from matplotlib.figure import Figure

    least, most = min(plan.settings.tokens) / 4, max(plan.settings.tokens) * 2
    points = [round(least * (most / least) ** (n / 60)) or 1 for n in range(61)]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    speed, times = figure.subplots(1, 2)
    for mode, name in NAMES.items():
        values = [tokens / getattr(steps(tokens), mode) for tokens in points]
        speed.plot(points, values, color=COLORS[mode], label=name)
    computing = [1e3 * steps(tokens).compute.total for tokens in points]
    times.plot(points, computing, color=COLORS["single"], label="compute")
    times.plot(points, [1e3 * steps(tokens).prefetch for tokens in points], color=COLORS["dwdp"], label="prefetch")
    times.plot(points, [1e3 * steps(tokens).all2all for tokens in points], color=COLORS["ep"], label="all-to-all")
    for axes, mark, note in ((speed, wins_from, "DWDP faster than EP"), (times, hidden_from, "prefetch hidden")):
        if mark and least <= mark <= most:
            axes.axvline(mark, color="black", linewidth=0.8, linestyle=":", label=f"{note} from {mark:,}")
        axes.set_xscale("log", base=2)
        ticks = [2**n for n in range(math.ceil(math.log2(least)), int(math.log2(most)) + 1)]
        axes.set(xlabel="tokens a step", xticks=ticks)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.tick_params(axis="x", rotation=45)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    speed.set(ylabel="prompt tokens/s per GPU", ylim=(0, None))
    times.set(ylabel="ms a step", yscale="log")
    figure.suptitle(f"Forecast: {plan.model.name}, {plan.settings.size} {plan.settings.gpu}, {plan.model.format.name}")
    figure.savefig(path, dpi=150)
