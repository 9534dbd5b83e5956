"""Rates: peaks of each GPU and the parts of them that were measured, from one file; of each kind of engine."""

import importlib.resources
from pathlib import Path

import msgspec

from vllm_dwdp.errors import DWDPError

SHIPPED = "rates.json"


class Gpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Peaks of one GPU as its maker gives them, without sparsity; the link's is of one direction, to one peer."""

    memory_gib: float
    hbm_gb_per_s: float
    link_gb_per_s: float
    tflops: dict[str, float]

    def peak(self, compute: str) -> float:
        """FLOP/s; those of bf16 where the GPU lacks the arithmetic, as weights are then expanded."""
        return 1e12 * self.tflops.get(compute, self.tflops["bf16"])


class Rates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parts of the peaks that kernels and links reach, and what they do not cover.

    `dense`, `attention` and `experts` are of FLOP/s, `memory` of HBM, `link` and `all2all` of the link. `interference`
    is the part of a copy's time by which kernels beside it slow down. `layer_us` is what a layer of expert parallelism
    costs beside its bytes; `step_ms` a step of any kind beside its layers.
    """

    dense: float
    attention: float
    experts: float
    memory: float
    link: float
    interference: float
    all2all: float
    layer_us: float
    step_ms: float

    def scaled(self, compute: float) -> "Rates":
        """With every kernel so many times as fast."""
        names = ("dense", "attention", "experts", "memory")
        return msgspec.structs.replace(self, **{name: getattr(self, name) * compute for name in names})


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file: GPUs by name, rates of compiled and of eager engines, bytes of a process beside its tensors."""

    source: str
    process_gib: float
    gpus: dict[str, Gpu]
    rates: dict[str, Rates]


def read(path: str | None) -> Table:
    """The file at `path`, or the one shipped. Raises DWDPError for what is no such file."""
    try:
        if path:
            return msgspec.json.decode(Path(path).read_bytes(), type=Table)
        return msgspec.json.decode(importlib.resources.files(__package__).joinpath(SHIPPED).read_bytes(), type=Table)
    except (OSError, msgspec.MsgspecError) as error:
        raise DWDPError(f"--rates: cannot read {path}: {error}") from None
