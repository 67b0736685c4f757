"""A hostile peer, and a well-behaved client that measures what it has to wait beside it.

    attack.py unix|tcp|tls|udp ADDRESS PORT SEED COUNT [CERTIFICATE KEY]
        sends COUNT generated messages: random bytes, valid ones cut or with bits flipped, huge
        ones, valid ones in a wrong order, byte by byte
    attack.py beside unix|tcp|tls ADDRESS PORT [CERTIFICATE KEY]
        locks and unlocks until its standard input ends, then prints, in ms, how often and the
        median, the 99th percentile and the greatest of the waits
"""
import random
import select
import socket
import ssl
import sys
import time

from fakes import DISCOVER, LOCK, PEER, PING, UNLOCK, FlomClient, b64, message

NAMES = ["R1", "pool[3]", "A.B.C", "/a/b", "_s_seq[2]", "_S_seq[1]", "_t_%S#ffffff[2]", "_STATUS"]


def valid(chance):
    """A message that a client may send, at its place or not; none that ends the daemon."""
    name = b64(chance.choice(NAMES))
    rest = "".join(f' {key}="{chance.randint(0, top)}"' for key, top in (
        ("mode", 5), ("wait", 1), ("create", 1), ("lifespan", 9)))
    return chance.choice([
        message(LOCK, 8, f'<session peerid="{PEER}"/><resource name="{name}"{rest}/>'),
        message(LOCK, 8, f'<session peerid="{PEER}" client="flom.py/1" id="{name}" parent="{name}" '
                         f'progress="1"/><resource name="{name}"{rest} quantity="2"/>'),
        message(UNLOCK, 8, f'<resource name="{name}" rollback="0" />'),
        message(LOCK, 16, f'<session peerid="{PEER}"/><answer rc="0"/>'),
        message(LOCK, 24, '<answer rc="0"/>'), message(PING, 8), message(PING, 16),
        message(DISCOVER, 8), message(DISCOVER, 16, '<network address="127.0.0.1" port="1"/>')])


def generated(chance):
    """The bytes of one hostile message."""
    data = bytearray(valid(chance))
    form = chance.randrange(6)
    if form == 0:
        return bytes(chance.getrandbits(8) for _ in range(chance.randint(1, 600)))
    if form == 1:
        return bytes(data[:chance.randrange(len(data))])
    if form == 2:
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    if form == 3 and chance.random() < 0.03:
        return chance.choice([b"x", b"<", b' a="', b"<a>", b"<a/>", b"&#65;"]) * 20000 + data
    return bytes(data)


class Stream:
    """Sends messages on connections, some to each."""

    def __init__(self, chance, family, address, context=None):
        self.chance, self.family, self.address, self.context = chance, family, address, context

    def send(self, messages):
        with socket.socket(self.family, socket.SOCK_STREAM) as plain:
            plain.settimeout(10)
            try:
                plain.connect(self.address)
                connection = self.context.wrap_socket(plain) if self.context else plain
                with connection:
                    self._write(connection, b"".join(messages))
            except OSError:  # the daemon has closed it, as it should
                pass

    def _write(self, connection, data):
        step = self.chance.choice([1, 7, 100, len(data), len(data)]) if len(data) < 3000 else 65536
        for start in range(0, len(data), max(1, step)):
            connection.sendall(data[start:start + step])
        if self.chance.random() < 0.3:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if self.chance.random() < 0.5 and select.select([connection], [], [], 0)[0]:
            connection.settimeout(0.01)  # with TLS it may be no answer that can be read
            connection.recv(4096)


class Datagrams:
    def __init__(self, address):
        self.address = address

    def send(self, messages):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
            for data in messages:
                asker.sendto(data[:60000], self.address)


def peer(kind, host, port, files=()):
    """(family, address, TLS context or None)."""
    context = None
    if kind == "tls":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.load_cert_chain(*files)
    if host[0] == "/":
        return socket.AF_UNIX, host, context
    return socket.AF_INET, (host, int(port)), context


def attack(kind, host, port, seed, count, *files):
    chance, left = random.Random(int(seed)), int(count)
    family, address, context = peer(kind, host, port, files)
    target = Datagrams(address) if kind == "udp" else Stream(chance, family, address, context)
    while left > 0:
        burst = min(left, chance.randint(1, 20))
        target.send([generated(chance) for _ in range(burst)])
        left -= burst


def wait_once(family, address, context):
    """Locks, unlocks; returns the ms from connecting to the grant."""
    begin = time.monotonic()
    with FlomClient(family, address, 30) as client:
        if context:
            client.socket = context.wrap_socket(client.socket)
        assert client.lock("beside") is True
        waited = time.monotonic() - begin
        client.unlock()
    return 1000 * waited


def beside(kind, host, port, *files):
    print("ready", flush=True)
    waits, target = [], peer(kind, host, port, files)
    while not waits or not select.select([0], [], [], 0.002)[0]:
        waits.append(wait_once(*target))
    waits.sort()
    print(len(waits), *(round(waits[int((len(waits) - 1) * part)], 1) for part in (.5, .99, 1)))


if __name__ == "__main__":
    (beside if sys.argv[1] == "beside" else attack)(*sys.argv[1 + (sys.argv[1] == "beside"):])
