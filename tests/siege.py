"""A hostile host: all that a stranger can do to a daemon, of many kinds, for a time.

    siege.py besiege KIND,... HOST PORT GROUP SEED SECONDS CONNECTIONS
        each KIND is a function below; they are called again and again, in turns, until the time is
        over or so many connections have been made; what one opens may stay open between two calls:
        the oldest make way for the newest
    siege.py hold HOST PORT
        ten clients of each kind of resource take locks; when its standard input ends, prints how
        many are held, and by the daemon's report, too
"""
import collections
import contextlib
import itertools
import json
import os
import random
import select
import socket
import sys
import time

from attack import generated
from fakes import DISCOVER, LOCK, MANAGEMENT, PEER, PING, UNLOCK, FlomClient, b64, message

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")
RESET = b"\1\0\0\0\0\0\0\0"  # SO_LINGER
HELD = ["R{}", "pool[10]", "a.b.c.d.e.f.g.h.i.j", "/t/{}", "_s_x[10]", "_S_y[10]",
        "_t_%S#fff[10]"]  # what ten clients of each kind hold meanwhile
NAMES = [form.format(0) for form in HELD]
CHAINED = 400 if os.environ.get("FLOM_SOAK") == "1" else 120  # connections of nested commands
STATUS = message(LOCK, 8, f'<resource name="{b64("_STATUS")}" wait="0"/>')


class Siege:
    """The connections of one kind, and chance."""

    def __init__(self, host, port, group, seed):
        self.address, self.group, self.chance = (host, int(port)), group, random.Random(seed)
        self.kept, self.made = collections.deque(), 0

    def connect(self):
        """A connection, or None where the daemon takes no more."""
        self.made += 1
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        made.settimeout(2)
        try:
            made.connect(self.address)
            return made
        except OSError:
            made.close()
            return None

    def say(self, *messages, keep=0, read=0):
        """Sends messages on a new connection, reads so many bytes, and keeps so many of them."""
        made = self.connect()
        if made is None:
            return None
        answer = b""
        with contextlib.suppress(OSError):
            made.sendall(b"".join(messages))
            while len(answer) < read:
                more = made.recv(65536)
                if not more:
                    break
                answer += more
        self.kept.append(made)
        while len(self.kept) > keep:
            self.kept.popleft().close()
        return answer

    def ours(self, name, ident, parents="", mode=5, wait=1, more="", about=""):
        """The lock 8 of a client that names itself."""
        return message(LOCK, 8, f'<session peerid="{PEER}" client="flom.py/1" id="{ident}" '
                                f'parent="{parents}"{about}/><resource name="{b64(name)}" '
                                f'mode="{mode}" wait="{wait}" create="1" lifespan="0"{more}/>')

    def ident(self):
        return f"{self.chance.getrandbits(64):016x}"


def connections(siege):
    """Those that come and go, say nothing, or are reset."""
    for _ in range(50):
        siege.say(keep=300)
    for made in siege.kept:
        if siege.chance.random() < 0.1:
            with contextlib.suppress(OSError):
                made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def halves(siege):
    """A part of a message, and another a little later."""
    whole = siege.ours("R0", siege.ident())
    siege.say(whole[:siege.chance.randrange(len(whole))], keep=200)
    made = siege.chance.choice(siege.kept) if siege.kept else None
    if made:
        with contextlib.suppress(OSError):
            made.sendall(b"<a/>")


def oversize(siege):
    """Messages without an end, and long ones that are hard to read."""
    inside = siege.chance.choice([
        b"<a/>" * 15000, b"<a>" * 20000, b"&#65;" * 12000, b' a="1"' * 10000, b"x" * 200000,
        b'<msg a="' + b"&amp;" * 12000 + b'"/>', b"<session " + b'a="&#65;" ' * 6000 + b"/>",
        b"<" + b"a" * 60000 + b"/>", b" " * 60000])
    siege.say(message(LOCK, 8, inside.decode()), keep=5)


def slow_readers(siege):
    """Questions without reading the answers."""
    siege.say(message(PING, 8) * 3000, keep=20)
    siege.say(STATUS * 3, keep=20)


def reports(siege):
    """Long names, many of them, and reports of all that, which are read."""
    for _ in range(4):
        siege.say(*[siege.ours(f"/{siege.chance.randrange(2000)}/{'x' * 40000}", siege.ident(),
                               wait=0, mode=0)], keep=200)
    for _ in range(20):
        siege.say(siege.ours(f"n{siege.chance.randrange(3000)}", siege.ident(), mode=0), keep=200)
    siege.say(STATUS, read=5 * 10 ** 6, keep=200)


def chains(siege):
    """Commands under locks that ask for the locks of others, with chains of parents."""
    idents = [siege.ident() for _ in range(40)]
    for number, ident in enumerate(idents):
        siege.say(siege.ours(f"c{number}", ident), keep=CHAINED)
    for number, ident in enumerate(idents):
        parents = ",".join(siege.chance.sample(idents, 7) + [ident])
        name = siege.chance.choice([f"c{(number + 1) % 40}", "pool[10]", "/c/x/y", "a.b", "q[3]"])
        siege.say(siege.ours(name, siege.ident(), parents,
                             mode=siege.chance.randrange(6)), keep=CHAINED)


def crowds(siege):
    """Waiters that want to know their places, on one resource, and leave again."""
    name = siege.chance.choice(NAMES + ["crowd"] * 5)
    for _ in range(30):
        siege.say(siege.ours(name, siege.ident(), mode=siege.chance.randrange(6),
                             about=' progress="1"'), keep=400)


def names(siege):
    """Names that make work: deep, wide, of many slots, with formats."""
    chance = siege.chance
    name = chance.choice([
        "/a" * 250, "A" + ".b" * 20000, "/" + "x" * 40000, "a" * 40000, "/" + "a/" * 20000 + "a",
        "_t_%S" + "%65000d" * 50 + "[1]", f"_t_%S#ffffff{'a' * chance.randrange(300)}[5]",
        f"n[{'9' * chance.randrange(1, 300)}]", f"_s_x[{chance.randrange(99)}]",
        f"r{chance.randrange(10 ** 6)}", f"/{'/'.join(str(chance.randrange(9)) for _ in '12345')}"])
    for mode in (5, 3):
        siege.say(siege.ours(name, siege.ident(), mode=mode), siege.ours(name, siege.ident()),
                  message(UNLOCK, 8, f'<resource name="{b64(name)}" rollback="1" />'), keep=50)


def impostors(siege):
    """Reclaims of locks that others hold, evictions, orders to end."""
    report = siege.say(STATUS, read=300000) or b""
    for entry in report.split(b"<holder ")[1:20]:
        fields = dict(part.split(b"=", 1) for part in entry.split(b">")[0].split() if b"=" in part)
        ident, token = (fields.get(key, b'"0"').strip(b'"').decode() for key in (b"id", b"token"))
        for name in NAMES:
            siege.say(siege.ours(name, ident, wait=0, more=f' reclaim="{token}"'), keep=5)
        siege.say(message(MANAGEMENT, 8, f'<session peerid="{PEER}"/><evict id="{ident}"/>'))
    siege.say(message(MANAGEMENT, 8, '<shutdown immediate="1"/>'))


def nonsense(siege):
    """Generated messages."""
    siege.say(*[generated(siege.chance) for _ in range(10)])


def known_cases(siege):
    """The cases that ended FLoM's daemon, less the order to end that would be none from here."""
    with open(os.path.join(DATA, "hostile.json")) as file:
        cases = json.load(file)["cases"]
    for case in cases:
        first = case["first_send_then_read_one_answer_hex"]
        siege.say(bytes.fromhex(first or ""), *[
            b"x" * 100000 if "KB" in text else bytes.fromhex(text)
            for text in case["then_send_hex"]], keep=20)


def datagrams(siege):
    """Forged questions and answers, to the group and to the daemon."""
    forms = [message(DISCOVER, 8), generated(siege.chance)[:60000]]
    for ident in (siege.ident(), "0"):
        pair = f'daemon="{ident}" started="{siege.chance.choice([0, 1, 2 ** 62])}"'
        for step, body in ((8, ""), (16, '<network address="10.77.0.2" port="9"/>'),
                           (16, '<network address="" port="28015"/>'),
                           (16, f'<network address="{"x" * 200}" port="28015"/>')):
            forms.append(message(DISCOVER, step, body).replace(b"><", f" {pair}><".encode(), 1)
                         if body else message(DISCOVER, step).replace(
                             b'step="8"', f'step="8" {pair}'.encode()))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for data in forms * 5:
            for target in (siege.group, siege.address[0]):
                with contextlib.suppress(OSError):
                    asker.sendto(data, (target, 28015))


KINDS = {kind.__name__: kind for kind in (
    connections, halves, oversize, slow_readers, reports, chains, crowds, names, impostors,
    nonsense, known_cases, datagrams)}


def besiege(kinds, host, port, group, seed, seconds, connections):
    """Several kinds, separated by commas, take turns; prints how many connections were made."""
    sieges = [(KINDS[kind], Siege(host, port, group, f"{seed} {kind}"))
              for kind in kinds.split(",")]
    until = time.monotonic() + float(seconds)
    for act, siege in itertools.cycle(sieges):
        made = sum(other.made for _, other in sieges)
        if time.monotonic() >= until or made >= int(connections):
            break
        act(siege)
    for _, siege in sieges:
        for connection in siege.kept:
            connection.close()
    print(made)


def read_report(address):
    with FlomClient(socket.AF_INET, address, 60) as asking:
        asking.socket.sendall(STATUS)
        return b"".join(iter(lambda: asking.socket.recv(65536), b""))


def hold(host, port):
    address, holders = (host, int(port)), []
    for form in HELD:
        for number in range(10):
            holders.append(FlomClient(socket.AF_INET, address))
            assert holders[-1].lock(form.format(number)) not in (None, False)
    print("holding", flush=True)
    sys.stdin.read()
    report = read_report(address)
    sources = ['peer="%s:%d"' % holder.socket.getsockname() for holder in holders]
    entries = [entry.partition(b">")[0] for entry in report.split(b"<holder ")]
    held = sum(source.encode() in entry for entry in entries for source in sources)
    silent = len(holders) - len(select.select([one.socket for one in holders], [], [], 0)[0])
    print(len(holders), silent, held)
    for holder in holders:
        holder.release()


if __name__ == "__main__":
    {"besiege": besiege, "hold": hold}[sys.argv[1]](*sys.argv[2:])
