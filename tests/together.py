"""python tests/together.py [arguments of pytest]: the whole suite in several pytests at once.

Most of its time the suite waits, so one process leaves the cores idle.  Each pytest collects all
tests and runs those that no other has begun (see conftest.py); the first one writes as ever, what
the others have to say follows when all have ended.  The status is the worst of theirs.
"""
import os
import random
import subprocess
import sys
import tempfile

JOBS = 4  # on 2 cores 1.6 times as fast as 2


def begin(command, claims, job, log):
    """One pytest of the several.  It has a folder for what tests write of its own: in that of the
    user it would remove what is left of earlier runs, while the others do so, and fail."""
    folder = ["--basetemp", os.path.join(claims, f"tmp-{job}")]
    return subprocess.Popen(command + folder + sys.argv[1:], stdout=log,
                            env=dict(os.environ, FLOM_CLAIMS=f"{claims}:{job}:{JOBS}"))


def main():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    os.environ.setdefault("FLOM_SEED", str(random.SystemRandom().randrange(10 ** 9)))
    with tempfile.TemporaryDirectory(prefix="f", dir="/tmp") as claims:
        logs = [None] + [tempfile.TemporaryFile() for _ in range(1, JOBS)]
        runs = [begin(command, claims, job, log) for job, log in enumerate(logs)]
        statuses = [run.wait() for run in runs]
        for log in logs[1:]:
            log.seek(0)
            sys.stdout.flush()
            sys.stdout.buffer.write(log.read())
    return max(map(abs, statuses))


if __name__ == "__main__":
    sys.exit(main())
