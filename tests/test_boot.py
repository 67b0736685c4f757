"""A host that systemd has really booted: installation, restarts, crashes, units that cannot run.

FLOM_BOOT names the folder of an operating system with systemd and Python, as debootstrap makes it
(`--include=systemd-sysv,dbus,python3-minimal`).  systemd-nspawn boots it, and forgets what has
changed in it.
"""
import os
import shutil
import subprocess
import time

import pytest
from world import ROOT, read, wait_until

SYSTEM = os.environ.get("FLOM_BOOT", "")
pytestmark = pytest.mark.skipif(not SYSTEM, reason="FLOM_BOOT names no operating system")
MINE = "/srv/flom"
ELSEWHERE = "/root /proc /tmp /var/tmp /var/log /run/systemd /run/log".split()
LIST = f"find / -xdev {' '.join(f'-path {path} -prune -o' for path in ELSEWHERE)} -print | sort"
CONF = "[Daemon]\nSocketName=/run/flom/socket\nLifespan=0\n"
CHANGED = "/run/systemd/system/flomd.service.d"


class Machine:
    """A booted container; `run` runs a command in it."""

    def __init__(self, folder):
        self.log = os.path.join(folder, "boot.log")
        # A console that is no terminal would make systemd-nspawn wait for its end.
        command = " ".join(["systemd-nspawn --boot --quiet --private-network --register=no",
                            "--keep-unit --volatile=overlay --machine=flom-test",
                            f"--bind-ro={ROOT}:{MINE} --directory={SYSTEM}"])
        self.process = subprocess.Popen(["script", "-qec", command, self.log], stdin=-3, stdout=-3,
                                        stderr=-3, start_new_session=True)
        self.init = wait_until(self._booted, seconds=60)

    def _booted(self):
        assert self.process.poll() is None, read(self.log)
        for spawner in children(self.process.pid):
            for init in children(spawner):
                probe = ["nsenter", "-t", str(init), "-a", "systemctl", "is-system-running"]
                done = subprocess.run(probe, stdout=subprocess.PIPE, stderr=-3)
                if done.stdout.strip() in (b"running", b"degraded"):
                    return init
        return None

    def start(self, command):
        environment = ["env", "-i", "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                       "HOME=/root", "LANG=C.UTF-8"]
        return subprocess.Popen(
            ["nsenter", "-t", str(self.init), "-a", *environment, "sh", "-c", command],
            stdin=-3, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)

    def run(self, command, status=0):
        """What the command says; it has to end with the status."""
        process = self.start(command)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == status, (command, said)
        return said

    def show(self, key, unit="flomd.service"):
        return self.run(f"systemctl show --property {key} --value {unit}").strip()

    def close(self):
        if self.process.poll() is None:
            subprocess.call(["nsenter", "-t", str(self.init), "-a", "systemctl", "poweroff"],
                            stderr=-3)
            self.process.wait(timeout=60)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


@pytest.fixture(scope="module")
def booted(tmp_path_factory):
    for program in ("systemd-nspawn", "script", "nsenter"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    if os.geteuid():
        pytest.skip("only root can boot a container")
    machine = Machine(str(tmp_path_factory.mktemp("boot")))
    yield machine
    machine.close()


@pytest.fixture
def machine(booted):
    """With the daemon of all users, which is gone afterwards with all that it was."""
    before = booted.run(LIST)
    booted.run(f"sh {MINE}/contrib/install.sh --systemd")
    booted.run(f"printf '{CONF}' >/etc/flom.conf")
    yield booted
    booted.run("rm /etc/flom.conf")
    booted.run(f"rm -rf {CHANGED}; systemctl daemon-reload")
    booted.run(f"sh {MINE}/contrib/install.sh --uninstall")
    after = booted.run(LIST)
    assert after == before and "flom" not in booted.run("cat /etc/passwd")


def test_one_line_makes_a_daemon_for_all_users(machine):
    assert machine.run("flom -- echo hello") == "hello\n"
    assert machine.run("flom --status").startswith("memory: synced\n")
    states = machine.run("systemctl is-active flomd.socket flomd.service")
    assert states == "active\nactive\n"
    main = machine.show("MainPID")
    assert "systemctl restart flomd.service\n" in machine.run(f"sh {MINE}/contrib/install.sh")
    assert machine.show("MainPID") == main


@pytest.mark.parametrize("end", ["systemctl restart flomd.service",
                                 "kill -9 $(systemctl show -p MainPID --value flomd.service)"])
def test_a_holder_keeps_its_lock(machine, end):
    machine.run("mkfifo /tmp/gate")
    holder = machine.start("flom -r a -- sh -c 'read _ </tmp/gate; echo to the end'")
    wait_until(lambda: " holds " in machine.run("flom --status"))
    main = machine.show("MainPID")
    machine.run(end)
    wait_until(lambda: machine.show("MainPID") not in ("0", main))
    assert "stolen" not in machine.run("flom -r a -o 0 -- echo stolen", status=98)
    machine.run("echo >/tmp/gate; rm /tmp/gate")
    assert "to the end\n" in holder.communicate(timeout=20)[0] and holder.returncode == 0


def test_the_socket_starts_the_daemon(machine):
    machine.run("systemctl stop flomd.service")
    assert machine.show("ActiveState") == "inactive"
    assert machine.run("flom -- echo x") == "x\n" and machine.show("ActiveState") == "active"


@pytest.mark.parametrize("line, status", [
    ("User=nosuch", "217"), ("ReadWritePaths=/nosuch", "226"),
    ("ExecStart=\nExecStart=/nosuch", "203")])
def test_what_cannot_run_is_not_tried_again(machine, line, status):
    """Its socket gives up after some clients."""
    machine.run(f"mkdir -p {CHANGED}; printf '[Service]\n{line}\n' >{CHANGED}/x.conf")
    machine.run("systemctl daemon-reload; systemctl stop flomd.socket")
    machine.run("systemctl restart flomd.service", status=1)
    time.sleep(2.5)  # longer than RestartSec
    assert [machine.show(key) for key in ("ActiveState", "ExecMainStatus", "NRestarts")] == [
        "failed", status, "0"]
    machine.run("systemctl reset-failed; systemctl start flomd.socket")
    client = machine.start("exec timeout 5 flom -- true")
    wait_until(lambda: machine.show("ActiveState", "flomd.socket") == "failed", seconds=40)
    client.communicate(timeout=20)
