"""The published use cases of the kinds that are more than a name: numeric, set, hierarchical,
sequence, timestamp.  Real clients, a real daemon, order proven by a log.
"""
import os
import re

import pytest
from test_usecases import end
from world import FLOM, PYTHON, is_busy, wait_until

NEVER = "Resource will never satisfy the request, the lock cannot be obtained\n"


def nested(box, *options):
    """The words of a flom.py inside a command."""
    return PYTHON + [FLOM, *box.address, *options, "--"]


def elements(box, name, count, *options):
    """What `count` runs, one after the other, are given."""
    return [box.run(*options, "-r", name, "--", "echo").out.strip() for _ in range(count)]


def open_all(gates, processes):
    for gate in gates:
        gate.open()
    end(*processes)


# Use cases 10 and 11: numeric

def test_10_at_most_n_at_once(box):
    """Use case 10: a numeric resource of two units lets two commands of one unit run at once."""
    held = [box.hold(name, "-r", "ping[2]", "-q", "1") for name in ("one", "two")]
    gate = box.gate("three")
    third = box.waiter("-r", "ping[2]", "-q", "1", "--", *gate.command)
    assert box.events() == ["one start", "two start"]
    held[0][1].open()
    end(held[0][0])
    gate.wait()
    assert box.events() == ["one start", "two start", "one end", "three start"]
    for opened in (held[1][1], gate):
        opened.open()
    end(held[1][0])
    assert third.end().status == 0


def test_10_pools_of_other_sizes_are_others(box):
    """Use case 10: the size belongs to the name."""
    holder, gate = box.hold("all", "-r", "foo[3]", "-q", "3")
    assert is_busy(box.run("-r", "foo[3]", "-o", "0", "--", "echo", "x"))
    assert box.run("-r", "foo[2]", "-q", "2", "-o", "0", "--", "echo", "x") == (0, "x\n", "")
    open_all([gate], [holder])


@pytest.mark.parametrize("wait", ["-1", "0"])
def test_10_more_than_there_is(box, wait):
    """Use case 10: a quantity that will never be there is refused, also to who would wait."""
    assert box.run("-r", "foo[2]", "-q", "3", "-o", wait, "--", "echo", "x") == (99, "", NEVER)


def test_11_one_writer_and_n_readers_nested(box):
    """Use case 11: a flom inside a flom.  One writer and two readers run at once, by their modes
    and by a pool of two units; the fourth waits."""
    writer, writer_gate = box.hold("writer", "-l", "PW")
    pool = nested(box, "-V", "-r", "foo[2]")
    gates = [box.gate(f"reader{n}") for n in range(3)]
    readers = []
    for gate in gates[:2]:
        readers.append(box.flom("-l", "CR", "--", *pool, *gate.command))
        gate.wait()
    readers.append(box.waiter("-l", "CR", "--", *pool, *gates[2].command))
    assert box.events() == ["writer start", "reader0 start", "reader1 start"]
    gates[0].open()
    gates[2].wait()
    assert box.events()[3:] == ["reader0 end", "reader2 start"]
    for gate in gates[1:] + [writer_gate]:
        gate.open()
    assert [reader.end().status for reader in readers] == [0, 0, 0]
    end(writer)


# Use cases 12 and 13: set

def test_12_sets(box):
    """Use case 12: the words of a set are handed out in turn."""
    assert elements(box, "red.green.blue", 3) == ["red", "green", "blue"]


def test_13_the_element_is_the_last_argument(box):
    """Use case 13: of four at once three run, each with the word that it was given as its last
    argument; the one that comes too late is told so."""
    script = '#!/bin/sh\necho "$NAME" start "$@" $# >>log; read _ <"gate.$NAME" || exit 0\n'
    os.chmod(box.write("script", script), 0o700)
    gates = [box.gate(f"g{n}") for n in range(4)]
    command = ("-o", "0", "-r", "red.green.blue", "--", "./script", "3")
    runs = [box.flom(*command, cwd=box.folder, env={"NAME": gate.name}) for gate in gates]
    wait_until(lambda: len(box.events()) == 3 and any(run.poll() is not None for run in runs))
    given = {line.split()[0]: line.split(None, 2)[2] for line in box.events()}
    assert sorted(given.values()) == ["3 blue 2", "3 green 2", "3 red 2"]
    for gate, run in zip(gates, runs):
        if gate.name in given:
            gate.open()
        assert run.end() == (0, "", "") if gate.name in given else is_busy(run.end())


# Use cases 14 and 15: hierarchical

def test_14_files_as_names(box):
    """Use case 14: the path of a file is a name, and another file is another resource."""
    sleep, gate = box.hold("sleep", "-r", "/foo/bar")
    ls = box.waiter("-r", "/foo/bar", "--", *box.note("ls"))
    assert box.run("-r", "/foo/baz", "-o", "0", "--", "echo", "x") == (0, "x\n", "")
    open_all([gate], [sleep])
    assert ls.end().status == 0
    assert box.events() == ["sleep start", "sleep end", "ls"]


READER, BESIDE, BACKUP = ("/foo/bar", "PR"), ("/foo/blue", "PR"), ("/foo", "PR")
ELSEWHERE, BELOW = ("/foo/blue/apple", "EX"), ("/foo/bar/apple", "EX")
DEEP = ("/foo/bar/fruit/apple", "EX")

# Who comes, in order; of those who have to wait, {who: for whom}; and the same in reverse order.
TREES = {
    "a": ([READER, ELSEWHERE], {}, {}),
    "b": ([READER, BELOW], {1: 0}, {1: 0}),
    "c": ([READER, DEEP], {1: 0}, {1: 0}),
    "d": ([READER, BESIDE, BACKUP], {}, {}),
    "e": ([BESIDE, BELOW, BACKUP], {2: 1}, {1: 0}),
    "e, one file": ([READER, BELOW, BACKUP], {1: 0, 2: 1}, {1: 0, 2: 1}),
    "f": ([BESIDE, BACKUP, BELOW], {2: 1}, {1: 0}),
    "f, one file": ([READER, BACKUP, BELOW], {2: 1}, {1: 0, 2: 0}),
}


@pytest.mark.parametrize("who, waits, reverse", TREES.values(), ids=list(TREES))
def test_15_readers_writers_backup(box, who, waits, reverse):
    """Use case 15: a lock on a folder is one on all below it: a backup waits for writers."""
    come(box, "", who, waits)
    come(box, "r", who[::-1], reverse)


def come(box, prefix, who, waits):
    """Starts them in order, lets them end in order, and looks who has waited for whom."""
    gates, processes = [box.gate(f"{prefix}{n}") for n in range(len(who))], []
    for n, (gate, (node, mode)) in enumerate(zip(gates, who)):
        start = box.waiter if n in waits else box.flom
        processes.append(start("-r", node, "-l", mode, "--", *gate.command))
        if n not in waits:
            gate.wait()
    for n, gate in enumerate(gates):
        assert not any(gates[later].started() for later in waits if waits[later] == n)
        gate.open()
    assert [process.end().status for process in processes] == [0] * len(who)
    events = box.events()
    for later, earlier in waits.items():
        assert events.index(f"{prefix}{earlier} end") < events.index(f"{prefix}{later} start")


# Use case 18: sequences

def test_18_a_sequence(box):
    """Use case 18: each run is given the next number."""
    assert elements(box, "_s_a[1]", 4, "-i", "10000") == ["1", "2", "3", "4"]


def test_18_a_transactional_sequence(box):
    """Use case 18: the number of a run that failed is given again."""
    command = ["--", "/bin/sh", "-c", 'echo "$1"; exit "$0"']
    runs = [box.run("-i", "10000", "-r", "_S_a[1]", *command, status) for status in "12000"]
    assert [run.status for run in runs] == [1, 2, 0, 0, 0]
    assert [run.out for run in runs] == ["1\n", "1\n", "1\n", "2\n", "3\n"]


def test_18_three_at_once(box):
    """Use case 18: three numbers may be in use at once; the fourth run waits."""
    held = [box.hold(name, "-r", "_s_foo[3]") for name in ("one", "two", "three")]
    fourth = box.waiter("-r", "_s_foo[3]", "--", "echo")
    assert box.events() == ["one start 1", "two start 2", "three start 3"]
    open_all([gate for _, gate in held], [process for process, _ in held])
    assert fourth.end().out.splitlines()[-1] == "4"


# Use case 19: timestamps

def test_19_each_waits_for_its_next_second(box):
    """Use case 19: no two runs are given the same time of day."""
    box.daemon()
    runs = [box.flom("-r", "_t_bar.%H:%M:%S[4]", "--", "echo") for _ in range(3)]
    end(*runs)
    given = {run.out for run in runs}
    assert len(given) == 3
    assert all(re.fullmatch(r"bar\.\d\d:\d\d:\d\d\n", out) for out in given)


def test_19_a_format_that_cannot_tell_two_grants_apart(box):
    """Use case 19: the day alone is refused, a second run would have to wait until tomorrow."""
    status, out, err = box.run("-r", "_t_e.%d[1]", "--", "echo", "x")
    assert (status, out, err.count("\n")) == (99, "", 1) and err.startswith("flom: ")


@pytest.mark.parametrize("name", ["_t_%D.%T#f[2]", "_t_%D.%T#ffffff[2]"])
def test_19_loops(box, name):
    """Use case 19: two loops at once never meet the same text, also in parts of a second."""
    box.daemon()
    loop = 'for n in 1 2 3; do "$@" || exit; done'
    command = nested(box, "-r", name) + ["echo"]
    loops = [box.start("/bin/sh", "-c", loop, "sh", *command) for _ in range(2)]
    end(*loops)
    given = [line for process in loops for line in process.out.splitlines()]
    assert len(given) == len(set(given)) == 6
