"""contrib/: init scripts start and stop a daemon, completions complete, man pages tell the truth.

What the shells and man pages say of options and exit statuses is compared with the programs.  A
tool that is not installed skips its test; the same files are also read without it.
"""
import ast
import base64
import glob
import hashlib
import inspect
import json
import os
import plistlib
import re
import shlex
import shutil
import signal
import socket
import stat
import sys
import types
import zipfile

import flom
import flomd
import pytest

from world import (
    FLOM, FLOM_PY, FLOMD_PY, PYTHON, ROOT, can_connect, comm, read, wait_until)

CONTRIB = os.path.join(ROOT, "contrib")
FLOM_SOURCE = os.path.join(ROOT, "flom.py")  # as text: FLOM_PY is compiled
MODES = set(flom.MODES + flom.LONG_MODES)


def contrib(*names):
    return os.path.join(CONTRIB, *names)


def need(*programs):
    """Skips the test unless all are installed."""
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")


def flom_options(capsys):
    with pytest.raises(SystemExit):
        flom.read_arguments(["--help"])
    columns = re.findall("^  (-.*?)(?:  |$)", capsys.readouterr().out, re.MULTILINE)
    return set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", " ".join(columns)))


def flomd_options():
    parser = flomd.make_parser(types.SimpleNamespace(given={}))
    return {name for option in parser.options for name in option.names}


@pytest.fixture
def options(capsys):
    """{program: its options}."""
    return {"flom": flom_options(capsys), "flomd": flomd_options()}


# The annotated configuration file

EXAMPLE = contrib("examples", "flom.conf")


def test_the_example_sets_nothing():
    settings = flom.Settings()
    settings.read_file(EXAMPLE, required=True)
    assert settings.values == {} and settings.warnings == []


def test_every_line_of_the_example_is_a_default(tmp_path):
    text = re.sub(r"^#(?=[A-Z]\w*=)", "", read(EXAMPLE), flags=re.MULTILINE)
    path = tmp_path / "flom.conf"
    path.write_text(text)
    settings = flom.Settings()
    settings.read_file(str(path), required=True)
    assert settings.warnings == []
    assert settings.values == {
        setting.key: setting.default for setting in flom.SETTINGS
        if setting.default not in (None, (), flom.DEFAULT_RESOURCE)}
    assert sorted(keys_by_group(text)) == sorted((s.group, s.key) for s in flom.SETTINGS)


def keys_by_group(text):
    group = None
    for head, key in re.findall(r"^(?:\[(\w+)\]|(\w+)=.*)$", text, re.MULTILINE):
        group = head or group
        if key:
            yield group, key


# The man pages

PAGES = sorted(glob.glob(contrib("man", "*")))


def page(name):
    return read(contrib("man", name)).replace(r"\-", "-").replace(r"\&", "")


def section(text, title):
    return re.search(rf"^\.Sh {title}\n(.*?)(?=^\.Sh |\Z)", text, re.MULTILINE | re.DOTALL).group(1)


def items(text):
    """(what is described, its description) of the items of all lists."""
    return re.findall(r"^\.It (.*)\n((?:(?!\.It |\.El).*\n)*)", text, re.MULTILINE)


def flags(text):
    return {f"-{name}" for name in re.findall(r"\bFl (-?[A-Za-z][\w-]*)", text)}


def test_there_are_these_pages():
    names = [os.path.basename(path) for path in PAGES]
    assert names == ["flom-migration.7", "flom-protocol.7", "flom-safety.7",
                     "flom-semantics.7", "flom-tls.7", "flom.1", "flom.3", "flom.conf.5",
                     "flomd.8"]


@pytest.mark.parametrize("name, program", [("flom.1", "flom"), ("flomd.8", "flomd")])
def test_a_page_describes_the_options_that_there_are(options, name, program):
    described = [flag for head, _ in items(section(page(name), "OPTIONS")) for flag in flags(head)]
    assert sorted(described) == sorted(options[program])


@pytest.mark.parametrize("name", [os.path.basename(path) for path in PAGES])
def test_pages_name_no_option_that_is_not_there(options, name):
    assert flags(page(name)) <= options["flom"] | options["flomd"]


def test_the_pages_describe_the_exit_statuses():
    statuses = {kind.status for kind in flom.LockError.__subclasses__()} | {
        flom.NOT_RUN, flom.WRONG}
    described = [int(head) for head, _ in items(section(page("flom.1"), "EXIT STATUS"))]
    assert sorted(described) == sorted(statuses)
    told = re.findall(r"\b\d+\b", flomd.__doc__.split("Exit status:")[1])
    described = [head for head, _ in items(section(page("flomd.8"), "EXIT STATUS"))]
    assert sorted(described) == sorted(told)


def test_the_configuration_page_describes_the_settings():
    found = []
    for group, text in re.findall(r"^\.Ss Group (\w+)\n(.*?)(?=^\.S)", page("flom.conf.5"),
                                  re.MULTILINE | re.DOTALL):
        found += [(group, head[len("Li "):]) for head, _ in items(text)]
    assert sorted(found) == sorted((s.group, s.key) for s in flom.SETTINGS)


@pytest.mark.parametrize("name, marks", [
    ("flom.1", {s.key: f"--{s.long}" for s in flom.SETTINGS if flom.CLIENT in s.users}),
    ("flom.conf.5", {s.key: s.key for s in flom.SETTINGS})])
def test_the_pages_tell_the_numbers_that_are_defaults(name, marks):
    texts = {}
    for head, text in items(page(name)):
        texts.update(dict.fromkeys(flags(head) | {head[len("Li "):]}, text))
    for setting in flom.SETTINGS:
        number = type(setting.default) is int and setting.key != "LockMode"
        if number and setting.key in marks:
            assert re.search(rf"(?<![\w-]){setting.default}\b", texts[marks[setting.key]]), setting


def test_the_protocol_page_knows_all_codes_and_numbers():
    text = page("flom-protocol.7")
    codes = {int(code) for code in re.findall(r"^\.It (-?\d+) Ta", text, re.MULTILINE)}
    assert codes == {flom.OK, flom.ENQUEUED, flom.WAIT_RESOURCE, flom.BUSY, flom.CANT_WAIT,
                     flom.IMPOSSIBLE, flom.INVALID_NAME, flom.DEADLOCK, flom.STOPPED, flom.LIMIT,
                     flom.EVICTED}
    assert [name for name in flom._NUMBERS if not re.search(rf"\b{name}\b", text)] == []


def test_the_semantics_page_has_the_table_of_modes():
    rows = re.findall(r"^\.It ([A-Z]{2}) (\w+)((?: Ta (?:yes|no)){6})$",
                      section(page("flom-semantics.7"), "MODES"), re.MULTILINE)
    assert [row[:2] for row in rows] == list(zip(flom.MODES, flom.LONG_MODES))
    for (_, _, cells), conflicts in zip(rows, flomd.CONFLICTS):
        told = cells.replace(" Ta", "").split()
        assert [word == "no" for word in told] == [mode in conflicts for mode in range(6)]


def test_the_semantics_page_has_examples_of_all_kinds():
    rows = re.findall(r"^\.It (\w*) ?Ta .* Ta (\S+)$",
                      section(page("flom-semantics.7"), "NAMES AND KINDS"), re.MULTILINE)
    told = [(kind or "sequence", example) for kind, example in rows]
    assert [flom.kind_of(example) for _, example in told] == [kind for kind, _ in told]
    assert {kind for kind, _ in told} == set(flomd.KINDS)


def test_the_semantics_page_has_all_intervals():
    rows = re.findall(r'^\.It Li "(.*)" Ta',
                      section(page("flom-semantics.7"), "TIMESTAMPS"), re.MULTILINE)
    known = [tokens for tokens, _ in [*flomd.FRACTIONS, *flomd.CONVERSIONS]]
    assert " ".join(rows).split() == " ".join(known).split()


def test_the_safety_page_tells_the_times_of_a_quorum():
    """Of the settings by default."""
    text, ttl, kill = page("flom-safety.7"), 10, 5
    defaults = {setting.key: setting.default for setting in flom.SETTINGS}
    assert [defaults[key] for key in ("EtcdTtl", "KillAfter")] == [1000 * ttl, 1000 * kill]
    keepalive = [defaults[f"TcpKeepalive{key}"] for key in ("Time", "Probes", "Intvl")]
    assert keepalive == [60, 6, 10] and r"(60 s + 6 \(mu 10 s)" in text
    times, grace = flomd.Times(1000 * ttl), flomd.grace_for(1000 * ttl, 1000 * kill) / 1000
    term = grace - kill - 1
    assert f"{term:.0f} seconds and KILL\nafter {term + kill:.0f}." in text
    assert f"for {grace:.0f} seconds from its\nclaim" in text
    worst = [0, times.lead, ttl, term, term + kill, ttl + grace]
    told = re.findall(r"^\.It (\d+) s$", section(text, "A QUORUM"), re.MULTILINE)
    assert [int(second) for second in told] == worst


DIFFERS = r"FILE|HOST|ID|N|NAME|ELEMENT|CLIENT|REASON|ADDRESS|PREFIX|URL|VERSION"


def test_the_lines_of_the_log_are_those_of_the_daemon():
    """Words in capitals and ... stand for what differs."""
    said = "\n".join(texts_in(FLOMD_PY))
    lines = [head for head, _ in items(section(page("flomd.8"), "DIAGNOSTICS"))]
    assert len(lines) > 30
    for line in lines:
        for part in re.split(rf"\b(?:{DIFFERS})\b|\.\.\.|[;:'\"]", line[len("Li "):]):
            assert part.strip(" ,") in said, line


def texts_in(path):
    """The texts in a script; those of an f-string in parts."""
    for node in ast.walk(ast.parse(read(path))):
        field = {"Constant": "value", "Str": "s"}.get(type(node).__name__)  # Python 3.6: Str
        text = field and getattr(node, field)
        if isinstance(text, str):
            yield text


@pytest.mark.processes
@pytest.mark.parametrize("path", PAGES, ids=os.path.basename)
def test_the_pages_are_well_formed(box, path):
    """mandoc's complaint about pages that are not installed here is not about this page."""
    if shutil.which("mandoc"):
        done = box.start("mandoc", "-T", "lint", path).end()
        assert [line for line in done.out.splitlines()
                if "referenced manual not found" not in line] == []
    else:
        need("groff")
        done = box.start("groff", "-ww", "-mandoc", "-Tascii", path).end()
        assert (done.status, done.err) == (0, "")


# What is told to those who work on it

def test_hacking_names_what_there_is(options):
    """Paths, the names in the scripts, options."""
    text = read(contrib("HACKING.md"))
    quoted = set(re.findall("`([^`]+)`", text))
    path = r"[\w./-]+(\.(py|md|1|5|7|8|json|conf)|/)"
    paths = {word for word in quoted if re.fullmatch(path, word)}
    assert len(paths) > 20 and [path for path in paths if "KIND" not in path
                                and not os.path.exists(os.path.join(ROOT, path))] == []
    how_to = text.split("## How to add")[1].split("\n## ")[0]
    names = set(re.findall(r"`(_?[A-Z]{5,}|(?!test_)\w*_\w+)`", how_to))
    known = names_in_the_scripts()
    assert len(names) > 10 and [name for name in names if name not in known] == []
    dotted = set(re.findall(r"\b[A-Z][a-z]\w*\.\w+", text)) - {"HACKING.md", "CHANGELOG.md"}
    assert len(dotted) > 20 and [name for name in dotted if name not in known] == []
    both = options["flom"] | options["flomd"] | {"--copy"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= both


def names_in_the_scripts():
    """The names of both scripts; those of a class alone, and behind the name of the class."""
    known = set()
    for script in (flom, flomd):
        known.update(vars(script))
        for kind in filter(inspect.isclass, vars(script).values()):
            known.update(dir(kind))
            known.update(f"{kind.__name__}.{name}" for name in dir(kind))
    return known


@pytest.mark.parametrize("path", [FLOM_PY, FLOMD_PY], ids=["flom", "flomd"])
def test_hacking_lists_the_sections(path):
    name = os.path.basename(path)
    table = read(contrib("HACKING.md")).split(f"The sections of `{name}`:\n\n")[1]
    told = re.findall(r"^\| (.*?) \|", table.split("\n\n")[0], re.MULTILINE)[1:]
    assert told == re.findall(r"^# --- (.*?) -+$", read(os.path.join(ROOT, name)), re.MULTILINE)


def test_hacking_names_every_folder():
    text = read(contrib("HACKING.md"))
    for folder in os.listdir(CONTRIB):
        name = f"contrib/{folder}"
        if os.path.isdir(contrib(folder)) and folder != "__pycache__":
            assert f"`{name}/`" in text, name


def test_the_changelog_names_what_there_is(options):
    text = read(contrib("CHANGELOG.md"))
    both = options["flom"] | options["flomd"]
    assert set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*(?=[` =])", text)) <= both


# Completion

def long_options(text):
    return set(re.findall(r"(?<![\w$-])--[a-z][a-z-]+", text))


@pytest.mark.parametrize("name", ["bash/flom", "zsh/_flom", "fish/flom.fish"])
def test_a_completion_has_the_options_that_there_are(options, name):
    text = read(contrib("completion", *name.split("/")))
    text = re.sub(r"\$of (-s . )?-l ", " --", text).replace("--do-complete", "")
    assert long_options(text) == long_options(" ".join(options["flom"] | options["flomd"]))


BASH = """
. "$1"; shift
compopt() { :; }
for line; do
    read -ra COMP_WORDS <<<"${line//=/ = }"
    [[ $line == *[\\ =] ]] && COMP_WORDS+=('')
    [[ $line == *= ]] && unset "COMP_WORDS[${#COMP_WORDS[@]}-1]"
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_LINE=$line COMP_POINT=${#line} COMPREPLY=()
    $(complete -p "${COMP_WORDS[0]}" | sed 's/.*-F //; s/ .*//')
    printf '[%s]\\n' "$line"
    printf '%s\\n' "${COMPREPLY[@]}"
done
"""
# A second zsh, at a terminal of its own, completes; what it finds is caught at compadd.
ZSH = r"""
zmodload zsh/zpty
folder=$1 out=$HOME/zsh.out; shift
cat >$HOME/zsh.setup <<X
PS1= PS2= fpath=($folder \$fpath)
autoload -Uz compinit && compinit -u -D
compadd() {
    local -a found
    if [[ " \${argv[1,(i)--]} " == *' '-[OAD]* ]]; then builtin compadd "\$@"; return; fi
    builtin compadd -A found "\$@"
    (( \$#found )) && print -rl -- \$found >>$out
    return \$(( ! \$#found ))
}
ready() { comppostfuncs=(ready); print -r -- 'this is ''done' }
comppostfuncs=(ready)
bindkey '^I' complete-word
bindkey '^U' kill-whole-line
print 'this is ''done'
X
zpty z zsh -f -i
zpty -w z "source $HOME/zsh.setup"
zpty -r z chunk '*this is done*'
for line; do
    print -r -- "[$line]" >>$out
    zpty -w -n z $'\C-u'"$line"$'\t'
    zpty -r z chunk '*this is done*'
done
zpty -d z
cat $out
"""
FISH = """
source $argv[1]
for line in $argv[2..-1]
    echo "[$line]"
    complete "--do-complete=$line" | string split -f1 \\t
end
true
"""
SHELLS = {"bash": (["bash", "--norc", "-c", BASH, "bash"], "bash/flom"),
          "zsh": (["zsh", "-f", "-c", ZSH, "zsh"], "zsh"),
          "fish": (["fish", "-c", FISH], "fish/flom.fish")}


def complete(box, shell, lines, file=None, **more):
    """{line: the words that the shell offers for its end, of paths the last part}."""
    need(shell)
    argv, usual = SHELLS[shell]
    done = box.start(*argv, contrib("completion", *(file or usual).split("/")), *lines,
                     **more).end()
    assert (done.status, done.err) == (0, "")
    found = {}
    for text in done.out.splitlines():
        if text[:1] + text[-1:] == "[]" and text[1:-1] in lines:
            offered = found[text[1:-1]] = set()
        elif text:
            offered.add(os.path.basename(text.rstrip("/")))
    return found


@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_options_are_completed(box, options, shell):
    found = complete(box, shell, ["flom -", "flomd -", "flom.py --sta", "flom -V --sta"])
    assert found["flom -"] == options["flom"]
    assert found["flomd -"] == options["flomd"]
    assert found["flom -V --sta"] == {"--status", "--state-dir"}
    assert found["flom.py --sta"] == {"--status", "--state-dir"}


@pytest.mark.parametrize("shell, file", [("bash", "bash/flomd"), ("fish", "fish/flomd.fish")])
def test_the_file_that_is_read_for_flomd(box, options, shell, file):
    assert complete(box, shell, ["flomd -"], file) == {"flomd -": options["flomd"]}


@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_values_are_completed(box, shell):
    path = box.write("a.conf", "")
    os.mkdir(box.path("a.folder"))
    found = complete(box, shell, [
        "flom -l ", "flom -Vl ", "flom --lock-mode=Ex", "flom --ignore-signal SIGTER", "flom -n ",
        f"flom -c {path[:-3]}", f"flom --state-dir {box.path('a.f')}", "flom -o ",
        "flom --on-lock-loss ", "flom --deadlock ", "flom --progress ", "flom --policy ",
        "flom -e ", "flomd --log sy", "flomd --log-level ", f"flomd -f --pid-file {path[:-3]}"])
    known = os.path.isdir("/sys/class/net")  # a chroot need not have it
    interfaces = {name for _, name in socket.if_nameindex()} if known else set()
    assert [found[line] for line in sorted(found)] == [words for _, words in sorted({
        "flom -l ": MODES, "flom -Vl ": MODES, "flom -n ": interfaces, "flom -o ": set(),
        "flom --lock-mode=Ex": {("--lock-mode=" if shell == "fish" else "") + "Exclusive"},
        "flom --ignore-signal SIGTER": {"SIGTERM"}, f"flom -c {path[:-3]}": {"a.conf"},
        f"flom --state-dir {box.path('a.f')}": {"a.folder"}, "flom -e ": {"yes", "no"},
        "flom --on-lock-loss ": {"warn", "term", "ignore"}, "flomd --log sy": {"syslog"},
        "flom --deadlock ": {"fail", "wait", "reuse"}, "flom --progress ": {"yes", "no"},
        "flom --policy ": {"fair", "first-fit"},
        "flomd --log-level ": set(flomd.LEVELS), f"flomd -f --pid-file {path[:-3]}": {"a.conf"},
    }.items())]


@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_names_and_ids_are_those_that_the_daemon_has(box, shell):
    """The daemon that the options before mean; without one there are none, and none is started."""
    python = " ".join(PYTHON)
    os.chmod(box.write("flom", f'#!/bin/sh\nexec {python} {FLOM} "$@"\n'), 0o755)
    path = f"{box.folder}:{os.environ['PATH']}"
    where = f"-s {box.socket}"
    lines = [f"flom {where} -r ", f"flom --socket-name={box.socket} --evict ",
             f"flom {where} -V -r /srv/", f"flom {where} --resource-name=lic"]
    assert not any(complete(box, shell, lines, env={"PATH": path}).values())
    assert box.daemons() == []
    names = ["licence[5]", "/srv/db", "/srv/a b", "red.green"]
    holders = [box.hold(f"g{number}", "-r", name) for number, name in enumerate(names)]
    report = json.loads(box.run("--status", "--json").out)
    ids = {entry["id"][:8] for resource in report["resources"] for entry in resource["holders"]}
    found = complete(box, shell, lines, env={"PATH": path})

    def shown(name):
        if shell != "fish":  # fish quotes when it inserts
            name = re.sub(r"([\[\] ])", r"\\\1", name)
        return os.path.basename(name)
    option = "--resource-name=" if shell == "fish" else ""
    known = [set(map(shown, names)), ids, set(map(shown, names[1:3])), {option + shown(names[0])}]
    assert [found[line] for line in lines] == known
    for holder, gate in holders:
        gate.open()
        assert holder.end().status == 0


@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_the_command_is_completed(box, shell):
    path = box.write("a.conf", "")
    first = ["flom touc", "flom -- touc", "flom -V -o 5 touc", "flom -o5 --set-env=no -- touc"]
    files = [f"flom cat {path[:-3]}", f"flom -r x -- cat {path[:-3]}"]
    found = complete(box, shell, first + files + ["flom cat --statu", "flom -- cat --statu"])
    assert all("touch" in found[line] for line in first)
    assert [found[line] for line in files] == [{"a.conf"}] * 2
    assert not found["flom cat --statu"] | found["flom -- cat --statu"]


# Shell scripts

SCRIPTS = ["sysvinit/flomd", "openrc/flomd", "runit/flomd/run", "runit/flomd/finish",
           "runit/flomd/log/run", "checksums.sh", "tls/make-certificates.sh",
           "install.sh", "debian-package.sh"]


@pytest.mark.processes
@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "busybox sh"])
def test_the_scripts_are_for_every_shell(box, shell):
    need(shell.split()[0])
    for script in SCRIPTS:
        path = contrib(*script.split("/"))
        assert os.stat(path).st_mode & stat.S_IXUSR
        assert box.start(*shell.split(), "-n", path).end() == (0, "", "")


def test_the_checksums_are_what_sha256sum_checks(box):
    expected = ""
    for path in (FLOM_PY, FLOMD_PY):
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        expected += f"{digest}  {os.path.basename(path)}\n"
    assert box.start(contrib("checksums.sh")).end() == (0, expected, "")
    os.symlink(shutil.which("sed"), box.path("sed"))
    os.chmod(box.write("python3", f"#!/bin/sh\nexec {sys.executable} \"$@\"\n"), 0o755)
    poor = box.start("/bin/sh", contrib("checksums.sh"), ROOT, env={"PATH": box.folder})
    assert poor.end() == (0, expected, "")
    empty = box.start("/bin/sh", contrib("checksums.sh"), box.folder).end()
    assert empty.status and empty.out == "" and "flom.py" in empty.err


# Installation

@pytest.fixture
def back_end(monkeypatch):
    """The build back end, on a stand-in for poetry-core that makes the wheel x-1.0."""
    def build_wheel(folder, config_settings=None, metadata_directory=None):
        with zipfile.ZipFile(os.path.join(folder, "x.whl"), "w") as wheel:
            wheel.writestr("x.py", "pass")
            wheel.writestr("x-1.0.dist-info/RECORD", "x.py,,\nx-1.0.dist-info/RECORD,,\n")
        return "x.whl"

    for name in ("poetry", "poetry.core", "poetry.core.masonry", "poetry.core.masonry.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["poetry.core.masonry.api"].build_wheel = build_wheel
    sys.modules["poetry.core.masonry"].api = sys.modules["poetry.core.masonry.api"]
    monkeypatch.syspath_prepend(contrib("packaging"))
    yield __import__("wheel_with_share")
    del sys.modules["wheel_with_share"]


def test_the_wheel_has_pages_and_completions(back_end, tmp_path):
    assert back_end.build_wheel(str(tmp_path)) == "x.whl"
    with zipfile.ZipFile(str(tmp_path / "x.whl")) as wheel:
        names = set(wheel.namelist()) - {"x.py", "x-1.0.dist-info/RECORD"}
        rows = [row.rsplit(",", 2) for row in
                wheel.read("x-1.0.dist-info/RECORD").decode().splitlines()]
        assert {name for name, _, _ in rows[2:]} == names and wheel.testzip() is None
        for name, digest, size in rows[2:]:
            data = wheel.read(name)
            made = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            assert (digest, int(size)) == (f"sha256={made}", len(data))
    share = "x-1.0.data/data/share/"
    assert {f"{share}man/man{path[-1]}/{os.path.basename(path)}" for path in PAGES} < names
    assert {share + name for name in (
        "bash-completion/completions/flom", "zsh/site-functions/_flom",
        "fish/vendor_completions.d/flom.fish", "doc/flom/flom.conf")} < names
    assert "flom-stubs/__init__.pyi" in names


# The stubs

STUBS = os.path.join("packaging", "flom-stubs")
CALLER = '''\
import datetime

import flom


def lost(lock: flom.Lock) -> None:
    print(lock.name, lock.token)


@flom.Lock("a[2]", quantity=2)
def double(number: int) -> int:
    return 2 * number


@flom.AsyncLock("b")(timeout=5)
async def triple(number: int) -> int:
    async with flom.AsyncLock("R") as held, held.timeout(5):
        await held.check()
    return 3 * double(number)


@flom.Lock("c")
async def half(number: int) -> float:
    return await triple(number) / 6


def main() -> "str | None":
    lock = flom.Lock("R", "PR", datetime.timedelta(seconds=5), on_lost=lost, reentrant=True)
    with lock, lock.timeout(0.5) as again, lock(timeout="5") as other:
        print(again.locked() or other.lost)
    try:
        lock.acquire(blocking=False).release(rollback=True)
    except flom.Timeout as error:
        print(error.reason, error.status + 1)
    for entry in flom.status(resource_name="R")["resources"]:
        print(entry)
    return lock.element
'''


@pytest.mark.skipif(sys.version_info < (3, 9), reason="ast.unparse is of 3.9")
def test_the_stubs_are_those_of_flom(monkeypatch):
    monkeypatch.syspath_prepend(contrib("packaging"))
    make_stubs = __import__("make_stubs")
    try:
        assert make_stubs.stubs(read(FLOM_SOURCE)) == read(contrib(STUBS, "__init__.pyi")), \
            "python3 contrib/packaging/make_stubs.py"
    finally:
        del sys.modules["make_stubs"]


def test_a_typed_program(box):
    """mypy --strict finds nothing in a program, and what is wrong, by the stubs."""
    if box.start(sys.executable, "-c", "import mypy").end().status:
        pytest.skip("mypy is not installed; tox -e type has it")
    made = box.start(sys.executable, "-m", "venv", "--without-pip", box.path("venv")).end()
    assert made.status == 0, made.err
    (site,) = glob.glob(box.path("venv/lib/python*/site-packages"))
    shutil.copytree(contrib(STUBS), os.path.join(site, "flom-stubs"))
    shutil.copy(FLOM_SOURCE, site)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", box.path("cache"),
            "--python-executable", box.path("venv/bin/python")]
    done = box.start(*mypy, box.write("good.py", CALLER), cwd=box.folder).end()
    assert (done.status, done.out) == (0, "Success: no issues found in 1 source file\n")
    wrong = "import flom\nx: int = flom.Lock('a').element\nflom.Lock(quantity='2')\nflom.clock()\n"
    done = box.start(*mypy, box.write("bad.py", wrong), cwd=box.folder).end()
    assert [line.split(":")[1] for line in done.out.splitlines()[:-1]] == ["2", "3", "4"], done.out


# Init scripts and units, with the paths of a box

class Service:
    """The daemon of a box, as an init system starts it."""

    def __init__(self, box):
        self.box, self.run_dir = box, box.path("run")
        self.address = ("-s", os.path.join(self.run_dir, "s"))
        self.program = box.write("flomd", "#!/bin/sh\nexec {} \"$@\"\n".format(
            " ".join(shlex.quote(word) for word in PYTHON + [FLOMD_PY])))
        os.chmod(self.program, 0o755)

    def defaults(self, name, **more):
        """Writes the variables of the init scripts into a file, by default as for a box."""
        # What has been locked a moment ago would make the next daemon wait for its holder.
        words = ["--no-files", "--recovery-window", "0", *self.address]
        variables = dict({
            "FLOMD": self.program, "FLOMD_OPTIONS": " ".join(words), "FLOMD_USER": "",
            "RUN_DIR": self.run_dir, "STATE_DIR": self.box.folder}, **more)
        return self.box.write(name, "".join(
            f"{key}={shlex.quote(value)}\n" for key, value in variables.items()))

    def can_lock(self):
        done = self.box.run("-d", "0", "--", "echo", "locked", address=self.address)
        return done == (0, "locked\n", "")

    def words(self, text):
        """Words of a unit: its paths become those of the box."""
        for old, new in (("/usr/local/bin/flomd", self.program), ("/run/flom/", self.run_dir + "/"),
                         ("/usr/local/var/flom/state", self.box.folder),
                         ("/usr/local/var/flom/", self.run_dir + "/"),
                         ("/socket", "/s"), ("%S/flom", self.box.folder)):
            text = text.replace(old, new)
        os.makedirs(self.run_dir, exist_ok=True)
        return shlex.split(text) + ["--no-files"]


@pytest.fixture
def service(box):
    return Service(box)


def start_by(user, tool):
    """The user and the program that the sysvinit script is to start the daemon by."""
    if user and os.geteuid():
        pytest.skip("only root can become another user")
    if tool:
        need(tool)
    return {"FLOMD_USER": user, "START_STOP_DAEMON": "start-stop-daemon" if tool != "su" else "-"}


@pytest.mark.parametrize("user, tool", [("", None), ("root", "start-stop-daemon"), ("root", "su")])
def test_sysvinit(box, service, user, tool):
    defaults = service.defaults("defaults", **start_by(user, tool))

    def call(word):
        return box.start(contrib("sysvinit", "flomd"), word, env={"FLOMD_DEFAULTS": defaults}).end()

    assert call("status") == (3, "flomd: is not running\n", "")
    assert call("stop").status == 0
    assert call("start") == (0, "flomd: started\n", "")
    pid = box.the_daemon()
    assert call("start") == call("status")._replace(
        out=f"flomd: is running already, pid {pid}\n") and service.can_lock()
    assert call("status") == (0, f"flomd: is running, pid {pid}\n", "")
    assert call("reload") == (0, "", "") and box.the_daemon() == pid
    assert call("restart") == (0, "flomd: stopped\nflomd: started\n", "")
    second = box.the_daemon()
    assert second != pid and service.can_lock()
    box.kill(second)
    assert call("status").status == 1
    assert call("try-restart").status == 0 and box.daemons() == []
    assert call("start").status == 0 and service.can_lock()
    assert call("stop") == (0, "flomd: stopped\n", "")
    assert box.daemons() == [] and not can_connect(service.address)
    assert call("reload").status == 7 and call("status").status == 3


@pytest.mark.parametrize("word, change, status, text", [
    ("start", {"FLOMD": "/nonexistent/flomd"}, 5, "/nonexistent/flomd"),
    ("start", {"FLOMD_OPTIONS": "--nonsense"}, 1, "--nonsense"),
    ("nonsense", {}, 3, "usage:")])
def test_sysvinit_says_what_is_wrong(box, service, word, change, status, text):
    defaults = service.defaults("defaults", **change)
    done = box.start(contrib("sysvinit", "flomd"), word, env={"FLOMD_DEFAULTS": defaults}).end()
    assert (done.status, done.out) == (status, "")
    assert text in done.err


def test_sysvinit_stops_nothing_but_its_daemon(box, service):
    """The pid file belongs to the daemon's user, who may have written another pid into it."""
    service.defaults("defaults")
    victim = box.start("sleep", "60")
    os.mkdir(service.run_dir)
    box.write("run/flomd.pid", f"{victim.pid}\n")
    done = box.start(contrib("sysvinit", "flomd"), "stop",
                     env={"FLOMD_DEFAULTS": box.path("defaults")}).end()
    assert done == (0, "flomd: is not running\n", "") and victim.poll() is None
    box.kill(victim.pid)


def test_the_lsb_header():
    header = re.search("### BEGIN INIT INFO\n(.*)### END INIT INFO\n",
                       read(contrib("sysvinit", "flomd")), re.DOTALL).group(1)
    assert {"Provides", "Required-Start", "Required-Stop", "Default-Start", "Default-Stop",
            "Short-Description"} <= set(re.findall(r"^# ([\w-]+): +\S", header, re.MULTILINE))


def test_openrc(box, service):
    """The functions that openrc-run calls, with stand-ins for its own."""
    script = """
        checkpath() { mkdir -p "$(eval echo "\\${$#}")"; }
        ebegin() { :; }; eend() { return "$1"; }; service_set_value() { :; }; use() { :; }
        after() { :; }
        . "$1"; . "$2"
        depend && start_pre && $command $command_args $command_args_background && start_post &&
        reload && stop_pre && echo "$procname $retry" && kill "$(cat "$pidfile")"
    """
    done = box.start("/bin/sh", "-euc", script, "sh", service.defaults("conf"),
                     contrib("openrc", "flomd")).end()
    assert done == (0, "flomd TERM/10/KILL/5\n", "")
    wait_until(lambda: not box.daemons())


@pytest.mark.parametrize("command", [
    ["sysvinit/flomd", "start"], ["runit/flomd/run"],
    ["/bin/sh", "-euc", '. "$1"; . "$2"; $command $command_args', "sh", "conf", "openrc/flomd"]],
    ids=["sysvinit", "runit", "openrc"])
def test_a_quorum_wants_other_options(box, service, command):
    """They go together, and the file that tells which cluster it is stands in STATE_DIR."""
    text = read(service.program).replace('"$@"', '--check-config "$@"')
    box.write("flomd", text.replace("exec ", f'echo "$@" >{box.path("words")}\nexec '))
    options = "--no-files -a 10.77.0.1 --etcd http://10.77.0.1:2379 --etcd-prefix /flom/main/"
    defaults = service.defaults("conf", FLOMD_OPTIONS=options)
    words = [contrib(*word.split("/")) if word.count("/flomd") else word for word in command]
    words = [defaults if word == "conf" else word for word in words]
    done = box.start(*words, env={"FLOMD_DEFAULTS": defaults}, cwd=box.folder).end()
    assert (done.status, done.err) == (0, "")
    assert f"--etcd-state {box.folder}/cluster " in read(box.path("words"))


@pytest.fixture
def runit(box, service):
    """A copy of the service directory, with its settings."""
    folder = box.path("flomd.sv")
    shutil.copytree(contrib("runit", "flomd"), folder)
    service.defaults("flomd.sv/conf")
    box.write("flomd.sv/log/conf", f"LOG_DIR={box.path('svlog')}\n")
    return folder


def test_the_run_script_of_runit(box, service, runit):
    """It becomes the daemon, so that runsv, or any other supervisor, supervises that."""
    daemon = box.start("./run", cwd=runit)
    wait_until(lambda: can_connect(service.address))
    assert comm(daemon.pid) == "flomd" and service.can_lock()
    box.kill(daemon.pid, signal.SIGTERM)
    assert daemon.returncode == 0 and "serving" in daemon.out


def test_runit(box, service, runit):
    need("runsv", "sv", "svlogd")
    supervisor = box.start("runsv", runit)
    wait_until(lambda: os.path.exists(os.path.join(runit, "supervise", "ok")))
    wait_until(lambda: can_connect(service.address))
    assert service.can_lock() and box.start("sv", "status", runit).end().out.startswith("run:")
    assert box.start("sv", "down", runit).end().status == 0
    wait_until(lambda: not box.daemons())
    service.defaults("flomd.sv/conf", FLOMD_OPTIONS="--nonsense")
    assert box.start("sv", "up", runit).end().status == 0
    wait_until(lambda: "--nonsense" in read(box.path("svlog/current")))
    wait_until(lambda: box.start("sv", "status", runit).end().out.startswith("down:"))
    assert box.start("sv", "exit", runit).end().status == 0
    assert supervisor.end().status == 0


def test_launchd(box, service):
    with open(contrib("launchd", "org.flom.flomd.plist"), "rb") as file:
        job = plistlib.load(file)
    assert job["Label"] == "org.flom.flomd" and job["RunAtLoad"]
    assert job["KeepAlive"] == {"SuccessfulExit": False}
    daemon = box.start(*service.words(" ".join(job["ProgramArguments"])))
    wait_until(lambda: can_connect(service.address))
    assert service.can_lock()
    box.kill(daemon.pid, signal.SIGTERM)
    assert daemon.returncode == 0


# systemd

@pytest.mark.parametrize("name", ["flomd.service", "flomd-quorum.service"])
def test_what_systemd_cannot_run_is_not_tried_again_and_again(name):
    """Without the program, the user, the group or namespaces nothing would change."""
    (told,) = unit(name)["RestartPreventExitStatus"]
    assert {"99", "203", "216", "217", "226"} <= set(told.split())


def unit(name):
    """{key: [values]} of a unit."""
    keys = {}
    text = read(contrib("systemd", name))
    for key, value in re.findall("^([A-Za-z]+)=(.*)$", text, re.MULTILINE):
        keys.setdefault(key, []).append(value)
    return keys


UNITS = ("flomd.service", "flomd-quorum.service", "flomd.socket")


@pytest.fixture
def units(box, service):
    """Copies of the units, with a program that is there."""
    os.mkdir(box.path("units"))
    paths = []
    for name in UNITS:
        text = read(contrib("systemd", name)).replace("/usr/local/bin/flomd", service.program)
        paths.append(box.write(f"units/{name}", text))
    return paths


def test_systemd_verifies_the_units(box, units):
    need("systemd-analyze")
    done = box.start("systemd-analyze", "--man=no", "verify", *units).end()
    assert done == (0, "", "")


@pytest.mark.parametrize("number", [0, 1], ids=UNITS[:2])
def test_the_service_is_hardened(box, units, number):
    need("systemd-analyze")
    done = box.start("systemd-analyze", "security", "--offline=true", "--no-pager",
                     units[number]).end()
    if "unrecognized option" in done.err or "Unknown" in done.err:
        pytest.skip("this systemd-analyze cannot judge a unit offline")
    assert float(re.search(r"exposure level for \S+: ([\d.]+)", done.out).group(1)) <= 2.0


def service_words(service):
    """The command of the service, as systemd would make it."""
    keys = unit("flomd.service")
    options = re.fullmatch('"FLOMD_OPTIONS=(.*)"', keys["Environment"][0]).group(1)
    return service.words(keys["ExecStart"][0].replace("$FLOMD_OPTIONS", options))


def test_the_service_tells_systemd_when_it_is_ready(box, service):
    assert unit("flomd.service")["Type"] == ["notify"]
    path = box.path("notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(path)
        systemd.settimeout(10)
        daemon = box.start(*service_words(service), env={"NOTIFY_SOCKET": path})
        assert systemd.recv(4096) == b"READY=1" and service.can_lock()
        daemon.terminate()
        assert systemd.recv(4096) == b"STOPPING=1" and daemon.end().status == 0
    os.unlink(path)


@pytest.mark.parametrize("here", ["10.77.0.1", "10.77.0.3"])
def test_the_service_of_a_quorum(box, service, here):
    """Its options, as /etc/default/flomd-quorum gives them, are accepted as they are."""
    keys = unit("flomd-quorum.service")
    assert keys["Type"] == ["notify"] and keys["Restart"] == ["always"]
    assert keys["StateDirectory"] == ["flomd"]
    text = read(contrib("examples", "etcd", "flomd-quorum")).replace("HERE", here)
    options = re.search('^FLOMD_OPTIONS="(.*)"$', text, re.MULTILINE).group(1)
    words = service.words(keys["ExecStart"][0].replace("$FLOMD_OPTIONS", options))
    assert box.start(*words, "--check-config").end() == (0, "ok\n", "")
    assert f"-a {here} " in options
    told = re.search("^ETCD_INITIAL_CLUSTER=(.*)$", read(contrib("examples", "etcd", "etcd")),
                     re.MULTILINE).group(1)
    members = [member.split("=", 1) for member in told.split(",")]
    assert [f"http://{name}:2380" for name, _ in members] == [url for _, url in members]
    urls = re.search(r"--etcd (\S+)", options).group(1).split(",")
    assert urls == [f"http://{name}:2379" for name, _ in members]


def test_the_service_is_started_by_its_socket(box, service):
    """systemd holds the socket; the daemon uses it and leaves it there."""
    need("systemd-socket-activate")
    words, path = service_words(service), service.address[1]
    assert unit("flomd.socket")["ListenStream"][0].replace("/run/flom/socket", path) == path
    daemon = box.start("systemd-socket-activate", "-l", path, *words)
    wait_until(lambda: os.path.exists(path))
    assert service.can_lock() and comm(daemon.pid) == "flomd"
    box.kill(daemon.pid, signal.SIGTERM)
    assert daemon.returncode == 0 and box.sockets() == {path}
    os.unlink(path)


def test_sysusers_and_tmpfiles(box):
    need("systemd-sysusers", "systemd-tmpfiles")
    if os.geteuid():
        pytest.skip("only root can give directories away")
    root = box.path("root")
    os.makedirs(os.path.join(root, "etc"))
    conf = [contrib("systemd", f"{kind}.d", "flomd.conf") for kind in ("sysusers", "tmpfiles")]
    assert box.start("systemd-sysusers", f"--root={root}", conf[0]).end().status == 0
    name, _, uid = read(os.path.join(root, "etc/passwd")).split(":")[:3]
    keys = unit("flomd.service")
    assert [name] == keys["User"] == keys["Group"]
    assert box.start("systemd-tmpfiles", f"--root={root}", "--create", conf[1]).end().status == 0
    for folder, mode in (("run/flom", 0o755), ("var/lib/flom", 0o700)):
        made = os.stat(os.path.join(root, folder))
        assert (made.st_uid, made.st_mode & 0o777) == (int(uid), mode)


def test_the_daemon_outlives_the_lifespan_that_keeps_clients_from_starting_one():
    """/etc/flom.conf has Lifespan=0 for clients, and the daemon reads that file, too."""
    for name in ("systemd/flomd.service", "systemd/flomd-quorum.service", "sysvinit/flomd",
                 "openrc/flomd", "runit/flomd/run"):
        text = re.sub("#.*", "", read(contrib(*name.split("/"))))
        assert re.search(r'[ "]-d -1 ', text)
