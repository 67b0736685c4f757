"""A fixed address: loopback IPv4 and IPv6, several addresses, and ports where nobody answers."""
import os
import signal
import socket
import threading

import flom
import pytest
from commands import driven
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
    assert len(tcp.daemons()) == 1 and can_connect(tcp.address) and tcp.sockets() == set()


def test_one_command_after_another(tcp):
    holder, gate = tcp.hold("a", "-r", "R1")
    waiter = tcp.waiter("-r", "R1", "--", *tcp.note("b"))
    assert tcp.run("-r", "R1", "-o", "0", "--", "true").status == 98
    assert tcp.run("-r", "R2", "-o", "0", "--", "true").status == 0
    gate.open()
    assert holder.end().status == 0 and waiter.end().status == 0
    assert tcp.events() == ["a start", "a end", "b"]


def test_quiesce_and_immediate_over_loopback(tcp):
    for option, word in (("-x", "quiesce"), ("-X", "immediate")):
        assert tcp.run("--recovery-window", "0", "--", "true").status == 0
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
    done = box.run("--", "echo", "x", address=address)
    assert done[:2] == (99, "") and done.err.startswith("flom: no daemon at ")
    assert done.err.count("\n") == 1 and box.daemons() == []


def test_no_daemon_and_none_may_be_started(box):
    port = free_port()
    done = box.run("-d", "0", "--", "echo", "x", address=at("127.0.0.1", port))
    assert done[:2] == (99, "") and "127.0.0.1" in done.err and str(port) in done.err
    assert done.err.startswith("flom: no daemon at ") and "-d 0" in done.err


def test_a_name_that_does_not_resolve(box):
    name = "x" * 64  # longer than a name may be, so nobody needs to be asked
    done = box.run("--", "echo", "x", address=at(name, 1))
    assert done[:2] == (99, "") and name in done.err and done.err.count("\n") == 1
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
    """A listener that says nothing, or nothing but `words`."""

    def __init__(self, words=None, backlog=5):
        self.socket, self.words, self.accepted = socket.socket(), words, []
        self.socket.bind(("127.0.0.1", 0))
        self.socket.listen(backlog)
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self):
        try:
            while True:
                self.accepted.append(self.socket.accept()[0])
                if self.words:
                    self.accepted[-1].sendall(self.words)
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
    listener.bind(("127.0.0.1", 0))
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
            assert status in (98, 99) and out == "" and err.count("\n") == 1, (client.args, err)
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
    assert status in (98, 99) and out == "" and err.count("\n") == 1
