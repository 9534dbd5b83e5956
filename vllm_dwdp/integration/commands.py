"""Commands: whatever way a command of vLLM's ends, its last line is the sentence for which, and its status is not 0."""

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from vllm_dwdp import config, launcher
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.integration import hooks, joining
from vllm_dwdp.launcher import Reasons

FRONT_S = 2.0  # for which an engine's reason is waited for where an API server, which saw it fail, has ended first
LAST_WORDS_S = 6.0  # for which engines that fail are waited for: what they print comes before, and one may know the reason


def lead() -> Reasons:
    """Hear from the processes that this one starts, and let its last line be ours if it ends for their reasons."""
    if not isinstance(reasons := getattr(sys.excepthook, "reasons", None), Reasons):
        previous, reasons = sys.excepthook, Reasons()

        def print_refusal(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            said: str | None = str(error)
            if not issubclass(kind, DWDPError):
                previous(kind, error, trace)
                said = _last_words(error, reasons)
            if said is not None:
                print(f"vllm-dwdp: error: {' '.join(said.split())}", file=sys.stderr)

        print_refusal.reasons = reasons  # type: ignore[attr-defined]
        sys.excepthook = print_refusal
    return reasons


def _last_words(error: BaseException, reasons: Reasons) -> str | None:
    """Why a child of this process has failed; None where none has said."""
    if "engine core" not in str(error).lower():  # which vLLM says of a child that it does not name a reason of
        return reasons.first(FRONT_S if "died with exit code" in str(error) else 0)
    is_front = "Frontend" in str(error)
    engines = [child for child in multiprocessing.active_children() if child.name.startswith("EngineCore")]
    if not is_front:  # whose engines do not know of it, and only say that they were told to end
        _join(engines)
    said = reasons.first(0 if is_front else LAST_WORDS_S)
    for engine in engines:
        engine.terminate()
    _join(engines)
    return said or f"{type(error).__name__}: {error}"


def _join(engines: Sequence[multiprocessing.process.BaseProcess]) -> None:
    end = time.monotonic() + LAST_WORDS_S
    for engine in engines:
        engine.join(max(end - time.monotonic(), 0))


def refuse_in_child(error: DWDPError) -> None:
    """End a server that another process of vLLM's has started in one line. Its parent gets the sentence."""
    launcher.tell(error)
    raise SystemExit(f"vllm-dwdp: error: {error}") from None


def install() -> None:
    """Make the commands that watch over children fail when those have."""
    hooks.RUN_HEADLESS.install(_run_headless)
    hooks.SUPERVISE.install(_supervise)


def _run_headless(original: Callable, args: Any) -> None:
    original(args)
    _raise_first(lead())


async def _supervise(original: Callable, self: Any) -> None:
    """One server a rank, all started here: where no other node has ranks, they meet without an option."""
    args = self.args
    options = config.parse(args.additional_config)
    if options is None:
        return await original(self)
    reasons = lead()
    if options.rendezvous is None and args.data_parallel_size_local == args.data_parallel_size:
        joining.bring_together()
    await original(self)
    _raise_first(reasons)
    for server in self._processes:
        if server.exitcode not in (None, 0, -signal.SIGTERM, -signal.SIGINT):
            raise DWDPError(f"{server.name} ended with status {server.exitcode}: its log above says why")


def _raise_first(reasons: Reasons) -> None:
    if reasons.heard:
        raise DWDPError(reasons.heard[0])
