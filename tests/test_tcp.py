"""A fixed address: loopback IPv4 and IPv6, several addresses, and ports where nobody answers."""
import os
import signal
import socket
import threading

import flom
import pytest
from commands import driven
from fakes import END, LOCK, PEER, message, read_message
from world import can_connect, free_port, wait_until

HOSTS = ["127.0.0.1", "::1"]


def at(host, port, *more):
    """The options that name a daemon at an address, its state in the box."""
    return ("-a", host, "-p", str(port)) + more


@pytest.fixture(params=HOSTS)
def tcp(request, box):
    """A box whose daemon has a TCP address."""
    port = free_port(request.param)
    box.address = at(request.param, port, "--state-dir", box.folder)
    return box


def test_a_client_starts_the_daemon_of_an_address_of_this_host(tcp):
    assert tcp.run("--", "echo", "x") == (0, "x\n", "")
    assert len(tcp.daemons()) == 1
    assert can_connect(tcp.address)
    assert tcp.sockets() == set()


def test_one_command_after_another(tcp):
    holder, gate = tcp.hold("a", "-r", "R1")
    waiter = tcp.waiter("-r", "R1", "--", *tcp.note("b"))
    assert tcp.run("-r", "R1", "-o", "0", "--", "true").status == 98
    assert tcp.run("-r", "R2", "-o", "0", "--", "true").status == 0
    gate.open()
    assert holder.end().status == 0 and waiter.end().status == 0
    assert tcp.events() == ["a start", "a end", "b"]


@pytest.mark.parametrize("option, word", [("-x", "quiesce"), ("-X", "immediate")])
def test_quiesce_and_immediate_over_loopback(tcp, option, word):
    assert tcp.run("--", "true").status == 0
    assert tcp.run(option) == (0, f"Starting FLoM daemon {word} shutdown...\n", "")
    wait_until(lambda: not tcp.daemons())


def test_several_addresses_are_tried_in_order(tcp):
    tcp.daemon("-d", "-1")
    host, port = tcp.address[1], tcp.address[3]
    dead = "127.0.0.2" if ":" not in host else "::1%lo"
    for several in (f"{dead},{host}", f"{host},{dead}", f"{'x' * 64},{host}"):
        address = at(several, port)
        assert tcp.run("--", "echo", "x", address=address) == (0, "x\n", "")


def test_with_several_addresses_none_is_ever_started(box):
    address = at("127.0.0.1,127.0.0.2", free_port())
    done = driven(box, "flom.SEVERAL = 0.3", "--", "echo", "x", address=address).end()
    assert done[:2] == (99, "") and done.err.startswith("flom: no daemon at ")
    assert done.err.count("\n") == 1 and box.daemons() == []


def test_no_daemon_and_none_may_be_started(box):
    port = free_port()
    done = driven(box, "flom.RETURN = 0", "-d", "0", "--", "echo", "x",
                  address=at("127.0.0.1", port)).end()
    assert done[:2] == (99, "")
    assert "127.0.0.1" in done.err
    assert str(port) in done.err
    assert done.err.startswith("flom: no daemon at ") and "-d 0" in done.err


def test_a_name_that_does_not_resolve(box):
    name = "x" * 64  # longer than a name may be, so nobody needs to be asked
    done = box.run("--", "echo", "x", address=at(name, 1))
    assert done[:2] == (99, "")
    assert name in done.err
    assert done.err.count("\n") == 1
    assert box.daemons() == []


def test_one_daemon_serves_a_socket_and_an_address_as_one_lock_space(box):
    tcp = at("127.0.0.1", free_port())
    box.daemon(address=("-s", box.socket) + tcp)
    holder, gate = box.hold("a", address=("-s", box.socket))
    assert box.run("-o", "0", "--", "true", address=tcp).status == 98
    gate.open()
    assert holder.end().status == 0
    assert box.run("-o", "0", "--", "true", address=tcp).status == 0


# Where nobody answers: `-o 300` ends with a message, by the 10 s that connecting has (here: 3 s)

class Silent:
    """A listener that says nothing, or nothing but `words`; b"" closes the connection."""

    def __init__(self, words=None, backlog=5, host="127.0.0.1", port=None):
        self.socket, self.words, self.accepted = socket.socket(), words, []
        self.port = port or free_port(host)
        self.socket.bind((host, self.port))
        self.socket.listen(backlog)
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self):
        try:
            while True:
                self.accepted.append(self.socket.accept()[0])
                if self.words:
                    self.accepted[-1].sendall(self.words)
                elif self.words is not None:
                    self.accepted.pop().close()
        except OSError:
            pass

    def close(self):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join(10)
        for connection in self.accepted + [self.socket]:
            connection.close()


@pytest.fixture
def silent():
    made = []

    def make(**options):
        made.append(Silent(**options))
        return made[-1].port

    yield make
    for listener in made:
        listener.close()


def full_port():
    """A listener whose backlog is full, so that connecting takes for ever; [sockets], port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", free_port()))
    listener.listen(0)
    fillers = [socket.socket() for _ in range(4)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())
    return [listener] + fillers, listener.getsockname()[1]


def test_where_nobody_answers_flom_ends_with_a_message(box, silent):
    """A port that takes no connection, one that says nothing, and a stopped daemon; at once."""
    assert flom.PATIENCE == 10
    daemon = box.daemon()
    sockets, full = full_port()
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        addresses = [at("127.0.0.1", full), at("127.0.0.1", silent()), ("-s", box.socket)]
        clients = [driven(box, "flom.PATIENCE = 3", "-o", "300", "-d", "0", "--", "echo", "x",
                          address=address) for address in addresses]
        for client in clients:
            status, out, err = client.end(seconds=25)
            assert status in (98, 99), (client.args, err)
            assert out == "", (client.args, err)
            assert err.count("\n") == 1, (client.args, err)
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
        for one in sockets:
            one.close()


@pytest.mark.parametrize("words", [
    b"220 mail ESMTP\r\n", b"HTTP/1.0 400 Bad\r\n\r\n</msg>", b"\xff" * 99])
def test_a_listener_that_is_no_lock_daemon(box, silent, words):
    address = at("127.0.0.1", silent(words=words))
    status, out, err = box.run("-o", "300", "-d", "0", "--", "echo", "x", address=address,
                               seconds=25)
    assert status in (98, 99)
    assert out == ""
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [
    None, b"", b"SSH-2.0-x\r\n", message(LOCK, 8), message(LOCK, 16)[:-len(END)]],
    ids=["says nothing", "closes", "nonsense", "a question", "half an answer"])
def test_whatever_the_first_address_does_the_second_is_tried(box, silent, words):
    """(Here it is given 0.5 s, not 6 s, when it says nothing.)"""
    assert (flom.EACH, flom.SEVERAL) == (6, 15)
    port = silent(host="127.0.0.3", words=words)
    box.daemon(address=at("127.0.0.2", port))
    done = driven(box, "flom.EACH = 0.5", "-d", "0", "--", "echo", "x",
                  address=at("127.0.0.3,127.0.0.2", port)).end()
    assert done == (0, "x\n", "")


def test_an_address_that_does_not_connect_holds_the_next_one_up_for_a_moment(box):
    assert flom.STAGGER == 0.25
    sockets, port = full_port()
    box.daemon(address=at("127.0.0.2", port))
    done = driven(box, "flom.PATIENCE = 600", "-d", "0", "--", "echo", "x",
                  address=at("127.0.0.1,127.0.0.2", port)).end(15)
    assert done == (0, "x\n", "")
    for one in sockets:
        one.close()


def test_two_addresses_are_never_asked_at_a_time(box):
    """The first connection is closed before the second carries a request."""
    listeners, port = [], free_port()
    for host in ("127.0.0.3", "127.0.0.2"):
        listener = socket.socket()
        listener.bind((host, port))
        listener.listen(1)
        listener.settimeout(10)
        listeners.append(listener)
    client = driven(box, "flom.EACH = 0.5", "-d", "0", "-r", "R1", "--", "echo", "x",
                    address=at("127.0.0.3,127.0.0.2", port))
    first, second = [listener.accept()[0] for listener in listeners]
    for connection in (first, second):
        connection.settimeout(10)
        assert read_message(connection).endswith(END)
        if connection is second:
            assert first.recv(1) == b""
    second.sendall(message(LOCK, 16, f'<session peerid="{PEER}"/><answer rc="0"/>'))
    assert read_message(second).endswith(END)
    for one in (first, second, *listeners):
        one.close()
    assert client.end() == (0, "x\n", "")


@pytest.mark.parametrize("words", [b"", b"SSH-2.0-x\r\n"], ids=["closes", "nonsense"])
def test_reports_and_orders_go_to_the_address_that_serves(box, silent, words):
    """An end without an answer is what an order that was obeyed looks like."""
    port = silent(host="127.0.0.3", words=words)
    daemon = box.daemon(address=at("127.0.0.2", port))
    several = at("127.0.0.3,127.0.0.2", port)
    status, out, err = box.run("--status", address=several)
    assert (status, err) == (0, "") and out.endswith("nobody holds or awaits a lock\n")
    done = box.run("-X", address=several)
    assert (done.status, done.err) == (0, "") and daemon.end().status == 0
