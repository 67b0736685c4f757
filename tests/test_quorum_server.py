"""What the server of a quorum tells its clients, and when: its store is etcd, which answers when
the test says so."""
import flomd
import pytest
import test_server

PONG = flomd.Session.pong
PING, GRACE = 2000, 25000  # ms


class Chain:
    """The store of a leader: what it was given counts when the test calls answer()."""
    kind = flomd.IN_ETCD
    failing = ""
    marked = False

    def __init__(self):
        self.epoch = 1
        self.asked = []  # what is to be called when etcd has answered
        self.pings = []
        self.stored = {}
        self.confirmed = 0  # calls of confirm()
        self.leads = True
        self.silent_for = 0.0

    def commit(self, records, done):
        self.stored.update(records)
        self.asked.append(done)
        return True

    def confirm(self, done):
        self.confirmed += 1
        self.asked.append(done)

    def ping(self, done):
        self.pings.append(done)

    def answer(self):
        """etcd has confirmed all that it was asked."""
        asked, self.asked = self.asked + self.pings, []
        self.pings = []
        for done in asked:
            done()

    def may_tell(self):
        return self.leads

    def away(self, now):
        return self.silent_for

    def ping_for(self):
        return PING

    def grace_for(self, kill):
        return GRACE + kill

    def mark(self, held):
        return True

    def cover(self, token):
        self.epoch = token >> 32
        return True

    def holders(self):
        """The tokens of the holders that are stored."""
        return [int(key[2:], 16) for key, text in self.stored.items()
                if key[:2] == flomd.OF_HOLDER and text is not None]


class World(test_server.World):
    """A server whose store is a Chain."""

    def make_disk(self, later):
        return Chain()

    def settle(self):
        """Ends the turn; etcd answers, until nothing is left."""
        self.turn()
        while self.disk.asked or self.disk.pings:
            self.disk.answer()
            self.turn()

    def ping(self, client):
        self.connections.calls["ping"](client, None)

    def holder(self, name="R", **more):
        """A client of ours that holds."""
        client = self.client()
        client.session.ours = True
        client.ask(name, ident=name, proof=name, **more)
        self.settle()
        assert client.told == [0]
        client.told.clear()
        return client


@pytest.fixture
def world():
    return World()


# Pings

def test_a_ping_is_answered_when_etcd_has_answered(world):
    holder = world.holder()
    world.ping(holder)
    world.turn()
    assert holder.told == []
    world.disk.answer()
    assert holder.told == [PONG]


def test_a_ping_that_comes_later_is_not_answered_by_what_was_asked_before(world):
    holder, other = world.holder(), world.holder("Q")
    world.ping(holder)
    for _ in range(3):
        world.ping(holder)
    assert len(world.disk.pings) == 1
    world.ping(other)
    world.disk.answer()
    assert holder.told == other.told == [PONG] and len(world.disk.pings) == 1
    world.disk.answer()
    assert holder.told == [PONG, PONG * 3] and not world.disk.pings
    world.ping(holder)
    world.disk.answer()
    assert holder.told[2:] == [PONG]


def test_a_ping_behind_an_unlock_is_answered_at_once_when_that_is_stored(world):
    holder = world.holder()
    holder.release()
    holder.resume = lambda: world.ping(holder)
    world.turn()
    assert holder.told == []
    world.disk.answer()
    assert holder.told == [PONG] and not world.disk.pings


def test_who_has_gone_hears_nothing(world):
    holder = world.holder()
    world.ping(holder)
    holder.close()
    world.settle()
    assert holder.told == []


def test_a_deposed_leader_answers_no_ping(world):
    holder, idle = world.holder(), world.client()
    world.ping(holder)
    world.disk.leads = False
    world.ping(idle)
    world.settle()
    assert holder.told == idle.told == []


def test_a_flood_of_pings_is_answered_within_limits(world):
    holder = world.holder()
    for _ in range(5000):
        world.ping(holder)
    world.settle()
    assert [len(told) for told in holder.told] == [len(PONG), flomd.MOST_PONGS * len(PONG)]


# First answers

def test_the_first_answer_says_ping_and_grace():
    class Told(flomd.Session):
        __slots__ = ()
    Told.introduce("1234", "5678", PING)
    session = Told(None, "10.77.0.2:50190", str)
    text = ('<session peerid="1234" client="flom.py/1.0" id="aa" key="bb" kill="7000"/>'
            '<resource name="Ug==" mode="5" wait="1" create="1" lifespan="0"/>')
    (call, request), = session.calls(flomd.encode(flomd.LOCK, 8, text))
    assert call == "lock" and request.kill == 7000
    request.grace = 27000
    told = session.answer(flomd.Decision(session, flomd.OK, token=7))
    assert b'peerid="1234" daemon="5678" ping="2000" grace="27000"/>' in told


def test_the_grace_is_that_of_the_store(world):
    client = world.client()
    client.session.ours = True
    assert client.ask(kill=7000).grace == GRACE + 7000
    assert world.client().ask("Q").grace is None  # FLoM's
