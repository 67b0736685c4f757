"""One host, several users: modes, owners, links, and who may stop the daemon.

The other user is a number without a name, so its default socket, /tmp/flom-NUMBER, is nobody's.
"""
import os
import pwd
import shutil
import signal
import socket
import stat
import struct
import subprocess
import time

import pytest
from commands import driven_daemon
from fakes import MANAGEMENT, PEER, FlomClient, message
from world import FLOM, FLOMD, PYTHON, endpoint, free_port, read, wait_until

ME = os.getuid()
STRANGER = 60000 + os.getpid() % 2000 * 2 if ME == 0 else None  # no user of this system
READ = "+dac_read_search"  # the interpreter may lie in a folder that only root can search
needs_root = pytest.mark.skipif(ME != 0, reason="only root can become another user")


def another(user):
    """The words before a command that is to run as another user."""
    if not shutil.which("setpriv"):
        pytest.skip("no setpriv in PATH")
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups",
            f"--inh-caps={READ}", f"--ambient-caps={READ}"]


def flom_as(user, box, *args):
    """Runs flom.py as another user."""
    return box.start(*another(user), *PYTHON, FLOM, *args).end()


@pytest.fixture
def shared(box):
    """A box that all users can enter; what they leave in /tmp is removed."""
    os.chmod(box.folder, 0o777)
    yield box
    for user in () if STRANGER is None else (STRANGER, STRANGER + 1):
        for end in ("", ".lock", ".journal"):
            if os.path.lexists(f"/tmp/flom-{user}{end}"):
                os.unlink(f"/tmp/flom-{user}{end}")


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def default_socket(user):
    return f"/tmp/flom-{user}"


def one_line(done, *words):
    """A refusal: status 99, nothing on stdout, one line on stderr with these words."""
    assert done.status == 99, done
    assert "Traceback" not in done.err, done
    assert done.err.count("\n") == 1, done
    assert all(word in done.err for word in words), done.err


def cannot_serve(box, *words, address=None):
    """flomd.py ends with 1 and one line with these words."""
    done = box.flomd("-f", "--no-files", *(address or box.address)).end()
    assert done[:2] == (1, "") and done.err.count("\n") == 1
    assert all(word in done.err for word in words), done.err


# Modes

@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_the_mode_of_a_shared_socket(box, umask):
    command = ["-f", "--no-files", *box.address]
    daemon = box.start("sh", "-c", 'umask "$0" && exec "$@"', f"{umask:o}", *PYTHON, FLOMD,
                       *command)
    box.foreground.append(daemon)
    wait_until(lambda: "serving" in daemon.err)
    assert mode(box.socket) == mode(box.socket + ".lock") == 0o666


def test_the_mode_that_is_asked_for(box):
    box.daemon("--socket-mode", "0640")
    assert mode(box.socket) == 0o640


@needs_root
def test_the_default_socket_is_for_its_user_alone(shared):
    daemon = shared.start(*another(STRANGER), *PYTHON, FLOMD, "-f", "--no-files")
    shared.foreground.append(daemon)
    path = default_socket(STRANGER)
    wait_until(lambda: "serving" in daemon.err)
    assert mode(path) == mode(path + ".lock") == 0o600 and os.lstat(path).st_uid == STRANGER
    one_line(flom_as(STRANGER + 1, shared, "-s", path, "-d", "0", "--", "echo", "x"),
             path, "Permission denied")
    assert flom_as(STRANGER, shared, "-d", "0", "--", "echo", "x") == (0, "x\n", "")
    shared.forgiven.update(shared.sockets())
    daemon.terminate()
    assert daemon.wait(timeout=10) == 0 and not os.path.exists(path)


@needs_root
def test_users_share_a_socket_that_is_named(shared):
    """Each sees who the other is: the system tells, not the client."""
    shared.daemon()
    holder, gate = shared.hold("a")
    done = flom_as(STRANGER, shared, *shared.address, "-o", "0", "-d", "0", "--", "true")
    assert done.status == 98
    gate.open()
    assert holder.end().status == 0
    done = flom_as(STRANGER, shared, *shared.address, "-d", "0", "--", "echo", "x")
    assert done == (0, "x\n", "")


@needs_root
def test_the_user_in_the_report_is_that_of_the_system(shared):
    shared.daemon()
    lie = message(1, 8, f'<session peerid="{PEER}" client="flom.py/1" user="root" pid="1"/>'
                        '<resource name="UjE=" mode="5" wait="0" create="1" lifespan="0"/>')
    script = ("import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
              f"s.sendall({lie!r}); s.recv(999); print('held', flush=True); s.recv(999)")
    liar = shared.start(*another(STRANGER), *PYTHON, "-c", script, shared.socket)
    wait_until(lambda: "held" in liar.out)
    with FlomClient(*endpoint(shared.address)) as asking:
        asking.socket.sendall(message(1, 8, '<resource name="X1NUQVRVUw==" wait="0"/>'))
        report = read_all(asking)
    shared.kill(liar.pid)
    assert f'user="{STRANGER}"'.encode() in report and b'user="root"' not in report
    assert f'pid="{liar.pid}"'.encode() in report


def read_all(client):
    data = b""
    while True:
        more = client.socket.recv(65536)
        if not more:
            return data
        data += more


HANGING = """
import pwd
def hang(uid):
    with open(LOG, "a") as log:
        log.write(f"{uid}\\n")
    signal.pause()
import os, signal, flomd
real, mine = pwd.getpwuid, (0, os.getuid())
pwd.getpwuid = lambda uid: real(uid) if uid in mine else hang(uid)
flomd.LOOK_UP = 1
"""


@needs_root
def test_a_directory_that_does_not_answer_keeps_nobody_waiting(shared):
    """It is asked once for each user, by a process of its own; until then numbers are shown."""
    log = shared.write("asked", "")
    daemon = driven_daemon(shared, f"LOG = {log!r}" + HANGING)
    for user in (STRANGER, STRANGER + 1, STRANGER):
        begin = time.monotonic()
        done = flom_as(user, shared, *shared.address, "-d", "0", "--", "echo", "x")
        assert done == (0, "x\n", "") and time.monotonic() - begin < 5
    one_line(flom_as(STRANGER, shared, *shared.address, "-X"), f"{STRANGER} is neither")
    wait_until(lambda: len(read(log).split()) == 2, seconds=20)  # the first has been given up
    assert sorted(map(int, read(log).split())) == [STRANGER, STRANGER + 1]
    daemon.terminate()
    assert daemon.wait(timeout=10) == 0  # and so has the second


@needs_root
def test_the_name_of_another_user_is_found(shared):
    """Of root, whom the daemon of another user knows, and of one whom it must look up."""
    driven_daemon(shared, "import pwd; real = pwd.getpwuid; pwd.getpwuid = "
                          f"lambda uid: real(1 if uid == {STRANGER} else uid)")
    holder = shared.start(*another(STRANGER), *PYTHON, FLOM, *shared.address, "--", "cat",
                          stdin=subprocess.PIPE)
    name = pwd.getpwuid(1).pw_name
    wait_until(lambda: f" {name} " in shared.run("--status").out)
    holder.stdin.close()
    assert holder.end().status == 0


# Who may stop the daemon

@needs_root
@pytest.mark.parametrize("option", ["-x", "-X"])
def test_a_stranger_cannot_stop_the_daemon_of_root(shared, option):
    daemon = shared.daemon()
    one_line(flom_as(STRANGER, shared, *shared.address, option), shared.socket, "root")
    wait_until(lambda: "may not stop" in daemon.err)
    assert daemon.poll() is None
    assert shared.run("--", "echo", "x") == (0, "x\n", "")
    assert shared.run(option).status == 0
    assert daemon.wait(timeout=10) == 0


@needs_root
def test_root_and_its_owner_can_stop_the_daemon_of_a_user(shared):
    for stop in (shared.run, lambda *args: flom_as(STRANGER, shared, *shared.address, *args)):
        assert flom_as(STRANGER, shared, *shared.address, "--recovery-window", "0", "--",
                       "true").status == 0
        pid = shared.the_daemon()
        assert os.stat(f"/proc/{pid}").st_uid == STRANGER
        assert stop("-X").status == 0
        wait_until(lambda: not shared.daemons())


def test_over_tcp_only_this_host_stops_the_daemon(hosts):
    """By loopback, or by an address that is the daemon's own; never by a datagram."""
    one, two = hosts(2)
    daemon = one.flomd("-f", "--no-files", "-a", "0.0.0.0", *one.address)
    one.foreground.append(daemon)
    wait_until(lambda: "serving" in daemon.err)
    one_line(two.run("-a", one.ipv4, "-X"), "allow-remote-shutdown")
    wait_until(lambda: "may not stop" in daemon.err)
    assert daemon.poll() is None
    assert one.run("-a", one.ipv4, "-x").status == 0
    assert daemon.wait(timeout=10) == 0


def test_no_datagram_stops_the_daemon(hosts):
    one, = hosts(1)
    daemon = one.flomd("-f", "--no-files", "-A", "239.255.0.1", "-d", "-1", *one.address)
    one.foreground.append(daemon)
    wait_until(lambda: "serving" in daemon.err)
    order = message(5, 8, f'<session peerid="{PEER}"/><shutdown immediate="1"/>')
    send = ("import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); "
            f"s.sendto({order!r}, ('127.0.0.1', 28015)); s.close()")
    assert one.start(*PYTHON, "-c", send).end() == (0, "", "")
    assert one.run("-A", "239.255.0.1", "-d", "0", "--", "echo", "x") == (0, "x\n", "")


def test_an_order_over_a_connection_that_was_reset_is_obeyed(box):
    """The peer's address is not known any more when the order is read."""
    box.address = ("-a", "127.0.0.1", "-p", str(free_port()))
    daemon = box.daemon()
    with FlomClient(*endpoint(box.address)) as client:
        os.kill(daemon.pid, signal.SIGSTOP)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.socket.sendall(message(MANAGEMENT, 8, '<session peerid="0"/><shutdown '
                                      'immediate="1"/>'))
    os.kill(daemon.pid, signal.SIGCONT)
    assert daemon.wait(timeout=10) == 0 and "Traceback" not in daemon.err


def test_an_order_of_a_client_that_is_gone_is_obeyed(box):
    daemon = box.daemon()
    with FlomClient(*endpoint(box.address)) as client:
        client.socket.sendall(message(
            5, 8, f'<session peerid="{PEER}"/><shutdown immediate="1"/>'))
    assert daemon.wait(timeout=10) == 0 and box.sockets() == set()


# What lies in the way

@needs_root
def test_a_socket_that_somebody_else_planted(shared):
    """The client does not talk to it, and no daemon takes its place."""
    path, planter = default_socket(STRANGER), STRANGER + 1
    with socket.socket(socket.AF_UNIX) as planted:
        planted.bind(path)
        os.chmod(path, 0o777)
        os.chown(path, planter, planter)
        planted.listen(5)
        one_line(flom_as(STRANGER, shared, "--", "echo", "x"), path, str(planter), "refused")
    done = shared.start(*another(STRANGER), *PYTHON, FLOMD, "-f", "--no-files").end()
    assert done.status == 1 and done.err.count("\n") == 1
    assert path in done.err and str(planter) in done.err
    assert os.lstat(path).st_uid == planter and shared.daemons() == []


@needs_root
def test_a_shared_socket_whose_dead_owner_is_another(shared):
    """In a sticky folder only its owner can remove it: the error names the owner."""
    folder = shared.path("sticky")
    os.mkdir(folder)
    os.chmod(folder, 0o1777)
    path = os.path.join(folder, "s")
    with socket.socket(socket.AF_UNIX) as planted:
        planted.bind(path)
    os.chmod(path, 0o666)
    done = shared.start(*another(STRANGER), *PYTHON, FLOMD, "-f", "--no-files", "-s", path).end()
    assert done.status == 1 and done.err.count("\n") == 1
    assert path in done.err and "root" in done.err
    os.unlink(path)


@needs_root
def test_another_users_lock_file(shared):
    """That of the default socket must be the user's own, that of a shared one need not be."""
    lock = default_socket(STRANGER) + ".lock"
    for path in (lock, shared.socket + ".lock"):
        with open(path, "w"):
            os.chmod(path, 0o666)
    done = shared.start(*another(STRANGER), *PYTHON, FLOMD, "-f", "--no-files").end()
    assert done.status == 1
    assert done.err.count("\n") == 1
    assert lock in done.err
    done = flom_as(STRANGER, shared, "-s", shared.socket, "--", "echo", "x")
    assert done == (0, "x\n", "")


def plant_link(path, victim):
    os.symlink(victim, path)


def plant_hard_link(path, victim):
    os.link(victim, path)


def plant_fifo(path, victim):
    os.mkfifo(path)


@pytest.mark.parametrize("plant", [plant_link, plant_hard_link, plant_fifo])
def test_a_lock_file_that_is_a_trap(box, plant):
    victim = box.write("victim", "precious\n")
    plant(box.socket + ".lock", victim)
    cannot_serve(box, box.socket + ".lock")
    with open(victim) as file:
        assert file.read() == "precious\n"


def test_the_lock_file_keeps_what_it_holds(box):
    """It is never truncated."""
    box.write("s.lock", "x" * 500)
    box.daemon()
    assert os.stat(box.socket + ".lock").st_size == 500


SOMETHING_ELSE = {
    "file": lambda path: os.close(os.open(path, os.O_CREAT | os.O_EXCL)),
    "link": lambda path: os.symlink("/dev/null", path), "folder": os.mkdir}


@pytest.mark.parametrize("make", SOMETHING_ELSE.values(), ids=list(SOMETHING_ELSE))
def test_a_socket_path_that_is_something_else(box, make):
    make(box.socket)
    cannot_serve(box, box.socket)
    assert os.path.lexists(box.socket)


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(box):
    """Whoever listens there without the lock (FLoM's daemon) is left alone."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(box.socket)
        other.listen(1)
        cannot_serve(box, box.socket, "another daemon")
    daemon = box.daemon()
    cannot_serve(box, address=("-a", "127.0.0.1", "-p", str(port_of(box))))
    assert daemon.poll() is None


def port_of(box):
    """A port that another process listens on."""
    port = free_port()
    box.daemon(address=("-a", "127.0.0.1", "-p", str(port), "--state-dir", box.folder))
    return port


def test_the_daemon_shows_its_own_pid_to_clients(box):
    assert box.run("--", "true").status == 0
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(box.socket)
        credentials = struct.unpack("3i", probe.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    assert credentials == (box.the_daemon(), ME, os.getgid())


def test_what_a_folder_forbids(box):
    """A folder that is not there, or that is a file: one line that names the path."""
    for folder in ("missing", "victim"):
        box.write("victim", "")
        cannot_serve(box, box.path(folder), address=("-s", box.path(f"{folder}/s")))
