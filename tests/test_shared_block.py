"""The block that flom.py and flomd.py share is the same in both, to the byte.

    python3 tests/test_shared_block.py --copy flom.py flomd.py

copies it from the first file over that of the second.
"""
import difflib
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAIR = [os.path.join(ROOT, name) for name in ("flom.py", "flomd.py")]
BLOCK = re.compile(r"^# ==== Shared with (\w+\.py): begin ====\n(.*?)"
                   r"^# ==== Shared with \1: end ====\n", re.MULTILINE | re.DOTALL)


def split(path):
    """The text of a script before, in and after its shared block."""
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    found = list(BLOCK.finditer(text))
    assert len(found) == 1, f"{path} has {len(found)} shared blocks, not one"
    start, end = found[0].span(2)
    return text[:start], text[start:end], text[end:]


def copy(source, target):
    """Writes the block of `source` over that of `target`."""
    block = split(source)[1]
    before, _, after = split(target)
    with open(target, "w", encoding="utf-8", newline="") as file:
        file.write(before + block + after)


def difference(source, target):
    blocks = [split(path)[1].splitlines(keepends=True) for path in (source, target)]
    return "".join(difflib.unified_diff(*blocks, source, target))


def test_the_blocks_are_the_same():
    found = difference(*PAIR)
    assert not found, found


def test_each_names_the_other():
    for path, other in zip(PAIR, ("flomd.py", "flom.py")):
        assert split(path)[0].endswith(f"# ==== Shared with {other}: begin ====\n")


def test_copy(tmp_path):
    paths = [str(tmp_path / name) for name in ("one.py", "two.py")]
    for path, names in zip(paths, ("a", "b")):
        with open(path, "w") as file:
            file.write(f"head {names}\n# ==== Shared with {names}.py: begin ====\nblock {names}\n"
                       f"# ==== Shared with {names}.py: end ====\ntail {names}\n")
    assert "-block a" in difference(*paths) and "+block b" in difference(*paths)
    copy(*paths)
    assert difference(*paths) == ""
    assert split(paths[1]) == ("head b\n# ==== Shared with b.py: begin ====\n", "block a\n",
                               "# ==== Shared with b.py: end ====\ntail b\n")


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "--copy":
        sys.exit(__doc__)
    copy(*sys.argv[2:])
