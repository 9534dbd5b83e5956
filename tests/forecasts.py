"""Forecasts: what `vllm-dwdp plan` says of large models, in docs/forecasts.md. `python tests/forecasts.py` writes the page."""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

from vllm_dwdp.entrypoints import cli

from plan_models import FP8_BLOCKS, GPT_OSS, NVFP4, QWEN3, R1

PAGE = Path(__file__).resolve().parent.parent / "docs" / "forecasts.md"
QWEN3_235B = QWEN3 | {
    "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_attention_heads": 64,
    "num_hidden_layers": 94, "quantization_config": FP8_BLOCKS,
}
EXAMPLES = (  # folder, its config.json, arguments, what to read there
    ("DeepSeek-R1", R1, "--gpu h200 --size 8", "Eight H200 of one host."),
    ("DeepSeek-R1-NVFP4", R1 | {"quantization_config": NVFP4}, "--gpu gb200 --size 4", "A tray of four GB200."),
    ("Qwen3-235B-A22B-FP8", QWEN3_235B, "--gpu h100 --size 4", "Four H100 of one host."),
    ("gpt-oss-120b", GPT_OSS, "--gpu h100 --size 2", "Two H100; one of them can hold the model, too: replicas are the ceiling."),
)
HEAD = """# Forecasts

What `vllm-dwdp plan` says of models that were not measured, made by `python tests/forecasts.py` from their published
shapes. Nothing here ran on a GPU: rates are the H100's, measured with Qwen3-30B-A3B, carried over to other GPUs by their makers'
peaks. README.md and [measurements.md](measurements.md) have what was measured.
"""


def forecast(folder: Path, config: dict, arguments: str) -> str:
    """What the command prints for a folder with this config."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli.main(["plan", str(folder), *arguments.split()]) == 0
    return said.getvalue().strip()


def page() -> str:
    parts = [HEAD]
    with tempfile.TemporaryDirectory() as folder:
        for name, config, arguments, what in EXAMPLES:
            lines = [f"$ vllm-dwdp plan {name} {arguments}", "", *forecast(Path(folder, name), config, arguments).splitlines()]
            indented = "\n".join(f"    {line}".rstrip() for line in lines)
            parts.append(f"## {name}, {arguments}\n\n{what}\n\n{indented}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(PAGE.write_text(page()) == 0)
