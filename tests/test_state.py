"""What is on disk for the next daemon: the epoch, the mark, and the lock of the file."""
import fcntl
import json
import os
import signal
import time

import flomd
import pytest
from fakes import LOCK, PEER, FlomClient, b64, message, parse
from world import can_connect, endpoint, free_port, patched, read, wait_until

TELL = ("-o", "0", "--", "sh", "-c", 'echo "$FLOM_TOKEN"')


class Lines:
    """A log that keeps its lines."""

    def __init__(self):
        self.lines = []

    def error(self, text):
        self.lines.append(text)

    def limited(self, text, level):
        self.lines.append(text)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "s.lock")


def record(epoch=0, held=0, pid=0):
    return flomd.RECORD.format(epoch=epoch, boot="x" * 36, held=held, pid=pid)


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def disk_at(path):
    """The Disk of a daemon that has locked the state at the path, and has read it."""
    state = flomd.State(Lines(), path)
    assert state.lock()
    return flomd.Disk(state.log, state)


def begun(path, said=()):
    """(the Disk, Known) of a daemon that has begun, has logged these lines and ended."""
    disk = disk_at(path)
    known = disk.recall()
    disk.begin()
    os.close(disk.state.number)
    assert len(disk.log.lines) == len(said)
    assert all(part in line for part, line in zip(said, disk.log.lines))
    return disk, known


def seconds():
    return int(time.time()) - flomd.EPOCH


def test_epochs_rise_with_each_daemon(path):
    begin = seconds()
    first = begun(path)[0].epoch
    assert begin - 1 <= first <= seconds()
    assert begun(path)[0].epoch > first
    write(path, record(first + 86400))
    assert begun(path)[0].epoch == first + 86401


@pytest.mark.parametrize("epoch", [2 ** 31 - 2 ** 20 + 1, 2147483647, 9999999999])
def test_an_epoch_that_leaves_no_room_is_damage(path, epoch):
    write(path, record(epoch, held=1))
    disk, known = begun(path, [f"epoch, {epoch}, is ignored"])
    assert disk.epoch <= seconds() and known.unclean


def test_a_clock_that_would_use_up_all_epochs_is_ignored(path, monkeypatch):
    write(path, record(5000))
    monkeypatch.setattr(flomd.time, "time", lambda: 2.0 ** 32)
    assert begun(path)[0].epoch == 5001


def test_a_token_that_lies_ahead_is_covered(path):
    disk = disk_at(path)
    disk.recall()
    disk.begin()
    assert disk.cover((disk.epoch + 70000 << 32) + 5)
    os.close(disk.state.number)
    assert begun(path)[0].epoch > disk.epoch


def fail(*_):
    raise OSError(28, "No space left on device")


def test_a_mark_that_could_not_be_set_is_set_by_the_next_grant(path, monkeypatch):
    disk = disk_at(path)
    disk.recall()
    disk.begin()
    with monkeypatch.context() as patch:
        patch.setattr(flomd.os, "pwrite", fail)
        assert not disk.mark(True)
    assert not disk.marked and read(path).split()[3] == "0"
    assert disk.mark(True)
    assert disk.marked and read(path).split()[3] == "1"
    os.close(disk.state.number)
    assert len(disk.log.lines) == 1 and path in disk.log.lines[0]


def test_a_record_that_could_not_be_written_is_written_with_the_mark(path, monkeypatch):
    disk = disk_at(path)
    disk.recall()
    with monkeypatch.context() as patch:
        patch.setattr(flomd.os, "pwrite", fail)
        disk.begin()
        assert not disk.kept
    assert disk.mark(True)
    os.close(disk.state.number)
    assert disk.kept and read(path).split()[1] == f"{disk.epoch:010d}"


def test_the_lock_is_that_of_the_file_at_the_path(path):
    """Not of one that was removed while it was waited for."""
    state = flomd.State(Lines(), path)
    os.unlink(path)
    write(path, record(7))
    assert state.lock() and state.epoch == 7
    os.close(state.number)


# The name of the file

def test_sockets_of_one_name_have_states_of_their_own(box):
    """With one --state-dir: each remembers what it granted."""
    folder, daemons = box.path("state"), []
    for name in ("a", "b", "state"):
        os.mkdir(box.path(name))
    for name in "ab":
        address = ("-s", box.path(f"{name}/s"), "--state-dir", folder)
        daemons.append(box.daemon(address=address))
    assert not any("remembered" in daemon.err for daemon in daemons)
    states = [name for name in os.listdir(folder) if name.endswith(".lock")]
    found = {int(read(os.path.join(folder, name)).split()[4]) for name in states}
    assert found == {daemon.pid for daemon in daemons}


# A lock that is held

@pytest.fixture
def dying(box):
    """A box with the state of a daemon for a TCP address, which does not answer any more but has
    not ended, and under which somebody holds a lock."""
    port = str(free_port())
    name = f"flom-{flomd.login()}-127.0.0.1-{port}.lock"
    box.address = ("-a", "127.0.0.1", "-p", port, "--state-dir", box.folder)
    path = box.write(flomd.state_name("/tmp", name), record(7, held=1, pid=4711))
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield box, file


def opened(box):
    """Whether a daemon of the box has opened a state."""
    paths = []
    for pid in box.daemons():
        for number in os.listdir(f"/proc/{pid}/fd"):
            try:
                paths.append(os.readlink(f"/proc/{pid}/fd/{number}"))
            except OSError:  # closed meanwhile
                pass
    return any(path.endswith(".lock") for path in paths)


@pytest.mark.parametrize("foreground", [["-f"], []])
def test_a_successor_waits_for_the_lock(dying, foreground):
    """It finds the mark: nobody new is granted in its window."""
    box, file = dying
    daemon = box.flomd(*foreground, "--no-files", *box.address)
    box.foreground.append(daemon)
    wait_until(lambda: opened(box))
    assert not can_connect(box.address)
    fcntl.flock(file, fcntl.LOCK_UN)
    wait_until(lambda: can_connect(box.address))
    assert box.run("-d", "0", "-o", "300", "--", "true").status == 98
    path, = (name for name in os.listdir(box.folder) if name.endswith(".lock"))
    assert read(box.path(path)).split()[3] == "1"
    if foreground:
        assert "waiting for the daemon with pid 4711 to end" in daemon.err


def test_a_lock_that_stays_held_is_an_error(dying):
    box, file = dying
    done = box.flomd("--no-files", *box.address, program=patched("flomd.HELD_FOR = 0.3")).end()
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
    assert file.name in done.err
    assert "4711" in done.err
    assert "127.0.0.1" in done.err


def test_where_somebody_answers_nobody_waits(box):
    box.address = ("-a", "127.0.0.1", "-p", str(free_port()), "--state-dir", box.folder)
    daemon = box.daemon()
    began = time.monotonic()
    done = box.flomd("--no-files", *box.address).end()
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
    assert f"another daemon (pid {daemon.pid}) serves 127.0.0.1 port " in done.err
    assert time.monotonic() - began < flomd.HELD_FOR


def test_a_successor_that_waited_knows_who_holds(box):
    """Its predecessor answers no more, and ends later; nobody waits for a window."""
    box.address = ("-a", "127.0.0.1", "-p", str(free_port()), "--state-dir", box.folder)
    first = box.daemon()
    holder, gate = box.hold("a")
    first.send_signal(signal.SIGSTOP)
    second = box.flomd("-f", "--no-files", *box.address)
    box.foreground.append(second)
    wait_until(lambda: "waiting for the daemon" in second.err)
    box.kill(first.pid)
    wait_until(lambda: "serving" in second.err)
    assert "window" not in json.loads(box.run("--status", "--json").out)["daemon"]
    assert box.run("-d", "0", "-r", "R2", "-o", "0", "--", "true").status == 0
    assert box.run("-d", "0", "-o", "0", "--", "true").status == 98
    gate.open()
    assert holder.end().status == 0


# Without a state

NOWHERE = "flomd.state_paths = lambda settings: (None, '/nonexistent/state')"


def test_without_a_state_no_token_is_of_the_second_of_the_start(box):
    """Two daemons in a row have none, and the second one starts as soon as it can."""
    box.address = ("-a", "127.0.0.1", "-p", str(free_port()))
    tokens = []
    for _ in range(2):
        daemon = box.daemon(program=patched(NOWHERE))
        assert "nothing will be remembered" in daemon.err
        tokens.append(int(box.run("-d", "0", *TELL).out))
        assert tokens[-1] >> 32 < seconds()
        box.kill(daemon.pid)
    assert tokens[0] >> 32 < tokens[1] >> 32


# Tokens rise

def token(box, *options):
    return int(box.run("-d", "0", *options, *TELL).out)


def test_tokens_rise_over_a_reclaim_of_one_that_lay_ahead(box):
    daemon = box.daemon()
    ahead = token(box) + (80000 << 32)
    with FlomClient(*endpoint(box.address)) as client:
        client.socket.sendall(message(
            LOCK, 8, f'<session peerid="{PEER}" client="flom.py/1.0" id="0123456789abcdef" '
            f'key="0123456789abcdef"/><resource name="{b64("_RESOURCE")}" mode="5" wait="0" '
            f'create="1" lifespan="0" reclaim="{ahead}"/>'))
        client.name, told = "_RESOURCE", parse(client.receive())["answer"]
        assert told["rc"] == "0"
        client.release()
    before = token(box)
    assert before > ahead
    box.kill(daemon.pid)
    box.daemon("--recovery-window", "0")
    assert token(box) > before


WRONG = "real = flomd.time.time\nflomd.time.time = lambda: real() + 3 * 86400"


def test_tokens_rise_after_a_start_with_a_wrong_clock(box):
    """And what was granted meanwhile can be reclaimed."""
    daemon = box.daemon(program=patched(WRONG))
    holder, gate = box.hold("a", "-r", "R1", "-d", "0")
    before = token(box)
    box.kill(daemon.pid)
    box.daemon()
    wait_until(lambda: "R1" in box.run("--status").out)
    assert token(box) > before
    gate.open()
    assert holder.end().status == 0


def test_tokens_rise_though_somebody_has_written_to_the_state(box):
    """Anybody may write to that of a shared socket."""
    daemon = box.daemon(program=patched(WRONG))
    before = token(box)
    box.kill(daemon.pid)
    box.write("s.lock", record())
    box.daemon()
    assert token(box) > before


# A write that fails when it matters

FAILING = """
real, failures = flomd.os.pwrite, [1] * {times}
def pwrite(number, data, place):
    path = flomd.os.readlink(f"/proc/self/fd/{{number}}")
    if failures and place > {after} and any(part in path for part in {parts}):
        failures.pop()
        raise OSError(28, "No space left on device")
    return real(number, data, place)
flomd.os.pwrite = pwrite
"""


def failing(*parts, times=10 ** 6, after=0):
    """A daemon whose writes to these files fail, behind so many bytes: its first ones work."""
    return patched(FAILING.format(times=times, after=after, parts=parts))


def journal_of(box):
    return read(box.socket + ".journal")


def test_who_is_granted_is_told_though_the_journal_cannot_be_written(box):
    """The mark takes its place, until it was rewritten."""
    daemon = box.daemon(program=failing(".journal", times=2))
    holder, gate = box.hold("a")
    line = f"cannot write {box.socket}.journal: No space left on device"
    assert daemon.err.count("cannot write") == 1 and line in daemon.err
    assert read(box.socket + ".lock").split()[3] == "1"
    other, other_gate = box.hold("b", "-r", "R2")
    for opened_gate in (gate, other_gate):
        opened_gate.open()
    assert (holder.end(), other.end()) == ((0, "", ""), (0, "", ""))


def test_the_mark_is_cleared_when_all_is_stored_again(box):
    change = failing(".journal", times=2)[1].replace("import flomd\n",
                                                     "import flomd\nflomd.RETRY = 0.1\n")
    daemon = box.daemon(program=("-c", change))
    holder, gate = box.hold("a")
    wait_until(lambda: f"{box.socket}.journal is written again" in daemon.err)
    assert read(box.socket + ".lock").split()[3] == "0"
    assert "h/" in journal_of(box)
    box.kill(daemon.pid)
    box.daemon()
    assert box.run("-d", "0", "-o", "0", "--", "true").status == 98
    gate.open()
    assert holder.end().status == 0


def test_who_can_write_neither_journal_nor_mark_grants_nothing(box):
    daemon = box.daemon(program=failing(".journal", ".lock"))
    done = box.run("-d", "0", "-o", "0", "--", "echo", "wrong")
    assert (done.status, done.out) == (99, "") and "the daemon refuses: " in done.err
    assert daemon.err.count("cannot write") == 1
    assert read(box.socket + ".lock").split()[3] == "0"


def test_with_a_state_dir_nothing_is_granted_that_cannot_be_stored(box):
    box.address = ("-s", box.socket, "--state-dir", box.folder)
    daemon = box.daemon(program=failing(".journal"))
    assert box.run("-d", "0", "-o", "0", "--", "true", address=("-s", box.socket)).status == 98
    assert "cannot write" in daemon.err
