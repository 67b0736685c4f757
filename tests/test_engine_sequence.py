"""Sequences: N holders at once, each with the next value."""
import pytest
from engine_world import World

GREATEST = 4294967295


@pytest.fixture(params=["fair", "first-fit"])
def world(request):
    return World(request.param)


def value(world, name, committed=True):
    """The value of a grant that is released at once."""
    text = world.ask("next", name).split()[2]
    world.release("next", committed)
    return int(text)


def test_values_count_from_one(world):
    assert [value(world, "_s_a[1]") for _ in range(5)] == [1, 2, 3, 4, 5]


def test_the_number_limits_the_holders_and_not_the_value(world):
    for session, expected in zip("AB", (1, 2)):
        assert world.ask(session, "_s_a[2]") == f"{session} granted {expected}"
    assert world.ask("C", "_s_a[2]", wait=0) == "C busy"
    assert world.ask("C", "_s_a[2]") == "C queued"
    assert world.ask("D", "_s_a[2]") == "D queued"
    assert world.release("A") == "C granted 3"
    assert world.leave("B") == "D granted 4"


def test_values_are_assigned_at_the_grant(world):
    world.ask("A", "_s_a[1]")
    world.ask("B", "_s_a[1]")
    world.ask("C", "_s_a[1]")
    assert world.leave("B") == ""
    assert world.release("A") == "C granted 2"


@pytest.mark.parametrize("end", ["committed", "rolled back", "gone"])
def test_a_value_that_is_not_transactional_is_never_used_again(world, end):
    for expected in range(1, 6):
        assert world.ask("A", "_s_a[1]") == f"A granted {expected}"
        world.leave("A") if end == "gone" else world.release("A", end == "committed")


def test_a_committed_value_is_never_used_again(world):
    assert [value(world, "_S_a[1]") for _ in range(5)] == [1, 2, 3, 4, 5]


def test_a_value_that_is_rolled_back_comes_next(world):
    assert [value(world, "_S_a[1]", committed=False) for _ in range(3)] == [1, 1, 1]
    assert [value(world, "_S_a[1]") for _ in range(3)] == [1, 2, 3]


def test_a_holder_that_is_gone_returns_its_value(world):
    world.ask("A", "_S_a[1]")
    world.leave("A")
    assert world.ask("B", "_S_a[1]") == "B granted 1"


def test_the_value_goes_to_the_one_that_waits(world):
    world.ask("A", "_S_a[1]")
    world.ask("B", "_S_a[1]")
    assert world.release("A", committed=False) == "B granted 1"


def test_a_waiter_that_is_gone_returns_nothing(world):
    world.ask("A", "_S_a[1]")
    world.ask("B", "_S_a[1]")
    world.leave("B")
    world.release("A")
    assert value(world, "_S_a[1]") == 2


def test_returned_values_come_back_in_the_order_of_their_return(world):
    for number in range(1, 5):
        assert world.ask(f"S{number}", "_S_a[9]") == f"S{number} granted {number}"
    assert world.release("S3", committed=False) == ""
    assert world.leave("S4") == ""
    assert world.release("S1") == ""
    assert world.release("S2", committed=False) == ""
    granted = [world.ask(session, "_S_a[9]") for session in "ABCD"]
    assert granted == ["A granted 3", "B granted 4", "C granted 2", "D granted 5"]


def test_returned_values_are_a_list_and_not_a_stack(world):
    for number in range(1, 4):
        world.ask(f"S{number}", "_S_a[9]")
    world.leave("S2")
    world.leave("S1")
    assert world.ask("A", "_S_a[9]") == "A granted 2"
    world.leave("A")
    assert [value(world, "_S_a[9]") for _ in range(3)] == [1, 2, 4]


@pytest.mark.parametrize("kind", ["_s_", "_S_"])
def test_after_the_greatest_value_comes_one(world, kind):
    world.ask("H", kind + "a[9]")
    world.table.resources[kind + "a[9]"].next = GREATEST - 1
    granted = [world.ask(session, kind + "a[9]").split()[2] for session in "ABC"]
    assert granted == [str(GREATEST - 1), str(GREATEST), "1"]


def test_the_two_kinds_and_other_numbers_are_other_resources(world):
    for number, name in enumerate(("_s_a[1]", "_S_a[1]", "_s_a[2]", "_s_A[1]")):
        assert world.ask(f"S{number}", name) == f"S{number} granted 1"


def test_values_die_with_the_sequence(world):
    assert [value(world, "_s_a[1]") for _ in range(2)] == [1, 2]
    world.later(2.1)
    assert value(world, "_s_a[1]") == 1


def test_the_mode_and_the_quantity_do_not_matter(world):
    assert world.ask("A", "_s_a[2]", "NL", quantity=7) == "A granted 1"
    assert world.ask("B", "_s_a[2]", "NL") == "B granted 2"
    assert world.ask("C", "_s_a[2]", "NL", wait=0) == "C busy"
