"""Invariant: the comparison of servers measures each mode that serves, names one that does not, leaves nothing behind."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dwdp.entrypoints import cli
from vllm_dwdp.entrypoints.bench import client, front, loads, serve
from vllm_dwdp.entrypoints.bench.loads import FIGURES, Load, names, put_under_load
from vllm_dwdp.entrypoints.bench.serve import ServeSettings, Serving
from vllm_dwdp.entrypoints.server import Session, SessionFailure

from harness import await_that, processes_in

SERVE_ARGS = (
    "--dtype float32 --enforce-eager --max-model-len 256 --max-num-batched-tokens 128 --kv-cache-memory-bytes 64000000 "
    "--distributed-executor-backend uni"
)
BROKEN = "dwdp+dispatch_max_tokens=99999999"  # a few hundred are possible
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def bare(model: str, folder: Path) -> str:
    """The model without its tokenizer."""
    return str(shutil.copytree(model, folder / "bare", ignore=lambda *_: TOKENIZER))


@pytest.mark.engine
def test_side_by_side(models, tmp_path: Path) -> None:
    """One load on real servers, a tokenizer made for them. A server that does not start is named, and the rest goes on."""
    command = [
        sys.executable, "-m", "vllm_dwdp.entrypoints.cli", "bench", "--serve", "--model",
        bare(models("qwen3_moe"), tmp_path), "--modes", f"dwdp,{BROKEN}", "--side-by-side",
        "--loads", "64:8:inf:16,64:1:inf:8@1+16:8:4:8@0",
        "--serve-args", SERVE_ARGS, "--timeout", "120", "--out", "out",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    written = json.loads((tmp_path / "out" / "serving.json").read_text())
    measured, prompts, chat = written["measured"]
    assert [(each["mode"], each["load"]) for each in written["measured"]] == [
        ("dwdp", "64:8:inf:16"), ("dwdp", "64:1:inf:8@1 beside 16:8:4:8@0"), ("dwdp", "16:8:4:8@0 beside 64:1:inf:8@1"),
    ]
    assert chat["median_tpot_ms"] > 0 == prompts["median_tpot_ms"] and chat["request_throughput"] < 6
    assert measured["median_ttft_ms"] > 0 < measured["request_throughput"] and measured["dwdp"]["prefetch_bytes"] > 0
    assert written["versions"]["vllm"] and written["devices"] and "--serve" in written["command"]
    assert list(written["failed"]) == [BROKEN] and f"serve-{BROKEN}.log" in written["failed"][BROKEN]
    assert any(line.split()[:2] == ["64:8:inf:16", "dwdp"] for line in ended.stdout.splitlines())
    assert f"{BROKEN} failed: " in ended.stdout
    assert (tmp_path / "out" / "serving.png").read_bytes().startswith(b"\x89PNG")
    await_that(lambda: not processes_in(tmp_path), "Python's resource tracker to end", 5)


def figures(requests_per_s: float) -> dict[str, float]:
    return dict.fromkeys(FIGURES, 10.0) | {"request_throughput": requests_per_s, "total_token_throughput": 400.0}


@pytest.fixture
def idle_servers(models, tmp_path, monkeypatch):
    """Servers that only sleep, so that the order of loads shows; `put_under_load` is the test's."""
    class Sleeper(Session):
        def __init__(self, model, arguments, log):
            self.command, self.woken = ["vllm", "serve", model, *arguments], []
            super().__init__(["sleep", "600"], log, folder=tmp_path)

        def wait_until_ready(self, timeout_s, waiting):
            return 0.0

    monkeypatch.setattr(serve, "Server", Sleeper)
    monkeypatch.setattr(serve, "warm_up", lambda server, load, model: server.woken.append(load))
    monkeypatch.setattr(serve, "counted", lambda _: {})
    entered = []

    @contextlib.contextmanager
    def importing():
        assert not entered, "a process imports once: Python's fork server does not start again"
        entered.append(True)
        yield

    monkeypatch.setattr(serve.client, "importing", importing)
    monkeypatch.chdir(tmp_path)
    yield models("qwen3_moe")
    assert processes_in(tmp_path) == []


@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_sweep_gives_all_modes_the_rates_of_the_first(idle_servers, monkeypatch, side_by_side) -> None:
    asked = []

    def put_under_load(server, mix, **rest):
        mode = "tp" if "--tensor-parallel-size" in server.command else "dwdp"
        asked.extend((mode, load.rate) for load in mix)
        return [figures(8.0 if mode == "dwdp" else 4.0)]

    monkeypatch.setattr(serve, "put_under_load", put_under_load)
    settings = ServeSettings(model=idle_servers, modes=("dwdp", "tp"), sweep="64:8:32", side_by_side=side_by_side)
    assert Serving(settings).run() == 0
    for mode in settings.modes:
        assert [rate for each, rate in asked if each == mode] == [float("inf"), 2, 4, 6]
    assert [mode for mode, _ in asked] == (["dwdp", "tp"] * 4 if side_by_side else ["dwdp"] * 4 + ["tp"] * 4)


def test_loads_of_a_rank_go_to_all_where_ranks_are_one(idle_servers, monkeypatch) -> None:
    """After a few requests like each of them."""
    asked, woken = [], []

    def put_under_load(server, mix, **rest):
        asked.append([load.rank for load in mix])
        woken.append([str(load) for load in server.woken])
        return [figures(8.0) for _ in mix]

    monkeypatch.setattr(serve, "put_under_load", put_under_load)
    settings = ServeSettings(model=idle_servers, modes=("dwdp", "tp"), loads=("64:8:inf:1@0+64:1:2:1@1",))
    assert Serving(settings).run() == 0 and asked == [[0, 1], [None, None]]
    measured = json.loads(Path("dwdp-bench/serving.json").read_text())["measured"]
    assert woken == [["64:8:inf:1@0", "64:1:2:1@1"]] * 2
    assert [each["load"] for each in measured] == ["64:8:inf:1@0 beside 64:1:2:1@1", "64:1:2:1@1 beside 64:8:inf:1@0"] * 2


@pytest.mark.parametrize(("raised", "status"), [(KeyboardInterrupt(), 130), (SessionFailure("gone"), 1)], ids=str)
def test_what_was_measured_is_reported(idle_servers, monkeypatch, capsys, raised, status) -> None:
    """An interrupt or a failure at the second load leaves the first load's figures."""
    def put_under_load(server, mix, **rest):
        if mix[0].output_len == 9:
            raise raised
        return [figures(8.0)]

    monkeypatch.setattr(serve, "put_under_load", put_under_load)
    assert Serving(ServeSettings(model=idle_servers, modes=("dwdp",), loads=("64:8:inf:1", "64:9:inf:1"))).run() == status
    (measured,) = json.loads(Path("dwdp-bench/serving.json").read_text())["measured"]
    assert measured["load"] == "64:8:inf:1"
    assert any(line.split()[:3] == ["64:8:inf:1", "dwdp", "8.00"] for line in capsys.readouterr().out.splitlines())


@pytest.mark.engine
def test_a_signal_ends_the_servers(models, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vllm_dwdp.entrypoints.cli", "bench", "--serve", "--model", models("qwen3_moe"),
               "--modes", "dwdp", "--loads", "64:8:inf:16", "--serve-args", SERVE_ARGS]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ, stdout=subprocess.DEVNULL)
    await_that(lambda: len(processes_in(tmp_path)) >= 2, "the server to start")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    await_that(lambda: not processes_in(tmp_path), "Python's resource tracker to end", 5)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([], "--serve needs --loads IN:OUT:RATE:COUNT,... or --sweep"),
        (["--loads", "64:8:16"], "--loads has '64:8:16': it must be IN:OUT:RATE:COUNT[@RANK]"),
        (["--loads", "64:8:0:16"], "--loads has '64:8:0:16'"),
        (["--loads", "64:8:1:16@1+64:8:1:16@2"], "--loads has 64:8:1:16@2: ranks of --size 2 count from 0 to 1"),
        (["--loads", "64:8:1:16", "--side-by-side"], "--side-by-side needs --kv-cache-memory-bytes in --serve-args: servers"),
        (["--loads", "64:8:1:16", "--side-by-side", "--serve-args", "--kv_cache_memory_bytes=1 --port=1"], "--serve-args sets --port"),
        (["--loads", "64:8:1:16", "--timeout", "1e7"], "--timeout is '1e7'"),
        (["--loads", "64:8:1:16@"], "--loads has '64:8:1:16@': it must be IN:OUT:RATE:COUNT[@RANK]"),
        (["--loads", "64:8:1:16@x"], "--loads has '64:8:1:16@x': it must be IN:OUT:RATE:COUNT[@RANK]"),
        (["--sweep", "64:8:inf:16"], "--sweep has '64:8:inf:16': it must be IN:OUT:COUNT"),
        (["--sweep", "64:8:1", "--ratio", "0.5"], "--ratio does not go with --serve"),
        (["--sweep", "64:8:1", "--modes", "single"], "--modes has single, which is none of dwdp"),
        (["--sweep", "64:8:1", "--modes", "dwdp+slotz=3"], "slotz in --modes is no option"),
        (["--sweep", "64:8:1", "--modes", "dwdp", "--model", "/nowhere"], "there is no folder /nowhere"),
        (["--sweep", "9000:8:1", "--modes", "dwdp"], "--sweep ask for 9008 tokens in a sequence, "),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_in_one_line(models, capsys, given, named) -> None:
    assert cli.main(["bench", "--serve", "--model", models("qwen3_moe"), *given]) == 2
    said = capsys.readouterr()
    assert named in said.err and said.err.count("\n") == 1 and not said.out


def test_the_front_has_a_line_a_mode(tmp_path: Path) -> None:
    """Tokens/s per user are 1000 / TPOT; a load without further tokens has none."""
    beside, mixed = (names(tuple(map(Load.of, both)))[0] for both in (("64:8:2:9@0", "64:1:2:9@1"), ("64:8:2:9", "16:8:1:4")))
    measured = [
        front.Measured(mode=mode, load=load, repeat=repeat, dwdp={}, **figures(repeat) | {"median_tpot_ms": tpot_ms})
        for mode in ("dwdp", "ep") for repeat in (1, 3)
        for load, tpot_ms in (("64:8:2:9", 20.0), ("64:8:inf:9", 50.0), ("64:1:2:9", 0.0), (beside, 10.0), (mixed, 10.0))
    ]
    rows = front.summarize(["dwdp", "ep"], ["64:8:2:9", "64:8:inf:9", "64:1:2:9", beside, mixed], measured, 2)
    assert [row.tokens_per_s_per_user for row in rows] == [50, 50, 20, 20, None, None, 100, 100, 100, 100]
    assert front.points(rows) == rows[:4], "ranks with loads of their own make no point, nor do loads that share a server"
    assert {(row.tokens_per_s_per_gpu, row.requests_per_s) for row in rows} == {(200, 2)}
    front.picture(rows, "title", tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


class Client:
    exitcode = None

    def __init__(self) -> None:
        self.bounds_s: list[float] = []

    def join(self, timeout_s: float) -> None:
        self.bounds_s.append(timeout_s)


def test_a_process_that_ends_is_quoted(tmp_path: Path) -> None:
    said = r"^start: the process ended with status 3, see \S+, whose last line is: what is wrong$"
    session = Session(["bash", "-c", "echo first; echo ' what is wrong '; echo; exit 3"], tmp_path / "log")
    with session, pytest.raises(SessionFailure, match=said):
        session.wait_until(lambda: False, "start", 30)


def test_a_load_may_take_the_time_in_which_its_requests_come(monkeypatch, tmp_path: Path) -> None:
    """And files of its own; a server that has ended is named before its clients."""
    idle, commands = Client(), []
    monkeypatch.setattr(loads.client, "barrier", lambda count: None)
    monkeypatch.setattr(loads.client, "started", lambda *given: (commands.append(given[0]), contextlib.nullcontext(idle))[1])
    server = SimpleNamespace(url="", has_ended=lambda: False, process=SimpleNamespace(returncode=3), log="server.log")
    asked = dict(seed=1, model="m", tokenizer="t", logs=tmp_path / "dwdp", timeout_s=900)
    slow = Load.of("2048:256:0.375:400")
    with pytest.raises(SessionFailure, match=r"not done after 1966\.67 s"):
        put_under_load(server, (slow, slow), **asked)
    assert idle.bounds_s == [pytest.approx(900 + 400 / 0.375, abs=5)]
    assert len({command[command.index("--result-filename") + 1] for command in commands}) == len(commands) == 2
    server.has_ended = lambda: True
    with pytest.raises(SessionFailure, match="the server ended with status 3, see server"):
        put_under_load(server, (slow,), **asked)


def test_a_load_that_is_given_twice_is_measured_once() -> None:
    settings = ServeSettings(model="m", loads=("64:8:2:9", "64:8:2.0:9", "64:8:inf:9"), sweep="64:8:9")
    assert settings.first_mixes == [(Load.of("64:8:2:9"),), settings.saturation]


def test_a_mode_may_carry_what_is_true_or_false() -> None:
    told = {mode: ServeSettings(model="m", modes=(mode,)).arguments(mode)[-1] for mode in (
        "ep+async_scheduling=false", "ep+enable_dbo=true", "dwdp+timing=false", "dwdp+dispatch=off"
    )}
    assert list(told.values()) == ["--no-async-scheduling", "--enable-dbo", "--no-dwdp-timing", "--dwdp-dispatch=off"]


def prompts_made(number: int, start: Any, made: Any, began: Any, log: Path) -> None:
    """A client whose prompts take the longer the higher its number."""
    from vllm.benchmarks import serve as vllm_serve

    async def benchmark() -> None:
        began.send(made.is_set())

    def main(args: Any) -> None:
        if number:
            time.sleep(1)
            made.set()
        asyncio.run(vllm_serve.benchmark())

    vllm_serve.benchmark, vllm_serve.main = benchmark, main
    client._run(["--model", "m"], log, start)


def test_requests_of_a_mix_come_once_all_prompts_are_made(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, made, (reads, writes) = context.Barrier(2), context.Event(), context.Pipe(duplex=False)
    clients = [context.Process(target=prompts_made, args=(n, start, made, writes, tmp_path / f"{n}.log")) for n in (0, 1)]
    for each in clients:
        each.start()
    for each in clients:
        each.join(60)
    assert [each.exitcode for each in clients] == [0, 0], (tmp_path / "0.log").read_text()[-2000:]
    assert reads.recv() and reads.recv()


def test_a_load_reads_as_it_is_written() -> None:
    for text in ("2048:256:inf:400", "64:8:0.5:7", "64:8:0.5:7@1"):
        assert str(Load.of(text)) == text
