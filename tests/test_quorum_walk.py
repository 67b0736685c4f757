"""Random walks of leaders and their clients: connections fail, clients come back, etcd is slow or
away, leaders are deposed.  Nobody holds what another one holds, nobody loses what he holds, and no
value comes twice."""
import random
import re
import socket

import flomd
import pytest
import test_quorum_server
import test_server
from fakes import LOCK, PING, UNLOCK, b64, message
from world import SEED, SOAK

STEPS = 120
WALKS = 60 if SOAK else 3
AT_ONCE = 20  # walks of one test
NAMES = ("R", "Q", "S.a.b", "_s_n[2]", "_S_n[2]")
RC = re.compile(rb'rc="(-?\d+)"')
TOKEN = re.compile(rb'token="(\d+)"')
ELEMENT = re.compile(rb'element="([^"]*)"')
IDLE, WAITING, HOLDING = "idle", "waiting", "holding"


class Etcd(test_quorum_server.Chain):
    """It obeys in order; what it has obeyed outlives the leader."""

    def __init__(self, epoch, stored):
        super().__init__(epoch)
        self.stored = stored
        self.given = []  # (records, done)

    def commit(self, records, done):
        self.given.append((list(records), done))
        return True

    def confirm(self, done):
        self.given.append(((), done))

    def obey(self, number, tells=True):
        """Obeys the first of what it was given; where it does not tell, the leader is deposed."""
        given, self.given = self.given[:number], self.given[number:]
        pings, self.pings = self.pings, []
        for records, done in given:
            for key, text in records:
                self.stored.pop(key, None)
                if text is not None:
                    self.stored[key] = text
            if tells:
                done()
        for done in pings:
            if tells:
                done()


class Leader(test_quorum_server.World):
    """A server with its table, made of what is stored."""

    def __init__(self, epoch, stored):
        self.EPOCH, self.known = epoch, stored
        super().__init__()

    def make_disk(self, later):
        return Etcd(self.EPOCH, self.known)

    def make_table(self):
        table = super().make_table()
        for _ in flomd.restoring(dict(self.known), table, flomd.Moment(), False, str, moved=True):
            pass
        return table

    def connect(self):
        """(a connection, its client's end)"""
        ours, client = socket.socketpair()
        ours.setblocking(False)
        client.setblocking(False)
        before = set(self.connections.open)
        self.connections.welcome(ours, "10.77.0.2:50190")
        connection, = self.connections.open - before
        return connection, client

    def serve(self):
        """Turns of the loop, until nothing comes any more."""
        self.loop._turn(0)
        while self.loop._events or self.loop._last:
            if self.loop._last:
                self.loop._end_turn()
            self.loop._turn(0)


class Person:
    """A client as it should be.  `links` are its connections; the last one counts."""

    def __init__(self, site, number):
        self.site, self.number, self.lives, self.random = site, number, 0, site.random
        self.links, self.state = [], IDLE
        self.name = self.token = self.ident = self.element = None
        self.granted_on = None  # the link

    def can_unlock(self):
        return self.state == HOLDING and self.links[-1:] == [self.granted_on]

    # What it does.

    def ask(self):
        self.lives += 1
        self.ident = f"{self.number}-{self.lives}"
        self.name, self.wait = self.random.choice(NAMES), self.random.choice([0, 1, 1])
        self.state, self.token, self.element = WAITING, None, None
        self.ask_on_another()

    def ask_on_another(self):
        """On another connection; those before stay open until this one is answered."""
        link = self.site.leader.connect()
        self.links.append(link)
        wait, reclaim = self.wait, ""
        if self.state == HOLDING:
            wait, reclaim = 0, f' reclaim="{self.token}"'
            if self.element is not None:
                reclaim += f' held="{self.element}"'
        self.say(f'<session peerid="1" client="flom.py/1" id="{self.ident}" key="{self.ident}"/>'
                 f'<resource name="{b64(self.name)}" mode="5" wait="{wait}" create="1" '
                 f'lifespan="60000"{reclaim}/>')

    def say(self, text, verb=LOCK):
        try:
            self.links[-1][1].sendall(message(verb, 8, text))
        except OSError:
            pass  # it will see

    def ping(self):
        self.say("", PING)

    def unlock(self):
        rollback = self.random.choice([0, 1])
        if self.name.startswith("_S_") and not rollback:
            self.use()
        self.say(f'<resource name="{b64(self.name)}" rollback="{rollback}"/>', UNLOCK)
        self.ping()
        self.end()

    def use(self):
        """The value that it has is nobody else's, for ever."""
        assert (self.name, self.element) not in self.site.used, "a value that comes twice"
        self.site.used.add((self.name, self.element))

    def end(self):
        """Its command has ended, or was killed; it is another one from now on."""
        self.state = IDLE
        for _, client in self.links:
            client.close()
        self.links = []

    def fail(self):
        """The network resets its connection, of which the daemon hears first."""
        connection, client = self.links.pop()
        connection.close(end="reset")
        client.close()

    def forget_attempt(self):
        """It closes the connection on which it has asked last, in good order."""
        self.links.pop()[1].close()

    ACTS = {
        "ask": ask,
        "again": ask_on_another,
        "ping": ping,
        "unlock": unlock,
        "end": end,
        "fail": fail,
        "forget": forget_attempt,
    }

    # What it hears.

    def hear(self):
        for link in list(self.links):
            self._read(link)
        if not self.links and self.state != IDLE:
            self.ask_on_another()

    def _read(self, link):
        try:
            data = link[1].recv(10000)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            if link in self.links:
                self.links.remove(link)
            link[1].close()
        elif link is self.links[-1]:
            for text in data.split(b"</msg>"):
                self._take(text)

    def _take(self, text):
        found = RC.search(text)
        if found is None or self.state == IDLE:
            return
        rc = int(found.group(1))
        if rc == 0:
            token = int(TOKEN.search(text).group(1))
            element = ELEMENT.search(text)
            told = token, element and element.group(1).decode()
            if self.state == WAITING:
                self.token, self.element = told
                if self.name.startswith("_s_"):
                    self.use()
            assert told == (self.token, self.element), "it is granted anew"
            self.state, self.granted_on = HOLDING, self.links[-1]
        elif rc != 1 and self.state == HOLDING:
            assert rc == 9, f"a holder is refused with {rc}"
        elif rc != 1:
            assert self.wait == 0
            self.end()
        if rc in (0, 1):  # it is decided which connection counts
            for _, client in self.links[:-1]:
                client.close()
            del self.links[:-1]


class Site:
    """One leader after the other, and the clients."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.stored, self.used = {}, set()
        self.leader = Leader(1, self.stored)
        self.people = [Person(self, number) for number in range(4)]
        self.log = []

    def depose(self):
        """What was on its way may be obeyed, or not."""
        disk = self.leader.disk
        disk.obey(self.random.randint(0, len(disk.given)), tells=False)
        self.leader.server.abandon()
        self.leader = Leader(self.leader.EPOCH + 1, self.stored)

    def hand_over(self):
        disk = self.leader.disk
        self.leader.server.hand_over()
        disk.obey(len(disk.given), tells=False)
        self.leader.server.end_in_order()
        self.leader = Leader(self.leader.EPOCH + 1, self.stored)

    def look(self, silent_for):
        self.leader.disk.silent_for = silent_for
        self.leader.server.batches._look()

    def obey_some(self):
        disk = self.leader.disk
        disk.obey(self.random.randint(0, len(disk.given)))

    def obey_all(self):
        self.leader.disk.obey(len(self.leader.disk.given))

    def hear(self):
        for one in self.people:
            one.hear()

    ACTS = {
        "obey": obey_some,
        "all": obey_all,
        "hear": hear,
        "away": lambda self: self.look(1.5),
        "long away": lambda self: self.look(2.5),
        "depose": depose,
        "hand over": hand_over,
    }

    def step(self):
        draw = self.random
        person = draw.choice(self.people)
        acts = {"obey": 6, "all": 3, "hear": 6, "away": 1, "long away": 1, "depose": 0.5,
                "hand over": 0.3}
        if person.state == IDLE:
            acts["ask"] = 8
        else:
            acts.update({"again": 2, "end": 1})
        if person.can_unlock():
            acts["unlock"] = 3
        if person.links:
            acts["fail"] = 2
        if person.can_unlock() or person.state == WAITING and len(person.links) == 1:
            acts["ping"] = 2  # not on another connection, before what was asked there is answered
        if person.links and not person.can_unlock():
            acts["forget"] = 1
        act, = draw.choices(list(acts), list(acts.values()))
        self.log.append((act, person.number, person.state))
        if act in self.ACTS:
            self.ACTS[act](self)
        else:
            person.ACTS[act](person)
        self.leader.serve()
        self.check()

    def check(self):
        for name in NAMES:
            holders = [one for one in self.people if one.state == HOLDING and one.name == name]
            held = {one.element for one in holders}  # of R and Q it is None
            assert len(held) == len(holders), "two hold"
            stored = {f"{flomd.OF_HOLDER}{one.token:016x}" for one in holders}
            assert stored <= set(self.stored), "a grant that was told is not stored"
        assert not [line for line in self.leader.log.lines if "Traceback" in line]

    def come_to_rest(self):
        """Those who hold get it back, and release it; the absent end; all who wait are granted."""
        for _ in range(30):
            for session in list(self.leader.table.absent):
                holder = self.leader.table.absent[session]
                if holder.ident not in {one.ident for one in self.people if one.state != IDLE}:
                    self.leader.server.end_absent(session)
            self.leader.server.batches.commit()
            self.leader.serve()
            self.obey_all()
            self.leader.serve()
            for person in self.people:
                person.hear()
                if person.can_unlock():
                    person.unlock()
            self.leader.serve()
            self.check()
        left = [(one.number, one.state, one.name, one.ident, len(one.links)) for one in self.people
                if one.state != IDLE]
        assert left == [], [(holder.name, holder.ident, holder.session.is_absent)
                            for holder in self.leader.table.requests.values()]
        assert self.leader.table.holding == 0
        assert not [key for key in self.stored if key.startswith(flomd.OF_HOLDER)]

    def close(self):
        for person in self.people:
            person.end()
        self.leader.server.abandon()


@pytest.mark.parametrize("number", range(WALKS))
def test_nobody_holds_what_another_holds_and_nobody_loses_what_he_holds(monkeypatch, number):
    monkeypatch.setattr(flomd, "Session", test_server.Told)
    for walk in range(AT_ONCE):
        site = Site(f"{SEED} {number} {walk}")
        try:
            for _ in range(STEPS):
                site.step()
            site.come_to_rest()
        except BaseException:
            print(*site.log, sep="\n")
            raise
        finally:
            site.close()
