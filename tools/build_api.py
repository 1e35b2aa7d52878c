"""Writes the signatures of docs/api.md from the modules themselves: `python tools/build_api.py`.

Between `<!-- api: MODULE NAME ... -->` and `<!-- end -->` stand, of each name, its signature as the source has it and
the first paragraph of its docstring; all the rest of the page is written by hand. `--check` writes nothing and exits
with 1 where the page is stale.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
BLOCK = re.compile(r"(<!-- api: ([\w.]+) ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH = 100
INNER = ("check",)  # methods that a class calls itself

sys.path.insert(0, str(ROOT))


def join_arguments(head: str, arguments: list[str], tail: str) -> str:
    """A call on one line, or with its arguments on lines of their own where it would be too long."""
    line = f"{head}({', '.join(arguments)}){tail}"
    if len(line) <= WIDTH:
        return line
    rows = [""]
    for argument in arguments:
        if len(rows[-1]) + len(argument) + 2 > WIDTH - 4:
            rows.append("")
        rows[-1] += f" {argument},"
    return "\n".join([f"{head}(", *(f"   {row}" for row in rows), f"){tail}"])


def split_arguments(given: ast.arguments) -> list[str]:
    """The arguments as they are written, without self."""

    def write(argument: ast.arg, default: ast.expr | None) -> str:
        kind = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
        equals = " = " if kind else "="
        return argument.arg + kind + (f"{equals}{ast.unparse(default)}" if default else "")

    plain = [*given.posonlyargs, *given.args]
    missing: list[ast.expr | None] = [None] * (len(plain) - len(given.defaults))
    parts = [write(one, default) for one, default in zip(plain, [*missing, *given.defaults], strict=True)]
    parts += [f"*{write(given.vararg, None)}"] if given.vararg else ["*"] * bool(given.kwonlyargs)
    parts += [write(one, default) for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    parts += [f"**{write(given.kwarg, None)}"] if given.kwarg else []
    return [part for part in parts if part != "self"]


def describe_function(node: ast.FunctionDef) -> str:
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return join_arguments(node.name, split_arguments(node.args), result)


def describe_class(node: ast.ClassDef) -> str:
    """The fields of a data class, or the arguments of a class, and below it the methods without underscore."""
    fields = [ast.unparse(part) for part in node.body if isinstance(part, ast.AnnAssign)]
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    made = next((split_arguments(part.args) for part in methods if part.name == "__init__"), fields)
    lines = [join_arguments(f"class {node.name}", made, "")]
    for part in methods:
        if not part.name.startswith("_") and part.name not in INNER:
            is_property = any(ast.unparse(one) == "property" for one in part.decorator_list)
            text = f"{part.name} -> {ast.unparse(part.returns)}" if is_property else describe_function(part)
            lines.append(textwrap.indent(f".{text}", "    "))
    return "\n".join(lines)


def describe(module: str, name: str) -> str:
    """Signature and first paragraph of one name. Raises AttributeError where there is none, ValueError where it has no
    docstring."""
    thing = getattr(importlib.import_module(module), name)
    node = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    told = inspect.getdoc(thing)
    if not told or not thing.__doc__:
        raise ValueError(f"{module}.{name} has no docstring")
    signature = describe_class(node) if isinstance(node, ast.ClassDef) else describe_function(node)
    return f"```\n{signature}\n```\n\n{told.split(chr(10) * 2)[0]}\n"


def build(page: str) -> str:
    """The page with every block written anew."""

    def write(found: re.Match[str]) -> str:
        head, module, names, end = found.groups()
        return head + "\n" + "\n".join(describe(module, name) for name in names.split()) + "\n" + end

    return BLOCK.sub(write, page)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    built = build(page)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if built == page else f"{PAGE} is stale: run python tools/build_api.py")
    PAGE.write_text(built, encoding="utf-8")


if __name__ == "__main__":
    main()
