"""The wire, both ways: FLoM's client with flomd.py, flom.py with FLoM's daemon."""
import json
import os
import signal
import socket

import flom
import pytest
from commands import driven
from fakes import (COMPATIBLE, DISCOVER, END, LOCK, MANAGEMENT, MODES, PEER, PING, UNLOCK,
                   FlomClient, FlomDaemon, Scripted, b64, message, parse, read_message)
from world import DATA, can_connect, endpoint, free_port, wait_until

LOCK_R1 = message(LOCK, 8, f'<session peerid="{PEER}"/><resource name="{b64("R1")}" mode="5" '
                           'wait="1" create="1" lifespan="0"/>')
UNLOCK_R1 = message(UNLOCK, 8, f'<resource name="{b64("R1")}" rollback="0" />')


def answers(rc, step=16):
    """The bytes of FLoM's answer, from the daemon of this machine."""
    session = f'<session peerid="{flom.machine_id()}"/>' if step == 16 else ""
    return message(LOCK, step, f'{session}<answer rc="{rc}"/>')


# FLoM's client with flomd.py

@pytest.fixture
def connect(box):
    """connect(): a new connection of FLoM's client with a daemon of ours; closed at the end."""
    box.daemon()
    clients = []

    def connect():
        clients.append(FlomClient(*endpoint(box.address)))
        return clients[-1]

    yield connect
    for client in clients:
        client.socket.close()


def raw(client, data):
    client.socket.sendall(data)


def is_closed(client):
    """Has the daemon closed, having sent nothing more?"""
    try:
        return client.socket.recv(1) == b""
    except ConnectionResetError:
        return True


def is_free(connect, name):
    """Can the exclusive lock be had?  It is given back."""
    client = connect()
    answer = client.ask(name, wait=0)
    client.release() if answer[1] == 0 else client.leave()
    return answer[1] == 0


def test_a_lock_is_granted_released_and_closed_with_floms_bytes(connect):
    client = connect()
    raw(client, LOCK_R1)
    assert client.receive() == answers(0)
    raw(client, UNLOCK_R1)
    assert client.leave() == b""
    assert is_free(connect, "R1")


def test_a_waiter_is_queued_and_granted(connect):
    holder, waiter = connect(), connect()
    assert holder.lock("R1") is True
    raw(waiter, LOCK_R1)
    assert waiter.receive() == answers(1)
    assert holder.release() == b""
    assert waiter.receive() == answers(0, 24)
    assert not is_free(connect, "R1")
    raw(waiter, UNLOCK_R1)
    assert waiter.leave() == b""
    assert is_free(connect, "R1")


def test_busy_leaves_the_connection_open_for_another_lock(connect):
    holder, other = connect(), connect()
    holder.lock("R1")
    assert other.ask("R1", wait=0) == (16, 4, None)
    assert other.ask("R1", wait=0) == (16, 4, None)
    holder.release()
    assert other.ask("R1", wait=0) == (16, 0, None)
    assert other.release() == b""


def test_a_resource_that_is_not_there(connect):
    client = connect()
    assert client.ask("R1", wait=0, create=0) == (16, 5, None)
    assert is_closed(client)


@pytest.mark.parametrize("queued", [False, True])
def test_waiting_for_a_resource_until_it_is_created(connect, queued):
    parked, creator = connect(), connect()
    assert parked.ask("R1", create=0, mode="PR") == (16, 2, None)
    assert creator.ask("R1", mode="EX" if queued else "PR") == (16, 0, None)
    if queued:
        assert parked.answer(24) == (24, 1, None)
        creator.release()
    assert parked.answer(24) == (24, 0, None)
    assert parked.release() == b""


def test_an_existing_resource_needs_no_creation(connect):
    holder, other = connect(), connect()
    holder.lock("R1", mode="PR")
    assert other.ask("R1", mode="PR", create=0, wait=0) == (16, 0, None)
    assert other.release() == b"" and holder.release() == b""
    assert connect().ask("R1", create=0, wait=0) == (16, 0, None)  # idle, for 2 s


@pytest.mark.parametrize("name", ["_STATUSX", "9", "a b", "a\n", "", "_s_a[0]", "/a/"], ids=ascii)
def test_an_invalid_name(connect, name):
    client = connect()
    raw(client, message(LOCK, 8, f'<session peerid="{PEER}"/><resource name="{b64(name)}" mode="0" '
                                 'wait="0" create="0" lifespan="0"/>'))
    assert client.answer(16) == (16, -14, None)
    assert is_closed(client)


@pytest.mark.parametrize("held", MODES)
def test_all_pairs_of_modes(connect, held):
    assert connect().lock("R1", mode=held) is True
    for asked in MODES:
        expected = 0 if asked in COMPATIBLE[held].split() else 4
        other = connect()
        assert other.ask("R1", mode=asked, wait=0) == (16, expected, None), asked
        other.leave()


def test_absent_attributes_count_as_0(connect):
    holder, other = connect(), connect()
    holder.lock("R1", mode="PW")
    raw(other, message(LOCK, 8, f'<session/><resource name="{b64("R1")}"/>'))
    assert other.answer(16) == (16, 0, None)  # NL fits beside PW
    raw(connect(), message(LOCK, 8, f'<session/><resource name="{b64("R2")}"/>'))
    client = connect()
    raw(client, message(LOCK, 8, f'<session/><resource name="{b64("R3")}"/>'))
    assert client.answer(16) == (16, 5, None)  # neither wait nor create


def test_a_writer_that_waits_is_not_overtaken_and_readers_are_granted_together(connect):
    reader, writer, late, later = (connect() for _ in range(4))
    assert reader.lock("R1", mode="PR") is True
    assert writer.ask("R1", mode="EX") == (16, 1, None)
    assert late.ask("R1", mode="PR") == (16, 1, None)
    assert later.ask("R1", mode="PR") == (16, 1, None)
    assert connect().ask("R1", mode="PR", wait=0) == (16, 4, None)
    reader.release()
    assert writer.wait() == (0, None)
    assert connect().ask("R1", mode="NL", wait=0) == (16, 0, None)
    writer.release()
    assert late.wait() == (0, None) and later.wait() == (0, None)


def test_a_writer_that_gives_up_lets_the_readers_behind_it_pass(connect):
    reader, writer, late = (connect() for _ in range(3))
    reader.lock("R1", mode="PR")
    writer.ask("R1", mode="EX")
    assert late.ask("R1", mode="PR") == (16, 1, None)
    assert writer.leave() == b""
    assert late.wait() == (0, None)


def test_first_fit_lets_a_reader_pass(box):
    box.daemon("--policy", "first-fit")
    reader, writer, late = (FlomClient(*endpoint(box.address)) for _ in range(3))
    with reader, writer, late:
        reader.lock("R1", mode="PR")
        assert writer.ask("R1", mode="EX") == (16, 1, None)
        assert late.ask("R1", mode="PR") == (16, 0, None)


def test_the_queue_is_first_come_first_served(connect):
    holder, waiters = connect(), [connect() for _ in range(20)]
    holder.lock("R1")
    for waiter in waiters:
        assert waiter.ask("R1") == (16, 1, None)
    holder.release()
    for place, waiter in enumerate(waiters):
        assert waiter.wait() == (0, None)
        assert not is_free(connect, "R1")
        waiter.release() if place % 2 else waiter.socket.close()


def test_every_split_of_a_message(connect):
    for place in range(1, len(LOCK_R1)):
        client = connect()
        raw(client, LOCK_R1[:place])
        raw(client, LOCK_R1[place:])
        assert client.receive() == answers(0), place
        raw(client, UNLOCK_R1)
        assert client.leave() == b""


def test_a_message_byte_by_byte(connect):
    client = connect()
    for place in range(len(LOCK_R1)):
        raw(client, LOCK_R1[place:place + 1])
    assert client.receive() == answers(0)


def test_several_messages_in_one_write(connect):
    client = connect()
    raw(client, LOCK_R1 + UNLOCK_R1)
    assert client.receive() == answers(0)
    assert client.leave() == b""
    assert is_free(connect, "R1")


def test_half_a_message_stops_nobody_else(connect):
    raw(connect(), LOCK_R1[:50])
    assert is_free(connect, "R1")


def test_half_closing_releases_a_holder_and_removes_a_waiter(connect):
    holder, waiter, last = connect(), connect(), connect()
    holder.lock("R1")
    waiter.ask("R1")
    last.ask("R1")
    assert waiter.leave() == b""
    assert holder.leave() == b""
    assert last.wait() == (0, None)


@pytest.mark.parametrize("said", [message(LOCK, 8, '<resource name="X1NUQVRVUw=="/>'),
                                  message(MANAGEMENT, 8, '<evict id="x"/>')],
                         ids=["status", "evict"])
def test_who_was_told_the_last_word_is_granted_nothing(connect, said):
    """A waiter that has asked for a report reads no grant any more: the next one gets it."""
    holder, waiter, other = connect(), connect(), connect()
    assert holder.lock("R1") is True
    assert waiter.ask("R1")[1] == 1
    assert other.ask("R1")[1] == 1
    raw(waiter, said)
    while waiter.socket.recv(4096):
        pass
    other.socket.settimeout(5)
    holder.release()
    assert other.wait() == (0, None)


def test_unlock_of_another_name_closes_and_releases(connect):
    client = connect()
    client.lock("R2")
    raw(client, UNLOCK_R1)
    assert is_closed(client)
    assert is_free(connect, "R2")


@pytest.mark.parametrize("state", ["new", "queued", "parked", "released"])
def test_unlock_by_one_who_holds_nothing_closes_only_that_connection(connect, state):
    holder, client = connect(), connect()
    holder.lock("R2")
    if state == "queued":
        client.ask("R2")
    elif state == "parked":
        client.ask("R1", create=0)
    elif state == "released":
        client.lock("R1")
        client.unlock()
    client.name = "R1"
    client.unlock()
    assert is_closed(client)
    assert not is_free(connect, "R2")


def test_a_lock_while_queued_that_repeats_keeps_its_place(connect):
    holder, first, second = connect(), connect(), connect()
    holder.lock("R1")
    first.ask("R1")
    second.ask("R1")
    assert first.ask("R1") == (16, 1, None)
    holder.release()
    assert first.wait() == (0, None)


def test_a_lock_while_queued_for_something_else_replaces_the_request(connect):
    holder, first, second = connect(), connect(), connect()
    holder.lock("R1")
    first.ask("R1")
    second.ask("R1")
    assert first.ask("R2") == (16, 0, None)
    holder.release()
    assert second.wait() == (0, None)
    assert not is_free(connect, "R2")
    assert first.release() == b""


def test_a_lock_while_holding_changes_nothing(connect):
    client = connect()
    client.lock("R1", mode="PW")
    assert client.ask("R1", mode="PW") == (16, 0, None)
    assert client.ask("R1", mode="EX") == (16, 4, None)
    assert client.ask("R2") == (16, 4, None)
    assert is_free(connect, "R2") and not is_free(connect, "R1")
    client.name = "R1"
    assert client.release() == b""
    assert is_free(connect, "R1")


def test_a_level_other_than_3_is_closed_and_an_absent_one_taken(connect):
    client = connect()
    raw(client, LOCK_R1.replace(b'level="3"', b'level="4"'))
    assert is_closed(client)
    client = connect()
    raw(client, LOCK_R1.replace(b' level="3"', b""))
    assert client.receive() == answers(0)


def test_pings(connect):
    client = connect()
    raw(client, message(PING, 16))
    raw(client, message(PING, 8))
    assert client.receive() == message(PING, 16)
    assert client.ask("R1") == (16, 0, None)


def test_messages_up_to_64_kib(connect):
    client = connect()
    raw(client, LOCK_R1.replace(b"<session", b" " * 60000 + b"<session"))
    assert client.receive() == answers(0)
    client = connect()
    client.socket.settimeout(5)  # half of what a connection without a message has
    try:
        raw(client, b"<" * 66000)
        assert is_closed(client)
    except ConnectionError:
        pass  # closed while we were writing
    assert not is_free(connect, "R1")


def test_a_malformed_message_closes_only_that_connection(connect):
    holder, bad = connect(), connect()
    holder.lock("R1")
    bad.lock("R2")
    raw(bad, b"hello" + END)
    assert is_closed(bad)
    assert is_free(connect, "R2") and not is_free(connect, "R1")


@pytest.mark.parametrize("immediate", [0, 1])
def test_shutdown_by_floms_client(box, immediate):
    daemon = box.daemon()
    with FlomClient(*endpoint(box.address)) as holder, FlomClient(*endpoint(box.address)) as other:
        holder.lock("R1")
        assert other.shut_down(immediate) == b""
        if immediate:
            assert is_closed(holder)
        else:
            assert daemon.poll() is None
            assert holder.release() == b""
        assert daemon.wait(timeout=10) == 0
    assert box.sockets() == set()


def test_a_shutdown_followed_at_once_by_close_is_obeyed(box):
    daemon = box.daemon()
    with FlomClient(*endpoint(box.address)) as client:
        raw(client, message(MANAGEMENT, 8,
                            f'<session peerid="{PEER}"/><shutdown immediate="1"/>'))
    assert daemon.wait(timeout=10) == 0


# flom.py with FLoM's daemon

@pytest.fixture
def floms(box):
    with FlomDaemon(unix=box.socket) as daemon:
        box.address = ("-s", box.socket, "-d", "0")
        yield daemon
    assert daemon.deaths == []
    assert all(len(data) <= 511 for data in daemon.messages)


def captured(name):
    with open(os.path.join(DATA, "vectors.json"), encoding="utf-8") as file:
        return [vector["text"].encode() for vector in json.load(file) if vector["name"] == name][0]


def verbs(daemon):
    return [parse(data)["msg"]["verb"] for data in daemon.messages]


def test_a_command_runs_and_its_lock_is_unlocked(box, floms):
    assert box.run("-r", "R1", "--", "echo", "hello") == (0, "hello\n", "")
    assert floms.messages[1] == captured("simple:unlock8")
    assert verbs(floms) == ["1", "2"]
    wait_until(lambda: not floms.peers)


OPTIONS = {"simple:lock8": ["-r", "R1"], "simple-CR:lock8": ["-r", "R1", "-l", "CR"],
           "default:lock8": [], "opt:-o 700:lock8": ["-r", "NX3", "-o", "700"],
           "opt:-o -7:lock8": ["-r", "NX3", "-o", "-7"],
           "opt:-l NL..EX ignored for numeric:lock8": ["-r", "NN[4]", "-q", "3", "-l", "NL"],
           "opt:-q on simple ignored:lock8": ["-r", "NX4", "-q", "3"]}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_request_is_floms_and_more_attributes(box, floms, name):
    assert box.run(*OPTIONS[name], "--", "true") == (0, "", "")
    sent, expected = parse(floms.messages[0]), parse(captured(name))
    assert list(sent) == list(expected) and sent["msg"] == expected["msg"]
    common = list(expected["resource"])
    assert list(sent["resource"].items())[:len(common)] == list(expected["resource"].items())
    assert list(sent["session"])[0] == "peerid"
    assert sent["session"]["peerid"] == flom.machine_id()
    assert floms.messages[0].isascii() if hasattr(bytes, "isascii") else True


def test_who_asks_is_told_in_ascii_and_in_time(box, floms):
    script = box.write("caf\xe9<&>\"'" * 15, "#!/bin/sh\n")
    os.chmod(script, 0o755)
    assert box.run("-r", "R" * 120, "--", script).status == 0
    assert 400 < len(floms.messages[0]) <= 511 and floms.messages[0].decode("ascii")


ABOUT = {"client": "flom.py/1.0", "id": "a" * 16, "key": "b" * 16, "life": 1,
         "parent": ",".join(["c" * 16, "d" * 16, "e" * 16]),
         "pid": 4211, "user": "joe", "host": "db1.example.org", "cmd": "vacuum"}


def test_what_gives_way_in_a_long_request():
    """First what only people read, then what is old; id, key, life and one ancestor travel."""
    settings, left = flom.Settings(), [set(ABOUT) | {"peerid"}]
    for length in range(10, 400):
        settings.values["Name"] = "R" * length
        data = flom.lock_message(settings, ABOUT, True)
        session = flom.decode(data)["session"]
        if set(session) != left[-1]:
            left.append(set(session))
        assert session["id"] == ABOUT["id"] and session["key"] == ABOUT["key"]
        assert session["life"] == 1
        assert session["client"] == "flom.py" or session["parent"] == ABOUT["parent"]
        assert len(data) <= 511 or session["parent"] == "c" * 16
    gone = [before - after for before, after in zip(left, left[1:])]
    assert gone == [{"host"}, {"user"}, {"cmd"}, {"pid"}]


def test_the_status_of_the_command_passes_through(box, floms):
    assert box.run("--", "sh", "-c", "exit 3").status == 3
    assert box.run("--", "sh", "-c", "kill -9 $$").status == 137


@pytest.mark.parametrize("code", [0, 1])
def test_the_unlock_says_whether_the_command_succeeded(box, floms, code):
    assert box.run("-r", "R1", "--", "sh", "-c", f"exit {code}").status == code
    assert parse(floms.messages[-1])["resource"]["rollback"] == str(code)


def test_waiting_for_floms_daemon(box, floms):
    gate = box.gate("first")
    first = box.flom("--", *gate.command)
    gate.wait()
    second = box.flom("--", "sh", "-c", f"echo second >>{box.log}")
    wait_until(floms.waiting)
    gate.open()
    assert (first.end().status, second.end()) == (0, (0, "", ""))
    assert box.events() == ["first start", "first end", "second"]


def test_one_who_gives_up_waiting_says_nothing_more(box, floms):
    with FlomClient(*endpoint(box.address)) as holder:
        holder.lock("R1")
        late = box.run("-r", "R1", "-o", "1000", "--", "echo", "wrong")
        parked = box.run("-r", "R2", "-e", "no", "-o", "1000", "--", "echo", "wrong")
        message = "The lock was not obtained because timeout (1000 milliseconds) expired\n"
        assert late == parked == (98, "", message)
        wait_until(lambda: len(floms.peers) == 1)
        killed = box.flom("-r", "R1", "--", "echo", "wrong")
        wait_until(floms.waiting)
        box.kill(killed.pid, 15)
        assert killed.end() == (-15, "", "")
        wait_until(lambda: len(floms.peers) == 1)
    assert verbs(floms) == ["1"] * 4


REFUSALS = [
    (["-r", "R1", "-o", "0"], 98, "Resource already locked, the lock cannot be obtained\n"),
    (["-r", "R2", "-e", "no", "-o", "0"], 96,
     "The resource could be available in the future, but the requester can't wait\n"),
    (["-r", "p[2]", "-q", "3"], 99,
     "Resource will never satisfy the request, the lock cannot be obtained\n")]


@pytest.mark.parametrize("options, status, err", REFUSALS)
def test_refusals_of_floms_daemon(box, floms, options, status, err):
    with FlomClient(*endpoint(box.address)) as holder:
        holder.lock("R1")
        assert box.run(*options, "--", "echo", "wrong") == (status, "", err)


def test_a_name_that_floms_daemon_refuses(box, floms):
    status, out, err = box.run("-r", "/only/ours", "--", "echo", "wrong")
    assert (status, out) == (99, "")
    assert err.startswith("flom: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("option, word", [("-x", "quiesce"), ("-X", "immediate")])
def test_stopping_floms_daemon(box, floms, option, word):
    done = box.run(option)
    assert done == (0, f"Starting FLoM daemon {word} shutdown...\n", "")
    wait_until(lambda: floms.ended)
    assert floms.lost == [] and verbs(floms) == ["5"]


def test_a_daemon_that_reads_no_addition_is_asked_without(box):
    """The additions that always travel make this request longer than 511 bytes."""
    box.address = ("-s", box.socket, "-d", "0")
    with FlomDaemon(unix=box.socket) as daemon:
        done = box.run("-r", "R" * 200, "--", "echo", "x", env={"FLOM_SESSION": "0" * 16})
        assert done == (0, "x\n", "")
    assert [len(data) > 511 for data in daemon.messages] == [True, False, False]
    assert daemon.deaths == []


def test_a_daemon_over_tcp(box):
    with FlomDaemon(tcp=("127.0.0.1", 0)) as daemon:
        box.address = ("-a", "127.0.0.1", "-p", str(daemon.tcp[1]), "-d", "0")
        assert box.run("-r", "TC", "--", "echo", "hello") == (0, "hello\n", "")
    assert daemon.deaths == [] and daemon.messages[1] == captured("tcp:TC:unlock8")


# flom.py with a daemon that says what the test wants

def serving(box, *chunks, after=None):
    """A daemon that reads a request, answers these bytes, one write each, and then listens."""
    got = []

    def serve(connection):
        got.append(read_message(connection))
        for chunk in chunks:
            connection.sendall(chunk)
        if after == "close":
            return
        got.append(read_message(connection))

    box.address = ("-s", box.socket, "-d", "0")
    scripted = Scripted(box.socket, serve)
    scripted.got = got
    return scripted


@pytest.mark.parametrize("size", [1, 10 ** 6], ids=["byte by byte", "joined"])
def test_answers_byte_by_byte_and_joined(box, size):
    told = answers(1) + answers(1, 24) + answers(0, 24)
    chunks = [told[start:start + size] for start in range(0, len(told), size)]
    with serving(box, *chunks) as daemon:
        assert box.run("-r", "R1", "--", "echo", "hello") == (0, "hello\n", "")
        wait_until(lambda: len(daemon.got) >= 2)
        assert daemon.got[1] == UNLOCK_R1


@pytest.mark.parametrize("rc", [2, 4, 5, 6, 7, 8, 9, -14, -1, 77])
@pytest.mark.parametrize("step", [16, 24])
def test_a_command_runs_on_rc_0_and_on_nothing_else(box, rc, step):
    if step == 16 and rc == 2:
        return  # it waits
    chunks = [answers(rc)] if step == 16 else [answers(1), answers(rc, 24)]
    with serving(box, *chunks, after="close"):
        done = box.run("-r", "R1", "-o", "300", "--", "echo", "wrong")
    assert done.out == "" and done.status in (94, 96, 98, 99)
    assert done.err.count("\n") == 1


def test_a_ping_from_a_daemon_is_ignored(box):
    chunks = [answers(1) + message(PING, 8), answers(0, 24) + message(PING, 8)]
    with serving(box, *chunks) as daemon:
        assert box.run("-r", "R1", "--", "echo", "hello") == (0, "hello\n", "")
        wait_until(lambda: len(daemon.got) >= 2)
        assert daemon.got[1] == UNLOCK_R1


@pytest.mark.parametrize("flood", [message(PING, 8), answers(1, 24)], ids=["ping", "queued"])
def test_a_daemon_that_sends_without_end_keeps_nobody_waiting(box, flood):
    """flom reads a part at a time, and looks in between whether its time is over."""
    first = answers(1) + flood * 500

    def serve(connection):
        read_message(connection)
        connection.sendall(first)
        while True:
            connection.sendall(flood * 500)

    box.address = ("-s", box.socket, "-d", "0")
    with Scripted(box.socket, serve):
        assert box.run("-o", "300", "--", "true", seconds=10).status == 98


def test_a_flood_of_pings_does_not_hide_the_end_of_the_command(box):
    def serve(connection):
        read_message(connection)
        connection.sendall(answers(0))
        while True:
            connection.sendall(message(PING, 8) * 500)

    box.address = ("-s", box.socket, "-d", "0")
    with Scripted(box.socket, serve):
        holder, gate = box.hold("a")
        holder.send_signal(signal.SIGTERM)
        assert holder.end(10).status == 143


@pytest.mark.parametrize("name, element, fits", [
    ("backup", "--checkpoint-action=exec=id", False), ("/a/b", "x", False), ("p[2]", "1", False),
    ("red.green", "green", True), ("red.green", "blue", False), ("red.green", "", False),
    ("red.green", None, False), ("_s_n[1]", "42", True), ("_s_n[1]", "-42", False),
    ("_s_n[1]", "4\u0662", False), ("_S_n[1]", None, False), ("_t_%S[1]", "59", True),
    ("_t_%c[1]", "9. M\u00e4r 08:00", True), ("_t_%z.%S[1]", "-0500.59", False),
    ("_t_%S[1]", "5\n9", False), ("_t_%S[1]", "\x1b[2J", False), ("_t_%S[1]", "9" * 501, False)])
def test_an_element_has_the_form_that_its_kind_gives_it(name, element, fits):
    """It becomes an argument of the command."""
    if fits:
        flom.check_element(name, element)
        return
    with pytest.raises(flom.ProtocolError):
        flom.check_element(name, element)


def test_a_command_is_not_run_with_an_element_from_a_stranger(box):
    grant = message(LOCK, 16, '<answer rc="0" element="--exec=id"/>')
    with serving(box, grant, after="close"):
        done = box.run("-r", "backup", "--", "echo", "wrong")
    assert done == (99, "", f"flom: {box.socket} is no lock daemon: it grants an element, "
                            "'--exec=id', where there are none\n")


def test_what_a_daemon_says_is_shown_and_not_obeyed_by_the_terminal(box):
    reason = "&#27;]0;owned&#7;&#10;second line"
    refusal = message(LOCK, 16, f'<answer rc="9" reason="{reason}"/>')
    with serving(box, refusal, after="close"):
        done = box.run("-V", "-T", box.path("trace"), "-r", "R1", "--", "true")
    assert done.status == 99 and done.err.count("\n") == 1
    assert done.err.endswith(r"refuses: \x1b]0;owned\x07\nsecond line" + "\n")


def test_a_discovery_answer_with_a_host_name_is_ignored():
    """Nobody who can send a datagram makes this host ask a name server, or wait for one."""
    kinds = socket.AF_INET, socket.SOCK_DGRAM
    with socket.socket(*kinds) as asker, socket.socket(*kinds) as stranger:
        asker.bind(("127.0.0.1", 0))
        asker.setblocking(False)
        for host in ("localhost", "127.0.0.2"):
            answer = message(DISCOVER, 16, f'<network address="{host}" port="1"/>')
            stranger.sendto(answer, asker.getsockname())
        found = flom.finish(flom.hearing(asker, flom.clock() + 10))
    assert found == (answer, [(socket.AF_INET, ("127.0.0.2", 1))])


def test_an_end_before_the_first_answer_is_no_answer(box):
    """The daemon was about to end; the next one that listens there is asked again."""
    seen = []

    def serve(connection):
        seen.append(read_message(connection))
        if len(seen) > 2:
            connection.sendall(answers(0))
            read_message(connection)

    box.address = ("-s", box.socket, "-d", "0")
    with Scripted(box.socket, serve):
        assert box.run("-r", "R1", "--", "echo", "hello") == (0, "hello\n", "")
    assert len(seen) == 3


def test_an_order_to_end_comes_before_the_first_answer(box):
    """It is told as a later answer, whatever the request has been told before."""
    ending = message(LOCK, 24, '<answer rc="8" reason="somebody wants it"/>')
    with serving(box, ending):
        done = box.run("-o", "0", "--", "echo", "hello")
    assert done == (99, "", "flom: the daemon is ending: somebody wants it\n")


BROKEN = {"garbage": b"hello" + END, "no end": b"<msg" * 300, "an unlock": UNLOCK_R1,
          "a grant for a question not asked": message(LOCK, 8),
          "a page": b"HTTP/1.0 400 Bad\r\n\r\n"}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_lock_daemon_is_an_error(box, name):
    with serving(box, BROKEN[name], after="close"):
        done = driven(box, "flom.PATIENCE = 1", "-r", "R1", "-o", "300", "--", "echo", "x").end()
    assert (done.status, done.out) == (99, "")
    assert done.err.startswith("flom: ")


def test_connections_that_are_refused_do_not_count_as_daemons():
    assert not can_connect(("-a", "127.0.0.1", "-p", str(free_port())))
    with pytest.raises(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.connect("/nonexistent/s")
