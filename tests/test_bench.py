"""The benchmark: its arithmetic, its processes (with ranks that only pretend), and real runs on the CPU backend."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from vllm_dwdp.entrypoints import cli
from vllm_dwdp.entrypoints.bench import checks, engines
from vllm_dwdp.entrypoints.bench import rank as bench_rank
from vllm_dwdp.entrypoints.bench import run as bench
from vllm_dwdp.entrypoints.bench.comparison import Comparison
from vllm_dwdp.entrypoints.bench.engines import EngineFailure, Engines, last_exception
from vllm_dwdp.entrypoints.bench.modes import Settings, load_arguments, short, visible_devices
from vllm_dwdp.entrypoints.bench.rank import Held, Ran, make_prompts, prompt_lengths
from vllm_dwdp.entrypoints.bench.report import GIB, chart, less, reading, summarize, table, total
from vllm_dwdp.entrypoints.bench.room import too_large, weight_bytes
from vllm_dwdp.entrypoints.bench.serve import ServeSettings
from vllm_dwdp.entrypoints.plan.model import parse
from vllm_dwdp.entrypoints.plan.source import RESIZING
from vllm_dwdp.errors import DWDPError

from harness import await_that, processes_in
from plan_models import QWEN3

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 64, "head_dim": 32,
    "intermediate_size": 128, "moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 3, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "norm_topk_prob": True, "hidden_act": "silu", "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "float32", "vocab_size": 512,
}
CPU = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}
# Answers as a rank does, without an engine; each has a child of its own, as vLLM's engines do. A model of the name
# "hang" or "die" misbehaves once it is asked to run.
PRETENDER = """
import os, subprocess, sys, time
from vllm_dwdp.entrypoints.bench import rank as bench_rank
from vllm_dwdp.entrypoints.bench.rank import Held, Ran
subprocess.Popen(["sleep", "600"], process_group=0)
class Rank:
    runs = 0
    def load(self, *, engine, ranks, **rest):
        self.engine, self.ranks = engine, ranks
        if engine["model"] == "together":
            open(f"loading-{os.getpid()}", "w").close()
            while len([name for name in os.listdir() if name.startswith("loading-")]) < 5:
                time.sleep(0.05)
        return Held(expert_bytes=2**30, kv_cache_tokens=1000)
    def run(self, *, num_prompts, output_len):
        if self.engine["model"] == "hang" or self.engine.get("tensor_parallel_size"):
            time.sleep(600)
        if self.engine["model"] == "die":
            os._exit(7)
        if self.engine.get("enable_expert_parallel"):
            print("NotImplementedError: no gather here", flush=True)
            raise RuntimeError("see above for the root cause")
        self.runs += 1
        stats = {}
        if "additional_config" in self.engine:
            stats = {"exposed_wait_ms": 2.0 * self.runs, "streamed": 4 * self.runs, "direct": 0,
                     "prefetch_bytes": 10**9 * self.runs, "copy_ms": 5.0 * self.runs}
        num = num_prompts * len(self.ranks)
        return Ran(start_s=10.0, first_s=13.0, steps_s=[12.0 + n for n in range(2, output_len + 1)], end_s=12.0 + output_len,
                   prompt_tokens=90 * num, output_tokens=num * output_len, stats=stats)
    def close(self):
        os._exit(0)
bench_rank.Rank = Rank
bench_rank.main(int(sys.argv[1]))
"""


def settings(*options: str) -> Settings:
    given = vars(cli.parser().parse_args(["bench", "--model", "m", *options]))
    del given["run"]
    return Settings.of(given)


def ran(
    tokens: int, start_s: float, end_s: float, out: int = 1, decode_s: float = 0.0, steps: int = 0, **stats: float
) -> Ran:
    first_s = end_s - decode_s
    return Ran(
        start_s=start_s, first_s=first_s, steps_s=[first_s + decode_s * (n + 1) / steps for n in range(steps)], end_s=end_s,
        prompt_tokens=tokens, output_tokens=out, stats=stats,
    )


def reading_of(mode: str, seconds: float, **stats: float):
    spent = Counter(elapsed_s=seconds, prompt_tokens=1000, output_tokens=1, **stats)
    return reading(mode=mode, point=256, round=1, num_gpus=1, spent=spent)


@pytest.fixture
def pretenders(tmp_path, monkeypatch):
    """Ranks that pretend, working in tmp_path; asserts that none of them is left."""
    script = tmp_path / "pretender.py"
    script.write_text(PRETENDER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engines, "RANK_COMMAND", (sys.executable, str(script)))
    monkeypatch.setattr(bench, "cuda_devices", lambda size: None)
    for name in ("refuse_impossible", "refuse_unshared"):  # a model of this name is nowhere
        monkeypatch.setattr(bench, name, lambda *_: None)
    yield tmp_path
    assert processes_in(tmp_path) == []


def test_prompts_are_reproducible_and_every_rank_has_equal_work():
    ids = make_prompts(1, 10, 100, 0.5, 512)
    assert ids == make_prompts(1, 10, 100, 0.5, 512) != make_prompts(0, 10, 100, 0.5, 512)
    assert all(50 <= len(prompt) <= 100 for prompt in ids)
    assert {token for prompt in ids for token in prompt} <= set(range(10, 502))
    assert prompt_lengths(0, 10, 100, 1.0) == [100] * 10
    assert sorted(prompt_lengths(0, 10, 100, 0.5)) == sorted(prompt_lengths(1, 10, 100, 0.5))


def test_modes_start_the_ranks_that_they_are_made_of():
    of_its_own = load_arguments(settings("--dwdp", '{"slots": 3}'), "dwdp+slots=4+dispatch=off", 16384, 4000)
    assert {"slots": 4, "dispatch": "off"}.items() <= of_its_own[1]["engine"]["additional_config"]["dwdp"].items()
    asked = settings("--size", "3", "--dwdp", '{"slots": 3}', "--engine-args", '{"seed": 5}')
    loads = {mode: load_arguments(asked, mode, 16384, 4000) for mode in asked.modes}
    assert {mode: len(ranks) for mode, ranks in loads.items()} == {"dwdp": 3, "ep": 3, "tp": 1, "single": 1}
    assert loads["dwdp"][2]["engine"]["additional_config"] == {
        "dwdp": {"timing": True, "slots": 3, "size": 3, "rank": 2}
    }
    assert loads["ep"][1]["environment"]["VLLM_DP_RANK_LOCAL"] == "1"
    assert len({repr(load["environment"]) for load in loads["dwdp"]}) == 1 and "DWDP_GROUP_TOKEN" in loads["dwdp"][0]["environment"]
    assert loads["ep"][1]["engine"]["enable_expert_parallel"] and loads["tp"][0]["engine"]["tensor_parallel_size"] == 3
    assert loads["tp"][0]["ranks"] == [0, 1, 2] and loads["single"][0]["ranks"] == [0]
    assert {load["engine"]["seed"] for ranks in loads.values() for load in ranks} == {5}
    assert visible_devices("dwdp+slots=4", ["4", "5", "6"], 3) == ["4,5,6", "5,6,4", "6,4,5"], "its own first"
    assert visible_devices("single", ["4", "5"], 2) == ["4"]
    assert visible_devices("ep", ["4", "5"], 2) == ["4,5", "4,5"] and visible_devices("tp", None, 2) == [None]
    beside = settings("--side-by-side", "--gpu-memory-utilization", "0.9")
    assert abs(sum(map(beside.memory_share, beside.modes)) - 0.9) < 1e-9


def test_modes_that_cannot_fit_are_known_from_sizes():
    """Qwen3-30B-A3B in bf16 on two GPUs of 40 GiB: 2.9 GiB that every rank holds, 54 of experts, half of them a rank."""
    model = parse("qwen3", QWEN3)
    found = {
        mode: round(weight_bytes(settings("--modes", mode), model, mode) / GIB, 1)
        for mode in ("dwdp", "dwdp+slots=4", "dwdp+cache_gib=10", "ep", "tp", "single")
    }
    assert found == {
        "dwdp": 31.0, "dwdp+slots=4": 32.1, "dwdp+cache_gib=10": 40.6, "ep": 29.9, "tp": 28.4, "single": 56.9
    }
    why = too_large(settings("--modes", "dwdp,ep,dwdp+cache_gib=10,single"), model, 40 * GIB)
    assert set(why) == {"dwdp+cache_gib=10", "single"}
    assert why["single"].startswith("its weights take 56.9 GiB a GPU, which has 36.0 GiB for them within gpu_memory_util")
    together = ["--modes", "dwdp,ep,tp", "--side-by-side", "--engine-args", f'{{"kv_cache_memory_bytes": {3 * GIB}}}']
    assert not too_large(settings(*together), model, 110 * GIB)
    (why,) = too_large(settings(*together), model, 105 * GIB).values()
    assert why.startswith("28.4 GiB of weights, a KV cache of 3.0 and about 2.5 of an engine have no room beside dwdp, ep, which take 71.9")
    beside = settings("--modes", "ep", "--engine-args", f'{{"kv_cache_memory_bytes": {11 * GIB}}}')
    assert "beside a KV cache of 11.0 GiB" in too_large(beside, model, 40 * GIB)["ep"]


@pytest.mark.parametrize(
    "given", [{"quantization": "fp8"}, {"dtype": "float32"}, {"cpu_offload_gb": 40}, {"hf_overrides": {"num_hidden_layers": 4}},
              {"pipeline_parallel_size": 2}, {"gpu_memory_utilization": 2}],
    ids=str,
)
def test_a_mode_that_may_fit_by_engine_args_is_left_to_vllm(given):
    """What changes the weights' sizes or the share of memory counts as vLLM counts it."""
    assert too_large(settings("--modes", "single"), parse("qwen3", QWEN3), 40 * GIB)
    assert not too_large(settings("--modes", "single", "--engine-args", json.dumps(given)), parse("qwen3", QWEN3), 40 * GIB)


def test_what_changes_sizes_is_named_as_vllm_names_it():
    from vllm.engine.arg_utils import EngineArgs

    assert {field.name for field in dataclasses.fields(EngineArgs)} >= RESIZING


def test_a_mode_that_cannot_fit_is_not_loaded(pretenders, monkeypatch, capsys):
    (pretenders / "large").mkdir()
    (pretenders / "large" / "config.json").write_text(json.dumps(QWEN3))
    monkeypatch.setattr(bench, "cuda_devices", lambda size: ["0", "1"])
    monkeypatch.setattr(bench, "query_gpus", lambda fields, devices=None: ["40960", "40960"])
    asked = ["--input-len", "100", "--num-prompts", "4", "--modes", "single", "--out", "out"]
    assert cli.main(["bench", "--model", str(pretenders / "large"), *asked]) == 1
    said = capsys.readouterr().out
    assert ": load\n" not in said and "single: its weights take 56.9 GiB a GPU" in said
    assert "its weights take" in json.loads((pretenders / "out" / "bench.json").read_text())["rows"][0]["failed"]


def test_decode_has_defaults_of_its_own():
    prefill, decode = settings(), settings("--decode", "1,64")
    assert (prefill.input_len, prefill.output_len) == (8192, 1)
    assert (decode.input_len, decode.output_len, decode.decode) == (128, 256, (1, 64))
    assert settings("--decode", "2", "--input-len", "9").input_len == 9


def test_engines_are_those_of_vllm_serve_unless_told():
    """Compiled, and a worker process for each rank of dwdp, as expert parallelism has by itself."""
    load = load_arguments(settings(), "dwdp", 256, 1)[1]["engine"]
    assert (load["enforce_eager"], load["distributed_executor_backend"]) == (False, "mp")
    told = settings("--eager", "--engine-args", '{"distributed_executor_backend": "uni"}')
    load = load_arguments(told, "dwdp", 256, 1)[1]["engine"]
    assert (load["enforce_eager"], load["distributed_executor_backend"]) == (True, "uni")
    assert "distributed_executor_backend" not in load_arguments(settings(), "ep", 256, 1)[0]["engine"]


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--modes", "dwdp,pp"], "--modes has pp"),
        (["--modes", "dwdp+slots=3,tp+slots=3"], r"--modes has tp\+slots=3, which is none of"),
        (["--modes", "ep+a=1 2 9,ep+a=1 3 9"], r"no table could tell apart"),
        (["--modes", "dwdp+slotz=3"], "slotz in --modes is no option; did you mean slots in --modes"),
        (["--ratio", "1.5"], "--ratio"),
        (["--rounds", "0"], "--rounds"),
        (["--size", "1"], "at least 2"),
        (["--engine-args", '{"model": "x"}'], "sets model"),
        (["--engine-args", '{"enforce_eager": true}'], "sets enforce_eager"),
        (["--dwdp", '{"timing": false}'], "sets timing, which the bench sets itself"),
        (["--modes", "ep,dwdp+rank=1"], "sets rank, which the bench sets itself"),
        (["--engine-args", '{"kv_cache_memory_bytes": "3G"}'], "kv_cache_memory_bytes in --engine-args is '3G'"),
        (["--dwdp", '{"slotz": 3}'], "slotz in --dwdp is no option; did you mean slots in --dwdp"),
        (["--timeout", "inf"], "--timeout is 'inf'"),
        (["--uneven", "inf"], "--uneven is 'inf'"),
        (["--decode", "1,0"], "--decode"),
        (["--decode", "4", "--output-len", "1"], "--output-len above 1"),
        (["--decode", "64", "--input-len", "1000"], "do not fit one step"),
        (["--decode", "4", "--uneven", "2"], "--uneven is for prefill"),
        (["--uneven", "0.5"], "--uneven is '0.5'"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(options, complaint, capsys):
    with pytest.raises(DWDPError, match=complaint):
        settings(*options)
    assert cli.main(["bench", "--model", "m", *options]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("modes", "on_cpu", "named"),
    [
        ("dwdp,ep", True, "--modes has ep: vLLM's CPU build has no expert parallelism"),
        ("dwdp,ep+all2all_backend=pigeon", False, "all2all_backend=pigeon: of this vLLM's backends, allgather_reducescatter can run here"),
        ("dwdp,ep+all2all_backend=flashinfer_nvlink_one_sided", False, "backends, allgather_reducescatter can run here; choose one"),
        ("dwdp,ep+all2all_backend=deepep_low_latency", False, "backends, allgather_reducescatter can run here; choose one"),
        ("dwdp,ep+max_num_seqs=8+pigeon=1", False, "pigeon=1: pigeon is no argument of this vLLM"),
        ("dwdp,ep+model=other", False, "model is no argument of this vLLM, or one that the modes set themselves"),
        ("dwdp,ep+all2all_backend=allgather_reducescatter", False, "ask for 8193 tokens in a sequence, "),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_before_loading(tmp_path, monkeypatch, capsys, modes, on_cpu, named):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr(checks, "on_cpu", lambda: on_cpu)
    assert cli.main(["bench", "--model", str(tmp_path), "--modes", modes]) == 2
    said = capsys.readouterr()
    assert named in said.err and len(said.err.splitlines()) == 1 and not said.out


SERVE = ["--serve", "--modes", "dwdp", "--loads", "8:1:inf:4"]
SHORT = ["--input-len", "8", "--output-len", "1"]


@pytest.mark.parametrize(
    ("config", "options", "named"),
    [
        (CONFIG, ["--out", "file"], "--out is file, where no folder can be written: Not a directory"),
        (CONFIG, ["--out", "/proc/no/folder"], "--out is /proc/no/folder, where no folder"),
        (CONFIG, [*SERVE, "--out", "file"], "--out is file"),
        (CONFIG, [*SERVE, "--serve-args", "--seed 1 --port=8000"], "--serve-args sets --port, which the bench"),
        (CONFIG, [*SERVE, "--serve-args", "--parallel dwdp -dp 2"], "--serve-args sets --parallel, -dp, which"),
        (CONFIG, [*SERVE, "--serve-args", '"abc'], "--serve-args is '\"abc': No closing quotation"),
        (CONFIG | {"vocab_size": None}, SERVE, "has no tokenizer, and its config.json no vocab_size"),
        ([], ["--modes", "dwdp"], "config.json is no JSON object"),
        (CONFIG, [*SHORT, "--modes", "dwdp", "--size", "9"], "9 ranks cannot share 8 experts: every rank must own one; use at most 8"),
        (CONFIG, [*SHORT, "--modes", "dwdp+experts_per_rank=3"], "experts_per_rank is 3: 8 experts over 2 ranks need 4 to 8"),
        (CONFIG, [*SHORT, "--dwdp", '{"experts_per_rank": 9}', "--modes", "dwdp"], "experts_per_rank is 9: "),
        (CONFIG | {"n_routed_experts": 8}, [*SERVE, "--size", "9"], "9 ranks cannot share 8 experts"),
        (CONFIG | {"text_config": 3}, ["--modes", "dwdp"], "text_config is 3: it must be a JSON object"),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_what_cannot_start_is_refused_in_one_line(tmp_path, monkeypatch, capsys, config, options, named):
    """Before anything is printed, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["bench", "--model", str(tmp_path), *options]) == 2
    said = capsys.readouterr()
    assert named in said.err and len(said.err.splitlines()) == 1 and not said.out
    assert {path.name for path in tmp_path.iterdir()} == {"file", "config.json"}


def test_expert_parallelism_with_a_backend_is_the_base_where_it_is_faster():
    mode = "ep+all2all_backend=nixl_ep+cudagraph_capture_sizes=1 2 8192"
    loads = load_arguments(settings("--modes", mode), mode, 256, 1)
    assert len(loads) == 2 and loads[1]["engine"]["all2all_backend"] == "nixl_ep"
    assert loads[1]["engine"]["cudagraph_capture_sizes"] == [1, 2, 8192]
    told = ServeSettings(model="m", modes=(mode,)).arguments(mode)
    assert short(mode) == "ep+all2all_backend=nixl_ep+cudagraph_capture_sizes=1..8192", "no file has a name of 300 bytes"
    assert told[-5:] == ["--all2all-backend=nixl_ep", "--cudagraph-capture-sizes", "1", "2", "8192"]
    readings = [reading_of("dwdp", 1), reading_of("ep", 4), reading_of(mode, 2)]
    rows = summarize(["dwdp", "ep", mode], [256], False, readings, {}, {})
    assert [row.ratio_to_ep for row in rows] == [2, 0.5, 1]


def test_engines_that_are_equally_fast_have_equal_figures_under_uneven_loads():
    """A single engine has the prompts of rank 0, and the other ranks' replicas would be done earlier."""
    given = settings("--uneven", "3")
    for mode, prompt_tokens in (("single", 3000), ("dwdp", 4000)):
        read = reading(mode=mode, point=256, round=1, num_gpus=given.gpus_at_work(mode), spent=total([], [ran(prompt_tokens, 0, 2)]))
        assert read.value == 1000
    assert settings("--uneven", "1.4", "--num-prompts", "1").gpus_at_work("single") == 1, "1.4 prompts are one"


def test_reading_spans_the_slowest_rank_and_takes_differences_of_statistics():
    before = [ran(1, 0, 1, exposed_wait_ms=1.0, streamed=2, prefetch_bytes=0, copy_ms=1.0), ran(1, 0, 1)]
    after = [ran(300, 10, 12, exposed_wait_ms=7.0, streamed=5, prefetch_bytes=4e9, copy_ms=11.0), ran(500, 11, 14)]
    read = reading(mode="dwdp", point=256, round=1, num_gpus=2, spent=total(before, after))
    assert read.value == 800 / 4 / 2
    assert read.exposed_wait_ms_per_step == 2 and read.copy_gb_per_s == 400
    replayed = reading_of("dwdp", 1, exposed_wait_ms=6, streamed=5, replays=2, prefetch_bytes=5e9, copy_ms=30)
    assert replayed.exposed_wait_ms_per_step == 2 and replayed.copy_gb_per_s == 100, "graphs are not timed"
    assert reading_of("dwdp", 1, streamed=5, replays=5, prefetch_bytes=5e9).exposed_wait_ms_per_step is None
    missing = reading_of("single", 1)
    assert missing.exposed_wait_ms_per_step is None and missing.copy_gb_per_s is None


class Trailing:
    """An engine that goes on with empty steps after its requests' last token. A step takes a second."""

    def __init__(self, tokens: int, empty: int):
        self.tokens, self.empty, self.made, self.requests = tokens, empty, 0, []

    def monotonic(self) -> float:
        return float(self.made)

    def add_request(self, number, prompt, sampling):
        self.requests.append(number)

    def has_unfinished_requests(self) -> bool:
        return self.made < self.tokens + self.empty

    def step(self):
        self.made += 1
        last = SimpleNamespace(token_ids=[0] * self.made)
        return [SimpleNamespace(request_id=number, outputs=[last]) for number in self.requests] if self.made <= self.tokens else []


@pytest.mark.parametrize("output_len", [1, 4])
def test_a_run_ends_with_its_last_token(monkeypatch, output_len):
    """Whatever the engine does after it, which expert parallelism's ranks do until their next agreement."""
    engine, rank = Trailing(output_len, 15), bench_rank.Rank()
    rank.llm, rank.streams, rank.shares, rank.prompts = SimpleNamespace(llm_engine=engine), False, [1.0], [[[11], [12]]]
    monkeypatch.setattr(bench_rank, "time", engine)
    found = rank.run(num_prompts=2, output_len=output_len)
    assert (found.start_s, found.first_s, found.end_s) == (0, 1, output_len) and not engine.has_unfinished_requests()
    assert found.steps_s == list(range(2, output_len + 1)) and found.output_tokens == 2 * output_len


def test_requests_that_do_not_fit_the_kv_cache_are_not_measured_as_if_they_did(pretenders):
    """They would be preempted, and a step have fewer of them."""
    asked = ["--decode", "2,100", "--input-len", "10", "--output-len", "5", "--modes", "dwdp,single", "--out", "out"]
    assert cli.main(["bench", "--model", "m", *asked]) == 1
    for row in json.loads((pretenders / "out" / "bench.json").read_text())["rows"]:
        if row["point"] == 2:
            assert row["num_readings"] == 6 and not row["failed"]
        else:
            assert row["num_readings"] == 0 and row["failed"].startswith("100 requests of 15 tokens a GPU, of whose KV cache has 1,000")
    assert cli.main(["bench", "--model", "m", *asked, "--decode", "100"]) == 1


@pytest.mark.parametrize("is_ignored", [False, True], ids=["hangs up", "nohup"])
def test_a_terminal_that_hangs_up_ends_a_comparison_unless_that_is_ignored(tmp_path, monkeypatch, is_ignored):
    class Short(Comparison):
        measured, failures, reported = [1], {}, 0

        def measure(self):
            os.kill(os.getpid(), signal.SIGHUP)

        def report(self):
            self.reported += 1

    was = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        short = Short(str(tmp_path))
        assert (short.run(), short.reported) == (0 if is_ignored else 130, 1)
        assert signal.getsignal(signal.SIGHUP) is (signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, was)


def test_a_decode_step_is_what_each_further_token_takes():
    first = total([], [ran(400, 0, 1, 4), ran(400, 0, 20, 4)])  # however slow: a mode that slept wakes up in it
    spent = less(total([], [ran(400, 5, 17, 44, 10, 10, direct=10), ran(400, 5, 19, 44, 10, 20, direct=10)]), first)
    read = reading(mode="dwdp", point=4, round=1, num_gpus=2, spent=spent, decode=True)
    assert read.value == 1000 * (17 - 9) / ((8 + 16) / 2), "of the time in which both decode"
    spent = total([], [ran(400, 5, 7, 44, 1, 10), ran(400, 5, 9, 44, 2, 10)])
    assert reading(mode="dwdp", point=4, round=1, num_gpus=2, spent=spent, decode=True).value == 200, "never together"
    slow = reading(mode="ep", point=4, round=1, num_gpus=2, spent=Counter(decode_s=4, decode_steps=3), decode=True)
    dwdp, ep = summarize(["dwdp", "ep"], [4], True, [read, slow], {}, {})
    assert (dwdp.ratio_to_ep, dwdp.views) == (2, {"direct": 20})
    assert "ms/step" in table([dwdp, ep], True) and "100% direct" in table([dwdp, ep], True)


def test_rows_are_medians_with_ratios_and_failures(tmp_path):
    readings = [reading_of("dwdp", s) for s in (1, 2, 4)] + [reading_of("single", 1)]
    held = {(mode, 256): Held(expert_bytes=1.5 * GIB, kv_cache_tokens=12345) for mode in ("dwdp", "tp")}
    failed = {(mode, 256): "Oops: " + "x" * 500 for mode in ("ep", "single")}
    rows = summarize(["dwdp", "ep", "single", "tp"], [256], False, readings, held, failed)
    dwdp, ep, *_ = rows
    assert (dwdp.median, dwdp.lowest, dwdp.highest, dwdp.num_readings) == (500, 250, 1000, 3)
    assert dwdp.ratio_to_single == 0.5 and dwdp.ratio_to_ep is None and ep.num_readings == 0
    lines = table(rows, False).splitlines()
    assert lines[1].split() == ["dwdp", "256", "500", "250", "-", "1,000", "-", "0.50", "-", "-", "-", "1.5", "12,345"]
    assert lines[2].split()[:3] == ["ep", "256", "failed:"] and lines[2].endswith("...")
    assert "later failed: Oops" in lines[3]
    assert lines[4].split() == ["tp", "256", *"-" * 7, "1.5", "12,345", "not", "measured"], "loaded, then interrupted"
    pytest.importorskip("matplotlib")
    chart(rows, False, "title", tmp_path / "bench.png")
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


@pytest.mark.slow
def test_modes_that_fail_do_not_end_the_bench(pretenders, capsys):
    asked = ["--input-len", "100", "--num-prompts", "4", "--timeout", "4", "--out", "out", "--repeats", "2"]
    assert cli.main(["bench", "--model", "m", *asked]) == 1
    said = capsys.readouterr().out
    assert said.count("tp: load\n") == said.count("ep: load\n") == 1, "a mode that failed is not tried again"
    result = json.loads((pretenders / "out" / "bench.json").read_text())
    dwdp, ep, tp, single = result["rows"]
    assert [row["num_readings"] for row in result["rows"]] == [4, 0, 0, 4]
    assert "NotImplementedError: no gather here" in ep["failed"] and "NotImplementedError: no gather here" in said
    assert tp["failed"] == "rank 0, warm up: not finished after 4 s (--timeout)"
    assert dwdp["exposed_wait_ms_per_step"] == 0.5 and dwdp["copy_gb_per_s"] == 200
    assert single["held_per_gpu"] == {"expert_bytes": 2**30, "kv_cache_tokens": 1000}
    assert dwdp["ratio_to_single"] == 1 and single["median"] == 4 * 90 / 3
    assert [r["mode"] for r in result["readings"]] == ["dwdp", "dwdp", "single", "single"] * 2
    assert "vllm-dwdp" in result["command"]


def test_side_by_side_loads_once_and_alternates(pretenders, capsys):
    asked = ["--modes", "dwdp,ep,single", "--decode", "2", "--output-len", "5", "--out", "out", "--repeats", "1"]
    assert cli.main(["bench", "--model", "m", "--side-by-side", *asked]) == 1
    assert capsys.readouterr().out.count(": load\n") == 3
    result = json.loads((pretenders / "out" / "bench.json").read_text())
    assert [(r["mode"], r["round"], r["value"]) for r in result["readings"]] == [
        ("dwdp", 1, 1000), ("single", 1, 1000), ("dwdp", 2, 1000), ("single", 2, 1000)
    ]


def test_side_by_side_loads_all_modes_at_once_if_told_what_the_kv_cache_takes(pretenders):
    asked = ["--modes", "dwdp,dwdp+slots=3,single", "--side-by-side", "--engine-args", '{"kv_cache_memory_bytes": 1}']
    assert cli.main(["bench", "--model", "together", *asked, "--timeout", "20", "--out", "out"]) == 0
    result = json.loads((pretenders / "out" / "bench.json").read_text())
    assert [row["num_readings"] for row in result["rows"]] == [6, 6, 6]


@pytest.mark.parametrize("model, reason", [("die", "exit code 7"), ("hang", "rank 0, run: not finished after 1 s")])
def test_a_rank_that_dies_or_hangs_is_named(pretenders, model, reason):
    asked = settings("--model", model)
    engines = Engines(name="x", visible_devices=[None, None], logs=pretenders, timeout_s=20)
    try:
        engines.ask("load", "load", *load_arguments(asked, "dwdp", 256, 1))
        engines.timeout_s = 1
        with pytest.raises(EngineFailure, match=reason):
            engines.ask("run", "run", {"num_prompts": 1, "output_len": 1})
    finally:
        engines.close(orderly=False)
        engines.close(orderly=False)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_ends_everything_that_was_started(tmp_path, number, status):
    """SIGKILL leaves the parent no say: its ranks notice by themselves."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    command = ["bench", "--model", str(tmp_path), "--modes", "dwdp,single", "--load-format", "dummy",
               "--input-len", "100"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm_dwdp.entrypoints.cli", *command], cwd=tmp_path, env=os.environ | CPU,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    await_that(lambda: len(processes_in(tmp_path)) >= 3, "the ranks to start")
    time.sleep(2)  # ranks that listen
    process.send_signal(number)
    assert process.wait(60) == status
    await_that(lambda: not processes_in(tmp_path), "the ranks to end")
