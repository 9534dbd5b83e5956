"""Invariant: an offline rank that is run as vLLM is run keeps going; what is refused or missing changes nothing."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_dwdp.entrypoints.server import free_port
from vllm_dwdp.integration import checks

import forks
from harness import ENGINE, refuse_unmarked

OFFLINE = """
import json, os, sys
from harness import generate
from vllm import LLM
if __name__ == "__main__":
    llm = LLM(sys.argv[1], additional_config={"dwdp": {}}, **json.loads(sys.argv[2]))
    said = {"tokens": generate(llm, tokens=8)}
    try:
        llm.sleep()
    except Exception as error:
        said["sleep"] = f"{error.__class__.__name__}: {error}"
    said["after"] = generate(llm, tokens=8)
    said["rank"] = llm.collective_rpc("dwdp_stats")[0]["rank"]
    print("SAID", json.dumps(said), flush=True)
"""


def end_ranks(model: str, folder: Path, **environment: str) -> list[dict]:
    """What two ranks said that VLLM_DP_RANK and friends started, one process each; both ended by themselves."""
    refuse_unmarked()
    group = {"VLLM_DP_SIZE": "2", "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": str(free_port())}

    def end(rank: int) -> tuple[int, str]:
        own = {"VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank)}
        return forks.run(
            forks.script, OFFLINE, model, json.dumps(ENGINE), log=folder / f"{rank}.log", timeout_s=200,
            environment=os.environ | group | environment | own,
        )

    with ThreadPoolExecutor(2) as pool:
        statuses, outputs = zip(*pool.map(end, range(2)), strict=True)
    assert statuses == (0, 0), [output[-2000:] for output in outputs]
    return [
        json.loads(line.removeprefix("SAID ")) for output in outputs for line in output.splitlines()
        if line.startswith("SAID ")
    ]


@pytest.mark.engine
def test_offline_data_parallelism(models, tmp_path: Path) -> None:
    """vLLM's own way, one `LLM` a process: each rank returns its answers without a wave's end, and they are alike.

    Nor does a folder for metrics that is absent stop a rank, or a refused sleep leave it paused.
    """
    said = end_ranks(models("qwen3_moe"), tmp_path, PROMETHEUS_MULTIPROC_DIR=str(tmp_path / "absent"))
    assert [rank["rank"] for rank in said] == [0, 1]
    assert said[0]["tokens"] == said[1]["tokens"] and [len(tokens) for tokens in said[0]["tokens"]] == [8] * 4
    for rank in said:
        assert checks.REWRITING in rank["sleep"] and rank["after"] == rank["tokens"]


EXPORT = """
import logging, types
from vllm_dwdp.integration import metrics
logging.basicConfig(level="INFO")
prefetcher = types.SimpleNamespace(counters=types.SimpleNamespace(forwards={}, prefetched_bytes=5, refills=0))
model = types.SimpleNamespace(dispatch=None,
    rank=1, prefetcher=prefetcher,
    stats=lambda: {"memory_bytes": {"shard": 7}, "experts": {"owned": 6}, "num_slots": 2},
)
end = metrics.export(model)
end()
print("ended")
"""
SPOIL = """
import os, sys
for kind in ("counter", "gauge_mostrecent"):
    with open(f"{sys.argv[1]}/{kind}_{os.getpid()}.db", "wb") as file:
        file.write(b"x" * 64)
"""


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["absent", "a file", "of another program", "empty", "not named"])
def test_metrics_never_stop_a_rank(tmp_path: Path, kind: str) -> None:
    """A folder that cannot take metrics is named in one line, as is that none is given; one that can gets them."""
    folder = tmp_path / "metrics"
    if kind == "a file":
        folder.write_text("")
    elif kind != "absent":
        folder.mkdir()
    environment = os.environ | ({} if kind == "not named" else {"PROMETHEUS_MULTIPROC_DIR": str(folder)})
    code = EXPORT
    if kind == "of another program":  # of a process with our id, as in another container
        code = SPOIL + EXPORT
    status, said = forks.run(forks.script, code, str(folder), log=tmp_path / "log", timeout_s=120, environment=environment)
    assert status == 0 and "ended" in said, said[-2000:]
    assert said.count("PROMETHEUS_MULTIPROC_DIR") == (kind != "empty"), said
    if kind == "empty":
        assert {file.name.split("_")[0] for file in folder.iterdir()} == {"counter", "gauge"}
