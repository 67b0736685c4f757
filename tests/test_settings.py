"""The settings table: types and bounds, files and their order, origins, the lines of -V."""
import os
import pwd
import re
import signal

import flom
import pytest

BY_KEY = {setting.key: setting for setting in flom.SETTINGS}


def value_of(key, *texts):
    settings = flom.Settings()
    settings.set(BY_KEY[key], texts, "here")
    return settings[key]


GOOD = [
    ("Timeout", "-1", -1), ("Timeout", "0", 0), ("Timeout", "+5", 5), ("Timeout", "0x10", 16),
    ("Timeout", "2147483647", 2147483647), ("Lifespan", "-1", -1), ("Lifespan", "0", 0),
    ("Quantity", "0", 1), ("Quantity", "3", 3), ("Quantity", "2147483647", 2147483647),
    ("IdleLifespan", "-5", 5), ("IdleLifespan", "0", 0), ("DiscoveryAttempts", "-4", 4),
    ("DiscoveryAttempts", "0", 1), ("DiscoveryTimeout", "-250", 250), ("DiscoveryTTL", "0", 0),
    ("DiscoveryTTL", "255", 255), ("UnicastPort", "1", 1), ("MulticastPort", "65535", 65535),
    ("TcpKeepaliveTime", "1", 1), ("TcpKeepaliveIntvl", "32767", 32767),
    ("TcpKeepaliveTime", "0", 1), ("TcpKeepaliveTime", "-5", 1),
    ("TcpKeepaliveIntvl", "2147483648", 32767), ("TcpKeepaliveProbes", "12345", 127),
    ("TcpKeepaliveProbes", "9" * 30, 127), ("TcpKeepaliveProbes", "127", 127),
    ("BusyStatus", "0", 0), ("BusyStatus", "255", 255),
    ("RecoveryWindow", "0", 0), ("KillAfter", "1", 1), ("MinHold", "0", 0),
    ("Name", "R1", "R1"), ("Name", "/srv/\xe9", "/srv/\xe9"), ("Name", "a[5]", "a[5]"),
    ("LockMode", "NL", 0), ("LockMode", "cr", 1), ("LockMode", "Cw", 2), ("LockMode", "PR", 3),
    ("LockMode", "PW", 4), ("LockMode", "EX", 5), ("LockMode", "NullLock", 0),
    ("LockMode", "CONCURRENTREAD", 1), ("LockMode", "concurrentwrite", 2),
    ("LockMode", "ProtectedRead", 3), ("LockMode", "ProtectedWrite", 4),
    ("LockMode", "exclusive", 5), ("SocketName", "/tmp/x", "/tmp/x"),
    ("SocketName", "/" + "x" * 106, "/" + "x" * 106), ("SocketMode", "0600", 0o600),
    ("SocketMode", "666", 0o666), ("Policy", "fair", "fair"), ("Policy", "first-fit", "first-fit"),
    ("OnLockLoss", "term", "term"), ("Deadlock", "wait", "wait"),
    ("Deadlock", "reuse", "reuse"), ("MaxResources", "0x10", 16),
    ("Timeout", "500ms", 500), ("Timeout", "5s", 5000), ("Timeout", "1.5s", 1500),
    ("Timeout", "1m", 60000), ("Timeout", "2h", 7200000), ("Timeout", "-1s", -1000),
    ("Timeout", "0.001s", 1), ("Timeout", "0s", 0), ("Lifespan", "-1m", -60000),
    ("IdleLifespan", "-1.5m", 90000), ("DiscoveryTimeout", "0.25s", 250),
    ("RecoveryWindow", "2s", 2000), ("KillAfter", "0.1h", 360000), ("MinHold", "596h", 2145600000),
    ("UnicastAddress", "db1,db2", "db1,db2"), ("CommandTraceFile", "a\nb", "a\nb"),
]
YES, NO = ["yes", "Y", "true", "1", "On"], ["no", "N", "FALSE", "0", "off"]
GOOD += [("Create", text, True) for text in YES] + [("Create", text, False) for text in NO]


@pytest.mark.parametrize("key, text, value", GOOD)
def test_good_values(key, text, value):
    assert value_of(key, text) == value


def test_a_relative_socket_is_made_absolute():
    assert value_of("SocketName", "x/../y") == os.path.join(os.getcwd(), "y")


def test_the_last_text_counts():
    assert value_of("Timeout", "1", "2") == 2


@pytest.mark.parametrize("texts, numbers", [
    (["SIGTERM"], {15}), (["15", "TERM", "sigterm"], {15}), (["hup", "SIGUSR1"], {1, 10})])
def test_signals_are_a_list(texts, numbers):
    assert set(value_of("IgnoredSignals", *texts)) == numbers


BAD = [(key, text) for keys, texts in (
    (("Timeout", "Lifespan", "Quantity", "IdleLifespan", "DiscoveryAttempts", "DiscoveryTimeout",
      "DiscoveryTTL", "UnicastPort", "MulticastPort", "BusyStatus", "RecoveryWindow", "KillAfter",
      "MinHold", "MaxResources", "TcpKeepaliveTime", "TcpKeepaliveIntvl", "TcpKeepaliveProbes"),
     ("", "x", "5x", "5 ", " 5", "1.5", "1e3", "0x", "-0x5", "--5", "9" * 100, "\u0665", "5\n",
      "0b1", "1_000")),
    (("Timeout", "Lifespan", "Quantity", "IdleLifespan", "DiscoveryAttempts", "DiscoveryTimeout",
      "DiscoveryTTL", "UnicastPort", "BusyStatus", "RecoveryWindow", "KillAfter", "MinHold",
      "MaxResources"), ("2147483648", "9" * 30)),
    (("Quantity", "DiscoveryTTL", "UnicastPort", "BusyStatus", "RecoveryWindow", "MinHold"),
     ("-1",)),
    (("UnicastPort", "MulticastPort"), ("0", "65536")), (("DiscoveryTTL", "BusyStatus"), ("256",)),
    (("Timeout",), ("-2147483648",)),
    (("Create", "SetEnv", "AppendTraceFile", "TlsCheckPeerId"), ("", "2", "yess", "ja", "yes\n")),
    (("LockMode",), ("", "XX", "5", "EXX", "EX ", "Null")),
    (("Name",), ("", "_RESOURCE", "_STATUS", "9", "a b", "a-b", "a\n", "/", "/a/", "a[0]x")),
    (("SocketName",), ("", "/" + "x" * 107, "/" + "\xe9" * 60)),
    (("SocketMode",), ("", "8", "999", "0o600", "12345", "600x")),
    (("Timeout", "Lifespan", "IdleLifespan", "DiscoveryTimeout", "RecoveryWindow", "KillAfter",
      "MinHold"), ("s", "5 s", "5S", "1.5", "1.5ms", "1.0001s", "1.s", ".5s", "0x5s", "5sm", "5ss",
                   "597h", "1e3s", "5d")),
    (("Quantity", "DiscoveryTTL", "TcpKeepaliveTime", "MaxResources"), ("5s", "1m")),
    (("Policy", "OnLockLoss", "Deadlock"), ("", "x", "Fair", "fair ")),
    (("UnicastAddress", "TlsCertificate", "StateDir"), ("",)),
    (("EtcdUrls",), ("", "h", "h:2379", "ftp://h", "http://", "http://h/", "http://h?x",
                     "http://u:p@h", "http://u@h:1", "http://h,", ",http://h", "http://::1:2379",
                     "http://[::1", "http://h:x", "http://h:0", "http://h:65536", "http://h#x",
                     "http://h, http://i")),
    (("EtcdPrefix",), ("", "/", "//", "flom/", "/flom", "/flom//x/", "/a b/", "/\xe9/")),
    (("EtcdTtl",), ("4999", "61s", "x", "-1")),
    (("Name", "SocketName", "UnicastAddress", "NetworkInterface", "CommandTraceFile", "StateDir",
      "TlsCertificate"), ("/a\0b",)),
) for key in keys for text in texts]


@pytest.mark.parametrize("key, text", BAD, ids=ascii)
def test_a_bad_value_is_an_error_that_names_origin_text_and_what_is_allowed(key, text):
    settings = flom.Settings()
    with pytest.raises(flom.UsageError) as error:
        settings.set(BY_KEY[key], [text], "the origin")
    assert str(error.value).startswith(f"the origin: {text!r} {BY_KEY[key].type.denial} ")
    assert settings[key] == BY_KEY[key].default and key not in settings.origins


@pytest.mark.parametrize("name, told", [
    ("my-backup", "a simple name has letters and digits only; '/my-backup' may hold anything"),
    ("a/b", "a simple name has letters and digits only; '/a/b' may hold anything"),
    ("9lives", "a simple name begins with a letter; '/9lives' may hold anything")])
def test_who_takes_any_text_for_a_name_is_told_how_to_write_it(name, told):
    with pytest.raises(flom.UsageError) as error:
        flom.Settings().set(BY_KEY["Name"], [name], "-r")
    assert str(error.value) == f"-r: {name!r} is no resource name: {told}"
    written = re.search("'(/.*)'", told).group(1)
    assert flom.kind_of(written) == "hierarchical"


@pytest.mark.parametrize("name", ["", "/", "/a//b", "a\\b", "a[x]", "_s_a", "_t_%Y", "_RESOURCE"])
def test_who_means_another_kind_is_told_all_forms(name):
    with pytest.raises(flom.UsageError) as error:
        flom.Settings().set(BY_KEY["Name"], [name], "-r")
    assert "is no resource name (NAME NAME[N] A.B.C /A/B " in str(error.value)


def test_what_nobody_sets_has_its_default_and_no_origin():
    settings = flom.Settings(Lifespan=-1)
    assert settings["Lifespan"] == -1
    assert settings["Timeout"] == -1
    assert settings["Quantity"] == 1
    assert settings.origins == {} and settings.values == {}


def test_a_value_equal_to_the_default_is_set_all_the_same(tmp_path):
    settings = flom.Settings()
    read(settings, tmp_path, "[Resource]\nTimeout=7\n")
    settings.set(BY_KEY["Timeout"], ["-1"], "-o")
    assert settings["Timeout"] == -1 and settings.origins["Timeout"] == "-o"


# Files

def read(settings, tmp_path, text, name="flom.conf"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    settings.read_file(str(path), required=True)
    return str(path)


def test_the_syntax_of_files(tmp_path):
    settings = flom.Settings()
    path = read(settings, tmp_path, "\n".join([
        "# comment", "", "[Resource]", "Name=R1", "  Timeout =  20 ", "\tQuantity\t=\t4",
        "Create=no", "[Daemon]", r"SocketName=/tmp/a\sb\t\n\r\\", "[Trace]",
        'DaemonTraceFile="50%"', "\r",
        "[Monitor]\t ", "IgnoredSignals=SIGTERM;2;;hup;", "[Resource]", "Timeout=30", "LockMode=",
        "[Network]", "NetworkInterface=a=b;c"]))
    assert [settings[key] for key in ("Name", "Timeout", "Quantity", "Create", "LockMode")] == [
        "R1", 30, 4, False, 5]
    assert settings["SocketName"] == "/tmp/a b\t\n\r\\"
    assert settings["DaemonTraceFile"] == '"50%"'
    assert set(settings["IgnoredSignals"]) == {15, 2, 1}
    assert settings["NetworkInterface"] == "a=b;c"
    assert settings.origins["Timeout"] == f"{path}:16: [Resource]/Timeout"
    assert "LockMode" not in settings.values and settings.warnings == []


LIKE_GKEYFILE = [  # what follows [Trace], what FLoM's reader of files makes of the value
    ("DaemonTraceFile = a  ", "a  "), ("\f DaemonTraceFile\f=\f\ta\r", "a"),
    ("DaemonTraceFile=a # b", "a # b"), ("DaemonTraceFile==a", "=a"),
    ("DaemonTraceFile=a\\x\\sb", "a\\x b"), ("DaemonTraceFile=a\\;b", "a\\;b"),
    ("DaemonTraceFile=a\\", "a"), ("DaemonTraceFile=a\nDaemonTraceFile=", "a"),
    ("DaemonTraceFile=\xa0a", "\xa0a"), ("#DaemonTraceFile=a", None), ("  # [x", None),
    ("[Mine]\n[Trace]\nDaemonTraceFile=a", "a")]


@pytest.mark.parametrize("text, value", LIKE_GKEYFILE)
def test_blanks_escapes_and_comments_are_those_of_gkeyfile(tmp_path, text, value):
    settings = flom.Settings()
    read(settings, tmp_path, f"[Trace]\n{text}\n")
    assert settings["DaemonTraceFile"] == value and settings.warnings == []


@pytest.mark.parametrize("text, value", [("5  ", 5), ("PR\t", 3), ("true ", True)])
def test_blanks_behind_a_number_or_a_word_do_not_count(tmp_path, text, value):
    key = {5: "Timeout", 3: "LockMode", True: "Create"}[value]
    settings = flom.Settings()
    read(settings, tmp_path, f"[Resource]\n{key}={text}\n")
    assert settings[key] == value


@pytest.mark.parametrize("key", ["Na#me", "Name[de]", "Na me", "Name#", "\vName", ";Name", "name"])
def test_what_gkeyfile_takes_for_another_key_is_unknown(tmp_path, key):
    settings = flom.Settings()
    path = read(settings, tmp_path, f"[Resource]\n{key} = x\nTimeout=5\n")
    assert settings.warnings == [f"{path}:2: [Resource]/{key}: unknown key, ignored"]
    assert settings["Timeout"] == 5 and "Name" not in settings.values


def test_a_list_is_split_at_semicolons_and_nowhere_else(tmp_path):
    """A blank belongs to what it stands beside, as in GKeyFile: such a signal is unknown."""
    settings = flom.Settings()
    path = read(settings, tmp_path, "[Monitor]\nIgnoredSignals=SIGTERM; SIGUSR1;\\sx\\;;HUP\n")
    assert settings["IgnoredSignals"] == (15, 1)
    assert settings.warnings == [
        f"{path}:2: [Monitor]/IgnoredSignals: {text!r} is not a signal that --signal-list lists; "
        "ignored" for text in (" SIGUSR1", " x;")]


@pytest.mark.parametrize("text", ["", "0", "99", "SIGNO", "-1", "SIG", "15x"])
def test_an_unknown_signal_is_a_warning(text):
    settings = flom.Settings()
    settings.set(BY_KEY["IgnoredSignals"], [text, "TERM"], "--ignore-signal")
    assert settings["IgnoredSignals"] == (15,)
    assert settings.warnings == [f"--ignore-signal: {text!r} is not a signal that --signal-list "
                                 "lists; ignored"]


def test_each_file_overrides_the_one_before(tmp_path):
    settings = flom.Settings()
    read(settings, tmp_path, "[Resource]\nName=a\nTimeout=1\n", "1")
    read(settings, tmp_path, "[Resource]\nName=b\n", "2")
    assert (settings["Name"], settings["Timeout"]) == ("b", 1)


def an_example(setting):
    """A text for a setting, whose value is not the default."""
    if setting.type is flom.FLAG:
        return "no" if setting.default else "yes"
    if isinstance(setting.type, flom.Words):
        return setting.type.words[1]
    if setting.key == "EtcdTtl":
        return "9s"
    examples = {flom.Urls: "http://h:1,https://[::1]:2", flom.Prefix: "/flom/x/",
                flom.Path: "x", flom.Text: "x", flom.ResourceName: "R1", flom.Mode: "PR",
                flom.SocketPath: "/tmp/x", flom.Signal: "SIGTERM", flom.Octal: "0600"}
    return examples.get(type(setting.type), "9")


@pytest.mark.parametrize("setting", flom.SETTINGS, ids=lambda setting: setting.key)
def test_a_type_reads_what_it_writes(setting):
    value = setting.type.read(an_example(setting))
    written = setting.type.write(value)
    assert setting.type.write(setting.type.read(written)) == written
    if not isinstance(setting.type, flom.Path):  # what is relative becomes absolute
        assert setting.type.read(written) == value


def test_signals_have_the_names_of_the_system():
    """Python has no name for 16 before 3.11."""
    assert value_of("IgnoredSignals", "SIGSTKFLT", "stkflt", "16") == (16, 16, 16)
    settings = flom.Settings()
    settings.set(BY_KEY["IgnoredSignals"], ["16"], "here")
    assert "[Monitor]/IgnoredSignals='SIGSTKFLT'" in list(settings.lines())


def test_every_key_can_stand_in_a_file(tmp_path):
    for setting in flom.SETTINGS:
        settings, value = flom.Settings(), an_example(setting)
        read(settings, tmp_path, f"[{setting.group}]\n{setting.key}={value}\n")
        assert setting.key in settings.values, setting
        assert settings[setting.key] != setting.default and settings.warnings == []


def test_the_documented_keys_are_there():
    documented = {
        "Trace": "DaemonTraceFile CommandTraceFile AppendTraceFile Verbose",
        "Resource": "Name Timeout Quantity LockMode Create IdleLifespan",
        "Daemon": "SocketName Lifespan UnicastAddress UnicastPort MulticastAddress MulticastPort "
                  "MountPointVFS SocketMode Policy RecoveryWindow StateDir AllowRemoteShutdown "
                  "MaxResources",
        "Quorum": "EtcdUrls EtcdPrefix EtcdState EtcdUser EtcdPasswordFile EtcdCa "
                  "EtcdCertificate EtcdPrivateKey EtcdTtl EtcdCompact",
        "Monitor": "IgnoredSignals OnLockLoss KillAfter Deadlock Quiet Progress SetEnv "
                   "ElementArgument MinHold BusyStatus",
        "Network": "NetworkInterface DiscoveryAttempts DiscoveryTimeout DiscoveryTTL "
                   "TcpKeepaliveTime TcpKeepaliveIntvl TcpKeepaliveProbes",
        "TLS": "TlsCertificate TlsPrivateKey TlsCaCertificate TlsCheckPeerId"}
    pairs = {(group, key) for group, keys in documented.items() for key in keys.split()}
    assert pairs <= {(setting.group, setting.key) for setting in flom.SETTINGS}


@pytest.mark.parametrize("field", ["short", "long", "key"])
def test_no_option_and_no_key_twice(field):
    words = [getattr(setting, field) for setting in flom.SETTINGS if getattr(setting, field)]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("text, line", [
    ("[Resource]\nTimeout=x\n", 2), ("[Resource]\nName=_x\n", 2),
    ("# a\n\n[Daemon]\nLifespan=1w", 4), ("[Resource]\nk]=1\n", 2), ("[]\n", 1), ("[G]x\n", 1),
    ("[Resource]\nTimeout\n", 2), ("[[G]\n", 1), ("[Resource]\n[k=1\n", 2), ("\ufeff[G]\n", 1),
    ("[Resource\n", 1),
    ("[Resource]\nTimeout=1\n=5\n", 3), ("[Resource]\nCreate=maybe\n", 2)])
def test_what_is_wrong_in_a_file_names_file_and_line(tmp_path, text, line):
    with pytest.raises(flom.UsageError) as error:
        read(flom.Settings(), tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / 'flom.conf'}:{line}: ")
    assert re.search(" is not | is no resource name", str(error.value))


@pytest.mark.parametrize("text", ["[Resource]\nTimeOut=5\n", "[Daemon]\nName=a\n", "Timeout=5\n",
                                  "[Mine]\nx=y\n"])
def test_an_unknown_key_is_a_warning(tmp_path, text):
    settings = flom.Settings()
    path = read(settings, tmp_path, text)
    assert len(settings.warnings) == 1 and settings.values == {}
    assert settings.warnings[0].startswith(f"{path}:{text.count(chr(10))}: ")


def test_bytes_that_are_not_utf8_come_through(tmp_path):
    settings = flom.Settings()
    read(settings, tmp_path, b"[Resource]\nName=/a\xff\n# \xfe\n")
    assert os.fsencode(settings["Name"]) == b"/a\xff"


def test_a_user_without_a_home_has_no_file(tmp_path, monkeypatch):
    """As in a container, where the number of a user has no name; `~` is then an ordinary name."""
    def getpwuid(uid):
        raise KeyError(uid)

    os.mkdir(str(tmp_path / "~"))
    (tmp_path / "~" / ".flom").write_text("[Resource]\nName=stranger\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    settings = flom.Settings()
    settings.read_files()
    assert settings.values.get("Name") != "stranger"


def test_a_missing_file_is_an_error_only_where_it_is_required(tmp_path):
    settings = flom.Settings()
    settings.read_file(str(tmp_path / "none"))
    settings.read_file(str(tmp_path / "none" / "none"))
    with pytest.raises(flom.UsageError) as error:
        settings.read_file(str(tmp_path / "none"), required=True)
    assert str(error.value) == f"{tmp_path / 'none'}: No such file or directory"


def not_readable(tmp_path):
    """{what is wrong: a path}."""
    os.mkfifo(str(tmp_path / "fifo"))
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "long").write_bytes(b"#" * (flom.LONGEST_FILE + 1))
    return {"it is not a regular file": [str(tmp_path / "fifo"), "/dev/zero"],
            "Is a directory": [str(tmp_path)],
            "Too many levels of symbolic links": [str(tmp_path / "loop")],
            f"it is longer than {flom.LONGEST_FILE} bytes": [str(tmp_path / "long")]}


def test_what_cannot_be_read_is_a_warning_at_once(tmp_path):
    for why, paths in not_readable(tmp_path).items():
        for path in paths:
            settings = flom.Settings()
            settings.read_file(path)
            assert settings.warnings == [f"{path}: {why}; it is not read"]


def test_what_was_asked_for_and_cannot_be_read_is_an_error(tmp_path):
    paths = [path for paths in not_readable(tmp_path).values() for path in paths]
    for path in paths:
        if "fifo" not in path:  # who names one, waits for its writer
            with pytest.raises(flom.UsageError):
                flom.Settings().read_file(path, required=True)


def test_what_was_asked_for_may_be_a_pipe():
    reading, writing = os.pipe()
    os.write(writing, b"[Resource]\nTimeout=5\n")
    os.close(writing)
    settings = flom.Settings()
    settings.read_file(f"/dev/fd/{reading}", required=True)
    os.close(reading)
    assert settings["Timeout"] == 5


def test_tls_files_are_relative_to_the_file_that_names_them(tmp_path):
    (tmp_path / "here.pem").write_text("")
    settings = flom.Settings()
    read(settings, tmp_path, "[TLS]\nTlsCertificate=here.pem\nTlsPrivateKey=there.pem\n")
    assert settings["TlsCertificate"] == str(tmp_path / "here.pem")
    assert settings["TlsPrivateKey"] == "there.pem"


# -V

VERBOSE = """\
[Trace]/DaemonTraceFile=''
[Trace]/CommandTraceFile=''
[Trace]/AppendTraceFile=0
[Trace]/Verbose=0
[Resource]/Name='_RESOURCE'
[Resource]/Timeout=-1
[Resource]/Quantity=1
[Resource]/LockMode=5
[Resource]/Create=1
[Resource]/IdleLifespan=0
[Daemon]/SocketName=''
[Daemon]/Lifespan=5000
[Daemon]/UnicastAddress=''
[Daemon]/UnicastPort=28015
[Daemon]/MulticastAddress=''
[Daemon]/MulticastPort=28015
[Daemon]/MountPointVFS=''
[Monitor]/IgnoredSignals=''
[Network]/NetworkInterface=''
[Network]/DiscoveryAttempts=2
[Network]/DiscoveryTimeout=500
[Network]/DiscoveryTTL=1
[Network]/TcpKeepaliveTime=60
[Network]/TcpKeepaliveIntvl=10
[Network]/TcpKeepaliveProbes=6
[TLS]/TlsCertificate=''
[TLS]/TlsPrivateKey=''
[TLS]/TlsCaCertificate=''
[TLS]/TlsCheckPeerId=0
""".splitlines()


def test_the_lines_of_verbose_are_floms_and_then_ours():
    lines = list(flom.Settings().lines())
    assert lines[:len(VERBOSE)] == VERBOSE
    assert "[Daemon]/Policy='fair'" in lines[len(VERBOSE):]


def test_signals_are_shown_in_the_order_of_their_numbers():
    settings = flom.Settings()
    numbers = [str(int(number)) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]
    settings.set(BY_KEY["IgnoredSignals"], numbers, "--ignore-signal")
    assert "[Monitor]/IgnoredSignals='SIGHUP;SIGUSR1;SIGTERM'" in list(settings.lines())


def test_what_is_set_is_shown():
    settings = flom.Settings()
    for key, text in (("Name", "R1"), ("LockMode", "pr"), ("Timeout", "-7"), ("Create", "no")):
        settings.set(BY_KEY[key], [text], "here")
    shown = {"[Resource]/Name='R1'", "[Resource]/LockMode=3", "[Resource]/Timeout=-7",
             "[Resource]/Create=0"}
    assert shown <= set(settings.lines())


# The machine's id and addresses

def test_the_machine_id_is_32_hex_digits_and_stays():
    first = flom.machine_id()
    assert len(first) == 32
    assert set(first) <= set("0123456789abcdef")
    assert flom.machine_id() == first


def test_a_client_skips_what_is_for_daemons_alone(tmp_path):
    """A mistake in it is the daemon's."""
    path = tmp_path / "flom.conf"
    path.write_text("[Quorum]\nEtcdTtl=soon\nColour=red\n[Resource]\nTimeout=7\n")
    options, settings = flom.read_arguments(["-c", str(path), "--", "true"]), flom.Settings()
    flom.option_settings(options, settings)
    assert settings.warnings == [] and settings["EtcdTtl"] == 10000
    assert flom.keyword_settings({}, (str(path),))["Timeout"] == settings["Timeout"] == 7
    with pytest.raises(flom.UsageError):
        read(flom.Settings(), tmp_path, "[Quorum]\nEtcdTtl=soon\n")


def test_a_client_hands_nothing_of_a_quorum_on():
    """Its file may be the one that the daemon of this host reads, too."""
    settings = flom.Settings()
    settings.values["MaxResources"] = 7
    for setting in flom.SETTINGS:
        if setting.group == "Quorum":
            settings.values[setting.key] = setting.default
    options = list(flom.daemon_options(settings))
    assert "--max-resources=7" in options
    assert not [option for option in options if "etcd" in option]
