"""A comparison under way: its progress lines, its interruption, and the exit status that it ends with."""

import signal
import time
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any

import msgspec

INTERRUPTED = 130


class Comparison:
    """What measures modes one way or another. `measured` and `failures`, by mode or more, fill meanwhile."""

    measured: Sized
    failures: Mapping

    def __init__(self, out: str):
        self.out = Path(out)
        self.logs = self.out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.start_s = time.monotonic()

    def say(self, text: str) -> None:
        """One line of progress."""
        print(f"[{time.monotonic() - self.start_s:6.1f} s] {text}", flush=True)

    def measure(self) -> None:
        """Nothing that this starts outlives it."""
        raise NotImplementedError

    def report(self) -> None:
        """Print and write what was measured until now."""
        raise NotImplementedError

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        (self.out / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2))

    def finish(self, name: str, draw: Callable[[Path], None] | None) -> None:
        """Draw a picture beside NAME.json, if there is anything to draw, and say where both are."""
        written = [self.out / f"{name}.json"]
        if draw is not None:
            try:
                draw(self.out / f"{name}.png")
                written.append(self.out / f"{name}.png")
            except ImportError:
                print("no picture: matplotlib is not installed (pip install 'vllm-dwdp[bench]')")
        print(f"{' and '.join(map(str, written))} written; {time.monotonic() - self.start_s:.0f} s in all")

    def run(self) -> int:
        """Measure and report; the command's exit status is 1 when a mode failed.

        Ctrl-C, SIGTERM and, unless it is ignored as under nohup, SIGHUP end everything that was started and report what was
        measured until then.
        """
        ends = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, signal.default_int_handler) for number in ends}
        status = None
        try:
            self.measure()
        except KeyboardInterrupt:
            status = INTERRUPTED
            self.say("interrupted")
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        self.report()
        return status or int(bool(self.failures) or not self.measured)
