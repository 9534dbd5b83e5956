"""Draft models with experts, made of a tiny checkpoint: a head inside it, as MTP has it, and a model beside it, as EAGLE has it."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tiny_models import PRINTABLE


def add_head(model: str, folder: Path) -> str:
    """A copy of a GLM-4 or DeepSeek-V3 checkpoint with one such layer, which is the last one again behind a projection.

    The model says six tokens only, so that some of what the head predicts is right.
    """
    shutil.copytree(model, folder)
    config, tensors = read_laconic(folder)
    head = f"model.layers.{config['num_hidden_layers']}."
    added = last_layer(config, tensors, head, f"{head}eh_proj", [f"{head}{norm}" for norm in ("enorm", "hnorm", "shared_head.norm")])
    added |= {
        f"{head}embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        f"{head}shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }
    return write(folder, config | {"num_nextn_predict_layers": 1}, tensors | added)


def add_eagle(model: Path, folder: Path) -> str:
    """The folder of a draft model for a DeepSeek-V3 checkpoint: its last layer again behind a projection.

    The model is rewritten to say six tokens only, so that some of what the draft predicts is right.
    """
    config, tensors = read_laconic(model)
    write(model, config, tensors)
    draft = last_layer(config, tensors, "layers.0.", "fc", ["enorm", "hnorm", "norm"])
    draft |= {
        "embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(), "lm_head.weight": tensors["lm_head.weight"].clone(),
    }
    folder.mkdir()
    config |= {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 1}
    return write(folder, config, draft)


def read_laconic(model: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A checkpoint's config and tensors, with a head that says six tokens only."""
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][PRINTABLE.start + 6 :] = 0.0
    return json.loads((model / "config.json").read_text()), tensors


def last_layer(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], prefix: str, projection: str, norms: list[str]
) -> dict[str, torch.Tensor]:
    """The last layer again as `prefix`, the projection of embeddings and hidden states ahead of it, and norms of ones."""
    last, hidden = f"model.layers.{config['num_hidden_layers'] - 1}.", config["hidden_size"]
    layer = {name.replace(last, prefix): tensor.clone() for name, tensor in tensors.items() if name.startswith(last)}
    layer[f"{projection}.weight"] = torch.cat([torch.eye(hidden), 0.5 * torch.eye(hidden)], dim=1)
    return layer | {f"{name}.weight": torch.ones(hidden) for name in norms}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)
