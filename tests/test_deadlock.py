"""Commands that run under a lock and ask, by another flom.py, for a lock: who would wait for ever
is refused, with 94 and the cycle, and nobody else is.
"""
import re

import pytest
from fakes import FlomDaemon
from world import FLOM, PYTHON, is_busy, wait_until

LINK = r"(\S+) is held by \S+:(\d+) '[^']*'"
REFUSED = re.compile(r"flom: deadlock: .*, under which this command runs; .*--deadlock wait\n")


def nested(address, *options):
    """The words of a flom.py inside a command."""
    return PYTHON + [FLOM, *address, *options, "--"]


def later(gate, *command):
    """A command that becomes another one when the gate is opened."""
    script = 'echo "$0" start >>"$1"; read _ <"$2"; shift 2; exec "$@"'
    return ["/bin/sh", "-c", script, gate.name, gate.box.log, gate.fifo, *command]


def cycle(err):
    """[(resource, pid of its holder)] of the one line that refuses."""
    line, = [line for line in err.splitlines(True) if line.startswith("flom: ")]
    assert REFUSED.fullmatch(line), line
    return [(name, int(pid)) for name, pid in re.findall(LINK, line)]


def test_the_same_resource_again(box):
    outer = box.flom("-r", "A", "--", *nested(box.address, "-r", "A"), *box.note("wrong"))
    status, out, err = outer.end()
    assert (status, out, err.count("\n"), box.events()) == (94, "", 1, [])
    assert cycle(err) == [("A", outer.pid)]
    assert box.run("-r", "A", "-o", "0", "--", "echo", "x") == (0, "x\n", "")


@pytest.mark.parametrize("outer, inner", [
    (("/a",), ("/a/b",)), (("p[2]",), ("p[2]", "-q", "2")), (("_S_v[1]",), ("_S_v[1]",))])
def test_the_other_kinds(box, outer, inner):
    words = nested(box.address, "-r", *inner)
    status, out, err = box.run("-r", *outer, "--", *words, "echo", "x")
    assert (status, out) == (94, "") and cycle(err)


def test_three_deep(box):
    words = [word for name in "BCA" for word in nested(box.address, "-r", name)]
    outer = box.flom("-r", "A", "--", *words, *box.note("wrong"))
    status, out, err = outer.end()
    assert (status, out, box.events()) == (94, "", [])
    assert cycle(err) == [("A", outer.pid)]


def test_deeper_than_a_chain_and_under_names_that_leave_no_room_for_one(box):
    """Also where one in between tells its command nothing else of its lock."""
    words = [*nested(box.address, "-r", "A"), *box.note("wrong")]
    for number in range(9):
        words = [*nested(box.address, "-r", f"/{number}{'x' * 140}", "--set-env", "no"), *words]
    outer = box.flom("-r", "A", "--", *words)
    status, out, err = outer.end()
    assert (status, out, box.events()) == (94, "", [])
    assert cycle(err) == [("A", outer.pid)]


@pytest.fixture(params=["one host", "two hosts"])
def pair(request):
    """Two boxes and the address that serves both."""
    if request.param == "one host":
        box = request.getfixturevalue("box")
        return box, box, box.address
    one, two = request.getfixturevalue("hosts")(2)
    address = ("-a", one.ipv4)
    assert one.run(*address, "-d", "-1", "--", "true") == (0, "", "")
    return one, two, address + ("-d", "0")


def test_two_clients_crosswise(pair):
    """The second is refused, and when its command has ended the first has its lock."""
    gates, clients = [pair[0].gate("first"), pair[1].gate("second")], []
    for box, gate, held, wanted in zip(pair, gates, "AB", "BA"):
        inner = nested(pair[2], "-V", "-r", wanted) + box.note(f"{gate.name} inside")
        clients.append(box.flom(*pair[2], "-r", held, "--", *later(gate, *inner)))
        gate.wait()
    first, second = clients
    gates[0].open()
    wait_until(lambda: "waiting for" in first.err)
    gates[1].open()
    assert second.end().status == 94
    assert cycle(second.err) == [("A", first.pid), ("B", second.pid)]
    assert first.end().status == 0 and "deadlock" not in first.err
    assert pair[0].events() == ["first start", "second start", "first inside"]


def test_a_chain_of_five(box):
    """Everyone asks for what the next one holds, the last one for what the first one holds."""
    gates, clients = [box.gate(f"{n}") for n in range(5)], []
    for n, gate in enumerate(gates):
        inner = nested(box.address, "-V", "-r", f"R{(n + 1) % 5}") + box.note(f"{n} inside")
        clients.append(box.flom("-r", f"R{n}", "--", *later(gate, *inner)))
        gate.wait()
    for gate, client in list(zip(gates, clients))[:4]:
        gate.open()
        wait_until(lambda: "waiting for" in client.err)
    gates[4].open()
    assert [client.end().status for client in clients] == [0, 0, 0, 0, 94]
    assert cycle(clients[4].err) == [(f"R{n}", client.pid) for n, client in enumerate(clients)]
    assert box.events()[5:] == [f"{n} inside" for n in (3, 2, 1, 0)]


# What is no deadlock

def test_a_unit_that_somebody_else_will_give_back(box):
    """One unit outside, one wanted inside, the other one held by a session that can end."""
    other, gate = box.hold("other", "-r", "foo[2]")
    words = nested(box.address, "-V", "-r", "foo[2]") + box.note("inside")
    client = box.flom("-r", "foo[2]", "--", *words)
    wait_until(lambda: "waiting for" in client.err or client.poll() is not None)
    assert client.poll() is None and box.events() == ["other start"]
    gate.open()
    assert other.end() == (0, "", "") and client.end().status == 0
    assert box.events() == ["other start", "other end", "inside"]


@pytest.mark.parametrize("name", ["R1", "/a/b"])
def test_a_writer_queued_in_between_is_passed(box, name):
    """Only by the command that runs under the lock which the writer waits for."""
    gate, reader = box.gate("outer"), ("-r", name, "-l", "PR")
    inner = nested(box.address, *reader) + box.note("inside")
    outer = box.flom(*reader, "--", *later(gate, *inner))
    gate.wait()
    writer = box.waiter("-r", name, "-l", "EX", "--", *box.note("writer"))
    stranger = box.waiter(*reader, "--", *box.note("stranger"))
    gate.open()
    assert outer.end() == (0, "", "")
    assert writer.end().status == stranger.end().status == 0
    assert box.events() == ["outer start", "inside", "writer", "stranger"]


def test_different_resources(box):
    names = ["B", "pool[2]", "/a/b", "/a/c"]
    words = [word for name in names for word in nested(box.address, "-r", name)]
    assert box.run("-r", "A", "--", *words, "echo", "x") == (0, "x\n", "")


def test_who_waits_for_a_limited_time_is_not_refused(box):
    late = "The lock was not obtained because timeout (200 milliseconds) expired\n"
    words = {wait: nested(box.address, "-r", "A", "-o", wait) + ["echo", "x"]
             for wait in ("200", "0")}
    assert box.run("-r", "A", "--", *words["200"]) == (98, "", late)
    assert is_busy(box.run("-r", "A", "--", *words["0"]))


@pytest.mark.parametrize("options", [("-o", "5000"), ("--deadlock", "wait"), ()], ids=" ".join)
def test_in_the_background(box, options):
    """A command that starts another one in the background and ends, so that its lock is free."""
    gate = box.gate("outer")
    inner = nested(box.address, "-V", "-r", "A", *options) + box.note("inside")
    script = '"$@" & read _ <"$0"; echo outer end >>log'
    outer = box.flom("-r", "A", "--", "/bin/sh", "-c", script, gate.fifo, *inner, cwd=box.folder)
    said = "waiting for" if options else "--deadlock wait\n"
    wait_until(lambda: said in outer.err)
    gate.open()
    assert outer.end().status == 0
    wait_until(lambda: box.daemons() == list(box.running()))
    assert box.events() == ["outer end"] + ["inside"] * bool(options)
    assert bool(options) != bool(REFUSED.search(outer.err))


# --deadlock reuse: under the outer lock, where that is as good

TELL = 'echo "$FLOM_TOKEN $FLOM_SESSION $FLOM_RESOURCE ${FLOM_MODE:-none} $FLOM_ELEMENT"'
PLAIN = ("--element-argument", "no")


def reusing(box, *options):
    return nested(box.address, *PLAIN, "--deadlock", "reuse", "-r", *options)


@pytest.mark.parametrize("outer, inner, told", [
    (["R"], ["R", "-l", "PR"], "R EX "), (["/a/b", "-l", "PW"], ["/a/b", "-l", "CW"], "/a/b PW "),
    (["p[3]", "-q", "2"], ["p[3]", "-q", "2"], "p[3] none "),
    (["red.green"], ["red.green"], "red.green none red"),
    (["_S_v[1]"], ["_S_v[1]"], "_S_v[1] none 1")])
def test_a_lock_as_good_as_the_wanted_one_is_used_again(box, outer, inner, told):
    """Two deep and twice; nothing is asked for, and released by the outer command's end alone.

    The mode that is told is the one that is held.
    """
    begin = ["sh", "-c", 'echo "$FLOM_TOKEN $FLOM_SESSION"; "$@"; "$@"', "sh"]
    twice = reusing(box, *inner) + reusing(box, *inner)
    status, out, err = box.run(*PLAIN, "-r", *outer, "--", *begin, *twice, "sh", "-c", TELL)
    first, *lines = out.splitlines()
    assert (status, err, lines) == (0, "", [f"{first} {told}"] * 2)


@pytest.mark.parametrize("outer, inner", [
    (["R", "-l", "PR"], ["R"]), (["/a", "-l", "PW"], ["/a", "-l", "EX"]), (["/a"], ["/a/b"]),
    (["R", "-l", "CW"], ["R", "-l", "PR"]), (["p[3]", "-q", "2"], ["p[3]", "-q", "3"])])
def test_a_lock_that_is_less_is_not_used_again(box, outer, inner):
    """As without the option: the request is made, and refused."""
    done = box.run("-r", *outer, "--", *reusing(box, *inner), "echo", "x")
    assert done[:2] == (94, "") and done.err.count("\n") == 1


def test_the_lock_of_somebody_else_is_not_used_again(box):
    holder, gate = box.hold("a", "-r", "R")
    done = box.run("-r", "Q", "--", *reusing(box, "R", "-o", "0"), "echo", "x")
    assert is_busy(done)
    gate.open()
    assert holder.end().status == 0


def test_the_command_under_a_lock_used_again_is_watched_as_any_other(box):
    """Its status, and the signals that flom passes on."""
    words = reusing(box, "R") + ["sh", "-c", "kill -TERM $$"]
    assert box.run("-r", "R", "--", *words).status == 143
    words = reusing(box, "R") + ["/nonexistent"]
    done = box.run("-r", "R", "--", *words)
    assert done.status == 97 and "/nonexistent" in done.err
    assert box.run("-r", "R", "-o", "0", "--", "true").status == 0


def test_without_a_report_nothing_is_used_again(box):
    """FLoM's daemon tells nobody what the ids of a chain hold: the lock is asked for."""
    box.address = ("-s", box.socket, "-d", "0")
    with FlomDaemon(unix=box.socket) as daemon:
        env = {"FLOM_SESSION": "0123456789abcdef"}
        done = box.run("--deadlock", "reuse", "-r", "R", "--", "echo", "x", env=env)
        assert done == (0, "x\n", "")
    assert daemon.deaths == []
