"""Every state that small worlds can come into, kind by kind and under both policies.

A breadth-first search: from each state every move of every session, and of time, is tried.  States
are told apart by a key without names of sessions, since those are interchangeable.  A state is
reached by playing its moves again in a new world; while a move changes nothing the same world
serves for the next one.
"""
import collections

import pytest
from engine_world import (MICRO, MODES, NOON, VERDICTS, World, belongs_to, fits, kind, make_request,
                          size)

POLICIES = ["fair", "first-fit"]
ASK, RELEASE, LEAVE, LATER, SET = "ask", "release", "leave", "later", "set_clock"

Small = collections.namedtuple("Small", "asks sessions times sets most nested creates")


def small(*asks, sessions="ABC", times=(), sets=(), most=4, nested=False, creates=(0, 1)):
    """A small world.  asks: pairs of a name and what is asked of it, modes or quantities; most: the
    greatest value of a sequence with which it goes on; nested: commands run under locks."""
    return Small([(name, ask) for name, several in asks for ask in several], sessions, times, sets,
                 most, nested, creates)


def moves_of(world, small):
    """All that can happen next; of the sessions that are not there, one stands for all."""
    named = {ident for one in world.queue.values() for ident in one.parents}
    idle = [one for one in small.sessions if one not in world.table.requests and one not in named]
    waiting = [one for one in small.sessions if one in world.queue or one in world.parked]
    for session in idle[:1]:
        for under in unders(world, small):
            yield from ((ASK, session, name, ask, wait, create, under) for name, ask in small.asks
                        for wait in (0, 1) for create in small.creates)
    for session in waiting:
        yield from ((ASK, session, name, ask, 1, 1, "") for name, ask in small.asks)
        yield from ((ASK, session, name, ask, 0, 0, "") for name, ask in small.asks[:1])
    for session in world.holders:
        yield from ((RELEASE, session, True), (RELEASE, session, False), (LEAVE, session))
        yield from ((ASK, session, name, ask, 1, 1, "") for name, ask in small.asks[:2])
    yield from ((LEAVE, session) for session in waiting)
    yield from ((LATER, seconds) for seconds in small.times)
    yield from ((SET, seconds) for seconds in small.sets)
    yield (LATER, None)


def unders(world, small):
    """The ids under which the next command may run."""
    yield ""
    if small.nested:
        yield from (" ".join((holder.ident,) + holder.parents) for holder in world.holders.values())


def move_on(world, move):
    what, *details = move
    if what == ASK:
        world.send(request_of(move))
    elif move == (LATER, None):
        world.wait_for_date()
    else:
        getattr(world, what)(*details)


def request_of(move):
    _, session, name, ask, wait, create, under = move
    asked = {"mode": ask} if isinstance(ask, str) else {"quantity": ask}
    return make_request(session, name, wait=wait, create=create, under=under, **asked)


def play(world, move):
    """Makes a move and checks what follows from it."""
    expected = expected_of(world, move) if move[0] == ASK else None
    move_on(world, move)
    if expected is not None:
        told = [decision for decision in world.told if decision.session == move[1]]
        assert [VERDICTS[decision.verdict] for decision in told] == [expected]
    check(world)


def expected_of(world, move):
    """The verdict on a request, None for those that depend on what else is told."""
    request = request_of(move)
    name = belongs_to(request.name)
    if request.session in world.table.requests:
        return None
    if name not in world.table.resources and not request.create:
        return "parked" if request.wait else "absent"
    if kind(name) == "numeric" and request.quantity > size(name):
        return "impossible"
    if world.would_grant(request):
        return "granted"
    if not request.wait:
        return "busy"
    return "deadlock" if world.is_hopeless(request) else "queued"


def check(world):
    """What must be true of every state."""
    table, holders, waiters = world.table, list(world.holders.values()), list(world.queue.values())
    assert not world.silent
    assert not set(world.holders) & (set(world.queue) | set(world.parked))
    assert set(table.requests) == set(world.holders) | set(world.queue) | set(world.parked)
    for place, holder in enumerate(holders):
        before = [one for one in holders[:place] if belongs_to(one.name) == belongs_to(holder.name)]
        assert fits(holder, before), "two that exclude each other hold"
    for waiter in waiters:
        assert not world.would_grant(waiter), f"{waiter.session} waits, though it need not"
    for waiter in world.parked.values():
        assert belongs_to(waiter.name) not in table.resources
    for name, resource in table.resources.items():
        assert list(resource.holders) == [one.session for one in world.holders_of(name)]
        assert [one.session for one in resource.waiters()] == [
            one.session for one in world.queue_of(name)]
        CONSERVED.get(kind(name), lambda *_: None)(resource, world.holders_of(name))
    assert table.holding == len(holders) and table.waiting == len(waiters) + len(world.parked)
    world.check_memory()


def units_are_conserved(resource, holders):
    assert resource.free + sum(holder.quantity for holder in holders) == size(resource.name)


def slots_are_conserved(resource, holders):
    free = [label for label, is_free in zip(resource.name.split("."), resource.free) if is_free]
    assert sorted(free + [holder.element for holder in holders]) == sorted(resource.name.split("."))


def values_are_conserved(resource, holders):
    values = [int(holder.element) for holder in holders] + [int(one) for one in resource.returned]
    assert len(set(values)) == len(values) and all(0 < one < resource.next for one in values)
    assert resource.name.startswith("_S_") or not resource.returned


def nodes_are_needed(resource, holders):
    for root, users in ((resource.held, holders), (resource.queued, resource.waiters())):
        names, todo = [one.name + "/" for one in users], [(resource.name + "/", root)]
        while todo:
            name, node = todo.pop()
            assert node is root or any(one.startswith(name) for one in names), name
            assert sum(node.below.values()) == sum(one.startswith(name) for one in names), name
            todo += [(f"{name}{level}/", child) for level, child in node.children.items()]


CONSERVED = {"hierarchical": nodes_are_needed, "numeric": units_are_conserved,
             "set": slots_are_conserved, "sequence": values_are_conserved}


def key_of(world, small):
    """The state, without names of sessions and without anything that does not matter any more."""
    numbers = {session: number for number, session in enumerate(world.holders)}

    def about(one):
        above = tuple(numbers[ident] for ident in one.parents if ident in numbers)
        return one.name, one.mode, one.quantity, above

    found = [tuple(map(about, world.parked.values()))]
    for name, resource in sorted(world.table.resources.items()):
        holders = [about(one) + (one.element if kind(name) in ("set", "sequence") else "",)
                   for one in resource.holders.values()]
        numbered = [numbers[session] for session in resource.holders] if small.nested else None
        found.append((name, tuple(holders if small.nested else sorted(holders)), str(numbered),
                      tuple(map(about, resource.waiters())), state_of(world, name, resource)))
    return tuple(found)


def state_of(world, name, resource):
    """What a resource remembers beside its holders and waiters."""
    idle, clock = resource.idle_since, world.clock
    ahead = world.stamped.get(name)
    if ahead is not None:
        ahead = max(0, (ahead + 1) * MICRO - clock.local_micros)
    return (None if idle is None else round(idle - clock.mono, 3), ahead,
            tuple(getattr(resource, "returned", ())), getattr(resource, "next", None),
            tuple(resource.free) if kind(name) == "set" else None)


def explore(small, policy):
    """Goes everywhere; returns the number of states."""
    world = World(policy)
    seen, todo = {key_of(world, small)}, collections.deque([()])
    while todo:
        path = todo.popleft()
        world, tried = replay(path, policy), []
        here = key_of(world, small)
        for move in list(moves_of(world, small)):
            if world is None:
                world, tried = replay(path, policy), []
            tried.append(move)
            try:
                play(world, move)
                there = key_of(world, small)
                new = there not in seen and not is_far(world, small)
                if there != here and not undo(world, tried, here, small):
                    world = None
            except Exception as error:
                raise AssertionError(f"{policy}: {error!r} after {list(path) + tried}")
            if new:
                seen.add(there)
                todo.append(path + (move,))
        check_end(world or replay(path, policy), path)
    return len(seen)


def undo(world, tried, here, small):
    """Whether the one who came last has gone again, and all is as it was."""
    what, session, *_ = tried[-1]
    if what != ASK or len(world.told) != 1 or session not in world.table.requests:
        return False
    tried.append((LEAVE, session))
    move_on(world, tried[-1])
    return key_of(world, small) == here


def replay(path, policy):
    world = World(policy)
    for move in path:
        move_on(world, move)
    return world


def is_far(world, small):
    """Whether values, or the time that a clock was set back, have gone further than we look."""
    return any(getattr(resource, "next", 0) > small.most or world.clock.local_micros < NOON * MICRO
               for resource in world.table.resources.values())


def check_end(world, path):
    assert world.empty_after(5), f"something is left after {path}"
    assert not (world.table.holding or world.table.waiting or world.table.parked)


WORLDS = {
    "simple": small(("R", MODES)),
    "simple, two": small(("R", ["PR", "EX"]), ("Q", ["EX"])),
    "numeric": small(("n[3]", [1, 2, 3, 4])),
    "numeric, four": small(("n[2]", [1, 2]), sessions="ABCD"),
    "set": small(("A.B.C", [1])),
    "set, repeated": small(("A.B.A", [1]), sessions="ABCD"),
    "tree, all modes": small(*[(name, MODES) for name in ("/t", "/t/a", "/t/b")], sessions="AB",
                             creates=(1,)),
    "tree, branches": small(("/t", ["PR", "EX"]), ("/t/a", ["PR", "EX"]), ("/t/a/x", ["EX"]),
                            ("/t/b", ["EX"]), creates=(1,)),
    "tree, two": small(("/t/a", ["CW", "PW"]), ("/t", ["CW"]), ("/u/a", ["EX"])),
    "sequence": small(("_s_x[2]", [1])),
    "sequence, transactional": small(("_S_x[2]", [1]), sessions="ABCD"),
    "nested": small(("R", ["PR", "EX"]), ("Q", ["EX"]), sessions="ABCD", nested=True,
                    creates=(1,)),
    "nested, pool": small(("n[2]", [1]), ("Q", ["EX"]), sessions="ABCD", nested=True,
                          creates=(1,)),
    "timestamp": small(("_t_%S[2]", [1]), times=(0.25,), sets=(-1,), sessions="ABC"),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", WORLDS)
def test_everywhere(name, policy):
    assert explore(WORLDS[name], policy) > 10
