"""The memory as it lies in etcd, and what a daemon remembers of the cluster."""
import hashlib
import os

import pytest

import flomd
from test_memory import Table, client
from world import chance

NAMES = ["R", "n[9]", "A.B.C", "/a/b", "/a/b c/\u00e4\udcff", "_s_x[5]", "_S_x[5]",
         "_t_%H#f[9]", "/" + "x" * 5000]


def digest(name):
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def there_and_back(records):
    kept = dict(flomd.stored(records.items()))
    back = flomd.remembered(kept.items())
    return dict(back)


def crowd():
    table = Table()
    sessions = [client("10.0.0.1:48", host="db") for _ in NAMES]
    for session, name in zip(sessions, NAMES):
        table.ask(session, name, lifespan=9000)
    table.ask(client(), "_S_x[5]")
    for session in sessions[::2]:
        table.release(session, committed=False)
    return table


def test_keys_have_no_name():
    kept = dict(flomd.stored([("r/Ug==", 'lifespan="9000"'), ("v/X1NfeFs1XQ==/12", 'place="3"'),
                              ("h/0000000500000001", 'name="Ug=="'), ("d", "x")]))
    assert kept == {
        f"r/{digest('R')}": 'name="Ug==" lifespan="9000"',
        f"v/{digest('_S_x[5]')}/12": 'name="X1NfeFs1XQ==" place="3"',
        "h/0000000500000001": 'name="Ug=="'}
    removed = flomd.stored([("r/Ug==", None), ("v/X1NfeFs1XQ==/12", None), ("h/0", None)])
    assert removed == [(f"r/{digest('R')}", None), (f"v/{digest('_S_x[5]')}/12", None),
                       ("h/0", None)]


def test_what_is_stored_is_remembered():
    table = crowd()
    assert {key[:2] for key in table.records} == {"h/", "r/", "v/"}
    assert there_and_back(table.records) == table.records
    again = Table()
    again.records = there_and_back(dict(flomd.everything(table.table)))
    assert dict(flomd.everything(again.restored())) == table.records


def test_keys_are_short():
    for key, _ in flomd.stored(crowd().records.items()):
        assert len(key) < 100


def test_batches_change_what_etcd_has():
    table = crowd()
    kept, names = {}, list(NAMES)
    for _ in range(200):
        name = chance("batches").choice(names)
        session = client()
        table.ask(session, name, quantity=1)
        table.release(session, committed=False)
        for key, text in flomd.stored(flomd.everything(table.table)):
            kept[key] = text
        gone = set(kept) - {key for key, _ in flomd.stored(table.records.items())}
        for key in gone:
            del kept[key]
    assert dict(flomd.remembered(kept.items())) == table.records


GOOD = f"r/{digest('R')}"


@pytest.mark.parametrize("key, text", [
    (GOOD, 'lifespan="9000"'), (GOOD, ""), (GOOD, 'name="" lifespan="9000"'),
    (GOOD, 'name="UQ==" lifespan="9000"'), (GOOD, 'name="Ug=" lifespan="9000"'),
    (GOOD + "/1", 'name="Ug==" lifespan="9000"'), (f"v/{digest('R')}", 'name="Ug==" place="1"'),
    (f"v/{digest('R')}/", 'name="Ug==" place="1"'), ("r/Ug==", 'name="Ug==" lifespan="9000"'),
    ("h/1", 'name="Ug=="'), ("h/000000050000000G", 'name="Ug=="'), ("h/", ""), ("v/", ""),
    ("x/000000050000000G", ""), (f"R/{digest('R')}", 'name="Ug==" lifespan="9000"'),
    (f"r/{digest('R').upper()}", 'name="Ug==" lifespan="9000"'),
])
def test_what_nobody_stores_is_not_believed(key, text):
    good = [(GOOD, 'name="Ug==" lifespan="9000"')]
    assert flomd.remembered(good) == [("r/Ug==", 'lifespan="9000"')]
    with pytest.raises(flomd.BrokenMemory):
        flomd.remembered(good + [(key, text)])


def test_damaged_texts_are_not_believed():
    """Whatever one byte is changed to, the records are refused or are those of another table."""
    table = crowd()
    kept = dict(flomd.stored(table.records.items()))
    random = chance("damage")
    for _ in range(300):
        damaged, key = dict(kept), random.choice(sorted(kept))
        text = damaged.pop(key)
        place = random.randrange(len(key) + len(text))
        both = key + text
        both = both[:place] + random.choice('0a"/=~ \udcff') + both[place + 1:]
        damaged[both[:len(key)]] = both[len(key):]
        again = Table()
        try:
            again.records = dict(flomd.remembered(damaged.items()))
            again.restored()
        except flomd.BrokenMemory:
            pass


# The file

class Log:
    def __init__(self):
        self.lines = []

    def error(self, text):
        self.lines.append(text)

    info = error


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "cluster")


def opened(path):
    return flomd.ClusterFile(Log(), path)


def fields(cluster):
    return cluster.id, cluster.mark, cluster.revision, cluster.is_new


def test_a_daemon_that_knows_no_cluster_knows_the_next_one(path):
    file = opened(path)
    assert fields(file.read()) == ("", "", 0, False)
    assert fields(opened(path).read()) == ("", "", 0, False)
    file.write(flomd.Cluster("5", "ma\u00e4\nrk", 7))
    assert fields(opened(path).read()) == ("5", "ma\u00e4\nrk", 7, False)
    assert os.listdir(os.path.dirname(path)) == ["cluster"]


def test_the_revision_is_written_now_and_then(path, monkeypatch):
    file, cluster = opened(path), flomd.Cluster("5", "mark", 7)
    file.read()
    file.write(cluster)
    before = os.stat(path).st_ino
    cluster.revision = 8
    file.write(cluster)
    assert opened(path).read().revision == 7
    monkeypatch.setattr(flomd, "NOTED", 0)
    file.write(cluster)
    assert opened(path).read().revision == 8
    monkeypatch.undo()
    cluster.revision = 2 ** 63
    file.finish(cluster)
    assert fields(opened(path).read()) == ("5", "mark", 2 ** 63, False)
    assert os.stat(path).st_ino == before


def test_a_file_that_was_removed_is_made_anew(path):
    file, cluster = opened(path), flomd.Cluster("5", "mark", 7)
    file.read()
    file.write(cluster)
    os.unlink(path)
    cluster.revision = 8
    file.finish(cluster)
    assert fields(opened(path).read()) == ("5", "mark", 8, False) and not file._log.lines


def test_another_mark_is_written_at_once(path):
    file = opened(path)
    file.read()
    for id, mark in (("5", ""), ("5", "a"), ("5", "b"), ("6", "b")):
        file.write(flomd.Cluster(id, mark, 9))
        assert fields(opened(path).read()) == (id, mark, 9, False)


def test_a_new_cluster_is_written_when_it_is_settled(path):
    file = opened(path)
    file.read()
    file.write(flomd.Cluster("5", "a", 9))
    file = opened(path)
    cluster = file.read(is_new=True)
    assert fields(cluster) == ("", "", 0, True)
    cluster.id, cluster.revision = "6", 3
    file.write(cluster)
    assert fields(opened(path).read()) == ("5", "a", 9, False)
    cluster.mark = "b"
    cluster.settle()
    file.write(cluster)
    assert fields(opened(path).read()) == ("6", "b", 3, False)


@pytest.mark.parametrize("damage", [
    lambda text: "", lambda text: text[:-1], lambda text: text[1:], lambda text: text + "\n",
    lambda text: text.replace("revision 0", "revision x"), lambda text: text.replace('"', ""),
    lambda text: text.replace("cluster 1", "cluster 2"), lambda text: "\0" * len(text),
    lambda text: text + "\u00e9"])
def test_a_damaged_file_is_reported(path, damage):
    file = opened(path)
    file.read()
    file.write(flomd.Cluster("5", "mark", 7))
    with open(path) as whole:
        text = whole.read()
    with open(path, "w", encoding="utf-8") as damaged:
        damaged.write(damage(text))
    with pytest.raises(flomd.CannotServe) as caught:
        opened(path).read()
    assert "--etcd-new-cluster" in str(caught.value)
    assert opened(path).read(is_new=True).is_new


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(flomd.CannotServe):
        opened(str(tmp_path / "nowhere" / "cluster")).read()
    with pytest.raises(flomd.CannotServe) as caught:
        opened(str(tmp_path)).read()
    assert str(caught.value) == f"cannot read {tmp_path}: Is a directory"
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    with pytest.raises(flomd.CannotServe) as caught:
        opened(fifo).read(is_new=True)
    assert str(caught.value) == f"cannot read {fifo}: it is no file"


def test_a_file_that_cannot_be_written_any_more_is_told_once(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    file = opened(str(folder / "cluster"))
    file.read()
    (folder / "cluster").unlink()
    folder.rmdir()
    for revision in range(3):
        file.write(flomd.Cluster("5", "mark", revision))
    path = str(folder / "cluster")
    assert file._log.lines == [f"cannot write {path}: No such file or directory; it is tried "
                               "again every 5 s"]
    folder.mkdir()
    file.finish(flomd.Cluster("5", "mark", 4))
    assert file._log.lines[1:] == [f"{path} is written again"]


def test_a_disk_that_fails_is_not_tried_with_each_answer(path, monkeypatch):
    """It may take long to fail, and the loop waits for it."""
    file, tried = opened(path), []
    file.read()

    def fail(_):
        tried.append(1)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(flomd.os, "fsync", fail)
    for revision in range(9):
        file.write(flomd.Cluster("5", "mark", revision))
    assert len(tried) == 1
    monkeypatch.undo()
    file.finish(flomd.Cluster("5", "mark", 9))
    assert fields(opened(path).read()) == ("5", "mark", 9, False)


def test_the_path_follows_the_prefix():
    for prefix, path in (("/flom/site/", "/var/lib/flomd/site"), ("/a/b/", "/var/lib/flomd/a-b"),
                         ("/flom/a/b/", "/var/lib/flomd/a-b")):
        assert flomd.cluster_path({"EtcdState": None, "EtcdPrefix": prefix}) == path
    assert flomd.cluster_path({"EtcdState": "/x", "EtcdPrefix": "/flom/site/"}) == "/x"
