"""Time one MoE layer, alone and dispatched, on as many GPUs as there are ranks; microseconds a layer, medians.

    python tests/layer_times.py SIZE OUT.json [ROWS,ROWS,...]

Qwen3-30B-A3B's layer in bf16 and vLLM's Triton experts in a CUDA graph of 12 layers: every rank with all experts in its
own memory ("local"), dispatched, and the two exchanges of a dispatched layer without the experts.
"""

import json
import statistics
import sys
from pathlib import Path

import torch
from test_tokens import Ranks, run

from vllm_dwdp.convoy import Round
from vllm_dwdp.kernels.tokens import InboxMap, alone

E, TOP_K, HIDDEN, WIDTH, LAYERS, REPLAYS = 128, 8, 2048, 768, 12, 40


def measure(rank: int, size: int, kind: str, pipes: dict, batches: list[int], out: str) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    at = InboxMap(size=size, rows=max(batches), hidden=HIDDEN, top_k=TOP_K, itemsize=2)
    ranks = Ranks(rank, size, kind, pipes, at=at, experts=E, num_layers=LAYERS)
    device, tokens = ranks.device.device, ranks.tokens
    torch.manual_seed(1)
    weights = [(torch.randn(E, 2 * WIDTH, HIDDEN, device=device, dtype=torch.bfloat16) * 0.02,
                torch.randn(E, HIDDEN, WIDTH, device=device, dtype=torch.bfloat16) * 0.1) for _ in range(LAYERS)]
    guarded = torch.arange(-1, E, dtype=torch.int32, device=device)
    expert_map, number = guarded[1:], 0

    def everyone() -> None:
        for pipe in pipes.values():
            pipe.send(2)
        for pipe in pipes.values():
            pipe.recv()

    def point(batch: int) -> dict[str, float]:
        """Times of a layer of `batch` rows a rank."""
        nonlocal number
        torch.manual_seed(10 + rank)
        x = torch.randn(batch, HIDDEN, device=device, dtype=torch.bfloat16)
        ids = torch.rand(batch, E, device=device).argsort(1)[:, :TOP_K].to(torch.int32).contiguous()
        scores = torch.full((batch, TOP_K), 1 / TOP_K, device=device)

        def local() -> torch.Tensor:
            for w in weights:
                y = fused_experts(x, *w, scores, ids)
            return y

        def dispatched(compute: bool = True) -> torch.Tensor:
            for layer, w in enumerate(weights):
                gathered, gathered_scores, gathered_ids = tokens.dispatch(layer, x, scores, ids, batch * size)
                part = gathered
                if compute:
                    part = fused_experts(gathered, *w, gathered_scores, gathered_ids, global_num_experts=E,
                                         expert_map=expert_map)
                y = tokens.combine(layer, part, batch)
            return y

        row = {"rows": batch, "rank": rank}
        tokens.begin(alone(rank, size, batch))
        wanted = local().float()
        row["error alone"] = float((dispatched().float() - wanted).norm() / wanted.norm())
        for name, body in (("local", local), ("dispatched", dispatched), ("exchanges", lambda: dispatched(False))):
            tokens.begin(alone(rank, size, batch))
            body()
            torch.cuda.synchronize()
            stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                y = body()
            for who in ("alone", "together"):
                times = []
                for _ in range(REPLAYS):
                    number += 1
                    together = Round(number=number, members=tuple(range(size)), tokens=(batch,) * size)
                    everyone()
                    with torch.cuda.stream(stream):
                        tokens.begin(together if who == "together" else alone(rank, size, batch))
                        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                        start.record()
                        graph.replay()
                        end.record()
                    torch.cuda.synchronize()
                    times.append(start.elapsed_time(end) * 1e3 / LAYERS)
                if name != "local" or who == "together":
                    row[f"{name}, {who}"] = round(statistics.median(times), 1)
            if name == "dispatched":
                row["error"] = float((y.float() - wanted).norm() / wanted.norm())
            del graph
        tokens.check()
        print(json.dumps(row), flush=True)
        return row

    with set_current_vllm_config(VllmConfig()):
        found = [point(batch) for batch in batches]
    Path(f"{out}.{rank}").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    sizes = [int(n) for n in sys.argv[3].split(",")] if len(sys.argv) > 3 else [1, 4, 16, 64, 128, 256, 512, 2048, 4096]
    outcomes = run(measure, int(sys.argv[1]), "cuda", timeout_s=240, batches=sizes, out=sys.argv[2])
    print("\n".join(f"rank {rank}: {text or 'done'}" for rank, text in outcomes.items()))
