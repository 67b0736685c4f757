"""Hierarchical resources: a request is compatible with its node, those above and those below."""
import pytest
from engine_world import World


@pytest.fixture(params=["fair", "first-fit"])
def world(request):
    return World(request.param)


def nodes(world, name="/srv"):
    """How many nodes of the tree holders or waiters stand on or below."""
    resource = world.table.resources[name]
    found, todo = {""}, [("", resource.held), ("", resource.queued)]
    while todo:
        path, node = todo.pop()
        found.add(path)
        todo += [(f"{path}/{level}", child) for level, child in node.children.items()]
    return len(found)


def test_ancestors_and_descendants_count_and_siblings_do_not(world):
    assert world.ask("A", "/srv/db/orders") == "A granted"
    for name in ("/srv", "/srv/db", "/srv/db/orders", "/srv/db/orders/1", "/srv/db/orders/1/2"):
        assert world.ask("B", name, "PR", wait=0) == "B busy"
    for number, name in enumerate(("/srv/web", "/srv/db/items", "/srv/orders", "/srv/db/order",
                                   "/srv/db/orders2", "/srv2", "/srv3/db/orders")):
        assert world.ask(f"S{number}", name, wait=0) == f"S{number} granted"


def test_no_intention_modes(world):
    assert world.ask("A", "/t/a", "CR") == "A granted"
    assert world.ask("B", "/t", "EX", wait=0) == "B busy"
    assert world.ask("B", "/t", "PW", wait=0) == "B granted"
    assert world.ask("C", "/t/a/x", "PR", wait=0) == "C busy"
    assert world.ask("C", "/t/a/x", "CR", wait=0) == "C granted"


def test_holders_on_three_levels(world):
    assert world.ask("A", "/t", "PR") == "A granted"
    assert world.ask("B", "/t/a", "PR") == "B granted"
    assert world.ask("C", "/t/a/x", "PR") == "C granted"
    assert world.ask("W", "/t/a", "EX") == "W queued"
    assert world.release("B") == world.release("C") == ""
    assert world.release("A") == "W granted"


def test_all_below_must_have_gone(world):
    for number in range(5):
        world.ask(f"S{number}", f"/t/{number}/deep/down")
    assert world.ask("W", "/t") == "W queued"
    assert [world.leave(f"S{number}") for number in range(4)] == [""] * 4
    assert world.leave("S4") == "W granted"


def test_one_queue_for_each_first_level():
    world = World()
    world.ask("A", "/t/a")
    world.ask("B", "/t/a")
    world.ask("C", "/t/b")
    world.ask("D", "/t/b")
    assert world.told[0].position == 2
    world.ask("E", "/u/b")
    world.ask("F", "/u/b")
    assert world.told[0].position == 1
    assert world.release("C") == "D granted"
    assert world.release("A") == "B granted"


def test_a_waiter_for_the_whole_tree_is_not_overtaken_on_any_branch():
    world = World()
    world.ask("A", "/t/a")
    assert world.ask("W", "/t") == "W queued"
    assert world.ask("B", "/t/b") == "B queued"
    assert world.ask("C", "/t/b", "NL") == "C granted"
    assert world.release("A") == "W granted"
    assert world.release("W") == "B granted"


def test_a_waiter_on_one_branch_does_not_delay_another():
    world = World()
    world.ask("A", "/t/a")
    assert world.ask("W", "/t/a") == "W queued"
    assert world.ask("B", "/t/b") == "B granted"
    assert world.ask("C", "/t/a/x", wait=0) == "C busy"


def test_first_fit_overtakes_on_branches():
    world = World("first-fit")
    world.ask("A", "/t/a")
    assert world.ask("W", "/t") == "W queued"
    assert world.ask("B", "/t/b") == "B granted"
    assert world.release("A") == ""
    assert world.release("B") == "W granted"


def test_a_waiter_that_leaves_unblocks_its_branches():
    world = World()
    world.ask("A", "/t/a", "PR")
    world.ask("W", "/t", "EX")
    for session, name in zip("BCDE", ("/t/a/x", "/t/b", "/t", "/t/b")):
        world.ask(session, name, "PR" if session != "E" else "EX")
    assert world.leave("W") == "B granted, C granted, D granted"
    assert world.release("C") == world.release("A") == world.release("B") == ""
    assert world.release("D") == "E granted"


def test_grants_of_one_release_come_in_order_of_arrival_whatever_the_node(world):
    world.ask("A", "/t")
    for number, name in enumerate(("/t/b/y", "/t/a", "/t/c", "/t/b/x", "/t/a/z")):
        world.ask(f"S{number}", name)
    assert world.release("A") == "S0 granted, S1 granted, S2 granted, S3 granted"


def test_release_is_by_session_and_not_by_name(world):
    world.ask("A", "/k/1")
    world.ask("B", "/k/2")
    world.ask("C", "/k/2")
    assert world.leave("B") == "C granted"
    assert world.leave("C") == ""
    assert world.ask("D", "/k", wait=0) == "D busy"
    assert world.leave("A") == ""
    assert world.ask("D", "/k", wait=0) == "D granted"


def test_create_and_lifespan_concern_the_first_level(world):
    assert world.ask("A", "/t/a", create=0) == "A parked"
    assert world.ask("B", "/t/b", create=0, wait=0) == "B absent"
    assert world.ask("C", "/t/c", lifespan=5000) == "C granted, A granted"
    assert world.ask("B", "/t/b/x", create=0, wait=0) == "B granted"
    for session in "ABC":
        world.release(session)
    world.later(4.9)
    assert world.ask("A", "/t/other", create=0) == "A granted"


def test_nodes_that_nobody_uses_are_removed(world):
    world.ask("H", "/srv", "NL")
    for session, name in zip("ABC", ("/srv/a/b/c", "/srv/a/b/d", "/srv/a")):
        world.ask(session, name)
    assert [world.table.resources["/srv"].waiting, nodes(world)] == [1, 5]
    world.leave("A")
    assert nodes(world) == 4
    world.leave("B")
    assert nodes(world) == 2
    world.leave("C")
    assert nodes(world) == 1


def test_nodes_of_waiters_that_leave_are_removed(world):
    world.ask("H", "/srv", "EX")
    for session, name in zip("ABC", ("/srv/a/b/c", "/srv/a/b/d", "/srv/a")):
        assert world.ask(session, name) == f"{session} queued"
    assert nodes(world) == 5
    for session in "BCA":
        world.leave(session)
    assert nodes(world) == 1


def test_refused_requests_leave_no_nodes(world):
    world.ask("H", "/srv", "EX")
    for number in range(100):
        world.ask("B", f"/srv/{number}/x", wait=0)
    assert nodes(world) == 1


def test_nothing_is_left_of_a_tree_after_its_lifespan(world):
    for number in range(10):
        world.ask(f"S{number}", f"/srv/{number % 3}/{number % 2}")
    assert world.empty_after(3)


def test_levels_may_hold_nearly_anything(world):
    names = ["/a b/.", "/a b/./..", "/a b/&<>\"'", "/a b/\xe9\u20ac", "/a b/[3]", "/a b/_s_x[1]"]
    for number, name in enumerate(names):
        expected = "queued" if number == 1 else "granted"
        assert world.ask(f"S{number}", name) == f"S{number} {expected}"


def test_a_prefix_of_a_level_is_another_level(world):
    assert world.ask("A", "/t/ab") == "A granted"
    assert world.ask("B", "/t/a") == "B granted"
    assert world.ask("C", "/tt") == "C granted"
