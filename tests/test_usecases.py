"""The published use cases of FLoM on one host: real clients, a real daemon, order proven by a log.

A test that begins with a number shows the use case that has it in FLoM's documentation; its first
line says which promise that is.  Those of the other kinds of resources are in
test_usecases_kinds.py, those of several hosts in test_multi_host.py.
"""
import os
import shutil
import signal

import pytest
from world import FLOM_PY, FLOMD_PY, is_busy, pass_time, wait_until


def end(*processes):
    for process in processes:
        assert process.end()[::2] == (0, ""), process.args


def test_1_one_command_after_another(box):
    """Use case 1: whoever comes second waits until the first one's command has ended."""
    sleep, gate = box.hold("sleep")
    ls = box.waiter("--", *box.note("ls"))
    assert box.events() == ["sleep start"]
    gate.open()
    end(sleep)
    assert ls.end().status == 0
    assert box.events() == ["sleep start", "sleep end", "ls"]


def test_2_independent_resources(box):
    """Use case 2: who waits for one resource does not wait for the holder of another."""
    sleep1, gate1 = box.hold("R1", "-r", "R1")
    ls = box.waiter("-r", "R1", "--", *box.note("ls"))
    sleep2, gate2 = box.hold("R2", "-r", "R2")
    hello = box.waiter("-r", "R2", "--", *box.note("Hello"))
    gate2.open()
    end(sleep2)
    assert hello.end().status == 0
    assert ls.poll() is None
    gate1.open()
    end(sleep1)
    assert ls.end().status == 0
    assert box.events() == ["R1 start", "R2 start", "R2 end", "Hello", "R1 end", "ls"]


def test_3_do_not_wait(box):
    """Use case 3: a time-out of 0 asks once; busy is said, and has a status of its own."""
    sleep, gate = box.hold("sleep")
    assert is_busy(box.run("--resource-timeout=0", "--", "echo", "x"))
    assert is_busy(box.run("-o", "0", "--busy-status", "7", "--", "echo", "x"), 7)
    gate.open()
    end(sleep)
    assert box.run("--resource-timeout=0", "--", "echo", "x") == (0, "x\n", "")


def test_4_wait_for_a_limited_time(box):
    """Use case 4: after so many milliseconds the client gives up, and says so."""
    sleep, gate = box.hold("sleep")
    expired = "The lock was not obtained because timeout (400 milliseconds) expired\n"
    assert box.run("--resource-timeout=400", "--", "echo", "x") == (98, "", expired)
    patient = box.waiter("--resource-timeout=60000", "--", *box.note("patient"))
    gate.open()
    end(sleep)
    assert patient.end().status == 0
    assert box.events() == ["sleep start", "sleep end", "patient"]


def test_5_shared_modes(box):
    """Use case 5: readers (PR) run together, a writer waits until they have ended."""
    reader, gate = box.hold("reader", "--lock-mode=PR")
    assert box.run("--lock-mode=PR", "--", "echo", "x") == (0, "x\n", "")
    writer = box.waiter("--", *box.note("writer"))
    gate.open()
    end(reader)
    assert writer.end().status == 0
    assert box.events() == ["reader start", "reader end", "writer"]


def test_5_a_writer_is_not_overtaken_and_readers_go_together(box):
    """Use case 5, in the queue: a reader that comes later stays behind the writer."""
    reader, gate = box.hold("reader", "-l", "PR")
    writer_gate, late_gates = box.gate("writer"), [box.gate(name) for name in ("one", "two")]
    writer = box.waiter("-l", "EX", "--", *writer_gate.command)
    late = [box.waiter("-l", "PR", "--", *gate.command) for gate in late_gates]
    gate.open()
    end(reader)
    writer_gate.wait()
    assert box.events() == ["reader start", "reader end", "writer start"]
    writer_gate.open()
    for gate in late_gates:
        gate.wait()  # both have started, none has ended
    for gate in late_gates:
        gate.open()
    assert [process.end().status for process in [writer] + late] == [0, 0, 0]
    assert box.events().index("writer end") == 3


def as_user(user, number, python, scripts):
    """Makes a box that of another user, who runs copies of the scripts that all can read."""
    os.chmod(user.folder, 0o777)
    os.chown(user.folder, number, number)

    def become():
        os.setgroups([])
        os.setgid(number)
        os.setuid(number)

    def start(script, *args):
        return user.start(python, os.path.join(scripts, script), *args, preexec_fn=become)

    user.number, user.default, user.start_as = number, f"/tmp/flom-{number}", start


@pytest.fixture
def users(boxes):
    """Two boxes of two users."""
    python = shutil.which("python3", path=os.defpath)
    if os.geteuid() != 0:
        pytest.skip("only root can be two users")
    if python is None:
        pytest.skip(f"no python3 in {os.defpath} that every user can run")
    users = [boxes.make(), boxes.make()]
    for number, user in enumerate(users, 100000 + 2 * os.getpid()):
        as_user(user, number, python, users[0].folder)
    for script in (FLOM_PY, FLOMD_PY):
        shutil.copy(script, users[0].folder)
    yield users
    for user in users:
        for pid in user.daemons():
            user.kill(pid)
        for path in (user.default, user.default + ".lock"):
            if os.path.exists(path):
                os.unlink(path)


@pytest.mark.parametrize("shared", [True, False])
def test_6_several_users(users, shared):
    """Use case 6: with one socket the users of a host wait for each other; the default socket is
    each user's own."""
    a, b = users
    address = ("--socket-name=" + a.socket,) if shared else ()
    gate = a.gate("a")
    os.chmod(gate.fifo, 0o666)
    first = a.start_as("flom.py", *address, "-d", "500", "--", *gate.command)
    wait_until(lambda: gate.started() or first.poll() is not None)
    assert gate.started(), first.end()
    echo = [*address, "-d", "500", "-o", "0", "--", "echo", "x"]
    second = b.start_as("flom.py", *echo).end()
    assert is_busy(second) if shared else second == (0, "x\n", "")
    gate.open()
    end(first)
    assert b.start_as("flom.py", *echo).end() == (0, "x\n", "")
    for user in users:
        assert os.path.exists(user.default) != shared
        for pid in user.daemons():
            user.kill(pid, signal.SIGTERM)
        assert not os.path.exists(user.default)


def test_6_a_stranger_on_ones_own_socket_is_refused(users):
    """Use case 6, abused: another user's daemon there could grant anything to anybody."""
    a, b = users
    assert b.start_as("flomd.py", "-s", a.default).end() == (0, "", "")
    done = a.start_as("flom.py", "-o", "0", "--", "echo", "x").end()
    assert done[:2] == (99, "")
    assert str(b.number) in done.err
    assert done.err.count("\n") == 1


def test_14_files_as_simple_names(box):
    """Use case 14, with names that stand for files: only who works on the same file waits."""
    sleep, gate = box.hold("sleep", "-r", "foobar")
    other, other_gate = box.hold("other", "-r", "foobaz")
    ls = box.waiter("-r", "foobar", "--", *box.note("ls"))
    gate.open()
    end(sleep)
    assert ls.end().status == 0
    other_gate.open()
    end(other)
    assert box.events() == ["sleep start", "other start", "sleep end", "ls", "other end"]


def test_16_wait_for_something_not_yet_started(box):
    """Use case 16: with create=no a command waits until somebody else has begun."""
    box.daemon()
    late = box.waiter("--resource-create=no", "--", *box.note("late"))
    early, gate = box.hold("early")
    gate.open()
    end(early)
    assert late.end().status == 0
    assert box.events() == ["early start", "early end", "late"]


def test_16_in_reverse(box):
    """Use case 16, the other way round: while the resource lives (2 s after its last use)
    create=no runs, then it waits."""
    assert box.run("--", *box.note("creator")).status == 0
    assert box.run("--resource-create=no", "--", *box.note("next")).status == 0
    late = box.flom("--resource-create=no", "-o", "4000", "--", *box.note("late"))
    assert late.end().status == 0
    assert box.run("-e", "no", "-o", "0", "-r", "R1", "--", "true")[:2] == (96, "")


def test_17_a_resource_that_outlives_its_users(box):
    """Use case 17: after 2 s only resources with a longer idle lifespan are left; a use prolongs
    it."""
    assert box.run("-r", "R2", "--", "true").status == 0
    for name in ("R1", "R3"):
        assert box.run("--resource-idle-lifespan=5000", "-r", name, "--", "true").status == 0

    def use(name):
        return box.run("--resource-create=no", "-o", "0", "-r", name, "--", "true").status

    def has_ended(name):
        """Asked after R1 was used once more: it would have ended meanwhile, too."""
        pass_time(0.4)
        assert use("R1") == 0
        return name not in box.run("--status").out
    for name in ("R2", "R3"):
        wait_until(lambda: has_ended(name))
        assert use(name) == 96
    expired = "The lock was not obtained because timeout (1000 milliseconds) expired\n"
    late = box.run("--resource-create=no", "-o", "1000", "-r", "R3", "--", "echo", "x")
    assert late == (98, "", expired)
