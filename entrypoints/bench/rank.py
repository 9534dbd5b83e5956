"""One rank of a benchmark: a process that builds an offline vLLM engine and does what its parent asks.

A request is a method of `Rank` with its keywords; the reply is what the method returns, or Failed. A rank whose parent
is gone, for whatever reason, ends everything in its session, engine included.
"""

import contextlib
import os
import queue
import random
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from vllm_dwdp import config
from vllm_dwdp.entrypoints.server import kill_session

PROBE = "vllm_dwdp.entrypoints.bench.rank.ExpertMemory"
MIN_TOKEN = 10  # leaves out the special tokens that models keep at either end of the vocabulary


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Seconds on the host's monotonic clock, which all ranks of a host share; `stats` accumulate.

    `first_s` is when the last request had its first token: from then to `end_s`, when it had its last one, the rank only
    decodes. `steps_s` are the times at which it had further tokens.
    """

    start_s: float
    first_s: float
    steps_s: list[float]
    end_s: float
    prompt_tokens: int
    output_tokens: int
    stats: dict[str, float]


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine's workers hold of experts, and the tokens that its KV cache has room for."""

    expert_bytes: float
    kv_cache_tokens: float


class Failed(msgspec.Struct, frozen=True):
    """A request raised."""

    reason: str


class ExpertMemory:
    """Extends vLLM's stock worker, so that the baselines' expert memory is read and not guessed."""

    model_runner: Any

    def expert_bytes(self) -> int:
        """Bytes of all expert weights that this worker holds."""
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

        layers = [module for module in self.model_runner.get_model().modules() if isinstance(module, RoutedExperts)]
        return sum(weight.nbytes for layer in layers for weight in layer.parameters())


class Rank:
    """An engine and its prompts."""

    def load(
        self, *, environment: dict[str, str], engine: dict[str, Any], ranks: list[int], num_prompts: int,
        input_len: int, ratio: float, uneven: float,
    ) -> Held:
        """Build `LLM(**engine)` and the prompts of `ranks`, `uneven` times as many for rank 0."""
        os.environ.update(environment)
        from vllm import LLM

        self.llm = LLM(**engine)
        self.streams = config.KEY in engine.get("additional_config", {})
        vocab_size = self.llm.model_config.get_vocab_size()
        self.shares = [uneven if rank == 0 else 1.0 for rank in ranks]
        self.prompts = [
            make_prompts(rank, round(share * num_prompts), input_len, ratio, vocab_size)
            for rank, share in zip(ranks, self.shares, strict=True)
        ]
        if self.streams:
            expert_bytes = sum(self.llm.collective_rpc("dwdp_stats")[0]["memory_bytes"].values())
        else:
            expert_bytes = sum(self.llm.collective_rpc("expert_bytes"))
        cache = self.llm.llm_engine.vllm_config.cache_config
        return Held(expert_bytes=expert_bytes, kv_cache_tokens=cache.num_gpu_blocks * cache.block_size)

    def run(self, *, num_prompts: int, output_len: int) -> Ran:
        """Give the engine the first `num_prompts` prompts of each of its ranks at once, rank 0's share of them more.

        It has ended at its last token: expert parallelism's ranks then go on with empty steps, which no request waits for.
        """
        from vllm import SamplingParams

        shared = zip(self.prompts, self.shares, strict=True)
        prompts = [ids for own, share in shared for ids in own[: round(share * num_prompts)]]
        sampling = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True, detokenize=False)
        engine = self.llm.llm_engine
        latest: dict[str, int] = {}  # tokens of each request that has any
        first_s: float | None = None
        steps_s: list[float] = []
        start_s = end_s = time.monotonic()
        for number, ids in enumerate(prompts):
            engine.add_request(str(number), {"prompt_token_ids": ids}, sampling)
        while engine.has_unfinished_requests():
            found = {output.request_id: len(output.outputs[0].token_ids) for output in engine.step()}
            if not found:
                continue
            latest |= found
            end_s = time.monotonic()
            if first_s is not None:
                steps_s.append(end_s)
            elif len(latest) == len(prompts):
                first_s = end_s
        return Ran(
            start_s=start_s, first_s=end_s if first_s is None else first_s, steps_s=steps_s, end_s=end_s, stats=self.stats(),
            prompt_tokens=sum(map(len, prompts)), output_tokens=sum(latest.values()),
        )

    def stats(self) -> dict[str, float]:
        """DWDP's counters, with its forwards by view; empty for another mode."""
        if not self.streams:
            return {}
        found = self.llm.collective_rpc("dwdp_stats")[0]
        counted = ("exposed_wait_ms", "copy_ms", "prefetch_bytes", "replays")
        met = found["dispatch"] or {}
        rounds = {name: met[name] for name in ("helper_rounds", "alone", "waited_s") if name in met}
        return {name: found[name] for name in counted} | found["forwards"] | rounds

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        os._exit(0)  # the engine is down; what is left of vLLM and torch takes seconds to unload


def prompt_lengths(rank: int, num_prompts: int, input_len: int, ratio: float) -> list[int]:
    """Uniform in [ratio * input_len, input_len]; ranks get the same lengths in an order of their own, so equal work."""
    least = ratio * input_len
    lengths = [max(round(least + (input_len - least) * (i + 0.5) / num_prompts), 1) for i in range(num_prompts)]
    random.Random(rank).shuffle(lengths)
    return lengths


def make_prompts(rank: int, num_prompts: int, input_len: int, ratio: float, vocab_size: int) -> list[list[int]]:
    """Random token ids in [10, vocab_size - 10), the same at every call."""
    rng = random.Random(rank)
    ids = range(MIN_TOKEN, vocab_size - MIN_TOKEN)
    return [rng.choices(ids, k=length) for length in prompt_lengths(rank, num_prompts, input_len, ratio)]


def one_line(error: Exception) -> str:
    """The exception's type and message; without a message, the function that raised it."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    return f"{kind}: {text}" if text else f"{kind} in {traceback.extract_tb(error.__traceback__)[-1].name}"


def listen(connection: Connection, requests: queue.SimpleQueue) -> None:
    """Queue what the parent asks; when it is gone, end this session."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            requests.put(connection.recv())
    kill_session(os.getsid(0))
    os._exit(1)


def main(descriptor: int) -> None:
    """Serve the socket of this descriptor."""
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    requests: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=listen, args=(connection, requests), daemon=True).start()
    rank = Rank()
    while True:
        method, keywords = requests.get()
        try:
            connection.send(getattr(rank, method)(**keywords))
        except Exception as error:  # the parent reports it and ends this rank
            traceback.print_exc()
            connection.send(Failed(one_line(error)))
