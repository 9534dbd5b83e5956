"""Handover: how peers pass each other memory handles and small tensors while the group starts.

Within a host over Unix sockets, which serve this user's processes that know a key from the store; across hosts, where
handles are FABRIC bytes, through the store itself.
"""

import array
import contextlib
import errno
import itertools
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from vllm_dwdp.channel import Channel, Listener
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.experts import ExpertLayer
from vllm_dwdp.kernels.device import Device
from vllm_dwdp.rendezvous import Group, PeerStopped
from vllm_dwdp.weights import LayerWeights

_FDS_PER_MESSAGE = 128  # the kernel takes 253
_GIVEN, _FAILED = b"+", b"-"  # how an answer begins


def import_shards(group: Group, device: Device, layers: Sequence[LayerWeights]) -> None:
    """Import every peer's shard of every layer. Returns on all ranks or raises DWDPError on all that can tell."""

    def export(ordinal: int) -> list[Any]:
        return [device.export(block) for tensor in layers[ordinal].tensors for _, block in tensor.shard]

    def adopt(peer: int, layer: LayerWeights, handles: Sequence[int | bytes]) -> None:
        remaining = iter(handles)
        for tensor in layer.tensors:
            sizes = [len(pages) * device.page_bytes for pages in tensor.spec.layout.segments(peer)]
            tensor.attach(peer, [device.adopt(next(remaining), nbytes) for nbytes in sizes])

    if device.handle_kind == "fabric":
        everyone = group.gather("fabric handles", [export(layer.ordinal) for layer in layers])
        for peer, layer in itertools.product(group.peers, layers):
            adopt(peer, layer, everyone[peer][layer.ordinal])
        return
    with serving(group, "memory", handles=export) as peers:
        for peer, layer in itertools.product(group.peers, layers):
            count = sum(len(tensor.spec.layout.segments(peer)) for tensor in layer.tensors)
            with peers[peer].fetch(layer.ordinal, count) as fds:
                adopt(peer, layer, fds)


def replicate(group: Group, device: Device, layers: Sequence[ExpertLayer]) -> list[dict[str, torch.Tensor]]:
    """All-gather small per-expert tensors: from [owned, ...] on every rank to [E, ...], by name.

    Each expert's row keeps its strides. Empty rows, as of a format's optional tensors, are allowed.
    """

    def export(ordinal: int) -> bytes:
        tensors = [layers[ordinal].parameter(name).data for name in layers[ordinal].replicated]
        return b"".join(t.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes() for t in tensors)

    if device.handle_kind == "fabric":
        everyone = group.gather("small tensors", [export(ordinal) for ordinal in range(len(layers))])
        return [_join(layer, [said[ordinal] for said in everyone]) for ordinal, layer in enumerate(layers)]
    with serving(group, "small tensors", contents=export) as peers:
        return [
            _join(layer, [export(i) if r == group.rank else peers[r].read(i) for r in range(group.size)])
            for i, layer in enumerate(layers)
        ]


def _join(layer: ExpertLayer, by_rank: Sequence[bytes]) -> dict[str, torch.Tensor]:
    whole, at = {}, [0] * len(by_rank)
    for name in layer.replicated:
        tensor = layer.parameter(name).data
        full = tensor.new_empty_strided((layer.placement.num_experts, *tensor.shape[1:]), tensor.stride())
        for rank, data in enumerate(by_rank if full.numel() else ()):
            owned = layer.placement.owned(rank)
            nbytes = len(owned) * tensor[0].numel() * tensor.element_size()
            rows = torch.frombuffer(bytearray(data[at[rank] : at[rank] + nbytes]), dtype=torch.uint8).view(tensor.dtype)
            full[owned.start : owned.stop] = rows.view(len(owned), *tensor.shape[1:]).to(tensor.device)
            at[rank] += nbytes
        whole[name] = full
    return whole


@contextlib.contextmanager
def serving(
    group: Group, what: str, *, handles: Callable[[int], list[int]] | None = None,
    contents: Callable[[int], bytes] | None = None,
) -> Iterator[dict[int, "PeerClient"]]:
    """Serve one of the two, by layer, to the peers while the body asks them for theirs. Ends when all ranks have."""
    with contextlib.ExitStack() as stack:
        server = PeerServer(group, handles=handles, contents=contents)
        stack.callback(server.close)
        where = group.gather(f"serving {what}", (server.address, server.key))
        clients = {}
        for peer in group.peers:
            clients[peer] = client = PeerClient(group, peer, *where[peer])
            stack.callback(client.close)
        yield clients
        group.barrier(f"{what} received")


class PeerServer:
    """Serves this rank's memory handles or small tensors: one request a layer, so that few descriptors are open at once.

    `handles(layer)` makes descriptors, which are closed once sent; `contents(layer)` makes bytes. An error of theirs is
    passed on to the peer that asked.
    """

    def __init__(
        self, group: Group, *, handles: Callable[[int], list[int]] | None = None,
        contents: Callable[[int], bytes] | None = None,
    ):
        self._rank, self._handles, self._contents = group.rank, handles, contents
        self.key = secrets.token_bytes(32)
        self.address = f"\0vllm-dwdp-{secrets.token_hex(16)}"  # abstract: leaves no file behind
        self._listener = Listener(self.address, self.key, self._serve)

    def _serve(self, channel: Channel) -> None:
        while request := channel.recv():
            layer, fds, answer = int.from_bytes(request, "little"), [], _GIVEN
            try:
                if self._handles is not None:
                    fds = self._handles(layer)
                elif self._contents is not None:
                    answer += self._contents(layer)
            except Exception as error:
                answer = _FAILED + f"rank {self._rank} stopped: {' '.join(str(error).split())}".encode()
            try:
                channel.send(answer)
                for at in range(0, len(fds), _FDS_PER_MESSAGE):
                    socket.send_fds(channel.socket, [b"+"], fds[at : at + _FDS_PER_MESSAGE])
            finally:
                close_all(fds)

    def close(self) -> None:
        self._listener.close()


class PeerClient:
    """Asks a peer for what it serves, a layer at a time. Raises DWDPError with the peer's reason when it fails."""

    def __init__(self, group: Group, peer: int, address: str, key: bytes):
        self._group, self._peer = group, peer
        with self._naming("its socket"):
            self._channel = Channel.connect(address, key, group.timeout_s)

    def read(self, layer: int) -> bytes:
        """The small tensors of a layer, one after the other."""
        with self._naming(f"layer {layer}"):
            return self._ask(layer)

    @contextlib.contextmanager
    def fetch(self, layer: int, count: int) -> Iterator[list[int]]:
        """The `count` descriptors of a layer's blocks, in export order; closed when the body ends."""
        fds: list[int] = []
        try:
            with self._naming(f"layer {layer}"):
                self._ask(layer)
                while len(fds) < count:
                    data, more, flags, _ = socket.recv_fds(self._channel.socket, 1, _FDS_PER_MESSAGE)
                    if not data:
                        raise ConnectionResetError
                    fds += array.array("i", more)
                    if flags & socket.MSG_CTRUNC:  # this process may have no more: the kernel has dropped the others
                        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            yield fds
        finally:
            close_all(fds)

    def close(self) -> None:
        self._channel.close()

    def _ask(self, layer: int) -> bytes:
        self._channel.send(layer.to_bytes(4, "little"))
        answer = self._channel.recv()
        if answer.startswith(_FAILED):
            raise PeerStopped(answer[1:].decode())
        return answer[1:]

    @contextlib.contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise DWDPError(f"rank {self._peer} did not hand over {what} within {self._group.timeout_s:.0f} s") from None
        except OSError as error:
            if error.errno == errno.EMFILE:  # descriptors.named says so
                raise
            self._group.raise_reported()
            raise DWDPError(f"rank {self._peer} ended while it handed over {what}: see its log") from None


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            socket.close(fd)
