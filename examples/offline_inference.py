"""Offline inference with a DWDP group: one process and one `LLM` per rank, the prompts dealt out between them.

    python examples/offline_inference.py MODEL --size 2 --engine-args '{"max_model_len": 4096}'

A rank is an ordinary single-GPU `LLM` whose `additional_config` names the group: its size, this rank, and a port that
rank 0 opens. Ranks find each other once, while loading; afterwards steps wait, briefly, for ranks at hand.
"""

import argparse
import json
import multiprocessing
import os
import queue
import secrets

PROMPTS = ["The capital of France is", "A mixture of experts is", "Once upon a time", "Seven times six is"]


def run_rank(rank: int, args: argparse.Namespace, answers: multiprocessing.Queue) -> None:
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(args.size)))).split(",")
    own_first = gpus[rank:] + gpus[:rank]  # copies from a GPU that is not visible would take the SMs
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own_first)
    from vllm import LLM, SamplingParams  # after the device is chosen

    group = {"size": args.size, "rank": rank, "rendezvous": f"127.0.0.1:{args.port}"}
    llm = LLM(args.model, additional_config={"dwdp": group}, **args.engine_args)
    outputs = llm.generate(PROMPTS[rank :: args.size], SamplingParams(temperature=0, max_tokens=args.max_tokens))
    answers.put((rank, [(output.prompt, output.outputs[0].text) for output in outputs]))
    llm.llm_engine.engine_core.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--size", type=int, default=2, help="ranks, one GPU each")
    parser.add_argument("--port", type=int, default=29600, help="a free port of this host")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--engine-args", type=json.loads, default={}, help="JSON of further LLM arguments")
    args = parser.parse_args()

    os.environ.setdefault("DWDP_GROUP_TOKEN", secrets.token_hex(32))  # by it the ranks know each other
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=run_rank, args=(rank, args, answers)) for rank in range(args.size)]
    for process in ranks:
        process.start()
    left = args.size
    while left:
        try:
            rank, texts = answers.get(timeout=1)
        except queue.Empty:
            if failed := [str(i) for i, process in enumerate(ranks) if process.exitcode]:
                for process in ranks:
                    process.kill()
                raise SystemExit(f"rank {', '.join(failed)} failed, see above") from None
            continue
        left -= 1
        for prompt, text in texts:
            print(f"rank {rank}: {prompt!r} -> {text!r}", flush=True)
    for process in ranks:
        process.join()


if __name__ == "__main__":
    main()
