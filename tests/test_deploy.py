"""Invariant: the commands of docs/deploy.md are ones that vLLM's and this package's parsers take; its snippets parse."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from vllm_dwdp.entrypoints import cli
from vllm_dwdp.entrypoints.server import free_port

from conftest import ROOT
from harness import ENGINE, refuse_unmarked

PAGE = (ROOT / "docs/deploy.md").read_text()


def snippet(heading: str) -> str:
    """The indented text under a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return "\n".join(line[4:] for line in section.splitlines() if line.startswith("    ") or not line)


def commands() -> list[list[str]]:
    """Every command that starts a server or doctor, as a shell would split it, with what the page's variables hold."""
    found = []
    for heading in re.findall(r"^## (.+)$", PAGE, re.M):
        text = snippet(heading).replace("\\\n", " ")
        variables = {name: value for name, _, value in re.findall(r"""^(?:export )?(\w+)=(["'])(.*?)\2$""", text, re.M | re.S)}
        for line in text.splitlines():
            if match := re.search(r"(?:vllm serve|vllm-dwdp doctor) .*", line):
                words = []
                for word in shlex.split(match[0].split(" || ")[0], comments=True):
                    name = word.removeprefix("$")
                    value = variables.get(name) if word.startswith("$") else None
                    words += [word] if value is None else [value] if value.startswith("{") else value.split()
                found.append(words)
    pod = yaml.safe_load(snippet("Kubernetes"))
    inside = pod["spec"]["template"]["spec"]
    return [*found, *(each["command"] for each in inside["initContainers"] + inside["containers"])]


def test_commands_are_taken(serve_parser) -> None:
    found = commands()
    assert len([words for words in found if words[:2] == ["vllm", "serve"]]) == 9 and len(found) == 11
    for words in found:
        if words[0] == "vllm":
            serve_parser.parse_args(words[1:])
        else:
            cli.parser().parse_args(words[1:])


def test_recipes_set_up_what_their_commands_need() -> None:
    """Ranks that meet over TCP share a secret; each folder of metrics is made, and emptied, before a server starts."""
    for heading in re.findall(r"^## (.+)$", PAGE, re.M):
        text = snippet(heading)
        assert ("--dwdp-rendezvous" in text) == ("export DWDP_GROUP_TOKEN=" in text), heading
        for folder in re.findall(r"PROMETHEUS_MULTIPROC_DIR=(\S+)", text):
            assert re.search(rf"^rm -rf .*{folder}\b.*; mkdir .*{folder}\b", text, re.M), folder


@pytest.mark.engine
def test_the_offline_example(models) -> None:
    """Each rank answers its prompts; ranks see the GPUs that the person gave, their own first."""
    refuse_unmarked()
    engine = {**ENGINE, "skip_tokenizer_init": False, "max_model_len": 64}
    command = [sys.executable, ROOT / "examples/offline_inference.py", models("qwen3_moe"), "--port", str(free_port()),
               "--engine-args", json.dumps(engine), "--max-tokens", "4"]
    done = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": "4,5"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sorted(re.findall(r"^rank (\d): '(\w+)", done.stdout, re.M)) == [("0", "Once"), ("0", "The"), ("1", "A"), ("1", "Seven")]
    assert "has no DWDP_GROUP_TOKEN" not in done.stdout + done.stderr
    print([line for line in done.stdout.splitlines() if "DWDP" in line])


def test_bash_reads_the_slurm_script() -> None:
    subprocess.run(["bash", "-n"], input=snippet("Slurm"), text=True, check=True)
    assert all(line.startswith("#SBATCH --") for line in snippet("Slurm").splitlines() if "SBATCH" in line)
