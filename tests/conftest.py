"""Fixtures: `box`, one host's folder and processes; `hosts(n)`, several hosts; see world.py.
`fake`: a daemon of ours that does what a test wants; see fakes.py.
"""
import os
import random
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from _pytest.runner import runtestprotocol

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

os.environ.setdefault("FLOM_SEED", str(random.SystemRandom().randrange(10 ** 9)))

from clock import let_time_fly  # noqa: E402
from fakes import OurDaemon  # noqa: E402
from network import Host, Network, Unavailable  # noqa: E402
from world import (  # noqa: E402
    AS_IS, CLAIMS, FLOM, PORTS, SEED, Boxes, claim, endpoint, forget_daemon, free_port, wait_until)

MOST_SECOND_TRIES = 2  # in a run
FIRST_FAILURES = []  # of the tests that were tried again: (name, text)


def sockets():
    """The sockets that this process has open, by their inodes."""
    found = set()
    for number in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else ():
        try:
            found.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:  # that of listdir
            pass
    return {name for name in found if name.startswith("socket:")}


def has_child():
    """Whether a child of this process lives, or has not been waited for."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


@pytest.fixture(autouse=True)
def nothing_left():
    """Fails a test after which a child, a thread or a socket of this process is still there; what
    runs in boxes they look after themselves.  SIGPIPE, to which flom gives its default action
    before it prints what was asked for, would end pytest in a later test: it is ignored again."""
    before, had_child, threads = sockets(), has_child(), threading.active_count()
    yield
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    wait_until(lambda: threading.active_count() <= threads, seconds=5)
    assert had_child or not has_child(), "a process was left behind"
    assert sockets() <= before, "a socket was left open"


@pytest.fixture
def flying_time(monkeypatch):
    """The loops of flomd in this process do not wait; see clock.py.  Before what makes them."""
    let_time_fly(monkeypatch)


@pytest.fixture
def boxes():
    boxes = Boxes()
    yield boxes
    boxes.close()


@pytest.fixture
def box(boxes):
    return boxes.make()


@pytest.fixture
def fake(box):
    """Makes an OurDaemon at the box's address, or with tcp=True at a TCP address of the box."""
    made = []

    def make(tcp=False, **options):
        if tcp:
            box.address = ("-a", "127.0.0.1", "-p", str(free_port()))
        made.append(OurDaemon(*endpoint(box.address), **options))
        return made[0]
    yield make
    for daemon in made:
        daemon.close()


@pytest.fixture
def hosts(boxes):
    """hosts(n): a list of n hosts of a network of their own; their log of events is one."""
    networks = []

    def make(size):
        try:
            networks.append(Network(size))
        except Unavailable as reason:
            lack = f"network namespaces cannot be had: {reason}"
            (pytest.fail if os.environ.get("FLOM_REQUIRE_NETNS") == "1" else pytest.skip)(lack)
        made = [boxes.make(f"h{n}", of=Host, network=networks[-1], n=n)
                for n in range(1, size + 1)]
        for host in made:
            host.log = made[0].log
        return made

    yield make
    try:
        boxes.close()
    finally:
        for network in networks:
            network.close()


def found_interpreters():
    """The minor versions of the Pythons 3.x in PATH, lowest first."""
    found = {sys.version_info[1]}
    for minor in range(6, 30):
        command = [f"python3.{minor}", "-c", ""]
        try:
            silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            if subprocess.call(command, **silent) == 0:
                found.add(minor)
        except OSError:
            pass
    return sorted(found)


def is_of_the_distribution():
    """Is this interpreter the one that is called /usr/bin/python3?"""
    name = os.path.basename(os.path.realpath("/usr/bin/python3"))
    return sys.base_prefix == "/usr" and name == f"python3.{sys.version_info[1]}"


def is_between():
    """In a matrix of interpreters: is this one neither the oldest, the newest nor the system's?"""
    if os.environ.get("FLOM_MATRIX") != "1" or is_of_the_distribution():
        return False
    found = found_interpreters()
    return found[0] < sys.version_info[1] < found[-1]


def pytest_configure(config):
    # a job in the background of a shell ignores INT and QUIT, one under nohup HUP; flom would, too
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTSTP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    config.flom_is_between = is_between()


def pytest_unconfigure():
    for port in PORTS:
        forget_daemon(port)
    if not AS_IS:
        shutil.rmtree(os.path.dirname(FLOM))


def to_run(items):
    """Those tests that no other process of together.py has claimed (by a file), from this one's
    own share of them on."""
    folder, job, jobs = os.environ["FLOM_CLAIMS"].split(":")
    start = len(items) * int(job) // int(jobs)
    for number in [*range(start, len(items)), *range(start)]:
        if claim(os.path.join(folder, str(number))):
            yield items[number]


def pytest_runtestloop(session):
    """As pytest's own loop, with to_run() in place of all."""
    if "FLOM_CLAIMS" not in os.environ or session.testsfailed or session.config.option.collectonly:
        return None
    rest = to_run(session.items)
    item = next(rest, None)
    while item is not None:
        following = next(rest, None)  # of which what they share is kept
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following
    return True


def may_try_again():
    """Whether one more of the second tries of this run, in all its processes, is left."""
    for number in range(MOST_SECOND_TRIES):
        if not CLAIMS and number >= len(FIRST_FAILURES):
            return True
        if CLAIMS and claim(os.path.join(CLAIMS, f"second-{number}")):
            return True
    return False


def is_exposed(item):
    """Does a busy machine decide when the parts of this test get their turn?"""
    return bool(item.get_closest_marker("processes") or item.get_closest_marker("in_time"))


def pytest_runtest_protocol(item, nextitem):
    """With FLOM_SECOND_TRY=1 a test that failed runs once more when it is_exposed(): on a shared
    machine a process may stand still for longer than a test allows, or at a place where its author
    has not thought of it.  The summary shows the first failure: it is to be mended."""
    if os.environ.get("FLOM_SECOND_TRY") != "1" or not is_exposed(item):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    failed = [report for report in reports if report.failed]
    if failed and may_try_again():
        FIRST_FAILURES.append((item.nodeid, failed[0].longreprtext))
        item._initrequest()
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_terminal_summary(terminalreporter):
    for name, text in FIRST_FAILURES:
        terminalreporter.write_sep("=", f"needed a second try: {name}")
        terminalreporter.write_line(text)


def pytest_report_header(config):
    without = ", without other processes" if config.flom_is_between else ""
    without += ", in several processes" if "FLOM_CLAIMS" in os.environ else ""
    return f"flom: the whole suite{without}, user {os.geteuid()}, FLOM_SEED={SEED}"


def pytest_collection_modifyitems(config, items):
    for item in items:
        if {"boxes", "box", "hosts"} & set(item.fixturenames):
            item.add_marker(pytest.mark.processes)
        if item.get_closest_marker("etcd") and os.environ.get("FLOM_ETCD") != "1":
            item.add_marker(pytest.mark.skip(reason="`tox -e etcd` runs it"))
    if config.flom_is_between:
        dropped = [item for item in items if item.get_closest_marker("processes")]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]
