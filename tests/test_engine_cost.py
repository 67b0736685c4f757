"""What the engine's work costs, counted in lines that are run: the same for few and for many."""
import pytest
from engine_world import World, belongs_to, lines, make_request

FEW, MANY = 60, 4260  # the same waiter in the middle of each crowd, of up to five sorts
POLICIES = ["fair", "first-fit"]


def costs(world, name, mode="EX", **details):
    """The lines that it takes to refuse and to queue one more, to leave from the middle and from
    the end of the queue, and, four times, to hand over."""
    table, clock = world.table, world.clock
    waiters = list(world.queue)
    found = [lines(table.request, make_request("X", name, mode, wait=0, **details), clock),
             lines(table.request, make_request("Y", name, mode, **details), clock),
             lines(table.gone, waiters[len(waiters) // 2], clock),
             lines(table.gone, "Y", clock)]
    for _ in range(4):
        holder = next(iter(table.resources[belongs_to(name)].holders))
        found.append(lines(table.release, holder, True, clock))
    return found


def crowd(policy, asks, count):
    """A world in which sessions make these asks, (name, details), one after the other and again."""
    world = World(policy)
    for number in range(count):
        name, details = asks[number % len(asks)]
        world.ask(f"S{number}", name, **details)
    return world


CROWDS = {
    "one writer at a time": [("R", {})],
    "readers and writers": [("R", {"mode": mode}) for mode in ("EX", "PR", "PR")],
    "all modes": [("R", {"mode": mode}) for mode in ("EX", "PW", "CR", "CW", "PR")],
    "units": [("n[3]", {"quantity": quantity}) for quantity in (3, 1, 2)],
    "slots": [("A.B.C", {})],
    "values": [("_s_x[2]", {})],
    "values that come back": [("_S_x[2]", {})],
    "a node": [("/t/a", {})],
    "a node and those above and below": [(name, {}) for name in ("/t/a", "/t", "/t/a/x")],
}


@pytest.mark.parametrize("name, policy", [
    (name, policy) for policy in POLICIES for name, asks in CROWDS.items()
    if policy == "fair" or "mode" not in asks[0][1]])  # or too many are granted at once
def test_nothing_costs_more_when_many_wait(name, policy):
    asks = CROWDS[name]
    few, many = (costs(crowd(policy, asks, count), asks[0][0], **asks[0][1])
                 for count in (FEW, MANY))
    assert few == many


@pytest.mark.parametrize("policy", POLICIES)
def test_timestamps_cost_no_more_when_many_wait(policy):
    found = []
    for count in (FEW, MANY):
        world = crowd(policy, [("_t_%S[5000]", {})], count)
        world.clock.move(10 ** 6)
        found.append([lines(world.table.expire, world.clock),
                      lines(world.table.gone, f"S{count // 2}", world.clock)])
    assert found[0] == found[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_waiters_on_other_branches_cost_nothing(policy):
    found = []
    for count in (FEW, MANY):
        world = crowd(policy, [("/t/b", {})] + [(f"/t/b/{number}/x", {}) for number in range(count)]
                      + [("/t/c/x", {}), ("/t/c", {})], 2 * count)
        for session in "HVW":
            world.ask(session, "/t/a/x")
        assert list(world.queue)[-2:] == ["V", "W"]
        found.append([lines(world.table.request, make_request("Y", "/t/a"), world.clock),
                      lines(world.table.gone, "V", world.clock),
                      lines(world.table.release, "H", True, world.clock),
                      lines(world.table.request, make_request("Z", "/t/d"), world.clock)])
    assert found[0] == found[1]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("waiters", [0, 1])
def test_holders_below_cost_nothing(policy, waiters):
    found = []
    for count in (FEW, MANY):
        world = crowd(policy, [(f"/t/{number}", {"mode": "CR"}) for number in range(count)], count)
        world.ask("H", "/t", "PR")
        for _ in range(waiters):
            world.ask("W", "/t/a", "PW")
        assert len(world.queue) == waiters
        found.append(lines(world.table.release, "H", True, world.clock))
    assert found[0] == found[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_units_in_any_number_cost_nothing(policy):
    found = []
    for count in (FEW, MANY):
        world = World(policy)
        world.ask("H", "n[9000]", quantity=8999)
        world.ask("I", "n[9000]")
        for number in range(count):
            world.ask(f"S{number}", "n[9000]", quantity=number + 2)
        found.append([lines(world.table.release, "I", True, world.clock),
                      lines(world.table.gone, f"S{count // 2}", world.clock)])
    assert found[0] == found[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_other_resources_cost_nothing(policy):
    found = []
    for count in (20, 2000):
        world = crowd(policy, [(f"R{number}", {}) for number in range(count)], 8 * count)
        for number in range(count):
            world.ask(f"P{number}", f"Q{number}", create=0)
        found.append(costs(world, "R0") + [lines(world.table.expire, world.clock)])
    assert found[0] == found[1]


def test_waiters_that_are_granted_together_cost_each_the_same():
    found = []
    for count in (100, 200, 300):
        world = crowd("fair", [("R", {"mode": "PR"})], 0)
        world.ask("H", "R")
        for number in range(count):
            world.ask(f"S{number}", "R", "PR")
        found.append(lines(world.table.release, "H", True, world.clock))
    assert found[1] - found[0] == found[2] - found[1]


# Nested requests

def test_nested_waiters_cost_nothing():
    found = []
    for count in (FEW, MANY):
        world = crowd("fair", [(f"Q{number}", {}) for number in range(count)], count)
        world.ask("H", "R")
        for number in range(count):
            world.table.request(make_request(f"N{number}", "R", under=f"S{number}"), world.clock)
        world.ask("P", "P")
        nested = make_request("N", "R", under="P")
        found.append([lines(world.table.request, nested, world.clock),
                      lines(world.table.gone, f"N{count // 2}", world.clock),
                      lines(world.table.release, "H", True, world.clock)])
    assert found[0] == found[1]


@pytest.mark.parametrize("name, mode, other", [("R", "PR", "EX"), ("/t/a", "PR", "EX"),
                                               ("n[9]", "EX", "EX")])
def test_it_costs_nothing_to_pass_many(name, mode, other):
    found = []
    for count in (FEW, MANY):
        world = World()
        world.ask("A", name, mode)
        for number in range(count):
            world.ask(f"S{number}", name, other, quantity=9 if "[" in name else 1)
        nested = make_request("N", name, mode, under="A")
        found.append(lines(world.table.request, nested, world.clock))
        assert "N" in world.table.resources[belongs_to(name)].holders
    assert found[0] == found[1]


def test_the_search_for_a_deadlock_costs_for_each_waiter_the_same():
    found = []
    for count in (200, 400, 600):
        world = World()
        for session, name, under in (("A", "R", ""), ("B", "Q", ""), ("a", "Q", "A")):
            world.ask(session, name, under=under)
        for number in range(count):
            world.ask(f"S{number}", "R")
        nested = make_request("b", "R", under="B")
        found.append(lines(world.table.request, nested, world.clock))
        assert "b" not in world.table.requests
    assert found[1] - found[0] == found[2] - found[1]
