"""Invariant: ranks that differ, fail or stay away stop every rank soon, in one line that says who and why."""

import errno
import itertools
import os
import re
import resource
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import harness
from harness import Group, Rank, free_port

pytestmark = pytest.mark.engine

NORM, EXPERT = "model.norm.weight", "model.layers.0.mlp.experts.11.down_proj.weight"  # the last is rank 1's alone
BROKEN = "the disk of rank 1 broke"


@contextmanager
def ranks(models: list[str], own: list[dict], setup: Callable | None = None, **shared: Any) -> Iterator[Group]:
    """Rank processes with models and options of their own. All must end by themselves once they have failed."""
    group = Group.__new__(Group)
    settings = {"size": 2, "rendezvous": f"127.0.0.1:{free_port()}", **shared}
    group.ranks = [Rank(o["rank"], m, settings | o, {}, setup) for m, o in zip(models, own, strict=True)]
    try:
        yield group
        for rank in group.ranks:
            rank.process.join(30)
        assert not [rank for rank in group.ranks if rank.process.is_alive()], "a rank that failed goes on running"
    finally:
        for rank in group.ranks:
            rank.process.kill()
            rank.process.join()


def another_version(rank: int) -> None:
    import vllm_dwdp

    vllm_dwdp.__version__ += f".{rank}"


def while_loading(rank: int, then: Callable[[], None]) -> None:
    """`then` happens on this rank when it reads its weights: the peers have met already."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    DefaultModelLoader.load_weights = lambda *_: then()


def break_rank_1(rank: int) -> None:
    def fail() -> None:
        raise OSError(BROKEN)

    if rank == 1:
        while_loading(rank, fail)


def fill_memory_of_rank_1(rank: int) -> None:
    """Shared memory runs out in the middle of the migration."""
    fallocate, blocks = os.posix_fallocate, itertools.count()

    def allocate(fd: int, offset: int, nbytes: int) -> None:
        if rank == 1 and next(blocks) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fallocate(fd, offset, nbytes)

    os.posix_fallocate = allocate


def kill_rank_0(rank: int) -> None:
    if rank == 0:
        while_loading(rank, lambda: os.kill(os.getpid(), signal.SIGKILL))


def kill_rank_1(rank: int) -> None:
    if rank == 1:
        while_loading(rank, lambda: os.kill(os.getpid(), signal.SIGKILL))


def smaller_steps(rank: int) -> None:
    harness.ENGINE["max_num_batched_tokens"] -= 64 * rank


def other_weights(model: str, folder: Path, name: str) -> str:
    """The same model with one tensor tuned further."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("differs", "named"),
    [
        ("option", "ranks disagree in hello: options is slots: 4 and 3 on rank 0 and rank 1"),
        ("model", "ranks disagree in hello: model is num_local_experts: 12 and 10"),
        ("version", "ranks disagree in hello: plugin is '0.1.0.0' and '0.1.0.1' on rank 0 and rank 1"),
        ("steps", "ranks disagree in manifest: dispatch is dispatch_max_tokens: 128 and 96 on rank 0 and rank 1"),
        (NORM, f"ranks disagree in checkpoint file model.safetensors: {NORM} is "),
        (EXPERT, f"ranks disagree in checkpoint file model.safetensors: {EXPERT} is "),
    ],
)
def test_disagreement(models, tmp_path: Path, differs: str, named: str) -> None:
    """Every rank refuses to serve with a peer that has other options, another model, version or other weights."""
    model, own = models("qwen3_moe"), [{"rank": 0}, {"rank": 1}]
    folders = [model, model]
    if differs == "option":
        own = [{"rank": 0, "slots": 4}, {"rank": 1, "slots": 3}]
    elif differs == "model":
        folders[1] = models("qwen3_moe", num_experts=10)
    elif differs in (NORM, EXPERT):
        folders[1] = other_weights(model, tmp_path / "other", differs)
    with ranks(folders, own, {"version": another_version, "steps": smaller_steps}.get(differs)) as group:
        for outcome in group.outcomes(120):
            assert named in outcome and "\n" not in outcome


@pytest.mark.parametrize(
    ("comes", "named"),
    [(0, ["waits for rank 1 to say 'hello'", "startup_timeout_s=5"]), (1, ["no rendezvous", "within 5 s", "rank 0"])],
)
def test_a_rank_that_never_comes(models, comes: int, named: list[str]) -> None:
    """A rank without its peer gives up after startup_timeout_s and names whom it missed."""
    with ranks([models("qwen3_moe")], [{"rank": comes}], startup_timeout_s=5) as group:
        (outcome,) = group.outcomes(60)
    assert not [part for part in named if part not in outcome], outcome


def test_a_rank_that_fails(models) -> None:
    """Rank 0 stops at once with the reason of rank 1, half an hour before it would give up."""
    with ranks([models("qwen3_moe")] * 2, [{"rank": 0}, {"rank": 1}], break_rank_1) as group:
        outcomes = group.outcomes(120)
    assert outcomes == [f"PeerStopped: rank 1 stopped: {BROKEN}", f"OSError: {BROKEN}"]


def test_memory_runs_out_while_migrating(models) -> None:
    """Both ranks stop at once and say how much was wanted, and of what."""
    with ranks([models("qwen3_moe")] * 2, [{"rank": 0}, {"rank": 1}], fill_memory_of_rank_1) as group:
        outcomes = group.outcomes(120)
    assert re.fullmatch(r"DWDPError: cannot allocate \d+ bytes of shared memory: No space left on device", outcomes[1])
    assert outcomes[0] == outcomes[1].replace("DWDPError: ", "PeerStopped: rank 1 stopped: ")


def few_files(rank: int) -> None:
    """And no tensor can be read."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    DefaultModelLoader.get_all_weights = lambda *_: pytest.fail("weights were read")
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))


def container(rank: int) -> None:
    """A name of its own, and fewer open files than 24 layers need, at first."""
    socket.gethostname = lambda: f"container-{rank}"
    resource.setrlimit(resource.RLIMIT_NOFILE, (160, 4096))


def test_too_few_descriptors(models) -> None:
    """What memory handles need is known, with its number, before weights are read."""
    model = models("qwen3_moe", num_hidden_layers=24)
    with ranks([model] * 2, [{"rank": 0}, {"rank": 1}], few_files) as group:
        outcomes = group.outcomes(120)
    for outcome in outcomes:
        assert re.search(r"rank \d needs \d{3} open files .*, and may have 128: .* ulimit -n \d{3},", outcome), outcomes
        assert "Errno" not in outcome and "\n" not in outcome


def test_a_limit_that_may_be_raised_and_names_of_one_host(models) -> None:
    """Is raised; and containers with names of their own, over one shared memory, are one host."""
    with ranks([models("qwen3_moe", num_hidden_layers=24)] * 2, [{"rank": 0}, {"rank": 1}], container) as group:
        assert group.outcomes(120) == ["ready"] * 2
        for rank in group.ranks:
            rank.close()


def test_rank_1_is_killed(models) -> None:
    """A peer that is gone without a word is missed at once, half an hour before rank 0 would give up."""
    with ranks([models("qwen3_moe")] * 2, [{"rank": 0}, {"rank": 1}], kill_rank_1) as group:
        group.ranks[1].process.join(120)
        outcomes = group.outcomes(20)
    assert outcomes == ["PeerStopped: rank 1 ended without a word: see its log", f"ended with {-signal.SIGKILL}"]


def test_rank_0_is_killed(models) -> None:
    """The rank that hosts the rendezvous is missed at once."""
    with ranks([models("qwen3_moe")] * 2, [{"rank": 0}, {"rank": 1}], kill_rank_0) as group:
        outcomes = group.outcomes(120)
    assert outcomes[0] == f"ended with {-signal.SIGKILL}"
    assert "rank 1 lost the rendezvous: rank 0, which hosts it, has ended" in outcomes[1]
