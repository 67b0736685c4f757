"""flom.AsyncLock, as a program with an event loop uses it: real daemons, one thread."""
import asyncio
import copy
import inspect
import os
import pickle
import socket
import threading

import flom
import pytest
from test_api import is_free, lock  # noqa: F401  (a fixture)
from world import free_port, wait_until


@pytest.fixture
def alock(box, lock):  # noqa: F811
    """alock(name, …): an AsyncLock of the box's socket."""
    def make(name="R1", **options):
        return flom.AsyncLock(name, **dict({"socket_name": box.socket, "config": False}, **options))
    return make


@pytest.fixture
def daemon(box):
    return box.daemon()


@pytest.fixture
def run():
    """run(coroutine): its result; an event loop of its own, which must be left as it was."""
    loop = asyncio.new_event_loop()
    loop.set_debug(True)
    asyncio.set_event_loop(loop)
    mistakes = []
    loop.set_exception_handler(lambda _, context: mistakes.append(context))
    yield lambda work: loop.run_until_complete(asyncio.wait_for(work, 60))
    left = [task for task in all_tasks(loop) if not task.done()]
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
    asyncio.set_event_loop(None)
    assert left == [] and mistakes == []


def all_tasks(loop):
    if hasattr(asyncio, "all_tasks"):
        return asyncio.all_tasks(loop)
    return asyncio.Task.all_tasks(loop)


def waits(box, number=1):
    return f"waits {number}" in box.run("--status").out


async def until(predicate, seconds=30):
    """As wait_until, while the loop runs."""
    loop = asyncio.get_event_loop()
    deadline = loop.time() + seconds
    while not predicate():
        assert loop.time() < deadline
        await asyncio.sleep(0.01)


def test_a_block(daemon, alock, lock, run):  # noqa: F811
    async def work():
        mine = alock(timeout=5)
        async with mine as held:
            assert held is mine and mine.locked() and not mine.lost
            assert mine.element is None and mine.token > 2 ** 32
            assert await mine.check() is None
            assert not is_free(lock)
        assert not mine.locked() and not mine.lost and is_free(lock)
        assert await mine.acquire() is mine
        with pytest.raises(RuntimeError, match="R1 is held already$"):
            await mine.acquire()
        await mine.release()
        await mine.release()  # of nothing
        with pytest.raises(flom.LockError, match="not held by this process"):
            await mine.check()
        assert is_free(lock)
    run(work())


def test_elements_and_rollbacks(daemon, alock, run):
    async def work():
        with pytest.raises(ZeroDivisionError):
            async with alock("_S_a[1]") as number:
                raise ZeroDivisionError
        again = await alock("_S_a[1]").acquire()
        assert number.element == again.element == "1"
        await again.rollback()
        for value in ("1", "2"):
            async with alock("_S_a[1]") as number:
                assert number.element == value
    run(work())


def test_timeouts(daemon, alock, lock, run):  # noqa: F811
    async def work():
        mine = alock()
        with lock():
            with pytest.raises(flom.Busy):
                await mine.acquire(blocking=False)
            with pytest.raises(flom.Busy):
                await alock(timeout=0).acquire()
            with pytest.raises(TimeoutError):
                await mine.acquire(timeout=0.02)
            for block in (mine.timeout(0.02), mine(timeout=0.02)):
                with pytest.raises(flom.Timeout, match=r"\(20 milliseconds\)"):
                    async with block:
                        pass
        async with mine.timeout(5) as held:
            assert held is mine and mine.locked()
    run(work())


def test_many_wait_in_one_thread(daemon, alock, run):
    inside, most = [], []

    async def work(number):
        async with alock():
            inside.append(number)
            most.append(len(inside))
            await asyncio.sleep(0)
            inside.remove(number)

    async def crowd():
        await asyncio.gather(*[work(number) for number in range(50)])
        assert threading.active_count() == 1
    run(crowd())
    assert most == [1] * 50


def test_a_cancelled_wait_leaves_the_queue(daemon, alock, box, run):
    async def work():
        async with alock() as holder:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(alock().acquire(), 0.05)
            await until(lambda: not waits(box))  # wait_for of Python 3.6 does not wait for it
            mine = alock()
            task = asyncio.ensure_future(mine.acquire())
            await until(lambda: waits(box))
            with pytest.raises(RuntimeError, match="use one AsyncLock per task"):
                await mine.acquire()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert "waits" not in box.run("--status").out
            assert not mine.locked() and holder.locked()
        assert (await mine.acquire()).locked()
        await mine.release()
    run(work())


def test_a_cancelled_block_releases(daemon, alock, lock, run):  # noqa: F811
    async def work():
        held = asyncio.Event()

        async def hold():
            async with alock():
                held.set()
                await asyncio.sleep(30)
        task = asyncio.ensure_future(hold())
        await held.wait()
        assert not is_free(lock)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert is_free(lock)
    run(work())


def test_the_loop_goes_on_meanwhile(daemon, alock, box, run):
    """A lock of the same thread is released although another task waits for it."""
    async def work():
        order = []
        first = await alock().acquire()

        async def second():
            async with alock():
                order.append("second")
        task = asyncio.ensure_future(second())
        await until(lambda: waits(box))
        order.append("first")
        await first.release()
        await task
        assert order == ["first", "second"]
    run(work())


def test_a_daemon_by_a_name(box, alock, run):
    port = free_port()
    box.daemon(address=("-a", "127.0.0.1", "-p", str(port)))

    async def work():
        for host in ("127.0.0.1", "localhost"):
            async with alock(socket_name=None, unicast_address=host, unicast_port=port) as held:
                assert held.locked()
        with pytest.raises(flom.DaemonUnavailable, match="cannot resolve"):
            await alock(socket_name=None, unicast_address="no.such.invalid").acquire()
    try:
        run(work())
    except socket.gaierror:
        pytest.skip("no name is resolved here")


def test_a_daemon_is_started(box, alock, run):
    async def work():
        with pytest.raises(flom.DaemonUnavailable, match="start_daemon=True"):
            await alock().acquire()
        async with alock(start_daemon=True):
            assert len(box.daemons()) == 1
    run(work())


def test_a_lock_is_reclaimed_by_itself(daemon, alock, box, run):
    told = []

    async def work():
        async with alock(on_lost=told.append) as held:
            token = held.token
            box.kill(daemon.pid)
            box.daemon("--recovery-window", "300")
            await until(lambda: "holds" in box.run("--status").out)
            await held.check()
            assert held.locked() and not held.lost and held.token == token
    run(work())
    assert told == []


def test_a_lost_lock_is_acquired_anew(daemon, alock, lock, box, run):  # noqa: F811
    async def work():
        held = await alock(timeout=5, on_lost=told.append).acquire()
        token = held.token
        box.kill(daemon.pid)
        wait_until(lambda: held.lost)
        box.daemon("--recovery-window", "0")
        assert (await held.acquire()).token >= token
        assert await held.check() is None and not is_free(lock)
        await held.release()
        assert is_free(lock)
    told = []
    run(work())
    assert told == []


def test_a_loss_is_told(daemon, alock, lock, box, run, monkeypatch):  # noqa: F811
    """By the loop, once; the end of the block raises it."""
    monkeypatch.setattr(flom, "RECOVERY_WINDOW", 100)  # ms
    told = []

    async def work():
        with pytest.raises(flom.LockLost, match="the lock on R1 is lost"):
            async with alock(on_lost=told.append) as held:
                box.kill(daemon.pid)
                await until(lambda: told)
                assert held.lost and not held.locked()
                with pytest.raises(flom.LockLost):
                    await held.check()
        assert told == [held] and not held.lost
        box.forget()
        box.daemon("--recovery-window", "0")
        async with held:
            assert held.locked()
    run(work())


def test_a_loss_is_told_to_a_coroutine(daemon, alock, lock, box, run):  # noqa: F811
    """Which may release the lock."""
    told = []

    async def on_lost(lost):
        await lost.release()
        told.append(lost)

    async def work():
        held = await alock(on_lost=on_lost).acquire()
        assert box.run("--evict", held._claim.chain[0]).status == 0
        await until(lambda: told == [held])
        assert not held.lost and is_free(lock)
        await held.acquire()
        await held.release()
    run(work())
    with pytest.raises(TypeError, match="on_lost=: .* no event loop would run it"):
        lock(on_lost=on_lost)


def test_a_decorator(daemon, alock, lock, run):  # noqa: F811
    class Work:
        async def double(self, number: int) -> int:
            """Twice."""
            await asyncio.sleep(0)
            assert not is_free(lock)
            return 2 * number

    for made in (lock(), alock(), alock(timeout=5), lock(timeout=5)):
        locked = made(Work.double)
        assert inspect.iscoroutinefunction(locked) and locked.__doc__ == "Twice."
        assert inspect.signature(locked) == inspect.signature(Work.double)
        assert run(locked(Work(), 4)) == 8 and is_free(lock)

    async def both():
        await asyncio.gather(locked(Work(), 1), locked(Work(), 2))
    run(both())
    with pytest.raises(TypeError, match="is not async"):
        alock()(len)
    with pytest.raises(TypeError, match="a reentrant lock is that of a thread"):
        lock(reentrant=True)(Work.double)
    with pytest.raises(TypeError, match="no setting reentrant"):
        alock(reentrant=True)


def test_a_copy_is_a_lock_of_its_own(daemon, alock, lock, run):  # noqa: F811
    async def work():
        async with alock() as held:
            for other in (copy.copy(held), copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
                assert vars(other).keys() == vars(held).keys() and not other.locked()
                await other.release()
                with pytest.raises(flom.Busy):
                    await other.acquire(blocking=False)
            assert held.locked() and not is_free(lock)
        async with other:
            assert other.locked() and not held.locked()
    run(work())


def test_a_lock_that_outlives_its_loop(daemon, alock, lock):  # noqa: F811
    loop = asyncio.new_event_loop()
    held = loop.run_until_complete(alock().acquire())
    loop.close()
    assert held.locked() and not held.lost and not is_free(lock)
    other = asyncio.new_event_loop()
    other.run_until_complete(held.release())
    other.close()
    assert is_free(lock)


def test_no_descriptor_is_left(daemon, alock, run):
    files = set()

    async def work(note):
        async with alock(timeout=5):
            with pytest.raises(flom.Timeout):
                await alock(timeout=0.02).acquire()
        note(os.listdir("/proc/self/fd"))
    run(work(files.update))
    run(work(lambda left: files.symmetric_difference_update(left)))
    assert files == set()


def test_what_is_in_the_way_of_a_wait(alock, box, run):
    """A daemon that comes late is found, and the loop is not held up meanwhile."""
    async def work():
        first = box.daemon()
        holder = await alock().acquire()
        task = asyncio.ensure_future(alock().acquire())
        await until(lambda: waits(box))
        box.kill(first.pid)
        wait_until(lambda: holder.lost)
        box.daemon("--recovery-window", "300")
        await holder.check()
        assert not task.done()
        await holder.release()
        await (await task).release()
    run(work())
