"""The command line of flom.py: argv, stdout, stderr, status.

What is refused or only printed is tried inside this process, what runs a command in a box.
"""
import os
import re
import shlex
import signal
import sys

import flom
import pytest
from test_settings import VERBOSE
from world import FLOM_PY, FLOMD_PY, PYTHON, ROOT, read

BAD = {  # for each type of setting, texts that are wrong
    flom.Text: [""], flom.Path: [""], flom.Flag: ["", "maybe", "2"],
    flom.ResourceName: ["", "a b", "_x", "_RESOURCE", "/", "a[2147483648]"],
    flom.Mode: ["", "XX", "5"], flom.SocketPath: ["", "/" + "x" * 107], flom.Signal: [],
    flom.Words: ["", "best"], flom.Number: ["", "x", "-1", "65536x", "2147483648"],
    flom.Units: ["", "-1", "2147483648"], flom.Attempts: ["", "x", "2147483648"],
    flom.KernelNumber: ["", "x"], flom.Span: ["", "x", "0x", "2147483648"],
    flom.Time: ["", "x", "5x", "1.5", "5 s", "597h", "2147483648", "-2147483648"]}
BOUNDS = {"UnicastPort": ["0", "65536", "http"], "MulticastPort": ["0", "65536"],
          "DiscoveryTTL": ["256"], "BusyStatus": ["256"], "KillAfter": ["-1"], "MinHold": ["-1"]}
CLIENTS = [setting for setting in flom.SETTINGS if flom.CLIENT in setting.users]
WRONG_TEXTS = [(setting, text) for setting in CLIENTS if not setting.switch
               for text in BAD[type(setting.type)] + BOUNDS.get(setting.key, [])]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*argv): (status, stdout, stderr) of flom's main, here; HOME is an empty folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    name, mask = comm(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handlers = {number: signal.getsignal(number) for number in signal.Signals}
    monkeypatch.setattr(flom, "Claim", no_lock)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["flom"] + list(argv))
        try:
            status = flom.run() or 0
        except SystemExit as end:
            status = end.code
        return (status,) + tuple(capsys.readouterr())

    yield run
    for number in handlers:
        if signal.getsignal(number) is not handlers[number]:
            signal.signal(number, handlers[number])
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    comm(name)


def no_lock(*_, **__):
    raise AssertionError("flom would run the command")


def comm(name=None):
    """The name of this process, which flom changes."""
    try:
        with open("/proc/self/comm", "w" if name else "r") as file:
            return file.write(name) if name else file.read().strip()
    except OSError:
        return None


def is_usage_error(result, *words):
    """One line on stderr that holds these words, nothing on stdout, status 99."""
    status, out, err = result
    assert (status, out, err.count("\n")) == (99, "", 1) and err.startswith("flom: "), result
    for word in words:
        assert word in err, result
    return True


# What is wrong

@pytest.mark.parametrize("setting, text", [
    pytest.param(setting, text, id=f"{setting.long}={text[:20]}")
    for setting, text in WRONG_TEXTS])
def test_a_bad_value_names_option_value_and_what_is_allowed(run, setting, text):
    command = ["--", "touch", "ran"]
    assert is_usage_error(run(f"--{setting.long}={text}", *command),
                          f"flom: --{setting.long}: {text!r} {setting.type.denial} ")
    if setting.short and text:
        assert is_usage_error(run(f"-{setting.short}", text, *command),
                              f"flom: -{setting.short}: {text!r} {setting.type.denial} ")
    assert not os.path.exists("ran")


@pytest.mark.parametrize("setting, text", [
    pytest.param(setting, text, id=f"{setting.key}={text[:20]}")
    for setting, text in WRONG_TEXTS if text])
def test_a_bad_value_in_a_file_names_file_line_and_key(run, setting, text):
    with open("conf", "w") as file:
        file.write(f"# first\n[{setting.group}]\n{setting.key}={text}\n")
    with open(".flom", "w") as file:
        file.write("[Resource]\nName=fine\n")
    said = f"conf:3: [{setting.group}]/{setting.key}: {text!r} {setting.type.denial} "
    assert is_usage_error(run("-c", "conf", "--", "touch", "ran"), said)
    os.rename("conf", ".flom")
    assert is_usage_error(run("--", "touch", "ran"), f"{os.getcwd()}/.flom:3: ", repr(text))
    assert not os.path.exists("ran")


WRONG = [
    (["--no-such-option", "--", "true"], "--no-such-option"),
    (["-Z", "--", "true"], "-Z"),
    (["--resource-na=a", "--", "true"], "--resource-na"),
    (["--resource-tim", "5", "--", "true"], "--resource-tim"),
    (["--verb", "--", "true"], "--verb"),
    (["--verbose=1", "--", "true"], "--verbose"),
    (["-o"], "-o"), (["--resource-name"], "--resource-name"), (["-c"], "-c"), (["-xo"], "-o"),
    (["-o", "--", "true"], "-o"), (["-s", "-V", "ls"], "-s"), (["--quiet=", "ls"], "--quiet"),
    (["-V5", "ls"], "5"), (["-V-", "ls"], "-V"), (["-=", "ls"], "-="), (["-1", "ls"], "-1"),
    (["-c", "none", "--", "true"], "none: No such file or directory"),
    (["-c", "", "--", "true"], "-c: '' is not a file name\n"),
    (["--nosuch", "-o", "5"], "flom: '--nosuch' is not an option that --help lists\n"),
    (["--min-hold"], "flom: --min-hold: no value is given\n"),
    (["-d", "-5x", "true"], "flom: -d: '-5x' is not a time (5000, 5s, 1m; "),
    (["--json=1"], "flom: --json: '1' is not expected: the option has no value\n"),
    (["-s", "/tmp/x", "-a", "127.0.0.1", "--", "true"], "-s: not together with -a"),
    (["-A", "239.255.0.1", "-s", "/tmp/x", "--", "true"], "-s: not together with -A"),
    (["-n", "nosuch0", "--", "true"], "-n: 'nosuch0' is not"),
    (["--tls-certificate", "/x", "--", "true"], "--tls-certificate", "--tls-private-key"),
    (["--tls-private-key=/x", "--tls-ca-certificate=/y", "--", "true"], "--tls-"),
    (["-x", "true"], "-x: 'true' is not run"), (["--status", "--", "ls"], "--status", "'ls'"),
    (["--unique-id", "-V", "ls", "-l"], "--unique-id: 'ls'"), (["--json", "ls"], "--json: 'ls'"),
    (["--evict", "0123456789abcdef", "ls"], "--evict: 'ls'"), (["--evict"], "--evict"),
    (["-q", "5", "-q", "x", "--", "true"], "-q: 'x' is not a number from 1 to 2147483647"),
    (["-o5x", "ls"], "-o: '5x' is not a time (5000, 5s, 1m; -1 waits for ever, 0 does not wait)\n"),
    (["-o", "597h", "ls"], "-o: '597h' is not from -2147483647 to 2147483647 ms\n"),
]


@pytest.mark.parametrize("argv", [pytest.param(row, id=" ".join(row[0])) for row in WRONG])
def test_wrong_command_lines(run, argv):
    assert is_usage_error(run(*argv[0]), *argv[1:])


@pytest.mark.parametrize("group", ["10.0.0.1", "::1", "127.0.0.1", "255.255.255.255"])
def test_what_is_no_group(box, group):
    done = box.run("-A", group, "--", "echo", "x", address=())
    assert is_usage_error(done, f"-A: {group!r} is not ")


@pytest.mark.parametrize("first, second", [("~", "-c"), ("~", "argv"), ("-c", "argv")])
def test_socket_and_address_exclude_each_other_wherever_they_come_from(run, first, second):
    argv = ["--", "true"]
    for place, (key, option, value) in ((first, ("SocketName", "-s", "/tmp/x")),
                                        (second, ("UnicastAddress", "-a", "127.0.0.1"))):
        if place == "argv":
            argv = [option, value] + argv
            continue
        with open(".flom" if place == "~" else "conf", "w") as file:
            file.write(f"[Daemon]\n{key}={value}\n")
        argv = argv if place == "~" else ["-c", "conf"] + argv
    assert is_usage_error(run(*argv), "SocketName" if first != "argv" else "-s")


@pytest.mark.parametrize("argv", [[], ["-r", "a"], ["--"], ["-V"], ["-o", "5", "--"]])
def test_no_command(run, argv):
    status, out, err = run(*argv)
    assert (status, err) == (97, "No command to execute!\n")
    assert ("-V" in argv) == bool(out)


# What is printed

def test_version_and_help(run):
    assert run("--version") == run("-v") == (0, f"flom {flom.VERSION}\n", "")
    status, out, err = run("--help")
    assert (status, err) == (0, "") and run("-h") == (0, out, "")
    for setting in CLIENTS:
        assert f"--{setting.long}" in out
    assert max(map(len, out.splitlines())) < 80


def test_help_is_in_the_order_of_need(run):
    _, out, _ = run("--help")
    assert re.findall("^([A-Z][A-Za-z ]*):$", out, re.MULTILINE) == [
        "The lock", "While the command waits and runs", "Reports and orders", "The daemon",
        "Network", "TLS", "Logs", "General", "The form of a NAME tells its kind", "Examples"]
    assert {setting.group for setting in flom.SETTINGS} <= set(flom.HELP_GROUPS)


def test_help_tells_values_and_defaults(run):
    words = " ".join(run("--help")[1].split())
    for told in ("--resource-timeout MS how long to wait; 0: not at all, -1: for ever "
                 "(default -1)", "--config-file FILE read", "--quiet no line",
                 "--resource-create yes|no create the resource if it does not exist (default yes)",
                 "--lock-mode MODE NL CR CW PR PW or EX, also by their long names (default EX)"):
        assert told in words, told
    for setting in CLIENTS:
        if not setting.switch and setting.default not in (None, (), flom.DEFAULT_RESOURCE):
            text = words.split(f"--{setting.long} {setting.type.hint} ")[1].split(" --")[0]
            assert f"(default {setting.type.write(setting.default)})" in text, setting.long


def test_help_has_every_kind_of_name_and_ten_examples(run):
    text = run("--help")[1].split("General:")[1]
    kinds, examples = text.split("The form of a NAME")[1].split("Examples:\n")
    rows = re.findall("^  (\\S+?)(?:, \\S+)?  +(the same|[a-z]+)[:;]", kinds, re.MULTILINE)
    assert [flom.kind_of(name) for name, _ in rows] == [
        "sequence" if kind == "the same" else kind for _, kind in rows]
    assert {flom.kind_of(name) for name, _ in rows} == {kind for kind, _ in flom._FORMS}
    assert len(examples.splitlines()) == 10
    for line in examples.splitlines():
        _, *words = shlex.split(re.split("  +", line.strip())[0])
        options = flom.read_arguments(words)
        settings = flom.Settings()
        settings.take_options(options.given)
        assert bool(options.command) == ("--status" not in words)


def test_signal_list(run):
    status, out, err = run("--signal-list")
    assert (status, err) == (0, "") and out.endswith("\n")
    lines = out.split("\n")
    assert lines[0] == "1) SIGHUP\t2) SIGINT\t3) SIGQUIT\t4) SIGILL\t"
    numbers = [int(number) for number in re.findall(r"(\d+)\) SIG[A-Z0-9]+\t", out)]
    assert numbers == list(range(1, 32))
    for number in signal.Signals:  # Python has no name for 16 before 3.11
        assert number > 31 or f"{int(number)}) {number.name}\t" in out
    assert all(line.count("\t") == 4 for line in lines[:7])


def test_unique_id(run):
    assert run("--unique-id") == (0, flom.machine_id() + "\n", "")


def shown(run, *argv):
    """What -V prints of the settings, {path: text}; nothing else is printed, nothing run."""
    status, out, err = run("-V", *argv)
    assert (status, err) == (97, "No command to execute!\n"), err
    return dict(line.split("=", 1) for line in out.splitlines())


def test_verbose_prints_the_configuration_first(run):
    lines = run("-V")[1].splitlines()
    expected = [line.replace("Verbose=0", "Verbose=1") for line in VERBOSE]
    assert lines[:len(expected)] == expected
    assert len(lines) == len(flom.SETTINGS) and run("--verbose")[1].splitlines() == lines


ACCEPTED = [
    (["-o", "5"], "[Resource]/Timeout", "5"), (["-o5"], "[Resource]/Timeout", "5"),
    (["-o=5"], "[Resource]/Timeout", "5"), (["-Vo", "5"], "[Resource]/Timeout", "5"),
    (["-Vo-5"], "[Resource]/Timeout", "-5"), (["-r", "/-x"], "[Resource]/Name", "'/-x'"),
    (["-a=b=c"], "[Daemon]/UnicastAddress", "'b=c'"),
    (["--unicast-address=b=c"], "[Daemon]/UnicastAddress", "'b=c'"),
    (["--resource-timeout=5"], "[Resource]/Timeout", "5"),
    (["--resource-timeout", "5"], "[Resource]/Timeout", "5"),
    (["-o", "-1"], "[Resource]/Timeout", "-1"), (["-o-7"], "[Resource]/Timeout", "-7"),
    (["-o", "0x1F"], "[Resource]/Timeout", "31"), (["-d", "-1"], "[Daemon]/Lifespan", "-1"),
    (["--daemon-lifespan", "-1"], "[Daemon]/Lifespan", "-1"),
    (["-o", "1", "-o", "2"], "[Resource]/Timeout", "2"), (["-q", "0"], "[Resource]/Quantity", "1"),
    (["-D", "0"], "[Network]/DiscoveryAttempts", "1"),
    (["-D", "-3"], "[Network]/DiscoveryAttempts", "3"),
    (["-I", "-250"], "[Network]/DiscoveryTimeout", "250"),
    (["-i", "-9"], "[Resource]/IdleLifespan", "9"), (["-l", "pw"], "[Resource]/LockMode", "4"),
    (["-l", "ConcurrentRead"], "[Resource]/LockMode", "1"),
    (["-e", "no"], "[Resource]/Create", "0"),
    (["-e", "OFF"], "[Resource]/Create", "0"),
    (["-r", "/a b/\xe9"], "[Resource]/Name", "'/a b/\xe9'"),
    (["-s", "x"], "[Daemon]/SocketName", None), (["-p", "65535"], "[Daemon]/UnicastPort", "65535"),
    (["--ignore-signal", "TERM", "--ignore-signal=1"], "[Monitor]/IgnoredSignals",
     "'SIGHUP;SIGTERM'"),
    (["--ignore-signal", "sigusr1"], "[Monitor]/IgnoredSignals", "'SIGUSR1'"),
    (["-m", "/x"], "[Daemon]/MountPointVFS", "'/x'"),
    (["-t", "x"], "[Trace]/DaemonTraceFile", "'x'"),
    (["--busy-status", "0"], "[Monitor]/BusyStatus", "0"),
    (["--quiet"], "[Monitor]/Quiet", "1"), (["--progress", "no"], "[Monitor]/Progress", "0"),
    (["-o", "1.5s"], "[Resource]/Timeout", "1500"), (["-d2h"], "[Daemon]/Lifespan", "7200000"),
    (["-o", "-1s"], "[Resource]/Timeout", "-1000"),
    (["--allow-remote-shutdown"], "[Daemon]/AllowRemoteShutdown", "1"),
]


@pytest.mark.parametrize("argv, path, text", [
    pytest.param(*row, id=" ".join(row[0])) for row in ACCEPTED])
def test_what_options_mean(run, argv, path, text):
    assert shown(run, *argv)[path] == (text or f"'{os.getcwd()}/x'")


def test_each_source_overrides_the_one_before(run):
    with open(".flom", "w") as file:
        file.write("[Resource]\nName=home\nTimeout=1\nQuantity=1\nIdleLifespan=1\n")
    with open("conf", "w") as file:
        file.write("[Resource]\nTimeout=2\nQuantity=2\nIdleLifespan=2\n")
    found = shown(run, "-c", "conf", "-q", "3", "-i", "0")
    assert [found[f"[Resource]/{key}"] for key in (
        "Name", "Timeout", "Quantity", "IdleLifespan")] == ["'home'", "2", "3", "0"]


def test_an_unknown_key_is_a_warning_that_names_file_and_line(run):
    with open(".flom", "w") as file:
        file.write("[Resource]\n\nNmae=x\n")
    status, _, err = run()
    warning, last = err.splitlines()
    assert (status, last) == (97, "No command to execute!")
    assert warning.startswith("flom: warning: ")
    assert ".flom:3: " in warning
    assert "Nmae" in warning


# What runs a command

ARGUMENTS = [
    (["echo", "-n", "-o", "5"], "-o 5"), (["--", "echo", "-r", "a"], "-r a\n"),
    (["--", "echo", "--", "x", "--"], "-- x --\n"), (["echo", "--", "-V"], "-- -V\n"),
    (["-r", "a", "echo", "-r", "b"], "-r b\n"), (["--lock-mode", "PR", "echo", "-V"], "-V\n"),
    (["-V", "-r", "a", "--", "echo", "tail"], None)]


@pytest.mark.parametrize("argv, out", [
    pytest.param(*row, id=" ".join(row[0])) for row in ARGUMENTS])
def test_the_command_is_untouched(box, argv, out):
    status, printed, err = box.run(*argv)
    assert (status, err) == (0, "")
    assert printed == out if out else printed.splitlines()[-1] == "tail"


def test_every_file_in_its_place(box):
    """stdin, stdout, stderr, working directory and umask are the command's."""
    code = "cat; pwd; umask; echo oops >&2"
    with open(box.write("input", "text\n")) as file:
        done = box.run("--", "sh", "-c", code, stdin=file, cwd="/usr",
                       preexec_fn=lambda: os.umask(0o027))
    assert done == (0, "text\n/usr\n0027\n", "oops\n")


def test_the_environment_of_the_command(box):
    show = ["sh", "-c", 'env | grep ^FLOM_ | sort']
    status, out, err = box.run("-r", "R1", "-l", "PR", "--", *show, env={"FLOM_ELEMENT": "outer"})
    found = dict(line.split("=", 1) for line in out.splitlines())
    assert (status, err, sorted(found)) == (
        0, "", ["FLOM_MODE", "FLOM_RESOURCE", "FLOM_SESSION", "FLOM_TOKEN"])
    assert found["FLOM_RESOURCE"] == "R1" and found["FLOM_MODE"] == "PR"
    assert int(found["FLOM_TOKEN"]) > 2 ** 32
    assert re.fullmatch("[0-9a-f]{16}", found["FLOM_SESSION"])
    assert box.run("--set-env", "no", "--", *show).out.startswith("FLOM_SESSION=")


def test_statuses_pass_through(box):
    box.daemon()
    for number in (0, 1, 94, 99, 127, 255):
        assert box.run("--", "sh", "-c", f"exit {number}") == (number, "", "")
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGPIPE):
        assert box.run("--", "sh", "-c", f"kill -{int(number)} $$") == (128 + number, "", "")


def test_a_command_that_died_of_int_makes_flom_die_of_int(box):
    assert box.run("--", "sh", "-c", "kill -2 $$") == (-signal.SIGINT, "", "")


NOT_THERE, DENIED = "No such file or directory", "Permission denied"
NOT_RUN = [("nosuchcommand", NOT_THERE), ("/nonexistent/x", NOT_THERE), ("", NOT_THERE),
           ("/etc/passwd", DENIED), ("/", DENIED)]


@pytest.mark.parametrize("command, why", NOT_RUN)
def test_what_cannot_be_executed(box, command, why):
    done = box.run("--", command, "x", env={"PATH": os.defpath})
    assert done == (97, "", f"flom: cannot execute {command!r}: {why}\n")
    assert box.run("-o", "0", "--", "echo", "free") == (0, "free\n", "")


def test_the_daemon_is_looked_for_and_the_two_ways_out_are_named(box):
    copy = box.write("flom.py", read(FLOM_PY))
    done = box.start(sys.executable, copy, *box.address, "--", "echo", "x",
                     env={"PATH": "/usr/bin:/bin"}).end()
    assert done[:2] == (99, "")
    assert done.err.count("\n") == 1
    assert box.folder in done.err
    assert "PATH" in done.err
    named = box.start(sys.executable, copy, *box.address, "--", "echo", "x",
                      env={"FLOMD": "/nonexistent/flomd.py"}).end()
    assert named[:2] == (99, "") and "/nonexistent/flomd.py" in named.err


def test_a_link_to_flom_finds_the_daemon_beside_the_file(box):
    os.symlink(FLOM_PY, box.path("flom"))
    done = box.start(sys.executable, box.path("flom"), *box.address, "--", "echo", "x").end()
    assert done == (0, "x\n", "")


@pytest.mark.parametrize("flags", [["--json"], ["--watch", "--json"], ["--json", "-r", "a"]])
def test_json_and_watch_mean_status(box, flags):
    """None of them starts a daemon; in FLoM's place a command would be missing."""
    status, out, err = box.run(*flags)
    assert (status, out) == (99, "") and err.startswith("flom: no daemon at ")


@pytest.mark.parametrize("flag", ["-xV", "-Vx"])
def test_flags_bundle(box, flag):
    box.daemon()
    status, out, err = box.run(flag)
    assert (status, err) == (0, "") and out.startswith("[Trace]/DaemonTraceFile=''\n")
    assert out.endswith("Starting FLoM daemon quiesce shutdown...\n")


def test_verbose_tells_who_is_waited_for(box):
    holder, gate = box.hold("a", "-r", "R1", "-l", "PR")
    first = box.waiter("-r", "R1", "--", "true")
    second = box.waiter("-r", "R1", "--", "true")
    assert first.err.startswith("waiting for R1, place 1") and "place 2" in second.err
    gate.open()
    assert [process.end().status for process in (holder, first, second)] == [0, 0, 0]


TOLD = [(["-r", "R1", "-q", "2"], "-q: a simple resource has no quantity; ignored"),
        (["-r", "a[2]", "-l", "PR"], "-l: a numeric resource has no modes; ignored"),
        (["-r", "_s_a[2]", "-q", "2"], "-q: a sequence resource has no quantity; ignored"),
        (["-r", "backup.sh"], "'backup.sh' is a set of 2 slots (backup, sh); for a file name "
                              "write '/backup.sh'"),
        (["-r", "a.b.c"], "'a.b.c' is a set of 3 slots (a, b, c); for a file name write "
                          "'/a.b.c'")]


@pytest.mark.parametrize("options, line", TOLD)
def test_what_may_be_a_mistake_is_told_on_a_terminal_and_with_verbose(box, options, line):
    assert box.run(*options, "--", "true") == (0, "", "")
    assert box.run("-V", *options, "--", "true").err == f"{line}\n"
    screen, terminal = os.openpty()
    assert box.run(*options, "--", "true", stderr=terminal).status == 0
    os.close(terminal)
    assert os.read(screen, 999).decode() == f"flom: {line}\r\n"
    os.close(screen)


@pytest.mark.parametrize("options", [
    ["-r", "/a", "-l", "PR"], ["-r", "a[2]", "-q", "2"], ["-q", "0"], ["-l", "EX"]], ids=" ".join)
def test_what_has_a_meaning_is_not_told(box, options):
    assert box.run("-V", *options, "--", "true").err == ""


@pytest.mark.parametrize("size, said", [(46000, ""), (60000, "flom: -r: a name of 60000 "
                         "characters is too long for a request\n")])
def test_a_name_that_no_daemon_would_read_is_an_error_at_once(box, size, said):
    done = box.run("-r", "/" + "x" * (size - 1), "--", "true")
    assert (done.err, bool(done.status)) == (said, bool(said))


# What users of FLoM type: options, the command, what is printed, what is said (a pattern), status.

SAID = {
    "busy": r"Resource already locked, the lock cannot be obtained \(held by .* for 00:00:..\)\n",
    "late": r"The lock was not obtained because timeout \(100 milliseconds\) expired\n",
    "none": r"The resource could be available in the future, but the requester can't wait\n",
    "never": r"Resource will never satisfy the request, the lock cannot be obtained\n",
    "no command": r"No command to execute!\n",
    "unknown": r"flom: warning: --ignore-signal: 'SIGXXXX' is not a signal that .*; ignored\n"}
LIKE_FLOM = [
    ("-r R1 -o 0 -l EX -q 1 -e yes -i 0 -- echo a", "a\n", "", 0),
    ("--resource-name=R1 --resource-timeout=0 --resource-quantity=1 --resource-create=no "
     "--resource-idle-lifespan=1000 --lock-mode=Exclusive -- echo a", "a\n", "", 0),
    ("-r R1 echo -n", "", "", 0), ("-r R1 -- false", "", "", 1), ("-r R1", "", "no command", 97),
    ("-q 0 -D 0 -I -5 -i -5 -o -5 -d -1 -- echo a", "a\n", "", 0),
    ("-r red.blue -- echo", "red\n", "", 0), ("-r _S_n[1] -- echo a", "a 1\n", "", 0),
    ("-r held -o 0 -- echo a", "", "busy", 98), ("-r held -o 100 -- echo a", "", "late", 98),
    ("-r held -o 0 --quiet -- echo a", "", "", 98), ("-r held -o 100 --quiet -- true", "", "", 98),
    ("-r held -o 0 --quiet --busy-status 0 -- echo a", "", "", 0),
    ("-r none -e no -o 0 -- echo a", "", "none", 96),
    ("-r none -e no -o 0 --quiet -- true", "", "", 96),
    ("-r a[2] -q 3 -- echo a", "", "never", 99), ("-r a[2] -q 3 --quiet -- true", "", "never", 99),
    ("--quiet -- /none", "", "flom: cannot execute '/none': No such file or directory\n", 97),
    ("--tcp-keepalive-time=0 --tcp-keepalive-intvl=99999 --tcp-keepalive-probes=12345 -- echo a",
     "a\n", "", 0),
    ("--ignore-signal SIGXXXX --ignore-signal=SIGHUP -- echo a", "a\n", "unknown", 0),
    ("--unique-id", flom.machine_id() + "\n", "", 0), ("--version", "flom .*\n", "", 0),
    ("-r _t_%d[1] -- true", "", "flom: the daemon does not accept the name '_t_%d\\[1\\]': its "
     "format must tell the hour at least .*\n", 99),
    ("-X --check-config", "", "flom: --check-config: not together with -X\n", 99),
    ("-x echo a", "", "flom: -x: 'echo' is not run beside it\n", 99),
    ("-X -- echo a", "", "flom: -X: 'echo' is not run beside it\n", 99)]


def test_what_users_of_flom_type(box):
    box.daemon()
    holder, gate = box.hold("a", "-r", "held")
    for line, out, err, status in LIKE_FLOM:
        done = box.run(*line.split())
        assert done.status == status and re.fullmatch(out, done.out), (line, done)
        assert re.fullmatch(SAID.get(err, err), done.err), (line, done)
    gate.open()
    assert holder.end().status == 0


@pytest.mark.parametrize("argv, text", [
    (["--tls-certificate=/x"], "--tls-certificate: TLS wants all of "),
    (["-s", "/x", "-a", "db1"], "-s: not together with -a: "),
    (["-n", "nosuch0"], "-n: 'nosuch0' is not a network interface")])
def test_verbose_prints_the_settings_before_what_is_wrong_with_them(run, argv, text):
    status, out, err = run("-V", *argv, "--", "true")
    assert status == 99
    assert len(out.splitlines()) == len(flom.SETTINGS)
    assert err.startswith(f"flom: {text}")
    assert err.count("\n") == 1


# Places that are not as they should be

@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["--signal-list"], ["--unique-id"]])
def test_whose_reader_has_gone_ends_as_any_program(box, argv):
    reading, writing = os.pipe()
    os.close(reading)
    done = box.run(*argv, stdout=writing)
    os.close(writing)
    assert done == (-signal.SIGPIPE, "", "")


def test_an_error_is_one_line_that_a_terminal_shows(run):
    assert is_usage_error(run("--no\n\33[7m", "--", "true"), "--no\\n\\x1b[7m")


@pytest.mark.parametrize("program", ["flom", "flomd"])
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_what_cannot_be_written_is_an_error(box, program, option):
    with open("/dev/full", "w") as full:
        done = getattr(box, program)(option, stdout=full).end()
    assert done == (99, "", f"{program}: cannot write to stdout: No space left on device\n")


GONE = [(option, "x") for option in ("-s", "-t", "-T", "-m", "--state-dir", "--tls-certificate")]


@pytest.mark.parametrize("program, argv", [("flom", [*option, "--", "true"]) for option in GONE] + [
    ("flomd", option) for option in GONE if option[0] != "-T"] + [
    ("flomd", (option, "x")) for option in ("--pid-file", "--metrics", "--log")])
def test_a_relative_path_in_a_directory_that_is_gone(box, program, argv):
    os.mkdir(box.path("gone"))
    remove = ["/bin/sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', box.path("gone")]
    script = FLOM_PY if program == "flom" else FLOMD_PY
    done = box.start(*remove, *PYTHON, script, *argv).end()
    assert (done.status, done.out) == (99, "")
    assert done.err.startswith(f"{program}: ") and done.err.endswith(
        f"{argv[0]}: 'x' is not an absolute path, and the current directory is gone\n")


def test_a_trace_that_nobody_reads_is_an_error_at_once(box):
    os.mkfifo(box.path("trace"))
    done = box.run("-T", box.path("trace"), "--", "true")
    assert is_usage_error(done, f"flom: -T: '{box.path('trace')}' is not a file that can be ")
    reader = os.open(box.path("trace"), os.O_RDONLY | os.O_NONBLOCK)
    assert box.run("-T", box.path("trace"), "-r", "a.b", "--", "echo", "x") == (0, "x a\n", "")
    assert b"Locked element is 'a'" in os.read(reader, 9999)
    os.close(reader)


def test_in_a_directory_that_is_gone_all_else_works(box):
    os.mkdir(box.path("gone"))
    remove = ["/bin/sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', box.path("gone")]
    done = box.start(*remove, *PYTHON, FLOM_PY, *box.address, "--", "echo", "x").end()
    assert done == (0, "x\n", "")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_a_home_whose_settings_cannot_be_read(box, make):
    make(box.path(".flom"))
    done = box.run("--", "echo", "x")
    assert done[:2] == (0, "x\n") and done.err.count("\n") == 1
    assert done.err.startswith(f"flom: warning: {box.path('.flom')}: ")
    daemon = box.flomd("-s", box.path("other"), "-d", "0").end()
    assert daemon.status == 0
    assert daemon.err.startswith(f"flomd: warning: {box.path('.flom')}: ")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_a_home_of_another_user_that_cannot_be_entered(box):
    os.chmod(box.folder, 0o755)
    os.mkdir(box.path("home"), 0o700)
    as_nobody = f"""
import os, pwd, sys
sys.path.insert(0, {ROOT!r})
import flom
flom.read_arguments([])  # imports what this user cannot
os.setgroups([])
os.setuid(65534)
os.environ["HOME"] = {box.path('home')!r}
sys.argv[1:] = ["-s", "/tmp/none", "-d", "0", "--", "true"]
flom.main()
"""
    done = box.start(*PYTHON, "-c", as_nobody).end()
    first, last = done.err.splitlines()
    assert done.status == 99 and last.startswith("flom: no daemon at /tmp/none")
    assert first == f"flom: warning: {box.path('home')}/.flom: Permission denied; it is not read"
