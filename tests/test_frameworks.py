"""The Python API under the frameworks that run Python programs: `tox -e frameworks` installs them.

Each test runs a program as the framework runs it, with real processes, and is skipped where the
framework is not installed.  What flom does for them is tested without them, too, in test_api.py and
test_start.py.
"""
import importlib.util
import os
import shutil
import socket
import sys
import threading

import pytest
from certificates import Certificates
from world import ROOT, free_port, has_ended, wait_until

pytestmark = pytest.mark.skipif(os.environ.get("FLOM_FRAMEWORKS") != "1",
                                reason="`tox -e frameworks` runs it")

# The module `common` of all programs.
COMMON = f"""\
import contextlib, os, sys, time
sys.path.insert(0, {ROOT!r})
import flom
FOLDER = os.environ["HOME"]
SETTINGS = {{"socket_name": FOLDER + "/s", "config": False}}

def lock(name="R1", of=flom.Lock, **options):
    return of(name, **dict(SETTINGS, **options))

def entries(what, name="R1"):
    for resource in flom.status(**SETTINGS)["resources"]:
        if resource["name"] == name:
            return resource[what]
    return []

def waiting():
    return len(entries("waiters"))

def until(predicate):
    end = time.monotonic() + 20
    while not predicate():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)

@contextlib.contextmanager
def alone():
    "Fails when anybody is inside already."
    os.close(os.open(FOLDER + "/inside", os.O_CREAT | os.O_EXCL))
    yield
    os.unlink(FOLDER + "/inside")
"""


def need(module, command=""):
    """Skips a test, so that nobody overlooks it, when what it is for is not installed."""
    if command:
        path = shutil.which(os.path.join(os.path.dirname(sys.executable), command))
        found = path or shutil.which(command)
    else:
        found = importlib.util.find_spec(module)
    if not found:
        pytest.skip(f"!!! NOT TRIED: {module} IS NOT INSTALLED !!!")
    return found


@pytest.fixture
def program(box):
    """program(text, *arguments): starts a Python program that can import `common`."""
    box.write("common.py", COMMON)

    def start(text, *arguments):
        return box.start(sys.executable, box.write("program.py", text), *arguments,
                         env={"PYTHONPATH": box.folder})
    return start


def waiters(box, number):
    """Whether so many wait, and say so."""
    return box.run("--status").out.count(" waits ") == number


# Green threads

GREEN = """\
import faulthandler, os, threading, time
faulthandler.dump_traceback_later(50, exit=True)
from common import *

def together(number, work):
    threads = [threading.Thread(target=work) for _ in range(number)]
    for thread in threads:
        thread.start()
    return threads

def end(threads):
    for thread in threads:
        thread.join(20)

tokens, told = [], []

def wait():
    with lock() as held, alone():
        time.sleep(0.001)
        tokens.append(held.token)

with lock(start_daemon=True, timeout=20):
    threads = together(5, wait)
    until(lambda: waiting() == 5)
end(threads)
assert len(tokens) == 5 and tokens == sorted(tokens)

at_first = threading.active_count()
for _ in range(3):
    with lock(on_lost=told.append) as held:
        time.sleep(0.01)
        assert held.locked() and not held.lost and held.check() is None
until(lambda: threading.active_count() == at_first)

assert told == []

with lock() as holder:
    for options, error in ((dict(timeout=0.05), flom.Timeout), (dict(timeout=0), flom.Busy)):
        try:
            lock(**options).acquire()
        except error:
            told.append(error)
    for _ in range(2):
        waiter = spawn(lock().acquire)
        until(lambda: waiting() == 1)
        waiter.kill()
        until(lambda: waiting() == 0)
    try:
        with Limit(0.1):
            lock().acquire()
    except Limit:
        told.append(Limit)
    until(lambda: waiting() == 0)
assert told == [flom.Timeout, flom.Busy, Limit]

with lock(reentrant=True) as held:
    with held:
        refused = []
        def other():
            try:
                held.acquire()
            except RuntimeError as error:
                refused.append(error)
        end(together(1, other))
        assert refused and held.locked()
print("all is well")
"""
PATCHED = {
    "gevent": """\
from gevent import monkey
monkey.patch_all()
from gevent import Timeout as Limit, spawn
""",
    "eventlet": """\
import warnings
warnings.simplefilter("ignore")  # it wants nobody to begin with it
import eventlet
eventlet.monkey_patch()
from eventlet import Timeout as Limit, spawn
"""}


@pytest.mark.parametrize("framework", sorted(PATCHED))
def test_green_threads(box, program, framework):
    """A lock that waits blocks no other green thread; one that is killed leaves the queue."""
    need(framework)
    done = program(PATCHED[framework] + GREEN).end(60)
    assert done == (0, "all is well\n", "")


LOSS = """\
from common import *
told = []
held = lock(on_lost=told.append).acquire()
print(held._claim.chain[0], flush=True)
until(lambda: told)
assert told == [held] and held.lost and not held.locked()
held.release()
with lock():
    print("held again")
"""


@pytest.mark.parametrize("framework", sorted(PATCHED))
def test_a_loss_among_green_threads(box, program, framework):
    """The green thread of on_lost reclaims the lock, and tells when it was taken away."""
    need(framework)
    first = box.daemon()
    done = program(PATCHED[framework] + LOSS)
    wait_until(lambda: done.out, 20)
    box.kill(first.pid)
    box.daemon("--recovery-window", "5000")
    wait_until(lambda: " holds" in box.run("--status").out, 20)
    (ident,) = done.out.split()
    assert box.run("--evict", ident).status == 0
    assert done.end(60) == (0, f"{ident}\nheld again\n", "")


OVER_TLS = """\
import threading
from common import *
over = dict(zip(("tls_certificate", "tls_private_key", "tls_ca_certificate"), sys.argv[1:]),
            socket_name=None, unicast_address="localhost", unicast_port=int(sys.argv[4]))
with lock(**over):
    waiter = threading.Thread(target=lambda: lock(**over).acquire().release())
    waiter.start()
    while not flom.status(config=False, **over)["resources"][0]["waiters"]:
        time.sleep(0.01)
waiter.join(20)
with lock(**over) as held:
    print(held.locked())
"""


@pytest.mark.parametrize("framework", sorted(PATCHED))
def test_tls_with_green_threads(box, program, framework, tmp_path):
    """And a name that is resolved."""
    need(framework)
    made = Certificates(tmp_path)
    port = str(free_port())
    box.address = ("-a", "127.0.0.1", "-p", port, "--state-dir", box.folder)
    box.daemon(*made.options())
    done = program(PATCHED[framework] + OVER_TLS, made.pem("good"), made.key("good"),
                   made.pem("ca"), port).end(60)
    assert done == (0, "True\n", "")
    box.address += made.options()


# Web servers

APPLICATION = """\
from common import *
ours = lock("ours", start_daemon=True, timeout=20)
if os.environ["LOADED_ONCE"] == "True":
    ours.acquire()  # in a process that forks its workers then

def application(environ, start_response):
    with lock(start_daemon=True, timeout=20, on_lost=print) as held, alone():
        held.check()
        said = f"{os.getpid()} {held.token}"
    if environ["PATH_INFO"] == "/ours":
        said = f"{ours.locked()} {len(entries('holders', 'ours'))}"
        ours.release()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [said.encode()]
"""


class Server:
    """A server of the application that listens on a socket of a box."""

    def __init__(self, box, loaded_once, *argv):
        self.box, self.path = box, box.path("http")
        box.write("common.py", COMMON)
        box.write("application.py", APPLICATION)
        about = {"PYTHONPATH": box.folder, "LOADED_ONCE": str(loaded_once)}
        self.process = box.start(*argv, env=about, cwd=box.folder)

    def get(self, path):
        """The body of what is answered, "" when there is no answer."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(30)
            client.connect(self.path)
            client.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            answer = b"".join(iter(lambda: client.recv(4096), b""))
        head, _, body = answer.decode().partition("\r\n\r\n")
        return body if " 200 OK" in head else ""

    def answers(self):
        try:
            return self.get("/")
        except OSError:
            return ""

    def end(self):
        self.process.terminate()
        self.process.end(30)
        for path in self.box.sockets() - {self.box.socket}:
            os.unlink(path)


SERVERS = {  # name: (module, options, how many requests it works on at the same time)
    "gunicorn-sync": ("gunicorn", ["--workers", "3"], 3),
    "gunicorn-gthread": ("gunicorn", ["--threads", "3"], 3),
    "gunicorn-gevent": ("gunicorn", ["--worker-class", "gevent"], 5),
    "gunicorn-preload": ("gunicorn", ["--workers", "3", "--preload"], 3),
    "gunicorn-preload-gthread": ("gunicorn", ["--threads", "3", "--preload"], 3),
    "uwsgi-workers": ("uwsgi", ["--processes", "3"], 3),
    "uwsgi-lazy": ("uwsgi", ["--processes", "3", "--lazy-apps"], 3),
    "uwsgi-threads": ("uwsgi", ["--processes", "2", "--enable-threads", "--threads", "2"], 4)}
LOADED_ONCE = {"gunicorn-preload", "gunicorn-preload-gthread", "uwsgi-workers", "uwsgi-threads"}


@pytest.fixture
def serve(box):
    servers = []

    def make(name):
        module, options, _ = SERVERS[name]
        if module == "gunicorn":
            need("gunicorn")
            if "gevent" in options:
                need("gevent")
            argv = [sys.executable, "-m", "gunicorn", "--bind", f"unix:{box.path('http')}",
                    "--graceful-timeout", "1", *options, "application:application"]
        else:
            argv = [need("uwsgi", "uwsgi"), "--http-socket", box.path("http"), "--master",
                    "--die-on-term", "--virtualenv", sys.prefix, "--module", "application",
                    *options]
        servers.append(Server(box, name in LOADED_ONCE, *argv))
        wait_until(lambda: servers[0].answers() or servers[0].process.poll() is not None, 40)
        assert servers[0].process.poll() is None, servers[0].process.err
        return servers[0]
    yield make
    for server in servers:
        server.end()


@pytest.mark.parametrize("name", sorted(SERVERS))
def test_web_server(box, serve, name):
    """Each request waits for its own lock, in all processes and threads at the same time."""
    server, at_once = serve(name), SERVERS[name][2]
    assert box.the_daemon()  # that one of the processes has started
    holder, gate = box.hold("holder", "-r", "R1")
    said = []
    clients = [threading.Thread(target=lambda: said.append(server.get("/")))
               for _ in range(5)]
    for client in clients:
        client.start()
    wait_until(lambda: waiters(box, at_once), 20)
    gate.open()
    for client in clients:
        client.join(30)
    assert holder.end().status == 0
    tokens = {answer.split()[1] for answer in said if answer}
    assert len(tokens) == 5, server.process.err
    wait_until(lambda: waiters(box, 0))


@pytest.mark.parametrize("name", sorted(LOADED_ONCE))
def test_a_lock_of_the_process_that_forks(box, serve, name):
    """Its workers neither have nor release it, and it ends with it."""
    server = serve(name)
    for _ in range(3):
        assert server.get("/ours") == "False 1"
    assert "ours" in box.run("--status").out
    workers = set(box.running()) - {server.process.pid} - set(box.daemons())
    box.kill(server.process.pid)
    wait_until(lambda: "ours" not in box.run("--status").out or None, 20)
    for worker in workers:
        wait_until(lambda: has_ended(worker), 20)


# Celery

TASKS = """\
import celery
from celery.exceptions import SoftTimeLimitExceeded
from common import *

app = celery.Celery("tasks", broker="filesystem://", backend="file://" + FOLDER + "/results")
for name in ("queue", "control", "results"):
    os.makedirs(FOLDER + "/" + name, exist_ok=True)
app.conf.update(
    broker_transport_options={"data_folder_in": FOLDER + "/queue",
                              "data_folder_out": FOLDER + "/queue",
                              "control_folder": FOLDER + "/control"},
    task_serializer="pickle", accept_content=["pickle", "json"], worker_prefetch_multiplier=1)

@app.task
def work(given):
    "What it is given is a lock that its sender holds."
    assert not given.locked()
    with given as held, alone():
        return os.getpid(), held.token

@app.task
@lock(start_daemon=True, timeout=20, verbose=True)
def decorated():
    held = entries("holders")
    return len(held), os.getpid() == held[0]["pid"]

@app.task(soft_time_limit=1)
def impatient():
    try:
        lock().acquire()
    except SoftTimeLimitExceeded:
        return waiting()

if __name__ == "__main__":
    assert decorated.delay().get(60) == [1, True]
    with lock(timeout=20) as held:
        assert impatient.delay().get(20) == 0
        results = [work.delay(held) for _ in range(6)]
        until(lambda: waiting() == 3)
    done = [result.get(20) for result in results]
    assert len(set(pid for pid, token in done)) == 3
    assert len(set(token for pid, token in done)) == 6
    assert lock(timeout=0).acquire().release() is None
    print("all is well")
"""


def test_celery(box, program):
    """Prefork workers: a Lock as an argument, a task that is decorated, a time limit."""
    need("celery")
    box.write("common.py", COMMON)
    box.write("tasks.py", TASKS)
    worker = box.start(sys.executable, "-m", "celery", "-A", "tasks", "worker", "--pool", "prefork",
                       "--concurrency", "3", "--without-gossip", "--without-mingle", "-l", "INFO",
                       env={"PYTHONPATH": box.folder, "C_FORCE_ROOT": "1"}, cwd=box.folder)
    done = box.start(sys.executable, box.path("tasks.py"), env={"PYTHONPATH": box.folder},
                     cwd=box.folder).end(120)
    worker.terminate()
    worker.end(30)
    assert (done.status, done.out) == (0, "all is well\n"), done.err + worker.err
    assert "Traceback" not in worker.err


# Jupyter

NOTEBOOK = """\
import queue
from jupyter_client.manager import start_new_kernel
from common import *

manager, client = start_new_kernel(startup_timeout=60)

def answer(asked):
    while True:
        reply = client.get_shell_msg(timeout=30)
        if reply["parent_header"]["msg_id"] == asked:
            return reply["content"]

def run(code):
    content = answer(client.execute(code))
    assert content["status"] == "ok", content

def is_left():
    client.kernel_info()  # ipykernel cancels a task when its next message comes
    return waiting() == 0

def by_signal():
    manager.interrupt_kernel()

def by_message():
    client.control_channel.send(client.session.msg("interrupt_request", {}))

try:
    run("from common import *")
    run("mine, his = lock(start_daemon=True, timeout=20), lock(of=flom.AsyncLock)")
    run("with mine: assert mine.locked()")
    for wait in ("mine.acquire(timeout=-1)", "await his.acquire()"):
        for interrupt in (by_signal, by_message):
            with lock() as held:
                asked = client.execute(wait, stop_on_error=False)
                until(lambda: waiting() == 1)
                interrupt()
                until(is_left)
                content = answer(asked)
                assert content["ename"] in ("KeyboardInterrupt", "CancelledError"), content
                assert waiting() == 0 and held.locked()
            run("assert not mine.locked() and not his.locked()")
            run("with mine: assert mine.locked()")
            run("async with his: assert his.locked()")
    run("async with lock(of=flom.AsyncLock).timeout(5) as held: await held.check()")
    print("all is well")
finally:
    client.stop_channels()
    manager.shutdown_kernel()
"""


def test_jupyter(box, program):
    """^C ends a wait, and the queue is left; the kernel goes on, and so does its daemon."""
    need("ipykernel")
    need("jupyter_client")
    done = program(NOTEBOOK).end(150)
    assert (done.status, done.out) == (0, "all is well\n"), done.err
