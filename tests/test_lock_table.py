"""The lock table: parked requests, idle life, tokens, limits, reclaims and the recovery window."""
import flomd
import pytest
from engine_world import World, make_request

DAY = 86400 << 32  # of tokens


@pytest.fixture(params=["fair", "first-fit"])
def world(request):
    return World(request.param)


@pytest.fixture(params=["fair", "first-fit"])
def window(request):
    """The table of a daemon that follows one that ended: 3 s for those who held a lock."""
    return World(request.param, window=3)


# Parked requests

def test_a_request_waits_for_the_resource_to_be_created(world):
    assert world.ask("A", "R", create=0) == "A parked"
    assert world.ask("B", "R") == "B granted, A queued"
    assert world.told[1].position == 1
    assert world.release("B") == "A granted"


def test_without_wait_it_is_told_that_there_is_no_such_resource(world):
    assert world.ask("A", "R", create=0, wait=0) == "A absent"
    assert world.table.empty()


def test_parked_requests_queue_in_order_of_arrival_behind_the_creator(world):
    for session in "ABC":
        assert world.ask(session, "R", create=0) == f"{session} parked"
    assert world.ask("D", "R") == "D granted, A queued, B queued, C queued"
    assert [world.release(session) for session in "DABC"] == [
        "A granted", "B granted", "C granted", ""]


def test_parked_requests_compatible_with_the_creator_are_granted(world):
    for session, mode in zip("ABC", ("PR", "PR", "CR")):
        world.ask(session, "R", mode, create=0)
    assert world.ask("D", "R", "PR") == "D granted, A granted, B granted, C granted"


def test_a_parked_writer_is_not_overtaken_by_parked_readers():
    world = World()
    for session, mode in zip("ABC", ("PR", "EX", "PR")):
        world.ask(session, "R", mode, create=0)
    assert world.ask("D", "R", "PR") == "D granted, A granted, B queued, C queued"


def test_a_parked_request_that_leaves_is_forgotten(world):
    world.ask("A", "R", create=0)
    assert world.leave("A") == ""
    assert world.table.empty()
    assert world.ask("B", "R") == "B granted"


def test_only_creation_wakes(world):
    world.ask("A", "n[2]", create=0)
    assert world.ask("B", "n[2]", create=0) == "B parked"
    assert world.ask("C", "n[2]", quantity=3) == "C impossible"
    assert world.ask("D", "n[3]") == "D granted"
    assert world.ask("E", "n[2]", create=0, wait=0) == "E absent"
    assert world.ask("F", "n[2]", wait=0) == "F granted, A granted, B queued"


def test_a_null_lock_wakes_as_any_other(world):
    world.ask("A", "R", create=0)
    assert world.ask("B", "R", "NL") == "B granted, A granted"


def test_more_than_the_pool_holds_is_impossible_out_of_the_park(world):
    assert world.ask("A", "n[2]", quantity=5, create=0) == "A parked"
    assert world.ask("B", "n[2]", create=0) == "B parked"
    assert world.ask("C", "n[2]") == "C granted, A impossible, B granted"


def test_a_parked_request_that_is_repeated_stays_where_it_is(world):
    world.ask("A", "R", create=0)
    world.ask("B", "R", create=0)
    assert world.ask("A", "R", create=0) == "A parked"
    assert world.ask("C", "R") == "C granted, A queued, B queued"


def test_a_repeated_request_has_its_place_whatever_its_mode_where_modes_do_not_count(world):
    assert world.ask("A", "n[2]", "EX", quantity=2) == "A granted"
    assert world.ask("B", "n[2]", "EX") == "B queued"
    assert world.ask("C", "n[2]", "EX") == "C queued"
    assert world.ask("A", "n[2]", "PR", quantity=2) == "A granted"
    assert world.ask("B", "n[2]", "PR") == "B queued"
    assert world.release("A") == "B granted, C granted"


def test_a_parked_request_may_be_replaced(world):
    world.ask("A", "R", create=0)
    assert world.ask("A", "Q") == "A granted"
    assert world.ask("B", "R") == "B granted"
    assert world.release("B") == ""


def test_a_parked_session_that_may_create_after_all_creates(world):
    world.ask("A", "R", create=0)
    world.ask("B", "R", create=0)
    assert world.ask("B", "R") == "B granted, A queued"


def test_without_create_an_idle_resource_is_there_as_well(world):
    world.ask("A", "R")
    world.release("A")
    world.later(1.9)
    assert world.ask("B", "R", create=0, wait=0) == "B granted"
    world.release("B")
    world.later(2.1)
    assert world.ask("B", "R", create=0) == "B parked"


def test_parked_requests_of_a_tree_wait_for_its_first_level(world):
    world.ask("A", "/t/a", create=0)
    world.ask("B", "/t/a/x", create=0)
    world.ask("C", "/t/c", create=0)
    assert world.ask("D", "/u") == "D granted"
    assert world.ask("E", "/t/e", "NL") == "E granted, A granted, B queued, C granted"


# Idle life

@pytest.mark.parametrize("lifespan, seconds", [(0, 2), (1, 2), (2000, 2), (2001, 2.001), (9000, 9)])
def test_an_idle_resource_ends_exactly_at_the_end_of_its_lifespan(world, lifespan, seconds):
    world.ask("A", "R", lifespan=lifespan)
    world.later(7)
    world.release("A")
    assert world.table.next_date() == pytest.approx(world.clock.mono + seconds, abs=1e-6)
    world.later(seconds - 0.001)
    assert not world.table.empty()
    world.later(0.001)
    assert world.table.empty()
    assert world.table.next_date() is None


def test_the_largest_lifespan_since_the_creation_counts(world):
    world.ask("A", "R", lifespan=3000)
    world.ask("B", "R", lifespan=8000)
    world.ask("C", "R", wait=0, lifespan=5000)
    world.leave("B")
    world.release("A")
    world.later(7.9)
    assert world.ask("D", "R", create=0, wait=0) == "D granted"
    world.release("D")
    world.later(7.9)
    assert not world.table.empty()
    world.later(0.1)
    assert world.table.empty()
    world.ask("A", "R")
    world.release("A")
    world.later(2)
    assert world.table.empty()


@pytest.mark.parametrize("first", [{}, {"create": 0}], ids=["queued", "parked"])
def test_the_lifespan_of_a_waiter_counts_as_well(world, first):
    world.ask("A", "R", lifespan=7000, **first)
    world.ask("B", "R")
    for session in "AB":
        world.leave(session)
    world.later(6.9)
    assert not world.table.empty()
    world.later(0.2)
    assert world.table.empty()


def test_the_lifespan_of_a_repeated_request_counts_as_well(world):
    world.ask("A", "R")
    world.ask("A", "R", lifespan=7000)
    world.release("A")
    world.later(6.9)
    assert not world.table.empty()


def test_a_resource_lives_while_somebody_holds_or_waits(world):
    world.ask("A", "_t_%H[1]")
    world.release("A")
    world.ask("B", "_t_%H[1]")
    world.later(1000)
    world.leave("B")
    world.later(1.9)
    assert not world.table.empty()
    world.later(0.2)
    assert world.table.empty()


def test_the_idle_life_begins_anew_after_each_use(world):
    for _ in range(5):
        world.ask("A", "A.B.C")
        world.release("A")
        world.later(1.9)
    assert [element for _, element in world.granted] == ["A", "B", "C", "A", "B"]


def test_a_refused_request_does_not_prolong_the_idle_life(world):
    world.ask("A", "_t_%H[1]")
    world.release("A")
    world.later(1.5)
    assert world.ask("B", "_t_%H[1]", wait=0) == "B busy"
    world.later(0.5)
    assert world.table.empty()


def test_resources_end_each_in_its_time(world):
    for number, lifespan in enumerate((5000, 3000, 4000)):
        world.ask(f"S{number}", f"R{number}", lifespan=lifespan)
        world.release(f"S{number}")
    left = []
    for _ in range(5):
        world.later(1)
        left.append(len(world.table.resources))
    assert left == [3, 3, 2, 1, 0]


def test_a_resource_made_anew_is_not_ended_by_the_date_of_the_old(world):
    world.ask("A", "R", lifespan=3000)
    world.release("A")
    world.later(3)
    world.ask("A", "R", lifespan=5000)
    world.release("A")
    world.later(4)
    assert not world.table.empty()


def test_dates_do_not_pile_up(world):
    for _ in range(100):
        world.ask("A", "_t_%S[2]", lifespan=10 ** 8)
        world.ask("B", "_t_%S[2]")
        world.later(1)
        world.leave("A")
        world.leave("B")
        world.later(0.5)
    assert len(world.table._dates) <= 2


def test_dates_of_a_resource_that_is_gone_do_not_end_its_successor(world):
    world.ask("A", "_t_%S[2]", lifespan=3000)
    world.release("A")
    world.ask("B", "_t_%S[2]")
    world.later(1)
    world.leave("B")
    world.later(3)
    assert world.table.empty()
    world.ask("A", "_t_%S[2]", lifespan=9000)
    world.release("A")
    world.later(8.9)
    assert not world.table.empty()


# Tokens

def test_tokens_grow_with_each_grant_whatever_the_resource():
    world, tokens = World(epoch=7), []
    for session, name in zip("ABCDE", ("R", "n[2]", "A.B", "/t", "_s_x[1]")):
        world.ask(session, name)
        tokens.append(world.told[0].token)
    assert tokens == [(7 << 32) + number for number in range(1, 6)]
    world.ask("F", "R")
    assert world.told[0].token is None
    world.release("A")
    assert world.told[0].token == (7 << 32) + 6


def test_only_grants_carry_tokens_and_use_them(world):
    world.ask("A", "R")
    for _ in range(10):
        world.ask("B", "R", wait=0)
        assert world.told[0].token is None
    world.release("A")
    world.ask("B", "R")
    assert world.told[0].token == 2


# Limits

def test_one_waiter_too_many_is_refused():
    world = World(most_waiters=2)
    world.ask("A", "R")
    assert world.ask("B", "R") == "B queued"
    assert world.ask("C", "Q", create=0) == "C parked"
    assert world.ask("D", "R") == "D limit"
    assert world.ask("D", "Q", create=0) == "D limit"
    assert world.ask("D", "R", wait=0) == "D busy"
    assert world.ask("D", "R", "NL") == "D granted"
    assert world.leave("C") == ""
    assert world.ask("E", "R") == "E queued"
    assert world.ask("F", "R") == "F limit"
    assert world.release("A") == "B granted"
    assert world.ask("F", "R") == "F queued"


def test_one_resource_too_many_is_refused():
    world = World(most_resources=2)
    assert world.ask("A", "R1") == "A granted"
    assert world.ask("B", "/t/a") == "B granted"
    for wait in (0, 1):
        assert world.ask("C", "R3", wait=wait) == "C limit"
        assert "too many" in world.told[0].reason
    assert world.ask("C", "/t/b") == "C granted"
    assert world.ask("D", "R1") == "D queued"
    assert world.ask("E", "R3", create=0) == "E parked"
    world.leave("A")
    assert world.leave("D") == ""
    world.later(2)
    assert world.ask("A", "R3") == "A granted, E queued"


def test_a_holder_that_comes_back_is_no_resource_too_many():
    world = World(most_resources=1, window=3)
    assert reclaim(world, "A", "R1", reclaim=1000) == "A granted"
    assert world.ask("C", "R3") == "C limit"
    assert reclaim(world, "B", "R2", reclaim=1001) == "B granted"
    assert reclaim(world, "D", "R4", reclaim=1002) == "D limit"  # a liar


@pytest.mark.parametrize("form", [
    "n{}" + "a" * 200, "n{}" + ".b" * 20, "/{}" + "\u20ac" * 66, "/{}" + "/x" * 100],
    ids=["simple", "set", "tree", "node"])
def test_names_take_a_limited_part_of_the_memory(form, monkeypatch):
    """Those of idle resources, too, which may outlive their clients by weeks."""
    monkeypatch.setattr(flomd, "MOST_NAMES", 20000)
    world, made = World(), 0
    while world.ask("A", form.format(made), lifespan=10 ** 9) != "A limit":
        world.release("A")
        made += 1
    assert 10 < made < 110 and 19000 < world.table._catalogue.names < 20000 + len(form)
    world.later(10 ** 6 + 1)
    assert world.table.empty() and world.table._catalogue.names == 0
    assert world.ask("A", "R") == "A granted"


def test_the_nodes_that_a_tree_remembers_count(monkeypatch):
    """At the limit grants count as grants of the whole, so that a reclaim is rather refused."""
    monkeypatch.setattr(flomd, "MOST_NAMES", 5000)
    world = World()
    for number in range(200):
        for tree in "ab":
            assert world.ask("A", f"/{tree}/{number}{'x' * 500}", lifespan=60000).startswith("A gr")
            world.release("A")
    assert 4000 < world.table._catalogue.names < 6000
    world.later(61)
    assert world.table.empty() and world.table._catalogue.names == 0


def test_parked_requests_count_once_when_they_are_woken():
    world = World(most_waiters=3)
    for session in "ABC":
        world.ask(session, "R", create=0)
    assert world.ask("D", "R") == "D granted, A queued, B queued, C queued"
    assert world.ask("E", "R") == "E limit"
    assert world.release("D") == "A granted"
    assert world.ask("E", "R") == "E queued"


def test_a_waiter_may_replace_its_request_at_the_limit():
    world = World(most_waiters=1)
    world.ask("A", "R")
    world.ask("B", "R")
    assert world.ask("B", "R", "PR") == "B queued"
    assert world.ask("B", "R", "PR") == "B queued"


# Reclaims while the daemon goes on

def lost(world, name, mode="EX", **details):
    """A grants itself a lock and loses its connection; returns the token."""
    world.ask("A", name, mode, **details)
    token = world.told[0].token
    world.leave("A")
    return token


def reclaim(world, session, name, mode="EX", **details):
    return world.ask(session, name, mode, wait=0, ident=session[0], **details)


def test_a_lock_that_nobody_had_since_is_reclaimed(world):
    token = lost(world, "R")
    assert reclaim(world, "A2", "R", reclaim=token) == "A2 granted"
    assert world.told[0].token == token
    assert world.ask("B", "R", wait=0) == "B busy"
    assert world.ask("C", "Q") == "C granted"
    assert world.told[0].token == token + 1


@pytest.mark.parametrize("still", [True, False])
def test_a_lock_that_somebody_had_since_is_lost(world, still):
    token = lost(world, "R")
    world.ask("B", "R")
    if not still:
        world.release("B")
    assert reclaim(world, "A2", "R", reclaim=token) == "A2 busy"
    assert world.told[0].reason


def test_grants_of_compatible_modes_since_do_not_matter(world):
    token = lost(world, "R", "PR")
    world.ask("B", "R", "PR")
    world.ask("C", "R", "CR")
    world.release("C")
    assert reclaim(world, "A2", "R", "PR", reclaim=token) == "A2 granted"
    world.ask("D", "R", "EX")
    assert world.leave("B") == ""
    assert world.leave("A2") == "D granted"


def test_a_lock_whose_resource_is_no_more_is_lost(world):
    token = lost(world, "R")
    world.later(3)
    assert reclaim(world, "A2", "R", reclaim=token) == "A2 busy"
    assert world.table.empty()


@pytest.mark.parametrize("name, other, third, mode", [
    ("/t/a", "/t/a", "/t/b", "EX"), ("/t/a", "/t", "/t/b", "EX"), ("R", "R", "R", "PR")])
def test_grants_of_a_resource_that_is_forgotten_are_not(world, name, other, third, mode):
    """The resource ended after a grant that excludes the lost lock, and was made anew by one that
    does not."""
    token = lost(world, name, mode)
    world.ask("B", other)
    world.release("B")
    world.later(3)
    assert world.ask("C", third, mode).startswith("C granted")
    assert reclaim(world, "A2", name, mode, reclaim=token) == "A2 busy"
    world.leave("C")
    assert reclaim(world, "C2", third, mode, reclaim=world.token) == "C2 granted"


def test_grants_of_a_daemon_before_are_forgotten_ones():
    world = World(epoch=7)
    world.ask("B", "R", "PR")
    assert reclaim(world, "A", "R", "PR", reclaim=(7 << 32) - 1) == "A busy"


def test_who_was_given_its_lock_back_in_the_window_has_it_back_once_more():
    window = World(epoch=7, window=3)
    assert reclaim(window, "A", "R", reclaim=9) == "A granted"
    window.later(3)
    window.leave("A")
    assert reclaim(window, "A2", "R", reclaim=9) == "A2 granted"


def test_after_the_window_what_other_daemons_granted_is_forgotten():
    window = World(epoch=7, window=3)
    window.later(3)
    window.ask("B", "R", "PR")
    assert reclaim(window, "A", "R", "PR", reclaim=9) == "A busy"


def test_grants_on_other_branches_since_do_not_matter(world):
    token = lost(world, "/t/a")
    assert world.ask("B", "/t/b") == "B granted"
    assert reclaim(world, "A2", "/t/a", reclaim=token) == "A2 granted"


def test_a_grant_above_since_then_matters(world):
    token = lost(world, "/t/a")
    world.ask("B", "/t")
    world.release("B")
    assert reclaim(world, "A2", "/t/a", reclaim=token) == "A2 busy"


@pytest.mark.parametrize("name, element, later", [
    ("A.B.C", "A", "B"), ("_s_x[2]", "1", "2"), ("_S_x[2]", "1", "2"), ("_t_%S[3]", "00", None)])
def test_a_reclaim_gets_its_element_again(world, name, element, later):
    token = lost(world, name)
    assert reclaim(world, "A2", name, reclaim=token, held=element) == f"A2 granted {element}"
    answer = world.ask("B", name, wait=0)
    assert answer == (f"B granted {later}" if later else "B busy")


def test_a_reclaimed_value_is_rolled_back_once(world):
    token = lost(world, "_S_x[3]")
    reclaim(world, "A2", "_S_x[3]", reclaim=token, held="1")
    world.release("A2", committed=False)
    assert [world.ask(session, "_S_x[3]") for session in "BC"] == ["B granted 1", "C granted 2"]


def test_the_holder_comes_back_before_its_old_connection_was_seen_to_end(world):
    world.ask("A", "R")
    token = world.told[0].token
    world.ask("B", "R")
    assert reclaim(world, "A2", "R", reclaim=token) == "A2 granted, A closed"
    assert world.told[0].token == token
    assert world.leave("A") == ""
    assert world.release("A2") == "B granted"


@pytest.mark.parametrize("name, element", [("A.B.A", "A"), ("_s_x[1]", "1"), ("_S_x[1]", "1"),
                                           ("_t_%S[1]", "00"), ("n[2]", None), ("/t/a", None)])
def test_whatever_the_kind_the_holder_that_comes_back_has_what_it_had(world, name, element):
    world.ask("A", name)
    token = world.told[0].token
    text = reclaim(world, "A2", name, reclaim=token, held=element)
    assert text == " ".join(["A2 granted"] + [element] * (element is not None)) + ", A closed"
    world.release("A2")
    assert world.empty_after(5)


@pytest.mark.parametrize("ident, wrong", [("A", 1), ("X", 0)])
def test_somebody_else_does_not_take_over(world, ident, wrong):
    world.ask("A", "R")
    token = world.told[0].token - wrong
    assert world.ask("A2", "R", wait=0, ident=ident, reclaim=token) == "A2 busy"
    assert list(world.holders) == ["A"]


@pytest.mark.parametrize("kept, shown, comes_back", [
    ("k", "k", True), ("k", "x", False), ("k", None, False), (None, "x", True),
    (None, None, True)])
def test_a_holder_that_has_shown_a_key_comes_back_with_it_alone(world, kept, shown, comes_back):
    """Without one its origin counts, which is the same here."""
    world.ask("A", "R", key=kept)
    token = world.told[0].token
    text = reclaim(world, "A2", "R", reclaim=token, key=shown)
    assert text == ("A2 granted, A closed" if comes_back else "A2 busy")


@pytest.mark.parametrize("key, answer", [("k", "A2 granted, A closed"), (None, "A2 busy")])
def test_with_the_key_a_holder_comes_back_from_anywhere(world, key, answer):
    first, again = [make_request(session, "R", ident="A", key=key) for session in ("A", "A2")]
    first.origin, again.origin = 1, 2
    world.send(first)
    again.reclaim = world.told[0].token
    again.wait = 0
    assert world.send(again) == answer


def test_a_token_from_the_future_is_refused_and_changes_nothing(world):
    lost(world, "R")
    now = int(world.clock.wall) - 1577836800 << 32
    assert reclaim(world, "A2", "R", reclaim=now + DAY + 1) == "A2 busy"
    assert world.ask("B", "R") == "B granted"
    assert world.told[0].token == 2


def test_a_token_far_ahead_of_the_clock_is_no_stranger_when_tokens_are_that_far():
    """The clock was wrong when a daemon started: it stays with the tokens from then on."""
    epoch = int(World().clock.wall) - 1577836800 + 3 * 86400
    world = World(epoch=epoch)
    world.ask("B", "R", "PR")
    token = lost(world, "R", "PR")
    assert reclaim(world, "A2", "R", "PR", reclaim=token) == "A2 granted"
    assert reclaim(world, "C", "R", "PR", reclaim=token + 1) == "C busy"


def test_a_token_of_this_daemon_that_it_has_not_given_is_refused():
    world = World(epoch=7, window=3)
    assert reclaim(world, "A", "R", reclaim=(7 << 32) - 1) == "A granted"
    assert reclaim(world, "B", "Q", reclaim=(7 << 32) + 1) == "B busy"
    assert world.told[0].reason == "its token was never given"


def test_a_token_that_another_has_is_refused(window):
    reclaim(window, "A", "R", "PR", reclaim=9)
    assert reclaim(window, "B", "R", "PR", reclaim=9) == "B busy"
    assert window.told[0].reason == "another has its token"
    window.release("A")
    assert reclaim(window, "B", "R", "PR", reclaim=9) == "B granted"


def test_a_token_from_the_future_that_is_covered_is_none(window):
    token = (int(window.clock.wall) - 1577836800 << 32) + 2 * DAY
    assert reclaim(window, "A", "R", reclaim=token) == "A busy"
    window.table.cover(token)
    assert reclaim(window, "A", "R", reclaim=token) == "A granted"
    assert reclaim(window, "B", "Q", reclaim=token + 1) == "B busy"


def test_those_who_come_back_do_not_count_as_waiters():
    window = World(window=3, most_waiters=0)
    assert window.ask("B", "R") == "B limit"
    assert reclaim(window, "A", "R", reclaim=9) == "A granted"


# Holders that are known

NAMES = ["R", "n[3]", "A.B.A", "/t/a", "_s_x[2]", "_S_x[2]", "_t_%S[1]"]


def known(name):
    """A world after a restart: A is absent, and B, whose client is there, holds Q."""
    world = World()
    world.ask("A", name, key="k")
    world.restart()
    world.ask("B", "Q", key="l")
    return world


@pytest.mark.parametrize("was_told", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_who_was_absent_has_what_it_had(world, name, was_told):
    world.ask("A", name, key="k", quantity=2 if "n" in name else 1)
    world.later(1)
    world.restart()
    assert len(world.table.absent) == 1
    assert world.come_back("A", "A2", was_told).startswith("A2 granted")
    assert len(world.table.absent) == 0
    world.check_memory()
    world.release("A2")
    assert world.empty_after(5)


@pytest.mark.parametrize("was_told", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_who_asks_again_while_its_old_connection_stands_has_what_it_had(world, name, was_told):
    world.ask("A", name, key="k")
    assert world.come_back("A", "A2", was_told).endswith("A closed")
    assert world.leave("A2") == ""
    assert world.empty_after(5)


def test_an_absent_holder_counts(world):
    world.ask("A", "R", "PR", key="k")
    world.restart()
    assert world.ask("B", "R", wait=0) == "B busy"
    assert world.ask("C", "R", "PR") == "C granted"
    assert world.ask("D", "R") == "D queued"
    world.release("C")
    assert world.release("A") == "D granted"


@pytest.mark.parametrize("asked, mode", [("Q2", "EX"), ("R", "PR")])
def test_an_absent_holder_whose_client_asks_for_something_else_has_ended(asked, mode):
    world = known("R")
    assert world.ask("C", "R") == "C queued"
    del world.holders["A"]
    told = world.ask("A2", asked, mode, ident="A", key="k")
    assert told == ("C granted, A2 granted" if asked == "Q2" else "C granted, A2 queued")
    assert not world.table.absent


def test_what_it_had_is_committed_then():
    world = known("_S_x[1]")
    del world.holders["A"]
    world.ask("A2", "R", ident="A", key="k")
    assert world.ask("C", "_S_x[1]") == "C granted 2"


def test_a_holder_that_is_there_ends_so_too():
    """A client has one lock; it knows no more of the connection on which it was granted this."""
    world = known("R")
    assert world.ask("C", "Q") == "C queued"
    assert world.ask("B2", "P", ident="B", key="l") == "B closed, C granted, B2 granted"
    assert set(world.holders) == {"A", "C", "B2"}


def test_a_holder_that_is_there_keeps_what_it_has_when_it_asks_for_more_of_it():
    world = known("R")
    assert world.ask("B2", "Q", "PR", ident="B", key="l", wait=0) == "B2 busy"
    assert set(world.holders) == {"A", "B"}


@pytest.mark.parametrize("key, reclaimed", [("x", False), (None, False), ("x", True)])
def test_without_its_key_nobody_is_an_absent_holder(key, reclaimed):
    world = known("R")
    token = world.holders["A"].token if reclaimed else None
    assert world.ask("A2", "R", ident="A", key=key, wait=0, reclaim=token) == "A2 busy"
    assert world.ask("A3", "P", ident="A", key=key) == "A3 granted"
    assert set(world.table.absent) == {"A"}


def test_with_another_token_it_is_a_reclaim_like_any_other():
    world = known("R")
    assert world.ask("A2", "R", ident="A", key="k", wait=0, reclaim=7) == "A2 busy"
    assert set(world.table.absent) == {"A"}


def test_a_client_that_uses_the_id_of_another_is_not_in_its_way(world):
    world.ask("H", "Q")
    world.ask("X", "P", ident="A", key="x")
    world.ask("A", "R", key="k")
    world.restart()
    assert world.come_back("A", "A2").startswith("A2 granted")


def test_what_is_not_in_a_whole_memory_is_refused(world):
    world.ask("B", "R", "PR", key="k")
    world.ask("C", "_s_x[2]")
    world.release("C")
    world.restart()
    for name, mode, held in (("R", "PR", None), ("Q", "EX", None), ("_s_x[2]", "EX", "1")):
        token = (1 << 32) - 1
        assert reclaim(world, "A", name, mode, reclaim=token, held=held) == "A busy", name


def test_with_a_memory_that_is_not_whole_there_is_a_window_too(world):
    """Some hold locks of which it does not know."""
    world.ask("A", "R", key="k")
    world.ask("C", "A.B")
    world.release("C")
    world.restart(window=3)
    assert world.ask("B", "Q") == "B queued"
    assert reclaim(world, "D", "P", reclaim=5) == "D granted"
    assert reclaim(world, "E", "R", reclaim=6) == "E busy"
    assert world.come_back("A", "A2").startswith("A2 granted")
    assert world.later(3) == "B granted"
    for name, held in (("A.B", "A"), ("R", None), ("N", None)):
        assert reclaim(world, "F", name, reclaim=7, held=held) == "F busy"
    world.leave("D")
    assert reclaim(world, "D2", "P", reclaim=5) == "D2 granted"


def test_tokens_go_on_behind_those_of_the_memory(window):
    reclaim(window, "A", "R", reclaim=(90 << 32) + 7)
    table = flomd.restore(window.records, lambda: flomd.LockTable(epoch=5), window.clock, False,
                          str)
    assert table.request(make_request("B", "Q"), window.clock)[0].token == (90 << 32) + 8


# Where nothing is granted that is not remembered

def test_no_reclaim_is_granted_that_is_not_known(world):
    world.ask("A", "R", "PR", key="k")
    world.ask("B", "R", "PR")
    token = world.holders["A"].token
    world.leave("A")
    world.table.be_strict()
    assert reclaim(world, "A2", "R", "PR", reclaim=token) == "A2 busy"
    assert world.told[0].reason == "nothing is known of it"


def test_no_grace_becomes_shorter(world):
    world.table.be_strict()
    for told, counts in ((25000, 25000), (40000, 40000), (30000, 40000), (None, 40000)):
        request = make_request("A", "R", ident="A", key="k")
        request.grace = told
        world.table.request(request, world.clock)
        assert world.table.requests["A"].grace == counts


# Nothing can be stored

@pytest.mark.parametrize("name", ["_s_x[2]", "_S_x[2]", "_t_%S[2]"])
def test_numbers_are_not_granted_while_nothing_can_be_stored(world, name):
    world.ask("A", name, key="k")
    world.later(1)
    world.table.stall(True, world.clock)
    for create in ("_s_new[1]", name):
        assert world.ask("C", create, wait=0) == "C busy"
        assert "store" in world.told[0].reason
    assert world.ask("B", name) == "B queued"
    assert world.ask("D", "R") == "D granted"
    assert world.later(5) == ""
    assert reclaim(world, "E", name, reclaim=1, held="9") == "E limit"
    assert world.come_back("A", "A2").startswith("A2 granted")
    assert world._note(world.table.stall(False, world.clock)).startswith("B granted")
    assert world.ask("F", "_s_new[1]") == "F granted 1"


def test_who_waits_for_the_store_waits_for_nobody(world):
    """Its ancestor holds the one place that is taken: that is no deadlock."""
    world.ask("A", "_s_x[2]")
    world.table.stall(True, world.clock)
    assert world.ask("B", "_s_x[2]", under="A") == "B queued"
    assert world._note(world.table.stall(False, world.clock)) == "B granted 2"


# The recovery window

def test_in_the_window_only_reclaims_are_granted(window):
    assert window.ask("B", "R") == "B queued"
    assert window.ask("C", "Q", "NL") == "C queued"
    assert reclaim(window, "A", "R", reclaim=1000) == "A granted"
    assert window.told[0].token == 1000
    assert window.later(2.9) == ""
    assert window.later(0.1) == "C granted"
    assert window.token == 1001
    assert window.release("A") == "B granted"


def test_a_lock_that_is_released_in_the_window_is_granted_after_it(window):
    reclaim(window, "A", "R", reclaim=1000)
    window.ask("B", "R")
    assert window.release("A") == ""
    assert window.later(3) == "B granted"
    assert window.token > 1000


def test_a_waiter_that_leaves_in_the_window_moves_nobody(window):
    for session, mode in zip("ABC", ("PR", "EX", "PR")):
        window.ask(session, "R", mode)
    assert window.leave("B") == ""
    assert window.later(3) == "A granted, C granted"


def test_reclaims_that_exclude_each_other_are_granted_once(window):
    assert reclaim(window, "A", "R", "PR", reclaim=1000) == "A granted"
    assert reclaim(window, "B", "R", "PR", reclaim=1003) == "B granted"
    assert reclaim(window, "C", "R", "EX", reclaim=1001) == "C busy"
    assert window.told[0].reason
    window.later(3)
    window.ask("D", "Q")
    assert window.told[0].token == 1004


def test_units_are_reclaimed_as_far_as_they_go(window):
    assert reclaim(window, "A", "n[5]", quantity=3, reclaim=9) == "A granted"
    assert reclaim(window, "B", "n[5]", quantity=3, reclaim=8) == "B busy"
    assert reclaim(window, "C", "n[5]", quantity=2, reclaim=7) == "C granted"
    assert reclaim(window, "D", "n[5]", quantity=6, reclaim=6) == "D impossible"


def test_words_are_reclaimed_by_label(window):
    for session, held, answer in (("A", "A", "granted A"), ("B", "A", "granted A"),
                                  ("C", "A", "busy"), ("D", "X", "busy"), ("E", "B", "granted B")):
        told = reclaim(window, session, "A.B.A", reclaim=ord(session), held=held)
        assert told == f"{session} {answer}"
    window.later(3)
    assert window.ask("F", "A.B.A", wait=0) == "F busy"


def test_a_sequence_goes_on_behind_the_values_reclaimed(window):
    for session, held in (("A", "7"), ("B", "5")):
        answer = reclaim(window, session, "_S_x[9]", reclaim=ord(session), held=held)
        assert answer == f"{session} granted {held}"
    window.later(3)
    assert window.ask("C", "_S_x[9]") == "C granted 8"
    window.leave("B")
    assert window.ask("D", "_S_x[9]") == "D granted 5"
    assert window.ask("E", "_S_x[9]") == "E granted 9"


def test_after_the_greatest_value_reclaimed_the_sequence_begins_again(window):
    reclaim(window, "A", "_s_x[9]", reclaim=9, held="4294967295")
    window.later(3)
    assert window.ask("B", "_s_x[9]") == "B granted 1"


@pytest.mark.parametrize("held", [None, "", "0", "-1", "4294967296", "x", "07", "1 ", "\u0661"])
def test_a_value_that_is_none_is_not_reclaimed(window, held):
    assert reclaim(window, "A", "_s_x[9]", reclaim=9, held=held) == "A busy"


def test_a_value_that_another_holds_is_not_reclaimed(window):
    reclaim(window, "A", "_s_x[9]", reclaim=9, held="7")
    assert reclaim(window, "B", "_s_x[9]", reclaim=10, held="7") == "B busy"


def test_a_reclaimed_timestamp_counts_as_the_last_grant(window):
    assert reclaim(window, "A", "_t_%S[9]", reclaim=9, held="59") == "A granted 59"
    assert window.ask("B", "_t_%S[9]") == "B queued"
    assert window.later(2.9) == ""
    assert window.later(0.1) == "B granted 03"


def test_those_who_wait_for_the_clock_wait_for_the_end_of_the_window_too(window):
    window.ask("A", "_t_%S[9]")
    window.ask("B", "_t_%S[9]")
    assert window.later(2.9) == ""
    assert window.later(0.1) == "A granted 03"
    assert window.later(1) == "B granted 04"


@pytest.mark.parametrize("other, answer", [("EX", "B busy"), ("PR", "B granted")])
def test_who_does_not_wait_is_answered_at_the_end_of_the_window(window, other, answer):
    reclaim(window, "A", "R", "PR", reclaim=9)
    assert window.ask("B", "R", other, wait=0) == ""
    assert window.later(2.9) == ""
    assert window.later(0.1) == answer


def test_who_does_not_wait_and_does_not_create_is_answered_as_well(window):
    assert window.ask("B", "R", create=0, wait=0) == ""
    assert window.ask("C", "Q", create=0, wait=0) == ""
    assert window.ask("D", "Q", "NL", create=1) == "D queued"
    assert window.later(3) == "D granted, B absent, C granted"


def test_who_does_not_wait_is_kept_for_five_seconds_at_most():
    world = World(window=8)
    world.ask("A", "R", wait=0)
    world.later(1)
    world.ask("B", "Q", wait=0)
    assert world.later(3.9) == ""
    assert world.later(0.1) == "A busy"
    assert world.later(1) == "B busy"
    assert "A" not in world.table.requests
    assert world.later(5) == ""


def test_who_is_gone_before_its_answer_gets_none(window):
    window.ask("A", "R", wait=0)
    assert window.leave("A") == ""
    assert window.later(10) == ""
    assert window.table.empty()


def test_one_that_decides_to_wait_while_it_has_no_answer_is_queued(window):
    reclaim(window, "H", "R", reclaim=9)
    window.ask("A", "R", wait=0)
    assert window.ask("A", "R", wait=1) == "A queued"
    assert window.later(8) == ""
    assert window.release("H") == "A granted"


def test_parked_requests_queue_behind_their_creator_in_the_window_too(window):
    window.ask("A", "R", "PR", create=0)
    window.ask("B", "R", "EX", create=0)
    assert window.ask("C", "R", "EX") == "C queued, A queued, B queued"
    assert [decision.position for decision in window.told] == [1, 2, 3]
    assert window.later(3) == "C granted"
    assert window.release("C") == "A granted"
    assert window.release("A") == "B granted"


def test_a_reclaim_creates_and_wakes(window):
    window.ask("A", "R", create=0)
    assert reclaim(window, "B", "R", reclaim=9) == "B granted, A queued"
    assert window.later(3) == ""
    assert window.release("B") == "A granted"


def test_after_the_window_a_reclaim_of_what_is_unknown_is_refused(window):
    window.later(3)
    assert reclaim(window, "A", "R", reclaim=9) == "A busy"
    assert window.told[0].reason
    assert window.table.empty()


def test_the_window_is_a_date(window):
    assert window.table.next_date() == window.clock.mono + 3
    window.later(3)
    assert window.table.next_date() is None


def test_nothing_is_left_of_the_window(window):
    window.ask("A", "R")
    window.ask("B", "n[2]", wait=0)
    window.ask("C", "/t/a", create=0)
    reclaim(window, "D", "A.B", reclaim=9, held="B")
    window.later(1)
    assert window.empty_after(10)
