"""How long a daemon that a client started lives, and that nobody waits for its end."""
import subprocess
import time

from world import COUNT, wait_until

LIVES = {  # options, and when the daemon is gone: s after the command, at least and at most
    "default": ([], 6.5, 9), "short": (["-d", "300"], 2.2, 4.5),
    "resource": (["-d", "300", "-i", "4000"], 4.2, 6.5)}


def test_a_daemon_is_gone_when_nobody_has_used_it_for_its_lifespan(boxes):
    """By default 2 s for the resource and 5 s of its own; one for ever and one in use stay."""
    forever, used = boxes.make(), boxes.make()
    assert forever.run("-d", "-1", "--", "true").status == 0
    holder, gate = used.hold("a", "-d", "300")
    waiter = used.waiter("-o", "6000", "--", "true")
    left, started, ended = {name: boxes.make() for name in LIVES}, {}, {}
    for name, box in left.items():
        assert box.run(*LIVES[name][0], "--", "echo", "hello") == (0, "hello\n", "")
        started[name] = time.monotonic()
        assert len(box.daemons()) == 1

    def all_ended():
        for name in [name for name in left if not left[name].daemons()]:
            ended[name] = time.monotonic() - started[name]
            assert left.pop(name).sockets() == set()
        return not left

    wait_until(all_ended, seconds=15)
    for name, (_, least, most) in LIVES.items():
        assert least - 0.5 < ended[name] < most, (name, ended)
    assert ended["short"] < ended["resource"] < ended["default"]
    assert len(forever.daemons()) == len(used.daemons()) == 1
    assert waiter.end().status == 98
    gate.open()
    assert holder.end().status == 0


def test_lifespan_0_starts_none(box):
    done = box.run("-d", "0", "--", "echo", "x")
    assert done == (99, "", f"flom: no daemon at {box.socket} (and -d 0 forbids starting one)\n")
    assert box.running() == {} and box.sockets() == set()


def test_a_pipe_ends_when_the_command_ends(box):
    """The daemon keeps nothing of its starter, so `flom … | cat` does not wait for it."""
    flom = box.flom("-d", "-1", "--", "echo", "hello", stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT)
    assert flom.communicate(timeout=30) == (b"hello\n", None)
    assert flom.returncode == 0
    assert len(box.daemons()) == 1


def test_a_daemon_that_ends_and_a_client_that_comes_never_miss_each_other(box):
    """A client that meets the end of a daemon starts another."""
    options = ("-d", "-1", "--recovery-window", "0")
    for _ in range(COUNT.rounds):
        assert box.run(*options, "--", "true").status == 0
        stopping = box.flom("-x")
        clients = [box.flom(*options, "--", "echo", "x") for _ in range(3)]
        assert [client.end() for client in clients] == [(0, "x\n", "")] * 3
        assert stopping.end().status == 0
