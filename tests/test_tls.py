"""TLS on both sides: who is let in, what is said to those that are not, and loss over TLS."""
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import ssl
import threading

import flom
import flomd
import pytest
from certificates import Certificates, TlsClient
from commands import driven
from fakes import (END, LOCK, MANAGEMENT, PEER, PING, UNLOCK, FlomClient, b64, message,
                   read_message)
from world import Box, can_connect, endpoint, free_port, read, wait_until

NO_TLS = ()
RESET = b"\1\0\0\0\0\0\0\0"  # SO_LINGER: close() tells the peer that all is over


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("tls"))


def address_of(box, kind):
    if kind == "unix":
        return ("-s", box.socket)
    return ("-a", "127.0.0.1", "-p", str(free_port()), "--state-dir", box.folder)


@pytest.fixture
def tls(request, box, certificates):
    """A box whose commands and daemon have good certificates; `bare` is the address alone."""
    box.bare = address_of(box, getattr(request, "param", "tcp"))
    box.address = box.bare + certificates.options()
    return box


over_both = pytest.mark.parametrize("tls", ["unix", "tcp"], indirect=True)


def holds(box, name="good"):
    """A command that runs under a lock while others are refused."""
    return box.hold(name, "-r", name, "-d", "0")


def refused(box, options):
    """Runs a client with these TLS options and returns its one line on stderr."""
    done = box.run("-r", "R1", "-d", "0", "-o", "0", "--", "echo", "x",
                   address=box.bare + options)
    assert done[:2] == (99, "")
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err
    return done.err


@over_both
def test_commands_take_turns_over_tls(tls):
    holder, gate = tls.hold("a", "-r", "R1")
    waiter = tls.waiter("-r", "R1", "--", *tls.note("b"))
    assert tls.run("-r", "R1", "-o", "0", "--", "true").status == 98
    assert tls.run("-r", "A.B", "--", "echo") == (0, "A\n", "")
    gate.open()
    assert holder.end() == (0, "", "") and waiter.end().status == 0
    assert tls.events() == ["a start", "a end", "b"] and len(tls.daemons()) == 1
    assert tls.run("-X").status == 0
    wait_until(lambda: not tls.daemons())


@over_both
def test_a_client_of_flom_over_tls(tls, certificates):
    tls.daemon()
    with TlsClient(*endpoint(tls.bare), certificates.context()) as holder, \
            TlsClient(*endpoint(tls.bare), certificates.context()) as waiter:
        assert holder.lock("R1") is True and waiter.ask("R1") == (16, 1, None)
        holder.unlock()
        assert waiter.wait() == (0, None)


@over_both
def test_messages_that_came_in_one_record(tls, certificates):
    """Each waits until what the one before it has brought is stored, and none is left behind."""
    tls.daemon()
    with TlsClient(*endpoint(tls.bare), certificates.context()) as client:
        rounds = []
        for number in range(40):
            name = f"R{number}"
            rounds.append(message(LOCK, 8, f'<session peerid="{PEER}"/><resource name="{b64(name)}"'
                                           ' mode="5" wait="0" create="1" lifespan="0"/>'))
            rounds.append(message(UNLOCK, 8, f'<resource name="{b64(name)}" rollback="0" />'))
        sent = b"".join(rounds)
        assert len(sent) > 2 * flomd.MOST_READ
        client.socket.sendall(sent)
        assert [client.answer(16) for _ in range(40)] == [(16, 0, None)] * 40


@over_both
def test_an_unlock_of_one_that_has_gone_counts(tls, certificates):
    """It has not waited for the answer to its lock: its number was used all the same."""
    tls.daemon()
    name = b64("_S_n[1]")
    client = TlsClient(*endpoint(tls.bare), certificates.context())
    client.socket.sendall(message(PING, 8))
    assert client.receive()  # what it has not read at its end, of the handshake too, would reset it
    client.socket.sendall(
        message(LOCK, 8, f'<session peerid="{PEER}"/><resource name="{name}" wait="0" create="1" '
                         'lifespan="60000"/>'))
    client.socket.sendall(message(UNLOCK, 8, f'<resource name="{name}" rollback="0" />'))
    client.socket.close()
    assert tls.run("-r", "_S_n[1]", "--", "echo") == (0, "2\n", "")


REFUSED = {  # what the client shows and trusts: a word in what it says, one in the daemon's log
    "another authority's certificate": (("stranger", "ca"), "certificate", "no TLS"),
    "an expired certificate": (("expired", "ca"), "certificate", "no TLS"),
    "an authority that did not sign the daemon's": (("good", "other"), "certificate", "no TLS"),
    "no TLS": (None, "is no lock daemon", "no TLS")}


@pytest.mark.parametrize("case", REFUSED)
def test_a_client_that_is_refused(tls, certificates, case):
    shown, said, logged = REFUSED[case]
    daemon = tls.daemon()
    holder, gate = holds(tls)
    assert said in refused(tls, certificates.options(*shown) if shown else NO_TLS)
    wait_until(lambda: logged in daemon.err)
    gate.open()
    assert holder.end() == (0, "", "") and "Traceback" not in daemon.err


def test_a_client_without_a_certificate(tls, certificates):
    """TLS 1.3 tells it with the first byte that is read, older TLS during the handshake."""
    daemon = tls.daemon()
    holder, gate = holds(tls)
    with pytest.raises(OSError):
        with TlsClient(*endpoint(tls.bare), certificates.context(None)) as client:
            client.ask("R1")
            raise ConnectionAbortedError("it was closed without an answer")
    wait_until(lambda: "no TLS" in daemon.err)
    gate.open()
    assert holder.end() == (0, "", "")


@pytest.mark.parametrize("shown", ["stranger", "expired"])
def test_a_daemon_that_is_refused(tls, certificates, shown):
    tls.daemon(address=tls.bare + certificates.options(shown))
    assert "its certificate" in refused(tls, certificates.options())


@pytest.mark.parametrize("side", ["client", "daemon"])
def test_the_peer_id(tls, certificates, side):
    """The common name must be the peer's id, on the side that is told to look."""
    check = ("--tls-check-peer-id", "yes")
    names = {"client": ("good", "wrong"), "daemon": ("wrong", "good")}[side]
    daemon = tls.daemon(*check, address=tls.bare + certificates.options(names[1]))
    err = refused(tls, certificates.options(names[0]) + check)
    assert "somebody" in err
    if side == "daemon":  # it is the daemon that has found out
        wait_until(lambda: "somebody" in daemon.err)
    done = tls.run("--", "echo", "x", address=tls.bare + certificates.options(names[0]))
    assert done.status == (0 if side == "client" else 99)


CHECK = ("--tls-check-peer-id", "yes")


def test_the_peer_id_that_is_right(tls):
    """For a command, a report and every order."""
    tls.address += CHECK
    daemon = tls.daemon()
    holder, gate = holds(tls)
    status, out, _ = tls.run("--status", "--json")
    assert status == 0
    assert tls.run("--evict", json.loads(out)["resources"][0]["holders"][0]["id"]).status == 0
    gate.open()
    assert holder.end().status == 95
    assert tls.run("--", "echo", "x") == (0, "x\n", "")
    assert tls.run("-X").status == 0
    assert daemon.end().status == 0


CALLS = {"lock": ("-r", "R1", "-d", "0", "-o", "0", "--", "echo", "x"), "status": ("--status",),
         "evict": ("--evict", "0"), "stop": ("-X",), "quiesce": ("-x",)}


@pytest.mark.parametrize("side", ["client", "daemon"])
@pytest.mark.parametrize("shown", ["wrong", "nameless", "double"])
def test_every_call_needs_one_name_that_is_the_id(tls, certificates, side, shown):
    """Whoever checks refuses whom shows another name, none, or two: for every call."""
    good, bad = tls.bare + certificates.options("good"), tls.bare + certificates.options(shown)
    daemon = tls.daemon(address=good + CHECK if side == "daemon" else bad)
    asking = bad if side == "daemon" else good + CHECK
    for call, words in CALLS.items():
        done = tls.run(*words, address=asking)
        assert done.status == 99 and done.err.count("\n") == 1, (call, done)
        assert ("somebody" if shown == "wrong" else "None") in done.err, (call, done)
        assert daemon.poll() is None, call
    if side == "daemon":
        wait_until(lambda: "its id" in daemon.err)
    assert "Traceback" not in daemon.err


@pytest.mark.parametrize("shown", ["good", "wrong", "nameless", "double"])
def test_a_daemon_that_another_daemon_finds(tls, certificates, shown):
    """It makes way for one whose certificate is that of its id alone."""
    tls.daemon(address=tls.bare + certificates.options(shown))
    address = endpoint(tls.bare)[1]
    assert re.fullmatch("[0-9a-f]{16}", flomd.daemon_at(address, certificates.context()))
    if shown == "good":
        assert flomd.daemon_at(address, certificates.context(), checks_ids=True)
    else:
        with pytest.raises(LookupError):
            flomd.daemon_at(address, certificates.context(), checks_ids=True)


def test_no_name_is_looked_up_for_who_announces_a_daemon():
    with pytest.raises(socket.gaierror):
        flomd.daemon_at(("localhost", free_port()), None)


ORDERS = [(LOCK, '<resource name="UjE=" wait="0" create="1"/>'),
          (LOCK, '<resource name="X1NUQVRVUw=="/>'),  # _STATUS
          (MANAGEMENT, '<shutdown immediate="1"/>'), (MANAGEMENT, '<evict id="aa"/>')]


@pytest.mark.parametrize("shown", ["nameless", "double", "good"])
def test_a_client_that_presents_no_id(tls, certificates, shown):
    """No name is not the name of nobody; nor does an empty id help, or to be a client of ours."""
    daemon = tls.daemon(*CHECK)
    for session in ("", "<session/>", '<session peerid=""/>', '<session client="flom.py/1"/>'):
        for verb, order in ORDERS:
            with TlsClient(*endpoint(tls.bare), certificates.context(shown)) as client:
                client.socket.sendall(message(verb, 8, session + order))
                try:
                    answer = read_message(client.socket)
                except ssl.SSLError:  # Python 3.6 with OpenSSL 3: an end without a goodbye
                    answer = b""
                assert b'rc="0"' not in answer
    assert daemon.poll() is None


def test_a_key_that_does_not_fit(tls, certificates):
    options = certificates.options(key="wrong")
    tls.daemon()
    err = refused(tls, options)
    assert certificates.pem("good") in err and certificates.key("wrong") in err
    daemon = tls.flomd("-f", "--no-files", "-s", tls.path("other"), *options)
    status, _, err = daemon.end()
    assert status == 1 and err.count("\n") == 1
    assert certificates.pem("good") in err and certificates.key("wrong") in err


@pytest.mark.parametrize("missing", ["good.pem", "good.key", "ca.pem"])
def test_a_file_that_is_not_there(tls, certificates, missing):
    options = tuple(word.replace(missing, "nothing") for word in certificates.options())
    assert "nothing" in refused(tls, options)
    assert "nothing" in tls.flomd("-f", "--no-files", *tls.bare, *options).end().err


def test_tls_to_a_plain_daemon(tls, certificates):
    daemon = tls.daemon(address=tls.bare)
    assert "TLS" in refused(tls, certificates.options())
    wait_until(lambda: "TLS" in daemon.err)
    assert tls.run("--", "echo", "x", address=tls.bare) == (0, "x\n", "")


def test_plain_text_to_a_daemon_with_tls(tls, certificates):
    daemon = tls.daemon(address=(*tls.bare, *certificates.options()))
    status, out, err = tls.run("--", "echo", "x", address=tls.bare)
    assert (status, out) == (99, "") and "wants TLS" in err
    wait_until(lambda: "TLS" in daemon.err)


@over_both
def test_silent_connections_stop_nobody(tls, certificates):
    """Nothing said, half a greeting, a greeting without what follows: others work meanwhile."""
    tls.daemon()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        certificates.context().wrap_bio(incoming, outgoing).do_handshake()
    greeting = outgoing.read()
    silent = [FlomClient(*endpoint(tls.bare)) for _ in range(30)]
    for number, client in enumerate(silent):
        client.socket.sendall(greeting[:(0, 50, None)[number % 3]])
    for _ in range(3):
        assert tls.run("-o", "5000", "--", "echo", "x") == (0, "x\n", "")
    for client in silent:
        client.socket.close()


def test_connections_reset_during_the_handshake(tls):
    daemon = tls.daemon()
    os.kill(daemon.pid, signal.SIGSTOP)  # so that all are there, and gone, when it accepts
    for number in range(40):
        with FlomClient(*endpoint(tls.bare)) as client:
            client.socket.sendall(b"\x16\x03\x01"[:number % 4])
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    os.kill(daemon.pid, signal.SIGCONT)
    assert tls.run("--", "echo", "x") == (0, "x\n", "")
    assert "Traceback" not in daemon.err


def test_a_connection_that_is_reset_is_not_left_open(certificates):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        client = socket.create_connection(listener.getsockname())
        with contextlib.closing(listener.accept()[0]) as served:
            served.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    number = client.fileno()
    try:  # some versions of Python find it here, some in the handshake
        flom.secured(client, certificates.context()).close()
    except OSError:
        pass
    with pytest.raises(OSError):
        os.fstat(number)


def end_handshakes(listener, client, most):
    """Ends the first connections in the handshake of TLS, as long as the client runs."""
    listener.settimeout(0.05)
    ended = 0
    while ended < most and client.poll() is None:
        with contextlib.suppress(socket.timeout):
            with contextlib.closing(listener.accept()[0]) as served:
                served.settimeout(10)
                served.recv(65536)  # what is unread would be a reset
                served.shutdown(socket.SHUT_WR)
                ended += 1


def test_who_ends_the_handshake_is_told_of_with_tls(tls):
    """After a second: it may be a daemon that is restarted."""
    with socket.socket() as listener:
        listener.bind(endpoint(tls.bare)[1])
        listener.listen(1)
        client = tls.flom("--", "echo", "x")
        end_handshakes(listener, client, 1000)
    status, out, err = client.end()
    assert (status, out) == (99, ""), err
    assert err.count("\n") == 1, err
    assert "TLS: " in err, err


def test_a_daemon_that_ends_in_the_handshake_is_looked_for_again(tls):
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(endpoint(tls.bare)[1])
        listener.listen(1)
        client = tls.flom("-d", "0", "--", "echo", "x")
        end_handshakes(listener, client, 1)
    tls.daemon()
    assert client.end() == (0, "x\n", "")


@over_both
def test_a_holder_killed_frees_its_lock(tls):
    holder, gate = tls.hold("a", "--inherit-connection", "no")
    waiter = tls.waiter("--", *tls.note("b"))
    tls.kill(holder.pid)
    assert waiter.end().status == 0
    gate.open()


@over_both
def test_the_daemon_killed_under_a_holder(tls):
    """The holder starts another one and reclaims; the waiter goes on waiting."""
    holder, gate = tls.hold("a", "-r", "R1")
    waiter = tls.waiter("-r", "R1", "--", *tls.note("b"))
    first = tls.the_daemon()
    tls.kill(first)
    wait_until(lambda: tls.daemons() not in ([], [first]) and can_connect(tls.bare))
    assert tls.run("-r", "R1", "-o", "0", "-d", "0", "--", "true").status == 98
    gate.open()
    assert holder.end().status == 0 and waiter.end(seconds=30).status == 0
    assert tls.events() == ["a start", "a end", "b"]


# An alert of TLS

class Alerting(threading.Thread):
    """A daemon that grants, takes the next bytes for damaged, and sends an alert."""

    def __init__(self, certificates):
        super().__init__()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificates.pem("good"), certificates.key("good"))
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(5)
        self.port, self.alerts = self.listener.getsockname()[1], 0

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.join(10)
        self.listener.close()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                connection = self.listener.accept()[0]
                connection.settimeout(10)
                with connection:
                    self._serve(connection)

    def _serve(self, connection):
        coming, going = ssl.MemoryBIO(), ssl.MemoryBIO()
        link = self.context.wrap_bio(coming, going, server_side=True)

        def pump(function, *arguments):
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    result = function(*arguments)
                    connection.sendall(going.read())
                    return result
                connection.sendall(going.read())
                coming.write(connection.recv(65536))

        pump(link.do_handshake)
        asked = b""
        while END not in asked:
            asked += pump(link.read, 4096)
        pump(link.write, message(LOCK, 16, f'<session peerid="{PEER}"/><answer rc="0"/>'))
        unlock = bytearray(connection.recv(65536))
        unlock[7] ^= 1
        coming.write(bytes(unlock))
        with contextlib.suppress(ssl.SSLError):
            link.read(1)
        connection.sendall(going.read())
        self.alerts += 1
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass


def test_an_alert_at_the_unlock(box, certificates):
    """What the lock was held for is done: its status, or its exception, is what counts."""
    with Alerting(certificates) as alerting:
        port = str(alerting.port)
        box.address = ("-a", "127.0.0.1", "-p", port, "-d", "0") + certificates.options()
        assert box.run("--", "sh", "-c", "exit 3") == (3, "", "")
        words = [word[2:].replace("-", "_") for word in certificates.options()[::2]]
        files = dict(zip(words, certificates.options()[1::2]))
        with pytest.raises(ZeroDivisionError):
            with flom.Lock(config=False, unicast_address="127.0.0.1", unicast_port=port, **files):
                raise ZeroDivisionError
        wait_until(lambda: alerting.alerts == 2)


@pytest.mark.parametrize("reason, said, certificates_are_wrong", [
    ("TLSV1_ALERT_UNKNOWN_CA", "it refuses our certificate", True),
    ("SSLV3_ALERT_CERTIFICATE_EXPIRED", "it refuses our certificate", True),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate", True),
    ("EE_KEY_TOO_SMALL", "its certificate", True),
    ("TLSV1_ALERT_PROTOCOL_VERSION", "it refuses", False),
    ("SSLV3_ALERT_BAD_RECORD_MAC", "it refuses", False),
    ("DECRYPTION_FAILED_OR_BAD_RECORD_MAC", "it failed", False),
    ("UNSUPPORTED_PROTOCOL", "it failed", False)])
def test_what_is_wrong_with_tls(reason, said, certificates_are_wrong):
    """Certificates are blamed for what is wrong with them, and for nothing else."""
    error = ssl.SSLError(1, reason)
    error.reason = reason
    assert flom.explain(error) == f"TLS: {said}: {reason}"
    assert flom.is_about_certificates(error) is certificates_are_wrong


def test_an_alert_while_a_lock_is_held():
    """The loss says once where the daemon was."""
    class Refused:
        where = "db1:28015"

        def receive(self):
            raise flom.Useless("db1:28015: TLS: it refuses our certificate")

        def close(self):
            pass

    Refused.session = flom.Session()
    settings = flom.keyword_settings({}, ())
    claim = flom.Claim(settings, flom.Diary(settings), "x", flom.Starter(settings, None, False),
                       flom.Progress(False))
    claim.connection = Refused()
    assert not claim.look()
    assert claim.loss.reason == "db1:28015: TLS: it refuses our certificate"


def keywords(tls):
    """Those of a Lock at the daemon of this box."""
    words = {word[2:].replace("-", "_"): value
             for word, value in zip(tls.address[::2], tls.address[1::2]) if word[:2] == "--"}
    return dict(words, config=False, unicast_address=tls.address[1], unicast_port=tls.address[3])


@pytest.mark.parametrize("tls", ["tcp"], indirect=True)
def test_an_event_loop(tls):
    """Waits, holds, and has its lock back from the next daemon."""
    first = tls.daemon()

    async def work():
        first_lock, second_lock = [flom.AsyncLock("R1", **keywords(tls)) for _ in range(2)]
        async with first_lock as held:
            with pytest.raises(flom.Timeout):
                await second_lock.acquire(timeout=0.05)
            second = asyncio.ensure_future(second_lock.acquire())
            while "waits 1" not in tls.run("--status").out:
                await asyncio.sleep(0.01)
            assert held.locked() and not second.done()
        held = await second
        try:
            tls.kill(first.pid)
            tls.daemon("--recovery-window", "300")
            while not held.locked():
                await asyncio.sleep(0.01)
            await held.check()
        finally:
            await held.release()

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(asyncio.wait_for(work(), 30))
    finally:
        loop.close()


@pytest.mark.parametrize("tls", ["tcp"], indirect=True)
def test_a_process_made_by_fork_closes_its_copy_alone(tls):
    """The stream of the parent goes on: no goodbye of TLS is said for it."""
    tls.daemon()
    lock = flom.Lock("R1", **keywords(tls))
    with lock:
        child = os.fork()
        if not child:
            try:
                lock.release()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert not lock.lost
        assert tls.run("-r", "R1", "-o", "0", "--", "true").status == 98
    assert tls.run("-r", "R1", "-o", "0", "--", "true").status == 0


def test_the_first_address_that_completes_the_handshake_is_asked(box, certificates):
    """One that takes the connection and says nothing holds the next one up for a moment alone."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.3", free_port()))
        silent.listen(5)
        port, options = str(silent.getsockname()[1]), certificates.options()
        box.daemon(*options, address=("-a", "127.0.0.2", "-p", port))
        done = driven(box, "flom.PATIENCE = 600", *options, "-d", "0", "--", "echo", "x",
                      address=("-a", "127.0.0.3,127.0.0.2", "-p", port)).end(15)
        assert done == (0, "x\n", "")


@pytest.mark.parametrize("start", [Box.flom, Box.flomd], ids=["flom", "flomd"])
def test_check_config_with_a_part_of_the_files(box, certificates, start):
    """Also when what is there can be read: one file may hold the certificate and its key."""
    both = box.write("both", read(certificates.pem("good")) + read(certificates.key("good")))
    done = start(box, "--check-config", "--tls-certificate", both).end()
    assert done.status == 99
    assert re.fullmatch("flomd?: --tls-certificate: TLS wants all of .*\n", done.err)
