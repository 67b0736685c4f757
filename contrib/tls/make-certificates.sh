#!/bin/sh
# Makes certificates for flom and flomd, in the current directory:
#
#   make-certificates.sh ca             ca.pem and ca.key: the authority
#   make-certificates.sh HOST [ID]      HOST.pem and HOST.key, of that authority, for ten years
#
# ID is what `flom --unique-id` prints on that host; without it: of this host.  It is the common
# name of the certificate, as --tls-check-peer-id wants it.  HOST, a name or an IP address, stands
# in it as well, so that etcd can show it there.  Each host gets its own two files and ca.pem;
# ca.key stays where it is.  What is there already is not made anew.  Needs openssl.
set -eu
umask 077

fail() {
    echo "make-certificates.sh: $*" >&2
    exit 1
}

make_authority() {
    openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj /CN=ca \
        -keyout ca.key -out ca.pem 2>/dev/null
}

own_id() {  # as flom finds it
    for file in /var/lib/dbus/machine-id /etc/machine-id; do
        if [ -s "$file" ]; then
            cat "$file"
            return
        fi
    done
    printf %s "$(uname -n)" | openssl dgst -sha256 -r | cut -c 1-32
}

name_of() {  # HOST: as subjectAltName
    case $1 in
        *:*) echo "IP:$1" ;;
        *[!0-9.]*) echo "DNS:$1" ;;
        *) echo "IP:$1" ;;
    esac
}

make_certificate() {  # HOST ID
    openssl req -newkey rsa:2048 -nodes -subj "/CN=$2" -keyout "$1.key" -out "$1.csr" 2>/dev/null
    echo "subjectAltName=$(name_of "$1")" >"$1.ext"
    openssl x509 -req -in "$1.csr" -days 3650 -CA ca.pem -CAkey ca.key -CAcreateserial \
        -extfile "$1.ext" -out "$1.pem" 2>/dev/null ||
        fail "openssl makes no certificate of $1"
    rm "$1.csr" "$1.ext"
}

case ${1:-} in
    "" | -*) fail "usage: make-certificates.sh ca | HOST [ID]" ;;
esac
[ ! -e "$1.pem" ] || fail "$1.pem is there already"
if [ "$1" = ca ]; then
    make_authority
else
    [ -e ca.key ] || fail "there is no ca.key here: make-certificates.sh ca"
    make_certificate "$1" "${2:-$(own_id)}"
fi
