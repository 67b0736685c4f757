"""What a connection sends, to those who read slowly, too; a report goes out in pieces."""
import socket
import types

import flomd
import pytest


class Watched:
    """The loop of a daemon with one connection: whether it waits until that can be written."""

    def __init__(self):
        self.writing = False

    def watch_writing(self, watched, writing):
        self.writing = writing

    def forget(self, watched):
        self.writing = False

    def cancel(self, act):
        pass


@pytest.fixture
def link():
    """(connection, its client's socket, its daemon)."""
    server, client = socket.socketpair()
    for end in (server, client):
        end.setblocking(False)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    log = types.SimpleNamespace(limited=lambda text: None)
    daemon = types.SimpleNamespace(
        loop=Watched(), reported=None, now=0, log=log, expect=lambda connection: None,
        gone=lambda connection: None)
    yield flomd.Connection(daemon, server, "local"), client, daemon
    server.close()
    client.close()


def turn(connection, client, daemon):
    """One turn of the loop: the client reads all that is there, and it can be written again."""
    daemon.now += 1
    found = b""
    while True:
        try:
            data = client.recv(1 << 20)
        except BlockingIOError:
            data = b""
        found += data
        if not data:
            break
    if daemon.loop.writing:
        connection.handle(flomd.EVENT_WRITE)
    return found


def read_all(connection, client, daemon):
    found = [turn(connection, client, daemon)]
    while daemon.loop.writing or found[-1]:
        found.append(turn(connection, client, daemon))
    return b"".join(found)


def test_what_is_taken_in_parts_arrives_whole(link):
    connection, client, daemon = link
    told = [bytes([65 + number % 26]) * 3000 for number in range(40)]
    for message in told:
        connection.send(message)
    assert daemon.loop.writing and 0 < len(connection.output) < flomd.MOST_UNREAD
    assert read_all(*link) == b"".join(told)
    assert not connection.output and not daemon.loop.writing


def test_a_report_of_large_pieces_is_made_as_it_is_read(link):
    connection, client, daemon = link
    made = []

    def pieces():
        for number in range(50):
            made.append(number)
            yield chr(65 + number % 26) * 60000
    connection.finish(pieces())
    assert len(made) * 60000 < flomd.LARGEST + 60000
    before = len(made)
    connection.handle(flomd.EVENT_WRITE)  # in the same turn of the loop
    assert len(made) == before
    assert len(read_all(*link)) == 50 * 60000 and len(made) == 50


def test_in_one_turn_one_report_goes_on(link):
    connection, client, daemon = link
    daemon.reported = daemon.now = object()
    connection.finish(iter(["x" * 10]))
    assert not connection.output and daemon.loop.writing
    daemon.now = 0
    assert read_all(*link) == b"x" * 10
