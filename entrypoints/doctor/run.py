"""`vllm-dwdp doctor`: its settings, and its verdicts as lines or JSON."""

import contextlib
import sys
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from vllm_dwdp import config
from vllm_dwdp.entrypoints.bench.origin import on_cpu


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a person may ask for: every field but the model is an option of the command. `of` makes and checks one."""

    model: Annotated[str | None, Meta(description="a folder with config.json, or a name on the hub")] = None
    size: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        Meta(description="ranks in the group, all on this host", extra={"unset": "the GPUs here, at least 2"}),
    ] = None
    json: Annotated[bool, Meta(description="print JSON")] = False

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Settings":
        """From option values, numbers as text or not. Raises DWDPError for what cannot be."""
        return config.read(cls, given, config.flag, strict=False)


def run(settings: Settings) -> int:
    """Print a verdict a line; returns the command's exit status, 1 where anything fails."""
    with contextlib.redirect_stdout(sys.stderr):  # vLLM's log
        from vllm_dwdp.entrypoints.doctor import checks, facts  # what they look at is imported: seconds

        found: list[facts.Gpu] = []
        links: list[facts.Link] = []
        if not on_cpu():
            from vllm_dwdp.entrypoints.doctor import gpus

            found, links = gpus.look()
        verdicts = checks.examine(facts.gather(settings.model, settings.size, found, links))
    failed = sum(each.verdict == "fail" for each in verdicts)
    if settings.json:
        text = msgspec.json.encode({"ok": not failed, "checks": verdicts})
        print(msgspec.json.format(text, indent=2).decode())
    else:
        for each in verdicts:
            print(f"{each.verdict:5} {each.name:15} {each.found}{'; ' * bool(each.do)}{each.do}")
        print(f"{failed} of {len(verdicts)} checks fail" if failed else "nothing fails")
    return int(failed > 0)
