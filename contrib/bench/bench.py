#!/usr/bin/env python3
"""Measures flom and flomd beside yardsticks, and prints one table.

    bench.py [--quick] [--python PATH]... [--only NAME]...

Names: cycle waiters hold memory etcd start discovery idle others.  A thing and its yardstick are
measured in turn, A B A B; a ratio is the median of those of the pairs, so that it means something
on a busy machine, where the absolute figures mean little.  Everything is kept in a folder of its
own below /tmp and has ended and gone when the table is complete.
"""
import argparse
import atexit
import base64
import collections
import json
import os
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
GROUP, ADDRESS, PORT = "239.255.0.9", "10.77.0.1", "28015"
NETWORK = ("ip link set lo up && ip link add d0 type veth peer d1 && "
           f"ip addr add {ADDRESS}/24 dev d0 && ip link set d0 up && ip link set d1 up && "
           "ip route add 224.0.0.0/4 dev d0 && echo && exec cat")

CHANGED = """
{change}
import sys
sys.path.insert(0, {root!r})
import flomd
sys.exit(flomd.main())
"""
NO_JOURNAL = """
import fcntl
def flock(*_):
    raise OSError(37, "No locks available")
fcntl.flock = flock
"""  # as on a file system without locks
JOURNAL = """
import os, sys
sys.path.insert(0, {root!r})
import flomd
now = flomd.Moment()
covers = flomd.epoch_of_the_clock() - 10 << 32
records = [flomd.daemon_record(covers >> 32, flomd.boot_id(), "", covers + 2 ** 32 - 1)]
for number in range({size}):
    name = flomd.encode_name(f"held{{number}}")
    records.append((f"h/{{covers + number + 1:016x}}", (
        f'name="{{name}}" boot="{{now.boot:.6f}}" since="{{now.wall:.6f}}" '
        f'peer="10.0.0.1/5{{number}}" mode="5" client="1" id="{{number:016x}}" '
        f'proof="{{number:016x}}" host="db1" user="joe" cmd="dump" said="{{number}}"')))
os.umask(0o077)
with open({path!r}, "xb") as file:
    file.write(flomd.JOURNAL_HEAD)
    for first in range(0, len(records), 1000):
        file.write(flomd.encode_batch(records[first:first + 1000]))
"""  # of so many holders on other hosts
SYNC = 0.002  # s, of a disk
SLOW_DISK = f"""
import os, time
syncs = os.open({{path!r}}, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
def sync(_):
    time.sleep({SYNC})
    os.write(syncs, b".")
os.fdatasync = os.fsync = sync
"""  # and the file at the path has a byte for each sync
NAMES = "cycle waiters hold memory etcd start discovery idle others".split()

ETCD_PREFIX = "/flom/bench/"

Row = collections.namedtuple("Row", "what value yardstick ratio target ok")


class Bench:
    """The folder, the processes and the rows of one run."""

    def __init__(self, quick):
        self.folder = tempfile.mkdtemp(prefix="flb", dir="/tmp")
        self.processes, self.detached, self.rows = [], [], []
        self.rounds, self.seconds = (2, 0.4) if quick else (5, 1.5)
        self.starts, self.idle = (6, 3) if quick else (20, 10)
        self.environment = {key: value for key, value in os.environ.items()
                            if not key.startswith(("FLOM", "PYTHON", "LISTEN_", "NOTIFY_"))}
        self.environment["HOME"] = self.folder
        self.load, self.files = self.load_generator(), most_files()

    def path(self, name):
        return os.path.join(self.folder, name)

    def load_generator(self):
        """The command of lockload.c, of lockload.py where nothing can compile it."""
        compiler = shutil.which(os.environ.get("CC", "cc"))
        source, program = os.path.join(HERE, "lockload.c"), self.path("lockload")
        if compiler and self.quietly([compiler, "-O2", "-o", program, source]) == 0:
            return [program]
        return [sys.executable, os.path.join(HERE, "lockload.py")]

    # Processes

    def start(self, argv, **options):
        for stream in ("stdin", "stdout", "stderr"):
            options.setdefault(stream, subprocess.DEVNULL)
        env = dict(self.environment, **options.pop("env", {}))
        self.processes.append(subprocess.Popen(argv, env=env, **options))
        return self.processes[-1]

    def end(self, process):
        """Ends a process of ours."""
        process.terminate()
        process.wait()
        if process.stdout:
            process.stdout.close()
        self.processes.remove(process)

    def quietly(self, argv):
        """The status of a command; it is killed when it has not ended after 10 s."""
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, env=self.environment)
        killer = threading.Timer(10, process.kill)  # wait(10) would look now and then only
        killer.start()
        try:
            return process.wait()
        finally:
            killer.cancel()

    def daemon(self, python, bare=False, change="", options=(), path=""):
        """A flomd, or the yardstick, that accepts connections: (process, path of its socket).
        `change`: statements that change the system for it; `path`: where there is a journal
        to be read, or HOST:PORT."""
        path = path or os.path.join(tempfile.mkdtemp(dir=self.folder), "s")
        address = ["-s", path]
        if not path.startswith("/"):
            host, _, port = path.rpartition(":")
            address = ["-a", host, "-p", port]
        argv = [os.path.join(HERE, "bare.py"), path] if bare else [
            *flomd_after(change), "-f", "--no-files", *address, *options]
        process = self.start([python] + argv)
        until(lambda: process.poll() is not None or accepts(path))
        if process.poll() is not None:
            sys.exit(f"bench.py: {' '.join(argv)} has ended with {process.poll()}")
        return process, path

    def figures(self, *arguments):
        """What lockload measures: {key: text}."""
        output = subprocess.check_output(self.load + list(map(str, arguments)),
                                         env=self.environment).decode()
        return dict(word.split("=") for word in output.split())

    def holding(self, path, size, seconds):
        """(lockload that goes on holding `size` locks, its figures)."""
        holder = self.start(self.load + ["hold", path, str(size), str(seconds)],
                            stdout=subprocess.PIPE, env={"LOCKLOAD_PAUSE": "600"})
        line = holder.stdout.readline().decode()
        return holder, dict(word.split("=") for word in line.split())

    def time(self, argv):
        """The seconds (wall clock) that a command takes; it must succeed."""
        begun = time.perf_counter()
        status = self.quietly(argv)
        took = time.perf_counter() - begun
        if status:
            raise OSError(f"{' '.join(argv)}: status {status}")
        return took

    def computed(self, argv):
        """The seconds of processor time that a command takes, with all for which it has waited."""
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, env=self.environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = status
        if status:
            raise OSError(f"{' '.join(argv)}: status {status}")
        return used.ru_utime + used.ru_stime

    def close(self):
        """Ends what still runs and removes the folder."""
        for process in reversed(self.processes):
            process.kill()
            process.wait()
        for stop in self.detached:
            self.quietly(stop)
        shutil.rmtree(self.folder, ignore_errors=True)

    # Rows

    def compare(self, what, pairs, target, unit="{:.0f}", least=False):
        """A row of pairs (value, yardstick); the ratio is to be `target` at most, or at least."""
        ratio = statistics.median(value / yardstick for value, yardstick in pairs)
        medians = [unit.format(statistics.median(column)) for column in zip(*pairs)]
        bound = "" if target is None else ("≥ " if least else "≤ ") + f"{target:g}"
        good = target is None or (ratio >= target if least else ratio <= target)
        self.note(what, *medians, f"{ratio:.2f}", bound, good)

    def note(self, what, value, yardstick="", ratio="", bound="", good=True):
        self.rows.append(Row(what, value, yardstick, ratio, bound,
                             ("ok" if good else "over") if bound else ""))
        print(".", end="", file=sys.stderr, flush=True)

    def skip(self, what, reason):
        self.note(what, f"skipped: {reason}")


# Small things

def flomd_after(change):
    """The words behind Python that start a flomd, after statements that change the system."""
    if not change:
        return [os.path.join(ROOT, "flomd.py")]
    return ["-B", "-c", CHANGED.format(root=ROOT, change=change)]


def until(predicate, seconds=30):
    deadline = time.monotonic() + seconds
    while not predicate():
        if time.monotonic() > deadline:
            sys.exit(f"bench.py: nothing happened for {seconds} s")
        time.sleep(0.005)


def accepts(path):
    """Whether somebody listens at the path of a socket, or at HOST:PORT."""
    family, address = socket.AF_UNIX, path
    if not path.startswith("/"):
        host, _, port = path.rpartition(":")
        family, address = socket.AF_INET, (host, int(port))
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(address) == 0


def listener(path):
    """The process that listens at a path."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.connect(path)
        peer = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return struct.unpack("3i", peer)[0]


def free_port():
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def most_files():
    try:
        import resource
    except ImportError:
        return 1024
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def processor_time(pid):
    """The seconds that a process, all its threads, has computed; None where the system does not
    tell exactly."""
    spent = 0
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/schedstat") as file:
                spent += int(file.read().split()[0]) / 1e9
    except OSError:
        return None
    return spent


def status_of(pid, *keys):
    """The sum of these numbers of /proc/PID/status."""
    with open(f"/proc/{pid}/status") as file:
        rows = dict(line.split(":") for line in file)
    return sum(int(rows[key].split()[0]) for key in keys)


def switches(pid):
    return status_of(pid, "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")


def in_turn(rounds, one, other):
    """[(value, yardstick)]: calls one, the other, one, the other, …"""
    return [(one(), other()) for _ in range(rounds)]


# What is measured

def measure_cycle(bench, python):
    """Connect, lock, unlock, close: flomd against bare.py."""
    flomd, bare = bench.daemon(python), bench.daemon(python, bare=True)
    for clients, whose in ((1, "own"), (64, "own"), (64, "same")):
        def run(process, path):
            before = processor_time(process.pid)
            figures = bench.figures("cycle", path, clients, bench.seconds, whose)
            spent = None if before is None else processor_time(process.pid) - before
            cycles = int(figures["cycles"])
            return [float(figures["per_s"]), float(figures["p99_us"]),
                    spent and spent / cycles * 1e6]

        pairs = in_turn(bench.rounds, lambda: run(*flomd), lambda: run(*bare))
        speed, slowest, spent = [[(a[n], b[n]) for a, b in pairs] for n in range(3)]
        title = "1 client" if clients == 1 else f"{clients} clients {whose}"
        bench.compare(f"{title}: cycles/s, against bare.py", speed, 0.75, least=True)
        bench.compare(f"{title}: p99 in µs, against bare.py", slowest, 1.5)
        if spent[0][0]:
            bench.compare(f"{title}: µs computed in a cycle", spent, None, "{:.1f}")
    bench.end(flomd[0])
    bench.end(bare[0])


def measure_waiters(bench, python):
    """A long queue against a short one."""
    many, few = min(16000, bench.files - 100), 200
    process, path = bench.daemon(python)

    def run(size):
        bench.figures("cycle", path, 1, 0.2, "own")  # the daemon has buried those before
        figures = bench.figures("waiters", path, size)
        return [float(figures[key]) for key in ("enqueue_us", "grant_us")]

    # The short queue once after each long one: its messages must not be known from before.
    pairs = in_turn(2 * bench.rounds - 1, lambda: run(many), lambda: run(few))
    for n, what in enumerate(("queue", "hand over")):
        bench.compare(f"{many} waiters against {few}: {what}, µs for each",
                      [(a[n], b[n]) for a, b in pairs], 1.5, "{:.1f}")
    bench.end(process)


def measure_hold(bench, python):
    """Cycles beside many held resources against cycles alone; memory."""
    size, memory = min(10000, bench.files - 100), []

    def beside():
        process, path = bench.daemon(python)
        holder, figures = bench.holding(path, size, bench.seconds)
        if os.path.exists("/proc/self/status"):
            memory.append(status_of(process.pid, "VmRSS") / 1024)
        bench.end(holder)
        bench.end(process)
        return float(figures["beside_per_s"])

    def alone():
        process, path = bench.daemon(python)
        figures = bench.figures("cycle", path, 1, bench.seconds, "own")
        bench.end(process)
        return float(figures["per_s"])

    bench.compare(f"cycles/s beside {size} held, against without",
                  in_turn(bench.rounds, beside, alone), 0.9, least=True)
    if memory:
        most = statistics.median(memory)
        bench.note(f"MB resident with {size} held", f"{most:.0f}", "", "", "≤ 60", most <= 60)


def measure_memory(bench, python):
    """What it costs that the next daemon knows everything."""
    measure_journal(bench, python)
    measure_sync(bench, python)
    measure_size(bench, python)
    measure_restore(bench, python)



def measure_journal(bench, python):
    """The processor time of a cycle, with a journal and without one."""
    if processor_time(os.getpid()) is None:
        return bench.skip("processor time of a cycle with the journal", "the system does not tell")
    without = bench.daemon(python, change=NO_JOURNAL)
    kept = {"journal": bench.daemon(python, change="pass"), "--state-dir": bench.daemon(
        python, change="pass", options=("--state-dir", tempfile.mkdtemp(dir=bench.folder)))}

    def run(process, path):
        before = processor_time(process.pid)
        figures = bench.figures("cycle", path, clients, bench.seconds, whose)
        return (processor_time(process.pid) - before) / int(figures["cycles"]) * 1e6

    for clients, whose, target in ((1, "own", 1.35), (64, "own", 1.2), (64, "same", 1.35)):
        title = "1 client" if clients == 1 else f"{clients} clients {whose}"
        for what, daemon in kept.items():
            bench.compare(f"{title}: µs computed in a cycle, {what} against none",
                          in_turn(bench.rounds, lambda: run(*daemon), lambda: run(*without)),
                          target if what == "journal" else None, "{:.1f}")
    for process, _ in (without, *kept.values()):
        bench.end(process)


def measure_sync(bench, python):
    """How many cycles share one sync of a slow disk."""
    found = []
    for _ in range(bench.rounds):
        folder = tempfile.mkdtemp(dir=bench.folder)
        counted = os.path.join(folder, "syncs")
        process, path = bench.daemon(python, change=SLOW_DISK.format(path=counted),
                                     options=("--state-dir", folder))
        before = os.path.getsize(counted)
        figures = bench.figures("cycle", path, 64, bench.seconds, "own")
        found.append(int(figures["cycles"]) / (os.path.getsize(counted) - before))
        bench.end(process)
    cycles = statistics.median(found)
    bench.note(f"64 clients own: cycles a sync of {1000 * SYNC:.0f} ms", f"{cycles:.0f}", "", "",
               "≥ 10", cycles >= 10)


def measure_size(bench, python):
    """The memory that a held lock takes, with a journal and without one."""
    if not os.path.exists("/proc/self/status"):
        return bench.skip("bytes for each held lock", "no /proc")
    size = min(10000, bench.files - 100)

    def taken(change):
        process, path = bench.daemon(python, change=change)
        empty = status_of(process.pid, "VmRSS")
        holder = bench.holding(path, size, 0.1)[0]
        full = status_of(process.pid, "VmRSS")
        bench.end(holder)
        bench.end(process)
        return (full - empty) * 1024 / size

    bench.compare(f"bytes for each of {size} held locks, journal against none", in_turn(
        bench.rounds, lambda: taken("pass"), lambda: taken(NO_JOURNAL)), 1.1)


def measure_restore(bench, python):
    """The processor time of a start with many holders in the journal."""
    if processor_time(os.getpid()) is None:
        return bench.skip("restoring holders", "the system does not tell")

    def start(size):
        path = os.path.join(tempfile.mkdtemp(dir=bench.folder), "s")
        if size:
            made = JOURNAL.format(root=ROOT, size=size, path=f"{path}.journal")
            subprocess.check_call([python, "-B", "-c", made], env=bench.environment)
        process = bench.daemon(python, change="pass", path=path)[0]
        spent = processor_time(process.pid)
        if size:
            report = subprocess.check_output(
                [python, os.path.join(ROOT, "flom.py"), "-s", path, "-r", f"held{size - 1}",
                 "--status", "--json"], env=bench.environment)
            if b"absent" not in report:
                sys.exit(f"bench.py: the journal of {size} holders is not believed")
        bench.end(process)
        return spent

    for size, target in ((10000, 0.4), (100000, 4)):
        pairs = in_turn(bench.rounds, lambda: start(size), lambda: start(0))
        spent = statistics.median(value - nothing for value, nothing in pairs)
        bench.note(f"{size} holders restored: s computed", f"{spent:.2f}", "", "", f"≤ {target}",
                   spent <= target)


def measure_etcd(bench, python):
    """What it costs that the memory is in etcd: a cluster of one member on this host, so that a
    round trip is short.  Transactions are counted by the record of the leader."""
    if not shutil.which("etcd"):
        return bench.skip("cycles with --etcd", "no etcd in PATH")
    if processor_time(os.getpid()) is None:
        return bench.skip("cycles with --etcd", "the system does not tell")
    member, url = start_etcd(bench)
    kept = bench.daemon(python, change="pass", path=f"127.0.0.1:{free_port()}", options=(
        "--etcd", url, "--etcd-prefix", ETCD_PREFIX, "--etcd-state", bench.path("cluster")))
    without = bench.daemon(python, change=NO_JOURNAL, path=f"127.0.0.1:{free_port()}", options=(
        "--state-dir", tempfile.mkdtemp(dir=bench.folder), "--recovery-window", "0"))

    def run(process, address):
        """(µs of a cycle, µs computed, cycles for each transaction)"""
        before, counted = processor_time(process.pid), transactions(url)
        figures = bench.figures("cycle", address, clients, bench.seconds, whose)
        cycles, made = int(figures["cycles"]), transactions(url) - counted
        spent = processor_time(process.pid) - before
        return 1e6 * bench.seconds / cycles, 1e6 * spent / cycles, cycles / max(1, made)

    for clients, whose in ((1, "own"), (64, "own"), (64, "same")):
        title = "1 client" if clients == 1 else f"{clients} clients {whose}"
        pairs = in_turn(bench.rounds, lambda: run(*kept), lambda: run(*without))
        for number, what in enumerate(("µs a cycle", "µs computed in a cycle")):
            bench.compare(f"{title}: {what}, --etcd against no journal",
                          [(one[number], other[number]) for one, other in pairs], None, "{:.1f}")
        found = statistics.median(one[2] for one, _ in pairs)
        least = {(1, "own"): 0.45, (64, "own"): 10}.get((clients, whose), 0)  # 2, and beats
        bench.note(f"{title}: cycles a transaction", f"{found:.2f}", "", "",
                   f"≥ {least}" if least else "", found >= least)
    for process in (kept[0], without[0], member):
        bench.end(process)


def start_etcd(bench):
    """A cluster of one member that answers: (process, its URL)."""
    url, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    member = bench.start([
        "etcd", "--name", "m1", "--data-dir", bench.path("etcd"), "--listen-client-urls", url,
        "--advertise-client-urls", url, "--listen-peer-urls", peer,
        "--initial-advertise-peer-urls", peer, "--initial-cluster", f"m1={peer}"])

    def answers():
        try:
            return transactions(url) == 0
        except OSError:
            return False
    until(answers)
    return member, url


def transactions(url):
    """How many the leader has made so far, by its record; 0: there is none."""
    key = base64.b64encode(f"{ETCD_PREFIX}leader".encode()).decode()
    question = json.dumps({"key": key}).encode()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{url}/v3/kv/range", question, 5) as answer:
        found = json.loads(answer.read().decode()).get("kvs")
    return json.loads(base64.b64decode(found[0]["value"]).decode())["n"] if found else 0


def install(bench, python):
    """Installs flom with its launchers; the path of that of flom."""
    prefix = tempfile.mkdtemp(dir=bench.folder)
    program = subprocess.check_output([python, "-c", "import sys; print(sys.executable)"],
                                      env=bench.environment).decode().strip()
    script = os.path.join(ROOT, "contrib", "install.sh")
    if bench.quietly(["sh", script, "--prefix", prefix, "--python", program]):
        sys.exit(f"bench.py: {script} fails")
    return os.path.join(prefix, "bin", "flom")


def measure_start(bench, python):
    """What each command costs beside what it runs, against the start of Python."""
    process, path = bench.daemon(python)
    program = install(bench, python)
    direct, rest = [python, os.path.join(ROOT, "flom.py")], ["-s", path, "--", "true"]
    nothing = [python, "-IS", "-c", "pass"]
    for what, flom, target in (("launcher", [program], 3), ("script", direct, 6)):
        bench.compare(f"{what}, a daemon runs: processor ms",
                      in_turn(bench.starts, lambda: 1000 * bench.computed(flom + rest),
                              lambda: 1000 * bench.computed(nothing)), target, "{:.1f}")
    bench.end(process)

    def alone():
        path = os.path.join(tempfile.mkdtemp(dir=bench.folder), "s")
        stop = [program, "-s", path, "-d", "0", "-X"]
        bench.detached.append(stop)
        took = bench.computed([program, "-s", path, "--", "true"])
        took += processor_time(listener(path)) or 0  # what it waits for ends before the daemon
        bench.quietly(stop)
        until(lambda: not accepts(path))
        bench.detached.remove(stop)
        return 1000 * took

    bench.compare("launcher, it starts a daemon: processor ms",
                  in_turn(bench.starts, alone, lambda: 1000 * bench.computed(nothing)), 6.5,
                  "{:.1f}")


def measure_discovery(bench, python):
    """Finding the daemon by multicast against knowing its address, in a network of our own."""
    what = "multicast discovery against -a: ms"
    tools = [tool for tool in ("ip", "unshare", "nsenter") if not shutil.which(tool)]
    if os.geteuid() or tools:
        return bench.skip(what, " ".join(["no"] + tools) if tools else "only root can")
    keeper = bench.start(["unshare", "-n", "sh", "-c", NETWORK], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE)
    if keeper.stdout.readline() != b"\n":
        return bench.skip(what, "no network namespace")
    inside = ["nsenter", "-t", str(keeper.pid), "-n", python]
    daemon = bench.start(inside + [
        os.path.join(ROOT, "flomd.py"), "-f", "--no-files", "--state-dir", bench.folder,
        "-a", ADDRESS, "-p", PORT, "-A", GROUP])
    flom = inside + [os.path.join(ROOT, "flom.py")]
    until(lambda: not bench.quietly(flom + ["-d", "0", "-A", GROUP, "--", "true"]))

    def run(*address):
        return 1000 * bench.time(flom + ["-d", "0"] + list(address) + ["--", "true"])

    bench.compare(what, in_turn(bench.starts, lambda: run("-A", GROUP),
                                lambda: run("-a", ADDRESS, "-p", PORT)), 1.2, "{:.1f}")
    bench.end(daemon)
    keeper.stdin.close()
    bench.end(keeper)


def measure_idle(bench, python):
    """How often a daemon wakes up that has nothing to do."""
    if not os.path.exists("/proc/self/status"):
        return bench.skip("context switches of an idle daemon", "no /proc")
    for size in (0, 1000):
        process, path = bench.daemon(python)
        holder = bench.holding(path, size, 0.1)[0] if size else None
        last = [0, switches(process.pid)]

        def settled():
            """Timers of what went before are over: nothing has happened for 3 s."""
            if switches(process.pid) != last[1]:
                last[:] = time.monotonic(), switches(process.pid)
            return time.monotonic() > max(last[0], begun) + 3
        begun = time.monotonic()
        until(settled)
        before = switches(process.pid)
        time.sleep(bench.idle)
        found = switches(process.pid) - before
        bench.note(f"context switches in {bench.idle} s, idle, {size} holders", str(found),
                   "0", "", "= 0", found == 0)
        if holder:
            bench.end(holder)
        bench.end(process)


def measure_others(bench, python):
    """flock(1), FLoM, etcd: one lock around `true`, against python -c pass."""
    def compare(what, argv):
        try:
            pairs = in_turn(bench.starts, lambda: 1000 * bench.time(argv),
                            lambda: 1000 * bench.time([python, "-c", "pass"]))
        except OSError as error:
            return bench.skip(what, str(error))
        bench.compare(f"{what}, against python -c pass: ms", pairs, None, "{:.1f}")

    if shutil.which("flock"):
        compare("flock(1) FILE true", ["flock", bench.path("flock"), "true"])
    if shutil.which("flom") and b"flom.py" not in subprocess.check_output(["flom", "--version"]):
        measure_flom(bench, compare)
    if shutil.which("etcdctl"):
        compare("etcdctl lock NAME true", ["etcdctl", "--dial-timeout=2s", "--command-timeout=9s",
                                           "lock", "flom-bench", "true"])


def measure_flom(bench, compare):
    """FLoM's flom: its client, and its daemon under the same load; the daemon ends by itself."""
    path = bench.path("flom")
    compare("FLoM's flom -- true", ["flom", "-d", "9999", "-s", path, "--", "true"])
    if not accepts(path):
        return
    for clients, whose in ((1, "own"), (64, "own"), (64, "same")):
        figures = bench.figures("cycle", path, clients, bench.seconds, whose)
        bench.note(f"FLoM's daemon, {clients} {whose}: cycles/s", figures["per_s"])
    bench.quietly(["flom", "-s", path, "-X"])


# The table

def print_table(rows):
    rows = [Row("", "value", "yardstick", "ratio", "target", "")] + rows
    widths = [max(map(len, column)) for column in list(zip(*rows))[:1]] + [9, 9, 6, 7, 4]
    for row in rows:
        if row.value.startswith("skipped"):
            print(row.what.ljust(widths[0]), row.value)
        else:
            print(row.what.ljust(widths[0]),
                  *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:])))


MEASUREMENTS = {name: globals()[f"measure_{name}"] for name in NAMES}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for a first look")
    parser.add_argument("--python", action="append", metavar="PATH", help="repeatable")
    parser.add_argument("--only", action="append", choices=list(MEASUREMENTS), help="repeatable")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    bench = Bench(options.quick)
    atexit.register(bench.close)
    for python in options.python or [sys.executable]:
        version = subprocess.check_output([python, "-c", "import sys; print(sys.version)"],
                                          env=bench.environment).decode().split()[0]
        for name in options.only or MEASUREMENTS:
            MEASUREMENTS[name](bench, python)
        print(file=sys.stderr)
        load = os.path.basename(bench.load[-1])
        print(f"\nPython {version}, {os.cpu_count()} processors, load from {load}\n")
        print_table(bench.rows)
        bench.rows = []


if __name__ == "__main__":
    main()
