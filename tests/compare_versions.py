"""Prefill of installs of this package side by side on the same GPUs, in turns: A B A B.

    python tests/compare_versions.py MODEL OUT.json FOLDER[,OPTION=VALUE...] FOLDER[,OPTION=VALUE...]...

A folder is one that `pip install --target` has filled, an option one of DWDP's. Every turn gives each of the two ranks the
same prompts at once, of half a step each, so that no step is short; tokens/s per GPU. Ratios are to the first install's reading
of the same turn, so that what slows a host for some turns slows both sides; their median and its quartiles.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from vllm_dwdp.entrypoints.server import free_port

SIZE, PROMPTS, LENGTH, LAYERS, STEP, TURNS = 2, 16, 8192, 12, 16384, 30
RANK = """
import json, os, random, sys
from vllm import LLM, SamplingParams
answers = os.fdopen(int(sys.argv[1]), "w")
llm = LLM(**json.loads(sys.argv[2]))
rng = random.Random(0)
prompts = [{"prompt_token_ids": rng.choices(range(10, 100_000), k=int(sys.argv[4]))} for _ in range(int(sys.argv[3]))]
sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
print(sum(len(p["prompt_token_ids"]) for p in prompts), file=answers, flush=True)
for _ in sys.stdin:
    llm.generate(prompts, sampling, use_tqdm=False)
    print("done", file=answers, flush=True)
"""


class Ranks:
    """Both ranks of one version, ready to prefill."""

    def __init__(self, version: str, model: str, log: Path):
        folder, *options = version.split(",")
        port, self._ranks = free_port(), []
        for rank in range(SIZE):
            engine = {
                "model": model, "load_format": "dummy", "hf_overrides": {"num_hidden_layers": LAYERS},
                "max_num_batched_tokens": STEP, "max_model_len": LENGTH + 1, "kv_cache_memory_bytes": 1 << 30,
                "gpu_memory_utilization": 0.1, "enable_prefix_caching": False, "skip_tokenizer_init": True,
                "additional_config": {"dwdp": {
                    "size": SIZE, "rank": rank, "rendezvous": f"127.0.0.1:{port}", **dict(option.split("=") for option in options),
                }},
            }
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
            visible = ",".join(gpus[rank:] + gpus[:rank])
            environment = os.environ | {
                "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}", "CUDA_VISIBLE_DEVICES": visible,
            }
            answers, end = os.pipe()
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", RANK, str(end), json.dumps(engine), str(PROMPTS), str(LENGTH)], env=environment,
                    stdin=subprocess.PIPE, stdout=output, stderr=output, pass_fds=[end], text=True,
                )
            os.close(end)
            self._ranks.append((process, os.fdopen(answers)))

    def wait(self) -> list[str]:
        found = [answers.readline() for _, answers in self._ranks]
        assert all(found), "a rank has ended: see its log"
        return found

    def tokens_per_s(self, tokens: int) -> float:
        began_s = time.monotonic()
        for process, _ in self._ranks:
            process.stdin.write("go\n")
            process.stdin.flush()
        self.wait()
        return tokens / (time.monotonic() - began_s)

    def close(self) -> None:
        for process, _ in self._ranks:
            process.stdin.close()
        for process, _ in self._ranks:
            process.wait(60)


def main() -> None:
    model, out, *names = sys.argv[1:]
    versions = [Ranks(name, model, Path(f"{out}.{number}.log")) for number, name in enumerate(names)]
    tokens = [int(version.wait()[0]) for version in versions]
    for version, count in zip(versions, tokens, strict=True):
        version.tokens_per_s(count)
    found: list[list[int]] = [[] for _ in names]
    for _ in range(TURNS):
        for readings, version, count in zip(found, versions, tokens, strict=True):
            readings.append(round(version.tokens_per_s(count)))
    results = []
    for name, readings in zip(names, found, strict=True):
        ratios = [reading / first for reading, first in zip(readings, found[0], strict=True)]
        low, median, high = (round(part, 4) for part in statistics.quantiles(ratios, n=4))
        results.append({
            "version": name, "median": statistics.median(readings), "ratio": median, "quartiles": [low, high],
            "tokens/s per GPU": readings,
        })
    for result in results:
        print(json.dumps(result))
    Path(out).write_text(json.dumps({"command": sys.argv, "versions": results}, indent=1))
    for version in versions:
        version.close()


if __name__ == "__main__":
    main()
