"""Source: a model's config.json, found, read, and overridden as vLLM overrides it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_dwdp.errors import DWDPError

# vLLM's arguments with which a model takes other bytes than its config.json says.
RESIZING = frozenset({
    "quantization", "quantization_config", "dtype", "hf_overrides", "hf_config_path", "revision", "model_class_overrides",
    "pipeline_parallel_size", "cpu_offload_gb", "cpu_offload_params", "offload_backend", "offload_group_size",
    "offload_num_in_group", "offload_params",
})


def read_config(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's fields, from the config.json of a folder or a hub's repository, with `overrides`.

    Raises DWDPError for what cannot be found or read.
    """
    config = read_json(name, "config.json")
    if not isinstance(config, dict):
        raise DWDPError(f"{name}: config.json is no JSON object")
    config, nested = {**config, **overrides}, config.get("text_config")
    if isinstance(nested, dict) and isinstance(config["text_config"], dict):
        config["text_config"] = merged(nested, config["text_config"])
    if not isinstance(nested := config.get("text_config") or {}, dict):
        raise DWDPError(f"{name}: config.json's text_config is {nested!r}: it must be a JSON object")
    return config | nested


def merged(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Field by field, at every depth."""
    both = {name: merged(fields[name], value) for name, value in overrides.items()
            if isinstance(value, dict) and isinstance(fields.get(name), dict)}
    return {**fields, **overrides, **both}


def read_json(name: str, file: str, missing: bool = False) -> Any:
    """The content of `file` in the folder or hub repository `name`; None if it has no such file and may lack it."""
    path = Path(name) / file
    if not Path(name).is_dir():
        from huggingface_hub import hf_hub_download
        try:
            path = Path(hf_hub_download(name, file))
        except Exception as error:  # no such name, no such file, no network: the hub's client has a type for each
            if missing:
                return None
            reason = str(error).strip().split("\n")[0]
            raise DWDPError(f"{name} is no folder, and {file} did not come from the hub: {reason}") from None
    if missing and not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DWDPError(f"cannot read {path}: {error}") from None
