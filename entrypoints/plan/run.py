"""`vllm-dwdp plan`: its settings, and the plan of one model, GPU and group size."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from vllm_dwdp import config
from vllm_dwdp.budget import GIB
from vllm_dwdp.entrypoints.plan import calibrate, memory, model, rates, report
from vllm_dwdp.entrypoints.plan.roofline import Load, Step, step
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.placement import Placement

Positive = Annotated[int, Meta(gt=0)]
GRID, MOST_TOKENS = 64, 2**18  # of the search for the tokens a step from which something holds


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a person may ask for: every field but the model is an option of the command. `of` makes and checks one."""

    model: Annotated[str, Meta(description="a folder with config.json, or a name on the hub")]
    gpu: Annotated[str, Meta(description="h100, h200, b200, gb200, mi355x, or another of --rates")]
    size: Annotated[int, Meta(ge=2, description="ranks in the group, one GPU each")] = 2
    tokens: Annotated[
        tuple[Positive, ...], Meta(min_length=1, description="tokens a step; the largest sizes memory")
    ] = (4096, 8192, 16384, 32768)
    input_len: Annotated[Positive, Meta(description="longest prompt, in tokens; KV tokens are counted for these")] = 8192
    ratio: Annotated[
        float, Meta(gt=0, le=1, description="prompt lengths are uniform in [RATIO * INPUT_LEN, INPUT_LEN]")
    ] = 0.8
    imbalance: Annotated[
        float, Meta(ge=0, le=1e3, description="by how much the busiest rank's experts exceed the average's in expert "
                                      "parallelism, such as the 0.4 of the paper's breakdown; 0 is even routing")
    ] = 0.0
    slots: Annotated[int, Meta(ge=2, le=8, description="as --dwdp-slots")] = 2
    cache_gib: Annotated[float, Meta(ge=0, le=1e6, description="GiB of resident experts, as a number given to --dwdp-cache-gib")] = 0.0
    experts_per_rank: Annotated[Positive | None, Meta(description="as --dwdp-experts-per-rank")] = None
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1, description="as vLLM's")] = memory.UTILIZATION
    eager: Annotated[bool, Meta(description="rates of engines without torch.compile and CUDA graphs")] = False
    hf_overrides: Annotated[dict[str, Any], Meta(description="""JSON, such as {"num_hidden_layers": 12}""")] = {}
    rates: Annotated[str | None, Meta(description="file of rates instead of the measured ones")] = None
    calibrate: Annotated[
        tuple[str, ...], Meta(description="bench.json files on this GPU to which rates are refitted")
    ] = ()
    save_rates: Annotated[str | None, Meta(description="file for the refitted rates, which --rates takes")] = None
    plot: Annotated[str | None, Meta(description="picture of throughput and of copies, such as plan.png")] = None

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Settings":
        """From option values, numbers as text or not. Raises DWDPError for what cannot be."""
        self = config.read(cls, given, config.flag, strict=False)
        if self.plot and not importlib.util.find_spec("matplotlib"):
            raise DWDPError("--plot needs matplotlib: pip install 'vllm-dwdp[bench]'")
        if self.plot and Path(self.plot).suffix[1:] not in (kinds := report.pictures()):
            raise DWDPError(f"--plot is {self.plot}: its ending must be one of {', '.join(kinds)}")
        for option, path in (("--plot", self.plot), ("--save-rates", self.save_rates)):
            if path:
                refuse_unwritable(option, Path(path))
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One model on one kind of GPU in groups of one size."""

    model: model.Model
    gpu: rates.Gpu
    rates: rates.Rates
    process_bytes: float
    settings: Settings

    @property
    def placement(self) -> Placement:
        return Placement(
            num_experts=self.model.num_experts, size=self.settings.size, experts_per_rank=self.settings.experts_per_rank
        )

    def held(self) -> dict[str, memory.Held]:
        """What a rank holds in each mode, at the largest number of tokens a step."""
        asked, tokens = self.settings, max(self.settings.tokens)
        return {
            "dwdp": memory.dwdp(
                self.model, self.placement, slots=asked.slots, cache_gib=asked.cache_gib, tokens=tokens
            ),
            "ep": memory.expert_parallel(self.model, asked.size, tokens),
            "single": memory.expert_parallel(self.model, 1, tokens),
        }

    def kv_tokens(self, held: memory.Held) -> int:
        return memory.kv_tokens(
            self.model, held, memory_bytes=self.gpu.memory_gib * GIB, process_bytes=self.process_bytes,
            utilization=self.settings.gpu_memory_utilization, length=self.settings.input_len, tokens=max(self.settings.tokens),
        )

    def steps(self) -> Callable[[int], Step]:
        """Steps by their number of tokens."""
        asked, streamed = self.settings, self.held()["dwdp"].streamed
        return lambda tokens: step(
            self.model, self.gpu, self.rates, size=asked.size, streamed_bytes=streamed,
            load=Load(tokens=tokens, input_len=asked.input_len, ratio=asked.ratio, imbalance=asked.imbalance),
        )


def run(settings: Settings) -> int:
    """Print the plan, write what was asked for; returns the command's exit status."""
    table = rates.read(settings.rates)
    if (gpu := settings.gpu if settings.gpu in table.gpus else settings.gpu.lower()) not in table.gpus:
        raise DWDPError(f"--gpu is {settings.gpu}, which is none of {', '.join(table.gpus)}")
    described = model.load(settings.model, settings.hf_overrides)
    if settings.calibrate:
        table = calibrate.calibrated(table, settings.calibrate, gpu, settings.model)
    plan = Plan(
        model=described, gpu=table.gpus[gpu], settings=settings, process_bytes=table.process_gib * GIB,
        rates=table.rates["eager" if settings.eager else "compiled"],
    )
    steps = plan.steps()
    hidden_from = first(lambda tokens: steps(tokens).exposed == 0)
    wins_from = first(lambda tokens: steps(tokens).dwdp < steps(tokens).ep)
    print(report.text(plan, steps, hidden_from=hidden_from, wins_from=wins_from, source=table.source))
    if settings.save_rates:
        Path(settings.save_rates).write_bytes(msgspec.json.format(msgspec.json.encode(table), indent=2))
        print(f"{settings.save_rates} written")
    if settings.plot:
        report.plot(plan, steps, hidden_from=hidden_from, wins_from=wins_from, path=Path(settings.plot))
        print(f"{settings.plot} written")
    return 0


def refuse_unwritable(option: str, path: Path) -> None:
    """Raises DWDPError unless a file can be written there. Leaves none behind."""
    is_new = not path.exists()
    try:
        path.open("ab").close()
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        raise DWDPError(f"{option} is {path}, which cannot be written: {getattr(error, 'strerror', error)}") from None
    if is_new:
        path.unlink()


def first(holds: Callable[[int], bool]) -> int | None:
    """The tokens a step from which `holds` stays true, or None. It may be true for the smallest steps and then not."""
    grid = [GRID * 2**n for n in range((MOST_TOKENS // GRID).bit_length())]
    if not holds(grid[-1]):
        return None
    low = max((tokens for tokens in grid if not holds(tokens)), default=0)
    high = 2 * low or GRID
    while high - low > GRID:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
