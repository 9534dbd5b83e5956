"""Options: one struct behind `--dwdp-...`, `--additional-config '{"dwdp": {...}}'` and `LLM(additional_config=...)`.

Whatever way an option came, an error speaks of it as the person wrote it.
"""

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, inspect

from vllm_dwdp.errors import DWDPError

KEY = "dwdp"  # where vLLM's additional_config carries the options; its presence is the switch
S = TypeVar("S", bound=msgspec.Struct)


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Everything a user may set. Sizes carry their unit in the name; None lets DWDP decide, and `unset` says what."""

    size: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        Meta(description="ranks in the group", extra={"unset": "--data-parallel-size"}),
    ] = None
    rank: Annotated[
        Annotated[int, Meta(ge=0)] | None, Meta(description="this rank", extra={"unset": "vLLM's data-parallel rank"})
    ] = None
    rendezvous: Annotated[
        Annotated[str, Meta(pattern=r"^([^:]+|\[.+\]):\d+$", title="HOST:PORT, or [IPV6]:PORT")] | None,
        Meta(description="where rank 0 listens for its peers", extra={"unset": "a Unix socket, or vLLM's address"}),
    ] = None
    slots: Annotated[int, Meta(ge=2, le=8, description="buffers into which layers are streamed")] = 2
    slice_mib: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="copy in slices of this size, interleaved over the sources; 0 copies whole ranges",
             extra={"unset": "0 at two ranks, 16 from three"}),
    ] = None
    direct_max_tokens: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="steps up to this many tokens that are not dispatched read peers' memory in place",
             extra={"unset": "derived at start-up"}),
    ] = None
    dispatch: Annotated[
        Literal["auto", "off"],
        Meta(description="auto: small steps send their tokens to the owners of their experts, where ranks share a host "
                         "and the kernel allows; off: every step is a rank's own"),
    ] = "auto"
    dispatch_max_tokens: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="steps up to this many tokens are dispatched, at most --max-num-batched-tokens over the ranks; if set, larger "
                         "ones never are, even with all ranks",
             extra={"unset": "where dispatch stops paying, as the log says"}),
    ] = None
    graph_max_tokens: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="CUDA graphs are captured for steps of up to this many tokens that may dispatch; 0: for no more than vLLM's",
             extra={"unset": "8192, or 0 where their sizes are set"}),
    ] = None
    experts_per_rank: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="experts that each rank owns; above E/N ranges overlap", extra={"unset": "E/N"}),
    ] = None
    cache_gib: Annotated[
        Annotated[float, Meta(ge=0)] | Literal["auto"],
        Meta(description="GiB of device memory for permanent copies of remote experts; auto: all but cache_floor_gib"),
    ] = 0.0
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
    """Whether vLLM's `additional_config`, which may be of any type, switches DWDP on."""
    return isinstance(additional_config, dict) and KEY in additional_config


def as_json(option: str) -> str:
    """How an option is written in `additional_config`."""
    return f"additional_config['{KEY}']['{option}']"


def flag(setting: str) -> str:
    """How a setting is written on a command line."""
    return f"--{setting.replace('_', '-')}"


def as_flag(option: str) -> str:
    """How an option of DWDP's is written on vLLM's command line."""
    return flag(f"{KEY}_{option}")


def parse(additional_config: Any, spell: Callable[[str], str] = as_json) -> Options | None:
    """The options in vLLM's `additional_config`, or None when the switch is off.

    Raises DWDPError naming the option that is unknown or out of range, as `spell` says that it was written.
    """
    if not is_on(additional_config):
        return None
    given = additional_config[KEY]
    if not isinstance(given, dict | None):
        raise DWDPError(f"additional_config['{KEY}'] is {given!r}: it must be an object of options, {{}} for none")
    return read(Options, given or {}, spell)


def read(kind: type[S], given: dict[str, Any], spell: Callable[[str], str], *, strict: bool = True) -> S:
    """A struct from values by field name; with `strict` off numbers may be text.

    Raises DWDPError that says what was written, as `spell` has it, and what it must be.
    """
    types = {field.name: field.type for field in msgspec.structs.fields(kind)}
    values = {}
    for name, value in given.items():
        if name not in types:
            raise DWDPError(f"{spell(name)} is no option; {meant(name, types, spell)}")
        try:
            values[name] = found = msgspec.convert(value, types[name], strict=strict)
            if isinstance(found, float) and not math.isfinite(found):
                raise msgspec.ValidationError
        except msgspec.ValidationError:
            expected = allowed(inspect.type_info(types[name]))
            raise DWDPError(f"{spell(name)} is {value!r}: it must be {expected}") from None
    return kind(**values)


def meant(name: str, known: Iterable[str], spell: Callable[[str], str]) -> str:
    """The option that an unknown name was meant to be or, where none is near, all that there are."""
    known = list(known)
    if near := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {spell(near[0])}?"
    return f"there are {', '.join(map(spell, known))}"


def allowed(kind: inspect.Type) -> str:
    """What a value of this type may be, in words."""
    if isinstance(kind, inspect.Metadata):
        return (kind.extra_json_schema or {}).get("title") or allowed(kind.type)
    if isinstance(kind, inspect.UnionType):
        return " or ".join(allowed(each) for each in kind.types if not isinstance(each, inspect.NoneType))
    if isinstance(kind, inspect.LiteralType):
        return " or ".join(map(str, kind.values))
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        bounds = [f"{word} {bound:g}" for word, bound in (
            ("from", kind.ge), ("above", kind.gt), ("to" if kind.gt is None else "and at most", kind.le),
        ) if bound is not None]
        return " ".join(["a whole number" if isinstance(kind, inspect.IntType) else "a number", *bounds])
    if isinstance(kind, inspect.VarTupleType):
        least = f" of at least {kind.min_length}" if kind.min_length else ""
        return f"a list{least}, each {allowed(kind.item_type)}"
    words: dict[type, str] = {inspect.BoolType: "true or false", inspect.DictType: "a JSON object"}
    return words.get(type(kind), "a text")


def describe(field: msgspec.structs.FieldInfo) -> tuple[str, str]:
    """A field's description, and its default as a person would say it ("" where it has none)."""
    info = inspect.type_info(field.type)
    assert isinstance(info, inspect.Metadata), field.name
    unset = (info.extra or {}).get("unset", "")
    if isinstance(field.default, tuple):
        return (info.extra_json_schema or {})["description"], ",".join(map(str, field.default))
    has_default = field.default is not None and field.default is not msgspec.NODEFAULT
    return (info.extra_json_schema or {})["description"], f"{field.default}" if has_default else unset
