"""One rank of a benchmark: a process that builds an offline vLLM engine and obeys its parent.

One socket carries JSON messages both ways: a command, then its reply. A rank whose parent is gone, for whatever
reason, kills its own process group, engine included.
"""

import os
import queue
import random
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import msgspec

PROBE = "vllm_dwdp.entrypoints.bench_rank.ExpertMemory"
MIN_TOKEN = 10  # leaves out the special tokens that models keep at either end of the vocabulary


class PromptSet(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's prompts: `num_prompts` for each of `ranks`, lengths uniform in [ratio * input_len, input_len]."""

    ranks: tuple[int, ...]
    num_prompts: int
    input_len: int
    ratio: float

    def lengths(self, rank: int) -> list[int]:
        """Tokens in each prompt of `rank`. Ranks get the same lengths in an order of their own, so equal work."""
        least = self.ratio * self.input_len
        step = (self.input_len - least) / self.num_prompts
        lengths = [max(round(least + step * (i + 0.5)), 1) for i in range(self.num_prompts)]
        random.Random(rank).shuffle(lengths)
        return lengths

    def token_ids(self, vocab_size: int) -> list[list[int]]:
        """Random ids in [10, vocab_size - 10), the same at every call; raises ValueError for a tiny vocabulary."""
        ids = range(MIN_TOKEN, vocab_size - MIN_TOKEN)
        if not ids:
            raise ValueError(f"a vocabulary of {vocab_size} tokens is too small: more than {2 * MIN_TOKEN} are needed")
        prompts = []
        for rank in self.ranks:
            rng = random.Random(rank)
            prompts += [rng.choices(ids, k=length) for length in self.lengths(rank)]
        return prompts


class Load(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Build `LLM(**engine)` in `environment`; answered by Loaded."""

    environment: dict[str, str]
    engine: dict[str, Any]
    prompts: PromptSet


class Run(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Generate `output_len` tokens for `num_prompts` prompts of each rank, all at once; answered by Ran."""

    num_prompts: int
    output_len: int


class ReadStats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answered by Stats. Only a DWDP engine has them."""


class Quit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Shut the engine down and end; not answered."""


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`expert_bytes` is summed over the engine's workers; None where DWDP's own statistics say it."""

    kv_cache_tokens: int
    expert_bytes: int | None


class Ran(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One run; times are seconds on the host's monotonic clock, which all ranks of a host share."""

    start_s: float
    end_s: float
    prompt_tokens: int
    output_tokens: int


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What the worker's `dwdp_stats` answered."""

    values: dict[str, Any]


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A command raised; the rank ends."""

    reason: str


Command = Load | Run | ReadStats | Quit
Reply = Loaded | Ran | Stats | Failed


class ExpertMemory:
    """Extends vLLM's stock worker, so that the baselines' expert memory is read and not guessed."""

    def expert_bytes(self) -> int:
        """Bytes of all expert weights that this worker holds."""
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

        layers = [module for module in self.model_runner.get_model().modules() if isinstance(module, RoutedExperts)]
        return sum(weight.nbytes for layer in layers for weight in layer.parameters())


class Rank:
    """An engine, its prompts, and what each command does to them."""

    def load(self, command: Load) -> Loaded:
        os.environ.update(command.environment)
        from vllm import LLM

        self.llm = LLM(**command.engine)
        token_ids = command.prompts.token_ids(self.llm.model_config.get_vocab_size())
        self.prompts = [{"prompt_token_ids": ids} for ids in token_ids]
        self.num_ranks = len(command.prompts.ranks)
        probed = command.engine.get("worker_extension_cls") == PROBE
        cache = self.llm.llm_engine.vllm_config.cache_config
        return Loaded(
            kv_cache_tokens=cache.num_gpu_blocks * cache.block_size,
            expert_bytes=sum(self.llm.collective_rpc("expert_bytes")) if probed else None,
        )

    def run(self, command: Run) -> Ran:
        from vllm import SamplingParams

        prompts = self.prompts[: command.num_prompts * self.num_ranks]
        sampling = SamplingParams(
            max_tokens=command.output_len, temperature=0.0, ignore_eos=True, detokenize=False
        )
        start_s = time.monotonic()
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        end_s = time.monotonic()
        return Ran(
            start_s=start_s,
            end_s=end_s,
            prompt_tokens=sum(len(prompt["prompt_token_ids"]) for prompt in prompts),
            output_tokens=sum(len(output.outputs[0].token_ids) for output in outputs),
        )

    def stats(self) -> Stats:
        return Stats(values=self.llm.collective_rpc("dwdp_stats")[0])

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def obey(commands: queue.SimpleQueue[bytes], connection: Connection) -> None:
    """Carry out commands until Quit; what a command raises goes to the parent first."""
    rank = Rank()
    try:
        import vllm.entrypoints.llm  # noqa: F401 - the slow import runs while the parent loads another mode

        while True:
            match command := msgspec.json.decode(commands.get(), type=Command):
                case Load():
                    reply = rank.load(command)
                case Run():
                    reply = rank.run(command)
                case ReadStats():
                    reply = rank.stats()
                case Quit():
                    return rank.close()
            connection.send_bytes(msgspec.json.encode(reply))
    except Exception as error:
        traceback.print_exc()
        connection.send_bytes(msgspec.json.encode(Failed(reason=one_line(error))))
        raise SystemExit(1) from None


def one_line(error: Exception) -> str:
    """The exception's type and message; without a message, the function that raised it."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    return f"{kind}: {text}" if text else f"{kind} in {traceback.extract_tb(error.__traceback__)[-1].name}"


def listen(connection: Connection, commands: queue.SimpleQueue[bytes]) -> None:
    """Queue what the parent says; when it is gone, end this process and everything that it started."""
    while True:
        try:
            commands.put(connection.recv_bytes())
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Serve the socket whose descriptor is the only argument."""
    if os.getsid(0) != os.getpid():
        raise SystemExit("this module is started by `vllm-dwdp bench`, in a session of its own")
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    commands: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(connection, commands), daemon=True).start()
    obey(commands, connection)
    os._exit(0)  # the engine is down; what is left of vLLM and torch takes seconds to unload


if __name__ == "__main__":
    main()
