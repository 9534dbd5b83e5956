"""Calls of the CUDA driver, checked: a failed one raises with its name and the driver's own words."""

from typing import Any

from cuda.bindings import driver

from vllm_dwdp.errors import DWDPError


class CudaError(DWDPError):
    """A driver call that failed."""

    def __init__(self, what: str, code: driver.CUresult):
        _, text = driver.cuGetErrorString(code)
        super().__init__(f"{what} failed: {code.name} ({(text or b'').decode()})")


def check(what: str, result: tuple) -> Any:
    code, *values = result
    if code != driver.CUresult.CUDA_SUCCESS:
        raise CudaError(what, code)
    return values[0] if values else None
