"""Build back end: that of poetry-core, and in the wheel man pages and completions below share/,
and the package of stubs for type checkers.

A wheel's folder NAME-VERSION.data/data is unpacked into the prefix of the installation; poetry-core
has no way of its own to put files there, nor a package whose folder is elsewhere.
"""
import base64
import hashlib
import os
import zipfile

from poetry.core.masonry.api import *  # noqa: F401, F403
from poetry.core.masonry import api

CONTRIB = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARE = {
    "man/flom.1": "man/man1", "man/flom.3": "man/man3", "man/flomd.8": "man/man8",
    "man/flom.conf.5": "man/man5", "man/flom-migration.7": "man/man7",
    "man/flom-protocol.7": "man/man7", "man/flom-safety.7": "man/man7",
    "man/flom-semantics.7": "man/man7", "man/flom-tls.7": "man/man7",
    "examples/flom.conf": "doc/flom",
    "completion/bash/flom": "bash-completion/completions",
    "completion/bash/flomd": "bash-completion/completions",
    "completion/zsh/_flom": "zsh/site-functions",
    "completion/fish/flom.fish": "fish/vendor_completions.d",
    "completion/fish/flomd.fish": "fish/vendor_completions.d"}
STUBS = "flom-stubs/__init__.pyi"  # beside this file; made by make_stubs.py


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """PEP 517's hook: makes the wheel and returns its name."""
    name = api.build_wheel(wheel_directory, config_settings, metadata_directory)
    add_share(os.path.join(wheel_directory, name))
    return name


def add_share(path):
    """Adds the files of SHARE, and the stubs, to a wheel and to its RECORD."""
    with zipfile.ZipFile(path) as wheel:
        members = {info: wheel.read(info) for info in wheel.infolist()}
    record = next(info for info in members if info.filename.endswith(".dist-info/RECORD"))
    folder = record.filename.replace(".dist-info/RECORD", ".data/data/share")
    lines, added = members.pop(record).decode(), {}
    files = {f"packaging/{STUBS}": STUBS}
    for source, target in sorted(SHARE.items()):
        files[source] = f"{folder}/{target}/{source.split('/')[-1]}"
    for source, name in files.items():
        with open(os.path.join(CONTRIB, *source.split("/")), "rb") as file:
            data = file.read()
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines += f"{name},sha256={digest},{len(data)}\n"
        added[name] = data
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for info, data in members.items():
            wheel.writestr(info, data)
        for name, data in added.items():
            info = zipfile.ZipInfo(name, record.date_time)
            info.external_attr, info.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            wheel.writestr(info, data)
        wheel.writestr(record, lines)
