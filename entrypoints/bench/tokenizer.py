"""A tokenizer for a model folder that has none, as large as the vocabulary: token i is the word t<i>."""

import json
from pathlib import Path
from typing import Any

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")


def tokenizer_for(model: str, config: dict[str, Any], out: Path) -> str:
    """The model itself, or the folder in `out` where a tokenizer was made because the model's folder has none."""
    source = Path(model)
    if not source.is_dir() or any((source / name).exists() for name in FILES):
        return model
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = out / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    made = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config["vocab_size"])}, unk_token="t0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return str(folder)
