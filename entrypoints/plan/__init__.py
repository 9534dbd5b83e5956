"""`vllm-dwdp plan`: what DWDP would take and give, from a model's config alone: no GPU, no weights, no vLLM."""
