"""How members of etcd are asked: what is sent, what is believed, how long it may take."""
import http.client
import json
import os
import socket
import subprocess
import threading
import time

import pytest

import fake_etcd
import flomd
from certificates import Certificates
from fake_etcd import FakeEtcd
from real_etcd import USERS, RealEtcd, with_real_etcd
from world import ROOT, free_port, pass_time, wait_until

pytestmark = pytest.mark.in_time  # flomd's thread, an etcd, and limits of their own

CLOSED = "it has closed the connection without an answer"
RESET = "connection reset by peer"  # by who closes and has not read all
PREFIX, END = "/x/", "/x0"
ALL = flomd.Range(PREFIX, END, 0)
LEADER = "/x/leader"
DENIED = ("permission denied: the role of --etcd-user is to read and write all below "
          "--etcd-prefix")


def write(text, guard=None):
    """A transaction that puts `text` where `guard` is now; None: where nothing is."""
    compared = flomd.Guard(LEADER, flomd.VALUE, guard)
    if guard is None:
        compared = flomd.Guard(LEADER, flomd.CREATED, 0)
    return flomd.Transaction((compared,), ((LEADER, text),))


class Log:
    def __init__(self):
        self.lines = []

    def limited(self, text, level="warning"):
        self.lines.append(f"{level}: {text}")

    def error(self, text):
        self.limited(text, "error")

    def bug(self, trace):
        self.error(trace)


class World:
    """A loop that asks."""

    def __init__(self, urls, **access):
        self.log, self.urls = Log(), urls
        self.loop = flomd.Loop(self.log)
        fields = dict(dict.fromkeys(flomd.Access._fields), urls=tuple(urls), **access)
        self.etcd = flomd.Etcd(self.loop, self.log, flomd.Access(**fields))
        self.etcd.start()

    def turn_until(self, predicate, seconds=20):
        until = time.monotonic() + seconds
        while not predicate():
            assert time.monotonic() < until
            self.loop._turn(0.05)

    def ask(self, request, seconds=10, member=0):
        heard = []
        self.etcd.ask(self.urls[member], request, seconds, heard.append)
        self.turn_until(lambda: heard)
        return heard[0]

    def outcome(self, request, seconds=10, member=0):
        answer = self.ask(request, seconds, member)
        return answer.outcome, answer.reason


def threads(name):
    return [each for each in threading.enumerate() if each.name == name]


@pytest.fixture
def fake():
    with FakeEtcd() as found:
        yield found


@pytest.fixture
def open_world():
    worlds = []

    def opened(urls, **access):
        worlds.append(World(urls, **access))
        return worlds[-1]
    yield opened
    for world in worlds:
        world.etcd.stop()
    wait_until(lambda: not threads("etcd"))


@pytest.fixture
def world(fake, open_world):
    return open_world(fake.urls)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("tls"))


def post(world, path, body):
    """What flomd never asks."""
    place = flomd.place_of(world.urls[0])
    connection = http.client.HTTPConnection(place.host, place.port)
    context = flomd._client_context(world.etcd.access)
    if context:
        connection = http.client.HTTPSConnection(place.host, place.port, context=context)
    connection.request("POST", f"/v3/{path}", json.dumps(body))
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    assert answer.status == 200, (path, text)


@pytest.fixture(scope="module", params=["fake", pytest.param("real", marks=with_real_etcd)])
def any_url(request):
    """Of one member, fake or real."""
    if request.param == "fake":
        with FakeEtcd() as fake:
            yield fake.urls[0]
    else:
        real = RealEtcd()
        yield real.url
        real.close()


@pytest.fixture
def any_world(any_url, open_world):
    world = open_world([any_url])
    entries = world.ask(ALL).entries
    if entries:
        changes = tuple([(entry.key, None) for entry in entries])
        world.ask(flomd.Transaction((flomd.Guard("/x/none", flomd.CREATED, 0),), changes))
    return world


# What is asked and answered

def test_a_url_says_where_a_member_listens():
    assert flomd.place_of("http://10.0.0.1:2379") == ("http", "10.0.0.1", 2379)
    assert flomd.place_of("https://etcd1.example") == ("https", "etcd1.example", 2379)
    assert flomd.place_of("http://[fd00::1]:80") == ("http", "fd00::1", 80)


def test_the_same_request_is_the_same_bytes():
    request = write("2", "1")
    assert flomd.encode_request(request) == flomd.encode_request(write("2", "1"))
    path, body = flomd.encode_request(request)
    assert path == "/v3/kv/txn"
    assert json.loads(body.decode()) == {
        "compare": [{"key": "L3gvbGVhZGVy", "target": "VALUE", "result": "EQUAL",
                     "value": "MQ=="}],
        "success": [{"request_put": {"key": "L3gvbGVhZGVy", "value": "Mg=="}}],
        "failure": [{"request_range": {"key": "L3gvbGVhZGVy"}}]}


def test_reading_and_writing(any_world):
    ask = any_world.ask
    empty = ask(ALL)
    assert empty[:1] + empty[3:] == (flomd.DONE, True, (), False, "")
    assert int(empty.cluster) > 1
    second, third = empty.revision + 1, empty.revision + 2
    first = ask(write("1"))
    assert first == (flomd.DONE, empty.cluster, second, True, (), False, "")
    assert ask(write("x")).entries == (flomd.Entry(LEADER, "1", second),)
    refused = ask(write("x", "0"))
    assert (refused.outcome, refused.succeeded, refused.revision) == (flomd.DONE, False, second)
    modified = flomd.Guard(LEADER, flomd.MODIFIED, second)
    changes = ((LEADER, "2"), ("/x/h/1", "ä\udcff"), ("/x/h/2", ""), ("/x/h/3", None))
    assert ask(flomd.Transaction((modified,), changes)).succeeded
    assert ask(ALL).entries == (
        flomd.Entry("/x/h/1", "ä\udcff", third), flomd.Entry("/x/h/2", "", third),
        flomd.Entry(LEADER, "2", third))
    page = ask(flomd.Range(PREFIX, END, 1))
    assert [entry.key for entry in page.entries] == ["/x/h/1"] and page.more
    assert ask(flomd.Range("/x/h/1\0", END, 2)).more is False
    assert any_world.etcd.reachable == 1
    assert any_world.etcd.trouble == ""


def test_a_guard_that_is_not_true_refuses(any_world):
    """Etcd ignores what it does not know: a misspelt guard would be none."""
    any_world.ask(write("1"))
    for guard in (flomd.Guard(LEADER, flomd.VALUE, "2"), flomd.Guard(LEADER, flomd.CREATED, 0),
                  flomd.Guard(LEADER, flomd.MODIFIED, 1),
                  flomd.Guard("/x/none", flomd.VALUE, "")):
        answer = any_world.ask(flomd.Transaction((guard,), ((LEADER, "unguarded"),)))
        assert (answer.outcome, answer.succeeded) == (flomd.DONE, False)
        both = (flomd.Guard(LEADER, flomd.MODIFIED, answer.revision), guard)
        assert not any_world.ask(flomd.Transaction(both, ((LEADER, "unguarded"),))).succeeded
    assert "unguarded" not in [entry.text for entry in any_world.ask(ALL).entries]


def test_housekeeping_is_asked_for(any_world):
    any_world.ask(write("1"))
    revision = any_world.ask(ALL).revision
    for number in range(3):
        key = f"/x/{number}"
        guard = flomd.Guard(key, flomd.CREATED, 0)
        any_world.ask(flomd.Transaction((guard,), ((key, ""),)))
    then = flomd.RangeAt(PREFIX, END, 0, revision)
    assert any_world.ask(then).entries[-1].key == LEADER
    assert any_world.ask(flomd.Compaction(revision + 1)).outcome == flomd.DONE
    assert any_world.outcome(then) == (flomd.NOT_DONE, "required revision has been compacted")
    future = flomd.RangeAt(PREFIX, END, 0, 99999)
    assert any_world.outcome(future) == (flomd.NOT_DONE, "required revision is a future revision")
    version = any_world.ask(flomd.Version()).entries[0].text
    assert version.startswith("3.")


@pytest.mark.parametrize("fault, outcome, reason", [
    (fake_etcd.BEFORE_503, flomd.UNKNOWN, "request timed out"),
    (fake_etcd.AFTER_503, flomd.UNKNOWN, "request timed out"),
    (fake_etcd.CLOSE_BEFORE, flomd.UNKNOWN, CLOSED), (fake_etcd.CLOSE_AFTER, flomd.UNKNOWN, CLOSED),
    (fake_etcd.NO_SPACE, flomd.NOT_DONE, "database space exceeded"),
    (fake_etcd.DENIED, flomd.NOT_DONE, DENIED),
    (fake_etcd.TOKEN, flomd.NOT_DONE, "invalid auth token"),
    ("no user", flomd.NOT_DONE,
     "user name is empty: authentication is on, see --etcd-user"),
])
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_what_goes_wrong_has_an_outcome_and_a_reason(fake, world, generation, fault, outcome,
                                                     reason):
    fake.generation = generation
    world.ask(ALL)
    fake.members[0].misbehave(fault)
    assert world.outcome(write("1")) == (outcome, reason)
    assert world.etcd.refusal == (reason if outcome == flomd.NOT_DONE else "")
    assert world.etcd.trouble == f"{world.urls[0]}: {reason}"
    assert world.etcd.reachable == (1 if outcome == flomd.NOT_DONE else 0)
    assert world.ask(write("2", "1" if fake.keys else None)).succeeded
    assert (world.etcd.trouble, world.etcd.refusal, world.etcd.reachable) == ("", "", 1)
    over = f"etcd {world.urls[0]} answers again"
    if outcome == flomd.NOT_DONE:
        over = "etcd takes changes again"
    assert world.log.lines[1:] == [f"info: {over}"]
    assert world.log.lines[0].startswith(f"error: etcd {world.urls[0]}: {reason}")


def test_a_full_database_has_a_cure(fake, world):
    fake.members[0].misbehave(fake_etcd.NO_SPACE, 2)
    world.ask(write("1"))
    world.ask(write("1"))
    line, = world.log.lines
    assert "etcdctl defrag" in line and "ETCD_AUTO_COMPACTION_RETENTION" in line


def test_that_changes_are_refused_is_told_once_while_the_members_are_read(open_world):
    with FakeEtcd(2) as fake:
        world = open_world(fake.urls)
        for member in fake.members:
            member.misbehave(fake_etcd.NO_SPACE, 5)
        for number in range(10):
            world.ask(write("1"), member=number % 2)
            world.ask(ALL, member=number % 2)
        assert len(world.log.lines) == 1 and fake_etcd.NO_SPACE not in world.etcd.trouble
        assert world.etcd.refusal == "database space exceeded"
        world.ask(write("1"))
        assert world.log.lines[1:] == ["info: etcd takes changes again"]
        world.etcd.saw_change()
        assert len(world.log.lines) == 2


def test_a_member_that_refuses_again_and_again_is_not_the_only_one(fake, world):
    fake.members[0].misbehave(fake_etcd.DENIED, 7)
    outcomes = [world.outcome(write("1"))[0] for _ in range(7)]
    assert outcomes.count(flomd.UNKNOWN) == 2
    assert outcomes[flomd.MOST_REFUSALS - 1] == outcomes[2 * flomd.MOST_REFUSALS - 1] \
        == flomd.UNKNOWN


def response(body, status="200 OK", more=""):
    return (f"HTTP/1.1 {status}\r\n{more}Content-Length: {len(body)}\r\n\r\n").encode() + body


HEADER = b'"header":{"cluster_id":"5","revision":"7"}'
ENTRY = b'{"key":"L3gvYQ==","mod_revision":"7","value":"MQ=="}'


@pytest.mark.parametrize("rest", [
    b'"succeeded":true,"responses":[{"response_put":{}}]', b'"responses":[{"response_range":{}}]',
    b'"token":"abc.12"', b'"count":"1"', b'"kvs":[%s],"count":"2"' % ENTRY])
def test_what_answers_something_else_is_no_empty_memory(rest):
    """As the answer to the request before, which comes a second time."""
    body = b"{" + HEADER + b"," + rest + b"}"
    assert flomd.read_answer(ALL, 200, body).outcome == flomd.UNKNOWN


@pytest.mark.parametrize("body", [
    b"", b"{}", b"[]", b"null", b"<html>", b"{" + HEADER, b"\xff", b"[" * 100000, b'"header"',
    b'{"header":{}}', b'{"header":{"cluster_id":"5"}}', b'{"header":{"revision":"5"}}',
    b'{"header":{"cluster_id":"five","revision":"7"}}', b'{"header":[]}',
    b'{"header":{"cluster_id":"5","revision":"-7"}}',
    b'{"header":{"cluster_id":"5","revision":-7}}',
    b'{"header":{"cluster_id":"5","revision":7.5}}',
    b'{"header":{"cluster_id":"5","revision":"' + b"7" * 5000 + b'"}}',
    b"{" + HEADER + b',"kvs":{}}', b"{" + HEADER + b',"kvs":[1]}',
    b"{" + HEADER + b',"kvs":[{}]}', b"{" + HEADER + b',"kvs":[{"key":"!","mod_revision":"7"}]}',
    b"{" + HEADER + b',"kvs":[{"key":"L3gvYQ==","value":"MQ=="}]}',
    b"{" + HEADER + b',"kvs":[{"key":"L3gvYQ==","mod_revision":"7","value":5}]}',
    b"{" + HEADER + b',"kvs":[{"key":"L3kvYQ==","mod_revision":"7"}]}',
    b"{" + HEADER + b',"x":' + b"7" * 1000 + b"}",
    b"{" + HEADER + b',"more":1,"kvs":[' + ENTRY + b"]}", b"{" + HEADER + b',"more":true}',
])
def test_a_range_is_believed_only_when_all_of_it_is_right(body):
    answer = flomd.read_answer(ALL, 200, body)
    assert answer.outcome == flomd.UNKNOWN
    assert answer.reason.startswith(flomd.NOT_AN_ETCD)


@pytest.mark.parametrize("body", [
    b"{" + HEADER + b"}", b"{" + HEADER + b',"succeeded":true}',
    b"{" + HEADER + b',"succeeded":1}',
    b"{" + HEADER + b',"succeeded":true,"responses":[{},{}]}',
    b"{" + HEADER + b',"responses":[{}]}', b"{" + HEADER + b',"responses":[{"response_put":{}}]}',
    b"{" + HEADER + b',"responses":[{"response_range":[]}]}',
    b'{"succeeded":true,"responses":[{}]}',
])
def test_a_transaction_is_believed_only_when_all_of_it_is_right(body):
    answer = flomd.read_answer(write("1"), 200, body)
    assert answer.outcome == flomd.UNKNOWN
    assert answer.reason.startswith(flomd.NOT_AN_ETCD)


@pytest.mark.parametrize("answer, reason", [
    (response(b"<html>Hello</html>"), "not an etcd: it answers without JSON"),
    (response(b"not here", "404 Not Found"), "not an etcd, or one without enable-grpc-gateway"),
    (response(b"Not Found\n", "404 Not Found"), "not an etcd, or one without enable-grpc-gateway"),
    (response(b"", "401 Unauthorized"), "not an etcd: HTTP status 401"),
    (response(b'{"error":"forbidden"}', "403 Forbidden"), "not an etcd: HTTP status 403"),
    (response(b"", "302 Found", "Location: http://127.0.0.1/\r\n"),
     "not an etcd: HTTP status 302"),
    (response(b"", "204 No Content"), "not an etcd: HTTP status 204"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", "not an etcd: BadStatusLine"),
    (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n", "not an etcd: HTTPException"),
    (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70000 + b"\r\n\r\n", "not an etcd: LineTooLong"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}", "its answer was cut off"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{}",
     "not an etcd: IncompleteRead"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno number\r\n",
     "not an etcd: IncompleteRead"),
    (b"HTTP/1.0 200 OK\r\n\r\n{}", "not an etcd: no object is its header"),
])
def test_what_is_not_an_etcd_is_not_believed(fake, world, answer, reason):
    for _ in range(3):
        fake.members[0].misbehave(answer)
        assert world.outcome(write("1")) == (flomd.UNKNOWN, reason)
    assert world.ask(write("1")).succeeded


@pytest.mark.parametrize("head", [
    b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7fffffff\r\n",
    b"HTTP/1.1 200 OK\r\n\r\n"])
def test_an_answer_that_is_too_long_is_not_read(fake, world, head):
    fake.members[0].misbehave(head + b" " * (flomd.MOST_ANSWER + 100000))
    assert world.outcome(write("1")) == (flomd.UNKNOWN, "its answer is too long")


def test_no_more_is_read_whatever_length_is_said(fake, world):
    """A length below 0 is to some versions of Python all that comes."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n"
    fake.members[0].misbehave(head + b" " * (4 * flomd.MOST_ANSWER))
    outcome, reason = world.outcome(write("1"))
    assert outcome == flomd.UNKNOWN
    assert reason in ("its answer is too long", "not an etcd: LineTooLong")


def test_the_refusal_of_a_certificate_with_a_name_is_told(fake, world):
    text = (b"CommonName of client sending a request against gateway will be ignored and not used "
            b"as expected\n")
    fake.members[0].misbehave(response(text, "400 Bad Request"))
    outcome, reason = world.outcome(write("1"))
    assert outcome == flomd.NOT_DONE
    assert "a client certificate that has a CN" in reason


# Time

def test_an_answer_byte_by_byte(fake, world):
    fake.members[0].misbehave(fake_etcd.SPLIT, 3)
    assert world.ask(write("1")).succeeded
    assert not world.ask(write("2", "x")).succeeded
    assert world.ask(write("2", "1")).succeeded


@pytest.mark.parametrize("fault", [fake_etcd.SILENCE, fake_etcd.SILENCE_AFTER, fake_etcd.DRIP])
def test_the_whole_answer_must_come_in_time(fake, world, fault):
    fake.members[0].misbehave(fault)
    begun = time.monotonic()
    assert world.outcome(write("1"), 0.3) == (flomd.UNKNOWN, "timed out")
    assert 0.25 < time.monotonic() - begun < 3
    answer = world.ask(write("1"))
    assert answer.succeeded == (fault == fake_etcd.SILENCE)


def test_a_member_that_is_stopped_is_late(fake, world):
    world.ask(write("1"))
    fake.members[0].pause()
    assert world.outcome(write("2", "1"), 0.2) == (flomd.UNKNOWN, "timed out")
    fake.members[0].resume()
    wait_until(lambda: fake.keys[LEADER] == "2")  # and does what nobody waits for
    assert world.ask(write("2", "1")).entries[0].text == "2"


def test_nobody_listens(fake, world):
    fake.members[0].stop()
    assert world.outcome(write("1")) == (flomd.UNKNOWN, "connection refused")


def test_members_are_asked_in_turn(open_world):
    with FakeEtcd(members=3) as fake:
        world = open_world(fake.urls)
        fake.members[0].stop()
        outcomes = [world.outcome(ALL, member=member)[0] for member in (0, 1, 2)]
        assert outcomes == [flomd.UNKNOWN, flomd.DONE, flomd.DONE]
        assert world.etcd.reachable == 2


def count_accepted(member):
    """Counts the connections of a member from now on."""
    accepted = []
    listener = member._listener
    accept = listener.get_request

    def get_request():
        accepted.append(1)
        return accept()
    listener.get_request = get_request
    return accepted


def test_a_connection_is_kept(fake, world):
    accepted = count_accepted(fake.members[0])
    fake.members[0].misbehave(fake_etcd.NO_SPACE)
    for _ in range(5):
        world.ask(write("1"))
    assert len(accepted) == 1


def test_behind_another_connection_there_may_be_another_member(fake, world):
    """One URL may lead to a proxy, which keeps a connection with one of the members."""
    accepted = count_accepted(fake.members[0])
    fake.members[0].misbehave(fake_etcd.BEFORE_503, 3)
    for _ in range(4):
        world.ask(write("1"))
    assert len(accepted) == 4


def test_another_address_is_tried_after_a_failure(fake, open_world, monkeypatch):
    """A name has two addresses, and behind the first of them a member that refuses to work."""
    port = fake.members[0].port
    with FakeEtcd() as broken:
        broken.members[0].misbehave(fake_etcd.BEFORE_503, 99, "")
        resolve = socket.getaddrinfo

        def getaddrinfo(host, port, *rest):
            if host == "two.example" and rest[-1] == socket.AI_NUMERICHOST:
                raise socket.gaierror(socket.EAI_NONAME, "not a number")
            if host == "two.example":
                first = resolve("127.0.0.1", broken.members[0].port, *rest)
                return first + resolve("127.0.0.1", port, *rest)
            return resolve(host, port, *rest)
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        world = open_world([f"http://two.example:{port}"])
        assert world.ask(write("1")).outcome == flomd.UNKNOWN
        assert world.ask(write("1")).succeeded
        broken.members[0].stop()
        wait_until(lambda: not threads("resolver"))


def test_the_address_is_one_of_ipv6(open_world):
    try:
        listener = socket.socket(socket.AF_INET6)
        listener.bind(("::1", 0))
    except OSError:
        pytest.skip("there is no IPv6")
    with listener:
        listener.listen(1)
        port = listener.getsockname()[1]
        world, heard = open_world([f"http://[::1]:{port}"]), []
        world.etcd.ask(world.urls[0], flomd.Version(), 10, heard.append)
        accepted, _ = listener.accept()
        with accepted:
            asked = accepted.recv(4096).decode()
            accepted.sendall(response(b'{"etcdserver":"3.4.23"}'))
            world.turn_until(lambda: heard)
    assert heard[0].entries[0].text == "3.4.23"
    assert asked.startswith("GET /version HTTP/1.1\r\n")
    assert f"\r\nHost: [::1]:{port}\r\n" in asked


def test_a_member_that_was_started_again_is_asked_at_once(fake, world):
    world.ask(write("1"))
    fake.members[0].stop()
    fake.members[0].start()
    assert world.ask(write("2", "1")).succeeded


def test_what_came_before_it_was_asked_for_is_no_answer(fake, world):
    world.ask(write("1"))
    one = response(b"{" + HEADER.replace(b"7", b"99") + b',"succeeded":true,"responses":[{}]}')
    fake.members[0].misbehave(one + one)
    assert world.ask(write("2", "wrong")).succeeded
    assert not world.ask(write("2", "wrong")).succeeded


def test_an_answer_that_comes_again_is_none(fake, world):
    revision = world.ask(ALL).revision
    old = b'{"header":{"cluster_id":"5","revision":"%d"},"succeeded":true,"responses":[{}]}'
    fake.members[0].misbehave(response(old % revision))
    assert world.outcome(write("1")) == (flomd.UNKNOWN, "its answer is older than what was asked")
    assert world.ask(write("1")).succeeded


def test_nothing_is_heard_of_a_generation_that_was_stopped(fake, world):
    heard = []
    fake.members[0].pause()
    world.etcd.ask(world.urls[0], write("1"), 10, heard.append)
    world.etcd.ask(world.urls[0], write("2"), 10, heard.append)
    world.etcd.stop()
    world.etcd.start()
    fake.members[0].resume()
    wait_until(lambda: fake.keys)
    wait_until(lambda: len(threads("etcd")) == 1)
    answer = world.ask(ALL)
    assert heard == []
    assert [entry.key for entry in answer.entries] == [LEADER]


def test_it_may_be_stopped_by_who_hears(fake, world):
    heard = []

    def hear(answer):
        heard.append(answer)
        world.etcd.stop()
    for _ in range(3):
        world.etcd.ask(world.urls[0], ALL, 10, hear)
    world.turn_until(lambda: heard)
    wait_until(lambda: not threads("etcd"))
    world.loop._turn(0.05)
    assert len(heard) == 1


def test_a_thread_that_cannot_be_had_leaves_nothing(fake, world, monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")
    watched = len(world.loop._watched)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(OSError):
            world.etcd.start()
        world.etcd.stop()
    assert len(world.loop._watched) == watched - 1
    world.etcd.start()
    assert world.ask(ALL).outcome == flomd.DONE


def test_a_bug_in_the_thread_is_an_answer(fake, world, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")
    with monkeypatch.context() as patch:
        patch.setattr(flomd, "read_answer", fail)
        patch.setattr(threading, "excepthook", lambda _: None, raising=False)
        patch.setattr("sys.stderr", open(os.devnull, "w"))
        before = threads("etcd")
        answer = world.ask(ALL)
        for thread in before:  # its bug is told elsewhere a moment after the loop
            thread.join(10)
        flomd.sys.stderr.close()
    assert (answer.outcome, answer.reason) == (flomd.UNKNOWN, "RuntimeError: a bug")
    assert world.ask(ALL).outcome == flomd.DONE


# Pages

def test_pages_become_smaller_when_they_are_too_long(fake, world, monkeypatch):
    for number in range(200):
        fake.put(f"/x/h/{number:03}", "text" * 100)
    monkeypatch.setattr(flomd, "MOST_ANSWER", 30000)
    page, keys = flomd.Range(PREFIX, END, 2000), []
    for _ in range(30):
        answer = world.ask(page)
        keys += [entry.key for entry in answer.entries]
        if answer.outcome == flomd.DONE and not answer.more:
            break
        if answer.outcome == flomd.DONE:
            page = page._replace(first=keys[-1] + "\0")
    assert keys == [f"/x/h/{number:03}" for number in range(200)]
    fitted = int(fake.asked[-1][1]["limit"])
    assert fitted < 200
    world.etcd.start()  # the next term has not to find out again
    world.ask(page._replace(limit=2000))
    assert int(fake.asked[-1][1]["limit"]) == 2 * fitted


# Names

def test_a_name_is_resolved(fake, open_world):
    url = fake.urls[0].replace("127.0.0.1", "localhost")
    world = open_world([url])
    assert world.ask(write("1")).succeeded


def test_a_slow_resolver_does_not_take_the_time_of_an_answer(fake, open_world, monkeypatch):
    port = fake.members[0].port
    calls, found = [], threading.Event()
    resolve = socket.getaddrinfo

    def getaddrinfo(host, port, *rest):
        if host != "slow.example":
            return resolve(host, port, *rest)
        if rest[-1] == socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "not a number")
        calls.append(host)
        found.wait(20)
        return resolve("127.0.0.1", port, *rest)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    world = open_world([f"http://slow.example:{port}"])
    begun = time.monotonic()
    reason = "slow.example is not resolved yet"
    assert world.outcome(write("1"), 0.2) == (flomd.UNKNOWN, reason)
    assert time.monotonic() - begun < 3
    found.set()
    assert world.ask(write("1")).succeeded
    assert calls == ["slow.example"]
    found.clear()
    fake.members[0].cut()
    fake.members[0].misbehave(fake_etcd.CLOSE_BEFORE)
    assert world.ask(write("2", "1")).outcome == flomd.UNKNOWN
    assert world.ask(write("2", "1"), 5).succeeded  # at the address that is known
    wait_until(lambda: len(calls) == 2)  # which another thread looks for
    found.set()
    wait_until(lambda: not threads("resolver"))


def test_a_name_that_nobody_knows(open_world, monkeypatch):
    def getaddrinfo(*_):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    world = open_world(["http://no.example:2379"])
    assert world.outcome(ALL) == (flomd.UNKNOWN,
                                  "cannot resolve no.example: name or service not known")
    monkeypatch.undo()
    wait_until(lambda: not threads("resolver"))


# Authentication

@pytest.fixture
def password_file(tmp_path):
    path = tmp_path / "password"
    path.write_text("secret\n")
    return str(path)


def test_authentication(fake, open_world, password_file):
    fake.users, fake.allowed = {"flom": "secret"}, PREFIX
    world = open_world(fake.urls, user="flom", password_file=password_file)
    assert world.ask(write("1")).succeeded
    assert world.ask(write("2", "1")).succeeded
    logins = [path for path, _ in fake.asked if path == "/v3/auth/authenticate"]
    assert len(logins) == 1
    assert world.outcome(flomd.Range("/y/", "/y0", 0)) == (flomd.NOT_DONE, DENIED)


@pytest.mark.parametrize("fault", [fake_etcd.TOKEN, fake_etcd.OLD_TOKEN, "no user", "forgotten"])
def test_a_token_that_is_lost_is_got_again(fake, open_world, password_file, fault):
    fake.users = {"flom": "secret"}
    world = open_world(fake.urls, user="flom", password_file=password_file)
    world.ask(write("1"))
    if fault == "forgotten":
        fake.forget_tokens()
    else:
        fake.members[0].misbehave(fault)
    assert world.ask(write("2", "1")).succeeded
    assert world.log.lines == []
    bodies = [body for path, body in fake.asked if path == "/v3/kv/txn"]
    assert bodies[1] == bodies[2]


def test_a_wrong_password(fake, open_world, password_file):
    fake.users = {"flom": "another"}
    world = open_world(fake.urls, user="flom", password_file=password_file)
    wrong = "wrong name or password, see --etcd-password-file"
    assert world.outcome(write("1")) == (flomd.NOT_DONE, wrong)
    with open(password_file, "w") as file:
        file.write("another")
    assert world.ask(write("1")).succeeded


def test_a_password_that_was_changed_is_told_and_nothing_else(fake, open_world, password_file):
    fake.users = {"flom": "secret"}
    world = open_world(fake.urls, user="flom", password_file=password_file)
    assert world.ask(write("1")).succeeded
    fake.users = {"flom": "another"}
    fake.forget_tokens()
    wrong = "wrong name or password, see --etcd-password-file"
    for _ in range(5):
        assert world.ask(ALL).reason == wrong
    assert world.log.lines == [f"error: etcd {world.urls[0]}: {wrong}"]
    asked = len(fake.asked)
    assert world.ask(flomd.Version()).outcome == flomd.DONE  # which anybody may ask for
    assert len(fake.asked) == asked


def test_a_name_without_authentication(fake, open_world, password_file):
    world = open_world(fake.urls, user="flom", password_file=password_file)
    assert world.ask(write("1")).succeeded


def test_a_token_that_is_none(fake, open_world, password_file):
    fake.users = {"flom": "secret"}
    world = open_world(fake.urls, user="flom", password_file=password_file)
    for body in (b"{}", b'{"token":5}', b'{"token":"a\\r\\nb"}', b"<html>"):
        fake.members[0].misbehave(response(body), path="/v3/auth/authenticate")
        outcome, reason = world.outcome(write("1"))
        assert outcome == flomd.UNKNOWN and reason.startswith(flomd.NOT_AN_ETCD)
    assert world.ask(write("1")).succeeded


def test_files_that_cannot_be_read(tmp_path):
    text = str(tmp_path / "text")
    with open(text, "w") as file:
        file.write("no certificate")
    none = dict.fromkeys(flomd.Access._fields)
    https = dict(none, urls=("https://127.0.0.1",))
    for access in (dict(none, urls=("http://127.0.0.1",), password_file="/nowhere"),
                   dict(https, ca="/nowhere"), dict(https, ca=text),
                   dict(https, certificate=text, private_key="/nowhere")):
        with pytest.raises(flomd.CannotServe) as caught:
            flomd.Etcd(None, Log(), flomd.Access(**access))
        assert "/nowhere" in str(caught.value) or text in str(caught.value)


# TLS


def tls_access(certificates, name="nameless"):
    return dict(ca=certificates.pem("ca"), certificate=certificates.pem(name),
                private_key=certificates.key(name))


@pytest.fixture
def tls_fake(certificates):
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.pem("server"), certificates.key("server"))
    context.load_verify_locations(certificates.pem("ca"))
    context.verify_mode = ssl.CERT_REQUIRED
    with FakeEtcd(tls=context) as found:
        yield found


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_tls(tls_fake, certificates, open_world, host):
    urls = [url.replace("127.0.0.1", host) for url in tls_fake.urls]
    world = open_world(urls, **tls_access(certificates))
    assert world.ask(write("1")).succeeded
    tls_fake.members[0].misbehave(fake_etcd.SPLIT)
    assert world.ask(write("2", "1")).succeeded
    tls_fake.members[0].misbehave(fake_etcd.DRIP)
    assert world.outcome(write("3", "2"), 0.3) == (flomd.UNKNOWN, "timed out")
    assert world.ask(write("3", "2")).entries[0].text == "3"


def test_tls_wants_the_name_of_the_host(tls_fake, certificates, open_world):
    urls = [url.replace("127.0.0.1", "127.1") for url in tls_fake.urls]
    world = open_world(urls, **tls_access(certificates))
    outcome, reason = world.outcome(write("1"))
    assert outcome == flomd.UNKNOWN
    assert "certificate" in reason


def test_tls_wants_the_right_authority(tls_fake, certificates, open_world):
    access = dict(tls_access(certificates), ca=certificates.pem("other"))
    outcome, reason = open_world(tls_fake.urls, **access).outcome(write("1"))
    assert outcome == flomd.UNKNOWN
    assert "its certificate is not accepted" in reason


def test_tls_without_the_certificate_that_is_wanted(tls_fake, certificates, open_world):
    world = open_world(tls_fake.urls, ca=certificates.pem("ca"))
    outcome, reason = world.outcome(write("1"))
    assert outcome == flomd.UNKNOWN
    assert "--etcd-certificate" in reason or "closed" in reason or "reset" in reason


def test_tls_where_there_is_none(fake, certificates, open_world):
    urls = [url.replace("http:", "https:") for url in fake.urls]
    world = open_world(urls, ca=certificates.pem("ca"))
    outcome, reason = world.outcome(write("1"))
    assert outcome == flomd.UNKNOWN
    assert reason in (flomd.NO_TLS, flomd.ENDS_TLS, RESET)


def test_no_tls_where_it_is_wanted(tls_fake, open_world):
    urls = [url.replace("https:", "http:") for url in tls_fake.urls]
    assert open_world(urls).ask(write("1"), 2).outcome == flomd.UNKNOWN


# A real one

def enable_authentication(world):
    """The user `flom` may read and write below the prefix."""
    for path, body in USERS:
        post(world, path, body)


@with_real_etcd
def test_authentication_of_a_real_one(open_world, password_file):
    real = RealEtcd()
    try:
        nobody = open_world([real.url])
        before = open_world([real.url], user="flom", password_file=password_file)
        assert before.ask(write("1")).succeeded  # authentication is still off
        enable_authentication(nobody)
        assert nobody.outcome(write("2", "1")) == (
            flomd.NOT_DONE, "user name is empty: authentication is on, see --etcd-user")
        for world in before, open_world([real.url], user="flom", password_file=password_file):
            answer = world.ask(ALL)
            assert world.ask(write("2", answer.entries[0].text)).succeeded
        denied = world.outcome(flomd.Range("/y/", "/y0", 0))
        assert denied == (flomd.NOT_DONE, DENIED)
        assert world.ask(flomd.Version()).outcome == flomd.DONE
        stranger = open_world([real.url], user="root", password_file=password_file)
        assert stranger.ask(write("2")).reason.startswith("wrong name or password")
    finally:
        real.close()


@with_real_etcd
def test_a_token_that_expires(open_world, password_file, tmp_path):
    """As those of JSON do, here two seconds after the login."""
    key = tmp_path / "key"
    key.write_text("s" * 64)
    real = RealEtcd("--auth-token", f"jwt,sign-method=HS256,priv-key={key},ttl=2s")
    try:
        enable_authentication(open_world([real.url]))
        world = open_world([real.url], user="flom", password_file=password_file)
        assert world.ask(write("1")).succeeded
        inquirer = world.etcd._inquirer
        token = inquirer._token
        pass_time(3.1)  # it ends with a whole second
        assert world.ask(write("2", "1")).succeeded
        assert (world.log.lines, inquirer._token != token) == ([], True)
    finally:
        real.close()


def test_no_tls_where_one_speaks_http(any_url, certificates, open_world):
    world = open_world([any_url.replace("http:", "https:")], ca=certificates.pem("ca"))
    outcome, reason = world.outcome(write("1"))
    assert outcome == flomd.UNKNOWN
    assert reason in (flomd.NO_TLS, flomd.ENDS_TLS, RESET)


@with_real_etcd
def test_a_real_one_that_is_full(open_world):
    """The transaction that reaches the quota is refused, and may be done all the same (it was, in
    one of two runs of 3.4.23); a copy is refused as well, or tells."""
    real = RealEtcd("--quota-backend-bytes", "2000000")
    try:
        world, text = open_world([real.url]), None
        for number in range(100):
            request = write(f"{number}" + "x" * 200000, text)
            answer = world.ask(request)
            if answer.outcome != flomd.DONE:
                break
            (_, text), = request.changes
        assert (answer.outcome, answer.reason) == (flomd.NOT_DONE, flomd.NO_ROOM)
        (_, refused), = request.changes
        found, copy = world.ask(ALL).entries[0].text, world.ask(request)
        assert found in (text, refused)
        if copy.outcome == flomd.DONE:  # the guard of the copy is not true any more
            assert not copy.succeeded
            assert copy.entries[0].text == found == refused
        else:
            assert (copy.outcome, copy.reason) == (flomd.NOT_DONE, flomd.NO_ROOM)
    finally:
        real.close()


@with_real_etcd
def test_http_at_another_url(open_world):
    """Etcd 3.5.9 and later can have HTTP at one port and gRPC alone at the other."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    try:
        real = RealEtcd("--listen-client-http-urls", url, health=url)
    except AssertionError as error:
        assert "not defined: -listen-client-http-urls" in str(error)
        pytest.skip("this etcd has HTTP and gRPC at one port")
    try:
        assert open_world([url]).ask(write("1")).succeeded
        outcome, reason = open_world([real.url]).outcome(write("2", "1"))
        assert outcome == flomd.UNKNOWN
        assert reason in [f"{words}, {flomd.WANTS_ANOTHER}" for words in (CLOSED, RESET)]
    finally:
        real.close()


@with_real_etcd
def test_certificates_of_our_making(certificates, open_world, tmp_path):
    """Those of make-certificates.sh show who asks, and who answers."""
    script = os.path.join(ROOT, "contrib/tls/make-certificates.sh")
    for words in ["ca"], ["one", "some-id"], ["127.0.0.1", "its-id"], ["::1", "its-id"]:
        subprocess.check_call(["sh", script] + words, cwd=str(tmp_path))
    ca, *one = [str(tmp_path / name) for name in ("ca.pem", "one.pem", "one.key")]
    access = dict(ca=ca, certificate=one[0], private_key=one[1])
    own = flomd.Access(("https://127.0.0.1",), None, None, *access.values())
    real = RealEtcd("--client-cert-auth", "--trusted-ca-file", ca,
                    "--cert-file", str(tmp_path / "127.0.0.1.pem"),
                    "--key-file", str(tmp_path / "127.0.0.1.key"),
                    context=flomd._client_context(own))
    try:
        assert open_world([real.url], **access).ask(write("1")).succeeded
    finally:
        real.close()


@with_real_etcd
def test_tls_of_a_real_one(certificates, open_world, password_file):
    access = tls_access(certificates)
    own = flomd.Access(("https://127.0.0.1",), None, None, *access.values())
    real = RealEtcd("--client-cert-auth", "--trusted-ca-file", certificates.pem("ca"),
                    "--cert-file", certificates.pem("server"),
                    "--key-file", certificates.key("server"), context=flomd._client_context(own))
    try:
        world = open_world([real.url], **access)
        assert world.ask(write("1")).succeeded
        bare = open_world([real.url], ca=certificates.pem("ca"))
        outcome, reason = bare.outcome(write("2", "1"))
        assert outcome == flomd.UNKNOWN
        assert "does not accept the certificate of --etcd-certificate" in reason
        plain = open_world([real.url.replace("https", "http")])
        outcome, reason = plain.outcome(write("2", "1"))
        assert outcome == flomd.UNKNOWN
        assert reason in [f"{words}, {flomd.WANTS_ANOTHER}" for words in (CLOSED, RESET)]
        enable_authentication(world)
        user = dict(user="flom", password_file=password_file)
        assert open_world([real.url], **access, **user).ask(write("2", "1")).succeeded
        named = open_world([real.url], **tls_access(certificates, "good"), **user)
        outcome, reason = named.outcome(write("3", "2"))
        assert outcome == flomd.NOT_DONE
        assert "a client certificate that has a CN" in reason
    finally:
        real.close()
