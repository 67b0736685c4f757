"""What the server tells its clients, with a real table and clients without sockets."""
import types

import flomd
import pytest
from test_connections import SETTINGS, Log


class Told(flomd.Session):
    """A session that has its introduction, so that the class itself stays as it is."""
    __slots__ = ()


Told.introduce("1234", "00112233aabbccdd")


class Client:
    """A connection as the server sees it; `told` has what it was told."""
    peer = "10.77.0.2:50190"
    surplus = False
    on_grant = None  # what a grant is to do to it
    finished = False

    def __init__(self, world):
        self.world, self.told, self.is_open = world, [], True
        self.session = Told(self, self.peer, str)
        world.connections.open.add(self)

    def host(self):
        return "10.77.0.2"

    def credentials(self):
        return None, None

    def tell(self, decision):
        if not self.is_open:
            return
        if decision.verdict == flomd.OK and self.on_grant:
            self.on_grant()
        self.session.answer(decision)
        self.told.append(decision.verdict)

    def close(self):
        if self.is_open:
            self.is_open = False
            self.world.connections.closed(self)

    def finish(self):
        self.finished = True

    def lock(self, name="R", mode=5, wait=1):
        request = flomd.Request(self.session, name, mode=mode, wait=wait, create=1)
        self.session.request, self.session.state = request, flomd.ASKING
        self.world.connections.calls["lock"](self, request)
        return self

    def unlock(self):
        self.session.holds = None
        self.world.connections.calls["unlock"](self, True)


class World:
    """A server with its table; what is due is done by turn()."""

    def __init__(self):
        self.log = Log()
        self.loop = flomd.Loop(self.log)
        settings = dict(SETTINGS, TlsCheckPeerId=False, Policy="fair", AllowRemoteShutdown=False)
        self.connections = flomd.Connections(self.loop, self.log, settings, 10 ** 6)
        self.table = flomd.LockTable()
        state = types.SimpleNamespace(epoch=0, marked=True, mark=lambda held: None)
        self.used = []
        life = types.SimpleNamespace(was_used=lambda: self.used.append(1), rest=lambda: None)
        self.server = flomd.Server(settings, self.log, self.connections, self.table, state, life)

    def client(self):
        return Client(self)


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
        request = flomd.Request(client.session, "R", mode=5, create=1)
        request.ident, request.key = "aa", "bb"
        for name, value in more.items():
            setattr(request, name, value)
        client.session.request, client.session.state = request, flomd.ASKING
        world.connections.calls["lock"](client, request)
        return request
    before, after = world.client(), world.client()
    token = ask(before).token
    before.tell = lambda decision: before.close()  # as Connection does: it cannot be told
    ask(after, reclaim=token)
    assert after.told == [0] and not before.is_open and counts.lost == 0
    after.close()
    assert counts.lost == 1 and world.table.holding == 0


def test_what_is_due_is_done_again_where_it_has_failed(world, monkeypatch):
    monkeypatch.setattr(flomd, "PAUSE", 0.02)
    monkeypatch.setattr(flomd, "LEAST_LIFESPAN", 10)
    world.client().lock().unlock()
    real, calls = world.table.expire, []

    def expire(now):
        calls.append(now.mono)
        if len(calls) < 3:
            raise RuntimeError("a bug")
        return real(now)
    world.table.expire = expire
    world.loop.after(0.3, world.loop.stop)
    world.loop.run()
    assert len(calls) == 3 and world.table.empty()
    assert calls[1] - calls[0] >= 0.02 and calls[2] - calls[1] >= 0.02


def test_who_awaits_progress_is_told_of_the_holder_and_of_a_new_place(world, monkeypatch):
    holder = world.client().lock()
    first, second = world.client().lock(), world.client()
    second.session.ours, second.session.about = True, {"progress": "1"}
    said = []
    second.tell = said.append
    second.lock()
    assert (said[0].verdict, said[0].position) == (1, 2) and "held by 10.77" in said[0].reason
    first.close()
    world.loop.after(1.2, world.loop.stop)
    world.loop.run()
    assert [one.position for one in said] == [2, 1] and holder.is_open
