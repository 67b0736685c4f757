"""The journal: what a file says after it was cut off or damaged, how it is written, and when a
successor believes it."""
import functools
import os
import random
import sys
import threading
import time

import flomd
import pytest
from world import FLOMD, SEED, read, run_until, wait_until



class Lines:
    """A log that keeps its lines."""

    def __init__(self):
        self.lines = []

    def error(self, text):
        self.lines.append(text)

    def info(self, text):
        self.lines.append(text)

    def limited(self, text, level):
        self.lines.append(text)

    def bug(self, trace):
        self.lines.append(trace)


RECORDS = [("d", 'epoch="7" covers="34359738367"'), ("h/00000000000000a1", 'name="R" user="jö"')]
BATCHES = [
    RECORDS,
    [("h/00000000000000a2", 'name="S" cmd="-"'), ("r/X3NfbnVt", 'next="2"')],
    [("h/00000000000000a1", None)],
    [("h/00000000000000a1", 'name="R"'), ("h/00000000000000a2", None), ("v/X3NfbnVt/1", 'n="0"')],
]


def states_of(batches):
    """What was known before and after each batch."""
    known = {}
    states = [dict(known)]
    for batch in batches:
        for key, text in batch:
            if text is None:
                known.pop(key, None)
            else:
                known[key] = text
        states.append(dict(known))
    return states


def file_of(batches):
    return flomd.JOURNAL_HEAD + b"".join(map(flomd.encode_batch, batches))


def known_from(data):
    """What a file says, None when it says nothing."""
    try:
        return flomd.read_journal(data)[0]
    except flomd.Damage:
        return None


# The text

def test_a_file_says_what_was_written():
    data = file_of(BATCHES)
    assert flomd.read_journal(data) == (states_of(BATCHES)[-1], len(data))
    assert flomd.read_journal(flomd.JOURNAL_HEAD) == ({}, len(flomd.JOURNAL_HEAD))
    assert flomd.encode_batch([]) == b""


def test_a_file_that_is_cut_off_says_what_was_known_before():
    data, states = file_of(BATCHES), states_of(BATCHES)
    ends = [len(file_of(BATCHES[:number])) for number in range(len(BATCHES) + 1)]
    for length in range(len(data) + 1):
        known = known_from(data[:length])
        if length < ends[0]:
            assert known is None
            continue
        whole = sum(end <= length for end in ends) - 1
        assert known == states[whole]
        assert flomd.read_journal(data[:length])[1] == ends[whole]


def test_a_file_with_a_changed_bit_says_all_or_nothing():
    data = file_of(BATCHES)
    for place in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            assert known_from(bytes(changed)) is None, (place, bit)


def test_a_file_with_a_changed_byte_says_all_or_nothing():
    data = file_of(BATCHES)
    for place in range(len(data)):
        for byte in b"0123456789abcdef+- \n\0\xff":
            changed = data[:place] + bytes([byte]) + data[place + 1:]
            if changed != data:
                assert known_from(changed) is None, (place, byte)


def test_lines_that_are_lost_twice_or_in_another_order_are_damage():
    parts = [flomd.encode_batch(batch) for batch in BATCHES]
    for number, part in enumerate(parts):
        body = part.index(b"\n") + 1
        for cut in range(1, len(part) - body):  # bytes in the middle of the file are missing
            if number + 1 < len(parts):
                rest = parts[:number] + [part[:-cut]] + parts[number + 1:]
                assert known_from(flomd.JOURNAL_HEAD + b"".join(rest)) is None
    assert known_from(file_of(BATCHES) + b"\0" * 4096) is None
    assert known_from(b"\0" * 4096) is None


def test_the_layout_of_another_version_is_told():
    data = file_of(BATCHES).replace(b"journal 1\n", b"journal 12\n", 1)
    with pytest.raises(flomd.OtherLayout) as error:
        flomd.read_journal(data)
    assert error.value.args == (12,)


@pytest.mark.in_time
@pytest.mark.parametrize("size", [1, 1000])
def test_a_large_file_is_read_soon(size):
    text = ('name="X3Jlc291cmNl" mode="5" id="0123456789abcdef" proof="0123456789abcdef" '
            'host="db1.example.org" user="joe" cmd="vacuum" since="1790000000"')
    records = [(f"h/{number:016x}", text) for number in range(100000)]
    data = file_of([records[at:at + size] for at in range(0, len(records), size)])
    began = time.process_time()
    assert len(flomd.read_journal(data)[0]) == 100000
    assert time.process_time() - began < 1


# The store.  A table of its own, that is changed at random; disks that fail at any write.

class Now:
    """A loop for tests: its turns are taken by hand."""

    def __init__(self):
        self.acts, self.later, self.watched = [], {}, {}

    def after(self, seconds, act):
        if seconds:
            self.later[act] = seconds
        else:
            self.acts.append(act)

    def cancel(self, act):
        self.later.pop(act, None)
        self.acts = [other for other in self.acts if other != act]

    def watch(self, source, handler, close=None):
        self.watched[source] = handler

    def turn(self):
        for act in list(self.acts):
            if act in self.acts:
                self.acts.remove(act)
                act()

    def rest(self):
        """Turns until there is nothing to do, and lets RETRY pass if something is planned."""
        while self.acts:
            self.turn()

    def wait(self):
        later, self.later = self.later, {}
        for act in later:
            act()
        self.rest()


class Disk:
    """The calls of os that the journal makes; those of them that fail, by their number; and a
    check after each, as the daemon might be killed there."""

    def __init__(self, monkeypatch, short):
        self.calls, self.failing, self.short = 0, set(), short
        self.check = flomd.ignore
        for name in ("pwrite", "rename", "ftruncate", "open"):
            monkeypatch.setattr(flomd.os, name, self._counted(name, getattr(os, name)))
        monkeypatch.setattr(flomd.os, "fsync", self._counted("fsync", flomd.ignore))
        monkeypatch.setattr(flomd, "_sync", self._counted("sync", flomd.ignore))

    def _counted(self, name, real):
        def call(*arguments):
            if name == "open" and not str(arguments[0]).endswith(".new"):
                return real(*arguments)
            self.calls += 1
            if self.calls in self.failing:
                if name == "pwrite" and self.short:
                    real(arguments[0], arguments[1][:len(arguments[1]) // 2], arguments[2])
                    self.check()
                raise OSError(28, "No space left on device")
            result = real(*arguments)
            self.check()
            return result
        return call


class Table:
    """Records that change at random, as a daemon's would; and what of it was told."""

    def __init__(self, journal, loop, seed):
        self.journal, self.loop, self.chance = journal, loop, random.Random(seed)
        self.records = {"d": "n=0"}
        self.states = [dict(self.records)]  # after each batch
        self.told = 0  # the index of the last state that counts
        self.changes = {}

    def start(self):
        self.journal.start(self.loop, self.everything, self.settle)

    def everything(self):
        for key in sorted(self.records):
            if key in self.records:
                yield key, self.records[key]

    def change(self):
        key = f"h/{self.chance.randrange(40)}"
        text = None
        if key in self.records and self.chance.random() < 0.5:
            del self.records[key]
        else:
            text = self.records[key] = f"n={self.chance.randrange(10 ** 6)}"
        self.changes[key] = text

    def settle(self):
        if not self.changes:
            return
        changes, self.changes = self.changes, {}
        self.states.append(dict(self.records))
        number = len(self.states) - 1

        def done():
            self.told = max(self.told, number)
        self.journal.commit(list(changes.items()), done)

    def check(self, path):
        """What a successor would read is a state at which it was told, or a later one."""
        known = flomd.read_journal(read(path).encode())[0]
        assert known in self.states[self.told:]


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "s.journal")


def journal_at(path, synced=False, on_change=lambda journal: None):
    return flomd.Journal(path, synced, on_change, lambda: True)


def begun(path, synced=False):
    """(journal, loop, table) of a journal that was made."""
    journal, loop = journal_at(path, synced), Now()
    table = Table(journal, loop, SEED)
    journal.begin(list(table.records.items()))
    return journal, loop, table


def test_what_is_committed_is_in_the_file(path):
    journal, loop, table = begun(path)
    table.start()
    told = []
    assert journal.commit([("h/1", "a=1"), ("h/2", "a=2")], lambda: told.append(1))
    assert told == [1] and journal_at(path).load() == {"d": "n=0", "h/1": "a=1", "h/2": "a=2"}
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_a_batch_that_was_cut_off_is_cut_away(path):
    begun(path)[0].commit([("h/1", "a=1")], flomd.ignore)
    with open(path, "ab") as file:
        file.write(flomd.encode_batch([("h/2", "a=2")])[:-3])
    journal = journal_at(path)
    assert journal.load() == {"d": "n=0", "h/1": "a=1"}
    journal.begin([("d", "n=1")])
    assert journal_at(path).load() == {"d": "n=1", "h/1": "a=1"}


@pytest.mark.parametrize("change", ["link", "second link", "mode"])
def test_only_a_file_of_ones_own_is_read(path, change):
    begun(path)
    if change == "link":
        os.rename(path, path + "2")
        os.symlink(path + "2", path)
    elif change == "second link":
        os.link(path, path + "2")
    else:
        os.chmod(path, 0o622)
    with pytest.raises((OSError, flomd.Damage)):
        journal_at(path).load()


def test_a_journal_is_rewritten_when_most_of_it_is_dead(path, monkeypatch):
    monkeypatch.setattr(flomd, "LEAST_REWRITTEN", 10000)
    monkeypatch.setattr(flomd, "PORTION", 7)
    journal, loop, table = begun(path)
    table.start()
    largest = 0
    for _ in range(3000):
        for _ in range(table.chance.randrange(3)):
            table.change()
        table.settle()
        loop.turn()
        largest = max(largest, os.path.getsize(path))
    assert 10000 <= largest < 12000
    assert journal.rewritten > 3
    turns = 0
    while os.path.exists(f"{path}.new"):  # the last rewrite comes to its end
        turns += 1
        assert turns < 1000
        loop.turn()
    assert journal_at(path).load() == table.records
    assert os.listdir(os.path.dirname(path)) == ["s.journal"]


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("synced", [False, True])
def test_whatever_fails_a_successor_knows_what_was_told(path, monkeypatch, synced, short):
    """Each call fails in its turn, once, or with those that follow; and after each the daemon
    might be killed."""
    monkeypatch.setattr(flomd, "PORTION", 3)
    monkeypatch.setattr(flomd, "LEAST_REWRITTEN", 800)
    monkeypatch.setattr(flomd, "Thread", lambda loop: flomd.AtOnce())
    disk = Disk(monkeypatch, short)
    for first in range(1, 100, 8):
        for number in (1, 7):
            if os.path.exists(path):
                os.unlink(path)
            disk.failing, disk.check = set(), flomd.ignore
            journal, loop, table = begun(path, synced)
            disk.calls, disk.failing = 0, set(range(first, first + number))
            disk.check = functools.partial(table.check, path)
            table.start()
            for _ in range(40):
                table.change()
                table.change()
                if table.chance.random() < 0.3:
                    loop.turn()
                table.settle()
                table.check(path)
                if journal.failing and table.chance.random() < 0.1:
                    loop.wait()
            loop.rest()
            for _ in range(number):
                loop.wait()
            assert not journal.failing
            assert journal_at(path).load() == table.records
            assert table.told == len(table.states) - 1 or not synced


def test_a_sync_that_failed_is_not_tried_again_on_the_same_file(path, monkeypatch):
    monkeypatch.setattr(flomd, "Thread", lambda loop: flomd.AtOnce())
    journal, loop, table = begun(path, True)
    table.start()
    loop.rest()
    files = []

    def fail(file):
        files.append(file)
        raise OSError(5, "Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr(flomd.JournalFile, "sync", fail)
        told = []
        assert journal.commit([("h/1", "a=1")], lambda: told.append(1))
        loop.rest()
        loop.wait()
        assert journal.failing == "Input/output error" and not told
    assert len(set(files)) == len(files) > 1
    loop.wait()
    assert not journal.failing and told == [1]


def test_after_a_write_that_failed_a_new_file_is_tried_at_once(path, monkeypatch):
    journal, loop, table = begun(path)
    table.start()
    loop.rest()
    before, real = journal.rewritten, flomd.JournalFile.append

    def fail_once(*_):
        monkeypatch.setattr(flomd.JournalFile, "append", real)
        fail()
    monkeypatch.setattr(flomd.JournalFile, "append", fail_once)
    assert not journal.commit([HOLDER], flomd.ignore) and journal.failing
    loop.rest()
    assert journal.rewritten == before + 1 and not journal.failing


def test_a_file_that_was_removed_is_made_anew(path):
    journal, loop, table = begun(path)
    table.start()
    loop.rest()
    os.unlink(path)
    journal.look()
    loop.rest()
    assert not journal.failing
    assert journal_at(path).load() == table.records


def test_a_file_that_is_anothers_is_left_alone(path):
    journal, loop, table = begun(path)
    table.start()
    loop.rest()
    journal.drop("another daemon has it")
    before = read(path)
    assert not journal.commit([("h/1", "a=1")], flomd.ignore)
    assert journal.failing and read(path) == before


# Journal and state: what a successor believes.

def locked(path, durable=False):
    state = flomd.State(Lines(), path + ".lock", durable=durable)
    assert state.lock()
    return state


def disk_at(path, network=False, durable=False, kept=True):
    """(the Disk of a daemon that has read what is there, Known)."""
    state = locked(path, durable)
    journal = f"{path}.journal" if kept else None
    disk = flomd.Disk(state.log, state, journal, network)
    return disk, disk.recall()


def successor(path, window=0, records=(), **options):
    """(Disk, Known) of a daemon that has begun, has stored these records and was killed."""
    disk, known = disk_at(path, **options)
    disk.unknown_until = time.monotonic() + window if window else 0
    disk.begin(lambda: (pair for pair in known.records.items() if pair[0] != "d"))
    if records:
        disk.commit(list(records), flomd.ignore)
    disk.die()
    return disk, known


@pytest.fixture(autouse=True)
def mortal(monkeypatch):
    """Disks die as their processes do: what they have open is closed."""
    def die(disk):
        disk._journal.forget()
        os.close(disk.state.number)
    monkeypatch.setattr(flomd.Disk, "die", die, raising=False)


HOLDER = ("h/00000000000000a1", 'name="Ug=="')
NO_HOLDER = ("h/00000000000000a1", None)


@pytest.fixture
def place(tmp_path):
    return str(tmp_path / "s")


def marked(place):
    return read(place + ".lock").split()[3] == "1"


def test_the_first_daemon_knows_nothing_and_needs_no_window(place):
    disk, known = successor(place)
    assert (known.records, known.whole, known.unclean) == ({}, False, False)
    assert not disk.log.lines and not marked(place)
    assert read(place + ".lock").endswith("\njournal\n")


def test_a_successor_knows_who_held(place):
    first, _ = successor(place, records=[HOLDER])
    disk, known = successor(place)
    assert known.whole and not known.unclean and not known.rebooted
    assert known.records[HOLDER[0]] == HOLDER[1]
    assert disk.epoch > first.epoch and disk.same_processes
    assert not disk.log.lines


def test_with_the_mark_what_is_known_is_not_all(place):
    disk, _ = disk_at(place)
    disk.begin()
    disk.commit([HOLDER], flomd.ignore)
    assert disk.mark(True)
    disk.die()
    _, known = successor(place, window=60)
    assert known.unclean and not known.whole and HOLDER[0] in known.records
    assert marked(place)  # and the next one is told, too
    assert successor(place)[1].unclean


def damage(place, how):
    path = place + ".journal"
    data = read(path).encode()
    if how == "removed":
        os.unlink(path)
    elif how == "bit":
        with open(path, "r+b") as file:
            file.seek(len(data) // 2)
            byte = file.read(1)[0]
            file.seek(len(data) // 2)
            file.write(bytes([byte ^ 1]))
    elif how == "link":
        os.rename(path, path + "2")
        os.symlink(path + "2", path)
    elif how == "empty":
        os.truncate(path, 0)
    else:
        os.truncate(path, len(flomd.JOURNAL_HEAD))


@pytest.mark.parametrize("how", ["removed", "bit", "link", "empty", "without records"])
def test_a_journal_that_cannot_be_believed_is_missed(place, how):
    """Though the mark is clear: one line, nothing is known, and somebody may hold a lock; which
    is on disk before a new journal counts."""
    first, _ = successor(place, records=[HOLDER])
    damage(place, how)
    disk, known = successor(place, window=60)
    assert (known.records, known.whole, known.unclean) == ({}, False, True)
    line, = disk.log.lines
    assert f"{place}.journal does not count: " in line
    assert disk.epoch > first.epoch
    assert marked(place)
    assert successor(place, window=60)[1].unclean


def test_a_journal_for_which_there_is_no_memory_does_not_count(place, monkeypatch):
    def load(journal):
        raise MemoryError
    successor(place, records=[HOLDER])
    monkeypatch.setattr(flomd.Journal, "load", load)
    disk, known = successor(place, window=60)
    assert known.unclean and "larger than the memory" in disk.log.lines[0]


def test_a_journal_older_than_the_state_does_not_count(place):
    """A daemon of a version that keeps none was in between."""
    first, _ = successor(place, records=[HOLDER])
    with open(place + ".lock", "r+") as file:
        file.write(flomd.RECORD.format(epoch=first.epoch + 5, boot=flomd.boot_id(), held=0, pid=1))
    disk, known = successor(place, window=60)
    assert (known.records, known.unclean) == ({}, True)
    assert "older than the state" in disk.log.lines[0]


def test_a_state_that_was_lost_costs_nothing(place):
    """Its epoch and its holders are in the journal."""
    first, _ = successor(place, records=[HOLDER])
    os.unlink(place + ".lock")
    disk, known = successor(place)
    assert known.whole and HOLDER[0] in known.records
    assert disk.epoch > first.epoch


@pytest.mark.parametrize("network", [False, True])
def test_where_all_is_lost_nobody_knows_of_a_boot(place, network):
    """Clients on this host have not survived one that there was not."""
    successor(place, network=network)
    os.unlink(place + ".lock")
    damage(place, "bit")
    _, known = successor(place, window=60, network=network)
    assert known.unclean and known.rebooted is network


def test_a_journal_that_was_begun_counts_though_the_state_was_not_written(place, monkeypatch):
    """The epoch goes into the journal first."""
    successor(place, records=[HOLDER])
    with monkeypatch.context() as patch:
        patch.setattr(flomd.State, "write", fail)
        disk, _ = successor(place)
        assert disk.kept
    disk, known = successor(place)
    assert known.whole and HOLDER[0] in known.records


@pytest.mark.parametrize("layout", [0, 2])
def test_the_journal_of_another_version_is_put_aside(place, layout):
    successor(place, records=[HOLDER])
    old = read(place + ".journal").replace("journal 1\n", f"journal {layout}\n", 1)
    with open(place + ".journal", "w") as file:
        file.write(old)
    disk, known = successor(place, window=60)
    assert known.records == {} and known.unclean
    assert len(disk.log.lines) == 1
    assert read(f"{place}.journal.{layout}") == old


@pytest.mark.parametrize("network", [False, True])
@pytest.mark.parametrize("durable", [False, True])
def test_after_another_boot(place, monkeypatch, network, durable):
    """Without sync a network address needs the window, too, also when that daemon is killed."""
    options = {"network": network, "durable": durable}
    successor(place, records=[HOLDER], **options)
    monkeypatch.setattr(flomd, "boot_id", lambda: "b" * 36)
    is_incomplete = network and not durable
    for _ in range(2):
        disk, known = successor(place, window=60 * is_incomplete, **options)
        assert known.whole is not is_incomplete and known.unclean is is_incomplete
        assert HOLDER[0] in known.records and not disk.log.lines
        assert marked(place) is is_incomplete


def test_without_a_journal_there_is_none(place):
    disk, known = disk_at(place, kept=False)
    disk.begin()
    assert disk.kind == "none" and known.records == {}
    assert disk.mark(True) and marked(place)
    assert os.listdir(os.path.dirname(place)) == ["s.lock"]
    disk.die()


def test_the_mark_is_cleared_when_the_window_is_over_and_all_is_stored(place):
    disk, _ = disk_at(place)
    disk.begin()
    disk.mark(True)
    disk.die()
    disk, _ = disk_at(place)
    disk.unknown_until = time.monotonic() + 60
    disk.begin()
    loop = Now()
    disk.start(loop, lambda: iter([HOLDER]), flomd.ignore, flomd.ignore)
    loop.rest()
    assert marked(place) and not disk.failing
    disk.unknown_until = 0
    loop.wait()
    assert not marked(place)
    disk.die()
    assert HOLDER[0] in successor(place)[1].records


def test_a_mark_stands_for_what_could_not_be_stored(place, monkeypatch):
    disk, _ = disk_at(place)
    disk.begin()
    loop = Now()
    records = []
    disk.start(loop, lambda: iter(records), flomd.ignore, flomd.ignore)
    loop.rest()
    with monkeypatch.context() as patch:
        patch.setattr(flomd.JournalFile, "append", lambda *_: fail())
        records.append(HOLDER)
        assert not disk.commit([HOLDER], flomd.ignore)
        loop.rest()
        assert disk.failing and disk.mark(True) and marked(place)
        loop.wait()
        assert marked(place)
    loop.wait()
    assert not disk.failing and not marked(place)
    assert [part in line for part, line in zip(("cannot write", "written again"), disk.log.lines)
            ] == [True, True]
    disk.die()
    assert HOLDER[0] in successor(place)[1].records


def fail(*_):
    raise OSError(28, "No space left on device")


def test_who_has_lost_the_lock_writes_no_journal(place):
    """Another daemon has made the state anew, and has its lock."""
    disk, _ = disk_at(place)
    disk.begin()
    disk.start(Now(), lambda: iter([]), flomd.ignore, flomd.ignore)
    os.unlink(place + ".lock")
    other, known = disk_at(place)
    assert known.whole
    other.begin()
    before = read(place + ".journal")
    disk.look()
    assert disk.failing and not disk.commit([HOLDER], flomd.ignore)
    assert read(place + ".journal") == before
    other.die()
    disk.die()


# The thread

def test_those_who_come_during_a_sync_share_the_next(path, monkeypatch):
    loop = flomd.Loop(Lines())
    syncs = []

    def sync(number):
        syncs.append(number)
        time.sleep(0.002)
    monkeypatch.setattr(flomd, "_sync", sync)
    journal = journal_at(path, True)
    journal.begin([("d", "n=0")])
    journal.start(loop, lambda: iter([("d", "n=0")]), flomd.ignore)
    told = []

    def ask(client, left):
        def done():
            told.append(client)
            if left:
                loop.at_end_of_turn(lambda: ask(client, left - 1))
            elif len(told) == 64 * 40:
                loop.stop()
        journal.commit([(f"h/{client:016x}", f'n="{left}"')], done)

    syncs.clear()
    for client in range(64):
        ask(client, 39)
    loop.run()
    assert len(told) == 64 * 40
    assert len(told) / len(syncs) > 30
    journal.close()
    assert len(journal_at(path).load()) == 65


def test_what_is_covered_while_a_rewrite_waits_for_the_disk(place, monkeypatch):
    """The record of the daemon is not older in the new file than in the batches before it."""
    disk, _ = disk_at(place, durable=True)
    disk.begin()
    loop = flomd.Loop(Lines())
    disk.start(loop, lambda: iter([]), flomd.ignore, flomd.ignore)
    journal, gate = disk._journal, threading.Event()

    def turn_until(number):
        while journal.rewritten < number:
            loop._turn(0.01)
            loop._do_what_is_due()
    turn_until(2)
    monkeypatch.setattr(flomd, "_sync", lambda number: gate.wait(10))
    disk.commit([HOLDER], flomd.ignore)
    journal.rewrite()
    assert disk.cover(disk.epoch + 5 << 32)
    gate.set()
    turn_until(3)
    disk.close()
    covers = flomd.read_daemon(journal_at(place + ".journal").load()["d"]).covers
    assert covers >> 32 == disk.epoch
    disk.die()
    assert not successor(place, durable=True)[0].log.lines


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_thread_is_a_failure(path, monkeypatch):
    """Whoever waits for the disk does not wait for ever: the file is made anew."""
    log = Lines()
    loop = flomd.Loop(log)
    journal = journal_at(path, True)
    journal.begin([("d", "n=0")])
    journal.start(loop, lambda: iter([("d", "n=1")]), flomd.ignore)
    told, real = [], flomd.JournalFile.append

    def broken(*arguments):
        monkeypatch.setattr(flomd.JournalFile, "append", real)
        raise RuntimeError("a bug")
    run_until(loop, lambda: journal.rewritten == 2)  # one that fails is tried again much later
    monkeypatch.setattr(flomd.JournalFile, "append", broken)
    journal.commit([HOLDER], lambda: told.append(journal.rewritten))
    run_until(loop, lambda: told)
    assert told == [3] and journal.rewritten == 3 and not journal.failing
    assert len(log.lines) == 1 and "a bug" in log.lines[0]
    journal.close()
    join_threads()


def join_threads():
    """Waits for their ends: a bug is told to pytest after it was told to the loop."""
    for thread in threading.enumerate():
        if thread.name == "disk":
            thread.join(10)


class Bug:
    """What ends the thread as soon as it may."""

    def __init__(self, gate):
        self.gate = gate

    def do(self):
        self.gate.wait()
        raise RuntimeError("a bug")

    def fail(self, reason):
        self.reason = reason


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_is_behind_a_bug_in_the_thread_has_failed_at_once():
    """The wake-ups that the thread has not read make a reset of its end."""
    log, heard, gate = Lines(), [], threading.Event()
    loop = flomd.Loop(log)
    thread = flomd.Thread(loop)
    for work in (Bug(gate), Bug(gate)):
        thread.do(work, heard.append)
    gate.set()
    loop._turn(10)
    assert [work.reason for work in heard] == ["RuntimeError: a bug"] * 2
    assert len(log.lines) == 1 and "a bug has ended the thread" in log.lines[0]
    thread.do(flomd.Task(gate.wait), heard.append)
    thread.finish(10)
    assert len(heard) == 3
    join_threads()


def test_a_thread_that_is_held_up_takes_whatever_it_is_given():
    """However many wake-ups the socket takes."""
    log, done, heard, gate = Lines(), [], [], threading.Event()
    thread = flomd.Thread(flomd.Loop(log))
    thread.do(flomd.Task(gate.wait), flomd.ignore)
    for number in range(3000):
        thread.do(flomd.Task(functools.partial(done.append, number)), heard.append)
    gate.set()
    thread.finish(60)
    assert done == list(range(3000)) and len(heard) == 3000 and not log.lines


def test_a_file_that_cannot_be_cut_is_closed(path, monkeypatch):
    begun(path)
    journal = journal_at(path)
    journal.load()
    number = journal._file.number
    monkeypatch.setattr(os, "ftruncate", fail)
    journal.begin([("d", "n=0")])
    assert journal.failing and flomd.identity(number) is None


def test_a_daemon_with_a_thread_forks_in_silence(box):
    box.address = ("-s", box.socket, "--state-dir", box.folder)
    daemon = box.start(sys.executable, "-W", "always", FLOMD, "--no-files", "-f", "-d", "-1",
                       *box.address, "--metrics", box.path("figures"))
    box.foreground.append(daemon)
    wait_until(lambda: os.path.exists(box.path("figures")) and "serving" in daemon.err)
    assert daemon.err.count("\n") == 1
    with open(f"/proc/{daemon.pid}/status") as file:
        assert "Threads:\t2\n" in file.read()
    assert box.run("-d", "0", "--", "true", address=("-s", box.socket)) == (0, "", "")
