"""What makes flom fast is counted, not timed: imports, system calls, objects left, wake-ups."""
import binascii
import collections
import hashlib
import os
import re
import shutil
import signal
import socket
import sys
import types

import flomd
import pytest
from flom import machine_id

from world import ROOT, can_connect, pass_time, read, wait_until

# What flom imports on its common path, and a daemon at its start, no more and no less.  All else
# that an interpreter loads must come with these by itself.
OF_FLOM = set("argparse binascii collections contextlib errno fcntl functools gc os pwd re "
              "select signal socket sys time".split())
OF_FLOMD = OF_FLOM | set("bisect heapq itertools operator resource selectors stat struct".split())
DEAR = {"asyncio", "base64", "configparser", "ctypes", "datetime", "getpass", "gettext", "hashlib",
        "http", "inspect", "ipaddress", "json", "logging", "pathlib", "platform", "queue", "shlex",
        "shutil", "ssl", "subprocess", "syslog", "tempfile", "typing", "urllib", "uuid", "xml",
        "zlib"}
PYTHON = [sys.executable, "-I", "-S"]  # no site: nobody's .pth files
BARE = [*PYTHON, "-B"]
RUN = """
import os
import sys

def end(status):
    print(status, *sys.modules, flush=True)
    leave(status)

leave, os._exit = os._exit, end
sys.path.insert(0, sys.argv[1])
sys.argv = sys.argv[2:]
module = __import__(sys.argv[0])
module.main()
"""

# One cycle is connect, lock, unlock, close.  At worst the daemon sleeps before each of these, and
# stores the grant and the end one by one.
PER_CYCLE = {"accept4": 2, "getsockname": 1, "getsockopt": 1, "ioctl": 1, "epoll_ctl": 2,
             "epoll_wait": 4, "recvfrom": 4, "pwrite64": 2, "sendto": 1, "close": 1}
ALIASES = {"accept": "accept4", "epoll_pwait": "epoll_wait", "recv": "recvfrom", "send": "sendto"}
OTHERS = 40  # in all: timers, memory, the mark on disk

# A daemon that tells on USR2 what it has in memory; its resources do not live on.
COUNTING = """
import gc, os, signal, sys
sys.path.insert(0, sys.argv[1])
import flomd

def count(number, frame):
    gc.collect()
    with open(COUNTS + ".new", "w") as file:
        file.write("%d %d" % (len(gc.get_objects()), sys.getallocatedblocks()))
    os.rename(COUNTS + ".new", COUNTS)

COUNTS, sys.argv = sys.argv[2], sys.argv[2:]
signal.signal(signal.SIGUSR2, count)
flomd.LEAST_LIFESPAN = flomd.QUIET = 0.02
sys.exit(flomd.main())
"""
CYCLES = 10000
OBJECTS, BLOCKS = 100, 1000  # caches still filling: 1 in 100 cycles, 1 in 10

HEAD = b'<?xml version="1.0" encoding="UTF-8" ?>'
LOCK = HEAD + (b'<msg level="3" verb="1" step="8"><session peerid="0"/><resource name="%s" '
               b'mode="5" wait="1" quantity="1" create="1" lifespan="0"/></msg>')
UNLOCK = HEAD + b'<msg level="3" verb="2" step="8"><resource name="%s" rollback="0" /></msg>'
IDLE = 3  # s


def name_of(number):
    """The base64 of a resource name of six letters for each number below 10 ** 6."""
    word = "".join(chr(ord("a") + int(digit)) for digit in f"{number:06d}")
    return binascii.b2a_base64(word.encode()).strip()


class Client:
    """As small a client as there can be."""

    def __init__(self, path, name):
        self.name, self.socket = name, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(10)
        self.socket.connect(path)
        self.socket.sendall(LOCK % name)

    def expect(self, rc):
        answer = self.socket.recv(4096)
        assert b'rc="%d"' % rc in answer and answer.count(b"</msg>") == 1, answer

    def unlock(self):
        self.socket.sendall(UNLOCK % self.name)
        self.socket.close()


def cycle(path, name):
    client = Client(path, name)
    client.expect(0)
    client.unlock()


def modules(box, code, *arguments):
    """The modules that a process has loaded after this code, without our own."""
    status, out, err = box.start(*BARE, "-c", code, *arguments).end()
    words = out.split()
    assert (status, words[:1]) == (0, ["0"]), err
    return set(words[1:]) - {"flom", "flomd"}


def of_machine_id():
    """What the id of this host takes: where it has none, one is made of its name."""
    made = hashlib.sha256(os.fsencode(os.uname().nodename)).hexdigest()[:32]
    return {"hashlib"} if machine_id() == made else set()


def baseline(box, names, more=""):
    """What the interpreter loads by itself for these modules, and to open a text file; argparse is
    kept from loading gettext."""
    names = names | of_machine_id()
    return modules(box, f"""
import sys
import types
sys.modules["gettext"] = types.SimpleNamespace(gettext=str, ngettext=None)
import argparse
del sys.modules["gettext"]
for name in {sorted(names)}:
    try:
        __import__(name)
    except ImportError:  # a small Python
        pass
open("/dev/null").close()
{more}
print(0, *sys.modules)
""")


def switches(pid):
    """How often the process has gone to sleep, or was put aside."""
    return [int(line.split()[1]) for line in read(f"/proc/{pid}/status").splitlines()
            if "ctxt_switches" in line]


def settle(pid):
    """Waits until the process has nothing more to do."""
    def quiet():
        before = switches(pid)
        pass_time(0.2)
        return switches(pid) == before
    wait_until(quiet)


# Imports

def test_modules_of_the_client(box):
    box.daemon()
    used = modules(box, RUN, ROOT, "flom", "-s", box.socket, "--", "true")
    allowed = baseline(box, OF_FLOM, "argparse.ArgumentParser(formatter_class="
                       "lambda prog: argparse.HelpFormatter(prog, 2, 32, 99)).add_argument('-x')")
    assert used - allowed == set()
    assert OF_FLOM & allowed - used == set()
    assert used & DEAR - allowed == set()


def test_modules_of_the_daemon(box):
    used = modules(box, RUN, ROOT, "flomd", "-f", "--no-files", "-s", box.socket, "-d", "1")
    parser = "argparse.ArgumentParser().add_argument('-x')"
    allowed = baseline(box, OF_FLOMD, parser)
    assert used - allowed == set()
    assert OF_FLOMD & allowed - used == set()
    assert used & DEAR - allowed == set()


@pytest.mark.parametrize("name", ["flom", "flomd"])
def test_who_imports_gettext_later_gets_that_of_the_library(box, name):
    code = f"import sys; sys.path.append(sys.argv[1]); import {name}, gettext; print(gettext.find)"
    status, out, err = box.start(*BARE, "-c", code, ROOT).end()
    assert (status, out.split()[:2]) == (0, ["<function", "find"]), err


def test_argparse_gets_the_options_that_may_be_there():
    options = types.SimpleNamespace(given={})
    parser = flomd.make_parser(options)
    parser.parse(["-Vd5", "--unicast-port=7", "--", "-f", "--policy"])
    assert sorted(parser._option_string_actions) == [
        "--daemon-lifespan", "--unicast-port", "--verbose", "-V", "-d", "-p"]
    assert options.given == {"Verbose": [("-V", "yes")], "Lifespan": [("-d", "5")],
                             "UnicastPort": [("--unicast-port", "7")]}


# System calls

@pytest.fixture
def traced(box):
    """(daemon, its socket, a function that ends its trace and returns its calls by name)."""
    if not shutil.which("strace"):
        pytest.skip("no strace in PATH")
    daemon, counts = box.daemon(), box.path("counts")
    strace = box.start("strace", "-c", "-f", "-o", counts, "-p", str(daemon.pid))
    wait_until(lambda: "attached" in strace.err or strace.poll() is not None)
    if strace.poll() is not None:
        pytest.skip(f"strace may not look at a process: {strace.err.strip()}")

    def calls():
        strace.send_signal(signal.SIGINT)
        strace.end()
        rows = [line.split() for line in read(counts).splitlines()]
        return {row[-1]: int(row[3]) for row in rows if row[3:4] and row[3].isdigit()
                and row[-1] != "total"}
    yield daemon, box.socket, calls
    strace.kill()
    strace.wait()


def test_system_calls_of_a_cycle(traced):
    daemon, path, end = traced
    for number in range(200):
        cycle(path, name_of(number % 20))
    settle(daemon.pid)
    found = collections.Counter()
    for name, calls in end().items():
        found[ALIASES.get(name, name)] += calls
    assert found["close"] >= 200
    for name, most in PER_CYCLE.items():
        assert found.pop(name, 0) <= 200 * most + 100, name  # one more a cycle were 200
    assert sum(found.values()) <= OTHERS, found


# Memory

class Counted:
    """A daemon whose objects are counted."""

    def __init__(self, box):
        self.box, self.counts = box, box.path("counts")
        options = ["-f", "--no-files", "-s", box.socket]
        self.daemon = box.start(*BARE, "-c", COUNTING, ROOT, self.counts, *options)
        box.foreground.append(self.daemon)
        wait_until(lambda: can_connect(("-s", box.socket)) or self.daemon.poll() is not None)
        assert self.daemon.poll() is None, self.daemon.err

    def count(self):
        """(objects, blocks of memory)"""
        self.daemon.send_signal(signal.SIGUSR2)
        wait_until(lambda: os.path.exists(self.counts))
        found = tuple(map(int, read(self.counts).split()))
        os.unlink(self.counts)
        return found

    def work(self, first, last):
        """Cycles on a resource each; in every 50th two more clients wait: one leaves, one gets."""
        path = self.box.socket
        for number in range(first, last):
            if number % 50:
                cycle(path, name_of(number))
                continue
            holder, leaver, heir = [Client(path, name_of(number)) for _ in range(3)]
            holder.expect(0)
            leaver.expect(1)
            leaver.socket.close()
            heir.expect(1)
            holder.unlock()
            heir.expect(0)
            heir.unlock()


def test_objects_left_after_cycles(box):
    counted = Counted(box)
    counted.work(0, 600)
    settle(counted.daemon.pid)
    before = counted.count()
    counted.work(600, 600 + CYCLES)

    def left():
        after = counted.count()
        more = [now - then for now, then in zip(after, before)]
        return more[0] <= OBJECTS and more[1] <= BLOCKS
    wait_until(left)


# Instructions

# A start whose code is compiled, against the imports alone, which are most of it: a run with a
# daemon, and flomd as far as its settings.
STARTS = [("flom", OF_FLOM, 1.3, ["-s", "{socket}", "--", "true"]),
          ("flomd", OF_FLOMD, 1.7, ["--check-config"])]


@pytest.mark.parametrize("name, imports, most, arguments", STARTS, ids=["flom", "flomd"])
def test_instructions_of_a_start(box, name, imports, most, arguments):
    """Under cachegrind, to which no other process matters."""
    if not shutil.which("valgrind"):
        pytest.skip("no valgrind in PATH")
    box.daemon()
    box.write(f"{name}.py", read(os.path.join(ROOT, f"{name}.py")))
    code = f"import sys; sys.path.append({box.folder!r}); import {name}; {name}.main()"
    words = [word.format(socket=box.socket) for word in arguments]
    assert box.start(*PYTHON, "-c", code, *words).end().status == 0  # compiles it
    assert os.path.exists(box.path("__pycache__"))
    alone = instructions(box, f"import {', '.join(imports)}")
    assert instructions(box, code, *words) / alone <= most


def instructions(box, *arguments):
    """How many Python executes for this code."""
    count = box.start("valgrind", "--tool=cachegrind", "--cache-sim=no",
                      "--cachegrind-out-file=/dev/null", *PYTHON, "-c", *arguments).end(60)
    assert count.status == 0, count
    return int(re.search("I +refs: +([0-9,]+)", count.err).group(1).replace(",", ""))


# Wake-ups

@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
def test_an_idle_daemon_sleeps(boxes):
    """Of two daemons one has no clients, one has 200 that hold what they hold.  Both look every
    LOOK s whether their sockets are still where they were."""
    alone, used = boxes.make(), boxes.make()
    pids = [box.daemon().pid for box in (alone, used)]
    clients = [Client(used.socket, name_of(number)) for number in range(200)]
    for client in clients:
        client.expect(0)
    for pid in pids:
        settle(pid)
    before = [switches(pid) for pid in pids]
    pass_time(IDLE)
    awoken = [sum(switches(pid)) - sum(then) for pid, then in zip(pids, before)]
    assert max(awoken) <= IDLE // flomd.LOOK + 1
    for client in clients:
        client.unlock()
