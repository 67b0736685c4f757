"""lockload.c in Python, for a machine without a C compiler: same arguments, same figures.

    python3 lockload.py cycle|waiters|hold ADDRESS N [SECONDS] [same|own]

The address is the path of a socket, or HOST:PORT.  It takes more of the machine than the daemon
does, so ratios come out nearer to 1 than they are.
"""
import base64
import collections
import os
import resource
import select
import socket
import sys
import time

HEAD = '<?xml version="1.0" encoding="UTF-8" ?>'
LOCK = HEAD + ('<msg level="3" verb="1" step="8"><session peerid="lockload{:08}"/><resource '
               'name="{}" mode="5" wait="1" quantity="1" create="1" lifespan="0"/></msg>')
UNLOCK = HEAD + '<msg level="3" verb="2" step="8"><resource name="{}" rollback="0" /></msg>'


class Client:
    def __init__(self, number, name):
        self.number, self.name = number, base64.b64encode(name.encode()).decode()
        self.socket, self.queued, self.answers = None, False, b""

    def connect(self, path):
        """Connects and asks for the lock."""
        self.begun, self.queued = time.perf_counter(), False
        if path.startswith("/"):
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.socket.connect(path)
        else:
            host, _, port = path.rpartition(":")
            self.socket = socket.create_connection((host, int(port)))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.send(LOCK.format(self.number, self.name).encode())

    def granted(self):
        """Reads; whether the lock is held now."""
        data = self.socket.recv(4096)
        self.queued = self.queued or b'rc="1"' in data
        if not data or b'rc="-' in data:
            sys.exit(f"lockload.py: client {self.number}: {data!r}")
        return b'rc="0"' in data

    def leave(self):
        self.socket.send(UNLOCK.format(self.name).encode())
        self.socket.close()


class Load:
    """Clients and what they measure."""

    def __init__(self, path):
        self.path, self.live = path, {}
        # poll() would look at every waiter again for each event; its unit is the ms
        self.poll, self.patience = ((select.epoll(), 5) if hasattr(select, "epoll") else
                                    (select.poll(), 5000))
        self.samples, self.holders = [], 0
        self.count = collections.Counter()

    def start(self, client):
        client.connect(self.path)
        self.live[client.socket.fileno()] = client
        self.poll.register(client.socket.fileno(), select.POLLIN)

    def finish(self, client):
        self.poll.unregister(client.socket.fileno())
        del self.live[client.socket.fileno()]
        client.leave()

    def newly_granted(self):
        """The clients that hold their lock now and have not before."""
        events = self.poll.poll(self.patience)
        if not events:
            sys.exit(f"lockload.py: nothing for 5 s, {len(self.live)} clients still waiting")
        return [self.live[number] for number, _ in events if self.live[number].granted()]

    def cycle(self, clients, seconds, same):
        """Connect, lock, unlock, close, again; returns how long that took."""
        begun = time.perf_counter()
        for number in range(clients):
            self.start(Client(number, "shared" if same else f"own{number}"))
        while self.live:
            batch = self.newly_granted()
            self.count["violations"] += same and len(batch) > 1
            for client in batch:
                self.samples.append(time.perf_counter() - client.begun)
                self.finish(client)
                if time.perf_counter() < begun + seconds:
                    self.start(client)
        self.count["cycles"] = len(self.samples)
        return time.perf_counter() - begun

    def one_after_another(self, clients):
        """Starts clients, each when the one before has its answer; µs for each."""
        begun = time.perf_counter()
        for client in clients:
            self.start(client)
            while not client.granted() and not client.queued:
                pass
        return (time.perf_counter() - begun) / len(clients) * 1e6

    def latency(self, part):
        return sorted(self.samples)[int(part * (len(self.samples) - 1))] * 1e6


def cycle(load, clients, seconds, same):
    took = load.cycle(clients, seconds, same)
    return {"cycles": load.count["cycles"], "per_s": round(load.count["cycles"] / took),
            "p50_us": round(load.latency(.5)), "p99_us": round(load.latency(.99)),
            "violations": load.count["violations"], "errors": 0}


def waiters(load, size):
    """`size` clients queue behind one, which then lets go."""
    clients = [Client(number, "shared") for number in range(size + 1)]
    enqueue, last, overtakes = load.one_after_another(clients), 0, 0
    begun = time.perf_counter()
    load.finish(clients[0])
    while load.live:
        for client in load.newly_granted():
            overtakes += client.number != last + 1
            last = client.number
            load.finish(client)
    grant = (time.perf_counter() - begun) / size * 1e6
    return {"n": size, "enqueue_us": f"{enqueue:.1f}", "grant_us": f"{grant:.1f}",
            "overtakes": overtakes, "errors": 0}


def hold(load, size, seconds):
    """As many locks held, then cycles beside them."""
    holders = [Client(number, f"held{number}") for number in range(size)]
    fill = load.one_after_another(holders)
    beside = cycle(Load(load.path), 1, seconds, False)
    return {"n": size, "held": size, "fill_us": f"{fill:.1f}", "beside_per_s": beside["per_s"],
            "p50_us": beside["p50_us"], "p99_us": beside["p99_us"], "errors": 0}


def main(mode, path, size, seconds="3", whose="own"):
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    load, size, seconds = Load(path), int(size), float(seconds)
    figures = (cycle(load, size, seconds, whose == "same") if mode == "cycle" else
               waiters(load, size) if mode == "waiters" else hold(load, size, seconds))
    print(f"mode={mode} " + " ".join(f"{key}={value}" for key, value in figures.items()),
          flush=True)
    if mode == "hold":
        time.sleep(float(os.environ.get("LOCKLOAD_PAUSE", "0")))


if __name__ == "__main__":
    main(*sys.argv[1:])
