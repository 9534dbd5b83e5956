"""All that knows vLLM: an upgrade of vLLM can break these modules and no others."""
