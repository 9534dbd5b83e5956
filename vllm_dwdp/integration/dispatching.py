"""Dispatching: which steps of this engine dispatch and why, and vLLM's padding told what a round has agreed on."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_dwdp.config import Options
from vllm_dwdp.costs import H100, Costs
from vllm_dwdp.dispatch import Dispatch
from vllm_dwdp.experts import ExpertLayer
from vllm_dwdp.integration import graphs, hooks
from vllm_dwdp.integration.graphs import has_graphs, has_pieces
from vllm_dwdp.kernels.device import Device
from vllm_dwdp.kernels.tokens import FEW
from vllm_dwdp.limits import Limits

logger = init_logger("vllm.dwdp.dispatching")
# On CPU, whose costs are not known: some steps of a busy machine, and a peer that stops costs it once; no large step ends soon.
HOST_PATIENCE_S, HOST_LARGE_S = 0.5, math.inf
MOST_PADDING = 1.5  # of a batch whose own graph does not dispatch, in one that does
# A graph of a whole decode step attends to as many requests as it has rows: above, too many for a rank that has few, whose peer has a
# prompt, as hardly any decodes more.
WHOLE_ROWS = 256
INBOX_BYTES = 2**30  # what an inbox may have for steps in which all ranks take part
_fitted: tuple[Dispatch, bool] | None = None  # of the engine in this process, and whether its graphs of prompts are in pieces


def limits(
    vllm_config: VllmConfig, options: Options, device: Device, layers: Sequence[ExpertLayer], decode_tokens: int
) -> Limits | None:
    """The steps that dispatch; None, and a line in the log that says why, where none can or none would gain.

    `decode_tokens` are the most that one request decodes in a step.
    """
    layers = [layer for layer in layers if not layer.is_draft]
    reason = why_not(vllm_config, options, device, layers)
    given, graph_limit = options.dispatch_max_tokens, options.graph_max_tokens or 0
    largest, size = vllm_config.scheduler_config.max_num_batched_tokens, layers[0].placement.size
    costs, helped, bound = expectations(vllm_config, options, layers)
    expected = bound if costs is None else costs.max_tokens(bound)
    most = given or expected
    if reason is None and not most:
        reason = f"no step of up to {bound} tokens is expected to gain (--dwdp-dispatch-max-tokens overrides)"
    if reason:
        logger.info("DWDP dispatch is off: %s; small steps read peers' experts in place", reason)
        return None
    speculative = vllm_config.speculative_config
    lengths = range(1, decode_tokens + 1) if speculative and speculative.uses_dynamic_speculative_decoding() else [decode_tokens]
    if given:
        why = "--dwdp-dispatch-max-tokens"
    elif expected == bound:
        why = "as many as ranks have buffers for together, which --max-num-batched-tokens sets"
    else:
        why = "above, a step alone is expected to take less"
    helped, sizes = max(most, helped), []
    if has_graphs(vllm_config):
        graphs.add_graphs(vllm_config, graph_bounds(most, helped, largest, size, graph_limit))
        sizes = vllm_config.compilation_config.cudagraph_capture_sizes
    logger.info(
        "DWDP dispatch is on: a step of up to %d tokens sends them to the owners of their experts, with the ranks at hand (%s)%s",
        most, why, f"; one of up to {helped} with all ranks, or else alone" if helped > most else "",
    )
    made = Limits(
        max_tokens=most, helped_max_tokens=helped, most_rows=largest, graph_sizes=dispatched_sizes(sizes, (most, helped), lengths),
        alone_graph_tokens=max(options.direct_max_tokens or 0, costs.in_place_max_tokens() if costs is not None else 0),
        helped_s=functools.cache(costs.helped_s) if costs is not None else lambda _: HOST_LARGE_S,
        spare_s=functools.cache(costs.spare_s) if costs is not None else lambda _: 0.0,
        patience_s=functools.cache(costs.patience_s) if costs is not None else lambda _: HOST_PATIENCE_S,
        alone_s=functools.cache(costs.alone_s) if costs is not None else lambda count: HOST_LARGE_S if count > most else 0.0,
    )
    in_graphs = [made.rows(padded, size) for padded in made.graph_sizes[-1:]]
    return dataclasses.replace(made, most_rows=max([largest, *in_graphs]))


def expectations(vllm_config: VllmConfig, options: Options, layers: Sequence[ExpertLayer]) -> tuple[Costs | None, int, int]:
    """What steps cost, unless on CPU; the largest step that gains with all ranks, 0 if only small ones may dispatch; what bounds those.

    Small steps of all ranks have rows together for which vLLM has buffers: as many as the graph of the largest step, if it has one.
    """
    given, largest, size = options.dispatch_max_tokens, vllm_config.scheduler_config.max_num_batched_tokens, layers[0].placement.size
    row_bytes = 2 * max(layer.hidden_size * layer.itemsize for layer in layers)  # of an inbox: activations, and sums
    held, bound = min(largest, INBOX_BYTES // (row_bytes * (size - 1))), largest // size
    if current_platform.is_cpu():
        return None, 0 if given else held, bound

    def with_graphs(tokens: int) -> Costs:
        wanted = min(options.graph_max_tokens or 0, tokens)
        return costs_of(layers, graphs.most_tokens(vllm_config, wanted))

    if given:
        costs = with_graphs(given)
        return dataclasses.replace(costs, graph_tokens=min(costs.graph_tokens, given)), 0, bound
    costs = with_graphs(largest)
    helped = costs.helped_max_tokens(held)
    if min(helped, costs.graph_tokens) >= largest:
        return costs, helped, min((largest + FEW * (size - 1)) // size, largest)
    costs = with_graphs(largest - FEW * (size - 1))  # as graph_bounds has it
    return costs, costs.helped_max_tokens(held), bound


def graph_bounds(most: int, helped: int, largest: int, size: int, limit: int) -> list[int]:
    """The largest graphs to be captured for small steps, and for large ones that vLLM has buffers for together with others' rows.

    It has for those of `largest` tokens, as its first forward, which measures memory, is one.
    """
    small, large = min(most, limit) // 16 * 16, min(helped, limit)
    if large < largest:
        large = min(large, largest - FEW * (size - 1))
    return sorted({small, max(small, large)})


def dispatched_sizes(sizes: Sequence[int], bounds: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """The captured sizes whose graphs dispatch, ascending, so chosen that vLLM pads no batch across a bound (FEW, and `bounds`): one
    of at most the last size within a bound gets a graph within it.

    Where every request decodes as many tokens (one of `lengths`), vLLM's graphs have a multiple of those, up to the largest size.
    """
    found, edges = [], [0, *sorted({min(FEW, max(bounds)), *bounds})]
    for below, bound in itertools.pairwise(edges):
        whole = [size for size in sizes if size <= bound and not any(size % length for length in lengths)]
        last = bound if max(sizes, default=0) <= bound else max(whole, default=0)
        found += sorted(size for size in sizes if below < size <= last)
        following = min((size for size in sizes if size > bound), default=0)
        if following > MOST_PADDING * last and any(last < size <= bound for size in sizes):
            break
    return found


def costs_of(layers: Sequence[ExpertLayer], graph_tokens: int) -> Costs:
    """All layers are taken to be like the one that has the most to move."""
    layer = max(layers, key=lambda layer: layer.size.remote_bytes)
    return Costs(
        rates=H100, num_layers=len(layers), num_experts=layer.placement.num_experts, top_k=layer.top_k,
        expert_bytes=sum(layer.size.expert_bytes), hidden_size=layer.hidden_size, itemsize=layer.itemsize,
        size=layer.placement.size, graph_tokens=graph_tokens,
    )


def why_not(vllm_config: VllmConfig, options: Options, device: Device, layers: Sequence[ExpertLayer]) -> str | None:
    if options.dispatch == "off":
        return "--dwdp-dispatch off"
    if device.handle_kind != "fd":
        return "rounds are agreed within one host and one network, and ranks are on several"
    if any(layer.module.quant_method.is_monolithic for layer in layers):
        return "the expert kernel routes by itself; --moe-backend triton does not"
    if unfit := next(filter(None, (_unfit(layer.module.quant_method.moe_kernel) for layer in layers)), None):
        return unfit
    if envs.VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT=1: how partial sums are rounded depends on who takes part in a round"
    if has_graphs(vllm_config) and not vllm_config.use_v2_model_runner:
        return "vLLM's older model runner pads batches by itself; use its default one, or --enforce-eager"
    return None


def _unfit(kernel: Any) -> str | None:
    """Why a kernel would sum, or scale by, what it has not written: rows of tokens whose expert is elsewhere, which it has to skip."""
    if kernel is None:  # which `binding` refuses
        return None
    experts = kernel.fused_experts
    name, is_on_cpu = type(experts).__name__, type(experts).__module__.rpartition(".")[2].startswith("cpu_")
    if not is_on_cpu and name not in ("TritonExperts", "MarlinExperts"):
        return f"the expert kernel {name} has not been seen to skip tokens whose expert is elsewhere; --moe-backend triton or marlin does"
    is_scaled = name == "TritonExperts" and experts.quant_dtype is not None and experts.a2_scale is None
    if is_scaled and experts.block_shape is None and not experts.per_act_token_quant:
        return "the expert kernel scales all activations by their largest, also those that it skips; --moe-backend marlin does not"
    if getattr(experts, "post_gemm2_hook", None) is not None:  # from vLLM 0.33; it finds missing experts by an index from the end
        return "the model changes what each expert made before it is summed, also for tokens whose expert is elsewhere"
    return None


def checked(output: Any, dispatch: Dispatch) -> Any:
    """`output`, once no member of its round has been waited for in vain: raises DWDPError else, when it is taken.

    On a GPU that is known when the step has ended, which is when the engine takes what vLLM calls an asynchronous output.
    """
    if isinstance(output, AsyncModelRunnerOutput):
        return CheckedOutput(output, dispatch.check)
    dispatch.check()
    return output


class CheckedOutput(AsyncModelRunnerOutput):
    def __init__(self, output: AsyncModelRunnerOutput, check: Callable[[], None]):
        self._output, self._check = output, check

    def get_output(self) -> ModelRunnerOutput:
        output = self._output.get_output()
        self._check()
        return output

    def get_kv_connector_output(self) -> Any:  # from vLLM 0.33, of an output that failed
        return self._output.get_kv_connector_output()  # type: ignore[attr-defined]


def fit_to_round(vllm_config: VllmConfig, dispatch: Dispatch) -> None:
    """Let vLLM choose the graph of the rows that a round has agreed on, where that is more than the batch has, or none.

    Hooks stay for the life of the process, in which one engine may follow another: the last one's rounds count.
    """
    global _fitted
    _fitted = dispatch, has_pieces(vllm_config)
    if has_graphs(vllm_config):
        hooks.CHOOSE_GRAPH.install(_choose_graph)


def _choose_graph(
    original: Callable, manager: Any, num_reqs: int, num_tokens: int, uniform_token_count: int | None, *args: Any,
    max_query_len: int | None = None, need_eager: bool = False, **kwargs: Any,
) -> Any:
    assert _fitted is not None
    dispatch, in_pieces = _fitted
    rows, eager = max(num_tokens, dispatch.padded), need_eager or dispatch.is_beyond_graphs
    if in_pieces and rows > max(WHOLE_ROWS, 2 * num_tokens):  # as the peer's
        uniform_token_count = max_query_len = None
    return original(manager, num_reqs, rows, uniform_token_count, *args, max_query_len=max_query_len, need_eager=eager, **kwargs)
