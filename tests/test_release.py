"""contrib/check and contrib/release.sh: what is wrong is named, and no release is made of it."""
import os
import re
import shutil
import subprocess
import tarfile

import flom
import pytest
from world import ROOT, read

pytestmark = pytest.mark.processes
PLACES = ["flomd.py", "pyproject.toml", "contrib/man/flom.1", "contrib/man/flomd.8"]
CHANGELOG = "contrib/CHANGELOG.md"
GIT = ["git", "-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "commit.gpgsign=false"]


class Tree:
    """A copy of what a release is made of, in a repository of its own."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("flom.py", "flomd.py", "pyproject.toml", "tox.ini", ".gitignore",
                     "tests/test_shared_block.py"):
            self.take(name)
        shutil.copytree(os.path.join(ROOT, "contrib"), os.path.join(folder, "contrib"))

    def take(self, name):
        target = os.path.join(self.folder, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), target)

    def edit(self, name, old, new):
        path = os.path.join(self.folder, name)
        text = read(path)
        assert old in text
        with open(path, "w", encoding="utf-8") as file:
            file.write(text.replace(old, new))

    def commit(self):
        for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
            assert self.run(*GIT, *words) == (0, "", "")

    def run(self, *argv):
        """(status, stdout, stderr) of a command in the tree."""
        done = subprocess.run(argv, cwd=self.folder, stdout=subprocess.PIPE, timeout=120,
                              stderr=subprocess.PIPE, universal_newlines=True)
        return done.returncode, done.stdout, done.stderr


@pytest.fixture
def tree(tmp_path):
    return Tree(str(tmp_path / "tree"))


@pytest.fixture
def repository(tree):
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    tree.edit(CHANGELOG, "(unreleased)", "(2027-01-31)")
    newest = re.search(r"^## (\S+)", read(os.path.join(tree.folder, CHANGELOG)), re.MULTILINE)
    pages = os.listdir(os.path.join(tree.folder, "contrib/man"))
    for name in {"flom.py", *PLACES, *(f"contrib/man/{page}" for page in pages)}:
        tree.edit(name, flom.VERSION, newest.group(1))
    tree.commit()
    return tree


def test_the_versions_of_this_tree_agree(tree):
    assert tree.run("contrib/release.sh", "--check") == (0, "", "")


@pytest.mark.parametrize("name", PLACES + [CHANGELOG])
def test_a_version_that_differs_is_named(tree, name):
    old = {CHANGELOG: "\n## ", "pyproject.toml": 'version = "'}.get(name, flom.VERSION)
    tree.edit(name, old, f"{old}9" if name != CHANGELOG else "\n## 9")
    status, out, err = tree.run("contrib/release.sh", "--check")
    assert (status, out) == (1, "") and err.startswith(f"release.sh: {name}: '")
    assert err.endswith(f"' is not {flom.VERSION}, the version of flom.py\n")


def test_a_release(repository):
    status, out, err = repository.run("contrib/release.sh")
    assert (status, err) == (0, "")
    archive, = re.findall(r"dist/flom-[\d.]+\.tar\.gz", out)[:1]
    with tarfile.open(os.path.join(repository.folder, archive)) as members:
        names = {name.partition("/")[2] for name in members.getnames()}
    assert {"flom.py", "flomd.py", CHANGELOG, "contrib/release.sh"} < names
    sums = read(os.path.join(repository.folder, archive.replace(".tar.gz", ".sha256")))
    assert [line.split()[1] for line in sums.splitlines()] == ["flom.py", "flomd.py"]
    assert repository.run("git", "status", "--porcelain") == (0, "", "")
    first = read_bytes(repository, archive)
    repository.run("contrib/release.sh")
    assert read_bytes(repository, archive) == first  # the same commit gives the same bytes


def read_bytes(tree, name):
    with open(os.path.join(tree.folder, name), "rb") as file:
        return file.read()


def test_what_is_no_release(repository):
    repository.edit("contrib/check", "\n", "\n\n")
    status, _, err = repository.run("contrib/release.sh")
    assert (status, err) == (1, "release.sh: there is something that is not committed\n")
    repository.run("git", "checkout", "-q", "contrib/check")
    repository.edit(CHANGELOG, "(2027-01-31)", "(unreleased)")
    repository.commit()
    status, _, err = repository.run("contrib/release.sh")
    assert (status, err) == (1, f"release.sh: {CHANGELOG}: '(unreleased)' is not a date\n")
    assert not os.path.exists(os.path.join(repository.folder, "dist"))


def test_check_names_what_fails(tree):
    tree.edit("flomd.py", '\nVERSION = "', '\n# Another line.\nVERSION = "')
    status, out, _ = tree.run("contrib/check")
    assert status == 1
    failed = re.findall("^FAILED    (.*)$", out, re.MULTILINE)
    assert set(failed) <= {"the shared block", "tests without processes"} and failed
    assert "ok        the versions agree" in out.splitlines()
