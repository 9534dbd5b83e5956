"""Invariant: an engine or a layer that DWDP cannot turn into a rank stops, and says which hook or layer it was."""

from types import SimpleNamespace

import pytest
import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.models import gpt_oss

from vllm_dwdp.errors import DWDPError
from vllm_dwdp.integration.binding import _rebuild_kernel
from vllm_dwdp.integration.loading import _owned_rows, _refuse_unstreamable, refuse_bypass, sharded
from vllm_dwdp.placement import Placement
from vllm_dwdp.integration.worker import membership


@pytest.mark.parametrize(
    ("dwdp", "parallel", "named"),
    [
        (None, {}, "create_engine_config"),
        ({}, {}, "create_engine_config"),
        ({"size": 2}, {"data_parallel_size": 2}, "run_engine_core or wait_for_engine_startup"),
        ({"size": 2}, {"data_parallel_index": 2}, "rank=2 .* size=2"),
        ({"size": 2, "rank": 3}, {"data_parallel_index": 0}, "rank=3 .* size=2"),
    ],
    ids=str,
)
def test_membership(dwdp: dict | None, parallel: dict, named: str) -> None:
    """An engine that was not launched as one independent rank names the hook that failed it."""
    with pytest.raises(DWDPError, match=named):
        membership(engine_config(dwdp, **parallel))


@pytest.mark.parametrize(("given", "rank"), [({}, 1), ({"rank": 0}, 0)])
def test_rank(given: dict, rank: int) -> None:
    """The rank is the user's, else the launcher's."""
    options, found = membership(engine_config({"size": 2, **given}, data_parallel_index=1))
    assert (found, options.size) == (rank, 2)


def engine_config(dwdp: dict | None, **parallel: int) -> SimpleNamespace:
    """The two parts of an engine's config that tell a rank who it is."""
    return SimpleNamespace(
        additional_config={} if dwdp is None else {"dwdp": dwdp},
        parallel_config=SimpleNamespace(**{"data_parallel_size": 1, "data_parallel_index": 0} | parallel),
    )


class DbrxExperts(torch.nn.Module):
    pass


class SubstitutedRoutedExperts(torch.nn.Module):
    pass


def layer(
    kind: type = torch.nn.Module, movable: bool = True, backend: str | None = None, **parameters: torch.Tensor
) -> torch.nn.Module:
    module = kind()
    method = SimpleNamespace(supports_eplb=movable)
    if backend is not None:
        method.mxfp4_backend = SimpleNamespace(name=backend)
    module.layer_name, module.quant_method = "model.layers.3.mlp.experts", method
    for name, value in parameters.items():
        module.register_parameter(name, torch.nn.Parameter(value))
    return module


@pytest.mark.parametrize(
    ("kind", "movable", "parameters", "named"),
    [
        (torch.nn.Module, False, [], "SimpleNamespace keeps its experts"),
        (torch.nn.Module, True, ["w13_weight", "w13_input_scale"], "w13_input_scale"),
        (DbrxExperts, True, [], "DbrxExperts"),
        (SubstitutedRoutedExperts, True, [], "SubstitutedRoutedExperts"),
    ],
)
def test_unstreamable_layer(kind: type, movable: bool, parameters: list[str], named: str) -> None:
    """A layer that a rank cannot hold in part is refused by name, with the reason."""
    _refuse_unstreamable(layer(w13_weight=torch.ones(2)))
    with pytest.raises(DWDPError, match=f"model.layers.3.mlp.experts: .*{named}"):
        _refuse_unstreamable(layer(kind, movable, **{name: torch.ones(2) for name in parameters}))


def test_bypass() -> None:
    """A MoE model that built none of the streamed layers is refused by name."""
    refuse_bypass([layer()], SimpleNamespace(model="org/model"))
    with pytest.raises(DWDPError, match="org/model built no RoutedExperts"):
        refuse_bypass([], SimpleNamespace(model="org/model"))


def test_rows_of_marlin_can_be_moved() -> None:
    """4-bit experts stream where Marlin runs them; another backend's refusal says how to choose it."""
    _refuse_unstreamable(layer(movable=False, backend="MARLIN", w13_weight=torch.ones(2)))
    with pytest.raises(DWDPError, match=r"\(TRITON\); try --moe-backend marlin"):
        _refuse_unstreamable(layer(movable=False, backend="TRITON", w13_weight=torch.ones(2)))


def test_rebuilt_kernel(monkeypatch) -> None:
    """A rebuilt kernel keeps the hook that a model has put on its experts: without, it would leave out a norm."""
    monkeypatch.setattr(mk, "FusedMoEKernel", lambda finalize, fused: SimpleNamespace(fused_experts=fused))
    built = layer()
    built.moe_config = None
    built.quant_method = method = SimpleNamespace(get_fused_moe_quant_config=lambda _: None)
    for hook in (None, print):
        fused = SimpleNamespace(**{} if hook is None else {"post_gemm2_hook": hook})
        method.moe_kernel = SimpleNamespace(prepare_finalize=None, fused_experts=fused)
        _rebuild_kernel(built)
        assert method.moe_kernel.fused_experts is not fused
        assert method.moe_kernel.fused_experts.post_gemm2_hook is hook


def test_gpt_oss_loads_mxfp4_by_owned_rows(monkeypatch) -> None:
    """Its loader views the rows it is given as all experts of the config, which no kernel of this machine runs."""
    seen = []
    monkeypatch.setattr(
        gpt_oss.GptOssModel, "_load_weights_mxfp4", lambda self: seen.append(self.config.num_local_experts)
    )
    model = SimpleNamespace(config=SimpleNamespace(num_local_experts=13))
    with sharded(1, 2, None, before_reading=lambda _: None) as shards:
        shards["experts"] = Placement(num_experts=13, size=2)
        gpt_oss.GptOssModel._load_weights_mxfp4(model)
    assert seen == [7] and model.config.num_local_experts == 13
    assert _owned_rows("layers.0.mlp.experts.w13_weight", torch.arange(13), range(6, 13)).tolist() == list(range(6, 13))
