"""Invariant: the serving comparison measures each mode that serves, names one that does not, leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from harness import processes_in

pytestmark = pytest.mark.engine

SERVE_ARGS = (
    "--dtype float32 --enforce-eager --max-model-len 256 --max-num-batched-tokens 128 --kv-cache-memory-bytes 64000000"
)



def test_side_by_side(models, tmp_path: Path) -> None:
    """One load, twice, on real servers. vLLM's CPU build cannot run expert parallelism, and the comparison goes on."""
    command = [
        sys.executable, str(ROOT / "examples" / "serving.py"), models("qwen3_moe"), "--modes", "dwdp,ep",
        "--side-by-side", "--repeats", "2", "--loads", "64:8:inf:16", "--serve-args", SERVE_ARGS,
        "--timeout", "240", "--out", str(tmp_path),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    written = json.loads((tmp_path / "serving.json").read_text())
    assert [(m["load"], m["repeat"]) for m in written["measured"]] == [("64:8:inf:16", 0), ("64:8:inf:16", 1)]
    assert all(m["mode"] == "dwdp" and m["median_ttft_ms"] > 0 < m["request_throughput"] for m in written["measured"])
    assert list(written["failed"]) == ["ep"] and str(tmp_path) in written["failed"]["ep"]
    assert all(line.split()[1] == "dwdp" for line in ended.stdout.splitlines() if line.strip().startswith("64:8:"))
    assert processes_in(tmp_path) == []
