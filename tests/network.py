"""Several hosts on one machine: network namespaces joined by a bridge.

Each namespace lives as long as its keeper, a `cat` that reads a pipe of the tests, so nothing is
left of the network when the tests end, however they end.  As an ordinary user the namespaces
belong to a user namespace, in which that user is root.
"""
import os
import shutil
import subprocess

from world import Box

BRIDGE = ("ip link add name switch type bridge mcast_snooping 0 && ip link set switch up && "
          "ip link set lo up")
CABLE = ("ip link add port{n} type veth peer name eth0 netns {pid} && "
         "ip link set port{n} master switch up")
SET_UP = ("ip link set lo up && ip link set eth0 addrgenmode none && ip link set eth0 up && "
          "ip addr add 10.77.0.{n}/24 brd + dev eth0 && "
          "ip addr add fd00::{n}/64 dev eth0 nodad && ip addr add fe80::{n}/64 dev eth0 nodad && "
          "ip route add 224.0.0.0/4 dev eth0")

# A second network of the first hosts, in which only services talk to each other.
BACKBONE = "ip link add name back type bridge mcast_snooping 0 && ip link set back up"
BACK_CABLE = ("ip link add back{n} type veth peer name eth1 netns {pid} && "
              "ip link set back{n} master back up")
BACK_SET_UP = ("ip link set eth1 addrgenmode none && ip link set eth1 up && "
               "ip addr add 10.78.0.{n}/24 dev eth1")


class Unavailable(Exception):
    """This machine, or this user, cannot have network namespaces."""


class Network:
    def __init__(self, size):
        missing = [tool for tool in ("ip", "unshare", "nsenter") if not shutil.which(tool)]
        if missing:
            raise Unavailable(f"no {' '.join(missing)} in PATH")
        self.keepers, self.pids = [], []
        self.user = [] if os.geteuid() == 0 else ["-U", "--preserve-credentials"]
        try:
            self._build(size)
        except BaseException:
            self.close()
            raise

    def _build(self, size):
        self.bridge = self._keep(["unshare", "-n" if os.geteuid() == 0 else "-Urn"])
        self._do(self.bridge, BRIDGE)
        for n in range(1, size + 1):
            pid = self._keep(self.enter(self.bridge) + ["unshare", "-n"])
            self._do(self.bridge, CABLE.format(n=n, pid=pid))
            self._do(pid, SET_UP.format(n=n))
            self.pids.append(pid)

    def add_backbone(self, size):
        """The hosts 1 to `size` get a second cable, into a network that the others are not in."""
        self._do(self.bridge, BACKBONE)
        for n, pid in enumerate(self.pids[:size], 1):
            self._do(self.bridge, BACK_CABLE.format(n=n, pid=pid))
            self._do(pid, BACK_SET_UP.format(n=n))

    def _keep(self, unshare):
        """Starts the keeper of a new namespace and returns its pid."""
        keeper = subprocess.Popen(unshare + ["sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.keepers.append(keeper)
        if keeper.stdout.readline() != b"\n":
            raise Unavailable(f"{' '.join(unshare)}: {keeper.stderr.read().decode().strip()}")
        return keeper.pid

    def enter(self, pid):
        """The words before a command that is to run in the namespace that `pid` keeps."""
        return ["nsenter", "-t", str(pid)] + self.user + ["-n"]

    def cross(self, pid):
        """As enter(), for what runs on another host of this network already."""
        return ["nsenter", "-t", str(pid), "-n"]

    def _do(self, pid, script):
        done = subprocess.Popen(self.enter(pid) + ["sh", "-c", script], stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT)
        said = done.communicate()[0].decode().strip()
        if done.returncode:
            raise Unavailable(f"{script}: {said}")

    def cut(self, n, cable="port"):
        """Unplugs host n (1, 2, …); `back` is its cable into the backbone."""
        self._do(self.bridge, f"ip link set {cable}{n} down")

    def heal(self, n, cable="port"):
        self._do(self.bridge, f"ip link set {cable}{n} up")

    def close(self):
        for keeper in reversed(self.keepers):
            keeper.communicate()  # closes its standard input


class Host(Box):
    """A box on a host of its own; /tmp is shared, so the state of its daemons is kept in it."""

    def __init__(self, folder, network, n):
        super().__init__(folder, ("--state-dir", folder), network.enter(network.pids[n - 1]))
        self.from_another = network.cross(network.pids[n - 1])
        self.network, self.number = network, n
        self.ipv4, self.ipv6 = f"10.77.0.{n}", f"fd00::{n}"
        self.link_local = f"fe80::{n}"

    def listening(self, pid, table="tcp"):
        """The (address, port) pairs, as hexadecimal text and int, that `pid`'s host listens on."""
        with open(f"/proc/{pid}/net/{table}") as file:
            rows = [line.split() for line in file.readlines()[1:]]
        ends = [row[1].split(":") for row in rows if row[3] in ("0A", "07")]
        return sorted((address, int(port, 16)) for address, port in ends)
