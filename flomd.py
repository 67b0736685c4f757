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
# Words, in this sense alone:
#
#   session    one client's connection, as far as the protocol goes
#   request    what a session asks for; it is granted, queued, parked, deferred or refused
#   resource   what is locked, by its name; a tree of nodes has the name of its first level
#   holder     a request that was granted and not released yet
#   absent     a holder whose client has not come back since its daemon ended
#   waiter     a request in the queue of its resource
#   ahead      a waiter is ahead of those that came later and are incompatible with it
#   parked     waits for somebody to create the resource
#   deferred   does not want to wait, but cannot be answered before the recovery window ends
#   lane       the waiters of a resource that are alike: one mode and, in a tree, one node
#   element    what a grant carries: the word of a set, the value of a sequence, a time
#   token      the number of a grant; greater for each later one, whoever serves
#   nested     asked for under a lock, by its command; the holder of that lock is an ancestor
#   reclaim    a session that lost its daemon, or its connection, asks for the lock that it has
#   decision   what the lock table has to tell a session
#   window     the recovery window: after a crash reclaims alone are granted for a while
#   epoch      the upper half of the tokens; it grows from one daemon to the next
#   memory     what a later daemon knows of this one: who holds what
#   record     a key and a text of the memory; the leader record says who serves a quorum
#   batch      records that are stored together
#   store      where they are kept: two files, see State on disk, or etcd
#   way        how clients find the daemon: a listener, or its membership of a multicast group
#   pair       (start time, id) of a daemon, by which the candidates for a group are ordered
#   drain      to leave the clients to another daemon, and to end with the last holder
import sys

if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]  # a signal.py beside this script is not the one that is meant

import types

# Python does two things unasked that take a good part of a start.  They are left out where this
# process is ours: that of the script itself, or of a launcher, which runs Python without site, as
# no program does that imports this for its own ends.
# * It looks again and again which objects can go, and of those made at the start none can.
# * argparse has its few texts translated: that takes gettext, locale, expressions and a search for
#   files.  What is written here is English, anyway.  Who imports gettext later gets it.
if __name__ == "__main__" or sys.flags.no_site:
    import gc
    gc.set_threshold(50000)
    if "gettext" not in sys.modules:
        sys.modules["gettext"] = types.ModuleType("gettext")
        vars(sys.modules["gettext"]).update(
            gettext=str, ngettext=lambda one, many, number: one if number == 1 else many)
        try:
            import argparse
        except ImportError:
            pass  # one of a later Python, that wants more of gettext: it gets the library's below
        del sys.modules["gettext"]

import argparse
import binascii
import bisect
import collections
import contextlib
import errno
import fcntl
import functools
import heapq
import io
import itertools
import operator
import os
import re
import select
import selectors
import signal
import socket
import stat
import struct
import time

TYPE_CHECKING = False  # mypy knows it as true: names that annotations alone use
if TYPE_CHECKING:
    from io import FileIO
    from typing import (Any, Callable, Deque, Dict, Iterable, Iterator, List, OrderedDict, Tuple,
                        Union)
    Watchable = Union[socket.socket, FileIO]
    Act = Callable[[], object]
    Handler = Callable[[int], object]
    Watched = Tuple[Handler, Act]


# --- Shared with flom.py ------------------------------------------------------------------------
# ==== Shared with flom.py: begin ====
# What both scripts need stands here once, the same to the byte, since each must work without the
# other.  In this order: numbers of the protocol; the two families of errors; messages; names of
# resources; types, which say how the value of a setting is written; the table of settings; where
# values come from (files, options) and which go together; what is printed; this host and process;
# sockets and TLS.  No lock, no queue and no connection is known here.
#
# Regular expressions are compiled when they are first needed, since flom is compiled and started
# for each command.
VERSION = "1.1"
LOCK, UNLOCK, PING, DISCOVER, MANAGEMENT = 1, 2, 3, 4, 5  # verbs
OK, ENQUEUED, WAIT_RESOURCE, BUSY, CANT_WAIT, IMPOSSIBLE = 0, 1, 2, 4, 5, 6  # rc of an answer
DEADLOCK, STOPPED, LIMIT, EVICTED = 7, 8, 9, 10  # to clients of ours only
INVALID_NAME = -14
MODES = ["NL", "CR", "CW", "PR", "PW", "EX"]  # the index is the number of the mode
LONG_MODES = ["NullLock", "ConcurrentRead", "ConcurrentWrite", "ProtectedRead", "ProtectedWrite",
              "Exclusive"]
DEFAULT_RESOURCE = "_RESOURCE"  # of a command without -r
STATUS_RESOURCE = "_STATUS"  # a lock of it is answered with the status report
MOST = 2 ** 31 - 1  # the greatest number in FLoM's messages
WIDEST = 2 ** 63 - 1  # the greatest number in ours


class UsageError(Exception):
    """A wrong option, file or name: one line on stderr, status 99, nothing is run."""


class ProtocolError(Exception):
    """The peer broke the protocol: its connection is closed."""


@functools.lru_cache(maxsize=None)
def _compiled(expression):
    """A regular expression in the verbose form, compiled when it is first needed."""
    return re.compile(expression, re.ASCII | re.VERBOSE)


# Messages.  A message is an XML element `msg`; its end is the bytes </msg>.  The reader takes what
# FLoM's takes, less comments, CDATA and DOCTYPE: one expression cuts tags, one finds attributes.
# What they find is a message by three rules, each with its own words for what breaks it:
#
# 1  `msg` is around all other tags, and an end tag ends the tag that was opened last: "misplaced".
# 2  A known element comes once and an unknown one has no attributes; `msg` has a verb and a step:
#    "unexpected".  Unknown elements are skipped.
# 3  A number is a number from its least to its greatest: "is not a number from ... to ...".
MOST_TAGS = 1000  # of a message that is no report; a known one has ten, and reading takes time
END = b"</msg>"
HEADER = '<?xml version="1.0" encoding="UTF-8" ?>'
_HEADER = r"\s* (?: <\?xml \s [^<>?]* \?> )?"
_TAG = r"""
    \s* < (/?) ([A-Za-z_][-\w.]*)                                                # </ or <, name
    ((?: \s+ [A-Za-z_][-\w.]* \s* = \s* (?: "[^"<]*" | '[^'<]*' ) )*)            # attributes
    \s* (/?) >
"""
_ATTRIBUTE = r"""([A-Za-z_][-\w.]*) \s* = \s* (?: "([^"<]*)" | '([^'<]*)' )"""
_NUMBER = r"-?[0-9]{1,19}"
_ENTITY = r"& (?: \#([0-9]{1,7}) ; | \#x([0-9A-Fa-f]{1,6}) ; | (amp|lt|gt|quot|apos) ; )?"
_ENTITIES = {"amp": "&", "lt": "<", "gt": ">", "quot": '"', "apos": "'"}
_ESCAPES = {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;", ord('"'): "&quot;"}
_ELEMENTS = {"msg", "session", "resource", "answer", "network", "shutdown", "evict"}
_NUMBERS = {  # the attributes that are numbers: least, greatest
    "level": (3, 3),
    "verb": (LOCK, MANAGEMENT),
    "step": (0, 99),
    "mode": (0, 5),
    "wait": (0, 1),
    "create": (0, 1),
    "lifespan": (0, MOST),  # ms
    "quantity": (1, MOST),
    "rollback": (0, 1),
    "rc": (-MOST, MOST),
    "port": (1, 65535),
    "immediate": (0, 1),
    "progress": (0, 1),
    "life": (0, 1),
    "grace": (-1, WIDEST),  # ms; -1: as long as the holder's process lives
    "ping": (0, MOST),  # ms
    "kill": (0, MOST),  # ms
    "position": (0, MOST),
    "token": (0, WIDEST),
    "reclaim": (0, WIDEST),
    "started": (0, WIDEST),  # ms since 1970
}


def element(tag: "str", *attributes: "tuple", end: "str" = "/>") -> "str":
    """The text of one element; attributes are pairs (name, value), a value of None leaves one out.

    FLoM writes a blank before some ends: `end` takes it.
    """
    text = f"<{tag}"
    for name, value in attributes:
        if value is not None:
            text += f' {name}="{str(value).translate(_ESCAPES)}"'
    return text + end


def encode(verb: "int", step: "int", *elements: "str", **attributes: "object") -> "bytes":
    """The bytes of a message of these elements; `attributes` (ours) go on `msg` itself."""
    start = element("msg", ("level", 3), ("verb", verb), ("step", step), *attributes.items(),
                    end=">")
    inside = "".join(elements)
    return f"{HEADER}{start}{inside}</msg>".encode("ascii")


def decode(data: "bytes") -> "dict":
    """The elements of a message, {tag: {attribute: text}}, numbers as int; ProtocolError."""
    elements: "dict" = {}
    opened: "list" = []  # the tags whose end has not come
    for count, (closing, tag, attributes, empty) in enumerate(tags(data)):
        if count == MOST_TAGS:
            raise ProtocolError(f"more than {MOST_TAGS} tags")
        if closing:
            if not opened or opened.pop() != tag:
                raise ProtocolError(f"misplaced </{tag}>")
            continue
        if bool(opened) == (tag == "msg"):
            raise ProtocolError(f"misplaced <{tag}>")
        if not empty:
            opened.append(tag)
        if tag in elements or attributes and tag not in _ELEMENTS:
            raise ProtocolError(f"unexpected <{tag}>")
        if tag in _ELEMENTS:
            _read_numbers(attributes)
            elements[tag] = attributes
    _check_end(elements, opened)
    return elements


def _read_numbers(attributes):
    """Makes int of the texts that are numbers; raises ProtocolError."""
    is_number = _compiled(_NUMBER).fullmatch
    for name, text in attributes.items():
        if name in _NUMBERS:
            least, greatest = _NUMBERS[name]
            if not is_number(text) or not least <= int(text) <= greatest:
                raise ProtocolError(f"{name}: {text[:40]!r} is not a number from {least} to "
                                    f"{greatest}")
            attributes[name] = int(text)


def _check_end(elements, opened):
    """Raises ProtocolError where a message ends too early, or without what it must have."""
    if opened or "msg" not in elements:
        raise ProtocolError("misplaced end of the message")
    head = elements["msg"]
    if "verb" not in head or "step" not in head:
        raise ProtocolError("unexpected <msg> without verb or step")


def tags(data: "bytes"):
    """Yields (closing, name, {attribute: text}, empty) for each tag; raises ProtocolError.

    `closing` is "/" of </name>, `empty` is "/" of <name/>, otherwise they are "".
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ProtocolError("not UTF-8")
    position = len(HEADER)
    if not text.startswith(HEADER):
        position = _compiled(_HEADER).match(text).end()
    tag_at = _compiled(_TAG).match
    while position < len(text):
        found = tag_at(text, position)
        if not found:
            raise ProtocolError(f"unreadable: {text[position:position + 20]!r}")
        closing, name, inner, empty = found.groups()
        if closing and (inner or empty):
            raise ProtocolError(f"misplaced </{name}>")
        yield closing, name, _attributes(name, inner), empty
        position = found.end()


def _attributes(tag, text):
    """{name: text} of the attributes in a tag; raises ProtocolError."""
    if not text:
        return {}
    pairs = _compiled(_ATTRIBUTE).findall(text)
    found = {name: one or other for name, one, other in pairs}  # in quotes " or '
    if len(found) < len(pairs):
        raise ProtocolError(f"unexpected <{tag}> with an attribute twice")
    if "&" in text:
        for name in found:
            found[name] = _compiled(_ENTITY).sub(_character, found[name])
    return found


def _character(found):
    """The character that an entity stands for; a bare & is none."""
    decimal, hexadecimal, name = found.groups()
    if name:
        return _ENTITIES[name]
    code = 0
    if decimal:
        code = int(decimal)
    elif hexadecimal:
        code = int(hexadecimal, 16)
    surrogate = 0xD800 <= code < 0xE000
    if surrogate or not 0 < code < 0x110000:
        raise ProtocolError(f"unknown entity {found.group()}")
    return chr(code)


def encode_name(name: "str") -> "str":
    """A resource name in base64; bytes that are not UTF-8 stay as they are (surrogateescape)."""
    data = name.encode("utf-8", "surrogateescape")
    return binascii.b2a_base64(data, newline=False).decode()


def decode_name(text: "str") -> "str":
    """The name whose base64 is `text`; raises ProtocolError."""
    if len(text) % 4 or not re.fullmatch("[A-Za-z0-9+/]*={0,2}", text):
        raise ProtocolError(f"{text[:40]!r} is not base64")
    return binascii.a2b_base64(text).decode("utf-8", "surrogateescape")


def status_request(program: "str") -> "bytes":
    """The message by which a program asks a daemon for its status report."""
    session = element("session", ("peerid", machine_id()), ("client", f"{program}/{VERSION}"))
    resource = element("resource", ("name", encode_name(STATUS_RESOURCE)), ("mode", 0),
                       ("wait", 0), ("create", 0), ("lifespan", 0))
    return encode(LOCK, 8, session, resource)


# Names.  The name of a resource tells its kind: the whole name, where FLoM looks at each line.
_FORMS = (
    ("simple", r"_RESOURCE|[A-Za-z][A-Za-z0-9]*"),
    ("numeric", r"[A-Za-z][A-Za-z0-9]*\[[0-9]+\]"),
    ("set", r"[A-Za-z][A-Za-z0-9]*(\.[A-Za-z][A-Za-z0-9]*)+"),
    ("hierarchical", r"(/[^/\\\n]+)+"),
    ("sequence", r"_[sS]_[A-Za-z][A-Za-z0-9]*\[[0-9]+\]"),
    ("timestamp", r"_t_[%#A-Za-z][%#.:A-Za-z0-9]*\[[0-9]+\]"))
_LEAST_SIZE = {"numeric": 0, "sequence": 1, "timestamp": 1}  # a[0] is a name, and of no use
_MOST_CHARACTERS = 400  # of a name with a size


def kind_of(name: "str"):
    """The kind of the resource `name`, None when it is no resource name."""
    for kind, form in _FORMS:
        if re.fullmatch(form, name):
            right = kind not in _LEAST_SIZE or _size_is_right(kind, name)
            return kind if right else None
    return None


def _size_is_right(kind, name):
    return len(name) < _MOST_CHARACTERS and _LEAST_SIZE[kind] <= size_of(name) <= MOST


def size_of(name: "str") -> "int":
    """The number in the brackets of a numeric, sequence or timestamp name."""
    return int(name[name.rindex("[") + 1:-1])


# Types.  A type reads a text, as it stands on a command line, in a file or in a keyword, writes
# a value back, and names itself.  A new one is a class with `read`, and with `write` where str()
# does not give a text that `read` understands.
class Type:
    """How the value of a setting is written: `hint` in --help, `expected` in messages."""
    blanks_count = False  # whether blanks at the end of a value in a file belong to it
    denial = "is not"  # between a text and what was expected

    def __init__(self, hint: "str", expected: "str"):
        self.hint = hint
        self.expected = expected

    def read(self, text):
        """The value that a text means; raises ValueError: what the text is not."""
        raise NotImplementedError

    def write(self, value):
        """A text that means this value."""
        return str(value)


class Anything(Type):
    """Any text."""

    def read(self, text):
        return text


class Text(Type):
    """Any text but the empty one; the system takes none with a zero byte."""
    blanks_count = True

    def read(self, text):
        if not text or "\0" in text:
            raise ValueError(self.expected)
        return text


class Path(Text):
    """The name of a file or a directory.  It is kept as it was given, which -V shows."""

    def read(self, text):
        path = super().read(text)
        self.write(path)
        return path

    def write(self, value):
        try:
            return os.path.abspath(value)
        except OSError:
            raise ValueError("an absolute path, and the current directory is gone")


class SocketPath(Path):
    """The path of a UNIX socket, made absolute; the kernel takes 107 bytes."""

    def read(self, text):
        path = self.write(super().read(text))
        if len(os.fsencode(path)) > 107:
            raise ValueError(self.expected)
        return path


class ResourceName(Text):
    """A name that tells a kind; the default one is not to be asked for."""
    denial = "is no"

    def read(self, text):
        name = super().read(text)
        if name == DEFAULT_RESOURCE or not kind_of(name):
            raise ValueError(self._expected_of(name))
        return name

    def _expected_of(self, name):
        """What the name was to be; who has taken any text for a name is told how to write it."""
        node = f"/{name.lstrip('/')}"
        reserved = name == DEFAULT_RESOURCE or name.lower().startswith(("_s_", "_t_"))
        if reserved or "[" in name or not kind_of(node):
            return self.expected
        rule = "has letters and digits only"
        if name[0].isdigit():
            rule = "begins with a letter"
        return f"resource name: a simple name {rule}; {node!r} may hold anything"


class Number(Type):
    """A whole number, also in hexadecimal, as FLoM takes it."""

    def __init__(self, least, greatest):
        super().__init__("N", f"a number from {least} to {greatest}")
        self.least = least
        self.greatest = greatest

    def read(self, text):
        value = self.meaning(whole_number(text, self.expected))
        if not self.least <= value <= self.greatest:
            raise ValueError(self.expected)
        return value

    def meaning(self, number):
        """The value that is meant by a number."""
        return number


class Units(Number):
    """A quantity: FLoM takes 0 for not given."""

    def meaning(self, number):
        return number or 1


class Attempts(Number):
    """A number of attempts: FLoM leaves out the sign, and makes at least one."""

    def meaning(self, number):
        return abs(number) or 1


class KernelNumber(Type):
    """A number for the kernel: FLoM takes any, so what is out of range becomes the nearest."""

    def __init__(self, hint, greatest):
        super().__init__(hint, "a number")
        self.greatest = greatest

    def read(self, text):
        number = whole_number(text, self.expected)
        return min(max(1, number), self.greatest)


def whole_number(text: "str", expected: "str") -> "int":
    """The number that is written in a text; raises ValueError(expected)."""
    if not re.fullmatch("[+-]?[0-9]{1,99}|0[xX][0-9a-fA-F]{1,99}", text):
        raise ValueError(expected)
    if "x" in text.lower():
        return int(text, 16)
    return int(text)


UNITS = {"ms": 1, "s": 1000, "m": 60000, "h": 3600000}  # ms
# No fraction is finer than 1 ms: a short time must not become 0, which often means "never".
_TIME = r"""
    ( [+-]? [0-9]{1,10} ) (ms)
  | ( [+-]? [0-9]{1,10} (?: \.[0-9]{1,3} )? ) ([smh])
"""


class Time(Type):
    """A time: ms, as in FLoM, or a number with a unit.  `special`: what -1 and 0 mean, if told."""

    def __init__(self, least, special="", greatest=MOST):
        super().__init__("MS", f"a time (5000, 5s, 1m{special})")
        self.least = least
        self.greatest = greatest

    def read(self, text):
        value = self.meaning(self._milliseconds(text))
        if not self.least <= value <= self.greatest:
            raise ValueError(f"from {self.least} to {self.greatest} ms")
        return value

    def meaning(self, milliseconds):
        """The value that is meant by a number of ms."""
        return milliseconds

    def _milliseconds(self, text):
        found = _compiled(_TIME).fullmatch(text)
        if not found:
            return whole_number(text, self.expected)
        number, unit = filter(None, found.groups())
        return round(float(number) * UNITS[unit])


class Span(Time):
    """A length of time: FLoM leaves out the sign."""

    def meaning(self, milliseconds):
        return abs(milliseconds)


class Words(Type):
    """One of some words."""

    def __init__(self, *words):
        others = ", ".join(words[:-1])
        super().__init__("|".join(words), f"{others} or {words[-1]}")
        self.words = words

    def read(self, text):
        if text not in self.words:
            raise ValueError(self.expected)
        return text


class Flag(Type):
    """Yes or no."""
    _YES = ("yes", "y", "true", "1", "on")
    _NO = ("no", "n", "false", "0", "off")

    def read(self, text):
        word = text.lower()
        if word not in self._YES + self._NO:
            raise ValueError(self.expected)
        return word in self._YES

    def write(self, value):
        return "yes" if value else "no"


class Mode(Type):
    """A lock mode by its short or its long name; the value is its number."""

    def read(self, text):
        for names in (MODES, LONG_MODES):
            for number, name in enumerate(names):
                if text.upper() == name.upper():
                    return number
        raise ValueError(self.expected)

    def write(self, value):
        return MODES[value]


class Signal(Text):
    """A signal by its name, with or without SIG, or its number; the value is its number."""

    def read(self, text):
        for number, name in signal_names().items():
            if text.upper() in (name, name[len("SIG"):], str(number)):
                return number
        raise ValueError(self.expected)

    def write(self, value):
        return signal_names()[value]


class Urls(Text):
    """The members of an etcd cluster, as one text: a comma between two."""
    blanks_count = False

    def read(self, text):
        for url in super().read(text).split(","):
            found = _compiled(_URL).fullmatch(url)
            if not found or not 1 <= int(found["port"] or 1) <= 65535:
                raise ValueError(self.expected)
        return text


_URL = r"""
    https?://
    (?: [A-Za-z0-9._-]+ | \[ [0-9A-Fa-f:.]+ (?: %[A-Za-z0-9._-]+ )? \] )  # the host
    (?: : (?P<port> [0-9]{1,5} ) )?
"""


class Prefix(Text):
    """How the keys in an etcd cluster begin."""
    blanks_count = False

    def read(self, text):
        if not re.fullmatch("/([!-.0-~]+/)+", super().read(text)):
            raise ValueError(self.expected)
        return text


class Octal(Type):
    """The mode of a file."""

    def read(self, text):
        if not re.fullmatch("0?[0-7]{3}", text):
            raise ValueError(self.expected)
        return int(text, 8)

    def write(self, value):
        return f"{value:04o}"


@functools.lru_cache(maxsize=None)
def signal_names() -> "dict":
    """{number: name} of the signals of this system."""
    names = {16: "SIGSTKFLT"}  # Linux; Python knows it from 3.11 on
    names.update((int(number), number.name) for number in signal.Signals)
    return names


# Settings.  One row for each, in the order of -V.  A row is all that a new setting needs: option,
# key in a file, keyword in Python, -V, and the hand-over to a daemon come of it.
CLIENT = "client"  # an option of flom.py
DAEMON = "daemon"  # an option of flomd.py
BOTH = "client daemon"  # flom.py hands it on to a daemon that it starts


class Setting:
    """One setting.

    group, key   where it stands in a file: [group], key=value; the key is its name in the code
    long, short  its options, --long and -short; not each has a short one
    type         how its value is written: a Type
    default      its value when nobody has set it; None where that depends on something else
    users        CLIENT, DAEMON or BOTH
    help         the line of --help
    switch       whether its option has no value, and means yes
    many         whether each option adds a value; its value is a tuple
    """

    def __init__(self, group, key, long, type, default, users, help, short="", switch=False,
                 many=False):
        self.group = group
        self.key = key
        self.long = long
        self.short = short
        self.type = type
        self.default = default
        self.users = users
        self.help = help
        self.switch = switch
        self.many = many

    def names(self):
        """Its options as they are typed."""
        if self.short:
            return [f"-{self.short}", f"--{self.long}"]
        return [f"--{self.long}"]

    def options(self, value):
        """The options that give it this value: one, or none for a switch that is off."""
        if not self.switch:
            return [f"--{self.long}={self.type.write(value)}"]
        return [f"--{self.long}"] if value else []

    def explained(self, default):
        """The line of --help, with a default, the value that it has when nobody sets it."""
        if self.switch or default in (None, ()):
            return self.help
        return f"{self.help} (default {self.type.write(default)})"

    def shown(self, value):
        """The value as -V shows it: numbers bare, text in quotes."""
        if self.many:
            value = ";".join([self.type.write(one) for one in sorted(value)])
        if isinstance(value, int):
            return f"{value:d}"
        return f"'{value or ''}'"


HELP_GROUPS = {  # the groups of --help, in the order of need, and their titles
    "Running": "How it runs",
    "Resource": "The lock",
    "Monitor": "While the command waits and runs",
    "Orders": "Reports and orders",
    "Daemon": "The daemon",
    "Quorum": "Several daemons that are one service",
    "Network": "Network",
    "TLS": "TLS",
    "Trace": "Logs",
    "General": "General",
}
ANYTHING = Anything("TEXT", "a text")
FILE = Path("FILE", "a file name")
FOLDER = Path("DIR", "a directory name")
ADDRESS = Text("ADDRESS", "an address")
FLAG = Flag("yes|no", "yes or no (y n true false 1 0 on off)")
PORT = Number(1, 65535)
SETTINGS = [
    Setting("Trace", "DaemonTraceFile", short="t", long="daemon-trace-file", type=FILE,
            default=None, users=BOTH, help="log of the daemon that is started"),
    Setting("Trace", "CommandTraceFile", short="T", long="command-trace-file", type=FILE,
            default=None, users=CLIENT, help="log of this command"),
    Setting("Trace", "AppendTraceFile", long="append-trace-file", type=FLAG,
            default=False, users=BOTH, help="append to the logs"),
    Setting("Trace", "Verbose", short="V", long="verbose", type=FLAG, switch=True,
            default=False, users=BOTH, help="print the settings, and what happens"),
    Setting("Resource", "Name", short="r", long="resource-name",
            type=ResourceName("NAME", "resource name (NAME NAME[N] A.B.C /A/B _s_NAME[N] "
                              f"_S_NAME[N] _t_FORMAT[N]; N from 1 to {MOST})"),
            default=DEFAULT_RESOURCE, users=CLIENT,
            help="what to lock; see the kinds of names below"),
    Setting("Resource", "Timeout", short="o", long="resource-timeout",
            type=Time(-MOST, "; -1 waits for ever, 0 does not wait"),
            default=-1, users=CLIENT, help="how long to wait; 0: not at all, -1: for ever"),
    Setting("Resource", "Quantity", short="q", long="resource-quantity", type=Units(1, MOST),
            default=1, users=CLIENT, help="units of a numeric resource"),
    Setting("Resource", "LockMode", short="l", long="lock-mode",
            type=Mode("MODE", f"a lock mode ({' '.join(MODES + LONG_MODES)})"),
            default=MODES.index("EX"), users=CLIENT,
            help="NL CR CW PR PW or EX, also by their long names"),
    Setting("Resource", "Create", short="e", long="resource-create", type=FLAG,
            default=True, users=CLIENT, help="create the resource if it does not exist"),
    Setting("Resource", "IdleLifespan", short="i", long="resource-idle-lifespan", type=Span(0),
            default=0, users=CLIENT, help="how long it stays when nobody uses it; 0: 2 s"),
    Setting("Daemon", "SocketName", short="s", long="socket-name",
            type=SocketPath("PATH", "a path of at most 107 bytes"),
            default=None, users=BOTH, help="UNIX socket (default /tmp/flom-LOGIN)"),
    Setting("Daemon", "Lifespan", short="d", long="daemon-lifespan",
            type=Time(-MOST, "; -1 is for ever, 0 starts no daemon"),
            default=5000, users=BOTH,
            help="how long it stays unused; -1: for ever, 0: start none"),
    Setting("Daemon", "UnicastAddress", short="a", long="unicast-address", type=ADDRESS,
            default=None, users=BOTH,
            help="of the daemon, or several, as in db1,db2"),
    Setting("Daemon", "UnicastPort", short="p", long="unicast-port", type=PORT,
            default=28015, users=BOTH, help="TCP port of the daemon"),
    Setting("Daemon", "MulticastAddress", short="A", long="multicast-address", type=ADDRESS,
            default=None, users=BOTH, help="group in which the daemon is found"),
    Setting("Daemon", "MulticastPort", short="P", long="multicast-port", type=PORT,
            default=28015, users=BOTH, help="UDP port of the group"),
    Setting("Daemon", "MountPointVFS", short="m", long="mount-point-vfs", type=FOLDER,
            default=None, users=BOTH, help="where the daemon shows its state as files"),
    Setting("Monitor", "IgnoredSignals", long="ignore-signal", many=True,
            type=Signal("SIGNAL", "a signal that --signal-list lists"),
            default=(), users=CLIENT, help="neither end by it nor pass it on; repeatable"),
    Setting("Network", "NetworkInterface", short="n", long="network-interface",
            type=Text("NAME", "the name of a network interface"),
            default=None, users=BOTH, help="for multicast and IPv6 link-local addresses"),
    Setting("Network", "DiscoveryAttempts", short="D", long="discovery-attempts",
            type=Attempts(1, MOST),
            default=2, users=BOTH, help="how often a group is asked"),
    Setting("Network", "DiscoveryTimeout", short="I", long="discovery-timeout", type=Span(0),
            default=500, users=BOTH, help="how long it may take to answer"),
    Setting("Network", "DiscoveryTTL", long="discovery-ttl", type=Number(0, 255),
            default=1, users=BOTH, help="hops that questions go"),
    Setting("Network", "TcpKeepaliveTime", long="tcp-keepalive-time",
            type=KernelNumber("S", 32767),
            default=60, users=BOTH, help="seconds to the first probe"),
    Setting("Network", "TcpKeepaliveIntvl", long="tcp-keepalive-intvl",
            type=KernelNumber("S", 32767),
            default=10, users=BOTH, help="seconds between probes"),
    Setting("Network", "TcpKeepaliveProbes", long="tcp-keepalive-probes",
            type=KernelNumber("N", 127),
            default=6, users=BOTH, help="probes in vain that end a connection"),
    Setting("TLS", "TlsCertificate", long="tls-certificate", type=FILE,
            default=None, users=BOTH, help="PEM file of the certificate"),
    Setting("TLS", "TlsPrivateKey", long="tls-private-key", type=FILE,
            default=None, users=BOTH, help="PEM file of its key"),
    Setting("TLS", "TlsCaCertificate", long="tls-ca-certificate", type=FILE,
            default=None, users=BOTH, help="PEM file of the CA"),
    Setting("TLS", "TlsCheckPeerId", long="tls-check-peer-id", type=FLAG,
            default=False, users=BOTH, help="the peer's certificate must name its id"),
    Setting("Daemon", "SocketMode", long="socket-mode",
            type=Octal("MODE", "an octal mode such as 0600"),
            default=None, users=DAEMON, help="of the socket (default 0600, with -s 0666)"),
    Setting("Daemon", "Policy", long="policy", type=Words("fair", "first-fit"),
            default="fair", users=BOTH, help="who is granted next"),
    Setting("Daemon", "RecoveryWindow", long="recovery-window", type=Time(0),
            default=None, users=BOTH, help="how long only former holders are granted"),
    Setting("Daemon", "StateDir", long="state-dir", type=FOLDER,
            default=None, users=BOTH, help="where the daemon keeps its state, synced"),
    Setting("Daemon", "AllowRemoteShutdown", long="allow-remote-shutdown", type=FLAG, switch=True,
            default=False, users=BOTH, help="obey -x, -X and --evict of any host"),
    Setting("Daemon", "MaxResources", long="max-resources", type=Number(1, MOST),
            default=1000000, users=DAEMON, help="limit of resources"),
    Setting("Quorum", "EtcdUrls", long="etcd",
            type=Urls("URL,...", "http or https URLs without user, path and query, such as "
                      "http://10.0.0.1:2379, with commas between them"),
            default=None, users=DAEMON, help="members of the cluster that decides who serves"),
    Setting("Quorum", "EtcdPrefix", long="etcd-prefix",
            type=Prefix("/flom/NAME/", "the beginning of keys, such as /flom/NAME/"),
            default=None, users=DAEMON, help="of its keys there"),
    Setting("Quorum", "EtcdState", long="etcd-state", type=FILE,
            default=None, users=DAEMON, help="where it notes which cluster it is"),
    Setting("Quorum", "EtcdUser", long="etcd-user", type=Text("NAME", "a name"),
            default=None, users=DAEMON, help="who it is there"),
    Setting("Quorum", "EtcdPasswordFile", long="etcd-password-file", type=FILE,
            default=None, users=DAEMON, help="file with the password"),
    Setting("Quorum", "EtcdCa", long="etcd-ca", type=FILE,
            default=None, users=DAEMON, help="PEM file of its CA"),
    Setting("Quorum", "EtcdCertificate", long="etcd-certificate", type=FILE,
            default=None, users=DAEMON, help="PEM file of a certificate for it"),
    Setting("Quorum", "EtcdPrivateKey", long="etcd-private-key", type=FILE,
            default=None, users=DAEMON, help="PEM file of its key"),
    Setting("Quorum", "EtcdTtl", long="etcd-ttl", type=Time(5000, greatest=60000),
            default=10000, users=DAEMON, help="how long until another daemon takes over"),
    Setting("Quorum", "EtcdCompact", long="etcd-compact", type=FLAG, switch=True,
            default=False, users=DAEMON, help="compact etcd, which is flom's alone"),
    Setting("Monitor", "OnLockLoss", long="on-lock-loss", type=Words("warn", "term", "ignore"),
            default="warn", users=CLIENT, help="what the command gets when the lock is lost"),
    Setting("Monitor", "KillAfter", long="kill-after", type=Time(0),
            default=5000, users=CLIENT, help="how long from TERM to KILL"),
    Setting("Monitor", "Deadlock", long="deadlock", type=Words("fail", "wait", "reuse"),
            default="fail", users=CLIENT, help="when it would wait for a lock that it runs under"),
    Setting("Monitor", "Quiet", long="quiet", type=FLAG, switch=True,
            default=False, users=CLIENT, help="no line for busy, timeout and 96"),
    Setting("Monitor", "Progress", long="progress", type=FLAG,
            default=None, users=CLIENT,
            help="tell what it waits for (default: on a terminal, without -V)"),
    Setting("Monitor", "SetEnv", long="set-env", type=FLAG,
            default=True, users=CLIENT, help="export FLOM_RESOURCE and others to the command"),
    Setting("Monitor", "ElementArgument", long="element-argument", type=FLAG,
            default=True, users=CLIENT, help="append the element to the command"),
    Setting("Monitor", "InheritConnection", long="inherit-connection", type=FLAG,
            default=True, users=CLIENT, help="keep the lock if flom is killed"),
    Setting("Monitor", "MinHold", long="min-hold", type=Time(0),
            default=0, users=CLIENT, help="how long to keep the lock at least"),
    Setting("Monitor", "BusyStatus", long="busy-status", type=Number(0, 255),
            default=98, users=CLIENT, help="exit status for busy and timeout"),
]
SETTINGS_BY_PATH = {(setting.group, setting.key): setting for setting in SETTINGS}
TLS_FILES = ("TlsCertificate", "TlsPrivateKey", "TlsCaCertificate")


# Files of settings are read as GKeyFile reads them, which FLoM uses: blanks before a key and
# around the `=` do not count, those at the end of a text do; `[de]` behind a key makes it another
# key.
FILES = ("/etc/flom.conf", "/usr/local/etc/flom.conf", "~/.flom")
LONGEST_FILE = 1000000  # bytes; more are no settings
_BLANKS = " \t\f\r"
_GROUP = r"\[ ([^][]+) \] [ \t]*"
_KEY_AND_VALUE = r"""
    ([^][= \t\f\r] [^][=]* (?: \[ [^][=]* \] )?)  # the key, perhaps with blanks at its end
    [ \t\f\r]* = [ \t\f\r]* (.*)
"""
_ESCAPED = {"s": " ", "n": "\n", "t": "\t", "r": "\r", "\\": "\\", ";": ";", "": ""}


def files_of_settings() -> "list[str]":
    """The paths of the files of the system and, if the user has a home, of the user.

    Without one the `~` would stay: a folder of that name here may be anybody's.
    """
    paths = []
    for path in FILES:
        with contextlib.suppress(KeyError):  # an early Python 3.6 or 3.7
            path = os.path.expanduser(path)
        if not path.startswith("~"):
            paths.append(path)
    return paths


def settings_text(path: "str", required: "bool") -> "str":
    """The text of a file of settings; raises OSError.

    One that is not asked for must be a regular file: a FIFO or a device would make flom wait.
    """
    def opener(name, flags):
        if not required:
            flags |= os.O_NONBLOCK | os.O_NOCTTY
        return os.open(name, flags)
    with open(path, "rb", opener=opener) as file:
        if not required and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        data = file.read(LONGEST_FILE + 1)
    if len(data) > LONGEST_FILE:
        raise OSError(errno.EFBIG, f"it is longer than {LONGEST_FILE} bytes")
    return data.decode("utf-8", "surrogateescape")


def entries_of_file(text: "str"):
    """Yields (line number, group, key, text) of a file; the key is "" where the line is wrong."""
    group = ""
    for number, line in enumerate(text.split("\n"), 1):
        line = re.sub("\r$", "", line).lstrip(_BLANKS)
        if not line or line.startswith("#"):
            continue
        head = _compiled(_GROUP).fullmatch(line)
        if head:
            group = head.group(1)
            continue
        found = _compiled(_KEY_AND_VALUE).fullmatch(line)
        if found:
            key, value = found.groups()
            yield number, group, key.rstrip(_BLANKS), value
        else:
            yield number, group, "", line


def texts_of_value(setting: "Setting", text: "str", folder: "str") -> "list":
    """The texts that a value in a file stands for; a TLS file is looked for in `folder` first."""
    if setting.many:
        parts = re.findall(r"(?:[^\\;]|\\.?)+", text)
        return [re.sub(r"\\([sntr\\;]|$)", _unescape, part) for part in parts]
    if not setting.type.blanks_count:
        text = text.rstrip(_BLANKS)
    text = re.sub(r"\\([sntr\\]|$)", _unescape, text)
    beside = os.path.join(folder, text)
    if setting.group == "TLS" and os.path.exists(beside):
        return [beside]
    return [text]


def _unescape(found):
    return _ESCAPED[found.group(1)]


class Settings:
    """The settings by key, each with its origin; one that nobody has set has its default.

    Where a value comes from, a file, an option or a keyword, `set` alone reads it; so it is judged
    alike, and what is wrong is told in the same words.  Later values replace earlier ones.
    """

    def __init__(self, **defaults: "object"):
        self.values: "dict" = {}  # by key: what has been set
        self.origins: "dict" = {}  # by key: option, keyword, or file and line
        self.warnings: "list" = []  # lines
        self.files: "list" = []  # those that were read
        self.skipped: "tuple" = ()  # groups that files may have for another program
        self.defaults = {setting.key: setting.default for setting in SETTINGS}
        self.defaults.update(defaults)

    def __getitem__(self, key):
        return self.values.get(key, self.defaults[key])

    def wrong(self, message: "str"):
        """What is done about an error: UsageError."""
        raise UsageError(message)

    def set(self, setting: "Setting", texts: "list", origin: "str"):
        """Sets from texts (the last counts, all for a list); raises UsageError: origin and text.

        A signal that is unknown is a warning: FLoM says nothing of it.
        """
        values = []
        for text in texts:
            try:
                values.append(setting.type.read(text))
            except ValueError as error:
                message = f"{origin}: {text!r} {setting.type.denial} {error}"
                if isinstance(setting.type, Signal):
                    self.warnings.append(f"{message}; ignored")
                else:
                    self.wrong(message)
        if setting.many:
            self.values[setting.key] = tuple(values)
        elif values:
            self.values[setting.key] = values[-1]
        else:
            return  # `wrong` has kept it
        self.origins[setting.key] = origin

    def take_options(self, given: "dict"):
        """Sets what a command line says, {key: [(option, text)]}; raises UsageError."""
        for setting in SETTINGS:
            typed = given.get(setting.key, [])
            if typed and setting.many:
                last, _ = typed[-1]
                self.set(setting, [text for _, text in typed], last)
                continue
            for option, text in typed:
                self.set(setting, [text], option)

    def read_files(self):
        """Takes over the files of the system and of the user; raises UsageError."""
        for path in files_of_settings():
            self.read_file(path)

    def read_file(self, path: "str", required: "bool" = False):
        """Takes over a file of settings, in the syntax of GKeyFile; raises UsageError.

        One that is not required and cannot be read is a warning: HOME may be another user's.
        """
        try:
            content = settings_text(path, required)
        except OSError as error:
            if required:
                self.wrong(f"{path}: {error.strerror}")
            elif error.errno not in (errno.ENOENT, errno.ENOTDIR):
                self.warnings.append(f"{path}: {error.strerror}; it is not read")
            return
        self.files.append(path)
        for number, group, key, text in entries_of_file(content):
            place = f"{path}:{number}"
            if key:
                self._take_entry(place, group, key, text, os.path.dirname(path))
            else:
                self.wrong(f"{place}: {text!r} is not [Group] or Key=value")

    def _take_entry(self, place, group, key, text, folder):
        if group in self.skipped:
            return
        origin = f"{place}: [{group}]/{key}"
        setting = SETTINGS_BY_PATH.get((group, key))
        if not setting:
            self.warnings.append(f"{origin}: unknown key, ignored")
        elif text:  # an empty value is none
            self.set(setting, texts_of_value(setting, text, folder), origin)

    def fix_paths(self):
        """Makes relative names of files absolute, for a process that will change its directory."""
        for setting in SETTINGS:
            if isinstance(setting.type, Path) and setting.key in self.values:
                self.values[setting.key] = setting.type.write(self.values[setting.key])

    def tell(self, program: "str"):
        """Prints the warnings on stderr and, with -V, the settings on stdout."""
        for warning in self.warnings:
            put(f"{program}: warning: {warning}", sys.stderr)
        if self["Verbose"]:
            put("\n".join(self.lines()), sys.stdout)

    def lines(self):
        """The settings as -V prints them."""
        for setting in SETTINGS:
            yield f"[{setting.group}]/{setting.key}={setting.shown(self[setting.key])}"


class Examined(Settings):
    """Settings for --check-config: goes on after an error, and keeps all of them."""

    def __init__(self, **defaults: "object"):
        super().__init__(**defaults)
        self.problems: "list" = []  # lines

    def wrong(self, message: "str"):
        self.problems.append(message)

    def examine(self, *checks):
        """Calls each check with these settings and keeps what it raises, a UsageError."""
        for check in checks:
            try:
                check(self)
            except UsageError as error:
                self.problems.append(str(error))

    def report(self, program: "str") -> "int":
        """Says which files were read, on stderr what is wrong, and "ok" where nothing is; returns
        the exit status."""
        for path in self.files:
            show(f"read {path}")
        for line in self.problems + self.warnings:
            put(f"{program}: {line}", sys.stderr)
        if self.problems:
            return 99
        show("ok")
        return 0


# Rules between settings.
NOT_WITH_SOCKET = {  # a client looks in one place; a daemon can serve a socket and an address
    CLIENT: ("UnicastAddress", "MulticastAddress"), DAEMON: ("MulticastAddress",)}


def check_rules(settings: "Settings", user: "str"):
    """Raises UsageError for settings of a user, CLIENT or DAEMON, that exclude or need each other.
    """
    origins = settings.origins
    for partner in NOT_WITH_SOCKET[user]:
        if settings["SocketName"] and settings[partner]:
            settings.wrong(f"{origins['SocketName']}: not together with {origins[partner]}: "
                           "a daemon is local or in the network")
    given = [key for key in TLS_FILES if settings[key]]
    if given and len(given) < len(TLS_FILES):
        settings.wrong(f"{origins[given[0]]}: TLS wants all of --tls-certificate, "
                       "--tls-private-key and --tls-ca-certificate")


def interface_index(settings: "Settings") -> "int":
    """The index of the network interface wanted, 0 for none; raises UsageError."""
    name = settings["NetworkInterface"]
    if not name:
        return 0
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise UsageError(f"{settings.origins['NetworkInterface']}: {name!r} is not "
                         "a network interface of this host")


# What is printed.
def plain(text: "str", length: "int" = 500) -> "str":
    """`text` as an attribute of ours may hold it: printable ASCII, cut to a length."""
    return re.sub("[^ -~]", "?", text[:length])


def visible(text: "str") -> "str":
    """`text` in one line that a terminal shows and does not obey, whoever has written it."""
    if text.isprintable():
        return text
    return "".join([_visible_character(char) for char in text])


def _visible_character(char):
    if char.isprintable():
        return char
    return char.encode("unicode_escape").decode()


def hhmmss(seconds: "float") -> "str":
    """A time of so many seconds as HH:MM:SS; one that has not begun yet is 00:00:00."""
    minutes, second = divmod(max(0, int(seconds)), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour:02d}:{minute:02d}:{second:02d}"


def put(text: "str", stream):
    """Writes lines, whatever the stream's encoding; only what is printable comes through.

    No job ends because a stream is closed, broken or full: what is wrong with it is returned.
    """
    if not stream:
        return None
    if not text.isprintable():
        text = re.sub("[^\n\t]+", lambda part: visible(part.group()), text)
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        print(text, file=stream, flush=True)
    except OSError as error:
        return error
    return None


def show(text: "str"):
    """Writes a line that was asked for to stdout; raises UsageError when it cannot be written.

    Where the reader has gone the process ends by SIGPIPE, as any C program.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    error = put(text, sys.stdout)
    if error:
        raise UsageError(f"cannot write to stdout: {error.strerror}")


# Options.  argparse takes a command line apart; what it does unasked is switched off.
class _Option(argparse.Action):
    """An option that calls `act` with the option as it was typed and the text of its value."""

    def __init__(self, act, **options):
        super().__init__(default=argparse.SUPPRESS, **options)
        self.act = act

    def __call__(self, parser, namespace, values, option_string=None):
        text = "" if self.nargs == 0 else values
        self.act(option_string, text)


class _Row:
    """An option that argparse gets when it is needed; its parts are those of Parser.add."""

    def __init__(self, group, names, help, act, hint):
        self.group = group
        self.names = names
        self.help = help
        self.act = act
        self.hint = hint

    def add_to(self, parser):
        """Gives it to a parser of argparse, or to a group of one."""
        shape = {"metavar": self.hint} if self.hint else {"nargs": 0}
        parser.add_argument(*self.names, action=_Option, act=self.act, help=self.help, **shape)


def _possible_options(arguments):
    """The options that may be among the arguments: too many, since some of the words are values or
    the command's, and `-Vx` may be two options as well as one with a value."""
    found = set()
    for word in arguments:
        if word == "--":
            break
        if word.startswith("--"):
            found.add(word.partition("=")[0])
        elif word.startswith("-"):
            found.update([f"-{letter}" for letter in word])
    return found


class _NegativeTime:
    """What argparse takes for a value though it begins as an option does; compiled when needed."""

    @staticmethod
    def match(text):
        return re.match("-[0-9.]", text)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with negative times, and with errors as UsageError."""

    def __init__(self, usage: "str", closing: "str" = "", **defaults: "object"):
        """`closing` is what --help ends with, `defaults` those that differ from the table's."""
        super().__init__(usage=usage, add_help=False, formatter_class=_help_format)
        self.closing = closing
        self.defaults = defaults
        self._negative_number_matcher = _NegativeTime()  # type: ignore[assignment]
        self.options: "list[_Row]" = []

    def add(self, group: "str", names: "list", help: "str", act, hint: "str" = ""):
        """Adds an option to one of HELP_GROUPS; `hint` names its value, "": it has none.

        `act` is called with the option as it was typed, and with the text of its value.
        """
        self.options.append(_Row(group, names, help, act, hint))

    def parse(self, arguments: "list") -> "list":
        """Calls what each option does; returns the words behind the options; UsageError.

        argparse takes a while for an option, so it gets only those that are there.
        """
        there = _possible_options(arguments)
        for option in self.options:
            if not there.isdisjoint(option.names):
                option.add_to(self)
        self.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
        words = self.parse_args(arguments).words
        if words and words[0] == "--":
            return words[1:]
        if words and _NegativeTime.match(words[0]):
            raise UsageError(f"{words[0]!r} is not an option")
        return words

    def help(self) -> "str":
        """What --help prints, with all options, in groups."""
        whole = argparse.ArgumentParser(usage=self.usage, add_help=False,
                                        formatter_class=_help_format)
        # From Python 3.14 on help has escape sequences on a terminal.
        whole.color = False  # type: ignore[attr-defined]
        explained = {f"--{setting.long}": setting.explained(
            self.defaults.get(setting.key, setting.default)) for setting in SETTINGS}
        for name, title in HELP_GROUPS.items():
            group = whole.add_argument_group(title)
            for option in self.options:
                if option.group == name:
                    option.help = explained.get(option.names[-1], option.help)
                    option.add_to(group)
        return whole.format_help() + self.closing

    def error(self, message):
        for pattern, ours in _ARGPARSE_SAYS:
            message = re.sub(pattern, ours, message, flags=re.DOTALL)
        raise UsageError(visible(message))

    def _get_option_tuples(self, option_string):
        # allow_abbrev=False would break bundles such as -xV on Python 3.6 and 3.7.
        if option_string.startswith("--"):
            return []
        return super()._get_option_tuples(option_string)


# What argparse says is wrong, and what our errors say.
_ARGPARSE_SAYS = (
    ("^argument ([^ ]+): expected one argument$", r"\1: no value is given"),
    ("^argument ([^ ]+): ignored explicit argument (.*)$",
     r"\1: \2 is not expected: the option has no value"),
    ("^unrecognized arguments: ([^ ]+).*$", r"'\1' is not an option that --help lists"))


def _help_format(prog):
    return argparse.HelpFormatter(prog, 2, 32, 79)  # without a width it asks shutil


def keeping(options, name: "str", type: "Type"):
    """What an option does that keeps its value, read by a type, as an attribute of `options`."""
    def act(option, text):
        try:
            setattr(options, name, type.read(text))
        except ValueError as error:
            raise UsageError(f"{option}: {text!r} is not {error}")
    return act


def switching(options, name: "str"):
    """What an option without a value does: sets an attribute of `options` to True."""
    def act(option, text):
        setattr(options, name, True)
    return act


def printing(make_text):
    """What an option does that prints a text and ends the program."""
    def act(option, text):
        show(make_text())
        raise SystemExit(0)
    return act


def add_basics(parser: "Parser", options, program: "str"):
    """Gives a parser -c, which sets `config_file` of `options`, -h and -v."""
    parser.add("General", ["-c", "--config-file"], "read this file of settings after the others",
               keeping(options, "config_file", FILE), "FILE")
    parser.add("General", ["-h", "--help"], "show this and end", printing(parser.help))
    parser.add("General", ["-v", "--version"], "show the version and end",
               printing(lambda: f"{program} {VERSION}"))


def add_settings(parser: "Parser", user: "str", given: "dict"):
    """Gives a parser the options of the settings that a user, CLIENT or DAEMON, has.

    What is given goes to {key: [(option as it was typed, text)]}.
    """
    for setting in SETTINGS:
        if user in setting.users:
            act = functools.partial(_collect, given, setting)
            hint = "" if setting.switch else setting.type.hint
            parser.add(setting.group, setting.names(), setting.help, act, hint)


def _collect(given, setting, option, text):
    if setting.switch:
        text = "yes"
    given.setdefault(setting.key, []).append((option, text))


# This host, this process.
def machine_id() -> "str":
    """The id of this host, 32 hex digits; where it has none, one derived from its name."""
    for path in ("/var/lib/dbus/machine-id", "/etc/machine-id"):
        with contextlib.suppress(OSError, ValueError), open(path) as file:
            return f"{int(file.read(), 16):032x}"
    import hashlib
    return hashlib.sha256(os.fsencode(os.uname().nodename)).hexdigest()[:32]


def user_name(uid: "int") -> "str":
    """The login name of a user, the number where there is none; a directory may be slow."""
    import pwd
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


_kept_name = functools.lru_cache(maxsize=None)(user_name)


def login() -> "str":
    """The login name of the user of this process, asked for once."""
    return _kept_name(os.getuid())


def default_socket() -> "str":
    """The path of the UNIX socket of this user's daemon, FLoM's."""
    return f"/tmp/flom-{login()}"


def name_process(name: "str"):
    """Names this process for ps and pgrep, where the system can (/proc)."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write(name)


# Sockets and TLS.
def show_address(address: "tuple") -> "str":
    """HOST:PORT or [HOST]:PORT of the address of a TCP or UDP socket."""
    numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
    host, port = socket.getnameinfo(address, numeric)
    if ":" in host:
        return f"[{host}]:{port}"
    return f"{host}:{port}"


def tune(connection: "socket.socket", idle: "int", interval: "int", probes: "int"):
    """Sets TCP_NODELAY and keepalive (s, s, probes), as far as the platform has them."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_NODELAY": 1, "TCP_KEEPIDLE": idle, "TCP_KEEPINTVL": interval,
               "TCP_KEEPCNT": probes}
    for name, value in options.items():
        with contextlib.suppress(AttributeError, OSError):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def aim(sender: "socket.socket", hops: "int", interface: "int"):
    """Says how many hops the datagrams of a socket to a group go, and through which interface.

    `interface` is its index; with 0 the system chooses.
    """
    six = sender.family == socket.AF_INET6
    if six:
        sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, hops)
    else:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, hops)
    if interface and six:
        sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, interface)
    elif interface:
        ip_mreqn = bytes(8) + interface.to_bytes(4, sys.byteorder)
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, ip_mreqn)


def credentials(connection: "socket.socket"):
    """(pid, uid) of the peer of a UNIX socket; (None, None) where the system does not tell."""
    if connection.family != socket.AF_UNIX:
        return None, None
    return local_credentials(connection)


def local_credentials(connection: "socket.socket"):
    """The same of a socket that is known to be a UNIX socket: to ask for its family takes long,
    since Python makes an enum of that."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None, None
    ucred = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, _ = memoryview(ucred).cast("I")
    return pid, uid


def common_name(certificate: "dict"):
    """The common name in a certificate as ssl reads it; None without exactly one."""
    names = []
    for part in certificate.get("subject", ()):
        names += [value for key, value in part if key == "commonName"]
    return names[0] if len(names) == 1 else None


def tls_context(settings: "Settings", server: "bool" = False):
    """The context of one side of mutual TLS, 1.2 or newer; None without all files; UsageError.

    Who may talk is said by the CA and by the peer id: FLoM's certificates bear no host names.
    """
    if not all(settings[key] for key in TLS_FILES):
        return None
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    if hasattr(context, "minimum_version"):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:  # Python 3.6
        context.options |= ssl.OP_NO_SSLv3 | ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    certificate, key = settings["TlsCertificate"], settings["TlsPrivateKey"]
    reading = f"{certificate!r} with {key!r}"
    try:
        context.load_cert_chain(certificate, key, password=b"")  # b"": do not ask for one
        reading = repr(settings["TlsCaCertificate"])
        context.load_verify_locations(settings["TlsCaCertificate"])
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise UsageError(f"{settings.origins['TlsCertificate']}: {reading}: {why}")
    return context


def secured(connection: "socket.socket", context, **options: "object"):
    """The TLS socket in place of a connected socket, its handshake still to be done.

    Raises OSError, and then nothing stays open.  wrap_socket of Python 3.8 to 3.12 itself leaves
    its new socket open where the peer has reset the connection (since the mend of CVE-2023-40217).
    """
    try:
        return context.wrap_socket(connection, do_handshake_on_connect=False, **options)
    except OSError as error:
        step = error.__traceback__
        while step:
            made = step.tb_frame.f_locals.get("self")
            if isinstance(made, socket.socket):
                made.close()
            step = step.tb_next
        connection.close()
        raise
# ==== Shared with flom.py: end ====


# --- Errors and log -----------------------------------------------------------------------------
# How the daemon says that something is wrong.  Two exceptions end its start: CannotServe and
# SteppedBack.  Everything later is a line in the log: in syslog, in a file or on stderr.
#
# The problem: whoever reads the log may be slow or gone, and the clients would wait with the
# daemon.  So no line is waited for.  Syslog gets datagrams, stderr is written when it can take a
# line, a file is opened in a mode in which it never blocks.  A line that cannot be written is lost
# and counted, and the next one that is written tells the number.  When a file cannot be written
# stderr and syslog are told, once.
#
# A peer can cause lines, and must not fill a disk: see Log.limited().
#
# What is told may be a stranger's text: a name, a reason, a record of etcd.  So each line is made
# printable where it is written, and nowhere else: a newline in it begins no other line.  Only a
# bug has several lines, of which all but the first are indented.

WOULD_BLOCK = (BlockingIOError, InterruptedError)
LEVELS = {"error": 3, "warning": 4, "info": 6, "debug": 7}  # as syslog numbers them
SYSLOG = ("/dev/log", "/var/run/syslog", "/var/run/log")
FACILITY = 3 << 3  # syslog's number of daemons
LONGEST_SYSLOG = 2000  # bytes
LONGEST_LINE = 4096  # bytes that stderr takes at once: a pipe's atomic write
LONGEST_TEXT = 3000  # characters of what is told, be it a stranger's
LIMITED, INTERVAL = 10, 10  # lines that peers may cause in so many s
SELDOM = 3600  # s until a line is told again that would come every few s
MOST_SELDOM = 100  # such lines that are remembered
LOG_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK


class CannotServe(Exception):
    """The daemon cannot serve: one line on stderr, status 1."""


class SteppedBack(Exception):
    """Another daemon serves the group: status 3, nothing on stderr."""


@contextlib.contextmanager
def serving(failure, *opened):
    """A block in which the system may refuse something: then `opened` is closed and CannotServe
    raised, with the line that begins with `failure`."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        for part in opened:
            part.close()
        reason = getattr(error, "strerror", None) or error
        raise CannotServe(f"{failure}: {reason}")


def complain(text):
    """Writes one line on stderr, for a starter that waits for it."""
    with contextlib.suppress(OSError):
        _write_to_stderr(visible(str(text)))


def _write_to_stderr(text):
    line = f"flomd: {text}\n"
    os.write(2, line.encode("utf-8", "replace")[:LONGEST_LINE])


class _Syslog:
    """The syslogd of this host, if there is one."""

    def __init__(self):
        self.socket: "Any" = None

    def open(self):
        """Connects to the first syslogd that listens; raises nothing where none does."""
        if self.socket is not None:
            self.socket.close()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        for path in SYSLOG:
            if self.socket.connect_ex(path) == 0:
                break

    def put(self, level, text):
        """Sends one line; raises OSError when it is lost."""
        priority = FACILITY + LEVELS[level]
        line = f"<{priority}>flomd[{os.getpid()}]: {text}"
        data = line.encode("utf-8", "replace")
        data = data[:LONGEST_SYSLOG]
        if self.socket is None or not self._sent(data):
            self.open()
            self.socket.send(data)

    def _sent(self, data):
        """Sends; returns False when syslogd was started again, or is started only now."""
        try:
            self.socket.send(data)
        except WOULD_BLOCK:
            raise
        except OSError:
            return False
        return True


class _LogFile:
    """A file, without a buffer.  One that is not to be appended to is emptied, but only once."""

    def __init__(self, path, append):
        self.path, self.append = path, append
        self.file: "Any" = None

    def open(self):
        """Opens the file, perhaps again; raises CannotServe, and keeps the one it had."""
        flags = LOG_FLAGS
        if not self.append:
            flags |= os.O_TRUNC
        before = self.file
        with serving(f"cannot write the log {self.path}"):
            number = os.open(self.path, flags, 0o666)
            self.file = open(number, "wb", 0)
        self.append = True
        if before is not None:
            before.close()

    def put(self, level, text):
        """Writes one line; raises OSError when it is lost."""
        date = time.strftime("%Y-%m-%d %H:%M:%S")
        line = f"{date} flomd[{os.getpid()}] {level}: {text}\n"
        data = line.encode("utf-8", "replace")
        while data:  # a disk that takes a part of a line says why when it is given the rest
            taken = self.file.write(data)
            if taken is None:
                raise BlockingIOError
            data = data[taken:]


class _Stderr:
    """The stderr of a daemon in the foreground."""

    def open(self):
        """There is nothing to be opened."""

    def put(self, _, text):
        """Writes one line; raises OSError when it is lost."""
        _, writable, _ = select.select([], [2], [], 0)
        if not writable:
            raise BlockingIOError
        _write_to_stderr(text)


class Log:
    """Where the daemon says what it does.  `target` is "syslog", "stderr" or the path of a file,
    `level` one of LEVELS: what is less urgent is not written.  Open before use."""

    def __init__(self, target: "str", level: "str", append: "bool" = True):
        self.target, self.level = target, LEVELS[level]
        self._syslog = _Syslog()
        self._target = self._make_target(append)
        self._lost = 0  # lines since the last that was written
        self._caused = 0  # lines that peers have caused in the interval
        self._interval_began = 0.0  # s, monotonic
        # s, monotonic, until which a line is not told again, in their order
        self._seldom: "OrderedDict[str, float]" = collections.OrderedDict()

    def _make_target(self, append):
        if self.target == "syslog":
            return self._syslog
        if self.target == "stderr":
            return _Stderr()
        return _LogFile(self.target, append)

    def open(self) -> "None":
        """Opens the log; raises CannotServe."""
        self._target.open()

    def reopen(self) -> "None":
        """Opens the log again; where that fails the old one goes on, and says so."""
        try:
            self.open()
        except CannotServe as error:
            self.error(f"{error}; the log is not opened again")

    def error(self, text: "str") -> "None":
        """Something is wrong, and somebody should see to it."""
        self._write("error", text)

    def info(self, text: "str") -> "None":
        """Something has happened that belongs to a daemon's life."""
        self._write("info", text)

    def limited(self, text: "str", level: "str" = "warning") -> "None":
        """A line that a peer causes: at most LIMITED of them are written in an INTERVAL."""
        if self._may_cause():
            self._write(level, text)

    def seldom(self, text: "str", level: "str" = "error") -> "None":
        """A line on what lasts and is seen every few s, until somebody has mended it: it is
        written once in SELDOM s."""
        now = time.monotonic()
        if now < self._seldom.get(text, 0) or not self._may_cause():
            return  # a line that was left out is written when it comes again
        self._write(level, text)
        self._seldom[text] = now + SELDOM
        self._seldom.move_to_end(text)
        if len(self._seldom) > MOST_SELDOM:
            self._seldom.popitem(last=False)

    def bug(self, trace: "str") -> "None":
        """The traceback of a bug in flomd, which goes on; a peer may cause it."""
        if self._may_cause():
            lines = map(visible, trace.rstrip("\n").split("\n"))
            self._put("error", "\n    ".join(["a bug in flomd, which goes on:", *lines]))

    def _may_cause(self):
        """Whether another line that a peer causes is to be written now."""
        now = time.monotonic()
        if now >= self._interval_began + INTERVAL:
            left_out = self._caused - LIMITED
            self._interval_began, self._caused = now, 0
            if left_out > 0:
                self._write("warning", f"{left_out} lines like the last were left out")
        self._caused += 1
        return self._caused <= LIMITED

    def _write(self, level, text):
        self._put(level, visible(text[:LONGEST_TEXT]))

    def _put(self, level, text):
        if LEVELS[level] > self.level:
            return
        if self._lost:
            text += f" ({self._lost} lines lost before)"
        try:
            self._target.put(level, text)
        except OSError as error:
            self._lost += 1
            if self._lost == 1 and isinstance(self._target, _LogFile):
                reason = error.strerror or "it takes no more now"
                self._tell_failure(f"cannot write the log {self.target}: {reason}")
        else:
            self._lost = 0

    def _tell_failure(self, text):
        """Says somewhere else that the file cannot be written."""
        for target in (_Stderr(), self._syslog):
            with contextlib.suppress(OSError):
                target.put("error", text)


# --- Requests and resources ---------------------------------------------------------------------
# What is asked for, what it is asked of, and the queue policy.  Pure, as the three sections below:
# no socket, no clock, no log.  Every call is given `now`, an object with mono (s, monotonic), boot
# (s since the boot of the system), wall (s since 1970), local() (µs of local time) and
# format(text) (strftime of that moment), and what follows comes back as decisions.
#
# The problem.  Under `first-fit`, FLoM's rule, a waiter is granted as soon as it is compatible
# with the holders.  Then a writer waits for ever while readers come and go, and so does a request
# for many units of a pool.  Under `fair` a request must be compatible with every waiter ahead of
# it as well: a later request passes a waiter only if both could be held at the same time, so it
# never makes the waiter wait longer.  To look at all waiters at each release would take too long
# when there are thousands.
#
# The solution.  The waiters of a resource stand in lanes: all requests of a lane are alike (the
# same mode; in a tree the same node, too), so if the first of a lane cannot be granted none of it
# can.  Whoever looks at the first of each lane, in order of arrival, and at the next one of a lane
# when the first was granted, looks at those that are granted and at one more in each lane.  A
# waiter that stays because of one ahead remembers which: it stays as long as that one waits.
#
# One exception: a request passes a waiter that itself waits, directly or not, for an ancestor of
# the request, that is for a command that will not end before the request is granted.  Such nested
# requests are few; they are looked at one by one (see Nesting).
#
# Not here on purpose: priorities, locks that change their mode, and any notion of a client.

PARKED, DEFERRED, QUEUED, HELD = "parked", "deferred", "queued", "held"
CONFLICTS = ((), (5,), (3, 4, 5), (2, 4, 5), (2, 3, 4, 5), (1, 2, 3, 4, 5))  # by mode
EX = 5  # the mode, as it were, of all requests where there are none
DEEPEST = 255  # levels of a hierarchical name; FLoM's messages have room for some 120
LEAST_LIFESPAN = 2000  # ms that an idle resource stays at least; commands in a row rely on it
REMEMBERED = 50  # lanes of which a resource knows the last grant
SLOT = 64  # bytes that a slot of a set takes in memory, beside its share of the name
by_arrival = operator.attrgetter("serial")  # to sort requests

_Decision = collections.namedtuple(
    "_Decision", ["session", "verdict", "element", "token", "position", "reason"])


class Decision(_Decision):
    """What a session is told of its request: a verdict, and what belongs to it.  `token` is the
    number of a grant, `position` the place in the queue from 1 on, `reason` a line for people; a
    verdict of None says only that its connection is to be closed."""
    __slots__ = ()

    def __new__(cls, session, verdict, element=None, token=None, position=None, reason=None):
        return tuple.__new__(cls, (session, verdict, element, token, position, reason))


class Request:
    """What a session asks for: a waiter while it is queued, a holder once it is granted."""
    # What was asked, beside the arguments of __init__.
    ident = None  # of the client's lock, for nested requests and reclaims
    proof = None  # see proof_of(): who knows the client's key may reclaim the lock
    origin = None  # the process or host that asks: a lock without a key comes back only there
    life = 0  # 1: the lock ends with the process that asks
    kill = 0  # ms after TERM at which its command is killed
    local = False  # it was asked for on a local socket
    pid = None  # of the process that asks, as the system tells
    uid = None  # of its user, as the system tells
    parents = ()  # ids of the locks it is nested in
    patient = False  # it ends by itself, or its user says so: never a deadlock
    reclaim = None  # the token of a lock that the session says it has
    claimed = None  # the element of that lock
    # Where it stands.
    state = None  # None before it stands anywhere, and afterwards
    resource = None
    lane = None
    serial = 0  # order of arrival
    since = 0.0  # s since 1970
    behind = None  # the waiter that was found to be in its way
    # What was granted.
    element = None
    token = None
    slot: "int | None" = None  # in a set: its index
    held_since = 0.0  # s since 1970
    held_boot = 0.0  # s since the boot of the system, suspended time included
    grace = None  # ms that it is kept without its client, as promised; -1: while its process lives

    def __init__(self, session, name, mode=0, quantity=1, wait=0, create=0, lifespan=0):
        self.session = session
        self.name = name
        self.mode = mode
        self.quantity = quantity
        self.wait = wait  # 1: it may be queued
        self.create = create  # 1: it may create the resource
        self.lifespan = lifespan  # ms

    def same(self, other):
        """Whether `other` repeats this request, which has its place."""
        own = (self.name, self.quantity)
        return own == (other.name, other.quantity) and self.agrees_on_mode(other)

    def agrees_on_mode(self, other):
        """Whether `other` asks in the same mode, or modes do not count."""
        modes_count = self.resource is None or self.resource.has_modes
        return self.mode == other.mode or not modes_count

    def is_of_client(self, other):
        """Whether `other`, a request with the id of this holder, is made by the holder's client.

        Anybody on the holder's host may read id and token in a report, so a key decides; a client
        that sends none is told by its origin alone.  It may ask without a token: it was granted
        the lock and never told.
        """
        if self.proof is None:
            return self.token == other.reclaim and self.origin == other.origin
        return self.proof == other.proof and other.reclaim in (None, self.token)


def discard(groups, key, member):
    """Takes the member out of the group, if it is there, and an empty group out of the groups."""
    group = groups.get(key, ())
    if member in group:
        del group[member]
        if not group:
            del groups[key]


def bytes_of(name):
    """How long a name is on the wire, before base64; in memory it takes about as much."""
    encoded = name.encode("utf-8", "surrogateescape")
    return len(encoded)


def merged(rows):
    """The requests of several iterators in order of arrival; each iterator is asked for its next
    one when what it gave before has been dealt with."""
    if len(rows) == 1:
        return rows[0]
    return heapq.merge(*rows, key=by_arrival)


def exclude(lane, other):
    """Whether requests of the two lanes are incompatible: their modes are, and in a tree one node
    is the other, or above it, or below it."""
    if other[1] not in CONFLICTS[lane[1]]:
        return False
    name = lane[0] + "/"
    other_name = other[0] + "/"
    return name.startswith(other_name) or other_name.startswith(name)


class Resource:
    """A resource: its holders, its waiters and the policy.  A kind is a class below this one."""
    verdict = INVALID_NAME  # on a name that the kind does not serve
    denial = ""  # why it does not
    has_modes = False
    timed = False  # a grant may have to wait for the clock
    most = MOST  # quantity that can be granted at all
    elements = "(?s).*"  # what the elements look like
    has_memory = False  # its next element depends on those before
    is_unique = False  # an element is not granted again, unless that cannot be helped
    stalled = False  # nothing is granted at the moment, see LockTable.stall()
    stem = ""  # the name without the size, where people may take another size for the same
    # of a sequence, see there
    returned: "dict" = {}
    moved: "dict" = {}

    def __init__(self, name, first_fit):
        self.name = name
        self.first_fit = first_fit
        self.holders = {}  # session: Request
        # lane: waiters by session
        self.lanes: "dict" = collections.defaultdict(collections.OrderedDict)
        self.waiting = 0  # the number of waiters
        # (lane, quantity): those with ancestors
        self.nested: "dict" = collections.defaultdict(dict)
        self.lifespan = LEAST_LIFESPAN  # ms
        self.idle_since = None  # s, monotonic; None while somebody holds or waits
        self.idle_boot = 0.0  # the same moment, s since the boot of the system
        self.idle_wall = 0.0  # and s since 1970
        self.dates = []  # at which the table will look at it, the next one last
        self.tokens = {}  # lane: token of the last grant in it
        self.weight = bytes_of(name)  # of the names that it keeps

    # What a kind says.

    @classmethod
    def serves(cls, name, now):
        """Whether the kind can do its work under this name."""
        return True

    def fits(self, request, now=None):
        """Whether the request is compatible with the holders, and with `now` its time has come."""
        raise NotImplementedError

    def take(self, request, now):
        """Books the request and returns its element, or None; a reclaim brings its element."""
        raise NotImplementedError

    def give_back(self, request, committed):
        """Undoes take(); committed: the command of a transactional sequence succeeded."""

    def could_have(self, element):
        """Whether the element of a reclaim may be one of this resource."""
        return re.fullmatch(self.elements, element or "") is not None

    @classmethod
    def could_exist(cls, name):
        """Whether a daemon may have served the name, at any time."""
        return cls.serves(name, None)

    def take_again(self, holder):
        """Books a holder of the daemon before, which has its element; ValueError where it cannot
        have held that."""
        if holder.element is not None:
            raise ValueError("an element where there are none")
        self.take(holder, None)

    def memory(self):
        """What is to be known of it when the daemon has ended, beside its lifespan: {name: text
        or number}."""
        return {}

    def recall(self, memory):
        """Brings back what memory() has said, as texts; ValueError where it cannot be true."""

    def is_remembered(self):
        """Whether more is to be known of it, when the daemon has ended, than its holders."""
        return self.has_memory or self.lifespan > LEAST_LIFESPAN

    def count(self, request, difference):
        """Told of each waiter that comes (1) or goes (-1)."""
        self.waiting += difference

    def lane(self, request):
        """The lane of the request, its name and mode: waiters of one lane are alike."""
        if self.has_modes:
            return request.name, request.mode
        return request.name, EX

    def rivals(self, request):
        """The lanes to search for those that are incompatible with the request's."""
        return self.lanes

    # The policy.

    def clash(self, one, other):
        """Whether the two requests are incompatible."""
        return exclude(self.lane(one), self.lane(other))

    def first_of(self, lane):
        """The first waiter of a lane in which somebody waits."""
        waiters = self.lanes[lane].values()
        return next(iter(waiters))

    def ahead(self, request):
        """Yields the first waiter of each lane that the policy puts before the request."""
        if self.first_fit:
            return
        conflicts = CONFLICTS[request.lane[1]]
        for lane in self.rivals(request):
            if lane[1] in conflicts:
                first = self.first_of(lane)
                if first.serial < request.serial:
                    yield first

    def first_ahead(self, request):
        """A waiter that the policy puts before the request, or None."""
        return next(self.ahead(request), None)

    def nest(self, request):
        """Notes that the waiter, the last of those that are alike, has living ancestors."""
        alike = self.nested[request.lane, request.quantity]
        alike[request.session] = request

    def sort_nested(self):
        """Some were noted late: puts those that are alike in order of arrival."""
        for alike in self.nested.values():
            in_order = sorted(alike.values(), key=by_arrival)
            alike.clear()
            alike.update((request.session, request) for request in in_order)

    def hold(self, request, now):
        """Makes the request a holder."""
        request.element = self.take(request, now)
        request.resource = self
        request.state = HELD
        request.held_since = now.wall
        request.held_boot = now.boot
        self.holders[request.session] = request

    def let_go(self, holder, committed):
        """The holder is none any more; committed: its command succeeded."""
        self.give_back(holder, committed)
        del self.holders[holder.session]

    def candidates(self, lanes, now):
        """Yields, in order of arrival, waiters that fit: in each of `lanes` the first one, and all
        that are nested.

        Whoever is granted is a holder before the next one is asked for; then the next one of its
        lane is a candidate, too.
        """
        rows = [self._lane_in_turn(lane) for lane in lanes]
        for alike in self.nested.values():
            rows.append(self._nested_in_turn(list(alike.values()), now))
        for request in merged(rows):
            if request.state is QUEUED and self.fits(request, now):
                yield request

    def _lane_in_turn(self, lane):
        """Yields the first waiter of the lane, and the next first one when that was granted."""
        before = None
        while lane in self.lanes:
            first = self.first_of(lane)
            if first is before:
                break
            yield first
            before = first

    def _nested_in_turn(self, alike, now):
        """Yields the nested waiters, which are alike, until there is no room for the next one."""
        for waiter in alike:
            if not self.fits(waiter, now):
                break
            yield waiter

    def waiters(self):
        """All waiters in order of arrival."""
        found: "list" = []
        for queue in self.lanes.values():
            found += queue.values()
        found.sort(key=by_arrival)
        return found

    # What it knows of former holders.

    def remember(self, lane, token):
        """Notes a grant for those who reclaim; many older ones count as grants of the whole."""
        tokens = self.tokens
        last = tokens.pop(lane, None)
        if last is None:
            self.weight += self._weight_of(lane)
        elif last > token:
            token = last
        tokens[lane] = token
        if len(tokens) > REMEMBERED:
            self._forget_oldest()

    def _forget_oldest(self):
        oldest = next(iter(self.tokens))
        token = self.tokens.pop(oldest)
        self.weight -= self._weight_of(oldest)
        self.remember((self.name, oldest[1]), token)

    def _weight_of(self, lane):
        if lane[0] == self.name:
            return 0
        return bytes_of(lane[0])

    def reclaimable(self, request):
        """Whether no grant since the token of the reclaim can have conflicted with it."""
        for lane, token in self.tokens.items():
            if token > request.reclaim and exclude(request.lane, lane):
                return False
        return True


# --- Kinds --------------------------------------------------------------------------------------
# The six kinds differ in what can be held together and in what a grant carries.  A kind says
# whether a request fits, what a grant takes and what a release gives back; nothing about queues.
# Two kinds have modes: there a request excludes some others and leaves the rest alone.  The others
# are counted: there is room for a number of holders or units, and all exclude each other in the
# queue, since any of them may take the last room.
#
# Not here on purpose: intention modes, units that are granted in part, values that are promised
# before the grant.


class Simple(Resource):
    """Locked as a whole, in one of six modes."""
    has_modes = True

    def __init__(self, name, first_fit):
        super().__init__(name, first_fit)
        self.held = [0] * len(MODES)  # holders by mode

    def fits(self, request, now=None):
        """No holder has a mode that is incompatible with the request's."""
        held = self.held
        for mode in CONFLICTS[request.mode]:
            if held[mode]:
                return False
        return True

    def take(self, request, now):
        """One more holder in this mode; there is no element."""
        self.held[request.mode] += 1

    def give_back(self, request, committed):
        """One holder less in this mode."""
        self.held[request.mode] -= 1


class Node:
    """A node of a tree of numbers: how often each key stands on it, and on it or below it."""
    __slots__ = ("children", "here", "below")

    def __init__(self):
        self.children = {}  # level: Node, while anything stands on it or below it
        self.here = {}  # key: number, never 0
        self.below = {}  # key: number, never 0; those on the node itself are counted, too

    def add(self, name, key, difference):
        """Adds to the number of `key` on the node `name`, as seen from the root."""
        node: "Any" = self
        add_to(node.below, key, difference)
        for level in name.split("/")[2:]:
            above = node
            node = above.children.get(level)
            if node is None:
                node = above.children[level] = Node()
            add_to(node.below, key, difference)
            if not node.below:
                del above.children[level]  # what is below it has come to its end as well
                return
        add_to(node.here, key, difference)

    def near(self, name):
        """Yields the keys on the node `name`, above it and below it."""
        node: "Any" = self
        for level in name.split("/")[2:]:
            yield from node.here
            node = node.children.get(level)
            if node is None:
                return
        yield from node.below


def add_to(numbers, key, difference):
    """Adds to the number of `key`, which is not kept when it is 0."""
    number = numbers.get(key, 0) + difference
    if number:
        numbers[key] = number
    else:
        del numbers[key]


class Hierarchical(Resource):
    """A tree: a request must be compatible with those on its node, above it and below it.  Holders
    and waiters are counted on each node, so other branches cost nothing."""
    denial = f"it has more than {DEEPEST} levels"
    has_modes = True

    def __init__(self, name, first_fit):
        super().__init__(name, first_fit)
        self.held = Node()  # keys: modes of holders
        self.queued = Node()  # keys: lanes of waiters
        self.nothing_ahead = {}  # lane: up to this serial nobody in other lanes is ahead

    @classmethod
    def serves(cls, name, now):
        """The name has not too many levels."""
        return name.count("/") <= DEEPEST

    def fits(self, request, now=None):
        """No holder on the node, above it or below it has an incompatible mode."""
        conflicts = CONFLICTS[request.mode]
        for mode in self.held.near(request.name):
            if mode in conflicts:
                return False
        return True

    def take(self, request, now):
        """One more holder on the node; there is no element."""
        self.held.add(request.name, request.mode, 1)

    def give_back(self, request, committed):
        """One holder less on the node."""
        self.held.add(request.name, request.mode, -1)

    def count(self, request, difference):
        """Counts the waiters on each node, too."""
        super().count(request, difference)
        self.queued.add(request.name, request.lane, difference)
        if request.lane not in self.lanes:
            self.nothing_ahead.pop(request.lane, None)

    def rivals(self, request):
        """The lanes on the node, above it and below it whose modes are incompatible."""
        conflicts = CONFLICTS[request.mode]
        return (lane for lane in self.queued.near(request.name) if lane[1] in conflicts)

    def first_ahead(self, request):
        """As for every kind, its own lane first.  There may be many other lanes, so what one
        search in them finds serves the whole lane: those who come later are behind all that wait
        now."""
        if self.first_fit:
            return None
        lane = request.lane
        if lane in self.lanes and lane[1] in CONFLICTS[lane[1]]:
            first = self.first_of(lane)
            if first.serial < request.serial:
                return first
        if request.serial <= self.nothing_ahead.get(lane, 0):
            return None
        return self._first_in_other_lanes(request)

    def _first_in_other_lanes(self, request):
        """The waiter ahead of the request in another lane, or None; then that is noted."""
        own = self.lanes.get(request.lane)
        until = request.serial
        if own:
            until = next(reversed(own.values())).serial
        for lane in self.rivals(request):
            first = self.first_of(lane)
            if lane != request.lane:
                if first.serial < request.serial:
                    return first
                until = min(until, first.serial - 1)
        if own:
            self.nothing_ahead[request.lane] = until
        return None


class Counted(Resource):
    """There is room for so much, and each holder takes some of it."""

    def room(self):
        """How much can be taken now."""
        raise NotImplementedError

    def need(self, request):
        """How much the request takes."""
        return 1

    def fits(self, request, now=None):
        """There is room for it."""
        return self.need(request) <= self.room()


class Numeric(Counted):
    """A pool of units, of which a request takes some."""
    verdict = IMPOSSIBLE
    denial = "it has no units"

    def __init__(self, name, first_fit):
        super().__init__(name, first_fit)
        self.stem, _, _ = name.partition("[")
        self.most = size_of(name)
        self.free = self.most

    @classmethod
    def serves(cls, name, now):
        """There are units at all."""
        return size_of(name) > 0

    def room(self):
        """The free units."""
        return self.free

    def need(self, request):
        """Its quantity."""
        return request.quantity

    def take(self, request, now):
        """Its units are free no more; there is no element."""
        self.free -= request.quantity

    def give_back(self, request, committed):
        """Its units are free again."""
        self.free += request.quantity

    def lane(self, request):
        """Under first-fit only those of one quantity are alike."""
        if self.first_fit:
            return self.name, EX, request.quantity
        return self.name, EX

    def rivals(self, request):
        """Under first-fit, those for whom the units of the request were the last to be missing."""
        if not self.first_fit:
            return self.lanes
        missing = range(self.free - request.quantity + 1, self.free + 1)
        if len(missing) < len(self.lanes):
            return [(self.name, EX, quantity) for quantity in missing]
        return [lane for lane in self.lanes if lane[2] in missing]


class Set(Counted):
    """Slots with labels; each grant takes one, the search beginning one further each time."""
    has_memory = True
    next = 0  # the index at which the search begins

    def __init__(self, name, first_fit):
        super().__init__(name, first_fit)
        self.labels = name.split(".")
        self.weight += SLOT * len(self.labels)
        self.free = [True] * len(self.labels)

    def room(self):
        """The number of free slots."""
        return len(self.free) - len(self.holders)

    def could_have(self, element):
        """It is the label of a free slot, or any slot will do."""
        for free, label in zip(self.free, self.labels):
            if free and element in (None, label):
                return True
        return False

    def take(self, request, now):
        """Takes the first free slot from the index on; a reclaim the first that has its label."""
        slot = self._free_slot(request.claimed)
        if request.reclaim is None:
            self.next = (self.next + 1) % len(self.free)
        self.free[slot] = False
        request.slot = slot
        return self.labels[slot]

    def memory(self):
        """The index at which the search begins."""
        return {"next": self.next}

    def recall(self, memory):
        """See memory()."""
        self.next = int(memory["next"])
        if self.next not in range(len(self.free)):
            raise ValueError("an index of no slot")

    def take_again(self, holder):
        """Takes the slot that it had."""
        slot = holder.slot
        if slot not in range(len(self.free)) or not self.free[slot]:
            raise ValueError("a slot that is not free")
        if self.labels[slot] != holder.element:
            raise ValueError("a slot of another label")
        self.free[slot] = False

    def _free_slot(self, label):
        """The first free slot from the index on that has the label; None stands for any label."""
        number = len(self.free)
        for place in range(self.next, self.next + number):
            slot = place % number
            if self.free[slot] and label in (None, self.labels[slot]):
                return slot
        raise AssertionError("a grant that does not fit")

    def give_back(self, request, committed):
        """Its slot is free again."""
        self.free[request.slot] = True


class Pool(Counted):
    """Places for a number of holders, of which each has an element of its own."""
    has_memory = True
    is_unique = True

    def __init__(self, name, first_fit):
        super().__init__(name, first_fit)
        self.places = size_of(name)

    def fits(self, request, now=None):
        """There is a place, and with `now` elements may be granted."""
        if now is not None and self.stalled:
            return False
        return len(self.holders) < self.places


    def room(self):
        """The number of free places."""
        return self.places - len(self.holders)

    def is_held(self, element):
        """Whether somebody holds this element."""
        return any(holder.element == element for holder in self.holders.values())


class Sequence(Pool):
    """Each grant carries the next value; a transactional one gets back what was not committed."""
    elements = "[1-9][0-9]{0,9}"
    GREATEST = 2 ** 32 - 1

    def __init__(self, name, first_fit):
        super().__init__(name, first_fit)
        self.next = 1
        # value that was not committed: its place in their order
        self.returned: "OrderedDict" = collections.OrderedDict()
        self.last_place = 0
        # value that came into `returned` or left it, since somebody has looked: its place, or None
        self.moved: "dict" = {}

    def take(self, request, now):
        """The value that was returned first, or the next one; that of a reclaim is used."""
        if request.reclaim is not None:
            self._use(request.claimed)
            return request.claimed
        if self.returned:
            value, _ = self.returned.popitem(last=False)
            self.moved[value] = None
            return value
        value = self.next
        self.next = value % self.GREATEST + 1
        return str(value)

    def _use(self, value):
        """The next value will be one behind this."""
        self.next = max(self.next, int(value) % self.GREATEST + 1)
        if value in self.returned:
            del self.returned[value]
            self.moved[value] = None

    def give_back(self, request, committed):
        """A transactional value that was not committed comes back."""
        if self.name.startswith("_S_") and not committed:
            self._come_back(request.element)

    def _come_back(self, value):
        """The value is the last of those that have come back."""
        if value not in self.returned:
            self.last_place += 1
            self.returned[value] = self.moved[value] = self.last_place

    def memory(self):
        """The next value; those that have come back are kept one by one."""
        return {"next": self.next}

    def recall(self, memory):
        """See memory()."""
        self.next = int(memory["next"])
        if not 0 < self.next <= self.GREATEST:
            raise ValueError("a value that is none")

    def bring_back(self, places):
        """These values came back to the daemon before; places: {value: place}."""
        for value in sorted(places, key=places.__getitem__):
            if not self._is_value(value) or not self.name.startswith("_S_"):
                raise ValueError("a value that cannot come back")
            self.returned[value] = self.last_place = places[value]

    def take_again(self, holder):
        """It has a value that has not come back."""
        if not self._is_value(holder.element) or holder.element in self.returned:
            raise ValueError("a value that cannot be held")

    def _is_value(self, text):
        """Whether it may be one of this sequence at any time."""
        return super().could_have(text) and int(text) <= self.GREATEST

    def could_have(self, element):
        """It is a value that nobody has."""
        return self._is_value(element) and not self.is_held(element)


# By what the format contains, the length of an interval in µs; the first that is found counts.
FRACTIONS = (("#ffffff", 1), ("#fffff", 10), ("#ffff", 100), ("#fff", 1000), ("#ff", 10 ** 4),
             ("#f", 10 ** 5))
CONVERSIONS = (("%c %r %s %S %T %X", 10 ** 6), ("%M %R", 60 * 10 ** 6), ("%H %I", 3600 * 10 ** 6))
SECOND, DAY_LONG = 10 ** 6, 86400 * 10 ** 6  # µs
YEAR = range(0, 366, 29)  # days on which a format is tried: every month and every day of a week


@functools.lru_cache(256)
def resolution(name):
    """The interval (µs) of a timestamp resource, None where grants could not be told apart."""
    for text, length in FRACTIONS:
        if text in name:
            return length
    form = with_fraction(name, "000000")
    # %% is none, and takes the % of what follows: %%S is the text %S
    used = re.findall("%[#0-9]*[EO]?.", form)
    for conversions, length in CONVERSIONS:
        if any(conversion in used for conversion in conversions.split()):
            return length
    return None


def with_fraction(text, micros):
    """The text with #f to #ffffff replaced by a dot and so many of the six digits of `micros`."""
    for digits in range(6, 0, -1):
        text = text.replace("#" + "f" * digits, "." + micros[:digits])
    return text


def stamp(name, now, later=0):
    """The element of a timestamp resource at `now`, or so many µs later."""
    local = now.local()
    then = local + later
    form = name[len("_t_"):name.rindex("[")]
    form = with_fraction(form, f"{then % SECOND:06d}")
    return now.format(form, then // SECOND - local // SECOND)


class Timestamp(Pool):
    """Each grant carries a time of its own, so it may have to wait for the clock.  A text that was
    reclaimed may lie ahead of the clock: it is not granted once more when its time comes."""
    denial = "its format must tell the hour at least (%H), in 1 to 500 printable characters"
    elements = "(?!-)[ -~]{1,500}"  # clients append it to a command
    timed = True

    def __init__(self, name, first_fit):
        super().__init__(name, first_fit)
        self.opens = 0  # local time (µs) at which the interval of the last grant is over
        self.reclaimed = set()  # texts

    @classmethod
    def serves(cls, name, now):
        """The format tells two intervals apart, and its texts can be elements.  Of three moments
        two may look alike, when a clock goes from summer time to winter time."""
        length = resolution(name)
        if length is None:
            return False
        for days in YEAR:
            text = stamp(name, now, days * DAY_LONG)
            if not re.fullmatch(cls.elements, text):
                return False
        three = {stamp(name, now, number * length) for number in range(3)}
        return len(three) > 1

    @classmethod
    def could_exist(cls, name):
        """The format tells intervals apart; whether all its texts serve depends on the place."""
        return resolution(name) is not None

    def fits(self, request, now=None):
        """There is a place, and with `now` the interval of the last grant is over."""
        if not super().fits(request, now):
            return False
        if now is None or request.reclaim is not None:
            return True
        if now.local() < self.opens:
            return False
        return not self.reclaimed or stamp(self.name, now) not in self.reclaimed

    def take(self, request, now):
        """The text of this moment, or that of a reclaim; the interval is used."""
        self.opens = max(self.opens, self._next_interval(now))
        if request.reclaim is None:
            return stamp(self.name, now)
        self.reclaimed.add(request.claimed)
        return request.claimed

    def memory(self):
        """The end of the last interval, and the texts that have been reclaimed."""
        memory: "dict" = {"opens": self.opens}
        if self.reclaimed:
            memory["reclaimed"] = ",".join(map(encode_name, sorted(self.reclaimed)))
        return memory

    def recall(self, memory):
        """See memory()."""
        self.opens = int(memory["opens"])
        if "reclaimed" in memory:
            self.reclaimed.update(map(decode_name, memory["reclaimed"].split(",")))

    def take_again(self, holder):
        """It has a text; what comes next is known already."""
        if not super().could_have(holder.element):
            raise ValueError("a text of another form")

    def give_back(self, request, committed):
        """The place is free again; the interval stays used."""

    def could_have(self, element):
        """It is a text that nobody has."""
        return super().could_have(element) and not self.is_held(element)

    def _next_interval(self, now):
        """The local time (µs) at which the interval after this one begins."""
        length = resolution(self.name)
        return (now.local() // length + 1) * length

    def retry_at(self, now):
        """The time (monotonic) at which a waiter may fit without any release, or None: the start
        of the next interval, but a second from now at the latest, since clocks are set."""
        if not self.waiting or not self.room() or self.stalled:
            return None
        local = now.local()
        opens = self.opens
        if opens <= local:  # the interval is open already: its text was reclaimed
            opens = self._next_interval(now)
        return now.mono + min(opens - local, SECOND) / SECOND


KINDS = {
    "simple": Simple,
    "numeric": Numeric,
    "set": Set,
    "hierarchical": Hierarchical,
    "sequence": Sequence,
    "timestamp": Timestamp,
}


# --- Nesting ------------------------------------------------------------------------------------
# The problem.  A command that runs under a lock may ask, by another flom, for a second lock.  It
# keeps the first until it has had the second: those who wait for the first wait for the second,
# too.  Two questions follow.  Does a waiter wait, directly or not, for a certain holder?  Then the
# policy lets a request of that holder's own command pass it.  And can a nested request ever be
# granted?  If not, all who are concerned would wait for ever, and the request is refused.
#
# The solution is one graph.  Its points are the holders and the waiters, as numbers.  Each waits
# for what must end before it: a waiter for the holders in its way and for the waiters ahead that
# are incompatible with it, a holder for the waiters nested in its lock.  Five hundred waiters
# behind five hundred holders would be 250 000 arrows.  So a set of points is a number, too, with a
# bit for each point, and whom a point waits for is worked out when it is asked: of a resource the
# holders come first and then the waiters in order of arrival, so those ahead of a point are those
# with smaller numbers among its rivals, the points that are incompatible with it, and these are
# the same for a whole lane.  Where a kind is counted, a waiter for which there is room waits for
# no holder.
#
# The first question.  An ancestor waits for its nested request, and that for those ahead of it.
# So one of those ahead waits for the ancestor when there is a circle through both, and all
# questions of this sort have one answer: the circles of the graph, its strongly connected
# components, found in one search.  The answers stay true while nobody comes or goes; when some of
# those that pass are granted, they stay true as far as no path led over these (see WaitPaths).
#
# The second question is answered by reduction: who waits for nobody ends, what waited for it waits
# for it no more, and so on.  When all have ended that can, nested requests pass those ahead of
# them, and it goes on.  A request that is left will never be granted.  A mere circle would not do:
# of two holders of a pool one may be free to end.  Who is granted a lock in a reduction ends at
# once, so it never takes anything from others, and the order in which they end does not matter.
# Each point that is left watches one of those for which it waits, the last one, and is looked at
# again when that one ends: queues end in order of arrival, so that is seldom in vain.
#
# A waiter has nobody nested in it: its command has not begun.
#
# Not here on purpose: the clock (an interval always comes), waiters that will not wait for ever
# (they end by themselves, so the reduction leaves them out), and preferences in whom to refuse: it
# is who asks last.

MOST_ABOVE = 1000  # locks above a request


class Nesting:
    """Which commands run under which locks, by the ids that clients give to their locks."""

    def __init__(self):
        self.holders = {}  # id: the holder with it
        # id: {waiter: None}, those nested in its lock
        self.below: "dict" = collections.defaultdict(dict)
        self.named = {}  # {waiter: None}, those that name ids at all

    def lineage(self, parents):
        """The ids of all locks above a request, nearest first, from those that its client names.

        It names eight at most, and only the nearest beside a long name of a resource; what is
        above those the holders themselves have told.
        """
        found = list(parents)
        known = set(parents)
        for ident in found:
            holder = self.holders.get(ident)
            if holder is not None:
                above = [one for one in holder.parents if one not in known]
                known.update(above)
                found += above
            if len(found) >= MOST_ABOVE:
                break
        return tuple(found[:MOST_ABOVE])

    def ancestors(self, request):
        """The holders under whose commands the request was made."""
        return [self.holders[ident] for ident in request.parents if ident in self.holders]

    def children(self, holder: "Any"):
        """The waiters without which the holder's command will not end."""
        ident = holder.ident
        if self.holders.get(ident) is not holder:
            return ()
        return self.below.get(ident, ())

    def waiters(self):
        """All waiters that have an ancestor, in order of arrival."""
        found = []
        for waiter in self.named:
            if any(ident in self.holders for ident in waiter.parents):
                found.append(waiter)
        return found

    def hold(self, holder):
        """Notes a new holder, and returns the waiters that are nested in its lock."""
        if not holder.ident or holder.ident in self.holders:
            return []
        self.holders[holder.ident] = holder
        nested = list(self.below.get(holder.ident, ()))
        for waiter in nested:  # it was queued before a former holder above it came back
            waiter.parents = self.lineage(waiter.parents)
            self.queue(waiter)
        return nested

    def release(self, holder: "Any"):
        """The holder is none any more."""
        ident = holder.ident
        if self.holders.get(ident) is holder:
            del self.holders[ident]

    def queue(self, waiter):
        """Notes a new waiter."""
        for ident in waiter.parents:
            self.named[waiter] = None
            self.below[ident][waiter] = None

    def leave(self, waiter):
        """The waiter is none any more."""
        self.named.pop(waiter, None)
        for ident in waiter.parents:
            discard(self.below, ident, waiter)

    def around(self, resources):
        """These resources, those for which commands under their locks wait, and so on, as a
        list."""
        found: "dict" = {}
        todo = list(resources)
        while todo:
            resource = todo.pop()
            if resource not in found:
                found[resource] = None
                for holder in resource.holders.values():
                    todo += {waiter.resource: None for waiter in self.children(holder)}
        return list(found)


def waits_directly(waiter, holders):
    """Whether one of the holders is in the way of the waiter."""
    resource = waiter.resource
    if resource.fits(waiter):
        return False
    for holder in holders:
        if holder.resource is resource and resource.clash(waiter, holder):
            return True
    return False


def is_waited_for(holder):
    """Whether the holder may be in the way of a waiter."""
    resource = holder.resource
    if not resource.lanes or not resource.has_modes:
        return bool(resource.lanes)
    conflicts = CONFLICTS[holder.lane[1]]
    return any(lane[1] in conflicts for lane in resource.rivals(holder))


def members(points):
    """Yields the points of a set, the last one first."""
    while points:
        point = points.bit_length() - 1
        yield point
        points ^= 1 << point


def families(nodes):
    """For each of the `nodes`, {name: set of the points on it}, the set of all points that are on
    it, above it or below it.  Where there is no tree there is one name, and all are its family."""
    here = {name + "/": points for name, points in nodes.items()}
    here[""] = 0  # the root, above all
    names = sorted(here)  # what is below a node comes right behind it
    above = {}
    path = [""]
    for name in names[1:]:
        while not name.startswith(path[-1]):
            path.pop()
        above[name] = path[-1]
        path.append(name)
    upward = dict(here)  # those on the node or above it
    for name in names[1:]:
        upward[name] |= upward[above[name]]
    downward = dict(here)  # those on the node or below it
    for name in reversed(names[1:]):
        downward[above[name]] |= downward[name]
    return {name: upward[name + "/"] | downward[name + "/"] for name in nodes}


def rivals_of(lanes):
    """For each of the `lanes` of a resource, {lane: set of the points in it}, the set of the
    points that are incompatible with it."""
    nodes: "dict" = collections.defaultdict(int)
    modes: "dict" = collections.defaultdict(int)
    for lane, points in lanes.items():
        nodes[lane[0]] |= points
        modes[lane[1]] |= points
    near = families(nodes)
    against = {}  # mode: points that it excludes
    for mode in modes:
        against[mode] = 0
        for other in CONFLICTS[mode]:
            against[mode] |= modes.get(other, 0)
    return {lane: near[lane[0]] & against[lane[1]] for lane in lanes}


class Room:
    """The room of a counted resource, and the waiters for which there is not enough of it."""

    def __init__(self, resource, points):
        """points: {waiter: its point}."""
        self.free = resource.room()
        lacking = [(resource.need(waiter), point) for waiter, point in points.items()]
        lacking.sort(reverse=True)
        self._lacking = lacking  # (need, point), the least need last

    def grow(self, more):
        """There is more room; returns the points of the waiters that fit now."""
        self.free += more
        found = []
        while self._lacking and self._lacking[-1][0] <= self.free:
            _, point = self._lacking.pop()
            found.append(point)
        return found


class Waits:
    """Who waits for whom among those who hold or await the resources, and a newcomer, a request
    that is as good as queued.  Points are numbers; a set of points is a number with a bit for
    each."""

    def __init__(self, nesting, resources, newcomer=None):
        self.newcomer = newcomer
        self.requests: "list" = []  # by point
        self.points = {}  # request: point
        self.rivals = []  # by point: set of those of its resource that are incompatible with it
        self.rooms = {}  # resource that is counted: Room
        # Sets of points.
        self.holders = 0
        self.fitting = 0  # waiters that wait for no holder
        self.passing = 0  # waiters that wait for no waiter
        for resource in resources:
            self._add(resource)
        self.left = (1 << len(self.requests)) - 1  # those that have not ended
        self.above = {}  # nested waiter: set of its ancestors
        self.below = {}  # its ancestor: set of the waiters nested in its lock
        self._nest(nesting)

    def waiters(self, resource):
        """The waiters of the resource that count, in order of arrival."""
        found = resource.waiters()
        if self.newcomer is not None and self.newcomer.resource is resource:
            found.append(self.newcomer)
        return found

    def _add(self, resource):
        """Makes points of the holders and the waiters of the resource."""
        holders = list(resource.holders.values())
        waiters = self.waiters(resource)
        lanes: "dict" = collections.defaultdict(int)
        first = len(self.requests)
        for point, request in enumerate(holders + waiters, first):
            bit = 1 << point
            self.points[request] = point
            lanes[request.lane] |= bit
            if request.state is HELD:
                self.holders |= bit
            elif resource.first_fit:
                self.passing |= bit
        self.requests += holders + waiters
        rivals = rivals_of(lanes)
        self.rivals += [rivals[request.lane] for request in self.requests[first:]]
        if not resource.has_modes:
            self._add_room(resource, waiters)

    def _add_room(self, resource, waiters):
        """Finds out for whom there is room."""
        points = {waiter: self.points[waiter] for waiter in waiters}
        room = Room(resource, points)
        self.rooms[resource] = room
        fitting = room.grow(0)
        self.let_fit(fitting)

    def let_fit(self, points):
        """There is room for these waiters."""
        for point in points:
            self.fitting |= 1 << point

    def _nest(self, nesting):
        """Finds out who is nested in whose lock.  Many have the same locks above them."""
        # ids: set of the waiters that are nested in these
        alike: "dict" = collections.defaultdict(int)
        for request, point in self.points.items():
            if request.state is not HELD and request.parents:
                alike[request.parents] |= 1 << point
        for parents, waiters in alike.items():
            ancestors = 0
            for ident in parents:
                point = self.points.get(nesting.holders.get(ident))
                if point is not None:
                    ancestors |= 1 << point
                    self.below[point] = self.below.get(point, 0) | waiters
            if ancestors:
                self.above.update((waiter, ancestors) for waiter in members(waiters))

    def waits_for(self, point):
        """The set of those for which the point waits."""
        bit = 1 << point
        if self.holders & bit:
            return self.below.get(point, 0) & self.left
        found = self.rivals[point] & (bit - 1)
        if self.fitting & bit:
            found &= ~self.holders
        if self.passing & bit:
            found &= self.holders
        return found & self.left

    def needed_by(self, point):
        """The set of those that wait for the point."""
        bit = 1 << point
        waiters = self.rivals[point] & ~self.holders
        if self.holders & bit:
            found = waiters & ~self.fitting
        else:
            later = -bit & ~bit
            found = waiters & later & ~self.passing
            found |= self.above.get(point, 0)
        return found & self.left

    def circles(self):
        """By point: the set of those that wait for it, directly or not, and for which it waits.

        Kosaraju's algorithm (M. Sharir, Computers and Mathematics with Applications 7, 1981)."""
        found = {}
        left = self.left
        for start in reversed(self._in_order_of_end()):
            if left >> start & 1:
                circle = self.that_wait_for(1 << start, left)
                left ^= circle
                for point in members(circle):
                    found[point] = circle
        return found

    def _in_order_of_end(self):
        """All points, each behind those for which it waits, as far as there are no circles."""
        found = []
        unseen = self.left
        for start in members(self.left):
            path = []
            if unseen >> start & 1:
                path.append(start)
                unseen ^= 1 << start
            while path:
                further = self.waits_for(path[-1]) & unseen
                if further:
                    point = further.bit_length() - 1
                    path.append(point)
                    unseen ^= 1 << point
                else:
                    found.append(path.pop())
        return found

    def that_wait_for(self, goals, among):
        """The set of those among the points that wait for one of the goals, directly or not, and
        the goals themselves."""
        found = goals
        todo = list(members(goals))
        while todo:
            further = self.needed_by(todo.pop()) & among & ~found
            found |= further
            todo += members(further)
        return found

    def ahead(self, point):
        """The set of those ahead of the waiter that are incompatible with it."""
        return self.rivals[point] & ((1 << point) - 1) & ~self.holders & self.left

    def passes(self, point, circles):
        """Whether all ahead of the nested waiter, and there are some, wait for its ancestors."""
        circle = circles[point]
        ahead = self.ahead(point)
        if not ahead or not circle & self.above[point]:
            return False
        return not ahead & ~circle


class WaitPaths:
    """Which nested waiters pass those ahead of them, at the time of a search and after some of
    them have been granted since.  Then the paths that led over those are closed; what leads over
    none of all that pass stays true."""

    def __init__(self, nesting, resources, newcomer=None):
        self._waits = waits = Waits(nesting, resources, newcomer)
        circles = waits.circles()
        self._passing = set()  # waiters
        self._open = waits.left  # set of those that do not pass
        for point in waits.above:
            if waits.passes(point, circles):
                self._passing.add(waits.requests[point])
                self._open ^= 1 << point
        self._leading = {}  # set of ancestors: those that wait for them over none that pass

    def passes(self, waiter):
        """Whether the waiter passed those ahead at the time of the search."""
        return waiter in self._passing

    def is_known(self, waiter):
        """Whether still_passes() can tell without another search."""
        point = self._waits.points[waiter]
        return self._waits.above[point] in self._leading

    def still_passes(self, waiter):
        """Whether the waiter, which passed, passes as well when others that pass were granted;
        when it does not, that may have other reasons."""
        waits = self._waits
        point = waits.points[waiter]
        goals = waits.above[point]
        if goals not in self._leading:
            self._leading[goals] = waits.that_wait_for(goals, self._open)
        return not waits.ahead(point) & ~self._leading[goals]


class Reduction(Waits):
    """What is left of those who hold or await the resources when all have ended that can."""

    def __init__(self, nesting, resources, newcomer=None):
        super().__init__(nesting, resources, newcomer)
        self._watched = collections.defaultdict(list)  # point: those that watch it
        self._circles = None  # once they were needed
        self._look_at(members(self.left))

    def waiters(self, resource):
        """Patient ones end by themselves: they do not count."""
        return [waiter for waiter in super().waiters(resource) if not waiter.patient]

    def can_ever_be_granted(self, waiter):
        """Whether the waiter was granted in the reduction."""
        return not self.left >> self.points[waiter] & 1

    def is_in_circle(self, waiter):
        """Whether the waiter, which is left, waits for one of its own ancestors."""
        point = self.points[waiter]
        circle = self._known_circles()[point]
        return circle & self.above.get(point, 0) & self.left != 0

    def remove(self, waiter):
        """The waiter was refused: it ends in another way."""
        self._look_at(self._end(self.points[waiter]))

    def reason(self, waiter):
        """Why the waiter, which is left, is refused, in one line: the resources and holders for
        which it waits."""
        path = [self.requests[point] for point in self._path(self.points[waiter])]
        links = [f"{one.name} is held by {one.session}" for one in path if one.state is HELD]
        if not links:
            return "those ahead wait for each other"
        return ", which waits: ".join(links) + (
            ", under which this command runs; a command in the background may use --deadlock wait")

    def _path(self, waiter):
        """The points on the shortest path on which the waiter waits for an ancestor, which is the
        last one; empty when there is none."""
        came_from = {waiter: None}
        seen = 1 << waiter
        todo = collections.deque([waiter])
        while todo:
            point = todo.popleft()
            if self.above[waiter] >> point & 1:
                return self._path_to(point, came_from)
            further = self.waits_for(point) & ~seen
            seen |= further
            for other in members(further):
                came_from[other] = point
                todo.append(other)
        return []

    @staticmethod
    def _path_to(point, came_from):
        path = []
        while point is not None:
            path.append(point)
            point = came_from[point]
        path.reverse()
        return path

    def _known_circles(self):
        if self._circles is None:
            self._circles = self.circles()
        return self._circles

    def _look_at(self, points):
        """Lets those of the points end that can, and all who can then, and pass who can pass."""
        todo = list(points)
        while todo:
            while todo:
                point = todo.pop()
                obstacles = self.waits_for(point)
                if obstacles:
                    self._watched[obstacles.bit_length() - 1].append(point)
                elif self.left >> point & 1:
                    todo += self._end(point)
            todo = self._let_pass()

    def _end(self, point):
        """The point has ended; returns those that are to be looked at now."""
        self.left ^= 1 << point
        found = self._watched.pop(point, [])
        holder = self.requests[point]
        if holder.state is HELD and holder.resource in self.rooms:
            room = self.rooms[holder.resource]
            fitting = room.grow(holder.resource.need(holder))
            self.let_fit(fitting)
            found += fitting
        return found

    def _let_pass(self):
        """Lets waiters pass those ahead; returns them.  What ended since the circles were searched
        for closes none: one search serves to the end."""
        stuck = [point for point in self.above if (self.left & ~self.passing) >> point & 1]
        if not stuck:
            return []
        circles = self._known_circles()
        found = [point for point in stuck if self.passes(point, circles)]
        for point in found:
            self.passing |= 1 << point
        return found


def all_hopeless(nesting, most):
    """The nested waiters that can never be granted, at most so many, the last one first: each, and
    why.  Each is looked at as if those that came before it in the list were gone."""
    nested = [waiter for waiter in nesting.waiters() if not waiter.patient]
    if not nested:
        return []
    reduction = Reduction(nesting, nesting.around(waiter.resource for waiter in nested))
    nested.sort(key=by_arrival, reverse=True)
    found: "list" = []
    for waiter in nested:
        if len(found) == most:
            break
        if not reduction.can_ever_be_granted(waiter) and reduction.is_in_circle(waiter):
            found.append((waiter, reduction.reason(waiter)))
            reduction.remove(waiter)
    return found


# --- Lock table ---------------------------------------------------------------------------------
# All resources and all requests.  Pure, as the sections above: requests, releases, disconnects and
# dates in, lists of decisions out.  A session has at most one request, which is kept from its
# first answer until it was refused, released or is gone.
#
# Who does what: Calendar says when something is due.  Catalogue keeps the resources, Books who
# holds and who waits; each change of these is one method there, and nothing else changes them.
# Passing answers the questions about nested requests.  Queues grants what can be granted after a
# change, and ends resources that have been idle for long enough.  Recovery gives locks back to
# those who lost their daemon or their connection.  LockTable takes requests to their places and is
# all that other sections know.
#
# What outlives the daemon.  Books and Catalogue note in Changes which holders and which resources
# they have touched; take_changes() hands that over.  A Restoration fills the table of the next
# daemon.  Its holders are absent, and count like all others.  A holder is known by the id and the
# key of its client: when that asks again for the same, on whatever connection, nothing is granted
# but the session of the holder is another one.
#
# The recovery window.  A daemon that follows one that ended under its holders grants reclaims
# alone for a while.  Others queue; one that would not wait is deferred, since neither "granted"
# nor "busy" would be true yet.
#
# No call may keep the other clients waiting.  Whatever a call does is a few steps for each
# session, but for the searches in the graph of nested requests (see Nesting), each of which looks
# at all of them.  So a call begins few of them; when more are wanted, what is left to be done gets
# a date that has all but come, and until then nobody is granted or refused too much.
#
# Not here on purpose: what a session is, how it is told, and what time it is.

DEFER = 5  # s that a request without wait may be deferred
DAY = 86400 << 32  # a day in tokens
MOST_NAMES = 64 << 20  # bytes of names that the resources may keep
EPOCH = 1577836800  # tokens count seconds from 2020-01-01 UTC in their upper half
LAST_EPOCH = 2 ** 31 - 2 ** 20  # tokens are below 2 ** 63, and a million starts are left
MOST_SEARCHES = 8  # that one call may begin
MOST_REFUSED = 8  # nested requests that one call refuses when the window has ended
MOST_AHEAD = 8  # lanes that are looked at one by one before a search
STALLED = "the daemon can store nothing at the moment"  # and its elements must not come twice
NEXT_CALL = 0.001  # s until a call goes on with what the last one has left


def key_of(name):
    """The name of the resource: of a node in a tree the first level."""
    if name[:1] == "/":
        return "/" + name.split("/", 2)[1]
    return name


class Calendar:
    """What is to be done at which time."""

    def __init__(self):
        self.first = None  # the first date (s, monotonic), or None
        self._heap = []  # (s, number, act, subject)
        self._numbers = itertools.count()  # so that nothing else is compared

    def __len__(self):
        return len(self._heap)

    def at(self, when, act, subject=None):
        """At `when` (s, monotonic) act(subject, now) is due; it returns decisions."""
        heapq.heappush(self._heap, (when, next(self._numbers), act, subject))
        self.first = self._heap[0][0]

    def act(self, now):
        """Does what is due; returns the decisions."""
        decisions = []
        while self._heap and self._heap[0][0] <= now.mono:
            _, _, act, subject = heapq.heappop(self._heap)
            self.first = None
            if self._heap:
                self.first = self._heap[0][0]
            decisions += act(subject, now)
        return decisions


class Changes:
    """What is different since somebody has looked, as far as it outlives the daemon."""
    __slots__ = ("holders", "resources", "values")

    def __init__(self):
        self.holders: "Dict[int, Request | None]" = {}  # token: the holder, None when it is none
        # name: the resource, None when it has ended
        self.resources: "Dict[str, Resource | None]" = {}
        # (name of a sequence, value that it got back): its place, None when it is there no more
        self.values: "Dict[tuple, int | None]" = {}

    def see_values(self):
        """Notes the values that came back to the sequences, or went."""
        for name, resource in self.resources.items():
            if resource is not None and resource.moved:
                for value, place in resource.moved.items():
                    self.values[name, value] = place
                resource.moved = {}


class Sizes:
    """Resources whose names differ in their sizes alone, as `licence[5]` and `licence[6]`: two
    pools, which people take for one.

    untold   pairs of names, one that was known before and a new one
    """
    MOST = 100  # names that are kept of one stem: more tell nobody anything

    def __init__(self):
        self.untold: "List[tuple]" = []
        self._names: "Dict[str, set]" = {}  # stem: the names seen since it is in use
        self._in_use: "Dict[str, int]" = collections.Counter()  # stem: the number of resources

    def begin(self, resource):
        """The resource exists from now on."""
        stem, name = resource.stem, resource.name
        self._in_use[stem] += 1
        names = self._names.setdefault(stem, set())
        if name in names or len(names) == self.MOST:
            return
        if names:
            self.untold.append((min(names), name))
        names.add(name)

    def end(self, resource):
        """The resource exists no more."""
        stem = resource.stem
        self._in_use[stem] -= 1
        if not self._in_use[stem]:
            del self._in_use[stem], self._names[stem]


class Catalogue:
    """The resources, and what is left of those that have ended: the greatest of their tokens."""

    def __init__(self, first_fit, most):
        self.first_fit = first_fit
        self.most = most
        self.resources = {}  # name, of a tree that of its first level: Resource
        self.names = 0  # bytes of the names that they keep
        self.forgotten = 0  # the greatest token of grants of which nothing else is known any more
        self.stalled = False  # kinds whose elements are unique grant nothing
        self.strict = False  # see LockTable.be_strict()
        self.changed = Changes()
        self.sizes = Sizes()

    def has_room(self, resource, times):
        """Whether there is room for a new resource in so many times the limits: many resources
        outlive the clients that made them."""
        if len(self.resources) >= times * self.most:
            return False
        return self.names + resource.weight <= times * MOST_NAMES

    def create(self, resource):
        """The resource exists from now on."""
        self.resources[resource.name] = resource
        self.names += resource.weight
        resource.stalled = self.stalled and resource.is_unique
        self.note(resource)
        if resource.stem:
            self.sizes.begin(resource)
        if self.forgotten:  # perhaps of a resource of this name
            self.remember(resource, (resource.name, EX), self.forgotten)

    def end(self, resource):
        """The idle life of the resource is over."""
        del self.resources[resource.name]
        self.names -= resource.weight
        if resource.stem:
            self.sizes.end(resource)
        for token in resource.tokens.values():
            self.forgotten = max(self.forgotten, token)
        if resource.is_remembered():
            self._note_end(resource)

    def _note_end(self, resource):
        changed = self.changed
        changed.resources[resource.name] = None
        for value in itertools.chain(resource.moved, resource.returned):
            changed.values[resource.name, value] = None

    def note(self, resource):
        """Notes that the resource has changed, if more of it is remembered than its holders."""
        if resource.has_memory or resource.lifespan > LEAST_LIFESPAN:
            if self.has(resource):  # it may have been forgotten under those who wait for it
                self.changed.resources[resource.name] = resource

    def prolong(self, resource, lifespan):
        """The idle life of the resource will be this long (ms) at least."""
        if lifespan > resource.lifespan:
            resource.lifespan = lifespan
            self.note(resource)

    def promise(self, holder, grace):
        """The holder is told again for how long (ms) it is kept without its client."""
        grace = self.grace_of(holder, grace)
        if holder.grace != grace:
            holder.grace = grace
            self.changed.holders[holder.token] = holder

    def grace_of(self, holder, grace):
        """What counts (ms) when this grace is told; whether the client hears of it is not known,
        so where that matters the one that was told before counts, too."""
        if self.strict:
            return max(holder.grace or 0, grace or 0) or None
        return grace

    def set_used(self, resource):
        """Somebody holds or awaits the resource."""
        if resource.idle_since is not None:
            resource.idle_since = None
            self.note(resource)

    def set_idle(self, resource, now):
        """Nobody holds or awaits the resource, from now on if that is new."""
        if resource.idle_since is None:
            resource.idle_since = now.mono
            resource.idle_boot = now.boot
            resource.idle_wall = now.wall
            self.note(resource)

    def has(self, resource):
        """Whether the resource exists; one of its name may have come after it."""
        return self.resources.get(resource.name) is resource

    def remember(self, resource, lane, token):
        """Notes a grant; where names take much memory already, as one of the whole resource."""
        before = resource.weight
        if self.names >= MOST_NAMES:
            lane = (resource.name, lane[1])
        resource.remember(lane, token)
        self.names += resource.weight - before


class Books:
    """Who holds and who waits."""

    def __init__(self, catalogue, window_until):
        self.catalogue = catalogue
        self.window_until = window_until  # s, monotonic; None when there is no recovery window
        self.requests = {}  # session: Request
        self.holders = {}  # token: Request
        self.absent = {}  # session: Request of a holder whose client is not there
        # name: {session: Request} as they arrived
        self.parked: "dict" = collections.defaultdict(dict)
        self.nesting = Nesting()
        self.waiting = 0  # of waiters and parked requests
        self.epoch = 0  # of the tokens that this daemon gives; 0 in a world without daemons
        self.last_token = 0
        self.covered = 0  # no daemon will give a token up to this one, see LockTable.cover()
        self.knows_all = False  # nobody else holds a lock of a daemon before
        self.last_serial = 0
        self.changes = 0  # of those who hold or are queued
        self.new_waits = False  # some may wait for others that they did not wait for before

    def arrive(self, request):
        """The request comes behind all others."""
        self.last_serial += 1
        request.serial = self.last_serial
        self.requests[request.session] = request

    def next_token(self):
        """The token of a new grant."""
        self.last_token += 1
        return self.last_token

    def grant(self, request, token, now):
        """Makes the request, which fits, a holder."""
        if request.state is QUEUED:
            self.unqueue(request)
        resource = request.resource
        catalogue = self.catalogue
        resource.hold(request, now)
        request.token = token
        self.holders[token] = request
        catalogue.changed.holders[token] = request
        if resource.has_memory or resource.idle_since is not None:
            resource.idle_since = None
            catalogue.note(resource)
        catalogue.remember(resource, request.lane, token)
        self.changes += 1
        nested = self.nesting.hold(request)
        if nested:
            self._nest_late(nested)
        if resource.timed:  # those that waited for the clock may wait for the holders now
            self.new_waits = True
        return Decision(request.session, OK, request.element, token)

    def _nest_late(self, waiters):
        """They had been queued before the lock in which they are nested was held again."""
        for waiter in waiters:
            waiter.resource.nest(waiter)
        for resource in {waiter.resource for waiter in waiters}:
            resource.sort_nested()
        self.new_waits = True

    def end(self, holder, committed):
        """The holder holds no longer; committed: its command succeeded."""
        resource = holder.resource
        resource.let_go(holder, committed)
        if resource.moved:
            self.catalogue.note(resource)
        del self.holders[holder.token]
        self.catalogue.changed.holders[holder.token] = None
        self.changes += 1
        self.nesting.release(holder)

    def queue(self, request):
        """The request becomes a waiter."""
        resource = request.resource
        request.state = QUEUED
        request.behind = None
        resource.lanes[request.lane][request.session] = request
        resource.count(request, 1)
        self.waiting += 1
        self.changes += 1
        if request.parents:
            self.nesting.queue(request)
            for ancestor in self.nesting.ancestors(request):
                resource.nest(request)
                if is_waited_for(ancestor):
                    self.new_waits = True
        return Decision(request.session, ENQUEUED, position=resource.waiting)

    def unqueue(self, request):
        """The waiter is none any more."""
        resource = request.resource
        request.state = None
        request.behind = None
        discard(resource.lanes, request.lane, request.session)
        resource.count(request, -1)
        self.waiting -= 1
        self.changes += 1
        if request.parents:
            self.nesting.leave(request)
            discard(resource.nested, (request.lane, request.quantity), request.session)

    def park(self, request):
        """The request waits for its resource to be created."""
        request.state = PARKED
        self.waiting += 1
        self.parked[key_of(request.name)][request.session] = request
        return Decision(request.session, WAIT_RESOURCE)

    def unpark(self, request):
        """The request is parked no longer."""
        request.state = None
        self.waiting -= 1
        discard(self.parked, key_of(request.name), request.session)

    def hold_again(self, holder):
        """Enters a holder of the daemon before."""
        token = holder.token
        holder.state = HELD
        self.arrive(holder)
        self.absent[holder.session] = holder
        self.holders[token] = holder
        self.last_token = max(self.last_token, token)
        self.catalogue.remember(holder.resource, holder.lane, token)
        self.nesting.hold(holder)

    def move(self, holder, request):
        """The holder has a new session, that of the request."""
        self.absent.pop(holder.session, None)
        self._give_session(holder, request.session)
        before = (holder.pid, holder.local, holder.grace)
        grace = self.catalogue.grace_of(holder, request.grace)
        if before != (request.pid, request.local, grace):
            self.catalogue.changed.holders[holder.token] = holder
        holder.origin = request.origin
        holder.local = request.local
        holder.pid = request.pid
        holder.uid = request.uid
        holder.life = request.life
        holder.grace = grace
        holder.since = request.since

    def set_absent(self, holder, session):
        """The client of the holder is not there any more."""
        self._give_session(holder, session)
        self.absent[session] = holder

    def _give_session(self, holder, session):
        del self.requests[holder.session]
        del holder.resource.holders[holder.session]
        holder.session = session
        self.requests[session] = holder
        holder.resource.holders[session] = holder

    def remove(self, request, committed=False):
        """The request is no more; committed: the command of a holder succeeded."""
        del self.requests[request.session]
        if request.state is HELD:
            self.absent.pop(request.session, None)
            self.end(request, committed)
        elif request.state is QUEUED:
            self.unqueue(request)
        elif request.state is PARKED:
            self.unpark(request)
        request.state = None

    def refuse(self, request, verdict, reason=None):
        """The final decision of a request that stands in no queue, so that nobody is behind it."""
        self.remove(request)
        return [Decision(request.session, verdict, reason=reason)]


class Passing:
    """Which requests pass those ahead of them, and which can never be granted (see Nesting)."""

    def __init__(self, books):
        self.books = books
        self.nesting = books.nesting
        self.searches = 0  # in the graph of nested requests, in this call
        self.unfinished = False  # more were wanted
        self._paths: "Any" = None  # found by the last search
        self._changes = -1  # the state of the books for which they are true
        self._granted = False  # to some that pass; paths over these are closed

    def forget(self):
        """Drops the paths of the last search, which keep all its requests."""
        self._paths = None
        self._changes = -1

    def may_search(self):
        """Whether this call may begin another search."""
        return self.searches < MOST_SEARCHES

    def is_next(self, request):
        """Whether all that the policy puts before the request wait for its ancestors."""
        behind = request.behind
        if behind is None or behind.state is not QUEUED:
            resource = request.resource
            if not resource.lanes:
                return True
            request.behind = behind = resource.first_ahead(request)
            if behind is None:
                return True
        return bool(request.parents) and self._may_pass(request)

    def _may_pass(self, request):
        """Whether all ahead of the request, and there are some, wait for its ancestors."""
        ancestors = self.nesting.ancestors(request)
        if not ancestors:
            return False
        # the first of a lane waits for nothing that the others of the lane do not wait for
        first = list(itertools.islice(request.resource.ahead(request), MOST_AHEAD + 1))
        if len(first) <= MOST_AHEAD and all(waits_directly(one, ancestors) for one in first):
            return True
        if request.state is QUEUED and self._changes == self.books.changes:
            if not self._paths.passes(request):
                return False
            if not self._granted or self._still_passes(request):
                return True
        if not self.may_search():
            self.unfinished = True
            return False
        return self._search(request).passes(request)

    def _still_passes(self, request):
        """Whether it passes although others were granted, as far as that can be told."""
        if not self._paths.is_known(request):
            if not self.may_search():
                return False
            self.searches += 1
        return self._paths.still_passes(request)

    def _search(self, request):
        """The paths of waits of all nested requests, this one among them."""
        self.searches += 1
        nesting = self.nesting
        resources = [waiter.resource for waiter in nesting.waiters()]
        around = nesting.around(resources + [request.resource])
        if request.state is not QUEUED:
            return WaitPaths(nesting, around, request)
        self._paths = WaitPaths(nesting, around)
        self._changes = self.books.changes
        self._granted = False
        return self._paths

    def grant(self, waiter, now):
        """Grants a nested waiter that is next.  If it is one of those that pass and nobody is
        nested in its lock, nothing else has changed."""
        books = self.books
        known = self._changes == books.changes and self._paths.passes(waiter)
        decision = books.grant(waiter, books.next_token(), now)
        if known and not books.new_waits:
            self._changes = books.changes
            self._granted = True
        return decision

    def hopeless(self, request):
        """Why the request, which would be queued, would never be granted; None when it would be,
        or when that does not matter."""
        nesting = self.nesting
        ancestors = nesting.ancestors(request)
        if not ancestors or request.patient or self.books.window_until is not None:
            return None
        if not waits_directly(request, ancestors):
            if not any(is_waited_for(ancestor) for ancestor in ancestors):
                return None
        around = nesting.around([request.resource])
        if not any(ancestor.resource in around for ancestor in ancestors):
            return None
        self.searches += 1
        reduction = Reduction(nesting, around, request)
        if reduction.can_ever_be_granted(request):
            return None
        return reduction.reason(request)


class Queues:
    """Grants what can be granted, and ends the resources that nobody uses."""

    def __init__(self, books, passing, dates):
        self.books = books
        self.catalogue = books.catalogue
        self.passing = passing
        self.dates = dates

    def is_granted(self, request, now):
        """Whether the policy grants a new request at once."""
        if self.books.window_until is not None or not request.resource.fits(request, now):
            return False
        return self.passing.is_next(request)

    def leave(self, request, now, committed=False):
        """The request goes away; grants what can be granted then."""
        resource = request.resource
        state = request.state
        self.books.remove(request, committed)
        if state is not HELD and state is not QUEUED:
            return []
        if resource.lanes and (state is HELD or not resource.first_fit):
            return self.settle(resource, resource.rivals(request), now)
        self.look_again(resource, now)
        return []

    def settle(self, resource, lanes, now):
        """Grants what can be granted in these lanes, and sees to the resource's next date."""
        decisions = []
        books = self.books
        if resource.lanes and books.window_until is None:
            for request in resource.candidates(lanes, now):
                if self.passing.is_next(request):
                    decisions.append(self._grant(request, now))
        self.look_again(resource, now)
        return decisions

    def _grant(self, request, now):
        if request.parents:
            return self.passing.grant(request, now)
        return self.books.grant(request, self.books.next_token(), now)

    def let_pass(self, now):
        """Grants nested requests, too, when those ahead have come to wait for their ancestors."""
        decisions = []
        books = self.books
        while books.new_waits and books.window_until is None:
            books.new_waits = False
            resources: "dict" = {}  # in order
            for waiter in books.nesting.waiters():
                resources[waiter.resource] = None
            for resource in resources:
                decisions += self.settle(resource, (), now)
        if self.passing.unfinished:
            self.passing.unfinished = False
            self.dates.at(now.mono + NEXT_CALL, self._go_on)
        if not books.nesting.named:
            self.passing.forget()
        return decisions

    def _go_on(self, _, now):
        """Searches that the last call has left are made by this one."""
        self.books.new_waits = True
        return []

    def refuse(self, waiter, reason, now):
        """Refuses a nested waiter that can never be granted; grants what can be granted then."""
        if waiter.state is not QUEUED:
            return []
        refusal = Decision(waiter.session, DEADLOCK, reason=reason)
        return [refusal] + self.leave(waiter, now)

    def look_again(self, resource, now):
        """Ends the resource if its idle life is over, or sets a date for the next look."""
        if resource.holders or resource.lanes:
            self.catalogue.set_used(resource)
            if resource.timed and self.books.window_until is None:
                when = resource.retry_at(now)
                if when is not None:
                    self._look_at(when, resource)
            return
        self.catalogue.set_idle(resource, now)
        end = resource.idle_since + resource.lifespan / 1000
        if end > now.mono:
            self._look_at(end, resource)
        elif self.catalogue.has(resource):
            self.catalogue.end(resource)

    def _look_at(self, when, resource):
        """Sets a date, unless there is an earlier one."""
        if not resource.dates or when < resource.dates[-1]:
            resource.dates.append(when)
            self.dates.at(when, self._date_has_come, resource)

    def _date_has_come(self, resource, now):
        resource.dates = [date for date in resource.dates if date > now.mono]
        if not self.catalogue.has(resource):
            return []
        return self.settle(resource, resource.lanes, now)


class Recovery:
    """Gives locks back to those who had them, and ends the recovery window."""

    def __init__(self, books, passing, queues, dates, place):
        self.books = books
        self.nesting = books.nesting
        self.catalogue = books.catalogue
        self.passing = passing
        self.queues = queues
        self.dates = dates
        self._place = place  # place(request, now) takes a request to where it belongs
        if books.window_until is not None:
            dates.at(books.window_until, self._end_window)

    def come_back(self, request, now):
        """Whether the new request is made by the client of a holder, and what comes of it: the
        decisions if it is that holder, None if it is to be looked at like any other.

        The client may have lost its connection before it was told of the grant: then it asks
        without a token.  A client has one lock at a time: when it asks for another one, it has no
        use for what it held.
        """
        holder = self._holder_like(request)
        if holder is None or not holder.is_of_client(request):
            return None
        if holder.same(request):
            return self._hand_over(holder, request)
        decisions = []
        if holder.session not in self.books.absent:
            if holder.name == request.name:
                return None
            decisions.append(Decision(holder.session, None))
        decisions += self.queues.leave(holder, now, committed=True)
        return decisions + self._place(request, now)

    def _holder_like(self, request):
        """The holder with the id of the request, None where there is none.  Another client may
        have taken the same id for itself; the token tells them apart."""
        holder = self.books.holders.get(request.reclaim)
        if holder is not None and holder.proof is not None and holder.ident == request.ident:
            return holder
        return self.nesting.holders.get(request.ident)

    def _hand_over(self, holder, request):
        """The client of the holder has a new connection."""
        books = self.books
        before = holder.session
        decisions = [Decision(request.session, OK, holder.element, holder.token)]
        if before not in books.absent:
            decisions.append(Decision(before, None))
        books.move(holder, request)
        self.catalogue.prolong(holder.resource, request.lifespan)
        return decisions

    def reclaim(self, request, now):
        """A session that lost its daemon asks for the lock that it has."""
        if request.resource.stalled:  # to be tried again
            return self.books.refuse(request, LIMIT, STALLED)
        refusal = self._refusal(request, now)
        if refusal is not None:
            return self.books.refuse(request, BUSY, refusal)
        return [self._grant_again(request, now)]

    def _refusal(self, request, now):
        """Why a reclaim is refused, None when it is not."""
        books = self.books
        resource = request.resource
        token = request.reclaim
        if self.catalogue.strict:
            return "nothing is known of it"
        if token in books.holders:
            return "another has its token"
        if token > books.last_token and (books.knows_all or token >> 32 == books.epoch > 0):
            return "its token was never given"
        if token > max(books.last_token, books.covered, latest_token(now)):
            return "its token lies in the future"
        if books.window_until is None and not resource.reclaimable(request):
            return "it was granted to others since"
        if not resource.could_have(request.claimed) or not resource.fits(request, now):
            return "it is held by others"
        return None

    def _grant_again(self, request, now):
        self.books.last_token = max(self.books.last_token, request.reclaim)
        return self.books.grant(request, request.reclaim, now)

    def defer(self, request, now):
        """A request that does not wait will be decided on when the window has ended."""
        request.state = DEFERRED
        self.dates.at(now.mono + DEFER, self._give_up, request)

    def _give_up(self, request, now):
        """The request has been deferred long enough."""
        if request.state is not DEFERRED:
            return []
        return self.books.refuse(request, BUSY)

    def _end_window(self, _, now):
        self.books.window_until = None
        self.catalogue.forgotten = self.books.last_token  # those of other daemons
        decisions = []
        for resource in list(self.catalogue.resources.values()):
            if resource.lanes:
                decisions += self.queues.settle(resource, resource.lanes, now)
        return decisions + self._after_window(None, now)

    def _after_window(self, _, now):
        """Refuses those who would wait for ever, and then decides on those who do not wait."""
        hopeless = all_hopeless(self.nesting, MOST_REFUSED + 1)
        self.passing.searches += 1
        decisions = []
        for waiter, reason in hopeless[:MOST_REFUSED]:
            decisions += self.queues.refuse(waiter, reason, now)
        if len(hopeless) > MOST_REFUSED:
            self._go_on(now)
        else:
            decisions += self._decide_on_deferred(now)
        return decisions

    def _decide_on_deferred(self, now):
        """Nobody waits for ever any more: those who do not wait are answered."""
        decisions = []
        requests = self.books.requests.values()
        for request in [one for one in requests if one.state is DEFERRED]:
            if not self.passing.may_search():
                self._go_on(now)
                break
            request.state = None
            decisions += self._place(request, now)
        return decisions

    def _go_on(self, now):
        """What this call has left is done by the next one."""
        when = now.mono + NEXT_CALL
        self.dates.at(when, self._after_window)


class Restoration:
    """Fills an empty table with what the daemon before knew; what cannot have been, or not at
    once, is a ValueError.

    First add_resource() and add_values() for each resource of which more is known than its
    holders, then add_holder() for each holder, then finish().
    """

    def __init__(self, table, books, queues):
        self.table = table
        self.books = books
        self.catalogue = books.catalogue
        self.queues = queues
        self._values = set()  # (name of a sequence, value that is held)
        # what is not known of the past counts as grants of the whole, to other daemons' clients
        self._forgotten = self.catalogue.forgotten
        self.catalogue.forgotten = books.last_token

    def add_resource(self, name):
        """Makes a resource, returns it."""
        kind = KINDS.get(kind_of(name))
        if kind is None or key_of(name) != name or not kind.could_exist(name):
            raise ValueError("a name of no resource")
        if name in self.table.resources:
            raise ValueError("a resource twice")
        resource = kind(name, self.catalogue.first_fit)
        self.catalogue.create(resource)
        return resource

    def add_values(self, name, places):
        """Values that came back to a sequence, {value: its place in the order}."""
        resource = self.table.resources.get(name)
        if resource is None or kind_of(name) != "sequence":
            raise ValueError("a value of no sequence")
        resource.bring_back(places)

    def add_holder(self, holder):
        """Makes a holder, with its token and its element, of a request whose client is absent."""
        resource = self._resource_of(holder)
        holder.resource = resource
        holder.lane = resource.lane(holder)
        if holder.token in self.table.holders:
            raise ValueError("a token twice")
        if holder.quantity > resource.most or not resource.fits(holder):
            raise ValueError("holders that exclude each other")
        if isinstance(resource, Sequence):
            self._add_value(holder)
        resource.take_again(holder)
        resource.holders[holder.session] = holder
        self.books.hold_again(holder)

    def _resource_of(self, holder):
        name = holder.name
        resource = self.table.resource_of(name)
        if resource is None:
            resource = self.add_resource(key_of(name))
            if resource.has_memory:
                raise ValueError("a holder of a resource of which nothing is known")
        if name != resource.name:  # a node of its tree
            if kind_of(name) != "hierarchical" or not resource.could_exist(name):
                raise ValueError("a name of no node")
        return resource

    def _add_value(self, holder):
        pair = holder.resource.name, holder.element
        if pair in self._values:
            raise ValueError("a value twice")
        self._values.add(pair)

    def finish(self, now):
        """Sees to the resources that nobody holds: they are idle.  Yields after each."""
        self.catalogue.forgotten = self._forgotten
        self.catalogue.changed = Changes()
        for resource in list(self.table.resources.values()):
            if not resource.holders:
                self.queues.look_again(resource, now)
                yield


def latest_token(now):
    """The greatest token that a daemon of the same time may have given, clocks being wrong."""
    epoch = int(now.wall) - EPOCH
    return min((epoch << 32) + DAY, LAST_EPOCH << 32)


# The answer to a session that asks again and keeps its place; None when it does not.

def repeat_parked(before, request, catalogue):
    """It may wait on, and its lifespan counts."""
    if request.create or not request.wait or not before.same(request):
        return None
    before.lifespan = max(before.lifespan, request.lifespan)
    return Decision(request.session, WAIT_RESOURCE)


def repeat_queued(before, request, catalogue):
    """It may wait on, and its lifespan counts."""
    if not request.wait or not before.same(request):
        return None
    catalogue.prolong(before.resource, request.lifespan)
    return Decision(request.session, ENQUEUED)


def repeat_held(before, request, catalogue):
    """It has what it asks for, or is told that it holds something else."""
    session = request.session
    if request.name == before.name:
        catalogue.prolong(before.resource, request.lifespan)
        if before.agrees_on_mode(request) and request.quantity <= before.quantity:
            catalogue.promise(before, request.grace)
            return Decision(session, OK, before.element, before.token)
    return Decision(session, BUSY)


def repeat_deferred(before, request, catalogue):
    """It has no place yet."""
    return None


REPEATED = {
    PARKED: repeat_parked,
    QUEUED: repeat_queued,
    HELD: repeat_held,
    DEFERRED: repeat_deferred,
}


class LockTable:
    """Requests, releases and disconnects in, lists of decisions out."""

    def __init__(self, first_fit=False, epoch=0, window_until=None, most_waiters=None,
                 most_resources=10 ** 6):
        """epoch: s since 2020-01-01, greater than that of any daemon before; window_until: s,
        monotonic, the end of the recovery window, None when there is none; most_waiters: None when
        there is no limit."""
        self.most_waiters = most_waiters
        if most_waiters is None:
            self.most_waiters = float("inf")
        self._dates = Calendar()
        self._catalogue = Catalogue(first_fit, most_resources)
        books = Books(self._catalogue, window_until)
        self._books = books
        self._passing = Passing(books)
        self._queues = Queues(books, self._passing, self._dates)
        self._recovery = Recovery(books, self._passing, self._queues, self._dates,
                                  self._place)
        self.begin_with(epoch)
        # What others may look at, and must not change.
        self.resources = self._catalogue.resources  # name: Resource
        self.requests = books.requests  # session: Request
        self.holders = books.holders  # token: Request
        self.absent = books.absent  # session: Request, those holders whose clients are not there
        self.parked = books.parked  # name: {session: Request}
        self.sizes = self._catalogue.sizes

    def begin_with(self, epoch):
        """Before any request: all tokens will be of this epoch or later."""
        self._books.epoch = epoch
        self._books.last_token = epoch << 32
        if self._books.window_until is None:
            self._catalogue.forgotten = self._books.last_token  # those of other daemons

    # What comes in.

    def request(self, request, now):
        """A session asks; it gets one decision, others may get more (those woken by it)."""
        books = self._books
        self._passing.searches = 0
        decisions = []
        before = books.requests.get(request.session)
        if before is not None:
            repeated = REPEATED[before.state](before, request, self._catalogue)
            if repeated is not None:
                return [repeated]
            decisions = self._queues.leave(before, now)
        request.since = now.wall
        books.arrive(request)
        known = None
        if request.reclaim is not None or request.ident in books.nesting.holders:
            known = self._recovery.come_back(request, now)
        if known is None:
            known = self._place(request, now)
        decisions += known
        decisions += self._queues.let_pass(now)
        return decisions

    def release(self, session, committed, now):
        """The holder lets go; committed: its command succeeded."""
        self._passing.searches = 0
        decisions = self._queues.leave(self._books.requests[session], now, committed)
        decisions += self._queues.let_pass(now)
        return decisions

    def gone(self, session, now):
        """The session has ended, whatever it held or waited for."""
        if session not in self._books.requests:
            return []
        return self.release(session, False, now)

    def set_absent(self, session, absent):
        """The client of a holder is not there any more: `absent` is in the place of its session
        until it comes back."""
        self._books.set_absent(self.requests[session], absent)

    def expire(self, now):
        """Does what is due at `now`."""
        self._passing.searches = 0
        decisions = self._dates.act(now)
        decisions += self._queues.let_pass(now)
        return decisions

    def next_date(self):
        """The monotonic time (s) at which expire() is to be called, or None."""
        return self._dates.first

    def stall(self, wanted: "bool", now):
        """While it is wanted, sequences and timestamps grant nothing: their elements must not come
        twice, so each grant is to be stored, which cannot be done at the moment."""
        self._passing.searches = 0
        self._catalogue.stalled = wanted
        decisions = []
        for resource in list(self.resources.values()):
            resource.stalled = wanted and resource.is_unique
            if resource.is_unique and resource.lanes and not wanted:
                decisions += self._queues.settle(resource, resource.lanes, now)
        if not wanted:  # those that waited for this may wait for the holders now
            self._books.new_waits = True
        decisions += self._queues.let_pass(now)
        return decisions

    def know_all(self):
        """Those who have been restored, and nobody else, hold locks of a daemon before."""
        self._books.knows_all = True

    def be_strict(self):
        """What is not known was never told: no other reclaim is granted.  And what was told counts
        until its client knows better: no grace becomes shorter."""
        self._catalogue.strict = True

    def cover(self, token: "int"):
        """It is known on disk that tokens up to this one may have been given."""
        self._books.covered = max(self._books.covered, token)

    # What is to be stored.

    def take_changes(self) -> "Changes | None":
        """What has changed since the last call, None where nothing has."""
        changed = self._catalogue.changed
        if changed.resources:
            changed.see_values()
        elif not changed.holders:
            return None
        self._catalogue.changed = Changes()
        return changed

    def restoration(self):
        """To fill the table, while it is empty, with what the daemon before knew."""
        return Restoration(self, self._books, self._queues)

    def forget_what_nobody_holds(self):
        """Before the end: resources without holders are gone, whoever waits for them."""
        for resource in list(self.resources.values()):
            if not resource.holders:
                self._catalogue.end(resource)

    # What others want to know.

    @property
    def holding(self):
        """The number of holders."""
        return len(self.holders)

    @property
    def waiting(self):
        """The number of waiters and parked requests."""
        return self._books.waiting

    @property
    def window_until(self):
        """The end (s, monotonic) of the recovery window, None when it is over."""
        return self._books.window_until

    def known_as(self, ident):
        """The holders and waiters whose reports bear this id; one, unless a client lies.  Where
        nobody has the whole id, those whose ids begin so."""
        like = []
        for request in self.requests.values():
            if request.ident and request.ident.startswith(ident):
                like.append(request)
        return [request for request in like if request.ident == ident] or like

    def empty(self):
        """Whether nothing at all is left: no resource, not even an idle one, and no request."""
        return not self.resources and not self.requests

    def resource_of(self, name):
        """The resource to which a name belongs, None when there is none."""
        return self.resources.get(key_of(name))

    # From the request to its place.

    def _place(self, request, now):
        """Finds or makes the resource of a new request and takes it there."""
        books = self._books
        name = request.name
        resource = self.resources.get(name)
        if resource is not None:
            return self._admit(request, resource, now)
        kind = KINDS.get(kind_of(name))
        if kind is None:
            return books.refuse(request, INVALID_NAME, "no kind of resource has such a name")
        if not kind.serves(name, now):
            return books.refuse(request, kind.verdict, kind.denial)
        resource = self.resource_of(name)
        if resource is not None:
            return self._admit(request, resource, now)
        if request.reclaim is not None and books.window_until is None:
            return books.refuse(request, BUSY, "nothing is known of it any more")
        if not request.create:
            return self._park(request, now)
        return self._create(request, kind(key_of(name), self._catalogue.first_fit), now)

    def _create(self, request, resource, now):
        """A new resource: its creator is the first, those that waited for it come next."""
        if request.quantity > resource.most:
            return self._books.refuse(request, IMPOSSIBLE)
        times = 1
        if request.reclaim is not None:  # newcomers must not take the room of those that come back
            times = 2
        if not self._catalogue.has_room(resource, times):
            return self._books.refuse(
                request, LIMIT, "the daemon keeps too many resources, or names that are too long")
        self._catalogue.create(resource)
        decisions = self._admit(request, resource, now)
        decisions += self._wake(resource, now)
        self._queues.look_again(resource, now)
        return decisions

    def _wake(self, resource, now):
        """Those who waited for the resource ask for it now, in the order of their arrival."""
        decisions = []
        name = resource.name
        while name in self.parked and self._catalogue.has(resource):
            if not self._passing.may_search():
                self._dates.at(now.mono + NEXT_CALL, self._wake, resource)
                break
            request = next(iter(self.parked[name].values()))
            self._books.unpark(request)
            self._books.arrive(request)
            decisions += self._admit(request, resource, now)
        return decisions

    def _park(self, request, now):
        """The resource does not exist and the request must not create it."""
        if not request.wait or self._books.waiting >= self.most_waiters:
            return self._turn_away(request, CANT_WAIT, now)
        return [self._books.park(request)]

    def _admit(self, request, resource, now):
        """Grants, queues or refuses a request for a resource that exists."""
        books = self._books
        self._catalogue.prolong(resource, request.lifespan)
        if request.quantity > resource.most:
            return books.refuse(request, IMPOSSIBLE)
        request.resource = resource
        request.lane = resource.lane(request)
        if request.parents:
            nesting = books.nesting
            request.parents = nesting.lineage(request.parents)
        if request.reclaim is not None:
            return self._recovery.reclaim(request, now)
        if self._queues.is_granted(request, now):
            return [books.grant(request, books.next_token(), now)]
        return self._let_wait(request, now)

    def _let_wait(self, request, now):
        """Queues a request that cannot be granted now, if it may wait."""
        if not request.wait or self._books.waiting >= self.most_waiters:
            return self._turn_away(request, BUSY, now)
        reason = self._passing.hopeless(request)
        if reason is not None:
            return self._books.refuse(request, DEADLOCK, reason)
        queued = self._books.queue(request)
        self._queues.look_again(request.resource, now)
        return [queued]

    def _turn_away(self, request, verdict, now):
        """Refuses one waiter too many, or a request that does not wait: that may be deferred."""
        if request.wait:
            return self._books.refuse(request, LIMIT, "too many requests wait already")
        if self._books.window_until is None:
            return self._books.refuse(request, verdict, self._why_not(request))
        self._recovery.defer(request, now)
        return []

    @staticmethod
    def _why_not(request):
        """The reason for a refusal, where it is not in others that hold or wait."""
        resource = request.resource
        if resource is not None and resource.stalled:
            return STALLED
        return None


# --- Session ------------------------------------------------------------------------------------
# One client's connection as far as the protocol goes: bytes in and calls out, decisions in and
# bytes out, without a socket.
#
#     state      the client                       a lock 8 leads to
#     FREE       has asked for nothing            ASKING
#     ASKING     has no answer yet                ASKING
#     WAITING    is queued, or parked             ASKING
#     HOLDING    holds a lock                     HOLDER_ASKS
#     HOLDER_ASKS   has asked again               HOLDER_ASKS
#
# A message that the table of its state does not have is out of place and ends the connection.  The
# first answer to a lock 8 has step 16, the others have step 24: that, too, the state tells.
#
# The state in which a message is read is the one that the answer to the message before it has
# left.  So calls() is lazy: whoever takes a call from it gives answer() the decisions that the
# call has brought before taking the next one, however long they wait until they may be told.
#
# A FLoM client takes every answer of step 24 but rc 1 for a grant, and knows no rc above 6: it is
# told less, and where the truth cannot be told its connection is closed.

FREE, ASKING, WAITING, HOLDING, HOLDER_ASKS = "free", "asking", "waiting", "holding", "holder asks"
UNANSWERED = {ASKING, HOLDER_ASKS}
TLS_RECORD = b"\x16"  # the first byte of a handshake, never that of a message
LONGEST = 65536  # bytes of a message; FLoM's own limits, 511 and 1023, are the client's care
TOO_LONG = f"a message of more than {LONGEST} bytes"
MOST_PARENTS = 8  # ids of locks around a nested one that count
PROOF = 16  # hex digits
KNOWN, SHORT = 256, 512  # messages that are kept as read, and bytes that one of them may have
FINAL = {  # the daemon half-closes after these
    CANT_WAIT, INVALID_NAME, DEADLOCK, LIMIT, STOPPED, EVICTED}


def read_message(data: "bytes") -> "dict":
    """decode(), with the name of the resource decoded too.  Raises ProtocolError."""
    elements = decode(data)
    wanted = elements.get("resource", {})
    if "name" in wanted:
        wanted["name"] = decode_name(wanted["name"])
    return elements


# Clients that ask for the same resource and say no more of themselves than FLoM's send the same
# bytes again and again.  The result is not to be changed.
read_known_message = functools.lru_cache(KNOWN)(read_message)


def proof_of(key: "str") -> "str":
    """What is kept of the key that a client has made for its lock: enough to know it again."""
    import hashlib
    digest = hashlib.sha256(key.encode())
    return digest.hexdigest()[:PROOF]


class Identity:
    """Who a client is, as people see it.

    `peer` is its address, and name_of(uid) tells the name of a user of this system.
    """
    __slots__ = ("peer", "ours", "about", "uid", "_name_of")

    def __init__(self, peer: "str", name_of: "Callable[[int], str]"):
        self.peer = peer
        self.ours = False  # a client of ours
        self.about: "dict" = {}  # what a client of ours says of itself
        self.uid: "int | None" = None  # the client's user, where the system tells it
        self._name_of = name_of

    def __str__(self):
        """Who it is."""
        if not self.ours:
            return self.peer
        host, pid, command = [self.about.get(key, "?") for key in ("host", "pid", "cmd")]
        return f"{host}:{pid} '{command}'"

    def user(self) -> "str | None":
        """The name of its user; one that the system tells counts more than what a client says."""
        if self.uid is None:
            return self.about.get("user")
        return self._name_of(self.uid)


class Session(Identity):
    """The state of one connection in terms of the protocol.

    `connection` is whoever carries its bytes.
    """
    __slots__ = ("connection", "state", "request", "holds", "peer_id", "has_more", "_unread")
    is_absent = False  # see Absent, which is like it for those who look

    def __init__(self, connection, peer: "str", name_of: "Callable[[int], str]"):
        super().__init__(peer, name_of)
        self.connection = connection
        self.state = FREE
        self.request: "Request | None" = None  # the last one
        self.holds: "str | None" = None  # the name of the lock, as an unlock 8 has to say it
        self.peer_id: "str | None" = None  # the id of its host
        self.has_more = False  # calls() has not read all that has come
        self._unread = b""

    def forget(self) -> "None":
        """Nobody speaks with the client any more.  What refers to each other in a circle would
        stay until Python searches all objects for such circles, and that stalls the daemon."""
        self.connection = None
        self.request = None

    # What comes in.

    def calls(self, data: "bytes") -> "Iterator[tuple]":
        """Yields what the client wants, as a pair:

            ("lock", Request), ("unlock", committed), ("status", the client's name and version),
            ("shutdown", immediate), ("evict", (id, what the client says of itself)),
            ("ping", None), ("pong", None)

        Raises ProtocolError, perhaps after some calls.
        """
        data = self._unread + data
        if data.startswith(TLS_RECORD):
            raise ProtocolError("TLS, where the daemon is configured without")
        *messages, self._unread = data.split(END)
        left = len(messages)
        for message in messages:
            left -= 1
            self.has_more = left > 0 or self._unread != b""
            if len(message) > SHORT:
                elements = self._read_long(message + END)
            else:
                elements = read_known_message(message + END)
            head = elements["msg"]
            make_call = self._MESSAGES[self.state].get((head["verb"], head["step"]))
            if make_call is None:
                name = f"{head['verb']}/{head['step']}"
                raise ProtocolError(f"message {name} out of place, of one that is {self.state}")
            yield make_call(self, elements)
        if len(self._unread) >= LONGEST:
            raise ProtocolError(TOO_LONG)

    @staticmethod
    def _read_long(message):
        if len(message) > LONGEST:
            raise ProtocolError(TOO_LONG)
        return read_message(message)

    def _lock(self, elements):
        wanted = elements.get("resource", {})
        about = elements.get("session", {})
        name = wanted.get("name")
        if name is None:
            raise ProtocolError("a lock without a name")
        self.peer_id = about.get("peerid")
        if "client" in about:
            self.ours = True
        if name == STATUS_RESOURCE:
            return "status", about.get("client", "")
        get = wanted.get
        request = Request(self, name, get("mode", 0), get("quantity", 1), get("wait", 0),
                          get("create", 0), get("lifespan", 0))
        if "client" in about:
            self._read_additions(request, wanted, about)
        self.request = request
        self.state = self._AFTER_LOCK[self.state]
        return "lock", request

    def _read_additions(self, request, wanted, about):
        """What clients of ours say, and FLoM's do not."""
        self.about = dict(about)
        key = self.about.pop("key", None)
        if key:
            request.proof = proof_of(key)
        request.life = about.get("life", 0)
        request.kill = about.get("kill", 0)
        request.ident = plain(about.get("id", ""))  # as reports show it
        parents = plain(about.get("parent", "")).split(",")
        request.parents = tuple(ident for ident in parents[:MOST_PARENTS] if ident)
        request.patient = wanted.get("deadlock") == "wait"
        request.reclaim = wanted.get("reclaim")
        if request.reclaim is not None:
            request.claimed = wanted.get("held")

    def _unlock(self, elements):
        wanted = elements.get("resource", {})
        if wanted.get("name") != self.holds:
            raise ProtocolError("an unlock of what is not held")
        self.state = FREE
        self.holds = None
        rollback = wanted.get("rollback", 0)
        return "unlock", rollback == 0

    def _management(self, elements):
        about = elements.get("session", {})
        self.peer_id = about.get("peerid")
        ident = elements.get("evict", {}).get("id")
        if ident:
            return "evict", (ident, about)
        immediate = elements.get("shutdown", {}).get("immediate")
        if immediate is None:
            raise ProtocolError("a management message without an order")
        return "shutdown", immediate == 1

    def _ping(self, elements):
        return "ping", None

    def _pong(self, elements):
        return "pong", None

    _ANYBODYS = {(LOCK, 8): _lock, (MANAGEMENT, 8): _management, (PING, 8): _ping,
                 (PING, 16): _pong}
    _HOLDERS = {(UNLOCK, 8): _unlock, **_ANYBODYS}
    _MESSAGES = {FREE: _ANYBODYS, ASKING: _ANYBODYS, WAITING: _ANYBODYS, HOLDING: _HOLDERS,
                 HOLDER_ASKS: _HOLDERS}
    # The state after a lock 8.
    _AFTER_LOCK = {FREE: ASKING, ASKING: ASKING, WAITING: ASKING, HOLDING: HOLDER_ASKS,
                   HOLDER_ASKS: HOLDER_ASKS}

    # What goes out.

    def can_be_told(self, verdict: "int | None") -> "bool":
        """Whether the client may be told of the verdict; else its connection is to be closed."""
        if verdict is None:
            return False
        if self.ours:
            return True
        if self.state in UNANSWERED:
            return verdict <= IMPOSSIBLE
        return verdict in (OK, ENQUEUED)

    def answer(self, decision: "Decision") -> "bytes":
        """The bytes that tell the client of a decision, which it may be told."""
        verdict = decision.verdict
        step = 24
        if self.state in UNANSWERED and verdict != STOPPED:  # which answers no question
            step = 16
        self.state = self._AFTER[self.state].get(verdict, FREE)
        if verdict == OK and self.request is not None:
            self.holds = self.request.name
        elif verdict == EVICTED:
            self.holds = None
        if self.ours:
            return self._full_answer(step, decision)
        if decision.element is None:
            return self.short_answers[step, verdict]
        told = element("answer", ("rc", verdict), ("element", decision.element))
        return f"{self.heads[step]}{told}</msg>".encode("ascii")

    def _full_answer(self, step, decision):
        head = self.heads[step]
        if step == 16:
            head = self.first_to_ours
            if self.request is not None and self.request.grace is not None:
                head = f'{head[:-len("/>")]} grace="{self.request.grace}"/>'
        reason = decision.reason
        if reason is not None:
            reason = plain(reason)
        told = element("answer", ("rc", decision.verdict), ("element", decision.element),
                       ("token", decision.token), ("position", decision.position),
                       ("reason", reason))
        return f"{head}{told}</msg>".encode("ascii")

    # The state after a verdict; FREE where none is named.
    _AFTER = {
        FREE: {},
        ASKING: {OK: HOLDING, ENQUEUED: WAITING, WAIT_RESOURCE: WAITING},
        WAITING: {OK: HOLDING, ENQUEUED: WAITING, WAIT_RESOURCE: WAITING},
        HOLDING: {STOPPED: HOLDING},
        HOLDER_ASKS: {OK: HOLDING, BUSY: HOLDING, LIMIT: HOLDING},
    }

    # See introduce().
    heads: "Dict[int, str]" = {}  # of an answer, by its step
    first_to_ours = ""  # the head of a first answer to a client of ours
    short_answers: "Dict[tuple, bytes]" = {}  # (step, verdict): an answer without an element
    pong = encode(PING, 16)

    @classmethod
    def introduce(cls, peer_id: "str", daemon_id: "str", ping: "int | None" = None) -> "None":
        """Prepares the answers: `peer_id` is that of this host, `daemon_id` of this daemon; `ping`
        (ms) is the time between two pings of a client, None where no pings are wanted."""
        first, later = [encode(LOCK, step)[:-len(END)].decode() for step in (16, 24)]
        cls.heads = {16: first + element("session", ("peerid", peer_id)), 24: later}
        session = element("session", ("peerid", peer_id), ("daemon", daemon_id), ("ping", ping))
        cls.first_to_ours = first + session
        cls.short_answers = {}
        for verdict in (OK, ENQUEUED, WAIT_RESOURCE, BUSY, CANT_WAIT, IMPOSSIBLE, INVALID_NAME):
            for step, head in cls.heads.items():
                text = f'{head}<answer rc="{verdict}"/></msg>'
                cls.short_answers[step, verdict] = text.encode("ascii")


# --- Reports ------------------------------------------------------------------------------------
# What the daemon tells of itself: views of the lock table, made of data alone.
#
#     held_by   one line for a waiter that wants to know what it waits for
#     report    the answer to a lock of _STATUS, elements of the protocol
#     metrics   figures in Prometheus' text format, for --metrics
#     tree      small files in FLoM's layout, for -m
#
# The table may be large and names may be long, while the other clients want to be served.  So a
# report is made of pieces, one for each holder and each waiter, which are made when they can be
# sent.  What is the same for all waiters of a lane is found once: the holders in their way, and
# the name in base64.
#
# Not here on purpose: one moment for the whole report.  What comes late in it may be newer than
# what came first.

# The holders that a waiter waits for: the first of them, None where there is none, their number.
InTheWay = collections.namedtuple("InTheWay", "first number")


def _all_of(holders):
    if not holders:
        return InTheWay(None, 0)
    return InTheWay(holders[0], len(holders))


class Obstacles:
    """Which holders of the resource are in the way of the requests in these lanes."""

    def __init__(self, resource: "Resource", lanes: "Iterable[tuple]"):
        self._holders = list(resource.holders.values())
        points = dict.fromkeys(lanes, 0)  # lane: set of the holders in it, see Nesting
        for place, holder in enumerate(self._holders):
            points[holder.lane] = points.get(holder.lane, 0) | 1 << place
        self._rivals = rivals_of(points)

    def of(self, lane: "tuple") -> "InTheWay":
        """The holders in the way of the lane; all, when it waits for other waiters only."""
        rivals = self._rivals[lane]
        if not rivals:
            return _all_of(self._holders)
        first = (rivals & -rivals).bit_length() - 1
        number = bin(rivals).count("1")
        return InTheWay(self._holders[first], number)


def held_by(in_the_way: "InTheWay", now: "Moment") -> "str":
    """Who is in the way, in one line."""
    first, number = in_the_way
    if first is None:
        return "held by nobody"
    since = hhmmss(now.wall - first.held_since)
    line = f"held by {first.session} for {since}"
    if number > 1:
        line += f" and {number - 1} more"
    return line


# What a request asks for, beside the name, by the kind of its resource.
_ASKED = {"simple": "mode", "hierarchical": "mode", "numeric": "quantity"}


def report(table: "LockTable", introduction: "str", now: "Moment") -> "Iterator[str]":
    """Yields the pieces of the report: `introduction`, then the resources with those who hold and
    await them, then the parked requests.  Idle times are those of `now`."""
    encoded = functools.lru_cache(16)(encode_name)
    yield introduction
    for resource in list(table.resources.values()):
        yield from _resource_report(resource, now, encoded)
    for request in _parked(table):
        name = encoded(request.name)
        yield element("parked", ("name", name), *_about(request, encoded))
    yield END.decode()


def _parked(table):
    """The requests that wait for somebody to create their resources."""
    return [request for queue in table.parked.values() for request in queue.values()]


def _resource_report(resource, now, encoded):
    name, kind = encoded(resource.name), kind_of(resource.name)
    idle = _idle_time(resource, now)
    yield element("resource", ("name", name), ("kind", kind), ("idle", idle), end=">")
    for request in list(resource.holders.values()):
        yield element("holder", *_about(request, encoded), ("token", request.token))
    for position, request in enumerate(resource.waiters(), 1):
        yield element("waiter", *_about(request, encoded), ("position", position))
    yield "</resource>"


def _idle_time(resource, now):
    """ms that an idle resource will yet be kept; -1 for one that is in use."""
    if resource.idle_since is None:
        return -1
    passed = (now.mono - resource.idle_since) * 1000
    return max(0, round(resource.lifespan - passed))


def _about(request, encoded):
    """The attributes that a holder, a waiter and a parked request have in common."""
    session, kind = request.session, kind_of(request.name)
    about = session.about
    texts = (
        ("id", _ident(request)),
        ("peer", session.peer),
        ("host", about.get("host")),
        ("pid", about.get("pid")),
        ("user", session.user()),
        ("cmd", about.get("cmd")),
        ("element", request.element),
    )
    attributes: "list" = [(name, plain(text)) for name, text in texts if text is not None]
    asked = _ASKED.get(kind)
    if asked is not None:
        attributes.append((asked, getattr(request, asked)))
    if session.is_absent:
        attributes.append(("absent", 1))
    since = request.held_since or request.since
    attributes.append(("since", int(since)))
    if kind == "hierarchical":
        attributes.append(("node", encoded(request.name)))
    return attributes


def _ident(request):
    """The id by which people name the lock; FLoM's client has none, and gets one here."""
    if not request.ident:
        request.ident = os.urandom(8).hex()
    return request.ident


# Figures.

COUNTED_AT_ONCE = 1000  # resources
WAIT_BOUNDS = (0.001, 0.01, 0.1, 1, 10, 60, 600)  # s, the upper bounds of the histogram
REFUSED = {BUSY: "busy", CANT_WAIT: "cannot_wait", IMPOSSIBLE: "impossible", DEADLOCK: "deadlock",
           LIMIT: "limit", INVALID_NAME: "invalid_name"}


class Counts:
    """What has happened since the daemon began."""

    def __init__(self):
        self.verdicts: "Dict[int, int]" = collections.Counter()
        self.lost = 0  # sessions that ended while they held a lock
        # a histogram: grants by the time from the request
        self.waits = [0] * (len(WAIT_BOUNDS) + 1)
        self.waited = 0.0  # s, the sum of these times

    def note(self, verdict: "int", request: "Request | None", now: "Moment") -> "None":
        """Counts a decision on the request, None when the table does not know it any more."""
        self.verdicts[verdict] += 1
        if verdict == OK and request is not None:
            waited = max(0.0, now.wall - request.since)
            self.waits[bisect.bisect_left(WAIT_BOUNDS, waited)] += 1
            self.waited += waited


def metrics(table: "LockTable", counts: "Counts", sessions: "int", epoch: "int",
            failing: "bool", more: "Iterable[tuple]" = ()) -> "Iterator[str]":
    """Yields the lines of the figures in Prometheus' text format, version 0.0.4, or "" where it
    has counted for a while; `failing`: the memory cannot be written; `more` figures are rows:
    name, form, what it means, {what follows the name: value}."""
    numbers: "Dict[str, int]" = collections.Counter()
    names = iter(list(table.resources))
    for name in names:
        numbers[kind_of(name)] += 1
        numbers.update(map(kind_of, itertools.islice(names, COUNTED_AT_ONCE)))
        yield ""
    rows = _families(table, counts, sessions, epoch, failing, numbers)
    for name, form, meaning, values in [*rows, *more]:
        yield f"# HELP flomd_{name} {meaning}\n# TYPE flomd_{name} {form}\n"
        for labels, value in values.items():
            yield f"flomd_{name}{labels} {value}\n"


def _families(table, counts, sessions, epoch, failing, numbers):
    """The figures as rows; `numbers` of resources by their kinds."""
    granted = counts.verdicts[OK]
    return [
        ("sessions", "gauge", "Open connections.", {"": sessions}),
        ("resources", "gauge", "Resources by kind.", _by_kind(numbers)),
        ("holders", "gauge", "Sessions that hold a lock.", {"": table.holding}),
        ("absent_holders", "gauge", "Holders that have not come back since the daemon started.",
         {"": len(table.absent)}),
        ("waiters", "gauge", "Sessions that wait for a lock.", {"": table.waiting}),
        ("grants_total", "counter", "Locks granted.", {"": granted}),
        ("refusals_total", "counter", "Requests refused, by reason.", _refusals(counts)),
        ("lost_sessions_total", "counter", "Sessions that ended while they held a lock.",
         {"": counts.lost}),
        ("epoch", "gauge", "Upper half of the tokens.", {"": epoch}),
        ("memory_failing", "gauge", "1 while what is decided cannot be stored.",
         {"": int(failing)}),
        ("wait_seconds", "histogram", "Time from the request to the grant.", _histogram(counts)),
    ]


def label_value(text: "str") -> "str":
    """The text as it stands between the quotes of a label."""
    return plain(text).replace("\\", "\\\\").replace('"', '\\"')


def _by_kind(numbers):
    return {f'{{kind="{kind}"}}': numbers[kind] for kind in KINDS}


def _refusals(counts):
    values = {}
    for verdict, reason in REFUSED.items():
        values[f'{{reason="{reason}"}}'] = counts.verdicts[verdict]
    return values


def _histogram(counts):
    """The values of the histogram; a bucket counts all waits up to its bound."""
    values = {}
    bounds = [f"{bound:g}" for bound in WAIT_BOUNDS] + ["+Inf"]
    for bound, total in zip(bounds, itertools.accumulate(counts.waits)):
        values[f'_bucket{{le="{bound}"}}'] = total
    values["_sum"] = f"{counts.waited:.6f}"
    values["_count"] = sum(counts.waits)
    return values


# Files, in FLoM's layout.

def tree(table: "LockTable") -> "Iterator[Tuple[str, object]]":
    """Yields (path, content) of the files that show the table, which may change in between."""
    for number, resource in enumerate(list(table.resources.values()), 1):
        folder = f"lockers/{number}"
        holders, waiters = list(resource.holders.values()), list(resource.waiters())
        yield f"{folder}/resource_name", resource.name
        yield f"{folder}/resource_type", kind_of(resource.name)
        yield from _requests_tree(f"{folder}/holders", holders)
        yield from _requests_tree(f"{folder}/waitings", waiters)
    for number, request in enumerate(_parked(table), 1):
        folder = f"incubator/{number}"
        yield f"{folder}/peer_name", request.session
        yield f"{folder}/resource_name", request.name
        yield f"{folder}/resource_type", kind_of(request.name)


def _requests_tree(folder, requests):
    for place, request in enumerate(requests, 1):
        kind = kind_of(request.name)
        yield f"{folder}/{place}/peer_name", request.session
        if _ASKED.get(kind) == "mode":
            yield f"{folder}/{place}/lock_mode", MODES[request.mode]
        elif kind == "numeric":
            yield f"{folder}/{place}/quantity", request.quantity
        elif request.element and kind in ("sequence", "timestamp"):
            yield f"{folder}/{place}/{kind}_value", request.element
        if request.session.is_absent:
            yield f"{folder}/{place}/absent", 1


# --- Memory -------------------------------------------------------------------------------------
# What a daemon's successor has to know, as records: a key and a text.  Pure: where the records are
# kept is said elsewhere.
#
#     h/TOKEN        a holder; the token has 16 hex digits
#     r/NAME         a resource of which more is to be known than its holders; the name in base64
#     v/NAME/VALUE   a value that a transactional sequence got back, with its place in the order
#     d              the daemon: its epoch, the boot of the system, the tokens that are covered
#
# A text is attributes as they are in a message, printable.  Those that would say the usual are
# left out.
#
# What is told must have been stored; what is stored and was never told is found again by the id
# and the key of the client that asks again.  So whenever a daemon ends, nobody loses what he was
# told, and nobody has what he did not ask for.  The lock table only notes what it has touched; of
# that, batch_of() makes the records that are to be stored together.  everything() makes those of
# the whole table, for a new file.
#
# restore() is the way back: a table that is the one of which the records were made, but for those
# who waited (they ask again) and for the grants of the past, which count as grants of the whole.
# Its holders are absent: the session of each is an Absent, without a connection, until its client
# comes back.  Records that cannot all be true are not believed at all.
#
# Ages are taken from the clock that counts since the boot, suspended time included; over a boot
# from the clock on the wall.  They are never below 0.

LAYOUT = 1  # of the records
OF_HOLDER, OF_RESOURCE, OF_VALUE, OF_DAEMON = "h/", "r/", "v/", "d"  # how keys begin
TOLD = ("host", "user", "cmd")  # what clients of ours say of themselves
AMOUNTS = {  # the numbers of a holder that are stored as they are: least, greatest
    "pid": (0, MOST),
    "uid": (0, 2 ** 32 - 1),
    "grace": (-1, WIDEST),  # ms
}
QUOTED = 256  # texts that are kept as they are written

DaemonRecord = collections.namedtuple("DaemonRecord", "layout epoch boot pidns covers")


class BrokenMemory(Exception):
    """Records that cannot have been made by a daemon, or not by one."""


class Absent(Identity):
    """The session of a holder whose client is not there."""
    __slots__ = ()
    is_absent = True
    connection = None
    peer_id = None
    holds = None  # nothing that it could unlock

    @classmethod
    def of(cls, session: "Identity", name_of: "Callable[[int], str]") -> "Absent":
        """In place of the session of a client that was there."""
        absent = cls(session.peer, name_of)
        absent.ours = session.ours
        absent.about = session.about
        absent.uid = session.uid
        return absent


# Records.

_encoded = functools.lru_cache(QUOTED)(encode_name)


@functools.lru_cache(QUOTED)
def _quoted(text):
    """The text as the value of an attribute."""
    text = plain(text, len(text))
    whole = element("x", ("x", text))
    return whole[len('<x x="'):-len('"/>')]


def batch_of(changes: "Changes") -> "List[Tuple[str, str | None]]":
    """The records that are to be stored together: (key, text, or None where there is none)."""
    batch: "List[Tuple[str, str | None]]" = []
    for token, holder in changes.holders.items():
        text = None
        if holder is not None:
            text = _holder_text(holder)
        batch.append((f"{OF_HOLDER}{token:016x}", text))
    for name, resource in changes.resources.items():
        text = None
        if resource is not None:
            text = _resource_text(resource)
        batch.append((f"{OF_RESOURCE}{_encoded(name)}", text))
    for (name, value), place in changes.values.items():
        text = None
        if place is not None:
            text = f'place="{place}"'
        batch.append((f"{OF_VALUE}{_encoded(name)}/{value}", text))
    return batch


def everything(table: "LockTable") -> "Iterator[Tuple[str, str]]":
    """Yields the records of the whole table, that of the daemon aside.

    The table may change in between: what is gone when its turn has come is left out, and what
    comes late is in the batches of that time.
    """
    for name in list(table.resources):
        resource = table.resources.get(name)
        if resource is not None and resource.is_remembered():
            yield f"{OF_RESOURCE}{_encoded(name)}", _resource_text(resource)
            yield from _values(table, name, list(resource.returned))
    for token in list(table.holders):
        holder = table.holders.get(token)
        if holder is not None:
            yield f"{OF_HOLDER}{token:016x}", _holder_text(holder)


def _values(table, name, values):
    """The records of these values of a sequence, as far as they are still there."""
    for value in values:
        resource = table.resources.get(name)
        if resource is not None and value in resource.returned:
            place = resource.returned[value]
            yield f"{OF_VALUE}{_encoded(name)}/{value}", f'place="{place}"'


def _holder_text(holder):
    session = holder.session
    text = (f'name="{_encoded(holder.name)}" boot="{holder.held_boot:.6f}" '
            f'since="{holder.held_since:.6f}" peer="{_quoted(session.peer)}"')
    if holder.mode:
        text += f' mode="{holder.mode}"'
    if holder.quantity != 1:
        text += f' quantity="{holder.quantity}"'
    if holder.element is not None:
        text += f' element="{_quoted(holder.element)}"'
    if holder.slot is not None:
        text += f' slot="{holder.slot}"'
    if holder.local:
        text += ' local="1"'
    if holder.pid is not None:
        text += f' pid="{holder.pid}"'
    if holder.uid is not None:
        text += f' uid="{holder.uid}"'
    if holder.grace is not None:
        text += f' grace="{holder.grace}"'
    if session.ours:
        text += _additions(holder, session.about)
    return text


def _additions(holder, about):
    """What clients of ours say, and FLoM's do not."""
    text = ' client="1"'
    if holder.ident:
        text += f' id="{_quoted(holder.ident)}"'
    if holder.proof is not None:
        text += f' proof="{holder.proof}"'
    if holder.parents:
        parents = ",".join(holder.parents)
        text += f' parents="{_quoted(parents)}"'
    if holder.life:
        text += ' life="1"'
    for name in TOLD:
        if name in about:
            text += f' {name}="{_quoted(about[name])}"'
    said = about.get("pid")
    if said is not None and said != str(holder.pid):
        text += f' said="{_quoted(said)}"'
    return text


def _resource_text(resource):
    text = f'lifespan="{resource.lifespan}"'
    if resource.idle_since is not None:
        text += f' boot="{resource.idle_boot:.6f}" since="{resource.idle_wall:.6f}"'
    for name, value in resource.memory().items():
        text += f' {name}="{value}"'
    return text


def daemon_record(epoch: "int", boot: "str", pidns: "str", covers: "int") -> "Tuple[str, str]":
    """The record of the daemon: `boot` and `pidns` are the ids of the boot of the system and of
    the pid namespace, `covers` is the token up to which tokens may have been told."""
    text = (f'layout="{LAYOUT}" epoch="{epoch}" boot="{_quoted(boot)}" pidns="{_quoted(pidns)}" '
            f'covers="{covers}"')
    return OF_DAEMON, text


def read_daemon(text: "str") -> "DaemonRecord":
    """The record of a daemon, which may be of another layout; raises BrokenMemory."""
    with _believing():
        found = _attributes_of(text)
        numbers = [int(found[name]) for name in ("layout", "epoch", "covers")]
        layout, epoch, covers = numbers
        return DaemonRecord(layout, epoch, found["boot"], found["pidns"], covers)


# The way back.

@contextlib.contextmanager
def _believing():
    """Whatever a record says that cannot be is a BrokenMemory."""
    try:
        yield
    except (KeyError, ValueError, ProtocolError) as error:
        raise BrokenMemory(f"{type(error).__name__}: {error}")


def _attributes_of(text):
    """{name: text} of the attributes; raises ProtocolError, or ValueError."""
    found = dict(_pairs(text))
    plainly = " ".join([f'{name}="{value}"' for name, value in found.items()])
    if plainly != text or "&" in text:  # as few are
        whole = list(tags(f"<x {text}/>".encode("utf-8", "surrogatepass")))
        if len(whole) != 1:
            raise ValueError("more than attributes")
        found = whole[0][2]
        text = "".join(found.values())
    if not text.isprintable():
        raise ValueError("a text that is not printable")
    return found


def _amount(text, least, greatest):
    """The number that is written so; raises ValueError for one out of its range."""
    number = int(text)
    if not least <= number <= greatest:
        raise ValueError("a number out of its range")
    return number


def _tell_nobody(_):
    """For those who do not want to know whose lock a boot has ended."""


def restore(records: "Dict[str, str]", make_table: "Callable[[], LockTable]", now: "Moment",
            rebooted: "bool", name_of: "Callable[[int], str]",
            ended: "Callable[[Request], object]" = _tell_nobody) -> "LockTable":
    """The table of which the records were made, and that make_table() has made empty.

    rebooted: the system was booted since; who was on it then holds no longer, and has committed:
    ended(holder) is called for each.  name_of(uid) tells the name of a user of this system.
    Raises BrokenMemory where the records cannot all be true.
    """
    table = make_table()
    for _ in restoring(records, table, now, rebooted, name_of):
        pass
    if rebooted:
        for session, holder in list(table.absent.items()):
            if holder.local:
                table.release(session, True, now)
                ended(holder)
    return table


def restoring(records: "Dict[str, str]", table: "LockTable", now: "Moment", rebooted: "bool",
              name_of: "Callable[[int], str]", moved: "bool" = False) -> "Iterator[None]":
    """Takes the records into an empty table and yields after each, so that others can do something
    in between.  Nothing in the table is to be believed before the end.  Raises BrokenMemory.
    moved: they were made on another host, whose clocks are not these: what is idle is idle since
    now."""
    reader = _Reader(table, now, rebooted, name_of, moved)
    with _believing():
        yield from reader.read(records)


_pairs = re.compile('([a-z]+)="([^"<>]*)"').findall


class _Reader:
    """Takes records into an empty table."""

    def __init__(self, table, now, rebooted, name_of, moved):
        self._restoration = table.restoration()
        self._now = now
        self._rebooted = rebooted
        self._moved = moved
        self._name_of = name_of

    def read(self, records):
        """Takes all records of the predecessor in their order: resources, values, holders; yields
        after each."""
        places: "dict" = collections.defaultdict(dict)
        holders = []
        for key, text in records.items():
            if key.startswith(OF_RESOURCE):
                self._resource(key, text)
            elif key.startswith(OF_VALUE):
                name, _, value = key[len(OF_VALUE):].rpartition("/")
                places[name][value] = int(_attributes_of(text)["place"])
            elif key.startswith(OF_HOLDER):
                holders.append((int(key[len(OF_HOLDER):], 16), text))
            elif key != OF_DAEMON:
                raise ValueError("an unknown key")
            yield
        for name, values in places.items():
            self._restoration.add_values(decode_name(name), values)
            yield
        holders.sort()
        for token, text in holders:
            self._restoration.add_holder(self._holder(token, text))
            yield
        yield from self._restoration.finish(self._now)

    def _moment(self, found):
        """(s since this boot, s since 1970) of the moment that a record names, never later than
        now.  A boot before this one has begun at a time that nobody knows."""
        boot = float(found["boot"])
        wall = float(found["since"])
        if boot - boot != 0 or wall - wall != 0:
            raise ValueError("no moment")  # infinite, or no number
        now = self._now
        if self._moved:
            boot = now.boot
        elif self._rebooted:
            boot = now.boot - (now.wall - wall)
        return min(boot, now.boot), wall

    def _resource(self, key, text):
        found = _attributes_of(text)
        name = decode_name(key[len(OF_RESOURCE):])
        resource = self._restoration.add_resource(name)
        resource.lifespan = _amount(found["lifespan"], LEAST_LIFESPAN, WIDEST)
        if "boot" in found:
            resource.idle_boot, resource.idle_wall = self._moment(found)
            age = self._now.boot - resource.idle_boot
            resource.idle_since = self._now.mono - age
        resource.recall(found)

    def _holder(self, token, text):
        """The request of a holder that is absent."""
        found = _attributes_of(text)
        get = found.get
        session = Absent(found["peer"], self._name_of)
        mode = _amount(get("mode", 0), 0, len(MODES) - 1)
        quantity = _amount(get("quantity", 1), 1, MOST)
        holder = Request(session, decode_name(found["name"]), mode, quantity, 1, 1)
        holder.token = _amount(token, 1, WIDEST)
        holder.element = get("element")
        if "slot" in found:
            holder.slot = int(found["slot"])
        self._identify(holder, found)
        holder.held_boot, holder.held_since = self._moment(found)
        holder.since = holder.held_since
        return holder

    def _identify(self, holder, found):
        session = holder.session
        holder.local = "local" in found
        for name, (least, greatest) in AMOUNTS.items():
            if name in found:
                setattr(holder, name, _amount(found[name], least, greatest))
        session.uid = holder.uid
        holder.origin = holder.pid
        if holder.pid is None:
            holder.origin = session.peer.rpartition(":")[0]
        if "client" in found:
            self._add_additions(holder, found)

    @staticmethod
    def _add_additions(holder, found):
        session = holder.session
        session.ours = True
        session.about = {name: found[name] for name in TOLD if name in found}
        if "said" in found:
            session.about["pid"] = found["said"]
        elif holder.pid is not None:
            session.about["pid"] = str(holder.pid)
        holder.ident = found.get("id")
        holder.proof = found.get("proof")
        holder.life = int("life" in found)
        if "parents" in found:
            holder.parents = tuple(found["parents"].split(","))


# --- State on disk ------------------------------------------------------------------------------
# What a daemon leaves for its successor, in two files: the state and the journal.
#
# The state is one record of fixed length, which is changed in place:
#
#     epoch   the upper half of its tokens, a number that grows with every daemon
#     boot    the id of the boot of the system: what was held before another boot is held no more
#     mark    somebody may hold a lock that the journal does not know
#     pid     whose it is, for the messages of daemons that find the file locked
#
# A second line says that a journal is kept, so that a journal which is lost is missed.
#
# The file is a lock, too.  Its flock keeps a second daemon from the same socket (see Listeners),
# or from the state of the same address; the end of the process releases it.  A cleaner of /tmp may
# remove the file; then it keeps nobody away, so the daemon looks every LOOK s, makes it anew and
# locks it.  The journal beside it is read and written under this lock alone.
#
# The journal has what the memory (see there) wants to be kept: records in batches, each appended
# in one write, and now and then a new file with what is alive.
#
#     to count     a batch counts when a successor would find it: when it is written, or with a
#                  `synced` journal (--state-dir) when fdatasync has returned
#     whole        the journal knows everybody who can hold a lock, the mark is clear
#     to rewrite   to write all records into a new file, which then takes the path
#     covered      up to there tokens may have been told: the record `d` of the journal says so
#
# The problem: a successor must believe what it reads, whatever has happened to disk, files and
# clocks.  So whatever does not check makes the journal worthless, and nothing is known; then the
# recovery window lets former holders come back.  A journal counts only when its epoch is at least
# that of the state: the epoch goes into the journal first, and a daemon that keeps none (an older
# version, another user's) leaves a journal behind that does not count.  And whoever puts a new
# journal in place of one of which not all was known sets the mark before, and clears it when the
# window is over and all who hold a lock are in the journal.
#
# With --state-dir the lock beside the local socket, the guard, is a file of its own.  It gets the
# epoch, too: a daemon without that option leaves its own there, and then the journal in the folder
# is older.
#
# A journal that cannot be written loses no decision.  Without sync the mark takes its place; with
# sync nothing is told until a new file could be written.  A file on which a write or a sync has
# failed gets no more batches: it lacks one.  A sync in particular is not tried again, since the
# system may have forgotten what it could not write.
#
# Not here on purpose: what the records mean, and any copy of them; a rewrite asks for them.

RECORD = "flomd {epoch:010d} {boot:36.36} {held:d} {pid:010d}\n"
MARK_AT = len(RECORD.format(epoch=0, boot="", held=0, pid=0)) - len("0 0000000000\n")
JOURNAL_LINE, OTHER_LINE = "journal\n", "nothing\n"  # behind the record, of one length
QUIET = 1  # s without any holder before the mark is cleared
HELD_FOR = 5  # s that a lock may be held by a daemon that does not answer any more
AGAIN = 0.02  # s until a lock that is held is tried once more
RETRY = 10  # s until a journal that cannot be written is tried again
BOOT_ID = "/proc/sys/kernel/random/boot_id"
PID_NAMESPACE = "/proc/self/ns/pid"
STATE_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
PRIVATE, SHARED = 0o600, 0o666  # permissions
IN_FILE, SYNCED, NOT_KEPT = "file", "synced", "none"  # kinds of stores
IN_ETCD = "etcd"  # the kind of a quorum's: see Quorum
JOURNAL_HEAD = f"flomd journal {LAYOUT}\n".encode()
PORTION = 1000  # records that a rewrite takes from the table at once
LEAST_REWRITTEN = 2 ** 20  # bytes of a journal that is never too long
MOST_DEAD = 4  # times what is alive, from which on a journal is too long
LAST_WORK = 2  # s that the end of the daemon waits for the disk

_record = re.compile(rb"""
    flomd\ (\d{10})   # epoch
    \ (.{36})         # boot
    \ ([01])          # mark
    \ (\d{10})\n      # pid
    (journal\n)?      # whether it kept a journal
    """, re.VERBOSE).match

_journal_head = re.compile(rb"flomd journal (\d{1,9})\n").match

_batch_head = re.compile(rb"""
    \+([1-9]\d{0,9})  # the length of the batch, in bytes
    \ ([0-9a-f]{8})\n  # its CRC32
    """, re.VERBOSE).match

_batch_head_cut = re.compile(rb"\+([1-9]\d{0,9}( [0-9a-f]{0,8})?)?\Z").match


# The text of a journal.

class Damage(Exception):
    """What was found is no journal that can be believed."""


class OtherLayout(Damage):
    """It is the journal of another version.  The argument is the number of its layout."""


def encode_batch(records: "Iterable[Tuple[str, str | None]]") -> "bytes":
    """The bytes of a batch.  A record is (key, text), or (key, None) when it is to be forgotten;
    neither has a line break, and a key has no blank.  Of no record b"" is made."""
    lines = []
    for key, text in records:
        if text is None:
            text = "-"
        lines.append(f"{key} {text}\n")
    body = "".join(lines).encode("utf-8", "surrogateescape")
    assert body.count(b"\n") == len(lines)
    if not lines:
        return b""
    return b"+%d %08x\n" % (len(body), binascii.crc32(body)) + body


def read_journal(data: "bytes") -> "Tuple[Dict[str, str], int]":
    """({key: text}, length) of a whole file: the length ends with its last whole batch.  What
    follows there is the beginning of a batch that was cut off.  Raises Damage."""
    head = _journal_head(data)
    if head is None:
        raise Damage("it does not begin as a journal does")
    if head.group() != JOURNAL_HEAD:
        raise OtherLayout(int(head.group(1)))
    records: "Dict[str, str]" = {}
    place = head.end()
    while place < len(data):
        body = _body_of_batch(data, place)
        if body is None:
            break
        begin, end = body
        _apply_batch(data[begin:end], records)
        place = end
    return records, place


def _body_of_batch(data, place):
    """(begin, end) of the body of a batch; None when it is cut off.  Raises Damage."""
    head = _batch_head(data, place)
    if head is None:
        if _batch_head_cut(data, place):
            return None
        raise Damage(f"no batch begins at byte {place}")
    begin = head.end()
    end = begin + int(head.group(1))
    body = data[begin:end]
    checks = binascii.crc32(body) == int(head.group(2), 16)
    if end <= len(data) and checks:
        return begin, end
    # The last batch may be cut off.  It is not when another one follows, or when it is whole but
    # for its length.
    if end <= len(data) or checks or b"\n+" in body:
        raise Damage(f"the batch at byte {place} is not as it was written")
    return None


def _apply_batch(body, records):
    lines = body.decode("utf-8", "surrogateescape").split("\n")
    if lines.pop():
        raise Damage("a batch does not end with a line")
    for line in lines:
        key, blank, text = line.partition(" ")
        if not blank:
            raise Damage("a line has no text")
        if text == "-":
            records.pop(key, None)
        else:
            records[key] = text


# The lock, and the record that is changed in place.

class State:
    """The file at `path` (None: nothing is remembered), which is made if it is not there.  A
    `shared` file may belong to anybody; a `durable` record is on the disk, and not only in the
    system's memory, when it counts as written.  Raises CannotServe."""

    def __init__(self, log: "Log", path: "str | None" = None, shared: "bool" = False,
                 durable: "bool" = False):
        self.log, self.path = log, path or os.devnull
        self.durable = durable
        self.mode = SHARED if shared else PRIVATE
        # What the predecessor, or who has the lock, has left.
        self.epoch = self.pid = 0
        self.boot = ""
        self.marked = False
        self.had_journal = False
        self._text = b""  # the record of this daemon
        self.number = self._open()

    def _open(self):
        """The descriptor of the file at the path."""
        with serving(f"cannot open {self.path}"):
            number = self._open_or_create()
            found = os.fstat(number)
        if not self._is_usable(found):
            os.close(number)
            raise CannotServe(f"{self.path} is no file of {login()}")
        return number

    def _open_or_create(self):
        try:  # kernels refuse O_CREAT for the files of others in a sticky directory
            return os.open(self.path, STATE_FLAGS)
        except FileNotFoundError:
            with creating(self.mode):
                return os.open(self.path, STATE_FLAGS | os.O_CREAT, self.mode)

    def _is_usable(self, found):
        """Whether it is a file that nobody else can have put in the way."""
        if self.is_nowhere():
            return True
        if self.mode == PRIVATE and found.st_uid != os.getuid():
            return False
        return stat.S_ISREG(found.st_mode) and found.st_nlink == 1

    def is_nowhere(self) -> "bool":
        """Whether nothing is remembered, since no file can be had."""
        return self.path == os.devnull

    def lock(self, wait: "bool" = False) -> "bool":
        """Takes the flock of the file; returns whether it could be had.  Raises OSError where
        there are no locks."""
        while True:
            if not _flock(self.number, wait):
                self._read()
                return False
            if self._is_at_its_path():
                self._accept()
                return True
            os.close(self.number)  # its path leads to another one now
            self.number = self._open()

    def _read(self):
        """Reads what the predecessor, or who has the lock, has written."""
        found = _record(os.pread(self.number, 128, 0))
        if found:
            epoch, boot, mark, pid, journal = found.groups()
            self.epoch, self.pid = int(epoch), int(pid)
            self.boot = boot.decode("ascii", "replace").strip()
            self.marked = mark == b"1"
            self.had_journal = journal is not None

    def _accept(self):
        """The lock is taken, and what the file says is that of the predecessor."""
        self._read()
        if self.epoch > LAST_EPOCH:
            self.log.error(f"{self.path} is damaged: its epoch, {self.epoch}, is ignored")
            self.epoch = 0

    def _is_at_its_path(self):
        """Whether the path still leads to the file."""
        return identity(self.path) == identity(self.number)

    def write(self, epoch: "int", boot: "str", held: "bool", journal: "bool") -> "None":
        """Writes the whole record.  Raises OSError."""
        text = RECORD.format(epoch=epoch, boot=boot, held=held, pid=os.getpid())
        if journal:
            text += JOURNAL_LINE
        elif self.had_journal:
            text += OTHER_LINE
        self._text = text.encode()
        self._write_text()

    def _write_text(self):
        os.pwrite(self.number, self._text, 0)
        if self.durable:
            os.fsync(self.number)

    def write_mark(self, held: "bool") -> "None":
        """Changes the mark of the record that is there.  Raises OSError."""
        mark = b"1" if held else b"0"
        os.pwrite(self.number, mark, MARK_AT)
        self._text = self._text[:MARK_AT] + mark + self._text[MARK_AT + 1:]

    def look(self) -> "bool":
        """Makes and locks the file anew where its path does not lead to it any more; returns
        whether this daemon has the lock of what is there."""
        if self._is_at_its_path():
            return True
        try:
            number = self._open()
        except CannotServe as error:
            self.log.limited(str(error), "error")
            return False
        locked = False
        with contextlib.suppress(OSError):
            locked = _flock(number, wait=False)
        if not locked:
            os.close(number)
            self.log.limited(f"{self.path} is another daemon's now", "error")
            return False
        os.dup2(number, self.number, inheritable=False)  # the thread may be about to write to it
        os.close(number)
        self.log.error(f"{self.path} was removed; it was made and locked anew")
        try:
            self._write_text()
        except OSError as error:
            self.log.limited(f"cannot write {self.path}: {error.strerror}", "error")
        return True


def take(state: "State", served: "str", foreground: "bool", group: "bool",
         answers: "Callable[[], bool]") -> "bool":
    """Takes the lock of a State.  While another process holds it, it is waited for: for HELD_FOR s
    and as long as nobody answers(), in the foreground for ever.  Raises CannotServe, which says
    what is `served`; a group's answers() may raise SteppedBack.  Returns whether it waited."""
    if state.lock():
        return False
    if foreground:
        state.log.info(f"waiting for the daemon with pid {state.pid} to end")
    block = foreground and not group  # the group may get another daemon meanwhile
    until = time.monotonic() + HELD_FOR
    while not state.lock(wait=block):
        answered = answers()
        if not foreground:
            _give_up(state, served, answered, time.monotonic() > until)
        time.sleep(AGAIN)
    return True


def _give_up(state, served, answered, late):
    """Raises CannotServe when the daemon that holds the lock answers, or does not end in time."""
    if answered:
        raise CannotServe(f"another daemon (pid {state.pid}) serves {served}")
    if late:
        raise CannotServe(f"{state.path} is held by a daemon (pid {state.pid}) that does not "
                          f"answer at {served} and does not end")


def _flock(number, wait):
    """Locks an open file; returns False when another process has the lock."""
    operation = fcntl.LOCK_EX
    if not wait:
        operation |= fcntl.LOCK_NB
    try:
        fcntl.flock(number, operation)
    except WOULD_BLOCK:
        return False
    return True


def boot_id() -> "str":
    """What tells this boot of the system from any other; "" where it cannot be had."""
    try:
        with open(BOOT_ID) as file:
            return file.read().strip()
    except OSError:
        return ""


def pid_namespace() -> "str":
    """What tells this pid namespace from any other; "" where it cannot be had."""
    try:
        return os.readlink(PID_NAMESPACE)
    except OSError:
        return ""


def epoch_of_the_clock() -> "int":
    """s since EPOCH; 0 when the clock is so wrong that it would use up all tokens."""
    seconds = int(time.time()) - EPOCH
    return seconds if seconds <= LAST_EPOCH else 0


def identity(file):
    """What tells a file (a path, or a descriptor) from any other, None when there is none."""
    try:
        if isinstance(file, int):
            found = os.fstat(file)
        else:
            found = os.lstat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def creating(mode):
    """Files that are created get these permissions, whatever the starter's umask was."""
    before = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(before)


# The file of a journal.

_sync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


class JournalFile:
    """One file: the one of the journal, or a new one that is to take its path.  Its length is what
    was written by whole batches."""

    def __init__(self, path: "str", synced: "bool"):
        self.path, self.synced = path, synced
        self.number = -1
        self.length = 0
        self.is_new = False  # it has not taken the path of the journal yet

    def open(self) -> "bytes":
        """Opens the file that is there, and reads it.  Raises OSError; Damage when it may be
        another's."""
        self.number = os.open(self.path, STATE_FLAGS | os.O_NONBLOCK)
        found = os.fstat(self.number)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise Damage("it is no file of its own")
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & ~PRIVATE:
            raise Damage(f"it is no file of {login()} alone")
        with open(self.number, "rb", 0, closefd=False) as file:
            return file.read()

    def cut(self, length: "int") -> "None":
        """Whatever follows there is removed.  Raises OSError."""
        os.ftruncate(self.number, length)
        self.length = length

    def create(self) -> "None":
        """Makes a new file, with its head.  Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self.number = os.open(self.path, STATE_FLAGS | os.O_CREAT | os.O_EXCL, PRIVATE)
        self.is_new = True
        self.append(JOURNAL_HEAD)

    def append(self, data: "bytes") -> "None":
        """Writes at the end; of what fails nothing is left.  Raises OSError."""
        try:
            written = os.pwrite(self.number, data, self.length)
            if written < len(data):
                os.pwrite(self.number, data[written:], self.length + written)  # says why
                raise OSError(errno.EIO, "a write was not whole")
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self.number, self.length)
            raise
        self.length += len(data)

    def sync(self) -> "None":
        """With a synced journal: what was written is on the disk.  Raises OSError."""
        if self.synced:
            _sync(self.number)

    def take_path(self, path: "str") -> "None":
        """From now on it is the file at this path.  Raises OSError."""
        self.sync()
        os.rename(self.path, path)
        self.path, self.is_new = path, False
        if self.synced:
            sync_folder(os.path.dirname(path))

    def is_at_its_path(self) -> "bool":
        """Whether the path still leads to it."""
        return identity(self.path) == identity(self.number)

    def close(self) -> "None":
        """No more is written."""
        if self.number >= 0:
            os.close(self.number)
        self.number = -1

    def discard(self) -> "None":
        """Removes a new file that did not become whole."""
        self.close()
        if self.is_new:
            with contextlib.suppress(OSError):
                os.unlink(self.path)


class Work:
    """What is to be done with the files of a journal at one time: to append a batch to the file
    that counts, and the same and a portion of all records to the new one."""

    new: "JournalFile | None" = None
    portion = b""
    is_last = False  # then the new file takes the path
    looks = False  # whether the path still leads to the file
    drop = ""  # why neither file is to be written any more
    # What has come of it.
    failure = ""  # why the file does not count any more
    failure_of_new = ""

    def __init__(self, path: "str", file: "JournalFile | None", batch: "bytes",
                 dones: "List[Act]"):
        self.path = path
        self.file = file  # None when no file counts
        self.batch = batch
        self.dones = dones

    def has_to_be_done(self) -> "bool":
        """Whether there is anything to be done."""
        return bool(self.batch or self.portion or self.is_last or self.looks or self.drop
                    or self.dones)

    def do(self) -> "None":
        """Does it; an OSError is a failure.  With a synced journal this is called in the
        thread."""
        file, new = self.file, self.new
        if self.drop:
            self.failure = self.drop
            if new is not None:
                self.failure_of_new = self.drop
        elif file is not None:
            self.failure = failure_of(self._append)
        if new is not None:
            if not self.failure_of_new:
                self.failure_of_new = failure_of(self._rewrite)
            if self.failure_of_new:
                self._discard(new)
        if file is not None and (self.failure or self.was_replaced()):
            file.close()

    def fail(self, reason: "str") -> "None":
        """A bug kept it from being done: neither file is to be written any more."""
        self.drop = reason
        self.do()

    def _discard(self, new):
        """Nobody is to believe a new file that is not whole.  One that is whole, and has the path,
        but whose name may not be on the disk, leaves no file that counts."""
        if not new.is_new and new.number >= 0:
            self.failure = self.failure_of_new
        new.discard()

    def _append(self):
        file: "Any" = self.file
        if self.batch:
            file.append(self.batch)
            file.sync()
        if self.looks and not file.is_at_its_path():
            raise OSError(errno.ENOENT, "it was removed")

    def _rewrite(self):
        new: "Any" = self.new
        if new.number < 0:
            new.create()
        data = self.batch + self.portion
        if data:
            new.append(data)
        if self.is_last:
            new.take_path(self.path)

    def was_replaced(self) -> "bool":
        """Whether the new file has taken the path."""
        return self.is_last and not self.failure_of_new

    def is_stored(self) -> "bool":
        """Whether its batch counts."""
        return self.was_replaced() or (self.file is not None and not self.failure)


def check_replaceable(path: "str") -> "None":
    """Raises OSError where something else than a file is, as a device or a fifo: a daemon of root
    that gives its name to a new file would take /dev/null from everybody."""
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if os.path.exists(path) and not os.path.isfile(path):
        raise FileExistsError(errno.EEXIST, "it is no file")


def sync_folder(path: "str") -> "None":
    """The names in the folder are on the disk.  Raises OSError."""
    folder = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def failure_of(act: "Act") -> "str":
    """Calls act(); returns why it has failed, "" when it has not."""
    try:
        act()
    except OSError as error:
        return error.strerror or str(error)
    return ""


class Task:
    """Anything else that waits for a disk: act() is called, and may raise OSError."""

    def __init__(self, act: "Act"):
        self.act = act

    def do(self) -> "None":
        """Does it."""
        failure_of(self.act)

    def fail(self, reason: "str") -> "None":
        """A bug kept it from being done."""


def ignore(_: "object" = None) -> "None":
    """To call where there is nothing to be done."""


def iter_nothing() -> "Iterator[Tuple[str, str]]":
    """The records of a table that is not there yet."""
    return iter(())


# Who does it: the loop itself, or a thread.

class AtOnce:
    """Does what is to be done, before the call returns."""

    def do(self, work: "Work | Task", hear: "Callable[[Any], object]") -> "None":
        """Calls work.do(), and then hear(work)."""
        work.do()
        hear(work)

    def finish(self, seconds: "float") -> "None":
        """All is done, and always was."""


class Thread:
    """Does in a thread what waits for a disk, one work after the other.

    A byte in a socket wakes the thread, and one wakes the loop when a work is done.  There is
    nothing else that both use: no lock, so that a process forked meanwhile finds none taken.  A
    socket that takes no more bytes has many, and one is enough.

    A bug ends the thread.  What it had to do has failed then, and another thread goes on.
    """

    def __init__(self, loop: "Loop", name: "str" = "disk"):
        self._loop = loop
        self._name = name
        self._is_finished = False
        # (work, whom to tell) that nobody was told of yet
        self._begun: "Deque[Tuple[Work | Task, Callable[[Any], object]]]" = collections.deque()
        self._start()

    def _start(self):
        """Raises OSError."""
        import threading
        self._todo: "Deque[Work | Task]" = collections.deque()
        self._done: "Deque[Work | Task]" = collections.deque()
        self._bug: "BaseException | None" = None
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._loop.watch(self._ours, self._handle)
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # there are too many
            self._loop.forget(self._ours)
            self._ours.close()
            self._theirs.close()
            raise OSError(errno.EAGAIN, str(error))

    def _run(self):
        """In the thread."""
        block_signals()
        with self._theirs:  # its end tells the loop of a bug
            try:
                self._obey()
            finally:
                _, self._bug, _ = sys.exc_info()

    def _obey(self):
        while take_bytes(self._theirs):
            while self._todo:
                work = self._todo.popleft()
                work.do()
                self._done.append(work)
                with contextlib.suppress(ConnectionError):  # finish() was called
                    self._theirs.send(b".")

    def do(self, work: "Work | Task", hear: "Callable[[Any], object]") -> "None":
        """Has work.do() called in the thread, and then hear(work) by the loop."""
        self._begun.append((work, hear))
        self._todo.append(work)
        with contextlib.suppress(BrokenPipeError, BlockingIOError):  # a bug, see _handle(); full
            self._ours.send(b".")

    def _handle(self, events):
        is_open = take_bytes(self._ours)
        self._hear()
        if not is_open and not self._is_finished:
            self._begin_again()

    def _hear(self):
        while self._done and not self._is_finished:
            self._done.popleft()
            work, hear = self._begun.popleft()
            hear(work)

    def _begin_again(self):
        """Raises the bug that has ended the thread, when another one has begun."""
        bug = self._bug
        failed, self._begun = self._begun, collections.deque()
        self._loop.forget(self._ours)
        self._ours.close()
        self._start()
        for work, hear in failed:
            work.fail(f"{type(bug).__name__}: {bug}")
            hear(work)
        raise RuntimeError("a bug has ended the thread that waits for the disk") from bug

    def finish(self, seconds: "float") -> "None":
        """Waits so many s, at most, until all is done, and ends the thread, after all that it was
        told to do.  Of what is not done by then nobody hears."""
        until = time.monotonic() + seconds
        left = seconds
        while self._begun and left > 0:
            readable, _, _ = select.select([self._ours], [], [], left)
            if readable and not take_bytes(self._ours):
                break
            self._hear()
            left = until - time.monotonic()
        self._is_finished = True
        self._loop.forget(self._ours)
        self._ours.close()


def take_bytes(source: "socket.socket") -> "bool":
    """Takes the bytes that have come, or waits for one; returns whether the other end is open.
    The end of one that has not read all is a reset."""
    try:
        return source.recv(64) != b""
    except ConnectionResetError:
        return False


def block_signals() -> "None":
    """In a thread: signals are the main thread's."""
    numbers = set(signal_names())
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)


# The store.

class Journal:
    """Keeps the records of the memory in the file at `path`.

    Records come in by commit().  While a work is under way they gather, and are one batch: with a
    synced journal the clients of one sync share the next.  While the journal is rewritten each
    batch goes to both files; a portion is read from the table in the moment in which the batches
    before it are written, so it is never older than they are.

    `failing` says why what is committed does not count now, "" when it does.  on_change(journal)
    is called when that has changed, and when the journal was rewritten; may_rewrite() tells
    whether a new file may count.
    """

    def __init__(self, path: "str", synced: "bool", on_change: "Callable[[Journal], object]",
                 may_rewrite: "Callable[[], bool]"):
        self.path, self.synced = path, synced
        self.failing = ""
        self.rewritten = 0  # times that the file was
        self._on_change = on_change
        self._may_rewrite = may_rewrite
        self._hand: "AtOnce | Thread" = AtOnce()
        self._loop: "Any" = None
        self._file: "JournalFile | None" = None  # that counts
        self._new: "JournalFile | None" = None  # that is to take its path
        self._longest = LEAST_REWRITTEN  # bytes of the file, from which on it is rewritten
        self._is_busy = False
        self._rests = False  # until a rewrite is tried again
        self._gathered: "List[Tuple[str, str | None]]" = []  # records that are not written yet
        self._dones: "List[Act]" = []  # what is to be called when they count
        self._late: "List[Act]" = []  # and what when a rewrite has stored what could not be
        self._portions: "Iterator[Tuple[str, str]]" = iter(())
        self._portion_is_due = False
        self._last_is_due = False
        self._look_is_due = False
        self._dropped = ""  # why the file is to count no more
        self._everything: "Callable[[], Iterator[Tuple[str, str]]]" = iter_nothing
        self._settle: "Act" = ignore

    # The start.

    def load(self) -> "Dict[str, str]":
        """The records of the file that is there; {} when there is none.  What was cut off is not
        read.  Raises OSError and Damage."""
        file = JournalFile(self.path, self.synced)
        try:
            data = file.open()
            records, file.length = read_journal(data)
        except FileNotFoundError:
            return {}
        except (OSError, Damage):
            file.close()
            raise
        self._file = file
        return records

    def forget(self) -> "None":
        """What was loaded does not count."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def begin(self, records: "List[Tuple[str, str | None]]") -> "None":
        """Stores the first batch, behind what was loaded, or in a new file.  See `failing`."""
        file = self._file
        work = Work(self.path, file, encode_batch(records), [])
        if file is None:
            work.new = self._new = self._make_new()
            work.is_last = True
        else:
            work.drop = failure_of(functools.partial(file.cut, file.length))
        work.do()
        self._heard(work)

    def _make_new(self):
        return JournalFile(f"{self.path}.new", self.synced)

    def start(self, loop: "Loop", everything: "Callable[[], Iterator[Tuple[str, str]]]",
              settle: "Act") -> "None":
        """Serves from now on, with a thread if it is synced.  everything() yields all records, for
        a rewrite; while it is asked the table may change.  settle() commits what has changed until
        now.  Begins to rewrite.  Raises OSError."""
        if self.synced:
            self._hand = Thread(loop)
        self._loop = loop
        self._everything, self._settle = everything, settle
        self.rewrite()

    # While it serves.

    def commit(self, records: "Iterable[Tuple[str, str | None]]", done: "Act") -> "bool":
        """Stores the records; done() is called when they count.  Returns False when it never is:
        without sync, while it fails."""
        file = self._file
        if self.synced or file is None or self._new is not None:
            self._gathered += records
            self._dones.append(done)
            self._next()
            return self.synced or not self.failing
        # The usual case, without a Work: nothing else is to be done with the file.
        batch = encode_batch(records)
        try:
            file.append(batch)
        except OSError as error:
            self.drop(error.strerror or str(error))
            return False
        done()
        if file.length >= self._longest and not self._rests:
            self.rewrite()
        return True

    def look(self) -> "None":
        """Looks whether the path still leads to the file, and rewrites it if not."""
        self._look_is_due = True
        self._next()

    def rewrite(self) -> "None":
        """Writes a new file, in portions."""
        self._rests = False
        if self._new is not None or self._loop is None:
            return
        if not self._may_rewrite():
            self._rest()
            return
        for act in (self.rewrite, self._go_on, self._come_to_the_end):
            self._loop.cancel(act)  # they may belong to one that has failed
        self._new = self._make_new()
        self._portions = self._everything()
        self._portion_is_due = True
        self._next()

    def drop(self, reason: "str") -> "None":
        """The file does not count any more; a rewrite is tried later."""
        self._dropped = reason
        self._next()

    def run(self, act: "Act") -> "None":
        """Calls act() where the files are written, behind what is to be written there already.
        What fails is of no consequence."""
        self._hand.do(Task(act), ignore)

    def close(self) -> "None":
        """Waits until all is written, for LAST_WORK s at most."""
        self._hand.finish(LAST_WORK)

    def _next(self):
        """Has the next work done, unless one is under way."""
        if self._is_busy or not self._is_anything_due():
            return
        batch = encode_batch(self._gathered)
        work = Work(self.path, self._file, batch, self._dones)
        self._gathered, self._dones = [], []
        if self._new is not None:
            self._take_portion(work)
        if self._look_is_due:
            work.looks, self._look_is_due = True, False
        if self._dropped:
            work.drop, self._dropped = self._dropped, ""
        if work.has_to_be_done():
            self._is_busy = True
            self._hand.do(work, self._heard)

    def _is_anything_due(self):
        return bool(self._dones or self._gathered or self._portion_is_due or self._last_is_due
                    or self._look_is_due or self._dropped)

    def _take_portion(self, work):
        """The next portion of a rewrite, if it is due."""
        work.new = self._new
        work.is_last = self._last_is_due
        if not self._portion_is_due:
            return
        self._portion_is_due = False
        work.portion = encode_batch(itertools.islice(self._portions, PORTION))
        self._loop.after(0, self._go_on if work.portion else self._come_to_the_end)

    def _go_on(self):
        """One portion in each turn of the loop."""
        if self._new is not None:
            self._portion_is_due = True
            self._next()

    def _come_to_the_end(self):
        """All portions are written.  They may have a part of what has changed since the last
        batch: so the rest of it comes before the new file counts."""
        new = self._new
        if new is None:
            return
        self._settle()
        if self._new is new:  # it may have failed by that
            self._last_is_due = True
            self._next()

    def _heard(self, work):
        """A work is done."""
        self._is_busy = False
        before, times = self.failing, self.rewritten
        if work.failure:
            self._file = None
            self.failing = work.failure
        if work.new is not None:
            self._hear_of_new(work)
        self._call_dones(work)
        if self.failing != before or self.rewritten != times:
            self._on_change(self)
        if self._new is None and self._loop is not None:
            self._plan_rewrite(work)
        self._next()

    def _hear_of_new(self, work):
        """What has become of the new file."""
        if not work.failure_of_new and not work.is_last:
            return
        self._new, self._last_is_due = None, False
        if work.was_replaced():
            self._file = work.new
            self._longest = max(LEAST_REWRITTEN, MOST_DEAD * work.new.length)
            self.failing = ""
            self.rewritten += 1
        elif self._file is None:
            self.failing = work.failure_of_new

    def _call_dones(self, work):
        dones = work.dones
        if work.was_replaced():
            dones = self._late + dones
            self._late = []
        if work.is_stored():
            for done in dones:
                done()
        elif self.synced:
            self._late += dones

    def _plan_rewrite(self, work):
        """A rewrite is tried at once when a file has failed, and again and again while none can be
        written; and when the file is too long."""
        if work.failure_of_new:
            self._rest()
        elif work.failure:
            self.rewrite()
        elif self._is_too_long() and not self._rests:
            self.rewrite()

    def _rest(self):
        self._rests = True
        self._loop.after(RETRY, self.rewrite)

    def _is_too_long(self):
        if self._file is None:
            return False
        return self._file.length >= self._longest


# State and journal together.

Known = collections.namedtuple("Known", "records whole unclean rebooted")
Known.__doc__ = """What is known of the predecessor: records, {key: text}, and whether they are
whole, nobody else can hold a lock; unclean: somebody may hold one that they do not have; rebooted:
the system was booted since."""


class Disk:
    """What this daemon leaves for its successor.

    `state` is locked; `journal_path` is None when no journal is kept; `network`: clients on other
    hosts may have outlived this host's boot; `guard` is the State beside the local socket where
    that is another one.  The order of calls: recall(), perhaps disown(), begin(), start(), and
    then the rest.

    kind       "file", "synced" or "none": how batches are stored; another store has "etcd"
    failing    why no batch can be stored now, "" when it can
    epoch      the upper half of the greatest token that may be told before cover() is called
    marked     the mark is set
    """

    def __init__(self, log: "Log", state: "State", journal_path: "str | None" = None,
                 network: "bool" = False, guard: "State | None" = None):
        self.log, self.state = log, state
        self.kind = NOT_KEPT
        if journal_path is not None:
            self.kind = SYNCED if state.durable else IN_FILE
        self.epoch = 0
        self.marked = False
        self.unknown_until = 0.0  # s, monotonic: the end of the window for those not known
        self.same_processes = False  # pids that the predecessor has stored mean the same here
        self._network = network
        self._guard = guard
        self._last = state  # that of the daemon that has served last
        if guard is not None and guard.epoch > state.epoch:
            self._last = guard
        self._journal = Journal(journal_path or os.devnull, state.durable, self._journal_changed,
                                self._may_rewrite)
        self._boot = boot_id()
        self._pidns = pid_namespace()
        self._old = DaemonRecord(LAYOUT, 0, "", "", 0)  # that of the predecessor
        self._rebooted = False  # since the predecessor
        self._loop: "Any" = None
        self._has_state = False  # the record of this daemon is in the state
        self._has_begun = False  # and in the journal
        self._has_lock = True
        self._complains = False
        self._was_failing = False
        self._changed: "Act" = ignore

    @property
    def failing(self) -> "str":
        """Why batches are not stored."""
        return self._journal.failing

    @property
    def kept(self) -> "bool":
        """Whether a successor finds this daemon's epoch."""
        return self._has_state or self._has_begun

    # What the predecessor has left.

    def recall(self) -> "Known":
        """Reads what is there, and changes nothing but the name of another version's journal."""
        state = self.state
        self.marked = state.marked
        if self.kind == NOT_KEPT:
            return self._finish_recall({}, False)
        try:
            records = self._journal.load()
            if records or state.had_journal or self._last.epoch > state.epoch:
                self._check(records)
        except OtherLayout as error:
            self._put_aside(error.args[0])
            return self.disown("it is of another version")
        except (OSError, Damage) as error:
            return self.disown(getattr(error, "strerror", None) or error)
        except MemoryError:
            return self.disown("it is larger than the memory of this process")
        return self._finish_recall(records, bool(records))

    def _check(self, records):
        """Raises Damage where the journal does not count."""
        if not records and self.state.had_journal:
            raise Damage("it is not there, and there was one")
        if not records:
            raise Damage("another one was kept elsewhere")
        try:
            old = read_daemon(records.get(OF_DAEMON, ""))
        except BrokenMemory:
            raise Damage("it does not say whose it is")
        if old.layout != LAYOUT:
            raise OtherLayout(old.layout)
        epoch = old.covers >> 32
        if epoch < self._last.epoch:
            raise Damage("it is older than the state")
        if epoch > LAST_EPOCH:
            raise Damage(f"its epoch, {epoch}, is none")
        self._old = old

    def _put_aside(self, version):
        path = self._journal.path
        with contextlib.suppress(OSError):
            os.rename(path, f"{path}.{version}")

    def disown(self, reason: "object") -> "Known":
        """What was found in the journal cannot be believed: nothing is known."""
        self.log.error(f"{self._journal.path} does not count: {reason}; "
                       "of the daemon before nothing is known")
        self._journal.forget()
        return self._finish_recall({}, False, True)

    def _finish_recall(self, records, counts, lost=False):
        before = self._old.boot if counts else self._last.boot
        rebooted = self._rebooted = before != self._boot
        if lost and not before:  # nobody knows; the clients on other hosts are given more time
            rebooted = self._network
        unclean = self.state.marked or lost
        if counts and rebooted and self._network and not self.state.durable:
            unclean = True  # the end of the journal may have been lost with the system
        covered = self._old.covers >> 32
        self.epoch = max(epoch_of_the_clock(), self._last.epoch + 1, covered + 1)
        self.same_processes = not rebooted and self._old.pidns == self._pidns != ""
        return Known(records, counts and not unclean, unclean, rebooted)

    # The beginning.

    def begin(self, everything: "Callable[[], Iterator[Tuple[str, str]]]"
              = iter_nothing) -> "None":
        """Writes this daemon's epoch, into the journal first.  everything() yields the records of
        the table."""
        if self.kind != NOT_KEPT:
            records = [self._record()]
            if self._rebooted:  # moments in the old file would pass for moments of this boot
                self._journal.forget()
                records += everything()
            if self._may_rewrite():
                self._journal.begin(records)
            else:
                self._journal.drop("the mark could not be set")
            self._has_begun = not self.failing
        self._write_state()

    def covered(self) -> "int":
        """The greatest token that may be told before cover() is called."""
        return (self.epoch + 1 << 32) - 1

    def _record(self):
        """The record of this daemon."""
        return daemon_record(self.epoch, self._boot, self._pidns, self.covered())

    def _write_state(self):
        """Writes the record of this daemon; returns whether it could be written."""
        state = self.state
        keeps_journal = self.kind != NOT_KEPT
        written = self._try(state.write, self.epoch, self._boot, self.marked, keeps_journal)
        self._has_state = written and not state.is_nowhere()
        self._write_guard()
        return written

    def _write_guard(self):
        """The epoch is known beside the socket, too, to daemons without --state-dir."""
        guard = self._guard
        if guard is None:
            return
        write = functools.partial(guard.write, self.epoch, self._boot, guard.marked,
                                  guard.had_journal)
        reason = failure_of(write)
        if reason:
            self.log.limited(f"cannot write {guard.path}: {reason}", "error")

    def _try(self, write, *arguments):
        """Writes to the state; returns whether it could be written."""
        reason = failure_of(functools.partial(write, *arguments))
        if reason:
            self._complain(self.state.path, reason)
        return not reason

    def _complain(self, path, reason):
        """Logs, once, that something cannot be written."""
        if not self._complains:
            self.log.error(f"cannot write {path}: {reason}")
        self._complains = True

    def wait_for_epoch(self) -> "None":
        """When the epoch could be written nowhere: lets the second pass that it names, so that one
        who serves after this daemon, and must look at the clock alone, has a greater one.  Nobody
        else may serve already."""
        self.epoch = max(epoch_of_the_clock(), self.epoch)
        time.sleep(1 - time.time() % 1)

    def start(self, loop: "Loop", everything: "Callable[[], Iterator[Tuple[str, str]]]",
              settle: "Act", changed: "Act") -> "None":
        """Serves from now on; after detaching.  everything() yields the records of the table;
        settle() commits what has changed in it until now; changed() is called when `failing` has
        changed.  Raises OSError."""
        self._loop = loop
        self._changed = changed
        if self.kind != NOT_KEPT:
            self._journal.start(loop, functools.partial(self._everything, everything), settle)
        self._tell_change()

    def _everything(self, everything):
        yield self._record()  # as it is when its turn has come: batches may be written before
        yield from everything()

    # While it serves.

    def commit(self, records: "Iterable[Tuple[str, str | None]]", done: "Act") -> "bool":
        """Stores a batch of records, (key, text) or (key, None).  done() is called when it counts:
        at once, where nothing is kept, too, or later by the loop.  Returns False when it is never
        called, and the mark is to take the place of the batch: see mark()."""
        if self.kind == NOT_KEPT:
            done()
            return True
        return self._journal.commit(records, done)

    # What a quorum has to wait for, this store never has.

    def confirm(self, done: "Act") -> "None":
        """done() is called when what is told now, and stores nothing, may be told."""
        done()

    def ping(self, done: "Act") -> "None":
        """As confirm(), for the answer to a ping, which may wait a little longer."""
        done()

    def may_tell(self) -> "bool":
        """Whether a grant, or the answer to a ping, may be told at this instant."""
        return True

    def away(self, now: "Moment") -> "float":
        """s for which the store has not answered."""
        return 0.0

    def ping_for(self) -> "int | None":
        """ms between two pings that clients are to send; None: none."""
        return None

    def grace_for(self, kill: "int") -> "int | None":
        """ms for which a lock is kept for an absent client that kills its command `kill` ms after
        TERM; None where that is not for the store to say."""
        return None

    def mark(self, held: "bool") -> "bool":
        """Somebody is about to hold a lock that the journal does not know, or nobody does any
        more.  Returns False when that could not be written; it may be tried again."""
        state = self.state
        if self._has_state and held == self.marked:
            return True
        before, self.marked = self.marked, held
        if not self._has_state:
            written = self._write_state()
        elif self.kind == SYNCED and not held:
            self._journal.run(functools.partial(state.write_mark, held))
            written = True
        else:
            written = self._try(state.write_mark, held)
        if not written:
            self.marked = before
        return written

    def cover(self, token: "int") -> "bool":
        """The epoch becomes that of a token which is to be told: of one reclaimed that lay ahead,
        or of the first after them.  Those of a successor must be greater.  Returns False when that
        could not be written."""
        self.epoch = token >> 32
        records = [self._record()]
        if self.kind != NOT_KEPT and self._journal.commit(records, self._cover_in_state):
            return True
        return self._write_state()

    def _cover_in_state(self):
        """The journal covers it, and then the state."""
        if self.kind == SYNCED and self._has_state:
            state = self.state
            write = functools.partial(state.write, self.epoch, self._boot, self.marked, True)
            self._journal.run(write)
            self._write_guard()
        else:
            self._write_state()

    def look(self) -> "None":
        """Makes what was removed anew: the state, under its lock, and then the journal."""
        had_lock, self._has_lock = self._has_lock, self.state.look()
        if self.kind == NOT_KEPT:
            return
        if self._has_lock:
            self._journal.look()
        elif had_lock:
            self._journal.drop("another daemon has the lock")

    def expect_successor(self) -> "None":
        """This daemon is told to end, and may be started again at once: clients that find nobody
        see it by the time of the state, and look again for a moment."""
        with contextlib.suppress(OSError):
            os.utime(self.state.number)

    def close(self) -> "None":
        """Before the end: what was committed is stored."""
        if self.kind != NOT_KEPT:
            self._journal.close()

    def _may_rewrite(self):
        """Whether a new journal may count.  Nobody else may have the lock; and in the window of
        those who are not known the mark is set before."""
        if not self._has_lock:
            return False
        state = self.state
        if self.marked or time.monotonic() >= self.unknown_until:
            return True
        if self._has_state:
            self.marked = self._try(state.write_mark, True)
        else:  # the epoch goes into the journal first
            self.marked = self._try(state.write, state.epoch, state.boot, True, state.had_journal)
        return self.marked

    def _journal_changed(self, journal):
        """The journal fails, or not any more, or was rewritten."""
        if journal.failing:
            self._complain(journal.path, journal.failing)
        else:
            if self._complains:
                self.log.info(f"{journal.path} is written again")
            self._complains = False
            self._has_begun = True
        if self._loop is not None:
            self._clear_mark()
            self._tell_change()

    def _tell_change(self):
        fails = bool(self.failing)
        if fails != self._was_failing:
            self._was_failing = fails
            self._changed()

    def _clear_mark(self):
        """The mark is cleared when the journal knows all who can hold a lock."""
        if not self.marked or self.failing:
            return
        left = self.unknown_until - time.monotonic()
        if left > 0:
            self._loop.after(left, self._journal.rewrite)
        else:
            self.mark(False)


# --- Quorum -------------------------------------------------------------------------------------
# Several daemons, of which one serves.  A cluster of etcd decides which one, and keeps the memory.
# Pure: no socket, no thread, no clock.  What etcd is asked goes out as data, what it answers comes
# in as data, and every call is given `now`, with boot (s, CLOCK_BOOTTIME) and wall (s since 1970).
#
# The problem.  A daemon may be stopped or cut off at any instant, and does not know it.  An answer
# of etcd may be lost, and a copy of what was sent may be obeyed much later.  Even so no two
# daemons may grant the same lock, and the next one must know every grant that was told.
#
# Words.  The leader record: one key that says who serves.  A term: what begins with the claim of
# one leader.  A claim: the transaction by which a candidate becomes the leader.  A transaction:
# all of its changes are made, or none, and none unless its guards are true.  A beat: a transaction
# that was confirmed; each is one.  Free: the record of a leader that has ended in good order.
# Deposed: a leader that may not lead any more.  The mark: the key that tells this cluster from any
# other.
#
# The solution.
#
# * The record is written anew with each transaction.  A candidate that has seen it unchanged for
#   longer than the ttl in it, by its own clock, claims.
# * The chain.  A transaction of the leader is guarded by the whole text of record n and puts
#   record n+1 in its place, so it can be done once only, however many copies of it arrive, and
#   whenever.  Between n and n+1 one content only is ever sent.  So its outcome need not be known:
#   the same bytes are sent again until a member of the cluster says what has become of them.
# * The deadline.  The leader counts the ttl from an earlier instant than any candidate, the
#   handing over of what was confirmed, and ends a tenth of it, the margin, earlier.
# * What is told waits for a transaction that is handed over after it was asked for: a grant for
#   the one that stores it, the answer to a ping, and to a reclaim that changes nothing, for any.
#   So whoever is told something knows that this leader was the leader when he asked.  No clock of
#   the leader has a part in that: one that was stopped together with its clock (a virtual machine
#   that is paused does not know that it was) tells nobody that a lock is still his.
#
# What is absent on purpose.  Leases of etcd: it can revoke one that is kept alive properly, and it
# answers for one without a quorum.  Watches: they are silent when their member is cut off.  A
# transaction that is not guarded.  Any order among candidates: who claims first leads.
#
# Why no two hold.  A leader tells no grant that is not stored under its guard.  The claim makes
# the guards of every earlier transaction false for ever, since no text of a record comes twice;
# and the memory is read after it.  So the memory has every grant that was told, and none comes
# into it from before.  Who held keeps the lock for its grace, counted from when the claim was
# confirmed.  The last ping that was answered to him was sent before the claim was done; he ends
# his command by the end of the same grace, counted from there.

NEVER = float("inf")  # the date of nothing
RECORD_LAYOUT = 1  # of the leader record
LEADER_KEY, MARK_KEY = "leader", "id"  # after the prefix
POLL = 0.2  # s between two looks of a candidate
IF_IT_IS_RIGHT = "; if --etcd is right, see --etcd-new-cluster"  # behind a line on another cluster
PAGE = 2000  # keys that are read at once
MOST_CHANGES = 120  # of a transaction; etcd takes 128, among them the record
MOST_BYTES = 256 * 1024  # of the keys and texts of a transaction
LEAST_TO_END = 5000  # ms that a command gets to end itself, at least
LEAST_TO_RETURN = 5000  # ms in which a holder finds the next leader

# What has become of a request, by the HTTP status of the answer.  Of every other status, and where
# no answer comes, it is UNKNOWN: a request that was answered by 503 may be obeyed even later.
# NOT_DONE says only that the same member is to be asked again, after a pause.  Nothing may rely on
# more: the transaction that reaches the quota of etcd 3.4 is answered by 429, "database space
# exceeded", and may be done all the same.
DONE, NOT_DONE, UNKNOWN = "done", "not done", "unknown"
NO_ANSWER = 0  # in place of a status: too late, cut off, not reached
OUTCOMES = {
    200: DONE,
    400: NOT_DONE,
    401: NOT_DONE,
    403: NOT_DONE,
    404: NOT_DONE,
    412: NOT_DONE,
    429: NOT_DONE,
}

# Whether a connection that has ended so releases what it held.  What is not in order leaves an
# absent holder: a reset may come from a firewall, while the command still runs.
RELEASES = {
    "unlock": True,
    "end of file": True,
    "reset": False,
    "timed out": False,
    "slow reader": False,
    "protocol error": False,
}
END_OF_FILE, RESET, TIMED_OUT, SLOW, BROKEN = list(RELEASES)[1:]

# The order of the changes of one batch, which may be cut anywhere: rank by (kind of key, removed).
# Half of a batch may lose a number, but not have it twice: a value is taken back before it is
# held, a holding ends before its value comes back, a resource counts before what it has counted is
# held.
RANKS = {
    (OF_VALUE, True): 0,
    (OF_HOLDER, True): 0,
    (OF_RESOURCE, False): 1,
    (OF_VALUE, False): 2,
    (OF_HOLDER, False): 2,
    (OF_RESOURCE, True): 3,
}
STORED_KINDS = (OF_HOLDER, OF_RESOURCE, OF_VALUE)  # of the daemon the leader record tells

# What is asked, and what is answered.  The keys `first` <= key < `end`, at most `limit` of them,
# 0: all.  A guard compares `what` of a key with a value; the record that is found in its place
# comes with the answer when one of the guards is false.  A change is (key, text), None: removed.
VALUE, MODIFIED, CREATED = "VALUE", "MOD", "CREATE"
Range = collections.namedtuple("Range", "first end limit")
Guard = collections.namedtuple("Guard", "key what value")
Transaction = collections.namedtuple("Transaction", "guards changes")
Entry = collections.namedtuple("Entry", "key text revision")
# The reason of an answer is one line for people, "" when nothing is wrong.
Answer = collections.namedtuple(
    "Answer", "outcome cluster revision succeeded entries more reason")
Answer.__new__.__defaults__ = ("",)

# What a daemon keeps from one term to the next: the prefix of its keys; its own leader record,
# free and without an epoch; the cluster that it knows; the members; digits(n), n random hex
# digits.
Quorum = collections.namedtuple("Quorum", "prefix mine cluster members digits")


def outcome_of(status: "int") -> "str":
    """What has become of a request that was answered by this HTTP status, or by NO_ANSWER."""
    return OUTCOMES.get(status, UNKNOWN)


def failure(outcome: "str", reason: "str" = "") -> "Answer":
    """The answer where nothing was answered that could be read."""
    return Answer(outcome, "", 0, False, (), False, reason)


def end_of(prefix: "str") -> "str":
    """The first key behind all that begin with the prefix."""
    last = ord(prefix[-1])
    return prefix[:-1] + chr(last + 1)


class Times:
    """The times of a quorum in s, all of them parts of its ttl (ms)."""

    def __init__(self, ttl: "int"):
        self.ttl = ttl / 1000
        self.margin = self.ttl / 10
        self.lead = self.ttl - self.margin  # from a handing over to the deadline
        self.beat = self.ttl / 5  # between two transactions, at most
        self.pause = self.ttl / 20  # before a copy where the last was refused
        self.copy = max(1.0, self.ttl / 10)  # for the whole answer to one copy


def ping_interval(ttl: "int") -> "int":
    """ms between two pings that the leader wants of its clients."""
    return ttl // 5


def grace_for(ttl: "int", kill: "int") -> "int":
    """ms for which a lock is kept for a client that kills its command `kill` ms after TERM: a new
    leader can be found before TERM, and KILL comes before anybody else is let in."""
    found = ttl + 2 * ping_interval(ttl) + LEAST_TO_RETURN
    return found + max(LEAST_TO_END, kill) + ttl // 10


def kept_until(since: "float", *graces: "int") -> "float":
    """The end (s) of the longest of the graces (ms) that count for an absent holder: what it was
    promised, what this leader would promise.  `since`: when the claim was confirmed, or when the
    holder became absent."""
    return since + max(graces) / 1000


def epoch_after(clock: "int", record: "Record", tokens: "Iterable[int]") -> "int":
    """The epoch of a new leader: no token of its predecessors lies in it or above it.  `clock`:
    that of the clock."""
    epoch = max(clock, record.epoch + 1)
    for token in tokens:
        epoch = max(epoch, (token >> 32) + 1)
    return epoch


# The leader record.

# v: RECORD_LAYOUT; term: 16 hex digits, new for each claim, "" when free; n: the number of the
# term's transactions; x: 8 hex digits, new for each; ttl, grace: ms; daemon: the id of this run;
# address: where it serves; version: of flomd, which one that is older may leave out.
FIELDS = {
    "v": int,
    "term": str,
    "n": int,
    "x": str,
    "ttl": int,
    "grace": int,
    "epoch": int,
    "policy": str,
    "daemon": str,
    "address": str,
    "host": str,
    "pid": int,
    "version": str,
}
RANGES = {  # of the numbers: least, greatest
    "v": (1, RECORD_LAYOUT),
    "n": (0, WIDEST),
    "ttl": (1, MOST),
    "grace": (0, MOST),
    "epoch": (0, MOST),
    "pid": (0, MOST),
}
Record = collections.namedtuple(
    "Record", "v term n x ttl grace epoch policy daemon address host pid version")
Record.__new__.__defaults__ = ("",)  # type: ignore[attr-defined]


LONGEST_NUMBER = 20  # digits of a number in JSON


class UnreadableRecord(Exception):
    """A leader record that this daemon cannot read: one line that says why."""


def short_number(text: "str") -> "int":
    """A number of JSON; ValueError.  To read millions of digits takes Python before 3.11 minutes,
    in which no thread runs."""
    if len(text) > LONGEST_NUMBER:
        raise ValueError("a number that is too long")
    return int(text)


def text_of(record: "Record") -> "str":
    """The record as it is stored.  Guards compare texts, so there is one text for a record."""
    import json
    fields = dict(zip(FIELDS, record))
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def record_of(text: "str") -> "Record":
    """The record that was stored as this text.  Raises UnreadableRecord."""
    import json
    try:
        fields = json.loads(text, parse_int=short_number)
    except (ValueError, RecursionError):
        raise UnreadableRecord("the leader record is damaged")
    if not isinstance(fields, dict):
        raise UnreadableRecord("the leader record is damaged")
    version = fields.get("v")
    if isinstance(version, int) and version > RECORD_LAYOUT:
        raise UnreadableRecord(f"the leader record has the newer layout {version}")
    fields.setdefault("version", "")
    for name, kind in FIELDS.items():
        found = fields.get(name)
        if type(found) is not kind or not _can_be(name, found):
            raise UnreadableRecord(f"the leader record has no proper {name}")
    return Record(*[fields[name] for name in FIELDS])


def _can_be(name, value):
    """Whether a field of the leader record may be so.  What people read of it is one line."""
    if name in RANGES:
        least, greatest = RANGES[name]
        return least <= value <= greatest
    if name == "address":
        return re.fullmatch("[!-~]+:[0-9]{1,5}", value) is not None
    return value.isprintable()


def is_free(record: "Record") -> "bool":
    """Whether its leader has ended in good order."""
    return record.term == ""


# The cluster.

class Cluster:
    """What tells the cluster from any other, also from one of the same id that was built anew or
    restored: its id, the mark that the first leader has put there, and the highest revision that
    was seen.  `is_new`: until a leader record is seen, the one that is found is the right one."""

    def __init__(self, id: "str" = "", mark: "str" = "", revision: "int" = 0,
                 is_new: "bool" = False):
        self.id, self.mark = id, mark
        self.revision = revision
        self.is_new = is_new

    def mismatch(self, answer: "Answer") -> "str":
        """Why the member that has answered so is not one of this cluster, "" if it is."""
        if not self.is_new:
            if self.id not in ("", answer.cluster):
                return f"etcd is another cluster, {answer.cluster} in place of {self.id}"
            if answer.revision < self.revision:
                return (f"etcd has lost what it knew, it is at revision {answer.revision} "
                        f"and was at {self.revision}")
        self.id = answer.cluster
        self.revision = answer.revision
        return ""

    def mismatch_of_mark(self, mark: "str", led: "bool") -> "str":
        """Why a cluster with this mark ("": none), and with a leader record or not, is not the one
        that is known, "" if it is."""
        is_known = self.mark != "" and not self.is_new
        if is_known and mark not in ("", self.mark):
            return f"etcd has the mark {visible(mark[:40])} in place of {self.mark}"
        may_lack = self.is_new or not (led or is_known)
        if mark == "" and not may_lack:
            return "etcd has lost the mark of this cluster"
        self.mark = mark
        return ""

    def settle(self) -> "None":
        """This is the cluster from now on."""
        self.is_new = False


class Members:
    """The members of the cluster, of which one is asked at a time: `current`."""

    def __init__(self, urls: "Iterable[str]"):
        self.urls = tuple(urls)
        self._refused: "Tuple[str, ...]" = ()
        self._index = 0
        self._failed = 0  # members since the last answer

    @property
    def current(self) -> "str":
        """The one that is asked now."""
        return self.urls[self._index]

    def answered(self) -> "None":
        """The current one is asked again."""
        self._failed = 0

    def turn(self) -> "bool":
        """The next one is asked; returns whether each has been asked in vain."""
        self._failed += 1
        for _ in self.urls:
            self._index = (self._index + 1) % len(self.urls)
            if self.current not in self._refused:
                break
        usable = len(self.urls) - len(self._refused)
        return self._failed >= usable

    def refuse(self) -> "None":
        """The current one belongs to another cluster: it is asked no more.  When all of them do
        they are asked again, since one may be mended."""
        self._refused += (self.current,)
        if len(self._refused) == len(self.urls):
            self._refused = ()


# Candidate and leader.

class Asker:
    """What a candidate and a leader have in common: one request at a time is asked, and asked
    again byte for byte until its outcome is known or the deadline has passed.  `end_reason`: why
    it has ended, "" until then."""

    def __init__(self, quorum: "Quorum", now: "Moment"):
        self.quorum = quorum
        self.times = Times(quorum.mine.ttl)
        self.end_reason = ""
        self.changes = 0  # by others, that were seen
        self._request: "Any" = None
        self._is_out = False  # a copy of it is on its way
        self._handed_at = 0.0  # its first copy
        self._copy_at = 0.0  # the next copy
        self._clocks = now.wall - now.boot

    # What a subclass says.

    @property
    def deadline(self) -> "float":
        """s: when it is over."""
        raise NotImplementedError

    def _next_at(self):
        """s: when there is something to be asked."""
        raise NotImplementedError

    def _next(self, now):
        """What is to be asked now, or None."""
        raise NotImplementedError

    def _understand(self, request, answer, now):
        """Takes an answer; returns what may be told now."""
        raise NotImplementedError

    def _meet_other_cluster(self, why, now):
        """Another cluster has answered."""
        raise NotImplementedError

    # What the loop calls.

    def look(self, now: "Moment") -> "bool":
        """To be called first in each turn, and before each answer that may wait for one: returns
        whether it goes on.  Where the system has no clock that counts sleep, the wall clock tells
        of it."""
        before = self._clocks
        self._clocks = now.wall - now.boot
        jump = abs(self._clocks - before)
        limited = self.deadline < NEVER
        if limited and now.boot >= self.deadline:
            self._end(self._why_late(now))
        elif limited and jump > self.times.margin:
            self._end(self._why_moved(jump))
        return self.end_reason == ""

    def _why_late(self, now):
        return "etcd did not answer in time"

    def _why_moved(self, jump):
        return f"the clock of this host was moved by {jump:.0f} s"

    def _end(self, why):
        if self.end_reason == "":
            self.end_reason = why

    def next_date(self) -> "float":
        """s, CLOCK_BOOTTIME: when look() and next_request() are to be called, at the latest."""
        if self.end_reason:
            return NEVER
        if self._is_out:
            return self.deadline
        if self._request is not None:
            return min(self._copy_at, self.deadline)
        return min(self._next_at(), self.deadline)

    def next_request(self, now: "Moment") -> "Range | Transaction | None":
        """What the current member is to be asked now.  Its outcome is to be told by answer()."""
        if self.end_reason or self._is_out:
            return None
        if self._request is None:
            self._request = self._next(now)
            self._handed_at = now.boot
        elif now.boot < self._copy_at:
            return None
        self._is_out = self._request is not None
        return self._request

    def unanswered_for(self, now: "Moment") -> "float":
        """s since the first copy of what is asked was handed over; 0 when nothing is."""
        if self._request is None:
            return 0.0
        return now.boot - self._handed_at

    def answer(self, answer: "Answer", now: "Moment") -> "list":
        """Takes the answer to what was handed over last; returns what may be told now."""
        if self.end_reason or not self._is_out:
            return []
        self._is_out = False
        if answer.outcome != DONE:
            self._repeat(answer.outcome, now)
            return []
        self.quorum.members.answered()
        why = self.quorum.cluster.mismatch(answer)
        if why:
            self.quorum.members.refuse()
            self._meet_other_cluster(why, now)
            return []
        request = self._request
        self._request = None
        return self._understand(request, answer, now)

    def _repeat(self, outcome, now):
        """The same bytes again: at the next member, or where it was refused at the same one."""
        pause = outcome == NOT_DONE
        if outcome == UNKNOWN:
            pause = self.quorum.members.turn()
        self._copy_at = now.boot
        if pause:
            self._copy_at += self.times.pause

    # What both do.

    def _key(self, name):
        return self.quorum.prefix + name

    def _found(self, answer, name):
        """The entry of a key, or None."""
        key = self._key(name)
        for entry in answer.entries:
            if entry.key == key:
                return entry
        return None


class Candidate(Asker):
    """A daemon that waits until it may lead; then `leader` is what it has become.  `record` is
    that of the leader it sees, unchanged since `seen_at` (s); `trouble` says why it cannot claim,
    "" where nothing is wrong."""

    def __init__(self, quorum: "Quorum", now: "Moment"):
        super().__init__(quorum, now)
        self.leader: "Leader | None" = None
        self.record: "Record | None" = None
        self.seen_at = NEVER
        self.trouble = ""
        self._revision = -1  # of the record, 0: there is none
        self._look_at = now.boot
        self._looks_for_any = False  # whether there is any key, since there is no record
        self._claim: "Any" = None
        self._claimed: "Any" = None  # the record that the claim puts

    @property
    def deadline(self) -> "float":
        """That of its claim, as if it was confirmed."""
        if self._claim is None or self._request is not self._claim:
            return NEVER
        return self._handed_at + self.times.lead

    def _next_at(self):
        return self._look_at

    def _next(self, now):
        if self._claim is not None:
            return self._claim
        if now.boot < self._look_at:
            return None
        self._look_at = now.boot + POLL
        if self._looks_for_any:
            return Range(self.quorum.prefix, end_of(self.quorum.prefix), 1)
        return Range(self._key(MARK_KEY), self._key(LEADER_KEY) + "\0", 0)

    def _meet_other_cluster(self, why, now):
        self.trouble = why + IF_IT_IS_RIGHT
        self._repeat(UNKNOWN, now)

    def _understand(self, request, answer, now):
        if request is self._claim:
            self._end_claim(answer, now)
        elif self._looks_for_any:
            self._looks_for_any = False
            self._see_nobody(len(answer.entries) == 0, now)
        else:
            self._see(answer, now)
        return []

    # What it sees.

    def _see(self, answer, now):
        entry = self._found(answer, LEADER_KEY)
        mark = self._found(answer, MARK_KEY)
        why = self._mismatch(entry, mark)
        if why:
            self.trouble = why + IF_IT_IS_RIGHT
            self._forget_leader()
            self.quorum.members.refuse()
            self.quorum.members.turn()
        elif entry is None:
            self._note_nobody(now)
        else:
            self._note(entry, now)
            self._claim_if_due(now)

    def _mismatch(self, entry, mark):
        found = ""
        if mark is not None:
            found = mark.text
        cluster = self.quorum.cluster
        why = cluster.mismatch_of_mark(found, entry is not None)
        if entry is not None and cluster.mark:
            cluster.settle()
        return why

    def _forget_leader(self):
        self.record = None
        self._revision = -1

    def _note_nobody(self, now):
        self._looks_for_any = True
        if self._revision != 0:
            self._forget_leader()
            self._revision = 0
            self.seen_at = now.boot

    def _note(self, entry, now):
        """The time of the answer counts, which is later than that of the writing."""
        if entry.revision == self._revision:
            return
        if self._revision > 0:
            self.changes += 1
        self._forget_leader()
        self._revision = entry.revision
        self.seen_at = now.boot
        self.trouble = ""
        try:
            self.record = record_of(entry.text)
        except UnreadableRecord as error:
            self.trouble = str(error)

    # Its claim.

    def _claim_if_due(self, now):
        if self.record is None:
            return
        unchanged = now.boot - self.seen_at
        if is_free(self.record) or unchanged > self.record.ttl / 1000:
            self._make_claim(self.record.epoch)

    def _see_nobody(self, is_empty, now):
        """There is no record.  An empty prefix is a new cluster.  If there are keys somebody has
        removed the record, and its leader may not know it yet."""
        unchanged = now.boot - self.seen_at
        if is_empty:
            self.trouble = ""
            self._make_claim(0)
        elif not self.quorum.cluster.is_new:
            self.trouble = "etcd has lost the leader record; --etcd-new-cluster makes a new one"
        elif unchanged > self.times.ttl:
            self._make_claim(0)

    def _make_claim(self, epoch):
        digits = self.quorum.digits
        record = self.quorum.mine._replace(term=digits(16), n=1, x=digits(8), epoch=epoch)
        leader, mark = self._key(LEADER_KEY), self._key(MARK_KEY)
        guards = [Guard(leader, MODIFIED, self._revision)]
        if self._revision == 0:
            guards = [Guard(leader, CREATED, 0)]
        changes = [(leader, text_of(record))]
        known = self.quorum.cluster.mark
        if known:
            guards.append(Guard(mark, VALUE, known))
        else:
            guards.append(Guard(mark, CREATED, 0))
            changes.append((mark, digits(16)))
        self._claim = Transaction(tuple(guards), tuple(changes))
        self._claimed = record

    def _end_claim(self, answer, now):
        claim = self._claim
        self._claim = None
        found = self._found(answer, LEADER_KEY)
        copy_was_done = found is not None and found.text == text_of(self._claimed)
        if answer.succeeded or copy_was_done:
            self._become_leader(claim, now)
        elif found is not None:
            self._note(found, now)
        # else the next look tells whether the record was removed, or the mark

    def _become_leader(self, claim, now):
        cluster = self.quorum.cluster
        for key, text in claim.changes:
            if key == self._key(MARK_KEY):
                cluster.mark = text
        cluster.settle()
        self.leader = Leader(self.quorum, self._claimed, self._handed_at, now)
        self._end("it leads")


# The stages of a leader.
LOADS, LEADS, RESIGNS = "loads", "leads", "resigns"


class Leader(Asker):
    """A daemon whose claim was confirmed.  It reads the memory: `loaded` gets (key, text) page by
    page, is_loaded() says when it has all.  lead() begins to serve, resign() ends it.  `record`:
    the last that was confirmed; `claimed_at` (s): when the claim was confirmed."""

    def __init__(self, quorum: "Quorum", record: "Record", handed_at: "float", now: "Moment"):
        super().__init__(quorum, now)
        self.stage = LOADS
        self.record = record
        self.claimed_at = now.boot
        self.confirmed_at = handed_at  # s: handing over of the last that was confirmed
        self.loaded: "List[Tuple[str, str]]" = []
        self.epoch = record.epoch
        self._page_from = quorum.prefix  # "": there is no other page
        self._sent = record  # the last that was handed over
        self._beat_at = handed_at + self.times.beat
        # (number, text) by key, in the order in which the keys were mentioned first
        self._gathered: "OrderedDict[str, tuple]" = collections.OrderedDict()
        self._number = 0  # of the last key that was gathered
        self._waiting: "Deque[tuple]" = collections.deque()  # (number, done)
        self._pings: "List[Any]" = []
        self._unconfirmed: "List[Any]" = []  # is told when what is on its way is confirmed
        self._stored: "set" = set()  # the keys that etcd has, or will have

    @property
    def deadline(self) -> "float":
        """Earlier by the margin than the earliest claim of any candidate."""
        return self.confirmed_at + self.times.lead

    def _why_late(self, now):
        silent = now.boot - self.confirmed_at
        return f"lost etcd for {silent:.0f} s: no longer serving, another daemon takes over"

    def _why_moved(self, jump):
        moved = super()._why_moved(jump)
        return f"{moved}: no longer serving, another daemon takes over"

    def is_loaded(self) -> "bool":
        """Whether all of the memory was read."""
        return self._page_from == ""

    def lead(self, epoch: "int") -> "None":
        """The memory is restored; the epoch is stored with what is told first."""
        self.epoch = epoch
        self.stage = LEADS

    def resign(self) -> "None":
        """The orderly end: what was gathered is stored, then the record is free, and this is over.
        No ping is answered any more."""
        self.stage = RESIGNS
        self._pings = []

    # What is to be stored and told.

    def write(self, changes: "Iterable[tuple]", done: "Any") -> "None":
        """Stores [(key, text or None)] at once.  answer() returns `done` when all of it, and all
        that was written before, is stored; without changes, when it is certain that nobody else
        led at this instant.  Where a holding ends before it was stored, its done comes all the
        same.  After resign() nothing is stored: who holds is an absent holder of the next
        leader."""
        if self.stage != LEADS:
            return
        kept = [change for change in changes if change[0][:2] in STORED_KINDS]
        for key, text in sorted(kept, key=_rank):
            self._gather(key, text)
        self._waiting.append((self._number, done))

    def ping(self, done: "Any", now: "Moment") -> "None":
        """As write() without changes, but it can wait: pings of many clients share a beat."""
        if self.stage != LEADS:
            return
        self._pings.append(done)
        self._beat_at = min(self._beat_at, now.boot + self.times.pause)

    def _gather(self, key, text):
        """A key keeps its place.  One that etcd never had need not be removed from there."""
        needless = text is None and key not in self._stored
        if needless:
            self._gathered.pop(key, None)
            return
        if key in self._gathered:
            number, _ = self._gathered[key]
        else:
            self._number += 1
            number = self._number
        self._gathered[key] = number, text

    # What is asked.

    def _next_at(self):
        if self._must_write() or not self.is_loaded():
            return 0.0
        return self._beat_at

    def _repeat(self, outcome, now):
        """A page that is not answered can be asked for again behind a beat, which cannot wait."""
        super()._repeat(outcome, now)
        is_page = isinstance(self._request, Range)
        if is_page and (self._must_write() or now.boot >= self._beat_at):
            self._request = None

    def _must_write(self):
        return self.stage == RESIGNS or len(self._waiting) > 0 or len(self._gathered) > 0

    def _next(self, now):
        if self._must_write() or now.boot >= self._beat_at:
            return self._make_transaction(now)
        if not self.is_loaded():
            return Range(self._page_from, end_of(self.quorum.prefix), PAGE)
        return None

    def _make_transaction(self, now):
        """One link of the chain.  From here to its outcome its content stays as it is."""
        changes = self._cut()
        self._unconfirmed = self._take_stored()
        self._unconfirmed += self._pings
        self._pings = []
        self._beat_at = now.boot + self.times.beat
        is_last = self.stage == RESIGNS and len(self._gathered) == 0
        self._sent = self._record_after(self.record, is_last)
        leader, mark = self._key(LEADER_KEY), self._key(MARK_KEY)
        changes.insert(0, (leader, text_of(self._sent)))
        guards = (Guard(leader, VALUE, text_of(self.record)),
                  Guard(mark, VALUE, self.quorum.cluster.mark))
        return Transaction(guards, tuple(changes))

    def _record_after(self, record, is_last):
        x = self.quorum.digits(8)
        if is_last:
            return record._replace(term="", n=0, x=x, epoch=self.epoch)
        return record._replace(n=record.n + 1, x=x, epoch=self.epoch)

    def _cut(self):
        """The first of what was gathered, as much as a transaction takes."""
        changes: "List[tuple]" = []
        size = 0
        while self._gathered and len(changes) < MOST_CHANGES:
            key = next(iter(self._gathered))
            _, text = self._gathered[key]
            size += _size(key, text)
            if changes and size > MOST_BYTES:
                break
            del self._gathered[key]
            changes.append((self._key(key), text))
            if text is None:
                self._stored.discard(key)
            else:
                self._stored.add(key)
        return changes

    def _take_stored(self):
        """What may be told when all but what is still gathered is stored."""
        first_left = self._number + 1
        if self._gathered:
            key = next(iter(self._gathered))
            first_left, _ = self._gathered[key]
        taken = []
        while self._waiting:
            number, done = self._waiting[0]
            if number >= first_left:
                break
            self._waiting.popleft()
            taken.append(done)
        return taken

    # What is answered.

    def _meet_other_cluster(self, why, now):
        self._end(f"{why}: no longer serving")

    def _understand(self, request, answer, now):
        if isinstance(request, Range):
            self._take_page(answer)
            return []
        if not answer.succeeded and not self._was_done(answer):
            self._end(f"{self._cause(answer)}: no longer serving")
            return []
        return self._confirm()

    def _cause(self, answer):
        """Why a transaction was not done."""
        found = self._found(answer, LEADER_KEY)
        if found is None:
            return "somebody has removed the leader record"
        if found.text == text_of(self.record):
            return "somebody has removed or changed the mark of this cluster"
        return "another daemon leads"

    def _was_done(self, answer):
        """Whether an earlier copy was done: the record that is found is the one that was sent."""
        found = self._found(answer, LEADER_KEY)
        return found is not None and found.text == text_of(self._sent)

    def _confirm(self):
        self.record = self._sent
        self.confirmed_at = self._handed_at
        told = self._unconfirmed
        self._unconfirmed = []
        if is_free(self.record):
            self._end("it has resigned")
        return told

    def _take_page(self, answer):
        for key, text, _ in answer.entries:
            name = key[len(self.quorum.prefix):]
            if name[:2] in STORED_KINDS:
                self.loaded.append((name, text))
                self._stored.add(name)
        if answer.more:
            self._page_from = answer.entries[-1].key + "\0"
        else:
            self._page_from = ""


def _rank(change):
    key, text = change
    return RANKS[key[:2], text is None]


def _size(key, text):
    """Bytes of a change."""
    return len(key.encode()) + len((text or "").encode())


# --- Etcd ---------------------------------------------------------------------------------------
# How the members of the cluster are asked: over HTTP/1.1, with JSON.  Nothing here knows what is
# asked for, or judges of time, but for the time that an answer may take.
#
# The problem: a member may be stopped, cut off, or answer one byte a second; a name may take a
# minute to resolve; what answers may be a proxy or a web server.  The loop waits for none of them.
#
# The solution.  A thread asks, one request at a time, over one connection that is kept.  Each step
# of a request, from the connection to the last byte of the answer, has what is left of the time of
# the whole.  Names are resolved by other threads, which nobody waits for when an address is known.
# A thread and what it has open are one generation: stop() ends it, and nobody hears of it again.
#
# An answer is believed only when all of it could be read and is what etcd answers to such a
# request; everything else is UNKNOWN, and the reason says what is wrong.  So is a refusal that
# does not come from etcd (a web server's 404), and the third refusal in a row: the next member is
# asked then.  Nothing is asked again here but to be admitted: what may be is for the rules of a
# quorum to say.
#
# What has come on a connection before a request was sent is no answer to it, and a transaction
# that is done has a higher revision than all that the same member has told before.  An answer to
# something else has no keys, and must not be taken for that of an empty memory.
#
# Words.  A place: where a member listens.  A link: the connection to it.  The token: what etcd
# gives to whoever has said name and password; it is lost when a member is started again.
#
# What the log says of members.  A member that is stopped, or refuses to be read, is told by its
# URL, and when it answers again.  But why changes are refused, as when there is no room, is a
# matter of the whole cluster, whose members can be read all the while: it is told once, and is
# over when a change was done, be it another daemon's.

MOST_ANSWER = 8 * 1024 * 1024  # bytes; to read them as JSON holds up the loop
PIECE = 65536  # bytes of an answer that are read at once
MOST_REFUSALS = 3  # of one member in a row
LEAST_PAGE = 50  # keys, however slow a member is
ETCD_PORT = 2379  # where a URL has none
NO_ROOM = "database space exceeded"
NOT_AN_ETCD = "not an etcd"
OF_OTHER_ANSWERS = ("succeeded", "responses", "token")  # than those to a range
TOO_LATE, TOO_LONG_TO_READ = "timed out", "its answer is too long"  # why there is no answer

Access = collections.namedtuple("Access", "urls user password_file ca certificate private_key")
Access.__doc__ = """The members, and how they are told who asks; what is not given is None."""
Place = collections.namedtuple("Place", "scheme host port")

# What housekeeping asks besides: the keys of a Range as they were at a revision; to forget what
# was before a revision; the version of the member, which is the text of the only entry.
RangeAt = collections.namedtuple("RangeAt", "first end limit revision")
Compaction = collections.namedtuple("Compaction", "revision")
Version = collections.namedtuple("Version", "")


def access_of(settings: "Settings") -> "Access":
    """How the settings say that etcd is to be asked."""
    urls = settings["EtcdUrls"].split(",")
    return Access(tuple(urls), settings["EtcdUser"], settings["EtcdPasswordFile"],
                  settings["EtcdCa"], settings["EtcdCertificate"], settings["EtcdPrivateKey"])


def check_access(access: "Access") -> "None":
    """Raises UsageError where the files for etcd cannot be read, or are not what is wanted."""
    try:
        _client_context(access)
        _password(access)
    except (OSError, ValueError) as error:
        raise UsageError(_words_of(error))


def place_of(url: "str") -> "Place":
    """Where the member with this URL listens."""
    found = re.fullmatch(r"""
        (https?)://
        (?: \[ ([^]]+) \] | ([^:/]+) )  # an IPv6 address, or another host
        (?: : ([0-9]+) )?               # the port
        """, url, re.VERBOSE)
    assert found, url
    scheme, six, other, port = found.groups()
    return Place(scheme, six or other, int(port or ETCD_PORT))


# Requests and answers.

class _Unexpected(Exception):
    """What has come is not what etcd answers: one line."""


def _in_base64(text):
    data = text.encode("utf-8", "surrogateescape")
    return binascii.b2a_base64(data, newline=False).decode()


def _from_base64(text):
    if not isinstance(text, str):
        raise _Unexpected("no text in base64")
    try:
        return decode_name(text)
    except ProtocolError as error:
        raise _Unexpected(str(error))


def _encode_range(request):
    return {"key": _in_base64(request.first), "range_end": _in_base64(request.end),
            "limit": str(request.limit)}


def _encode_range_at(request):
    body = _encode_range(request)
    body["revision"] = str(request.revision)
    return body


_COMPARED = {VALUE: "value", MODIFIED: "mod_revision", CREATED: "create_revision"}


def _encode_guard(guard):
    value = str(guard.value)
    if guard.what == VALUE:
        value = _in_base64(guard.value)
    return {"key": _in_base64(guard.key), "target": guard.what, "result": "EQUAL",
            _COMPARED[guard.what]: value}


def _encode_change(change):
    key, text = change
    if text is None:
        return {"request_delete_range": {"key": _in_base64(key)}}
    return {"request_put": {"key": _in_base64(key), "value": _in_base64(text)}}


def _encode_transaction(request):
    guards = [_encode_guard(guard) for guard in request.guards]
    changes = [_encode_change(change) for change in request.changes]
    found = {"request_range": {"key": _in_base64(request.guards[0].key)}}
    return {"compare": guards, "success": changes, "failure": [found]}


def _encode_compaction(request):
    return {"revision": str(request.revision)}


def _number(fields, name, default=None):
    """A number of 64 bits, which JSON has as a text.  Without a default it must be there."""
    found = fields.get(name, default)
    if isinstance(found, str) and re.fullmatch("[0-9]{1,20}", found, re.ASCII):
        return int(found)
    if type(found) is int and found >= 0:
        return found
    raise _Unexpected(f"no number is its {name}")


def _truth(fields, name):
    found = fields.get(name, False)
    if type(found) is not bool:
        raise _Unexpected(f"its {name} is neither true nor false")
    return found


def _list(fields, name):
    """The objects of a list, which may be left out when it is empty."""
    found = fields.get(name, [])
    if not isinstance(found, list):
        raise _Unexpected(f"no list is its {name}")
    for one in found:
        if not isinstance(one, dict):
            raise _Unexpected(f"no object is in its {name}")
    return found


def _object(fields, name):
    found = fields.get(name)
    if not isinstance(found, dict):
        raise _Unexpected(f"no object is its {name}")
    return found


def _entries(fields):
    found = []
    for kept in _list(fields, "kvs"):
        key, text = _from_base64(kept.get("key")), _from_base64(kept.get("value", ""))
        found.append(Entry(key, text, _number(kept, "mod_revision")))
    return tuple(found)


def _cluster_and_revision(fields):
    header = _object(fields, "header")
    cluster, revision = _number(header, "cluster_id"), _number(header, "revision")
    if not cluster or not revision:
        raise _Unexpected("it tells no cluster, or no revision")
    return str(cluster), revision


def _read_range(request, fields):
    cluster, revision = _cluster_and_revision(fields)
    entries, more = _entries(fields), _truth(fields, "more")
    for name in OF_OTHER_ANSWERS:
        if name in fields:
            raise _Unexpected("it answers something else")
    for entry in entries:
        if not request.first <= entry.key < request.end:
            raise _Unexpected("a key that was not asked for")
    if more and not entries:
        raise _Unexpected("there are more keys than none")
    if not more and _number(fields, "count", 0) != len(entries):
        raise _Unexpected("it leaves out keys")
    return Answer(DONE, cluster, revision, True, entries, more, "")


def _read_transaction(request, fields):
    cluster, revision = _cluster_and_revision(fields)
    succeeded, responses = _truth(fields, "succeeded"), _list(fields, "responses")
    if not succeeded:
        if len(responses) != 1:
            raise _Unexpected("it does not say what it has found")
        entries = _entries(_object(responses[0], "response_range"))
        return Answer(DONE, cluster, revision, False, entries, False, "")
    if len(responses) != len(request.changes):
        raise _Unexpected("it has not done what was asked for")
    return Answer(DONE, cluster, revision, True, (), False, "")


def _read_compaction(_, fields):
    cluster, revision = _cluster_and_revision(fields)
    return Answer(DONE, cluster, revision, True, (), False, "")


def _read_version(_, fields):
    version = fields.get("etcdserver")
    if not isinstance(version, str):
        raise _Unexpected("it tells no version")
    return Answer(DONE, "", 0, True, (Entry("version", version, 0),), False, "")


# By the kind of a request: its path, how it is written, how its answer is read.
_REQUEST_KINDS = {
    Range: ("/v3/kv/range", _encode_range, _read_range),
    RangeAt: ("/v3/kv/range", _encode_range_at, _read_range),
    Transaction: ("/v3/kv/txn", _encode_transaction, _read_transaction),
    Compaction: ("/v3/kv/compaction", _encode_compaction, _read_compaction),
    Version: ("/version", None, _read_version),
}
_AUTHENTICATE = "/v3/auth/authenticate"


def encode_request(request: "tuple") -> "Tuple[str, bytes]":
    """(path, body) of a request; the body is the same bytes each time, b"" of one without."""
    import json
    path, encode_body, _ = _REQUEST_KINDS[type(request)]
    if encode_body is None:
        return path, b""
    body = encode_body(request)
    return path, json.dumps(body, separators=(",", ":")).encode()


def read_answer(request: "tuple", status: "int", body: "bytes") -> "Answer":
    """What an HTTP answer to the request means.  Raises nothing: whatever cannot be read has the
    outcome UNKNOWN."""
    if status != 200:
        return _read_refusal(status, body)
    _, _, read_fields = _REQUEST_KINDS[type(request)]
    try:
        return read_fields(request, _fields_of(body))
    except _Unexpected as error:
        return failure(UNKNOWN, f"{NOT_AN_ETCD}: {error}")


def _fields_of(body):
    """The JSON object; raises _Unexpected."""
    import json
    try:
        fields = json.loads(body.decode("utf-8"), parse_int=short_number)
    except (ValueError, RecursionError):
        raise _Unexpected("it answers without JSON")
    if not isinstance(fields, dict):
        raise _Unexpected("it answers without an object")
    return fields


# What refusals say, and in other words where those of etcd do not tell what is to be done.
_SAID = {
    "CommonName of client": "it refuses a client certificate that has a CN, since authentication "
                            "is on; make one without",
    "user name is empty": "user name is empty: authentication is on, see --etcd-user",
    "invalid user ID or password": "wrong name or password, see --etcd-password-file",
    "permission denied": "permission denied: the role of --etcd-user is to read and write all "
                         "below --etcd-prefix",
    "leader changed": "the members of etcd have changed their leader",
    "no leader": "the members of etcd have no leader, most of them may be away",
}
_NO_TOKEN = ("invalid auth token", "revision of auth store is old", "user name is empty")


def _read_refusal(status, body):
    """Whatever does not come from etcd itself is UNKNOWN."""
    text = _message_of(body)
    for part, words in _SAID.items():
        if part in text:
            return failure(outcome_of(status), words)
    if not text and status == 404:
        return failure(UNKNOWN, f"{NOT_AN_ETCD}, or one without enable-grpc-gateway")
    if not text:
        return failure(UNKNOWN, f"{NOT_AN_ETCD}: HTTP status {status}")
    for prefix in ("etcdserver: ", "mvcc: "):
        if text.startswith(prefix):
            text = text[len(prefix):]
    return failure(outcome_of(status), text)


def _message_of(body):
    """What an error says, of both generations of the gateway; "" when it is none of etcd's."""
    try:
        fields = _fields_of(body)
    except _Unexpected:
        text = body[:500].decode("utf-8", "replace").strip()
        return text if text.startswith("CommonName of client") else ""
    code, message = fields.get("code"), fields.get("message")
    if type(code) is not int or not isinstance(message, str):
        return ""
    return visible(message[:500])


# Names, and what is said of failures.

def _password(access):
    """The password for etcd, or ""; raises OSError or ValueError."""
    if access.password_file is None:
        return ""
    with open(access.password_file, encoding="utf-8") as file:
        return file.read().rstrip("\r\n")


def _client_context(access):
    """The context for members with https, or None; raises ValueError."""
    import ssl
    if not any(place_of(url).scheme == "https" for url in access.urls):
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which compares the name of the host
    reading = access.ca
    try:
        if access.ca:
            context.load_verify_locations(access.ca)
        else:
            context.load_default_certs()
        if access.certificate:
            reading = f"{access.certificate} with {access.private_key}"
            context.load_cert_chain(access.certificate, access.private_key, password=b"")
    except (OSError, ValueError) as error:
        raise ValueError(f"{reading}: {_words_of(error)}")
    if hasattr(context, "minimum_version"):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:  # Python 3.6
        context.options |= ssl.OP_NO_SSLv3 | ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    return context


def _words_of(error):
    """One line on an error of a file, a socket or TLS."""
    import ssl
    if isinstance(error, (ssl.SSLError, ssl.CertificateError)):
        return _words_of_tls(error)
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    name = getattr(error, "filename", None)
    if name:
        return f"{name}: {said}"
    return said[:1].lower() + said[1:]


NO_TLS = "it answers https without TLS"
WANTS_ANOTHER = "perhaps it wants https, or has other URLs for HTTP (listen-client-http-urls)"
ENDS_TLS = "it closed the connection of TLS; perhaps it wants --etcd-certificate, or serves http"


def _words_of_tls(error):
    import ssl
    said = getattr(error, "verify_message", None)  # Python 3.7 and later
    if isinstance(error, ssl.CertificateError) and not said:
        said = str(error)
    if said:
        return f"its certificate is not accepted: {said}"
    said = getattr(error, "reason", None) or str(error)
    if said == "WRONG_VERSION_NUMBER":
        return NO_TLS
    # Python before 3.10 calls by this name what OpenSSL 3 calls an unexpected end of file.
    is_end = said == "KRB5_S_TKT_NYV"
    if is_end or isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return ENDS_TLS
    if said == "CERTIFICATE_VERIFY_FAILED":  # Python 3.6
        return "its certificate is not accepted"
    if re.search("alert.*(certificate|unknown.ca)", said, re.IGNORECASE):
        return f"it does not accept the certificate of --etcd-certificate: {said}"
    return f"TLS: {said}"


def _find_addresses(place, flags=0):
    """What getaddrinfo says of a place; raises OSError or UnicodeError."""
    return socket.getaddrinfo(place.host, place.port, 0, socket.SOCK_STREAM, 0, flags)


def _numeric_addresses(place):
    """The address of a place whose host is a number; nothing where it is a name."""
    try:
        return _find_addresses(place, socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return []


class _Resolver:
    """Finds the addresses of places, each in a thread that may take as long as it likes."""

    def __init__(self):
        import threading
        self._threading = threading
        self._changed = threading.Condition()
        self._known = {}  # addresses by place
        self._reasons = {}  # by place: why nothing was found the last time
        self._searched = set()  # the places that are searched now

    def look(self, place: "Place") -> "None":
        """Begins to search, unless the place has a number."""
        if not _numeric_addresses(place):
            with self._changed:
                self._search(place)

    def addresses(self, place: "Place", until: "float") -> "list":
        """Those that are known; where none are, those that are found before `until` (s,
        monotonic).  Raises OSError."""
        found = _numeric_addresses(place)
        if found:
            return found
        with self._changed:
            if place not in self._known:
                self._search(place)
            while place not in self._known and place in self._searched:
                left = until - time.monotonic()
                if left <= 0:
                    raise OSError(f"{place.host} is not resolved yet")
                self._changed.wait(left)
            if place not in self._known:
                raise OSError(self._reasons[place])
            return self._known[place]

    def look_again(self, place: "Place") -> "None":
        """The addresses of the place may have changed."""
        with self._changed:
            if place in self._known:
                self._search(place)

    def _search(self, place):
        if place in self._searched:
            return
        thread = self._threading.Thread(target=self._run, args=(place,), name="resolver",
                                        daemon=True)
        self._searched.add(place)
        try:
            thread.start()
        except RuntimeError as error:  # there are too many
            self._searched.remove(place)
            self._reasons[place] = str(error)

    def _run(self, place):
        block_signals()
        found: "list" = []
        reason = f"{place.host} has no address"
        try:
            found = _find_addresses(place)
        except (OSError, UnicodeError) as error:
            reason = f"cannot resolve {place.host}: {_words_of(error)}"
        with self._changed:
            self._searched.remove(place)
            self._reasons[place] = reason
            if found:
                self._known[place] = found
            self._changed.notify_all()


# A connection.

class _Stream(io.RawIOBase):
    """What comes from a member.  No read lasts longer than `until` (s, monotonic), and at most
    `left` bytes are read: a chunk of the length -1 is to Python 3.13 all that comes."""

    def __init__(self, connection):
        self.until = 0.0
        self.left = 0
        self._connection = connection

    def readable(self):
        return True

    def readinto(self, buffer):
        self._connection.settimeout(left_until(self.until))
        number = self._connection.recv_into(buffer)
        self.left -= number
        if self.left < 0:
            raise TooLong(TOO_LONG_TO_READ)
        return number


class _Buffered(io.BufferedReader):
    """Stays open when an answer is whole, after which http.client closes its file."""

    def close(self):
        """Nothing: the socket is closed by its link."""


def left_until(until: "float") -> "float":
    """s until then (monotonic); raises socket.timeout when there are none."""
    left = until - time.monotonic()
    if left <= 0:
        raise socket.timeout(TOO_LATE)
    return left


class _Link:
    """The connection to a member.  `until`: when what is under way must have come to its end."""

    def __init__(self, place: "Place", addresses: "list", context: "Any", until: "float"):
        self.place = place
        self.has_answered = False
        self.refusals = 0  # in a row
        self.highest = 0  # revision that it has told
        self._host = f"{place.host}:{place.port}"
        if ":" in place.host:
            self._host = f"[{place.host}]:{place.port}"
        self._socket = self._connect(addresses, until)
        if place.scheme == "https":
            self._socket = self._secure(context, until)
        self._stream = _Stream(self._socket)
        self._reader = _Buffered(self._stream)

    @staticmethod
    def _connect(addresses, until):
        """A socket that is connected to the first address that takes it; raises OSError."""
        failed: "OSError" = socket.timeout(TOO_LATE)
        for number, (family, kind, protocol, _, address) in enumerate(addresses):
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(left_until(until) / (len(addresses) - number))
                connection.connect(address)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connection
            except OSError as error:
                connection.close()
                failed = error
        raise failed

    def _secure(self, context, until):
        wrapped = secured(self._socket, context, server_hostname=self.place.host)
        try:
            wrapped.settimeout(left_until(until))
            wrapped.do_handshake()
        except (OSError, ValueError):
            wrapped.close()
            raise
        return wrapped

    def makefile(self, _):
        """For http.client: where it reads the answer."""
        return self._reader

    def is_quiet(self) -> "bool":
        """Whether it is open and nothing has come for which nobody has asked."""
        self._stream.until = 0.0
        try:
            if self._reader.peek(1):
                return False
        except socket.timeout:
            pass  # there is nothing in the buffer
        try:
            self._socket.settimeout(0)
            self._socket.recv(1)
        except _nothing_yet():
            return True
        except OSError:
            pass
        return False

    def ask(self, path: "str", body: "bytes", token: "str",
            until: "float") -> "Tuple[int, bytes]":
        """(status, body) of the whole answer.  Raises OSError, ValueError, HTTPException."""
        import http.client
        method = "POST" if body else "GET"
        head = (f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n")
        if token:
            head += f"Authorization: {token}\r\n"
        self._socket.settimeout(left_until(until))
        self._socket.sendall(f"{head}\r\n".encode() + body)
        self._stream.until = until
        self._stream.left = 2 * MOST_ANSWER  # of the head and of what divides chunks, too
        response = http.client.HTTPResponse(self, method=method)  # type: ignore[arg-type]
        response.begin()
        data = self._read_body(response)
        self.has_answered = True
        if response.will_close:
            self._socket.close()
        return response.status, data

    @staticmethod
    def _read_body(response):
        """Raises ValueError for what is too long, or cut off."""
        pieces = []
        size = 0
        while True:
            piece = response.read(PIECE)
            if not piece:
                break
            pieces.append(piece)
            size += len(piece)
            if size > MOST_ANSWER:
                raise TooLong(TOO_LONG_TO_READ)
        if response.length:
            raise ValueError("its answer was cut off")
        return b"".join(pieces)

    def is_open(self) -> "bool":
        """Whether it can be asked again."""
        return self._socket.fileno() >= 0

    def close(self) -> "None":
        """Ends it."""
        self._socket.close()


class TooLong(ValueError):
    """An answer of more than MOST_ANSWER bytes."""


def _nothing_yet():
    """What a read raises when there is nothing to be read."""
    import ssl
    return BlockingIOError, ssl.SSLWantReadError


# Asking.

class _Inquirer:
    """Asks in the thread; all of it belongs to one generation."""

    def __init__(self, access: "Access", resolver: "_Resolver"):
        self._access = access
        self._resolver = resolver
        self._context: "Any" = None
        self._link: "Any" = None
        self._failures = 0  # of links, whatever their members
        self._token = ""
        self.page = 0  # keys that a page may have, 0: as many as are asked for

    def ask(self, url: "str", request: "tuple", until: "float") -> "Answer":
        """The answer of the member to the request, before `until` (s, monotonic)."""
        import http.client
        place = place_of(url)
        try:
            answer = self._ask(place, self._fitting(request), until)
            if answer.outcome == UNKNOWN:  # behind this link there may be a proxy
                self._fail(place)
            return answer
        except socket.timeout:
            self._take_less(request, LEAST_PAGE)
            reason = TOO_LATE
        except TooLong as error:
            self._take_less(request, 1)
            reason = str(error)
        except ConnectionResetError as error:
            reason = self._words_of_end(place, error)
        except http.client.HTTPException as error:
            reason = f"{NOT_AN_ETCD}: {type(error).__name__}"
        except (OSError, ValueError) as error:
            reason = _words_of(error)
        self._fail(place)
        return failure(UNKNOWN, visible(reason))

    def _words_of_end(self, place, error):
        """One line on a member that has closed the connection, or reset it."""
        import http.client
        said = _words_of(error)
        if isinstance(error, http.client.RemoteDisconnected):
            said = "it has closed the connection without an answer"
        link = self._link
        if place.scheme == "http" and link is not None and not link.has_answered:
            said += f", {WANTS_ANOTHER}"
        return said

    def close(self) -> "None":
        """Ends the link."""
        if self._link is not None:
            self._link.close()
        self._link = None

    def _fail(self, place):
        """The next link is made anew, with what files and names say then.  If the place has
        several addresses it begins with another one: some may lead to nothing."""
        self.close()
        self._failures += 1
        self._context = None
        self._resolver.look_again(place)

    def _ask(self, place, request, until):
        self._open_link(place, until)
        needs_token = self._access.user and not isinstance(request, Version)
        if needs_token and not self._token:
            refusal = self._authenticate(until)
            if refusal is not None:
                return self._count(refusal)
        answer = self._ask_once(request, until)
        if self._needs_token(answer):
            refusal = self._authenticate(until)
            if refusal is not None:
                return self._count(refusal)
            answer = self._ask_once(request, until)
        return self._count(answer)

    def _ask_once(self, request, until):
        path, body = encode_request(request)
        status, data = self._link.ask(path, body, self._token, until)
        answer = read_answer(request, status, data)
        if answer.outcome == DONE:
            return self._unless_old(request, answer)
        return answer

    def _open_link(self, place, until):
        link = self._link
        if link is not None and link.place == place and link.is_open() and link.is_quiet():
            return
        self.close()
        addresses = self._resolver.addresses(place, until)
        first = self._failures % len(addresses)
        addresses = addresses[first:] + addresses[:first]
        if place.scheme == "https" and self._context is None:
            self._context = _client_context(self._access)
        self._link = _Link(place, addresses, self._context, until)

    def _count(self, answer):
        """A member that refuses again and again may do so alone."""
        if answer.outcome != NOT_DONE:
            self._link.refusals = 0
            return answer
        self._link.refusals += 1
        if self._link.refusals == MOST_REFUSALS:
            self._link.refusals = 0
            return answer._replace(outcome=UNKNOWN)
        return answer

    def _unless_old(self, request, answer):
        """An answer that comes a second time, from a proxy perhaps, is none."""
        link = self._link
        is_change = isinstance(request, Transaction) and answer.succeeded
        if is_change and answer.revision <= link.highest:
            return failure(UNKNOWN, "its answer is older than what was asked")
        link.highest = max(link.highest, answer.revision)
        return answer

    # To be admitted.

    def _authenticate(self, until):
        """Gets a token; returns None, or how it was refused."""
        import json
        self._token = ""
        login = {"name": self._access.user, "password": _password(self._access)}
        status, data = self._link.ask(_AUTHENTICATE, json.dumps(login).encode(), "", until)
        if status == 200:
            return self._take_token(data)
        refusal = _read_refusal(status, data)
        if "authentication is not enabled" in refusal.reason:
            return None  # then it needs no token
        return refusal

    def _take_token(self, data):
        try:
            token = _fields_of(data).get("token")
        except _Unexpected as error:
            return failure(UNKNOWN, f"{NOT_AN_ETCD}: {error}")
        if not isinstance(token, str) or not re.fullmatch("[!-~]+", token):
            return failure(UNKNOWN, f"{NOT_AN_ETCD}: it gives no token")
        self._token = token
        return None

    def _needs_token(self, answer):
        """Whether the same request may be done with another token."""
        if answer.outcome != NOT_DONE or not self._access.user:
            return False
        return any(part in answer.reason for part in _NO_TOKEN)

    # Pages.

    def _fitting(self, request):
        """A page of which a part fits into the time and the length of an answer."""
        if isinstance(request, Range) and self.page and request.limit > self.page:
            return request._replace(limit=self.page)
        return request

    def _take_less(self, request, least):
        if isinstance(request, Range) and request.limit > 1:
            limit = self.page or request.limit
            self.page = max(least, min(limit, request.limit) // 2)


class _Question:
    """What the thread has to do: to ask one member."""

    def __init__(self, inquirer: "_Inquirer", url: "str", request: "tuple", until: "float"):
        self.url = url
        self.is_change = isinstance(request, Transaction)
        self.answer = failure(UNKNOWN)
        self._inquirer = inquirer
        self._request = request
        self._until = until

    def do(self) -> "None":
        """In the thread."""
        self.answer = self._inquirer.ask(self.url, self._request, self._until)

    def fail(self, reason: "str") -> "None":
        """A bug has ended the thread."""
        self.answer = failure(UNKNOWN, reason)


class Etcd:
    """Asks the members of the cluster, in a thread of its own.  Raises CannotServe where it never
    could.  `trouble`: what is wrong with the member that was asked last, "" when nothing is;
    `refusal`: why changes are refused, "" while they are not."""

    def __init__(self, loop: "Loop", log: "Log", access: "Access"):
        self.access = access
        self._loop, self._log = loop, log
        self._load_modules()
        try:
            check_access(access)
        except UsageError as error:
            raise CannotServe(f"etcd: {error}")
        self._resolver = _Resolver()
        self._thread: "Any" = None
        self._inquirer: "Any" = None
        self.trouble = ""
        self.refusal = ""
        # of each member that was asked: what is wrong with it, "" when nothing is
        self._reasons: "Dict[str, str]" = {}
        self._lost: "set" = set()  # the members that did not answer when they were asked last

    @staticmethod
    def _load_modules():
        """Before a thread needs them: two that load modules may wait for each other."""
        try:
            import encodings.idna  # noqa: F401
            import http.client  # noqa: F401
            import json  # noqa: F401
            import ssl  # noqa: F401
            import threading  # noqa: F401
        except ImportError as error:
            raise CannotServe(f"--etcd needs all of Python's standard library: {error}")

    @property
    def reachable(self) -> "int":
        """The number of members that have obeyed or refused what they were asked last."""
        return len(self._reasons) - len(self._lost)

    def start(self) -> "None":
        """Begins a generation.  Raises OSError."""
        self.stop()
        before = self._inquirer
        self._inquirer = _Inquirer(self.access, self._resolver)
        if before is not None:  # or each term might end before it has found out how many fit
            self._inquirer.page = 2 * before.page
        self._thread = Thread(self._loop, "etcd")
        for url in self.access.urls:
            self._resolver.look(place_of(url))

    def ask(self, url: "str", request: "tuple", seconds: "float",
            hear: "Callable[[Answer], object]") -> "None":
        """Has hear(answer) called by the loop, within so many s or shortly after.  What is asked
        while something is under way waits for its end, which counts."""
        until = time.monotonic() + seconds
        question = _Question(self._inquirer, url, request, until)
        self._thread.do(question, functools.partial(self._hear, hear))

    def saw_change(self) -> "None":
        """Something was changed, by this daemon or by another one."""
        if self.refusal:
            self.refusal = ""
            self._log.limited("etcd takes changes again", "info")

    def stop(self) -> "None":
        """Ends the generation: no answer to what was asked is heard.  Its thread ends by itself,
        as soon as the time of what is under way is over."""
        if self._thread is None:
            return
        self._thread.do(Task(self._inquirer.close), ignore)
        self._thread.finish(0)
        self._thread = None

    def _hear(self, hear, question):
        self._note(question)
        hear(question.answer)

    def _note(self, question):
        """Logs what has changed."""
        url, answer = question.url, question.answer
        if answer.outcome == UNKNOWN:
            self._lost.add(url)
        else:
            self._lost.discard(url)
        reason = answer.reason
        if answer.outcome == DONE:
            reason = ""
        self.trouble = ""
        if reason:
            self.trouble = f"{url}: {reason}"
        if not question.is_change:
            self._note_member(url, reason)
        elif not reason:
            self._note_member(url, "")
            self.saw_change()
        elif answer.outcome == NOT_DONE or reason == self.refusal:
            self._note_member(url, "")
            self._note_refusal(url, reason)
        else:
            self._note_member(url, reason)

    def _note_member(self, url, reason):
        before = self._reasons.get(url, "")
        self._reasons[url] = reason
        if reason == before:
            return
        if reason:
            self._log.limited(f"etcd {url}: {reason}{self._cure(reason)}", "error")
        else:
            self._log.limited(f"etcd {url} answers again", "info")

    def _note_refusal(self, url, reason):
        """The third refusal of a member in a row counts as no answer; it is one all the same."""
        if reason != self.refusal:
            self.refusal = reason
            self._log.limited(f"etcd {url}: {reason}{self._cure(reason)}", "error")

    @staticmethod
    def _cure(reason):
        if NO_ROOM not in reason:
            return ""
        return ("; until there is room nobody can lead.  Cure: etcdctl compact REVISION, etcdctl "
                "defrag on each member, etcdctl alarm disarm; then have etcd compact by itself "
                "(ETCD_AUTO_COMPACTION_RETENTION=1)")


# The memory as it lies in etcd.  A key there has a limited length, and a name has not: so the key
# of a resource has the SHA-256 of its name, and its text begins with the name itself.

_holder_key = re.compile("h/[0-9a-f]{16}").fullmatch
_named_key = re.compile("[rv]/([0-9a-f]{64})(/.+)?").fullmatch
_named_text = re.compile('name="([A-Za-z0-9+/=]+)" (.*)', re.DOTALL).fullmatch


@functools.lru_cache(QUOTED)
def _digest_of(encoded):
    """The SHA-256, in hex digits, of the name that is `encoded` in base64."""
    import hashlib
    name = decode_name(encoded).encode("utf-8", "surrogateescape")
    return hashlib.sha256(name).hexdigest()


def stored(records: "Iterable[Tuple[str, str | None]]") -> "List[Tuple[str, str | None]]":
    """The changes that store these records, as batch_of() and everything() make them.  That of the
    daemon is left out: the leader record says the same."""
    found: "List[Tuple[str, str | None]]" = []
    for key, text in records:
        kind, rest = key[:2], key[2:]
        if kind in (OF_RESOURCE, OF_VALUE):
            name, value = rest, ""
            if kind == OF_VALUE:
                name, _, value = rest.rpartition("/")
                value = f"/{value}"
            key = f"{kind}{_digest_of(name)}{value}"
            if text is not None:
                text = f'name="{name}" {text}'
        if kind in STORED_KINDS:
            found.append((key, text))
    return found


def remembered(entries: "Iterable[Tuple[str, str]]") -> "List[Tuple[str, str]]":
    """The records that were stored as these keys, which begin behind the prefix, and texts: for
    restore().  Raises BrokenMemory for what stored() has not made."""
    return [_record_of(key, text) for key, text in entries]


def _record_of(key, text):
    if _holder_key(key):
        return key, text
    found_key, found_text = _named_key(key), _named_text(text)
    if found_key is None or found_text is None:
        raise BrokenMemory(f"{visible(key[:100])} in etcd is not what a daemon stores")
    name, text = found_text.groups()
    digest, value = found_key.groups(default="")
    is_value = key.startswith(OF_VALUE)
    try:
        fits = _digest_of(name) == digest
    except ProtocolError:
        fits = False
    if not fits or is_value == (value == ""):
        raise BrokenMemory(f"{visible(key[:100])} in etcd has the wrong name")
    return f"{key[:2]}{name}{value}", text


# What a daemon remembers of the cluster itself.

CLUSTERS = "/var/lib/flomd"  # where --etcd-state lies if nobody says
CLUSTER_HEAD = "flomd cluster 1\n"
REVISION_AT = len(CLUSTER_HEAD) + len("revision ")
NOTED = 5  # s between two revisions that are written

_cluster_text = re.compile(r"""
    flomd\ cluster\ 1\n
    revision\ ([0-9]{20})\n
    id\ ([0-9]{0,20})\n
    mark\ ("[^\n]*")\n
    """, re.VERBOSE | re.ASCII).fullmatch


def cluster_path(settings: "Settings") -> "str":
    """The path of the file that says which cluster it is: that of a prefix /flom/NAME/ is NAME."""
    if settings["EtcdState"]:
        return settings["EtcdState"]
    name = settings["EtcdPrefix"].strip("/")
    if name.startswith("flom/"):
        name = name[len("flom/"):]
    return os.path.join(CLUSTERS, name.replace("/", "-"))


class ClusterFile:
    """The file of --etcd-state.

    Id and mark change once; then a whole file takes the path.  The revision, a lower bound, is
    changed in place and not synced: a write of twenty digits is not torn, and when the end of it
    is lost with the system, the bound is lower.
    """

    def __init__(self, log: "Log", path: "str"):
        self.path = path
        self._log = log
        self._known = ("", "")  # id and mark in the file
        self._revision = 0  # in the file
        self._noted_at = 0.0  # s, monotonic
        self._fails = False

    def read(self, is_new: "bool" = False) -> "Cluster":
        """The cluster that is known.  `is_new`: any other is as good (--etcd-new-cluster).  Raises
        CannotServe where the file is damaged, or cannot be read or written."""
        try:
            check_replaceable(self.path)
            with open(self.path, encoding="ascii", errors="replace") as file:
                text = file.read()
        except FileNotFoundError:
            with serving(f"cannot write {self.path}"):
                self._replace(Cluster())
            return Cluster(is_new=is_new)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CannotServe(f"cannot read {self.path}: {reason}")
        if is_new:
            return Cluster(is_new=True)
        return self._cluster_of(text)

    def _cluster_of(self, text):
        import json
        found = _cluster_text(text)
        try:
            revision, id, mark = found.groups()  # type: ignore[union-attr]
            mark = json.loads(mark)
        except (AttributeError, ValueError):
            raise CannotServe(f"{self.path} is damaged, and nobody knows which etcd it was; with "
                              "--etcd-new-cluster any is the right one")
        self._known = id, mark
        self._revision = int(revision)
        return Cluster(id, mark, self._revision)

    def write(self, cluster: "Cluster") -> "None":
        """Notes what has changed: to be called after each answer, it seldom has to do anything."""
        if cluster.is_new:
            return
        is_time = time.monotonic() >= self._noted_at + NOTED
        if (cluster.id, cluster.mark) != self._known:
            if is_time or not self._fails:  # a disk that fails may take long to do so
                self._try(self._replace, cluster)
        elif cluster.revision != self._revision and is_time:
            self._try(self._change_revision, cluster)

    def finish(self, cluster: "Cluster") -> "None":
        """The last time: the revision is written, too."""
        self._noted_at = -NOTED
        self.write(cluster)

    def _try(self, write, cluster):
        self._noted_at = time.monotonic()
        reason = failure_of(functools.partial(write, cluster))
        if reason and not self._fails:
            self._log.error(f"cannot write {self.path}: {reason}; it is tried again every "
                            f"{NOTED} s")
        elif self._fails and not reason:
            self._log.info(f"{self.path} is written again")
        self._fails = reason != ""

    def _replace(self, cluster):
        """Raises OSError."""
        import json
        new = f"{self.path}.new"
        text = (f"{CLUSTER_HEAD}revision {cluster.revision:020}\n"
                f"id {cluster.id}\nmark {json.dumps(cluster.mark)}\n")
        with open(new, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path)
        sync_folder(os.path.dirname(self.path) or ".")
        self._known = cluster.id, cluster.mark
        self._revision = cluster.revision

    def _change_revision(self, cluster):
        """Raises OSError."""
        try:
            number = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # somebody has removed it
            self._replace(cluster)
            return
        try:
            os.pwrite(number, f"{cluster.revision:020}".encode(), REVISION_AT)
        finally:
            os.close(number)
        self._revision = cluster.revision


# What is looked after beside the chain.

LOOK_ROUND, LOOK_SOON = 10, 0.5  # s between two looks at all members; before any has answered
CHECK, CHECK_FIRST = 3600, 60  # s between two looks whether somebody compacts; to the first
COMPACT = 300  # s
NEVER_COMPACTED = 500000  # revisions that are not there any more where somebody compacts
KEPT_REVISIONS = 10000  # by --etcd-compact
TO_ANSWER, TO_WAIT = 2, 30  # s for a look at a member, for the rest
OLDEST_ETCD = (3, 4, 0)
FIRST_LOSING, LAST_LOSING = (3, 5, 0), (3, 5, 2)  # versions that lose data

_version_of = re.compile(r"([0-9]+)\.([0-9]+)\.([0-9]+)", re.ASCII).match


def refusal_of(version: "str") -> "str":
    """Why an etcd of this version is not used, "" if it is."""
    found = _version_of(version)
    if found is None:
        return f"{visible(version[:40])!r} is no version of etcd"
    numbers = tuple(int(number) for number in found.groups())
    if numbers < OLDEST_ETCD:
        return f"etcd {found.group()} is too old, 3.4 is needed"
    if FIRST_LOSING <= numbers <= LAST_LOSING:
        return f"etcd {found.group()} can lose data after a crash, later ones do not"
    return ""


class _Silence:
    """The log of who tells in other words what it has seen."""

    def limited(self, *_):
        """Nothing."""


class Housekeeping:
    """Looks after versions, reachable members and the room in etcd, in a thread of its own, so
    that no beat is delayed.

    refusal    why nobody may lead in this cluster, "" if one may
    trouble    what the operator should know, "" if nothing
    """

    def __init__(self, loop: "Loop", log: "Log", access: "Access", prefix: "str",
                 compacts: "bool" = False):
        self.refusal = ""
        self.trouble = ""
        self._loop, self._log = loop, log
        self._etcd = Etcd(loop, _Silence(), access)  # type: ignore[arg-type]
        self._urls = access.urls
        self._left: "List[str]" = []  # members to be looked at in this round
        self._versions: "Dict[str, str]" = {}
        self._leader_key = prefix + LEADER_KEY
        self._compacts = compacts
        self._told = len(access.urls)  # members that were reachable by the last line in the log
        self._led: "Any" = None  # the Quorum that this daemon leads
        self._is_denied = False  # to compact

    @property
    def reachable(self) -> "int":
        """The number of members that have answered lately."""
        return self._etcd.reachable

    @property
    def versions(self) -> "List[str]":
        """The versions of etcd that members have told, each once."""
        return sorted(set(self._versions.values()))

    def knows_version(self) -> "bool":
        """Whether any member has told its version.  Nobody claims before."""
        return len(self._versions) > 0

    def start(self) -> "None":
        """Begins to look after the members.  Raises OSError."""
        self._etcd.start()
        self._look_round()

    def stop(self) -> "None":
        """Ends."""
        self.follow()
        self._loop.cancel(self._look_round)
        self._etcd.stop()

    def lead(self, quorum: "Quorum") -> "None":
        """This daemon leads the quorum, so it looks after the room."""
        self._led = quorum
        if self._compacts:
            self._loop.after(COMPACT, self._compact)
        else:
            self._loop.after(CHECK_FIRST, self._check)

    def follow(self) -> "None":
        """This daemon does not lead any more."""
        self._led = None
        self.trouble = ""
        self._loop.cancel(self._check)
        self._loop.cancel(self._compact)

    # The members.

    def _look_round(self):
        self._left = list(self._urls)
        self._look_at_next()

    def _look_at_next(self):
        if self._left:
            url = self._left.pop(0)
            self._etcd.ask(url, Version(), TO_ANSWER, functools.partial(self._hear_version, url))
            return
        self._tell_reachable()
        if self.knows_version():
            self._loop.after(LOOK_ROUND, self._look_round)
        else:  # etcd may be started only now
            self._loop.after(LOOK_SOON, self._look_round)

    def _hear_version(self, url, answer):
        if answer.outcome == DONE:
            self._versions[url] = answer.entries[0].text
            self._judge_versions()
        self._look_at_next()

    def _judge_versions(self):
        reasons = [refusal_of(version) for version in self.versions]
        before = self.refusal
        self.refusal = next(filter(None, reasons), "")
        if self.refusal and self.refusal != before:
            self._log.error(f"{self.refusal}: nobody can lead")

    def _tell_reachable(self):
        number = self.reachable
        if number != self._told:
            level = "info" if number == len(self._urls) else "error"
            text = f"{number} of {len(self._urls)} members of etcd answer"
            if number == 0:
                text += ": this daemon cannot lead"
            self._log.limited(text, level)
        self._told = number

    # The room.

    def _ask_revision(self, hear):
        """Has hear(url, revision) called for the member that the leader asks."""
        url = self._led.members.current
        request = Range(self._leader_key, self._leader_key + "\0", 0)
        self._etcd.ask(url, request, TO_WAIT, functools.partial(self._hear_revision, url, hear))

    def _hear_revision(self, url, hear, answer):
        """A member of another cluster, whose room is not this one's, is left alone."""
        if answer.outcome != DONE or self._led is None:
            return
        if answer.cluster == self._led.cluster.id:
            hear(url, answer.revision)

    def _check(self):
        self._loop.after(CHECK, self._check)
        self._ask_revision(self._check_at)

    def _check_at(self, url, revision):
        """Asks for the leader record as it was long ago."""
        then = revision - NEVER_COMPACTED
        if then > 0:
            request = RangeAt(self._leader_key, self._leader_key + "\0", 0, then)
            self._etcd.ask(url, request, TO_WAIT, self._hear_of_then)

    def _hear_of_then(self, answer):
        if answer.outcome == UNKNOWN or self._led is None:
            return
        self.trouble = ""
        if answer.outcome == DONE:
            self.trouble = ("nobody compacts etcd, and it will be full: have it compact by itself "
                            "(ETCD_AUTO_COMPACTION_RETENTION=1)")
            self._log.error(self.trouble)

    def _compact(self):
        self._loop.after(COMPACT, self._compact)
        self._ask_revision(self._compact_at)

    def _compact_at(self, url, revision):
        then = revision - KEPT_REVISIONS
        if then > 0:
            self._etcd.ask(url, Compaction(then), TO_WAIT, self._hear_of_compaction)

    def _hear_of_compaction(self, answer):
        is_denied = answer.outcome == NOT_DONE and "permission denied" in answer.reason
        if is_denied and not self._is_denied:
            self._log.error("etcd does not let --etcd-user compact (3.5 wants root)")
        self._is_denied = is_denied


# --- Loop ---------------------------------------------------------------------------------------
# One thread, one loop: it waits for events and dates, and calls who wants to know of them.  It
# knows no lock and no connection.
#
# Words.  An event: a socket can be read or written.  A handler is called with the events of one
# descriptor.  An act is called at its date.  A turn: to wait once, and to handle what has come.
#
# What a turn has changed can be written at once, however many clients have changed it: whoever
# wants to do so asks for an act at the end of the turn, after its events and what was due.  What
# such an act asks for in turn is done at the end of the next turn, which waits for nothing then:
# so nobody waits for a long row of such acts.
#
# What has come is read before what is due is done: the process, or the host, may have been stopped
# over the end of a recovery window while the reclaims lay in the sockets.  To accept and to read
# are two turns, so the loop turns until nothing comes any more.  But a flood has no end: it turns
# no longer than it was late.
#
# A turn handles events for TURN s, that dates are kept under a flood, too.  The events that are
# left are the first of the next turn, and the system is asked again only when none is left: so
# everybody is served in turn.
#
# Whoever may be late by waking up, and must then do nothing else before, looks first in each turn:
# see look_first().
#
# A bug costs one connection.  Each handler and each act is called by guarded(), which logs the
# traceback and closes what the handler was for.  What cannot be closed, such as a listener, rests
# for PAUSE s: its event would come again at once.

TURN = 0.01  # s that a turn gives to the events that have come
STALL = 1  # s by which a loop is late that did not run
PAUSE = 1  # s of rest after something has failed that would fail again at once
LONGEST_WAIT = 86400  # s; selectors fail when they are to wait for more than 2 ** 31 ms
MOST_STALE = 64  # entries without a date that the heap of dates keeps in any case
EVENT_READ, EVENT_WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


BOOT_TIME = 7  # CLOCK_BOOTTIME of Linux; Python has the name from 3.7 on


class Moment:
    """A point in time, as the engine wants it: `mono`, s of the monotonic clock; `wall`, s since
    1970; `boot`, s since the boot of the system, time in which it was suspended included."""
    __slots__ = ("mono", "wall", "boot")

    def __init__(self):
        self.mono = time.monotonic()
        self.wall = time.time()
        try:
            self.boot = time.clock_gettime(BOOT_TIME)
        except OSError:  # another system than Linux
            self.boot = self.mono

    def local(self):
        """µs since 1970 of local time, as a clock on the wall shows it."""
        offset = time.localtime(self.wall).tm_gmtoff
        return int(self.wall * 10 ** 6) + offset * 10 ** 6

    def format(self, text, later=0):
        """strftime of this moment, or so many s later, in local time; empty if it cannot be."""
        try:
            return time.strftime(text, time.localtime(self.wall + later))
        except ValueError:
            return ""


def nothing():
    """To close what cannot be closed."""


class Loop:
    """Sockets and dates.  `now` is the Moment of this turn."""

    def __init__(self, log: "Log"):
        self.now = Moment()
        self.running_since = self.now.mono  # s, monotonic: when it began, or went on after a stall
        self._log = log
        self._stopped = False
        self._selector = selectors.DefaultSelector()
        # what is watched, as a pair (handler, close), by the number of the descriptor
        self._watched: "Dict[int, Watched]" = {}
        self._resting: "Dict[int, Watched]" = {}
        self._events: "Deque[tuple]" = collections.deque()  # that have come and wait for a turn
        self._dates: "Dict[Act, float]" = {}
        # (date, serial, act); an entry is stale when the act has another date now, or none
        self._heap: "List[Tuple[float, int, Act]]" = []
        self._serial = itertools.count()
        self._last: "List[Act]" = []  # to be called at the end of this turn
        self._look: "Act" = nothing

    def run(self):
        """Handles what comes and calls what is due, until stop()."""
        while not self._stopped:
            date = self._first_date()
            seconds = date - time.monotonic()
            if self._last:
                seconds = 0
            self._turn(max(0, seconds))
            if date <= self.now.mono:
                self._catch_up(date)
                self._do_what_is_due()
            if self._last:
                self._end_turn()

    def stop(self):
        """From now on no handler is called; run() comes to its end with this turn."""
        self._stopped = True

    def look_first(self, act: "Act") -> "None":
        """act() is called in each turn as soon as `now` is known, before any event is handled.  It
        has no guard: a bug in it ends run(), since without it nothing may be done."""
        self._look = act

    def guarded(self, close: "Act", act: "Callable", *arguments) -> "bool":
        """Calls act(*arguments), and returns whether it came to its end.  A bug in it is logged,
        and close() is called to end what it was for; whatever else is to be done goes on."""
        try:
            act(*arguments)
        except Exception:
            import traceback
            self._log.bug(traceback.format_exc())
            self.guarded(nothing, close)
            return False
        return True

    # Sockets.

    def watch(self, source: "Watchable", handler: "Handler",
              close: "Act" = nothing) -> "None":
        """handler(events) is called when the source can be read; close() when the handler fails.
        Raises OSError, and then watches nothing."""
        number = source.fileno()
        watched = handler, close
        self._selector.register(number, EVENT_READ, watched)
        self._watched[number] = watched

    def watch_writing(self, source: "Watchable", wanted: "bool") -> "None":
        """Its handler is called when it can be written, too, or not any more.  Raises OSError, and
        then watches it no more."""
        events = EVENT_READ
        if wanted:
            events |= EVENT_WRITE
        number = source.fileno()
        watched = self._watched.pop(number)
        self._selector.modify(number, events, watched)
        self._watched[number] = watched

    def forget(self, source: "Watchable") -> "None":
        """To be called before the source is closed."""
        number = source.fileno()
        if self._watched.pop(number, None) is None:
            self._resting.pop(number, None)
        else:
            self._selector.unregister(number)

    # Dates.

    def at(self, when: "float", act: "Act") -> "None":
        """act() is called at `when` (s, monotonic).  An act has one date: this moves it."""
        self._dates[act] = when
        entry = when, next(self._serial), act
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._dates) + MOST_STALE:
            self._drop_stale_entries()

    def _drop_stale_entries(self):
        entries = []
        for act, when in self._dates.items():
            entry = when, next(self._serial), act
            entries.append(entry)
        heapq.heapify(entries)
        self._heap = entries

    def after(self, seconds: "float", act: "Act") -> "None":
        """act() is called in so many s; this moves the date that it has."""
        self.at(self.now.mono + seconds, act)

    def within(self, seconds: "float", act: "Act") -> "None":
        """act() is called in so many s, or at the date that it has already."""
        if act not in self._dates:
            self.after(seconds, act)

    def cancel(self, act: "Act") -> "None":
        """act() is not called, if it has a date."""
        self._dates.pop(act, None)

    def drop(self, act: "Act") -> "None":
        """act() is not called, neither at a date nor at the end of the turn."""
        self.cancel(act)
        self._last = [other for other in self._last if other != act]

    def at_end_of_turn(self, act: "Act") -> "None":
        """act() is called once when all else that belongs to this turn is done."""
        if act not in self._last:
            self._last.append(act)

    # A turn.

    def _first_date(self):
        while self._heap:
            when, _, act = self._heap[0]
            if self._dates.get(act) == when:
                return when
            heapq.heappop(self._heap)
        return NEVER

    def _turn(self, timeout):
        """Waits for events, `timeout` s at most, and handles them; returns whether any came."""
        if not self._events:
            found = self._selector.select(min(timeout, LONGEST_WAIT))
            self._events.extend(found)
        any_came = len(self._events) > 0
        self.now = Moment()
        self._look()
        until = self.now.mono + TURN
        while self._events and not self._stopped:
            key, events = self._events.popleft()
            self._handle(key.fd, key.data, events)
            if time.monotonic() >= until:
                break
        return any_came

    def _handle(self, number: "int", watched: "Watched", events: "int") -> "None":
        if self._watched.get(number) is not watched:
            return  # an event before this one had it forgotten
        handler, close = watched
        if self.guarded(close, handler, events):
            return
        if self._watched.get(number) is watched:  # it could not be closed
            self._selector.unregister(number)
            del self._watched[number]
            self._rest(number, watched)

    def _rest(self, number: "int", watched: "Watched") -> "None":
        self._resting[number] = watched
        self.after(PAUSE, functools.partial(self._resume, number, watched))

    def _resume(self, number: "int", watched: "Watched") -> "None":
        if self._resting.get(number) is not watched:
            return  # it was forgotten, and another may have this number
        try:
            self._selector.register(number, EVENT_READ, watched)
        except OSError:
            self._rest(number, watched)
        else:
            self._watched[number] = self._resting.pop(number)

    def _catch_up(self, date):
        """Handles what has come by now, before what was due at the date is done."""
        since, stalled = date, True
        while stalled and not self._stopped:
            begun = self.now.mono
            late = begun - since
            if late > STALL:
                self.running_since = begun
            self._read_for(late)
            # The process may have been stopped right here: then more has come, and more is due.
            stalled = self.now.mono > begun + late + STALL
            since = begun

    def _read_for(self, seconds):
        """Handles what has come: two turns at least if anything has, and until nothing comes."""
        until = self.now.mono + seconds
        accepted = self._turn(0)
        came = accepted and self._turn(0)  # what they have sent
        while came and self.now.mono < until and not self._stopped:
            came = self._turn(0)

    def _do_what_is_due(self):
        for when, act in self._due():
            if self._dates.get(act) == when:  # none before it has cancelled or moved it
                del self._dates[act]
                self.guarded(nothing, act)

    def _end_turn(self):
        acts, self._last = self._last, []
        for act in acts:
            self.guarded(nothing, act)

    def _due(self):
        """[(date, act)] of what was due before any of it is done."""
        found = []
        while self._heap:
            when, _, act = self._heap[0]
            if when > self.now.mono:
                break
            heapq.heappop(self._heap)
            found.append((when, act))
        return found


# --- Connections --------------------------------------------------------------------------------
# The sockets of the clients.  A Connection reads what has come, writes what its client can take
# and keeps the rest.  It never blocks.  It knows its session, and of the server only what it was
# given: a table of what can be done for a client, and whom to tell of its end.
#
# Words.  Closing: the last word was said; when it is written the daemon half-closes, and what
# comes no longer counts.  Closed: the client is served no more; its socket is closed, at once or
# when the end of its lock is stored.  Surplus: beyond the limit of clients; a surplus client is
# served as far as to be told so.
#
# A client for which something has been decided waits until that is stored, see Server: its
# connection has a batch.  Nothing of it is read meanwhile, so that what it says next finds the
# lock, and the session, as the answer will have left them: the messages that have come already
# stay in the iterator that was reading them, and its socket is watched no more as soon as it has
# something to read.  When the batch is stored resume() goes on with both.
#
# A client may have said all that it wants and gone, before the first answer.  So one to which
# nothing can be sent is not closed but *deaf*: what it has said is read, and done, to its end.
#
# How a connection has ended matters in a quorum, see RELEASES: only an end of file is in order.
# The system tells of a reset once, and of an end of file after that.  So where sending has failed
# the end that is read afterwards is none in order, unless the client had ended its side before:
# then, and only then, sending fails with EPIPE.
#
# A client that is silent is closed after PATIENCE s: one that has not said its first message, does
# not close its side after the last word, takes no part of its report, or is deaf.  A stall of the
# daemon does not count: nobody was silent while it did not listen.

MOST_UNREAD = 256 * 1024  # bytes that may wait for a slow reader
MOST_READ = 4096  # bytes, at once
PATIENCE = 10  # s
PIECES, LARGEST = 300, 256 * 1024  # of a report in one turn of the loop, pieces and bytes
NO_PIECES: "Iterator[str]" = iter(())
NO_CALLS: "Iterator[tuple]" = iter(())
NEVER_STORED = object()  # a batch for which one waits that is not to be read any more
MOST_IGNORED = 64  # readings of what nobody wants to know
ABORTS = struct.pack("ii", 1, 0)  # as SO_LINGER: what the client has not got is lost
LOCAL = "local"  # the peer on a UNIX socket
# Files that are not for clients: listeners, log, state, etcd; half of them to refuse clients.
RESERVE = 32


class Connections:
    """All that are open, and what they share.

    `most` is the limit of clients, or None: as many as the process may have files.
    Raises CannotServe where TLS is configured and cannot be had.
    """

    def __init__(self, loop: "Loop", log: "Log", settings: "Settings", most: "int | None"):
        files = most_files()
        if most is None:
            most = max(1, files - RESERVE)
        self.loop = loop
        self.log = log
        self.most = most
        self._most_open = max(1, files - RESERVE // 2)
        self.keepalive = [settings[f"TcpKeepalive{name}"] for name in ("Time", "Intvl", "Probes")]
        self.tls = serving_context(settings)
        self.users = Users(loop)
        self.open: "set" = set()
        self.silent = Silent(loop)
        self.reports = Reporting(loop)
        self.calls: "Dict[str, Callable]" = {}
        self.gone: "Callable[[Connection], object]"

    def __len__(self):
        return len(self.open)

    def serve(self, calls: "Dict[str, Callable]",
              gone: "Callable[[Connection], object]") -> "None":
        """Before the first client comes.  calls[name](connection, detail) does what a session
        wants, see Session.calls(); gone(connection) is called when a connection has ended."""
        self.calls = calls
        self.gone = gone

    def welcome(self, accepted: "socket.socket", peer: "str") -> "None":
        """A client has connected.  Raises OSError where it has gone already."""
        if peer != LOCAL:
            tune(accepted, *self.keepalive)
            self._limit_silence(accepted)
        if self.tls:
            connection: "Connection" = TlsConnection(self, accepted, peer)
        else:
            connection = Connection(self, accepted, peer)
        connection.surplus = len(self.open) >= self.most
        try:
            self.loop.watch(connection.socket, connection.handle, connection.close)
        except OSError as error:
            self.log.limited(f"{peer}: cannot be watched: {error.strerror}; connection closed")
            connection.socket.close()
            return
        self.open.add(connection)
        self.silent.expect(connection)

    def _limit_silence(self, accepted):
        """While something was sent and has not arrived no keepalive is sent: Linux would try for a
        quarter of an hour to send a grant to a host that has gone, which holds the lock then."""
        idle, interval, probes = self.keepalive
        with contextlib.suppress(AttributeError, OSError, OverflowError):
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT,
                                (idle + interval * probes) * 1000)

    def has_room(self) -> "bool":
        """Whether another client can be accepted, and be it to refuse it.  What the daemon opens
        itself, as a connection to etcd, must not fail since strangers have come in a crowd."""
        return len(self.open) < self._most_open

    def refuses(self, connection: "Connection") -> "bool":
        """Whether the connection is still beyond the limit."""
        if connection.surplus and len(self.open) <= self.most:
            connection.surplus = False
        return connection.surplus

    def closed(self, connection: "Connection") -> "None":
        """A connection has ended."""
        self.silent.forget(connection)
        self.open.discard(connection)
        self.gone(connection)

    def ignore(self) -> "None":
        """Nothing of any client is read from now on, and nobody is closed."""
        self.silent.stop()
        self.reports.stop()
        for connection in self.open:
            connection.batch = NEVER_STORED

    def end_in_order(self) -> "None":
        """Every client sees an end of file."""
        for connection in list(self.open):
            connection.end_in_order()
        self.open.clear()

    def abandon(self) -> "None":
        """Every connection is reset."""
        self.ignore()
        self.users.close()
        for connection in list(self.open):
            connection.abandon()
        self.open.clear()


class Silent:
    """The connections whose clients must say or take something within PATIENCE s.  All have the
    same time, so those that came first are the first to be closed: one date serves them all."""

    def __init__(self, loop: "Loop"):
        self._loop = loop
        # connection: s, monotonic, in this order; not empty, it has a date in the loop
        self._until: "OrderedDict[Connection, float]" = collections.OrderedDict()

    def expect(self, connection: "Connection") -> "None":
        """The client must say its first message, read on, or close its side, from now on."""
        until = self._loop.now.mono + PATIENCE
        if not self._until:
            self._loop.within(PATIENCE, self._close)
        self._until.pop(connection, None)
        self._until[connection] = until

    def forget(self, connection: "Connection") -> "None":
        """The client has done so, or has gone."""
        self._until.pop(connection, None)

    def stop(self) -> "None":
        """Nobody is closed any more."""
        self._loop.drop(self._close)

    def _close(self):
        """Closes those whose time is over."""
        now = self._loop.now.mono
        until = self._loop.running_since + PATIENCE
        while now >= until and self._until:
            connection, until = next(iter(self._until.items()))
            if now >= until:
                del self._until[connection]
                self._loop.guarded(nothing, connection.close, "silent", TIMED_OUT)
        if self._until:
            self._loop.at(until, self._close)


class Reporting:
    """The reports that are being sent.  They take turns, and each turn of the loop sends a portion
    of one: so however many are asked for, the other clients are served between two portions."""

    def __init__(self, loop: "Loop"):
        self._loop = loop
        self._waiting: "Deque[Connection]" = collections.deque()

    def wait_for_turn(self, connection: "Connection") -> "None":
        """The connection has sent what it had; it will be called for the next portion."""
        self._waiting.append(connection)
        self._loop.within(0, self._next)

    def stop(self) -> "None":
        """Nothing more of any report is sent."""
        self._loop.drop(self._next)

    def _next(self):
        connection = self._waiting.popleft()
        if self._waiting:
            self._loop.after(0, self._next)
        self._loop.guarded(connection.close, connection.send_portion)


def bare_address(host: "str") -> "str":
    """An address without what the system may or may not write with it: an IPv4 address as one of
    IPv6, or the interface of a local one."""
    address, _, _ = host.partition("%")
    return address.replace("::ffff:", "")


class Connection:
    """One client."""
    __slots__ = ("connections", "socket", "is_open", "peer", "session", "certified", "surplus",
                 "closing", "output", "batch", "end", "_wanted", "_is_paused", "_pieces",
                 "_is_reporting", "_is_writing", "_is_deaf", "_failed", "_credentials")
    would_block: "tuple" = WOULD_BLOCK

    def __init__(self, connections: "Connections", accepted: "socket.socket", peer: "str"):
        self.connections = connections
        self.socket: "Any" = accepted  # a socket, in TlsConnection one of ssl
        self.is_open = True
        self.peer = peer
        self.session = Session(self, peer, connections.users.name)
        self.certified: "str | None" = None  # the one common name in the peer's certificate
        self.surplus = False
        self.closing = False
        self.output: "bytes | memoryview" = b""  # what the client has not taken yet
        self.batch: "object | None" = None  # until it is stored nothing is read
        self.end = RESET  # how it has ended, when it has, in a word of RELEASES
        self._wanted = NO_CALLS  # what the client has said, and was not done yet
        self._is_paused = False  # the loop does not watch it
        self._pieces: "Iterator[str]" = NO_PIECES  # of a report, that follow the output
        self._is_reporting = False
        self._is_writing = False  # the loop tells when it can be written
        self._is_deaf = False  # nothing can be sent any more
        self._failed = False  # the system has told, once, that the connection is broken
        self._credentials: "tuple | None" = None  # not asked for yet

    # Reading.

    def handle(self, events: "int") -> "None":
        """What the loop has seen."""
        if events & EVENT_WRITE:
            self._go_on_writing()
        if not events & EVENT_READ or not self.is_open:
            return
        if self.batch is not None:
            self._pause()
            return
        self._read()
        if self.batch is None:
            self._read_end()

    def _read_end(self):
        """After an unlock the end of the connection is likely to be there."""
        if self.session.state is FREE and self.is_open and not self.closing:
            self._read()

    def _pause(self):
        """Does not read what has come, of which the loop would tell again and again."""
        self.connections.loop.forget(self.socket)
        self._is_paused = True

    def has_gone(self) -> "bool":
        """Whether the client has ended its side, and has said nothing before that is not read."""
        try:
            return socket.socket.recv(self.socket, 1, socket.MSG_PEEK) == b""  # no step of TLS
        except WOULD_BLOCK:
            return False
        except OSError:
            return True

    def is_held_up(self) -> "bool":
        """Whether something is left to be done when its batch is stored, see resume()."""
        if not self.is_open or self._is_paused or self._wanted is not NO_CALLS:
            return True
        return self.session.state is FREE

    def resume(self) -> "None":
        """The batch is stored, and what waited for it was said: goes on reading, or closes."""
        if self.batch is not None:
            return  # something else was decided meanwhile
        if not self.is_open:
            self._close_socket()
            return
        if self._is_paused:
            self._watch_again()
        if self._wanted is not NO_CALLS:
            wanted, self._wanted = self._wanted, NO_CALLS
            if self.is_open and not self.closing:
                self._do(wanted)
        if self.batch is None:
            self._read_end()

    def _watch_again(self):
        try:
            self.connections.loop.watch(self.socket, self.handle, self.close)
        except OSError as error:
            self.close(f"cannot be watched: {error.strerror}")
            return
        self._is_paused = False
        if self._is_writing:
            self._watch_writing(True)

    def _read(self):
        """Reads once, and does what the client wants; the end of the connection is its end."""
        try:
            data = self.socket.recv(MOST_READ)
        except self.would_block:
            return
        except OSError as error:
            end = RESET
            if isinstance(error, TimeoutError):
                end = TIMED_OUT
            self.close(end=end)
            return
        if not data:
            self._reach_end()
        if not data or self.closing:
            return
        self._do(self.session.calls(data))

    def _reach_end(self):
        """Nothing is left to be read.  Of a broken connection the system says the same, when it
        has told of that already."""
        if self._failed:
            self.close(end=RESET)
        else:
            self.close(end=END_OF_FILE)

    def _do(self, wanted):
        """Does what the client wants; the rest of it later, as soon as it waits for a batch."""
        connections = self.connections
        calls = connections.calls
        try:
            for call, detail in wanted:
                connections.silent.forget(self)
                calls[call](self, detail)
                if self.closing or not self.is_open:
                    return
                if self.batch is not None:
                    if self.session.has_more:
                        self._wanted = wanted
                    return
        except ProtocolError as error:
            self.close(str(error), BROKEN)

    # Writing.

    def tell(self, decision: "Decision") -> "None":
        """Tells the client of a decision about its request, or closes where it must not know."""
        if not self.is_open:
            return
        verdict = decision.verdict
        if not self.session.can_be_told(verdict):
            self.close()
        elif self.closing:
            if verdict == OK and self.session.holds is None:  # it would not know that it holds it
                self.close()
        else:
            answer = self.session.answer(decision)
            self.send(answer)
            if verdict in FINAL:
                self.finish()

    def send(self, data: "bytes") -> "None":
        """Sends now what the client takes now, the rest when it can take more."""
        if self._is_deaf:
            return
        if self.output:
            self.output = bytes(self.output) + data
        else:
            self.output = data
        if not self._is_writing:
            self._write()
        if len(self.output) > MOST_UNREAD:
            self.close("does not read", SLOW)

    def finish(self) -> "None":
        """Half-closes when everything is written."""
        if self.is_open and not self.closing:
            self.closing = True
            self.connections.silent.expect(self)
            self._write()

    def finish_with(self, pieces: "Iterator[str]") -> "None":
        """The same, after the pieces of a report, which are made when they can be sent."""
        if not self.closing:
            self._pieces = pieces
            self._is_reporting = True
            self.finish()

    def _go_on_writing(self):
        if self.closing:
            self.connections.silent.expect(self)  # it has taken a part of the report
        self._write()

    def _write(self):
        """Writes what can be written; afterwards the loop knows whether something is left."""
        try:
            while self.output:
                sent = self.socket.send(self.output)
                if sent == len(self.output):
                    self.output = b""
                else:
                    self.output = memoryview(self.output)[sent:]
        except self.would_block:
            pass
        except OSError as error:
            self._failed = not isinstance(error, BrokenPipeError)  # that one had ended before
            self._stop_sending()
            return
        is_left = bool(self.output)
        if is_left != self._is_writing:
            self._watch_writing(is_left)
        if self.closing and not is_left:
            self._go_on_closing()

    def _stop_sending(self):
        """Nothing can be sent any more, mostly since the client has gone.  What it said before
        counts all the same, as an unlock: it is read to its end."""
        self._is_deaf = True
        self.output = b""
        self._pieces = NO_PIECES
        self._is_reporting = False
        if self._is_writing:
            self._watch_writing(False)
        self.connections.silent.expect(self)
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_WR)  # that of ssl ends reading, too

    def _go_on_closing(self):
        """What there was is written: the report goes on, or there is nothing more to say."""
        if self._is_reporting:
            self.connections.reports.wait_for_turn(self)
        else:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)

    def send_portion(self) -> "None":
        """Sends the next pieces of the report, if there are any."""
        if not self.is_open:
            return
        pieces = self._next_pieces()
        if not pieces:
            self._is_reporting = False
        self.output = "".join(pieces).encode("ascii")
        self._write()

    def _next_pieces(self):
        pieces, size = [], 0
        for piece in itertools.islice(self._pieces, PIECES):
            pieces.append(piece)
            size += len(piece)
            if size >= LARGEST:
                break
        return pieces

    def _watch_writing(self, wanted):
        self._is_writing = wanted
        if self._is_paused:
            return  # until it is watched again
        try:
            self.connections.loop.watch_writing(self.socket, wanted)
        except OSError as error:
            self.close(f"cannot be watched: {error.strerror}")

    def close(self, reason: "str" = "", end: "str" = RESET) -> "None":
        """Ends the connection, for a reason to be logged; `end` is a word of RELEASES.  What it
        held goes on to others, or is kept for its client.  The client does not see the end before
        the end of its lock is stored."""
        if not self.is_open:
            return
        self.is_open = False
        self.end = end
        if reason:
            self.connections.log.limited(f"{self.peer}: {reason}; connection closed")
        self.connections.loop.forget(self.socket)
        try:
            self.connections.closed(self)
        finally:
            if self.batch is None:
                self._close_socket()

    def end_in_order(self) -> "None":
        """Ends the connection whatever the client has said: a system that has bytes which were not
        read would reset it.  Nobody is told of the end."""
        self._leave_loop()
        with contextlib.suppress(OSError):
            self.socket.send(self.output)
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_WR)
        with contextlib.suppress(OSError):
            for _ in range(MOST_IGNORED):
                if not socket.socket.recv(self.socket, MOST_READ):
                    break
        self._close_socket()

    def abandon(self) -> "None":
        """Resets the connection: what was sent and has not arrived is lost.  Nobody is told of the
        end."""
        self._leave_loop()
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORTS)
        self._close_socket()

    def _leave_loop(self):
        if self.is_open:
            self.is_open = False
            self.connections.loop.forget(self.socket)

    def _close_socket(self):
        try:
            self.socket.close()
        except OSError:
            pass  # it is gone in any case
        self.session.forget()

    # Who the client is.

    def host(self) -> "str":
        """The host of the peer, "" on a local socket."""
        return self.peer.rpartition(":")[0]

    def is_from_this_host(self) -> "bool":
        """Whether the peer, on a TCP socket, is on this host."""
        if not self.is_open:
            return False
        # not getpeername(): the system does not know the peer any more when it has reset it
        address = self.socket.getsockname()
        here = bare_address(address[0])
        there = bare_address(self.host().strip("[]"))
        if there.startswith("127."):
            return True
        return there in (here, "::1")

    def credentials(self) -> "tuple":
        """(pid, uid) of the peer on a local socket; None where the system does not tell."""
        found = self._credentials
        if found is None:
            found = (None, None)
            if self.is_open and self.peer == LOCAL:
                found = local_credentials(self.socket)
            self._credentials = found
        return found


# TLS.  The handshake is steps of the loop as everything else is; `ssl` is loaded only where it is
# configured.

TLS_ALERT = b"\x15\3\3\0\2\2\x46"  # fatal, protocol version


def serving_context(settings: "Settings"):
    """The TLS context of this daemon, None without TLS; raises CannotServe."""
    try:
        return tls_context(settings, server=True)
    except UsageError as error:
        raise CannotServe(str(error))


class TlsConnection(Connection):
    """One client behind TLS."""
    __slots__ = ("would_block", "_wants_write", "_is_shaking")

    def __init__(self, connections: "Connections", accepted: "socket.socket", peer: "str"):
        import ssl
        wrapped = secured(accepted, connections.tls, server_side=True)
        super().__init__(connections, wrapped, peer)
        self.would_block = ssl.SSLWantReadError, ssl.SSLWantWriteError
        self._wants_write = ssl.SSLWantWriteError
        self._is_shaking = True

    def handle(self, events: "int") -> "None":
        """What the loop has seen.  Each way of TLS may need the other one."""
        if self._is_shaking:
            self._shake_hands()
        if self._is_shaking:
            return
        super().handle(events | EVENT_READ)
        self._read_pending()

    def is_held_up(self) -> "bool":
        """As above; the loop does not know what TLS has read."""
        return True

    def resume(self) -> "None":
        """As above; what TLS has read already counts, too."""
        super().resume()
        self._read_pending()

    def _read_pending(self):
        """Reads what TLS has read, of which the loop does not know."""
        while self.is_open and self.batch is None and self.socket.pending():
            self._read()

    def _shake_hands(self):
        try:
            self.socket.do_handshake()
            self._is_shaking = False
            self.certified = common_name(self.socket.getpeercert())
        except self.would_block as error:
            self._watch_writing(isinstance(error, self._wants_write))
        except OSError as error:
            if getattr(error, "reason", "") == "WRONG_VERSION_NUMBER":
                self._answer_plain_text()
            self.close(f"no TLS: {error}")

    def _answer_plain_text(self):
        """A client without TLS is to know what is wrong."""
        with contextlib.suppress(OSError):
            socket.socket.recv(self.socket, MOST_READ)
            socket.socket.send(self.socket, TLS_ALERT)


# Processes that do for the loop what may take long.

def fork() -> "int":
    """os.fork(), without the warning that Python 3.12 and later give where there is a thread: a
    child may wait for a lock that the thread had.  The one thread that there may be (see Thread)
    shares no lock with this one, and runs Python as little as the child does while this one
    forks: it waits for the disk, or for its turn."""
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


class Child:
    """A process that calls act(); when it has ended hear(text) is called with what act() has
    returned, or "" where it came to no end.  Raises OSError."""

    def __init__(self, loop: "Loop", act: "Callable[[], str]", hear: "Callable[[str], object]"):
        self._loop = loop
        self._hear = hear
        reader, writer = os.pipe()
        self._pipe = open(reader, "rb", 0)
        try:
            self._pid = fork()
            if self._pid == 0:
                self._work(act, writer)
        except OSError:
            self._pipe.close()
            raise
        finally:
            os.close(writer)
        try:
            loop.watch(self._pipe, self._end_has_come, self.end)
        except OSError:
            self.end()
            raise

    @staticmethod
    def _work(act, writer):
        """The signals are its own again, and of the files of the daemon it keeps none: clients
        would wait for this process, too."""
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP,
                           signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            close_files(keep=writer)
            text = act().encode("utf-8", "replace")
            os.write(writer, text[:select.PIPE_BUF])
        finally:
            os._exit(0)

    def _end_has_come(self, events):
        text = self._pipe.read(select.PIPE_BUF)
        self.end()
        self._hear(text.decode("utf-8", "replace"))

    def end(self) -> "None":
        """Ends the process, if it runs yet, and waits for it.  Its pid may be another's then."""
        if self._pipe.closed:
            return
        self._loop.forget(self._pipe)
        self._pipe.close()
        with contextlib.suppress(OSError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


def close_files(keep: "int") -> "None":
    """Closes every descriptor but 0, 1, 2 and `keep`, which is greater."""
    try:
        last = max(map(int, os.listdir("/proc/self/fd")))
    except OSError:
        last = min(most_files(), 4096)
    os.closerange(3, keep)
    os.closerange(keep + 1, last + 1)


def most_files() -> "int":
    """The number of files that this process may open, raised as far as it can be."""
    try:
        import resource  # not in every minimal Python
    except ImportError:
        return 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft == resource.RLIM_INFINITY:
        return 10 ** 6
    return soft


# The names of the users who ask.

MOST_USERS = 1000  # whose names are kept
LOOK_UP, RENAMED = 10, 600  # s for one name; s after which it is asked for again


class Users:
    """The names of users by their uids.

    A directory (LDAP) may need seconds to tell one, or never answer, and the loop waits for
    nobody.  So a child asks it, one user at a time; meanwhile a user is shown by number.
    """

    def __init__(self, loop: "Loop"):
        self._loop = loop
        self._names: "OrderedDict" = collections.OrderedDict()  # uid: (name, when to ask again)
        self._wanted: "OrderedDict" = collections.OrderedDict()  # uids to ask for
        self._children: "List[Child]" = []  # the one that looks for a name
        for uid in {0, os.getuid()}:
            self._learn(uid, user_name(uid))

    def name(self, uid: "int") -> "str":
        """The name, or the number where it is not known yet, or there is none."""
        name, until = self._names.get(uid, (str(uid), 0))
        if until <= self._loop.now.mono and len(self._wanted) < MOST_USERS:
            self._wanted[uid] = None
            self._ask()
        return name

    def _learn(self, uid, name):
        self._names[uid] = name, self._loop.now.mono + RENAMED
        if len(self._names) > MOST_USERS:
            self._names.popitem(last=False)

    def _ask(self):
        """Starts a child for the next user, unless one is at work."""
        if self._children or not self._wanted:
            return
        uid, _ = self._wanted.popitem(last=False)
        try:
            child = Child(self._loop, functools.partial(self._look_up, uid),
                          functools.partial(self._hear, uid))
        except OSError:  # no file or process can be had now
            self._learn(uid, str(uid))
        else:
            self._children.append(child)

    @staticmethod
    def _look_up(uid):
        """In the child: the name; a directory that hangs ends it."""
        signal.alarm(LOOK_UP)
        return user_name(uid)

    def _hear(self, uid, name):
        self._children.clear()
        self._learn(uid, name or str(uid))
        self._ask()

    def close(self) -> "None":
        """Ends the child that is at work."""
        while self._children:
            self._children.pop().end()


# --- Listeners ----------------------------------------------------------------------------------
# The sockets on which clients arrive.
#
# The problem: of ten daemons started at once one must serve, and a daemon that was killed leaves
# its UNIX socket behind.  So a UNIX socket is guarded by an flock on SOCKET.lock (see State),
# taken before anything else and kept until the process ends: nine find it taken.  Whatever is at
# the path then is a leftover, or the socket of a daemon that does not know the lock (FLoM's).  A
# TCP address is guarded by its bind; a socket that an init system gives, by the init system.
#
# A listener is a way to the daemon.  All ways have a label, look() and close().

BACKLOG = socket.SOMAXCONN
BATCH = 64  # clients, or datagrams, that are taken at once
TIMES_IN_A_ROW = 4  # see Listener
LOOK = 2  # s between two looks at the paths of the daemon
FIRST_GIVEN = 3  # the first descriptor of LISTEN_FDS
FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)


def always() -> "bool":
    """There is room."""
    return True


class Accepting(socket.socket):
    """A socket whose accept() is fast.  That asks itself for family and type, to give them to the
    new socket, and Python would make an enum of each, which takes longer than all the rest."""
    family: "Any" = 0
    type: "Any" = 0

    def __init__(self, bound: "socket.socket"):
        family = int(bound.family)
        kind = int(bound.type)
        super().__init__(family, kind, bound.proto, fileno=bound.detach())
        self.family = family
        self.type = kind


class Listener:
    """A listening socket.  `label` is how the status report names it, `address` its address;
    welcome(socket, peer) is called for each client that arrives, as long as has_room().  Raises
    CannotServe."""

    def __init__(self, loop: "Loop", log: "Log", bound: "socket.socket", welcome,
                 has_room: "Callable[[], bool]" = always):
        self._loop, self._log = loop, log
        self._welcome = welcome
        self._has_room = has_room
        self.local = bound.family == socket.AF_UNIX
        self.address = bound.getsockname()
        self._at_once = 1  # clients that are accepted in one turn, at most
        self._in_a_row = 0  # turns in which as many have come
        if self.local:
            self.label = f"unix:{self.address}"
        else:
            self.label = f"tcp:{show_address(self.address)}"
        self._listen(bound)

    def _listen(self, bound):
        accepting = Accepting(bound)
        with serving(f"cannot listen on {self.label}", accepting):
            accepting.setblocking(False)
            accepting.listen(BACKLOG)
            self._loop.watch(accepting, self.handle)
        self._socket = accepting

    def handle(self, events: "int") -> "None":
        """Accepts those that have come, a batch at a time."""
        for came in range(self._at_once):
            if not self._has_room():
                self._log.limited("cannot accept clients: too many are connected; trying again")
                self._pause()
                return
            try:
                connection, address = self._socket.accept()
            except WOULD_BLOCK + (ConnectionError,):
                self._at_once = max(1, came)
                self._in_a_row = 0
                return
            except OSError as error:
                self._log.limited(f"cannot accept clients: {error.strerror}; trying again")
                self._pause()
                return
            connection.setblocking(False)
            peer = LOCAL if self.local else show_address(address)
            try:
                self._welcome(connection, peer)
            except OSError:
                pass  # it has gone already
        self._expect_more()

    def _expect_more(self):
        """As many have come as could be accepted at once.  To ask for one more, who is not there,
        takes as long as a tenth of all that is done for a client.  So more are accepted at once
        only when that has happened several times in a row: else the loop tells of the next."""
        self._in_a_row += 1
        if self._in_a_row == TIMES_IN_A_ROW:
            self._in_a_row = 0
            self._at_once = min(2 * self._at_once, BATCH)

    def _pause(self):
        """Does not accept for PAUSE s: a client that cannot be accepted stays in the backlog, and
        would wake the loop again and again."""
        self._loop.forget(self._socket)
        self._loop.after(PAUSE, self._resume)

    def _resume(self):
        """Accepts again; tries again later where even that fails."""
        try:
            self._loop.watch(self._socket, self.handle)
        except OSError:
            self._loop.after(PAUSE, self._resume)

    def look(self) -> "None":
        """Nobody can take an address, or a socket that was given, away."""

    def close(self) -> "None":
        """Stops listening."""
        self._loop.cancel(self._resume)
        self._loop.forget(self._socket)
        self._socket.close()


class TermListener(Listener):
    """The address of a daemon of a quorum, which listens only while it leads.  It has the address
    from its start to its end, so nobody else can serve there meanwhile: a socket that is bound and
    does not listen refuses clients, and keeps others away as long as SO_REUSEADDR is not set.
    That is set again before it listens: of its former clients the system remembers the port for a
    minute, and would not let it."""

    def _listen(self, bound):
        """Not yet."""
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        self._socket = Accepting(bound)
        self._socket.setblocking(False)

    def begin(self, welcome: "Callable", has_room: "Callable[[], bool]" = always) -> "None":
        """Listens; welcome(socket, peer) is called for each client that arrives, as long as
        has_room().  Raises CannotServe."""
        self._welcome = welcome
        self._has_room = has_room
        with serving(f"cannot listen on {self.label}"):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.listen(BACKLOG)
            self._loop.watch(self._socket, self.handle)

    def close(self) -> "None":
        """Stops listening, and keeps the address.  Who has not been accepted is reset."""
        self._loop.cancel(self._resume)
        self._loop.forget(self._socket)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # another system than Linux: it must let the address go for an instant
            self._bind_anew()

    def _bind_anew(self):
        bound = socket.socket(self._socket.family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.close()
        with serving(f"cannot keep {self.label}", bound):
            bound.bind(self.address)
        self._listen(bound)

    def leave(self) -> "None":
        """Lets the address go, for ever."""
        self._socket.close()


class LocalListener(Listener):
    """A UNIX socket of the daemon's own.  A cleaner of /tmp may remove it, and another daemon may
    then be at its path: look() is called every LOOK s.  `mode` is its permissions, `guard` the
    State with its lock; drain(reason) is called when another daemon serves at the path."""

    def __init__(self, loop: "Loop", log: "Log", path: "str", mode: "int", guard: "State", welcome,
                 has_room, drain):
        self._path, self._mode = path, mode
        self._guard = guard
        self._drain = drain
        super().__init__(loop, log, unix_socket(path, mode), welcome, has_room)
        self._identity = identity(path)

    def look(self) -> "None":
        """Binds the path anew when it is lost, or drains when another daemon listens there."""
        if identity(self._path) == self._identity:
            return
        if listens(self._path):
            self._drain(f"another daemon serves {self._path}")
        elif self._guard.look():
            self._bind_anew()

    def _bind_anew(self):
        try:
            bound = unix_socket(self._path, self._mode)
        except CannotServe as error:
            self._log.seldom(f"{self._path} was removed; {error}")
            return
        self._log.error(f"{self._path} was removed; it was made anew")
        self._at_once = BACKLOG  # who had connected to the old one is a client like any other
        self.handle(EVENT_READ)
        super().close()
        self._listen(bound)
        self._identity = identity(self._path)

    def close(self) -> "None":
        """Stops listening; removes the path if it still leads to this socket."""
        super().close()
        if identity(self._path) == self._identity:
            with contextlib.suppress(OSError):
                os.unlink(self._path)


def listens(path: "str") -> "bool":
    """Whether somebody listens on the UNIX socket at the path."""
    return _connect(path) in (0, errno.EAGAIN)


def _connect(path):
    """The error number of a connection to the path, 0 when there is none."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path)


def unix_socket(path: "str", mode: "int") -> "socket.socket":
    """A bound UNIX socket at `path` with these permissions; its lock must be held already.  Raises
    CannotServe."""
    with serving(f"cannot use {path}"):
        _remove_stale(path)
    bound = socket.socket(socket.AF_UNIX)
    with serving(f"cannot create the socket {path}", bound), creating(mode):
        bound.bind(path)
    return bound


def _remove_stale(path):
    """Removes a socket on which nobody listens.  Anything else at the path stays, and bind()
    fails.  Raises CannotServe when another daemon listens there, or the socket cannot be removed;
    OSError when it cannot be looked at."""
    if listens(path):
        raise CannotServe(f"another daemon serves {path}")
    if _connect(path) != errno.ECONNREFUSED:
        return
    found = os.lstat(path)
    if not stat.S_ISSOCK(found.st_mode):
        return
    try:
        os.unlink(path)
    except OSError as error:
        # the owner's name is looked up only here, since LDAP may be slow to tell it
        raise CannotServe(f"cannot remove the stale socket {path} of {user_name(found.st_uid)}: "
                          f"{error.strerror}")


def tcp_socket(host: "str", port: "int", interface: "str | None") -> "socket.socket":
    """A listening TCP socket, see bound_socket().  Raises CannotServe."""
    bound = bound_socket(host, port, interface)
    with serving(f"cannot listen on {host} port {port}", bound):
        bound.listen(BACKLOG)
    return bound


def bound_socket(host: "str", port: "int", interface: "str | None") -> "socket.socket":
    """A bound TCP socket at host and port (0: any port); a link-local address is that of the
    interface.  Raises CannotServe."""
    failure = f"cannot listen on {host} port {port}"
    with serving(failure):
        found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)
        family, kind, _, _, address = found[0]
        if family == socket.AF_INET6 and interface:
            address = _on_interface(address, interface)
        bound = socket.socket(family, kind)
    with serving(failure, bound):
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    return bound


def _on_interface(address, interface):
    """An IPv6 address with the number of the interface, unless it has one."""
    host, port, flow, scope = address
    if not scope:
        scope = socket.if_nametoindex(interface)
    return host, port, flow, scope


def has_inherited_sockets() -> "bool":
    """Whether an init system hands sockets over to this process."""
    return os.environ.get("LISTEN_PID") == str(os.getpid())


def inherited_sockets():
    """Yields the listening sockets that an init system hands over (sd_listen_fds(3)), if any.
    Raises CannotServe for a descriptor that is no listening socket."""
    if not has_inherited_sockets():
        return
    count = os.environ.get("LISTEN_FDS", "")
    if not re.fullmatch("[0-9]{1,4}", count, re.ASCII):
        raise CannotServe(f"LISTEN_FDS: {count!r} is not a number of sockets")
    for number in range(FIRST_GIVEN, FIRST_GIVEN + int(count)):
        yield _given_socket(number)


def _given_socket(number):
    failure = f"LISTEN_FDS: cannot listen on descriptor {number}"
    with serving(failure):
        given = socket.socket(fileno=number)
    with serving(failure, given):  # Python 3.6 takes every socket for one of AF_INET
        family = _option(given, socket.SO_DOMAIN)
        kind = _option(given, socket.SO_TYPE)
    if family not in FAMILIES or kind != socket.SOCK_STREAM:
        given.close()
        raise CannotServe(f"{failure}: it is no UNIX or TCP stream socket")
    return socket.socket(family, kind, fileno=given.detach())


def _option(given, name):
    return given.getsockopt(socket.SOL_SOCKET, name)


# --- Discovery and election ---------------------------------------------------------------------
# The multicast group.  A daemon answers the questions of clients, and sees to it that it is alone.
#
# Words.  A question asks the group for a daemon, an answer says where one listens.  A candidate is
# a daemon that does not serve yet, a rival another candidate.  The pair of a daemon is (start time
# in ms, id): an order and no seniority, it only makes all candidates agree.
#
# The election.  The problem: several daemons of one group may start at once, and one must serve.
# So a daemon is a candidate first: it asks four times over 400 ms, naming itself by its pair.  A
# daemon that serves answers, and the candidate steps back.  A rival hears the question: the one
# with the lower pair stays, and repeats its own question at once so that the other hears it.  That
# one asks on for a second, and steps back when it is answered.  The lower one may have ended
# instead, or be a forged datagram, so without an answer it goes on without regard to it.
#
# A parted network.  Datagrams get lost and networks are parted, so two daemons may be elected.  So
# the winner goes on asking, first often, then every 5 s.  When another daemon answers, a child
# connects to the address announced and asks for that daemon's id: a forged datagram has no effect.
# Then the daemon with the greater pair drains: it answers no more, takes no new requests, sends
# its waiters away (who find the other daemon), and ends when its holders have finished.  A daemon
# whose answers carry no id is FLoM's, which cannot drain: ours does.
#
# A quorum (see there) has no election here: etcd decides who serves, whatever becomes of
# datagrams.  All of its daemons answer, with the address of the one that leads, and say that they
# are a quorum.  A daemon without one that meets them drains whatever the order; both say so in
# their logs, since somebody has started what should not be there.  They ask, too, but only to find
# such a daemon, or another quorum that was given the same group.
#
# Not here on purpose: to agree on one daemon while the network is parted.

CANDIDACY, QUESTIONS = 0.4, 4  # s, and questions in that time
BETWEEN = CANDIDACY / QUESTIONS  # s from one question to the next
DEFEAT = 1  # s in which a candidate that has won must be found to serve
DEFEATS = 3  # rivals that a candidate waits for; after that it is a flood
SOON = (0.5, 0.5, 1)  # s between the winner's first questions
OFTEN = 5  # s between questions from then on, a fifth more or less
PROBE_PAUSE = 0.3  # s from one look at another daemon to the next, at least
LONGEST_PROBE = 30  # s that one look may take
QUESTION, ANSWER = 8, 16  # steps of the protocol
LONGEST_QUESTION = 2048  # bytes of a datagram
LONGEST_START = 8192  # bytes of a report until it has said whose it is
WILDCARDS = ("0.0.0.0", "::")  # addresses that are none of a host
# By family: level; names there: of all groups (Linux; Python has none), join; its form.
MULTICAST: "Dict[int, Tuple[int, int, int, str]]" = {
    socket.AF_INET: (socket.IPPROTO_IP, 49, socket.IP_ADD_MEMBERSHIP, "@4xi"),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 29, socket.IPV6_JOIN_GROUP, "@I")}

# A message of another daemon or client.  `pair` is None when it is not one of ours; `network` has
# the attributes address and port of an answer; `sender` is an address as the socket tells it;
# `quorum`: its sender says that it is one of a quorum.
Heard = collections.namedtuple("Heard", "pair network sender quorum")
FOR_ALL = 0  # `started` in the answers of a quorum: older than any daemon


class Group:
    """The sockets of a multicast group.  `pair` is that of this daemon.  Raises CannotServe.

    One socket hears the group's questions.  The other asks and hears the answers: never from the
    group's port, since a FLoM daemon there ends on an answer.
    """

    def __init__(self, settings: "Settings", pair: "tuple[int, str]"):
        self.settings, self.pair = settings, pair
        self.port = settings["MulticastPort"]
        failure = f"cannot join {settings['MulticastAddress']} port {self.port}"
        with serving(failure):
            self._resolve()
        self.listening = socket.socket(self.family, socket.SOCK_DGRAM)
        self.asking = socket.socket(self.family, socket.SOCK_DGRAM)
        self.listening.setblocking(False)
        self.asking.setblocking(False)
        with serving(failure, self.listening, self.asking):
            aim(self.asking, settings["DiscoveryTTL"], self._interface)
            self._bind()
            self._join()
        self.label = f"udp:{self.address[0]}:{self.port}"

    def _resolve(self):
        """Finds the group's family and address, and the number of the interface (0: any)."""
        host, interface = self.settings["MulticastAddress"], self.settings["NetworkInterface"]
        self._interface = 0
        if interface:
            self._interface = socket.if_nametoindex(interface)
        found: "Any" = socket.getaddrinfo(host, self.port, 0, socket.SOCK_DGRAM)
        family, _, _, _, address = found[0]
        if family == socket.AF_INET6:
            host, port, flow, scope = address
            self._interface = self._interface or scope
            address = host, port, flow, self._interface
        self.family, self.address = family, address

    def _bind(self):
        level, of_all, _, _ = MULTICAST[self.family]
        set_option = self.listening.setsockopt
        set_option(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # or it hears every group on this port
            set_option(level, of_all, 0)
        if self.family == socket.AF_INET6:
            set_option(level, socket.IPV6_V6ONLY, 1)
        self.listening.bind(("", self.port))

    def _join(self):
        """Joins on the interface asked for, else on all; raises OSError when none takes part."""
        level, _, join, form = MULTICAST[self.family]
        group = socket.inet_pton(self.family, self.address[0].split("%")[0])
        joined, failure = False, OSError()
        for interface in self._interfaces():
            try:
                self.listening.setsockopt(level, join, group + struct.pack(form, interface))
                joined = True
            except OSError as error:
                failure = error
        if not joined:
            raise failure

    def _interfaces(self):
        if self._interface:
            return [self._interface]
        return [0] + [number for number, _ in socket.if_nameindex()]

    def any_address(self) -> "str":
        """The address of all interfaces, in the family of the group."""
        if self.family == socket.AF_INET6:
            return "::"
        return "0.0.0.0"

    def ask(self, **more: "object") -> "None":
        """Sends one question to the group, with more attributes; a network that is down is asked
        again later."""
        started, ident = self.pair
        question = encode(DISCOVER, QUESTION, daemon=ident, started=started, **more)
        with contextlib.suppress(OSError):
            self.asking.sendto(question, self.address)

    def answer(self, question: "Heard", network: "str") -> "None":
        """Answers one question; `network` is the element that says where this daemon listens."""
        data = encode(DISCOVER, ANSWER, network)
        if question.pair is not None:
            started, ident = self.pair
            data = encode(DISCOVER, ANSWER, network, daemon=ident, started=started)
        self._send(data, question)

    def answer_for(self, question: "Heard", record: "Record") -> "None":
        """Answers one question for the leader of a quorum."""
        host, port = address_in(record)
        network = element("network", ("address", host), ("port", port))
        data = encode(DISCOVER, ANSWER, network, daemon=record.daemon, started=FOR_ALL, quorum=1)
        self._send(data, question)

    def _send(self, data, question):
        with contextlib.suppress(OSError):
            self.listening.sendto(data, question.sender)

    def questions(self):
        """Yields what others have asked, as Heard; a batch, since a flood has no end."""
        return self._heard(self.listening, QUESTION)

    def answers(self):
        """Yields the answers of others to this daemon's questions, as Heard; a batch, too."""
        return self._heard(self.asking, ANSWER)

    def _heard(self, source, step):
        for _ in range(BATCH):
            try:
                data, sender = source.recvfrom(LONGEST_QUESTION)
                elements = decode(data)
            except WOULD_BLOCK:
                return
            except (OSError, ProtocolError):
                continue  # OSError: ICMP's, for something sent before
            head = elements["msg"]
            if (head["verb"], head["step"]) != (DISCOVER, step):
                continue
            if head.get("daemon") == self.pair[1]:
                continue  # its own id is never another daemon's
            is_quorum = head.get("quorum") == "1"
            yield Heard(_pair_of(head), elements.get("network", {}), sender, is_quorum)

    def leave(self) -> "None":
        """Closes the sockets."""
        self.listening.close()
        self.asking.close()


def _pair_of(head):
    """The pair of the daemon that has sent a message, None when it names none."""
    if "started" in head and "daemon" in head:
        return head["started"], head["daemon"]
    return None


# The election.  It blocks: nobody is served yet.

def elect(group: "Group") -> "None":
    """Returns when this daemon is to serve the group, raises SteppedBack when another does."""
    passed_over: "set" = set()  # rivals that have won and did not serve
    while len(passed_over) < DEFEATS:
        winner = _stand(group, passed_over)
        if winner is None:
            return
        passed_over.add(_wait_for(group, winner))
    for _ in range(QUESTIONS):
        look_for_another(group)


def _stand(group, passed_over):
    """Asks as a candidate; returns the first rival with a lower pair, None when none has."""
    for _ in range(QUESTIONS):
        for rival in _rivals(group):
            if rival < group.pair and rival not in passed_over:
                return rival
            group.ask()  # it may not have heard of this one yet
    return None


def _wait_for(group, winner):
    """Gives a candidate that has won the time to serve; returns the lowest one heard of."""
    for _ in range(round(DEFEAT / BETWEEN)):
        winner = min([winner, *_rivals(group)])
    return winner


def look_for_another(group: "Group") -> "None":
    """Asks once, and raises SteppedBack when a daemon that serves the group answers."""
    for _ in _rivals(group):
        pass


def _rivals(group):
    """Asks once and yields, for BETWEEN s, the pairs of candidates that ask, too.  Raises
    SteppedBack when a daemon that serves answers."""
    group.ask()
    until = time.monotonic() + BETWEEN
    left = BETWEEN
    while left > 0:
        select.select([group.listening, group.asking], [], [], left)
        if list(group.answers()):
            raise SteppedBack("another daemon serves the group")
        rivals = {question.pair for question in group.questions()}
        yield from rivals - {None}
        left = until - time.monotonic()


class Member:
    """This daemon while it serves the group: a way to it, see Listeners.  `address` is that of the
    socket on which it listens; drain(reason) is called when another daemon is to serve."""

    def __init__(self, loop: "Loop", log: "Log", group: "Group", address: "tuple",
                 drain: "Callable[[str], object]"):
        self._loop, self._log = loop, log
        self._group = group
        self._drain = drain
        host, port = _announced(address)
        self._network = element("network", ("address", host), ("port", port))
        self._probe: "Child | None" = None  # which looks for another daemon
        self._next_probe = 0.0  # s, monotonic: when another one may
        self._pauses = iter(SOON)
        self.label = group.label
        loop.after(next(self._pauses), self._ask_again)
        loop.watch(group.listening, self._hear_questions)
        loop.watch(group.asking, self._hear_answers)

    def _ask_again(self):
        import random
        self._group.ask()
        pause = next(self._pauses, OFTEN * random.uniform(0.8, 1.2))
        self._loop.after(pause, self._ask_again)

    def _hear_questions(self, events):
        """Answers the questions that have come."""
        for question in self._group.questions():
            if question.sender[1] != self._group.port:
                self._group.answer(question, self._network)

    def _hear_answers(self, events):
        """Looks for other daemons in the answers to this one's own questions."""
        for answer in self._group.answers():
            if "port" not in answer.network:
                continue
            host, port = _address_in(answer)
            who = "a quorum" if answer.quorum else "another daemon"
            self._log.seldom(f"{who} answers for the group: {host!r} port {port}")
            if answer.pair is None or answer.pair < self._group.pair:
                self._verify(answer)

    def _verify(self, answer):
        """Has a child look whether the other daemon is there, unless one is at work, or has just
        been: anybody can send answers, and a child costs more than a datagram."""
        now = self._loop.now.mono
        if self._probe is not None or now < self._next_probe:
            return
        self._next_probe = now + PROBE_PAUSE
        act = functools.partial(_is_there, self._group.settings, answer)
        hear = functools.partial(self._verified, answer)
        with contextlib.suppress(OSError):  # the other daemon will answer again
            self._probe = Child(self._loop, act, hear)

    def _verified(self, answer, found):
        self._probe = None
        if found and answer.quorum:
            self._drain("a quorum serves the group")
        elif found:
            self._drain("another daemon serves the group")

    def look(self) -> "None":
        """Nobody can take a group away."""

    def close(self) -> "None":
        """Leaves the group: no more answers, no more questions."""
        loop, group = self._loop, self._group
        loop.cancel(self._ask_again)
        loop.forget(group.listening)
        loop.forget(group.asking)
        group.leave()
        if self._probe is not None:
            self._probe.end()


class QuorumMember:
    """A daemon of a quorum in its group.  record() returns the leader record, None while there is
    no leader that is known."""

    def __init__(self, loop: "Loop", log: "Log", group: "Group",
                 record: "Callable[[], Record | None]"):
        self._loop, self._log = loop, log
        self._group = group
        self._record = record
        self._other = ""  # the address of another leader, of which the last answer told
        self.label = group.label
        loop.watch(group.listening, self._hear_questions)
        loop.watch(group.asking, self._hear_answers)
        self._ask_again()

    def _ask_again(self):
        import random
        self._group.ask(quorum=1)
        self._loop.after(OFTEN * random.uniform(0.8, 1.2), self._ask_again)

    def _hear_questions(self, events):
        """Answers the questions that have come."""
        for question in self._group.questions():
            if question.pair is not None and not question.quorum:
                self._log.seldom("a daemon without quorum is in the group, on "
                                 f"{question.sender[0]}")
            record = self._record()
            if record is not None and question.sender[1] != self._group.port:
                self._group.answer_for(question, record)

    def _hear_answers(self, events):
        """Looks for others that serve the group."""
        for answer in self._group.answers():
            if "port" not in answer.network:
                continue
            host, port = _address_in(answer)
            if answer.quorum:
                self._compare(f"{host} port {port}")
            else:
                self._log.seldom(f"a daemon without quorum answers for the group: {host!r} port "
                                 f"{port}")

    def _compare(self, theirs):
        """Daemons of one quorum tell of the same leader, but for the moment of a change."""
        record = self._record()
        if record is None:
            return
        host, port = address_in(record)
        ours = f"{host} port {port}"
        if theirs == ours:
            return
        if theirs == self._other:
            self._log.seldom(f"another quorum serves the group: its leader is at {theirs}, that "
                             f"of this one at {ours}")
        self._other = theirs

    def close(self) -> "None":
        """Leaves the group."""
        self._loop.cancel(self._ask_again)
        self._loop.forget(self._group.listening)
        self._loop.forget(self._group.asking)
        self._group.leave()


def address_in(record: "Record") -> "Tuple[str, int]":
    """(host, port) of a leader; the host without the interface of an IPv6 address."""
    host, _, port = record.address.rpartition(":")
    host, _, _ = host.strip("[]").partition("%")
    return host, int(port)


def _announced(address):
    """(host, port) that answers name; host is "" where whoever asks takes the answer's sender."""
    host, port = address[:2]
    host, _, _ = host.partition("%")
    if host in WILDCARDS:
        host = ""
    return host, port


def _address_in(answer):
    """(host, port) at which a daemon says that it listens."""
    host = answer.network.get("address") or answer.sender[0]
    return host, answer.network["port"]


def _is_there(settings, answer):
    """In a child: "yes" when the daemon that has answered is where it says.  One that speaks a
    byte now and then would keep the child for ever, and no other daemon would be looked for."""
    signal.alarm(LONGEST_PROBE)
    host, port = _address_in(answer)
    if len(answer.sender) == 4 and ":" in host:
        scope = answer.sender[3]
        if scope:  # link-local: on this interface
            host = f"{host.split('%')[0]}%{scope}"
    context = tls_context(settings)
    checks_ids = context is not None and settings["TlsCheckPeerId"]
    expected = None  # FLoM's has no id
    if answer.pair is not None:
        expected = answer.pair[1]
    found = daemon_at((host, port), context, checks_ids)
    return "yes" if found == expected else ""


def daemon_at(address: "tuple[str, int]", context, checks_ids: "bool" = False) -> "str | None":
    """The id of the daemon at a TCP address, None when it is FLoM's; it asks as a client would,
    and blocks.  Raises OSError or LookupError when there is no lock daemon, or, with `checks_ids`,
    one whose certificate is not that of the id it presents."""
    host, port = address
    # anybody may have announced it: no name is looked up for a stranger
    socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)
    asking: "Any" = socket.create_connection(address, PATIENCE)
    if context is not None:
        asking = secured(asking, context)
    with asking:
        if context is not None:
            asking.do_handshake()
        asking.sendall(status_request("flomd.py"))
        presented = _read_session(asking)
        if checks_ids and not _is_named(asking, presented.get("peerid")):
            raise LookupError("its certificate is not that of its id")
    return presented.get("daemon")


def _read_session(connection):
    """The attributes of the element session in the answer; raises LookupError without one."""
    answer = b""
    until = time.monotonic() + PATIENCE
    while len(answer) <= LONGEST_START and time.monotonic() <= until:
        data = connection.recv(4096)
        if not data:
            break
        answer += data
        found = re.search("<session[^>]*>", answer.decode("ascii", "replace"))
        if found:
            return dict(re.findall(' ([a-z]+)="([^"]*)"', found.group()))
    raise LookupError("no lock daemon")


def _is_named(connection, peer_id):
    """Whether the certificate of a TLS peer has one common name, the id that it presents."""
    name = common_name(connection.getpeercert())
    return bool(name) and name == peer_id


# --- Server -------------------------------------------------------------------------------------
# What the daemon does for its clients.  It knows the lock table and, of each client, an object
# that can be told something: a Connection.  It knows no descriptor.
#
# The way of a request.  From the bytes to the answer it passes nine functions; each calls the next
# one, but that calls() hands what it has read back to _read(), and that deliver() has its _tell()
# called by its batch, through the loop, which catches what fails:
#
#     Connection._read     takes the bytes from the socket
#     Session.calls        cuts them into messages
#     read_message         reads one (by decode(), unless it is kept as read)
#     Session._lock        makes a Request of it
#     Server._lock         says who asks, and asks the table
#     LockTable.request    decides
#     Server.deliver       has what was decided told to everybody whom it concerns
#     Connection.tell      looks whether this client may be told
#     Session.answer       makes the bytes, which are sent
#
# Whatever the table decides goes to deliver(), in the statement after the call: the one place
# where it is decided what is told at once and what has to wait.
#
# The problem.  What is told must have been stored: a daemon may be killed between any two of its
# instructions, and its successor must know every holder that was told so.  And nobody may be told
# that he has what another one has released before that end is stored.  But each time something is
# stored it costs as much as the rest of a request, and a disk may need milliseconds.
#
# The solution.  All that a turn of the loop has changed is one batch, which is stored at the end
# of the turn.  Grants, evictions and the ends of connections that held something wait for it.
# What only refuses, queues or reports waits for nothing.  A connection of which a batch has
# something knows the batch (the newest, if there are several): whatever else is to be said to its
# client is said behind that, and it is not read until the batch is stored.  So a client hears
# everything in order, the answer finds its session as the request has left it, and an unlock
# followed by a ping is answered when the end of the lock is stored.  Where a disk stores later,
# batches wait for their turn, and each is told when all before it were.
#
# What cannot be stored.  Nobody loses a lock because a disk fails.  A store that does not sync
# has the mark in place of the record (see State on disk); where even that cannot be written,
# what was granted is given back and refused.  One that syncs is waited for: but after LATE s who
# does not want to wait is refused, who would wait is told to wait, and who ends is let go: that a
# successor may know a holder too much does no harm.
#
# The leader of a quorum.  Another daemon may lead already, and it does not know.  So whatever it
# says on which a client relies waits until etcd has confirmed that nobody else led when the client
# asked: a grant for what stores it, an answer to a reclaim and to a ping for anything; and the
# clock is looked at right before.  Who does not hear of it has what is stored: that is the rule
# for everything which ends in between.
#
#     a new grant that was not told        is nobody's: when its connection ends, however, it ends
#     a holder whose connection fails      is absent: it is kept for its grace, and may come back
#     one that comes back, and ends before it was told so on the new connection
#                                          is absent: to release it one must know that one has it
#     a grant, whose client has moved to another connection before it was told on the first
#                                          is told on the other one alone
#     etcd is silent                       holders go on; who wants a lock is told so after WARN
#                                          and REFUSE s; no end of a lock is acknowledged
#     deposed                              abandon(): all connections are reset, nothing is said
#     the orderly end                      hand_over(), and part() when another one may lead
#
# A bug costs one connection, and no decision is lost: each is told under a guard of its own.
#
# Not here on purpose: how changes become records, and where they are kept; when the daemon ends.
# That is the section Life, of which an object is handed in.


LATE = 5  # s after which nobody waits any more for a batch to be stored, but for a grant
LOOK_AT_STORE = 0.2  # s between two looks at batches that are not stored yet
UNSAVED = 1  # s at most until a change is stored that nobody waits for
WAITS_FOR_STORE = (OK, EVICTED, None)  # verdicts
A_LEADER_SAYS = (OK, BUSY)  # verdicts on which a client relies: a leader that is deposed is silent
CANNOT_STORE = "the daemon cannot store it now"
NO_QUORUM = "no quorum"
WARN, REFUSE = 1, 2  # s without etcd until who waits is told, and who does not is refused
HANDED_OVER = "this daemon ended; another one takes over"


class Batch:
    """What is stored together, and what waits for that."""
    token = 0  # the greatest that will be told
    until = NEVER  # s, monotonic: when it is late
    is_accepted = False  # the store will say when it counts
    is_stored = False
    is_said = False

    def __init__(self):
        # act(connection, detail) is called for each, when it is stored
        self.said: "List[Tuple[Callable, Connection, object]]" = []
        self.connections: "List[Connection]" = []  # that are not read until then

    def is_awaited(self) -> "bool":
        """Whether anybody waits for it still: nobody waits for ever, see Batches."""
        return any(connection.batch is self for connection in self.connections)


class Batches:
    """Has the changes of each turn stored, and what waits for them said, in this order.

    take_records() returns what has changed since the last call, as a store wants it;
    give_back(decision) ends what was granted and not told.
    """

    def __init__(self, loop: "Loop", disk: "Disk", take_records: "Callable[[], list]",
                 give_back: "Callable[[Decision], object]"):
        self.disk = disk
        self.stored: "Act" = nothing  # called when a batch was stored, and was told
        self.is_due = False  # what changes is stored at the end of this turn
        self._loop = loop
        self._take_records = take_records
        self._give_back = functools.partial(loop.guarded, nothing, give_back)
        self._is_over = False  # what is not stored is not for this daemon any more
        self._open = Batch()  # of this turn
        self._told = disk.epoch << 32  # the greatest token of all batches that were said
        self._pending: "Deque[Batch]" = collections.deque()

    def are_awaited(self) -> "bool":
        """Whether anybody waits for one of them."""
        if self.is_due:
            return True
        for batch in self._pending:
            if batch.is_awaited():
                return True
        return False

    def join(self, connection: "Connection") -> "Batch":
        """The connection waits until the changes of this turn are stored."""
        batch = self._open
        if connection.batch is not batch:
            batch.connections.append(connection)
            connection.batch = batch
        if not self.is_due:
            self.is_due = True
            self._loop.at_end_of_turn(self.commit)
        return batch

    def hurry(self) -> "None":
        """What has changed is stored at the end of this turn, although nobody waits for it."""
        if not self.is_due:
            self.is_due = True
            self._loop.at_end_of_turn(self.commit)

    def changed(self) -> "None":
        """Something may have changed that nobody waits for: it need not be stored in this turn."""
        self._loop.within(UNSAVED, self.commit)

    def commit(self) -> "None":
        """Has everything stored that has changed by now."""
        batch = self._open
        self._open = Batch()
        self.is_due = False
        try:
            self._store(batch)
        finally:  # a bug in it loses no decision
            if not batch.is_said:
                self._await(batch)

    def _await(self, batch):
        """Those who wait for it wait on, or go on without."""
        if self._is_over:
            return
        self._pending.append(batch)
        if batch.is_accepted or batch.is_stored:  # and waits for those before it
            batch.until = self._loop.now.mono + LATE
            self._loop.within(LOOK_AT_STORE, self._look)
        else:
            self._go_without(batch)

    def _store(self, batch):
        disk = self.disk
        records = self._take_records()
        if batch.token >> 32 > disk.epoch and not disk.cover(batch.token):
            return
        done = functools.partial(self._note_stored, batch)
        if records:
            batch.is_accepted = disk.commit(records, done)
        elif batch.connections and disk.kind == IN_ETCD:
            batch.is_accepted = True
            disk.confirm(done)
        elif not batch.token or disk.kind != NOT_KEPT:
            done()

    def _note_stored(self, batch):
        """It counts; it is said when all before it are.  One that counts at once is not pending
        yet."""
        batch.is_stored = True
        pending = self._pending
        if not pending:
            self._say(batch)
        while pending and pending[0].is_stored:
            first = pending.popleft()
            self._say(first)
        self.stored()

    def _say(self, batch):
        batch.is_said = True
        guarded = self._loop.guarded
        for act, connection, detail in batch.said:  # which may grow meanwhile
            guarded(connection.close, act, connection, detail)
        if batch.token > self._told:
            self._told = batch.token
        for connection in batch.connections:
            if connection.batch is batch:
                connection.batch = None
        for connection in batch.connections:
            if connection.is_held_up():
                guarded(connection.close, connection.resume)

    def stop(self) -> "None":
        """What has changed by now is given to the store, and nobody is let go without it."""
        self.commit()
        self._is_over = True
        for act in (self.commit, self._look):
            self._loop.drop(act)

    def abandon(self) -> "None":
        """Nothing is stored any more, and nobody is told."""
        self._is_over = True
        for act in (self.commit, self._look):
            self._loop.drop(act)
        self._pending.clear()

    def waiting(self) -> "List[Connection]":
        """The connections that wait; one that has ended, too, has its socket until its end is
        stored."""
        found: "List[Connection]" = []
        for batch in [*self._pending, self._open]:
            found += batch.connections
        return found

    def untold_grants(self) -> "List[Decision]":
        """Those of which nobody knows yet, since they are not stored."""
        found: "List[Any]" = []
        for batch in [*self._pending, self._open]:
            found += [detail for _, _, detail in batch.said if self._is_new_grant(detail)]
        return found

    # What cannot be stored.

    def _go_without(self, batch):
        """The mark stands for what is not stored; without it nothing is granted, unless there is
        no memory at all and nobody was promised one."""
        for _, _, detail in batch.said:
            if isinstance(detail, Decision) and detail.verdict == OK:
                detail.session.request.grace = None  # a successor would not keep it
        disk = self.disk
        is_marked = not batch.token or disk.marked or disk.mark(True)
        if not is_marked and disk.kind != NOT_KEPT:
            said = []
            for act, connection, detail in batch.said:
                if self._is_new_grant(detail):
                    self._give_back(detail)
                    detail = Decision(detail.session, LIMIT, reason=CANNOT_STORE)
                said.append((act, connection, detail))
            batch.said = said
        self._note_stored(batch)

    def _is_new_grant(self, detail):
        """Whether it is a grant of which nobody knows."""
        if not isinstance(detail, Decision) or detail.verdict != OK:
            return False
        return self.is_untold(detail.token, detail.session)

    def is_untold(self, token: "int", session: "Any") -> "bool":
        """Whether nobody was told of the grant with this token, which the session has asked for; a
        holder that asks again, on whatever connection, has been told of its own, or its memory
        was."""
        return token > self._told and session.request.reclaim is None

    def _look(self):
        """Nobody waits for ever for a disk that does not store."""
        now = self._loop.now.mono
        for batch in list(self._pending):
            if now >= batch.until:
                batch.until = NEVER
                self._let_go(batch)
            elif batch.until == NEVER:
                self._close_who_has_gone(batch)
        self.stored()
        if self._pending:
            self._loop.after(LOOK_AT_STORE, self._look)

    def _close_who_has_gone(self, batch):
        """Those who are left in a late batch wait for a grant, and are not read meanwhile."""
        for connection in batch.connections:
            if connection.batch is batch and connection.has_gone():
                self._loop.guarded(nothing, connection.close)

    def _let_go(self, batch):
        """Says what need not wait for the disk; new grants alone go on waiting."""
        said, batch.said = batch.said, []
        heard = set()  # those to whom something is said now
        for act, connection, detail in said:
            if isinstance(detail, Decision) and detail.verdict == OK:
                detail = self._late_grant(batch, act, connection, detail)
            if detail is not None:
                heard.add(connection)
                self._loop.guarded(connection.close, act, connection, detail)
        waiting = {connection for _, connection, _ in batch.said}
        for connection in batch.connections:
            if connection.batch is batch and connection not in waiting:
                connection.batch = None
                if connection not in heard:
                    self._loop.guarded(nothing, connection.close)
                self._loop.guarded(connection.close, connection.resume)

    def _late_grant(self, batch, act, connection, grant):
        """What is said now in place of the grant, None for nothing; it may wait on."""
        session = grant.session
        if self._is_new_grant(grant) and not session.request.wait:
            self._give_back(grant)
            return Decision(session, BUSY, reason=CANNOT_STORE)
        batch.said.append((act, connection, grant))
        if session.request.wait and session.state is ASKING:
            return Decision(session, ENQUEUED, reason=CANNOT_STORE)
        return None


class QuorumBatches(Batches):
    """Those of a leader.  When etcd does not answer nothing is said that waits for it: but who
    waits for a grant is told why, and who does not want to wait is refused."""

    def __init__(self, loop: "Loop", disk: "Any", take_records: "Callable[[], list]",
                 give_back: "Callable[[Decision], object]"):
        super().__init__(loop, disk, take_records, give_back)
        self._warned: "set" = set()  # the connections that were told since etcd has answered

    def _look(self):
        """etcd may have been away for too long."""
        away = self.disk.away(self._loop.now)
        if away < WARN:
            self._warned.clear()
        else:
            for batch in list(self._pending):
                self._warn(batch, away >= REFUSE)
        self.stored()
        if self._pending:
            self._loop.after(LOOK_AT_STORE, self._look)
        else:
            self._warned.clear()

    def _warn(self, batch, refuses):
        said, batch.said = batch.said, []  # which may grow meanwhile
        left = []
        for act, connection, detail in said:
            answers = isinstance(detail, Decision) and detail.verdict in A_LEADER_SAYS
            if answers and refuses and self._wants_no_wait(connection, detail):
                self._refuse(batch, act, connection, detail)
                continue
            left.append((act, connection, detail))
            if answers and detail.verdict == OK and connection.is_open:
                self._explain(act, connection, detail)
        batch.said = left + batch.said

    @staticmethod
    def _wants_no_wait(connection, detail):
        session = detail.session
        return connection.is_open and session.state is ASKING and not session.request.wait

    def _refuse(self, batch, act, connection, detail):
        """A holder that asks for its own lock is not told that it is busy, which it is not."""
        session = detail.session
        verdict = LIMIT
        if not session.ours:
            verdict = BUSY
        if self._is_new_grant(detail):
            self._give_back(detail)
        refusal = Decision(session, verdict, reason=NO_QUORUM)
        guarded = self._loop.guarded
        guarded(connection.close, act, connection, refusal)
        if connection.batch is batch:
            connection.batch = None
            guarded(connection.close, connection.resume)

    def _explain(self, act, connection, detail):
        """Tells one who waits for a grant, once; who has gone meanwhile waits no more."""
        session = detail.session
        guarded = self._loop.guarded
        if self._is_new_grant(detail) and connection.has_gone():
            guarded(nothing, connection.close)
        elif connection not in self._warned and self._can_be_told_to_wait(session):
            self._warned.add(connection)
            news = Decision(session, ENQUEUED, reason=NO_QUORUM)
            guarded(connection.close, act, connection, news)

    @staticmethod
    def _can_be_told_to_wait(session):
        if not session.request.wait:
            return False
        return session.state is ASKING or session.state is WAITING and session.ours


class Server:
    """Does what clients want, delivers decisions, and frees what those held who are gone.

    `life` has was_used(), rest(), stop_by_order(connection), quiesce(), since() and listening(): a
    Daemon, see there.
    """

    def __init__(self, settings: "Settings", log: "Log", connections: "Connections",
                 table: "LockTable", disk: "Disk", life: "Daemon"):
        self.table = table
        self.disk = disk
        self.draining = False  # the clients are left to another daemon
        self.publisher: "Publisher | None" = None
        self.loop = connections.loop
        self._log = log
        self._connections = connections
        self._settings = settings
        self._life = life
        # whether a client's id is to be the name in its certificate
        self.checks_ids = bool(connections.tls and settings["TlsCheckPeerId"])
        make_batches = Batches
        if disk.kind == IN_ETCD:
            make_batches = QuorumBatches
        self.batches = make_batches(self.loop, disk, self._take_records, self._give_back)
        self.batches.stored = self._was_stored
        # to be told at once
        self._decisions: "Deque[Tuple[Connection, Decision]]" = collections.deque()
        self._is_delivering = False
        self._next_date: "float | None" = None  # of the table
        self.leads = disk.kind == IN_ETCD  # as one daemon of a quorum
        self._is_over = False  # the ends of connections mean nothing any more
        self._progress = Progress(self)
        self._pings = Pings(disk)
        self.orders = Orders(self, settings, log, connections, life)
        self.absences = Absences(self, settings, log)
        connections.serve(self._calls(), self.gone)
        self._plan()

    def _calls(self):
        """What a session may want: the function that does it."""
        orders = self.orders
        calls = {
            "lock": self._lock,
            "unlock": self._unlock,
            "status": self._status,
            "shutdown": orders.shutdown,
            "evict": orders.evict,
            "ping": self._pings.answer,
            "pong": self._ignore,
        }
        if not self.checks_ids:
            return calls
        reject = {
            "lock": self._reject,
            "status": self._reject,
            "shutdown": orders.refuse,
            "evict": orders.refuse,
        }
        for name, refuse in reject.items():
            calls[name] = functools.partial(self._identified, calls[name], refuse)
        return calls

    def _identified(self, obey, reject, connection, detail):
        """Obeys, unless the client's certificate is not that of the id that it presents."""
        name = connection.certified
        peer_id = connection.session.peer_id
        if name and name == peer_id:
            obey(connection, detail)
            return
        reason = f"the one name in its certificate is {name!r}, its id {peer_id!r}"
        self._log.limited(f"{connection.peer}: {reason}; refused")
        reject(connection, reason)

    @staticmethod
    def _reject(connection, reason):
        refusal = Decision(connection.session, LIMIT, reason=reason)
        connection.tell(refusal)

    # What clients want.

    def _lock(self, connection, request):
        session = connection.session
        if self.draining and session.holds is None:
            connection.close()
            return
        is_surplus = connection.surplus and self._connections.refuses(connection)
        if is_surplus and request.reclaim is None:
            self._reject(connection, "the daemon has too many clients")
            return
        if connection.peer == LOCAL:
            self._identify(connection, request)
        else:
            request.origin = connection.host()
        if session.ours:
            request.grace = self._grace(request)
        decisions = self.table.request(request, self.loop.now)
        self.deliver(decisions)
        if self.table.sizes.untold:
            self._tell_sizes()
        if is_surplus and session not in self.table.requests:
            connection.finish()

    def _tell_sizes(self):
        """Notes in the log that there are two resources, where somebody may have meant one."""
        for known, new in self.table.sizes.untold:
            self._log.limited(f"{new} is another resource than {known}")
        self.table.sizes.untold.clear()

    def _identify(self, connection, request):
        """On a local socket the system knows best who asks."""
        request.local = True
        request.origin = ""
        pid, uid = connection.credentials()
        request.pid = pid
        request.uid = uid
        session = connection.session
        if not pid or not session.ours:  # 0 is a process that this one cannot see
            return
        session.about["pid"] = str(pid)
        session.uid = uid
        request.origin = pid
        self._connections.users.name(uid)  # to be known when somebody asks for a report

    def _grace(self, request):
        """ms for which the lock will be kept when its client has lost this daemon, -1: as long as
        its process lives; None where nobody would know of it."""
        disk = self.disk
        if self.leads:
            return disk.grace_for(request.kill)
        if disk.kind == NOT_KEPT or disk.failing:
            return None
        if self.absences.can_watch(request) and request.life:
            return AS_LONG_AS_ITS_PROCESS
        return self.absences.grace

    def _unlock(self, connection, committed):
        session, now = connection.session, self.loop.now
        decisions = self.table.release(session, committed, now)
        self.batches.join(connection)
        self.deliver(decisions)
        self.released()
        if self.draining:  # it would be kept alive by a client that stays
            self.when_stored(connection, self._finish)

    def _status(self, connection, client):
        if client.startswith("flomd.py"):  # see daemon_at()
            self._log.limited(f"{connection.peer}: another daemon finds this one", "error")
        since = self._life.since()
        listening = self._life.listening()
        about = element(
            "daemon",
            ("version", VERSION),
            ("since", since),
            ("policy", self._settings["Policy"]),
            ("listening", plain(listening)),
            ("memory", self._memory()),
            ("window", self._window()),
            *self._life.about(),
        )
        introduction = f'{Session.first_to_ours}<answer rc="0"/>{about}'
        pieces = report(self.table, introduction, self.loop.now)
        connection.finish_with(pieces)

    def lacks_quorum(self) -> "bool":
        """Whether the store does not answer for so long that who waits is told of it."""
        return self.disk.away(self.loop.now) >= WARN

    def _memory(self):
        """How what is decided is stored, as the status report says it."""
        if self.disk.failing:
            return "failing"
        return self.disk.kind

    def _window(self):
        """The ms that are left of the recovery window, None when there is none."""
        until = self.table.window_until
        if until is None:
            return None
        left = until - self.loop.now.mono
        return max(0, round(left * 1000))

    @staticmethod
    def _ignore(connection, _):
        """A client may say so, and it means nothing."""

    # Decisions.

    def deliver(self, decisions: "List[Decision]") -> "None":
        """Has the sessions told what was decided, now or when it is stored.  To tell one may end
        its connection, which brings more decisions: those to be told now are told by the same
        loop, after those that are here already."""
        for decision in decisions:
            connection = decision.session.connection
            if connection is None:
                continue  # nobody is there to be told
            verdict = decision.verdict
            if verdict in WAITS_FOR_STORE:
                self._let_wait(connection, decision)
            elif self.leads and self._answers_reclaim(decision):
                self.batches.join(connection)
            batch = connection.batch
            if batch is None:
                self._decisions.append((connection, decision))
            else:
                batch.said.append((self._tell, connection, decision))
        if not self.batches.is_due:
            self.batches.changed()
        if self._decisions and not self._is_delivering:
            self._tell_now()
        if self.table.next_date() != self._next_date:
            self._plan()

    def _let_wait(self, connection, decision):
        batch = self.batches.join(connection)
        if decision.verdict == OK and decision.token > batch.token:
            batch.token = decision.token
        elif decision.verdict is None:  # what was granted on it and not told is another one's
            connection.closing = True

    @staticmethod
    def _answers_reclaim(decision):
        """Where it is refused its client takes the lock for lost, so no other leader may have
        followed, under which it is not."""
        request = decision.session.request
        return request is not None and request.reclaim is not None

    def _tell_now(self):
        """A bug costs the connection of the session that was to be told, and no other decision."""
        self._is_delivering = True
        while self._decisions:
            connection, decision = self._decisions.popleft()
            self.loop.guarded(connection.close, self._tell, connection, decision)
        self._is_delivering = False

    def _tell(self, connection, decision):
        """Sees to what comes before the decision is told, and tells it."""
        verdict = decision.verdict
        if self.leads and verdict in A_LEADER_SAYS and not self._may_tell(connection, decision):
            return
        if self.publisher is not None:
            self.publisher.note(decision)
        session = decision.session
        if verdict in (ENQUEUED, BUSY) and decision.reason is None and session.request is not None:
            if "progress" in session.about:
                decision = self._progress.explained(decision)
        connection.tell(decision)

    def _may_tell(self, connection, decision):
        """Whether a leader may say so now.  A client that has closed the connection, before it was
        told on it that it holds its lock again, does not release it."""
        if not self.disk.may_tell():
            return False
        session = connection.session
        if decision.verdict == OK and connection.is_open and session.holds is None:
            is_new = self.batches.is_untold(decision.token, session)
            if not is_new and connection.has_gone():
                connection.close()
                return False
        return True

    def when_stored(self, connection: "Connection", act: "Callable",
                    detail: "object" = None) -> "None":
        """act(connection, detail) is called when what this turn has changed is stored."""
        batch = self.batches.join(connection)
        batch.said.append((act, connection, detail))

    @staticmethod
    def _finish(connection, _):
        connection.finish()

    def _take_records(self):
        """What has changed, as a store wants it."""
        changes = self.table.take_changes()
        if changes is None or self.disk.kind == NOT_KEPT:
            return []
        return batch_of(changes)

    def store_changed(self) -> "None":
        """The store cannot write, or can again.  Numbers that must not come twice are not given
        while it cannot, where it would sync them."""
        if self.disk.kind == SYNCED:
            decisions = self.table.stall(bool(self.disk.failing), self.loop.now)
            self.deliver(decisions)

    def _give_back(self, grant):
        """Ends what was granted, and was not told because it cannot be stored."""
        self.batches.hurry()
        decisions = self.table.gone(grant.session, self.loop.now)
        self.deliver(decisions)
        self.released()

    def _was_stored(self):
        """Nobody may be left who needs the daemon."""
        if not self._connections.open:
            self._life.rest()

    def _plan(self):
        """Sets a date for what the table has to do next."""
        date = self.table.next_date()
        self._next_date = date
        if date is None:
            self.loop.cancel(self._expire)
        else:
            self.loop.at(date, self._expire)

    def _expire(self):
        now = self.loop.now
        again = now.mono + PAUSE  # to be tried again where it fails
        self._next_date = again
        self.loop.at(again, self._expire)
        decisions = self.table.expire(now)
        self.deliver(decisions)
        self._life.rest()

    # The end of a lock.

    def gone(self, connection: "Connection") -> "None":
        """A connection has ended; what it held or waited for goes on to others."""
        session = connection.session
        request = self.table.requests.get(session)
        if self._is_over:
            return
        if request is not None:
            is_holder = request.state is HELD
            if is_holder and self.publisher is not None:
                self.publisher.counts.lost += 1
            if is_holder and self._is_kept(connection, request):
                self._keep(connection, request)
            else:
                self._end(connection, request)
        if not self._connections.open:
            self._life.was_used()

    def _is_kept(self, connection, holder):
        """Whether the end of its connection leaves an absent holder: in a quorum, unless its
        client meant to release it.  A new grant that was not told is nobody's.  To one that was
        known before, and was not told so on this connection, the end of it means nothing."""
        if not self.leads:
            return False
        if connection.session.holds is None:
            return not self.batches.is_untold(holder.token, connection.session)
        return not RELEASES[connection.end]

    def _keep(self, connection, holder):
        """Its client may come back."""
        session = connection.session
        absent = Absent.of(session, self._connections.users.name)
        self.table.set_absent(session, absent)
        self.absences.keep(holder, connection.end)
        if self.publisher is not None:
            self.publisher.changed()

    def _end(self, connection, request):
        """Its client sees the end of the connection when the end of its lock is stored."""
        if request.state is HELD:
            self.batches.join(connection)
        self._free(connection.session)

    def _free(self, session):
        decisions = self.table.gone(session, self.loop.now)
        if self.draining:
            decisions = []  # the other daemon may have granted it already
        self.deliver(decisions)
        self.released()

    def evict(self, session: "Session", reason: "str") -> "None":
        """Takes a lock away from its holder, or a waiter out of its queue."""
        if session.is_absent:
            self.end_absent(session)
            return
        decisions = [Decision(session, EVICTED, reason=reason)]
        decisions += self.table.gone(session, self.loop.now)
        self.deliver(decisions)
        self.released()

    def end_absent(self, session: "Identity") -> "None":
        """An absent holder ends, and has committed: a gap is better than a number that comes
        twice."""
        decisions = self.table.release(session, True, self.loop.now)
        self.deliver(decisions)
        self.released()

    def released(self) -> "None":
        """The mark on disk may be cleared when nobody has held a lock for a while."""
        if self.publisher is not None:
            self.publisher.changed()
        table = self.table
        if not self.disk.marked or table.holding > 0:
            return
        since = self.loop.now.mono
        if table.window_until is not None:
            since = max(since, table.window_until)
        self.loop.at(since + QUIET, self.clear_mark)

    def clear_mark(self) -> "None":
        """Clears the mark on disk, if nobody holds a lock and no former holder may come back."""
        table = self.table
        if table.holding > 0 or table.window_until is not None:
            return
        if self.disk.marked:
            self.disk.mark(False)

    # The end of the daemon.

    def forget(self) -> "None":
        """A successor will know of no resource that nobody holds: FLoM's users set numbers back by
        ending the daemon."""
        self.table.forget_what_nobody_holds()
        self.batches.commit()

    def drain(self) -> "None":
        """Ends the connections of all who hold no lock; those who do may finish."""
        self.draining = True
        for connection in list(self._connections.open):
            if connection.session.holds is None:
                connection.close()

    def hand_over(self) -> "None":
        """The end of a leader in good order begins: what was decided is given to the store.  From
        now on nothing that a client says or does counts, and no ping is answered."""
        self._stop()
        self.batches.stop()
        self._connections.ignore()

    def end_in_order(self) -> "None":
        """Its end: another daemon may lead now.  Every client sees an end of file; who has ordered
        it is told."""
        self.orders.tell_end()
        self._connections.end_in_order()
        for connection in self.batches.waiting():
            connection.end_in_order()

    def abandon(self) -> "None":
        """Another daemon may lead already.  Nobody is told anything, every connection is reset,
        and nothing of this server is called any more by the loop."""
        self._stop()
        for connection in self.batches.waiting():
            connection.abandon()
        self.batches.abandon()
        self._connections.abandon()

    def _stop(self):
        self._is_over = True
        for act in (self._expire, self.clear_mark):
            self.loop.drop(act)
        for part in (self.absences, self._progress, self._pings):
            part.stop()

    def tell_stopped(self, reason: "str") -> "None":
        """Tells all clients of ours that nobody should start another daemon; what was decided
        before is told before, where it is stored at once."""
        self.batches.commit()
        for connection in list(self._connections.open):
            session = connection.session
            if session.ours:
                stopped = Decision(session, STOPPED, reason=reason)
                connection.tell(stopped)
        self._let_go_who_has_heard()

    def _let_go_who_has_heard(self):
        """Nobody who waits is granted any more; and a client of ours that has a grant, and hears
        of the end before it, will never know that it holds."""
        now = self.loop.now
        requests = self.table.requests
        for session in [one for one in requests if requests[one].state is not HELD]:
            self.table.gone(session, now)
        for grant in self.batches.untold_grants():
            if grant.session.ours:
                self.table.gone(grant.session, now)


MOST_PONGS = 1000  # at once, to one client, which sends one ping at a time


class Pings:
    """Answers the pings of clients.

    In a quorum the answer says that nobody else led when the ping came, so it waits for the store.
    To a client that neither has nor wants a lock it says only that all before it is done: the end
    of its lock was stored before this ping was read.
    """

    def __init__(self, disk: "Disk"):
        self._disk = disk
        self._is_over = False
        # connection: its pings that have come while the store was asked for the one before
        self._asked: "Dict[Connection, int]" = {}

    def answer(self, connection: "Connection", _: "object") -> "None":
        """A client has sent a ping.  However many it sends, the store is asked for one at a
        time."""
        if connection.session.state is FREE:
            self._tell(connection)
        elif connection in self._asked:
            self._asked[connection] += 1
        else:
            self._ask(connection, 1)

    def _ask(self, connection, number):
        """Asks the store for so many pings, which have all come by now."""
        self._asked[connection] = 0
        done = functools.partial(self._confirmed, connection, number)
        self._disk.ping(done)

    def stop(self) -> "None":
        """No ping is answered any more."""
        self._is_over = True

    def _confirmed(self, connection, number):
        if self._is_over:
            return
        more = self._asked.pop(connection)
        if not connection.is_open:
            return
        if more:
            self._ask(connection, more)
        self._tell(connection, number)

    def _tell(self, connection, number=1):
        if self._disk.may_tell() and not connection.closing:
            connection.send(Session.pong * min(number, MOST_PONGS))


# Absent holders.

AS_LONG_AS_ITS_PROCESS = -1  # a grace
LEAST_GRACE = 30  # s
GATHERED = 0.5  # s in which those that have become absent share a line of the log
LOOK_AT_PROCESSES = 0.2  # s between two looks at the processes of all absent holders
MOST_LOOKED_AT = 1000  # absent holders, in one turn of the loop
FLOM = b"flom"  # the name of the processes of FLoM's command
ENDED, LIVES, UNCERTAIN = "ended", "lives", "uncertain"


def _exists(pid):
    """Whether any process has the pid."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is another user's
    return True


def look_at_process(pid: "int", moment: "float") -> "Tuple[str, bytes]":
    """What has become of the process that had this pid at the moment (s since the boot), and the
    name of its program: a later process may have got its pid, and a zombie has ended."""
    if not _exists(pid):
        return ENDED, b""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:  # it has just ended, or the system does not show it
        return UNCERTAIN if _exists(pid) else ENDED, b""
    head, _, fields = text.rpartition(b")")
    state, *others = fields.split()
    _, _, name = head.partition(b"(")
    begun = int(others[18]) / os.sysconf("SC_CLK_TCK")
    if state in (b"Z", b"X") or begun > moment:
        return ENDED, name
    return LIVES, name


def end_of_absent(holder: "Request", reason: "str") -> "str":
    """A line for the log; what a holder had of a sequence is not given again."""
    what = repr(holder.name)
    if holder.element is not None:
        what += f" with {holder.element}"
    return f"{what}, of {holder.session}, which was absent, is free: {reason}"


class Absences:
    """Ends the absent holders whose clients do not come back.

    A command on this host holds its lock as long as its process lives, which is looked at.
    Everybody else has the grace, from the start of this daemon on.  `grace` (ms) is what is
    promised now; an earlier daemon may have promised more.  In a quorum all have the grace, from
    the claim on, or from when their connections have failed.
    """

    def __init__(self, server: "Server", settings: "Settings", log: "Log"):
        self._server = server
        self._table = server.table
        self._loop = server.loop
        self._log = log
        idle, interval, probes = [settings[f"TcpKeepalive{name}"]
                                  for name in ("Time", "Intvl", "Probes")]
        seconds = max(LEAST_GRACE, idle + interval * probes)
        self.grace = seconds * 1000
        self._sees_processes = os.path.exists(BOOT_ID) and self._can_look()
        self._begun = self._loop.now.mono
        self._watched: "List[Request]" = []  # whose processes are looked at
        self._round: "List[Request]" = []  # those that are left of the look that has begun
        self._graces: "List[Tuple[float, int, Request]]" = []  # a heap, by the end of the grace
        self._until: "Dict[int, float]" = {}  # token: the last end, which counts
        self._restored: "List[Request]" = []  # which have no grace yet
        # those of which the log does not tell yet: a line for each, by its token
        self._untold: "Dict[Any, str]" = {}
        self._tell_at = 0.0  # s, monotonic: the next line

    @staticmethod
    def _can_look():
        state, _ = look_at_process(os.getpid(), NEVER)
        return state == LIVES

    def can_watch(self, holder: "Request") -> "bool":
        """Whether the end of the process that holds it can be seen."""
        return holder.local and bool(holder.pid) and self._sees_processes

    def begin(self, same_processes: "bool") -> "None":
        """The daemon serves, and knows the holders of its predecessor; same_processes: their pids
        are those of processes that this daemon sees, of the same boot."""
        self._begun = self._loop.now.mono
        for holder in list(self._table.absent.values()):
            is_command = holder.life or not holder.session.ours
            if same_processes and is_command and self.can_watch(holder):
                self._watched.append(holder)
            else:
                self._give_grace(holder, self._begun)
        if self._watched:
            self._loop.after(0, self._look)

    def begin_term(self, claimed_at: "float", grace: "int") -> "None":
        """The leader of a quorum serves, whose claim was confirmed at `claimed_at` (s, boot), and
        which promises this grace (ms) at least.  No process tells of the end of its lock: it may
        have run on the host of another leader."""
        self.grace = grace
        self._table.be_strict()
        now = self._loop.now
        self._begun = now.mono - (now.boot - claimed_at)
        self._restored = [*self._table.absent.values()][::-1]  # the first are the last here
        self._give_graces()

    def keep(self, holder: "Request", end: "str") -> "None":
        """The holder has become absent, in a quorum, since its connection has ended so: it is
        kept.  When a network fails there are many; and while etcd is silent each may be so again
        and again, each time that it asks for its lock on another connection."""
        now = self._loop.now.mono
        seconds = self._give_grace(holder, now) - now
        self._untold[holder.token] = (f"{holder.name!r}, of {holder.session}, is kept for "
                                      f"{seconds:.0f} s: its connection ended by {end}")
        self._loop.within(max(GATHERED, self._tell_at - now), self._tell)

    def _tell(self):
        """One line for all that have become absent since the last."""
        *others, line = self._untold.values()
        self._untold.clear()
        self._tell_at = self._loop.now.mono + INTERVAL
        if others:
            line += f"; so are {len(others)} more"
        self._log.info(line)

    def stop(self) -> "None":
        """None of them ends any more."""
        for act in (self._look, self._give_graces, self._end_graces, self._tell):
            self._loop.drop(act)

    # Their processes.

    def _look(self):
        """Looks at a part of them; at all, once in LOOK_AT_PROCESSES s."""
        if not self._round:
            self._round, self._watched = self._watched, []
        part = self._round[-MOST_LOOKED_AT:]
        del self._round[-MOST_LOOKED_AT:]
        for holder in part:
            if self._is_absent(holder):
                give_grace = functools.partial(self._give_grace, holder, self._begun)
                self._loop.guarded(give_grace, self._look_at, holder)  # no lock is kept by a bug
        if self._round:
            self._loop.after(0, self._look)
        elif self._watched:
            self._loop.after(LOOK_AT_PROCESSES, self._look)

    def _is_absent(self, holder):
        """Whether it has not come back, nor was it evicted."""
        return self._table.absent.get(holder.session) is holder

    def _look_at(self, holder):
        state, name = look_at_process(holder.pid, holder.held_boot)
        if state == ENDED:
            self._end(holder, f"process {holder.pid} has ended")
        elif state == UNCERTAIN or not holder.life and name != FLOM:
            self._give_grace(holder, self._begun)
        else:
            self._watched.append(holder)

    # Their graces.

    def _give_graces(self):
        """To those who were restored, a part of them in this turn."""
        part = self._restored[-MOST_LOOKED_AT:]
        del self._restored[-MOST_LOOKED_AT:]
        for holder in part:
            if self._is_absent(holder) and holder.token not in self._until:
                self._give_grace(holder, self._begun)
        if self._restored:
            self._loop.after(0, self._give_graces)

    def _give_grace(self, holder, since):
        """It is kept from `since` on (s, monotonic); returns the end."""
        promised = holder.grace or 0
        until = kept_until(since, promised, self.grace)
        self._until[holder.token] = until
        entry = until, holder.token, holder
        heapq.heappush(self._graces, entry)
        if self._graces[0] is entry:
            self._loop.at(until, self._end_graces)
        return until

    def _end_graces(self):
        """Ends those whose grace is over, a part of them in this turn."""
        now = self._loop.now.mono
        for _ in range(MOST_LOOKED_AT):
            if not self._graces or self._graces[0][0] > now:
                break
            until, token, holder = heapq.heappop(self._graces)
            if self._until.get(token) != until:
                continue  # it has come back, and is absent anew
            del self._until[token]
            if self._is_absent(holder):
                self._loop.guarded(nothing, self._end, holder, "its grace is over")
        if self._graces:
            self._loop.at(self._graces[0][0], self._end_graces)

    def _end(self, holder, reason):
        self._log.info(end_of_absent(holder, reason))
        self._server.end_absent(holder.session)


class Progress:
    """Tells those who want to know it why they wait, and how that changes: of a new place in the
    queue, or of another holder, once a second."""

    def __init__(self, server: "Server"):
        self._server = server
        self._table = server.table
        self._loop = server.loop
        # session: what it knows, (position, the first holder in its way, whether a quorum lacks)
        self._told: "dict" = {}

    def explained(self, decision: "Decision") -> "Decision":
        """The decision, ENQUEUED or BUSY, with the reason for it."""
        session = decision.session
        request = session.request
        resource = self._table.resource_of(request.name)
        if resource is None:
            return decision
        lane = resource.lane(request)
        in_the_way = Obstacles(resource, [lane]).of(lane)
        lacks = False
        if decision.verdict == ENQUEUED:
            lacks = self._server.lacks_quorum()
            place = decision.position, in_the_way.first, lacks
            self._told[session] = place
            self._loop.within(1, self._tell)
        reason = self._reason(in_the_way, lacks)
        return decision._replace(reason=reason)

    def _reason(self, in_the_way, lacks):
        if lacks:
            return NO_QUORUM
        return held_by(in_the_way, self._loop.now)

    def stop(self) -> "None":
        """Nobody is told any more."""
        self._loop.drop(self._tell)

    def _tell(self):
        known = self._told
        self._told = {}
        decisions = []
        for resource in self._resources(known):
            obstacles = Obstacles(resource, resource.lanes)
            for position, waiter in enumerate(resource.waiters(), 1):
                session = waiter.session
                if session in known:
                    in_the_way = obstacles.of(waiter.lane)
                    decisions += self._news(session, position, in_the_way, known)
        if self._told:
            self._loop.after(1, self._tell)
        self._server.deliver(decisions)

    def _resources(self, sessions):
        """The resources for which these sessions still wait."""
        found: "dict" = {}  # for the order, without values
        for session in sessions:
            request = self._table.requests.get(session)
            if request is not None and request.state is QUEUED:
                found[request.resource] = None
        return found

    def _news(self, session, position, in_the_way, known):
        """What the session does not know yet, as a list of decisions."""
        lacks = self._server.lacks_quorum()
        place = position, in_the_way.first, lacks
        self._told[session] = place
        if place == known[session]:
            return []
        reason = self._reason(in_the_way, lacks)
        return [Decision(session, ENQUEUED, position=position, reason=reason)]


class Orders:
    """What is asked of the daemon by somebody who is in charge: to end, and to evict.

    A reason is the text that says why somebody may not; "" when he may.
    """

    def __init__(self, server: "Server", settings: "Settings", log: "Log",
                 connections: "Connections", life: "Daemon"):
        self._server = server
        self._settings = settings
        self._log = log
        self._users = connections.users
        self._tls = connections.tls
        self._life = life
        self._given: "List[Connection]" = []  # who has ordered the end, and waits for it

    def shutdown(self, connection: "Connection", immediate: "bool") -> "None":
        """Ends the daemon at once, or when it is idle; in a quorum it hands over in any case."""
        reason = self._may_not_stop(connection)
        if reason:
            self._log.limited(f"{connection.peer}: may not stop the daemon: {reason}")
            self.refuse(connection, reason)
        elif self._server.leads:
            self._given.append(connection)
            self._life.stop_by_order(connection)
        elif immediate:
            self._life.stop_by_order(connection)
        else:
            self._life.quiesce()
            connection.close()

    def tell_end(self) -> "None":
        """Tells those who have ordered the end what has become of it."""
        answer = element("answer", ("rc", OK), ("reason", HANDED_OVER))
        for connection in self._given:
            if connection.is_open:
                connection.send(encode(MANAGEMENT, 16, answer))

    def evict(self, connection: "Connection", detail: "tuple") -> "None":
        """Takes a lock away from its holder, or a waiter out of its queue."""
        ident, about = detail
        found = self._server.table.known_as(ident)
        if len(found) != 1:
            problem = "the id of several" if found else "nobody's id"
            self.refuse(connection, f"{ident!r} is {problem}")
            return
        request = found[0]
        session = request.session
        reason = self._may_not_evict(connection, request)
        if reason:
            self._log.limited(f"{connection.peer}: may not evict {session}: {reason}")
            self.refuse(connection, reason)
            return
        giver = self._giver(connection, about)
        done = f"taken away by {giver}"
        self._log.limited(f"{request.name!r}, of {session}: {done}", "info")
        self._server.evict(session, done)
        self._server.when_stored(connection, self._last_word, element("answer", ("rc", OK)))

    def refuse(self, connection: "Connection", reason: "str") -> "None":
        """Does not obey."""
        answer = element("answer", ("rc", -1), ("reason", plain(reason)))
        self._last_word(connection, answer)

    @staticmethod
    def _last_word(connection, answer):
        data = encode(MANAGEMENT, 16, answer)
        connection.send(data)
        connection.finish()

    def _giver(self, connection, about):
        """USER@HOST of somebody who gives an order, as far as the system can tell."""
        user = about.get("user", "?")
        if connection.peer != LOCAL:
            return f"{user}@{connection.host()}"
        _, uid = connection.credentials()
        if uid is not None:
            user = self._users.name(uid)
        return f"{user}@{os.uname().nodename}"

    def _may_not_evict(self, connection, request):
        """Whose lock it is, and who may stop the daemon, may."""
        reason = self._may_not_stop(connection)
        _, uid = connection.credentials()
        if not reason or uid is None:
            return reason
        if uid == request.uid:
            return ""
        return f"{self._users.name(uid)} is neither its user, nor the daemon's, nor root"

    def _may_not_stop(self, connection):
        """The daemon's user and root may; over TCP who is on this host, or has a certificate."""
        if connection.peer == LOCAL:
            return self._may_not_stop_here(connection)
        if self._settings["AllowRemoteShutdown"] or self._tls:
            return ""
        if connection.is_from_this_host():
            return ""
        return "another host may not, without --allow-remote-shutdown on the daemon"

    def _may_not_stop_here(self, connection):
        """On a local socket the system tells who it is, or cannot tell: then he may."""
        own = os.getuid()
        _, uid = connection.credentials()
        if uid in (None, 0, own):
            return ""
        name = self._users.name(uid)
        owner = self._users.name(own)
        return f"{name} is neither {owner} nor root"


# --- Life ---------------------------------------------------------------------------------------
# How long the daemon serves, and how it ends.
#
#     SERVING      until somebody ends it, or nobody has needed it for its lifespan
#     QUIESCING    until the last client has gone; newcomers are served meanwhile
#     DRAINING     until the last holder has released: another daemon serves in this one's place
#     ENDING       no more
#
# Only what a client of the daemon's owner says is an order: then clients of ours are told that
# nobody should start another daemon.  A signal is none: it may come from an init script that
# restarts the daemon, or from the end of a session, so the clients see what they see when a daemon
# crashes, and go on.
#
# A client that sees the end of its connection may start a daemon at once.  So the connections are
# closed by the end of the process, after all else that the daemon has to do.

SERVING, QUIESCING, DRAINING, ENDING = "serving", "quiescing", "draining", "ending"


class Daemon:
    """The parts of the daemon, and its life.

    `pair` is (ms since 1970 at which it began, its id); `disk` has begun.
    Raises CannotServe.
    """
    status = 0  # of the process

    def __init__(self, settings: "Settings", log: "Log", pair: "tuple", disk: "Disk",
                 table: "LockTable", connections: "Connections"):
        self.settings = settings
        self.log = log
        self.pair = pair
        self.disk = disk
        self.table = table
        self.phase = SERVING
        self.loop = connections.loop
        self.connections = connections
        self.server = Server(settings, log, connections, table, disk, self)
        self.ways: "list" = []  # how clients find it: listeners and the group
        self._forgets = False  # a successor is to know no resource that nobody holds
        self._parts: "list" = []  # what has a path that may be lost

    def run(self) -> "None":
        """Serves until it is told to end or nobody needs it."""
        self.rest()
        self.loop.run()

    def since(self) -> "int":
        """When it began: s since 1970."""
        return self.pair[0] // 1000

    def greeting(self) -> "str":
        """A line for the log."""
        return f"serving {self.listening()}"

    def about(self) -> "list":
        """More attributes for the head of a status report."""
        return []

    def figures(self) -> "list":
        """More figures, as metrics() wants them."""
        return []

    def listening(self) -> "str":
        """Where clients find the daemon, in one line."""
        return " ".join(way.label for way in self.ways)

    # Nobody needs it.

    def was_used(self) -> "None":
        """The last client has gone: the lifespan is counted anew, from the end of the last
        resource."""
        self.loop.cancel(self._end_of_life)
        self.rest()

    def rest(self) -> "None":
        """Looks whether the daemon is still needed: a client that has gone is served until the
        end of its lock is stored."""
        if self.connections.open or self.server.batches.are_awaited():
            return
        if self.phase == QUIESCING:
            self._forgets = True
        if self.phase != SERVING:
            self.loop.stop()
        lifespan = self.settings["Lifespan"]
        if lifespan >= 0 and self.table.empty():
            seconds = lifespan / 1000
            self.loop.within(seconds, self._end_of_life)

    def _end_of_life(self):
        if self.connections.open or not self.table.empty():
            return
        self.phase = ENDING
        self.loop.stop()

    # Somebody ends it.

    def stop_by_order(self, connection: "Connection") -> "None":
        """Ends by the order that came on this connection, which ends with the process."""
        reason = f"the order came from {connection.peer}"
        connection.closing = True
        self.server.tell_stopped(reason)
        self._forgets = True
        self.stop(reason)

    def stop_by_signal(self, name: "str") -> "None":
        """Ends at once, and leaves to init scripts whether another daemon comes."""
        self.disk.expect_successor()
        self.stop(f"it got {name}")

    def stop(self, reason: "str") -> "None":
        """Ends at once; what comes from now on is not read."""
        self.log.info(f"ending: {reason}")
        self.phase = ENDING
        self.loop.stop()

    def quiesce(self) -> "None":
        """Ends when nobody is served any more."""
        self.log.info("ending when the last client has gone")
        if self.phase == SERVING:
            self.phase = QUIESCING
        self.rest()

    def drain(self, reason: "str") -> "None":
        """Leaves the clients to another daemon, which is found where this one was.  A quiescing
        daemon drains, too: it would go on granting to newcomers what the other one grants."""
        if not self.ways:
            return
        self.log.error(f"draining: {reason}")
        self.phase = DRAINING
        self.hide()
        self.server.drain()
        self.rest()

    def hide(self) -> "None":
        """From now on no client finds the daemon."""
        self.loop.cancel(self._look)
        while self.ways:
            self.ways.pop().close()

    def close(self) -> "None":
        """Removes what the daemon has put into the file system.  Its connections stay: they are
        closed by the end of the process, after everything else."""
        self.hide()
        publisher = self.server.publisher
        if publisher is not None:
            publisher.close()
        users = self.connections.users
        users.close()
        if self._forgets:
            self.server.forget()
        self.server.batches.commit()  # what has changed and nobody waits for
        self.server.clear_mark()
        self.disk.close()

    # Its paths.

    def watch(self, parts: "list") -> "None":
        """Every LOOK s the parts look whether their paths still lead to them."""
        self._parts = [part for part in parts if part is not None]
        self._look()

    def _look(self):
        self.loop.after(LOOK, self._look)
        for part in self._parts:
            if self.ways:  # else it drains
                part.look()


# Signals.  Their handlers do nothing; Python writes the number of each signal to a socket that the
# loop reads.


class Signals:
    """TERM and INT end the daemon, USR1 lets it end when idle, HUP opens its log again.  `daemon`
    is what obeys."""

    def __init__(self, daemon: "Any"):
        self._loop = daemon.loop
        self._actions: "Dict[int, Act]" = {
            signal.SIGTERM: functools.partial(daemon.stop_by_signal, "SIGTERM"),
            signal.SIGINT: functools.partial(daemon.stop_by_signal, "SIGINT"),
            signal.SIGUSR1: daemon.quiesce,
            signal.SIGHUP: daemon.log.reopen,
        }
        reader, writer = socket.socketpair()
        for end in (reader, writer):
            end.setblocking(False)
        self._reader = reader
        self._writer = writer  # Python knows its number alone
        for number in self._actions:
            signal.signal(number, self._leave_to_loop)
        number = writer.fileno()
        signal.set_wakeup_fd(number)
        self._loop.watch(reader, self._handle)

    @staticmethod
    def _leave_to_loop(number, frame):
        """Python has written the number to the socket that the loop reads."""

    def _handle(self, events):
        """Acts on the signals that have come; one that fails does not keep the next back."""
        for number in self._reader.recv(64):
            action = self._actions.get(number, nothing)
            self._loop.guarded(nothing, action)


# --- Publishing ---------------------------------------------------------------------------------
# What others may watch: the tree of -m and the figures of --metrics, see Reports.  Here they
# become files, the outputs of the Publisher.
#
# The problem: a disk may be slow and the table large, while the loop waits for no disk.  So a
# child writes, which sees the table as it was at that moment.  There is one child at a time: what
# is to be written meanwhile is written by the next one, when it has ended, and none is left when
# the daemon ends.
#
# A process that has a thread does not fork: the child could wait for ever for a lock that the
# thread had.  There the loop itself writes, a portion a turn, what is there when its turn has
# come; that it waits for the disk for a moment is the lesser evil.
#
# Whoever reads sees a whole version: a new file is renamed to the name of the last one; a new tree
# is built beside the last one, and then the link `status` leads to it.

TREE_PAUSE, METRICS_PAUSE = 1, 15  # s between two versions
WRITTEN_AT_ONCE = 0.005  # s of a turn of the loop


class Tree:
    """The output of -m: the link `status`, in a folder, to a tree of files.

    The name of a tree has the pid of its daemon: several may have been given one folder, by a file
    that all of them read.  The link then leads to the newest tree, and each removes its own.
    """
    follows_changes = True  # it is written when something has changed

    def __init__(self, folder: "str", table: "LockTable"):
        self.path, self.table = folder, table
        self.pause = TREE_PAUSE
        self._daemon = os.getpid()
        self._status = os.path.join(folder, "status")

    def try_out(self) -> "None":
        """Raises CannotServe where no tree can be published."""
        status = self._status
        trial = self._below(f".trial-{os.getpid()}")
        with serving(f"cannot publish the state below {self.path}"):
            os.mkdir(trial)
            os.rmdir(trial)
            if os.path.lexists(status) and not os.path.islink(status):
                raise FileExistsError(errno.EEXIST, f"{status} is not a daemon's")

    def steps(self, number: "int") -> "Iterator[None]":
        """Writes the tree of this number, in steps.  Raises OSError."""
        name = f".status-{self._daemon}-{number}"
        shown = self._shown()
        if shown == name:  # that of a publisher before this one
            name += "-again"
        yield from self._removing(shown)  # what a daemon left that was killed
        try:
            yield from self._write(name)
        except OSError:
            yield from self._removing(self._shown())
            raise
        yield from self._removing(self._shown())

    def _write(self, name):
        top = self._below(name)
        link = f"{top}-link"
        os.mkdir(top)
        yield from self._write_files(top)
        if self._daemon in (os.getpid(), os.getppid()):  # it was not killed meanwhile
            os.symlink(name, link)
            os.replace(link, self._status)

    def _below(self, name):
        return os.path.join(self.path, name)

    def _shown(self):
        """The name of the tree to which the link leads; "" when there is none."""
        try:
            return os.path.basename(os.readlink(self._status))
        except OSError:
            return ""

    def _write_files(self, top):
        made = set()
        for name, content in tree(self.table):
            path = os.path.join(top, name)
            folder = os.path.dirname(path)
            if folder not in made:
                os.makedirs(folder, exist_ok=True)
                made.add(folder)
            with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(visible(str(content)) + "\n")
            yield

    def _removing(self, kept):
        """Removes, in steps, the trees and links that nobody needs any more, but the one of this
        name."""
        for name in os.listdir(self.path):
            if name.startswith(".status-") and name != kept and not self._is_anothers(name):
                yield from self._remove(self._below(name))

    def _is_anothers(self, name):
        """Whether a tree of this name belongs to another daemon, which lives."""
        found = re.match(r"\.status-([0-9]{1,9})-", name)
        if not found or int(found.group(1)) == self._daemon:
            return False
        try:
            os.kill(int(found.group(1)), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it is another user's
        return True

    def _remove(self, path):
        if os.path.islink(path) or not os.path.isdir(path):
            os.unlink(path)
            yield
            return
        for name in os.listdir(path):
            yield from self._remove(os.path.join(path, name))
        os.rmdir(path)

    def remove(self) -> "None":
        """Removes what was published, as far as it can be removed."""
        if not self._is_anothers(self._shown()):
            with contextlib.suppress(OSError):
                os.unlink(self._status)
        with contextlib.suppress(OSError):
            for _ in self._removing(""):
                pass


class MetricsFile:
    """The output of --metrics: a file.  figures() yields its lines."""
    follows_changes = False  # it is written again and again

    def __init__(self, path: "str", figures: "Callable[[], Iterator[str]]"):
        self.path, self.figures = path, figures
        self.pause = METRICS_PAUSE
        self._new = f"{path}.new"

    def try_out(self) -> "None":
        """Raises CannotServe where the file cannot be written."""
        trial = f"{self.path}.{os.getpid()}"
        with serving(f"cannot write {self.path}"):
            check_replaceable(self.path)
            with open(trial, "w") as file:
                file.write("\n")
            os.unlink(trial)

    def steps(self, _: "int") -> "Iterator[None]":
        """Writes the file, in steps.  Raises OSError."""
        new = self._new
        with open(new, "w") as file:
            for line in self.figures():
                file.write(line)
                yield
        os.chmod(new, 0o644)
        os.replace(new, self.path)

    def remove(self) -> "None":
        """Removes what was published, as far as it can be removed."""
        for path in (self.path, self._new):
            with contextlib.suppress(OSError):
                os.unlink(path)


class Portions:
    """Writes a version of an output in the loop, a portion a turn, and then calls hear() with what
    has gone wrong, or ""."""

    def __init__(self, loop: "Loop", output: "Any", number: "int",
                 hear: "Callable[[str], object]"):
        self._loop, self._hear = loop, hear
        self._path = output.path
        self._steps = output.steps(number)
        self._is_done = False
        self._failure = ""
        loop.after(0, self._go_on)

    def _go_on(self):
        self._is_done = True  # also where a bug ends it
        self._loop.guarded(nothing, self._take_portion)
        if self._is_done:
            self._hear(self._failure)
        else:
            self._loop.after(0, self._go_on)

    def _take_portion(self):
        until = time.monotonic() + WRITTEN_AT_ONCE
        try:
            for _ in self._steps:
                if time.monotonic() >= until:
                    self._is_done = False
                    break
        except OSError as error:
            self._failure = _failure(error, self._path)

    def end(self) -> "None":
        """Goes no further."""
        self._loop.cancel(self._go_on)
        self._steps.close()


class Publisher:
    """Has the outputs written while the daemon serves; counts what is decided.  `forks`: a child
    writes."""

    def __init__(self, loop: "Loop", log: "Log", table: "LockTable", counts: "Counts",
                 outputs: "List[Any]", forks: "bool" = True):
        self.counts = counts
        self._forks = forks
        self._loop, self._log = loop, log
        self._table = table
        self._writer: "Child | Portions | None" = None  # that is at work
        self._written = 0  # versions of all outputs so far
        self._late: "List[Any]" = []  # outputs to be written when it has ended
        self._acts = {output: functools.partial(self._publish, output) for output in outputs}

    def begin(self) -> "None":
        """Publishes the first versions."""
        for publish in self._acts.values():
            publish()

    def note(self, decision: "Decision") -> "None":
        """Counts a decision."""
        request = self._table.requests.get(decision.session)
        self.counts.note(decision.verdict, request, self._loop.now)
        self.changed()

    def changed(self) -> "None":
        """What follows changes is to be written again, but not more often than it may."""
        for output, publish in self._acts.items():
            if output.follows_changes:
                self._loop.within(output.pause, publish)

    def _publish(self, output):
        """Has it written, now or as soon as the writer that is at work has ended."""
        if not output.follows_changes:
            self._loop.after(output.pause, self._acts[output])
        if self._writer is not None:
            if output not in self._late:
                self._late.append(output)
            return
        self._written += 1
        if not self._forks:
            self._writer = Portions(self._loop, output, self._written, self._ended)
            return
        act = functools.partial(_try_to_write, output, self._written)
        try:
            self._writer = Child(self._loop, act, self._ended)
        except OSError as error:
            self._ended(_failure(error, output.path))

    def _ended(self, failure):
        self._writer = None
        if failure:
            self._log.limited(failure, "error")
        if self._late:
            output = self._late.pop(0)
            self._publish(output)

    def stop(self) -> "None":
        """Another one publishes from now on."""
        for publish in self._acts.values():
            self._loop.cancel(publish)
        if self._writer is not None:
            self._writer.end()

    def close(self) -> "None":
        """Removes what was published, and what is about to be."""
        self.stop()
        for output in self._acts:
            output.remove()


def _failure(error, path):
    return f"cannot write {error.filename or path}: {error.strerror}"


def _try_to_write(output, number):
    """In a child: writes; returns what went wrong."""
    try:
        for _ in output.steps(number):
            pass
    except OSError as error:
        return _failure(error, output.path)
    return ""


# --- Daemonize ----------------------------------------------------------------------------------
# How the process that is started becomes a daemon.  It forks twice, waits until its grandchild
# serves, and ends with the status that the grandchild tells it: so whoever starts a daemon knows
# when the command ends that the daemon listens.
#
#     starter      the process that was started
#     daemon       its grandchild, or with -f the starter itself
#
# The daemon keeps of the starter only stderr, until it serves, for the one line that says why it
# cannot.  Whatever else the starter had (files, signals, the current directory) is left behind.


class Starter:
    """The process that waits for the daemon.  `pipe` is the descriptor on which it waits."""

    def __init__(self, pipe: "int"):
        self._pipe = pipe

    def tell(self, status: "int") -> "None":
        """Ends the starter with this exit status, and lets go of its stderr.  A starter that was
        killed meanwhile is not told: clients may have found the daemon already."""
        os.dup2(0, 2)  # first, since the starter may look as soon as it is told
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe, str(status).encode())
        os.close(self._pipe)


class NoStarter:
    """With -f nobody waits for the daemon."""

    def tell(self, status: "int") -> "None":
        """There is nobody to be told."""


def detach() -> "Starter":
    """Goes on in a detached process.  0, 1 and 2 must be open: the pipe takes the lowest numbers
    that are free.  Raises CannotServe."""
    with serving("cannot detach"):
        reader, writer = os.pipe()
        child = os.fork()
    if child:
        os.close(writer)
        _wait_as_starter(reader, child)
    os.setsid()
    with serving("cannot detach"):
        child = os.fork()
    if child:
        os._exit(0)
    os.chdir("/")
    os.umask(0o022)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    close_files(keep=writer)
    return Starter(writer)


def _wait_as_starter(pipe, child):
    """Ends this process with the status that comes through the pipe; 1 when none comes."""
    status = os.read(pipe, 4) or b"1"
    os.waitpid(child, 0)
    os._exit(int(status))


def open_standard_files() -> "None":
    """What the starter has closed of stdin, stdout and stderr becomes /dev/null."""
    number = os.open(os.devnull, os.O_RDWR)
    while number <= 2:
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def forget_signals() -> "None":
    """Whatever the starter ignored or blocked, the daemon begins with the defaults; but a write
    that fails is an error, no reason to die."""
    for number in range(1, signal.NSIG):
        with contextlib.suppress(OSError, ValueError):
            if signal.getsignal(number) == signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def notify(text: "str") -> "None":
    """Tells systemd (sd_notify(3)), where it waits to be told.  A text is one line: in another one
    whoever has written what is told could tell systemd anything."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    if path.startswith("@"):
        path = "\0" + path[1:]  # an abstract name
    with contextlib.suppress(OSError):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messenger:
            messenger.setblocking(False)
            messenger.sendto(visible(text[:LONGEST_TEXT]).encode(), path)


# --- Options ------------------------------------------------------------------------------------
# What the daemon is told.  The settings come from the files, which clients read, too, and from the
# command line; what concerns nobody but a daemon is an option alone.

ADDRESSES = ("SocketName", "UnicastAddress", "MulticastAddress")
LIMIT_OF_OBJECTS = Number(1, 999999999)


class FixedPath(Path):
    """The name of a file, made absolute: the daemon leaves the current directory."""

    def read(self, text):
        return self.write(super().read(text))


class LogTarget(FixedPath):
    """Where to log: a word, or a file."""

    def read(self, text):
        if text in ("syslog", "stderr"):
            return text
        return super().read(text)


def read_options(arguments: "list") -> "types.SimpleNamespace":
    """What the command line says; raises UsageError.

    A namespace with the options that are no settings, and `given`, the texts of settings.
    """
    options = types.SimpleNamespace(
        foreground=False, config_file=None, no_files=False, check_config=False, pid_file=None,
        metrics=None, log=None, log_level="info", max_clients=None, max_waiters=None,
        etcd_new_cluster=False, given={})
    words = make_parser(options).parse(arguments)
    if words:
        raise UsageError(f"{words[0]!r} is not an option")
    return options


def make_parser(options: "types.SimpleNamespace") -> "Parser":
    """The parser that fills these options."""
    parser = Parser("flomd [OPTION]...", Lifespan=-1)
    group = "Running"
    file = FixedPath("FILE", "a file name")
    log = LogTarget("FILE|syslog|stderr", "a file name")
    level = Words(*LEVELS)

    def keep(name, type, help):
        attribute = name.replace("-", "_")
        parser.add(group, [f"--{name}"], help, keeping(options, attribute, type), type.hint)

    add_basics(parser, options, "flomd")
    parser.add(group, ["-f", "--foreground"], "do not detach, log to stderr",
               switching(options, "foreground"))
    parser.add(group, ["--no-files"], "read no configuration file", switching(options, "no_files"))
    parser.add("General", ["--check-config"], "read the configuration, report every problem",
               switching(options, "check_config"))
    keep("pid-file", file, "where to write the pid")
    keep("metrics", file, "where to write figures for Prometheus")
    keep("log", log, "where to log (default syslog, with -f stderr)")
    keep("log-level", level, "what to log (default info)")
    keep("max-clients", LIMIT_OF_OBJECTS, "limit of connections")
    keep("max-waiters", LIMIT_OF_OBJECTS, "limit of waiting requests")
    parser.add(group, ["--etcd-new-cluster"], "take the etcd cluster for the right one",
               switching(options, "etcd_new_cluster"))
    add_settings(parser, DAEMON, options.given)
    return parser


def fill_settings(settings: "Settings", options: "types.SimpleNamespace"):
    """Fills settings from the files and the command line; raises UsageError.

    The files that clients read, too, may name another daemon: an address in them counts only where
    no other place names one.
    """
    if not options.no_files:
        settings.read_files()
    of_clients = {key: settings.values.pop(key) for key in ADDRESSES if key in settings.values}
    if options.config_file is not None:
        settings.read_file(options.config_file, required=True)
    settings.take_options(options.given)
    if not any(key in settings.values for key in ADDRESSES):
        settings.values.update(of_clients)
    if options.etcd_new_cluster and not settings["EtcdUrls"]:
        settings.wrong("--etcd-new-cluster: wants --etcd")


def check_announced(settings: "Settings") -> "None":
    """Raises UsageError for an address that a group cannot use."""
    address = settings["UnicastAddress"]
    if settings["MulticastAddress"] and is_loopback(address):
        raise UsageError(f"{settings.origins['UnicastAddress']}: {address!r} is not an address "
                         "that the other hosts of a group can reach")


# A quorum is init's: its daemons serve at fixed addresses, and their memory lies in etcd.
NOT_WITH_ETCD = {  # and why
    "SocketName": "a quorum serves other hosts",
    "StateDir": "the memory is kept in etcd",
    "RecoveryWindow": "the memory is kept in etcd",
}
WANTED_WITH_ETCD = ("EtcdPrefix", "UnicastAddress")
PAIRS_FOR_ETCD = (("EtcdUser", "EtcdPasswordFile"), ("EtcdCertificate", "EtcdPrivateKey"))


def check_quorum(settings: "Settings") -> "None":
    """Raises UsageError for settings that --etcd excludes or needs, and those that need it."""
    if not settings["EtcdUrls"]:
        _check_no_quorum(settings)
        return
    origins = settings.origins
    urls = origins["EtcdUrls"]
    if has_inherited_sockets():
        settings.wrong(f"{urls}: not together with LISTEN_FDS: a candidate does not listen")
    for key, why in NOT_WITH_ETCD.items():
        if settings[key] is not None:
            settings.wrong(f"{origins[key]}: not together with {urls}: {why}")
    for key in WANTED_WITH_ETCD:
        if settings[key] is None:
            settings.wrong(f"{urls}: wants {_option_of(key)}")
    for pair in PAIRS_FOR_ETCD:
        given = [key for key in pair if settings[key]]
        if len(given) == 1:
            first, second = map(_option_of, pair)
            settings.wrong(f"{origins[given[0]]}: {first} and {second} want each other")
    if settings["UnicastAddress"]:
        _check_own_address(settings)


def _check_no_quorum(settings):
    for setting in SETTINGS:
        if setting.group == "Quorum" and setting.key in settings.origins:
            settings.wrong(f"{settings.origins[setting.key]}: wants --etcd")


def _option_of(key):
    """The long option of a setting."""
    for setting in SETTINGS:
        if setting.key == key:
            return f"--{setting.long}"
    raise KeyError(key)


def _check_own_address(settings):
    """Others find this daemon at its address, and at no other."""
    address = settings["UnicastAddress"]
    origin = settings.origins["UnicastAddress"]
    if "," in address:
        settings.wrong(f"{origin}: {address!r} is not the one address at which this host serves")
    elif _is_wildcard(address):
        settings.wrong(f"{origin}: {address!r} is not an address at which others find this host")


def _is_wildcard(address):
    """Whether this is the address of all interfaces, in whatever way it is written."""
    with contextlib.suppress(OSError):
        return not any(socket.inet_aton(address))  # 0 and 0.0, too
    with contextlib.suppress(OSError):
        number = int.from_bytes(socket.inet_pton(socket.AF_INET6, address), "big")
        return number in (0, 0xffff << 32)  # as one of IPv6, that of IPv4
    return False


def check_files_for_etcd(settings: "Settings") -> "None":
    """Raises UsageError where what --etcd needs cannot be read."""
    if settings["EtcdUrls"]:
        check_access(access_of(settings))


def is_loopback(host) -> "bool":
    """Whether the name or number, if any, leads to this host alone."""
    import ipaddress
    if not host:
        return False
    found = []
    with contextlib.suppress(OSError, UnicodeError):
        found = socket.getaddrinfo(host, None, 0, socket.SOCK_STREAM)
    for *_, address in found:
        number, _, _ = str(address[0]).partition("%")
        if not ipaddress.ip_address(number).is_loopback:
            return False
    return bool(found)


# --- Terms --------------------------------------------------------------------------------------
# The life of a daemon of a quorum, see Quorum: a candidate, then perhaps the leader, then a
# candidate again.  The rules are there; here they meet the loop, etcd and the clients.
#
# Words.  The campaign: all of it, from the start of the process to its end.  A term: what there is
# while this daemon leads, the table, the connections and whatever is made of them.  A stage: a
# candidate, or a leader that loads the memory, serves, or resigns; there is one at a time.
#
#     candidate    it reads the record; its address is bound, and refuses clients
#     loads        its claim was confirmed; it reads the memory and restores it, in portions
#     serves       clients find it; a Term
#     resigns      it has handed over: the record becomes free, and then the process ends
#
# Deposed.  Nothing of a term is left: its connections are reset, its table, its store and all that
# knows them are thrown away, and the thread that asks etcd gives way to another one.  So whatever
# was on its way, an answer of etcd, a request of a client, a date, finds nobody.
#
# The order in a turn of the loop.  First the present is looked at: where the deadline has passed
# the daemon is deposed, before it hears anybody.  What etcd answers is judged by the time at which
# it is heard, and whatever it allows to be told is told at once.
#
# A memory that cannot be.  Who cannot believe what he reads must not serve: an empty table would
# grant what others hold.  So the daemon resigns, says so, and does not claim for REJECTED_FOR s;
# another one may be of a version that can read it, or somebody may mend it.

RESTORED_AT_ONCE = 0.05  # s of a turn for the memory; then the others come
DECODED_AT_ONCE = 500  # keys, between two looks at the clock
REJECTED_FOR = 60  # s in which it does not claim after it could not read the memory
LAST_BEAT = 2  # s that the end waits for etcd
STATUS_PAUSE = 5  # s between two lines of status for the init system
LASTING = 1  # s for which something is wrong until it is told
CANDIDATE, LEADER = "candidate", "leader"  # roles, for people


class EtcdStore:
    """The store of a leader, in place of a Disk.  act() is called when there is something for
    etcd; `leader` is the Leader, whose memory is restored.

    After close() nothing is stored and nobody is called.
    """
    kind = IN_ETCD
    failing = ""
    marked = False  # the memory knows everybody who can hold a lock

    def __init__(self, loop: "Loop", leader: "Leader", act: "Act"):
        self.epoch = leader.epoch
        self._loop = loop
        self._leader = leader
        self._act = act
        self._is_open = True

    def close(self) -> "None":
        """The daemon leads no more, or is about to end."""
        self._is_open = False

    def commit(self, records: "Iterable[Tuple[str, str | None]]", done: "Act") -> "bool":
        """Stores a batch of records.  done() is called when etcd has confirmed it."""
        if self._is_open:
            self._leader.write(stored(records), done)
            self._act()
        return True

    def confirm(self, done: "Act") -> "None":
        """done() is called when it is certain that nobody else led at this instant."""
        self.commit((), done)

    def ping(self, done: "Act") -> "None":
        """As confirm(), but it can wait for a beat, which many share."""
        if self._is_open:
            self._leader.ping(done, self._loop.now)
            self._act()

    def may_tell(self) -> "bool":
        """Whether this daemon leads at this very instant, by its clock."""
        if not self._is_open:
            return False
        if not self._leader.look(Moment()):
            self.close()
            self._loop.at_end_of_turn(self._act)
        return self._is_open

    def away(self, now: "Moment") -> "float":
        """s for which etcd has not answered."""
        return self._leader.unanswered_for(now)

    def mark(self, held: "bool") -> "bool":
        """There is no mark, and no need of one."""
        return True

    def cover(self, token: "int") -> "bool":
        """The epoch becomes that of a token which is to be told; the record has it when what is
        told is stored."""
        self.epoch = token >> 32
        self._leader.epoch = self.epoch
        return True

    def ping_for(self) -> "int":
        """ms between two pings that clients are to send."""
        return ping_interval(self._leader.record.ttl)

    def grace_for(self, kill: "int") -> "int":
        """ms for which a lock is kept for an absent client."""
        return grace_for(self._leader.record.ttl, kill)


class Term(Daemon):
    """The parts of a daemon that leads, and how they end: by its campaign alone."""

    def __init__(self, campaign: "Campaign", disk: "Any", table: "LockTable",
                 connections: "Connections"):
        super().__init__(campaign.settings, campaign.log, campaign.pair, disk, table, connections)
        self._campaign = campaign

    def listening(self) -> "str":
        """Where clients find it, in one line."""
        labels = super().listening()
        if self._campaign.member is not None:
            labels += f" {self._campaign.member.label}"
        return labels

    def about(self) -> "list":
        """What the head of a status report says, as attributes."""
        return self._campaign.about()

    def figures(self) -> "list":
        """What --metrics says of the quorum."""
        return self._campaign.figures()

    def was_used(self) -> "None":
        """It stays, whether anybody needs it or not."""

    def rest(self) -> "None":
        """It stays."""

    def stop_by_order(self, connection: "Connection") -> "None":
        """Hands over."""
        self._campaign.hand_over(f"the order came from {connection.peer}")

    def quiesce(self) -> "None":
        """Hands over: its clients find the next leader."""
        self._campaign.hand_over("it was told to end")

    def drain(self, reason: "str") -> "None":
        """It is not the one that has to go."""

    def abandon(self) -> "None":
        """It leads no more: nobody is told anything."""
        self.disk.close()
        self.server.abandon()
        self.hide()

    def resign(self) -> "None":
        """It is about to lead no more: nobody is heard."""
        self.server.hand_over()
        self.disk.close()
        self.hide()


class EmptyTerm:
    """What a candidate publishes in place of a Term: an empty table, and the figures."""
    kind = IN_ETCD
    failing = ""
    epoch = 0

    def __init__(self, campaign: "Campaign", table: "LockTable"):
        self.loop, self.log = campaign.loop, campaign.log
        self.figures = campaign.figures
        self.table = table
        self.disk = self
        self.connections = ()


class Notices:
    """What a candidate tells people of the leader that it sees, each thing once."""

    def __init__(self, quorum: "Quorum", log: "Log"):
        self._quorum = quorum
        self._log = log
        self._term: "str | None" = None  # that was seen last
        self._trouble = ""  # without its numbers
        self._trouble_at = NEVER  # s, boot: when it is told

    def see(self, candidate: "Candidate", now: "Moment") -> "None":
        """It has looked at the record."""
        self._see_trouble(candidate.trouble, now)
        record = candidate.record
        if record is None or record.term == self._term:
            return
        self._term = record.term
        if is_free(record):
            self._log.info("nobody leads")
            return
        if record.daemon == self._quorum.mine.daemon:
            return  # it was deposed, and has said so
        self._log.info(f"{record.host} leads, at {record.address}, in cluster "
                       f"{self._quorum.cluster.id}, term {record.term}")
        self._compare(record)

    def _see_trouble(self, trouble, now):
        """It is told when it lasts: what is read in two steps can change in between.  With other
        numbers, such as a revision, it is the same."""
        kind = re.sub("[0-9]+", "", trouble)
        if kind != self._trouble:
            self._trouble = kind
            self._trouble_at = now.boot + LASTING
        if trouble and now.boot >= self._trouble_at:
            self._trouble_at = NEVER
            self._log.error(f"{trouble}; this daemon does not claim")

    def _compare(self, record):
        """Daemons that take turns should be alike."""
        mine = self._quorum.mine
        for name in ("policy", "ttl"):
            theirs, ours = getattr(record, name), getattr(mine, name)
            if theirs != ours:
                self._log.error(f"{record.host} leads with {name} {theirs}, and this daemon would "
                                f"with {ours}: they should be alike")
        if record.version not in ("", mine.version):
            self._log.info(f"{record.host} leads with version {record.version}, and this daemon "
                           f"has {mine.version}: that is for the time of an upgrade")


# Python's collector looks now and then whether objects that refer to each other in a circle can
# go.  Where there are many that stay, that lasts longer than a turn of the loop may.
USUAL_THRESHOLDS = (700, 10, 10)  # see gc; those of Python until 3.12


def kept_from_collector(steps: "Iterator[None]") -> "Iterator[None]":
    """The same steps: the collector does not look at what they have made before collect()."""
    import gc
    gc.disable()
    try:
        yield from steps
        if hasattr(gc, "freeze"):  # Python 3.7 and later
            gc.freeze()
    finally:
        gc.enable()


def start_is_over() -> "None":
    """What a start has made stays, and Python looks at the rest as often as it does by itself."""
    import gc
    if hasattr(gc, "freeze"):
        gc.freeze()
    gc.set_threshold(*USUAL_THRESHOLDS)


def collect() -> "None":
    """Frees what a term has left."""
    import gc
    if hasattr(gc, "unfreeze"):
        gc.unfreeze()
    gc.collect()


class Campaign:
    """A daemon of a quorum, from its start to its end.

    `pair` is (ms since 1970 at which it began, its id); `listener` has the address; `quorum` what
    it keeps from one term to the next, of which `file` notes the cluster.  make_table(epoch),
    make_connections() and make_publisher(term) make what a term needs; there may be nothing to be
    published, None.  Raises CannotServe.
    """
    status = 0  # of the process

    def __init__(self, settings: "Settings", log: "Log", loop: "Loop", pair: "tuple",
                 quorum: "Quorum", file: "ClusterFile", listener: "TermListener",
                 group: "Group | None", make_table: "Callable", make_connections: "Callable",
                 make_publisher: "Callable"):
        self.settings = settings
        self.log = log
        self.loop = loop
        self.pair = pair
        self.term: "Term | None" = None
        self._quorum = quorum
        self._file = file
        self._listener = listener
        self._make_table = make_table
        self._make_connections = make_connections
        self._make_publisher = make_publisher
        access = access_of(settings)
        self._etcd = Etcd(loop, log, access)
        self._house = Housekeeping(loop, log, access, quorum.prefix, settings["EtcdCompact"])
        self._asker: "Any" = None  # the Candidate or Leader; None: neither
        self._asked_at = 0.0  # s, boot
        self._latency = 0.0  # s, of the last transaction
        self._connections: "Any" = None  # those of the next term
        self._steps: "Any" = None  # of the memory that is restored
        self._table: "Any" = None  # that is restored
        self._publisher: "Publisher | None" = None
        self._damage = ""  # why it cannot believe the memory
        self._obstacle = ""  # why it cannot be a candidate
        self._end_reason = ""  # why it is to end
        self._notices = Notices(quorum, log)
        self.member: "QuorumMember | None" = None  # of its group
        if group is not None:
            self.member = QuorumMember(loop, log, group, self.leading_record)
        self._peer_id = machine_id()

    # The beginning and the end.

    def begin(self) -> "None":
        """Becomes a candidate.  Raises CannotServe."""
        self.loop.look_first(self._look_first)
        with serving("cannot ask etcd"):
            self._house.start()
            self._etcd.start()
        self._connections = self._make_connections()
        self._publish(self._empty_term())
        self._stand()
        self._tell_status()

    def run(self) -> "None":
        """Until it is told to end."""
        self.loop.run()

    def greeting(self) -> "str":
        """A line for the log."""
        quorum = self._quorum
        return (f"candidate at {self._listener.label}, for {quorum.prefix} in etcd at "
                f"{' '.join(quorum.members.urls)}")

    def stop_by_signal(self, name: "str") -> "None":
        """Hands over."""
        self.hand_over(f"it got {name}")

    def quiesce(self) -> "None":
        """Hands over, as any signal lets it."""
        self.hand_over("it got SIGUSR1")

    def hand_over(self, reason: "str") -> "None":
        """Ends, so that another daemon can serve at once."""
        if self._end_reason:
            return
        self._end_reason = reason
        self.log.info(f"ending: {reason}")
        self.loop.after(LAST_BEAT, self._end)
        asker = self._asker
        if isinstance(asker, Leader):
            self._resign()
        elif asker is None or asker.deadline == NEVER:
            self._end()
        # else a claim is on its way, which may be done

    def _resign(self):
        if self.term is not None:
            self.term.resign()
        self._house.follow()
        self._steps = None
        self._asker.resign()
        self._go_on()

    def _end(self):
        """From now on nothing is done."""
        if isinstance(self._asker, Leader) and not is_free(self._asker.record):
            seconds = self._asker.times.ttl
            self.log.error(f"etcd does not answer; another daemon serves in {seconds:.0f} s")
        if self.term is not None:
            self.term.server.end_in_order()
        self._asker = None
        self.loop.stop()

    def close(self) -> "None":
        """The last acts of the process, which ends the connections."""
        self._file.finish(self._quorum.cluster)
        if self._publisher is not None:
            self._publisher.close()
        if self.member is not None:
            self.member.close()

    # Asking.

    def _look_first(self):
        """The deadline may have passed while this process, or its host, was stopped."""
        asker = self._asker
        if asker is not None and not asker.look(self.loop.now):
            self._change()

    def _go_on(self):
        """Has etcd asked what is to be asked now."""
        now = Moment()
        asker = self._asker
        if asker is None:
            return
        if not asker.look(now):  # the next turn begins with the change
            self.loop.after(0, self._go_on)
            return
        request = asker.next_request(now)
        if request is not None:
            self._asked_at = now.boot
            hear = functools.partial(self._hear, asker)
            self._etcd.ask(self._quorum.members.current, request, asker.times.copy, hear)
        date = asker.next_date()
        self.loop.at(now.mono + date - now.boot, self._go_on)

    def _hear(self, asker, answer):
        """A bug, or a record that nobody has foreseen, must not leave it for ever without a next
        step."""
        self.loop.guarded(self._go_on_after_bug, self._take, asker, answer)

    def _go_on_after_bug(self):
        """A candidate begins anew.  A leader is deposed at its deadline."""
        if not isinstance(self._asker, Leader):
            self._asker = None
            self.loop.after(PAUSE, self._prepare)

    def _take(self, asker, answer):
        """The answer of etcd.  It came before this instant, which counts, and not after it."""
        now = Moment()
        if asker is not self._asker:
            return
        if not asker.look(now):
            self._change()
            return
        before = asker.changes
        told = asker.answer(answer, now)
        if asker.changes > before:
            self._etcd.saw_change()
        self._file.write(self._quorum.cluster)
        if isinstance(asker, Leader):
            self._latency = now.boot - self._asked_at
        if not self._end_reason:
            for done in told:
                self.loop.guarded(nothing, done)
        self._understand(asker)

    def _understand(self, asker):
        """What follows from what was heard."""
        if asker is not self._asker:
            return
        if asker.end_reason:
            self._change()
            return
        if isinstance(asker, Candidate):
            self._notices.see(asker, Moment())
            if self._end_reason and asker.deadline == NEVER:
                self._end()
        elif asker.stage == LOADS and asker.is_loaded() and self._steps is None:
            self._steps = kept_from_collector(self._restoring(asker))
            self._restore()
        self._go_on()

    # The stages.

    def _change(self):
        """What it was is over."""
        asker = self._asker
        self._asker = None
        self.loop.cancel(self._go_on)
        if isinstance(asker, Candidate):
            if asker.leader is not None:
                self._load(asker.leader)
                return
            if not self._etcd.refusal:  # which was told
                self.log.limited(f"the claim failed: {asker.end_reason}; "
                                 "this daemon stays a candidate")
        elif asker.stage != RESIGNS or not is_free(asker.record):
            self._drop_term()
            self.log.error(asker.end_reason)
        elif not self._end_reason:
            self._drop_term()
        if self._end_reason:
            self._end()
        else:
            self._begin_anew()

    def _drop_term(self):
        """Deposed: the term is gone, whatever was going on."""
        self._house.follow()
        self._steps = None
        self._table = None
        term = self.term
        self.term = None
        if term is not None:
            term.abandon()

    def _begin_anew(self):
        """With another thread, and connections that nobody knows."""
        self._etcd.stop()
        self.loop.after(0, collect)
        pause = REJECTED_FOR if self._damage else 0
        self.loop.after(pause, self._prepare)
        self._show(self._empty_term())

    def _prepare(self):
        """Gets what a candidate and its next term need.  The system may refuse it, or the files of
        TLS are just replaced: then it is tried again."""
        before, self._obstacle = self._obstacle, ""
        try:
            with serving("cannot ask etcd"):
                self._etcd.start()
            if self._connections is None:
                self._connections = self._make_connections()
        except CannotServe as error:
            self._obstacle = f"{error}; this daemon does not claim"
        if not self._obstacle:
            self._stand()
            return
        self.loop.after(PAUSE, self._prepare)
        if self._obstacle != before:
            self.log.error(self._obstacle)

    def _empty_term(self):
        """What is to be published while it does not serve."""
        return EmptyTerm(self, self._make_table(0))

    def _stand(self):
        """A candidate, in a cluster that may be used."""
        self._damage = ""
        if self._house.refusal:
            self.loop.after(POLL, self._stand)
            return
        if not self._house.knows_version():
            self._ask_version()
            return
        self._asker = Candidate(self._quorum, Moment())
        self._go_on()

    def _ask_version(self):
        """No member has told its version: they are asked in turn, so that the log says why."""
        url = self._quorum.members.current
        seconds = Times(self._quorum.mine.ttl).copy
        self._etcd.ask(url, Version(), seconds, self._hear_member)

    def _hear_member(self, answer):
        if answer.outcome == DONE:
            self._quorum.members.answered()
        else:
            self._quorum.members.turn()
        self.loop.after(POLL, self._stand)

    def _load(self, leader):
        """Its claim was confirmed: it leads, and serves when it knows the memory."""
        self._asker = leader
        if self._end_reason:
            self._resign()
        else:
            self._go_on()

    def _restoring(self, leader):
        """Makes the table of what was read; yields now and then."""
        records: "Dict[str, str]" = {}
        loaded = iter(leader.loaded)
        while True:
            entries = list(itertools.islice(loaded, DECODED_AT_ONCE))
            if not entries:
                break
            records.update(remembered(entries))
            yield
        leader.loaded = []
        tokens = [int(key[len(OF_HOLDER):], 16) for key in records if key.startswith(OF_HOLDER)]
        leader.epoch = epoch_after(epoch_of_the_clock(), leader.record, tokens)
        table = self._table = self._make_table(leader.epoch)
        name_of = self._connections.users.name
        yield from restoring(records, table, Moment(), False, name_of, moved=True)

    def _restore(self):
        """A portion of it; the beats come between two."""
        if self._steps is not None:
            self.loop.guarded(self._reject_memory, self._restore_portion)

    def _restore_portion(self):
        until = time.monotonic() + RESTORED_AT_ONCE
        try:
            for _ in self._steps:
                if time.monotonic() >= until:
                    self.loop.after(0, self._restore)
                    return
        except BrokenMemory as error:
            self._reject_memory(str(error))
        else:
            self._serve(self._asker)

    def _reject_memory(self, reason="a bug"):
        """An empty table would grant what others hold."""
        self._damage = f"the memory below {self._quorum.prefix} in etcd is damaged: {reason}"
        self.log.error(f"{self._damage}; not to serve is better than to grant what others hold")
        self._table = None
        self._resign()

    def _serve(self, leader):
        """The memory is restored: clients may come."""
        table = self._table
        self._steps = None
        self._table = None
        leader.lead(leader.epoch)
        term = self.term = self._make_term(leader, table)
        try:
            self._listener.begin(term.connections.welcome, term.connections.has_room)
        except CannotServe as error:
            self.status = 1
            self.log.error(str(error))
            self.hand_over("it cannot serve")
            return
        term.ways.append(self._listener)
        self._house.lead(self._quorum)
        seconds = Moment().boot - leader.claimed_at
        self.log.info(f"serving {term.listening()}, in cluster {self._quorum.cluster.id}, term "
                      f"{leader.record.term}; {table.holding} holders were taken over in "
                      f"{seconds:.1f} s")
        self._show(term)
        term.server.publisher = self._publisher

    def _make_term(self, leader, table):
        """A term of the leader, with the table that was restored; nobody can connect yet."""
        store = EtcdStore(self.loop, leader, self._go_on)
        table.cover((store.epoch + 1 << 32) - 1)
        table.know_all()
        Session.introduce(self._peer_id, self.pair[1], store.ping_for())
        connections = self._connections
        self._connections = None
        term = Term(self, store, table, connections)
        term.server.absences.begin_term(leader.claimed_at, self._quorum.mine.grace)
        return term

    def _show(self, term):
        """From now on what is published is that of the term."""
        try:
            self._publish(term)
        except CannotServe as error:
            self.log.error(str(error))
        self._tell_status()

    def _publish(self, term):
        """Raises CannotServe."""
        if self._publisher is not None:
            self._publisher.stop()
            self._publisher = None
        self._publisher = self._make_publisher(term)
        if self._publisher is not None:
            self._publisher.begin()

    # For people.

    def _tell_status(self):
        """To the init system, now and every few s."""
        self.loop.after(STATUS_PAUSE, self._tell_status)
        notify(f"STATUS={self._status()}")

    def _status(self):
        asker = self._asker
        if isinstance(asker, Leader):
            return (f"{LEADER}, term {asker.record.term}; {self._house.reachable} members of etcd "
                    f"answer in {self._latency * 1000:.0f} ms; {self._left():.0f} s are left")
        record = self._record()
        if self._trouble():
            return f"{CANDIDATE}; {self._trouble()}"
        if record is None:
            return f"{CANDIDATE}; etcd tells of no leader"
        if is_free(record):
            return f"{CANDIDATE}; nobody leads"
        leads = f"{record.host} leads at {record.address}, its record is"
        if self._is_own(record):
            leads = "nobody leads, the last record is its own,"
        return f"{CANDIDATE}; {leads} {self._age():.0f} s old"

    def _is_own(self, record):
        """Whether this daemon has written it: a candidate that was deposed can see it still."""
        return record.daemon == self._quorum.mine.daemon

    def _record(self):
        """The leader record that was read or confirmed last; None: none is known."""
        if self._asker is None:
            return None
        return self._asker.record

    def leading_record(self) -> "Record | None":
        """The record of the daemon that leads, as far as it is known: a candidate has seen it
        within its ttl."""
        record = self._record()
        if record is None or is_free(record) or self._age() > record.ttl / 1000:
            return None
        if self.term is None and self._is_own(record):
            return None  # it does not serve yet, or not any more
        return record

    def _age(self):
        """s since the record was seen to change."""
        asker, now = self._asker, Moment()
        if isinstance(asker, Leader):
            return now.boot - asker.confirmed_at
        if asker is None or asker.record is None:
            return 0.0
        return now.boot - asker.seen_at

    def _left(self):
        """s to the deadline of a leader."""
        if not isinstance(self._asker, Leader):
            return 0.0
        return max(0.0, self._asker.deadline - Moment().boot)

    def figures(self) -> "list":
        """What --metrics says of the quorum, as rows for metrics()."""
        record, host = self._record(), {}
        if record is not None and not is_free(record):
            host[f'{{host="{label_value(record.host)}"}}'] = 1
        leads = int(self.term is not None)
        return [
            ("leads", "gauge", "1 while this daemon serves its quorum.", {"": leads}),
            ("leader", "gauge", "The host of the daemon that leads.", host),
            ("record_age_seconds", "gauge", "Time since the leader record was seen to change.",
             {"": f"{self._age():.3f}"}),
            ("deadline_seconds", "gauge", "Time until it ceases to lead, without etcd.",
             {"": f"{self._left():.3f}"}),
            ("etcd_members", "gauge", "Members of etcd that answered when they were asked last.",
             {"": self._house.reachable}),
            ("etcd_trouble", "gauge", "1 while somebody has to do something about etcd.",
             {"": int(self._trouble() != "")}),
            ("etcd_latency_seconds", "gauge", "Time that etcd took for the last transaction.",
             {"": f"{self._latency:.6f}"}),
        ]

    def about(self) -> "list":
        """Of a leader, as attributes for the head of a status report: `members` that answer, ms of
        the last beat, ms that are left to the deadline."""
        record = self._record() or self._quorum.mine
        return [
            ("role", LEADER),
            ("leader", self._quorum.mine.host),
            ("term", record.term),
            ("members", self._house.reachable),
            ("latency", round(self._latency * 1000)),
            ("left", round(self._left() * 1000)),
            ("trouble", plain(self._trouble()) or None),
        ]

    def _trouble(self):
        """What somebody has to do something about, "" for nothing."""
        asker = self._asker
        found = self._damage or self._obstacle or self._house.refusal or self._house.trouble
        if isinstance(asker, Candidate):
            found = found or asker.trouble
        if asker is not None and asker.unanswered_for(Moment()) > LASTING:
            found = found or self._etcd.trouble
        found = found or self._etcd.refusal
        return found


# --- Main ---------------------------------------------------------------------------------------
# The life of a daemon from its command line to its end.
#
# The order in which it begins:
#
#     1. It is elected in its group, if it has one.
#     2. It takes the lock of its state: from now on it is alone at its socket or its address.
#     3. It writes its epoch, so that its tokens are greater than those of all daemons before it.
#     4. It listens.  Nothing is accepted yet.
#     5. It says that it serves: to the group, to its starter, to the init system.
#
# Whatever fails before 5 undoes what was done, and the starter ends with 1 or 3.

SHORT_WINDOW = 2  # s in which clients on this host come back
ACCEPTED = 0.5  # s until a daemon that answers has accepted a connection


def local_socket(settings: "Settings") -> "str | None":
    """The path of the UNIX socket to serve, None when the daemon is to serve an address alone."""
    if settings["SocketName"]:
        return settings["SocketName"]
    if _address(settings):
        return None
    return default_socket()


def _address(settings):
    """The address by which clients on other hosts know the daemon, if there is one."""
    return settings["UnicastAddress"] or settings["MulticastAddress"]


def _port(settings):
    if settings["UnicastAddress"]:
        return settings["UnicastPort"]
    return settings["MulticastPort"]


def _served(settings):
    """How a line for people names what the daemon serves."""
    local = local_socket(settings)
    return local or f"{_address(settings)} port {_port(settings)}"


# The state.  A local socket has its lock beside it.  The record is in the same file, unless
# --state-dir names another folder.

def state_paths(settings: "Settings") -> "tuple[str | None, str]":
    """(path of the lock beside the local socket, or None; path of the state)."""
    local = local_socket(settings)
    if local:
        guard = beside = f"{local}.lock"
    else:
        guard = None
        beside = f"{default_socket()}-{_address(settings)}-{_port(settings)}.lock"
    if not settings["StateDir"]:
        return guard, beside
    folder, name = os.path.split(beside)
    folder = os.path.realpath(folder)
    if local and os.path.realpath(settings["StateDir"]) == folder:
        return guard, beside
    return guard, os.path.join(settings["StateDir"], state_name(folder, name))


def state_name(folder: "str", name: "str") -> "str":
    """The name, in --state-dir, of the state that without it would be `name` in `folder`: there
    are several of one name."""
    import hashlib
    path = os.path.join(folder, name)
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()
    stem = name[:-len(".lock")]
    return f"{stem}-{digest[:16]}.lock"


def open_disk(settings, options, log, group):
    """(the State with the lock of the local socket, or None; the Disk), locked.  Raises
    CannotServe or SteppedBack when another daemon serves already."""
    beside, path = state_paths(settings)
    guard: "Any" = None
    if beside is not None:
        durable = bool(settings["StateDir"]) and path == beside
        guard = State(log, beside, shared=bool(settings["SocketName"]), durable=durable)
        guard = _locked(guard, settings, options, group)
    state = guard
    if path != beside:
        if guard is not None:
            name_owner(guard)
        state = open_state(settings, options, log, group, path)
    network = bool(_address(settings))
    other = guard if guard is not state else None
    return guard, Disk(log, state, journal_path(settings, state), network, other)


def open_state(settings, options, log, group, path):
    """The State at a path that is not beside the socket, locked."""
    shared, durable = bool(settings["SocketName"]), bool(settings["StateDir"])
    try:
        state = State(log, path, shared=shared and not durable, durable=durable)
    except CannotServe as error:
        if durable:
            raise
        log.error(f"{error}; nothing will be remembered")
        return State(log)
    return _locked(state, settings, options, group)


def name_owner(guard):
    """Writes into a file that is a lock alone who has it, for the messages of others.  The rest
    stays as it is until the journal is begun."""
    reason = failure_of(
        lambda: guard.write(guard.epoch, guard.boot, guard.marked, guard.had_journal))
    if reason:
        guard.log.error(f"cannot write {guard.path}: {reason}")


def journal_path(settings, state):
    """Where the journal is kept; None where none is: a group may have been served by another host
    since, and nothing is kept where there is no lock."""
    if state.is_nowhere():
        return None
    if settings["MulticastAddress"] and not settings["UnicastAddress"]:
        return None
    stem, _ = os.path.splitext(state.path)
    return f"{stem}.journal"


def _locked(state, settings, options, group):
    """The State, its lock taken; where there are no locks, one that remembers nothing."""
    def answers():
        return _somebody_answers(settings, group)
    try:
        waited = take(state, _served(settings), options.foreground, group is not None, answers)
    except OSError as error:
        state.log.error(f"cannot lock {state.path}: {error.strerror}; nothing will be remembered, "
                        "and nothing keeps a second daemon away")
        return State(state.log)
    if waited and group is not None:
        elect(group)  # who began meanwhile had no answer
    return state


def _somebody_answers(settings, group):
    """Whether a daemon serves already; raises SteppedBack when it serves the group."""
    local = local_socket(settings)
    if local:
        return listens(local)
    if group is not None:
        look_for_another(group)
        return False
    address = settings["UnicastAddress"], settings["UnicastPort"]
    with contextlib.suppress(OSError, UnicodeError):
        with socket.create_connection(address, ACCEPTED):
            return True
    return False


def make_table(settings, options, disk, name_of):
    """A lock table, with all that is known of the predecessor."""
    known = disk.recall()

    def ended(holder):
        disk.log.info(end_of_absent(holder, "the host was booted"))

    try:
        table = restore(known.records, lambda: _empty_table(settings, options, disk, known),
                        Moment(), known.rebooted, name_of, ended)
    except BrokenMemory as error:
        known = disk.disown(error)
        table = _empty_table(settings, options, disk, known)
    table.cover(disk.covered())
    if known.whole:
        table.know_all()
    return table


def _empty_table(settings, options, disk, known):
    """A lock table, for tokens of this daemon's epoch."""
    window = recovery_window(settings, known)
    window_until = None
    if window:  # it begins when the daemon serves
        window_until = time.monotonic() + window
        if disk.state.is_nowhere():
            window_until += 1  # see Disk.wait_for_epoch()
        disk.unknown_until = window_until
    first_fit = settings["Policy"] == "first-fit"
    return LockTable(first_fit, disk.epoch, window_until, options.max_waiters,
                     settings["MaxResources"])


def recovery_window(settings, known):
    """How long, in s, only former holders are granted; 0 for no window."""
    if known.whole:
        return 0
    if settings["RecoveryWindow"] is not None:
        return settings["RecoveryWindow"] / 1000
    if not known.unclean:
        return 0
    if not known.rebooted:
        return SHORT_WINDOW
    if _address(settings):  # clients on other hosts may not know yet that this one was booted
        return settings["TcpKeepaliveTime"] + settings["TcpKeepaliveIntvl"]
    return 0  # nobody on this host has survived its boot


def open_listeners(daemon, group, guard):
    """The daemon listens: on what it was given, else on its socket and its addresses."""
    for given in inherited_sockets():
        _listen(daemon, given)
    if not daemon.ways:
        _open_own_listeners(daemon, group, guard)
    if group is not None:
        announced_address(daemon.ways)  # there must be one


def _open_own_listeners(daemon, group, guard):
    settings = daemon.settings
    host, port = settings["UnicastAddress"], settings["UnicastPort"]
    if group is not None and not host:
        host, port = group.any_address(), settings.values.get("UnicastPort", 0)
    local = local_socket(settings)
    if local:
        connections = daemon.connections
        daemon.ways.append(LocalListener(
            daemon.loop, daemon.log, local, _socket_mode(settings), guard, connections.welcome,
            connections.has_room, daemon.drain))
    if host:
        _listen(daemon, tcp_socket(host, port, settings["NetworkInterface"]))


def _listen(daemon, bound):
    connections = daemon.connections
    daemon.ways.append(Listener(daemon.loop, daemon.log, bound, connections.welcome,
                                connections.has_room))


def _socket_mode(settings):
    """The permissions of the local socket: without an option everybody's where it has a name."""
    if settings["SocketMode"]:
        return settings["SocketMode"]
    if settings["SocketName"]:
        return 0o666
    return 0o600


def announced_address(ways):
    """The address of the socket on which clients of a group arrive; raises CannotServe."""
    for way in ways:
        if not way.local:
            return way.address
    raise CannotServe("a group needs a TCP socket, and LISTEN_FDS has none")


def make_publisher(settings, options, daemon):
    """The Publisher, who has tried where to publish; None when nothing is to be published.  Raises
    CannotServe."""
    table, counts = daemon.table, Counts()

    def figures():
        disk = daemon.disk
        return metrics(table, counts, len(daemon.connections), disk.epoch, bool(disk.failing),
                       daemon.figures())
    outputs = make_outputs(settings, options, table, figures)
    if not outputs:
        return None
    forks = daemon.disk.kind in (IN_FILE, NOT_KEPT)  # the others have a thread
    return Publisher(daemon.loop, daemon.log, table, counts, outputs, forks)


def make_outputs(settings, options, table, figures):
    """[output] of what is to be published; raises CannotServe where that cannot be."""
    outputs: "List[Any]" = []
    if settings["MountPointVFS"]:
        outputs.append(Tree(settings["MountPointVFS"], table))
    if options.metrics:
        outputs.append(MetricsFile(options.metrics, figures))
    for output in outputs:
        output.try_out()
    return outputs


def open_at_once(path, flags):
    """The opener of a file that may be a fifo, which nobody reads or writes."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def write_pid(path):
    """Writes the file of --pid-file; raises CannotServe."""
    with serving(f"cannot write {path}"):
        with open(path, "w", opener=open_at_once) as file:
            file.write(f"{os.getpid()}\n")


def remove_pid(path):
    """Removes the file of --pid-file, unless another daemon has written its own pid since."""
    with contextlib.suppress(OSError):
        with open(path, "rb", opener=open_at_once) as file:
            written = file.read(20)
        if written == b"%d\n" % os.getpid():
            os.unlink(path)


def prepare(settings, options, log):
    """A daemon that listens and is found; raises CannotServe or SteppedBack."""
    check_one_address(settings)
    pair = new_pair()
    with contextlib.ExitStack() as undo:  # what is open is closed when a later step fails
        group = join_group(settings, pair, undo)
        guard, disk = open_disk(settings, options, log, group)
        connections = Connections(Loop(log), log, settings, options.max_clients)
        table = make_table(settings, options, disk, connections.users.name)
        disk.begin(lambda: everything(table))
        Session.introduce(machine_id(), pair[1], disk.ping_for())
        daemon = Daemon(settings, log, pair, disk, table, connections)
        undo.callback(daemon.hide)
        Signals(daemon)  # before it listens: TERM then removes the socket
        publisher = make_publisher(settings, options, daemon)
        open_listeners(daemon, group, guard)
        if options.pid_file:
            undo.callback(remove_pid, options.pid_file)
            write_pid(options.pid_file)
        if not disk.kept:
            disk.wait_for_epoch()
            table.begin_with(disk.epoch)
        begin(daemon, group, guard, publisher)
        undo.pop_all()
    return daemon


def new_pair():
    """(ms since 1970, an id) for this run of the daemon."""
    return int(time.time() * 1000), os.urandom(8).hex()


# A daemon of a quorum.

def prepare_candidate(settings, options, log):
    """A candidate, which has its address; raises CannotServe."""
    pair = new_pair()
    loop = Loop(log)
    host, port = settings["UnicastAddress"], settings["UnicastPort"]
    with contextlib.ExitStack() as undo:
        bound = bound_socket(host, port, settings["NetworkInterface"])
        listener = TermListener(loop, log, bound, None)
        undo.callback(listener.leave)
        group = None
        if settings["MulticastAddress"]:
            group = Group(settings, pair)
            undo.callback(group.leave)
        file = ClusterFile(log, cluster_path(settings))
        cluster = file.read(options.etcd_new_cluster)
        quorum = make_quorum(settings, pair, listener.address, cluster)
        parts = {
            "make_table": functools.partial(table_of_term, settings, options),
            "make_connections": functools.partial(
                Connections, loop, log, settings, options.max_clients),
            "make_publisher": functools.partial(make_publisher, settings, options),
        }
        campaign = Campaign(settings, log, loop, pair, quorum, file, listener, group, **parts)
        undo.callback(campaign.close)
        Signals(campaign)
        if options.pid_file:
            undo.callback(remove_pid, options.pid_file)
            write_pid(options.pid_file)
        campaign.begin()
        undo.pop_all()
    return campaign


def make_quorum(settings, pair, address, cluster):
    """What this daemon keeps from one term to the next."""
    ttl = settings["EtcdTtl"]
    mine = Record(RECORD_LAYOUT, "", 0, "", ttl, grace_for(ttl, 0), 0, settings["Policy"], pair[1],
                  show_address(address), os.uname().nodename, os.getpid(), VERSION)
    members = Members(settings["EtcdUrls"].split(","))
    return Quorum(settings["EtcdPrefix"], mine, cluster, members, random_digits)


def random_digits(number):
    """So many random hex digits, an even number."""
    return os.urandom(number // 2).hex()


def table_of_term(settings, options, epoch):
    """An empty lock table of a leader."""
    first_fit = settings["Policy"] == "first-fit"
    return LockTable(first_fit, epoch, None, options.max_waiters, settings["MaxResources"])


def check_one_address(settings):
    """Raises CannotServe for a list of addresses, which clients alone may have."""
    if not settings["SocketName"] and "," in (settings["UnicastAddress"] or ""):
        raise CannotServe("a daemon has one address")


def join_group(settings, pair, undo):
    """The Group, in which this daemon is elected; None without one."""
    if not settings["MulticastAddress"]:
        return None
    group = Group(settings, pair)
    undo.callback(group.leave)
    elect(group)
    return group


def begin(daemon, group, guard, publisher):
    """From now on the daemon is found, looks after its paths and publishes its state."""
    table = daemon.table
    daemon.disk.start(daemon.loop, lambda: everything(table), daemon.server.batches.commit,
                      daemon.server.store_changed)
    daemon.server.absences.begin(daemon.disk.same_processes)
    daemon.server.released()
    parts = [daemon.disk, *daemon.ways]
    if guard is not None and guard is not daemon.disk.state:
        parts.append(guard)
    daemon.watch(parts)
    if group is not None:
        address = announced_address(daemon.ways)
        daemon.ways.append(Member(daemon.loop, daemon.log, group, address, daemon.drain))
    if publisher is not None:
        publisher.begin()
        daemon.server.publisher = publisher


def make_log(settings, options):
    """The log that the options ask for; FLoM's trace file is one, too, with every line."""
    if options.log is not None:
        return Log(options.log, options.log_level)
    if settings["DaemonTraceFile"]:
        return Log(settings["DaemonTraceFile"], "debug", settings["AppendTraceFile"])
    if options.foreground:
        return Log("stderr", options.log_level)
    return Log("syslog", options.log_level)


def serve(settings, options):
    """Serves, and ends the process with the daemon; returns the status when it cannot serve."""
    log = make_log(settings, options)
    starter = NoStarter() if options.foreground else detach()
    begin_to_serve = prepare_candidate if settings["EtcdUrls"] else prepare
    for number in (signal.SIGTERM, signal.SIGINT):  # until Signals takes them
        signal.signal(number, end_before_serving)
    try:
        with serving("cannot begin to serve"):
            log.open()
            daemon = begin_to_serve(settings, options, log)
    except CannotServe as error:
        complain(error)
        starter.tell(1)
        return 1
    except SteppedBack as error:
        log.info(str(error))
        starter.tell(3)
        return 3
    log.info(daemon.greeting())
    starter.tell(0)
    notify("READY=1")
    start_is_over()
    try:
        daemon.run()
    finally:
        end(daemon, options)
    log.info("ended")
    os._exit(daemon.status)  # Python would close the connections first, and then take its time


def end_before_serving(*_):
    """TERM while it waits for another daemon to end, or is elected: no error, and there is nothing
    to be removed yet."""
    os._exit(0)


def end(daemon, options):
    """Removes what the daemon has put into the file system."""
    notify("STOPPING=1")
    daemon.close()
    if options.pid_file:
        remove_pid(options.pid_file)


def check_configuration(options):
    """--check-config: every problem of the files and options is a line, 99 if there is one."""
    examined = Examined(Lifespan=-1)
    fill_settings(examined, options)
    check_rules(examined, DAEMON)
    examined.examine(check_announced, check_quorum, check_files_for_etcd, interface_index,
                     tls_context)
    return examined.report("flomd")


def run(arguments):
    """The command flomd.py; returns the exit status."""
    forget_signals()
    open_standard_files()
    name_process("flomd")  # as users of FLoM expect
    try:
        options = read_options(arguments)
        if options.check_config:
            return check_configuration(options)
        settings = Settings(Lifespan=-1)
        fill_settings(settings, options)
        settings.tell("flomd")
        settings.fix_paths()
        check_rules(settings, DAEMON)
        check_announced(settings)
        check_quorum(settings)
        return serve(settings, options)
    except CannotServe as error:
        complain(error)
        return 1
    except UsageError as error:
        put(f"flomd: {error}", sys.stderr)
        return 99


def main():
    """Runs flomd and ends this process: what could not be written is not tried again."""
    os._exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
