"""Soak: many requests to servers that are killed and started again; memory, descriptors and threads stay, answers too.

    python tests/soak.py --requests 20000 [--lives 5]    # make soak REQUESTS=20000

Each life of the server ends in another way. Figures are taken at rest, after half of a life's requests and at its end;
the exit status is 0 if nothing has grown, every answer was the first one's, and nothing is left.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from vllm_dwdp.entrypoints.server import Server

import conftest  # noqa: F401  (vLLM's environment)
from faults import END_S, START_S, TWO, await_end, find
from harness import await_that
from tiny_models import make_model

ENDS = (("engine 1", signal.SIGKILL), ("launcher", signal.SIGKILL), ("launcher", signal.SIGTERM), ("worker 1", signal.SIGKILL))
CLIENTS = 6
REST_S = 3.0  # for connections to close and queues to empty
MEMORY_GROWTH, MORE_FILES, MORE_THREADS = 0.02, 4, 4  # that pass as none, for a whole server


def questions() -> list[tuple[str, int]]:
    """Prompts of 4 to 900 tokens and answers of 1 to 60."""
    rng = random.Random(0)
    return [("".join(rng.choices("abcdefgh ", k=rng.choice((4, 30, 90, 900)))), rng.choice((1, 8, 60))) for _ in range(12)]


QUESTIONS = questions()


def ask(server: Server, number: int) -> str:
    prompt, tokens = QUESTIONS[number % len(QUESTIONS)]
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return json.load(server.post("v1/completions", body))["choices"][0]["text"]


def figures(server: Server) -> dict[str, int]:
    """Of all processes of a server at rest: private bytes, which shared pages are not counted into, files, threads."""
    time.sleep(REST_S)
    total = dict(memory=0, files=0, threads=0)
    for process in server.members():
        with process.oneshot():
            total["memory"] += process.memory_full_info().uss
            total["files"] += process.num_fds()
            total["threads"] += process.num_threads()
    return total


def live(server: Server, numbers: range, answers: dict[int, str]) -> list[str]:
    """Send requests; returns what is wrong with their answers."""
    wrong = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        for number, text in zip(numbers, pool.map(lambda n: ask(server, n), numbers), strict=True):
            if answers.setdefault(number % len(QUESTIONS), text) != text:
                wrong.append(f"request {number} has another answer than the first with its prompt")
    return wrong


def grown(half: dict[str, int], end: dict[str, int]) -> list[str]:
    limits = dict(memory=MEMORY_GROWTH * half["memory"], files=MORE_FILES, threads=MORE_THREADS)
    return [f"{name}: {half[name]} to {end[name]}" for name, limit in limits.items() if end[name] > half[name] + limit]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--lives", type=int, default=5)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    model, shared, answers, faults = str(make_model("qwen3_moe", folder / "model")), set(os.listdir("/dev/shm")), {}, []
    each = given.requests // given.lives
    for life in range(given.lives):
        numbers, start_s = range(life * each, (life + 1) * each), time.monotonic()
        with Server(model, TWO, folder / f"{life}.log", environment=os.environ, folder=folder) as server:
            server.wait_until_ready(START_S)
            faults += live(server, numbers[: each // 2], answers)
            half = figures(server)
            faults += live(server, numbers[each // 2 :], answers)
            end = figures(server)
            faults += (more := grown(half, end))
            whom, how = ENDS[life % len(ENDS)]
            print(f"life {life}: {each} requests in {time.monotonic() - start_s:.0f} s; {half} at half, {end} at the end"
                  f"{', GROWN' if more else ''}; {how.name} for the {whom}", flush=True)
            with ThreadPoolExecutor(CLIENTS) as pool:  # some are under way
                asked = [pool.submit(ask, server, number) for number in range(CLIENTS)]
                time.sleep(0.1)
                find(server, whom).send_signal(how)
                failed = sum(one.exception() is not None for one in asked)
            if await_end(server, END_S) is None:
                faults.append(f"life {life}: the server goes on after {how.name} for the {whom}")
            print(f"    {failed} of {CLIENTS} requests under way failed", flush=True)
    await_that(lambda: not [p for p in psutil.process_iter() if p.ppid() == os.getpid() and p.status() != "zombie"], "the end")
    faults += [f"left in /dev/shm: {name}" for name in set(os.listdir("/dev/shm")) - shared]
    print("\n".join(faults) or f"{given.requests} requests in {given.lives} lives: all answers equal, nothing grew, nothing left")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
