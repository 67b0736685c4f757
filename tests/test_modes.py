"""The six lock modes: all pairs, and who overtakes whom under the two policies."""
import flomd
import pytest
from engine_world import MODES, World

# As in flom-semantics(7), a row for the mode that is held
TABLE = """
   NL CR CW PR PW EX
NL  1  1  1  1  1  1
CR  1  1  1  1  1  0
CW  1  1  1  0  0  0
PR  1  1  0  1  0  0
PW  1  1  0  0  0  0
EX  1  0  0  0  0  0
"""
ROWS = [line.split() for line in TABLE.split("\n")[2:-1]]
PAIRS = [(row[0], mode, cell == "1") for row in ROWS for mode, cell in zip(MODES, row[1:])]
POLICIES = ["fair", "first-fit"]


HOLDER = {"CR": "EX", "PR": "CW"}  # by the mode that is to wait for it; PR for the rest


@pytest.fixture(params=POLICIES)
def world(request):
    return World(request.param)


def test_the_table_is_whole():
    assert TABLE.split("\n")[1].split() == MODES == flomd.MODES == [row[0] for row in ROWS]
    assert len(PAIRS) == 36


@pytest.mark.parametrize("held, asked, compatible", PAIRS)
def test_a_pair_of_modes(world, held, asked, compatible):
    assert world.ask("A", "R", held) == "A granted"
    assert world.ask("B", "R", asked, wait=0) == ("B granted" if compatible else "B busy")
    world.leave("B")
    assert world.ask("C", "R", asked) == ("C granted" if compatible else "C queued")
    assert world.release("A") == ("" if compatible else "C granted")


@pytest.mark.parametrize("held, asked, compatible", PAIRS)
def test_a_pair_of_modes_on_two_levels_of_a_tree(world, held, asked, compatible):
    assert world.ask("A", "/t/a", held) == "A granted"
    for name in ("/t", "/t/a", "/t/a/x", "/t/a/x/y"):
        answer = "B granted" if compatible else "B busy"
        assert world.ask("B", name, asked, wait=0) == answer
        world.leave("B")
    for name in ("/t/b", "/t/aa", "/t/b/a"):
        assert world.ask("B", name, asked, wait=0) == "B granted"
        world.leave("B")


@pytest.mark.parametrize("waiting, asked, compatible", PAIRS)
def test_a_newcomer_and_a_waiter(waiting, asked, compatible):
    fair, first_fit = World(), World("first-fit")
    for world in (fair, first_fit):
        world.ask("H", "R", HOLDER.get(waiting, "PR"))
        assert world.ask("W", "R", waiting) == (
            "W granted" if waiting == "NL" else "W queued")
    fits = first_fit.ask("N", "R", asked, wait=0) == "N granted"
    assert fair.ask("N", "R", asked, wait=0) == (
        "N granted" if fits and compatible else "N busy")


# Policies

def test_a_waiting_writer_is_not_overtaken_by_later_readers():
    world = World()
    assert world.ask("A", "R", "PR") == "A granted"
    assert world.ask("W", "R", "EX") == "W queued"
    assert world.ask("B", "R", "PR") == "B queued"
    assert world.ask("C", "R", "PR", wait=0) == "C busy"
    assert world.release("A") == "W granted"
    assert world.release("W") == "B granted"


def test_readers_that_wait_together_are_granted_together(world):
    world.ask("A", "R", "EX")
    for reader in "BCDE":
        assert world.ask(reader, "R", "PR") == f"{reader} queued"
    assert world.release("A") == "B granted, C granted, D granted, E granted"


def test_readers_between_writers():
    world = World()
    world.ask("A", "R", "EX")
    for session, mode in zip("BCDEF", ("PR", "PR", "EX", "PR", "CR")):
        world.ask(session, "R", mode)
    assert world.release("A") == "B granted, C granted"
    assert world.release("B") == ""
    assert world.release("C") == "D granted"
    assert world.release("D") == "E granted, F granted"


def test_first_fit_lets_readers_overtake():
    world = World("first-fit")
    world.ask("A", "R", "PR")
    assert world.ask("W", "R", "EX") == "W queued"
    assert world.ask("B", "R", "PR") == "B granted"
    assert world.release("A") == ""
    assert world.ask("C", "R", "PR", wait=0) == "C granted"
    assert world.release("B") == ""
    assert world.release("C") == "W granted"


def test_first_fit_grants_in_queue_order_whatever_fits():
    world = World("first-fit")
    world.ask("A", "R", "EX")
    for session, mode in zip("BCDEF", ("PR", "EX", "CR", "PW", "PR")):
        world.ask(session, "R", mode)
    assert world.release("A") == "B granted, D granted, F granted"
    assert world.release("B") == ""
    assert world.release("F") == "E granted"
    assert world.release("D") == ""
    assert world.release("E") == "C granted"


def test_whoever_delays_nobody_may_overtake():
    world = World()
    world.ask("A", "R", "PW")
    assert world.ask("B", "R", "PR") == "B queued"
    assert world.ask("C", "R", "CR") == "C granted"
    assert world.ask("D", "R", "NL") == "D granted"
    assert world.ask("E", "R", "EX") == "E queued"
    assert world.ask("F", "R", "CR") == "F queued"
    assert world.ask("G", "R", "NL") == "G granted"


def test_a_waiter_that_leaves_unblocks_those_behind_it():
    world = World()
    world.ask("A", "R", "PR")
    for session, mode in zip("BCDE", ("EX", "PR", "EX", "PR")):
        assert world.ask(session, "R", mode) == f"{session} queued"
    assert world.leave("B") == "C granted"
    assert world.leave("D") == "E granted"


def test_a_waiter_behind_two_that_leave_one_after_the_other():
    world = World()
    world.ask("A", "R", "PR")
    for session, mode in zip("BCD", ("EX", "PW", "PR")):
        world.ask(session, "R", mode)
    assert world.leave("B") == ""
    assert world.leave("C") == "D granted"


def test_a_mode_that_two_waiters_block_one_after_the_other():
    world = World()
    world.ask("A", "R", "CW")
    assert world.ask("B", "R", "PR") == "B queued"
    assert world.ask("C", "R", "PW") == "C queued"
    assert world.ask("D", "R", "CW") == "D queued"
    assert world.leave("C") == ""
    assert world.leave("B") == "D granted"


@pytest.mark.parametrize("policy, holder", [("fair", "W"), ("first-fit", "reader 49")])
def test_readers_that_never_stop_coming(policy, holder):
    world = World(policy)
    world.ask("reader 0", "R", "PR")
    world.ask("W", "R", "EX")
    for number in range(1, 50):
        world.ask(f"reader {number}", "R", "PR")
        if f"reader {number - 1}" in world.holders:
            world.release(f"reader {number - 1}")
    assert list(world.holders) == [holder]
