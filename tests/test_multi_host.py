"""The published use cases of several hosts: network namespaces, joined by a bridge.

7: a fixed daemon; 8: a fixed daemon found by multicast; 9: nothing known but a group; 9b: the
daemon's host is lost.  Each over IPv4 and over IPv6.
"""
import signal

import pytest
from world import PYTHON, ROOT, wait_until

ASK = """\
import socket
import sys
sys.path.insert(0, {tests})
from fakes import FlomClient, discover
address, port, _ = discover(socket.AF_INET, ("10.77.0.1", 28015))
assert (address, port) == ("10.77.0.1", {port})
with FlomClient(socket.AF_INET, (address, port)) as client:
    assert client.lock("R1") is True and client.release() == b""
print("obtained")
"""

GROUPS = {"IPv4": ("-A", "239.255.0.1"), "IPv6": ("-A", "ff02::1", "-n", "eth0")}
ANY = {"IPv4": ("tcp", "0" * 8, "udp"), "IPv6": ("tcp6", "0" * 32, "udp6")}
ADDRESSES = {"IPv4": ("-a", "10.77.0.1"), "IPv6": ("-a", "fd00::1"),
             "link-local": ("-a", "fe80::1", "-n", "eth0")}

QUICK = ("-I", "150")  # ms that a question waits for its answer


def order(holder_host, waiter_host, *address):
    """`ls` on one host waits for `sleep` on the other."""
    first = len(holder_host.events())
    name = f"sleep{first}"
    sleep, gate = holder_host.hold(name, *address)
    assert waiter_host.run(*address, "-o", "0", "--", "true").status == 98
    ls = waiter_host.waiter(*address, "--", *waiter_host.note("ls"))
    gate.open()
    assert sleep.end() == (0, "", "") and ls.end().status == 0
    assert holder_host.events()[first:] == [f"{name} start", f"{name} end", "ls"]


def start(host, *address, more=QUICK):
    """The first command on a host, which leaves a daemon there for ever; its pid."""
    assert host.run(*address, *more, "-d", "-1", "--", "true") == (0, "", "")
    return host.the_daemon()


@pytest.mark.parametrize("address", ADDRESSES.values(), ids=list(ADDRESSES))
def test_7_a_fixed_daemon(hosts, address):
    """Use case 7: commands on two hosts wait for each other by a daemon whose address all know."""
    one, two = hosts(2)
    pid = start(one, *address)
    order(one, two, *address, "-d", "0")
    order(two, one, *address, "-d", "0")
    assert one.daemons() == [pid] and two.daemons() == []


def test_who_gives_an_order_over_a_local_address_is_of_this_host(hosts):
    """Python writes such an address with the interface or without it."""
    one, two = hosts(2)
    start(one, *ADDRESSES["link-local"])
    assert two.run(*ADDRESSES["link-local"], "-X").status == 99
    assert one.run(*ADDRESSES["link-local"], "-X").status == 0
    wait_until(lambda: not one.daemons())


def test_7_without_a_daemon(hosts):
    """Use case 7: who must not start the daemon says that there is none."""
    one, two = hosts(2)
    status, out, err = two.run("-a", one.ipv4, "-d", "0", "--", "echo", "x")
    assert (status, out) == (99, "") and err.startswith("flom: no daemon at 10.77.0.1")
    assert one.running() == {} and two.running() == {}


@pytest.mark.parametrize("kind", GROUPS)
def test_8_a_fixed_daemon_found_by_multicast(hosts, kind):
    """Use case 8: as 7, but all know the group of the daemon alone."""
    one, two, three = hosts(3)
    unicast = ADDRESSES[kind]
    pid = start(one, *unicast, *GROUPS[kind])
    order(one, two, *GROUPS[kind], "-d", "0")
    order(three, one, *GROUPS[kind], "-d", "0")
    assert one.daemons() == [pid] and two.daemons() == three.daemons() == []
    assert 28015 in [port for _, port in one.listening(pid, ANY[kind][0])]


@pytest.mark.parametrize("kind", GROUPS)
def test_8_without_a_daemon(hosts, kind):
    """Use case 8: nobody answers in the group; it is said, and nothing is started."""
    one, two = hosts(2)
    status, out, err = two.run(*GROUPS[kind], "-d", "0", "--", "echo", "x")
    assert (status, out) == (99, "") and err.count("\n") == 1
    assert err.startswith("flom: no daemon ") and GROUPS[kind][1] in err
    assert one.running() == {} and two.running() == {}


@pytest.mark.parametrize("kind", GROUPS)
def test_9_a_dynamic_network(hosts, kind):
    """Use case 9: all know a group; whoever comes first starts the one daemon of all hosts."""
    one, two = hosts(2)
    group, (tcp, anything, udp) = GROUPS[kind], ANY[kind]
    pid = start(one, *group, more=())  # as it is written
    assert list(one.running()) == [pid] and two.running() == {}
    (address, port), = one.listening(pid, tcp)
    assert address == anything and port != 28015
    assert (anything, 28015) in one.listening(pid, udp)
    for host in (one, two):
        assert host.run(*group, "-d", "0", "--", "echo", "x") == (0, "x\n", "")
    order(two, one, *group, "-d", "0")
    order(one, two, *group, "-d", "0")
    assert one.daemons() == [pid] and two.daemons() == []


@pytest.mark.parametrize("lifespan", ["-1", "60000"])
def test_9_a_daemon_is_started_where_nobody_answers(hosts, lifespan):
    """Use case 9: where nobody answers, a daemon of the group runs then."""
    one, two = hosts(2)
    group = GROUPS["IPv4"]
    assert two.run(*group, "-d", lifespan, *QUICK, "--", "echo", "x") == (0, "x\n", "")
    assert one.run(*group, "-d", lifespan, *QUICK, "--", "echo", "x") == (0, "x\n", "")
    assert one.daemons() == [] and len(two.daemons()) == 1


@pytest.mark.parametrize("kind", GROUPS)
def test_9b_the_host_of_the_daemon_is_lost(hosts, kind):
    """Use case 9b: the next client that may start a daemon makes its host that of the daemon."""
    one, two, three = hosts(3)
    group = GROUPS[kind]
    one.kill(start(one, *group))
    assert three.run(*group, "-d", "0", *QUICK, "--", "true").status == 99
    assert two.run(*group, "-d", "5000", *QUICK, "--", "echo", "x") == (0, "x\n", "")
    assert len(two.daemons()) == 1 and one.daemons() == three.daemons() == []
    order(one, three, *group, "-d", "0")
    order(three, two, *group, "-d", "5000")
    assert one.daemons() == three.daemons() == []


def test_9b_the_host_of_the_daemon_is_cut_off(hosts):
    """Use case 9b: as seen from the others, a host without a network is lost, too."""
    one, two, three = hosts(3)
    group = GROUPS["IPv4"]
    start(one, *group)
    one.network.cut(1)
    assert two.run(*group, "-d", "5000", *QUICK, "--", "echo", "x") == (0, "x\n", "")
    assert three.run(*group, "-d", "0", "--", "echo", "x") == (0, "x\n", "")
    assert len(two.daemons()) == 1


def test_daemons_of_two_groups_on_one_port_do_not_answer_each_other(hosts):
    one, two = hosts(2)
    first, second = ("-A", "239.255.0.1"), ("-A", "239.255.0.2")
    start(one, *first)
    assert two.run(*second, "-d", "0", *QUICK, "--", "true").status == 99
    assert one.run(*second, *QUICK, "-d", "-1", "--", "true").status == 0
    assert len(one.daemons()) == 2
    sleep, gate = two.hold("sleep", *first, "-d", "0")
    assert two.run(*second, "-d", "0", "-o", "0", "--", "echo", "x") == (0, "x\n", "")
    gate.open()
    assert sleep.end().status == 0


def test_another_port_is_another_group(hosts):
    one, two = hosts(2)
    pid = start(one, "-A", "239.255.0.1", "-P", "28099")
    assert ("0" * 8, 28099) in one.listening(pid, "udp")
    assert two.run("-A", "239.255.0.1", "-d", "0", *QUICK, "--", "true").status == 99
    assert two.run("-A", "239.255.0.1", "-P", "28099", "-d", "0", "--", "true").status == 0


def test_with_both_the_client_goes_straight_to_the_address(hosts):
    """No daemon in the group, one at the address; then the group is not asked."""
    one, two = hosts(2)
    start(one, "-a", one.ipv4)
    both = ("-a", one.ipv4, "-A", "239.255.0.9", "-V", "-d", "0")
    done = two.run(*both, "--", "echo", "x")
    assert done.status == 0 and "datagram" not in done.out


def test_what_verbose_tells_of_discovery(hosts):
    one, two = hosts(2)
    quick = ("-A", "239.255.0.1", "-d", "0", "-V", "-D", "3", "-I", "100")
    lines = two.run(*quick, "--", "true").out.splitlines()
    asked = [line for line in lines if line.startswith("sending UDP multicast datagram to ")]
    assert len(asked) == 3 and "no reply from 239.255.0.1/28015" in lines
    assert asked[0].startswith("sending UDP multicast datagram to 239.255.0.1/28015 ('<?xml ")
    start(one, "-A", "239.255.0.1")
    lines = two.run(*quick, "--", "true").out.splitlines()
    assert [line[:40] for line in lines if "datagram" in line or "reply" in line] == [
        "sending UDP multicast datagram to 239.25", "reply from 239.255.0.1/28015 is '<?xml v"]


def test_an_address_that_no_host_has(hosts):
    """Neither can be reached nor served here; and a name that nobody can resolve."""
    one, = hosts(1)
    for address in ("10.77.0.9", "no.such.host.invalid"):
        done = one.run("-a", address, "-o", "0", "--", "echo", "x", seconds=30)
        assert done[:2] == (99, "")
        assert address in done.err
        assert done.err.count("\n") == 1
        assert one.daemons() == []


def test_an_interface_that_is_not_there(hosts):
    one, = hosts(1)
    done = one.run("-A", "ff02::1", "-n", "eth9", "--", "echo", "x")
    assert done[:2] == (99, "") and done.err.count("\n") == 1
    assert "-n: " in done.err and "'eth9'" in done.err


def test_shutdown_is_not_obeyed_from_another_host_unless_allowed(hosts):
    one, two = hosts(2)
    pid = start(one, "-a", one.ipv4)
    for option in ("-x", "-X"):
        done = two.run("-a", one.ipv4, option)
        assert done.status == 99 and done.err.count("\n") == 1
    assert one.daemons() == [pid]
    assert one.run("-a", one.ipv4, "-X").status == 0
    wait_until(lambda: not one.daemons())
    start(one, "-a", one.ipv4, "--allow-remote-shutdown", "--recovery-window", "0")
    assert two.run("-a", one.ipv4, "-X").status == 0
    wait_until(lambda: not one.daemons())


def test_the_answer_to_a_question_is_floms(hosts):
    """Asked by unicast, from the host itself, as FLoM's client asks."""
    one, = hosts(1)
    pid = start(one, "-A", "239.255.0.1")
    (_, port), = one.listening(pid)
    script = one.write("ask.py", ASK.format(tests=repr(f"{ROOT}/tests"), port=port))
    done = one.start(*PYTHON, script).end()
    assert done == (0, "obtained\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_client_that_ends_frees_its_lock_on_the_other_host(hosts, number):
    one, two = hosts(2)
    address = ("-a", one.ipv4, "-d", "0", "--inherit-connection", "no")
    start(one, "-a", one.ipv4)
    holder, gate = two.hold("a", *address)
    waiter = one.waiter(*address, "--", *one.note("b"))
    if number == signal.SIGKILL:
        two.kill(holder.pid)
        gate.open()
    else:
        holder.send_signal(number)
        assert holder.end().status == 128 + number
    assert waiter.end().status == 0
