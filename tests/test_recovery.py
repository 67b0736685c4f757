"""Daemons that end under running commands, and those that follow them.

Every holder has its lock back, under its token and its element, before anybody new is granted; and
the long test: daemons killed again and again under many clients, and a checker of what they did.
"""
import json
import os
import re
import signal
import time

import flomd
import pytest
from crowd import Crowd
from world import COUNT, FLOMD, PYTHON, free_port, limit_files, read, wait_until

NAMES = ("R1", "pool[2]", "red.green", "/a/b", "_s_seq[1]", "_S_seq[1]", "_t_%S#fff[1]")
ALONE = [name for name in NAMES if name != "red.green"]  # one holder leaves no room
FULL = ("-q", "2", "-l", "EX")
QUICK, SOON = ("--recovery-window", "300"), ("--recovery-window", "1000")


def report(box):
    """{resource: {(id, token, element) of each holder}}, {} while no daemon answers."""
    status, out, _ = box.run("--status", "--json")
    resources = json.loads(out)["resources"] if status == 0 else []
    return {entry["name"]: {(holder["id"], holder["token"], holder.get("element"))
                            for holder in entry["holders"]} for entry in resources}


def start(box, *options):
    """What an init script does: flomd.py ends with 0 when its daemon serves."""
    done = box.flomd("--no-files", *box.address, *options).end()
    assert done.status == 0, done
    return box.the_daemon()


@pytest.fixture(params=["local", "tcp"])
def place(request, box):
    """A box whose daemon has a socket, or a TCP address."""
    if request.param == "tcp":
        box.address = ("-a", "127.0.0.1", "-p", str(free_port()), "--state-dir", box.folder)
    return box


def hold_all(box, *options):
    """A holder of each kind: {name: (process, gate)}."""
    gates = {name: box.gate(f"h{n}") for n, name in enumerate(NAMES)}
    holders = {name: (box.flom("-r", name, *FULL, *options, "--", *gate.command), gate)
               for name, gate in gates.items()}
    for gate in gates.values():
        gate.wait()
    return holders


def end_all(box, holders, waiters):
    """The holders end well, and only then the waiters are served."""
    assert not [line for line in box.events() if line.startswith("late")]
    for _, gate in holders.values():
        gate.open()
    for name, (holder, _) in holders.items():
        assert holder.end().status == 0, (name, holder.err)
        assert "granted" not in holder.err
    for waiter in waiters:
        assert waiter.end().status == 0, waiter.err


@pytest.mark.parametrize("place, restart, number", [
    ("local", "by a client", signal.SIGINT), ("tcp", "by a client", signal.SIGKILL),
    ("tcp", "by an init script", signal.SIGTERM)], indirect=["place"])
def test_everyone_has_its_lock_back_before_anybody_new_is_granted(place, restart, number):
    """Whatever ended the daemon, short of an order; also who comes while the next one recovers
    waits, or is told the truth."""
    options = SOON + (("-d", "-1") if restart == "by a client" else ("-d", "0"))
    pid = start(place, "-d", "-1")
    holders = hold_all(place, *options)
    waiters = [place.waiter(*options, "-r", name, "--", *place.note("late")) for name in ALONE[:2]]
    before = report(place)
    place.kill(pid, number)
    if restart == "by an init script":
        assert start(place, "-d", "-1", *SOON) != pid
    newcomers = [place.flom("-r", name, "-o", "0", *options, "--", *place.note("late"))
                 for name in ALONE[2:4]]
    assert [newcomer.end().status for newcomer in newcomers] == [98] * len(newcomers)
    assert report(place) == before
    end_all(place, holders, waiters)
    assert place.events().count("late") == 2


def test_a_daemon_ended_by_order(place):
    """Waiters are told and end, holders run on; nobody starts a daemon but who comes later, and
    to the next one the lock is known."""
    pid = start(place, "-d", "-1")
    holders = hold_all(place, "-d", "-1")
    waiter = place.waiter("-d", "-1", "-r", "R1", "--", *place.note("late"))
    before = report(place)
    assert place.run("-X").status == 0
    wait_until(lambda: pid not in place.running())
    status, _, err = waiter.end()
    assert status == 99 and "the daemon is ending: " in err.splitlines()[-1]
    for holder, _ in holders.values():
        wait_until(lambda: "trying to get the lock back" in holder.err)
        assert "it was stopped" in holder.err and holder.err.count("\n") == 1
    assert place.daemons() == []
    start(place, "-d", "-1", *SOON)
    assert place.run("-r", "R1", "-o", "0", "--", *place.note("late")).status == 98
    assert report(place) == before
    end_all(place, holders, [])


def test_a_daemon_ended_by_order_that_nobody_starts_again(box):
    start(box, "-d", "-1")
    holder, gate = box.hold("a", "-d", "-1")
    assert box.run("-X").status == 0
    wait_until(lambda: "it was stopped" in holder.err)
    gate.open()
    assert holder.end().status == 0 and box.daemons() == []


def test_values_and_tokens_go_on(box):
    """Every value is new, and every token greater than all before it, whichever daemon gave it."""
    tell = ("--", "sh", "-c", 'echo "$FLOM_TOKEN $0"')
    box.run("-r", "_s_n[2]", "--", "true")
    holder, gate = box.hold("a", "-r", "_s_n[2]", *QUICK, "-d", "-1")
    assert box.events() == ["a start 2"]
    tokens = []
    for expected in "345":
        token, value = box.run("-r", "_s_n[2]", *QUICK, "-d", "-1", *tell).out.split()
        tokens.append(int(token))
        assert value == expected
        box.kill(box.the_daemon())
    assert tokens == sorted(set(tokens)) and len({token >> 32 for token in tokens}) == 3
    gate.open()
    assert holder.end().status in (0, 95)


def test_the_window_is_over_when_its_time_is(box):
    """The journal is gone, and nobody reclaims: flom and its command are gone as well.  Who comes
    meanwhile gets no answer that could be wrong, and the lock when the window is over."""
    pid = start(box, "-d", "-1")
    holder, gate = box.hold("a", "-d", "0", "--inherit-connection", "no")
    box.kill(pid)
    box.kill(holder.pid)
    gate.open()
    os.unlink(box.socket + ".journal")
    start(box, "-d", "-1", "--recovery-window", "1500")
    began = time.monotonic()
    runs = [box.flom("-o", ms, "-l", "PR", "--", *box.note(ms)) for ms in ("0", "60000")]
    assert [run.end().status for run in runs] == [0, 0]
    assert 1 < time.monotonic() - began < 4


def mark(box):
    """Whether the state of the daemon says that somebody holds a lock."""
    return read(box.socket + ".lock").split()[3] == "1"


def test_the_mark_stands_for_a_journal_that_cannot_be_written(box):
    """It is there while somebody holds a lock, and gone a second later."""
    daemon = box.daemon(preexec_fn=limit_files(100))
    assert not mark(box)
    holder, gate = box.hold("a", "-d", "0")
    assert mark(box)
    gate.open()
    assert holder.end().status == 0
    wait_until(lambda: not mark(box))
    box.kill(daemon.pid)


def test_a_lock_in_the_journal_needs_no_mark(box):
    box.daemon()
    holder, gate = box.hold("a", "-d", "0")
    assert not mark(box)
    gate.open()
    assert holder.end().status == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_command_that_ends_while_there_is_no_daemon(box, number):
    """It has held its lock throughout: nobody else could have been granted it."""
    pid = start(box, "-d", "-1")
    holder, gate = box.hold("a", "-d", "0")
    box.kill(pid, number)
    wait_until(lambda: holder.err)  # it has found out
    gate.open()
    assert holder.end().status == 0


def test_the_state_is_on_disk_before_anybody_is_served(box):
    """--state-dir: written and synced, then listen()."""
    trace = box.path("trace")
    strace = ["strace", "-f", "-o", trace, "-e", "trace=fsync,fdatasync,pwrite64,listen"]
    if box.start("sh", "-c", "command -v strace").end().status:
        pytest.skip("no strace")
    box.start(*strace, *PYTHON, FLOMD, "--no-files", *box.address, "--state-dir", box.folder,
              "-d", "0").end()
    calls = re.findall(r"(?m)^\d+ +(fsync|fdatasync|pwrite64|listen)\(", read(trace))
    before = calls[:calls.index("listen")]
    assert "pwrite64" in before and before[-1] in ("fsync", "fdatasync")


@pytest.mark.parametrize("where", ["socket", "state-dir"])
def test_a_link_in_place_of_the_state_is_not_followed(box, where):
    precious = box.write("precious", "precious\n")
    folder = box.path("state")
    os.mkdir(folder)
    name = flomd.state_name(box.folder, "s.lock")
    link = box.socket + ".lock" if where == "socket" else os.path.join(folder, name)
    os.symlink(precious, link)
    done = box.flomd("--no-files", *box.address, "--state-dir", folder).end()
    assert done.status == 1
    assert link in done.err
    assert done.err.count("\n") == 1
    assert read(precious) == "precious\n"
    wait_until(lambda: not box.daemons())


@pytest.mark.parametrize("where", ["", "other", "alias"])
def test_a_second_daemon_names_the_first(box, where):
    """With its state beside the socket, elsewhere, or beside it under another name."""
    os.mkdir(box.path("other"))
    os.symlink(os.path.dirname(box.socket), box.path("alias"))
    options = [*box.address, *(["--state-dir", box.path(where)] if where else [])]
    daemon = box.daemon(address=options)
    done = box.flomd("--no-files", *options).end()
    assert (done.status, done.out) == (1, "")
    assert done.err == f"flomd: another daemon (pid {daemon.pid}) serves {box.socket}\n"


# The long test: crowds of two boxes, one local, one over TCP.

# A client of the network that finds no daemon for 2 s at its end leaves a lock behind, which keeps
# others waiting for the grace: with these 30 s, where otherwise it is 120 s.
LEAST_GRACE = ("--tcp-keepalive-time", "10", "--tcp-keepalive-intvl", "5",
               "--tcp-keepalive-probes", "2")
GONE = {"-1": "the daemon is ending: ", "0": "the daemon is ending: |no daemon at .*-d 0 forbids"}


def check(crowd, lifespan, stops):
    """Checks what the clients of a crowd have done; `stops`: how many daemons were stopped by
    order, after which a waiter ends."""
    entered = crowd.check_order()
    stopped = 0
    for run in crowd.over:
        status, expected, err = run.flom.poll(), int(run.name[-1]), run.flom.err
        if run.name in entered:
            assert status == expected, (run.name, status, err)
        else:
            assert status == 99 and re.search(GONE[lifespan], err), (run.name, status, err)
            stopped += "ending" in err
    assert stops or not stopped


def test_daemons_killed_under_many_clients(boxes):
    """By KILL, by TERM and by order, started again by clients or by an init script."""
    local, network = boxes.make(), boxes.make()
    network.address = ("-a", "127.0.0.1", "-p", str(free_port()), "--state-dir", network.folder,
                       *LEAST_GRACE)
    lifespans = {local: "-1", network: "0"}
    crowds = [Crowd(box, number, ("-d", lifespan, *QUICK), "0003")
              for number, (box, lifespan) in enumerate(lifespans.items())]
    stops = [0, 0]
    for crowd in crowds:
        start(crowd.box, "-d", "-1")
        crowd.fill(10)
    for number in range(COUNT.kills):
        crowd, end = crowds[number % 2], ("KILL", "TERM", "order")[number // 2 % 3]
        stops[number % 2] += end == "order"
        entered = crowd.entered()
        wait_until(lambda: crowd.entered() > entered, 30)
        pid = crowd.box.the_daemon()
        if end == "order":
            assert crowd.box.run("-X").status == 0
            wait_until(lambda: pid not in crowd.box.running())
        else:
            crowd.box.kill(pid, signal.Signals["SIG" + end])
        if end == "order" or lifespans[crowd.box] == "0":
            crowd.box.flomd("--no-files", *crowd.box.address, "-d", "-1", *QUICK).end()
        for each in crowds:
            each.fill(4)  # all others may have ended, and nobody would start a daemon
        wait_until(lambda: crowd.box.daemons(), 30)
    for crowd, ordered in zip(crowds, stops):
        crowd.end()
        check(crowd, lifespans[crowd.box], ordered)
