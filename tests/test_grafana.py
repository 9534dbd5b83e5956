"""Invariant: the dashboard in examples/ asks for every metric that DWDP exports, by its labels, and for no other."""

import itertools
import json
import re
from types import SimpleNamespace

from prometheus_client import Counter

from vllm_dwdp.integration import metrics

from conftest import ROOT

BOARD = json.loads((ROOT / "examples/grafana.json").read_text())
TARGETS = [target for panel in BOARD["panels"] for target in panel["targets"]]


def exported() -> dict[str, set[str]]:
    """Labels of every metric by its name on /metrics, of a rank that dispatches."""
    dispatch = SimpleNamespace(report=lambda: {"timeouts": [0, 0]})
    counters = SimpleNamespace(forwards={"streamed": 0})
    made = metrics.Metrics(SimpleNamespace(
        rank=0, dispatch=dispatch, prefetcher=SimpleNamespace(counters=counters),
        stats=lambda: {"memory_bytes": {"shard": 7}, "experts": {"owned": 6}, "num_slots": 2},
    ))
    return {
        f"vllm:dwdp_{name}" + "_total" * isinstance(family, Counter): set(family._labelnames)
        for name, family in made._families.items()
    }


def test_every_metric_is_asked_for_and_no_other() -> None:
    assert {name for target in TARGETS for name in re.findall(r"vllm:dwdp_\w+", target["expr"])} == set(exported())


def test_labels_are_those_that_the_metrics_have() -> None:
    for target in TARGETS:
        names = re.findall(r"vllm:dwdp_\w+", target["expr"])
        grouped = re.findall(r"by \(([^)]+)\)", target["expr"])
        asked = {*re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]), *re.findall(r"(\w+)=~", target["expr"])}
        asked |= {label.strip() for labels in grouped for label in labels.split(",")}
        for name in names:
            assert "instance" in asked, "groups of several servers are told apart by the label that Prometheus adds"
            assert asked <= exported()[name] | {"instance"}, target["expr"]


def test_a_panel_is_one_idea_and_lies_on_no_other() -> None:
    assert len({panel["title"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    assert all(len(panel["description"]) > 20 for panel in BOARD["panels"])
    for a, b in itertools.combinations([panel["gridPos"] for panel in BOARD["panels"]], 2):
        assert a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"] or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
