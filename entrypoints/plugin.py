"""The vLLM plugin: `--parallel dwdp`, the `--dwdp-...` options, and the switch in `additional_config`.

vLLM calls `register` in every process. It only wraps two functions of a module that vLLM has loaded already, so it
costs next to nothing and changes nothing while the switch is off.
"""

import argparse
import contextlib
import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from vllm_dwdp import config
from vllm_dwdp.integration import hooks
from vllm_dwdp.errors import DWDPError


def register() -> None:
    """Install the command-line options and the switch. Idempotent, never raises."""
    if hooks.ADD_CLI_ARGS.module not in sys.modules:  # an engine or worker process: its worker class and entry point are already ours
        return
    try:
        hooks.ADD_CLI_ARGS.install(_add_cli_args)
        hooks.CREATE_ENGINE_CONFIG.install(_create_engine_config)
    except Exception as error:  # noqa: BLE001 - a plugin must not take stock vLLM down
        logging.getLogger("vllm.dwdp").warning("vllm-dwdp is off: %s", error)


def _create_engine_config(original: Callable) -> Callable:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        if config.is_on(vllm_config.additional_config):
            from vllm_dwdp.integration import launch  # imports the engine, which a process without DWDP may not need

            _print_refusals_in_one_line()
            launch.prepare(vllm_config)
        return vllm_config

    return create_engine_config


def _add_cli_args(original: Callable) -> Callable:
    @functools.wraps(original)
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        group = parser.add_argument_group("DWDP", "Distributed Weight Data Parallelism (vllm-dwdp).")
        group.add_argument(
            "--parallel", choices=["dwdp"],
            help="Stream MoE experts from peer ranks' memory instead of sending tokens to experts; the ranks of "
            "--data-parallel-size then never wait for each other.",
        )
        for field in msgspec.structs.fields(config.Options):
            group.add_argument(f"--dwdp-{field.name.replace('_', '-')}", **_argument(field))
        _merge_after_parsing(parser)
        return parser

    return add_cli_args


def _argument(field: msgspec.structs.FieldInfo) -> dict[str, Any]:
    """argparse's keywords for one option. Every default is None, "not given"; `config.parse` checks the values."""
    text = msgspec.inspect.type_info(field.type).extra_json_schema["description"]
    if isinstance(field.default, bool):
        return {"action": argparse.BooleanOptionalAction, "default": None, "help": text}
    return {"type": scalar, "metavar": "VALUE", "help": text}


def scalar(text: str) -> Any:
    """A number if it reads as one, else the text."""
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.decode(text, type=int | float)
    return text


def _merge_after_parsing(parser: argparse.ArgumentParser) -> None:
    """Move the options into `additional_config`, which travels to every process, whatever order they were given in."""
    parse_known_args = parser.parse_known_args

    def parse(*args: Any, **kwargs: Any) -> Any:
        namespace, rest = parse_known_args(*args, **kwargs)
        fields = config.Options.__struct_fields__
        given = {f: v for f in fields if (v := getattr(namespace, f"dwdp_{f}", None)) is not None}
        if namespace.parallel == "dwdp":
            additional = namespace.additional_config or {}
            if not isinstance(additional, dict):
                parser.exit(2, "vllm-dwdp: error: --parallel dwdp needs an --additional-config that is an object\n")
            additional = dict(additional)
            additional[config.KEY] = {**(additional.get(config.KEY) or {}), **given}
            try:
                config.parse(additional)
            except DWDPError as error:
                parser.exit(2, f"vllm-dwdp: error: {error}\n")
            namespace.additional_config = additional
        elif given:
            parser.exit(2, f"vllm-dwdp: error: --dwdp-{next(iter(given)).replace('_', '-')} needs --parallel dwdp\n")
        return namespace, rest

    parser.parse_known_args = parse


def _print_refusals_in_one_line() -> None:
    """A person who made a wrong setting reads one line, not our stack."""
    previous = sys.excepthook
    if getattr(previous, "__name__", "") == "print_refusal":
        return

    def print_refusal(kind: type, error: BaseException, trace: Any) -> None:
        if issubclass(kind, DWDPError):
            print(f"vllm-dwdp: error: {error}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    sys.excepthook = print_refusal
