"""Measure, on a single GPU that both ranks share, what needs no second one: graphs, a full cache, the hot cache.

    python tests/one_gpu.py FOLDER OUT.json      (FOLDER: a config.json, such as Qwen3-30B-A3B's)

Rank 0 works and rank 1 idles, so a copy is one within the GPU: these figures say what the host and the kernels take,
nothing of a link. Modes take turns; a reading is milliseconds a decode step, or prompt tokens/s ("prefill").
"""

import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from vllm_dwdp.entrypoints.bench.rank import Rank

from harness import Group, stats, streamed_model

LAYERS, ROUNDS, PROMPT = 8, 3, 128
ENGINE = dict(
    dtype="bfloat16", load_format="dummy", hf_overrides={"num_hidden_layers": LAYERS}, enforce_eager=False,
    compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY",
                        "cudagraph_capture_sizes": [1, 4, 16, 24, 64, 128]},
    max_num_seqs=128, max_model_len=8200, max_num_batched_tokens=16384, kv_cache_memory_bytes=1300 << 20,
    enable_prefix_caching=False, gpu_memory_utilization=0.2,
)
Mode = tuple[int, dict[str, Any] | None, Any]  # ranks (0: stock vLLM), DWDP options, what to do before loading
SINGLE: Mode = (0, None, None)


def without_streamed_graphs(rank: int) -> None:
    """Capture the direct view only, as for a hot cache."""
    from vllm_dwdp.integration import worker

    fit = worker.fit_graphs
    worker.fit_graphs = lambda config, largest, *, has_hot_cache: fit(config, largest, has_hot_cache=True)


def drive(llm: Any, batch: int, prompt: int, tokens: int) -> float:
    """Milliseconds a decode step of `batch` requests or, with one token each, prompt tokens/s."""
    rank = Rank()
    rank.llm, rank.streams = llm, False
    rank.prompts = [[[(7 * place + 13 * n) % 200 + 10 for place in range(prompt)] for n in range(batch)]]
    ran = rank.run(num_prompts=batch, output_len=tokens)
    if tokens == 1:
        return ran.prompt_tokens / (ran.end_s - ran.start_s)
    return 1e3 * (ran.end_s - ran.first_s) / (tokens - 1)


def bind_us(llm: Any) -> float:
    """Host time to point one layer at its other view."""
    layers, times = streamed_model(llm).weights, 300
    start_s = time.perf_counter()
    for _ in range(times):
        for layer in layers:
            layer.bind("streamed")
            layer.bind("direct")
    return 1e6 * (time.perf_counter() - start_s) / (2 * times * len(layers))


def measure(model: str, modes: dict[str, Mode], batches: list[int], found: dict[str, Any]) -> None:
    """Load all modes side by side, give each its turn at every point, and add what was read to `found`."""
    points = {f"decode {batch}": (batch, PROMPT, 40) for batch in batches} | {"prefill": (8, 8000, 1)}
    with contextlib.ExitStack() as stack:
        groups = {name: Group(model, size, options, engine=ENGINE, setup=setup)
                  for name, (size, options, setup) in modes.items()}
        for group in groups.values():
            stack.enter_context(group)
        for group in groups.values():
            for batch, prompt, tokens in points.values():
                group.ranks[0].run(drive, batch, prompt, min(tokens, 4))
        for _ in range(ROUNDS):
            for point, work in points.items():
                for name, group in groups.items():
                    reading = {"beside": list(modes), "mode": name, "point": point}
                    found["readings"].append(reading | {"value": group.ranks[0].run(drive, *work)})
        for name, group in groups.items():
            if modes[name] != SINGLE:
                found["stats"][name] = group.ranks[0].run(stats) | {"bind_us": group.ranks[0].run(bind_us)}


def main(model: str, out: str) -> None:
    found: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "layers": LAYERS, "readings": [], "stats": {}}
    graphs: dict[str, Mode] = {"graphs": (2, {}, None), "no streamed graphs": (2, {}, without_streamed_graphs)}
    measure(model, {"single": SINGLE, **graphs}, [1, 4, 16, 24, 64, 128], found)
    hot = {"cache_gib": 0.3 * LAYERS, "cache_policy": "hot"}
    caches: dict[str, Mode] = {"all cached": (2, {"cache_gib": 20}, None), "hot": (2, hot, None)}
    measure(model, {"single": SINGLE, **caches}, [1, 4, 16, 64], found)
    Path(out).write_text(json.dumps(found, indent=1))
    turns: dict[tuple[str, ...], list[float]] = {}
    for reading in found["readings"]:
        turns.setdefault((*reading["beside"], reading["point"], reading["mode"]), []).append(reading["value"])
    for (*_, point, mode), values in turns.items():
        print(point, mode, f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})", sep="\t")


if __name__ == "__main__":
    main(*sys.argv[1:])
