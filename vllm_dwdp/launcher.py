"""Launcher: the process that a person starts; what it starts ends with it, and tells it why when it ends by itself.

A launcher that is killed leaves its children to nobody: they hold GPU memory and the port until they notice.
"""

import contextlib
import logging
import os
import secrets
import select
import signal
import threading
from multiprocessing import parent_process

from vllm_dwdp.channel import Channel, Listener, private
from vllm_dwdp.errors import DWDPError

logger = logging.getLogger("vllm.dwdp.launcher")
LAUNCHER = "DWDP_LAUNCHER"  # an environment variable, which children inherit: the launcher's process id and a secret
_FOLLOWS = "dwdp-parent"
_MOST = 1000  # characters of a reason
_QUIT_S = 5.0  # for a clean end, before the process is cut off


class Reasons:
    """What the launcher's children said they ended for, in order. Each is one line."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self._has_heard = threading.Event()
        secret = secrets.token_hex(32)
        self._listener = Listener(private(secret.encode(), b"launcher"), secret.encode(), self._hear)
        os.environ[LAUNCHER] = f"{os.getpid()}-{secret}"

    def first(self, timeout_s: float) -> str | None:
        """The first that was heard, or is within `timeout_s`."""
        return self.heard[0] if self._has_heard.wait(timeout_s) else None

    def _hear(self, channel: Channel) -> None:
        self.heard.append(channel.recv().decode())
        self._has_heard.set()
        channel.send(b"")


def launcher() -> int | None:
    """The process id of the launcher above this process, or this process itself; None where none is known."""
    with contextlib.suppress(ValueError):
        return int(os.environ.get(LAUNCHER, "").partition("-")[0])
    return None


def is_child() -> bool:
    """Whether this process's parent is the launcher."""
    parent = parent_process()
    return parent is not None and launcher() == parent.pid


def tell(error: BaseException) -> None:
    """Let the launcher know why this process ends, if there is one that listens."""
    _, _, secret = os.environ.get(LAUNCHER, "").partition("-")
    if secret and launcher() != os.getpid():
        with contextlib.suppress(OSError, DWDPError):
            channel = Channel.connect(private(secret.encode(), b"launcher"), secret.encode(), _QUIT_S)
            kind = "" if isinstance(error, DWDPError) else f"{type(error).__name__}: "
            channel.send(" ".join(f"{kind}{error}".split())[:_MOST].encode())
            channel.recv()
            channel.close()


def follow_parent() -> None:
    """End this process when the one that started it has ended: by SIGTERM, and the hard way after `_QUIT_S`.

    For processes that vLLM starts by multiprocessing; does nothing in any other. Repeats safely.
    """
    is_following = any(thread.name == _FOLLOWS for thread in threading.enumerate())
    if not is_following and (parent := parent_process()) is not None and parent.pid is not None:
        try:
            handle = os.pidfd_open(parent.pid)
        except ProcessLookupError:
            os._exit(1)
        except OSError as error:  # a kernel or sandbox without pidfd
            logger.warning("this process does not notice when its parent is killed: %s", error)
        else:
            threading.Thread(target=_follow, args=(parent.pid, handle), name=_FOLLOWS, daemon=True).start()


def _follow(pid: int, handle: int) -> None:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    while not poll.poll():
        pass
    with contextlib.suppress(Exception):
        logger.error("DWDP: process %d, which started this one, has ended: this one ends too", pid)
    threading.Timer(_QUIT_S, os._exit, (1,)).start()
    os.kill(os.getpid(), signal.SIGTERM)
