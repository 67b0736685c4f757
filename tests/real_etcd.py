"""One real member of etcd, for tests of what is said to it."""
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import urllib.request
from contextlib import ExitStack

import pytest

from world import wait_until

ETCD = shutil.which("etcd")
REQUIRED = os.environ.get("FLOM_REQUIRE_ETCD") == "1"

with_real_etcd = pytest.mark.skipif(not ETCD and not REQUIRED, reason="there is no etcd in PATH")


def free_ports(number):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class RealEtcd:
    """Listens at `url` until it is closed; `options` are its own, `context` is for TLS."""

    def __init__(self, *options, context=None):
        self.folder = tempfile.mkdtemp(prefix="flom-etcd-", dir="/tmp")
        client, peer = free_ports(2)
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{client}"
        self._context = context
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
        assert self._process.poll() is None, open(self._log.name).read()
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=5,
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
