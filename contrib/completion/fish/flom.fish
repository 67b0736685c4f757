# Completion of flom and flomd for fish; flomd.fish, beside it, reads this file.

function __flom_interfaces
    set -l found /sys/class/net/*
    string replace -r '.*/' '' $found
    or string split ' ' (ifconfig -l 2>/dev/null)
end

function __flom_signals
    string replace -r '^' SIG (string match -ra '(?<![-+A-Z])(?!RT)[A-Z][A-Z0-9]+' (kill -l))
end

# The rows of the status report of the daemon that the line means; nothing where none answers
# within 2 s.
function __flom_rows
    set -l words (commandline -opc)
    set -l program $words[1]
    set -e words[1]
    set -l where
    set -l long '(config-file|socket-name|(uni|multi)cast-(address|port)|network-interface|tls-.*)'
    while set -q words[1]
        if string match -qr "^(-[csapAPn]|--$long)\$" -- $words[1]; and set -q words[2]
            set -a where $words[1..2]
            set -e words[1]
        else if string match -qr "^(-[csapAPn].|--$long=)" -- $words[1]
            set -a where $words[1]
        end
        set -e words[1]
    end
    set -l limit command
    type -q timeout; and set limit timeout 2
    $limit $program $where --status 2>/dev/null | string match -r '.*  .*' |
        string match -v -r '^RESOURCE .* STATE .* ID .*'
end

function __flom_names
    __flom_rows | string replace -r '  .*' '' | string match -v _RESOURCE
end

function __flom_ids
    __flom_rows | string replace -rf '.*  ([0-9a-f]{8})  .*' '$1'
end

# The words of the command, as far as they are there; status 1 while options are typed.
function __flom_command
    set -l flags help version verbose quiesce-exit immediate-exit status json watch check-config \
        signal-list unique-id allow-remote-shutdown quiet
    set -l words (commandline -opc)[2..-1]
    while set -q words[1]
        set -l word $words[1]
        set -e words[1]
        switch $word
            case --
                string escape -- $words
                return 0
            case '--*=*' --$flags
                continue
            case '--*'
                set -e words[1]
            case '-*'
                # a bundle: flags, then perhaps an option whose value is the rest or the next word
                string match -qr '^-[hvVxX]*[^-hvVxX]$' -- $word
                and set -e words[1]
            case '*'
                string escape -- $word $words
                return 0
        end
    end
    return 1
end

function __flom_in_options
    not __flom_command >/dev/null
end

function __flom_complete_command
    set -l word (commandline -ct)
    set -l words
    if not set words (__flom_command)
        string match -q -- '-*' $word; and return
    end
    set words (string join ' ' -- $words $word)
    complete "--do-complete=$words"
end

set -l folders '(__fish_complete_directories)'
set -l modes NL CR CW PR PW EX NullLock ConcurrentRead ConcurrentWrite ProtectedRead \
    ProtectedWrite Exclusive

# what both have
for name in flom flom.py flomd flomd.py
    set -l of -c $name
    string match -q 'flomd*' $name; or set -a of -n __flom_in_options
    complete $of -s h -l help -f -d 'show the options and end'
    complete $of -s v -l version -f -d 'show the version and end'
    complete $of -s c -l config-file -rF -d 'read this file after the others'
    complete $of -s t -l daemon-trace-file -rF -d 'log of the daemon'
    complete $of -l append-trace-file -xa 'yes no' -d 'append to the logs'
    complete $of -s V -l verbose -f -d 'show settings and events'
    complete $of -s s -l socket-name -rF -d 'UNIX socket of the daemon'
    complete $of -s d -l daemon-lifespan -x -d 'ms of an unused daemon; -1: for ever'
    complete $of -s a -l unicast-address -xa '(__fish_print_hostnames)' -d 'address of the daemon'
    complete $of -s p -l unicast-port -x -d 'TCP port of the daemon'
    complete $of -s A -l multicast-address -x -d 'group of the daemon'
    complete $of -s P -l multicast-port -x -d 'UDP port of the group'
    complete $of -s m -l mount-point-vfs -xa "$folders" -d 'where its state is shown'
    complete $of -s n -l network-interface -xa '(__flom_interfaces)' -d 'for multicast'
    complete $of -s D -l discovery-attempts -x -d 'questions for a daemon'
    complete $of -s I -l discovery-timeout -x -d 'ms to wait for an answer'
    complete $of -l discovery-ttl -x -d 'hops that questions may go'
    complete $of -l tcp-keepalive-time -x -d 's of silence before the first probe'
    complete $of -l tcp-keepalive-intvl -x -d 's between probes'
    complete $of -l tcp-keepalive-probes -x -d 'probes in vain that end a connection'
    complete $of -l tls-certificate -rF -d 'PEM file of the certificate'
    complete $of -l tls-private-key -rF -d 'PEM file of its key'
    complete $of -l tls-ca-certificate -rF -d 'PEM file of the CA'
    complete $of -l tls-check-peer-id -xa 'yes no' -d 'certificate CN must be the peer id'
    complete $of -l policy -xa 'fair first-fit' -d 'who is granted next'
    complete $of -l recovery-window -x -d 'ms for former holders only'
    complete $of -l state-dir -xa "$folders" -d 'where the daemon keeps its state'
    complete $of -l allow-remote-shutdown -f -d 'let other hosts stop the daemon'
    complete $of -l check-config -f -d 'report every problem of the configuration'
end

# the client
for name in flom flom.py
    set -l of -c $name -n __flom_in_options
    complete $of -s x -l quiesce-exit -f -d 'stop the daemon when it is unused'
    complete $of -s X -l immediate-exit -f -d 'stop the daemon now'
    complete $of -l status -f -d 'show who holds and who waits'
    complete $of -l json -f -d 'status as JSON'
    complete $of -l watch -f -d 'status, every second'
    complete $of -l evict -xa '(__flom_ids)' -d 'take a lock away'
    complete $of -l signal-list -f -d 'list the signals'
    complete $of -l unique-id -f -d 'show the id of this host'
    complete $of -s T -l command-trace-file -rF -d 'log of this command'
    complete $of -s r -l resource-name -xa '(__flom_names)' -d 'what to lock'
    complete $of -s o -l resource-timeout -x -d 'ms to wait; -1: for ever'
    complete $of -s q -l resource-quantity -x -d 'units of a numeric resource'
    complete $of -s l -l lock-mode -xa "$modes" -d 'NL CR CW PR PW EX'
    complete $of -s e -l resource-create -xa 'yes no' -d 'create what is not there'
    complete $of -s i -l resource-idle-lifespan -x -d 'ms that it outlives its users'
    complete $of -l ignore-signal -xa '(__flom_signals)' -d 'signal to ignore (repeatable)'
    complete $of -l on-lock-loss -xa 'warn term ignore' -d 'what to do when the lock is lost'
    complete $of -l kill-after -x -d 'ms from TERM to KILL'
    complete $of -l deadlock -xa 'fail wait reuse' -d 'fail, wait or reuse'
    complete $of -l quiet -f -d 'no line for busy, timeout and 96'
    complete $of -l progress -xa 'yes no' -d 'tell what it waits for'
    complete $of -l set-env -xa 'yes no' -d 'export FLOM_RESOURCE and others'
    complete $of -l element-argument -xa 'yes no' -d 'append the element to the command'
    complete $of -l inherit-connection -xa 'yes no' -d 'keep the lock should flom be killed'
    complete $of -l min-hold -x -d 'ms to keep the lock at least'
    complete $of -l busy-status -x -d 'exit status for busy and timeout'
    complete -c $name -f -a '(__flom_complete_command)'
end

# the daemon
for name in flomd flomd.py
    set -l of -c $name
    complete $of -f
    complete $of -s f -l foreground -f -d 'do not detach, log to stderr'
    complete $of -l no-files -f -d 'read no configuration file'
    complete $of -l pid-file -rF -d 'write the pid there'
    complete $of -l log -rFa 'syslog stderr' -d 'where to log'
    complete $of -l log-level -xa 'error warning info debug' -d 'what to log'
    complete $of -l metrics -rF -d 'write figures for Prometheus there'
    complete $of -l max-clients -x -d 'limit of connections'
    complete $of -l max-waiters -x -d 'limit of waiting requests'
    complete $of -l max-resources -x -d 'limit of resources'
    complete $of -l socket-mode -x -d 'mode of the UNIX socket, octal'
    complete $of -l etcd -x -d 'members of the cluster that decides who serves'
    complete $of -l etcd-prefix -x -d 'of its keys there'
    complete $of -l etcd-state -rF -d 'where it notes which cluster it is'
    complete $of -l etcd-user -x -d 'who it is there'
    complete $of -l etcd-password-file -rF -d 'file with the password'
    complete $of -l etcd-ca -rF -d 'PEM file of its CA'
    complete $of -l etcd-certificate -rF -d 'PEM file of a certificate for it'
    complete $of -l etcd-private-key -rF -d 'PEM file of its key'
    complete $of -l etcd-ttl -x -d 'ms until another daemon takes over'
    complete $of -l etcd-compact -f -d 'compact etcd, which is used by flom alone'
    complete $of -l etcd-new-cluster -f -d 'take the etcd cluster for the right one'
end
