"""A KV connector that keeps its engine going for a while after a request, as one does whose decoder has yet to pull the KV."""

import time
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector

HOLD_S = 30.0


class HoldingConnector(ExampleConnector):
    _until_s = 0.0

    def request_finished(self, *args: Any, **kwargs: Any) -> Any:
        self._until_s = time.monotonic() + HOLD_S
        return super().request_finished(*args, **kwargs)

    def has_pending_push_work(self) -> bool:
        return time.monotonic() < self._until_s
