"""Watchdog: from 0.33 vLLM dumps the stacks of a process that seems stuck. One that waits for work is not."""

import contextlib
import functools
import importlib
import importlib.util

_NAME = "vllm.utils.watch_dog"


def paused() -> contextlib.AbstractContextManager[None]:
    """For a wait, which may not be within another one."""
    return importlib.import_module(_NAME).get_watch_dog().disable() if is_there() else contextlib.nullcontext()


@functools.cache  # a search of the file system, where a worker waits between any two calls
def is_there() -> bool:
    return importlib.util.find_spec(_NAME) is not None
