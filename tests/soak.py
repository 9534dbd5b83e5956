"""Soak: many requests to servers that are killed and started again; memory, descriptors and threads stay, answers too.

    python tests/soak.py --requests 20000 [--lives 5]         # make soak REQUESTS=20000
    python tests/soak.py --minutes 9 [--lives 3] [--first 2]  # tests/visit.sh MODEL OUT soak

Each life of the server ends in another way, the first in that of number `--first`. Figures are taken at rest, after half of a life's
requests and at its end; the exit status is 0 if nothing has grown, every answer was the first one's, and nothing is left. With
minutes each life has its share of what is left once it serves. On two GPUs engines are as vLLM starts them, but in float32: how a
request is batched then changes no answer of these questions.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from vllm_dwdp.entrypoints.bench.origin import output_of, query_gpus
from vllm_dwdp.entrypoints.server import Server

import conftest  # noqa: F401  (vLLM's environment)
from faults import END_S, START_S, TWO, await_end, find
from harness import GPUS, WORKERS, await_that
from quantized import SHAPE
from tiny_models import make_model

ENDS = (("engine 1", signal.SIGKILL), ("launcher", signal.SIGKILL), ("launcher", signal.SIGTERM), ("worker 1", signal.SIGKILL))
CLIENTS, BATCH = 6, 120  # of requests, after which a clock is looked at
REST_S = 3.0  # for connections to close and queues to empty
MEMORY_GROWTH, MORE_FILES, MORE_THREADS = 0.02, 4, 4  # that pass as none, for a whole server
LEFT_MIB = 64  # on all GPUs once all servers have ended
LONG = 400  # tokens of the answers under way when a server is killed
ON_GPUS = [
    "--dtype", "float32", "--kv-cache-memory-bytes", str(1 << 30), "--gpu-memory-utilization", "0.3", "--no-enable-prefix-caching",
    *WORKERS, "--data-parallel-size", "2", "--parallel", "dwdp",
]
# conftest has Triton compute float32 in full. Inductor would time its kernels, so that two lives might choose and round otherwise.
ENVIRONMENT = {"TORCHINDUCTOR_DETERMINISTIC": "1"} if GPUS else {}


def questions() -> list[tuple[str, int]]:
    """Prompts of 4 to 900 tokens and answers of 1 to 60."""
    rng = random.Random(0)
    drawn = [("".join(rng.choices("abcdefgh ", k=rng.choice((4, 30, 90, 900)))), rng.choice((1, 8, 60))) for _ in range(12)]
    return drawn[:1] + drawn[2:]  # in the other's answer two tokens are 1e-4 apart in float64, with the model that GPUs get


QUESTIONS = questions()


def ask(server: Server, number: int, longest: int = 0) -> str:
    prompt, tokens = QUESTIONS[number % len(QUESTIONS)]
    body = {"prompt": prompt, "max_tokens": longest or tokens, "temperature": 0, "ignore_eos": True}
    return json.load(server.post("v1/completions", body))["choices"][0]["text"]


def figures(server: Server) -> dict[str, int]:
    """Of all processes of a server at rest: private bytes of the host, which shared pages are not counted into, files, threads.

    Where there are GPUs also MiB of theirs: the server's, or all where nvidia-smi knows processes by other numbers. Nobody else may
    use the GPUs until the end.
    """
    time.sleep(REST_S)
    total, members = dict(host_bytes=0, files=0, threads=0), server.members()
    for process in members:
        with process.oneshot():
            total["host_bytes"] += process.memory_full_info().uss
            total["files"] += process.num_fds()
            total["threads"] += process.num_threads()
    return total | ({"gpu_mib": gpu_mib({process.pid for process in members}) or gpu_mib()} if GPUS else {})


def gpu_mib(pids: set[int] | None = None) -> int:
    """In use on all GPUs by these processes, or by whomever."""
    if pids is None:
        return sum(int(used) for used in query_gpus("memory.used"))
    lines = output_of(["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]).splitlines()
    apps = [[field.strip() for field in line.split(",")] for line in lines]
    return sum(int(used) for pid, used in apps if pid.isdigit() and int(pid) in pids and used.isdigit())


def half_life(first: int, requests: int, due_s: float | None) -> Iterator[range]:
    """Numbers of the requests of half of a life, from `first` on: so many, or in batches until the monotonic clock shows `due_s`."""
    if due_s is None:
        yield range(first, first + requests)
        return
    yield range(first, first := first + BATCH)
    while time.monotonic() < due_s:
        yield range(first, first := first + BATCH)


def live(server: Server, numbers: range, answers: dict[int, str]) -> list[str]:
    """Send requests; returns what is wrong with their answers."""
    wrong = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        for number, text in zip(numbers, pool.map(lambda n: ask(server, n), numbers), strict=True):
            if (first := answers.setdefault(number % len(QUESTIONS), text)) != text:
                wrong.append(f"request {number}, question {number % len(QUESTIONS)}: {text!r}, where the first answer was {first!r}")
    return wrong


def grown(half: dict[str, int], end: dict[str, int]) -> list[str]:
    limits = {name: MEMORY_GROWTH * size for name, size in half.items()} | dict(files=MORE_FILES, threads=MORE_THREADS)
    return [f"{name}: {half[name]} to {end[name]}" for name, limit in limits.items() if end[name] > half[name] + limit]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000, help="in all lives")
    parser.add_argument("--minutes", type=float, help="of all lives, instead of a number of requests")
    parser.add_argument("--lives", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="which way of ending the first life has")
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs")
    given, began_s = parser.parse_args(), time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # not without its server
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    (logs := given.logs or folder).mkdir(parents=True, exist_ok=True)
    model = str(make_model("qwen3_moe", folder / "model", **(SHAPE | dict(dtype="float32") if GPUS else {})))
    shared, answers, faults, number = set(os.listdir("/dev/shm")), {}, [], 0
    each, used_mib = given.requests // given.lives, gpu_mib() if GPUS else 0
    for life in range(given.lives):
        first, start_s = number, time.monotonic()
        with Server(
            model, ON_GPUS if GPUS else TWO, logs / f"{life}.log", environment=os.environ | ENVIRONMENT, folder=folder
        ) as server:
            server.wait_until_ready(START_S * (2 if GPUS else 1))  # a fresh machine's first start compiles kernels in float32
            serves_s, known = time.monotonic(), len(faults)
            end_s = serves_s + (began_s + given.minutes * 60 - serves_s) / (given.lives - life) if given.minutes else None
            half_s = (serves_s + end_s) / 2 if end_s else None
            found = []
            for requests, due_s in ((each // 2, half_s), (each - each // 2, end_s)):
                for numbers in half_life(number, requests, due_s):
                    faults += live(server, numbers, answers)
                    number = numbers.stop
                found.append(figures(server))
            half, end = found
            faults += (more := grown(half, end))
            whom, how = ENDS[(given.first + life) % len(ENDS)]
            print(f"life {life}: {number - first} requests in {time.monotonic() - serves_s:.0f} s after {serves_s - start_s:.0f}; "
                  f"{half} at half, {end} at the end"
                  f"{', GROWN' if more else ''}; {how.name} for the {whom}", flush=True)
            with ThreadPoolExecutor(CLIENTS) as pool:  # some are under way
                asked = [pool.submit(ask, server, number, LONG) for number in range(CLIENTS)]
                time.sleep(0.1)
                find(server, whom).send_signal(how)
                failed = sum(one.exception() is not None for one in asked)
            if not failed:
                faults.append(f"life {life}: no request was under way")
            if await_end(server, END_S) is None:
                faults.append(f"life {life}: the server goes on after {how.name} for the {whom}")
            print("\n".join([f"    {failed} of {CLIENTS} requests under way failed", *faults[known:]]), flush=True)
    await_that(lambda: not [p for p in psutil.process_iter() if p.ppid() == os.getpid() and p.status() != "zombie"], "the end")
    faults += [f"left in /dev/shm: {name}" for name in set(os.listdir("/dev/shm")) - shared]
    if GPUS:
        try:
            await_that(lambda: gpu_mib() - used_mib <= LEFT_MIB, "the driver to take back what the dead held", 20)
        except AssertionError:
            faults.append(f"left on GPUs: {gpu_mib() - used_mib} MiB")
    print("\n".join(faults) or f"{number} requests in {given.lives} lives: all answers equal, nothing grew, nothing left")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
