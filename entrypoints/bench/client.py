"""Client: what `vllm bench serve` does, in processes forked from one that has imported vLLM, which takes 10 to 20 s."""

import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import psutil

from vllm_dwdp.entrypoints.server import SessionFailure

MEET_S = 120.0  # of two clients, for prompts of a million tokens
_FORKS = multiprocessing.get_context("forkserver")


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import vLLM, beside the body, once for all clients that it starts. It leaves no process behind; once in a process."""
    _FORKS.set_forkserver_preload(["vllm.benchmarks.serve", __name__])
    try:
        forkserver.ensure_running()
        yield
    finally:
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if "multiprocessing.forkserver" in " ".join(process.cmdline()):
                    process.kill()
                    process.wait()


def barrier(count: int) -> Barrier:
    """Where so many clients meet once each has made its prompts, which takes long ones seconds."""
    return _FORKS.Barrier(count, timeout=MEET_S)


@contextlib.contextmanager
def started(arguments: Sequence[str], log: Path, start: Barrier) -> Iterator[BaseProcess]:
    """`vllm bench serve` with these arguments, ended after the body; its requests come from `start` on, its output goes to `log`."""
    client = _FORKS.Process(target=_run, args=(arguments, log, start), daemon=True)
    try:
        client.start()
    except EOFError:
        raise SessionFailure("the process that imports vLLM for `vllm bench serve` has ended: is there memory for it?") from None
    try:
        yield client
    finally:
        client.kill()
        client.join()


def _run(arguments: Sequence[str], log: Path, start: Barrier) -> None:
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    with log.open("wb") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    benchmark = serve.benchmark

    async def together(*args: Any, **kwargs: Any) -> Any:
        start.wait()
        return await benchmark(*args, **kwargs)

    serve.benchmark = together
    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    serve.main(parser.parse_args(arguments))
