"""Hostile input and limits: nothing that a peer does ends, stalls or slows the daemon.

A well-behaved client locks and unlocks beside all that is done here.
"""
import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import time

import flomd
import pytest
from attack import generated
from certificates import Certificates
from commands import driven_daemon, state
from fakes import LOCK, PEER, PING, UNLOCK, FlomClient, b64, message, read_message
from world import (COUNT, DATA, PYTHON, ROOT, SOAK, chance, endpoint, free_port, pass_time, read,
                   wait_until)

ATTACK = os.path.join(ROOT, "tests", "attack.py")
MANY, HOLDERS = COUNT.connections, COUNT.holders
MESSAGES = min(COUNT.messages, 100000)
NORMAL_END = 'shutdown immediate="0"'  # an order that the daemon obeys

with open(os.path.join(DATA, "hostile.json")) as file:
    CASES = {case["label"]: case for case in json.load(file)["cases"]}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("tls"))


class Beside:
    """The well-behaved client; on leaving it must have got every lock, and soon."""

    def __init__(self, box, *words):
        self.process = box.start(*PYTHON, ATTACK, "beside", *words, stdin=subprocess.PIPE)

    def __enter__(self):
        wait_until(lambda: "ready" in self.process.out or self.process.poll() is not None)
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        status, out, err = self.process.end(seconds=60)
        if error == (None, None, None):
            assert status == 0, err
            count, median, most, worst = map(float, out.split()[1:])
            print(f"beside: {count:.0f} locks; ms: median {median}, 99 % {most}, worst {worst}")
            assert median < 100 and worst < 5000
            if SOAK:
                assert most < 200 and worst < 1000


def beside(box):
    """Beside, on the box's UNIX socket."""
    return Beside(box, "unix", box.socket, "0")


def status_of(daemon, key):
    with open(f"/proc/{daemon.pid}/status") as file:
        return int(next(line for line in file if line.startswith(key + ":")).split()[1])


def files_of(daemon):
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


def files_at_rest(box, daemon):
    """Those without a connection.  The one that box.daemon() has tried may still be there when the
    first answer comes to another one, but not when the second does."""
    with FlomClient(*endpoint(box.address)) as client:
        for _ in range(2):
            client.socket.sendall(message(PING, 8))
            assert read_message(client.socket)
        return files_of(daemon) - 1


def used(daemon):
    """The s of CPU that a process has used."""
    with open(f"/proc/{daemon.pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def part_of_cpu(daemon, seconds):
    begin, before = time.monotonic(), used(daemon)
    pass_time(seconds)
    return (used(daemon) - before) / (time.monotonic() - begin)


@contextlib.contextmanager
def connections(box, number):
    """A number of connections to the box's daemon."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(FlomClient(*endpoint(box.address))) for _ in range(number)]


def lock8(name, wait=1, more=""):
    return message(LOCK, 8, f'<session peerid="{PEER}"{more}/><resource name="{b64(name)}" '
                            f'mode="5" wait="{wait}" create="1" lifespan="0"/>')


# hostile.json

def send_case(box, case):
    first = case["first_send_then_read_one_answer_hex"]
    with FlomClient(*endpoint(box.address)) as client:
        if first:
            client.socket.sendall(bytes.fromhex(first))
            assert read_message(client.socket)
        with contextlib.suppress(OSError):  # the daemon may close before it has read all
            for text in case["then_send_hex"]:
                client.socket.sendall(b"x" * 100000 if "KB" in text else bytes.fromhex(text))
        client.socket.settimeout(0.02)  # it may answer, or close, or do nothing
        with contextlib.suppress(OSError):
            client.socket.recv(4096)


def test_the_cases_of_hostile_json(box):
    daemon = box.daemon()
    holder, gate = box.hold("a", "-r", "held")
    with beside(box):
        for label in sorted(CASES, key=lambda label: label == NORMAL_END):
            send_case(box, CASES[label])
            assert daemon.poll() is None, label
    gate.open()
    assert holder.end() == (0, "", "")
    assert daemon.wait(timeout=10) == 0 and "Traceback" not in daemon.err  # by NORMAL_END


# Generated messages

def rounds(box, daemon, kind, host, port, *files):
    """Four rounds of generated messages; the memory (kB) after each, and no trace of an error."""
    memory, seed = [], chance(kind).getrandbits(32)
    number = MESSAGES if SOAK or kind != "tls" else MESSAGES // 5  # a handshake takes its time
    print(f"{kind}: {number} messages, seed {seed} and the next three")
    for turn in range(4):
        done = box.start(*PYTHON, ATTACK, kind, host, str(port), str(seed + turn),
                         str(number // 4), *files).end(seconds=900)
        assert done == (0, "", "") and daemon.poll() is None
        memory.append(status_of(daemon, "VmRSS"))
    print("memory, kB:", *memory)
    assert memory[3] - memory[1] < 2048
    assert "Traceback" not in daemon.err
    assert daemon.err.count("\n") < 15 + 3 * (time.monotonic() - box.begin)  # rate-limited


@pytest.mark.parametrize("kind", ["unix", "tcp", "tls"])
def test_generated_messages(box, certificates, kind):
    box.begin, port = time.monotonic(), str(free_port())
    at = {"unix": ("unix", box.socket, "0")}.get(kind, (kind, "127.0.0.1", port))
    files = (certificates.pem("good"), certificates.key("good")) if kind == "tls" else ()
    options = certificates.options() if kind == "tls" else ()
    address = ("-s", box.socket, "-a", "127.0.0.1", "-p", port) + options
    daemon = box.daemon(address=address)
    with Beside(box, "tls" if files else "unix", box.socket, "0", *files):
        rounds(box, daemon, *at, *files)


def test_generated_datagrams(hosts):
    one, = hosts(1)
    daemon = one.flomd("-f", "--no-files", "-a", one.ipv4, "-A", "239.255.0.1", *one.address)
    one.begin = time.monotonic()
    one.foreground.append(daemon)
    wait_until(lambda: "serving" in daemon.err)
    with Beside(one, "tcp", one.ipv4, "28015"):
        rounds(one, daemon, "udp", one.ipv4, 28015)
    assert one.run("-A", "239.255.0.1", "-d", "0", "--", "echo", "x") == (0, "x\n", "")


def test_one_name_cannot_cost_much(box):
    """A tree as deep as a message allows; a set of as many labels."""
    daemon = box.daemon()
    with beside(box):
        for name in ("/a" * 20000, "A" + ".b" * 20000, "/" + "x" * 40000, "a" * 40000):
            begin = used(daemon)
            with FlomClient(*endpoint(box.address)) as client:
                client.socket.sendall(lock8(name, wait=0))
                assert client.answer(16)[1] in (0, -14)
            assert used(daemon) - begin < 1
    assert status_of(daemon, "VmHWM") < 60000


def test_one_byte_at_a_time(box):
    box.daemon()
    with beside(box), FlomClient(*endpoint(box.address)) as client:
        for byte in lock8("R1"):
            client.socket.sendall(bytes([byte]))
        assert client.answer(16) == (16, 0, None)


# Those that are silent, and those that do not read

def test_connections_that_send_one_byte_and_stop(box, certificates):
    """They are closed within 10 s; meanwhile nobody is hindered, and the CPU rests.  With TLS it
    is the handshake that must be over by then.  (Here: within 4 s.)"""
    assert flomd.PATIENCE == 10
    daemon = driven_daemon(box, "flomd.PATIENCE = 4")
    other = dict(address=("-s", box.path("t")) + certificates.options())
    other_daemon = driven_daemon(box, "flomd.PATIENCE = 4", **other)
    with connections(box, MANY) as silent, contextlib.ExitStack() as stack:
        silent += [stack.enter_context(FlomClient(socket.AF_UNIX, box.path("t")))
                   for _ in range(20)]
        begin = time.monotonic()
        for client in silent:
            client.socket.settimeout(15)
            client.socket.sendall(b"\x16" if client in silent[MANY:] else b"<")
        with beside(box):
            assert part_of_cpu(other_daemon, 2) < 0.05
        for client in silent:
            assert client.socket.recv(1) == b""
        assert 3 < time.monotonic() - begin < 8
    assert daemon.err.count("silent") <= 10
    assert box.run("--", "echo", "x") == (0, "x\n", "")
    assert box.run("--", "echo", "x", **other) == (0, "x\n", "")


def fill(client, data, seconds=0.3):
    """Sends until neither side can take more, or the daemon closes; whether it has closed."""
    client.socket.settimeout(seconds)
    try:
        for _ in range(3000):
            client.socket.sendall(data)
    except socket.timeout:
        return False
    except OSError:
        return True
    return False


def test_connections_that_never_read(box):
    """Pings are answered up to 256 KiB that nobody reads; then that connection is closed."""
    daemon = box.daemon()
    idle = files_at_rest(box, daemon)
    with beside(box), connections(box, MANY) as clients:
        assert fill(clients[0], message(PING, 8) * 50, 10)
        for client in clients[1:]:
            client.socket.sendall(message(PING, 8) * 20 + lock8("R1", 0) * 20)
    wait_until(lambda: files_of(daemon) <= idle)
    wait_until(lambda: "does not read" in daemon.err)


def test_a_status_report_that_nobody_reads(box):
    daemon = box.daemon()
    with connections(box, 2 * MANY) as clients:
        for number, client in enumerate(clients[MANY:]):
            assert client.lock(f"R{number}") is True
        with beside(box):
            for client in clients[:MANY]:
                client.socket.sendall(message(
                    LOCK, 8, f'<resource name="{b64("_STATUS")}" wait="0"/>') * 3)
            wait_until(lambda: part_of_cpu(daemon, 0.3) < 0.5, seconds=60)
    assert box.run("--", "echo", "x") == (0, "x\n", "")


def test_a_reader_who_takes_nothing_of_a_report(box):
    """It is closed when it has taken no part of it for 10 s.  (Here: 1 s.)"""
    daemon = driven_daemon(box, "flomd.PATIENCE = 1")
    with contextlib.ExitStack() as stack:
        for number in range(MANY):
            client = stack.enter_context(FlomClient(*endpoint(box.address)))
            assert client.lock(f"R{number}x{'y' * 8000}") is True
        reader = stack.enter_context(FlomClient(*endpoint(box.address)))
        reader.socket.sendall(message(LOCK, 8, f'<resource name="{b64("_STATUS")}" wait="0"/>'))
        wait_until(lambda: "silent" in daemon.err)
        reader.socket.settimeout(5)
        assert b"</msg>" not in b"".join(iter(lambda: reader.socket.recv(65536), b""))
    assert box.run("--", "echo", "x") == (0, "x\n", "")


# Limits

def test_at_the_limit_of_open_files(box):
    """64 files and 200 clients: holders are served, the CPU rests, it recovers by itself."""
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    assert flomd.PAUSE == 1
    daemon = driven_daemon(box, "flomd.PAUSE = 0.3", preexec_fn=limit)
    holder, gate = box.hold("a", "-r", "R1")
    waiting = FlomClient(*endpoint(box.address))
    assert waiting.ask("R1") == (16, 1, None)
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(FlomClient(*endpoint(box.address)))
        wait_until(lambda: "trying again" in daemon.err)
        assert part_of_cpu(daemon, 1) < 0.05
        gate.open()
        assert holder.end() == (0, "", "") and waiting.wait() == (0, None)
    waiting.socket.close()
    assert box.run("-r", "R1", "-o", "8000", "--", "echo", "x") == (0, "x\n", "")
    assert "Traceback" not in daemon.err


FAILING = """
import errno, os, select, selectors
real = select.epoll
class Failing:
    def __init__(self):
        self.inner = real()
    def call(self, name, *arguments):
        if name == CALL and os.path.exists(FLAG):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return getattr(self.inner, name)(*arguments)
    def __getattr__(self, name):
        return lambda *arguments: self.call(name, *arguments)
select.epoll = selectors.EpollSelector._selector_cls = Failing
flomd.LEAST_LIFESPAN = 200
"""


@pytest.mark.parametrize("call", ["register", "modify", "unregister"])
def test_a_connection_that_cannot_be_watched(box, call):
    """It is closed; holders, dates and everybody after it are served as ever."""
    flag = box.path("flag")
    daemon = driven_daemon(box, f"FLAG, CALL = {flag!r}, {call!r}" + FAILING)
    holder, gate = box.hold("a", "-r", "R1")
    with connections(box, 2) as (early, reader):
        assert early.lock("R2") is True and reader.lock("R3") is True
        box.write("flag", "")
        if call == "register":
            with FlomClient(*endpoint(box.address)) as late:
                assert late.socket.recv(1) == b""
        if call == "modify":
            fill(reader, message(PING, 8) * 50)
            with contextlib.suppress(ConnectionError):
                while reader.socket.recv(65536):
                    pass
    assert part_of_cpu(daemon, 0.5) < 0.3
    os.unlink(flag)
    report = box.run("--status", "--json")  # R2 and R3 have ended, and with them their idle life
    assert [one["name"] for one in json.loads(report.out)["resources"]] == ["R1"]
    gate.open()
    assert holder.end() == (0, "", "")
    assert box.run("-r", "R1", "--", "echo", "x") == (0, "x\n", "")
    assert "Traceback" not in daemon.err


BROKEN = """
def fail(*arguments):
    if os.path.exists(FLAG):
        raise RuntimeError("a bug")
    return real(*arguments)
import os
real, OWNER.NAME = OWNER.NAME, fail
"""


@pytest.mark.parametrize("place", [
    "Listener.handle", "Session.calls", "Session.answer", "Connection.handle", "Daemon.listening",
    "LockTable.expire", "Connection.close"])
def test_a_bug_costs_one_connection(box, place):
    """Whatever fails, the loop does not spin, and goes on when the reason is gone."""
    owner, name = place.split(".")
    flag = box.path("flag")
    code = f"FLAG = {flag!r}" + BROKEN.replace("OWNER", f"flomd.{owner}").replace("NAME", name)
    daemon = driven_daemon(box, code + "flomd.PAUSE = 0.2\n")
    holder, gate = box.hold("a", "-r", "R1", "--on-lock-loss", "term")
    box.write("flag", "")
    with connections(box, 3) as clients:
        for client, name in zip(clients, ("R1", "_STATUS", "R1")):
            client.socket.settimeout(1)
            with contextlib.suppress(OSError):
                client.socket.sendall(lock8(name, wait=0))
                client.socket.recv(99)
        assert part_of_cpu(daemon, 0.5) < 0.3
    wait_until(lambda: "a bug" in daemon.err or place == "LockTable.expire")
    os.unlink(flag)
    assert box.run("-r", "R1", "-o", "0", "--", "true", seconds=30).status == 98
    assert box.run("-r", "R2", "--", "echo", "x") == (0, "x\n", "")
    gate.open()
    assert holder.end() == (0, "", "")


def test_one_client_is_served_however_few_files_there_may_be(box):
    box.daemon(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24)))
    assert box.run("-d", "0", "--", "echo", "x") == (0, "x\n", "")


def test_max_clients(box):
    """One more is refused with the reason; FLoM's client is closed."""
    box.daemon("--max-clients", "3")
    holder, gate = box.hold("a")
    with connections(box, 2) as clients, FlomClient(*endpoint(box.address)) as flom:
        clients[0].ask("R2")
        assert flom.ask("R2") is None
        status, out, err = box.run("-r", "R3", "-d", "0", "--", "echo", "x")
        assert (status, out) == (99, "")
        assert "too many clients" in err
        assert err.count("\n") == 1
    gate.open()
    assert holder.end().status == 0
    assert box.run("-r", "R3", "--", "echo", "x") == (0, "x\n", "")


@pytest.mark.parametrize("form", ["n{}" + "a" * 45000, "n{}" + ".b" * 22000,
                                  "/{}" + "a" * 45000, "/{}/" + "a" * 45000],
                         ids=["simple", "set", "tree", "node"])
def test_what_one_connection_leaves_behind(box, form):
    """Many resources with long names, which outlive it: refused at a limit, here of 4 MB."""
    daemon = driven_daemon(box, "flomd.MOST_NAMES = 4 << 20")
    before, refused = status_of(daemon, "VmRSS"), 0
    with FlomClient(*endpoint(box.address)) as client:
        for number in range(300):
            name = form.format(number)
            with contextlib.suppress(ConnectionError):
                client.socket.sendall(lock8(name, wait=0).replace(b'span="0"', b'span="99999999"'))
                if client.socket.recv(999):
                    client.socket.sendall(message(
                        UNLOCK, 8, f'<resource name="{b64(name)}" rollback="0" />'))
                    continue
            refused += 1
            client.socket.close()
            client.socket = FlomClient(*endpoint(box.address)).socket
    assert refused > 100
    assert status_of(daemon, "VmRSS") - before < 24000
    status, out, err = box.run("-r", form.format("one"), "-d", "0", "--", "true")
    assert status == 99 and "too many resources" in err
    assert "Traceback" not in daemon.err


def test_max_resources(box):
    box.daemon("--max-resources", "2")
    holders = [box.hold(name, "-r", name) for name in ("a", "b")]
    status, out, err = box.run("-r", "c", "-d", "0", "--", "echo", "x")
    assert (status, out) == (99, "")
    assert "too many resources" in err
    assert err.count("\n") == 1
    with FlomClient(*endpoint(box.address)) as flom:
        assert flom.ask("c") is None
    for holder, gate in holders:
        gate.open()
        assert holder.end().status == 0


def test_max_waiters(box):
    box.daemon("--max-waiters", "1")
    holder, gate = box.hold("a")
    waiter = box.waiter("--", *box.note("b"))
    with FlomClient(*endpoint(box.address)) as flom:
        assert flom.ask("_RESOURCE") is None
    refused = "flom: the daemon refuses: too many requests wait already\n"
    assert box.run("-d", "0", "--", "echo", "x") == (99, "", refused)
    assert box.run("-r", "R2", "-o", "0", "--", "echo", "x") == (0, "x\n", "")
    gate.open()
    assert holder.end().status == 0 and waiter.end().status == 0


# Back to where it was

def test_idle_holders_cost_nothing(box):
    """While they hold the CPU rests; afterwards descriptors and memory are back."""
    daemon = box.daemon()
    before, at_rest = [], files_at_rest(box, daemon)
    for turn in range(3):
        with connections(box, HOLDERS) as clients:
            for number, client in enumerate(clients):
                assert client.lock(f"R{number}") is True
            assert part_of_cpu(daemon, 60 if SOAK and turn == 2 else 0.5) < 0.05
        wait_until(lambda: files_of(daemon) <= at_rest)
        before.append(status_of(daemon, "VmRSS"))
    print("memory:", *before)
    assert before[2] - before[1] < 2048


def test_connections_in_a_row(box):
    daemon = box.daemon()
    figures = []
    for _ in range(4):
        for _ in range(MANY * 10 // 4):
            with FlomClient(*endpoint(box.address)) as client:
                assert client.lock("R1") is True
        with FlomClient(*endpoint(box.address)) as client:
            client.ask("R1")
        figures.append((files_of(daemon), status_of(daemon, "VmRSS")))
    print("descriptors and memory:", *figures)
    assert figures[3][0] <= figures[1][0] + 1 and figures[3][1] - figures[1][1] < 2048


def test_a_daemon_with_nothing_to_do_rests(box):
    daemon = box.daemon("-d", "60000")
    holder, gate = box.hold("a")
    waiter = box.waiter("--", "true")
    assert part_of_cpu(daemon, 1) < 0.05
    gate.open()
    assert holder.end().status == 0 and waiter.end().status == 0


def test_signals_in_masses(box):
    """HUP opens the log again; a thousand of them do no harm."""
    daemon = box.daemon()
    with beside(box):
        for _ in range(1000):
            os.kill(daemon.pid, signal.SIGHUP)
    assert daemon.poll() is None and "Traceback" not in daemon.err


def test_a_log_that_cannot_be_opened_loses_no_signal(box):
    """HUP and TERM together: the log that was goes on and says so, and the daemon ends."""
    folder = box.path("logs")
    os.mkdir(folder)
    daemon = box.flomd("-f", "--no-files", *box.address, "--log", os.path.join(folder, "log"))
    box.foreground.append(daemon)
    log = os.path.join(box.path("moved"), "log")
    wait_until(lambda: os.path.exists(box.socket))
    assert box.run("--", "echo", "x") == (0, "x\n", "")
    os.rename(folder, box.path("moved"))
    daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: "not opened again" in read(log))
    daemon.send_signal(signal.SIGSTOP)
    wait_until(lambda: state(daemon.pid) == "T")
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGCONT):
        daemon.send_signal(number)
    assert daemon.end() == (0, "", "") and not os.path.exists(box.socket)
    assert "Traceback" not in read(log) and read(log).endswith(" ended\n")


def test_the_generator_repeats_itself():
    first, second = ([generated(chance) for _ in range(50)]
                     for chance in (random.Random(7), random.Random(7)))
    assert first == second and len(set(first)) > 30
