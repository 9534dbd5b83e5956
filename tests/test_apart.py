"""Invariant: who asks an engine for its data-parallel size or rank gets what holds for an independent rank."""

import types

import pytest
from vllm.config import MultiModalConfig, ParallelConfig
from vllm.multimodal import cache
from vllm.multimodal.cache import factories

from vllm_dwdp.integration import worker
from vllm_dwdp.integration.engine import make_independent


@pytest.mark.parametrize("kind", ["lru", "shm"])
@pytest.mark.parametrize(
    ("parallel", "is_shared"),
    [
        ({"data_parallel_size": 2, "data_parallel_size_local": 2}, False),
        ({"data_parallel_size": 2, "data_parallel_external_lb": True}, True),
        ({"data_parallel_size": 2, "_api_process_count": 2}, False),
    ],
    ids=["one server", "a server a rank", "two API servers"],
)
def test_both_halves_of_the_multimodal_cache_are_there_or_neither(kind: str, parallel: dict, is_shared: bool) -> None:
    """The front end counts the ranks, an engine none: without a front end's half an engine looks for no segment."""
    multimodal = MultiModalConfig(mm_processor_cache_type=kind)
    model = types.SimpleNamespace(
        supports_multimodal_inputs=True, multimodal_config=multimodal, get_multimodal_config=lambda: multimodal
    )
    vllm_config = types.SimpleNamespace(model_config=model, parallel_config=ParallelConfig(**parallel))
    assert factories._get_cache_type(vllm_config) == (kind if is_shared else "processor_only")
    make_independent(vllm_config)
    assert factories._get_cache_type(vllm_config) == (kind if is_shared else None)
    if not is_shared:
        assert cache.engine_receiver_cache_from_config(vllm_config) is None
        assert cache.worker_receiver_cache_from_config(vllm_config, None) is None


def test_threads_are_shared_with_the_ranks_of_the_host() -> None:
    """An independent rank has size 1 and rank 0 for vLLM, but not the whole host."""
    parallel = ParallelConfig(data_parallel_size=4, data_parallel_size_local=2, data_parallel_rank=3)
    model = types.SimpleNamespace(multimodal_config=None)
    assert make_independent(types.SimpleNamespace(model_config=model, parallel_config=parallel)) == 3
    assert (parallel.data_parallel_size, parallel.data_parallel_rank, parallel.data_parallel_size_local) == (1, 0, 2)


def test_profiles_are_files_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """For vLLM every rank's trace is that of dp0."""
    names: list[str | None] = []
    monkeypatch.setattr(worker.PlatformWorker, "profile", lambda self, is_start, prefix=None, **_: names.append(prefix))
    for rank in (0, 1):
        one = worker.DWDPWorker.__new__(worker.DWDPWorker)
        one._group = types.SimpleNamespace(rank=rank)
        one.profile(True, None)
        one.profile(True, "night", delay_iterations=1)
    assert names == ["dwdp0", "night_dwdp0", "dwdp1", "night_dwdp1"]
