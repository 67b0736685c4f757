"""A cluster of etcd, a clock and daemons for the rules of a quorum; nothing here is a process.

The Etcd obeys a request at the instant in which it is told to; when copies of it arrive, and
whether its answer is read, is for the tests to say.
"""
import flomd

PREFIX = "/flom/test/"
LEADER, MARK = PREFIX + "leader", PREFIX + "id"
CLUSTER = "6458432214418862501"
TTL = 10000  # ms
MOST = 20  # requests at one instant


class Now:
    """The instant that a call is given."""

    def __init__(self, boot, wall=None):
        self.boot = float(boot)
        self.wall = 1e9 + boot if wall is None else float(wall)


class Etcd:
    """The keys: {key: (text, revision of its creation, of its last change)}."""

    def __init__(self, cluster=CLUSTER):
        self.cluster = cluster
        self.revision = 1
        self.keys = {}

    def copy(self):
        other = Etcd(self.cluster)
        other.revision = self.revision
        other.keys = dict(self.keys)
        return other

    def state(self):
        return self.revision, frozenset(self.keys.items())

    def obey(self, request):
        """Does what is asked; returns the answer."""
        if isinstance(request, flomd.Range):
            return self._read(request)
        if all(map(self._is_true, request.guards)):
            self.change(request.changes)
            return self._answer(True, ())
        return self._answer(False, self._entries([request.guards[0].key]))

    def allows(self, transaction):
        """Whether a transaction would be done now."""
        return all(map(self._is_true, transaction.guards))

    def change(self, changes):
        self.revision += 1
        for key, text in changes:
            if text is None:
                self.keys.pop(key, None)
                continue
            _, created, _ = self.keys.get(key, ("", self.revision, 0))
            self.keys[key] = text, created, self.revision

    def text(self, key):
        return self.keys[key][0]

    def memory(self):
        """{key: text} of what lies under the prefix, leader record and mark aside."""
        return {key[len(PREFIX):]: text for key, (text, _, _) in self.keys.items()
                if key not in (LEADER, MARK)}

    def _is_true(self, guard):
        text, created, modified = self.keys.get(guard.key, (None, 0, 0))
        if guard.what == "TERM":  # of no etcd: what a plain guard of the term would be
            return text is not None and flomd.record_of(text).term == guard.value
        found = {flomd.VALUE: text, flomd.CREATED: created, flomd.MODIFIED: modified}
        return found[guard.what] == guard.value

    def _read(self, request):
        keys = sorted(key for key in self.keys if request.first <= key < request.end)
        limit = request.limit or len(keys)
        return self._answer(True, self._entries(keys[:limit]), len(keys) > limit)

    def _entries(self, keys):
        return tuple(flomd.Entry(key, self.keys[key][0], self.keys[key][2])
                     for key in keys if key in self.keys)

    def _answer(self, succeeded, entries, more=False):
        return flomd.Answer(flomd.DONE, self.cluster, self.revision, succeeded, entries, more)


def own_record(name="a", ttl=TTL, grace=25000, **other):
    """The leader record of a daemon, free."""
    address = f"10.77.0.{ord(name) - 96}:28015"
    fields = dict(v=flomd.RECORD_LAYOUT, term="", n=0, x="", ttl=ttl, grace=grace, epoch=0,
                  policy="fair", daemon=name * 16, address=address, host=name, pid=1)
    fields.update(other)
    return flomd.Record(**fields)


class Digits:
    """Digits that are not random: each number comes once, and those of two daemons differ."""

    def __init__(self, name):
        self.name, self.serial = name, 0

    def __call__(self, number):
        self.serial += 1
        return f"{self.name}{self.serial}".rjust(number, "0")


def quorum(name="a", ttl=TTL, members=("u1", "u2", "u3"), cluster=None, digits=None, **other):
    return flomd.Quorum(PREFIX, own_record(name, ttl, **other), cluster or flomd.Cluster(),
                        flomd.Members(members), digits or Digits(name))


def ask(role, etcd, boot):
    """Hands over what is to be asked, has it obeyed and answered, until nothing is left; returns
    what may be told."""
    told = []
    for _ in range(MOST):
        request = role.next_request(Now(boot))
        if request is None:
            return told
        told += role.answer(etcd.obey(request), Now(boot))
    raise AssertionError("it asks without end")


def candidate(etcd, boot=0, name="a", **other):
    """One that has looked once."""
    found = flomd.Candidate(quorum(name, **other), Now(boot))
    ask(found, etcd, boot)
    return found


def leader(etcd, boot=0, name="a", **other):
    """One of a new cluster, or after a record that is free, that has loaded and leads."""
    waiting = candidate(etcd, boot, name, **other)
    if waiting.leader is None:  # there is no record; it looks whether there is anything
        ask(waiting, etcd, boot + flomd.POLL)
    found = waiting.leader
    ask(found, etcd, boot + flomd.POLL)
    found.lead(7)
    return found
