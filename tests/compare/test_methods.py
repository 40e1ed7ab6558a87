"""Every compared method satisfies its defining identity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from peft import LoraConfig, OSFConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from support.closeness import assert_near
from transformers import PreTrainedModel

import folora
from benchmarks.tiny import make_gpt2, make_llama, make_tokenizer, rows, tiny_config
from folora.adapters.adapter import attach, lora_factors
from folora.adapters.initialization import INITIALIZATIONS
from folora.calibration.calibration_set import CalibrationSet
from folora.calibration.inputs import find_groups, target_layers
from folora.calibration.moments import second_moments
from folora.config import FoLoraConfig
from folora.errors import ConfigError, NumericsError
from folora.methods import METHODS
from folora.metrics.kl import kl, masked_target_kl
from folora.optim.sadam import SAdam
from folora.spectral.eigenproblem import BASES, generalized_eigenbasis
from folora.spectral.layers import GroupBasis, Spectrum, solve
from folora.spectral.moments import Moments
from folora.training.arguments import sft_config
from folora.training.optimizer import param_groups
from folora.training.prepared import assemble
from folora.training.train import train

R, ALPHA = 4, 8  # kappa = 2, so that a forgotten factor shows
IDS = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(5))


def batch(seed: int, rows: int = 6) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 50, (rows, 20), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def measured(model: PreTrainedModel) -> tuple[Moments, Moments]:
    groups = find_groups(model, target_layers(model, "all-linear"), batch(0))
    pre, task = (second_moments(model, groups, [batch(s)]) for s in (1, 2))
    return pre, task


def solved(model: PreTrainedModel, tau: float = 1e-2) -> Spectrum:
    return solve(*measured(model), tau=tau, null_rank=R)


def weights(model: PreTrainedModel, bases: Sequence[GroupBasis]) -> dict[str, torch.Tensor]:
    """W0 (d_out, d_in) in float64 by layer, whatever its layout."""
    found = {}
    for b in bases:
        for name in b.group.layers:
            weight = model.get_submodule(name).weight.detach().double()
            found[name] = weight.T if _is_conv(model, name) else weight
    return found


def _is_conv(model: PreTrainedModel, name: str) -> bool:
    return type(model.get_submodule(name)).__name__ == "Conv1D"


def started(
    model: PreTrainedModel, bases: Sequence[GroupBasis], init: str
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Layer, A0, B0 and kappa B0 A0 of a fresh adapter, in float64."""
    adapted = attach(model, bases, LoraConfig(r=R, lora_alpha=ALPHA), init=init)
    for name, module in adapted.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            a = module.lora_A["default"].weight.detach().double()[:R]  # without a frozen half
            b = module.lora_B["default"].weight.detach().double()[:, :R]
            yield name, a, b, ALPHA / R * b @ a


@pytest.mark.parametrize("init", sorted(INITIALIZATIONS))
def test_every_initialization_keeps_the_models_output(model: PreTrainedModel, init: str) -> None:
    before = model(IDS).logits
    adapted = attach(model, solved(model), LoraConfig(r=R, lora_alpha=ALPHA), init=init, protect=R)
    assert torch.equal(adapted(IDS).logits, before)
    with adapted.disable_adapter():
        assert torch.equal(adapted(IDS).logits, before)


def test_milora_initializes_from_the_smallest_singular_triples(model: PreTrainedModel) -> None:
    bases = solved(model)
    weight = weights(model, bases)
    for name, a, b, product in started(model, bases, "minor_singular"):
        u, s, vh = np.linalg.svd(weight[name].numpy(), full_matrices=False)
        best = (u[:, :-R] * s[:-R]) @ vh[:-R]
        assert_near(weight[name] - product, torch.from_numpy(best), dtype=torch.float32)
        assert_near(a @ a.T, ALPHA / R * ALPHA / R * b.T @ b, dtype=torch.float32)


def test_corda_matches_peft(model: PreTrainedModel) -> None:
    """PEFT's preprocessing on one sequence, whose scale drops out of the product."""
    _, task = measured(model)
    ids = torch.randint(3, 50, (1, 200), generator=torch.Generator().manual_seed(1))
    one = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pre = second_moments(model, task.groups, [one])
    bases = solve(pre, task, tau=0.01)  # PEFT's damping
    before = model(IDS).logits
    ours = {name: product for name, _, _, product in started(_copy(model), bases, "corda")}
    config = LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        init_lora_weights="corda",
        target_modules=list(ours),
        fan_in_fan_out=all(_is_conv(model, name) for name in ours),
        corda_config=CordaConfig(corda_method="kpm"),
    )
    preprocess_corda(model, config, run_model=lambda: model(**one))
    theirs = get_peft_model(model, config)
    assert_near(theirs(IDS).logits, before, roundings=1e4)
    for name, product in ours.items():
        layer = theirs.get_base_model().get_submodule(name)
        delta = layer.get_delta_weight("default").double()
        delta = delta.T if _is_conv(_copy(model), name) else delta
        assert_near(product, delta, roundings=1e4, dtype=torch.float32)


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    return make_llama() if model.config.model_type == "llama" else make_gpt2()


def test_lora_null_projects_the_weight_on_the_null_space(model: PreTrainedModel) -> None:
    bases = solved(model)
    weight = weights(model, bases)
    null = {name: b.null_basis.double() for b in bases for name in b.group.layers}  # type: ignore[union-attr]
    balanced = {name: (a, b, p) for name, a, b, p in started(_copy(model), bases, "lora_null")}
    for name, _, _, product in started(model, bases, "null_space"):
        expected = weight[name] @ null[name] @ null[name].T
        assert_near(product, expected, dtype=torch.float32)
        a, b, theirs = balanced[name]
        assert_near(theirs, expected, dtype=torch.float32)
        assert_near(a @ a.T, (ALPHA / R) ** 2 * b.T @ b, dtype=torch.float32)


def test_zero_initializations_have_b_zero_and_orthonormal_a(model: PreTrainedModel) -> None:
    bases = solved(model)
    for init in ("null_space_zero", "eigen"):
        for _, a, b, _ in started(_copy(model), bases, init):
            assert not b.any()
            assert_near(a @ a.T, torch.eye(R), dtype=torch.float32)


def stepped(
    model: PreTrainedModel, bases: Sequence[GroupBasis], config: FoLoraConfig, steps: int
) -> Any:
    """A prepared model after AdamW or SAdam steps on a fixed batch."""
    task = folora.data.rows.TaskData([folora.data.rows.Example([1, 3, 4], [-100, 3, 4])], [])
    prepared = assemble(model, bases, task, CalibrationSet([[1, 3, 4, 5]], [[1, 5, 6, 7]]), config)
    prepared.model.train()
    for _ in range(steps):
        prepared.optimizer.zero_grad()
        prepared.model(IDS, labels=IDS).loss.backward()
        prepared.optimizer.step()
    return prepared


def test_oplora_updates_stay_orthogonal_to_the_leading_singular_spaces_under_adamw(
    model: PreTrainedModel,
) -> None:
    bases = solved(model)
    weight = weights(model, bases)
    config = tiny_config().changed({"method": "oplora"})
    prepared = stepped(model, bases, config, 20)
    for name, (a, b, scaling) in lora_factors(prepared.model).items():
        delta = scaling * b.double() @ a.double()
        u, _, vh = np.linalg.svd(weight[name].numpy(), full_matrices=False)
        size = float(delta.norm())
        assert size > 1e-2
        assert np.abs(u[:, :4].T @ delta.numpy()).max() < 1e-5 * size
        assert np.abs(delta.numpy() @ vh[:4].T).max() < 1e-5 * size
        # so the leading singular triples of the adapted weight are the base's
        after = (weight[name] + delta).numpy()
        for i in range(4):
            singular = np.linalg.norm(weight[name].numpy() @ vh[i])
            assert np.linalg.norm(after @ vh[i] - singular * u[:, i]) < 1e-5 * singular
    merged = prepared.model(IDS).logits
    with torch.no_grad():
        again = prepared.model.merge_and_unload()(IDS).logits
    assert_near(merged, again)


def test_pefts_osf_under_adam_leaves_the_subspace_that_oplora_keeps() -> None:
    """OSF projects gradients; Adam then rescales them out of the subspace. Ours projects the update."""
    model = make_llama()
    layers = target_layers(model, "all-linear")
    base = {name: model.get_submodule(name).weight.detach().clone().double() for name in layers}
    osf = get_peft_model(model, OSFConfig(target_modules=list(layers), effective_rank=4))
    trained = [p for p in osf.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        osf(IDS, labels=IDS).loss.backward()
        optimizer.step()
    leaks = []
    for name, weight in base.items():
        delta = osf.get_base_model().get_submodule(name).get_delta_weight("default").detach()
        u, _, vh = torch.linalg.svd(weight)
        touched = torch.cat([(u[:, :4].T @ delta.double()).flatten(),
                             (delta.double() @ vh[:4].T).flatten()])  # fmt: skip
        leaks.append(float(touched.norm() / delta.norm()))
    assert min(leaks) > 0.02
    assert 0.05 < sum(leaks) / len(leaks) < 0.6


def test_oplora_refuses_more_directions_than_there_are() -> None:
    model = make_llama()
    with pytest.raises(NumericsError, match=r"protect is 33.*\[1, "):
        attach(model, solved(model), LoraConfig(r=R), protect=33)


@pytest.mark.parametrize("name", ["lora-null-v2", "eigen-frozen"])
def test_frozen_a_stays_and_b_trains(name: str) -> None:
    model = make_llama()
    bases = solved(model)
    config = tiny_config().changed({"method": name})
    fresh = lora_factors(stepped(make_llama(), bases, config, 0).model)
    prepared = stepped(model, bases, config, 3)
    prepared.meter.read(prepared.model)  # PEFT would leave A trainable after this
    prepared.model(IDS, labels=IDS).loss.backward()
    for layer in prepared.model.modules():
        if hasattr(layer, "lora_A"):
            assert layer.lora_A["default"].weight.grad is None
    for layer_name, (a, b, _) in lora_factors(prepared.model).items():
        assert torch.equal(a, fresh[layer_name][0])
        assert not torch.equal(b, fresh[layer_name][1])


def test_closed_directions_stay_closed() -> None:
    """With k open directions A never leaves the span of T's first k columns, whatever Adam does."""
    model = make_llama()
    bases = solved(model)
    config = tiny_config().changed({"spectrum.directions": 6})
    prepared = stepped(model, bases, config, 20)
    fresh = lora_factors(stepped(make_llama(), bases, config, 0).model)
    by_layer = {name: b.basis.double()[:, :6] for b in bases for name in b.group.layers}
    for name, (a, _, _) in lora_factors(prepared.model).items():
        q = torch.linalg.qr(torch.nn.functional.normalize(by_layer[name], dim=0)).Q
        outside = a.double() - (a.double() @ q) @ q.T
        assert (a - fresh[name][0]).norm() > 1e-3
        assert outside.norm() < 1e-4 * a.norm()


def test_weight_decay_shrinks_by_rate_times_decay() -> None:
    model = make_llama()
    bases = solved(model)
    adapted = attach(model, bases, LoraConfig(r=R, lora_alpha=R), init="kaiming")
    optimizer = SAdam(param_groups(adapted, bases, lr=0.1, weight_decay=0.5, spectral=False))
    before = {n: a.clone() for n, (a, _, _) in lora_factors(adapted).items()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, (a, _, _) in lora_factors(adapted).items():
        assert_near(a, 0.95 * before[name], roundings=4)


@pytest.mark.parametrize("kind", sorted(BASES))
def test_every_basis_is_orthonormal_in_h_with_gamma_of_its_columns(kind: str) -> None:
    x, y = (torch.randn(200, 12, dtype=torch.float64) for _ in range(2))
    x, y = x * torch.logspace(0, 2, 12, dtype=torch.float64), y @ torch.randn(12, 12).double()
    pre, task = x.T @ x / 200, y.T @ y / 200
    tau = 1e-2
    h = (pre + tau * pre.diagonal().mean() * torch.eye(12).double()).numpy()
    found = BASES[kind](pre, task, tau=tau)
    t = found.basis.numpy()
    assert_near(
        found.basis.T @ torch.from_numpy(h) @ found.basis,
        torch.eye(12),
        dtype=torch.float64,
        roundings=1e6,
    )
    assert_near((found.basis.T @ task @ found.basis).diagonal(), found.gamma, roundings=1e6)
    assert (found.gamma.diff() <= 0).all()
    assert found.task_trace == pytest.approx(float(task.trace()))
    if kind == "whitening":
        root = np.linalg.inv(scipy.linalg.sqrtm(h))
        order = np.argsort(-np.diag(root.T @ task.numpy() @ root))
        assert_near(found.basis, torch.from_numpy(root[:, order]), roundings=1e6)
    if kind == "pretraining":
        unit = t / np.linalg.norm(t, axis=0)
        image = pre.numpy() @ unit
        assert_near(
            torch.from_numpy(image), torch.from_numpy(unit * (unit * image).sum(0)), roundings=1e6
        )
    if kind != "generalized":
        best = generalized_eigenbasis(pre, task, tau=tau)
        assert found.gamma[0] <= best.gamma[0] * (1 + 1e-9)
        assert found.diagonality > 0.01


def test_a_basis_without_a_ridge_is_refused() -> None:
    thin = torch.zeros(3, 3, dtype=torch.float64)
    thin[0, 0] = 1.0
    with pytest.raises(NumericsError, match="Raise tau"):
        BASES["whitening"](thin, torch.eye(3), tau=0.0)


def test_kl_and_its_masked_form_against_a_slow_reference() -> None:
    base, adapted = torch.randn(7, 11), torch.randn(7, 11)
    targets = torch.randint(11, (7,))
    for i in range(7):
        p, q = base[i].double().softmax(-1), adapted[i].double().softmax(-1)
        assert float(kl(base, adapted)[i]) == pytest.approx(
            float((p * (p / q).log()).sum()), rel=1e-4
        )
        rest = torch.arange(11) != targets[i]
        p, q = p[rest] / p[rest].sum(), q[rest] / q[rest].sum()
        expected = float((p * (p / q).log()).sum())
        assert float(masked_target_kl(base, adapted, targets)[i]) == pytest.approx(
            expected, rel=1e-4
        )
    raised = adapted.clone()
    raised[torch.arange(7), targets] += 3.0  # learning the target is free
    assert_near(masked_target_kl(base, raised, targets), masked_target_kl(base, adapted, targets))
    assert torch.isfinite(masked_target_kl(base, adapted.requires_grad_(), targets)).all()


def whole(name: str, **changes: Any) -> folora.Prepared:
    config = tiny_config().changed({"method": name, **changes})
    return folora.prepare(make_llama(), make_tokenizer(), rows(), config)


@pytest.mark.parametrize("name", ["lora-kl", "lora-masked-kl"])
def test_a_kl_penalty_keeps_the_model_close_to_its_base(tmp_path: Any, name: str) -> None:
    """Nothing at the first step; with a great weight the task is hardly learned, and less is moved."""
    free = whole("lora")
    weight = {"lora-kl": "kl_weight", "lora-masked-kl": "masked_kl_weight"}[name]
    share = {"anchor": 0.5} if name == "lora-kl" else {}
    held, strong = whole(name, **share), whole(name, **share, **{f"method.{weight}": 100.0})
    losses, readings = [], []
    for i, p in enumerate((free, held, strong)):
        trainer = train(p, make_tokenizer(), tmp_path / str(i))
        losses.append(trainer.state.log_history[0]["loss"])
        readings.append(p.meter.read(p.model))
    if name == "lora-kl":
        assert readings[2].kl < readings[1].kl < readings[0].kl
    else:
        assert readings[2] != readings[0]
    assert all(np.isfinite(losses))


def test_a_kl_penalty_is_added_once_a_step_under_gradient_accumulation(tmp_path: Any) -> None:
    p = whole("lora-masked-kl", **{"method.masked_kl_weight": 0.7})
    for layer in p.model.modules():
        if hasattr(layer, "lora_B"):
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    args = sft_config(p.config, tmp_path, evaluates=False, on_cpu=True)
    trainer = folora.FoLoraTrainer(p, args, make_tokenizer())
    batch = next(iter(trainer.get_train_dataloader()))
    tokens = (batch["labels"] != -100).sum()

    def loss(steps: int, weight: float) -> float:
        trainer.current_gradient_accumulation_steps = steps
        trainer.prepared = replace(p, config=p.config.changed({"method.masked_kl_weight": weight}))
        found = trainer.compute_loss(p.model, dict(batch), num_items_in_batch=tokens)
        return float(found.detach())

    p.model.train()
    plain = loss(1, 0.0)
    logits = p.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    with p.model.disable_adapter():
        base = p.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = batch["labels"][:, 1:] != -100
    divergence = (
        masked_target_kl(
            base[:, :-1][wanted], logits[:, :-1][wanted], batch["labels"][:, 1:][wanted]
        )
        .mean()
        .detach()
    )
    assert float(divergence) > 1e-3
    for steps in (1, 4):
        assert loss(steps, 0.7) - plain == pytest.approx(0.7 * float(divergence) / steps, rel=1e-3)
    p.model.eval()
    assert loss(1, 0.7) == pytest.approx(plain)  # an evaluation's loss is the task's alone


def test_replay_mixes_in_its_share_of_rows() -> None:
    p = whole("lora-replay")
    found = [row["input_ids"] for row in p.train_dataset()]
    replayed = [ids for ids in found if ids in p.samples.calibration]
    assert len(replayed) / len(found) == pytest.approx(0.1, abs=0.02)
    assert len(found) - len(replayed) == len(p.task.train)
    row = next(row for row in p.train_dataset() if row["input_ids"] in p.samples.calibration)
    assert row["labels"][1:] == row["input_ids"][1:]  # every token of a sample bears loss


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_a_config_that_differs_from_the_default(name: str) -> None:
    config = FoLoraConfig().changed({"method": name, "seed": 3})
    assert config.seed == config.training_seed == 3
    assert (config.changed({"seed": 0}) == FoLoraConfig()) == (name == "folora")
    assert FoLoraConfig().changed(config.differences()) == config


def test_an_unknown_method_suggests_a_known_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'oplora'"):
        FoLoraConfig(method="oplra")
