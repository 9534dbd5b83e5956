"""`vllm-dwdp doctor`: whether this machine, this vLLM and a model can run DWDP, and what to do where they cannot."""
