"""Invariant: KV connectors see an ordinary engine: a DWDP group prefills, a stock engine decodes, the text is the same."""

from pathlib import Path
from typing import Any

from harness import Group, make_prompts, reference, stats

LENGTHS, TOKENS, BLOCK = (40, 70, 130, 200, 66, 100), 24, 32


def transfer(folder: Path, role: str) -> dict[str, Any]:
    """Engine arguments of vLLM's connector that keeps KV blocks as files of `folder`."""
    return {"block_size": BLOCK, "enable_prefix_caching": False, "kv_transfer_config": {
        "kv_connector": "ExampleConnector", "kv_role": role,
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }}


def run(llm: Any, mine: slice, tokens: int) -> list[tuple[list[int], int]]:
    """(answer, prompt tokens not computed here) of this engine's part of the prompts, one after the other."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    prompts = make_prompts(LENGTHS)[mine]
    outputs = [llm.generate([prompt], sampling, use_tqdm=False)[0] for prompt in prompts]
    return [(list(output.outputs[0].token_ids), output.num_cached_tokens) for output in outputs]


def spoil(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*/*.safetensors"):
        save_file({name: tensor.flip(0) for name, tensor in load_file(file).items()}, file)


def test_decoding_elsewhere_gives_the_same_text(models, tmp_path: Path) -> None:
    """Both ranks prefill half of the prompts; another process loads their KV blocks and answers as one engine does."""
    model = models("qwen3_moe")
    expected = reference(model, lengths=LENGTHS, tokens=TOKENS, one_by_one=True)
    with Group(model, 2, {"direct_max_tokens": 0}, engine=transfer(tmp_path, "kv_producer")) as group:
        for number, rank in enumerate(group.ranks):
            rank.send(run, slice(number, None, 2), 1)
        firsts = [rank.answer() for rank in group.ranks]
        assert [s["forwards"]["streamed"] for s in group.run(stats)] == [3, 3]
    assert [[answer for answer, _ in half] for half in firsts] == [[e[:1] for e in expected[n::2]] for n in (0, 1)]
    assert len(list(tmp_path.glob("*/*.safetensors"))) == len(LENGTHS) * 4, "a file for each prompt and layer"

    with Group(model, 0, engine=transfer(tmp_path, "kv_consumer")) as decoder:
        (answers,) = decoder.run(run, slice(None), TOKENS)
        spoil(tmp_path)
        (spoilt,) = decoder.run(run, slice(None), TOKENS)
    assert [answer for answer, _ in answers] == expected
    assert [loaded for _, loaded in answers] == [(length - 2) // BLOCK * BLOCK for length in LENGTHS]
    assert all(a != b for (a, _), b in zip(spoilt, expected, strict=True)), "the answers come from the loaded blocks"
