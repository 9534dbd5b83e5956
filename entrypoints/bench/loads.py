"""A load on a server: what it asks for, its figures by `vllm bench serve`, and the loads of a sweep."""

import json
import math
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from vllm_dwdp.entrypoints.server import VLLM, Server, Session, SessionFailure
from vllm_dwdp.errors import DWDPError

FIGURES = ("request_throughput", "total_token_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms",
           "p99_tpot_ms")
SHARES = (0.25, 0.5, 0.75)  # of saturation
WARMUP_REQUESTS, WARMUP_TOKENS = 16, 8


class Load(msgspec.Struct, frozen=True):
    """Random prompts of `input_len` tokens, `output_len` to generate, requests/s (inf: all at once), requests."""

    input_len: int
    output_len: int
    rate: float
    count: int

    def __str__(self) -> str:
        return f"{self.input_len}:{self.output_len}:{self.rate:g}:{self.count}"

    @classmethod
    def of(cls, text: str, option: str = "--loads") -> "Load":
        """From in:out:rate:count, for --sweep from in:out:count. Raises DWDPError for another text."""
        parts = text.split(":")
        if option == "--sweep":
            parts[2:2] = ["inf"]
        try:
            load = cls(int(parts[0]), int(parts[1]), float(parts[2]), int(parts[3]))
            if len(parts) == 4 and load.rate > 0 and min(load.input_len, load.output_len, load.count) > 0:
                return load
        except (ValueError, IndexError):
            pass
        form = "IN:OUT:COUNT" if option == "--sweep" else "IN:OUT:RATE:COUNT"
        raise DWDPError(f"{option} has {text!r}: it must be {form}, numbers above 0 (RATE may be inf)")

    def below(self, saturation: float) -> "list[Load]":
        """The same requests at quarter, half and three quarters of `saturation`, in requests/s."""
        rates = (float(f"{share * saturation:.3g}") for share in SHARES)
        return [msgspec.structs.replace(self, rate=rate) for rate in rates]


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
    except OSError as error:
        raise SessionFailure(f"warm up: {error}, see {server.log}") from None


def put_under_load(
    server: Server, load: Load, *, seed: int, model: str, tokenizer: str, log: Path, timeout_s: float
) -> dict[str, float]:
    """FIGURES of one run of `vllm bench serve`, whose log and JSON carry the name `log`. Another seed meets no cache.

    Raises SessionFailure unless every request completes within `timeout_s`.
    """
    result = log.with_suffix(".json")
    command = [
        *VLLM, "bench", "serve", "--base-url", server.url, "--model", model, "--tokenizer", tokenizer,
        "--dataset-name", "random", "--ignore-eos", "--random-input-len", str(load.input_len),
        "--random-output-len", str(load.output_len), "--request-rate", "inf" if math.isinf(load.rate) else str(load.rate),
        "--num-prompts", str(load.count), "--seed", str(seed), "--percentile-metrics", "ttft,tpot", "--disable-tqdm",
        "--save-result", "--result-dir", str(log.parent), "--result-filename", result.name,
    ]
    with Session(command, log) as client:
        client.wait_until(lambda: client.process.poll() is not None, "load", timeout_s)
        if client.process.returncode:
            raise SessionFailure(f"`vllm bench serve` ended with {client.process.returncode}, see {log}")
    figures = json.loads(result.read_text())
    if figures["completed"] != load.count:
        raise SessionFailure(f"{figures['completed']} of {load.count} requests were completed, see {log}")
    return {name: figures[name] for name in FIGURES}


def counted(server: Server) -> dict[str, float]:
    """DWDP's counters so far, over all ranks."""
    totals: dict[str, float] = defaultdict(float)
    for name, labels, value in server.metrics():
        if name.startswith("vllm:dwdp_") and name.endswith("_total"):
            totals["_".join([name[10:-6], labels.get("view", "")]).strip("_")] += value
    return totals
