"""Publishing where the loop writes: in portions, and whole at any time."""
import os
import time

import pytest

import flomd
from test_memory import Table, client

MANY = 100  # resources
LONGEST = 0.1  # s of a portion on a machine that does something else, too


class Log:
    def __init__(self):
        self.lines = []

    def limited(self, text, level="warning"):
        self.lines.append(text)


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path)


def fill(table, number):
    for index in range(number):
        table.ask(client(), f"R{index}")


def publisher_of(table, folder):
    loop, log = flomd.Loop(Log()), Log()
    tree = flomd.Tree(folder, table.table)
    return loop, flomd.Publisher(loop, log, table.table, flomd.Counts(), [tree], forks=False), log


def run(loop, publisher):
    """Until nothing is written any more; returns the s of processor time of each turn."""
    turns = []
    while publisher._writer is not None:
        begun = time.process_time()
        loop._turn(0)
        loop._do_what_is_due()
        turns.append(time.process_time() - begun)
    return turns


def shown(folder):
    """The names of the resources that are shown."""
    top = os.path.join(folder, "status", "lockers")
    names = []
    for number in os.listdir(top):
        with open(os.path.join(top, number, "resource_name")) as file:
            names.append(file.read().strip())
    return sorted(names)


@pytest.mark.in_time
def test_a_large_tree_is_written_and_removed_in_portions(folder):
    table = Table()
    fill(table, MANY)
    loop, publisher, log = publisher_of(table, folder)
    publisher.begin()
    first = run(loop, publisher)
    publisher.changed()
    publisher._publish(next(iter(publisher._acts)))  # and removes the first tree
    second = run(loop, publisher)
    assert len(shown(folder)) == MANY
    assert len(os.listdir(folder)) == 2
    for turns in first, second:
        assert len(turns) > 1
        assert sorted(turns)[len(turns) // 2] < 3 * flomd.WRITTEN_AT_ONCE
        assert max(turns) < LONGEST
    publisher.close()
    assert os.listdir(folder) == []
    assert log.lines == []


def test_the_table_may_change_while_it_is_written(folder, monkeypatch):
    monkeypatch.setattr(flomd, "WRITTEN_AT_ONCE", 0)  # one file a turn
    table = Table()
    fill(table, 20)
    loop, publisher, log = publisher_of(table, folder)
    publisher.begin()
    for number in range(15):
        loop._turn(0)
        loop._do_what_is_due()
        table.ask(client(), f"new{number}")
        table.release(next(iter(table.table.holders.values())).session)
        table.clock.move(1000)
    run(loop, publisher)
    assert len(shown(folder)) >= 5
    publisher.close()
    assert (os.listdir(folder), log.lines) == ([], [])


def test_another_publisher_takes_over(folder, monkeypatch):
    """As the next term of a daemon of a quorum does, perhaps in the midst of a version."""
    table = Table()
    fill(table, 3)
    loop, first, log = publisher_of(table, folder)
    first.begin()
    run(loop, first)
    monkeypatch.setattr(flomd, "WRITTEN_AT_ONCE", 0)
    first._publish(next(iter(first._acts)))
    loop._turn(0)
    loop._do_what_is_due()
    first.stop()
    fill(table, 1)
    loop, second, log = publisher_of(table, folder)
    second.begin()
    run(loop, second)
    assert len(shown(folder)) == 3
    assert len(os.listdir(folder)) == 2
    second.close()
    assert (os.listdir(folder), log.lines) == ([], [])


def test_a_version_that_cannot_be_written_is_told_and_removed(folder, monkeypatch):
    table = Table()
    fill(table, 3)
    loop, publisher, log = publisher_of(table, folder)

    def broken(_):
        yield "lockers/1/resource_name", "R0"
        raise OSError(28, "No space left on device", "somewhere")
    monkeypatch.setattr(flomd, "tree", broken)
    publisher.begin()
    run(loop, publisher)
    assert log.lines == ["cannot write somewhere: No space left on device"]
    assert os.listdir(folder) == []
    monkeypatch.undo()
    publisher._publish(next(iter(publisher._acts)))
    run(loop, publisher)
    assert shown(folder) == ["R0", "R1", "R2"]
    publisher.close()
