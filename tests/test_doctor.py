"""Invariant: doctor names each fault that it knows, with what to do, and this machine has none of them.

Faults are made for real where a machine without GPUs can make them, else in the facts that a check reads.
"""

import contextlib
import dataclasses
import functools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_dwdp import descriptors, meeting
from vllm_dwdp.budget import GIB
from vllm_dwdp.entrypoints import cli
from vllm_dwdp.entrypoints.doctor import checks, facts
from vllm_dwdp.entrypoints.doctor.facts import Facts, Gpu, Link
from vllm_dwdp.entrypoints.plan import model as plan
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.integration import hooks

import forks
from plan_models import HYBRIDS, QWEN3

H100 = Gpu(name="H100", free_bytes=79 * GIB, total_bytes=80 * GIB, handles=frozenset({"fd"}))
LINKS = tuple(Link(reader=r, owner=1 - r, kind="NVLink", gb_per_s=350.0) for r in (0, 1))
NEEDED = checks.OWN_DESCRIPTORS


@functools.cache
def here() -> Facts:
    return facts.gather(None, 2)


def on_gpus(**changed) -> Facts:
    """Facts as of a host with two H100s, changed."""
    given = dict(is_cpu=False, torch_cuda="13.0", gpus=(H100, H100), links=LINKS, environment={})
    return dataclasses.replace(here(), **given | changed)


def said(found: list[checks.Verdict]) -> dict[str, str]:
    return {each.name: each.verdict for each in found if each.verdict != "ok"}


def test_nothing_is_wrong_here(models, capsys) -> None:
    """The whole command on this machine: GPU checks do not apply, everything else is ok, and JSON says the same."""
    assert cli.main(["doctor", models("qwen3_moe")]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "nothing fails" and [line.split()[1] for line in lines] == [c.__name__ for c in checks.CHECKS]
    assert all(line.startswith("ok ") for line in lines), lines
    assert sum("does not apply: this vLLM is built for CPU" in line for line in lines) == len(checks.ON_GPUS)
    assert cli.main(["doctor", models("qwen3_moe"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] and [each["name"] for each in printed["checks"]] == [c.__name__ for c in checks.CHECKS]
    (limits,) = [each["figures"] for each in printed["checks"] if each["name"] == "descriptors"]
    assert limits["needed"] == NEEDED + 20 + 12  # four layers of two tensors, a block a rank; two slots of two; two ranks


def test_two_gpus_are_well() -> None:
    assert said(checks.examine(on_gpus(model=plan.parse("qwen3", QWEN3)))) == {}


@pytest.mark.parametrize(
    ("changed", "name", "verdict", "found", "do"),
    [
        (dict(versions={"vllm": "0.99.0", "torch": "2.13.0", "vllm-dwdp": "0.1.0"}), "vllm", "fail", "0.99.0", "install one"),
        (dict(torch_cuda=""), "torch", "fail", "no CUDA", "install vLLM's own torch"),
        (dict(plugins=()), "plugin", "fail", "not among", "pip"),
        (dict(gpus=(), links=(), size=2), "gpus", "fail", "none is seen", "nvidia-smi"),
        (dict(size=3), "visible", "fail", "2 GPUs for 3 ranks", "fewer ranks"),
        (dict(links=(dataclasses.replace(LINKS[0], has_access=False, fault="x"), LINKS[1])), "peers", "fail",
         "GPU 0 from GPU 1", "nvidia-smi topo -p2p r"),
        (dict(links=(dataclasses.replace(LINKS[0], gb_per_s=20.0), LINKS[1])), "links", "warn", "20 to 350 GB/s",
         "linked alike"),
        (dict(links=tuple(dataclasses.replace(each, kind="PCIe") for each in LINKS)), "links", "warn", "PCIe, 350",
         "vllm-dwdp plan"),
        (dict(links=tuple(dataclasses.replace(each, fault="no memory") for each in LINKS)), "links", "warn",
         "not measured: no memory", "end what else"),
        (dict(gpus=(dataclasses.replace(H100, fault="cuda:0 has no CUDA virtual memory management"), H100)),
         "virtual_memory", "fail", "cuda:0 has no CUDA virtual", "driver"),
        (dict(gpus=(dataclasses.replace(H100, handles=frozenset()), H100)), "handles", "fail", "neither", "update it"),
        (dict(gpus=(dataclasses.replace(H100, free_bytes=20 * GIB), H100), model=plan.parse("qwen3", QWEN3)), "memory",
         "fail", "a rank takes 3", "more ranks"),
        (dict(shm=None), "shared_memory", "fail", "/dev/shm", "tmpfs"),
        (dict(shm=(64 << 20, 0)), "shared_memory", "fail", "0 MiB of 64 MiB", "--shm-size"),
        (dict(shm=(64 << 20, 64 << 20)), "shared_memory", "warn", "64 MiB of 64 MiB", "--shm-size"),
        (dict(model_gap="m: plan does not know sparse attention"), "moe", "warn", "sparse attention", "may serve"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_is_named(changed, name, verdict, found, do) -> None:
    (own,) = [each for each in checks.examine(on_gpus(**changed)) if each.name == name]
    assert own.verdict == verdict and found in own.found and do in own.do, own


def test_handles_say_what_they_are_good_for() -> None:
    """FABRIC handles that are refused are no fault within a host; what they need is said all the same."""
    assert "no IMEX channel" in checks.handles(on_gpus(has_imex=False)).found
    assert "nvidia-imex" in checks.handles(on_gpus(has_imex=True)).do
    both = dataclasses.replace(H100, handles=frozenset({"fd", "fabric"}))
    assert "FABRIC handles, for ranks on several hosts" in checks.handles(on_gpus(gpus=(both, both))).found
    alone = dataclasses.replace(H100, handles=frozenset({"fabric"}))
    assert checks.handles(on_gpus(gpus=(alone, both))).verdict == "warn"


@pytest.mark.parametrize(
    ("environment", "name", "verdict", "found"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0"}, "visible", "fail", "CUDA_VISIBLE_DEVICES=0 shows 1 of the GPUs of 2 ranks"),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, "visible", "ok", "CUDA_VISIBLE_DEVICES=1,0"),
        ({"VLLM_PLUGINS": "other"}, "plugin", "fail", "VLLM_PLUGINS=other"),
        ({"VLLM_PLUGINS": "other,dwdp"}, "plugin", "ok", "vllm-dwdp"),
        ({"DWDP_ALLOW_UNTESTED_VLLM": "1"}, "vllm", "warn", "0.99.0 is untested"),
    ],
    ids=str,
)
def test_variables(monkeypatch, environment, name, verdict, found) -> None:
    """Set for real, and read anew."""
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(facts, "lost_hooks", lambda: ())
    given = facts.gather(None, 2)
    assert given.environment == environment
    untested = here().versions | ({"vllm": "0.99.0"} if name == "vllm" else {})
    (own,) = [v for v in checks.examine(on_gpus(environment=given.environment, versions=untested)) if v.name == name]
    assert own.verdict == verdict and found in own.found


def test_a_hook_that_is_gone_or_takes_something_else(monkeypatch, capsys) -> None:
    """Each is named by its path in vLLM, in one line, and the command's status is 1."""
    from vllm.v1.engine.core import EngineCore

    monkeypatch.delattr(EngineCore, "sleep")
    monkeypatch.setattr(EngineCore, "release_kv_cache_memory", lambda: None)
    assert cli.main(["doctor"]) == 1
    (line,) = [each for each in capsys.readouterr().out.splitlines() if each.startswith("fail")]
    assert "vLLM has no vllm.v1.engine.core.EngineCore.sleep" in line
    assert "EngineCore.release_kv_cache_memory no longer takes self" in line


def test_looking_at_hooks_leaves_vllm_as_it_was() -> None:
    before = [hook._is_installed() for hook in hooks.HOOKS]
    assert list(facts.lost_hooks()) == [] and [hook._is_installed() for hook in hooks.HOOKS] == before


def test_a_kernel_without_seals_or_locks(monkeypatch) -> None:
    """A seal that this kernel refuses, one that seals nothing against writing, and a place that two can have."""
    assert facts.convoy_fault() == ""
    with monkeypatch.context() as patch:
        patch.setattr(meeting, "_SEAL", 0x4000)
        assert "refused: Invalid argument" in facts.convoy_fault()
    with monkeypatch.context() as patch:
        patch.setattr(meeting, "_SEAL", 0x0002)  # F_SEAL_SHRINK
        assert "can still be written" in facts.convoy_fault()
    with monkeypatch.context() as patch:
        patch.setattr(meeting.Meeting, "_lock", lambda self, byte: True)
        assert "keeps nobody out" in (fault := facts.convoy_fault())
    assert checks.convoy(dataclasses.replace(here(), convoy_fault=fault)).verdict == "fail"


def test_shared_memory_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert facts.shared_memory(str(tmp_path / "file")) is facts.shared_memory(str(tmp_path / "absent")) is None
    assert facts.shared_memory(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "verdict", "found"),
    [
        (None, "fail", "cannot read"),
        ([], "fail", "no JSON object"),
        (QWEN3 | {"text_config": 3}, "fail", "text_config is 3"),
        (QWEN3 | {"quantization_config": "fp8"}, "warn", "quantization_config is 'fp8'"),
        ({"model_type": "llama", "hidden_size": 64}, "fail", "has no MoE layers"),
        (QWEN3 | {"index_topk": 4}, "warn", "sparse attention"),
        (HYBRIDS["hybrid_override_pattern"], "warn", "hybrid_override_pattern"),
        ({"model_type": "ernie4_5_moe", "moe_num_experts": 64}, "warn", "config.json lacks"),
        ({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}}, "warn", "config.json lacks"),
        (QWEN3 | {"mlp_only_layers": list(range(48))}, "fail", "no layer of it has experts"),
        (QWEN3 | {"num_experts": 1, "num_experts_per_tok": 1}, "fail", "2 ranks cannot share 1 experts"),
        ({"text_config": QWEN3}, "ok", "64 of 128 experts in 48 layers"),
    ],
    ids=["no config", "list", "no text", "no quantization", "dense", "unknown to plan", "hybrid", "ernie", "dbrx",
         "no experts", "too few experts", "nested"],
)
def test_models(tmp_path: Path, config, verdict, found) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    described, fault, gap = facts.describe(str(tmp_path))
    own = checks.moe(dataclasses.replace(here(), model=described, model_fault=fault, model_gap=gap))
    assert own.verdict == verdict and found in own.found, own


def test_a_machine_that_is_too_small_says_so(models) -> None:
    """On CPU all ranks share the RAM; descriptors are those of every block, which a big model has many of."""
    given = dataclasses.replace(here(), model=plan.parse("qwen3", QWEN3), ram=(128 * GIB, 60 * GIB), descriptors=(256, 256))
    assert said(checks.examine(given)) == {"memory": "fail", "descriptors": "fail"}
    assert said(checks.examine(dataclasses.replace(given, ram=(128 * GIB, 80 * GIB), descriptors=(1024, 1024)))) == {}
    assert "2 ranks take 6" in checks.memory(given).found


@pytest.mark.parametrize(
    ("limits", "verdict", "found"),
    [
        ((64, 64), "fail", "64 open files are allowed, a rank"), ((64, 4096), "ok", "64 open files are allowed, raised at start"),
        ((64, -1), "ok", "raised at start"), ((4096, 4096), "ok", "allowed, a rank"),
        ((-1, -1), "ok", "any number of open files are allowed, a rank"),
    ],
    ids=str,
)
def test_descriptors_are_judged_as_a_start_has_them(monkeypatch, limits, verdict, found) -> None:
    """A rank raises its limit itself, up to the hard one."""
    own = checks.descriptors(dataclasses.replace(here(), descriptors=limits))
    assert own.verdict == verdict and found in own.found, own
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, changed: raised.append(changed))
    with pytest.raises(DWDPError) if verdict == "fail" else contextlib.nullcontext():
        descriptors.provide(NEEDED, rank=0)
    assert bool(raised) == ("raised at start" in own.found)


@pytest.mark.engine
def test_few_descriptors(models, tmp_path: Path) -> None:
    """The command in a process with a lower limit: one line fails, says the limit to set, and nothing else fails."""
    code = (
        "import resource, sys; from vllm_dwdp.entrypoints import cli;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128)); sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = ["doctor", models("qwen3_moe"), "--size", "2"]
    status, said = forks.run(forks.script, code, *arguments, log=tmp_path / "log", timeout_s=120)
    failed = [line for line in said.splitlines() if line.startswith("fail")]
    assert status == 1, said[-2000:]
    assert len(failed) == 1 and "128 open files are allowed" in failed[0] and "ulimit -n" in failed[0]
    assert said.splitlines()[-1] == f"1 of {len(checks.CHECKS)} checks fail"


@pytest.mark.parametrize("given", [["--size", "1"], ["--size", "two"]], ids=" ".join)
def test_a_wrong_size_is_refused_in_one_line(capsys, given) -> None:
    assert cli.main(["doctor", *given]) == 2
    printed = capsys.readouterr().err
    assert "--size is" in printed and "from 2" in printed and printed.count("\n") == 1


@pytest.mark.gpu
def test_gpus_are_looked_at() -> None:
    """Every GPU has virtual memory and gives a handle; between any two a copy is measured both ways."""
    from vllm_dwdp.entrypoints.doctor import gpus

    found, links = gpus.look()
    assert found and all(not gpu.fault and gpu.handles and gpu.free_bytes for gpu in found)
    assert {(link.reader, link.owner) for link in links} == {(i, j) for i in range(len(found)) for j in range(len(found)) if i != j}
    assert all(link.fault or link.gb_per_s > 1 for link in links)


def command(folder: Path, environment: dict[str, str], files: int | None = None, config: dict = QWEN3) -> set[str]:
    """The checks that `vllm-dwdp doctor`, a command of its own, says fail."""
    (folder / "config.json").write_text(json.dumps(config))
    before = f"ulimit -n {files} && " if files else ""
    ran = subprocess.run(
        ["bash", "-c", f'{before}exec "$@"', "doctor", sys.executable, "-m", "vllm_dwdp.entrypoints.cli", "doctor", str(folder), "--json"],
        env=os.environ | environment, capture_output=True, text=True, timeout=120,
    )
    printed = json.loads(ran.stdout)
    failed = {each["name"] for each in printed["checks"] if each["verdict"] == "fail"}
    assert ran.returncode == bool(failed) and printed["ok"] == (not failed), ran.stderr[-2000:]
    return failed


@pytest.mark.gpu
def test_two_gpus_and_faults_made_there(tmp_path: Path, figures: dict) -> None:
    """What NVLink copies, and each fault that can be made on a host that is well."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    from vllm_dwdp.entrypoints.doctor import gpus as looks

    gpus = looks.look()
    figures |= {f"{link.reader}_from_{link.owner}_gb_per_s": link.gb_per_s for link in gpus[1]}
    assert said(checks.examine(facts.gather(None, 2, *gpus))).keys() <= {"shared_memory"}, "a container's may be small"
    assert all(link.kind != "NVLink" or link.gb_per_s > 100 for link in gpus[1])
    assert command(tmp_path, {}) == set()
    assert command(tmp_path, {"CUDA_VISIBLE_DEVICES": "0"}) == {"visible"}
    assert command(tmp_path, {"VLLM_PLUGINS": "other"}) == {"plugin"}
    assert command(tmp_path, {}, files=128) == {"descriptors"}
    assert command(tmp_path, {}, config={"model_type": "llama", "hidden_size": 64}) == {"moe"}
    free, _ = torch.cuda.mem_get_info(1)
    held = torch.empty(free - 20 * GIB, dtype=torch.uint8, device="cuda:1")  # noqa: F841
    assert command(tmp_path, {}) == {"memory"}
