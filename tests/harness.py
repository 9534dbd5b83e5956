"""Ranks as processes: each builds a real vLLM engine, then runs functions that the test sends."""

import contextlib
import gc
import multiprocessing
import os
import random
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_dwdp.entrypoints.server import free_port

GPUS = len(list(Path("/dev").glob("nvidia[0-9]*")))
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch"] if os.environ.get("DWDP_NO_ENGINE") else [  # vLLM takes 8 s to import: once for all ranks
    "vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.model_executor.models.qwen3_moe", "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.worker.gpu_worker" if GPUS else "vllm.v1.worker.cpu_worker",  # the latter replaces torch's streams and pinned memory
])
ENGINE = dict(
    dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8, max_num_batched_tokens=256,
    kv_cache_memory_bytes=64 << 20, distributed_executor_backend="uni", seed=0, disable_log_stats=True,
    skip_tokenizer_init=True, gpu_memory_utilization=0.3 if GPUS else 0.9,  # other tests run beside
)
ARGUMENTS = [  # of `vllm serve`
    "--dtype", "float32", "--enforce-eager", "--max-model-len", "1536", "--max-num-seqs", "8",
    "--hf-overrides", '{"max_position_embeddings": 1536}',
    "--max-num-batched-tokens", "64", "--kv-cache-memory-bytes", str(64 << 20), "--no-enable-prefix-caching",
    "--distributed-executor-backend", "uni",  # an engine and its worker are one process, as of a rank that vLLM does not count
]
WORKERS = ["--distributed-executor-backend", "mp"]  # vLLM's default of several ranks, and on CPU of any
START_S = 400.0  # compiled on a GPU


def processes_in(folder: Path) -> list[str]:
    """Command lines of the processes that work in `folder`, which children inherit, whatever they call themselves."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if link.resolve(strict=True) == folder and int(link.parent.name) != os.getpid():
                found.append((link.parent / "cmdline").read_text())
        except OSError:
            continue
    return found


def await_that(condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


def make_prompts(lengths: Sequence[int], seed: int = 0, vocab: int = 250) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    return [{"prompt_token_ids": [rng.randrange(1, vocab) for _ in range(n)]} for n in lengths]


def generate(
    llm: Any, lengths: Sequence[int] = (5, 64, 17, 40), tokens: int = 24, one_by_one: bool = False, seed: int = 0
) -> list[list[int]]:
    """Greedy token ids for seeded prompts of these lengths."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    prompts = make_prompts(lengths, seed)
    batches = [[prompt] for prompt in prompts] if one_by_one else [prompts]
    outputs = [output for batch in batches for output in llm.generate(batch, sampling, use_tqdm=False)]
    return [list(output.outputs[0].token_ids) for output in outputs]


def differences(found: list[list[list[int]]], expected: list[list[int]]) -> list[tuple[int, int, list[int]]]:
    """(rank, prompt, places of the tokens that differ) for every answer that is not the expected one."""
    return [
        (rank, number, [place for place, pair in enumerate(zip(tokens, wanted, strict=True)) if pair[0] != pair[1]])
        for rank, answers in enumerate(found)
        for number, (tokens, wanted) in enumerate(zip(answers, expected, strict=True)) if tokens != wanted
    ]


def keep_step(rank: int) -> None:
    """Ranks wait for each other's steps, large ones too, however busy the machine is: who meets is not left to timing."""
    from vllm_dwdp.integration import dispatching

    dispatching.HOST_PATIENCE_S, dispatching.HOST_LARGE_S = 10.0, 0.0


def stats(llm: Any) -> dict[str, Any]:
    return llm.collective_rpc("dwdp_stats")[0]


def streamed_model(llm: Any) -> Any:
    """The StreamedModel of an engine that runs in this process."""
    return llm.llm_engine.model_executor.driver_worker.worker.dwdp


def leave(llm: Any) -> None:
    """Before the engine waits for the next work without helping: peers do not wait for it."""
    worker = llm.llm_engine.model_executor.driver_worker.worker
    if hasattr(worker, "dwdp_leave"):
        worker.dwdp_leave()


def keep_imports() -> None:
    """Let no collection go through what was imported before the fork: vLLM collects five times as it starts, twice as it ends.

    On GPUs it does: there it is what frees memory that DWDP has mapped.
    """
    if not GPUS:
        gc.freeze()
        gc.unfreeze = gc.freeze


def _serve(rank: int, model: str, dwdp: dict | None, engine: dict, setup: Callable | None, pipe: Any) -> None:
    keep_imports()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if GPUS:  # all of them, its own first
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str((rank + i) % GPUS) for i in range(GPUS))
    llm = None
    try:
        if setup is not None:
            setup(rank)
        from vllm import LLM

        extra = {} if dwdp is None else {"additional_config": {"dwdp": dwdp}}
        llm = LLM(model, **{**ENGINE, **engine, **extra})
        pipe.send((True, "ready"))
        while (work := pipe.recv()) is not None:
            function, args, kwargs = work
            try:
                answer = function(llm, *args, **kwargs)
                leave(llm)
                pipe.send((True, answer))
            except BaseException as error:  # the test decides
                pipe.send((False, f"{type(error).__name__}: {error}"))
    except BaseException as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            pipe.send((False, f"{type(error).__name__}: {error}"))
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()


def refuse_unmarked() -> None:
    """`make check` leaves out what is marked: an engine that starts in another test would not be left out."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    assert not os.environ.get("DWDP_NO_ENGINE"), f"{test} starts an engine: mark it @pytest.mark.engine"


class Rank:
    def __init__(self, rank: int, model: str, dwdp: dict | None, engine: dict, setup: Callable | None):
        refuse_unmarked()
        self.pipe, child = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(rank, model, dwdp, engine, setup, child))
        self.process.start()
        child.close()

    def answer(self, timeout_s: float = START_S) -> Any:
        """What the rank answered; raises RuntimeError with its error, TimeoutError, or EOFError when it is gone."""
        if not self.pipe.poll(timeout_s):
            raise TimeoutError(f"no answer within {timeout_s} s")
        ok, value = self.pipe.recv()
        if not ok:
            raise RuntimeError(value)
        return value

    def send(self, function: Callable, *args: Any, **kwargs: Any) -> None:
        self.pipe.send((function, args, kwargs))

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        self.send(function, *args, **kwargs)
        return self.answer()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(20)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Group:
    """N ranks of one group, or a stock engine for `size=0`. Use as a context manager."""

    def __init__(self, model: str, size: int, options: dict | None = None, *, engine: dict | None = None,
                 setup: Callable | None = None, wait: bool = True):
        at = f"127.0.0.1:{free_port()}"
        settings = [{"size": size, "rank": r, "rendezvous": at, **(options or {})} for r in range(size)] or [None]
        self.ranks = [Rank(r, model, dwdp, engine or {}, setup) for r, dwdp in enumerate(settings)]
        self._wait = wait

    def __enter__(self) -> "Group":
        if self._wait:
            try:
                for rank in self.ranks:
                    rank.answer()
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: Any) -> None:
        for rank in self.ranks:
            with contextlib.suppress(OSError):
                rank.pipe.send(None)
        for rank in self.ranks:
            rank.close()

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> list[Any]:
        """Run `function(llm, ...)` on every rank at the same time; the answers in rank order."""
        for rank in self.ranks:
            rank.send(function, *args, **kwargs)
        return [rank.answer() for rank in self.ranks]

    def outcomes(self, timeout_s: float) -> list[str]:
        """For ranks that should fail to start: each one's error, 'ready', or how it ended."""
        deadline = time.monotonic() + timeout_s
        found = []
        for rank in self.ranks:
            try:
                found.append(rank.answer(max(deadline - time.monotonic(), 0.0)))
            except RuntimeError as error:
                found.append(str(error))
            except EOFError:
                rank.process.join(5)
                found.append(f"ended with {rank.process.exitcode}")
        return found


_answers: dict[str, list[list[int]]] = {}


def reference(model: str, engine: dict | None = None, **kwargs: Any) -> list[list[int]]:
    """What vLLM without the switch, on one rank, answers to `generate(**kwargs)`; asked once a model and question."""
    key = repr((model, engine, sorted(kwargs.items())))
    if key not in _answers:
        with Group(model, 0, engine=engine) as group:
            _answers[key] = group.run(generate, **kwargs)[0]
    return _answers[key]
