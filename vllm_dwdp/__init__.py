"""Distributed Weight Data Parallelism for vLLM.

Each data-parallel rank owns a shard of every MoE layer's experts and copies the others from its peers' memory just
ahead of use. Importing this package does nothing; vLLM calls `vllm_dwdp.entrypoints.plugin.register`.
"""

__version__ = "0.1.0"
