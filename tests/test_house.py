"""How the two scripts are built: density, sections, names, functions (contrib/HACKING.md).

What is counted here says nothing of what the scripts do; it says whether a stranger can read them.
"""
import ast
import collections
import io
import os
import re
import statistics
import subprocess
import symtable
import sys
import tokenize

import pytest

from world import ROOT

SCRIPTS = ["flom.py", "flomd.py"]
DENSEST = 1.7  # operations a code line, over a file
WIDEST = 99  # columns
OPERATIONS = (ast.Call, ast.BinOp, ast.UnaryOp, ast.Subscript, ast.Attribute, ast.IfExp,
              ast.comprehension)
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENDMARKER}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 8), reason="Python 3.7 does not tell where a statement ends")

Section = collections.namedtuple("Section", "title statements")


class Script:
    """One of the two scripts: its text, its tree, its sections."""

    def __init__(self, name):
        self.name = name
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            self.source = file.read()
        self.lines = self.source.splitlines()
        self.tree = ast.parse(self.source)

    def nodes(self, kinds):
        return [node for node in ast.walk(self.tree) if isinstance(node, kinds)]

    def code_lines(self):
        """The numbers of the lines that hold code: no comment, no docstring, not blank."""
        numbers = set()
        for token in tokenize.generate_tokens(io.StringIO(self.source).readline):
            if token.type not in NO_CODE:
                numbers.update(range(token.start[0], token.end[0] + 1))
        for node in self.nodes((ast.Module, ast.ClassDef) + FUNCTIONS):
            if ast.get_docstring(node) is not None:
                docstring = node.body[0]
                numbers.difference_update(range(docstring.lineno, docstring.end_lineno + 1))
        return numbers

    def sections(self):
        """The sections in their order; what stands above the first banner is one, too."""
        banners = [(0, "the head")]
        for number, line in enumerate(self.lines, 1):
            found = re.match(r"# --- (.+?) -+$", line)
            if found:
                banners.append((number, found.group(1)))
        found = [Section(title, []) for _, title in banners]
        for statement in self.tree.body:
            above = [index for index, (number, _) in enumerate(banners)
                     if number <= statement.lineno]
            found[above[-1]].statements.append(statement)
        return found


@pytest.fixture(params=SCRIPTS)
def script(request):
    return Script(request.param)


def operations(tree):
    """The number of operations: what a reader has to do in his head."""
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.Compare):
            count += len(node.ops)
        elif isinstance(node, OPERATIONS):
            count += 1
    return count


def test_the_counter_counts_operations():
    assert operations(ast.parse("a")) == 0
    assert operations(ast.parse("a.b(c[0]) + 1")) == 4
    assert operations(ast.parse("a and b and c")) == 2
    assert operations(ast.parse("0 < a < 2")) == 2
    assert operations(ast.parse("[a for a in b for c in d]")) == 2
    assert operations(ast.parse("-a if b else c")) == 2


def test_density(script):
    density = operations(script.tree) / len(script.code_lines())
    assert density <= DENSEST


def test_no_conditional_expression_stands_inside_another(script):
    nested = []
    for node in script.nodes(ast.IfExp):
        inner = [other for other in ast.walk(node) if isinstance(other, ast.IfExp)]
        if len(inner) > 1:
            nested.append(node.lineno)
    assert nested == []


def test_at_most_two_values_are_assigned_at_once(script):
    """A table of constants is one whose names are all in capitals."""
    many = []
    for node in script.nodes(ast.Assign):
        for target in node.targets:
            if not isinstance(target, ast.Tuple) or not isinstance(node.value, ast.Tuple):
                continue
            constants = all(isinstance(name, ast.Name) and name.id.isupper()
                            for name in target.elts)
            if len(target.elts) > 2 and not constants:
                many.append(node.lineno)
    assert many == []


def test_lines_are_short(script):
    wide = [number for number, line in enumerate(script.lines, 1) if len(line) > WIDEST]
    assert wide == []


def test_functions_are_short(script):
    lengths = sorted(node.end_lineno - node.lineno + 1 for node in script.nodes(FUNCTIONS))
    assert lengths[-1] <= 60
    assert lengths[len(lengths) * 9 // 10] <= 30
    assert statistics.median(lengths) <= 10


def test_nothing_global_changes(script):
    assert [node.lineno for node in script.nodes(ast.Global)] == []


def test_exceptions_of_every_kind_are_caught_in_one_place(script):
    """The loop of the daemon and the reclaim of a lost lock go on after a bug, nothing else."""
    caught = []
    for node in script.nodes(ast.ExceptHandler):
        names = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} \
            if node.type else {"BaseException"}
        if names & {"Exception", "BaseException"}:
            caught.append(node.lineno)
    assert len(caught) <= 1


# Sections.  A section uses names of the sections above it, and private names of its own alone.

def defined(statements):
    """The names that these statements of a module bind."""
    names = set()
    for statement in statements:
        if isinstance(statement, FUNCTIONS + (ast.ClassDef,)):
            names.add(statement.name)
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.alias):
                names.add((node.asname or node.name).partition(".")[0])
    return names


def private(name):
    return name.startswith("_") and not name.endswith("__") and name != "_"


def private_names_made(section):
    """The private names that a section defines, attributes and methods included."""
    made = set()
    for node in ast.walk(ast.Module(section.statements, [])):
        if isinstance(node, FUNCTIONS + (ast.ClassDef,)):
            made.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            made.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            made.add(node.id)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            made.update(node.value.split())  # __slots__
    return {name for name in made if private(name)}


def private_names_used(section, imported):
    """(line, name) of private names that a section uses; those of a module (os._exit) aside."""
    for node in ast.walk(ast.Module(section.statements, [])):
        if isinstance(node, ast.Name) and private(node.id):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in imported):
                yield node.lineno, node.attr


def globals_used(table):
    """The names that a function, a class, and what is inside it take from the module."""
    used = {symbol.get_name() for symbol in table.get_symbols()
            if symbol.is_global() and symbol.is_referenced()}
    return used.union(*[globals_used(child) for child in table.get_children()])


def names_used(script, section):
    """The names of the module that a section uses."""
    lines = set()
    used = set()
    for statement in section.statements:
        lines.update(range(statement.lineno, statement.end_lineno + 1))
        lines.update(node.lineno for node in getattr(statement, "decorator_list", []))
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                if not isinstance(statement, FUNCTIONS + (ast.ClassDef,)):
                    used.add(node.id)
    for table in symtable.symtable(script.source, script.name, "exec").get_children():
        if table.get_lineno() in lines:
            used |= globals_used(table)
    return used


def test_sections_use_what_stands_above_them(script):
    sections = script.sections()
    names = [defined(section.statements) for section in sections]
    wrong = []
    for index, section in enumerate(sections):
        below = set().union(*names[index + 1:]) - names[index]
        wrong += [f"{section.title} uses {name}"
                  for name in sorted(names_used(script, section) & below)]
    assert wrong == []


# argparse calls the first by its name; the second is public in spite of it (namedtuple).
HOOKS = {"_get_option_tuples", "_replace"}


def test_sections_use_no_private_name_of_another(script):
    imported = defined([node for node in script.nodes((ast.Import, ast.ImportFrom))])
    wrong = []
    for section in script.sections():
        own = private_names_made(section) | HOOKS
        for line, name in private_names_used(section, imported):
            if name not in own:
                wrong.append(f"{line}: {section.title} uses {name}")
    assert wrong == []


def test_each_section_says_what_it_is_for(script):
    """A comment stands under each banner, before the first statement."""
    silent = []
    for number, line in enumerate(script.lines, 1):
        if re.match(r"# --- .+ -+$", line):
            following = [text for text in script.lines[number:number + 3] if text.strip()]
            if not following or not following[0].startswith("#"):
                silent.append(line)
    assert silent == []


# What is public says what it does.

def test_overrides_of_a_kind_have_a_docstring():
    kinds = [section for section in Script("flomd.py").sections() if section.title == "Kinds"]
    bare = []
    for statement in kinds[0].statements:
        if not isinstance(statement, ast.ClassDef):
            continue
        for node in statement.body:
            if isinstance(node, FUNCTIONS) and not node.name.startswith("__"):
                if ast.get_docstring(node) is None:
                    bare.append(f"{statement.name}.{node.name}")
    assert bare == []


def test_mypy_is_content():
    if subprocess.run([sys.executable, "-c", "import mypy"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mypy is not installed; tox -e type has it")
    result = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT,
                            stdout=subprocess.PIPE, universal_newlines=True)
    assert result.returncode == 0, result.stdout
