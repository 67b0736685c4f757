"""Numeric resources: a pool of units."""
import pytest
from engine_world import World


@pytest.fixture(params=["fair", "first-fit"])
def world(request):
    return World(request.param)


def test_units_are_taken_and_given_back(world):
    assert world.ask("A", "n[5]", quantity=2) == "A granted"
    assert world.ask("B", "n[5]", quantity=3) == "B granted"
    assert world.ask("C", "n[5]", wait=0) == "C busy"
    assert world.ask("C", "n[5]", quantity=4) == "C queued"
    assert world.release("A") == ""
    assert world.release("B") == "C granted"
    assert world.ask("D", "n[5]", wait=0) == "D granted"
    assert world.ask("E", "n[5]", wait=0) == "E busy"


def test_one_unit_is_the_default_and_modes_do_not_matter(world):
    assert world.ask("A", "n[2]", "NL") == "A granted"
    assert world.ask("B", "n[2]", "EX") == "B granted"
    assert world.ask("C", "n[2]", "NL") == "C queued"


def test_nothing_is_passed_to_the_command(world):
    world.ask("A", "n[2]")
    assert world.told[0].element is None


def test_nothing_partial(world):
    world.ask("A", "n[3]", quantity=2)
    assert world.ask("B", "n[3]", quantity=2) == "B queued"
    assert world.table.resources["n[3]"].free == 1


@pytest.mark.parametrize("wait", [0, 1])
def test_more_than_there_are_is_impossible_at_once(world, wait):
    assert world.ask("A", "n[2]", quantity=3, wait=wait) == "A impossible"
    assert world.table.empty()
    world.ask("B", "n[2]", quantity=2)
    assert world.ask("A", "n[2]", quantity=3, wait=wait) == "A impossible"
    assert world.ask("A", "n[2]", quantity=2) == "A queued"


@pytest.mark.parametrize("create", [0, 1])
@pytest.mark.parametrize("wait", [0, 1])
@pytest.mark.parametrize("name", ["n[0]", "n[000]"])
def test_a_pool_of_nothing_is_impossible_at_once(world, name, wait, create):
    assert world.ask("A", name, wait=wait, create=create) == "A impossible"
    assert world.table.empty()


def test_a_large_request_is_not_overtaken_by_small_ones():
    world = World()
    world.ask("A", "n[2]")
    assert world.ask("W", "n[2]", quantity=2) == "W queued"
    assert world.ask("B", "n[2]") == "B queued"
    assert world.ask("C", "n[2]", wait=0) == "C busy"
    assert world.release("A") == "W granted"
    assert world.release("W") == "B granted"


def test_a_large_request_that_leaves_lets_the_small_ones_go():
    world = World()
    world.ask("A", "n[3]", quantity=2)
    for session, quantity in zip("BCDE", (2, 1, 1, 1)):
        assert world.ask(session, "n[3]", quantity=quantity) == f"{session} queued"
    assert world.leave("B") == "C granted"
    assert world.release("A") == "D granted, E granted"


def test_first_fit_lets_small_ones_overtake():
    world = World("first-fit")
    world.ask("A", "n[2]")
    assert world.ask("W", "n[2]", quantity=2) == "W queued"
    assert world.ask("B", "n[2]") == "B granted"
    assert world.release("A") == ""
    assert world.ask("C", "n[2]", wait=0) == "C granted"


def test_first_fit_walks_the_whole_queue_in_order():
    world = World("first-fit")
    world.ask("A", "n[4]", quantity=4)
    for session, quantity in zip("BCDEF", (3, 2, 1, 1, 1)):
        world.ask(session, "n[4]", quantity=quantity)
    assert world.release("A") == "B granted, D granted"
    assert world.release("B") == "C granted, E granted"
    assert world.release("C") == "F granted"


@pytest.mark.parametrize("policy, holder", [("fair", "W"), ("first-fit", "49")])
def test_requests_for_one_that_never_stop_coming(policy, holder):
    world = World(policy)
    world.ask("0", "n[2]")
    world.ask("W", "n[2]", quantity=2)
    for number in range(1, 50):
        world.ask(str(number), "n[2]")
        if str(number - 1) in world.holders:
            world.release(str(number - 1))
    assert list(world.holders) == [holder]


def test_a_holder_may_ask_again_for_no_more_than_it_has(world):
    world.ask("A", "n[5]", quantity=3)
    assert world.ask("A", "n[5]", quantity=2) == "A granted"
    assert world.ask("A", "n[5]", quantity=3) == "A granted"
    assert world.ask("A", "n[5]", quantity=4) == "A busy"
    assert world.table.resources["n[5]"].free == 2
    world.release("A")
    assert world.table.resources["n[5]"].free == 5


def test_the_largest_pool(world):
    assert world.ask("A", "n[2147483647]", quantity=2147483647) == "A granted"
    assert world.ask("B", "n[2147483647]", wait=0) == "B busy"


def test_who_may_have_meant_one_pool_is_told_once(world):
    """While one of the pools is in use; names that differ otherwise are nobody's mistake."""
    sizes = world.table.sizes
    for name, client in (("n[5]", "A"), ("m[6]", "B"), ("n[6]", "C"), ("n", "D"), ("n[7]", "E")):
        world.ask(client, name)
    assert sizes.untold == [("n[5]", "n[6]"), ("n[5]", "n[7]")]
    sizes.untold.clear()
    world.release("C")
    world.later(10)
    assert "n[6]" not in world.table.resources
    world.ask("C", "n[6]")
    assert sizes.untold == []
    for client in "ACE":
        world.release(client)
    world.later(10)
    assert set(world.table.resources) == {"m[6]", "n"}
    world.ask("A", "n[5]")
    assert sizes.untold == []
    world.ask("C", "n[6]")
    assert sizes.untold == [("n[5]", "n[6]")]


def test_names_that_are_kept_have_an_end(world):
    for size in range(1, 2 * world.table.sizes.MOST):
        world.ask(f"A{size}", f"n[{size}]")
    assert len(world.table.sizes.untold) == world.table.sizes.MOST - 1
