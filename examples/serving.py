"""Serve a model in several ways on the same GPUs and put each server under the same loads, with `vllm bench serve`.

    python examples/serving.py MODEL --loads 2048:256:8:80,2048:256:inf:400,8192:64:inf:160

A load is INPUT:OUTPUT:RATE:COUNT: random prompts of that many tokens, tokens to generate, requests per second (inf: all
at once), requests. Modes take turns, one server at a time; with --side-by-side all are up together and the turns
alternate load by load, for which the model has to fit several times (--kv-cache-memory-bytes in --serve-args).
Writes OUT/serving.json with every measurement, and the logs beside it.
"""

import argparse
import contextlib
import itertools
import json
import shlex
import signal
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from vllm_dwdp.entrypoints.bench.report import aligned
from vllm_dwdp.entrypoints.server import VLLM, Server, SessionFailure

MODES = {
    "dwdp": ["--data-parallel-size", "{size}", "--parallel", "dwdp"],
    "ep": ["--data-parallel-size", "{size}", "--enable-expert-parallel"],
    "tp": ["--tensor-parallel-size", "{size}"],
}
FIGURES = {  # of `vllm bench serve`, by the table's column
    "requests/s": "request_throughput", "tokens/s": "total_token_throughput",
    "TTFT ms": "median_ttft_ms", "TTFT p99": "p99_ttft_ms", "TPOT ms": "median_tpot_ms", "TPOT p99": "p99_tpot_ms",
}


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the servers end with it
    args.out.mkdir(parents=True, exist_ok=True)
    measured, failed = [], {}
    for group in [args.modes] if args.side_by_side else [[mode] for mode in args.modes]:
        with contextlib.ExitStack() as running:
            servers = {mode: running.enter_context(server(mode, args)) for mode in group}
            for mode, started in servers.items():
                with noting(failed, mode):
                    started.wait_until_ready(args.timeout)
                    put_under_load(started.url, (args.loads[0][0], "8", "inf", "32"), 0, f"warm-up-{mode}", args)
            for seed, (repeat, load) in enumerate(itertools.product(range(args.repeats), args.loads), start=1):
                for mode in [mode for mode in group if mode not in failed]:
                    with noting(failed, mode):
                        name = f"{mode}-{'-'.join(load)}-{repeat}"
                        figures = put_under_load(servers[mode].url, load, seed, name, args)
                        counts = {"dwdp": counted(servers[mode])} if mode == "dwdp" else {}
                        measured.append({"mode": mode, "load": ":".join(load), "repeat": repeat} | figures | counts)
                        print(json.dumps(measured[-1]), flush=True)
                    write(measured, failed, args)
        write(measured, failed, args)
    print(f"\n{table(measured, args)}\n")
    for mode, reason in failed.items():
        print(f"{mode} failed: {reason}")
    return int(not measured)


def server(mode: str, args: argparse.Namespace) -> Server:
    """`vllm serve` in this mode."""
    own = [part.format(size=args.size) for part in MODES[mode]]
    started = Server(args.model, [*shlex.split(args.serve_args), *own], args.out / f"serve-{mode}.log")
    print(shlex.join(started.command), flush=True)
    return started


def put_under_load(
    url: str, load: tuple[str, ...], seed: int, name: str, args: argparse.Namespace
) -> dict[str, float]:
    """One run of `vllm bench serve`, every request of which must complete. Another seed meets no cached prefix."""
    input_len, output_len, rate, count = load
    log = args.out / f"{name}.log"
    command = [
        *VLLM, "bench", "serve", "--base-url", url, "--model", args.model, "--dataset-name", "random", "--ignore-eos",
        "--random-input-len", input_len, "--random-output-len", output_len, "--request-rate", rate,
        "--num-prompts", count, "--seed", str(seed), "--percentile-metrics", "ttft,tpot", "--disable-tqdm",
        "--save-result", "--result-dir", str(args.out), "--result-filename", f"{name}.json",
    ]
    with log.open("wb") as output:
        ended = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=args.timeout)
    if ended.returncode:
        raise SessionFailure(f"`vllm bench serve` ended with {ended.returncode}, see {log}")
    result = json.loads((args.out / f"{name}.json").read_text())
    if result["completed"] != int(count):
        raise SessionFailure(f"{result['completed']} of {count} requests were completed, see {log}")
    return {figure: result[figure] for figure in FIGURES.values()}


def counted(server: Server) -> dict[str, float]:
    """DWDP's counters so far, over all ranks."""
    totals: Counter = Counter()
    for name, labels, value in server.metrics():
        if name.startswith("vllm:dwdp_") and name.endswith("_total"):
            totals["_".join([name[10:-6], labels.get("view", "")]).strip("_")] += value
    return dict(totals)


@contextlib.contextmanager
def noting(failed: dict[str, str], mode: str) -> Iterator[None]:
    """A failure ends the mode's turns, not the comparison."""
    try:
        yield
    except (SessionFailure, subprocess.TimeoutExpired) as failure:
        failed[mode] = str(failure)
        print(f"{mode}: {failure}", flush=True)


def write(measured: list[dict], failed: dict[str, str], args: argparse.Namespace) -> None:
    content = {"command": shlex.join(sys.argv), "measured": measured, "failed": failed}
    (args.out / "serving.json").write_text(json.dumps(content, indent=2))


def table(measured: list[dict], args: argparse.Namespace) -> str:
    """Medians by load and mode."""
    lines = [["in:out:rate:count", "mode", *FIGURES]]
    for load in map(":".join, args.loads):
        for mode in args.modes:
            if own := [m for m in measured if (m["load"], m["mode"]) == (load, mode)]:
                medians = [statistics.median(m[figure] for m in own) for figure in FIGURES.values()]
                lines.append([load, mode, *(format(value, ",.2f") for value in medians)])
    return "\n".join(aligned(lines))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a name, with a tokenizer")
    parser.add_argument(
        "--loads", required=True, type=lambda text: [tuple(load.split(":")) for load in text.split(",")]
    )
    parser.add_argument("--modes", default=list(MODES), type=lambda text: text.split(","))
    parser.add_argument("--size", type=int, default=2, help="GPUs")
    parser.add_argument("--serve-args", default="", help="further arguments of every `vllm serve`")
    parser.add_argument("--side-by-side", action="store_true", help="keep all servers up and alternate")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each load")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one start, or for one load")
    parser.add_argument("--out", type=Path, default=Path("serving"), help="folder for serving.json and the logs")
    args = parser.parse_args()
    if any(len(load) != 4 for load in args.loads):
        parser.error("--loads takes INPUT:OUTPUT:RATE:COUNT, separated by commas")
    if unknown := set(args.modes) - set(MODES):
        parser.error(f"--modes has {', '.join(sorted(unknown))}; there are {', '.join(MODES)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
