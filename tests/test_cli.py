"""Invariant: the options reach `additional_config` by every way in, or the command ends with one line and status 2."""

import subprocess
import sys

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

import vllm_dwdp.entrypoints.plugin as plugin
from vllm_dwdp.config import Options


@pytest.fixture(scope="module")
def engine_parser() -> FlexibleArgumentParser:
    plugin.register()
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


@pytest.fixture(scope="module")
def serve_parser() -> FlexibleArgumentParser:
    """`vllm serve`'s own, a subparser of `vllm`."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    plugin.register()
    parser = FlexibleArgumentParser(prog="vllm")
    ServeSubcommand().subparser_init(parser.add_subparsers())
    return parser


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
        ([*ON, "--dwdp-slots", "many"], "$.slots"),
        ([*ON, "--dwdp-slots", "2.5"], "$.slots"),
        ([*ON, "--dwdp-slots", "99"], "$.slots"),
        ([*ON, "--dwdp-cache-gib", "all"], "$.cache_gib"),
        ([*ON, "--dwdp-rendezvous", "nowhere"], "$.rendezvous"),
        ([*ON, "--additional-config", '{"dwdp": {"slotz": 2}}'], "slotz"),
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


def test_every_option_has_help(engine_parser) -> None:
    """Each field of Options is an option of the command line, with a help text."""
    actions = {action.dest: action for action in engine_parser._actions}
    for name in Options.__struct_fields__:
        assert len(actions[f"dwdp_{name}"].help) > 20, name


def test_refusal_is_one_line(models) -> None:
    """What is refused after parsing ends the process with one line instead of a stack, status 1."""
    code = (
        "from vllm.engine.arg_utils import EngineArgs; from vllm_dwdp.entrypoints import plugin; plugin.register();"
        f"EngineArgs(model={models('qwen3_moe')!r}, skip_tokenizer_init=True, data_parallel_size=13, max_model_len=64,"
        "additional_config={'dwdp': {}}).create_engine_config()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("vllm-dwdp: error: 13 ranks cannot share 12 experts")
