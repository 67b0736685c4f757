"""Clients that take locks from several hosts, and what their log tells of exclusion.

    etcd_load.py drive LOG FLOM HOSTS CLIENTS NAME SEED
        so many clients ask again and again for the locks of LOCKS; each runs etcd_work.py under
        its lock.  They stop, when they have had their turn, at the end of standard input.
    etcd_load.py probe LOG HOSTS
        takes locks of its own on each host, again and again, until the end of standard input
    etcd_load.py fill URL PREFIX KEY NUMBER
        copies the holder whose key (h/TOKEN, behind the prefix) is given so many times, with other
        tokens, names and clients
    etcd_load.py glut URL
        writes to a key until etcd has no space any more; the status is that of its refusal

Lines of the log, whose times are of CLOCK_MONOTONIC, which all hosts of a machine share:

    ask RUN LOCK TIME       begin RUN LOCK TOKEN VALUE TIME     alive RUN TIME
    end RUN TIME            exit RUN STATUS TIME                serve HOST TIME

The time of `serve` is that of the question.
"""
import base64
import collections
import contextlib
import http.client
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time

from etcd_work import Log
from fakes import FlomClient

LOCKS = ["job", "_s_x[1]", "_S_y[1]"]  # each is exclusive
SEQUENCE, TRANSACTIONAL = LOCKS[1:]
OPTIONS = ["-d", "0", "-i", "1h", "-o", "600s", "--on-lock-loss", "term"]
WORK = os.path.join(os.path.dirname(os.path.abspath(__file__)), "etcd_work.py")
PORT = 28015
PAUSE = 0.05  # s between two probes of a host
STUBBORN = 0.2  # of the commands
BATCH = 100  # operations in a transaction

Found = collections.namedtuple("Found", "runs overlaps tokens_back twice statuses longest serves")


# The processes

def duration(chance):
    """The seconds that a command takes: most are short."""
    return chance.uniform(0.05, 0.4) if chance.random() < 0.85 else chance.uniform(1, 2)


def client(log, path, flom, hosts, name, chance, stop):
    """One client of a host, until it is to stop."""
    number = 0
    with open(f"{path}.err", "a") as errors:
        while not stop.is_set():
            number += 1
            run, lock = f"{name}.{number}", chance.choice(LOCKS)
            manner = "stubborn" if chance.random() < STUBBORN else "gentle"
            command = [sys.executable, "-E", "-S", WORK, path, run, lock,
                       f"{duration(chance):.3f}", manner]
            log.note("ask", run, lock)
            status = subprocess.call(
                [sys.executable, "-S", flom, "-a", hosts, "-r", lock, *OPTIONS, "--", *command],
                stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
            log.note("exit", run, status)


def drive(path, flom, hosts, clients, name, seed):
    log, stop = Log(path), threading.Event()
    threads = []
    for number in range(int(clients)):
        chance = random.Random(f"{seed} {name} {number}")
        threads.append(threading.Thread(target=client, args=(
            log, path, flom, hosts, f"{name}{number}", chance, stop)))
        threads[-1].start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()


def probe_host(log, host, stop):
    """Each time another lock: one that was granted and not released is kept for a while."""
    number = 0
    while not stop.wait(PAUSE):
        number += 1
        with contextlib.suppress(OSError):
            asked = time.monotonic()
            with FlomClient(socket.AF_INET, (host, PORT), 2) as asking:
                answer = asking.ask(f"probe{host.replace('.', 'x')}n{number}", wait=0)
                if answer and answer[1] == 0:
                    line = f"serve {host} {asked:.6f}\n"
                    os.write(log.descriptor, line.encode())
                    asking.unlock()


def probe(path, hosts):
    log, stop = Log(path), threading.Event()
    threads = [threading.Thread(target=probe_host, args=(log, host, stop))
               for host in hosts.split(",")]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()


def ask_etcd(connection, path, question):
    """The answer of a member, as JSON."""
    connection.request("POST", f"/v3/kv/{path}", json.dumps(question))
    answer = connection.getresponse()
    data = answer.read().decode()
    if answer.status != 200:
        sys.exit(f"{path}: {answer.status} {data}")
    return json.loads(data)


def coded(text):
    return base64.b64encode(text.encode()).decode()


def fill(url, prefix, key, number):
    connection = http.client.HTTPConnection(url.rpartition("/")[2])
    found = ask_etcd(connection, "range", {"key": coded(prefix + key)})["kvs"][0]
    text, token = base64.b64decode(found["value"]).decode(), int(key[2:], 16)
    for first in range(0, int(number), BATCH):
        puts = []
        for one in range(first + 1, min(first + BATCH, int(number)) + 1):
            changed = re.sub(' (id|proof)="[^"]*"', rf' \1="{one:016x}"', " " + text)
            changed = re.sub(' name="[^"]*"', f' name="{coded(f"held{one}")}"', changed)
            puts.append({"request_put": {"key": coded(f"{prefix}h/{token + one:016x}"),
                                         "value": coded(changed[1:])}})
        ask_etcd(connection, "txn", {"success": puts})
    connection.close()


def glut(url):
    connection = http.client.HTTPConnection(url.rpartition("/")[2])
    while True:
        ask_etcd(connection, "put", {"key": coded("other"), "value": coded("x" * 500000)})


# The checker

class Run:
    """One call of flom: what the log tells of it."""

    def __init__(self, name, lock, asked):
        self.name, self.lock, self.asked = name, lock, asked
        self.begun = self.ended = self.left = self.status = self.token = self.value = None

    def waited(self, now):
        """s until its command began; until its end, or now, when it never did."""
        for end in (self.begun, self.left):
            if end is not None:
                return end - self.asked
        return now - self.asked


def read_runs(lines):
    """The runs of a log, and the answers to probes as (time, host), both in order."""
    runs, serves = {}, []
    for line in lines:
        word, name, *middle, told = line.split()
        moment = float(told)
        if word == "serve":
            serves.append((moment, name))
        elif word == "ask":
            runs[name] = Run(name, middle[0], moment)
        elif word == "begin":
            runs[name].begun = runs[name].ended = moment
            runs[name].token = int(middle[1])
            runs[name].value = middle[2]
        elif word == "exit":
            runs[name].left, runs[name].status = moment, int(middle[0])
        else:  # alive, end
            runs[name].ended = moment
    return list(runs.values()), sorted(serves)


def overlaps_of(began):
    """Pairs of names: the second command began while the first was alive."""
    found, last = [], None
    for run in began:
        if last is not None and run.begun < last.ended:
            found.append((last.name, run.name))
        if last is None or run.ended > last.ended:
            last = run
    return found


def tokens_back_of(began):
    """The names of those whose token is not above that of the command before."""
    return [after.name for before, after in zip(began, began[1:]) if after.token <= before.token]


def twice_of(began):
    """The values that two commands had; one of `_S_` whose command failed may come again."""
    counted = collections.Counter()
    for run in began:
        failed = run.status != 0
        if run.lock == SEQUENCE or (run.lock == TRANSACTIONAL and not failed):
            counted[run.lock, run.value] += 1
    return sorted(key for key, number in counted.items() if number > 1)


def check(lines):
    """What the log of a load tells: Found."""
    runs, serves = read_runs(lines)
    began = sorted((run for run in runs if run.begun is not None), key=lambda run: run.begun)
    overlaps, tokens_back = [], []
    for lock in LOCKS:
        of_lock = [run for run in began if run.lock == lock]
        overlaps += overlaps_of(of_lock)
        tokens_back += tokens_back_of(of_lock)
    times = [line.split()[-1] for line in lines]
    now = max(map(float, times), default=0)
    return Found(runs=len(runs), overlaps=overlaps, tokens_back=tokens_back,
                 twice=twice_of(began),
                 statuses=collections.Counter(run.status for run in runs),
                 longest=max((run.waited(now) for run in runs), default=0), serves=serves)


def serves_after(found, moment):
    """s from the moment until a probe that was sent later was answered; None: it was not."""
    later = [asked for asked, _ in found.serves if asked >= moment]
    return later[0] - moment if later else None


if __name__ == "__main__":
    {"drive": drive, "probe": probe, "fill": fill, "glut": glut}[sys.argv[1]](*sys.argv[2:])
