"""Options: the same names everywhere, intervals checked, unknown names refused with the nearest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from folora.cli import parse
from folora.config import AdapterConfig, FoLoraConfig, SamplingConfig, option_names, read_yaml
from folora.errors import ConfigError


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = FoLoraConfig.paper(model="m", dataset="d", output="o")
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert FoLoraConfig.from_yaml(tmp_path / "c.yaml") == config
    listed = FoLoraConfig(adapter=AdapterConfig(target_modules=("q_proj", "v_proj")))
    (tmp_path / "d.yaml").write_text(listed.to_yaml())
    assert FoLoraConfig.from_yaml(tmp_path / "d.yaml") == listed


def test_paper_settings() -> None:
    paper = FoLoraConfig.paper()
    assert (paper.spectrum.lam, paper.spectrum.s_min, paper.spectrum.step_scale) == (
        1,
        0.3,
        "paper",
    )
    assert paper.adapter.init == "null_space"
    assert (paper.sampling.num_sequences, paper.statistics.task_examples) == (2000, 256)
    assert (paper.sampling.min_new_tokens, paper.sampling.max_new_tokens) == (128, 512)
    assert paper.training.warmup_ratio == 0.03
    assert paper.training.weight_decay == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"spectrum": {"tua": 1.0}}, r"'spectrum.tua' \(did you mean 'spectrum.tau'\?\)"),
        ({"modle": "x"}, "did you mean 'model'"),
        ({"spectrum": {"tau": -1.0}}, "spectrum.tau is -1.0"),
        ({"spectrum": {"s_min": 1.5}}, "spectrum.s_min is 1.5"),
        ({"spectrum": {"lam": -0.1}}, "spectrum.lam"),
        ({"spectrum": {"step_scale": "big"}}, "spectrum.step_scale"),
        ({"adapter": {"r": 0}}, "adapter.r is 0"),
        ({"adapter": {"r": "many"}}, "adapter.r is 'many'"),
        ({"adapter": {"alpha": 0}}, "adapter.alpha"),
        ({"sampling": {"num_sequences": 5}}, "sampling.num_sequences"),
        ({"sampling": {"min_new_tokens": 99, "max_new_tokens": 64}}, "sampling.max_new_tokens"),
        ({"training": {"learning_rate": 0}}, "training.learning_rate"),
        ({"training": {"batch_size": 0}}, "training.batch_size"),
        ({"quantize": "2bit"}, "quantize"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FoLoraConfig.from_dict(values)


def test_flags_win_over_the_file_and_have_the_same_names(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "model: m\nspectrum:\n  tau: 0.5\n  lam: 2.0\nadapter:\n  r: 3\n"
    )
    _, config = parse(
        ["run", "--config", str(tmp_path / "c.yaml"), "--spectrum.tau", "1e-4", "--r", "8",
         "--adapter.target_modules", "[q_proj, v_proj]", "--training.extra", "{packing: true}"]
    )  # fmt: skip
    assert (config.model, config.spectrum.tau, config.spectrum.lam) == ("m", 1e-4, 2.0)
    assert config.adapter.r == 8
    assert config.adapter.target_modules == ("q_proj", "v_proj")
    assert config.training.extra == {"packing": True}


def test_a_preset_can_be_changed_by_flags() -> None:
    _, config = parse(["plan", "--preset", "paper", "--model", "m", "--r", "4"])
    assert config.adapter == AdapterConfig(r=4, init="null_space")
    assert config.spectrum.step_scale == "paper"


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00"])
def test_bad_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        read_yaml(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        read_yaml(tmp_path / "none.yaml")


def test_every_option_has_help_and_held_out_is_at_least_sixteen() -> None:
    assert all(info["help"] for info in option_names().values())
    assert "sampling.num_sequences" in option_names()
    assert SamplingConfig(num_sequences=100).num_held_out == 16
