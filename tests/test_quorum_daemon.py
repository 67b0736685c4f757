"""Daemons of a quorum: their options, their terms, as real processes on a fake etcd."""
import gc
import json
import os
import re
import signal
import socket
import time
import types

import flom
import flomd
import pytest

from certificates import Certificates
from fake_etcd import AFTER_503, CLUSTER_ID, NO_SPACE, FakeEtcd
from fakes import FlomClient, b64
from world import (
    COUNT, FLOMD, SOAK, can_connect, endpoint, free_port, pass_time, patched, read, wait_until)

pytestmark = pytest.mark.in_time  # terms of 5 s

GOOD = {
    "EtcdUrls": "http://10.0.0.1:2379,https://[::1]:2379",
    "EtcdPrefix": "/flom/x/",
    "UnicastAddress": "10.0.0.9",
}


def problems(**texts):
    """What is wrong with these settings of a daemon, None: not set."""
    examined = flomd.Examined(Lifespan=-1)
    for setting in flomd.SETTINGS:
        text = dict(GOOD, **texts).get(setting.key)
        if text is not None:
            examined.set(setting, [text], f"--{setting.long}")
    examined.examine(flomd.check_quorum)
    return examined.problems


# Options

@pytest.mark.parametrize("texts", [
    {}, {"MulticastAddress": "239.255.0.1"}, {"UnicastAddress": "db1"},
    {"EtcdUser": "u", "EtcdPasswordFile": "f"}, {"EtcdUrls": None, "EtcdPrefix": None},
    {"EtcdTtl": "5s", "EtcdCompact": "yes", "EtcdState": "f"}])
def test_options_that_go_together(texts):
    assert problems(**texts) == []


@pytest.mark.parametrize("texts, option", [
    ({"UnicastAddress": None}, "--etcd: wants --unicast-address"),
    ({"EtcdPrefix": None}, "--etcd: wants --etcd-prefix"),
    ({"SocketName": "/tmp/s"}, "--socket-name: not together with --etcd: "),
    ({"StateDir": "/tmp/s"}, "--state-dir: not together with --etcd: "),
    ({"RecoveryWindow": "0"}, "--recovery-window: not together with --etcd: "),
    ({"UnicastAddress": "h1,h2"}, "--unicast-address: 'h1,h2' is not "),
    ({"UnicastAddress": "0.0.0.0"}, "--unicast-address: '0.0.0.0' is not "),
    ({"UnicastAddress": "::"}, "--unicast-address: '::' is not "),
    ({"UnicastAddress": "0"}, "--unicast-address: '0' is not "),
    ({"UnicastAddress": "::ffff:0.0.0.0"}, "--unicast-address: '::ffff:0.0.0.0' is not "),
    ({"EtcdUser": "u"}, "--etcd-user: "), ({"EtcdPasswordFile": "u"}, "--etcd-password-file: "),
    ({"EtcdCertificate": "u"}, "--etcd-certificate: "),
    ({"EtcdUrls": None}, "--etcd-prefix: wants --etcd")])
def test_options_that_do_not(texts, option):
    found = problems(**texts)
    assert len(found) == 1 and found[0].startswith(option)


def test_sockets_of_an_init_system_are_refused(monkeypatch):
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    found = problems()
    assert len(found) == 1 and "LISTEN_FDS" in found[0]


def test_no_client_hands_them_on():
    """A client that starts a daemon of its own would start a rival."""
    keys = [setting for setting in flom.SETTINGS if setting.group == "Quorum"]
    assert len(keys) == 10
    assert {setting.users for setting in keys} == {flom.DAEMON}


@pytest.mark.processes
def test_check_config_tells_all_of_them(box):
    result = box.flomd("--check-config", "--no-files", "--etcd", "http://h", "-s", "x",
                       "--state-dir", "y", "--etcd-user", "z").end()
    assert result.status == 99 and len(result.err.splitlines()) == 5
    result = box.flomd("--no-files", "--etcd", "http://u@h").end()
    assert result.status == 99 and "--etcd: 'http://u@h' is not http or https URLs" in result.err


# The address

class Address:
    """The address of a daemon of a quorum, on a loop."""

    def __init__(self):
        self.loop, self.came = flomd.Loop(None), []
        bound = flomd.bound_socket("127.0.0.1", free_port(), None)
        self.listener = flomd.TermListener(self.loop, None, bound, None)
        self.address = self.listener.address

    def welcome(self, connection, peer):
        self.came.append(connection)

    def begin(self):
        self.listener.begin(self.welcome)

    def connect(self):
        return socket.create_connection(self.address)

    def is_free(self):
        """Whether another process could serve there, too."""
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                other.bind(self.address)
                other.listen()
            except OSError:
                return False
            return True

    def close(self):
        for connection in self.came:
            connection.close()
        self.listener.leave()


@pytest.fixture
def address():
    made = Address()
    yield made
    made.close()


def test_a_candidate_refuses_clients_and_keeps_its_address(address):
    assert not address.is_free()
    with pytest.raises(ConnectionRefusedError):
        address.connect()


def test_it_listens_while_it_leads_and_again(address):
    for number in range(1, 4):
        address.begin()
        with address.connect() as client:
            address.loop._turn(1)
            assert len(address.came) == number and not address.is_free()
            address.came[-1].close()  # first, so that the system remembers this end
            assert client.recv(1) == b""
        address.listener.close()
        assert not address.is_free()
        with pytest.raises(ConnectionRefusedError):
            address.connect()


def test_who_was_not_accepted_is_reset(address):
    address.begin()
    with address.connect() as client:
        address.listener.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_daemon_that_is_started_again_has_its_address(address):
    address.begin()
    with address.connect() as client:
        address.loop._turn(1)
        address.came[0].close()
        assert client.recv(1) == b""
    address.listener.leave()
    bound = flomd.bound_socket(*address.address, None)
    address.listener = flomd.TermListener(address.loop, None, bound, None)


# Daemons

TTL = 5  # s, the least that there is
RECORD = flomd.Record(1, "", 0, "0a0b0c0d", 5000, 17500, 0, "fair", "f", "10.9.9.9:1", "h", 7)
PREFIX = "/flom/x/"


class Quorum:
    """Daemons at 127.0.0.1, 127.0.0.2 … and one port, with a fake etcd between them."""

    def __init__(self, box, members=3, **options):
        self.box, self.etcd = box, FakeEtcd(members, **options)
        self.port, self.daemons = free_port(), {}
        self.name = f"q{self.port}"

    def start(self, number, *options, program=(FLOMD,), **more):
        """Starts one in the foreground; its pid file is there when it is a candidate."""
        ready = self.box.path(f"{self.name}.{number}.pid")
        daemon = self.box.flomd(
            "-f", "--no-files", "-a", f"127.0.0.{number}", "-p", str(self.port), "--etcd",
            ",".join(self.etcd.urls), "--etcd-prefix", PREFIX, "--etcd-ttl", f"{TTL}s",
            "--etcd-state", self.box.path(f"{self.name}.{number}.cluster"), "--pid-file", ready,
            *options, program=program, **more)
        self.box.foreground.append(daemon)
        self.daemons[number] = daemon
        return daemon

    def record(self):
        return json.loads(self.etcd.keys.get(PREFIX + "leader", "{}"))

    def leader(self):
        """The number of the daemon that the record names, if it accepts clients; 0: none."""
        record = self.record()
        for number in self.daemons:
            leads = record.get("term") and record["address"] == f"127.0.0.{number}:{self.port}"
            if leads and can_connect(self.at(number)):
                return number
        return 0

    def await_leader(self, *numbers, seconds=10):
        """The number of the leader, when it is one of these."""
        return wait_until(lambda: self.leader() in (numbers or self.daemons) and self.leader(),
                          seconds)

    def at(self, number):
        """The options of a client of one daemon."""
        return "-a", f"127.0.0.{number}", "-p", str(self.port)

    def everywhere(self):
        """Those of a client that knows all of them."""
        hosts = ",".join(f"127.0.0.{number}" for number in self.daemons)
        return "-a", hosts, "-p", str(self.port)

    def said(self, number):
        return self.daemons[number].err

    def kill(self, number):
        self.box.kill(self.daemons[number].pid)
        del self.daemons[number]

    def end(self, number):
        """Ends one in good order; s that it took."""
        daemon, begun = self.daemons.pop(number), time.monotonic()
        daemon.terminate()
        assert daemon.end().status == 0
        return time.monotonic() - begun

    def status(self, number):
        """The report of one as text."""
        with FlomClient(*endpoint(self.at(number))) as client:
            client.socket.sendall(flom.status_request("flom.py"))
            data = b""
            while not data.endswith(flom.END):
                data += client.socket.recv(65536)
            return data.decode()

    def head(self, number):
        """The attributes of the element daemon in its report."""
        found = re.search("<daemon ([^>]*)/>", self.status(number)).group(1)
        return dict(re.findall('([a-z]+)="([^"]*)"', found))

    def holders(self):
        """The texts of the holders in etcd, by their tokens."""
        begin = PREFIX + "h/"
        return {int(key[len(begin):], 16): text for key, text in self.etcd.keys.items()
                if key.startswith(begin)}

    def close(self):
        for daemon in self.daemons.values():
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGCONT)
                daemon.terminate()
        for daemon in self.daemons.values():
            daemon.wait(timeout=10)
        for member in self.etcd.members:
            member.close()


@pytest.fixture
def quorums(box):
    """Makes quorums in the box."""
    made = []

    def make(*numbers, members=3, **options):
        made.append(Quorum(box, members, **options))
        for number in numbers:
            made[-1].start(number)
        return made[-1]
    yield make
    for quorum in made:
        quorum.close()


@pytest.mark.processes
def test_one_serves_and_the_next_one_takes_over_when_it_hands_over(box, quorums):
    quorum = quorums(1, 2, 3)
    first = quorum.await_leader()
    holder, gate = box.hold("a", "-r", "R", address=quorum.everywhere())
    head = quorum.head(first)
    assert head["memory"] == "etcd" and head["role"] == "leader"
    assert head["term"] == quorum.record()["term"] and int(head["members"]) >= 1
    assert 0 <= int(head["latency"]) < 1000 and 0 < int(head["left"]) <= 4500
    held, = quorum.holders()
    ended = quorum.end(first) + time.monotonic()
    second = quorum.await_leader()
    assert second != first and ended < 1 + time.monotonic()
    assert box.run("-r", "R", "-o", "0", "--", "true", address=quorum.at(second)).status == 98
    wait_until(lambda: 'absent="1"' not in quorum.status(second))
    assert list(quorum.holders()) == [held]
    # an order, and a signal, end it in the same way
    result = box.run("-X", address=quorum.at(second))
    assert result.status == 0
    assert quorum.daemons.pop(second).end().status == 0
    third = quorum.await_leader()
    gate.open()
    assert holder.end() == (0, "", "")
    wait_until(lambda: quorum.holders() == {})
    quorum.daemons[third].send_signal(signal.SIGUSR1)
    assert quorum.daemons.pop(third).end().status == 0
    assert quorum.record()["term"] == ""


@pytest.mark.processes
def test_how_long_a_change_takes(quorums):
    """From TERM to the next one that listens: the median of three."""
    quorum, times = quorums(1, 2), []
    for _ in range(3):
        leader = quorum.await_leader()
        other = 3 - leader
        wait_until(lambda: "leads, at" in quorum.said(other))
        begun = time.monotonic()
        quorum.daemons[leader].terminate()
        quorum.await_leader(other)
        times.append(time.monotonic() - begun)
        assert quorum.daemons.pop(leader).end().status == 0
        quorum.start(leader)
        wait_until(lambda: "leads, at" in quorum.said(leader))
    assert sorted(times)[1] < 0.5


@pytest.mark.processes
def test_what_can_befall_a_leader(box, quorums):
    """Killed; stopped and continued after another one leads; without etcd for longer than it may
    be.  All at once, since each takes as long as the ttl."""
    killed, stopped, alone = quorums(1, 2), quorums(1, 2), quorums(1)
    all_three = killed, stopped, alone
    first = [quorum.await_leader() for quorum in all_three]
    holders = [box.hold(quorum.name, "-r", "R", address=quorum.everywhere())
               for quorum in all_three]
    for quorum in all_three:
        assert box.run("-r", "_s_n[9]", "-i", "1h", "--", "true",
                       address=quorum.everywhere()).status == 0
    held = [max(quorum.holders()) for quorum in all_three]
    begun = time.monotonic()
    killed.kill(first[0])
    stopped.daemons[first[1]].send_signal(signal.SIGSTOP)
    for member in alone.etcd.members:
        member.pause()
    wait_until(lambda: not can_connect(alone.at(first[2])), 10)
    assert 3.4 < time.monotonic() - begun < TTL + 2
    assert "lost etcd for" in alone.said(1) and "another daemon takes over" in alone.said(1)
    for member in alone.etcd.members:
        member.resume()
    for quorum, before in zip((killed, stopped), first):
        quorum.await_leader(3 - before, seconds=15)
    assert 3.4 < time.monotonic() - begun < TTL + 3
    alone.await_leader()
    pass_time(max(0, begun + (2 * TTL if SOAK else 0) - time.monotonic()))
    stopped.daemons[first[1]].send_signal(signal.SIGCONT)
    wait_until(lambda: "no longer serving" in stopped.said(first[1]))
    assert not can_connect(stopped.at(first[1]))
    for quorum, token in zip(all_three, held):
        leader = quorum.await_leader()
        wait_until(lambda: 'absent="1"' not in quorum.status(leader))
        assert list(quorum.holders()) == [token]
        number = box.run("-r", "_s_n[9]", "--", "echo", address=quorum.at(leader))
        assert number == (0, "2\n", "")
    for holder, gate in holders:
        gate.open()
        status, out, err = holder.end()
        assert (status, out) == (0, "") and err.endswith("the lock on R is held again\n")


@pytest.mark.processes
def test_what_etcd_can_do_to_a_leader(box, quorums):
    """An answer that comes after all; none at all, when it is to end; a cluster that is another
    one, or was built anew."""
    unsure, other, wiped = quorums(1), quorums(1, members=1), quorums(1)
    for quorum in (unsure, other, wiped):
        quorum.await_leader()
    term = unsure.record()["term"]
    for member in unsure.etcd.members:
        member.misbehave(AFTER_503, 2)
    assert box.run("-r", "R", "--", "true", address=unsure.at(1)).status == 0
    wait_until(lambda: not any(member.faults for member in unsure.etcd.members))
    assert unsure.record()["term"] == term and unsure.holders() == {}
    assert "trouble" not in unsure.head(1)
    for member in unsure.etcd.members:
        member.pause()
    unsure.daemons[1].terminate()
    other.etcd.members[0].cluster_id = 77
    wiped.etcd.wipe()
    wait_until(lambda: "etcd is another cluster, 77 in place of" in other.said(1))
    wait_until(lambda: "etcd has lost what it knew" in wiped.said(1))
    for quorum in (other, wiped):
        wait_until(lambda: not can_connect(quorum.at(1)))
    wiped.end(1)
    wiped.start(1)  # it has noted which cluster it was
    wait_until(lambda: "this daemon does not claim" in wiped.said(1))
    assert wiped.etcd.keys == {}
    wiped.end(1)
    wiped.start(1, "--etcd-new-cluster")
    wiped.await_leader()
    assert unsure.daemons[1].end(4).status == 0
    assert "etcd does not answer; another daemon serves in 5 s" in unsure.said(1)
    assert unsure.record()["term"] == term


@pytest.mark.processes
def test_what_is_left_to_others(quorums):
    """A record of a newer layout; an etcd that can lose data."""
    losing, quorum = quorums(1, version="3.5.1"), quorums()
    free = flomd.text_of(RECORD._replace(v=2))
    quorum.etcd.put(PREFIX + "id", "00112233445566aa")
    quorum.etcd.put(PREFIX + "leader", free)
    quorum.start(1)
    wait_until(lambda: "newer layout 2; this daemon does not claim" in quorum.said(1))
    assert quorum.etcd.keys[PREFIX + "leader"] == free
    wait_until(lambda: "etcd 3.5.1 can lose data after a crash" in losing.said(1))
    assert losing.etcd.keys == {}


@pytest.mark.processes
def test_people_are_told_who_leads(box, quorums):
    """In the log, to the init system and in the figures; and that daemons differ."""
    figures = [box.path("figures1"), box.path("figures2")]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as init:
        init.bind(box.path("init"))
        init.settimeout(10)
        quorum = quorums()
        quorum.start(1, "--metrics", figures[0], env={"NOTIFY_SOCKET": box.path("init")})
        told = [init.recv(4096).decode() for _ in range(3)]
        quorum.await_leader()
        quorum.start(2, "--metrics", figures[1], "--policy", "first-fit", "--etcd-ttl", "6s")
    os.unlink(box.path("init"))
    assert told[0] == "STATUS=candidate; etcd tells of no leader" and "READY=1" in told[:2]
    told.remove("READY=1")
    assert re.match("STATUS=leader, term [0-9a-f]{16}; 3 members of etcd answer in ", told[1])
    wait_until(lambda: "leads with ttl 5000, and this daemon would with 6000" in quorum.said(2))
    assert "leads with policy fair, and this daemon would with first-fit" in quorum.said(2)
    assert f"leads, at 127.0.0.1:{quorum.port}, in cluster {CLUSTER_ID}" in quorum.said(2)
    wait_until(lambda: "flomd_leads 1\n" in read(figures[0]))
    assert 'flomd_leader{host="' in read(figures[0])
    assert "flomd_etcd_trouble 0\n" in read(figures[0])
    wait_until(lambda: os.path.exists(figures[1]) and "flomd_leads 0\n" in read(figures[1]))


BROKEN = """
def restoring(*_, **more):
    yield
    raise TypeError
flomd.restoring = restoring
"""


@pytest.mark.processes
def test_nobody_serves_with_a_memory_that_cannot_be(box, quorums):
    quorum = quorums(1)
    quorum.await_leader()
    holder, gate = box.hold("a", "-r", "R", address=quorum.everywhere())
    token, = quorum.holders()
    text = quorum.holders()[token]
    quorum.etcd.put(f"{PREFIX}h/{token + 1:016x}", text)  # excludes the first
    quorum.end(1)
    quorum.start(1)
    quorum.start(2, program=patched(BROKEN))
    for number in (1, 2):
        wait_until(lambda: "is damaged" in quorum.said(number))
    wait_until(lambda: quorum.record()["term"] == "")
    assert "is damaged: a bug; not to serve" in quorum.said(2)
    assert quorum.leader() == 0 and len(quorum.holders()) == 2
    gate.open()
    box.kill(holder.pid)


def test_what_is_restored_does_not_hold_up_the_loop(request):
    """Where nothing can go Python does not look; when a term is over it does."""
    looked = []

    def look(phase, about):
        if phase == "start":
            looked.append(about["generation"])

    def steps():
        for number in range(100):
            made.extend([number] for _ in range(1000))
            yield

    made = []
    frozen = getattr(gc, "get_freeze_count", int)
    before = frozen()  # Python 3.12 has some of its own
    gc.callbacks.append(look)
    request.addfinalizer(lambda: gc.callbacks.remove(look))
    for _ in flomd.kept_from_collector(steps()):
        assert not looked
    assert len(made) == 100000 and gc.isenabled()
    flomd.collect()
    assert looked[-1] == 2
    assert frozen() <= before
    unfinished = flomd.kept_from_collector(iter([None]))
    next(unfinished)
    assert not gc.isenabled()
    unfinished.close()
    assert gc.isenabled()


@pytest.mark.processes
def test_many_holders_are_taken_over(quorums):
    """Without losing the leadership, which their number could cost."""
    quorum = quorums()
    for number in range(COUNT.taken_over):
        token = (1 << 32) + number
        quorum.etcd.put(f"{PREFIX}h/{token:016x}", (
            f'name="{b64(f"R{number}")}" boot="1.000000" since="1789984800.000000" '
            f'peer="10.0.0.1:48" mode="5" grace="17500" client="1" id="{number:016x}"'))
    quorum.etcd.put(PREFIX + "id", "00112233445566aa")
    quorum.etcd.put(PREFIX + "leader", flomd.text_of(RECORD._replace(epoch=9)))
    quorum.start(1)
    quorum.await_leader(seconds=60)
    assert f"{COUNT.taken_over} holders were taken over" in quorum.said(1)
    assert quorum.said(1).count("serving") == 1 and "no longer" not in quorum.said(1)
    wait_until(lambda: quorum.record()["epoch"] > 9)


@pytest.mark.processes
def test_a_candidate_is_ready_whether_etcd_is_there_or_not(box):
    port, pid_file = free_port(), box.path("pid")
    done = box.flomd("--no-files", "-a", "127.0.0.1", "-p", str(port), "--etcd",
                     f"http://127.0.0.1:{free_port()}", "--etcd-prefix", PREFIX, "--pid-file",
                     pid_file, "--etcd-state", box.path("cluster"), "--log", box.path("dlog"))
    assert done.end() == (0, "", "")
    second = box.flomd("-f", "--no-files", "-a", "127.0.0.1", "-p", str(port), "--etcd",
                       "http://127.0.0.1:1", "--etcd-prefix", PREFIX, "--etcd-state",
                       box.path("other")).end()
    assert second.status == 1 and "Address already in use" in second.err
    box.kill(int(read(pid_file)), signal.SIGTERM)
    assert "candidate at" in read(box.path("dlog")) and "ended" in read(box.path("dlog"))


@pytest.mark.processes
def test_a_certificate_that_is_being_replaced_when_a_leader_is_deposed(box, quorums):
    """It cannot serve without, so it does not claim; it can as soon as the files are whole."""
    folder = box.path("certificates")
    os.mkdir(folder)
    certificates = Certificates(folder)
    quorum = quorums()
    quorum.start(1, *certificates.options())
    quorum.await_leader()
    whole = read(certificates.pem("good"))
    box.write("certificates/good.pem", "")
    free = flomd.text_of(RECORD)
    quorum.etcd.put(PREFIX + "leader", free)
    wait_until(lambda: "this daemon does not claim" in quorum.said(1))
    assert quorum.etcd.keys[PREFIX + "leader"] == free
    box.write("certificates/good.pem", whole)
    quorum.await_leader()
    assert quorum.said(1).count("this daemon does not claim") == 1


def test_trouble_is_told_once_when_it_lasts_whatever_its_numbers():
    class Log:
        lines = []

        def error(self, text):
            self.lines.append(text)

    notices = flomd.Notices(None, Log())
    seen = types.SimpleNamespace(record=None)
    for tick in range(30):
        seen.trouble = f"etcd has lost what it knew, it is at revision {tick}"
        notices.see(seen, types.SimpleNamespace(boot=tick / 5))
    assert Log.lines == ["etcd has lost what it knew, it is at revision 5; this daemon does not "
                         "claim"]
    for tick in range(30, 40):
        seen.trouble = "another" if tick % 2 else ""
        notices.see(seen, types.SimpleNamespace(boot=tick / 5))
    assert len(Log.lines) == 1


def candidate(**fields):
    """What is asked for here of a daemon that waits, and sees a record with these fields."""
    return types.SimpleNamespace(trouble="", record=RECORD._replace(term="a" * 16, **fields))


@pytest.fixture
def notices():
    """Of a daemon d; what it tells is its `lines`."""
    lines = []
    log = types.SimpleNamespace(info=lines.append, error=lines.append)
    mine = RECORD._replace(daemon="d", version="1.5")
    made = flomd.Notices(flomd.Quorum(PREFIX, mine, flomd.Cluster("7"), None, None), log)
    made.lines = lines
    return made


def test_who_was_deposed_does_not_tell_of_its_own_record(notices):
    notices.see(candidate(daemon="d"), flomd.Moment())
    assert notices.lines == []
    notices.see(candidate(daemon="e", host="h2"), flomd.Moment())
    assert notices.lines == []  # the same term
    other = candidate(daemon="e", host="h2")
    other.record = other.record._replace(term="b" * 16)
    notices.see(other, flomd.Moment())
    assert notices.lines == [f"h2 leads, at 10.9.9.9:1, in cluster 7, term {'b' * 16}"]


@pytest.mark.parametrize("version, number", [("", 0), ("1.5", 0), ("1.4", 1)])
def test_another_version_is_told(notices, version, number):
    notices.see(candidate(version=version), flomd.Moment())
    assert len(notices.lines) == 1 + number
    assert all("leads with version 1.4, and this daemon has 1.5" in line
               for line in notices.lines[1:])


@pytest.mark.processes
def test_people_are_told_when_changes_are_refused_and_when_it_is_over(box, quorums):
    """Each once, though the record can be read all the while; of another's record, too."""
    quorum = quorums(1)
    quorum.await_leader()
    for member in quorum.etcd.members:
        member.misbehave(NO_SPACE, 10 ** 4)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as init:
        init.bind(box.path("init"))
        init.settimeout(20)
        quorum.start(2, env={"NOTIFY_SOCKET": box.path("init")})
        wait_until(lambda: "no longer serving" in quorum.said(1), 20)
        told = []
        while len(told) < 12 and "database space exceeded" not in "".join(told[-1:]):
            told.append(init.recv(4096).decode())
    os.unlink(box.path("init"))
    assert "database space exceeded" in told[-1]  # it claims, and is refused
    asked = len(quorum.etcd.asked)
    wait_until(lambda: len(quorum.etcd.asked) > asked + 50, 20)
    for member in quorum.etcd.members:
        member.behave()
    quorum.await_leader(seconds=20)
    for number in (1, 2):
        wait_until(lambda: "etcd takes changes again" in quorum.said(number))
        assert quorum.said(number).count("database space exceeded") == 1
        assert quorum.said(number).count("takes changes again") == 1
        assert "the claim failed" not in quorum.said(number)


@pytest.mark.processes
def test_a_record_that_cannot_be(quorums):
    """A candidate goes on when it is gone."""
    quorum = quorums()
    quorum.etcd.put(PREFIX + "id", "00112233445566aa")
    quorum.etcd.put(PREFIX + "leader", flomd.text_of(RECORD._replace(term="a" * 16,
                                                                     ttl=10 ** 400)))
    quorum.start(1)
    wait_until(lambda: "the leader record is damaged; this daemon does not" in quorum.said(1))
    quorum.etcd.put(PREFIX + "leader", flomd.text_of(RECORD))
    quorum.await_leader()
    assert "Traceback" not in quorum.said(1)
