"""The checker of test_etcd_real.py finds what is wrong in a log, by logs that are made up."""
import collections

from etcd_load import LOCKS, check, serves_after

Command = collections.namedtuple("Command", "asked begun ended token value status lock")


def command(asked, begun, ended, token, value="-", status=0, lock="job"):
    return Command(asked, begun, ended, token, value, status, lock)


def log(*commands):
    lines = []
    for number, one in enumerate(commands):
        lines += [f"ask c{number} {one.lock} {one.asked}",
                  f"begin c{number} {one.lock} {one.token} {one.value} {one.begun}",
                  f"end c{number} {one.ended}", f"exit c{number} {one.status} {one.ended + 1}"]
    return lines


GOOD = [command(0, 1, 2, 10), command(0, 2.5, 3, 11),
        command(1, 2, 9, 12, lock="_s_x[1]", value=1)]


def test_a_good_log():
    found = check(log(*GOOD))
    assert (found.runs, found.overlaps, found.tokens_back, found.twice) == (3, [], [], [])
    assert found.statuses == {0: 3} and found.longest == 2.5


def test_an_empty_log():
    assert check([])[:4] == (0, [], [], [])


def test_an_overlap():
    assert check(log(command(0, 1, 3, 10), command(0, 2.9, 4, 11))).overlaps == [("c0", "c1")]


def test_an_overlap_with_one_that_is_not_the_last():
    found = check(log(command(0, 1, 9, 10), command(0, 9.5, 9.6, 11), command(0, 2, 3, 12)))
    assert found.overlaps == [("c0", "c2")]
    found = check(log(command(0, 1, 9, 1), command(0, 2, 3, 2), command(0, 4, 5, 3)))
    assert found.overlaps == [("c0", "c1"), ("c0", "c2")]


def test_of_different_locks_nothing_overlaps():
    assert check(log(*[command(0, 1, 3, 10, lock=lock) for lock in LOCKS])).overlaps == []


def test_one_without_an_end_lived_as_long_as_it_said_so():
    killed = ["ask a job 0", "begin a job 5 - 1", "alive a 1.1", "alive a 1.2", "exit a 95 8"]
    after = ["ask b job 0", "begin b job 6 - 1.15", "end b 2", "exit b 0 2"]
    assert check(killed + after).overlaps == [("a", "b")]
    assert check([line for line in killed if "1.2" not in line] + after).overlaps == []


def test_a_token_that_goes_back():
    assert check(log(command(0, 1, 2, 10), command(0, 3, 4, 10))).tokens_back == ["c1"]
    assert check(log(command(0, 1, 2, 10), command(0, 3, 4, 9))).tokens_back == ["c1"]


def test_a_value_that_comes_twice():
    def of(lock, *statuses):
        return check(log(*[command(0, 2 * n, 2 * n + 1, n, value=7, status=status, lock=lock)
                           for n, status in enumerate(statuses)])).twice
    assert of("_s_x[1]", 0, 95) == [("_s_x[1]", "7")]
    assert of("_S_y[1]", 0, 0) == [("_S_y[1]", "7")]
    assert of("_S_y[1]", 95, 0) == []


def test_statuses_and_who_waits_still():
    found = check(log(command(0, 1, 2, 10, status=95)) + ["ask z job 1", "alive c0 41"])
    assert found.statuses == {95: 1, None: 1} and found.longest == 40


def test_the_time_until_somebody_serves():
    found = check(["serve 10.77.0.2 9.5", "serve 10.77.0.1 4.5"])
    assert serves_after(found, 4) == 0.5 and serves_after(found, 5) == 4.5
    assert serves_after(found, 10) is None
