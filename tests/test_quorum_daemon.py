"""Daemons of a quorum: their options, their terms, as real processes on a fake etcd."""
import os

import flom
import flomd
import pytest

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
