"""A client of daemons that take the lead by turns: pings, what it does when one is not answered,
an OK that is read late, several addresses, and that it starts none.
"""
import asyncio
import base64
import contextlib
import os
import re
import select
import signal
import socket
import threading
import time
import types

import flom
import pytest
from commands import PATIENT, Counter, driven, impatient, state
from fakes import (
    DISCOVER, LOCK, PEER, PING, FlomDaemon, OurDaemon, Scripted, message, read_message)
from world import free_port, pass_time, read, wait_until

pytestmark = pytest.mark.in_time  # pings each 0.2 s, of which none may be late

HOSTS = ("127.0.0.1", "127.0.0.2")
WANTED = {"interval": 200, "grace": 25000}  # ms
SOON = PATIENT + "flom.SOON = 0.3; flom.EACH = 600\n"  # s
R1 = base64.b64encode(b"R1").decode()


# The rules, with dates handed in

def pings(asked=100.0, interval=2000, grace=25000, now=100.5):
    found = flom.Pings()
    found.begin(asked, interval, grace, now)
    return found


def test_one_ping_in_the_air():
    """The next one an interval after the answer to the last."""
    one = pings()
    assert one.date() == 102.5 and one.due(102.4) == b""
    assert one.due(102.6) == flom.encode(flom.PING, 8)
    assert one.due(200.0) == b"" and one.date() == 102.6 + 4
    assert one.answer(103.0) and one.good == 102.6
    assert one.date() == 105.0 and one.due(104.9) == b"" and one.due(105.0)


def test_the_answer_is_worth_what_its_ping_was():
    """However late it is read: it was sent before the stop, and answered after."""
    one = pings()
    one.due(103.0)
    assert one.answer(160.0) and one.good == 103.0 and one.is_late(160.0)
    assert not one.answer(160.0) and one.good == 103.0  # it was that one's and no other's


def test_when_a_daemon_is_doubted():
    one = pings()
    assert not one.is_silent(500.0)  # nothing was asked
    one.due(103.0)
    assert not one.is_silent(106.9) and one.is_silent(107.0)
    one.answer(107.5)
    assert not one.is_silent(107.5)


def test_when_an_ok_is_late():
    """Half of the grace after the request was sent."""
    assert not pings().is_late(112.5) and pings().is_late(112.6)
    assert not pings(grace=None).is_late(10000.0) and not pings(grace=-1).is_late(10000.0)


@pytest.mark.parametrize("interval", [None, 0])
def test_a_daemon_that_wants_no_pings(interval):
    one = pings(interval=interval)
    assert one.date() == flom.FOREVER and one.due(10000.0) == b"" and not one.is_late(10000.0)
    assert not one.is_silent(10000.0) and not one.answer(10000.0)


@pytest.mark.parametrize("interval, grace", [
    (1, 25000), (1, 1), (1, None), (2000, 1), (2 ** 31 - 1, 25000), (2 ** 31 - 1, -1)])
def test_times_that_make_no_sense(interval, grace):
    """They neither keep a client busy nor make it wait for ever, and each OK is not late."""
    one = pings(interval=interval, grace=grace)
    assert 0.02 <= one.interval <= 12 and not one.is_late(100.04)
    assert pings(interval=12000, grace=90000).interval == 12


def test_a_program_hastens_a_ping():
    one = pings()
    one.hasten()
    assert one.due(100.6)
    one.hasten()
    assert one.due(100.7) == b""  # that one is not answered yet


OK_16 = message(LOCK, 16, f'<session peerid="{PEER}" daemon="1" grace="25000" ping="2000"/>'
                          '<answer rc="0" token="7"/>')
PONG = message(PING, 16)


def test_answers_to_pings_in_a_session():
    """One for which there is no ping is a breach of the protocol, as before."""
    session = flom.Session()
    session.asked = 100.0
    assert session.receive(OK_16, 101.0)[0].rc == 0
    assert (session.grace, session.pings.interval, session.pings.good) == (25000, 2.0, 100.0)
    assert session.pings.due(103.0)
    assert session.receive(PONG, 104.0) == [] and session.pings.good == 103.0
    with pytest.raises(flom.ProtocolError):
        session.receive(PONG, 104.0)


def test_the_answer_to_a_ping_is_not_that_to_the_unlock():
    session = flom.Session()
    session.receive(OK_16, 101.0)
    session.pings.due(103.0)
    assert session.leave("R1", False).endswith(message(PING, 8))
    session.receive(PONG, 104.0)
    assert session.state == flom.LEAVING
    session.receive(PONG, 104.0)
    assert session.state == flom.LEFT


def test_a_lock_is_kept_from_the_last_good_ping_on():
    """However the connection ended: an end is no sign of life."""
    connection = flom.Connection(socket.AF_UNIX, "s")
    connection.close()
    connection.session.receive(OK_16, 101.0)
    connection.session.pings.good = 77.0
    for code in (0, 104, 110, 32):
        assert flom.promised_until(connection, code) == 77.0 + 25


@pytest.mark.parametrize("late, seconds", [(0, 5), (2, 3.5), (9, 0)])
def test_a_term_that_comes_late_delays_no_kill(monkeypatch, late, seconds):
    """Flom was stopped: KILL comes before the grace is over, or at once."""
    now = types.SimpleNamespace(boot=1000.0)
    monkeypatch.setattr(flom, "clock", lambda: now.boot)
    monkeypatch.setattr(flom, "boot_clock", lambda: now.boot)
    kills = []
    claim = types.SimpleNamespace(
        name="R1", kept_until=1006.0 + 15, reclaiming=lambda: iter([flom.pause(1)] * 9),
        loss=flom.LockLost("lost"), settings={"OnLockLoss": "term", "KillAfter": 5000},
        grace=25000, interval=2.0, diary=types.SimpleNamespace(tell=lambda text: None))
    claim.loss.reason = "r"
    loss = flom.Loss(claim, kills.append)
    now.boot = 1015.0 + late
    loss.go_on()
    assert kills[0] == signal.SIGTERM and loss.terminated
    if seconds:
        assert loss.dates["kill"] == pytest.approx(now.boot + seconds)
    else:
        assert kills == [signal.SIGTERM, signal.SIGKILL]


@pytest.mark.parametrize("kept_until, seconds", [(1025.0, 5), (0.0, 5), (990.0, 0)])
def test_a_refusal_leaves_the_command_its_time(monkeypatch, kept_until, seconds):
    """Unless the grace is over, too: then somebody else may have the lock already."""
    now = 1000.0
    monkeypatch.setattr(flom, "clock", lambda: now)
    monkeypatch.setattr(flom, "boot_clock", lambda: now)
    kills = []
    claim = types.SimpleNamespace(
        name="R1", kept_until=kept_until, loss=flom.LockLost("lost"), grace=25000, interval=2.0,
        settings={"OnLockLoss": "term", "KillAfter": 5000},
        diary=types.SimpleNamespace(tell=lambda text: None))

    def refused():
        claim.kept_until = 0.0
        return False
        yield
    claim.reclaiming = refused
    loss = flom.Loss(claim, kills.append)
    loss.go_on()
    assert kills[:1] == [signal.SIGTERM] and loss.terminated
    assert len(kills) == (1 if seconds else 2)
    if seconds:
        assert loss.dates["kill"] == now + seconds


def test_what_a_request_tells():
    """`kill` stays when other things are left out."""
    settings = flom.keyword_settings({"name": "x" * 160}, ())
    about = {"client": "flom.py/1", "id": "1" * 16, "key": "2" * 16, "life": 1, "kill": 5000,
             "parent": ",".join(["3" * 16] * 3), "host": "h" * 64}
    data = flom.lock_message(settings, about, wait=True)
    session = flom.decode(data)["session"]
    assert session["kill"] == 5000 and "host" not in session and len(session["parent"]) == 16


# Commands

class Leaders:
    """Daemons at several addresses with one memory; the first leads."""

    def __init__(self, box):
        self.port = free_port()
        self.made = []
        self.box = box
        box.address = ("-a", ",".join(HOSTS), "-p", str(self.port))

    def make(self, **options):
        for number, host in enumerate(HOSTS):
            options = {**options, "leads": number == 0 and options.get("leads", True)}
            daemon = OurDaemon(socket.AF_INET, (host, self.port), **options)
            daemon.runs = number
            self.made.append(daemon)
        self.made[1].holders = self.made[0].holders
        self.made[1].rolled_back = self.made[0].rolled_back
        return self.made

    def close(self):
        for daemon in self.made:
            daemon.close()


@pytest.fixture
def leaders(box):
    """Makes the daemons, with what they tell and do: [leader, candidate]."""
    leaders = Leaders(box)
    yield lambda **options: leaders.make(**{**WANTED, **options})
    leaders.close()


def hold(box, *options, code=SOON, status=0):
    gate = box.gate("a")
    gate.command[2] += f"; exit {status}"
    holder = driven(box, code, "-r", "R1", *options, "--", *gate.command)
    gate.wait()
    return holder, gate


def wait(box, *options, code=SOON):
    """One that waits for R1, which somebody else has: the process."""
    waiter = driven(box, code, "-V", "-r", "R1", *options, "--", *box.note("ran"))
    wait_until(lambda: "waiting for" in waiter.err or waiter.poll() is not None)
    assert waiter.poll() is None, waiter.end()
    return waiter


def occupy(daemon):
    daemon.holders[R1] = "other", "other", "1"


def set_free(daemon):
    with daemon.changed:
        daemon.holders.pop(R1)
        daemon.changed.notify_all()


@pytest.mark.parametrize("choice", ["warn", "ignore"])
def test_pings_while_it_waits_and_while_it_holds(box, leaders, choice):
    """With `ignore` only while it waits."""
    leader, _ = leaders(interval=50)
    occupy(leader)
    gate = box.gate("a")
    holder = driven(box, SOON, "-r", "R1", "--on-lock-loss", choice, "--kill-after", "7s", "--",
                    *gate.command)
    wait_until(lambda: leader.count("ping") > 2)
    set_free(leader)
    gate.wait()
    number = leader.count("ping")
    if choice == "warn":
        wait_until(lambda: leader.count("ping") > number + 2)
    else:
        used = processor_time(holder.pid)
        pass_time(0.5)
        assert leader.count("ping") <= number + 1  # one was in the air
        assert processor_time(holder.pid) - used < 0.1
    gate.open()
    assert holder.end() == (0, "", "") and leader.holders == {}
    assert leader.messages[0][1]["session"]["kill"] == "7000"
    assert leader.count("lock") == 1 and leader.count("unlock") == 1


def processor_time(pid):
    """s that a process has used."""
    return sum(map(int, read(f"/proc/{pid}/stat").split()[13:15])) / os.sysconf("SC_CLK_TCK")


def test_a_daemon_without_pings_is_not_pinged(box, fake):
    daemon = fake(grace=60000)
    daemon.holders[R1] = "other", "other", "1"
    waiter = wait(box)
    pass_time(0.3)
    set_free(daemon)
    assert waiter.end().status == 0
    assert [kind for kind, _ in daemon.messages] == ["lock", "unlock", "ping"]


# Holders

def open_at(daemon):
    """The connections of a daemon, which may be stopped, that their clients have not closed."""
    found = []
    for connection in list(daemon.connections):
        poll = select.poll()
        with contextlib.suppress(ValueError):  # the daemon has just closed it itself
            poll.register(connection, select.POLLRDHUP)
            if not poll.poll(0):
                found.append(connection)
    return found


def test_a_holder_of_a_stopped_leader_reclaims_at_the_next(box, leaders):
    """The old connection stays open until the reclaim is answered, and is closed then."""
    leader, other = leaders()
    opened = []
    other.does = {"reclaim": lambda: opened.append(len(open_at(leader)))}
    holder, gate = hold(box)
    leader.stop()
    other.begin()
    wait_until(lambda: other.count("reclaim"))
    leader.be_deposed()
    wait_until(lambda: not open_at(leader))
    number = other.count("ping")
    wait_until(lambda: other.count("ping") > number)
    gate.open()
    assert holder.end() == (0, "", "") and other.holders == {}
    assert opened == [1] and leader.count("unlock") == 0


def test_an_answer_to_a_ping_ends_the_attempt(box, leaders):
    """As long as no reclaim was sent: here connecting takes for ever."""
    leader, other = leaders()
    holder, gate = hold(box, code=SOON + "flom.STAGGER = 600")
    leader.stop()
    sockets = full(other.address)
    wait_until(lambda: is_connecting(other.address))
    leader.go_on()
    number = leader.count("ping")
    wait_until(lambda: leader.count("ping") > number + 2)
    gate.open()
    assert holder.end() == (0, "", "") and leader.holders == {}
    assert leader.count("reclaim") == 0 and leader.count("unlock") == 1
    for one in sockets:
        one.close()


def full(address):
    """Sockets by which connecting to an address takes for ever."""
    sockets = [socket.socket()]
    sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sockets[0].bind(address)
    sockets[0].listen(0)
    for _ in range(4):
        sockets.append(socket.socket())
        sockets[-1].setblocking(False)
        sockets[-1].connect_ex(address)
    wait_until(lambda: len(connecting(address)) == 3)
    return sockets


def connecting(address):
    """The connections to an address of which nobody has taken notice, by /proc/net/tcp."""
    host, port = socket.inet_aton(address[0])[::-1].hex().upper(), f"{address[1]:04X}"
    return [line for line in read("/proc/net/tcp").splitlines()
            if line.split()[2:4] == [f"{host}:{port}", "02"]]


def is_connecting(address):
    return len(connecting(address)) > 3


class Turn:
    """The daemon does a thing when the test says so."""

    def __init__(self):
        self.came, self.may = threading.Event(), threading.Event()

    def __enter__(self):
        self.came.set()
        assert self.may.wait(20)

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("is_known, status", [(False, 95), (True, 0)])
def test_once_a_reclaim_is_sent_its_answer_decides(box, leaders, is_known, status):
    """Whatever the old leader answers meanwhile."""
    leader, other = leaders()
    other.does = {"reclaim": Turn()}
    holder, gate = hold(box, code=SOON + "flom.SOON = 600")
    leader.stop()
    other.begin()
    assert other.does["reclaim"].came.wait(20)
    leader.be_deposed()
    number = leader.count("ping")
    leader.go_on()
    wait_until(lambda: leader.count("ping") > number)
    assert len(open_at(leader)) == 1
    if not is_known:
        occupy(other)
    other.does["reclaim"].may.set()
    wait_until(lambda: not open_at(leader))
    gate.open()
    assert holder.end().status == status and other.count("reclaim") == 1


def test_a_reclaim_that_is_answered_late_is_not_repeated(box, leaders):
    """The leader is merely slow, and nobody else leads."""
    leader, other = leaders()
    leader.does = {"reclaim": Turn()}
    holder, gate = hold(box)
    leader.stop()
    wait_until(lambda: len(leader.connections) == 2)
    pass_time(1)
    assert len(leader.connections) == 2
    leader.go_on()
    leader.does["reclaim"].may.set()
    wait_until(lambda: len(open_at(leader)) == 1)
    number = leader.count("ping")
    wait_until(lambda: leader.count("ping") > number)
    gate.open()
    assert holder.end() == (0, "", "") and leader.holders == {}
    assert leader.count("reclaim") == 1 and leader.count("lock") == 1


def test_a_stopped_leader_holds_nobody_up(box, leaders):
    """It has a reclaim, which it does not answer, when another takes the lead."""
    leader, other = leaders()
    holder, gate = hold(box)
    leader.stop()
    wait_until(lambda: len(leader.connections) == 2)
    pass_time(0.5)
    other.begin()
    wait_until(lambda: other.count("reclaim"))
    leader.be_deposed()
    wait_until(lambda: not open_at(leader))
    gate.open()
    assert holder.end() == (0, "", "") and other.holders == {}
    assert leader.count("unlock") == 0


NAMES = """
real = flom.resolve

def resolve(host, port, kind, scope, flags=0):
    "A name server that is silent, or has failed, once the file says so."
    if host.startswith("db"):
        if flags or os.path.exists({there!r} + ".failed"):
            raise flom.DaemonUnavailable("it is no number")
        if os.path.exists({there!r}):
            flom.time.sleep(600)
        host = "127.0.0." + host[2:]
    return real(host, port, kind, scope, flags)
flom.resolve = resolve
"""


@pytest.mark.parametrize("end", ["", ".failed"])
def test_a_name_server_that_has_gone_with_the_leader(box, leaders, end):
    """It costs the command neither its lock nor its time: the addresses are known."""
    leader, other = leaders()
    there = box.path("there")
    gate = box.gate("a")
    holder = driven(box, SOON + "flom.HURRY = 0.2" + NAMES.format(there=there), "-r", "R1", "--",
                    *gate.command, address=("-a", "db1,db2", "-p", box.address[3]))
    gate.wait()
    os.mknod(there + end)
    leader.be_deposed()
    leader.die()
    other.begin()
    wait_until(lambda: other.count("reclaim"))
    number = other.count("ping")
    wait_until(lambda: other.count("ping") > number)
    gate.open()
    assert holder.end() == (0, "", "") and other.holders == {}


def test_the_end_of_file_of_a_leader_that_was_stopped(box, leaders):
    """TERM comes by the last good ping: here 2 s after it, and 1 s before the grace is over."""
    leader, _ = leaders(interval=100, grace=3000)
    counter = Counter(box, "a")
    holder = driven(box, SOON + "flom.BEFORE = 0.9", "-r", "R1", "--on-lock-loss", "term",
                    "--kill-after", "100", "--", *counter.command)
    counter.wait()
    number = leader.count("ping")
    wait_until(lambda: leader.count("ping") > number)
    leader.stop()
    began = time.monotonic()
    pass_time(1.5)
    leader.die()
    assert counter.signals() == []
    wait_until(counter.signals)
    assert 1.5 < time.monotonic() - began < 2.6 and counter.signals() == [signal.SIGTERM]
    counter.open()
    assert holder.end().status == 95


@pytest.mark.parametrize("choice, options", [
    ("term", {}), ("warn", {}), ("warn", {"reclaim": 4})], ids=["term", "held", "refused"])
def test_an_answer_that_is_read_after_a_stop(box, leaders, choice, options):
    """It was in the buffer of a flom that was stopped: it is worth what its ping was.  `term` ends
    the command, with `warn` the lock is reclaimed."""
    leader, _ = leaders(interval=100, grace=1500, **options)
    counter = Counter(box, "a")
    holder = driven(box, SOON, "-r", "R1", "--on-lock-loss", choice, "--kill-after", "100", "--",
                    *counter.command)
    counter.wait()

    def stop():
        leader.does = dict(options)
        holder.send_signal(signal.SIGSTOP)
        wait_until(lambda: state(holder.pid) == "T")
    leader.does = {**options, "ping": stop}
    wait_until(lambda: state(holder.pid) == "T")
    pass_time(1.6)
    assert leader.count("reclaim") == 0 and counter.signals() == []
    holder.send_signal(signal.SIGCONT)
    if choice == "term":
        assert holder.end().status == 95 and not counter.ended()
    else:
        wait_until(lambda: leader.count("reclaim"))
        counter.open()
        assert holder.end().status == (95 if options else 0)


def test_a_command_that_ends_while_the_second_connection_is_made(box, leaders):
    """It had the lock to its end; the unlock goes where it may still be of use."""
    leader, other = leaders()
    sockets = full(other.address)
    holder, gate = hold(box, code=SOON + "flom.STAGGER = 600", status=3)
    leader.stop()
    wait_until(lambda: is_connecting(other.address))
    gate.open()
    assert holder.end() == (3, "", "")
    leader.go_on()
    wait_until(lambda: not leader.holders)
    unlock, = [found for kind, found in leader.messages if kind == "unlock"]  # a ping may follow
    assert unlock["resource"]["rollback"] == "1" and leader.count("reclaim") == 0
    for one in sockets:
        one.close()


def test_a_command_that_ends_while_nobody_leads(box, leaders):
    """The next leader is told that the lock is free: it would keep it for its grace."""
    leader, other = leaders()
    holder, gate = hold(box, code=SOON + "flom.INTERVALS = 100; flom.GOODBYE = flom.HURRY = 0.1")
    leader.stop()
    gate.open()
    wait_until(lambda: len(leader.connections) > 1)  # it has given the first one up
    pass_time(0.5)
    other.begin()
    assert holder.end() == (0, "", "") and other.holders == {}
    assert [kind for kind, _ in other.messages] == ["reclaim", "unlock", "ping"]


def test_term_in_a_long_goodbye(box, leaders):
    """Whoever is told to end while no leader comes does not wait for one; the status stays."""
    leader, _ = leaders()
    there = box.path("there")
    code = (f"{SOON}flom.INTERVALS = 1000; flom.GOODBYE = 0.5; old = flom.Claim.releasing\n"
            f"flom.Claim.releasing = lambda *some, **more: os.mknod({there!r}) or "
            "old(*some, **more)")
    holder, gate = hold(box, code=code, status=3)
    leader.die()
    gate.open()
    wait_until(lambda: os.path.exists(there))
    holder.terminate()
    assert holder.end() == (3, "", "")


def test_nobody_has_to_read_the_element(box, leaders):
    """A full pipe does not keep the command from its lock, nor the lock from being watched."""
    leader, _ = leaders(element="1")
    reading, writing = os.pipe()
    code = SOON + f"flom.Progress.FIRST = 600; old = flom.Claim.acquire\n{FULL}"
    gate = box.gate("a")
    holder = driven(box, code, "-V", "-r", "_s_n[1]", "--", *gate.command, stdout=writing)
    os.close(writing)
    gate.wait()
    number = leader.count("ping")
    wait_until(lambda: leader.count("ping") > number)
    gate.open()
    with open(reading, "rb") as file:
        assert file.read().endswith(b"Locked element is '1'\n")
    assert holder.wait() == 0


FULL = """
def acquire(*some):
    "Fills the pipe with the lock in hand."
    old(*some)
    os.set_blocking(1, False)
    for size in 4096, 1:
        try:
            while True:
                os.write(1, b"x" * size)
        except BlockingIOError:
            pass
    os.set_blocking(1, True)
flom.Claim.acquire = acquire
"""


def test_term_while_the_second_connection_is_made(box, leaders):
    """It is for the command."""
    leader, other = leaders()
    sockets = full(other.address)
    counter = Counter(box, "a")
    holder = driven(box, SOON + "flom.STAGGER = 600", "-r", "R1", "--",
                    *counter.command)
    counter.wait()
    leader.stop()
    wait_until(lambda: is_connecting(other.address))
    holder.send_signal(signal.SIGTERM)
    wait_until(counter.signals)
    counter.open()
    assert holder.end() == (0, "", "") and counter.signals() == [signal.SIGTERM]
    for one in sockets:
        one.close()


def test_ignore_neither_pings_nor_reclaims(box, leaders):
    leader, other = leaders(interval=50)
    holder, gate = hold(box, "--on-lock-loss", "ignore")
    leader.stop()
    other.begin()
    pass_time(0.5)
    assert other.messages == []
    leader.go_on()
    gate.open()
    assert holder.end() == (0, "", "")
    wait_until(lambda: leader.holders == {})


# Waiters

def test_a_waiter_never_waits_at_two(box, leaders):
    """Its old connection is closed before it asks another daemon."""
    leader, other = leaders()
    occupy(leader)
    opened = []
    other.does = {"lock": lambda: opened.append(len(open_at(leader)))}
    waiter = wait(box)
    leader.stop()
    other.begin()
    wait_until(lambda: other.count("lock"))
    set_free(other)
    assert waiter.end().status == 0 and opened == [0] and other.count("reclaim") == 0


@pytest.mark.parametrize("end", ["die", "stop"])
def test_a_waiter_looks_for_a_leader_for_as_long_as_it_would_wait(box, leaders, end):
    leader, other = leaders()
    occupy(leader)
    code = SOON + "flom.SEVERAL = 0.1; flom.RETURN = 0"
    forever, short = wait(box, code=code), wait(box, "-o", "1500", code=code)
    getattr(leader, end)()
    assert short.end().status == 98
    assert short.err.endswith("timeout (1500 milliseconds) expired\n")
    assert forever.poll() is None
    other.holders.clear()
    other.begin()
    assert forever.end().status == 0


def test_a_daemon_that_ends_each_wait_is_not_asked_without_a_pause(box, leaders):
    leader, _ = leaders()
    occupy(leader)

    def end(connection, *_):
        leader._answer(connection, 16, 1)
        raise OSError("it closes the connection")
    leader._grant = end
    waiter = wait(box)
    number = leader.count("lock")
    pass_time(0.5)
    assert leader.count("lock") - number < 30
    waiter.kill()
    waiter.wait(10)


def test_a_waiter_at_one_address_that_is_silent(box, leaders):
    """A first request gives up where this one goes on."""
    leader, _ = leaders()
    box.address = ("-a", HOSTS[0], "-p", box.address[3])
    occupy(leader)
    waiter = wait(box, code=SOON + impatient(0.1, after="_waiting"))
    leader.stop()
    wait_until(lambda: len(open_at(leader)) == 1 and len(leader.connections) > 2)
    set_free(leader)
    leader.go_on()
    assert waiter.end().status == 0


def granted_to_a_stopped(box, leader, *options, code=SOON):
    """A flom that was granted the lock while it was stopped: the OK is in its buffer."""
    occupy(leader)
    waiter = wait(box, *options, code=code)
    waiter.send_signal(signal.SIGSTOP)
    wait_until(lambda: state(waiter.pid) == "T")
    set_free(leader)
    wait_until(lambda: R1 in leader.holders)
    return waiter


def test_an_ok_that_is_read_late_is_no_grant(box, leaders):
    """It is reclaimed before the command starts."""
    leader, _ = leaders(grace=1000)
    turn = Turn()
    leader.does = {"reclaim": turn}
    waiter = granted_to_a_stopped(box, leader)
    pass_time(1)
    waiter.send_signal(signal.SIGCONT)
    assert turn.came.wait(20) and box.events() == []
    assert len(open_at(leader)) == 2
    turn.may.set()
    assert waiter.end().status == 0 and box.events() == ["ran"]
    waits = [(kind, found["resource"]["wait"]) for kind, found in leader.messages
             if kind in ("lock", "reclaim")]
    assert waits == [("lock", "1"), ("reclaim", "0")]


def test_an_ok_that_is_read_late_and_refused(box, leaders):
    """The lock is asked for anew: nothing has run, so nothing is lost."""
    leader, other = leaders(grace=1000)
    waiter = granted_to_a_stopped(box, leader)
    pass_time(1)
    leader.die()
    occupy(other)
    other.begin()
    waiter.send_signal(signal.SIGCONT)
    wait_until(lambda: other.count("lock"))
    assert box.events() == [] and other.count("reclaim") == 1
    set_free(other)
    assert waiter.end().status == 0 and box.events() == ["ran"]


def test_an_ok_that_is_read_late_where_nobody_leads(box, leaders):
    """A leader is looked for until -o is over."""
    leader, _ = leaders(grace=1000)
    waiter = granted_to_a_stopped(box, leader, "-o", "1500", code=SOON + "flom.HURRY = 0")
    leader.die()
    pass_time(1)
    waiter.send_signal(signal.SIGCONT)
    assert waiter.end().status == 98 and box.events() == []


def test_an_ok_that_is_read_in_time(box, leaders):
    leader, _ = leaders()
    waiter = granted_to_a_stopped(box, leader)
    waiter.send_signal(signal.SIGCONT)
    assert waiter.end().status == 0 and leader.count("reclaim") == 0


# Several addresses, none of which answers

@pytest.mark.parametrize("options", [(), ("-o", "0", "-d", "0")])
def test_none_of_several_addresses_answers(box, options):
    """They are tried for a while, with or without -o."""
    began = time.monotonic()
    address = ("-a", ",".join(HOSTS), "-p", str(free_port()))
    done = driven(box, "flom.RETURN = 0; flom.SEVERAL = 1", *options, "--", "true",
                  address=address).end()
    assert done[:2] == (99, "")
    assert re.fullmatch(r"flom: no daemon at .* \(and .*\)\n", done.err)
    assert 0.9 < time.monotonic() - began < 5


def test_a_leader_is_found_while_a_first_request_looks_for_one(box, leaders):
    _, other = leaders(leads=False)
    first = driven(box, "flom.RETURN = 0.1", "-o", "0", "-d", "0", "--", *box.note("ran"))
    pass_time(1)
    other.begin()
    assert first.end() == (0, "", "")


def test_a_first_request_passes_a_stopped_leader(box, leaders):
    leader, other = leaders()
    leader.stop()
    first = driven(box, "flom.EACH = 0.3", "--", *box.note("ran"))
    wait_until(lambda: len(leader.connections) > 1)
    other.begin()
    assert first.end() == (0, "", "")


@pytest.mark.parametrize("order", ["the other first", "the other last"])
def test_who_refuses_is_tried_again_while_another_does_not_connect(box, leaders, order):
    leader, other = leaders(leads=False)
    if order == "the other last":
        box.address = ("-a", ",".join(HOSTS[::-1]), *box.address[2:])
    sockets = full(leader.address)
    first = driven(box, "flom.PATIENCE = 600", "--", *box.note("ran"))
    wait_until(lambda: is_connecting(leader.address))
    pass_time(0.5)
    other.begin()
    assert first.end() == (0, "", "")
    for one in sockets:
        one.close()


# No quorum

def test_no_quorum_without_waiting(box, leaders):
    leader, _ = leaders(lock=9, reason="no quorum")
    done = box.run("-o", "0", "--", "true")
    assert done == (99, "", "flom: the daemon refuses: no quorum\n")


def test_no_quorum_while_it_waits(box, leaders):
    leader, _ = leaders(reason="no quorum")
    occupy(leader)
    waiter = driven(box, "flom.Progress.FIRST = 0.1", "-r", "R1", "--progress", "yes", "--",
                    "true")
    wait_until(lambda: waiter.err)
    set_free(leader)
    assert waiter.end() == (0, "", "flom: waiting for R1, no quorum\n")


# A request that is longer than FLoM's daemon reads

LONG = "/" + "x" * 300


def test_a_leader_that_ends_before_it_answers_a_long_request(box, leaders):
    """The next one is asked with all that makes a ping and a reclaim possible."""
    leader, other = leaders()

    def end():
        if not leader.listener:
            other.does = {}
        leader.die()
        raise OSError("this connection is gone")
    leader.does = other.does = {"lock": end}
    other.begin()
    gate = box.gate("a")
    holder = driven(box, SOON, "-r", LONG, "--", *gate.command)
    gate.wait()
    number = other.count("ping")
    wait_until(lambda: other.count("ping") > number)
    gate.open()
    assert holder.end() == (0, "", "")
    asked = [found["session"] for kind, found in other.messages if kind == "lock"]
    assert ["id" in session for session in asked] == [True, False, True]


def test_a_long_request_to_floms_daemon(box):
    """By its answer to a short one it is seen to be FLoM's."""
    with FlomDaemon(tcp=("127.0.0.1", 0)) as daemon:
        box.address = ("-a", ",".join(HOSTS), "-p", str(daemon.tcp[1]))
        done = box.run("-r", "x" * 200, "--", "echo", "x", env={"FLOM_SESSION": "0" * 16})
        assert done == (0, "x\n", "")
    assert [len(data) > 511 for data in daemon.messages] == [True, False, False, False]
    assert daemon.deaths == []


# No daemon is started

def test_none_is_started_beside_a_quorum(box, leaders):
    """Not by a waiter that has seen that it wants pings, though it may have one address."""
    leader, _ = leaders()
    box.address = ("-a", HOSTS[0], "-p", box.address[3])
    occupy(leader)
    waiter = wait(box, "-d", "-1", code=SOON + "flom.RETURN = 0")
    leader.die()
    pass_time(1)
    assert box.daemons() == [] and waiter.poll() is None
    leader.holders.clear()
    leader.begin()
    assert waiter.end().status == 0


@pytest.mark.parametrize("tells", [False, True])
def test_none_is_started_beside_that_of_a_group(monkeypatch, tells):
    """By the answer of the group."""
    monkeypatch.setattr(flom, "check_group", lambda *some: None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as group:
        group.bind(("127.0.0.1", 0))
        group.settimeout(10)
        settings = flom.keyword_settings({
            "multicast_address": "127.0.0.1", "multicast_port": group.getsockname()[1],
            "discovery_timeout": 10000}, ())

        def answer():
            _, asker = group.recvfrom(2048)
            data = message(DISCOVER, 16, '<network address="127.0.0.3" port="7"/>')
            if tells:
                data = data.replace(b'step="16"', b'step="16" quorum="1"')
            group.sendto(data, asker)
        thread = threading.Thread(target=answer)
        thread.start()
        starter = flom.Starter(settings, None)
        found = flom.finish(flom.locating(settings, flom.Diary(settings), flom.resolving_here,
                                          starter.leave_to_quorum))
        thread.join()
    assert found == [(socket.AF_INET, ("127.0.0.3", 7))]
    if tells:
        starter.begin(10, recovering=False)
        assert next(starter.trying()) == flom.pause(flom.AGAIN)  # another may lead in a moment
    starter.begin(0, recovering=False)
    with pytest.raises(flom.DaemonUnavailable) as caught:
        flom.finish(starter.trying())
    assert ("a quorum decides who serves" in str(caught.value)) == tells


def test_a_first_request_to_a_group_while_nobody_leads(monkeypatch):
    """It waits as long as one that names several addresses."""
    monkeypatch.setattr(flom, "check_group", lambda *some: None)
    monkeypatch.setattr(flom, "PATIENCE", 0.1)
    leader = OurDaemon(socket.AF_INET, ("127.0.0.1", free_port()), leads=False, **WANTED)
    network = f'<network address="127.0.0.1" port="{leader.address[1]}"/>'
    answer = message(DISCOVER, 16, network).replace(b'step="16"', b'step="16" quorum="1"')
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as group:
        group.bind(("127.0.0.1", 0))
        group.settimeout(10)

        def serve():
            for number in range(99):
                _, asker = group.recvfrom(2048)
                if number == 20:
                    leader.begin()
                group.sendto(answer, asker)
                if leader.listener:
                    return
        thread = threading.Thread(target=serve)
        thread.start()
        with flom.Lock("R1", config=False, multicast_address="127.0.0.1", timeout=0,
                       multicast_port=group.getsockname()[1], discovery_timeout=10000):
            assert leader.count("lock") == 1
        thread.join()
    leader.close()


@pytest.mark.parametrize("option", ["-x", "-X"])
def test_what_an_order_to_end_does_is_told(box, option):
    words = "this daemon ended; another one takes over"

    def serve(connection):
        read_message(connection)
        connection.sendall(message(5, 16, f'<answer rc="0" reason="{words}"/>'))
    with Scripted(box.socket, serve):
        status, out, err = box.run(option)
    assert (status, out.splitlines()[1:], err) == (0, [words], "")


# A program

@pytest.fixture
def lock(box, leaders):
    lock = flom.Lock("R1", config=False, unicast_address=",".join(HOSTS),
                     unicast_port=int(box.address[3]))
    yield lock
    lock.release()


def test_a_program_pings_when_it_looks(leaders, lock):
    """And not more often than the daemon wants it."""
    leader, _ = leaders(interval=300)
    lock.acquire()
    lock.check()
    assert not lock.lost and leader.count("ping") == 0
    for _ in range(2):
        pass_time(0.4)
        lock.check()
        assert not lock.lost
    assert leader.count("ping") == 2 and leader.count("reclaim") == 0


def test_a_program_that_has_not_looked_for_long(leaders, lock):
    """It does not take an old answer for a new one, nor its own silence for that of the daemon."""
    leader, _ = leaders(interval=600, grace=1200)
    lock.acquire()
    for _ in range(2):
        pass_time(0.8)
        assert not lock.lost
    lock.check()
    assert leader.count("reclaim") == 0
    leader.stop()
    pass_time(0.8)
    assert lock.lost
    leader.go_on()


@pytest.mark.parametrize("word", ["lost", "check"])
def test_a_program_reclaims_at_the_next_leader(leaders, lock, word, monkeypatch):
    monkeypatch.setattr(flom, "SOON", 0.3)
    leader, other = leaders()
    token = lock.acquire().token
    leader.stop()
    other.begin()
    pass_time(0.3)
    if word == "lost":
        assert lock.lost
    lock.check()
    leader.be_deposed()
    assert other.count("reclaim") == 1 and not lock.lost and lock.token == token
    wait_until(lambda: not open_at(leader))


@pytest.fixture
def stopped(monkeypatch):
    """stopped(): from now on this process was stopped for more than half of the grace."""
    now, seconds = flom.boot_clock, []
    monkeypatch.setattr(flom, "boot_clock", lambda: now() + sum(seconds))
    return lambda: seconds.append(13)


def test_a_program_that_was_stopped_while_it_reclaimed(leaders, lock, stopped):
    """An OK that is read late is none here, either."""
    leader, other = leaders()

    def stop():
        other.does = {}
        stopped()
    other.does = {"reclaim": stop}
    lock.acquire()
    leader.be_deposed()
    leader.die()
    other.begin()
    lock.check()
    assert other.count("reclaim") == 2 and not lock.lost


def test_a_reclaim_never_waits_in_a_queue(lock):
    """One that is told so late leaves it: a grant after another's is no reclaim."""
    claim = lock._claim
    claim.interval = 2.0
    session = types.SimpleNamespace(state=flom.WAITING, pings=flom.Pings())
    answers = [types.SimpleNamespace(rc=flom.ENQUEUED, reason=None, element=None)]
    closed = []
    claim._decides = types.SimpleNamespace(
        session=session, receive=lambda: answers, close=lambda: closed.append(1))
    claim._silent = [claim._decides]
    assert claim._read_silent() is None and claim._silent == [] and closed == [1]


def test_a_program_with_a_thread_that_was_stopped(box, leaders, stopped):
    """It does not hold until the leader has answered, though nothing is unanswered for long."""
    leader, _ = leaders(interval=3000)
    may_answer = threading.Event()
    with flom.Lock("R1", config=False, unicast_address=",".join(HOSTS), on_lost=print,
                   unicast_port=int(box.address[3])) as lock:
        leader.does = {"ping": may_answer.wait, "reclaim": may_answer.wait}
        stopped()
        assert not lock.locked()
        may_answer.set()
        wait_until(lock.locked)


def test_a_program_with_an_event_loop_that_was_stopped(box, leaders, stopped):
    leader, _ = leaders(interval=3000)

    async def work():
        lock = flom.AsyncLock("R1", config=False, unicast_address=",".join(HOSTS),
                              unicast_port=int(box.address[3]))
        async with lock:
            stopped()
            assert lock.lost and not lock.locked()
            while lock.lost:
                await asyncio.sleep(0.01)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(asyncio.wait_for(work(), 30))
    loop.close()
    asyncio.set_event_loop(None)
    assert leader.holders == {}


@pytest.mark.parametrize("end", ["die", "stop"])
def test_an_unlock_that_the_leader_does_not_acknowledge(box, leaders, end):
    """The next one is waited for, and told, that the value came back, too."""
    leader, other = leaders(element="1")
    gate = box.gate("a")
    gate.command[2] += "; exit 3"
    code = SOON + "flom.INTERVALS = 100"
    holder = driven(box, code, "-r", "_S_n[1]", "--", *gate.command)
    gate.wait()
    getattr(leader, end)()
    leader.be_deposed()
    gate.open()
    wait_until(lambda: "a end" in box.events())
    pass_time(0.5)
    other.begin()
    assert holder.end() == (3, "", "")
    assert other.holders == {} and len(other.rolled_back) == 1


@pytest.mark.parametrize("rollback", [False, True])
@pytest.mark.parametrize("looks", [False, True])
def test_a_program_releases_over_a_change_of_leader(leaders, lock, looks, rollback):
    """However long ago it looked last: the next leader keeps the lock from its claim on."""
    leader, other = leaders(grace=300, element="1")
    other.grace = WANTED["grace"]
    lock.settings.values["Name"] = "_S_n[1]"
    lock.name = "_S_n[1]"
    lock.acquire()
    pass_time(0.5)
    leader.be_deposed()
    leader.die()
    other.begin()
    if looks:
        assert lock.lost
    lock.release(rollback)
    assert other.holders == {} and len(other.rolled_back) == rollback
    assert [kind for kind, _ in other.messages] == ["reclaim", "unlock", "ping"]


def heard():
    told = []
    return told, {"config": False, "unicast_address": ",".join(HOSTS), "on_lost": told.append}


def test_a_program_that_is_told_of_a_loss_pings(box, leaders):
    """Its thread does, reclaims at the next leader, and tells what it does not get back."""
    leader, other = leaders(interval=100, grace=1500)
    told, options = heard()
    with flom.Lock("R1", unicast_port=int(box.address[3]), **options) as held:
        wait_until(lambda: leader.count("ping") > 2)
        leader.be_deposed()
        leader.stop()
        other.begin()
        wait_until(lambda: other.count("reclaim") and other.count("ping"))
        assert held.check() is None and told == []
    assert other.holders == {}


def test_a_program_is_told_before_others_may_have_its_lock(box, leaders):
    leader, other = leaders(interval=100, grace=2000)
    told, options = heard()
    began = time.monotonic()
    held = flom.Lock("R1", unicast_port=int(box.address[3]), **options).acquire()
    leader.stop()
    wait_until(lambda: told)
    assert told == [held] and time.monotonic() - began < 2
    other.begin()
    occupy(other)
    held.release()


def in_loop(work):
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(asyncio.wait_for(work, 30))
    finally:
        loop.close()
        asyncio.set_event_loop(None)


async def until(predicate):
    for _ in range(1000):
        if predicate():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(predicate)


def test_an_event_loop_pings_while_it_waits_and_while_it_holds(box, leaders):
    """And has the lock back from the next leader."""
    leader, other = leaders(interval=100, grace=5000)
    told, options = heard()

    async def work():
        occupy(leader)
        made = flom.AsyncLock("R1", unicast_port=int(box.address[3]), **options)
        waiting = asyncio.ensure_future(made.acquire())
        await until(lambda: leader.count("ping") > 2)
        assert not waiting.done()
        set_free(leader)
        held = await waiting
        pings = leader.count("ping")
        await until(lambda: leader.count("ping") > pings + 2)
        leader.be_deposed()
        leader.stop()
        other.begin()
        await until(lambda: other.count("reclaim") and other.count("ping"))
        assert held.locked() and await held.check() is None and told == []
        await held.release()
    in_loop(work())
    assert other.holders == {}


def test_an_event_loop_tells_a_loss_before_others_may_have_the_lock(box, leaders):
    leader, _ = leaders(interval=100, grace=2000)
    told, options = heard()

    async def work():
        began = time.monotonic()
        held = flom.AsyncLock("R1", unicast_port=int(box.address[3]), **options)
        await held.acquire()
        leader.stop()
        await until(lambda: told)
        assert told == [held] and held.lost and time.monotonic() - began < 2
        with pytest.raises(flom.LockLost):
            await held.check()
        leader.go_on()
        await held.release()
    in_loop(work())


def test_a_command_rolls_back_over_a_change_of_leader(box, leaders):
    leader, other = leaders(element="1")
    gate = box.gate("a")
    gate.command[2] += "; exit 3"
    holder = driven(box, SOON, "-r", "_S_n[1]", "--", *gate.command)
    gate.wait()

    def hand_over():
        leader.be_deposed()
        leader.die()
        other.begin()
        raise OSError("this connection is gone")
    leader.does = {"unlock": hand_over}
    gate.open()
    assert holder.end() == (3, "", "")
    assert other.holders == {} and len(other.rolled_back) == 1
