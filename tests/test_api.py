"""The Python API, flom.Lock, as a program uses it: real daemons, the locks in this process."""
import copy
import datetime
import errno
import functools
import inspect
import logging
import os
import pickle
import pydoc
import re
import signal
import socket
import sys
import textwrap
import threading
import time
import warnings

import flom
import pytest
from world import PYTHON, ROOT, Gate, free_port, read, wait_until


@pytest.fixture
def lock(box, monkeypatch):
    """lock(name, …): a Lock of the box's socket, without configuration files; it waits 20 s."""
    monkeypatch.setenv("HOME", box.folder)
    for name in [name for name in os.environ if name.startswith("FLOM")]:
        monkeypatch.delenv(name)

    def make(name="R1", **options):
        return flom.Lock(name, **dict({"socket_name": box.socket, "config": False}, **options))

    yield make


@pytest.fixture
def daemon(box, lock):
    return box.daemon()


def is_free(lock, name="R1"):
    try:
        lock(name, timeout=0).acquire().release()
    except flom.Busy:
        return False
    return True


# Acquire and release

def test_a_block(daemon, lock):
    with lock(timeout=5) as held:
        assert isinstance(held, flom.Lock) and held.name == "R1"
        assert held.element is None
        assert held.token > 2 ** 32
        assert not held.lost
        assert held.check() is None
        assert not is_free(lock)
    assert not held.lost and is_free(lock)


def test_by_hand(daemon, lock):
    mine = lock()
    assert mine.acquire() is mine
    first = mine.token
    with pytest.raises(RuntimeError, match="R1 is held already"):
        mine.acquire()
    assert not is_free(lock)
    mine.release()
    mine.release()  # of nothing
    assert is_free(lock)
    assert mine.acquire().token > first  # it can be used again
    mine.release()


def test_whether_it_is_held_here(daemon, lock, box):
    mine, other = lock(), lock(timeout=0)
    assert mine.locked() is False
    with mine:
        assert mine.locked() is True and other.locked() is False
        assert in_child(lambda: 1 / (not mine.locked())) == 0
    assert mine.locked() is False
    with mine:
        box.kill(daemon.pid)
        wait_until(lambda: not mine.locked())
        box.daemon("--recovery-window", "300")


def test_a_block_with_a_timeout_of_its_own(daemon, lock):
    mine = lock()
    with lock() as holder:
        for block in (mine.timeout(0.02), mine(timeout=0.02)):
            with pytest.raises(flom.Timeout, match=r"\(20 milliseconds\)"):
                with block:
                    pass
        with pytest.raises(flom.Busy):
            with mine.timeout(0):
                pass
        assert holder.locked()
    with mine.timeout(5) as held:
        assert held is mine and mine.locked()
    other = mine(timeout=5)
    with other as held:
        assert held is other and type(other) is flom.Lock and not mine.locked()
        assert other.settings["Timeout"] == 5000 and mine.settings["Timeout"] == -1
    with pytest.raises(ZeroDivisionError):
        with lock("_S_a[1]").timeout(5):
            raise ZeroDivisionError
    with lock("_S_a[1]") as number:
        assert number.element == "1"
    with pytest.raises(flom.UsageError):
        mine(timeout="soon")


def test_a_reentrant_lock(daemon, lock):
    mine = lock(reentrant=True)
    with mine:
        with mine as again:
            assert again is mine and mine.acquire() is mine
            mine.release()
            assert mine.locked() and not is_free(lock)
        assert mine.locked() and not is_free(lock)
    assert not mine.locked() and is_free(lock)
    mine.release()
    with mine:
        assert not is_free(lock)
    with lock() as once:
        with pytest.raises(RuntimeError, match="R1 is held already"):
            once.acquire()


def test_the_last_release_of_a_reentrant_lock_decides(daemon, lock):
    for outer, value in ((False, "1"), (True, "2"), (False, "2")):
        mine = lock("_S_a[1]", reentrant=True).acquire()
        assert mine.acquire().element == value
        mine.release(rollback=not outer)
        mine.release(rollback=outer)


def test_a_reentrant_lock_is_that_of_a_thread(daemon, lock):
    caught = []

    def work():
        try:
            mine.acquire()
        except RuntimeError as error:
            caught.append(str(error))

    with lock(reentrant=True) as mine:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(10)
    assert caught == ["R1 is held already"]


def test_a_reentrant_lock_that_was_lost(daemon, lock, box):
    with pytest.raises(flom.LockLost):
        with lock(reentrant=True) as mine:
            lose(box, mine)
            with lock():
                mine.acquire()
    assert not mine.locked()


def test_reentrant_functions(daemon, lock):
    mine = lock(reentrant=True)

    @mine
    def count(number):
        assert not is_free(lock)
        if number:
            return 1 + count(number - 1)
        return 0

    assert count(3) == 3 and is_free(lock)
    with mine:
        assert count(2) == 2 and mine.locked()
    assert is_free(lock)


def test_reentrant_functions_with_a_timeout_each(daemon, lock):
    """They share what their thread holds, not how long one of them may wait."""
    mine = lock(reentrant=True, timeout=0)

    @mine(timeout=20)
    def patient():
        return hasty()

    @mine
    def hasty():
        return is_free(lock)

    assert patient() is False
    with lock():
        with pytest.raises(flom.Busy):
            hasty()


def test_the_report(daemon, lock, box):
    settings = {"socket_name": box.socket, "config": False}
    assert flom.status(**settings)["resources"] == []
    with lock(), lock("a[2]", quantity=2):
        report = flom.status(**settings)
        assert report["daemon"]["memory"] == "file" and report["parked"] == []
        assert {entry["name"] for entry in report["resources"]} == {"R1", "a[2]"}
        (resource,) = flom.status(resource_name="a[2]", **settings)["resources"]
        assert resource["holders"][0]["pid"] == os.getpid()
        assert resource["holders"][0]["quantity"] == 2 and resource["waiters"] == []
    box.kill(daemon.pid)
    with pytest.raises(flom.DaemonUnavailable):
        flom.status(**settings)
    with pytest.raises(TypeError, match="colour"):
        flom.status(colour="red")


def test_what_is_logged(daemon, lock, box, caplog):
    caplog.set_level("DEBUG", "flom")

    def stop_waiting(record):
        if "place 1, held by" in record.getMessage():
            holder.release()
        return True

    with lock():
        pass
    assert [(record.levelname, record.getMessage()[:12]) for record in caplog.records] == [
        ("DEBUG", "R1 is held, "), ("DEBUG", "R1 is releas")]
    holder = lock().acquire()
    logger = logging.getLogger("flom")
    logger.addFilter(stop_waiting)
    try:
        with lock() as held:
            caplog.clear()
            box.kill(daemon.pid)
            wait_until(lambda: held.lost)
            box.daemon("--recovery-window", "300")
            held.check()
    finally:
        logger.removeFilter(stop_waiting)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told[0].startswith("the lock on R1 is lost: ")
    assert told[1:] == ["the lock on R1 is held again"]


def test_modes_and_quantities(daemon, lock):
    with lock(mode="PR"), lock(mode="pr"), lock(mode="ConcurrentRead"):
        with pytest.raises(flom.Busy):
            lock(mode="PW", timeout=0).acquire()
    with lock("a[3]", quantity=2), lock("a[3]"):
        with pytest.raises(flom.Busy):
            lock("a[3]", timeout=0).acquire()


def test_elements(daemon, lock):
    with lock("red.green") as red, lock("red.green") as green:
        assert (red.element, green.element) == ("red", "green")
    for value in ("1", "2"):
        with lock("_s_a[1]") as number:
            assert number.element == value


def test_an_exception_and_a_rollback_give_the_number_back(daemon, lock):
    with pytest.raises(ZeroDivisionError):
        with lock("_S_a[1]") as number:
            raise ZeroDivisionError
    assert number.element == "1"
    again = lock("_S_a[1]").acquire()
    assert again.element == "1"
    again.rollback()
    with lock("_S_a[1]") as number:
        assert number.element == "1"
    with lock("_S_a[1]") as number:
        assert number.element == "2"


def test_tokens_grow(daemon, lock):
    tokens = []
    for name in ("R1", "R2", "R1", "a[2]"):
        with lock(name) as held:
            tokens.append(held.token)
    assert tokens == sorted(set(tokens))


def test_a_command_and_a_program_wait_for_each_other(box, lock):
    holder, gate = box.hold("command", "-r", "R1")
    got = []
    thread = threading.Thread(target=lambda: got.append(lock().acquire()))
    thread.start()
    wait_until(lambda: "waits 1" in box.run("--status").out)
    assert got == []
    gate.open()
    assert holder.end().status == 0
    thread.join(10)
    waiter = box.waiter("-r", "R1", "--", *box.note("ran"))
    assert box.events() == ["command start", "command end"]
    got[0].release()
    assert waiter.end().status == 0


# Errors

def test_busy_and_timeout(daemon, lock):
    with lock():
        with pytest.raises(flom.Busy, match="^Resource already locked"):
            lock(timeout=0).acquire()
        with pytest.raises(flom.Timeout, match=r"timeout \(50 milliseconds\) expired$"):
            lock(timeout=0.05).acquire()


def test_with_verbose_the_errors_name_the_holder(daemon, lock, capsys):
    with lock():
        for timeout, error in ((0, flom.Busy), (0.05, flom.Timeout)):
            with pytest.raises(error, match=f"held by .*:{os.getpid()} ") as caught:
                lock(timeout=timeout, verbose=True).acquire()
            assert f":{os.getpid()} " in caught.value.reason
    assert f"waiting for R1, place 1, held by {os.uname().nodename}:" in capsys.readouterr().err


def test_cannot_wait_and_impossible(daemon, lock):
    with pytest.raises(flom.CannotWait):
        lock(resource_create=False, timeout=0).acquire()
    with pytest.raises(flom.Impossible):
        lock("a[2]", quantity=3).acquire()


def test_deadlock(daemon, lock, monkeypatch):
    """As a program that a command under the lock has started."""
    with lock() as outer:
        monkeypatch.setenv("FLOM_SESSION", ",".join(outer._claim.chain))
        with pytest.raises(flom.Deadlock) as caught:
            lock().acquire()
        assert "R1 is held by" in caught.value.reason
        with pytest.raises(flom.Timeout):
            lock(timeout=0.05).acquire()


def test_the_lock_of_a_command_above_is_used_again(daemon, lock, monkeypatch):
    with lock() as outer:
        monkeypatch.setenv("FLOM_SESSION", ",".join(outer._claim.chain))
        with lock(deadlock="reuse", mode="PR", timeout=5) as inner:
            assert inner.token == outer.token and not inner.lost
            assert inner.check() is None
        assert not inner.lost and not is_free(lock)
    assert is_free(lock)


def test_what_is_ignored_in_a_file_is_in_the_trace(box, lock):
    trace = box.path("trace")
    box.write(".flom", f"[Trace]\nCommandTraceFile={trace}\n[Resource]\nNmae=x\n")
    lock(config=True)
    assert "Nmae" in read(trace) and "unknown key, ignored" in read(trace)


def test_no_daemon(box, lock):
    with pytest.raises(flom.DaemonUnavailable, match=r"^no daemon at .*start_daemon=True"):
        lock().acquire()
    assert box.daemons() == [] and not os.path.exists(box.socket)


def test_the_family_of_errors():
    family = {flom.Busy: 98, flom.Timeout: 98, flom.CannotWait: 96, flom.Impossible: 99,
              flom.Deadlock: 94, flom.LockLost: 95, flom.DaemonUnavailable: 99}
    assert set(flom.LockError.__subclasses__()) == set(family)
    for error, status in family.items():
        assert error.status == status
        assert error.reason is None
        assert error.__doc__
    assert not issubclass(flom.UsageError, flom.LockError)
    assert issubclass(flom.Timeout, TimeoutError) and not issubclass(flom.Busy, TimeoutError)


WRONG = [({"mode": "XX"}, "^mode=: 'XX'"), ({"quantity": -1}, "^quantity=: '-1'"),
         ({"name": "a b"}, "^name=: 'a b'"), ({"name": ""}, "^name=: ''"),
         ({"lock_mode": "XX"}, "lock_mode=: 'XX'"), ({"resource_timeout": 0.5}, "'0.5'"),
         ({"unicast_address": ["a", "b"]}, "unicast_address=: .* is not one value"),
         ({"unicast_port": "x"}, "unicast_port=: 'x'"),
         ({"socket_name": "/a", "unicast_address": "b"}, "socket_name=.*unicast_address="),
         ({"tls_certificate": "/a"}, "tls_certificate=")]


@pytest.mark.parametrize("options, text", WRONG, ids=[text for _, text in WRONG])
def test_wrong_settings(options, text):
    with pytest.raises(flom.UsageError, match=text):
        flom.Lock(config=False, **options)


def test_a_keyword_that_there_is_not():
    with pytest.raises(TypeError, match="colour"):
        flom.Lock("R1", config=False, colour="red")


@pytest.mark.parametrize("short, long, value", [
    ("name", "resource_name", "a"), ("mode", "lock_mode", "PR"),
    ("quantity", "resource_quantity", 2), ("timeout", "resource_timeout", 5)])
def test_two_keywords_for_one_setting(short, long, value):
    with pytest.raises(TypeError, match=f"both {short} and {long}"):
        flom.Lock(config=False, **{short: value, long: value})
    flom.Lock(config=False, **{short: None, long: value})  # None is as good as not given


# Interrupts

class Stop(Exception):
    """What a signal handler raises."""


@pytest.fixture
def stopping():
    """stopping(): the main thread gets a Stop, as ^C gives a KeyboardInterrupt."""
    def handler(number, frame):
        raise Stop
    before = signal.signal(signal.SIGUSR1, handler)
    yield lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def test_an_exception_ends_the_request(daemon, lock, box, stopping):
    """Although its traceback, and what it refers to, is kept."""
    holder = lock().acquire()

    def stop():
        wait_until(lambda: "waits 1" in box.run("--status").out)
        stopping()

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Stop) as caught:
        lock().acquire()
    thread.join()
    assert "waits" not in box.run("--status").out
    holder.release()
    assert is_free(lock) and caught.traceback


def test_an_exception_after_the_grant_gives_the_lock_back(daemon, lock, monkeypatch):
    def finish(steps, *rest):
        result = real(steps, *rest)
        if not granted:
            granted.append(result)
            raise Stop(result)
        return result

    real, made, granted = flom.finish, lock(), []
    monkeypatch.setattr(flom, "finish", finish)
    with pytest.raises(Stop) as caught:
        made.acquire()
    monkeypatch.undo()
    assert caught.value.args and is_free(lock)
    with pytest.raises(flom.LockError):
        made.check()


def test_finish_closes_its_steps(stopping):
    """Whatever ends it: the time, an exception out of the steps or out of a signal handler."""
    def stop():
        stopping()
        yield None, 0, 10

    def steps(inner):
        try:
            yield from inner
        finally:
            closed.append(inner)

    closed, kept = [], []
    waiting, raising, signalled = iter([(None, 0, 10)]), (1 / 0 for _ in "a"), stop()
    assert flom.finish(steps(waiting), flom.clock() + 0.01) is None
    for inner, error in ((raising, ZeroDivisionError), (signalled, Stop)):
        with pytest.raises(error) as caught:
            flom.finish(steps(inner))
        kept.append(caught)
    assert closed == [waiting, raising, signalled]


@pytest.mark.parametrize("has_come", [False, True])
def test_who_looks_late_reads_what_has_come(has_come):
    """A lock that was granted in time is not given back because this process was held up."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        def steps():
            yield flom.input_of(ours, flom.clock() + 10)
            return ours.recv(1)
        limited = flom.limiting(steps(), flom.clock() + 0.01)
        next(limited)
        if has_come:
            theirs.send(b"x")
        wait_until(lambda: flom.clock() > limited.gi_frame.f_locals["until"])
        with pytest.raises(StopIteration) as end:
            next(limited)
        assert end.value.value == (b"x" if has_come else None)


# Loss

def test_a_lock_is_reclaimed_from_the_next_daemon(box, lock):
    first = box.daemon()
    with lock() as held:
        token = held.token
        assert not held.lost
        box.kill(first.pid)
        wait_until(lambda: held.lost)
        box.daemon("--recovery-window", "300")
        held.check()
        assert not held.lost and held.token == token
        assert not is_free(lock)
    assert is_free(lock)


def test_a_lock_is_lost_when_somebody_else_has_it(box, lock):
    first = box.daemon()
    held = lock().acquire()
    box.kill(first.pid)
    wait_until(lambda: held.lost)
    box.forget()
    box.daemon("--recovery-window", "0")
    with lock() as other:
        with pytest.raises(flom.LockLost, match="the lock on R1 is lost: "):
            held.check()
        assert held.lost
        held.release()  # of what is lost: no error, and not the other's
        assert not held.lost and not is_free(lock)
        assert other.check() is None
    assert held.acquire().token > other.token
    held.release()


def test_check_gives_up_when_there_is_no_daemon(box, lock, monkeypatch):
    monkeypatch.setattr(flom, "RECOVERY_WINDOW", 200)  # ms
    first = box.daemon()
    held = lock().acquire()
    box.kill(first.pid)
    with pytest.raises(flom.LockLost):
        while True:  # the kernel may tell a moment later
            held.check()
    held.release()


def test_a_name_server_that_is_silent_while_a_lock_is_lost(box, lock, monkeypatch):
    """Nothing takes longer for it: neither a check, nor a look beside the thread, nor a release."""
    port, silent = free_port(), threading.Event()
    first = box.daemon(address=("-a", "127.0.0.1", "-p", str(port), "--state-dir", box.folder))

    def getaddrinfo(host, port, flags=0, **options):
        if not flags & socket.AI_NUMERICHOST:
            if asked:
                silent.wait(60)
            asked.append(host)
        return real("127.0.0.1", port, flags=flags, **options)

    asked, real = [], socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(flom, "RECOVERY_WINDOW", 200)  # ms
    mine = lock(socket_name=None, unicast_address="db1", unicast_port=port).acquire()
    assert asked == ["db1"]
    box.kill(first.pid)
    began = time.monotonic()
    try:
        with pytest.raises(flom.LockLost):
            mine.check()
        assert not mine.locked()
        mine.release()
    finally:
        silent.set()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("error", [Stop, TimeoutError])
def test_what_a_signal_handler_raises_is_no_obstacle(box, lock, monkeypatch, error):
    """While a step of the reclaim runs; what the system fails to do is tried again."""
    def handler(number, frame):
        raise error

    def locating(*some):
        failures.append(1)
        if len(failures) < 3:
            raise OSError(24, "Too many open files")
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        return (yield from real(*some))

    before, real, failures = signal.signal(signal.SIGUSR1, handler), flom.locating, []
    daemon = box.daemon()
    held = lock().acquire()
    try:
        box.kill(daemon.pid)
        wait_until(lambda: held.lost)
        monkeypatch.setattr(flom, "locating", locating)
        with pytest.raises(error):
            held.check()
        assert held.lost and len(failures) == 3
        monkeypatch.undo()
        monkeypatch.setattr(flom, "HURRY", 0)
        held.release()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_check_without_a_lock(daemon, lock):
    """Before it was acquired, after its release, after a refusal."""
    mine = lock(timeout=0)
    for step in (lambda: None, lambda: mine.acquire().release()):
        step()
        with pytest.raises(flom.LockError, match="^R1 is not held by this process$") as caught:
            mine.check()
        assert not isinstance(caught.value, flom.LockLost) and not mine.lost
    with lock():
        with pytest.raises(flom.Busy):
            mine.acquire()
        with pytest.raises(flom.LockError, match="not held"):
            mine.check()


def test_a_lost_lock_can_be_acquired_anew(box, lock):
    first = box.daemon()
    held = lock(timeout=0).acquire()
    token = held.token
    box.kill(first.pid)
    wait_until(lambda: held.lost)
    with pytest.raises(flom.DaemonUnavailable):
        held.acquire()
    assert not held.lost
    box.daemon("--recovery-window", "0")
    assert held.acquire().token >= token
    assert held.check() is None
    assert not is_free(lock)
    held.release()
    assert is_free(lock)


def test_a_waiter_asks_the_next_daemon(box, lock):
    """It waits on while a daemon is missing."""
    first = box.daemon()
    held = lock().acquire()
    got = []
    thread = threading.Thread(target=lambda: got.append(lock().acquire()))
    thread.start()
    wait_until(lambda: "waits 1" in box.run("--status").out)
    box.kill(first.pid)
    wait_until(lambda: held.lost)
    box.daemon("--recovery-window", "300")
    held.check()
    assert got == []
    held.release()
    thread.join(10)
    got[0].release()


def lose(box, held):
    """Kills the daemon and lets another one, which knows nothing, grant to anybody."""
    box.kill(box.the_daemon())
    wait_until(lambda: held.lost)
    box.forget()
    return box.daemon("--recovery-window", "0")


def test_a_block_whose_lock_was_lost(daemon, lock, box):
    with pytest.raises(flom.LockLost, match="the lock on R1 is lost"):
        with lock() as held:
            lose(box, held)
            other = lock().acquire()
    assert not held.lost and other.check() is None
    other.release()


def test_a_block_without_a_daemon_at_its_end(daemon, lock, box, monkeypatch):
    monkeypatch.setattr(flom, "RECOVERY_WINDOW", 100)  # ms
    with pytest.raises(flom.LockLost):
        with lock() as held:
            box.kill(daemon.pid)
            wait_until(lambda: held.lost)


def test_a_block_that_is_no_loss(daemon, lock, box):
    """It is had back at its end; or an error is told; or the loss has been dealt with in it."""
    with lock() as held:
        box.kill(daemon.pid)
        wait_until(lambda: held.lost)
        box.daemon("--recovery-window", "300")
    assert is_free(lock)
    with pytest.raises(ZeroDivisionError):
        with lock() as held:
            lose(box, held)
            other = lock().acquire()
            raise ZeroDivisionError
    other.release()
    with lock() as held:
        lose(box, held)
        with lock():
            with pytest.raises(flom.LockLost):
                held.check()
        held.release()


class Heard:
    """An on_lost that notes whom it was told of, and in which thread."""

    def __init__(self):
        self.told = []

    def __call__(self, lost):
        self.told.append((lost, threading.current_thread()))


def test_a_loss_is_told_when_somebody_else_has_the_lock(daemon, lock, box, monkeypatch):
    """Once, by a thread."""
    heard = Heard()
    held = lock(on_lost=heard).acquire()
    gate = threading.Event()
    real = flom.Claim.reclaiming

    def reclaiming(claim):
        gate.wait(10)
        return real(claim)

    monkeypatch.setattr(flom.Claim, "reclaiming", reclaiming)
    box.kill(daemon.pid)
    box.forget()
    box.daemon("--recovery-window", "0")
    other = lock().acquire()
    gate.set()
    wait_until(lambda: heard.told)
    (told, thread), = heard.told
    assert told is held and thread is not threading.main_thread()
    with pytest.raises(flom.LockLost):
        held.check()
    held.release()
    other.release()
    thread.join(10)
    assert len(heard.told) == 1


def test_a_loss_without_a_daemon_is_told(daemon, lock, box, monkeypatch):
    """And the function may release the lock."""
    monkeypatch.setattr(flom, "RECOVERY_WINDOW", 100)  # ms
    told = []
    held = lock(on_lost=lambda lost: told.append(lost.release())).acquire()
    box.kill(daemon.pid)
    wait_until(lambda: told)
    assert not held.lost and not held.locked()


def test_an_eviction_is_told(daemon, lock, box):
    heard = Heard()
    held = lock(on_lost=heard).acquire()
    assert box.run("--evict", held._claim.chain[0]).status == 0
    wait_until(lambda: heard.told)
    with pytest.raises(flom.LockLost, match="taken away by"):
        held.check()
    held.release()


def watchers():
    return [thread for thread in threading.enumerate() if thread is not threading.main_thread()]


def test_a_watched_lock_that_is_not_lost(daemon, lock, box):
    """Its thread reclaims it, and ends with the release; without on_lost there is none."""
    with lock():
        assert watchers() == []
    heard = Heard()
    for _ in range(2):
        with lock(on_lost=heard) as held:
            assert len(watchers()) == 1 and not held.lost and held.check() is None
        wait_until(lambda: watchers() == [])
    with lock(on_lost=heard) as held:
        box.kill(daemon.pid)
        box.daemon("--recovery-window", "300")
        wait_until(lambda: "holds" in box.run("--status").out)
        assert held.check() is None and held.locked()
    wait_until(lambda: watchers() == [])
    assert heard.told == [] and is_free(lock)


@pytest.mark.parametrize("end", ["release", "loss"])
def test_a_thread_waits_for_nothing_but_its_connection(daemon, lock, box, monkeypatch, end):
    """It is about to wait when the connection is closed, and its number given to another file."""
    waits, goes_on, told = threading.Event(), threading.Event(), threading.Event()

    def sleep(*step):
        if threading.current_thread() is not threading.main_thread():
            waits.set()
            goes_on.wait(20)
        return real(*step)

    real, threads = flom._sleep, threading.active_count()
    monkeypatch.setattr(flom, "_sleep", sleep)
    monkeypatch.setattr(flom, "RECOVERY_WINDOW", 200)  # ms
    mine = lock(on_lost=lambda lost: told.set()).acquire()
    assert waits.wait(20)
    if end == "release":
        mine.release()
    else:
        box.kill(daemon.pid)
        wait_until(lambda: not mine.locked())
    others = socket.socketpair()
    goes_on.set()
    wait_until(lambda: threading.active_count() <= threads)
    assert told.is_set() == (end == "loss")
    for other in others:
        other.close()
    mine.release()


def test_a_watched_lock_is_acquired_anew(daemon, lock, box, monkeypatch):
    """The loss of the one before is told no more; nor does its thread reclaim it."""
    heard = Heard()
    held = lock(on_lost=heard, timeout=5).acquire()
    gate = threading.Event()
    monkeypatch.setattr(flom, "RECOVERY_WINDOW", 60000)  # ms; not over before the next daemon comes
    real = flom.Claim.reclaim_until
    monkeypatch.setattr(flom.Claim, "reclaim_until", lambda claim: gate.wait(10) and real(claim))
    box.kill(daemon.pid)
    gate.set()
    wait_until(lambda: not held.locked())
    box.daemon("--recovery-window", "300")
    try:
        held.acquire()
    except RuntimeError:  # its thread was faster
        pass
    wait_until(lambda: len(watchers()) == 1)
    assert held.locked() and heard.told == []
    held.release()
    wait_until(lambda: watchers() == [])
    assert is_free(lock)


def test_a_fork_of_a_program_that_watches(daemon, lock):
    with lock(on_lost=Heard(), timeout=0) as held:
        with held._turn:  # as if its thread had it at the fork
            assert in_child(held.release) == 0
            assert in_child(lambda: held.lost) == 0
            assert in_child(lambda: lock("R2", on_lost=Heard()).acquire().release()) == 0
        assert held.locked()


# Settings

def test_settings_come_from_files_unless_told_otherwise(box, lock, monkeypatch):
    box.daemon()
    box.write(".flom", f"[Resource]\nName=filed\nLockMode=PR\nTimeout=700\n"
                       f"[Daemon]\nSocketName={box.socket}\n")
    with flom.Lock() as held:
        assert held.name == "filed" and held.settings["LockMode"] == 3
    given = flom.Lock("given", timeout=1.5)
    assert given.name == "given" and given.settings["Timeout"] == 1500
    assert given.settings["SocketName"] == box.socket
    bare = flom.Lock(config=False)
    assert (bare.name, bare.settings["Timeout"], bare.settings["SocketName"]) == (
        flom.DEFAULT_RESOURCE, -1, None)
    box.write(".flom", "[Resource]\nTimeout=soon\n")
    with pytest.raises(flom.UsageError, match=r"\.flom:2: \[Resource\]/Timeout: 'soon'"):
        flom.Lock()
    assert flom.Lock(config=False).settings["Timeout"] == -1


def test_every_long_option_is_a_keyword():
    values = {flom.Flag: True, flom.SocketPath: "/a", flom.Octal: "0600", flom.Signal: "TERM"}
    special = {"resource_name", "lock_mode", "resource_timeout", "resource_quantity"}
    for setting in flom.SETTINGS:
        word = setting.long.replace("-", "_")
        if word in special or setting.key in flom.TLS_FILES or setting.key == "CommandTraceFile":
            continue
        if setting.group == "Quorum":  # of daemons that no client starts
            continue
        value = values.get(type(setting.type), 7)
        if isinstance(setting.type, flom.Words):
            value = setting.default
        made = flom.Lock(config=False, **{word: value})
        assert setting.key in made.settings.values and setting.key not in made.settings.warnings


@pytest.mark.parametrize("told", [True, False])
def test_a_daemon_is_started_only_when_told_to(box, lock, told):
    made = lock(start_daemon=told, timeout=5)
    if told:
        with made:
            assert len(box.daemons()) == 1
        return
    with pytest.raises(flom.DaemonUnavailable):
        made.acquire()
    assert box.daemons() == []


def test_a_daemon_is_started_beside_threads(box, lock):
    """Without the warning of os.fork."""
    gate = threading.Event()
    thread = threading.Thread(target=gate.wait)
    thread.start()
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")  # what os.fork cannot raise it would drop
            with lock(start_daemon=True, timeout=5):
                assert len(box.daemons()) == 1
        assert [str(warning.message) for warning in heard] == []
    finally:
        gate.set()
        thread.join()


def test_a_daemon_that_cannot_be_started_says_why(box, lock, monkeypatch):
    monkeypatch.setenv("FLOMD", box.write("flomd", "#!/no/such/interpreter\n"))
    with pytest.raises(flom.DaemonUnavailable, match="cannot start flomd: "):
        lock(start_daemon=True, timeout=5).acquire()


@pytest.mark.parametrize("end", ["exit 0", "exit 1", "exit 3", "kill -9 $$"])
def test_what_ends_at_once_is_started_seldom(box, lock, monkeypatch, end):
    """A daemon that cannot live, or that is killed, is not started a hundred times in 0.5 s."""
    path = box.write("flomd", f"#!/bin/sh\necho start >>{box.path('starts')}\n{end}\n")
    os.chmod(path, 0o755)
    monkeypatch.setenv("FLOMD", path)

    def spawn(argv, writing):
        """It has ended by the next look, however slow the machine."""
        pid = flom.spawn_daemon(argv, writing)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return pid
    starter = flom.Starter(lock().settings, spawn)
    starter.begin(0.5, recovering=False)
    with pytest.raises(flom.DaemonUnavailable) as error:
        while True:
            flom.finish(starter.trying())
    assert 1 <= read(box.path("starts")).count("start") <= 5
    assert str(error.value).endswith(": signal 9 killed flomd") == end.startswith("kill")


def test_a_program_without_free_descriptors_cannot_resolve(lock, monkeypatch):
    def getaddrinfo(*arguments, **options):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(flom.DaemonUnavailable, match="cannot resolve 'db1': Too many open files"):
        lock(socket_name=None, unicast_address="db1").acquire()


def test_a_program_without_free_descriptors_cannot_start_a_daemon(lock, monkeypatch):
    def pipe():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    monkeypatch.setattr(os, "pipe", pipe)
    starter = flom.Starter(lock().settings, flom.spawn_daemon)
    starter.begin(0.1, recovering=False)
    with pytest.raises(flom.DaemonUnavailable, match="cannot start flomd: Too many open files"):
        while True:
            flom.finish(starter.trying())


def test_a_start_that_is_given_up_leaves_no_pipe_and_no_zombie(box, lock, monkeypatch):
    """As when an exception comes, or when another daemon serves before."""
    gate = Gate(box, "daemon")
    path = box.write("flomd", f"#!/bin/sh\nread _ <{gate.fifo}\n")
    os.chmod(path, 0o755)
    monkeypatch.setenv("FLOMD", path)
    starter = flom.Starter(lock().settings, flom.spawn_daemon)
    files = set(os.listdir("/proc/self/fd"))
    starter.begin(10, recovering=True)
    next(starter.trying())
    assert set(os.listdir("/proc/self/fd")) > files
    starter.close()
    assert set(os.listdir("/proc/self/fd")) == files
    gate.open()
    os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
    starter.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_started_daemon_leaves_the_program_as_it_was(box, lock):
    before = {number: signal.getsignal(number) for number in signal.Signals}
    files = set(os.listdir("/proc/self/fd"))
    with lock(start_daemon=True):
        pass
    assert {number: signal.getsignal(number) for number in signal.Signals} == before
    assert set(os.listdir("/proc/self/fd")) == files
    with pytest.raises(ChildProcessError):
        os.waitpid(box.the_daemon(), os.WNOHANG)  # it is no child


def test_over_tcp(box, lock):
    port = free_port()
    box.daemon(address=("-a", "127.0.0.1", "-p", str(port)))
    with lock(socket_name=None, unicast_address="127.0.0.1", unicast_port=port, timeout=0) as held:
        assert held._claim.connection.where == f"127.0.0.1:{port}"


def test_settings_by_their_long_names():
    made = flom.Lock(config=False, resource_name="a[9]", lock_mode="PR", resource_timeout=250,
                     resource_quantity=3)
    values = made.settings.values
    assert values == {"Name": "a[9]", "LockMode": 3, "Timeout": 250, "Quantity": 3}
    assert flom.Lock(config=False).settings.values == {}


def test_values_of_python():
    """What a program has at hand for a setting means what it says."""
    values = flom.Lock(
        config=False, ignore_signal=["TERM", signal.SIGUSR1, 1], socket_mode=0o640,
        socket_name=b"/tmp/a", resource_create=False, daemon_lifespan=-1).settings.values
    assert values == {"IgnoredSignals": (15, int(signal.SIGUSR1), 1), "SocketMode": 0o640,
                      "SocketName": "/tmp/a", "Create": False, "Lifespan": -1}
    unknown = flom.Lock(config=False, ignore_signal=["TERM", "TREM"]).settings
    assert unknown["IgnoredSignals"] == (15,)
    assert "ignore_signal=: 'TREM'" in unknown.warnings[0]
    for one in ("TERM", signal.SIGTERM, 15):
        assert flom.Lock(config=False, ignore_signal=one).settings["IgnoredSignals"] == (15,)


SECONDS = [(5, 5000), (1.5, 1500), ("5", 5000), ("0.25", 250), (0, 0), (0.0003, 1), (1e-9, 1),
           (2.01, 2010), (-1, -1), (-0.0003, -1), (float("inf"), -1), (float("-inf"), -1),
           ("20ms", 20), ("1.5m", 90000), ("1h", 3600000), ("3s", 3000), ("inf", -1),
           (datetime.timedelta(minutes=1, milliseconds=20), 60020), (2147483, 2147483000)]


@pytest.mark.parametrize("seconds, ms", SECONDS, ids=[str(row) for row in SECONDS])
def test_seconds(seconds, ms):
    assert flom.Lock(config=False, timeout=seconds).settings["Timeout"] == ms


@pytest.mark.parametrize("seconds", [
    "soon", "", "ms", "5 s", "nan", "25d", "597h", float("nan"), 2147484, 1e300, 10 ** 400, True,
    [5], datetime.timedelta(days=25)],
    ids=lambda value: repr(value)[:9])
def test_what_is_no_number_of_seconds(seconds):
    text = r"^timeout=: .* is not a number of seconds up to 2147483$"
    with pytest.raises(flom.UsageError, match=text):
        flom.Lock(config=False, timeout=seconds)
    with pytest.raises(flom.UsageError, match=text):
        flom.Lock(config=False).acquire(timeout=seconds)


def test_a_timeout_of_one_call(daemon, lock):
    mine, patient = lock(timeout=0), lock()
    with lock():
        for options, error in (({}, flom.Busy), ({"timeout": 0.02}, flom.Timeout),
                               ({"timeout": datetime.timedelta(milliseconds=20)}, flom.Timeout),
                               ({"timeout": 0.0003}, flom.Timeout), ({"timeout": 0}, flom.Busy)):
            with pytest.raises(error):
                mine.acquire(**options)
        for options in ({"blocking": False}, {"blocking": False, "timeout": -1},
                        {"blocking": False, "timeout": 0}):
            with pytest.raises(flom.Busy):
                patient.acquire(**options)
        with pytest.raises(flom.Timeout, match=r"\(20 milliseconds\)"):
            patient.acquire(True, 0.02)
    assert (mine.settings["Timeout"], patient.settings["Timeout"]) == (0, -1)
    assert patient.acquire(blocking=False) is patient
    patient.release()
    for wrong in ({"blocking": False, "timeout": 1}, {"blocking": 5}, {"blocking": None}):
        with pytest.raises(flom.UsageError):
            patient.acquire(**wrong)


def test_the_trace_is_begun_once(daemon, lock, box, monkeypatch):
    """By the first Lock of a process, where that process was then."""
    box.write("trace", "old\n")
    monkeypatch.chdir(box.folder)
    options = {"command_trace_file": "trace", "timeout": 0}

    @lock("a[2]", **options)
    def work():
        made.diary.say("worked")

    made = lock(**options)
    made.diary.say("one")
    monkeypatch.chdir("/")
    work()
    work()
    lock(**dict(options, command_trace_file=box.path("trace"))).diary.say("two")
    lines = read(box.path("trace")).splitlines()
    assert [line.split()[-1] for line in lines] == ["one", "worked", "worked", "two"]


# Threads, forks, functions

def test_threads_with_a_lock_each(daemon, lock):
    inside, most, failures = [], [], []

    def work(number):
        try:
            for _ in range(5):
                with lock(timeout=20):
                    inside.append(number)
                    most.append(len(inside))
                    inside.remove(number)
        except BaseException as error:  # noqa: B902
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == [] and most == [1] * 30


def test_threads_that_share_a_lock(daemon, lock, box):
    """Only one of them waits: the others are told, before two could be inside."""
    shared, inside, told = lock(), [], []

    def work():
        try:
            with shared:
                inside.append(shared.token)
        except RuntimeError as error:
            told.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    with lock():
        for thread in threads:
            thread.start()
        wait_until(lambda: len(told) == 2 and "waits 1" in box.run("--status").out)
    for thread in threads:
        thread.join(20)
    assert len(inside) == 1
    assert set(told) == {"R1 is held already, or waited for: use one Lock per thread"}
    with shared:
        assert shared.locked()


def test_a_fork_while_a_thread_waits_may_ask_itself(daemon, lock, box):
    shared = lock(timeout=20)
    with lock():
        thread = threading.Thread(target=lambda: shared.acquire().release())
        thread.start()
        wait_until(lambda: "waits 1" in box.run("--status").out)
        assert in_child(lambda: pytest.raises(flom.Busy, shared.acquire, False)) == 0
    thread.join(20)
    assert is_free(lock)


def noted(lost):
    """An on_lost that can be pickled."""


@pytest.mark.parametrize("options", [{}, {"reentrant": True}, {"on_lost": noted}], ids=str)
def test_a_copy_is_a_lock_of_its_own(daemon, lock, options):
    """Also of one that is held; with pickle it is what another process gets."""
    with lock(mode="PW", timeout=0, **options) as held:
        for other in (copy.copy(held), copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
            assert vars(other).keys() == vars(held).keys() and not other.locked()
            assert other.settings.values == held.settings.values
            other.release()
            with pytest.raises(flom.Busy):
                other.acquire()
        assert held.locked() and not is_free(lock)
    with other:
        assert other.locked() and not held.locked()


MULTIPROCESSING = f"""import multiprocessing, os, sys, time
sys.path.insert(0, {ROOT!r})
import flom

def work(lock, path):
    assert not lock.locked()
    with lock:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        print(lock.token, flush=True)
        os.unlink(path)

def main(method, path, *about):
    settings = dict(socket_name=path, config=False)
    context = multiprocessing.get_context(method)
    with flom.Lock("R1", timeout=20, **settings) as lock:
        processes = [context.Process(target=work, args=(lock, path + ".in")) for _ in range(3)]
        for process in processes:
            process.start()
        while len(flom.status(**settings)["resources"][0]["waiters"]) < 3:
            assert all(process.exitcode is None for process in processes)
            time.sleep(0.01)
    for process in processes:
        process.join(20)
        assert process.exitcode == 0

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_multiprocessing(daemon, box, method):
    """A Lock that is held is handed to processes, which wait for it."""
    program = box.write("program.py", MULTIPROCESSING)
    done = box.start(*PYTHON, program, method, box.socket).end()
    assert (done.status, done.err) == (0, "")
    tokens = [int(token) for token in done.out.split()]
    assert len(tokens) == 3 and tokens == sorted(tokens)


def in_child(function):
    """The exit status of a fork in which function() must not raise."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return os.WEXITSTATUS(os.waitpid(pid, 0)[1])


def test_a_fork_does_not_share_the_lock(daemon, lock):
    def child():
        assert not held.lost  # it is not this process's
        with pytest.raises(flom.LockError, match="not held by this process"):
            held.check()
        held.release()
        held.release()

    def child_that_locks():
        try:
            held.acquire()
        except flom.Busy:
            return
        raise AssertionError("two hold it")

    with lock(timeout=0) as held:
        assert in_child(child) == 0
        assert in_child(child_that_locks) == 0
        assert not held.lost and not is_free(lock)
    assert is_free(lock)
    assert in_child(lambda: lock(timeout=0).acquire()) == 0  # one that ends without release
    assert in_child(lambda: held.acquire().release()) == 0
    assert is_free(lock)


FORKED = f"""\
import os, signal, sys, threading
sys.path.insert(0, {ROOT!r})
import flom
path, there, gate, code = sys.argv[1:]
lock = flom.Lock("R1", socket_name=path, config=False)
if code == "wait":
    threading.Thread(target=lock.acquire, daemon=True).start()
    open(gate + ".fork").close()
else:
    lock.acquire()
if not os.fork():
    exec(code.replace("wait", "pass"))
    open(there, "w").close()
    open(gate).close()
    os._exit(0)
open(gate + ".parent").close()
"""
UNTOLD = pytest.mark.skipif(sys.version_info < (3, 7), reason="os.register_at_fork is of 3.7")


def forked(box, code):
    """A program that forks: (its process, the Gates of the child, of the parent, of the fork).
    The child runs this code, then says so in the file `child`."""
    gates = [Gate(box, name) for name in ("child", "child.parent", "child.fork")]
    return [box.start(sys.executable, "-S", "-c", FORKED, box.socket, box.path("child"),
                      gates[0].fifo, code)] + gates


@pytest.mark.parametrize("code", [
    pytest.param("pass", marks=UNTOLD), "del lock", "lock.release()",
    "lock._claim.connection.close()"])
def test_a_fork_does_not_keep_the_lock_of_a_parent_that_ended(daemon, lock, box, code):
    program, child, _, _ = forked(box, code)
    wait_until(lambda: os.path.exists(box.path("child")))
    assert not is_free(lock)  # the parent's, whatever the child does
    box.kill(program.pid)
    wait_until(lambda: is_free(lock))
    child.open()


@UNTOLD
def test_a_fork_does_not_keep_the_place_of_a_parent_that_waited(daemon, lock, box):
    with lock():
        program, child, _, fork = forked(box, "wait")
        wait_until(lambda: "waits 1" in box.run("--status").out)
        fork.open()
        wait_until(lambda: os.path.exists(box.path("child")))
        assert "waits 1" in box.run("--status").out
        box.kill(program.pid)
        wait_until(lambda: "waits" not in box.run("--status").out)
    assert is_free(lock)
    child.open()


def test_a_decorator(daemon, lock):
    @lock("a[2]", quantity=2)
    def double(number, plus=0):
        """Twice."""
        assert not is_free(lock, "a[2]")
        if number < 0:
            raise ValueError(number)
        return 2 * number + plus

    assert (double.__name__, double.__doc__) == ("double", "Twice.")
    assert double(4, plus=1) == 9 and is_free(lock, "a[2]")
    with pytest.raises(ValueError):
        double(-1)
    assert is_free(lock, "a[2]") and double(1) == 2


def test_a_decorated_generator_holds_the_lock_to_its_end(daemon, lock):
    @lock()
    def rows(count: int = 3):
        for number in range(count):
            assert (yield number) is None
        return "done"

    assert inspect.isgeneratorfunction(rows)
    assert inspect.signature(rows).parameters["count"].default == 3
    three = rows()
    assert is_free(lock)  # nothing has begun
    assert next(three) == 0 and not is_free(lock)
    assert list(three) == [1, 2] and is_free(lock)
    broken = rows()
    next(broken)
    with pytest.raises(AssertionError):
        broken.send("x")
    assert is_free(lock)
    left = rows()
    next(left)
    left.close()
    assert is_free(lock)


class Worker:
    def plain(self, number: int) -> int:
        """Doubles."""
        return number * 2

    def __call__(self):
        return "called"


def test_a_decorator_of_methods(daemon, lock):
    class Locked(Worker):
        plain = lock()(Worker.plain)
        static = lock()(staticmethod(lambda number: number))
        of_class = lock()(classmethod(lambda cls: cls.__name__))

    made = Locked()
    assert (made.plain(2), made.static(3), Locked.static(4)) == (4, 3, 4)
    assert Locked.of_class() == made.of_class() == "Locked"
    assert inspect.signature(Locked.plain) == inspect.signature(Worker.plain)
    assert Locked.plain.__doc__ == "Doubles."
    for function in (Worker().plain, functools.partial(Worker().plain)):
        assert lock()(function)(5) == 10
    assert lock()(Worker())() == "called"


def test_a_decorator_of_a_subclass(daemon, lock, box):
    class Noting(flom.Lock):
        def __init__(self, notes):
            super().__init__("R1", socket_name=box.socket, config=False)
            self.notes = notes

        def acquire(self, *args, **kwargs):
            self.notes.append("acquire")
            return super().acquire(*args, **kwargs)

    notes = []
    mine = Noting(notes)
    with mine:
        pass
    assert mine(lambda: len(notes))() == 2
    assert notes == ["acquire", "acquire"]


def test_what_cannot_be_decorated(lock):
    async def generator():
        yield

    for wrong in (generator, functools.partial(generator), staticmethod(generator)):
        with pytest.raises(TypeError, match="is an asynchronous generator"):
            lock()(wrong)
    for wrong in (Worker, property(generator), "f", 5):
        with pytest.raises(TypeError, match="is not a function"):
            lock()(wrong)


def test_what_runs_later_than_its_function(daemon, lock):
    """A function that returns a coroutine or a generator: the lock would be released before."""
    async def coroutine():
        pass

    async def generator():
        yield

    for late in (lambda: coroutine(), lambda: generator(), lambda: (row for row in "abc")):
        with pytest.raises(TypeError, match="would run without the lock on R1"):
            lock()(late)()
    assert is_free(lock)


def test_a_decorated_function_runs_in_threads(daemon, lock):
    inside, most = [], []

    @lock()
    def work():
        inside.append(1)
        most.append(len(inside))
        inside.pop()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == [1] * 5


# What is documented

def test_the_examples_of_the_docstrings(box):
    """They are run as they stand, with a daemon there."""
    box.daemon()
    box.write(".flom", f"[Daemon]\nSocketName={box.socket}\n")
    example = re.search(r"In Python:\n\n(.*?)\n\n", flom.__doc__, re.DOTALL).group(1)
    inline = re.findall("`(with flom.*?)`", flom.Lock.__doc__)
    decorator = re.findall("`(@flom.*?)`", flom.Lock.__doc__)
    assert len(inline) == len(decorator) == 1
    script = "\n".join(["import flom", textwrap.dedent(example), inline[0], "print(lock.token)",
                        decorator[0], "def work():", "    return 'worked'", "print(work())"])
    done = box.start(*PYTHON, box.write("s.py", script), env={"PYTHONPATH": ROOT}).end()
    assert (done.status, done.err) == (0, "")
    first, second, worked = done.out.split()
    assert int(first) < int(second) and worked == "worked"


def test_what_the_docstrings_and_the_manual_name():
    """flom(3) names every error and every public word of Lock; each has a docstring."""
    manual = read(os.path.join(ROOT, "contrib/man/flom.3"))
    for error in flom.LockError.__subclasses__() + [flom.UsageError, flom.LockError]:
        assert re.search(rf"\b{error.__name__}\b", manual), error
    for word in ("acquire", "release", "rollback", "lost", "check", "locked", "timeout"):
        assert getattr(flom.Lock, word).__doc__ and f"lock.{word}" in manual
        assert getattr(flom.AsyncLock, word).__doc__
    for word in ("element", "token", "start_daemon", "config=False", "timeout", "reentrant",
                 "on_lost"):
        assert word in flom.Lock.__doc__ and word in manual


def test_the_public_names():
    """`from flom import *` gives these alone, help() tells of them alone, and the manual does."""
    errors = {error.__name__ for error in flom.LockError.__subclasses__()}
    assert set(flom.__all__) == {"Lock", "AsyncLock", "status", "LockError", "UsageError"} | errors
    manual = read(os.path.join(ROOT, "contrib/man/flom.3"))
    text = pydoc.plain(pydoc.render_doc(flom))
    for name in flom.__all__:
        assert getattr(flom, name).__doc__
        assert re.search(rf"\b{name}\b", manual) and re.search(rf"\b{name}\b", text)
    for name in ("Claim", "Session", "Settings", "finish", "clock"):
        assert not re.search(rf"^    (class )?{name}\b", text, re.MULTILINE)
    assert {name for name in flom.__dir__() if not name.startswith("__")} == set(flom.__all__)
    if sys.version_info >= (3, 7):
        assert dir(flom) == sorted(flom.__dir__())
        assert {name for name, _ in inspect.getmembers(flom)} == set(flom.__dir__())


def test_importing_flom_changes_nothing(box):
    script = ("import signal, sys, threading\n"
              "before = [signal.getsignal(n) for n in signal.Signals]\n"
              "import flom\n"
              "assert before == [signal.getsignal(n) for n in signal.Signals]\n"
              "assert not {'ssl', 'json', 'subprocess'} & set(sys.modules)\n")
    done = box.start(sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {ROOT!r})\n"
                     + script).end()
    assert done == (0, "", "")
