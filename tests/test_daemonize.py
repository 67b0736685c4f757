"""The daemon as a process: detached or not, readiness, pid file, one for a socket, its end."""
import contextlib
import fcntl
import os
import re
import signal
import socket
import stat
import subprocess

import flomd
import pytest
from fakes import FlomClient
from world import (COUNT, FLOMD, PYTHON, can_connect, comm, endpoint, free_port, limit_files,
                   patched, peer_pid, read, wait_until)


def detached(box, *options, **more):
    """Starts flomd.py, which detaches; returns the daemon's pid."""
    address = more.pop("address", box.address)
    done = box.flomd("--no-files", *address, *options, **more).end()
    assert done == (0, "", "")
    return box.the_daemon()


def files(pid):
    """{descriptor: what it is} of a process."""
    folder, found = f"/proc/{pid}/fd", {}
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found[int(name)] = os.readlink(os.path.join(folder, name))
    return found


def test_it_keeps_nothing_of_its_starter(box):
    reading, writing = os.pipe()
    pid = detached(box, pass_fds=[reading, writing], cwd=box.folder, stdin=reading)
    os.close(reading)
    os.close(writing)
    assert os.getsid(pid) not in (pid, os.getsid(0)) and os.getpgid(pid) != os.getpgid(0)
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    paths = {box.socket + ".lock", box.socket + ".journal"}

    def keeps_no_more():
        """That through which its starter was told is closed, and the journal gets its name, a
        moment later."""
        others = {name for number, name in files(pid).items() if number > 2}
        is_a_pipe = any(name.startswith("pipe:") for name in others)
        return not is_a_pipe and {name for name in others if name.startswith("/")} == paths

    wait_until(keeps_no_more)
    assert [files(pid)[number] for number in (0, 1, 2)] == ["/dev/null"] * 3
    assert comm(pid) == "flomd"


def test_one_started_by_a_client_keeps_nothing_either(box):
    environment = {"FLOM_SESSION": "1", "NOTIFY_SOCKET": "/tmp/x", "LISTEN_FDS": "1",
                   "LISTEN_PID": "1", "KEPT": "1"}
    assert box.run("--", "true", env=environment, cwd=box.folder) == (0, "", "")
    pid = box.the_daemon()
    names = [entry.partition("=")[0] for entry in read(f"/proc/{pid}/environ").split("\0")]
    assert "KEPT" in names and not set(environment) - {"KEPT"} & set(names)
    assert os.readlink(f"/proc/{pid}/cwd") == "/" and comm(pid) == "flomd"
    assert [files(pid)[number] for number in (0, 1, 2)] == ["/dev/null"] * 3
    assert peer_pid(box.socket) == pid


def test_it_starts_with_its_own_signals(box):
    """What its starter ignored or blocked is not so for the daemon."""
    def harden():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
    pid = detached(box, preexec_fn=harden)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not box.daemons())


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_its_starter_has_closed_standard_files(box, closed):
    flomd = [*PYTHON, FLOMD, "--no-files", *box.address]
    assert box.start("/bin/sh", "-c", f'"$@" {closed}', "sh", *flomd).end() == (0, "", "")
    pid = box.the_daemon()
    assert [files(pid)[number] for number in (0, 1, 2)] == ["/dev/null"] * 3
    assert box.run("-d", "0", "--", "echo", "x") == (0, "x\n", "")


def test_when_the_starter_has_ended_the_daemon_listens(box):
    for _ in range(COUNT.rounds):
        assert box.flomd("--no-files", "-s", box.socket).end() == (0, "", "")
        assert can_connect(box.address)
        os.kill(box.the_daemon(), signal.SIGTERM)
        wait_until(lambda: not box.daemons())


def test_a_starter_that_is_killed_takes_no_daemon_with_it(box):
    """It serves, and removes its socket at its end."""
    with open(box.socket + ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        starter = box.flomd("--no-files", "-s", box.socket)
        wait_until(lambda: len(box.daemons()) == 2)
        wait_until(lambda: [pid for pid in box.daemons() if pid != starter.pid
                            and box.socket + ".lock" in files(pid).values()])
        box.kill(starter.pid)
    wait_until(lambda: can_connect(box.address))
    assert box.run("-d", "0", "--", "echo", "x") == (0, "x\n", "")
    os.kill(box.the_daemon(), signal.SIGTERM)
    wait_until(lambda: not box.daemons())
    assert not os.path.exists(box.socket)


def test_relative_names_count_from_where_it_was_started(box):
    """On the command line and in a file; the daemon itself is in the root directory."""
    for name in ("tree", "state"):
        os.mkdir(box.path(name))
    conf = box.write("conf", "[Trace]\nDaemonTraceFile=log\n[Daemon]\nStateDir=state\n")
    done = box.flomd("-s", "socket", "-m", "tree", "-c", conf, cwd=box.folder).end()
    assert done == (0, "", "")
    wait_until(lambda: os.path.isdir(box.path("tree/status")))
    assert "serving" in read(box.path("log")) and os.listdir(box.path("state")) != []


def test_in_the_foreground_it_stays_and_logs_to_stderr(box):
    daemon = box.daemon()
    assert box.daemons() == [daemon.pid] == [peer_pid(box.socket)]
    wait_until(lambda: f"unix:{box.socket}" in daemon.err)
    daemon.send_signal(signal.SIGTERM)
    assert daemon.end().status == 0


def test_the_pid_file(box):
    path = box.path("pid")
    pid = detached(box, "--pid-file", path)
    assert read(path) == f"{pid}\n"
    assert box.run("-X").status == 0
    wait_until(lambda: not os.path.exists(path))


def test_the_pid_file_of_another_daemon_stays(box):
    path = box.path("pid")
    first = box.daemon("--pid-file", path)
    other = box.daemon("--pid-file", path, address=("-s", box.path("t")))
    wait_until(lambda: read(path) == f"{other.pid}\n")  # it accepts before it writes its pid
    first.send_signal(signal.SIGTERM)
    assert first.end().status == 0
    assert read(path) == f"{other.pid}\n"
    other.send_signal(signal.SIGTERM)
    assert other.end().status == 0
    assert not os.path.exists(path)


def test_no_pid_file_is_left_by_one_that_does_not_begin(box):
    path = box.path("pid")
    broken = patched("def begin(*_): raise flomd.CannotServe('no')\nflomd.begin = begin")
    done = box.flomd("-f", "--no-files", *box.address, "--pid-file", path, program=broken).end()
    assert done == (1, "", "flomd: no\n") and not os.path.exists(path)


@pytest.mark.parametrize("options, refused", [
    (["-f"], "socket.socketpair"), ([], "socket.socketpair"), ([], "os.fork"),
    (["-f"], "selectors.DefaultSelector")])
def test_what_the_system_refuses_at_the_start_is_one_line_and_status_1(box, options, refused):
    refuse = "def refuse(*_): raise OSError(24, 'Too many open files')"
    daemon = patched(f"{refuse}\nflomd.{refused} = refuse")
    status, out, err = box.flomd(*options, "--no-files", *box.address, program=daemon).end()
    assert (status, out) == (1, "") and err.count("\n") == 1 and "Too many open files" in err


def test_a_second_daemon_for_a_socket_is_refused(box):
    pid = detached(box)
    status, out, err = box.flomd("--no-files", "-s", box.socket).end()
    assert (status, out) == (1, "") and err.count("\n") == 1
    assert str(pid) in err and box.socket in err
    assert peer_pid(box.socket) == pid
    assert box.run("-d", "0", "--", "echo", "x") == (0, "x\n", "")


def test_in_the_foreground_it_waits_for_the_other_to_end(box):
    first = detached(box)
    second = box.flomd("-f", "--no-files", "-s", box.socket)
    box.foreground.append(second)
    wait_until(lambda: str(first) in second.err)
    assert peer_pid(box.socket) == first
    third = box.flomd("-f", "--no-files", "-s", box.socket)
    wait_until(lambda: str(first) in third.err)
    third.terminate()
    assert third.wait(timeout=10) == 0
    os.kill(first, signal.SIGTERM)
    wait_until(lambda: peer_pid(box.socket) == second.pid)


def test_a_stale_socket_is_replaced(box):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(box.socket)
    pid = detached(box)
    assert peer_pid(box.socket) == pid


def test_a_daemon_killed_is_replaced(box):
    box.kill(detached(box))
    assert os.path.exists(box.socket)
    assert box.run("--", "echo", "x") == (0, "x\n", "")


def test_a_live_socket_is_not_replaced(box):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as live:
        live.bind(box.socket)
        live.listen(5)
        status, out, err = box.flomd("--no-files", "-s", box.socket).end()
        assert (status, out) == (1, "")
        assert err.count("\n") == 1
        assert box.socket in err
        assert peer_pid(box.socket) == os.getpid()
    os.unlink(box.socket)


def test_what_is_no_socket_is_not_replaced(box):
    box.write("s", "precious")
    status, _, err = box.flomd("--no-files", "-s", box.socket).end()
    assert status == 1
    assert err.count("\n") == 1
    assert box.socket in err
    assert read(box.socket) == "precious"


def test_a_lock_file_that_is_a_link_is_refused(box):
    box.write("target", "")
    os.symlink(box.path("target"), box.socket + ".lock")
    status, _, err = box.flomd("--no-files", "-s", box.socket).end()
    assert status == 1
    assert err.count("\n") == 1
    assert box.socket + ".lock" in err
    assert read(box.path("target")) == ""


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_path_that_is_not_ascii(box, locale):
    folder = box.path("\xe9")
    os.mkdir(folder)
    box.address = ("-s", os.path.join(folder, "s"))
    daemon = box.start("env", f"LC_ALL={locale}", *PYTHON, FLOMD, "-f", "--no-files", *box.address)
    box.foreground.append(daemon)
    wait_until(lambda: can_connect(box.address))
    assert box.run("-d", "0", "--", "echo", "x") == (0, "x\n", "")
    assert "?/s" in box.run("--status", "--json").out and "Traceback" not in daemon.err


# Sockets that an init system hands over

def handed_over(box, given, *options, count="1"):
    """flomd.py with a socket as descriptor 3."""
    script = f'LISTEN_PID=$$ LISTEN_FDS={count} exec "$@"'
    return box.start("/bin/sh", "-c", script, "sh", *PYTHON, FLOMD, "-f", "--no-files", *options,
                     pass_fds=[3], preexec_fn=lambda: os.dup2(given.fileno(), 3))


@pytest.mark.parametrize("options, kind, count, named", [
    (["-s"], socket.SOCK_DGRAM, "1", "descriptor 3"), (["-s"], socket.SOCK_STREAM, "x", "'x'"),
    (["-s"], socket.SOCK_STREAM, "2", "descriptor 4"),
    (["-n", "lo", "-A", "239.255.77.7"], socket.SOCK_STREAM, "1", "a group needs a TCP socket")])
def test_a_socket_of_no_use_is_one_line_and_status_1(box, options, kind, count, named):
    options = options + [box.socket] * (options == ["-s"])
    with socket.socket(socket.AF_UNIX, kind) as given:
        given.bind(box.path("given"))
        done = handed_over(box, given, *options, "--state-dir", box.folder, count=count).end()
    os.unlink(box.path("given"))
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1) and named in done.err


def test_a_socket_that_is_handed_over_is_served(box):
    with socket.socket(socket.AF_UNIX) as given:
        given.bind(box.path("given"))
        given.listen(1)
        daemon = handed_over(box, given, *box.address)
        box.foreground.append(daemon)
    address = ("-s", box.path("given"))
    assert box.run("-d", "0", "--", "echo", "x", address=address).out == "x\n"
    daemon.terminate()
    assert daemon.wait(timeout=10) == 0 and os.path.exists(box.path("given"))
    os.unlink(box.path("given"))


CANNOT = [(["-s", "/nonexistent/s"], "/nonexistent/s"),
          (["-a", "x" * 64], "x" * 64),
          (["-a", "127.0.0.1,127.0.0.2"], "")]


@pytest.mark.parametrize("options, named", CANNOT)
@pytest.mark.parametrize("foreground", [["-f"], []])
def test_what_it_cannot_serve_is_one_line_and_status_1(box, options, named, foreground):
    done = box.flomd("--no-files", "--state-dir", box.folder, *foreground, *options).end()
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
    assert done.err.startswith("flomd: ") and named in done.err


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_address_in_use(box, host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as live:
        live.bind((host, 0))
        live.listen(5)
        port = str(live.getsockname()[1])
        done = box.flomd("--no-files", "--state-dir", box.folder, "-a", host, "-p", port).end()
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
    assert host in done.err and port in done.err


def test_a_pid_file_that_cannot_be_written(box):
    fifo = box.path("fifo")
    os.mkfifo(fifo)
    done = box.flomd("--no-files", "-s", box.socket, "--pid-file", fifo).end(10)
    assert done.status == 1 and fifo in done.err
    done = box.flomd("--no-files", "-s", box.socket, "--pid-file", "/nonexistent/pid").end()
    assert done.status == 1
    assert "/nonexistent/pid" in done.err
    assert done.err.count("\n") == 1
    wait_until(lambda: not box.daemons())


USAGE = [(["-d", "x"], "-d: ", "'x'"), (["-p", "0"], "-p: ", "'0'"),
         (["--policy", "best"], "--policy", "'best'"),
         (["--socket-mode", "9"], "--socket-mode", "'9'"),
         (["--nonsense"], "--nonsense", ""), (["word"], "word", ""),
         (["-s", "/tmp/x", "-A", "239.255.0.1"], "-s", "-A"),
         (["--tls-certificate", "/x"], "--tls-certificate", ""),
         (["--etcd-new-cluster"], "--etcd-new-cluster", "wants --etcd"),
         (["-c", "/nonexistent/flom.conf"], "/nonexistent/flom.conf", "No such file")]


@pytest.mark.parametrize("options, named, value", USAGE)
def test_a_wrong_option_is_one_line_and_status_99(box, options, named, value):
    done = box.flomd("-f", *options).end()
    assert (done.status, done.out, done.err.count("\n")) == (99, "", 1)
    assert done.err.startswith("flomd: ")
    assert named in done.err
    assert value in done.err


def test_help_and_version(box):
    assert box.flomd("--version").end() == (0, f"flomd {flomd.VERSION}\n", "")
    done = box.flomd("--help").end()
    assert done.status == 0
    assert "--foreground" in done.out
    assert "start none (default -1)" in done.out  # a client's is 5000
    assert done.err == ""


@pytest.mark.parametrize("options, mode", [([], 0o666), (["--socket-mode", "0640"], 0o640)])
def test_the_mode_of_a_named_socket(box, options, mode):
    detached(box, *options)
    assert os.stat(box.socket).st_mode & 0o777 == mode


# Its end

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once(box, number):
    pid = detached(box)
    holder, gate = box.hold("a", "--on-lock-loss", "ignore")
    os.kill(pid, number)
    wait_until(lambda: pid not in box.running())
    assert box.sockets() == set()
    gate.open()
    assert holder.end() == (0, "", "")


TERM_AT_ONCE = """
import os, signal, socket

def listen(bound, *backlog):
    real_listen(bound, *backlog)
    os.kill(os.getpid(), signal.SIGTERM)

real_listen, socket.socket.listen = socket.socket.listen, listen
"""


def test_a_signal_as_soon_as_it_listens_ends_it_in_order(box):
    daemon = box.flomd("-f", "--no-files", *box.address, program=patched(TERM_AT_ONCE))
    assert daemon.end()[:2] == (0, "")
    assert box.sockets() == set()


@pytest.mark.parametrize("quiesce", ["-x", "USR1"])
def test_quiesce_lets_everyone_finish(box, quiesce):
    pid = detached(box)
    holder, gate = box.hold("a")
    waiter = box.waiter("-o", "20000", "--", *box.note("waiter"))
    if quiesce == "-x":
        assert box.run("-x") == (0, "Starting FLoM daemon quiesce shutdown...\n", "")
    else:
        os.kill(pid, signal.SIGUSR1)
    assert pid in box.daemons()
    gate.open()
    assert holder.end().status == 0 and waiter.end().status == 0
    wait_until(lambda: pid not in box.running())
    assert box.sockets() == set() and box.events() == ["a start", "a end", "waiter"]


def test_immediate_is_done_when_the_client_returns(box):
    for _ in range(COUNT.rounds):
        pid = detached(box)
        assert box.run("-X") == (0, "Starting FLoM daemon immediate shutdown...\n", "")
        assert pid not in box.running() and box.sockets() == set()


def open_files(pid):
    """How many files a process has open; 0 when it has ended, or is about to."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


@pytest.mark.parametrize("end", ["order", "TERM"])
def test_its_connections_end_with_the_process(box, end):
    """Who sees one end, the sender of an order over TCP above all, may look for the process, or
    start another; all that it leaves is done by then."""
    address = ("-a", "127.0.0.1", "-p", str(free_port()))
    for number in range(COUNT.rounds):  # what is held is remembered
        daemon = box.daemon("--pid-file", box.path("pid"), address=address)
        with FlomClient(*endpoint(address)) as client:
            assert client.lock(f"R{number}") is True
            if end == "TERM":
                daemon.send_signal(signal.SIGTERM)
            else:
                with FlomClient(*endpoint(address)) as owner:
                    assert owner.shut_down(immediate=1) == b"" and open_files(daemon.pid) == 0
            with contextlib.suppress(ConnectionResetError):
                assert client.receive() == b""
            assert open_files(daemon.pid) == 0 and not os.path.exists(box.path("pid"))
        assert daemon.end().status == 0


@pytest.mark.parametrize("option, word", [("-x", "quiesce"), ("-X", "immediate")])
def test_there_is_nothing_to_stop(box, option, word):
    done = box.run(option)
    assert done.status == 99
    assert box.socket in done.err
    assert done.err.count("\n") == 1
    assert box.daemons() == []


# Its paths.  In these tests it looks at them often.

SHARP = patched("flomd.LOOK = 0.05")


def test_a_socket_that_was_removed_is_made_anew(box):
    daemon = box.daemon(program=SHARP)
    holder, gate = box.hold("a")
    os.unlink(box.socket)
    wait_until(lambda: can_connect(box.address))
    assert peer_pid(box.socket) == daemon.pid
    assert f"{box.socket} was removed" in daemon.err
    assert os.stat(box.socket).st_mode & 0o777 == 0o666
    assert box.run("-d", "0", "-o", "0", "--", "true").status == 98
    gate.open()
    assert holder.end() == (0, "", "")


def test_who_had_connected_to_a_socket_that_was_removed_is_served(box):
    daemon = box.daemon(program=SHARP)
    with socket.socket(socket.AF_UNIX) as client:
        os.kill(daemon.pid, signal.SIGSTOP)
        client.connect(box.socket)
        os.unlink(box.socket)
        os.kill(daemon.pid, signal.SIGCONT)
        wait_until(lambda: can_connect(box.address))
        client.sendall(b'<msg level="3" verb="3" step="8"></msg>')
        assert b'step="16"' in client.recv(1000)


@pytest.mark.parametrize("removed", [["lock"], ["lock", "socket"]])
def test_a_lock_that_was_removed_is_taken_anew(box, removed):
    daemon = box.daemon(program=SHARP)
    holder, gate = box.hold("a")
    lock = box.socket + ".lock"
    os.unlink(lock)
    if "socket" in removed:
        os.unlink(box.socket)
    wait_until(lambda: os.path.exists(lock) and read(lock) and can_connect(box.address))
    assert f"{lock} was removed" in daemon.err
    second = box.flomd("--no-files", *box.address).end()
    assert second.err == f"flomd: another daemon (pid {daemon.pid}) serves {box.socket}\n"
    assert read(lock).split()[3:] == ["0", f"{daemon.pid:010d}", "journal"]
    gate.open()
    assert holder.end() == (0, "", "")


def test_another_daemon_at_its_path(box):
    """It leaves the clients to the other one, and the other one its socket and its journal, from
    which that knows who holds a lock here."""
    first = box.daemon(program=patched("flomd.LOOK = 4"))
    holder, gate = box.hold("a")
    waiter = box.waiter("--", "true")
    os.unlink(box.socket + ".lock")
    os.unlink(box.socket)
    second = box.daemon()
    wait_until(lambda: f"draining: another daemon serves {box.socket}" in first.err, 20)
    assert first.poll() is None
    assert box.run("-o", "0", "--", "true").status == 98
    gate.open()
    assert holder.end() == (0, "", "") and first.wait(timeout=10) == 0
    assert waiter.end().status == 0
    assert box.socket + ".journal" in files(second.pid).values()
    assert peer_pid(box.socket) == second.pid


def test_what_is_not_its_own_at_its_end_stays(box):
    first = box.daemon()
    os.unlink(box.socket)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(box.socket)
        other.listen(1)
        first.terminate()
        assert first.wait(timeout=10) == 0 and can_connect(box.address)
    os.unlink(box.socket)


def test_something_else_at_its_path_is_left_alone(box):
    daemon = box.daemon(program=SHARP)
    os.unlink(box.socket)
    box.write("s", "precious")
    wait_until(lambda: "was removed" in daemon.err)
    assert "Traceback" not in daemon.err and read(box.socket) == "precious"
    os.unlink(box.socket)
    wait_until(lambda: can_connect(box.address))


# Its log

@pytest.fixture
def syslog(box):
    """The path of a socket for patched daemons, and a function that makes it."""
    path = box.path("log.socket")

    def listen():
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        made.bind(path)
        made.settimeout(10)
        return made

    yield path, listen
    os.unlink(path)


@pytest.mark.parametrize("early", [True, False])
def test_syslogd_is_started_again(box, syslog, early):
    path, listen = syslog
    if early:
        first = listen()
    daemon = box.daemon("--log", "syslog", program=patched(f"flomd.SYSLOG = ({path!r},)"))
    if early:
        assert b"serving" in first.recv(1000)
        first.close()
    with listen() as second:
        daemon.send_signal(signal.SIGUSR1)
        line = second.recv(1000)
        if not early and b"serving" in line:  # it has accepted a connection before it says so
            line = second.recv(1000)
        assert b"ending when" in line
        assert b"ended" in second.recv(1000)


def test_no_file_can_be_written(box):
    """Neither journal nor mark: it serves, and grants nothing, since nobody would know of it."""
    daemon = box.daemon(stderr=subprocess.PIPE, preexec_fn=limit_files(0))
    done = box.run("-d", "0", "--", "echo", "wrong")
    assert (done.status, done.out) == (99, "") and "the daemon refuses: " in done.err
    daemon.terminate()
    said = daemon.communicate()[1].decode()
    assert "File too large" in said.splitlines()[0]
    assert "Traceback" not in said
    assert daemon.returncode == 0


def test_a_log_that_has_reached_its_limit(box):
    log = box.write("daemon.log", "x" * 1000)
    daemon = box.daemon("--log", log, preexec_fn=limit_files(1000))
    assert box.run("-d", "0", "--", "true").status == 0
    daemon.terminate()
    assert daemon.wait(timeout=10) == 0
    assert daemon.err == f"flomd: cannot write the log {log}: File too large\n"


def test_a_log_on_a_full_disk(box):
    done = box.flomd("--no-files", *box.address, "--log", "/dev/full").end()
    assert done == (0, "", "flomd: cannot write the log /dev/full: No space left on device\n")
    assert box.run("-d", "0", "--", "true").status == 0


def test_nobody_reads_its_log_nor_its_stderr(box):
    log, pipe = box.path("fifo"), os.pipe()
    os.mkfifo(log)
    reader = os.open(log, os.O_RDWR | os.O_NONBLOCK)
    for number in (reader, pipe[1]):
        os.set_blocking(number, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(number, b"x" * 4096)
    os.set_blocking(pipe[1], True)
    box.daemon("--log", log, stderr=pipe[1])
    assert box.run("-d", "0", "--", "echo", "x") == (0, "x\n", "")
    for number in (reader, *pipe):
        os.close(number)


def test_a_log_that_cannot_be_opened_anew_goes_on(box):
    folder = box.path("logs")
    os.mkdir(folder)
    path = os.path.join(folder, "log")
    daemon = box.daemon("--log", path)
    os.rename(folder, folder + ".1")
    daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: f"cannot write the log {path}: No such file" in read(f"{folder}.1/log"))
    daemon.terminate()
    assert daemon.wait(timeout=10) == 0 and "ended" in read(f"{folder}.1/log")


NO_LOCKS = """
def flock(*_):
    raise OSError(37, "No locks available")
flomd.fcntl.flock = flock
"""


def test_there_are_no_locks(box):
    """A network file system without them."""
    daemon = box.daemon(program=patched(NO_LOCKS))
    lock = box.socket + ".lock"
    assert daemon.err.startswith(f"flomd: cannot lock {lock}: No locks available; nothing will be "
                                 "remembered, and nothing keeps a second daemon away\n")
    assert box.run("-d", "0", "--", "echo", "x") == (0, "x\n", "") and read(lock) == ""


# What others watch

def test_what_cannot_be_published_is_said_at_the_start(box):
    folder, fifo = box.path("folder"), box.path("fifo")
    os.makedirs(folder + "/status")
    os.mkfifo(fifo)  # as a device: no file may take its name
    for options, named in ((["-m", "/proc"], "/proc"), (["-m", "/nonexistent"], "/nonexistent"),
                           (["-m", folder], folder), (["--metrics", "/nonexistent/x"], "/x"),
                           (["--metrics", folder], folder), (["--metrics", fifo], fifo)):
        done = box.flomd("--no-files", *box.address, *options).end()
        assert (done.status, done.out, done.err.count("\n")) == (1, "", 1) and named in done.err
    assert os.listdir(folder) == ["status"] and stat.S_ISFIFO(os.stat(fifo).st_mode)
    assert not [name for name in os.listdir(box.folder) if name.startswith("folder.")]
    wait_until(lambda: not box.daemons())


def test_the_log_is_opened_anew_on_hup(box):
    path = box.path("daemon.log")
    pid = detached(box, "--log", path)
    wait_until(lambda: "serving" in read(path))
    os.rename(path, path + ".1")
    os.kill(pid, signal.SIGHUP)
    wait_until(lambda: os.path.exists(path))
    assert box.run("-X").status == 0
    assert "ended" in read(path) and re.search(rf"flomd\[{pid}\]", read(path + ".1"))


def test_a_trace_file_is_the_log_of_a_daemon_that_a_client_starts(box):
    path = box.path("trace")
    assert box.run("-t", path, "--", "true").status == 0
    wait_until(lambda: "serving" in read(path))
