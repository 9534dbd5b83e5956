"""The fault matrix: servers on CPU, each of whose processes ends or stops at each phase; writes docs/faults.md.

    python tests/faults.py [--only PATTERN] [--again]    # rows that the page has are kept, unless --again

`make faults ONLY=PATTERN` runs it; PATTERN is a regular expression on "fault | process | phase".
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil

from vllm_dwdp.entrypoints.server import QUIT_S, VLLM, Server, Session, SessionFailure, free_port

import conftest  # vLLM's environment
from harness import ARGUMENTS, WORKERS, await_that
from tiny_models import make_model

PAGE = conftest.ROOT / "docs" / "faults.md"
HEAD = """# Faults

Made by `make faults` (tests/faults.py): `vllm serve` of a tiny model on two ranks on CPU, real processes. Each row is one
fault; *read* is what a person or client reads last, *s* how long until all had ended or went on, *left* processes and
files of shared memory, *restart* whether the next start served. Rows that were not run are absent. A row is of the day's
code on which it was run, which `git blame` tells.

| fault | process | phase | read | s | left | restart |
|---|---|---|---|---|---|---|
"""
TWO = [*ARGUMENTS, *WORKERS, "--data-parallel-size", "2", "--parallel", "dwdp"]
PROCESSES = {  # by their titles
    "engine 0": r"EngineCore_DP0", "engine 1": r"EngineCore_DP1", "launcher": "", "API server": r"APIServer_0",
    "coordinator": r"DPCoordinator", "worker 1": r"VLLM::Worker",
}
START, SERVING = ("rendezvous", "loading", "migration", "warm-up"), ("idle", "prefill", "decode", "round")
ENDS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM}
START_S, END_S, STOP_S = 240, 40, 4
# Ranks wait at each phase until `PHASE.go` is there, and show by a file that they do.
PAUSES = '''
import importlib.abc, importlib.util, os, pathlib, sys, time
AT = pathlib.Path(os.environ["DWDP_FAULTS"])
PLACES = {"vllm_dwdp.integration.joining": ("meet", "rendezvous"), "vllm_dwdp.assembly": ("import_peers", "migration"),
          "vllm_dwdp.integration.loading": ("refuse_oversize", "loading"), "vllm_dwdp.integration.worker": ("fit_graphs", "warm-up")}
def pausing(function, phase):
    def call(*args, **kwargs):
        (AT / f"{phase}.{os.getpid()}").touch()
        while not (AT / f"{phase}.go").exists():
            time.sleep(0.02)
        return function(*args, **kwargs)
    return call
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in PLACES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        original, (attribute, phase) = spec.loader.exec_module, PLACES[name]
        def exec_module(module):
            original(module)
            setattr(module, attribute, pausing(getattr(module, attribute), phase))
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder())
'''


class Matrix:
    """The rows so far, by (fault, process, phase), and a folder in which every process of the run works."""

    def __init__(self, only: str, again: bool):
        cells = [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in self._lines()]
        self.rows = {tuple(row[:3]): row[3:] for row in cells if len(row) == 7}
        self._only, self._again = re.compile(only), again
        self._waiting = [key for key, row in self.rows.items() if row[-1] == "not tried"]
        self.folder = Path(tempfile.mkdtemp(prefix="faults"))
        self.model = str(make_model("qwen3_moe", self.folder / "qwen3_moe"))
        self._logs = 0

    @staticmethod
    def _lines() -> list[str]:
        return [line for line in PAGE.read_text().splitlines()[8:] if line.startswith("|")] if PAGE.exists() else []

    def wants(self, *key: str) -> bool:
        return bool(self._only.search(" | ".join(key))) and (self._again or key not in self.rows)

    def add(self, key: tuple[str, ...], read: str, seconds: float | None, left: str, restart: str = "") -> None:
        read = re.sub(r"/(?!dev/)[\w.-]+/[\w./-]+/", ".../", read.replace("|", "/"))[:170]
        self.rows[key] = [read, "-" if seconds is None else f"{seconds:.1f}", left, restart or "not tried"]
        if not restart:
            self._waiting.append(key)
        self.write()

    def served(self) -> None:
        """A server serves: so did a restart after the rows that wait for one."""
        for key in self._waiting:
            self.rows[key][-1] = "yes"
        self._waiting.clear()
        self.write()

    def write(self) -> None:
        lines = [f"| {' | '.join([*key, *row])} |" for key, row in self.rows.items()]
        PAGE.write_text(HEAD + "\n".join(lines) + "\n")
        print(lines[-1] if lines else "", flush=True)

    def log(self) -> Path:
        self._logs += 1
        return self.folder / f"{self._logs}.log"

    def server(self, *arguments: str, paused: bool = False) -> Server:
        (log := self.log()).touch()
        self._pauses = log.with_suffix("")
        self._pauses.mkdir()
        (self.folder / "sitecustomize.py").write_text(PAUSES)
        pauses = {"PYTHONPATH": str(self.folder), "DWDP_FAULTS": str(self._pauses)} if paused else {}
        return Server(self.model, [*TWO, *arguments], log, environment=os.environ | pauses, folder=self.folder)

    @contextlib.contextmanager
    def serving(self, *arguments: str) -> Iterator[Server]:
        with self.server(*arguments) as server:
            server.wait_until_ready(START_S)
            ask(server, 0).result()
            self.served()
            yield server

    def await_pause(self, phase: str) -> None:
        await_that(lambda: len(list(self._pauses.glob(f"{phase}.[0-9]*"))) == 2, f"both ranks at {phase}", START_S)

    def go(self, phase: str) -> None:
        (self._pauses / f"{phase}.go").touch()

    def left(self, shared: set[str], session: Session) -> str:
        """What is left of a session that has ended."""
        alive = [process.name() for process in session.members()]
        files = [name for name in sorted(set(os.listdir("/dev/shm")) - shared) if not is_mapped(Path("/dev/shm", name))]
        return ", ".join([*alive, *files]) or "nothing"


def is_mapped(file: Path) -> bool:
    """Whether a process lives that has the file: then it is another program's. A semaphore is mapped under another name."""
    with contextlib.suppress(OSError):
        inode = f" {file.stat().st_ino} "
        for maps in Path("/proc").glob("[0-9]*/maps"):
            with contextlib.suppress(OSError):
                if any(inode in line and "/dev/shm/" in line for line in maps.read_text().splitlines()):
                    return True
        return not file.exists()
    return True


def find(session: Session, process: str) -> psutil.Process:
    if process == "launcher":
        return psutil.Process(session.process.pid)
    title, parent = re.compile(PROCESSES[process]), None
    if process == "worker 1":
        parent = find(session, "engine 1").pid
    return next(
        each for each in session.members()
        if title.search(" ".join([each.name(), *each.cmdline()])) and parent in (None, each.ppid())
    )


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    aside = ("resource_tracker", "warnings.warn", "[shutdown]")  # of the end, after its reason
    lines = [line for line in lines if not any(word in line for word in aside)]
    return re.sub(r"^\([^)]*\) (?:\w+ [\d:. -]+\[[\w.:]+\] )?", "", lines[-1]) if lines else "nothing"


def ask(server: Server, rank: int | None, tokens: int = 8, prompt: str = "A mixture of experts") -> Future:
    """What a client reads: the text, or the error."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}

    def request() -> str:
        try:
            return json.load(server.post("v1/completions", body, rank))["choices"][0]["text"]
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    future: Future = Future()
    threading.Thread(target=lambda: future.set_result(request()), daemon=True).start()
    return future


def work(server: Server, phase: str) -> list[Future]:
    """Bring the server into a serving phase."""
    if phase == "prefill":
        return [ask(server, rank, 2, "mixtures " * 150) for rank in (0, 1) for _ in range(3)]
    waiting = {"idle": [], "decode": [0, 1], "round": [0, 1, 0, 1]}[phase]
    asked = [ask(server, rank, 400) for rank in waiting]
    time.sleep(1.0 if asked else 0.0)
    return asked


def await_end(session: Session, timeout_s: float) -> float | None:
    start_s = time.monotonic()
    while session.members() and time.monotonic() < start_s + timeout_s:
        session.process.poll()
        time.sleep(0.05)
    return None if session.members() else time.monotonic() - start_s


def strike(matrix: Matrix, session: Server, key: tuple[str, str, str], asked: list[Future], shared: set[str]) -> None:
    find(session, key[1]).send_signal(ENDS[key[0]])
    seconds = await_end(session, END_S)
    read = last_line(session.log)
    if asked:
        failed = [text for each in asked if "Error" in (text := each.result())]
        read = f"{len(failed)} of {len(asked)} requests fail{f', {failed[0]}' if failed else ''}; log: {read}"
    if seconds is None:
        read = f"goes on, /health {200 if session.is_healthy() else 'not 200'}; log: {read}"
    matrix.add(key, read, seconds, matrix.left(shared, session) if seconds is not None else "-")


def ends(matrix: Matrix, sent: str) -> None:
    """Each process ends, at each phase."""
    for process in PROCESSES:
        for phase in (*SERVING, *START):
            if not matrix.wants(*(key := (sent, process, phase))):
                continue
            shared = set(os.listdir("/dev/shm"))
            if phase in SERVING:
                dispatch = [] if phase == "round" else ["--dwdp-dispatch", "off"]
                with matrix.serving(*dispatch) as server:
                    strike(matrix, server, key, work(server, phase), shared)
            else:
                with matrix.server(paused=True) as server:
                    for before in START[: START.index(phase)]:
                        matrix.go(before)
                    matrix.await_pause(phase)
                    for after in START[START.index(phase) :]:  # an engine that is told to end does so once it is there
                        threading.Timer(0.5, matrix.go, (after,)).start()
                    strike(matrix, server, key, [], shared)


def stops(matrix: Matrix) -> None:
    """Each process stops for some seconds: while serving in one server, while starting in one for each process."""
    wanted = [(process, phase) for process in PROCESSES for phase in SERVING if matrix.wants("SIGSTOP", process, phase)]
    if wanted:
        with matrix.serving() as server:
            for process, phase in wanted:
                asked, stopped = work(server, phase), find(server, process)
                stopped.suspend()
                time.sleep(STOP_S)
                others = [ask(server, 1 if process == "engine 0" else 0) for _ in range(2)]
                time.sleep(2)
                served = sum(each.done() for each in others)
                stopped.resume()
                start_s = time.monotonic()
                failed = [text for each in [*asked, *others] if "Error" in (text := each.result())]
                read = f"{served} of 2 requests to another rank are answered meanwhile, all once it goes on"
                matrix.add(("SIGSTOP", process, phase), failed[0] if failed else read, time.monotonic() - start_s,
                           "the server serves", "not needed")
    for process in PROCESSES:
        if not matrix.wants("SIGSTOP", process, "start"):
            continue
        with matrix.server(paused=True) as server:
            for phase in START:
                matrix.await_pause(phase)
                stopped = find(server, process)
                stopped.suspend()
                matrix.go(phase)
                time.sleep(STOP_S)
                stopped.resume()
            start_s = time.monotonic()
            try:
                server.wait_until_ready(START_S)
                read = "stopped for 4 s in each phase of the start, which waits and then goes on"
            except SessionFailure:
                read = last_line(server.log)
            matrix.add(("SIGSTOP", process, "start"), read, time.monotonic() - start_s, "-", "not needed")


def apart(matrix: Matrix, rendezvous: str, before: str = "") -> list[Session]:
    """Two ranks by two commands that meet at `rendezvous`; `before` runs in each one's shell, {} is its rank."""
    group = [*TWO, "--dwdp-rendezvous", rendezvous, "--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port",
             str(free_port()), "--dwdp-startup-timeout-s", "60", "--data-parallel-rank"]
    return [
        Session(["unshare", "-u", "bash", "-c", f'{before.format(rank)} exec "$@"', "rank", *VLLM, "serve", matrix.model,
                 "--host", "127.0.0.1", "--port", str(free_port()), *group, str(rank)], matrix.log(),
                environment=os.environ, folder=matrix.folder)
        for rank in range(2)
    ]


def places(matrix: Matrix) -> None:
    """Addresses and names: both ranks are on, or what they say."""
    port = free_port()
    for name, rendezvous, before in (
        ("IPv6 address", f"[::1]:{port}", ""), ("name", f"localhost:{port}", ""),
        ("hosts' names differ", f"127.0.0.1:{port}", "hostname container-{};"),
    ):
        if matrix.wants(*(key := ("address", name, "start"))):
            with contextlib.ExitStack() as stack:
                ranks = [stack.enter_context(rank) for rank in apart(matrix, rendezvous, before)]
                start_s = time.monotonic()
                with contextlib.suppress(AssertionError):
                    await_that(lambda r=ranks: all("startup complete" in rank.log.read_text() for rank in r)
                               or any(rank.process.poll() is not None for rank in r), "both", START_S)
                on = all("DWDP on" in rank.log.read_text() for rank in ranks)
                read = "both ranks serve" if on else "; ".join(last_line(rank.log) for rank in ranks)
                matrix.add(key, read, time.monotonic() - start_s, "-", "not needed")


def lacks(matrix: Matrix) -> None:
    """What a machine lacks, or what is taken: the command ends, or serves."""
    with socket.socket() as taken, contextlib.closing(socket.socket()) as met:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        met.bind(("127.0.0.1", 0))
        met.listen()
        ports = [str(each.getsockname()[1]) for each in (taken, met)]
        for name, before, arguments in (
            ("full /dev/shm", "mount -t tmpfs -o size=64k tmpfs /dev/shm; head -c 64k /dev/zero > /dev/shm/full;", []),
            ("limit of 100 descriptors", "ulimit -n 100;", []),
            ("limit of 400 descriptors", "ulimit -n 400;", []),
            ("port of the API taken", "", ["--port", ports[0]]),
            ("rendezvous port taken", "", ["--dwdp-rendezvous", f"127.0.0.1:{ports[1]}", "--dwdp-startup-timeout-s", "20"]),
        ):
            if not matrix.wants(*(key := ("machine", name, "start"))):
                continue
            shared = set(os.listdir("/dev/shm"))
            command = [*VLLM, "serve", matrix.model, "--host", "127.0.0.1", "--port", str(free_port()), *TWO, *arguments]
            with Session(["unshare", "-m", "bash", "-c", f'{before} exec "$@"', "serve", *command], matrix.log(),
                         environment=os.environ, folder=matrix.folder) as session:
                start_s = time.monotonic()
                with contextlib.suppress(AssertionError):
                    await_that(lambda s=session: s.process.poll() is not None or "startup complete" in s.log.read_text(),
                               name, START_S)
                serves = session.process.poll() is None
                seconds = time.monotonic() - start_s
                if not serves:
                    await_end(session, QUIT_S)
                read = "serves" if serves else last_line(session.log)
                matrix.add(key, read, seconds, "-" if serves else matrix.left(shared, session))


def neighbours(matrix: Matrix) -> None:
    if matrix.wants(*(key := ("machine", "second group on the host", "idle"))):
        with matrix.serving() as first, ThreadPoolExecutor(1), matrix.serving() as second:
            texts = {ask(server, rank).result() for server in (first, second) for rank in (0, 1)}
            find(second, "engine 1").kill()
            seconds = await_end(second, END_S)
            texts.add(ask(first, 0).result())
            read = "both serve alike, the first also after the second's end" if len(texts) == 1 else str(texts)
            matrix.add(key, read, seconds, "the first group")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression on 'fault | process | phase'")
    parser.add_argument("--again", action="store_true", help="run rows again that the page has")
    given = parser.parse_args()
    matrix = Matrix(given.only, given.again)
    cases: list[Callable[[], None]] = [
        lambda: stops(matrix), lambda: ends(matrix, "kill -9"), lambda: lacks(matrix), lambda: places(matrix),
        lambda: neighbours(matrix), lambda: ends(matrix, "SIGTERM"),
    ]
    for case in cases:
        case()
    if matrix._waiting:
        with matrix.serving():
            pass


if __name__ == "__main__":
    sys.exit(main())
