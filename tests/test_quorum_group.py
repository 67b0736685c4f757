"""A quorum that is found by a multicast group: what its daemons answer, who must not be there."""
import os
import sys

import flomd
import pytest

from world import ROOT, free_port, wait_until

GROUP = ("-A", "239.255.0.1")
ETCD = f"""\
import sys
sys.path.insert(0, {os.path.join(ROOT, "tests")!r})
from fake_etcd import FakeEtcd
with FakeEtcd() as etcd:
    print(etcd.urls[0], flush=True)
    sys.stdin.read()
"""
RECORD = flomd.Record(1, "aa", 3, "bb", 5000, 1, 1, "fair", "dd", "10.1.2.3:4711", "h", 1)


class Lines:
    """A log: its lines."""

    def __init__(self):
        self.lines = []

    def limited(self, text, level="warning"):
        self.lines.append(text)

    seldom = limited


class Members:
    """Members of one group on the loopback, in one loop."""

    def __init__(self, port):
        self.settings = flomd.Settings()
        for key, text in (("MulticastAddress", "239.255.7.7"), ("MulticastPort", str(port)),
                          ("NetworkInterface", "lo")):
            setting, = [one for one in flomd.SETTINGS if one.key == key]
            self.settings.set(setting, [text], key)
        self.loop, self.members, self.logs = flomd.Loop(Lines()), [], []

    def group(self, pair):
        return flomd.Group(self.settings, pair)

    def add(self, record):
        """One more daemon of a quorum that sees this record."""
        number = len(self.members)
        self.logs.append(Lines())
        self.members.append(flomd.QuorumMember(
            self.loop, self.logs[-1], self.group((number, f"id{number}")), lambda: record))

    def run(self, condition):
        """Lets them hear each other until the condition is true."""
        def look():
            self.loop._turn(0.01)
            self.loop._do_what_is_due()
            return condition()
        return wait_until(look)

    def close(self):
        for member in self.members:
            member.close()


@pytest.fixture
def members(monkeypatch):
    monkeypatch.setattr(flomd, "OFTEN", 0.05)
    made = Members(free_port())
    yield made
    made.close()


def test_all_of_a_quorum_answer_with_the_leaders_address(members):
    members.add(RECORD)
    members.add(RECORD)
    asker, heard = members.group((9, "other")), []
    asker.ask()
    members.run(lambda: heard.extend(asker.answers()) or len(heard) == 2)
    asker.leave()
    for answer in heard:
        assert answer.network == {"address": "10.1.2.3", "port": 4711}
        assert answer.quorum and answer.pair == (0, "dd")


def test_nobody_answers_while_nobody_leads(members):
    members.add(None)
    asker = members.group((9, "other"))
    asker.ask()
    members.run(lambda: members.logs[0].lines)  # it has heard the question
    assert list(asker.answers()) == []
    asker.leave()


def test_daemons_of_one_quorum_have_nothing_to_say_of_each_other(members):
    members.add(RECORD)
    members.add(RECORD)
    asked = []
    members.members[0]._group.ask = lambda **more: asked.append(more)
    members.run(lambda: len(asked) > 3)
    assert asked[0] == {"quorum": 1}
    assert [log.lines for log in members.logs] == [[], []]


def test_two_quorums_in_one_group(members):
    members.add(RECORD)
    members.add(RECORD._replace(address="10.9.9.9:1"))
    members.run(lambda: members.logs[0].lines and members.logs[1].lines)
    assert members.logs[0].lines[0] == ("another quorum serves the group: its leader is at "
                                        "10.9.9.9 port 1, that of this one at 10.1.2.3 port 4711")


def test_the_address_in_a_record():
    for text, address in (("10.1.2.3:4711", ("10.1.2.3", 4711)), ("[fd00::1]:28", ("fd00::1", 28)),
                          ("[fe80::1%eth0]:28", ("fe80::1", 28))):
        assert flomd.address_in(RECORD._replace(address=text)) == address


def quorum_on(host, options):
    """(etcd, daemon, which leads) on the host."""
    etcd = host.start(sys.executable, "-c", ETCD, stdin=-1)
    host.foreground.append(etcd)
    url = wait_until(lambda: etcd.out.strip())
    daemon = host.flomd("-f", "--no-files", "-a", host.ipv4, "--etcd", url, "--etcd-prefix",
                        "/flom/x/", "--etcd-state", host.path("cluster"), *options)
    host.foreground.append(daemon)
    wait_until(lambda: "serving" in daemon.err)
    return etcd, daemon


def test_a_daemon_without_quorum_drains(hosts):
    """Though it was there first; and no other one serves the group after it."""
    one, two = hosts(2)
    alone = two.flomd("-f", "--no-files", *two.address, *GROUP)
    two.foreground.append(alone)
    wait_until(lambda: "serving" in alone.err)
    etcd, daemon = quorum_on(one, GROUP)
    wait_until(lambda: "draining: a quorum serves the group" in alone.err)
    assert alone.end().status == 0
    assert "a quorum answers for the group: '10.77.0.1' port 28015" in alone.err
    wait_until(lambda: "a daemon without quorum" in daemon.err)
    again = two.flomd("-f", "--no-files", *two.address, *GROUP).end()
    assert again.status == 3
    done = two.run(*GROUP, "-r", "R", "--", "true", address=())
    assert done == (0, "", "")
    daemon.terminate()
    assert daemon.end().status == 0
    etcd.communicate()
