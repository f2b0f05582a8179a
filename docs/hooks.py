"""What mkdocs makes of other files: the first page, the command line, the keys of recipes, the changelog."""

from __future__ import annotations

import inspect
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, get_args

import griffe
from mkdocs.structure.files import File, Files

from pera_lab.sections import Section

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are generated."""
    files.append(File.generated(config, "cli.md", content=_commands()))
    files.append(File.generated(config, "recipe.md", content=_recipe_keys()))
    for name, page in (("README.md", "index.md"), ("CHANGELOG.md", "changelog.md")):
        text = (ROOT / name).read_text(encoding="utf-8").replace("](CHANGELOG.md", "](changelog.md")
        text = re.sub(r"\]\((?!https?:|docs/|changelog|#)", "](../", text)  # other files of the repository
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Point links that leave docs/ to the repository. Without its address the link becomes plain text."""

    def outside(match: re.Match[str]) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        target = ((ROOT / "docs" / page.file.src_uri).parent / path).resolve().relative_to(ROOT)
        if target.name == "README.md" and len(target.parts) == 1:
            return f"[{text}](index.md{anchor})"
        if target.parts[0] == "docs":
            return match[0]
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{target}{anchor})" if config.repo_url else text

    return re.sub(r"\[([^\]]*)\]\((\.\./[^)#]*)(#[^)]*)?\)", outside, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Remove the roles of Sphinx from docstrings."""
    return re.sub(r":(mod|func|class|meth|data|attr):(?=<code>)", "", html)


def _commands() -> str:
    import typer
    from typer.cli import get_docs_for_click

    from pera_lab.cli.app import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="pera", title="Command line")
    return re.sub(r"(`[^`]*`)|<(?=\w)", lambda match: match[1] or "&lt;", text)  # runs/<recipe>-<time> is not HTML


RECIPE = """# Recipe keys

A recipe is one YAML file with these sections. Any key can be overridden on the command line:
`pera train RECIPE training.learning_rate=1e-3`.

## method

`name` is a method, such as `pera`, `lora` or `dora` ([all of them](study.md#methods)). The other keys are its options;
[PeraConfig](api.md#pera.PeraConfig) lists the options of `pera`. `alpha` and `dropout` have these names for every
method that has them.
"""


def _recipe_keys() -> str:
    from pera_lab.recipe.recipe import ModelSection
    from pera_lab.recipe.training import TrainingSection
    from pera_lab.tasks import EvaluationSection
    from pera_lab.tasks.registry import families

    parts = [RECIPE, _section("model", ModelSection), _section("training", TrainingSection)]
    parts.append(_section("evaluation", EvaluationSection))
    parts += [_section(f"task: {name}", family) for name, family in families().items()]
    return "\n".join(parts)


@cache
def _docstrings(section: type[Section]) -> dict[str, str]:
    """The docstrings below the fields of a class, by field."""
    fields = griffe.load(section.__module__).classes[section.__name__].attributes
    return {name: field.docstring.value for name, field in fields.items() if field.docstring}


def _section(title: str, section: Any) -> str:
    """A table of the keys of a section, with the docstrings below its fields."""
    lines = [
        f"## {title}",
        "",
        inspect.getdoc(section) or "",
        "",
        "| key | type | default | |",
        "| --- | --- | --- | --- |",
    ]
    texts: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if issubclass(base, Section):
            texts |= _docstrings(base)
    for name, field in section.model_fields.items():
        default = "required" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"
        text = " ".join(texts.get(name, "").split()).replace("|", "\\|").replace("``", "`")
        lines.append(f"| `{name}` | {_kind(field.annotation)} | {default} | {text} |")
    return "\n".join([*lines, ""])


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _kind(annotation: Any) -> str:
    """A type as a reader of YAML sees it."""
    text = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    text = re.sub(r"typing\.|pera_lab\.[\w.]*\.|collections\.abc\.", "", text)
    text = re.sub(r"Annotated\[(\w+),.*\]", r"\1", text)
    text = re.sub(r"Literal\[([^\]]*)\]", lambda match: match[1].replace(", ", " \\| "), text)
    text = re.sub(r"Optional\[(.*)\]", r"\1 | null", text)
    return text.replace(" | ", " \\| ").replace("NoneType", "null").replace("None", "null").replace("'", "")
