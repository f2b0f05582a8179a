"""The page about runs: every part, every missing part, hostile text; the page is valid and self-contained."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from peft import DeloraConfig, LoraConfig, get_peft_model

import tiny
from pera.errors import UserError
from pera_lab.recipe import parse_recipe
from pera_lab.report.contents import Contents
from pera_lab.report.formatting import number
from pera_lab.report.run import render, write_report
from pera_lab.runs import Run

KINDS = ["q_proj", "v_proj", "down_proj"]
FIGURES = ["accuracy", "training", "map", "spectra", "ratio", "effect", "rank"]
HOSTILE = (
    '<script>alert("x")</script> <img src=http://evil.test/x onerror=alert(1)> **b** $\\frac$ '
    "{{ 7*7 }} \x1b[31mred\x07 \u202eback\x9b"
)
VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A saved PERA adapter, a LoRA, a PERA adapter without high-order terms, and one with anchors alone."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny.adapt(tiny.llama(), target_modules=KINDS).save_pretrained(folder / "pera")
    tiny.adapt(tiny.llama(), target_modules=KINDS, terms="none").save_pretrained(folder / "linear")
    tiny.adapt(tiny.llama(), target_modules=KINDS, terms="none", anchors=2).save_pretrained(folder / "anchors")
    get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=KINDS)).save_pretrained(str(folder / "lora"))
    return folder


def write(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = value if isinstance(value, list) else [value]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def bare_run(path, method="pera", name="demo", **training):
    """A run folder that holds only its recipe."""
    sections = {
        "name": name,
        "model": "tiny-llama",
        "method": {"name": method, "r": 3, "target_modules": KINDS},
        "task": {"name": "family_relationships", "test_size": 4},
        "training": {"learning_rate": 1e-3, "max_steps": 40, **training},
    }
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(parse_recipe(sections).to_yaml(), encoding="utf-8")
    return Run(path)


def full_run(path, adapters, adapter="pera", text="How is Ann related to Bob?", **options):
    """A finished run with made-up figures."""
    run = bare_run(path, **options)
    (path / "adapter").symlink_to(adapters / adapter)
    losses = [4.0, 1.5, 0.8, 0.25]
    line = {"epoch": 0.1, "learning_rate": 1e-3, "grad_norm": None, "tokens_per_second": 99.5}
    ratios = [{kind: 0.01 * (i + 1) * (k + 1) for k, kind in enumerate(KINDS)} for i in range(4)]
    logged = zip(losses, ratios, strict=True)
    write(
        run.metrics_file,
        [{**line, "step": 10 * i, "loss": x, "high_order_ratio": r} for i, (x, r) in enumerate(logged, 1)],
    )
    score = {"n": 4, "seconds": 3.25, "scorer": "exact_match"}
    base = {**score, "metric": "accuracy", "correct": 1, "value": 0.25, "low": 0.0456, "high": 0.6994}
    tuned = {**score, "metric": "accuracy", "correct": 2, "value": 0.5, "low": 0.1500, "high": 0.8500}
    run.scores_file.write_text(json.dumps({"base": base, "adapter": tuned}))
    for which, right in {"base": [0, 1, 0, 0], "adapter": [1, 0, 0, 1]}.items():
        rows = [{"prompt": f"{i}: {text}", "expected": "aunt", "output": f"{which} {text}", "correct": bool(x)}
                for i, x in enumerate(right)]  # fmt: skip
        write(run.predictions / f"{which}.jsonl", rows)
    parts = {"square": 0.1, "cross": -0.02, "high_order": 0.09}
    groups = {"q_proj": 0.05, "v_proj": -0.003}
    bits = {"labels": 64, "bits": 900.0, "parameters": 600}
    rank = {"r": 3, "rank": 9, "effective_rank": 1.2, "loss": 0.3, "loss_at_rank": {0: 2.0, 1: 0.31}}
    rank |= {"frequency_loss": 2.5, "learned": bits}
    effect = {"tokens": 512, "loss": 0.3, "without": parts, "without_high_order": groups, "at_rank_r": 0.07}
    effect["fullness"] = rank
    write(path / "effect.json", effect)
    cost = {"seconds": 125.0, "tokens": 5000, "peak_memory": 3 * 2**29, "final_loss": 0.9, "left_out": 2}
    write(path / "cost.json", cost)
    check = {"agree": True, "prompts": 4, "tokens": 80, "max_difference": 2e-5, "tolerance": 1e-3, "dtype": "float32"}
    for folder in ("merged", "lora"):
        of = {"of": folder, "against": "the adapter", "near_ties": 0, "same_top1": 1.0, "kl_divergence": 0.0}
        write(path / folder / "verification.json", {**check, **of})
    environment = {"command": ["pera", "train", "a b.yaml"], "versions": {"torch": "2.0"}, "seed": 42}
    write(run.environment_file, environment)
    return run


class Page(HTMLParser):
    """The parts of a page that the tests check. Fails on tags that are not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.headings = [], [], [], [], []
        self.figures = []
        self._texts = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join("".join(self._texts).split())

    def handle_starttag(self, tag, pairs):
        attributes = dict(pairs)
        assert len(attributes) == len(pairs), f"an attribute of <{tag}> is given twice"
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.links += [attributes[key] for key in ("href", "src", "xlink:href", "data", "action") if key in attributes]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "figure":
            self.figures.append({"id": attributes["id"], "tags": []})
        if "figure" in self.open:
            self.figures[-1]["tags"].append((tag, attributes))

    def handle_startendtag(self, tag, pairs):
        self.handle_starttag(tag, pairs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"
        self._texts.append(" " if tag in ("td", "th") else "")

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self._texts.append(data)


def page(*runs):
    return check(render(list(runs)))


def check(html):
    """Check what holds for every page and return its parts."""
    found = Page(html)
    assert html.startswith("<!DOCTYPE html>\n<html lang=")
    assert found.headings.count(1) == 1
    assert all(below - above <= 1 for above, below in zip(found.headings, found.headings[1:], strict=False))
    assert len(found.ids) == len(set(found.ids))
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "img", "iframe", "object", "embed", "image", "form", "video"}
    outside = [link for link in found.links if not link.startswith("#")]
    assert set(outside) <= {"data:,", "https://arxiv.org/abs/2604.11841"}
    assert all(link[1:] in found.ids for link in found.links if link.startswith("#"))
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", html)
    assert "@import" not in html
    assert not [a for _, attributes in found.tags for a in attributes if a.startswith("on")]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", html)
    for figure in found.figures:
        tags = [tag for tag, _ in figure["tags"]]
        svg = next(attributes for tag, attributes in figure["tags"] if tag == "svg")
        assert svg["role"] == "img"
        assert svg["aria-label"]
        assert svg["aria-describedby"] in found.ids
        assert {"figcaption", "details", "summary", "table", "td"} <= set(tags)
    for reference in re.findall(r'aria-(?:describedby|labelledby)="([^"]*)"', html):
        assert reference in found.ids
    return found


def figures(found):
    return [figure["id"].removesuffix("-figure").rpartition("-")[2] for figure in found.figures]


def test_page_of_a_complete_run(tmp_path, adapters):
    run = full_run(tmp_path / "demo-1", adapters)
    found = page(run)
    assert figures(found) == FIGURES
    assert 'class="missing"' not in render([run])
    for sentence in (
        "25.0 % base model → 50.0 % with adapter",
        "loss per label",
        "Accuracy with 95 % interval: base model 25.0 % (4.6 % to 69.9 %), with adapter 50.0 % (15.0 % to 85.0 %). "
        "The intervals overlap.",
        "Loss 4 at step 10, 0.25 at step 40; lowest 0.25 at step 40.",
        "4 problems were answered by the base model and by the tuned model. 2 newly right, 1 newly wrong, "
        "0 still right, 1 still wrong.",
        "q_proj 0.01 → 0.04",
        "Over 512 labels the loss is 0.3. Without the high-order terms it changes by +0.09 (30.0 % of it).",
        "both in v_proj",
        "ranks beyond r",
        "−0.003",
        "The effect shows whether the terms are used; a high ratio alone does not.",
        "training time 2 min 5 s training tokens 5,000 tokens per second 40 peak memory 1.5 GB",
        "merged: same outputs as the adapter; largest logit difference 2.0e-05 (tolerance 0.001, float32)",
        "training.learning_rate 0.001",
        "command pera train 'a b.yaml'",
        "versions.torch 2.0",
    ):
        assert sentence in found.text, sentence


def test_layer_table_shows_the_norms_of_the_factors(tmp_path, adapters):
    run = full_run(tmp_path / "demo", adapters)
    found = page(run)
    for layer in Contents(run).layers:
        d = layer.diagnosis
        row = f"{layer.name} 3 9 {number(d.norm, 3)} {number(d.linear, 3)} {number(d.square, 3)} {number(d.cross, 3)}"
        assert row in found.text


def test_missing_parts_name_the_command_that_makes_them(tmp_path):
    found = page(bare_run(tmp_path / "a b"))
    assert figures(found) == []
    folder = f"'{tmp_path}/a b'"
    command = f"Make it with: pera train {folder} --resume"
    for sentence in (
        f"Training has not finished. The last logged step is 0 of 40. {command}",
        f"The base model has not been scored. {command}",
        f"The adapter has not been scored. {command}",
        f"metrics.jsonl has no logged steps. {command}",
        f"There are no answers of the base model. {command}",
        f"Training has not finished, so there is no adapter yet. {command}",
        "There is no environment.json",
        f"The adapter has not been merged into its base model. {command}",
    ):
        assert sentence in found.text, sentence


def test_unfinished_run_shows_its_last_step(tmp_path, adapters):
    run = full_run(tmp_path / "demo", adapters)
    run.adapter.path.unlink()
    run.metrics_file.write_text(run.metrics_file.read_text() + '{"step": 50, "lo')
    found = page(run)
    assert "The last logged step is 40 of 40." in found.text
    assert figures(found) == ["accuracy", "training", "ratio"]


def test_run_without_scores(tmp_path, adapters):
    run = full_run(tmp_path / "demo", adapters)
    run.scores_file.unlink()
    (run.predictions / "base.jsonl").unlink()
    found = page(run)
    assert figures(found) == FIGURES[1:]
    assert "The base model has not been scored." in found.text
    assert "There are no answers of the base model." in found.text


def test_trained_run_names_the_remaining_commands(tmp_path, adapters):
    run = bare_run(tmp_path / "demo")
    (run.path / "adapter").symlink_to(adapters / "pera")
    found = page(run)
    assert figures(found) == ["map", "spectra"]
    for command in (
        f"evaluate {run.path} --base",
        f"evaluate {run.path}",
        f"inspect {run.path} --effect",
        f"merge {run.path} --output {run.path}/merged",
        f"export {run.path} --to lora --output {run.path}/lora",
    ):
        assert f"Make it with: pera {command} " in f"{found.text} "
    assert "so the cost of this training is unknown" in found.text


def test_score_of_the_adapter_without_the_base(tmp_path, adapters):
    run = full_run(tmp_path / "demo", adapters)
    write(run.scores_file, {"adapter": json.loads(run.scores_file.read_text())["adapter"]})
    found = page(run)
    assert "50.0 % with adapter" in found.text
    assert "→ 50.0 %" not in found.text
    assert "The base model has not been scored." in found.text


def test_lora_has_no_high_order_parts(tmp_path, adapters):
    run = full_run(tmp_path / "demo", adapters, adapter="lora", method="lora")
    (run.path / "lora" / "verification.json").unlink()
    found = page(run)
    assert figures(found) == ["accuracy", "training", "rank"]
    assert "A LoRA of rank 1 would do" in found.text
    assert "crosses" not in found.text
    assert "The adapter is not a PERA adapter, so it has no high-order terms." in found.text
    assert "pera export" not in found.text
    assert "trained parameters" in found.text


def test_parameters_exclude_untrained_values(tmp_path):
    """DeLoRA also saves column norms of the base model, which are not trained."""
    model = get_peft_model(tiny.llama(), DeloraConfig(r=2, target_modules=KINDS))
    run = bare_run(tmp_path / "demo", method="delora")
    model.save_pretrained(str(run.adapter.path))
    assert Contents(run).parameters == model.num_parameters(only_trainable=True)


def test_adapter_without_high_order_terms(tmp_path, adapters):
    found = page(full_run(tmp_path / "demo", adapters, adapter="linear"))
    assert "map" not in figures(found)
    assert "The high-order terms of every layer are zero." in found.text


def test_anchors_are_shown(tmp_path, adapters):
    run = full_run(tmp_path / "demo", adapters, adapter="anchors")
    effect = json.loads(run.effect_file.read_text())
    write(run.effect_file, {**effect, "without": {"anchors": 0.04}})
    write(run.metrics_file, [{**line, "anchor_ratio": {"q_proj": 0.2}} for line in run.metrics()])
    found = page(run)
    shown = {figure["id"] for figure in found.figures}
    assert {"run1-anchor-map-figure", "run1-anchor-ratio-figure"} <= shown
    assert "Without the anchors it changes by +0.04 (" in found.text
    assert "Without the high-order terms" not in found.text
    assert "The high-order terms of every layer are zero." in found.text
    assert "The adapter acts as a LoRA." not in found.text


def test_hostile_text_is_escaped(tmp_path, adapters):
    """``check`` fails on any tag, handler or address that the text injects."""
    name = "<b>&'\" $x$ {{7}} \u202e"
    run = full_run(tmp_path / "<i>$\\frac$&\"'", adapters, text=HOSTILE, name=name)
    environment = {"command": [HOSTILE], "versions": {HOSTILE: HOSTILE}}
    write(run.environment_file, environment)
    effect = json.loads((run.path / "effect.json").read_text())
    write(run.path / "effect.json", {**effect, "without_high_order": {HOSTILE: 0.1}})
    lines = [{**line, "high_order_ratio": {HOSTILE: 0.1, "__x__": 0.2}} for line in run.metrics()]
    write(run.metrics_file, lines)
    other = full_run(tmp_path / "b" / "<i>", adapters, text=HOSTILE, name=name)
    for found in (page(run), page(run, other)):
        assert '<script>alert("x")</script> <img src=http://evil.test/x onerror=alert(1)> **b** $\\frac$' in found.text
        assert "{{ 7*7 }} \\x1b[31mred\\x07 \\u202eback\\x9b" in found.text
        assert "<i>$\\frac$&\"'" in found.text


def test_non_finite_losses_are_counted(tmp_path, adapters):
    run = full_run(tmp_path / "demo", adapters)
    lines = run.metrics()
    lines[1]["loss"], lines[2]["loss"] = math.nan, math.inf
    lines[3] |= {"learning_rate": None, "high_order_ratio": {"q_proj": math.nan}}
    write(run.metrics_file, lines)
    found = page(run)
    assert (
        "Loss 4 at step 10, 0.25 at step 40; lowest 0.25 at step 40. 2 of 4 logged losses are not finite." in found.text
    )
    assert "20 0.1 not a number 0.001" in found.text
    write(run.metrics_file, [{"step": 10, "loss": math.nan}])
    assert "No loss was finite. 1 of 1 logged losses are not finite." in page(run).text


@pytest.mark.parametrize("content", ["", "[1, 2", "[]", '{"base": 3, "adapter": {"n": "x"}}', "null"])
def test_broken_files_become_sentences(tmp_path, adapters, content):
    run = full_run(tmp_path / "demo", adapters)
    for file in ("scores.json", "effect.json", "cost.json", "environment.json", "lora/verification.json"):
        (run.path / file).write_text(content)
    found = page(run)
    assert "→ 50.0 %" not in found.text
    assert figures(found) == ["training", "map", "spectra", "ratio"]
    assert len(re.findall(r"is not valid JSON|is not a valid record", found.text)) >= 5


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]\n", b'{"prompt": 1}\n', b"{"])
def test_broken_lines_become_sentences(tmp_path, adapters, content):
    run = full_run(tmp_path / "demo", adapters)
    run.metrics_file.write_bytes(content)
    (run.predictions / "base.jsonl").write_bytes(content)
    found = page(run)
    assert re.search(r"metrics.jsonl", found.text)
    assert re.search(r"base.jsonl' (cannot be read|is not a valid record)", found.text)


def test_answers_to_different_problems_are_not_compared(tmp_path, adapters):
    run = full_run(tmp_path / "demo", adapters)
    write(run.predictions / "base.jsonl", [{"prompt": "?", "expected": "!", "output": "", "correct": False}])
    assert "The two models answered different problems." in page(run).text


def test_unicode_line_separators_do_not_split_answers(tmp_path, adapters):
    run = full_run(tmp_path / "demo", adapters)
    rows = [{"prompt": "a\u2028b\x85c", "expected": "x", "output": "y", "correct": False}]
    for which in ("base", "adapter"):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (run.predictions / f"{which}.jsonl").write_text(text, encoding="utf-8")
    assert "a\\u2028b\\x85c" in page(run).text


def test_two_runs_side_by_side(tmp_path, adapters):
    first = full_run(tmp_path / "first", adapters)
    second = full_run(tmp_path / "second", adapters, learning_rate=2e-3)
    scores = second.scores()
    write(second.scores_file, {**scores, "adapter": {**scores["adapter"], "metric": "matthews"}})
    found = page(first, second)
    assert figures(found) == ["losses", *FIGURES, *FIGURES]
    assert "2 runs side by side" in found.text
    assert "Run 2: second" in found.text
    for row in (
        "folder first second",
        "metric accuracy matthews score 50.0 % 50.0 %",
        "95 % interval 15.0 % to 85.0 % 15.0 % to 85.0 %",
        "last loss 0.25 0.25",
        "training time 2 min 5 s 2 min 5 s",
        "peak memory 1.5 GB 1.5 GB",
        "effect +0.09 +0.09",
    ):
        assert row in found.text
    assert "key run 1 run 2 training.learning_rate 0.001 0.002" in found.text
    assert "These runs differ" not in found.text


def test_runs_with_other_test_rows_are_marked(tmp_path, adapters):
    first, second = full_run(tmp_path / "a", adapters), bare_run(tmp_path / "b", method="lora")
    recipe = second.recipe_file.read_text().replace("test_size: 4", "test_size: 5")
    second.recipe_file.write_text(recipe)
    found = page(first, second)
    assert "These runs differ in task.test_size, so their scores cannot be compared." in found.text
    assert "base model 25.0 % – last loss 0.25 – training time 2 min 5 s – peak memory 1.5 GB –" in found.text


def test_runs_with_other_held_out_rows_are_marked(tmp_path):
    found = page(bare_run(tmp_path / "a"), bare_run(tmp_path / "b", held_out=16))
    assert "These runs differ in training.held_out, so their scores cannot be compared." in found.text


@pytest.mark.parametrize(
    ("was", "becomes", "unlike"),
    [
        ("max_new_tokens: 16", "max_new_tokens: 4", "evaluation.max_new_tokens"),
        ("num_beams: 1", "num_beams: 4", "evaluation.num_beams"),
        ("train_size: 2000", "train_size: 9", None),
    ],
)
def test_only_settings_that_change_the_scores_are_marked(was, becomes, unlike, tmp_path):
    first, second = bare_run(tmp_path / "a"), bare_run(tmp_path / "b")
    recipe = second.recipe_file.read_text()
    assert was in recipe, recipe
    second.recipe_file.write_text(recipe.replace(was, becomes))
    sentence = f"These runs differ in {unlike}, so their scores cannot be compared."
    assert (sentence in page(first, second).text) == (unlike is not None)
    assert ("These runs differ" in page(first, second).text) == (unlike is not None)


def test_cost_of_a_resumed_training_says_so(tmp_path, adapters):
    run = full_run(tmp_path / "a", adapters)
    assert "training time 2 min 5 s" in page(run).text
    cost = json.loads((run.path / "cost.json").read_text())
    write(run.cost_file, {**cost, "steps": 10})
    assert "training time since it was resumed 2 min 5 s training tokens since it was resumed" in page(run).text


def test_runs_with_equal_settings(tmp_path):
    found = page(bare_run(tmp_path / "a"), bare_run(tmp_path / "b"))
    assert figures(found) == []
    assert "All settings are the same." in found.text


def test_pages_are_reproducible(tmp_path, adapters):
    run = full_run(tmp_path / "demo", adapters)
    write_report([run, run], tmp_path / "a.html")
    write_report([run, run], tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_matplotlib_settings_of_the_user_are_ignored(tmp_path, adapters):
    import matplotlib

    run = full_run(tmp_path / "demo", adapters)
    usual = render([run])
    with matplotlib.rc_context({"axes.facecolor": "red", "svg.fonttype": "path", "font.size": 30, "text.usetex": True}):
        assert render([run]) == usual


def test_figures_use_the_colours_of_the_page(tmp_path, adapters):
    html = render([full_run(tmp_path / "demo", adapters)])
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) == len(FIGURES)
    for drawing in drawings:
        assert not re.search(r"#[0-9a-f]{6}\b|rgb\(|base64|metadata", drawing)
        assert "var(--c" in drawing
        assert "currentColor" in drawing


def test_invalid_input_is_rejected(tmp_path):
    with pytest.raises(UserError, match="at least one run"):
        write_report([], tmp_path / "x.html")
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        write_report([Run(tmp_path / "nothing")], tmp_path / "x.html")
    run = bare_run(tmp_path / "run")
    with pytest.raises(UserError, match="cannot be written"):
        write_report([run], tmp_path / "no" / "folder.html")
