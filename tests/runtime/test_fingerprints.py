"""Every change that changes a result changes a fingerprint, and no other change does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny import make_llama, make_tokenizer, tiny_config
from folora.config import FoLoraConfig
from folora.data.contents import Example
from folora.data.rows import TaskData
from folora.errors import MismatchError
from folora.pipeline.run import Run
from folora.runtime.fingerprints import config_fingerprint, model_facts, weights_fingerprint

Edit = Callable[[Path], None]


def setting(**changes: Any) -> Edit:
    """Change entries of config.json."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def one_value(name: str, place: tuple[int, ...]) -> Edit:
    """Change a single weight."""

    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors[name][place] += 0.5
        save_file(tensors, file, metadata={"format": "pt"})

    return edit


UP = "model.layers.1.mlp.up_proj.weight"
CHANGES: dict[str, tuple[Edit, str]] = {
    "another number of heads": (setting(num_attention_heads=8, num_key_value_heads=4, head_dim=4), "model_config"),
    "another activation": (setting(hidden_act="gelu"), "model_config"),
    "another rope_theta": (setting(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "model_config"),
    "another epsilon of the norms": (setting(rms_norm_eps=1e-3), "model_config"),
    "one weight": (one_value(UP, (3, 5)), "model"),
    "the last weight": (one_value(UP, (47, 31)), "model"),
}  # fmt: skip


def facts_of(folder: Path, **changes: Any) -> dict[str, str]:
    config = tiny_config(model=str(folder), output=str(folder / "run"), **changes)
    return Run(config).context.facts


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_has_another_fingerprint(
    name: str, model_folder: Path, tmp_path: Path
) -> None:
    edit, fact = CHANGES[name]
    shutil.copytree(model_folder, tmp_path / "changed")
    edit(tmp_path / "changed")
    before, after = facts_of(model_folder), facts_of(tmp_path / "changed")
    assert {k for k in before if before[k] != after[k]} == {fact}


def test_a_copied_model_has_the_same_fingerprint(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "elsewhere")
    setting(transformers_version="4.0.0", use_cache=False)(tmp_path / "elsewhere")
    found = facts_of(tmp_path / "elsewhere")
    assert found == facts_of(model_folder)
    assert found == model_facts(make_llama(), make_tokenizer())  # never saved to disk


def test_lossless_dtype_changes_keep_the_fingerprint() -> None:
    """A bfloat16 checkpoint converted to float32 is the same model; rounding makes a different one."""
    torch.manual_seed(0)
    exact = make_llama().bfloat16()
    narrow = weights_fingerprint(exact)
    assert weights_fingerprint(exact.float()) == narrow
    assert weights_fingerprint(make_llama()) != narrow
    half = make_llama().half()
    assert weights_fingerprint(half) == weights_fingerprint(half.float()) != narrow


def test_value_order_and_persistent_buffers_change_the_fingerprint() -> None:
    layer = torch.nn.Linear(64, 64)
    before = weights_fingerprint(layer)
    layer.weight.data = layer.weight.data.flip(0)
    swapped = weights_fingerprint(layer)
    layer.register_buffer("bias_of_router", torch.ones(3))
    with_buffer = weights_fingerprint(layer)
    layer.register_buffer("inv_freq", torch.ones(3), persistent=False)
    assert len({before, swapped, with_buffer}) == 3
    assert weights_fingerprint(layer) == with_buffer


def test_a_large_tensor_is_hashed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("folora.runtime.fingerprints.VALUES_AT_ONCE", 100)
    layer = torch.nn.Linear(64, 64)
    found = set()
    for place in (0, 99, 100, 4095):
        layer.weight.data.view(-1)[place] += 1
        found.add(weights_fingerprint(layer))
    assert len(found) == 4


def test_another_train_and_held_out_split_changes_the_fingerprint() -> None:
    rows = [Example([n, n + 1], [-100, n + 1]) for n in range(4)]
    splits = [TaskData(rows[:n], rows[n:]).fingerprint for n in range(5)]
    assert len(set(splits)) == 5


def copied(finished: FoLoraConfig, target: Path, **changes: Any) -> FoLoraConfig:
    shutil.copytree(str(finished.output), target)
    return finished.replace(output=str(target)).changed(changes)


AFTER_DATA = {"2-statistics-task", "3-spectrum", "4-training", "5-adapter", "report.json"}


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"dtype": "bfloat16"}, {"1-samples", "2-statistics-pre", *AFTER_DATA}),
        ({"data.eval_rows": 2}, AFTER_DATA),
    ],
)
def test_another_dtype_or_split_reruns_the_stages_it_affects(
    changes: dict[str, Any], again: set[str], finished: FoLoraConfig, tmp_path: Path
) -> None:
    config = copied(finished, tmp_path / "run", **changes)
    Run(config).run()
    old = tmp_path / "run" / "old"
    assert {p.name.rpartition("-")[0] for p in old.iterdir()} == again


def test_a_changed_config_is_refused_for_a_single_stage(
    finished: FoLoraConfig, tmp_path: Path
) -> None:
    shutil.copytree(str(finished.model), tmp_path / "model")
    setting(hidden_act="gelu")(tmp_path / "model")
    config = copied(finished, tmp_path / "run", model=str(tmp_path / "model"))
    with pytest.raises(MismatchError, match="another model config"):
        Run(config).check_command("train")


def test_config_fingerprints_ignore_options_without_effect() -> None:
    one, other = make_llama().config, make_llama().config
    other.name_or_path, other.use_cache, other.dtype = "x", False, torch.bfloat16
    assert config_fingerprint(one) == config_fingerprint(other)
