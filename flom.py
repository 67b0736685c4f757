#!/usr/bin/env python3
"""flom: run a command under a lock that is shared by processes, users and hosts.

    flom.py [OPTION]... [--] COMMAND [ARG]...

    flom.py -- make install                        one at a time, per user
    flom.py -r backup -o 0 -- backup.sh            not at all while another one runs
    flom.py -r 'licence[5]' -q 2 -- simulate       two of five units
    flom.py -r /srv/db -l PR -- report.sh          readers together, writers alone
    flom.py -A 239.255.0.1 -r deploy -- deploy.sh  one at a time, on all hosts of the network

A daemon (flomd.py) keeps the locks; it is started when none is found.  In Python:

    with flom.Lock("backup", mode="PR", timeout=5) as lock:
        print(lock.token)

Exit status: that of COMMAND, 128 + n when signal n killed it; of flom, with a line on stderr:

    94  deadlock: COMMAND would wait for a lock that it runs under
    95  the lock was lost while COMMAND ran
    96  the resource does not exist, and waiting or creating it was not wanted
    97  no command, or it cannot be executed
    98  busy, or the time is over (--busy-status changes it)
    99  anything else: a wrong option or file, no daemon, a request that can never be granted
"""
# Glossary
#   resource         what is locked: a name, whose form tells its kind (numeric, set, ...)
#   daemon           flomd.py: it knows who holds and who waits
#   request          the message that asks the daemon for a lock
#   grant            the daemon's answer that the lock is held from now on
#   token            a number that grows from one grant of a resource to the next
#   element          what a grant on a set, a sequence or a timestamp names, as `red` of red.green
#   holder, waiter   a client whose request was granted; one whose request is in the queue
#   claim            one request here, with all that comes of it until the lock is released
#   chain            the id of a claim, and those of the claims that its process runs under
#   loss             the time from the end of the daemon until the lock is held again, or given up
#   grace            how long a daemon, or the next one, keeps a lock for a holder that has no
#                    connection
#   reclaim          a holder's request to the next daemon for the lock that it has lost
#   ping             a message by which a claim asks whether its daemon still serves
#   last known good  when the last ping, or request, that was answered was sent
#   recovery window  the time in which a new daemon grants to those alone who reclaim
#   obstacle         what keeps a reclaim, or the start of a daemon, from succeeding at present
#   steps            a generator that does what may take time, and yields what it waits for
#   carrier          a process that has inherited the command's pipe: flom may wait for its end
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
import contextlib
import errno
import fcntl
import functools
import os
import re
import select
import signal
import socket
import stat
import time

TYPE_CHECKING = False  # mypy knows it as true: names that annotations alone use
if TYPE_CHECKING:
    import datetime
    from typing import Any, Callable, TypeVar, Union, overload
    Function = TypeVar("Function", bound=Callable[..., Any])
    Seconds = Union[float, str, datetime.timedelta, None]


# --- Shared with flomd.py ------------------------------------------------------------------------
# ==== Shared with flomd.py: begin ====
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
# ==== Shared with flomd.py: end ====


# --- Errors and exit statuses --------------------------------------------------------------------
# Each way to fail is a class: its `status` is flom's exit status, its `prefix` opens the line on
# stderr (FLoM's own messages have none).  What the daemon refuses is a row of REFUSALS.
NOT_HELD, NOT_RUN, WRONG = 1, 97, 99


class LockError(Exception):
    """There is no lock; `reason` is what the daemon said about it, if anything."""
    status = WRONG
    prefix = "flom: "
    reason: "str | None" = None


class Busy(LockError):
    """The resource is locked, and waiting was not wanted."""
    status = 98
    prefix = ""


class Timeout(LockError, TimeoutError):
    """The lock was not granted in time."""
    status = 98
    prefix = ""


class CannotWait(LockError):
    """The resource does not exist, and waiting for it or creating it was not wanted."""
    status = 96
    prefix = ""


class Impossible(LockError):
    """The request can never be granted: it wants more than there is."""
    prefix = ""


class Deadlock(LockError):
    """The lock is held by a command that this one runs under; see `reason`."""
    status = 94


class LockLost(LockError):
    """The daemon has vanished, and the lock was not reclaimed."""
    status = 95


class DaemonUnavailable(LockError):
    """There is no daemon, or it does not serve; `may_pass`: another may do so in a moment."""
    may_pass = False


class Useless(DaemonUnavailable):
    """What listens there does not answer, is no lock daemon, or not the one that it says it is."""


class Silent(Useless):
    """It has not answered a reclaim in time, and may do so yet: the connection stays open."""


class Interrupted(DaemonUnavailable):
    """A connection ended in the handshake of TLS: the daemon has just ended, or speaks no TLS."""


class Gone(Exception):
    """The connection ended: the daemon at `where` has ended, has crashed, or cannot be reached.

    `code`: the errno of that end, 0 for EOF.
    """

    def __init__(self, text, where, code=0):
        super().__init__(text)
        self.where = where
        self.code = code


class LeftQueue(Gone):
    """The connection ended while the request waited in the daemon's queue."""


LATE = "late"  # not an rc of the daemon: the lock was not granted in time
REFUSALS = {  # rc: the error, its text
    LATE: (Timeout, "The lock was not obtained because timeout ({ms} milliseconds) expired"),
    BUSY: (Busy, "Resource already locked, the lock cannot be obtained"),
    CANT_WAIT: (CannotWait, "The resource could be available in the future, but the requester "
                            "can't wait"),
    IMPOSSIBLE: (Impossible, "Resource will never satisfy the request, the lock cannot be "
                             "obtained"),
    INVALID_NAME: (LockError, "the daemon does not accept the name {name!r}: {reason}"),
    DEADLOCK: (Deadlock, "deadlock: {reason}"),
    STOPPED: (DaemonUnavailable, "the daemon is ending: {reason}"),
    EVICTED: (LockError, "evicted: {reason}"),
    LIMIT: (DaemonUnavailable, "the daemon refuses: {reason}")}


def refusal(rc, reason: "str | None", settings: "Settings") -> "LockError":
    """The error for a refusal; the reason stands where its text wants it, with -V at its end.

    Who asks with -o 0 is told who holds the lock, or what else keeps him from it: it is all that
    he gets.
    """
    error_class, text = REFUSALS[rc]
    reason = reason or ""
    if rc == BUSY and reason not in ("", "held by nobody"):
        text += " ({reason})"
    elif settings["Verbose"] and reason and "{reason}" not in text:
        text += ": {reason}"
    told = reason or "no reason given"
    error = error_class(text.format(ms=settings["Timeout"], name=settings["Name"], reason=told))
    if reason:
        error.reason = reason
    return error


# --- Options and settings ------------------------------------------------------------------------
# What flom is told: its command line, the keywords of a Lock, the files of settings.  Settings.set
# reads every value, wherever it comes from.  Beside the settings there are *actions*, what to do
# in place of running a command, and the traces of a run.


class Action:
    """An action: its group in --help, its options, its name among ACTIONS, its help, the name of
    its argument."""

    def __init__(self, group, options, name, help, argument=""):
        self.group = group
        self.options = options.split()
        self.name = name
        self.help = help
        self.argument = argument


ACTION_OPTIONS = (
    Action("Orders", "--status", "status", "show who holds and who waits; with -r: of NAME"),
    Action("Orders", "--evict", "evict", "take a lock away; ID as --status shows it",
           argument="ID"),
    Action("Orders", "-x --quiesce-exit", "quiesce",
           "stop the daemon when nobody uses it any more"),
    Action("Orders", "-X --immediate-exit", "immediate", "stop the daemon now"),
    Action("General", "--check-config", "check", "read the configuration, report every problem"),
    Action("General", "--signal-list", "signals", "list the signals"),
    Action("General", "--unique-id", "id", "print the id of this host"))
HELP_CLOSING = """
Times are in ms, or have a unit: 500ms, 5s, 1.5m, 2h.

The form of a NAME tells its kind:
  backup             simple: the lock, in the mode of -l
  licence[5]         numeric: -q of five units
  red.green          set: one of the words, in turn, as the last argument
  /srv/db, /a-b.c    hierarchical: node and all below, mode of -l; any text
  _s_invoice[1]      sequence: the next number, as the last argument
  _S_invoice[1]      the same; the number comes again when COMMAND fails
  _t_%H:%M:%S[1]     timestamp: a time of its own, as the last argument

Examples:
  flom -- make install                          one at a time, per user
  flom -r backup -o 0 -- backup.sh              not while another one runs
  flom -r backup -o 1m -- backup.sh             wait a minute at most
  flom -r /srv/db -l PR -- report.sh            readers together, writers alone
  flom -r 'licence[5]' -q 2 -- simulate         two of five units
  flom -r '_s_invoice[1]' -- print.sh           each run with the next number
  flom -r nightly -o 0 --quiet --min-hold 1m -- job   cron on many hosts: once
  flom -s /run/app/flom -r deploy -- deploy.sh  for all users of a socket
  flom -a db1 -r deploy -- deploy.sh            on all hosts, by db1's daemon
  flom --status                                 who holds, who waits"""


def read_arguments(arguments: "list") -> "types.SimpleNamespace":
    """What the command line says; raises UsageError.

    A namespace with `command`; `action`, the option that has `chosen` it, its `argument`; `json`
    and `watch`; `config_file`; `given`, the texts of settings as `add_settings` collects them.
    """
    options = types.SimpleNamespace(
        action="run", chosen="", argument="", json=False, watch=False, config_file=None, given={})
    options.command = _parser(options).parse(arguments)
    for name in ("json", "watch"):
        if getattr(options, name) and options.action == "run":
            options.action = "status"
            options.chosen = f"--{name}"
    if options.command and options.action != "run":
        raise UsageError(f"{options.chosen}: {options.command[0]!r} is not run beside it")
    return options


def _parser(options):
    """The parser that fills these options."""
    parser = Parser("flom [OPTION]... [--] COMMAND [ARG]...", HELP_CLOSING)
    add_basics(parser, options, "flom")
    for action in ACTION_OPTIONS:
        parser.add(action.group, action.options, action.help,
                   functools.partial(_choose, options, action), action.argument)
    parser.add("Orders", ["--json"], "the status as JSON", switching(options, "json"))
    parser.add("Orders", ["--watch"], "the status, every second", switching(options, "watch"))
    add_settings(parser, CLIENT, options.given)
    return parser


def _choose(options, action, option, text):
    """What the option of an action does."""
    if options.action not in ("run", action.name):
        raise UsageError(f"{option}: not together with {options.chosen}")
    options.action = action.name
    options.chosen = option
    options.argument = text


OF_DAEMONS = ("Quorum",)  # groups in files that are not for clients


def option_settings(options: "types.SimpleNamespace", settings: "Settings"):
    """Fills `settings` from the files and the command line; raises UsageError."""
    settings.skipped = OF_DAEMONS
    settings.read_files()
    if options.config_file is not None:
        settings.read_file(options.config_file, required=True)
    settings.take_options(options.given)


# The keywords of a Lock are the long options with `_` for `-`; four have a short name as well.
SHORT_KEYWORDS = {"name": "resource_name", "mode": "lock_mode", "timeout": "resource_timeout",
                  "quantity": "resource_quantity"}


def keyword_settings(keywords: "dict", files: "list[str]") -> "Settings":
    """Settings from files and from keywords; None is as good as not given.

    Raises UsageError for a wrong value, TypeError for a keyword that there is not and for two that
    mean the same setting.
    """
    rows = {setting.long.replace("-", "_"): setting for setting in SETTINGS}
    for short, long in SHORT_KEYWORDS.items():
        rows[short] = rows[long]
    given = _given_keywords(keywords, rows)
    settings = Settings()
    settings.skipped = OF_DAEMONS
    for path in files:
        settings.read_file(path)
    for word, value in given.items():
        settings.set(rows[word], keyword_texts(rows[word], word, value), f"{word}=")
    check_rules(settings, CLIENT)
    return settings


def _given_keywords(keywords, rows):
    """The keywords that are not None; raises TypeError."""
    unknown = sorted(keywords.keys() - rows.keys())
    if unknown:
        raise TypeError(f"Lock() has no setting {', '.join(unknown)}")
    given = {word: value for word, value in keywords.items() if value is not None}
    for short, long in SHORT_KEYWORDS.items():
        if short in given and long in given:
            raise TypeError(f"Lock() has both {short} and {long}, which are the same setting")
    return given


def keyword_texts(setting: "Setting", word: "str", value) -> "list":
    """The texts that a configuration file would have for the value of a keyword; UsageError."""
    if word == "timeout":
        return [str(milliseconds(value, "timeout="))]
    if not isinstance(value, (list, tuple, set, frozenset)):
        return [keyword_text(setting, value)]
    if not setting.many:
        raise UsageError(f"{word}=: {value!r} is not one value")
    return [keyword_text(setting, item) for item in value]


def keyword_text(setting: "Setting", value) -> "str":
    """The text of one value: of an int, also of an enum such as signal.SIGTERM, its number."""
    if isinstance(value, bytes):
        return os.fsdecode(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return str(value)
    if isinstance(setting.type, Octal):
        return setting.type.write(value)
    return f"{value:d}"


INFINITE, NOT_A_NUMBER = float("inf"), float("nan")


def milliseconds(seconds, origin: "str") -> "int":
    """The ms of a number of seconds, of its text, which may have a unit, or of a timedelta;
    UsageError.

    -1, which means for ever, of inf and of what is negative.  What is more than 0 is at least 1.
    """
    if hasattr(seconds, "total_seconds"):
        seconds = seconds.total_seconds()
    number = _float_of(seconds)
    if number != number and isinstance(seconds, str):  # no number: one with a unit
        with contextlib.suppress(ValueError):
            number = Time(0).read(seconds) / 1000
    if number < 0 or number == INFINITE:
        return -1
    if not number * 1000 <= MOST:  # also what is no number
        raise UsageError(f"{origin}: {seconds!r} is not a number of seconds up to {MOST // 1000}")
    if number == 0:
        return 0
    return max(1, round(number * 1000))


def _float_of(value):
    """The number that a value or its text is; a truth value is none."""
    if isinstance(value, bool):
        return NOT_A_NUMBER
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return NOT_A_NUMBER


@functools.lru_cache(maxsize=None)
def begin_trace(path: "str", append: "bool") -> "None":
    """Makes or empties a trace file, once in a process, however many locks it has.  OSError."""
    open_trace(path, append).close()


def open_trace(path: "str", append: "bool" = True):
    """The file to write to; a FIFO that nobody reads is an OSError, and is not waited for."""
    def opener(name, _):  # Python 3.6 cannot open a FIFO with the mode "a"
        flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK
        flags |= os.O_APPEND if append else os.O_TRUNC
        return os.open(name, flags, 0o666)
    return open(path, "w", errors="replace", opener=opener)


def takes(stream) -> "bool":
    """Whether who writes a line to a stream need not wait, as far as the system tells."""
    try:
        _, ready, _ = select.select([], [stream], [], 0)
    except (OSError, ValueError, TypeError):  # it is closed, or no file: there is nothing to wait
        return True
    return bool(ready)


class Diary:
    """Tells what happens: with -V on the terminal, with -T in a file; otherwise nothing but what
    everybody is to know.

    `patient`: who writes waits until somebody reads.  A pipe may be full, and ^S stop a terminal,
    for hours: where that must hold nothing up, set it False, and lines wait here until they are
    taken.  `unwritten`: those lines, and their streams.
    """
    MOST = 1000  # lines that wait
    LONGEST = 4096  # characters, which a pipe that takes something takes at once
    PAUSE = 0.02  # s between two attempts

    def __init__(self, settings: "Settings") -> "None":
        self.verbose = settings["Verbose"]
        self.patient = True
        self.unwritten: "list[tuple]" = []
        self.path = settings["CommandTraceFile"]
        if self.path:
            self._begin(settings.origins["CommandTraceFile"], settings["AppendTraceFile"])

    def _begin(self, origin, append):
        try:
            self.path = os.path.abspath(self.path)  # a program may change its directory
            begin_trace(self.path, append)
        except OSError as error:
            raise UsageError(f"{origin}: {self.path!r} is not a file that can be written: "
                             f"{error.strerror}")

    def say(self, text: "str", stream=None) -> "None":
        """Notes a line; with -V it goes to `stream`, stderr when none is given."""
        text = visible(text)
        if self.verbose:
            self.tell(text, stream)
        if self.path:
            with contextlib.suppress(OSError), open_trace(self.path) as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} flom[{os.getpid()}] {text}\n")

    def is_read(self) -> "bool":
        """Whether somebody reads what a request waits for."""
        return self.verbose

    def warn(self, text: "str"):
        """Notes a loss, or its end: nothing here, where a Loss tells it in its time."""

    def tell(self, text: "str", stream=None) -> "None":
        """Writes a line for everybody to `stream`, stderr when none is given."""
        if len(self.unwritten) < self.MOST:
            self.unwritten.append((text[:self.LONGEST], stream or sys.stderr))
        self.write()

    def write(self):
        """Writes the lines that wait, as far as they are taken."""
        while self.unwritten:
            text, stream = self.unwritten[0]
            if not self.patient and not takes(stream):
                return
            put(text, stream)
            del self.unwritten[0]

    def end(self, seconds):
        """Writes the lines that wait, unless nobody takes them for so long."""
        until = time.monotonic() + seconds
        self.write()
        while self.unwritten and time.monotonic() < until:
            time.sleep(self.PAUSE)
            self.write()


# --- Steps ---------------------------------------------------------------------------------------
# A program may wait in poll() for its lock.  A flom whose command runs may not: it would keep the
# signals waiting.  So whatever may take time is a generator of *steps*: it yields what it waits
# for, (descriptor or None, poll events, seconds at most), and is resumed when that has come, when
# the time is over, or earlier; so it looks again each time.  `finish` runs steps to their end and
# sleeps in poll(); a Loss resumes them between two signals.
clock = time.monotonic
READ, WRITE = 1, 4  # POLLIN, POLLOUT
FOREVER = float("inf")  # s
BOOT_TIME = getattr(time, "CLOCK_BOOTTIME", 7)  # Python 3.6 has no name for that of Linux
DAY = 86400  # s: no system call waits longer; who is resumed early waits again


def boot_clock() -> "float":
    """s of a clock that goes on while the system is suspended, which `clock` does not; where there
    is none, of `clock`.  Other systems count on meanwhile, and with them a grace.
    """
    try:
        return time.clock_gettime(BOOT_TIME)
    except (AttributeError, OSError):  # not Linux
        return clock()


def pause(seconds: "float"):
    """The step that waits for nothing but time."""
    return None, 0, seconds


def input_of(sock, until: "float"):
    """The step that waits until something comes in on a socket, at most `until` (monotonic s)."""
    return sock.fileno(), READ, until - clock()


def limiting(steps, until: "float"):
    """Steps that end with others, with their result; None when `until` (monotonic s) is first.

    Whatever ends them closes the others, and thereby the connection on which those wait.  Who is
    resumed late may have an answer by then, perhaps a granted lock, which that would release: so
    what has come in is read before.
    """
    is_over = clock() >= until
    try:
        while not is_over:
            descriptor, events, seconds = next(steps)
            left = until - clock()
            if left <= 0:
                break
            yield descriptor, events, min(seconds, left)
            is_over = clock() >= until and not (events == READ and _sleep(descriptor, READ, 0))
    except StopIteration as end:
        return end.value
    finally:
        steps.close()
    return None


def waiting_for(step):
    """The steps that are this one alone."""
    yield step


def finish(steps, until: "float" = FOREVER):
    """Runs steps to their end and returns their result; None when `until` (monotonic s) is first.

    Whatever ends it, also an exception out of a signal handler, closes the steps.
    """
    limited = limiting(steps, until)
    try:
        while True:
            _sleep(*next(limited))
    except StopIteration as end:
        return end.value
    finally:
        limited.close()


def _sleep(descriptor, events, seconds):
    """Waits for events of a descriptor (None: of none), so many seconds at most; whether any came.
    """
    seconds = max(0, min(seconds, DAY))
    if hasattr(select, "poll"):
        poll = select.poll()
        if descriptor is not None:
            poll.register(descriptor, events)
        return bool(poll.poll(seconds * 1000))
    # eventlet takes poll away and makes select() cooperative
    readers, writers = [], []
    if events == READ:
        readers.append(descriptor)
    elif events == WRITE:
        writers.append(descriptor)
    try:
        readable, writable, _ = select.select(readers, writers, [], seconds)
    except RuntimeError:  # with eventlet only one thread can wait for a descriptor
        time.sleep(min(seconds, 0.01))
        return False
    return bool(readable or writable)


def reading_all(descriptor: "int"):
    """Steps to all the bytes that come through a pipe before its end."""
    os.set_blocking(descriptor, False)
    data = b""
    while True:
        try:
            more = os.read(descriptor, 4096)
        except BlockingIOError:
            yield descriptor, READ, FOREVER
            continue
        if not more:
            return data
        data += more


# --- Discovery -----------------------------------------------------------------------------------
# Where may a daemon be?  On a local socket, at one or several addresses, or wherever the answer of
# a multicast group says.  What is found is a list of (family, address) as `socket` takes them.
#
# A name server may be silent for half a minute.  Before the command runs that is waited for
# (resolving_here); while it runs a child asks (resolving_apart), so that signals are not delayed;
# in a program that holds a lock, or has an event loop, a thread (resolving_beside).


def resolve(host, port, kind, scope, flags=0):
    """[(family, address)] of a host; `scope` is for link-local addresses without one.

    Raises DaemonUnavailable.
    """
    try:
        found = socket.getaddrinfo(host, port, type=kind, flags=flags)
    except (OSError, UnicodeError) as error:
        raise DaemonUnavailable(f"cannot resolve {host!r}: {getattr(error, 'strerror', error)}")
    addresses: "list[Any]" = []
    address: "Any"
    for family, _, _, _, address in found:
        if family == socket.AF_INET:
            addresses.append((family, address))
        elif family == socket.AF_INET6:
            addresses.append((family, address[:3] + (address[3] or scope,)))
    return addresses


def resolving_here(host, port, kind, scope):
    """Steps to the result of resolve: none, since it may take as long as it needs here."""
    return resolve(host, port, kind, scope)
    yield  # never reached: it makes this a generator


def resolving_apart(host, port, kind, scope):
    """Steps to the result of resolve in a child."""
    with contextlib.suppress(DaemonUnavailable):
        return resolve(host, port, kind, scope, socket.AI_NUMERICHOST)
    reading, writing = os.pipe()
    child = 0
    try:
        try:
            child = os.fork()
            if not child:
                _tell_addresses(writing, host, port, kind, scope)
        finally:
            os.close(writing)
        told = yield from reading_all(reading)
    finally:
        os.close(reading)
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    import marshal
    found = f"cannot resolve {host!r}"
    if told:
        found = marshal.loads(told)
    if isinstance(found, str):
        raise DaemonUnavailable(found)
    return found


def _tell_addresses(writing, host, port, kind, scope):
    """In the child: writes the addresses, or what is wrong, into a pipe; does not return."""
    import marshal
    try:
        try:
            addresses = resolve(host, port, kind, scope)
            found: "Any" = [(int(family), address) for family, address in addresses]
        except DaemonUnavailable as error:
            found = str(error)
        os.write(writing, marshal.dumps(found))
    finally:
        os._exit(0)


def where_looked_for(settings: "Settings") -> "str":
    """The address, group or path where a daemon is looked for, in words."""
    for kind, words in (("Unicast", ""), ("Multicast", "multicast group ")):
        address = settings[f"{kind}Address"]
        if address:
            return f"{words}{address}, port {settings[f'{kind}Port']}"
    return settings["SocketName"] or default_socket()


def of_several_addresses(settings: "Settings") -> "bool":
    """Whether a daemon and its stand-ins, or those of a quorum, are named."""
    return "," in (settings["UnicastAddress"] or "")


def no_daemon(settings: "Settings", why: "str" = "") -> "DaemonUnavailable":
    """The error when nobody listens where a daemon was looked for."""
    return DaemonUnavailable(f"no daemon at {where_looked_for(settings)}{why}")


def locating(settings, diary, resolving=resolving_here, leave_to_quorum=bool):
    """Steps to [(family, address)] where a daemon may be; DaemonUnavailable, UsageError.

    `leave_to_quorum` is called when the answer of a group says that it is that of a quorum.
    """
    if settings["UnicastAddress"]:
        return (yield from _locating_hosts(settings, diary, resolving))
    if settings["MulticastAddress"]:
        return (yield from _locating_group(settings, diary, resolving, leave_to_quorum))
    return [(socket.AF_UNIX, where_looked_for(settings))]


def _locating_hosts(settings, diary, resolving):
    """Steps to the addresses of all hosts that can be resolved, in the order of the setting."""
    scope = interface_index(settings)
    found = []
    failure = DaemonUnavailable(f"{settings['UnicastAddress']!r} names no host")
    for host in filter(None, map(str.strip, settings["UnicastAddress"].split(","))):
        try:
            found += yield from resolving(host, settings["UnicastPort"], socket.SOCK_STREAM, scope)
        except DaemonUnavailable as error:
            failure = error
            diary.say(str(error))
    if not found:
        raise failure
    return list(dict.fromkeys(found))


def _locating_group(settings, diary, resolving, leave_to_quorum):
    """Steps to the addresses of the group's daemon, [] when none answers."""
    name, port = settings["MulticastAddress"], settings["MulticastPort"]
    index = interface_index(settings)
    addresses = yield from resolving(name, port, socket.SOCK_DGRAM, index)
    family, group = addresses[0]
    check_group(settings, family, group)
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as asker:
            asker.setblocking(False)
            aim(asker, settings["DiscoveryTTL"], index)
            data, found = yield from _asking_group(asker, group, settings, diary)
    except OSError as error:
        raise DaemonUnavailable(f"multicast group {name}/{port}: {error.strerror}")
    if found and decode(data)["msg"].get("quorum") == "1":
        leave_to_quorum()
    return found


def check_group(settings, family, group):
    """Raises UsageError unless the address of a group is a multicast address."""
    first = socket.inet_pton(family, group[0].partition("%")[0])[0]
    right = 224 <= first < 240
    if family == socket.AF_INET6:
        right = first == 0xFF
    if not right:
        origin, name = settings.origins["MulticastAddress"], settings["MulticastAddress"]
        raise UsageError(f"{origin}: {name!r} is not a multicast group "
                         "(224.0.0.0 to 239.255.255.255, ff00::/8)")


def _asking_group(asker, group, settings, diary):
    """Steps to (datagram, addresses) of the first answer, (b"", []) when none comes."""
    name = f"{settings['MulticastAddress']}/{settings['MulticastPort']}"
    question = encode(DISCOVER, 8)
    for _ in range(settings["DiscoveryAttempts"]):
        diary.say(f"sending UDP multicast datagram to {name} ('{question.decode()}')", sys.stdout)
        asker.sendto(question, group)
        until = clock() + settings["DiscoveryTimeout"] / 1000
        data, found = yield from hearing(asker, until)
        if found:
            diary.say(f"reply from {name} is '{data.decode()}'", sys.stdout)
            break
    else:
        diary.say(f"no reply from {name}", sys.stdout)
    return data, found


def hearing(asker, until: "float"):
    """Steps to (datagram, addresses) of the first valid answer, (b"", []) when time is over."""
    while True:
        with contextlib.suppress(BlockingIOError, ProtocolError, DaemonUnavailable):
            data, source = asker.recvfrom(65536)
            found = told_addresses(decode(data), source)
            if found:
                return data, found
        if clock() >= until:
            return b"", []
        yield input_of(asker, until)


def told_addresses(message, source):
    """The addresses of the daemon that a message from `source` tells; DaemonUnavailable."""
    head, network = message["msg"], message.get("network", {})
    if (head["verb"], head["step"]) != (DISCOVER, 16) or "port" not in network:
        return []
    # An empty address means: where the datagram came from.
    host = network.get("address") or source[0].partition("%")[0]
    scope = 0
    if len(source) == 4:  # IPv6: host, port, flow, scope
        scope = source[3]
    # No stranger's datagram makes this host ask a name server.
    return resolve(host, network["port"], socket.SOCK_STREAM, scope, socket.AI_NUMERICHOST)


# --- Starter -------------------------------------------------------------------------------------
# Who finds no daemon may start one.  flomd detaches itself: the process started here ends with 0
# when the daemon listens, 1 when it cannot serve (often since another came first), 3 when it left
# the group to another daemon.  What it has to say is kept, for the case that in the end nobody
# serves.  It comes through a pipe, whose end tells at once that the process has ended.
#
# A Start is one such process.  A Starter serves one claim: it says how long to look for a daemon,
# starts one where that is allowed, and says why none is to be had.
CANNOT_SERVE = 1
AGAIN = 0.02  # s between two looks, two tries
LATER = 0.25  # s between two tries where several addresses may serve by turns
RECOVERY_WINDOW = 2000  # ms in which a new daemon grants only to those who held before
RESTART = 1  # s at most between two starts of a daemon
LATECOMER = 5  # s for another's daemon to listen, when ours came too late or cannot serve
RETURN = 3  # s for a daemon that has crashed, or was told by a signal to end, to be started again


def search_path() -> "list[str]":
    """The folders in which programs are looked for; os.get_exec_path() would load `warnings`."""
    return os.environ.get("PATH", os.defpath).split(os.pathsep)


def daemon_program() -> "list[str]":
    """[program] or [python, script] of flomd; DaemonUnavailable: where it was looked for."""
    folder = os.path.dirname(os.path.realpath(__file__))
    looked, paths = f"{folder} and PATH", _possible_programs(folder)
    named = os.environ.get("FLOMD")
    if named:
        looked, paths = f"$FLOMD ({named})", [named]
    for path in paths:
        if os.path.isfile(path):
            return _command_of(path)
    raise DaemonUnavailable(f"flomd.py is not in {looked}; put it beside flom.py, or start it "
                            "by hand and use -d 0")


def _possible_programs(folder):
    """Paths where flomd may be: beside flom.py, which need not be executable, and in PATH.

    `flomd` first: beside an installed flom.py it is the launcher, which finds compiled code.
    """
    yield os.path.join(folder, "flomd")
    yield os.path.join(folder, "flomd.py")
    for other in search_path():
        for name in ("flomd", "flomd.py"):
            path = os.path.join(other, name)
            if os.access(path, os.X_OK):
                yield path


def _command_of(path):
    """[program] or [python, script]: the words that run the flomd at `path`.

    Python compiles a script anew at each start, a module once, where it may keep that: beside an
    installed module is a folder for it.  There flomd is imported, which takes half the time.
    """
    if not path.endswith(".py"):
        return [path]
    folder, name = os.path.split(path)
    if name != "flomd.py" or not os.path.isdir(os.path.join(folder, "__pycache__")):
        return [interpreter(), path]
    code = f"import sys; sys.path.append({folder!r}); import flomd; flomd.main()"
    return [interpreter(), "-IS", "-c", code]


def interpreter() -> "str":
    """The Python that is to run flomd.py; raises DaemonUnavailable.

    An embedded Python has no sys.executable, or, as under uWSGI, the server's own program.
    """
    own = sys.executable or ""
    if re.match("(?i)python|pypy", os.path.basename(own)):
        return own
    for folder in search_path():
        path = os.path.join(folder, "python3")
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    raise DaemonUnavailable(f"no python3 in PATH to run flomd.py ({own!r} is no Python)")


def found_environment() -> "dict[str, str]":
    """The environment that flom has found, as far as a program can have it.

    In the C locale Python from 3.7 on (PEP 538) sets LC_CTYPE, for itself: `wc -m` counts
    otherwise with it.  An entry without a name is left out, since Python refuses it.
    """
    found = {name: value for name, value in os.environ.items() if name}
    if found.get("LC_CTYPE") in ("C.UTF-8", "C.utf8", "UTF-8"):
        del found["LC_CTYPE"]
        found.update(_first_value("LC_CTYPE"))
    return found


def _first_value(name):
    """{name: value} as this process was started with it, {} when it was not set."""
    try:
        with open("/proc/self/environ", "rb") as file:
            entries = os.fsdecode(file.read()).split("\0")
    except OSError:  # no /proc; UTF-8 mode tells that Python found the C locale
        if getattr(sys.flags, "utf8_mode", 0):
            return {}
        return {name: os.environ[name]}
    for entry in entries:
        key, _, value = entry.partition("=")
        if key == name:
            return {name: value}
    return {}


def daemon_environment() -> "dict[str, str]":
    """The environment of the daemon: nothing in it tells of a lock or of sockets handed over."""
    ours = ("FLOM_", "LISTEN_", "NOTIFY_SOCKET")
    return {name: value for name, value in found_environment().items()
            if not name.startswith(ours)}


def daemon_options(settings: "Settings"):
    """Yields the options that hand on to the daemon what has been set, and only that.  One of a
    quorum is the init system's: of [Quorum] nothing is handed on."""
    values = {**settings.values, "Lifespan": settings["Lifespan"]}
    yield "--no-files"
    for setting in SETTINGS:
        if setting.group == "Quorum" or setting.key == "Verbose":
            continue
        if DAEMON in setting.users and setting.key in values:
            yield from setting.options(values[setting.key])


def fork_daemon(argv, writing: "int") -> "int":
    """The pid of a new process that becomes flomd, and tells what it has to say to `writing`."""
    child = os.fork()
    if not child:
        _become_daemon(argv, writing)
    return child


def spawn_daemon(argv, writing: "int") -> "int":
    """As fork_daemon, where other threads may run: os.fork alone could stop the child for ever,
    and says so from Python 3.12 on.  flom itself has no threads, and spares the import.
    """
    import subprocess
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=writing, env=daemon_environment())
    process.returncode = 0  # its end is waited for by its pid; Popen is not to miss it
    return process.pid


def _become_daemon(argv, writing):
    """In the child: becomes flomd, with nothing of ours but a pipe for what it has to say; does
    not return.
    """
    try:
        os.dup2(writing, 2)
        os.set_inheritable(2, True)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.execve(argv[0], argv, daemon_environment())
    except OSError as error:
        os.write(2, f"cannot execute {argv[0]}: {error.strerror}".encode())
    finally:
        os._exit(CANNOT_SERVE)


class Start:
    """A process that becomes a daemon, or says why not; `launch` is fork_daemon or spawn_daemon.

    It ends when the daemon listens: `status` is its exit status then, None before.  `said`: what
    it has to say.  `wait`: the step to be waited for before the next look.
    """

    def __init__(self, argv, launch):
        self.status: "int | None" = None
        self.said = ""
        self._pid = 0
        self._data = b""
        self._reading: "Any" = None
        try:
            self._begin(argv, launch)
        except OSError as error:
            self.status = CANNOT_SERVE
            self.said = f"cannot start flomd: {error.strerror}"

    def _begin(self, argv, launch):
        self._reading, writing = os.pipe()
        try:
            os.set_blocking(self._reading, False)
            self.wait = self._reading, READ, AGAIN
            self._pid = launch(argv, writing)
        finally:
            os.close(writing)
            if not self._pid:
                self.close()

    def look(self):
        """Reads what it has said, and notes its end."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._reading, 4096)
            self._data += data
            self.said = self._data.decode("utf-8", "replace").strip()
            if not data:  # it is about to end
                self.wait = pause(0.001)
        self.has_ended()

    def has_ended(self) -> "bool":
        """Whether the process has ended; it is reaped then, and its status noted."""
        if self.status is None:
            try:
                ended, status = os.waitpid(self._pid, os.WNOHANG)
            except ChildProcessError:  # a program that ignores SIGCHLD has no statuses
                ended, status = self._pid, 0
            if ended and os.WIFSIGNALED(status):
                self.status = CANNOT_SERVE
                self.said = f"signal {os.WTERMSIG(status)} killed flomd"
            elif ended:
                self.status = os.WEXITSTATUS(status)
        return self.status is not None

    def close(self):
        """Does not wait for the end of the process."""
        if self._reading is not None:
            os.close(self._reading)
        self._reading = None


def has_ended_lately(path: "str") -> "bool":
    """Whether the daemon of a local socket, on which nobody listens, may be started again: it has
    crashed, and left its socket, or a signal has ended it: then it has touched the file beside the
    socket.  A daemon that ended by order, or because nobody needed it, does neither.
    """
    if os.path.lexists(path):
        return True
    try:
        touched = os.stat(f"{path}.lock").st_mtime
    except OSError:
        return False
    return abs(time.time() - touched) < RETURN


class Starter:
    """Says for one claim how long a daemon is looked for, and starts one where that is allowed.

    `launch` is fork_daemon or spawn_daemon.  `until`: when nobody looks for a daemon any more
    (monotonic s).  `order`: in words, what forbids from now on to start one, "" for nothing; a
    start that has begun is waited for.
    """

    def __init__(self, settings: "Settings", launch, allowed: "bool" = True):
        self._settings, self._launch = settings, launch
        self._allowed = allowed
        self.until = 0.0
        self.order = ""
        self._recovering = False
        self._another_may_come = False
        self._has_quorum = False
        self._return_until = 0.0  # until then a daemon that has ended may be started again
        self._start: "Start | None" = None
        self._given_up: "list[Start]" = []  # starts that nobody waits for any more
        self._next_start = 0.0
        self._pause = AGAIN  # s before the next start
        self._complaint = ""  # what the last process had to say
        self._argv = []
        self._missing = None
        if allowed:
            try:  # now: later the folder from which relative names count may be gone
                self._argv = daemon_program() + list(daemon_options(settings))
            except DaemonUnavailable as error:
                self._missing = error

    def begin(self, seconds: "float", recovering: "bool"):
        """From now on a daemon is looked for, so many seconds at most.

        `recovering`: a daemon that served this claim has crashed, and others may hold its locks.
        """
        self.until = clock() + seconds
        self._recovering = recovering
        self._another_may_come = False
        self._return_until = clock() + RETURN
        self._pause = AGAIN

    @property
    def is_starting(self) -> "bool":
        """Whether a start has begun and not ended."""
        return self._start is not None

    def leave_to_quorum(self):
        """None is ever started here: it would be a rival of those among whom one is chosen."""
        self._has_quorum = True

    def expect_another(self):
        """A daemon has ended: another may come, also where none may be started here."""
        self._another_may_come = True

    def trying(self):
        """Steps that start a daemon, or wait a moment; DaemonUnavailable when it is of no use.

        After a crash a client that waits for the daemon of its own may reclaim too late, since
        another's may serve by then: so when recovering they end before the start does, and the
        next call goes on with it.
        """
        self._check()
        if not self._start:
            if self._obstacle() or clock() < self._next_start:
                yield pause(self._pause_before_look())
                return
            self._start = Start(self._command_line(), self._launch)
        start = self._start
        while start.status is None and clock() < self.until:
            yield start.wait
            start.look()
            if self._recovering:
                break
        self._complaint = start.said or self._complaint
        if start.status is None:
            return
        self.close()
        # A daemon that has come may have ended already: -d may be short.  One that ends again and
        # again is started ever more seldom.
        self._pause = min(2 * self._pause, RESTART)
        if start.status == CANNOT_SERVE:
            # Mostly another client's daemon came first: it will listen in a moment.
            self._pause = RESTART
            self.until = min(self.until, clock() + LATECOMER)
        self._next_start = clock() + self._pause

    def _pause_before_look(self):
        """s until the next look, if none is started: not often where it may take long."""
        if clock() < self._return_until:
            return AGAIN
        return LATER

    def _check(self):
        """Raises DaemonUnavailable when it is of no use to look for a daemon any longer."""
        obstacle = self._obstacle()
        one_may_come = self._another_may_come or self.is_starting or not obstacle
        if clock() < self.until and (one_may_come or self._may_return()):
            return
        why = ""
        if self._complaint:
            why = f": {self._complaint}"
        elif obstacle:
            why = f" (and {obstacle})"
        raise no_daemon(self._settings, why)

    def _may_return(self):
        """Whether an init script, or the like, may just be restarting the daemon.

        An address at which nobody listens does not tell.  A group is asked for long enough.
        """
        settings = self._settings
        if self._has_quorum or of_several_addresses(settings):  # another may take the lead
            return not self.order
        if self.order or clock() >= self._return_until:
            return False
        if settings["UnicastAddress"]:
            return True
        return not settings["MulticastAddress"] and has_ended_lately(where_looked_for(settings))

    def _obstacle(self):
        """Why no daemon may be started here, "" when one may."""
        if self._settings["Lifespan"] == 0:
            return "-d 0 forbids starting one"
        if self._has_quorum:
            return "a quorum decides who serves"
        if not self._allowed:
            return "start_daemon=True is not given"
        if of_several_addresses(self._settings):
            return "with several addresses none is started"
        return self.order

    def _command_line(self):
        if self._missing:
            raise self._missing
        if self._recovering and "RecoveryWindow" not in self._settings.values:
            return self._argv + [f"--recovery-window={RECOVERY_WINDOW}"]
        return self._argv

    def close(self):
        """Does not wait for the end of a start that has begun; reaps those that have ended."""
        if self._start:
            self._start.close()
            self._given_up.append(self._start)
        self._start = None
        self._given_up = [start for start in self._given_up if not start.has_ended()]


# --- Session -------------------------------------------------------------------------------------
# The client's side of the protocol, without sockets: one session is one request, bytes in, answers
# out.  It is ASKING until the step 16, WAITING while it is queued, HOLDING after rc 0, whatever
# the step.  What is not in NEXT is illegal.
#
# A FLoM daemon does not answer an unlock.  A daemon of ours stores it in its memory, and one that
# ends before that has not unlocked.  So it is sent a ping together with the unlock (LEAVING), and
# answers that when the unlock is stored (LEFT).  A FLoM daemon would die of the ping.
#
# Of several daemons that take the lead by turns (a quorum) the one that leads may be cut off, or
# stopped, and another lead in its place, long before its connections end.  So it wants pings,
# whose answers say that it was still leading when they were sent.  An end of the connection says
# nothing of the kind: a daemon that was stopped for a minute ends its connections only then.
#
# Additions of ours travel as attributes that FLoM ignores.  A FLoM daemon drops a message longer
# than 511 bytes, and dies of a byte that is not UTF-8: so ours are ASCII, and are left out when
# the message grows too long, those first that matter least.
ASKING, WAITING, HOLDING, REFUSED, ENDING = "asking", "waiting", "holding", "refused", "ending"
TAKEN_AWAY, LEAVING, LEFT = "taken away", "leaving", "left"
_OUTCOMES = {OK: HOLDING, ENQUEUED: WAITING, WAIT_RESOURCE: WAITING,
             **dict.fromkeys(REFUSALS, REFUSED)}
NEXT = {  # (state, verb, step): {rc, None of a ping: next state}
    (ASKING, LOCK, 16): _OUTCOMES,
    (WAITING, LOCK, 24): _OUTCOMES,
    (WAITING, LOCK, 32): _OUTCOMES,
    (ASKING, LOCK, 24): {STOPPED: REFUSED},  # the daemon ends before it could answer
    (HOLDING, LOCK, 24): {STOPPED: ENDING, EVICTED: TAKEN_AWAY},
    (LEAVING, LOCK, 24): {STOPPED: LEAVING, EVICTED: LEAVING},
    (LEAVING, PING, 16): {None: LEFT}}
INTERVALS = 5  # between two pings, in the ttl of a quorum
LEAST_INTERVAL, MOST_INTERVAL = 0.02, 12  # s between two pings; the ttl is 60 s at most
UNANSWERED_PINGS = 2  # intervals after which a daemon that has not answered is doubted
PINGS_IN_GRACE = 6  # at least
LONGEST = 511  # bytes of a message that FLoM's daemon reads
NO_NAME = "?"  # of no resource
ENDLESS = 65536  # bytes of a message that flomd and flom read: more is no message
LONGEST_REPORT = 2 ** 30  # bytes: of a million resources it has some hundred million
CHAIN = 8  # ids of FLOM_SESSION that are told and handed on
COVERED = [{0}, {0, 1}, {0, 1, 2}, {0, 1, 3}, {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4, 5}]  # by a mode
WITH_MODE, WITH_ELEMENT = ("simple", "hierarchical"), ("set", "sequence", "timestamp")
FIELDS = ("rc", "element", "token", "position", "reason", "peerid")  # of an answer


def lock_message(settings: "Settings", about, wait: "bool", reclaim=None, held=None) -> "bytes":
    """The lock 8; `about`: id, parent, pid ...; `reclaim`, `held`: token, element of the lost.

    Of `about` what matters least is left out until FLoM would read the message.  It is None for a
    message without any addition of ours.
    """
    attributes = _wanted(settings, wait, create=settings["Create"] or reclaim is not None)
    if about is not None:
        attributes += [("reclaim", reclaim), ("held", held)]
        if wait and (settings["Timeout"] >= 0 or settings["Deadlock"] == "wait"):
            attributes.append(("deadlock", "wait"))
    resource = element("resource", *attributes)
    session = {"peerid": machine_id(), **(about or {})}
    while True:
        message = encode(LOCK, 8, element("session", *session.items()), resource)
        if len(message) <= LONGEST:
            return message
        shorter = without_the_least(session)
        if shorter is None:
            return message
        session = shorter


def probe_message() -> "bytes":
    """A lock 8 that each daemon refuses, and in which one of ours answers that it is one."""
    session = element("session", ("peerid", machine_id()), ("client", f"flom.py/{VERSION}"))
    attributes = [("name", encode_name(NO_NAME)), ("mode", 0), ("wait", 0), ("create", 0),
                  ("lifespan", 0)]
    return encode(LOCK, 8, session, element("resource", *attributes))


def _wanted(settings, wait, create):
    """The attributes of a request as FLoM knows them, in its order."""
    name = settings["Name"]
    kind = kind_of(name)
    attributes: "list[Any]" = [("name", encode_name(name))]
    if kind in WITH_MODE:
        attributes.append(("mode", settings["LockMode"]))
    attributes.append(("wait", int(wait)))
    if kind == "numeric":
        attributes.append(("quantity", settings["Quantity"]))
    attributes.append(("create", int(create)))
    attributes.append(("lifespan", settings["IdleLifespan"]))
    return attributes


def without_the_least(about):
    """`about` without the part of it that matters least; None when the rest must stay."""
    for name in ("host", "user", "cmd", "pid"):
        if about.get(name) is not None:
            return {**about, name: None}
    client, parents = about.get("client") or "", about.get("parent") or ""
    if "/" in client:
        return {**about, "client": client.partition("/")[0]}
    if "," in parents:  # the nearest stays: the daemon knows that one's own parents
        return {**about, "parent": parents.rpartition(",")[0]}
    return None


def unlock_message(name: "str", rollback: "bool") -> "bytes":
    """The unlock 8; `rollback`: the command did not succeed."""
    attributes = [("name", encode_name(name)), ("rollback", int(rollback))]
    return encode(UNLOCK, 8, element("resource", *attributes, end=" />"))


def check_element(name: "str", text: "str | None"):
    """Raises ProtocolError unless `text` (None: none) can be the element of a lock on `name`.

    It becomes an argument of the command, which must not take it for an option.
    """
    kind = kind_of(name)
    if kind not in WITH_ELEMENT:
        if text is not None:
            raise ProtocolError(f"it grants an element, {text[:40]!r}, where there are none")
        return
    told = text or ""
    if kind == "set":
        right = told in name.split(".")
    elif kind == "sequence":
        right = bool(re.fullmatch("[0-9]{1,10}", told))
    else:
        right = bool(re.fullmatch("[^-].{0,499}", told)) and told.isprintable()
    if not right:
        raise ProtocolError(f"it grants the element {str(text)[:40]!r}")


class Pings:
    """When to ping a daemon that wants it, and when it is known to have served.

    Dates are s of boot_clock, and handed in.  `interval`: s from an answer to the next ping, 0.0:
    the daemon wants none.  `good`: when that was sent which was answered last.
    """

    def __init__(self):
        self.interval = 0.0
        self.good = 0.0
        self._half_grace = FOREVER  # s
        self._next = FOREVER
        self._sent = FOREVER  # when the ping was sent that is not answered; FOREVER: there is none

    def begin(self, asked: "float", interval: "int | None", grace: "int | None", now: "float"):
        """The request that was sent at `asked` is answered; interval and grace (ms) are told.

        Whatever is told, pings neither keep this process busy nor come too late for the grace.
        """
        self.good = asked
        if not interval:
            return
        longest: "float" = MOST_INTERVAL
        if grace is not None and grace >= 0:
            longest = min(longest, grace / 1000 / PINGS_IN_GRACE)
        self.interval = max(LEAST_INTERVAL, min(interval / 1000, longest))
        self._next = now + self.interval
        if grace is not None and grace >= 0:
            self._half_grace = max(grace / 2000, UNANSWERED_PINGS * self.interval)

    def due(self, now: "float") -> "bytes":
        """The ping that is to be sent now, b"" for none: there is one unanswered at a time."""
        if now < self._next:
            return b""
        self._next = FOREVER
        self._sent = now
        return encode(PING, 8)

    def hasten(self):
        """The next one is due at once, unless one is unanswered."""
        if not self.are_unanswered:
            self._next = 0.0

    def answer(self, now: "float") -> "bool":
        """Notes an answer; False when there is no ping that it could belong to."""
        if not self.are_unanswered:
            return False
        self.good = self._sent
        self._sent = FOREVER
        self._next = now + self.interval
        return True

    @property
    def are_unanswered(self) -> "bool":
        """Whether one was sent and not answered yet."""
        return self._sent < FOREVER

    def date(self) -> "float":
        """When one is due, or has been unanswered for too long."""
        return min(self._next, self._sent + UNANSWERED_PINGS * self.interval)

    def is_silent(self, now: "float") -> "bool":
        """Whether the daemon has left a ping unanswered for too long."""
        return now >= self._sent + UNANSWERED_PINGS * self.interval

    def is_late(self, now: "float") -> "bool":
        """Whether what is read now may have been overtaken: another may lead for some time."""
        return bool(self.interval) and now > self.good + self._half_grace


class Session:
    """A request's life: `receive` takes bytes, returns answers, keeps `state`.

    `daemon`: the id of a daemon of ours, None before the first answer and of FLoM's.  `grace`: ms
    for which it keeps the lock of a holder that is not connected, -1: as long as the holder's
    process lives, None: it tells nothing.  `asked`: when the request was sent (boot_clock).
    """

    def __init__(self):
        self.state = ASKING
        self.asked = 0.0
        self.pings = Pings()
        self.daemon: "str | None" = None
        self.grace: "int | None" = None
        self._buffer = b""

    def leave(self, name: "str", rollback: "bool") -> "bytes":
        """The last message of a holder, to be followed by a half-close."""
        self.state = LEAVING
        message = unlock_message(name, rollback)
        if self.daemon:
            message += encode(PING, 8)
        return message

    def receive(self, data: "bytes", now: "float" = 0.0) -> "list[types.SimpleNamespace]":
        """The answers that are complete with `data`, read `now` (boot_clock).  ProtocolError."""
        *messages, self._buffer = (self._buffer + data).split(END)
        answers = []
        for message in messages:
            answers += self._take(decode(message + END), now)
        self._check_rest()
        return answers

    def _check_rest(self):
        """Raises ProtocolError when what has come cannot become a message."""
        start = self._buffer.lstrip()[:20]
        if start[:1] in (b"", b"<") and len(self._buffer) <= ENDLESS:
            return
        if start[:1] == b"\x15":  # an alert
            raise ProtocolError("it wants TLS")
        raise ProtocolError(f"it says {plain(repr(start), 60)}")

    def _take(self, message, now):
        """[answer] in a message, [] in one that is none; takes the step that it tells."""
        verb, step = message["msg"]["verb"], message["msg"]["step"]
        if (verb, step) == (PING, 8):  # no daemon asks so; harmless
            return []
        if (verb, step) == (PING, 16) and self.pings.answer(now):  # not that of the unlock
            return []
        answer = message.get("answer")
        rc = None
        if answer is not None:
            rc = answer.setdefault("rc", OK)
        outcomes: "Any" = NEXT.get((self.state, verb, step), {})
        if rc not in outcomes:
            raise ProtocolError(f"verb {verb} step {step} {str(answer)[:99]} while {self.state}")
        self.state = outcomes[rc]
        if answer is None:
            return []
        about = message.get("session", {})
        if step == 16:
            self.daemon = about.get("daemon")
            self.grace = about.get("grace")
            self.pings.begin(self.asked, about.get("ping"), self.grace, now)
        found = {**about, **answer}
        if "reason" in found:
            found["reason"] = visible(found["reason"][:500])
        return [types.SimpleNamespace(**{name: found.get(name) for name in FIELDS})]


# --- Connection ----------------------------------------------------------------------------------
# A non-blocking stream to the daemon, with TLS where three files say so, and the session on it.
# Connecting and the first answer have PATIENCE: a daemon that says nothing is an error.
#
# A daemon may have several addresses.  In a Race they are tried side by side until one connection
# is made.  There the daemon is asked, and nowhere else meanwhile: two might both grant.  If that
# address is of no use the Race goes on with those that are left.  Where nobody listens somebody
# may in a moment: so such an address is tried again as long as another one says nothing at all.
PATIENCE, GOODBYE = 10, 5  # s: for a first answer, for the daemon's EOF after ours
NO_TLS = 1  # s for a daemon that ends in each handshake of TLS, and may just have been restarted
SEVERAL, EACH = 15, 6  # s: PATIENCE with several addresses in all, with each but the last
STAGGER = 0.25  # s from one connection attempt to the next
CHUNK = 65536  # bytes read at once
NOBODY = {errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET}  # connect: nobody listens there
OUT_OF_REACH = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN,
                errno.ENETDOWN}  # so the kernel's keepalive, too, ends a connection
NOT_YET = {errno.EINPROGRESS, errno.EALREADY, errno.EINTR, errno.EAGAIN}
KEEPALIVE = (15, 5, 3)  # s, s, probes: a holder is to learn of a dead network before the daemon


def is_eof(error: "OSError") -> "bool":
    """Whether TLS has met the end of the connection; Python 3.6 with OpenSSL 3 has no name for
    that."""
    named = type(error).__name__ in ("SSLEOFError", "SSLZeroReturnError")
    return named or "unexpected eof" in str(error)


def is_end(error: "OSError") -> "bool":
    """Whether the other side has ended the connection."""
    return isinstance(error, (ConnectionResetError, BrokenPipeError)) or is_eof(error)


def is_about_certificates(error: "OSError") -> "bool":
    """Whether TLS has failed for a certificate, and not for a version, a cipher or a record."""
    reason = getattr(error, "reason", None) or ""
    words = "CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "KEY_TOO_SMALL", "MD_TOO_WEAK"
    return type(error).__module__ == "ssl" and any(word in reason for word in words)


def is_alert(error: "OSError") -> "bool":
    """Whether the other side has said, by TLS, that it does not go on."""
    return "ALERT" in (getattr(error, "reason", None) or "")


def explain(error: "OSError") -> "str":
    """What an OSError of a connection means."""
    if type(error).__module__ != "ssl":
        return error.strerror or str(error)
    reason = getattr(error, "reason", None)  # with OpenSSL 1.1 an end too early has none
    if is_eof(error) or reason in (None, "WRONG_VERSION_NUMBER", "UNEXPECTED_MESSAGE"):
        return "TLS: it does not speak TLS, or refuses to"
    what = "it failed"
    if is_about_certificates(error):
        what = "its certificate"
    if is_alert(error):
        what = "it refuses our certificate" if is_about_certificates(error) else "it refuses"
    return f"TLS: {what}: {getattr(error, 'verify_message', None) or reason}"


class Connection:
    """A stream to a daemon and the session on it; a `with` block closes it on an error only, and
    not when it is Silent.

    It is its maker's: a process made by fork closes its own copy, and does not end the stream.
    """

    def __init__(self, family, where: "str"):
        self.family, self.where = family, where
        self.session = Session()
        self.is_connected = False
        self.sock: "Any" = socket.socket(family, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.name = None  # the one CN of the daemon's certificate
        self.address = None  # as `locating` has found it
        self.suspended = boot_clock() - clock()  # s, since the boot, before it was made
        self._not_now: "Any" = (BlockingIOError,)  # nothing can be read or written at present
        self._maker = os.getpid()
        self._is_closed = False
        self._is_awaited = False

    def __enter__(self):
        return self

    def __exit__(self, error_class, error, traceback):
        if error_class and not isinstance(error, Silent):
            self.close()

    @property
    def is_open(self) -> "bool":
        """Whether this process has not closed it."""
        return not self._is_closed and self.sock.fileno() >= 0

    def opening(self, address, until: "float", context):
        """Steps that connect, with TLS where there is a context; raises OSError."""
        if self.family != socket.AF_UNIX:
            tune(self.sock, *KEEPALIVE)
        code = self.sock.connect_ex(address)
        while code in NOT_YET and clock() < until:
            if code == errno.EAGAIN:  # the backlog of a local daemon is full, which no event tells
                yield pause(0.01)
            else:
                yield self.sock.fileno(), WRITE, until - clock()
            code = self.sock.connect_ex(address)
        self._check_connected(code, address)
        self.is_connected = True
        if context:
            yield from self._securing(until, context)

    def _check_connected(self, code, address):
        if code in (0, errno.EISCONN):
            if self.sock.getsockname() != address:
                return
            code = errno.ECONNREFUSED  # TCP has connected to itself
        elif code in NOT_YET:
            code = errno.ETIMEDOUT
        raise OSError(code, os.strerror(code))

    def _securing(self, until, context):
        import ssl
        self._not_now = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
        self.sock = secured(self.sock, context)
        while clock() < until:
            events = READ
            try:
                self.sock.do_handshake()
                self.name = common_name(self.sock.getpeercert())
                return
            except ssl.SSLWantWriteError:
                events = WRITE
            except self._not_now:
                pass
            yield self.sock.fileno(), events, until - clock()
        raise OSError(errno.ETIMEDOUT, "it does not answer the TLS handshake")

    def check_name(self, peerid: "str | None"):
        """Refuses a daemon whose certificate has not one CN, its peer id; raises Useless."""
        if not self.name or self.name != peerid:
            raise Useless(f"{self.where}: the one CN of its certificate is {self.name!r}, "
                          f"but its peer id is {peerid!r}")

    def check_owner(self):
        """Refuses a stranger's daemon on this user's own socket: it could grant anything."""
        _, uid = credentials(self.sock)
        owners = [uid]
        try:
            owners.append(os.stat(self.where).st_uid)
        except FileNotFoundError:  # its daemon is ending: it has removed it, and answers no more
            if uid is None:
                raise
        for owner in owners:
            if owner not in (None, 0, os.getuid()):
                raise DaemonUnavailable(f"{self.where} belongs to user {owner}: refused; remove "
                                        "it, or name another socket with -s")

    def send(self, data: "bytes"):
        """Sends a message in one write, for which a socket always has room; raises Gone."""
        try:
            self.sock.send(data)
        except OSError as error:
            raise self._ended(error)

    def take(self) -> "bytes":
        """The bytes that have come, b"" when none have; Gone at the end."""
        try:
            data = self.sock.recv(CHUNK)
        except self._not_now:
            return b""
        except OSError as error:
            raise self._ended(error)
        if not data:
            raise Gone("it closed the connection", self.where)
        return data

    def _ended(self, error):
        if is_eof(error):
            return Gone("it closed the connection", self.where)
        text = explain(error)
        if is_about_certificates(error):  # TLS 1.3 tells it after the handshake
            return Useless(f"{self.where}: {text}")
        return Gone(text, self.where, error.errno)

    def receive(self):
        """The answers in what has come, None when nothing has; raises Gone, ProtocolError.

        It reads once: a daemon that sends without end must not keep its client from all else.
        """
        data = self.take()
        if not data:
            return None
        return self.session.receive(data, boot_clock())

    def ping(self):
        """Sends a ping if one is due; raises Gone."""
        message = self.session.pings.due(boot_clock())
        if message:
            self.send(message)

    def answering(self, until: "float"):
        """Steps to the next answers, [] when there are none before `until`."""
        answers: "Any" = []
        while not answers and clock() < until:
            yield input_of(self.sock, until)
            answers = self.receive()
        return answers

    def parting(self, message: "bytes", patience: "float", answered: "bool" = False):
        """Steps that send a last message, half-close, and wait for what follows.

        TLS says goodbye, too, unless the message may be `answered`: that would lose the answer.
        The result is what came, b"" when the daemon closed the connection before, None when
        neither happened in `patience` s.  The connection is closed in any case.
        """
        data = bytearray()
        until = clock() + patience
        try:
            self.send(message)
            self._half_close(goodbye=not answered)
            while END not in data and len(data) <= ENDLESS:
                if not (yield from self._reading(data, until)):
                    break
            return data or None
        except Gone:
            return data
        finally:
            self.close()

    def unlocking(self, name: "str", rollback: "bool", until: "float"):
        """Steps that unlock, half-close, and wait until that counts, but no longer than `until`
        (monotonic s).

        The result is False when a daemon that would have acknowledged it has ended before.  The
        connection is closed in any case, and nothing that is wrong with it is an error.
        """
        message = self.session.leave(name, rollback)
        try:
            if not self.session.daemon:
                yield from self.parting(message, until - clock())
                return True
            self.send(message)
            self._half_close(goodbye=False)  # that of TLS would lose the answer
            while self.session.state != LEFT and clock() < until:
                yield input_of(self.sock, until)
                self.receive()
            return True
        except (Gone, ProtocolError, DaemonUnavailable):  # or an alert of TLS
            return not self.session.daemon
        finally:
            self.close()

    def fetching(self, message: "bytes", patience: "float"):
        """Steps that send a message and read all of the one that follows, which may be long.

        The result is as that of `parting`; `patience` s may pass before each part of the message.
        """
        data = bytearray()
        try:
            self.send(message)
            # What begins otherwise, or is longer, is no message, and may never end.
            while data[:1] in (b"", b"<") and len(data) <= LONGEST_REPORT:
                came = yield from self._reading(data, clock() + patience)
                if not came or END in data[-2 * CHUNK:]:
                    break
            return data or None
        except Gone:
            return data
        finally:
            self.close()

    def _reading(self, data, until):
        """Steps that add what comes in to `data`; True, or False when nothing came in time."""
        while clock() < until:
            more = self.take()
            if more:
                data += more
                return True
            yield input_of(self.sock, until)
        return False

    def _half_close(self, goodbye):
        if goodbye:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                self.sock.unwrap()
        with contextlib.suppress(OSError):
            if hasattr(socket.socket, "shutdown"):  # SSLSocket's own would end reading, too
                socket.socket.shutdown(self.sock, socket.SHUT_WR)
            else:  # eventlet's sockets are of another class
                self.sock.shutdown(socket.SHUT_WR)

    def close(self):
        """Ends it, also for copies of the descriptor that a command has inherited."""
        self._is_closed = True
        if self._maker == os.getpid():
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
            if self._is_awaited:  # who awaits it is woken, and lets it go
                return
        self.sock.close()

    def note_awaited(self, awaited: "bool"):
        """Notes that another thread waits for its descriptor, or does not any more.

        It is not closed meanwhile: the next file of the program would have its number, and the
        thread, woken a moment too late, would go on to wait for that.
        """
        self._is_awaited = awaited
        if self._is_closed and not awaited:
            self.sock.close()


@functools.lru_cache(maxsize=None)
def program_connections():
    """The connections of a program, in a WeakSet, of which a fork closes the child's copies.

    A child that kept its copy would keep a lock, or a place in the queue, of a parent that has
    ended.  Python 3.6 does not tell of a fork: there the child closes its copy when it releases
    the Lock, or drops it.
    """
    import weakref
    connections: "Any" = weakref.WeakSet()

    def close_copies():
        for connection in list(connections):
            connection.sock.close()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=close_copies)
    return connections


def program_connection(family, where: "str") -> "Connection":
    """A Connection that no process made by fork keeps.  flom's command inherits flom's."""
    connection = Connection(family, where)
    program_connections().add(connection)
    return connection


class Race:
    """The addresses of a daemon: the first with which a connection is made, TLS included, wins.

    The attempt at the next address begins when the one before has failed, or has had no result for
    STAGGER (RFC 8305).  Where nobody listens somebody may in a moment: it is tried again while the
    attempt at another address, whose host may have gone, is under way.  `left`: the addresses to
    be tried.  `make` is Connection or, in a program, program_connection.
    """

    def __init__(self, settings: "Settings", addresses, context, make):
        self.left = list(addresses)
        self._context, self._make = context, make
        self._own_socket = not settings["SocketName"]
        self._running: "dict[Any, Any]" = {}  # address: the steps that connect to it
        self._failure = ""
        self._refusing: "set[Any]" = set()  # nobody listens there: a daemon may be started
        self._again: "list[Any]" = []  # those of them that are tried again while another one hangs
        self._may_pass = False  # the last failure may be none in a moment
        self._was_interrupted = False  # the last failure was an end in the handshake

    def winning(self):
        """Steps to the next Connection that is made, None when no address is left."""
        until = clock() + PATIENCE
        next_date = 0.0
        try:
            while self.left or self._running:
                if self._running and clock() >= next_date:
                    self.left += self._again
                    self._again = []
                if self.left and (not self._running or clock() >= next_date):
                    address = self.left.pop(0)
                    self._running[address] = self._opening(address, until)
                    next_date = clock() + STAGGER
                winner, wait = self._resume()
                if winner:
                    return winner
                if self._running:
                    yield self._next_step(wait, next_date)
        finally:
            self._close_others()

    def _resume(self):
        """Resumes each attempt: (the winner, None without one; the step of the last attempt)."""
        wait = None
        for address, steps in list(self._running.items()):
            try:
                wait = next(steps)
            except StopIteration as end:
                del self._running[address]
                if end.value:
                    return end.value, wait
                if address in self._refusing:
                    self._again.append(address)
        return None, wait

    def _next_step(self, wait, next_date):
        """The step to wait for: several sockets have no common event, so they are looked at."""
        if len(self._running) > 1:
            return pause(AGAIN)
        descriptor, events, seconds = wait
        if self.left or self._again:
            seconds = min(seconds, max(0, next_date - clock()))
        return descriptor, events, seconds

    def _close_others(self):
        """Ends the attempts that are under way; they begin anew if the winner is of no use."""
        for steps in self._running.values():
            steps.close()
        self.left[:0] = self._running
        self._running = {}

    def _opening(self, address, until):
        """Steps to a Connection that is ready for a request, None when it fails."""
        family, name = address
        where = name
        if family != socket.AF_UNIX:
            where = show_address(name)
        connection = None
        try:
            with self._make(family, where) as connection:
                yield from connection.opening(name, until, self._context)
                if family == socket.AF_UNIX and self._own_socket:
                    connection.check_owner()
                connection.address = address
                return connection
        except OSError as error:
            self._failure = f"cannot connect to {where}: {explain(error)}"
            self._may_pass = error.errno in OUT_OF_REACH
            if connection and connection.is_connected:
                self._was_interrupted = is_end(error)
            elif error.errno in NOBODY:
                self._refusing.add(address)
            return None

    def asking(self, ask):
        """Steps to the result of the steps `ask(connection)` at the first winner that is of use.

        The result is None when nobody listens at one of the addresses, where a daemon may be
        started.  Whatever is wrong with a winner before it has answered, the next is asked.  What
        `ask` raises is raised; Gone when a daemon has ended, whose place another may take soon.
        """
        wrong = None
        while True:
            connection = yield from self.winning()
            if not connection:
                break
            try:
                with connection:
                    return (yield from ask(connection))
            except LeftQueue:
                raise
            except (Gone, Useless) as error:
                if not isinstance(wrong, Gone):
                    wrong = error
        if wrong:
            raise wrong
        if self._was_interrupted:
            raise Interrupted(self._failure)
        if self._failure and not self._refusing:
            failure = DaemonUnavailable(self._failure)
            failure.may_pass = self._may_pass
            raise failure
        return None


def starting_race(settings: "Settings", diary: "Diary", make=Connection):
    """Steps to a Race of all addresses, for one who holds no lock."""
    addresses = yield from locating(settings, diary)
    return Race(settings, addresses, tls_context(settings), make)


# --- Reading a report ----------------------------------------------------------------------------
# The daemon answers a lock 8 for _STATUS with one large message, whose entries follow the resource
# that they belong to.  A FLoM daemon refuses the name.  JSON: numbers are numbers, but a token is
# a string, since many readers would lose its last digits.
#
# A report is {"daemon": entry, "resources": [entry], "parked": [entry]}; the entry of a resource
# has "holders" and "waiters", lists of entries again.  An entry is a dictionary of attributes.
INTEGERS = ("pid", "since", "position", "quantity", "idle", "absent", "window", "members",
            "latency", "left")


def fetch_report(settings: "Settings", diary: "Diary", make=Connection):
    """Steps to the report of the daemon; starts none.  Raises DaemonUnavailable."""
    connection, data = yield from asking_for_report(settings, diary, make)
    try:
        return arrange_report(data)
    except ProtocolError as error:
        raise DaemonUnavailable(f"{connection.where} gives no report: {error}")


def asking_for_report(settings, diary, make=Connection):
    """Steps to (connection, the report as it came) of the first address that gives one."""
    race = yield from starting_race(settings, diary, make)

    def ask(connection):
        patience = PATIENCE
        if race.left:
            patience = EACH
        return connection, (yield from _asking_one(connection, settings, patience))
    found = yield from race.asking(ask)
    if not found:
        raise no_daemon(settings)
    return found


def _asking_one(connection, settings, patience):
    """Steps to the report as it came, of a daemon that is whom it says it is; Useless."""
    data = yield from connection.fetching(status_request("flom.py"), patience)
    useless = f"{connection.where} gives no report"
    if data is None:
        raise Useless(f"{useless}: {patience} s have passed")
    if not data:
        raise Useless(f"{useless}: it closed the connection")
    try:
        sessions = [found for _, tag, found, _ in tags(data) if tag == "session"]
    except ProtocolError as error:
        raise Useless(f"{useless}: {error}")
    if settings["TlsCertificate"] and settings["TlsCheckPeerId"]:
        peerid = None
        if sessions:
            peerid = sessions[0].get("peerid")
        connection.check_name(peerid)
    return data


def arrange_report(data: "bytes") -> "dict":
    """The report that is in a message; raises ProtocolError, DaemonUnavailable."""
    report: "dict" = {"daemon": None, "resources": [], "parked": []}
    refused = None
    entries = {"resource": report["resources"], "parked": report["parked"]}
    for closing, tag, attributes, _ in tags(data):
        if closing:
            continue
        _make_readable(attributes)
        if tag == "resource":
            attributes.update(holders=[], waiters=[])
            entries.update(holder=attributes["holders"], waiter=attributes["waiters"])
        if tag == "answer":
            refused = attributes.get("reason")
        if tag == "daemon":
            report["daemon"] = attributes
        elif tag in entries:
            entries[tag].append(attributes)
    if report["daemon"] is None and refused:
        raise DaemonUnavailable(f"the daemon refuses: {visible(refused)}")
    if report["daemon"] is None:
        raise DaemonUnavailable("this daemon cannot report: it is not flomd.py")
    return report


def _make_readable(attributes):
    """Numbers, modes and names of an entry of the report, in place of texts; ProtocolError."""
    for name in INTEGERS:
        if re.fullmatch("-?[0-9]{1,18}", attributes.get(name, "")):
            attributes[name] = int(attributes[name])
    if attributes.get("mode", "") in list("012345"):
        attributes["mode"] = MODES[int(attributes["mode"])]
    for name in {"name", "node"} & attributes.keys():
        attributes[name] = decode_name(attributes[name])


def keep_named(report: "dict", name: "str"):
    """Drops what is not of this name; of a node, its tree stays."""
    wanted = {name, "/".join(name.split("/")[:2])}
    for part in ("resources", "parked"):
        report[part] = [entry for entry in report[part] if entry.get("name") in wanted]


def entries_of(report: "dict"):
    """Yields (entry, name of what it holds or awaits, whether it holds) of all in the report."""
    parked = {"holders": [], "waiters": report["parked"]}
    for resource in report["resources"] + [parked]:
        for role in ("holders", "waiters"):
            for entry in resource[role]:
                name = entry.get("node") or entry.get("name") or resource.get("name", "?")
                yield entry, name, role == "holders"


def finding_outer_lock(settings, diary, parents, make):
    """Steps to the holder's entry of a lock with one of the ids `parents` that is as good as the
    lock that is wanted; None when there is none, or nothing that reports.
    """
    try:
        report = yield from fetch_report(settings, diary, make)
    except DaemonUnavailable:
        return None
    for entry, name, holds in entries_of(report):
        if holds and entry.get("id") in parents and name == settings["Name"]:
            if covers(entry, settings):
                return entry
    return None


def covers(holder: "dict", settings: "Settings") -> "bool":
    """Whether a holder of the same name has no less than what is wanted, in the form it has."""
    kind = kind_of(settings["Name"])
    try:
        check_element(settings["Name"], holder.get("element"))
    except ProtocolError:
        return False
    if not re.fullmatch("[0-9]{1,19}", str(holder.get("token"))):
        return False
    if kind == "numeric":
        quantity = holder.get("quantity")
        return isinstance(quantity, int) and quantity >= settings["Quantity"]
    if kind in WITH_MODE:
        mode = holder.get("mode")
        return mode in MODES and settings["LockMode"] in COVERED[MODES.index(mode)]
    return True


# --- Claim ---------------------------------------------------------------------------------------
# A Claim is one request for a lock, from its first message to its release: on one connection, and
# after the end of a daemon on the next.
#
# When the daemon vanishes, a waiter asks again and a holder *reclaims*: it asks the next daemon,
# with the token and the element of its grant, for the same lock, without waiting.  The daemon
# grants that only if nobody else can have been granted since; a FLoM daemon takes it for an
# ordinary request, whose grant is as good where it carries no element.  EOF alone means a crash,
# after which a daemon may be started; rc STOPPED means that somebody wanted it to end: then flom
# starts none, and looks for one of somebody else.
#
# A daemon of ours has a memory: the next one knows who held what, and keeps it for him.  For how
# long, the first answer says (`grace`).  Within that time nobody else has the lock, though it is
# lost here.  And so at its end somebody has to tell the memory: an unlock that was not stored is
# repeated, after a reclaim, as long as a goodbye may take (HURRY; at a quorum until the next
# leader must have come).  Only where the daemon sees the end of this process (grace -1) nothing
# has to be told, but a rollback, which it does not see.
# Where nothing is promised the lock may be kept all the same: by a daemon that could not write
# when it was granted, and can now, or by one that lives and has not seen the connection end.
#
# A reclaim that was sent and not answered must not be dropped: a daemon that was busy would grant
# it and then see the end of its connection, which frees the lock, and gives the value of an _S_
# sequence back, although it may have been used.  So the connection of one that takes too long
# stays open until another one is answered, to which the lock moves; and at the end of the claim an
# unlock follows it.
#
# A daemon of a quorum wants pings while the claim waits and while the lock is held.
# * Its grace counts from the sending of the last ping that it has answered, whatever ends the
#   connection.
# * One that leaves a ping unanswered is *doubted*.  A waiter closes the connection, so that it
#   never waits at two, and asks again.  A holder reclaims on another connection; the old one stays
#   open, since a daemon that is merely slow would take its end for an unlock.
# * Several connections may then be open.  The one on which was asked last `decides`: the old one
#   by the answer to a ping until a reclaim is sent, from then on the reclaim by its answer.
# * Where a reclaim is not answered in time it is not repeated soon: its connection stays open, and
#   the other addresses are asked.
# * An OK that is read later than half the grace after what was answered last was sent (flom was
#   stopped with the OK in its buffer) is no grant: another may lead by now.  It is reclaimed, and
#   asked for anew where that is refused.
# * No daemon is ever started beside a quorum.
#
# The life of a Claim: asking (`connection` is None), held (`connection` is that of the grant),
# lost (`loss` says why, until it is held again), released.  One that counts a lock of the command
# above as its own (--deadlock reuse) is held without a connection.
#
# The way of a request: Claim.acquire, _asking (again while a daemon may come), _asking_each (all
# addresses), Race.asking and winning (the next that connects), _granting, _asking_first, and for
# each further answer _waiting.  Of a reclaim: reclaiming (again while there is an obstacle),
# _reclaiming_once, and from _asking on the same.
HURRY = 2  # s: how long to try every AGAIN
SELDOM = 0.5  # s between two tries after that
HAS_OTHER_HOLDER = "it was granted to somebody else"
STOPPED_IT = "it was stopped"
UNANSWERED_PING = "a ping was not answered"
READ_LATE = "its OK was read too late"
SOON = 3  # s at least for a first answer of a daemon that wants pings
UNANSWERED = KEEPALIVE[0] + KEEPALIVE[1] * KEEPALIVE[2]  # s for which it has had no answer then
DURATION = " for ([0-9]+):([0-9]{2}):([0-9]{2})"  # in a reason, as old as the answer


class Progress:
    """Tells on stderr what a command waits for: after 2 s, and again when that has changed.

    Nobody wants a line for each change in a long queue, so there is one in PAUSE s at most.
    """
    FIRST, PAUSE = 2, 5  # s

    def __init__(self, wanted: "bool"):
        self.wanted = wanted
        self._text = ""
        self._since = 0.0  # when the text was noted
        self._next = 0.0  # no line before; 0: nothing has been noted yet
        self._told = ""  # the last line, without a duration

    def note(self, text: "str"):
        """This is what it waits for, from now on."""
        self._text = text
        self._since = clock()
        if not self._next:
            self._next = self._since + self.FIRST

    def date(self) -> "float":
        """When there will be something to tell (monotonic s)."""
        if not self.wanted or without_duration(self._text) == self._told:
            return FOREVER
        return self._next

    def tell(self):
        """Tells it, if its time has come and somebody takes it.

        A full pipe, or a terminal that ^S has stopped, must not keep a lock that was granted
        meanwhile from its command.
        """
        if clock() < self.date():
            return
        if not takes(sys.stderr):
            self._next = clock() + self.PAUSE
            return
        put(f"flom: {longer_by(clock() - self._since, self._text)}", sys.stderr)
        self._told = without_duration(self._text)
        self._next = clock() + self.PAUSE


def wants_progress(settings: "Settings") -> "bool":
    """Whether --progress is set, or by default a person looks who does not read -V."""
    if settings["Progress"] is not None:
        return settings["Progress"]
    return not settings["Verbose"] and bool(sys.stderr) and sys.stderr.isatty()


def without_duration(text: "str") -> "str":
    """A reason without how long somebody has held the lock."""
    return re.sub(DURATION, "", text)


def longer_by(seconds: "float", text: "str") -> "str":
    """A reason, brought up to date after some seconds."""
    def add(found):
        hours, minutes, rest = map(int, found.groups())
        total = int(hours * 3600 + minutes * 60 + rest + seconds)
        return f" for {hhmmss(total)}"
    return re.sub(DURATION, add, text)


def date_of_ping(connection: "Connection") -> "float":
    """When a ping is due, or will have been unanswered for too long (monotonic s)."""
    return clock() + connection.session.pings.date() - boot_clock()


def element_of(answers, before: "str | None") -> "str | None":
    """The element in the last of the answers, `before` without one."""
    if not answers:
        return before
    return answers[-1].element


def promised_until(connection: "Connection", code: "int") -> "float":
    """Until when a lock is kept whose connection has ended (boot_clock); 0: it is not, as far as
    is known.

    `code`: as in Gone.  The grace counts from when the daemon was last known to be there, since it
    can have ended, and the next one begun, soon after.  When the kernel has had no answer for
    UNANSWERED s, this system may have been suspended during them: as long as it was at all since
    the connection was made.  What has ended with another error the daemon may have seen end, too:
    then it has freed the lock.  One that wants pings keeps it whatever the error is.
    """
    session = connection.session
    grace = session.grace
    if grace is None:
        return 0.0
    if grace < 0:
        return FOREVER
    if session.pings.interval:
        return session.pings.good + grace / 1000
    if code == 0:
        return boot_clock() + grace / 1000
    if code in OUT_OF_REACH:
        return clock() + connection.suspended - UNANSWERED + grace / 1000
    return 0.0


class Claim:
    """One request for the lock that the settings name: it asks, waits, reclaims, releases.

    `element`, `token`: those of the grant, None before; `mode`: the name of the mode that is held,
    None for a kind without modes.  `chain`: the id of this claim and those of the claims it is
    made under.  `connection`: that of the grant, None when nothing is held.  `loss`: the LockLost,
    None while the lock is held.  `kept_until`: when others may be granted the lost lock
    (boot_clock), 0 where no daemon has promised anything; `grace`: what the last one has promised,
    as in Session, 0 for nothing.  `interval`: s between the pings that the last daemon wanted, 0.0
    for none.  `unread`: more may have come in on the connection.  `resolving`: how hosts are
    resolved, as resolving_here, _apart or _beside.  `is_watched`: while it is held somebody looks
    whenever it is time for a ping.
    """

    def __init__(self, settings: "Settings", diary: "Diary", command: "str", starter: "Starter",
                 progress: "Progress", make=Connection, life: "bool" = False):
        """`command`: its name in reports; `make`: makes a Connection; `life`: the lock is to end
        with this process.
        """
        self.settings, self.diary = settings, diary
        self.name = settings["Name"]
        self.element: "str | None" = None
        self.token: "int | None" = None
        self.mode: "str | None" = None
        if kind_of(self.name) in WITH_MODE:
            self.mode = MODES[settings["LockMode"]]
        above = re.findall("[0-9a-f]{16}", os.environ.get("FLOM_SESSION", ""))
        self.chain = [os.urandom(8).hex()] + above[:CHAIN - 1]
        self.connection: "Any" = None
        self.loss: "Any" = None
        self.kept_until = 0.0
        self.grace = 0
        self.interval = 0.0
        self.unread = False
        self.resolving: "Any" = resolving_here
        self._command, self._progress = command, progress
        self._starter, self._make = starter, make
        self._key, self._life = os.urandom(8).hex(), life
        self.is_watched = life
        self._owner = 0  # the pid of the process that holds it
        self._keeper = 0  # the pid of the process for which a daemon may keep it
        self._reused = False
        self._is_final = False  # it was taken away, or granted to somebody else
        self._may_be_remembered = False  # it is lost, but its daemon may have stored it
        self._reclaim: "Any" = None  # the steps that reclaim it
        self._silent: "list[Connection]" = []  # open until a reclaim is answered on another
        self._decides: "Any" = None  # the one of them whose answer counts
        self._doubted: "Any" = None  # the address of the daemon that left a ping unanswered
        self._has_waited = False  # in the queue of a daemon that wants pings
        self._farewell = b""  # the unlock, when the claim ends
        self._patience = PATIENCE  # s for finding a daemon that serves
        if of_several_addresses(settings):
            self._patience = SEVERAL
        self._latest: "Any" = None  # the connection that was made last
        self._addresses: "list" = []  # where a daemon was looked for last
        self._context = None
        self._about: "Any" = {}
        self._deadline = FOREVER  # monotonic s

    # Acquire and release

    def acquire(self, started: "float | None" = None):
        """Waits for the lock; raises the LockError that says why it is not held.

        `started`: when the wait began (monotonic s), for the Timeout of the settings.
        """
        with self.becoming_ours(started):
            finish(self.acquiring())

    @contextlib.contextmanager
    def becoming_ours(self, started: "float | None" = None):
        """A block in which the steps of `acquiring` are run; after it the lock is held."""
        if started is None:
            started = clock()
        limit = self.settings["Timeout"]
        if limit >= 0:
            self._deadline = started + limit / 1000
        self._context = tls_context(self.settings)
        try:
            yield
            self._owner = self._keeper = os.getpid()
        finally:
            self._starter.close()
            if not self._owner:  # a signal handler may raise after the grant, too
                self._abandon()

    def acquiring(self):
        """Steps that ask for the lock, and reclaim it when its OK was read late."""
        if (yield from self._reusing()):
            return
        self._about = self._introduction()
        self._check_length()
        while True:
            self.connection, answer = yield from self._asking()
            self.element, self.token = answer.element, answer.token
            until = max(self._deadline, clock() + HURRY)
            while self.connection and self._is_late():
                self._doubt(READ_LATE)
                if (yield from limiting(self._reclaiming(), until)) is None:
                    raise refusal(LATE, "", self.settings)
            if self.connection:
                return
            self._is_final = False  # nothing has run: there is nothing to be lost
            self.loss = None

    def _is_late(self):
        """Whether the OK that was read last is no grant."""
        return self.connection.session.pings.is_late(boot_clock())

    def _reusing(self):
        """Steps that count as held what a command above holds, if that is wanted and as good.

        It is neither asked for nor released, and only that command's flom watches it.
        """
        parents = self.chain[1:]
        if self.settings["Deadlock"] != "reuse" or not parents:
            return False
        holder = yield from finding_outer_lock(self.settings, self.diary, parents, self._make)
        if not holder:
            return False
        self.chain = parents
        self.element, self.token = holder.get("element"), int(holder["token"])
        self.mode = holder.get("mode")
        self._reused = True
        return True

    def _introduction(self):
        """The additions of ours to the request: who asks, and under which locks."""
        progress = None
        if self.diary.is_read() or self._progress.wanted or self.settings["Timeout"] == 0:
            progress = 1
        life = None
        if self._life:
            life = 1
        return {
            "client": f"flom.py/{VERSION}",
            "id": self.chain[0],
            "key": self._key,
            "life": life,
            "kill": self.settings["KillAfter"],
            "parent": ",".join(self.chain[1:]) or None,
            "pid": os.getpid(),
            "user": plain(login(), 32),
            "host": plain(os.uname().nodename, 64),
            "cmd": plain(self._command, 32),
            "progress": progress}

    def _check_length(self):
        """Raises UsageError when no daemon would read the request."""
        if len(lock_message(self.settings, self._about, wait=True)) > ENDLESS:
            raise UsageError(f"{self.settings.origins['Name']}: a name of {len(self.name)} "
                             "characters is too long for a request")

    def _abandon(self):
        """Ends the request that an exception has cut short."""
        self.connection = None
        self._close_silent()
        if self._latest:
            self._latest.close()

    def is_ours(self) -> "bool":
        """Whether this process, no parent of it, has acquired the lock and not released it."""
        return self._owner == os.getpid()

    def release(self, rollback: "bool") -> "bool":
        """Releases the lock; takes at most 5 s, at a quorum 3 s and twice the ttl.  False when it
        had been lost and is refused now.

        Nothing that is wrong with the connection is an error: its end frees the lock, and what
        the lock was held for is done.
        """
        return finish(self.releasing(rollback))

    def releasing(self, rollback: "bool"):
        """The steps of `release`."""
        ours = self.is_ours()
        self._owner = 0
        self._reused = False
        try:
            return not ours or (yield from self._parting(rollback))
        finally:
            self.forget()

    def _parting(self, rollback):
        """Steps that unlock, until a daemon has acknowledged it, or need not be told; result as
        `release`.

        A refusal after an unlock says that the unlock is stored.
        """
        patience, hurry = self._times_to_part()
        until, wait = clock() + patience, AGAIN
        self._starter.order = "the lock is released"
        self._farewell = unlock_message(self.name, rollback)
        unlocked = False
        while self.connection or self._is_kept_longer(rollback):
            if self.connection:
                unlocked = True
                if (yield from self._unlocking(rollback, until)):
                    break
                # A daemon that closes each connection is not asked without end.
                yield pause(min(wait, max(0, until - clock())))
                wait = min(2 * wait, 1)
                continue
            limit = until
            if not self._starter.is_starting:
                limit = min(until, clock() + hurry)
            held = yield from limiting(self.reclaiming(), limit)
            if not held:
                return unlocked or held is None
        return True

    def _times_to_part(self):
        """s for all of it, and s for a reclaim.

        The next leader of a quorum comes after a ttl; later where etcd has to elect one, too, and
        it is found later where a host says nothing.  Not told that the lock is free, it would keep
        it for the grace from then on, and nobody would have it meanwhile.
        """
        if not self.interval:
            return GOODBYE, HURRY
        takeover = 2 * INTERVALS * self.interval + SOON
        return takeover, takeover

    def _is_asking(self):
        """Whether a reclaim may be answered yet."""
        return bool(self._silent) or self._latest.is_open

    def _send_farewell(self, connection):
        """Lets the unlock follow a reclaim that is not waited for any more."""
        if self._farewell:
            with contextlib.suppress(Gone, DaemonUnavailable):
                connection.send(self._farewell)

    def _unlocking(self, rollback, until):
        """Steps to True when that is stored; otherwise the lock is lost, and may be kept."""
        connection = self.connection
        limit = until
        if self.interval:
            limit = min(until, clock() + UNANSWERED_PINGS * self.interval)
            self._doubted = connection.address
        stored = yield from connection.unlocking(self.name, rollback, limit)
        if stored and (not self.interval or connection.session.state == LEFT):
            self.connection = None
            self._keeper = 0
            return True
        self._lose(f"{connection.where}: it has ended, or does not answer")
        self.kept_until = promised_until(connection, 0)
        return False

    def _is_kept_longer(self, rollback):
        """Whether a lost lock would, or might, be kept after the end of this process.

        Or its value be taken for used, or for not used, against the truth: of a holder that is not
        connected a daemon takes it for used, of one whose connection ends for not used.
        """
        if not self.loss or self._is_final:
            return False
        if self.kept_until == FOREVER:
            return self.name.startswith("_S_") and (rollback or self._is_asking())
        if not self.kept_until or self.interval:  # the next leader keeps it from its claim on
            return self._may_be_remembered
        return boot_clock() < self.kept_until

    def drop(self):
        """Ends it without an unlock, whatever has come of that."""
        self._owner = 0
        self._reused = False
        self.forget()

    def forget(self):
        """Closes what is open, without a goodbye."""
        connection, self.connection = self.connection, None
        self.kept_until = 0.0
        if self._reclaim:
            self._reclaim.close()
        for silent in self._silent:
            self._send_farewell(silent)
        self._close_silent()
        self._starter.close()
        if connection:
            connection.close()

    def _close_silent(self):
        for connection in self._silent:
            connection.close()
        self._silent = []
        self._decides = None

    def succeeding(self, previous: "Claim"):
        """Steps that take the place of a claim of the same lock that has ended, or is lost.

        A daemon may keep that one's lock for it, and so for this one too, which asks with the same
        id and key.  Not so a number, which is to be granted once: there it is released first.
        """
        if kind_of(self.name) in ("sequence", "timestamp"):
            yield from previous.releasing(rollback=False)
        elif previous._keeper == os.getpid():
            self.chain = previous.chain
            self._key, self._keeper = previous._key, previous._keeper
        previous.drop()

    # Ask and wait

    def _asking(self):
        """Steps to (connection, granting answer); raises the refusal.

        A daemon that ends before its first answer is asked for again, until patience ends.
        """
        starter = self._starter
        self._has_waited = False
        starter.begin(self._patience, recovering=self.loss is not None)
        until = clock() + NO_TLS
        bare = False
        while True:
            try:
                served = yield from self._asking_each(bare)
                if served:
                    return served
                yield from starter.trying()
            except LeftQueue as gone:
                self.diary.say(f"waiting for {self.name}: {gone.where}: {gone}; asking again")
                starter.begin(self._patience_after_queue(), recovering=True)
                starter.expect_another()
                until = starter.until
                yield pause(AGAIN)
            except Interrupted:
                if clock() >= until:
                    raise
                starter.expect_another()
                yield pause(AGAIN)
            except Gone as gone:
                if clock() >= starter.until:
                    raise self._last_word(self._silence(gone))
                starter.expect_another()
                yield pause(AGAIN)
                bare = not bare and self._is_long() and (yield from self._meeting_floms())
            except DaemonUnavailable as error:
                if not self._may_go_on(error):
                    raise self._last_word(error)
                yield pause(LATER)

    def _patience_after_queue(self):
        """s for which one that has lost its place looks for the next daemon.

        Where several lead by turns one will, some time; nobody could be started in its place.
        """
        if not self.interval:
            return self._patience
        self._has_waited = True
        return max(0, self._deadline - clock())

    def _may_go_on(self, error):
        """Whether a daemon is looked for in spite of the error."""
        if self.loss or clock() >= self._starter.until:
            return False
        if self._has_waited:
            return error.reason is None  # no daemon has said it
        return error.may_pass and self._patience == SEVERAL

    def _last_word(self, error):
        """The error that ends the search: who has waited was not granted the lock in time."""
        if self._has_waited and error.reason is None:
            return refusal(LATE, "", self.settings)
        return error

    def _silence(self, gone):
        text = f"{gone.where} does not answer: {gone}"
        if not self._context:
            text += "; it may want TLS"
        return DaemonUnavailable(text)

    def _patience_with(self, race):
        """s in which the winner of a race must answer."""
        if self.interval:
            return min(EACH, max(SOON, UNANSWERED_PINGS * self.interval))
        if race.left:
            return min(EACH, max(1, self._starter.until - clock()))
        if self._silent:  # each takes a descriptor
            return PATIENCE * 2 ** len(self._silent)
        if self._patience == PATIENCE:
            return PATIENCE
        return max(1, self._starter.until - clock())

    def _message(self, bare):
        """The request, when the lock is lost its reclaim; `bare`: without additions of ours."""
        about: "Any" = self._about
        if bare:
            about = None
        lost: "Any" = {}
        wait = clock() < self._deadline
        if self.loss:
            wait = False
            lost = {"reclaim": self.token, "held": self.element}
        return lock_message(self.settings, about, wait, **lost)

    def _is_long(self):
        """Whether a FLoM daemon would close the connection rather than read the request."""
        return len(lock_message(self.settings, self._about, wait=True)) > LONGEST

    def _meeting_floms(self):
        """Steps to whether a daemon of FLoM may serve, by what is said to a short request.

        One of a quorum may just have ended: asked without additions of ours by mistake, the next
        would let the lock go under its command, which could neither ping nor reclaim.
        """
        if not self.settings["UnicastAddress"] and not self.settings["MulticastAddress"]:
            return True  # a quorum is not local
        def ask(connection):
            connection.send(probe_message())
            answers = yield from connection.answering(clock() + EACH)
            connection.close()
            return bool(answers) and not connection.session.daemon
        try:
            addresses = yield from locating(self.settings, self.diary, self.resolving)
            race = Race(self.settings, addresses, self._context, self._make)
            return bool((yield from race.asking(ask)))
        except (Gone, ProtocolError, DaemonUnavailable):
            return False

    def _asking_each(self, bare):
        """Steps to (connection, granting answer) of the first address that serves, as Race.asking.

        Raises the refusal.
        """
        addresses = yield from self._locating()
        race = Race(self.settings, self._in_turn(addresses), self._context, self._make)

        def ask(connection):
            self._latest = connection
            patience = self._patience_with(race)
            return connection, (yield from self._granting(connection, bare, patience))
        return (yield from race.asking(ask))

    def _locating(self):
        """Steps to the addresses; where a lock is lost, to those of before, if a name server that
        is silent, or has failed together with the daemon, would cost the command its time.
        """
        steps = locating(self.settings, self.diary, self.resolving, self._leave_to_quorum)
        if not self._addresses or not self.loss or not self.settings["UnicastAddress"]:
            self._addresses = yield from steps
            return self._addresses
        with contextlib.suppress(DaemonUnavailable):
            found = yield from limiting(steps, clock() + HURRY)
            self._addresses = found or self._addresses
        return self._addresses

    def _leave_to_quorum(self):
        """A group has answered that it has a quorum: another daemon may be about to lead, as where
        several addresses are named."""
        self._starter.leave_to_quorum()
        if self._patience == PATIENCE:
            self._patience = SEVERAL
            self._starter.until += SEVERAL - PATIENCE

    def _in_turn(self, addresses):
        """The addresses that are to be asked: the one that is doubted comes last, and where a
        reclaim is still unanswered it is not repeated soon."""
        if not self.interval:
            return addresses
        left = [address for address in addresses if not self._is_asked(address)]
        left.sort(key=lambda address: address == self._doubted)
        return left

    def _is_asked(self, address):
        """Whether a reclaim that was sent there may be answered yet.

        The connection may be one of which the daemon's host, started anew, knows nothing.
        """
        asked = [connection.session.asked for connection in self._silent
                 if connection.address == address and connection.session.state == ASKING]
        patience = PATIENCE * 2 ** len(asked)  # each takes a descriptor
        return bool(asked) and boot_clock() < max(asked) + patience

    def _granting(self, connection, bare, patience):
        """Steps from the request to the granting answer; raises the refusal, Useless, Gone."""
        try:
            answer = yield from self._asking_first(connection, bare, patience)
            while connection.session.state == WAITING:
                answer = yield from self._waiting(connection, answer)
            return self._decided(answer)
        except ProtocolError as error:
            raise Useless(f"{connection.where} is no lock daemon: {error}")

    def _decided(self, answer):
        """The answer if it grants; raises the refusal, ProtocolError."""
        rc = answer.rc
        if rc == OK:
            check_element(self.name, answer.element)
            return answer
        if rc == STOPPED:
            self._starter.order = STOPPED_IT
        if rc == BUSY and self.settings["Timeout"] > 0:
            rc = LATE
        raise refusal(rc, answer.reason, self.settings)

    def _asking_first(self, connection, bare, patience):
        """Steps from the request to its first answer."""
        connection.session.asked = boot_clock()
        connection.send(self._message(bare))
        self._decides = None  # this one does
        try:
            answers = yield from connection.answering(clock() + patience)
        except GeneratorExit:
            self._send_farewell(connection)
            raise
        if not answers:
            text = (f"{connection.where} does not answer within {patience:.0f} s: stopped, or no "
                    "lock daemon")
            if self.loss:
                self._silent.append(connection)
                if self.interval:
                    self._decides = connection
                raise Silent(text)
            useless = Useless(text)
            useless.may_pass = True
            raise useless
        self._note_daemon(connection.session)
        if self._context and self.settings["TlsCheckPeerId"]:
            connection.check_name(answers[0].peerid)
        return answers[-1]

    def _note_daemon(self, session):
        """Notes what the daemon of a first answer wants."""
        self.interval = session.pings.interval
        if self.interval:
            self._starter.leave_to_quorum()

    def _waiting(self, connection, answer):
        """Steps from one answer to the next; tells what it waits for."""
        text = self._waits_for(answer)
        self.diary.say(text)
        self._progress.note(text)
        deadline = self._deadline
        if self.loss:  # a reclaim does not wait
            deadline = 0.0
        try:
            answers: "Any" = []
            while not answers and clock() < deadline:
                self._ping(connection)
                date = min(deadline, self._progress.date(), date_of_ping(connection))
                yield input_of(connection.sock, date)
                answers = connection.receive()
                if not answers:
                    self._progress.tell()
        except Gone as gone:
            raise LeftQueue(str(gone), gone.where)
        if not answers:  # how long is as old as the answer
            raise refusal(LATE, without_duration(answer.reason or ""), self.settings)
        return answers[-1]

    def _ping(self, connection):
        """Pings the daemon if it is time for it; Gone when it leaves one unanswered."""
        connection.ping()
        if connection.session.pings.is_silent(boot_clock()):
            self._doubted = connection.address
            raise Gone(UNANSWERED_PING, connection.where)

    def _waits_for(self, answer):
        text = f"waiting for {self.name}"
        if answer.position is not None:
            text += f", place {answer.position}"
        if answer.rc == WAIT_RESOURCE:
            text += ", nobody has created it"
        elif answer.reason:
            text += f", {answer.reason}"
        return text

    # Lose and reclaim

    def look(self) -> "bool":
        """Reads once what the holder's daemon has sent; False when the lock is lost.

        Afterwards `unread` says that there may be more.
        """
        if self.connection is None:
            return self._reused
        connection = self.connection
        where = connection.where
        try:
            answers = connection.receive()
            self._check_state(answers)
            connection.ping()
        except ProtocolError as error:
            self._lose(f"{where}: {error}")
            return False
        except DaemonUnavailable as error:  # it says where
            self._lose(str(error))
            return False
        except Gone as gone:
            self._lose(f"{where}: {self._starter.order or gone}")
            if not self._is_final:
                self.kept_until = promised_until(connection, gone.code)
            return False
        self.unread = answers is not None
        pings, now = connection.session.pings, boot_clock()
        if pings.is_silent(now) or self.is_watched and pings.is_late(now):
            self._doubt(UNANSWERED_PING)
            return False
        return True

    def next_look(self) -> "float":
        """When to look although nothing has come (monotonic s)."""
        if self.unread:
            return clock()
        if self.connection is None:
            return FOREVER
        return date_of_ping(self.connection)

    def confirm(self) -> "bool":
        """As look, for one who looks seldom: where the daemon wants pings, one has been answered
        that was sent no longer than an interval before; takes an interval at most.
        """
        return finish(self.confirming())

    def confirming(self):
        """The steps of `confirm`."""
        until = clock() + self.interval
        while self.look():
            pings = self.connection and self.connection.session.pings
            if not self.interval or not pings or boot_clock() < pings.good + self.interval:
                return True
            pings.hasten()
            if clock() >= until:
                self._doubt(UNANSWERED_PING)
            elif pings.are_unanswered:
                yield input_of(self.connection.sock, until)
        return False

    def _check_state(self, answers):
        """Notes what the daemon has said about the lock; raises Gone when it has taken it away."""
        state = self.connection.session.state
        if state == TAKEN_AWAY:
            self._is_final = True
            raise Gone(answers[-1].reason or TAKEN_AWAY, self.connection.where)
        if state == ENDING:  # the lock is held until its EOF
            self._starter.order = STOPPED_IT

    def _doubt(self, reason):
        """The lock counts as lost until it is reclaimed, or the old connection proves alive."""
        connection = self.connection
        self._silent.append(connection)
        self._decides = connection
        self._doubted = connection.address
        self._set_lost(f"{connection.where}: {reason}")
        self.kept_until = promised_until(connection, 0)

    def _lose(self, reason):
        if self.connection:
            self.connection.close()
        self._set_lost(reason)

    def _set_lost(self, reason):
        """The lock is lost; its connection, which may have ended, is no longer that of a grant."""
        if self.connection:
            self._may_be_remembered = self._has_memory(self.connection.session)
            self.grace = self.connection.session.grace or 0
        self.connection = None
        self.unread = False
        self.kept_until = 0.0
        self.loss = LockLost(f"the lock on {self.name} is lost: {reason}")
        self.loss.reason = reason
        self.diary.warn(str(self.loss))

    def _has_memory(self, session):
        """Whether it is held at a daemon of ours with a memory, which that of a group has not."""
        is_of_group = self.settings["MulticastAddress"] and not self.settings["UnicastAddress"]
        return bool(session.daemon) and bool(session.pings.interval or not is_of_group)

    def _lose_for_good(self, reason):
        self._lose(reason)
        self._is_final = True
        self._keeper = 0

    def reclaiming(self):
        """Steps that try to reclaim a lost lock, to True when it is held again, False: refused.

        Those that are under way, if any: a daemon may have granted already what they ask for, and
        their end would end that, too.
        """
        if self._reclaim is None or self._reclaim.gi_frame is None:  # None: they have ended
            self._reclaim = self._reclaiming()
        return self._reclaim

    def reclaim_until(self) -> "float":
        """Until when to try to reclaim, for who must stop his work then (monotonic s)."""
        if self.interval:
            return clock() + self.kept_until - boot_clock() - 1
        return clock() + RECOVERY_WINDOW / 1000

    def _reclaiming(self):
        """As reclaiming.  A lock that was refused or taken away is not asked for again.

        What the system fails to do is an obstacle, and may be none a moment later: a folder is
        gone, an interface down, no descriptor or process is to be had.
        """
        if self._is_final:
            return False
        hurry = clock() + HURRY
        while True:
            try:
                held = yield from self._reclaiming_once()
                if not held or not self._is_late():
                    self._close_silent()
                    return held
                self._doubt(READ_LATE)
                obstacle = READ_LATE
            except (DaemonUnavailable, UsageError) as error:
                obstacle = str(error)
            except LockError as error:
                self._lose_for_good(error.reason or HAS_OTHER_HOLDER)
                self._close_silent()
                return False
            except OSError as error:  # a Timeout is one, too: it has come before
                if error.errno is None:  # a signal handler's own, as TimeoutError
                    raise
                obstacle = str(error)
            self.diary.say(f"reclaiming {self.name}: {obstacle}")
            if clock() < hurry:
                yield pause(AGAIN)
            else:
                yield pause(SELDOM)

    def _reclaiming_once(self):
        """Steps to True when the lock is held again, False when others had it meanwhile."""
        connection, element = yield from self._asking_beside_the_old()
        known = connection.session.daemon and element == self.element
        if known or kind_of(self.name) not in WITH_ELEMENT:
            self.connection = connection
            self.loss = None
            if self.is_ours():
                self._starter.order = ""
            self.diary.warn(f"the lock on {self.name} is held again")
            return True
        yield from connection.unlocking(self.name, True, clock() + GOODBYE)
        self._lose_for_good(HAS_OTHER_HOLDER)
        return False

    def _asking_beside_the_old(self):
        """Steps to (connection, element) of a reclaim that is granted, or of the one that decides
        when it does so before a reclaim is sent on another."""
        steps = self._asking()
        try:
            while True:
                found = self._read_silent()
                if found:
                    return found
                descriptor, events, seconds = next(steps)
                if self._decides:
                    seconds = min(seconds, LATER)
                yield descriptor, events, seconds
        except StopIteration as end:
            connection, answer = end.value
            return connection, answer.element
        finally:
            steps.close()

    def _read_silent(self):
        """(connection, element) of the one that decides, once it says that the lock is held; None
        before.  Forgets those that have ended; raises the refusal."""
        if not self.interval:
            return None
        for connection in list(self._silent):
            try:
                answers = connection.receive()
            except (Gone, ProtocolError, DaemonUnavailable):
                self._drop(connection)
                continue
            if connection is not self._decides:
                continue
            if self._says_held(connection):
                self._silent.remove(connection)
                return connection, element_of(answers, self.element)
            if connection.session.state == WAITING:  # a reclaim does not wait
                self._drop(connection)
            elif connection.session.state in (REFUSED, TAKEN_AWAY):
                self._drop(connection)
                self._decided(answers[-1])
        return None

    def _says_held(self, connection):
        """Whether the daemon has answered what it was asked last, and not too long ago."""
        pings, state = connection.session.pings, connection.session.state
        return state == HOLDING and not pings.are_unanswered and not pings.is_late(boot_clock())

    def _drop(self, connection):
        connection.close()
        self._silent.remove(connection)
        if self._decides is connection:
            self._decides = None


# --- Python API ----------------------------------------------------------------------------------
# What a Python program imports flom for: the names of __all__.  All other names are flom's own,
# and may change.  A program may have threads, an event loop, processes made by fork, and handlers
# of its signals; flom leaves all of them as they are.
#
# Lock and AsyncLock do the same steps of a Claim.  Lock runs them with `finish`, which sleeps in
# poll(); AsyncLock waits for the same events in the event loop that runs.
#
# Who holds a lock learns of its loss when he looks.  An AsyncLock looks by itself, since its loop
# waits for the connection anyway: it pings where that is wanted, and reclaims.  A Lock has a
# thread for that if `on_lost` is given, and none otherwise.  That thread and the program's own
# never use a Claim at the same time: each has its `turn`.
__all__ = ["Lock", "AsyncLock", "status", "LockError", "Busy", "Timeout", "CannotWait",
           "Impossible", "Deadlock", "LockLost", "DaemonUnavailable", "UsageError"]


def __dir__():
    """The names that dir(flom), and TAB, show from Python 3.7 on (PEP 562)."""
    return __all__ + [name for name in globals() if name.startswith("__")]


@functools.lru_cache(maxsize=None)
def program_log():
    """The logger of flom, which is silent unless the program has said where its lines go."""
    import logging
    log = logging.getLogger("flom")
    if not log.handlers:
        log.addHandler(logging.NullHandler())
    return log


class ProgramDiary(Diary):
    """As Diary; its lines go to logging.getLogger("flom"), too."""

    @property
    def log(self):
        return program_log()

    def is_read(self) -> "bool":
        """Whether somebody reads what a request waits for."""
        return self.verbose or self.log.isEnabledFor(20)  # INFO

    def say(self, text: "str", stream=None):
        """Notes a line."""
        self.log.info("%s", visible(text))
        super().say(text, stream)

    def warn(self, text: "str"):
        """Notes a line on a loss."""
        self.log.warning("%s", visible(text))


def resolving_beside(host, port, kind, scope):
    """Steps to the result of resolve, in a thread."""
    import threading
    with contextlib.suppress(DaemonUnavailable):
        return resolve(host, port, kind, scope, socket.AI_NUMERICHOST)
    found: "list[Any]" = []

    def ask():
        try:
            found.append(resolve(host, port, kind, scope))
        except DaemonUnavailable as error:
            found.append(error)
    try:
        threading.Thread(target=ask, daemon=True).start()
    except RuntimeError as error:  # the system has no thread for it
        raise DaemonUnavailable(f"cannot resolve {host!r}: {error}")
    seconds = 0.001
    while not found:
        yield pause(seconds)
        seconds = min(2 * seconds, AGAIN)
    if isinstance(found[0], DaemonUnavailable):
        raise found[0]
    return found[0]


async def finish_in_loop(steps, until: "float" = FOREVER):
    """As finish, for an event loop.  A task that is cancelled closes the steps."""
    limited = limiting(steps, until)
    try:
        while True:
            await _event(*next(limited))
    except StopIteration as end:
        return end.value
    finally:
        limited.close()


async def _event(descriptor, events, seconds):
    """Waits for events of a descriptor (None: of none), so many seconds at most."""
    import asyncio
    loop = asyncio.get_event_loop()
    come = loop.create_future()

    def wake():
        if not come.done():
            come.set_result(None)
    add, remove = loop.add_reader, loop.remove_reader
    if events == WRITE:
        add, remove = loop.add_writer, loop.remove_writer
    timer = loop.call_later(max(0, min(seconds, DAY)), wake)
    if descriptor is not None:
        add(descriptor, wake)
    try:
        await come
    finally:
        timer.cancel()
        if descriptor is not None:
            remove(descriptor)


def program_name() -> "str":
    """The name of this program in reports; an embedded Python may have no sys.argv."""
    words = getattr(sys, "argv", None) or [""]
    return os.path.basename(words[0]) or "python"


def program_settings(keywords: "dict", config: "bool") -> "Settings":
    """Settings from keywords and, with `config`, from the files."""
    files: "list[str]" = []
    if config:
        files = files_of_settings()
    return keyword_settings(keywords, files)


def body_of(function) -> "str":
    """"plain", "generator" or "coroutine", as that of the function is; TypeError for what has none
    that could run under a lock."""
    import inspect
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if isinstance(inner, type) or not callable(inner):
        raise TypeError(f"{inner!r} is not a function or a method")
    found = "plain"
    for body in inner, type(inner).__call__:
        if inspect.isasyncgenfunction(body):
            raise TypeError(f"{inner!r} is an asynchronous generator: use `async with` in it")
        if inspect.iscoroutinefunction(body):
            found = "coroutine"
        elif inspect.isgeneratorfunction(body):
            found = "generator"
    return found


class _CommonLock:
    """What Lock and AsyncLock have in common.

    A copy, also one that another process gets (pickle), has asked for nothing yet: it has none of
    what `_begin` makes anew, whose names are _PASSING.
    """
    _PASSING = {"_claim", "_was_held", "_askers"}
    _ONE_EACH = ""

    def __init__(self, name: "str | None" = None, mode: "str | None" = None,
                 timeout: "Seconds" = None, quantity: "int | None" = None, *,
                 start_daemon: "bool" = False, config: "bool" = True,
                 on_lost: "Any" = None, **options: "Any") -> "None":
        short = {"name": name, "mode": mode, "timeout": timeout, "quantity": quantity}
        self.settings = program_settings({**short, **options}, config)
        self.name: "str" = self.settings["Name"]
        self.start_daemon = start_daemon
        self.on_lost = on_lost
        self.diary = ProgramDiary(self.settings)
        for warning in self.settings.warnings:
            self.diary.say(warning)
        self._begin()

    def _begin(self):
        """Nothing has been asked for yet."""
        self._claim = self._new_claim(self.settings)
        self._was_held = True  # the last release found no loss
        self._askers: "dict[int, object]" = {}  # by process, who waits for it

    def __getstate__(self) -> "dict[str, Any]":
        return {name: value for name, value in vars(self).items() if name not in self._PASSING}

    def __setstate__(self, state: "dict[str, Any]") -> "None":
        vars(self).update(state)
        self._begin()

    def _new_claim(self, settings):
        """A Claim that has asked for nothing yet, for a program that may have threads and fork."""
        starter = Starter(settings, spawn_daemon, self.start_daemon)
        return Claim(settings, self.diary, program_name(), starter, Progress(False),
                     program_connection)

    def _like(self, kind, timeout=None):
        """A lock of the class `kind`, otherwise as this one, that has asked for nothing yet."""
        other = kind.__new__(kind)
        other.__dict__.update(self.__dict__, settings=self._request_settings(True, timeout))
        other._begin()
        return other

    @property
    def element(self) -> "str | None":
        """The element of the grant, None for a kind of resource without elements."""
        return self._claim.element

    @property
    def token(self) -> "int | None":
        """The token of the grant, which grows with each grant of the resource."""
        return self._claim.token

    def _request_settings(self, blocking, timeout):
        """The settings of one request, which may have a timeout of its own; UsageError."""
        if not isinstance(blocking, bool):
            raise UsageError(f"blocking=: {blocking!r} is not True or False; seconds are timeout=")
        if timeout is None and blocking:
            return self.settings
        limit = 0
        if timeout is not None:
            limit = milliseconds(timeout, "timeout=")
        if not blocking and limit > 0:
            raise UsageError(f"timeout=: {timeout!r} is not to be had with blocking=False")
        if not blocking:
            limit = 0
        import copy
        settings = copy.copy(self.settings)
        settings.values = {**settings.values, "Timeout": limit}
        return settings

    @contextlib.contextmanager
    def _asking_alone(self):
        """A block in which nobody else of this process asks for this lock; RuntimeError.

        Two that ask would both be granted it, one after the other, and the claim of the first be
        dropped for that of the second while the first believes that it holds the lock.
        """
        me, process = object(), os.getpid()
        try:
            if self._askers.setdefault(process, me) is not me:  # one step for all threads
                raise RuntimeError(f"{self.name} is held already, or waited for: use one "
                                   f"{self._ONE_EACH}")
            yield
        finally:
            if self._askers.get(process) is me:
                del self._askers[process]

    def _acquiring(self, blocking, timeout):
        """Steps to a Claim in the place of the last one; nothing is asked for yet."""
        claim = self._new_claim(self._request_settings(blocking, timeout))
        yield from claim.succeeding(self._claim)
        self._claim = claim
        return claim

    def _decorate_coroutine(self, kind, function):
        @functools.wraps(function)
        async def locked(*args, **kwargs):
            async with self._like(kind):
                return await function(*args, **kwargs)
        return locked

    def _tell_held(self):
        self.diary.log.debug("%s is held, token %s", self.name, self.token)

    def _releasing(self, rollback):
        """Steps that release the lock."""
        if self._claim.is_ours():
            self.diary.log.debug("%s is released", self.name)
        self._was_held = yield from self._claim.releasing(rollback)

    def _checking(self):
        """Steps that end when the lock is held; LockLost, LockError."""
        claim = self._claim
        if not claim.is_ours():
            raise LockError(f"{self.name} is not held by this process")
        if (yield from claim.confirming()):
            return
        limit = clock() + RECOVERY_WINDOW / 1000
        if not (yield from limiting(claim.reclaiming(), limit)):
            raise claim.loss

    def _ending(self):
        """Steps to the LockLost at the end of a block, None while the lock is held, or if it was
        released in the block; what takes long at a quorum is left to the release."""
        claim = self._claim
        if not claim.is_ours():
            return None
        if not claim.look() and not claim.interval:
            yield from limiting(claim.reclaiming(), clock() + RECOVERY_WINDOW / 1000)
        return claim.loss

    def _check_end(self, loss):
        """Raises the LockLost after the release, unless it got the lock back for that."""
        now = self._claim.loss
        if not self._was_held or loss and now is loss:
            raise now


class Lock(_CommonLock):
    """A lock on a resource: `with flom.Lock("backup", mode="PR", timeout=5) as lock: ...`

    Leaving the block releases it, by an exception as a rollback; it raises LockLost when the lock
    was lost.  `@flom.Lock("name")` decorates a function, a generator function or `async def`, of
    which each call has a lock of its own.
    name, mode ("EX"), timeout (seconds, as a number, a text or a timedelta; 0: do not wait,
    negative or inf: wait for ever) and quantity are those of the command line, other settings are
    keywords named as its long options (unicast_address="db1", resource_timeout=500 in ms); what is
    not given comes from the configuration files, with config=False from nowhere.  A daemon is
    started only with start_daemon=True.

    reentrant=True: the thread that holds it may acquire it again, and releases it as often; the
    last release decides on a rollback.  on_lost: a function that is called once, with the lock,
    when it is lost and was not to be had back; by a thread, which looks after the lock.

    `element` and `token` are those of the grant.  Use one Lock per thread: a second one that asks
    gets a RuntimeError.  A process made by fork does not share it, and neither keeps nor releases
    it; a copy, or what pickle makes of it elsewhere, has asked for nothing yet.  Raises UsageError
    for wrong settings.
    """

    _PASSING = _CommonLock._PASSING | {"_depth", "_thread", "_turn", "_of_thread"}
    _ONE_EACH = "Lock per thread"

    def __init__(self, name: "str | None" = None, mode: "str | None" = None,
                 timeout: "Seconds" = None, quantity: "int | None" = None, *,
                 start_daemon: "bool" = False, config: "bool" = True, reentrant: "bool" = False,
                 on_lost: "Callable[[Lock], object] | None" = None, **options: "Any") -> "None":
        if on_lost and body_of(on_lost) != "plain":
            raise TypeError(f"on_lost=: {on_lost!r} is not plain: no event loop would run it")
        self.reentrant = reentrant
        super().__init__(name, mode, timeout, quantity, start_daemon=start_daemon, config=config,
                         on_lost=on_lost, **options)

    def _begin(self):
        super()._begin()
        self._depth = 0  # how often it was acquired and not released
        self._thread = 0
        # what reentrant functions hold, those with another timeout, too
        self._of_thread: "dict[int, Lock]" = vars(self).get("_of_thread", {})
        self._turn: "Any" = contextlib.ExitStack()

    def _turn_of(self, claim):
        """A block in which no other thread uses the claim; one made by fork has no other."""
        if claim.is_ours():
            return self._turn
        return contextlib.ExitStack()

    def __enter__(self) -> "Lock":
        return self.acquire()

    def __exit__(self, error_class: "object", error: "object", traceback: "object") -> "None":
        last = error is None and self._depth <= 1 and self._claim.is_ours()
        loss = None
        try:
            if last:
                with self._turn_of(self._claim):
                    loss = finish(self._ending())
        finally:
            self.release(rollback=error is not None)
        if last:
            self._check_end(loss)

    def timeout(self, seconds: "Seconds") -> "TimedLock":
        """`with lock.timeout(5):` acquires this lock with this timeout in place of its own."""
        return TimedLock(self, seconds)

    def acquire(self, blocking: "bool" = True, timeout: "Seconds" = None) -> "Lock":
        """Waits for the lock and returns self; raises the LockError that says why it is not held.

        blocking=False: does not wait, Busy.  timeout: seconds, as that of Lock, for this call
        alone.  A lock that was lost is asked for anew.
        """
        if self._is_of_this_thread():
            self.check()
            self._depth += 1
            return self
        with self._asking_alone():
            if self._claim.is_ours() and (self.reentrant or self.locked()):
                raise RuntimeError(f"{self.name} is held already")
            with self._turn_of(self._claim):
                claim = finish(self._acquiring(blocking, timeout))
            with claim.becoming_ours():
                finish(claim.acquiring())
            claim.resolving = resolving_beside
            self._depth = 1
            self._tell_held()
            if self.reentrant or self.on_lost:
                self._begin_to_watch(claim)
        return self

    def _is_of_this_thread(self):
        """Whether it is reentrant, and held by the thread that asks."""
        if not self.reentrant or not self._claim.is_ours():
            return False
        import threading
        return self._thread == threading.get_ident()

    def _begin_to_watch(self, claim):
        import threading
        self._thread = threading.get_ident()
        if not self.on_lost or not claim.connection:
            return
        self._turn = threading.RLock()
        claim.is_watched = True
        try:
            threading.Thread(target=self._watch, args=(claim,), daemon=True).start()
        except RuntimeError:  # the system has no thread for it
            self.release()
            raise

    def _watch(self, claim):
        """In a thread: looks after the lock as long as it is held, and tells its loss."""
        limit = 0.0
        awaited = None  # the connection that is waited for
        while True:
            with self._turn:
                if awaited:
                    awaited.note_awaited(False)
                if not claim.is_ours():
                    return
                if claim.look():
                    limit = 0.0
                elif not limit:
                    limit = claim.reclaim_until()
                step = self._step_of_watch(claim, limit)
                awaited = claim.connection
                if awaited:
                    awaited.note_awaited(True)
            if not step:
                break
            finish(waiting_for(step), limit or FOREVER)
        self.on_lost(self)

    def _step_of_watch(self, claim, limit):
        """What is waited for next; None when the lock is not to be had back."""
        if claim.connection:  # who releases it wakes this
            return input_of(claim.connection.sock, claim.next_look())
        if clock() >= limit:
            return None
        try:
            return next(claim.reclaiming())
        except StopIteration as end:
            if end.value:
                return pause(0)
            return None

    def release(self, rollback: "bool" = False) -> "None":
        """Releases the lock; takes at most 5 s, 2 s of them to get a lost lock back, if a daemon
        keeps it; at a quorum 3 s and twice the ttl, until the next leader must have come.  One
        that remains lost is forgotten, without an error.
        """
        claim = self._claim
        if self._depth > 1 and claim.is_ours():
            self._depth -= 1
            return
        self._depth = 0
        with self._turn_of(claim):
            finish(self._releasing(rollback))

    def rollback(self) -> "None":
        """Releases the lock; the value of a transactional sequence will be granted again."""
        self.release(rollback=True)

    def locked(self) -> "bool":
        """Whether this process has acquired the lock by this object, not released and not lost it;
        what others hold does not count, and no daemon is asked.
        """
        claim = self._claim
        with self._turn_of(claim):
            return claim.is_ours() and claim.look()

    @property
    def lost(self) -> "bool":
        """True when the lock was granted, not released, and its daemon has vanished, or does not
        answer a ping where it wants them, once in a fifth of its ttl; that long it may take.
        """
        claim = self._claim
        with self._turn_of(claim):
            return claim.is_ours() and not claim.confirm()

    def check(self) -> "None":
        """Returns when this process holds the lock; reclaims it if its daemon vanished.

        Where the daemon wants pings it has answered one within the last fifth of its ttl; that is
        waited for as long.  Raises LockLost when the reclaim fails within 2 s, LockError when the
        lock was not acquired or has been released, and in a process made by fork.
        """
        with self._turn_of(self._claim):
            finish(self._checking())

    if TYPE_CHECKING:
        @overload
        def __call__(self, function: "Function") -> "Function": ...
        @overload
        def __call__(self, function: "None" = None, *, timeout: "Seconds" = None) -> "Lock": ...

    def __call__(self, function: "Any" = None, *, timeout: "Seconds" = None) -> "Any":
        """Decorates `function`: each call waits for a lock of its own, and holds it to its end; a
        generator function's holds it until the generator has ended or was closed; that of `async
        def` is an AsyncLock.  Without a function: another lock, with this timeout.

        Raises TypeError for a class, for an asynchronous generator, and when the function returns
        a coroutine or a generator, which runs later.
        """
        if function is None or timeout is not None:
            other = self._like(type(self), timeout)
            return other if function is None else other(function)
        if isinstance(function, (staticmethod, classmethod)):
            return type(function)(self(function.__func__))
        body = body_of(function)
        if body == "coroutine" and self.reentrant:
            raise TypeError(f"{function!r} is async, and a reentrant lock is that of a thread")
        if body == "coroutine":
            return self._decorate_coroutine(AsyncLock, function)
        if body == "generator":
            return self._decorate_generator(function)
        return self._decorate(function)

    def _decorate_generator(self, function):
        @functools.wraps(function)
        def locked(*args, **kwargs):
            with self._another():
                return (yield from function(*args, **kwargs))
        return locked

    def _decorate(self, function):
        later = types.CoroutineType, types.GeneratorType, types.AsyncGeneratorType

        @functools.wraps(function)
        def locked(*args, **kwargs):
            with self._another():
                result = function(*args, **kwargs)
                if isinstance(result, later):
                    if hasattr(result, "close"):  # or Python would say that it never ran
                        result.close()
                    raise TypeError(f"{function!r} returned a {type(result).__name__}, which "
                                    f"would run without the lock on {self.name}")
                return result
        return locked

    def _another(self):
        """What one call of a function acquires: of a reentrant lock that which its thread has."""
        if not self.reentrant:
            return self._like(type(self))
        if self._is_of_this_thread():
            return self
        import threading
        lock = self._of_thread.setdefault(threading.get_ident(), self._like(type(self)))
        # It may have been made for a function with another timeout.
        return lock.timeout(self.settings["Timeout"] / 1000)


class AsyncLock(_CommonLock):
    """A lock on a resource for asyncio: `async with flom.AsyncLock("backup") as lock: ...`

    As Lock, but what may wait is awaited: acquire, release, rollback and check.  Nothing is
    blocked meanwhile, and no thread is used; who is cancelled leaves the queue at once.  While the
    lock is held the event loop watches its connection, and reclaims it when its daemon vanishes.
    Use one AsyncLock per task.

    on_lost: a function, which may be async, that the event loop calls once, with the lock, when it
    is lost and was not to be had back.
    """

    _PASSING = _CommonLock._PASSING | {"_loop", "_descriptor", "_timer", "_recovery",
                                         "_telling"}
    _ONE_EACH = "AsyncLock per task"

    def _begin(self):
        super()._begin()
        self._loop: "Any" = None
        self._descriptor: "int | None" = None  # that the loop watches
        self._timer: "Any" = None
        self._recovery: "Any" = None  # the task that reclaims the lock, or has failed to
        self._telling: "Any" = None  # the task of an on_lost that is async

    def _new_claim(self, settings):
        claim = super()._new_claim(settings)
        claim.resolving = resolving_beside
        claim.is_watched = True
        return claim

    async def __aenter__(self) -> "AsyncLock":
        return await self.acquire()

    async def __aexit__(self, error_class: "object", error: "object",
                        traceback: "object") -> "None":
        last = error is None and self._claim.is_ours()
        loss = None
        try:
            if last:
                await self._rest()
                loss = await finish_in_loop(self._ending())
        finally:
            await self.release(rollback=error is not None)
        if last:
            self._check_end(loss)

    def timeout(self, seconds: "Seconds") -> "TimedAsyncLock":
        """`async with lock.timeout(5):` acquires it with this timeout in place of its own."""
        return TimedAsyncLock(self, seconds)

    async def acquire(self, blocking: "bool" = True, timeout: "Seconds" = None) -> "AsyncLock":
        """Waits for the lock and returns self; as that of Lock."""
        import asyncio
        with self._asking_alone():
            if self.locked():
                raise RuntimeError(f"{self.name} is held already")
            await self._stop()
            claim = await finish_in_loop(self._acquiring(blocking, timeout))
            with claim.becoming_ours():
                await finish_in_loop(claim.acquiring())
        self._loop = asyncio.get_event_loop()
        self._recovery = None
        self._tell_held()
        self._watch()
        return self

    async def release(self, rollback: "bool" = False) -> "None":
        """Releases the lock; takes as long as that of Lock."""
        claim = self._claim
        try:
            await self._stop()
            await finish_in_loop(self._releasing(rollback))
        finally:
            claim.drop()

    async def rollback(self) -> "None":
        """Releases the lock; the value of a transactional sequence will be granted again."""
        await self.release(rollback=True)

    def locked(self) -> "bool":
        """Whether this process has acquired the lock by this object, not released and not lost it;
        what others hold does not count, and no daemon is asked.
        """
        return self._look()

    @property
    def lost(self) -> "bool":
        """True when the lock was granted, not released, and its daemon has vanished, or has left a
        ping unanswered where it wants them.  Nothing is waited for.
        """
        return self._claim.is_ours() and not self._look()

    async def check(self) -> "None":
        """Returns when this process holds the lock; as that of Lock."""
        claim = self._claim
        await self._rest()
        if self._recovery and not self._recovery.done():
            raise claim.loss
        try:
            await finish_in_loop(self._checking())
            self._recovery = None
        finally:
            if claim.is_ours():
                self._watch()

    def _look(self):
        """Whether the lock is held.  Watches on, or begins to reclaim it."""
        claim = self._claim
        self._unwatch()
        if not claim.is_ours():
            return False
        if claim.look():
            self._watch()
            return True
        if self._recovery is None and not self._loop.is_closed():
            self._recovery = self._loop.create_task(self._recover(claim))
        return False

    def _watch(self):
        """The event loop looks when something comes in, or a ping is due."""
        claim = self._claim
        self._unwatch()
        if claim.connection and not self._loop.is_closed():
            self._descriptor = claim.connection.sock.fileno()
            self._loop.add_reader(self._descriptor, self._look)
            seconds = max(0, min(claim.next_look() - clock(), DAY))
            self._timer = self._loop.call_later(seconds, self._look)

    def _unwatch(self):
        """To be called before the connection may be closed: its descriptor is another's then."""
        if self._descriptor is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._descriptor)
            self._timer.cancel()
        self._descriptor = None

    async def _rest(self):
        """Ends the watch, and lets a reclaim that is under way end, if that does not take long."""
        import asyncio
        self._unwatch()
        if self._recovery and not self._recovery.done():
            await asyncio.wait([self._recovery], timeout=RECOVERY_WINDOW / 1000)
            self._unwatch()

    async def _stop(self):
        """As _rest; a reclaim that takes long is ended."""
        import asyncio
        await self._rest()
        if self._recovery:
            self._recovery.cancel()
            await asyncio.wait([self._recovery])

    async def _recover(self, claim):
        """A task: reclaims the lock, or tells its loss."""
        held = await finish_in_loop(claim.reclaiming(), claim.reclaim_until())
        if not claim.is_ours():
            return
        if held:
            self._recovery = None
            self._watch()
        elif self.on_lost:
            import asyncio
            told = self.on_lost(self)
            if asyncio.iscoroutine(told):  # a task of its own, since it may release the lock
                self._telling = self._loop.create_task(told)

    if TYPE_CHECKING:
        @overload
        def __call__(self, function: "Function") -> "Function": ...
        @overload
        def __call__(self, function: "None" = None, *,
                     timeout: "Seconds" = None) -> "AsyncLock": ...

    def __call__(self, function: "Any" = None, *, timeout: "Seconds" = None) -> "Any":
        """Decorates an `async def`: each call waits for a lock of its own, and holds it to its
        end.  Without a function: another lock, with this timeout.
        """
        if function is None or timeout is not None:
            other = self._like(type(self), timeout)
            return other if function is None else other(function)
        if isinstance(function, (staticmethod, classmethod)):
            return type(function)(self(function.__func__))
        if body_of(function) != "coroutine":
            raise TypeError(f"{function!r} is not async: a Lock decorates it")
        return self._decorate_coroutine(type(self), function)


class TimedLock:
    """A block that acquires a Lock with a timeout of its own."""

    def __init__(self, lock: "Lock", seconds: "Seconds") -> "None":
        self._lock, self._seconds = lock, seconds

    def __enter__(self) -> "Lock":
        return self._lock.acquire(timeout=self._seconds)

    def __exit__(self, *error: "object") -> "None":
        self._lock.__exit__(*error)


class TimedAsyncLock:
    """A block that acquires an AsyncLock with a timeout of its own."""

    def __init__(self, lock: "AsyncLock", seconds: "Seconds") -> "None":
        self._lock, self._seconds = lock, seconds

    async def __aenter__(self) -> "AsyncLock":
        return await self._lock.acquire(timeout=self._seconds)

    async def __aexit__(self, *error: "object") -> "None":
        await self._lock.__aexit__(*error)


def status(*, config: "bool" = True, **options: "Any") -> "dict[str, Any]":
    """The report of the daemon as `flom --status --json` prints it; starts none.

    {"daemon": {...}, "resources": [{"name", "kind", "holders", "waiters" ...}], "parked": [...]}.
    config and options are those of Lock: name or resource_name keeps that resource alone.  Raises
    DaemonUnavailable, UsageError.
    """
    settings = program_settings(options, config)
    report = finish(fetch_report(settings, ProgramDiary(settings), program_connection))
    if any(options.get(word) is not None for word in ("name", "resource_name")):
        keep_named(report, settings["Name"])  # that of a file is for locks
    return report


# --- Signals -------------------------------------------------------------------------------------
# A flom that ends before its command leaves it without its lock.  So from the fork on no signal
# may end flom; and each signal has to reach the command, once.
#
# There are no handlers.  All signals that would end flom are blocked before the fork: they stay
# pending until the loop in Command.run takes them, one at a time, with sigtimedwait, which also
# tells who sent them.  What is passed on before the exec stays pending in the child until it has
# restored the dispositions and the mask that flom found, in that order, and then does to it what
# it would do to the command.  SIGCHLD says that the command ended or stopped, SIGIO that the
# daemon spoke or the pipe of the command is at its end, the time-out that something is due.
# * What the terminal sends (the kernel sent it: si_code) goes to the whole process group, so the
#   command has it already.  Only what was sent to flom is passed on.
# * TSTP stops flom as well: flom sends it to itself and unblocks it for a moment.  A CONT that
#   came meanwhile was meant to continue flom, so flom does not stop when one is pending.
# * A command that stops itself stops flom, so that the shell that waits for flom has its terminal
#   again.  Without a terminal no shell waits so, and nobody would continue flom: it goes on.
# * For process 1 the kernel drops every signal that has no handler, and gives it all orphans.  So
#   there a child does the work, and process 1 reaps and passes on.
#
# Absent on purpose, see NOT_PASSED: what cannot be caught; what ends nobody; what the kernel sends
# for a fault of flom itself, which is not the command's, and which blocked would hide where flom
# failed (ABRT is passed on: it is how a watchdog ends a service, and abort() unblocks it first);
# PIPE and XFSZ, which flom's own writing may bring and Python ignores; TTIN and TTOU, which the
# terminal sends to the whole group, and which stop flom as they stop the command.


def signals_named(names: "str") -> "set":
    """The signals with these names (a text), as far as this system has them."""
    found = [getattr(signal, f"SIG{name}", None) for name in names.split()]
    return set(filter(None, found))


NOT_PASSED = signals_named(
    "KILL STOP CHLD URG WINCH INFO SEGV BUS FPE ILL TRAP SYS EMT PIPE XFSZ TTIN TTOU")
TYPED = signals_named("INT QUIT TSTP HUP")  # the terminal sends them
ENDING_HOLD = signals_named("TERM INT HUP QUIT")  # after the command's end they end flom
SI_USER_BSD = 0x10001  # FreeBSD's SI_USER is positive, as if the kernel had sent the signal
TICK = 0.02  # s between two looks


def all_signals() -> "set[int]":
    """The numbers of all signals, less those that the C library keeps for itself."""
    found = set(range(1, 32))
    if hasattr(signal, "SIGRTMIN"):
        found.update(range(signal.SIGRTMIN, signal.SIGRTMAX + 1))
    return found


class Signals:
    """Hands signals out one at a time, once `block` has been called.

    `found`: the dispositions that the command is to have.  `mask`: the mask that flom found.
    """

    def __init__(self, ignored=()):
        """Gives CHLD its default action, and ignores the signals with the numbers `ignored`."""
        self.found: "Any" = {signal.SIGPIPE: signal.SIG_DFL, signal.SIGXFSZ: signal.SIG_DFL}
        self.mask: "Any" = set()
        self._passed: "set[int]" = set()  # those that the command is to have
        self._taken: "set[int]" = set()  # those that flom takes
        self._typed = TYPED
        self._note(signal.SIGIO)
        self._note(signal.SIGCHLD)
        for number in ignored:
            if number in (signal.SIGKILL, signal.SIGSTOP):
                put(f"flom: warning: {signal_names()[number]} cannot be ignored", sys.stderr)
                continue
            self._note(number)
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _note(self, number):
        """Notes the disposition of before; one that is no Python code counts as the default."""
        self.found[number] = signal.getsignal(number) or signal.SIG_DFL

    def block(self):
        """From now on they are handed out by `wait`; those that are ignored stay so."""
        for number in all_signals() - NOT_PASSED:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._passed.add(number)
        self._taken = self._passed | {signal.SIGCHLD, signal.SIGIO}
        if os.getsid(0) == os.getpid():  # a hang-up is told to the session's leader only
            self._typed = TYPED - {signal.SIGHUP}
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._taken)
        signal.signal(signal.SIGIO, signal.SIG_DFL)

    def watch(self, descriptor):
        """SIGIO is to tell when something comes in on a descriptor, or its end."""
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)

    def wait(self, seconds: "float"):
        """(number, it is for the command too) of the next; (None, False) after `seconds`."""
        if not hasattr(signal, "sigtimedwait"):
            return self._wait_by_looking(seconds)
        info = signal.sigtimedwait(self._taken, max(0, min(seconds, DAY)))
        if not info:
            return None, False
        number = info.si_signo
        if 0 < info.si_code != SI_USER_BSD:  # the kernel has sent it
            return number, self._is_passed(number, self._typed)
        return number, number in self._passed

    def _wait_by_looking(self, seconds):
        """For macOS, which does not tell who sent a signal: in the foreground it was typed."""
        until = clock() + seconds
        while not signal.sigpending() & self._taken:
            if clock() >= until:
                return None, False
            time.sleep(TICK)
        number = signal.sigwait(signal.sigpending() & self._taken)
        typed = set()
        with contextlib.suppress(OSError), open("/dev/tty") as terminal:
            if os.tcgetpgrp(terminal.fileno()) == os.getpgrp():
                typed = self._typed
        return number, self._is_passed(number, typed)

    def _is_passed(self, number, typed):
        """Is a signal for the command, which has those of `typed` already?"""
        return number in self._passed and number not in typed and number != signal.SIGIO

    def until_told_to_end(self, steps, patience: "float"):
        """Steps that end with others, with their result; None when, after `patience` s, a signal
        that ends who holds a lock has come, or comes.
        """
        until = clock() + patience
        try:
            while clock() < until or not signal.sigpending() & ENDING_HOLD:
                descriptor, events, seconds = next(steps)
                yield descriptor, events, min(seconds, LATER)
        except StopIteration as end:
            return end.value
        finally:
            steps.close()
        return None

    def stop(self):
        """Stops this process by TSTP with its default action; returns when it is continued.

        At once, when that has happened already, or when nobody could continue it: the system lets
        TSTP stop no group whose parents are all in other sessions.
        """
        if signal.SIGCONT in signal.sigpending():
            return
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTSTP])
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTSTP])
        signal.signal(signal.SIGTSTP, handler)

    def stop_with(self, pid: "int"):
        """Stops this process, since the command `pid` has stopped and the terminal is theirs.

        An interactive shell gives the terminal to a process group of its own, and stops without
        returning it.  It is taken back, so that an outer flom also sees whose it is, and given
        again before CONT, which is pending then, reaches the command.  An outer flom, to which it
        was taken back, has nothing to give: the inner one may have given it again already.
        """
        with contextlib.suppress(OSError), open("/dev/tty") as file:
            terminal = file.fileno()
            own, group = os.getpgrp(), os.getpgid(pid)
            foreground = os.tcgetpgrp(terminal)
            if foreground not in (own, group):
                return
            given_away = foreground != own
            if given_away:
                give_terminal(terminal, own)
            self.stop()
            if given_away and os.tcgetpgrp(terminal) == own:
                give_terminal(terminal, foreground)
            if group != own and signal.SIGCONT not in signal.sigpending():
                os.kill(pid, signal.SIGCONT)  # nobody else would


def give_terminal(terminal: "int", group: "int"):
    """Makes a process group that of the foreground, also from the background."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
    try:
        os.tcsetpgrp(terminal, group)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def leave_process_1():
    """Where this is process 1, as in a container: returns in a child, which is not.

    Process 1 itself reaps all that ends, passes signals on to the child, and ends as the child
    does; whatever else still runs ends with it.
    """
    if os.getpid() != 1:
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, all_signals() - NOT_PASSED)
    try:
        child = os.fork()
    except OSError as error:
        raise LockError(f"no process can be had: {error.strerror}")
    if not child:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return
    signals = Signals()
    signals.block()
    while True:
        reap_until(child)  # first: it may have ended before its SIGCHLD was blocked
        number, passed = signals.wait(FOREVER)
        if passed:
            os.kill(child, number)


def reap_until(child: "int"):
    """Reaps all processes that have ended; when `child` has, ends this one with its status."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            os._exit(exit_status(status))
        if not pid:
            return


def exit_status(status: "int") -> "int":
    """The exit status for what waitpid says: 128 + n for a process that signal n killed."""
    if os.WIFSIGNALED(status):
        return 128 + os.WTERMSIG(status)
    return os.WEXITSTATUS(status)


# --- Loss ----------------------------------------------------------------------------------------
# The daemon vanishes while a command runs.  Mostly another one serves within a moment and gives
# the lock back; or somebody else is granted it; or nothing is heard for as long as the command
# takes.  Nobody can know which it will be, and meanwhile the command runs as if it had the lock.
# Where the daemon has promised a grace, it has the lock as long as that lasts, also when it ends
# meanwhile: then the loss changes no status.
#
# So a loss is a list of stages, each with a date at which its action is due (STAGES, `dates`).
#
#   reclaim    at once, and again from step to step, until it says held or refused
#   tell       after NOTICE: that there is trouble.  What is mended sooner is not worth a mail
#   terminate  with --on-lock-loss term, when it is refused, or so early that KILL comes BEFORE s
#              before the grace is over; where none is promised, after the recovery window, since
#              from then on a new daemon may grant it to others: TERM.  A KillAfter that the grace
#              has no room for does not end the command sooner: a daemon may just be restarted
#   kill       KillAfter later: KILL, again and again, since who is killed may have just forked
#
# A grace goes on while this system is suspended: so the date of `terminate` is one of boot_clock,
# looked at whenever something else is due.
#
# Held again: no stage is left, the loss is over.  Refused: it is said at once, and only terminate
# and kill may follow.  Nothing here waits: `go_on` is called between two signals, and a line that
# nobody takes waits in the diary, or a full pipe would keep the lock from being reclaimed.
#
# Absent on purpose: a number of tries after which flom gives up.  With `warn` the lock is worth
# having back at any time; with `term` the date decides.
NOTICE, KILL_AGAIN = 1, 1  # s: until a loss is told; between two KILLs
BEFORE = 1  # s


class Loss:
    """What is done about the lost lock of a Claim.

    `kill(number)` sends all of the command a signal.  `terminated`: TERM was sent to the command,
    so its status tells nothing.  `dates`: when each stage that is to come is due (monotonic s).
    """

    def __init__(self, claim: "Claim", kill):
        self.terminated = False
        self._claim, self._kill = claim, kill
        self._is_to_end = claim.settings["OnLockLoss"] == "term"
        self._steps = claim.reclaiming()
        self._told = ""
        self._last_moment = FOREVER  # boot_clock: when the command has to be told to end
        self._kept_until = claim.kept_until  # a refusal sets that of the claim to 0
        now = clock()
        self.dates = {"reclaim": now, "tell": now + NOTICE}
        if self._is_to_end:
            self._end_by(self._without_the_lock())

    def _without_the_lock(self):
        """When the command has to be told to end, if the lock is not held again by then."""
        claim, window = self._claim, RECOVERY_WINDOW / 1000
        if not claim.kept_until:
            return boot_clock() + window
        before = claim.settings["KillAfter"] / 1000 + BEFORE
        return claim.kept_until - min(before, max(0, claim.grace / 1000 - window))

    def _end_by(self, moment):
        """The command is to be told to end at a moment of boot_clock."""
        self._last_moment = moment
        self.dates["terminate"] = clock() + moment - boot_clock()

    def _allow_for_sleep(self):
        """While the system was suspended the clock of the dates stood still."""
        if "terminate" in self.dates:
            self._end_by(self._last_moment)

    @property
    def is_harmless(self) -> "bool":
        """Whether the command has had the lock up to now, as far as is known."""
        return not self.terminated and boot_clock() < self._claim.kept_until

    @property
    def is_final(self) -> "bool":
        """Whether nobody tries to have the lock back any more."""
        return "reclaim" not in self.dates

    def next_date(self) -> "float":
        """When `go_on` is to be called again (monotonic s)."""
        return min(self.dates.values(), default=FOREVER)

    def go_on(self):
        """Does what is due."""
        self._allow_for_sleep()
        for stage, action in self.STAGES.items():
            if clock() >= self.dates.get(stage, FOREVER):
                del self.dates[stage]
                action(self)

    def hurry(self):
        """Makes the reclaim that is under way, if any, due at once."""
        if not self.is_final:
            self.dates["reclaim"] = clock()

    def give_up(self):
        """No more attempts to reclaim; says, once, that the lock is lost.

        One that is under way is left to the release: it may be granted yet.
        """
        self.dates.clear()
        self._tell_lost()

    def _reclaim(self):
        descriptor, seconds = None, SELDOM
        try:
            descriptor, _, seconds = next(self._steps)
        except StopIteration as end:
            self.dates.clear()
            self._end(held=end.value)
            return
        except Exception as error:  # whatever it is, a command runs that must not be left alone
            self._claim.diary.say(f"reclaiming {self._claim.name}: {error}")
            self._steps = self._claim.reclaiming()
        if descriptor is not None:  # no signal tells of it
            seconds = TICK
        self.dates["reclaim"] = clock() + seconds

    def _end(self, held):
        """The reclaim has ended."""
        if not held:
            self._tell_lost()
            if self._is_to_end:
                self._end_by(boot_clock())
        elif self._told:
            self._tell(f"flom: the lock on {self._claim.name} is held again")

    def _tell_trouble(self):
        self._tell(f"flom: the lock on {self._claim.name}: {self._claim.loss.reason}; it does not "
                   "answer; trying to get the lock back")

    def _terminate(self):
        self.give_up()
        self.terminated = True
        self._kill(signal.SIGTERM)
        self.dates["kill"] = clock() + self._time_to_end()

    def _time_to_end(self):
        """s from TERM to KILL.  The grace of one that wants pings is long enough for both; where
        TERM comes late, since flom was stopped, KILL does not.  But a lock that is refused, or
        taken away, before the grace is over leaves the command its time."""
        seconds = self._claim.settings["KillAfter"] / 1000
        if self._claim.interval and self._kept_until:
            left = self._kept_until - BEFORE / 2 - boot_clock()
            seconds = max(0, min(seconds, left))
        return seconds

    def _kill_again(self):
        self._kill(signal.SIGKILL)
        self.dates["kill"] = clock() + KILL_AGAIN

    def _tell_lost(self):
        """Says, once, that the lock is lost."""
        self._tell(f"flom: {self._claim.loss}")

    def _tell(self, text):
        if text != self._told:
            self._told = text
            self._claim.diary.tell(text)

    STAGES = {"reclaim": _reclaim, "tell": _tell_trouble, "terminate": _terminate,
              "kill": _kill_again}


# --- Command -------------------------------------------------------------------------------------
# The lock is to be held as long as the command works.  But what is the command?  The process that
# flom starts may be a shell whose pipeline goes on when TERM has killed it, and the next holder
# would start beside it.  On the other hand, a daemon that the command has left in the background
# on purpose must not keep the lock for ever.
#
# So the command inherits the write end of a pipe, of which flom keeps the read end: the pipe is at
# its end when nobody of the command is left, however many processes it has become.
# * A command that exits has done its work: unlock at once, whoever still carries the pipe.
# * One that a signal killed has been interrupted: flom stays, holds and reclaims, until the pipe
#   is at its end, or until one more TERM, INT, HUP or QUIT says that it is not to wait.
# * A loss with `term` ends every process that carries the pipe, which Linux tells in /proc; where
#   it does not, and of processes of other users, the command alone.  A nested flom carries it,
#   too: it passes TERM on to its own command, which therefore is left out.
# The command also inherits the connection: if flom is killed by KILL, the lock stays until all who
# carry it have ended.  The unlock and the half-close at the end count for every copy of it.
# A failing exec is told through another pipe, which flom reads only when the child has ended.
#
# Absent on purpose: process groups, sessions and control groups.  They would change what the
# command sees of its terminal, and need what an ordinary user, or another system, has not.
INHERITED = 64  # the least descriptor for what the command inherits: out of the way of scripts
LOOK = 1  # s between two looks at the pipe, for systems that do not tell its end by SIGIO


class CommandPipe:
    """A pipe that the command inherits, and with it all that it starts."""

    def __init__(self):
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)

    def close_writing(self):
        """To be called after the fork: from then on its end means that nobody is left."""
        os.close(self.writing)

    def is_at_its_end(self):
        """Whether nobody carries it any more; what somebody has written into it is dropped."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.reading, CHUNK):
                pass
            return True
        return False

    def carriers(self) -> "dict[int, int]":
        """{pid: pid of its parent} of those that carry it, as far as this system tells."""
        try:
            pipe = os.readlink(f"/proc/self/fd/{self.reading}")
            names = os.listdir("/proc")
        except OSError:  # no /proc
            return {}
        found = {}
        for name in filter(str.isdigit, names):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if carries(name, pipe):
                    found[int(name)] = parent_of(name)
        return found


def carries(pid: "str", pipe: "str") -> "bool":
    """Whether a process has the write end of a pipe, by what /proc calls it."""
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        link = f"{folder}/{name}"
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(link) == pipe and os.lstat(link).st_mode & stat.S_IWUSR:
                return True
    return False


def parent_of(pid: "str") -> "int":
    """The pid of a process's parent, by /proc."""
    with open(f"/proc/{pid}/stat", errors="replace") as file:
        after_name = file.read().rpartition(") ")[2]
    return int(after_name.split()[1])


def is_flom(pid: "int") -> "bool":
    """Whether a process is a flom."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm", errors="replace") as file:
        return file.read() == "flom\n"
    return False


def execute(argv, environment):
    """Becomes a program found in PATH, /bin/sh for a script without #! (unlike os.execvpe)."""
    failure: "OSError" = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    name = argv[0]
    folders = search_path()
    if not name:
        folders = []
    elif "/" in name:
        folders = [""]
    for folder in folders:
        path = os.path.join(folder, name)
        try:
            os.execve(path, argv, environment)
        except OSError as error:
            if error.errno == errno.ENOEXEC:
                os.execve("/bin/sh", ["sh", path] + argv[1:], environment)
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                failure = error
    raise failure


def command_environment(claim: "Claim") -> "dict[str, str]":
    """The environment of the command: FLOM_* tell of this lock and of no outer one."""
    environment = found_environment()
    ours = {
        "FLOM_RESOURCE": claim.name,
        "FLOM_MODE": claim.mode,
        "FLOM_ELEMENT": claim.element,
        "FLOM_TOKEN": claim.token}
    for name, value in ours.items():
        environment.pop(name, None)
        if value is not None and claim.settings["SetEnv"]:
            environment[name] = str(value)
    environment["FLOM_SESSION"] = ",".join(claim.chain)  # or a deadlock would not be found
    return environment


class Command:
    """A command under a lock.

    `status`: its exit status, 128 + n when signal n killed it, None while it runs.  `killed_by`:
    the number of that signal, 0 for none.  `failure`: why it could not be run, "" when it was.
    """

    def __init__(self, argv, claim: "Claim", signals: "Signals"):
        self.argv = list(argv)
        if claim.settings["ElementArgument"] and claim.element is not None:
            self.argv.append(claim.element)
        self.claim = claim
        self.signals = signals
        self.status: "Any" = None
        self.killed_by = 0
        self.failure = ""
        self._pid = 0
        self._pipe: "Any" = None
        self._loss: "Loss | None" = None
        self._report: "Any" = None  # the pipe that tells of a failing exec
        self._hold_until = 0.0  # monotonic s
        self._is_told_to_end = False  # by a signal after the command's end
        self._complained = False

    def run(self) -> "int":
        """Runs it and returns flom's status; the lock is still held then, unless it was lost."""
        self._hold_until = clock() + self.claim.settings["MinHold"] / 1000
        self.signals.block()
        self._start()
        self._watch_lock()
        while not self._is_over():
            number, passed = self.signals.wait(self._next_date() - clock())
            had_ended = self.status is not None
            stopped = self._reap()
            if self.status is not None:
                self._obey_after_the_end(number, passed, had_ended)
            elif passed:
                self._kill(self._pid, number)
            if stopped:
                self.signals.stop_with(self._pid)
            elif number == signal.SIGTSTP:
                self.signals.stop()
            self._watch_lock()
        return self._flom_status()

    def _start(self):
        environment = command_environment(self.claim)
        self.claim.resolving = resolving_apart
        try:
            self._report, writing = os.pipe()
            if self.claim.settings["InheritConnection"]:
                self._pipe = CommandPipe()
                self.signals.watch(self._pipe.reading)
            if self.claim.connection:
                self.signals.watch(self.claim.connection.sock)
            self._pid = os.fork()
            if not self._pid:
                self._become(environment, writing)
            os.close(writing)
            if self._pipe:
                self._pipe.close_writing()
        except OSError as error:
            self.status = NOT_RUN
            self.failure = f"no process for it: {error.strerror}"

    def _become(self, environment, writing):
        """In the child: the command, with signals, mask and descriptors as flom found them."""
        try:
            if self._pipe:
                self._hand_on_descriptors()
            for number, disposition in self.signals.found.items():
                signal.signal(number, disposition)
            signal.pthread_sigmask(signal.SIG_SETMASK, self.signals.mask)
            execute(self.argv, environment)
        except (OSError, ValueError) as error:
            os.write(writing, (getattr(error, "strerror", None) or str(error)).encode())
        finally:
            os._exit(NOT_RUN)

    def _hand_on_descriptors(self):
        with contextlib.suppress(OSError):  # EINVAL: descriptors end below 64
            if self.claim.connection:
                fcntl.fcntl(self.claim.connection.sock, fcntl.F_DUPFD, INHERITED)
            fcntl.fcntl(self._pipe.writing, fcntl.F_DUPFD, INHERITED)

    # Between two signals

    def _reap(self):
        """Notes the command's end; True when it has stopped."""
        if self.status is not None:
            return False
        changed, status = os.waitpid(self._pid, os.WNOHANG | os.WUNTRACED)
        if not changed:
            return False
        if os.WIFSTOPPED(status):
            return True
        self.status = exit_status(status)
        if os.WIFSIGNALED(status):
            self.killed_by = os.WTERMSIG(status)
        else:
            self.failure = os.read(self._report, 999).decode()
        if self._loss:
            self._loss.hurry()  # the answer to a reclaim may have come
        return False

    def _obey_after_the_end(self, number, passed, had_ended):
        """When the command has ended, some signals end flom.

        One that came together with the command's end was for both when the terminal sent it, or
        when it is what killed the command (a kill of the whole group).
        """
        if number in ENDING_HOLD:
            was_for_flom = passed and number != self.killed_by
            self._is_told_to_end = had_ended or was_for_flom

    def _watch_lock(self):
        """Looks whether the lock is held, and goes on with its loss."""
        claim = self.claim
        claim.diary.write()
        if claim.settings["OnLockLoss"] == "ignore":
            return
        if not self._loss and not claim.look():
            self._loss = Loss(claim, self._end)
        if not self._loss:
            return
        self._loss.go_on()
        if claim.connection:  # held again
            self._loss = None
            self.signals.watch(claim.connection.sock)
            claim.unread = True  # something may have come before the watch

    def _next_date(self):
        """When to look again although no signal has come."""
        dates = [FOREVER]
        if self.claim.settings["OnLockLoss"] != "ignore":
            dates.append(self.claim.next_look())
        if self._loss:
            dates.append(self._loss.next_date())
        if self.claim.diary.unwritten:
            dates.append(clock() + SELDOM)
        if self.status is not None and self._is_awaited():
            dates.append(clock() + LOOK)
        elif self.status is not None:
            dates.append(self._hold_until)
        return min(dates)

    # To its end

    def _end(self, number):
        """Sends a signal to all of the command, as far as it is to be held for."""
        if self.status is not None and not self._is_awaited():
            return
        carriers: "dict[int, int]" = {}
        if self._pipe:
            carriers = self._pipe.carriers()
        if self.status is None:
            carriers.setdefault(self._pid, os.getpid())
        for pid, parent in carriers.items():
            by_parent = number == signal.SIGTERM and parent in carriers and is_flom(parent)
            if not by_parent:
                self._kill(pid, number)

    def _kill(self, pid, number):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # it has ended
        except PermissionError as error:  # it runs as another user, by sudo or the like
            if not self._complained:
                self.claim.diary.tell(f"flom: cannot signal {self.argv[0]!r}: {error.strerror}")
            self._complained = True

    def _is_awaited(self):
        """Whether the command has ended, but flom has to wait for what it left."""
        terminated = self._loss is not None and self._loss.terminated
        if self.killed_by == 0 and not terminated:
            return False
        return self._pipe is not None and not self._pipe.is_at_its_end()

    def _is_over(self):
        """Whether nothing is left to wait for."""
        if self.status is None:
            return False
        if self.failure or self._is_told_to_end:
            return True
        if self._is_awaited():
            return False
        if self._loss and self._loss.is_final:
            return True
        return clock() >= self._hold_until

    def _flom_status(self):
        """The command's status; 95 for a lost lock, but a loss hides no failure."""
        if self.failure:
            self.claim.diary.tell(f"flom: cannot execute {self.argv[0]!r}: {self.failure}")
            return NOT_RUN
        if not self._loss:
            return self.status
        if self._loss.is_harmless:
            self.claim.diary.say(f"the lock on {self.claim.name} was held to the end: it is kept, "
                                 f"though {self.claim.loss.reason}")
            return self.status
        self._loss.give_up()
        if self.status and not self._loss.terminated:
            return self.status
        return LockLost.status


# --- Status report -------------------------------------------------------------------------------
# A report as a person reads it: a head on the daemon, a row for each holder, each waiter, each
# parked request and each resource that nobody uses, a line where two resources may be taken for
# one, and last the counts.
COLUMNS = ("RESOURCE", "KIND", "STATE", "ID", "HOST", "PID", "USER", "COMMAND", "HOW", "FOR")
SHOWN_ID = 8  # digits of an id in the table
MOST_TOLD = 3  # names in one line
NAMES = tuple(map(COLUMNS.index, ("RESOURCE", "HOST", "COMMAND")))  # columns that may be cut
LEAST_WIDTH = 12  # of a column that is cut


def report_table(report: "dict", width: "int | None", height: "int | None" = None,
                 notes: "tuple | list" = ()) -> "str":
    """The table of who holds, who waits in which order, who is parked, what is idle.

    Its columns are aligned, its rows made to fit `width` (None: as wide as they are).  With a
    `height` it fills at most so many lines, all of them cut: who waits comes first, and the rows
    that do not fit are counted.  The lines `notes` stand below the rows.
    """
    head = report_head(report["daemon"])
    parked = [dict(entry, holders=[], waiters=[entry]) for entry in report["parked"]]
    now = int(time.time())
    rows = []
    for resource in report["resources"] + parked:
        for state, entry in states_of(resource):
            rows.append(table_row(resource, state, entry, now))
    if not rows:
        return "\n".join([*head, *notes, "nobody holds or awaits a lock"])
    end = [*notes, counts_line(rows, len(report["resources"]))]
    if height is not None:
        rows.sort(key=_comes_later)
        room = height - len(head) - len(end) - 1  # 1: the heads of the columns
        if len(rows) > room:
            room = max(1, room - 1)  # 1: the line that counts the others
            end.insert(0, f"... and {len(rows) - room} more")
            del rows[room:]
    rows.insert(0, COLUMNS)
    lines = list(_aligned(rows, width))
    if height is not None:
        head, end = [[line[:width] for line in part] for part in (head, end)]
    return "\n".join(head + lines + end)


def _aligned(rows, width):
    """The rows as lines.  Where they are wider than `width` the columns stand closer together,
    and long names are cut, so that one still sees for how long."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    gap = "  "
    if width is not None and len(gap.join("".ljust(size) for size in widths)) > width:
        gap = " "
        _narrow(widths, width - len(widths) + 1)
    for row in rows:
        yield gap.join(map(_cell, row, widths)).rstrip()[:width]


def _narrow(widths, room):
    """Makes the widest column of names narrower until all fit, or none of these can be cut."""
    while sum(widths) > room:
        widest = max(NAMES, key=widths.__getitem__)
        if widths[widest] <= LEAST_WIDTH:
            return
        widths[widest] -= 1


def _cell(text, size):
    """A text in a column; + says that it was cut."""
    if len(text) > size:
        text = text[:size - 1] + "+"
    return text.ljust(size)


def _state_of(row):
    """The word in the column STATE."""
    return row[2].partition(" ")[0]


def _comes_later(row):
    """By what rows are sorted for a screen: who waits, who holds, what is idle."""
    return ("waits", "holds", "absent", "idle").index(_state_of(row))


def counts_line(rows: "list[tuple]", resources: "int") -> "str":
    """How many resources, holders and waiters there are, in one line."""
    states = [_state_of(row) for row in rows]
    absent = states.count("absent")
    holders = states.count("holds") + absent
    line = f"{_number(resources, 'resource')}, {_number(holders, 'holder')}"
    if absent:
        line += f" ({absent} absent)"
    return f"{line}, {states.count('waits')} waiting"


def _number(count, noun):
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def notes_on_sizes(report: "dict", name: "str") -> "list[str]":
    """A line for numeric resources that may be taken for one, `a[5]` and `a[6]`; of those that are
    like `name`, "" for all."""
    wanted = name.partition("[")[0]
    names: "dict" = {}
    for resource in report["resources"]:
        if resource.get("kind") == "numeric":
            found = visible(resource.get("name", ""))
            names.setdefault(found.partition("[")[0], []).append(found)
    notes = []
    for stem, alike in names.items():
        if len(alike) > 1 and wanted in ("", stem):
            notes.append(f"{len(alike)} resources, not one: {', '.join(alike[:MOST_TOLD])}")
    return notes


# What the head of a report tells of a quorum: attribute, what it is called, its unit.
QUORUM_HEAD = (
    ("leader", "leader", ""),
    ("term", "term", ""),
    ("members", "members of etcd", ""),
    ("latency", "latency", " ms"),
    ("left", "left", " ms"),
)


def report_head(daemon: "dict") -> "list[str]":
    """Lines on the daemon's memory, its recovery window, its quorum and what is wrong with that;
    [] of one that tells nothing."""
    if "memory" not in daemon:
        return []
    line = f"memory: {daemon['memory']}"
    window = daemon.get("window")
    if isinstance(window, int) and window > 0:
        line += f", recovery window: {window} ms"
    for name, title, unit in QUORUM_HEAD:
        if name in daemon:
            line += f", {title}: {daemon[name]}{unit}"
    lines = [visible(line)]
    if "trouble" in daemon:
        lines.append(visible(f"trouble: {daemon['trouble']}"))
    return lines


def states_of(resource: "dict"):
    """[(state, entry)] of all that hold or await a resource, one without an entry for none."""
    found = []
    for entry in resource["holders"]:
        state = "holds"
        if "absent" in entry:
            state = "absent"
        found.append((state, entry))
    for entry in resource["waiters"]:
        found.append((f"waits {entry.get('position', 'for it')}", entry))
    return found or [("idle", {})]


def table_row(resource, state, entry, now):
    """One row of the table: texts in the order of COLUMNS."""
    how = [str(entry[key]) for key in ("mode", "quantity", "element") if key in entry]
    cells = (
        entry.get("node") or resource.get("name", ""),
        resource.get("kind", ""),
        state,
        entry.get("id", "")[:SHOWN_ID],
        entry.get("host") or entry.get("peer", ""),
        str(entry.get("pid", "")),
        entry.get("user", ""),
        entry.get("cmd", ""),
        " ".join(how),
        duration(entry, now))
    return tuple(map(visible, cells))


def duration(entry: "dict", now: "int") -> "str":
    """HH:MM:SS since the entry's lock was granted or asked for, empty where nobody tells."""
    since = entry.get("since")
    if not isinstance(since, int):
        return ""
    return hhmmss(now - since)


def find_entry(report: "dict", ident: "str"):
    """(entry, line) of the one whose id begins so: who it is and what it has; UsageError."""
    found = []
    for entry, name, holds in entries_of(report):
        if entry.get("id", "").startswith(ident):
            found.append((entry, entry_line(entry, name, holds)))
    found = [pair for pair in found if pair[0].get("id") == ident] or found
    if not found:
        raise UsageError(f"--evict: {ident!r} is nobody's id; see --status")
    if len(found) > 1 or not ident:
        raise UsageError(f"--evict: {ident!r} is the id of {len(found)} locks and waiters; "
                         "see --status")
    return found[0]


def entry_line(entry, name, holds):
    """Who has or awaits what, for how long, in one line."""
    who = entry.get("host") or entry.get("peer", "?")
    if "pid" in entry:
        who += f":{entry['pid']}"
    if entry.get("cmd"):
        who += f" {entry['cmd']!r}"
    if entry.get("user"):
        who += f" of {entry['user']}"
    did = "waited for"
    if holds:
        did = "held"
    return visible(f"{who} {did} {name} for {duration(entry, int(time.time()))}")


# --- Main ----------------------------------------------------------------------------------------
# One action a run; each is a row of ACTIONS and returns the exit status.


def show_status(options, settings):
    """--status, with --json or --watch; 0, for a name that nobody holds NOT_HELD."""
    screen = options.watch and bool(sys.stdout) and sys.stdout.isatty()
    is_named = "Name" in options.given  # the name in a file is for commands
    while True:
        report = finish(fetch_report(settings, Diary(settings)))
        notes = notes_on_sizes(report, settings["Name"] if is_named else "")
        if is_named:
            keep_named(report, settings["Name"])
        if screen:
            clear_screen()
            put(time.strftime("%H:%M:%S"), sys.stdout)
        if options.json:
            import json
            show(json.dumps(report))
        else:
            columns, lines = screen_size()
            show(report_table(report, columns, lines if screen else None, notes))
        if not options.watch:
            break
        time.sleep(1)
    holders = [holder for resource in report["resources"] for holder in resource["holders"]]
    if is_named and not holders:
        return NOT_HELD
    return 0


def screen_size():
    """(columns, lines) of the terminal that stdout is; None for what it is not, or what it does
    not know.  Of the lines the time takes one, and the cursor another."""
    columns = lines = None
    with contextlib.suppress(OSError, AttributeError):
        size = os.get_terminal_size(sys.stdout.fileno())
        if size.columns > 0:
            columns = size.columns
        if size.lines > 0:
            lines = size.lines - 2
    return columns, lines


def clear_screen():
    """Clears the terminal: what follows begins at its top."""
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), b"\033[H\033[J")


def show_signals(options, settings):
    """--signal-list, four in a line."""
    known = signal_names()
    text = ""
    for number in range(1, 32):
        if number in known:
            text += f"{number}) {known[number]}\t"
            if number % 4 == 0:
                text += "\n"
    show(text)


def check_configuration(options, settings):
    """--check-config: every problem of the files and options is a line, 99 if there is one."""
    examined = Examined()
    option_settings(options, examined)
    check_rules(examined, CLIENT)
    examined.examine(interface_index, tls_context)
    examined.warnings += hints_on_name(examined)
    return examined.report("flom")


def give_order(settings, order, **about):
    """Sends a management message with the element `order` to the daemon.

    Returns (pid of a local daemon, the attributes of its answer, None for an end without one);
    raises DaemonUnavailable.
    """
    race, checked_name = race_for_order(settings)
    session = element("session", ("peerid", machine_id()), *about.items())
    message = encode(MANAGEMENT, 8, session, order)

    def ask(connection):
        if checked_name:
            connection.check_name(checked_name)
        pid, _ = credentials(connection.sock)
        data = yield from connection.parting(message, PATIENCE, answered=True)
        return pid, answer_to_order(data, connection.where)
    found = finish(race.asking(ask))
    if not found:
        raise no_daemon(settings)
    return found


def race_for_order(settings):
    """(Race, peer id to be checked or "") for the daemon that serves; raises DaemonUnavailable.

    An order may end without an answer.  So where there are several addresses, or the peer id is
    to be checked, a report is asked for before: it says which daemon serves, and who it is.
    """
    diary = Diary(settings)
    race = finish(starting_race(settings, diary))
    checked = settings["TlsCertificate"] and settings["TlsCheckPeerId"]
    if not checked and len(race.left) < 2:
        return race, ""
    known, _ = finish(asking_for_report(settings, diary))
    race.left = [known.address]
    if not checked:
        return race, ""
    return race, known.name


def answer_to_order(data, where):
    """The attributes of the answer in what `parting` has read, None for an end without one."""
    if data is None:
        raise DaemonUnavailable(f"{where} does not answer within {PATIENCE} s")
    if not data:
        return None
    try:
        answer = decode(data).get("answer", {})
    except ProtocolError as error:
        raise DaemonUnavailable(f"{where} is no lock daemon: {error}")
    if answer.get("rc") != OK:
        reason = visible(answer.get("reason") or "it gives no reason")
        raise DaemonUnavailable(f"{where} refuses: {reason}")
    return answer


def stop_daemon(options, settings):
    """-x and -X: obeyed is EOF, refused is an answer with a reason."""
    put(f"Starting FLoM daemon {options.action} shutdown...", sys.stdout)
    immediate = options.action == "immediate"
    pid, answer = give_order(settings, element("shutdown", ("immediate", int(immediate))))
    if answer and answer.get("reason"):
        put(visible(answer["reason"]), sys.stdout)
    if immediate and pid:
        until = clock() + 1
        while clock() < until and is_running(pid):
            time.sleep(0.01)
    return 0


def evict(options, settings):
    """--evict: only a daemon that can report knows the order; a FLoM daemon would end on it."""
    report = finish(fetch_report(settings, Diary(settings)))
    entry, line = find_entry(report, options.argument)
    order = element("evict", ("id", entry["id"]))
    host = plain(os.uname().nodename, 64)
    _, answer = give_order(settings, order, user=plain(login(), 32), host=host)
    if answer is None:
        where = where_looked_for(settings)
        raise DaemonUnavailable(f"{where}: the daemon ended before it answered")
    put(f"flom: {line}", sys.stderr)
    return 0


def is_running(pid: "int") -> "bool":
    """Whether a process of this user runs; one that is only to be reaped does not."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(") ")[2][:1] != "Z"
    except OSError as error:
        return isinstance(error, FileNotFoundError)  # no /proc here


def hints_on_name(settings):
    """Lines for who may have meant something else: a file name that is a set, and what has no
    meaning for the kind of resource."""
    name = settings["Name"]
    kind = kind_of(name)
    lines = []
    if kind == "set":
        slots = name.split(".")
        lines.append(f"{name!r} is a set of {len(slots)} slots ({', '.join(slots)}); for a file "
                     f"name write '/{name}'")
    for key, kinds, what in (("LockMode", WITH_MODE, "modes"),
                             ("Quantity", ("numeric",), "quantity")):
        if settings[key] != settings.defaults[key] and kind not in kinds:
            lines.append(f"{settings.origins[key]}: a {kind} resource has no {what}; ignored")
    return lines


def tell_hints(settings, diary):
    """Says once, with -V or on a terminal, what somebody may have meant otherwise."""
    for line in hints_on_name(settings):
        diary.say(line)
        if not diary.verbose and sys.stderr and sys.stderr.isatty():
            put(f"flom: {line}", sys.stderr)


def run_command(options, settings):
    """The main job: lock, run, unlock."""
    leave_process_1()
    signals = Signals(settings["IgnoredSignals"])
    if not options.command:
        put("No command to execute!", sys.stderr)
        return NOT_RUN
    diary = Diary(settings)
    name = os.path.basename(options.command[0])
    progress = Progress(wants_progress(settings))
    claim = Claim(settings, diary, name, Starter(settings, fork_daemon), progress, life=True)
    tell_hints(settings, diary)
    claim.acquire(options.started)
    diary.patient = False  # a full pipe keeps nobody from watching the lock
    if claim.element is not None:
        diary.say(f"Locked element is '{claim.element}'", sys.stdout)
    command = Command(options.command, claim, signals)
    status = command.run()
    parting = claim.releasing(rollback=command.status != 0)
    was_held = finish(signals.until_told_to_end(parting, GOODBYE))
    if was_held is False and status == 0:
        diary.tell(f"flom: {claim.loss}")
        status = LockLost.status
    diary.end(GOODBYE)
    if command.killed_by == signal.SIGINT and status == command.status:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's loop is to end, too
        os.kill(os.getpid(), signal.SIGINT)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    return status


ACTIONS = {  # the exit status of each is what it returns, None for 0
    "run": run_command,
    "status": show_status,
    "evict": evict,
    "check": check_configuration,
    "signals": show_signals,
    "quiesce": stop_daemon,
    "immediate": stop_daemon,
    "id": lambda options, settings: show(machine_id())}


def main():
    """Runs flom and ends this process, without the ms that Python takes for an orderly end."""
    status = run() or 0
    os._exit(status)  # whatever has been printed is flushed


def prepare(options, settings):
    """Reads the settings, shows them with -V, and only then checks how they go together."""
    option_settings(options, settings)
    settings.tell("flom")
    check_rules(settings, CLIENT)
    interface_index(settings)


def run() -> "int | None":
    """Runs flom with the arguments of this process; returns its exit status, None for 0."""
    started = clock()
    settings = Settings()
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ^C ends flom as any C program
        name_process("flom")
        options = read_arguments(sys.argv[1:])
        options.started = started
        if options.action != "check":
            prepare(options, settings)
        return ACTIONS[options.action](options, settings)
    except LockError as error:
        return tell_error(error, settings)
    except (UsageError, ImportError) as error:  # a small Python lacks json or ssl
        put(f"flom: {error}", sys.stderr)
        return WRONG


def tell_error(error: "LockError", settings: "Settings") -> "int":
    """Says why there is no lock, unless that is not wanted; returns the exit status."""
    if not (settings["Quiet"] and isinstance(error, (Busy, Timeout, CannotWait))):
        put(f"{error.prefix}{error}", sys.stderr)
    if isinstance(error, (Busy, Timeout)):
        return settings["BusyStatus"]
    return error.status


if __name__ == "__main__":
    main()
