"""Daemons of a quorum: their options, their terms, as real processes on a fake etcd."""
import os
import socket

import flom
import flomd
import pytest

from world import free_port

GOOD = {
    "EtcdUrls": "http://10.0.0.1:2379,https://[::1]:2379",
    "EtcdPrefix": "/flom/x/",
    "UnicastAddress": "10.0.0.9",
}


def problems(**texts):
    """What is wrong with these settings of a daemon, None: not set."""
    examined = flomd.Examined(Lifespan=-1)
    for setting in flomd.SETTINGS:
        text = dict(GOOD, **texts).get(setting.key)
        if text is not None:
            examined.set(setting, [text], f"--{setting.long}")
    examined.examine(flomd.check_quorum)
    return examined.problems


# Options

@pytest.mark.parametrize("texts", [
    {}, {"MulticastAddress": "239.255.0.1"}, {"UnicastAddress": "db1"},
    {"EtcdUser": "u", "EtcdPasswordFile": "f"}, {"EtcdUrls": None, "EtcdPrefix": None},
    {"EtcdTtl": "5s", "EtcdCompact": "yes", "EtcdState": "f"}])
def test_options_that_go_together(texts):
    assert problems(**texts) == []


@pytest.mark.parametrize("texts, option", [
    ({"UnicastAddress": None}, "--etcd: wants --unicast-address"),
    ({"EtcdPrefix": None}, "--etcd: wants --etcd-prefix"),
    ({"SocketName": "/tmp/s"}, "--socket-name: not together with --etcd: "),
    ({"StateDir": "/tmp/s"}, "--state-dir: not together with --etcd: "),
    ({"RecoveryWindow": "0"}, "--recovery-window: not together with --etcd: "),
    ({"UnicastAddress": "h1,h2"}, "--unicast-address: 'h1,h2' is not "),
    ({"UnicastAddress": "0.0.0.0"}, "--unicast-address: '0.0.0.0' is not "),
    ({"UnicastAddress": "::"}, "--unicast-address: '::' is not "),
    ({"EtcdUser": "u"}, "--etcd-user: "), ({"EtcdPasswordFile": "u"}, "--etcd-password-file: "),
    ({"EtcdCertificate": "u"}, "--etcd-certificate: "),
    ({"EtcdUrls": None}, "--etcd-prefix: wants --etcd")])
def test_options_that_do_not(texts, option):
    found = problems(**texts)
    assert len(found) == 1 and found[0].startswith(option)


def test_sockets_of_an_init_system_are_refused(monkeypatch):
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    found = problems()
    assert len(found) == 1 and "LISTEN_FDS" in found[0]


def test_no_client_hands_them_on():
    """A client that starts a daemon of its own would start a rival."""
    keys = [setting for setting in flom.SETTINGS if setting.group == "Quorum"]
    assert len(keys) == 10
    assert {setting.users for setting in keys} == {flom.DAEMON}


@pytest.mark.processes
def test_check_config_tells_all_of_them(box):
    result = box.flomd("--check-config", "--no-files", "--etcd", "http://h", "-s", "x",
                       "--state-dir", "y", "--etcd-user", "z").end()
    assert result.status == 99 and len(result.err.splitlines()) == 5
    result = box.flomd("--no-files", "--etcd", "http://u@h").end()
    assert result.status == 99 and "--etcd: 'http://u@h' is not http or https URLs" in result.err


# The address

class Address:
    """The address of a daemon of a quorum, on a loop."""

    def __init__(self):
        self.loop, self.came = flomd.Loop(None), []
        bound = flomd.bound_socket("127.0.0.1", free_port(), None)
        self.listener = flomd.TermListener(self.loop, None, bound, None)
        self.address = self.listener.address

    def welcome(self, connection, peer):
        self.came.append(connection)

    def begin(self):
        self.listener.begin(self.welcome)

    def connect(self):
        return socket.create_connection(self.address)

    def is_free(self):
        """Whether another process could serve there, too."""
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                other.bind(self.address)
                other.listen()
            except OSError:
                return False
            return True

    def close(self):
        for connection in self.came:
            connection.close()
        self.listener.leave()


@pytest.fixture
def address():
    made = Address()
    yield made
    made.close()


def test_a_candidate_refuses_clients_and_keeps_its_address(address):
    assert not address.is_free()
    with pytest.raises(ConnectionRefusedError):
        address.connect()


def test_it_listens_while_it_leads_and_again(address):
    for number in range(1, 4):
        address.begin()
        with address.connect() as client:
            address.loop._turn(1)
            assert len(address.came) == number and not address.is_free()
            address.came[-1].close()  # first, so that the system remembers this end
            assert client.recv(1) == b""
        address.listener.close()
        assert not address.is_free()
        with pytest.raises(ConnectionRefusedError):
            address.connect()


def test_who_was_not_accepted_is_reset(address):
    address.begin()
    with address.connect() as client:
        address.listener.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_daemon_that_is_started_again_has_its_address(address):
    address.begin()
    with address.connect() as client:
        address.loop._turn(1)
        address.came[0].close()
        assert client.recv(1) == b""
    address.listener.leave()
    bound = flomd.bound_socket(*address.address, None)
    address.listener = flomd.TermListener(address.loop, None, bound, None)
