"""The daemon's side of one connection, with a fake link: bytes in, answers out, no socket."""
import hashlib
import re
import xml.etree.ElementTree

import flomd
import pytest
from engine_world import Clock, World, lines
from fakes import (DISCOVER, END, HEADER, LOCK, MANAGEMENT, MODES, PEER, PING, UNLOCK, b64, message,
                   parse)
from world import chance

DAEMON = "00112233aabbccdd"
PREFIX = f'{HEADER}<msg level="3" verb="1" step="'
FIRST = f'{PREFIX}16"><session peerid="{PEER}"/>'
FIRST_TO_OURS = f'{PREFIX}16"><session peerid="{PEER}" daemon="{DAEMON}"/>'
LATER = f'{PREFIX}24">'


class Told(flomd.Session):
    """A session that has its introduction, so that the class itself stays as it is."""
    __slots__ = ()


Told.introduce(PEER, DAEMON)


class Link:
    """What a Connection and the daemon do for a session, without either."""

    def __init__(self, hub, peer):
        self.hub, self.session = hub, Told(self, peer, str)
        self.peer = peer
        self.heard, self.over, self.closed = [], False, False

    def say(self, *pieces):
        """Bytes come in; returns what has been heard since, as text."""
        before = len(self.heard)
        for piece in pieces:
            for call, detail in self.session.calls(piece):
                self.hub.perform(self, call, detail)
        return "".join(self.heard[before:])

    def tell(self, decision):
        if not self.session.can_be_told(decision.verdict):
            self.close()
        else:
            self.heard.append(self.session.answer(decision).decode("ascii"))
            self.over = decision.verdict in flomd.FINAL

    def close(self):
        self.closed = True
        self.hub.apply(self.hub.table.gone(self.session, self.hub.clock))

    def lock(self, name, mode="EX", about="", more="", **flags):
        """Sends a lock of FLoM's client, or with `about` one of ours."""
        fields = dict({"mode": MODES.index(mode), "wait": 1, "create": 1, "lifespan": 0}, **flags)
        text = " ".join(f'{key}="{value}"' for key, value in fields.items())
        return self.say(message(LOCK, 8, f'<session peerid="{PEER}"{about}/>'
                                         f'<resource name="{b64(name)}" {text}{more}/>'))

    def unlock(self, name, more=' rollback="0"'):
        return self.say(message(UNLOCK, 8, f'<resource name="{b64(name)}"{more} />'))


class Hub:
    """The table and the links to it."""

    def __init__(self, **options):
        self.table, self.clock = flomd.LockTable(**options), Clock()
        self.links, self.calls = [], []

    def connect(self, peer="10.77.0.2:50190"):
        self.links.append(Link(self, peer))
        return self.links[-1]

    def perform(self, link, call, detail):
        self.calls.append((call, detail))
        if call == "lock":
            self.apply(self.table.request(detail, self.clock))
        elif call == "unlock":
            self.apply(self.table.release(link.session, detail, self.clock))
        elif call == "ping":
            link.heard.append(flomd.Session.pong.decode())

    def apply(self, decisions):
        for decision in decisions:
            decision.session.connection.tell(decision)

    def later(self, seconds):
        self.clock.move(int(seconds * 10 ** 6))
        self.apply(self.table.expire(self.clock))

    def report(self):
        pieces = flomd.report(self.table, '<answer rc="0"/>', self.clock)
        return flomd.tags("".join(pieces).encode("ascii")[:-len(END)])


@pytest.fixture
def hub():
    return Hub()


@pytest.fixture
def link(hub):
    return hub.connect()


def ours(ident="aa", more=""):
    return f' client="flom.py/1.0" id="{ident}"{more}'


def answer(text):
    """The attributes of the answer, from the last message of the text."""
    return parse((HEADER + text.split(HEADER)[-1]).encode())["answer"]


# Answers to FLoM's client

def test_a_grant_is_told_in_floms_own_bytes(link):
    assert link.lock("R") == f'{FIRST}<answer rc="0"/></msg>'


def test_a_waiter_is_told_twice(hub, link):
    link.lock("R")
    other = hub.connect()
    assert other.lock("R") == f'{FIRST}<answer rc="1"/></msg>'
    link.unlock("R")
    assert other.heard[1:] == [f'{LATER}<answer rc="0"/></msg>']


def test_one_that_waits_for_a_resource_is_told_up_to_three_times(hub):
    links = [hub.connect() for _ in range(3)]
    assert links[0].lock("R", create=0) == f'{FIRST}<answer rc="2"/></msg>'
    links[1].lock("R")
    links[1].unlock("R")
    assert links[0].heard[1:] == [f'{LATER}<answer rc="{rc}"/></msg>' for rc in (1, 0)]
    assert links[2].lock("Q", create=0, wait=0) == f'{FIRST}<answer rc="5"/></msg>'
    assert links[2].over


def test_elements_are_told_at_once_and_later(hub, link):
    assert link.lock("red.green") == f'{FIRST}<answer rc="0" element="red"/></msg>'
    others = [hub.connect(), hub.connect()]
    for other in others:
        other.lock("red.green")
    link.unlock("red.green")
    assert others[1].heard == [f'{FIRST}<answer rc="1"/></msg>',
                               f'{LATER}<answer rc="0" element="red"/></msg>']


@pytest.mark.parametrize("name, flags, rc, over", [
    ("R", {"wait": 0}, 4, False), ("n[1]", {"quantity": 2}, 6, False), ("1", {}, -14, True),
    ("_x", {"wait": 0, "create": 0}, -14, True), ("_t_%D[1]", {}, -14, True)])
def test_refusals(hub, link, name, flags, rc, over):
    hub.connect().lock("R")
    assert link.lock(name, **flags) == f'{FIRST}<answer rc="{rc}"/></msg>'
    assert (link.over, link.closed) == (over, False)


def test_after_busy_another_lock_may_follow(hub, link):
    holder = hub.connect()
    holder.lock("R")
    assert answer(link.lock("R", wait=0)) == {"rc": "4"}
    assert link.lock("Q", wait=0) == f'{FIRST}<answer rc="0"/></msg>'
    link.unlock("Q")
    assert link.lock("R") == f'{FIRST}<answer rc="1"/></msg>'
    holder.unlock("R")
    assert link.heard[-1] == f'{LATER}<answer rc="0"/></msg>'


def test_what_is_impossible_out_of_the_park_closes_the_connection(hub, link):
    link.lock("n[2]", quantity=5, create=0)
    hub.connect().lock("n[2]")
    assert link.closed and link.heard == [f'{FIRST}<answer rc="2"/></msg>']


def test_verdicts_of_our_own_are_never_told():
    hub = Hub(most_waiters=0)
    hub.connect().lock("R")
    link = hub.connect()
    assert link.lock("R") == "" and link.closed


def test_the_first_answer_may_come_late_and_is_the_first_all_the_same():
    hub = Hub(window_until=Clock().mono + 3)
    link, waiter = hub.connect(), hub.connect()
    assert waiter.lock("R", mode="EX") == f'{FIRST}<answer rc="1"/></msg>'
    assert link.lock("R", wait=0) == ""
    hub.later(3)
    assert link.heard == [f'{FIRST}<answer rc="4"/></msg>']
    assert waiter.heard[1:] == [f'{LATER}<answer rc="0"/></msg>']


# Answers to a client of ours

def test_a_client_of_ours_is_told_more(hub, link):
    assert link.lock("A.B", about=ours()) == (
        f'{FIRST_TO_OURS}<answer rc="0" element="A" token="1"/></msg>')
    others = [hub.connect() for _ in range(3)]
    others[0].lock("A.B")
    for place, other in enumerate(others[1:], 1):
        assert other.lock("A.B", about=ours()) == (
            f'{FIRST_TO_OURS}<answer rc="1" position="{place}"/></msg>')
    link.unlock("A.B")
    assert others[1].heard[1:] == [f'{LATER}<answer rc="0" element="A" token="3"/></msg>']


def test_it_is_told_the_truth_when_it_is_impossible_out_of_the_park(hub, link):
    link.lock("n[2]", quantity=5, create=0, about=ours())
    hub.connect().lock("n[2]")
    assert link.heard[1:] == [f'{LATER}<answer rc="6"/></msg>'] and not link.closed


def test_it_is_told_of_limits():
    hub = Hub(most_waiters=0)
    hub.connect().lock("R")
    link = hub.connect()
    assert answer(link.lock("R", about=ours()))["rc"] == "9" and link.over


def test_it_is_told_of_a_deadlock_and_why(hub, link):
    link.lock("/t/\xe9", about=ours("aa", ' host="db1" pid="4711" cmd="a&quot;b"'))
    nested = hub.connect()
    told = answer(nested.lock("/t/\xe9", about=ours("bb", ' parent="aa"')))
    assert told["rc"] == "7" and nested.over
    assert "db1" in told["reason"]
    assert "4711" in told["reason"]
    assert 'a"b' in told["reason"]


def test_a_reclaim_carries_token_and_element(hub, link):
    link.lock("A.B", about=ours())
    link.close()
    again = hub.connect()
    told = answer(again.lock("A.B", wait=0, about=ours(), more=' reclaim="1" held="A"'))
    assert told == {"rc": "0", "element": "A", "token": "1"}


def test_the_old_connection_of_one_that_comes_back_is_closed(hub, link):
    link.lock("R", about=ours())
    again = hub.connect()
    assert answer(again.lock("R", wait=0, about=ours(), more=' reclaim="1"'))["rc"] == "0"
    assert link.closed and len(link.heard) == 1
    assert hub.table.holding == 1


def test_a_reclaim_is_proved_by_a_key_that_no_report_shows(hub, link):
    """Id and token are in the report, for anybody."""
    link.lock("R", about=ours("aa", ' key="0123456789abcdef"'))
    waiter = hub.connect()
    waiter.lock("R", about=ours("bb", ' key="1123456789abcdef"'))
    assert "123456789abcdef" not in str(list(hub.report()))
    for key, rc in (("", "4"), (' key="0123456789abcdee"', "4"),
                    (' key="0123456789abcdef"', "0")):
        again = hub.connect()
        told = again.lock("R", wait=0, about=ours("aa", key), more=' reclaim="1"')
        assert answer(told)["rc"] == rc and link.closed == (rc == "0")


def test_of_a_key_no_more_is_kept_than_proves_it(hub, link):
    key = "fedcba9876543210"
    link.lock("R", about=ours("aa", f' key="{key}" life="1" parent="b,\u00e4"'))
    request = hub.table.requests[link.session]
    assert request.proof == hashlib.sha256(key.encode()).hexdigest()[:16]
    assert (request.life, request.parents) == (1, ("b", "?"))
    assert key not in str(vars(request)) + str(link.session.about)


@pytest.mark.parametrize("key", ["", "\u00e4", "x" * 9000])
def test_a_key_of_any_form_does_no_harm(hub, link, key):
    assert answer(link.lock("R", about=ours("aa", f' key="{key}"')))["rc"] == "0"


@pytest.mark.parametrize("reclaim", ["", ' reclaim="1"'])
def test_one_that_was_not_told_of_its_grant_asks_again(hub, link, reclaim):
    about = ours("aa", ' key="0123456789abcdef"')
    link.lock("R", about=about)
    again = hub.connect()
    assert answer(again.lock("R", about=about, more=reclaim)) == {"rc": "0", "token": "1"}
    assert link.closed and hub.table.holding == 1


@pytest.mark.parametrize("name", ["R", "A.B", "_s_x[1]", "_t_%S[1]", "n[1]"])
def test_any_element_may_be_claimed(name):
    hub = Hub(window_until=Clock().mono + 3)
    link = hub.connect()
    told = answer(link.lock(name, wait=0, about=ours(), more=' reclaim="1" held="\xe9&lt;\u20ac"'))
    assert told["rc"] == ("0" if name in ("R", "n[1]") else "4")


def test_additions_of_strangers_are_ignored(hub, link):
    link.lock("R", more=' reclaim="77" held="x" deadlock="wait"', about=' parent="aa" id="aa"')
    request = hub.calls[0][1]
    assert (request.ident, tuple(request.parents), request.patient, request.reclaim,
            request.element) == (None, (), False, None, None)


def test_the_chain_of_parents_has_at_most_eight(hub, link):
    ids = [f"{number:016x}" for number in range(12)]
    link.lock("R", about=ours("aa", f' parent="{",".join(ids)}"'), more=' deadlock="wait"')
    request = hub.calls[0][1]
    assert list(request.parents) == ids[:8] and request.patient


# Bytes in

WHOLE = message(LOCK, 8, f'<session peerid="{PEER}"/><resource name="{b64("R")}" mode="5" wait="1" '
                         'create="1" lifespan="0"/>')
UNLOCK_R = message(UNLOCK, 8, f'<resource name="{b64("R")}" rollback="0" />')


@pytest.mark.parametrize("place", range(1, len(WHOLE)))
def test_a_message_may_come_in_two_pieces(hub, place):
    link = hub.connect()
    assert link.say(WHOLE[:place]) == ""
    assert answer(link.say(WHOLE[place:])) == {"rc": "0"}


def test_a_message_may_come_byte_by_byte_and_many_at_once(hub, link):
    link.say(*[bytes([byte]) for byte in WHOLE + UNLOCK_R + WHOLE])
    assert [call[0] for call in hub.calls] == ["lock", "unlock", "lock"]
    link.say(UNLOCK_R + WHOLE + UNLOCK_R + WHOLE[:20])
    link.say(WHOLE[20:])
    assert [call[0] for call in hub.calls[3:]] == ["unlock", "lock", "unlock", "lock"]


def test_what_came_before_a_bad_message_is_done(hub, link):
    with pytest.raises(flomd.ProtocolError):
        link.say(WHOLE + b"nonsense" + END + WHOLE)
    assert [call[0] for call in hub.calls] == ["lock"]


def test_a_bare_resource_asks_for_the_least(hub, link):
    hub.connect().lock("R")
    bare = message(LOCK, 8, f'<session/><resource name="{b64("R")}"/>')
    assert answer(link.say(bare)) == {"rc": "0"}
    request = hub.calls[-1][1]
    assert (request.mode, request.wait, request.create, request.lifespan, request.quantity) == (
        0, 0, 0, 0, 1)


def padded(length):
    return WHOLE.replace(b"<session", b" " * (length - len(WHOLE)) + b"<session")


def test_a_message_may_have_64_kib(link):
    assert answer(link.say(padded(65536)))["rc"] == "0"


@pytest.mark.parametrize("data", [padded(65537), b" " * 65536, WHOLE + padded(65537)])
def test_a_longer_message_breaks_the_protocol(link, data):
    with pytest.raises(flomd.ProtocolError):
        link.say(*[data[start:start + 4096] for start in range(0, len(data), 4096)])


OUT_OF_PLACE = {
    **{f"{verb}/{step}": message(verb, step, '<session/><answer rc="0"/>')
       for verb, step in ((LOCK, 0), (LOCK, 9), (LOCK, 16), (LOCK, 24), (LOCK, 32), (UNLOCK, 16),
                          (PING, 24), (DISCOVER, 8), (DISCOVER, 16), (MANAGEMENT, 16))},
    "unlock": UNLOCK_R,
    "no resource": message(LOCK, 8, "<session/>"),
    "no name": message(LOCK, 8, '<session/><resource mode="5"/>'),
    "bad base64": WHOLE.replace(b64("R").encode(), b"UjE"),
    "bad mode": WHOLE.replace(b'mode="5"', b'mode="6"'),
    "bad number": WHOLE.replace(b'wait="1"', b'wait="x"'),
    "no quantity": WHOLE.replace(b'mode="5"', b'quantity="0"'),
    "level": WHOLE.replace(b'level="3"', b'level="2"'),
    "verb": WHOLE.replace(b'verb="1"', b'verb="6"'),
    "nothing to shut down": message(MANAGEMENT, 8, "<session/>"),
    "TLS": b"\x16\x03\x01\x02\x00",
}


@pytest.mark.parametrize("name", OUT_OF_PLACE)
def test_what_is_out_of_place_breaks_the_protocol(hub, link, name):
    with pytest.raises(flomd.ProtocolError):
        link.say(OUT_OF_PLACE[name])
    assert hub.calls == [] and hub.table.empty()


def test_a_ping_is_answered_and_its_answer_is_ignored(link):
    assert link.say(message(PING, 8)) == message(PING, 16).decode()
    assert link.say(message(PING, 16)) == ""


@pytest.mark.parametrize("immediate", [0, 1])
def test_a_shutdown_says_how(hub, link, immediate):
    link.say(message(MANAGEMENT, 8, f'<session/><shutdown immediate="{immediate}"/>'))
    assert hub.calls == [("shutdown", bool(immediate))]


def test_the_status_is_no_lock(hub, link):
    link.lock("_STATUS", mode="NL", wait=0, create=0)
    assert hub.calls[0][0] == "status" and hub.table.empty()


# Unlock

@pytest.mark.parametrize("more, committed", [(' rollback="0"', True), ("", True),
                                             (' rollback="1"', False)])
def test_an_unlock_says_whether_the_command_succeeded(hub, link, more, committed):
    link.lock("R")
    assert link.unlock("R", more) == ""
    assert hub.calls[1] == ("unlock", committed)


def test_an_unlock_of_another_name_breaks_the_protocol(hub, link):
    link.lock("/t/a")
    with pytest.raises(flomd.ProtocolError):
        link.unlock("/t")
    link.close()
    assert hub.table.holding == 0


@pytest.mark.parametrize("before", ["queued", "parked", "busy", "unlocked"])
def test_only_a_holder_unlocks(hub, link, before):
    hub.connect().lock("R")
    if before == "unlocked":
        link.lock("Q")
        link.unlock("Q")
    else:
        link.lock("Q" if before == "parked" else "R", wait=int(before != "busy"), create=0)
    with pytest.raises(flomd.ProtocolError):
        link.unlock("Q" if before in ("parked", "unlocked") else "R")


def test_a_holder_that_was_refused_another_lock_unlocks_its_own(hub, link):
    link.lock("R")
    assert answer(link.lock("Q")) == {"rc": "4"}
    with pytest.raises(flomd.ProtocolError):
        link.unlock("Q")
    assert link.unlock("R") == "" and hub.table.holding == 0


def test_a_holder_that_asks_again_is_told_the_same_and_holds_once(hub, link):
    first = link.lock("A.B", about=ours())
    assert link.lock("A.B", about=ours()) == first
    link.unlock("A.B")
    assert hub.table.holding == 0


def test_a_waiter_that_asks_again_keeps_its_place_and_another_lock_replaces_it(hub, link):
    hub.connect().lock("R")
    other = hub.connect()
    link.lock("R")
    other.lock("R")
    assert link.lock("R") == f'{FIRST}<answer rc="1"/></msg>'
    hub.links[1].unlock("R")
    assert link.heard[-1] == f'{LATER}<answer rc="0"/></msg>'
    assert other.lock("Q") == f'{FIRST}<answer rc="0"/></msg>'
    link.unlock("R")
    assert len(other.heard) == 2


# The status report

def entries(hub):
    return [(tag, attributes) for closing, tag, attributes, _ in hub.report() if not closing]


def test_the_report_names_holders_waiters_and_parked_requests(hub, link):
    link.lock("R", "PW", about=ours("aa", ' host="db1" pid="4211" user="joe" cmd="vacuum"'))
    waiter, parked, tree = hub.connect(), hub.connect(), hub.connect()
    waiter.lock("R", "PR")
    parked.lock("n[2]", create=0, quantity=2)
    tree.lock("/t/a")
    found = entries(hub)
    assert [tag for tag, _ in found] == [
        "answer", "resource", "holder", "waiter", "resource", "holder", "parked"]
    (_, resource), (_, holder), (_, waiting) = found[1:4]
    assert resource == {"name": b64("R"), "kind": "simple", "idle": "-1"}
    assert holder == {
        "id": "aa", "peer": link.peer, "host": "db1", "pid": "4211", "user": "joe",
        "cmd": "vacuum", "mode": "4", "token": "1", "since": str(int(hub.clock.wall))}
    assert (waiting["mode"], waiting["position"]) == ("3", "1")
    assert re.fullmatch("[0-9a-f]{16}", waiting["id"])  # of the daemon's making
    assert {"id": waiting["id"], **waiting} == entries(hub)[3][1]
    assert found[4][1]["name"] == b64("/t")
    assert (found[6][1]["name"], found[6][1]["quantity"]) == (b64("n[2]"), "2")


def test_the_report_says_how_long_an_idle_resource_has_left(hub, link):
    link.lock("A.B", lifespan=5000)
    link.unlock("A.B")
    hub.later(1.25)
    assert entries(hub)[1][1]["idle"] == "3750"


def test_the_report_says_since_when_a_lock_is_held(hub, link):
    link.lock("R")
    waiter = hub.connect()
    hub.later(100)
    waiter.lock("R")
    since = [attributes["since"] for tag, attributes in entries(hub)[2:]]
    assert int(since[1]) - int(since[0]) == 100
    hub.later(60)
    link.unlock("R")
    hub.later(11)
    assert int(entries(hub)[2][1]["since"]) == int(hub.clock.wall) - 11
    in_the_way = flomd.Obstacles(hub.table.resources["R"], [("R", 5)]).of(("R", 5))
    assert flomd.held_by(in_the_way, hub.clock).endswith("for 00:00:11")


def test_whatever_clients_say_of_themselves_can_be_reported(hub, link):
    said = ' host="\xe9&#10;" pid="\u20ac" user="&quot;&lt;&gt;&amp;" cmd="\U0001f600"'
    link.lock("/t/\xe9", about=ours("\xe9", said))
    holder = entries(hub)[2][1]
    assert [holder[key] for key in ("id", "host", "pid", "user", "cmd")] == [
        "?", "??", "?", '"<>&', "?"]


def test_the_report_can_be_parsed_as_xml(hub, link):
    link.lock("A.B")
    hub.connect().lock("A.B", about=ours("bb", ' cmd="&lt;"'))
    text = "".join(flomd.report(hub.table, FIRST + '<answer rc="0"/>', hub.clock))
    root = xml.etree.ElementTree.fromstring(text)
    assert [child.tag for child in root] == ["session", "answer", "resource"]


def test_a_report_has_a_piece_for_each_holder_and_waiter(hub):
    """However many there are, and however long the names."""
    name, links = "/t/" + "x" * 5000, [hub.connect() for _ in range(20)]
    for link in links:
        link.lock(name)
    pieces = list(flomd.report(hub.table, "", hub.clock))
    assert len(pieces) == 1 + 1 + len(links) + 1 + 1
    assert max(map(len, pieces)) < 2 * len(name)


# Who is in the way

@pytest.mark.parametrize("names", [["R"], ["n[40]"], ["_s_x[40]"],
                                   ["/t", "/t/a", "/t/a/x", "/t/b", "/t/bc"]])
def test_who_is_in_the_way(names):
    """For one waiter and for all of them the same, and what the policy says of each holder."""
    draw = chance("in the way")
    for _ in range(30):
        world = World()
        for number in range(30):
            world.ask(f"S{number}", draw.choice(names), draw.choice(MODES))
        for resource in world.table.resources.values():
            obstacles = flomd.Obstacles(resource, resource.lanes)
            for waiter in resource.waiters():
                holders = list(resource.holders.values())
                clashing = [one for one in holders if resource.clash(waiter, one)] or holders
                found = obstacles.of(waiter.lane)
                assert found == (clashing[0] if clashing else None, len(clashing))
                assert found == flomd.Obstacles(resource, [waiter.lane]).of(waiter.lane)


@pytest.mark.parametrize("form", ["R", "/t/{}"])
def test_to_look_for_all_costs_for_each_the_same(form):
    found = []
    for many in (200, 400, 600):
        world = World(window=3)
        for number in range(many):
            world.ask(f"H{number}", form.format(number), "PR", wait=0, reclaim=9)
            world.ask(f"W{number}", form.format(number))
        resource, = world.table.resources.values()

        def look():
            obstacles = flomd.Obstacles(resource, resource.lanes)
            return [obstacles.of(waiter.lane) for waiter in resource.waiters()]
        found.append(lines(look))
    assert found[2] - found[1] < 1.1 * (found[1] - found[0])
