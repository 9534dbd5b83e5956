"""Invariant: output equals vLLM without the plugin, token for token, and the bytes moved are those the layout says."""

import shutil

import pytest

import families
from drafts import add_eagle, add_head
from harness import Group, generate, keep_step, reference, stats
from tiny_models import ENGINE_ARGS

pytestmark = pytest.mark.engine

SMALL = {"dispatch_max_tokens": 8}  # decodes; what `generate` prefills is larger
FAMILIES = ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "transformers_moe"]


def compare(models, family: str, size: int, options: dict | None = None, num_experts: int | None = None):
    overrides = {} if num_experts is None else {"num_experts": num_experts}
    model, engine = models(family, **overrides), ENGINE_ARGS.get(family, {})
    one_by_one = family.startswith("deepseek")  # concurrent runs of the stock engine differ among themselves
    expected = reference(model, engine, one_by_one=one_by_one)
    with Group(model, size, options, engine=engine, setup=keep_step) as group:
        answers = group.run(generate, one_by_one=one_by_one)
        found = group.run(stats)
        assert group.run(alone) == [[]] * size
    assert answers == [expected] * size
    assert [s["rank"] for s in found] == list(range(size))
    assert len({tuple(tokens) for tokens in expected}) > 1, "the model answers everything alike: the test shows nothing"
    return found


def alone(llm) -> list[str]:
    """The groups of vLLM's in which a model's own collective would change anything, or a shared expert be split."""
    import torch
    from vllm.distributed import parallel_state

    x = torch.arange(6.0).view(2, 3)
    groups = [parallel_state.get_world_group(), *(g() for g in parallel_state._groups.values() if g() is not None)]
    made = {g.unique_name: (g.world_size, g.all_reduce(x), g.all_gather(x, 0), g.reduce_scatter(x, 0)) for g in groups}
    assert {"tp", "ep", "dp"} <= {name.split(":")[0] for name in made}
    return [name for name, (size, *results) in made.items() if size > 1 or not all(torch.equal(r, x) for r in results)]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(models, family: str) -> None:
    """Every family answers alike on two ranks that run at the same time, prefill streamed and decode dispatched."""
    for s in compare(models, family, 2, SMALL):
        assert s["forwards"]["streamed"] > 0 and s["forwards"]["dispatched"] > 10
        assert s["dispatch"]["steps"] == s["forwards"]["dispatched"] and s["dispatch"]["max_tokens"] == 8
        assert s["prefetch_bytes"] > 0 and s["refills"] == 0
        assert s["experts"] == {"owned": 6, "resident": 0, "streamed": 6}


@pytest.mark.parametrize(("size", "num_experts"), [(3, 12), (3, 10), (4, 10)])
def test_sizes(models, size: int, num_experts: int) -> None:
    """Three and four ranks, also where they do not divide the experts: streamed or dispatched, none in place."""
    found = compare(models, "qwen3_moe", size, {"direct_max_tokens": 0, **SMALL}, num_experts)
    assert sum(s["experts"]["owned"] for s in found) == num_experts
    for s in found:
        assert s["experts"]["owned"] + s["experts"]["streamed"] == num_experts
        assert s["forwards"]["direct"] == 0 and s["forwards"]["dispatched"] > 10
        assert s["forwards"]["streamed"] + s["forwards"]["dispatched"] == 24


@pytest.mark.parametrize(
    "options",
    [{"slots": 3, "timing": True, "dispatch": "off"}, {"cache_gib": 0.0004}, {"cache_gib": 1},
     {"experts_per_rank": 8, "slice_mib": 1}, {"direct_max_tokens": 1000}],
    ids=lambda o: "-".join(o),
)
def test_options(models, options: dict) -> None:
    """Every option changes the bytes that move as it says, and no answer. A dispatched step moves no weights."""
    for s in compare(models, "qwen3_moe", 2, {"direct_max_tokens": 0, **SMALL, **options}):
        if "dispatch" in options:
            assert s["dispatch"] is None and s["forwards"] == {"streamed": 24, "direct": 0, "dispatched": 0}
        else:
            assert s["forwards"]["dispatched"] > 10 and sum(s["forwards"].values()) == 24
        layers, streamed = 4, s["experts"]["streamed"]
        per_expert = s["memory_bytes"]["shard"] // (layers * s["experts"]["owned"])
        if "cache_gib" in options and options["cache_gib"] == 1:
            assert s["prefetch_bytes"] == 0 and streamed == 0 and s["memory_bytes"]["slots"] == 0
        elif options.get("direct_max_tokens"):
            assert s["forwards"]["streamed"] == 0 and s["forwards"]["direct"] > 0
            assert s["prefetch_bytes"] == 2 * streamed * per_expert, "only the first fill of two slots"
        else:
            alone = [i for i in range(layers) if i >= layers - s["num_slots"] and i < s["num_slots"]]  # in their slots
            fills = (layers - len(alone)) * s["forwards"]["streamed"] + s["num_slots"]
            most = streamed + bool(s["experts"]["resident"])  # residents differ by one between layers
            assert fills * streamed * per_expert <= s["prefetch_bytes"] <= fills * most * per_expert
        if "cache_gib" in options:
            assert s["experts"]["resident"] > 0 and s["memory_bytes"]["resident"] > 0
        if "experts_per_rank" in options:
            assert s["experts"]["owned"] == 8
        if "timing" in options:
            assert s["copy_ms"] > 0 and s["exposed_wait_ms"] >= 0


def drafted(llm) -> tuple[int, int]:
    """Tokens that were drafted, and those of them that were right."""
    found = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    return found["vllm:spec_decode_num_draft_tokens"], found["vllm:spec_decode_num_accepted_tokens"]


def test_speculative_decoding(models) -> None:
    """Drafts make a request decode several tokens at once, in batches of every size; answers stay."""
    model = models("qwen3_moe")
    engine = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3,
                                     "prompt_lookup_min": 1}, "disable_log_stats": False}
    with Group(model, 2, {"dispatch_max_tokens": 16}, engine=engine, setup=keep_step) as group:  # four requests, four tokens each
        assert group.run(generate) == [reference(model)] * 2
        assert all(count > 0 for count, _ in group.run(drafted))
        for s in group.run(stats):
            assert s["forwards"]["streamed"] > 0 and s["forwards"]["dispatched"] > 5 and s["refills"] == 0


@pytest.mark.parametrize("method", ["mtp", "eagle"])
def test_draft_head(models, tmp_path, method: str) -> None:
    """A head with experts drafts as in stock vLLM, and as often rightly, whose slots the model's layers get back."""
    if method == "mtp":
        model, engine, beside = add_head(models(families.FAMILIES["glm4_moe"]), tmp_path / "head"), {}, {}
    else:
        model, engine = shutil.copytree(models("deepseek_v3"), tmp_path / "model"), ENGINE_ARGS["deepseek_v3"]
        beside = {"model": add_eagle(model, tmp_path / "eagle")}
    speculative = {"method": method, "num_speculative_tokens": 2, **beside}
    engine = engine | {"speculative_config": speculative, "disable_log_stats": False}
    with Group(str(model), 0, engine=engine) as stock:
        expected, acceptance = stock.run(generate)[0], stock.run(drafted)
    with Group(str(model), 2, {"dispatch_max_tokens": 12, "direct_max_tokens": 4}, engine=engine, setup=keep_step) as group:
        assert group.run(generate) == [expected] * 2
        assert group.run(drafted) == acceptance * 2 and 0 < acceptance[0][1] < acceptance[0][0]
        for s in group.run(stats):
            assert s["forwards"]["streamed"] > 0 and s["forwards"]["dispatched"] > 5 and s["refills"] == 0
            assert s["drafts"]["streamed"] > 5 and s["drafts"]["direct"] > 5
