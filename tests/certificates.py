"""Certificates for the tests of TLS, made with openssl(1)."""
import os
import socket
import ssl
import subprocess

from fakes import FlomClient
from flomd import machine_id

KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes".split()


def openssl(*words):
    done = subprocess.Popen(("openssl",) + words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = done.communicate()[0]
    assert done.returncode == 0, said.decode()


class Certificates:
    """A folder with the files NAME.pem and NAME.key.

    `ca` signs `good` (whose common name is the id of this host), `wrong` (another common name) and
    `expired`; `other`, an authority that nobody trusts, signs `stranger`.
    """

    def __init__(self, folder):
        self.folder = str(folder)
        for authority in ("ca", "other"):
            openssl("req", "-x509", *KEY, "-days", "2", "-subj", f"/CN={authority}",
                    "-keyout", self.key(authority), "-out", self.pem(authority))
        self._sign("good", machine_id())
        self._sign("wrong", "somebody")
        self._sign("expired", machine_id(), days="-1")
        self._sign("stranger", machine_id(), authority="other")

    def _sign(self, name, common_name, authority="ca", days="2"):
        request = os.path.join(self.folder, f"{name}.csr")
        openssl("req", *KEY, "-subj", f"/CN={common_name}", "-keyout", self.key(name),
                "-out", request)
        openssl("x509", "-req", "-in", request, "-days", days, "-CA", self.pem(authority),
                "-CAkey", self.key(authority), "-set_serial", str(abs(hash(name))),
                "-out", self.pem(name))

    def pem(self, name):
        return os.path.join(self.folder, f"{name}.pem")

    def key(self, name):
        return os.path.join(self.folder, f"{name}.key")

    def options(self, name="good", authority="ca", key=None):
        """The options that make one side show `name` and trust `authority`."""
        return ("--tls-certificate", self.pem(name), "--tls-private-key", self.key(key or name),
                "--tls-ca-certificate", self.pem(authority))

    def context(self, name="good"):
        """The context of a client; without a name it shows no certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(self.pem("ca"))
        if name:
            context.load_cert_chain(self.pem(name), self.key(name))
        return context


class TlsClient(FlomClient):
    """A connection of FLoM's client over TLS."""

    def __init__(self, family, address, context, seconds=10):
        super().__init__(family, address, seconds)
        try:
            self.socket = context.wrap_socket(self.socket)
        except BaseException:
            self.socket.close()
            raise

    def leave(self):
        try:
            self.socket.unwrap()
        except (OSError, ValueError, socket.timeout):  # the daemon has closed without a word
            pass
        self.socket.close()
        return b""
