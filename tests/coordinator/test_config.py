"""run.toml: what is right is taken as meant, what is wrong is named in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from coordinator.config import ConfigError, MethodSection, RunConfig, load_config
from coordinator.methods import METHODS, MethodOptions, RowMethod
from coordinator.methods import make as make_method
from coordinator.server_optimizer import Adam, Momentum, Plain

LEAST = '[run]\nname = "trial"\n[model]\nbase = "org/base"\n'


@pytest.fixture
def load(tmp_path):
    """Loads this text as run.toml."""

    def from_text(text):
        path = tmp_path / "run.toml"
        path.write_text(text)
        return load_config(path)

    return from_text


def refused(load, text, sentence):
    """The text is refused, with the file, that sentence, and on one line."""
    with pytest.raises(ConfigError, match=sentence) as told:
        load(text)
    assert "run.toml" in str(told.value) and "\n" not in str(told.value)


def test_the_least_file_takes_the_defaults(load, tmp_path):
    config = load(LEAST)
    assert (config.run.name, config.model.base) == ("trial", "org/base")
    assert (config.adapter.rank, config.wire.update, config.round.quorum) == (32, "int8", 0.8)
    assert config.server.state == tmp_path / "state"


def test_every_value_of_a_full_file_is_taken(load):
    config = load(
        LEAST
        + """
        [adapter]
        rank = 16
        alpha = 8
        rslora = true
        [training]
        precision = "auto"
        checkpointing = false
        optimizer = "sgd"
        [round]
        quorum = 1
        round_s = 30
        [wire]
        update = "bfloat16"
        [server]
        listen = "[::1]:9000"
        """
    )
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.rslora) == (16, 8.0, True)
    assert config.training.checkpointing is False and config.training.optimizer == "sgd"
    assert (config.round.quorum, config.round.round_s) == (1.0, 30.0)
    assert (config.wire.update, config.server.listen) == ("bfloat16", "[::1]:9000")


def test_relative_folders_are_relative_to_the_file(load, tmp_path, monkeypatch):
    (tmp_path / "nano").mkdir()
    monkeypatch.chdir("/")
    config = load(LEAST.replace("org/base", "nano") + '[server]\nstate = "here/state"\n')
    assert config.model.base == str(tmp_path / "nano")
    assert config.server.state == tmp_path / "here" / "state"
    config = load(LEAST + '[server]\nstate = "/elsewhere"\n')
    assert config.server.state == Path("/elsewhere")
    assert config.model.base == "org/base", "no such folder, so it is a hub id"


def test_the_home_folder_is_understood(load, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = load(LEAST + '[server]\nstate = "~/state"\n')
    assert config.server.state == tmp_path / "home" / "state"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[rnu]\nname = 1\n" + LEAST, r"unknown key 'rnu' in the top level; did you mean 'run'\?"),
        (LEAST + "[round]\nquorom = 1\n", r"unknown key 'quorom' in \[round\]; did you mean 'quor"),
        (LEAST + "[adapter]\nzzz = 1\n", r"'zzz' in \[adapter\]; known keys: alpha, rank, rslora"),
        ('[run]\nname = "x"\n', r"\[model\] is missing"),
        ("[run]\nseed = 1\n[model]\nbase = 'b'\n", r"\[run\] lacks 'name'"),
        (LEAST + "[adapter]\nrank = 'many'\n", r"\[adapter\] rank: .*integer"),
        (LEAST + "[adapter]\nrank = 0\n", r"\[adapter\] rank: .*greater than or equal to 1"),
        (LEAST + "[adapter]\nalpha = nan\n", r"\[adapter\] alpha"),
        (LEAST + "[round]\nmax_round_s = inf\n", r"\[round\] max_round_s: .*finite"),
        (LEAST + "[round]\nquorum = 1.5\n", r"\[round\] quorum: .*less than or equal to 1"),
        (LEAST + "[wire]\nupdate = 'int5'\n", r"\[wire\] update: .*'float32', 'bfloat16', 'int8'"),
        (LEAST + "[training]\nprecision = 'fp8'\n", r"\[training\] precision: .*'nf4', 'int8'"),
        (LEAST + "run2 = 1\n[adapter]\n", r"unknown key 'run2' in \[model\]"),
        (LEAST.replace("trial", "Big Trial"), r"\[run\] name: .*pattern"),
        ("model = 3\n[run]\nname = 'x'\n", r"\[model\] .*valid dictionary"),
        (LEAST + "[adapter]\nrank = 4\n[round]\nmin_rank = 8\n", "min_rank 8 exceeds .* rank 4"),
        (LEAST + "[wire]\ngroup = 4\n", "group 4 is too small"),
        (LEAST + "[method]\nname = 'flasc'\n[wire]\ndelta = false\n", "delta = false does nothing"),
        (LEAST + "[method]\nname = 'flora'\n[wire]\ndelta = false\n", "delta = false does nothing"),
        (LEAST + "[wire]\nupdate = 'bfloat16'\ngroup = 64\n", "group does nothing with bfloat16"),
        (LEAST + "[wire]\nupdate = 'sign'\n", "signs only .*error_feedback = true"),
        (LEAST + "[wire]\nslice = 'sign'\n", r"\[wire\] slice: .*'int4'"),
        (LEAST + "[wire]\nslice = 'int2'\ndelta = false\n", r"int2 are for differences"),
        (LEAST + "[method]\nname = 'flora'\n[wire]\nglobal_adapter = 'int2'\n", r"int2 are for"),
        (LEAST + "[training]\nlocal_steps = 2\nmin_local_steps = 3\n", "min_local_steps exceeds"),
        (LEAST + "[round]\nround_s = 90\nmax_round_s = 60\n", "round_s exceeds max_round_s"),
        ("[run\n", "is not valid TOML"),
        (LEAST + "[run]\n", "is not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(load, text, sentence):
    refused(load, text, sentence)


# --- methods ------------------------------------------------------------------------------------

every_method = pytest.mark.parametrize("name", METHODS)
OPTIONS = {
    "normalisation": '"ipw"', "sketches": '"independent"', "energy": "0.5",
    "regularisation": "0.5", "side_rank": "3", "density": "0.5", "prune_keep": "0.5",
    "prune_penalty": "0.5",
}  # fmt: skip


def method_of(name):
    return make_method(name, MethodOptions(rank=8))


def with_method(name, *lines, more=""):
    return LEAST + f'[method]\nname = "{name}"\n' + "\n".join(lines) + "\n" + more


def test_the_options_are_those_of_the_methods():
    """A key of [method] is an option of `MethodOptions` of the same default, and of some method."""
    assert set(OPTIONS) == set(MethodSection.model_fields) - {"name", "robust"}
    assert set(OPTIONS) == {key for method in METHODS.values() for key in method.options}
    defaults = MethodOptions(rank=1)
    for key in OPTIONS:
        assert MethodSection.model_fields[key].default == getattr(defaults, key)


@every_method
@pytest.mark.parametrize("key", OPTIONS)
def test_an_option_is_taken_by_the_methods_that_use_it_and_refused_by_the_others(load, name, key):
    text = with_method(name, f"{key} = {OPTIONS[key]}")
    options = METHODS[name].options
    if key in options:
        assert load(text).make_method().name == name
        return
    takes = ", ".join(options) or "no options"
    refused(load, text, rf"\[method\] {key} is not for {name}, which takes {takes}")


@every_method
def test_a_method_needs_no_options(load, name):
    config = load(with_method(name))
    assert config.make_method().name == name
    assert isinstance(config.make_server_optimizer(), Plain)


@every_method
def test_every_configuration_survives_the_database(load, name):
    """A run's record names every key; read back, it must not be taken for a wrong run.toml."""
    config = load(with_method(name))
    stored = config.model_dump(mode="json")
    assert RunConfig.model_validate(stored) == config
    assert RunConfig.model_validate(stored).make_method().name == name


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["name = 'fedsgd'"], r"method 'fedsgd' does not exist.*choose.* fslora, fedit"),
        (["name = 'florist'", "energy = 0"], r"\[method\] energy: .*greater than 0"),
        (["name = 'florist'", "energy = 1.5"], r"\[method\] energy: .*less than or equal to 1"),
        (["name = 'flasc'", "density = 0"], r"\[method\] density: .*greater than 0"),
        (
            ["name = 'flora'", "side_rank = -1"],
            r"\[method\] side_rank: .*greater than or equal to 0",
        ),
        (["name = 'hetlora'", "prune_keep = 1"], r"\[method\] prune_keep: .*less than 1"),
        (
            ["name = 'fslora'", "normalisation = 'mean'"],
            r"\[method\] normalisation: .*'auto', 'none'",
        ),
        (["name = 'fed-plora'", "sketches = 'prefix'"], r"\[method\] sketches: .*'stratified' or"),
        (["name = 'lora-fair'", "regularisation = inf"], r"\[method\] regularisation: .*finite"),
        (["energie = 0.5"], r"unknown key 'energie' in \[method\]; did you mean 'energy'"),
    ],
)
def test_options_out_of_range_are_named(load, lines, sentence):
    refused(load, LEAST + "[method]\n" + "\n".join(lines), sentence)


@every_method
@pytest.mark.parametrize(
    ("lines", "kind"),
    [
        ("name = 'momentum'\nbeta1 = 0.5", Momentum),
        ("name = 'adam'\nlearning_rate = 0.01", Adam),
        ("learning_rate = 0.5", Plain),
    ],
)
def test_a_server_optimiser_is_for_methods_that_keep_their_rows(load, name, lines, kind):
    text = with_method(name, more=f"[server_optimizer]\n{lines}\n")
    if issubclass(METHODS[name], RowMethod):
        assert type(load(text).make_server_optimizer()) is kind
        return
    refused(
        load, text, rf"\[server_optimizer\] \w+ cannot be used with {name}: .*leave the section"
    )


@every_method
@pytest.mark.parametrize(("section", "key"), [
    ("training", "keep_optimizer"), ("wire", "error_feedback"),
])  # fmt: skip
def test_what_devices_keep_is_refused_where_rows_do_not_stay(load, name, section, key):
    text = with_method(name, more=f"[{section}]\n{key} = true\n")
    method = method_of(name)
    # A residual in rows that are scaled by the rank is wrong once the rank is another.
    rescaled = key == "error_feedback" and method.heterogeneous and method.scaling == "common"
    if method.keeps_basis and not rescaled:
        assert getattr(getattr(load(text), section), key) is True
        return
    refused(load, text, rf"\[{section}\] {key} cannot be used with {name}: .*set it to false")


# --- fairness -----------------------------------------------------------------------------------


OWN_KEY = {"q-ffl": ("q", 2.0), "afl": ("step", 0.5), "term": ("t", -1.0)}


@pytest.mark.parametrize("rule", ["samples", "uniform", *OWN_KEY])
def test_every_weight_rule_is_made_with_its_options(load, rule):
    key, value = OWN_KEY.get(rule, ("", 0.0))
    line = f"{key} = {value}\n" if key else ""
    made = load(LEAST + f'[fairness]\nweights = "{rule}"\n{line}').make_weight_rule()
    assert made.name == rule
    assert not key or getattr(made.options, key) == value


@pytest.mark.parametrize(("lines", "key"), [
    ('[fairness]\nq = 2', "q"), ('[fairness]\nweights = "q-ffl"\nt = 2', "t"),
    ('[fairness]\nstep = 2', "step"), ("[fairness]\npropfair_ceiling = 6", "propfair_ceiling"),
    ('[server_optimizer]\nname = "momentum"\nbeta2 = 0.5', "beta2"),
])  # fmt: skip
def test_a_key_that_would_do_nothing_is_refused(load, lines, key):
    refused(load, f"{LEAST}{lines}\n", rf"{key} does nothing with \w+ = .*; it needs")


def test_adam_at_the_server_takes_short_steps_unless_told(load):
    text = LEAST + '[server_optimizer]\nname = "adam"\n'
    assert load(text).make_server_optimizer().learning_rate == 0.01
    assert load(text + "learning_rate = 0.5\n").make_server_optimizer().learning_rate == 0.5
    assert load(LEAST).make_server_optimizer().learning_rate == 1


def test_propfair_is_taken_with_its_ceiling(load):
    config = load(LEAST + '[fairness]\nloss = "propfair"\npropfair_ceiling = 6\n')
    assert (config.fairness.propfair_ceiling, config.fairness.propfair_margin) == (6.0, 0.2)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("weights = 'fair'", "weights 'fair' do not exist; choose samples, uniform, q-ffl"),
        ("weights = 'q-ffl'\nq = -1", r"\[fairness\] q: .*greater than or equal to 0"),
        ("weights = 'afl'\nstep = 0", r"\[fairness\] step: .*greater than 0"),
        ("weights = 'term'\nt = nan", r"\[fairness\] t: .*finite"),
        ("loss = 'propfair'", "propfair needs propfair_ceiling .*about 1.5 times the highest loss"),
        ("loss = 'propfair'\npropfair_ceiling = 0.1", "needs propfair_ceiling above propfair_mar"),
        ("loss = 'fair'", r"\[fairness\] loss: .*'plain' or 'propfair'"),
    ],
)
def test_fairness_that_cannot_be_is_named(load, lines, sentence):
    refused(load, LEAST + f"[fairness]\n{lines}\n", sentence)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("name = 'sgd'", r"\[server_optimizer\] name: .*'plain', 'momentum' or 'adam'"),
        ("learning_rate = 0", r"\[server_optimizer\] learning_rate: .*greater than 0"),
        ("beta1 = 1", r"\[server_optimizer\] beta1: .*less than 1"),
        ("tau = 0", r"\[server_optimizer\] tau: .*greater than 0"),
    ],
)
def test_a_server_optimiser_that_cannot_be_is_named(load, lines, sentence):
    refused(load, LEAST + f"[server_optimizer]\n{lines}\n", sentence)


# --- addresses and files ------------------------------------------------------------------------


@pytest.mark.parametrize("listen", ["0.0.0.0:8470", "192.168.1.5:8470", "[::]:8470", "host:8470"])
def test_an_address_beyond_this_machine_is_refused(load, listen):
    text = LEAST + f'[server]\nplain_text = true\nlisten = "{listen}"\n'
    refused(load, text, "not a loopback address; plain_text is for trials")


@pytest.mark.parametrize("listen", ["8470", "127.0.0.1", "127.0.0.1:port", "127.0.0.1:70000", ":1"])
def test_an_address_that_is_none_is_refused(load, listen):
    refused(load, LEAST + f'[server]\nlisten = "{listen}"\n', 'must be "address:port"')


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read: No such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_config(tmp_path / "binary.toml")


def test_the_environment_changes_nothing(load, monkeypatch):
    monkeypatch.setenv("RUN_NAME", "other")
    monkeypatch.setenv("NAME", "other")
    assert load(LEAST).run.name == "trial"


def test_a_configuration_cannot_be_changed_after_reading(load):
    with pytest.raises(ValidationError, match="frozen"):
        load(LEAST).run.name = "other"


def test_a_configuration_survives_the_database(load):
    config = load(LEAST)
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
