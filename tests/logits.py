"""Are bf16 log-probabilities of DWDP no further from a single engine's than those of vLLM's expert parallelism?

    python tests/logits.py OUT.json    # tests/visit.sh MODEL OUT logits

All modes are loaded, one after the other asked, twice; their ranks get the same prompts at the same time, and take one a step in
graphs of the same sizes, so that all compute the same rows together. Each answers with the log-probability of every token of the
vocabulary after every token of the prompts, which is compared with the single engine's first answer: of single that says how far
it is from itself. Where a router's choice is close, rounding decides which expert computes, and all else is small beside that: so
it takes thousands of positions to tell modes apart, and each counts by its mean. On CPU, where expert parallelism cannot be had,
DWDP is held to CPU_BOUND. The exit status says whether all were near.
"""

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vllm_dwdp.entrypoints.bench.modes import Settings, is_dwdp
from vllm_dwdp.entrypoints.bench.origin import cuda_devices, origin
from vllm_dwdp.entrypoints.bench.rank import Rank

import conftest  # noqa: F401  (vLLM's environment)
from harness import make_prompts
from quantized import SHAPE
from ranks_of_modes import LOAD_S, Mode

VOCAB, STEP_TOKENS, SHORTEST, LONGEST = 512, 1024, 5, 400
NUM_PROMPTS = {"cuda": 48, "cpu": 8}  # 9,700 positions, by which a mean is known within 2 or 3 %, and 1,600
ANSWER_S = 200
GRAPHS = [1, 2, 4, *range(8, 512 + 1, 8)]
DISPATCHED = f"dwdp+dispatch_max_tokens={LONGEST}"  # of a model so small no step gains
NEAR = 1.1  # times expert parallelism's mean difference
# The greatest logits are 16 to 32, where neighbouring bf16 numbers are 2**-3 apart: one such step for each of the 4 layers. Of
# transformers' model two orders in which a layer adds its experts' outputs differ by 0.22 to 0.29 in the mean.
CPU_BOUND = SHAPE["num_hidden_layers"] * 2**-3
VIEWS = ("streamed", "direct", "dispatched")


def answerer(rank: Rank) -> Callable[[list[dict]], tuple[np.ndarray, dict[str, float]]]:
    return partial(log_probabilities, rank)


def log_probabilities(rank: Rank, prompts: list[dict]) -> tuple[np.ndarray, dict[str, float]]:
    """Float64 [positions, VOCAB] over all prompts, and DWDP's steps by view meanwhile."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
    before = rank.stats()
    outputs = rank.llm.generate(prompts, sampling, use_tqdm=False)
    after = rank.stats()
    found = []
    for output in outputs:  # flat: of each position but the first the prompt's own next token, then all tokens, best first
        ids, values = output.prompt_logprobs.token_ids, output.prompt_logprobs.logprobs
        rows = len(output.prompt_token_ids) - 1
        table = np.full((rows, VOCAB), np.nan)
        table[np.arange(rows).repeat(len(ids) // rows), ids] = values
        found.append(table)
    return np.concatenate(found), {view: after[view] - before[view] for view in VIEWS if view in after}


def compare(mode: str, answers: list[tuple[np.ndarray, dict[str, float]]], first: np.ndarray) -> dict[str, Any]:
    """How far the answers of all of a mode's ranks are from `first`."""
    apart = np.concatenate([np.abs(found - first) for found, _ in answers])
    others = np.concatenate([found.argmax(1) != first.argmax(1) for found, _ in answers])
    steps = {view: sum(of.get(view, 0) for _, of in answers) for view in VIEWS} if is_dwdp(mode) else {}
    return {
        "mode": mode, "mean": float(apart.mean()), "p99": float(np.percentile(apart, 99)), "max": float(apart.max()),
        "other_argmax": float(others.mean()), "positions": len(first), "answers": len(answers), "steps": steps,
    }


def far(rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong; a difference that is no number is, too."""
    means = {row["mode"]: row["mean"] for row in rows}
    bound = NEAR * means["ep"] if "ep" in means else CPU_BOUND
    return [f"{mode}: {mean:.4f} in the mean, above {bound:.4f}" for mode, mean in means.items() if is_dwdp(mode) and not mean <= bound]


def main(out: Path) -> int:
    from tiny_models import make_model  # here, as ranks import this file

    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")  # else kernels, which Inductor times, may round otherwise in each process
    devices, started = cuda_devices(2), []
    kind = "cuda" if devices else "cpu"
    lengths = [round(length) for length in np.linspace(SHORTEST, LONGEST, NUM_PROMPTS[kind])]
    prompts = make_prompts(lengths)
    with tempfile.TemporaryDirectory(prefix="logits") as folder:
        try:
            settings = Settings.of({
                "model": str(make_model("qwen3_moe", Path(folder) / "model", **SHAPE)), "load_format": "auto", "side_by_side": True,
                "modes": ("single", *(["ep"] if devices else []), DISPATCHED, "dwdp+dispatch=off"), "input_len": STEP_TOKENS,
                "gpu_memory_utilization": 0.6, "eager": not devices, "engine_args": {
                    "kv_cache_memory_bytes": (1 << 30) if devices else (64 << 20), "dtype": "bfloat16", "max_logprobs": -1,
                    "max_num_seqs": 1, "cudagraph_capture_sizes": GRAPHS,
                },
            })
            for name in settings.modes:
                started.append(Mode(settings, name, devices, answerer))
            for mode in started:
                mode.answers(LOAD_S)
            rows, first = [], started[0].ask(prompts, timeout_s=ANSWER_S)[0][0]
            for mode in started:
                answers = [answer for _ in range(1 if mode.name == "single" else 2) for answer in mode.ask(prompts, timeout_s=ANSWER_S)]
                rows.append(row := compare(mode.name, answers, first))
                print(f"{mode.name:>{len(DISPATCHED)}}: mean {row['mean']:.4f}, p99 {row['p99']:.4f}, max {row['max']:.3f}, other arg max "
                      f"{row['other_argmax']:.2%} of {len(first)} positions x {len(answers)}; steps {row['steps']}", flush=True)
        finally:
            for mode in started:
                mode.end()
    made = origin(devices) | {"command": shlex.join(["python", *sys.argv]), "rows": rows}
    out.write_text(json.dumps(made, indent=2))
    print("\n".join(wrong := far(rows)) or "near")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
