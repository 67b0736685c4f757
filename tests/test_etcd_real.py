"""Daemons on three members of a real etcd, with faults, under the load of twenty clients.

`tox -e etcd` runs these; with FLOM_REQUIRE_ETCD=1 a missing etcd fails them.  Each fault prints a
row of a table (pytest -s), and appends it to the file that FLOM_ETCD_TABLE names.
"""
import collections
import json
import os
import re
import signal
import statistics
import sys
import time

import pytest
from etcd_load import serves_after
from etcd_world import (CLIENT_HOSTS, HOSTS, LOAD, PREFIX, TTL, Guarded, World, end_process,
                        missing)
from test_readme import block, bring, done, furnish
from world import PYTHON, ROOT, SOAK, chance, pass_time, read, wait_until

pytestmark = [pytest.mark.etcd, pytest.mark.in_time]

CLIENTS = 20
ROUNDS = 20 if SOAK else 1
HOLDERS = 100000 if SOAK else 10000
AGAIN = TTL + 3  # s within which everything works again
GRACE = TTL + 2 * TTL / 5 + 5 + 5 + TTL / 10  # s for which the next leader keeps a lock
RANDOM = 600  # s of faults by chance
HEAD = ("fault", "rounds", "s until served", "s until all", "longest wait", "statuses",
        "overlaps", "tokens back", "values twice")


@pytest.fixture
def etcd_hosts(hosts):
    """Those of the daemons, then those of the clients."""
    if missing():
        lack = f"no {' '.join(missing())} in PATH"
        (pytest.fail if os.environ.get("FLOM_REQUIRE_ETCD") == "1" else pytest.skip)(lack)
    return hosts(HOSTS + CLIENT_HOSTS)


@pytest.fixture
def world(etcd_hosts):
    made = World(etcd_hosts)
    yield made
    made.close()


@pytest.fixture
def guarded_world(etcd_hosts):
    """With certificates."""
    made = World(etcd_hosts, Guarded(etcd_hosts[0].folder))
    yield made
    made.close()


@pytest.fixture
def ended():
    """A list of processes that are ended with the test."""
    processes = []
    yield processes
    for process in processes:
        end_process(process)


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


def stop_members_by_turns(world, leader):
    """What was asked of one that is stopped, it obeys after another one has."""
    for member in list(world.members.values()) * 2:
        world.signal(member.process, signal.SIGSTOP)
        pass_time(1.5)
        world.signal(member.process, signal.SIGCONT)


def restart_etcd(world, leader):
    world.kill_etcd()
    start_dead_members(world, leader)


def nothing(world, leader):
    pass


def kill_host(world, leader):
    """Its daemon and its member at once."""
    world.kill_daemon(leader)
    world.members[leader].kill()


def start_host(world, leader):
    start_dead_members(world, leader)
    world.start_daemon(leader)


def kill_all(world, leader):
    world.kill_daemons()
    world.kill_etcd()


def start_all(world, leader):
    world.start_etcd()
    world.start_daemons()


def pull_cable_of_clients(world, leader):
    world.network.cut(world.client_hosts[0].number)


def plug_cable_of_clients(world, leader):
    world.network.heal(world.client_hosts[0].number)


def cut_clients_and_kill(world, leader):
    """The next leader cannot know that their commands have ended."""
    pull_cable_of_clients(world, leader)
    world.kill_daemon(leader)


def plug_clients_and_start(world, leader):
    plug_cable_of_clients(world, leader)
    world.start_daemon(leader)


# lasts: s from the fault until it is undone; outage: not everybody can be served before it is
# undone, and no command ends by itself meanwhile; statuses: those that flom may end with
Fault = collections.namedtuple("Fault", "do undo lasts outage statuses")
LOST = {0, 95}
FAULTS = {
    "leader killed": Fault(kill_leader, start_again, TTL + 1, False, {0}),
    "leader stopped for 2 ttl": Fault(stop_leader, continue_leader, 2 * TTL, False, {0}),
    "leader cut off from etcd": Fault(cut_from_etcd, heal_to_etcd, 2 * TTL, False, {0}),
    "leader's cables out": Fault(pull_cables, plug_cables, 2 * TTL, False, {0}),
    "leader's host dies": Fault(kill_host, start_host, TTL + 1, False, {0}),
    "all three hosts die": Fault(kill_all, start_all, 1, True, LOST),
    "etcd's leader killed": Fault(kill_etcd_leader, start_dead_members, TTL, False, {0}),
    # 99: one that has not spoken to a daemon gives up after 15 s
    "no quorum of etcd for 20 s": Fault(stop_quorum, continue_quorum, 20, True, LOST | {99}),
    "etcd's members stopped by turns": Fault(stop_members_by_turns, nothing, 0, False, {0}),
    "all of etcd restarted": Fault(restart_etcd, nothing, 0, False, LOST),
    "half of the clients cut off for 20 s": Fault(
        pull_cable_of_clients, plug_cable_of_clients, 20, True, LOST | {99}),
    "the same, and the leader killed": Fault(
        cut_clients_and_kill, plug_clients_and_start, GRACE + 2 * TTL, True, LOST | {99}),
}


# The table

class Row:
    """What one fault did, over its rounds."""

    def __init__(self, fault):
        self.fault, self.served, self.all, self.etcd = fault, [], [], []

    def without_etcd(self, times):
        """Without what etcd took to answer again, for which nobody here can do anything."""
        return [seconds - etcd for seconds, etcd in zip(times, self.etcd)]

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
    """Does a fault and undoes it; notes when somebody served again, and when everybody did: s from
    the fault, of an outage from when etcd answers again.  Of any other, notes when etcd does."""
    leader = world.await_leader()
    if fault.outage:
        world.keep()
    begun = time.monotonic()
    fault.do(world, leader)
    if not fault.outage:
        row.etcd.append(world.await_an_answer_of_etcd(leader))
        row.served.append(world.await_service(begun))
    pass_time(begun + fault.lasts - time.monotonic())
    fault.undo(world, leader)
    if fault.outage:
        world.await_etcd()
        begun = time.monotonic()
        world.let_go()
        row.etcd.append(0)
        row.served.append(world.await_service(begun))
    row.all.append(world.await_everybody(begun))


def must_hold(world, found, statuses):
    """What no fault may break; and flom may end with these statuses only."""
    assert (found.overlaps, found.tokens_back, found.twice) == ([], [], []), world.said()
    assert set(found.statuses) <= statuses, (found.statuses, world.errors(), world.said())


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
    must_hold(world, found, FAULTS[name].statuses)
    served, everybody = row.without_etcd(row.served), row.without_etcd(row.all)
    assert max(served) < AGAIN, (row.served, row.etcd, world.said())
    # who has lost his lock cannot tell the next leader that his command has ended
    kept = GRACE if FAULTS[name].outage else 0
    assert max(everybody) < AGAIN + TTL + kept, (row.all, row.etcd, world.said())


def test_etcd_is_wiped(world):
    """Nobody serves until somebody says that the cluster is a new one, which he may when those who
    held locks have lost them."""
    world.start()
    world.start_load(CLIENTS)
    world.await_everybody(time.monotonic())
    row = Row("etcd wiped and started again")
    world.keep()
    world.kill_etcd()
    for member in world.members.values():
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
    must_hold(world, found._replace(twice=[]), LOST | {99})  # numbers begin again
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
    must_hold(world, found, LOST | {99})


# What is promised without a fault

HANDED_OVER = 0.5  # s


def test_handing_over(world):
    """TERM to the leader: the next one serves at once, and nobody notices."""
    world.start()
    world.start_load(CLIENTS)
    world.await_everybody(time.monotonic())
    row = Row("hand-over")
    for _ in range(5):
        leader, begun = world.await_leader(), time.monotonic()
        world.daemons[leader].terminate()
        row.served.append(world.await_service(begun))
        row.all.append(world.await_everybody(begun))
        assert world.daemons[leader].end().status == 0, world.said()
        world.start_daemon(leader)
    found = world.end_load()
    row.write(found)
    must_hold(world, found, {0})
    assert statistics.median(row.served) < HANDED_OVER, row.served


@pytest.mark.parametrize("order", ["-x", "-X"])
def test_an_order_to_end_hands_over(world, order):
    leader = world.start()
    host, begun = world.hosts[leader - 1], time.monotonic()
    world.start_load(0)
    result = host.run("-a", host.ipv4, order, address=())
    assert (result.status, result.err) == (0, ""), result
    assert "this daemon ended; another one takes over" in result.out
    assert world.daemons[leader].end().status == 0
    world.await_service(begun)
    assert world.await_leader() != leader
    world.end_load()


def load_of(world, mode, clients, seconds):
    """Runs the load of the bench against the leader: its figures, and transactions meanwhile."""
    leader = world.await_leader()
    before = world.record()
    load = world.client_hosts[0].start(
        sys.executable, os.path.join(ROOT, "contrib", "bench", "lockload.py"), mode,
        f"{world.hosts[leader - 1].ipv4}:28015", str(clients), str(seconds), "own")
    status, out, err = load.end(seconds + 60)
    assert status == 0, (err, world.said())
    after = world.record()
    assert after["term"] == before["term"], world.said()
    return dict(word.split("=") for word in out.split()), after["n"] - before["n"]


def test_transactions_of_a_cycle(world):
    """A cycle costs two at most, beats aside, and many clients share them."""
    world.start()
    begun = time.monotonic()
    figures, made = load_of(world, "cycle", 1, 2)
    beats = (time.monotonic() - begun) / (TTL / 5) + 2
    print(f"1 client: {figures['per_s']} cycles/s, {made} transactions for {figures['cycles']}")
    assert made <= 2 * int(figures["cycles"]) + beats
    figures, made = load_of(world, "cycle", 64, 3)
    print(f"64 clients: {figures['per_s']} cycles/s, {made} transactions for {figures['cycles']}")
    assert int(figures["cycles"]) >= 10 * made


def test_many_holders_are_taken_over(world):
    """They are loaded, and released together when their grace is over, by one leader."""
    world.start()
    client = world.client_hosts[0]
    holder, gate = client.hold("one", "-a", world.addresses, "-d", "0", address=())
    key, = world.members[1].ask("get", "--prefix", f"{PREFIX}h/", "--keys-only").split()
    world.kill_daemons()
    filled = world.hosts[0].start(*PYTHON, LOAD, "fill", world.members[1].address(2379), PREFIX,
                                  key[len(PREFIX):], str(HOLDERS)).end(600)
    assert filled == (0, "", "")
    world.start_load(0)
    begun = time.monotonic()
    world.start_daemons()
    served = world.await_service(begun, 120)
    term, leader = world.record()["term"], world.await_leader()
    print(f"{HOLDERS} holders: served after {served:.1f} s")
    gate.open()
    assert holder.end(60).status == 0

    def held():
        report = client.run("-a", world.hosts[leader - 1].ipv4, "--status", "--json", address=())
        assert report.status == 0, (report, world.said())
        return sum(len(one["holders"]) for one in json.loads(report.out)["resources"]
                   if one["name"].startswith("held"))
    assert held() == HOLDERS
    wait_until(lambda: held() == 0, 120)
    assert world.record()["term"] == term, world.said()
    world.end_load()


# What etcd has lost, and what it has not

def run(world, *words, **options):
    """A client whose command prints its number of a sequence: its result."""
    return world.client_hosts[0].run(
        "-a", world.addresses, "-d", "0", "-i", "1h", "-r", "_s_x[1]", *words, "--", "echo",
        address=(), **options)


def known_revision(host):
    """The revision of etcd that the daemon of a host has noted (each few seconds)."""
    return int(re.search(r"^revision (\d+)$", read(host.path("cluster")), re.MULTILINE).group(1))


def test_older_data_is_not_used(world):
    """Etcd is set back to yesterday, with its cluster id.  Nobody serves, not even after a restart,
    until somebody says that this is the right one."""
    world.start()
    yesterday = world.members[1].revision()
    world.kill_etcd()
    for member in world.members.values():
        member.keep_data()
    world.start_etcd()
    world.await_etcd()
    assert [run(world, seconds=30).out for _ in range(3)] == ["1\n", "2\n", "3\n"]
    hosts = [world.hosts[number - 1] for number in world.daemons]
    wait_until(lambda: all(known_revision(host) > yesterday for host in hosts))
    world.kill_etcd()
    for member in world.members.values():
        member.put_back_data()
    world.start_etcd()
    world.await_etcd()
    lost = "etcd has lost what it knew"
    wait_until(lambda: all(lost in daemon.err for daemon in world.daemons.values()), 20)
    world.end_daemons()  # what is written each few seconds is written then
    world.start_daemons()
    wait_until(lambda: all(lost in daemon.err for daemon in world.daemons.values()), 20)
    pass_time(TTL + 1)
    assert "serving" not in "".join(daemon.err for daemon in world.daemons.values()), world.said()
    world.kill_daemons()
    world.start_daemons("--etcd-new-cluster")
    assert run(world, seconds=30).status == 0, world.said()


def test_no_space_and_the_cure(world):
    """The log tells it; what is held meanwhile is lost, since nobody can lead."""
    for member in world.members.values():
        member.settings = {"ETCD_QUOTA_BACKEND_BYTES": "16000000"}
    leader = world.start()
    glut = world.hosts[0].start(*PYTHON, LOAD, "glut", world.members[1].address(2379))
    assert "database space exceeded" in glut.end(60).err
    wait_until(lambda: "no longer serving" in world.daemons[leader].err, 20)
    assert "Cure: etcdctl compact" in world.daemons[leader].err
    world.compact()
    assert world.members[1].ask("alarm", "disarm") is not None
    world.start_load(0)
    assert world.await_service(time.monotonic()) < AGAIN
    world.end_load()


def test_compaction_is_not_noticed(world):
    world.start()
    term = world.record()["term"]
    world.start_load(CLIENTS)
    world.await_everybody(time.monotonic())
    world.compact()
    world.await_everybody(time.monotonic())
    must_hold(world, world.end_load(), {0})
    assert world.record()["term"] == term, world.said()


def test_members_of_etcd_come_and_go(world):
    """Its leadership moves, and that leader is removed and comes again with nothing."""
    world.start()
    world.start_load(CLIENTS)
    world.await_everybody(time.monotonic())
    world.move_etcd_leader()
    world.await_everybody(time.monotonic())
    world.replace(world.etcd_leader())
    world.await_etcd()
    world.await_everybody(time.monotonic())
    must_hold(world, world.end_load(), {0})


def test_a_group(world):
    """Clients that know the group alone find whoever leads; a daemon that serves the group without
    etcd lets its clients go, though it was there before."""
    group, host, client = ["-A", "239.255.0.1"], world.client_hosts[1], world.client_hosts[0]
    rival = host.flomd("-f", "--no-files", *group, "-a", host.ipv4, *host.address)
    wait_until(lambda: "serving" in rival.err)
    leader = world.start(*group)
    rival.wait(timeout=20)
    assert "quorum" in rival.err and "without quorum" in world.daemons[leader].err, rival.err
    assert client.run(*group, "-d", "0", "--", "true", address=()) == (0, "", "")
    world.kill_daemon(leader)
    wait_until(lambda: world.leader() not in (0, leader), 20)
    wait_until(lambda: "serving" in world.daemons[world.leader()].err)
    assert client.run(*group, "-d", "0", "--", "true", address=()) == (0, "", "")


# Certificates and passwords

def test_certificates_and_passwords(guarded_world):
    """The leader goes on when a member has forgotten who it is."""
    world = guarded_world
    world.start_etcd()
    world.await_etcd()
    world.guarded.enable_users(world.members[1])
    world.start_daemons(*world.guarded.of_flomd())
    world.await_leader()
    term, client = world.record()["term"], world.client_hosts[0]
    assert client.run("-a", world.addresses, "-d", "0", "--", "true", address=()) == (0, "", "")
    for member in world.members.values():
        member.kill()
        member.start()
        world.await_etcd()
    assert client.run("-a", world.addresses, "-d", "0", "--", "true", address=()) == (0, "", "")
    assert world.record()["term"] == term, world.said()


def test_a_certificate_with_a_common_name(guarded_world):
    """Etcd takes it for a user, and refuses it: the log says so, once."""
    world = guarded_world
    world.start_etcd()
    world.await_etcd()
    world.guarded.enable_users(world.members[1])
    daemon = world.start_daemon(1, *world.guarded.of_flomd("named"))
    wait_until(lambda: "CN" in daemon.err, 20)
    assert world.leader() == 0


# The recipe of README

def install_by_readme(host, ended):
    """Runs the eight commands on a host, which is one of a client, too; what systemctl would start
    is started."""
    bring(host)
    for folder in ("usr/local/bin", "etc/systemd/system", "etc/default"):
        os.makedirs(host.path(folder))
    for line in block("apt-get install -y etcd-server").text.splitlines():
        line = re.sub("/HERE/[0-9.]+/", f"/HERE/{host.ipv4}/", line)
        for prefix in ("/usr/local/", "/etc/"):
            line = line.replace(f" {prefix}", f" {host.folder}{prefix}")
            line = line.replace(f">{prefix}", f">{host.folder}{prefix}")
        done(host, line)
        if line.startswith("systemctl restart"):
            settings = settings_of(host, "etc/default/etcd")
            settings["ETCD_DATA_DIR"] = host.path("data")
            ended.append(host.start("etcd", env=settings))
        elif line.startswith("systemctl enable"):
            unit = read(host.path("etc/systemd/system/flomd-quorum.service"))
            words = re.search("(?m)^ExecStart=/usr/local/bin/flomd (.*)$", unit).group(1)
            options = settings_of(host, "etc/default/flomd-quorum")["FLOMD_OPTIONS"]
            words = words.replace("$FLOMD_OPTIONS", options).split()
            ended.append(host.flomd(*words, "--etcd-state", host.path("cluster")))
            host.foreground += ended[-2:]


def settings_of(host, name):
    """What a file in the manner of EnvironmentFile= sets."""
    found = re.findall('(?m)^([A-Z_]+)="?(.*?)"?$', read(host.path(name)))
    return dict(found)


def test_three_hosts_in_eight_commands(etcd_hosts, ended):
    """Then the host whose daemon leads is lost."""
    conf = block("[Daemon]\nUnicastAddress=10.77.0.1").text
    commands = block("flom -r backup -- backup.sh\n").text
    for host in etcd_hosts:
        furnish(host)
        host.write(".flom", conf + "\n")
    for host in etcd_hosts[:HOSTS]:
        install_by_readme(host, ended)
    one, two = etcd_hosts[HOSTS:]
    said = done(one, commands).out
    assert one.events().count("backup.sh") == 1 and "leader" in said, said
    leader = next(host for host in etcd_hosts if any(
        pair[1] == 28015 for process in host.processes if process.poll() is None
        for pair in host.listening(process.pid)))
    for process in leader.foreground:
        end_process(process)
    done(two, commands)
    assert two.events().count("backup.sh") == 2  # hosts share their log
