"""Three hosts with a member of etcd and a flomd each, and two hosts of clients.

The members talk to each other, and the daemons to them, over a network of their own (10.78.0.n),
so that a daemon can be cut off from etcd and not from its clients (10.77.0.n).  Whether something
is ready is asked, of etcdctl and of the daemons.
"""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time

from certificates import KEY, openssl
from etcd_load import check, read_runs, serves_after
from world import FLOM, PYTHON, ROOT, SEED, has_ended, read, wait_until

HOSTS, CLIENT_HOSTS = 3, 2
TTL = 5  # s, the least that flomd takes
PREFIX = "/flom/test/"
TOKEN = f"flom-{os.getpid()}"
LOAD = os.path.join(ROOT, "tests", "etcd_load.py")
HEARTBEAT, ELECTION = 100, 1000  # ms


def missing():
    """The programs of etcd that are not in PATH."""
    return [program for program in ("etcd", "etcdctl") if not shutil.which(program)]


class Member:
    """A member of etcd on a host."""

    def __init__(self, host, guarded):
        self.host, self.number = host, host.number
        self.data, self.guarded = host.path("etcd"), guarded
        self.process, self.settings, self.joins = None, {}, False

    def address(self, port):
        scheme = "https" if self.guarded and port == 2379 else "http"
        return f"{scheme}://10.78.0.{self.number}:{port}"

    def start(self):
        peers = ",".join(f"m{n}=http://10.78.0.{n}:2380" for n in range(1, HOSTS + 1))
        guards = self.guarded.of_etcd() if self.guarded else []
        self.process = self.host.start(
            "etcd", "--name", f"m{self.number}", "--data-dir", self.data,
            "--listen-client-urls", self.address(2379),
            "--advertise-client-urls", self.address(2379),
            "--listen-peer-urls", self.address(2380),
            "--initial-advertise-peer-urls", self.address(2380),
            "--initial-cluster", peers, "--initial-cluster-token", TOKEN,
            "--initial-cluster-state", "existing" if self.joins else "new",
            "--heartbeat-interval", str(HEARTBEAT), "--election-timeout", str(ELECTION),
            "--logger", "zap", "--log-level", "error", *guards, env=self.settings)
        self.host.foreground.append(self.process)

    def kill(self):
        end_process(self.process)

    def wipe(self):
        shutil.rmtree(self.data)

    def keep_data(self):
        """Copies its data; it does not run."""
        shutil.copytree(self.data, f"{self.data}.kept")

    def put_back_data(self):
        self.wipe()
        os.rename(f"{self.data}.kept", self.data)

    def revision(self):
        return json.loads(self.ask("get", "x", "-w", "json"))["header"]["revision"]

    def ask(self, *words):
        """What etcdctl, asked on this host, says of this member; None when it fails."""
        guards = self.guarded.of_etcdctl() if self.guarded else []
        command = self.host.prefix + ["etcdctl", "--endpoints", self.address(2379),
                                      "--dial-timeout=1s", "--command-timeout=2s", *guards, *words]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, env=self.host.environment())
        return None if done.returncode else done.stdout.decode()

    def change_members(self, is_done, *words):
        """Orders a change until it is done, as `is_done` finds in the list of the members: it is
        refused while one of them is new, and may be done without an answer."""
        def tried():
            self.ask("member", *words)
            said = self.ask("member", "list")
            return said is not None and is_done(said)
        wait_until(tried, 60)

    def is_healthy(self):
        """Whether it answers what takes a quorum."""
        return self.ask("get", PREFIX + "leader", "--keys-only") is not None

    def status(self):
        """What it says of itself, {} when it does not answer."""
        said = self.ask("endpoint", "status", "-w", "json")
        return json.loads(said)[0]["Status"] if said else {}

    def id(self):
        """As etcdctl wants to be told of it."""
        return f"{int(self.status()['header']['member_id']):x}"

    def leads(self):
        """Whether it is the leader of the cluster of etcd."""
        status = self.status()
        return bool(status) and status.get("leader") == status["header"]["member_id"]


class Guarded:
    """Certificates, and users with passwords, for a cluster that demands them."""

    def __init__(self, folder):
        self.folder, self.users = folder, False
        subject = "subjectAltName=" + ",".join(f"IP:10.78.0.{n}" for n in range(1, HOSTS + 1))
        openssl("req", "-x509", *KEY, "-days", "2", "-subj", "/CN=ca", "-keyout",
                self.path("ca.key"), "-out", self.path("ca.pem"))
        self._sign("server", "/O=etcd", subject)
        self._sign("client", "/O=flom", "subjectAltName=DNS:flom")
        self._sign("named", "/CN=flom", "subjectAltName=DNS:flom")

    def _sign(self, name, subject, extension):
        with open(self.path("extension"), "w") as file:
            file.write(extension)
        openssl("req", *KEY, "-subj", subject, "-keyout", self.path(f"{name}.key"),
                "-out", self.path(f"{name}.csr"))
        openssl("x509", "-req", "-days", "2", "-in", self.path(f"{name}.csr"),
                "-CA", self.path("ca.pem"), "-CAkey", self.path("ca.key"), "-CAcreateserial",
                "-extfile", self.path("extension"), "-out", self.path(f"{name}.pem"))

    def path(self, name):
        return os.path.join(self.folder, name)

    def enable_users(self, member):
        """Only root, and flom below its prefix, may read and write from now on."""
        for words in ("user add root:rootpw", "user add flom:secret", "role add flom",
                      f"role grant-permission flom readwrite --prefix=true {PREFIX}",
                      "user grant-role flom flom", "user grant-role root root", "auth enable"):
            assert member.ask(*words.split()) is not None, words
        self.users = True

    def of_etcd(self):
        return ["--cert-file", self.path("server.pem"), "--key-file", self.path("server.key"),
                "--trusted-ca-file", self.path("ca.pem"), "--client-cert-auth"]

    def of_etcdctl(self):
        user = ["--user", "root:rootpw"] if self.users else []
        return ["--cacert", self.path("ca.pem"), "--cert", self.path("client.pem"),
                "--key", self.path("client.key"), *user]

    def of_flomd(self, name="client"):
        with open(self.path("password"), "w") as file:
            file.write("secret\n")
        os.chmod(self.path("password"), 0o600)
        return ["--etcd-ca", self.path("ca.pem"), "--etcd-certificate", self.path(f"{name}.pem"),
                "--etcd-private-key", self.path(f"{name}.key"), "--etcd-user", "flom",
                "--etcd-password-file", self.path("password")]


def end_process(process):
    """Ends a process that the tests started, also one that is stopped."""
    if process is not None and process.poll() is None:
        process.kill()
        process.wait(timeout=10)


class World:
    """All of it.  Members and daemons have the numbers of their hosts, 1 to 3."""

    def __init__(self, hosts, guarded=None):
        self.hosts, self.guarded = hosts[:HOSTS], guarded
        self.client_hosts, self.network = hosts[HOSTS:], hosts[0].network
        self.network.add_backbone(HOSTS)
        self.members = {host.number: Member(host, guarded) for host in self.hosts}
        self.urls = ",".join(member.address(2379) for member in self.members.values())
        self.addresses = ",".join(host.ipv4 for host in self.hosts)
        self.daemons, self.load, self.log = {}, [], hosts[0].path("load")
        self.stopped = set()

    # Members and daemons

    def start_etcd(self):
        for member in self.members.values():
            member.start()

    def kill_etcd(self):
        for member in self.members.values():
            member.kill()

    def move_etcd_leader(self):
        """The next member becomes the leader of etcd, in good order."""
        leader = self.etcd_leader()
        following = leader % HOSTS + 1
        assert self.members[leader].ask("move-leader", self.members[following].id()) is not None
        wait_until(self.members[following].leads, 20)

    def replace(self, number):
        """Removes a member, and adds one without its data in its place, which learns before it
        may vote."""
        old, other = self.members[number], self.members[number % HOSTS + 1]
        peer, id = old.address(2380), old.id()
        other.change_members(lambda said: peer not in said, "remove", id)
        old.kill()
        old.wipe()
        old.joins = True
        other.change_members(lambda said: peer in said, "add", f"m{number}", "--learner",
                             "--peer-urls", peer)
        old.start()
        wait_until(old.status, 30)
        other.change_members(lambda said: ", true" not in said, "promote", old.id())

    def compact(self):
        """Removes the old revisions, and frees the space."""
        member = self.members[1]
        assert member.ask("compact", str(member.revision())) is not None
        for member in self.members.values():
            assert member.ask("defrag") is not None

    def await_etcd(self, seconds=30):
        wait_until(lambda: all(member.is_healthy() for member in self.members.values()), seconds)

    def await_an_answer_of_etcd(self, number, seconds=60):
        """s until a member that runs, but not that of the host with this number, answers."""
        begun = time.monotonic()
        members = [member for other, member in self.members.items()
                   if other != number and member.process.poll() is None]
        wait_until(lambda: any(member.is_healthy() for member in members), seconds)
        return time.monotonic() - begun

    def etcd_leader(self):
        """The number of the member that leads."""
        def found():
            return [n for n, member in self.members.items()
                    if member.process.poll() is None and member.leads()]
        return wait_until(found, 20)[0]

    def start_daemon(self, number, *options):
        host = self.hosts[number - 1]
        self.daemons[number] = host.flomd(
            "-f", "--no-files", "-a", host.ipv4, "--etcd", self.urls, "--etcd-prefix", PREFIX,
            "--etcd-ttl", f"{TTL}s", "--etcd-state", host.path("cluster"), *options)
        host.foreground.append(self.daemons[number])
        return self.daemons[number]

    def kill_daemon(self, number):
        end_process(self.daemons[number])

    def kill_daemons(self):
        for number in self.daemons:
            self.kill_daemon(number)

    def end_daemons(self):
        """In good order."""
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            assert daemon.end().status == 0, self.said()

    def start_daemons(self, *options):
        for number in self.members:
            self.start_daemon(number, *options)

    def start(self, *options):
        """Everything, until a daemon leads."""
        self.start_etcd()
        self.await_etcd()
        self.start_daemons(*options)
        return self.await_leader()

    def record(self):
        """The leader record, by any member that answers; {} where there is none."""
        for member in self.members.values():
            said = member.ask("get", PREFIX + "leader", "--print-value-only")
            if said is not None:
                return json.loads(said) if said.strip() else {}
        return {}

    def leader(self):
        """The number of the daemon that the record names; 0: none."""
        record = self.record()
        for host in self.hosts:
            if record.get("term") and host.ipv4 in record.get("address", ""):
                return host.number
        return 0

    def await_leader(self, seconds=20):
        """The number of a daemon that leads and lives."""
        def found():
            number = self.leader()
            lives = number in self.daemons and self.daemons[number].poll() is None
            return number if lives else 0
        try:
            return wait_until(found, seconds)
        except AssertionError:
            raise AssertionError(f"nobody leads; the daemons say:\n{self.said()}")

    def said(self):
        """What the daemons have said, for a test that fails."""
        return "\n".join(f"--- {host.ipv4}\n{read(process.paths[1])}" for host in self.hosts
                         for process in host.processes if "--etcd" in process.args)

    # Faults

    def signal(self, process, number):
        process.send_signal(number)
        if number == signal.SIGSTOP:
            self.stopped.add(process)
        else:
            self.stopped.discard(process)

    def cut(self, number, *cables):
        for cable in cables:
            self.network.cut(number, cable)

    def heal(self, number, *cables):
        for cable in cables:
            self.network.heal(number, cable)

    # The load

    def start_load(self, clients):
        """Half of the clients on each client host; a third process asks who serves."""
        each = clients // len(self.client_hosts)
        for host, name in zip(self.client_hosts, "ab"):
            self._start_load(host, "drive", self.log, FLOM, self.addresses, str(each), name, SEED)
        self._start_load(self.client_hosts[0], "probe", self.log, self.addresses)

    def _start_load(self, host, *words):
        self.load.append(host.start(*PYTHON, LOAD, *words, stdin=subprocess.PIPE))

    def lines(self):
        """The whole lines of the load's log so far."""
        return read(self.log).rpartition("\n")[0].splitlines() if os.path.exists(self.log) else []

    def keep(self):
        """From now on no command ends by itself."""
        open(f"{self.log}.keep", "w").close()

    def let_go(self):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.log}.keep")

    def found(self):
        """What the checker finds in the log so far."""
        return check(self.lines())

    def running_commands(self):
        """The runs whose command has begun and whose flom has not ended."""
        return [run for run in read_runs(self.lines())[0] if run.begun and run.left is None]

    def await_service(self, moment, seconds=60):
        """s from the moment until a probe that was sent later was answered."""
        def found():
            time_to = serves_after(self.found(), moment)
            return None if time_to is None else (time_to,)
        try:
            return wait_until(found, seconds)[0]
        except AssertionError:
            raise AssertionError(f"nobody serves for {seconds} s:\n{self.said()}")

    def await_everybody(self, moment, seconds=60):
        """s from the moment until each lock was granted to somebody who asked or waited then."""
        def found():
            begun = {}
            for line in self.lines():
                word, _, *middle, told = line.split()
                if word == "begin" and float(told) >= moment:
                    begun.setdefault(middle[0], float(told))
            return len(begun) == 3 and (max(begun.values()) - moment,)
        return wait_until(found, seconds)[0]

    def end_load(self, seconds=150):
        """Lets all clients have their turn, and returns what the checker found."""
        self.let_go()
        for process in self.load:
            process.stdin.close()
        deadline = time.monotonic() + seconds
        for process in self.load:
            process.wait(timeout=max(1, deadline - time.monotonic()))
        self.load = []
        return self.found()

    def errors(self):
        """What the clients have said on stderr, each line once with its number."""
        path = f"{self.log}.err"
        counted = {}
        for line in read(path).splitlines() if os.path.exists(path) else []:
            counted[line] = counted.get(line, 0) + 1
        return counted

    # The end

    def close(self):
        """Ends all that was started, however far it got."""
        for process in list(self.stopped):
            if process.poll() is None:
                self.signal(process, signal.SIGCONT)
        self.let_go()
        for process in self.load:  # the clients are left to the drivers' end
            if process.stdin and not process.stdin.closed:
                process.stdin.close()
        for host in self.client_hosts:
            self._end_all(host)
        for daemon in self.daemons.values():
            end_process(daemon)
        for member in self.members.values():
            end_process(member.process)

    def _end_all(self, host):
        """Ends whatever runs on a host of clients, also what it goes on to start."""
        def none_left():
            left = [pid for pid in host.running() if not has_ended(pid)]
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not left
        if self.load:
            wait_until(none_left, 20)
