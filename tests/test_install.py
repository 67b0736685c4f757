"""Installation: install.sh, its launchers, the Debian package, the wheel.

The system of this host is left alone: everything goes into the folder of a box.
"""
import os
import re
import shutil
import stat
import subprocess
import sys

import flom
import pytest
from world import FLOM_PY, FLOMD_PY, ROOT, comm, read, wait_until

INSTALL = os.path.join(ROOT, "contrib", "install.sh")
PACKAGE = os.path.join(ROOT, "contrib", "debian-package.sh")
NOBODY = 65534
SHELLS = (["dash"], ["busybox", "sh"])
PYTHON3 = sys.executable
CODE = f"{sys.implementation.cache_tag}.pyc"


def need(program):
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")


def install(box, *options, shell=("sh",), destdir="", script=INSTALL, **more):
    """Runs install.sh to its end: (status, out, err)."""
    return box.start(*shell, script, *options, env={"DESTDIR": destdir}, **more).end()


class Ordinary:
    """Installs as an ordinary user, who need not be able to read what the tests can."""

    def __init__(self, box):
        os.chmod(box.folder, 0o755)
        source = box.path("source")
        shutil.copytree(os.path.join(ROOT, "contrib"), os.path.join(source, "contrib"))
        for script in (FLOM_PY, FLOMD_PY):
            shutil.copy(script, source)
        subprocess.check_call(["chmod", "-R", "a+rX", source])
        self.box, self.script = box, os.path.join(source, "contrib", "install.sh")

    def become(self):
        os.umask(0o077)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setuid(NOBODY)

    def install(self, *options):
        done = install(self.box, *options, script=self.script, preexec_fn=self.become)
        if "'/usr/bin/python3' is not Python" in done.err:
            pytest.skip("there is no /usr/bin/python3")
        return done


def tree(folder):
    """The relative paths of all that is in a folder."""
    return {os.path.relpath(os.path.join(where, name), folder)
            for where, folders, files in os.walk(folder) for name in folders + files}


def files(folder):
    return {path for path in tree(folder) if not os.path.isdir(os.path.join(folder, path))}


@pytest.fixture
def prefix(box):
    """A prefix in which somebody else has something."""
    os.makedirs(box.path("p/bin"))
    box.write("p/bin/other", "")
    return box.path("p")


@pytest.mark.parametrize("shell", SHELLS, ids=["dash", "busybox"])
def test_from_nothing_to_a_lock_and_back(box, prefix, shell):
    need(shell[0])
    before = tree(prefix)
    done = install(box, "--prefix", prefix, "--python", PYTHON3, shell=shell)
    assert (done.status, done.err) == (0, "") and f"flom {flom.VERSION} is in {prefix}" in done.out
    lib, program = os.path.join(prefix, "lib/flom"), os.path.join(prefix, "bin/flom")
    lines = read(program).splitlines()
    assert lines[0] == f"#!{PYTHON3} -IS" and len(lines) == 3
    assert {f"flom.{CODE}", f"flomd.{CODE}"} == set(os.listdir(os.path.join(lib, "__pycache__")))
    first = box.start(program, *box.address, "-d", "10m", "--", "echo", "hello").end()
    assert first == (0, "hello\n", "")
    daemon = box.the_daemon()
    assert comm(daemon) == "flomd"
    words = read(f"/proc/{daemon}/cmdline").split("\0")
    assert words[1:4] == ["-IS", os.path.join(lib, "flomd"), "--no-files"]
    assert any(box.socket in word for word in words)

    again = install(box, "--prefix", prefix, "--python", PYTHON3, shell=shell)
    assert (again.status, again.err) == (0, "") and box.the_daemon() == daemon
    assert re.search(rf"kill .*\b{daemon}\b", again.out)
    gone = install(box, "--prefix", prefix, "--uninstall", shell=shell)
    assert (gone.status, gone.err) == (0, "") and tree(prefix) == before
    assert gone.out == (f"flom is no longer in {prefix}.\nA daemon of it still runs, and ends when "
                        f"nobody uses it, or by: kill {daemon}\n")


def test_an_ordinary_user_installs_at_home(box):
    """Under a careful umask, too."""
    user, home = Ordinary(box), box.path("home")
    os.mkdir(home)
    if os.geteuid() == 0:
        os.chown(home, NOBODY, NOBODY)
    prefix = ["--prefix", f"{home}/.local"]
    done = user.install(*prefix, "--python", "/usr/bin/python3")
    assert (done.status, done.err) == (0, "")
    program = f"{home}/.local/bin/flom"
    assert stat.S_IMODE(os.stat(program).st_mode) == 0o755
    assert box.start(program, "--version").end().out.endswith(f" {flom.VERSION}\n")
    refused = user.install("--prefix", f"{home}/x", "--systemd")
    assert refused == (1, "", "install.sh: --systemd: only root can do that\n")
    assert user.install(*prefix, "--uninstall").status == 0 and tree(home) == set()


def test_who_has_zsh_reads_how_it_finds_its_completion(box, prefix):
    os.chmod(box.write("zsh", ""), 0o755)
    path = {"DESTDIR": "", "PATH": f"{box.folder}:{os.environ['PATH']}"}
    done = box.start("sh", INSTALL, "--prefix", prefix, "--python", PYTHON3, env=path).end()
    folder = re.search(r"\n.*zshrc.*fpath\+=\((.*)\)\n", done.out).group(1)
    assert os.path.exists(os.path.join(folder, "_flom"))


def test_a_launcher_is_alone_with_python_s_own_library(box, prefix):
    """Neither PYTHONPATH nor the current folder nor its own one gets in between."""
    assert install(box, "--prefix", prefix, "--python", PYTHON3).status == 0
    for name in ("argparse", "signal", "flom", "sitecustomize"):
        for folder in ("", "p/bin/"):
            box.write(f"{folder}{name}.py", "raise SystemExit('the wrong module')\n")
    done = box.start(f"{prefix}/bin/flom", *box.address, "--", "echo", "x", cwd=box.folder,
                     env={"PYTHONPATH": box.folder, "PYTHONWARNINGS": "nonsense"}).end()
    assert done == (0, "x\n", "")
    assert box.start(f"{prefix}/bin/flomd", "--version").end().status == 0


@pytest.mark.parametrize("root, config", [("/usr/local", "/etc"), ("/usr", "/usr/lib")])
def test_a_packager_has_all_below_destdir(box, root, config):
    target = box.path("a target")
    done = install(box, f"--prefix={root}/", "--systemd", f"--python={PYTHON3}", destdir=target)
    assert (done.status, done.err) == (0, "") and "nothing is enabled" in done.out
    written = {"/" + path for path in files(target)}
    pages = {f"{root}/share/man/man{name[-1]}/{name}"
             for name in os.listdir(os.path.join(ROOT, "contrib", "man"))}
    units = {f"{config}/systemd/system/{name}"
             for name in os.listdir(os.path.join(ROOT, "contrib", "systemd")) if "." in name[-8:]
             and not name.endswith(".d")}
    assert len(pages) > 5 and pages <= written and len(units) == 3 and units <= written
    assert {f"{config}/{kind}.d/flomd.conf" for kind in ("sysusers", "tmpfiles")} <= written
    vendor = f"{root}/share/fish/vendor_completions.d"  # below /usr/local fish does not look
    fish = "/etc/fish/completions" if root == "/usr/local" else vendor
    assert {f"{root}/share/bash-completion/completions/flom", f"{root}/bin/flomd",
            f"{root}/share/zsh/site-functions/_flom", f"{fish}/flom.fish"} <= written
    for name in ("flomd.service", "flomd-quorum.service"):
        text = read(f"{target}{config}/systemd/system/{name}")
        assert f"\nExecStart={root}/bin/flomd -f " in text
    assert f'"{root}/lib/flom"' in read(f"{target}{root}/bin/flom")
    assert install(box, "--prefix", root, "--uninstall", destdir=target).status == 0
    assert tree(target) == set()


def test_what_is_no_longer_in_a_version_goes_with_the_upgrade(box):
    """And the units stay, although --systemd is not said again; a link by hand is replaced."""
    target = box.path("t")
    os.makedirs(f"{target}/usr/local/bin")
    os.symlink("/usr/local/lib/flom/flom.py", f"{target}/usr/local/bin/flom")
    assert install(box, "--systemd", "--python", PYTHON3, destdir=target).status == 0
    first = files(target)
    old = f"{target}/usr/local/share/man/man1/flom-old.1"
    with open(f"{target}/usr/local/lib/flom/installed", "a") as file:
        file.write("file /usr/local/share/man/man1/flom-old.1\n")
    for path in (old, f"{target}/usr/local/lib/flom/__pycache__/flom.cpython-35.pyc",
                 f"{target}/etc/tmpfiles.d/other.conf"):
        with open(path, "w"):
            pass
    assert install(box, "--python", PYTHON3, destdir=target).status == 0
    assert files(target) == first | {"etc/tmpfiles.d/other.conf"}
    assert not os.path.islink(f"{target}/usr/local/bin/flom")
    assert install(box, "--uninstall", destdir=target).status == 0
    assert tree(target) == {"usr", "usr/local", "usr/local/bin", "etc", "etc/tmpfiles.d",
                            "etc/tmpfiles.d/other.conf"}


@pytest.mark.parametrize("number", ["TERM", "KILL"])
def test_an_interrupted_installation_can_be_undone(box, prefix, number):
    """TERM leaves nothing half written, and --uninstall nothing at all."""
    os.mkdir(box.path("b"))
    stop = f"case $* in *flom.conf.5*) kill -{number} 0 ;; esac"
    os.chmod(box.write("b/mv", f'#!/bin/sh\n{stop}\nexec {shutil.which("mv")} "$@"\n'), 0o755)
    before = tree(prefix)
    path = {"DESTDIR": "", "PATH": f"{box.path('b')}:{os.environ['PATH']}"}
    done = box.start("sh", INSTALL, "--prefix", prefix, "--python", PYTHON3, env=path,
                     start_new_session=True).end()
    assert done.status == {"TERM": 1, "KILL": -9}[number]
    halves = [name for name in files(prefix) if ".new." in name]
    assert len(halves) == {"TERM": 0, "KILL": 1}[number] and "lib/flom/flom.py" in files(prefix)
    assert install(box, "--prefix", prefix, "--uninstall").status == 0 and tree(prefix) == before


def test_only_daemons_of_this_system_are_named(box, prefix):
    """Not one that has ended, nor one of a container, whose files are others."""
    code = "import os, sys\nopen('/proc/self/comm', 'w').write('flomd')\nprint(flush=True)\n"
    ended = box.start(PYTHON3, "-c", code)
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    enter = ["unshare", "--mount"] if shutil.which("unshare") and os.geteuid() == 0 else []
    inside = box.start(*enter, PYTHON3, "-c", code + "sys.stdin.read()", stdin=subprocess.PIPE)
    wait_until(lambda: inside.out or inside.poll() is not None)
    outside = box.start(PYTHON3, "-c", code + "sys.stdin.read()", stdin=subprocess.PIPE)
    wait_until(lambda: outside.out)
    said = install(box, "--prefix", prefix, "--python", PYTHON3).out
    for process in (inside, outside):
        process.stdin.close()
        process.wait()
    named = set(re.search("after: .*kill (.*)", said).group(1).split())
    assert str(outside.pid) in named and str(ended.pid) not in named
    assert str(inside.pid) not in named or not enter


@pytest.mark.parametrize("options, status, text", [
    (["--prefix", "p"], 99, "'p' is not an absolute path"),
    (["--prefix", "/a b"], 99, "'/a b' is not a path of letters"),
    (["--prefix"], 99, "--prefix needs a path"),
    (["--prefx=/x"], 99, "'--prefx=/x' is not --prefix, --python, --systemd or --uninstall"),
    (["--python", "/bin/false"], 1, "'/bin/false' is not Python 3.6 or newer"),
    (["--python", "{box}/old"], 1, "/old' is not Python 3.6 or newer: it is 2.7.18"),
    (["--prefix", "{box}/p/file"], 1, "/p/file: not a folder"),
    (["--uninstall"], 1, "/p/lib/flom/installed: not there; nothing to uninstall"),
])
def test_what_is_wrong_is_told_and_nothing_is_written(box, prefix, options, status, text):
    os.chmod(box.write("old", "#!/bin/sh\necho 2.7.18\nexit 1\n"), 0o755)
    box.write("p/file", "")
    before = tree(box.folder)
    words = [word.format(box=box.folder) for word in options]
    done = install(box, "--prefix", prefix, *words)
    assert done[:2] == (status, "") and text in done.err and done.err.count("\n") == 1
    assert {path for path in tree(box.folder) - before if "." not in path} == set()


@pytest.mark.parametrize("way", ["a program", "a folder", "no permission"])
def test_nothing_is_written_when_one_file_cannot_be(box, prefix, way):
    """Somebody else's program of this name, for one, is not overwritten."""
    user, path = Ordinary(box), f"{prefix}/share/man/man8"
    if way == "a program":
        path = box.write("p/bin/flomd", "FLoM's\n")
    elif way == "a folder":
        os.makedirs(f"{path}/flomd.8")
    else:
        os.makedirs(path)
    subprocess.check_call(["chmod", "-R", "a+rwX", prefix])
    if way == "no permission":
        os.chmod(path, 0o555)
    before = tree(prefix)
    done = user.install("--prefix", prefix, "--python", "/usr/bin/python3")
    assert done[:2] == (1, "") and path in done.err and done.err.count("\n") == 1
    assert tree(prefix) == before


def test_a_user_reads_how_it_is_used(box):
    done = install(box, "--help")
    assert (done.status, done.err) == (0, "") and "--uninstall removes" in done.out


@pytest.mark.parametrize("name", ["install.sh", "debian-package.sh"])
def test_shellcheck_has_nothing_to_say(box, name):
    need("shellcheck")
    path = os.path.join(ROOT, "contrib", name)
    assert box.start("shellcheck", path).end() == (0, "", "")


# The daemon of what is installed

def test_a_daemon_comes_compiled_where_python_keeps_that(box):
    """Beside an installed module; what is kept of another version of the file does no harm."""
    for script in (FLOM_PY, FLOMD_PY):
        shutil.copy(script, box.folder)
    command = [PYTHON3, "-W", "error", box.path("flom.py"), *box.address, "-d", "5s"]
    kept = box.path(f"__pycache__/flomd.{CODE}")
    for number in range(3):
        assert box.start(*command, "--", "true", cwd="/").end() == (0, "", "")
        words = read(f"/proc/{box.the_daemon()}/cmdline").split("\0")
        imported = number > 0
        assert comm(box.the_daemon()) == "flomd" and words[1:3] == (
            ["-IS", "-c"] if imported else [box.path("flomd.py"), "--no-files"])
        assert os.path.exists(kept) == imported
        assert box.start(*command, "-X").end().status == 0
        wait_until(lambda: box.daemons() == [])
        os.makedirs(box.path("__pycache__"), exist_ok=True)
        os.utime(box.path("flomd.py"), (number, number))


@pytest.mark.parametrize("tool", ["pip", "pipx", "uv"])
def test_the_wheel(box, tool):
    """Installed by each of them, run, and removed."""
    if os.environ.get("FLOM_WHEEL") != "1":
        pytest.skip("`tox -e wheel` runs it, with a package index")
    need(tool)
    source = box.path("source")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "tests"))
    places = {"HOME": box.folder, "PIPX_HOME": box.path("venvs"), "PIPX_BIN_DIR": box.path("bin"),
              "PIPX_MAN_DIR": box.path("man"), "UV_TOOL_DIR": box.path("venvs"),
              "UV_TOOL_BIN_DIR": box.path("bin"), "UV_CACHE_DIR": box.path("cache")}
    commands = {
        "pip": (["pip", "install", source], ["pip", "uninstall", "-y", "pyflom"]),
        "pipx": (["pipx", "install", source], ["pipx", "uninstall", "pyflom"]),
        "uv": (["uv", "tool", "install", "--python", PYTHON3, source],
               ["uv", "tool", "uninstall", "pyflom"])}
    if tool == "pip":
        subprocess.check_call([PYTHON3, "-m", "venv", box.folder])
        commands["pip"][0][0] = commands["pip"][1][0] = box.path("bin/pip")
    else:
        os.mkdir(box.path("bin"))
    add, remove = commands[tool]
    subprocess.check_call(add, env={**os.environ, **places})
    program = box.path("bin/flom")
    for _ in range(2):
        assert box.start(program, *box.address, "--", "echo", "x").end() == (0, "x\n", "")
    assert comm(box.the_daemon()) == "flomd"
    subprocess.check_call(remove, env={**os.environ, **places})
    assert not any(os.path.basename(path) in ("flom", "flomd", "flom.1")
                   for path in tree(box.folder) if not path.startswith(("source", "cache", ".")))


# The Debian package

def dpkg(box, root, *options):
    """Runs dpkg on a system of its own, whose scripts run outside of it."""
    return box.start("dpkg", f"--root={root}", "--force-not-root", "--force-script-chrootless",
                     "--force-depends", f"--log={box.path('dpkg.log')}", *options,
                     env={"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}).end()


def test_the_debian_package(box):
    """It is made by any user, installed, and leaves nothing."""
    need("dpkg-deb")
    need("dpkg")
    made = box.start("sh", PACKAGE, box.path("out")).end()
    assert (made.status, made.err) == (0, "")
    package = box.path(f"out/flom_{flom.VERSION}_all.deb")
    said = box.start("dpkg-deb", "--field", package).end().out
    assert "Architecture: all\n" in said and "Depends: python3-minimal (>= 3.6) | python3" in said
    root = box.path("root")
    for folder in ("info", "updates", "triggers"):
        os.makedirs(f"{root}/var/lib/dpkg/{folder}")
    for name in ("status", "available"):
        box.write(f"root/var/lib/dpkg/{name}", "")
    before = {path for path in tree(root) if not path.startswith("var/lib/dpkg")}
    done = dpkg(box, root, "--install", package)
    assert done.status == 0, done
    here = files(root)
    assert {"usr/bin/flom", "usr/bin/flomd", "usr/lib/flom/flomd", "usr/share/man/man1/flom.1.gz",
            "usr/lib/systemd/system/flomd.service"} <= here
    assert not any(path.startswith("usr/local") or path.endswith("installed") for path in here)
    if os.access("/usr/bin/python3", os.X_OK):
        assert len([path for path in here if path.endswith(".pyc")]) == 2
    for name in ("bin/flom", "bin/flomd", "lib/flom/flomd"):
        assert read(f"{root}/usr/{name}").startswith("#!/usr/bin/python3 -IS\n")
    sums = box.start("md5sum", "-c", "--quiet", f"{root}/var/lib/dpkg/info/flom.md5sums",
                     cwd=root).end()
    assert sums == (0, "", "")
    assert dpkg(box, root, "--purge", "flom").status == 0
    assert {path for path in tree(root) if not path.startswith("var/lib/dpkg")} == before
