"""Time single steps of a prompt in each mode of the bench; ms, medians. Peers are idle, have a prompt alike, or are in a large step.

    python tests/step_times.py MODEL OUT_FOLDER [MODES] [TOKENS,...] [ENGINE_ARGUMENTS as JSON] [LAYERS]

MODEL is a folder with a config.json; weights are dummies. Engines as vLLM starts them, all modes loaded, one after the other
asked. An idle peer of expert parallelism has a prompt of one token. With a peer in a large step it is the time of rank 0's prompt
alone, which comes LARGE_HEAD_S after the peer's of the largest size; one engine of several GPUs gets its peers' prompts, too.
OUT_FOLDER gets steps.json and, as MODE-PEERS-TOKENS-RANK-NUMBER, traces of one step of each size with peers idle and alike. From
rank 0's is told how long its kernels took by class, exchanges with peers with the waits in them, how long copies did, and the span from
the first kernel to the last.
"""

import gzip
import itertools
import json
import random
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vllm_dwdp.entrypoints.bench.modes import Settings
from vllm_dwdp.entrypoints.bench.origin import cuda_devices, origin
from vllm_dwdp.entrypoints.bench.rank import Rank

from ranks_of_modes import LOAD_S, Mode

REPEATS, LARGE_HEAD_S = 12, 0.01
EP_REST_S = 0.25  # its ranks go on with up to 32 empty steps, beside which nothing is timed; a prompt in the last may wait for ever
TOKENS = "256,512,1024,2048,4096,8192"
CLASSES = {  # of kernels, by the first expression that is found in their names
    "exchanges": re.compile(r"^(dispatch_rows|combine_sums)\b|nccl", re.IGNORECASE),
    "norms, rotations": re.compile(r"^triton_(red|poi|per)_"),
    "attention": re.compile(r"flash|reshape_and_cache|fmha|varlen", re.IGNORECASE),
    "experts": re.compile(r"moe|act_and_mul|expert|marlin", re.IGNORECASE),
    "other matrices": re.compile(r"nvjet|gemm|cutlass|cublas", re.IGNORECASE),
    "the rest": re.compile(""),
}

Prompts = list[tuple[float, int]]  # seconds from now until each comes, and its tokens


def answerer(rank: Rank) -> Callable[[Prompts | str], list[float] | None]:
    return partial(answer, rank.llm, random.Random(0))


def answer(llm: Any, rng: random.Random, asked: Prompts | str) -> list[float] | None:
    """To prompts, the seconds from each one's time until its first token; a name is the LLM's method to call."""
    from vllm import SamplingParams

    if isinstance(asked, str):
        getattr(llm, asked)()
        return None
    engine = llm.llm_engine
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
    began, due, took = time.monotonic(), sorted(asked), {}
    while len(took) < len(asked):
        while due and time.monotonic() - began >= due[0][0]:
            prompt = {"prompt_token_ids": rng.choices(range(10, 250), k=due.pop(0)[1])}
            engine.add_request(str(len(asked) - len(due)), prompt, sampling)
        if engine.has_unfinished_requests():
            for output in engine.step():
                took[int(output.request_id)] = time.monotonic() - began
    return [took[number + 1] - wait_s for number, (wait_s, _) in enumerate(sorted(asked))]


class Timed(Mode):
    """All ranks of one mode, whose steps may be traced into a folder."""

    def __init__(self, settings: Settings, name: str, devices: list[str] | None, traces: Path):
        self.traces, self.ranks = traces, settings.num_gpus(name)
        super().__init__(settings, name, devices, answerer, lambda rank: {"profiler_config": {
            "profiler": "torch", "torch_profiler_dir": str(traces / str(rank)), "torch_profiler_with_stack": False
        }})

    def prompts(self, peers: str, tokens: int, large: int) -> list[Prompts]:
        """For each engine. Ranks of expert parallelism step together, and without a coordinator nobody wakes an idle one."""
        nothing: Prompts = [(0, 1)] if self.name.startswith("ep") else []
        of_rank_0, of_others = {
            "idle": ([(0, tokens)], nothing),
            "alike": ([(0, tokens)], [(0, tokens)]),
            "large": ([*nothing, (LARGE_HEAD_S, tokens)], [(0, large)]),
        }[peers]
        given = [of_rank_0, *[of_others] * (self.ranks - 1)]
        return given if len(given) == len(self.pipes) else [list(itertools.chain(*given))]

    def profile(self, peers: str, tokens: int) -> dict[str, Any]:
        """ms of rank 0's device for one step of a prompt."""
        self.ask("start_profile")
        self.ask(*self.prompts(peers, tokens, 0))
        self.ask("stop_profile")
        found = {rank: sorted(self.traces.glob(f"{rank}/**/*.json.gz")) for rank in range(self.ranks)}
        events = json.loads(gzip.decompress(found[0][0].read_bytes()))["traceEvents"] if found[0] else []  # of several workers, the first's
        for rank, paths in found.items():
            for number, path in enumerate(paths):
                path.rename(self.traces.with_name(f"{self.name}-{peers}-{tokens}-{rank}-{number}.json.gz"))
        kernels = [each for each in events if each.get("cat") == "kernel"]
        if not kernels:
            return {}
        classes_ms = dict.fromkeys(CLASSES, 0.0)
        for each in kernels:
            classes_ms[next(name for name, known in CLASSES.items() if known.search(each["name"]))] += each["dur"] / 1e3
        ends = max(each["ts"] + each["dur"] for each in kernels)
        return {
            "kernels": len(kernels), "classes_ms": classes_ms,
            "copies_ms": sum(each["dur"] for each in events if each.get("cat") == "gpu_memcpy") / 1e3,
            "span_ms": (ends - min(each["ts"] for each in kernels)) / 1e3,
        }


def main(model: str, out: Path, modes: str = "dwdp,ep", tokens: str = TOKENS, given: str = "{}", layers: str = "12") -> None:
    out.mkdir(parents=True, exist_ok=True)
    devices, sizes = cuda_devices(2), [int(count) for count in tokens.split(",")]
    settings = Settings.of({
        "model": model, "modes": tuple(modes.split(",")), "load_format": "dummy", "side_by_side": True, "input_len": max(sizes),
        "hf_overrides": {"num_hidden_layers": int(layers)} if devices else {},
        "engine_args": {"kv_cache_memory_bytes": (2 << 30) if devices else (64 << 20)} | ({} if devices else {"dtype": "float32"})
        | json.loads(given),
    })
    started, rows = [], []

    def write() -> None:
        made = origin(devices) | {"command": shlex.join(["python", *sys.argv]), "rows": rows}
        (out / "steps.json").write_text(json.dumps(made, indent=2))

    try:
        for name in settings.modes:
            started.append(Timed(settings, name, devices, out / f"traces-{name}"))
        for mode in started:
            mode.answers(LOAD_S)
        for count in sizes:
            times: dict[tuple[str, str], list[float]] = {}
            for turn in range(REPEATS + 2):
                for mode in started:
                    for peers in ("idle", "alike", "large")[: 3 if mode.ranks > 1 else 1]:
                        took = mode.ask(*mode.prompts(peers, count, max(sizes)))
                        time.sleep(EP_REST_S if mode.name.startswith("ep") else 0)
                        seconds = took[0][-1] if peers == "large" else max(itertools.chain(*took))
                        if turn > 1:
                            times.setdefault((mode.name, peers), []).append(1e3 * seconds)
            for (name, peers), found in times.items():
                rows.append({"tokens": count, "mode": name, "peers": peers, "ms": statistics.median(found), "all_ms": found})
                print(f"{count:>6} {name:>6}, peers {peers:<5} {rows[-1]['ms']:8.2f} ms", flush=True)
            write()
        for count, mode, peers in itertools.product(sizes, started, ("idle", "alike")):
            if peers == "idle" or mode.ranks > 1:
                write()
                rows.append({"tokens": count, "mode": mode.name, "peers": peers, **(seen := mode.profile(peers, count))})
                print(f"{count:>6} {mode.name:>6}, peers {peers}, traced: {json.dumps(seen)}", flush=True)
        write()
    finally:
        for mode in started:
            mode.end()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
