#!/bin/sh
# Makes a Debian package, with dpkg-deb alone and as any user:
#
#   sh contrib/debian-package.sh [FOLDER]        FOLDER/flom_VERSION_all.deb; by default in dist/
#   apt-get install ./dist/flom_VERSION_all.deb
#
# It is the same for all Pythons from 3.6 on: its code is compiled where it is installed, and again
# when another python3 comes.  The units are in it, but none is enabled.  The user flom is made for
# them where there is systemd-sysusers, and goes with `apt-get purge`, as the daemon's memory does.
set -eu
umask 022
LC_ALL=C
export LC_ALL

here=$(CDPATH='' cd "$(dirname "$0")/.." && pwd)
target=${1:-$here/dist}
version=$(sed -n 's/^VERSION = "\(.*\)"$/\1/p' "$here/flom.py")
command -v dpkg-deb >/dev/null || {
    echo "debian-package.sh: no dpkg-deb in PATH" >&2
    exit 1
}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
trap 'exit 1' HUP INT TERM
chmod 755 "$root"

# Files.

python=$(command -v python3 || echo /usr/bin/python3)
python=$("$python" -IS -c 'import sys; print(sys.executable)')
DESTDIR=$root sh "$here/contrib/install.sh" --prefix /usr --python "$python" --systemd >/dev/null
lib=$root/usr/lib/flom
rm -r "$lib/__pycache__" "$lib/installed"
for launcher in "$lib/flomd" "$root/usr/bin/flom" "$root/usr/bin/flomd"; do
    sed '1s|.*|#!/usr/bin/python3 -IS|' "$launcher" >"$root/launcher"
    cat "$root/launcher" >"$launcher"
done
rm "$root/launcher"
mv "$root/usr/share/zsh/site-functions" "$root/usr/share/zsh/vendor-completions"  # Debian's name
gzip -9n "$root"/usr/share/man/man*/*
cp "$here/README.md" "$here/contrib/CHANGELOG.md" "$root/usr/share/doc/flom"
cp "$here/LICENSE" "$root/usr/share/doc/flom/copyright"
chmod 644 "$root"/usr/share/doc/flom/*

# What dpkg reads and runs.

mkdir "$root/DEBIAN"
(cd "$root" && find usr -type f -exec md5sum {} +) >"$root/DEBIAN/md5sums"
cat >"$root/DEBIAN/control" <<END
Package: flom
Version: $version
Architecture: all
Maintainer: the flom authors <flom@localhost>
Installed-Size: $(du -sk "$root/usr" | cut -f 1)
Depends: python3-minimal (>= 3.6) | python3 (>= 3.6)
Section: utils
Priority: optional
Description: runs a command when its lock is free, on one host or on many
 A daemon keeps the locks; it is started when it is needed.  There are queues,
 pools, numbers, readers and writers, on one host, or on many that know
 nothing of each other but a multicast group.
 .
 A daemon for all users of a host:
 systemctl enable --now flomd.socket flomd.service
END
echo "interest-noawait /usr/bin/python3" >"$root/DEBIAN/triggers"
cat >"$root/DEBIAN/postinst" <<'END'
#!/bin/sh
# Compiles what the launchers import; another python3 triggers that, too.
set -e
root=${DPKG_ROOT-}
rm -rf "$root/usr/lib/flom/__pycache__"
/usr/bin/python3 -IS -c 'import py_compile, sys
for path in sys.argv[2:]:
    py_compile.compile(sys.argv[1] + path, dfile=path)' \
    "$root" /usr/lib/flom/flom.py /usr/lib/flom/flomd.py || :
[ "$1" = configure ] && [ -z "$root" ] || exit 0
if command -v systemd-sysusers >/dev/null; then
    systemd-sysusers /usr/lib/sysusers.d/flomd.conf
    systemd-tmpfiles --create /usr/lib/tmpfiles.d/flomd.conf
fi
[ ! -d /run/systemd/system ] || systemctl daemon-reload
END
cat >"$root/DEBIAN/prerm" <<'END'
#!/bin/sh
# An upgrade leaves the daemon alone.
set -e
root=${DPKG_ROOT-}
rm -rf "$root/usr/lib/flom/__pycache__"
[ "$1" = remove ] && [ -z "$root" ] || exit 0
command -v systemctl >/dev/null || exit 0
now=
[ ! -d /run/systemd/system ] || now=--now
systemctl disable $now flomd.socket flomd.service flomd-quorum.service || :
END
cat >"$root/DEBIAN/postrm" <<'END'
#!/bin/sh
set -e
[ -z "${DPKG_ROOT-}" ] || exit 0
[ "$1" != remove ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload
[ "$1" = purge ] || exit 0
if grep -q '^flom:.*:/var/lib/flom:' /etc/passwd; then
    userdel flom || :
    ! grep -q '^flom:' /etc/group || groupdel flom || :
fi
rm -rf /run/flom /var/lib/flom /var/lib/flomd
END
chmod 755 "$root"/DEBIAN/p*

mkdir -p "$target"
dpkg-deb --root-owner-group -Zxz --build "$root" "$target/flom_${version}_all.deb"
