"""Convoy: who takes part in a dispatched step. The rules alone, each a function from one record to the next.

Ranks change one shared record, one at a time (`meeting` keeps it). Every function takes the record, the rank that comes, and
`alive(rank)`; it returns the next record and an answer: a Round that the rank launches now, GO (do alone what it came for), or WAIT.

Whatever a rank comes for, a round that it owes comes first; after that round it comes again. A convoy leaves with everyone who
waits or is idle, as soon as someone has a step and nobody is busy. Dead ranks are never waited for, nor large steps but for
their end: a small step without company waits for one that is expected to end soon. A large step offers itself to all other
ranks at once: it takes them along if each is idle or comes with a small step that goes along, and else goes alone.
"""

import enum
from collections.abc import Callable
from typing import NamedTuple

Alive = Callable[[int], bool]


class State(enum.IntEnum):
    """What a rank's peers may expect of it."""

    AWAY = 0  # has not come yet, has left, or was waited for in vain: not waited for until it comes
    BUSY = 1  # its host has launched a step and comes again soon, or has a request and comes with its step soon
    WAITING = 2  # waits in the convoy with a step of its own
    LARGE = 3  # its device works on a large step, or on one that went alone and takes long
    IDLE = 4  # has no request: helps
    OFFERS = 5  # has a large step, which goes with all ranks or alone


class Answer(enum.Enum):
    GO = "go"
    WAIT = "wait"


GO, WAIT = Answer.GO, Answer.WAIT


class Round(NamedTuple):
    """A dispatched step: its number, counted from 1; the ranks that launch it; each rank's tokens, 0 unless it has a step of its own."""

    number: int
    members: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each rank's rows begin among the gathered ones, which follow each other."""
        return tuple(sum(self.tokens[:rank]) for rank in range(len(self.tokens)))

    @property
    def num_rows(self) -> int:
        return sum(self.tokens)

    @property
    def mask(self) -> int:
        return sum(1 << rank for rank in self.members)


class Record(NamedTuple):
    """What the ranks share: the last round's number and, by rank, state, tokens of its waiting step, and the round that it owes."""

    number: int
    states: tuple[State, ...]
    tokens: tuple[int, ...]
    due: tuple[Round | None, ...]


Outcome = tuple[Record, Round | Answer]


def start(size: int) -> Record:
    return Record(0, (State.AWAY,) * size, (0,) * size, (None,) * size)


def come(record: Record, rank: int) -> Outcome:
    """A new process has the place: what the one before it owed is forgotten."""
    return _enter(record._replace(due=_put(record.due, rank, None)), rank, State.AWAY), GO


def join(
    record: Record, rank: int, tokens: int, alive: Alive, ends_soon: Callable[[int], bool], goes_along: bool
) -> Outcome:
    """A step that is worth a convoy. WAIT: join again whenever the record changes, or give up.

    `ends_soon(rank)`: that rank's large step is expected to end while this step may wait for it. `goes_along`: with a large
    step that offers itself; one that does so in vain goes alone.
    """
    if record.due[rank]:
        return _launch(record, rank)
    if record.states[rank] is State.LARGE:  # its kernels would meet the peers only after the large step
        return record, GO
    for other, state in enumerate(record.states):
        if state is State.OFFERS and not goes_along:
            record = _enter(record, other, State.LARGE)
    record = record._replace(tokens=_put(record.tokens, rank, tokens))
    record = _depart(_enter(record, rank, State.WAITING), alive)
    if record.due[rank]:
        return _launch(record, rank)
    ending = any(state is State.LARGE and alive(r) and ends_soon(r) for r, state in enumerate(record.states))
    if ending or _waited_for(record, alive):
        return record, WAIT
    return _enter(record, rank, State.BUSY), GO


def give_up(record: Record, rank: int) -> Outcome:
    """Patience is over: whoever let this rank wait is not waited for until it comes again."""
    if record.due[rank]:
        return _launch(record, rank)
    states = tuple(State.AWAY if state is State.BUSY else state for state in record.states)
    return _enter(record._replace(states=states), rank, State.BUSY), GO


def large(
    record: Record, rank: int, tokens: int, alive: Alive, ends_soon: Callable[[int], bool], goes_along: bool
) -> Outcome:
    """A large step. It goes alone, or with every other rank if it offers its `tokens`. WAIT, for who comes soon: as in `join`.

    `goes_along`: small steps that wait already go with this one.
    """
    if record.due[rank]:
        return _launch(record, rank)

    def may_come(other: int, state: State) -> bool:
        if state is State.WAITING:
            return goes_along
        return state in (State.IDLE, State.BUSY) or (state is State.LARGE and ends_soon(other))

    others = [(other, state) for other, state in enumerate(record.states) if other != rank]
    if tokens and record.states[rank] is not State.LARGE and all(alive(r) and may_come(r, state) for r, state in others):
        made = _enter(record._replace(tokens=_put(record.tokens, rank, tokens)), rank, State.OFFERS)
        if (made := _depart(made, alive)).due[rank]:
            return _launch(made, rank)
        if any(state in (State.BUSY, State.LARGE) for _, state in others):
            return made, WAIT
    return _depart(_enter(record, rank, State.LARGE), alive), GO


def large_done(record: Record, rank: int) -> Outcome:
    """The device has finished every large step."""
    return (_enter(record, rank, State.BUSY) if record.states[rank] is State.LARGE else record), GO


def idle(record: Record, rank: int, alive: Alive) -> Outcome:
    """No request: lend the device. While a large step is on it, this changes nothing."""
    if record.due[rank]:
        return _launch(record, rank)
    if record.states[rank] is State.LARGE:
        return record, WAIT
    record = _depart(_enter(record, rank, State.IDLE), alive)
    return _launch(record, rank) if record.due[rank] else (record, WAIT)


def expect(record: Record, rank: int) -> Outcome:
    """A request has come, and its step comes soon: whoever comes meanwhile waits for it, and takes it along."""
    if record.due[rank]:
        return _launch(record, rank)
    return (record if record.states[rank] is State.LARGE else _enter(record, rank, State.BUSY)), GO


def leave(record: Record, rank: int, alive: Alive) -> Outcome:
    """This rank is busy with something else than steps: it is neither waited for nor counted on until it comes again."""
    if record.due[rank]:
        return _launch(record, rank)
    if record.states[rank] is State.LARGE:
        return record, GO
    return _depart(_enter(record, rank, State.AWAY), alive), GO


def _depart(record: Record, alive: Alive) -> Record:
    """Let the convoy leave if it can: its members owe the round and are busy until they have come for it."""
    states = record.states
    if _waited_for(record, alive):
        return record
    present = tuple(r for r, s in enumerate(states) if s in (State.WAITING, State.IDLE, State.OFFERS) and alive(r))
    members = present if len(present) == len(states) else tuple(r for r in present if states[r] is not State.OFFERS)
    tokens = tuple(t if r in members and states[r] is not State.IDLE else 0 for r, t in enumerate(record.tokens))
    if len(members) < 2 or not any(tokens):
        return record
    made = Round(record.number + 1, members, tokens)
    return record._replace(
        number=made.number,
        states=tuple(State.BUSY if r in members else s for r, s in enumerate(states)),
        due=tuple(made if r in members else d for r, d in enumerate(record.due)),
    )


def _waited_for(record: Record, alive: Alive) -> bool:
    return any(state is State.BUSY and alive(rank) for rank, state in enumerate(record.states))


def _launch(record: Record, rank: int) -> tuple[Record, Round]:
    """Hand over the round that a rank owes. The rank launches it before it comes again."""
    made = record.due[rank]
    assert made is not None
    return _enter(record._replace(due=_put(record.due, rank, None)), rank, State.BUSY), made


def _enter(record: Record, rank: int, state: State) -> Record:
    return record._replace(states=_put(record.states, rank, state))


def _put(row: tuple, rank: int, value: object) -> tuple:
    return (*row[:rank], value, *row[rank + 1 :])
