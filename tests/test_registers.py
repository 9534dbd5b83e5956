"""Invariant: two programs of the token exchange find room on every SM, so that one that waits keeps out none that has to send.

The kernels are compiled for Hopper as CudaTokens launches them, which takes no GPU.
"""

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import pytest

from interpreted import TRITON

PER_SM = 65536  # registers


def usage(hidden: int, size: int, top_k: int, rows: int) -> tuple[int, dict[str, int]]:
    """Threads of a program, and registers of each by kernel; for a process of its own, which has not imported Triton."""
    sys.path.insert(0, str(TRITON))
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vllm_dwdp.kernels import tokens_cuda
    from vllm_dwdp.kernels.tokens import InboxMap, owners_of

    found: dict[str, int] = {}
    pointers = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}

    def compiled(kernel: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names and value is not None}
        given = dict(zip(kernel.arg_names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in kernel.arg_names}
        signature, constants, aligned = {}, {}, {}
        for at, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[at,] = "constexpr", value
                continue
            is_tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = pointers[value.dtype] if is_tensor else "i64" if value >= 2**31 else "i32"
            if is_tensor or (value % 16 == 0 and not parameter.do_not_specialize):
                aligned[at,] = [["tt.divisibility", 16]]
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            tool = TRITON / "triton/backends/nvidia/bin/cuobjdump"
            said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        (found[kernel.__name__],) = map(int, re.findall(r"REG:(\d+)", said))

    class Compiler:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: compiled(self.kernel, args, kwargs)

    tokens_cuda.dispatch_rows, tokens_cuda.combine_sums = Compiler(tokens_cuda.dispatch_rows), Compiler(tokens_cuda.combine_sums)
    made = object.__new__(tokens_cuda.CudaTokens)
    words = torch.zeros(2 + 2 * size, dtype=torch.int64)
    shares = tuple(range(rank * 128 // size, (rank + 1) * 128 // size) for rank in range(size))
    made._rank, made._at, made._most = 0, InboxMap(size=size, rows=4096, hidden=hidden, top_k=top_k, itemsize=2), 264
    made._owners = [torch.tensor(owners_of(shares, 128), dtype=torch.int32)]
    made._peers, made._control, made._failed, made._error = words, words, words[:1].int(), words[:1].int()
    given = torch.zeros(rows, hidden, dtype=torch.bfloat16)
    weights, ids = torch.zeros(rows, top_k), torch.zeros(rows, top_k, dtype=torch.int32)
    made.dispatch(0, given, weights, ids, size * rows)
    made.combine(0, torch.zeros(size * rows, hidden, dtype=torch.bfloat16), rows)
    return tokens_cuda.THREADS.value, found


@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "size", "top_k"), [(2048, 2, 8), (4096, 3, 8), (2048, 4, 8), (3072, 4, 4), (7168, 4, 8)])
def test_two_programs_find_room_on_every_sm(hidden: int, size: int, top_k: int) -> None:
    """Of few rows, and of many, which programs take several of at once."""
    for rows in (4, 1024):
        ended = subprocess.run(
            [sys.executable, __file__, *map(str, (hidden, size, top_k, rows))], capture_output=True, text=True, timeout=120
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
        threads, found = json.loads(ended.stdout)
        assert set(found) == {"dispatch_rows", "combine_sums"}
        assert 0 < max(found.values()) * threads <= PER_SM // 2, found


if __name__ == "__main__":
    print(json.dumps(usage(*map(int, sys.argv[1:]))))
