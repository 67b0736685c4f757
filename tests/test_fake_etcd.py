"""The fake etcd answers as the real one does, and misbehaves as it is told."""
import http.client
import json
import socket
import threading
from contextlib import ExitStack

import pytest

import fake_etcd
from fake_etcd import FakeEtcd, encoded
from real_etcd import USERS, RealEtcd, with_real_etcd
from world import wait_until

pytestmark = pytest.mark.in_time  # its threads, or those of a real one


def key(text):
    return encoded(text.encode())


def put(name, text):
    return {"request_put": {"key": key(name), "value": key(text)}}


def remove(name):
    return {"request_delete_range": {"key": key(name)}}


def find(name):
    return {"request_range": {"key": key(name)}}


def prefix(**more):
    return dict({"key": key("/x/"), "range_end": key("/x0")}, **more)


def is_value(name, text):
    return {"key": key(name), "target": "VALUE", "value": key(text)}


TALK = [
    ("kv/range", prefix()),
    ("kv/txn", {"compare": [{"key": key("/x/a"), "target": "CREATE", "create_revision": "0"}],
                "success": [put("/x/a", "1")], "failure": [find("/x/a")]}),
    ("kv/txn", {"compare": [{"key": key("/x/a"), "target": "CREATE", "create_revision": 0}],
                "success": [put("/x/a", "2")], "failure": [find("/x/a"), find("/x/none")]}),
    ("kv/txn", {"compare": [is_value("/x/a", "1")],
                "success": [put("/x/a", "2"), put("/x/b", ""), remove("/x/c")]}),
    ("kv/txn", {"compare": [is_value("/x/a", "1")], "success": [put("/x/a", "3")]}),
    ("kv/txn", {"compare": [is_value("/x/none", "")], "success": [put("/x/a", "3")]}),
    ("kv/txn", {"compare": [{"key": key("/x/a"), "target": "MOD", "mod_revision": "3"}],
                "success": [put("/x/c", "c"), remove("/x/b"), find("/x/c")]}),
    ("kv/txn", {"compare": [{"key": key("/x/a"), "target": "VERSION", "version": "2"}],
                "success": [remove("/x/none")]}),
    ("kv/txn", {"compare": [{"key": key("/x/a"), "target": "MOD", "mod_revision": "1",
                             "result": "GREATER"}], "success": [put("/x/a", "ä")]}),
    ("kv/txn", {"comparison": [is_value("/x/a", "wrong")], "success": [put("/x/a", "unguarded")]}),
    ("kv/txn", {}),
    ("kv/txn", {"success": [put("/x/a", "1"), put("/x/a", "2")]}),
    ("kv/txn", {"success": [put(f"/x/{number}", "") for number in range(129)]}),
    ("kv/txn", {"success": [put(f"/x/{number}", "t" * 40) for number in range(40)]}),
    ("kv/range", prefix(limit="3")),
    ("kv/range", prefix()),
    ("kv/range", prefix(revision="3")),
    ("kv/range", prefix(revision="99999")),
    ("kv/range", {"key": key("/x/a"), "range_end": key("/x/a\0"), "limit": 1}),
    ("kv/range", {}),
    ("kv/compaction", {"revision": "4"}),
    ("kv/compaction", {"revision": "4"}),
    ("kv/compaction", {"revision": "99999"}),
    ("kv/range", prefix(revision="3")),
    ("kv/range", prefix(revision="4")),
    ("auth/authenticate", {"name": "x", "password": "y"}),
    ("nowhere", {}),
    ("kv/range", {"key": "no base64!"}),
]


class Asker:
    """Asks one member over one connection."""

    def __init__(self, url):
        host, port = url.rpartition("/")[2].split(":")
        self.connection = http.client.HTTPConnection(host, int(port), timeout=10)

    def ask(self, path, body, token=None):
        """(status, answer, headers); the answer is text where it is no JSON."""
        headers = {"Authorization": token} if token else {}
        self.connection.request("POST", "/v3/" + path, json.dumps(body), headers)
        answer = self.connection.getresponse()
        data = answer.read().decode()
        try:
            data = json.loads(data)
        except ValueError:
            pass
        return answer.status, data, answer

    def close(self):
        self.connection.close()


@pytest.fixture
def open_asker():
    with ExitStack() as stack:
        def opened(url):
            asker = Asker(url)
            stack.callback(asker.close)
            return asker
        yield opened


@pytest.fixture
def etcd():
    with FakeEtcd() as found:
        yield found


@pytest.fixture
def asker(etcd, open_asker):
    return open_asker(etcd.members[0].url)


def plain(answer, generation):
    """What does not depend on the member: status, body, how its length is told."""
    status, body, whole = answer
    if isinstance(body, dict) and "header" in body:
        for name in ("cluster_id", "member_id", "raft_term"):
            assert body["header"].pop(name)
    if isinstance(body, dict) and "base64" in body.get("message", ""):
        return status, "no base64"  # each has words of its own
    if generation == 3:
        return status, body
    kind = whole.headers["Content-Type"].partition(";")[0]
    return status, body, kind, whole.headers["Transfer-Encoding"]


def generation_of(asker):
    """That of the gateway of a real etcd, by how it refuses."""
    _, body, whole = asker.ask("kv/range", {})
    if "error" not in body:
        return 3
    return 1 if whole.headers["Trailer"] else 2


@with_real_etcd
def test_it_answers_as_a_real_etcd(etcd, asker, open_asker):
    real = RealEtcd()
    try:
        real_asker = open_asker(real.url)
        etcd.generation = generation_of(real_asker)
        for path, body in TALK:
            answers = asker.ask(path, body), real_asker.ask(path, body)
            said = [plain(answer, etcd.generation) for answer in answers]
            assert said[0] == said[1], (path, body)
    finally:
        real.close()


LOGIN = {"name": "flom", "password": "secret"}
GUARDED = {"compare": [is_value("/x/a", "1")], "success": [put("/x/a", "2")]}
TALK_OF_USERS = [  # and whether the token is shown
    ("kv/range", prefix(), False), ("kv/range", prefix(), True),
    ("kv/txn", {"success": [put("/x/a", "1")]}, False), ("kv/txn", GUARDED, True),
    ("kv/txn", dict(GUARDED, failure=[find("/x/a")]), True),
    ("kv/txn", {"success": [put("/y/a", "1")]}, True),
    ("kv/txn", {"success": [remove("/y/a")]}, True), ("kv/range", {"key": key("/y/a")}, True),
    ("kv/txn", {"compare": [is_value("/y/a", "1")], "success": [put("/x/a", "1")]}, True),
    ("auth/authenticate", dict(LOGIN, password="wrong"), False),
    ("auth/authenticate", dict(LOGIN, name="nobody"), False),
]


@with_real_etcd
def test_it_admits_as_a_real_etcd(etcd, asker, open_asker):
    etcd.users, etcd.allowed = {"flom": "secret"}, "/x/"
    real = RealEtcd()
    try:
        askers = [asker, open_asker(real.url)]
        etcd.generation = generation_of(askers[1])
        for path, body in USERS:
            assert askers[1].ask(path, body)[0] == 200, (path, body)
        tokens = [each.ask("auth/authenticate", LOGIN)[1]["token"] for each in askers]
        for path, body, is_shown in TALK_OF_USERS:
            said = [plain(each.ask(path, body, token if is_shown else None), etcd.generation)
                    for each, token in zip(askers, tokens)]
            assert said[0] == said[1], (path, body)
        for wrong in "x", "Bearer " + tokens[1], tokens[1][:-1]:
            said = [plain(each.ask("kv/range", prefix(), wrong), etcd.generation)
                    for each in askers]
            assert said[0] == said[1], wrong
    finally:
        real.close()


def test_keys_are_there_to_be_seen_and_changed(etcd):
    etcd.put("/x/a", "ä")
    etcd.put("/x/b", "1")
    etcd.remove("/x/b")
    assert etcd.keys == {"/x/a": "ä"}
    assert etcd.revision == 4
    etcd.wipe()
    assert (etcd.keys, etcd.revision) == ({}, 1)


TXN = "kv/txn", {"success": [put("/x/a", "1")]}


@pytest.mark.parametrize("fault, status, was_done", [
    (fake_etcd.BEFORE_503, 503, False), (fake_etcd.AFTER_503, 503, True),
    (fake_etcd.TOKEN, 401, False), (fake_etcd.OLD_TOKEN, 400, False),
    (fake_etcd.NO_SPACE, 429, False), (fake_etcd.NO_SPACE_AFTER, 429, True),
    (fake_etcd.DENIED, 403, False),
    (fake_etcd.SPLIT, 200, True), (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", 302, False)])
def test_it_misbehaves_once(etcd, asker, fault, status, was_done):
    etcd.members[0].misbehave(fault)
    assert asker.ask(*TXN)[0] == status
    assert ("/x/a" in etcd.keys) == was_done
    asker.close()
    assert asker.ask(*TXN)[0] == 200


@pytest.mark.parametrize("fault, was_done", [
    (fake_etcd.CLOSE_BEFORE, False), (fake_etcd.CLOSE_AFTER, True)])
def test_it_closes(etcd, asker, fault, was_done):
    etcd.members[0].misbehave(fault)
    with pytest.raises((http.client.HTTPException, OSError)):
        asker.ask(*TXN)
    assert ("/x/a" in etcd.keys) == was_done


@pytest.mark.parametrize("fault, was_done", [
    (fake_etcd.SILENCE, False), (fake_etcd.SILENCE_AFTER, True), (fake_etcd.DELAY, False)])
def test_it_is_silent(etcd, asker, fault, was_done):
    etcd.members[0].misbehave(fault)
    asker.connection.timeout = 0.2
    with pytest.raises(socket.timeout):
        asker.ask(*TXN)
    assert ("/x/a" in etcd.keys) == was_done
    etcd.deliver()
    assert ("/x/a" in etcd.keys) == (was_done or fault == fake_etcd.DELAY)


def test_a_duplicate_is_done_when_it_is_delivered(etcd, asker):
    etcd.members[0].misbehave(fake_etcd.DUPLICATE)
    assert asker.ask(*TXN)[0] == 200
    etcd.remove("/x/a")
    etcd.deliver()
    assert etcd.keys == {"/x/a": "1"}


def test_errors_of_the_second_generation(etcd, asker):
    etcd.generation = 2
    status, body, whole = asker.ask("kv/range", {})
    said = "etcdserver: key is not provided"
    assert (status, body) == (400, {"error": said, "message": said, "code": 3})
    assert "Trailer" not in whole.headers
    assert asker.ask("nowhere", {})[:2] == (404, "Not Found\n")
    assert asker.ask("auth/authenticate", {})[0] == 400


def test_errors_of_the_third_generation(etcd, asker):
    etcd.generation = 3
    status, body, whole = asker.ask("kv/range", {})
    assert (status, body) == (400, {"code": 3, "message": "etcdserver: key is not provided"})
    assert "Trailer" not in whole.headers
    assert asker.ask("nowhere", {})[:2] == (404, {"code": 5, "message": "Not Found"})


def test_authentication(etcd, asker):
    etcd.users, etcd.allowed = {"flom": "secret"}, "/x/"
    assert asker.ask(*TXN)[:2] == (400, {"error": "etcdserver: user name is empty", "code": 3,
                                         "message": "etcdserver: user name is empty"})
    assert asker.ask("auth/authenticate", {"name": "flom", "password": "wrong"})[0] == 400
    token = asker.ask("auth/authenticate", {"name": "flom", "password": "secret"})[1]["token"]
    assert asker.ask(*TXN, token)[0] == 200
    assert asker.ask(*TXN, "Bearer " + token)[0] == 401
    assert asker.ask("kv/range", {"key": key("/y")}, token)[0] == 403
    etcd.forget_tokens()
    assert asker.ask(*TXN, token)[0] == 401


def test_members_have_one_memory_and_may_differ(open_asker):
    with FakeEtcd(members=2) as etcd:
        first, second = [open_asker(url) for url in etcd.urls]
        first.ask(*TXN)
        etcd.members[1].cluster_id, etcd.members[1].behind = 5, 1
        answer = second.ask("kv/range", prefix())[1]
        assert answer["count"] == "1"
        assert (answer["header"]["cluster_id"], answer["header"]["revision"]) == ("5", "1")


def test_a_member_is_stopped_and_started_at_its_port(etcd, asker):
    member = etcd.members[0]
    assert asker.ask(*TXN)[0] == 200
    member.stop()
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        asker.ask(*TXN)
    asker.close()
    with pytest.raises(ConnectionRefusedError):
        asker.ask(*TXN)
    asker.close()
    member.start()
    assert asker.ask(*TXN)[0] == 200


def test_what_comes_in_a_pause_is_done_after_it(etcd, asker):
    etcd.members[0].pause()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(asker.ask(*TXN)[0]))
    thread.start()
    thread.join(0.1)
    assert (answers, etcd.keys) == ([], {})
    etcd.members[0].resume()
    thread.join(10)
    assert answers == [200]


def test_a_request_that_nobody_waits_for_is_done_after_a_pause(etcd, asker):
    etcd.members[0].pause()
    asker.connection.timeout = 0.1
    with pytest.raises(socket.timeout):
        asker.ask(*TXN)
    asker.close()
    etcd.members[0].resume()
    wait_until(lambda: "/x/a" in etcd.keys)
