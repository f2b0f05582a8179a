"""A recipe is one YAML file, and nothing in it is ignored."""

import json
import re

import pytest
import yaml

from pera import PeraConfig
from pera.errors import UserError
from pera_lab.methods import known_methods
from pera_lab.recipe import difference, load_recipe, parse_recipe
from pera_lab.shipped import shipped_files
from shared import DATA

SMALL = {
    "name": "small",
    "model": "smollm2-135m",
    "method": {"name": "pera", "r": 4},
    "task": {"name": "leg_counting"},
    "training": {"max_steps": 5},
}


@pytest.fixture
def file(tmp_path):
    """Path of a recipe file with some content."""

    def write(content, name="mine.yaml"):
        path = tmp_path / name
        text = content if isinstance(content, str | bytes) else yaml.safe_dump(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_a_recipe_is_read_and_defaults_are_filled_in(file):
    recipe = load_recipe(file({key: value for key, value in SMALL.items() if key != "name"}))
    assert recipe.name == "mine"
    assert recipe.model.name == "smollm2-135m"
    assert (recipe.model.dtype, recipe.model.trust_remote_code) == ("auto", False)
    assert (recipe.training.max_steps, recipe.training.epochs, recipe.training.seed) == (5, None, 42)
    assert recipe.evaluation.scorer == "exact_match"


@pytest.mark.parametrize("model", ["a/b", {"name": "a/b"}])
def test_a_model_is_a_name_or_a_section(model):
    recipe = parse_recipe({**SMALL, "model": model})
    assert recipe.model.name == "a/b"


@pytest.mark.parametrize("name", shipped_files("recipes"))
def test_shipped_recipes_are_valid(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.peft_config()


@pytest.mark.parametrize(("name", "problems"), [("quickstart", 100), ("relationships-smollm2", 200)])
def test_quickstart_trains_pera_with_rms_on_the_embedded_model(name, problems):
    recipe = load_recipe(name)
    assert recipe.model.name == "smollm2-135m"
    assert recipe.task.test_size >= problems
    config = recipe.peft_config()
    assert isinstance(config, PeraConfig)
    assert config.normalization == "rms"


def test_a_recipe_can_be_written_and_read_again(file):
    recipe = parse_recipe({**SMALL, "method": {"name": "pera", "target_modules": ["q_proj"], "alpha": 2.5}})
    again = load_recipe(file(recipe.to_yaml()))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


def test_the_method_is_built_from_its_section():
    config = parse_recipe({**SMALL, "method": {"name": "pera", "r": 3, "terms": "square", "alpha": 6}}).peft_config()
    assert (config.r, config.terms, config.pera_alpha) == (3, "square", 6)


def test_the_task_is_built_from_its_section():
    recipe = parse_recipe({**SMALL, "task": {"name": "leg_counting", "train_size": 5, "test_size": 3}})
    splits = recipe.build_splits()
    assert (recipe.task.name, len(splits.train), len(splits.test)) == ("leg_counting", 5, 3)


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("training.max_steps=7", {"training": {"max_steps": 7}}),
        ("training.learning_rate=1e-3", {"training": {"max_steps": 5, "learning_rate": 0.001}}),
        (
            "training.report_to=[tensorboard, wandb]",
            {"training": {"max_steps": 5, "report_to": ["tensorboard", "wandb"]}},
        ),
        ("training.lr_ratio.B=16", {"training": {"max_steps": 5, "lr_ratio": {"B": 16.0}}}),
        ("training.weight_decay=0.1", {"training": {"max_steps": 5, "weight_decay": 0.1}}),
        ("training.seed=4294967295", {"training": {"max_steps": 5, "seed": 2**32 - 1}}),
        (
            "method.target_modules=[q_proj, v_proj]",
            {"method": {**SMALL["method"], "target_modules": ["q_proj", "v_proj"]}},
        ),
        ("method={name: lora, r: 2}", {"method": {"name": "lora", "r": 2}}),
        ("model=a/b", {"model": {"name": "a/b"}}),
        ("evaluation.batch_size=3", {"evaluation": {"batch_size": 3}}),
        ("task.options.min_animals=2", {"task": {"name": "leg_counting", "options": {"min_animals": 2}}}),
        ("name=other=name", {"name": "other=name"}),
    ],
)
def test_an_override_sets_one_key_and_leaves_the_rest(override, change, file):
    assert load_recipe(file(SMALL), [override]) == parse_recipe({**SMALL, **change})


def test_later_overrides_win(file):
    assert load_recipe(file(SMALL), ["method.r=2", "method.r=3"]).method["r"] == 3


def test_either_length_can_replace_the_other(file):
    recipe = load_recipe(file(SMALL), ["training.max_steps=null", "training.epochs=2"])
    assert (recipe.training.max_steps, recipe.training.epochs) == (None, 2)


def test_an_override_of_one_length_replaces_the_other_of_the_file(file):
    steps, epochs = file(SMALL), file({**SMALL, "training": {"epochs": 3, "warmup_ratio": 0.1}}, "epochs.yaml")
    recipe = load_recipe(steps, ["training.epochs=2"])
    assert (recipe.training.max_steps, recipe.training.epochs) == (None, 2)
    recipe = load_recipe(epochs, ["training.max_steps=4", "training.warmup_steps=2"])
    assert (recipe.training.max_steps, recipe.training.epochs) == (4, None)
    assert (recipe.training.warmup_steps, recipe.training.warmup_ratio) == (2, 0)
    for path in (steps, epochs):
        with pytest.raises(UserError, match="give exactly one of max_steps and epochs"):
            load_recipe(path, ["training.max_steps=4", "training.epochs=2"])


@pytest.mark.parametrize("method", [{"name": "pera", "alpha": 2.5}, {"name": "lora", "target_modules": ["q_proj"]}])
def test_the_recipe_of_a_run_shows_every_option_of_the_method(method, file):
    recipe = parse_recipe({**SMALL, "method": method})
    text = recipe.record()
    assert load_recipe(file(text)) == recipe
    shown = yaml.safe_load("\n".join(line[2:] for line in text.splitlines() if re.match("# [a-z_]+:", line)))
    found = known_methods()[method["name"]]
    assert {*shown, *method} >= found.options - set(found.aliases.values())
    assert not shown.keys() & method.keys()
    assert shown["dropout"] == 0


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.lr=1e-4", "training.lr is not a key of a recipe; did you mean 'training.learning_rate'?"),
        ("lr=1e-4", "lr is not a key of a recipe; did you mean 'training.learning_rate'?"),
        ("learning_rate=1", "learning_rate is not a key of a recipe; did you mean 'training.learning_rate'?"),
        ("epochs=1", "epochs is not a key of a recipe; did you mean 'training.epochs'?"),
        ("num_beams=2", "num_beams is not a key of a recipe; did you mean 'evaluation.num_beams'?"),
        ("batch=1", "batch is not a key of a recipe; did you mean 'training.batch_size'?"),
        ("bf16=true", "bf16 is not a key of a recipe; did you mean 'model.dtype=bfloat16'?"),
        ("training.fp16=true", "training.fp16 is not a key of a recipe; did you mean 'model.dtype=float16'?"),
        ("lora_alpha=16", "lora_alpha is not a key of a recipe; did you mean 'method.alpha'?"),
        (
            "model.load_in_4bit=true",
            "model.load_in_4bit is not a key of a recipe; did you mean 'model.quantization=nf4'?",
        ),
        ("method.rank=4", "method.rank is not an option of pera; did you mean 'method.r'?"),
        ("method.lora_alpha=4", "method.lora_alpha is not an option of pera; did you mean 'method.alpha'?"),
        ("method.lr=1", "method.lr is not an option of pera; did you mean 'training.learning_rate'?"),
        ("modle.name=x", "modle is not a key of a recipe; did you mean 'model'?"),
        ("model.nme=x", "model.nme is not a key of a recipe; did you mean 'name'?"),
        ("training.learning_rte=1", "training.learning_rte is not a key of a recipe; did you mean 'learning_rate'?"),
        ("task.trainsize=1", "task.trainsize is not a key of a recipe; did you mean 'train_size'?"),
        (
            "evaluation.x=1",
            "evaluation.x is not a key of a recipe; known: batch_size, max_new_tokens, num_beams, scorer.",
        ),
        ("method.rnk=1", "method.rnk is not an option of pera; "),
        ("method.task_type=SEQ_CLS", "method.task_type is not an option of pera; "),
        ("method.name=loar", "method.name='loar' is not known; did you mean 'lora'?"),
        ("method={r: 4}", "method.name is missing; known: "),
        ("method=pera", "method='pera': input should be a valid dictionary"),
        ("method={name: pera, alpha: 0}", "method: pera_alpha=0 should be a finite number other than 0"),
        ("method.r=0", "method: r=0 should be a whole number of at least 1."),
        ("method.r=two", "method: r='two' should be a whole number of at least 1."),
        ("method.terms=cubes", "method: terms='cubes' is not known; "),
        ("method={name: pera, r: 1, terms: cross}", "method: r=1 with terms='cross' leaves no products"),
        ("training.max_steps=null", "training: give exactly one of max_steps and epochs"),
        ("training.max_steps=true", "training.max_steps=True: input should be a number"),
        ("training.eval_steps=true", "training.eval_steps=True: input should be a number"),
        ("training.seed=4294967296", "training.seed=4294967296: input should be less than 4294967296"),
        ("model.revision=main", "model: revision='main' needs a Hub id, and 'smollm2-135m' is not one; leave it out"),
        ("training.max_steps=0", "training.max_steps=0: input should be greater than or equal to 1"),
        ("training.learning_rate=fast", "training.learning_rate='fast': input should be a valid number"),
        ("training.learning_rate=.nan", "training.learning_rate=nan: "),
        ("training.lr_scheduler=cosin", "training.lr_scheduler='cosin': input should be 'linear', 'cosine'"),
        (
            "training={max_steps: 5, lr_scheduler: constant, warmup_ratio: 0.1}",
            "training: lr_scheduler='constant' has no warm-up; give 'constant_with_warmup', or no warm-up",
        ),
        ("training.lr_ratio=16", "training: lr_ratio=16 should map groups to ratios, such as {'B': 16}."),
        ("training.lr_ratio.B=-1", "training: lr_ratio['B']=-1 should be a finite number of at least 0."),
        ("training.lr_ratio.b=16", "training: lr_ratio['b'] cannot be set; known: B, h, other."),
        ("training.weight_decay=-1", "training: weight_decay=-1 should be a finite number of at least 0."),
        ("training.weight_decay.B=much", "training: weight_decay['B']='much' should be a finite number of at least 0."),
        ("model.dtype=int8", "model.dtype='int8': input should be 'auto', 'float32'"),
        ("model=null", "model=None: input should be a valid dictionary"),
        ("task.train_size=1.5", "task.train_size=1.5: input should be a valid integer"),
        ("max_steps", "override 'max_steps' should have the form key.subkey=value."),
        ("=5", "override '=5' should have the form key.subkey=value."),
        ("task.name.x=1", "override 'task.name.x=1': name is a value, not a section."),
        ("task.name=[", "override 'task.name=[': the value is not valid YAML: expected the node content, but found "),
        (
            "training.lr_ratio={B:16,h:2}",
            "override 'training.lr_ratio={B:16,h:2}': the value is not valid YAML: 'B:16' has no value; "
            "put a space after its colon.",
        ),
    ],
)
def test_an_error_in_an_override_names_key_value_and_remedy(override, sentence, file):
    with pytest.raises(UserError) as caught:
        load_recipe(file(SMALL), [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["lr_ratio", "weight_decay"])
@pytest.mark.parametrize("method", [{"name": "lora"}, {"terms": "none"}])
def test_an_option_for_h_needs_a_method_that_learns_it(key, method):
    training = {"max_steps": 5, key: {"B": 0.5, "h": 2.0}}
    assert parse_recipe({**SMALL, "training": training}).training.model_dump()[key] == {"B": 0.5, "h": 2.0}
    with pytest.raises(UserError, match=rf"^training\.{key}\.h=2\.0 has no effect, because only pera trains h"):
        parse_recipe({**SMALL, "method": {"name": "pera", **method}, "training": training})


@pytest.mark.parametrize("value", ["foo", 0])
def test_a_wrong_eval_steps_is_named_in_one_sentence(value):
    sentence = f"training.eval_steps={value!r}: input should be a whole number of at least 1, or 'epoch'"
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        parse_recipe({**SMALL, "training": {"max_steps": 5, "eval_steps": value}})
    for right in (3, "epoch", None):
        assert parse_recipe({**SMALL, "training": {"max_steps": 5, "eval_steps": right}}).training.eval_steps == right


def test_a_misspelt_key_in_the_file_is_an_error_too(file):
    with pytest.raises(UserError, match=r"^trainin is not a key of a recipe; did you mean 'training'\?"):
        load_recipe(file({**SMALL, "trainin": {"max_steps": 5}}))


def test_several_errors_are_reported_together():
    with pytest.raises(UserError) as caught:
        parse_recipe({**SMALL, "task": {}, "training": {"max_steps": 5, "batch_size": 0}})
    assert str(caught.value).startswith("task.name is missing in the recipe; training.batch_size=0: ")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("model: [a", r"recipe: '.*mine\.yaml' is not valid YAML: "),
        ("- model", r"recipe: '.*mine\.yaml' should hold keys and values"),
        ("", r"recipe: '.*mine\.yaml' should hold keys and values"),
        ("- " * 5000, r"recipe: '.*mine\.yaml' is not valid YAML: it is more than 50 levels deep"),
        (b"a: caf\xe9", r"recipe: '.*mine\.yaml' is not a text file in UTF-8"),
        (b"#" * 5_000_000, r"recipe: '.*mine\.yaml' has 5,000,000 bytes"),
        (b"\xff\xfe\x00", r"recipe: '.*mine\.yaml' is not "),
        ("model: !!python/object/apply:os.getcwd []", r"recipe: '.*mine\.yaml' is not valid YAML: "),
    ],
)
def test_a_file_that_is_not_a_recipe_is_an_error(content, sentence, file):
    with pytest.raises(UserError, match=f"^{sentence}") as caught:
        load_recipe(file(content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["missing.yaml", "a/b"])
def test_a_missing_file_is_named(source):
    with pytest.raises(UserError, match=f"^recipe: file {source!r} does not exist"):
        load_recipe(source)


def test_an_unknown_shipped_recipe_suggests_the_nearest():
    with pytest.raises(UserError, match=r"^recipe: 'quikstart' is neither a file nor .*; did you mean 'quickstart'\?"):
        load_recipe("quikstart")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({}, None),
        ({"name": "other"}, None),
        ({"model": {"name": "smollm2-135m", "dtype": "auto"}}, None),
        ({"model": "a/b"}, "model.name"),
        ({"method": {"name": "pera", "r": 5}}, "method.r"),
        ({"method": {"name": "pera", "r": 4, "terms": "square"}}, "method.terms"),
        ({"task": {"name": "leg_counting", "options": {"min_animals": 2}}}, "task.options.min_animals"),
        ({"training": {"max_steps": 5, "seed": 1}}, "training.seed"),
    ],
)
def test_the_first_difference_of_two_recipes_is_named(change, key):
    assert difference(parse_recipe(SMALL), parse_recipe({**SMALL, **change})) == key
    assert difference(parse_recipe({**SMALL, **change}), parse_recipe(SMALL)) == key


@pytest.mark.parametrize(
    "name", ["1e-4", "0x1F", "1_000", "no", "null", "12:30:45", "2024-01-01", "=", "a #b", "\u2028"]
)
def test_a_recipe_may_have_any_name(name, file):
    recipe = load_recipe(file({key: value for key, value in SMALL.items() if key != "name"}, f"{name}.yaml"))
    assert recipe.name == name
    assert load_recipe(file(recipe.to_yaml(), "written.yaml")) == recipe


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_recipe_may_have_a_byte_order_mark(encoding, file):
    text = yaml.safe_dump({**SMALL, "name": "caf\xe9"}, allow_unicode=True)
    assert load_recipe(file(text.encode(encoding))).name == "caf\xe9"


SPECIAL = "my #1 @set: 'a' \"b\" {c} [d] *e &f !g %h `i` = ~ \N{GRINNING FACE}"


def test_a_path_in_an_override_is_taken_as_it_is(file, tmp_path, monkeypatch):
    (tmp_path / SPECIAL).mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("glue-minilm", [f"data={SPECIAL}", f"model=./{SPECIAL}", "task=mrpc"])
    assert recipe.task.data == recipe.model.name == str(tmp_path / SPECIAL)
    assert load_recipe(file(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    "override", ["data=[v1]/rows.jsonl", "data={a}b", "data='a'b", "data=2024", "data=yes", "model=1e-4", "task=1"]
)
def test_an_override_that_looks_like_another_value_says_how_to_quote(override):
    with pytest.raises(UserError, match=r"""[Pp]ut quotes around .*'"…"'"""):
        load_recipe("glue-minilm", ["task=mrpc", override])


def test_a_quoted_override_is_text():
    assert load_recipe("glue-minilm", ['data="2024"', "task=mrpc"]).task.data == "2024"


NUMBERS = [
    *(f"training.{key}" for key in ("learning_rate", "max_steps", "batch_size", "gradient_accumulation_steps")),
    *(f"training.{key}" for key in ("warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm", "train_share")),
    *(f"training.{key}" for key in ("held_out", "max_length", "seed", "logging_steps", "save_steps", "eval_steps")),
    *("training.epochs", "training.lr_ratio.B", "evaluation.batch_size", "evaluation.max_new_tokens"),
    *("evaluation.num_beams", "task.train_size", "task.test_size", "task.seed", "method.r", "method.alpha"),
    *("method.dropout", "method.init_coefficients"),
]


@pytest.mark.parametrize("value", ["1" + "0" * 400, "1e308", ".inf", "-.inf", ".nan", "-1e39", "true", "[1]", "{a: 1}"])
@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_out_of_range_are_named(key, value, file):
    with pytest.raises(UserError) as caught:
        load_recipe(file(SMALL), [f"{key}={value}"])
    assert key.rpartition(".")[2] in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_key_without_effect_is_refused_for_a_new_run_only(file):
    changes = ["task={name: own, data: a/b, validation_size: 5}"]
    with pytest.raises(UserError, match=r"^task\.validation_size=5 takes rows out of the training"):
        load_recipe(file(SMALL), changes)
    assert load_recipe(file(SMALL), changes, recorded=True)


def test_1e_3_is_a_number(recipe_file):
    assert load_recipe(str(recipe_file), ["method.init_coefficients=1e-3"]).method["init_coefficients"] == 1e-3


def test_a_repeated_key_is_an_error(recipe_file, tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text(recipe_file.read_text() + "\nmodel: other\n")
    with pytest.raises(UserError, match="'model' is given twice"):
        load_recipe(str(file))


# Tasks with data

TABLE = DATA.parent / "paper_tables.json"
GLUE_NAMES = {"SST-2": "sst2", "MRPC": "mrpc", "CoLA": "cola", "QNLI": "qnli", "RTE": "rte", "STS-B": "stsb"}


@pytest.mark.skipif(not TABLE.is_file(), reason="needs ../shared/paper_tables.json")
@pytest.mark.parametrize("task", GLUE_NAMES)
@pytest.mark.parametrize("size", ["base", "large"])
def test_the_recipes_for_roberta_have_the_settings_of_the_paper(size, task):
    table = json.loads(TABLE.read_text())["table8_glue_hyperparameters"]
    shared, own = table["shared"], table[f"RoBERTa-{size}"][task]
    recipe = load_recipe(f"glue-roberta-{size}", [f"task={GLUE_NAMES[task]}"])
    training, config = recipe.training, recipe.peft_config()
    assert recipe.task.name == GLUE_NAMES[task]
    assert (training.learning_rate, training.epochs) == (own["learning_rate"], own["epochs"])
    assert (config.pera_dropout, config.r, config.task_type) == (own["dropout"], shared["r"], "SEQ_CLS")
    assert config.target_modules == set(shared["target_modules"])
    assert (training.warmup_ratio, training.max_length, training.batch_size) == (0.06, 512, 32)
    assert training.keep == "best"
    assert_published(config)


def assert_published(config):
    published = PeraConfig.published()
    for key in ("terms", "coefficients", "init_coefficients", "normalization", "pera_alpha"):
        assert getattr(config, key) == getattr(published, key)


@pytest.mark.parametrize("model", ["llama2-7b", "llama3-8b", "qwen2.5-7b"])
def test_the_commonsense_recipes_have_the_settings_of_the_paper(model):
    recipe = load_recipe(f"commonsense-{model}")
    training, config = recipe.training, recipe.peft_config()
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    assert (config.r, config.pera_dropout, config.task_type) == (16, 0.05, "CAUSAL_LM")
    assert_published(config)
    assert (training.learning_rate, training.lr_scheduler, training.warmup_steps) == (1e-4, "linear", 100)
    assert (training.batch_size, training.epochs, training.eval_steps, training.keep) == (16, 3, 80, "best")
    assert (recipe.task.validation_size, recipe.task.protocol, recipe.task.names) == (120, "hira", None)
    assert (recipe.evaluation.scorer, recipe.evaluation.num_beams) == ("generation", 4)
    assert recipe.evaluation.max_new_tokens == 16


@pytest.mark.parametrize("task", ["mrpc", "stsb", "mnli"])
@pytest.mark.parametrize("name", ["glue-minilm", "glue-roberta-base", "glue-roberta-large"])
def test_every_task_of_glue_resolves(name, task, file):
    recipe = load_recipe(name, [f"task={task}"])
    assert (recipe.task.name, recipe.task.data) == (task, "hub")
    assert recipe.evaluation.scorer == "classification"
    assert load_recipe(file(recipe.to_yaml())) == recipe


def test_data_and_task_are_short_for_keys_of_the_task(tmp_path):
    recipe = load_recipe("glue-minilm", [f"data={tmp_path}", "task=mrpc", "task.train_size=9"])
    assert (recipe.task.name, recipe.task.data, recipe.task.train_size) == ("mrpc", str(tmp_path), 9)
    mix = load_recipe("commonsense-smollm2", ["task.names=[boolq, piqa]"])
    assert mix.task.names == ["boolq", "piqa"]


def test_a_data_folder_becomes_absolute(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("glue-minilm", ["data=data"]).task.data == str(tmp_path / "data")


def test_a_model_folder_becomes_absolute_unless_the_model_is_embedded(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "blob").touch()
    (tmp_path / "models" / "a.gguf").symlink_to("blob")  # as in the cache of the hub
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path / "models")
    for name, kept in [("../models", tmp_path / "models"), ("a.gguf", tmp_path / "models" / "a.gguf"), ("a/b", "a/b")]:
        assert parse_recipe({**SMALL, "model": name}).model.name == str(kept)
    monkeypatch.chdir(tmp_path)
    assert parse_recipe(SMALL).model.name == "smollm2-135m"


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(UserError, match=r"^model: revision='main' needs a Hub id, and '.*' is not one; leave it out$"):
        parse_recipe({**SMALL, "model": {"name": str(tmp_path), "revision": "main"}})
    assert parse_recipe({**SMALL, "model": {"name": "a/b", "revision": "main"}}).model.revision == "main"


def test_overrides_take_precedence_over_by_task():
    overrides = ["task=mrpc", "training.epochs=1", "method.dropout=0.1"]
    recipe = load_recipe("glue-roberta-base", overrides)
    assert (recipe.training.epochs, recipe.method["dropout"], recipe.training.learning_rate) == (1, 0.1, 1e-3)


def test_by_task_holds_sections(file):
    with pytest.raises(UserError, match=r"^recipe: by_task in '.*' should hold sections of a recipe"):
        load_recipe(file({**SMALL, "by_task": {"leg_counting": 3}}))


@pytest.mark.parametrize(("name", "nearest"), [("mrcp", "mrpc"), ("leg_countin", "leg_counting")])
def test_by_task_names_tasks(name, nearest, file):
    section = {"training": {"warmup_steps": 2}}
    assert load_recipe(file({**SMALL, "by_task": {nearest: section}}))
    with pytest.raises(UserError, match=rf"by_task\.{name} in .* not the name of a task; did you mean '{nearest}'\?"):
        load_recipe(file({**SMALL, "by_task": {name: section}}))


@pytest.mark.parametrize(
    ("task", "scorer", "longest"),
    [
        ("leg_counting", "exact_match", 16),
        ("sst2", "classification", None),
        ("commonsense", "generation", 16),
        ("ARC-Easy", "generation", 16),
        ("gsm8k", "exact_match", 512),
        ({"name": "own", "data": "a/b"}, "exact_match", 256),
    ],
)
def test_each_task_has_a_default_scorer_and_answer_length(task, scorer, longest):
    evaluation = parse_recipe({**SMALL, "task": task}).evaluation
    assert (evaluation.scorer, evaluation.max_new_tokens) == (scorer, longest)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"task": {"name": "sst22", "data": "x"}},
            "task: name='sst22' is not a task with data; did you mean 'sst2'?",
        ),
        ({"task": {"name": "own"}}, "task.data is missing in the recipe"),
        ({"task": {"name": "boolq", "cap": {}}}, "task.cap is not a key of a recipe; did you mean 'caps'?"),
        ({"task": {"name": "gsm8k", "options": {}}}, "task.options is not a key of a recipe; "),
        ({"task": {"name": "commonsense", "protocol": "dora"}}, "task.protocol='dora': input should be 'llm-adapters'"),
        ({"task": {"name": "boolq", "caps": {"boolq": 0}}}, "task.caps.boolq=0: input should be greater than or equal"),
        ({"task": {"name": "boolq", "caps": {"boolq": True}}}, "task.caps.boolq=True: input should be a valid integer"),
        (
            {"task": {"name": "boolq", "shares": {"boolq": -1}}},
            "task.shares={'boolq': -1}: input should be a number of at least 0 for each task, "
            "such as {boolq: 1, piqa: 3}, or 'equal'",
        ),
        ({"evaluation": {"scorer": "likelihood"}}, "evaluation.scorer='likelihood' does not fit task 'leg_counting'"),
        ({"evaluation": {"max_new_tokens": None}}, "evaluation.max_new_tokens=None should be a number"),
        (
            {"task": "sst2", "evaluation": {"num_beams": 4}},
            "evaluation.num_beams=4: task 'sst2' trains a classifier",
        ),
    ],
)
def test_an_error_in_a_task_names_key_value_and_remedy(change, sentence):
    with pytest.raises(UserError) as caught:
        parse_recipe({**SMALL, **change})
    assert sentence in str(caught.value)


def test_another_scorer_must_fit_the_task():
    recipe = parse_recipe({**SMALL, "task": "boolq"})
    assert recipe.with_scorer("likelihood").evaluation.scorer == "likelihood"
    assert recipe.with_scorer(None) is recipe
    with pytest.raises(UserError, match=r"evaluation\.scorer='classification' does not fit task 'boolq'"):
        recipe.with_scorer("classification")


def test_recipes_saved_by_pera_0_1_0_resolve_to_the_same_text(saved):
    files = sorted((saved / "runs").glob("*/recipe.yaml"))
    assert [load_recipe(str(file), recorded=True).to_yaml() for file in files] == [file.read_text() for file in files]
    assert len(files) == 3
