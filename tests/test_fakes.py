"""FlomClient and FlomDaemon, the strict stand-ins for FLoM's two sides, against each other."""
import json
import os
import socket

import pytest
from fakes import (DISCOVER, HEADER, LOCK, PING, UNLOCK, Died, FlomClient, FlomDaemon, discover,
                   message)
from world import DATA, wait_until

pytestmark = pytest.mark.in_time  # threads of flomd or of a fake


@pytest.fixture
def daemon():
    with FlomDaemon(tcp=("127.0.0.1", 0), udp=("127.0.0.1", 0)) as daemon:
        yield daemon


def client(daemon):
    return FlomClient(socket.AF_INET, daemon.tcp)


def test_lock_and_unlock_are_the_captured_bytes(daemon):
    with open(os.path.join(DATA, "vectors.json"), encoding="utf-8") as file:
        texts = {vector["name"]: vector["text"].encode() for vector in json.load(file)}
    with client(daemon) as one, client(daemon) as two:
        assert one.lock("TC") is True
        assert two.ask("TC") == (16, 1, None)
        assert one.release() == b""
        assert two.wait() == (0, None) and two.release() == b""
        assert daemon.messages == [texts[name] for name in (
            "tcp:TC:lock8", "tcp:TC:lock8", "tcp:TC:unlock8", "tcp:TC:unlock8")]
    assert daemon.deaths == []


def test_answers(daemon):
    with client(daemon) as holder, client(daemon) as other:
        assert other.ask("a", wait=0, create=0) == (16, 5, None)
        assert holder.lock("a", mode="PR") is True
        with client(daemon) as reader, client(daemon) as writer:
            assert reader.lock("a", mode="PR") is True
            assert writer.ask("a", wait=0) == (16, 4, None)
    with client(daemon) as one:
        assert one.ask("p[2]", quantity=3) == (16, 6, None)
    with client(daemon) as one:
        assert one.ask("_STATUS", wait=0, create=0) == (16, -14, None) and one.receive() == b""


def test_parked_clients_wake(daemon):
    with client(daemon) as parked, client(daemon) as creator:
        assert parked.ask("b", create=0) == (16, 2, None)
        assert creator.lock("b") is True
        assert parked.answer(24) == (24, 1, None)
        creator.socket.close()
        assert parked.wait() == (0, None)


def test_discovery(daemon):
    assert discover(socket.AF_INET, daemon.udp)[:2] == ("127.0.0.1", daemon.tcp[1])


DEADLY = {
    "ping": message(PING, 16), "discover on a stream": message(DISCOVER, 8),
    "an answer": message(LOCK, 16), "no XML": b"hello</msg>", "not UTF-8": b'<msg x="\xff"></msg>',
    "half a lock": message(LOCK, 8), "an element": message(LOCK, 8, '<x y="1"/>')}


@pytest.mark.parametrize("name", DEADLY)
def test_the_daemon_dies_on_what_floms_dies_on(daemon, name):
    with client(daemon) as one:
        one.socket.sendall(DEADLY[name])
        assert one.socket.recv(100) == b""
    wait_until(lambda: daemon.ended)
    assert len(daemon.deaths) == 1


def test_the_daemon_dies_on_an_unlock_from_a_parked_client(daemon):
    with client(daemon) as one:
        one.ask("a", create=0)
        one.unlock()
        assert one.socket.recv(100) == b""
    assert wait_until(lambda: daemon.deaths)


def test_the_daemon_dies_on_an_answer_to_its_udp_port(daemon):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(message(DISCOVER, 16, '<network address="" port="1"/>'), daemon.udp)
    assert wait_until(lambda: daemon.deaths)


def test_the_daemon_drops_what_is_longer_than_511_bytes(daemon):
    with client(daemon) as one, client(daemon) as two:
        one.socket.sendall(message(LOCK, 8, "<x/>" * 200))
        assert one.socket.recv(100) == b""
        assert two.lock("a") is True
    assert daemon.deaths == []


CLIENT_DEADLY = {
    "half": b"<msg", "too long": message(LOCK, 16, '<answer rc="0" x="%s"/>' % ("x" * 1000)),
    "no session": message(LOCK, 16, '<answer rc="0"/>'), "no XML": HEADER.encode() + b"x</msg>",
    "wrong step": message(LOCK, 24, '<session/><answer rc="0"/>'),
    "an element": message(LOCK, 16, '<session/><answer rc="0"/><x y="1"/>')}


@pytest.mark.parametrize("name", CLIENT_DEADLY)
def test_the_client_dies_on_what_floms_dies_on(name):
    one, other = socket.socketpair()
    client = FlomClient.__new__(FlomClient)
    client.socket = one
    with one, other:
        other.sendall(CLIENT_DEADLY[name])
        other.shutdown(socket.SHUT_WR)
        with pytest.raises(Died):
            client.answer(16)


def test_the_client_reads_no_byte_behind_a_message():
    one, other = socket.socketpair()
    client = FlomClient.__new__(FlomClient)
    client.socket = one
    with one, other:
        first, second = (message(LOCK, 24, f'<answer rc="{rc}"/>') for rc in (1, 0))
        other.sendall(first + second)
        assert (client.receive(), client.receive()) == (first, second)


def test_the_client_takes_a_refusal_at_step_24_for_a_grant():
    one, other = socket.socketpair()
    client = FlomClient.__new__(FlomClient)
    client.socket = one
    with one, other:
        other.sendall(message(LOCK, 24, '<answer rc="1"/>') + message(LOCK, 24, '<answer rc="6"/>'))
        assert client.wait() == (6, None)


def test_unlock_has_floms_bytes():
    assert message(UNLOCK, 8, '<resource name="UjE=" rollback="0" />').endswith(b' /></msg>')
