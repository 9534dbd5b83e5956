"""The vLLM plugin: `--parallel dwdp`, the `--dwdp-...` options, and the switch in `additional_config`.

vLLM calls `register` once in every process. It only wraps two functions of one module, at once or as soon as that is
imported, so it costs next to nothing and changes nothing while the switch is off.
"""

import argparse
import contextlib
import logging
import re
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import msgspec

from vllm_dwdp import config, launcher
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.integration import hooks


def register() -> None:
    """Install the command-line options and the switch. Idempotent, never raises."""
    if hooks.ADD_CLI_ARGS.module not in sys.modules:  # importing it here would slow engines and workers
        if not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
            sys.meta_path.insert(0, _RegisterOnImport())
        return
    try:
        hooks.ADD_CLI_ARGS.install(_add_cli_args)
        hooks.CREATE_ENGINE_CONFIG.install(_create_engine_config)
    except Exception as error:  # a plugin must not take stock vLLM down
        logging.getLogger("vllm.dwdp").warning("vllm-dwdp is off: %s", error)


class _RegisterOnImport(MetaPathFinder):
    """Calls `register` again when vLLM's arguments have been imported, however the other finders find them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != hooks.ADD_CLI_ARGS.module:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _create_engine_config(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    vllm_config = original(self, *args, **kwargs)
    if config.is_on(vllm_config.additional_config):
        # They import the engine, which a process without DWDP may not need.
        from vllm_dwdp.integration import commands, launch

        chooses_graphs = any(
            getattr(settings, name) is not None
            for settings in (self, self.compilation_config)
            for name in ("cudagraph_capture_sizes", "max_cudagraph_capture_size")
        )
        if not launcher.is_child():
            commands.lead()
            launch.prepare(vllm_config, chooses_graphs)
            return vllm_config
        launcher.follow_parent()
        try:
            launch.prepare(vllm_config, chooses_graphs)
        except DWDPError as error:
            commands.refuse_in_child(error)
    return vllm_config


def _add_cli_args(original: Callable, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser = original(parser)
    group = parser.add_argument_group("DWDP", "Distributed Weight Data Parallelism (vllm-dwdp).")
    group.add_argument(
        "--parallel", choices=["dwdp"], default=argparse.SUPPRESS,
        help="Stream MoE experts from peer ranks' memory in large steps, and send the tokens of small ones to their "
        "experts' owners among the ranks that are at hand; ranks of --data-parallel-size otherwise run independently.",
    )
    for field in msgspec.structs.fields(config.Options):
        group.add_argument(config.as_flag(field.name), **_argument(field))
    _merge_after_parsing(parser)
    return parser


def _argument(field: msgspec.structs.FieldInfo) -> dict[str, Any]:
    """argparse's keywords for one option. One that is not given leaves no trace; `config.parse` checks the values."""
    text, default = config.describe(field)
    kind = msgspec.inspect.type_info(field.type)
    assert isinstance(kind, msgspec.inspect.Metadata), field.name
    shown: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f"{text} (default: {default})"}
    if isinstance(field.default, bool):
        return shown | {"action": argparse.BooleanOptionalAction}
    choices = kind.type.values if isinstance(kind.type, msgspec.inspect.LiteralType) else ()
    return shown | {"type": scalar, "metavar": f"{{{','.join(map(str, choices))}}}" if choices else "VALUE"}


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
        given = {name: getattr(namespace, f"dwdp_{name}") for name in fields if hasattr(namespace, f"dwdp_{name}")}
        try:
            _refuse_misspelt(rest)
            if getattr(namespace, "parallel", None) == "dwdp":
                namespace.additional_config = _merge(namespace.additional_config, given)
            elif given:
                raise DWDPError(f"{config.as_flag(next(iter(given)))} needs --parallel dwdp")
            if config.is_on(getattr(namespace, "additional_config", None)):
                _fail_as_ranks_do()
        except DWDPError as error:
            parser.exit(2, f"vllm-dwdp: error: {error}\n")
        return namespace, rest

    parser.parse_known_args = parse  # type: ignore[method-assign]


def _fail_as_ranks_do() -> None:
    """Of `vllm serve` alone, which has imported its commands by now."""
    if hooks.RUN_HEADLESS.module in sys.modules:
        from vllm_dwdp.integration import commands

        commands.install()


def _refuse_misspelt(rest: list[str]) -> None:
    """Raises DWDPError for what argparse did not take and that was meant for DWDP."""
    fields = config.Options.__struct_fields__
    for written in rest:
        if match := re.match(r"--(?:no-)?dwdp-([\w-]+)", written):
            near = config.meant(match[1].replace("-", "_"), fields, config.as_flag)
            raise DWDPError(f"{written.split('=')[0]} is no option; {near}")


def _merge(additional_config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """`additional_config` with the options that were given as such, which win. Raises DWDPError where one cannot be."""
    if not isinstance(additional_config, dict | None):
        raise DWDPError(f"--additional-config is {additional_config!r}: with --parallel dwdp it must be a JSON object")
    merged: dict[str, Any] = {config.KEY: {}} | (additional_config or {})
    if isinstance(merged[config.KEY], dict | None):
        merged[config.KEY] = (merged[config.KEY] or {}) | given
    config.parse(merged, lambda option: (config.as_flag if option in given else config.as_json)(option))
    return merged
