"""Invariant: under everyday traffic (bursts, aborts, preemption, shared prefixes) every token is stock vLLM's.

Each rank runs a random schedule of its own; a stock engine runs the same one. Schedules count engine steps, not time,
and no request ends by what it says, so both engines see the same batches. DWDP_MIX_REQUESTS sets how many there are.
"""

import collections
import os
import random
from typing import Any

import pytest

from harness import Group, stats
from quantized import SHAPE

pytestmark = pytest.mark.engine

REQUESTS = int(os.environ.get("DWDP_MIX_REQUESTS", 200))  # over both ranks
LIMIT_S = 180 + REQUESTS
MAX_TOKENS, MAX_SEQS, MAX_LEN = 64, 16, 256
ENGINE = dict(
    max_model_len=MAX_LEN, max_num_seqs=MAX_SEQS, max_num_batched_tokens=MAX_TOKENS, block_size=32,
)
BLOCKS = 24  # three of the longest requests
GRAPHS = ENGINE | dict(  # whole graphs for decode, pieces for other batches
    kv_cache_memory_bytes=BLOCKS * 64 << 10, dtype="bfloat16", gpu_memory_utilization=0.3, enforce_eager=False,
    compilation_config={"mode": 3, "backend": "eager", "cudagraph_mode": "FULL_AND_PIECEWISE",
                        "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, MAX_TOKENS]},
)
KINDS: dict[str, tuple[dict, dict, dict, set[str]]] = {  # model, engine, DWDP options, views that steps have
    "host": ({}, ENGINE | dict(kv_cache_memory_bytes=BLOCKS * 32 << 10), {"dispatch_max_tokens": 16},
             {"streamed", "direct", "dispatched"}),
    "streamed graphs": (SHAPE, GRAPHS, {"direct_max_tokens": 4, "dispatch": "off"}, {"streamed", "direct"}),
    "dispatched graphs": (  # rounds have some members in graphs, others in steps larger than any graph
        SHAPE | dict(dtype="float32"), GRAPHS | dict(
            dtype="float32", kv_cache_memory_bytes=BLOCKS * 128 << 10,
            compilation_config=GRAPHS["compilation_config"] | {"cudagraph_capture_sizes": [1, 2, 4, 8]},
        ), {"direct_max_tokens": 4, "dispatch_max_tokens": MAX_TOKENS // 2}, {"streamed", "dispatched"},
    ),
    "large graphs": (  # of steps in which all ranks take part, too, with room for four rows of the other
        SHAPE | dict(dtype="float32"), GRAPHS | dict(dtype="float32", kv_cache_memory_bytes=BLOCKS * 128 << 10),
        {"direct_max_tokens": 4}, {"streamed", "dispatched"},
    ),
}
# Of a greedy token, ahead of the second best: less is a tie. Partial sums of a GPU's round are added in another order than stock adds.
TIES = {"dispatched graphs": 1e-4, "large graphs": 1e-4}
def stream_alone(rank: int) -> None:
    """Steps alone have their graph up to 4 tokens, as in an engine with graphs of prompts."""
    from vllm_dwdp.costs import Costs

    Costs.in_place_max_tokens = lambda _: 4


def make_small(rank: int) -> None:
    """Small steps have up to 16 tokens, and few rows are 4: what an engine does with thousands."""
    from vllm_dwdp import dispatch
    from vllm_dwdp.costs import Costs
    from vllm_dwdp.integration import dispatching
    from vllm_dwdp.kernels import tokens_cuda

    stream_alone(rank)
    dispatch.FEW = dispatching.FEW = tokens_cuda.FEW = 4
    Costs.max_tokens = lambda *_: 16
    Costs.helped_max_tokens = lambda _, bound: bound


SETUPS = {"dispatched graphs": stream_alone, "large graphs": make_small}


BURSTS = [1, 1, 1, 2, 3, 6, MAX_SEQS + 4]
LENGTHS = [range(1, 12), range(12, MAX_TOKENS), range(MAX_TOKENS + 1, MAX_LEN - 40)]  # of a burst's prompts
PAUSES = [0, 1, 2, 8, 20, 100]  # steps until the next burst; after the longest most are idle
CLAIMS = ["preempted", "prefix hits", "chunked", "aborted waiting", "aborted running", "idle",
          "decodes of 1", f"decodes of {MAX_SEQS}"]


def draw_prompt(rng: random.Random, lengths: range, prefixes: list[list[int]]) -> list[int]:
    """Token ids; half of the prompts begin as others do."""
    length = rng.choice(lengths)
    shared = rng.choice(prefixes)[:length] if rng.random() < 0.5 else []
    return shared + [rng.randrange(1, 250) for _ in range(length - len(shared))]


def watch(scheduler: Any) -> collections.Counter[str]:
    """Counts what the scheduler puts into its steps from now on."""
    seen, schedule = collections.Counter(), scheduler.schedule

    def counted(*args: Any, **kwargs: Any) -> Any:
        step = schedule(*args, **kwargs)
        tokens = step.num_scheduled_tokens
        seen["steps"] += bool(tokens)
        seen["preempted"] += len(step.preempted_req_ids)
        for new in step.scheduled_new_reqs:
            seen["prefix hits"] += new.num_computed_tokens > 0
            seen["chunked"] += tokens[new.req_id] < len(new.prompt_token_ids) - new.num_computed_tokens
        if set(tokens.values()) == {1}:
            seen[f"decodes of {len(tokens)}"] += 1
        return step

    scheduler.schedule = counted
    return seen


def drive(
    llm: Any, seed: int, count: int
) -> tuple[dict[int, tuple[str, list[int]]], dict[int, list[float]], collections.Counter[str], int]:
    """Run `count` requests: how each ended and with which tokens; how far each token was ahead of the second best, as a
    logarithm; what the steps held; requests left in the engine.
    """
    from vllm import SamplingParams

    rng, engine = random.Random(seed), llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    seen = watch(scheduler)
    prefixes = [[rng.randrange(1, 250) for _ in range(n)] for n in (40, 70, 100, 150)]
    answers: dict[int, tuple[str, list[int]]] = {}
    leads: dict[int, list[float]] = {}
    alive: list[int] = []
    tick = due = 0
    while len(answers) < count or alive:
        if tick >= due:
            lengths = rng.choice(LENGTHS)
            for number in range(len(answers), min(len(answers) + rng.choice(BURSTS), count)):
                sampling = SamplingParams(
                    max_tokens=rng.randrange(1, 40), temperature=0, ignore_eos=True, detokenize=False, logprobs=2,
                )
                engine.add_request(str(number), {"prompt_token_ids": draw_prompt(rng, lengths, prefixes)}, sampling)
                answers[number] = ("waiting", [])
                alive.append(number)
            due = tick + rng.choice(PAUSES)
        if alive and rng.random() < 0.02:
            number = alive.pop(rng.randrange(len(alive)))
            engine.abort_request([str(number)])
            state, tokens = answers[number]
            answers[number] = (f"aborted {state}", tokens)
        for output in engine.step():
            number = int(output.request_id)
            answers[number] = ("finished" if output.finished else "running", list(output.outputs[0].token_ids))
            best = [sorted((one.logprob for one in of.values()), reverse=True) for of in output.outputs[0].logprobs]
            leads[number] = [first - second for first, second, *_ in best]
            if output.finished:
                alive.remove(number)
        seen["idle"] += not alive
        tick += 1
    seen.update(state for state, _ in answers.values())
    return answers, leads, seen, engine.get_num_unfinished_requests() + len(scheduler.requests)


def first_difference(found: list[int], wanted: list[int], leads: list[float]) -> tuple[int, float]:
    """The first token of `wanted` that is another in `found`, counted from 0, and its lead."""
    compared = enumerate(zip(found, wanted, leads, strict=True))
    return next((at, lead) for at, (token, other, lead) in compared if token != other)


@pytest.mark.parametrize("kind", [k if k == "host" else pytest.param(k, marks=pytest.mark.gpu) for k in KINDS])
@pytest.mark.timeout(3 * LIMIT_S)
def test_everyday_traffic(models, kind: str) -> None:
    """Two ranks, each under its own traffic, answer as a stock engine does under the same; on GPUs also in graphs."""
    shape, settings, options, views = KINDS[kind]
    model, count = models("qwen3_moe", **shape), REQUESTS // 2
    expected = []
    for seed in range(2):
        with Group(model, 0, engine=settings) as stock:
            stock.ranks[0].send(drive, seed, count)
            expected.append(stock.ranks[0].answer(LIMIT_S))
    with Group(model, 2, options, engine=settings, setup=SETUPS.get(kind)) as group:
        warm_ups = [sum(s["forwards"].values()) for s in group.run(stats)]
        for seed, rank in enumerate(group.ranks):
            rank.send(drive, seed, count)
        found = [rank.answer(LIMIT_S) for rank in group.ranks]
        counters = group.run(stats)
    for (answers, _, seen, left), (wanted, leads, stock_seen, _), s in zip(found, expected, counters, strict=True):
        ends = {number: (state, len(tokens)) for number, (state, tokens) in answers.items()}
        assert ends == {number: (state, len(tokens)) for number, (state, tokens) in wanted.items()}
        firsts = {n: first_difference(answers[n][1], wanted[n][1], leads[n]) for n in wanted if answers[n] != wanted[n]}
        wrong = [number for number, (_, lead) in firsts.items() if lead >= TIES.get(kind, 0.0)]
        assert not wrong, f"{len(wrong)} of {count} answers differ, first at (token, how far stock's was ahead): {firsts}"
        assert len(firsts) <= count // 20, f"{len(firsts)} of {count} answers differ at ties: {firsts}"
        assert seen == stock_seen and seen["finished"] + seen["aborted waiting"] + seen["aborted running"] == count
        assert left == 0 and not [claim for claim in CLAIMS if not seen[claim]]
        assert s["refills"] == 0 and {view for view, count in s["forwards"].items() if count} == views
        assert sum(s["forwards"].values()) - warm_ups[s["rank"]] == seen["steps"]
        assert (s["replays"] > 0) == (kind == "streamed graphs")
        print(f"rank {s['rank']}: {s['forwards']}, {dict(sorted(seen.items()))}")
