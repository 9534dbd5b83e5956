"""A load on a server: what it asks for, its figures by `vllm bench serve`, and the loads of a sweep."""

import contextlib
import http.client
import json
import math
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from vllm_dwdp.entrypoints.bench import client
from vllm_dwdp.entrypoints.server import Server, SessionFailure
from vllm_dwdp.errors import DWDPError

FIGURES = ("request_throughput", "total_token_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms",
           "p99_tpot_ms", "p99_itl_ms")
SHARES = (0.25, 0.5, 0.75)  # of saturation
WARMUP_REQUESTS, WARMUP_TOKENS = 16, 8


class Load(msgspec.Struct, frozen=True):
    """Random prompts of `input_len` tokens, `output_len` to generate, requests/s (inf: all at once), requests.

    For one rank, if that is named, else for those that the server's balancer chooses.
    """

    input_len: int
    output_len: int
    rate: float
    count: int
    rank: int | None = None

    def __str__(self) -> str:
        text = f"{self.input_len}:{self.output_len}:{self.rate:g}:{self.count}"
        return text if self.rank is None else f"{text}@{self.rank}"

    @classmethod
    def of(cls, text: str, option: str = "--loads") -> "Load":
        """From in:out:rate:count[@rank], for --sweep from in:out:count. Raises DWDPError for another text."""
        body, at, rank = text.partition("@")
        parts = body.split(":")
        if option == "--sweep":
            parts[2:2] = ["inf"]
        try:
            load = cls(int(parts[0]), int(parts[1]), float(parts[2]), int(parts[3]), int(rank) if at else None)
            is_right = load.rate > 0 and min(load.input_len, load.output_len, load.count, (load.rank or 0) + 1) > 0
            if is_right and len(parts) == 4 and (load.rank is None or option == "--loads"):
                return load
        except (ValueError, IndexError):
            pass
        form = "IN:OUT:COUNT" if option == "--sweep" else "IN:OUT:RATE:COUNT[@RANK]"
        raise DWDPError(f"{option} has {text!r}: it must be {form}, numbers above 0 (RATE may be inf)")

    def below(self, saturation: float) -> "list[Load]":
        """The same requests at quarter, half and three quarters of `saturation`, in requests/s."""
        rates = (float(f"{share * saturation:.3g}") for share in SHARES)
        return [msgspec.structs.replace(self, rate=rate) for rate in rates]


Mix = tuple[Load, ...]  # loads that come at the same time


def names(mix: Mix) -> list[str]:
    """Of each load, with those that it comes beside."""
    return [" beside ".join(map(str, (load, *(other for other in mix if other is not load)))) for load in mix]


def warm_up(server: Server, load: Load, model: str) -> None:
    """A few requests like those of the load, each of other tokens."""
    def ask(number: int) -> None:
        prompt = [10 + (number + i) % 99 for i in range(load.input_len)]
        body = {"model": model, "prompt": prompt, "max_tokens": min(WARMUP_TOKENS, load.output_len), "ignore_eos": True}
        with server.post("v1/completions", body) as response:
            response.read()

    try:
        with ThreadPoolExecutor(WARMUP_REQUESTS) as pool:
            list(pool.map(ask, range(WARMUP_REQUESTS)))
    except (OSError, http.client.HTTPException) as error:
        raise SessionFailure(f"warm up: {error or type(error).__name__}, see {server.log}") from None


def put_under_load(
    server: Server, mix: Mix, *, seed: int, model: str, tokenizer: str, logs: Path, timeout_s: float
) -> list[dict[str, float]]:
    """FIGURES of each load, all put on the server at once, by `vllm bench serve`. Another seed meets no cache.

    Its logs and JSON are `logs` with a number and the load's name. Raises SessionFailure unless every request completes within
    `timeout_s` of the time in which they come.
    """
    found = []
    timeout_s += max(0.0 if math.isinf(load.rate) else load.count / load.rate for load in mix)
    with contextlib.ExitStack() as clients:
        running, start = [], client.barrier(len(mix))
        for number, load in enumerate(mix):
            log = logs.with_name(f"{logs.name}-{number}-{str(load).replace(':', '-')}.log")
            arguments = [
                "--base-url", server.url, "--model", model, "--tokenizer", tokenizer,
                "--dataset-name", "random", "--ignore-eos", "--random-input-len", str(load.input_len),
                "--random-output-len", str(load.output_len),
                "--request-rate", "inf" if math.isinf(load.rate) else str(load.rate), "--num-prompts", str(load.count),
                "--seed", str(10 * seed + number), "--percentile-metrics", "ttft,tpot,itl", "--disable-tqdm", "--save-result",
                "--result-dir", str(log.parent), "--result-filename", log.with_suffix(".json").name,
                *([] if load.rank is None else ["--header", f"X-data-parallel-rank={load.rank}"]),
            ]
            running.append((load, log, clients.enter_context(client.started(arguments, log, start))))
        deadline_s = time.monotonic() + timeout_s
        for load, log, process in running:
            process.join(max(deadline_s - time.monotonic(), 0))
            if server.has_ended():
                raise SessionFailure(f"load: the server ended with status {server.process.returncode}, see {server.log}")
            if process.exitcode is None:
                raise SessionFailure(f"load: not done after {timeout_s:g} s, see {log}")
            if process.exitcode:
                raise SessionFailure(f"`vllm bench serve` ended with {process.exitcode}, see {log}")
            figures = json.loads(log.with_suffix(".json").read_text())
            if figures["completed"] != load.count:
                raise SessionFailure(f"{figures['completed']} of {load.count} requests were completed, see {log}")
            found.append({name: figures[name] for name in FIGURES})
    return found


def counted(server: Server) -> dict[str, float]:
    """DWDP's counters so far, over all ranks."""
    totals: dict[str, float] = defaultdict(float)
    for name, labels, value in server.metrics():
        if name.startswith("vllm:dwdp_") and name.endswith("_total"):
            counter = name.removeprefix("vllm:dwdp_").removesuffix("_total")
            totals["_".join([counter, labels.get("view", "")]).strip("_")] += value
    return totals
