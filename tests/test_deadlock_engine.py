"""Nested requests in the engine: whom they pass, and which of them can never be granted."""
import gc

import flomd
import pytest
from engine_world import World


@pytest.fixture(params=["fair", "first-fit"])
def world(request):
    return World(request.param)


def reason(world):
    return world.told[-1].reason


def nest(world, *asks):
    """Each ask is "SESSION NAME MODE ANCESTORS"; returns what was told, one line for each."""
    told = []
    for ask in asks:
        session, name, mode, *under = ask.split()
        told.append(world.ask(session, name, mode, under=" ".join(under)))
    return told


# Deadlocks

@pytest.mark.parametrize("name", ["R", "n[1]", "A.A", "/t", "_s_x[1]", "_t_%S[1]"])
def test_a_command_under_a_lock_asks_for_the_same_lock(world, name):
    world.ask("A", name)
    if name == "A.A":
        world.ask("B", name, under="A")
    assert world.ask("N", name, under="B A") == "N deadlock"
    assert name in reason(world) and "A" in reason(world)
    assert list(world.queue) == [] and "A" in world.holders


def test_two_commands_ask_for_the_locks_of_each_other(world):
    assert nest(world, "A R EX", "B Q EX", "a Q EX A", "b R EX B") == [
        "A granted", "B granted", "a queued", "b deadlock"]
    for word in ("R", "Q", "A", "B"):
        assert word in reason(world)
    assert world.release("B") == "a granted"


def test_a_chain_of_five(world):
    for number in range(5):
        world.ask(f"S{number}", f"R{number}")
    for number in range(4):
        assert world.ask(f"n{number}", f"R{number + 1}", under=f"S{number}") == f"n{number} queued"
    assert world.ask("n4", "R0", under="S4") == "n4 deadlock"
    for number in range(5):
        assert f"R{number}" in reason(world) and f"S{number}" in reason(world)
    assert world.leave("S4") == "n3 granted"


def test_grandchildren_have_all_their_ancestors(world):
    assert nest(world, "A R EX", "B Q EX A", "C P EX B A") == [
        "A granted", "B granted", "C granted"]
    assert world.ask("D", "R", under="C B A") == "D deadlock"
    assert world.ask("D", "Q", under="C B A") == "D deadlock"
    assert world.ask("D", "P", "NL", under="C B A") == "D granted"


def test_the_daemon_knows_what_is_above_the_ancestors_that_are_named(world):
    """A client has no room for a long chain, so it names the nearest at least."""
    world.ask("L0", "R0")
    for number in range(1, 12):
        assert world.ask(f"L{number}", f"R{number}", under=f"L{number - 1}").endswith("granted")
    assert world.ask("N", "R0", under="L11") == "N deadlock"
    assert "R0" in reason(world) and "L0" in reason(world)
    world.release("L5")
    assert world.ask("N", "R4", under="L11") == "N deadlock"


def test_what_is_above_an_ancestor_may_come_back_later():
    """After a crash the holders reclaim in any order."""
    world = World(window=3)
    assert world.ask("C", "R2", under="B", wait=0, reclaim=9) == "C granted"
    assert world.ask("N", "R0", under="C") == "N queued"
    assert world.ask("A", "R0", wait=0, reclaim=7) == "A granted"
    assert world.ask("B", "R1", under="A", wait=0, reclaim=8) == "B granted"
    assert world.later(3) == "N deadlock"


def test_the_units_of_a_pool_that_are_all_held_outside(world):
    assert world.ask("A", "n[2]", quantity=2) == "A granted"
    assert world.ask("N", "n[2]", under="A") == "N deadlock"
    assert world.ask("M", "n[2]", under="A", wait=0) == "M busy"


def test_one_unit_outside_and_one_inside_while_another_holds_the_second(world):
    assert world.ask("A", "n[2]") == "A granted"
    assert world.ask("B", "n[2]") == "B granted"
    assert world.ask("N", "n[2]", under="A") == "N queued"
    assert world.release("B") == "N granted"


def test_of_two_holders_of_a_pool_none_is_free_to_end(world):
    assert nest(world, "A n[2] EX", "B n[2] EX", "a n[2] EX A", "b n[2] EX B") == [
        "A granted", "B granted", "a queued", "b deadlock"]


def test_a_cycle_from_which_one_holder_of_a_set_leads_out(world):
    assert nest(world, "A X.Y EX", "B X.Y EX", "C R EX", "a R EX A", "c X.Y EX C") == [
        "A granted X", "B granted Y", "C granted", "a queued", "c queued"]
    assert world.release("B") == "c granted Y"
    assert world.release("c") == ""
    assert world.release("C") == "a granted"


def test_above_and_below_in_a_tree(world):
    assert nest(world, "A /t/a EX", "N /t EX A", "M /t/b EX A", "L /t/a/x PR A") == [
        "A granted", "N deadlock", "M granted", "L deadlock"]


def test_a_waiter_ahead_may_be_the_reason():
    world = World()
    assert nest(world, "A n[3] EX", "P R EX", "p n[3] EX P") == [
        "A granted", "P granted", "p granted"]
    assert world.ask("W", "n[3]", quantity=3) == "W queued"
    assert nest(world, "a R EX A", "q n[3] EX P") == ["a queued", "q granted"]


def test_who_is_refused_leaves_no_trace(world):
    world.ask("A", "R")
    assert world.ask("N", "R", under="A") == "N deadlock"
    assert nest(world, "B Q EX", "b R EX B") == ["B granted", "b queued"]
    assert world.release("A") == "b granted"


def test_who_was_queued_and_granted_leaves_no_trace(world):
    assert nest(world, "A R EX", "B Q EX", "a Q EX A") == ["A granted", "B granted", "a queued"]
    assert world.release("B") == "a granted"
    assert nest(world, "C P EX", "c R EX C", "d P EX a A") == [
        "C granted", "c queued", "d deadlock"]
    assert world.release("A") == "c granted"


def test_the_refused_one_may_ask_for_something_else(world):
    world.ask("A", "R")
    world.ask("N", "R", under="A")
    assert world.ask("N", "Q", under="A") == "N granted"
    assert world.empty_after(5)


# No deadlocks

@pytest.mark.parametrize("details", [{"wait": 0}, {"patient": True}])
def test_who_will_not_wait_for_ever_is_not_refused(world, details):
    world.ask("A", "R")
    expected = "N busy" if "wait" in details else "N queued"
    assert world.ask("N", "R", under="A", **details) == expected


def test_a_patient_request_makes_nobody_stuck(world):
    nest(world, "A R EX", "B Q EX")
    assert world.ask("a", "Q", under="A", patient=True) == "a queued"
    assert world.ask("b", "R", under="B") == "b queued"
    assert world.leave("a") == ""
    assert world.release("A") == "b granted"


def test_ids_that_are_not_known_are_ignored(world):
    world.ask("A", "R")
    assert world.ask("N", "R", under="X Y") == "N queued"
    assert world.ask("M", "R", under="N") == "M queued"


def test_an_ancestor_that_has_ended_does_not_count(world):
    nest(world, "A R EX", "B Q EX")
    world.release("A")
    assert nest(world, "C R EX", "a R EX A", "c Q EX C", "b R EX B") == [
        "C granted", "a queued", "c queued", "b deadlock"]


def test_nested_requests_for_different_resources(world):
    assert nest(world, "A R EX", "B Q EX A", "C n[2] EX B A", "D /t EX C B A") == [
        "A granted", "B granted", "C granted", "D granted"]


def test_nested_shared_modes(world):
    assert nest(world, "A R PR", "B R PR A", "C R CR B A", "D R NL C B A") == [
        "A granted", "B granted", "C granted", "D granted"]
    assert world.ask("E", "R", "PW", under="B A") == "E deadlock"


def test_a_request_that_only_waits_for_the_clock(world):
    world.ask("A", "R")
    world.later(0.5)
    world.ask("T", "_t_%S[2]")
    assert world.ask("N", "_t_%S[2]", under="A") == "N queued"
    assert world.later(0.5) == "N granted 01"


def test_the_same_request_when_the_resource_is_idle(world):
    world.ask("A", "R")
    world.ask("T", "_t_%S[1]")
    world.release("T")
    assert world.ask("N", "_t_%S[1]", under="A") == "N queued"
    assert world.later(1) == "N granted 01"


def test_parked_requests_are_not_stuck_and_are_looked_at_when_they_are_woken(world):
    nest(world, "A R EX", "B Q EX")
    assert world.ask("a", "P", under="A", create=0) == "a parked"
    assert world.ask("b", "R", under="B") == "b queued"
    assert world.ask("c", "P", under="B") == "c granted, a queued"
    assert world.release("c") == "a granted"
    assert world.release("a") == ""
    assert world.release("A") == "b granted"


def test_a_parked_request_is_refused_when_its_resource_makes_it_hopeless(world):
    world.ask("A", "R")
    assert world.ask("a", "P", under="A", create=0) == "a parked"
    nest(world, "B Q EX", "b R EX B")
    assert world.ask("c", "P", under="b B") == "c granted, a queued"
    assert world.ask("b2", "R", under="c B") == "b2 deadlock"


def test_two_children_in_the_background(world):
    assert nest(world, "A R EX", "B Q EX", "a1 Q EX A", "a2 Q PR A") == [
        "A granted", "B granted", "a1 queued", "a2 queued"]
    assert world.release("B") == "a1 granted"
    assert world.ask("a3", "Q", "EX", under="a1 A") == "a3 deadlock"
    assert world.release("a1") == "a2 granted"


# Passing

@pytest.mark.parametrize("name, outer, inner, between", [
    ("R", "PR", "PR", "EX"), ("R", "PR", "CR", "EX"), ("R", "CW", "CW", "PR"),
    ("/t/a", "PR", "PR", "EX"), ("n[3]", "EX", "EX", "EX")])
def test_a_nested_request_passes_who_waits_for_its_ancestor(name, outer, inner, between):
    world = World()
    world.ask("A", name, outer)
    assert world.ask("W", name, between, quantity=3) == "W queued"
    assert world.ask("X", name, inner, wait=0) == "X busy"
    assert world.ask("N", name, inner, under="A", wait=0) == "N granted"
    assert world.ask("M", name, inner, under="N A") == "M granted"
    assert world.release("A") == world.release("M") == ""
    assert world.release("N") == "W granted"


def test_it_passes_in_a_tree_whoever_waits_above_or_below():
    world = World()
    nest(world, "A /t/a PR", "W /t EX", "V /t/a/x EX")
    assert world.ask("N", "/t/a/x", "PR", under="A") == "N granted"
    assert world.ask("M", "/t/b", "PR", under="A") == "M granted"
    assert world.ask("X", "/t/b", "PR") == "X queued"


def test_it_passes_who_waits_for_it_over_others():
    world = World()
    assert nest(world, "A R EX", "H Q PR", "h R EX H") == [
        "A granted", "H granted", "h queued"]
    assert nest(world, "W Q EX", "X Q PR") == ["W queued", "X queued"]
    assert world.ask("N", "Q", "PR", under="A") == "N granted"


def test_it_does_not_pass_who_waits_for_others_only():
    world = World()
    assert nest(world, "A R EX", "H Q PR", "W Q EX", "N Q PR A") == [
        "A granted", "H granted", "W queued", "N queued"]
    assert world.release("H") == "W granted"
    assert world.release("W") == "N granted"


def test_one_that_waits_may_pass_when_the_one_ahead_begins_to_wait_for_it():
    world = World()
    nest(world, "A R EX", "H Q PR", "W Q EX", "N Q PR A")
    assert world.ask("h", "R", "EX", under="H") == "h queued, N granted"
    assert world.release("N") == ""
    assert world.release("A") == "h granted"


def test_it_does_not_pass_holders():
    world = World()
    nest(world, "A R PR", "H R PR", "W R EX")
    assert world.ask("N", "R", "PW", under="A") == "N deadlock"
    assert world.ask("N", "R", "PW", under="A", wait=0) == "N busy"
    assert world.ask("N", "R", "PW", under="A", patient=True) == "N queued"
    assert world.release("H") == ""
    assert world.release("A") == "W granted"


def test_a_unit_that_is_given_back_goes_to_the_nested_request_and_not_to_the_head():
    world = World()
    world.ask("A", "n[2]")
    world.ask("B", "n[2]")
    assert world.ask("W", "n[2]", quantity=2) == "W queued"
    assert world.ask("X", "n[2]") == "X queued"
    assert world.ask("N", "n[2]", under="A") == "N queued"
    assert world.release("B") == "N granted"
    assert world.release("N") == ""
    assert world.release("A") == "W granted"


def test_a_nested_request_that_has_left_unblocks_those_behind_it():
    world = World()
    nest(world, "A R PR", "B Q EX", "H R PR")
    assert world.ask("a", "R", "EX", under="B") == "a queued"
    assert world.ask("X", "R", "PR") == "X queued"
    assert world.leave("a") == "X granted"


# With the recovery window, and with holders that come back

def test_the_nested_one_is_looked_at_when_the_window_ends():
    world = World(window=3)
    world.ask("A", "R", wait=0, reclaim=9)
    assert world.ask("N", "R", under="A") == "N queued"
    assert world.later(3) == "N deadlock"
    assert world.leave("A") == ""


def test_who_is_refused_when_the_window_ends_is_in_nobodys_way():
    world = World(window=3)
    world.ask("A", "R", "PR", wait=0, reclaim=9)
    assert nest(world, "N R EX A", "X R PR") == ["N queued", "X queued"]
    assert world.later(3) == "N deadlock, X granted"


def test_all_queues_are_walked_before_anybody_is_refused():
    world = World(window=3)
    world.ask("A", "R", wait=0, reclaim=9)
    world.ask("H", "Q", wait=0, reclaim=8)
    assert nest(world, "N Q EX A", "h P EX H") == ["N queued", "h queued"]
    assert world.later(3) == "h granted"
    assert world.leave("h") == ""
    assert world.leave("H") == "N granted"


def test_a_child_that_queued_before_its_parent_reclaimed():
    world = World(window=3)
    assert world.ask("N", "R", under="A") == "N queued"
    assert world.ask("A", "R", wait=0, reclaim=9) == "A granted"
    assert world.later(3) == "N deadlock"


@pytest.mark.parametrize("back", ["before", "after"])
def test_a_parent_that_comes_back_keeps_its_children(back):
    world = World()
    nest(world, "A R EX")
    token = world.token
    nest(world, "B Q EX", "a Q EX A")
    if back == "after":
        world.leave("A")
    assert world.ask("A2", "R", wait=0, ident="A", reclaim=token).startswith("A2 granted")
    assert world.ask("b", "R", "EX", under="B") == "b deadlock"
    assert world.release("B") == "a granted"


# What they are told

def test_the_reason_names_resources_and_holders_in_the_order_of_waiting(world):
    nest(world, "alpha R EX", "beta Q EX", "a Q EX alpha")
    assert world.ask("b", "R", under="beta") == "b deadlock"
    places = [reason(world).index(word) for word in ("R", "alpha", "Q", "beta")]
    assert places == sorted(places)


def test_the_reason_is_one_line_and_names_the_way_out(world):
    world.ask("A", "/t/a b\xe9")
    world.ask("N", "/t/a b\xe9", under="A")
    assert "\n" not in reason(world) and "--deadlock wait" in reason(world)


# Memory

def kept_paths():
    gc.collect()
    return sum(isinstance(one, flomd.WaitPaths) for one in gc.get_objects())


def test_the_paths_of_waits_are_forgotten_when_nobody_is_nested():
    """They keep all requests of the search, and their sessions."""
    world = World("fair")
    before = kept_paths()
    nest(world, "A R PR", "B Q PR", "a Q EX", "V R EX", "b R PR B", "n R PR A")
    assert kept_paths() == before + 1
    for session in ("n", "b", "V", "a", "B", "A"):
        world.leave(session)
    assert kept_paths() == before
