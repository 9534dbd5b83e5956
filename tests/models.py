"""The table of families in docs/models.md: each tiny model under DWDP against stock vLLM, on CPU, greedy tokens compared.

    python tests/models.py [--only PATTERN]

`--only` runs the families whose name matches and keeps the other rows.
"""

import argparse
import fnmatch
import os
import re
import tempfile
import traceback
from pathlib import Path
from typing import Any

from conftest import ROOT  # and vLLM's environment on CPU
from families import ENGINES, FAMILIES, NOTES
from harness import Group, generate, stats, streamed_model
from tiny_models import make_model

PAGE = ROOT / "docs/models.md"
HEAD = """# Models

What `make models` found: tiny models with seeded weights, two ranks (2) or three (3), against stock vLLM {version} on one
CPU. Each row that is *equal* gave stock vLLM's greedy tokens for four prompts at the same time on every rank, in float32
with dispatch on and off, in bfloat16 with dispatch off (partial sums round in bfloat16, so dispatched tokens can differ),
and compiled in float32. A model that stock vLLM does not run on CPU is not judged here.

| family | class | result | ranks | notes |
|---|---|---|---|---|
"""
SMALL = {"dispatch_max_tokens": 8}  # decodes; what `generate` prefills is larger
EAGER, BF16, COMPILED = {}, {"dtype": "bfloat16"}, {"enforce_eager": False}
RUNS: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [  # name, ranks, engine, options
    ("dispatch on", 2, EAGER, SMALL),
    ("dispatch off", 2, EAGER, {"dispatch": "off"}),
    ("three ranks", 3, EAGER, SMALL),
    ("bfloat16", 2, BF16, {"dispatch": "off"}),
    ("compiled", 2, COMPILED, SMALL),
]
THREE = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "glm4_moe", "jamba", "lfm2_moe", "llama4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="*", help="a pattern of families, such as 'qwen*'")
    only = parser.parse_args().only
    rows = read()
    for family in ENGINES:
        if fnmatch.fnmatch(family, only):
            with tempfile.TemporaryDirectory() as folder:
                rows[family] = judge(family, Path(folder))
            print(rows[family], flush=True)
            write(rows)


def judge(family: str, folder: Path) -> str:
    """The family's row."""
    model = str(make_model(FAMILIES.get(family, family), folder / family))
    stock: dict[str, Any] = {}
    kind, ranks, notes = "", "", []
    for name, size, engine, options in RUNS:
        if (size == 3 and family not in THREE) or (engine is BF16 and "dtype" in ENGINES[family]):
            continue
        settings = ENGINES[family] | engine
        one_by_one = ENGINES[family] is ENGINES["deepseek_v3"]  # concurrent runs of the stock engine differ among themselves
        try:
            if str(engine) not in stock:
                with Group(model, 0, engine=settings) as group:
                    stock[str(engine)] = group.run(answer, one_by_one=one_by_one)[0]
        except Exception as error:
            if name != "dispatch on":
                notes.append(f"{name}: stock vLLM does not run it ({line_of(error)})")
                continue
            kind = written_class(Path(model))
            with Group(model, size, options, engine=settings, wait=False) as group:
                refused = next((text for text in group.outcomes(100) if "DWDPError" in text), None)
            if refused:
                return row(family, kind, f"refused: {line_of(refused)}", "", "")
            return row(family, kind, "not run", "", f"stock vLLM does not run it on CPU: {line_of(error)}")
        expected, kind = stock[str(engine)]
        try:
            with Group(model, size, options, engine=settings) as group:
                found = group.run(answer, one_by_one=one_by_one)
                seen = group.run(stats)
                kinds = group.run(expert_layers)[0]
        except Exception as error:
            text = line_of(error)
            return row(family, kind, f"refused: {text}" if "DWDPError" in str(error) else f"fails ({name}): {text}", "", "")
        wrong = [f"{name}: rank {r} differs" for r, (tokens, _) in enumerate(found) if tokens != expected]
        wanted = ["streamed", "direct" if "dispatch" in options else "dispatched"]
        if name != "compiled":  # a rank that compiles longer than its peer waits meets nobody
            wrong += [f"{name}: no {view} step" for view in wanted if not all(s["forwards"][view] for s in seen)]
        wrong += [f"{name}: layers were fetched again"] * any(s["refills"] for s in seen)
        if len({tuple(tokens) for tokens in expected}) < 2:
            wrong.append("all answers are alike")
        if wrong:
            return row(family, kind, f"differs: {'; '.join(wrong)}", str(size), "")
        ranks = ranks if str(size) in ranks else f"{ranks}, {size}".strip(", ")
    return row(family, kind, "equal", ranks, "; ".join([kinds, *NOTES.get(family, []), *notes]))


def answer(llm: Any, **question: Any) -> tuple[list[list[int]], str]:
    """Greedy tokens, and the class of the model."""
    tokens = generate(llm, tokens=16, **question)
    return tokens, type(llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()).__name__


def expert_layers(llm: Any) -> str:
    layers = streamed_model(llm).layers
    kinds = sorted({type(layer.module).__name__ for layer in layers} - {"RoutedExperts"})
    return f"{len(layers)} MoE layers{' of ' * bool(kinds)}{', '.join(kinds)}"


def written_class(model: Path) -> str:
    return (re.findall(r'"architectures": \[\s*"(\w+)"', (model / "config.json").read_text()) or ["?"])[0]


def line_of(error: Exception | str) -> str:
    """One line, without what differs from run to run."""
    text = " ".join((str(error) or traceback.format_exc().splitlines()[-1]).split()).replace("|", "/")
    text = re.sub(r"^(?:\w+Error: )*(?:.*Value error, )?", "", text).split(" [type=")[0]
    return re.sub(r"/(?:[\w.-]+/)+", "", text)[:240]


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def read() -> dict[str, str]:
    """The rows of the page, by family."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    return {line.split(" | ")[0][2:]: line for line in lines if line.startswith("| ") and not line.startswith("| family")}


def write(rows: dict[str, str]) -> None:
    import vllm

    order = list(ENGINES)
    ordered = sorted((family for family in rows if family in order), key=order.index)
    PAGE.write_text(HEAD.format(version=vllm.__version__.split("+")[0]) + "".join(f"{rows[family]}\n" for family in ordered))


os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
if __name__ == "__main__":
    main()
