"""The table of families in docs/models.md: each tiny model under DWDP against stock vLLM, on CPU, greedy tokens compared.

    python tests/models.py [--only PATTERN,PATTERN] [--runs NAME,NAME]

`--only` runs the families whose name matches one and keeps the other rows; `--runs` leaves out runs but the first two.
"""

import argparse
import contextlib
import fnmatch
import os
import re
import shutil
import tempfile
import traceback
from pathlib import Path
from typing import Any

from conftest import ROOT  # and vLLM's environment on CPU
from families import ENGINES, FAMILIES, TORCHVISION
from harness import Group, generate, keep_step, make_prompts, stats, streamed_model
from tiny_models import make_model

PAGE = ROOT / "docs/models.md"
HEAD = """# Models

What `make models` found: tiny models with seeded weights against stock vLLM {version} on CPU. A row that is *equal* gave
stock vLLM's greedy tokens for four prompts on every rank at the same time, in each of its runs: eager in float32 with
dispatch on and off, on three ranks, in bfloat16 (dispatch off: partial sums round, so dispatched tokens can differ), and
compiled. Where all runs are in bfloat16, dispatched tokens are compared up to the first that stock vLLM preferred by no more
than what its logits lie apart. A model that stock vLLM does not run here (on CPU, from the checkpoint that transformers
writes) is not judged.

| family | class | result | ranks | runs | notes |
|---|---|---|---|---|---|
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
TIE = 0.25  # what logits in bfloat16 lie apart, which are at most 64 here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="*", help="patterns of families, such as 'qwen*,glm*'")
    parser.add_argument("--runs", default=",".join(name for name, *_ in RUNS))
    only, runs = vars(parser.parse_args()).values()
    rows, stand_in = read(), tempfile.mkdtemp()
    (Path(stand_in) / "torchvision.py").write_text(TORCHVISION)
    os.environ["PYTHONPATH"] = stand_in  # for ranks, and for the process in which vLLM looks at a model
    for family in ENGINES:
        if any(fnmatch.fnmatch(family, pattern) for pattern in only.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                rows[family] = judge(family, Path(folder), runs.split(","))
            print(rows[family], flush=True)
            write(rows)
    shutil.rmtree(stand_in)


def judge(family: str, folder: Path, runs: list[str]) -> str:
    """The family's row."""
    model = str(make_model(FAMILIES.get(family, family), folder / family))
    stock: dict[str, Any] = {}
    kind, ranks, notes, equal = "", "", [], []
    for name, size, engine, options in RUNS:
        if name not in runs or (engine is BF16 and "dtype" in ENGINES[family]):
            continue
        settings = ENGINES[family] | engine
        rounds = settings.get("dtype") == "bfloat16" and "dispatch" not in options  # partial sums, to bfloat16
        one_by_one = ENGINES[family] is ENGINES["deepseek_v3"]  # concurrent runs of the stock engine differ among themselves
        try:
            if str(engine) not in stock:
                with Group(model, 0, engine=settings) as group:
                    stock[str(engine)] = (*group.run(answer, one_by_one=one_by_one)[0], group.run(certain)[0] if rounds else None)
        except Exception as error:
            if name != "dispatch on":
                notes.append(f"{name}: stock vLLM does not run it ({line_of(error)})")
                continue
            kind = written_class(Path(model))
            refused = None
            with contextlib.suppress(TimeoutError), Group(model, size, options, engine=settings, wait=False) as group:
                refused = next((text for text in group.outcomes(60) if "DWDPError" in text), None)
            if refused:
                return row(family, kind, f"refused: {line_of(refused)}", "", "", "")
            return row(family, kind, "not run", "", "", f"stock vLLM does not run it here: {line_of(error)}")
        expected, kind, certainly = stock[str(engine)]
        wanted = ["streamed", "direct" if "dispatch" in options else "dispatched"]
        try:
            with Group(model, size, options, engine=settings, setup=keep_step) as group:
                found, missed = [], wanted
                for _ in range(4):  # on a busy machine ranks may miss each other
                    if missed:
                        found += group.run(answer, one_by_one=one_by_one)
                        seen = group.run(stats)
                        missed = [view for view in wanted if not all(s["forwards"][view] for s in seen)]
                kinds = group.run(expert_layers)[0]
        except Exception as error:
            text = line_of(error)
            return row(family, kind, f"refused: {text}" if "DWDPError" in str(error) else f"fails ({name}): {text}", "", "", "")
        ends = certainly if rounds else [None] * len(expected)
        wrong = [
            f"{name}: rank {i % size} differs" for i, (tokens, _) in enumerate(found)
            if any(mine[:end] != theirs[:end] for mine, theirs, end in zip(tokens, expected, ends, strict=True))
        ]
        if rounds and (count := sum(ends)) < 16:
            wrong.append(f"{name}: stock vLLM is certain of {count} tokens")
        wrong += [f"{name}: no {view} step" for view in missed]
        wrong += [f"{name}: layers were fetched again"] * any(s["refills"] for s in seen)
        if len({tuple(tokens) for tokens in expected}) < 2:
            wrong.append("all answers are alike")
        if wrong:
            return row(family, kind, f"differs: {'; '.join(wrong)}", str(size), ", ".join(equal), "")
        ranks = ranks if str(size) in ranks else f"{ranks}, {size}".strip(", ")
        equal.append(name)
    only = [f"all in {ENGINES[family]['dtype']}"] if "dtype" in ENGINES[family] else []
    return row(family, kind, "equal", ranks, ", ".join(equal), "; ".join([kinds, *only, *notes]))


def answer(llm: Any, **question: Any) -> tuple[list[list[int]], str]:
    """Greedy tokens, or embeddings in units of 1e-4, and the class of the model."""
    if llm.model_config.runner_type == "pooling":
        outputs = [llm.embed([prompt], use_tqdm=False)[0] for prompt in make_prompts((64, 5, 17, 40))]  # small ones meet after it
        tokens = [[round(1e4 * value) for value in output.outputs.embedding] for output in outputs]
    else:
        tokens = generate(llm, tokens=16, **question)
    return tokens, type(llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()).__name__


def certain(llm: Any) -> list[int]:
    """How many of each answer's first tokens were preferred to all others by more than TIE."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, detokenize=False, logprobs=2)
    counts = []
    for output in llm.generate(make_prompts((5, 64, 17, 40)), sampling, use_tqdm=False):
        best = [sorted((found.logprob for found in each.values()), reverse=True) for each in output.outputs[0].logprobs]
        counts.append(next((place for place, (first, second, *_) in enumerate(best) if first - second <= TIE), len(best)))
    return counts


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
