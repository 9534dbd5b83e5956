"""Invariant: vLLM captures what it would without DWDP, and larger steps; no batch is padded from one view into the other."""

import functools
from types import SimpleNamespace

import pytest
from vllm.config import CompilationConfig, CUDAGraphMode

from vllm_dwdp.config import Options
from vllm_dwdp.integration import graphs
from vllm_dwdp.integration.graphs import add_graphs, direct_max_tokens, fit_graphs

from harness import Group, streamed_model

SIZES = [1, 2, 4, 8, 16, 24, 32]


def make_config(mode: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE, eager: bool = False, speculative: object = None, **text: int):
    """What vLLM's config on CUDA has by then; its CPU platform switches graphs off."""
    compilation = CompilationConfig(
        cudagraph_mode=mode, cudagraph_capture_sizes=list(SIZES), max_cudagraph_capture_size=SIZES[-1],
    )
    compilation.post_init_cudagraph_sizes()
    model = SimpleNamespace(
        enforce_eager=eager, get_num_experts=lambda: text.get("num_experts", 0),
        get_num_experts_per_tok=lambda: text.get("num_experts_per_tok", 0),
    )
    return SimpleNamespace(compilation_config=compilation, model_config=model, speculative_config=speculative)


@pytest.mark.parametrize(
    ("options", "text", "eager", "graphs"),
    [
        ({}, {"num_experts": 128, "num_experts_per_tok": 8}, 21, 24),
        ({}, {"num_experts": 128, "num_experts_per_tok": 4}, 43, 43),
        ({}, {"num_experts": 128}, 21, 24),
        ({}, {"num_experts_per_tok": 8}, 1, 1),
        ({"direct_max_tokens": 0}, {"num_experts": 128, "num_experts_per_tok": 8}, 0, 0),
        ({"direct_max_tokens": 5000}, {"num_experts": 128, "num_experts_per_tok": 8}, 5000, 5000),
    ],
    ids=str,
)
def test_direct_max_tokens(options: dict, text: dict, eager: int, graphs: int) -> None:
    """The user's number wins, 0 included; else the model's experts and top-k decide, as vLLM reads them.

    With graphs the number is one that vLLM captures anyway, so batches are padded as without DWDP.
    """
    assert direct_max_tokens(make_config(eager=True, **text), Options(**options)) == eager
    assert direct_max_tokens(make_config(**text), Options(**options)) == graphs


@pytest.mark.parametrize("largest", [0, 1, 7, 8, 21, 31, 32, 5000])
def test_captured_sizes(largest: int) -> None:
    """All of vLLM's sizes stay, and direct_max_tokens is one of them unless it is above them all."""
    made = make_config()
    fit_graphs(made, largest)
    compilation = made.compilation_config
    assert compilation.cudagraph_capture_sizes == sorted({*SIZES, largest} if 0 < largest < SIZES[-1] else SIZES)
    assert compilation.max_cudagraph_capture_size == SIZES[-1]
    assert compilation.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE


@pytest.mark.parametrize(
    ("bounds", "added"),
    [([0], []), ([32], []), ([496], [128, 256, 384, 496]),
     ([1392, 2048], [*range(128, 1025, 128), 1280, 1392, 1536, 1792, 2048]),
     ([3440, 8192], [*range(128, 1025, 128), *range(1280, 3440, 256), 3440, *range(3584, 4096, 256), *range(4096, 8193, 512)])],
    ids=str,
)
def test_added_sizes(bounds: list[int], added: list[int]) -> None:
    """They stay when the direct view's last size is added, and vLLM lays attention out for decoding up to its own largest only."""
    made = make_config()
    add_graphs(made, bounds)
    compilation = made.compilation_config
    assert compilation.cudagraph_capture_sizes == SIZES + added and compilation.max_cudagraph_capture_size == SIZES[-1]
    fit_graphs(made, 7)
    assert compilation.cudagraph_capture_sizes == sorted([*SIZES, 7]) + added and compilation.max_cudagraph_capture_size == SIZES[-1]


@pytest.mark.parametrize(
    ("off", "why"),
    [({"mode": CUDAGraphMode.FULL}, "cudagraph_mode=FULL has"), ({"mode": CUDAGraphMode.FULL_DECODE_ONLY}, "=FULL_DECODE_ONLY has"),
     ({"speculative": object()}, "a model drafts"), ("VLLM_USE_BREAKABLE_CUDAGRAPH", "breaks graphs off")],
    ids=["whole", "decodes", "drafts", "breakable"],
)
def test_no_sizes_are_added(monkeypatch: pytest.MonkeyPatch, off: dict | str, why: str) -> None:
    """Where vLLM captures whole prompts or none, and where a model drafts, over as many rows as the graph has. The log says so."""
    if isinstance(off, str):
        monkeypatch.setenv(off, "1")
    lines, made = [], make_config(**({} if isinstance(off, str) else off))
    monkeypatch.setattr(graphs, "logger", SimpleNamespace(info=lambda text, *args: lines.append(text % args)))
    add_graphs(made, [10**5])
    assert made.compilation_config.cudagraph_capture_sizes == SIZES and len(lines) == 1 and why in lines[0]
    add_graphs(made, [SIZES[-1]])
    assert len(lines) == 1, "none was wanted"


@pytest.mark.parametrize(
    ("given", "options", "most"),
    [({}, {}, 8192), ({}, {"graph_max_tokens": 700}, 700), ({"cudagraph_capture_sizes": [1, 2]}, {"graph_max_tokens": 700}, 700),
     ({"cudagraph_capture_sizes": [1, 2]}, {}, 0), ({"max_cudagraph_capture_size": 512}, {}, 0),
     ({"compilation_config": {"cudagraph_capture_sizes": [1, 2]}}, {}, 0),
     ({"compilation_config": {"max_cudagraph_capture_size": 512}}, {}, 0)],
    ids=str,
)
def test_a_person_s_sizes_stay(models, given: dict, options: dict, most: int) -> None:
    """However they were given."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=models("qwen3_moe"), data_parallel_size=2, additional_config={"dwdp": options}, **given
    ).create_engine_config()
    assert config.additional_config["dwdp"]["graph_max_tokens"] == most


@pytest.fixture
def breakable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")


@pytest.mark.usefixtures("breakable")
@pytest.mark.parametrize("largest", [1, 7, 8, 21, 31])
def test_direct_sizes_only(largest: int) -> None:
    """Where copies cannot be captured, every size is at most direct_max_tokens, which is captured itself."""
    made = make_config()
    fit_graphs(made, largest)
    compilation = made.compilation_config
    assert compilation.cudagraph_capture_sizes == [size for size in SIZES if size < largest] + [largest]
    assert compilation.max_cudagraph_capture_size == largest
    assert compilation.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE


@pytest.mark.usefixtures("breakable")
def test_no_graphs_left() -> None:
    """With neither view to capture, graphs are off."""
    made = make_config()
    fit_graphs(made, 0)
    assert made.compilation_config.cudagraph_mode == CUDAGraphMode.NONE
    assert made.compilation_config.cudagraph_capture_sizes == []


@pytest.mark.usefixtures("breakable")
@pytest.mark.parametrize("off", [{"eager": True}, {"mode": CUDAGraphMode.NONE}], ids=str)
def test_graphs_off(off: dict) -> None:
    """A config without graphs is left as it is."""
    made = make_config(**off)
    fit_graphs(made, 8)
    assert made.compilation_config.cudagraph_capture_sizes == SIZES


def capture_on_cpu(rank: int) -> None:
    """Give the config what it has on CUDA just before the model loads; CPU's worker captures nothing by itself."""
    from vllm_dwdp.integration.worker import DWDPWorker

    load = DWDPWorker.load_model

    def load_model(self, **kwargs) -> None:
        made = make_config().compilation_config
        self.vllm_config.compilation_config.__dict__ |= {
            name: getattr(made, name)
            for name in ("cudagraph_mode", "cudagraph_capture_sizes", "max_cudagraph_capture_size")
        }
        self.vllm_config.model_config.enforce_eager = False
        load(self, **kwargs)

    DWDPWorker.load_model = load_model


def captured(llm) -> tuple[list[int], list[str]]:
    """The sizes that vLLM would capture, and what this rank's prefetcher hears of what vLLM tells its offloader."""
    from vllm.model_executor.offloader import get_offloader

    prefetcher, told = streamed_model(llm).prefetcher, []
    for name in ("before_graph", "join_graph"):
        setattr(prefetcher, name, functools.partial(told.append, name))
    get_offloader().sync_prev_onload()
    get_offloader().join_after_forward()
    for name in ("before_graph", "join_graph"):
        delattr(prefetcher, name)
    return llm.llm_engine.vllm_config.compilation_config.cudagraph_capture_sizes, told


@pytest.mark.engine
@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"direct_max_tokens": 7}, [1, 2, 4, 7, 8, 16, 24, 32]),
        ({"cache_gib": 1}, SIZES),
    ],
    ids=["streamed", "all resident"],
)
def test_what_a_rank_captures(models, options: dict, sizes: list[int]) -> None:
    """All sizes, with their copies."""
    with Group(models("qwen3_moe"), 2, options, setup=capture_on_cpu) as group:
        assert group.run(captured) == [(sizes, ["before_graph", "join_graph"])] * 2
