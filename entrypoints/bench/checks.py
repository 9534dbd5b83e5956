"""What cannot run, said in one line before anything loads."""

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_dwdp.entrypoints.bench.origin import on_cpu
from vllm_dwdp.entrypoints.plan.source import read_config
from vllm_dwdp.errors import DWDPError

NOT_CHOSEN = {"naive", "pplx", "passthrough"}  # vLLM runs another in their stead, or sets it by itself
ALL2ALL = "ep+all2all_backend="


def refuse_impossible(modes: Sequence[str], model: str, tokens: int, overrides: dict[str, Any], spelt: str) -> None:
    """Raises DWDPError for a mode that vLLM does not have here and for a model that has no folder or no room.

    `tokens` is the longest sequence, which the options `spelt` ask for.
    """
    refuse_modes(modes)
    config = model_config(model, overrides)
    room = config.get("max_position_embeddings")
    scaled = "factor" in str(config.get("rope_scaling") or config.get("rope_parameters"))  # vLLM counts that in
    if isinstance(room, int) and not scaled and tokens > room:
        raise DWDPError(f"{spelt} ask for {tokens} tokens in a sequence, {Path(model).name} allows {room}: lower them")


def refuse_modes(modes: Sequence[str]) -> None:
    """Expert parallelism needs a GPU, and a backend that vLLM has."""
    if on_cpu() and (parallel := [mode for mode in modes if mode.split("+")[0] == "ep"]):
        raise DWDPError(f"--modes has {parallel[0]}: vLLM's CPU build has no expert parallelism; leave it out")
    asked = [mode.removeprefix(ALL2ALL) for mode in modes if mode.startswith(ALL2ALL)]
    if asked and (unknown := set(asked) - set(known := all2all_backends())):
        raise DWDPError(f"--modes has {ALL2ALL}{min(unknown)}: this vLLM has {', '.join(known)}")


def all2all_backends() -> list[str]:
    """What the installed vLLM takes as --all2all-backend."""
    from vllm.config.parallel import All2AllBackend

    return [name for name in typing.get_args(All2AllBackend) if name not in NOT_CHOSEN]


def model_config(model: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of config.json. Raises DWDPError when there is no such model."""
    if (model.startswith(("/", ".", "~")) or model.count("/") > 1) and not Path(model).is_dir():
        raise DWDPError(f"there is no folder {model}: correct --model")
    return read_config(model, overrides)
