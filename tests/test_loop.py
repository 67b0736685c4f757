"""The daemon's loop: what has come is read before what is due is done."""
import contextlib
import signal

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
wait = flomd.Poller.wait
flomd.Poller.wait = lambda self, timeout: list(wait(self, timeout))[:1]
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
            pass_time(2.5)
        answers = sorted(answer(client)["rc"] for client in clients[:-2])
        assert answers == ["0"] + ["4"] * 27
        send_lock(clients[-2], 99)
        assert answer(clients[-2])["rc"] == "4"
        assert clients[-1].receive() == b""
