"""What a benchmark runs: its settings, and each mode's ranks, devices and engine arguments. Pure."""

import re
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from vllm_dwdp import config
from vllm_dwdp.channel import together
from vllm_dwdp.entrypoints.bench.rank import PROBE
from vllm_dwdp.entrypoints.plugin import scalar
from vllm_dwdp.errors import DWDPError

OWN_ARGUMENTS = frozenset({
    "model", "tensor_parallel_size", "data_parallel_size", "enable_expert_parallel", "max_num_batched_tokens",
    "all2all_backend", "additional_config", "worker_extension_cls", "enforce_eager",
})
DECODE_DEFAULTS = {"input_len": 128, "output_len": 256}

Positive = Annotated[int, Meta(gt=0)]
MODE = re.compile(r"(dwdp|ep)(\+\w+=[^+]+)*|tp|single")
SPELLINGS = {"dwdp": "dwdp, dwdp+OPTION=VALUE", "ep": "ep, ep+ARGUMENT=VALUE"}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a person may ask for: every field is an option of the command. `of` makes and checks one."""

    model: Annotated[str, Meta(description="name or folder; a config.json suffices with --load-format dummy")]
    size: Annotated[Positive, Meta(description="GPUs, and ranks of dwdp and ep")] = 2
    modes: Annotated[
        tuple[str, ...],
        Meta(min_length=1, description="which modes, in which order; dwdp may carry options of its own and ep vLLM's "
                                       "arguments, as in dwdp+cache_gib=4+slots=3 and ep+all2all_backend=NAME"),
    ] = ("dwdp", "ep", "tp", "single")
    decode: Annotated[
        tuple[Positive, ...],
        Meta(description="measure decode steps instead of prefill, at these batch sizes per GPU, such as 1,4,16,64; "
                         "then --input-len is 128 and --output-len 256, if not given"),
    ] = ()
    input_len: Annotated[Positive, Meta(description="longest prompt, in tokens")] = 8192
    ratio: Annotated[
        float, Meta(gt=0, le=1, description="prompt lengths are uniform in [RATIO * INPUT_LEN, INPUT_LEN]")
    ] = 0.8
    num_prompts: Annotated[Positive, Meta(description="prompts per GPU, for prefill")] = 24
    uneven: Annotated[
        float, Meta(ge=1, le=1e3, description="rank 0 gets UNEVEN times the prompts of the others, for prefill")
    ] = 1.0
    max_num_batched_tokens: Annotated[
        tuple[Positive, ...], Meta(min_length=1, description="tokens a step; a list measures each")
    ] = (16384,)
    output_len: Annotated[
        Positive, Meta(description="tokens generated for each prompt; 1 measures prefill alone")
    ] = 1
    rounds: Annotated[Positive, Meta(description="times that the modes are gone through")] = 2
    repeats: Annotated[Positive, Meta(description="measurements in each turn of a mode")] = 3
    side_by_side: Annotated[
        bool, Meta(description="keep all modes loaded and alternate without reloading; needs a small model. With "
                               "kv_cache_memory_bytes in --engine-args they also load at the same time")
    ] = False
    gpu_memory_utilization: Annotated[
        float, Meta(gt=0, le=1, description="share of each GPU's memory, which modes side by side divide")
    ] = 0.9
    hf_overrides: Annotated[dict[str, Any], Meta(description="""JSON, such as {"num_hidden_layers": 12}""")] = {}
    load_format: Annotated[str, Meta(description="as vLLM's")] = "auto"
    eager: Annotated[bool, Meta(description="engines without torch.compile and CUDA graphs, not as vLLM starts them")] = False
    engine_args: Annotated[dict[str, Any], Meta(description="JSON, merged into every engine's arguments")] = {}
    dwdp: Annotated[dict[str, Any], Meta(description="""JSON of DWDP options, such as {"slots": 3}""")] = {}
    timeout: Annotated[
        float, Meta(gt=0, le=1e6, description="seconds that a mode may take to load, warm up or run once")
    ] = 900.0
    out: Annotated[str, Meta(description="folder for bench.json or serving.json, a picture and logs/")] = "./dwdp-bench"

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Settings":
        """From option values, numbers as text or not. Raises DWDPError for what cannot be."""
        given = (DECODE_DEFAULTS if given.get("decode") else {}) | given
        self = config.read(cls, given, config.flag, strict=False)
        refuse_misspelt(self.modes, ("dwdp", "ep", "tp", "single"))
        if self.size < 2 and set(self.modes) != {"single"}:
            raise DWDPError(f"--size is {self.size}: every mode but single needs at least 2")
        if own := {"size", "rank", "timing"} & {*self.dwdp, *(name for mode in filter(is_dwdp, self.modes) for name in own_options(mode))}:
            raise DWDPError(f"a mode of dwdp sets {', '.join(sorted(own))}, which the bench sets itself: leave it out")
        if taken := OWN_ARGUMENTS.intersection(self.engine_args):
            raise DWDPError(f"--engine-args sets {', '.join(sorted(taken))}, which the modes set themselves")
        for name in ("kv_cache_memory_bytes", "gpu_memory_utilization"):
            if not isinstance(value := self.engine_args.get(name), int | float | None):
                raise DWDPError(f"{name} in --engine-args is {value!r}: it must be a number")
        if self.decode and (self.output_len < 2 or len(self.max_num_batched_tokens) > 1):
            raise DWDPError("--decode needs an --output-len above 1 and one --max-num-batched-tokens")
        if self.decode and self.uneven != 1:
            raise DWDPError("--uneven is for prefill: leave out --decode")
        if max(self.decode, default=0) * self.input_len > self.max_num_batched_tokens[0]:
            raise DWDPError(
                f"{max(self.decode)} prompts of {self.input_len} tokens do not fit one step, so they would not decode "
                f"together: raise --max-num-batched-tokens or lower --input-len"
            )
        config.parse({config.KEY: self.dwdp}, lambda name: f"{name} in --dwdp")
        for mode in filter(is_dwdp, self.modes):
            config.parse({config.KEY: own_options(mode)}, lambda name: f"{name} in --modes")
        return self

    @property
    def load_together(self) -> bool:
        """vLLM sizes a KV cache by what is free before and after, which engines that load beside it would falsify."""
        return self.side_by_side and "kv_cache_memory_bytes" in self.engine_args

    def dwdp_options(self, mode: str, rank: int) -> dict[str, Any]:
        own = own_options(mode) if is_dwdp(mode) else {}
        return self.dwdp | own | {"timing": True, "size": max(self.size, 2), "rank": rank}

    def num_gpus(self, mode: str) -> int:
        return 1 if mode == "single" else self.size

    def gpus_at_work(self, mode: str) -> float:
        """Among which a mode's throughput is shared: of single, which has rank 0's prompts, as if replicas had the others'."""
        most = round(self.uneven * self.num_prompts)
        return self.size * most / (most + (self.size - 1) * self.num_prompts) if mode == "single" else self.size

    def memory_share(self, mode: str) -> float:
        """Of each GPU's memory. Side by side, single gets twice what others get: it holds all experts, not a part."""
        parts = {each: 2 if each == "single" else 1 for each in self.modes}
        return self.gpu_memory_utilization * (parts[mode] / sum(parts.values()) if self.side_by_side else 1)


def is_dwdp(mode: str) -> bool:
    return kind(mode) == "dwdp"


def kind(mode: str) -> str:
    """dwdp, ep, tp or single."""
    return mode.split("+")[0]


def own_options(mode: str) -> dict[str, Any]:
    """The options that a mode carries after its kind. Several values of one are a list, with spaces between them."""
    given = (option.split("=", 1) for option in mode.split("+")[1:])
    known = {"true": True, "false": False}
    return {
        name: [scalar(each) for each in value.split()] if " " in value else known.get(value, scalar(value)) for name, value in given
    }


def short(mode: str) -> str:
    """A mode in tables, pictures and names of files: of several values of an argument the first and the last."""
    return re.sub(r"=([^ +]+) [^+]*?([^ +]+)(?=\+|$)", r"=\1..\2", mode).replace("/", "-")


def refuse_misspelt(modes: Sequence[str], kinds: Sequence[str]) -> None:
    """Raises DWDPError for a mode that is none of these kinds, and for two that look alike."""
    for mode in modes:
        if not MODE.fullmatch(mode) or kind(mode) not in kinds:
            known = ", ".join(SPELLINGS.get(each, each) for each in kinds)
            raise DWDPError(f"--modes has {mode}, which is none of {known}")
        if alike := [other for other in modes if other != mode and short(other) == short(mode)]:
            raise DWDPError(f"--modes has {mode} and {alike[0]}, which no table could tell apart: leave one out")


def visible_devices(mode: str, devices: Sequence[str] | None, size: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each rank, None on CPU: all but single see all GPUs, DWDP's ranks their own first."""
    num_ranks = size if kind(mode) in ("ep", "dwdp") else 1
    if devices is None:
        return [None] * num_ranks
    if mode == "single":
        return [devices[0]]
    first = range(num_ranks) if is_dwdp(mode) else [0] * num_ranks
    return [",".join([*devices[own:], *devices[:own]]) for own in first]


def load_arguments(settings: Settings, mode: str, tokens: int, port: int) -> list[dict[str, Any]]:
    """What each rank of a mode loads (see rank.py). `port` is where those of expert parallelism meet, free on this host.

    Offline, vLLM gives a worker process beside the engine core to ranks of expert parallelism (VLLM_DP_SIZE) alone;
    `vllm serve --data-parallel-size N` gives one to DWDP's ranks too, so they have it here.
    """
    ranks = range(settings.size)
    common = {
        "load_format": settings.load_format,
        "enforce_eager": settings.eager,
        "hf_overrides": settings.hf_overrides,
        "gpu_memory_utilization": settings.memory_share(mode),
        "max_model_len": settings.input_len + settings.output_len,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
    }
    if settings.decode:
        common["max_num_seqs"] = max(settings.decode) * settings.size

    def load(own: dict[str, Any], ranks: Sequence[int], environment: dict[str, str]) -> dict[str, Any]:
        engine = common | settings.engine_args | {"model": settings.model, "max_num_batched_tokens": tokens} | own
        return {
            "environment": environment, "engine": engine, "ranks": list(ranks), "input_len": settings.input_len,
            "ratio": settings.ratio, "uneven": settings.uneven, "num_prompts": max(settings.decode, default=settings.num_prompts),
        }

    stock = {"worker_extension_cls": PROBE}
    match kind(mode):
        case "ep":
            stock |= {"enable_expert_parallel": True} | own_options(mode)
            group = {
                "VLLM_DP_SIZE": str(settings.size), "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": str(port)
            }
            own = [group | {"VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank)} for rank in ranks]
            return [load(stock, [rank], own[rank]) for rank in ranks]
        case "tp":
            return [load(stock | {"tensor_parallel_size": settings.size}, ranks, {})]
        case "single":
            return [load(stock, [0], {})]
        case _:
            options, group = [settings.dwdp_options(mode, rank) for rank in ranks], together()
            process = {"distributed_executor_backend": "mp"} | settings.engine_args
            return [load(process | {"additional_config": {config.KEY: options[rank]}}, [rank], group) for rank in ranks]
