"""Draft heads: a layer of experts that predicts the token after the next, added to a tiny checkpoint as real ones have it."""

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
