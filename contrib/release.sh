#!/bin/sh
# Makes a release out of what is committed:
#
#   contrib/release.sh --check    whether all places name the same version
#   contrib/release.sh            the same, then dist/flom-VERSION.tar.gz and the SHA-256 sums
#
# The version stands in flom.py and flomd.py, in pyproject.toml, in the first line of each man page
# and in contrib/CHANGELOG.md.  There "## 1.2 (unreleased)" opens what is still changing, and a
# release has a date in place of that word; while something is still changing, the other places may
# name it or the last release.  This needs git and gzip but no network.  It sets no tag and sends
# nothing: it says what is left to do.
set -eu
cd "$(dirname "$0")/.."

fail() {
    echo "release.sh: $*" >&2
    exit 1
}

headings() {  # VERSION WORD for each section of the changelog, the newest first
    sed -n 's/^## \([0-9][0-9.]*\) (\(.*\))$/\1 \2/p' contrib/CHANGELOG.md
}

version_in() {
    case $1 in
        *.py) sed -n 's/^VERSION = "\(.*\)"$/\1/p' "$1" ;;
        *.toml) sed -n 's/^version = "\(.*\)"$/\1/p' "$1" | head -n 1 ;;
        *) sed -n '1s/^\.\\" flom \(.*\)$/\1/p' "$1" ;;
    esac
}

agree() {
    for path in flomd.py pyproject.toml contrib/man/*; do
        [ "$(version_in "$path")" = "$version" ] ||
            fail "$path: '$(version_in "$path")' is not $version, the version of flom.py"
    done
    newest=$(headings | head -n 1)
    known=${newest% *}
    if [ "${newest#* }" = unreleased ]; then
        known=$(headings | head -n 2 | cut -d " " -f 1)
    fi
    for one in $known; do
        [ "$one" != "$version" ] || return 0
    done
    fail "contrib/CHANGELOG.md: '${newest% *}' is not $version, the version of flom.py"
}

version=$(version_in flom.py)
[ -n "$version" ] || fail "flom.py: it has no VERSION"
agree
[ "${1:-}" != --check ] || exit 0
[ $# = 0 ] || fail "'$1' is not --check"

[ -z "$(git status --porcelain)" ] || fail "there is something that is not committed"
case $(headings | head -n 1) in
    "$version unreleased") fail "contrib/CHANGELOG.md: '(unreleased)' is not a date" ;;
    "$version "*) ;;
    *) fail "contrib/CHANGELOG.md: $version is not its newest section" ;;
esac
mkdir -p dist
git archive --prefix="flom-$version/" -o "dist/flom-$version.tar" HEAD
gzip -nf "dist/flom-$version.tar"
contrib/checksums.sh >"dist/flom-$version.sha256"
cat <<END
dist/flom-$version.tar.gz and dist/flom-$version.sha256 are made.  What is left:
  git tag -a $version -m "flom $version"
  python3 -m pip wheel --no-deps -w dist .    (fetches the build back end)
  a section "(unreleased)" in contrib/CHANGELOG.md for what comes next
END
