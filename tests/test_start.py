"""Starting the daemon: by whom, with what, and exactly once however many clients want one."""
import os
import signal
import sys
import time

import flom
import pytest
from commands import driven
from world import (COUNT, FLOM, FLOM_PY, FLOMD_PY, PYTHON, ROOT, SOAK, comm, free_port, read,
                   wait_until)

# Fifty clients at the same moment and no daemon: how many clients in each round.
LOCAL = [50] * COUNT.rounds if SOAK else [50, 8, 8]
REMOTE = [50] * COUNT.rounds if SOAK else [20, 8]
LOG = 'echo start "$0" >>"$1"; echo end "$0" >>"$1"'
WAIT = 'exec 3<"$0"; read _ <&3; exec 3<&-; exec "$@"'  # becomes the client when the fifo closes


def start_together(boxes, count, options):
    """Starts clients, round robin in these boxes, that are let go at one moment."""
    first = boxes[0]
    fifo, script = first.path("go"), FLOM if count > 8 else FLOM_PY  # as it is, and compiled
    os.mkfifo(fifo)
    clients = []
    for number in range(count):
        box = boxes[number % len(boxes)]
        client = [*PYTHON, script, *box.address, *options, "--",
                  "/bin/sh", "-c", LOG, str(number), first.log]
        clients.append(box.start("/bin/sh", "-c", WAIT, fifo, *client))
    with open(fifo, "w"):  # opens when the first of them reads, and lets none go
        wait_until(lambda: all(reads(client.pid, fifo) for client in clients), seconds=30)
    return clients


def reads(pid, fifo):
    return any(os.readlink(f"/proc/{pid}/fd/{name}") == fifo
               for name in os.listdir(f"/proc/{pid}/fd"))


def check(boxes, clients):
    """One daemon, all served, one at a time, and nobody has complained."""
    for client in clients:
        assert client.end(seconds=60) == (0, "", ""), client.args
    events = [line.split() for line in boxes[0].events()]
    assert [word for word, _ in events] == ["start", "end"] * len(clients)
    assert [one for _, one in events[::2]] == [one for _, one in events[1::2]]
    assert {one for _, one in events} == {str(number) for number in range(len(clients))}
    # one that came second may still be on its way out; an idle one would stay for 7 s
    wait_until(lambda: sum(len(box.daemons()) for box in boxes) == 1, seconds=6)


def test_a_start_is_not_cut_short_by_the_time_to_wait(box):
    """-o limits the wait for the lock; once it is over the lock is asked for without waiting."""
    assert box.run("-o", "1", "--", "echo", "x") == (0, "x\n", "")
    holder, gate = box.hold("a")
    assert box.run("-o", "1", "--", "true").status == 98
    gate.open()
    assert holder.end().status == 0


@pytest.mark.parametrize("count", LOCAL)
def test_at_one_socket(box, count):
    check([box], start_together([box], count, []))


@pytest.mark.parametrize("count", REMOTE)
def test_at_one_address(box, count):
    box.address = ("-a", "127.0.0.1", "-p", str(free_port()), "--state-dir", box.folder)
    check([box], start_together([box], count, []))


@pytest.mark.parametrize("count", REMOTE)
def test_in_a_group(hosts, count):
    pair = hosts(2)
    check(pair, start_together(pair, count, ["-A", "239.255.0.1"]))


# What runs it, and where its modules come from

PROGRAM = """
import sys
import time
sys.path.insert(0, {root!r})
{before}
import flom
with flom.Lock("R1", config=False, start_daemon=True, socket_name={socket!r}, timeout=20) as lock:
    print(lock.token > 0)
"""


def program(box, before=""):
    """A program that takes a lock by the Python API, and starts a daemon for it."""
    return box.write("program.py", PROGRAM.format(root=ROOT, before=before, socket=box.socket))


@pytest.mark.parametrize("value", ["''", "None", "'/usr/sbin/uwsgi'"])
def test_a_program_that_is_no_python_finds_one(box, value):
    """As in uWSGI and other servers with a Python inside."""
    os.symlink(sys.executable, box.path("python3"))
    script = program(box, f"sys.executable = {value}")
    done = box.start(*PYTHON, script, env={"PATH": box.folder}).end()
    assert done == (0, "True\n", "")
    assert read(f"/proc/{box.the_daemon()}/cmdline").startswith(box.path("python3") + "\0")


def test_without_any_python_the_reason_is_told(box):
    done = box.start(*PYTHON, program(box, "sys.executable = ''"), env={"PATH": "/none"}).end()
    assert done.status == 1 and "no python3 in PATH to run flomd.py" in done.err
    assert box.daemons() == []


def test_without_poll_there_is_select(box):
    """eventlet takes poll away, before flom is imported or after it."""
    holder, gate = box.hold("a", "-r", "R1")
    waiters = [box.start(*PYTHON, program(box, f"import select\n{code}"))
               for code in ("del select.poll, select.POLLIN, select.POLLOUT",
                            "import flom\ndel select.poll")]
    wait_until(lambda: box.run("--status").out.count("waits") == 2)
    gate.open()
    assert [waiter.end() for waiter in waiters] == [(0, "True\n", "")] * 2
    assert holder.end().status == 0


ONE_WAITS = """\
import select
import sys
import threading
import time

real, waiting = select.select, set()

def one_waits(readers, writers, others, seconds):
    if waiting.intersection(readers):
        raise RuntimeError("Second simultaneous read")
    waiting.update(readers)
    try:
        return real(readers, writers, others, seconds)
    finally:
        waiting.difference_update(readers)

del select.poll
select.select = one_waits
sys.path.insert(0, {root!r})
import flom
for _ in range(3):
    with flom.Lock("R1", socket_name={socket!r}, config=False, on_lost=print):
        while not waiting:
            time.sleep(0.01)
for thread in threading.enumerate()[1:]:
    thread.join(10)
print(threading.active_count())
"""


def test_only_one_thread_can_wait_for_a_descriptor(box):
    """As with eventlet: that which watches a lock does so while another one releases it."""
    box.daemon()
    script = ONE_WAITS.format(root=ROOT, socket=box.socket)
    assert box.start(*PYTHON, box.write("program.py", script)).end() == (0, "1\n", "")


EMBEDDED = """\
import sys

class Plain:
    def __init__(self, stream):
        self.write, self.flush = stream.write, stream.flush

del sys.argv
sys.stderr = Plain(sys.stderr)
sys.path.insert(0, {root!r})
import flom
about = {{"socket_name": {socket!r}, "config": False}}
with flom.Lock("R1", verbose=True, **about) as lock:
    print(flom.status(**about)["resources"][0]["holders"][0]["cmd"])
    lock.diary.say("told")
"""


def test_a_program_without_arguments_and_with_a_plain_stderr(box):
    """As one that embeds Python, and as Celery, whose stderr has no encoding."""
    box.daemon()
    script = EMBEDDED.format(root=ROOT, socket=box.socket)
    done = box.start(*PYTHON, box.write("program.py", script)).end()
    assert done == (0, "python\n", "told\n")


@pytest.fixture
def trap(box):
    """A folder with the scripts and with modules that nobody wants."""
    os.mkdir(box.path("trap"))
    for script in (FLOM_PY, FLOMD_PY):
        box.write(f"trap/{os.path.basename(script)}", read(script))
    for name in ("signal", "argparse", "pwd", "json", "heapq"):
        box.write(f"trap/{name}.py", "raise SystemExit('the wrong module')\n")
    return box.path("trap")


def test_scripts_import_nothing_from_their_own_folder(box, trap):
    python, script = [sys.executable], os.path.join(trap, "flom.py")
    os.symlink(script, box.path("flom"))
    for path in (script, box.path("flom")):
        assert box.start(*python, path, *box.address, "--", "echo", "x").end() == (0, "x\n", "")
        done = box.start(*python, path, *box.address, "--status", "--json").end()
        assert (done.status, done.err) == (0, "")
    done = box.start(*python, "flom.py", *box.address, "--", "echo", "x", cwd=trap).end()
    assert done == (0, "x\n", "")
    assert box.start(*python, "-I", script, "-v").end().status == 0


def test_a_program_that_imports_flom_keeps_its_own_modules(box):
    box.write("own.py", "print('its own')\n")
    done = box.start(sys.executable, program(box, "import own"), cwd="/").end()
    assert done == (0, "its own\nTrue\n", "")


# The environment of what flom starts

@pytest.mark.parametrize("locale", [[], ["LANG=C"], ["LC_CTYPE=C"], ["LC_CTYPE="],
                                    ["LC_CTYPE=C.UTF-8"], ["LC_ALL=C"], ["=x"]])
def test_the_environment_is_what_flom_has_found(box, locale):
    """In the C locale Python changes its own; an entry without a name is nobody's."""
    begin, show = ["env", "-u", "LC_ALL", "-u", "LANG", *locale], ["env", "-0"]
    found = box.start(*begin, *show).end().out
    done = box.start(*begin, *PYTHON, FLOM, *box.address, "--set-env", "no", "--", *show).end()
    assert (done.status, done.err) == (0, "")
    entries = [set(out.split("\0")) for out in (found, done.out)]
    assert {entry for entry in entries[1] if not entry.startswith("FLOM_")} == entries[0] - {"=x"}
    daemon = set(read(f"/proc/{box.the_daemon()}/environ").split("\0"))
    assert daemon == entries[0] - {"=x"}


WITHOUT_PROC = """
import builtins, sys
sys.path.insert(0, {root!r})
import flom
real = builtins.open
def fail(path, *rest, **more):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(2, "no /proc", path)
    return real(path, *rest, **more)
builtins.open = fail
print(flom.found_environment().get("LC_CTYPE"))
"""


@pytest.mark.parametrize("locale, value", [([], None), (["LC_CTYPE=C.UTF-8"], "C.UTF-8")])
def test_without_proc_the_interpreter_tells_whether_it_has_changed_the_locale(box, locale, value):
    script = box.write("program.py", WITHOUT_PROC.format(root=ROOT))
    done = box.start("env", "-u", "LC_ALL", "-u", "LANG", *locale, *PYTHON, script).end()
    assert done == (0, f"{value}\n", "")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_daemon_that_is_restarted_is_waited_for(box, end):
    """By those, too, that may not start one themselves."""
    daemon = box.daemon()
    long_ago(box)
    box.kill(daemon.pid, end)
    assert flom.has_ended_lately(box.socket)
    late = box.flom("-d", "0", "-r", "a", "--", "echo", "x")
    wait_until(lambda: comm(late.pid) == "flom")
    box.daemon()
    assert late.end() == (0, "x\n", "")


ENDING = """
import signal, time
check = flom.Connection.check_owner

def check_owner(self):
    flom.Connection.check_owner = check
    os.kill(flom.credentials(self.sock)[0], signal.SIGTERM)
    while os.path.exists(self.where):
        time.sleep(0.001)
    check(self)

flom.Connection.check_owner = check_owner
flom.default_socket = lambda: {!r}
"""


def test_a_daemon_that_ends_when_a_client_has_just_connected(box):
    """It has removed its socket before the client could look whose that is."""
    daemon = box.daemon()
    late = driven(box, ENDING.format(box.socket), "-d", "0", "--", "echo", "x", address=())
    assert daemon.wait(10) == 0
    box.daemon()
    assert late.end() == (0, "x\n", "")


@pytest.mark.parametrize("hosts", ["127.0.0.1", "127.0.0.1,127.0.0.2"])
def test_a_daemon_at_an_address_may_just_be_restarted(box, hosts):
    """Nobody can tell it from one that never was."""
    port = str(free_port())
    late = box.flom("-d", "0", "--", "echo", "x", address=("-a", hosts, "-p", port))
    wait_until(lambda: comm(late.pid) == "flom")
    box.daemon(address=("-a", "127.0.0.1", "-p", port, "--state-dir", box.folder))
    assert late.end() == (0, "x\n", "")


@pytest.mark.parametrize("where", ["local", "network"])
def test_a_daemon_that_does_not_come_back_is_not_waited_for_for_long(box, where):
    place = box.socket
    if where == "network":
        port = str(free_port())
        place = f"127.0.0.1, port {port}"
        box.address = ("-a", "127.0.0.1", "-p", port, "--state-dir", box.folder)
    box.kill(box.daemon().pid)
    began = time.monotonic()
    done = driven(box, "flom.RETURN = 0.5", "-d", "0", "--", "echo", "x").end()
    assert done == (99, "", f"flom: no daemon at {place} (and -d 0 forbids starting one)\n")
    assert 0.4 < time.monotonic() - began < 5


@pytest.mark.parametrize("order", ["-X", "-x"])
def test_a_daemon_that_ended_by_order_is_not_waited_for(box, order):
    assert not flom.has_ended_lately(box.socket)
    box.daemon()
    long_ago(box)
    assert box.run(order).status == 0
    wait_until(lambda: not box.daemons())
    assert not flom.has_ended_lately(box.socket)


def long_ago(box):
    """The daemon of the box has begun long ago, as far as its files tell."""
    os.utime(box.socket + ".lock", (0, 0))
