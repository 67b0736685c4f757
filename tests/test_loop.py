"""The daemon's loop: what has come is read before what is due is done; what a bug costs."""
import contextlib
import os
import signal
import socket

import flomd
import pytest
from clock import Clock
from fakes import LOCK, PEER, FlomClient, b64, message, parse
from world import can_connect, endpoint, pass_time, patched, read, wait_until


@contextlib.contextmanager
def stopped(daemon):
    """While in the block the process does not run."""
    daemon.send_signal(signal.SIGSTOP)
    wait_until(lambda: read(f"/proc/{daemon.pid}/stat").rpartition(")")[2].split()[0] == "T")
    yield
    daemon.send_signal(signal.SIGCONT)


def connect(box):
    return FlomClient(*endpoint(box.address))


def send_lock(client, ident, wait=0, more=""):
    client.socket.sendall(message(
        LOCK, 8, f'<session peerid="{PEER}" client="flom.py/1.0" id="{ident:016}" '
        f'key="{ident:016}"/><resource name="{b64("R")}" mode="5" wait="{wait}" create="1" '
        f'lifespan="0"{more}/>'))


def answer(client):
    """The attributes of the next answer."""
    return parse(client.receive())["answer"]


def test_a_reclaim_in_the_window_counts_though_the_daemon_was_stopped_over_its_end(box):
    first = box.daemon()
    with connect(box) as holder:
        send_lock(holder, 1)
        token = answer(holder)["token"]
        box.kill(first.pid)
    second = box.daemon("--recovery-window", "500")
    with connect(box) as other, connect(box) as holder:
        send_lock(other, 2, wait=1)
        assert answer(other)["rc"] == "1"
        with stopped(second), connect(box) as late:
            send_lock(holder, 1, more=f' reclaim="{token}"')
            send_lock(late, 3)
            pass_time(1)
        assert answer(holder) == {"rc": "0", "token": token}
        holder.name = "R"
        holder.release()
        assert answer(other)["rc"] == "0"


def test_a_reclaim_on_a_connection_that_is_not_accepted_yet(box):
    first = box.daemon()
    with connect(box) as holder:
        send_lock(holder, 1)
        token = answer(holder)["token"]
        box.kill(first.pid)
    second = box.daemon("--recovery-window", "500")
    with connect(box) as other:
        send_lock(other, 2, wait=1)
        assert answer(other)["rc"] == "1"
        with contextlib.ExitStack() as stack:
            with stopped(second):
                holder = stack.enter_context(connect(box))
                send_lock(holder, 1, more=f' reclaim="{token}"')
                pass_time(1)
            assert answer(holder) == {"rc": "0", "token": token}


ONE_BY_ONE = """
flomd.PATIENCE = 2
flomd.STALL = 0.3
flomd.TURN = 0
"""


def test_nobody_was_silent_while_the_daemon_was_stopped(box):
    """Not who has spoken meanwhile, however many have, and not who would have; who says nothing
    when the daemon runs is closed."""
    daemon = box.daemon(program=patched(ONE_BY_ONE))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(box)) for _ in range(30)]
        wait_until(lambda: can_connect(box.address))
        with stopped(daemon):
            for number, client in enumerate(clients[:-2]):
                send_lock(client, number)
            pass_time(4)  # so late that the rest is read, however slow the machine
        answers = sorted(answer(client)["rc"] for client in clients[:-2])
        assert answers == ["0"] + ["4"] * 27
        send_lock(clients[-2], 99)
        assert answer(clients[-2])["rc"] == "4"
        assert clients[-1].receive() == b""


# The Loop alone

class Lines:
    """A log: its lines."""

    def __init__(self):
        self.lines = []

    def bug(self, trace):
        self.lines.append(trace)


class Pairs:
    """A loop that watches one end of each pair of sockets; `called` tells which were handled."""

    def __init__(self):
        self.log, self.called = Lines(), []
        self.loop, self.pairs = flomd.Loop(self.log), []

    def add(self, act=lambda events: None, close=flomd.nothing):
        """Watches one more, whose handler notes its number and then calls act(events)."""
        number, pair = len(self.pairs), socket.socketpair()
        self.pairs.append(pair)

        def handle(events):
            self.called.append(number)
            act(events)
        self.loop.watch(pair[0], handle, close)
        return pair

    def call(self, number):
        self.pairs[number][1].send(b"x")

    def run(self, seconds=0):
        """Runs the loop until the end of the turn in which the date comes."""
        self.loop.after(seconds, self.loop.stop)
        self.loop.run()


@pytest.fixture
def pairs():
    made = Pairs()
    yield made
    for pair in made.pairs:
        for end in pair:
            end.close()


def test_events_that_had_to_wait_come_first(pairs, monkeypatch):
    """A turn takes what it has time for; nobody is passed over."""
    monkeypatch.setattr(flomd, "TURN", 0)
    for number in range(5):
        pairs.add(lambda events: len(pairs.called) < 20 or pairs.loop.stop())
        pairs.call(number)
    pairs.loop.run()
    rounds = [pairs.called[begin:begin + 5] for begin in range(0, 20, 5)]
    assert [sorted(one) for one in rounds] == [list(range(5))] * 4


def test_an_event_of_one_that_was_forgotten_is_not_handled(pairs):
    """Not even where another has its number by then."""
    def close_others(events):
        for number in {0, 1} - set(pairs.called):
            pairs.loop.forget(pairs.pairs[number][0])
            pairs.pairs[number][0].close()
            pairs.add()
    for number in (0, 1):
        pairs.add(close_others)
        pairs.call(number)
    pairs.run(0.05)
    assert set(pairs.called) in ({0}, {1})


def test_writing_is_told_where_it_is_wanted(pairs):
    found = []

    def handle(events):
        found.append(events)
        pairs.loop.watch_writing(pairs.pairs[0][0], False)
    pairs.add(handle)
    pairs.run(0.01)
    assert found == []
    pairs.loop = flomd.Loop(pairs.log)
    pairs.loop.watch(pairs.pairs[0][0], handle)
    pairs.loop.watch_writing(pairs.pairs[0][0], True)
    pairs.run(0.01)
    assert found == [flomd.EVENT_WRITE]


def test_an_act_has_one_date(pairs):
    loop, called = pairs.loop, []

    def first():
        called.append("first")

    def second():
        called.append("second")
        loop.cancel(third)  # due at the same time

    def third():
        called.append("third")
    now = loop.now.mono
    loop.at(now + 1000, first)
    loop.at(now + 0.01, first)  # moves it
    loop.at(now + 0.02, second)
    loop.within(0.001, second)  # does not
    loop.at(now + 0.02, third)
    pairs.run(0.05)
    assert called == ["first", "second"]


def test_a_stop_while_what_has_come_is_read(pairs, monkeypatch):
    """What came during it is read, too, before what was due is done; and nobody was silent."""
    clock, found = Clock(), []
    monkeypatch.setattr(flomd, "time", clock)
    loop = pairs.loop
    STOPPED, LAST = 1, 9

    def handle(events):
        number = pairs.called[-1]
        pairs.pairs[number][0].recv(1)
        if number == STOPPED:
            clock.passed += 100
        if number < LAST:
            pairs.call(number + 1)
    for _ in range(LAST + 1):
        pairs.add(handle)
    pairs.call(0)
    loop.after(0, lambda: found.append((list(pairs.called), loop.now.mono - loop.running_since)))
    pairs.run()
    (called, running), = found
    assert called == list(range(LAST + 1)) and running < 50


def test_dates_that_were_moved_do_not_pile_up(pairs):
    for number in range(10000):
        pairs.loop.after(100 + number, flomd.nothing)
    assert len(pairs.loop._heap) < 200


def broken(*arguments):
    raise RuntimeError("a bug")


def test_a_handler_that_fails_costs_its_own_connection(pairs):
    closed = []

    def close():
        closed.append(0)
        pairs.loop.forget(pairs.pairs[0][0])
    pairs.add(broken, close)
    pairs.add()
    pairs.call(0)
    pairs.call(1)
    pairs.loop.after(0, broken)
    pairs.run(0.05)
    assert closed == [0] and set(pairs.called) == {0, 1}
    assert len(pairs.log.lines) == 2 and all("a bug" in line for line in pairs.log.lines)


def test_what_cannot_be_closed_rests(pairs, monkeypatch):
    """Nor does the loop spin where close() fails, too; what is forgotten stays away."""
    monkeypatch.setattr(flomd, "PAUSE", 0.02)
    def fail(events):
        if pairs.called.count(0) == 2 and pairs.called.count(1) == 2:
            pairs.loop.stop()
        broken()

    def forget():
        assert sorted(pairs.called) == [0, 1, 2]
        pairs.loop.forget(pairs.pairs[2][0])
    for number, close in enumerate((flomd.nothing, broken, flomd.nothing)):
        pairs.add(fail, close)
        pairs.call(number)
    pairs.loop.after(0.01, forget)
    pairs.run(10)
    assert sorted(pairs.called) == [0, 0, 1, 1, 2]


def test_a_date_may_be_further_away_than_a_selector_can_wait(pairs):
    pairs.add(lambda events: pairs.loop.stop())
    pairs.loop.after(2 ** 31 / 1000 + 10, flomd.nothing)
    pairs.call(0)
    pairs.loop.run()
    assert pairs.called == [0]


def test_what_belongs_to_a_turn_is_done_at_its_end_once(pairs):
    """What it asks for in turn is done a turn later, without waiting; and a bug keeps none."""
    loop, called = pairs.loop, []

    def end():
        called.append("end")
        if called.count("end") < 3:
            loop.at_end_of_turn(end)
        else:
            loop.after(0, loop.stop)

    def due():
        called.append("due")
        loop.at_end_of_turn(broken)
        loop.at_end_of_turn(end)
        loop.at_end_of_turn(end)
    for _ in range(2):
        pairs.add(lambda events: called.append("read"))
        pairs.call(len(pairs.pairs) - 1)
    loop.after(0, due)
    loop.after(100, flomd.nothing)
    begun = flomd.Moment().mono
    pairs.run(20)
    ends = [place for place, name in enumerate(called) if name == "end"]
    assert len(ends) == 3 and called.index("due") < ends[0] and called.index("read") < ends[0]
    assert flomd.Moment().mono - begun < 10 and len(pairs.log.lines) == 1


def test_who_looks_first_sees_the_present_of_the_turn_before_its_events(pairs):
    loop, seen = pairs.loop, []
    pairs.add(lambda events: seen.append("event"))
    loop.look_first(lambda: seen.append(loop.now))
    before = loop.now
    pairs.call(0)
    loop._turn(0)
    assert seen == [loop.now, "event"] and loop.now is not before


def test_who_looks_first_can_forget_what_has_come(pairs):
    source, _ = pairs.add()
    pairs.loop.look_first(lambda: pairs.loop.forget(source))
    pairs.call(0)
    pairs.loop._turn(0)
    assert pairs.called == []


def test_a_bug_of_who_looks_first_ends_the_loop(pairs):
    def broken():
        raise ZeroDivisionError
    pairs.loop.look_first(broken)
    pairs.loop.after(0, lambda: None)
    with pytest.raises(ZeroDivisionError):
        pairs.loop.run()


def test_the_turn_in_which_the_loop_is_stopped_comes_to_its_end(pairs):
    called = []

    def stop():
        pairs.loop.at_end_of_turn(lambda: called.append("end"))
        pairs.loop.stop()
    pairs.loop.after(0, stop)
    pairs.loop.run()
    assert called == ["end"]


LEFT = """
import gc, os, signal

def tell(number, frame):
    kinds = (flomd.Connection, flomd.Session, flomd.Request)
    left = sum(isinstance(one, kinds) for one in gc.get_objects())
    with open(PATH + ".new", "w") as file:
        file.write(str(left))
    os.rename(PATH + ".new", PATH)

gc.disable()
signal.signal(signal.SIGUSR2, tell)
"""


def test_what_has_ended_leaves_no_circles(box):
    """Without them Python frees it at once, and never stops the daemon to search for them."""
    path = box.path("left")
    daemon = box.daemon(program=patched(f"PATH = {path!r}\n" + LEFT))
    for number in range(40):
        with connect(box) as holder, connect(box) as waiter, connect(box) as silent:
            send_lock(holder, number)
            assert answer(holder)["rc"] == "0"
            send_lock(waiter, number)
            assert answer(waiter)["rc"] in "04"
            assert silent.socket.fileno() > 0
    assert box.run("-d", "0", "--", "true").status == 0  # they have been seen to end
    daemon.send_signal(signal.SIGUSR2)
    wait_until(lambda: os.path.exists(path))
    assert int(read(path)) < 10
