"""Time single steps of a prompt in each mode of the bench: peers idle, and peers with a prompt alike; ms, medians.

    python tests/step_times.py MODEL OUT_FOLDER [MODES] [TOKENS,...] [ENGINE_ARGUMENTS as JSON]

MODEL is a folder with a config.json; weights are dummies. Engines as vLLM starts them, all modes loaded, one after the other
asked. An idle peer of stock ranks has a prompt of one token. OUT_FOLDER gets steps.json and, by mode, a trace of one step of
each size on rank 0, from which is told how long its kernels took, exchanges with peers, waits included, apart, how long
copies did, and the span from the first kernel to the last.
"""

import contextlib
import gzip
import itertools
import json
import multiprocessing
import os
import random
import re
import shlex
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_dwdp.channel import free_port
from vllm_dwdp.entrypoints.bench.modes import Settings, load_arguments, visible_devices
from vllm_dwdp.entrypoints.bench.origin import cuda_devices, origin
from vllm_dwdp.entrypoints.bench.rank import Rank
from vllm_dwdp.entrypoints.server import kill_session

LAYERS, REPEATS = 24, 12
TOKENS = "256,512,1024,2048,4096,8192"
LOAD_S, ASK_S, END_S = 200, 60, 10
EXCHANGES = re.compile(r"^(dispatch_rows|combine_sums)\b|nccl", re.IGNORECASE)


def serve(keywords: dict[str, Any], devices: str | None, pipe: Connection) -> None:
    """A rank. Asked for a prompt's length, 0 for none, it answers with the seconds until the first token."""
    os.setsid()
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    rank = Rank()
    rank.load(**keywords)
    pipe.send("ready")
    from vllm import SamplingParams

    engine, number, rng = rank.llm.llm_engine, 0, random.Random(0)
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
    with contextlib.suppress(EOFError, OSError):
        while (asked := pipe.recv()) is not None:
            if isinstance(asked, str):
                getattr(rank.llm, asked)()
                pipe.send(None)
                continue
            began = time.monotonic()
            if asked:
                prompt = {"prompt_token_ids": rng.choices(range(10, 250), k=asked)}
                engine.add_request(str(number := number + 1), prompt, sampling)
            while engine.has_unfinished_requests():
                engine.step()
            pipe.send(time.monotonic() - began)
    kill_session(os.getsid(0))


class Mode:
    """All ranks of one mode."""

    def __init__(self, settings: Settings, name: str, devices: list[str] | None, traces: Path):
        self.name, self.traces, self.pipes, self.processes = name, traces, [], []
        self.idle = 0 if name.startswith("dwdp") else 1  # ranks in lockstep: without a coordinator nobody wakes one for a step
        context = multiprocessing.get_context("spawn")
        seen = visible_devices(name, devices, settings.size)
        for rank, keywords in enumerate(load_arguments(settings, name, settings.input_len, free_port())):
            keywords["engine"]["profiler_config"] = {
                "profiler": "torch", "torch_profiler_dir": str(traces / str(rank)), "torch_profiler_with_stack": False
            }
            pipe, child = context.Pipe()
            self.processes.append(context.Process(target=serve, args=(keywords, seen[rank], child)))
            self.processes[-1].start()
            child.close()
            self.pipes.append(pipe)

    def ask(self, *asked: Any, timeout_s: float = ASK_S) -> list[Any]:
        """What each rank answers: to the request of its place, or all to the one."""
        for pipe, request in zip(self.pipes, asked * (len(self.pipes) if len(asked) == 1 else 1), strict=True):
            pipe.send(request)
        return self.answers(timeout_s)

    def answers(self, timeout_s: float) -> list[Any]:
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(timeout_s), f"{self.name}: rank {rank} did not answer within {timeout_s} s"
        return [pipe.recv() for pipe in self.pipes]

    def profile(self, tokens: int) -> dict[str, float]:
        """ms of rank 0's device for one step of a prompt while its peers are idle."""
        self.ask("start_profile")
        self.ask(tokens, *[self.idle] * (len(self.pipes) - 1))
        self.ask("stop_profile")
        found = sorted(self.traces.glob("0/**/*.json.gz"))  # of several workers of a rank, the first's
        events = json.loads(gzip.decompress(found[0].read_bytes()))["traceEvents"] if found else []
        for number, path in enumerate(found):
            path.rename(self.traces.with_name(f"{self.name}-{tokens}-{number}.json.gz"))
        kernels = [each for each in events if each.get("cat") == "kernel"]
        if not kernels:
            return {}
        exchanges_ms = sum(each["dur"] for each in kernels if EXCHANGES.search(each["name"])) / 1e3
        ends = max(each["ts"] + each["dur"] for each in kernels)
        return {
            "kernels": len(kernels), "kernels_ms": sum(each["dur"] for each in kernels) / 1e3 - exchanges_ms,
            "exchanges_ms": exchanges_ms,
            "copies_ms": sum(each["dur"] for each in events if each.get("cat") == "gpu_memcpy") / 1e3,
            "span_ms": (ends - min(each["ts"] for each in kernels)) / 1e3,
        }

    def end(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(END_S)
            kill_session(process.pid)
            process.kill()


def main(model: str, out: Path, modes: str = "dwdp,ep", tokens: str = TOKENS, given: str = "{}") -> None:
    out.mkdir(parents=True, exist_ok=True)
    devices, sizes = cuda_devices(2), [int(count) for count in tokens.split(",")]
    settings = Settings.of({
        "model": model, "modes": tuple(modes.split(",")), "load_format": "dummy", "side_by_side": True, "input_len": max(sizes),
        "hf_overrides": {"num_hidden_layers": LAYERS} if devices else {},
        "engine_args": {"kv_cache_memory_bytes": (2 << 30) if devices else (64 << 20)} | ({} if devices else {"dtype": "float32"})
        | json.loads(given),
    })
    started, rows = [], []

    def write() -> None:
        made = origin(devices) | {"command": shlex.join(["python", *sys.argv]), "rows": rows}
        (out / "steps.json").write_text(json.dumps(made, indent=2))

    try:
        for name in settings.modes:
            started.append(Mode(settings, name, devices, out / f"traces-{name}"))
        for mode in started:
            mode.answers(LOAD_S)
        for count in sizes:
            times: dict[tuple[str, str], list[float]] = {}
            for turn in range(REPEATS + 2):
                for mode in started:
                    others = len(mode.pipes) - 1
                    for peers, asked in (("idle", (count, *[mode.idle] * others)), ("alike", (count,) * (1 + others))):
                        took = max(mode.ask(*asked))
                        if turn > 1:
                            times.setdefault((mode.name, peers), []).append(1e3 * took)
            for (name, peers), found in times.items():
                rows.append({"tokens": count, "mode": name, "peers": peers, "ms": statistics.median(found), "all_ms": found})
                print(f"{count:>6} {name:>6}, peers {peers:<5} {rows[-1]['ms']:8.2f} ms", flush=True)
        for count, mode in itertools.product(sizes, started):
            write()
            rows.append({"tokens": count, "mode": mode.name, "peers": "idle", **(seen := mode.profile(count))})
            print(f"{count:>6} {mode.name:>6}, traced: {json.dumps(seen)}", flush=True)
        write()
    finally:
        for mode in started:
            mode.end()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
