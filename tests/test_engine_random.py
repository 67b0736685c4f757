"""Random walks of twenty sessions over resources of all kinds, against a slow and obvious model.

Whatever the model tells the sessions, the lock table must tell them, in the same order for each
resource and at the same time; and at every step the table can be made again of what is stored.  In
half of the walks daemons are killed, and the walk goes on with the table of the next one.
FLOM_SEED determines it all.
"""
import random

import pytest
from engine_world import (MICRO, MODES, VERDICTS, Ledger, World, belongs_to, has_modes, interval,
                          kind, size)
from world import COUNT, SEED

WALKS, STEPS = 70 * COUNT.rounds, 50
SESSIONS = 20
GROUPS = [["R"], ["Q"], ["n[2]"], ["n[4]"], ["A.B.A"], ["/t", "/t/a", "/t/a/x", "/t/b"],
          ["/u", "/u/a"], ["_s_x[2]"], ["_S_x[2]"], ["_t_%S[2]"], ["_t_#f[9]"]]


class Ask:
    """A request, as the model knows it."""

    def __init__(self, fields):
        self.__dict__.update(fields)
        self.mode, self.parents = MODES.index(self.mode), self.under.split()

    def same(self, other):
        return (self.name, self.mode, self.quantity) == (other.name, other.mode, other.quantity)


class Model(Ledger):
    """What flom-semantics(7) says, in the order in which they say it."""

    def __init__(self, policy, clock):
        super().__init__(policy, clock)
        self.resources = {}  # name: its elements and its lifespan
        self.idle_since = {}  # name: µs
        self.told = []  # (resource, session, verdict, element)

    # What happens

    def ask(self, request):
        session = request.session
        if session in self.holders:
            self.ask_again(self.holders[session], request)
        elif request.wait and session in self.queue and request.same(self.queue[session]):
            self.prolong(request)
            self.tell(request, "queued")
        elif (request.wait and not request.create and session in self.parked
              and request.same(self.parked[session])):
            self.parked[session].lifespan = max(self.parked[session].lifespan, request.lifespan)
            self.tell(request, "parked")
        else:
            self.leave(session)
            self.admit(request)

    def ask_again(self, holder, request):
        if request.name == holder.name:
            self.prolong(request)
        same = (request.name, request.mode) == (holder.name, holder.mode)
        if same and request.quantity <= holder.quantity:
            self.tell(request, "granted", holder.gets)
        else:
            self.tell(request, "busy")

    def admit(self, request):
        name = belongs_to(request.name)
        if name not in self.resources and not request.create:
            self.tell(request, "parked" if request.wait else "absent")
            if request.wait:
                self.parked[request.session] = request
            return
        if kind(name) == "numeric" and request.quantity > size(name):
            self.prolong(request)
            self.tell(request, "impossible")
            return
        woken = self.create(name)
        for one in [request] + woken:
            self.parked.pop(one.session, None)
            self.prolong(one)
            if kind(name) == "numeric" and one.quantity > size(name):
                self.tell(one, "impossible")
            else:
                self.place(one)

    def place(self, request):
        """Grants, queues or refuses a request for a resource that exists."""
        if self.would_grant(request):
            self.grant(request)
        elif not request.wait:
            self.tell(request, "busy")
        elif self.is_hopeless(request):
            self.tell(request, "deadlock")
        else:
            self.queue[request.session] = request
            self.tell(request, "queued")
            self.settle(request.name)

    def release(self, session, committed):
        holder = self.holders.pop(session)
        self.resources[belongs_to(holder.name)].give_back(session, committed)
        self.settle(holder.name)

    def leave(self, session):
        if session in self.holders:
            self.release(session, False)
        elif session in self.queue:
            self.settle(self.queue.pop(session).name)
        self.parked.pop(session, None)

    def pass_time(self):
        for name, since in list(self.idle_since.items()):
            if self.clock.micros >= since + self.resources[name].lifespan * 1000:
                del self.resources[name], self.idle_since[name]
                self.stamped.pop(name, None)
        for name in list(self.stamped):
            self.settle(name)

    def next_date(self):
        """The time, in µs of the monotonic clock, at which something may happen by itself."""
        dates = [since + self.resources[name].lifespan * 1000
                 for name, since in self.idle_since.items()]
        dates += [self.clock.micros + (last + 1) * interval(name) - self.clock.local_micros
                  for name, last in self.stamped.items() if self.queue_of(name)]
        return min((date for date in dates if date > self.clock.micros), default=None)

    def restart(self):
        """Those who wait ask again, and plain resources that nobody holds are forgotten."""
        self.queue.clear()
        self.parked.clear()
        for name in list(self.resources):
            plain = kind(name) not in ELEMENTS and self.resources[name].lifespan <= 2000
            if not self.holders_of(name):
                self.idle_since.setdefault(name, self.clock.micros)
                if plain:
                    del self.resources[name], self.idle_since[name]
            elif plain:
                self.resources[name].lifespan = 2000

    def rename(self, session, other):
        """The client of a holder has another connection."""
        holder = self.holders[other] = self.holders.pop(session)
        holder.session = other
        self.resources[belongs_to(holder.name)].rename(session, other)

    # What comes of it

    def settle(self, name):
        """Grants whatever can be granted after a change of this resource."""
        name = belongs_to(name)
        where = {name} | {belongs_to(one.name) for one in self.queue.values() if one.parents}
        waiters = [one for one in self.queue.values() if belongs_to(one.name) in where]
        while waiters:
            first = waiters.pop(0)
            if self.would_grant(first):
                del self.queue[first.session]
                self.grant(first)
                waiters = [one for one in self.queue.values() if belongs_to(one.name) in where]
        if self.holders_of(name) or self.queue_of(name):
            self.idle_since.pop(name, None)
        else:
            self.idle_since.setdefault(name, self.clock.micros)

    def create(self, name):
        """Makes sure that the resource exists; returns the requests that waited for that."""
        if name in self.resources:
            return []
        self.resources[name] = ELEMENTS.get(kind(name), Nothing)(name)
        return [one for one in self.parked.values() if belongs_to(one.name) == name]

    def prolong(self, request):
        resource = self.resources.get(belongs_to(request.name))
        if resource is not None:
            resource.lifespan = max(resource.lifespan, request.lifespan)

    def grant(self, request):
        name = belongs_to(request.name)
        self.idle_since.pop(name, None)
        self.holders[request.session] = request
        if kind(name) == "timestamp":
            self.stamped[name] = self.clock.local_micros // interval(name)
        request.gets = self.resources[name].take(request.session, self.clock)
        self.tell(request, "granted", request.gets)

    def tell(self, request, verdict, element=None):
        self.told.append((belongs_to(request.name), request.session, verdict, element))


class Nothing:
    """What a grant of a resource carries, and the resource's lifespan in ms."""

    def __init__(self, name):
        self.name, self.lifespan = name, 2000

    def take(self, session, clock):
        return None

    def give_back(self, session, committed):
        pass

    def rename(self, session, other):
        pass


class Words(Nothing):
    """The slots of a set, each [label, session]; the index is the head of the list."""

    def __init__(self, name):
        super().__init__(name)
        self.slots = [[label, None] for label in name.split(".")]

    def take(self, session, clock):
        slot = next(slot for slot in self.slots if slot[1] is None)
        slot[1] = session
        self.slots.append(self.slots.pop(0))
        return slot[0]

    def give_back(self, session, committed):
        self.rename(session, None)

    def rename(self, session, other):
        for slot in self.slots:
            if slot[1] == session:
                slot[1] = other


class Values(Nothing):
    """The values of a sequence."""

    def __init__(self, name):
        super().__init__(name)
        self.returned, self.next, self.held = [], 1, {}

    def take(self, session, clock):
        if self.returned:
            self.held[session] = self.returned.pop(0)
        else:
            self.held[session], self.next = str(self.next), self.next + 1
        return self.held[session]

    def give_back(self, session, committed):
        value = self.held.pop(session)
        if self.name.startswith("_S_") and not committed:
            self.returned.append(value)

    def rename(self, session, other):
        self.held[other] = self.held.pop(session)


class Texts(Nothing):
    """The two formats of GROUPS."""

    def take(self, session, clock):
        local = clock.local_micros
        return f".{local // 100000 % 10}" if "#f" in self.name else f"{local // MICRO % 60:02d}"


ELEMENTS = {"set": Words, "sequence": Values, "timestamp": Texts}


class Walk:
    """One walk: the table and the model side by side, one clock for both."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.world = World(self.random.choice(["fair", "fair", "first-fit"]))
        self.model = Model(self.world.policy, self.world.clock)
        self.names = [name for group in self.random.sample(GROUPS, 4) for name in group]
        self.sessions = [f"S{number}" for number in range(SESSIONS)]
        self.asked, self.log, self.asks = {}, [self.world.policy], 0
        self.restarts = self.random.choice([0, 0.06])  # how many of the steps

    def go(self):
        for _ in range(STEPS):
            self.step()
        for session in self.sessions:
            self.leave(session)
        self.pass_time(5)
        assert self.world.table.empty() and not self.model.resources

    def step(self):
        session, chance = self.random.choice(self.sessions), self.random.random()
        if self.random.random() < self.restarts:
            self.restart()
        elif session in self.world.table.absent and chance < 0.9:
            self.come_back(session)
        elif chance < 0.1:
            self.pass_time(self.random.choice([0.04, 0.3, 1, 2.5]))
        elif chance < 0.12:
            self.world.set_clock(-self.random.choice([0.5, 2]))
        elif session in self.model.holders and chance < 0.9:
            self.release(session) if chance < 0.7 else self.leave(session)
        elif session in self.model.queue and chance < 0.5:
            self.leave(session)
        else:
            self.ask(session)

    def ask(self, session):
        name = self.random.choice(self.names)
        if session in self.asked and self.random.random() < 0.4:
            name = self.asked[session]
        self.asks += 1
        self.ask_for(session, name, self.draw(name))

    def draw(self, name):
        """What is asked beside the name."""
        draw = self.random.random
        return {
            "mode": self.random.choice(MODES) if has_modes(name) else "EX",
            "quantity": self.random.choice([1, 1, 2, 3]) if kind(name) == "numeric" else 1,
            "wait": int(draw() < 0.85), "create": int(draw() < 0.8), "under": self.under(),
            "patient": draw() < 0.2, "lifespan": self.random.choice([0, 0, 3500]),
            "ident": f"id{self.asks}", "key": f"key{self.asks}"}

    def ask_for(self, session, name, fields):
        self.asked[session] = name
        self.log.append(("ask", session, name, fields))
        self.model.ask(Ask(dict(fields, session=session, name=name)))
        self.world.ask(session, name, **fields)
        self.compare()

    def under(self):
        """The ids of a holder and of those above it, or none."""
        if self.random.random() < 0.5 or not self.model.holders:
            return ""
        holder = self.random.choice(list(self.model.holders.values()))
        return " ".join(([holder.ident] + holder.parents)[:8])

    def release(self, session, committed=None):
        if committed is None:
            committed = self.random.random() < 0.5
        self.log.append(("release", session, committed))
        self.model.release(session, committed)
        self.world.release(session, committed)
        self.compare()

    def restart(self):
        self.log.append("restart")
        self.model.restart()
        self.world.restart()
        assert set(self.world.table.resources) == set(self.model.resources)
        self.model.resources = {name: self.model.resources[name]
                                for name in self.world.table.resources}
        self.model.stamped = {name: last for name, last in self.model.stamped.items()
                              if name in self.model.resources}
        self.world.told = []
        self.compare()

    def come_back(self, session):
        """The client of a holder asks again, or for something else, or will never come back."""
        other = f"S{len(self.sessions) + len(self.asked)}"
        holder, name = self.model.holders[session], self.random.choice(self.names)
        fields = dict(self.draw(name), ident=holder.ident, key=holder.key, under=holder.under)
        what = self.random.choice(["again", "untold", "anew", "never"])
        asks = Ask(dict(fields, session=other, name=name))
        others = [*self.model.holders.values(), *self.model.queue.values()]
        # a command runs, and makes requests of its own, only under a lock that is held
        useless = asks.same(holder) or any(holder.ident in one.parents for one in others)
        if what == "never" or what == "anew" and useless:
            self.release(session, True)
            return
        self.log.append((what, session, other))
        self.sessions[self.sessions.index(session)] = other
        if what == "anew":
            del self.world.holders[session]
            self.model.release(session, True)
            self.ask_for(other, name, fields)
            return
        self.asked[other] = holder.name
        self.model.rename(session, other)
        self.world.come_back(session, other, what == "again")
        self.world.told = []
        self.compare()

    def leave(self, session):
        self.log.append(("leave", session))
        self.model.leave(session)
        self.world.leave(session)
        self.compare()

    def pass_time(self, seconds):
        """Stops at every time at which the one or the other wants to do something."""
        end = self.world.clock.mono + seconds
        while self.world.clock.mono < end:
            mine = self.model.next_date()
            self.world.clock.move_to(min(self.table_date(), mine / MICRO if mine else end, end))
            self.log.append(("time", self.world.clock.micros))
            told = []
            while self.table_date() <= self.world.clock.mono + 2 / MICRO:  # the table rounds
                self.world.expire(self.table_date())
                told += self.world.told
            self.world.told = told
            self.model.pass_time()
            self.compare()

    def table_date(self):
        date = self.world.table.next_date()
        return float("inf") if date is None else date

    def compare(self):
        said = [(belongs_to(self.asked[one.session]), one.session, VERDICTS[one.verdict],
                 one.element) for one in self.world.told]
        expected, self.model.told = self.model.told, []
        assert sorted(said, key=lambda one: one[0]) == sorted(expected, key=lambda one: one[0])
        assert set(self.world.holders) == set(self.model.holders)
        assert list(self.world.queue) == list(self.model.queue)
        assert list(self.world.table.resources) == list(self.model.resources)
        self.world.check_memory()


def test_random_walks():
    for number in range(WALKS):
        walk = Walk(f"{SEED}.{number}")
        try:
            walk.go()
        except Exception as error:
            story = "\n".join(map(str, walk.log))
            pytest.fail(f"FLOM_SEED={SEED}, walk {number}: {error!r}\n{story}")
