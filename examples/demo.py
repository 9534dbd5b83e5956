"""Serve a tiny MoE model on two ranks with DWDP, on CPU, and compare every answer with stock vLLM on one rank.

    python examples/demo.py        (or: make demo)

Exit status: 0 when all answers are equal, 1 when one differs or the server fails, 130 after Ctrl-C.
"""
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vllm_dwdp.entrypoints.server import VLLM, Server, Session, SessionFailure

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "demo"
MODEL = FOLDER / "qwen3_moe"
ANSWERS = FOLDER / "reference.json"
PARALLEL = ("--data-parallel-size", "2", "--parallel", "dwdp")
RANKS = ("0", "1")
START_TIMEOUT_S = 300
ENGINE = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 256,
          "kv_cache_memory_bytes": 64 * 2**20, "enforce_eager": True}
ENV = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_HOST_IP": "127.0.0.1",
                    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
MAX_TOKENS = 32
MADE = "The model is made"  # what the process says that makes it and then has stock vLLM answer
CLEAR = "\r\033[K" if sys.stdout.isatty() else ""
# (kind, prompt, rank to pin it to or None for the load balancer)
REQUESTS = (
    ("text", "Once upon a time", "0"),
    ("text", "Once upon a time", "1"),
    ("chat", "Which expert answers this?", "1"),
    ("chat", "Which expert answers this?", "0"),
    ("text", "Experts travel, tokens stay at home.", None),
    ("chat", "Tell me about weight streaming.", None),
)


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    options = list(PARALLEL)
    for option, value in ENGINE.items():
        options += [f"--{option.replace('_', '-')}"] + ([] if value is True else [str(value)])
    # Without plugins this is vLLM as it comes: one rank, every expert in its own memory.
    stock, title = "Answers of stock vLLM on one rank", "Two ranks load meanwhile"
    without_plugins = ENV | {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with ended(start(stock, [sys.executable, __file__, "--reference"], without_plugins)) as reference, contextlib.ExitStack() as stack:
        wait_for(MADE, reference, lambda: MADE in reference.log.read_text())
        server = Server(MODEL, options, FOLDER / "server.log", environment=ENV, folder=FOLDER)
        print(f"$ vllm {shlex.join(server.command[len(VLLM):])}")
        stack.enter_context(ended(server))
        wait_for(stock, reference, lambda: reference.process.poll() == 0)
        expected = {(kind, prompt): text for kind, prompt, text in json.loads(ANSWERS.read_text())}
        say(title, server.wait_until_ready(START_TIMEOUT_S, progress(title, server.log)))
        print("\n".join(f"  {line}" for line in sorted(re.findall("DWDP on: .*", server.log.read_text()))))
        equal = one_by_one(server, expected) & all_at_once(server, expected)
        print_table(metrics(server))
    print("The server has ended and left no process behind.")
    print(f"{'All answers equal' if equal else 'SOME ANSWERS DIFFER from'} those of stock vLLM on one rank.")
    return 0 if equal else 1


def one_by_one(server: Server, expected: dict[tuple[str, str], str]) -> bool:
    """Sends REQUESTS in turn, prints which rank answered what, and tells whether all is as expected."""
    all_equal = True
    for kind, prompt, pinned in REQUESTS:
        before = served(server)
        text = ask(server, kind, prompt, pinned)
        rank = next(rank for rank, count in served(server, sum(before.values()) + 1).items() if count > before[rank])
        equal = text == expected[kind, prompt]
        all_equal &= equal
        if pinned not in (None, rank):
            raise SessionFailure(f"rank {rank} served a request pinned to rank {pinned}")
        print(f"\n  {kind} to {f'rank {pinned}' if pinned else 'any rank'}: {prompt}\n"
              f"  rank {rank} answers: {text}\n  {'equal' if equal else f'DIFFERENT: {expected[kind, prompt]}'}")
    return all_equal


def all_at_once(server: Server, expected: dict[tuple[str, str], str]) -> bool:
    """Sends REQUESTS together, unpinned, prints how the load balancer spread them, and tells whether all is equal."""
    before = served(server)
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        texts = list(pool.map(lambda request: ask(server, request[0], request[1]), REQUESTS))
    after = served(server, sum(before.values()) + len(REQUESTS))
    num_equal = sum(text == expected[kind, prompt] for text, (kind, prompt, _) in zip(texts, REQUESTS, strict=True))
    shares = " and ".join(f"{after[rank] - before[rank]} by rank {rank}" for rank in RANKS)
    print(f"\n  All {len(REQUESTS)} together, to any rank: {shares}; {num_equal} equal\n")
    return num_equal == len(REQUESTS)


def ask(server: Server, kind: str, prompt: str, rank: str | None = None) -> str:
    body = {"model": str(MODEL), "temperature": 0, "seed": 0, "max_tokens": MAX_TOKENS}
    body |= {"prompt": prompt} if kind == "text" else {"messages": [{"role": "user", "content": prompt}]}
    path = "completions" if kind == "text" else "chat/completions"
    with server.post(f"v1/{path}", body, rank) as response:
        choice = json.load(response)["choices"][0]
    return choice["text"] if kind == "text" else choice["message"]["content"]


def metrics(server: Server) -> dict[str, dict[str, float]]:
    """Sums of the server's metrics: {name, or name:value-of-the-label `kind` or `view`: {rank: sum}}."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(RANKS, 0.0))
    for name, labels, value in server.metrics():
        if labels.get("engine") in RANKS:
            part = labels.get("kind", labels.get("view"))
            sums[":".join(filter(None, (name.removeprefix("vllm:"), part)))][labels["engine"]] += value
    return sums


def served(server: Server, at_least: int = 0) -> dict[str, int]:
    """Finished requests by rank, once `at_least` are counted; the count may come a moment after the answer."""
    deadline = time.monotonic() + 10
    while True:
        counts = {rank: int(count) for rank, count in metrics(server)["request_success_total"].items()}
        if sum(counts.values()) >= at_least:
            return counts
        if time.monotonic() > deadline:
            raise SessionFailure(f"/metrics counts {counts} finished requests, expected {at_least}")
        time.sleep(0.05)


def print_table(values: dict[str, dict[str, float]]) -> None:
    rows = [
        ("requests served", "request_success_total", 1),
        ("tokens read", "prompt_tokens_total", 1),
        ("tokens written", "generation_tokens_total", 1),
        *((f"experts per layer: {kind}", f"dwdp_experts:{kind}", 1) for kind in ("owned", "resident", "streamed")),
        ("slots", "dwdp_slots", 1),
        *((f"MiB: {kind}", f"dwdp_memory_bytes:{kind}", 2**20)
          for kind in ("shard", "resident", "slots", "inbox", "replicated", "padding")),
        ("MiB prefetched from the peer", "dwdp_prefetch_bytes_total", 2**20),
        *((f"forward passes: {view}", f"dwdp_forwards_total:{view}", 1) for view in ("streamed", "direct", "dispatched")),
    ]
    print(f"  {'':32}{'rank 0':>10}{'rank 1':>10}")
    for title, name, unit in rows:
        cells = (f"{values[name][rank] / unit:.{0 if unit == 1 else 2}f}" if name in values else "-" for rank in RANKS)
        print(f"  {title:32}" + "".join(f"{cell:>10}" for cell in cells))
    print()


@contextlib.contextmanager
def ended(session: Session) -> Iterator[Session]:
    """Ends the session afterwards; a failure shows the end of its log."""
    try:
        with session:
            yield session
    except (SessionFailure, OSError, ValueError) as error:  # OSError: urllib's errors too
        tail = "\n".join(f"  | {line}" for line in session.log.read_text(errors="replace").splitlines()[-15:])
        raise SessionFailure(f"{error}\n{tail}") from None
    if left := session.members():
        raise SessionFailure(f"still running after SIGKILL: {left}")


def start(title: str, command: list, environment: dict[str, str]) -> Session:
    return Session(command, FOLDER / f"{title.split()[0].lower()}.log", environment=environment, folder=FOLDER)


def wait_for(title: str, session: Session, is_there: Callable[[], bool]) -> None:
    say(title, session.wait_until(is_there, title, START_TIMEOUT_S, progress(title, session.log)))


def progress(title: str, log: Path) -> Callable[[float], None]:
    """What shows seconds and the log's last message on one line of a terminal."""
    def show(seconds: float) -> None:
        line = f"{title} {seconds:3.0f} s  {last_message(log)}"
        print(f"{CLEAR}{line[:shutil.get_terminal_size().columns - 1]}", end="", flush=True)

    return show if CLEAR else lambda _: None


def say(title: str, seconds: float) -> None:
    print(f"{CLEAR}{title}: {seconds:.0f} s", flush=True)


def last_message(log: Path) -> str:
    """The text of the last line that vLLM logged, after the name of the process that logged it."""
    found = re.findall(r"^(?:\((\S+)[^)]*\) )?(?:INFO|WARNING|ERROR) \S+ \S+ \[\S+\] (.*\w.*)$",
                       log.read_text(errors="replace")[-20_000:], re.MULTILINE)
    return ": ".join(part for part in found[-1] if part) if found else ""


def write_reference() -> None:
    """Makes the model, then writes what one rank of vLLM answers to each request, asked one at a time, to ANSWERS."""
    from tiny_models import make_model

    make_model("qwen3_moe", MODEL)
    print(MADE, flush=True)
    from vllm import LLM, SamplingParams

    llm = LLM(str(MODEL), **ENGINE)
    sampling = SamplingParams(temperature=0, seed=0, max_tokens=MAX_TOKENS)
    result = []
    for kind, prompt in dict.fromkeys((kind, prompt) for kind, prompt, _ in REQUESTS):
        outputs = llm.generate(prompt, sampling) if kind == "text" else llm.chat(
            [{"role": "user", "content": prompt}], sampling)
        result.append((kind, prompt, outputs[0].outputs[0].text))
    llm.llm_engine.engine_core.shutdown()
    ANSWERS.write_text(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:] == ["--reference"]:
        write_reference()
        sys.exit()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped")
        sys.exit(130)
    except SessionFailure as failure:
        sys.exit(f"\n{failure}")
