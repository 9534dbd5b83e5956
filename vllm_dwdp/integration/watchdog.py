"""Watchdog: from 0.33 vLLM dumps the stacks of a process that seems stuck. One that waits for work is not."""

import contextlib
import importlib
import importlib.util

_NAME = "vllm.utils.watch_dog"


def paused() -> contextlib.AbstractContextManager[None]:
    """For a wait, which may not be within another one."""
    if importlib.util.find_spec(_NAME) is None:
        return contextlib.nullcontext()
    return importlib.import_module(_NAME).get_watch_dog().disable()
