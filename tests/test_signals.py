"""Signals sent to flom, at every point of its life, and typed at a terminal.

Whom they reach, how often, flom's status, and that no other command runs under the lock meanwhile.
"""
import os
import re
import shutil
import signal
import sys

import pytest
from commands import PATIENT, Counter, Terminal, count, driven, pending, pipeline, state
from world import FLOM, PYTHON, comm, read, wait_until

SIX = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1,
       signal.SIGUSR2]
NAMES = {number: number.name[3:] for number in SIX}
AGAIN = 'kill -0 "$1" 2>/dev/null && echo "overlaps $0" >>"$2"; echo "next $0" >>"$2"'


def next_one(box, name, pid):
    """A waiter for the resource `name` that logs whether process `pid` still runs beside it."""
    return box.waiter("-r", name, "--", "/bin/sh", "-c", AGAIN, name, str(pid), box.log)


def died_of(number):
    """flom's end after a command that a signal killed: of INT it dies itself."""
    return -number if number == signal.SIGINT else 128 + number


def all_end(waiters):
    for waiter in waiters:
        assert waiter.end().status == 0, waiter.err


def test_while_waiting(box):
    """The default action: flom ends, out of the queue, and its command never runs."""
    holder, gate = box.hold("a")
    waiters = {number: box.waiter("--", *box.note(NAMES[number])) for number in SIX}
    last = box.waiter("--", *box.note("last"))
    for number, waiter in waiters.items():
        waiter.send_signal(number)
        status, _, err = waiter.end()
        assert status == -number and "Traceback" not in err
    gate.open()
    all_end([holder, last])
    assert box.events() == ["a start", "a end", "last"]


# The places between the grant and the exec at which flom, or its child, is held.
PLACES = {
    "before the fork": "fork = os.fork; os.fork = lambda: (hold({there!r}, {gate!r}), fork())[1]",
    "after the fork": "fork = os.fork; os.fork = lambda: fork() or hold({there!r}, {gate!r}) or 0",
    "before the exec": "os.execve = lambda *_: hold({there!r}, {gate!r})"}


@pytest.mark.parametrize("place", PLACES)
def test_between_the_grant_and_the_exec(box, place):
    """The child gets the signal, and what the command would do it does: it dies, with its lock."""
    box.daemon()
    held = {}
    for number, name in NAMES.items():
        door, gate, there = box.gate(f"door.{name}"), box.gate(name), box.path(f"there.{name}")
        code = PLACES[place].format(there=there, gate=door.fifo)
        held[number] = driven(box, code, "-r", name, "--", *gate.command), door, there
    waiters = []
    for number, (flom, door, there) in held.items():
        wait_until(lambda: os.path.exists(there) or flom.poll() is not None)
        pid = int(read(there))
        waiters.append(next_one(box, NAMES[number], pid if pid != flom.pid else 2 ** 22 + 1))
        flom.send_signal(number)
        if place != "before the exec":  # the signal is blocked there: it waits for whom it is for
            wait_until(lambda: pending(pid, number))
            door.open()
        status, out, err = flom.end()
        assert (status, out) == (died_of(number), "")
        # dash -c catches INT, and may have a word to say when it has come during open()
        assert re.sub(".*: Interrupted system call\n", "", err) == ""
    all_end(waiters)
    events = [line for line in box.events() if " start" not in line]
    assert sorted(events) == sorted(f"next {name}" for name in NAMES.values())


def test_while_the_command_runs(box):
    """Each is passed on once; flom goes on holding until the command ends."""
    runs = {number: count(box, name, "-r", name) for number, name in NAMES.items()}
    waiters = [next_one(box, NAMES[number], counter.pid()) for number, (_, counter) in runs.items()]
    for number, (flom, counter) in runs.items():
        flom.send_signal(number)
        wait_until(counter.signals)
        flom.send_signal(signal.SIGUSR1)
        wait_until(lambda: len(counter.signals()) == 2)
    assert box.events() == []
    for number, (flom, counter) in runs.items():
        assert flom.poll() is None
        counter.open()
        assert flom.end() == (0, "", "")
        assert counter.signals() == [number, signal.SIGUSR1]
    all_end(waiters)
    assert len(box.events()) == len(SIX)


def test_a_command_that_a_signal_ends(box):
    """128 + n, after which the lock is free at once."""
    runs = {number: box.hold(name, "-r", name)[0] for number, name in NAMES.items()}
    for number, flom in runs.items():
        flom.send_signal(number)
        assert flom.end()[:2] == (died_of(number), "")  # sh may have a word on stderr
        assert box.run("-r", NAMES[number], "-o", "0", "--", "true").status == 0


def test_every_signal_that_would_end_flom(box):
    """It is passed on; not PIPE and XFSZ, which Python ignores, and not faults of flom itself."""
    flom, counter = count(box, "a")
    others = "ALRM VTALRM PROF XCPU PWR IO ABRT RTMIN RTMAX".split()
    stack_fault = 16  # without a name before Python 3.11
    expected = []
    for number in [signal.Signals["SIG" + name] for name in others] + [stack_fault]:
        flom.send_signal(number)
        expected.append(number)
        wait_until(lambda: counter.signals() == expected)
    counter.open()
    assert flom.end() == (0, "", "")


def test_an_alarm_that_was_set_before(box):
    """As some set a limit: perl -e 'alarm 1; exec @ARGV' flom ...; it reaches the command."""
    for seconds in (1, 4, 16):
        counter = Counter(box, f"a{seconds}")
        flom = box.flom("--", *counter.command, preexec_fn=lambda: signal.alarm(seconds))
        wait_until(lambda: counter.signals() == [signal.SIGALRM] or flom.poll() is not None, 30)
        if flom.poll() is None:
            break  # else Python had not started yet
    assert flom.poll() is None
    counter.open()
    assert flom.end() == (0, "", "")


def test_a_command_of_another_user(box):
    """As behind sudo: it cannot be signalled; that is said once, and flom goes on holding."""
    counter = Counter(box, "a")
    code = ("def refuse(pid, number): raise PermissionError(1, os.strerror(1))"
            "\nos.kill = refuse")
    flom = driven(box, code, "--", *counter.command)
    counter.wait()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        flom.send_signal(number)
        wait_until(lambda: flom.err and not pending(flom.pid, number))
    assert box.run("-o", "0", "--", "true").status == 98
    counter.open()
    assert flom.end()[:2] == (0, "") and counter.signals() == []
    complaint = f"flom: cannot signal {sys.executable!r}: Operation not permitted\n"
    assert flom.err == complaint


# What is left of a command that a signal killed

def has_its_shell(box):
    """Whether the shell of a pipeline() runs."""
    return any(line.startswith('/bin/sh -c "$@" | cat') for line in box.running().values())


def test_a_pipeline_whose_shell_is_killed(box):
    """The lock is held until the last of it has ended."""
    gate = box.gate("a")
    flom = box.flom("--", *pipeline(gate))
    gate.wait()
    waiter = box.waiter("--", *box.note("b"))
    flom.send_signal(signal.SIGTERM)
    wait_until(lambda: not has_its_shell(box))
    assert box.run("-o", "0", "--", "true").status == 98
    gate.open()
    assert flom.end() == (143, "", "")
    assert waiter.end().status == 0 and box.events() == ["a start", "a end", "b"]


def test_a_pipeline_whose_daemon_vanishes_after_its_shell_was_killed(box):
    """The lock is reclaimed as while the command runs."""
    gate, daemon = box.gate("a"), box.daemon()
    flom = driven(box, PATIENT, "-d", "-1", "--", *pipeline(gate))
    gate.wait()
    flom.send_signal(signal.SIGTERM)
    wait_until(lambda: not has_its_shell(box))
    box.kill(daemon.pid)
    assert box.run("-d", "-1", "-o", "0", "--", "true").status == 98
    gate.open()
    assert flom.end() == (143, "", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_second_signal_ends_flom_at_once(box, number):
    """With the status of the command, and without the lock; what is left runs on."""
    gate = box.gate("a")
    flom = box.flom("--", *pipeline(gate))
    gate.wait()
    flom.send_signal(signal.SIGUSR1)
    wait_until(lambda: not has_its_shell(box))
    flom.send_signal(signal.SIGUSR2)
    assert box.run("-o", "0", "--", "true").status == 98
    flom.send_signal(number)
    assert flom.end() == (128 + signal.SIGUSR1, "", "")
    assert box.run("-o", "0", "--", "true").status == 0
    gate.open()


def test_a_pipeline_without_what_it_would_inherit(box):
    gate = box.gate("a")
    flom = box.flom("--inherit-connection", "no", "--", *pipeline(gate))
    gate.wait()
    flom.send_signal(signal.SIGTERM)
    assert flom.end() == (143, "", "")
    assert box.run("-o", "0", "--", "true").status == 0
    gate.open()


def test_a_pipeline_that_a_signal_to_its_group_ends(box):
    """The signal that came with the command's end does not count as a second one."""
    gate = box.gate("a")
    gate.command[2] = "trap '' TERM; " + gate.command[2]
    flom = box.flom("--", *pipeline(gate), preexec_fn=os.setpgrp)
    gate.wait()
    os.killpg(flom.pid, signal.SIGTERM)
    wait_until(lambda: not has_its_shell(box))
    assert box.run("-o", "0", "--", "true").status == 98
    gate.open()
    assert flom.end() == (143, "", "")


def test_many_signals_in_a_row(box):
    """None is lost, none comes twice, in whatever order they are sent."""
    flom, counter = count(box, "a")
    sent = (SIX + SIX[::-1]) * 4
    for number, following in zip(sent, sent[1:] + [None]):
        if number != following:
            expected = len(counter.signals()) + 1
            flom.send_signal(number)
            wait_until(lambda: len(counter.signals()) >= expected)
    counter.open()
    assert flom.end() == (0, "", "")
    assert counter.signals() == [number for number, following in zip(sent, sent[1:] + [None])
                                 if number != following]


# The system lets TSTP stop nobody in a group of processes whose parents are all in other sessions,
# as those of a job without a terminal are: these flom get a group of their own.


def test_stop_and_continue_by_kill(box):
    """TSTP is passed on, then flom stops; CONT continues it and is passed on."""
    flom, counter = count(box, "a", preexec_fn=os.setpgrp)
    expected = []
    for number in [signal.SIGTSTP, signal.SIGCONT] * 3:
        flom.send_signal(number)
        expected.append(number)
        wait_until(lambda: counter.signals() == expected)
        wait_until(lambda: (state(flom.pid) == "T") == (number == signal.SIGTSTP))
    counter.open()
    assert flom.end() == (0, "", "")
    assert counter.signals() == expected


def test_a_stopped_flom_keeps_its_lock(box):
    flom, counter = count(box, "a", preexec_fn=os.setpgrp)
    flom.send_signal(signal.SIGTSTP)
    wait_until(lambda: state(flom.pid) == "T")
    counter.open()
    wait_until(counter.ended)
    assert box.run("-o", "0", "--", "true").status == 98
    flom.send_signal(signal.SIGCONT)
    assert flom.end() == (0, "", "")
    assert box.run("-o", "0", "--", "true").status == 0


def test_stop_and_continue_while_the_lock_is_held_on(box):
    flom = box.flom("--min-hold", "60000", "--", *box.note("a"), preexec_fn=os.setpgrp)
    wait_until(lambda: box.events() == ["a"] and len(box.running()) == 2)
    for _ in range(2):
        flom.send_signal(signal.SIGTSTP)
        wait_until(lambda: state(flom.pid) == "T")
        assert box.run("-o", "0", "--", "true").status == 98
        flom.send_signal(signal.SIGCONT)
        wait_until(lambda: state(flom.pid) != "T")
    flom.send_signal(signal.SIGTERM)
    assert flom.end() == (0, "", "")


# --ignore-signal

IGNORED = [word for name in ("TERM", "SIGHUP", "usr1") for word in ("--ignore-signal", name)]


def test_ignored_signals(box):
    """flom neither dies of them nor passes them on; the command still has their default action."""
    flom, counter = count(box, "a", *IGNORED)
    waiter = box.waiter(*IGNORED, "--", "grep", "SigIgn", "/proc/self/status")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        flom.send_signal(number)
        waiter.send_signal(number)
    flom.send_signal(signal.SIGUSR2)
    wait_until(counter.signals)
    counter.open()
    assert flom.end() == (0, "", "")
    assert counter.signals() == [signal.SIGUSR2]
    status, out, _ = waiter.end()
    ignored = int(out.splitlines()[-1].split()[1], 16)
    assert status == 0 and not ignored & sum(1 << number - 1 for number in SIX)


def test_what_was_ignored_at_the_start(box):
    """It stays ignored in the command, and is not passed on."""
    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    flom, counter = count(box, "a", preexec_fn=ignore)
    flom.send_signal(signal.SIGHUP)
    flom.send_signal(signal.SIGUSR2)
    wait_until(counter.signals)
    counter.open()
    assert flom.end() == (0, "", "") and counter.signals() == [signal.SIGUSR2]
    flom, gate = box.hold("b", preexec_fn=ignore)
    flom.send_signal(signal.SIGHUP)
    gate.open()
    assert flom.end() == (0, "", "")
    done = box.run("--", "sh", "-c", "kill -HUP $$; echo alive", preexec_fn=ignore)
    assert done == (0, "alive\n", "")


@pytest.mark.parametrize("name", ["KILL", "STOP"])
def test_what_cannot_be_ignored(box, name):
    warning = f"flom: warning: SIG{name} cannot be ignored\n"
    assert box.run("--ignore-signal", name, "--", "true") == (0, "", warning)


# SIGKILL

def test_flom_killed_while_its_command_runs(box):
    """Whoever comes second waits until the command has ended."""
    holder, gate = box.hold("a")
    box.kill(holder.pid)
    second = box.waiter("--", *box.note("b"))
    assert box.run("-o", "0", "--", "true").status == 98
    gate.open()
    assert second.end().status == 0
    assert box.events() == ["a start", "a end", "b"]


BACKGROUND = 'exec "$@" & read _ <"$0" || :'


def test_a_process_in_the_background_keeps_nothing(box):
    """It outlives the command that started it."""
    gate, door = box.gate("grandchild"), box.gate("door")
    flom = box.flom("--", "/bin/sh", "-c", BACKGROUND, door.fifo, *gate.command)
    gate.wait()
    door.open()
    assert flom.end() == (0, "", "")
    assert box.run("-o", "0", "--", "true").status == 0
    gate.open()
    wait_until(lambda: box.events()[-1:] == ["grandchild end"])


def test_a_process_in_the_background_of_a_killed_flom_keeps_the_lock(box):
    gate, door = box.gate("grandchild"), box.gate("door")
    flom = box.flom("--", "/bin/sh", "-c", BACKGROUND, door.fifo, *gate.command)
    gate.wait()
    box.kill(flom.pid)
    door.open()
    assert box.run("-o", "0", "--", "true").status == 98
    gate.open()
    assert box.run("-o", "5000", "--", "true").status == 0
    assert box.events()[-1:] == ["grandchild end"]


# Typed at a terminal, which sends to the whole process group

@pytest.fixture
def terminal(box):
    """terminal(command, options, …): flom with this command in the foreground of a terminal."""
    made = []

    def make(command, *options, **more):
        box.daemons() or box.daemon()
        name = f"terminal{len(made)}"
        argv = [*PYTHON, FLOM, *box.address, *options, "--", *command]
        made.append(Terminal(box, argv, name, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


KEYS = {signal.SIGINT: b"\x03", signal.SIGQUIT: b"\x1c", signal.SIGTSTP: b"\x1a"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_typed_while_the_command_runs(box, terminal, number):
    """The command gets it once, from the terminal; one that dies of INT takes flom along."""
    counter, gate = Counter(box, "a"), box.gate("b")
    patient, other = terminal(counter.command, "-r", "a"), terminal(gate.command, "-r", "b")
    counter.wait()
    gate.wait()
    patient.type(KEYS[number])
    other.type(KEYS[number])
    wait_until(counter.signals)
    assert other.process.end().status == 0
    assert other.events()[-1] == {signal.SIGINT: "killed 2", signal.SIGQUIT: "status 131"}[number]
    assert box.run("-r", "a", "-o", "0", "--", "true").status == 98
    counter.open()
    assert patient.process.end().status == 0
    assert patient.events()[-1] == "status 0" and counter.signals() == [number]


def test_typed_while_waiting(box, terminal):
    holder, gate = box.hold("a")
    waiters = {number: terminal(box.note("wrong"), "-V") for number in KEYS}
    for number, waiter in waiters.items():
        wait_until(lambda: "waiting for" in waiter.process.err)
        waiter.type(KEYS[number])
    for number in (signal.SIGINT, signal.SIGQUIT):
        assert waiters[number].process.end().status == 0
        assert waiters[number].events()[-1] == f"killed {int(number)}"
    stopped = waiters[signal.SIGTSTP]
    wait_until(lambda: stopped.events()[-1:] == ["stopped"])
    gate.open()
    assert holder.end().status == 0
    stopped.go_on()
    assert stopped.process.end().status == 0 and stopped.events()[-1] == "status 0"
    assert box.events() == ["a start", "a end", "wrong"]  # it was its turn


def test_typed_stop_then_continue(box, terminal):
    """Command and flom stop, and go on; a command that handles TSTP gets it once."""
    gate, counter = box.gate("a"), Counter(box, "b")
    plain, counting = terminal(gate.command, "-r", "a"), terminal(counter.command, "-r", "b")
    for one, command in ((plain, gate), (counting, counter)):
        command.wait()
        one.type(KEYS[signal.SIGTSTP])
        wait_until(lambda: one.events()[-1:] == ["stopped"])
    wait_until(counter.signals)  # a CONT would take away a TSTP that has not arrived yet
    commands = [pid for pid, line in box.running().items() if line.startswith("/bin/sh -c echo")]
    assert [state(pid) for pid in commands] == ["T"]
    for one in (plain, counting):
        one.go_on()
    wait_until(lambda: signal.SIGCONT in counter.signals())
    for one, command in ((plain, gate), (counting, counter)):
        command.open()
        assert one.process.end().status == 0 and one.events()[1:] == ["stopped", "status 0"]
    assert counter.signals().count(signal.SIGTSTP) == 1
    assert box.events() == ["a start", "a end"]


# As an interactive shell does: it gives the terminal to a group of its own, and stops itself.
SUSPENDING = """\
import os, signal, sys
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
os.setpgid(0, 0)
os.tcsetpgrp(0, os.getpid())
for word in sys.argv[2:]:
    os.kill(os.getpid(), getattr(signal, word))
    while os.tcgetpgrp(0) != os.getpgrp():
        pass
    with open(sys.argv[1], "a") as log:
        log.write("has the terminal\\n")
"""


@pytest.mark.parametrize("nested, words", [
    (False, ["SIGSTOP", "SIGTSTP", "SIGSTOP"]), (True, ["SIGSTOP"])])
def test_a_command_that_suspends_itself(box, terminal, nested, words):
    """Whoever waits for flom sees it stopped, and has the terminal; continued, the command has.

    (In a nested one each CONT to the group arrives twice, which a second stop might meet.)
    """
    command = [sys.executable, "-I", "-S", "-c", SUSPENDING, box.log, *words]
    inner = [*PYTHON, FLOM, *box.address, "-r", "b", "--"] if nested else []
    one = terminal(inner + command)
    for times in range(1, len(words) + 1):
        wait_until(lambda: one.events()[1:] == ["stopped"] * times)
        assert len(box.events()) == times - 1
        one.go_on()
    assert one.process.end().status == 0 and one.events()[-1] == "status 0"
    assert box.events() == ["has the terminal"] * len(words)


def test_a_command_that_suspends_itself_where_nobody_could_continue_it(box, terminal):
    """flom leads the session: it goes on, and so does the command."""
    command = [sys.executable, "-I", "-S", "-c", SUSPENDING, box.log, "SIGSTOP", "SIGSTOP"]
    one = terminal(command, shell=False)
    assert one.process.end().status == 0
    assert box.events() == ["has the terminal"] * 2


def test_a_command_that_is_stopped_without_a_terminal(box):
    """Who stops it will continue it, not flom."""
    flom, counter = count(box, "a", preexec_fn=os.setpgrp)
    os.kill(counter.pid(), signal.SIGSTOP)
    wait_until(lambda: state(counter.pid()) == "T")
    flom.send_signal(signal.SIGUSR1)
    wait_until(lambda: pending(counter.pid(), signal.SIGUSR1))
    assert state(flom.pid) != "T"
    os.kill(counter.pid(), signal.SIGCONT)
    wait_until(lambda: sorted(counter.signals()) == [signal.SIGUSR1, signal.SIGCONT])
    counter.open()
    assert flom.end() == (0, "", "")


@pytest.mark.parametrize("shell", [True, False], ids=["under a shell", "leading the session"])
def test_hang_up(box, terminal, shell):
    """The command gets HUP once, whoever leads the session: the system tells only the leader,
    and the rest when the leader has ended."""
    counter = Counter(box, "a")
    one = terminal(counter.command, shell=shell)
    counter.wait()
    one.hang_up()
    wait_until(lambda: signal.SIGHUP in counter.signals())
    assert box.run("-o", "0", "--", "true").status == 98
    counter.open()
    assert one.process.end().status == (-signal.SIGHUP if shell else 0)
    wait_until(lambda: "flom" not in map(comm, box.running()))
    assert counter.signals().count(signal.SIGHUP) == 1
    assert box.run("-o", "0", "--", "true").status == 0


# Process 1 of a container

@pytest.fixture
def container(box):
    """container(words, …): flom as process 1 of a namespace of processes; its pid as `first`."""
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
    unshare += [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    tried = box.start(*unshare, "true").end() if shutil.which("unshare") else None
    if not tried or tried.status:
        lack = f"namespaces of processes cannot be had: {tried and tried.err}"
        (pytest.fail if os.environ.get("FLOM_REQUIRE_NETNS") == "1" else pytest.skip)(lack)
    box.daemon()

    def make(*words):
        made = box.start(*unshare, *PYTHON, FLOM, *box.address, *words)
        made.first, = wait_until(
            lambda: children(box, made.pid) or made.poll() is not None and [None])
        return made

    return make


def children(box, parent):
    """The processes of a box that a process has started."""
    def parent_of(pid):
        try:
            return int(read(f"/proc/{pid}/stat").rpartition(")")[2].split()[1])
        except OSError:
            return None
    return [pid for pid in box.running() if parent_of(pid) == parent]


ORPHANS = """\
import os, sys
for _ in range(3):
    if not os.fork():
        os._exit(os.fork() and 0)
    os.wait()

def states():
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                yield file.read().rpartition(")")[2].split()[0]
        except OSError:
            pass

while "Z" in states():
    pass
sys.exit(6)
"""


def test_process_1_reaps(box, container):
    assert container("--", sys.executable, "-I", "-S", "-c", ORPHANS).end() == (6, "", "")


def test_process_1_ends_while_it_waits(box, container):
    holder, gate = box.hold("a")
    waiter = container("-V", "--", *box.note("wrong"))
    wait_until(lambda: "waiting for" in waiter.err)
    os.kill(waiter.first, signal.SIGTERM)
    assert waiter.end().status == 143
    gate.open()
    assert holder.end().status == 0 and box.events() == ["a start", "a end"]


def test_process_1_passes_signals_on(box, container):
    counter = Counter(box, "a")
    flom = container("--", *counter.command)
    counter.wait()
    for number in (signal.SIGTERM, signal.SIGALRM):
        os.kill(flom.first, number)
        wait_until(lambda: number in counter.signals())
    counter.open()
    assert flom.end() == (0, "", "") and counter.signals() == [signal.SIGTERM, signal.SIGALRM]
    for number in (signal.SIGINT, signal.SIGKILL):
        done = container("--", "sh", "-c", f"kill -{int(number)} $$").end()
        assert done == (128 + number, "", "")
