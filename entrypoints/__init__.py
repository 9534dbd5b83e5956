"""What people and vLLM call: the plugin's `register` and the `vllm-dwdp` command."""
