"""Exchange: how peers hand over memory handles and small tensors while the group starts."""

import array
import contextlib
import itertools
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from vllm_dwdp.errors import DWDPError
from vllm_dwdp.experts import ExpertLayer
from vllm_dwdp.kernels.device import Device
from vllm_dwdp.rendezvous import Group
from vllm_dwdp.weights import LayerWeights

_FDS_PER_MESSAGE = 128  # the kernel takes 253


def exchange(group: Group, device: Device, layers: Sequence[LayerWeights]) -> None:
    """Import every peer's shard of every layer. Returns on all ranks or raises DWDPError on all that can tell."""

    def export(ordinal: int) -> list[int | bytes]:
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
    server = HandleServer(group, export)
    try:
        addresses = group.gather("serving shards", server.address)
        for peer in group.peers:
            client = HandleClient(group, peer, addresses[peer])
            for layer in layers:
                count = sum(len(tensor.spec.layout.segments(peer)) for tensor in layer.tensors)
                with client.fetch(layer.ordinal, count) as fds:
                    adopt(peer, layer, fds)
            client.close()
        group.barrier("memory imported")
    finally:
        server.close()


def replicate(group: Group, layers: Sequence[ExpertLayer]) -> list[dict[str, torch.Tensor]]:
    """All-gather small per-expert tensors through the rendezvous: from [owned, ...] on every rank to [E, ...], by name.

    Each expert's row keeps its strides. Empty rows, as of a format's optional tensors, are allowed.
    """
    tensors = [layer.parameter(name).data for layer in layers for name in layer.replicated]
    mine = [tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes() for tensor in tensors]
    everyone = group.gather("small tensors", mine)
    said, full = iter(zip(*everyone, strict=True)), []
    for layer in layers:
        full.append({})
        for name in layer.replicated:
            tensor, by_rank = layer.parameter(name).data, next(said)
            whole = tensor.new_empty_strided((layer.placement.num_experts, *tensor.shape[1:]), tensor.stride())
            for rank, data in enumerate(by_rank if whole.numel() else ()):
                owned = layer.placement.owned(rank)
                rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(tensor.dtype)
                whole[owned.start : owned.stop] = rows.view(len(owned), *tensor.shape[1:]).to(tensor.device)
            full[-1][name] = whole
    return full


class HandleServer:
    """Serves this rank's memory handles to its peers: one request a layer, so that few descriptors are open at once.

    `export(layer)` makes the descriptors of a layer's blocks; they are closed once sent.
    """

    def __init__(self, group: Group, export: Callable[[int], list[int]]):
        self._export, self._timeout_s = export, group.timeout_s
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.address = f"\0vllm-dwdp-{secrets.token_hex(16)}"  # abstract: leaves no file behind
        self._listener.bind(self.address)
        self._listener.listen(group.size)
        self._thread = threading.Thread(target=self._accept, name="dwdp-handles", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed when the exchange is over
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(self._timeout_s)
            while request := connection.recv(4):
                fds = self._export(int.from_bytes(request, "little"))
                try:
                    for at in range(0, len(fds), _FDS_PER_MESSAGE):
                        socket.send_fds(connection, [b"+"], fds[at : at + _FDS_PER_MESSAGE])
                finally:
                    _close_all(fds)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


class HandleClient:
    """Fetches a peer's descriptors, a layer at a time."""

    def __init__(self, group: Group, peer: int, address: str):
        self._peer = peer
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(group.timeout_s)
        self._socket.connect(address)

    @contextlib.contextmanager
    def fetch(self, layer: int, count: int) -> Iterator[list[int]]:
        """The `count` descriptors of a layer's blocks, in export order; closed when the body ends."""
        fds: list[int] = []
        try:
            self._socket.sendall(layer.to_bytes(4, "little"))
            while len(fds) < count:
                data, more, _, _ = socket.recv_fds(self._socket, 1, _FDS_PER_MESSAGE)
                if not data:
                    raise DWDPError(f"rank {self._peer} ended while it handed over layer {layer}'s memory")
                fds += array.array("i", more)
            yield fds
        except TimeoutError:
            raise DWDPError(f"rank {self._peer} did not hand over layer {layer}'s memory in time") from None
        finally:
            _close_all(fds)

    def close(self) -> None:
        self._socket.close()


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            socket.close(fd)
