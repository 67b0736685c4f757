"""A cluster of etcd in this process, whose members answer as the gateways of real ones do and can
be told to misbehave.

FakeEtcd is the cluster: the keys, its id, who may ask.  Each of its `members` listens at a port
of its own on the loopback (`url`) and can be stopped, started, paused and resumed.

    with FakeEtcd(members=3) as etcd:
        etcd.put("/flom/x/leader", "...")      # a change behind everybody's back
        etcd.keys                              # {key: text}
        etcd.members[0].misbehave(AFTER_503)   # the next txn is committed and answered by 503
"""
import base64
import collections
import json
import http.server
import operator
import select
import socket
import socketserver
import sys
import threading
from contextlib import suppress

CLUSTER_ID = 6458432214418862501
MEMBER_ID = 13922825120356555596
MOST_OPERATIONS = 128
CHUNKED_FROM = 2048  # bytes of an answer
DRIP_PAUSE = 0.02

# What a member can be told to do with a request.
BEFORE_503 = "503, and nothing is done"
AFTER_503 = "503, and it is done"
CLOSE_BEFORE = "it closes, and nothing is done"
CLOSE_AFTER = "it closes, and it is done"
SILENCE = "no answer, and nothing is done"
SILENCE_AFTER = "no answer, and it is done"
DELAY = "no answer, and it is done when deliver() is called"
DUPLICATE = "it is done and answered, and done once more when deliver() is called"
SPLIT = "each byte of the answer is sent alone"
DRIP = "a byte of the answer each DRIP_PAUSE s"
TOKEN = "401"
OLD_TOKEN = "400, the revision of auth store is old"
NO_SPACE = "429"
NO_SPACE_AFTER = "429, and it is done, as the transaction that reaches the quota"
DENIED = "403"

# What is answered where something is wrong: HTTP status, code of gRPC, message.
REFUSALS = {
    BEFORE_503: (503, 14, "etcdserver: request timed out"),
    TOKEN: (401, 16, "etcdserver: invalid auth token"),
    OLD_TOKEN: (400, 3, "etcdserver: revision of auth store is old"),
    NO_SPACE: (429, 8, "etcdserver: mvcc: database space exceeded"),
    DENIED: (403, 7, "etcdserver: permission denied"),
    "no user": (400, 3, "etcdserver: user name is empty"),
    "password": (400, 3, "etcdserver: authentication failed, invalid user ID or password"),
    "auth is off": (412, 9, "etcdserver: authentication is not enabled"),
    "compacted": (400, 11, "etcdserver: mvcc: required revision has been compacted"),
    "future": (400, 11, "etcdserver: mvcc: required revision is a future revision"),
    "duplicate": (400, 3, "etcdserver: duplicate key given in txn request"),
    "too many": (400, 3, "etcdserver: too many operations in txn request"),
    "no key": (400, 3, "etcdserver: key is not provided"),
    "unknown": (404, 5, "Not Found"),
}
COMPARISONS = {"EQUAL": operator.eq, "NOT_EQUAL": operator.ne, "GREATER": operator.gt,
               "LESS": operator.lt}

Kept = collections.namedtuple("Kept", "value created modified version")
NOBODY = Kept(None, 0, 0, 0)


class Refused(Exception):
    """The request is answered as REFUSALS say."""


def decoded(text):
    return base64.b64decode(text, validate=True)


def encoded(data):
    return base64.b64encode(data).decode()


def sparse(**fields):
    """Without what is zero, false or empty; numbers of 64 bits are strings."""
    return {name: str(value) if type(value) is int else value
            for name, value in fields.items() if value}


class FakeEtcd:
    """The cluster.  `asked`: (path, body) of the requests that have come, in their order;
    `users`: {name: password}, None while authentication is off; `allowed`: the prefix for which
    a user has a role; `generation` of the gateway: 1 of etcd 3.4, 2 of 3.5, 3 of 3.6 and of
    Debian's 3.5; `version` as GET /version tells it."""

    def __init__(self, members=1, tls=None, generation=1, version="3.4.23"):
        self.lock = threading.RLock()
        self.cluster_id, self.generation, self.version = CLUSTER_ID, generation, version
        self.users, self.allowed, self.tokens = None, "", set()
        self.asked, self.late = [], []
        self._serial = 0
        self.wipe()
        self.members = [Member(self, MEMBER_ID + index, tls) for index in range(members)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for member in self.members:
            member.close()

    @property
    def urls(self):
        return [member.url for member in self.members]

    @property
    def keys(self):
        with self.lock:
            return {key.decode(): kept.value.decode() for key, kept in sorted(self._now.items())}

    # Behind everybody's back.

    def wipe(self):
        """As a cluster that is built anew with the same configuration, so with the same id."""
        with self.lock:
            self.revision, self.compacted = 1, 0
            self._now, self._past = {}, []  # _past: (revision, key, Kept or None)

    def put(self, key, text):
        self._change([{"request_put": {"key": encoded(key.encode()),
                                       "value": encoded(text.encode())}}])

    def remove(self, key):
        self._change([{"request_delete_range": {"key": encoded(key.encode())}}])

    def _change(self, operations):
        with self.lock:
            self._branch(operations, self.revision + 1)

    def deliver(self):
        """Does what was delayed, and once more what was to be; returns the answers."""
        late, self.late = self.late, []
        return [self.obey(path, body, None) for path, body in late]

    def forget_tokens(self):
        self.tokens.clear()

    # What is asked.

    def obey(self, path, body, token):
        """The answer to a request as a dictionary; raises Refused.  The token of what is delivered
        late, None, was looked at when it came."""
        with self.lock:
            if path == "/v3/auth/authenticate":
                return self._authenticate(body)
            if path == "/v3/maintenance/status":
                return sparse(header=self.header(), version=self.version, dbSize=20480)
            found = {"/v3/kv/range": self._range, "/v3/kv/txn": self._txn,
                     "/v3/kv/compaction": self._compact}.get(path)
            if found is None:
                raise Refused("unknown")
            if self.users is not None and token is not None:
                self._admit(body, token)
            return found(body)

    def header(self, **fields):
        return sparse(cluster_id=self.cluster_id, revision=self.revision, raft_term=2, **fields)

    def _authenticate(self, body):
        if self.users is None:
            raise Refused("auth is off")
        if body.get("name") not in self.users or \
                self.users[body["name"]] != body.get("password"):
            raise Refused("password")
        self._serial += 1
        token = f"jJtcuTlJewbeomYs.{self._serial}"
        self.tokens.add(token)
        return {"header": self.header(), "token": token}

    def _admit(self, body, token):
        if not token:
            raise Refused("no user")
        if token not in self.tokens:
            raise Refused(TOKEN)
        keys = [body["key"]] if "key" in body else []
        for operation in body.get("compare", []) + body.get("success", []):
            found = operation if "key" in operation else list(operation.values())[0]
            keys.append(found["key"])
        if not all(decoded(key).startswith(self.allowed.encode()) for key in keys):
            raise Refused(DENIED)

    def _range(self, body):
        keys = self._now
        revision = int(body.get("revision", 0))
        if revision > self.revision:
            raise Refused("future")
        if 0 < revision < self.compacted:
            raise Refused("compacted")
        if revision > 0:
            keys = {}
            for when, key, kept in self._past:
                if when <= revision:
                    keys[key] = kept
        return dict(self._found(keys, body), header=self.header())

    def _found(self, keys, body):
        first, end = decoded(body.get("key", "")), decoded(body.get("range_end", ""))
        if not first:
            raise Refused("no key")
        found = sorted((key, kept) for key, kept in keys.items()
                       if kept and (first <= key < end if end else key == first))
        limit = int(body.get("limit", 0)) or len(found)
        kvs = [sparse(key=encoded(key), create_revision=kept.created, mod_revision=kept.modified,
                      version=kept.version, value=encoded(kept.value))
               for key, kept in found[:limit]]
        return sparse(kvs=kvs, more=len(found) > limit, count=len(found))

    def _txn(self, body):
        for name in ("compare", "success", "failure"):
            if len(body.get(name, [])) > MOST_OPERATIONS:
                raise Refused("too many")
        succeeded = all(map(self._is_true, body.get("compare", [])))
        operations = body.get("success" if succeeded else "failure", [])
        puts = [each["request_put"]["key"] for each in operations if "request_put" in each]
        if len(set(puts)) < len(puts):
            raise Refused("duplicate")
        responses = self._branch(operations, self.revision + 1)
        return sparse(header=self.header(), succeeded=succeeded, responses=responses)

    def _is_true(self, compare):
        kept = self._now.get(decoded(compare["key"]), NOBODY)
        found, wanted = {
            "VALUE": (kept.value, decoded(compare.get("value", ""))),
            "MOD": (kept.modified, int(compare.get("mod_revision", 0))),
            "CREATE": (kept.created, int(compare.get("create_revision", 0))),
            "VERSION": (kept.version, int(compare.get("version", 0))),
        }[compare.get("target", "VERSION")]
        if found is None:  # a value of a key that is not there
            return False
        return COMPARISONS[compare.get("result", "EQUAL")](found, wanted)

    def _branch(self, operations, revision):
        responses = []
        for operation in operations:
            (kind, body), = operation.items()
            if kind == "request_range":
                found = dict(self._found(self._now, body), header={"revision": str(self.revision)})
                responses.append({"response_range": found})
                continue
            key = decoded(body["key"])
            before = self._now.get(key)
            answer = {}
            if kind == "request_put":
                kept = before or Kept(b"", revision, 0, 0)
                self._set(key, Kept(decoded(body.get("value", "")), kept.created, revision,
                                    kept.version + 1), revision)
                responses.append({"response_put": answer})
            else:
                if before:
                    self._set(key, None, revision)
                    answer["deleted"] = "1"
                responses.append({"response_delete_range": answer})
            answer["header"] = {"revision": str(self.revision)}
        return responses

    def _set(self, key, kept, revision):
        self.revision = revision
        self._past.append((revision, key, kept))
        if kept is None:
            del self._now[key]
        else:
            self._now[key] = kept

    def _compact(self, body):
        revision = int(body.get("revision", 0))
        if revision <= self.compacted:
            raise Refused("compacted")
        if revision > self.revision:
            raise Refused("future")
        self.compacted = revision
        return {"header": self.header()}


class Listener(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 50
    member = None  # the Member

    def get_request(self):
        connection, address = super().get_request()
        self.member.connections.add(connection)
        return connection, address

    def shutdown_request(self, request):
        self.member.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        """Who asks may go at any time."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Member:
    """A member of the cluster.  `cluster_id`: another than that of the cluster; `behind`: the
    revision that it tells is lower by so much."""

    def __init__(self, etcd, member_id, tls=None):
        self.etcd, self.id, self.tls = etcd, member_id, tls
        self.cluster_id, self.behind = None, 0
        self.faults, self.connections = [], set()
        self.running = threading.Event()
        self.running.set()
        self._place = socket.socket()  # keeps the port while nobody listens
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", 0))
        self.port = self._place.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._listener = None
        self.start()

    def start(self):
        self._listener = Listener(("127.0.0.1", self.port), Gateway)
        self._listener.member = self
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self):
        """As one that is killed: connections are refused, those there are end."""
        self._listener.shutdown()
        self._thread.join()
        self._listener.server_close()
        self._listener = None
        self.running.set()
        self.cut()

    def cut(self):
        """Ends the connections that there are."""
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def pause(self):
        """As one that is stopped by SIGSTOP: what comes is done after resume()."""
        self.running.clear()

    def resume(self):
        self.running.set()

    def close(self):
        if self._listener is not None:
            self.stop()
        self._place.close()

    def misbehave(self, fault, times=1, path="/v3/kv/txn"):
        """The next `times` requests for the path ("": any) are treated so.  A fault that is bytes
        is sent in place of the answer, before the request is looked at."""
        self.faults += [(path, fault)] * times

    def behave(self):
        """As ever, from now on."""
        self.faults = []

    def next_fault(self, path):
        for index, (wanted, fault) in enumerate(self.faults):
            if wanted in ("", path):
                del self.faults[index]
                return fault
        return None


class Gateway(http.server.BaseHTTPRequestHandler):
    """One connection."""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        self.member = self.server.member
        self.etcd = self.member.etcd
        if self.member.tls is not None:
            self.request.settimeout(10)
            self.request = self.member.tls.wrap_socket(self.request, server_side=True)
            self.request.settimeout(None)
            self.member.connections.add(self.request)
        super().setup()

    def finish(self):
        with suppress(OSError):
            super().finish()
        if self.member.tls is not None:
            self.member.connections.discard(self.request)
            self.request.close()

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.member.running.wait()
        fault = self.member.next_fault(self.path)
        if isinstance(fault, bytes):
            self._send_raw(fault)
        elif self.path == "/version":
            text = f'{{"etcdserver":"{self.etcd.version}","etcdcluster":"3.4.0"}}'
            self._send(200, text, "application/json")
        else:
            self._send(405, "Method Not Allowed\n", "text/plain; charset=utf-8")

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.member.running.wait()
        fault = self.member.next_fault(self.path)
        try:
            body = json.loads(data.decode())
            self.etcd.asked.append((self.path, body))
            self._answer(body, fault)
        except ValueError as error:  # of json and of base64
            self._refuse(400, 3, str(error))
        except Refused as error:
            self._refuse(*REFUSALS[error.args[0]])

    def _answer(self, body, fault):
        if isinstance(fault, bytes):
            return self._send_raw(fault)
        if fault in (DELAY, DUPLICATE):
            self.etcd.late.append((self.path, body))
        if fault in (SILENCE, DELAY):
            return self._keep_silent()
        if fault == CLOSE_BEFORE:
            return self._close()
        if fault in REFUSALS:
            raise Refused(fault)
        answer = self.etcd.obey(self.path, body, self.headers.get("Authorization", ""))
        if fault in (AFTER_503, NO_SPACE_AFTER):
            raise Refused({AFTER_503: BEFORE_503, NO_SPACE_AFTER: NO_SPACE}[fault])
        if fault == SILENCE_AFTER:
            return self._keep_silent()
        if fault == CLOSE_AFTER:
            return self._close()
        return self._send_answer(answer, fault)

    def _send_answer(self, answer, fault):
        header = answer["header"]
        header["member_id"] = str(self.member.id)
        header["revision"] = str(self.etcd.revision - self.member.behind)
        if self.member.cluster_id is not None:
            header["cluster_id"] = str(self.member.cluster_id)
        pause = {SPLIT: 0, DRIP: DRIP_PAUSE}.get(fault)
        self._send(200, self._text(answer), "application/json", pause)

    def _text(self, answer):
        separators = (", ", ":") if self.etcd.generation == 3 else (",", ":")
        return json.dumps(answer, separators=separators)

    def _refuse(self, status, code, message):
        generation = self.etcd.generation
        if generation > 1:
            status = {412: 400}.get(status, status)
        if generation == 3:
            body = {"code": code, "message": message}
        elif message == "Not Found":
            return self._send(404, "Not Found\n", "text/plain; charset=utf-8")
        else:
            body = {"error": message, "message": message, "code": code}
        self._send(status, self._text(body), "application/json", trailer=generation == 1)

    def _send(self, status, text, kind, pause=None, trailer=False):
        """Long answers, and errors of the first generation, are chunked; those have a trailer."""
        data = text.encode()
        is_chunked = trailer or len(data) > CHUNKED_FROM
        head = f"HTTP/1.1 {status} {self.responses[status][0]}\r\nContent-Type: {kind}\r\n"
        if trailer:
            head += "Trailer: Grpc-Trailer-Content-Type\r\n"
        if is_chunked:
            head += "Transfer-Encoding: chunked\r\n\r\n"
            data = b"%x\r\n%s\r\n0\r\n" % (len(data), data)
            data += b"Grpc-Trailer-Content-Type: application/grpc\r\n" * trailer + b"\r\n"
        else:
            head += f"Content-Length: {len(data)}\r\n\r\n"
        data = head.encode() + data
        if pause is None:
            self._send_pieces([data])
        else:
            self._send_pieces([data[index:index + 1] for index in range(len(data))], pause)

    def _send_raw(self, data):
        """With the last of it comes the end, so that nobody asks again in between."""
        with suppress(OSError):
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
            self.request.sendall(data)
            self.request.shutdown(socket.SHUT_WR)
        self._close()

    def _send_pieces(self, pieces, pause=0):
        try:
            for piece in pieces:
                self.request.sendall(piece)
                select.select([], [], [], pause)
        except OSError:
            self._close()

    def _close(self):
        self.close_connection = True

    def _keep_silent(self):
        """Until who asks goes away, or the member."""
        with suppress(OSError):
            self.rfile.read(1)
        self._close()
