"""One real member of etcd, for tests of what is said to it."""
import os
import shutil
import signal
import subprocess
import tempfile
import urllib.request

import pytest

from world import free_port, read, wait_until

ETCD = shutil.which("etcd")
REQUIRED = os.environ.get("FLOM_REQUIRE_ETCD") == "1"

with_real_etcd = pytest.mark.skipif(not ETCD and not REQUIRED, reason="there is no etcd in PATH")

FLOM_READS_AND_WRITES = {"permType": "READWRITE", "key": "L3gv", "range_end": "L3gw"}
USERS = [(f"auth/{path}", body) for path, body in [
    ("user/add", {"name": "root", "password": "root"}), ("role/add", {"name": "root"}),
    ("user/grant", {"user": "root", "role": "root"}),
    ("user/add", {"name": "flom", "password": "secret"}), ("role/add", {"name": "flom"}),
    ("role/grant", {"name": "flom", "perm": FLOM_READS_AND_WRITES}),
    ("user/grant", {"user": "flom", "role": "flom"}), ("enable", {})]]
"""What is to be posted so that nobody is admitted but `root`, and `flom` below /x/."""


class RealEtcd:
    """Listens at `url` until it is closed; `options` are its own, `context` is for TLS, `health`
    the URL that tells its health, if it is another."""

    def __init__(self, *options, context=None, health=None):
        self.folder = tempfile.mkdtemp(prefix="flom-etcd-", dir="/tmp")
        client, peer = free_port(), free_port()
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{client}"
        self._context, self._health = context, health or self.url
        peer = f"http://127.0.0.1:{peer}"
        self._log = open(os.path.join(self.folder, "log"), "wb")
        self._process = subprocess.Popen(
            [ETCD or "etcd", "--name", "a", "--data-dir", os.path.join(self.folder, "data"),
             "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
             "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
             "--initial-cluster", f"a={peer}", "--unsafe-no-fsync", "--logger", "zap",
             "--heartbeat-interval", "20", "--election-timeout", "100", *options],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        try:
            wait_until(self._serves, 30)
        except BaseException:
            self.close()
            raise

    def _serves(self):
        assert self._process.poll() is None, read(self._log.name)
        try:
            with urllib.request.urlopen(self._health + "/health", timeout=5,
                                        context=self._context) as answer:
                return b'"true"' in answer.read()
        except OSError:
            return False

    def close(self):
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._log.close()
        shutil.rmtree(self.folder)
