"""Every order of events in a small world of two daemons, one lock and two clients.

What decides is the rules of flomd.py: Candidate, Leader, what an end of a connection releases, how
long an absent holder is kept.  Around them is as little as can be: a cluster that obeys any copy of
a transaction that was sent, at any time; a lock table of one exclusive lock; clients that end their
command at the end of their grace.  Time comes in whole s.  Whoever can do something may do it now,
or later, or never: so a stopped process, a slow link and a late copy need no events of their own.

In every state: one command runs at most, one holder is in the memory at most, what was told is
there, and each leader knows it.
"""
import collections
import functools
import gc
import sys

import pytest

import flomd
from quorum_world import LEADER, MARK, PREFIX, Etcd, Now, quorum
from world import SOAK

# The rules are the same on every Python, and an old one needs twice the time.
pytestmark = pytest.mark.skipif(not SOAK and sys.version_info < (3, 11),
                                reason="old interpreters have it in tox -e soak alone")
NEVER = float("inf")
TTL = 2  # s
IDLE, WAITS, LATE, RUNS, ENDED = "idle", "waits", "late", "runs", "ended"

# What is taken as a rule: of flomd, or a worse one in its place; and of the clients.  late: a grant
# that is read late is none.  end_is_good: an end of file says that all was well until then.
Rules = collections.namedtuple("Rules", "candidate leader releases kept late end_is_good")
RULES = Rules(flomd.Candidate, flomd.Leader, flomd.RELEASES, flomd.kept_until, True, False)
# How much of a kind one history has, at most.  time: s; terms: claims that are confirmed; up, down,
# away: messages that are not read, grants that are not read, transactions that are not answered at
# once; pings; lost: answers of the cluster; resets: of a connection; removed: the leader record, or
# all; resigned: orderly ends.  stands: s for which the clock of the first daemon stands, from the
# beginning on.  graces: s, of the two daemons.
Limits = collections.namedtuple(
    "Limits", "time terms up down away pings lost resets removed resigned stands graces")
UP, DOWN, AWAY = "up", "down", "away"

Holder = collections.namedtuple("Holder", "client key promised until")
# A connection.  up: what the daemon has not read; asked, pinged: when what is not answered yet was
# sent; down: the answer that the client has not read; closed: by the daemon.
Link = collections.namedtuple("Link", "up asked pinged down closed")
NEW_LINK = Link((), None, None, None, False)
Client = collections.namedtuple("Client", "phase good grace links")
NEW_CLIENT = Client(IDLE, None, None, (None, None))


class Hole(Exception):
    """What must never be."""


class Names:
    """Digits of a daemon: a new name for each term; n alone tells the records of a term apart."""
    serial = 0

    def __init__(self, name):
        self.name = name

    def __call__(self, number):
        if number == 8:
            return "0"
        Names.serial += 1
        return f"{self.name}{Names.serial}"


def cloned(role):
    """A candidate or leader that can go its own way."""
    other = twin(role)
    fields = other.__dict__
    for name in mutable_fields(type(role)):
        fields[name] = fields[name].copy()
    prefix, mine, cluster, members, digits = role.quorum
    other.quorum = flomd.Quorum(prefix, mine, twin(cluster), members, digits)
    return other


def twin(thing):
    other = object.__new__(type(thing))
    other.__dict__.update(thing.__dict__)
    return other


@functools.lru_cache(maxsize=None)
def mutable_fields(kind):
    if issubclass(kind, flomd.Candidate):
        return ()
    return "loaded", "_gathered", "_waiting", "_pings", "_unconfirmed", "_stored"


@functools.lru_cache(maxsize=None)
def name_of(text):
    """What tells a record from all others."""
    record = flomd.record_of(text)
    return record.term, record.n, record.daemon


class View:
    """A state, without what makes no difference.  The records have the numbers of their first
    mention, a revision is that of the record or not, and what is long past is just that."""

    def __init__(self, world):
        self.world = world
        self.numbers = {}
        entry = world.etcd.keys.get(LEADER)
        self.revision = entry[2] if entry else 0
        self.text = self.number(entry[0]) if entry else None

    def state(self):
        world = self.world
        return (world.left, self.text, world.etcd.keys.get(MARK, ("",))[0],
                frozenset(world.etcd.memory().items()), world.told,
                *[self.daemon(daemon) for daemon in world.daemons],
                frozenset(map(self.transaction, world.sent)),
                *[self.client(client) for client in world.clients])

    def number(self, text):
        name = text if isinstance(text, tuple) else name_of(text)
        return self.numbers.setdefault(name, len(self.numbers))

    def record(self, record):
        return self.number((record.term, record.n, record.daemon))

    def transaction(self, transaction):
        guard = transaction.guards[0]
        value = guard.value
        if guard.what == flomd.VALUE:
            value = self.number(value)
        elif guard.what == flomd.MODIFIED:
            value = value == self.revision
        (_, text), *changes = transaction.changes
        return guard.what, value, self.number(text), tuple(changes)

    def past(self, when, most=NEVER):
        """How long ago something was."""
        return None if when is None else min(self.world.time - when, most)

    def daemon(self, daemon):
        role = daemon.role
        now = self.world.time - daemon.lag
        table = daemon.holder, daemon.queue, daemon.lag, role.quorum.cluster.mark
        flight = None
        if role._request is not None:
            handed = min(now - role._handed_at, TTL)
            flight = role._is_out, handed, self.transaction(role._request)
        if isinstance(role, flomd.Candidate):
            return table + self.candidate(role, now) + (flight,)
        return table + self.leader(role, now) + (flight,)

    def candidate(self, role, now):
        if role._revision != self.revision:
            return "sees another",
        unchanged = min(now - role.seen_at, TTL + 1)
        free = role.record is not None and flomd.is_free(role.record)
        extra = getattr(role, "early", None)
        return "sees", unchanged, free, role._looks_for_any, role.quorum.cluster.is_new, extra

    def leader(self, role, now):
        waiting = tuple((number - role._number, done) for number, done in role._waiting)
        gathered = tuple((key, number - role._number, text)
                         for key, (number, text) in role._gathered.items())
        sent = self.record(role._sent) if role._request is not None else None
        return (role.stage, self.record(role.record), sent, min(now - role.confirmed_at, TTL),
                role._beat_at > now, waiting, gathered, tuple(role._pings),
                tuple(role._unconfirmed), frozenset(role._stored))

    def client(self, client):
        links = tuple(link and self.link(link) for link in client.links)
        return client.phase, self.past(client.good, 9), client.grace, links

    def link(self, link):
        return (link.up, self.past(link.asked, 9), self.past(link.pinged, 9), link.down,
                link.closed)


class Daemon:
    """A daemon with a lock table of one lock.  `lag`: s for which it stood with its clock."""

    def __init__(self, role, holder=None, queue=(), lag=0):
        self.role, self.holder, self.queue, self.lag = role, holder, queue, lag

    def copy(self):
        return Daemon(cloned(self.role), self.holder, self.queue, self.lag)

    def serves(self):
        return getattr(self.role, "stage", None) == flomd.LEADS and self.role.end_reason == ""


class World:
    """One state of the world.  A move makes a copy of it, and of what it changes."""

    def __init__(self, rules, left):
        self.rules = rules
        self.left = left  # of the limits
        self.time = 0
        self.late = None  # what comes late in this move
        self.in_time = frozenset()  # what has come in time in this move
        self.terms = self.keys_made = 0
        self.etcd = Etcd()
        self.sent = frozenset()  # transactions of which copies may still arrive
        self.daemons = []
        self.clients = [NEW_CLIENT, NEW_CLIENT]
        self.told = frozenset()  # keys of grants that were told and have not ended
        self.stored = frozenset()  # keys that were ever in the memory

    def copy(self):
        other = object.__new__(World)
        other.__dict__.update(self.__dict__)
        other.daemons = list(self.daemons)
        other.clients = list(self.clients)
        other.late, other.in_time = None, frozenset()
        return other

    # Moves.

    def moves(self):
        """All that can come next: (method, arguments...)."""
        if all(client.phase == ENDED for client in self.clients) and not self.sent:
            return
        if self.left.time:
            yield World.second_passes,
        for number, daemon in enumerate(self.daemons):
            yield from self.moves_of_daemon(number, daemon)
        for number, client in enumerate(self.clients):
            yield from self.moves_of_client(number, client)
        for transaction in self.sent:
            if self.etcd.allows(transaction):
                yield World.copy_arrives, transaction
        if self.left.removed and LEADER in self.etcd.keys:
            yield World.record_is_removed,
            yield World.etcd_is_new,

    def made(self, method, arguments):
        """The worlds after a move: that in which nothing in it is late, and those in which one
        thing is, each with what was late."""
        there = self.copy()
        method(there, *arguments)
        yield there, ()
        for late in there.in_time:
            if getattr(self.left, late):
                other = self.copy()
                other.late = late
                method(other, *arguments)
                yield other, (late,)

    def is_late(self, what):
        """Whether this is what comes late in this move."""
        if self.late != what:
            self.in_time |= {what}
            return False
        self.late = None
        self.use(what)
        return True

    def use(self, what):
        number = getattr(self.left, what) - 1
        self.left = self.left._replace(**{what: number})

    def moves_of_daemon(self, number, daemon):
        role = daemon.role
        now = self.time - daemon.lag
        looks = isinstance(role, flomd.Candidate)
        if looks and not self.left.terms:
            return
        if role._is_out:
            yield World.answer_comes, number
            if self.left.lost:
                yield World.answer_is_lost, number
        elif looks:
            yield World.daemon_wakes, number
        if role.next_date() <= now or self.is_due(daemon):
            yield World.daemon_wakes, number
        if self.left.resigned and daemon.serves():
            yield World.daemon_resigns, number
        for client in range(2):
            link = self.clients[client].links[number]
            if link is not None and link.up and daemon.serves():
                yield World.daemon_reads, number, client

    def moves_of_client(self, number, client):
        if client.phase == ENDED:
            return
        for at, link in enumerate(client.links):
            if link is None:
                if self.may_connect(number, at):
                    yield World.client_asks, number, at
                continue
            if link.down is not None:
                yield World.client_reads, number, at
            if link.closed or self.is_ended(link):
                continue
            if self.left.pings and link.pinged is None:
                yield World.client_pings, number, at
            if self.left.resets:
                yield World.link_is_reset, number, at
        if client.phase != IDLE:
            yield World.client_ends, number

    def may_connect(self, number, at):
        """To another daemon when the first is silent.  The second client comes after the first:
        they are alike."""
        client = self.clients[number]
        if not self.daemons[at].serves():
            return False
        if client.phase == IDLE and number == 1 and self.clients[0].phase == IDLE:
            return False
        other = client.links[1 - at]
        if other is None or self.is_ended(other):
            return True
        return not other.closed and (other.pinged is not None or other.asked is not None)

    def is_ended(self, link):
        """Whether the client has done with it, and the daemon has not read that yet."""
        return bool(link.up) and link.up[-1] in self.rules.releases

    def is_due(self, daemon):
        if daemon.holder is None or not daemon.serves():
            return False
        return daemon.holder.until <= self.time - daemon.lag

    # Time and the cluster.

    def second_passes(self):
        """A command that nobody vouches for any more is ended at the end of the grace, less 1 s."""
        self.time += 1
        self.use("time")
        if self.left.stands:
            self.use("stands")
            first = self.daemons[0]
            self.daemons[0] = Daemon(first.role, first.holder, first.queue, first.lag + 1)
        for number, client in enumerate(self.clients):
            if client.phase == RUNS and self.time >= self.end_of_command(client):
                self.end(number, "end of file")

    def end_of_command(self, client):
        return client.good + client.grace / 1000 - 1

    def obey(self, request):
        if isinstance(request, flomd.Range):
            return self.etcd.obey(request)
        self.etcd = self.etcd.copy()
        answer = self.etcd.obey(request)
        self.stored |= frozenset(self.etcd.memory())
        if len(self.etcd.memory()) > 1:
            raise Hole("two holders are in the memory")
        self.forget_sent()
        return answer

    def forget_sent(self):
        """A guard that has become false stays false, unless it wants that there is no key."""
        self.sent = frozenset(
            transaction for transaction in self.sent
            if self.etcd.allows(transaction) or transaction.guards[0].what == flomd.CREATED)

    def copy_arrives(self, transaction):
        self.obey(transaction)

    def record_is_removed(self):
        self.use("removed")
        self.etcd = self.etcd.copy()
        self.etcd.change([(LEADER, None)])
        self.forget_sent()

    def etcd_is_new(self):
        """Made anew with the same configuration, and others have used it since."""
        self.use("removed")
        revision = self.etcd.revision
        self.etcd = Etcd()
        self.etcd.revision = revision
        self.sent = frozenset()

    # A daemon.

    def turn(self, number):
        """The daemon begins a turn; returns it, and the instant by its own clock."""
        daemon = self.daemons[number] = self.daemons[number].copy()
        now = Now(self.time - daemon.lag)
        if not daemon.role.look(now):
            self.depose(number, now)
            return None, now
        return daemon, now

    def depose(self, number, now):
        daemon = self.daemons[number]
        daemon.role = self.rules.candidate(daemon.role.quorum, now)
        daemon.holder, daemon.queue = None, ()
        for index, client in enumerate(self.clients):
            link = client.links[number]
            if link is not None:
                self.set_link(index, number, closed_by_daemon(link))
                if self.rules.end_is_good and client.phase == RUNS:
                    self.is_good(index, self.time)

    def hand_over(self, number, now):
        """The end of a turn: what is to be asked is on its way.  What is only read is answered at
        once: a daemon that reads later has less time, and no advantage."""
        daemon = self.daemons[number]
        request = daemon.role.next_request(now)
        if isinstance(request, flomd.Range):
            self.answer_comes(number)
        elif request is not None:
            self.sent |= {request}
            self.forget_sent()
            if not self.is_late(AWAY):
                self.answer_comes(number)

    def daemon_wakes(self, number):
        daemon, now = self.turn(number)
        if daemon is not None:
            daemon.role._look_at = 0
            if self.is_due(daemon):
                self.release(daemon, number, now)
            self.hand_over(number, now)

    def daemon_resigns(self, number):
        self.use("resigned")
        daemon, now = self.turn(number)
        if daemon is not None:
            daemon.role.resign()
            self.hand_over(number, now)

    def answer_is_lost(self, number):
        self.use("lost")
        daemon, now = self.turn(number)
        if daemon is not None:
            daemon.role.answer(flomd.failure(flomd.UNKNOWN), now)
            self.hand_over(number, now)

    def answer_comes(self, number):
        """The cluster obeys what was asked, perhaps once more, and the daemon reads the answer."""
        answer = self.obey(self.daemons[number].role._request)
        daemon, now = self.turn(number)
        if daemon is None:
            return
        Names.serial = self.terms
        told = daemon.role.answer(answer, now)
        self.terms = Names.serial
        if getattr(daemon.role, "leader", None) is not None:
            daemon.role = cloned(daemon.role.leader)
            daemon.role.__class__ = self.rules.leader
            self.use("terms")
        elif daemon.role.end_reason:
            self.depose(number, now)
            return
        for done in told:
            self.tell(number, *done)
        if getattr(daemon.role, "stage", None) == flomd.LOADS and daemon.role.is_loaded():
            self.restore(daemon)
        self.hand_over(number, now)

    def restore(self, daemon):
        """The memory that was loaded becomes the lock table."""
        role = daemon.role
        if not self.told <= {key for key, _ in role.loaded}:
            raise Hole("the successor does not know what was told")
        for key, text in role.loaded:
            client, promised = text.split()
            until = self.rules.kept(role.claimed_at, int(promised), role.record.grace)
            daemon.holder = Holder(int(client), key, int(promised), until)
        role.lead(0)

    def tell(self, number, client, key, when):
        """A grant, or with key None the answer to a ping: to what was sent at that time.  A ping is
        answered at once: later would only be later in vain."""
        link = self.clients[client].links[number]
        if link is None or link.closed or self.is_ended(link):
            return
        if key is None:
            if when is not None and link.pinged == when:
                self.answer_ping(client, number, link)
            return
        holder = self.daemons[number].holder
        if holder is not None and holder.key == key and link.asked == when:
            if key not in self.stored:
                raise Hole("a grant is told that is not stored")
            self.told |= {key}
            self.set_link(client, number, link._replace(down="granted"))
            if not self.is_late(DOWN):
                self.client_reads(client, number)

    # What a daemon reads.

    def daemon_reads_all(self, number, client):
        link = self.clients[client].links[number]
        while link is not None and link.up and self.daemons[number].serves():
            self.daemon_reads(number, client)
            link = self.clients[client].links[number]

    def daemon_reads(self, number, client):
        daemon, now = self.turn(number)
        if daemon is None:
            return
        what = self.pop_up(client, number)
        if what == "ping":
            daemon.role.at_once = None
            done = client, None, self.clients[client].links[number].pinged
            daemon.role.ping(done, now)
            if daemon.role.at_once:
                self.tell(number, *done)
            else:
                daemon.role._beat_at = now.boot  # the earliest answer is the most dangerous
        elif what in ("lock", "reclaim"):
            self.obey_request(daemon, number, client, what, now)
        else:
            self.obey_end(daemon, number, client, what, now)
        self.hand_over(number, now)

    def pop_up(self, client, number):
        link = self.clients[client].links[number]
        what, *rest = link.up
        self.set_link(client, number, link._replace(up=tuple(rest)))
        if what in self.rules.releases:  # nothing comes after an end
            self.set_link(client, number, None)
        return what

    def obey_request(self, daemon, number, client, what, now):
        holder = daemon.holder
        asked = self.clients[client].links[number].asked
        if holder is not None and holder.client == client:
            daemon.holder = holder._replace(until=NEVER)
            daemon.role.write((), (client, holder.key, asked))
        elif what == "reclaim":
            link = self.clients[client].links[number]
            self.set_link(client, number, link._replace(down="refused"))
            if not self.is_late(DOWN):
                self.client_reads(client, number)
        elif holder is None:
            changes = self.grant(daemon, client)
            daemon.role.write(changes, (client, daemon.holder.key, asked))
        elif client not in daemon.queue:
            daemon.queue += (client,)

    def grant(self, daemon, client):
        self.keys_made += 1
        promised = daemon.role.record.grace
        key = f"h/{self.keys_made}"
        daemon.holder = Holder(client, key, promised, NEVER)
        return [(key, f"{client} {promised}")]

    def obey_end(self, daemon, number, client, what, now):
        """The connection has ended.  Another of the same client may hold the lock by now."""
        daemon.queue = tuple(other for other in daemon.queue if other != client)
        holder = daemon.holder
        if holder is None or holder.client != client or holder.until < NEVER:
            return
        if self.rules.releases[what]:
            self.release(daemon, number, now)
        else:
            own = daemon.role.record.grace
            until = self.rules.kept(now.boot, holder.promised, own)
            daemon.holder = holder._replace(until=until)

    def release(self, daemon, number, now):
        """The end of a holding and the grant that it frees are one batch."""
        ended = daemon.holder
        self.told -= {ended.key}
        changes = [(ended.key, None)]
        daemon.holder = None
        done = ended.client, "", None
        if daemon.queue:
            heir, daemon.queue = daemon.queue[0], daemon.queue[1:]
            changes += self.grant(daemon, heir)
            done = heir, daemon.holder.key, self.clients[heir].links[number].asked
        daemon.role.write(changes, done)

    # A client.

    def set_link(self, number, at, link):
        client = self.clients[number]
        links = (link, client.links[1]) if at == 0 else (client.links[0], link)
        self.clients[number] = client._replace(links=links)

    def set_client(self, number, **fields):
        self.clients[number] = self.clients[number]._replace(**fields)

    def send(self, number, at, what, **fields):
        link = self.clients[number].links[at] or NEW_LINK
        up = link.up + (what,)
        self.set_link(number, at, link._replace(up=up, **fields))
        if not self.is_late(UP):
            self.daemon_reads_all(at, number)

    def client_asks(self, number, at):
        """Nobody asks for a lock at two daemons at once; who holds it leaves the first one only
        when the other has answered, since that would release it at a slow leader."""
        phase = self.clients[number].phase
        if phase == IDLE:
            self.set_client(number, phase=WAITS)
        if phase != RUNS:
            self.close(number, 1 - at, "end of file")
        what = "reclaim" if phase in (RUNS, LATE) else "lock"
        self.send(number, at, what, asked=self.time)

    def client_pings(self, number, at):
        self.use("pings")
        self.send(number, at, "ping", pinged=self.time)

    def answer_ping(self, number, at, link):
        """The sending of the last answered ping is good, on whatever connection."""
        self.is_good(number, link.pinged)
        self.set_link(number, at, link._replace(pinged=None))

    def is_good(self, number, when):
        good = self.clients[number].good
        if good is None or good < when:
            self.set_client(number, good=when)

    def client_reads(self, number, at):
        client = self.clients[number]
        link = client.links[at]
        if link.down == "refused":
            self.end(number, "end of file")
            return
        if link.asked is not None:
            self.is_good(number, link.asked)
        self.set_link(number, at, link._replace(down=None, asked=None))
        self.set_client(number, grace=self.daemons[at].role.quorum.mine.grace)
        if client.phase != RUNS:
            self.start_or_reclaim(number, at)
        elif client.links[1 - at] is not None:
            self.close(number, 1 - at, "end of file")
        if link.closed:
            self.set_link(number, at, None)

    def start_or_reclaim(self, number, at):
        """A grant that is read late is none."""
        client = self.clients[number]
        late = self.time > client.good + client.grace / 2000
        if late and self.rules.late:
            self.set_client(number, phase=LATE)
            if not client.links[at].closed:
                self.send(number, at, "reclaim", asked=self.time)
            return
        if self.time < self.end_of_command(client) or late:
            self.set_client(number, phase=RUNS)
            if all(other.phase == RUNS for other in self.clients):
                raise Hole("two commands run")
        else:
            self.end(number, "end of file")

    def client_ends(self, number):
        runs = self.clients[number].phase == RUNS
        self.end(number, "unlock" if runs else "end of file")

    def end(self, number, how):
        self.set_client(number, phase=ENDED, good=None, grace=None)
        for at in range(2):
            self.close(number, at, how)

    def close(self, number, at, how):
        link = self.clients[number].links[at]
        if link is None or link.closed:
            self.set_link(number, at, None)
        elif how not in link.up:
            self.set_link(number, at, Link(link.up, None, None, None, False))
            self.send(number, at, how)

    def link_is_reset(self, number, at):
        """By a firewall: the client sees it at once, the daemon when it reads."""
        self.use("resets")
        self.close(number, at, "reset")


def closed_by_daemon(link):
    """What the client has not read stays; a link without that is gone."""
    if link.down is None:
        return None
    return link._replace(up=(), pinged=None, closed=True)


# Walking.

def beginning(rules, limits):
    """The first daemon leads, the second has just seen that."""
    world = World(rules, limits._replace(terms=limits.terms + 1))
    for name, grace in zip("ab", limits.graces):
        party = quorum(name, 1000 * TTL, ("u",), digits=Names(name), grace=1000 * grace)
        world.daemons.append(Daemon(rules.candidate(party, Now(0))))
    world.daemon_wakes(0)  # there is no record
    world.daemon_wakes(0)  # there is nothing, it claims
    world.daemon_wakes(1)
    assert world.daemons[0].serves() and world.daemons[1].role.record.daemon == "a" * 16
    return world


@pytest.fixture(autouse=True)
def no_collection():
    """What a walk keeps has no cycles, and to look for them takes a third of its time."""
    gc.disable()
    yield
    gc.enable()


def walk(rules, limits):
    """Goes everywhere; returns the number of states.  Raises Hole with the way that leads there."""
    start = beginning(rules, limits)
    seen = {hash(View(start).state())}
    todo = collections.deque([(start, ())])
    while todo:
        world, way = todo.popleft()
        for method, *arguments in list(world.moves()):
            step = way, method.__name__, arguments
            try:
                for there, late in world.made(method, arguments):
                    state = hash(View(there).state())
                    if state not in seen:
                        seen.add(state)
                        todo.append((there, step + late))
            except Hole as hole:
                raise Hole(f"{hole}, in state {len(seen)}, after {told_way(step)}")
    return len(seen)


def told_way(step):
    """The moves that have led somewhere, one a line."""
    lines = []
    while step:
        step, name, arguments, *late = step
        shown = " ".join("a transaction" if isinstance(argument, tuple) else str(argument)
                         for argument in arguments + late)
        lines.append(f"    {name} {shown}")
    return "\n" + "\n".join(reversed(lines))


# Rules that are worse.

class PlainGuard(flomd.Leader):
    """Guards its transactions by its term alone."""

    def _make_transaction(self, now):
        transaction = super()._make_transaction(now)
        guard = flomd.Guard(LEADER, "TERM", self.record.term)
        return transaction._replace(guards=(guard,))


class OtherBatch(flomd.Leader):
    """Sends another batch under the same record when it does not know what has become of the
    first."""

    def _repeat(self, outcome, now):
        unsent = [(key[len(PREFIX):], text) for key, text in self._request.changes[1:]]
        self._request = None
        gathered, self._gathered = self._gathered, collections.OrderedDict()
        for key, text in unsent:
            self._stored.discard(key)
            self._gathered[key] = 0, text
        for key, (_, text) in gathered.items():
            self._gather(key, text)
        for done in reversed(self._unconfirmed):
            self._waiting.appendleft((0, done))
        self._beat_at = now.boot


class LoadsFirst(flomd.Candidate):
    """Reads the memory when it begins to wait, and does not read it again as the leader."""
    early = None

    def _next(self, now):
        request = super()._next(now)
        if isinstance(request, flomd.Range):
            return flomd.Range(PREFIX, flomd.end_of(PREFIX), 0)
        return request

    def _understand(self, request, answer, now):
        if isinstance(request, flomd.Range) and self.early is None:
            self.early = answer
        return super()._understand(request, answer, now)

    def _become_leader(self, claim, now):
        super()._become_leader(claim, now)
        self.leader._take_page(self.early)


class ClaimsAbsent(flomd.Candidate):
    """Claims at once where there is no leader record, whatever else there is, or was."""

    def _mismatch(self, entry, mark):
        if entry is None:
            self.quorum.cluster.mark = mark.text if mark else ""
        return super()._mismatch(entry, mark)

    def _see_nobody(self, is_empty, now):
        super()._see_nobody(True, now)


class OwnClock(flomd.Leader):
    """Answers a ping without asking the cluster while by its own clock its record is young."""

    def ping(self, done, now):
        if now.boot - self.confirmed_at <= self.times.ttl / 2:
            self.at_once = done
        else:
            super().ping(done, now)


def kept_shorter(since, promised, own):
    """As long as this daemon promises, whatever another has promised."""
    return flomd.kept_until(since, own)


NOTHING = Limits(time=0, terms=1, up=0, down=0, away=0, pings=0, lost=0, resets=0, removed=0,
                 resigned=0, stands=0, graces=(3, 2))


def limits(**some):
    return NOTHING._replace(**some)


WORLDS = {
    "copies": limits(time=1, away=2, lost=1, down=1),
    "a late transaction": limits(time=5, away=1),
    "a late message": limits(time=6, up=1),
    "a late grant": limits(time=6, down=1),
    "pings": limits(time=6, pings=2),
    "a reset": limits(time=5, resets=1),
    "an orderly end": limits(time=4, resigned=1, down=1),
    "removed": limits(time=6, removed=1),
    "a clock that stands": limits(time=7, pings=3, stands=7, graces=(4, 2)),
    "two terms": limits(time=8, terms=2),
}
SOAKED = {
    "a late transaction, for longer": limits(time=8, away=1),
    "late": limits(time=5, up=1, down=1, away=1),
    "two late transactions": limits(time=6, away=2, lost=1),
    "a late message and pings": limits(time=6, up=1, pings=2),
    "resets": limits(time=6, resets=2, pings=2),
    "orderly ends": limits(time=4, terms=2, resigned=2, away=1),
    "removed, for longer": limits(time=8, removed=1, pings=1),
    "a clock that stands for a while": limits(time=7, pings=3, stands=3, graces=(4, 2)),
}
if SOAK:
    WORLDS.update(SOAKED)


@pytest.mark.parametrize("name", WORLDS)
def test_no_two_hold(name):
    states = walk(RULES, WORLDS[name])
    print(f"{name}: {states} states")
    assert states > 500


# What a worse rule leads to, and in which world.
HOLES = {
    "a plain guard of the term": (
        RULES._replace(leader=PlainGuard), limits(), "two holders"),
    "another batch under the same number": (
        RULES._replace(leader=OtherBatch), limits(away=2, lost=1), "not stored"),
    "the load before the claim": (
        RULES._replace(candidate=LoadsFirst), limits(time=6), "does not know"),
    "a reset that frees": (
        RULES._replace(releases=dict(flomd.RELEASES, reset=True)), limits(resets=1),
        "two commands"),
    "no record, claimed at once": (
        RULES._replace(candidate=ClaimsAbsent), limits(time=6, removed=1), "does not know"),
    "a successor with a shorter grace": (
        RULES._replace(kept=kept_shorter), limits(time=4, resigned=1, graces=(4, 2)),
        "two commands"),
    "a grant that is read late": (
        RULES._replace(late=False), limits(time=3, down=1, resigned=1), "two commands"),
}
SOAKED_HOLES = {
    "a ping that the leader's own clock answers": (
        RULES._replace(leader=OwnClock), limits(time=7, pings=3, stands=7, graces=(4, 2)),
        "two commands"),
}
if SOAK:
    HOLES.update(SOAKED_HOLES)


@pytest.mark.parametrize("name", HOLES)
def test_a_worse_rule_has_a_hole(name):
    rules, world, what = HOLES[name]
    with pytest.raises(Hole) as hole:
        walk(rules, world)
    assert what in str(hole.value)


# A schedule that takes too long to be found by walking.

STOPPED_LEADER = """
    client_asks 0 0
    daemon_wakes 1
    second_passes
    second_passes
    second_passes
    daemon_wakes 1
    second_passes
    daemon_wakes 1
    second_passes
    daemon_wakes 1
    daemon_wakes 0
    second_passes
    daemon_wakes 1
    second_passes
    daemon_wakes 1
    second_passes
    daemon_wakes 1
    second_passes
    daemon_wakes 1
    second_passes
    daemon_wakes 1
    client_asks 1 1
"""


def play(rules, world, schedule):
    """The world after these moves, one a line."""
    world = beginning(rules, world)
    for line in schedule.split("\n"):
        if line.strip():
            name, *numbers = line.split()
            getattr(world, name)(*map(int, numbers))
    return world


def test_the_end_of_file_of_a_leader_that_was_stopped():
    """It closes the connections 2 s after another leads.  To take that for a sign of life leaves
    the command running when the other has waited for the whole grace."""
    world = play(RULES, limits(time=10, graces=(7, 2)), STOPPED_LEADER)
    assert [client.phase for client in world.clients] == [ENDED, RUNS] and world.time == 10
    with pytest.raises(Hole):
        play(RULES._replace(end_is_good=True), limits(time=10, graces=(7, 2)), STOPPED_LEADER)
