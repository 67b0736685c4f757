"""What flom does when its daemon, or the way to it, is gone while the command runs.

warn, term and ignore; a reclaim refused; a daemon stopped by SIGSTOP; a TCP connection that is
reset, or whose cable is cut.
"""
import contextlib
import json
import os
import re
import selectors
import shlex
import shutil
import signal
import socket
import threading
import time

import flom
import pytest
from commands import PATIENT, Counter, count, driven
from fakes import FlomClient
from world import (FLOM, PYTHON, can_connect, endpoint, free_port, pass_time, read,
                   wait_until)

ALONE = ("-d", "0")  # no client starts a daemon


def holders_of(box, **options):
    """{resource: [(token, element)]} of those who hold a lock and are connected; {} while no
    daemon answers.
    """
    status, out, err = box.run("--status", "--json", **options)
    if status == 99:
        return {}
    assert (status, err) == (0, ""), err
    return {resource["name"]: [(holder["token"], holder.get("element"))
                               for holder in resource["holders"] if "absent" not in holder]
            for resource in json.loads(out)["resources"]}


def is_told(client, resource, *words):
    """Waits for the line on stderr that says that the lock is lost, the only or the second one."""
    start = f"flom: the lock on {resource} is lost: "
    wait_until(lambda: start in client.err and client.err.endswith("\n"))
    *trouble, line = client.err.splitlines()
    assert line.startswith(start) and all(word in line for word in words), client.err
    assert len(trouble) <= 1 and all(TROUBLE in told for told in trouble), client.err
    return True


TROUBLE = "does not answer; trying to get the lock back"


def is_in_trouble(client, resource, where):
    """Waits for the line on stderr that says that flom tries to have the lock back."""
    wait_until(lambda: client.err.endswith("\n"))
    assert client.err == (f"flom: the lock on {resource}: {where}: it closed the connection; "
                          f"it {TROUBLE}\n")
    return True


def stubborn(box, name):
    """A command that ignores TERM."""
    gate = box.gate(name)
    gate.command[2] = "trap '' TERM; " + gate.command[2]
    return gate


def test_a_daemon_that_does_not_come_back(box, fake):
    """Nor has it promised a grace.  warn: told after 1 s, and at the end, 95 in place of 0; term:
    TERM after the recovery window, KILL later; ignore: silent."""
    daemon = fake()
    warned, gate = box.hold("warn", "-r", "warn", *ALONE)
    failing = box.flom("-r", "fail", *ALONE, "--", "sh", "-c", 'read _ <"$0"; exit 3',
                       box.gate("fail").fifo)
    ignoring, ignored = box.hold("ignore", "-r", "ignore", *ALONE, "--on-lock-loss", "ignore")
    ended, counter = count(box, "term", "-r", "term", *ALONE, "--on-lock-loss", "term")
    last = stubborn(box, "kill")
    killed = box.flom("-r", "kill", *ALONE, "--on-lock-loss", "term", "--kill-after", "300", "--",
                      *last.command)
    last.wait()
    wait_until(lambda: len(daemon.holders) == 5)
    daemon.die()
    killed_at = time.monotonic()
    runs = ((warned, "warn"), (failing, "fail"), (ended, "term"), (killed, "kill"))
    for client, name in runs:
        assert is_in_trouble(client, name, box.socket)
    assert 0.9 < time.monotonic() - killed_at < 5 and counter.signals() == []
    wait_until(counter.signals)
    assert 1.9 < time.monotonic() - killed_at < 5 and counter.signals() == [signal.SIGTERM]
    assert is_told(ended, "term", box.socket) and is_in_trouble(warned, "warn", box.socket)
    counter.open()
    gate.open()
    ignored.open()
    with open(box.path("gate.fail"), "w"):
        pass
    assert [client.end().status for client in (warned, failing, ended, killed)] == [95, 3, 95, 95]
    assert ignoring.end() == (0, "", "")
    assert all(is_told(client, name, box.socket) for client, name in runs)
    assert "kill end" not in box.events() and "warn end" in box.events()


def test_a_daemon_that_comes_back_late(box):
    """What was told is taken back, and the status is the command's."""
    daemon = box.daemon()
    holder, gate = box.hold("a", "-r", "R1", *ALONE)
    before = holders_of(box)
    box.kill(daemon.pid)
    assert is_in_trouble(holder, "R1", box.socket)
    box.daemon()
    wait_until(lambda: holders_of(box) == before and holder.err.count("\n") == 2)
    gate.open()
    status, out, err = holder.end()
    assert (status, out) == (0, "") and err.splitlines()[1] == "flom: the lock on R1 is held again"


def test_a_daemon_that_vanishes_while_min_hold_keeps_the_lock(box):
    """It is watched, and reclaimed, to the end of that time."""
    box.daemon()
    holder = driven(box, PATIENT, "-d", "-1", "--min-hold", "60000", "--", *box.note("a"))
    wait_until(lambda: box.events() == ["a"] and len(box.running()) == 2)
    before = holders_of(box)
    box.kill(box.the_daemon())
    wait_until(lambda: can_connect(box.address))
    wait_until(lambda: holders_of(box) == before)
    assert box.run("-o", "0", "--", "true").status == 98
    holder.send_signal(signal.SIGTERM)
    assert holder.end() == (0, "", "")


def test_min_hold_of_a_lock_that_others_have(box):
    """The memory is lost.  There is nothing left to hold: flom ends, and says so."""
    daemon = box.daemon()
    holder = box.flom(*ALONE, "--min-hold", "60000", "--", *box.note("a"))
    wait_until(lambda: box.events() == ["a"] and len(box.running()) == 2)
    holder.send_signal(signal.SIGSTOP)
    box.kill(daemon.pid)
    box.forget()
    box.daemon("--recovery-window", "0")
    newcomer, gate = box.hold("b")
    holder.send_signal(signal.SIGCONT)
    assert holder.end().status == 95 and is_told(holder, "_RESOURCE", "granted to others since")
    gate.open()
    assert newcomer.end() == (0, "", "")


def test_term_ends_all_of_a_command(box, fake):
    """Whatever it has become, and whatever it does about TERM, nothing of it runs in the end."""
    daemon, last = fake(), stubborn(box, "last")
    counter = Counter(box, "counter")
    script = '"$0" "$@" | cat & read _ <' + box.gate("never").fifo
    options = (*ALONE, "--on-lock-loss", "term", "--kill-after", "300")
    holder = box.flom(*options, "--", "/bin/sh", "-c", f"{script_of(last)} & {script}",
                      *counter.command)
    counter.wait()
    last.wait()
    daemon.die()
    assert holder.end().status == 95 and is_told(holder, "_RESOURCE", box.socket)
    assert box.running() == {} and counter.signals() == [signal.SIGTERM]
    assert "last end" not in box.events()


def script_of(gate):
    return " ".join(map(shlex.quote, gate.command))


def test_term_reaches_the_command_of_a_nested_flom_once(box, fake):
    """From its own flom, which holds another lock until that command has ended."""
    daemon, other = fake(), ("-s", box.path("other"))
    box.daemon(address=other)
    counter = Counter(box, "a")
    inner = [*PYTHON, FLOM, *other, "--"]
    holder = box.flom(*ALONE, "--on-lock-loss", "term", "--kill-after", "60000", "--", *inner,
                      *counter.command)
    counter.wait()
    daemon.die()
    wait_until(counter.signals)
    holder.send_signal(signal.SIGUSR1)
    wait_until(lambda: len(counter.signals()) == 2)
    assert box.run("-o", "0", "--", "true", address=other).status == 98
    counter.open()
    assert holder.end().status == 95
    assert counter.signals() == [signal.SIGTERM, signal.SIGUSR1]
    assert box.run("-o", "0", "--", "true", address=other).status == 0


def test_whatever_fails_while_a_lock_is_reclaimed(box):
    """It is an obstacle, tried again: flom watches over its command to the end."""
    daemon, there, gate = box.daemon(), box.path("there"), box.gate("a")
    code = ("failures = [ValueError('1'), MemoryError('2'), flom.UsageError('3'), OSError(24, '4')]"
            "\nmessage = flom.lock_message"
            "\ndef fail(*some, **more):"
            "\n    if 'reclaim' in more and failures: raise failures.pop()"
            "\n    return message(*some, **more)"
            "\nflom.lock_message = fail")
    flom_ = driven(box, PATIENT + code, "-d", "-1", "-T", there, "--", *gate.command)
    gate.wait()
    before = holders_of(box)
    box.kill(daemon.pid)
    wait_until(lambda: can_connect(box.address))
    wait_until(lambda: holders_of(box) == before)
    text = read(there)
    assert re.findall("reclaiming _RESOURCE: (.*)", text)[:4] == ["[Errno 24] 4", "3", "2", "1"]
    gate.open()
    assert flom_.end() == (0, "", "")


@pytest.mark.parametrize("options", [(), ("-V",)], ids=["quiet", "-V"])
def test_nobody_reads_what_flom_says_of_a_loss(box, options):
    """The pipe is full, as that of a pager: the lock is reclaimed all the same, and the lines come
    when there is room."""
    daemon, gate = box.daemon(), box.gate("a")
    reading, writing = os.pipe()
    gate.command[2] = "exec 1>&- 2>&-; " + gate.command[2]
    holder = driven(box, "flom.NOTICE, flom.GOODBYE = 0, 30", *options, *ALONE, "--", *gate.command,
                    stderr=writing)
    gate.wait()
    filled = fill(writing)
    before = holders_of(box)
    box.kill(daemon.pid)
    box.daemon()
    wait_until(lambda: holders_of(box) == before)
    box.kill(box.the_daemon())
    holder.send_signal(signal.SIGTERM)  # the command has it, too: its loss is not what holds it up
    wait_until(lambda: "a start" in box.events() and len(box.running()) == 1)
    os.close(writing)
    with open(reading, "rb") as file:
        said = file.read()[filled:].decode()
    assert holder.end().status == 128 + signal.SIGTERM
    assert f"it {TROUBLE}" in said and "is held again" in said and said.endswith("\n")


def test_a_flom_whose_words_nobody_takes_ends(box):
    """Its lock is released first, and what it has to say is not waited for for long."""
    box.daemon()
    reading, writing = os.pipe()
    fill(writing)
    client = driven(box, "flom.GOODBYE = 0.5", *ALONE, "--", "/nowhere", stderr=writing)
    assert client.end().status == 97
    assert holders_of(box) == {"_RESOURCE": []}
    os.close(reading)
    os.close(writing)


def test_nobody_reads_what_flom_waits_for(box):
    """It is granted the lock, and runs its command, all the same."""
    box.daemon()
    holder, gate = box.hold("a")
    reading, writing = os.pipe()
    fill(writing)
    trace = box.path("trace")
    waiter = driven(box, "flom.Progress.FIRST = 0", *ALONE, "--progress", "yes", "-T", trace, "--",
                    *box.note("b"), stderr=writing)
    wait_until(lambda: os.path.exists(trace) and "waiting for" in read(trace))
    pass_time(0.2)  # it would have said so by now
    gate.open()
    assert [holder.end().status, waiter.end().status] == [0, 0] and "b" in box.events()
    os.close(reading)
    os.close(writing)


def fill(writing):
    """Fills a pipe; returns how many bytes it has taken."""
    os.set_blocking(writing, False)
    taken = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            taken += os.write(writing, b"." * 4096)
    os.set_blocking(writing, True)
    return taken


def test_the_folder_is_removed_while_the_command_runs(box):
    """Names that counted from there have been understood before: a daemon is started."""
    folder, gate = box.path("folder"), box.gate("a")
    os.mkdir(folder)
    holder = driven(box, PATIENT, "-d", "-1", "-t", "../trace", "--", *gate.command, cwd=folder)
    gate.wait()
    before = holders_of(box)
    shutil.rmtree(folder)
    box.kill(box.the_daemon())
    wait_until(lambda: can_connect(box.address))
    wait_until(lambda: holders_of(box) == before)
    gate.open()
    assert holder.end() == (0, "", "")


def test_a_daemon_that_cannot_be_started_for_a_while(box):
    """Each attempt is another start, and the command's end is seen at once."""
    file, trace, gates = box.path("failing"), box.path("trace"), [box.gate("a"), box.gate("b")]
    code = (f"plain = flom.fork_daemon\ndef fail(*some):"
            f"\n    if os.path.exists({file!r}): raise ValueError('failing')"
            f"\n    return plain(*some)\nflom.fork_daemon = fail")
    holders = [driven(box, PATIENT + code, "-d", "-1", "-r", gate.name, "-T", trace, "--",
                      *gate.command) for gate in gates]
    for gate in gates:
        gate.wait()
    box.write("failing", "")
    box.kill(box.the_daemon())
    wait_until(lambda: read(trace).count("failing") > 4)
    gates[0].open()
    assert holders[0].end(2) == (0, "", "")
    os.unlink(file)
    wait_until(lambda: can_connect(box.address))
    wait_until(lambda: holders_of(box).get("b"))
    gates[1].open()
    assert holders[1].end() == (0, "", "")


def test_a_command_that_ends_before_the_loss_is_told(box, fake):
    """The line that a status of flom's own is always accompanied by."""
    daemon = fake()
    client, gate = box.hold("a", *ALONE)
    client.send_signal(signal.SIGSTOP)
    daemon.die()
    gate.open()
    wait_until(lambda: "a end" in box.events())
    client.send_signal(signal.SIGCONT)
    assert client.end().status == 95 and is_told(client, "_RESOURCE", box.socket)


@pytest.mark.parametrize("choice", ["warn", "term", "ignore"])
def test_a_lock_that_somebody_else_was_granted(box, choice):
    """The holder sleeps while the daemon is replaced by one without its memory, and the newcomer is
    granted the lock."""
    daemon = box.daemon()
    holder, counter = count(box, "a", *ALONE, "--on-lock-loss", choice)
    holder.send_signal(signal.SIGSTOP)
    box.kill(daemon.pid)
    box.forget()
    box.daemon("--recovery-window", "0")
    newcomer, gate = box.hold("b")
    holder.send_signal(signal.SIGCONT)
    if choice != "ignore":
        assert is_told(holder, "_RESOURCE", "granted to others since")
    if choice == "term":
        wait_until(lambda: signal.SIGTERM in counter.signals())
    assert box.run("-o", "0", "--", "true").status == 98  # the newcomer's, whatever the holder does
    counter.open()
    assert holder.end().status == (0 if choice == "ignore" else 95)
    assert counter.signals() == [signal.SIGCONT] + [signal.SIGTERM] * (choice == "term")
    assert box.run("-o", "0", "--", "true").status == 98
    gate.open()
    assert newcomer.end() == (0, "", "")


def test_a_daemon_stopped_and_continued(box):
    """Nobody loses anything; who comes meanwhile gets an error after 10 s, and the goodbye of one
    that ends meanwhile takes 5 s and keeps the command's status.  (Here: after 3 s and 1 s.)"""
    assert (flom.PATIENCE, flom.GOODBYE) == (10, 5)
    short, daemon = "flom.PATIENCE, flom.GOODBYE = 3, 1", box.daemon()
    staying, gate = box.hold("stays", "-r", "stays", "--on-lock-loss", "term")
    leaving = driven(box, short, "-r", "leaves", "--", "sh", "-c", 'read _ <"$0"; exit 7',
                     box.gate("leaves").fifo)
    wait_until(lambda: "leaves" in holders_of(box))
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        open(box.path("gate.leaves"), "w").close()
        newcomers = [driven(box, short, *options, "-r", "stays", "--", "echo", "wrong")
                     for options in ((), ("-o", "300"), ALONE)]
        assert leaving.end() == (7, "", "") and 0.9 < time.monotonic() - began < 2.5
        for newcomer in newcomers:
            status, out, err = newcomer.end()
            assert (status, out) == (99, "") and 2.9 < time.monotonic() - began < 8
            assert err.count("\n") == 1 and f"{box.socket} does not answer within 3 s" in err
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    assert box.run("-r", "leaves", "-o", "0", "--", "true").status == 0
    assert box.run("-r", "stays", "-o", "0", "--", "true").status == 98
    gate.open()
    assert staying.end() == (0, "", "") and box.events() == ["stays start", "stays end"]


def test_who_comes_to_a_stopped_daemon_is_served_when_it_continues(box):
    daemon = box.daemon()
    holder, gate = box.hold("a")
    waiting = box.waiter("--", *box.note("b"))
    os.kill(daemon.pid, signal.SIGSTOP)
    newcomer = box.flom("--", *box.note("c"))
    gate.open()
    wait_until(lambda: "a end" in box.events())
    os.kill(daemon.pid, signal.SIGCONT)
    assert [client.end().status for client in (holder, waiting, newcomer)] == [0, 0, 0]
    assert sorted(box.events()[2:]) == ["b", "c"]


# A name server that does not answer, as long as there is a file

DEAF = """\
import select, socket
getaddrinfo = socket.getaddrinfo
def deaf(*some, **more):
    while not more["flags"] and os.path.exists({!r}):
        select.select([], [], [], 0.01)
    return getaddrinfo(*some, **more)
socket.getaddrinfo = deaf
"""


@pytest.mark.parametrize("back", [True, False], ids=["for a while", "to the end"])
def test_a_name_that_is_not_resolved_while_a_lock_is_reclaimed(box, back):
    """Signals are obeyed, and flom ends with its command; resolved, the lock is held again."""
    port, file = str(free_port()), box.path("deaf")
    known, named = (("-a", host, "-p", port) for host in ("127.0.0.1", "localhost"))
    daemon, counter = box.daemon("--state-dir", box.folder, address=known), Counter(box, "a")
    holder = driven(box, DEAF.format(file), *ALONE, "--", *counter.command, address=named)
    counter.wait()
    box.write("deaf", "")
    box.kill(daemon.pid)
    wait_until(lambda: TROUBLE in holder.err)
    holder.send_signal(signal.SIGUSR1)
    wait_until(lambda: signal.SIGUSR1 in counter.signals(), 2)
    if back:
        box.daemon("--state-dir", box.folder, address=known)
        os.unlink(file)
        wait_until(lambda: "is held again" in holder.err)
    counter.open()
    assert holder.end(5).status == 0


# TCP

class Relay(threading.Thread):
    """Passes TCP connections on to a daemon, and resets them: the client's side, or both.

    `pairs`: [(the client's side, the daemon's)]; `answered`: those over which the daemon spoke.
    """

    def __init__(self, target):
        super().__init__()
        self.target, self.pairs, self.answered = target, [], set()
        self.done = threading.Semaphore(0)
        self.selector, self.listener = selectors.DefaultSelector(), socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(50)
        self.address = ("-a", "127.0.0.1", "-p", str(self.listener.getsockname()[1]))
        self.waker, self.woken = socket.socketpair()
        for watched in (self.listener, self.woken):
            self.selector.register(watched, selectors.EVENT_READ)
        self.start()

    def reset(self, sides):
        """1: those of the clients, 2: also those of the daemon; later connections are new."""
        self.waker.sendall(bytes([sides]))
        assert self.done.acquire(timeout=10)

    def close(self):
        self.reset(0)
        self.join(10)
        for one in (self.listener, self.waker, self.woken, self.selector):
            one.close()

    def run(self):
        order = None
        while order != 0:
            ready = [key.fileobj for key, _ in self.selector.select()]
            if self.woken in ready:
                order = self.woken.recv(1)[0]
                self._reset([one for pair in self.pairs for one in pair[:order or 2]])
                self.done.release()
            elif self.listener in ready:
                pair = self.listener.accept()[0], socket.create_connection(self.target)
                self.pairs.append(pair)
                for one in pair:
                    self.selector.register(one, selectors.EVENT_READ)
            else:
                self._pass(ready[0])

    def _pass(self, source):
        pair, = [pair for pair in self.pairs if source in pair]
        other = pair[source is pair[0]]
        data = b""
        with contextlib.suppress(OSError):
            data = source.recv(65536)
        with contextlib.suppress(OSError):
            other.sendall(data) if data else other.shutdown(socket.SHUT_WR)
        if data and source is pair[1]:
            self.answered.add(pair)
        if not data:
            self.selector.unregister(source)

    def _reset(self, sockets):
        for one in sockets:
            if one.fileno() >= 0:
                with contextlib.suppress(KeyError):
                    self.selector.unregister(one)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                one.close()


@pytest.fixture
def relay(box):
    """The way to a daemon of the box with a TCP address, for clients that come over the relay."""
    box.address = ("-a", "127.0.0.1", "-p", str(free_port()))
    box.daemon("--state-dir", box.folder)
    relay = Relay(endpoint(box.address)[1])
    yield relay
    relay.close()


@pytest.mark.parametrize("sides", [1, 2], ids=["seen by flom alone", "seen by both"])
def test_a_reset_connection_is_made_again(box, relay, sides):
    """The lock is reclaimed under its token and element, silently."""
    names = ("R1", "red.green", "_s_seq[1]", "pool[2]", "/a/b")
    runs = [box.hold(str(n), "-r", name, *ALONE, address=relay.address)
            for n, name in enumerate(names)]
    before = holders_of(box)
    waiters = [box.waiter("-r", "R1", "--", *box.note("late"))] if sides == 1 else []
    answered = len(relay.answered)
    relay.reset(sides)
    wait_until(lambda: len(relay.answered) >= answered + len(names))
    wait_until(lambda: holders_of(box) == before)
    assert "late" not in box.events()
    for holder, gate in runs:
        gate.open()
        assert holder.end() == (0, "", "")
    assert all(waiter.end().status == 0 for waiter in waiters)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_stranger_cannot_take_a_lock_over(box, kind):
    """Anybody on the same host reads id and token of a holder in the report."""
    if kind == "tcp":
        box.address = ("-a", "127.0.0.1", "-p", str(free_port()), "--state-dir", box.folder)
    box.daemon()
    holder, gate = box.hold("1", "-r", "R1")
    [resource] = json.loads(box.run("--status", "--json").out)["resources"]
    [entry] = resource["holders"]
    session = f'client="flom.py/1.0" id="{entry["id"]}" peerid="0"'
    with FlomClient(*endpoint(box.address)) as thief:
        thief.socket.sendall(
            f'<msg level="3" verb="1" step="8"><session {session}/><resource name="UjE=" mode="5" '
            f'wait="0" create="1" reclaim="{entry["token"]}"/></msg>'.encode())
        assert thief.answer(16) == (16, 4, None)
    gate.open()
    assert holder.end() == (0, "", "")


@pytest.mark.parametrize("choice", ["warn", "term"])
def test_a_reset_connection_whose_lock_has_a_waiter(box, relay, choice):
    """The daemon sees the reset, too, and grants the waiter; the holder is told."""
    options = ("--on-lock-loss", choice, *ALONE)
    holder, counter = count(box, "a", *options, address=relay.address)
    gate = box.gate("b")
    waiter = box.waiter("--", *gate.command)
    relay.reset(2)
    gate.wait()
    assert is_told(holder, "_RESOURCE", "granted to others since")
    if choice == "term":
        wait_until(counter.signals)
    counter.open()
    assert holder.end().status == 95
    assert counter.signals() == [signal.SIGTERM] * (choice == "term")
    assert box.run("-o", "0", "--", "true").status == 98
    gate.open()
    assert waiter.end().status == 0


def test_a_waiter_whose_connection_is_reset_asks_again(box, relay):
    holder, gate = box.hold("a")
    waiter = box.waiter(*ALONE, "--", *box.note("b"), address=relay.address)
    relay.reset(2)
    wait_until(lambda: waiter.err.count("waiting for _RESOURCE, place 1") == 2)
    gate.open()
    assert [holder.end().status, waiter.end().status] == [0, 0]
    assert box.events() == ["a start", "a end", "b"]


# As a gate's command, but it logs its end by TERM, too.
LOGS_TERM = """\
trap 'kill $! 2>/dev/null; echo "$0" end >>"$1"; exit' TERM
echo "$0" start >>"$1"
cat "$2" &
wait
"""


def test_a_cable_that_is_cut(hosts):
    """Both ends learn of it by keepalive, flom first.  With `term` the old command has ended
    before the new one begins, with `warn` it has not.  Healed, the lock is the new one's, and
    one that nobody was granted is had back."""
    one, two = hosts(2)
    address, soon = ("-a", one.ipv4), ("--tcp-keepalive-intvl", "1", "--tcp-keepalive-probes", "1")
    options = (*address, *soon, "--tcp-keepalive-time", "5", "-d", "-1")
    assert one.run(*options, "--", "true").status == 0
    quick = "flom.KEEPALIVE, flom.RECOVERY_WINDOW, flom.NOTICE = (1, 1, 1), 300, 0.05"
    old = {name: two.gate(name) for name in ("warn", "term", "lone")}
    old["term"].command[2] = LOGS_TERM
    new = {name: one.gate("new-" + name) for name in ("warn", "term")}
    holders = {name: driven(two, quick, *address, *ALONE, "-r", name, "-i", "60000",
                            "--on-lock-loss", name.replace("lone", "warn"), "--", *gate.command,
                            address=()) for name, gate in old.items()}
    for gate in old.values():
        gate.wait()
    waiters = {name: one.waiter(*address, "-r", name, "--", *gate.command)
               for name, gate in new.items()}
    before = holders_of(one, address=address)
    two.network.cut(2)
    assert holders["term"].end().status == 95
    for gate in new.values():
        gate.wait(20)
    events = one.events()
    assert events.index("term end") < events.index("new-term start")
    assert "warn end" not in events
    wait_until(lambda: holders_of(one, address=address).get("lone") == [])
    two.network.heal(2)
    # a connection attempt made before goes on, with longer and longer pauses
    wait_until(lambda: holders_of(two, address=address).get("lone") == before["lone"], 30)
    for name in new:
        assert two.run(*address, *ALONE, "-r", name, "-o", "0", "--", "true").status == 98
    for name in ("warn", "lone"):
        old[name].open()
        assert holders[name].end().status == {"warn": 95, "lone": 0}[name]
    for name, words in (("warn", "granted to others since"), ("term", one.ipv4)):
        assert is_told(holders[name], name, words)
    assert holders["lone"].err.splitlines()[1:] == ["flom: the lock on lone is held again"]
    for name, waiter in waiters.items():
        new[name].open()
        assert waiter.end().status == 0
