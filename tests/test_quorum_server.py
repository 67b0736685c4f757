"""What the server of a quorum tells its clients, and when: its store is etcd, which answers when
the test says so."""
import socket
import ssl

import flomd
import pytest
import test_server
from certificates import Certificates
from fakes import LOCK, MANAGEMENT, b64, message
from test_server import Client

pytestmark = pytest.mark.usefixtures("flying_time")

PONG = flomd.Session.pong
PING, GRACE = 2000, 25000  # ms


class Chain:
    """The store of a leader: what it was given counts when the test calls answer()."""
    kind = flomd.IN_ETCD
    failing = ""
    marked = False

    def __init__(self, epoch):
        self.epoch = epoch
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

    def __init__(self, claimed=0):
        super().__init__()
        now = self.loop.now
        self.server.absences.begin_term(now.boot - claimed, GRACE)

    EPOCH = 1

    def make_disk(self, later):
        return Chain(self.EPOCH)

    def make_table(self):
        return flomd.LockTable(epoch=self.EPOCH)

    def settle(self):
        """Ends the turn; etcd answers, until nothing is left."""
        self.turn()
        while self.disk.asked or self.disk.pings:
            self.disk.answer()
            self.turn()

    def ping(self, client):
        self.connections.calls["ping"](client, None)

    def ours(self, name="R", ident=None, **more):
        """A client of ours that has asked; with a resource's name for an id, if none is given."""
        client = self.client()
        client.session.ours = True
        ident = ident or name
        client.ask(name, ident=ident, proof=ident, **more)
        return client

    def waiter(self, name="R", **more):
        """Another one, who asks for the same."""
        return self.ours(name, "other", **more)

    def holder(self, name="R", **more):
        """A client of ours that holds."""
        client = self.ours(name, **more)
        self.settle()
        assert client.told == [0]
        client.told.clear()
        return client


    def absent(self):
        return [holder.name for holder in self.table.absent.values()]

    def until(self):
        """The s for which the absent holders are kept."""
        return [round(until - self.loop.now.mono) for until, _, _ in
                sorted(self.server.absences._graces, key=lambda entry: entry[0])]

    def run(self, seconds):
        self.loop.after(seconds, self.loop.stop)
        self.loop.run()
        self.loop._stopped = False


@pytest.fixture
def world():
    return World()


class Later(World):
    """The world of the next leader, which knows what was stored."""
    EPOCH = 2

    def __init__(self, before, claimed=0):
        self.records = {key: text for key, text in before.disk.stored.items() if text is not None}
        super().__init__(claimed)

    def make_table(self):
        table = super().make_table()
        for _ in flomd.restoring(self.records, table, flomd.Moment(), False, str, moved=True):
            pass
        return table


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


# The end of a connection

FAILURES = [end for end, frees in flomd.RELEASES.items() if not frees]


@pytest.mark.parametrize("end", FAILURES)
def test_a_connection_that_has_failed_leaves_an_absent_holder(world, end):
    holder = world.holder()
    token = world.table.requests[holder.session].token
    waiter = world.waiter(kill=5000)
    stored = dict(world.disk.stored)
    holder.close(end=end)
    world.settle()
    assert world.absent() == ["R"] and world.until() == [25] and waiter.told == [1]
    assert world.disk.stored == stored and world.disk.holders() == [token]
    again = world.ours(wait=0, reclaim=token)
    world.settle()
    assert again.told == [0] and not world.absent() and not again.batch
    again.unlock()
    world.settle()
    assert waiter.told == [1, 0]


@pytest.mark.parametrize("how", ["end of file", "unlock"])
def test_what_its_client_releases_is_free(world, how):
    holder, waiter = world.holder(), world.waiter()
    if how == "unlock":
        holder.unlock()
    else:
        holder.close()
    world.settle()
    assert not world.absent() and waiter.told == [1, 0]


def test_a_waiter_whose_connection_has_failed_waits_no_more(world):
    world.holder()
    waiter = world.waiter()
    waiter.close(end="reset")
    assert not world.absent() and world.table.waiting == 0


def test_floms_client_is_absent_too_and_nobody_comes_back(world):
    client = world.client()
    client.ask()
    world.settle()
    client.close(end="reset")
    assert world.absent() == ["R"] and world.until() == [25]
    other = world.client()
    other.ask(wait=0)
    assert other.told == [4]


def test_the_grace_counts_from_the_failure_and_ends(world):
    world.server.absences.grace = 50000
    waiting = []
    for name, grace in (("R", 30000), ("Q", 200000), ("P", None)):
        holder = world.holder(name)
        world.table.requests[holder.session].grace = grace
        waiting.append(world.ours(name, f"waiter for {name}"))
        world.run(20)
        holder.close(end="reset")
    world.run(70)
    assert world.absent() == ["Q"]
    world.run(150)
    world.settle()
    assert not world.absent() and [one.told for one in waiting] == [[1, 0]] * 3


def test_many_that_become_absent_are_one_line_of_the_log(world, monkeypatch):
    """Also one that asks again and again while etcd is silent."""
    monkeypatch.setattr(flomd, "GATHERED", 0.02)
    holders = [world.holder(name) for name in ("P", "Q", "R")]
    token = world.table.requests[holders[2].session].token
    for holder in holders:
        holder.close(end="reset")
    for _ in range(30):
        again = world.ours(reclaim=token)
        world.turn()
        again.close(end="reset")
    assert world.log.told == []
    world.run(0.05)
    line, = world.log.told
    assert line.startswith("'R', of ") and line.endswith(
        " is kept for 25 s: its connection ended by reset; so are 2 more")
    world.ours(reclaim=token).close(end="reset")
    world.run(0.05)
    assert len(world.log.told) == 1  # the next one in INTERVAL s
    world.server.absences.stop()
    assert world.server.absences._tell not in world.loop._dates


def test_who_has_come_back_and_fails_again_has_a_whole_grace(world):
    world.server.absences.grace = 0
    holder = world.holder()
    request = world.table.requests[holder.session]
    for _ in range(4):
        request.grace = 100000
        holder.close(end="reset")
        world.run(60)
        assert world.absent() == ["R"]
        holder = world.ours(reclaim=request.token)
        world.settle()
    assert holder.told == [0]
    world.run(120)
    assert world.table.holding == 1 and not world.server.absences._until


@pytest.mark.parametrize("end", ["reset", "end of file"])
def test_a_grant_that_was_not_told_is_nobodys(world, end):
    """It may have been stored all the same; its client runs no command."""
    client = world.ours()
    waiter = world.waiter()
    world.turn()
    client.close(end=end)
    world.settle()
    assert not world.absent() and client.told == [] and waiter.told == [1, 0]
    assert world.disk.holders() == [world.table.requests[waiter.session].token]


@pytest.mark.parametrize("end", ["reset", "end of file"])
@pytest.mark.parametrize("reclaims", [True, False])
def test_one_that_comes_back_and_leaves_before_it_was_told_keeps_its_lock(world, end, reclaims):
    """Its command runs: it has closed the connection since the answer took too long."""
    holder = world.holder()
    token = world.table.requests[holder.session].token
    again = world.ours(wait=0, reclaim=token if reclaims else None)
    world.turn()
    again.close(end=end)
    world.settle()
    assert not holder.is_open and world.absent() == ["R"]
    last = world.ours(reclaim=token)
    world.settle()
    assert last.told == [0] and not world.absent()


@pytest.mark.parametrize("reclaims", [True, False])
def test_who_comes_back_and_has_gone_before_it_is_answered_keeps_its_lock(world, reclaims):
    """It was not read meanwhile, and its end would be an end of file after the answer."""
    token = world.table.requests[world.holder().session].token
    again = world.ours(wait=0, reclaim=token if reclaims else None)
    world.turn()
    again.has_gone = lambda: True
    world.settle()
    assert again.told == [] and not again.is_open and world.absent() == ["R"]


def test_the_old_connection_is_closed_when_the_reclaim_counts(world):
    """Also where its own grant was not told: it is not granted twice."""
    holder = world.ours()
    world.turn()
    again = world.ours()
    world.turn()
    assert holder.is_open and again.told == []
    world.settle()
    assert again.told == [0] and not holder.is_open and world.table.holding == 1
    assert list(world.table.requests) == [again.session]


def test_the_eviction_of_an_absent_holder(world):
    world.holder().close(end="reset")
    giver, waiter = world.client(), world.waiter()
    giver.is_from_this_host = lambda: True
    world.server.orders.evict(giver, ("R", {}))
    world.turn()
    assert giver.told == [] and waiter.told == [1]
    world.settle()
    assert b'rc="0"' in giver.told[0] and waiter.told == [1, 0] and not world.absent()


def test_a_report_shows_it_as_it_was(world):
    def holder_element():
        pieces = "".join(flomd.report(world.table, "", world.loop.now))
        return pieces[pieces.index("<holder"):pieces.index("/>", pieces.index("<holder"))]
    holder = world.holder()
    holder.session.about = {"host": "db1", "pid": "7", "cmd": "vacuum"}
    before = holder_element()
    holder.close(end="reset")
    assert holder_element().replace(' absent="1"', "") == before != holder_element()


# The next leader

def test_a_former_holder_is_kept_from_the_claim_on(world):
    world.holder()
    world.table.requests[world.holder("Q").session].grace = 60000
    world.disk.stored.update(flomd.everything(world.table))
    later = Later(world, claimed=3)
    assert later.absent() == ["R", "Q"] and later.until() == [22, 57]
    assert not later.server.absences._watched


def test_many_former_holders_have_their_graces_in_portions(world, monkeypatch):
    """Who has come back meanwhile, and is absent anew, is kept from then on."""
    monkeypatch.setattr(flomd, "MOST_LOOKED_AT", 2)
    tokens = {}
    for name in "RQPNM":
        tokens[name] = world.table.requests[world.holder(name).session].token
    world.disk.stored.update(flomd.everything(world.table))
    later = Later(world, claimed=10)
    assert later.until() == [15, 15]
    known = later.ours("M", reclaim=tokens["M"])
    later.settle()
    assert known.told == [0]
    known.close(end="reset")
    later.run(0.1)
    assert later.absent() == list("RQPNM") and later.until() == [15, 15, 15, 15, 25]
    later.server.abandon()


def test_a_former_holder_is_itself_and_nobody_else(world):
    token = world.table.requests[world.holder().session].token
    gone = world.holder("Q")
    old = world.table.requests[gone.session].token
    gone.unlock()
    world.settle()
    later = Later(world)
    known, unknown = later.ours(reclaim=token), later.ours("Q", reclaim=old, wait=0)
    later.turn()
    assert known.told == unknown.told == []
    later.settle()
    assert known.told == [0] and unknown.told == [4] and later.table.holding == 1


def test_a_former_holder_that_was_not_told_gets_what_was_stored(world):
    world.ours()
    world.turn()
    later = Later(world)
    again = later.ours()
    later.settle()
    assert again.told == [0] and not later.absent() and later.table.holding == 1


def test_a_former_holder_that_asks_for_another_lock_has_ended(world):
    world.holder()
    later = Later(world)
    waiter = later.client()
    waiter.ask()
    other = later.client()
    other.ask("Q", ident="R", proof="R")
    later.settle()
    assert other.told == [0] and waiter.told == [1, 0]


# What is told, and when

def test_what_stores_nothing_is_told_when_etcd_has_confirmed_that_nobody_else_leads(world):
    holder = world.holder()
    stored = dict(world.disk.stored)
    holder.ask(ident="R", proof="R", grace=GRACE)
    world.turn()
    assert holder.told == [] and world.disk.confirmed == 1
    world.settle()
    assert holder.told == [0] and world.disk.stored == stored


def test_what_refuses_queues_or_reports_waits_for_nothing(world):
    world.holder()
    busy, waiter = world.waiter(wait=0), world.ours("R", "waiter")
    assert busy.told == [4] and waiter.told == [1] and not world.disk.asked


def test_a_change_that_nobody_waits_for_is_not_confirmed(world):
    world.server.batches.commit()
    assert not world.disk.asked and world.disk.confirmed == 0


def test_a_deposed_leader_tells_no_grant_and_refuses_no_reclaim(world):
    client = world.ours()
    unknown = world.ours("Q", wait=0, reclaim=1)
    world.turn()
    world.disk.leads = False
    world.settle()
    assert client.told == unknown.told == []


def test_the_end_of_a_lock_that_is_not_stored_is_not_acknowledged(world):
    holder, waiter = world.holder(), world.waiter()
    holder.release()
    world.turn()
    assert holder.batch is not None and waiter.told == [1]


# The end of a leader

class Site(World):
    """The same with clients that have sockets."""
    PEER = "127.0.0.1:50190"

    def __init__(self):
        super().__init__()
        self.ordered, self.clients = [], []
        self.server._life.stop_by_order = self.ordered.append
        self.server.orders._life = self.server._life

    def connect(self):
        """(a new connection over TCP, its client's socket)"""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            client = socket.create_connection(listener.getsockname(), 10)
            accepted, _ = listener.accept()
        accepted.setblocking(False)
        before = set(self.connections.open)
        self.connections.welcome(accepted, self.PEER)
        self.clients.append(client)
        connection, = self.connections.open - before
        return connection, client

    def serve(self):
        """A turn of the loop, and what follows from it."""
        self.loop.after(0, self.loop.stop)
        self.loop.run()
        self.loop._stopped = False
        self.turn()

    def ask_by_wire(self, client, name, wait=1, ident=None):
        if ident is None:
            ident = f"{name}{self.clients.index(client)}"
        client.sendall(message(LOCK, 8, f'<session peerid="1" client="flom.py/1.0" id="{ident}" '
                                        f'key="{ident}"/><resource name="{b64(name)}" mode="5" '
                                        f'wait="{wait}" create="1" lifespan="0"/>'))
        self.serve()


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(flomd, "Session", test_server.Told)
    made = Site()
    yield made
    for client in made.clients:
        client.close()
    made.server.abandon()


def is_reset(client):
    """As the system tells it; ssl may call it an end of the file."""
    with pytest.raises(ConnectionResetError):
        while socket.socket.recv(client, 4096):
            pass
    return True


def dates(world):
    """What the loop is about to call for the server."""
    return [act for act in [*world.loop._dates, *world.loop._last] if act != world.loop.stop]


def test_a_leader_that_is_deposed_resets_all_and_calls_nothing(site):
    clients = []
    for name in ("holder", "ended", "pending", "paused", "idle"):
        connection, client = site.connect()
        clients.append(client)
        if name != "idle":
            site.ask_by_wire(client, name)
        if name in ("holder", "ended"):
            site.disk.answer()
            assert b'rc="0"' in client.recv(1000)
        if name == "ended":
            client.shutdown(socket.SHUT_WR)
        if name == "paused":
            client.sendall(flomd.encode(flomd.PING, 8))
        site.serve()
    site.server.absences.keep(site.table.holders[min(site.table.holders)], "reset")
    given = list(site.disk.asked)
    site.server.batches.changed()
    site.server.abandon()
    assert all(map(is_reset, clients))
    assert not dates(site) and not site.loop._watched and not site.connections.open
    for done in given:  # nothing happens any more
        done()
    site.server.batches.commit()
    assert not dates(site) and not site.log.lines[1:]


def test_a_leader_that_is_deposed_while_it_has_something_stored(site):
    """The store may see at any of its calls that the time is over."""
    _, client = site.connect()
    for name in ("commit", "ping", "confirm"):
        setattr(site.disk, name, lambda *_: site.server.abandon() or True)
    site.ask_by_wire(client, "R")
    site.serve()
    assert is_reset(client) and not dates(site)


def test_a_connection_of_tls_is_reset_too(site, tmp_path):
    made = Certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.pem("server"), made.key("server"))
    site.connections.tls = context
    _, bare = site.connect()
    client = made.context().wrap_socket(bare, do_handshake_on_connect=False)
    site.clients.append(client)
    client.setblocking(False)
    for _ in range(100):
        try:
            client.do_handshake()
            break
        except ssl.SSLWantReadError:
            site.serve()
    client.setblocking(True)
    site.ask_by_wire(client, "R")
    site.server.abandon()
    assert is_reset(client)


def test_a_leader_that_hands_over_hears_nobody_and_all_see_an_end_of_file(site):
    _, holder = site.connect()
    site.ask_by_wire(holder, "R")
    site.disk.answer()
    holder.recv(1000)
    _, late = site.connect()
    site.ask_by_wire(late, "Q")
    asked = len(site.disk.asked)
    _, waiter = site.connect()
    site.ask_by_wire(waiter, "R")
    waiter.recv(1000)
    _, newcomer = site.connect()
    site.server.hand_over()
    assert len(site.disk.asked) == asked and len(site.disk.holders()) == 2
    holder.sendall(flomd.encode(flomd.PING, 8))
    waiter.shutdown(socket.SHUT_WR)
    site.ask_by_wire(newcomer, "P")
    for _ in range(3):
        site.serve()
    assert site.table.holding == 2 and len(site.table.requests) == 3
    assert len(site.disk.asked) == asked and not site.disk.pings and not dates(site)
    site.server.end_in_order()
    assert [client.recv(1000) for client in (holder, late, waiter, newcomer)] == [b""] * 4


def test_what_was_decided_in_the_last_turn_is_stored(site):
    _, client = site.connect()
    client.sendall(message(LOCK, 8, f'<resource name="{b64("R")}" mode="5" create="1"/>'))
    for _ in range(5):
        site.loop._turn(0.01)
    assert not site.disk.asked
    site.server.hand_over()
    assert len(site.disk.holders()) == 1


@pytest.mark.parametrize("immediate", [0, 1])
def test_who_has_ordered_the_end_is_told_what_has_become_of_it(site, immediate):
    _, holder = site.connect()
    site.ask_by_wire(holder, "R")
    site.disk.answer()
    holder.recv(1000)
    _, giver = site.connect()
    order = f'<session peerid="1"/><shutdown immediate="{immediate}"/>'
    giver.sendall(message(MANAGEMENT, 8, order))
    site.serve()
    assert len(site.ordered) == 1
    site.server.hand_over()
    site.serve()
    site.server.end_in_order()
    told = giver.recv(1000)
    assert b'rc="0" reason="this daemon ended; another one takes over"' in told
    assert giver.recv(1000) == holder.recv(1000) == b""


# No quorum

def look(world, silent_for):
    """etcd has not answered for so long (s) when the server looks."""
    world.disk.silent_for = silent_for
    world.server.batches._look()
    world.turn()


def test_who_waits_is_told_after_a_second_and_once(world):
    client = world.ours()
    told = []
    client.tell = lambda decision: told.append(decision[1::4]) or Client.tell(client, decision)
    world.turn()
    look(world, 0.9)
    assert told == []
    for silent in (1.0, 1.2, 2.5, 8.0):
        look(world, silent)
    assert told == [(1, "no quorum")] and client.batch is not None
    world.settle()
    assert told == [(1, "no quorum"), (0, None)] and client.batch is None and client.resumed == 1


def test_who_was_queued_and_is_granted_is_told_so_too(world):
    holder, waiter, floms = world.holder(), world.waiter(), world.client()
    world.holder("Q")
    floms.ask("Q")
    holder.release()
    world.turn()
    look(world, 1.5)
    look(world, 1.7)
    assert waiter.told == [1, 1] and floms.told == [1] and holder.told == []
    world.settle()
    assert waiter.told == [1, 1, 0]


def test_a_request_that_comes_while_etcd_is_away(world):
    world.ours("P")
    world.turn()
    look(world, 5)
    waits, does_not = world.ours("Q"), world.ours("R", wait=0)
    world.turn()
    look(world, 5.2)
    assert waits.told == [1] and does_not.told == [9]
    assert [one.name for one in world.table.holders.values()] == ["P", "Q"]
    world.settle()
    assert waits.told == [1, 0] and set(world.disk.holders()) == set(world.table.holders)


def test_who_does_not_wait_is_refused_after_two_seconds_and_holds_nothing(world):
    client, waiter = world.ours(wait=0), world.waiter()
    floms = world.client()
    floms.ask("Q", wait=0)
    world.turn()
    look(world, 1.9)
    assert client.told == floms.told == []
    look(world, 2)
    assert client.told == [9] and floms.told == [4] and waiter.told == [1]
    assert client.batch is None and client.resumed == 1
    look(world, 2.2)
    assert waiter.told == [1, 1]
    world.settle()
    assert client.told == [9] and waiter.told == [1, 1, 0]
    assert world.disk.holders() == [world.table.requests[waiter.session].token]


def test_a_reclaim_is_not_refused_as_if_others_held_the_lock(world):
    """It hears that there is no quorum, tries again, and is the holder throughout."""
    holder = world.holder(wait=0)
    holder.session.state = flomd.ASKING
    token = world.table.requests[holder.session].token
    again, unknown = world.ours(reclaim=token, wait=0), world.ours("Q", reclaim=7, wait=0)
    world.turn()
    look(world, 2)
    assert again.told == unknown.told == [9] and world.table.holding == 1
    assert holder.is_open  # it hears when the reclaim is stored
    again.close()
    assert world.absent() == ["R"]
    last = world.ours(reclaim=token, wait=0)
    world.settle()
    assert again.told == [9] and last.told == [0] and not world.absent()
    assert holder.told == [] and not holder.is_open


def test_a_holder_that_asks_again_keeps_what_it_has(world):
    holder = world.holder()
    holder.ask(ident="R", proof="R", wait=0)
    holder.session.state = flomd.HOLDER_ASKS
    world.turn()
    look(world, 5)
    assert holder.told == []
    world.settle()
    assert holder.told == [0] and world.table.holding == 1


def test_an_end_that_is_not_stored_is_not_acknowledged_however_long_it_takes(world):
    holder = world.holder()
    holder.release()
    holder.has_gone = lambda: True  # it has closed its side behind the unlock
    holder.resumed = 0
    world.turn()
    for silent in (1, 2, 5, 8):
        look(world, silent)
    assert holder.is_open and holder.resumed == 0 and holder.batch is not None


def test_who_has_gone_while_etcd_was_away_holds_nothing(world):
    client, waiter = world.ours(), world.waiter()
    world.turn()
    client.has_gone = lambda: True
    look(world, 1)
    assert not client.is_open and not world.absent()
    world.settle()
    assert waiter.told == [1, 0] and client.told == []


@pytest.mark.parametrize("how", ["refused", "gone"])
def test_a_grant_that_has_moved_to_another_connection_is_not_told(site, how):
    """The first one has waited for it all the time, and would take it for its own."""
    _, first = site.connect()
    _, second = site.connect()
    site.ask_by_wire(first, "R", ident="aa")
    site.ask_by_wire(second, "R", wait=0, ident="aa")
    if how == "gone":
        second.shutdown(socket.SHUT_WR)
        site.serve()
    look(site, 2)
    for _ in range(3):
        site.disk.answer()
        site.serve()
    assert first.recv(1000) == b"" and site.table.holding == 0
    told = second.recv(1000)
    assert b'rc="9" reason="no quorum"' in told or how == "gone" and told == b""


def test_who_awaits_progress_learns_it_in_the_queue_and_when_it_is_over(world, monkeypatch):
    world.holder()
    waiter = world.client()
    waiter.session.ours, waiter.session.about = True, {"progress": "1"}
    said = []
    waiter.tell = lambda decision: said.append(decision.reason)
    waiter.ask()
    progress = world.server._progress
    for silent in (0.5, 1.5, 2.5, 0, 0.1):
        world.disk.silent_for = silent
        progress._tell()
    assert len(said) == 3 and said[1] == "no quorum" and said[0] == said[2] != said[1]
    world.disk.silent_for = 3
    late = world.client()
    late.session.ours, late.session.about, late.tell = True, {"progress": "1"}, waiter.tell
    late.ask()
    assert said[3:] == ["no quorum"]
