"""Simple resources: one lock in six modes, and what every kind has in common."""
import flomd
import pytest
from engine_world import World


@pytest.fixture(params=["fair", "first-fit"])
def world(request):
    return World(request.param)


def test_one_after_the_other_in_order_of_arrival(world):
    assert world.ask("A", "R") == "A granted"
    for session in "BCD":
        assert world.ask(session, "R") == f"{session} queued"
    assert world.release("A") == "B granted"
    assert world.leave("C") == ""
    assert world.release("B") == "D granted"
    assert world.release("D") == ""


def test_who_does_not_wait_is_refused_and_gone(world):
    world.ask("A", "R")
    assert world.ask("B", "R", wait=0) == "B busy"
    assert world.release("A") == ""
    assert "B" not in world.table.requests


def test_the_default_resource_is_a_simple_one(world):
    assert world.ask("A", "_RESOURCE") == "A granted"
    assert world.ask("B", "_RESOURCE", wait=0) == "B busy"


def test_names_are_told_apart_by_case_and_are_whole(world):
    for session, name in zip("ABCD", ("a", "A", "a1", "a11")):
        assert world.ask(session, name) == f"{session} granted"


@pytest.mark.parametrize("name", [
    "", "1a", "a b", "a\n", "\na", "a\nb", "_a", "_RESOURCE2", "_STATUS", "_", "a_b", "a-b", "a.",
    ".a", "a..b", "a.1", "/", "//", "/a/", "/a//b", "a/b", "/a\n", "/a\\b", "a[]", "a[-1]", "a[1",
    "a[1]b", "a[x]", "a[2147483648]", "_s_a", "_s_[1]", "_s_a[0]", "_x_a[1]", "_s_a[2147483648]",
    "_t_%S", "_t_%S[0]", "_t_[1]", "_t_1[1]", "_t_%D[1]", "_T_%S[1]", "é", "a[²]", "a[1][2]"])
def test_a_name_that_is_none_is_refused_at_once(world, name):
    for wait, create in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert world.ask("A", name, wait=wait, create=create) == "A invalid"
    assert world.table.empty()


@pytest.mark.parametrize("name", [
    "a", "Z9", "a.b", "a.a.a", "/a", "/ ", "/a/b c/\"'&<>", "/\xe9/\u20ac", "/\udcff", "/./..",
    "a[1]", "a[05]", "a[2147483647]", "_s_a[1]", "_S_a[2]", "_t_%S[1]", "_t_a#f:%S.b[3]"])
def test_a_name_that_is_one_is_granted(world, name):
    assert world.ask("A", name).startswith("A granted")


def test_identity_is_the_exact_string(world):
    for number, name in enumerate(("a[5]", "a[7]", "a[05]", "A.B", "B.A", "/a/b", "/a/./b")):
        assert world.ask(f"S{number}", name).split()[1] == "granted"
    assert len(world.table.resources) == 6  # of which one is the tree


def test_the_waiter_is_told_its_place(world):
    world.ask("A", "R")
    for place, session in enumerate("BCD", 1):
        world.ask(session, "R")
        assert world.told[0].position == place


def test_a_session_that_repeats_its_request_keeps_its_place(world):
    world.ask("A", "R")
    world.ask("B", "R")
    world.ask("C", "R")
    assert world.ask("B", "R") == "B queued"
    assert world.release("A") == "B granted"


def test_a_session_that_asks_for_something_else_goes_to_the_end(world):
    world.ask("A", "R", "EX")
    world.ask("B", "R", "EX")
    world.ask("C", "R", "EX")
    assert world.ask("B", "R", "PR") == "B queued"
    assert world.release("A") == "C granted"
    assert world.ask("B", "Other") == "B granted"
    assert world.release("C") == ""


def test_a_waiter_that_asks_without_waiting_leaves_the_queue(world):
    world.ask("A", "R")
    world.ask("B", "R")
    assert world.ask("B", "R", wait=0) == "B busy"
    assert world.release("A") == ""


def test_a_request_that_is_replaced_unblocks_those_behind_it():
    world = World()
    world.ask("A", "R", "PR")
    world.ask("B", "R", "EX")
    world.ask("C", "R", "PR")
    assert world.ask("B", "R", "PW") == "C granted, B queued"


def test_a_holder_that_asks_again_holds_once(world):
    assert world.ask("A", "R", "PR") == "A granted"
    token = world.told[0].token
    assert world.ask("A", "R", "PR") == "A granted"
    assert world.told[0].token == token
    assert world.ask("B", "R", "EX") == "B queued"
    assert world.release("A") == "B granted"


@pytest.mark.parametrize("name, mode", [("R", "EX"), ("R", "NL"), ("Other", "PR")])
def test_a_holder_that_asks_for_something_else_is_refused_and_holds_on(world, name, mode):
    world.ask("A", "R", "PR")
    assert world.ask("A", name, mode) == "A busy"
    assert world.ask("B", "R", "EX", wait=0) == "B busy"
    assert world.ask("C", "R", "PR", wait=0) == "C granted"
    assert list(world.table.resources) == ["R"]


def test_one_that_is_gone_twice_or_was_never_there(world):
    world.ask("A", "R")
    assert world.leave("A") == world.leave("A") == world.leave("nobody") == ""


def test_a_null_lock_creates_and_keeps_the_resource(world):
    assert world.ask("A", "R", "NL") == "A granted"
    assert world.later(100) == ""
    assert world.ask("B", "R", "EX", create=0) == "B granted"


def test_the_ages_are_those_of_the_wall_clock(world):
    world.ask("A", "R")
    world.later(2.5)
    world.ask("B", "R")
    since = [world.table.requests[session].since for session in "AB"]
    assert since[1] - since[0] == pytest.approx(2.5)


def test_modes_of_flom_are_numbered_by_strength(world):
    assert [flomd.MODES.index(mode) for mode in ("NL", "CR", "CW", "PR", "PW", "EX")] == [
        0, 1, 2, 3, 4, 5]
