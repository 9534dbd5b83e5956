"""What a benchmark runs: its settings, and each mode's ranks, devices and engine arguments. Pure."""

from collections.abc import Sequence
from typing import Any

import msgspec

from vllm_dwdp import config
from vllm_dwdp.entrypoints.bench_rank import PROBE, Load, PromptSet
from vllm_dwdp.entrypoints.bench_report import Case
from vllm_dwdp.errors import DWDPError

MODES = ("dwdp", "ep", "tp", "single")
OWN_ARGUMENTS = frozenset({
    "model", "tensor_parallel_size", "data_parallel_size", "enable_expert_parallel", "max_num_batched_tokens",
    "additional_config", "worker_extension_cls",
})


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a person asked for; cli.py says what each option means. Raises DWDPError for what cannot be."""

    model: str
    size: int
    modes: tuple[str, ...]
    input_len: int
    ratio: float
    num_prompts: int
    max_num_batched_tokens: tuple[int, ...]
    decode: tuple[int, ...]
    output_len: int
    rounds: int
    repeats: int
    side_by_side: bool
    gpu_memory_utilization: float
    hf_overrides: dict[str, Any]
    dtype: str
    load_format: str
    eager: bool
    engine_args: dict[str, Any]
    dwdp: dict[str, Any]
    timeout: float
    out: str

    def __post_init__(self) -> None:
        for name in ("size", "input_len", "num_prompts", "output_len", "rounds", "repeats", "timeout"):
            if getattr(self, name) <= 0:
                raise DWDPError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be above 0")
        if min(self.max_num_batched_tokens, default=0) <= 0 or min(self.decode, default=1) <= 0:
            raise DWDPError("--max-num-batched-tokens and --decode must name numbers above 0")
        if self.decode and self.output_len < 2:
            raise DWDPError("--output-len is 1: --decode needs at least 2, the first token being prefill's")
        if not 0 < self.ratio <= 1:
            raise DWDPError(f"--ratio is {self.ratio}: it must be above 0 and at most 1")
        for name in ("modes", "max_num_batched_tokens", "decode"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise DWDPError(f"--{name.replace('_', '-')} names a value twice")
        if not self.modes or not set(self.modes) <= set(MODES):
            raise DWDPError(f"--modes is '{','.join(self.modes)}': known modes are {', '.join(MODES)}")
        if self.size < 2 and set(self.modes) != {"single"}:
            raise DWDPError(f"--size is {self.size}: every mode but single needs at least 2")
        if taken := OWN_ARGUMENTS.intersection(self.engine_args):
            raise DWDPError(f"--engine-args sets {', '.join(sorted(taken))}, which the modes set themselves")
        if "dwdp" in self.modes:
            config.parse({config.KEY: dwdp_options(self, rank=0, port=1)})

    def num_gpus(self, mode: str) -> int:
        return 1 if mode == "single" else self.size

    def cases(self, max_num_batched_tokens: int) -> list[Case]:
        """What is measured of one engine: its prefill, or decode steps of every batch size."""
        return [
            Case(max_num_batched_tokens=max_num_batched_tokens, batch=batch) for batch in self.decode or (None,)
        ]

    def prompts(self, ranks: Sequence[int]) -> PromptSet:
        return PromptSet(
            ranks=tuple(ranks), num_prompts=self.num_prompts, input_len=self.input_len, ratio=self.ratio
        )


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One start of one mode."""

    max_num_batched_tokens: int
    round: int
    mode: str

    @property
    def name(self) -> str:
        return f"{self.max_num_batched_tokens}-{self.mode}-round{self.round}"


def turns(settings: Settings) -> list[Turn]:
    """A B A B: within one number of batched tokens, each round goes through all modes."""
    return [
        Turn(max_num_batched_tokens=tokens, round=round, mode=mode)
        for tokens in settings.max_num_batched_tokens
        for round in range(1, settings.rounds + 1)
        for mode in settings.modes
    ]


def visible_devices(mode: str, devices: Sequence[str] | None, size: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each rank: its own GPU, or all of them where vLLM itself spreads ranks; None on CPU."""
    num_ranks = size if mode in ("dwdp", "ep") else 1
    if devices is None:
        return [None] * num_ranks
    return list(devices[:num_ranks]) if mode in ("dwdp", "single") else [",".join(devices)] * num_ranks


def dwdp_options(settings: Settings, *, rank: int, port: int) -> dict[str, Any]:
    """What `additional_config` carries to one rank."""
    own = {"size": settings.size, "rank": rank, "rendezvous": f"127.0.0.1:{port}"}
    return {"timing": True} | settings.dwdp | own


def load_commands(settings: Settings, turn: Turn, port: int) -> list[Load]:
    """One command a rank. `port` is where its ranks meet, free on this host."""
    share = len(settings.modes) if settings.side_by_side else 1
    common = {
        "model": settings.model,
        "dtype": settings.dtype,
        "load_format": settings.load_format,
        "enforce_eager": settings.eager,
        "hf_overrides": settings.hf_overrides,
        "gpu_memory_utilization": settings.gpu_memory_utilization / share,
        "max_model_len": settings.input_len + settings.output_len,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
    }

    def load(engine: dict[str, Any], ranks: Sequence[int], environment: dict[str, str]) -> Load:
        own = engine | {"max_num_batched_tokens": turn.max_num_batched_tokens}
        return Load(
            environment=environment, engine=common | settings.engine_args | own, prompts=settings.prompts(ranks)
        )

    every = range(settings.size)
    stock = {"worker_extension_cls": PROBE}
    match turn.mode:
        case "dwdp":
            options = [dwdp_options(settings, rank=rank, port=port) for rank in every]
            return [load({"additional_config": {config.KEY: options[rank]}}, [rank], {}) for rank in every]
        case "ep":
            group = {
                "VLLM_DP_SIZE": str(settings.size), "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": str(port)
            }
            own = [group | {"VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank)} for rank in every]
            return [load(stock | {"enable_expert_parallel": True}, [rank], own[rank]) for rank in every]
        case "tp":
            return [load(stock | {"tensor_parallel_size": settings.size}, every, {})]
        case _:
            return [load(stock, [0], {})]
