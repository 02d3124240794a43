"""The documentation's build: `sphinx-build -W --keep-going docs docs/_build`.

The pages are Markdown. The API reference is written anew by every build, a page for each room, from
the docstrings and from the comments behind settings and enum members.
"""

import ast
import importlib
import io
import pkgutil
import sys
import tokenize
from pathlib import Path
from types import ModuleType
from typing import Any

import sphinx.util.inspect
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.inspect import stringify_signature

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

project = "flax-resnet"
author = "the flax-resnet authors"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "flax-resnet"
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

default_role = "code"  # a single backquote, in a docstring, is code
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "undoc-members": True, "special-members": "__call__"}
napoleon_numpy_docstring = False

comments: dict[str, str] = {}  # of settings, enum members and fields, by full name
# What Sphinx would otherwise repeat from a base class.
MADE_BY_PYTHON = ("Alias for field number", "Create new instance", "Call self as a function")


def write_api(directory: Path) -> None:
    """A page for the package's root and one for each of its rooms, with all modules of each."""
    directory.mkdir(exist_ok=True)
    pages: list[str] = []
    for package_name in ("flax_resnet", "torch_ref"):
        package = importlib.import_module(package_name)
        found = list(pkgutil.iter_modules(package.__path__, f"{package_name}."))
        modules = [m.name for m in found if not m.ispkg and not m.name.endswith(".__main__")]
        pages.append(write_page(directory, package, modules))
        for room_name in (m.name for m in found if m.ispkg):
            room = importlib.import_module(room_name)
            modules = [m.name for m in pkgutil.iter_modules(room.__path__, f"{room_name}.")]
            pages.append(write_page(directory, room, modules))
    for old in directory.glob("*.md"):
        if old.stem not in (*pages, "index"):
            old.unlink()
    toctree = "\n".join(pages)
    text = f"# API reference\n\n```{{toctree}}\n:maxdepth: 2\n\n{toctree}\n```\n"
    write(directory / "index.md", text)


def write_page(directory: Path, package: ModuleType, modules: list[str]) -> str:
    """Writes a package's page and returns its name."""
    summary = " ".join((package.__doc__ or "").split())
    sections = [f"# {package.__name__}\n\n{summary}\n"]
    public = [getattr(package, name) for name in getattr(package, "__all__", [])]
    if public:
        links = ", ".join(f":py:obj:`{x.__name__} <{x.__module__}.{x.__name__}>`" for x in public)
        text = f"The package itself gives these names: {links}."
        sections.append(f"```{{eval-rst}}\n{text}\n```\n")
    for name in modules:
        read_comments(name)
        sections.append(f"## {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n")
    write(directory / f"{package.__name__}.md", "\n".join(sections))
    return package.__name__


def write(path: Path, text: str) -> None:
    """Only what has changed, so that a second build has less to do."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def read_comments(module: str) -> None:
    """Makes the comment behind a setting, an enum member or a field its text in the reference."""
    analyzer = ModuleAnalyzer.for_module(module)
    analyzer.analyze()
    tokens = tokenize.generate_tokens(io.StringIO(analyzer.code).readline)
    found = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    for cls in ast.parse(analyzer.code).body:
        for node in cls.body if isinstance(cls, ast.ClassDef) else []:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", 0)
            if isinstance(target, ast.Name) and node.end_lineno in found:
                text = found[node.end_lineno].lstrip("# ")
                analyzer.attr_docs.setdefault((cls.name, target.id), [text, ""])
                comments[f"{module}.{cls.name}.{target.id}"] = text


def edit_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Runs after Napoleon, which would take `a: b` behind an attribute for `type: meaning`."""
    if name in comments:
        lines[:] = [comments[name]]
    elif lines and lines[0].startswith(MADE_BY_PYTHON):
        lines.clear()


def edit_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, result: str
) -> tuple[str | None, str]:
    """Shows a module's own arguments, which Flax's metaclass hides, and short names of types."""
    if what == "class" and signature and "**kwargs" in signature:
        own = sphinx.util.inspect.signature(obj.__init__, bound_method=True)
        signature = stringify_signature(
            own, unqualified_typehints=True, show_return_annotation=False
        )
    return tuple(
        text and text.replace("jaxlib._jax.Array", "Array") for text in (signature, result)
    )


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", edit_text, priority=900)
    app.connect("autodoc-process-signature", edit_signature)


write_api(HERE / "api")
