"""Metrics: what DWDP adds to vLLM's /metrics, labelled by engine.

They are set in the worker and reach the front end through prometheus_client's multiprocess folder, which `vllm serve`
makes when it starts more than one API server - its default with more than one rank - and else takes from the variable
PROMETHEUS_MULTIPROC_DIR. A thread brings them up to date, so that no step pays for them.
"""

import os
import threading
from collections.abc import Callable

from prometheus_client import Counter, Gauge
from vllm.logger import init_logger

from vllm_dwdp.assembly import StreamedModel

logger = init_logger("vllm.dwdp.metrics")
UPDATE_S = 0.1


def export(model: StreamedModel) -> Callable[[], None]:
    """Export `model`'s metrics; returns what brings them up to date for the last time. If they cannot be kept, the rank runs without."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        logger.info(
            "DWDP rank %d: /metrics of a server with one API server shows no vllm:dwdp_ metrics; to see them, start "
            "each server with PROMETHEUS_MULTIPROC_DIR naming an empty folder of its own", model.rank,
        )
    try:
        metrics = Metrics(model)
    except Exception as error:  # a folder that is absent, full, not ours, or holds what another program wrote
        logger.warning(
            "DWDP rank %d runs without DWDP's metrics: %s; let PROMETHEUS_MULTIPROC_DIR name an empty folder that it "
            "can write to", model.rank, error,
        )
        return lambda: None
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(UPDATE_S):
            metrics.update()
        metrics.update()

    def end() -> None:
        ended.set()
        thread.join()

    thread = threading.Thread(target=keep, name="dwdp-metrics", daemon=True)
    thread.start()
    return end


class Metrics:
    """Exports one rank's StreamedModel. Make one per process."""

    def __init__(self, model: StreamedModel):
        self._model = model
        self._families: dict[str, Counter | Gauge] = {}
        self._engine = str(model.rank)
        self._bytes = self._counter("prefetch_bytes", "Bytes copied from peers into slots.")
        self._refills = self._counter("refills", "Layers that were not in their slot when they were needed.")
        self._forwards = {
            view: self._counter("forwards", "Forward passes by view.", view=view) for view in model.prefetcher.counters.forwards
        }
        self._seen: dict[Counter, float] = {}
        if model.dispatch is not None:
            self._meetings = {
                "rounds": self._counter("rounds", "Rounds of dispatched steps that this rank took part in."),
                "participants": self._counter("participants", "Ranks that took part in those rounds, summed."),
                "helper_rounds": self._counter("helper_rounds", "Those rounds to which it brought no tokens."),
                "alone": self._counter("alone", "Small steps that no peer was there to meet."),
                "waited_s": self._counter("meeting_seconds", "Time steps spent meeting peers."),
            }
            self._timeouts = [
                self._counter("timeouts", "Peers that were waited for in vain.", peer=str(peer))
                for peer in range(len(model.dispatch.report()["timeouts"]))
            ]
        stats = model.stats()
        for kind, nbytes in stats["memory_bytes"].items():
            self._gauge("memory_bytes", "Expert memory by kind.", kind=kind).set(nbytes)
        for kind, count in stats["experts"].items():
            self._gauge("experts", "Experts of the first layer by kind.", kind=kind).set(count)
        self._gauge("slots", "Buffers into which layers are streamed.").set(stats["num_slots"])

    def update(self) -> None:
        """Bring the counters up to date."""
        counters = self._model.prefetcher.counters
        self._advance(self._bytes, counters.prefetched_bytes)
        self._advance(self._refills, counters.refills)
        for view, count in counters.forwards.items():
            self._advance(self._forwards[view], count)
        if self._model.dispatch is not None:
            seen = self._model.dispatch.report()
            for name, counter in self._meetings.items():
                self._advance(counter, seen[name])
            for counter, count in zip(self._timeouts, seen["timeouts"], strict=True):
                self._advance(counter, count)

    def _advance(self, counter: Counter, total: float) -> None:
        if step := total - self._seen.get(counter, 0):
            counter.inc(step)
            self._seen[counter] = total

    def _counter(self, name: str, text: str, **labels: str) -> Counter:
        return self._labelled(Counter, name, text, labels)

    def _gauge(self, name: str, text: str, **labels: str) -> Gauge:
        return self._labelled(Gauge, name, text, labels, multiprocess_mode="mostrecent")

    def _labelled(self, kind: type, name: str, text: str, labels: dict[str, str], **extra: str):
        if name not in self._families:
            names = ["engine", *labels]
            self._families[name] = kind(f"vllm:dwdp_{name}", text, labelnames=names, registry=None, **extra)
        return self._families[name].labels(self._engine, *labels.values())
