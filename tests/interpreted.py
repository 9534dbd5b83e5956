"""The token exchange of GPUs without one: Triton interprets its kernels on the CPU, one program at a time.

What a GPU adds is not seen here: threads, the order of their stores, and programs that run at once.
"""

import os
import sys
import time

import torch

from conftest import ROOT

TRITON = ROOT / ".venv" / "triton-3.6.0"  # made by `make test`


def interpret() -> None:
    """For a process of its own, before it imports Triton: CudaTokens take the CPU as their device."""
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(TRITON))
    torch.set_num_threads(1)
    import triton.language as tl

    from vllm_dwdp.kernels import arrivals_cuda, exchange_cuda, tokens_cuda

    # What the CPU has not: pinned memory, programs that run at once, and PTX, which reads the timer and fences.
    tokens_cuda.CudaTokens._pinned = staticmethod(lambda shape, dtype: torch.zeros(shape, dtype=dtype))
    tokens_cuda.CudaTokens._room = staticmethod(lambda device: 1)
    tokens_cuda.CudaTokens.close = lambda self: None
    arrivals_cuda.globaltimer = lambda: tl.full([1], time.monotonic_ns(), tl.int64)
    exchange_cuda.settle = lambda **_: None
