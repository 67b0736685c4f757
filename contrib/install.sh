#!/bin/sh
# Installs flom, or a newer version of it:
#
#   sh contrib/install.sh [--prefix /usr/local] [--python PATH] [--systemd]
#   sh contrib/install.sh [--prefix /usr/local] --uninstall
#
# PREFIX/lib/flom gets flom.py and flomd.py, and both compiled.  PREFIX/bin gets `flom` and `flomd`:
# they import what is compiled, which halves the start, and nothing but Python's own library can be
# in their way.  PREFIX/share gets man pages, completions for bash, zsh and fish, and an example of
# flom.conf.  Where PREFIX is /usr/local, those for fish go to /etc/fish/completions.
#
# --systemd adds a daemon for all users of this host: units, the user flom, its folders.
# --uninstall removes what PREFIX/lib/flom/installed names; with a daemon for all users also the
# daemon, its user and its memory.  With DESTDIR in the environment all files go below that folder,
# and the system is left alone.
#
# Nothing is written before all can be.  Any POSIX shell will do.
set -eu
umask 022
LC_ALL=C
export LC_ALL

here=$(CDPATH='' cd "$(dirname "$0")/.." && pwd)
dest=${DESTDIR-}
dest=${dest%/}
prefix=/usr/local
python=
systemd=
uninstall=
ending=new.$$  # of what is being written, until it takes the place of the old

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

wrong() {
    echo "install.sh: $*" >&2
    exit 99
}

# Arguments.

tidy() {  # PATH: puts it into $path, without a slash at its end
    case $1 in
        *[!A-Za-z0-9/._+@,:=~-]*) wrong "'$1' is not a path of letters, digits and /._+@,:=~-" ;;
        /*) ;;
        *) wrong "'$1' is not an absolute path" ;;
    esac
    path=$1
    while [ "${path%/}" != "$path" ]; do path=${path%/}; done
}

set_path() {  # --prefix or --python, PATH
    tidy "$2"
    case $1 in
        --prefix) prefix=$path ;;
        --python) python=$path ;;
    esac
}

read_arguments() {
    while [ $# -gt 0 ]; do
        case $1 in
            --systemd) systemd=yes ;;
            --uninstall) uninstall=yes ;;
            --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
            --prefix=* | --python=*) set_path "${1%%=*}" "${1#*=}" ;;
            --prefix | --python)
                [ $# -gt 1 ] || wrong "$1 needs a path"
                set_path "$1" "$2"
                shift ;;
            *) wrong "'$1' is not --prefix, --python, --systemd or --uninstall" ;;
        esac
        shift
    done
}

# Python.

version_of() {  # PYTHON: prints its version; fails when it is too old or none at all
    "$1" -IS -c 'import sys
print("%d.%d.%d" % sys.version_info[:3])
sys.exit(sys.version_info < (3, 6))' </dev/null 2>/dev/null
}

find_python() {
    if [ -n "$python" ]; then
        version=$(version_of "$python") ||
            fail "'$python' is not Python 3.6 or newer${version:+: it is $version}"
        return
    fi
    for python in /usr/bin/python3 python3 python3.15 python3.14 python3.13 python3.12 python3.11 \
        python3.10 python3.9 python3.8 python3.7 python3.6; do
        if version=$(version_of "$python"); then
            case $python in
                /*) ;;
                *) set_path --python "$("$python" -IS -c 'import sys; print(sys.executable)')" ;;
            esac
            return
        fi
    done
    fail "no Python 3.6 or newer in PATH (--python names one;" \
        "Debian: apt-get install python3-minimal)"
}

# What goes where.

name_places() {
    lib=$prefix/lib/flom
    share=$prefix/share
    manifest=$dest$lib/installed
    config=/etc
    [ "$prefix" != /usr ] || config=/usr/lib
    service=$config/systemd/system/flomd.service
    fish=$share/fish/vendor_completions.d
    [ "$prefix" != /usr/local ] || fish=/etc/fish/completions  # it does not look there
}

list() {  # a line for each file: mode, source, path
    echo "644 flom.py $lib/flom.py"
    echo "644 flomd.py $lib/flomd.py"
    echo "755 launcher $lib/flomd"
    echo "755 launcher $prefix/bin/flom"
    echo "755 launcher $prefix/bin/flomd"
    for page in "$here"/contrib/man/*.[1-9]; do
        name=${page##*/}
        echo "644 contrib/man/$name $share/man/man${name##*.}/$name"
    done
    echo "644 contrib/completion/bash/flom $share/bash-completion/completions/flom"
    echo "644 contrib/completion/bash/flomd $share/bash-completion/completions/flomd"
    echo "644 contrib/completion/zsh/_flom $share/zsh/site-functions/_flom"
    echo "644 contrib/completion/fish/flom.fish $fish/flom.fish"
    echo "644 contrib/completion/fish/flomd.fish $fish/flomd.fish"
    echo "644 contrib/examples/flom.conf $share/doc/flom/flom.conf"
    [ -n "$systemd" ] || return 0
    echo "644 contrib/systemd/sysusers.d/flomd.conf $config/sysusers.d/flomd.conf"
    echo "644 contrib/systemd/tmpfiles.d/flomd.conf $config/tmpfiles.d/flomd.conf"
    echo "644 contrib/systemd/flomd.service $service"
    echo "644 contrib/systemd/flomd.socket ${service%service}socket"
    echo "644 contrib/systemd/flomd-quorum.service ${service%.service}-quorum.service"
}

missing_folders() {  # PATH: the folders on its way that are not there
    folder=${1%/*}
    while [ -n "$folder" ] && [ ! -d "$dest$folder" ]; do
        echo "$folder"
        folder=${folder%/*}
    done
}

# The manifest says what was installed: `file PATH`; `folder PATH`, which was not there before; with
# a daemon for all users `user NAME`, `memory PATH`.  It is written before what it names, so that
# what was interrupted can be done again, or undone.

installed() {  # KIND: what there is of it
    [ ! -f "$manifest" ] || sed -n "s/^$1 //p" "$manifest"
}

is_installed() {  # KIND NAME
    [ -f "$manifest" ] && grep -Fqx "$1 $2" "$manifest"
}

contents() {  # of the manifest of this installation
    list | while read -r _ _ path; do
        echo "file $path"
        missing_folders "$path" | sed 's/^/folder /'
    done
    missing_folders "$lib/__pycache__/flom" | sed 's/^/folder /'
    [ ! -f "$manifest" ] || sed '/^file /d' "$manifest"
    [ -n "$systemd" ] && [ -z "$dest" ] || return 0
    id -u flom >/dev/null 2>&1 || echo "user flom"
    for path in /run/flom /var/lib/flom /var/lib/flomd; do
        [ -e "$path" ] || echo "memory $path"
    done
}

# Checks.

check_writable() {  # PATH
    folder=$dest${1%/*}
    while [ -n "$folder" ] && [ ! -e "$folder" ]; do folder=${folder%/*}; done
    folder=${folder:-/}
    [ -d "$folder" ] || fail "$folder: not a folder"
    if [ ! -w "$folder" ] || [ ! -x "$folder" ]; then
        fail "$folder: no permission to write there (as root, or with --prefix \$HOME/.local)"
    fi
}

check_free() {  # PATH: nobody else has put something there
    [ ! -d "$dest$1" ] || fail "$dest$1: a folder is in the way"
    [ -e "$dest$1" ] || [ -h "$dest$1" ] || return 0
    case $1 in "$lib"/*) return 0 ;; esac
    is_installed file "$1" && return 0
    if [ -h "$dest$1" ]; then
        case $(ls -l "$dest$1") in *" -> $lib/"*) return 0 ;; esac
    fi
    fail "$dest$1: this is not from install.sh; move it away, or choose another --prefix"
}

check_files() {
    list | while read -r _ source path; do
        [ "$source" = launcher ] || [ -r "$here/$source" ] || fail "$here/$source: cannot be read"
        check_writable "$path"
        check_free "$path"
    done
}

check_system() {  # that there can be a daemon for all users
    [ -n "$systemd" ] && [ -z "$dest" ] || return 0
    [ "$(id -u)" = 0 ] || fail "--systemd: only root can do that"
    for program in systemctl systemd-sysusers systemd-tmpfiles; do
        command -v $program >/dev/null || fail "--systemd: no $program in PATH"
    done
}

# Installing.

launcher() {  # PATH: its text
    cat <<END
#!$python -IS
import sys; sys.path.append("$lib")
import ${1##*/}; ${1##*/}.main()
END
}

text() {  # SOURCE PATH: of the file at PATH
    case $1 in
        launcher) launcher "$2" ;;
        *.service) sed "s|/usr/local/bin/|$prefix/bin/|" "$here/$1" ;;
        *) cat "$here/$1" ;;
    esac
}

write() {  # MODE SOURCE PATH: what runs goes on to read the old file
    mkdir -p "$dest${3%/*}"
    text "$2" "$3" >"$dest$3.$ending" || {
        rm -f "$dest$3.$ending"
        fail "$dest$3: cannot be written"
    }
    chmod "$1" "$dest$3.$ending"
    mv -f "$dest$3.$ending" "$dest$3"
}

remove_unfinished() {  # of this run
    list | while read -r _ _ path; do
        rm -f "$dest$path.$ending"
    done
    rm -f "$manifest.$ending"
}

forget_compiled() {
    rm -f "$dest$lib"/__pycache__/flom.*.pyc "$dest$lib"/__pycache__/flomd.*.pyc
}

compile() {
    forget_compiled
    "$python" -IS -c 'import py_compile, sys
for path in sys.argv[2:]:
    py_compile.compile(sys.argv[1] + path, dfile=path, doraise=True)' \
        "$dest" "$lib/flom.py" "$lib/flomd.py"
}

write_files() {
    old=$(installed file)
    lines=$(contents | sort -u)
    trap remove_unfinished EXIT
    trap 'exit 1' HUP INT TERM
    mkdir -p "$dest$lib"
    echo "$lines" >"$manifest.$ending"
    mv -f "$manifest.$ending" "$manifest"
    list | while read -r mode source path; do
        write "$mode" "$source" "$path"
    done
    compile
    trap - EXIT HUP INT TERM
    for path in $old; do  # a file that this version has no more
        is_installed file "$path" || rm -f "$dest$path"
    done
}

systemd_runs() {
    [ -d /run/systemd/system ]
}

start_daemon() {
    systemd-sysusers "$config/sysusers.d/flomd.conf"
    systemd-tmpfiles --create "$config/tmpfiles.d/flomd.conf"
    if systemd_runs; then
        systemctl daemon-reload
        systemctl enable --now flomd.socket flomd.service
    else
        systemctl enable flomd.socket flomd.service
    fi
}

install_all() {
    find_python
    [ ${#python} -lt 120 ] || fail "'$python' is too long for the first line of a script"
    ! is_installed file "$service" || systemd=yes
    check_system
    check_files
    write_files
    tell_installed
    [ -n "$systemd" ] || return 0
    if [ -n "$dest" ]; then
        echo "The units are there; the user flom is not made, and nothing is enabled."
        return
    fi
    start_daemon
    tell_daemon
}

# What is said.

running() {  # the daemons that this user may end; neither systemd's nor those of containers
    main=
    ! systemd_runs || main=$(systemctl show --property MainPID --value flomd.service)
    mounts=$(readlink /proc/self/ns/mnt)
    for comm in /proc/[0-9]*/comm; do
        process=${comm%/comm}
        process=${process##*/}
        if [ "$process" != "$main" ] && [ "$(cat "$comm")" = flomd ] &&
            [ "$(readlink "${comm%/comm}/ns/mnt")" = "$mounts" ] && kill -0 "$process"; then
            echo "$process"
        fi 2>/dev/null  # it may have ended, or belong to somebody else
    done
}

tell_installed() {
    echo "flom $(sed -n 's/^VERSION = "\(.*\)"$/\1/p' "$here/flom.py") is in $dest$prefix, for" \
        "$python ($version)."
    [ -z "$dest" ] || return 0
    case :$PATH: in
        *:"$prefix/bin":*) echo "Try: flom -- echo hello" ;;
        *) echo "Try: $prefix/bin/flom -- echo hello    ($prefix/bin is not in PATH)" ;;
    esac
    case $prefix in
        /usr | /usr/local) ;;
        *) ! command -v zsh >/dev/null ||
            echo "In ~/.zshrc, before compinit: fpath+=($share/zsh/site-functions)" ;;
    esac
    tell_running
}

tell_running() {
    daemons=$(running | xargs)
    [ -z "$daemons" ] || daemons="kill $daemons"
    for unit in flomd flomd-quorum; do
        if [ -n "$systemd" ] && systemd_runs && systemctl --quiet is-active $unit.service; then
            daemons="systemctl restart $unit.service${daemons:+; $daemons}"
        fi
    done
    [ -n "$daemons" ] || return 0
    echo "A daemon that runs is left alone, with the version that it has.  A new one takes over, and"
    echo "keeps all locks, after: $daemons"
}

tell_left() {  # the daemons of what was removed
    left=
    for process in $(running); do
        if tr '\0' ' ' <"/proc/$process/cmdline" | grep -qF " $lib/flomd "; then
            left="$left $process"
        fi
    done 2>/dev/null  # one may have ended
    [ -z "$left" ] || echo "A daemon of it still runs, and ends when nobody uses it, or by: kill$left"
}

tell_daemon() {
    systemd_runs || echo "systemd does not run here: the daemon will be started at boot."
    [ ! -e /etc/flom.conf ] || return 0
    cat <<END
flom uses the daemon of all users with these lines in /etc/flom.conf:
  [Daemon]
  SocketName=/run/flom/socket
  Lifespan=0
END
}

# Uninstalling.

stop_daemon() {
    command -v systemctl >/dev/null || return 0
    now=
    ! systemd_runs || now=--now
    systemctl disable $now flomd.socket flomd.service flomd-quorum.service || :
}

remove_user() {
    for name in $(installed user); do
        userdel "$name" || :
        ! grep -q "^$name:" /etc/group || groupdel "$name" || :
    done
    for path in $(installed memory); do
        rm -rf "$path"
    done
}

uninstall_all() {
    [ -f "$manifest" ] || fail "$manifest: not there; nothing to uninstall in $dest$prefix"
    for path in $(installed file) "$lib/__pycache__/flom"; do
        check_writable "$path"
    done
    units=
    if is_installed file "$service" && [ -z "$dest" ]; then
        units=yes
        [ "$(id -u)" = 0 ] || fail "the daemon of all users: only root can remove it"
        stop_daemon
    fi
    for path in $(installed file); do  # and what an interrupted run was writing
        rm -f "$dest$path" "$dest$path".new.*
    done
    rm -rf "$dest$lib/__pycache__"
    if [ -n "$units" ]; then
        ! systemd_runs || systemctl daemon-reload
        remove_user
    fi
    folders=$(installed folder | sort -r)
    rm -f "$manifest" "$manifest".new.*
    for path in $folders; do  # those in which somebody else has put something stay
        rmdir "$dest$path" 2>/dev/null || :
    done
    echo "flom is no longer in $dest$prefix."
    [ -n "$dest" ] || tell_left
}

read_arguments "$@"
name_places
if [ -n "$uninstall" ]; then
    uninstall_all
else
    install_all
fi
