"""The `vllm-dwdp` command."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from vllm_dwdp.entrypoints import bench
from vllm_dwdp.entrypoints.bench_modes import MODES, Settings
from vllm_dwdp.errors import DWDPError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 2 for a setting that cannot work, with one line on stderr."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except DWDPError as error:
        print(f"vllm-dwdp: error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="vllm-dwdp", description="Distributed Weight Data Parallelism for vLLM.")
    commands = root.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_bench(commands.add_parser(
        "bench", help="compare DWDP with stock vLLM on this machine",
        description="Runs the modes in turn, A B A B, on the same prompts, and prints one table. dwdp: this plugin; "
        "ep: stock data parallel with expert parallel; tp: stock tensor parallel; single: one GPU that holds "
        "everything, the ceiling without communication.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    ))
    return root


def add_bench(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", required=True, help="name or folder; a config.json suffices with --load-format dummy")
    add("--size", type=int, default=2, help="GPUs, and ranks of dwdp and ep")
    add("--modes", type=words, default=",".join(MODES), help="which modes, in which order")
    own = argparse.SUPPRESS  # the default depends on the workload
    add("--input-len", type=int, default=own, help="longest prompt, in tokens (8192; 256 with --decode)")
    add("--ratio", type=float, default=0.8, help="prompt lengths are uniform in [RATIO * INPUT_LEN, INPUT_LEN]")
    add("--num-prompts", type=int, default=own, help="prompts per GPU (24; the largest batch with --decode)")
    add("--max-num-batched-tokens", type=numbers, default="16384", help="tokens a step; a comma list makes row groups")
    add("--decode", type=numbers, default="", metavar="BATCHES",
        help="measure decode steps of so many requests per GPU instead of prefill; a comma list, such as 1,4,16,64")
    add("--output-len", type=int, default=own, help="tokens for each prompt (1, prefill alone; 64 with --decode)")
    add("--rounds", type=int, default=2, help="times that the modes are gone through")
    add("--repeats", type=int, default=3, help="measurements each time that a mode is up")
    add("--side-by-side", action="store_true",
        help="keep the engines of all modes loaded and alternate without reloading; needs a small model")
    add("--gpu-memory-utilization", type=float, default=0.9,
        help="share of each GPU's memory; divided by the number of modes with --side-by-side")
    add("--hf-overrides", type=json_object, default="{}", help="""JSON, such as {"num_hidden_layers": 12}""")
    add("--dtype", default="auto", help="as vLLM's")
    add("--load-format", default="auto", help="as vLLM's")
    add("--eager", action=argparse.BooleanOptionalAction, default=own, help="no CUDA graphs (yes; no with --decode)")
    add("--engine-args", type=json_object, default="{}", help="JSON, merged into every engine's arguments")
    add("--dwdp", type=json_object, default="{}", help="""JSON of DWDP options, such as {"slots": 3}""")
    add("--timeout", type=float, default=900.0, help="seconds that a mode may take to load, warm up or run once")
    add("--out", default="./dwdp-bench", help="folder for bench.json, bench.png and logs/")
    command.set_defaults(run=run_bench)


def run_bench(arguments: argparse.Namespace) -> int:
    return bench.run(settings_of(arguments))


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings asked for, with the defaults of the workload. Raises DWDPError for what cannot be."""
    given = {name: vars(arguments).get(name) for name in Settings.__struct_fields__}
    if given["decode"]:
        workload = {"input_len": 256, "num_prompts": max(given["decode"]), "output_len": 64, "eager": False}
    else:
        workload = {"input_len": 8192, "num_prompts": 24, "output_len": 1, "eager": True}
    return Settings(**given | {name: value for name, value in workload.items() if given[name] is None})


def words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in words(text))


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object: {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
