"""Certificates for the tests of TLS, made with openssl(1)."""
import os
import socket
import ssl
import subprocess

from fakes import FlomClient
from flomd import machine_id

KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes".split()

SETTINGS = """\
[ca]
default_ca = tests
[tests]
database = {folder}/index
serial = {folder}/serial
new_certs_dir = {folder}
default_md = sha256
policy = name
[name]
commonName = optional
organizationName = optional
"""


def openssl(*words):
    done = subprocess.Popen(("openssl",) + words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = done.communicate()[0]
    assert done.returncode == 0, said.decode()


class Certificates:
    """A folder with the files NAME.pem and NAME.key.

    `ca` signs `good` (whose common name is the id of this host), `wrong` (another common name),
    `nameless` (none), `double` (another and the id, which ssl lists last), `expired` and `server`
    (of the host 127.0.0.1, also called localhost); `other`, an authority that nobody trusts, signs
    `stranger`.
    """

    def __init__(self, folder):
        self.folder = str(folder)
        for authority in ("ca", "other"):
            openssl("req", "-x509", *KEY, "-days", "2", "-subj", f"/CN={authority}",
                    "-keyout", self.key(authority), "-out", self.pem(authority))
        right = f"/CN={machine_id()}"
        self._sign("good", right)
        self._sign("wrong", "/CN=somebody")
        self._sign("nameless", "/O=somebody")
        self._sign("double", f"/CN=somebody{right}")
        self._sign("expired", right, end="20200102000000Z")
        self._sign("server", "/O=server", hosts="IP:127.0.0.1,DNS:localhost")
        self._sign("stranger", right, authority="other")

    def _sign(self, name, subject, authority="ca", end=None, hosts=None):
        """Signs for two days, or to a date: `openssl ca` alone can do that in every version."""
        request = os.path.join(self.folder, f"{name}.csr")
        openssl("req", *KEY, "-subj", subject, "-keyout", self.key(name),
                "-out", request)
        dates = ("-startdate", "20200101000000Z", "-enddate", end) if end else ("-days", "2")
        if hosts:
            more = os.path.join(self.folder, f"{name}.hosts")
            with open(more, "w") as file:
                file.write(f"subjectAltName={hosts}\n")
            dates += ("-extfile", more)
        openssl("ca", "-batch", "-notext", "-preserveDN", "-config", self._settings(name), *dates,
                "-cert", self.pem(authority), "-keyfile", self.key(authority),
                "-in", request, "-out", self.pem(name))

    def _settings(self, name):
        """The file that tells `openssl ca` where it keeps what it has signed."""
        folder = os.path.join(self.folder, f"{name}.ca")
        os.mkdir(folder)
        for file, text in (("index", ""), ("serial", f"{abs(hash(name)):016x}\n"),
                           ("settings", SETTINGS.format(folder=folder))):
            with open(os.path.join(folder, file), "w") as written:
                written.write(text)
        return os.path.join(folder, "settings")

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
