"""Invariant: ranks agree on every round, owe nothing when they launch, and wait only for who will come: over all interleavings.

The world below is what really happened; it knows nothing of the record. Every rank does, in every order, whatever an engine may
do: join, wait, lose patience, launch a large step and see it end, help, get a request, leave, die. After each operation the record's
answer is held against the world. Runs have no length: round numbers count from the last round, so the states are finitely many.
"""

import inspect
import random
import types
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from vllm_dwdp import convoy


class World(NamedTuple):
    record: convoy.Record
    does: tuple  # by rank: "run", "wait", "help", "offer", "declined", "dead", or ("again", what it came for) after a helper round
    loaded: tuple  # a large step is on its device
    comes: tuple  # a small step or an operation is behind it, and it was not waited for in vain since
    owes: tuple  # the round that it was taken into and has not launched
    tokens: tuple  # of the step that it came with
    deaths: int  # that may still happen


class Wrong(AssertionError):
    pass


def check(condition: object, what: str) -> None:
    if not condition:
        raise Wrong(what)


def put(row: tuple, rank: int, value: object) -> tuple:
    return (*row[:rank], value, *row[rank + 1 :])


def first(rules: types.ModuleType, size: int, deaths: int) -> World:
    no = (False,) * size
    return World(rules.start(size), ("run",) * size, no, no, (None,) * size, (0,) * size, deaths)


def actions(world: World, sizes: tuple[int, ...]) -> Iterator[tuple]:
    """Everything that may happen next: (rank, what, tokens, and whether large steps end soon and small ones go along)."""
    for rank, does in enumerate(world.does):
        if does == "dead":
            continue
        others = [r for r in range(len(world.does)) if r != rank]
        may_end = any(world.loaded[r] or world.does[r] == "declined" for r in others)
        may_go = any(world.does[r] in ("offer", "wait") for r in others)
        guesses = [(soon, along) for soon in (False, True)[: 1 + may_end] for along in (False, True)[: 1 + may_go]]
        if isinstance(does, tuple):
            yield rank, *does[1]
        elif does == "wait":
            yield from ((rank, "join", world.tokens[rank], *guess) for guess in guesses)
            yield rank, "give_up", 0
        elif does in ("offer", "declined"):
            yield from ((rank, "large", tokens, *guess) for tokens in (0, world.tokens[rank]) for guess in guesses)
        else:
            yield from ((rank, "join", tokens, *guess) for tokens in sizes for guess in guesses)
            yield from ((rank, "large", tokens, *guess) for tokens in sizes for guess in guesses)
            yield rank, "large", 0, False, False
            yield from ((rank, what, 0) for what in ("idle", "leave", "expect"))
        if world.loaded[rank] or does == "help":
            yield rank, "large_done", 0
        if world.deaths:
            yield rank, "die", 0


def act(rules: types.ModuleType, world: World, action: tuple) -> World:
    rank, what, tokens, *guess = action
    soon, along = guess or (False, False)
    if what == "die":
        return world._replace(does=put(world.does, rank, "dead"), owes=put(world.owes, rank, None), deaths=world.deaths - 1)
    again, alive = isinstance(world.does[rank], tuple), lambda r: world.does[r] != "dead"
    before, given = world.record, {"give_up": (), "large_done": (), "expect": ()}
    for step in ("join", "large"):
        given[step] = tokens, alive, lambda r: soon, along
    give = given.get(what, (alive,))
    record, answer = getattr(rules, what)(before, rank, *give)
    if what == "large_done" and not world.loaded[rank]:
        check(record == before, "a large step ends that never began")
        return world
    # in the world as it was when the rank came
    others = [r for r in range(len(world.does)) if r != rank]
    present = [r for r in others if not world.owes[r] and (world.does[r] == "help" or (world.does[r] == "wait" and along))]
    coming = [r for r in others if world.does[r] != "dead" and (
        (soon and (world.loaded[r] or world.does[r] == "declined") and not world.owes[r]) or (
            world.comes[r] and not world.loaded[r]
            and (world.owes[r] or world.does[r] == "run" or isinstance(world.does[r], tuple))))]
    offers = what == "large" and tokens and not world.loaded[rank] and not world.owes[rank] and world.does[rank] != "declined"
    helped, waits = offers and len(present) == len(others), offers and coming and len({*present, *coming}) == len(others)
    does = put(world.does, rank, {"join": "wait", "give_up": "wait", "idle": "help", "large": "wait" if helped else "run"}.get(what, "run"))
    loaded = put(world.loaded, rank, False) if what == "large_done" else world.loaded
    comes, owes = world.comes, world.owes
    said = put(world.tokens, rank, tokens) if what == "join" or helped or waits else world.tokens
    if what == "join" and not world.owes[rank] and not world.loaded[rank] and not along:
        does = tuple("declined" if d == "offer" and not o else d for d, o in zip(does, world.owes, strict=True))
    everyone = [r for r in range(len(does)) if does[r] != "dead"]
    if record.number != before.number:
        made = {d for d in (*record.due, answer) if isinstance(d, rules.Round) and d.number == record.number}
        check(len(made) == 1, "two accounts of one round")
        made = made.pop()
        check(record.number == before.number + 1, "a round's number is left out")
        check(len(made.members) > 1, "a convoy of one")
        check(not any(world.owes[r] for r in made.members), "a rank is taken while it owes")
        check(all(r in everyone and does[r] in ("wait", "help", "offer") for r in made.members), "a rank is taken that does not come")
        large = [r for r in made.members if does[r] == "offer" or (r == rank and helped)]
        check(not large or (len(large) == 1 and len(made.members) == len(does)), "a large step goes with some, or with another")
        check(not any(loaded[r] for r in made.members), "a rank is taken while its device is in a large step")
        check(
            all(r in made.members or loaded[r] or not comes[r] for r in everyone if r != rank or what == "join"),
            "a rank that comes soon is left out",
        )
        check(all(r in made.members or loaded[r] or world.owes[r] for r in everyone if does[r] == "help"), "an idle rank is left out")
        own = tuple(said[r] if r in made.members and does[r] in ("wait", "offer") else 0 for r in range(len(does)))
        check(made.tokens == own and any(own), "wrong tokens")
        owes = tuple(made if r in made.members else o for r, o in enumerate(owes))
        comes = tuple(c or r in made.members for r, c in enumerate(comes))
    if isinstance(answer, rules.Round):
        check(owes[rank] == answer, "a round is launched by who is not in it, or twice")
        check(not (again and answer.tokens[rank] == 0), "a second helper round before the rank's own step")
        owes, comes = put(owes, rank, None), put(comes, rank, True)
        own = answer.tokens[rank] > 0 or what == "idle"
        does = put(does, rank, "run" if own else ("again", (what, tokens, *guess)))
        offered = what == "large" and world.does[rank] == "offer"
        check(what in ("join", "give_up") or helped or offered or not answer.tokens[rank], "a step is launched that was not come for")
    else:
        check(owes[rank] is None, "a rank goes on while it owes a round")
        check(answer is rules.GO or what in ("join", "idle") or waits, "a large step waits for who does not come")
        check(not helped, "a large step goes alone beside who takes part")
        check(not waits or answer is rules.WAIT, "a large step does not wait for who comes soon")
        if waits:
            does = put(does, rank, "offer")
        elif what == "large":
            loaded = put(loaded, rank, True)
        if what == "idle":
            does = put(does, rank, "run" if loaded[rank] else "help")
        elif what == "join" and answer is rules.WAIT:
            check(any((comes[r] and not loaded[r] and does[r] in ("run", "wait")) or isinstance(does[r], tuple) or owes[r]
                      or ((loaded[r] or does[r] == "declined") and soon) for r in everyone if r != rank), "waits for nobody who comes")
            comes = put(comes, rank, True)
        elif waits:
            comes = put(comes, rank, False)
        else:
            company = [r for r in everyone if r != rank and does[r] in ("wait", "help") and not owes[r]]
            check(what != "join" or loaded[rank] or not company, "goes alone beside who would take part")
            ending = [r for r in everyone if r != rank and loaded[r] and what == "join" and soon]
            check(loaded[rank] or not ending, "goes alone before a large step that ends soon")
            does = put(does, rank, "run" if what != "large_done" else world.does[rank])
            comes = put(comes, rank, what != "leave" or loaded[rank])
        if what == "give_up":
            offers = [does[r] in ("wait", "help") and not owes[r] for r in range(len(does))]
            comes = tuple(c and (r == rank or offers[r]) for r, c in enumerate(comes))
    after = World(record, does, loaded, comes, owes, said, world.deaths)
    check(all(record.due[r] == owes[r] for r in everyone), "the record forgot who owes what")
    if record != before:
        waits = [r for r in everyone if does[r] == "wait" and not owes[r]]
        helps = [r for r in everyone if does[r] == "help" and not owes[r]]
        asks = [r for r in everyone if does[r] == "offer" and not owes[r]]
        check(len(asks) != 1 or len(asks + waits + helps) < len(does), "all ranks could leave and do not")
        rest = [r for r in everyone if r not in waits + helps]
        ready = waits and len(waits + helps) > 1 and all(loaded[r] or not comes[r] for r in rest)
        check(not ready, "a convoy could leave and does not")
    return after


def without_history(world: World) -> World:
    """Only the order of the rounds still owed counts, not their numbers, nor what nobody will read; nor which rank is which."""
    size, dead = len(world.does), [does == "dead" for does in world.does]
    due = tuple(None if d else r for d, r in zip(dead, world.record.due, strict=True))
    order = sorted({r.number for r in due if r}, reverse=True)
    back = lambda rounds: tuple(r and r._replace(number=-order.index(r.number)) for r in rounds)  # noqa: E731
    record = world.record._replace(number=0, due=back(due))
    said = tuple(t if d in ("wait", "offer", "declined") else 0 for t, d in zip(world.tokens, world.does, strict=True))
    loaded, comes = ([x and not dead[r] for r, x in enumerate(row)] for row in (world.loaded, world.comes))
    world = world._replace(record=record, owes=back(world.owes), tokens=said, loaded=tuple(loaded), comes=tuple(comes))
    keys = [(str(world.does[r]), record.states[r], loaded[r], comes[r], said[r], bool(due[r])) for r in range(size)]
    to = sorted(range(size), key=keys.__getitem__)  # rank to[i] is called i
    move = lambda row: tuple(row[r] for r in to)  # noqa: E731
    turn = lambda r: r and r._replace(members=tuple(sorted(map(to.index, r.members))), tokens=move(r.tokens))  # noqa: E731
    rounds = tuple(turn(r) for r in move(record.due))
    record = record._replace(states=move(record.states), tokens=move(record.tokens), due=rounds)
    owes = tuple(turn(r) for r in move(world.owes))
    return World(record, *(move(row) for row in (world.does, world.loaded, world.comes)), owes, move(world.tokens), world.deaths)


def explore(rules: types.ModuleType, size: int, deaths: int, tokens: tuple[int, ...] = (3,), limit: int = 10**6) -> int:
    """Every reachable world; how many there are."""
    start = first(rules, size, deaths)
    seen, queue = {start}, deque([start])
    while queue and len(seen) < limit:
        world = queue.popleft()
        for action in actions(world, tokens):
            try:
                after = without_history(act(rules, world, action))
            except Wrong as wrong:
                raise Wrong(f"{wrong}: {action} in {world}") from None
            if after not in seen:
                seen.add(after)
                queue.append(after)
    return len(seen)


@pytest.mark.parametrize(("size", "deaths", "tokens"), [(2, 1, (3, 5)), pytest.param(3, 1, (3,), marks=pytest.mark.slow)])
def test_every_interleaving(size: int, deaths: int, tokens: tuple[int, ...]) -> None:
    """Two ranks and three, runs of any length, a death at any point."""
    states = explore(convoy, size, deaths, tokens)
    print(f"{size} ranks: {states} states")
    assert states > 100


def test_a_helper_may_die_at_any_look() -> None:
    """A rule looks more than once whether a rank lives."""
    record = convoy.idle(convoy.start(2), 1, lambda _: True)[0]
    for looks in range(4):
        seen = iter(range(looks))
        after, answer = convoy.large(
            record, 0, 3, lambda rank, seen=seen: rank == 0 or next(seen, None) is not None, lambda _: False, False)
        assert after.number == (1 if isinstance(answer, convoy.Round) else 0)
        assert after.number or (answer is convoy.GO and after.states[0] is convoy.State.LARGE)


def test_four_ranks_at_random() -> None:
    """Four ranks, long random runs with up to two deaths."""
    for seed in range(60):
        rng, world = random.Random(seed), first(convoy, 4, 2)
        for _ in range(400):
            choices = [a for a in actions(world, (3, 5)) if a[1] != "die" or rng.random() < 0.01]
            what = rng.choice(sorted({a[:2] for a in choices}))
            world = act(convoy, world, rng.choice([a for a in choices if a[:2] == what]))
        assert world.record.number > 5


OWED = "    if record.due[rank]:\n        return _launch(record, rank)\n"
LOADED = "    if record.states[rank] is State.LARGE:"
LEAVES = "record = _depart(_enter(record, rank, State.IDLE), alive)"


@pytest.mark.parametrize(
    ("within", "rule", "without"),
    [
        ("join", OWED, ""),
        ("give_up", OWED, ""),
        ("large", OWED, ""),
        ("large", "record.states[rank] is not State.LARGE and ", ""),
        ("large", "alive(r) and ", ""),
        ("large", "return goes_along", "return True"),
        ("large", "return goes_along", "return False"),
        ("large", "(State.IDLE, State.BUSY)", "(State.IDLE,)"),
        ("large", "(State.IDLE, State.BUSY)", "(State.BUSY,)"),
        ("large", " and ends_soon(other)", ""),
        ("large", " or (state is State.LARGE and ends_soon(other))", ""),
        ("large", "rank, State.OFFERS", "rank, State.WAITING"),
        ("large", "return made, WAIT", "return record, WAIT"),
        ("join", "state is State.OFFERS and not goes_along", "False"),
        ("join", " and not goes_along", ""),
        ("large", "_put(record.tokens, rank, tokens)", "record.tokens"),
        ("idle", OWED, ""),
        ("join", LOADED, "    if False:"),
        ("idle", LOADED, "    if False:"),
        ("expect", OWED, ""),
        ("expect", "_enter(record, rank, State.BUSY)", "record"),
        ("expect", "record if record.states[rank] is State.LARGE else ", ""),
        ("leave", OWED, ""),
        ("leave", LOADED, "    if False:"),
        ("leave", "_depart(_enter(record, rank, State.AWAY), alive)", "_enter(record, rank, State.AWAY)"),
        ("leave", "State.AWAY", "State.BUSY"),
        ("join", "ending or _waited_for(record, alive)", "True"),
        ("join", "ending or ", ""),
        ("join", " and ends_soon(r)", ""),
        ("join", "alive(r) and ", ""),
        ("join", "_depart(_enter(record, rank, State.WAITING), alive)", "_enter(record, rank, State.WAITING)"),
        ("join", "return _enter(record, rank, State.BUSY), GO", "return record, GO"),
        ("join", "_put(record.tokens, rank, tokens)", "record.tokens"),
        ("give_up", "State.AWAY if state is State.BUSY else state", "state"),
        ("give_up", "return _enter(record._replace(states=states), rank, State.BUSY)", "return record._replace(states=states)"),
        ("large", "_depart(_enter(record, rank, State.LARGE), alive)", "_enter(record, rank, State.LARGE)"),
        ("large", "_enter(record, rank, State.LARGE), alive), GO", "_enter(record, rank, State.BUSY), alive), GO"),
        ("large_done", "(_enter(record, rank, State.BUSY) if record.states[rank] is State.LARGE else record)", "record"),
        ("large_done", "if record.states[rank] is State.LARGE else record", ""),
        ("idle", LEAVES, "record = _enter(record, rank, State.IDLE)"),
        ("_depart", "_waited_for(record, alive)", "False"),
        ("_depart", "present if len(present) == len(states) else ", ""),
        ("_depart", " if states[r] is not State.OFFERS", ""),
        ("_depart", " and alive(r)", ""),
        ("_depart", "(State.WAITING, State.IDLE, State.OFFERS)", "(State.WAITING, State.OFFERS)"),
        ("_depart", "len(members) < 2 or ", ""),
        ("_depart", " or not any(tokens)", ""),
        ("_depart", " and states[r] is not State.IDLE", ""),
        ("_depart", "State.BUSY if r in members else s", "s"),
        ("_depart", "record.number + 1", "record.number"),
        ("_waited_for", " and alive(rank)", ""),
        ("_launch", "record._replace(due=_put(record.due, rank, None))", "record"),
    ],
)
def test_every_rule_is_needed(within: str, rule: str, without: str) -> None:
    """Any one rule taken away, and the checker says what goes wrong."""
    function = inspect.getsource(getattr(convoy, within))
    assert rule in function
    source = inspect.getsource(convoy).replace(function, function.replace(rule, without, 1))
    rules = types.ModuleType("rules")
    exec(source, rules.__dict__)
    with pytest.raises((Wrong, AssertionError)):
        for size, tokens in ((2, (3, 5)), (3, (3,))):
            explore(rules, size, 1, tokens, limit=20_000)
