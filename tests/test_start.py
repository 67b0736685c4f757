"""Fifty clients at the same moment and no daemon: exactly one starts, and it serves all of them."""
import os

import pytest
from world import COUNT, FLOM, FLOM_PY, PYTHON, SOAK, free_port, wait_until

# How many clients in each round.
LOCAL = [50] * COUNT.rounds if SOAK else [50, 8, 8]
REMOTE = [50] * COUNT.rounds if SOAK else [20, 8]
LOG = 'echo start "$0" >>"$1"; echo end "$0" >>"$1"'
WAIT = 'exec 3<"$0"; read _ <&3; exec 3<&-; exec "$@"'  # becomes the client when the fifo closes


def start_together(boxes, count, options):
    """Starts clients, round robin in these boxes, that are let go at one moment."""
    first = boxes[0]
    fifo, script = first.path("go"), FLOM if count > 8 else FLOM_PY  # as it is, and compiled
    os.mkfifo(fifo)
    clients = []
    for number in range(count):
        box = boxes[number % len(boxes)]
        client = [*PYTHON, script, *box.address, *options, "--",
                  "/bin/sh", "-c", LOG, str(number), first.log]
        clients.append(box.start("/bin/sh", "-c", WAIT, fifo, *client))
    with open(fifo, "w"):  # opens when the first of them reads, and lets none go
        wait_until(lambda: all(reads(client.pid, fifo) for client in clients), seconds=30)
    return clients


def reads(pid, fifo):
    return any(os.readlink(f"/proc/{pid}/fd/{name}") == fifo
               for name in os.listdir(f"/proc/{pid}/fd"))


def check(boxes, clients):
    """One daemon, all served, one at a time, and nobody has complained."""
    for client in clients:
        assert client.end(seconds=60) == (0, "", ""), client.args
    events = [line.split() for line in boxes[0].events()]
    assert [word for word, _ in events] == ["start", "end"] * len(clients)
    assert [one for _, one in events[::2]] == [one for _, one in events[1::2]]
    assert {one for _, one in events} == {str(number) for number in range(len(clients))}
    # one that came second may still be on its way out; an idle one would stay for 7 s
    wait_until(lambda: sum(len(box.daemons()) for box in boxes) == 1, seconds=4)


def test_a_start_is_not_cut_short_by_the_time_to_wait(box):
    """-o limits the wait for the lock; once it is over the lock is asked for without waiting."""
    assert box.run("-o", "1", "--", "echo", "x") == (0, "x\n", "")
    holder, gate = box.hold("a")
    assert box.run("-o", "1", "--", "true").status == 98
    gate.open()
    assert holder.end().status == 0


@pytest.mark.parametrize("count", LOCAL)
def test_at_one_socket(box, count):
    check([box], start_together([box], count, []))


@pytest.mark.parametrize("count", REMOTE)
def test_at_one_address(box, count):
    box.address = ("-a", "127.0.0.1", "-p", str(free_port()), "--state-dir", box.folder)
    check([box], start_together([box], count, []))


@pytest.mark.parametrize("count", REMOTE)
def test_in_a_group(hosts, count):
    pair = hosts(2)
    check(pair, start_together(pair, count, ["-A", "239.255.0.1"]))
