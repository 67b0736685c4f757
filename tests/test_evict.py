"""--evict: a lock is taken away from its holder, a waiter out of its queue."""
import os
import re

import flom
import pytest
from fakes import MANAGEMENT, PEER, FlomClient, FlomDaemon, b64, message, read_message
from test_safety import ME, STRANGER, another, needs_root, shared  # noqa: F401
from test_status import report
from world import FLOM, PYTHON, endpoint, free_port, wait_until


@pytest.fixture(params=["unix", "TCP"])
def place(box, request):
    """A box with a running daemon, on a socket or an address of this host."""
    if request.param == "TCP":
        box.address = ("-a", "127.0.0.1", "-p", str(free_port()), "--state-dir", box.folder)
    box.master = box.daemon()
    return box


def ids(box, role="holders"):
    """The ids of all holders, or waiters, as the report shows them."""
    return [entry["id"] for resource in report(box)["resources"] for entry in resource[role]]


def giver(box):
    """Whom the daemon names: a user and host of the system, or an address."""
    return "127.0.0.1" if "-a" in box.address else os.uname().nodename


def test_a_holder_loses_its_lock_for_good(place):
    """It says so, and does not reclaim; its command goes on; the next one is granted."""
    holder, gate = place.hold("a", "-r", "R1")
    waiter = place.waiter("-r", "R1", "--", *place.note("b"))
    ident, = ids(place)
    status, out, err = place.run("--evict", ident)
    assert (status, out) == (0, "") and re.fullmatch(
        rf"flom: {os.uname().nodename}:{holder.pid} 'sh' of \S+ held R1 for 00:00:\d\d\n", err)
    assert waiter.end().status == 0 and place.events() == ["a start", "b"]
    wait_until(lambda: holder.err)
    gate.open()
    status, out, err = holder.end()
    assert (status, out) == (95, "") and err.count("\n") == 1
    assert re.search(rf"R1 is lost: .*taken away by \S+@{giver(place)}", err)
    assert "taken away" in place.master.err and "Traceback" not in place.master.err


def test_a_program_is_told_and_does_not_get_the_lock_back(box):
    box.daemon()
    lock = flom.Lock("R1", config=False, socket_name=box.socket)
    with pytest.raises(flom.LockLost) as at_the_end, lock:
        assert box.run("--evict", ids(box)[0]).status == 0
        assert lock.lost
        with pytest.raises(flom.LockLost) as lost:
            lock.check()
        assert "taken away by" in str(lost.value) and ids(box) == []
    assert "taken away by" in str(at_the_end.value)
    assert lock.acquire() and not lock.lost
    lock.release()


@pytest.mark.parametrize("loss, status", [("ignore", 0), ("term", 95)])
def test_what_a_holder_does_is_said_by_on_lock_loss(box, loss, status):
    box.daemon()
    holder, gate = box.hold("a", "--on-lock-loss", loss)
    assert box.run("--evict", ids(box)[0]).status == 0
    if loss == "ignore":
        gate.open()
    assert holder.end().status == status


def test_the_first_digits_do_when_they_are_unique(place):
    holder, gate = place.hold("a")
    ident, = ids(place)
    shown = place.run("--status").out.splitlines()[-2].split()[3]
    assert shown == ident[:8]
    assert place.run("--evict", shown).status == 0
    gate.open()
    assert holder.end().status == 95


def test_a_waiter_ends_with_the_reason(place):
    holder, gate = place.hold("a")
    waiter = place.waiter("--", *place.note("b"))
    parked = place.waiter("-e", "no", "-r", "R9", "--", *place.note("c"))
    found = report(place)
    for one, entry, name in ((waiter, found["resources"][0]["waiters"][0], "_RESOURCE"),
                             (parked, found["parked"][0], "R9")):
        status, _, err = place.run("--evict", entry["id"])
        assert status == 0 and f"waited for {name}" in err
        status, _, err = one.end()
        assert status == 99
        assert f"@{giver(place)}\n" in err
        assert "taken away by" in err
    gate.open()
    assert holder.end() == (0, "", "") and place.events() == ["a start", "a end"]


def test_a_client_of_flom_is_closed(place):
    """It would take the message for a grant."""
    family, name = endpoint(place.address)
    with FlomClient(family, name) as holder, FlomClient(family, name) as waiter:
        assert holder.lock("R1") is True and waiter.ask("R1") == (16, 1, None)
        first, = ids(place)
        assert ids(place) == [first] and re.fullmatch("[0-9a-f]{16}", first)
        second, = ids(place, "waiters")
        assert place.run("--evict", second).status == 0 and waiter.wait() is None
        assert place.run("--evict", first).status == 0
        assert holder.socket.recv(99) == b"" and ids(place) == []


@pytest.mark.parametrize("wanted", ["0123456789abcdef", "", "xyz"])
def test_an_id_that_nobody_has(box, wanted):
    box.daemon()
    holder, gate = box.hold("a")
    status, out, err = box.run("--evict", wanted)
    assert (status, out, err.count("\n")) == (99, "", 1) and "--status" in err
    gate.open()
    assert holder.end() == (0, "", "")


def test_digits_that_several_ids_begin_with(box):
    box.daemon()
    holders = [box.hold(f"g{number}", "-r", f"R{number}") for number in range(17)]
    first = [ident[0] for ident in ids(box)]
    digit = next(digit for digit in first if first.count(digit) > 1)
    status, out, err = box.run("--evict", digit)
    assert (status, out, err.count("\n")) == (99, "", 1)
    assert f"the id of {first.count(digit)}" in err
    for holder, gate in holders:
        gate.open()
        assert holder.end() == (0, "", "")


def order(client, ident):
    """The daemon's answer to a bare order."""
    client.socket.sendall(message(
        MANAGEMENT, 8, f'<session peerid="{PEER}"/><evict id="{ident}"/>'))
    return read_message(client.socket)


def test_the_daemon_checks_the_id_again(box):
    """The holder may have ended since the report, and clients may lie about their ids."""
    box.daemon()
    name = endpoint(box.address)
    ours = f'<session peerid="{PEER}" client="flom.py/1" id="aa"/>'
    with FlomClient(*name) as first, FlomClient(*name) as second:
        for client, number in ((first, 1), (second, 2)):
            client.socket.sendall(message(
                1, 8, f'{ours}<resource name="UjE=" mode="{number}" wait="0" create="1"/>'))
            assert b'rc="0"' in read_message(client.socket)
        for ident in ("bb", "aa"):
            with FlomClient(*name) as client:
                assert b'rc="-1"' in order(client, ident)
                assert client.socket.recv(9) == b""
        assert len(ids(box)) == 2
    with FlomClient(*name) as client:
        client.socket.sendall(message(MANAGEMENT, 8, f'<session peerid="{PEER}"/><evict id=""/>'))
        assert client.socket.recv(99) == b""


def test_the_daemon_takes_first_digits_too(box):
    """Of one id alone; a whole id is meant before those that begin with it."""
    box.daemon()
    name = endpoint(box.address)
    holders = [FlomClient(*name) for _ in range(3)]
    for number, (client, ident) in enumerate(zip(holders, ("aa", "aab", "b" * 16))):
        client.socket.sendall(message(1, 8, (
            f'<session peerid="{PEER}" client="flom.py/1" id="{ident}"/>'
            f'<resource name="{b64(f"R{number}")}" mode="5" wait="0" create="1"/>')))
        assert b'rc="0"' in read_message(client.socket)
    for ident, rc, left in (("a", -1, 3), ("bc", -1, 3), ("bbb", 0, 2), ("aa", 0, 1),
                            ("a", 0, 0)):
        with FlomClient(*name) as client:
            assert f'rc="{rc}"'.encode() in order(client, ident)
        assert len(ids(box)) == left
    for client in holders:
        client.socket.close()


def test_a_whole_id_is_meant_before_those_that_begin_with_it():
    def entry(ident):
        return {"id": ident, "host": ident}
    report = {"resources": [{"name": "R1", "holders": [entry("aab"), entry("aa")],
                             "waiters": [entry("b1"), {}]}], "parked": []}
    assert flom.find_entry(report, "aa")[0]["host"] == "aa"
    assert flom.find_entry(report, "b")[0]["host"] == "b1"
    for ident in ("a", "c", ""):
        with pytest.raises(flom.UsageError):
            flom.find_entry(report, ident)


def test_a_daemon_of_flom_is_never_sent_the_order(box):
    with FlomDaemon(box.socket) as master:
        status, _, err = box.run("--evict", "aa")
        assert status == 99 and "cannot report" in err
        assert master.deaths == [] and not any(b"evict" in data for data in master.messages)


@needs_root
def test_a_user_takes_away_its_own_locks_alone(shared):  # noqa: F811
    """By the credentials that the system tells, whatever the client says."""
    daemon = shared.daemon()
    holder, gate = shared.hold("a")
    mine, = ids(shared)
    other = shared.start(*another(STRANGER), *PYTHON, FLOM, *shared.address, "-r", "R2", "--",
                         "sleep", "100")
    wait_until(lambda: len(ids(shared)) == 2)
    theirs = next(ident for ident in ids(shared) if ident != mine)

    def evict(user, ident):
        return shared.start(*another(user), *PYTHON, FLOM, *shared.address, "--evict",
                            ident).end()
    for user, ident in ((STRANGER, mine), (STRANGER + 1, theirs)):
        done = evict(user, ident)
        assert done.status == 99
        assert "refuses" in done.err
        assert done.err.count("\n") == 1
    assert "may not evict" in daemon.err and len(ids(shared)) == 2
    assert evict(STRANGER, theirs).status == 0 and ids(shared) == [mine]
    wait_until(lambda: other.err)
    shared.kill(other.pid)
    for pid, line in shared.running().items():
        if "sleep" in line:
            shared.kill(pid)
    gate.open()
    assert holder.end() == (0, "", "") and ME == 0


def test_another_host_may_not(hosts):
    one, two = hosts(2)
    daemon = one.flomd("-f", "--no-files", "-a", "0.0.0.0", *one.address)
    one.foreground.append(daemon)
    wait_until(lambda: "serving" in daemon.err)
    two.address = ("-a", one.ipv4)
    holder, gate = two.hold("a")
    ident, = ids(two)
    done = two.run("--evict", ident)
    assert done.status == 99 and "allow-remote-shutdown" in done.err
    one.address = two.address
    assert one.run("--evict", ident).status == 0
    gate.open()
    assert holder.end().status == 95
