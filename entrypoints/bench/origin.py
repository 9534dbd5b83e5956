"""Where figures come from: devices, versions, commit and command, which every file of a benchmark names."""

import contextlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_dwdp.errors import DWDPError

CHECKOUT = Path(__file__).resolve().parents[2]


def on_cpu() -> bool:
    """Whether vLLM's CPU build is installed."""
    return "cpu" in importlib.metadata.version("vllm")


def query_gpus(fields: str, devices: Sequence[str] | None = None) -> list[str]:
    """nvidia-smi's line of `fields` for each of the devices, or for all; empty where there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    return output_of([*command, *(["-i", ",".join(devices)] if devices else [])]).splitlines()


def cuda_devices(size: int) -> list[str] | None:
    """The first `size` CUDA devices, or None where vLLM's CPU build runs. Raises DWDPError when there are fewer."""
    if on_cpu():
        return None
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = query_gpus("index") if given is None else [name.strip() for name in given.split(",") if name.strip()]
    if len(visible) < size:
        raise DWDPError(f"--size is {size} but {len(visible)} GPUs are visible: lower --size")
    return visible[:size]


def origin(devices: Sequence[str] | None) -> dict[str, Any]:
    """What a result's file says of its making; the commit is None where the package runs from no checkout."""
    git = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = output_of(git).strip() if (CHECKOUT / "pyproject.toml").exists() else ""
    return {
        "command": shlex.join(["vllm-dwdp", *sys.argv[1:]]),
        "versions": {name: importlib.metadata.version(name) for name in ("vllm-dwdp", "vllm", "torch")},
        "commit": commit or None,
        "devices": query_gpus("name,driver_version", devices) if devices else [platform.machine()],
    }


def output_of(command: Sequence[str]) -> str:
    """Empty where the command is missing or fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return ""
