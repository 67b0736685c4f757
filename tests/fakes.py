"""FLoM's own two sides, as strict as the real ones: FlomClient and FlomDaemon.

Both send exactly the bytes of FLoM 1.7.2 (data/vectors.json) and fail where it fails: the client
by raising Died, the daemon by noting the reason in `deaths` and closing everything.

OurDaemon is a daemon of ours that does what a test wants of it.
"""
import base64
import os
import re
import select
import selectors
import socket
import threading
import time
import xml.parsers.expat
from contextlib import ExitStack, suppress

PEER = "0123456789abcdef0123456789abcdef"
HEADER = '<?xml version="1.0" encoding="UTF-8" ?>'
END = b"</msg>"
ATTRIBUTES_MAY_FOLLOW = {"msg", "session", "resource", "answer"}
KNOWN = ATTRIBUTES_MAY_FOLLOW | {"network", "shutdown"}
LOCK, UNLOCK, PING, DISCOVER, MANAGEMENT = 1, 2, 3, 4, 5
MODES = "NL CR CW PR PW EX".split()
COMPATIBLE = {"NL": "NL CR CW PR PW EX", "CR": "NL CR CW PR PW", "CW": "NL CR CW", "PR": "NL CR PR",
              "PW": "NL CR", "EX": "NL"}


class Died(Exception):
    """What would have ended FLoM's process."""


def b64(name):
    return base64.b64encode(name.encode()).decode()


def message(verb, step, body=""):
    return f'{HEADER}<msg level="3" verb="{verb}" step="{step}">{body}</msg>'.encode()


def parse(data):
    """{tag: attributes} as FLoM's parser sees a message; raises Died where it does not survive."""
    found = {}
    parser = xml.parsers.expat.ParserCreate()

    def start(tag, attributes):
        if tag not in KNOWN and attributes:
            raise Died(f"element {tag} with attributes")
        allowed = {"network": {"address", "port"}, "shutdown": {"immediate"}}.get(tag)
        if allowed and set(attributes) - allowed:
            raise Died(f"unknown attribute of {tag}: {attributes}")
        found[tag] = attributes

    parser.StartElementHandler = start
    try:
        data.decode("utf-8")
        parser.Parse(data, True)
    except (xml.parsers.expat.ExpatError, UnicodeDecodeError) as error:
        raise Died(f"unreadable: {error}: {data!r}")
    if not {"verb", "step"} <= set(found.get("msg", ())):
        raise Died(f"no verb and step: {data!r}")
    return found


def number(attributes, name):
    """An attribute as FLoM reads it: absent or unreadable is 0."""
    found = re.match(r"\s*([+-]?\d+)", attributes.get(name, ""))
    return int(found.group(1)) if found else 0


class FlomClient:
    """A connection of FLoM's client, whose every wait a test bounds by `seconds`."""

    def __init__(self, family, address, seconds=10):
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(seconds)
        self.socket.connect(address)
        self.name = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def receive(self):
        """The bytes of one message: six at a time, never one behind its end; b"" at EOF."""
        data = b""
        while not data.endswith(END):
            matched = max(n for n in range(6) if n == 0 or data.endswith(END[:n]))
            more = self.socket.recv(6 - matched)
            if not more and data:
                raise Died(f"half a message: {data!r}")
            if not more:
                return b""
            data += more
            if len(data) > 1023:
                raise Died("a message longer than 1023 bytes")
        return data

    def answer(self, *steps):
        """(step, rc, element) of the next answer, one of these steps; None at EOF."""
        data = self.receive()
        if not data:
            return None
        found = parse(data)
        step = number(found["msg"], "step")
        if number(found["msg"], "level") != 3 or number(found["msg"], "verb") != LOCK:
            raise Died(f"not an answer to a lock: {data!r}")
        if step not in steps or "answer" not in found or (step == 16 and "session" not in found):
            raise Died(f"out of place: {data!r}")
        return step, number(found["answer"], "rc"), found["answer"].get("element")

    def ask(self, name, mode="EX", wait=1, create=1, lifespan=0, quantity=None):
        """Sends a lock 8 and returns the first answer."""
        self.name = name
        middle = f'mode="{MODES.index(mode)}" wait="{wait}"'
        if quantity is not None:
            middle = f'wait="{wait}" quantity="{quantity}"'
        elif not (name[0] in "/" or name.isalnum() or name == "_RESOURCE"):
            middle = f'wait="{wait}"'
        self.socket.sendall(message(
            LOCK, 8, f'<session peerid="{PEER}"/><resource name="{b64(name)}" {middle} '
                     f'create="{create}" lifespan="{lifespan}"/>'))
        return self.answer(16)

    def wait(self):
        """Waits as FLoM does: a step 24 with any rc but 1 counts as a grant; (rc, element)."""
        while True:
            answer = self.answer(24, 32)
            if answer is None:
                return None
            if answer[1] != 1:
                return answer[1:]

    def lock(self, name, **options):
        """The element (or True) when FLoM's client would now run its command, else the rc."""
        answer = self.ask(name, **options)
        if answer is not None and answer[1] in (1, 2):
            return self._granted(self.wait())
        return self._granted(answer and answer[1:]) if answer and answer[1] == 0 else answer

    def _granted(self, answer):
        return answer and (answer[1] or True)

    def unlock(self, rollback=0):
        self.socket.sendall(message(
            UNLOCK, 8, f'<resource name="{b64(self.name)}" rollback="{rollback}" />'))

    def leave(self):
        """Half-closes and reads until EOF, as FLoM's client ends; returns what came."""
        self.socket.shutdown(socket.SHUT_WR)
        data = b""
        while True:
            more = self.socket.recv(4096)
            if not more:
                return data
            data += more

    def release(self, rollback=0):
        self.unlock(rollback)
        return self.leave()

    def shut_down(self, immediate):
        """Sends a management 8 and waits for EOF."""
        self.socket.sendall(message(
            MANAGEMENT, 8, f'<session peerid="{PEER}"/><shutdown immediate="{immediate}"/>'))
        return self.leave()


def discover(family, address, seconds=2):
    """Asks one discover 8 and returns (address, port, source) as FLoM's client takes it."""
    with socket.socket(family, socket.SOCK_DGRAM) as question:
        question.settimeout(seconds)
        question.sendto(message(DISCOVER, 8), address)
        data, source = question.recvfrom(2048)
    found = parse(data)
    if "network" not in found or not {"address", "port"} <= set(found["network"]):
        raise Died(f"a discover 16 without network, address or port: {data!r}")
    return found["network"]["address"] or source[0], number(found["network"], "port"), source


class Peer:
    """What FlomDaemon knows of one connection."""

    def __init__(self, connection):
        self.connection, self.data, self.state = connection, b"", "new"
        self.name = self.mode = self.quantity = None


class FlomDaemon:
    """FLoM's daemon in a thread: simple and numeric resources, first fit, released by EOF.

    `deaths`: why it would have ended; `messages`: all that it was sent; `lost`: management
    messages that FLoM overlooks since the client was gone when it read them.
    """

    def __init__(self, unix=None, tcp=None, udp=None, announce=None):
        self.deaths, self.messages, self.lost, self.ended = [], [], [], False
        self.peers, self.idle, self.quiescing, self.stopping = {}, {}, False, False
        self.selector, self.listeners, self.announce = selectors.DefaultSelector(), [], announce
        self.wake, self.awake = socket.socketpair()
        self.selector.register(self.awake, selectors.EVENT_READ, self._stop)
        self.unix = unix
        if unix:
            self._listen(socket.AF_UNIX, unix)
        if tcp:
            self.tcp = self._listen(socket.AF_INET6 if ":" in tcp[0] else socket.AF_INET, tcp)
        if udp:
            self.udp = self._bind_udp(udp)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if not self.ended:
            self.wake.send(b"x")
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.wake.close()

    def waiting(self):
        """How many clients are queued or parked."""
        return sum(peer.state in ("queued", "parked") for peer in list(self.peers.values()))

    # Sockets

    def _listen(self, family, address):
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(100)
        self.listeners.append(listener)
        self.selector.register(listener, selectors.EVENT_READ, self._accept)
        return listener.getsockname()

    def _bind_udp(self, address):
        bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        bound.bind(address)
        self.listeners.append(bound)
        self.selector.register(bound, selectors.EVENT_READ, self._datagram)
        return bound.getsockname()

    def _run(self):
        try:
            while not self.stopping:
                for key, _ in self.selector.select():
                    if not self.stopping:
                        key.data(key.fileobj)
        except Died as death:
            self.deaths.append(str(death))
        self.ended = True
        for thing in [self.awake] + self.listeners + list(self.peers):
            thing.close()
        self.selector.close()
        if self.unix:
            os.unlink(self.unix)

    def _stop(self, _):
        self.stopping = True

    def _accept(self, listener):
        connection = listener.accept()[0]
        self.peers[connection] = Peer(connection)
        self.selector.register(connection, selectors.EVENT_READ, self._readable)

    def _close(self, peer):
        self.selector.unregister(peer.connection)
        del self.peers[peer.connection]
        peer.connection.close()
        self._release(peer)
        if self.quiescing and not self.peers:
            self.stopping = True

    def _send(self, peer, data):
        try:
            peer.connection.sendall(data)
        except OSError:
            pass  # it is gone; its EOF follows

    def _readable(self, connection):
        peer = self.peers[connection]
        try:
            more = connection.recv(4096)
        except OSError:
            more = b""
        if not more:
            self._close(peer)
            return
        peer.data += more
        while END in peer.data and connection in self.peers and not self.stopping:
            end = peer.data.index(END) + len(END)
            data, peer.data = peer.data[:end], peer.data[end:]
            self._message(peer, data)
        if len(peer.data) > 511 and connection in self.peers:
            self._close(peer)

    def _datagram(self, bound):
        data, source = bound.recvfrom(2048)
        self.messages.append(data)
        found = parse(data)
        if (number(found["msg"], "verb"), number(found["msg"], "step")) != (DISCOVER, 8):
            raise Died(f"a datagram out of place: {data!r}")
        address, port = self.announce or ("", self.tcp[1])
        bound.sendto(message(DISCOVER, 16, f'<network address="{address}" port="{port}"/>'), source)

    # Messages

    def _message(self, peer, data):
        self.messages.append(data)
        if len(data) > 511:
            self._close(peer)
            return
        found = parse(data)
        if "level" in found["msg"] and number(found["msg"], "level") != 3:
            self._close(peer)
            return
        kind = number(found["msg"], "verb"), number(found["msg"], "step")
        obey = {(LOCK, 8): self._lock, (UNLOCK, 8): self._unlock,
                (MANAGEMENT, 8): self._management}.get(kind)
        if not obey:
            raise Died(f"out of place on a stream: {data!r}")
        obey(peer, found, data)

    def _answer(self, peer, step, rc):
        session = f'<session peerid="{PEER}"/>' if step == 16 else ""
        self._send(peer, message(LOCK, step, f'{session}<answer rc="{rc}"/>'))

    def _lock(self, peer, found, data):
        if "session" not in found or "resource" not in found:
            raise Died(f"half a lock: {data!r}")
        if peer.state not in ("new", "refused"):
            raise Died(f"a second lock on a connection that is {peer.state}: {data!r}")
        resource = found["resource"]
        name = base64.b64decode(resource.get("name", "")).decode()
        pool = re.fullmatch(r"[A-Za-z][A-Za-z0-9]*\[([0-9]+)\]", name)
        if not pool and not re.fullmatch("_RESOURCE|[A-Za-z][A-Za-z0-9]*", name):
            self._answer(peer, 16, -14)
            peer.connection.shutdown(socket.SHUT_WR)
            peer.state = "refused"
            return
        exists = self._exists(name)
        peer.name, peer.mode = name, MODES[number(resource, "mode")]
        peer.quantity = number(resource, "quantity")
        wait, create = number(resource, "wait"), number(resource, "create")
        self._decide(peer, exists, wait, create, int(pool.group(1)) if pool else None)

    def _decide(self, peer, exists, wait, create, pool):
        peer.state = "refused"
        if not exists and not create and not wait:
            self._answer(peer, 16, 5)
            peer.connection.shutdown(socket.SHUT_WR)
        elif not exists and not create:
            peer.state = "parked"
            self._answer(peer, 16, 2)
        elif pool is not None and peer.quantity > pool:
            self._answer(peer, 16, 6)
        elif self._fits(peer):
            peer.state = "holds"
            self._answer(peer, 16, 0)
        elif wait:
            peer.state = "queued"
            self._answer(peer, 16, 1)
        else:
            self._answer(peer, 16, 4)
        if create and not exists and peer.state in ("holds", "queued"):
            self._wake_parked(peer.name)

    def _exists(self, name):
        used = any(peer.name == name and peer.state in ("holds", "queued")
                   for peer in self.peers.values())
        return used or self.idle.get(name, 0) > time.monotonic()

    def _fits(self, peer):
        holders = [other for other in self.peers.values()
                   if other.name == peer.name and other.state == "holds"]
        if "[" in peer.name:
            size = int(peer.name[peer.name.index("[") + 1:-1])
            return sum(other.quantity for other in holders) + peer.quantity <= size
        return all(other.mode in COMPATIBLE[peer.mode].split() for other in holders)

    def _wake_parked(self, name):
        for peer in list(self.peers.values()):
            if peer.name == name and peer.state == "parked":
                peer.state = "holds" if self._fits(peer) else "queued"
                self._answer(peer, 24, 0 if peer.state == "holds" else 1)

    def _unlock(self, peer, found, data):
        if peer.state == "parked" or "resource" not in found:
            raise Died(f"an unlock from a client that is {peer.state}: {data!r}")
        name = base64.b64decode(found["resource"].get("name", "")).decode()
        if peer.state != "holds" or name != peer.name:
            self._close(peer)
        else:
            self._release(peer)

    def _release(self, peer):
        released, peer.state = peer.state, "released"
        if released != "holds":
            return
        self.idle[peer.name] = time.monotonic() + 2
        for other in list(self.peers.values()):
            if other.name == peer.name and other.state == "queued" and self._fits(other):
                other.state = "holds"
                self._answer(other, 24, 0)

    def _management(self, peer, found, data):
        if "shutdown" not in found:
            raise Died(f"half a management message: {data!r}")
        poll = select.poll()
        poll.register(peer.connection, select.POLLIN)
        if any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0)):
            self.lost.append(data)
        elif number(found["shutdown"], "immediate"):
            self.stopping = True
        else:
            self.quiescing = True


LINGER = b"\1\0\0\0\0\0\0\0"  # a close resets the connection


class OurDaemon:
    """A daemon of ours in threads, whose memory outlives its ends by `die`, to the next `begin`.

    `grace`, `interval` (between pings): what it tells (ms), None: nothing.  `element`: that of
    each grant.  `reason`: that of each other answer.  `leads`: it serves at once.  Between `stop`
    and `go_on` it does nothing, as by STOP.  `does`: what it does about a message in place of its
    work, {"lock", "reclaim", "unlock" or "ping": an rc to refuse with, "close", "reset", "die",
    "hang", a function that is called before the work, or a context in which it is done}.
    `holders`: {name: (id, key, token)}, names in base64; `messages`: [(kind, {tag: attributes})];
    `rolled_back`: the tokens that were.
    """

    def __init__(self, family, address, grace=None, element=None, interval=None, reason=None,
                 leads=True, **does):
        self.family, self.address, self.grace, self.does = family, address, grace, does
        self.element, self.interval, self.reason = element, interval, reason
        self.holders, self.messages, self.rolled_back, self.runs = {}, [], [], 0
        self.changed, self.connections, self.threads = threading.Condition(), set(), []
        self.carriers = {}  # {name: the connection of its holder}
        self.listener = None
        self.life = threading.RLock()  # it begins and dies in one thread after the other
        self.goes_on = threading.Event()
        self.goes_on.set()
        if leads:
            self.begin()

    def close(self):
        self.goes_on.set()
        self.die()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        if self.family == socket.AF_UNIX and os.path.exists(self.address):
            os.unlink(self.address)

    def begin(self):
        """It serves from now on, as the next run of itself."""
        with self.life:
            self.runs += 1
            if self.family == socket.AF_UNIX and os.path.exists(self.address):
                os.unlink(self.address)
            self.listener = socket.socket(self.family, socket.SOCK_STREAM)
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.listener.bind(self.address)
            self.listener.listen(100)
            self._start(self._accept, self.listener)

    def die(self):
        """It ends, as by KILL."""
        with self.life:
            self._stop_listening()
            self._cut_off()

    def _stop_listening(self):
        """Before its connections end: a client is back within no time."""
        with self.changed:
            listener, self.listener = self.listener, None
        if listener:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _cut_off(self):
        with self.changed:
            for connection in list(self.connections):
                with suppress(OSError):  # it has ended
                    connection.shutdown(socket.SHUT_RDWR)
            self.connections.clear()
            self.changed.notify_all()

    def stop(self):
        self.goes_on.clear()

    def go_on(self):
        self.goes_on.set()

    def be_deposed(self):
        """Another leads: from now on it changes nothing in the memory of all."""
        self.carriers.clear()

    def reset(self):
        """It ends, and resets its connections."""
        with self.life:
            self._stop_listening()
            with self.changed:
                for connection in list(self.connections):
                    with suppress(OSError):  # it has ended
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
                        connection.shutdown(socket.SHUT_RD)
                self.connections.clear()
            self.die()

    def count(self, kind):
        """How many messages of a kind it has had."""
        return sum(one == kind for one, _ in list(self.messages))

    def _start(self, function, *some):
        thread = threading.Thread(target=function, args=some)
        self.threads.append(thread)
        thread.start()

    def _accept(self, listener):
        with suppress(OSError):  # it has died
            while True:
                connection = listener.accept()[0]
                with self.changed:
                    if listener is not self.listener:  # it has died since
                        connection.close()
                        return
                    self.connections.add(connection)
                self._start(self._serve, connection)

    def _serve(self, connection):
        held = None
        with connection, suppress(OSError):
            while connection in self.connections:
                data = read_message(connection)
                self.goes_on.wait(20)
                if not data or connection not in self.connections:
                    break
                held = self._obey(connection, parse(data), held)
        with self.changed:
            if connection in self.connections and self.carriers.get(held) is connection:
                self.holders.pop(held, None)  # the client has closed it
            self.connections.discard(connection)
            self.changed.notify_all()

    def _obey(self, connection, found, held):
        """Does what a message wants; returns the name of what the connection holds then."""
        kind = {LOCK: "lock", UNLOCK: "unlock", PING: "ping"}[number(found["msg"], "verb")]
        resource = found.get("resource", {})
        if "reclaim" in resource:
            kind = "reclaim"
        self.messages.append((kind, found))
        action = self.does.get(kind)
        if isinstance(action, str):
            getattr(self, f"_{action}")(connection)
            return held
        with ExitStack() as stack:
            if hasattr(action, "__enter__"):
                stack.enter_context(action)
            return self._work(connection, found, held, kind, action)

    def _work(self, connection, found, held, kind, action):
        resource = found.get("resource", {})
        if callable(action):
            action()
        if kind == "ping":
            connection.sendall(message(PING, 16))
        elif kind == "unlock":
            with self.changed:
                _, _, token = self.holders.pop(held, (None,) * 3)
                if resource["rollback"] == "1":
                    self.rolled_back.append(token)
                self.changed.notify_all()
            return None
        elif isinstance(action, int):
            self._answer(connection, 16, action)
        else:
            return self._grant(connection, kind, found["session"], resource)
        return held

    def _grant(self, connection, kind, session, resource):
        name, asker = resource["name"], (session.get("id"), session.get("key"))
        step = 16
        with self.changed:
            while self._has_other_holder(name, asker) or not self.goes_on.is_set():
                if kind == "reclaim" or resource["wait"] == "0":
                    self._answer(connection, step, 4)
                    return None
                if step == 16:
                    self._answer(connection, step, 1)
                    step = 24
                self._answer_pings(connection)
                if connection not in self.connections:
                    raise OSError("it has died")
            if name not in self.holders:
                self.holders[name] = (*asker, resource.get("reclaim", str(2 ** 32 + self.runs)))
            self.carriers[name] = connection
            self._answer(connection, step, 0, self.holders[name][2], self.element)
        return name

    def _has_other_holder(self, name, asker):
        return name in self.holders and self.holders[name][:2] != asker

    def _answer_pings(self, connection):
        """Waits for a change; meanwhile it answers the pings of one that waits."""
        if self.interval is None:
            self.changed.wait(10)
            return
        self.changed.wait(0.01)
        if self.goes_on.is_set() and select.select([connection], [], [], 0)[0]:
            data = read_message(connection)
            if not data:
                raise OSError("it has gone")
            self.messages.append(("ping", parse(data)))
            action = self.does.get("ping")
            if callable(action):
                action()
            connection.sendall(message(PING, 16))

    def _answer(self, connection, step, rc, token=None, element=None):
        about = ""
        if step == 16:
            grace = "" if self.grace is None else f' grace="{self.grace}"'
            ping = "" if self.interval is None else f' ping="{self.interval}"'
            about = f'<session peerid="{PEER}" daemon="{self.runs:016x}"{grace}{ping}/>'
        told = "" if token is None else f' token="{token}"'
        told += "" if element is None else f' element="{element}"'
        told += "" if self.reason is None or rc == 0 else f' reason="{self.reason}"'
        connection.sendall(message(LOCK, step, f'{about}<answer rc="{rc}"{told}/>'))

    # What it does in place of its work

    def _close(self, _):
        raise OSError("it closes the connection")

    def _reset(self, connection):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
        raise OSError("it resets the connection")

    def _die(self, connection):
        """The run that had the message ends, and not the next one."""
        with self.life:
            if connection in self.connections:
                self.die()

    def _hang(self, connection):
        connection.settimeout(None)
        while connection.recv(4096):
            pass


class Scripted:
    """A listener whose connections are served, one after the other, by a function of the test."""

    def __init__(self, path, serve):
        self.path, self.serve, self.failure = path, serve, None
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(path)
        self.listener.listen(100)
        self.thread = threading.Thread(target=self._run)

    def __enter__(self):
        self.thread.start()
        return self

    def _run(self):
        try:
            while True:
                connection = self.listener.accept()[0]
                with connection:
                    connection.settimeout(10)
                    self.serve(connection)
        except OSError as error:  # the listener was shut down, or the client has gone
            self.failure = error

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join(15)
        assert not self.thread.is_alive()
        self.listener.close()
        os.unlink(self.path)


def read_message(connection):
    """The bytes up to the next </msg>, or up to EOF."""
    data = b""
    while not data.endswith(END):
        more = connection.recv(1)
        if not more:
            break
        data += more
    return data
