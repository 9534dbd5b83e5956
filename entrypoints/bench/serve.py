"""`vllm-dwdp bench --serve`: `vllm serve` in each mode on the same GPUs, under the same loads of `vllm bench serve`."""

import contextlib
import functools
import http.client
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from vllm_dwdp import config
from vllm_dwdp.entrypoints.bench import client, front
from vllm_dwdp.entrypoints.bench.checks import flags_of, model_config, refuse_impossible, refuse_unshared
from vllm_dwdp.entrypoints.bench.comparison import Comparison
from vllm_dwdp.entrypoints.bench.loads import Load, Mix, counted, names, put_under_load, warm_up
from vllm_dwdp.entrypoints.bench.modes import Positive, is_dwdp, kind, own_options, refuse_misspelt, short
from vllm_dwdp.entrypoints.bench.origin import cuda_devices, origin
from vllm_dwdp.entrypoints.bench.tokenizer import tokenizer_for
from vllm_dwdp.entrypoints.server import Server, SessionFailure
from vllm_dwdp.errors import DWDPError

SAY_EVERY_S = 30.0


class ServeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a person may ask for with --serve: every field is an option of the command. `of` makes and checks one."""

    model: Annotated[str, Meta(description="name or folder")]
    size: Annotated[Positive, Meta(description="GPUs, and ranks of dwdp and ep")] = 2
    modes: Annotated[tuple[str, ...], Meta(min_length=1, description="which modes, in which order")] = ("dwdp", "ep", "tp")
    loads: Annotated[
        tuple[str, ...],
        Meta(description="with --serve: loads IN:OUT:RATE:COUNT: random prompts of IN tokens, OUT to generate, "
                         "requests per second (inf: all at once), requests; @RANK gives them to one rank, + joins loads "
                         "that come at the same time"),
    ] = ()
    sweep: Annotated[
        str | None,
        Meta(description="with --serve: IN:OUT:COUNT, at rate inf, and at a quarter, half and three quarters of the "
                         "requests per second that the first mode then serves"),
    ] = None
    serve_args: Annotated[str, Meta(description="with --serve: further arguments of every `vllm serve`")] = ""
    side_by_side: Annotated[
        bool, Meta(description="keep all servers up and alternate load by load; needs a small model, and --kv-cache-memory-bytes "
                               "in --serve-args")
    ] = False
    repeats: Annotated[Positive, Meta(description="measurements of each load")] = 1
    timeout: Annotated[
        float, Meta(gt=0, le=1e6, description="seconds that a server may take to start, and a load beyond the time in which it comes")
    ] = 900.0
    out: Annotated[str, Meta(description="folder for bench.json or serving.json, a picture and logs/")] = "./dwdp-bench"

    @classmethod
    def of(cls, given: dict[str, Any]) -> "ServeSettings":
        """From option values, numbers as text or not. Raises DWDPError for what cannot be."""
        self = config.read(cls, given, config.flag, strict=False)
        refuse_misspelt(self.modes, ("dwdp", "ep", "tp"))
        for mode in filter(is_dwdp, self.modes):
            config.parse({config.KEY: own_options(mode)}, lambda name: f"{name} in --modes")
        if self.size < 2:
            raise DWDPError(f"--size is {self.size}: every mode needs at least 2")
        if beyond := [load for mix in self.first_mixes for load in mix if (load.rank or 0) >= self.size]:
            raise DWDPError(f"--loads has {beyond[0]}: ranks of --size {self.size} count from 0 to {self.size - 1}")
        if self.side_by_side and "--kv-cache-memory-bytes" not in flags_of(self.serve_args):
            raise DWDPError("--side-by-side needs --kv-cache-memory-bytes in --serve-args: servers that start together would "
                            "size their KV caches by what the others have left")
        if not self.first_mixes:
            raise DWDPError("--serve needs --loads IN:OUT:RATE:COUNT,... or --sweep IN:OUT:COUNT")
        return self

    @property
    def first_mixes(self) -> list[Mix]:
        """Those that need no reading: of a sweep, saturation."""
        mixes = [tuple(map(Load.of, text.split("+"))) for text in self.loads]
        return list(dict.fromkeys([*mixes, self.saturation] if self.sweep else mixes))

    @property
    def saturation(self) -> Mix:
        """Of a sweep."""
        return (Load.of(self.sweep or "", "--sweep"),)

    def arguments(self, mode: str) -> list[str]:
        """What `vllm serve` is told beside the model, in this mode."""
        own = {
            "dwdp": ["--data-parallel-size", str(self.size), "--parallel", "dwdp"],
            "ep": ["--data-parallel-size", str(self.size), "--enable-expert-parallel"],
            "tp": ["--tensor-parallel-size", str(self.size)],
        }[kind(mode)]
        told = [*shlex.split(self.serve_args), *own]
        for name, value in own_options(mode).items():
            flag = (config.as_flag if is_dwdp(mode) else config.flag)(name)
            if isinstance(value, bool):
                told.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                told += [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
        return told


class Serving(Comparison):
    """Servers: what was measured, and what failed. Writes serving.json and serving.png."""

    def __init__(self, settings: ServeSettings):
        """Raises DWDPError for what cannot run here."""
        mixes = settings.first_mixes
        longest = max(load.input_len + load.output_len for mix in mixes for load in mix)
        spelt = "--sweep" if settings.sweep and not settings.loads else "--loads"
        refuse_impossible(settings.modes, settings.model, longest, {}, spelt)
        refuse_unshared(settings.model, {}, settings.size, map(own_options, filter(is_dwdp, settings.modes)))
        self.devices = cuda_devices(settings.size)
        super().__init__(settings.out)
        self.settings = settings
        self.tokenizer = tokenizer_for(settings.model, model_config(settings.model, {}), self.out)
        self.mixes = mixes
        self.sweeps = settings.sweep is not None
        self.measured: list[front.Measured] = []
        self.failures: dict[str, str] = {}

    def measure(self) -> None:
        """Each mode's server, one after the other or all together. None outlives this."""
        modes = self.settings.modes
        with client.importing():
            for group in [modes] if self.settings.side_by_side else [(mode,) for mode in modes]:
                self._measure_beside(group)

    def _measure_beside(self, group: Sequence[str]) -> None:
        with contextlib.ExitStack() as running:
            servers = {mode: running.enter_context(self._server(mode)) for mode in group}
            for mode, server in servers.items():
                with self._noting_failure(mode, server):
                    self._prepare(mode, server)
            for repeat in range(1, self.settings.repeats + 1):
                for index, mix in enumerate(self.mixes):  # which a sweep's first reading makes longer
                    for mode in [mode for mode in group if mode not in self.failures]:
                        with self._noting_failure(mode, servers[mode]):
                            self._read(mode, servers[mode], mix, repeat, seed=1000 * repeat + index)
                        self.write()

    @contextlib.contextmanager
    def _noting_failure(self, mode: str, server: Server) -> Iterator[None]:
        """A failure in the body ends the mode's server and is noted; the comparison goes on."""
        try:
            yield
        except (SessionFailure, OSError, http.client.HTTPException) as failure:
            self.failures[mode] = str(failure) or type(failure).__name__
            self.say(f"{short(mode)}: failed: {self.failures[mode]}")
            server.end()

    def _server(self, mode: str) -> Server:
        told = ["--tokenizer", self.tokenizer, *self.settings.arguments(mode)]
        server = Server(self.settings.model, told, self.logs / f"serve-{short(mode)}.log")
        self.say(f"{short(mode)}: {shlex.join(server.command)}")
        return server

    def _prepare(self, mode: str, server: Server) -> None:
        said_s = 0.0

        def waiting(elapsed_s: float) -> None:
            nonlocal said_s
            if elapsed_s > said_s + SAY_EVERY_S:
                said_s = elapsed_s
                self.say(f"{short(mode)}: starts since {elapsed_s:.0f} s")

        took_s = server.wait_until_ready(self.settings.timeout, waiting)
        self.say(f"{short(mode)}: serves after {took_s:.0f} s")

    def _read(self, mode: str, server: Server, mix: Mix, repeat: int, seed: int) -> None:
        """Measure once, after requests that wake up a server beside others; a sweep's saturation decides its other loads, for all modes."""
        for load in mix:
            warm_up(server, load, self.settings.model)
        streams = is_dwdp(mode)
        before = counted(server) if streams else {}
        whole = tuple(msgspec.structs.replace(load, rank=None) for load in mix)  # to tensor parallelism all ranks are one
        figures = put_under_load(
            server, whole if kind(mode) == "tp" else mix, seed=seed, model=self.settings.model, tokenizer=self.tokenizer,
            logs=self.logs / f"{short(mode)}-{repeat}", timeout_s=self.settings.timeout,
        )
        spent = {name: value - before.get(name, 0) for name, value in counted(server).items()} if streams else {}
        for name, own in zip(names(mix), figures, strict=True):
            self.measured.append(read := front.Measured(mode=mode, load=name, repeat=repeat, dwdp=spent, **own))
            self.say(f"{short(mode)}, {name}, {repeat} of {self.settings.repeats}: {read.request_throughput:.2f} requests/s, "
                     f"TTFT {read.median_ttft_ms:.0f} ms, TPOT {read.median_tpot_ms:.1f} ms")
        if self.sweeps and mix == self.settings.saturation:
            self.sweeps = False
            self.mixes += [(load,) for load in mix[0].below(figures[0]["request_throughput"])]

    @property
    def names(self) -> list[str]:
        return [name for mix in self.mixes for name in names(mix)]

    def write(self) -> None:
        """serving.json: everything measured so far."""
        self.write_json("serving", origin(self.devices) | {
            "settings": self.settings, "loads": self.names, "measured": self.measured,
            "failed": self.failures,
        })

    def report(self) -> None:
        """Print the table and say where the files are."""
        settings = self.settings
        self.write()
        rows = front.summarize(settings.modes, self.names, self.measured, settings.size)
        title = f"{Path(settings.model).name}, vllm serve on {settings.size} {'ranks on CPU' if self.devices is None else 'GPUs'}"
        if "--enforce-eager" in settings.serve_args:
            title += ", eager"
        print(f"\n{title}; medians of {settings.repeats}\n\n{front.table(rows)}\n")
        for mode, reason in self.failures.items():
            print(f"{short(mode)} failed: {reason}")
        self.finish("serving", functools.partial(front.picture, rows, title) if front.points(rows) else None)
