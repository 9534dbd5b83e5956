"""The interface of a token exchange: rows that ranks send to the owners of their experts, and partial sums that return.

Every rank has an inbox, a block of memory that its peers map writable. A dispatched layer takes two exchanges:

    dispatch   push own rows, expert ids and weights into the inbox of every member; raise a flag; wait for theirs;
               gather own and received rows, with the ids that another rank computes replaced by -1
    combine    push every member's partial sums back; raise a flag; wait for theirs; add them in rank order in float32

Rows are dealt out to lanes, each with a flag of its own at every member. A flag is raised, and waited for, only where its
lane has rows: who helps sends none and is not waited for until sums come back. A flag carries the epoch, which counts rounds
and layers, so a late or early rank cannot take another round's rows. Where a GPU has STAMPED rows at most, flags would cost
more than rows: they travel as stamped words of eight bytes, four of a row and four of the epoch (two epochs that look alike
are 2**32 layers apart), and every word is waited for by whom reads it. An inbox has a region, a seat, for
every sender and needs no second copy: a rank pushes layer l + 1's rows after it has the receiver's partial sums of
layer l, which the receiver sends when its kernels have read its inbox; and it pushes partial sums of layer l + 1 after
it has the receiver's rows of that layer, which the receiver sends when it has added those of layer l.
"""

import abc
import dataclasses
import functools

import torch

from vllm_dwdp.convoy import Round
from vllm_dwdp.errors import DWDPError

FLAG_BYTES = 8
FEW = 512  # rows of a rank: where all have so many at most, they go to lanes one by one
STAMPED = 128  # rows: of a rank that has so many at most, GPUs send every four bytes with the epoch
LANES = 256  # on a machine without a GPU the first alone is used
WAIT_S = 20.0  # how long a rank waits inside a round, before it names whom it waited for


@dataclasses.dataclass(frozen=True, kw_only=True)
class InboxMap:
    """Where things lie in an inbox, in bytes. `rows` is what one sender may send at once; every rank but the owner has a seat.

    `hidden` and `top_k` are the largest of all layers, `itemsize` is of the activations' dtype.
    """

    size: int
    rows: int
    hidden: int
    top_k: int
    itemsize: int

    @property
    def ids(self) -> int:
        """int32 [size - 1, rows, top_k], after the flags, int64 [2, size, LANES]."""
        return self.flag(2, 0)

    @property
    def weights(self) -> int:
        """float32 [size - 1, rows, top_k]."""
        return _aligned(self.ids + 4 * self._all_rows * self.top_k)

    @property
    def hiddens(self) -> int:
        """Rows that arrived, [size - 1, rows, hidden]."""
        return _aligned(self.weights + 4 * self._all_rows * self.top_k)

    @property
    def sums(self) -> int:
        """Partial sums that came back, [size - 1, rows, hidden]."""
        return self.hiddens + self.itemsize * self._all_rows * self.hidden

    @property
    def stamped_hiddens(self) -> int:
        """int64 [size - 1, stamped, hidden * itemsize / 4], of rows that arrived."""
        return _aligned(self.sums + self.itemsize * self._all_rows * self.hidden)

    @property
    def stamped_choices(self) -> int:
        """int64 [size - 1, stamped, top_k, 2], an id and a weight."""
        return _aligned(self.stamped_hiddens + 2 * self.itemsize * (self.size - 1) * self.stamped * self.hidden)

    @property
    def stamped_sums(self) -> int:
        """int64 [size - 1, stamped, hidden * itemsize / 4], of partial sums that came back."""
        return _aligned(self.stamped_choices + 16 * (self.size - 1) * self.stamped * self.top_k)

    @property
    def nbytes(self) -> int:
        return self.stamped_sums + 2 * self.itemsize * (self.size - 1) * self.stamped * self.hidden

    @property
    def row_bytes(self) -> int:
        """Of the widest row."""
        return self.hidden * self.itemsize

    @property
    def stamped(self) -> int:
        """The most rows of one sender that travel as stamped words."""
        return min(self.rows, STAMPED)

    @property
    def _all_rows(self) -> int:
        """Of all seats."""
        return (self.size - 1) * self.rows

    def flag(self, phase: int, sender: int) -> int:
        """Where the flags of a sender's lanes begin, in its phase: 0 for dispatch, 1 for combine."""
        return (phase * self.size + sender) * LANES * FLAG_BYTES


def seat(sender: int, receiver: int) -> int:
    return sender - (sender > receiver)


def alone(rank: int, size: int, num_rows: int) -> Round:
    """Of a forward of `num_rows`, or fewer, without peers."""
    return Round(number=0, members=(rank,), tokens=tuple(num_rows if r == rank else 0 for r in range(size)))


@functools.cache
def owners_of(owned: tuple[range, ...], num_experts: int) -> list[list[int]]:
    """[member mask][expert]: the member that computes an expert for everybody, -1 where each rank does for itself.

    `owned` are the ranks' ranges, which begin and end in the order of the ranks. Each member in turn takes its share of the
    experts that are left, the first of its range, and all that no later member owns.
    """
    table = []
    for mask in range(1 << len(owned)):
        members = [rank for rank in range(len(owned)) if mask >> rank & 1]
        row, left = [-1] * num_experts, sorted(set().union(*(owned[rank] for rank in members)))
        for number, rank in enumerate(members):
            mine, later = [expert for expert in left if expert in owned[rank]], members[number + 1 :]
            alone = sum(not any(expert in owned[other] for other in later) for expert in mine)
            taken = mine[: max(-(-len(left) // (1 + len(later))), alone)]
            for expert in taken:
                row[expert] = rank
            left = [expert for expert in left if expert not in taken]
        table.append(row)
    return table


def did_not_come(rank: int) -> DWDPError:
    """Why a step that waited for `rank` has failed."""
    return DWDPError(
        f"rank {rank} did not come to a round that it had agreed to: it has ended, or hung for {WAIT_S:.0f} s; see its "
        f"log, and restart the group"
    )


class TokenExchange(abc.ABC):
    """One rank's inbox and its peers'. Only the thread that runs the model may call it."""

    @abc.abstractmethod
    def begin(self, layout: Round) -> None:
        """What is enqueued from now on belongs to this round."""

    @abc.abstractmethod
    def dispatch(
        self, layer: int, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Own and received rows, their weights and ids: [rows, hidden], [rows, top_k] twice; given own ones, alike.

        `rows`, no less than the round has, are empty beyond those; whether they are more than FEW a rank is alike on all members.
        """

    @abc.abstractmethod
    def combine(self, layer: int, partial: torch.Tensor, num_rows: int) -> torch.Tensor:
        """The sums of own rows, [num_rows, hidden], from this rank's partial sums of all rows, [rows, hidden]."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raises DWDPError naming the rank that did not come, if a wait of an enqueued round has ended in vain."""

    @abc.abstractmethod
    def close(self) -> None: ...


def _aligned(offset: int) -> int:
    return -(-offset // 256) * 256
