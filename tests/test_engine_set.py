"""Sets: each grant takes the first free slot from a rotating index on."""
import pytest
from engine_world import World


@pytest.fixture(params=["fair", "first-fit"])
def world(request):
    return World(request.param)


def words(world, count, name="A.B.C"):
    """The elements of grants that follow each other, each released before the next."""
    found = []
    for _ in range(count):
        found.append(world.ask("next", name).split()[2])
        world.release("next")
    return " ".join(found)


def test_one_after_the_other(world):
    assert words(world, 7) == "A B C A B C A"


def test_with_the_first_slot_held(world):
    assert world.ask("H", "A.B.C") == "H granted A"
    assert words(world, 7) == "B C B B C B B"


def test_the_index_advances_by_one_with_each_grant_and_stays_at_a_release(world):
    for session, element in zip("XYZ", "ABC"):
        assert world.ask(session, "A.B.C") == f"{session} granted {element}"
    world.release("Y")
    assert words(world, 4) == "B B B B"
    world.release("X")
    world.release("Z")
    assert words(world, 4) == "B C A B"


def test_waiters_get_the_word_that_is_given_back(world):
    for session in "XYZ":
        world.ask(session, "A.B.C")
    for session in "PQR":
        assert world.ask(session, "A.B.C") == f"{session} queued"
    assert world.ask("S", "A.B.C", wait=0) == "S busy"
    assert world.release("Y") == "P granted B"
    assert world.leave("Z") == "Q granted C"
    assert world.leave("R") == ""
    assert world.release("X") == ""


def test_repeated_words_are_slots_of_their_own(world):
    granted = [world.ask(session, "A.A.B") for session in "XYZ"]
    assert granted == ["X granted A", "Y granted A", "Z granted B"]
    assert world.ask("W", "A.A.B") == "W queued"
    assert world.release("X") == "W granted A"


def test_a_repeated_word_is_given_back_to_its_own_slot(world):
    for session in "WXYZ":
        world.ask(session, "A.B.A.C")
    world.release("Y")
    world.release("Z")
    assert [world.ask(session, "A.B.A.C") for session in "YZ"] == ["Y granted A", "Z granted C"]


def test_order_of_words_is_part_of_the_name(world):
    assert world.ask("X", "A.B") == "X granted A"
    assert world.ask("Y", "B.A") == "Y granted B"


def test_the_index_dies_with_the_set(world):
    assert words(world, 2) == "A B"
    world.later(1.9)
    assert words(world, 2) == "C A"
    world.later(2)
    assert words(world, 2) == "A B"


def test_the_mode_does_not_matter(world):
    assert world.ask("X", "A.B", "NL") == "X granted A"
    assert world.ask("Y", "A.B", "NL") == "Y granted B"
    assert world.ask("Z", "A.B", "NL", wait=0) == "Z busy"


def test_a_holder_that_asks_again_is_told_its_word(world):
    world.ask("X", "A.B")
    world.ask("Y", "A.B")
    assert world.ask("X", "A.B") == "X granted A"
    assert world.ask("Y", "A.B") == "Y granted B"
