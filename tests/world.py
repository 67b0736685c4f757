"""The world of the tests: boxes in which real processes run, hosts, counts, waiting.

A Box is a short folder under /tmp, the HOME of all that runs in it; by that variable its processes
are found again.  What a test has started must have ended when it ends, idle daemons aside, which
end with the box; a process or a socket left behind fails the test.
"""
import collections
import contextlib
import glob
import importlib.util
import marshal
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
import warnings

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
AS_IS = os.environ.get("FLOM_AS_IS") == "1"
PYTHON = [sys.executable] if AS_IS else [sys.executable, "-S", "-W", "error"]
DATA = os.path.join(ROOT, "tests", "data")


def compiled(*scripts):
    """Puts the scripts into a folder of their own, under their names but compiled, which is half
    the work of their start, and returns their paths (conftest.py removes it).

    Python tells a compiled file by its first bytes, so `flom.py` is run as ever, and finds
    `flomd.py` beside it.  With FLOM_AS_IS=1 the scripts are run as they are.
    """
    if AS_IS:
        return list(scripts)
    folder = tempfile.mkdtemp(prefix="f", dir="/tmp")
    os.chmod(folder, 0o755)  # for the other users of test_safety.py
    header = importlib.util.MAGIC_NUMBER.ljust(12 if sys.version_info < (3, 7) else 16, b"\0")
    for script in scripts:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            code = compile(read(script), script, "exec", dont_inherit=True)
        with open(os.path.join(folder, os.path.basename(script)), "wb") as file:
            file.write(header + marshal.dumps(code))
    return [os.path.join(folder, os.path.basename(script)) for script in scripts]

# How often the tests do what they repeat.
Count = collections.namedtuple(
    "Count", "rounds kills heals messages candidates connections holders siege hostile taken_over")
SOAK = os.environ.get("FLOM_SOAK") == "1"
COUNT = Count(rounds=3, kills=8, heals=2, messages=5000, candidates=4, connections=100,
              holders=100, siege=10, hostile=2000, taken_over=10000)  # siege: s
if SOAK:
    COUNT = Count(rounds=20, kills=200, heals=20, messages=500000, candidates=20, connections=500,
                  holders=1000, siege=60, hostile=100000, taken_over=100000)

# What tests do by chance they do by chance(), drawn anew in each run.
SEED = os.environ["FLOM_SEED"]

CLAIMS = os.environ.get("FLOM_CLAIMS", "").split(":")[0]  # the folder of together.py, "" for none
PORTS = set()  # those that this process has used

Result = collections.namedtuple("Result", "status out err")


def is_busy(result, status=98):
    """Whether a flom with -o 0 has said, on one line, that the lock is busy and who holds it."""
    text = (r"Resource already locked, the lock cannot be obtained "
            r"\(held by \S+:[0-9]+ '[^']+' for [0-9]{2,}:[0-9]{2}:[0-9]{2}( and [0-9]+ more)?\)\n")
    return result[:2] == (status, "") and bool(re.fullmatch(text, result.err))


def wait_until(predicate, seconds=30):
    """The first true value of predicate(), asked until then; AssertionError after the deadline.
    The file, socket or process that it looks at may come and go meanwhile: OSError is a no."""
    begun = time.monotonic()
    deadline, pause = begun + seconds, 0.001
    while True:
        value = trouble = None
        try:
            value = predicate()
        except OSError as error:
            trouble = error
        asked = time.monotonic()
        if value:
            return value
        assert asked < deadline, f"not within {seconds} s: {predicate}: {trouble}"
        select.select([], [], [], pause)
        # what is asked within no time is asked often
        pause, begun = min(2 * pause, max(0.005, 10 * (asked - begun)), 0.05), time.monotonic()


def run_until(loop, is_done, seconds=30):
    """Runs a loop of flomd in this process until is_done()."""
    def look():
        if is_done():
            loop.stop()
        else:
            loop.after(0.01, look)
    loop.after(0, look)
    loop.after(seconds, loop.stop)
    loop.run()
    loop._stopped = False
    loop.cancel(look)
    loop.cancel(loop.stop)
    assert is_done()


def patched(change):
    """For `program` of Box.flomd(): flomd.py after statements that change the module."""
    return ("-c", f"import sys\nsys.path.insert(0, {ROOT!r})\nimport flomd\n{change}\n"
            "sys.exit(flomd.main())")


def pass_time(seconds):
    """Lets a lifespan pass; not for the order of processes."""
    end = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= end, seconds + 10)


def limit_files(size):
    """For preexec_fn: no file of the process grows beyond this."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def chance(name):
    """A random.Random that FLOM_SEED, which the head of a run tells, and the name determine."""
    return random.Random(f"{SEED} {name}")


class Process(subprocess.Popen):
    """A process in a box.  Its output goes to files, `out` and `err`, unless a test pipes it."""

    def __init__(self, box, argv, **options):
        self.paths = [box.path(f"{len(box.processes)}.{name}") for name in ("out", "err")]
        options.setdefault("stdin", subprocess.DEVNULL)
        options["env"] = box.environment(options.pop("env", {}))
        files = [open(path, "wb") for path in self.paths]
        options.setdefault("stdout", files[0])
        options.setdefault("stderr", files[1])
        try:
            super().__init__(box.prefix + argv, **options)
        finally:
            for file in files:
                file.close()
        box.processes.append(self)

    @property
    def out(self):
        return read(self.paths[0])

    @property
    def err(self):
        return read(self.paths[1])

    def wait(self, timeout=None):
        """Until the very moment of its end; Popen looks every 50 ms, which is a client's life."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        try:
            deadline = time.monotonic() + (3600 if timeout is None else timeout)
            while self.poll() is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise subprocess.TimeoutExpired(self.args, timeout)
                signal.sigtimedwait([signal.SIGCHLD], min(left, 0.05))  # a thread may have got it
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return self.returncode

    def end(self, seconds=60):
        """Waits for its end and returns (status, out, err)."""
        return Result(self.wait(timeout=seconds), self.out, self.err)


class Gate:
    """A command that logs `NAME start ELEMENT`, waits until the gate is opened, logs `NAME end`."""

    SCRIPT = 'echo "$0" start $3 >>"$1"; read _ <"$2"; echo "$0" end >>"$1"'

    def __init__(self, box, name):
        self.box, self.name, self.fifo = box, name, box.path(f"gate.{name}")
        os.mkfifo(self.fifo)
        self.command = ["/bin/sh", "-c", self.SCRIPT, name, box.log, self.fifo]

    def started(self):
        return any(line.split()[:2] == [self.name, "start"] for line in self.box.events())

    def wait(self, seconds=30):
        """Waits until the command has started."""
        wait_until(self.started, seconds)

    def open(self):
        """Lets the command end, after it has started."""
        wait_until(self._unblock)

    def _unblock(self):
        try:
            os.close(os.open(self.fifo, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # ENXIO: nobody reads yet
            return False
        return True


class Box:
    """A private folder with its HOME, socket, log of events and processes."""

    def __init__(self, folder, address=None, prefix=()):
        self.folder, self.prefix, self.processes = folder, list(prefix), []
        self.socket, self.log = self.path("s"), self.path("log")
        self.address = ("-s", self.socket) if address is None else address
        self.foreground, self.forgiven, self.seen = [], set(), {}
        self.before = set(os.listdir("/proc"))  # processes that are not of this box

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, text):
        """Writes a file into the box and returns its path."""
        with open(self.path(name), "w", encoding="utf-8") as file:
            file.write(text)
        return self.path(name)

    def environment(self, more=()):
        """The environment of the box: nothing of FLOM_* or PYTHON*, HOME in the box."""
        keep = {key: os.environ[key] for key in ("PATH", "TERM", "TZ") if key in os.environ}
        if AS_IS:  # for coverage and debuggers
            keep.update((key, value) for key, value in os.environ.items()
                        if key.startswith(("COVERAGE", "PYTHON")))
        return dict(keep, HOME=self.folder, LANG="C.UTF-8", LC_ALL="C.UTF-8", **dict(more))

    # What runs in it

    def start(self, *argv, **options):
        return Process(self, list(argv), **options)

    def flom(self, *args, **options):
        """Starts flom.py; `address` (its first options) is the box's own unless given."""
        address = options.pop("address", self.address)
        return self.start(*PYTHON, FLOM, *address, *args, **options)

    def run(self, *args, **options):
        """Runs flom.py to its end: (status, out, err)."""
        seconds = options.pop("seconds", 60)
        return self.flom(*args, **options).end(seconds)

    def flomd(self, *args, **options):
        """Starts flomd.py with these options and no others."""
        program = options.pop("program", (FLOMD,))
        return self.start(*PYTHON, *program, *args, **options)

    def daemon(self, *args, **options):
        """Starts `flomd.py -f` and waits until it accepts connections."""
        address = options.pop("address", self.address)
        daemon = self.flomd("-f", "--no-files", *address, *args, **options)
        self.foreground.append(daemon)
        wait_until(lambda: daemon.poll() is not None or can_connect(address))
        assert daemon.poll() is None, f"flomd.py ended with {daemon.poll()}: {daemon.err}"
        return daemon

    def hold(self, name, *options, **more):
        """Starts a command under a lock and waits until it runs: (process, its gate)."""
        gate = self.gate(name)
        holder = self.flom(*options, "--", *gate.command, **more)
        wait_until(lambda: gate.started() or holder.poll() is not None)
        assert gate.started(), holder.end()
        return holder, gate

    def note(self, word):
        """A command that adds a line to the log."""
        return ["/bin/sh", "-c", 'echo "$0" >>"$1"', word, self.log]

    def waiter(self, *args, **options):
        """Starts `flom.py -V` and waits until it says that it waits."""
        waiter = self.flom("-V", *args, **options)
        wait_until(lambda: "waiting for" in waiter.err or waiter.poll() is not None)
        assert waiter.poll() is None, waiter.end()
        return waiter

    def gate(self, name):
        return Gate(self, name)

    # What happens in it

    def events(self):
        """The lines of the log so far."""
        return read(self.log).splitlines() if os.path.exists(self.log) else []

    def running(self):
        """{pid: command line} of all processes of this box, zombies aside."""
        mark, found = f"HOME={self.folder}".encode(), {}

        def look(pid):
            with open(f"/proc/{pid}/environ", "rb") as file:
                environment = file.read()
            if mark in environment.split(b"\0"):
                found[pid] = read(f"/proc/{pid}/cmdline").replace("\0", " ")
            return environment
        there = set(filter(str.isdigit, os.listdir("/proc")))
        self.before &= there  # the pid of one that has ended may be another's later
        for pid in map(int, there - self.before):
            try:
                has_told = look(pid)
            except OSError:  # it is dying, has ended, or is another user's
                has_told = False
            if not has_told and pid in self.seen and not has_ended(pid):
                found[pid] = self.seen[pid]  # it is dying, and its sockets may still be there
        self.seen = found
        return found

    def daemons(self):
        """The pids of the daemons of this box."""
        return sorted(pid for pid in self.running() if comm(pid) == "flomd")

    def the_daemon(self):
        """The pid of the one daemon of this box."""
        wait_until(lambda: len(self.daemons()) == 1)
        return self.daemons()[0]

    def kill(self, pid, number=signal.SIGKILL):
        """Kills a process of this box; it need not remove its socket."""
        assert pid in self.running(), f"{pid} is no process of this box"
        if comm(pid) == "flomd":
            self.forgiven.update(self.sockets())
        os.kill(pid, number)
        for process in self.processes:
            if process.pid == pid:
                process.wait(timeout=10)
        wait_until(lambda: has_ended(pid))

    def tell(self):
        """Prints the last words of all that has run; pytest shows them when the test has failed."""
        for process in self.processes:
            said = ""
            with contextlib.suppress(OSError):  # a test has removed it
                said = process.err[-2000:].encode("utf-8", "replace").decode()
            if said:
                print(f"{process.args} ended with {process.returncode} and said:\n{said}")

    def forget(self):
        """The next daemon is not to know what the one before it, which has ended, knew."""
        if os.path.exists(self.socket + ".journal"):
            os.unlink(self.socket + ".journal")

    def sockets(self):
        return {os.path.join(folder, name) for folder, _, names in os.walk(self.folder)
                for name in names if is_socket(os.path.join(folder, name))}

    # Its end

    def close(self):
        """Ends all that runs; returns what should not have been there any more, as lines."""
        wrong = [f"still running: {process.args}" for process in self.processes
                 if process.poll() is None and process not in self.foreground]
        if not wrong:
            wrong += self._strangers()
        wrong += [line for pid in self.daemons() for line in self._end_daemon(pid)]
        for pid in self.running():
            os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe:
                    pipe.close()
        return wrong + [f"socket left: {path}" for path in self.sockets() - self.forgiven]

    def _strangers(self):
        """Processes that the test did not start itself and that are no daemons."""
        def strangers():
            return {pid: line for pid, line in self.running().items()
                    if comm(pid) != "flomd" and "flomd" not in line}
        try:
            wait_until(lambda: not strangers())
        except AssertionError:
            return [f"left: {pid} {line}" for pid, line in strangers().items()]
        return []

    def _end_daemon(self, pid):
        try:
            os.kill(pid, signal.SIGTERM)
            mine = [process for process in self.processes if process.pid == pid]
            if mine:
                mine[0].wait(timeout=10)
            wait_until(lambda: has_ended(pid))
        except ProcessLookupError:
            pass
        except (AssertionError, subprocess.TimeoutExpired):
            self.forgiven.update(self.sockets())
            return [f"daemon {pid} did not end on TERM within 10 s"]
        return []


class Boxes:
    """Makes boxes, and ends them together."""

    def __init__(self):
        self.boxes, self.folders = [], []

    def make(self, name=None, of=Box, **options):
        """A box in a folder of its own, or, with a name, in one below the first folder."""
        if name is None or not self.folders:
            self.folders.append(tempfile.mkdtemp(prefix="f", dir="/tmp"))
        folder = os.path.join(self.folders[0], name) if name else self.folders[-1]
        os.makedirs(folder, exist_ok=True)
        self.boxes.append(of(folder, **options))
        return self.boxes[-1]

    def close(self):
        wrong = [line for box in self.boxes for line in box.close()]
        for box in self.boxes:
            box.tell()
        for folder in self.folders:
            shutil.rmtree(folder)
        self.boxes, self.folders = [], []
        assert not wrong, "\n".join(wrong)


# Small things

def read(path):
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


# The scripts as they are, for tests of the files themselves, and what all others run.
FLOM_PY, FLOMD_PY = os.path.join(ROOT, "flom.py"), os.path.join(ROOT, "flomd.py")
FLOM, FLOMD = compiled(FLOM_PY, FLOMD_PY)


def comm(pid):
    """The name of a process, empty when there is none."""
    try:
        return read(f"/proc/{pid}/comm").strip()
    except OSError:
        return ""


def has_ended(pid):
    """Whether a process is no more, or a zombie; one that dies has no environment before that."""
    try:
        return read(f"/proc/{pid}/stat").rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def is_socket(path):
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return False


def endpoint(address):
    """(family, address) for a socket of what the options -s, or -a and -p, name."""
    options = dict(zip(address[::2], address[1::2]))
    if "-s" in options:
        return socket.AF_UNIX, options["-s"]
    family = socket.AF_INET6 if ":" in options["-a"] else socket.AF_INET
    return family, (options["-a"], int(options.get("-p", 28015)))


def peer_pid(path):
    """The pid of the process that listens on a UNIX socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.connect(path)
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return struct.unpack("3i", credentials)[0]


def can_connect(address):
    family, name = endpoint(address)
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(name)
        except OSError:
            return False
    return True


def claim(path):
    """Makes a file for all processes of together.py; False when another has made it."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def free_port(host="127.0.0.1"):
    """A TCP port that nobody listens on, and none that this run has had: a test may use it late,
    or again and again.  The system itself gives higher ones to connections."""
    while True:
        port = random.SystemRandom().randrange(10000, 32768)
        if is_free(host, port) and is_new(port):
            forget_daemon(port)
            return port


def is_free(host, port):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def is_new(port):
    """Whether the port has not been used yet; now it has."""
    if port in PORTS or CLAIMS and not claim(os.path.join(CLAIMS, f"port-{port}")):
        return False
    PORTS.add(port)
    return True


def forget_daemon(port):
    """Removes what a daemon that has served a port leaves: its journal would tell of holders."""
    for path in glob.glob(f"/tmp/flom-*-{port}.*"):
        os.unlink(path)
