"""Invariant: engines with dummy weights have the models that are named, as far as their configs say."""

from typing import Any

import pytest
import transformers
from vllm.model_executor.layers.fused_moe.router import router_factory

from true_shapes import SHAPES, write


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """As vLLM reads them."""
    return {made.name: transformers.AutoConfig.from_pretrained(made) for made in write(tmp_path_factory.mktemp("shapes"))}


@pytest.mark.parametrize("name", SHAPES)
def test_no_field_is_another_s_default(configs, name: str) -> None:
    """None is a value, too: transformers has others in its place."""
    wanted = {field: value for field, value in SHAPES[name].items() if field != "torch_dtype" and (field != "quantization_config" or value)}
    assert {field: getattr(configs[name], field, ...) for field in wanted} == wanted


def test_a_router_in_groups_can_be_made_on_a_gpu(configs, monkeypatch) -> None:
    """On CPU vLLM asks for no groups."""
    config = configs["deepseek-v2-lite"]
    monkeypatch.setattr(router_factory.current_platform, "is_cpu", lambda: False)
    router_factory.create_fused_moe_router(
        top_k=config.num_experts_per_tok, global_num_experts=config.n_routed_experts, use_grouped_topk=True,
        num_expert_group=config.n_group, topk_group=config.topk_group,
    )
