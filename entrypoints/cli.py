"""The `vllm-dwdp` command."""

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

import vllm_dwdp
from vllm_dwdp import config
from vllm_dwdp.entrypoints.bench import checks
from vllm_dwdp.entrypoints.bench.modes import Settings
from vllm_dwdp.entrypoints.bench.run import Bench
from vllm_dwdp.entrypoints.bench.serve import ServeSettings, Serving
from vllm_dwdp.entrypoints.doctor import run as doctor
from vllm_dwdp.entrypoints.plan import run as plan
from vllm_dwdp.errors import DWDPError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 2 for a setting that cannot work, with one line on stderr."""
    arguments = vars(parser().parse_args(argv))
    try:
        return arguments.pop("run")(arguments)
    except DWDPError as error:
        print(f"vllm-dwdp: error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="vllm-dwdp", description="Distributed Weight Data Parallelism for vLLM.")
    version = f"vllm-dwdp {vllm_dwdp.__version__}, vLLM {importlib.metadata.version('vllm')}"
    root.add_argument("--version", action="version", version=version)
    commands = root.add_subparsers(title="commands", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "bench", help="compare DWDP with stock vLLM on this machine", argument_default=argparse.SUPPRESS,
        description="Runs the modes in turn, A B A B, on the same prompts, and prints one table. dwdp: this plugin; "
        "ep: stock data parallel with expert parallel; tp: stock tensor parallel; single: one GPU that holds "
        "everything and communicates with nobody. With --serve the modes are whole servers under load, as "
        "`vllm serve` starts them and `vllm bench serve` asks them, one after the other unless --side-by-side.",
    )
    command.add_argument("--serve", action="store_true", help="compare servers: --loads or --sweep, --serve-args")
    fields = {field.name: field for kind in (ServeSettings, Settings) for field in msgspec.structs.fields(kind)}
    served = {field.name: config.describe(field)[1] for field in msgspec.structs.fields(ServeSettings)}
    for name, field in fields.items():
        told, default = argument(field), config.describe(field)[1]
        if served.get(name, default) != default:
            told["help"] += f"; with --serve: {served[name]}"
        command.add_argument(config.flag(name), **told)
    command.set_defaults(run=bench)
    command = commands.add_parser(
        "plan", help="forecast DWDP's memory and speed from a model's config", argument_default=argparse.SUPPRESS,
        description="Forecasts prefill from config.json alone, without GPU and weights: bytes, memory by part, KV "
        "cache, copies hidden or exposed, steps of DWDP, expert parallelism and a full replica.",
    )
    command.add_argument("model", metavar="MODEL", help="a folder with config.json, or a name on the hub")
    for field in msgspec.structs.fields(plan.Settings)[1:]:
        command.add_argument(config.flag(field.name), **argument(field))
    command.set_defaults(run=lambda given: plan.run(plan.Settings.of(given)))
    command = commands.add_parser(
        "doctor", help="check this machine, and a model on it", argument_default=argparse.SUPPRESS,
        description="Checks versions, hooks, GPUs and their links, limits and memory: a line each, ok, warn or fail, "
        "with what to do. The exit status is 1 where anything fails.",
    )
    command.add_argument("model", metavar="MODEL", nargs="?", help="a folder with config.json, or a name on the hub")
    for field in msgspec.structs.fields(doctor.Settings)[1:]:
        command.add_argument(f"--{field.name}", **argument(field))
    command.set_defaults(run=lambda given: doctor.run(doctor.Settings.of(given)))
    return root


def bench(given: dict[str, Any]) -> int:
    """Offline engines, or with --serve whole servers. Raises DWDPError for an option of the other."""
    serve = given.pop("serve", False)
    kind = ServeSettings if serve else Settings
    for name in given:
        if name not in kind.__struct_fields__:
            raise DWDPError(f"{config.flag(name)} {'does not go with' if serve else 'needs'} --serve")
    settings = kind.of(given)
    checks.refuse_unwritable(settings.out)
    if isinstance(settings, ServeSettings):
        checks.refuse_unservable(settings.model, settings.serve_args)
        return Serving(settings).run()
    return Bench(settings).run()


def argument(field: msgspec.structs.FieldInfo) -> dict[str, Any]:
    """argparse's keywords for one setting. Values stay text where `Settings.of` reads and checks it."""
    text, default = config.describe(field)
    shown: dict[str, Any] = {"help": f"{text} (default: {default})" if default else text}
    if isinstance(field.default, bool):
        return shown | {"action": argparse.BooleanOptionalAction}
    if isinstance(field.default, tuple):
        return shown | {"type": words, "metavar": "A,B,..."}
    if field.required:
        return shown | {"required": True}
    if field.default is msgspec.NODEFAULT:  # made by a factory
        return shown | {"type": json_object, "metavar": "JSON"}
    return shown | {"metavar": "VALUE"}


def words(text: str) -> list[str]:
    """A comma list's different entries."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


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
