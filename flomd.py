#!/usr/bin/env python3
"""flomd - the daemon that holds flom's locks

    flomd.py [OPTION]...            serve /tmp/flom-LOGIN
    flomd.py -s /run/flom/socket    serve this UNIX socket
    flomd.py -a 10.77.0.1           serve this TCP address, port 28015
    flomd.py -A 239.255.0.1         serve a multicast group, at any free port
    flomd.py -f ...                 do not detach (systemd, runit, containers)

flom.py starts a daemon when it needs one and finds none; an init system may start it as well.
Without -f the command returns when the daemon listens.

Exit status: 0, 1 when it cannot serve, 3 when another daemon serves the group, 99 for a wrong
option or configuration file.
"""
import argparse
import binascii
import bisect
import collections
import contextlib
import copy
import errno
import fcntl
import functools
import heapq
import itertools
import operator
import os
import pwd
import random
import re
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
import traceback


# --- Shared with flom.py ------------------------------------------------------------------------
# ==== Shared with flom.py: begin ====
VERSION = "1.0"
LOCK, UNLOCK, PING, DISCOVER, MANAGEMENT = 1, 2, 3, 4, 5  # verbs
OK, ENQUEUED, WAIT_RESOURCE, BUSY, CANT_WAIT, IMPOSSIBLE = 0, 1, 2, 4, 5, 6  # rc of an answer
DEADLOCK, STOPPED, LIMIT, INVALID_NAME = 7, 8, 9, -14  # 7, 8 and 9 to clients of ours only
MODES = "NL CR CW PR PW EX".split()
LONG_MODES = ["NullLock", "ConcurrentRead", "ConcurrentWrite", "ProtectedRead", "ProtectedWrite",
              "Exclusive"]
DEFAULT_RESOURCE, STATUS_RESOURCE = "_RESOURCE", "_STATUS"
MOST, WIDEST = 2 ** 31 - 1, 2 ** 63 - 1  # greatest number in FLoM's messages, and in ours


class UsageError(Exception):
    """A wrong option, file or name: one line on stderr, status 99, nothing is run."""


class ProtocolError(Exception):
    """The peer broke the protocol: its connection is closed."""


# A message is an XML element `msg`; its end is the bytes </msg>.  The reader takes what FLoM's
# takes, less comments, CDATA and DOCTYPE: one expression cuts tags, one finds their attributes.
END, HEADER = b"</msg>", '<?xml version="1.0" encoding="UTF-8" ?>'
_PAIR = r"""([A-Za-z_][-\w.]*)\s*=\s*(?:"([^"<]*)"|'([^'<]*)')"""
_start = re.compile(r"\s*(?:<\?xml\s[^<>?]*\?>)?", re.ASCII).match
_tag = re.compile(r"\s*<(/?)([A-Za-z_][-\w.]*)((?:\s+%s)*)\s*(/?)>"
                  % re.sub(r"\((?!\?)", "(?:", _PAIR), re.ASCII).match
_pairs, _whole = re.compile(_PAIR, re.ASCII).findall, re.compile("-?[0-9]{1,19}").fullmatch
_entity = re.compile(r"&(?:#([0-9]{1,7})|#x([0-9A-Fa-f]{1,6})|(amp|lt|gt|quot|apos));|&")
_ENTITIES = {"amp": "&", "lt": "<", "gt": ">", "quot": '"', "apos": "'"}
_ESCAPES = {ord(char): f"&{name};" for name, char in _ENTITIES.items() if char != "'"}
_ELEMENTS = {"msg", "session", "resource", "answer", "network", "shutdown"}
_NUMBERS = {  # the attributes that are numbers: least, greatest
    "level": (3, 3), "verb": (1, 5), "step": (0, 99), "mode": (0, 5), "wait": (0, 1),
    "create": (0, 1), "lifespan": (0, MOST), "quantity": (1, MOST), "rollback": (0, 1),
    "rc": (-MOST, MOST), "port": (1, 65535), "immediate": (0, 1), "progress": (0, 1),
    "position": (0, MOST), "token": (0, WIDEST), "reclaim": (0, WIDEST), "started": (0, WIDEST)}


def element(tag, *attributes, end="/>"):
    """The text of one element; attributes are pairs (name, value), None leaves one out."""
    return f"<{tag}" + "".join([f' {name}="{str(value).translate(_ESCAPES)}"'
                                for name, value in attributes if value is not None]) + end


def encode(verb, step, *elements, **attributes):
    """The bytes of a message of these elements; `attributes` (ours) go on `msg` itself."""
    ours = element("", *attributes.items(), end="")[1:]
    text = f'{HEADER}<msg level="3" verb="{verb}" step="{step}"{ours}>{"".join(elements)}</msg>'
    return text.encode("ascii")


def decode(data):
    """The elements of a message, {tag: {attribute: value}}, numbers as int, or ProtocolError."""
    elements, inside = {}, []
    for closing, tag, attributes, empty in tags(data):
        if closing:
            if attributes or empty or not inside or inside.pop() != tag:
                raise ProtocolError(f"misplaced </{tag}>")
            continue
        if tag in elements or (tag == "msg") == bool(inside):
            raise ProtocolError(f"misplaced <{tag}>")
        if tag in _ELEMENTS:
            elements[tag] = attributes
        elif attributes:
            raise ProtocolError(f"unknown element <{tag}> with attributes")
        if not empty:
            inside.append(tag)
        for name in _NUMBERS.keys() & attributes.keys():
            value, (least, greatest) = attributes[name], _NUMBERS[name]
            if not _whole(value) or not least <= int(value) <= greatest:
                raise ProtocolError(f"{name}={value[:40]!r}, not from {least} to {greatest}")
            attributes[name] = int(value)
    if inside or not {"verb", "step"} <= elements.get("msg", {}).keys():
        raise ProtocolError("not a whole message")
    return elements


def tags(data):
    """Yields (closing, name, {attribute: text}, empty) for each tag; raises ProtocolError."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ProtocolError("not UTF-8")
    position = _start(text).end()
    while position < len(text):
        found = _tag(text, position)
        if not found:
            raise ProtocolError(f"unreadable: {text[position:position + 20]!r}")
        closing, name, inner, empty = found.groups()
        pairs = _pairs(inner) if inner else ()
        unescape = functools.partial(_entity.sub, _character) if "&" in inner else str
        attributes = {key: unescape(one or other) for key, one, other in pairs}
        if len(attributes) < len(pairs):
            raise ProtocolError(f"<{name}> repeats an attribute")
        yield closing, name, attributes, empty
        position = found.end()


def _character(found):
    decimal, hexadecimal, name = found.groups()
    code = int(decimal or hexadecimal or "0", 10 if decimal else 16)
    if not name and (not 0 < code < 0x110000 or 0xD800 <= code < 0xE000):
        raise ProtocolError(f"unknown entity {found.group()}")
    return _ENTITIES[name] if name else chr(code)


def encode_name(name):
    """A resource name in base64; bytes that are not UTF-8 travel as they came (surrogateescape)."""
    return binascii.b2a_base64(name.encode("utf-8", "surrogateescape"), newline=False).decode()


def decode_name(text):
    """The name whose base64 is `text`; raises ProtocolError."""
    if len(text) % 4 or not re.fullmatch("[A-Za-z0-9+/]*={0,2}", text):
        raise ProtocolError(f"{text[:40]!r} is no base64")
    return binascii.a2b_base64(text).decode("utf-8", "surrogateescape")


# The kinds of resource, told apart by name (the whole name, where FLoM looks at each line).
_WORD = "[A-Za-z][A-Za-z0-9]*"
_kind = re.compile(
    rf"(?P<simple>_RESOURCE|{_WORD})|(?P<numeric>{_WORD}\[[0-9]+\])|(?P<set>{_WORD}(?:\.{_WORD})+)|"
    rf"(?P<hierarchical>(?:/[^/\\\n]+)+)|(?P<sequence>_[sS]_{_WORD}\[[0-9]+\])|"
    r"(?P<timestamp>_t_[%#A-Za-z][%#.:A-Za-z0-9]*\[[0-9]+\])").fullmatch


def kind_of(name):
    """The kind of the resource `name`, None when it is no resource name."""
    kind = _kind(name) and _kind(name).lastgroup
    if kind in ("numeric", "sequence", "timestamp"):  # [0] is the name of a numeric one, of no use
        return kind if len(name) < 400 and (kind != "numeric") <= size_of(name) <= MOST else None
    return kind


def size_of(name):
    """The number in the brackets of a numeric, sequence or timestamp name."""
    return int(name[name.rindex("[") + 1:-1])


def _number(least, greatest, meaning=int):
    def convert(value):
        result = meaning(int(value, 16 if "x" in value.lower() else 10))
        return result if least <= result <= greatest else None
    return "[+-]?[0-9]{1,20}|0[xX][0-9a-fA-F]{1,16}", convert, f"one of {least} to {greatest}"


# The types of settings: the form of the text, what it means (None: it is wrong), what is allowed.
_NAMES = [name.upper() for name in MODES + LONG_MODES]
_SIGNALS = {word: int(s) for s in signal.Signals for word in (s.name, s.name[3:], str(int(s)))}
TYPES = {
    "text": (".+", str, "a text that is not empty"),
    "flag": ("(?i)yes|y|true|1|on|no|n|false|0|off",
             lambda value: value.lower() in ("yes", "y", "true", "1", "on"),
             "yes or no (y n true false 1 0 on off)"),
    "name": (".+", lambda name: name if kind_of(name) and name != DEFAULT_RESOURCE else None,
             f"NAME NAME[N] A.B.C /A/B _s_NAME[N] _S_NAME[N] _t_FORMAT[N], N from 1 to {MOST},"),
    "mode": ("(?i)" + "|".join(_NAMES), lambda value: _NAMES.index(value.upper()) % len(MODES),
             "one of " + " ".join(MODES + LONG_MODES)),
    "socket": (".+", lambda value: os.path.abspath(value) if len(
        os.fsencode(os.path.abspath(value))) < 108 else None, "a path of at most 107 bytes"),
    "signal": (".+", lambda value: _SIGNALS.get(value.upper()), "what --signal-list lists"),
    "octal": ("0?[0-7]{3}", lambda value: int(value, 8), "an octal mode such as 0600"),
    "policy": ("fair|first-fit", str, "fair or first-fit"),
    "loss": ("warn|term|ignore", str, "warn, term or ignore"),
    "deadlock": ("fail|wait", str, "fail or wait"), "any": _number(-MOST, MOST),
    "ms": _number(0, MOST), "size": _number(0, MOST, abs), "port": _number(1, 65535),
    "count": _number(1, MOST, lambda value: abs(value) or 1), "hops": _number(0, 255),
    "units": _number(1, MOST, lambda value: value or 1), "s": _number(1, 32767),
    "probes": _number(1, 127), "status": _number(0, 255)}

# One row for each setting, in the order of -V.  Users: c, options of flom.py; d, options of
# flomd.py, handed on to a daemon that flom.py starts.
Setting = collections.namedtuple("Setting", "group key short long type default users help")
SETTINGS = [Setting(*path.split("/"), *(" " + options).split(" ")[-2:], *rest)
            for path, options, *rest in (
    ("Trace/DaemonTraceFile", "t daemon-trace-file", "text", None, "cd", "log of the daemon"),
    ("Trace/CommandTraceFile", "T command-trace-file", "text", None, "c", "log of this command"),
    ("Trace/AppendTraceFile", "append-trace-file", "flag", False, "cd", "append to the logs"),
    ("Trace/Verbose", "V verbose", "flag", False, "cd", "print settings and events"),
    ("Resource/Name", "r resource-name", "name", DEFAULT_RESOURCE, "c", "what to lock"),
    ("Resource/Timeout", "o resource-timeout", "any", -1, "c", "ms to wait; 0: none, -1: for ever"),
    ("Resource/Quantity", "q resource-quantity", "units", 1, "c", "units of a numeric resource"),
    ("Resource/LockMode", "l lock-mode", "mode", 5, "c", "NL CR CW PR PW EX"),
    ("Resource/Create", "e resource-create", "flag", True, "c", "create the resource"),
    ("Resource/IdleLifespan", "i resource-idle-lifespan", "size", 0, "c", "ms to outlive users"),
    ("Daemon/SocketName", "s socket-name", "socket", None, "cd", "UNIX socket of the daemon"),
    ("Daemon/Lifespan", "d daemon-lifespan", "any", 5000, "cd", "ms unused; -1: ever, 0: no start"),
    ("Daemon/UnicastAddress", "a unicast-address", "text", None, "cd", "of the daemon; or several"),
    ("Daemon/UnicastPort", "p unicast-port", "port", 28015, "cd", "TCP port of the daemon"),
    ("Daemon/MulticastAddress", "A multicast-address", "text", None, "cd", "group of the daemon"),
    ("Daemon/MulticastPort", "P multicast-port", "port", 28015, "cd", "UDP port of the group"),
    ("Daemon/MountPointVFS", "m mount-point-vfs", "text", None, "cd", "where its state is shown"),
    ("Monitor/IgnoredSignals", "ignore-signal", "signal", (), "c", "signal to ignore; repeatable"),
    ("Network/NetworkInterface", "n network-interface", "text", None, "cd", "for multicast"),
    ("Network/DiscoveryAttempts", "D discovery-attempts", "count", 2, "cd", "number of questions"),
    ("Network/DiscoveryTimeout", "I discovery-timeout", "size", 500, "cd", "ms for an answer"),
    ("Network/DiscoveryTTL", "discovery-ttl", "hops", 1, "cd", "hops that questions go"),
    ("Network/TcpKeepaliveTime", "tcp-keepalive-time", "s", 60, "cd", "s to the first probe"),
    ("Network/TcpKeepaliveIntvl", "tcp-keepalive-intvl", "s", 10, "cd", "s between probes"),
    ("Network/TcpKeepaliveProbes", "tcp-keepalive-probes", "probes", 6, "cd", "probes in vain"),
    ("TLS/TlsCertificate", "tls-certificate", "text", None, "cd", "PEM file of the certificate"),
    ("TLS/TlsPrivateKey", "tls-private-key", "text", None, "cd", "PEM file of its key"),
    ("TLS/TlsCaCertificate", "tls-ca-certificate", "text", None, "cd", "PEM file of the CA"),
    ("TLS/TlsCheckPeerId", "tls-check-peer-id", "flag", False, "cd", "peer's CN is its id"),
    ("Daemon/SocketMode", "socket-mode", "octal", None, "d", "mode of the UNIX socket"),
    ("Daemon/Policy", "policy", "policy", "fair", "cd", "fair or first-fit"),
    ("Daemon/RecoveryWindow", "recovery-window", "ms", None, "cd", "ms for former holders"),
    ("Daemon/StateDir", "state-dir", "text", None, "cd", "where it keeps its state"),
    ("Daemon/AllowRemoteShutdown", "allow-remote-shutdown", "flag", False, "cd", "obey any host"),
    ("Monitor/OnLockLoss", "on-lock-loss", "loss", "warn", "c", "warn, term or ignore"),
    ("Monitor/KillAfter", "kill-after", "ms", 5000, "c", "ms from TERM to KILL"),
    ("Monitor/Deadlock", "deadlock", "deadlock", "fail", "c", "fail or wait"),
    ("Monitor/SetEnv", "set-env", "flag", True, "c", "export FLOM_RESOURCE and others"),
    ("Monitor/ElementArgument", "element-argument", "flag", True, "c", "append it to COMMAND"),
    ("Monitor/InheritConnection", "inherit-connection", "flag", True, "c", "for the command"),
    ("Monitor/MinHold", "min-hold", "ms", 0, "c", "ms to keep the lock at least"),
    ("Monitor/BusyStatus", "busy-status", "status", 98, "c", "status for busy and timeout"),)]


class Settings:
    """The settings by key, each with its origin; one that nobody has set has its default."""

    def __init__(self, **defaults):
        self.values, self.origins, self.warnings = {}, {}, []
        self.defaults = dict({setting.key: setting.default for setting in SETTINGS}, **defaults)

    def __getitem__(self, key):
        return self.values.get(key, self.defaults[key])

    def set(self, setting, texts, origin):
        """Sets from texts (the last counts, all for a list); raises UsageError: origin and text."""
        pattern, meaning, allowed = TYPES[setting.type]
        values = [meaning(text) if re.fullmatch(pattern, text, re.ASCII | re.DOTALL) else None
                  for text in texts]
        if None in values:
            raise UsageError(f"{origin}: {texts[values.index(None)]!r}: {allowed} is allowed")
        self.values[setting.key] = tuple(values) if setting.default == () else values[-1]
        self.origins[setting.key] = origin

    def read_file(self, path, required=False):
        """Takes over a file (FLoM's key file syntax; empty values are none); raises UsageError."""
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                lines = file.read().split("\n")
        except OSError as error:
            if required or error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise UsageError(f"{path}: {error.strerror}")
            return
        group, known = None, {(setting.group, setting.key): setting for setting in SETTINGS}
        for place, line in enumerate(lines, 1):
            found = re.fullmatch(r"\[(.+)\]|([^=#]+?)\s*=\s*(.*)|#.*|", line.strip())
            if not found:
                raise UsageError(f"{path}:{place}: {line!r}: [Group] or Key=value is allowed")
            group, key = found.group(1) or group, found.group(2)
            origin = f"{path}:{place}: [{group}]/{key}"
            if (group, key) in known and found.group(3):
                self._set_line(known[group, key], found.group(3), origin, os.path.dirname(path))
            elif key and (group, key) not in known:
                self.warnings.append(f"{origin}: unknown key, ignored")

    def _set_line(self, setting, text, origin, folder):
        parts = [part for part in text.split(";") if part] if setting.default == () else [text]
        texts = [re.sub(r"\\([sntr\\])", lambda found: " \n\t\r\\"["sntr\\".index(found.group(1))],
                        part) for part in parts]
        if setting.key.startswith("Tls") and os.path.exists(os.path.join(folder, text)):
            texts = [os.path.join(folder, text)]
        self.set(setting, texts, origin)

    def lines(self):
        """The settings as -V prints them."""
        for setting in SETTINGS:
            value = self[setting.key]
            if setting.default == ():
                value = ";".join(signal.Signals(number).name for number in sorted(value))
            shown = f"{value:d}" if isinstance(value, int) else f"'{value or ''}'"
            yield f"[{setting.group}]/{setting.key}={shown}"


def machine_id():
    """The id of this host, 32 hex digits; where it has none, one derived from its name."""
    for path in ("/var/lib/dbus/machine-id", "/etc/machine-id"):
        with contextlib.suppress(OSError, ValueError), open(path) as file:
            return f"{int(file.read(), 16):032x}"
    import hashlib
    return hashlib.sha256(os.fsencode(os.uname().nodename)).hexdigest()[:32]


def show_address(address):
    """HOST:PORT or [HOST]:PORT of the address of a TCP or UDP socket."""
    host = socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"


def tune(connection, idle, interval, probes):
    """Sets TCP_NODELAY and keepalive (s, s, probes), as far as the platform has them."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_NODELAY", 1), ("TCP_KEEPIDLE", idle), ("TCP_KEEPINTVL", interval),
                        ("TCP_KEEPCNT", probes)):
        with contextlib.suppress(AttributeError, OSError):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
# ==== Shared with flom.py: end ====


# --- Errors -------------------------------------------------------------------------------------


class CannotServe(Exception):
    """The daemon cannot serve: one line on stderr, status 1."""


class SteppedBack(Exception):
    """Another daemon serves the group: status 3, nothing on stderr."""


@contextlib.contextmanager
def serving(failure, *opened):
    """When the system refuses something, closes what is open and raises CannotServe."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        for part in opened:
            part.close()
        raise CannotServe(f"{failure}: {getattr(error, 'strerror', error)}")


# --- Lock engine --------------------------------------------------------------------------------
# Requests, resources and the queue policy.  Pure: no socket, no clock, no log.  Every call is given
# `now`, an object with mono (s, monotonic), wall (s since 1970), local() (µs of local time) and
# format(text) (strftime of that moment), and what follows comes back as decisions.
#
# The queue policy.  A request is compatible with another when the two could be held together.
# Under `fair` a request is granted when it is compatible with every holder and with every waiter
# ahead of it, so whoever waits is overtaken only by those that cannot delay it, and nobody starves.
# Under `first-fit`, FLoM's rule, the waiters ahead do not count.
#
# To grant without looking at every waiter, the waiters of a resource stand in lanes: all requests
# of a lane are alike (the same mode; in a tree the same node, too), so if the first of a lane
# cannot be granted none of it can.  Taking the lanes by the arrival of their first waiter, and each
# lane until its first waiter must stay, visits exactly the waiters that are granted and one more
# for each lane.  A waiter that stays because of one ahead remembers it: it stays as long as that.
#
# One exception: a request does not wait for a waiter that itself waits, directly or not, for an
# ancestor of the request, that is for a command that will not end before the request is granted.
# Those nested requests are few; they are looked at one by one.

NEW, PARKED, DEFERRED, QUEUED, HELD = "new", "parked", "deferred", "queued", "held"
CONFLICTS = ((), (5,), (3, 4, 5), (2, 4, 5), (2, 3, 4, 5), (1, 2, 3, 4, 5))  # by mode
DEEPEST = 255  # levels of a hierarchical name; FLoM's messages have room for some 120
LEAST_LIFESPAN = 2000  # ms that an idle resource stays at least; commands in a row rely on it

Decision = collections.namedtuple("Decision", "session verdict element token position reason")
Decision.__new__.__defaults__ = (None,) * 4


class Request:
    """What a session asks for: a waiter while it is queued, a holder once it is granted."""
    ident = None  # of the client's lock, for nested requests and reclaims
    parents = ()  # ids of the locks it is nested in
    patient = False  # it ends by itself, or its user says so: never a deadlock
    reclaim = element = None  # the token and the element of a lock that the session says it has
    key = path = resource = None  # name of the resource, node in a tree, the resource itself
    token = behind = None  # behind: the waiter found to be in its way
    serial = since = held_since = 0  # order of arrival; s since 1970 of arrival and of the grant

    def __init__(self, session, name, mode=0, quantity=1, wait=0, create=0, lifespan=0):
        self.session, self.name, self.mode, self.quantity = session, name, mode, quantity
        self.wait, self.create, self.lifespan = wait, create, lifespan  # lifespan in ms
        self.state = NEW

    def copy(self):
        """Another request of the same session, in no place yet."""
        other = copy.copy(self)
        other.behind, other.state = None, NEW
        return other

    def same(self, other):
        """Whether `other` repeats this request."""
        return (self.name, self.mode, self.quantity) == (other.name, other.mode, other.quantity)


class Resource:
    """A resource: its holders, its waiters and the policy.  A kind is a class below this one."""
    has_modes = False

    def __init__(self, name, first_fit):
        self.name, self.first_fit = name, first_fit
        self.holders = {}  # session: Request
        self.lanes = {}  # lane: OrderedDict of session: Request, in order of arrival
        self.waiting = 0
        self.nested = {}  # (lane, quantity): {session: waiter}, the waiters with living ancestors
        self.lifespan = LEAST_LIFESPAN  # ms
        self.idle_since, self.dates = None, []  # dates: its entries in the table's heap
        self.last_tokens = [0] * len(MODES)  # of the last grant in each mode

    # What a kind says.

    @classmethod
    def refusal(cls, name):
        """The verdict on every request for this name, None when the resource can do its work."""
        return None

    def possible(self, request):
        """Whether the request can be granted at all, ever."""
        return True

    def has_room(self, request):
        """Whether the request is compatible with the holders."""
        raise NotImplementedError

    def fits(self, request, now):
        """Whether the request has room, and its time has come."""
        return self.has_room(request)

    def take(self, request, now):
        """Books the request and returns its element, or None; a reclaim brings its element."""
        raise NotImplementedError

    def give_back(self, request, committed):
        """Undoes take(); committed: the command of a transactional sequence succeeded."""
        raise NotImplementedError

    def lane(self, request):
        """The lane of the request: waiters of one lane are alike."""
        return None

    def rivals(self, request):
        """The lanes whose waiters are incompatible with the request."""
        return self.lanes

    def near(self, request):
        """The lanes that may move when the request is gone."""
        return self.lanes

    def clash(self, one, other):
        """Whether the two requests are incompatible."""
        return True

    def opponents(self, request):
        """The holders that the request waits for."""
        return [] if self.has_room(request) else [
            holder for holder in self.holders.values() if self.clash(request, holder)]

    def retry_at(self, now):
        """The time (monotonic) at which a waiter may fit without any release, or None."""
        return None

    def remember(self, request):
        """Notes a grant for those who reclaim."""
        mode = request.mode
        self.last_tokens[mode] = max(self.last_tokens[mode], request.token)

    def reclaimable(self, request):
        """Whether no grant since the token of the reclaim can have conflicted with it."""
        modes = CONFLICTS[request.mode] if self.has_modes else range(len(MODES))
        return all(self.last_tokens[mode] <= request.reclaim for mode in modes)

    def could_have(self, request):
        """Whether the element of a reclaim is one of this resource."""
        return True

    @property
    def stand_in(self):
        """The kind that behaves like this one, the clock left aside."""
        return type(self)

    # The policy.

    def admits(self, request, now):
        """Whether the policy grants the request now (nested requests aside)."""
        return self.fits(request, now) and (
            not self.waiting or self.first_fit or not self.is_behind(request))

    def is_behind(self, request):
        """Whether an incompatible waiter is ahead of the request."""
        if request.behind is not None and request.behind.state is QUEUED:
            return True
        for lane in self.rivals(request):
            queue = self.lanes.get(lane)
            if queue:
                first = next(iter(queue.values()))
                if first.serial < request.serial:
                    request.behind = first
                    return True
        return False

    def ahead(self, request):
        """The lanes with waiters ahead of the request that it must wait for under the policy."""
        if self.first_fit:
            return []
        lanes = [(next(iter(queue.values())), queue) for queue in self.lanes.values()]
        return [queue for first, queue in lanes
                if first.serial < request.serial and self.clash(request, first)]

    def enqueue(self, request):
        lane = self.lane(request)
        if lane not in self.lanes:
            self.lanes[lane] = collections.OrderedDict()
        self.lanes[lane][request.session] = request
        self.waiting += 1
        request.resource, request.state = self, QUEUED

    def dequeue(self, request):
        lane = self.lane(request)
        del self.lanes[lane][request.session]
        if not self.lanes[lane]:
            del self.lanes[lane]
        self.waiting -= 1
        request.state, request.behind = NEW, None
        alike = self.nested.get((lane, request.quantity)) if self.nested else None
        if alike and alike.pop(request.session, None) and not alike:
            del self.nested[lane, request.quantity]

    def nest(self, request):
        """Notes that the waiter has living ancestors."""
        alike = self.nested.setdefault((self.lane(request), request.quantity), {})
        alike[request.session] = request

    def hold(self, request, now):
        """Makes the request a holder."""
        request.element = self.take(request, now)
        request.resource, request.state, request.held_since = self, HELD, now.wall
        self.holders[request.session] = request

    def walk(self, lanes, now):
        """Makes holders, in queue order, of all waiters in `lanes` that the policy grants, and
        yields them."""
        heads = [(next(iter(self.lanes[lane].values())).serial, lane)
                 for lane in lanes if lane in self.lanes]
        heapq.heapify(heads)
        while heads:
            lane = heapq.heappop(heads)[1]
            request = next(iter(self.lanes[lane].values()))
            if self.admits(request, now):
                self.dequeue(request)
                self.hold(request, now)
                yield request
                if lane in self.lanes:
                    heapq.heappush(heads, (next(iter(self.lanes[lane].values())).serial, lane))

    def waiters(self):
        """All waiters in order of arrival."""
        return sorted((request for queue in self.lanes.values() for request in queue.values()),
                      key=operator.attrgetter("serial"))


# --- Kinds --------------------------------------------------------------------------------------
# A kind says what fits, what a grant takes and what a release gives back; nothing about queues.


class Simple(Resource):
    """Locked as a whole, in one of six modes."""
    has_modes = True

    def __init__(self, name, first_fit):
        super().__init__(name, first_fit)
        self.held = [0] * len(MODES)  # holders by mode

    def has_room(self, request):
        held = self.held
        for mode in CONFLICTS[request.mode]:
            if held[mode]:
                return False
        return True

    def take(self, request, now):
        self.held[request.mode] += 1

    def give_back(self, request, committed):
        self.held[request.mode] -= 1

    def lane(self, request):
        return request.mode

    def rivals(self, request):
        return CONFLICTS[request.mode]

    def clash(self, one, other):
        return other.mode in CONFLICTS[one.mode]


class Numeric(Resource):
    """A pool of units, of which a request takes some."""

    def __init__(self, name, first_fit):
        super().__init__(name, first_fit)
        self.free = self.units = size_of(name)

    @classmethod
    def refusal(cls, name):
        return None if size_of(name) else IMPOSSIBLE

    def possible(self, request):
        return request.quantity <= self.units

    def has_room(self, request):
        return request.quantity <= self.free

    def take(self, request, now):
        self.free -= request.quantity

    def give_back(self, request, committed):
        self.free += request.quantity

    def lane(self, request):
        return request.quantity if self.first_fit else None

    def near(self, request):
        """Under first-fit, those for whom the units of the request were the last to be missing."""
        if not self.first_fit:
            return self.lanes
        missing = range(self.free - request.quantity + 1, self.free + 1)
        if len(missing) < len(self.lanes):
            return [quantity for quantity in missing if quantity in self.lanes]
        return [quantity for quantity in self.lanes if quantity in missing]


class Set(Resource):
    """Slots with labels; each grant takes one, the search beginning one further each time."""

    def __init__(self, name, first_fit):
        super().__init__(name, first_fit)
        self.labels = name.split(".")
        self.free = [True] * len(self.labels)
        self.slots = {}  # session: index of its slot
        self.next = 0

    def _slot(self, request):
        count = len(self.labels)
        for index in (range(self.next, self.next + count)):
            if self.free[index % count] and request.element in (None, self.labels[index % count]):
                return index % count
        return None

    def has_room(self, request):
        return self._slot(request) is not None

    def take(self, request, now):
        slot = self._slot(request)
        if request.reclaim is None:
            self.next = (self.next + 1) % len(self.labels)
        self.free[slot] = False
        self.slots[request.session] = slot
        return self.labels[slot]

    def give_back(self, request, committed):
        self.free[self.slots.pop(request.session)] = True


class Node:
    """A node of a tree that holders or waiters stand on or below: their numbers by mode."""
    __slots__ = ("path", "children", "awaited", "held", "held_below", "queued", "queued_below")

    def __init__(self, path):
        self.path, self.children = path, {}
        self.awaited = {}  # those of the children that waiters stand on or below
        self.held, self.held_below = [0] * len(MODES), [0] * len(MODES)
        self.queued, self.queued_below = [0] * len(MODES), [0] * len(MODES)

    def empty(self):
        return not (self.children or any(self.held) or any(self.queued))


class Hierarchical(Resource):
    """A tree: a request must be compatible with those on its node, above it and below it.  Every
    node counts what is held and queued on it and below it, so a request is checked by walking down
    its path.  The last grants are remembered with their nodes: a reclaim that is older than those
    is refused if there was any grant since, be it on another branch."""
    has_modes = True
    REMEMBERED = 100  # grants

    def __init__(self, name, first_fit):
        super().__init__(name, first_fit)
        self.root = Node(())
        self.recent = collections.deque(maxlen=self.REMEMBERED)  # (token, path, mode)

    @classmethod
    def refusal(cls, name):
        return None if name.count("/") <= DEEPEST else INVALID_NAME

    @staticmethod
    def _path(request):
        if request.path is None:
            request.path = tuple(request.name.split("/")[2:])
        return request.path

    def _nodes(self, path):
        """Yields the nodes from the root to `path`, as far as they exist."""
        node = self.root
        yield node
        for level in path:
            node = node.children.get(level)
            if node is None:
                return
            yield node

    def _count(self, request, at, below, difference):
        """Adds to the numbers of the request's node (`at`) and of those above it (`below`)."""
        path, mode, node = self._path(request), request.mode, self.root
        nodes = [node]
        for depth, level in enumerate(path, 1):
            getattr(node, below)[mode] += difference
            if level not in node.children:
                node.children[level] = Node(path[:depth])
            node = node.children[level]
            nodes.append(node)
        getattr(node, at)[mode] += difference
        if at == "queued":
            for above, node in zip(nodes, nodes[1:]):
                if any(node.queued) or any(node.queued_below):
                    above.awaited[node.path[-1]] = node
                else:
                    above.awaited.pop(node.path[-1], None)
        while len(nodes) > 1 and nodes[-1].empty():
            del nodes[-2].children[nodes.pop().path[-1]]

    def has_room(self, request):
        path, conflicts, node = self._path(request), CONFLICTS[request.mode], None
        depth = -1
        for depth, node in enumerate(self._nodes(path)):
            if any(node.held[mode] for mode in conflicts):
                return False
        return depth < len(path) or not any(node.held_below[mode] for mode in conflicts)

    def take(self, request, now):
        self._count(request, "held", "held_below", 1)

    def give_back(self, request, committed):
        self._count(request, "held", "held_below", -1)

    def enqueue(self, request):
        super().enqueue(request)
        self._count(request, "queued", "queued_below", 1)

    def dequeue(self, request):
        super().dequeue(request)
        self._count(request, "queued", "queued_below", -1)

    def lane(self, request):
        return self._path(request), request.mode

    def _lanes(self, request, modes):
        """Yields the lanes of these modes on the request's node, above it and below it."""
        path, node, depth = self._path(request), None, -1
        for depth, node in enumerate(self._nodes(path)):
            yield from ((node.path, mode) for mode in modes if node.queued[mode])
        below = list(node.awaited.values()) if depth == len(path) else []
        while below:
            node = below.pop()
            yield from ((node.path, mode) for mode in modes if node.queued[mode])
            if any(node.queued_below[mode] for mode in modes):
                below.extend(node.awaited.values())

    def rivals(self, request):
        return self._lanes(request, CONFLICTS[request.mode])

    def near(self, request):
        return list(self._lanes(request, CONFLICTS[request.mode]))

    def clash(self, one, other):
        return self._clash(one, self._path(other), other.mode)

    def _clash(self, request, path, mode):
        shorter = min(len(self._path(request)), len(path))
        return mode in CONFLICTS[request.mode] and request.path[:shorter] == path[:shorter]

    def remember(self, request):
        super().remember(request)
        self.recent.append((request.token, self._path(request), request.mode))

    def reclaimable(self, request):
        if len(self.recent) == self.REMEMBERED and self.recent[0][0] > request.reclaim:
            return super().reclaimable(request)
        return not any(token > request.reclaim and self._clash(request, path, mode)
                       for token, path, mode in self.recent)


class Pool(Resource):
    """Places for a number of holders: what sequences and timestamps have in common."""

    def __init__(self, name, first_fit):
        super().__init__(name, first_fit)
        self.places = size_of(name)

    def has_room(self, request):
        return len(self.holders) < self.places

    def take(self, request, now):
        return request.element

    def give_back(self, request, committed):
        pass


class Sequence(Pool):
    """Each grant carries the next value; a transactional one gets back what was not committed."""
    GREATEST = 2 ** 32 - 1

    def __init__(self, name, first_fit):
        super().__init__(name, first_fit)
        self.transactional = name.startswith("_S_")
        self.returned = collections.deque()
        self.next = 1

    def take(self, request, now):
        if request.reclaim is not None:
            self.next = max(self.next, int(request.element) % self.GREATEST + 1)
            if request.element in self.returned:
                self.returned.remove(request.element)
            return request.element
        if self.returned:
            return self.returned.popleft()
        value, self.next = self.next, self.next % self.GREATEST + 1
        return str(value)

    def give_back(self, request, committed):
        if self.transactional and not committed:
            self.returned.append(request.element)

    def could_have(self, request):
        value = request.element or ""
        return (bool(re.fullmatch("[1-9][0-9]{0,9}", value)) and int(value) <= self.GREATEST
                and all(holder.element != value for holder in self.holders.values()))


class Timestamp(Pool):
    """Each grant carries a time of its own, so it may have to wait for the clock."""
    RESOLUTIONS = (("#ffffff", 1), ("#fffff", 10), ("#ffff", 100), ("#fff", 1000), ("#ff", 10 ** 4),
                   ("#f", 10 ** 5), ("%c %r %s %S %T %X", 10 ** 6), ("%M %R", 60 * 10 ** 6),
                   ("%H %I", 3600 * 10 ** 6))  # what the format contains: length in µs

    def __init__(self, name, first_fit):
        super().__init__(name, first_fit)
        self.format = name[len("_t_"):name.rindex("[")]
        self.resolution = self._resolution(name)
        self.last = None  # the interval of the last grant

    @classmethod
    def _resolution(cls, name):
        return next((length for tokens, length in cls.RESOLUTIONS
                     if any(token in name for token in tokens.split())), None)

    @classmethod
    def refusal(cls, name):
        """A format in which two grants could not be told apart is refused."""
        return None if cls._resolution(name) else INVALID_NAME

    stand_in = Pool

    def could_have(self, request):
        return request.element is not None and bool(re.fullmatch("[ -~]+", request.element))

    def fits(self, request, now):
        return self.has_room(request) and (
            self.last is None or request.reclaim is not None
            or now.local() // self.resolution > self.last)

    def take(self, request, now):
        self.last = max(now.local() // self.resolution, self.last or 0)
        if request.reclaim is not None:
            return request.element
        text, micros = self.format, f"{now.local() % 10 ** 6:06d}"
        for digits in range(6, 0, -1):
            text = text.replace("#" + "f" * digits, "." + micros[:digits])
        return now.format(text)

    def retry_at(self, now):
        """The start of the next interval, but a second from now at the latest: clocks are set."""
        if not self.waiting or self.last is None or len(self.holders) >= self.places:
            return None
        wanted = (self.last + 1) * self.resolution - now.local()  # µs
        return now.mono + min(max(wanted / 10 ** 6, 0), 1)


KINDS = {"simple": Simple, "numeric": Numeric, "set": Set, "hierarchical": Hierarchical,
         "sequence": Sequence, "timestamp": Timestamp}


# --- Lock table ---------------------------------------------------------------------------------
# All resources and all requests: creation, parked requests, idle life, reclaims, deadlocks.  Pure,
# as the engine is.  A session has at most one request; it is in `requests` from its first answer
# until it has been refused, released or is gone.
#
# Times: a resource that is idle, or whose waiters wait for the clock, has one entry in the heap
# `_due` (perhaps an early one: when it comes up the resource is asked again).
#
# The recovery window.  A daemon that follows one that ended under its holders grants reclaims
# alone for a while.  Others queue; one that would not wait is deferred, since neither "granted" nor
# "busy" would be true yet.
#
# Deadlock.  A command under a lock that asks for another one keeps the first until it is granted
# the second.  Whether a nested request can ever be granted is found by reduction: in a copy of the
# part of the table that matters, every holder ends that has no queued request below it, what can
# be granted then is granted, and so on.  If the request is never granted it is refused.  A mere
# cycle would not do: of two holders of a pool one may be free to end.

DEFER = 5  # s that a request without wait may be deferred
DAY = 86400 << 32  # a day in tokens
EPOCH = 1577836800  # tokens count seconds from 2020-01-01 UTC in their upper half


class LockTable:
    """Requests, releases and disconnects in, lists of decisions out."""

    def __init__(self, first_fit=False, epoch=0, window_until=None, most_waiters=None):
        self.first_fit, self.most_waiters = first_fit, most_waiters
        self.resources = {}  # name, of a tree that of its first level: Resource
        self.requests = {}  # session: Request
        self.parked = {}  # name: OrderedDict of session: Request
        self.deferred = collections.OrderedDict()  # session: time (monotonic)
        self.window_until = window_until  # monotonic time at which the recovery window ends
        self.holding = self.waiting = 0
        self.last_token = epoch << 32
        self._by_id = {}  # id: the holder with it
        self._below = {}  # id: {waiter: None}, the waiters nested in the lock with it
        self._new_ways = False  # some may wait for others that they did not wait for before
        self._due = []
        self._serial = 0

    # What comes in.

    def request(self, request, now):
        """A session asks; it gets one decision, others may get more (those woken by it)."""
        decisions, before = [], self.requests.get(request.session)
        if before is not None:
            repeated = self._repeated(before, request)
            if repeated is not None:
                return [repeated]
            decisions = self._forget(before, now)
        self._serial += 1
        request.serial, request.since = self._serial, now.wall
        self.requests[request.session] = request
        return self._let_pass(decisions + self._place(request, now), now)

    def release(self, session, committed, now):
        """The holder lets go; committed: its command succeeded."""
        request = self.requests[session]
        request.resource.give_back(request, committed)
        return self._let_pass(self._forget(request, now), now)

    def gone(self, session, now):
        """The session has ended, whatever it held or waited for."""
        request = self.requests.get(session)
        if request is None:
            return []
        if request.state is HELD:
            return self.release(session, False, now)
        return self._let_pass(self._forget(request, now), now)

    def expire(self, now):
        """Does what is due at `now`."""
        decisions = []
        if self.window_until is not None and self.window_until <= now.mono:
            decisions += self._end_window(now)
        while self.deferred and next(iter(self.deferred.values())) <= now.mono:
            decisions += self._refuse(self.requests[next(iter(self.deferred))], BUSY)
        while self._due and self._due[0][0] <= now.mono:
            when, _, resource = heapq.heappop(self._due)
            resource.dates.remove(when)
            if self.resources.get(resource.name) is resource:  # or one of its name came after
                decisions += self._settle(resource, list(resource.lanes), now)
        return self._let_pass(decisions, now)

    def next_deadline(self):
        """The monotonic time at which expire() is to be called, or None."""
        due = self._due[0][0] if self._due else None
        if self.window_until is None and not self.deferred:
            return due
        times = [due, self.window_until, next(iter(self.deferred.values()), None)]
        return min(when for when in times if when is not None)

    def empty(self):
        """Whether nothing at all is left: no resource, not even an idle one, and no request."""
        return not self.resources and not self.requests

    def resource_of(self, name):
        """The resource to which a name belongs, None when there is none."""
        return self.resources.get("/" + name.split("/")[1] if name[:1] == "/" else name)

    # From the request to its place.

    @staticmethod
    def _repeated(before, request):
        """The answer to a session that asks again and keeps its place; None when it does not."""
        if before.state is not HELD and (
                before.state is DEFERRED or before.state is PARKED and request.create
                or not request.wait or not request.same(before)):
            return None
        if before.name == request.name:
            kept = before if before.state is PARKED else before.resource
            kept.lifespan = max(kept.lifespan, request.lifespan)
        if before.state is HELD:
            if ((before.name, before.mode) == (request.name, request.mode)
                    and request.quantity <= before.quantity):
                return Decision(request.session, OK, before.element, before.token)
            return Decision(request.session, BUSY)
        return Decision(request.session, WAIT_RESOURCE if before.state is PARKED else ENQUEUED)

    def _place(self, request, now):
        """Finds or makes the resource of a new request and takes it there."""
        name = request.key = request.name
        resource = self.resources.get(name)
        if resource is None:
            kind = kind_of(name)
            refusal = INVALID_NAME if kind is None else KINDS[kind].refusal(name)
            if refusal is not None:
                return self._refuse(request, refusal)
            if kind == "hierarchical":
                request.key = "/" + name.split("/", 2)[1]
                resource = self.resources.get(request.key)
        if resource is not None:
            resource.lifespan = max(resource.lifespan, request.lifespan)
            return self._admit(request, resource, now)
        if request.reclaim is not None and self.window_until is None:
            return self._refuse(request, BUSY, "nothing is known of it any more")
        if not request.create:
            return self._park(request, now)
        resource = KINDS[kind](request.key, self.first_fit)
        if not resource.possible(request):
            return self._refuse(request, IMPOSSIBLE)
        return self._create(request, resource, now)

    def _create(self, request, resource, now):
        """A new resource: its creator is the first, those that waited for it come next."""
        resource.lifespan = max(LEAST_LIFESPAN, request.lifespan)
        self.resources[request.key] = resource
        decisions = self._admit(request, resource, now)
        for other in self.parked.pop(request.key, {}).values():
            self.waiting -= 1
            self._serial += 1
            other.state, other.serial = NEW, self._serial
            resource.lifespan = max(resource.lifespan, other.lifespan)
            decisions += self._admit(other, resource, now)
        self._look_again(resource, now)
        return decisions

    def _park(self, request, now):
        """The resource does not exist and the request must not create it."""
        if not request.wait:
            if self.window_until is not None:
                return self._defer(request, now)
            return self._refuse(request, CANT_WAIT)
        if self._full():
            return self._refuse(request, LIMIT)
        request.state = PARKED
        self.waiting += 1
        self.parked.setdefault(request.key, collections.OrderedDict())[request.session] = request
        return [Decision(request.session, WAIT_RESOURCE)]

    def _admit(self, request, resource, now):
        """Grants, queues or refuses a request for a resource that exists."""
        if not resource.possible(request):
            return self._refuse(request, IMPOSSIBLE)
        if request.reclaim is not None:
            return self._reclaim(request, resource, now)
        if self.window_until is None:
            if resource.admits(request, now) or self._may_pass(request, resource, now):
                resource.hold(request, now)
                return [self._granted(request)]
            if not request.wait:
                return self._refuse(request, BUSY)
        elif not request.wait:
            return self._defer(request, now)
        if self._full():
            return self._refuse(request, LIMIT)
        self._queue(request, resource)
        if self.window_until is None and self._hopeless(request, now):
            return self._refuse(request, DEADLOCK, self._cycle(request))
        self._look_again(resource, now)
        return [Decision(request.session, ENQUEUED, position=resource.waiting)]

    def _queue(self, request, resource):
        resource.enqueue(request)
        self.waiting += 1
        for ident in request.parents:
            self._below.setdefault(ident, {})[request] = None
        ancestors = self._ancestors(request)
        if ancestors:
            resource.nest(request)
            if any(ancestor.resource.waiting for ancestor in ancestors):
                self._new_ways = True

    def _dequeued(self, request):
        self.waiting -= 1
        for ident in request.parents:
            below = self._below.get(ident, {})
            below.pop(request, None)
            if not below:
                self._below.pop(ident, None)
        return request

    def _granted(self, request, token=None):
        """Keeps the books of a new holder; `token` is that of one that had the lock before."""
        if token is None:
            self.last_token = token = self.last_token + 1
        resource = request.resource
        request.token, resource.idle_since = token, None
        resource.remember(request)
        self.holding += 1
        if request.ident and request.ident not in self._by_id:
            self._by_id[request.ident] = request
            for waiter in self._below.get(request.ident, ()):
                waiter.resource.nest(waiter)
                self._new_ways = True
        # those that waited for the clock may wait for the holders now
        self._new_ways = self._new_ways or isinstance(resource, Timestamp)
        return Decision(request.session, OK, request.element, token)

    def _full(self):
        return self.most_waiters is not None and self.waiting >= self.most_waiters

    def _defer(self, request, now):
        request.state = DEFERRED
        self.deferred[request.session] = now.mono + DEFER
        return []

    def _refuse(self, request, verdict, reason=None, now=None):
        """The final decision of a request that gets nothing; `now` if others may be behind it."""
        return [Decision(request.session, verdict, reason=reason)] + self._forget(request, now)

    # Away again.

    def _forget(self, request, now):
        """Takes the request out of wherever it stands (what a holder took is given back already);
        without `now` nobody can be waiting behind it."""
        session, state, resource = request.session, request.state, request.resource
        del self.requests[session]
        if state is HELD:
            del resource.holders[session]
            self.holding -= 1
            if self._by_id.get(request.ident) is request:
                del self._by_id[request.ident]
        elif state is QUEUED:
            resource.dequeue(request)
            self._dequeued(request)
        elif state is PARKED:
            del self.parked[request.key][session]
            if not self.parked[request.key]:
                del self.parked[request.key]
            self.waiting -= 1
        self.deferred.pop(session, None)
        request.state = NEW
        if state in (HELD, QUEUED) and now is not None:
            in_the_way = state is HELD or not self.first_fit
            return self._settle(resource, resource.near(request) if in_the_way else (), now)
        return []

    def _settle(self, resource, lanes, now):
        """Grants what can be granted in these lanes, and sees to the resource's next date."""
        granted = []
        if resource.waiting and self.window_until is None:
            granted = [self._dequeued(request) for request in resource.walk(lanes, now)]
            granted += self._passing(resource, now)
            granted.sort(key=operator.attrgetter("serial"))
        self._look_again(resource, now)
        return [self._granted(request) for request in granted]

    def _passing(self, resource, now):
        """Makes holders of the nested requests that may pass those ahead of them."""
        granted, fitting = [], []
        for alike in resource.nested.values() if not self.first_fit else ():
            if resource.fits(next(iter(alike.values())), now):
                fitting.extend(alike.values())
        for request in sorted(fitting, key=operator.attrgetter("serial")):
            if self._may_pass(request, resource, now):
                resource.dequeue(request)
                resource.hold(request, now)
                granted.append(self._dequeued(request))
        return granted

    def _let_pass(self, decisions, now):
        """Adds the nested requests that need not wait for those ahead of them any more because
        those have come to wait, somewhere else, for an ancestor."""
        while self._new_ways and self.window_until is None:
            self._new_ways = False
            for resource in {waiter.resource: None for waiter in self._all_nested()}:
                decisions += [self._granted(request) for request in self._passing(resource, now)]
        return decisions

    def _look_again(self, resource, now):
        """Destroys the resource if its idle life is over, or sets the date for the next look."""
        if resource.holders or resource.waiting:
            resource.idle_since = when = None
            if self.window_until is None:
                when = resource.retry_at(now)
        else:
            if resource.idle_since is None:
                resource.idle_since = now.mono
            when = resource.idle_since + resource.lifespan / 1000
            if when <= now.mono:
                self.resources.pop(resource.name, None)
                return
        if when is not None and when < min(resource.dates, default=when + 1):
            self._serial += 1
            resource.dates.append(when)
            heapq.heappush(self._due, (when, self._serial, resource))

    # Reclaims and the recovery window.

    def _reclaim(self, request, resource, now):
        """A session that lost its daemon, or its connection, asks for the lock that it has."""
        before = self._by_id.get(request.ident)
        if before is not None and before.token == request.reclaim and request.same(before):
            return self._take_over(request, before, now)
        if request.reclaim > (int(now.wall) - EPOCH << 32) + DAY:
            return self._refuse(request, BUSY, "its token lies in the future")
        if self.window_until is None and not resource.reclaimable(request):
            return self._refuse(request, BUSY, "it was granted to others since")
        if not resource.could_have(request) or not resource.fits(request, now):
            return self._refuse(request, BUSY, "it is held by others")
        resource.hold(request, now)
        self.last_token = max(self.last_token, request.reclaim)
        return [self._granted(request, request.reclaim)]

    def _take_over(self, request, before, now):
        """The holder comes back on a new connection before its old one was seen to have ended."""
        resource = before.resource
        resource.give_back(before, False)
        request.element = before.element
        self._forget(before, None)
        resource.hold(request, now)
        request.held_since = before.held_since
        return [self._granted(request, before.token), Decision(before.session, None)]

    def _end_window(self, now):
        self.window_until = None
        decisions = []
        for resource in list(self.resources.values()):
            if resource.waiting:
                decisions += self._settle(resource, list(resource.lanes), now)
        for request in sorted(self._all_nested(), key=operator.attrgetter("serial"), reverse=True):
            if request.state is QUEUED and self._hopeless(request, now):
                decisions += self._refuse(request, DEADLOCK, self._cycle(request), now)
        for session in list(self.deferred):
            del self.deferred[session]
            decisions += self._place(self.requests[session], now)
        return decisions

    # Nested requests and deadlock.

    def _ancestors(self, request):
        """The holders under whose commands the request was made."""
        return [self._by_id[ident] for ident in request.parents if ident in self._by_id]

    def _stuck(self, holder):
        """The waiters without which the holder's command will not end."""
        return self._below.get(holder.ident, ()) if self._by_id.get(holder.ident) is holder else ()

    def _all_nested(self):
        """All waiters that have an ancestor, each once."""
        return {waiter: None for ident, below in self._below.items() if ident in self._by_id
                for waiter in below}

    def _may_pass(self, request, resource, now):
        """Whether the request fits, and all that it would wait for wait for its ancestors."""
        ancestors = self._ancestors(request)
        # the first of a lane waits for nothing that the others of the lane do not wait for
        return bool(ancestors) and resource.fits(request, now) and all(
            self._way(next(iter(lane.values())), ancestors) for lane in resource.ahead(request))

    def _way(self, start, goals):
        """The shortest way, as a list of requests, on which `start` waits for one of `goals`: from
        a waiter to the holders and waiters in its way, from a holder to the queued requests below
        it.  Empty when there is none."""
        came_from, todo, alike = {start: None}, collections.deque([start]), {}
        while todo:
            request = todo.popleft()
            if request is not start and request in goals:
                way = []
                while request is not None:
                    way.append(request)
                    request = came_from[request]
                return way[::-1]
            if request.state is QUEUED:
                resource = request.resource
                kind = resource, resource.lane(request), request.quantity
                if alike.get(kind, 0) >= request.serial:
                    continue  # one behind it that waits for all that this one waits for was here
                alike[kind] = request.serial
                beyond = resource.opponents(request)
                for lane in resource.ahead(request):
                    beyond += reversed(list(itertools.takewhile(
                        lambda other: other.serial < request.serial, lane.values())))
            else:
                beyond = self._stuck(request)
            for other in beyond:
                if other not in came_from:
                    came_from[other] = request
                    todo.append(other)
        return []

    def _hopeless(self, request, now):
        """Whether a nested request can never be granted, as far as anybody knows."""
        ancestors = self._ancestors(request) if not request.patient else []
        around = self._around(request) if ancestors else {}
        if not any(ancestor.resource in around for ancestor in ancestors):
            return False
        copy = self._copy(around, request, now)
        for resource in list(copy.resources.values()):
            copy._settle(resource, list(resource.lanes), now)
        wanted, ending = copy.requests[request.session], list(copy.requests.values())
        while ending and wanted.state is QUEUED:
            holder = ending.pop()
            if holder.state is HELD and not copy._stuck(holder):
                for decision in copy.gone(holder.session, now):
                    granted = copy.requests[decision.session]
                    ending += [granted] + copy._ancestors(granted)
        return wanted.state is QUEUED

    def _around(self, request):
        """The resources that can matter for the request: its own, those for which commands under
        locks of these wait, and so on."""
        found, todo = {}, [request.resource]
        while todo:
            resource = todo.pop()
            if resource not in found:
                found[resource] = None
                todo.extend(waiter.resource for holder in resource.holders.values()
                            for waiter in self._stuck(holder))
        return found

    def _copy(self, resources, request, now):
        """A table of copies of the resources and of their requests, but without those that end by
        themselves."""
        copy = LockTable(self.first_fit)
        for resource in resources:
            fresh = copy.resources[resource.name] = resource.stand_in(resource.name, self.first_fit)
            for holder in resource.holders.values():
                shadow = copy.requests[holder.session] = holder.copy()
                fresh.hold(shadow, now)
                if self._by_id.get(holder.ident) is holder:
                    copy._by_id[holder.ident] = shadow
        for resource in resources:
            for waiter in resource.waiters():
                if not waiter.patient or waiter is request:
                    shadow = copy.requests[waiter.session] = waiter.copy()
                    copy._queue(shadow, copy.resources[resource.name])
        return copy

    def _cycle(self, request):
        """One line that names the resources and holders for which a hopeless request waits."""
        way = self._way(request, self._ancestors(request))
        links = [f"{holder.name} is held by {holder.session}" for holder in way
                 if holder.state is HELD]
        return (", which waits: ".join(links) + ", under which this command runs; a command in the "
                "background may use --deadlock wait")


# --- Session ------------------------------------------------------------------------------------
# One client's connection as far as the protocol goes: bytes in and calls out, decisions in and
# bytes out, without a socket.  What is not in the table of messages is out of place.
#
# A FLoM client takes every answer of step 24 but rc 1 for a grant, and knows no rc above 6: it is
# told less, and where the truth cannot be told its connection is closed.

TLS_RECORD = b"\x16"  # the first byte of a handshake, never that of a message
LONGEST = 65536  # bytes of a message; FLoM's own limits, 511 and 1023, are the client's care
FINAL = {CANT_WAIT, INVALID_NAME, DEADLOCK, LIMIT, STOPPED}  # the daemon half-closes after these


# The lock 8 and unlock 8 of a client that says what FLoM's says, in FLoM's order: read at once, for
# a fifth of the time that decode() takes.
_usual = re.compile((
    re.escape(HEADER) + '<msg level="3" verb="([12])" step="8">'
    '(?:<session peerid="([0-9A-Za-z]*)"/>)?<resource name="([0-9A-Za-z+/=]*)"'
    '(?: mode="([0-5])")?(?: wait="([01])")?(?: quantity="([1-9][0-9]{0,8})")?(?: create="([01])")?'
    '(?: lifespan="([0-9]{1,9})")?(?: rollback="([01])")? ?/></msg>').encode()).fullmatch
USUAL = ("mode", "wait", "quantity", "create", "lifespan", "rollback")


def read_message(data):
    """decode(), with the name of the resource decoded too."""
    found = _usual(data)
    if not found:
        elements = decode(data)
        if "name" in elements.get("resource", ()):
            elements["resource"]["name"] = decode_name(elements["resource"]["name"])
        return elements
    verb, peer, name, *numbers = found.groups()
    wanted = {key: int(text) for key, text in zip(USUAL, numbers) if text}
    wanted["name"] = decode_name(name.decode())
    elements = {"msg": {"level": 3, "verb": int(verb), "step": 8}, "resource": wanted}
    if peer is not None:
        elements["session"] = {"peerid": peer.decode()}
    return elements


# Clients that ask for the same resource and say no more of themselves than FLoM's send the same
# bytes again and again.  The result is not to be changed.
read_known_message = functools.lru_cache(256)(read_message)


class Session:
    """The state of one connection in terms of the protocol.  calls() yields what the client wants:
    ("lock", Request), ("unlock", committed), ("status", client), ("shutdown", immediate) or
    ("send", bytes)."""
    __slots__ = ("connection", "unread", "ours", "answered", "asked", "holds", "about", "peer_id",
                 "place", "request")

    def __init__(self, connection):
        self.connection, self.unread = connection, b""
        self.ours = self.answered = False  # a client of ours; the last lock 8 has had its answer
        self.asked = self.holds = self.request = None  # two names, and the last request
        self.about = {}  # what a client of ours says of itself
        self.peer_id = None  # of the client's host
        self.place = None  # in the queue, as the client knows it

    def __str__(self):
        """Who it is, as people see it."""
        if not self.ours:
            return self.connection.peer
        return "{}:{} '{}'".format(*(self.about.get(key, "?") for key in ("host", "pid", "cmd")))

    def calls(self, data):
        """The calls in the bytes received so far, as an iterable; raises ProtocolError, perhaps
        while it is iterated over."""
        if not self.unread and 0 < len(data) - len(END) == data.find(END) < 506:
            return [self._call(read_known_message(data))]  # the common case: just one, and short
        return self._calls(data)

    def _call(self, elements):
        head = elements["msg"]
        make_call = self._MESSAGES.get((head["verb"], head["step"]))
        if make_call is None:
            raise ProtocolError(f"message {head['verb']}/{head['step']} out of place")
        return make_call(self, elements)

    def _calls(self, data):
        data, start = self.unread + data, 0
        if data[:1] == TLS_RECORD:
            raise ProtocolError("TLS, where the daemon is configured without")
        while True:
            end = data.find(END, start) + len(END)
            whole = end >= len(END)
            if (end if whole else len(data)) - start > LONGEST:
                raise ProtocolError(f"a message of more than {LONGEST} bytes")
            if not whole:
                self.unread = data[start:]
                return
            read = read_known_message if end - start < 512 else read_message
            elements = read(data[start:end])
            start, self.unread = end, b""
            yield self._call(elements)

    def _lock(self, elements):
        wanted = elements.get("resource", {})
        if "name" not in wanted:
            raise ProtocolError("a lock without a name")
        name = wanted["name"]
        if name == STATUS_RESOURCE:
            return "status", elements.get("session", {}).get("client", "")
        self.answered, self.asked = False, name
        request = Request(self, name, wanted.get("mode", 0), wanted.get("quantity", 1),
                          wanted.get("wait", 0), wanted.get("create", 0), wanted.get("lifespan", 0))
        about = elements.get("session", {})
        self.peer_id = about.get("peerid")
        if "client" in about:
            self.ours, self.about = True, dict(about)
            request.ident = about.get("id")
            request.parents = tuple(filter(None, about.get("parent", "").split(",")[:8]))
            request.patient = wanted.get("deadlock") == "wait"
            request.reclaim = wanted.get("reclaim")
            request.element = None if request.reclaim is None else wanted.get("held")
        self.request = request
        return "lock", request

    def _unlock(self, elements):
        name = elements.get("resource", {}).get("name")
        if self.holds is None or name != self.holds:
            raise ProtocolError("an unlock of what is not held")
        self.asked = self.holds = None
        return "unlock", not elements["resource"].get("rollback", 0)

    def _management(self, elements):
        if "immediate" not in elements.get("shutdown", {}):
            raise ProtocolError("a shutdown that does not say how")
        return "shutdown", bool(elements["shutdown"]["immediate"])

    _MESSAGES = {(LOCK, 8): _lock, (UNLOCK, 8): _unlock, (MANAGEMENT, 8): _management,
                 (PING, 8): lambda self, elements: ("send", encode(PING, 16)),
                 (PING, 16): lambda self, elements: ("send", b"")}

    def answer(self, decision):
        """The bytes that tell the client of a decision, or None where it must not be told and its
        connection be closed."""
        _, verdict, granted, token, position, reason = decision
        later = self.answered
        if not self.ours and (verdict > IMPOSSIBLE or later and verdict not in (OK, ENQUEUED)):
            return None
        if verdict == OK:
            self.holds = self.asked
        self.answered = True
        if self.ours:
            answer = element("answer", ("rc", verdict), ("element", granted), ("token", token),
                             ("position", position), ("reason", reason and printable(reason)))
        elif granted is not None:
            answer = element("answer", ("rc", verdict), ("element", granted))
        else:
            answer = f'<answer rc="{verdict}"/>'
        head = self._LATER if later else self.first_to_ours if self.ours else self.first
        return f"{head}{answer}</msg>".encode("ascii")

    _LATER = encode(LOCK, 24)[:-len(END)].decode()

    @classmethod
    def introduce(cls, peer_id, daemon_id):
        """Prepares the head of the first answers: the ids of this host and of this daemon."""
        head = encode(LOCK, 16)[:-len(END)].decode()
        cls.first = head + element("session", ("peerid", peer_id))
        cls.first_to_ours = head + element("session", ("peerid", peer_id), ("daemon", daemon_id))


def printable(text):
    """What may travel in an attribute of ours: printable ASCII, at most 500 characters."""
    return re.sub("[^ -~]", "?", text)[:500]


# The status report, the answer to a lock of _STATUS.


def in_the_way(resource, request):
    """The holders that the request waits for; all, when it waits for other waiters only."""
    holders = list(resource.holders.values()) if resource else []
    return [holder for holder in holders
            if request is not None and resource.clash(request, holder)] or holders


def held_by(resource, now, request=None):
    """Who holds the resource, as far as it is in the way of the request, in one line."""
    holders = in_the_way(resource, request)
    if not holders:
        return "held by nobody"
    first = holders[0]
    seconds = int(max(0, now.wall - first.held_since))
    others = f" and {len(holders) - 1} more" if holders[1:] else ""
    return (f"held by {first.session} for "
            f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{others}")


def report(table, introduction, now):
    """Yields the pieces of the report: `introduction`, then one piece for each resource, then the
    parked requests.  Pieces are made as they are sent, so a resource may be newer than another;
    idle times are those of `now`."""
    yield introduction
    for resource in list(table.resources.values()):
        yield _resource_report(resource, now)
    for queue in list(table.parked.values()):
        for request in queue.values():
            yield element("parked", ("name", encode_name(request.name)), *_who(request))
    yield END.decode()


def _resource_report(resource, now):
    idle = -1
    if resource.idle_since is not None:
        idle = max(0, round((resource.idle_since - now.mono) * 1000 + resource.lifespan))
    return "".join([
        element("resource", ("name", encode_name(resource.name)),
                ("kind", kind_of(resource.name)), ("idle", idle), end=">"),
        *(element("holder", *_who(request), ("token", request.token))
          for request in resource.holders.values()),
        *(element("waiter", *_who(request), ("position", position))
          for position, request in enumerate(resource.waiters(), 1)), "</resource>"])


def _who(request):
    """The attributes that a holder, a waiter and a parked request have in common."""
    about, kind = request.session.about, kind_of(request.name)
    told = [("id", request.ident), ("peer", request.session.connection.peer),
            *((name, about.get(name)) for name in ("host", "pid", "user", "cmd")),
            ("element", request.element)]
    return (*((name, text and printable(text)) for name, text in told),
            ("mode", request.mode if kind in ("simple", "hierarchical") else None),
            ("quantity", request.quantity if kind == "numeric" else None),
            ("since", int(request.held_since or request.since)),
            ("node", encode_name(request.name) if kind == "hierarchical" else None))


# --- Connections --------------------------------------------------------------------------------
# A session's socket: reads what has come, writes what the client can take, keeps the rest.  It
# never blocks.  Closing is idempotent and tells the lock table.

MOST_UNREAD = 256 * 1024  # bytes that may wait for a slow reader
PATIENCE = 10  # s for the first message, and for the end of a half-closed connection
LOCAL = "local"  # the peer on a UNIX socket
READABLE, WRITABLE = select.POLLIN, select.POLLOUT  # the numbers that epoll uses, too
WOULD_BLOCK = (BlockingIOError, InterruptedError)


class Connection:
    """One client."""
    __slots__ = ("daemon", "socket", "peer", "local", "session", "output", "report", "over",
                 "surplus", "writing", "name")
    would_block = WOULD_BLOCK

    def __init__(self, daemon, connection, peer, surplus):
        self.daemon, self.socket, self.peer = daemon, connection, peer
        self.local = peer == LOCAL
        self.session = Session(self)
        self.output = b""  # what the client has not taken yet
        self.report = None  # iterator over the rest of a status report
        self.over = False  # half-closed by us: nothing that comes counts any more
        self.surplus = surplus  # beyond the limit of clients: to be refused
        self.writing = False  # the poller waits until it can write
        self.name = None  # the common name of the peer's certificate

    def handle(self, events):
        """What the poller has seen."""
        if events & WRITABLE and self.socket is not None:
            self._flush()
        if events & ~WRITABLE and self.socket is not None and self._read():
            self._read()

    def _read(self):
        """Reads and obeys; returns whether more is likely to be there: the end, after an unlock."""
        try:
            data = self.socket.recv(4096)
        except self.would_block:
            return False
        except OSError:
            data = b""
        if not data:
            self.close()
            return False
        if not self.over:
            self._obey(data)
        return self.session.asked is None and self.socket is not None

    def _obey(self, data):
        try:
            for call, *details in self.session.calls(data):
                self.daemon.silent.pop(self, None)
                self.daemon.CALLS[call](self.daemon, self, *details)
                if self.socket is None or self.over:
                    return
        except ProtocolError as error:
            self.close(error)

    def send(self, data):
        """Sends now what the client takes now, the rest when it can take more."""
        if self.output or self.report:
            self.output += data
        else:
            self.output = data
            self._flush()
        if len(self.output) > MOST_UNREAD:
            self.close("does not read")

    def send_report(self, pieces):
        """Sends the pieces of a status report as the client takes them, then half-closes."""
        if self.report is None:
            self.report = pieces
            self._flush()

    def _flush(self):
        """Writes what can be written; afterwards the poller knows whether something is left."""
        try:
            while self.output:
                sent = self.socket.send(self.output)
                self.output = self.output[sent:]
        except self.would_block:
            pass
        except OSError:
            self.close()
            return
        if bool(self.output) != self.writing:
            self.writing = not self.writing
            self.daemon.poller.change(self.socket, self.writing)
        if self.over and not self.output:
            self._shut()
        if self.report is not None and len(self.output) < 65536:
            self.daemon.report_soon(self)

    def refill(self):
        """Takes the next pieces of the report, a few hundred."""
        if self.socket is not None:
            pieces = list(itertools.islice(self.report, 300))
            self.output += "".join(pieces).encode("ascii")
            if not pieces:
                self.report = None
                self.finish()
            self._flush()

    def finish(self):
        """Half-closes once everything is written; the client has PATIENCE to close its side."""
        if self.socket is not None and not self.over:
            self.over = True
            self.daemon.expect(self)
            if not self.output and self.report is None:
                self._shut()

    def _shut(self):
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def tell(self, decision):
        """Tells the client of a decision about its request."""
        if self.socket is None:
            return
        answer = None if decision.verdict is None else self.session.answer(decision)
        if answer is None:
            self.close()
            return
        self.send(answer)
        if decision.verdict in FINAL:
            self.finish()

    def close(self, reason=None):
        """Ends the connection, for a reason to be logged; what it held goes on to others."""
        if reason is not None:
            self.daemon.log.limited(f"{self.peer}: {reason}; connection closed")
        if self.socket is not None:
            self.daemon.poller.remove(self.socket)
            self.socket.close()
            self.socket = None
            self.daemon.gone(self)

    def credentials(self):
        """(pid, uid) of the peer on a local socket, (None, None) where the system cannot tell."""
        if not self.local or not hasattr(socket, "SO_PEERCRED"):
            return None, None
        raw = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return struct.unpack("3i", raw)[:2]


# TLS.  The handshake is steps of the loop as everything else is; `ssl` is loaded only where it is
# configured, so its errors are named by the functions that find them.

TLS_ALERT = b"\x15\3\3\0\2\2\x46"  # fatal, protocol version
TLS_FILES = ("TlsCertificate", "TlsPrivateKey", "TlsCaCertificate")


def tls_context(settings, server):
    """The context for one side of mutual TLS 1.2 or newer; raises CannotServe."""
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # FLoM's certificates bear no host names
    context.verify_mode = ssl.CERT_REQUIRED
    if hasattr(context, "minimum_version"):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:  # 3.6
        context.options |= ssl.OP_NO_SSLv3 | ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    certificate, key, authority = (os.path.abspath(settings[name]) for name in TLS_FILES)
    reading = f"{certificate} with {key}"
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")
        reading = authority
        context.load_verify_locations(authority)
    except (OSError, ValueError) as error:
        raise CannotServe(f"cannot use {reading} for TLS: {error}")
    return context


class TlsConnection(Connection):
    """One client behind TLS."""
    __slots__ = ("shaking", "would_block")

    def __init__(self, daemon, connection, peer, surplus, context):
        import ssl
        super().__init__(daemon, context.wrap_socket(
            connection, server_side=True, do_handshake_on_connect=False), peer, surplus)
        self.shaking, self.would_block = True, (ssl.SSLWantReadError, ssl.SSLWantWriteError)

    def handle(self, events):
        if self.shaking:
            self._shake()
        if not self.shaking:
            super().handle(events | READABLE)
            while self.socket is not None and self.socket.pending():
                self._read()

    def _shake(self):
        writing = False
        try:
            self.socket.do_handshake()
            self.shaking, subject = False, self.socket.getpeercert().get("subject", ())
            self.name = dict(pair for part in subject for pair in part).get("commonName")
        except self.would_block as error:
            writing = isinstance(error, self.would_block[1])
        except OSError as error:
            self.daemon.log.limited(f"{self.peer}: no TLS: {error}")
            if getattr(error, "reason", "") == "WRONG_VERSION_NUMBER":
                with contextlib.suppress(OSError):  # plain text: it is to know what is wrong
                    socket.socket.recv(self.socket, 4096)
                    socket.socket.send(self.socket, TLS_ALERT)
            self.close()
            return
        if writing != self.writing:
            self.writing = writing
            self.daemon.poller.change(self.socket, writing)


# --- Listeners ----------------------------------------------------------------------------------
# The sockets on which clients arrive.  A UNIX socket is guarded by an flock on SOCKET.lock, taken
# before anything else and kept until the process ends: of ten daemons started at once nine find it
# taken, and whatever the path holds then is a leftover, or the socket of a daemon that does not
# know the lock (FLoM's).  A TCP address is guarded by its bind.

NO_MORE_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
BACKLOG = socket.SOMAXCONN
PAUSE = 1  # s without accepting when no more files can be opened


class Listener:
    """A listening socket; `label` is how the status report names it."""

    def __init__(self, daemon, listening, path=None):
        self.daemon, self.socket, self.path = daemon, listening, path
        self.local, address = listening.family == socket.AF_UNIX, listening.getsockname()
        self.label = f"unix:{address}" if self.local else f"tcp:{show_address(address)}"
        listening.setblocking(False)
        listening.listen(BACKLOG)
        daemon.poller.add(listening, self.handle)

    def handle(self, events):
        """Accepts those that have come, a batch at a time."""
        for _ in range(64):
            try:
                connection, address = self.socket.accept()
            except WOULD_BLOCK + (ConnectionError,):
                return
            except OSError as error:
                if error.errno not in NO_MORE_FILES:
                    raise
                self.daemon.log.limited(f"cannot accept clients: {error.strerror}; trying again")
                self.daemon.poller.remove(self.socket)  # or it would wake the loop all the time
                self.daemon.dates[self._resume] = self.daemon.now.mono + PAUSE
                return
            connection.setblocking(False)
            with contextlib.suppress(OSError):  # TLS: it has gone already
                self.daemon.welcome(connection, LOCAL if self.local else show_address(address))

    def _resume(self):
        self.daemon.poller.add(self.socket, self.handle)

    def close(self):
        """Stops listening; removes the path of a UNIX socket that is its own."""
        if self.daemon.dates.pop(self._resume, None) is None:
            self.daemon.poller.remove(self.socket)
        self.socket.close()
        if self.path:
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def unix_socket(path, mode):
    """A bound UNIX socket at `path` with these permissions; its lock must be held already."""
    _remove_stale(path)
    bound = socket.socket(socket.AF_UNIX)
    before = os.umask(0o777 & ~mode)
    try:
        with serving(f"cannot create the socket {path}", bound):
            bound.bind(path)
    finally:
        os.umask(before)
    return bound


def _remove_stale(path):
    """Removes a socket on which nobody listens; raises CannotServe for anything else there."""
    with serving(f"cannot use {path}"), socket.socket(socket.AF_UNIX) as probe:
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(found.st_mode):
            raise CannotServe(f"{path} is there and is no socket")
        probe.setblocking(False)
        failure = probe.connect_ex(path)
        if failure in (0, errno.EAGAIN):
            raise CannotServe(f"another daemon serves {path}")
        if failure not in (errno.ECONNREFUSED, errno.ENOENT):
            raise OSError(failure, os.strerror(failure))
    with serving(f"cannot remove the stale socket {path} of {owner(found.st_uid)}"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def owner(uid):
    """The login name of a user, or the number where there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def tcp_socket(settings, host, port):
    """A bound TCP socket at host and port (0: any port); raises CannotServe."""
    failure = f"cannot listen on {host} port {port}"
    with serving(failure):
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)[0]
        if family == socket.AF_INET6 and not address[3] and settings["NetworkInterface"]:
            address = address[:3] + (socket.if_nametoindex(settings["NetworkInterface"]),)
        bound = socket.socket(family, kind)
    with serving(failure, bound):
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)
    return bound


def inherited_sockets():
    """Yields the listening sockets that an init system hands over (sd_listen_fds(3)), if any."""
    mine = os.environ.get("LISTEN_PID") == str(os.getpid())
    for number in range(3, 3 + int(os.environ.get("LISTEN_FDS", "0") if mine else 0)):
        given = socket.socket(fileno=number)
        name = given.getsockname()  # tells the family, which Python 3.6 does not find out itself
        family = socket.AF_UNIX if isinstance(name, (str, bytes)) else (
            socket.AF_INET6 if len(name) == 4 else socket.AF_INET)
        yield socket.socket(family, socket.SOCK_STREAM, fileno=given.detach())


# --- Discovery and election ---------------------------------------------------------------------
# The multicast group.  A daemon answers the questions of clients, and sees to it that it is alone.
#
# The election.  Before a daemon serves a group it is a candidate: it asks four times over 400 ms,
# naming itself by the pair (start time, id).  A serving daemon answers, and the candidate steps
# back.  Another candidate hears the question: the one with the lower pair stays, and repeats its
# own question at once so that the other hears it and steps back.  The pair is an order and no
# seniority: it only makes all candidates agree.  Datagrams get lost and networks are parted, so
# the winner goes on asking, first often, then every 5 s.  When it finds that another daemon serves,
# it connects to the address announced and asks for that daemon's id, so that a forged datagram has
# no effect; then the one with the greater pair drains: no more answers, no new requests, its
# waiters are sent away (and find the other daemon), its holders finish, it ends.  A daemon whose
# answers carry no id is FLoM's, which cannot drain: ours does.

CANDIDACY, QUESTIONS = 0.4, 4  # s, and questions in that time
SOON = (0.5, 0.5, 1)  # s between the winner's first questions
OFTEN = 5  # s between questions from then on, a fifth more or less
MULTICAST = {  # level; names there and forms: of all groups (Linux; Python has none), sender, join
    socket.AF_INET: (socket.IPPROTO_IP, 49, socket.IP_MULTICAST_TTL,
                     socket.IP_MULTICAST_IF, "@8xi", socket.IP_ADD_MEMBERSHIP, "@4xi"),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 29, socket.IPV6_MULTICAST_HOPS,
                      socket.IPV6_MULTICAST_IF, "@I", socket.IPV6_JOIN_GROUP, "@I")}


class Group:
    """This daemon's place in a multicast group.  `pair` is (started, id)."""

    def __init__(self, settings, pair):
        self.settings, self.pair = settings, pair
        host, interface = settings["MulticastAddress"], settings["NetworkInterface"]
        with serving(f"cannot use the group {host}"):
            self.index = socket.if_nametoindex(interface) if interface else 0
            self.family, _, _, _, self.address = socket.getaddrinfo(
                host, settings["MulticastPort"], 0, socket.SOCK_DGRAM)[0]
        if self.family == socket.AF_INET6:
            self.index = self.index or self.address[3]
            self.address = self.address[:3] + (self.index,)
        self.port = self.address[1]
        # one hears the group's questions; the other asks and hears the answers: never from the
        # group's port, since a FLoM daemon there ends on an answer
        self.socket, self.asker = (socket.socket(self.family, socket.SOCK_DGRAM) for _ in range(2))
        self.socket.setblocking(False)
        self.asker.setblocking(False)
        with serving(f"cannot join the group {self.address[0]} port {self.port}", self.socket,
                     self.asker):
            self._join(*MULTICAST[self.family])
        self.own_port = None  # of the TCP listener, once it serves
        self.asked = 0  # when it asked last

    def _join(self, level, of_all, hops, sender, sender_form, join, join_form):
        """Joins on the interface asked for, else on all; raises OSError when none takes part."""
        self.asker.setsockopt(level, hops, self.settings["DiscoveryTTL"])
        if self.index:
            self.asker.setsockopt(level, sender, struct.pack(sender_form, self.index))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # or it hears every group on this port
            self.socket.setsockopt(level, of_all, 0)
        if self.family == socket.AF_INET6:
            self.socket.setsockopt(level, socket.IPV6_V6ONLY, 1)
        self.socket.bind(("", self.port))
        group = socket.inet_pton(self.family, self.address[0].split("%")[0])
        indexes = [self.index] if self.index else [0] + [
            index for index, _ in socket.if_nameindex()]
        failures = []
        for index in indexes:
            try:
                self.socket.setsockopt(level, join, group + struct.pack(join_form, index))
            except OSError as error:
                failures.append(error)
        if len(failures) == len(indexes):
            raise failures[-1]

    def ask(self):
        """Sends one question to the group; a network that is down is asked again later."""
        self.asked = time.monotonic()
        with contextlib.suppress(OSError):
            self.asker.sendto(encode(DISCOVER, 8, daemon=self.pair[1], started=self.pair[0]),
                              self.address)

    @staticmethod
    def _datagrams(source, step):
        """Yields (elements, sender) of the discovery messages of this step that have come: a batch
        of them, since a flood has no end."""
        for _ in range(64):
            try:
                data, sender = source.recvfrom(2048)
            except WOULD_BLOCK:
                return
            except OSError:
                continue  # an ICMP error for something sent before
            with contextlib.suppress(ProtocolError):
                elements = decode(data)
                if (elements["msg"]["verb"], elements["msg"]["step"]) == (DISCOVER, step):
                    yield elements, sender

    @staticmethod
    def _pair(elements):
        """(started, id) of the daemon that sent the message, None when it is not one of ours."""
        head = elements["msg"]
        return (head["started"], head["daemon"]) if {"started", "daemon"} <= head.keys() else None

    def elect(self):
        """Returns when this daemon is to serve the group, raises SteppedBack when another is."""
        for _ in range(QUESTIONS):
            self.ask()
            left, until = CANDIDACY, time.monotonic() + CANDIDACY / QUESTIONS
            while left > 0:
                left = until - time.monotonic()
                select.select([self.socket, self.asker], [], [], max(0, left))
                for elements, _ in self._datagrams(self.asker, 16):
                    if self._pair(elements) != self.pair:
                        raise SteppedBack("another daemon serves the group")
                self._meet_candidates()

    def _meet_candidates(self):
        others = {self._pair(elements) for elements, _ in self._datagrams(self.socket, 8)}
        others -= {None, self.pair}
        if others and min(others) < self.pair:
            raise SteppedBack("another daemon is about to serve the group")
        if others:
            self.ask()

    def serve(self, daemon, port):
        """Begins to answer: `port` is where the daemon listens."""
        self.daemon, self.own_port = daemon, port
        self.pauses = list(SOON)
        daemon.dates[self._ask_again] = daemon.now.mono + self.pauses.pop(0)
        daemon.poller.add(self.socket, self.hear)
        daemon.poller.add(self.asker, self.hear_answers)

    def hear(self, events):
        """Answers the questions that have come."""
        for elements, sender in self._datagrams(self.socket, 8):
            other = self._pair(elements)
            if other == self.pair or sender[1] == self.port:
                continue
            # no address when the daemon listens on all: the asker knows then
            network = element("network", ("address", self.settings["UnicastAddress"] or ""),
                              ("port", self.own_port))
            ours = {"daemon": self.pair[1], "started": self.pair[0]} if other else {}
            with contextlib.suppress(OSError):
                self.socket.sendto(encode(DISCOVER, 16, network, **ours), sender)
            if other and self.daemon.now.mono > self.asked + SOON[0]:
                self.ask()  # if it serves, too, the sooner this is found the better

    def hear_answers(self, events):
        """Looks for other daemons in the answers to this one's own questions."""
        for elements, sender in self._datagrams(self.asker, 16):
            other, network = self._pair(elements), elements.get("network", {})
            if other == self.pair or "port" not in network:
                continue
            host = network.get("address") or sender[0]
            self.daemon.log.limited(f"another daemon answers for the group: {host!r} port "
                                    f"{network['port']}", "error")
            if other is None or other < self.pair:
                self.daemon.verify(other, (host, network["port"]) + tuple(sender[2:]))

    def _ask_again(self):
        self.ask()
        pause = self.pauses.pop(0) if self.pauses else OFTEN * random.uniform(0.8, 1.2)
        self.daemon.dates[self._ask_again] = self.daemon.now.mono + pause

    def close(self):
        """Leaves the group: no more answers, no more questions."""
        self.daemon.dates.pop(self._ask_again, None)
        for member in (self.socket, self.asker):
            self.daemon.poller.remove(member)
            member.close()


def daemon_at(address, context):
    """The id of the daemon at a TCP address, None when it is FLoM's; it asks as a client would,
    and blocks.  Raises OSError or LookupError when there is no lock daemon."""
    question = encode(
        LOCK, 8, element("session", ("peerid", machine_id()), ("client", f"flomd.py/{VERSION}")),
        element("resource", ("name", encode_name(STATUS_RESOURCE)), ("mode", 0), ("wait", 0),
                ("create", 0), ("lifespan", 0)))
    until, answer = time.monotonic() + PATIENCE, b""
    family, kind, _, _, found = socket.getaddrinfo(*address[:2], 0, socket.SOCK_STREAM)[0]
    if family == socket.AF_INET6 and address[3:]:  # the scope of a link-local address
        found = found[:3] + (found[3] or address[3],)
    with contextlib.ExitStack() as stack:
        asking = stack.enter_context(socket.socket(family, kind))
        asking.settimeout(PATIENCE)
        asking.connect(found)
        if context:
            asking = stack.enter_context(context.wrap_socket(asking))
        asking.sendall(question)
        while True:
            asking.settimeout(max(0.001, until - time.monotonic()))
            data = asking.recv(4096)
            answer += data
            found = re.search(rb"<session (?:[^>]* daemon=.([0-9a-f]+))?[^>]*>", answer)
            if found:
                return found.group(1) and found.group(1).decode()
            if not data or len(answer) > 8192:
                raise LookupError("no lock daemon")


# --- Event loop ---------------------------------------------------------------------------------
# One thread, one loop: do what is due, wait for an event or the next date, handle the events.
# `dates` has one date for each purpose, a function to be called then; times of which there may be
# thousands stand in queues or heaps of their own, of which the first is a date.
#
# epoll, or poll where that is missing, and not `selectors`: a connection lives for two messages,
# and the bookkeeping of selectors would take a quarter of its time.

RESERVE = 32  # files that are not for clients: listeners, logs, state, a few to refuse clients with


class Poller:
    """Which function to call when a socket can be read, or written."""

    def __init__(self):
        self.handlers = {}
        self._poll = select.epoll() if hasattr(select, "epoll") else select.poll()
        self._unit = 1 if hasattr(select, "epoll") else 1000

    def add(self, watched, handler):
        """handler(events) is called when `watched` can be read."""
        self.handlers[watched.fileno()] = handler
        self._poll.register(watched.fileno(), READABLE)

    def change(self, watched, writing):
        """Its handler is called, or not any more, when it can be written, too."""
        self._poll.modify(watched.fileno(), READABLE | (WRITABLE if writing else 0))

    def remove(self, watched):
        """To be called before `watched` is closed."""
        self._poll.unregister(watched.fileno())
        del self.handlers[watched.fileno()]

    def wait(self, timeout):
        """(descriptor, events) of what has happened, after `timeout` s (None: no limit) at most."""
        # rounded up to ms, so that a date has come when poll returns
        timeout = -1 if timeout is None else -(-timeout * 1000 // 1) * self._unit / 1000
        return self._poll.poll(timeout)


class Moment:
    """A point in time, as the engine wants it."""
    __slots__ = ("mono", "wall")

    def __init__(self):
        self.mono, self.wall = time.monotonic(), time.time()

    def local(self):
        """µs since 1970 of local time, as a clock on the wall shows it."""
        return int(self.wall * 10 ** 6) + time.localtime(self.wall).tm_gmtoff * 10 ** 6

    def format(self, text):
        """strftime of this moment in local time."""
        return time.strftime(text, time.localtime(self.wall))


class Daemon:
    """Brings together the lock table, the connections, the listeners and the group."""

    def __init__(self, settings, options, log, pair):
        self.settings, self.log, self.pair = settings, log, pair
        self.now = Moment()
        self.poller, self.dates = Poller(), {}
        self.connections = set()
        # connections that must begin, or end, within PATIENCE seconds: their dates, in order
        self.silent = collections.OrderedDict()
        self.listeners, self.group, self.state, self.probing = [], None, None, False
        self.publisher = None
        self.table = None  # made when it is known what the predecessor left
        self.tls = tls_context(settings, server=True) if settings["TlsCertificate"] else None
        self.most_clients = options.max_clients or most_files() - RESERVE
        self.ending = None  # why; "quiesce" and "drain" wait for those that are served
        self.curious = set()  # sessions that want to know their place
        self.reporting = collections.OrderedDict()  # connections whose report goes on
        self.quiet_since = self.now.mono  # when the last lock was released
        self._decisions, self._applying = collections.deque(), False

    def run(self):
        """Serves until it is told to end or nobody needs it."""
        self._rest()
        handlers = self.poller.handlers
        while self.ending is None or self.ending in ("quiesce", "drain") and self.connections:
            first = self._first_date()
            events = self.poller.wait(None if first is None else max(0, first - time.monotonic()))
            self.now = Moment()
            for number, what in events:
                handle = handlers.get(number)  # None when an event before this one closed it
                try:
                    handle and handle(what)
                except Exception:  # a bug: it may cost one connection, never the daemon
                    self._survive(handle)
            if first is not None and first <= self.now.mono:
                self._call(self._do_what_is_due)

    def _first_date(self):
        first = self.table.next_deadline()
        for when in self.dates.values():
            if first is None or when < first:
                first = when
        for when in self.silent.values():
            return when if first is None or when < first else first
        return first

    def _do_what_is_due(self):
        self.apply(self.table.expire(self.now))
        while self.silent and next(iter(self.silent.values())) <= self.now.mono:
            next(iter(self.silent)).close("silent")
        self._rest()
        for purpose in [key for key, when in self.dates.items() if when <= self.now.mono]:
            if self.dates.pop(purpose, None) is not None:
                self._call(purpose)

    def _call(self, function):
        try:
            function()
        except Exception:
            self._survive(function)

    def _survive(self, function):
        self.log.limited(traceback.format_exc(), "error")
        if isinstance(function.__self__, Connection):
            function.__self__.close()

    def _rest(self):
        """Begins the last part of the daemon's life once nobody uses it."""
        if not self.connections and self.table.empty() and self.settings["Lifespan"] >= 0:
            self.dates.setdefault(self._end_of_life,
                                  self.now.mono + self.settings["Lifespan"] / 1000)

    def _end_of_life(self):
        self.ending = "nobody needs it"

    # Connections come and go.

    def welcome(self, accepted, peer):
        """A client has connected."""
        if peer != LOCAL:
            tune(accepted, self.settings["TcpKeepaliveTime"], self.settings["TcpKeepaliveIntvl"],
                 self.settings["TcpKeepaliveProbes"])
        surplus = len(self.connections) >= self.most_clients
        connection = (TlsConnection(self, accepted, peer, surplus, self.tls) if self.tls
                      else Connection(self, accepted, peer, surplus))
        self.connections.add(connection)
        self.dates.pop(self._end_of_life, None)
        self.expect(connection)
        self.poller.add(connection.socket, connection.handle)

    def expect(self, connection):
        """The client must say its first word, or close its side, within PATIENCE seconds."""
        self.silent.pop(connection, None)
        self.silent[connection] = self.now.mono + PATIENCE

    def gone(self, connection):
        """A connection has ended; what it held or waited for goes on to others."""
        if self.publisher:
            self.publisher.lost += connection.session.holds is not None
        self.connections.discard(connection)
        self.silent.pop(connection, None)
        self._released(self.table.gone(connection.session, self.now))
        if not self.connections:
            self._rest()

    def _released(self, decisions):
        """The mark on disk may be cleared when nobody has held a lock for a while."""
        if self.publisher:
            self.publisher.changed()
        if not self.table.holding and self.state.marked:
            self.quiet_since = self.now.mono
            self.dates.setdefault(self.clear_mark, self.now.mono + QUIET)
        self.apply(decisions)

    def clear_mark(self):
        """Clears the mark on disk, unless it is too early."""
        if self.quiet_since + QUIET > self.now.mono:
            self.dates[self.clear_mark] = self.quiet_since + QUIET
        elif self.table.window_until is not None:
            self.dates[self.clear_mark] = self.table.window_until
        elif not self.table.holding:
            self.state.mark(False)

    # What clients want.

    def apply(self, decisions):
        """Tells the sessions; closing one while telling may bring more decisions."""
        if not decisions:
            return
        self._decisions.extend(decisions)
        if self._applying:
            return
        self._applying = True
        try:
            while self._decisions:
                decision = self._decisions.popleft()
                if decision.verdict == OK and not self.state.marked:
                    self.state.mark(True)
                if self.publisher:
                    self.publisher.note(decision)
                if decision.verdict in (ENQUEUED, BUSY) and "progress" in decision.session.about:
                    decision = self._explained(decision)
                decision.session.connection.tell(decision)
        finally:
            self._applying = False

    def _explained(self, decision):
        """The decision for a session that wants to know why it waits, and how that changes."""
        session, resource = decision.session, self.table.resource_of(decision.session.asked)
        if decision.verdict == ENQUEUED:
            session.place = decision.position, in_the_way(resource, session.request)[:1]
            self.curious.add(session)
            self.dates.setdefault(self._tell_places, self.now.mono + 1)
        return decision._replace(
            reason=decision.reason or resource and held_by(resource, self.now, session.request))

    def _tell_places(self):
        """Once a second: tells those that want to know it of a new place, or another holder."""
        wanted = {}
        for session in list(self.curious):
            request = self.table.requests.get(session)
            if request is not None and request.state is QUEUED:
                wanted.setdefault(request.resource, set()).add(session)
            else:
                self.curious.discard(session)
        for resource, sessions in wanted.items():
            for position, request in enumerate(resource.waiters(), 1):
                if request.session in sessions and request.session.place != (
                        position, in_the_way(resource, request)[:1]):
                    self.apply([Decision(request.session, ENQUEUED, position=position)])
        if self.curious:
            self.dates[self._tell_places] = self.now.mono + 1

    def _lock(self, connection, request):
        session = connection.session
        connection.surplus = connection.surplus and len(self.connections) > self.most_clients
        if self.ending == "drain" and session.holds is None:
            connection.close()
        elif connection.surplus:
            connection.tell(Decision(session, LIMIT, reason="the daemon has too many clients"))
        elif self.tls and self.settings["TlsCheckPeerId"] and connection.name != session.peer_id:
            reason = f"the certificate is that of {connection.name!r}, not of {session.peer_id!r}"
            self.log.limited(f"{connection.peer}: {reason}; refused")
            connection.tell(Decision(session, LIMIT, reason=reason))
        else:
            pid, uid = connection.credentials() if session.ours else (None, None)
            if pid:  # on a local socket the system knows best who asks
                session.about.update(pid=str(pid), user=owner(uid))
            self.apply(self.table.request(request, self.now))

    def _unlock(self, connection, committed):
        self._released(self.table.release(connection.session, committed, self.now))

    def _status(self, connection, client):
        if client.startswith("flomd.py"):  # see Daemon.verify()
            self.log.limited(f"{connection.peer}: another daemon finds this one", "error")
        listening = [listener.label for listener in self.listeners]
        if self.group:
            listening.append(f"udp:{self.group.address[0]}:{self.group.port}")
        introduction = (Session.first_to_ours + '<answer rc="0"/>' + element(
            "daemon", ("version", VERSION), ("since", self.pair[0] // 1000),
            ("policy", self.settings["Policy"]), ("listening", " ".join(listening))))
        connection.send_report(report(self.table, introduction, self.now))

    def report_soon(self, connection):
        """One report at a turn of the loop goes on, however many are wanted."""
        self.reporting[connection] = None
        self.dates[self._report] = 0

    def _report(self):
        self.reporting.popitem(last=False)[0].refill()
        if self.reporting:
            self.dates[self._report] = 0

    def _shutdown(self, connection, immediate):
        refusal = self._may_stop(connection)
        if refusal:
            self.log.limited(f"{connection.peer}: may not stop the daemon: {refusal}")
            connection.send(encode(MANAGEMENT, 16, element("answer", ("rc", -1),
                                                           ("reason", refusal))))
            connection.finish()
        elif immediate:
            self.stop("its order to end came from " + connection.peer)
        else:
            self.quiesce()
            connection.close()

    def _may_stop(self, connection):
        """Why the peer of this connection may not stop the daemon, None when it may."""
        if connection.local:
            _, uid = connection.credentials()
            allowed = uid in (None, 0, os.getuid())
            return None if allowed else f"{owner(uid)} is neither {owner(os.getuid())} nor root"
        here, there = (address[0].replace("::ffff:", "") for address in (
            connection.socket.getsockname(), connection.socket.getpeername()))
        if (self.settings["AllowRemoteShutdown"] or self.tls or here == there
                or there.startswith("127.") or there == "::1"):
            return None
        return "another host may not, without --allow-remote-shutdown on the daemon"

    CALLS = {"lock": _lock, "unlock": _unlock, "status": _status, "shutdown": _shutdown,
             "send": lambda self, connection, data: connection.send(data)}

    # The end.

    def stop(self, reason):
        """Ends at once; clients of ours are told that it is by order."""
        self.log.info(f"ending: {reason}")
        self.ending = reason
        for connection in list(self.connections):
            if connection.session.ours and connection.socket is not None:
                connection.session.answered = True
                connection.tell(Decision(connection.session, STOPPED,
                                         reason="the daemon ends: " + reason))

    def quiesce(self):
        """Ends when nobody is served any more; newcomers are served meanwhile."""
        self.log.info("ending when the last client has gone")
        self.ending = self.ending or "quiesce"

    def verify(self, pair, address):
        """Another daemon serves the group and goes before this one, so it says: is it there?  To
        connect may take its time, so a thread does it and wakes the loop with the result."""
        if not self.probing and self.ending is None:
            self.probing = True
            threading.Thread(target=self._probe, args=(pair, address), daemon=True).start()

    def _probe(self, pair, address):
        confirmed = False
        with contextlib.suppress(OSError, LookupError, ValueError, CannotServe):
            context = tls_context(self.settings, server=False) if self.tls else None
            confirmed = daemon_at(address, context) == (pair and pair[1])
        self.waker.send(b"\xff" if confirmed else b"\xfe")

    def probed(self, confirmed):
        """The thread of verify() has ended."""
        self.probing = False
        if confirmed and self.group:
            self.drain()

    def drain(self):
        """Leaves the group to another daemon."""
        self.log.error("draining: another daemon serves the group")
        self.ending = "drain"
        self.dates.pop(self._end_of_life, None)
        self._hide()
        self._applying = True  # a waiter that makes way grants nothing any more
        for connection in [other for other in self.connections if other.session.holds is None]:
            connection.close()
        self._decisions.clear()
        self._applying = False

    def _hide(self):
        """From now on no client finds the daemon."""
        for way in self.listeners + [self.group] * bool(self.group):
            way.close()
        self.listeners, self.group = [], None

    def close(self):
        """Removes what the daemon has put into the file system and closes its sockets."""
        self._hide()
        if self.publisher:
            self.publisher.close()
        if self.state and self.state.marked and not self.table.holding and (
                self.table.window_until is None):
            self.state.mark(False)
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.socket.close()


def most_files():
    """The number of files that this process may open, raised as far as it can be."""
    try:
        import resource  # not in every minimal Python
    except ImportError:
        return 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return 10 ** 6 if soft == resource.RLIM_INFINITY else soft


# --- Signals and lifespan -----------------------------------------------------------------------
# Handlers do nothing; Python writes the number of each signal to a socket that the loop reads, and
# the thread that looks for another daemon writes 255 or 254 there: yes or no.


class Signals:
    """TERM and INT end the daemon, USR1 lets it end when idle, HUP opens its log again."""

    def __init__(self, daemon):
        self.reader, daemon.waker = socket.socketpair()
        self.reader.setblocking(False)
        daemon.waker.setblocking(False)
        self.actions = {signal.SIGTERM: lambda: daemon.stop("it got SIGTERM"),
                        signal.SIGINT: lambda: daemon.stop("it got SIGINT"),
                        signal.SIGUSR1: daemon.quiesce, signal.SIGHUP: daemon.log.open,
                        255: lambda: daemon.probed(True), 254: lambda: daemon.probed(False)}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(daemon.waker.fileno())
        daemon.poller.add(self.reader, self.handle)

    def handle(self, events):
        """Acts on the signals that have come."""
        for number in self.reader.recv(64):
            if number in self.actions:
                self.actions[number]()


# --- State on disk ------------------------------------------------------------------------------
# What a successor must know: the epoch, which is the upper half of the tokens and grows with every
# daemon; the boot of the system; and whether somebody held a lock when the daemon ended, however
# it ended.  One record of fixed length, of which the mark alone is rewritten: set before the first
# grant is told, cleared when nobody has held a lock for a second.
#
# The file is also the lock that keeps a second daemon from the same socket (see Listeners).

RECORD = "flomd {epoch:010d} {boot:36.36} {held} {pid:010d}\n"
MARK_AT = len(RECORD.format(epoch=0, boot="", held=0, pid=0)) - len(" 0000000000\n") - 1
_record = re.compile(rb"flomd (\d{10}) (.{36}) ([01]) (\d{10})\n").match
QUIET = 1  # s without any holder before the mark is cleared


def open_state(path, shared):
    """Opens the file, made if it is not there, or raises CannotServe; `shared`: anybody's."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    mode = 0o666 if shared else 0o600
    before = os.umask(0)
    try:
        try:
            number = os.open(path, flags)
        except FileNotFoundError:
            number = os.open(path, flags | os.O_CREAT, mode)
    except OSError as error:
        why = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise CannotServe(f"cannot open {path}: {why}")
    finally:
        os.umask(before)
    found = os.fstat(number)
    if (not stat.S_ISREG(found.st_mode) or found.st_nlink > 1
            or not shared and found.st_uid != os.getuid()):
        os.close(number)
        raise CannotServe(f"{path} is no file of {owner(os.getuid())}")
    return number


def lock_file(number, wait):
    """Takes the flock of the file; returns whether it could be had."""
    with contextlib.suppress(*WOULD_BLOCK):
        fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    return False


class State:
    """The record in the file `number` (None: there is none and nothing is remembered)."""

    def __init__(self, number, durable):
        self.number, self.durable = number, durable
        found = number is not None and _record(os.pread(number, 128, 0))
        epoch, boot, held, pid = found.groups() if found else (b"0", b"", b"0", b"0")
        self.epoch, self.pid = int(epoch), int(pid)  # of the predecessor, until begin()
        self.unclean, self.boot = held == b"1", boot.decode("ascii", "replace").strip()
        self.marked = self.unclean

    def begin(self):
        """Writes this daemon's record and returns whether the system was booted since the last."""
        boot = ""
        with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        self.epoch = max(int(time.time()) - EPOCH, self.epoch + 1)
        if self.number is not None:
            os.pwrite(self.number, RECORD.format(
                epoch=self.epoch, boot=boot, held=int(self.unclean), pid=os.getpid()).encode(), 0)
            if self.durable:
                os.fsync(self.number)
        return self.boot != boot

    def mark(self, held):
        """Somebody is about to hold a lock, or nobody has held one for a while."""
        self.marked = held
        if self.number is not None:
            os.pwrite(self.number, b"1" if held else b"0", MARK_AT)


# What others may watch: the tree of -m, in FLoM's layout, and the text of --metrics for Prometheus.
# Both are written by a forked child, which sees the table as it was at that moment: the loop waits
# for no disk.  The tree is built anew beside the old one; `status` is a link that is moved over.

TREE_PAUSE, METRICS_PAUSE = 1, 15  # s between two versions
WAITS = (0.001, 0.01, 0.1, 1, 10, 60, 600)  # s, the upper bounds of the histogram
REFUSED = {BUSY: "busy", CANT_WAIT: "cannot_wait", IMPOSSIBLE: "impossible", DEADLOCK: "deadlock",
           LIMIT: "limit", INVALID_NAME: "invalid_name"}


class Publisher:
    """Publishes the state of the daemon while somebody watches it."""

    def __init__(self, daemon, mount, metrics):
        self.daemon, self.mount, self.metrics = daemon, mount, metrics
        self.verdicts, self.lost, self.version = collections.Counter(), 0, 0
        self.waits, self.waited = [0] * (len(WAITS) + 1), 0.0
        if mount:
            self.write_tree()
        if metrics:
            self._write_metrics()

    def note(self, decision):
        """Counts a decision."""
        self.verdicts[decision.verdict] += 1
        request = self.daemon.table.requests.get(decision.session)
        if decision.verdict == OK and request is not None:
            waited = max(0.0, self.daemon.now.wall - request.since)
            self.waits[bisect.bisect_left(WAITS, waited)] += 1
            self.waited += waited
        self.changed()

    def changed(self):
        """The tree is to be written again, but not more often than it may."""
        if self.mount:
            self.daemon.dates.setdefault(self.write_tree, self.daemon.now.mono + TREE_PAUSE)

    def write_tree(self):
        self.version += 1
        self._in_child(self._write_tree)

    def _write_metrics(self):
        self.daemon.dates[self._write_metrics] = self.daemon.now.mono + METRICS_PAUSE
        self._in_child(self._write_text)

    @staticmethod
    def _in_child(write):
        if not os.fork():
            try:
                close_files(keep=-1)  # or clients would wait for this process, too
                write()
            finally:
                os._exit(0)

    def _write_tree(self):
        new = f".status-{self.version}"
        link = os.path.join(self.mount, f"{new}-link")
        for path, text in self._tree():
            path = os.path.join(self.mount, new, path)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(f"{text}\n")
        os.makedirs(os.path.join(self.mount, new), exist_ok=True)
        os.symlink(new, link)
        os.replace(link, os.path.join(self.mount, "status"))
        self._remove_but(new)

    def _remove_but(self, kept):
        for name in os.listdir(self.mount):
            path = os.path.join(self.mount, name)
            if name.startswith(".status-") and os.path.islink(path):
                os.unlink(path)
            elif name.startswith(".status-") and name != kept:
                for folder, _, files in os.walk(path, topdown=False):
                    for file in files:
                        os.unlink(os.path.join(folder, file))
                    os.rmdir(folder)

    def _tree(self):
        """Yields (path, content) of the files."""
        table = self.daemon.table
        for number, resource in enumerate(table.resources.values(), 1):
            folder, kind = f"lockers/{number}", kind_of(resource.name)
            yield f"{folder}/resource_name", resource.name
            yield f"{folder}/resource_type", kind
            for role, requests in (("holders", resource.holders.values()),
                                   ("waitings", resource.waiters())):
                for place, request in enumerate(requests, 1):
                    yield from ((f"{folder}/{role}/{place}/{key}", value)
                                for key, value in self._details(request, kind))
        parked = [request for queue in table.parked.values() for request in queue.values()]
        for number, request in enumerate(parked, 1):
            yield f"incubator/{number}/peer_name", request.session
            yield f"incubator/{number}/resource_name", request.name
            yield f"incubator/{number}/resource_type", kind_of(request.name)

    @staticmethod
    def _details(request, kind):
        yield "peer_name", request.session
        if kind in ("simple", "hierarchical"):
            yield "lock_mode", MODES[request.mode]
        elif kind == "numeric":
            yield "quantity", request.quantity
        elif request.element and kind in ("sequence", "timestamp"):
            yield f"{kind}_value", request.element

    def _write_text(self):
        part = f"{self.metrics}.{os.getpid()}"
        with open(part, "w") as file:
            file.write("".join(self._text()))
        os.chmod(part, 0o644)
        os.replace(part, self.metrics)

    def _text(self):
        """Yields the metrics in Prometheus' text format."""
        table, count = self.daemon.table, self.verdicts
        kinds = collections.Counter(kind_of(name) for name in table.resources)
        bounds = [f"{bound:g}" for bound in WAITS] + ["+Inf"]
        waits = [(f'_bucket{{le="{bound}"}}', total)
                 for bound, total in zip(bounds, itertools.accumulate(self.waits))]
        for name, kind, what, values in (
                ("sessions", "gauge", "Open connections.", [("", len(self.daemon.connections))]),
                ("resources", "gauge", "Resources by kind.", [
                    (f'{{kind="{kind}"}}', kinds[kind]) for kind in KINDS]),
                ("holders", "gauge", "Sessions that hold a lock.", [("", table.holding)]),
                ("waiters", "gauge", "Sessions that wait for a lock.", [("", table.waiting)]),
                ("grants_total", "counter", "Locks granted.", [("", count[OK])]),
                ("refusals_total", "counter", "Requests refused, by reason.", [
                    (f'{{reason="{REFUSED[rc]}"}}', count[rc]) for rc in REFUSED]),
                ("lost_sessions_total", "counter", "Sessions that ended while they held a lock.",
                 [("", self.lost)]),
                ("epoch", "gauge", "Upper half of the fencing tokens.",
                 [("", self.daemon.state.epoch)]),
                ("wait_seconds", "histogram", "Time from the request to the grant.", waits + [
                    ("_sum", f"{self.waited:.6f}"), ("_count", sum(self.waits))])):
            yield f"# HELP flomd_{name} {what}\n# TYPE flomd_{name} {kind}\n"
            yield from (f"flomd_{name}{labels} {value}\n" for labels, value in values)

    def close(self):
        """Removes what it has published."""
        with contextlib.suppress(OSError):
            if self.metrics:
                os.unlink(self.metrics)
            if self.mount:
                os.unlink(os.path.join(self.mount, "status"))
                self._remove_but(None)


# --- Daemonize ----------------------------------------------------------------------------------
# The process that is started forks twice, waits until its grandchild serves, and passes on the
# status: so whoever starts a daemon knows when it ends that the daemon listens.  The grandchild
# keeps of the starter only stderr, until it serves, for the one line that says why it cannot.


def detach():
    """Goes on in a detached process; returns the descriptor for report_ready()."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        status = os.read(reader, 4)
        os.waitpid(child, 0)
        os._exit(int(status) if status else 1)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    os.umask(0o022)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    close_files(keep=writer)
    return writer


def close_files(keep):
    """Closes every descriptor but 0, 1, 2 and `keep`."""
    try:
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        numbers = range(3, min(most_files(), 4096))
    for number in numbers:
        if number > 2 and number != keep:
            with contextlib.suppress(OSError):
                os.close(number)


def report_ready(writer, status):
    """Ends the starter, if there is one, with `status`, and lets go of its stderr."""
    if writer is not None:
        os.dup2(0, 2)  # first, since the starter may look as soon as it is told
        os.write(writer, str(status).encode())
        os.close(writer)


def forget_signals():
    """Whatever the starter ignored or blocked, the daemon begins with the defaults."""
    for number in range(1, signal.NSIG):
        with contextlib.suppress(OSError, ValueError):
            if signal.getsignal(number) == signal.SIG_IGN and number != signal.SIGPIPE:
                signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def notify(text):
    """Tells systemd (sd_notify(3)), where it waits to be told."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with contextlib.suppress(OSError), socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM) as messenger:
            messenger.sendto(text.encode(), "\0" + path[1:] if path[0] == "@" else path)


# --- Log ----------------------------------------------------------------------------------------
# Lines to syslog, to a file or to stderr.  Logging never blocks: syslog gets datagrams that may be
# lost, and they are counted; stderr is written when it can take a line.

LEVELS = {"error": 3, "warning": 4, "info": 6, "debug": 7}
SYSLOG = ("/dev/log", "/var/run/syslog", "/var/run/log")
FACILITY = 3 << 3  # daemon
LIMITED, INTERVAL = 10, 10  # lines that peers may cause in so many s


class Log:
    """Where the daemon says what it does."""

    def __init__(self, target, level, append=True):
        self.target, self.level, self.append = target, LEVELS[level], append
        self.socket = self.file = None
        self.lost = self.count = self.begin = 0

    def open(self):
        """Opens the log, once more after it was moved away; raises CannotServe."""
        before = self.socket or self.file
        if self.target == "syslog":
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self.socket.setblocking(False)
            any(self.socket.connect_ex(path) == 0 for path in SYSLOG)
        elif self.target != "stderr":
            with serving(f"cannot write the log {self.target}"):
                self.file = open(self.target, "a" if self.append else "w", 1, encoding="utf-8",
                                 errors="replace")
            self.append = True
        if before:
            before.close()

    def limited(self, text, level="warning"):
        """A line that a peer causes: no more than LIMITED of them in an INTERVAL."""
        now = time.monotonic()
        if now >= self.begin + INTERVAL:
            if self.count > LIMITED:
                self._write("warning", f"{self.count - LIMITED} lines like the last were left out")
            self.begin, self.count = now, 0
        self.count += 1
        if self.count <= LIMITED:
            self._write(level, text)

    def _write(self, level, text):
        if LEVELS[level] > self.level:
            return
        try:
            if self.socket:
                lost = f" ({self.lost} lines lost before)" if self.lost else ""
                line = f"<{FACILITY + LEVELS[level]}>flomd[{os.getpid()}]: {text}{lost}"
                self.socket.send(line.encode("utf-8", "replace")[:2000])
                self.lost = 0
            elif self.file:
                self.file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} flomd[{os.getpid()}] "
                                f"{level}: {text}\n")
            elif select.select([], [2], [], 0)[1]:
                os.write(2, f"flomd: {text}\n".encode("utf-8", "replace")[:4096])
        except OSError:
            self.lost += 1

    error = functools.partialmethod(_write, "error")
    info = functools.partialmethod(_write, "info")


# --- Options ------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with errors in one line."""

    def _get_option_tuples(self, option_string):
        # allow_abbrev=False would break bundled short options on 3.6 and 3.7
        return [] if option_string.startswith("--") else super()._get_option_tuples(option_string)

    def error(self, message):
        raise UsageError(message)


def make_parser():
    """The parser of the settings that concern a daemon, and of what only the daemon has."""
    parser = Parser(
        prog="flomd.py", description="The daemon that holds flom's locks.", add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, 2, 32, 99))  # else it asks shutil
    add = parser.add_argument
    add("-h", "--help", action="help", help="print this and end")
    add("-v", "--version", action="version", version=f"flomd.py {VERSION}",
        help="print the version and end")
    add("-f", "--foreground", action="store_true", help="do not detach, log to stderr")
    add("-c", "--config-file", metavar="FILE", help="read after the system's and the user's file")
    add("--no-files", action="store_true", help="read no configuration file")
    add("--pid-file", metavar="FILE", help="where the pid is written")
    add("--metrics", metavar="FILE", help="where to write figures for Prometheus")
    add("--log", metavar="FILE|syslog|stderr", help="where to log (syslog, with -f stderr)")
    add("--log-level", choices=list(LEVELS), default="info", help="error, warning, info or debug")
    for name, what in (("clients", "connections"), ("waiters", "waiting requests")):
        add(f"--max-{name}", metavar="N", type=_positive, help=f"limit of {what}")
    for setting in SETTINGS:
        if "d" in setting.users:
            names = [f"-{setting.short}"] if setting.short else []
            flag = {"action": "store_const", "const": "yes"} if setting.key in (
                "Verbose", "AllowRemoteShutdown") else {"metavar": setting.type.upper()}
            add(*names, f"--{setting.long}", dest=setting.key, help=setting.help, **flag)
    return parser


def _positive(text):
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: a number from 1 is allowed")
    return int(text)


def read_options(arguments):
    """(settings, options) from the command line and the files; raises UsageError."""
    options = make_parser().parse_args(arguments)
    settings = Settings(Lifespan=-1)
    for name in ("pid_file", "metrics"):
        if getattr(options, name):
            setattr(options, name, os.path.abspath(getattr(options, name)))
    if not options.no_files:
        for path in ("/etc/flom.conf", "/usr/local/etc/flom.conf", os.path.expanduser("~/.flom")):
            settings.read_file(path)
    of_clients = dict(settings.origins)
    if options.config_file:
        settings.read_file(options.config_file, required=True)
    for setting in SETTINGS:
        text = getattr(options, setting.key, None)
        if text is not None:
            short = f"-{setting.short}/" if setting.short else ""
            settings.set(setting, [text], f"{short}--{setting.long}")
    # the files that clients read too may name another daemon: an address in them counts last
    keys = ("SocketName", "UnicastAddress", "MulticastAddress")
    own = [key for key in keys if settings.origins.get(key) != of_clients.get(key)]
    for key in set(keys).difference(own) if own else ():
        settings.values.pop(key, None)
    if settings["SocketName"] and settings["MulticastAddress"]:
        raise UsageError(f"{settings.origins['SocketName']} and "
                         f"{settings.origins['MulticastAddress']} exclude each other")
    if 0 < sum(bool(settings[key]) for key in TLS_FILES) < len(TLS_FILES):
        raise UsageError("TLS needs all of --tls-certificate, --tls-private-key and "
                         "--tls-ca-certificate")
    return settings, options


# --- Main ---------------------------------------------------------------------------------------


def local_socket(settings):
    """The path of the UNIX socket to serve, None when the daemon is to serve an address alone."""
    address = settings["UnicastAddress"] or settings["MulticastAddress"]
    return settings["SocketName"] or (None if address else f"/tmp/flom-{owner(os.getuid())}")


def open_states(settings, options, log):
    """The State, its lock taken; raises CannotServe when another daemon has the local socket."""
    durable, shared = bool(settings["StateDir"]), bool(settings["SocketName"])
    lock = local_socket(settings) and local_socket(settings) + ".lock"
    path = lock or "/tmp/flom-{}-{}-{}.lock".format(
        owner(os.getuid()), settings["UnicastAddress"] or settings["MulticastAddress"],
        settings["UnicastPort" if settings["UnicastAddress"] else "MulticastPort"])
    if durable:
        path = os.path.join(settings["StateDir"], os.path.basename(path))
    if lock:
        number = open_state(lock, shared)
        if not lock_file(number, wait=False):
            holder = State(number, False).pid
            if not options.foreground:
                raise CannotServe(f"another daemon (pid {holder}) serves {lock[:-len('.lock')]}")
            log.info(f"waiting for the daemon with pid {holder} to end")
            lock_file(number, wait=True)
        if lock == path:
            return State(number, durable)
    try:
        number = open_state(path, shared)
    except CannotServe as error:
        if durable:
            raise
        log.error(f"{error}; nothing will be remembered")
        number = None
    if number is not None and not lock_file(number, wait=False):
        number = None  # another daemon's, elsewhere on the same file system
    return State(number, durable)


def recovery_window(settings, state, rebooted):
    """How long, in s, only former holders are granted; 0 for no window."""
    if settings["RecoveryWindow"] is not None:
        return settings["RecoveryWindow"] / 1000
    if state.unclean and not rebooted:
        return 2
    if state.unclean and (settings["UnicastAddress"] or settings["MulticastAddress"]):
        return settings["TcpKeepaliveTime"] + settings["TcpKeepaliveIntvl"]
    return 0  # nobody on this host has survived its boot


def open_listeners(daemon, settings):
    """The daemon listens: on what it was given, else on its socket and its addresses."""
    daemon.listeners = [Listener(daemon, given) for given in inherited_sockets()]
    if daemon.listeners:
        return
    local, host, port = local_socket(settings), settings["UnicastAddress"], settings["UnicastPort"]
    if daemon.group and not host:
        host, port = "::" if daemon.group.family == socket.AF_INET6 else "0.0.0.0", 0
    if local:
        mode = settings["SocketMode"]
        if mode is None:
            mode = 0o666 if settings["SocketName"] else 0o600
        daemon.listeners.append(Listener(daemon, unix_socket(local, mode), local))
    if host:
        daemon.listeners.append(Listener(daemon, tcp_socket(settings, host, port)))


def prepare(settings, options, log):
    """A daemon that listens; raises CannotServe or SteppedBack."""
    pair = (int(time.time() * 1000), os.urandom(8).hex())
    if not settings["SocketName"] and "," in (settings["UnicastAddress"] or ""):
        raise CannotServe("a daemon has one address")
    state = open_states(settings, options, log)
    daemon = Daemon(settings, options, log, pair)
    Session.introduce(machine_id(), pair[1])
    if state.number is None:
        time.sleep(1 - time.time() % 1)  # tokens of two daemons in one second would be the same
    if settings["MulticastAddress"]:
        daemon.group = Group(settings, pair)
        daemon.group.elect()
    daemon.state = state
    rebooted = state.begin()
    try:
        open_listeners(daemon, settings)
    except CannotServe:
        for listener in daemon.listeners:
            listener.close()
        raise
    daemon.now = Moment()
    window = recovery_window(settings, state, rebooted)
    daemon.table = LockTable(settings["Policy"] == "first-fit", state.epoch,
                             daemon.now.mono + window if window else None, options.max_waiters)
    if state.marked:
        daemon.dates[daemon.clear_mark] = daemon.now.mono + window + QUIET
    if daemon.group:
        daemon.group.serve(daemon, daemon.listeners[-1].socket.getsockname()[1])
    if settings["MountPointVFS"] or options.metrics:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries the publisher's children
        daemon.publisher = Publisher(daemon, settings["MountPointVFS"], options.metrics)
    path = options.pid_file
    if path:
        with serving(f"cannot write {path}", daemon), open(path, "w") as file:
            file.write(f"{os.getpid()}\n")
    return daemon


def serve(settings, options):
    """Runs the daemon to its end; returns the exit status."""
    target = options.log or settings["DaemonTraceFile"] or (
        "stderr" if options.foreground else "syslog")
    traced = target == settings["DaemonTraceFile"] and not options.log
    log = Log(target if target in ("syslog", "stderr") else os.path.abspath(target),
              "debug" if traced else options.log_level,
              append=settings["AppendTraceFile"] or not traced)
    writer = None if options.foreground else detach()
    try:
        log.open()
        daemon = prepare(settings, options, log)
    except CannotServe as error:
        os.write(2, f"flomd: {error}\n".encode("utf-8", "replace"))
        report_ready(writer, 1)
        return 1
    except SteppedBack as error:
        log.info(str(error))
        report_ready(writer, 3)
        return 3
    Signals(daemon)
    log.info("serving " + " ".join(listener.label for listener in daemon.listeners))
    report_ready(writer, 0)
    notify("READY=1")
    try:
        daemon.run()
    finally:
        notify("STOPPING=1")
        daemon.close()
        if options.pid_file:
            with contextlib.suppress(OSError):
                os.unlink(options.pid_file)
    log.info("ended")
    return 0


def main(arguments=None):
    """The command flomd.py; returns the exit status."""
    forget_signals()
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write("flomd")  # the name that users of FLoM expect of ps and pgrep
    try:
        settings, options = read_options(sys.argv[1:] if arguments is None else arguments)
        for warning in settings.warnings:
            sys.stderr.write(f"flomd: {warning}\n")
        if settings["Verbose"]:
            print("\n".join(settings.lines()), flush=True)
        return serve(settings, options)
    except UsageError as error:
        sys.stderr.write(f"flomd: {error}\n")
        return 99


if __name__ == "__main__":
    sys.exit(main())
