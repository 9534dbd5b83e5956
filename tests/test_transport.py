"""Invariant: both views hold every owner's bytes exactly, on every rank, whatever the sizes; peers' pages stay theirs.

The same bodies run over shared memory here and, marked `gpu`, over CUDA memory with ranks dealt out to the GPUs.
"""

import itertools
import os
import signal
import socket
import traceback

import pytest
import torch

from vllm_dwdp.assembly import Loaded, assemble
from vllm_dwdp.budget import LayerSize, MemoryLimit
from vllm_dwdp.config import Options
from vllm_dwdp.descriptors import needed
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.experts import ExpertLayer
from vllm_dwdp.handover import import_shards, replicate
from vllm_dwdp.kernels.device import Block
from vllm_dwdp.layout import Layout
from vllm_dwdp.limits import Limits
from vllm_dwdp.placement import Placement
from vllm_dwdp.prefetch import Prefetcher
from vllm_dwdp.rendezvous import Group
from vllm_dwdp.schedule import DIRECT, DISPATCHED, STREAMED, Schedule
from vllm_dwdp.weights import FullTensor, LayerWeights, Slots, TensorSpec

from harness import CONTEXT, await_that, free_port

SMALL = {1: torch.float32, 33: torch.bfloat16, 12: torch.float8_e4m3fn, 600_000: torch.float32}  # values a row: dtype
DEVICES = ["host", pytest.param("cuda", marks=pytest.mark.gpu)]


def make_device(kind: str, rank: int):
    if kind == "host":
        from vllm_dwdp.kernels.host import HostDevice

        return HostDevice()
    from vllm_dwdp.kernels.cuda import CudaDevice

    return CudaDevice(rank % torch.cuda.device_count())


def truth(layer: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * layer + len(name))
    return torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, dtype=torch.int32)


def torch_device(device) -> torch.device:
    return getattr(device, "device", torch.device("cpu"))


class Shards:
    """One rank of a group of layers made of random tensors, with everything but a model."""

    def __init__(self, rank: int, size: int, port: int, kind: str, *, num_experts: int, rows: dict[str, int],
                 num_layers: int = 3, num_slots: int = 2, residents: int = 0, per_rank: int | None = None,
                 slice_bytes: int = 0):
        self.device = make_device(kind, rank)
        self.group = Group.connect(rank=rank, size=size, address=("127.0.0.1", port), secret=b"", timeout_s=60)
        placement = Placement(num_experts=num_experts, size=size, experts_per_rank=per_rank)
        self.layers, self.truth = [], {}
        for i in range(num_layers):
            tensors = []
            for name, row in rows.items():
                layout = Layout(placement=placement, expert_bytes=4 * row, page_bytes=self.device.page_bytes,
                                residents=residents)
                shape = (num_experts, row)
                spec = TensorSpec(name=name, shape=shape, stride=(row, 1), dtype=torch.int32, layout=layout)
                tensor = FullTensor(spec, rank)
                self.truth[i, name] = truth(i, name, spec.shape)
                owned = placement.owned(rank)
                mine = self.truth[i, name][owned.start : owned.stop].clone()
                tensor.migrate(self.device, mine.to(torch_device(self.device)))
                tensors.append(tensor)
            self.layers.append(LayerWeights(i, f"layer{i}", tensors))
            empty = torch.empty(0, dtype=torch.int32, device=torch_device(self.device))
            self.layers[-1].parameters = [torch.nn.Parameter(empty, requires_grad=False) for _ in tensors]
        self.group.barrier("migrated")
        import_shards(self.group, self.device, self.layers)
        for layer in self.layers:
            for tensor in layer.tensors:
                tensor.fill(self.device)
        schedule = Schedule(num_layers=num_layers, max_slots=num_slots)
        self.slots = Slots(self.device, self.layers, schedule, rank)
        for layer in self.layers:
            for tensor in layer.tensors:
                tensor.compose(self.device, self.slots.of(layer, tensor.spec.name))
            layer.plan(slice_bytes)
        self.group.barrier("complete")
        self.stream = self.device.stream(timing=True)
        self.prefetcher = Prefetcher(self.layers, self.stream, schedule=schedule, direct_max_tokens=0)
        self.prefetcher.start()

    def same(self, layer: LayerWeights, view: str) -> bool:
        return all(torch.equal(t.views[view].cpu(), self.truth[layer.ordinal, t.spec.name]) for t in layer.tensors)

    def close(self) -> None:
        self.group.settle()
        self.prefetcher.stream.close()
        self.device.release_cached()
        for layer in self.layers:
            for tensor in layer.tensors:
                tensor.close()
        self.slots.close()


def check_views(rank: int, size: int, port: int, kind: str, **shape) -> None:
    shards = Shards(rank, size, port, kind, **shape)
    assert all(shards.same(layer, DIRECT) for layer in shards.layers)
    for _ in range(3):
        for layer in shards.layers:
            view = shards.prefetcher.acquire(layer, 1)
            assert shards.same(layer, STREAMED), f"layer {layer.ordinal}"
            shards.prefetcher.release(layer, view)
    assert shards.prefetcher.counters.refills == 0
    shards.prefetcher.stream.drain()
    if shards.layers[0].copied_bytes:
        assert shards.prefetcher.stream.copy_ms > 0
    shards.close()
    assert shards.device.allocated_bytes == 0


def check_descriptors(rank: int, size: int, port: int, kind: str, **shape) -> None:
    """The most that are open after any call that opens one, beside those from before, against what was foretold."""
    counts, before = [], len(os.listdir("/proc/self/fd"))
    device = make_device(kind, rank)

    def counted(call):
        def count(*args, **kwargs):
            made = call(*args, **kwargs)
            counts.append(len(os.listdir("/proc/self/fd")) - before)
            return made

        return count

    for name in ("allocate", "export", "adopt"):
        setattr(type(device), name, counted(getattr(type(device), name)))
    shards = Shards(rank, size, port, kind, **shape)
    placement = shards.layers[0].tensors[0].spec.layout.placement
    layers = [LayerSize(placement=placement, expert_bytes=[4 * n for n in shape["rows"].values()])] * len(shards.layers)
    residents = [shape.get("residents", 0)] * len(layers)
    foretold = needed(layers, rank, residents, slots=2, page_bytes=device.page_bytes, kept=device.keeps_descriptors)
    assert 0.85 * foretold < max(counts) <= foretold, (max(counts), foretold)
    shards.close()


def check_replicas(rank: int, size: int, port: int, kind: str) -> None:
    group = Group.connect(rank=rank, size=size, address=("127.0.0.1", port), secret=b"", timeout_s=60)
    placement = Placement(num_experts=7, size=size)
    owned = placement.owned(rank)
    device = make_device(kind, rank)
    where = torch_device(device)
    whole = [torch.arange(7 * n, device=where).reshape(7, n).to(dtype) for n, dtype in SMALL.items()]
    whole += [torch.arange(7 * 12.0, device=where).reshape(7, 3, 4).transpose(1, 2), torch.empty(7, 0, device=where)]
    module, names = torch.nn.Module(), tuple(f"small{i}" for i in range(len(whole)))
    for name, tensor in zip(names, whole, strict=True):
        module.register_parameter(name, torch.nn.Parameter(tensor[owned.start : owned.stop].clone(), requires_grad=False))
    layer = ExpertLayer(name="layer", module=module, placement=placement, streamed=(), replicated=names)
    (found,) = replicate(group, device, [layer])
    for name, wanted in zip(names, whole, strict=True):
        tensor = found[name]
        assert tensor.stride() == wanted.stride() and tensor.dtype == wanted.dtype
        assert torch.equal(tensor.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))
    group.settle()


def fail_to_assemble(rank: int, size: int, port: int, kind: str, at: int, dispatches: bool) -> None:
    """After `at` blocks there is no memory left on rank 1."""
    def allocate(nbytes: int) -> Block:
        if rank == 1 and next(made) == at:
            raise DWDPError("no memory left")
        return type(device).allocate(device, nbytes)

    device, placement, made, layers = make_device(kind, rank), Placement(num_experts=6, size=size), itertools.count(), []
    device.allocate = allocate
    for name in ("layer0", "layer1", "layer2"):
        module = torch.nn.Module()
        module.register_parameter("w", torch.nn.Parameter(torch.ones(3, 1500), requires_grad=False))
        shape = dict(hidden_size=4, top_k=2, itemsize=2)
        layers.append(ExpertLayer(name=name, module=module, placement=placement, streamed=("w",), replicated=(), **shape))
    seconds = dict.fromkeys(("patience_s", "helped_s", "alone_s", "spare_s"), lambda _: 0.0)
    steps = Limits(max_tokens=4, helped_max_tokens=4, most_rows=8, graph_sizes=[], alone_graph_tokens=0, **seconds)
    limit, before = MemoryLimit(gpu_memory_utilization=1.0, kv_cache_memory_bytes=None), len(os.listdir("/proc/self/fd"))
    group = Group.connect(rank=rank, size=size, address=("127.0.0.1", port), secret=b"", timeout_s=60)
    with pytest.raises(DWDPError, match="no memory left"), group.reporting():
        assemble(Loaded(layers=layers, samples={}), group, device, Options(size=size), limit, steps if dispatches else None)
    assert device.allocated_bytes == 0
    await_that(lambda: len(os.listdir("/proc/self/fd")) <= before, "sockets and handles to be closed", 3)


def write_once(rank: int, size: int, port: int, kind: str, view: str, expert: int) -> None:
    """Rank 0 writes into an expert through a view: 0 is its own, 3 the peer's."""
    shards = Shards(rank, size, port, kind, num_experts=4, rows={"w": 4096})
    if rank == 0:
        shards.layers[0].tensors[0].views[view][expert].fill_(0)
    shards.group.barrier("written")


def _rank(function, rank: int, size: int, port: int, kind: str, shape: dict, results) -> None:
    try:
        function(rank, size, port, kind, **shape)
        results.put((rank, None))
    except BaseException:
        results.put((rank, traceback.format_exc()))
        raise


def run(function, size: int, kind: str, expect_ok: bool = True, **shape) -> list:
    port, results = free_port(), CONTEXT.Queue()
    ranks = [CONTEXT.Process(target=_rank, args=(function, r, size, port, kind, shape, results)) for r in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(90 if expect_ok else 15)
        if process.is_alive():
            process.kill()
            process.join()
    if expect_ok:
        outcomes = dict(results.get(timeout=5) for _ in ranks)
        assert outcomes == dict.fromkeys(range(size)), "\n".join(filter(None, outcomes.values()))
        assert [process.exitcode for process in ranks] == [0] * size, "compute-sanitizer reports by exit code"
    return ranks


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize(
    ("size", "shape"),
    [
        (2, {"num_experts": 8, "rows": {"w13": 4096, "w2": 1024}}),
        (2, {"num_experts": 5, "rows": {"w13": 3000, "w2": 17}, "slice_bytes": 5000}),
        (3, {"num_experts": 10, "rows": {"w13": 1536, "w2": 700}, "num_layers": 5, "num_slots": 3}),
        (3, {"num_experts": 10, "rows": {"w13": 1500}, "residents": 2, "slice_bytes": 4096}),
        (4, {"num_experts": 9, "rows": {"w13": 1500, "w2": 333}, "per_rank": 4, "residents": 1}),
        (2, {"num_experts": 6, "rows": {"w13": 1500}, "residents": 6}),
    ],
    ids=["pages", "straddling", "uneven", "residents", "overlap", "all-resident"],
)
def test_views_are_exact(kind: str, size: int, shape: dict) -> None:
    """Direct and streamed view equal the truth bitwise: awkward rows, uneven shares, overlap, residents."""
    if kind == "cuda":  # pages of 2 MiB: the same layouts 512 times as large
        shape = shape | {"rows": {name: 512 * row + 13 for name, row in shape["rows"].items()}}
    run(check_views, size, kind, **shape)


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        (2, {"num_experts": 8, "rows": {"w13": 4096, "w2": 1024}, "num_layers": 24}),
        (3, {"num_experts": 10, "rows": {"w13": 1500, "w2": 700}, "residents": 2, "num_layers": 12}),
    ],
    ids=["pages", "residents"],
)
def test_descriptors_are_foretold(size: int, shape: dict) -> None:
    """A rank never has more open than `needed` says, and hardly fewer: it asks for no limit that it can do without."""
    run(check_descriptors, size, "host", **shape)


def check_graphs(rank: int, size: int, port: int, kind: str, pieces: int, **shape) -> None:
    """Kernels that sum every expert's row of the streamed view, captured, replayed, and run eagerly between replays."""
    shards = Shards(rank, size, port, kind, **shape)
    prefetcher, layers = shards.prefetcher, shards.layers
    names = [(layer.ordinal, tensor.spec.name) for layer in layers for tensor in layer.tensors]
    expected = [shards.truth[name].sum(1) for name in names]
    sums = {name: torch.empty_like(wanted, device=torch_device(shards.device)) for name, wanted in zip(names, expected)}  # noqa: B905

    def forward(part: list[LayerWeights]) -> None:
        for layer in part:
            view = prefetcher.acquire(layer, 1)
            for tensor in layer.tensors:
                sums[layer.ordinal, tensor.spec.name].copy_(tensor.views[view].sum(1))
                assert view == STREAMED
            prefetcher.release(layer, view)

    def check(what: str) -> None:
        for name, wanted in zip(names, expected, strict=True):
            assert torch.equal(sums[name].cpu(), wanted), f"{what}: {name}"
            sums[name].zero_()

    forward(layers)
    check("eager")
    stream = torch.cuda.Stream()
    graphs = [torch.cuda.CUDAGraph() for _ in range(pieces)]
    with torch.cuda.stream(stream):
        for piece, graph in enumerate(graphs):
            prefetcher.before_graph()
            with torch.cuda.graph(graph, stream=stream):
                forward(layers[len(layers) * piece // pieces : len(layers) * (piece + 1) // pieces])
                prefetcher.join_graph()
        for step in range(40):
            prefetcher.begin_step(1, exact=True)
            if step % 5 == 4:
                forward(layers)
            else:
                for graph in graphs:
                    prefetcher.before_graph()
                    graph.replay()
            prefetcher.end_step(1)
            if step % 3 == 0:
                check(f"step {step}")
    counted = prefetcher.counters
    assert counted.refills == 0 and counted.forwards == {DIRECT: 0, STREAMED: 41, DISPATCHED: 0} and counted.replays == 32
    torch.cuda.synchronize()
    shards.close()


@pytest.mark.gpu
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize(
    ("size", "shape"),
    [
        (2, {"num_experts": 8, "rows": {"w13": 512 * 4096, "w2": 512 * 1024}, "num_layers": 5}),
        (3, {"num_experts": 10, "rows": {"w13": 512 * 1500 + 13}, "num_layers": 4, "slice_bytes": 4 << 20}),
    ],
    ids=["ranges", "slices"],
)
def test_graphs_stream(size: int, shape: dict, pieces: int) -> None:
    """Replays read every layer's own bytes, one after the other and between eager forwards, whole or in pieces."""
    run(check_graphs, size, "cuda", pieces=pieces, **shape)


@pytest.mark.parametrize(
    ("at", "dispatches"),
    [
        pytest.param(1, True, id="first layer"), pytest.param(5, True, id="last layer"), pytest.param(7, False, id="second slot"),
        pytest.param(8, True, id="inbox"),
    ],
)
def test_nothing_is_left_of_what_cannot_be_assembled(at: int, dispatches: bool) -> None:
    """On no rank: the peer stops for the same reason."""
    run(fail_to_assemble, 2, "host", at=at, dispatches=dispatches)


@pytest.mark.parametrize("kind", DEVICES)
def test_small_tensors_are_replicated(kind: str) -> None:
    """Every rank ends with all rows of the small tensors, whatever their dtype, size and strides."""
    run(check_replicas, 3, kind)


@pytest.mark.parametrize(("view", "expert"), [(DIRECT, 3), (DIRECT, 0), (STREAMED, 0)])
def test_shared_memory_is_read_only(view: str, expert: int) -> None:
    """Writing into a peer's expert, or into an own one that peers read, kills the writer, not the weights.

    Shared memory only: two ranks on one GPU map each other's memory read-only too, and CUDA does not enforce it there.
    """
    ranks = run(write_once, 2, "host", expect_ok=False, view=view, expert=expert)
    assert ranks[0].exitcode == -signal.SIGSEGV


@pytest.mark.gpu
def test_memory_that_is_not_there_is_refused() -> None:
    """More than the GPU has is refused with the figures, and what was taken before is given back."""
    device = make_device("cuda", 0)
    with pytest.raises(DWDPError, match=r"cannot allocate .* MiB .* are free"):
        device.allocate(2**50 // device.page_bytes * device.page_bytes)
    assert device.allocated_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("call", "answers", "named"),
    [
        ("cuDeviceGetAttribute", lambda driver: (driver.CUresult.CUDA_SUCCESS, 0), "no CUDA virtual memory management"),
        (
            "cuMemSetAccess", lambda driver: (driver.CUresult.CUDA_ERROR_INVALID_DEVICE,),
            "needs NVLink or PCIe peer access",
        ),
    ],
)
def test_what_a_gpu_lacks_is_named(monkeypatch, call: str, answers, named: str) -> None:
    """A driver without virtual memory, GPUs without peer access: neither can be had here, so the driver pretends."""
    from vllm_dwdp.kernels import cuda

    monkeypatch.setattr(cuda.driver, call, lambda *_: answers(cuda.driver))
    with pytest.raises(DWDPError, match=named):
        device = make_device("cuda", 0)
        block, region = device.allocate(device.page_bytes), device.reserve(device.page_bytes)
        try:
            region.map(0, block, writable=False)
        finally:
            region.close()
            block.close()


@pytest.mark.slow
def test_rendezvous_port_in_use_is_named() -> None:
    """Rank 0 says which address it could not open."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DWDPError, match=f"127.0.0.1:{port}"):
            Group.connect(rank=0, size=2, address=("127.0.0.1", port), secret=b"", timeout_s=5)
