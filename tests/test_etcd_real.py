"""Daemons on three members of a real etcd, with faults, under the load of twenty clients.

`tox -e etcd` runs these; with FLOM_REQUIRE_ETCD=1 a missing etcd fails them.  Each fault prints a
row of a table (pytest -s), and appends it to the file that FLOM_ETCD_TABLE names.
"""
import collections
import os
import signal
import time

import pytest
from etcd_load import serves_after
from etcd_world import CLIENT_HOSTS, HOSTS, TTL, World, missing
from world import SOAK, chance, pass_time, wait_until

pytestmark = [pytest.mark.etcd, pytest.mark.in_time]

CLIENTS = 20
ROUNDS = 20 if SOAK else 1
AGAIN = TTL + 3  # s within which everything works again
RANDOM = 600  # s of faults by chance
HEAD = ("fault", "rounds", "s until served", "s until all", "longest wait", "statuses",
        "overlaps", "tokens back", "values twice")


@pytest.fixture
def world(hosts):
    if missing():
        lack = f"no {' '.join(missing())} in PATH"
        (pytest.fail if os.environ.get("FLOM_REQUIRE_ETCD") == "1" else pytest.skip)(lack)
    made = World(hosts(HOSTS + CLIENT_HOSTS))
    yield made
    made.close()


# The faults: what is done to a world whose leader has a number, and undone

def kill_leader(world, leader):
    world.kill_daemon(leader)


def start_again(world, leader):
    world.start_daemon(leader)


def stop_leader(world, leader):
    world.signal(world.daemons[leader], signal.SIGSTOP)


def continue_leader(world, leader):
    world.signal(world.daemons[leader], signal.SIGCONT)


def cut_from_etcd(world, leader):
    world.network.cut(leader, "back")


def heal_to_etcd(world, leader):
    world.network.heal(leader, "back")


def pull_cables(world, leader):
    world.network.cut(leader, "back")
    world.network.cut(leader)


def plug_cables(world, leader):
    world.network.heal(leader)
    world.network.heal(leader, "back")


def kill_etcd_leader(world, leader):
    world.members[world.etcd_leader()].kill()


def start_dead_members(world, leader):
    for member in world.members.values():
        if member.process.poll() is not None:
            member.start()


def stop_quorum(world, leader):
    """The leader of etcd stops, and one more."""
    first = world.etcd_leader()
    for number in (first, first % HOSTS + 1):
        world.signal(world.members[number].process, signal.SIGSTOP)


def continue_quorum(world, leader):
    for process in list(world.stopped):
        world.signal(process, signal.SIGCONT)


def restart_etcd(world, leader):
    for member in world.members.values():
        member.kill()
    start_dead_members(world, leader)


def nothing(world, leader):
    pass


# lasts: s from the fault until it is undone; outage: nobody can serve before it is undone, and no
# command ends by itself meanwhile
Fault = collections.namedtuple("Fault", "do undo lasts outage")
FAULTS = {
    "leader killed": Fault(kill_leader, start_again, TTL + 1, False),
    "leader stopped for 2 ttl": Fault(stop_leader, continue_leader, 2 * TTL, False),
    "leader cut off from etcd": Fault(cut_from_etcd, heal_to_etcd, 2 * TTL, False),
    "leader's cables out": Fault(pull_cables, plug_cables, 2 * TTL, False),
    "etcd's leader killed": Fault(kill_etcd_leader, start_dead_members, TTL, False),
    "no quorum of etcd for 20 s": Fault(stop_quorum, continue_quorum, 20, True),
    "all of etcd restarted": Fault(restart_etcd, nothing, 0, False),
}


# The table

class Row:
    """What one fault did, over its rounds."""

    def __init__(self, fault):
        self.fault, self.served, self.all = fault, [], []

    def write(self, found):
        """Prints the row, and appends it to the file."""
        statuses = ", ".join(f"{status}: {number}" for status, number in sorted(
            found.statuses.items(), key=str))
        cells = (self.fault, len(self.served), f"{max(self.served):.1f}", f"{max(self.all):.1f}",
                 f"{found.longest:.1f}", statuses, len(found.overlaps), len(found.tokens_back),
                 len(found.twice))
        lines = [f"| {' | '.join(map(str, cells))} |"]
        path = os.environ.get("FLOM_ETCD_TABLE")
        if path is None or not os.path.exists(path):
            lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"] + lines
        print("", *lines, sep="\n")
        if path is not None:
            with open(path, "a") as file:
                file.write("".join(f"{line}\n" for line in lines))


def one_round(world, fault, row):
    """Does a fault and undoes it; notes when somebody served again, and when everybody did."""
    leader = world.await_leader()
    if fault.outage:
        world.keep()
    begun = time.monotonic()
    fault.do(world, leader)
    if not fault.outage:
        row.served.append(world.await_service(begun))
    pass_time(begun + fault.lasts - time.monotonic())
    fault.undo(world, leader)
    if fault.outage:
        begun = time.monotonic()
        world.let_go()
        row.served.append(world.await_service(begun))
    row.all.append(world.await_everybody(begun))


def must_hold(world, found):
    """What no fault may break."""
    assert (found.overlaps, found.tokens_back, found.twice) == ([], [], []), world.said()
    assert set(found.statuses) <= {0, 95}, (found.statuses, world.errors(), world.said())


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault(world, name):
    world.start()
    world.start_load(CLIENTS)
    world.await_everybody(time.monotonic())
    row = Row(name)
    for _ in range(ROUNDS):
        one_round(world, FAULTS[name], row)
        world.await_everybody(time.monotonic())
    found = world.end_load()
    row.write(found)
    must_hold(world, found)
    assert max(row.served) < AGAIN, (row.served, world.said())


def test_etcd_is_wiped(world):
    """Nobody serves until somebody says that the cluster is a new one, which he may when those who
    held locks have lost them."""
    world.start()
    world.start_load(CLIENTS)
    world.await_everybody(time.monotonic())
    row = Row("etcd wiped and started again")
    world.keep()
    for member in world.members.values():
        member.kill()
        member.wipe()
    world.start_etcd()
    world.await_etcd()
    begun = time.monotonic()
    pass_time(2 * TTL)
    assert world.leader() == 0 and serves_after(world.found(), begun) is None, world.said()
    wait_until(lambda: not world.running_commands(), 30)
    world.let_go()
    begun = time.monotonic()
    for number in world.members:
        world.kill_daemon(number)
        world.start_daemon(number, "--etcd-new-cluster")
    row.served.append(world.await_service(begun))
    row.all.append(world.await_everybody(begun))
    found = world.end_load()
    row.write(found)
    assert (found.overlaps, found.tokens_back) == ([], []), world.said()
    assert set(found.statuses) <= {0, 95}, (found.statuses, world.errors(), world.said())
    assert max(row.served) < AGAIN, (row.served, world.said())


@pytest.mark.skipif(not SOAK, reason="takes ten minutes: FLOM_SOAK=1")
def test_faults_by_chance(world):
    """Not more than one at once, of which each may begin while the one before is not forgotten."""
    random, row = chance("faults"), Row("ten minutes of faults by chance")
    world.start()
    world.start_load(CLIENTS)
    until = time.monotonic() + RANDOM
    while time.monotonic() < until:
        name = random.choice(list(FAULTS))
        fault = FAULTS[name]._replace(lasts=random.uniform(0, 1.5 * FAULTS[name].lasts))
        one_round(world, fault, row)
        pass_time(random.uniform(0, TTL))
    found = world.end_load()
    row.write(found)
    must_hold(world, found)
