"""Runs and studies whose every text is markup: the page and the Markdown show it as text."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file
from test_run import Page, adapters, check, full_run, write  # noqa: F401
from test_study import made_up

import pera_lab
from pera_lab.card import write_card
from pera_lab.opening import Location
from pera_lab.report.run import render
from pera_lab.report.study import write_study_report
from pera_lab.runs import Run
from pera_lab.study import load_study
from pera_lab.study.results import Results

PLAIN = "text"
MARKUP = (
    '"><meta http-equiv="refresh" content="0;url=https://elsewhere.example/"><script>document.title=1;alert(1)'
    "</script>'><img src=https://elsewhere.example/i onerror=alert(2)></style></title></pre></svg></text>--> ]]>"
    '<svg onload=alert(3)><a href="javascript:alert(4)" xlink:href="javascript:alert(4)">a</a> url(#x) href="#y" '
    'id="z" <b> &lt;b&gt; [a](javascript:alert(5)) ![i](https://elsewhere.example/j) `` ` ``` | \\| --- # *b* $x$ '
    "www.a.example {{ 7*7 }} ${7*7} #0b62a4 #000000 \x1b[31m\x07\u202e\x9b\ud800\n---\n# a\n~~~\n| a |\n\n- b\n"
)


SMALL_STUDY = """
base: quickstart
settings: {model: tiny-llama}
grid: {method: [lora, pera-rms-0.3], task: [family_relationships], r: [3]}
choose: {learning_rate: [1e-3, 2e-3], rows: 20}
"""


def retold(value, text):
    """The content of a JSON file with each string replaced by ``text``."""
    if isinstance(value, dict):
        return {key: retold(below, text) for key, below in value.items()}
    if isinstance(value, list):
        return [retold(below, text) for below in value]
    return text if isinstance(value, str) else value


def renamed_adapter(folder, source, text):
    """A copy of an adapter whose layers of one kind are named ``text``, and whose configuration holds it too."""
    folder.mkdir()
    name = text.encode("utf-8", "replace").decode().replace(".", "")  # a dot would begin another kind
    weights = load_file(source / "adapter_model.safetensors")
    save_file({k.replace("q_proj", name): w for k, w in weights.items()}, folder / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    names = {"base_model_name_or_path": text, "revision": text, "target_modules": [text]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **names}))


def told_run(path, adapters, text):  # noqa: F811
    """A complete run in which every string that a stranger may choose is ``text``."""
    run = full_run(path, adapters, text=text, name=text)
    run.adapter.path.unlink()
    renamed_adapter(run.adapter.path, adapters / "pera", text)
    recipe = json.loads(json.dumps(run.recipe.model_dump(mode="json")))
    columns = {"prompt": text, "completion": text}
    recipe["task"] = {"name": "own", "data": text.replace("\n", " "), "columns": columns}
    recipe["model"]["name"], recipe["method"]["target_modules"] = text, [text, "q_proj"]
    run.recipe_file.write_text(json.dumps(recipe))  # JSON is YAML
    for file in (run.scores_file, run.environment_file, run.path / "merged" / "verification.json"):
        file.write_text(json.dumps(retold(json.loads(file.read_text()), text)))
    environment = json.loads(run.environment_file.read_text())
    write(run.environment_file, {**environment, text: {text: [text, {text: text}]}})
    effect = json.loads(run.effect_file.read_text())
    write(run.effect_file, {**effect, "without_high_order": {text: 0.1, f"_{text}": 0.2}})
    write(run.metrics_file, [{**line, "high_order_ratio": {text: 0.1, "b": 0.2}} for line in run.metrics()])
    write(run.path / text.replace("/", "|")[:60] / "verification.json",
          json.loads((run.path / "merged" / "verification.json").read_text()))  # fmt: skip
    return Run(run.path)


def told_study(path, adapters, text):  # noqa: F811
    """A study in which every string that a stranger may choose is ``text``."""
    path.mkdir()
    (path / "made.yaml").write_text(f"{SMALL_STUDY}name: {json.dumps(text)}\n")
    renamed_adapter(path / "pera", adapters / "pera", text)
    (path / "lora").symlink_to(adapters / "lora")
    folder = made_up(path / "study", load_study(str(path / "made.yaml")), path)
    for file in folder.runs.glob("*/scores.json"):
        file.write_text(json.dumps(retold(json.loads(file.read_text()), text)))
    for file in folder.runs.glob("*/effect.json"):
        write(file, {**json.loads(file.read_text()), "without_high_order": {text: 0.1}})
    for file in folder.runs.glob("*/metrics.jsonl"):
        write(file, [{"step": s, "loss": 1 / s, "high_order_ratio": {text: 0.1 * s}} for s in (1, 2)])
    first, *_, last = sorted(folder.runs.glob("*report*"))
    write(first / "environment.json", {"processor": text, "threads": text, "versions": {text: text}, "base_model": {}})
    write(last / "outcome.json", {"status": "failed", "error": text})
    return folder


DRAWN = {"g", "path", "defs", "use", "rect", "clippath", "text"}


def elements(html):
    """How often each element occurs with each set of attributes, or that it occurs if it belongs to a drawing.

    Line breaks follow the dots of names.
    """
    counts = Counter((tag, *sorted(attributes)) for tag, attributes in Page(html).tags if tag != "wbr")
    return {key: count if key[0] not in DRAWN else "some" for key, count in counts.items()}


@pytest.fixture(scope="module")
def markup_run(tmp_path_factory, adapters):  # noqa: F811
    return told_run(tmp_path_factory.mktemp("markup") / MARKUP.replace("/", "|")[:60], adapters, MARKUP)


def test_markup_in_a_run_adds_no_element_or_attribute(markup_run, tmp_path, adapters):  # noqa: F811
    plain = told_run(tmp_path / "plain", adapters, PLAIN)
    assert elements(render([markup_run])) == elements(render([plain]))
    assert elements(render([markup_run, markup_run])) == elements(render([plain, plain]))
    check(render([markup_run]))


def test_markup_in_a_study_adds_no_element_or_attribute(tmp_path, adapters):  # noqa: F811
    found = {}
    for name, text in {"plain": PLAIN, "markup": MARKUP}.items():
        page, markdown, _ = write_study_report(
            Results(told_study(tmp_path / name, adapters, text)), tmp_path / f"{name}.html"
        )
        found[name] = elements(page.read_text()), blocks(markdown.read_text())
        for file in (tmp_path / f"{name}-pictures").iterdir():
            assert not re.search(r"<(script|meta|img|a)\b|[\x00-\x08\x0b-\x1f\x7f-\x9f]", file.read_text())
    assert found["markup"] == found["plain"]


def blocks(text):
    """The types of the elements of a Markdown text, in their order."""
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    inner = [[x.type for x in token.children] if token.type == "inline" else token.type for token in tokens]
    return [[kind for kind in found if kind != "text_special"] if isinstance(found, list) else found for found in inner]


@pytest.mark.parametrize("form", ["adapter", "merged", "lora", "gguf"])
def test_markup_in_a_model_card_adds_no_element(form, markup_run, tmp_path, adapters):  # noqa: F811
    found = {}
    for name, run in {"markup": markup_run, "plain": told_run(tmp_path / "run", adapters, PLAIN)}.items():
        text = run.recipe.name
        score = {"n": 4, "metric": text, "value": 0.5, "low": 0.1, "high": 0.9, "scorer": text}
        write(run.scores_file, {text: score, f"{text}-{text}": score})
        (tmp_path / name).mkdir()
        write_card(tmp_path / name, form, Location(run, run.adapter, text), text)
        card = (tmp_path / name / "README.md").read_text()
        _, front, body = card.split("---\n", 2)
        found[name] = front, blocks(body)
    assert found["markup"] == found["plain"]


SINKS = (
    *(r"\|\s*safe\b", r"\bMarkup\(", "innerHTML", "insertAdjacentHTML", r"document\.write"),
    *(r"autoescape\s+(?!true)", "autoescape=(?!True)"),
    *(r"""f["'].*<[a-z/!]""", r"""["']<[a-z/!].*["']\s*[+%]""", r"""<[a-z].*["']\.format\("""),
)
"""What puts text into HTML or SVG without escaping it."""


def test_nothing_bypasses_the_escaping_of_the_templates():
    folder = Path(pera_lab.__file__).parent
    files = [folder / "card.py", *(f for f in (folder / "report").rglob("*") if f.suffix in (".py", ".html"))]
    assert len(files) > 10
    found = {f"{file.name}: {line}" for file in files for line in file.read_text().splitlines()
             for sink in SINKS if re.search(sink, line)}  # fmt: skip
    assert found == set()
