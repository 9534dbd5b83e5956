"""`vllm-dwdp bench`: DWDP against stock vLLM on the same GPUs, model and prompts, in turns."""

import contextlib
import datetime
import importlib.metadata
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from vllm_dwdp.entrypoints.bench_engines import EngineFailure, Engines, free_port
from vllm_dwdp.entrypoints.bench_modes import Settings, Turn, load_commands, turns, visible_devices
from vllm_dwdp.entrypoints.bench_rank import ReadStats, Run
from vllm_dwdp.entrypoints.bench_report import Failure, Reading, Row, Startup, average, chart, reading, summarize, table
from vllm_dwdp.errors import DWDPError

WARMUP_STEPS = 2
RELEASE_S = 20.0
RELEASE_SLACK_MIB = 256
INTERRUPTED = 130


def run(settings: Settings) -> int:
    """Measure, print the table, write bench.json and bench.png; returns the command's exit status.

    Ctrl-C and SIGTERM end everything that was started and report what was measured until then.
    """
    bench = Bench(settings)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    interrupted = False
    try:
        bench.measure()
    except KeyboardInterrupt:
        interrupted = True
        bench.say("interrupted")
    finally:
        signal.signal(signal.SIGTERM, previous)
    bench.report()
    return INTERRUPTED if interrupted else 0 if bench.readings else 1


class Bench:
    """A benchmark under way: what runs, what was read, and what failed."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.devices = cuda_devices(settings.size)
        self.out = Path(settings.out)
        self.logs = self.out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.started = datetime.datetime.now(datetime.timezone.utc)
        self.start_s = time.monotonic()
        self.used_mib = self._used_mib()
        self.running: list[Engines] = []
        self.readings: list[Reading] = []
        self.startups: list[Startup] = []
        self.failures: list[Failure] = []

    def say(self, text: str, turn: Turn | None = None) -> None:
        """One line of progress."""
        where = "" if turn is None else (
            f"{turn.max_num_batched_tokens} tokens a step, round {turn.round} of {self.settings.rounds}, {turn.mode}: "
        )
        print(f"[{time.monotonic() - self.start_s:6.1f} s] {where}{text}", flush=True)

    def measure(self) -> None:
        """Run all modes, in turns or side by side. Nothing that it started outlives it."""
        try:
            if self.settings.side_by_side:
                self._measure_side_by_side()
            else:
                self._measure_in_turns()
        finally:
            for engines in list(self.running):
                self._stop(engines, orderly=False)

    def _measure_in_turns(self) -> None:
        ahead = None
        remaining = turns(self.settings)
        while remaining:
            turn = remaining.pop(0)
            engines = ahead or self._start(turn)
            ahead = self._start(remaining[0]) if remaining else None  # it imports vLLM while this one loads
            with self._reported(turn, engines):
                self._load(turn, engines)
                self._repeat(turn, engines)
                self._stop(engines, orderly=True)
            self._wait_for_memory()
            self.write()
            possible = [later for later in remaining if self._possible(later)]
            if ahead and possible[:1] != remaining[:1]:
                self._stop(ahead, orderly=False)
                ahead = None
            remaining = possible

    def _measure_side_by_side(self) -> None:
        planned = turns(self.settings)
        for tokens in self.settings.max_num_batched_tokens:
            group = [turn for turn in planned if turn.max_num_batched_tokens == tokens]
            loaded = {}
            for turn in group[: len(self.settings.modes)]:  # one after the other: vLLM profiles free memory
                loaded[turn.mode] = engines = self._start(turn)
                with self._reported(turn, engines):
                    self._load(turn, engines)
            for turn in group:
                if self._possible(turn):
                    with self._reported(turn, loaded[turn.mode]):
                        self._repeat(turn, loaded[turn.mode])
                    self.write()
            for engines in list(self.running):
                self._stop(engines, orderly=True)
            self._wait_for_memory()

    def _possible(self, turn: Turn) -> bool:
        what = (turn.mode, turn.max_num_batched_tokens)
        return all((failure.mode, failure.max_num_batched_tokens) != what for failure in self.failures)

    def _start(self, turn: Turn) -> Engines:
        engines = Engines(
            mode=turn.mode, name=turn.name, logs=self.logs, timeout_s=self.settings.timeout,
            visible_devices=visible_devices(turn.mode, self.devices, self.settings.size),
        )
        self.running.append(engines)
        return engines

    def _stop(self, engines: Engines, *, orderly: bool) -> None:
        engines.close(orderly=orderly)
        self.running.remove(engines)

    @contextlib.contextmanager
    def _reported(self, turn: Turn, engines: Engines) -> Iterator[None]:
        """A failure inside ends this mode's processes and is noted; the benchmark goes on."""
        try:
            yield
        except EngineFailure as failure:
            self._stop(engines, orderly=False)
            log = self.logs / f"{turn.name}-rank{failure.rank}.log"
            self.failures.append(Failure(
                mode=turn.mode, max_num_batched_tokens=turn.max_num_batched_tokens, round=turn.round,
                rank=failure.rank, phase=failure.phase, reason=failure.reason, log=log.name,
            ))
            self.say(f"rank {failure.rank} failed to {failure.phase}: {failure.reason} (see {log})", turn)

    def _ask(self, engines: Engines, command: Any, phase: str) -> list[Any]:
        return engines.ask([command] * len(engines.ranks), phase=phase, timeout_s=self.settings.timeout)

    def _read_stats(self, engines: Engines) -> list[dict[str, Any]]:
        if engines.mode != "dwdp":
            return []
        return [stats.values for stats in self._ask(engines, ReadStats(), "read statistics")]

    def _load(self, turn: Turn, engines: Engines) -> None:
        """Load all ranks at once and warm them up."""
        self.say("load", turn)
        start_s = time.monotonic()
        commands = load_commands(self.settings, turn, free_port())
        loaded = engines.ask(commands, phase="load", timeout_s=self.settings.timeout)
        load_s = time.monotonic() - start_s
        num_gpus = self.settings.num_gpus(turn.mode)
        if stats := self._read_stats(engines):
            expert_bytes = average(sum(rank.get("memory_bytes", {}).values()) or None for rank in stats)
        else:
            expert_bytes = sum(rank.expert_bytes for rank in loaded) / num_gpus
        self.startups.append(Startup(
            mode=turn.mode, max_num_batched_tokens=turn.max_num_batched_tokens, round=turn.round, load_s=load_s,
            kv_cache_tokens_per_gpu=sum(rank.kv_cache_tokens for rank in loaded) / num_gpus,
            expert_bytes_per_gpu=expert_bytes,
        ))
        self.say(f"loaded in {load_s:.0f} s; warm up", turn)
        num_prompts = math.ceil(WARMUP_STEPS * turn.max_num_batched_tokens / self.settings.input_len) + 1
        self._ask(engines, Run(num_prompts=num_prompts, output_len=self.settings.output_len), "warm up")

    def _repeat(self, turn: Turn, engines: Engines) -> None:
        settings = self.settings
        for case in settings.cases(turn.max_num_batched_tokens):
            num_prompts = case.batch or settings.num_prompts
            for repeat in range(1, settings.repeats + 1):
                prefill = Run(num_prompts=num_prompts, output_len=1)
                prefilled = self._ask(engines, prefill, "run the prompts") if case.batch else []
                before = self._read_stats(engines)
                whole = Run(num_prompts=num_prompts, output_len=settings.output_len)
                ranks = self._ask(engines, whole, "run the prompts")
                read = reading(
                    mode=turn.mode, case=case, round=turn.round, repeat=repeat, ranks=ranks, prefilled=prefilled,
                    num_gpus=settings.num_gpus(turn.mode), before=before, after=self._read_stats(engines),
                )
                self.readings.append(read)
                self.say(case.describe(read.value), turn)

    def _used_mib(self) -> list[int]:
        used = [] if self.devices is None else query_gpus(self.devices, "memory.used")
        return [int(mib) for (mib,) in used if mib.isdigit()]

    def _wait_for_memory(self) -> None:
        """Wait until the driver has taken back what the ended processes held."""
        deadline = time.monotonic() + RELEASE_S
        while any(now > first + RELEASE_SLACK_MIB for now, first in zip(self._used_mib(), self.used_mib, strict=False)):
            if time.monotonic() > deadline:
                return self.say(f"GPU memory is still held after {RELEASE_S:.0f} s; going on")
            time.sleep(0.5)

    def _rows(self) -> list[Row]:
        cases = [case for tokens in self.settings.max_num_batched_tokens for case in self.settings.cases(tokens)]
        return summarize(self.settings.modes, cases, self.readings, self.startups, self.failures)

    def write(self) -> None:
        """bench.json: everything read so far."""
        names = query_gpus(self.devices, "name,driver_version") if self.devices else []
        content = msgspec.json.encode({
            "command": shlex.join(["vllm-dwdp", *sys.argv[1:]]),
            "settings": self.settings,
            "started": self.started,
            "elapsed_s": time.monotonic() - self.start_s,
            "versions": versions(),
            "devices": [", driver ".join(name) for name in names] or [platform.processor() or platform.machine()],
            "rows": self._rows(),
            "startups": self.startups,
            "failures": self.failures,
            "readings": self.readings,
        })
        (self.out / "bench.json").write_bytes(msgspec.json.format(content, indent=2))

    def report(self) -> None:
        """Print the table and say where the files are."""
        self.write()
        settings, rows = self.settings, self._rows()
        least = math.ceil(settings.ratio * settings.input_len)
        title = (
            f"{Path(settings.model).name}, size {settings.size}: {settings.num_prompts} prompts of "
            f"{least} to {settings.input_len} tokens per GPU, {settings.output_len} out"
        )
        print(f"\n{title}; medians\n\n{table(rows)}\n")
        written = [self.out / "bench.json"]
        if self.readings:
            try:
                chart(rows, title, self.out / "bench.png")
                written.append(self.out / "bench.png")
            except ImportError:
                print("no chart: matplotlib is not installed (pip install 'vllm-dwdp[bench]')")
        print(f"{' and '.join(map(str, written))} written; {time.monotonic() - self.start_s:.0f} s in all")


def query_gpus(devices: list[str] | None, fields: str) -> list[list[str]]:
    """nvidia-smi's `fields` of the devices, or of all for None; empty where there is no nvidia-smi."""
    chosen = [] if devices is None else ["-i", ",".join(devices)]
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", *chosen]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[value.strip() for value in line.split(",")] for line in text.splitlines()]


def cuda_devices(size: int) -> list[str] | None:
    """The first `size` CUDA devices, or None where vLLM's CPU build runs. Raises DWDPError when there are fewer."""
    if "cpu" in importlib.metadata.version("vllm"):
        return None
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        visible = [index for (index,) in query_gpus(None, "index")] or [str(index) for index in range(size)]
    else:
        visible = [device.strip() for device in given.split(",") if device.strip()]
    if len(visible) < size:
        raise DWDPError(f"--size is {size} but {len(visible)} GPUs are visible: lower --size")
    return visible[:size]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("vllm-dwdp", "vllm", "torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
