#!/bin/sh
# The SHA-256 sums of the two scripts, for hosts to which they are copied without pip:
#
#   contrib/checksums.sh >flom.sha256
#   ssh db1 mkdir -p /usr/local/lib/flom
#   scp flom.py flomd.py flom.sha256 db1:/usr/local/lib/flom/
#   ssh db1 'cd /usr/local/lib/flom && sha256sum -c flom.sha256'
#   ssh db1 ln -s /usr/local/lib/flom/flom.py /usr/local/bin/flom
#   ssh db1 ln -s /usr/local/lib/flom/flomd.py /usr/local/bin/flomd
set -eu
cd "${1:-$(dirname "$0")/..}"
for program in sha256sum gsha256sum 'shasum -a 256' 'openssl dgst -sha256 -r'; do
    if command -v "${program%% *}" >/dev/null; then
        sums=$($program flom.py flomd.py)
        echo "$sums" | sed 's/ \*/  /'
        exit
    fi
done
python3 - flom.py flomd.py <<'PYTHON'
import hashlib, sys
for name in sys.argv[1:]:
    with open(name, "rb") as file:
        print(f"{hashlib.sha256(file.read()).hexdigest()}  {name}")
PYTHON
