"""A clock for flomd's loop that goes on as soon as the loop waits: what takes seconds takes no
time, and a machine that stands still for a moment moves no date past another.

For tests of dates in this process; a thread, a child or another process would be too late.
"""
import selectors
import time
import types

import flomd


class Clock:
    """In place of the module `time`: the real time and what was passed over."""

    def __init__(self):
        self.passed = 0  # s

    def __getattr__(self, name):
        return getattr(time, name)

    def monotonic(self):
        return time.monotonic() + self.passed

    def time(self):
        return time.time() + self.passed

    def clock_gettime(self, number):
        return time.clock_gettime(number) + self.passed


def let_time_fly(monkeypatch):
    """The loops that are made from now on pass over what they would wait for."""
    clock = Clock()

    class Selector(selectors.DefaultSelector):
        def select(self, timeout=None):
            found = super().select(0)
            if not found:
                clock.passed += timeout
            return found
    monkeypatch.setattr(flomd, "time", clock)
    monkeypatch.setattr(flomd, "selectors", types.SimpleNamespace(DefaultSelector=Selector))
