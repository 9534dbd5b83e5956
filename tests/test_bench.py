"""The benchmark: its arithmetic, its processes (with ranks that only pretend), and one real run on the CPU backend."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_dwdp.entrypoints import bench, bench_engines, cli
from vllm_dwdp.entrypoints.bench_engines import EngineFailure, Engines, last_exception
from vllm_dwdp.entrypoints.bench_modes import load_commands, turns, visible_devices
from vllm_dwdp.entrypoints.bench_rank import PromptSet, Ran, ReadStats, Run
from vllm_dwdp.entrypoints.bench_report import Case, Failure, Startup, chart, reading, summarize, table
from vllm_dwdp.errors import DWDPError

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 64, "head_dim": 32,
    "intermediate_size": 128, "moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "norm_topk_prob": True, "hidden_act": "silu", "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "float32", "vocab_size": 512,
}
CPU = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}
# Answers as a rank does, without an engine; each has a child of its own, as vLLM's engines do. A model of the name
# "hang", "die" or "refuse" misbehaves once it is asked to run.
PRETENDER = """
import os, subprocess, sys, time
from multiprocessing.connection import Connection
import msgspec
from vllm_dwdp.entrypoints.bench_rank import *
parent = Connection(int(sys.argv[1]))
subprocess.Popen(["sleep", "600"], process_group=0)
runs = 0
while True:
    command = msgspec.json.decode(parent.recv_bytes(), type=Command)
    if isinstance(command, Quit):
        sys.exit()
    if isinstance(command, Load):
        load = command
        is_dwdp = "additional_config" in load.engine
        reply = Loaded(kv_cache_tokens=1000, expert_bytes=None if is_dwdp else 2**30)
    elif isinstance(command, ReadStats):
        reply = Stats(values={
            "memory_bytes": {"shard": 2**29, "slots": 2**28}, "forwards": {"streamed": 4 * runs, "direct": 0},
            "exposed_wait_ms": 2.0 * runs, "prefetch_bytes": 10**9 * runs, "copy_ms": 5.0 * runs})
    else:
        if load.engine["model"] == "hang" or load.engine.get("tensor_parallel_size"):
            time.sleep(600)
        if load.engine["model"] == "die":
            os._exit(7)
        if load.engine.get("enable_expert_parallel"):
            print("NotImplementedError: no gather here", flush=True)
            reply = Failed(reason="EngineDeadError: see above for the root cause")
        else:
            runs += 1
            tokens = sum(map(len, load.prompts.token_ids(512)))
            reply = Ran(start_s=10.0, end_s=12.0, prompt_tokens=tokens, output_tokens=load.prompts.num_prompts)
    parent.send_bytes(msgspec.json.encode(reply))
"""


PREFILL = Case(max_num_batched_tokens=256)


def settings(*options: str) -> bench.Settings:
    return cli.settings_of(cli.parser().parse_args(["bench", "--model", "m", *options]))


def prompts(*ranks: int, num_prompts: int = 10, ratio: float = 0.5) -> PromptSet:
    return PromptSet(ranks=ranks, num_prompts=num_prompts, input_len=100, ratio=ratio)


def run_of(tokens: int, start_s: float, end_s: float, out: int = 1) -> Ran:
    return Ran(start_s=start_s, end_s=end_s, prompt_tokens=tokens, output_tokens=out)


def reading_of(mode: str, seconds: float, **changes):
    given = {"case": PREFILL, "round": 1, "repeat": 1, "num_gpus": 1, "before": [], "after": [], "prefilled": []}
    return reading(mode=mode, **(given | {"ranks": [run_of(1000, 0, seconds)]} | changes))


def processes_in(folder: Path) -> list[str]:
    """Command lines of the processes that work in `folder`, which children inherit, whatever they call themselves."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if link.resolve(strict=True) == folder and int(link.parent.name) != os.getpid():
                found.append((link.parent / "cmdline").read_text())
        except OSError:
            continue
    return found


@pytest.fixture
def pretenders(tmp_path, monkeypatch):
    """Ranks that pretend, working in tmp_path; asserts that none of them is left."""
    script = tmp_path / "pretender.py"
    script.write_text(PRETENDER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_engines, "RANK_COMMAND", (sys.executable, str(script)))
    monkeypatch.setattr(bench, "cuda_devices", lambda size: None)
    yield tmp_path
    assert processes_in(tmp_path) == []


def test_prompts_are_reproducible_and_of_the_right_lengths():
    ids = prompts(1).token_ids(512)
    assert ids == prompts(1).token_ids(512) != prompts(0).token_ids(512)
    assert all(50 <= len(prompt) <= 100 for prompt in ids)
    assert {token for prompt in ids for token in prompt} <= set(range(10, 502))
    assert prompts(0, ratio=1.0).lengths(0) == [100] * 10
    with pytest.raises(ValueError, match="vocabulary of 20"):
        prompts(0).token_ids(20)


def test_every_rank_has_equal_work_and_tp_has_all_of_it():
    assert sorted(prompts(0).lengths(0)) == sorted(prompts(0).lengths(1))
    assert prompts(0, 1).token_ids(512) == prompts(0).token_ids(512) + prompts(1).token_ids(512)


def test_modes_start_the_ranks_that_they_are_made_of():
    asked = settings("--size", "3", "--dwdp", '{"slots": 3}', "--engine-args", '{"seed": 5}')
    commands = {turn.mode: load_commands(asked, turn, 4000) for turn in turns(asked)}
    assert {mode: len(ranks) for mode, ranks in commands.items()} == {"dwdp": 3, "ep": 3, "tp": 1, "single": 1}
    assert commands["dwdp"][2].engine["additional_config"] == {
        "dwdp": {"timing": True, "slots": 3, "size": 3, "rank": 2, "rendezvous": "127.0.0.1:4000"}
    }
    assert commands["ep"][1].environment["VLLM_DP_RANK_LOCAL"] == "1" and not commands["dwdp"][1].environment
    assert commands["ep"][1].engine["enable_expert_parallel"] and commands["tp"][0].engine["tensor_parallel_size"] == 3
    assert commands["tp"][0].prompts.ranks == (0, 1, 2) and commands["single"][0].prompts.ranks == (0,)
    assert {command.engine["seed"] for ranks in commands.values() for command in ranks} == {5}
    assert visible_devices("dwdp", ["4", "5"], 2) == ["4", "5"] and visible_devices("single", ["4", "5"], 2) == ["4"]
    assert visible_devices("ep", ["4", "5"], 2) == ["4,5", "4,5"] and visible_devices("tp", None, 2) == [None]


def test_modes_alternate_within_a_number_of_batched_tokens():
    order = turns(settings("--modes", "dwdp,ep", "--max-num-batched-tokens", "64,32"))
    assert [turn.name for turn in order[:5]] == [
        "64-dwdp-round1", "64-ep-round1", "64-dwdp-round2", "64-ep-round2", "32-dwdp-round1"
    ]


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--modes", "dwdp,pp"], "known modes"),
        (["--modes", "ep,ep"], "twice"),
        (["--ratio", "1.5"], "--ratio is 1.5"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--size", "1"], "at least 2"),
        (["--engine-args", '{"model": "x"}'], "sets model"),
        (["--dwdp", '{"slotz": 3}'], "slotz"),
        (["--decode", "1,0"], "above 0"),
        (["--decode", "4", "--output-len", "1"], "needs at least 2"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(options, complaint, capsys):
    with pytest.raises(DWDPError, match=complaint):
        settings(*options)
    assert cli.main(["bench", "--model", "m", *options]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_reading_spans_the_slowest_rank_and_takes_differences_of_statistics():
    before = [{"exposed_wait_ms": 1.0, "forwards": {"streamed": 2}, "prefetch_bytes": 0, "copy_ms": 1.0}, {}]
    after = [{"exposed_wait_ms": 7.0, "forwards": {"streamed": 5}, "prefetch_bytes": 4 * 10**9, "copy_ms": 11.0}, {}]
    ranks = [run_of(300, 10, 12), run_of(500, 11, 14)]
    read = reading_of("dwdp", 1, ranks=ranks, num_gpus=2, before=before, after=after)
    assert read.value == 800 / 4 / 2
    assert read.exposed_wait_ms_per_step == 2 and read.copy_gb_per_s == 400


def test_a_decode_step_is_what_each_further_token_takes():
    case = Case(max_num_batched_tokens=256, batch=4)
    prefilled, ranks = [run_of(400, 0, 1, 4), run_of(400, 0, 2, 4)], [run_of(400, 5, 8, 44), run_of(400, 5, 9, 44)]
    views = [{"forwards": {"direct": 1, "streamed": 1}}, {"forwards": {"direct": 10, "streamed": 2}}]
    read = reading_of("dwdp", 1, case=case, ranks=ranks, prefilled=prefilled, before=views[:1], after=views[1:])
    assert read.value == 1000 * (4 - 2) / 10 and read.direct_share == 0.9
    fast, slow = (reading_of(m, 1, case=case, ranks=[run_of(1, 0, s, 11)], prefilled=[run_of(1, 0, 0)])
                  for m, s in (("dwdp", 1), ("ep", 2)))
    dwdp, ep = summarize(["dwdp", "ep"], [case], [fast, slow], [], [])
    assert (dwdp.value, ep.value, dwdp.ratio_to_ep) == (100, 200, 2)
    assert table([dwdp, ep]).splitlines()[0] == "decode, 4 requests per GPU: ms a step"


@pytest.mark.parametrize("stats", [{}, {"exposed_wait_ms": None, "forwards": {"streamed": 0}, "copy_ms": None}])
def test_missing_statistics_are_left_out(stats):
    read = reading_of("dwdp", 1, before=[stats], after=[stats])
    assert read.exposed_wait_ms_per_step is None and read.copy_gb_per_s is None


def test_rows_are_medians_with_ratios_and_failures(tmp_path):
    readings = [reading_of("dwdp", s) for s in (1, 2, 4)] + [reading_of("single", 1)]
    started = [Startup(mode="dwdp", max_num_batched_tokens=256, round=1, load_s=1, kv_cache_tokens_per_gpu=12345,
                       expert_bytes_per_gpu=1.5 * 2**30)]
    failed = [Failure(mode=mode, max_num_batched_tokens=256, round=2, rank=0, phase="load", reason="Oops: " + "x" * 500,
                      log="") for mode in ("ep", "single")]
    rows = summarize(["dwdp", "ep", "single"], [PREFILL], readings, started, failed)
    dwdp, ep, single = rows
    assert (dwdp.value, dwdp.lowest, dwdp.highest, dwdp.num_readings) == (500, 250, 1000, 3)
    assert dwdp.ratio_to_single == 0.5 and dwdp.ratio_to_ep is None and ep.num_readings == 0
    lines = table(rows).splitlines()
    assert lines[0] == "prefill, 256 batched tokens a step: tokens/s per GPU"
    assert lines[2].split() == ["dwdp", "500", "250", "-", "1,000", "-", "0.50", "-", "-", "-", "1.5", "12,345"]
    assert lines[3].startswith("ep      failed: Oops: xxx") and len(lines[3]) < 180
    assert lines[4].endswith("*") and "single, prefill, 256 batched tokens a step: later failed: Oops" in lines[5]
    pytest.importorskip("matplotlib")
    chart(rows, "title", tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_reason_is_the_root_cause_in_the_log():
    log = """
(MainProcess pid=1) WARNING 01-01 00:00:00 [base.py:1] ValueError: not fatal
(Worker pid=2) ERROR 01-01 00:00:00 [a.py:1]   File "x.py", line 3, in all_gatherv
(Worker pid=2) ERROR 01-01 00:00:00 [a.py:1] NotImplementedError
(EngineCore pid=1) ERROR 01-01 00:00:00 [b.py:1] RuntimeError: Worker failed, see above for the root cause
"""
    assert last_exception(log) == "NotImplementedError in all_gatherv"
    assert last_exception("torch.OutOfMemoryError: CUDA out of memory.\n") == "OutOfMemoryError: CUDA out of memory."
    assert last_exception("all is well") is None


def test_modes_that_fail_do_not_end_the_bench(pretenders, capsys):
    asked = ["--input-len", "100", "--num-prompts", "4", "--timeout", "1.5", "--out", "out", "--repeats", "2"]
    assert cli.main(["bench", "--model", "m", *asked]) == 0
    said = capsys.readouterr().out
    assert said.count("tp: load\n") == said.count("ep: load\n") == 1, "a mode that failed is not tried again"
    result = json.loads((pretenders / "out" / "bench.json").read_text())
    dwdp, ep, tp, single = result["rows"]
    assert [row["num_readings"] for row in result["rows"]] == [4, 0, 0, 4]
    assert ep["failed"] == "NotImplementedError: no gather here"
    assert tp["failed"] == "tp rank 0 has not finished to warm up after 1.5 s (--timeout)"
    assert dwdp["exposed_wait_ms_per_step"] == 0.5 and dwdp["copy_gb_per_s"] == 200
    assert dwdp["expert_bytes_per_gpu"] == 0.75 * 2**30 and single["expert_bytes_per_gpu"] == 2**30
    assert dwdp["ratio_to_single"] == 1 and single["value"] == 4 * 90 / 2
    assert [r["mode"] for r in result["readings"]] == ["dwdp", "dwdp", "single", "single"] * 2
    assert "failed: NotImplementedError: no gather here" in said and "s in all" in said


def test_side_by_side_loads_once_and_alternates(pretenders):
    asked = ["--modes", "dwdp,ep,single", "--input-len", "100", "--num-prompts", "4", "--out", "out", "--repeats", "1"]
    assert cli.main(["bench", "--model", "m", "--side-by-side", *asked]) == 0
    result = json.loads((pretenders / "out" / "bench.json").read_text())
    assert [s["mode"] for s in result["startups"]] == ["dwdp", "ep", "single"]
    assert [(r["mode"], r["round"]) for r in result["readings"]] == [
        ("dwdp", 1), ("single", 1), ("dwdp", 2), ("single", 2)
    ]


@pytest.mark.parametrize("model, reason", [("die", "exit code 7"), ("hang", "dwdp rank 0 has not finished to run")])
def test_a_rank_that_dies_or_hangs_is_named(pretenders, model, reason):
    asked = settings("--model", model)
    (turn, *_) = turns(asked)
    engines = Engines(mode="dwdp", name="x", visible_devices=[None, None], logs=pretenders, timeout_s=9)
    try:
        engines.ask(load_commands(asked, turn, 1), phase="load", timeout_s=20)
        assert len(engines.ask([ReadStats()] * 2, phase="stats", timeout_s=9)) == 2
        with pytest.raises(EngineFailure, match=reason):
            engines.ask([Run(num_prompts=1, output_len=1)] * 2, phase="run", timeout_s=1)
    finally:
        engines.close(orderly=False)
        engines.close(orderly=False)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_ends_everything_that_was_started(tmp_path, number, status):
    """SIGKILL leaves the parent no say: its ranks notice by themselves. They need not be loaded for that."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    command = ["bench", "--model", str(tmp_path), "--modes", "dwdp,single", "--load-format", "dummy"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm_dwdp.entrypoints.cli", *command], cwd=tmp_path, env=os.environ | CPU,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    await_that(lambda: len(processes_in(tmp_path)) >= 4, "the ranks to start")
    time.sleep(2)  # ranks that listen
    process.send_signal(number)
    assert process.wait(60) == status
    await_that(lambda: not processes_in(tmp_path), "the ranks to end")


def await_that(condition, what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


@pytest.mark.skipif("cpu" not in importlib.metadata.version("vllm"), reason="stock expert parallel works on GPUs")
@pytest.mark.parametrize("workload", ["prefill", "decode"])
def test_real_run_on_cpu_survives_expert_parallelism_that_cannot_run(tmp_path, workload):
    """Two real DWDP ranks, the single engine, and stock expert parallelism, which this backend lacks."""
    decode = {"prefill": [], "decode": ["--decode", "1,2", "--output-len", "8"]}[workload]
    model = tmp_path / "tiny-moe"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    engine = {"kv_cache_memory_bytes": 2**26, "max_model_len": 256, "distributed_executor_backend": "uni"}
    command = [
        "bench", "--model", str(model), "--modes", "dwdp,ep,single", "--load-format", "dummy", "--dtype", "float32",
        "--input-len", "100", "--num-prompts", "6", "--max-num-batched-tokens", "256", "--rounds", "1",
        "--repeats", "2", "--engine-args", json.dumps(engine), "--timeout", "300", "--eager", *decode,
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "vllm_dwdp.entrypoints.cli", *command], cwd=tmp_path, env=os.environ | CPU,
        capture_output=True, text=True, timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "dwdp-bench" / "bench.json").read_text())
    rows = {(row["mode"], row["case"]["batch"]): row for row in result["rows"]}
    cases = [1, 2] if decode else [None]
    assert len(rows) == 3 * len(cases)
    for case in cases:
        dwdp, ep, single = (rows[mode, case] for mode in ("dwdp", "ep", "single"))
        assert dwdp["num_readings"] == single["num_readings"] == 2 and dwdp["value"] > 0 < single["value"]
        least = 7 / 9 if decode else 0  # one or two prefill steps, then seven that are read in place
        assert least <= dwdp["direct_share"] <= least * 9 / 8 and dwdp["ratio_to_single"] > 0
        assert single["expert_bytes_per_gpu"] == 2 * 8 * 3 * 32 * 64 * 4 == 2 * ep["expert_bytes_per_gpu"]
        assert dwdp["expert_bytes_per_gpu"] >= single["expert_bytes_per_gpu"] and single["kv_cache_tokens_per_gpu"] > 0
        assert ep["num_readings"] == 0 and "NotImplementedError" in ep["failed"]
    tokens = [(ran["prompt_tokens"], ran["output_tokens"]) for ran in result["readings"][0]["ranks"]]
    assert sorted(tokens)[0][1] == (8 if decode else 6) and (decode or tokens == [(540, 6)] * 2)
    assert f"ep      failed: {ep['failed']}" in done.stdout and "single  " in done.stdout
    assert processes_in(tmp_path) == []
