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
import sys

if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]  # a signal.py beside this script is not the one that is meant

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
import types


# --- Shared with flomd.py -------------------------------------------------------------------------
# ==== Shared with flomd.py: begin ====
VERSION = "1.0"
LOCK, UNLOCK, PING, DISCOVER, MANAGEMENT = 1, 2, 3, 4, 5  # verbs
OK, ENQUEUED, WAIT_RESOURCE, BUSY, CANT_WAIT, IMPOSSIBLE = 0, 1, 2, 4, 5, 6  # rc of an answer
DEADLOCK, STOPPED, LIMIT, EVICTED = 7, 8, 9, 10  # to clients of ours only
INVALID_NAME = -14
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
# What is seldom needed is compiled when it is needed, since each flom pays for what it compiles.
MOST_TAGS = 1000  # of a message that is no report; a known one has ten, and reading takes time
END, HEADER = b"</msg>", '<?xml version="1.0" encoding="UTF-8" ?>'
_PAIR = r"""([A-Za-z_][-\w.]*)\s*=\s*(?:"([^"<]*)"|'([^'<]*)')"""
_tag = re.compile(r"\s*<(/?)([A-Za-z_][-\w.]*)((?:\s+%s)*)\s*(/?)>"
                  % re.sub(r"\((?!\?)", "(?:", _PAIR), re.ASCII).match
_pairs, _whole = re.compile(_PAIR, re.ASCII).findall, re.compile("-?[0-9]{1,19}").fullmatch
_ENTITY = r"&(?:#([0-9]{1,7})|#x([0-9A-Fa-f]{1,6})|(amp|lt|gt|quot|apos));|&"
_ENTITIES = {"amp": "&", "lt": "<", "gt": ">", "quot": '"', "apos": "'"}
_ESCAPES = {ord(char): f"&{name};" for name, char in _ENTITIES.items() if char != "'"}
_ELEMENTS = {"msg", "session", "resource", "answer", "network", "shutdown", "evict"}
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
    for number, (closing, tag, attributes, empty) in enumerate(tags(data)):
        if number == MOST_TAGS:
            raise ProtocolError(f"more than {MOST_TAGS} tags")
        if closing:
            if attributes or empty or not inside or inside.pop() != tag:
                raise ProtocolError(f"misplaced </{tag}>")
            continue
        if tag in elements or (tag == "msg") == bool(inside) or attributes and tag not in _ELEMENTS:
            raise ProtocolError(f"misplaced <{tag}>")
        if tag in _ELEMENTS:
            elements[tag] = attributes
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
    position = len(HEADER) if text.startswith(HEADER) else re.match(
        r"\s*(<\?xml\s[^<>?]*\?>)?", text, re.ASCII).end()
    while position < len(text):
        found = _tag(text, position)
        if not found:
            raise ProtocolError(f"unreadable: {text[position:position + 20]!r}")
        closing, name, inner, empty = found.groups()
        pairs = _pairs(inner) if inner else ()
        unescape = functools.partial(re.sub, _ENTITY, _character) if "&" in inner else str
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
_KINDS = (("simple", f"_RESOURCE|{_WORD}"), ("numeric", rf"{_WORD}\[[0-9]+\]"),
          ("set", rf"{_WORD}(\.{_WORD})+"), ("hierarchical", r"(/[^/\\\n]+)+"),
          ("sequence", rf"_[sS]_{_WORD}\[[0-9]+\]"),
          ("timestamp", r"_t_[%#A-Za-z][%#.:A-Za-z0-9]*\[[0-9]+\]"))


def kind_of(name):
    """The kind of the resource `name`, None when it is no resource name."""
    kind = next((kind for kind, pattern in _KINDS if re.fullmatch(pattern, name)), None)
    if kind in ("numeric", "sequence", "timestamp"):  # [0] is the name of a numeric one, of no use
        return kind if len(name) < 400 and (kind != "numeric") <= size_of(name) <= MOST else None
    return kind


def size_of(name):
    """The number in the brackets of a numeric, sequence or timestamp name."""
    return int(name[name.rindex("[") + 1:-1])


class Type:
    """How the value of a setting is written.

    `form` is what its text looks like, `meaning` gives the value or None, `expected` says in an
    error what is right, `hint` names the value in --help, `write` gives a text of the value.
    """

    def __init__(self, hint, expected, form, meaning=str, write=str):
        self.hint, self.expected, self.form = hint, expected, form
        self.meaning, self.write = meaning, write

    def read(self, text):
        """The value that a text means; raises ValueError: what it is not."""
        found = re.fullmatch(self.form, text, re.ASCII | re.DOTALL)
        value = self.meaning(text) if found else None
        if value is None:
            raise ValueError(self.expected)
        return value


_ANY = ".+"
_NUMBER = "[+-]?[0-9]{1,99}|0[xX][0-9a-fA-F]{1,99}"
# No fraction is finer than 1 ms: a short time must not become 0, which often means "never".
_TIME = _NUMBER + r"|[+-]?[0-9]{1,10}(ms|(\.[0-9]{1,3})?[smh])"
UNITS = {"ms": 1, "s": 1000, "m": 60000, "h": 3600000}  # ms


def _whole_number(text):
    return int(text, 16 if "x" in text.lower() else 10)


def _number(least, greatest, meaning=int):
    def convert(text):
        value = meaning(_whole_number(text))
        return value if least <= value <= greatest else None
    return Type("N", f"a number from {least} to {greatest}", _NUMBER, convert)


def _cut_number(hint, greatest):
    """A type for what goes to the kernel: FLoM takes any number, the kernel does not."""
    return Type(hint, "a number", _NUMBER,
                lambda text: min(max(1, _whole_number(text)), greatest))


def _time(least, meaning=int, special=""):
    """A type: ms as in FLoM, or a number with a unit."""
    def convert(text):
        number = text.rstrip("smh")
        unit = UNITS.get(text[len(number):])
        value = meaning(round(float(number) * unit) if unit else _whole_number(text))
        if not least <= value <= MOST:
            raise ValueError(f"from {least} to {MOST} ms")
        return value
    return Type("MS", f"a time (5000, 5s, 1m{special})", _TIME, convert)


def _words(hint):
    """A type of some words, as fail|wait."""
    *others, last = hint.split("|")
    return Type(hint, f"{', '.join(others)} or {last}", hint)


def _path(text):
    """A path as it is; a relative one needs a current directory."""
    try:
        os.path.abspath(text)
    except OSError:
        raise ValueError("an absolute path, and the current directory is gone")
    return text


def _socket_path(text):
    absolute = os.path.abspath(_path(text))
    return absolute if len(os.fsencode(absolute)) <= 107 else None  # as many as the kernel takes


@functools.lru_cache(maxsize=None)
def signal_names():
    """{number: name} of the signals of this system."""
    names = {16: "SIGSTKFLT"}  # Linux; Python knows it from 3.11 on
    names.update((int(number), number.name) for number in signal.Signals)
    return names


def _signal_number(text):
    for number, name in signal_names().items():
        if text.upper() in (name, name[len("SIG"):], str(number)):
            return number
    return None


def _resource_name(text):
    return text if kind_of(text) and text != DEFAULT_RESOURCE else None


_YES, _NO = "yes|y|true|1|on", "no|n|false|0|off"
_MODE_NAMES = [name.upper() for name in MODES + LONG_MODES]
TYPES = {
    "file": Type("FILE", "a file name", _ANY, _path, os.path.abspath),
    "folder": Type("DIR", "a directory name", _ANY, _path, os.path.abspath),
    "socket": Type("PATH", "a path of at most 107 bytes", _ANY, _socket_path),
    "host": Type("ADDRESS", "an address", _ANY),
    "interface": Type("NAME", "the name of a network interface", _ANY),
    "flag": Type("yes|no", "yes or no (y n true false 1 0 on off)", f"(?i){_YES}|{_NO}",
                 lambda text: text.lower() in _YES.split("|"),
                 lambda value: "yes" if value else "no"),
    "name": Type("NAME", "a resource name (NAME NAME[N] A.B.C /A/B _s_NAME[N] _S_NAME[N] "
                 f"_t_FORMAT[N]; N from 1 to {MOST})", _ANY, _resource_name),
    "mode": Type("MODE", "a lock mode (" + " ".join(MODES + LONG_MODES) + ")",
                 "(?i)" + "|".join(_MODE_NAMES),
                 lambda text: _MODE_NAMES.index(text.upper()) % len(MODES), MODES.__getitem__),
    "signal": Type("SIGNAL", "a signal that --signal-list lists", _ANY, _signal_number),
    "octal": Type("MODE", "an octal mode such as 0600", "0?[0-7]{3}",
                  lambda text: int(text, 8), "{:04o}".format),
    "policy": _words("fair|first-fit"), "loss": _words("warn|term|ignore"),
    "deadlock": _words("fail|wait|reuse"),
    "wait": _time(-MOST, special="; -1 waits for ever, 0 does not wait"),
    "life": _time(-MOST, special="; -1 is for ever, 0 starts no daemon"),
    "ms": _time(0), "span": _time(0, abs),
    "count": _number(1, MOST, lambda value: abs(value) or 1), "number": _number(1, MOST),
    "units": _number(1, MOST, lambda value: value or 1),
    "port": _number(1, 65535), "hops": _number(0, 255), "status": _number(0, 255),
    "s": _cut_number("S", 32767), "probes": _cut_number("N", 127)}

# One row for each setting, in the order of -V.  Users: c, options of flom.py; d, options of
# flomd.py, handed on to a daemon that flom.py starts.
_COLUMNS = "group key short long type default users help".split()
SETTINGS = [types.SimpleNamespace(**dict(zip(_COLUMNS, (
    *path.split("/"), *(" " + options).split(" ")[-2:], *rest)))) for path, options, *rest in (
    ("Trace/DaemonTraceFile", "t daemon-trace-file", "file", None, "cd", "log of the daemon"),
    ("Trace/CommandTraceFile", "T command-trace-file", "file", None, "c", "log of this command"),
    ("Trace/AppendTraceFile", "append-trace-file", "flag", False, "cd", "append to the logs"),
    ("Trace/Verbose", "V verbose", "flag", False, "cd", "print settings and events"),
    ("Resource/Name", "r resource-name", "name", DEFAULT_RESOURCE, "c", "what to lock"),
    ("Resource/Timeout", "o resource-timeout", "wait", -1, "c", "ms to wait; 0: no, -1: for ever"),
    ("Resource/Quantity", "q resource-quantity", "units", 1, "c", "units of a numeric resource"),
    ("Resource/LockMode", "l lock-mode", "mode", 5, "c", "NL CR CW PR PW EX"),
    ("Resource/Create", "e resource-create", "flag", True, "c", "create the resource"),
    ("Resource/IdleLifespan", "i resource-idle-lifespan", "span", 0, "c", "ms to outlive users"),
    ("Daemon/SocketName", "s socket-name", "socket", None, "cd", "UNIX socket of the daemon"),
    ("Daemon/Lifespan", "d daemon-lifespan", "life", 5000, "cd", "ms unused; -1: ever; 0: none"),
    ("Daemon/UnicastAddress", "a unicast-address", "host", None, "cd", "of the daemon; or several"),
    ("Daemon/UnicastPort", "p unicast-port", "port", 28015, "cd", "TCP port of the daemon"),
    ("Daemon/MulticastAddress", "A multicast-address", "host", None, "cd", "group of the daemon"),
    ("Daemon/MulticastPort", "P multicast-port", "port", 28015, "cd", "UDP port of the group"),
    ("Daemon/MountPointVFS", "m mount-point-vfs", "folder", None, "cd", "where its state is shown"),
    ("Monitor/IgnoredSignals", "ignore-signal", "signal", (), "c", "signal to ignore; repeatable"),
    ("Network/NetworkInterface", "n network-interface", "interface", None, "cd", "for multicast"),
    ("Network/DiscoveryAttempts", "D discovery-attempts", "count", 2, "cd", "number of questions"),
    ("Network/DiscoveryTimeout", "I discovery-timeout", "span", 500, "cd", "ms for an answer"),
    ("Network/DiscoveryTTL", "discovery-ttl", "hops", 1, "cd", "hops that questions go"),
    ("Network/TcpKeepaliveTime", "tcp-keepalive-time", "s", 60, "cd", "s to the first probe"),
    ("Network/TcpKeepaliveIntvl", "tcp-keepalive-intvl", "s", 10, "cd", "s between probes"),
    ("Network/TcpKeepaliveProbes", "tcp-keepalive-probes", "probes", 6, "cd", "probes in vain"),
    ("TLS/TlsCertificate", "tls-certificate", "file", None, "cd", "PEM file of the certificate"),
    ("TLS/TlsPrivateKey", "tls-private-key", "file", None, "cd", "PEM file of its key"),
    ("TLS/TlsCaCertificate", "tls-ca-certificate", "file", None, "cd", "PEM file of the CA"),
    ("TLS/TlsCheckPeerId", "tls-check-peer-id", "flag", False, "cd", "peer's CN is its id"),
    ("Daemon/SocketMode", "socket-mode", "octal", None, "d", "mode of the UNIX socket"),
    ("Daemon/Policy", "policy", "policy", "fair", "cd", "fair or first-fit"),
    ("Daemon/RecoveryWindow", "recovery-window", "ms", None, "cd", "ms for former holders"),
    ("Daemon/StateDir", "state-dir", "folder", None, "cd", "where it keeps its state"),
    ("Daemon/AllowRemoteShutdown", "allow-remote-shutdown", "flag", False, "cd", "obey any host"),
    ("Daemon/MaxResources", "max-resources", "number", 1000000, "d", "limit of resources"),
    ("Monitor/OnLockLoss", "on-lock-loss", "loss", "warn", "c", "warn, term or ignore"),
    ("Monitor/KillAfter", "kill-after", "ms", 5000, "c", "ms from TERM to KILL"),
    ("Monitor/Deadlock", "deadlock", "deadlock", "fail", "c", "fail, wait or reuse"),
    ("Monitor/Quiet", "quiet", "flag", False, "c", "no line for busy, timeout and 96"),
    ("Monitor/Progress", "progress", "flag", None, "c", "tell on stderr what it waits for"),
    ("Monitor/SetEnv", "set-env", "flag", True, "c", "export FLOM_RESOURCE and others"),
    ("Monitor/ElementArgument", "element-argument", "flag", True, "c", "append it to COMMAND"),
    ("Monitor/InheritConnection", "inherit-connection", "flag", True, "c", "for the command"),
    ("Monitor/MinHold", "min-hold", "ms", 0, "c", "ms to keep the lock at least"),
    ("Monitor/BusyStatus", "busy-status", "status", 98, "c", "status for busy and timeout"),)]
SWITCHES = ("Verbose", "AllowRemoteShutdown", "Quiet")  # options without a value


SETTINGS_BY_PATH = {(setting.group, setting.key): setting for setting in SETTINGS}
FILES = ("/etc/flom.conf", "/usr/local/etc/flom.conf", "~/.flom")
LONGEST_FILE = 1000000  # bytes; more are no settings

# Files are read as GKeyFile reads them, which FLoM uses: blanks before a key and around the `=` do
# not count, those at the end of a text do; `[de]` behind a key makes it another key.
_BLANKS = " \t\f\r"
_KEY_AND_VALUE = rf"([^][={_BLANKS}][^][=]*(?:\[[^][=]*\])?)[{_BLANKS}]*=[{_BLANKS}]*(.*)"
_ESCAPED = {"s": " ", "n": "\n", "t": "\t", "r": "\r", "\\": "\\", ";": ";", "": ""}


def settings_text(path, required):
    """The text of a file of settings; raises OSError.

    One that is not asked for must be a regular file: a FIFO or a device would make flom wait.
    """
    def opener(name, flags):
        return os.open(name, flags if required else flags | os.O_NONBLOCK | os.O_NOCTTY)
    with open(path, "rb", opener=opener) as file:
        if not required and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        data = file.read(LONGEST_FILE + 1)
    if len(data) > LONGEST_FILE:
        raise OSError(errno.EFBIG, f"it is longer than {LONGEST_FILE} bytes")
    return data.decode("utf-8", "surrogateescape")


def _values_of(setting, text, folder):
    """The texts that a value in a file stands for; a TLS file is looked for in `folder` first."""
    if setting.default == ():
        parts = re.findall(r"(?:[^\\;]|\\.?)+", text)
        return [re.sub(r"\\([sntr\\;]|$)", _unescape, part) for part in parts]
    if TYPES[setting.type].form != _ANY:
        text = text.rstrip(_BLANKS)
    text = re.sub(r"\\([sntr\\]|$)", _unescape, text)
    beside = os.path.join(folder, text)
    return [beside if setting.group == "TLS" and os.path.exists(beside) else text]


def _unescape(found):
    return _ESCAPED[found.group(1)]


class Settings:
    """The settings by key, each with its origin; one that nobody has set has its default."""

    def __init__(self, **defaults):
        self.values, self.origins, self.warnings = {}, {}, []
        self.defaults = dict({setting.key: setting.default for setting in SETTINGS}, **defaults)

    def __getitem__(self, key):
        return self.values.get(key, self.defaults[key])

    def set(self, setting, texts, origin):
        """Sets from texts (the last counts, all for a list); raises UsageError: origin and text.

        A signal that is unknown is a warning: FLoM says nothing of it.
        """
        values = []
        for text in texts:
            try:
                values.append(TYPES[setting.type].read(text))
            except ValueError as error:
                message = f"{origin}: {text!r} is not {error}"
                if setting.type != "signal":
                    raise UsageError(message)
                self.warnings.append(f"{message}; ignored")
        self.values[setting.key] = tuple(values) if setting.default == () else values[-1]
        self.origins[setting.key] = origin

    def take_options(self, options):
        """Sets what a command line says, read by a parser with `add_settings`; UsageError."""
        for setting in SETTINGS:
            given = getattr(options, setting.key, None) or []
            if given and setting.default == ():
                self.set(setting, [text for _, text in given], given[-1][0])
                continue
            for option, text in given:
                self.set(setting, [text], option)

    def read_files(self):
        """Takes over the files of the system and of the user; raises UsageError."""
        for path in FILES:
            self.read_file(os.path.expanduser(path))

    def fix_paths(self):
        """Makes relative names of files absolute, for a process that will change its directory."""
        for setting in SETTINGS:
            if setting.type in ("file", "folder") and self.values.get(setting.key):
                path = self.values[setting.key]
                self.values[setting.key] = TYPES[setting.type].write(path)

    def read_file(self, path, required=False):
        """Takes over a file of settings, in the syntax of GKeyFile; raises UsageError.

        One that is not required and cannot be read is a warning: HOME may be another user's.
        """
        group, folder = None, os.path.dirname(path)
        try:
            lines = settings_text(path, required).split("\n")
        except OSError as error:
            if required:
                raise UsageError(f"{path}: {error.strerror}")
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                self.warnings.append(f"{path}: {error.strerror}; it is not read")
            return
        for number, line in enumerate(lines, 1):
            group = self._take_line(line, group, f"{path}:{number}", folder)

    def _take_line(self, line, group, place, folder):
        """Takes over one line; returns the group that it belongs to."""
        line = re.sub("\r$", "", line).lstrip(_BLANKS)
        if not line or line.startswith("#"):
            return group
        head = re.fullmatch(r"\[([^][]+)\][ \t]*", line)
        if head:
            return head.group(1)
        found = re.fullmatch(_KEY_AND_VALUE, line, re.DOTALL)
        if not found:
            raise UsageError(f"{place}: {line!r} is not [Group] or Key=value")
        key, text = found.group(1).rstrip(_BLANKS), found.group(2)
        origin = f"{place}: [{group or ''}]/{key}"
        setting = SETTINGS_BY_PATH.get((group, key))
        if not setting:
            self.warnings.append(f"{origin}: unknown key, ignored")
        elif text:  # an empty value is none
            self.set(setting, _values_of(setting, text, folder), origin)
        return group

    def lines(self):
        """The settings as -V prints them."""
        for setting in SETTINGS:
            value = self[setting.key]
            if setting.default == ():
                value = ";".join(signal_names()[number] for number in sorted(value))
            shown = f"{value:d}" if isinstance(value, int) else f"'{value or ''}'"
            yield f"[{setting.group}]/{setting.key}={shown}"


TLS_FILES = ("TlsCertificate", "TlsPrivateKey", "TlsCaCertificate")


NOT_WITH_SOCKET = {  # a daemon can serve a socket and an address at once
    "c": ("UnicastAddress", "MulticastAddress"), "d": ("MulticastAddress",)}


def check_rules(settings, user):
    """Raises UsageError for settings of a user, "c" or "d", that exclude or need each other."""
    origins, tls = settings.origins, [key for key in TLS_FILES if settings[key]]
    for partner in NOT_WITH_SOCKET[user]:
        if settings["SocketName"] and settings[partner]:
            raise UsageError(f"{origins['SocketName']}: not together with {origins[partner]}: "
                             "a daemon is local or in the network")
    if tls and len(tls) < len(TLS_FILES):
        raise UsageError(f"{origins[tls[0]]}: TLS wants all of --tls-certificate, "
                         "--tls-private-key and --tls-ca-certificate")


def put(text, stream):
    """Writes lines, whatever the stream's encoding; only what is printable comes through.

    No job ends because a stream is closed, broken or full: what is wrong with it is returned.
    """
    if not text.isprintable():
        text = re.sub("[^\n\t]+", lambda part: visible(part.group()), text)
    try:
        if stream:
            encoding = stream.encoding or "utf-8"
            print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream,
                  flush=True)
    except OSError as error:
        return error
    return None


def show(text):
    """Writes a line that was asked for to stdout; raises UsageError when it cannot be written.

    Where the reader has gone the process ends by SIGPIPE, as any C program.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    error = put(text, sys.stdout)
    if error:
        raise UsageError(f"cannot write to stdout: {error.strerror}")


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with negative times, and with errors as UsageError."""

    def __init__(self, **options):
        super().__init__(add_help=False, formatter_class=_format_help, **options)
        self._negative_number_matcher = re.compile("-[0-9.]+(ms|[smh])?$")
        self.color = False  # from Python 3.14 on help has escape sequences on a terminal

    def error(self, message):
        raise UsageError(visible(message))

    def _get_option_tuples(self, option_string):
        # allow_abbrev=False would break bundles such as -xV on Python 3.6 and 3.7.
        long = option_string.startswith("--")
        return [] if long else super()._get_option_tuples(option_string)


def _format_help(prog):
    return argparse.HelpFormatter(prog, 2, 32, 99)  # without a width it asks shutil


class Print(argparse.Action):
    """An option that shows a text, or the help, and ends the program."""

    def __call__(self, parser, namespace, values, option_string=None):
        show(self.const or parser.format_help().rstrip("\n"))
        parser.exit()


class _Given(argparse.Action):
    """An option of a setting: collects (option as it was typed, text)."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = getattr(namespace, self.dest) or []
        text = self.const if self.nargs == 0 else values
        setattr(namespace, self.dest, given + [(option_string, text)])


def add_settings(parser, user):
    """Gives a parser the options of the settings that concern a user, "c" or "d"."""
    groups = {}
    for setting in SETTINGS:
        if user not in setting.users:
            continue
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        shape = {"metavar": TYPES[setting.type].hint}
        if setting.key in SWITCHES:
            shape = {"nargs": 0, "const": "yes"}
        groups[setting.group].add_argument(
            *option_names(setting), dest=setting.key, action=_Given, help=setting.help, **shape)


def option_names(setting):
    """-s and --long of a setting, as far as it has them."""
    return [f"-{setting.short}"] * bool(setting.short) + [f"--{setting.long}"]


def plain(text, length=500):
    """`text` as an attribute of ours may hold it: printable ASCII, cut to a length."""
    return re.sub("[^ -~]", "?", text[:length])


def visible(text):
    """`text` in one line that a terminal shows and does not obey, whoever has written it."""
    if text.isprintable():
        return text
    return "".join([char if char.isprintable() else char.encode("unicode_escape").decode()
                    for char in text])


def machine_id():
    """The id of this host, 32 hex digits; where it has none, one derived from its name."""
    for path in ("/var/lib/dbus/machine-id", "/etc/machine-id"):
        with contextlib.suppress(OSError, ValueError), open(path) as file:
            return f"{int(file.read(), 16):032x}"
    import hashlib
    return hashlib.sha256(os.fsencode(os.uname().nodename)).hexdigest()[:32]


def user_name(uid):
    """The login name of a user, the number where there is none; a directory may be slow."""
    import pwd
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


_kept_name = functools.lru_cache(maxsize=None)(user_name)


def login():
    """The login name of the user of this process, asked for once."""
    return _kept_name(os.getuid())


def default_socket():
    """The path of the UNIX socket of this user's daemon, FLoM's."""
    return f"/tmp/flom-{login()}"


def name_process(name):
    """Names this process for ps and pgrep, where the system can (/proc)."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write(name)


def hhmmss(seconds):
    """A time of so many seconds as HH:MM:SS; one that has not begun yet is 00:00:00."""
    minutes, second = divmod(max(0, int(seconds)), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour:02d}:{minute:02d}:{second:02d}"


def credentials(connection):
    """(pid, uid) of the peer of a UNIX socket; (None, None) where the system does not tell."""
    if connection.family != socket.AF_UNIX or not hasattr(socket, "SO_PEERCRED"):
        return None, None
    ucred = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, _ = memoryview(ucred).cast("I")
    return pid, uid


def common_name(certificate):
    """The common name in a certificate as ssl reads it (a dictionary); None without exactly one."""
    parts = [pair for part in certificate.get("subject", ()) for pair in part]
    names = [value for key, value in parts if key == "commonName"]
    return names[0] if len(names) == 1 else None


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


def aim(sender, hops, interface):
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


def tls_context(settings, server=False):
    """The context of one side of mutual TLS, 1.2 or newer; None without files; UsageError.

    Who may talk is said by the CA and by the peer id: FLoM's certificates bear no host names.
    """
    certificate, key, authority = [settings[name] for name in TLS_FILES]
    if not certificate:
        return None
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    if hasattr(context, "minimum_version"):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:  # Python 3.6
        context.options |= ssl.OP_NO_SSLv3 | ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    names = f"{certificate!r} with {key!r}"
    try:
        context.load_cert_chain(certificate, key, password=b"")  # b"": do not ask for one
        names = repr(authority)
        context.load_verify_locations(authority)
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise UsageError(f"{settings.origins['TlsCertificate']}: {names}: {why}")
    return context


def secured(connection, context, **options):
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


# --- Errors and exit statuses ---------------------------------------------------------------------
# What can be wrong is a class: its status is flom's exit status, its prefix opens the line on
# stderr (FLoM's own messages have none).  What the daemon refuses is a row of REFUSALS.
NOT_RUN, WRONG = 97, 99


class LockError(Exception):
    """There is no lock; `reason` is what the daemon had to say about it, if anything."""
    status, prefix, reason = WRONG, "flom: ", None


class _Gone(Exception):
    """The connection ended: the daemon at `where` has ended, crashed, or drains."""

    def __init__(self, text, where):
        super().__init__(text)
        self.where = where


class _PlaceLost(_Gone):
    """It ended while the request stood in the daemon's queue."""


def _error(name, meaning, status=WRONG, prefix="flom: "):
    return type(name, (LockError,), {
        "__doc__": meaning, "__module__": __name__, "status": status, "prefix": prefix})


Busy = _error("Busy", "The resource is locked, and waiting was not wanted.", 98, "")
Timeout = _error("Timeout", "The lock was not granted in time.", 98, "")
CannotWait = _error("CannotWait", "It does not exist; waiting or creating was not wanted.", 96, "")
Impossible = _error("Impossible", "It can never be granted: more than there is.", prefix="")
Deadlock = _error("Deadlock", "It is held by a command that this one runs under; see `reason`.", 94)
LockLost = _error("LockLost", "The daemon has vanished, and the lock was not reclaimed.", 95)


class DaemonUnavailable(LockError):
    """No daemon, or one that does not serve."""


class _Useless(DaemonUnavailable):
    """What listens there says nothing, or is no lock daemon, or not the one that it says it is."""


LATE = "late"  # no rc: there was no answer in time
REFUSALS = {  # rc: the error, its text
    LATE: (Timeout, "The lock was not obtained because timeout ({ms} milliseconds) expired"),
    BUSY: (Busy, "Resource already locked, the lock cannot be obtained"),
    CANT_WAIT: (CannotWait, "The resource could be available in the future, but the requester "
                            "can't wait"),
    IMPOSSIBLE: (Impossible, "Resource will never satisfy the request, the lock cannot be "
                             "obtained"),
    INVALID_NAME: (LockError, "the daemon does not accept the name of this resource"),
    DEADLOCK: (Deadlock, "deadlock: {reason}"),
    STOPPED: (DaemonUnavailable, "the daemon is ending: {reason}"),
    EVICTED: (LockError, "evicted: {reason}"),
    LIMIT: (DaemonUnavailable, "the daemon refuses: {reason}")}


def refusal(rc, reason, settings):
    """The error for a refusal; the reason stands where its text wants it, with -V at its end.

    Who asks with -o 0 is told who holds: nothing else comes of such a run.
    """
    error_class, text = REFUSALS[rc]
    holder = bool(reason) and reason.startswith("held by ") and reason != "held by nobody"
    if rc == BUSY and holder:
        text += " ({reason})"
    elif settings["Verbose"] and reason and "{reason}" not in text:
        text += ": {reason}"
    error = error_class(text.format(ms=settings["Timeout"], reason=reason or "no reason given"))
    error.reason = reason
    return error


# --- Options and settings -------------------------------------------------------------------------
# The parser is made from SETTINGS.  argparse reads, Settings.set checks, so that a value is judged
# alike on the command line, in a file and as a keyword.  Each setting knows where it comes from.
ACTION_OPTIONS = (  # names; action; name of its argument, if it has one; help
    ("-x --quiesce-exit", "quiesce", None, "stop the daemon when nobody uses it any more"),
    ("-X --immediate-exit", "immediate", None, "stop the daemon now"),
    ("--status", "status", None, "show who holds and who waits"),
    ("--evict", "evict", "ID", "take a lock away; ID as --status --json shows it"),
    ("--check-config", "check", None, "read the configuration, report every problem"),
    ("--signal-list", "signals", None, "list the signals"),
    ("--unique-id", "id", None, "print the id of this host"))


class _Chosen(argparse.Action):
    """An option that says what to do in place of running a command."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.action, namespace.chosen, namespace.argument = self.const, option_string, values


def read_arguments(arguments):
    """What the command line says; raises UsageError.

    A namespace with `command`, `action`, its `argument`, and the texts of settings.
    """
    options = _parser().parse_args(arguments)
    options.command = options.command[options.command[:1] == ["--"]:]
    for name in ("json", "watch"):
        if getattr(options, name) and options.action == "run":
            options.action, options.chosen = "status", f"--{name}"
    if options.command and options.action != "run":
        raise UsageError(f"{options.chosen}: {options.command[0]!r} is not run beside it")
    return options


def _parser():
    parser = Parser(prog="flom", usage="flom [OPTION]... [--] COMMAND [ARG]...")
    add = parser.add_argument_group("Actions and reports").add_argument
    add("-c", "--config-file", metavar="FILE", help="read after the other files")
    add("-h", "--help", action=Print, nargs=0, help="show this and end")
    add("-v", "--version", action=Print, nargs=0, const=f"flom.py {VERSION}",
        help="show the version and end")
    add("--json", action="store_true", help="status as JSON")
    add("--watch", action="store_true", help="status, every second")
    for names, action, argument, text in ACTION_OPTIONS:
        add(*names.split(), dest="action", default="run", const=action, action=_Chosen, help=text,
            metavar=argument, nargs=None if argument else 0)
    parser.set_defaults(chosen=None, argument=None)
    add_settings(parser, "c")
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def option_settings(options, settings):
    """Fills `settings` from the files and the command line; raises UsageError."""
    settings.read_files()
    if options.config_file is not None:
        settings.read_file(options.config_file, required=True)
    settings.take_options(options)


SHORT_KEYWORDS = {"name": "resource_name", "mode": "lock_mode", "timeout": "resource_timeout",
                  "quantity": "resource_quantity"}


def keyword_settings(keywords, files):
    """Settings from files and from keywords: the long options with `_` for `-`, or the short ones.

    None is as good as not given.  Raises UsageError for a wrong value, TypeError for a keyword that
    there is not and for two that mean the same setting.
    """
    rows = {setting.long.replace("-", "_"): setting for setting in SETTINGS}
    rows.update({short: rows[long] for short, long in SHORT_KEYWORDS.items()})
    unknown = ", ".join(sorted(keywords.keys() - rows.keys()))
    if unknown:
        raise TypeError(f"Lock() has no setting {unknown}")
    given = {word: value for word, value in keywords.items() if value is not None}
    for short, long in SHORT_KEYWORDS.items():
        if {short, long} <= given.keys():
            raise TypeError(f"Lock() has both {short} and {long}, which are the same setting")
    settings = Settings()
    for path in files:
        settings.read_file(os.path.expanduser(path))
    for word, value in given.items():
        settings.set(rows[word], keyword_texts(rows[word], word, value), f"{word}=")
    check_rules(settings, "c")
    return settings


def keyword_texts(setting, word, value):
    """The texts that a configuration file would have for the value of a keyword; UsageError."""
    if word == "timeout":
        return [str(milliseconds(value, "timeout="))]
    if not isinstance(value, (list, tuple, set, frozenset)):
        return [keyword_text(setting, value)]
    if setting.default != ():
        raise UsageError(f"{word}=: {value!r} is not one value")
    return [keyword_text(setting, item) for item in value]


def keyword_text(setting, value):
    """The text of one value: of an int, also of an enum such as signal.SIGTERM, its number."""
    if isinstance(value, bytes):
        return os.fsdecode(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:04o}" if setting.type == "octal" else f"{value:d}"
    return str(value)


def milliseconds(seconds, origin):
    """The ms of a number of seconds, of its text or of a timedelta; -1, which means for ever, of
    inf and of what is negative.  What is more than 0 is at least 1.  Raises UsageError.
    """
    if hasattr(seconds, "total_seconds"):
        seconds = seconds.total_seconds()
    try:
        number = float(seconds)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if number < 0 or number == FOREVER:
        return -1
    if isinstance(seconds, bool) or not number <= MOST / 1000:  # nan is not
        raise UsageError(f"{origin}: {seconds!r} is not a number of seconds up to {MOST // 1000}")
    return max(1, round(number * 1000)) if number else 0


@functools.lru_cache(maxsize=None)
def begin_trace(path, append):
    """Makes or empties a trace file, once in a process, however many locks it has.  OSError."""
    open_trace(path, append).close()


def open_trace(path, append=True):
    """The file to write to; a FIFO that nobody reads is an OSError, and is not waited for."""
    def opener(name, _):  # Python 3.6 cannot open a FIFO with the mode "a"
        begin = os.O_APPEND if append else os.O_TRUNC
        return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | begin, 0o666)
    return open(path, "w", errors="replace", opener=opener)


class Diary:
    """Tells what happens: with -V on the terminal, with -T in a file; otherwise nothing."""

    def __init__(self, settings):
        self.verbose, self.path = settings["Verbose"], settings["CommandTraceFile"]
        try:
            if self.path:
                self.path = os.path.abspath(self.path)  # a program may change its directory
                begin_trace(self.path, settings["AppendTraceFile"])
        except OSError as error:
            origin = settings.origins["CommandTraceFile"]
            raise UsageError(f"{origin}: {self.path!r} is not a file that can be written: "
                             f"{error.strerror}")

    def say(self, text, stream=None):
        """Notes a line; with -V it goes to `stream`, stderr when none is given."""
        text = visible(text)
        if self.verbose:
            put(text, stream or sys.stderr)
        if self.path:
            with contextlib.suppress(OSError), open_trace(self.path) as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} flom[{os.getpid()}] {text}\n")


# --- Discovery ------------------------------------------------------------------------------------
# Where is the daemon?  On a socket, at an address, or wherever the group's answer says.
# Here and below, whatever may take time is a generator of *steps*: it yields what it waits for,
# (descriptor or None, poll events, seconds), and is resumed when that has come, when the time is
# over, or earlier; so it looks again each time.  `finish` runs one to its end and sleeps in poll();
# a Command resumes one between two signals, which thus are never kept waiting.
clock = time.monotonic
READ, WRITE, FOREVER = 1, 4, float("inf")  # POLLIN, POLLOUT


def finish(steps, until=FOREVER):
    """Runs steps to their end and returns their result; None when `until` comes first.

    Whatever ends it, also an exception out of a signal handler, closes the steps, and thereby the
    connection on which they wait.
    """
    try:
        while clock() < until:
            descriptor, events, seconds = next(steps)
            seconds = min(seconds, until - clock())
            _sleep(descriptor, events, None if seconds == FOREVER else max(0, seconds))
    except StopIteration as end:
        return end.value
    finally:
        steps.close()
    return None


def _sleep(descriptor, events, seconds):
    """Waits for events of a descriptor, None: of none, for so long, None: for ever."""
    waiting = [] if descriptor is None else [descriptor]
    if not hasattr(select, "poll"):  # eventlet takes it away and makes select() cooperative
        reading, writing = (waiting if events & event else [] for event in (READ, WRITE))
        select.select(reading, writing, [], seconds)
        return
    poll = select.poll()
    for number in waiting:
        poll.register(number, events)
    poll.poll(None if seconds is None else seconds * 1000)


def one_step(steps):
    """The next of the steps; returns their result when they have ended, else None."""
    try:
        yield next(steps)
    except StopIteration as end:
        return end.value


def interface_index(settings):
    """The index of the network interface wanted, 0 for none; raises UsageError."""
    name = settings["NetworkInterface"]
    try:
        return socket.if_nametoindex(name) if name else 0
    except OSError:
        raise UsageError(f"{settings.origins['NetworkInterface']}: {name!r} is not "
                         "a network interface of this host")


def resolve(host, port, kind, scope, flags=0):
    """[(family, address)] of a host; `scope` is for link-local addresses without one."""
    try:
        found = socket.getaddrinfo(host, port, type=kind, flags=flags)
    except (socket.gaierror, UnicodeError) as error:
        raise DaemonUnavailable(f"cannot resolve {host!r}: {getattr(error, 'strerror', error)}")
    return [(family, address if family == socket.AF_INET else address[:3] + (address[3] or scope,))
            for family, _, _, _, address in found if family in (socket.AF_INET, socket.AF_INET6)]


def resolving_here(host, port, kind, scope):
    """Steps to what resolve says, of which there are none: it may take as long as it likes."""
    return resolve(host, port, kind, scope)
    yield


def resolving_apart(host, port, kind, scope):
    """Steps to what resolve says in a child: a name server may not answer for half a minute.

    For where nothing else may be kept waiting, as the signals while the command runs.
    """
    with contextlib.suppress(DaemonUnavailable):
        return resolve(host, port, kind, scope, socket.AI_NUMERICHOST)
    reading, writing = os.pipe()
    child, told = 0, b""
    try:
        try:
            child = os.fork() or _tell_addresses(writing, host, port, kind, scope)
        finally:
            os.close(writing)
        os.set_blocking(reading, False)
        while True:
            try:
                more = os.read(reading, 4096)
            except BlockingIOError:
                yield reading, READ, FOREVER
                continue
            if not more:
                break
            told += more
    finally:
        os.close(reading)
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    import marshal
    found = marshal.loads(told) if told else f"cannot resolve {host!r}"
    if isinstance(found, str):
        raise DaemonUnavailable(found)
    return found


def _tell_addresses(writing, host, port, kind, scope):
    """In the child: writes the addresses, or what is wrong, into a pipe."""
    import marshal
    try:
        try:
            found = [(int(family), address)
                     for family, address in resolve(host, port, kind, scope)]
        except DaemonUnavailable as error:
            found = str(error)
        os.write(writing, marshal.dumps(found))
    finally:
        os._exit(0)


def discovering(settings, diary, resolving):
    """Steps to [(family, address)] of the group's daemon, [] when none answers; UsageError."""
    name, index = settings["MulticastAddress"], interface_index(settings)
    question, seconds = encode(DISCOVER, 8), settings["DiscoveryTimeout"] / 1000
    addresses = yield from resolving(name, settings["MulticastPort"], socket.SOCK_DGRAM, index)
    family, group = addresses[0]
    six, first = family == socket.AF_INET6, socket.inet_pton(family, group[0].partition("%")[0])[0]
    if not (first == 0xFF if six else 224 <= first < 240):
        raise UsageError(f"{settings.origins['MulticastAddress']}: {name!r} is not "
                         "a multicast group (224.0.0.0 to 239.255.255.255, ff00::/8)")
    name = f"{name}/{settings['MulticastPort']}"
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as asker:
            asker.setblocking(False)
            aim(asker, settings["DiscoveryTTL"], index)
            for _ in range(settings["DiscoveryAttempts"]):
                diary.say(f"sending UDP multicast datagram to {name} ('{question.decode()}')",
                          sys.stdout)
                asker.sendto(question, group)
                data, found = yield from hearing(asker, clock() + seconds)
                if found:
                    diary.say(f"reply from {name} is '{data.decode()}'", sys.stdout)
                    return found
    except OSError as error:
        raise DaemonUnavailable(f"multicast group {name}: {error.strerror}")
    diary.say(f"no reply from {name}", sys.stdout)
    return []


def hearing(asker, until):
    """Steps to (datagram, addresses) of the first valid answer, (None, []) when time is over."""
    while True:
        with contextlib.suppress(BlockingIOError, ProtocolError, DaemonUnavailable):
            data, source = asker.recvfrom(65536)
            message = decode(data)
            head, network = message["msg"], message.get("network", {})
            if (head["verb"], head["step"]) == (DISCOVER, 16) and "port" in network:
                host = network.get("address") or source[0].partition("%")[0]  # empty: the source
                # No stranger's datagram makes this host ask a name server.
                return data, resolve(host, network["port"], socket.SOCK_STREAM, sum(source[3:]),
                                     socket.AI_NUMERICHOST)
        if clock() >= until:
            return None, []
        yield asker.fileno(), READ, until - clock()


# --- Starting the daemon --------------------------------------------------------------------------
# flomd detaches itself: the process started here ends with 0 when the daemon listens, 1 when it
# cannot serve (often since another came first), 3 when it left the group to another daemon.  What
# it has to say is kept, for the case that in the end nobody serves.  It comes through a pipe, whose
# end tells at once that the process has ended.
CANNOT_SERVE = 1
AGAIN = 0.02  # s between two looks, two tries
RECOVERY_WINDOW = 2000  # ms in which a new daemon grants only to those who held before
RESTART = 1  # s between two starts of a daemon
LATECOMER = 5  # s for another's daemon to listen, when ours came too late or cannot serve


def search_path():
    """The folders in which programs are looked for; os.get_exec_path() would load `warnings`."""
    return os.environ.get("PATH", os.defpath).split(os.pathsep)


def daemon_program():
    """[program] or [python, script] of flomd; raises DaemonUnavailable: where it was looked for."""
    folder, named = os.path.dirname(os.path.realpath(__file__)), os.environ.get("FLOMD")
    beside = [os.path.join(folder, name) for name in ("flomd.py", "flomd")]
    in_path = [os.path.join(other, name) for name in ("flomd", "flomd.py")
               for other in search_path()]
    for path in [named] if named else beside + in_path:
        if os.path.isfile(path) and (path not in in_path or os.access(path, os.X_OK)):
            return [interpreter(), path] if path.endswith(".py") else [path]
    looked = f"$FLOMD ({named})" if named else f"{folder} and PATH"
    raise DaemonUnavailable(f"flomd.py is not in {looked}; put it beside flom.py, or start it "
                            "by hand and use -d 0")


def interpreter():
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


def found_environment():
    """The environment that flom has found, as far as a program can have it.

    In the C locale Python from 3.7 on (PEP 538) sets LC_CTYPE, for itself: `wc -m` counts otherwise
    with it.  An entry without a name is left out, since Python refuses it.
    """
    found = {name: value for name, value in os.environ.items() if name}
    if found.get("LC_CTYPE") in ("C.UTF-8", "C.utf8", "UTF-8"):
        found.pop("LC_CTYPE")
        found.update(_first_value("LC_CTYPE"))
    return found


def _first_value(name):
    """{name: value} as this process was started with it, {} when it was not set."""
    try:
        with open("/proc/self/environ", "rb") as file:
            entries = os.fsdecode(file.read()).split("\0")
    except OSError:  # no /proc; UTF-8 mode tells that Python found the C locale
        entries = [] if getattr(sys.flags, "utf8_mode", 0) else [f"{name}={os.environ[name]}"]
    for entry in entries:
        if entry.startswith(f"{name}="):
            return {name: entry[len(name) + 1:]}
    return {}


def daemon_options(settings):
    """The options that hand on to the daemon what has been set, and only that."""
    values = {**settings.values, "Lifespan": settings["Lifespan"]}
    yield "--no-files"
    for setting in SETTINGS:
        if "d" in setting.users and setting.key in values and setting.key not in SWITCHES:
            value = values[setting.key]
            yield f"--{setting.long}={TYPES[setting.type].write(value)}"
    yield from ["--allow-remote-shutdown"] * settings["AllowRemoteShutdown"]


def starting(argv, until, launch):
    """Steps that start a daemon and end with (exit status, what it said); None: still starting.

    `launch` is fork_daemon or spawn_daemon.
    """
    said, ended = b"", 0
    reading, writing = os.pipe()
    wait = reading, READ, AGAIN
    try:
        try:
            pid = launch(argv, writing)
        finally:
            os.close(writing)
        os.set_blocking(reading, False)
        while not ended and clock() < until:
            yield wait
            with contextlib.suppress(BlockingIOError):
                data = os.read(reading, 4096)
                said, wait = said + data, wait if data else (None, 0, 0.001)  # EOF: about to end
            ended, status = os.waitpid(pid, os.WNOHANG)
        return os.WEXITSTATUS(status) if ended else None, said.decode("utf-8", "replace").strip()
    except ChildProcessError:  # a program that ignores SIGCHLD has no statuses
        return 0, ""
    except OSError as error:
        return CANNOT_SERVE, f"cannot start flomd: {error.strerror}"
    finally:
        os.close(reading)


def daemon_environment():
    """The environment of the daemon: nothing in it tells of a lock or of sockets handed over."""
    return {name: value for name, value in found_environment().items()
            if not name.startswith(("FLOM_", "LISTEN_")) and name != "NOTIFY_SOCKET"}


def fork_daemon(argv, writing):
    """The pid of a new process that becomes flomd, and tells what it has to say to `writing`."""
    return os.fork() or _become_daemon(argv, writing)


def spawn_daemon(argv, writing):
    """As fork_daemon, where other threads may run: os.fork alone could stop the child for ever, and
    says so from Python 3.12 on.  flom itself has no threads, and spares the import.
    """
    import subprocess
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=writing, env=daemon_environment())
    process.returncode = 0  # its end is waited for by its pid; Popen is not to miss it
    return process.pid


def _become_daemon(argv, writing):
    """In the child: flomd, with nothing of ours but a pipe for what it has to say."""
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


class Starter:
    """Starts daemons for one lock, where that is allowed, and keeps what the last had to say.

    `launch` is fork_daemon or spawn_daemon.
    """

    def __init__(self, settings, allowed, launch):
        self.settings, self.allowed, self.launch = settings, allowed, launch
        self.order = None  # the last daemon was ended by order: how, in words
        self.complaint, self._steps, self._after = "", None, 0
        self._argv = self._missing = None
        if allowed:
            try:  # now: later the folder from which relative names count may be gone
                self._argv = daemon_program() + [*daemon_options(settings)]
            except DaemonUnavailable as error:
                self._missing = error

    def obstacle(self):
        """Why no daemon may be started here, None when one may."""
        if self.settings["Lifespan"] == 0:
            return "-d 0 forbids starting one"
        if not self.allowed:
            return "start_daemon=True is not given"
        if "," in (self.settings["UnicastAddress"] or ""):
            return "with several addresses none is started"
        return self.order

    def close(self):
        """Does not wait for the end of a start that has begun."""
        if self._steps:
            self._steps.close()
            self._steps = None

    def trying(self, until, recovering):
        """Steps that start a daemon, or wait a moment; the result is `until`, or earlier.

        After a crash who waits for its own daemon may reclaim too late, since another's may serve
        by then: so when `recovering` they are only a part of the start, between two looks.
        """
        if self.obstacle() or clock() < self._after:
            yield None, 0, AGAIN
            return until
        if not self._steps:
            self._steps = starting(self._command_line(recovering), until, self.launch)
        try:
            outcome = yield from one_step(self._steps) if recovering else self._steps
        except Exception:  # what has failed cannot go on; the next attempt is another start
            self._steps = None
            raise
        if not outcome:
            return until
        self._steps, (status, said) = None, outcome
        self.complaint = said or self.complaint
        if status != CANNOT_SERVE:
            return until
        self._after = clock() + RESTART  # mostly another client's daemon came first: it will listen
        return min(until, clock() + LATECOMER)

    def _command_line(self, recovering):
        if self._missing:
            raise self._missing
        after_a_crash = recovering and "RecoveryWindow" not in self.settings.values
        return self._argv + [f"--recovery-window={RECOVERY_WINDOW}"] * after_a_crash


# --- Session (the client's side of the protocol, pure: no sockets) --------------------------------
# One session is one request: bytes in, answers out.  It is ASKING until the step 16, WAITING while
# it is queued, HOLDING after rc 0, whatever the step.  What is not in NEXT is illegal.
# Additions of ours travel as attributes that FLoM ignores.  A FLoM daemon drops a message longer
# than 511 bytes, and dies of a byte that is not UTF-8: so ours are ASCII, and give way.
ASKING, WAITING, HOLDING, REFUSED, ENDING = "asking", "waiting", "holding", "refused", "ending"
TAKEN_AWAY = "taken away"
_OUTCOMES = {OK: HOLDING, ENQUEUED: WAITING, WAIT_RESOURCE: WAITING,
             **dict.fromkeys(REFUSALS, REFUSED)}
NEXT = {  # (state, step): {rc: next state}
    (ASKING, 16): _OUTCOMES, (WAITING, 24): _OUTCOMES, (WAITING, 32): _OUTCOMES,
    (HOLDING, 24): {STOPPED: ENDING, EVICTED: TAKEN_AWAY}}
LONGEST, ENDLESS = 511, 65536  # bytes: of a message sent, of one received
CHAIN = 8  # ids of FLOM_SESSION that are told and handed on
COVERED = [{0}, {0, 1}, {0, 1, 2}, {0, 1, 3}, {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4, 5}]  # by a mode
WITH_MODE, WITH_ELEMENT = ("simple", "hierarchical"), ("set", "sequence", "timestamp")
FIELDS = ("rc", "element", "token", "position", "reason", "daemon", "peerid")  # of an answer


def lock_message(settings, about, wait, reclaim=None, held=None):
    """The lock 8; `about`: id, parent, pid ...; `reclaim`, `held`: token, element of the lost.

    Of `about` what matters least is left out until FLoM would read the message.  It is None for a
    message without any addition of ours.
    """
    name, kind = settings["Name"], kind_of(settings["Name"])
    resource = [("name", encode_name(name))]
    if kind in WITH_MODE:
        resource.append(("mode", settings["LockMode"]))
    resource.append(("wait", int(wait)))
    if kind == "numeric":
        resource.append(("quantity", settings["Quantity"]))
    resource.append(("create", int(settings["Create"] or reclaim is not None)))
    resource.append(("lifespan", settings["IdleLifespan"]))
    if about is not None:
        resource += [("reclaim", reclaim), ("held", held)]
        if wait and (settings["Timeout"] >= 0 or settings["Deadlock"] == "wait"):
            resource.append(("deadlock", "wait"))
    while True:
        session = {"peerid": machine_id(), **(about or {})}
        message = encode(LOCK, 8, element("session", *session.items()),
                         element("resource", *resource))
        shorter = without_the_least(session)
        if len(message) <= LONGEST or shorter is None:
            return message
        about = shorter


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


def unlock_message(name, rollback):
    """The unlock 8; `rollback`: the command did not succeed."""
    return encode(UNLOCK, 8, element(
        "resource", ("name", encode_name(name)), ("rollback", int(rollback)), end=" />"))


def check_element(name, text):
    """Raises ProtocolError unless `text` (None: none) can be the element of a lock on `name`.

    It becomes an argument of the command, which must not take it for an option.
    """
    kind = kind_of(name)
    right = {
        "set": lambda: text in name.split("."),
        "sequence": lambda: re.fullmatch("[0-9]{1,10}", text),
        "timestamp": lambda: re.fullmatch("[^-].{0,499}", text) and text.isprintable()}
    if kind not in right:
        if text is not None:
            raise ProtocolError(f"it grants an element, {text[:40]!r}, where there are none")
    elif text is None or not right[kind]():
        raise ProtocolError(f"it grants the element {str(text)[:40]!r}")


class Session:
    """A request's life: `receive` takes bytes, returns answers, keeps `state`."""

    def __init__(self):
        self.state, self._buffer = ASKING, b""

    def receive(self, data):
        """The answers that are complete with `data`.  ProtocolError."""
        *messages, self._buffer = (self._buffer + data).split(END)
        answers = [self._take(decode(message + END)) for message in messages]
        start = self._buffer.lstrip()[:20]
        if start and (start[:1] != b"<" or len(self._buffer) > ENDLESS):
            tls = start[:1] == b"\x15"  # an alert
            raise ProtocolError("it wants TLS" if tls else f"it says {plain(repr(start), 60)}")
        return [answer for answer in answers if answer]

    def _take(self, message):
        verb, step = message["msg"]["verb"], message["msg"]["step"]
        if (verb, step) == (PING, 8):  # no daemon asks so; harmless
            return None
        answer, outcomes = message.get("answer"), NEXT.get((self.state, step), {})
        if verb != LOCK or answer is None or answer.setdefault("rc", 0) not in outcomes:
            raise ProtocolError(f"verb {verb} step {step} {str(answer)[:99]} while {self.state}")
        self.state = outcomes[answer["rc"]]
        found = {**message.get("session", {}), **answer}
        if "reason" in found:
            found["reason"] = visible(found["reason"][:500])
        return types.SimpleNamespace(**{name: found.get(name) for name in FIELDS})


# --- Connection -----------------------------------------------------------------------------------
# A non-blocking stream to the daemon, with TLS where three files say so, and the session on it.
# Connecting and the first answer have PATIENCE: a daemon that says nothing is an error.
PATIENCE, GOODBYE = 10, 5  # s: for a first answer, for the daemon's EOF after ours
SEVERAL, EACH = 15, 6  # s: PATIENCE with several addresses, with one of them but the last
STAGGER = 0.25  # s from one connection attempt to the next
CHUNK = 65536  # bytes read at once
NOBODY = {errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET}  # connect: nobody listens there
NOT_YET = {errno.EINPROGRESS, errno.EALREADY, errno.EINTR, errno.EAGAIN}
KEEPALIVE = (15, 5, 3)  # s, s, probes: a holder is to learn of a dead network before the daemon


def place(settings):
    """Where a daemon is looked for, in words; a path when it is local."""
    for kind, words in (("Unicast", ""), ("Multicast", "multicast group ")):
        if settings[f"{kind}Address"]:
            return f"{words}{settings[f'{kind}Address']}, port {settings[f'{kind}Port']}"
    return settings["SocketName"] or default_socket()


def locating(settings, diary, resolving=resolving_here):
    """Steps to [(family, address)] where a daemon may be; raises DaemonUnavailable."""
    if not settings["UnicastAddress"]:
        if settings["MulticastAddress"]:
            return (yield from discovering(settings, diary, resolving))
        return [(socket.AF_UNIX, place(settings))]
    found, failure, scope = [], None, interface_index(settings)
    for host in filter(None, map(str.strip, settings["UnicastAddress"].split(","))):
        try:
            found += yield from resolving(host, settings["UnicastPort"], socket.SOCK_STREAM, scope)
        except DaemonUnavailable as error:
            failure = error
            diary.say(str(error))
    if not found:
        raise failure or DaemonUnavailable(f"{settings['UnicastAddress']!r} names no host")
    return list(dict.fromkeys(found))


class Race:
    """The addresses of a daemon: the first with which a connection stands, TLS included, wins.

    `make` is Connection or, in a program, program_connection.
    The next address begins to run when the one before has failed, or has run for STAGGER without
    an end (RFC 8305).  A winner may prove to be of no use: then those that are left run on.
    """

    def __init__(self, settings, addresses, context, make):
        self.settings, self.context, self.make = settings, context, make
        self.left = list(addresses)  # those that have neither won nor failed
        self._failure, self._nobody = None, False

    def winning(self):
        """Steps to the next Connection that stands, None when no address is left."""
        until, begin, running = clock() + PATIENCE, 0, {}
        try:
            while self.left or running:
                if self.left and (not running or clock() >= begin):
                    address = self.left.pop(0)
                    running[address], begin = self._opening(address, until), clock() + STAGGER
                wait = None
                for address, steps in list(running.items()):
                    try:
                        wait = next(steps)
                    except StopIteration as end:
                        del running[address]
                        if end.value:
                            return end.value
                if wait:
                    yield self._first_of(wait, len(running), begin)
        finally:  # those that have run in vain run again if the winner is of no use
            for steps in running.values():
                steps.close()
            self.left[:0] = running

    def _first_of(self, wait, count, begin):
        """What to wait for: several connections have no common event, so they are looked at."""
        descriptor, events, seconds = wait
        if count > 1:
            return None, 0, AGAIN
        if self.left:
            seconds = min(seconds, max(0, begin - clock()))
        return descriptor, events, seconds

    def _opening(self, address, until):
        """Steps to a Connection that stands, None when it fails."""
        family, name = address
        local = family == socket.AF_UNIX
        where = name if local else show_address(name)
        try:
            with self.make(family, where) as connection:
                yield from connection.opening(name, until, self.context)
                if local and not self.settings["SocketName"]:
                    connection.check_owner()
                connection.address = address
                return connection
        except OSError as error:
            self._nobody = self._nobody or error.errno in NOBODY
            self._failure = f"cannot connect to {where}: {explain(error)}"
            return None

    def check(self):
        """Raises DaemonUnavailable, unless there is an address at which nobody listens."""
        if self._failure and not self._nobody:
            raise DaemonUnavailable(self._failure)


def explain(error):
    """What an OSError of a connection means."""
    if type(error).__module__ != "ssl":
        return error.strerror or str(error)
    reason = getattr(error, "reason", None)  # with OpenSSL 1.1 an end too early has none
    if type(error).__name__ == "SSLEOFError" or reason in (
            None, "WRONG_VERSION_NUMBER", "UNEXPECTED_MESSAGE"):
        return "TLS: it does not speak TLS, or refuses to"
    ours = "it refuses our certificate" if "ALERT" in reason else "its certificate"
    return f"TLS: {ours}: {getattr(error, 'verify_message', None) or reason}"


class Connection:
    """A stream to a daemon and the session on it; a `with` block closes it on an error only.

    It is its maker's: a process made by fork closes its own copy, and does not end the stream.
    """

    def __init__(self, family, where):
        self.family, self.where, self.session = family, where, Session()
        self.sock, self._again = socket.socket(family, socket.SOCK_STREAM), (BlockingIOError,)
        self.sock.setblocking(False)
        self.name = None  # the one CN of the daemon's certificate
        self.address = None  # as `locating` has found it
        self._maker = os.getpid()

    def __enter__(self):
        return self

    def __exit__(self, error_class, error, traceback):
        if error_class:
            self.close()

    def opening(self, address, until, context):
        """Steps that connect, with TLS where there is a context; raises OSError."""
        if self.family != socket.AF_UNIX:
            tune(self.sock, *KEEPALIVE)
        code = self.sock.connect_ex(address)
        while code in NOT_YET and clock() < until:
            # EAGAIN: the backlog of a local daemon is full, which no event tells.
            yield ((None, 0, 0.01) if code == errno.EAGAIN else
                   (self.sock.fileno(), WRITE, until - clock()))
            code = self.sock.connect_ex(address)
        if code in (0, errno.EISCONN):  # TCP can connect to itself
            code = errno.ECONNREFUSED if self.sock.getsockname() == address else 0
        if code:
            code = errno.ETIMEDOUT if code in NOT_YET else code
            raise OSError(code, os.strerror(code))
        if context:
            yield from self._securing(until, context)

    def _securing(self, until, context):
        import ssl
        self._again = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
        self.sock = secured(self.sock, context)
        while clock() < until:
            try:
                self.sock.do_handshake()
                self.name = common_name(self.sock.getpeercert())
                return
            except self._again as wanted:
                events = WRITE if isinstance(wanted, ssl.SSLWantWriteError) else READ
            yield self.sock.fileno(), events, until - clock()
        raise OSError(errno.ETIMEDOUT, "it does not answer the TLS handshake")

    def check_name(self, peerid):
        """Refuses a daemon whose certificate has not one CN, its peer id."""
        if not self.name or self.name != peerid:
            raise _Useless(f"{self.where}: the one CN of its certificate is {self.name!r}, "
                           f"but its peer id is {peerid!r}")

    def check_owner(self):
        """Refuses a stranger's daemon on this user's own socket: it could grant anything."""
        for owner in (credentials(self.sock)[1], os.stat(self.where).st_uid):
            if owner not in (None, 0, os.getuid()):
                raise DaemonUnavailable(f"{self.where} belongs to user {owner}: refused; remove "
                                        "it, or name another socket with -s")

    def send(self, data):
        """Sends a message in one write, for which a socket always has room; raises _Gone."""
        try:
            self.sock.send(data)
        except OSError as error:
            raise self._ended(error)

    def take(self):
        """The bytes that have come, b"" when none have; _Gone at the end."""
        try:
            data = self.sock.recv(CHUNK)
        except self._again:
            return b""
        except OSError as error:
            raise self._ended(error)
        if not data:
            raise _Gone("it closed the connection", self.where)
        return data

    def _ended(self, error):
        text = explain(error)
        refused = text.startswith("TLS: it refuses")  # TLS 1.3 tells it after the handshake
        return _Useless(f"{self.where}: {text}") if refused else _Gone(text, self.where)

    def receive(self):
        """The answers in what has come, None when nothing has; raises _Gone, ProtocolError.

        It reads once: a daemon that sends without end must not keep its client from all else.
        """
        data = self.take()
        return self.session.receive(data) if data else None

    def answering(self, until):
        """Steps to the next answers, [] when there are none before `until`."""
        answers = []
        while not answers and clock() < until:
            yield self.sock.fileno(), READ, until - clock()
            answers = self.receive()
        return answers

    def parting(self, message, patience, answered=False):
        """Steps that send a last message, half-close, and wait for what follows.

        TLS says goodbye, too, unless the message may be `answered`: that would lose the answer.
        The result is the message that came, b"" when the daemon has closed the connection, None
        when neither has happened in `patience` s.  The connection is closed in any case.
        """
        data, until = bytearray(), clock() + patience
        try:
            self.send(message)
            self._half_close(goodbye=not answered)
            while END not in data and clock() < until:
                more = self.take()
                data += more
                if not more:
                    yield self.sock.fileno(), READ, until - clock()
            return data or None
        except _Gone:
            return data
        finally:
            self.close()

    def _half_close(self, goodbye):
        if goodbye:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                self.sock.unwrap()
        with contextlib.suppress(OSError):
            if hasattr(socket.socket, "shutdown"):  # SSLSocket's own would end reading, too
                socket.socket.shutdown(self.sock, socket.SHUT_WR)
            else:  # eventlet's sockets are of another class
                self.sock.shutdown(socket.SHUT_WR)

    def fetching(self, message, patience):
        """Steps that send a message and read all of the one that follows, which may be long.

        The result is as that of `parting`; each part of the message may take `patience` s.
        """
        data, until = bytearray(), clock() + patience
        try:
            self.send(message)
            # what begins otherwise is no message, and may never end
            while data[:1] in (b"", b"<") and END not in data[-2 * CHUNK:] and clock() < until:
                more = self.take()
                data += more
                if more:
                    until = clock() + patience
                else:
                    yield self.sock.fileno(), READ, until - clock()
            return data or None
        except _Gone:
            return data
        finally:
            self.close()

    def close(self):
        """Ends it, also for copies of the descriptor that a command has inherited."""
        if self._maker == os.getpid():
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


@functools.lru_cache(maxsize=None)
def program_connections():
    """The connections of a program, in a WeakSet, of which a fork closes the child's copies.

    A child that kept its copy would keep a lock, or a place in the queue, of a parent that has
    ended.  Python 3.6 does not tell of a fork: there the child closes its copy when it releases the
    Lock, or drops it.
    """
    import weakref
    connections = weakref.WeakSet()

    def close_copies():
        for connection in list(connections):
            connection.sock.close()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=close_copies)
    return connections


def program_connection(family, where):
    """A Connection that no process made by fork keeps.  flom's command inherits flom's."""
    connection = Connection(family, where)
    program_connections().add(connection)
    return connection


# --- Lock (the Python API) ------------------------------------------------------------------------
# A lock is one request on one connection.  When the daemon vanishes, a waiter asks again and a
# holder *reclaims*: it asks the next daemon, with the token and the element of its grant, for the
# same lock, without waiting.  The daemon grants that only if nobody else can have been granted
# since; a FLoM daemon takes it for an ordinary request, whose grant is as good where it carries no
# element.  EOF alone means a crash, after which a daemon may be started; rc STOPPED means that
# somebody wanted it to end: then flom starts none, and watches for one of somebody else.
HURRY = 2  # s: how long to try every AGAIN
TAKEN = "it was granted to somebody else"


class Progress:
    """Tells on stderr what a command waits for: after 2 s, and again when that has changed.

    Nobody wants a line for each turn of a long queue, so there is one in PAUSE s at most.
    """
    FIRST, PAUSE = 2, 5  # s

    def __init__(self, wanted):
        self.wanted = wanted
        self._date, self._text, self._since, self._told = None, "", 0, None

    def note(self, text):
        """This is what it waits for, from now on."""
        self._text, self._since = text, clock()
        if self._date is None:
            self._date = self._since + self.FIRST

    def date(self):
        """When there will be something to tell."""
        changed = without_duration(self._text) != self._told
        return self._date if self.wanted and changed else FOREVER

    def tell(self):
        """Tells it, if its time has come."""
        if clock() < self.date():
            return
        put(f"flom: {longer_by(clock() - self._since, self._text)}", sys.stderr)
        self._told, self._date = without_duration(self._text), clock() + self.PAUSE


def wants_progress(settings):
    """Whether --progress is set, or by default a person looks who does not read -V."""
    if settings["Progress"] is not None:
        return settings["Progress"]
    return not settings["Verbose"] and bool(sys.stderr) and sys.stderr.isatty()


DURATION = " for ([0-9]+):([0-9]{2}):([0-9]{2})"  # in a reason, as old as the answer


def without_duration(text):
    """A reason without how long somebody has held the lock."""
    return re.sub(DURATION, "", text)


def longer_by(seconds, text):
    """A reason, brought up to date after some seconds."""
    def add(found):
        hours, minutes, rest = map(int, found.groups())
        total = int(hours * 3600 + minutes * 60 + rest + seconds)
        return f" for {hhmmss(total)}"
    return re.sub(DURATION, add, text)


class Lock:
    """A lock on a resource: `with flom.Lock("backup", mode="PR", timeout=5) as lock: ...`

    Leaving the block releases it, by an exception as a rollback.  `@flom.Lock("name")` decorates a
    function or a generator function, of which each call has a lock of its own.
    name, mode ("EX"), timeout (seconds, as a number, a text or a timedelta; 0: do not wait,
    negative or inf: wait for ever) and quantity are those of the command line, other settings are
    keywords named as its long options (unicast_address="db1", resource_timeout=500 in ms); what is
    not given comes from the configuration files, with config=False from nowhere.  A daemon is
    started only with start_daemon=True.

    `element` and `token` are those of the grant.  Use one Lock per thread; a process made by fork
    does not share it, and neither keeps nor releases it.  Raises UsageError for wrong settings.
    """

    def __init__(self, name=None, mode=None, timeout=None, quantity=None, *, start_daemon=False,
                 config=True, settings=None, command=None, **options):
        short = {"name": name, "mode": mode, "timeout": timeout, "quantity": quantity}
        self.settings = settings or keyword_settings({**short, **options}, FILES if config else ())
        self.command = command or os.path.basename(sys.argv[0] or "python")
        self.diary, self.name = Diary(self.settings), self.settings["Name"]
        self.start_daemon = start_daemon
        in_program = command is None  # flom itself has a command, of whatever name
        self._make = program_connection if in_program else Connection
        self.resolving = resolving_here
        self._launch = spawn_daemon if in_program else fork_daemon
        self._tells = not in_program and wants_progress(self.settings)
        several = "," in (self.settings["UnicastAddress"] or "")
        self._patience = SEVERAL if several else PATIENCE
        self._begin()

    def _begin(self):
        """Nothing has been asked for yet; `_latest` is the connection that was made last."""
        self.connection = self._latest = None
        self._owner = self._context = None
        self._forget()

    def _forget(self):
        """Forgets an earlier grant; `chain` is the id of the next and those it is asked under."""
        self.element = self.token = self.loss = None
        self.unread = self.reused = self._evicted = False
        self._progress = Progress(self._tells)
        self._starter = Starter(self.settings, self.start_daemon, self._launch)
        self.chain = [os.urandom(8).hex()] + re.findall(
            "[0-9a-f]{16}", os.environ.get("FLOM_SESSION", ""))[:CHAIN - 1]

    def __enter__(self):
        return self.acquire()

    def __exit__(self, error_class, error, traceback):
        self.release(rollback=error is not None)

    def __call__(self, function):
        """Decorates `function`: each call waits for a lock of its own, and holds it to its end; a
        generator function's holds it until the generator has ended or was closed.

        Raises TypeError for a class and for `async def`, which would wait while it holds up its
        event loop; and when the function returns a coroutine or a generator, which runs later.
        """
        if isinstance(function, (staticmethod, classmethod)):
            return type(function)(self(function.__func__))
        decorate = self._decorate_generator if self._may_decorate(function) else self._decorate
        return decorate(function)

    def _may_decorate(self, function):
        """Is it a generator function?  TypeError for what has no body to be locked here."""
        import inspect
        inner = function
        while isinstance(inner, functools.partial):
            inner = inner.func
        if isinstance(inner, type) or not callable(inner):
            raise TypeError(f"{inner!r} is not a function or a method")
        bodies = inner, type(inner).__call__
        if any(inspect.iscoroutinefunction(body) or inspect.isasyncgenfunction(body)
               for body in bodies):
            raise TypeError(f"{inner!r} is async: it would wait for the lock while it holds up the "
                            "event loop; lock a function that runs in a thread")
        return any(inspect.isgeneratorfunction(body) for body in bodies)

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
                    getattr(result, "close", str)()  # or Python would say that it never ran
                    raise TypeError(f"{function!r} returned a {type(result).__name__}, which would "
                                    f"run without the lock on {self.name}")
                return result
        return locked

    def _another(self):
        """A Lock of the same class and settings that has asked for nothing yet."""
        import copy
        other = copy.copy(self)
        other._begin()
        return other

    def acquire(self, blocking=True, timeout=None, *, started=None):
        """Waits for the lock and returns self; raises the LockError that says why it is not held.

        blocking=False: does not wait, Busy.  timeout: seconds, as that of Lock, for this call
        alone.  started: when the wait began (monotonic s).  A lock that was lost is asked for anew.
        """
        if self._owner == os.getpid() and self.look():
            raise RuntimeError(f"{self.name} is held already")
        asked = self._request_settings(blocking, timeout)
        self.release()  # of what is lost, or the parent's: only forgets
        self._forget()
        self._asked, limit = asked, asked["Timeout"]
        deadline = (started or clock()) + (limit / 1000 if limit >= 0 else FOREVER)
        self._context = tls_context(self.settings)
        self._about = {
            "client": f"flom.py/{VERSION}", "id": self.chain[0], "key": os.urandom(8).hex(),
            "parent": ",".join(self.chain[1:]) or None, "pid": os.getpid(),
            "user": plain(login(), 32), "host": plain(os.uname().nodename, 64),
            "cmd": plain(self.command, 32),
            "progress": 1 if self.diary.verbose or self._tells or limit == 0 else None}
        try:
            self.connection, answer = finish(self._asking(deadline))
            self.element, self.token = answer.element, answer.token
            self._owner = os.getpid()
        finally:
            self._starter.close()
            if self._owner is None:  # a signal handler may raise after the grant, too
                self._abandon()
        return self

    def _request_settings(self, blocking, timeout):
        """The settings of one request, which may have a timeout of its own; UsageError."""
        if not isinstance(blocking, bool):
            raise UsageError(f"blocking=: {blocking!r} is not True or False; seconds are timeout=")
        limit = None if timeout is None else milliseconds(timeout, "timeout=")
        if not blocking and limit is not None and limit > 0:
            raise UsageError(f"timeout=: {timeout!r} is not to be had with blocking=False")
        if not blocking:
            limit = 0
        if limit is None:
            return self.settings
        import copy
        asked = copy.copy(self.settings)
        asked.values = {**asked.values, "Timeout": limit}
        return asked

    def reuse(self, holder):
        """Counts as held what the command above holds, whose entry in a report is `holder`.

        It is neither asked for nor released, and only that command's flom watches it.
        """
        self._forget()
        self.chain = self.chain[1:]
        self.element, self.token = holder.get("element"), int(holder["token"])
        self.reused, self._owner = True, os.getpid()

    def _abandon(self):
        """Ends the request that an exception has cut short."""
        self.connection = None
        if self._latest:
            self._latest.close()

    def release(self, rollback=False):
        """Releases the lock; takes at most 5 s.  A lost lock is forgotten, without an error.

        Nothing that is wrong with the connection is an error either: its end frees the lock, and
        what the lock was held for is done.
        """
        connection, self.connection = self.connection, None
        owner, self._owner = self._owner, None
        self.reused = False
        self._starter.close()
        if not connection:
            return
        try:
            if owner == os.getpid():
                with contextlib.suppress(DaemonUnavailable):  # an alert of TLS
                    finish(connection.parting(unlock_message(self.name, rollback), GOODBYE))
        finally:
            connection.close()

    def rollback(self):
        """Releases the lock; the value of a transactional sequence will be granted again."""
        self.release(rollback=True)

    @property
    def lost(self):
        """True when the lock was granted, not released, and its daemon has vanished."""
        return self._owner == os.getpid() and not self.look()

    def check(self):
        """Returns when this process holds the lock; reclaims it if its daemon vanished.

        Raises LockLost when that fails within 2 s, LockError when the lock was not acquired or has
        been released, and in a process made by fork.
        """
        if self._owner != os.getpid():
            raise LockError(f"{self.name} is not held by this process")
        if not self.look() and not finish(self.reclaiming(), clock() + RECOVERY_WINDOW / 1000):
            raise self.loss

    def look(self):
        """Reads once what the holder's daemon has sent; False when the daemon has vanished.

        Afterwards `unread` says that there may be more.
        """
        if self.connection is None:
            return self.reused
        try:
            answers = self.connection.receive()
            self.unread = answers is not None
            if self.connection.session.state == TAKEN_AWAY:
                self._evicted = True
                raise _Gone(answers[-1].reason or TAKEN_AWAY, self.connection.where)
            if self.connection.session.state == ENDING:
                self._starter.order = "it was stopped"
                # its EOF may come after the command's end
                raise _Gone(self._starter.order, self.connection.where)
            return True
        except (_Gone, ProtocolError, DaemonUnavailable) as error:
            self.connection.close()
            self._lose(f"{self.connection.where}: {self._starter.order or error}")
            return False

    def _lose(self, reason):
        self.connection, self.unread = None, False
        self.loss = LockLost(f"the lock on {self.name} is lost: {reason}")
        self.loss.reason = reason

    def _asking(self, deadline, recovering=False, **lost):
        """Steps to (connection, granting answer); raises the refusal.

        A daemon that ends before its first answer is asked for again, until patience ends.
        `recovering`: one that served this lock has crashed; `lost`: what is to be reclaimed.
        """
        until, patient, about = clock() + self._patience, False, self._about
        while True:
            try:
                served = yield from self._asking_each(about, deadline, until, lost)
                if served:
                    return served
                self._check_patience(until, patient)
                until = yield from self._starter.trying(until, recovering)
            except _PlaceLost as gone:
                recovering, patient, until = True, True, clock() + self._patience
                self.diary.say(f"waiting for {self.name}: {gone.where}: {gone}; asking again")
            except _Gone as gone:
                if clock() >= until:
                    hint = "" if self._context else "; it may want TLS"
                    raise DaemonUnavailable(f"{gone.where} does not answer: {gone}{hint}")
                patient, bare = True, about and self._is_long()
                about = None if bare else self._about
                yield None, 0, AGAIN

    def _is_long(self):
        """Whether a FLoM daemon would close the connection rather than read the request."""
        return len(lock_message(self._asked, self._about, wait=True)) > LONGEST

    def _check_patience(self, until, patient):
        """Raises DaemonUnavailable when it is no use to look for a daemon any longer."""
        obstacle, why = self._starter.obstacle(), ""
        if clock() < until and (patient or not obstacle):
            return
        if self._starter.complaint:
            why = f": {self._starter.complaint}"
        elif obstacle:
            why = f" (and {obstacle})"
        raise DaemonUnavailable(f"no daemon at {place(self.settings)}{why}")

    def _asking_each(self, about, deadline, until, lost):
        """Steps to (connection, granting answer) of the first address that serves.

        The result is None when nobody listens.  Only one is asked at a time: two daemons might both
        grant.  Whatever is wrong with one before it has answered, the next is asked.  Raises the
        refusal; _Gone when a daemon has ended, which may be another's moment to begin.
        """
        addresses = yield from locating(self.settings, self.diary, self.resolving)
        race, wrong = Race(self.settings, addresses, self._context, self._make), None
        while True:
            connection = yield from race.winning()
            if not connection:
                break
            self._latest = connection
            message = lock_message(self._asked, about, clock() < deadline, **lost)
            patience = self._patience_with(race, until)
            try:
                with connection:
                    return connection, (yield from self._granting(
                        connection, message, patience, deadline))
            except _PlaceLost:
                raise
            except (_Gone, _Useless) as error:
                wrong = wrong if isinstance(wrong, _Gone) else error
        if wrong:
            raise wrong
        race.check()
        return None

    def _patience_with(self, race, until):
        """s in which the winner of a race must answer."""
        if race.left:
            return EACH
        return PATIENCE if self._patience == PATIENCE else max(1, until - clock())

    def _granting(self, connection, message, patience, deadline):
        """Steps from the request to the granting answer; raises the refusal, _Useless, _Gone."""
        try:
            answer = yield from self._asking_first(connection, message, patience)
            while connection.session.state == WAITING:
                answer = yield from self._waiting(connection, answer, deadline)
            if answer.rc == OK:
                check_element(self.name, answer.element)
        except ProtocolError as error:
            raise _Useless(f"{connection.where} is no lock daemon: {error}")
        if answer.rc == OK:
            return answer
        late = answer.rc == BUSY and self._asked["Timeout"] > 0
        raise refusal(LATE if late else answer.rc, answer.reason, self._asked)

    def _asking_first(self, connection, message, patience):
        """Steps from the request to its first answer."""
        connection.send(message)
        answers = yield from connection.answering(clock() + patience)
        if not answers:
            raise _Useless(f"{connection.where} does not answer within {patience:.0f} s: "
                           "stopped, or no lock daemon")
        if self._context and self.settings["TlsCheckPeerId"]:
            connection.check_name(answers[0].peerid)
        return answers[-1]

    def _waiting(self, connection, answer, deadline):
        """Steps from one answer to the next; tells what it waits for."""
        where = "" if answer.position is None else f", place {answer.position}"
        why = "nobody has created it" if answer.rc == WAIT_RESOURCE else answer.reason
        text = f"waiting for {self.name}{where}" + (f", {why}" if why else "")
        self.diary.say(text)
        self._progress.note(text)
        try:
            answers = []
            while not answers and clock() < deadline:
                answers = yield from connection.answering(min(deadline, self._progress.date()))
                if not answers:
                    self._progress.tell()
        except _Gone as gone:
            raise _PlaceLost(str(gone), gone.where)
        if not answers:  # how long is as old as the answer
            raise refusal(LATE, without_duration(answer.reason or ""), self._asked)
        return answers[-1]

    def reclaiming(self):
        """Steps that try to reclaim a lost lock, to True when it is held again, False: refused.

        Whatever else fails is an obstacle, and may be none a moment later: a folder is gone, an
        interface down, no descriptor or process is to be had.  It must not end the watch over a
        command that runs.  A lock that was taken away by order is not asked for again.
        """
        if self._evicted:
            return False
        hurry = clock() + HURRY
        while True:
            try:
                return (yield from self._reclaiming_once())
            except Exception as error:
                if isinstance(error, LockError) and not isinstance(error, DaemonUnavailable):
                    self._lose(error.reason or TAKEN)
                    return False
                self.diary.say(f"reclaiming {self.name}: {error}")
            yield None, 0, AGAIN if clock() < hurry else AGAIN * 25

    def _reclaiming_once(self):
        """Steps to True when the lock is held again, False when others had it meanwhile."""
        connection, answer = yield from self._asking(
            0, recovering=True, reclaim=self.token, held=self.element)
        known = answer.daemon and answer.element == self.element
        if known or kind_of(self.name) not in WITH_ELEMENT:
            self.connection, self._starter.order = connection, None
            return True
        yield from connection.parting(unlock_message(self.name, True), GOODBYE)
        self._lose(TAKEN)
        return False


# --- Signals --------------------------------------------------------------------------------------
# A flom that ends before its command leaves it without its lock.  So from the fork on nothing may
# end flom, and nothing may slip: no signal is lost, none reaches the command twice.
#
# There are no handlers.  All signals that would end flom are blocked before the fork: they stay
# pending until the loop in Command.run takes them, one at a time, with sigtimedwait, which also
# tells who sent them.  What is passed on before the exec stays pending in the child until it has
# restored the dispositions and the mask that flom found, in that order, and then does to it what it
# would do to the command.  SIGCHLD says that the command ended or stopped, SIGIO that the daemon
# spoke or the pipe of the command is at its end, the time-out that something is due.
# * What the terminal sends (the kernel sent it: si_code) goes to the whole process group, so the
#   command has it already.  Only what was sent to flom is passed on.
# * TSTP stops flom as well: it raises it again and unblocks it for a moment.  A CONT that came
#   meanwhile must not be answered by stopping for good, hence the look at what is pending.
# * A command that stops itself stops flom, so that the shell that waits for flom has its terminal
#   again.  Without a terminal nobody waits so, and nobody would continue flom: it goes on.
# * For process 1 the kernel drops every signal that has no handler, and gives it all orphans.  So
#   there a child does the work, and process 1 reaps and passes on.
#
# Absent on purpose, see NOT_PASSED: what cannot be caught; what ends nobody; what the kernel sends
# for a fault of flom itself, which is not the command's, and which blocked would hide where flom
# failed (ABRT is passed on: it is how a watchdog ends a service, and abort() unblocks it first);
# PIPE and XFSZ, which flom's own writing may bring and Python ignores; TTIN and TTOU, which the
# terminal sends to the whole group, and which stop flom as they stop the command.


def signals_named(names):
    """The signals with these names (a text), as far as this system has them."""
    return {getattr(signal, f"SIG{name}") for name in names.split()
            if hasattr(signal, f"SIG{name}")}


NOT_PASSED = signals_named(
    "KILL STOP CHLD URG WINCH INFO SEGV BUS FPE ILL TRAP SYS EMT PIPE XFSZ TTIN TTOU")
TYPED, ENDING_HOLD = signals_named("INT QUIT TSTP HUP"), signals_named("TERM INT HUP QUIT")
SI_USER_BSD = 0x10001  # FreeBSD's SI_USER is positive, as if the kernel had sent the signal
TICK = 0.02  # s between two looks


def all_signals():
    """The numbers of all signals, less those that the C library keeps for itself."""
    found = set(range(1, 32))
    if hasattr(signal, "SIGRTMIN"):
        found.update(range(signal.SIGRTMIN, signal.SIGRTMAX + 1))
    return found


class Signals:
    """Hands signals out one at a time; `found`: dispositions of before, less Python's own."""

    def __init__(self, ignored):
        """The default action for CHLD, none for `ignored`."""
        self.found = {signal.SIGPIPE: signal.SIG_DFL, signal.SIGXFSZ: signal.SIG_DFL}
        for number in {signal.SIGIO, *ignored, signal.SIGCHLD}:
            if number in (signal.SIGKILL, signal.SIGSTOP):
                put(f"flom: warning: {signal_names()[number]} cannot be ignored", sys.stderr)
                continue
            self.found[number] = signal.getsignal(number) or signal.SIG_DFL
            if number in ignored:
                signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def block(self):
        """From now on they are handed out by `wait`; those that are ignored stay so."""
        self.passed = {number for number in all_signals() - NOT_PASSED
                       if signal.getsignal(number) != signal.SIG_IGN}
        self.numbers = self.passed | {signal.SIGCHLD, signal.SIGIO}
        leader = os.getsid(0) == os.getpid()  # a hang-up is told to the session's leader only
        self.typed = TYPED - {signal.SIGHUP} if leader else TYPED
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, self.numbers)
        signal.signal(signal.SIGIO, signal.SIG_DFL)

    def watch(self, descriptor):
        """SIGIO is to tell when something comes in on a descriptor."""
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)

    def wait(self, seconds):
        """(number, it is for the command too) of the next; (None, False) after `seconds`."""
        if not hasattr(signal, "sigtimedwait"):
            return self._wait_by_looking(seconds)
        info = (signal.sigwaitinfo(self.numbers) if seconds == FOREVER else
                signal.sigtimedwait(self.numbers, max(0, seconds)))
        if not info:
            return None, False
        number, by_kernel = info.si_signo, 0 < info.si_code != SI_USER_BSD
        there_already = by_kernel and number in self.typed | {signal.SIGIO}
        return number, number in self.passed and not there_already

    def _wait_by_looking(self, seconds):
        """For macOS, which also does not tell who sent a signal: in the foreground it was typed."""
        until = clock() + seconds
        while not signal.sigpending() & self.numbers:
            if clock() >= until:
                return None, False
            time.sleep(TICK)
        number = signal.sigwait(signal.sigpending() & self.numbers)
        there_already = number == signal.SIGIO
        with contextlib.suppress(OSError), open("/dev/tty") as terminal:
            foreground = os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
            there_already = there_already or number in self.typed and foreground
        return number, number in self.passed and not there_already

    def stop(self):
        """Stops this process by TSTP with its default action; returns when it is continued.

        At once, when that has happened already, or when nobody could continue it: the system lets
        TSTP stop no group whose parents are all in other sessions.
        """
        if signal.SIGCONT not in signal.sigpending():
            handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTSTP)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTSTP])
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTSTP])
            signal.signal(signal.SIGTSTP, handler)

    def stop_with(self, pid):
        """Stops this process, since the command `pid` has stopped and the terminal is theirs.

        An interactive shell gives the terminal to a process group of its own, and stops without
        returning it.  It is taken back, so that an outer flom also sees whose it is, and given
        again before CONT, which is pending then, reaches the command.
        """
        with contextlib.suppress(OSError), open("/dev/tty") as terminal:
            own, group = os.getpgrp(), os.getpgid(pid)
            foreground = os.tcgetpgrp(terminal.fileno())
            if foreground not in (own, group):
                return
            give_terminal(terminal, own)
            self.stop()
            if os.tcgetpgrp(terminal.fileno()) == own:
                give_terminal(terminal, foreground)
            if group != own and signal.SIGCONT not in signal.sigpending():
                os.kill(pid, signal.SIGCONT)  # nobody else would


def give_terminal(terminal, group):
    """Makes a process group that of the foreground, also from the background."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
    try:
        os.tcsetpgrp(terminal.fileno(), group)
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
    signals = Signals(())
    signals.block()
    while True:
        reap_until(child)  # first: it may have ended before its SIGCHLD was blocked
        number, passed = signals.wait(FOREVER)
        if passed:
            os.kill(child, number)


def reap_until(child):
    """Reaps all processes that have ended; when `child` has, ends this one with its status."""
    pid = True
    while pid:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            os._exit(exit_status(status))


def exit_status(status):
    """The exit status for what waitpid says: 128 + n for a process that signal n killed."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


# --- Loss (one lost lock) -------------------------------------------------------------------------
# The daemon vanishes while a command runs.  Mostly another one serves within a moment and gives the
# lock back; or somebody else is granted it; or nothing is heard for as long as the command takes.
# Which of them it will be nobody can know, and meanwhile the command runs as if it had the lock.
#
# So a loss is a list of stages, each with a date at which its action is due (STAGES; Loss.dates).
#
#   reclaim    at once, and again from step to step, until it says held or refused
#   tell       after NOTICE: that there is trouble.  What is mended sooner is not worth a mail
#   terminate  with --on-lock-loss term, when it is refused, or after the recovery window, since
#              from then on a new daemon may grant it to others: TERM
#   kill       KillAfter later: KILL, again and again, since who is killed may have just forked
#
# Held again: no stage is left, the loss is over.  Refused: it is said at once, and only terminate
# and kill may follow.  Nothing here waits: `go_on` is called between two signals.
#
# Absent on purpose: a number of tries after which flom gives up.  With `warn` the lock is worth
# having back at any time; with `term` the date decides.
NOTICE, KILL_AGAIN = 1, 1  # s: until a loss is told; between two KILLs


class Loss:
    """What is done about a lost lock; `kill(number)` sends all of the command a signal."""

    def __init__(self, lock, kill):
        self.lock, self._kill = lock, kill
        self.terminated = False  # by TERM to the command: status 95, whatever it says
        self._steps, self._told = lock.reclaiming(), ""
        now = clock()
        self.dates = {"reclaim": now, "tell": now + NOTICE}
        if lock.settings["OnLockLoss"] == "term":
            self.dates["terminate"] = now + RECOVERY_WINDOW / 1000

    @property
    def is_final(self):
        """Whether nobody tries to have the lock back any more."""
        return "reclaim" not in self.dates

    def next_date(self):
        """When `go_on` is to be called again (monotonic s)."""
        return min(self.dates.values(), default=FOREVER)

    def go_on(self):
        """Does what is due; True when the lock is held again."""
        for stage, action in self.STAGES.items():
            if clock() >= self.dates.get(stage, FOREVER):
                del self.dates[stage]
                action(self)
        return self.lock.connection is not None

    def hurry(self):
        """An attempt to have the lock back that is under way is due at once."""
        if not self.is_final:
            self.dates["reclaim"] = clock()

    def give_up(self):
        """Nobody tries any more to have the lock back, and it is said, once, that it is lost."""
        self._steps.close()
        self.dates.clear()
        self._tell_lost()

    def _reclaim(self):
        try:
            descriptor, _, seconds = next(self._steps)
        except StopIteration as end:
            self.dates.clear()
            return self._held() if end.value else self._refused()
        self.dates["reclaim"] = clock() + (seconds if descriptor is None else TICK)

    def _held(self):
        if self._told:
            self._tell(f"flom: the lock on {self.lock.name} is held again")

    def _refused(self):
        self._tell_lost()
        if self.lock.settings["OnLockLoss"] == "term":
            self.dates["terminate"] = clock()

    def _tell_trouble(self):
        self._tell(f"flom: the lock on {self.lock.name}: {self.lock.loss.reason}; it does not "
                   "answer; trying to get the lock back")

    def _terminate(self):
        self.give_up()
        self.terminated = True
        self._kill(signal.SIGTERM)
        self.dates["kill"] = clock() + self.lock.settings["KillAfter"] / 1000

    def _kill_again(self):
        self._kill(signal.SIGKILL)
        self.dates["kill"] = clock() + KILL_AGAIN

    def _tell_lost(self):
        """Says, once, that the lock is lost."""
        self._tell(f"flom: {self.lock.loss}")

    def _tell(self, text):
        if text != self._told:
            self._told = text
            put(text, sys.stderr)

    STAGES = {"reclaim": _reclaim, "tell": _tell_trouble, "terminate": _terminate,
              "kill": _kill_again}


# --- Command --------------------------------------------------------------------------------------
# The lock is to be held as long as the command works.  But what is the command?  The process that
# flom starts may be a shell whose pipeline goes on when TERM has killed it, and the next holder
# would start beside it.  On the other hand, a daemon that the command has left in the background
# on purpose must not keep the lock for ever.
#
# So the command inherits the write end of a pipe, of which flom keeps the read end: the pipe is at
# its end when nobody of the command is left, however many processes it has become.
# * A command that exits has done its work: unlock at once, whoever still carries the pipe.
# * One that a signal killed has been interrupted: flom stays, holds and reclaims, until the pipe is
#   at its end, or until one more TERM, INT, HUP or QUIT says that it is not to wait.
# * A loss with `term` ends every process that carries the pipe, which Linux tells in /proc; where
#   it does not, and of processes of other users, the command alone.  A nested flom carries it, too:
#   it passes TERM on to its own command, which therefore is left out.
# The command also inherits the connection: if flom is killed by KILL, the lock stays until all who
# carry it have ended.  The unlock and the half-close at the end count for every copy of it.
# A failing exec is told through another pipe, read only when the child has ended: flom never waits.
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

    def carriers(self):
        """{pid: pid of its parent} of those that carry it, as far as this system tells."""
        found = {}
        with contextlib.suppress(OSError):  # no /proc
            pipe = os.readlink(f"/proc/self/fd/{self.reading}")
            for name in filter(str.isdigit, os.listdir("/proc")):
                with contextlib.suppress(OSError):  # it has ended, or is another user's
                    if carries(name, pipe):
                        found[int(name)] = parent_of(name)
        return found


def carries(pid, pipe):
    """Whether a process has the write end of a pipe, by what /proc calls it."""
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            link = f"{folder}/{name}"
            if os.readlink(link) == pipe and os.lstat(link).st_mode & 0o200:
                return True
    return False


def parent_of(pid):
    """The pid of a process's parent, by /proc."""
    with open(f"/proc/{pid}/stat", errors="replace") as file:
        return int(file.read().rpartition(") ")[2].split()[1])


def is_flom(pid):
    """Whether a process is a flom."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm", errors="replace") as file:
        return file.read() == "flom\n"
    return False


def execute(argv, environment):
    """Becomes a program found in PATH, /bin/sh for a script without #! (unlike os.execvpe)."""
    failure = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    folders = search_path() if argv[0] else []
    if "/" in argv[0]:
        folders = [""]
    for path in [os.path.join(folder, argv[0]) for folder in folders]:
        try:
            os.execve(path, argv, environment)
        except OSError as error:
            if error.errno == errno.ENOEXEC:
                os.execve("/bin/sh", ["sh", path] + argv[1:], environment)
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                failure = error
    raise failure


def command_environment(lock):
    """The environment of the command: FLOM_* tell of this lock and of no outer one."""
    mode = MODES[lock.settings["LockMode"]] if kind_of(lock.name) in WITH_MODE else None
    ours = {"FLOM_RESOURCE": lock.name, "FLOM_MODE": mode, "FLOM_ELEMENT": lock.element,
            "FLOM_TOKEN": lock.token}
    if not lock.settings["SetEnv"]:
        ours = dict.fromkeys(ours)
    ours["FLOM_SESSION"] = ",".join(lock.chain)  # always, or a deadlock would not be found
    both = {**found_environment(), **ours}
    return {name: str(value) for name, value in both.items() if value is not None}


class Command:
    """A command under a lock; `status` is its exit status, 128 + n when signal n killed it."""

    def __init__(self, argv, lock, signals):
        self.argv, self.lock, self.signals = list(argv), lock, signals
        if lock.settings["ElementArgument"] and lock.element is not None:
            self.argv.append(lock.element)
        self.pid = self.status = None
        self.killed_by = None  # the number of the signal
        self.failure = None  # why it could not be run
        self._pipe = self._loss = None
        self._hold_until = 0
        self._sent_away = False  # by a signal that came after the command's end
        self._complained = False

    def run(self):
        """Runs it and returns flom's status; the lock is still held then, unless it was lost."""
        self._hold_until = clock() + self.lock.settings["MinHold"] / 1000
        self.signals.block()
        self._start()
        date = self._watch_lock()
        while not self._is_over():
            had_ended = self.status is not None
            number, passed = self.signals.wait(min(date, self._date()) - clock())
            stopped = self._reap()
            self._obey(number, passed, had_ended)
            if stopped:
                self.signals.stop_with(self.pid)
            elif number == signal.SIGTSTP:
                self.signals.stop()
            date = self._watch_lock()
        return self._flom_status()

    def _start(self):
        environment = command_environment(self.lock)
        try:
            self._report, writing = os.pipe()
            if self.lock.settings["InheritConnection"]:
                self._pipe = CommandPipe()
                self.signals.watch(self._pipe.reading)
            if self.lock.connection:
                self.signals.watch(self.lock.connection.sock)
            self.lock.resolving = resolving_apart
            self.pid = os.fork() or self._become(environment, writing)
            os.close(writing)
            if self._pipe:
                self._pipe.close_writing()
        except OSError as error:
            self.status, self.failure = NOT_RUN, f"no process for it: {error.strerror}"

    def _become(self, environment, writing):
        """In the child: the command, with signals, mask and descriptors as flom found them."""
        try:
            if self._pipe:
                with contextlib.suppress(OSError):  # EINVAL: descriptors end below 64
                    if self.lock.connection:
                        fcntl.fcntl(self.lock.connection.sock, fcntl.F_DUPFD, INHERITED)
                    fcntl.fcntl(self._pipe.writing, fcntl.F_DUPFD, INHERITED)
            for number, disposition in self.signals.found.items():
                signal.signal(number, disposition)
            signal.pthread_sigmask(signal.SIG_SETMASK, self.signals.mask)
            execute(self.argv, environment)
        except (OSError, ValueError) as error:
            os.write(writing, (getattr(error, "strerror", None) or str(error)).encode())
        finally:
            os._exit(NOT_RUN)

    def _reap(self):
        """Notes the command's end; True when it has stopped."""
        if self.status is not None:
            return False
        changed, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
        if not changed or os.WIFSTOPPED(status):
            return bool(changed)
        self.status = exit_status(status)
        if os.WIFSIGNALED(status):
            self.killed_by = os.WTERMSIG(status)
        else:
            self.failure = os.read(self._report, 999).decode()
        if self._loss:
            self._loss.hurry()  # the answer to a reclaim may have come
        return False

    def _obey(self, number, passed, had_ended):
        """Passes a signal on; when the command has ended, some send flom away.

        One that came together with the command's end was for both when the terminal sent it, or
        when it is what killed the command (a kill of the whole group).
        """
        if self.status is None and passed:
            self._kill(self.pid, number)
        elif number in ENDING_HOLD and self.status is not None:
            self._sent_away = had_ended or passed and number != self.killed_by

    def _kill(self, pid, number):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # it has ended
        except PermissionError as error:  # it runs as another user, by sudo or the like
            if not self._complained:
                put(f"flom: cannot signal {self.argv[0]!r}: {error.strerror}", sys.stderr)
            self._complained = True

    def end(self, number):
        """Sends a signal to all of the command, as far as it is to be held for."""
        if self.status is not None and not self._is_awaited():
            return
        carriers = self._pipe.carriers() if self._pipe else {}
        if self.status is None:
            carriers.setdefault(self.pid, os.getpid())
        for pid, parent in carriers.items():
            by_parent = number == signal.SIGTERM and parent in carriers and is_flom(parent)
            if not by_parent:
                self._kill(pid, number)

    def _is_awaited(self):
        """Whether the command has ended, but flom has to wait for what it left."""
        interrupted = self.killed_by or self._loss and self._loss.terminated
        return bool(self._pipe and interrupted) and not self._pipe.is_at_its_end()

    def _is_over(self):
        if self.status is None:
            return False
        if self.failure or self._sent_away:
            return True
        lost = self._loss and self._loss.is_final
        return not self._is_awaited() and (clock() >= self._hold_until or bool(lost))

    def _date(self):
        """When to look again although no signal has come."""
        if self.status is None:
            return FOREVER
        return clock() + LOOK if self._is_awaited() else self._hold_until

    def _watch_lock(self):
        """Looks whether the lock is held, goes on with a loss; returns when to look again."""
        if self.lock.settings["OnLockLoss"] == "ignore":
            return FOREVER
        if not self._loss and not self.lock.look():
            self._loss = Loss(self.lock, self.end)
        if self._loss and self._loss.go_on():
            self._loss = None
            self.signals.watch(self.lock.connection.sock)
            return clock()  # something may have come before the watch
        if self._loss:
            return self._loss.next_date()
        return clock() if self.lock.unread else FOREVER

    def _flom_status(self):
        """The command's status; 95 for a lost lock, but a loss hides no failure."""
        if self.failure:
            put(f"flom: cannot execute {self.argv[0]!r}: {self.failure}", sys.stderr)
            return NOT_RUN
        if not self._loss:
            return self.status
        self._loss.give_up()
        terminated = self._loss.terminated
        return self.status if self.status and not terminated else LockLost.status


# --- Status report --------------------------------------------------------------------------------
# The daemon answers a lock 8 for _STATUS with one large message, whose entries follow the resource
# that they belong to.  A FLoM daemon refuses the name.  JSON: numbers are numbers, but a token is
# a string, since many readers would lose its last digits.
COLUMNS = ("RESOURCE", "KIND", "STATE", "ID", "HOST", "PID", "USER", "COMMAND", "HOW", "FOR")
SHOWN_ID = 8  # digits of an id in the table
INTEGERS = ("pid", "since", "position", "quantity", "idle")


def fetch_report(settings):
    """Steps to the report of the daemon as {"daemon", "resources", "parked"}; starts nothing."""
    connection, data = yield from asking_for_report(settings)
    try:
        return arrange_report(data)
    except ProtocolError as error:
        raise DaemonUnavailable(f"{connection.where} gives no report: {error}")


def finding_outer_lock(settings, parents):
    """Steps to the holder's entry of a lock with one of the ids `parents` that is as good as the
    lock that is wanted; None when there is none, or nothing that reports.
    """
    try:
        report = yield from fetch_report(settings)
    except DaemonUnavailable:
        return None
    for resource in report["resources"]:
        for holder in resource["holders"]:
            name = holder.get("node") or resource.get("name")
            if holder.get("id") in parents and name == settings["Name"] and covers(
                    holder, settings):
                return holder
    return None


def covers(holder, settings):
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


def asking_for_report(settings):
    """Steps to (connection, the report as it came) of the first address that gives one."""
    race, wrong = (yield from starting_race(settings)), None
    while True:
        connection = yield from race.winning()
        if not connection:
            break
        try:
            patience = EACH if race.left else PATIENCE
            return connection, (yield from asking_one_for_report(connection, settings, patience))
        except _Useless as error:
            wrong = wrong or error
    if wrong:
        raise wrong
    race.check()
    raise DaemonUnavailable(f"no daemon at {place(settings)}")


def starting_race(settings):
    """Steps to a Race of all addresses, for one that holds no lock."""
    addresses = yield from locating(settings, Diary(settings))
    return Race(settings, addresses, tls_context(settings), Connection)


def asking_one_for_report(connection, settings, patience):
    """Steps to the report as it came, of a daemon that is whom it says it is; _Useless."""
    data = yield from connection.fetching(encode(
        LOCK, 8,
        element("session", ("peerid", machine_id()), ("client", f"flom.py/{VERSION}")),
        element("resource", ("name", encode_name(STATUS_RESOURCE)), ("mode", 0), ("wait", 0),
                ("create", 0), ("lifespan", 0))), patience)
    if not data:
        why = "it closed the connection" if data is not None else f"{patience} s have passed"
        raise _Useless(f"{connection.where} gives no report: {why}")
    try:
        sessions = [found for _, tag, found, _ in tags(data) if tag == "session"]
    except ProtocolError as error:
        raise _Useless(f"{connection.where} gives no report: {error}")
    if settings["TlsCertificate"] and settings["TlsCheckPeerId"]:
        connection.check_name(sessions[0].get("peerid") if sessions else None)
    return data


def make_readable(attributes):
    """Numbers, modes and names of an entry of the report, in place of texts; ProtocolError."""
    for name in INTEGERS:
        if re.fullmatch("-?[0-9]{1,18}", attributes.get(name, "")):
            attributes[name] = int(attributes[name])
    if attributes.get("mode", "") in list("012345"):
        attributes["mode"] = MODES[int(attributes["mode"])]
    for name in {"name", "node"} & attributes.keys():
        attributes[name] = decode_name(attributes[name])


def arrange_report(data):
    """The report as dictionaries from its message; raises ProtocolError, DaemonUnavailable."""
    report, refused = {"daemon": None, "resources": [], "parked": []}, None
    entries = {"resource": report["resources"], "parked": report["parked"]}
    for closing, tag, attributes, _ in tags(data):
        if closing:
            continue
        make_readable(attributes)
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


def report_table(report, width):
    """The table of who holds, who waits in which order, who is parked, what is idle.

    Its columns are aligned, its lines cut to `width` (None: not cut).
    """
    rows, now = [COLUMNS], int(time.time())
    parked = [dict(entry, holders=[], waiters=[entry]) for entry in report["parked"]]
    for resource in report["resources"] + parked:
        states = [("holds", entry) for entry in resource["holders"]] + [
            (f"waits {entry.get('position', 'for it')}", entry) for entry in resource["waiters"]]
        for state, entry in states or [("idle", {})]:
            how = [str(entry[key]) for key in ("mode", "quantity", "element") if key in entry]
            cells = (
                entry.get("node") or resource.get("name", ""), resource.get("kind", ""), state,
                entry.get("id", "")[:SHOWN_ID], entry.get("host") or entry.get("peer", ""),
                str(entry.get("pid", "")),
                entry.get("user", ""), entry.get("cmd", ""), " ".join(how),
                duration(entry, now))
            rows.append(tuple(map(visible, cells)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip()[:width] for row in rows]
    return "\n".join(lines if rows[1:] else ["nobody holds or awaits a lock"])


def duration(entry, now):
    """HH:MM:SS since the entry's lock was granted or asked for, empty where nobody tells."""
    if "since" not in entry:
        return ""
    return hhmmss(now - entry["since"])


def entries_of(report):
    """Yields (entry, name of what it holds or awaits, whether it holds) of all in the report."""
    for resource in report["resources"] + [{"holders": [], "waiters": report["parked"]}]:
        for role in ("holders", "waiters"):
            for entry in resource[role]:
                name = entry.get("node") or entry.get("name") or resource.get("name", "?")
                yield entry, name, role == "holders"


def find_entry(report, ident):
    """The id of the one entry whose id begins so, and who it is in one line; raises UsageError."""
    found = [(entry, name, holds) for entry, name, holds in entries_of(report)
             if entry.get("id", "").startswith(ident)]
    if len(found) != 1 or not ident:
        problem = f"the id of {len(found)} locks and waiters" if found else "nobody's id"
        raise UsageError(f"--evict: {ident!r} is {problem}; see --status")
    (entry, name, holds), = found
    who = entry.get("host") or entry.get("peer", "?")
    if "pid" in entry:
        who += f":{entry['pid']}"
    if entry.get("cmd"):
        who += f" {entry['cmd']!r}"
    if entry.get("user"):
        who += f" of {entry['user']}"
    did = "held" if holds else "waited for"
    line = f"{who} {did} {name} for {duration(entry, int(time.time()))}"
    return entry["id"], visible(line)


# --- Main -----------------------------------------------------------------------------------------
# One action a run; each is a row of ACTIONS and returns the exit status.
def show_status(options, settings):
    """--status, with --json or --watch."""
    terminal = bool(sys.stdout) and sys.stdout.isatty()
    while True:
        report = finish(fetch_report(settings))
        if "Name" in settings.values:
            name = settings["Name"]
            wanted = {name, "/".join(name.split("/")[:2])}  # of a node, its tree
            for part in ("resources", "parked"):
                report[part] = [entry for entry in report[part] if entry.get("name") in wanted]
        if options.watch and terminal:
            clear_screen()
            put(time.strftime("%H:%M:%S"), sys.stdout)
        width = os.get_terminal_size(sys.stdout.fileno()).columns if terminal else None
        if options.json:
            import json
        show(json.dumps(report) if options.json else report_table(report, width))
        if not options.watch:
            return 0
        time.sleep(1)


def clear_screen():
    """What --watch has shown goes, and what follows begins at the top."""
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), b"\033[H\033[J")


def show_signals(options, settings):
    """--signal-list, four in a line."""
    known = signal_names()
    show("".join(f"{number}) {known[number]}\t" + "\n" * (number % 4 == 0)
                 for number in range(1, 32) if number in known))


def check_configuration(options, settings):
    """--check-config: every problem of the files and options is a line, 99 if there is one."""
    problems, set_value, read_file = [], settings.set, settings.read_file

    def attempt(function, *arguments, **keywords):
        try:
            function(*arguments, **keywords)
        except UsageError as error:
            problems.append(str(error))
    settings.set = functools.partial(attempt, set_value)  # goes on where it would stop
    settings.read_file = functools.partial(attempt, read_file)
    attempt(option_settings, options, settings)
    attempt(check_rules, settings, "c")
    for check in (interface_index, tls_context):
        attempt(check, settings)
    for line in problems + settings.warnings:
        put(f"flom: {line}", sys.stderr)
    return WRONG if problems else 0


def give_order(settings, order, **about):
    """Sends a management message with the element `order`; returns (pid of a local daemon, the
    attributes of its answer, None for an end without one); raises DaemonUnavailable."""
    race, known = finish(starting_race(settings)), None
    checked = settings["TlsCertificate"] and settings["TlsCheckPeerId"]
    if checked or len(race.left) > 1:
        # an order may end without an answer, so a report shows first which daemon serves, and who
        # it is
        known = finish(asking_for_report(settings))[0]
        race.left = [known.address]
    connection = finish(race.winning())
    if not connection:
        race.check()
        raise DaemonUnavailable(f"no daemon at {place(settings)}")
    if checked:
        connection.check_name(known.name)
    pid = credentials(connection.sock)[0]
    session = element("session", ("peerid", machine_id()), *about.items())
    data = finish(connection.parting(encode(MANAGEMENT, 8, session, order), PATIENCE,
                                     answered=True))
    if data is None:
        raise DaemonUnavailable(f"{connection.where} does not answer within {PATIENCE} s")
    if not data:
        return pid, None
    try:
        answer = decode(data).get("answer", {})
    except ProtocolError as error:
        raise DaemonUnavailable(f"{connection.where} is no lock daemon: {error}")
    if answer.get("rc") != OK:
        reason = visible(answer.get("reason") or "it gives no reason")
        raise DaemonUnavailable(f"{connection.where} refuses: {reason}")
    return pid, answer


def stop_daemon(options, settings):
    """-x and -X: obeyed is EOF, refused is an answer with a reason."""
    put(f"Starting FLoM daemon {options.action} shutdown...", sys.stdout)
    immediate = options.action == "immediate"
    pid, _ = give_order(settings, element("shutdown", ("immediate", int(immediate))))
    until = clock() + 1
    while immediate and pid and clock() < until and is_running(pid):
        time.sleep(0.01)
    return 0


def evict(options, settings):
    """--evict: only a daemon that can report knows the order; a FLoM daemon would end on it."""
    ident, line = find_entry(finish(fetch_report(settings)), options.argument)
    _, answer = give_order(settings, element("evict", ("id", ident)),
                           user=plain(login(), 32), host=plain(os.uname().nodename, 64))
    if answer is None:
        raise DaemonUnavailable(f"{place(settings)}: the daemon ended before it answered")
    put(f"flom: {line}", sys.stderr)
    return 0


def is_running(pid):
    """Whether a process of this user runs; one that only waits to be buried does not."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(") ")[2][:1] != "Z"
    except OSError as error:
        return isinstance(error, FileNotFoundError)  # no /proc here


def tell_ignored(settings, diary):
    """Says, with -V or on a terminal, what is set and has no meaning for the kind of resource."""
    kind = kind_of(settings["Name"])
    for key, kinds, what in (("LockMode", WITH_MODE, "modes"),
                             ("Quantity", ("numeric",), "quantity")):
        if settings[key] == settings.defaults[key] or kind in kinds:
            continue
        line = f"{settings.origins[key]}: a {kind} resource has no {what}; ignored"
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
    lock = Lock(settings=settings, start_daemon=True, command=os.path.basename(options.command[0]))
    tell_ignored(settings, lock.diary)
    outer = None
    if settings["Deadlock"] == "reuse" and lock.chain[1:]:
        outer = finish(finding_outer_lock(settings, lock.chain[1:]))
    if outer:
        lock.reuse(outer)
    else:
        lock.acquire(started=options.started)
    if lock.element is not None:
        lock.diary.say(f"Locked element is '{lock.element}'", sys.stdout)
    command = Command(options.command, lock, signals)
    status = command.run()
    lock.release(rollback=command.status != 0)
    if command.killed_by == signal.SIGINT and status == command.status:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's loop is to end, too
        os.kill(os.getpid(), signal.SIGINT)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    return status


ACTIONS = {  # the exit status of each is what it returns, None for 0
    "run": run_command, "status": show_status, "evict": evict, "check": check_configuration,
    "signals": show_signals, "quiesce": stop_daemon, "immediate": stop_daemon,
    "id": lambda options, settings: show(machine_id())}


def main():
    """Runs flom and ends this process, without the ms that Python takes for an orderly end."""
    status = run() or 0
    os._exit(status)  # whatever has been printed is flushed


def prepare(options, settings):
    """Reads the settings, shows them with -V, and only then checks how they go together."""
    option_settings(options, settings)
    for warning in settings.warnings:
        put(f"flom: warning: {warning}", sys.stderr)
    if settings["Verbose"]:
        put("\n".join(settings.lines()), sys.stdout)
    check_rules(settings, "c")
    interface_index(settings)


def run():
    """Runs flom with the arguments of this process; returns its exit status, None for 0."""
    started, settings = clock(), Settings()
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
        if not (settings["Quiet"] and isinstance(error, (Busy, Timeout, CannotWait))):
            put(f"{error.prefix}{error}", sys.stderr)
        return settings["BusyStatus"] if isinstance(error, (Busy, Timeout)) else error.status
    except (UsageError, ImportError) as error:  # a small Python lacks json or ssl
        put(f"flom: {error}", sys.stderr)
        return WRONG


if __name__ == "__main__":
    main()
