"""Crowds: many clients that hold and wait at the same time, and the check of what they have done.

Each command logs that it enters and that it exits; in between it works for a moment.
"""
import collections
import itertools

from fakes import COMPATIBLE
from world import chance

WORK = """\
echo "enter $0 $FLOM_TOKEN ${3:--}" >>"$1"
sleep "$2"
echo "exit $0" >>"$1"
exit "${0##*.}"
"""
NUMBERS = ("_S_n[2]", "_s_n[1]", "_t_%H%M%S#fff[1]")
WISHES = [  # what clients ask for: all kinds
    ("R", "-l", "EX"), ("R", "-l", "PR"), ("R", "-l", "PR"), ("pool[3]", "-q", "1"),
    ("pool[3]", "-q", "2"), ("/a/b", "-l", "EX"), ("/a/c", "-l", "PW"), ("/a", "-l", "CR"),
    ("one.two",), *((name, "-i", "1h") for name in NUMBERS)]
Run = collections.namedtuple("Run", "name wish flom")


class Crowd:
    """A client of a box for each wish, replaced by others when they have ended.

    `options`: of all clients; `ends`: of these digits a command's status is drawn; `work`: the
    least and the greatest s that it works.
    """

    def __init__(self, box, seed, options, ends="0", work=(0.05, 0.5)):
        self.box, self.chance, self.options = box, chance(f"crowd {seed}"), options
        self.ends, self.work = ends, work
        self.numbers, self.wishes = itertools.count(), itertools.cycle(WISHES)
        self.running, self.over = [], []

    def fill(self, most):
        """Starts at most so many clients, until there are as many as there are wishes."""
        ended = [run for run in self.running if run.flom.poll() is not None]
        self.over += ended
        self.running = [run for run in self.running if run not in ended]
        for _ in range(min(most, len(WISHES) - len(self.running))):
            self.running.append(self._client(next(self.wishes)))

    def _client(self, wish):
        name = f"{next(self.numbers)}.{self.chance.choice(self.ends)}"
        return Run(name, wish, self.box.flom(
            *self.options, "-r", *wish, "--", "/bin/sh", "-c", WORK, name, self.box.log,
            f"{self.chance.uniform(*self.work):.2f}"))

    def entered(self):
        """How many commands have begun so far."""
        if all(run.flom.poll() is not None for run in self.running):
            self.fill(4)
        return sum(line.startswith("enter") for line in self.box.events())

    def end(self):
        """Nobody is forgotten: everyone ends."""
        for run in self.running:
            run.flom.wait(timeout=60)
        self.over += self.running
        self.running = []

    def check_order(self):
        """No two incompatible commands overlap, and of two of them the later has the greater
        token; returns the names of those that have run."""
        wishes, inside, entered, last = self._wishes(), {}, set(), {}
        for what, name, *rest in self._entries():
            if what == "exit":
                wish, token, element = inside.pop(name)
                if wish[0] not in NUMBERS:
                    last[wish, element] = max(token, last.get((wish, element), 0))
                continue
            entered.add(name)
            wish, token, element = wishes[name], int(rest[0]), rest[1]
            inside[name] = wish, token, element
            assert fits(list(inside.values())), (name, inside)
            for (other, label), earlier in last.items():
                assert earlier < token or fits([(wish, 0, element), (other, 1, label)]), name
        assert not inside
        return entered

    def check_values(self):
        """No number and no time came twice, those aside that a command gave back."""
        for name in NUMBERS:
            used = self.values(name)
            assert len(set(used)) == len(used), (name, used)

    def values(self, name):
        """The elements that commands have had, and not given back."""
        wishes = self._wishes()
        return [rest[1] for what, run, *rest in self._entries()
                if what == "enter" and wishes[run][0] == name and run.endswith("0")]

    def _entries(self):
        return [line.split() for line in self.box.events()]

    def _wishes(self):
        return {run.name: run.wish for run in self.over}


def fits(commands):
    """Whether these [(wish, token, element)] may run at the same time."""
    assert len({token for _, token, _ in commands}) == len(commands)
    units = sum(int(wish[2]) for wish, _, _ in commands if wish[0] == "pool[3]")
    labels = [wish[:1] + (element,) for wish, _, element in commands
              if wish[0] in ("one.two", *NUMBERS)]
    modes = [wish for wish, _, _ in commands if wish[0] == "R" or wish[0][0] == "/"]
    crowded = [name for name in NUMBERS
               if sum(wish[0] == name for wish, _, _ in commands) > int(name[-2])]
    return units <= 3 and len(set(labels)) == len(labels) and not crowded and all(
        agree(*pair) for pair in itertools.combinations(modes, 2))


def agree(one, other):
    """Whether two locks with modes do: the one not above the other, or of compatible modes."""
    (name, _, mode), (other_name, _, other_mode) = sorted([one, other])
    related = name == other_name or other_name.startswith(name + "/")
    return not related or other_mode in COMPATIBLE[mode].split()
