"""Roofline: how long a step takes on one rank alone, in DWDP and in expert parallelism. Pure arithmetic.

Every operation takes max(FLOPs / peak, bytes / bandwidth), each at the part of the peak that was measured:

    DWDP    per layer   max(compute + interference * prefetch, prefetch)     no rank waits for another
    EP      per layer   compute + all-to-all + waiting for the slowest rank
    single  per layer   compute                                              a full replica, no communication
"""

import dataclasses
import math
from statistics import NormalDist

from vllm_dwdp.entrypoints.plan.model import Model
from vllm_dwdp.entrypoints.plan.rates import Gpu, Rates

ELEMENT_BYTES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What every rank computes in a step: `tokens` of prompts whose lengths are uniform in [ratio, 1] * input_len.

    `imbalance` is how much longer the busiest rank's experts take than an average rank's, in parts of the latter.
    """

    tokens: int
    input_len: int
    ratio: float = 1.0
    imbalance: float = 0.0

    @property
    def context(self) -> float:
        """Tokens that a prompt's token attends to, on average."""
        return self.input_len * (1 + self.ratio + self.ratio**2) / 3 / (1 + self.ratio)

    @property
    def spread(self) -> float:
        """Standard deviation of a rank's attention work, in parts of its mean: that of the prompts it has in a step."""
        return (1 - self.ratio) / (1 + self.ratio) / math.sqrt(3 * max(self.tokens / self.input_len, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """Seconds of one rank's step by kind of kernel."""

    attention: float
    dense: float
    experts: float
    other: float

    @property
    def total(self) -> float:
        return self.attention + self.dense + self.experts + self.other


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of a step. `prefetch` is all copies', hidden or not; `exposed` the part of it that is waited for."""

    compute: Compute
    prefetch: float
    exposed: float
    all2all: float
    waiting: float
    dwdp: float
    ep: float
    single: float


def compute(model: Model, gpu: Gpu, rates: Rates, load: Load, ranks: int = 1) -> Compute:
    """With `ranks`, each reads only so large a part of the experts, but computes as many tokens."""
    bandwidth = 1e9 * gpu.hbm_gb_per_s * rates.memory
    tokens = load.tokens

    def roofline(flops: float, nbytes: float, kind: str, part: float) -> float:
        return max(flops / (gpu.peak(kind) * part), nbytes / bandwidth)

    dense = attention = 0.0
    for window, parts in zip(model.windows, model.linears, strict=True):
        dense += sum(roofline(2 * tokens * part.weights, part.nbytes, part.compute, rates.dense) for part in parts)
        flops = 2 * tokens * seen(load.context, window) * (model.qk_dim + model.v_dim)
        attention += roofline(flops, tokens * 2 * (model.qk_dim + model.v_dim) * ELEMENT_BYTES, "bf16", rates.attention)
    routed = tokens * model.top_k
    touched = model.num_experts * (1 - (1 - model.top_k / model.num_experts) ** (tokens * ranks))
    nbytes = touched / ranks * sum(model.expert_bytes)
    experts = roofline(2 * routed * model.expert_weights, nbytes, model.format.compute, rates.experts)
    # What the other kernels read and write: norms and residuals, queries and values, activation and sum of the experts.
    elements = len(model.windows) * (8 * model.hidden + 2 * (model.qk_dim + model.v_dim))
    elements += model.num_moe_layers * model.top_k * (6 * model.expert_width + 2 * model.hidden)
    return Compute(
        attention=attention, dense=dense, experts=experts * model.num_moe_layers,
        other=tokens * elements * ELEMENT_BYTES / bandwidth,
    )


def seen(context: float, window: int | None) -> float:
    """Tokens in sight of a causal window, on average, where `context` are without one."""
    length = 2 * context
    return context if window is None or window >= length else window * (1 - window / 2 / length)


def step(model: Model, gpu: Gpu, rates: Rates, load: Load, *, size: int, streamed_bytes: float) -> Step:
    """One step of every mode. `streamed_bytes` are what a DWDP rank fetches in it."""
    alone = compute(model, gpu, rates, load)
    shared = compute(model, gpu, rates, load, ranks=size)
    fixed, prefetch = rates.step_ms / 1e3, streamed_bytes / (1e9 * gpu.link_gb_per_s * rates.link)
    slowed = alone.total + rates.interference * min(prefetch, alone.total)
    # Hidden states go to the peers that own one of their experts, partial sums come back. An allgather moves more.
    copies = (size - 1) * (1 - (1 - 1 / size) ** model.top_k)
    sent = 2 * copies * load.tokens * model.hidden * ELEMENT_BYTES
    all2all = model.num_moe_layers * (sent / (gpu.to_peers(max(size - 1, 1)) * rates.all2all) + rates.layer_us / 1e6)
    waiting = load.imbalance * shared.experts + slowest(size) * load.spread * shared.attention
    return Step(
        compute=alone, prefetch=prefetch, exposed=max(prefetch - slowed, 0.0), all2all=all2all, waiting=waiting,
        dwdp=fixed + max(slowed, prefetch), ep=fixed + shared.total + all2all + waiting, single=fixed + alone.total,
    )


def slowest(size: int) -> float:
    """By how many standard deviations the slowest of `size` equal ranks exceeds their mean, on average (Blom)."""
    return NormalDist().inv_cdf((size - 0.375) / (size + 0.25))


def contention(size: int) -> list[float]:
    """Chances that 1, 2, ... ranks pull from one source at once: the others choose theirs at random."""
    others, chance = size - 2, 1 / (size - 1)
    return [math.comb(others, n) * chance**n * (1 - chance) ** (others - n) for n in range(others + 1)]
