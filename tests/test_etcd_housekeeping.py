"""What is looked after beside the chain: versions, members, room."""
import pytest

import fake_etcd
import flomd
from fake_etcd import FakeEtcd
from test_etcd import Log, threads
from world import wait_until

pytestmark = pytest.mark.in_time  # threads of flomd or of a fake

PREFIX = "/x/"


class World:
    def __init__(self, fake, compacts=False):
        self.fake, self.log = fake, Log()
        self.loop = flomd.Loop(self.log)
        access = flomd.Access(tuple(fake.urls), None, None, None, None, None)
        self.keeping = flomd.Housekeeping(self.loop, self.log, access, PREFIX, compacts)

    def lead(self, cluster=fake_etcd.CLUSTER_ID):
        members = flomd.Members(self.fake.urls)
        self.keeping.lead(flomd.Quorum(PREFIX, None, flomd.Cluster(str(cluster)), members, None))

    def turn_until(self, predicate):
        def turned():
            self.loop._turn(0.02)
            self.loop._do_what_is_due()
            return predicate()
        wait_until(turned)

    def asked(self, path):
        return [body for asked, body in self.fake.asked if asked == path]


@pytest.fixture
def fake():
    with FakeEtcd(members=3) as found:
        yield found


@pytest.fixture
def open_world(fake):
    worlds = []

    def opened(**options):
        worlds.append(World(fake, **options))
        worlds[-1].keeping.start()
        return worlds[-1]
    yield opened
    for world in worlds:
        world.keeping.stop()
        assert not world.loop._dates
    wait_until(lambda: not threads("etcd"))


@pytest.mark.parametrize("version, word", [
    ("3.3.25", "too old"), ("2.3.8", "too old"), ("3.5.0", "lose"), ("3.5.1", "lose"),
    ("3.5.2", "lose"), ("3.5.0-rc.1", "lose"), ("", "no version"), ("new", "no version")])
def test_versions_that_are_refused(version, word):
    assert word in flomd.refusal_of(version)


def test_what_is_said_of_a_version_is_one_line():
    for version in ("3.3.0\nMAINPID=1", "3.5.0\nMAINPID=1", "\nMAINPID=1"):
        assert "\n" not in flomd.refusal_of(version)


@pytest.mark.parametrize("version", ["3.4.0", "3.4.23", "3.5.3", "3.5.30", "3.6.0", "3.10.1",
                                     "4.0.0"])
def test_versions_that_are_used(version):
    assert flomd.refusal_of(version) == ""


def test_each_member_is_looked_at(open_world):
    world = open_world()
    assert not world.keeping.knows_version()
    world.turn_until(lambda: world.keeping.reachable == 3)
    assert world.keeping.knows_version()
    assert (world.keeping.refusal, world.keeping.versions) == ("", ["3.4.23"])
    assert world.log.lines == []


def test_etcd_may_be_started_later(fake, open_world):
    for member in fake.members:
        member.stop()
    world = open_world()
    world.turn_until(lambda: world.log.lines)
    assert world.log.lines == ["error: 0 of 3 members of etcd answer: this daemon cannot "
                               "lead"]
    assert not world.keeping.knows_version()
    fake.members[2].start()
    world.turn_until(world.keeping.knows_version)


def test_a_version_that_is_refused_is_told(fake, open_world):
    fake.version = "3.5.1"
    world = open_world()
    world.turn_until(lambda: world.keeping.reachable == 3)
    assert "3.5.1" in world.keeping.refusal
    assert world.log.lines == [f"error: {world.keeping.refusal}: nobody can lead"]


def test_a_member_that_is_lost_is_told(fake, open_world, monkeypatch):
    monkeypatch.setattr(flomd, "LOOK_ROUND", 0.02)
    fake.members[1].stop()
    world = open_world()
    world.turn_until(lambda: world.log.lines)
    assert world.keeping.reachable == 2
    fake.members[1].start()
    world.turn_until(lambda: len(world.log.lines) == 2)
    assert world.log.lines == ["error: 2 of 3 members of etcd answer",
                               "info: 3 of 3 members of etcd answer"]


@pytest.fixture
def soon(monkeypatch):
    """What is done now and then is done at once."""
    for name in ("CHECK_FIRST", "CHECK", "COMPACT"):
        monkeypatch.setattr(flomd, name, 0.05)
    monkeypatch.setattr(flomd, "NEVER_COMPACTED", 20)
    monkeypatch.setattr(flomd, "KEPT_REVISIONS", 10)


def test_nobody_compacts(fake, open_world, soon):
    for number in range(30):
        fake.put("/x/leader", str(number))
    world = open_world()
    world.turn_until(lambda: world.keeping.reachable == 3)
    assert world.asked("/v3/kv/range") == []
    world.lead()
    world.turn_until(lambda: world.keeping.trouble)
    assert "ETCD_AUTO_COMPACTION_RETENTION" in world.keeping.trouble
    assert f"error: {world.keeping.trouble}" in world.log.lines
    fake.compacted = 25
    world.turn_until(lambda: not world.keeping.trouble)
    world.keeping.follow()
    assert not world.loop._dates or world.keeping._check not in world.loop._dates


def test_young_clusters_need_no_compaction(fake, open_world, soon):
    world = open_world()
    world.lead()
    world.turn_until(lambda: len(world.asked("/v3/kv/range")) >= 2)
    assert world.keeping.trouble == ""
    assert all("revision" not in body for body in world.asked("/v3/kv/range"))


def test_it_compacts_when_it_is_told_to(fake, open_world, soon):
    for number in range(30):
        fake.put("/x/leader", str(number))
    world = open_world(compacts=True)
    world.lead()
    world.turn_until(lambda: fake.compacted)
    assert fake.compacted == fake.revision - 10
    world.turn_until(lambda: len(world.asked("/v3/kv/compaction")) > 1)
    assert world.log.lines == []


def test_another_cluster_is_not_compacted(fake, open_world, soon):
    """Although a member of it answers at one of the addresses."""
    for number in range(30):
        fake.put("/x/leader", str(number))
    for compacts in (True, False):
        world = open_world(compacts=compacts)
        asked = len(world.asked("/v3/kv/range"))
        world.lead(cluster=77)
        world.turn_until(lambda: len(world.asked("/v3/kv/range")) >= asked + 3)
        world.keeping.follow()
    assert not fake.compacted and world.keeping.trouble == ""
    assert all("revision" not in body for body in world.asked("/v3/kv/range"))


def test_that_it_may_not_compact_is_told_once(fake, open_world, soon):
    for number in range(30):
        fake.put("/x/leader", str(number))
    for member in fake.members:
        member.misbehave(fake_etcd.DENIED, 100, "/v3/kv/compaction")
    world = open_world(compacts=True)
    world.lead()
    world.turn_until(lambda: len(world.asked("/v3/kv/compaction")) >= 3)
    world.turn_until(lambda: world.log.lines)
    assert len([line for line in world.log.lines if "compact (3.5" in line]) == 1
