"""What cannot run, said in one line before anything loads."""

import contextlib
import dataclasses
import shlex
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm_dwdp import config
from vllm_dwdp.entrypoints.bench.modes import OWN_ARGUMENTS, kind, own_options
from vllm_dwdp.entrypoints.bench.origin import on_cpu
from vllm_dwdp.entrypoints.bench.tokenizer import FILES
from vllm_dwdp.entrypoints.plan.model import EXPERTS
from vllm_dwdp.entrypoints.plan.source import read_config
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.placement import Placement

OWN_FLAGS = {
    "--model", "--host", "--port", "--uds", "--api-key", "--served-model-name", "--root-path", "--ssl-keyfile", "--ssl-certfile",
    "--tokenizer", "--skip-tokenizer-init", "--headless", "--parallel", "--data-parallel-size", "-dp", "--tensor-parallel-size",
    "-tp", "--enable-expert-parallel", "-ep",
}
NOT_CHOSEN = {"naive", "pplx", "passthrough"}  # vLLM runs another in their stead, or sets it by itself


def refuse_impossible(modes: Sequence[str], model: str, tokens: int, overrides: dict[str, Any], spelt: str) -> None:
    """Raises DWDPError for a mode that vLLM does not have here and for a model that has no folder or no room.

    `tokens` is the longest sequence, which the options `spelt` ask for.
    """
    refuse_modes(modes)
    found = model_config(model, overrides)
    room = found.get("max_position_embeddings")
    scaled = "factor" in str(found.get("rope_scaling") or found.get("rope_parameters"))  # vLLM counts that in
    if isinstance(room, int) and not scaled and tokens > room:
        raise DWDPError(f"{spelt} ask for {tokens} tokens in a sequence, {Path(model).name} allows {room}: lower them")


def refuse_unshared(model: str, overrides: dict[str, Any], size: int, options: Iterable[dict[str, Any]]) -> None:
    """Raises DWDPError where `size` ranks of DWDP with any of these `options` cannot share the experts that config.json has."""
    found = model_config(model, overrides)
    num_experts = next((found[name] for name in EXPERTS if isinstance(found.get(name), int)), 0)
    for read in [config.parse({config.KEY: each}) for each in options] if num_experts else ():
        assert read is not None
        Placement(num_experts=num_experts, size=size, experts_per_rank=read.experts_per_rank)


def refuse_unwritable(out: str) -> None:
    """Raises DWDPError unless `out` is a folder to write to or can be made one. Leaves nothing new behind."""
    logs = Path(out, "logs")
    made = [folder for folder in (logs, *logs.parents) if not folder.exists()]
    try:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / ".writable").touch()
        (logs / ".writable").unlink()
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        raise DWDPError(f"--out is {out}, where no folder can be written: {getattr(error, 'strerror', error)}") from None
    finally:
        for folder in made:
            with contextlib.suppress(OSError, ValueError):
                folder.rmdir()


def flags_of(serve_args: str) -> set[str]:
    """As vLLM spells them. Raises DWDPError for arguments that no shell would take."""
    try:
        return {argument.split("=")[0].replace("_", "-") for argument in shlex.split(serve_args)}
    except ValueError as error:
        raise DWDPError(f"--serve-args is {serve_args!r}: {error}") from None


def refuse_unservable(model: str, serve_args: str) -> None:
    """Raises DWDPError for arguments that the bench gives, and for a model without a possible tokenizer."""
    if taken := OWN_FLAGS & flags_of(serve_args):
        raise DWDPError(f"--serve-args sets {', '.join(sorted(taken))}, which the bench sets itself or does not work with: leave it out")
    has_own = not Path(model).is_dir() or any((Path(model) / name).exists() for name in FILES)
    if not has_own and not isinstance(model_config(model, {}).get("vocab_size"), int):
        raise DWDPError(f"{model} has no tokenizer, and its config.json no vocab_size of which to make one: add either")


def refuse_modes(modes: Sequence[str]) -> None:
    """Expert parallelism needs a GPU, arguments that vLLM has, and a backend of its."""
    parallel = [mode for mode in modes if kind(mode) == "ep"]
    if on_cpu() and parallel:
        raise DWDPError(f"--modes has {parallel[0]}: vLLM's CPU build has no expert parallelism; leave it out")
    for mode in parallel:
        for name, value in own_options(mode).items():
            if name not in ep_arguments():
                raise DWDPError(f"--modes has {mode}: {name} is no argument of this vLLM, or one that the modes set themselves")
            if name == "all2all_backend" and value not in (known := all2all_backends()):
                raise DWDPError(f"--modes has {mode}: of this vLLM's backends, {', '.join(known)} can run here; choose one")


def ep_arguments() -> set[str]:
    """What a mode of expert parallelism may carry."""
    from vllm.engine.arg_utils import EngineArgs

    return {field.name for field in dataclasses.fields(EngineArgs)} - OWN_ARGUMENTS | {"all2all_backend"}


def all2all_backends() -> list[str]:
    """What the installed vLLM takes as --all2all-backend, and finds what it needs for."""
    from vllm.config.parallel import All2AllBackend
    from vllm.utils.flashinfer import has_flashinfer_nvlink_one_sided, has_flashinfer_nvlink_two_sided
    from vllm.utils.import_utils import has_deep_ep, has_deep_ep_v2, has_moonep, has_mori, has_nixl_ep

    needs = (  # the first whose name a backend's begins with
        ("deepep_v2", has_deep_ep_v2), ("deepep", has_deep_ep), ("mori", has_mori), ("moonep", has_moonep), ("nixl_ep", has_nixl_ep),
        ("flashinfer_nvlink_one_sided", has_flashinfer_nvlink_one_sided), ("flashinfer", has_flashinfer_nvlink_two_sided),
    )
    able = {name: next((has() for begins, has in needs if name.startswith(begins)), True) for name in typing.get_args(All2AllBackend)}
    return [name for name, is_able in able.items() if is_able and name not in NOT_CHOSEN]


def model_config(model: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of config.json. Raises DWDPError when there is no such model."""
    if (model.startswith(("/", ".", "~")) or model.count("/") > 1) and not Path(model).is_dir():
        raise DWDPError(f"there is no folder {model}: correct --model")
    return read_config(model, overrides)
