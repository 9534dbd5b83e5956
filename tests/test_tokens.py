"""Invariant: a dispatched layer sums what the owners of its experts computed, bitwise, whoever was early or late.

Ranks are processes with an inbox each; their experts multiply by a number. What has been read is poisoned before the
flag that lets the sender write again. The same bodies run over shared memory here and, marked `gpu`, over CUDA memory.
"""

import random
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import recv_handle, send_handle

import pytest
import torch
from test_transport import DEVICES, make_device, torch_device

from vllm_dwdp.convoy import Round
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.kernels import tokens
from vllm_dwdp.kernels.tokens import FEW, STAMPED, InboxMap, TokenExchange, owners_of, seat
from vllm_dwdp.placement import Placement

from harness import CONTEXT
from interpreted import interpret

EXPERTS, TOP_K, HIDDEN, ROWS, LAYERS = 24, 3, 64, 24, 4
KERNELS = [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("interpreted", marks=pytest.mark.slow)]  # of GPUs
WIDE = {"host": HIDDEN, "cuda": 2048}  # of many rows, which lanes take several at a time


class Ranks:
    """One rank's inbox and its peers', mapped."""

    def __init__(self, rank: int, size: int, kind: str, pipes: dict, *, at: InboxMap, experts: int = EXPERTS,
                 num_layers: int = LAYERS, per_rank: int | None = None):
        self.device = make_device("cuda" if kind == "cuda" else "host", rank)
        page = self.device.page_bytes
        nbytes = -(-at.nbytes // page) * page
        block = self.device.allocate(nbytes)
        for pipe in pipes.values():
            fd = self.device.export(block, writable=True)
            pipe.send(0)
            send_handle(pipe, fd, None)
        self.blocks = {rank: block}
        for peer, pipe in pipes.items():
            pipe.recv()
            self.blocks[peer] = self.device.adopt(recv_handle(pipe), nbytes)
        self.regions = []
        for peer in range(size):
            self.regions.append(region := self.device.reserve(nbytes))
            region.map(0, self.blocks[peer], writable=True)
        placement = Placement(num_experts=experts, size=size, experts_per_rank=per_rank)
        self.owners = owners_of(tuple(placement.owned(r) for r in range(size)), experts)
        inboxes = [region.address for region in self.regions]
        self.mine = self.regions[rank].tensor(0, (nbytes,), (1,), torch.uint8)
        self.mine.zero_()
        if kind == "cuda":
            torch.cuda.synchronize()
        for pipe in pipes.values():
            pipe.send(1)
        for pipe in pipes.values():
            pipe.recv()
        self.tokens = make_tokens(kind, torch_device(self.device), rank, at, inboxes, [self.owners] * num_layers)


def make_tokens(
    kind: str, device: torch.device, rank: int, at: InboxMap, inboxes: list[int], owners: list[list[list[int]]], wait_s: float = 20.0
) -> TokenExchange:
    if kind == "host":
        from vllm_dwdp.kernels.tokens_host import HostTokens

        return HostTokens(rank, at, inboxes, owners, lambda _: True)
    if kind == "interpreted":
        interpret()
    from vllm_dwdp.kernels import tokens_cuda

    tokens_cuda.WAIT_S = wait_s
    return tokens_cuda.CudaTokens(device, rank, at, inboxes, owners)


def rows_of(seed: int, rank: int, count: int, dtype: torch.dtype, width: int = HIDDEN, top_k: int = TOP_K):
    """What a rank computes on in one layer: the same for whoever asks."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    hidden = torch.randn(count, width, generator=generator).to(dtype)
    weights = torch.rand(count, top_k, generator=generator)
    ids = torch.rand(count, EXPERTS, generator=generator).argsort(1)[:, :top_k].to(torch.int32).contiguous()
    ids[torch.rand(ids.shape, generator=generator) < 0.05] = -1  # a place that the router left empty
    return hidden, weights, ids


def experts(hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Expert e multiplies by e + 1; a masked place adds nothing. Summed place by place in float32."""
    factor = torch.where(ids >= 0, weights * (ids + 1), 0.0)
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for place in range(ids.shape[1]):
        total += factor[:, place : place + 1] * hidden.float()
    return total.to(hidden.dtype)


def expected(
    seed: int, rank: int, layout: Round, owners: list[list[int]], dtype: torch.dtype, width: int, top_k: int
) -> torch.Tensor:
    hidden, weights, ids = rows_of(seed, rank, layout.tokens[rank], dtype, width, top_k)
    owner = torch.tensor(owners[layout.mask])[ids.long()]
    total = torch.zeros(hidden.shape, dtype=torch.float32)
    for member in layout.members:
        computes = (owner == member) | ((owner == -1) & (member == rank))
        total += experts(hidden, torch.where(computes, weights, 0.0), torch.where(computes, ids, -1)).float()
    return total.to(dtype)


def rounds(size: int, count: int, seed: int = 0) -> list[Round]:
    rng = random.Random(seed)
    found = []
    for number in range(1, count + 1):
        members = tuple(sorted(rng.sample(range(size), rng.randint(2, size))))
        tokens = tuple(rng.choice([0, 1, rng.randint(1, ROWS)]) if r in members else 0 for r in range(size))
        found.append(Round(number=number, members=members, tokens=tokens))
    return found


def everyone(*tokens: tuple[int, ...]) -> list[Round]:
    """Rounds of all ranks."""
    return [Round(number=number + 1, members=tuple(range(len(row))), tokens=row) for number, row in enumerate(tokens)]


def large(size: int, count: int, rows: int) -> list[Round]:
    """Rounds of all ranks, in which one has up to `rows` rows and the others some."""
    rng = random.Random(0)

    def draw(most: int) -> int:
        return rng.choice([0, 1, STAMPED, STAMPED + 1, most, rng.randint(1, most)])

    return everyone(*(tuple(draw(rows if r == number % size else FEW) for r in range(size)) for number in range(count)))


def helped(size: int, count: int, rows: int) -> list[Round]:
    """Rounds of all ranks in which one has up to `rows` rows and the others help."""
    rng = random.Random(0)
    return everyone(*(
        tuple(rng.choice([rows, rows - 1, 1025]) if r == number % size else 0 for r in range(size)) for number in range(count)
    ))


def poison(ranks: Ranks, rank: int, senders: Sequence[int], offset: int, seat_bytes: int) -> None:
    """Ruin what was sent in this round; a rank that has sent nothing may have sent rows of the next."""
    for sender in set(senders) - {rank}:
        start = offset + seat(sender, rank) * seat_bytes
        ranks.mine[start : start + seat_bytes].fill_(0xFF)


def check_rounds(
    rank: int, size: int, kind: str, pipes: dict, dtype: torch.dtype, layouts: list[Round], per_rank: int | None, num_layers: int,
    width: int = HIDDEN, num_rows: int = ROWS, room: int = 0, top_k: int = TOP_K, stamped: int = STAMPED,
) -> None:
    """`stamped` stands for STAMPED.

    With `room` every forward has `num_rows` rows, and room for so many of all ranks, as in a graph; else as the round, or some more.
    """
    tokens.STAMPED = stamped
    at = InboxMap(size=size, rows=num_rows, hidden=width, top_k=top_k, itemsize=dtype.itemsize)
    ranks = Ranks(rank, size, kind, pipes, at=at, per_rank=per_rank, num_layers=num_layers)
    where, rng = torch_device(ranks.device), random.Random(rank)
    found, chosen, seen = [], [], []
    for layout in layouts:
        if rank not in layout.members:
            alone = tuple(rng.randint(1, ROWS) if r == rank else 0 for r in range(size))
            layout = Round(number=layout.number, members=(rank,), tokens=alone)
        ranks.tokens.begin(layout)
        own = num_rows if room else layout.tokens[rank]
        total = room or layout.num_rows
        if total <= FEW * size and rng.random() < 0.5:  # the graph of one rank may have more than that of another
            own, total = own + 8, total + 8 * size
        senders = [member for member in layout.members if layout.tokens[member]]
        for layer in range(num_layers):
            seed = layout.number * num_layers + layer
            rows = rows_of(seed, rank, layout.tokens[rank], dtype, width, top_k)
            hidden, weights, ids = (
                torch.cat([r, r.new_full((own - r.shape[0], r.shape[1]), -1)]).to(where) for r in rows
            )
            if rng.random() < 0.2:
                time.sleep(rng.random() * 0.01)
            seen.append(("uploaded", hidden.isfinite().all(1), layer, layout))
            gathered = ranks.tokens.dispatch(layer, hidden, weights, ids, total)
            assert gathered[0].shape[0] == total
            if kind != "host":
                assert (gathered[2][layout.num_rows :] == -1).all() and not gathered[0][layout.num_rows :].any()
            else:
                assert not gathered[1][layout.num_rows :].any(), "the empty rows' experts have no weight"
            poison(ranks, rank, senders, at.hiddens, at.rows * width * at.itemsize)
            poison(ranks, rank, senders, at.ids, at.rows * 4 * top_k)
            poison(ranks, rank, senders, at.weights, at.rows * 4 * top_k)
            poison(ranks, rank, senders, at.stamped_hiddens, at.stamped * width * 2 * at.itemsize)
            poison(ranks, rank, senders, at.stamped_choices, at.stamped * 16 * top_k)
            chosen.append((gathered[2], layout))
            partial = experts(*gathered)
            sums = ranks.tokens.combine(layer, partial, own)
            seen += [("gathered", gathered[0].isfinite().all(1), layer, layout), ("computed", partial.isfinite().all(1), layer, layout)]
            for sender in set(layout.members) - {rank} if kind == "host" or layout.tokens[rank] > at.stamped else ():
                start, count = at.sums + seat(sender, rank) * at.rows * width * at.itemsize, layout.tokens[rank]
                came = ranks.mine[start : start + count * width * at.itemsize].view(dtype).view(count, width)
                seen.append((f"returned by {sender}", came.isfinite().all(1), layer, layout))
            assert not sums[layout.tokens[rank] :].any()
            for offset, nbytes in ((at.sums, at.rows * width * at.itemsize), (at.stamped_sums, at.stamped * width * 2 * at.itemsize)):
                poison(ranks, rank, layout.members if layout.tokens[rank] else (), offset, nbytes)
            found.append((sums[: layout.tokens[rank]], layer, layout))
    if kind == "cuda":
        torch.cuda.synchronize()
    ranks.tokens.check()
    for ids, layout in chosen:
        owner = torch.tensor(ranks.owners[layout.mask])[ids.long().cpu().clamp_min(0)]
        assert ((owner == rank) | (owner == -1) | (ids.cpu() < 0)).all(), "no expert that another member computes"
        assert kind != "host" or (ids >= 0).all(), "vLLM's CPU kernel takes no empty place"
    for what, finite, layer, layout in seen:  # in the order of time
        assert finite.all(), f"layer {layer} of {layout}: ruined when {what}: rows {(~finite).nonzero().flatten().tolist()[:20]}"
    for sums, layer, layout in found:
        wanted = expected(layout.number * num_layers + layer, rank, layout, ranks.owners, dtype, width, top_k)
        wrong = (sums.cpu() != wanted).any(1).nonzero().flatten().tolist()
        assert not wrong, f"layer {layer} of {layout}: {len(wrong)} rows, {wrong[:20]}: {sums.cpu()[wrong[0]]}, not {wanted[wrong[0]]}"
    ranks.tokens.close()


def _rank(function, rank: int, size: int, kind: str, pipes: dict, keywords: dict, results) -> None:
    try:
        function(rank, size, kind, pipes, **keywords)
        results.put((rank, None))
    except BaseException:
        results.put((rank, traceback.format_exc()))
        raise


def run(function, size: int, kind: str, timeout_s: float = 120, **keywords) -> dict[int, str | None]:
    pipes = [{} for _ in range(size)]
    for a in range(size):
        for b in range(a):
            pipes[a][b], pipes[b][a] = CONTEXT.Pipe()
    results = CONTEXT.Queue()
    ranks = [CONTEXT.Process(target=_rank, args=(function, r, size, kind, pipes[r], keywords, results)) for r in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            process.join()
    outcomes = dict.fromkeys(range(size), "no answer")
    while not results.empty():
        outcomes |= [results.get()]
    return outcomes


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize(
    ("size", "dtype", "per_rank", "num_layers"),
    [(2, torch.bfloat16, None, LAYERS), (3, torch.float32, 12, LAYERS), (3, torch.float32, EXPERTS, LAYERS),
     (4, torch.bfloat16, None, LAYERS), (2, torch.float32, None, 1)],
)
def test_sums_are_exact(kind: str, size: int, dtype: torch.dtype, per_rank: int | None, num_layers: int) -> None:
    """Members, row counts and layouts change from round to round; ranks that stay away compute alone meanwhile.

    With one layer the flags of two rounds differ by the round alone.
    """
    outcomes = run(check_rounds, size, kind, dtype=dtype, layouts=rounds(size, 60), per_rank=per_rank, num_layers=num_layers)
    assert outcomes == dict.fromkeys(range(size)), "\n".join(filter(None, outcomes.values()))


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("size", [2, 3])
def test_sums_of_one_rank_s_many_rows_are_exact(kind: str, size: int) -> None:
    """More than lanes take at once, all of one sender, as in a large step with which idle ranks help."""
    outcomes = run(
        check_rounds, size, kind, dtype=torch.bfloat16, layouts=helped(size, 6, 3000), per_rank=None, num_layers=2, width=WIDE[kind],
        num_rows=3000,
    )
    assert outcomes == dict.fromkeys(range(size)), "\n".join(filter(None, outcomes.values()))


@pytest.mark.gpu
def test_no_flag_comes_before_its_rows_on_gpus_that_others_use() -> None:
    """Four groups on the same GPUs: one of four or more failed in half of the runs while one thread released what all had stored."""
    keywords = {"dtype": torch.bfloat16, "layouts": helped(2, 6, 3000), "per_rank": None, "num_layers": 2, "width": 2048, "num_rows": 3000}
    with ThreadPoolExecutor(4) as pool:
        groups = list(pool.map(lambda _: run(check_rounds, 2, "cuda", **keywords), range(4)))
    assert groups == [dict.fromkeys(range(2))] * 4, "\n".join(text for group in groups for text in group.values() if text)


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("others", [640, FEW])
def test_sums_in_large_graphs_are_exact(kind: str, size: int, others: int) -> None:
    """With room for as many rows of every rank, and for few of the others."""
    outcomes = run(
        check_rounds, size, kind, dtype=torch.bfloat16, layouts=large(size, 12, 640), per_rank=None, num_layers=2, width=WIDE[kind],
        num_rows=640, room=640 + others * (size - 1),
    )
    assert outcomes == dict.fromkeys(range(size)), "\n".join(filter(None, outcomes.values()))


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize(
    ("size", "dtype", "width", "top_k", "layouts", "num_rows", "room"),
    [
        (2, torch.float16, 96, 3, rounds(2, 3), ROWS, 0),
        (3, torch.float32, 64, 22, rounds(3, 3), ROWS, 0),
        (2, torch.float16, 1100, 4, everyone((5, 1), (0, 4), (3, 6)), 6, 10),
        (2, torch.float16, 64, 8, helped(2, 1, 1100), 1100, 0),
    ],
    ids=["padded", "many experts a row", "graph", "many rows"],
)
def test_kernels_of_gpus_sum_exactly(
    kind: str, size: int, dtype: torch.dtype, width: int, top_k: int, layouts: list[Round], num_rows: int, room: int
) -> None:
    """Also where no GPU is: there Triton interprets them."""
    outcomes = run(check_rounds, size, kind, dtype=dtype, layouts=layouts, per_rank=None, num_layers=2, width=width, num_rows=num_rows,
                   room=room, top_k=top_k, stamped=4)
    assert outcomes == dict.fromkeys(range(size)), "\n".join(filter(None, outcomes.values()))


def test_members_share_what_both_own() -> None:
    """Experts that two members own are computed by one each; those of no member by each rank for itself."""
    table = owners_of((range(6), range(4, 10)), 10)
    assert table[0b11] == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert table[0b01] == [0] * 6 + [-1] * 4 and table[0b10] == [-1] * 4 + [1] * 6


@pytest.mark.parametrize(("size", "experts", "each"), [(4, 128, 64), (8, 256, 64), (3, 12, 11), (3, 12, 12), (3, 10, None)])
def test_members_compute_as_many_experts_as_each_other(size: int, experts: int, each: int | None) -> None:
    """The slowest ends a round."""
    placement = Placement(num_experts=experts, size=size, experts_per_rank=each)
    owned = tuple(placement.owned(rank) for rank in range(size))
    row = owners_of(owned, experts)[-1]
    assert all(expert in owned[rank] for expert, rank in enumerate(row))
    counts = [row.count(rank) for rank in range(size)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("phase", ["rows", "sums"])
@pytest.mark.parametrize("alive", [False, True])
def test_a_member_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch, alive: bool, phase: str) -> None:
    """At once where it has died, else within the bound; a flag of another round or layer is not taken for its own."""
    from vllm_dwdp.kernels import tokens_host

    monkeypatch.setattr(tokens_host, "WAIT_S", 0.3 if alive else 60.0)
    at = InboxMap(size=2, rows=ROWS, hidden=HIDDEN, top_k=TOP_K, itemsize=4)
    inboxes = [torch.zeros(at.nbytes, dtype=torch.uint8) for _ in range(2)]
    owners = [owners_of((range(12), range(12, 24)), EXPERTS)] * LAYERS
    tokens = tokens_host.HostTokens(0, at, [inbox.data_ptr() for inbox in inboxes], owners, lambda _: alive)
    flags = [inboxes[0][at.flag(number, 1) :][:8].view(torch.int64) for number in range(2)]
    tokens.begin(Round(number=5, members=(0, 1), tokens=(2, 1)))
    hidden, weights, ids = rows_of(0, 0, 2, torch.float32)
    awaited = 5 * LAYERS + 1 + 1
    for missing in (awaited - 1, awaited - LAYERS, awaited + LAYERS):  # the layer before, the rounds beside
        for flag in flags:
            flag.fill_(awaited)
        flags[phase == "sums"].fill_(missing)
        began = time.monotonic()
        with pytest.raises(DWDPError, match="rank 1 did not come to a round"):
            gathered = tokens.dispatch(1, hidden, weights, ids, 3)
            assert phase == "sums"
            tokens.combine(1, experts(*gathered), 2)
        assert time.monotonic() - began < 5


def send_narrow(rank: int, size: int, kind: str, pipes: dict) -> None:
    """Rank 2, alone with inboxes, sends rows of a layer that has half the numbers of the widest."""
    at, where = InboxMap(size=3, rows=8, hidden=HIDDEN, top_k=2 * TOP_K, itemsize=4), torch.device("cuda:0" if kind == "cuda" else "cpu")
    inboxes = [torch.zeros(at.nbytes, dtype=torch.uint8, device=where) for _ in range(3)]
    owners = [owners_of((range(8), range(8, 16), range(16, 24)), EXPERTS)]
    made = make_tokens(kind, where, 2, at, [inbox.data_ptr() for inbox in inboxes], owners)
    made.begin(Round(number=1, members=(0, 2), tokens=(0, 0, 2)))
    hidden, weights, ids = (tensor.to(where) for tensor in rows_of(0, 2, 2, torch.float32, HIDDEN // 2))
    made.dispatch(0, hidden, weights, ids, 2)
    areas = [(at.hiddens, at.rows * at.row_bytes), (at.ids, at.rows * 4 * at.top_k), (at.weights, at.rows * 4 * at.top_k)]
    if kind != "host":
        areas = [(at.stamped_hiddens, at.stamped * 2 * at.row_bytes), (at.stamped_choices, at.stamped * 16 * at.top_k)]
    for start, nbytes in areas:
        seats = inboxes[0][start : start + 2 * nbytes].view(2, nbytes)
        assert seats[seat(2, 0)][:16].any() and not seats[seat(1, 0)].any()


@pytest.mark.parametrize("kind", ["host", *KERNELS])
def test_a_narrow_layer_s_rows_keep_to_their_sender_s_seat(kind: str) -> None:
    """A helper may be a round ahead: its rows would come over those that another rank's layer still reads."""
    outcomes = run(send_narrow, 1, kind)
    assert outcomes == {0: None}, outcomes[0]


def wait_in_vain(rank: int, size: int, kind: str, pipes: dict, late: str) -> None:
    """Rank 0, whose peer, an inbox only, has sent everything but one word that is `late`: another epoch's."""
    tokens.STAMPED, count = 4, 5 if late.endswith("flags") else 2
    at, rng = InboxMap(size=2, rows=8, hidden=HIDDEN, top_k=TOP_K, itemsize=4), random.Random(0)
    where, wait_s = torch.device("cuda:0" if kind == "cuda" else "cpu"), 0.5 if kind == "cuda" else 2.0
    inboxes = [torch.zeros(at.nbytes, dtype=torch.uint8, device=where) for _ in range(2)]
    owners = [owners_of((range(12), range(12, 24)), EXPERTS)] * LAYERS

    def words(inbox: int, start: int, number: int) -> torch.Tensor:
        return inboxes[inbox][start : start + 8 * number].view(torch.int64)

    areas = {
        "row flags": words(0, at.flag(0, 1), count), "sum flags": words(0, at.flag(1, 1), count),
        "numbers": words(0, at.stamped_hiddens, count * HIDDEN), "sums": words(0, at.stamped_sums, count * HIDDEN),
        "choices": words(0, at.stamped_choices, count * TOP_K * 2),
    }
    rows, awaited = [tensor.to(where) for tensor in rows_of(0, 0, count, torch.float32)], 5 * LAYERS + 1 + 1
    for epoch in (awaited, awaited - 1, awaited - LAYERS, awaited + LAYERS)[: 4 if kind == "cuda" else 2]:
        made = make_tokens(kind, where, 0, at, [inbox.data_ptr() for inbox in inboxes], owners, wait_s)
        made.begin(Round(number=5, members=(0, 1), tokens=(count, count)))
        inboxes[1].zero_()
        for name, area in areas.items():
            shift = 0 if name.endswith("flags") else 32
            area.fill_(awaited << shift)  # of stamped zeros
            if name == late:
                area[rng.randrange(len(area))] = epoch << shift
        for again in range(2):
            began = time.monotonic()
            gathered = made.dispatch(1, *rows, 2 * count)
            sums = made.combine(1, gathered[0], count)
            if kind == "cuda":
                torch.cuda.synchronize()
            assert not again or time.monotonic() - began < 0.8 * wait_s, "compiled by now, and in a round that has failed none waits"
            told = words(1, at.stamped_sums, 1) >> 32 if count <= at.stamped else words(1, at.flag(1, 0), 1)
            if epoch == awaited:
                made.check()
                assert torch.equal(sums, gathered[0][:count]) and told == awaited
            else:
                with pytest.raises(DWDPError, match="rank 1 did not come to a round"):
                    made.check()
                assert told != awaited or (late.startswith("sum") and not again), "sums of rows that did not come are nobody's"


def wait_for_two(rank: int, size: int, kind: str, pipes: dict) -> None:
    """Rank 0, whose peers, inboxes only, have sent nothing."""
    at, where = InboxMap(size=3, rows=8, hidden=HIDDEN, top_k=TOP_K, itemsize=4), torch.device("cuda:0" if kind == "cuda" else "cpu")
    inboxes = [torch.zeros(at.nbytes, dtype=torch.uint8, device=where) for _ in range(3)]
    owners = [owners_of((range(8), range(8, 16), range(16, 24)), EXPERTS)]
    made = make_tokens(kind, where, 0, at, [inbox.data_ptr() for inbox in inboxes], owners, wait_s=0.5)
    made.begin(Round(number=1, members=(0, 1, 2), tokens=(1, 1, 1)))
    made.dispatch(0, *[tensor.to(where) for tensor in rows_of(0, 0, 1, torch.float32)], 3)
    if kind == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(DWDPError, match="rank 1 did not come to a round"):
        made.check()


@pytest.mark.parametrize("kind", KERNELS)
def test_the_first_member_that_is_waited_for_in_vain_is_named(kind: str) -> None:
    """Nobody is waited for after that, who might have come."""
    outcomes = run(wait_for_two, 1, kind)
    assert outcomes == {0: None}, outcomes[0]


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("late", ["row flags", "sum flags", "numbers", "choices", "sums"])
def test_a_member_that_does_not_come_is_named_by_a_gpu(kind: str, late: str) -> None:
    """Within the bound, if but one word of what it owes is another epoch's."""
    outcomes = run(wait_in_vain, 1, kind, late=late)
    assert outcomes == {0: None}, outcomes[0]
