"""`vllm-dwdp bench`: DWDP against stock vLLM on the same GPUs, model and prompts, in turns."""

import contextlib
import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_dwdp.entrypoints.bench.checks import refuse_impossible, refuse_unshared
from vllm_dwdp.entrypoints.bench.comparison import Comparison
from vllm_dwdp.entrypoints.bench.engines import EngineFailure, Engines
from vllm_dwdp.entrypoints.bench.modes import Settings, is_dwdp, load_arguments, short, visible_devices
from vllm_dwdp.entrypoints.bench.origin import cuda_devices, origin, query_gpus
from vllm_dwdp.entrypoints.bench.rank import Held
from vllm_dwdp.entrypoints.bench.report import FORMATS, POINTS, UNITS, Reading, chart, less, reading, summarize, table, total
from vllm_dwdp.entrypoints.bench.room import too_large
from vllm_dwdp.entrypoints.plan.model import load
from vllm_dwdp.entrypoints.server import free_port
from vllm_dwdp.errors import DWDPError

WARMUP_STEPS = 2
RELEASE_S = 20.0
RELEASE_SLACK_MIB = 256


class Bench(Comparison):
    """Offline engines: what runs, what was read, and what failed. Writes bench.json and bench.png."""

    def __init__(self, settings: Settings):
        """Raises DWDPError for what cannot run here."""
        tokens = settings.input_len + settings.output_len
        refuse_impossible(settings.modes, settings.model, tokens, settings.hf_overrides, "--input-len and --output-len")
        own = [settings.dwdp_options(mode, rank=0) for mode in settings.modes if is_dwdp(mode)]
        refuse_unshared(settings.model, settings.hf_overrides, settings.size, own)
        self.devices = cuda_devices(settings.size)
        super().__init__(settings.out)
        self.settings = settings
        self.decode = bool(settings.decode)
        self.used_mib = self._mib("memory.used")
        self.running: dict[str, Engines] = {}
        self.measured: list[Reading] = []
        self.held: dict[tuple[str, int], Held] = {}  # per GPU
        self.failures: dict[tuple[str, int], str] = {}
        if self.devices is not None:
            self._leave_out_what_cannot_fit(self.devices)

    def _leave_out_what_cannot_fit(self, devices: list[str]) -> None:
        settings, total_mib = self.settings, self._mib("memory.total")
        if len(total_mib) < len(devices):
            raise DWDPError("nvidia-smi does not say how much memory the GPUs have: update the driver")
        try:
            model = load(settings.model, settings.hf_overrides)
        except DWDPError:  # sizes that the plan cannot read: vLLM will say
            return
        for mode, why in too_large(settings, model, min(total_mib) * 2**20).items():
            self.say(f"{short(mode)}: {why}")
            points = settings.decode or settings.max_num_batched_tokens
            self.failures |= {(mode, point): why for point in points}

    def measure(self) -> None:
        """Give each mode its turns, A B A B. Nothing that was started outlives this."""
        settings = self.settings
        try:
            for tokens in settings.max_num_batched_tokens:
                if settings.load_together:
                    able = [mode for mode in settings.modes if self._able(mode, tokens)]
                    for mode in able:
                        self._start(tokens, mode)
                    for mode in able:
                        with self._noting_failure(tokens, mode, f"{tokens} tokens a step, {short(mode)}") as where:
                            self._load(tokens, mode, where)
                for round in range(1, settings.rounds + 1):
                    for mode in settings.modes:
                        self._turn(tokens, round, mode)
                self._stop(*self.running)
                self._wait_for_memory()
        finally:
            self._stop(*self.running, orderly=False)

    def _points(self, tokens: int) -> tuple[int, ...]:
        return self.settings.decode or (tokens,)

    def _able(self, mode: str, tokens: int) -> list[int]:
        """Points at which nothing is known to fail."""
        return [point for point in self._points(tokens) if (mode, point) not in self.failures]

    @contextlib.contextmanager
    def _noting_failure(self, tokens: int, mode: str, where: str) -> Iterator[str]:
        """A failure in the body ends the mode's processes and is noted; the benchmark goes on."""
        try:
            yield where
        except EngineFailure as failure:
            self.failures |= {(mode, point): str(failure) for point in self._able(mode, tokens)}
            self.say(f"{where}: failed: {failure} (see {self.out / 'logs'})")
            self._stop(mode, orderly=False)

    def _turn(self, tokens: int, round: int, mode: str) -> None:
        """Load a mode unless it is, and measure it."""
        if not self._able(mode, tokens):
            return
        where = f"{tokens} tokens a step, round {round} of {self.settings.rounds}, {short(mode)}"
        with self._noting_failure(tokens, mode, where):
            if mode not in self.running:
                self._start(tokens, mode)
            if not self.running[mode].last_run:  # loading ends with a run that warms up
                self._load(tokens, mode, where)
            if self.settings.side_by_side:  # the first run after others had the GPUs can take seconds more
                self._run(mode, "wake up", 1, 1)
            for _ in range(self.settings.repeats):
                for point in self._able(mode, tokens):
                    self._read(point, round, mode, where)
        if not self.settings.side_by_side:
            self._stop(*self.running)
            self._wait_for_memory()
        self.write()

    def _start(self, tokens: int, mode: str) -> None:
        """Start the ranks of a mode, which all load at once."""
        settings = self.settings
        engines = self.running[mode] = Engines(
            name=f"{short(mode)}-{tokens}-{len(self.measured)}", logs=self.logs, timeout_s=settings.timeout,
            visible_devices=visible_devices(mode, self.devices, settings.size),
        )
        engines.tell("load", *load_arguments(settings, mode, tokens, free_port()))

    def _load(self, tokens: int, mode: str, where: str) -> None:
        """Wait until the ranks of a mode have loaded, and warm them up."""
        self.say(f"{where}: load")
        start_s = time.monotonic()
        settings = self.settings
        held = self.running[mode].replies("load")
        num_gpus = settings.num_gpus(mode)
        for point in self._points(tokens):
            self.held[mode, point] = Held(
                expert_bytes=sum(h.expert_bytes for h in held) / num_gpus,
                kv_cache_tokens=sum(h.kv_cache_tokens for h in held) / num_gpus,
            )
        if self.decode:
            self._leave_out_what_would_be_preempted(mode)
        self.say(f"{where}: loaded in {time.monotonic() - start_s:.0f} s; warm up")
        prompts = self._able(mode, tokens) if self.decode else [math.ceil(WARMUP_STEPS * tokens / settings.input_len) + 1]
        for num_prompts in prompts:
            self._run(mode, "warm up", num_prompts, min(settings.output_len, 1 + WARMUP_STEPS))

    def _leave_out_what_would_be_preempted(self, mode: str) -> None:
        """Requests that the KV cache has no room for wait, and a step would have fewer of them than it is said to."""
        each = self.settings.input_len + self.settings.output_len
        for point in self.settings.decode:
            if point * each > (room := self.held[mode, point].kv_cache_tokens):
                why = f"{point} requests of {each} tokens a GPU, of whose KV cache has {room:,.0f}: lower --decode or give it more memory"
                self.failures[mode, point] = why
                self.say(f"{short(mode)}: {why}")
        if all((mode, point) in self.failures for point in self.settings.decode):
            raise EngineFailure("no --decode fits the KV cache")

    def _run(self, mode: str, phase: str, num_prompts: int, output_len: int) -> dict[str, float]:
        engines = self.running[mode]
        before = engines.last_run
        engines.last_run = engines.ask(phase, "run", {"num_prompts": num_prompts, "output_len": output_len})
        return total(before, engines.last_run)

    def _read(self, point: int, round: int, mode: str, where: str) -> None:
        """Measure once. What decode steps move and wait for is what more output tokens do than the first."""
        output_len = self.settings.output_len
        if self.decode:
            first = self._run(mode, "prefill", point, 1)
            spent = less(self._run(mode, "decode", point, output_len), first)
        else:
            spent = self._run(mode, "prefill", self.settings.num_prompts, output_len)
        self.measured.append(read := reading(
            mode=mode, point=point, round=round, num_gpus=self.settings.gpus_at_work(mode), spent=spent, decode=self.decode,
        ))
        batch = f", {point} requests per GPU" if self.decode else ""
        self.say(f"{where}{batch}: {read.value:{FORMATS[self.decode]}} {UNITS[self.decode]}")

    def _stop(self, *modes: str, orderly: bool = True) -> None:
        for mode in modes:
            self.running[mode].close(orderly=orderly)
            del self.running[mode]

    def _mib(self, field: str) -> list[int]:
        lines = query_gpus(field, self.devices) if self.devices else []
        return [int(mib) for mib in lines if mib.isdigit()]

    def _wait_for_memory(self) -> None:
        """Wait until the driver has taken back what the ended processes held."""
        deadline = time.monotonic() + RELEASE_S
        while any(now > first + RELEASE_SLACK_MIB for now, first in zip(self._mib("memory.used"), self.used_mib, strict=False)):
            if time.monotonic() > deadline:
                return self.say(f"GPU memory is still held after {RELEASE_S:.0f} s; going on")
            time.sleep(0.5)

    def write(self) -> list[Any]:
        """bench.json: everything read so far. Returns the table's rows."""
        points = self.settings.decode or self.settings.max_num_batched_tokens
        rows = summarize(self.settings.modes, points, self.decode, self.measured, self.held, self.failures)
        self.write_json("bench", origin(self.devices) | {
            "settings": self.settings,
            "point": POINTS[self.decode],
            "unit": UNITS[self.decode],
            "rows": rows,
            "readings": self.measured,
        })
        return rows

    def report(self) -> None:
        """Print the table and say where the files are."""
        settings, rows = self.settings, self.write()
        lengths = f"{math.ceil(settings.ratio * settings.input_len)} to {settings.input_len} tokens"
        what = (
            f"decode of {settings.output_len} tokens after {lengths}" if self.decode else
            f"{settings.num_prompts} prompts of {lengths} per GPU, {settings.output_len} out"
            + (f", rank 0 {settings.uneven:g} times as many" if settings.uneven != 1 else "")
        )
        how = ", eager" if settings.eager else ""
        title = f"{Path(settings.model).name}, size {settings.size}{how}: {what}"
        print(f"\n{title}; medians, ratios of speeds\n\n{table(rows, self.decode)}\n")
        self.finish("bench", functools.partial(chart, rows, self.decode, title) if self.measured else None)
