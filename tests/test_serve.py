"""The real server: two independent ranks behind vLLM's own API and load balancer."""

import functools
import http.client
import json
import os
import re
import resource
import signal
import subprocess
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_dwdp.entrypoints import server
from vllm_dwdp.entrypoints.server import QUIT_S, free_port
from vllm_dwdp.integration.metrics import UPDATE_S

import forks
from conftest import ROOT
from forks import ForkedServer
from harness import ARGUMENTS, await_that

pytestmark = pytest.mark.engine


class Server(ForkedServer):
    """A server of ours. `url` answers once the constructor returns."""

    def __init__(self, model: str, folder: Path, *arguments: str):
        super().__init__(model, [*ARGUMENTS, *arguments], folder / f"serve-{time.monotonic_ns()}.log",
                         environment=os.environ | {"VLLM_SERVER_DEV_MODE": "1"})
        try:
            self.wait_until_ready(400)
        except BaseException:
            self.end()
            print(self.log.read_text()[-3000:])
            raise
        self.model = json.load(self.get("v1/models"))["data"][0]["id"]

    def request(
        self, prompt: str, tokens: int, rank: int | None = None, stream: bool = False
    ) -> http.client.HTTPResponse:
        """The response to a greedy completion, on the rank named or on the one that vLLM chooses."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
                "stream": stream}
        return self.post("v1/completions", body, rank)

    def complete(self, prompt: str, tokens: int, rank: int | None = None) -> str:
        """The whole text of such a completion."""
        return json.load(self.request(prompt, tokens, rank))["choices"][0]["text"]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels."""
        samples = [(carried, value) for found, carried, value in self.metrics() if found == name]
        return sum(value for carried, value in samples if labels.items() <= carried.items())

    def steps(self, rank: int) -> float:
        time.sleep(2 * UPDATE_S)  # by then the counters have settled
        return self.metric("vllm:dwdp_forwards_total", engine=str(rank))

    def engines(self) -> list[int]:
        """Process ids of the engines, rank 0 first."""
        found = re.findall(r"\(EngineCore_DP(\d) pid=(\d+)\)", self.log.read_text())
        return [int(pid) for _, pid in sorted(set(found))]


class Spawned(Server):
    """One whose processes all import vLLM, as a user's do."""

    _start = server.Session._start


MULTI_PORT = ["--parallel", "dwdp", "--data-parallel-size-local", "2", "--data-parallel-multi-port-external-lb",
              "--data-parallel-supervisor-port"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module", name="server")
def serving(models, folder: Path):
    with Spawned(models("qwen3_moe"), folder, "--data-parallel-size", "2", "--parallel", "dwdp",
                 "--dwdp-direct-max-tokens", "0", "--dwdp-dispatch", "off") as server:  # dispatch: test_dispatch.py
        yield server


def test_both_ranks_serve_and_answer_alike(server: Server) -> None:
    """vLLM's load balancer uses both ranks; either gives the same text; each streamed its missing experts."""
    before = [server.steps(rank) for rank in (0, 1)]
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: server.complete("A mixture of experts", 8), range(16)))
    assert len(set(texts)) == 1 and len(texts[0]) > 3
    assert all(server.steps(rank) > was for rank, was in zip((0, 1), before, strict=True))
    assert {server.complete("A mixture of experts", 8, rank=rank) for rank in (0, 1)} == set(texts)
    for rank in ("0", "1"):
        assert server.metric("vllm:dwdp_prefetch_bytes_total", engine=rank) > 0
        assert server.metric("vllm:dwdp_experts", engine=rank, kind="owned") == 6
        assert server.metric("vllm:dwdp_refills_total", engine=rank) == 0


def test_the_log_says_that_dwdp_is_on(server: Server) -> None:
    """One line a rank, in the reader's words; what a step moves is what the counters then count."""
    log = server.log.read_text()
    line = (r"DWDP on: rank (\d) of 2 owns 6 of 12 experts in each of (\d+) layers, "
            r"streams ([\d.]+) MiB in a step that is not dispatched and has more than 0 tokens, holds")
    found = re.findall(line, log)
    assert sorted(rank for rank, *_ in found) == ["0", "1"] and log.count("DWDP on") == 2
    assert "direct_max_tokens=" not in log
    steps, fetched = server.steps(0), server.metric("vllm:dwdp_prefetch_bytes_total", engine="0")
    server.complete("Once upon a time", 20, rank=0)
    taken = server.steps(0) - steps
    moved = (server.metric("vllm:dwdp_prefetch_bytes_total", engine="0") - fetched) / taken
    assert abs(moved / 2**20 - float(found[0][2])) < 0.01


def test_an_idle_rank_takes_no_steps(server: Server) -> None:
    """No dummy batch and no wave: while rank 0 works, rank 1 runs nothing at all; one step a token on rank 0."""
    before = [server.steps(rank) for rank in (0, 1)]
    server.complete("Once upon a time", 40, rank=0)
    after = [server.steps(rank) for rank in (0, 1)]
    assert after[1] == before[1] and after[0] - before[0] in (40, 41)


def test_a_rank_frozen_in_mid_request_delays_no_other(server: Server) -> None:
    """The other rank goes on reading its memory and answers; the frozen one ends its own request when it may run."""
    frozen, short = server.engines()[0], set()
    for _ in range(5):  # on a busy machine the request may be over before it can be frozen
        end = server.steps(0) + 1200
        with server.request("Once upon a time", 1200, rank=0, stream=True) as long:
            assert long.readline().startswith(b"data:")
            os.kill(frozen, signal.SIGSTOP)
            try:
                threads = Path(f"/proc/{frozen}/task")
                while not all("(stopped)" in thread.read_text() for thread in threads.glob("*/status")):
                    time.sleep(0.001)
                time.sleep(0.5)  # a step that was under way in a worker process may yet end
                if (at := server.steps(0)) < end:
                    short = {server.complete("A mixture of experts", 8, rank=1) for _ in range(3)}
                    assert server.steps(0) == at, "rank 0 was in the middle of its request all the time"
            finally:
                os.kill(frozen, signal.SIGCONT)
            assert b"[DONE]" in long.read() and server.steps(0) >= end
        if short:
            break
    assert short == {server.complete("A mixture of experts", 8, rank=0)}


@pytest.mark.parametrize(
    ("path", "body"),
    [("sleep", {}), ("sleep?level=2&mode=keep", {}), ("release_kv_cache_memory", {}), ("start_weight_update", {}),
     ("weight_checker", {"action": "reset"}), ("collective_rpc", {"method": "sleep"})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refused_request_leaves_the_server_as_it_was(server: Server, path: str, body: dict) -> None:
    """It is an error, and afterwards every rank answers as before: none is paused, none takes itself for asleep."""
    before = [server.complete("A mixture of experts", 8, rank=rank) for rank in (0, 1)]
    with pytest.raises(urllib.error.HTTPError):
        server.post(path, body)
    assert json.load(server.get("is_sleeping")) == {"is_sleeping": False}
    assert [server.complete("A mixture of experts", 8, rank=rank) for rank in (0, 1)] == before


def test_memory_of_a_paused_server_stays(server: Server) -> None:
    """What vLLM only lets happen after a pause is refused too, and the server resumes."""
    server.post("pause", {})
    with pytest.raises(urllib.error.HTTPError):
        server.post("release_kv_cache_memory", {})
    server.post("resume", {})
    assert json.load(server.get("is_sleeping")) == {"is_sleeping": False}
    assert all(server.complete("A mixture of experts", 8, rank=rank) for rank in (0, 1))


def test_ranks_started_apart(models, folder: Path, server: Server) -> None:
    """Two `vllm serve` commands, one rank each, behind a balancer of the user's own, answer as the one server does."""
    group = ["--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(free_port()), "--parallel", "dwdp",
             "--dwdp-rendezvous", f"127.0.0.1:{free_port()}", "--data-parallel-size", "2", "--data-parallel-rank"]
    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(lambda rank: Server(models("qwen3_moe"), folder, *group, str(rank)), range(2)))
    try:
        expected = server.complete("A mixture of experts", 8)
        assert [rank.complete("A mixture of experts", 8) for rank in ranks] == [expected] * 2
        assert all(f"DWDP on: rank {number} of 2" in rank.log.read_text() for number, rank in enumerate(ranks))
    finally:
        for rank in ranks:
            rank.end(QUIT_S)


def test_help_shows_the_switch(tmp_path: Path) -> None:
    """`vllm serve --help=parallel` finds the option."""
    status, shown = forks.run(forks.vllm, ["serve", "--help=parallel"], log=tmp_path / "log", timeout_s=120)
    assert status == 0 and "--parallel {dwdp}" in shown and "Stream MoE experts" in shown


@pytest.mark.parametrize(
    ("arguments", "word", "forked"),
    [(["--data-parallel-size", "2", "--enable-expert-parallel"], "--enable-expert-parallel", True),
     ([], "--data-parallel-size", False)],
    ids=["expert-parallel", "one-rank"],
)
def test_refusals_are_the_last_line(models, tmp_path: Path, arguments: list[str], word: str, forked: bool) -> None:
    """A wrong setting ends `vllm serve` with one line of ours, before anything is loaded."""
    arguments = ["serve", models("qwen3_moe"), *ARGUMENTS, "--parallel", "dwdp", *arguments]
    if forked:
        status, said = forks.run(forks.vllm, arguments, log=tmp_path / "log", timeout_s=120)
    else:
        ended = subprocess.run([*server.VLLM, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT)
        status, said = ended.returncode, ended.stderr
    last = said.strip().splitlines()[-1]
    assert status != 0 and last.startswith("vllm-dwdp: error: ") and word in last
    assert "Traceback" not in said and "Loading safetensors" not in said


def test_killed_rank_ends_the_server_and_a_restart_works(models, folder: Path, server: Server) -> None:
    """Kill -9 of one engine: vLLM's front end stops the whole server, as for any engine. Nothing is left behind.

    Nor is it where the launcher itself is killed: all that it started notices and ends.
    """
    os.kill(server.engines()[1], signal.SIGKILL)
    assert server.process.wait(60) != 0
    await_that(lambda: not server.members(), "what the server started to end", 30)  # resource trackers free memory first
    with Server(models("qwen3_moe"), folder, "--data-parallel-size", "2", "--parallel", "dwdp") as again:
        assert len(again.complete("A mixture of experts", 8)) > 3
        assert_all_end_with_launcher(again)


def assert_all_end_with_launcher(session: server.Session) -> None:
    started = session.members()
    assert len(started) > 3
    os.kill(session.process.pid, signal.SIGKILL)
    session.process.wait(10)
    await_that(lambda: not session.members(), f"the {len(started)} processes of a killed launcher to end", 10)


def test_one_launcher_for_a_server_a_rank(models, folder: Path) -> None:
    """Its ranks find each other without an option, answer alike, and end with it when it is killed."""
    supervisor = free_port()
    arguments = [*ARGUMENTS, *MULTI_PORT, str(supervisor), "--data-parallel-size", "2"]
    with ForkedServer(models("qwen3_moe"), arguments, folder / "supervised.log") as session:
        first = int(session.url.rsplit(":", 1)[1])
        session.url = f"http://127.0.0.1:{supervisor}"
        session.wait_until_ready(300)
        body = {"prompt": "A mixture of experts", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        texts = set()
        for port in (first, first + 1):
            session.url = f"http://127.0.0.1:{port}"
            texts.add(json.load(session.post("v1/completions", body))["choices"][0]["text"])
        assert len(texts) == 1 and len(texts.pop()) > 3
        assert_all_end_with_launcher(session)


def test_what_fails_after_launch_is_the_last_line(models, tmp_path: Path) -> None:
    """The sentence for which a rank, or a server that a supervisor started, has ended; the status is not 0."""
    rank_1 = ["--data-parallel-size", "2", "--data-parallel-rank", "1", "--dwdp-startup-timeout-s", "5",
              "--dwdp-rendezvous", f"127.0.0.1:{free_port()}", "--data-parallel-rpc-port", str(free_port())]
    ways = {
        "rank 1 waits for the server of rank 0 at 127.0.0.1:": ["--parallel", "dwdp", *rank_1],
        "ranks started by separate commands need a meeting point": [*MULTI_PORT, str(free_port()),
                                                                     "--data-parallel-size", "4"],
        "open files for the memory that ranks hand over, and may have 300": [
            "--parallel", "dwdp", "--data-parallel-size", "2", "--api-server-count", "1"],
    }

    def end(said: str) -> tuple[int, str]:
        few = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (300, 300)) if "300" in said else None
        model = models("qwen3_moe", num_hidden_layers=48) if few else models("qwen3_moe")
        arguments = ["serve", model, "--port", str(free_port()), *ARGUMENTS, "--data-parallel-address", "127.0.0.1", *ways[said]]
        return forks.run(forks.vllm, arguments, few, log=tmp_path / f"{free_port()}.log", timeout_s=200)

    with ThreadPoolExecutor(3) as pool:
        for said, (status, output) in zip(ways, pool.map(end, ways), strict=True):
            last = output.strip().splitlines()[-1]
            assert status != 0 and last.startswith("vllm-dwdp: error: ") and said in last, output[-3000:]
