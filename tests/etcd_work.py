"""What the clients of etcd_load.py run under a lock; it imports little, since it starts often.

    etcd_work.py LOG RUN LOCK SECONDS gentle|stubborn
        notes token and value at its begin, that it is alive, and its end; it goes on while the
        file LOG.keep is there.  A stubborn one ignores TERM.
"""
import os
import signal
import sys
import time

BEAT = 0.1  # s between two `alive`


class Log:
    """A file to which many processes append lines."""

    def __init__(self, path):
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def note(self, *words):
        line = " ".join(map(str, words)) + f" {time.monotonic():.6f}\n"
        os.write(self.descriptor, line.encode())


def work(path, run, lock, seconds, manner, *_):
    """The command under a lock."""
    log, ended = Log(path), []
    signal.signal(signal.SIGTERM, signal.SIG_IGN if manner == "stubborn" else
                  lambda number, frame: ended.append(number))
    log.note("begin", run, lock, os.environ["FLOM_TOKEN"], os.environ.get("FLOM_ELEMENT") or "-")
    until = time.monotonic() + float(seconds)
    left = float(seconds)
    while not ended and (left > 0 or os.path.exists(f"{path}.keep")):
        time.sleep(min(BEAT, left) if left > 0 else BEAT)
        log.note("alive", run)
        left = until - time.monotonic()
    log.note("end", run)
    sys.exit(143 if ended else 0)


if __name__ == "__main__":
    work(*sys.argv[1:])
