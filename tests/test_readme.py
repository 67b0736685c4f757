"""Every block of README and of some man pages is run: commands, crontab lines, files and Python.

A box has stand-ins for what README's commands run, and for ssh, scp and systemctl; `python3`,
`flom` and `flomd` in it are those under test.  Blocks are known by their first line; one that
nobody runs fails, and so does a test whose block is gone.  Where root runs the tests, the blocks of
one host run as an ordinary user, too; a network of hosts takes root.
"""
import collections
import contextlib
import json
import os
import re
import shutil
import subprocess

import flom
import flomd
import pytest
from world import (FLOM_PY, FLOMD_PY, PYTHON, ROOT, Box, comm, free_port, is_busy, read,
                   wait_until)

README = read(os.path.join(ROOT, "README.md"))
CLIENTS_OF_A_QUORUM = os.path.join(ROOT, "contrib/examples/etcd/flom.conf")
Block = collections.namedtuple("Block", "language text")
USER = 62000 + os.getpid() % 2000  # of an ordinary user, who has no name
READ = "+dac_read_search"  # the interpreter may lie in a folder that only root can search
STAND_INS = ("backup.sh on-slot vacuum read write simulate start-tool print-invoice open-ticket "
             "archive deploy.sh nightly-report curl dump apt-get").split()
SH = "#!/bin/sh\n"
PRINTS = SH + 'echo "$(basename "$0")" "$@" >>{log}\n'
REMOTE = SH + 'case $1 in\n{cases}esac\nshift\n{do}\n'
SSH = 'cd "$folder" && HOME=$folder exec $enter sh -c "$*"'
SCP = SH + """\
for target; do :; done
folder=$(exec ssh "${target%%:*}" pwd)
path=${target#*:}
cd "$OLDPWD" 2>/dev/null
case $path in /*) folder= ;; esac
while [ $# -gt 1 ]; do cp "$1" "$folder/$path" || exit; shift; done
"""
SYSTEMCTL = SH + """\
echo systemctl "$@" >>{log}
case $1 in enable) test -f {folder}/etc/systemd/system/"$3" ;; esac
"""
SYSUSERS = SH + """\
[ "$*" = - ] || exec <{folder}/etc/sysusers.d/flomd.conf
grep '^u flom ' >>{log}
"""


class Ordinary(Box):
    """A box of an ordinary user, to whom all that is in it belongs."""

    def start(self, *argv, **options):
        for where, folders, files in os.walk(self.folder):
            for name in [".", *folders, *files]:
                with contextlib.suppress(FileNotFoundError):  # a daemon has renamed it
                    os.chown(os.path.join(where, name), USER, USER, follow_symlinks=False)
        return super().start(*argv, **options)


@pytest.fixture(params=["as who I am", "as an ordinary user"])
def box(request, boxes):
    if request.param == "as who I am":
        return boxes.make()
    if os.geteuid() != 0:
        pytest.skip("the tests are run by an ordinary user")
    become = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups",
              f"--inh-caps={READ}", f"--ambient-caps={READ}"]
    if not shutil.which("setpriv") or subprocess.call([*become, *PYTHON, "-c", ""], stderr=-3):
        pytest.skip("root cannot become an ordinary user here")
    return boxes.make(of=Ordinary, prefix=become)


def blocks():
    """The blocks of README: fenced ones with their language; of indented ones that is sh, but for
    files and what flom prints."""
    found, inside, language, lines = [], None, "sh", []
    for line in README.splitlines() + [""]:
        fence = re.fullmatch("```([a-z]*)", line)
        if fence and inside == "fence":
            found.append(Block(language, "\n".join(lines)))
            inside, lines = None, []
        elif fence:
            inside, language = "fence", fence.group(1)
        elif inside == "fence":
            lines.append(line)
        elif line.startswith("    "):
            inside = language = "sh"
            lines.append(line[4:])
        elif inside == "sh":
            found.append(Block(language, "\n".join(lines)))
            inside, lines = None, []
    assert inside is None
    return found


def displays(name):
    """The literal displays of a man page, as a reader sees them."""
    text = read(os.path.join(ROOT, "contrib/man", name))
    for found in re.findall(r"^\.Bd -literal\n(.*?)\n\.Ed$", text, re.MULTILINE | re.DOTALL):
        yield Block(name, found.replace(r"\-", "-").replace(r"\e", "\\").replace(r"\&", ""))


def test_displays_fit_a_terminal():
    """Of 80 columns, of which man leaves the first five empty; an address cannot be parted."""
    for page in os.listdir(os.path.join(ROOT, "contrib/man")):
        for display in displays(page):
            wide = [line for line in display.text.splitlines() if len(line) > 75]
            assert [line for line in wide if "http://" not in line] == [], page


LANGUAGES = ("sh", "python")
PAGES = ("flom.3", "flom-tls.7", "flom-migration.7")
BLOCKS, TESTED = blocks(), set()
for page in PAGES:
    BLOCKS.extend(displays(page))


def block(beginning):
    """The one block that begins so; it counts as tested."""
    found = [block for block in BLOCKS if block.text.startswith(beginning)]
    assert len(found) == 1, f"{len(found)} blocks begin with {beginning!r}"
    return found[0]


def runs(*beginnings):
    """Marks a test with the blocks that it runs, which it gets as `texts`."""
    TESTED.update(beginnings)
    return pytest.mark.parametrize("texts", [beginnings], ids=[beginnings[0][:30]])


def furnish(box, *settings, hosts=()):
    """Makes the box a place for README's commands: bin/ with stand-ins, the scripts, ~/.flom."""
    os.mkdir(box.path("bin"))
    python = " ".join(PYTHON)
    for name, text in [("flom", f'{SH}exec {python} {FLOM_PY} "$@"\n'),
                       ("flomd", f'{SH}exec {python} {FLOMD_PY} "$@"\n'),
                       ("python3", f'{SH}exec {python} "$@"\n'),
                       ("systemctl", SYSTEMCTL.format(log=box.log, folder=box.folder)),
                       ("systemd-sysusers", SYSUSERS.format(log=box.log, folder=box.folder)),
                       ("scp", SCP), *((name, PRINTS.format(log=box.log)) for name in STAND_INS)]:
        executable(box, f"bin/{name}", text)
    enter = {host: " ".join(host.from_another) for host in hosts} or {box: ""}
    cases = "".join(f"db{n}) folder={host.folder} enter='{enter[host]}' ;;\n"
                    for n, host in enumerate(enter, 1))
    executable(box, "bin/ssh", REMOTE.format(cases=cases, do=SSH))
    for name in STAND_INS:
        os.symlink(f"bin/{name}", box.path(name))
    for host in {box, *hosts}:
        host.write(".flom", "\n".join(("[Daemon]", f"StateDir={host.folder}") + settings) + "\n")
    box.write("urls.txt", "http://one/\nhttp://two/\n")


def executable(box, name, text):
    os.chmod(box.write(name, text), 0o755)


def sh(box, text, **options):
    """Starts a shell in the furnished box."""
    path = f"{box.path('bin')}:{os.environ['PATH']}"
    return box.start("sh", "-euc", text, env={"PATH": path}, cwd=box.folder, **options)


def done(box, text, status=0):
    """Runs a block; it must succeed.  Returns its result."""
    result = sh(box, text).end(30)
    assert result.status == status, result
    return result


def bring(box):
    """Puts what README's directory has into the box."""
    for name in ("flom.py", "flomd.py"):
        shutil.copy(os.path.join(ROOT, name), box.folder)
    shutil.copytree(os.path.join(ROOT, "contrib"), box.path("contrib"))


# The blocks

@runs("python3 flom.py -- echo hello")
def test_the_first_command(box, texts):
    furnish(box, f"SocketName={box.socket}")
    bring(box)
    assert done(box, block(*texts).text) == (0, "hello\n", "")


@runs("python3 -m venv")
def test_the_command_of_the_tests(texts):
    """It is what .ci/run runs, since it is the first such line; tox is what makes the matrix."""
    line = next(line for line in README.splitlines() if line.startswith("    python3 -m venv"))
    assert line.strip() == block(*texts).text
    expression = re.search(r"sed -n '(.*)' README.md", read(os.path.join(ROOT, ".ci/run"))).group(1)
    assert expression == r"s/^    \(python3 -m venv .*\)$/\1/p"
    assert line.endswith("&& .venv/bin/tox") and os.path.exists(os.path.join(ROOT, "tox.ini"))


@runs("scp flom.py flomd.py db1:\n")
def test_two_hosts_in_five_commands(hosts, texts):
    one, two = hosts(2)
    furnish(one, hosts=[one, two])
    work = os.mkdir(one.path("work")) or one.path("work")
    for script in (FLOM_PY, FLOMD_PY):
        shutil.copy(script, work)
    commands = block(*texts).text.splitlines()
    assert len(commands) == 5
    gate = one.gate("sleep")
    executable(one, "bin/sleep", SH + f"exec {one.path('hold')}\n")
    executable(one, "hold", f'{SH}exec sh -c {quoted(gate.command[2])} sleep {one.log} {gate.fifo}')

    def command(number):
        path = f"{one.path('bin')}:{os.environ['PATH']}"
        text = commands[number - 1].replace(" &", "")
        return one.start("sh", "-euc", text, env={"PATH": path}, cwd=work)
    assert [command(n).end().status for n in (1, 2)] == [0, 0]
    assert os.path.exists(two.path("flomd.py"))
    holder = command(3)
    gate.wait()
    assert is_busy(command(4).end())
    waiter = command(5)
    wait_until(lambda: two.run("-A", "239.255.0.1", "--status").out.count("waits 1") == 1)
    assert waiter.out == ""
    gate.open()
    assert holder.end() == (0, "", "") and waiter.end() == (0, "mine\n", "")
    assert two.daemons() == [] and len(one.daemons()) == 1


def quoted(text):
    return "'" + text.replace("'", "'\\''") + "'"


LOCAL = {  # blocks of the own socket, and what they run
    "flom -- backup.sh": ["backup.sh"] * 4,
    "flom -r report -l PR": ["read", "write"],
    "xargs": ["curl -sO http://one/", "curl -sO http://two/"],
    "flom -r 'licence[5]'": ["simulate", "start-tool seatA"],
    "flom -r '_s_invoice[1]'": ["print-invoice 1", "open-ticket 1", "archive 20"],
    "# flock /tmp/backup.lock backup.sh": ["backup.sh"] * 4 + ["dump"]}
TESTED.update(LOCAL)


@pytest.mark.parametrize("beginning", LOCAL)
def test_recipes_of_one_host(box, beginning):
    furnish(box, f"SocketName={box.socket}")
    done(box, block(beginning).text)
    ran = sorted(box.events()) if beginning == "xargs" else box.events()
    assert [line[:len(word)] for line, word in zip(ran, LOCAL[beginning])] == LOCAL[beginning]
    assert len(ran) == len(LOCAL[beginning])


def test_copying_by_hand(box):
    """What checksums.sh says how to do."""
    furnish(box, f"SocketName={box.socket}")
    bring(box)
    usage = re.findall("^#   (.*)$", read(os.path.join(ROOT, "contrib/checksums.sh")), re.MULTILINE)
    text = "\n".join(usage).replace("/usr/local/", f"{box.folder}/usr/local/")
    os.makedirs(box.path("usr/local/bin"))
    result = done(box, text)
    assert result.out == "flom.py: OK\nflomd.py: OK\n"
    assert done(box, "usr/local/bin/flom -- echo x").out == "x\n"
    assert done(box, "usr/local/bin/flomd --version").out.startswith("flomd")


@runs("0 3 * * *")
def test_the_cron_job(hosts, texts):
    """Run by both hosts it runs once: the lock is kept although the job has ended."""
    one, two = hosts(2)
    for host in (one, two):
        furnish(host)
    minute, *_, command = block(*texts).text.split(None, 5)
    assert (minute, "%" in command) == ("0", False)
    first = sh(one, command)
    wait_until(lambda: one.events() == ["nightly-report"] or first.poll() is not None)
    assert sh(two, command).end() == (98, "", "")
    for pid in [pid for pid in one.running() if comm(pid) == "flom"]:
        os.kill(pid, 15)
    assert first.end().status == 0 and one.events() == ["nightly-report"]


@runs("make-certificates.sh ca", "# deploy.conf", "flom -c deploy.conf")
def test_the_deploy_lock(box, texts):
    """db2 is a folder here: what is copied to it serves a client there as well."""
    furnish(box, f"UnicastPort={free_port()}", "RecoveryWindow=0")
    os.mkdir(box.path("db2"))
    executable(box, "bin/ssh", f'{SH}shift\ncd {box.path("db2")}\nexec sh -c "$*"\n')
    os.symlink(os.path.join(ROOT, "contrib/tls/make-certificates.sh"),
               box.path("bin/make-certificates.sh"))
    prepare, file, run = (block(text).text for text in texts)
    file = file.replace("UnicastAddress=db1", "UnicastAddress=127.0.0.1")
    box.write("deploy.conf", file)
    box.write("db2/deploy.conf", file.replace("db1.", "db2."))
    done(box, prepare)
    assert "there already" in done(box, "make-certificates.sh db1", status=1).err
    done(box, run)
    done(box, run.replace("-c ", "-c db2/"))
    assert box.events() == ["deploy.sh"] * 2
    done(box, "flom -a 127.0.0.1 -d 0 -- true", status=99)
    keys = [box.path(name) for name in ("ca.key", "db1.key", "db2/db2.key")]
    assert [os.stat(key).st_mode & 0o077 for key in keys] == [0] * 3


@runs("sh contrib/install.sh  ")
def test_the_installation(box, texts):
    """It goes below the box, by DESTDIR; so what it has compiled, and where from, is not run."""
    furnish(box)
    bring(box)
    assert "contrib/debian-package.sh" in README and "install.sh: " not in README
    said = done(box, f"DESTDIR={box.folder} " + block(*texts).text).out
    assert said.startswith(f"flom {flom.VERSION} is in {box.folder}/usr/local")
    for name in ("bin/flom", "bin/flomd", "share/man/man1/flom.1"):
        assert os.path.exists(box.path(f"usr/local/{name}"))
    done(box, f"DESTDIR={box.folder} sh contrib/install.sh --uninstall")
    assert not os.path.exists(box.path("usr"))


@runs("sh contrib/install.sh --systemd", "[Daemon]\nSocketName")
def test_the_systemd_service(box, texts):
    furnish(box)
    bring(box)
    install, file = (block(text).text for text in texts)
    done(box, f"DESTDIR={box.folder} {install}")
    service = read(box.path("etc/systemd/system/flomd.service"))
    socket = re.search(r"FLOMD_OPTIONS=-s (\S+?)\"", service).group(1)
    assert "ExecStart=/usr/local/bin/flomd " in service and f"SocketName={socket}\n" in file
    assert f"ListenStream={socket}\n" in read(box.path("etc/systemd/system/flomd.socket"))
    os.makedirs(box.path("run/flom"))
    box.write("etc/flom.conf", file.replace("/run/", f"{box.folder}/run/"))
    client = "flom -c etc/flom.conf -- echo x"
    assert "forbids starting one" in done(box, client, status=99).err
    done(box, f"flomd -s {box.folder}/run/flom/socket")
    assert done(box, client).out == "x\n"


@runs("apt-get install -y etcd-server")
def test_a_host_of_a_quorum(box, texts):
    """What it installs; tests/test_etcd_real.py runs it with three hosts."""
    furnish(box)
    bring(box)
    text = block(*texts).text
    assert len(text.splitlines()) == 8
    for folder in ("usr/local/bin", "etc/systemd/system", "etc/default"):
        os.makedirs(box.path(folder))
    for prefix in ("/usr/local/", "/etc/"):
        text = text.replace(prefix, box.folder + prefix)
    done(box, text)
    events = box.events()
    assert events[2].startswith("u flom ") and [events[0], events[1], events[3]] == [
        "apt-get install -y etcd-server python3", "systemctl restart --no-block etcd",
        "systemctl enable --now flomd-quorum.service"]
    for name in ("etcd", "flomd-quorum"):
        told = re.sub("(?m)^#.*", "", read(box.path(f"etc/default/{name}")))
        assert "HERE" not in told and {"10.77.0.1", "10.77.0.2", "10.77.0.3"} == set(
            re.findall(r"\d+\.\d+\.\d+\.\d+", told))
    service = read(box.path("etc/systemd/system/flomd-quorum.service"))
    assert "ExecStart=/usr/local/bin/flomd " in service and os.path.exists(
        box.path("usr/local/bin/flomd"))
    assert "EnvironmentFile=/etc/default/flomd-quorum\n" in service


@pytest.mark.parametrize("box", ["as who I am"], indirect=True)  # it takes 15 s to give up
@runs("[Daemon]\nUnicastAddress=10.77.0.1", "flom -r backup -- backup.sh\n")
def test_the_clients_of_a_quorum(box, texts):
    """One of the addresses has a daemon: they find it, and start none when it has gone."""
    furnish(box)
    file, commands = (block(text).text for text in texts)
    assert file == re.sub("(?m)^#.*\n", "", read(CLIENTS_OF_A_QUORUM)).strip()
    port = f"UnicastPort={free_port()}\n"
    box.write(".flom", file.replace("10.77.0.", "127.0.0.").replace("[Mon", port + "[Mon") + "\n")
    assert "-d 0 forbids" in done(box, "flom -- true", status=99).err
    done(box, "flomd -d -1 -a 127.0.0.2")
    assert done(box, commands).out.startswith("memory: ")
    assert box.events() == ["backup.sh"]


@runs("import flom\n", "lock = flom.Lock")
def test_python(box, texts):
    """README has the beginning of what flom(3) has."""
    furnish(box, f"SocketName={box.socket}")
    box.daemon()
    first, synopsis = [found.text for found in BLOCKS if found.text.startswith(texts[0])]
    assert synopsis.startswith(first)
    script = box.write("script.py", synopsis + "\n" + block(texts[1]).text)
    token, red = box.start(*PYTHON, script, env={"PYTHONPATH": ROOT}).end().out.splitlines()
    assert int(token) > 2 ** 32 and red == "red"
    assert [process.poll() for process in box.processes[1:]] == [0]


@runs("flom --check-config")
def test_moving_over_from_flom(box, texts):
    furnish(box, f"SocketName={box.socket}")
    holder, gate = box.hold("a")
    pid = box.the_daemon()
    assert (comm(holder.pid), comm(pid)) == ("flom", "flomd")  # of pkill -x
    gate.open()
    assert holder.end().status == 0
    done(box, block(*texts).text)
    assert box.daemons() == []


@runs("flom --status ", "memory: file\nRESOURCE ")
def test_the_status(box, texts):
    furnish(box, f"SocketName={box.socket}")
    holder, gate = box.hold("a", "-r", "backup")
    units, other = box.hold("b", "-r", "licence[5]", "-q", "2")
    waiter = box.waiter("-r", "backup", "--", "true")
    head, *table, counts = done(box, block(texts[0]).text).out.splitlines()
    told_head, *told_table, told_counts = block(texts[1]).text.splitlines()
    assert counts == told_counts
    assert head.replace("synced", "file") == told_head  # the box has a StateDir
    shape = [[line.split()[n] for n in (0, 1, 2, -2)] for line in told_table]
    assert [[line.split()[n] for n in (0, 1, 2, -2)] for line in table] == shape
    line = done(box, "flom --status -r backup --json").out
    assert [entry["name"] for entry in json.loads(line)["resources"]] == ["backup"]
    told, shown = told_table[1].split()[3], table[1].split()[3]
    assert re.fullmatch("[0-9a-f]{8}", told)
    done(box, f"flom --evict {shown}")
    assert waiter.end().status == 0
    gate.open()
    other.open()
    assert [process.end().status for process in (holder, units)] == [95, 0]


@pytest.mark.parametrize("picture", ["         db1  "])
def test_the_picture(picture):
    """Says what flom says: group, port, lifespan."""
    text = block(picture).text
    defaults = {setting.key: setting.default for setting in flom.SETTINGS}
    assert f"port {defaults['MulticastPort']}" in text and "239.255.0.1" in text
    assert f"for {defaults['Lifespan'] // 1000} s" in text


TESTED.add("         db1  ")


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_block_is_run(number):
    text = BLOCKS[number].text
    assert [beginning for beginning in TESTED if text.startswith(beginning)], f"nobody runs {text}"
    assert BLOCKS[number].language in LANGUAGES + PAGES


def test_the_blocks_that_are_run_are_there():
    for beginning in TESTED:
        assert [block for block in BLOCKS if block.text.startswith(beginning)], beginning


# Tables and docstrings

def rows(head):
    """The rows of the table whose head begins so, as lists of cells."""
    lines = README[README.index(f"\n| {head} |") + 1:].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_of_kinds():
    told = [(name.strip("`"), kind) for name, kind, _ in rows("name")]
    assert [flom.kind_of(name) for name, _ in told] == [kind for _, kind in told]
    assert {kind for _, kind in told} == set(flomd.KINDS)


def test_the_table_of_flock():
    """What it says of flock and of flom is what flom-migration(7) says, where it is run."""
    lines = block("# flock /tmp/backup.lock backup.sh").text.splitlines()
    known = list(zip(lines[1::2], [line.replace("# ", "") for line in lines[::2]]))
    told = [(ours.strip("`"), theirs.strip("`")) for theirs, ours in rows("flock")]
    assert len(told) == 4 and told == known[:4]


def test_the_table_of_statuses():
    classes = [flom.Deadlock, flom.LockLost, flom.CannotWait, flom.Busy, flom.Timeout]
    known = {error.status for error in classes} | {flom.NOT_RUN, flom.WRONG}
    assert [int(row[0]) for row in rows("status")] == sorted(known)
    for row in rows("status"):
        assert f"\n    {row[0]}  " in flom.__doc__


def test_the_settings_that_prose_names():
    """Lengths of time that are promised."""
    defaults = {setting.key: setting.default for setting in flom.SETTINGS}
    grace = flomd.grace_for(defaults["EtcdTtl"], defaults["KillAfter"]) // 1000
    assert f"\n  {grace} s, the command cannot be killed" in README


def test_the_examples_of_the_docstring(hosts):
    """Of flom.py --help's source: the first screen of the script."""
    one, = hosts(1)
    furnish(one)
    for name in ("make", "report.sh"):
        executable(one, f"bin/{name}", PRINTS.format(log=one.log))
    executable(one, "bin/flom.py", f'{SH}exec {" ".join(PYTHON)} {FLOM_PY} "$@"\n')
    lines = [line.strip() for line in flom.__doc__.splitlines()
             if line.startswith("    flom.py ") and " -- " in line]
    assert len(lines) == 5
    for line in lines:
        command = re.split("  +", line)[0]
        local = "" if "-A" in command else f"-s {one.socket} "
        done(one, command.replace("flom.py ", f"flom.py {local}", 1))
    assert one.events() == ["make install", "backup.sh", "simulate", "report.sh", "deploy.sh"]


def test_it_is_short():
    assert len(README.splitlines()) <= 220


def test_no_line_is_too_long():
    wide = [line for line in README.splitlines() if len(line) > 100 and not line.startswith("|")]
    assert wide == []
