"""What the server tells its clients, and when: with a real table, a store that stores when the
test says so, and clients without sockets; and as a process, whose store waits for a file."""
import os
import select
import socket
import struct
import types

import flomd
import pytest
from fakes import LOCK, PEER, PING, UNLOCK, FlomClient, b64, message, parse
from test_connections import SETTINGS, Log
from world import endpoint, patched, wait_until

pytestmark = pytest.mark.usefixtures("flying_time")


class Told(flomd.Session):
    """A session that has its introduction, so that the class itself stays as it is."""
    __slots__ = ()


Told.introduce("1234", "00112233aabbccdd")


class Client:
    """A connection as the server sees it; `told` has what it was told."""
    peer = "10.77.0.2:50190"
    surplus = False
    on_grant = None  # what a grant is to do to it
    finished = closing = False
    batch = None
    end = flomd.END_OF_FILE

    def __init__(self, world):
        self.world, self.told, self.is_open = world, [], True
        self.session = Told(self, self.peer, str)
        self.resumed = 0
        world.connections.open.add(self)

    def host(self):
        return "10.77.0.2"

    def credentials(self):
        return None, None

    def tell(self, decision):
        if not self.is_open:
            return
        if decision.verdict is None:
            self.close()
            return
        if decision.verdict == flomd.OK and self.on_grant:
            self.on_grant()
        self.session.answer(decision)
        self.told.append(decision.verdict)

    def close(self, _="", end=flomd.END_OF_FILE):
        if self.is_open:
            self.is_open, self.end = False, end
            self.world.connections.closed(self)

    def finish(self):
        self.finished = True

    def send(self, data):
        self.told.append(data)

    def is_held_up(self):
        return True

    def has_gone(self):
        return False

    def resume(self):
        if self.batch is None:
            self.resumed += 1

    def ask(self, name="R", mode=5, wait=1, **more):
        request = flomd.Request(self.session, name, mode=mode, wait=wait, create=1)
        for key, value in more.items():
            setattr(request, key, value)
        self.session.request, self.session.state = request, flomd.ASKING
        self.world.connections.calls["lock"](self, request)
        return request

    def lock(self, name="R", mode=5, wait=1):
        """Asks, and ends the turn."""
        self.ask(name, mode, wait)
        self.world.turn()
        return self

    def release(self):
        self.session.holds = None
        self.session.state = flomd.FREE
        self.world.connections.calls["unlock"](self, True)

    def unlock(self):
        """Releases, and ends the turn, and those that follow from it."""
        self.release()
        self.world.turn()


class Disk:
    """A store: what it was given counts when the test calls store(), at once where it is no
    `later`; `marks` has what became of the mark."""

    def __init__(self, later=False):
        self.kind = "synced" if later else "file"
        self.epoch, self.marked, self.failing = 0, False, ""
        self.given, self.marks = [], []  # batches: (records, done)
        self.taken = []  # all of them
        self.can_mark = True

    def commit(self, records, done):
        self.taken.append((records, done))
        if self.kind == "file" and self.failing:
            return False
        self.given.append((records, done))
        if self.kind == "file":
            self.store()
        return True

    def store(self, number=0):
        _, done = self.given.pop(number)
        done()

    def confirm(self, done):
        done()

    def ping(self, done):
        done()

    def may_tell(self):
        return True

    def away(self, now):
        return 0

    def mark(self, held):
        self.marks.append(held)
        if self.can_mark:
            self.marked = held
        return self.can_mark

    def cover(self, token):
        self.epoch = token >> 32
        return True


class World:
    """A server with its table; turn() ends the turns of the loop until nothing follows."""

    def __init__(self, later=False):
        self.log = Log()
        self.loop = flomd.Loop(self.log)
        settings = dict(SETTINGS, TlsCheckPeerId=False, Policy="fair", AllowRemoteShutdown=False)
        self.connections = flomd.Connections(self.loop, self.log, settings, 10 ** 6)
        self.table = self.make_table()
        self.disk = self.make_disk(later)
        self.used = []
        life = types.SimpleNamespace(was_used=lambda: self.used.append(1), rest=lambda: None)
        self.server = flomd.Server(settings, self.log, self.connections, self.table, self.disk,
                                   life)

    @staticmethod
    def make_table():
        return flomd.LockTable()

    def make_disk(self, later):
        return Disk(later)

    def client(self):
        return Client(self)

    def turn(self):
        while self.loop._last:
            self.loop._end_turn()


@pytest.fixture
def world():
    return World()


def broken():
    raise RuntimeError("a bug")


def test_a_bug_in_telling_one_costs_its_connection_and_no_other_decision(world):
    holder = world.client().lock()
    waiters = [world.client().lock(mode=3) for _ in range(4)]
    waiters[1].on_grant = broken
    holder.unlock()
    assert [one.told for one in waiters] == [[1, 0], [1], [1, 0], [1, 0]]
    assert [one.is_open for one in waiters] == [True, False, True, True]
    assert world.table.holding == 3 and "a bug" in world.log.lines[0]


def test_a_long_row_of_connections_that_end_when_they_are_told(world):
    """Each end brings the next grant, and none of them lies within another."""
    holder = world.client().lock()
    waiters = [world.client().lock() for _ in range(3000)]
    for one in waiters[:-1]:
        one.on_grant = one.close
    holder.unlock()
    world.turn()
    assert not any(one.is_open for one in waiters[:-1])
    assert waiters[-1].told == [1, 0] and world.table.holding == 1 and not world.log.lines


def test_a_draining_server_grants_nothing(world):
    holder = world.client().lock()
    queued = [world.client().lock() for _ in range(3)]
    idle = world.client()
    world.server.drain()
    assert [one.told for one in queued] == [[1]] * 3 and holder.is_open
    assert not idle.is_open and world.used == []
    late = world.client()
    late.lock()
    assert late.told == [] and not late.is_open
    holder.lock()  # a holder may ask again
    assert holder.told == [0, 0]
    holder.close()
    world.turn()
    assert world.used == [1] and world.table.holding == 0


def test_who_has_released_does_not_keep_a_draining_daemon_alive(world):
    holder = world.client().lock()
    world.server.drain()
    assert not holder.finished
    holder.unlock()
    assert holder.finished and world.table.holding == 0


def test_a_lock_that_has_moved_to_another_connection_is_not_lost(world):
    counts = flomd.Counts()
    world.server.publisher = types.SimpleNamespace(
        counts=counts, note=lambda decision: None, changed=lambda: None)

    def ask(client, **more):
        return client.ask(ident="aa", proof="bb", **more)
    before, after = world.client(), world.client()
    token = ask(before).token
    world.turn()
    before.tell = lambda decision: before.close()  # as Connection does: it cannot be told
    ask(after, reclaim=token)
    world.turn()
    assert after.told == [0] and not before.is_open and counts.lost == 0
    after.close()
    assert counts.lost == 1 and world.table.holding == 0


def test_what_is_due_is_done_again_where_it_has_failed(world, monkeypatch):
    monkeypatch.setattr(flomd, "LEAST_LIFESPAN", 10)
    world.client().lock().unlock()
    world.turn()
    real, calls = world.table.expire, []

    def expire(now):
        calls.append(now.mono)
        if len(calls) < 3:
            raise RuntimeError("a bug")
        return real(now)
    world.table.expire = expire
    world.loop.after(10, world.loop.stop)
    world.loop.run()
    assert len(calls) == 3 and world.table.empty()
    assert calls[1] - calls[0] >= flomd.PAUSE <= calls[2] - calls[1]


def test_who_awaits_progress_is_told_of_the_holder_and_of_a_new_place(world, monkeypatch):
    holder = world.client().lock()
    first, second = world.client().lock(), world.client()
    second.session.ours, second.session.about = True, {"progress": "1"}
    said = []
    second.tell = said.append
    second.ask()
    assert (said[0].verdict, said[0].position) == (1, 2) and "held by 10.77" in said[0].reason
    first.close()
    world.turn()
    world.loop.after(1.2, world.loop.stop)
    world.loop.run()
    assert [one.position for one in said] == [2, 1] and holder.is_open


# What waits until it is stored

@pytest.fixture
def slow():
    """A world whose disk stores later."""
    made = World(later=True)
    made.server.batches._take_records = lambda: [("d", "x")]
    return made


def test_a_grant_is_told_when_it_is_stored_and_a_refusal_at_once(slow):
    holder, waiter, busy = [slow.client() for _ in range(3)]
    holder.ask()
    waiter.ask()
    busy.ask(wait=0)
    assert (holder.told, waiter.told, busy.told) == ([], [1], [4])
    slow.turn()
    assert holder.told == [] and len(slow.disk.given) == 1 and holder.resumed == 0
    slow.disk.store()
    assert holder.told == [0] and holder.resumed == 1 and holder.batch is None
    assert waiter.resumed == busy.resumed == 0


def test_nobody_is_told_that_he_has_what_was_released_before_that_is_stored(slow):
    holder, waiter = slow.client().lock(), slow.client().lock()
    slow.disk.store()
    holder.release()
    assert waiter.told == [1] and holder.batch is waiter.batch is not None
    slow.turn()
    assert waiter.told == [1] and holder.resumed == 1
    slow.disk.store()
    assert waiter.told == [1, 0] and holder.resumed == 2


def test_all_of_a_turn_is_one_batch_told_in_order(slow):
    told = []
    for number in range(64):
        client = slow.client()
        client.on_grant = lambda number=number: told.append(number)
        client.ask(f"R{number}")
    slow.turn()
    assert len(slow.disk.given) == 1 and told == []
    slow.disk.store()
    assert told == list(range(64))


def test_whatever_is_said_to_who_waits_is_said_behind(slow):
    """A newer batch that has something of it counts, and what is left to be told is told in order
    even where a store says so in another one."""
    first, second, other = [slow.client() for _ in range(3)]
    first.session.ours = True
    first.ask()
    slow.turn()
    slow.server.deliver([flomd.Decision(first.session, flomd.STOPPED)])
    slow.server.evict(first.session, "why")
    second.ask()
    slow.turn()
    slow.server.deliver([flomd.Decision(first.session, flomd.LIMIT)])
    other.ask("Q")
    slow.turn()
    slow.disk.store(2)
    slow.disk.store(1)
    assert first.told == second.told == other.told == []
    slow.disk.store()
    assert first.told == [0, 8, 10, 9] and second.told == other.told == [0]
    assert [one.resumed for one in (first, second, other)] == [1, 1, 1]


def test_who_is_told_before_others_of_its_batch_may_act_on_it(slow):
    """What is then decided for one that is told later belongs to a batch of its own."""
    one, other = slow.client(), slow.client()
    one.ask()
    other.ask("Q")
    slow.turn()
    one.resume = one.release

    def ask_again():
        slow.server.deliver([flomd.Decision(other.session, flomd.BUSY)])
    other.resume = ask_again
    slow.disk.store()
    assert other.told == [0, 4] and one.batch is not None
    slow.turn()
    assert len(slow.disk.given) == 1


def test_a_change_that_nobody_waits_for_is_stored_within_a_second(slow):
    slow.client().ask(flomd.STATUS_RESOURCE)
    assert not slow.disk.given
    slow.loop.after(1.1, slow.loop.stop)
    slow.loop.run()
    assert len(slow.disk.given) == 1


def test_the_daemon_is_needed_until_the_end_of_the_last_lock_is_stored(slow):
    rested = []
    slow.server._life.rest = lambda: rested.append(slow.server.batches.are_awaited())
    holder = slow.client().lock()
    slow.disk.store()
    holder.close()
    assert slow.server.batches.are_awaited()
    slow.turn()
    assert slow.server.batches.are_awaited() and rested == []
    slow.disk.store()
    assert rested == [False]


def test_what_is_said_to_a_client_that_is_gone_harms_nobody(slow):
    holder = slow.client()
    holder.ask()
    slow.turn()
    waiter = slow.client().lock()
    holder.close()
    slow.turn()
    while slow.disk.given:
        slow.disk.store()
    assert holder.told == [] and waiter.told == [1, 0] and slow.table.holding == 1


def test_the_evicted_and_who_has_evicted_are_told_when_it_is_stored(slow):
    holder, giver = slow.client(), slow.client()
    holder.session.ours = True
    holder.ask(ident="aa")
    slow.turn()
    slow.disk.store()
    giver.is_from_this_host = lambda: True
    slow.server.orders.evict(giver, ("aa", {}))
    slow.turn()
    assert holder.told == [0] and giver.told == [] and not giver.finished
    slow.disk.store()
    assert holder.told == [0, 10] and b'rc="0"' in giver.told[0] and giver.finished


def test_who_hears_of_the_end_before_its_grant_holds_nothing(slow):
    """A successor would keep the lock for nobody; but a known holder that asks again has it."""
    holder = slow.client()
    holder.session.ours = True
    holder.ask("R1", ident="aa", proof="bb")
    slow.turn()
    slow.disk.store()
    late, again, waiter, floms = [slow.client() for _ in range(4)]
    late.session.ours = again.session.ours = waiter.session.ours = True
    again.ask("R1", ident="aa", proof="bb", pid=7)
    late.ask("R2")
    waiter.ask("R2")
    floms.ask("R3")
    slow.turn()
    slow.server.tell_stopped("an order")
    assert late.told == again.told == [8] and waiter.told == [1, 8] and floms.told == []
    assert set(slow.table.requests) == {again.session, floms.session}


# What cannot be stored

def fail(world):
    world.disk.failing = "no space"
    world.server.batches._take_records = lambda: [("d", "x")]


def test_a_store_that_fails_has_the_mark_and_the_grant_is_told(world):
    fail(world)
    assert world.client().lock().told == [0] and world.disk.marks == [True]
    assert world.client().lock("Q").told == [0] and world.disk.marks == [True]


def test_what_is_not_stored_is_promised_to_nobody(world):
    """A successor keeps no lock that it does not know."""
    fail(world)
    client = world.client()
    request = client.ask()
    request.grace = 5000
    world.turn()
    assert client.told == [0] and request.grace is None


def test_who_can_keep_nothing_at_all_grants_nothing(world):
    fail(world)
    world.disk.can_mark = False
    first, second = world.client(), world.client()
    first.session.ours = second.session.ours = True
    first.ask()
    second.ask()
    world.turn()
    assert first.told == [9] and second.told == [1, 9] and world.table.holding == 0
    assert not world.disk.marked
    world.disk.can_mark = True
    assert world.client().lock().told == [0]


def test_a_holder_keeps_its_lock_where_nothing_can_be_stored(world):
    holder = world.client().lock()
    fail(world)
    world.disk.can_mark = False
    holder.ask()
    world.turn()
    assert holder.told == [0, 0]
    holder.unlock()
    assert world.table.holding == 0


def test_a_holder_that_was_not_told_keeps_its_lock_where_nothing_can_be_stored(world):
    """Its client asks again on another connection, as it did before: without a token."""
    asked = {"ident": "aa", "proof": "bb", "pid": 1}
    first, second = world.client(), world.client()
    first.ask(**asked)
    world.turn()
    fail(world)
    world.disk.can_mark = False
    second.ask(**dict(asked, pid=2))
    world.turn()
    assert second.told == [0] and world.table.holding == 1 and not first.is_open


def test_of_one_turn_neither_the_grant_nor_who_asks_again_is_told(world):
    """The grant that is asked for again is not stored either."""
    fail(world)
    world.disk.can_mark = False
    first, second = world.client(), world.client()
    for client in (first, second):
        client.session.ours = True
        client.ask(ident="aa", proof="bb")
    world.turn()
    assert second.told == [9] and world.table.holding == 0


@pytest.mark.parametrize("later", [False, True])
def test_a_bug_in_making_records_costs_no_decision(later):
    world = World(later)
    world.server.batches._take_records = broken
    assert world.client().lock().told == [0]
    assert world.disk.marked and "a bug" in world.log.lines[0]


def late(world, clients):
    """Until the batches of these clients are late."""
    world.turn()
    for batch in world.server.batches._pending:
        batch.until = 0
    world.loop.after(2 * flomd.LOOK_AT_STORE, world.loop.stop)
    world.loop.run()
    world.loop._stopped = False


def test_nobody_waits_for_ever_for_a_disk(slow):
    ends = slow.client().lock("E")
    slow.disk.store()
    patient, impatient = slow.client(), slow.client()
    patient.ask("P")
    impatient.ask("I", wait=0)
    ends.release()
    late(slow, [patient])
    assert (patient.told, impatient.told) == ([1], [4])
    assert not ends.is_open and patient.is_open and impatient.resumed == 1
    assert patient.resumed == 0 and slow.table.holding == 1
    while slow.disk.given:
        slow.disk.store()
    assert (patient.told, impatient.told) == ([1, 0], [4]) and patient.resumed == 1


def test_a_bug_in_giving_back_a_grant_costs_no_decision(slow, monkeypatch):
    """Whoever is late beside it is told all the same, now and later."""
    clients = [slow.client() for _ in range(3)]
    for number, client in enumerate(clients):
        client.ask(f"R{number}", wait=0)
    monkeypatch.setattr(slow.table, "gone", lambda *_: broken())
    late(slow, clients)
    assert [client.told for client in clients] == [[4]] * 3
    assert "a bug" in slow.log.lines[0]


def test_nobody_waits_for_ever_behind_what_is_not_stored(slow):
    """What has nothing to be stored is said behind what has."""
    slow.client().lock()
    slow.server.batches._take_records = list
    client, said = slow.client(), []
    slow.server.when_stored(client, lambda connection, detail: said.append(detail), "done")
    slow.turn()
    assert not said
    slow.loop.after(2 * flomd.LATE, slow.loop.stop)
    slow.loop.run()
    assert said == ["done"] and client.batch is None and client.resumed and slow.disk.given


def test_a_disk_that_does_not_store_keeps_no_daemon_alive(slow):
    rested = []
    holder = slow.client().lock()
    slow.disk.store()
    slow.server._life.rest = lambda: rested.append(slow.server.batches.are_awaited())
    holder.close()
    late(slow, [holder])
    assert rested[-1] is False and slow.disk.given


def test_who_has_been_told_to_wait_waits_on(slow):
    holder = slow.client().lock()
    slow.disk.store()
    waiter = slow.client().lock()
    holder.close()
    late(slow, [waiter])
    assert waiter.told == [1] and waiter.is_open
    slow.disk.store()
    assert waiter.told == [1, 0]


# A process

SLOW = """
import os
real = flomd.Disk.commit

def commit(self, records, done):
    def look():
        if os.path.exists({gate!r}):
            real(self, records, done)
        else:
            self._loop.after(0.01, look)
    look()
    return True
flomd.Disk.commit = commit
"""


@pytest.fixture
def gate(box):
    """A daemon that stores when there is a file at this path."""
    path = box.path("gate")
    box.daemon(program=patched(SLOW.format(gate=path)))
    return path


def open_gate(path):
    with open(path, "w"):
        pass


def connect(box):
    return FlomClient(*endpoint(box.address))


def lock(name, ident, wait=0):
    return message(LOCK, 8, f'<session peerid="{PEER}" client="flom.py/1.0" id="{ident:016}" '
                            f'key="{ident:016}"/><resource name="{b64(name)}" mode="5" '
                            f'wait="{wait}" create="1" lifespan="0"/>')


def unlock(name):
    return message(UNLOCK, 8, f'<resource name="{b64(name)}" rollback="0" />')


def has_read_all(box):
    """The daemon answers who comes later, so it has read what was sent before."""
    assert box.run("--status").status == 0


def hears_nothing(*clients):
    readable, _, _ = select.select([client.socket for client in clients], [], [], 0.1)
    return readable == []


def verdict(client):
    return parse(client.receive())["answer"]["rc"]


def test_messages_that_came_together_are_answered_in_order(box, gate):
    with connect(box) as client, connect(box) as other:
        client.socket.sendall(lock("A", 1) + unlock("A") + message(PING, 8) + lock("B", 2))
        other.socket.sendall(lock("C", 3) + message(PING, 8))
        assert hears_nothing(client, other)
        assert box.run("--status").status == 0  # a report waits for nothing
        open_gate(gate)
        assert verdict(client) == "0" and verdict(other) == "0"
        assert parse(client.receive())["msg"]["verb"] == str(PING)
        assert verdict(client) == "0"
        assert parse(other.receive())["msg"]["verb"] == str(PING)


@pytest.mark.parametrize("how", ["half-close", "close", "reset"])
def test_who_ends_while_it_waits_is_gone_afterwards(box, gate, how):
    with connect(box) as client, connect(box) as waiter:
        client.socket.sendall(lock("A", 1))
        has_read_all(box)
        waiter.socket.sendall(lock("A", 2, wait=1))
        assert verdict(waiter) == "1"
        if how == "half-close":
            client.socket.shutdown(socket.SHUT_WR)
        elif how == "reset":
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if how != "half-close":
            client.socket.close()
        assert hears_nothing(waiter)
        open_gate(gate)
        assert verdict(waiter) == "0"
        if how == "half-close":
            assert verdict(client) == "0" and client.receive() == b""


def test_an_order_to_end_reaches_those_who_wait(box, gate):
    with connect(box) as client, connect(box) as waiter:
        client.socket.sendall(lock("A", 1))
        has_read_all(box)
        waiter.socket.sendall(lock("A", 2, wait=1))
        assert verdict(waiter) == "1"
        assert box.run("-X").status == 0
        assert verdict(client) == verdict(waiter) == "8"


def test_a_quiescing_daemon_ends_when_the_last_end_is_stored(box, gate):
    open_gate(gate)
    daemon = box.foreground[-1]
    with connect(box) as client:
        client.socket.sendall(lock("A", 1))
        assert verdict(client) == "0"
        os.unlink(gate)
        assert box.run("-x").status == 0
        client.socket.sendall(unlock("A"))
        client.socket.shutdown(socket.SHUT_WR)
        assert hears_nothing(client) and daemon.poll() is None
        open_gate(gate)
        assert client.receive() == b""
    wait_until(lambda: daemon.poll() is not None)


def test_who_is_evicted_while_it_waits_hears_both(box, gate):
    with connect(box) as client:
        client.socket.sendall(lock("A", 1))
        giver = box.flom("--evict", f"{1:016}")
        assert hears_nothing(client) and giver.poll() is None
        open_gate(gate)
        assert verdict(client) == "0" and verdict(client) == "10" and client.receive() == b""
        assert giver.end().status == 0
