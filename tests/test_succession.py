"""Daemons that end, in whatever way, and are started again: nobody notices, and nothing that was
told is forgotten.

Where each test says nothing else, the daemon is ended by KILL.
"""
import glob
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time

import pytest
from certificates import Certificates
from commands import state
from crowd import WISHES, Crowd
from fakes import LOCK, PEER, PING, UNLOCK, FlomClient, b64, message, parse
from world import (COUNT, FLOMD, PYTHON, ROOT, SOAK, chance, endpoint, free_port, has_ended,
                   limit_files, patched, pass_time, read, wait_until)

ALONE = ("-d", "0")  # no client starts a daemon
LONG = ("-i", "1h")  # a resource that stays
TROUBLE = "does not answer; trying to get the lock back"  # after more than 1 s


@pytest.fixture
def network(box):
    """A box whose daemon has a TCP address alone, and its state in the box."""
    box.address = ("-a", "127.0.0.1", "-p", str(free_port()), "--state-dir", box.folder)
    return box


@pytest.fixture(params=["local", "state-dir", "network"])
def place(request, box):
    """A box whose daemon has a socket, without and with --state-dir, or a TCP address."""
    if request.param == "state-dir":
        box.address += ("--state-dir", box.path("."))
    if request.param == "network":
        return request.getfixturevalue("network")
    return box


def restart(box, *options, end=signal.SIGKILL, **more):
    """Ends the daemon of the box, and starts another one, as an init script does."""
    box.kill(box.the_daemon(), end)
    return box.daemon(*options, **more)


def report(box, *options):
    """The status report as data, of a daemon that serves."""
    done = box.run("--status", "--json", *options)
    assert done.status == 0, done
    return json.loads(done.out)


def memory(box):
    """What the daemon says of its memory."""
    return report(box)["daemon"]["memory"]


def holders(box, name):
    """The holders of a resource, as the status report shows them."""
    found = [entry["holders"] for entry in report(box)["resources"] if entry["name"] == name]
    return found[0] if found else []


def known(box):
    """{resource: [(id, token, element) of its holders]}"""
    return {entry["name"]: [(holder["id"], holder["token"], holder.get("element"))
                            for holder in entry["holders"]] for entry in report(box)["resources"]}


def waiting(box):
    """How many wait."""
    return sum(len(entry["waiters"]) for entry in report(box)["resources"])


def is_absent(box, name):
    """Whether the only holder of a resource is absent."""
    found = holders(box, name)
    assert len(found) == 1, found
    return "absent" in found[0]


def grants(box, name, *options):
    """What a request that does not wait is given now: an element, or a status in place of it."""
    tell = ("sh", "-c", 'echo "$FLOM_ELEMENT"')
    done = box.run("-r", name, "-o", "0", *ALONE, *options, "--", *tell)
    return done.out.strip() if done.status == 0 else done.status


def journal(box):
    """The path of the daemon's journal."""
    found = glob.glob(glob.escape(box.folder) + "/*.journal")
    assert len(found) == 1, found
    return found[0]


class Own:
    """A client of ours on a connection of the test: it says what flom.py says."""

    made = 0

    def __init__(self, box, name, life=0, **asked):
        Own.made += 1
        self.name, self.life, self.asked = name, life, asked
        self.id, self.key = f"{Own.made:016x}", f"{Own.made:016x}"
        self.link = FlomClient(*endpoint(box.address))
        self.token, self.session = None, {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.link.socket.close()

    def ask(self, **more):
        """Sends the request, and waits for nothing."""
        asked = dict(dict(mode=5, wait=0, create=1, lifespan=0), **self.asked, **more)
        about = "".join(f' {key}="{value}"' for key, value in asked.items())
        self.link.socket.sendall(message(
            LOCK, 8, f'<session peerid="{PEER}" client="flom.py/1.1" id="{self.id}" '
            f'key="{self.key}" life="{self.life}"/><resource name="{b64(self.name)}"{about}/>'))
        return self

    def answer(self):
        """The attributes of the next answer, None at the end of the connection."""
        try:
            data = self.link.receive()
        except ConnectionResetError:
            return None
        if not data:
            return None
        found = parse(data)
        self.session = found.get("session", self.session)
        self.token = found.get("answer", {}).get("token", self.token)
        return dict(found["msg"], **found.get("answer", {}))

    def unlock(self, rollback=0):
        """Sends unlock and ping together, as at the end of a command."""
        released = f'<resource name="{b64(self.name)}" rollback="{rollback}" />'
        self.link.socket.sendall(message(UNLOCK, 8, released) + message(PING, 8))

    def again(self, box):
        """The same client on a new connection."""
        self.link.socket.close()
        self.link = FlomClient(*endpoint(box.address))
        return self


# Nobody notices

def test_nobody_notices_an_end_and_a_start(place):
    """By TERM, as init does it, and by KILL: holders and waiters of all kinds say nothing, have
    their locks and places, and end with the status of their commands."""
    place.daemon()
    names = ("R1", "pool[2]", "red.green", "/a/b", "_s_seq[1]", "_S_seq[1]", "_t_%S#fff[1]")
    held = [place.hold(f"h{n}", "-r", name, "-q", "2", *ALONE) for n, name in enumerate(names)]
    waiters = [place.flom("-r", name, *ALONE, "--", *place.note(f"late {name}"))
               for name in names[:2]]
    wait_until(lambda: waiting(place) == 2)
    before = known(place)
    for number in (signal.SIGTERM, signal.SIGKILL):
        restart(place, end=number)
        wait_until(lambda: "absent" not in json.dumps(report(place)["resources"]))
        assert known(place) == before
    wait_until(lambda: waiting(place) == 2)
    assert not [line for line in place.events() if line.startswith("late")]
    for _, gate in held:
        gate.open()
    assert [holder.end() for holder, _ in held] == [(0, "", "")] * len(held)
    assert [waiter.end() for waiter in waiters] == [(0, "", "")] * 2


class Keeper:
    """Ends the daemon of a box and starts it again, as systemd does: its listening socket stays
    open meanwhile, so that clients of -d 0 find somebody at any instant.  The journal is rewritten
    all the time."""

    CHANGE = "flomd.LEAST_REWRITTEN = 4096\nflomd.PORTION = 3"

    def __init__(self, box, address, *options):
        self.box, self.options = box, options
        self.socket = socket.socket(socket.AF_UNIX if "-s" in address else socket.AF_INET)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(endpoint(address)[1])
        self.socket.listen(100)
        self.logs = []
        self.start()

    def start(self):
        self.logs.append(self.box.path(f"daemon.{len(self.logs)}.log"))
        script = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
        self.daemon = self.box.start(
            "/bin/sh", "-c", script, "sh", *PYTHON, *patched(self.CHANGE), "-f", "--no-files",
            *self.box.address, *self.options, "--log", self.logs[-1], "--log-level", "debug",
            pass_fds=[3], preexec_fn=lambda: os.dup2(self.socket.fileno(), 3))
        self.box.foreground.append(self.daemon)

    def serving(self):
        """Whether the daemon has been able to serve; it must not have ended."""
        assert self.daemon.poll() is None, self.daemon.err
        return os.path.exists(self.logs[-1]) and "serving" in read(self.logs[-1])

    def end(self, number):
        self.daemon.send_signal(number)
        self.daemon.wait(timeout=10)
        self.start()

    def close(self):
        self.socket.close()
        if "-s" in self.box.address:
            os.unlink(self.box.socket)

    def logged(self):
        return "".join(read(path) for path in self.logs if os.path.exists(path))


def kept_busy(crowd, seconds):
    """Lets the crowd work for so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        crowd.fill(len(WISHES))
        pass_time(0.01)


def end_often(crowd, keeper, times):
    """Ends the daemon so many times, mostly by KILL, at any instant of the crowd's work."""
    for _ in range(times):
        entered = crowd.entered()
        wait_until(lambda: crowd.fill(len(WISHES)) or crowd.entered() > entered, 30)
        kept_busy(crowd, crowd.chance.uniform(0, 0.3))
        keeper.end(crowd.chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        wait_until(lambda: crowd.fill(len(WISHES)) or keeper.serving())


def rate(crowd, act):
    """How many commands begin in a second of act()."""
    began, before = time.monotonic(), crowd.entered()
    act()
    return (crowd.entered() - before) / (time.monotonic() - began)


@pytest.mark.parametrize("where", ["local", "state-dir", "network", "tls"])
def test_nobody_notices_kills_under_load(box, tmp_path, where):
    """Every status is 0, no incompatible commands overlap, no value comes twice, and none is left
    out that the log does not name."""
    if where == "state-dir":
        box.address += ("--state-dir", box.folder)
    if where in ("network", "tls"):
        box.address = ("-a", "127.0.0.1", "-p", str(free_port()), "--state-dir", box.folder)
    if where == "tls":
        box.address += Certificates(tmp_path).options()
    keeper = Keeper(box, box.address[:4 if "-a" in box.address else 2], "-d", "-1")
    crowd = Crowd(box, f"memory {where}", ALONE, work=(0.01, 0.1))
    wait_until(keeper.serving)
    undisturbed = rate(crowd, lambda: kept_busy(crowd, 10)) if SOAK else 0
    disturbed = rate(crowd, lambda: end_often(crowd, keeper, -(-COUNT.kills // 4)))
    assert disturbed >= undisturbed / 4
    crowd.end()
    for run in crowd.over:
        status, out, err = run.flom.end()
        assert (status, out) == (0, ""), (run, err)
        assert all(TROUBLE in line or "is held again" in line for line in err.splitlines()), err
    assert crowd.check_order() == {run.name for run in crowd.over}
    crowd.check_values()
    logged = keeper.logged()
    for name in ("_S_n[2]", "_s_n[1]"):
        used = set(map(int, crowd.values(name)))
        for value in set(range(1, max(used))) - used:
            assert re.search(rf"{re.escape(name)}.*\b{value}\b", logged), (name, value)
    keeper.close()


@pytest.mark.parametrize("store", ["file", "state-dir"])
def test_what_was_told_is_known(box, store):
    """Many ask and let go at the same time, and the daemon is killed at any instant: its successor
    knows every lock that was told and not let go, and none that nobody asked for; those whose end
    was acknowledged it does not know."""
    if store == "state-dir":
        box.address += ("--state-dir", box.folder)
    draw = chance(f"told {store}")
    for _ in range(-(-COUNT.kills // 2)):
        daemon = box.daemon()
        holding = [Own(box, f"held{n}") for n in range(20)]
        asking = [Own(box, f"asked{n}", life=n % 2) for n in range(20)]
        told, ended = killed_amid(box, daemon, holding, asking, draw)
        box.daemon()
        held = {name for name, found in known(box).items() if found}
        assert {client.name for client in told} <= held
        assert held <= {client.name for client in holding[:10] + told + asking}
        assert not {client.name for client in ended} & held
        for client in told:
            before = client.token
            assert client.again(box).ask(reclaim=before).answer()["rc"] == "0"
            assert client.token == before
        box.kill(box.the_daemon())
        for client in holding + asking:
            client.link.socket.close()
        for path in glob.glob(glob.escape(box.folder) + "/s*"):
            os.unlink(path)


def killed_amid(box, daemon, holding, asking, draw):
    """(who was told that it holds, who was told that it does not any more), of a daemon that is
    killed while half of the holders let go, and others ask."""
    for client in holding:
        assert client.ask().answer()["rc"] == "0"
    for client in holding[:10]:
        client.unlock()
    for client in asking:
        client.ask()
    for client in asking[:draw.randrange(len(asking))]:
        assert client.answer()["rc"] == "0"
    box.kill(daemon.pid)
    for client in asking:
        if client.token is None:
            client.answer()  # what had been sent by then was told
    ended = [client for client in holding[:10] if client.answer()]
    told = holding[10:] + [client for client in asking if client.token]
    return told, ended


def test_a_grant_that_was_not_told_is_found_again(box):
    """Who asks again with the id and the key of an absent holder is this holder."""
    box.daemon()
    with Own(box, "_s_n[1]") as client:
        assert client.ask().answer()["element"] == "1"
        token = client.token
        restart(box)
        told = client.again(box).ask().answer()
        assert (told["rc"], told["element"], client.token) == ("0", "1", token)
    assert grants(box, "_s_n[1]") == "2"


# Absent holders

@pytest.mark.parametrize("where", ["local", "network"])
def test_a_stopped_flom_keeps_its_lock(request, box, where):
    """For longer than any window, over a kill and a start, and once more."""
    if where == "network":
        request.getfixturevalue("network")
    box.daemon()
    holder, gate = box.hold("a", "-r", "R1", *ALONE)
    os.kill(holder.pid, signal.SIGSTOP)
    wait_until(lambda: state(holder.pid) == "T")
    for _ in range(2):
        restart(box)
        assert grants(box, "R1") == 98
        assert is_absent(box, "R1")
        assert "absent" in box.run("--status").out
        assert grants(box, "R2") == ""
    until = time.monotonic() + (10 if SOAK else 2.5)
    while time.monotonic() < until:
        assert grants(box, "R1") == 98
        pass_time(0.2)
    os.kill(holder.pid, signal.SIGCONT)
    wait_until(lambda: not is_absent(box, "R1"))
    gate.open()
    assert holder.end() == (0, "", "")


def test_others_are_granted_at_once(box):
    """Within 100 ms after the daemon is ready, half of the times at least."""
    box.daemon()
    held = [box.hold(f"h{n}", "-r", f"held{n}", *ALONE) for n in range(2)]
    took = []
    for n in range(5):
        restart(box)
        began = time.monotonic()
        with FlomClient(*endpoint(box.address)) as client:
            assert client.lock(f"other{n}", wait=0) is True
        took.append(time.monotonic() - began)
    for _, gate in held:
        gate.open()
    assert [holder.end().status for holder, _ in held] == [0, 0]
    assert statistics.median(took) < 0.1, took


def test_two_faults_free_a_lock_under_its_command(box):
    """flom is killed, then the daemon: the command has nothing of the new one."""
    box.daemon()
    holder, gate = box.hold("a", "-r", "R1", *ALONE)
    box.kill(holder.pid)
    assert grants(box, "R1") == 98
    restart(box)
    assert box.run("-r", "R1", "-o", "5000", *ALONE, "--", *box.note("b")).status == 0
    gate.open()
    wait_until(lambda: "a end" in box.events())
    assert box.events() == ["a start", "b", "a end"]


FLOM_CLIENT = f"""\
import socket, sys
sys.path[:0] = [{ROOT!r}, {ROOT + "/tests"!r}]
from fakes import FlomClient
with open("/proc/self/comm", "w") as file:
    file.write(sys.argv[1])
client = FlomClient(socket.AF_UNIX, sys.argv[2])
print(client.lock("R1"), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("name, freed", [("flom", True), ("other", False)])
def test_a_client_of_flom_is_protected(box, name, freed):
    """It cannot reclaim.  On a local socket its lock ends with its process, which is known by its
    name; that of any other program after the grace."""
    box.daemon()
    reader, writer = os.pipe()
    client = box.start(sys.executable, "-c", FLOM_CLIENT, name, box.socket, stdin=reader)
    wait_until(lambda: client.out or client.poll() is not None)
    assert client.out == "True\n", client.err
    restart(box)
    assert grants(box, "R1") == 98 and is_absent(box, "R1")
    for number in (reader, writer):
        os.close(number)
    client.wait(timeout=10)
    if freed:
        wait_until(lambda: grants(box, "R1") == "")
    else:
        pass_time(0.5)
        assert grants(box, "R1") == 98


def test_an_absent_holder_can_be_evicted(box):
    """Its lock is free at once, and its flom takes it for lost."""
    box.daemon()
    holder, gate = box.hold("a", "-r", "R1", *ALONE)
    os.kill(holder.pid, signal.SIGSTOP)
    restart(box, "--metrics", box.path("figures"))
    wait_until(lambda: os.path.exists(box.path("figures")))
    assert "flomd_absent_holders 1\n" in read(box.path("figures"))
    assert box.run("--evict", holders(box, "R1")[0]["id"]).status == 0
    assert grants(box, "R1") == ""
    other, other_gate = box.hold("b", "-r", "R1", *ALONE)
    os.kill(holder.pid, signal.SIGCONT)
    wait_until(lambda: "is lost" in holder.err)
    gate.open()
    other_gate.open()
    assert (holder.end().status, other.end().status) == (95, 0)


def test_the_end_of_an_absent_holder_gives_no_number_back(box):
    """A gap is better than a number that comes twice."""
    box.daemon()
    holder, gate = box.hold("a", "-r", "_S_n[1]", *ALONE, "--inherit-connection", "no")
    assert box.events() == ["a start 1"]
    os.kill(holder.pid, signal.SIGSTOP)
    daemon = restart(box)
    box.kill(holder.pid)
    wait_until(lambda: grants(box, "_S_n[1]") == "2")
    assert re.search(r"_S_n\[1\].*\b1\b", daemon.err)
    gate.open()


def test_a_grace_comes_to_its_end(network):
    """From the start of the daemon on; whose lock it was finds it lost."""
    quick = ("--tcp-keepalive-time", "1", "--tcp-keepalive-intvl", "1", "--tcp-keepalive-probes",
             "1")
    program = patched("flomd.LEAST_GRACE = 1")
    network.daemon(*quick, program=program)
    holder, gate = network.hold("a", "-r", "_S_n[1]", *LONG, *ALONE)
    os.kill(holder.pid, signal.SIGSTOP)
    daemon = restart(network, *quick, program=program)
    began = time.monotonic()
    assert network.run("-r", "_S_n[1]", *LONG, *ALONE, "--", "echo").out == "2\n"
    assert 1 < time.monotonic() - began < 5
    assert re.search(r"'_S_n\[1\]' with 1, .* is free: its grace is over\n", daemon.err)
    os.kill(holder.pid, signal.SIGCONT)
    wait_until(lambda: "is lost" in holder.err)
    gate.open()
    assert holder.end().status == 95


def test_a_daemon_with_absent_holders_is_not_unused(box):
    box.daemon()
    holder, gate = box.hold("a", *ALONE)
    os.kill(holder.pid, signal.SIGSTOP)
    daemon = restart(box, "-d", "100")
    pass_time(1)
    assert daemon.poll() is None
    os.kill(holder.pid, signal.SIGCONT)
    wait_until(lambda: not is_absent(box, "_RESOURCE"))
    gate.open()
    assert holder.end() == (0, "", "")
    assert daemon.wait(timeout=20) == 0


def test_a_deadlock_with_an_absent_holder_is_refused(box):
    box.daemon()
    gate = box.gate("go")
    inner = [*PYTHON, os.path.join(os.path.dirname(FLOMD), "flom.py"), *box.address, *ALONE, "-r",
             "R1", "--", "true"]
    script = 'echo go start >>"$1"; read _ <"$2"; shift 2; "$@"; echo "inner $?" >>"$0"'
    holder = box.flom("-r", "R1", *ALONE, "--", "/bin/sh", "-c", script, box.log, box.log,
                      gate.fifo, *inner)
    gate.wait()
    os.kill(holder.pid, signal.SIGSTOP)
    restart(box)
    gate.open()
    wait_until(lambda: "inner 94" in box.events())
    os.kill(holder.pid, signal.SIGCONT)
    assert holder.end().status == 0


# Numbers

@pytest.mark.parametrize("name, first, second", [
    ("_s_bill[1]", ["1", "2"], ["3", "4"]), ("red.green.blue", ["red"], ["green", "blue", "red"])])
def test_numbers_and_turns_go_on(place, name, first, second):
    place.daemon()
    assert [grants(place, name, *LONG) for _ in first] == first
    for number in (signal.SIGKILL, signal.SIGTERM):
        restart(place, end=number)
        half = second[:len(second) // 2] or second[:1]
        assert [grants(place, name, *LONG) for _ in half] == half
        second = second[len(half):]


def test_numbers_that_came_back_are_given_again(place):
    """In the order in which they came back."""
    place.daemon()
    clients = [Own(place, "_S_n[3]", lifespan=3600000) for _ in range(3)]
    assert [client.ask().answer()["element"] for client in clients] == ["1", "2", "3"]
    for client in (clients[2], clients[0], clients[1]):
        client.unlock(rollback=1)
        assert client.answer()["verb"] == "3"
        client.link.socket.close()
    restart(place)
    assert [grants(place, "_S_n[3]", *LONG) for _ in range(4)] == ["3", "1", "2", "4"]


def test_a_timestamp_never_comes_twice(place):
    place.daemon()
    name = "_t_%Y%m%d%H[1]"
    before = time.strftime("%H")
    assert grants(place, name, *LONG) == time.strftime("%Y%m%d%H")
    restart(place)
    again = grants(place, name, *LONG)
    assert again == 98 or time.strftime("%H") != before


def test_a_resource_ends_in_time_though_its_daemon_has_changed(box):
    """What it was idle before the start counts."""
    box.daemon()
    assert grants(box, "_s_n[1]", "-i", "3s") == "1"
    pass_time(1.5)
    restart(box)
    assert grants(box, "_s_n[1]", "-i", "3s") == "2"
    pass_time(1.5)
    restart(box)
    pass_time(2)
    assert grants(box, "_s_n[1]", "-i", "3s") == "1"


def order(box, word):
    """Ends the daemon by -X, -x, or USR1."""
    pid = box.the_daemon()
    if word == "USR1":
        os.kill(pid, signal.SIGUSR1)
    else:
        assert box.run(word).status == 0
    wait_until(lambda: has_ended(pid))


@pytest.mark.parametrize("word", ["-X", "-x", "USR1"])
def test_an_order_to_end_forgets_what_nobody_holds(box, word):
    box.daemon()
    assert [grants(box, "_s_n[1]", *LONG) for _ in "ab"] == ["1", "2"]
    order(box, word)
    box.daemon()
    assert grants(box, "_s_n[1]", *LONG) == "1"


@pytest.mark.parametrize("word", ["-X", "-x", "USR1"])
def test_an_order_to_end_forgets_no_lock(box, word):
    """No daemon waits for an absent holder."""
    box.daemon()
    holder, gate = box.hold("a", "-r", "_s_n[1]", *LONG, *ALONE)
    os.kill(holder.pid, signal.SIGSTOP)
    restart(box)
    order(box, word)
    box.daemon()
    assert is_absent(box, "_s_n[1]") and grants(box, "_s_n[1]", *LONG) == 98
    os.kill(holder.pid, signal.SIGCONT)
    wait_until(lambda: not is_absent(box, "_s_n[1]"))
    gate.open()
    assert holder.end().status == 0
    assert grants(box, "_s_n[1]", *LONG) == "2"


def test_what_nobody_waits_for_is_stored_at_the_end(box):
    """The lifespan that a refused request has asked for."""
    box.daemon()
    with Own(box, "R1") as holder, Own(box, "R1", lifespan=60000) as other:
        assert holder.ask().answer()["rc"] == "0" and other.ask().answer()["rc"] == "4"
        restart(box, end=signal.SIGTERM)
    assert 'lifespan="60000"' in read(journal(box))


def test_a_token_that_no_daemon_has_given_yet(box):
    """Nobody but those who are known can hold what is theirs already."""
    box.daemon()
    with Own(box, "R1", mode=1) as holder, Own(box, "R1", mode=1) as liar:
        holder.ask().answer()
        restart(box)
        for epochs in (0, 1000):
            token = int(holder.token) + 5 + (epochs << 32)
            assert liar.again(box).ask(reclaim=token).answer()["rc"] == "4"
        assert holder.again(box).ask(reclaim=holder.token).answer()["rc"] == "0"


# Another boot

def booted(box, change=""):
    """For `program`: a flomd that finds another boot id from now on."""
    path = box.write("boot", "00000000-1111-2222-3333-444444444444\n")
    return patched(f"flomd.BOOT_ID = {path!r}\n{change}")


def test_a_boot_ends_all_local_holders(box):
    """Nobody waits for them; numbers go on."""
    box.daemon()
    holder, gate = box.hold("a", "-r", "_S_n[1]", *LONG, *ALONE)
    os.kill(holder.pid, signal.SIGSTOP)
    daemon = restart(box, program=booted(box))
    assert grants(box, "_S_n[1]", *LONG) == "2"
    assert re.search(r"'_S_n\[1\]' with 1, .* is free: the host was booted\n", daemon.err)
    os.kill(holder.pid, signal.SIGCONT)
    gate.open()
    assert holder.end().status in (0, 95)


BEGUN = """
import os
real = flomd.Disk.begin
def begin(*arguments):
    real(*arguments)
    os._exit(9)
flomd.Disk.begin = begin
"""


def test_a_boot_and_a_daemon_that_is_killed_when_it_has_begun(box):
    """The next one, of the same boot, sees no holder in a process that has the pid by now."""
    box.daemon()
    holder, gate = box.hold("a", "-r", "R1", *ALONE)
    os.kill(holder.pid, signal.SIGSTOP)
    box.kill(box.the_daemon())
    killed = box.flomd("-f", "--no-files", *box.address, program=booted(box, BEGUN))
    assert killed.end().status == 9
    box.daemon(program=booted(box))
    assert holders(box, "R1") == []
    os.kill(holder.pid, signal.SIGCONT)
    gate.open()
    assert holder.end().status in (0, 95)


@pytest.mark.parametrize("synced", [True, False])
def test_holders_on_other_hosts_survive_a_boot(box, synced):
    """With --state-dir all is known, and others are granted at once; without it the memory may
    lack the last grants: only who held is granted, until each has had the time to come."""
    box.address = ("-a", "127.0.0.1", "-p", str(free_port()))
    box.address += ("--state-dir", box.folder) if synced else ()
    quick = ("--tcp-keepalive-time", "1", "--tcp-keepalive-intvl", "1")
    box.daemon(*quick, **at_home(box, synced))
    holder, gate = box.hold("a", "-r", "R1", *ALONE)
    os.kill(holder.pid, signal.SIGSTOP)
    change = "" if synced else HOME.format(folder=box.folder)
    path = box.write("boot", "00000000-1111-2222-3333-444444444444\n")
    restart(box, *quick, program=patched(f"flomd.BOOT_ID = {path!r}\n{change}"))
    began = time.monotonic()
    assert is_absent(box, "R1")
    assert not synced or "window" not in report(box)["daemon"]
    assert box.run("-r", "R2", "-o", "5000", *ALONE, "--", "true").status == 0
    assert synced or time.monotonic() - began > 1
    assert grants(box, "R1") == 98
    os.kill(holder.pid, signal.SIGCONT)
    wait_until(lambda: not is_absent(box, "R1"))
    gate.open()
    assert holder.end().status == 0


HOME = "flomd.default_socket = lambda: {folder!r} + '/default'"


def at_home(box, synced):
    """Options of a daemon whose file for a fixed address is in the box."""
    return {} if synced else {"program": patched(HOME.format(folder=box.folder))}


# Failures: the journal of a daemon that runs

def lose(box, how):
    """Does something to the journal."""
    path = journal(box)
    if how == "removed":
        os.unlink(path)
    elif how == "replaced":
        shutil.copy(path, path + ".copy")
        os.rename(path + ".copy", path)
    elif how == "a link":
        os.unlink(path)
        os.symlink(box.write("precious", "precious\n"), path)
    return path


@pytest.mark.parametrize("how", ["removed", "replaced", "a link"])
def test_a_journal_that_is_gone_is_made_anew(box, how):
    box.daemon()
    holder, gate = box.hold("a", "-r", "R1", *ALONE)
    path = lose(box, how)
    before = os.lstat(path).st_ino if how != "removed" else 0
    wait_until(lambda: os.path.exists(path) and not os.path.islink(path)
               and os.lstat(path).st_ino != before)
    os.kill(holder.pid, signal.SIGSTOP)
    restart(box)
    assert is_absent(box, "R1") and grants(box, "R2") == ""
    if how == "a link":
        assert read(box.path("precious")) == "precious\n"
    os.kill(holder.pid, signal.SIGCONT)
    gate.open()
    assert holder.end().status == 0


# Failures: the journal that a daemon finds

def damage(box, how):
    """Does something to the journal of a daemon that has ended."""
    path = journal(box)
    with open(path, "rb") as file:
        data = file.read()
    if how == "removed":
        os.unlink(path)
    elif how == "another user's":
        os.chown(path, 1, 1)
    elif how == "a link":
        os.rename(path, box.path("precious"))
        os.symlink(box.path("precious"), path)
    elif how == "a second name":
        os.link(path, box.path("precious"))
    elif how == "damaged":
        with open(path, "r+b") as file:
            file.seek(len(data) // 2)
            file.write(bytes([data[len(data) // 2] ^ 1]))
    elif how == "older":
        shutil.copy(box.path("older"), path)
    return path


HOWS = ["removed", "another user's", "a link", "a second name", "damaged", "older"]


@pytest.mark.parametrize("how", HOWS)
def test_a_journal_that_does_not_count(box, how):
    """Nothing is known: a line in the log; for the window of 2 s only who held is granted."""
    if how == "another user's" and os.geteuid():
        pytest.skip("only root can give files away")
    box.daemon()
    with open(journal(box), "rb") as file:
        older = file.read()
    restart(box)
    holder, gate = box.hold("a", "-r", "R1", *ALONE)
    os.kill(holder.pid, signal.SIGSTOP)
    with open(box.path("older"), "wb") as file:
        file.write(older)
    box.kill(box.the_daemon())
    path = damage(box, how)
    began = time.monotonic()
    daemon = box.daemon()
    assert path in daemon.err and "Traceback" not in daemon.err
    begun = report(box)
    assert begun["daemon"]["window"] > 0 and begun["resources"] == []
    waiter = box.waiter("-r", "R2", *ALONE, "--", "true")
    os.kill(holder.pid, signal.SIGCONT)
    wait_until(lambda: holders(box, "R1"))
    assert waiter.end().status == 0 and time.monotonic() - began > 2
    gate.open()
    assert holder.end() == (0, "", "")


def test_a_journal_of_a_newer_layout_is_put_aside(box):
    box.daemon()
    holder, gate = box.hold("a", "-r", "R1", *ALONE)
    box.kill(box.the_daemon())
    path = journal(box)
    with open(path, "rb") as file:
        head, rest = file.read().split(b"\n", 1)
    newer = re.sub(rb"\d+$", b"99", head) + b"\n" + rest
    assert newer != head + b"\n" + rest
    with open(path, "wb") as file:
        file.write(newer)
    daemon = box.daemon()
    assert path in daemon.err
    with open(path + ".99", "rb") as file:
        assert file.read() == newer
    gate.open()
    assert holder.end().status == 0


@pytest.mark.parametrize("is_booted", [False, True])
def test_a_daemon_without_the_state_dir_in_between(box, is_booted):
    """As a client may start one while init's is away: what the folder has does not count, nor the
    boot of which it is."""
    options = "--state-dir", box.path("kept")
    os.mkdir(options[1])
    box.daemon(*options)
    program = {"program": booted(box)} if is_booted else {}
    restart(box, **program)
    holder, gate = box.hold("a", "-r", "R1", *ALONE)
    os.kill(holder.pid, signal.SIGSTOP)
    daemon = restart(box, *options, **program)
    assert daemon.err.count("does not count: it is older than the state") == 1
    assert holders(box, "R1") == [] and report(box)["daemon"]["window"] > 0
    os.kill(holder.pid, signal.SIGCONT)
    wait_until(lambda: holders(box, "R1"))
    assert "does not count" not in restart(box, *options, **program).err
    gate.open()
    assert holder.end() == (0, "", "")


# Failures: it cannot be written

def test_a_journal_that_cannot_grow(box):
    """Grants go on under the mark, and the reports say it; the successor leaves former holders the
    time to come."""
    daemon = box.daemon(preexec_fn=limit_files(150))
    holder, gate = box.hold("a", "-r", "R1", *ALONE)
    wait_until(lambda: memory(box) == "failing")
    assert daemon.err.count("journal") == 1
    assert read(box.socket + ".lock").split()[3] == "1"
    restart(box)
    assert report(box)["daemon"]["window"] > 0
    wait_until(lambda: holders(box, "R1"))
    gate.open()
    assert holder.end() == (0, "", "")
    assert memory(box) == "file"


def test_with_a_state_dir_nothing_is_told_that_is_not_stored(box):
    """Where nothing can be written: who does not wait is told so, who waits waits, with a reason.
    Numbers are not given out at all."""
    box.address += ("--state-dir", box.folder)
    box.daemon(preexec_fn=limit_files(150))
    began = time.monotonic()
    waiter = box.flom("-V", "-r", "R2", *ALONE, "--", "true")
    done = box.run("-r", "R1", "-o", "0", *ALONE, "--", "echo", "wrong", seconds=20)
    assert done.status == 98 and done.out == "" and time.monotonic() - began < 8
    assert grants(box, "_s_n[1]") == 98
    wait_until(lambda: "waiting for R2" in waiter.err)
    assert memory(box) == "failing"
    box.kill(waiter.pid)


HANGS = """
import os
flomd.LATE = 0.2
real = flomd._sync
flomd._sync = lambda number: open({0!r}).close() if os.path.exists({0!r}) else real(number)
"""


def test_who_gives_up_while_the_disk_hangs_is_seen(box):
    """It was told that it waits, and does not keep the daemon from ending."""
    box.address += ("--state-dir", box.folder)
    daemon = box.daemon(program=patched(HANGS.format(box.path("hang"))))
    assert grants(box, "R1") == ""
    os.mkfifo(box.path("hang"))  # which nobody writes to
    waiter = box.waiter("-r", "R2", *ALONE, "--", "true")
    box.kill(waiter.pid)
    wait_until(lambda: not holders(box, "R2"), 5)
    os.kill(daemon.pid, signal.SIGUSR1)
    assert daemon.end().status == 0


class Disk:
    """A small disk in a place of its own, as the folder `disk` of a box; whatever is to see it is
    started behind `enter`."""

    SCRIPT = 'mount -t tmpfs -o size=64k none "$0" && echo && exec cat'

    def __init__(self, box):
        self.folder = box.path("disk")
        os.mkdir(self.folder)
        words = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
        self.keeper = box.start(*words, "sh", "-c", self.SCRIPT, self.folder,
                                stdin=subprocess.PIPE)
        wait_until(lambda: self.keeper.out or self.keeper.poll() is not None)
        self.enter = ["nsenter", "-t", str(self.keeper.pid), "-m"]
        if os.geteuid():
            self.enter += ["-U", "--preserve-credentials"]
        self.ballast = f"/proc/{self.keeper.pid}/root{self.folder}/ballast"

    def fill(self):
        """Leaves no room."""
        with open(self.ballast, "wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(b"x" * 512)

    def empty(self):
        os.unlink(self.ballast)

    def close(self):
        self.keeper.communicate()  # closes its standard input


@pytest.fixture
def disk(box):
    if not shutil.which("unshare"):
        pytest.skip("no unshare")
    disk = Disk(box)
    if disk.keeper.poll() is not None:
        pytest.skip(f"no mount namespace: {disk.keeper.err}")
    yield disk
    disk.close()


SOON = "flomd.RETRY = 0.2"  # s until a failed journal is made anew


def on_disk(box, disk, *options):
    """A daemon that keeps its state on the small disk."""
    prefix, box.prefix = box.prefix, disk.enter
    daemon = box.daemon("--state-dir", disk.folder, *options, program=patched(SOON))
    box.prefix = prefix
    return daemon


def test_a_full_disk(box, disk):
    """Nobody is told what is not on it; as soon as there is room whoever waits is granted."""
    daemon = on_disk(box, disk)
    holder, gate = box.hold("a", "-r", "R1", *ALONE)
    disk.fill()
    wait_until(lambda: grants(box, "_s_n[1]", *LONG) == 98, 30)  # what there was of its last block
    waiter = box.flom("-r", "R2", *ALONE, "--", *box.note("R2"))
    pass_time(0.5)
    assert memory(box) == "failing" and box.events() == ["a start"]
    assert daemon.err.count("No space left on device") == 1
    disk.empty()
    assert waiter.end() == (0, "", "")
    wait_until(lambda: memory(box) == "synced")
    os.kill(holder.pid, signal.SIGSTOP)
    box.kill(box.the_daemon())
    on_disk(box, disk)
    assert is_absent(box, "R1") and grants(box, "R1") == 98
    os.kill(holder.pid, signal.SIGCONT)
    gate.open()
    assert holder.end() == (0, "", "")


def test_a_disk_that_is_read_only(box, disk):
    """--state-dir is a promise that cannot be kept."""
    box.start(*disk.enter, "mount", "-o", "remount,ro", disk.folder).end()
    done = box.start(*disk.enter, *PYTHON, FLOMD, "-f", "--no-files", *box.address, "--state-dir",
                     disk.folder).end()
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
    assert disk.folder in done.err and "Read-only file system" in done.err


def test_a_group_without_an_address_has_no_journal(hosts):
    """Another host may have served in between: only the window protects who held a lock."""
    one, = hosts(1)
    group = ("-A", "239.255.77.1")
    daemon = one.flomd("-f", "--no-files", *one.address, *group)
    one.foreground.append(daemon)
    wait_until(lambda: one.run(*group, *ALONE, "--", "true").status == 0)
    assert json.loads(one.run(*group, "--status", "--json").out)["daemon"]["memory"] == "none"
    holder, gate = one.hold("a", *group, *ALONE)
    one.kill(daemon.pid)
    assert glob.glob(glob.escape(one.folder) + "/*.journal") == []
    daemon = one.flomd("-f", "--no-files", *one.address, *group)
    one.foreground.append(daemon)
    wait_until(lambda: one.run(*group, "--status", "--json").status == 0)
    told = json.loads(one.run(*group, "--status", "--json").out)
    assert 0 < told["daemon"]["window"] <= 2000
    wait_until(lambda: "_RESOURCE  simple  holds" in one.run(*group, "--status").out)
    gate.open()
    assert holder.end().status == 0


# What a client is told

@pytest.mark.parametrize("where, life, least, most", [
    ("local", 1, -1, -1), ("local", 0, 120000, 120000), ("network", 1, 120000, 120000)])
def test_a_client_is_told_its_grace(request, box, where, life, least, most):
    if where == "network":
        request.getfixturevalue("network")
    box.daemon()
    with Own(box, "R1", life=life) as client:
        client.ask().answer()
        assert least <= int(client.session["grace"]) <= most


@pytest.mark.parametrize("rollback, following", [(0, "2"), (1, "1")])
def test_who_comes_back_unlocks_and_goes_has_unlocked(place, rollback, following):
    """It waits for no answer, and so the first one cannot be sent any more."""
    place.daemon()
    client = Own(place, "_S_n[1]", lifespan=60000)
    answer = client.ask().answer()
    restart(place)
    client.again(place)
    client.ask(reclaim=answer["token"], held=answer["element"])
    client.unlock(rollback)
    client.link.socket.close()
    assert place.run("-r", "_S_n[1]", "--", "echo") == (0, f"{following}\n", "")


def test_an_unlock_is_acknowledged(box):
    """The ping after it is answered when its end is stored."""
    box.daemon()
    with Own(box, "R1") as client:
        client.ask().answer()
        client.unlock()
        assert client.answer()["verb"] == "3"
        restart(box)
    assert holders(box, "R1") == []
