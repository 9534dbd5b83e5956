"""Invariant: a KV connector sees what it needs: what a DWDP group prefills, a stock engine decodes as if its own.

The engines share nothing but the folder into which vLLM's ExampleConnector writes KV blocks.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from harness import CONTEXT, START_S, Group, make_prompts, stats

pytestmark = pytest.mark.engine

BLOCK, TOKENS, LAYERS = 32, 24, 4
PROMPTS = make_prompts([40, 200, 64, 99, 150, 35, 110, 72])
LOADED = [(len(p["prompt_token_ids"]) - 2) // BLOCK * BLOCK for p in PROMPTS]  # whole blocks before the last token
# The connector stores what a request's first step computed: prompts must fit into one. Nothing else may cache them.
ENGINE = dict(max_num_batched_tokens=1024, block_size=BLOCK, enable_prefix_caching=False)


def connector(folder: Path) -> dict[str, Any]:
    return {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "engine_id": "prefill",
            "kv_connector_extra_config": {"shared_storage_path": str(folder)}}


def answer(llm: Any, prompts: list[dict], tokens: int) -> tuple[list[list[int]], list[int]]:
    """Greedy token ids, and how many tokens of each prompt came with their KV."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], [output.num_cached_tokens for output in outputs]


def test_a_stock_engine_decodes_what_the_group_prefilled(models, tmp_path: Path) -> None:
    """Tokens are one stock engine's. Decoding loads its KV: ruined blocks ruin answers, missing ones are computed."""
    model, connected = models("qwen3_moe"), ENGINE | {"kv_transfer_config": connector(tmp_path)}
    with Group(model, 0, engine=ENGINE) as stock:
        ((expected, cached),) = stock.run(answer, PROMPTS, TOKENS)
    assert not any(cached) and len({tuple(tokens) for tokens in expected}) == len(PROMPTS)

    with Group(model, 2, engine=connected) as prefill:
        for part, rank in enumerate(prefill.ranks):
            rank.send(answer, PROMPTS[part::2], 1)
        for part, rank in enumerate(prefill.ranks):
            assert rank.answer() == ([tokens[:1] for tokens in expected[part::2]], [0] * (len(PROMPTS) // 2))
        assert [s["forwards"] for s in prefill.run(stats)] == [{"direct": 0, "streamed": 1, "dispatched": 0}] * 2
        files = list(tmp_path.glob("*/*.safetensors"))
        assert len(files) == LAYERS * len(PROMPTS)

        with Group(model, 0, engine=connected) as decode:
            assert decode.run(answer, PROMPTS, TOKENS) == [(expected, LOADED)]
            for path in files:
                save_file({"kv_cache": -load_file(path)["kv_cache"]}, path)
            ((ruined, cached),) = decode.run(answer, PROMPTS, TOKENS)
            assert cached == LOADED and not [1 for tokens in ruined if tokens in expected]
            for prompt in tmp_path.iterdir():
                shutil.rmtree(prompt)
            assert decode.run(answer, PROMPTS, TOKENS) == [(expected, [0] * len(PROMPTS))]


def launch(rank: int, model: str, folder: Path, pipe: Any) -> None:
    """Start `rank` of two as the launcher of `vllm serve` does, as far as where its engine would be built."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine import core

    def build(self: Any, *_: Any, vllm_config: Any, **__: Any) -> None:
        pipe.send((vllm_config.kv_transfer_config.engine_id, vllm_config.parallel_config.data_parallel_index))
        raise SystemExit

    core.EngineCoreProc.__init__ = build
    config = EngineArgs(
        model, data_parallel_size=2, additional_config={"dwdp": {}}, kv_transfer_config=connector(folder)
    ).create_engine_config()
    core.EngineCoreProc.run_engine_core(vllm_config=config, dp_rank=rank, local_dp_rank=rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_is_an_engine_of_its_own(models, tmp_path: Path, rank: int) -> None:
    """Connectors tell ranks apart by engine id, and their ports by index: both carry the rank in a server's engines."""
    pipe, child = CONTEXT.Pipe()
    process = CONTEXT.Process(target=launch, args=(rank, models("qwen3_moe"), tmp_path, child))
    process.start()
    child.close()
    assert pipe.poll(START_S) and pipe.recv() == (f"prefill_dp{rank}", rank)
    process.join(20)
