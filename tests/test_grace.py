"""A client whose daemon ends, and the next one still knows the lock: the acknowledged unlock, the
reclaim at the end of the command, and what the grace means for the status and for `term`.
"""
import errno
import os
import signal
import socket
import threading
import time
import types

import flom
import pytest
from commands import PATIENT, Counter, driven, impatient
from test_lock_loss import ALONE, is_in_trouble, is_told
from world import pass_time, read, wait_until

NETWORK = {"grace": 60000}  # what a daemon tells a client over TCP
LOCAL = {"grace": -1}  # the command line's on a local socket


def hold(box, code, *options, status=0):
    """A command under a lock that runs: (process, its gate); it ends with the status."""
    gate = box.gate("a")
    gate.command[2] += f"; exit {status}"
    holder = driven(box, code, *options, "--", *gate.command)
    gate.wait()
    return holder, gate


class Turns:
    """What a daemon does meanwhile: it obeys none, and then one message after the other."""

    def __init__(self):
        self.changed, self.came, self.done = threading.Condition(), 0, 0
        self.begun = threading.Event()
        self.begin = self.begun.set

    def __enter__(self):
        with self.changed:
            self.came += 1
            number = self.came
        assert self.begun.wait(10)
        with self.changed:
            self.changed.wait_for(lambda: self.done == number - 1, 10)

    def __exit__(self, *_):
        with self.changed:
            self.done += 1
            self.changed.notify_all()


def kinds(daemon):
    return [kind for kind, _ in daemon.messages]


def sessions(daemon):
    return [found["session"] for _, found in daemon.messages if "session" in found]


# The unlock

def test_an_unlock_is_acknowledged(box, fake):
    """And only the command line's lock is to end with its process."""
    daemon = fake(**LOCAL)
    assert box.run("--", "true") == (0, "", "") and box.run("--", "false") == (1, "", "")
    with flom.Lock("R1", config=False, socket_name=box.socket):
        pass
    assert kinds(daemon) == ["lock", "unlock", "ping"] * 3 and daemon.holders == {}
    assert [session.get("life") for session in sessions(daemon)] == ["1", "1", None]
    assert len(daemon.rolled_back) == 1


@pytest.mark.parametrize("tcp, options, end", [
    (True, NETWORK, "die"), (True, NETWORK, "close"), (True, NETWORK, "reset"),
    (False, dict(LOCAL, element="1"), "die"), (False, NETWORK, "die")],
    ids=["network", "closed", "reset", "rollback", "not seen"])
def test_an_unlock_that_was_not_stored(box, fake, tcp, options, end):
    """The lock is reclaimed, and unlocked again, as soon as somebody serves."""
    daemon = fake(tcp, unlock=end, **options)
    name = "_S_n[1]" if "element" in options else "R1"
    client = box.flom("-r", name, *ALONE, "--", "sh", "-c", "exit 3")
    wait_until(lambda: daemon.listener is None or end != "die")
    wait_until(lambda: "unlock" in kinds(daemon))
    daemon.does = {}
    if end == "die":
        daemon.begin()
    assert client.end() == (3, "", "")
    assert kinds(daemon)[-3:] == ["reclaim", "unlock", "ping"]
    assert daemon.holders == {} and len(daemon.rolled_back) == 1
    first, last = sessions(daemon)[0], sessions(daemon)[-1]
    assert (first["id"], first["key"], last["life"]) == (last["id"], last["key"], "1")


def test_an_unlock_that_was_stored_and_not_acknowledged(box, fake):
    """The next daemon refuses what it does not know: that is no loss."""
    daemon = fake(True, ping="die", **NETWORK)
    client = box.flom(*ALONE, "--", "true")
    wait_until(lambda: daemon.listener is None)
    daemon.does = {"reclaim": 4}
    daemon.begin()
    assert client.end() == (0, "", "") and daemon.count("reclaim") == 1


@pytest.mark.parametrize("tcp, options, status, seconds", [
    (False, LOCAL, 0, 0), (False, dict(LOCAL, element="1"), 0, 0),
    (False, dict(LOCAL, element="1"), 1, 2), (True, NETWORK, 0, 2), (True, {}, 0, 2)],
    ids=["its end is seen", "committed", "rollback", "network", "no grace"])
def test_how_long_an_unlock_is_tried(box, fake, tcp, options, status, seconds):
    """Nobody serves any more, and nobody is started for that."""
    daemon = fake(tcp, unlock="die", **options)
    name = "_S_n[1]" if "element" in options else "R1"
    program = box.write("flomd", "#!/bin/sh\ntouch \"$HOME/started\"\n")
    os.chmod(program, 0o755)
    client = box.flom("-r", name, "--", "sh", "-c", f"exit {status}", env={"FLOMD": program})
    wait_until(lambda: daemon.listener is None)
    began = time.monotonic()
    assert client.end() == (status, "", "")
    assert seconds - 0.1 < time.monotonic() - began < seconds + 1.5
    assert not os.path.exists(box.path("started"))


def test_a_daemon_that_does_not_store(box, fake):
    """The goodbye is over after 5 s (here 1 s), and the lock free with the connection."""
    daemon = fake(True, unlock="hang", **NETWORK)
    client = driven(box, "flom.GOODBYE = 1", "--", "sh", "-c", "exit 7")
    wait_until(lambda: "unlock" in kinds(daemon))
    began = time.monotonic()
    assert client.end() == (7, "", "") and 0.8 < time.monotonic() - began < 3


def test_a_daemon_that_grants_and_stores_no_end_is_not_asked_without_end(box, fake):
    daemon = fake(True, unlock="close", **NETWORK)
    client = driven(box, "flom.GOODBYE = 1", "--", "sh", "-c", "exit 7")
    assert client.end() == (7, "", "") and 1 < daemon.count("unlock") < 20


# The end of the command

@pytest.mark.parametrize("tcp, options", [(False, LOCAL), (True, NETWORK)])
def test_a_lock_that_is_kept_to_the_end_of_the_command(box, fake, tcp, options):
    """Not reclaimed, but nobody else can have had it: the status is the command's."""
    daemon, trace = fake(tcp, **options), box.path("trace")
    holder, gate = hold(box, PATIENT + "flom.HURRY = 0", *ALONE, "-T", trace)
    daemon.die()
    wait_until(lambda: "reclaiming _RESOURCE" in read(trace))
    gate.open()
    assert holder.end() == (0, "", "")
    assert read(trace).splitlines()[-1].endswith(": it closed the connection")
    assert "the lock on _RESOURCE was held to the end" in read(trace)


def test_a_lock_that_is_reclaimed_after_the_command(box, fake):
    daemon = fake(True, **NETWORK)
    holder, gate = hold(box, PATIENT, *ALONE)
    daemon.die()
    gate.open()
    wait_until(lambda: "a end" in box.events())
    daemon.begin()
    assert holder.end() == (0, "", "")
    assert kinds(daemon) == ["lock", "reclaim", "unlock", "ping"] and daemon.holders == {}


def test_a_lock_that_is_refused_after_the_command(box, fake):
    """Somebody else was granted it while the command ran."""
    daemon = fake(True, **NETWORK)
    holder, gate = hold(box, PATIENT, *ALONE)
    daemon.die()
    gate.open()
    wait_until(lambda: "a end" in box.events())
    daemon.does = {"reclaim": 4}
    daemon.begin()
    assert holder.end().status == 95 and is_told(holder, "_RESOURCE", "granted to somebody else")


@pytest.mark.parametrize("status", [0, 3])
def test_a_grace_that_is_over(box, fake, status):
    daemon = fake(True, grace=100)
    holder, gate = hold(box, "flom.NOTICE = 0.2", *ALONE, status=status)
    daemon.die()
    assert is_in_trouble(holder, "_RESOURCE", box.address[1] + ":" + box.address[3])
    gate.open()
    assert holder.end().status == (status or 95) and is_told(holder, "_RESOURCE")


def test_a_start_that_has_begun_is_waited_for(box, fake):
    """However short the time to reclaim is otherwise."""
    daemon = fake(True, **NETWORK)
    os.mkfifo(box.path("wait"))
    program = box.write("flomd", '#!/bin/sh\ntouch "$HOME/started"; read _ <"$HOME/wait"\n')
    os.chmod(program, 0o755)
    gate = box.gate("a")
    holder = driven(box, PATIENT + "flom.HURRY = 0", "--", *gate.command, env={"FLOMD": program})
    gate.wait()
    daemon.die()
    wait_until(lambda: os.path.exists(box.path("started")))
    gate.open()
    wait_until(lambda: "a end" in box.events())
    daemon.begin()
    assert holder.end() == (0, "", "") and daemon.holders == {}
    with open(box.path("wait"), "w"):
        pass


# The reclaim

def test_obstacles_of_a_reclaim(box, fake):
    """A daemon at its limits, one that ends again, and one that says nothing."""
    daemon = fake(**LOCAL)
    holder, gate = hold(box, PATIENT + impatient(0.3), *ALONE)
    for obstacle in (9, 8, "close", "hang", "reset"):
        daemon.does = {"reclaim": obstacle}
        daemon.die()
        daemon.begin()
        before = daemon.count("reclaim")
        wait_until(lambda: daemon.count("reclaim") > before + 1)
    daemon.does = {}
    held = list(daemon.holders.values())
    daemon.die()
    daemon.begin()
    wait_until(lambda: daemon.connections and daemon.messages[-1][0] == "reclaim")
    gate.open()
    assert holder.end() == (0, "", "")
    assert daemon.messages[-3][1]["resource"]["reclaim"] == held[0][2]


def test_a_reclaim_that_is_answered_late(box, fake):
    """The lock moves to the connection that is answered; the end of the others frees nothing."""
    daemon, turns = fake(**LOCAL), Turns()
    holder, gate = hold(box, PATIENT + impatient(0.1), *ALONE)
    daemon.die()
    daemon.does = {"reclaim": turns}
    daemon.begin()
    wait_until(lambda: daemon.count("reclaim") >= 3)
    assert len(daemon.connections) >= 3
    turns.begin()
    wait_until(lambda: len(daemon.connections) == 1)
    assert len(daemon.holders) == 1
    gate.open()
    assert holder.end() == (0, "", "") and daemon.holders == {}


@pytest.mark.parametrize("patience, status", [("10", 0), ("0.1", 0), ("10", 1)])
def test_a_reclaim_that_is_answered_after_the_end(box, fake, patience, status):
    """Whether the value of the sequence is to be granted again is said with it."""
    daemon, turns = fake(True, element="1", **LOCAL), Turns()
    code = PATIENT + impatient(patience) + "flom.HURRY = 0"
    holder, gate = hold(box, code, *ALONE, "-r", "_S_n[1]", status=status)
    daemon.die()
    daemon.does = {"reclaim": turns}
    daemon.begin()
    wait_until(lambda: daemon.count("reclaim") > (patience != "10"))
    gate.open()
    assert holder.end() == (status, "", "")
    turns.begin()
    wait_until(lambda: daemon.count("unlock") and not daemon.connections)
    assert {found["resource"]["rollback"] for kind, found in daemon.messages
            if kind == "unlock"} == {str(status)}


@pytest.mark.parametrize("rc", [4, 10])
def test_what_loses_a_lock_for_good(box, fake, rc):
    """It is told at once, and not tried again, also where a grace was promised."""
    daemon = fake(**LOCAL)
    holder, gate = hold(box, PATIENT, *ALONE)
    daemon.die()
    daemon.does = {"reclaim": rc}
    daemon.begin()
    assert is_told(holder, "_RESOURCE")
    gate.open()
    assert holder.end().status == 95 and daemon.count("reclaim") == 1


def test_a_waiter_asks_again_as_the_same(box, fake):
    """Whoever ends: what was granted to it and not told, it is granted again."""
    daemon = fake(**LOCAL)
    daemon.holders["X1JFU09VUkNF"] = "other", "other", "1"
    waiter = box.waiter(*ALONE, "--", "true")
    for action in ({}, {"lock": "close"}, {"lock": "die"}, {}):
        daemon.die()
        daemon.does = action
        before = daemon.count("lock")
        daemon.begin()
        wait_until(lambda: daemon.count("lock") > before)
    daemon.die()
    daemon.holders.clear()
    daemon.begin()
    assert waiter.end().status == 0
    assert len({(session["id"], session["key"]) for session in sessions(daemon)}) == 1


# --on-lock-loss term

def counted(box, code, *options):
    """A Counter under a lock that runs, with `term`: (process, counter)."""
    counter = Counter(box, "a")
    holder = driven(box, code, *ALONE, "--on-lock-loss", "term", *options, "--", *counter.command)
    counter.wait()
    return holder, counter


def test_term_comes_before_the_grace_is_over(box, fake):
    """As long before as KILL takes, and 1 s; here after 1 s."""
    daemon = fake(True, grace=2500)
    holder, counter = counted(box, PATIENT, "--kill-after", "500")
    began = time.monotonic()
    daemon.die()
    wait_until(counter.signals)
    assert 0.9 < time.monotonic() - began < 2.5 and counter.signals() == [signal.SIGTERM]
    assert is_told(holder, "_RESOURCE", "it closed the connection")
    counter.open()
    assert holder.end().status == 95


def test_term_never_comes_to_whom_a_lock_is_kept_for_as_long_as_it_lives(box, fake):
    daemon = fake(**LOCAL)
    holder, counter = counted(box, "flom.RECOVERY_WINDOW = 100; flom.NOTICE = 0.5")
    daemon.die()
    assert is_in_trouble(holder, "_RESOURCE", box.socket)
    pass_time(1)
    assert counter.signals() == []
    counter.open()
    assert holder.end().status == 0 and holder.err.count("\n") == 1


@pytest.mark.parametrize("end, options", [("reset", NETWORK), ("reset", {}), ("die", {})])
def test_term_where_others_may_have_the_lock(box, fake, end, options):
    """The daemon may live, and have seen the reset; or it has promised nothing."""
    daemon = fake(True, **options)
    holder, counter = counted(box, "flom.RECOVERY_WINDOW = 300")
    began = time.monotonic()
    getattr(daemon, end)()
    wait_until(counter.signals)
    assert 0.2 < time.monotonic() - began < 5 and counter.signals() == [signal.SIGTERM]
    counter.open()
    assert holder.end().status == 95 and is_told(holder, "_RESOURCE")


@pytest.mark.parametrize("options", [NETWORK, {}])
def test_a_reset_and_a_command_that_ends(box, fake, options):
    """Nobody knows whether it had the lock to its end."""
    daemon = fake(True, **options)
    holder, gate = hold(box, "flom.NOTICE = 0.05", *ALONE)
    daemon.reset()
    wait_until(lambda: "trying to get the lock back" in holder.err)
    gate.open()
    assert holder.end().status == 95


def test_term_when_a_reclaim_is_refused(box, fake):
    daemon = fake(**LOCAL)
    holder, counter = counted(box, PATIENT)
    daemon.die()
    daemon.does = {"reclaim": 4}
    daemon.begin()
    wait_until(counter.signals)
    counter.open()
    assert holder.end().status == 95


def test_until_when_a_lock_is_kept():
    """By what the daemon told (ms), and how the connection ended."""
    now = flom.boot_clock()
    for grace, code, seconds in (
            (None, 0, None), (None, errno.ETIMEDOUT, None), (60000, errno.ECONNRESET, None),
            (60000, 0, 60), (60000, errno.ETIMEDOUT, 30), (60000, errno.EHOSTUNREACH, 30),
            (-1, 0, flom.FOREVER), (-1, errno.ECONNRESET, flom.FOREVER)):
        kept = flom.promised_until(held_with(grace), code)
        if seconds is None:
            assert kept == 0
        else:
            assert now + seconds <= kept < now + seconds + 5 or kept == seconds


def held_with(grace):
    """A connection on which a daemon has told the grace (ms), but never connected."""
    connection = flom.Connection(socket.AF_UNIX, "s")
    connection.close()
    connection.session.grace = grace
    return connection


@pytest.fixture
def clocks(monkeypatch):
    """The clocks of a system that the test suspends: it sets `mono` and `boot`."""
    found = types.SimpleNamespace(mono=100.0, boot=150.0)
    monkeypatch.setattr(flom, "clock", lambda: found.mono)
    monkeypatch.setattr(flom, "boot_clock", lambda: found.boot)
    return found


def test_a_grace_goes_on_while_the_system_is_suspended(clocks):
    connection = held_with(120000)
    clocks.mono, clocks.boot = 110.0, 260.0  # suspended for 100 s
    assert flom.promised_until(connection, 0) == 380
    assert flom.promised_until(connection, errno.ETIMEDOUT) == 110 + 50 - 30 + 120


@pytest.mark.parametrize("slept, ends", [(0, False), (50, False), (55, True), (600, True)])
def test_term_comes_in_time_after_a_suspension(clocks, slept, ends):
    """With a grace of 60 s and 5 s until KILL, 54 s after the daemon was last known to be there."""
    claim, kills = lost_claim(kept_until=clocks.boot + 60), []
    claim.loss.reason = "it has ended"
    loss = flom.Loss(claim, kills.append)
    loss.go_on()
    clocks.mono, clocks.boot = clocks.mono + 1, clocks.boot + 1 + slept
    loss.go_on()
    assert kills == [signal.SIGTERM] * ends and loss.terminated == ends


@pytest.mark.parametrize("slept, harmless", [(0, True), (58, True), (60, False)])
def test_what_was_lost_for_longer_than_the_grace_was_not_kept(clocks, slept, harmless):
    loss = flom.Loss(lost_claim(kept_until=clocks.boot + 60, choice="warn"), None)
    clocks.mono, clocks.boot = clocks.mono + 1, clocks.boot + 1 + slept
    assert loss.is_harmless == harmless


@pytest.mark.parametrize("kept, ends", [(60, False), (30, True)])
def test_a_kill_that_the_grace_has_no_room_for(clocks, kept, ends):
    """A daemon that is just restarted ends no command: 2 s of the grace of 60 s are left for it,
    if they are not over, as where the kernel has seen that nobody answers."""
    claim, kills = lost_claim(kept_until=clocks.boot + kept, kill_after=3600000), []
    loss = flom.Loss(claim, kills.append)
    clocks.mono, clocks.boot = clocks.mono + 0.9, clocks.boot + 0.9
    loss.go_on()
    assert kills == [signal.SIGTERM] * ends
    clocks.mono, clocks.boot = clocks.mono + 1.2, clocks.boot + 1.2
    claim.loss.reason = "it has ended"
    loss.go_on()
    assert kills == [signal.SIGTERM]


def lost_claim(kept_until, choice="term", kill_after=5000):
    """As a Claim whose lock is lost, and which nobody answers; its grace is 60 s."""
    def reclaiming():
        while True:
            yield flom.pause(1000)
    return types.SimpleNamespace(
        name="R1", kept_until=kept_until, reclaiming=reclaiming, loss=flom.LockLost("it is lost"),
        settings={"OnLockLoss": choice, "KillAfter": kill_after}, grace=60000,
        interval=0.0,
        diary=types.SimpleNamespace(tell=lambda text: None))


def test_a_clock_that_goes_on(monkeypatch):
    """That of Linux, elsewhere the one that there is."""
    with open("/proc/uptime") as file:
        assert abs(flom.boot_clock() - float(file.read().split()[0])) < 5
    monkeypatch.setattr(flom, "BOOT_TIME", 4711)
    assert abs(flom.boot_clock() - time.monotonic()) < 5


# A program

@pytest.fixture
def lock(box):
    return flom.Lock("R1", config=False, socket_name=box.socket)


@pytest.mark.parametrize("grace", [60000, None])
@pytest.mark.parametrize("end", ["before", "at"])
def test_a_program_releases_a_lock_that_was_kept(box, fake, lock, end, grace, monkeypatch):
    """Its daemon has ended before the release, or at the release before that was stored.  It may
    be kept though nothing was promised."""
    daemon = fake(grace=grace)
    lock.acquire()
    if end == "before":
        daemon.die()
        wait_until(lambda: lock.lost)
        daemon.begin()
    else:
        def serve():
            daemon.does = {}
            daemon.die()
            daemon.begin()
            raise OSError("this connection is gone")
        daemon.does = {"unlock": serve}
    lock.release(rollback=True)
    assert kinds(daemon)[-3:] == ["reclaim", "unlock", "ping"]
    assert daemon.holders == {} and len(daemon.rolled_back) == 1


@pytest.mark.parametrize("grace", [60000, None])
def test_a_program_that_finds_no_daemon_for_its_release(box, fake, lock, grace, monkeypatch):
    """Also where none was promised: the daemon may have stored the lock later."""
    monkeypatch.setattr(flom, "HURRY", 1)
    daemon = fake(grace=grace)
    lock.acquire()
    daemon.die()
    began = time.monotonic()
    lock.release()
    assert 0.9 < time.monotonic() - began < 3 and not lock.lost


def test_a_program_that_acquires_a_lost_lock_is_its_holder(box, fake, lock, monkeypatch):
    """It asks as the same client: otherwise it would wait for itself."""
    monkeypatch.setattr(flom, "HURRY", 0)
    daemon = fake(grace=60000)
    token = lock.acquire().token
    daemon.die()
    wait_until(lambda: lock.lost)
    with pytest.raises(flom.DaemonUnavailable):
        lock.acquire()
    daemon.begin()
    assert lock.acquire(timeout=0).token == token
    daemon.die()
    lock.release()  # nobody hears it
    daemon.begin()
    assert lock.acquire(timeout=0).token == token
    lock.release()
    assert lock.acquire().token != token
    lock.release()
    idents = [session["id"] for session in sessions(daemon)]
    assert len(set(idents[:-1])) == 1 and idents[-1] != idents[0]


def test_a_program_is_granted_a_number_once(box, fake, monkeypatch):
    """A lost number is not asked for as the same client: it may have been used."""
    monkeypatch.setattr(flom, "HURRY", 0)
    daemon = fake(grace=60000, element="1")
    lock = flom.Lock("_s_n[1]", config=False, socket_name=box.socket).acquire()
    daemon.die()
    wait_until(lambda: lock.lost)
    with pytest.raises(flom.DaemonUnavailable):
        lock.acquire()
    daemon.begin()
    with pytest.raises(flom.Busy):
        lock.acquire(timeout=0)
