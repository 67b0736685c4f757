"""Promises that are kept to many clients at once: nobody starves, nothing leaks, nothing comes
twice.  Real processes; where many grants are counted, connections of FLoM's client.
"""
import contextlib
import os
import select
import signal
import statistics
import threading
import time

import pytest
from fakes import FlomClient
from test_usecases import end
from world import COUNT, FLOM, PYTHON, endpoint, wait_until

NEVER = "Resource will never satisfy the request, the lock cannot be obtained\n"

# The many that never stop coming, and the one that does not fit beside them.
CROWDS = {"units": (("-r", "foo[2]"), ("-r", "foo[2]", "-q", "2")),
          "writer": (("-r", "R1", "-l", "PR"), ("-r", "R1", "-l", "EX"))}


@pytest.fixture(params=CROWDS.values(), ids=list(CROWDS))
def crowd(request):
    return request.param


def test_under_fair_the_big_one_is_next(box, crowd):
    """Who comes after it waits for it."""
    small, big = crowd
    holder, gate = box.hold("holder", *small, "--policy", "fair")
    waiter = box.waiter(*big, "--", *box.note("big"))
    assert box.run(*small, "-o", "0", "--", *box.note("small")).status == 98
    late = box.waiter(*small, "--", *box.note("small"))
    gate.open()
    end(holder)
    assert waiter.end().status == late.end().status == 0
    assert box.events() == ["holder start", "holder end", "big", "small"]


def test_under_first_fit_it_starves(box, crowd):
    """As long as one is there before the last one has gone, as with FLoM."""
    small, big = crowd
    holder, gate = box.hold("0", *small, "--policy", "first-fit")
    waiter = box.waiter(*big, "--", *box.note("big"))
    for n in range(1, 1 + COUNT.rounds):
        following, following_gate = box.hold(str(n), *small)
        gate.open()
        end(holder)
        holder, gate = following, following_gate
    assert "big" not in box.events()
    gate.open()
    end(holder)
    assert waiter.end().status == 0
    assert box.events()[-2:] == [f"{COUNT.rounds} end", "big"]


def test_under_fair_loops_that_end_only_when_it_has_been_served(box, crowd):
    small, big = crowd
    holder, gate = box.hold("holder", *small)
    going = box.write("going", "")
    loop = 'while [ -e "$0" ]; do "$@" || exit; done'
    command = PYTHON + [FLOM, *box.address, *small, "--", *box.note("small")]
    loops = [box.start("/bin/sh", "-c", loop, going, *command) for _ in range(3)]
    wait_until(lambda: box.events().count("small") >= 3)
    waiter = box.waiter(*big, "--", "rm", going)
    gate.open()
    assert waiter.end().status == 0
    end(holder, *loops)


def test_a_killed_holder_in_a_tree_leaks_nothing(box):
    sibling, gate = box.hold("sibling", "-r", "/k/1")
    victim, _ = box.hold("victim", "-r", "/k/2", start_new_session=True)
    waiter = box.waiter("-r", "/k/2", "--", *box.note("waiter"))
    os.killpg(victim.pid, signal.SIGKILL)
    assert victim.end().status == -signal.SIGKILL
    assert waiter.end().status == 0
    assert box.run("-r", "/k/2", "-o", "0", "--", "echo", "x") == (0, "x\n", "")
    assert box.run("-r", "/k", "-o", "0", "--", "true").status == 98
    gate.open()
    end(sibling)
    assert box.events() == ["sibling start", "victim start", "waiter", "sibling end"]


def test_a_pool_created_too_small(box):
    """Who waited for its creation is told, and its command is not run."""
    box.daemon()
    path = box.path("X")
    parked = box.waiter("-r", "foo[2]", "-e", "no", "-q", "5", "--", "touch", path)
    assert box.run("-r", "foo[2]", "--", "echo", "x") == (0, "x\n", "")
    status, _, err = parked.end()
    assert status == 99
    assert err.endswith(NEVER)
    assert not os.path.exists(path)


def test_a_set_whose_first_slot_is_held(box):
    holder, gate = box.hold("red", "-r", "red.green.blue")
    given = [box.run("-r", "red.green.blue", "--", "echo").out.strip() for _ in range(6)]
    assert given == "green blue green green blue green".split()
    gate.open()
    end(holder)
    assert box.events() == ["red start red", "red end"]


# Sequences

def test_returned_values_come_back_in_their_order(box):
    gates = {n: box.gate(str(n)) for n in (1, 2, 3, 4)}
    fails = ["--", "/bin/sh", "-c", '"$@"; exit 3', "sh"]
    runs = {}
    for n, gate in gates.items():
        runs[n] = box.flom("-r", "_S_v[4]", *fails, *gate.command)
        gate.wait()
    assert box.events() == [f"{n} start {n}" for n in gates]
    for n in (3, 4, 2):
        gates[n].open()
        assert runs[n].end() == (3, "", "")
    assert [box.run("-r", "_S_v[4]", "--", "echo").out for _ in range(4)] == [
        "3\n", "4\n", "2\n", "5\n"]
    gates[1].open()
    assert runs[1].end().status == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_command_killed_by_a_signal_gives_its_value_back(box, number):
    command = ["--", "/bin/sh", "-c", f"kill -{int(number)} $$"]
    status = box.run("-r", "_S_v[1]", *command).status
    assert status == (-number if number == signal.SIGINT else 128 + number)
    assert [box.run("-r", "_S_v[1]", "--", "echo").out for _ in range(2)] == ["1\n", "2\n"]


# Timestamps

def delay(client):
    """How many seconds after the start of its interval a waiter was granted."""
    rc, element = client.wait()
    now = time.time()
    assert rc == 0
    return (now - float(element)) % 60


def test_waiters_are_granted_at_the_start_of_their_interval(box):
    box.daemon()
    names, found = ["_t_%S[20]"] * 3 + ["_t_%S#f[20]"] * 13, []
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(FlomClient(*endpoint(box.address))) for _ in names]
        waiting = {client.socket: client for client, name in zip(clients, names)
                   if client.ask(name)[1] == 1}
        assert len(waiting) > 10  # not the first ones, nor one that came as an interval began
        while waiting:
            ready = select.select(list(waiting), [], [], 10)[0]
            assert ready, "not granted within 10 s"
            found += [delay(waiting.pop(connection)) for connection in ready]
    assert statistics.median(found) <= 0.02 and max(found) <= 0.25, found


def test_no_text_twice(box):
    """A text without the second may come again a second later, and no earlier."""
    box.daemon()
    grants, each = [], 10 * COUNT.rounds

    def work():
        for _ in range(each):
            with FlomClient(*endpoint(box.address)) as client:
                asked = time.monotonic()
                grants.append((client.lock("_t_a#ffffff[10]"), asked, time.monotonic()))
                client.release()

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(grants) == 10 * each
    seen = {}
    for text, asked, granted in sorted(grants, key=lambda grant: grant[1]):
        assert granted - seen.get(text, granted - 1) > 0.99, text
        seen[text] = asked


# Fencing tokens

def test_tokens_increase_also_across_kills_of_the_daemon(box):
    soon, tokens = ("--recovery-window", "300"), []
    for n in range(COUNT.heals):
        for name in ("A", "foo[2]"):
            done = box.run(*soon, "-r", name, "--", "/bin/sh", "-c", 'echo "$FLOM_TOKEN"')
            tokens.append(int(done.out))
        holder, gate = box.hold(f"holder{n}", *soon, "-r", "B")
        box.kill(box.the_daemon())
        gate.open()
        assert holder.end().status in (0, 95)
    assert tokens == sorted(set(tokens))
    assert 0 < tokens[0]
    assert tokens[-1] < 2 ** 63
