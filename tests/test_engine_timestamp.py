"""Timestamps: each grant falls into an interval of its own."""
import pytest
from engine_world import MICRO, World


@pytest.fixture(params=["fair", "first-fit"])
def world(request):
    return World(request.param)


def test_the_element_is_the_local_time(world):
    assert world.ask("A", "_t_%H:%M:%S[1]") == "A granted 12:00:00"


@pytest.mark.parametrize("form, element", [
    ("%S#f", "01.2"), ("%S#ff", "01.23"), ("%S#fff", "01.234"), ("%S#ffff", "01.2345"),
    ("%S#fffff", "01.23456"), ("%S#ffffff", "01.234567"), ("%S#fffffff", "01.234567f"),
    ("#f:#fff:#ffffff", ".2:.234:.234567"), ("a.b#f", "a.b.2"), ("%H.%M#fff", "12.00.234"),
    ("%T", "12:00:01"), ("%R", "12:00"), ("%Sx#", "01x#"), ("%S#F", "01#F"), ("F%M", "F00")])
def test_fractions_are_a_dot_and_digits_cut_off(world, form, element):
    world.later(1.234567)
    assert world.ask("A", f"_t_{form}[1]") == f"A granted {element}"


def test_fractions_are_cut_and_not_rounded(world):
    world.later(0.999999)
    assert world.ask("A", "_t_%S#f[1]") == "A granted 00.9"
    assert world.ask("B", "_t_%S#fffff[1]") == "B granted 00.99999"


RESOLUTIONS = [
    ("#ffffff", 1), ("#fffff", 10), ("#ffff", 100), ("#fff", 1000), ("#ff", 10000), ("#f", 100000),
    ("%c", MICRO), ("%r", MICRO), ("%s", MICRO), ("%S", MICRO), ("%T", MICRO), ("%X", MICRO),
    ("%M", 60 * MICRO), ("%R", 60 * MICRO), ("%H", 3600 * MICRO), ("%I", 3600 * MICRO),
    ("%H#ffffff", 1), ("#f#fff", 1000), ("%H:%M:%S", MICRO), ("%H:%M", 60 * MICRO),
    ("%M:%H", 60 * MICRO), ("%Y%H", 3600 * MICRO), ("x%S%D", MICRO)]


@pytest.mark.parametrize("form, micros", RESOLUTIONS)
def test_the_next_grant_is_at_the_start_of_the_next_interval(world, form, micros):
    world.later(0.5 * micros / MICRO if micros > 1 else 0)
    assert world.ask("A", f"_t_{form}[2]").startswith("A granted")
    assert world.ask("B", f"_t_{form}[2]", wait=0) == "B busy"
    assert world.ask("B", f"_t_{form}[2]") == "B queued"
    start = world.clock.local_micros // micros * micros
    while "B" in world.queue:
        world.wait_for_date()
    assert 0 <= world.clock.local_micros - start - micros <= 1


@pytest.mark.parametrize("form", ["%D", "%Y", "%j", "%a", "%p", "%%", "a", "%m%d", "F", "#", "%h",
                                  "#F", "%", "%x", "%G"])
def test_formats_that_cannot_tell_two_grants_apart_are_refused(world, form):
    for wait, create in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert world.ask("A", f"_t_{form}[1]", wait=wait, create=create) == "A invalid"
    assert world.table.empty()


@pytest.mark.parametrize("form", [
    "%%S", "%%S%%M", "a%%%%H", "%%#x", "%0%S", "%2%M",  # no conversion: always the same text
    "%S%n%M", "%t%S", "%n%S", "%S%500d", "%S%2000d", "%S%65000d%65000d", "%S%9999999999d",
    "%S%499B"])
def test_formats_whose_text_cannot_be_an_element_are_refused(world, form):
    assert world.ask("A", f"_t_{form}[1]") == "A invalid"
    assert world.table.empty()


@pytest.mark.parametrize("form, element", [
    ("%%%S", "%00"), ("%%#f", "%.0"), ("%S%%", "00%"), ("%S%%M", "00%M"), ("%e%S", "2100")])
def test_a_percent_sign_is_a_text_beside_a_conversion(world, form, element):
    assert world.ask("A", f"_t_{form}[1]") == f"A granted {element}"


def test_a_text_of_500_characters_is_the_longest(world):
    assert world.ask("A", "_t_%498d%S[1]") == "A granted " + "21".zfill(498) + "00"
    assert world.ask("B", "_t_%499d%S[1]") == "B invalid"


def test_an_element_never_begins_like_an_option(world):
    """West of Greenwich %z is -0500."""
    world.clock.format = lambda text, later=0: text.replace("%z", "-0500").replace(
        "%S", f"{(world.clock.local_micros // MICRO + later) % 60:02}")
    assert world.ask("A", "_t_%z%S[1]") == "A invalid"
    assert world.ask("A", "_t_%S%z[1]") == "A granted 00-0500"


def test_an_hour_that_comes_twice_is_no_reason_to_refuse(world):
    """At the end of summer time two hours in a row look alike."""
    shown = {12: "02", 13: "02", 14: "03"}
    world.clock.format = lambda text, later=0: shown.get(
        (world.clock.local_micros // MICRO + later) // 3600 % 24, "04")
    assert world.ask("A", "_t_%H[1]") == "A granted 02"


def test_a_free_place_is_needed_as_well_as_a_later_interval(world):
    assert world.ask("A", "_t_%S[2]") == "A granted 00"
    assert world.later(1) == ""
    assert world.ask("B", "_t_%S[2]") == "B granted 01"
    assert world.ask("C", "_t_%S[2]") == "C queued"
    assert world.later(5) == ""
    assert world.release("A") == "C granted 06"
    assert world.ask("D", "_t_%S[2]") == "D queued"
    assert world.release("B") == ""
    assert world.later(1) == "D granted 07"


def test_waiters_are_granted_one_in_each_interval_in_order(world):
    world.later(0.3)
    assert world.ask("A", "_t_%S[9]") == "A granted 00"
    for session in "BCD":
        world.ask(session, "_t_%S[9]")
    assert world.later(0.6) == ""
    assert world.later(0.1) == "B granted 01"
    assert world.later(0.9) == ""
    assert world.later(1.1) == "C granted 02, D granted 03"
    assert world.table.next_date() is None


def test_nobody_overtakes_those_who_wait_for_the_clock():
    world = World()
    world.ask("A", "_t_%S[9]")
    world.ask("B", "_t_%S[9]")
    world.clock.move(MICRO)
    assert world.ask("C", "_t_%S[9]", wait=0) == "C busy"
    assert world.later(0) == "B granted 01"


def test_a_waiter_for_the_clock_that_leaves_gives_its_interval_to_the_next(world):
    for session in "ABC":
        world.ask(session, "_t_%S[9]")
    assert world.leave("B") == ""
    assert world.later(1) == "C granted 01"


def test_intervals_are_those_of_local_time(world):
    world.set_clock(-1800)  # as in a zone that is half an hour off
    world.later(1799)
    assert world.ask("A", "_t_%H[2]") == "A granted 11"
    assert world.ask("B", "_t_%H[2]") == "B queued"
    assert world.later(1) == "B granted 12"


def test_seconds_alone_repeat_each_minute(world):
    assert world.ask("A", "_t_%S[2]") == "A granted 00"
    world.later(60)
    assert world.ask("B", "_t_%S[2]") == "B granted 00"


def test_a_clock_set_back_grants_nobody_before_it_passes_the_last_grant(world):
    world.later(30)
    assert world.ask("A", "_t_%S[9]") == "A granted 30"
    world.set_clock(-20)
    assert world.ask("B", "_t_%S[9]", wait=0) == "B busy"
    assert world.ask("B", "_t_%S[9]") == "B queued"
    assert world.later(20.9) == ""
    assert world.later(0.1) == "B granted 31"


def test_a_clock_set_forward_is_seen_within_a_second(world):
    assert world.ask("A", "_t_%H[9]") == "A granted 12"
    assert world.ask("B", "_t_%H[9]") == "B queued"
    assert world.later(10.5) == ""
    world.set_clock(3600)
    assert world.later(1) == "B granted 13"


def test_the_timer_is_set_at_least_every_second_and_only_for_waiters(world):
    world.ask("A", "_t_%H[9]", lifespan=10000)
    assert world.table.next_date() is None
    world.ask("B", "_t_%H[9]")
    for _ in range(20):
        assert 0 < world.table.next_date() - world.clock.mono <= 1
        world.wait_for_date()
    world.leave("B")
    world.wait_for_date()
    assert world.table.next_date() is None


def test_no_timer_while_every_place_is_taken(world):
    world.ask("A", "_t_%S[1]")
    world.ask("B", "_t_%S[1]")
    assert world.table.next_date() is None
    assert world.later(10) == ""
    assert world.release("A") == "B granted 10"


def test_a_request_on_an_idle_resource_that_is_too_early(world):
    world.later(0.2)
    world.ask("A", "_t_%M[1]")
    world.release("A")
    assert world.ask("B", "_t_%M[1]", wait=0) == "B busy"
    assert world.ask("B", "_t_%M[1]", create=0) == "B queued"
    assert world.later(59) == ""
    assert world.later(1) == "B granted 01"


def test_the_last_grant_dies_with_the_resource(world):
    world.ask("A", "_t_%M[1]")
    world.release("A")
    world.later(2)
    assert world.ask("B", "_t_%M[1]") == "B granted 00"


def test_ten_clients_and_two_thousand_grants_without_a_text_twice(world):
    name = "_t_a#ffffff[10]"
    for number in range(10):
        world.ask(f"S{number}", name)
    while len(world.granted) < 2000:
        for session in list(world.holders):
            world.release(session)
            world.ask(session, name)
        world.later(0.000003)
    texts = [element for _, element in world.granted]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("still", [True, False])
def test_a_reclaimed_text_ahead_of_the_clock_is_granted_to_nobody_else(still):
    """The clock was set back, or another host's was ahead."""
    world = World(window=1)
    name = "_t_%H:%M:%S[9]"
    assert world.ask("A", name, reclaim=9, held="12:00:03") == "A granted 12:00:03"
    assert world.later(1) == ""
    if not still:
        world.release("A")
    for session, text in (("B", "12:00:01"), ("C", "12:00:02"), ("D", "12:00:04")):
        told = world.ask(session, name)
        while told in (f"{session} queued", ""):
            told = world.wait_for_date()
        assert told == f"{session} granted {text}"


def test_a_text_that_another_holds_is_not_reclaimed():
    world = World(window=1)
    assert world.ask("A", "_t_%S[9]", reclaim=9, held="03", wait=0) == "A granted 03"
    assert world.ask("B", "_t_%S[9]", reclaim=10, held="03", wait=0) == "B busy"
