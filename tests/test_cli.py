"""Invariant: the options reach `additional_config` by every way in, or the command ends with one line and status 2."""

import re
from pathlib import Path

import msgspec
import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

import vllm_dwdp.entrypoints.plugin as plugin
from vllm_dwdp.config import Options, describe, is_on, parse
from vllm_dwdp.entrypoints import cli

import forks


@pytest.fixture(scope="module")
def engine_parser() -> FlexibleArgumentParser:
    plugin.register()
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


ON = ["--parallel", "dwdp"]
JSON = ["--additional-config", '{"mine": 1, "dwdp": {"slots": 3, "timing": true}}']
MANY = ["--dwdp-slots", "4", "--dwdp-cache-gib", "1.5", "--dwdp-rendezvous", "host:1", "--no-dwdp-timing"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], {}),
        (JSON, {"mine": 1, "dwdp": {"slots": 3, "timing": True}}),
        (ON, {"dwdp": {}}),
        ([*ON, *JSON], {"mine": 1, "dwdp": {"slots": 3, "timing": True}}),
        ([*JSON, *ON], {"mine": 1, "dwdp": {"slots": 3, "timing": True}}),
        (["--dwdp-slots", "2", *JSON, *ON], {"mine": 1, "dwdp": {"slots": 2, "timing": True}}),
        ([*ON, *MANY], {"dwdp": {"slots": 4, "cache_gib": 1.5, "rendezvous": "host:1", "timing": False}}),
        ([*MANY, *JSON, *ON],
         {"mine": 1, "dwdp": {"slots": 4, "cache_gib": 1.5, "rendezvous": "host:1", "timing": False}}),
        ([*ON, "--dwdp-cache-gib=auto"], {"dwdp": {"cache_gib": "auto"}}),
        ([*ON, "--dwdp-direct-max-tokens", "0"], {"dwdp": {"direct_max_tokens": 0}}),
    ],
    ids=" ".join,
)
def test_merge(engine_parser, serve_parser, models, given: list[str], expected: dict) -> None:
    """Options, JSON and switch add up in any order; an option wins over JSON. `vllm serve` carries the same."""
    model = models("qwen3_moe")
    for parser, arguments in ((engine_parser, ["--model", model]), (serve_parser, ["serve", model])):
        namespace = parser.parse_args([*arguments, *given])
        namespace.model = model  # as the serve command does with its positional argument
        assert (namespace.additional_config or {}) == expected
        assert (AsyncEngineArgs.from_cli_args(namespace).additional_config or {}) == expected


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--dwdp-slots", "2"], "--dwdp-slots needs --parallel dwdp"),
        (["--dwdp-direct-max-tokens", "0"], "--dwdp-direct-max-tokens needs --parallel dwdp"),
        (["--no-dwdp-timing"], "--dwdp-timing needs --parallel dwdp"),
        (["--dwdp-slotz", "2"], "--dwdp-slotz is no option; did you mean --dwdp-slots?"),
        ([*ON, "--no-dwdp-timng"], "--no-dwdp-timng is no option; did you mean --dwdp-timing?"),
        ([*ON, "--dwdp-xyz=1"], "--dwdp-xyz is no option; there are --dwdp-size, --dwdp-rank"),
        ([*ON, "--dwdp-slots", "many"], "--dwdp-slots is 'many': it must be a whole number from 2 to 8"),
        ([*ON, "--dwdp-slots", "2.5"], "--dwdp-slots is 2.5: it must be a whole number from 2 to 8"),
        ([*ON, "--dwdp-slots", "99"], "--dwdp-slots is 99: it must be a whole number from 2 to 8"),
        ([*ON, "--dwdp-cache-gib", "all"], "--dwdp-cache-gib is 'all': it must be a number from 0 or auto"),
        ([*ON, "--dwdp-dispatch", "warm"], "--dwdp-dispatch is 'warm': it must be auto or off"),
        ([*ON, "--dwdp-rendezvous", "nowhere"], "--dwdp-rendezvous is 'nowhere': it must be HOST:PORT"),
        ([*ON, "--additional-config", '{"dwdp": {"slotz": 2}}'],
         "additional_config['dwdp']['slotz'] is no option; did you mean additional_config['dwdp']['slots']?"),
        ([*ON, "--dwdp-size", "2", "--additional-config", '{"dwdp": {"slots": 9}}'],
         "additional_config['dwdp']['slots'] is 9: it must be a whole number from 2 to 8"),
        ([*ON, "--additional-config", '{"dwdp": false}'], "additional_config['dwdp'] is False"),
    ],
    ids=str,
)
def test_errors(engine_parser, serve_parser, capsys, given: list[str], named: str) -> None:
    """A wrong option ends the command with status 2 and one line that names it."""
    for parser, arguments in ((engine_parser, given), (serve_parser, ["serve", "model", *given])):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(arguments)
        printed = capsys.readouterr()
        assert ended.value.code == 2 and not printed.out
        assert printed.err.startswith("vllm-dwdp: error: ") and printed.err.count("\n") == 1 and named in printed.err


def test_unknown_mode(engine_parser, capsys) -> None:
    """argparse itself names the values that --parallel takes."""
    with pytest.raises(SystemExit) as ended:
        engine_parser.parse_args(["--parallel", "tensor"])
    assert ended.value.code == 2 and "'dwdp'" in capsys.readouterr().err.splitlines()[-1]


def test_help_tells_defaults_and_choices(serve_parser, capsys) -> None:
    """Each field of Options is an option of `vllm serve` whose help says what happens without it."""
    with pytest.raises(SystemExit):
        serve_parser.parse_args(["serve", "--help=DWDP"])
    shown = " ".join(capsys.readouterr().out.split())
    shown = shown[shown.index("Distributed Weight Data Parallelism"):]
    assert "(default: None)" not in shown and "==SUPPRESS==" not in shown
    for field in msgspec.structs.fields(Options):
        text, default = describe(field)
        assert f"--dwdp-{field.name.replace('_', '-')}" in shown and len(text) > 8 and default
        assert shown.count(f"(default: {default})") >= 1, field.name
    assert "--dwdp-dispatch {auto,off}" in shown and "--dwdp-rendezvous VALUE" in shown and "(default: 2)" in shown


def test_help_of_bench_tells_both_defaults(capsys) -> None:
    """Where servers have another than engines."""
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: dwdp,ep,tp,single); with --serve: dwdp,ep,tp" in shown and "(default: 3); with --serve: 1" in shown


@pytest.mark.parametrize(
    "additional_config", [None, {}, {"mine": 1}, [1], 7, object(), "dwdp", frozenset({"dwdp"})], ids=lambda value: type(value).__name__
)
def test_switched_off_by_anything_but_its_key(additional_config: object) -> None:
    """vLLM lets `additional_config` be any object that it can hash: only a dict with the key is ours."""
    assert not is_on(additional_config) and parse(additional_config) is None


def test_version(capsys) -> None:
    """`vllm-dwdp --version` says which vLLM it found."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"vllm-dwdp \d+\.\d+\.\d+, vLLM \d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.engine
def test_refusal_is_one_line(models, tmp_path: Path) -> None:
    """What is refused after parsing ends the process with one line instead of a stack, status 1."""
    code = (
        "from vllm.engine.arg_utils import EngineArgs; from vllm_dwdp.entrypoints import plugin; plugin.register();"
        f"EngineArgs(model={models('qwen3_moe')!r}, skip_tokenizer_init=True, data_parallel_size=13, max_model_len=64,"
        "additional_config={'dwdp': {}}).create_engine_config()"
    )
    status, said = forks.run(forks.script, code, log=tmp_path / "log", timeout_s=120)
    assert status == 1
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("vllm-dwdp: error: 13 ranks cannot share 12 experts")
