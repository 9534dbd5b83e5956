"""Invariant: without the switch vLLM is untouched; with it every hook is in place, or DWDP stops and names the one."""

import argparse
import json
import logging
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from vllm_dwdp.entrypoints import plugin

ARGUMENTS = "import sys; from vllm.engine import arg_utils; from vllm_dwdp.entrypoints.plugin import register\n"


def fresh(code: str, **values: object) -> str:
    """Run `code` in a new interpreter, where nothing has been hooked yet; what it printed."""
    given = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    command = [sys.executable, "-c", given + textwrap.dedent(code)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout + ended.stderr


@pytest.mark.engine
def test_idempotent_and_fast() -> None:
    """A second call changes nothing, and a call costs at most 50 ms of CPU."""
    fresh(ARGUMENTS + """
import time
stock = [arg_utils.EngineArgs.__dict__[name] for name in ("add_cli_args", "create_engine_config")]
start = time.process_time(); register(); took = time.process_time() - start
once = [arg_utils.EngineArgs.__dict__[name] for name in ("add_cli_args", "create_engine_config")]
register()
twice = [arg_utils.EngineArgs.__dict__[name] for name in ("add_cli_args", "create_engine_config")]
assert all(a is not b for a, b in zip(stock, once)), "not hooked"
def inner(f):
    return getattr(f, "__func__", f)
assert all(inner(a) is inner(b) for a, b in zip(once, twice)), "hooked twice"
assert isinstance(twice[0], staticmethod)
assert took < 0.05, took
""")


def test_nothing_to_hook() -> None:
    """In a process that has not imported vLLM's arguments, register returns without importing vLLM."""
    fresh("""
        import sys
        from vllm_dwdp.entrypoints.plugin import register
        register()
        assert not [name for name in sys.modules if name.split(".")[0] in ("vllm", "torch")]
    """)


@pytest.mark.engine
def test_plugins_loaded_before_arguments(models) -> None:
    """A program that loads vLLM's plugins first, even twice, has DWDP once it imports vLLM's arguments, and no sooner."""
    fresh("""
import sys
from vllm.plugins import load_general_plugins
from vllm_dwdp.entrypoints import plugin
before = len(sys.meta_path)
load_general_plugins()
plugin.register()
assert "vllm.engine.arg_utils" not in sys.modules and len(sys.meta_path) == before + 1
""" + WATCHED + """
made = configure({"dwdp": {}})
assert made.parallel_config.worker_cls == "vllm_dwdp.integration.worker.DWDPWorker", made.parallel_config.worker_cls
assert configure(None).parallel_config.worker_cls != made.parallel_config.worker_cls
import argparse
assert "--parallel" in arg_utils.EngineArgs.add_cli_args(argparse.ArgumentParser()).format_help()
""", model=models("qwen3_moe"))


@pytest.mark.parametrize(
    ("attribute", "other", "named"),
    [
        ("add_cli_args", None, "has no vllm.engine.arg_utils.EngineArgs.add_cli_args"),
        ("create_engine_config", None, "has no vllm.engine.arg_utils.EngineArgs.create_engine_config"),
        ("add_cli_args", staticmethod(lambda p: p), "EngineArgs.add_cli_args no longer takes parser"),
        ("create_engine_config", lambda this: None, "EngineArgs.create_engine_config no longer takes self"),
    ],
)
def test_another_vllm(monkeypatch, attribute: str, other: Any, named: str) -> None:
    """Where an attribute is gone or takes other parameters, register warns, names it and leaves it alone."""
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.delattr(EngineArgs, attribute)
    if other is not None:
        monkeypatch.setattr(EngineArgs, attribute, other, raising=False)
    warnings = []
    monkeypatch.setattr(logging.getLogger("vllm.dwdp"), "warning", lambda text, *args: warnings.append(text % args))
    plugin.register()
    assert len(warnings) == 1 and "vllm-dwdp is off" in warnings[0] and named in warnings[0]
    assert EngineArgs.__dict__.get(attribute) is other


WATCHED = ARGUMENTS + """
from vllm.v1.engine import core, utils
def watched():
    return (core.EngineCoreProc.run_engine_core, core.DPEngineCoreProc, utils.DPCoordinator,
            utils.wait_for_engine_startup, sys.excepthook)
def configure(additional):
    return arg_utils.EngineArgs(
        model=model, skip_tokenizer_init=True, dtype="float32", max_model_len=64, data_parallel_size=2,
        **({} if additional is None else {"additional_config": additional}),
    ).create_engine_config()
"""


@pytest.mark.engine
def test_switch_off(models) -> None:
    """A config without the switch keeps vLLM's worker, options, engine, launcher and excepthook."""
    fresh(WATCHED + """
class Other(list):
    def compute_hash(self):
        return "other"
cases = [None, {}, {"other": {"slots": 2}}, Other(), Other(["dwdp"])]
before, stocks = watched(), [configure(case) for case in cases]
register()
for case, stock in zip(cases, stocks):
    made = configure(case)
    assert watched() == before, case
    assert made.parallel_config.worker_cls == stock.parallel_config.worker_cls != "vllm_dwdp.integration.worker.DWDPWorker"
    assert made.additional_config == stock.additional_config == ({} if case is None else case)
    assert type(made.additional_config) is type(stock.additional_config)
    assert made.compute_hash() == stock.compute_hash()
    assert "vllm_dwdp.integration.launch" not in sys.modules
made = configure({"dwdp": {}})
assert [a is not b for a, b in zip(watched(), before)] == [True, False, True, True, True], "the test sees no hook"
assert made.parallel_config.worker_cls == "vllm_dwdp.integration.worker.DWDPWorker"
""", model=models("qwen3_moe"))


@pytest.mark.parametrize("value", ["[1]", '"dwdp"', "7"])
def test_switch_off_on_the_command_line(value: str) -> None:
    """A command line without the switch keeps whatever it gives as --additional-config."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--additional-config", type=json.loads)
    plugin._add_cli_args(lambda parser: parser, parser)
    assert parser.parse_args(["--additional-config", value]).additional_config == json.loads(value)
    with pytest.raises(SystemExit):
        parser.parse_args(["--additional-config", value, "--parallel", "dwdp"])
