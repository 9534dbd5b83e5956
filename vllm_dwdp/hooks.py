"""Hooks: how a vLLM attribute is wrapped, and how it is known that the wrap took."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from vllm_dwdp.errors import DWDPError

_MARK = "_dwdp_hook"


def wrap(module: str, path: str, parameters: tuple[str, ...], wrapper: Callable[[Callable], Callable]) -> None:
    """Replace `module`.`path` by `wrapper(original)`, once.

    `path` is a name or Class.name; `parameters` are those of the original that the wrapper relies on. Raises DWDPError
    naming the attribute when it is gone or takes other parameters.
    """
    owner, name = _locate(module, path)
    raw = inspect.getattr_static(owner, name)
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return
    accepted = inspect.signature(original).parameters
    variadic = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    if absent := [p for p in parameters if p not in accepted and not variadic]:
        raise DWDPError(f"vLLM's {module}.{path} no longer takes {', '.join(absent)}: this vLLM is not supported")
    is_static = isinstance(raw, staticmethod)
    hooked: Any = wrapper(original)
    setattr(hooked, _MARK, True)
    setattr(owner, name, staticmethod(hooked) if is_static else hooked)


def verify(module: str, path: str) -> None:
    """Raises DWDPError naming the hook when it is not in place: vLLM would quietly run without DWDP."""
    owner, name = _locate(module, path)
    if not hasattr(getattr(owner, name), _MARK):
        raise DWDPError(f"hook {path} did not take: another plugin has replaced it; DWDP stops rather than run without")


def _locate(module: str, path: str) -> tuple[Any, str]:
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    try:
        for part in classes:
            owner = getattr(owner, part)
        getattr(owner, name)
    except AttributeError:
        raise DWDPError(f"vLLM has no {module}.{path}: this vLLM is not supported") from None
    return owner, name
