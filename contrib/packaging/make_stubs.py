"""Makes flom-stubs/__init__.pyi, what type checkers know of `import flom`, out of flom.py.

    python3 contrib/packaging/make_stubs.py [--check]

A module of one file cannot say that it has annotations (PEP 561), so a package of stubs stands
beside it in the wheel.  It has the names of flom.__all__, and what they refer to.  Run this when
the annotations of the Python API have changed; --check only compares.  Python 3.9 or newer.
"""
import ast
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.path.join(HERE, "..", "..", "flom.py")
TARGET = os.path.join(HERE, "flom-stubs", "__init__.pyi")
HEAD = "# Made by contrib/packaging/make_stubs.py out of flom.py.\n"
VALUES = {int: "int", str: "str", bool: "bool"}
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


def stubs(source):
    """The text of the stubs of a source."""
    tree = ast.parse(source)
    made = {node.name: node for node in tree.body if hasattr(node, "name")}
    constants = constants_of(tree)
    parts = [ast.unparse(node) for node in typing_part(tree)]
    for name in in_order(made, constants["__all__"]):
        node = made[name]
        if isinstance(node, ast.ClassDef):
            parts.append(class_stub(node, constants))
        else:
            parts.append(function_stub(node))
    parts.append(f"__all__ = {constants['__all__']!r}")
    return HEAD + "\n".join(parts) + "\n"


def constants_of(tree):
    """{name: value} of the constants of the module."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                continue
            names = [target for target in node.targets if isinstance(target, ast.Name)]
            found.update({name.id: value for name in names})
            for target in node.targets:
                if isinstance(target, ast.Tuple):
                    found.update(zip([name.id for name in target.elts], value))
    return found


def is_for_typing(node):
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def typing_part(tree):
    """The statements that only a type checker reads."""
    for node in tree.body:
        if is_for_typing(node):
            yield from node.body


def in_order(made, public):
    """The public names, and those that they refer to, in the order of flom.py."""
    wanted = list(public)
    for name in wanted:
        for node in ast.walk(made[name]):
            text = getattr(node, "id", "")
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            is_base = text in [getattr(base, "id", "") for base in getattr(made[name], "bases", [])]
            is_result = text.startswith("Timed")
            if text in made and text not in wanted and (is_base or is_result):
                wanted.append(text)
    return [name for name in made if name in wanted]


def class_stub(node, constants):
    lines = []
    overloaded = set()
    for statement in node.body:
        if isinstance(statement, FUNCTIONS):
            if is_public(statement.name) and statement.name not in overloaded:
                if statement.name == "__init__":
                    lines += attributes(statement)
                lines.append(function_stub(statement))
        elif is_for_typing(statement):
            overloaded.update(inner.name for inner in statement.body)
            lines += [function_stub(inner) for inner in statement.body]
        elif isinstance(statement, ast.AnnAssign):
            lines.append(f"{statement.target.id}: {statement.annotation.value}")
        elif isinstance(statement, ast.Assign) and is_public(statement.targets[0].id):
            value = statement.value
            kind = type(constants.get(getattr(value, "id", ""), getattr(value, "value", None)))
            lines.append(f"{statement.targets[0].id}: {VALUES[kind]}")
    bases = ", ".join(base.id for base in node.bases)
    head = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    body = "\n".join(lines) or "..."
    return head + "\n" + "\n".join("    " + line for line in body.split("\n"))


def is_public(name):
    return not name.startswith("_") or name.startswith("__")


def attributes(function):
    """The public attributes that __init__ annotates."""
    for node in ast.walk(function):
        if isinstance(node, ast.AnnAssign) and is_public(node.target.attr):
            yield f"{node.target.attr}: {node.annotation.value}"


def function_stub(node):
    """Its signature; annotations that are strings become what they say."""
    for part in ast.walk(node.args):
        if isinstance(part, ast.arg) and part.annotation is not None:
            part.annotation = plain(part.annotation)
    if node.returns is not None:
        node.returns = plain(node.returns)
    node.body = [ast.Expr(ast.Constant(...))]
    return ast.unparse(node)


def plain(annotation):
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return ast.parse(annotation.value, mode="eval").body
    return annotation


def main():
    with open(SOURCE, encoding="utf-8") as file:
        text = stubs(file.read())
    if "--check" in sys.argv:
        with open(TARGET, encoding="utf-8") as file:
            return file.read() != text
    with open(TARGET, "w", encoding="utf-8") as file:
        file.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
