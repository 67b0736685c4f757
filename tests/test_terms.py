"""The store of a leader, pure: what it hands to the rules, and when it hands over nothing."""
import flomd
import pytest

from quorum_world import PREFIX, Now, own_record, quorum
from test_connections import Log

HOLDER = "h/0000000500000001"


class Loop:
    """What is to be called at the end of the turn."""

    def __init__(self):
        self.now, self.last = Now(100), []

    def at_end_of_turn(self, act):
        self.last.append(act)


class World:
    """A leader that serves, and its store; `acts` counts how often etcd was to be asked."""

    def __init__(self, monkeypatch):
        self.loop, self.acts = Loop(), 0
        claimed = own_record(term="aa", n=1)
        self.leader = flomd.Leader(quorum(), claimed, 100.0, self.loop.now)
        self.leader.lead(7)
        self.chain = flomd.EtcdStore(self.loop, self.leader, self.act)
        monkeypatch.setattr(flomd, "Moment", lambda: self.loop.now)

    def act(self):
        self.acts += 1

    def ask(self):
        """What etcd is asked now."""
        return self.leader.next_request(self.loop.now)

    def confirm(self):
        """Etcd has done it; returns what may be told."""
        answer = flomd.Answer(flomd.DONE, "1", 9, True, (), False)
        return self.leader.answer(answer, self.loop.now)


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch)


def test_a_batch_is_told_when_etcd_has_it(world):
    done = object()
    assert world.chain.commit([(HOLDER, "text"), ("d", "left out")], done) is True
    assert world.acts == 1
    transaction = world.ask()
    assert transaction.changes[1:] == ((PREFIX + HOLDER, "text"),)
    assert world.confirm() == [done]


def test_resources_are_stored_as_etcd_keeps_them(world):
    world.chain.commit([("r/Ug==", 'lifespan="5000"')], object())
    (key, text), = world.ask().changes[1:]
    assert key.startswith(PREFIX + "r/") and text == 'name="Ug==" lifespan="5000"'


@pytest.mark.parametrize("verb", ["confirm", "ping"])
def test_what_stores_nothing_waits_for_what_is_asked_later(world, verb):
    world.chain.commit([(HOLDER, "text")], "first")
    world.ask()
    getattr(world.chain, verb)("second")
    assert world.confirm() == ["first"]
    world.loop.now = Now(101)
    assert world.ask().changes[1:] == ()
    assert world.confirm() == ["second"]


def test_a_token_is_covered_by_what_stores_it(world):
    assert world.chain.epoch == 7 and world.chain.cover(9 << 32) is True
    world.chain.commit([(HOLDER, "text")], "done")
    _, record = world.ask().changes[0]
    assert world.chain.epoch == flomd.record_of(record).epoch == 9


def test_it_says_how_long_etcd_is_away(world):
    world.chain.commit([(HOLDER, "text")], "done")
    assert world.chain.away(world.loop.now) == 0
    world.ask()
    assert world.chain.away(Now(103)) == 3
    world.confirm()
    assert world.chain.away(Now(104)) == 0


def test_times_are_those_of_the_record(world):
    assert world.chain.ping_for() == 2000
    assert (world.chain.grace_for(0), world.chain.grace_for(8000)) == (25000, 28000)


def test_nothing_is_told_when_the_deadline_has_passed(world):
    world.loop.now = Now(108.9)
    assert world.chain.may_tell()
    world.loop.now = Now(109)
    assert not world.chain.may_tell()
    assert world.loop.last == [world.act]  # the campaign looks what has become of it
    world.chain.commit([(HOLDER, "text")], "done")
    assert world.acts == 0 and world.leader.end_reason


def test_a_closed_store_stores_nothing_and_calls_nobody(world):
    world.chain.close()
    for verb in (world.chain.confirm, world.chain.ping):
        verb("done")
    assert world.chain.commit([(HOLDER, "text")], "done") is True
    assert world.acts == 0 and not world.chain.may_tell()
    world.loop.now = Now(105)
    assert world.ask().changes[1:] == () and world.confirm() == []


class Noting:
    """Anything: it notes what is called."""

    def __init__(self, noted, **more):
        self.noted = noted
        self.__dict__.update(more)

    def __getattr__(self, name):
        return lambda *arguments: self.noted.append(name)


def test_nothing_is_left_of_a_term_that_a_bug_has_ended(world):
    """It has resigned in good order, and the process goes on."""
    campaign, noted = flomd.Campaign.__new__(flomd.Campaign), []
    campaign.loop = campaign.log = campaign._house = campaign._etcd = Noting(noted)
    campaign.term = Noting(noted)
    campaign._steps = campaign._table = None
    campaign._end_reason, campaign._damage = "", "a bug"
    campaign._show = campaign._empty_term = lambda *term: None
    world.leader.resign()
    world.ask()
    world.confirm()
    campaign._asker = world.leader
    campaign._change()
    assert world.leader.end_reason and campaign.term is None and campaign._asker is None
    assert noted.count("abandon") == 1 and "error" not in noted


def test_a_candidate_that_meets_a_bug_begins_anew():
    log, dates = Log(), []
    campaign = flomd.Campaign.__new__(flomd.Campaign)
    campaign.loop = flomd.Loop(log)
    campaign.loop.after = lambda seconds, act: dates.append((seconds, act))
    campaign._asker = candidate = Noting([])
    candidate.look = 0  # which cannot be called
    campaign._hear(candidate, None)
    assert campaign._asker is None and dates == [(flomd.PAUSE, campaign._prepare)]
    assert len(log.lines) == 1 and "Traceback" in log.lines[0]
