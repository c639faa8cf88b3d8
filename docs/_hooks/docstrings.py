"""Docstrings in NumPy's form, as `help` shows them, become Markdown for the reference.

Roles become links to the entries they name, citations such as ``[1]_`` links to the reference below
them. Types that the parser would read as Python tuples become prose: ``array, shape (n,)`` is an
``array of shape (n,)``, and ``{"a", "b"}`` is ``"a" or "b"``.
"""

import re

import griffe

ROLE = re.compile(r":(func|class|meth|attr|mod|exc|data):`~?([\w.]+)`")
CITATION = re.compile(r"\[(\d)\]_")
REFERENCE = re.compile(r"^( *)\.\. \[(\d)\] ((?:.|\n\1 {3,}(?=\S))*)", re.MULTILINE)
CHOICES = re.compile(r"\{(.*?)\}")
ERRORS = re.compile(r"^ *\w*Error(?:, \w*Error)+$", re.MULTILINE)
TYPE = re.compile(r"^ *[\w*, ]+ : .*$", re.MULTILINE)


class MarkdownDocstrings(griffe.Extension):
    """Rewrite each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrite the docstring of `obj`, if it has one."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value, obj)


def markdown(text: str, obj: griffe.Object) -> str:
    """Return the docstring `text` of `obj` in Markdown."""
    text = TYPE.sub(lambda line: CHOICES.sub(choices, line[0].replace("`", "")), text)
    text = ERRORS.sub(lambda line: line[0].replace(", ", " or "), text)
    text = re.sub(r"shape of `(\w+)`", r"shape of \1", text)
    text = re.sub(r", shape (?=\()", " of shape ", text)
    text = ROLE.sub(lambda role: link(role[1], role[2], obj), text)
    here = {reference[2] for reference in REFERENCE.finditer(text)}  # others are of the class
    text = CITATION.sub(lambda c: f"[[{c[1]}]](#ref-{c[1]})" if c[1] in here else f"[{c[1]}]", text)
    return REFERENCE.sub(r"\1[\2] \3\n\1{: #ref-\2 }\n", text)


def choices(braces: re.Match[str]) -> str:
    """Return what stands in `braces` as alternatives."""
    return braces[1].replace(", ", " or ")


def link(role: str, name: str, obj: griffe.Object) -> str:
    """Return a link to the entry of `name`, as seen from `obj`."""
    first, *rest = name.split(".")
    path = name
    scope = obj
    while first != scope.package.name:
        if role == "meth" and not rest and scope.is_class:
            path = f"{scope.path}.{name}"  # which may be inherited
            break
        if first in scope.members:
            member = scope.members[first]
            start = member.target_path if isinstance(member, griffe.Alias) else member.path
            path = ".".join([start, *rest])
            break
        if not isinstance(scope.parent, griffe.Object):
            break
        scope = scope.parent
    return f"[`{name.rpartition('.')[2]}`][{path}]"
