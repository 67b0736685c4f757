"""What a connection sends, to those who read slowly, too; a report goes out in portions."""
import os
import signal
import socket
import struct
import types
from unittest import mock

import flomd
import pytest
from fakes import PING, message
from world import run_until, wait_until


class Log:
    """What a loop and its connections would write."""

    def __init__(self):
        self.lines, self.told = [], []

    def limited(self, text, level="warning"):
        self.lines.append(text)

    error = limited

    def info(self, text):
        self.told.append(text)

    def bug(self, trace):
        self.lines.append(trace)


SETTINGS = {"TcpKeepaliveTime": 60, "TcpKeepaliveIntvl": 10, "TcpKeepaliveProbes": 6,
            "TlsCertificate": None, "TlsPrivateKey": None, "TlsCaCertificate": None}


class Links:
    """Connections with a loop and no server; the ends of their clients."""

    def __init__(self):
        self.log = Log()
        self.loop = flomd.Loop(self.log)
        self.connections = flomd.Connections(self.loop, self.log, SETTINGS, 10)
        self.gone = []
        self.connections.serve({}, self.gone.append)
        self.clients = []

    def connect(self):
        """(a new connection, its client's socket)"""
        server, client = socket.socketpair()
        for end in (server, client):
            end.setblocking(False)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        before = set(self.connections.open)
        self.connections.welcome(server, flomd.LOCAL)
        self.clients.append(client)
        connection, = self.connections.open - before
        return connection, client

    def turn(self):
        """One turn of the loop, in which what is due is done, too."""
        self.loop.after(0, self.loop.stop)
        self.loop.run()
        self.loop._stopped = False


@pytest.fixture
def links():
    made = Links()
    yield made
    for connection in list(made.connections.open):
        connection.batch = None
        connection.close()
    for client in made.clients:
        client.close()


def take(client):
    """All that is there for the client."""
    found = b""
    while True:
        try:
            data = client.recv(1 << 20)
        except BlockingIOError:
            return found
        if not data:
            return found
        found += data


def read_all(links, client):
    found = [take(client)]
    for _ in range(3):
        while found[-1]:
            links.turn()
            found.append(take(client))
        links.turn()
        found.append(take(client))
    return b"".join(found)


def test_what_is_taken_in_parts_arrives_whole(links):
    connection, client = links.connect()
    told = [bytes([65 + number % 26]) * 3000 for number in range(40)]
    for part in told:
        connection.send(part)
    assert 0 < len(connection.output) < flomd.MOST_UNREAD
    assert read_all(links, client) == b"".join(told)
    assert not connection.output and connection.is_open


def test_who_does_not_read_is_closed(links):
    connection, client = links.connect()
    for _ in range(100):
        connection.send(b"x" * 10000)
        if not connection.is_open:
            break
    assert links.gone == [connection] and "does not read" in links.log.lines[0]
    connection.send(b"x")  # nothing happens any more
    connection.tell(types.SimpleNamespace(verdict=0))
    connection.close("again")
    assert links.gone == [connection] and len(links.log.lines) == 1


def test_a_report_of_large_pieces_is_made_as_it_is_read(links):
    connection, client = links.connect()
    made = []

    def pieces():
        for number in range(50):
            made.append(number)
            yield chr(65 + number % 26) * 60000
    connection.finish_with(pieces())
    links.turn()
    assert 0 < len(made) * 60000 < flomd.LARGEST + 60000
    before = len(made)
    links.turn()  # the client has taken nothing
    assert len(made) == before
    assert len(read_all(links, client)) == 50 * 60000 and len(made) == 50
    assert client.recv(1) == b""


def test_in_one_turn_one_report_goes_on(links, monkeypatch):
    monkeypatch.setattr(flomd, "PIECES", 1)
    ends, made = [links.connect() for _ in range(3)], []

    def pieces(number):
        for piece in "abc":
            made.append((number, piece))
            yield piece
    for number, (connection, _) in enumerate(ends):
        connection.finish_with(pieces(number))
    for turns in range(1, 10):
        links.turn()
        assert len(made) == turns
    assert made == [(number, piece) for piece in "abc" for number in range(3)]
    for _, client in ends:
        assert read_all(links, client) == b"abc"


def test_one_that_has_gone_does_not_keep_the_other_reports_back(links):
    (first, _), (second, client) = links.connect(), links.connect()
    first.finish_with(iter("a"))
    second.finish_with(iter("b"))
    first.close()
    assert read_all(links, client) == b"b"


def test_a_bug_in_a_report_costs_its_own_connection(links):
    (first, _), (second, client) = links.connect(), links.connect()

    def broken():
        raise RuntimeError("a bug")
        yield ""
    first.finish_with(broken())
    second.finish_with(iter("b"))
    assert read_all(links, client) == b"b" and links.gone == [first]


def test_who_is_silent_is_closed_but_a_stall_does_not_count(flying_time, links):
    connection, _ = links.connect()
    links.loop.running_since = links.loop.now.mono + 20
    links.loop.after(15, links.loop.stop)
    links.loop.run()
    assert connection.is_open
    links.loop._stopped = False
    links.loop.after(20, links.loop.stop)
    links.loop.run()
    assert not connection.is_open and "silent" in links.log.lines[0]


def test_one_date_serves_all_that_are_silent(flying_time, links, monkeypatch):
    """They are closed in order, those that have spoken are not, and a bug in one keeps none."""
    made = [links.connect()[0] for _ in range(4)]
    assert len(links.loop._dates) == 1
    links.connections.silent.forget(made[1])
    with_a_bug = mock.Mock(side_effect=[RuntimeError("a bug"), None, None])
    monkeypatch.setattr(links.connections, "gone", with_a_bug)
    links.loop.after(8, lambda: links.connections.silent.expect(made[2]))
    links.loop.after(12, links.loop.stop)
    links.loop.run()
    assert with_a_bug.mock_calls == [mock.call(made[0]), mock.call(made[3])]
    links.loop._stopped = False
    links.loop.after(8, links.loop.stop)
    links.loop.run()
    assert with_a_bug.mock_calls[2:] == [mock.call(made[2])] and made[1].is_open
    assert "a bug" in "".join(links.log.lines)
    monkeypatch.undo()


@pytest.mark.parametrize("family", ["AF_UNIX", "AF_INET"])
def test_a_fast_accept_gives_what_an_accept_of_python_gives(family, tmp_path):
    bound = socket.socket(getattr(socket, family))
    bound.bind(str(tmp_path / "s") if family == "AF_UNIX" else ("127.0.0.1", 0))
    accepting = flomd.Accepting(bound)
    accepting.setblocking(False)
    accepting.listen(1)
    with accepting, socket.socket(getattr(socket, family)) as client:
        client.connect(accepting.getsockname())
        accepted, _ = accepting.accept()
        with accepted:
            assert type(accepted) is socket.socket
            assert (accepted.family, accepted.type) == (getattr(socket, family),
                                                        socket.SOCK_STREAM)
            client.send(b"x")
            assert accepted.recv(1) == b"x"
        with pytest.raises(BlockingIOError):
            accepting.accept()


def test_a_connection_beyond_the_limit_is_refused_until_there_is_room(links):
    made = [links.connect()[0] for _ in range(12)]
    assert [links.connections.refuses(one) for one in made] == [False] * 10 + [True] * 2
    made[0].close()
    made[1].close()
    assert not links.connections.refuses(made[11])


def test_a_bug_in_hearing_of_a_child_is_one_traceback_and_kills_nobody(links, monkeypatch):
    heard, killed = [], []
    kill = flomd.os.kill
    monkeypatch.setattr(flomd.os, "kill", lambda pid, number: killed.append(kill(pid, number)))

    def hear(text):
        heard.append(text)
        raise RuntimeError("a bug")
    flomd.Child(links.loop, lambda: "done", hear)
    run_until(links.loop, lambda: links.log.lines)
    assert heard == ["done"] and len(killed) == 1
    assert len(links.log.lines) == 1 and "a bug" in links.log.lines[0]


def test_a_look_at_another_daemon_ends(links, monkeypatch):
    monkeypatch.setattr(flomd, "LONGEST_PROBE", 1)
    monkeypatch.setattr(flomd, "daemon_at", lambda *_: signal.pause())
    answer = flomd.Heard((1, "aa"), {"address": "127.0.0.1", "port": 1}, ("127.0.0.1", 1),
                          False)
    heard = []
    flomd.Child(links.loop, lambda: flomd._is_there(SETTINGS, answer), heard.append)
    run_until(links.loop, lambda: heard)
    assert heard == [""]


# The end of a client

def ping(number=8):
    return message(PING, number)


class Answering:
    """The calls of a server which answers each ping 8."""

    def __init__(self, links):
        self.seen = []
        links.connections.serve({"ping": self.ping}, lambda connection: self.seen.append("end"))

    def ping(self, connection, _):
        self.seen.append("ping")
        connection.send(flomd.Session.pong)


@pytest.mark.parametrize("left", [False, True])
def test_what_one_that_has_gone_said_before_is_done(links, left):
    """It does not take the first answer any more; also when something was left to be sent."""
    server = Answering(links)
    connection, client = links.connect()
    if left:
        connection.send(b"x" * 100000)
    client.send(ping() + ping())
    client.close()
    for _ in range(3):
        links.turn()
    assert server.seen == ["ping", "ping", "end"] and not connection.is_open
    connection.send(b"x")  # nothing happens any more
    assert not links.log.lines


def test_who_takes_nothing_more_is_told_and_has_a_time_to_end(flying_time, links):
    server = Answering(links)
    connection, client = links.connect()
    connection.socket.shutdown(socket.SHUT_WR)
    client.send(ping())
    links.turn()
    connection.finish_with(iter("abc"))
    assert connection.is_open and client.recv(1) == b""
    links.loop.after(12, links.loop.stop)
    links.loop.run()
    links.loop._stopped = False
    assert server.seen == ["ping", "end"] and not connection.is_open


def test_a_crowd_leaves_files_for_the_daemon_itself(monkeypatch):
    """However many are refused: a connection to etcd, or the log, may need one."""
    monkeypatch.setattr(flomd, "most_files", lambda: flomd.RESERVE + 2)
    links = Links()
    connections = links.connections
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    address = bound.getsockname()
    listener = flomd.Listener(links.loop, links.log, bound, connections.welcome,
                              connections.has_room)
    crowd = []
    for _ in range(flomd.RESERVE):
        crowd.append(socket.create_connection(address))
        links.turn()
    assert len(connections) == flomd.RESERVE // 2 + 2
    assert "too many are connected" in links.log.lines[-1]
    crowd[0].close()
    wait_until(lambda: links.turn() or len(links.gone) == 1)
    listener._resume()
    links.turn()
    assert len(connections) == flomd.RESERVE // 2 + 2
    listener.close()
    connections.abandon()
    for client in crowd:
        client.close()


def test_who_had_connected_to_a_socket_that_was_removed_is_accepted(box):
    """Also where it came after the loop had last looked for clients."""
    links = Links()
    guard = types.SimpleNamespace(look=lambda: True)
    listener = flomd.LocalListener(links.loop, links.log, box.socket, 0o600, guard,
                                   links.connections.welcome, flomd.always, None)
    crowd = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for client in crowd[:2]:
        client.connect(box.socket)
    os.unlink(box.socket)
    listener.look()
    crowd[2].connect(box.socket)
    links.turn()
    assert links.log.lines == [f"{box.socket} was removed; it was made anew"]
    assert len(links.connections) == 3
    listener.close()
    links.connections.abandon()
    for client in crowd:
        client.close()


def tcp(links):
    """(a new connection over TCP, its client's socket)"""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    server.setblocking(False)
    before = set(links.connections.open)
    links.connections.welcome(server, "127.0.0.1:50190")
    links.clients.append(client)
    connection, = links.connections.open - before
    return connection, client


def reset(client):
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def send_until_deaf(connection):
    """Says something to one that has gone, until the system says so."""
    def fails():
        connection.send(b"x")
        return connection._is_deaf
    wait_until(fails)


def end_well(links, connection, client):
    client.close()


def end_well_before_it_is_told(links, connection, client):
    client.close()
    send_until_deaf(connection)


def shut(links, connection, client):
    client.shutdown(socket.SHUT_WR)


def end_by_reset(links, connection, client):
    reset(client)


def end_by_reset_before_it_is_told(links, connection, client):
    reset(client)
    send_until_deaf(connection)


def talk_rubbish(links, connection, client):
    client.send(b"rubbish</msg>")


def take_nothing(links, connection, client):
    connection.send(b"x" * (1 << 24))


def be_silent(links, connection, client):
    links.loop.running_since -= flomd.PATIENCE
    links.connections.silent._until[connection] = 0
    links.connections.silent._close()


def have_a_bug(links, connection, client):
    client.send(ping())  # for which there is no call


@pytest.mark.parametrize("act, end", [
    (end_well, "end of file"), (end_well_before_it_is_told, "end of file"), (shut, "end of file"),
    (end_by_reset, "reset"), (end_by_reset_before_it_is_told, "reset"),
    (talk_rubbish, "protocol error"), (take_nothing, "slow reader"), (be_silent, "timed out"),
    (have_a_bug, "reset")])
def test_how_a_connection_has_ended(links, act, end):
    """The system tells of a reset once: a reader who is told later would see an end of file."""
    connection, client = tcp(links)
    act(links, connection, client)
    for _ in range(100):
        if not connection.is_open:
            break
        links.turn()
    assert connection.end == end and links.gone == [connection]


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="of Linux")
def test_what_does_not_arrive_is_not_tried_longer_than_a_keepalive(links):
    connection, _ = tcp(links)
    found = connection.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert found == (60 + 10 * 6) * 1000


# While a connection has a batch

class Waiting:
    """The calls of a server which has each connection wait at a ping 8."""

    def __init__(self, links):
        self.links, self.seen = links, []
        calls = {"ping": self.ping, "pong": lambda *_: self.seen.append("pong")}
        links.connections.serve(calls, self.gone)

    def ping(self, connection, _):
        self.seen.append("ping")
        connection.batch = self

    def gone(self, connection):
        self.seen.append("end")

    def store(self, connection):
        connection.batch = None
        connection.resume()


@pytest.fixture
def waiting(links):
    return Waiting(links)


def test_messages_that_came_together_wait_for_each_other(links, waiting):
    connection, client = links.connect()
    client.send(ping() + ping(16) + ping())
    links.turn()
    assert waiting.seen == ["ping"]
    waiting.store(connection)
    assert waiting.seen == ["ping", "pong", "ping"]


def test_who_waits_is_not_read_and_the_loop_does_not_spin(links, waiting, monkeypatch):
    connection, client = links.connect()
    client.send(ping())
    links.turn()
    called = []
    real = flomd.Connection.handle
    monkeypatch.setattr(flomd.Connection, "handle",
                        lambda self, events: called.append(events) or real(self, events))
    client.send(ping(16))
    client.shutdown(socket.SHUT_WR)
    for _ in range(5):
        links.turn()
    assert waiting.seen == ["ping"] and len(called) <= 1
    waiting.store(connection)
    for _ in range(3):
        links.turn()
    assert waiting.seen == ["ping", "pong", "end"] and not connection.is_open


def test_the_end_is_seen_when_it_is_stored(links, waiting):
    connection, client = links.connect()
    client.send(ping())
    links.turn()
    connection.close("why")
    assert waiting.seen == ["ping", "end"] and connection not in links.connections.open
    with pytest.raises(BlockingIOError):
        client.recv(1)
    waiting.store(connection)
    assert client.recv(1) == b""
    waiting.store(connection)  # nothing happens any more


def test_what_has_gone_wrong_ends_the_connection_when_it_goes_on(links, waiting):
    connection, client = links.connect()
    client.send(ping() + b"rubbish</msg>" + ping())
    links.turn()
    assert connection.is_open
    waiting.store(connection)
    assert not connection.is_open and waiting.seen == ["ping", "end"]


def test_who_waits_again_is_not_read(links, waiting):
    connection, client = links.connect()
    client.send(ping() + ping() + ping(16))
    links.turn()
    connection.resume()  # another batch has something of it
    assert waiting.seen == ["ping"]
    waiting.store(connection)
    assert waiting.seen == ["ping", "ping"] and connection.batch is waiting
    waiting.store(connection)
    assert waiting.seen == ["ping", "ping", "pong"]


def test_what_a_slow_reader_did_not_take_before_it_waited_is_not_lost(links, waiting):
    connection, client = links.connect()
    client.send(ping())
    links.turn()
    client.send(ping(16))
    links.turn()  # it is watched no more
    told = b"x" * 100000
    connection.send(told[:50000])
    connection.send(told[50000:])
    assert connection.output
    links.turn()
    waiting.store(connection)
    assert read_all(links, client) == told and waiting.seen == ["ping", "pong"]


def test_one_that_cannot_be_watched_again_is_closed(links, waiting, monkeypatch):
    connection, client = links.connect()
    client.send(ping())
    links.turn()
    client.send(ping(16))
    links.turn()
    monkeypatch.setattr(links.loop, "watch", mock.Mock(side_effect=OSError(12, "No memory")))
    waiting.store(connection)
    assert not connection.is_open and "No memory" in links.log.lines[0]
    assert connection.socket.fileno() == -1
