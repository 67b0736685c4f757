"""Clients and daemons killed with SIGKILL at any moment: the others go on."""
import os
import signal
import socket

import pytest
from fakes import UNLOCK, FlomClient, b64, message
from world import COUNT, chance, endpoint, free_port, pass_time, wait_until


def ends_in_turn(box, *clients):
    for client in clients:
        assert client.end().status == 0, client.err


def test_a_waiter_killed_leaves_the_queue(box):
    holder, gate = box.hold("a")
    first, second = [box.waiter("--", *box.note(name)) for name in ("b", "c")]
    box.kill(first.pid)
    gate.open()
    ends_in_turn(box, holder, second)
    assert box.events() == ["a start", "a end", "c"]


@pytest.mark.parametrize("sent", [b"", b'<?xml version="1.0" encoding="UTF-8" ?><msg level="3" ve'])
def test_a_client_that_vanishes_between_connect_and_lock(box, sent):
    box.daemon()
    for _ in range(20):
        with FlomClient(*endpoint(box.address)) as client:
            client.socket.sendall(sent)
    assert box.run("-o", "0", "--", "echo", "x") == (0, "x\n", "")


def test_a_client_killed_before_its_answer(box):
    """The daemon is stopped, so the request waits in its socket when the client dies."""
    box.daemon()
    assert box.run("--", "true").status == 0
    pid = box.the_daemon()
    os.kill(pid, signal.SIGSTOP)
    killed = [box.flom("--", "echo", "wrong") for _ in range(3)]
    wait_until(lambda: all(connected(client.pid) for client in killed))
    for client in killed:
        box.kill(client.pid)
    last = box.flom("--", "echo", "x")
    os.kill(pid, signal.SIGCONT)
    assert last.end() == (0, "x\n", "")
    assert [client.end().out for client in killed] == [""] * 3


def connected(pid):
    """Does that process have a connected UNIX socket?"""
    with open(f"/proc/{pid}/net/unix") as file:
        inodes = {line.split()[6] for line in file.readlines()[1:] if line.split()[5] == "03"}
    try:
        links = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    except FileNotFoundError:
        return False
    return any(link[:8] == "socket:[" and link[8:-1] in inodes for link in links)


def test_a_client_killed_while_saying_goodbye(box):
    """Unlock has been sent, its EOF has not been read; and with the unlock cut in two."""
    box.daemon()
    unlock = message(UNLOCK, 8, f'<resource name="{b64("R1")}" rollback="0" />')
    for end in list(range(0, len(unlock), 7)) + [len(unlock)]:
        with FlomClient(*endpoint(box.address)) as client:
            assert client.lock("R1") is True
            client.socket.sendall(unlock[:end])
    with FlomClient(*endpoint(box.address)) as client:
        assert client.lock("R1") is True


def test_a_client_reset_over_tcp(box):
    """A connection that is reset, not closed, frees its lock too."""
    box.address = ("-a", "127.0.0.1", "-p", str(free_port()))
    box.daemon("--state-dir", box.folder)
    with FlomClient(*endpoint(box.address)) as holder, FlomClient(*endpoint(box.address)) as waiter:
        holder.lock("R1")
        assert waiter.ask("R1") == (16, 1, None)
        holder.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        holder.socket.close()
        assert waiter.wait() == (0, None)


def test_clients_killed_at_any_moment(box):
    """Killed in their first tenths of a second; those that are not killed run one at a time."""
    draw = chance("kills")
    log = 'echo start "$0" >>"$1"; echo end "$0" >>"$1"'
    box.daemon()
    for number in range(COUNT.kills):
        others = [box.flom("--inherit-connection", "no", "--", "/bin/sh", "-c", log,
                           f"{number}.{n}", box.log) for n in range(2)]
        victim = box.flom("--inherit-connection", "no", "-r", "victim", "--", "true")
        rival = box.flom("-r", "victim", "--", "true")
        pass_time(draw.random() * 0.12)
        victim.kill()
        victim.wait(timeout=10)
        ends_in_turn(box, rival, *others)
    assert [line.split()[0] for line in box.events()] == ["start", "end"] * 2 * COUNT.kills
    wait_until(lambda: len(box.running()) == 1)


def test_flom_killed_keeps_its_lock_until_its_command_ends(box):
    """The command has inherited the connection."""
    holder, gate = box.hold("a")
    box.kill(holder.pid)
    assert box.run("-o", "0", "--", "true").status == 98
    waiter = box.waiter("--", *box.note("b"))
    gate.open()
    ends_in_turn(box, waiter)
    assert box.events() == ["a start", "a end", "b"]


def test_flom_killed_frees_its_lock_where_the_command_does_not_inherit(box):
    holder, gate = box.hold("a", "--inherit-connection", "no")
    box.kill(holder.pid)
    assert box.run("-o", "5000", "--", "true").status == 0
    gate.open()


def test_a_daemon_killed_is_started_again_by_the_next_client(box):
    soon = ("--recovery-window", "300")
    for _ in range(COUNT.rounds):
        assert box.run(*soon, "--", "echo", "x").out == "x\n"
        box.kill(box.the_daemon())
    assert box.run(*soon, "-o", "10000", "--", "echo", "x") == (0, "x\n", "")
    assert len(box.daemons()) == 1
