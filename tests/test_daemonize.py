"""The daemon as a process: detached or not, readiness, pid file, one for a socket, its end."""
import contextlib
import os
import re
import signal
import socket

import pytest
from fakes import FlomClient
from world import COUNT, can_connect, comm, endpoint, free_port, peer_pid, read, wait_until


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
    # that through which its starter was told is closed a moment later
    wait_until(lambda: not any(name.startswith("pipe:") for name in files(pid).values()))
    found = files(pid)
    assert [found[number] for number in (0, 1, 2)] == ["/dev/null"] * 3
    others = {name for number, name in found.items() if number > 2}
    assert {name for name in others if name.startswith("/")} == {box.socket + ".lock"}
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


def test_when_the_starter_has_ended_the_daemon_listens(box):
    for _ in range(COUNT.rounds):
        assert box.flomd("--no-files", "-s", box.socket).end() == (0, "", "")
        assert can_connect(box.address)
        os.kill(box.the_daemon(), signal.SIGTERM)
        wait_until(lambda: not box.daemons())


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
    os.kill(first, signal.SIGTERM)
    wait_until(lambda: can_connect(box.address) and peer_pid(box.socket) == second.pid)


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
        assert (status, out) == (1, "") and err.count("\n") == 1 and box.socket in err
        assert peer_pid(box.socket) == os.getpid()
    os.unlink(box.socket)


def test_what_is_no_socket_is_not_replaced(box):
    box.write("s", "precious")
    status, _, err = box.flomd("--no-files", "-s", box.socket).end()
    assert status == 1 and err.count("\n") == 1 and box.socket in err
    assert read(box.socket) == "precious"


def test_a_lock_file_that_is_a_link_is_refused(box):
    box.write("target", "")
    os.symlink(box.path("target"), box.socket + ".lock")
    status, _, err = box.flomd("--no-files", "-s", box.socket).end()
    assert status == 1 and err.count("\n") == 1 and box.socket + ".lock" in err
    assert read(box.path("target")) == ""


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
    done = box.flomd("--no-files", "-s", box.socket, "--pid-file", "/nonexistent/pid").end()
    assert done.status == 1 and "/nonexistent/pid" in done.err and done.err.count("\n") == 1
    wait_until(lambda: not box.daemons())


USAGE = [(["-d", "x"], "-d: ", "'x'"), (["-p", "0"], "-p: ", "'0'"),
         (["--policy", "best"], "--policy", "'best'"),
         (["--socket-mode", "9"], "--socket-mode", "'9'"),
         (["--nonsense"], "--nonsense", ""), (["word"], "word", ""),
         (["-s", "/tmp/x", "-A", "239.255.0.1"], "-s", "-A"),
         (["--tls-certificate", "/x"], "--tls-certificate", ""),
         (["-c", "/nonexistent/flom.conf"], "/nonexistent/flom.conf", "No such file")]


@pytest.mark.parametrize("options, named, value", USAGE)
def test_a_wrong_option_is_one_line_and_status_99(box, options, named, value):
    done = box.flomd("-f", *options).end()
    assert (done.status, done.out, done.err.count("\n")) == (99, "", 1)
    assert done.err.startswith("flomd: ") and named in done.err and value in done.err


def test_help_and_version(box):
    assert box.flomd("--version").end() == (0, "flomd.py 1.0\n", "")
    done = box.flomd("--help").end()
    assert done.status == 0 and "--foreground" in done.out and done.err == ""


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
    for _ in range(COUNT.rounds):
        daemon = box.daemon("--pid-file", box.path("pid"), address=address)
        with FlomClient(*endpoint(address)) as client:
            assert client.lock("R1") is True
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
    assert done.status == 99 and box.socket in done.err and done.err.count("\n") == 1
    assert box.daemons() == []


# Its log

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
