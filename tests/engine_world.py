"""The world of the engine's tests: a table, its clock, and what each session has been told.

A World is asked in the words of flom-semantics(7) and answers in text, so that a test reads like a
transcript.  What the sessions have been told is kept in a ledger of its own, in which rules that
hold for every table are checked at every step: one final decision for each request, tokens that
grow, nobody who both holds and waits.
"""
import calendar
import collections
import functools
import sys
import time

import flomd
from fakes import COMPATIBLE, MODES

VERDICTS = {0: "granted", 1: "queued", 2: "parked", 4: "busy", 5: "absent", 6: "impossible",
            7: "deadlock", 9: "limit", -14: "invalid", None: "closed"}
NOON = calendar.timegm((2026, 9, 21, 12, 0, 0))  # of local time
BOOT = 500  # s for which the system was suspended
EAST = 2 * 3600  # s, local time minus UTC
MICRO = 10 ** 6


class Clock:
    """A moment as the engine wants it; the test moves it.  It serves an endless loop only once."""
    MOST_LOOKS = 100000

    def __init__(self):
        self.micros, self.local_micros, self.looks = 1000 * MICRO, NOON * MICRO, 0

    @property
    def mono(self):
        return self.micros / MICRO

    @property
    def boot(self):
        return self.micros / MICRO + BOOT

    @property
    def wall(self):
        return self.local_micros / MICRO - EAST

    def local(self):
        self.looks += 1
        assert self.looks < self.MOST_LOOKS, "the engine does not stop looking at the clock"
        return self.local_micros

    def format(self, text, later=0):
        return time.strftime(text, time.gmtime(self.local_micros // MICRO + later))

    def move(self, micros):
        self.micros, self.local_micros = self.micros + micros, self.local_micros + micros

    def move_to(self, mono):
        """To the first microsecond at which `mono` has come."""
        micros = max(int(mono * MICRO) - 2, self.micros)
        while micros / MICRO < mono:
            micros += 1
        self.move(micros - self.micros)

    def set(self, seconds):
        """Somebody sets the clock on the wall, forward or back."""
        self.local_micros += int(seconds * MICRO)


RESTORED, MOST_RESTORED = {}, 1000  # pictures of tables, by what they were made of


class Client(str):
    """A session: a name, which is all that people see of it."""
    ours, about, uid, is_absent, connection = True, {}, None, False, None

    @property
    def peer(self):
        return str(self)


class AbsentClient(Client):
    """The session of a holder that a memory knows, with the name that the client had."""
    is_absent = True

    def __new__(cls, peer, name_of):
        return super().__new__(cls, peer)


def make_request(session, name, mode="EX", quantity=1, wait=1, create=1, lifespan=0, ident=None,
                 under="", patient=False, reclaim=None, held=None, key=None):
    """A request; `under` names the ids of the locks under which its command runs."""
    request = flomd.Request(Client(session), name, MODES.index(mode), quantity, wait, create,
                            lifespan)
    request.ident, request.parents = ident or session, tuple(under.split())
    request.patient, request.reclaim, request.claimed = patient, reclaim, held
    request.proof = key
    return request


# The rules of flom-semantics(7), put down once more and without any thought of speed.

UNITS = [("#ffffff", 1), ("#fffff", 10), ("#ffff", 100), ("#fff", 1000), ("#ff", 10000),
         ("#f", 100000)] + [(f"%{char}", MICRO) for char in "crsSTX"] + [
    ("%M", 60 * MICRO), ("%R", 60 * MICRO), ("%H", 3600 * MICRO), ("%I", 3600 * MICRO)]


@functools.lru_cache(None)
def kind(name):
    if name[0] == "/":
        return "hierarchical"
    if name[:3] in ("_s_", "_S_"):
        return "sequence"
    if name[:3] == "_t_":
        return "timestamp"
    return "numeric" if "[" in name else "set" if "." in name else "simple"


@functools.lru_cache(None)
def belongs_to(name):
    """The name of the resource, which for a tree is its first level."""
    return "/" + name.split("/")[1] if name[0] == "/" else name


@functools.lru_cache(None)
def size(name):
    """How many units, slots or places there are."""
    return len(name.split(".")) if kind(name) == "set" else int(name.split("[")[1][:-1])


@functools.lru_cache(None)
def interval(name):
    """The length of the interval of a timestamp resource, in microseconds."""
    return next(length for token, length in UNITS if token in name)


@functools.lru_cache(None)
def conflict(one, other):
    """Whether two pairs (name, mode) exclude each other; where the names are nodes of a tree, the
    one is the other, or above it, or below it."""
    paths = one[0] + "/", other[0] + "/"
    return (paths[0].startswith(paths[1]) or paths[1].startswith(paths[0])) and (
        MODES[other[1]] not in COMPATIBLE[MODES[one[1]]].split())


def exclude(one, other):
    return conflict((one.name, one.mode), (other.name, other.mode))


def has_modes(name):
    return kind(name) in ("simple", "hierarchical")


def fits(request, holders):
    """Whether the request is compatible with all the holders; the clock is left aside."""
    if has_modes(request.name):
        return not any(exclude(request, holder) for holder in holders)
    if kind(request.name) == "numeric":
        held = sum(holder.quantity for holder in holders)
        return held + request.quantity <= size(request.name)
    return len(holders) < size(request.name)


def in_the_way(request, holders):
    """The holders for which the request waits."""
    if has_modes(request.name):
        return [holder for holder in holders if exclude(request, holder)]
    return [] if fits(request, holders) else holders


def delays(request, waiter):
    """Whether granting the request could delay a waiter ahead of it."""
    return not has_modes(request.name) or exclude(request, waiter)


class Ledger:
    """Who holds and who waits, and what the policy says about it."""

    def __init__(self, policy, clock):
        self.policy, self.clock = policy, clock
        self.holders, self.queue = {}, collections.OrderedDict()  # session: Request
        self.parked, self.silent = collections.OrderedDict(), {}  # silent: no answer yet
        self.stamped = {}  # name of a timestamp resource: interval of its last grant

    def holders_of(self, name):
        return [one for one in self.holders.values() if belongs_to(one.name) == belongs_to(name)]

    def queue_of(self, name):
        return [one for one in self.queue.values() if belongs_to(one.name) == belongs_to(name)]

    def ahead(self, request):
        """The waiters ahead of the request, all of them if it is no waiter yet, that it delays."""
        if self.policy == "first-fit":
            return []
        queue = self.queue_of(request.name)
        if request in queue:
            del queue[queue.index(request):]
        return [waiter for waiter in queue if delays(request, waiter)]

    def ancestors(self, request):
        """The holders under which the request runs."""
        return [holder for holder in self.holders.values() if holder.ident in request.parents]

    def below(self, holder):
        """The waiters that run under the holder."""
        return [waiter for waiter in self.queue.values() if holder.ident in waiter.parents]

    def waits_for(self, request, goals):
        """Whether the waiter waits, directly or not, for one of the holders `goals`."""
        seen, todo = [], [request]
        while todo:
            one = todo.pop()
            if one in goals:
                return True
            if one not in seen:
                seen.append(one)
                todo += self.below(one) if one.session in self.holders else (
                    in_the_way(one, self.holders_of(one.name)) + self.ahead(one))
        return False

    def too_early(self, name):
        return kind(name) == "timestamp" and name in self.stamped and (
            self.clock.local_micros // interval(name) <= self.stamped[name])

    def would_grant(self, request):
        """Whether the policy grants the request now."""
        if self.too_early(request.name) or not fits(request, self.holders_of(request.name)):
            return False
        ancestors = self.ancestors(request)
        return all(ancestors and self.waits_for(waiter, ancestors)
                   for waiter in self.ahead(request))

    def is_hopeless(self, request):
        """Whether the nested request, if it were queued, would never be granted: by reduction, in
        which all who are not stuck end, and those who end by themselves are not there."""
        if request.patient or not self.ancestors(request):
            return False
        rest = Ledger(self.policy, self.clock)  # it knows of no grants of timestamps
        rest.holders.update(self.holders)
        rest.queue.update((one.session, one) for one in self.queue.values() if not one.patient)
        rest.queue[request.session] = request
        while request.session in rest.queue:
            granted = rest.grant_all()
            ending = [one for one in rest.holders.values() if not rest.below(one)]
            for holder in ending:
                del rest.holders[holder.session]
            if not granted and not ending:
                return True
        return False

    def grant_all(self):
        """Makes holders of all waiters that the policy grants, in queue order; returns them."""
        granted = []
        for waiter in list(self.queue.values()):
            if self.would_grant(waiter):
                del self.queue[waiter.session]
                self.holders[waiter.session] = waiter
                granted.append(waiter)
        return granted


class World(Ledger):
    """A lock table with its clock and the ledger of what was told."""

    def __init__(self, policy="fair", **options):
        super().__init__(policy, Clock())
        window = options.pop("window", None)
        if window is not None:
            options["window_until"] = self.clock.mono + window
        self.table = flomd.LockTable(first_fit=policy == "first-fit", **options)
        self.records = {}  # what is stored
        self.told, self.token = [], self.table._books.last_token
        self.granted = []  # (session, element) of all grants

    # What happens

    def ask(self, session, name, mode="EX", **details):
        """A session asks; returns what was told, such as "A granted red, B queued"."""
        return self.send(make_request(session, name, mode, **details))

    def send(self, request):
        session = request.session
        repeated = self._is_repeated(request)
        if not repeated:
            self._forget(session)
            self.silent[session] = request
        decisions = self.table.request(request, self.clock)
        if repeated:
            self.keep()
            assert [decision.session for decision in decisions] == [session]
            return self._text(decisions)
        return self._note(decisions)

    def release(self, session, committed=True):
        del self.holders[session]
        return self._note(self.table.release(session, committed, self.clock))

    def leave(self, session):
        self._forget(session)
        self.holders.pop(session, None)
        return self._note(self.table.gone(session, self.clock))

    def later(self, seconds):
        """Time passes, and the table is called whenever it wants to be."""
        end, told = self.clock.mono + seconds, []
        date = self.table.next_date()
        while date is not None and date <= end:
            told.append(self.expire(date))
            date = self.table.next_date()
            assert date is None or date > self.clock.mono, "the date has come already"
        return ", ".join(filter(None, told + [self.expire(end)]))

    def wait_for_date(self):
        """Time passes until the table wants to be called, if it does."""
        date = self.table.next_date()
        return "" if date is None else self.expire(date)

    def expire(self, date):
        """Time passes until `date`, and the table is called."""
        self.clock.move_to(date)
        text = self._note(self.table.expire(self.clock))
        for name in set(self.stamped) - set(self.table.resources):
            del self.stamped[name]
        return text

    def set_clock(self, seconds):
        self.clock.set(seconds)

    def empty_after(self, seconds):
        """Whether nothing is left of the table once all have gone and time has passed."""
        for session in list(self.table.requests):
            self.leave(session)
        self.later(seconds)
        return self.table.empty()

    # The memory

    def keep(self):
        """What has changed is stored."""
        changes = self.table.take_changes()
        if changes is not None:
            keep(self.records, flomd.batch_of(changes))

    def restored(self, rebooted=False, records=None, window=None):
        """The table of the daemon that would come next; window: s."""
        before, flomd.Absent = flomd.Absent, AbsentClient
        try:
            return flomd.restore(self.records if records is None else records,
                                 lambda: self._next_table(window), self.clock, rebooted, str)
        finally:
            flomd.Absent = before

    def _next_table(self, window):
        until = None if window is None else self.clock.mono + window
        return flomd.LockTable(self.policy == "first-fit", (self.token >> 32) + 1, until)

    def check_memory(self):
        """What is stored is all that there is to know, and enough to have the table again."""
        assert dict(flomd.everything(self.table)) == self.records
        known = (self.policy, self.clock.micros, self.clock.local_micros,
                 frozenset(self.records.items()))
        if known not in RESTORED:
            if len(RESTORED) > MOST_RESTORED:
                RESTORED.clear()
            table = self.restored()
            RESTORED[known] = picture(table, self.clock)
            records, changes = dict(self.records), table.take_changes()
            if changes is not None:
                keep(records, flomd.batch_of(changes))
            assert dict(flomd.everything(table)) == records
        assert picture(self.table, self.clock) == RESTORED[known]

    def restart(self, window=None):
        """The daemon is killed, and another one begins with what was stored."""
        self.table = self.restored(window=window)
        self.keep()
        self.token = self.table._books.last_token
        assert list(self.table.absent) == list(self.table.requests)
        assert set(self.table.absent) == set(self.holders)
        for place in (self.queue, self.parked, self.silent):
            place.clear()
        self.stamped = {name: last for name, last in self.stamped.items()
                        if name in self.table.resources}

    def come_back(self, session, other, was_told=True):
        """The client of a holder asks again on another connection; returns what was told."""
        holder = self.holders.pop(session)
        token, element = holder.token, holder.element
        request = make_request(other, holder.name, MODES[holder.mode], holder.quantity,
                               ident=holder.ident, key=holder.proof)
        if was_told:
            request.wait, request.reclaim, request.claimed = 0, token, element
        expected = [flomd.Decision(other, 0, element, token)]
        if session not in self.table.absent:
            expected.append(flomd.Decision(session, None))
        stored = dict(self.records)
        assert self.table.request(request, self.clock) == expected
        self.keep()
        assert self.records == stored, "a reclaim that is known stores nothing"
        # its name, which outside these tests is an address for people
        self.table._catalogue.changed.holders[token] = self.table.holders[token]
        self.keep()
        holder.session = self.table.requests[other].session
        self.holders[other] = holder
        return self._text(expected)

    # The ledger

    def _is_repeated(self, request):
        """Whether the table must stay as it is: a request of a holder, or a waiter's once more."""
        before = self.queue.get(request.session) or self.parked.get(request.session)
        return request.session in self.holders or (
            before is not None and request.wait == 1 and before.same(request)
            and not (request.create and request.session in self.parked))

    def _forget(self, session):
        for place in (self.queue, self.parked, self.silent):
            place.pop(session, None)

    def _note(self, decisions):
        self.clock.looks = 0
        self.keep()
        for decision in decisions:
            self._note_one(decision)
        return self._text(decisions)

    def _note_one(self, decision):
        session, verdict = decision.session, decision.verdict
        if verdict is None:
            del self.holders[session]
            return
        places = [place for place in (self.silent, self.parked, self.queue) if session in place]
        assert len(places) == 1, f"{decision} for one that waits for none"
        request = places[0].pop(session)
        if verdict in (flomd.ENQUEUED, flomd.WAIT_RESOURCE):
            assert places[0] is not self.queue, f"{decision} for one that is queued"
            (self.queue if verdict == flomd.ENQUEUED else self.parked)[session] = request
        elif verdict == flomd.OK:
            assert request.reclaim is not None or decision.token > self.token, "an old token"
            self.token = max(self.token, decision.token)
            self.holders[session] = request
            self.granted.append((session, decision.element))
            if kind(request.name) == "timestamp":
                assert request.reclaim is not None or not self.too_early(request.name)
                self.stamped[request.name] = self.clock.local_micros // interval(request.name)

    def _text(self, decisions):
        self.told = decisions
        return ", ".join(" ".join([decision.session, VERDICTS[decision.verdict]]
                                  + ([decision.element] if decision.element is not None else []))
                         for decision in decisions)


# Pictures of tables

def keep(records, batch):
    """Stores a batch in a dict."""
    for key, text in batch:
        if text is None:
            records.pop(key, None)
        else:
            records[key] = text


OF_HOLDERS = ("session name mode quantity element slot ident parents proof life local pid uid "
              "grace state lane").split()
OF_RESOURCES = "free next held opens reclaimed returned most places first_fit".split()


def picture(table, clock):
    """What a table has to have in common with the one that is made of its records."""
    found = {}
    for name, resource in table.resources.items():
        idle = idle_time(resource, clock)
        if resource.holders or resource.is_remembered() and idle < resource.lifespan:
            found[name] = picture_of(resource, idle)
    named = {ident: holder.token for ident, holder in table._books.nesting.holders.items()}
    return found, named, set(table.holders), table.holding


def idle_time(resource, clock):
    """In ms; -1 while somebody holds.  Those who wait are not remembered."""
    if resource.holders:
        return -1
    if resource.idle_since is None:
        return 0
    return round((clock.mono - resource.idle_since) * 1000, 3)


def picture_of(resource, idle):
    holders = {}
    for session, holder in resource.holders.items():
        assert holder.session == session and holder.resource is resource
        about = [getattr(holder, name) for name in OF_HOLDERS]
        holders[holder.token] = about + [round(holder.held_boot, 6), round(holder.held_since, 6)]
    rest = {name: plain_value(getattr(resource, name, None)) for name in OF_RESOURCES}
    lifespan = resource.lifespan if resource.is_remembered() else None
    return type(resource).__name__, holders, rest, lifespan, idle


def plain_value(value):
    if isinstance(value, flomd.Node):
        children = {level: plain_value(node) for level, node in value.children.items()}
        return children, value.here, value.below
    return list(value.items()) if isinstance(value, dict) else value


# Counting

def lines(call, *arguments):
    """How many lines of flomd.py a call runs: what it costs, without a clock."""
    count, file = [0], flomd.__file__

    def trace(frame, event, _):
        if frame.f_code.co_filename != file:
            return None
        count[0] += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call(*arguments)
    finally:
        sys.settrace(before)
    return count[0]
