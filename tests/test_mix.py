"""Invariant: whatever traffic brings - chunks, shared prefixes, aborts, preemption, any batch - answers are stock vLLM's.

DWDP_MIX_REQUESTS=5000 runs the same at length.
"""

import collections
import os
import random
from typing import Any

import pytest
from harness import Group, stats

REQUESTS = int(os.environ.get("DWDP_MIX_REQUESTS", "160"))
BATCH, STEP_TOKENS = 16, 64
ENGINE = {"max_num_seqs": BATCH, "max_num_batched_tokens": STEP_TOKENS, "kv_cache_memory_bytes": 5 << 18,
          "block_size": 32}
ABORTED = 0.1


def requests(seed: int, count: int) -> list[tuple[list[int], int]]:
    """(prompt, tokens to generate): short and long prompts, half of which begin with one of four shared prefixes."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(1, 250) for _ in range(96)] for _ in range(4)]
    made = []
    for _ in range(count):
        tail = [rng.randrange(1, 250) for _ in range(rng.choice((3, 20, 100)))]
        made.append((rng.choice(prefixes) + tail if rng.random() < 0.5 else tail, rng.choice((1, 8, 70))))
    return made


def sampling(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)


def watch(engine: Any) -> collections.Counter:
    """Count what the scheduler does from now on."""
    seen: collections.Counter = collections.Counter()
    scheduler = engine.engine_core.engine_core.scheduler
    schedule = scheduler.schedule

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        sizes = output.num_scheduled_tokens
        seen["preempted"] += len(output.preempted_req_ids or ())
        seen["prefix hits"] += sum(new.num_computed_tokens > 0 for new in output.scheduled_new_reqs)
        seen["chunks"] += sum(
            new.num_computed_tokens + sizes[new.req_id] < len(new.prompt_token_ids) for new in output.scheduled_new_reqs
        )
        seen[f"batch {len(sizes)}"] += 1
        return output

    scheduler.schedule = watched
    return seen


def traffic(llm: Any, seed: int, count: int) -> tuple[dict[int, list[int]], dict[str, int]]:
    """Put requests in at random, in bursts, one by one and after pauses, and abort some; (answers, what was seen)."""
    rng, engine = random.Random(seed), llm.llm_engine
    seen, answers, running = watch(engine), {}, {}
    waiting = collections.deque(enumerate(requests(seed, count)))
    while waiting or engine.has_unfinished_requests():
        burst = rng.choice((0, 0, 0, 1, 1, 40)) if running else 1
        for _ in range(min(burst, len(waiting))):
            number, (prompt, tokens) = waiting.popleft()
            engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling(tokens))
            running[str(number)] = rng.randrange(1, 30) if rng.random() < ABORTED else 10**6  # steps until it is aborted
        for output in engine.step():
            if output.finished:
                answers[int(output.request_id)] = list(output.outputs[0].token_ids)
                del running[output.request_id]
        running = {name: steps - 1 for name, steps in running.items()}
        if late := [name for name, steps in running.items() if steps <= 0]:
            engine.abort_request(late)
            seen["aborted"] += len(late)
            running = {name: steps for name, steps in running.items() if steps > 0}
    return answers, dict(seen)


def answer_all(llm: Any, seed: int, count: int) -> list[list[int]]:
    made = requests(seed, count)
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in made]
    outputs = llm.generate(prompts, [sampling(tokens) for _, tokens in made], use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.timeout(3600)
def test_mixed_traffic(models) -> None:
    """Every request that was not aborted is answered as by a stock engine that sees the same prompts all at once."""
    model, count = models("qwen3_moe"), REQUESTS // 2
    with Group(model, 2, engine=ENGINE) as group:
        for seed, rank in enumerate(group.ranks):
            rank.send(traffic, seed, count)
        found = [rank.answer(3000) for rank in group.ranks]
        after = group.run(stats)
    with Group(model, 0, engine=ENGINE) as stock:
        expected = []
        for seed in range(2):
            stock.ranks[0].send(answer_all, seed, count)
            expected.append(stock.ranks[0].answer(3000))
    for (answers, seen), whole, s in zip(found, expected, after, strict=True):
        assert answers == {number: whole[number] for number in answers}
        assert len(answers) + seen["aborted"] == count
        for what in ("preempted", "prefix hits", "chunks", "aborted", "batch 1", f"batch {BATCH}"):
            assert seen.get(what, 0) > 0, f"the mix held no {what}: {seen}"
        assert s["refills"] == 0 and min(s["forwards"].values()) > 10
    print(found[0][1], after[0]["forwards"])
