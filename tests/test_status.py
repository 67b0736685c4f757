"""What flom tells: --status, -V while it waits, what the daemon publishes, --check-config."""
import fcntl
import json
import os
import re
import socket
import struct
import sys
import termios
import time

import flom
import flomd
import pytest
from commands import driven
from fakes import LOCK, PEER, FlomClient, FlomDaemon, Scripted, b64, message
from world import (PYTHON, ROOT, can_connect, endpoint, free_port, pass_time, read,
                   wait_until)

HOST = os.uname().nodename
HEAD = ["RESOURCE", "KIND", "STATE", "ID", "HOST", "PID", "USER", "COMMAND", "HOW", "FOR"]
ENTRY = {"id", "peer", "host", "pid", "user", "cmd", "since"}


@pytest.fixture(params=["unix", "TCP"])
def address(box, request):
    """The options that name a running daemon of the box."""
    tcp = ("-a", "127.0.0.1", "-p", str(free_port()))
    address = ("-s", box.socket) if request.param == "unix" else tcp
    box.daemon(address=address)
    return address


def table(box, *options, address=None):
    """The rows of --status, each a list of cells, cut where the heads of the columns begin."""
    done = box.run("--status", *options, address=address or box.address)
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    if lines[0].startswith("memory: "):
        del lines[0]
    assert re.fullmatch(r"\d+ resources?, \d+ holders?( \(\d+ absent\))?, \d+ waiting",
                        lines.pop())
    starts = [found.start() for found in re.finditer(r"\S+", lines[0])]
    assert lines[0].split() == HEAD
    ends = starts[1:] + [None]
    return [[line[start:end].strip() for start, end in zip(starts, ends)] for line in lines[1:]]


def report(box, *options, address=None):
    """The object of --json."""
    done = box.run("--status", "--json", *options, address=address or box.address)
    assert (done.status, done.err, done.out.count("\n")) == (0, "", 1)
    return json.loads(done.out)


def end(gates, processes):
    for gate in gates:
        gate.open()
    assert [process.end().status for process in processes] == [0] * len(processes)


@pytest.fixture
def busy(box, address):
    """A daemon with a holder and two waiters, some units, a parked request; (address, pids)."""
    holder, gate = box.hold("a", "-r", "R1", address=address)
    first = box.waiter("-r", "R1", "-l", "PR", "--", "true", address=address)
    second = box.waiter("-r", "R1", "--", "echo", "x", address=address)
    units, other = box.hold("b", "-r", "pool[5]", "-q", "2", address=address)
    parked = box.waiter("-e", "no", "-r", "R9", "--", "true", address=address)
    yield address, [process.pid for process in (holder, first, second, units, parked)]
    third, last = box.hold("c", "-r", "R9", address=address)
    end([gate, other, last], [holder, first, second, units, parked, third])


# The table

def test_the_table_and_json(box, busy):
    address, (holder, first, second, units, parked) = busy
    rows = table(box, address=address)
    short = [row[:3] + row[4:6] + row[7:9] for row in rows]
    assert short == [
        ["R1", "simple", "holds", HOST, str(holder), "sh", "EX"],
        ["R1", "simple", "waits 1", HOST, str(first), "true", "PR"],
        ["R1", "simple", "waits 2", HOST, str(second), "echo", "EX"],
        ["pool[5]", "numeric", "holds", HOST, str(units), "sh", "2"],
        ["R9", "", "waits for it", HOST, str(parked), "true", "EX"]]
    assert all(row[6] and re.fullmatch("00:00:[0-9]{2}", row[9]) for row in rows)
    assert all(re.fullmatch("[0-9a-f]{8}", row[3]) for row in rows)
    assert table(box, "-r", "pool[5]", address=address)[0][0] == "pool[5]"
    assert len(table(box, "-r", "R1", address=address)) == 3
    status, out, err = box.run("--status", "-r", "other", address=address)
    assert (status, err) == (1, "") and out.endswith("nobody holds or awaits a lock\n")
    awaited = box.run("--status", "-r", "R9", address=address)
    assert awaited.status == 1
    assert "waits for it" in awaited.out
    named = ("-c", box.write("named.conf", "[Resource]\nName=other\n"))
    assert len(table(box, *named, address=address)) == len(rows)  # that name is for commands
    check_report(report(box, address=address), busy)
    assert [resource["name"] for resource in
            report(box, "-r", "R1", address=address)["resources"]] == ["R1"]


def check_report(found, busy):
    """Exactly the fields that flom(1) documents."""
    address, pids = busy
    assert set(found) == {"daemon", "resources", "parked"}
    assert set(found["daemon"]) == {"version", "since", "policy", "listening", "memory"}
    assert found["daemon"]["policy"] == "fair" and found["daemon"]["since"] <= time.time()
    where = f"unix:{address[1]}" if address[0] == "-s" else f"tcp:127.0.0.1:{address[3]}"
    assert found["daemon"]["listening"].split() == [where]
    one, pool = found["resources"]
    for resource in (one, pool):
        assert set(resource) == {"name", "kind", "idle", "holders", "waiters"}
        assert resource["idle"] == -1
    holder, (first, second), units = one["holders"][0], one["waiters"], pool["holders"][0]
    parked, = found["parked"]
    assert set(holder) == ENTRY | {"mode", "token"} and int(holder["token"]) > 2 ** 32
    assert set(first) == set(second) == ENTRY | {"mode", "position"}
    assert set(units) == ENTRY | {"quantity", "token"} and units["quantity"] == 2
    assert set(parked) >= ENTRY | {"name"} and parked["name"] == "R9"
    assert [first["position"], second["position"]] == [1, 2] and first["mode"] == "PR"
    entries = [holder, first, second, units, parked]
    assert [entry["pid"] for entry in entries] == pids
    for entry in entries:
        assert re.fullmatch("[0-9a-f]{16}", entry["id"]) and entry["host"] == HOST
        assert isinstance(entry["since"], int)
        assert (entry["peer"] == "local") == (address[0] == "-s")


def test_an_absent_holder_and_the_memory():
    """The daemon that was before has granted it, and nobody has reclaimed it."""
    data = message(LOCK, 16, '<daemon version="1" memory="failing" window="1500"/>'
                   f'<resource name="{b64("R1")}" kind="simple"><holder id="a" absent="1"/>'
                   '<holder id="b"/></resource>')
    report = flom.arrange_report(data)
    assert report["daemon"]["memory"] == "failing" and report["daemon"]["window"] == 1500
    assert [holder.get("absent") for holder in report["resources"][0]["holders"]] == [1, None]
    head, _, *rows = flom.report_table(report, None).splitlines()
    assert head == "memory: failing, recovery window: 1500 ms"
    assert rows.pop() == "1 resource, 2 holders (1 absent), 0 waiting"
    assert [row.split() for row in rows] == [["R1", "simple", "absent", "a"],
                                             ["R1", "simple", "holds", "b"]]


def test_a_memory_and_nobody_in_it():
    for window in ("", ' window="0"'):
        data = message(LOCK, 16, f'<daemon version="1" memory="file"{window}/>')
        table = flom.report_table(flom.arrange_report(data), None)
        assert table == "memory: file\nnobody holds or awaits a lock"


def test_the_head_tells_of_a_quorum():
    data = message(LOCK, 16, '<daemon version="1" memory="etcd" window="0" role="leader" '
                   'leader="h2" term="00c0ffee" members="3" latency="4" left="8700"/>')
    report = flom.arrange_report(data)
    assert [report["daemon"][name] for name in ("members", "latency", "left")] == [3, 4, 8700]
    head, _ = flom.report_table(report, None).splitlines()
    assert head == ("memory: etcd, leader: h2, term: 00c0ffee, members of etcd: 3, "
                    "latency: 4 ms, left: 8700 ms")
    report["daemon"]["trouble"] = "nobody\x1bcompacts"
    assert flom.report_table(report, None).splitlines()[1] == "trouble: nobody\\x1bcompacts"


def a_report(*resources, parked=0):
    """A report of resources (name, kind, number of holders, of waiters)."""
    text = '<daemon version="1" memory="file"/>'
    for name, kind, holders, waiters in resources:
        text += f'<resource name="{b64(name)}" kind="{kind}">' + '<holder id="aa"/>' * holders
        text += "".join(f'<waiter id="bb" position="{n + 1}"/>' for n in range(waiters))
        text += "</resource>"
    text += f'<parked name="{b64("R9")}" id="cc"/>' * parked
    return flom.arrange_report(message(LOCK, 16, text))


def test_the_counts():
    report = a_report(("R1", "simple", 1, 2), ("R2", "simple", 0, 0), ("n[5]", "numeric", 3, 0),
                      parked=1)
    *_, counts = flom.report_table(report, None).splitlines()
    assert counts == "3 resources, 4 holders, 3 waiting"


def test_a_screen_shows_who_waits_before_who_holds():
    """As many rows as fit, and how many do not."""
    report = a_report(("idle", "simple", 0, 0), ("R1", "simple", 1, 2), ("R2", "simple", 1, 0),
                      parked=1)
    everything = flom.report_table(report, None).splitlines()

    def states(height, width=None):
        head, columns, *rows, counts = flom.report_table(report, width, height).splitlines()
        assert (head, counts) == (everything[0], everything[-1])
        return [row.split()[-1] if "more" in row else " ".join(row.split()[:3]) for row in rows]
    rows = ["R1 simple waits", "R1 simple waits", "R9 waits for", "R1 simple holds",
            "R2 simple holds", "idle simple idle"]
    assert states(9) == states(99) == rows
    for height in range(6, 9):
        *_, more, counts = flom.report_table(report, None, height).splitlines()
        assert states(height)[:-1] == rows[:height - 4]
        assert more == f"... and {6 - (height - 4)} more"
    assert states(1)[:-1] == rows[:1]  # one in any case
    assert max(map(len, flom.report_table(report, 12, 7).splitlines())) == 12


def test_for_how_long_is_seen_on_a_narrow_terminal():
    """Names are cut before what stands behind them is, and a + says so."""
    entry = {"id": "0123456789abcdef", "host": "db1", "pid": 99999, "user": "root",
             "cmd": "sleep", "mode": "EX", "since": int(time.time())}
    long = dict(entry, host="db2.department.example.org", cmd="x" * 50)
    report = {"daemon": {"memory": "file"}, "parked": [], "resources": [
        {"name": "/srv/a", "kind": "hierarchical", "holders": [entry, long], "waiters": []}]}
    wide, narrow = [flom.report_table(report, width).splitlines()[1:4] for width in (None, 90)]
    assert long["cmd"] in wide[2] and long["host"] in wide[2] and "  root  " in wide[1]
    assert max(map(len, narrow)) <= 90 and narrow[0].endswith(" FOR")
    assert all(re.search(" EX  00:00:0[0-9]$", line) for line in narrow[1:])
    assert " db2.depart" in narrow[2] and "+ 99999" in narrow[2] and "+" not in narrow[1]
    assert flom.report_table(report, 20).splitlines()[2] == "/srv/a   hierarchica"


def test_watch_fills_the_screen(box):
    box.daemon()
    held = [box.hold(f"g{number}", "-r", f"R{number}") for number in range(6)]
    waiter = box.waiter("-r", "R5", "--", "true")
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 9, 200, 0, 0))
    watcher = box.flom("--status", "--watch", stdout=terminal)
    shown = ""
    while "waiting" not in shown:
        shown += os.read(screen, 9999).decode()
    watcher.terminate()
    watcher.end()
    os.close(terminal)
    os.close(screen)
    _, memory, head, *rows, more, counts = shown.splitlines()
    assert counts == "6 resources, 6 holders, 1 waiting" and len(shown.splitlines()) == 8
    assert [row.split()[:3] for row in rows] == [
        ["R5", "simple", "waits"], ["R0", "simple", "holds"], ["R1", "simple", "holds"]]
    assert more == "... and 4 more" and head.split() == HEAD
    for holder, gate in held:
        gate.open()
        assert holder.end().status == 0
    assert waiter.end().status == 0


def test_one_name_with_two_sizes(box):
    """Table and log say that these are two resources, also when one of them is asked for."""
    gates, holders, daemon = [], [], box.daemon()
    for name in ("licence[5]", "licence[6]", "pool[3]"):
        holder, gate = box.hold(f"g{len(gates)}", "-r", name)
        gates, holders = gates + [gate], holders + [holder]
    line = "2 resources, not one: licence[5], licence[6]"
    for options in ((), ("-r", "licence[6]")):
        assert box.run("--status", *options).out.splitlines()[-2] == line
    assert "not one" not in box.run("--status", "-r", "pool[3]").out
    assert daemon.err.count("licence[6] is another resource than licence[5]\n") == 1
    end(gates, holders)
    many = a_report(*[(f"n[{size}]", "numeric", 1, 0) for size in range(1, 6)])
    assert flom.notes_on_sizes(many, "") == ["5 resources, not one: n[1], n[2], n[3]"]


def test_the_kinds_that_have_elements_and_nodes(box):
    gates, holders = [], []
    for name in ("red.green", "_s_a[1]", "/a/b"):
        holder, gate = box.hold(f"g{len(gates)}", "-r", name)
        gates, holders = gates + [gate], holders + [holder]
    assert [[row[0], row[1], row[8]] for row in table(box)] == [
        ["red.green", "set", "red"], ["_s_a[1]", "sequence", "1"], ["/a/b", "hierarchical", "EX"]]
    found = {resource["kind"]: resource for resource in report(box)["resources"]}
    assert found["set"]["holders"][0]["element"] == "red"
    tree = found["hierarchical"]
    assert (tree["name"], tree["holders"][0]["node"]) == ("/a", "/a/b")
    for name in ("/a/b", "/a"):
        assert [row[0] for row in table(box, "-r", name)] == ["/a/b"]
    end(gates, holders)


def test_a_terminal_that_does_not_know_its_width(box):
    """As a serial line: nothing is cut."""
    holder, gate = box.hold("a", "-r", "R1")
    screen, terminal = os.openpty()
    assert os.get_terminal_size(terminal).columns == 0
    assert box.run("--status", stdout=terminal).status == 0
    os.close(terminal)
    *_, head, row, counts = os.read(screen, 9999).decode().splitlines()
    os.close(screen)
    assert counts == "1 resource, 1 holder, 0 waiting"
    assert head.split() == HEAD and row.split()[:3] == ["R1", "simple", "holds"]
    end([gate], [holder])


def test_an_idle_resource_and_floms_clients(box):
    """FLoM's clients tell nothing of themselves but their address."""
    port = free_port()
    box.daemon(address=("-a", "127.0.0.1", "-p", str(port)))
    tcp = ("-a", "127.0.0.1", "-p", str(port))
    with FlomClient(socket.AF_INET, ("127.0.0.1", port)) as client:
        assert client.lock("R1") is True
        source = "%s:%d" % client.socket.getsockname()
        row, = table(box, address=tcp)
        assert row[:3] + row[4:6] == ["R1", "simple", "holds", source, ""]
        client.release()
    wait_until(lambda: [row[2] for row in table(box, address=tcp)] == ["idle"])
    resource, = report(box, address=tcp)["resources"]
    assert 0 <= resource["idle"] <= 2000 and resource["holders"] == resource["waiters"] == []


def test_it_starts_nothing(box):
    done = box.run("--status")
    assert done == (99, "", f"flom: no daemon at {box.socket}\n") and box.daemons() == []


def test_floms_daemon_cannot_report(box):
    with FlomDaemon(unix=box.socket) as daemon:
        for options in ((), ("--json",), ("-r", "R1"), ("--watch",)):
            done = box.run("--status", *options)
            assert done == (99, "", "flom: this daemon cannot report: it is not flomd.py\n")
    assert daemon.deaths == []


@pytest.mark.parametrize("option, said", [
    ("--status", "gives no report: unreadable"), ("-X", "is no lock daemon: unreadable")])
def test_what_speaks_without_end(box, option, said):
    """It is not heard for ever: neither is memory filled, nor is there a time to wait for."""
    def serve(connection):
        while True:
            connection.sendall(b"<" + b" " * 65536)

    with Scripted(box.socket, serve) as endless:
        done = driven(box, "flom.LONGEST_REPORT, flom.PATIENCE = 1000000, 60", option).end(50)
        wait_until(lambda: endless.failure)
    assert done.status == 99 and done.err.startswith(f"flom: {box.socket} {said}")


def test_what_others_chose_does_not_reach_the_terminal(box):
    """A name of a resource, a host, a command: shown in one line, and not obeyed."""
    state = box.path("state")
    os.mkdir(state)
    box.daemon("-m", state)
    session = ('client="flom.py/1.0" host="h&#27;[2J" pid="1&#10;2" user="&#155;2J" '
               'cmd="c&#8238;&#7;"')
    name = "/a\x1b]0;owned\x07/\u00e9"
    with FlomClient(*endpoint(box.address)) as stranger:
        stranger.socket.sendall(message(LOCK, 8, (
            f'<session peerid="{PEER}" {session}/><resource name="{b64(name)}" mode="5" '
            'wait="0" create="1" lifespan="0"/>')))
        assert stranger.answer(16)[1] == 0
        shown = box.run("--status").out
        waiter = box.waiter("-r", name, "-o", "20000", "--", "true")
        path = os.path.join(state, "status", "lockers", "1", "holders", "1", "peer_name")
        wait_until(lambda: os.path.exists(path))
        shown += read(path) + read(os.path.join(state, "status/lockers/1/resource_name"))
    assert waiter.end().status == 0
    shown += waiter.err
    assert "\\x1b]0;owned\\x07/\u00e9" in shown
    assert all(line.isprintable() for line in shown.splitlines())


def test_a_line_of_the_log_is_one_line_whatever_it_tells(tmp_path):
    log = flomd.Log(str(tmp_path / "log"), "info")
    log.open()
    log.info("\x1b[2J \u00e9 \u202e\n2000-01-01 flomd[1] info: forged")
    log.bug("Traceback\n  File\nValueError: \x1b\n")
    log.limited("x" * 10 ** 6)
    log._target.file.close()
    first, *bug, last = read(log.target).splitlines()
    assert first.endswith("info: \\x1b[2J \u00e9 \\u202e\\n2000-01-01 flomd[1] info: forged")
    assert bug[0].endswith("error: a bug in flomd, which goes on:")
    assert bug[1:] == ["    Traceback", "      File", "    ValueError: \\x1b"]
    assert len(last) < 4096 and not log._lost


@pytest.mark.parametrize("error, reason", [
    (OSError("no such interface"), "no such interface"), (OSError(2, "none", "f"), "none"),
    (UnicodeError("no name"), "no name")])
def test_why_a_daemon_cannot_serve(error, reason):
    with pytest.raises(flomd.CannotServe) as caught:
        with flomd.serving("cannot join"):
            raise error
    assert str(caught.value) == f"cannot join: {reason}"


def test_what_lasts_is_told_seldom(tmp_path, monkeypatch):
    """What was left out among the lines that peers cause is told the next time."""
    log = flomd.Log(str(tmp_path / "log"), "info")
    log.open()
    for _ in range(flomd.LIMITED):
        log.limited("a crowd")
    log.seldom("a rival")
    assert "a rival" not in read(log.target)
    monkeypatch.setattr(flomd, "LIMITED", 10 ** 6)
    for _ in range(5):
        log.seldom("a rival")
        log.seldom("another")
    for number in range(2 * flomd.MOST_SELDOM):
        log.seldom(f"{number}")
    assert len(log._seldom) == flomd.MOST_SELDOM
    monkeypatch.setattr(flomd, "SELDOM", 0)
    for _ in range(2):
        log.seldom("over")
    log._target.file.close()
    said = read(log.target)
    assert said.count("a rival\n") == said.count("another\n") == 1
    assert said.count("over\n") == 2


def test_what_an_init_system_is_told_is_one_line(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as init:
        init.bind(str(tmp_path / "init"))
        init.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "init"))
        flomd.notify("STATUS=h\nMAINPID=1 \ud800" + "x" * 10 ** 6)
        told = init.recv(10 ** 5)
    assert told.startswith(b"STATUS=h\\nMAINPID=1 \\ud800x") and len(told) < 4096


@pytest.mark.parametrize("text", ["\u00b2", "--5", "9" * 5000])
def test_a_report_with_odd_numbers(text):
    report = flom.arrange_report(message(LOCK, 16, (
        f'<daemon version="1.0"/><resource name="{b64("R1")}" idle="{text}">'
        f'<holder id="1" mode="{text}" since="{text}" pid="{text}"/></resource>')))
    assert report["resources"][0]["idle"] == report["resources"][0]["holders"][0]["mode"] == text
    assert text in flom.report_table(report, None)


def test_watch(box):
    """The table again and again; it ends with the daemon, or by TERM."""
    daemon = box.daemon()
    watcher = box.flom("--status", "--watch", "--json")
    wait_until(lambda: watcher.out.count("\n") == 1)
    holder, gate = box.hold("a", "-r", "R1")
    wait_until(lambda: '"R1"' in watcher.out)
    states = [json.loads(line) for line in watcher.out.splitlines()]
    assert states[0]["resources"] == [] and states[-1]["resources"][0]["name"] == "R1"
    watcher.terminate()
    assert watcher.end().status == -15
    end([gate], [holder])
    assert daemon.poll() is None


@pytest.mark.parametrize("options", [("--status",), ("--status", "--watch"), ("-V", "-X")])
def test_nobody_reads(box, options):
    """`flom --status | true`: no traceback, and --watch ends with its reader."""
    box.daemon()
    reader, writer = os.pipe()
    os.close(reader)
    reporter = box.flom(*options, stdout=writer)
    os.close(writer)
    assert reporter.end().status in (0, -13) and reporter.err == ""


def test_ten_thousand_resources(box, address):
    """Locks without number by clients of a few lines; the report comes in about a second."""
    family, name = ((socket.AF_UNIX, address[1]) if address[0] == "-s"
                    else (socket.AF_INET, ("127.0.0.1", int(address[3]))))

    def ask(number):
        return message(LOCK, 8, f'<session peerid="{PEER}"/><resource name="{b64("n%d" % number)}" '
                                'mode="5" wait="0" create="1" lifespan="60000"/>')
    count, window = 10000, 100
    for first in range(0, count, window):
        clients = [socket.socket(family, socket.SOCK_STREAM) for _ in range(window)]
        for number, client in enumerate(clients, first):
            client.connect(name)
            client.sendall(ask(number))
        for client in clients:
            assert b'rc="0"' in client.recv(4096)
            client.close()
    begin = time.monotonic()
    done = box.run("--status", address=address)
    seconds = time.monotonic() - begin
    assert done.out.count(" idle\n") == count
    assert seconds < 4


# Waiting that explains itself

def test_the_place_and_the_holder(box):
    """Again whenever the place changes."""
    holder, gate = box.hold("a", "-r", "R1")
    first_gate = box.gate("b")
    first = box.waiter("-r", "R1", "--", *first_gate.command)
    second = box.waiter("-r", "R1", "--", "true")

    def line(place, process):
        return rf"waiting for R1, place {place}, held by {HOST}:{process.pid} 'sh' for 00:00:\d\d"
    assert re.fullmatch(line(1, holder) + "\n", first.err)
    assert re.fullmatch(line(2, holder) + "\n", second.err)
    gate.open()
    wait_until(lambda: second.err.count("\n") == 2)
    assert re.fullmatch(line(2, holder) + "\n" + line(1, first) + "\n", second.err)
    first_gate.open()
    assert [process.end().status for process in (holder, first, second)] == [0, 0, 0]


SOON = "flom.Progress.FIRST, flom.Progress.PAUSE = 0.2, 0.5"


def test_a_line_now_and_then_for_who_waits_at_a_terminal(box):
    """Not at once, again when the place or the holder changes, and not more often than it may."""
    assert (flom.Progress.FIRST, flom.Progress.PAUSE) == (2, 5)
    holder, gate = box.hold("a", "-r", "R1")
    other_gate = box.gate("b")
    other = box.waiter("-r", "R1", "--", *other_gate.command)
    began = time.monotonic()
    told = driven(box, SOON, "--progress", "yes", "-r", "R1", "--", "true")
    wait_until(lambda: told.err.count("\n") == 1)
    first = time.monotonic() - began
    silent = box.flom("-r", "R1", "--", "true")
    gate.open()
    wait_until(lambda: told.err.count("\n") == 2)
    assert first > 0.2 and time.monotonic() - began > 0.7
    other_gate.open()
    assert [run.end().status for run in (holder, other, told, silent)] == [0] * 4
    lines = [rf"flom: waiting for R1, place {place}, held by {HOST}:{run.pid} 'sh' for [0-9:]+\n"
             for place, run in ((2, holder), (1, other))]
    assert re.fullmatch("".join(lines), told.err) and silent.err == ""


def test_a_flom_daemon_tells_no_place(box):
    box.address = ("-s", box.socket, "-d", "0")
    with FlomDaemon(unix=box.socket):
        holder, gate = box.hold("a", "-r", "R1")
        told = driven(box, "flom.Progress.FIRST, flom.Progress.PAUSE = 0.05, 0.05",
                      "--progress", "yes", "-r", "R1", "--", "true")
        wait_until(lambda: told.err)
        pass_time(0.3)
        gate.open()
        assert [run.end().status for run in (holder, told)] == [0, 0]
    assert told.err == "flom: waiting for R1\n"


@pytest.mark.parametrize("terminal, verbose, progress, expected", [
    (True, False, None, True), (True, True, None, False), (False, False, None, False),
    (False, True, True, True), (True, False, False, False)])
def test_who_wants_to_be_told(monkeypatch, terminal, verbose, progress, expected):
    settings = flom.Settings()
    settings.values.update(Verbose=verbose, **({} if progress is None else {"Progress": progress}))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert flom.wants_progress(settings) is expected


def test_what_was_told_is_brought_up_to_date():
    text = "held by a:1 'x' for 00:59:58 and 1 more"
    assert flom.longer_by(2.5, text) == "held by a:1 'x' for 01:00:00 and 1 more"
    assert flom.without_duration(text) == "held by a:1 'x' and 1 more"


def test_another_holder_is_told_though_the_place_is_the_same(box):
    one, one_gate = box.hold("a", "-r", "R1", "-l", "PR")
    two, two_gate = box.hold("b", "-r", "R1", "-l", "PR")
    waiter = box.waiter("-r", "R1", "--", "true")
    assert re.search(rf"place 1, held by {HOST}:{one.pid} 'sh' for [0-9:]+ and 1 more\n$",
                     waiter.err)
    end([one_gate], [one])
    wait_until(lambda: waiter.err.count("\n") == 2)
    assert re.fullmatch(rf"waiting for R1, place 1, held by {HOST}:{two.pid} 'sh' for [0-9:]+",
                        waiter.err.splitlines()[1])
    end([two_gate], [two, waiter])


@pytest.mark.parametrize("name, other, mode", [("/a/b", "/a/x", "EX"), ("R1", "R1", "NL")])
def test_the_holder_that_is_told_is_one_that_is_in_the_way(box, name, other, mode):
    """Not one of another branch, nor one in a mode that does not matter."""
    idle, idle_gate = box.hold("idle", "-r", other, "-l", mode)
    holder, gate = box.hold("held", "-r", name)
    waiter = box.waiter("-r", name, "--", "true")
    assert re.fullmatch(rf"waiting for {name}, place 1, held by {HOST}:{holder.pid} 'sh' for "
                        r"[0-9:]+\n", waiter.err)
    end([idle_gate, gate], [idle, holder, waiter])


def test_what_nobody_has_created(box):
    box.daemon()
    waiter = box.waiter("-e", "no", "-r", "R1", "--", "true")
    assert waiter.err == "waiting for R1, nobody has created it\n"
    assert box.run("-r", "R1", "--", "true").status == 0
    assert waiter.end().status == 0


def test_busy_and_timeout_name_the_holder(box):
    holder, gate = box.hold("a", "-r", "R1")
    held = f"held by {HOST}:{holder.pid} 'sh'"
    busy, expired = ("Resource already locked, the lock cannot be obtained",
                     "The lock was not obtained because timeout (1000 milliseconds) expired")
    for more in ([], ["-V"]):
        done = box.run(*more, "-r", "R1", "-o", "0", "--", "true")
        assert re.fullmatch(rf"{busy} \({held} for 00:00:0\d\)\n", done.err)
    done = box.run("-V", "-r", "R1", "-o", "1000", "--", "true")
    assert done.status == 98
    first, last = done.err.splitlines()
    assert first.startswith(f"waiting for R1, place 1, {held} for ")
    assert last == f"{expired}: {held}"  # for how long was told before, and is old by now
    end([gate], [holder])


# For monitoring

def tree(folder):
    """{path: content} of the files below a folder, links followed."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            found[os.path.relpath(path, folder)] = read(path)
    return found


def written_by(box, writer):
    """The options with which a child of the daemon writes, or its loop: where it has a thread."""
    return {"child": [], "loop": ["--state-dir", box.folder]}[writer]


@pytest.mark.parametrize("writer", ["child", "loop"])
def test_the_tree(box, writer):
    state = box.path("state")
    os.mkdir(state)
    daemon = box.daemon("-m", state, *written_by(box, writer))
    status = os.path.join(state, "status")
    holder, gate = box.hold("a", "-r", "R1", "-l", "PW")
    units, other = box.hold("b", "-r", "pool[5]", "-q", "2")
    number, last = box.hold("c", "-r", "_s_a[1]")
    waiter = box.waiter("-r", "R1", "--", "true")
    parked = box.waiter("-e", "no", "-r", "R9", "--", "true")

    def published():
        try:
            found = tree(status)
        except OSError:  # it was replaced meanwhile
            return None
        return found if "incubator/1/resource_name" in found else None
    found = wait_until(published)
    assert all(text.count("\n") == 1 and text.endswith("\n") for text in found.values())
    names = {path: text.strip() for path, text in found.items() if "peer_name" not in path}
    assert names == {
        "lockers/1/resource_name": "R1", "lockers/1/resource_type": "simple",
        "lockers/1/holders/1/lock_mode": "PW", "lockers/1/waitings/1/lock_mode": "EX",
        "lockers/2/resource_name": "pool[5]", "lockers/2/resource_type": "numeric",
        "lockers/2/holders/1/quantity": "2",
        "lockers/3/resource_name": "_s_a[1]", "lockers/3/resource_type": "sequence",
        "lockers/3/holders/1/sequence_value": "1",
        "incubator/1/resource_name": "R9", "incubator/1/resource_type": "simple"}
    peers = {path for path in found if path.endswith("/peer_name")}
    assert peers == {f"{path}/peer_name" for path in (
        "lockers/1/holders/1", "lockers/1/waitings/1", "lockers/2/holders/1",
        "lockers/3/holders/1", "incubator/1")}
    assert str(holder.pid) in found["lockers/1/holders/1/peer_name"]
    creator = box.run("-r", "R9", "--", "true")
    assert creator.status == 0
    end([gate, other, last], [holder, units, number, waiter, parked])
    daemon.terminate()
    assert daemon.end().status == 0
    wait_until(lambda: os.listdir(state) == [])


SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{([a-z]+)="([^"\\\n]*)"\})? (\S+)')


def metrics(text):
    """{(name, label value): number} of a text for Prometheus, whose format it checks."""
    assert text.endswith("\n")
    found, types, helped, family = {}, {}, set(), None
    for line in text.splitlines():
        if line.startswith("# "):
            _, word, family, rest = line.split(" ", 3)
            assert word in ("HELP", "TYPE") and rest
            if word == "HELP":
                assert family not in helped
                helped.add(family)
            else:
                assert family not in types and rest in ("counter", "gauge", "histogram")
                types[family] = rest
            continue
        name, label, value, number = SAMPLE.fullmatch(line).groups()
        assert re.sub("_(bucket|sum|count)$", "", name) == family or name == family
        assert label in (None, "le") or types[family] != "histogram"
        assert (types[family] == "counter") == name.endswith("_total")
        assert (name, value) not in found
        found[name, value] = float(number)
    assert helped == set(types)
    for family in (name for name, kind in types.items() if kind == "histogram"):
        buckets = [(float(value), number) for (name, value), number in found.items()
                   if name == f"{family}_bucket"]
        assert buckets == sorted(buckets) and buckets[-1][0] == float("inf")
        assert [number for _, number in buckets] == sorted(number for _, number in buckets)
        assert buckets[-1][1] == found[f"{family}_count", None]
    return found


def test_a_label_is_whatever_it_is():
    assert flomd.label_value('a"b\\c\nd') == 'a\\"b\\\\c?d'


METRICS = """\
import os, sys
sys.path.insert(0, {root!r})
import flomd
flomd.METRICS_PAUSE = 0.1
sys.exit(flomd.main())
"""


@pytest.mark.parametrize("writer", ["child", "loop"])
def test_the_metrics(box, writer):
    path = box.path("flomd.prom")
    daemon = box.start(*PYTHON, "-c", METRICS.format(root=ROOT), "-f", "--no-files", *box.address,
                       "--metrics", path, *written_by(box, writer))
    box.foreground.append(daemon)
    wait_until(lambda: os.path.exists(path) and os.path.exists(box.socket))
    holder, gate = box.hold("a", "-r", "R1")
    units, other = box.hold("b", "-r", "pool[5]", "-q", "2")
    waiter = box.waiter("-r", "R1", "--", "true")
    assert box.run("-r", "R1", "-o", "0", "--", "true").status == 98
    assert box.run("-r", "pool[5]", "-q", "6", "--", "true").status == 99

    def published():
        with open(path) as file:
            found = metrics(file.read())
        return found if found["flomd_refusals_total", "impossible"] else None
    found = wait_until(published)
    expected = {("flomd_resources", "simple"): 1, ("flomd_resources", "numeric"): 1,
                ("flomd_resources", "set"): 0, ("flomd_holders", None): 2,
                ("flomd_waiters", None): 1, ("flomd_grants_total", None): 2,
                ("flomd_refusals_total", "busy"): 1, ("flomd_refusals_total", "impossible"): 1,
                ("flomd_refusals_total", "deadlock"): 0, ("flomd_lost_sessions_total", None): 0,
                ("flomd_wait_seconds_count", None): 2}
    assert {key: found[key] for key in expected} == expected
    assert found["flomd_sessions", None] >= 3 and found["flomd_epoch", None] > 10 ** 8
    assert read(path).count("# HELP ") == 11 and os.stat(path).st_mode & 0o777 == 0o644
    box.kill(holder.pid)  # the command keeps the lock, until it has ended
    gate.open()
    assert waiter.end().status == 0
    wait_until(lambda: metrics(read(path))["flomd_lost_sessions_total", None] == 1)
    end([other], [units])
    daemon.terminate()
    assert daemon.end().status == 0
    assert [name for name in os.listdir(box.folder) if name.startswith("flomd.prom")] == []


SLOW = """\
import os, sys
sys.path.insert(0, {root!r})
import flomd
flomd.TREE_PAUSE = 0.01
shown = flomd.tree
def tree(table):
    open({gate!r}).close()  # waits until somebody opens it for writing
    return shown(table)
flomd.tree = tree
sys.exit(flomd.main())
"""


def test_a_slow_tree_is_written_once_and_whole(box):
    """One process at a time writes, however often something changes; the next one begins when it
    has ended, and at the end of the daemon nothing is left, not even of one that is at work."""
    state, gate = box.path("state"), box.path("gate")
    os.mkdir(state)
    os.mkfifo(gate)
    daemon = box.start(*PYTHON, "-c", SLOW.format(root=ROOT, gate=gate), "-f", "--no-files",
                       *box.address, "-m", state)
    box.foreground.append(daemon)
    wait_until(lambda: can_connect(box.address) and os.listdir(state))
    begun, first = os.listdir(state), children(daemon.pid)
    holder, hold = box.hold("a", "-r", "R1")
    for number in range(5):
        assert box.run("-r", f"n{number}", "-i", "60000", "--", "true").status == 0
        assert os.listdir(state) == begun and children(daemon.pid) == first
    release(gate)
    wait_until(lambda: children(daemon.pid) not in ([], first))
    assert tree(os.path.join(state, "status")) == {}  # as it was when the first one began
    release(gate)
    found = wait_until(lambda: tree(os.path.join(state, "status")))
    assert "lockers/1/holders/1/peer_name" in found
    for number in range(1, 7):
        assert f"lockers/{number}/resource_type" in found
    assert box.run("-r", "last", "--", "true").status == 0
    working, = wait_until(lambda: children(daemon.pid))
    end([hold], [holder])
    assert children(daemon.pid) == [working]
    daemon.terminate()
    assert daemon.end().status == 0
    assert os.listdir(state) == [] and not os.path.exists(f"/proc/{working}")


def children(pid):
    """The pids of the processes that the process has started and not waited for."""
    return [int(child) for child in read(f"/proc/{pid}/task/{pid}/children").split()]


def release(gate):
    """Lets the one who waits at the fifo go on, as soon as it waits there."""
    with open(gate, "w"):
        pass


def test_two_daemons_with_one_folder_remove_their_own_trees(box):
    folder = box.path("m")
    os.mkdir(folder)

    def owners():
        return {int(name.split("-")[1]) for name in os.listdir(folder) if name != "status"}
    first = box.daemon("-m", folder)
    wait_until(lambda: owners() == {first.pid})
    second = box.daemon("-m", folder, address=("-s", box.path("t")))
    wait_until(lambda: f"-{second.pid}-" in os.readlink(os.path.join(folder, "status")))
    assert owners() == {first.pid, second.pid}
    first.terminate()
    assert first.end().status == 0
    assert owners() == {second.pid} and os.path.isdir(os.path.join(folder, "status"))
    second.terminate()
    assert second.end().status == 0 and os.listdir(folder) == []


@pytest.mark.parametrize("writer", ["child", "loop"])
def test_a_tree_that_cannot_be_written(box, writer):
    """One line says so, and the daemon serves on."""
    state = box.path("state")
    os.mkdir(state)
    daemon = box.daemon("-m", state, *written_by(box, writer))
    wait_until(lambda: os.path.exists(os.path.join(state, "status")))
    os.rename(state, box.path("away"))
    assert box.run("-r", "R1", "--", "true").status == 0
    wait_until(lambda: "cannot write" in daemon.err)
    assert re.search(rf"cannot write {state}.*: No such file or directory", daemon.err)
    assert box.run("-r", "R1", "--", "true").status == 0


# The configuration

def test_check_config(box):
    """Every problem of every file, with file, line and key; then the status."""
    assert box.run("--check-config", address=()) == (0, "ok\n", "")
    user = box.write(".flom", "[Resource]\nTimeout=soon\nColour=red\nQuantity=2\nnonsense\n")
    more = box.write("more", "# a comment\n[Daemon]\nSocketName=/x\nUnicastAddress=db1\n"
                             "[Network]\nDiscoveryTTL=999\n[TLS]\nTlsCertificate=/none\n")
    done = box.run("--check-config", "-c", more, "-l", "XX", address=())
    assert (done.status, done.out) == (99, f"read {user}\nread {more}\n")
    lines = done.err.splitlines()
    assert all(line.startswith("flom: ") for line in lines)
    for text in (f"{user}:2: [Resource]/Timeout: 'soon' is not ", f"{user}:5: 'nonsense' is not ",
                 f"{more}:6: [Network]/DiscoveryTTL: '999' is not ", "-l: 'XX' is not ",
                 f"{user}:3: [Resource]/Colour: unknown key", f"{more}:3: [Daemon]/SocketName"):
        assert [line for line in lines if text in line], (text, lines)
    box.write(".flom", "[Resource]\nColour=red\n")
    done = box.run("--check-config", address=())
    assert (done.status, done.out) == (0, f"read {user}\nok\n")
    assert f"{user}:2: [Resource]/Colour: unknown key" in done.err
    done = box.run("--check-config", "-c", box.path("none"), address=())
    assert done.status == 99 and f"{box.path('none')}: No such file" in done.err
    assert box.daemons() == []


def test_check_config_tells_what_somebody_may_have_meant_otherwise(box):
    """That is no problem: it is allowed."""
    user = box.write(".flom", "[Resource]\nName=backup.sh\nQuantity=2\n")
    done = box.run("--check-config", address=())
    assert (done.status, done.out) == (0, f"read {user}\nok\n")
    assert done.err.splitlines() == [
        "flom: 'backup.sh' is a set of 2 slots (backup, sh); for a file name write '/backup.sh'",
        f"flom: {user}:3: [Resource]/Quantity: a set resource has no quantity; ignored"]


def test_check_config_of_the_daemon(box):
    """Its own rules: it may serve a socket and an address, but no group beside a socket."""
    def check(*options):
        return box.flomd("--check-config", *options).end()

    assert check("-s", "/x", "-a", "127.0.0.1") == (0, "ok\n", "")
    conf = box.write("conf", "[Daemon]\nPolicy=best\nnonsense\n[TLS]\nTlsPrivateKey=/none\n")
    done = check("-c", conf, "-s", "/x", "-A", "239.255.0.1", "-n", "nosuch0")
    assert (done.status, done.out) == (99, f"read {conf}\n")
    assert done.err.splitlines() == [
        f"flomd: {conf}:2: [Daemon]/Policy: 'best' is not fair or first-fit",
        f"flomd: {conf}:3: 'nonsense' is not [Group] or Key=value",
        "flomd: -s: not together with -A: a daemon is local or in the network",
        f"flomd: {conf}:5: [TLS]/TlsPrivateKey: TLS wants all of --tls-certificate, "
        "--tls-private-key and --tls-ca-certificate",
        "flomd: -n: 'nosuch0' is not a network interface of this host"]
    assert box.daemons() == []


@pytest.mark.parametrize("reason, told", [
    ("the daemon cannot store it now", " (the daemon cannot store it now)"),
    ("held by nobody", ""), ("", ""), (None, "")])
def test_who_does_not_wait_is_told_what_keeps_him_from_the_lock(reason, told):
    error = flom.refusal(flom.BUSY, reason, flom.Settings())
    assert str(error) == f"Resource already locked, the lock cannot be obtained{told}"
