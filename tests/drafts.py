"""Draft models with experts, made of a tiny checkpoint: a head inside it, as MTP has it, and a model beside it, as EAGLE has it."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tiny_models import PRINTABLE


def add_head(model: str, folder: Path) -> str:
    """A copy of a GLM-4 or DeepSeek-V3 checkpoint with one such layer, which is the last one again behind a projection.

    The model says six tokens only, so that some of what the head predicts is right.
    """
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    config["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][PRINTABLE.start + 6 :] = 0.0
    last, head = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    added = {name.replace(last, head): tensor.clone() for name, tensor in tensors.items() if name.startswith(last)}
    one = torch.eye(hidden)
    added |= {
        f"{head}eh_proj.weight": torch.cat([one, 0.5 * one], dim=1),
        f"{head}embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        f"{head}shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }
    added |= {f"{head}{name}.weight": torch.ones(hidden) for name in ("enorm", "hnorm", "shared_head.norm")}
    save_file(tensors | added, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def add_eagle(model: Path, folder: Path) -> str:
    """The folder of a draft model for a DeepSeek-V3 checkpoint: its last layer again behind a projection.

    The model is rewritten to say six tokens only, so that some of what the draft predicts is right.
    """
    config = json.loads((model / "config.json").read_text())
    last, hidden = f"model.layers.{config['num_hidden_layers'] - 1}.", config["hidden_size"]
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][PRINTABLE.start + 6 :] = 0.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    folder.mkdir()
    config |= {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    one = torch.eye(hidden)
    draft = {name.replace(last, "layers.0."): tensor.clone() for name, tensor in tensors.items() if name.startswith(last)}
    draft |= {
        "fc.weight": torch.cat([one, 0.5 * one], dim=1),
        "embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(), "lm_head.weight": tensors["lm_head.weight"].clone(),
    }
    draft |= {f"{name}.weight": torch.ones(hidden) for name in ("enorm", "hnorm", "norm")}
    save_file(draft, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)
