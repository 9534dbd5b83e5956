"""Invariant: an engine or a layer that DWDP cannot turn into a rank stops, and says which hook or layer it was."""

import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from safetensors.torch import save_file
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.oracle import nvfp4
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_nvfp4 as ct_nvfp4,
)
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
from vllm.model_executor.models import gpt_oss
from vllm.model_executor.utils import replace_parameter

from vllm_dwdp import checkpoint
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.handover import _join
from vllm_dwdp.integration import hooks, loading
from vllm_dwdp.integration.binding import _rebuild_kernel, _refuse_loading, refuse_loading
from vllm_dwdp.integration.loading import (
    _agree_on_scales,
    _owned_rows,
    _refuse_unstreamable,
    describe,
    refuse_bypass,
    sharded,
)
from vllm_dwdp.integration.proof import Following, prove
from vllm_dwdp.integration.worker import membership
from vllm_dwdp.placement import Placement


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
    assert membership(engine_config({"size": 2, **given}, data_parallel_index=1))[1:] == (rank, 2)


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


class Marlin(MarlinExperts):
    pass


def layer(
    kind: type = torch.nn.Module, movable: bool = True, experts: type | None = None, **parameters: torch.Tensor
) -> torch.nn.Module:
    module = kind()
    method = SimpleNamespace(supports_eplb=movable)
    if experts is not None:
        method.experts_cls = experts
    module.layer_name, module.quant_method = "model.layers.3.mlp.experts", method
    for name, value in parameters.items():
        module.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    return module


@pytest.mark.parametrize(
    ("kind", "movable", "parameters", "named"),
    [
        (torch.nn.Module, False, [], "SimpleNamespace keeps its experts"),
        (DbrxExperts, True, [], "DbrxExperts"),
        (SubstitutedRoutedExperts, True, [], "SubstitutedRoutedExperts"),
    ],
)
def test_unstreamable_layer(kind: type, movable: bool, parameters: list[str], named: str) -> None:
    """A layer that a rank cannot hold in part is refused by name, with the reason."""
    _refuse_unstreamable(layer(w13_weight=torch.ones(2)))
    with pytest.raises(DWDPError, match=f"model.layers.3.mlp.experts: .*{named}"):
        _refuse_unstreamable(layer(kind, movable, **{name: torch.ones(2) for name in parameters}))


@pytest.mark.parametrize("reduces", [True, False])
def test_static_activation_scales(reduces: bool) -> None:
    """A layer is converted with all ranks' largest scale, once; a kernel that has still one an expert is refused."""
    module = layer(w13_weight=torch.ones(2, 8), w13_input_scale=torch.tensor([0.1, 0.3]), w2_input_scale=torch.ones(2))
    module.moe_config = SimpleNamespace(hidden_dim=8, experts_per_token=2, in_dtype=torch.float32)

    class Method(SimpleNamespace):
        def process_weights_after_loading(self, layer: Any) -> None:
            for name in ("w13_input_scale", "w2_input_scale") if reduces else ():
                replace_parameter(layer, name, getattr(layer, name).max())

    asked = []

    def gather(what: str, mine: list[float]) -> list[list[float]]:
        asked.append(what)
        return [mine, [0.2, 5.0]]

    method = module.quant_method = Method(supports_eplb=True)
    _refuse_unstreamable(module)
    _agree_on_scales(module, gather)
    method.process_weights_after_loading(module)
    largest = [module.w13_input_scale.max(), module.w2_input_scale.max()]
    assert largest == [torch.tensor(0.3), torch.tensor(5.0)]
    method.process_weights_after_loading(module)
    assert asked == ["activation scales of model.layers.3.mlp.experts"]
    record = describe(module, Placement(num_experts=4, size=2), rank=0)
    assert record.has_agreed_scales and (*record.streamed, *record.replicated) == ("w13_weight",)
    method.moe_quant_config = SimpleNamespace(a1_scale=module.w13_input_scale)
    with contextlib.nullcontext() if reduces else pytest.raises(DWDPError, match="a1_scale is a static activation scale"):
        prove(record, 0, Following("", []))


@pytest.mark.parametrize(("backend", "named"), [("MARLIN", None), ("EMULATION", "a1_gscale is a static activation scale")])
def test_scales_that_a_kernel_does_not_use(monkeypatch, backend: str, named: str | None) -> None:
    """A checkpoint's scales of activations matter where a kernel takes them: Marlin's takes none of NVFP4's.

    They are reciprocals, so their largest is nothing to agree on.
    """
    chosen = nvfp4.NvFp4MoeBackend[backend]
    monkeypatch.setattr(ct_nvfp4, "select_nvfp4_moe_backend", lambda **_: (chosen, MarlinExperts))
    monkeypatch.setattr(ct_nvfp4, "make_nvfp4_moe_kernel", lambda **_: mock.Mock())
    monkeypatch.setattr(nvfp4, "prepare_nvfp4_moe_layer_for_marlin", lambda layer, is_act_and_mul, **given: given.values())
    module = layer()
    module._expert_routing_tables = lambda: None
    module.moe_config = SimpleNamespace(
        is_act_and_mul=True, hidden_dim=32, experts_per_token=2, in_dtype=torch.bfloat16
    )
    method = module.quant_method = ct_nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod(module.moe_config)
    method.create_weights(module, OWNED, 32, 16, torch.bfloat16)
    for parameter in module.parameters():
        parameter.data.fill_(1)
    _refuse_unstreamable(module)
    _agree_on_scales(module, lambda what, mine: pytest.fail(what))
    method.process_weights_after_loading(module)
    record = describe(module, Placement(num_experts=EXPERTS, size=2), rank=0)
    assert set(record.streamed) == {"w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"}
    assert not [name for name in record.replicated if "input" in name]
    with pytest.raises(DWDPError, match=named) if named else contextlib.nullcontext():
        prove(record, 0, Following("", []))


def test_bypass() -> None:
    """A MoE model that built none of the streamed layers is refused by name."""
    refuse_bypass([layer()], SimpleNamespace(model="org/model"))
    with pytest.raises(DWDPError, match="org/model built no RoutedExperts"):
        refuse_bypass([], SimpleNamespace(model="org/model"))


def test_rows_of_marlin_can_be_moved() -> None:
    """4-bit experts stream where Marlin runs them; another kernel's refusal says how to choose it."""
    _refuse_unstreamable(layer(movable=False, experts=Marlin, w13_weight=torch.ones(2)))
    with pytest.raises(DWDPError, match=r"\(TritonExperts\); try --moe-backend marlin"):
        _refuse_unstreamable(layer(movable=False, experts=TritonExperts, w13_weight=torch.ones(2)))


OWNED, EXPERTS = 2, 5  # rank 0 of 2


def strided(rows: int, size: int, stride: tuple[int, int]) -> torch.Tensor:
    """[owned, rows, 4], numbered in memory."""
    memory = torch.arange(float(OWNED * size))
    return memory.as_strided((OWNED, rows, 4), (size, *stride))


@pytest.mark.parametrize("name", ["w13_scale", "w13_weight_scale"])
@pytest.mark.parametrize(
    ("scale", "named"),
    [
        (strided(3, 12, (4, 1)), None),
        (strided(3, 12, (1, 3)), None),  # an expert's scales by column
        (strided(3, 16, (1, 4)), "padded or strided"),  # columns padded to four, as for TMA
        (strided(3, 16, (1, 4))[:1].as_strided((1, 3, 4), (12, 1, 4)), "padded or strided"),  # of a single expert
        (torch.arange(24.0).view(3, 4, 2).permute(2, 0, 1), "padded or strided"),  # experts innermost
        (torch.arange(8.0).view(2, 1, 4).expand(2, 3, 4), "padded or strided"),  # one row for all
    ],
)
def test_scales_that_are_not_contiguous(scale: torch.Tensor, named: str | None, name: str) -> None:
    """Scales that lie together by expert keep their order in the full tensor, streamed or replicated; others are refused."""
    small = name == "w13_scale"
    module = layer(w13_weight=torch.ones(len(scale), 1000 if small else 12), **{name: scale})
    module.moe_config = SimpleNamespace(hidden_dim=8, experts_per_token=2, in_dtype=torch.float32)
    placement = Placement(num_experts=2 * len(scale), size=2)
    if named:
        with pytest.raises(DWDPError, match=rf"experts.{name} \(SimpleNamespace\) is {named}"):
            describe(module, placement, rank=0)
        return
    record = describe(module, placement, rank=0)
    assert (name in record.replicated) == small and (name in record.streamed) != small
    assert record.spec(name, residents=0, page_bytes=4096).stride == scale.stride()
    if small:
        mine = scale.contiguous().numpy().tobytes()
        whole = _join(record, [mine, mine])[name]
        assert whole.stride() == scale.stride() and torch.equal(whole, torch.cat([scale, scale]))


class Kernel:
    """An experts object as vLLM makes them. What `keep` makes of the layer's config is its attribute."""

    keep: Any = staticmethod(lambda moe, config: None)

    def __init__(self, moe_config: Any, quant_config: Any):
        self.moe_config, self.quant_config = moe_config, quant_config
        self.count, self.scale = moe_config.num_local_experts, quant_config.w1_scale
        self.kept = self.keep(moe_config, quant_config)


def bound(monkeypatch: pytest.MonkeyPatch, keep: Callable | None = None, after: Callable | None = None, **config: Any):
    """A layer of rank 0 that was loaded and shows all experts, and what binds its kernel.

    `keep(moe, config)` is what its kernel keeps, `after(module, kernel)` what loading does once the kernel is made.
    """
    monkeypatch.setattr(mk, "FusedMoEKernel", lambda finalize, experts: SimpleNamespace(
        prepare_finalize=finalize, fused_experts=experts))
    monkeypatch.setattr(Kernel, "keep", staticmethod(keep or (lambda moe, config: None)))
    module = layer(w13_weight=torch.arange(OWNED * 200.0).view(OWNED, 200), w13_scale=torch.ones(OWNED, 1))
    module.moe_config = SimpleNamespace(
        num_local_experts=OWNED, hidden_dim=8, experts_per_token=2, in_dtype=torch.float32
    )
    method = module.quant_method
    method.get_fused_moe_quant_config = lambda m: SimpleNamespace(
        w1=m.w13_weight, w1_scale=m.w13_scale, **{name: make(m) for name, make in config.items()})
    method.moe_quant_config = method.get_fused_moe_quant_config(module)
    kernel = Kernel(module.moe_config, method.moe_quant_config)
    method.moe_kernel = mk.FusedMoEKernel(SimpleNamespace(), kernel)
    if after is not None:
        after(module, kernel)
    record = describe(module, Placement(num_experts=EXPERTS, size=2), rank=0)
    assert (record.streamed, record.replicated) == (("w13_weight",), ("w13_scale",))
    view = torch.full((EXPERTS, 200), torch.nan)
    view[:OWNED] = module.w13_weight
    module.w13_weight.data, module.w13_scale.data = view, torch.ones(EXPERTS, 1)
    module.moe_config.num_local_experts = EXPERTS
    return module, lambda: _rebuild_kernel(record, 0, [view])


def keep_module_view(module: Any, kernel: Any) -> None:
    module.flat = module.w13_weight.view(-1)


def keep_alphas(module: Any, kernel: Any) -> None:
    module.w2_alphas = torch.ones(OWNED)


def set_layout(module: Any, kernel: Any) -> None:
    kernel.kept = "swizzled"


def fold(module: Any, kernel: Any) -> None:
    kernel.kept = kernel.kept * 3


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"keep": lambda moe, config: config.w1.view(-1)}, "Kernel.kept, .* is made of streamed weights"),
        ({"keep": lambda moe, config: config.w1.data}, "Kernel.kept, .* is made of streamed weights"),
        ({"keep": lambda moe, config: {"a": [functools.partial(print, config.w1[:, 0].float())]}},
         "Kernel.kept, .* is made of streamed weights"),
        ({"keep": lambda moe, config: (lambda w=config.w1.t(): w)}, "Kernel.kept, .* is made of streamed weights"),  # noqa: B008
        ({"alphas": lambda m: m.w13_weight.amax(1)}, "SimpleNamespace.alphas, .* is made of streamed weights"),
        ({"keep": lambda moe, config: float(config.w1.max())}, "Kernel reads or writes streamed weights"),
        ({"keep": lambda moe, config: config.w1.mul_(2) is None}, "Kernel reads or writes streamed weights"),
        ({"after": keep_module_view}, "Module.flat still holds the memory from which w13_weight was moved"),
        ({"after": keep_alphas}, "Module.w2_alphas, .* has a row for each of this rank's 2 experts"),
        ({"after": set_layout}, "Kernel.kept was set while weights were loaded"),
        ({"keep": lambda moe, config: torch.ones(moe.num_local_experts), "after": fold}, "Kernel.kept was set while"),
        ({"a1_gscale": lambda m: torch.ones(())}, "SimpleNamespace.a1_gscale is a static activation scale"),
    ],
    ids=["view", "alias", "in a partial", "in a closure", "computed", "number", "written", "old memory", "shard's rows",
         "lost", "folded", "static"],
)
def test_what_a_kernel_keeps(monkeypatch, given: dict, named: str) -> None:
    """A kernel that keeps what its layer does not show is refused by class and attribute, whatever its format."""
    _, rebuild = bound(monkeypatch, **given)
    with pytest.raises(DWDPError, match=named):
        rebuild()


@pytest.mark.parametrize(
    "keep",
    [
        lambda moe, config: config.w1_scale.view(-1),
        lambda moe, config: config.w1,
        lambda moe, config: torch.full((moe.num_local_experts,), 7),
        lambda moe, config: config.w1.data.shape,
    ],
    ids=["view of a replica", "parameter", "for all experts", "shape"],
)
def test_what_a_kernel_may_keep(monkeypatch, keep: Callable) -> None:
    """The layer's own parameters, views of replicated tensors and what is made for all experts stay true."""
    module, rebuild = bound(monkeypatch, keep)
    rebuild()
    assert module.quant_method.moe_kernel.fused_experts.count == EXPERTS


def test_hook_of_a_rebuilt_kernel(monkeypatch) -> None:
    """A rebuilt kernel keeps the hook that a model has put on its experts: without, it would leave out a norm."""
    def set_hook(module: Any, kernel: Any) -> None:
        kernel.post_gemm2_hook = print

    for after, hook in ((None, None), (set_hook, print)):
        module, rebuild = bound(monkeypatch, after=after)
        old = module.quant_method.moe_kernel.fused_experts
        rebuild()
        assert module.quant_method.moe_kernel.fused_experts is not old
        assert module.quant_method.moe_kernel.fused_experts.post_gemm2_hook is hook


def bound_to_refuse() -> torch.nn.Module:
    module = layer(w13_weight=torch.zeros(2, 4))
    module.w13_weight.weight_loader = lambda parameter, loaded: parameter.data.copy_(loaded)
    module.weight_loader = module.load_weights = module.w13_weight.weight_loader
    module.quant_method.process_weights_after_loading = lambda layer: layer.w13_weight.data.fill_(1)
    _refuse_loading(module)
    refuse_loading(torch.nn.ModuleList([module]))
    return module


@pytest.mark.parametrize(
    "write",
    [
        lambda m: m.w13_weight.weight_loader(m.w13_weight, torch.ones(2, 4)),
        lambda m: m.weight_loader(m.w13_weight, torch.ones(2, 4), "w13_weight", "w1", 0),
        lambda m: m.load_weights([]),
        lambda m: m.quant_method.process_weights_after_loading(m),
        lambda m: replace_parameter(m, "w13_weight", torch.ones(2, 4)),
        lambda m: m.register_parameter("w2_weight", torch.nn.Parameter(torch.ones(2, 4))),
        lambda m: delattr(m, "w13_weight"),
        lambda m: initialize_layerwise_reload(m),
    ],
    ids=["parameter's loader", "layer's loader", "load_weights", "processing", "replace_parameter", "register", "delete",
         "layerwise reload"],
)
def test_writes_after_binding(write: Callable) -> None:
    """Nothing that vLLM loads or replaces weights with reaches a layer whose rows are its peers' as well."""
    module = bound_to_refuse()
    shown = module.w13_weight
    with pytest.raises(DWDPError, match="cannot be saved, moved, loaded or rewritten while the group serves; restart it"):
        write(module)
    assert module.w13_weight is shown and not shown.any()


def test_a_shard_is_built_however_arguments_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name or by place, as vLLM's models do."""
    built = []

    def build(self: Any, moe_config: Any, expert_map_manager: Any) -> None:
        built.append((moe_config.num_local_experts, expert_map_manager))

    monkeypatch.setattr(RoutedExperts, "__init__", build)
    monkeypatch.setattr(loading, "_own_experts_only", lambda manager, owned: owned)
    for refusal in ("_refuse_unstreamable", "_agree_on_scales"):
        monkeypatch.setattr(loading, refusal, lambda *_: None)
    layer, made = object.__new__(RoutedExperts), SimpleNamespace(num_experts=6)
    with sharded(1, 2, None, before_reading=lambda _: None, gather=lambda *_: []):
        RoutedExperts.__init__(layer, made, "all")
        RoutedExperts.__init__(layer, expert_map_manager="all", moe_config=made)
    assert built == [(3, range(3, 6))] * 2


def test_a_hook_that_another_plugin_has_replaced_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(choose=lambda rows: rows)
    monkeypatch.setitem(sys.modules, "replaced", module)
    hook = hooks.Hook("replaced", "choose", ("rows",))
    said = pytest.raises(DWDPError, match="hook choose did not take: another plugin has replaced it")
    with said, hook.during(lambda original, rows: original(rows)):
        module.choose = lambda rows: rows


def test_checkpoints_that_differ_in_content_alone_are_told_apart(tmp_path: Path) -> None:
    """Down to the tensor, as two fine-tunes of one model do."""
    for number, last in enumerate((0.0, 1.0)):
        (folder := tmp_path / str(number)).mkdir()
        save_file({"experts.0": torch.zeros(8), "experts.1": torch.full((8,), last)}, folder / "model.safetensors")
    first, second = (checkpoint.describe(tmp_path / name)["model.safetensors"] for name in "01")
    assert first["experts.0"] == second["experts.0"] and first["experts.1"] != second["experts.1"]
    assert checkpoint.summary(first) != checkpoint.summary(second)


def test_experts_of_a_second_kind_are_read(monkeypatch) -> None:
    """Only what another rank owns in every layer is left unread: a checkpoint may count on with experts of another kind."""
    monkeypatch.setattr(DefaultModelLoader, "_init_ep_weight_filter", lambda self, model_config: None)
    loader = SimpleNamespace()
    with sharded(1, 2, None, before_reading=lambda _: None, gather=lambda *_: []) as shards:
        for kind in ("text", "vision"):
            shards[kind] = Placement(num_experts=6, size=2)
        DefaultModelLoader._init_ep_weight_filter(loader, None)
    names = [f"model.layers.3.mlp.experts.{i}.up_proj.weight" for i in range(12)]
    skipped = [i for i, name in enumerate(names) if should_skip_weight(name, loader.local_expert_ids)]
    assert skipped == [0, 1, 2]


def test_gpt_oss_loads_mxfp4_by_owned_rows(monkeypatch) -> None:
    """Its loader views the rows it is given as all experts of the config, which no kernel of this machine runs."""
    seen = []
    monkeypatch.setattr(
        gpt_oss.GptOssModel, "_load_weights_mxfp4", lambda self: seen.append(self.config.num_local_experts)
    )
    model = SimpleNamespace(config=SimpleNamespace(num_local_experts=13))
    with sharded(1, 2, None, before_reading=lambda _: None, gather=lambda *_: []) as shards:
        shards["experts"] = Placement(num_experts=13, size=2)
        gpt_oss.GptOssModel._load_weights_mxfp4(model)
    assert seen == [7] and model.config.num_local_experts == 13
    assert _owned_rows("layers.0.mlp.experts.w13_weight", torch.arange(13), range(6, 13)).tolist() == list(range(6, 13))
