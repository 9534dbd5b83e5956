"""Checkpoint: what tells two checkpoint folders apart without reading them whole, down to the tensor that differs."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SAMPLE_BYTES = 4096
_NUM_SAMPLES = 64  # of a file that does not list its tensors
_THREADS = 16  # network disks answer many small reads at once
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
Tensors = dict[str, str]  # tensor: dtype, shape and a fingerprint of its middle


def describe(folder: Path) -> dict[str, Tensors]:
    """Every weight file of `folder` by name: its tensors. Other files than safetensors count as one tensor each.

    Raises OSError when a file cannot be read.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    if any(path.suffix == ".safetensors" for path in files):  # what vLLM then reads
        files = [path for path in files if path.suffix == ".safetensors"]
    with ThreadPoolExecutor(_THREADS) as pool:
        return {path.name: _describe_file(path, pool) for path in files}


def summary(tensors: Tensors) -> str:
    """One fingerprint of a file's tensors."""
    return fingerprint("\0".join(f"{name} {said}" for name, said in sorted(tensors.items())).encode())


def fingerprint(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _describe_file(path: Path, pool: ThreadPoolExecutor) -> Tensors:
    fd = os.open(path, os.O_RDONLY)
    try:
        places = list(_places(fd, path))
        samples = pool.map(lambda place: os.pread(fd, *reversed(place[2:])), places)
        found: Tensors = {}
        for (name, said, _, _), sample in zip(places, samples, strict=True):
            found[name] = f"{said}, content {fingerprint(sample)}"
        return found
    finally:
        os.close(fd)


def _places(fd: int, path: Path) -> Iterator[tuple[str, str, int, int]]:
    """(tensor, dtype and shape, offset, bytes) of every sample."""
    nbytes = os.fstat(fd).st_size
    if path.suffix != ".safetensors":
        for number in range(_NUM_SAMPLES):
            at = max(nbytes - SAMPLE_BYTES, 0) * number // (_NUM_SAMPLES - 1)
            yield f"sample {number}", f"at {at} of {nbytes} bytes", at, SAMPLE_BYTES
        return
    start = 8 + int.from_bytes(os.pread(fd, 8, 0), "little")
    header = json.loads(os.pread(fd, start - 8, 8))
    header.pop("__metadata__", None)
    for name, tensor in header.items():
        first, last = tensor["data_offsets"]
        middle = first + max(last - first - SAMPLE_BYTES, 0) // 2
        yield name, f"{tensor['dtype']} {tensor['shape']}", start + middle, min(SAMPLE_BYTES, last - first)
