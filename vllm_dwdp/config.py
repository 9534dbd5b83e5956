"""Options: one struct behind `--dwdp-...`, `--additional-config '{"dwdp": {...}}'` and `LLM(additional_config=...)`."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from vllm_dwdp.errors import DWDPError

KEY = "dwdp"  # where vLLM's additional_config carries the options; its presence is the switch


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Everything a user may set. Sizes carry their unit in the name; None means "let DWDP decide"."""

    size: Annotated[
        Annotated[int, Meta(ge=2)] | None, Meta(description="ranks in the group; --data-parallel-size by default")
    ] = None
    rank: Annotated[
        Annotated[int, Meta(ge=0)] | None, Meta(description="this rank; vLLM's data-parallel rank by default")
    ] = None
    rendezvous: Annotated[
        Annotated[str, Meta(pattern=r"^[^:]+:\d+$")] | None,
        Meta(description="HOST:PORT that rank 0 opens for its peers; vLLM's own store by default"),
    ] = None
    slots: Annotated[int, Meta(ge=2, le=8, description="buffers into which layers are streamed")] = 2
    slice_mib: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="copy in slices of this size, interleaved over the sources; 0 copies whole ranges "
                         "(default: 0 at two ranks, 16 from three)"),
    ] = None
    direct_max_tokens: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="batches up to this many tokens read peers' memory in place (default: derived at start-up)"),
    ] = None
    experts_per_rank: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="experts that each rank owns; above E/N ranges overlap")
    ] = None
    cache_gib: Annotated[
        Annotated[float, Meta(ge=0)] | Literal["auto"],
        Meta(description="GiB of device memory for permanent copies of remote experts; auto: all but cache_floor_gib"),
    ] = 0.0
    cache_policy: Annotated[
        Literal["even", "hot"],
        Meta(description="even: fixed residents, the same number everywhere; hot: those that decoding reads most, "
                         "refilled while the rank serves"),
    ] = "even"
    cache_floor_gib: Annotated[
        float, Meta(ge=0, description="GiB that cache_gib=auto leaves to activations and the KV cache")
    ] = 10.0
    startup_timeout_s: Annotated[
        float, Meta(gt=0, description="seconds for which a rank waits for its peers while they load")
    ] = 1800.0
    timing: Annotated[bool, Meta(description="time copies and exposed waits (a few events a layer)")] = False

    @property
    def slice_bytes(self) -> int:
        """Bytes in a slice of a copy; 0 for whole ranges. Needs `size`."""
        default = 0 if (self.size or 2) < 3 else 16
        return (default if self.slice_mib is None else self.slice_mib) * 2**20

    def shared(self) -> dict[str, Any]:
        """The options that every rank of a group must have alike."""
        mine = {"rank", "rendezvous", "timing"}
        return {name: value for name, value in msgspec.structs.asdict(self).items() if name not in mine}


def is_on(additional_config: Any) -> bool:
    """Whether the switch is in vLLM's `additional_config`, which may be an object of another plugin."""
    return isinstance(additional_config, dict) and KEY in additional_config


def parse(additional_config: Any) -> Options | None:
    """The options in vLLM's `additional_config`, or None when the switch is off.

    Raises DWDPError naming the option that is unknown or out of range.
    """
    if not is_on(additional_config):
        return None
    given = additional_config[KEY]
    try:
        return msgspec.convert({} if given is None else given, Options)
    except msgspec.ValidationError as error:
        known = ", ".join(Options.__struct_fields__)
        raise DWDPError(f"additional_config['{KEY}'] (--dwdp-... options): {error}; known options: {known}") from None
