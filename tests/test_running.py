"""The command as flom runs it: its environment, descriptors and signals, what prevents it, and the
options that shape it; and the one deadline of -o.
"""
import os
import re
import resource
import shutil
import signal
import sys
import time

import pytest
from commands import count
from world import FLOM, FLOM_PY, FLOMD, FLOMD_PY, Gate, free_port, pass_time, read, wait_until

SHOW = ["sh", "-c", "env | grep ^FLOM_ | sort"]
OUTER = {f"FLOM_{name}": "outer" for name in ("RESOURCE", "MODE", "ELEMENT", "TOKEN", "SESSION")}


def variables(out):
    return dict(line.split("=", 1) for line in out.splitlines())


# The environment

KINDS = {  # what FLOM_MODE and FLOM_ELEMENT are
    "R1": ("PR", None), "/a/b c": ("PR", None), "pool[3]": (None, None),
    "red.green": (None, "red"), "_s_seq[1]": (None, "1"), "_S_seq[1]": (None, "1"),
    "_t_%H%M%S[1]": (None, "[0-9]{6}")}


@pytest.mark.parametrize("name", KINDS)
def test_each_variable_is_set_or_removed(box, name):
    """Never what an outer flom has set."""
    mode, element = KINDS[name]
    status, out, err = box.run("-r", name, "-l", "PR", "--", *SHOW, env=OUTER)
    found = variables(out)
    assert (status, err, found["FLOM_RESOURCE"], found.get("FLOM_MODE")) == (0, "", name, mode)
    assert re.fullmatch(element or "None", str(found.get("FLOM_ELEMENT")))
    assert int(found["FLOM_TOKEN"]) > 2 ** 32
    assert re.fullmatch("[0-9a-f]{16}", found["FLOM_SESSION"])


def test_a_nested_flom_adds_itself_to_the_chain(box):
    inner = [sys.executable, FLOM, *box.address, "-r", "R2", "--"]
    script = 'echo "$FLOM_SESSION $FLOM_TOKEN $FLOM_RESOURCE"; exec "$@"'
    shell = ["sh", "-c", script, "sh"]
    status, out, err = box.run("-r", "R1", "--", *shell, *inner, *shell, "true")
    (first, token1, name1), (chain, token2, name2) = map(str.split, out.splitlines())
    assert (status, err, name1, name2) == (0, "", "R1", "R2") and int(token1) < int(token2)
    assert chain.split(",")[1:] == [first] and re.fullmatch("[0-9a-f]{16},[0-9a-f]{16}", chain)


def test_set_env_no_tells_the_chain_alone(box):
    """Without the chain a deadlock below would not be found; nothing of an outer lock is left."""
    outer = dict(OUTER, FLOM_SESSION="0123456789abcdef")
    done = box.run("-r", "red.green", "--set-env", "no", "--", *SHOW, env=outer)
    (name, chain), = variables(done.out).items()
    assert name == "FLOM_SESSION" and chain.endswith(",0123456789abcdef")


def test_element_argument_no(box):
    echo = ("-r", "_s_seq[1]", "--", "echo", "x")
    assert box.run(*echo).out == "x 1\n"
    assert box.run("--element-argument", "no", *echo).out == "x\n"
    assert box.run(*echo).out == "x 3\n"


# Descriptors

DESCRIPTORS = """\
import os, stat
for name in sorted(map(int, os.listdir("/proc/self/fd"))):
    try:
        mode = os.fstat(name).st_mode
        print(name, "socket" if stat.S_ISSOCK(mode) else "pipe" if stat.S_ISFIFO(mode) else "other")
    except OSError:  # that of listdir
        pass
"""


def descriptors(box, *options, **more):
    done = box.run(*options, "--", sys.executable, "-I", "-S", "-c", DESCRIPTORS, **more)
    assert done[::2] == (0, ""), done
    found = [line.split() for line in done.out.splitlines() if line[:1].isdigit()]
    return {int(number): kind for number, kind in found if int(number) > 2}


@pytest.mark.parametrize("network", [False, True], ids=["local", "tcp"])
def test_nothing_but_the_connection_and_a_pipe_is_inherited(box, network):
    if network:
        box.address = ("-a", "127.0.0.1", "-p", str(free_port()), "--state-dir", box.folder)
    assert descriptors(box) == {64: "socket", 65: "pipe"}
    assert descriptors(box, "--inherit-connection", "no") == {}
    assert descriptors(box, "-V", "-T", box.path("trace"), "-r", "R2", "--set-env", "no",
                       "--inherit-connection", "no", "--element-argument", "no") == {}


def test_inheritable_descriptors_are_untouched(box):
    reading, writing = os.pipe()
    try:
        found = descriptors(box, "--inherit-connection", "no", pass_fds=[writing])
        assert found == {writing: "pipe"}
    finally:
        os.close(reading)
        os.close(writing)


def test_a_command_without_standard_files(box):
    """No descriptor of flom's takes the place of a closed one."""
    done = box.start("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, FLOM,
                     *box.address, "--", "sh", "-c", 'ls -l /proc/$$/fd >"$0"',
                     box.path("listed")).end()
    assert done.status == 0
    numbers = [int(line.split()[8]) for line in read(box.path("listed")).splitlines()[1:]]
    assert [number for number in numbers if number not in (1, 10)] == [64, 65], numbers


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_stdout_stops_no_job(box):
    """What flom tells of its doings may get lost; what it was asked for may not, silently."""
    def run(*args):
        return box.start("sh", "-c", 'exec "$@" >/dev/full', "sh", sys.executable, FLOM,
                         *box.address, *args).end()
    box.daemon()
    assert run("-V", "--", "touch", box.path("ran")).status == 0
    assert os.path.exists(box.path("ran"))
    for asked in ("--status", "--unique-id", "--signal-list"):
        assert run(asked) == (99, "", "flom: cannot write to stdout: No space left on device\n")


# Signal dispositions and mask

SETS = [shutil.which("grep"), "-E", "^Sig(Blk|Ign)", "/proc/self/status"]


def odd():
    """A process that blocks and ignores this and that."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR2, signal.SIGALRM])


@pytest.mark.parametrize("prepare", [None, odd])
def test_signals_as_flom_found_them(box, prepare):
    direct = box.start(*SETS, preexec_fn=prepare).end()
    assert direct.status == 0 and direct.out.count("Sig") == 2
    box.daemon()
    for options in ((), ("--ignore-signal", "TERM", "--ignore-signal", "INT"),
                    ("-r", "a.b", "--element-argument", "no")):
        assert box.run(*options, "--", *SETS, preexec_fn=prepare) == direct


def test_a_command_dies_of_a_broken_pipe(box):
    """Python ignores SIGPIPE; the command does not."""
    done = box.run("--", "sh", "-c", "yes | head -1; kill -PIPE $$")
    assert done == (128 + signal.SIGPIPE, "y\n", "")


# What prevents the command

def test_an_exec_failure_rolls_back_and_releases(box):
    take = ("-r", "_S_number[1]", "-o", "0", "--")
    assert box.run(*take, "echo").out == "1\n"
    script = box.write("script", "#!/no/such/interpreter\n")
    os.chmod(script, 0o755)
    for command, why in (("nosuchcommand", "No such file or directory"),
                         (script, "No such file or directory"), ("/", "Permission denied")):
        done = box.run(*take, command, env={"PATH": os.defpath})
        assert done == (97, "", f"flom: cannot execute {command!r}: {why}\n")
    assert box.run(*take, "sh", "-c", "exit 1").status == 1
    assert box.run(*take, "echo").out == "2\n"


def test_a_script_without_a_first_line(box):
    """As execvp does: /bin/sh runs it."""
    script = box.write("ls", 'echo "$0 $1"\n')
    os.chmod(script, 0o755)
    found_in = {"PATH": f"/nonexistent:{box.folder}:/usr/bin:/bin"}
    for word in (script, "ls"):
        assert box.run("--", word, "x", env=found_in) == (0, f"{script} x\n", "")


def test_no_process_can_be_had(box):
    """A limit on processes, which holds for root only when it is no longer root."""
    python = sys.executable if os.geteuid() else shutil.which("python3", path=os.defpath)
    if python is None:
        pytest.skip(f"no python3 in {os.defpath} that every user can run")
    for script in (FLOM_PY, FLOMD_PY):
        shutil.copy(script, box.folder)
    os.chmod(box.folder, 0o777)

    def limit():
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(64003)
            os.setuid(64003)

    box.daemon()
    take = ("-r", "_S_number[1]", "-o", "0", "--", "echo")
    done = box.start(python, box.path("flom.py"), *box.address, *take, preexec_fn=limit).end()
    assert done[:2] == (97, "") and done.err.count("\n") == 1
    assert done.err.startswith("flom: cannot execute 'echo': no process for it: ")
    assert box.run(*take).out == "1\n"


# --inherit-connection, --min-hold, --busy-status

def test_min_hold_keeps_the_lock_after_the_command(box):
    """So that a second host's clock may be late; the status is the command's."""
    began = time.monotonic()
    holder = box.flom("--min-hold", "1500", "--", "sh", "-c", 'echo ended >>"$0"; exit 3', box.log)
    wait_until(lambda: box.events() == ["ended"])
    assert box.run("-o", "0", "--", "true").status == 98
    assert holder.end() == (3, "", "") and 1.5 <= time.monotonic() - began < 4
    assert box.run("-o", "0", "--min-hold", "100", "--", "true").status == 0


def test_min_hold_counts_from_the_start_of_the_command(box):
    holder, gate = box.hold("a", "--min-hold", "2000")
    pass_time(2.1)
    gate.open()
    began = time.monotonic()
    assert holder.end() == (0, "", "") and time.monotonic() - began < 1.9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("known", [True, False])
def test_min_hold_ends_by_a_signal(box, number, known):
    """The command has ended, whether flom knows it yet or not."""
    began = time.monotonic()
    holder, gate = box.hold("a", "--min-hold", "60000")
    box.running()  # a process that is dying is one of those that were seen
    holder.send_signal(signal.SIGCONT if known else signal.SIGSTOP)
    gate.open()
    wait_until(lambda: set(box.running()) == {holder.pid, *box.daemons()})
    holder.send_signal(number)
    holder.send_signal(signal.SIGCONT)
    status, _, err = holder.end()
    assert (status in (0, 128 + number, -number), err) == (True, "")
    assert time.monotonic() - began < 30 and box.run("-o", "0", "--", "true").status == 0


def test_busy_status(box):
    chosen = 75
    holder, gate = box.hold("a")
    word = ("--busy-status", str(chosen))
    assert [box.run("-o", ms, *word, "--", "true").status for ms in ("0", "100")] == [chosen] * 2
    assert box.run("-e", "no", "-o", "0", "-r", "none", *word, "--", "true").status == 96
    gate.open()
    assert holder.end().status == 0
    assert box.run(*word, "--", "sh", "-c", "exit 98").status == 98


# The one deadline of -o

def expired(ms):
    return f"The lock was not obtained because timeout ({ms} milliseconds) expired\n"


def test_one_deadline_over_a_daemon_that_is_replaced(box):
    """The waiter asks again, and its time goes on."""
    pid = box.run("-d", "-1", "--", "true") and box.the_daemon()
    holder, gate = box.hold("a", "-d", "-1")
    began = time.monotonic()
    waiter = box.waiter("-d", "-1", "-o", "2000", "--", "true")
    box.kill(pid)
    wait_until(lambda: waiter.err.count("waiting for _RESOURCE, place 1") == 2)
    status, _, err = waiter.end()
    assert status == 98 and expired(2000)[:-1] in err
    assert 1.8 < time.monotonic() - began < 3.5
    gate.open()
    assert holder.end().status == 0


def test_one_deadline_over_waiting_for_a_resource_and_for_its_lock(box):
    box.daemon()
    began = time.monotonic()
    late = box.flom("-e", "no", "-o", "1500", "--", "true")
    status_of = box.waiter("-e", "no", "--", *box.note("b"))
    holder, gate = box.hold("a")
    status, _, err = late.end()
    assert (status, err) == (98, expired(1500)) and 1.4 < time.monotonic() - began < 3
    gate.open()
    assert holder.end().status == 0 and status_of.end().status == 0


def slow_daemon(box):
    """(environment, gate): a flomd that starts only when the gate is opened."""
    gate = Gate(box, "slow")
    run = f'exec {sys.executable} {FLOMD} "$@"'
    script = box.write("slow", f"#!/bin/sh\nread _ <{gate.fifo}\n{run}\n")
    os.chmod(script, 0o755)
    return {"FLOMD": script}, gate


def test_starting_a_daemon_is_not_cut_short(box):
    """The time is over when the request can be sent: it is sent, and does not wait."""
    environment, gate = slow_daemon(box)
    quick = box.flom("-o", "100", "--", "echo", "x", env=environment)
    zero = box.flom("-o", "0", "-r", "R2", "--", "echo", "x", env=environment)
    wait_until(lambda: sum("/bin/sh" in line for line in box.running().values()) == 2)
    pass_time(0.2)
    gate.open()
    wait_until(lambda: box.daemons())
    while quick.poll() is None or zero.poll() is None:
        gate._unblock()  # the other one's
        pass_time(0.01)
    assert quick.end() == zero.end() == (0, "x\n", "")


def test_a_time_that_is_over_meets_a_lock_that_is_held(box):
    holder, gate = box.hold("a")
    os.kill(box.the_daemon(), signal.SIGSTOP)
    late = box.flom("-o", "1000", "--", "echo", "wrong")
    pass_time(1.4)
    assert late.poll() is None
    os.kill(box.the_daemon(), signal.SIGCONT)
    assert late.end() == (98, "", expired(1000))
    gate.open()
    assert holder.end().status == 0


# The command's status when the daemon says nothing more

def test_a_status_is_kept_when_the_daemon_is_gone_at_the_end(box):
    daemon = box.daemon()
    holder, counter = count(box, "a", "-d", "0", "--on-lock-loss", "ignore")
    box.kill(daemon.pid)
    counter.open()
    assert holder.end() == (0, "", "")
