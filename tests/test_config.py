"""Options: the same names everywhere, intervals checked, unknown names refused with the nearest."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folora.cli.main import parse
from folora.config import (
    REMEDIES,
    AdapterConfig,
    FoLoraConfig,
    SamplingConfig,
    SpectrumConfig,
    option_names,
    read_yaml,
)
from folora.errors import ConfigError
from folora.methods import Method
from folora.runtime.storage import json_fingerprint, write_text


def parsed(words: list[str]) -> FoLoraConfig:
    found = parse(words)
    assert found is not None
    return found[1]


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = FoLoraConfig.paper(model="m", dataset="d", output="o")
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert FoLoraConfig.from_yaml(tmp_path / "c.yaml") == config
    listed = FoLoraConfig(adapter=AdapterConfig(target_modules=("q_proj", "v_proj")))
    (tmp_path / "d.yaml").write_text(listed.to_yaml())
    assert FoLoraConfig.from_yaml(tmp_path / "d.yaml") == listed


def test_paper_settings() -> None:
    paper = FoLoraConfig.paper()
    assert (paper.spectrum.lam, paper.spectrum.s_min, paper.spectrum.directions) == (1, 0.3, "all")
    assert (paper.method.init, paper.method.step_scale) == ("null_space", "paper")
    assert (paper.sampling.num_sequences, paper.statistics.task_examples) == (2000, 256)
    assert (paper.sampling.min_new_tokens, paper.sampling.max_new_tokens) == (128, 512)
    assert paper.training.warmup_steps == 0.03
    assert paper.training.weight_decay == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"spectrum": {"tua": 1.0}}, r"'spectrum.tua' \(did you mean 'spectrum.tau'\?\)"),
        ({"modle": "x"}, "did you mean 'model'"),
        ({"spectrum": {"tau": -1.0}}, "spectrum.tau is -1.0"),
        ({"spectrum": {"s_min": 1.5}}, "spectrum.s_min is 1.5"),
        ({"spectrum": {"lam": -0.1}}, "spectrum.lam"),
        ({"method": "loar"}, "unknown method 'loar' .did you mean 'lora'"),
        ({"method": {"name": "loar", "protect": 8}}, "unknown method 'loar'"),
        ({"method": {"name": "oplora", "protect": 0}}, r"method\.protect is 0, but must be >= 1"),
        ({"method": {"name": "oplora", "init": "eigenn"}}, r"method\.init is 'eigenn'.*'eigen'"),
        ({"method": {"name": "lora", "replay": 1.0}}, r"method\.replay is 1\.0, .*\[0, 1\)"),
        ({"method": {"name": "lora", "kl_wieght": 1.0}}, r"did you mean 'method\.kl_weight'"),
        ({"method": 3}, "method is 3, but must be a name, or a mapping"),
        ({"seed": -1}, r"seed is -1, but must lie in \[0, "),
        ({"adapter": {"r": 0}}, "adapter.r is 0"),
        ({"adapter": {"r": "many"}}, "adapter.r is 'many'"),
        ({"adapter": {"alpha": 0}}, "adapter.alpha"),
        ({"sampling": {"num_sequences": 5}}, "sampling.num_sequences"),
        ({"sampling": {"min_new_tokens": 99, "max_new_tokens": 64}}, "sampling.max_new_tokens"),
        ({"training": {"learning_rate": 0}}, "training.learning_rate"),
        ({"training": {"per_device_train_batch_size": 0}}, "per_device_train_batch_size is 0"),
        ({"quantize": "2bit"}, "quantize"),
        ({"adapter": {"target_modules": "("}}, "no regular expression"),
        ({"adapter": {"target_modules": "a{99999999999}"}}, "no regular expression"),
        ({"adapter": {"target_modules": "(" * 5000 + ")" * 5000}}, "no regular expression"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FoLoraConfig.from_dict(values)


def test_flags_override_the_file_and_have_the_same_names(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "model: m\nspectrum:\n  tau: 0.5\n  lam: 2.0\nadapter:\n  r: 3\n"
    )
    config = parsed(
        ["run", "--config", str(tmp_path / "c.yaml"), "--spectrum.tau", "1e-4", "--r", "8",
         "--adapter.target_modules", "[q_proj, v_proj]", "--training.packing", "true", "--training.lr_scheduler_kwargs", "{a: 1e-3}"]
    )  # fmt: skip
    assert (config.model, config.spectrum.tau, config.spectrum.lam) == ("m", 1e-4, 2.0)
    assert config.adapter.r == 8
    assert config.adapter.target_modules == ("q_proj", "v_proj")
    assert config.training.model_extra == {"packing": True, "lr_scheduler_kwargs": {"a": 1e-3}}


def test_a_preset_can_be_changed_by_flags() -> None:
    config = parsed(["plan", "--preset", "paper", "--model", "m", "--r", "4"])
    assert config.adapter == AdapterConfig(r=4)
    assert config.method.name == "folora-paper"
    assert parsed(["plan", "--preset", "paper", "--method", "lora"]).directions == 128


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00"])
def test_invalid_yaml_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        read_yaml(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        read_yaml(tmp_path / "none.yaml")


def test_every_option_has_help_and_held_out_is_at_least_sixteen() -> None:
    assert all(info.help for info in option_names().values())
    assert "sampling.num_sequences" in option_names()
    assert SamplingConfig(num_sequences=100).num_held_out == 16


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(), inside, max_size=3),
    max_leaves=6,
)
anything = st.one_of(
    st.integers(-1, 600),
    st.integers(),
    st.floats(),
    st.text(st.characters()),
    st.lists(st.text(min_size=1), min_size=1, max_size=3),
    st.dictionaries(st.text(), json_values, max_size=3),
    st.none(),
    st.booleans(),
)


def fitting(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an option's type, inside and outside its interval."""
    if get_origin(kind) is Annotated:
        return fitting(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return st.one_of(*map(fitting, get_args(kind)))
    if get_origin(kind) is tuple:
        return st.lists(st.text(min_size=1), min_size=1, max_size=3).map(tuple)
    if get_origin(kind) is dict:
        return st.dictionaries(st.text(), json_values, max_size=3)
    return {
        int: st.integers(1, 600), float: st.floats(0, 1) | st.floats(allow_nan=False),
        str: st.text(st.characters()), bool: st.booleans(), type(None): st.none(),
    }[kind]  # fmt: skip


OPTIONS = {name: option for name, option in option_names().items() if name != "method"}
changes = st.lists(st.sampled_from(sorted(OPTIONS)), max_size=6, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({n: fitting(OPTIONS[n].type) for n in names})
)


def configured(given: dict[str, Any]) -> FoLoraConfig:
    """The default config with as many of the changes as fit together."""
    config = FoLoraConfig()
    for name, value in given.items():
        with contextlib.suppress(ConfigError):
            config = config.changed({name: value})
    return config


@settings(max_examples=40, deadline=None)
@given(changes)
def test_any_config_round_trips_through_its_file(given: dict[str, Any]) -> None:
    config = configured(given)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "c.yaml"
        write_text(file, config.to_yaml())
        assert FoLoraConfig.from_yaml(file) == config
    assert FoLoraConfig.from_dict(config.to_dict()) == config
    assert FoLoraConfig().changed(config.differences()) == config
    json_fingerprint(config.to_dict())  # as a request stores it


@settings(max_examples=60, deadline=None)
@given(changes, st.sampled_from(sorted(OPTIONS)), st.data())
def test_a_change_is_refused_or_changes_only_this_option(
    given: dict[str, Any], name: str, data: st.DataObject
) -> None:
    before = configured(given)
    value = data.draw(fitting(OPTIONS[name].type) | anything)
    try:
        after = before.changed({name: value})
    except ConfigError as error:
        assert str(error)
        return
    for option in OPTIONS:
        if option != name:
            assert attrgetter(option)(after) == attrgetter(option)(before)
    found = attrgetter(name)(after)
    assert found == value or found == type(found)(value)  # a list becomes a tuple, an int a float


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "model.x",
        "spectrum.tau.x",
        "x.y.z",
        "sampling.",
        ".seed",
        "sampling..seed",
        "method.x",
        3,
    ],
)
def test_an_unknown_option_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="unknown option"):
        FoLoraConfig().changed({name: 1})


@pytest.mark.parametrize(
    "text",
    ["!!int ''", "!!int '+'", "!!float ''", "!!bool maybe", "!!timestamp soon", "!!timestamp ''",
     "0x" + "f" * 5000, "0b1" + "0" * 70, "!!python/object:os.system x"],
)  # fmt: skip
def test_yaml_on_which_pyyaml_fails_is_refused(tmp_path: Path, text: str) -> None:
    """PyYAML raises IndexError, KeyError or AttributeError, or returns a number that Python cannot print."""
    (tmp_path / "c.yaml").write_text(f"statistics:\n  batch_size: {text}\n")
    with pytest.raises(ConfigError):
        FoLoraConfig.from_yaml(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "text", ["2001-02-03", "!!binary YQ==", "!!set {a, b}", "{1: a, b: c}", ".nan"]
)
def test_values_of_trl_options_must_be_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(f"training:\n  lr_scheduler_kwargs: {{x: {text}}}\n")
    with pytest.raises(ConfigError, match=r"training\.lr_scheduler_kwargs|names of options"):
        FoLoraConfig.from_yaml(tmp_path / "c.yaml")


def test_sections_may_be_dicts() -> None:
    config = FoLoraConfig(adapter={"r": 4}, sampling={"num_sequences": 40})
    assert config == FoLoraConfig.from_dict(
        {"adapter": {"r": 4}, "sampling": {"num_sequences": 40}}
    )
    assert FoLoraConfig.paper(adapter={"r": 4}).adapter.r == 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FoLoraConfig(adapter=3), r"adapter is 3: Input should be a valid dictionary or instance"),
        (lambda: FoLoraConfig(adapter={"rr": 4}), r"unknown option 'adapter\.rr' \(did you mean"),
        (lambda: FoLoraConfig(adapter={"r": 0}), r"adapter\.r is 0, but must be >= 1"),
        (lambda: FoLoraConfig(sampling=AdapterConfig()), r"sampling is AdapterConfig"),
        (lambda: FoLoraConfig(model=3), r"model is 3: Input should be a valid string"),
        (lambda: AdapterConfig(r="x"), r"adapter\.r is 'x': Input should be a valid integer"),
        (lambda: AdapterConfig(r=True), r"adapter\.r is True, but must be a number"),
        (lambda: AdapterConfig(rr=4), r"unknown option 'adapter\.rr' \(did you mean"),
        (lambda: AdapterConfig(r=33.0), r"adapter\.r is 33\.0: Input should be a valid integer"),
        (lambda: AdapterConfig(alpha="8"), r"adapter\.alpha is '8': Input should be a valid number"),
    ],
)  # fmt: skip
def test_wrong_types_are_refused_when_a_section_is_built(
    build: Callable[[], Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize("name", REMEDIES)
def test_a_removed_option_is_refused_with_a_remedy(name: str, tmp_path: Path) -> None:
    """In a file, as a flag and in `changed`; the options that the remedy names exist."""
    section, _, option = name.partition(".")
    (tmp_path / "c.yaml").write_text(f"{section}:\n  {option}: 1\n")
    for refused in (
        lambda: FoLoraConfig.from_yaml(tmp_path / "c.yaml"),
        lambda: FoLoraConfig().changed({name: 1}),
        lambda: parse(["run", f"--{name}", "1"]),
        lambda: parse(["run", f"--{name}=1"]),
    ):
        with pytest.raises(ConfigError) as error:
            refused()
        assert str(error.value) == f"option {name!r} was removed: {REMEDIES[name]}"
    assert name not in option_names()


def test_the_remedies_name_options_that_exist() -> None:
    for remedy in REMEDIES.values():
        for name in re.findall(r"\b(?:sampling|data|statistics|spectrum|adapter)\.\w+", remedy):
            assert name in option_names() or name in REMEDIES


def test_a_method_changes_the_defaults_of_options_that_are_not_given() -> None:
    assert FoLoraConfig(method="corda").spectrum.tau == 0.01
    assert FoLoraConfig(method="corda", spectrum={"lam": 2.0}).spectrum.tau == 0.01
    assert FoLoraConfig(method="corda", spectrum={"tau": 0.001}).spectrum.tau == 0.001
    assert FoLoraConfig(method="corda", spectrum=SpectrumConfig(tau=0.001)).spectrum.tau == 0.001
    given = FoLoraConfig(method="corda", spectrum={"tau": 0.001})
    assert given.differences() == {"method": "corda", "spectrum.tau": 0.001}
    assert FoLoraConfig().changed(given.differences()) == given


def test_changing_the_method_resets_the_settings_of_the_previous_one() -> None:
    corda = FoLoraConfig(method="corda", adapter={"r": 8})
    lora = corda.changed({"method": "lora"})
    assert (lora.spectrum.tau, lora.adapter.r) == (0.001, 8)
    assert lora.changed({"method": "lora-r2"}).adapter.r == 2
    assert lora.changed({"method": "lora-r2", "adapter.r": 4}).adapter.r == 4


def test_settings_of_a_method_can_be_overridden(tmp_path: Path) -> None:
    """By a mapping, by flags, or as a new method with a title; all round-trip through a file."""
    of_flags = parsed(["run", "--method", "oplora", "--method.protect", "8"])
    config = FoLoraConfig(method={"name": "oplora", "protect": 8})
    assert config == of_flags == FoLoraConfig().changed({"method": "oplora", "method.protect": 8})
    assert config == parsed(["run", "--method", "{name: oplora, protect: 8}"])
    assert config.protected == 8
    assert config.differences() == {"method": {"name": "oplora", "protect": 8}}
    own = FoLoraConfig(method=Method(name="mine", title="Mine", about="", init="kaiming"))
    for made in (config, own):
        (tmp_path / "c.yaml").write_text(made.to_yaml())
        assert FoLoraConfig.from_yaml(tmp_path / "c.yaml") == made
        assert FoLoraConfig().changed(made.differences()) == made


def test_numbers_are_parsed_as_in_python(tmp_path: Path) -> None:
    """PyYAML parses 1e-3 as text; text that looks like a number is written in quotes."""
    (tmp_path / "c.yaml").write_text("spectrum: {tau: 1e-3, lam: 2E1}\nrevision: '1e5'\n")
    config = FoLoraConfig.from_yaml(tmp_path / "c.yaml")
    assert (config.spectrum.tau, config.spectrum.lam, config.revision) == (1e-3, 20.0, "1e5")
    (tmp_path / "d.yaml").write_text(config.to_yaml())
    assert FoLoraConfig.from_yaml(tmp_path / "d.yaml") == config


def test_there_are_at_most_forty_options() -> None:
    """Not counting options of SFTConfig for which folora has another default or an interval."""
    own = [n for n in option_names() if not n.startswith("training.")]
    assert len(own) <= 40
