"""The benchmark with real engines on the CPU backend."""

import importlib.metadata
import json
import os
import subprocess
import sys
from multiprocessing import forkserver
from multiprocessing.connection import Connection

import pytest
from test_bench import CONFIG, CPU

from vllm_dwdp.entrypoints import cli
from vllm_dwdp.entrypoints.bench import rank
from vllm_dwdp.entrypoints.bench.engines import RankProcess

import forks
from harness import processes_in

BROKEN = "dwdp+dispatch_max_tokens=99999999"  # a few hundred are possible


def serve(connection: Connection) -> None:
    """A rank of the bench, forked."""
    rank.main(connection.fileno())


@pytest.fixture
def bench(request, tmp_path, monkeypatch, capfd):
    """Runs the command: with "decode" as a person does, with "prefill" from here and with ranks that are forked."""
    def by_command(arguments):
        done = subprocess.run(
            [sys.executable, "-m", "vllm_dwdp.entrypoints.cli", *arguments], cwd=tmp_path, env=os.environ | CPU,
            capture_output=True, text=True, timeout=500,
        )
        return done.returncode, done.stdout, done.stderr

    def by_forks(arguments):
        forkserver.ensure_running()  # elsewhere than its ranks
        monkeypatch.chdir(tmp_path)
        for name, value in CPU.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(RankProcess, "_start", lambda self, command, environment, folder, pass_fds: forks.Fork(
            serve, [Connection(os.dup(*pass_fds))], self.log, environment, tmp_path
        ))
        return cli.main(arguments), *capfd.readouterr()

    return by_command if request.getfixturevalue("workload") == "decode" else by_forks


@pytest.mark.skipif("cpu" not in importlib.metadata.version("vllm"), reason="runs by hand on GPUs")
@pytest.mark.engine
@pytest.mark.parametrize("workload", ["prefill", "decode"])
def test_real_run_on_cpu_survives_a_mode_that_fails(bench, tmp_path, workload):
    """Two real DWDP ranks, the single engine, and a mode that engines refuse."""
    model = tmp_path / "tiny-moe"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    engine = {"kv_cache_memory_bytes": 2**26, "max_model_len": 256, "dtype": "float32", "distributed_executor_backend": "uni"}
    modes = ["dwdp", "single"] if workload == "decode" else ["dwdp", BROKEN, "single"]
    points = [1, 2] if workload == "decode" else [256]
    command = [
        "bench", "--model", str(model), "--modes", ",".join(modes), "--load-format", "dummy", "--input-len", "100",
        "--num-prompts", "6", "--max-num-batched-tokens", "256", "--rounds", "1", "--repeats", "2", "--eager",
        "--engine-args", json.dumps(engine), "--dwdp", '{"dispatch": "off"}',  # which step meets a peer is left to timing
    ]
    if workload == "decode":
        command += ["--side-by-side", "--decode", "1,2", "--output-len", "8"]
    else:
        command += ["--ratio", "1", "--uneven", "2"]
    status, said, errors = bench(command)
    assert status == int(BROKEN in modes), said + errors
    result = json.loads((tmp_path / "dwdp-bench" / "bench.json").read_text())
    rows = {(row["mode"], row["point"]): row for row in result["rows"]}
    assert rows.keys() == {(mode, point) for mode in modes for point in points}
    for point in points:
        dwdp, single = (rows[mode, point] for mode in ("dwdp", "single"))
        assert dwdp["num_readings"] == single["num_readings"] == 2 and dwdp["median"] > 0 < single["median"]
        assert dwdp["ratio_to_single"] > 0 and single["held_per_gpu"]["kv_cache_tokens"] > 0
        assert single["held_per_gpu"]["expert_bytes"] == 3 * 8 * 3 * 32 * 64 * 4
        if workload == "decode":
            steps = 2 * 2 * 7  # ranks, readings, steps after the first; a request that comes late has some of its own
            assert steps <= dwdp["views"]["direct"] <= point * steps
        else:
            broken = rows[BROKEN, point]
            assert broken["num_readings"] == 0 and "99999999" in broken["failed"] and broken["failed"][:80] in said
            assert list(dwdp["views"]) == ["streamed"] and dwdp["copy_gb_per_s"] > 0
    spent = result["readings"][0]["spent"]
    assert spent["prompt_tokens"] == (0 if workload == "decode" else (12 + 6) * 100)
    assert "single  " in said and ("rank 0 2 times as many" in said) == (workload == "prefill")
    assert processes_in(tmp_path) == []
