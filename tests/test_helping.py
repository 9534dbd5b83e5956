"""Invariant: in a helper's forward attention writes zeros and leaves the KV cache alone; any other forward runs vLLM's own methods."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.attention import Attention, MLAAttention

from vllm_dwdp.integration.helping import REQUEST_ROWS, Helper


class Impl:
    def forward(self, layer: object, query: torch.Tensor, output: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return output.fill_(scale)

    def do_kv_cache_update(self, layer: object, key: torch.Tensor) -> None:
        key.fill_(1.0)


class Common(Attention):
    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.impl = Impl()

    def run(self, rows: torch.Tensor, cache: torch.Tensor) -> None:
        self.impl.forward(self, rows, output=rows, scale=2.0)
        self.impl.do_kv_cache_update(self, cache)


class Latent(MLAAttention):
    """As DeepSeek-V3.2's, which passes `output` by its place."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def run(self, rows: torch.Tensor, cache: torch.Tensor) -> None:
        self.forward_impl(rows, rows, rows, cache, None, rows)
        self.update_kv_cache(rows, rows, cache, None, None, "auto", None)

    def forward_impl(self, q: Any, k_c_normed: Any, k_pe: Any, kv_cache: Any, attn_metadata: Any, output: torch.Tensor) -> torch.Tensor:
        return output.fill_(2.0)

    def update_kv_cache(
        self, kv_c_normed: Any, k_pe: Any, kv_cache: torch.Tensor, slot_mapping: Any, attn_metadata: Any, dtype: str, scale: Any
    ) -> None:
        kv_cache.fill_(1.0)


@pytest.mark.parametrize("kind", [Common, Latent])
@pytest.mark.parametrize("is_patched", [False, True], ids=["own", "patched"])
def test_attention_is_left_out_while_helping_and_only_then(kind: type, is_patched: bool) -> None:
    layer, rows, cache, fails = kind(), torch.ones(3, 2), torch.zeros(1), []
    target, name = (layer.impl, "forward") if kind is Common else (layer, "forward_impl")
    if is_patched:  # on the object, as other plugins do
        setattr(target, name, getattr(target, name))
    own = dict(vars(target))

    def forward(*args: Any, **kwargs: Any) -> None:
        layer.run(rows, cache)
        if fails:
            raise RuntimeError

    worker = SimpleNamespace(
        execute_dummy_batch=forward, model_runner=SimpleNamespace(_dummy_run=forward, decode_query_len=1),
        vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4)),
    )
    for padded in (1, 2 * REQUEST_ROWS):
        help_out = Helper(worker, SimpleNamespace(padded=padded), [layer, object(), torch.nn.Linear(1, 1)])
        help_out()
        assert not rows.any() and not cache.any() and vars(target) == own
        rows.fill_(1.0)
    fails.append(True)
    with pytest.raises(RuntimeError):
        help_out()
    assert vars(target) == own
    forward_of_a_step = layer.run
    forward_of_a_step(rows, cache)
    assert (rows == 2.0).all() and cache.all()


def test_attention_that_takes_no_output_runs_as_it_is() -> None:
    """A third party's may: neither what it returns nor what it does to the KV cache is known."""
    layer = Common()
    layer.impl = SimpleNamespace(forward=lambda layer, query: query.fill_(2.0), do_kv_cache_update=lambda layer, key: key.fill_(1.0))
    rows, cache = torch.zeros(3, 2), torch.zeros(1)

    def forward() -> None:
        layer.impl.forward(layer, rows)
        layer.impl.do_kv_cache_update(layer, cache)

    worker = SimpleNamespace(execute_dummy_batch=forward, model_runner=None)
    Helper(worker, SimpleNamespace(padded=1), [layer])()
    assert (rows == 2.0).all() and cache.all()


@pytest.mark.parametrize("rows", [1, 127, 128, 300, 4096])
def test_a_forward_has_requests_of_few_rows(rows: int) -> None:
    """And no more of them than the engine takes."""
    asked: list[int] = []
    runner = SimpleNamespace(_dummy_run=lambda tokens, uniform_decode: asked.append(tokens // 3), decode_query_len=3)
    worker = SimpleNamespace(
        execute_dummy_batch=lambda: asked.append(1), model_runner=runner,
        vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=16)),
    )
    Helper(worker, SimpleNamespace(padded=rows), [])()
    assert asked == [max(1, min(16, rows // REQUEST_ROWS))]

