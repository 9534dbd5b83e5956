"""Rates: peaks of each GPU and the parts of them that were measured, from one file; of each kind of engine."""

import importlib.resources
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from vllm_dwdp.errors import DWDPError

SHIPPED = "rates.json"
KINDS = ("compiled", "eager")
Positive = Annotated[float, Meta(gt=0)]
AnyCost = Annotated[float, Meta(ge=0)]


class Gpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Peaks of one GPU as its maker gives them, without sparsity; the link's is of one direction, to one peer.

    `links_gb_per_s` is that of all links together, None where one has it all, as behind a switch.
    """

    memory_gib: Positive
    hbm_gb_per_s: Positive
    link_gb_per_s: Positive
    links_gb_per_s: Positive | None = None
    has_cuda: bool = True
    tflops: dict[str, Positive]

    def __post_init__(self) -> None:
        if "bf16" not in self.tflops:
            raise ValueError("tflops lack bf16")

    def to_peers(self, number: int) -> float:
        """Bytes/s to so many peers at once."""
        return 1e9 * min(number * self.link_gb_per_s, self.links_gb_per_s or self.link_gb_per_s)

    def peak(self, compute: str) -> float:
        """FLOP/s; those of bf16 where the GPU lacks the arithmetic, as weights are then expanded."""
        return 1e12 * self.tflops.get(compute, self.tflops["bf16"])


class Rates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parts of the peaks that kernels and links reach, and what they do not cover.

    `dense`, `attention` and `experts` are of FLOP/s, `memory` of HBM, `link` and `all2all` of the link. `interference`
    is the part of a copy's time by which kernels beside it slow down. `layer_us` is what a layer of expert parallelism
    costs beside its bytes; `step_ms` a step of any kind beside its layers.
    """

    dense: Positive
    attention: Positive
    experts: Positive
    memory: Positive
    link: Positive
    interference: AnyCost
    all2all: Positive
    layer_us: AnyCost
    step_ms: AnyCost

    def scaled(self, compute: float) -> "Rates":
        """With every kernel so many times as fast."""
        names = ("dense", "attention", "experts", "memory")
        return msgspec.structs.replace(self, **{name: getattr(self, name) * compute for name in names})


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file: GPUs by name, rates of compiled and of eager engines, bytes of a process beside its tensors."""

    source: str
    process_gib: AnyCost
    gpus: dict[str, Gpu]
    rates: dict[str, Rates]

    def __post_init__(self) -> None:
        if missing := set(KINDS) - self.rates.keys():
            raise ValueError(f"rates lack {', '.join(sorted(missing))}")


def read(path: str | None) -> Table:
    """The file at `path`, or the one shipped. Raises DWDPError for what is no such file."""
    try:
        if path:
            return msgspec.json.decode(Path(path).read_bytes(), type=Table)
        return msgspec.json.decode(importlib.resources.files(__package__).joinpath(SHIPPED).read_bytes(), type=Table)
    except (OSError, msgspec.MsgspecError) as error:
        raise DWDPError(f"--rates: cannot read {path}: {error}") from None
