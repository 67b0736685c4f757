"""Holders whose clients are not there: how they end, and who sees them."""
import os
import signal
import subprocess
import sys

import flomd
import pytest
from test_connections import SETTINGS
from test_server import World

pytestmark = pytest.mark.usefixtures("flying_time")

SLEEPER = [sys.executable, "-IS", "-c", "import sys; sys.stdin.read()"]


class Later(World):
    """The successor of a world, whose holders it knows."""

    def __init__(self, before, rebooted=False, same_processes=True):
        records = dict(flomd.everything(before.table))
        now = flomd.Moment()
        self.known = flomd.restore(records, flomd.LockTable, now, rebooted, str)
        super().__init__()
        self.server.absences.begin(same_processes)

    def make_table(self):
        return self.known

    def run(self, seconds):
        self.loop.after(seconds, self.loop.stop)
        self.loop.run()
        self.loop._stopped = False

    def absent(self):
        return [holder.name for holder in self.table.absent.values()]


@pytest.fixture
def world():
    return World()


@pytest.fixture
def process():
    """A process that lives until it is ended."""
    with subprocess.Popen(SLEEPER, stdin=subprocess.PIPE) as started:
        yield started
        started.kill()


def end(process):
    """Kills it; it is a zombie then."""
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(flomd, "LEAST_GRACE", 0)


def hold(world, name="R", pid=None, ours=True, life=1, grace=-1, **more):
    """A holder on this host, or with no pid on another one; it has sent its request already."""
    client = world.client()
    client.session.ours = ours
    request = client.ask(name, **more)
    world.turn()
    if pid is not None:
        request.local, request.pid = True, pid
    request.life, request.grace = life, grace
    request.held_boot = flomd.Moment().boot
    return request


# Their processes

def test_a_bug_in_looking_at_a_process_keeps_no_lock_for_ever(world, process, monkeypatch):
    hold(world, pid=process.pid)
    later = Later(world)
    monkeypatch.setattr(flomd, "look_at_process", lambda *_: 1 / 0)
    later.run(1)
    assert later.absent() == ["R"]
    later.run(later.server.absences.grace / 1000)
    assert later.absent() == [] and "ZeroDivisionError" in later.log.lines[0]


def test_a_lock_ends_with_its_process(world, process):
    hold(world, pid=process.pid)
    later = Later(world)
    process.send_signal(signal.SIGSTOP)
    waiter = later.client().lock()
    later.run(2)
    assert later.absent() == ["R"] and waiter.told == [1]
    end(process)
    later.run(4)
    assert later.absent() == [] and waiter.told == [1, 0]


def test_a_later_process_of_the_same_pid_is_another(world, process):
    request = hold(world, pid=process.pid)
    request.held_boot -= 3600
    later = Later(world)
    later.run(1)
    assert later.absent() == []


def test_a_process_that_is_no_more(world, process):
    hold(world, pid=process.pid)
    process.kill()
    process.wait()
    later = Later(world)
    later.run(1)
    assert later.absent() == []


def test_where_pids_mean_nothing_the_grace_counts(world, process, monkeypatch):
    for name, pid in (("gone", 2 ** 22), ("unseen", 0)):
        hold(world, name, pid=pid)
    later = Later(world, same_processes=False)
    later.run(2)
    assert sorted(later.absent()) == ["gone", "unseen"]
    monkeypatch.setattr(flomd, "BOOT_ID", "/nowhere")
    later = Later(world)
    later.run(2)
    assert sorted(later.absent()) == ["gone", "unseen"]


def test_a_lock_of_the_api_has_its_grace(world):
    hold(world, pid=2 ** 22, life=0, grace=100)
    later = Later(world)
    later.run(2)
    assert later.absent() == ["R"]


@pytest.mark.parametrize("name, left", [("flom", []), ("flog", ["R"])])
def test_floms_command_is_known_by_its_name(world, name, left):
    program = f"open('/proc/self/comm', 'w').write({name!r}); import sys; print(flush=True); " \
              "sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-IS", "-c", program], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        hold(world, pid=process.pid, ours=False, life=0, grace=None)
        later = Later(world)
        later.run(2)
        assert later.absent() == ["R"]
        end(process)
        later.run(4)
    assert later.absent() == left


def test_of_many_a_part_is_looked_at_in_a_turn(world, process, monkeypatch):
    monkeypatch.setattr(flomd, "MOST_LOOKED_AT", 10)
    for number in range(25):
        hold(world, f"R{number}", pid=process.pid)
    later = Later(world)
    looks = []
    real = flomd.look_at_process
    monkeypatch.setattr(flomd, "look_at_process",
                        lambda *about: looks.append(later.loop.now) or real(*about))
    later.run(4)
    turns = [looks.count(moment) for moment in dict.fromkeys(looks)]
    assert turns[:3] == [10, 10, 5] and max(turns) == 10 and len(later.absent()) == 25
    end(process)
    later.run(4)
    assert later.absent() == []


# Their graces

def test_the_grace_is_the_longer_of_what_is_set_and_what_was_promised(world, monkeypatch):
    monkeypatch.setitem(SETTINGS, "TcpKeepaliveTime", 50)
    monkeypatch.setitem(SETTINGS, "TcpKeepaliveProbes", 0)
    hold(world, "now", grace=1)
    hold(world, "promised", grace=150000)
    hold(world, "floms", ours=False, grace=None)
    later = Later(world)
    waiter = later.client().lock("now")
    later.run(30)
    assert len(later.absent()) == 3 and waiter.told == [1]
    later.run(70)
    assert later.absent() == ["promised"] and waiter.told == [1, 0]
    later.run(100)
    assert later.absent() == []


def test_after_a_boot_nobody_here_holds_any_more(world, process):
    hold(world, "here", pid=process.pid)
    hold(world, "elsewhere", grace=60000)
    later = Later(world, rebooted=True)
    later.run(1)
    assert later.absent() == ["elsewhere"]


# What becomes of them

def test_who_ends_while_absent_has_committed(world):
    hold(world, "_S_n[1]", pid=2 ** 22)
    later = Later(world)
    later.run(2)
    assert hold(later, "_S_n[1]").element == "2"
    assert not later.log.lines


def test_who_comes_back_is_absent_no_more(world, process):
    before = hold(world, pid=process.pid, ident="aa", proof="bb")
    later = Later(world)
    holder = later.client()
    holder.ask(ident="aa", proof="bb", reclaim=before.token)
    later.turn()
    end(process)
    later.run(4)
    assert holder.told == [0] and later.absent() == [] and later.table.holding == 1


def test_a_reclaim_is_served_beyond_the_limit_of_clients(world, process):
    before = hold(world, pid=process.pid, ident="aa", proof="bb")
    later = Later(world)
    later.connections.refuses = lambda connection: True
    holder, liar = later.client(), later.client()
    holder.surplus = liar.surplus = True
    liar.ask(ident="aa", proof="cc", reclaim=before.token, wait=0)
    holder.ask(ident="aa", proof="bb", reclaim=before.token, wait=0)
    later.turn()
    assert (liar.told, holder.told) == ([4], [0])
    assert liar.finished and not holder.finished


def test_one_that_comes_back_is_promised_the_grace_of_now(world):
    before = hold(world, ident="aa", proof="bb", grace=5000)
    later = Later(world)
    holder = later.client()
    holder.session.ours = True
    holder.ask(ident="aa", proof="bb", reclaim=before.token)
    later.turn()
    assert later.table.requests[holder.session].grace == (60 + 10 * 6) * 1000


def test_an_absent_holder_can_be_evicted(world, process):
    hold(world, pid=process.pid, ident="aa").uid = 4711
    later = Later(world)
    waiter, giver = later.client().lock(), later.client()
    giver.is_from_this_host = lambda: True
    later.server.orders.evict(giver, ("aa", {}))
    later.turn()
    assert waiter.told == [1, 0] and giver.finished and b'rc="0"' in giver.told[0]


@pytest.mark.parametrize("uid, verdict", [(4711, b'rc="0"'), (4712, b'rc="-1"')])
def test_who_may_evict_an_absent_holder(world, process, uid, verdict):
    hold(world, pid=process.pid, ident="aa").uid = 4711
    later = Later(world)
    giver = later.client()
    giver.peer = flomd.LOCAL
    giver.credentials = lambda: (1, uid)
    later.server.orders.evict(giver, ("aa", {}))
    later.turn()
    later.connections.users.close()
    assert verdict in giver.told[0]
    assert later.absent() == ([] if uid == 4711 else ["R"])


def test_reports_show_that_a_holder_is_absent(world, process):
    hold(world, pid=process.pid, ident="aa")
    later = Later(world)
    hold(later, "here")
    report = "".join(flomd.report(later.table, "", flomd.Moment()))
    assert report.count("<holder ") == 2 and report.count('absent="1"') == 1
    figures = "".join(flomd.metrics(later.table, flomd.Counts(), 1, 2, True))
    assert "\nflomd_absent_holders 1\n" in figures and "\nflomd_memory_failing 1\n" in figures
    files = dict(flomd.tree(later.table))
    assert [path for path in files if path.endswith("/absent")] == ["lockers/1/holders/1/absent"]


def test_what_nobody_holds_is_forgotten_by_order(world):
    hold(world, "_s_used[1]")
    hold(world, "_s_idle[1]").session.connection.unlock()
    world.server.forget()
    assert list(world.table.resources) == ["_s_used[1]"]
    records, _ = world.disk.taken[-1]
    assert len(records) == 1 and records[0][1] is None
