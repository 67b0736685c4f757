"""One daemon per group: many hosts at once, losses, a parted network, strangers on the group."""
import fcntl
import re
import signal
import subprocess
import threading

import flomd
import pytest
from world import COUNT, PYTHON, ROOT, SOAK, chance, wait_until

GROUP = ("-A", "239.255.0.1")
GROUPS = (GROUP, ("-A", "ff02::1", "-n", "eth0"), ("-A", "ff05::28", "-n", "eth0"))
SIZE = COUNT.candidates
TURN = 'echo "$0" start >>"$1"; sleep 0.05; echo "$0" end >>"$1"'  # long enough to be seen


def turn(host, name):
    """A command whose overlap with another one is seen in the log."""
    return ["/bin/sh", "-c", TURN, name, host.log]


def took_turns(host, first, number):
    """Whether the log, from its line `first` on, shows that many commands one after the other."""
    lines = [line.split() for line in host.events()[first:]]
    pairs = list(zip(lines[::2], lines[1::2]))
    return len(pairs) == number and all(
        one[0] == other[0] and (one[1], other[1]) == ("start", "end") for one, other in pairs)


def daemons(hosts):
    """(host, pid) of all daemons, candidates included."""
    return [(host, pid) for host in hosts for pid in host.daemons()]


def one_left(hosts, seconds):
    """Waits until one daemon is left; its host and pid."""
    wait_until(lambda: len(daemons(hosts)) == 1, seconds)
    return daemons(hosts)[0]


def all_run(hosts, *options, seconds=60):
    """A command on every host at the same moment: they run one at a time."""
    first = len(hosts[0].events())
    clients = [host.flom(*options, "--", *turn(host, f"h{host.number}")) for host in hosts]
    for client in clients:
        assert client.end(seconds) == (0, "", "")
    assert took_turns(hosts[0], first, len(hosts)), hosts[0].events()[first:]


def serving(host, *options):
    """A daemon of the group in the foreground, once it serves."""
    daemon = host.flomd("-f", "--no-files", *host.address, *options)
    host.foreground.append(daemon)
    wait_until(lambda: "serving" in daemon.err or daemon.poll() is not None)
    assert daemon.poll() is None, daemon.err
    return daemon


def some_run(hosts, *options):
    """The same where TCP suffers, too: some may give up, but those that run do so in turn."""
    first = len(hosts[0].events())
    clients = [host.flom(*options, "--", *turn(host, f"h{host.number}")) for host in hosts]
    statuses = [client.end(60).status for client in clients]
    assert 0 in statuses and set(statuses) <= {0, 98, 99}
    print("ran under losses:", statuses.count(0), "of", len(hosts))
    assert took_turns(hosts[0], first, statuses.count(0)), hosts[0].events()[first:]


def test_hosts_at_the_same_moment(hosts):
    """Nobody knows anybody: one daemon serves, all commands run one at a time."""
    all_hosts = hosts(SIZE)
    for _ in range(COUNT.rounds if SOAK else 1):
        all_run(all_hosts, *GROUP, "-d", "5000")
        host, pid = one_left(all_hosts, 2)
        host.kill(pid)


class Flaps(threading.Thread):
    """While in the block, each host is unplugged now and then, so that three datagrams in ten
    between two hosts are lost (and other packets, too)."""
    UNPLUGGED = 0.163  # of the time: 1 - (1 - 0.163) ** 2 = 0.3
    PAUSE = 0.05  # s

    def __init__(self, network, size):
        super().__init__()
        self.ports, self.over = range(1, size + 1), threading.Event()
        self.ip = subprocess.Popen(network.enter(network.bridge) + ["ip", "-batch", "-"],
                                   stdin=subprocess.PIPE)
        self.chance = chance("flaps")

    def run(self):
        plugged = dict.fromkeys(self.ports, True)
        while not self.over.wait(self.PAUSE):
            for port in self.ports:
                wanted = self.chance.random() > self.UNPLUGGED
                if wanted != plugged[port]:
                    self._plug(port, wanted)
                plugged[port] = wanted
        for port in self.ports:
            self._plug(port, True)

    def _plug(self, port, plugged):
        self.ip.stdin.write(f"link set port{port} {'master switch' if plugged else 'nomaster'}\n"
                            .encode())
        self.ip.stdin.flush()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join(10)
        self.ip.communicate()
        assert self.ip.returncode == 0


def test_datagrams_are_lost(hosts):
    """One daemon is left within 8 s; after that no two commands overlap."""
    all_hosts = hosts(SIZE)
    for _ in range(COUNT.rounds if SOAK else 1):
        with Flaps(all_hosts[0].network, SIZE):
            first = [host.flom(*GROUP, "-d", "60000", "-I", "150", "-r", f"R{host.number}", "--",
                               "true") for host in all_hosts]
            assert [client.end(60).status for client in first] == [0] * SIZE
            one_left(all_hosts, 8)
            some_run(all_hosts, *GROUP, "-d", "0", "-D", "30", "-I", "150", "-o", "20000")
        host, pid = one_left(all_hosts, 2)
        host.kill(pid)


PART = ("ip link add name second type bridge mcast_snooping 0; ip link set second up; "
        "ip link set port3 master second && ip link set port4 master second")
HEAL = "ip link set port3 master switch && ip link set port4 master switch"


def part(host):
    host.network._do(host.network.bridge, PART)


def heal(host):
    host.network._do(host.network.bridge, HEAL)


def side(holder_host, waiter_host, name, group):
    """A daemon, a holder and a waiter on one side of the network."""
    daemon = serving(holder_host, *group)
    holder, gate = waiter_host.hold(name, *group, "-r", "R1", "-d", "0")
    waiter = holder_host.waiter(*group, "-r", "R1", "-d", "0", "--",
                                *holder_host.note(f"{name}.waiter"))
    return daemon, holder, gate, waiter


def one_drains(all_hosts, names, sides):
    """After the network was healed: the younger daemon drains, and nobody is cut off."""
    both = [daemon for daemon, _, _, _ in sides]
    wait_until(lambda: "draining" in both[1].err, seconds=15)
    wait_until(lambda: "another daemon" in both[0].err, seconds=8)
    assert "draining" not in both[0].err
    waiter = sides[1][3]
    wait_until(lambda: "asking again" in waiter.err)
    for _, holder, gate, _ in sides[::-1]:
        assert holder.poll() is None
        gate.open()
        assert holder.end() == (0, "", "")
    assert [waiter.end().status for _, _, _, waiter in sides] == [0, 0]
    assert both[1].wait(timeout=10) == 0 and both[0].poll() is None
    events = [line for line in all_hosts[0].events() if line.split(".")[0].split()[0] in names]
    a, b = names
    assert events[:4] == [f"{a} start", f"{b} start", f"{b} end", f"{a} end"]
    assert sorted(events[4:]) == [f"{a}.waiter", f"{b}.waiter"]
    both[0].terminate()
    assert both[0].wait(timeout=10) == 0


def test_a_network_parted_and_healed(hosts):
    """Two groups, each with a daemon on either side: one is left, its waiters and those of the
    other one run in the end."""
    one, two, three, four = all_hosts = hosts(4)
    for number in range(10 if SOAK else COUNT.heals // 2):
        part(one)
        all_sides = []
        for group, names in ((GROUPS[0], (f"a{number}", f"b{number}")),
                             (GROUPS[1], (f"c{number}", f"d{number}"))):
            all_sides.append((names, [side(one, two, names[0], group),
                                      side(three, four, names[1], group)]))
        heal(one)
        for names, sides in all_sides:
            one_drains(all_hosts, names, sides)


def test_a_draining_daemon_grants_nothing(hosts):
    """A writer that waits is sent away; the reader behind it is not granted in its place."""
    one, two, three, four = all_hosts = hosts(4)
    part(one)
    other, daemon = serving(one, *GROUP), serving(three, *GROUP)
    reader = (*GROUP, "-r", "R1", "-d", "0", "-l", "PR")
    holder, gate = four.hold("reader", *reader)
    writer = three.waiter(*GROUP, "-r", "R1", "-d", "0", "--", *three.note("writer"))
    late = four.waiter(*reader, "--", *four.note("late"))
    rival, rival_gate = two.hold("rival", *GROUP, "-r", "R1", "-d", "0")
    heal(one)
    wait_until(lambda: "draining" in daemon.err, seconds=15)
    for client in (writer, late):
        wait_until(lambda: "asking again" in client.err)
    for held in (gate, rival_gate):
        held.open()
    assert [client.end().status for client in (holder, rival, writer, late)] == [0] * 4
    assert not any("Traceback" in daemon.err for daemon in (daemon, other))
    one_left(all_hosts, 5)


def test_one_that_waits_for_its_last_client_drains_too(hosts):
    """Else it would go on granting to newcomers what the other daemon grants."""
    one, _, three, four = all_hosts = hosts(4)
    part(one)
    serving(one, *GROUP)
    daemon = serving(three, *GROUP)
    holder, gate = four.hold("holder", *GROUP, "-r", "R1", "-d", "0")
    daemon.send_signal(signal.SIGUSR1)
    wait_until(lambda: "when the last client has gone" in daemon.err)
    heal(one)
    wait_until(lambda: "draining" in daemon.err, seconds=15)
    gate.open()
    assert holder.end().status == 0 and daemon.end().status == 0
    one_left(all_hosts, 5)


# Strangers on the group

FLOM_DAEMON = """\
import socket, sys
sys.path.insert(0, {tests!r})
from fakes import FlomDaemon
daemon = FlomDaemon(tcp=({address!r}, 0), udp=("", 28015))
with daemon:
    daemon.listeners[-1].setsockopt(
        socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
        socket.inet_aton("239.255.0.1") + socket.inet_aton({address!r}))
    print("serving", flush=True)
    sys.stdin.read()
print(*daemon.deaths, file=sys.stderr)
"""


def flom_daemon(host):
    """FLoM's daemon, as far as fakes.py has it, on the group."""
    script = host.write("flom_daemon.py", FLOM_DAEMON.format(
        tests=f"{ROOT}/tests", address=host.ipv4))
    fake = host.start(*PYTHON, script, stdin=subprocess.PIPE)
    wait_until(lambda: "serving" in fake.out or fake.poll() is not None)
    return fake


def end(fake):
    """Ends a process that waits for the end of its input."""
    fake.stdin.close()
    assert fake.end() == (0, fake.out, "\n"), fake.err


def test_floms_daemon_was_there_first(hosts):
    """Clients use it; a daemon of ours steps back, without a word and with its own status."""
    one, two = hosts(2)
    fake = flom_daemon(one)
    daemon = two.flomd("-f", "--no-files", *GROUP, *two.address)
    assert daemon.end()[:2] == (3, "")
    assert two.run(*GROUP, "-d", "5000", "--", "echo", "x") == (0, "x\n", "")
    assert daemons([one, two]) == []
    end(fake)


def test_floms_daemon_comes_later(hosts):
    """Ours drains: its holder finishes, its waiter runs under FLoM's."""
    one, two = hosts(2)
    daemon = serving(two, *GROUP)
    holder, gate = one.hold("a", *GROUP, "-r", "R1", "-d", "0")
    waiter = two.waiter(*GROUP, "-r", "R1", "-d", "0", "--", *two.note("b"))
    fake = flom_daemon(one)
    wait_until(lambda: "draining" in daemon.err, seconds=15)
    assert waiter.end().status == 0 and holder.poll() is None
    gate.open()
    assert holder.end() == (0, "", "") and daemon.wait(timeout=10) == 0
    end(fake)


FORGER = """\
import re, socket, sys
forger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
forger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
forger.bind(("", 28015))
forger.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
                  socket.inet_aton("239.255.0.1") + socket.inet_aton({address!r}))
print("ready", flush=True)
while True:
    question, asker = forger.recvfrom(2048)
    if b"daemon=" in question and b'step="8"' in question:
        for ours in ('', ' daemon="0123456789abcdef" started="1"'):
            for network in {networks!r}:
                answer = (b'<?xml version="1.0" encoding="UTF-8" ?><msg level="3" verb="4" '
                          b'step="16"' + ours.encode() + b"><network " + network.encode() +
                          b"/></msg>")
                forger.sendto(answer, asker)
        print("answered", flush=True)
"""


def test_a_forged_answer_drains_nobody(hosts):
    """Answers with an older start: nobody there, the daemon's own address, no host at all."""
    one, two = hosts(2)
    daemon = serving(one, *GROUP)
    (_, port), = one.listening(daemon.pid)
    forger = two.start(*PYTHON, two.write("forger.py", FORGER.format(
        address=two.ipv4, networks=[
            f'address="{two.ipv4}" port="9"', f'address="{one.ipv4}" port="{port}"',
            'address="a..b" port="9"', 'address="" port="1"', 'address="&#10;x" port="1"'])))
    wait_until(lambda: "ready" in forger.out)
    holder, gate = one.hold("a", *GROUP, "-d", "0")
    wait_until(lambda: forger.out.count("answered") >= 2, seconds=15)
    wait_until(lambda: "another daemon answers" in daemon.err)
    two.kill(forger.pid)
    gate.open()
    assert holder.end() == (0, "", "")
    assert two.run(*GROUP, "-d", "0", "--", "echo", "x") == (0, "x\n", "")
    assert daemon.poll() is None
    assert "draining" not in daemon.err and "Traceback" not in daemon.err


OWN_ID = """\
import re, socket, sys
address, port = sys.argv[1], sys.argv[2]
forger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
forger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
forger.bind(("", 28015))
forger.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
                  socket.inet_aton("239.255.0.1") + socket.inet_aton(address))
print("ready", flush=True)
while True:
    question, asker = forger.recvfrom(2048)
    ident = re.search(b'daemon="([0-9a-f]+)"', question)
    if ident and b'step="8"' in question:
        for started in (b' started="1"', b""):
            forger.sendto(b'<?xml version="1.0" encoding="UTF-8" ?><msg level="3" verb="4" '
                          b'step="16" daemon="' + ident.group(1) + b'"' + started + b'><network '
                          b'address="" port="' + port.encode() + b'"/></msg>', asker)
        print("answered", flush=True)
"""


def test_its_own_id_is_never_another_daemon(hosts):
    """Whatever a datagram says that bears it; the answers come from the daemon's own host."""
    one, = hosts(1)
    daemon = serving(one, *GROUP)
    (_, port), = one.listening(daemon.pid)
    forger = one.start(*PYTHON, one.write("forger.py", OWN_ID), one.ipv4, str(port))
    wait_until(lambda: forger.out.count("answered") >= 2, seconds=15)
    one.kill(forger.pid)
    assert one.run(*GROUP, "-d", "0", "--", "echo", "x") == (0, "x\n", "")
    assert daemon.poll() is None and "another daemon" not in daemon.err


CANDIDATES = """\
import os, select, socket, sys
forger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
forger.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(sys.argv[1]))
print("ready", flush=True)
while True:
    ident = sys.argv[2] or os.urandom(8).hex()
    forger.sendto(b'<?xml version="1.0" encoding="UTF-8" ?><msg level="3" verb="4" step="8" '
                  b'daemon="' + ident.encode() + b'" started="0"></msg>', ("239.255.0.1", 28015))
    select.select([], [], [], 0.02)  # fifty a second
"""


@pytest.mark.parametrize("ident", ["0", ""], ids=["one", "many"])
def test_candidates_that_never_serve_keep_nobody_away(hosts, ident):
    """Forged, or ended before they served."""
    one, two = hosts(2)
    script = two.write("forger.py", CANDIDATES)
    forger = two.start(*PYTHON, script, two.ipv4, ident)
    wait_until(lambda: "ready" in forger.out)
    assert one.run(*GROUP, "-d", "5000", "--", "echo", "x") == (0, "x\n", "")
    two.kill(forger.pid)


# What a daemon of a group announces

def announced(host):
    """(address, port) in the answers that a client is given."""
    said = host.run("-V", *GROUP, "-d", "0", "--", "true").out
    return re.search('<network address="([^"]*)" port="([0-9]+)"/>', said).groups()


@pytest.mark.parametrize("options, address, port", [
    (["-a", "0.0.0.0", "-p", "40125"], "", "40125"), (["-p", "40125"], "", "40125"),
    (["-a", "10.77.0.1"], "10.77.0.1", "28015")])
def test_what_a_daemon_announces(hosts, options, address, port):
    """A wildcard is no address, and a port that is given is that of the daemon."""
    one, two = hosts(2)
    serving(one, *GROUP, *options)
    assert announced(two) == (address, port)
    assert two.run(*GROUP, "-d", "0", "--", "echo", "x") == (0, "x\n", "")


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1"])
def test_a_group_wants_no_loopback_address(box, address):
    done = box.flomd("--no-files", *GROUP, "-a", address).end()
    assert (done.status, done.out, done.err.count("\n")) == (99, "", 1)
    assert repr(address) in done.err


def test_two_daemons_of_a_group_on_one_host(hosts):
    """The second one steps back, and does not wait for the lock of the first."""
    one, = hosts(1)
    daemon = serving(one, *GROUP)
    for foreground in (["-f"], []):
        done = one.flomd(*foreground, "--no-files", *GROUP, *one.address)
        assert done.end()[:2] == (3, "")
    assert one_left([one], 5) == (one, daemon.pid)


@pytest.mark.parametrize("end", ["released", "another serves"])
def test_a_candidate_waits_for_the_lock_of_one_that_does_not_answer(hosts, end):
    """Until that one has ended, or another daemon serves the group."""
    one, two = hosts(2)
    name = f"flom-{flomd.login()}-239.255.0.1-28015.lock"
    with open(one.write(flomd.state_name("/tmp", name), "")) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        daemon = one.flomd("-f", "--no-files", *GROUP, *one.address)
        one.foreground.append(daemon)
        wait_until(lambda: "waiting for the daemon" in daemon.err)
        if end == "another serves":
            serving(two, *GROUP)
            assert daemon.wait(timeout=10) == 3
    if end == "released":
        wait_until(lambda: "serving" in daemon.err)
    one_left([one, two], 5)


def test_two_groups_on_one_port_of_one_host(hosts):
    """Two daemons and two lock spaces, and neither finds the other."""
    one, two = hosts(2)
    other_group = ("-A", "239.255.0.2")
    both = [serving(one, *group) for group in (GROUP, other_group)]
    holder, gate = two.hold("a", *GROUP, "-d", "0")
    assert two.run(*GROUP, "-d", "0", "-o", "0", "--", "true").status == 98
    assert two.run(*other_group, "-d", "0", "-o", "0", "--", "echo", "x") == (0, "x\n", "")
    gate.open()
    assert holder.end().status == 0
    assert not any("another" in daemon.err for daemon in both)


# Networks of another kind

@pytest.mark.parametrize("group", GROUPS[1:], ids=["link-local", "site-local"])
def test_ipv6_hosts_at_the_same_moment(hosts, group):
    all_hosts = hosts(2)
    all_run(all_hosts, *group, "-d", "5000")
    one_left(all_hosts, 2)


LISTENER = """\
import socket
listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
listener.bind(("", 28015))
listener.setsockopt(socket.IPPROTO_IP, 12, 1)  # IP_RECVTTL
listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
                    socket.inet_aton("239.255.0.1") + socket.inet_aton({address!r}))
print("ready", flush=True)
while True:
    _, additions, _, _ = listener.recvmsg(2048, 64)
    print("ttl", int.from_bytes(additions[0][2], "little"), flush=True)
"""


def test_the_ttl_of_questions(hosts):
    """That of the client's and that of the daemon's."""
    one, two = hosts(2)
    listener = one.start(*PYTHON, one.write("listener.py", LISTENER.format(address=one.ipv4)))
    wait_until(lambda: "ready" in listener.out)
    ask = ("-d", "0", "-D", "1", "-I", "1", "--", "true")
    assert two.run(*GROUP, *ask).status == 99
    wait_until(lambda: "ttl 1\n" in listener.out)
    assert two.run(*GROUP, "--discovery-ttl", "3", *ask).status == 99
    wait_until(lambda: "ttl 3\n" in listener.out)
    serving(two, *GROUP, "--discovery-ttl", "5")
    wait_until(lambda: listener.out.count("ttl 5\n") >= 4)
    one.kill(listener.pid)


def without_network(host):
    host.network._do(host.network.pids[host.number - 1], "ip link set eth0 down")


def test_a_host_without_a_route_for_multicast(hosts):
    """One line from the client; the daemon serves whoever will be able to ask."""
    one, = hosts(1)
    without_network(one)
    status, out, err = one.run(*GROUP, "--", "echo", "x")
    assert (status, out) == (99, "")
    assert err.count("\n") == 1
    assert "239.255.0.1" in err
    assert "Traceback" not in serving(one, *GROUP).err


def test_a_host_with_nothing_but_loopback(hosts):
    one, = hosts(1)
    without_network(one)
    group = (*GROUP, "-n", "lo")
    assert one.run(*group, "-d", "5000", "--", "echo", "x") == (0, "x\n", "")
    assert one.run(*group, "-d", "0", "--", "echo", "x") == (0, "x\n", "")


def timers(pid, table):
    """The active timers of the established connections of a process's host; 2: keepalive."""
    with open(f"/proc/{pid}/net/{table}") as file:
        rows = [line.split() for line in file.readlines()[1:]]
    return [int(row[5].split(":")[0]) for row in rows if row[3] == "01"]


@pytest.mark.parametrize("kind", ["IPv4", "IPv6"])
def test_keepalive_on_both_sides(hosts, kind):
    one, two = hosts(2)
    address, table = ((one.ipv4, "tcp"), (one.ipv6, "tcp6"))[kind == "IPv6"]
    daemon = serving(one, "-a", address)
    holder, gate = two.hold("a", "-a", address, "-d", "0")
    for pid in (daemon.pid, holder.pid):
        wait_until(lambda: timers(pid, table) == [2])  # until then: data not yet acknowledged
    gate.open()
    assert holder.end().status == 0
