"""Commands that tests run under a lock, and ways to run the scripts that make a moment last, or
a time short.

A Counter counts the signals that reach it.  `driven` runs flom with a line of Python executed
first, which may hold it at a place that is otherwise passed within microseconds; `driven_daemon`
does so with flomd.
"""
import fcntl
import os
import pty
import sys
import termios

from world import PYTHON, ROOT, Gate, wait_until

COUNTER = """\
import os, signal, sys
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK)
signal.set_wakeup_fd(file)
for number in {*range(1, 32), *range(signal.SIGRTMIN, signal.SIGRTMAX + 1)} - {9, 17, 19}:
    signal.signal(number, lambda *_: None)
os.write(file, b"\\0")
open(sys.argv[2]).close()
os.write(file, b"\\xff")
"""

DRIVER = f"""\
import os, sys
sys.path.insert(0, {ROOT!r})
import flom

def hold(there, gate):
    "Says in the file `there` who has come here, and waits until the fifo `gate` is opened."
    with open(there + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(there + ".new", there)
    open(gate).close()

exec(sys.argv.pop(1))
sys.exit(flom.main())
"""

# For `driven`: a loss that is mended is not told, also where that takes more than a second.
PATIENT = "flom.NOTICE = 60\n"


def impatient(seconds, after="_set_lost"):
    """For `driven`: a first answer has that long, but from a step of the Claim on: before it, that
    to the lock takes its time."""
    return (f"step = flom.Claim.{after}\n"
            "def then(claim, *rest):\n"
            f"    claim._patience = flom.PATIENCE = {seconds}\n"
            "    return step(claim, *rest)\n"
            f"flom.Claim.{after} = then\n")


DAEMON_DRIVER = f"""\
import sys
sys.path.insert(0, {ROOT!r})
import flomd
exec(sys.argv.pop(1))
sys.exit(flomd.main())
"""

# A shell with job control, as far as the tests need one: it runs a command in the foreground, and
# continues it, when it was stopped, for each byte that comes through a fifo.  (To open the fifo
# would not be an order: whoever is slow to close it has given the next order, too.)
SHELL = """\
import os, signal, sys
log, orders, *argv = sys.argv[1:]
orders = os.open(orders, os.O_RDWR)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
pid = os.fork()
if not pid:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execvp(argv[0], argv)

def note(text):
    with open(log, "a") as file:
        file.write(text + "\\n")

note(f"pid {pid}")
while True:
    _, status = os.waitpid(pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        break
    note("stopped")
    os.read(orders, 1)
    os.killpg(pid, signal.SIGCONT)
note(f"killed {os.WTERMSIG(status)}" if os.WIFSIGNALED(status)
     else f"status {os.WEXITSTATUS(status)}")
"""


class Counter(Gate):
    """A command that counts signals, and ends with 0 when its gate is opened."""

    def __init__(self, box, name):
        super().__init__(box, name)
        self.counts = box.path(f"count.{name}")
        self.command = [sys.executable, "-I", "-S", "-c", COUNTER, self.counts, self.fifo]

    def _bytes(self):
        if not os.path.exists(self.counts):
            return b""
        with open(self.counts, "rb") as file:
            return file.read()

    def started(self):
        return bool(self._bytes())

    def pid(self):
        return next(pid for pid, line in self.box.running().items()
                    if self.counts in line and "flom.py" not in line)

    def ended(self):
        return self._bytes()[-1:] == b"\xff"

    def signals(self):
        """The numbers of the signals that have come, in their order."""
        return list(self._bytes().strip(b"\0\xff"))


def count(box, name, *options, **more):
    """Starts a Counter under a lock and waits until it runs: (process, counter)."""
    counter = Counter(box, name)
    holder = box.flom(*options, "--", *counter.command, **more)
    wait_until(lambda: counter.started() or holder.poll() is not None)
    assert counter.started(), holder.end()
    return holder, counter


def driven(box, code, *args, **options):
    """Starts flom after this Python code; `address` as for Box.flom."""
    address = options.pop("address", box.address)
    return box.start(*PYTHON, "-c", DRIVER, code, *address, *args, **options)


def driven_daemon(box, code, *args, **options):
    """Starts a daemon as Box.daemon does, after this Python code."""
    return box.daemon(*args, program=("-c", DAEMON_DRIVER, code), **options)


def pipeline(gate):
    """A shell that runs a gate's command in a pipeline, which TERM to the shell does not end."""
    return ["/bin/sh", "-c", '"$@" | cat', "sh", *gate.command]


def pending(pid, number):
    """Does a signal wait, blocked, for this process?"""
    with open(f"/proc/{pid}/status") as file:
        sets = [int(line.split()[1], 16) for line in file if line[:6] in ("SigPnd", "ShdPnd")]
    return any(bits >> number - 1 & 1 for bits in sets)


def state(pid):
    """The state of a process as one letter: T for stopped."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


class Terminal:
    """A pseudo-terminal whose session a shell leads, or (leads=False) flom itself."""

    def __init__(self, box, argv, name="terminal", shell=True):
        self.log, self.orders = box.path(f"{name}.log"), box.path(f"{name}.orders")
        os.mkfifo(self.orders)
        if shell:
            argv = [sys.executable, "-I", "-S", "-c", SHELL, self.log, self.orders] + argv
        self.master, slave = pty.openpty()
        self.process = box.start(*argv, stdin=slave, start_new_session=True,
                                 preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(slave)

    def type(self, key):
        os.write(self.master, key)

    def events(self):
        """What the shell has seen: `pid N`, `stopped`, `status N`, `killed N`."""
        if not os.path.exists(self.log):
            return []
        with open(self.log) as file:
            return file.read().splitlines()

    def go_on(self):
        """Orders the shell to continue its command, which it has seen stopped."""
        with open(self.orders, "wb") as orders:
            orders.write(b"\n")

    def hang_up(self):
        os.close(self.master)
        self.master = None

    def close(self):
        if self.master is not None:
            self.hang_up()
