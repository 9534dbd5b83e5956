"""`vllm-dwdp bench`: DWDP beside stock vLLM on the same GPUs, model and prompts."""
