"""A daemon under siege: another host does all that a stranger can do, at once, for a time.

Meanwhile seventy clients hold locks.  Nobody loses one, no turn of the daemon's loop takes long,
and nothing is left in its memory.  The daemon is run by a wrapper that measures each turn.
"""
import json
import os
import signal
import subprocess

from siege import KINDS
from world import COUNT, PYTHON, ROOT, SOAK, chance, wait_until

SIEGE = os.path.join(ROOT, "tests", "siege.py")
GROUP = "239.255.0.1"
SECONDS = COUNT.siege
WARM_UP, HOSTILE = 1000, COUNT.hostile  # connections
LEFT = 100 * 1024  # bytes: modules that are loaded late
TURN, REPORTING = 50, 100  # ms of processor time that a turn may take, and one that sends a report
PARTIES = [  # who besieges in one process
    "connections,halves,oversize,slow_readers", "reports,nonsense", "chains,crowds",
    "known_cases,datagrams,names,impostors"]

MEASURED = """
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import flomd

class Turn:
    begun, reports, worst = None, False, {"plain": [], "reporting": []}

def used():
    return 1000 * time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)

def turn(loop, timeout):
    if Turn.begun is not None:
        worst = Turn.worst["reporting" if Turn.reports else "plain"]
        worst.append(round(used() - Turn.begun, 1))
        if len(worst) > 100:
            worst.sort()
            del worst[:-5]
    Turn.begun, Turn.reports = used(), False
    return real_turn(loop, timeout)

def report(*arguments):
    for piece in real_report(*arguments):
        Turn.reports = True
        yield piece

def tell(number, frame):
    with open(PATH + ".new", "w") as file:
        json.dump({kind: sorted(worst)[-5:] for kind, worst in Turn.worst.items()}, file)
    os.rename(PATH + ".new", PATH)

PATH, sys.argv = sys.argv[2], sys.argv[2:]
real_turn, flomd.Loop._turn = flomd.Loop._turn, turn
real_report, flomd.report = flomd.report, report
signal.signal(signal.SIGUSR2, tell)
sys.exit(flomd.main())
"""


COUNTED = """
import functools, gc, json, os, re, signal, sys, tracemalloc
sys.path.insert(0, sys.argv[1])
import flomd

def tell(number, frame):
    if hasattr(gc, "unfreeze"):
        gc.unfreeze()  # what is frozen is not among the objects
    for one in gc.get_objects():
        if type(one) is CACHE:
            one.cache_clear()
    re.purge()
    gc.collect()
    size = tracemalloc.get_traced_memory()[0]
    found = sorted(tracemalloc.take_snapshot().statistics("lineno"), key=lambda one: -one.size)
    with open(PATH + ".new", "w") as file:
        json.dump([size, [str(one) for one in found[:12]]], file)
    os.rename(PATH + ".new", PATH)

CACHE = type(functools.lru_cache()(int))  # what one keeps is bounded, and no leak
PATH, sys.argv = sys.argv[2], sys.argv[2:]
signal.signal(signal.SIGUSR2, tell)
flomd.LEAST_LIFESPAN = 20
tracemalloc.start()
sys.exit(flomd.main())
"""


def wrapped_daemon(host, wrapper):
    """A daemon of a group, run by a wrapper; the file to which it tells what it knows on USR2."""
    path = host.path("told")
    daemon = host.flomd("-f", "--no-files", "-A", GROUP, "-a", host.ipv4, *host.address,
                        program=("-c", wrapper, ROOT, path))
    host.foreground.append(daemon)
    wait_until(lambda: "serving" in daemon.err)
    return daemon, path


def told(daemon, path):
    daemon.send_signal(signal.SIGUSR2)
    wait_until(lambda: os.path.exists(path), seconds=60)
    with open(path) as file:
        found = json.load(file)
    os.unlink(path)
    return found


def besiege(host, target, kinds, seconds=1000, connections=10 ** 9):
    """Starts the siege of one party."""
    seed = str(chance(f"siege {kinds}").getrandbits(32))
    return host.start(*PYTHON, SIEGE, "besiege", kinds, target.ipv4, "28015", GROUP, seed,
                      str(seconds), str(connections), env={"FLOM_SOAK": str(int(SOAK))})


def test_a_daemon_under_siege(hosts):
    one, two = hosts(2)
    daemon, path = wrapped_daemon(one, MEASURED)
    holders = one.start(*PYTHON, SIEGE, "hold", one.ipv4, "28015", stdin=subprocess.PIPE)
    wait_until(lambda: "holding" in holders.out or holders.poll() is not None)
    made = []
    for party in [besiege(two, one, kinds, SECONDS) for kinds in PARTIES]:
        status, out, err = party.end(seconds=SECONDS + 60)
        assert (status, err) == (0, "")
        made.append(int(out))
    assert daemon.poll() is None
    turns = told(daemon, path)
    holders.stdin.close()
    status, out, err = holders.end(seconds=60)
    print("connections:", *made, "the longest turns, ms:", turns)
    assert (status, out.splitlines()[1:]) == (0, ["70 70 70"]), err
    assert "Traceback" not in daemon.err and "draining" not in daemon.err, daemon.err
    assert turns["plain"][-1] < TURN and turns["reporting"][-1] < REPORTING, turns
    assert min(made) > 30


def test_nothing_is_left_of_hostile_connections(hosts):
    """By tracemalloc, less what is cached; the first make the tables as large as they get."""
    one, two = hosts(2)
    daemon, path = wrapped_daemon(one, COUNTED)
    at_rest = len(os.listdir(f"/proc/{daemon.pid}/fd"))

    def assail(connections):
        for party in [besiege(two, one, kinds, connections=connections // len(PARTIES))
                      for kinds in PARTIES]:
            assert party.end(seconds=1000).status == 0
        wait_until(lambda: len(os.listdir(f"/proc/{daemon.pid}/fd")) <= at_rest, seconds=30)

    def size():
        total, places = told(daemon, path)
        print("bytes:", total, *places, sep="\n")
        return total

    assail(WARM_UP)
    before = min(size() for _ in range(5))  # some resources may not have ended yet
    assail(HOSTILE)
    wait_until(lambda: size() - before < LEFT, seconds=30)
    assert "Traceback" not in daemon.err


def test_the_parties_are_all_kinds():
    assert sorted(",".join(PARTIES).split(",")) == sorted(KINDS)
