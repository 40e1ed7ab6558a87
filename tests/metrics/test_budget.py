"""The scale of an adapter at which its KL is within a budget, and the confidence of that."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora import LoraLayer
from scipy import stats

import folora
from benchmarks.tiny import make_llama, make_tokenizer, rows, tiny_config
from folora.adapters.adapter import lora_factors
from folora.errors import ConfigError, DataError
from folora.metrics.budget import (
    CLOSE,
    CONFIDENCE,
    ENOUGH,
    FEWEST,
    FIRST,
    MOST_READINGS,
    SECOND,
    Bound,
    ByScale,
    _student,
    bound,
    kl_by_scale,
    kl_for_budget,
    largest_scale,
)
from folora.metrics.kl import kl, top_k, top_k_kl
from folora.metrics.meter import by_source
from folora.runtime.contexts import without_adapter
from folora.training.prepared import assemble


@pytest.mark.parametrize("vocabulary", [11, 300])
@pytest.mark.parametrize("k", [1, 8, 300])
def test_kl_on_listed_tokens_is_the_coarse_grained_kl(vocabulary: int, k: int) -> None:
    base, adapted = 2 * torch.randn(6, vocabulary), 2 * torch.randn(6, vocabulary)
    listed = top_k(base, k)
    p, q = base.double().softmax(-1), adapted.double().softmax(-1)
    for i in range(6):
        ids = listed.ids[i]
        ps, qs = p[i, ids], q[i, ids]
        if k < vocabulary:
            ps, qs = torch.cat([ps, (1 - ps.sum())[None]]), torch.cat([qs, (1 - qs.sum())[None]])
        wanted = float((ps * (ps / qs).log()).sum())
        assert float(top_k_kl(listed, adapted)[i]) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    exact = kl(base, adapted)
    assert (top_k_kl(listed, adapted) <= exact + 1e-5).all()
    if k >= vocabulary:
        torch.testing.assert_close(top_k_kl(listed, adapted), exact, rtol=1e-4, atol=1e-5)


def test_kl_on_listed_tokens_has_a_finite_gradient_where_the_rest_has_no_probability() -> None:
    base = torch.zeros(2, 64)
    base[:, 0] = 200.0
    adapted = base.clone().requires_grad_()
    top_k_kl(top_k(base, 4), adapted).sum().backward()
    assert adapted.grad is not None and torch.isfinite(adapted.grad).all()


@pytest.mark.parametrize("freedom", [3, 15, 99, 1000])
def test_students_quantile_agrees_with_scipy(freedom: int) -> None:
    assert _student(0.95, freedom) == pytest.approx(stats.t.ppf(0.95, freedom), rel=0.02)


def test_the_upper_bound_covers_the_true_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(2000):
        lengths = torch.randint(20, 60, (24,), generator=generator)
        level = torch.empty(24).log_normal_(0.0, 0.5, generator=generator)
        found = bound((level * lengths).tolist(), lengths.tolist())
        covered += found.upper >= math.exp(0.125)
    assert 0.90 <= covered / 2000 <= 0.97  # lognormal means are skewed: a little below .95


def test_equal_sequences_have_no_interval() -> None:
    found = bound([2.0, 1.0], [20, 10])
    assert found.mean == pytest.approx(0.1) and found.upper == pytest.approx(0.1)
    assert bound([math.nan, 1.0], [2, 2]).upper == math.inf


def test_two_bounds_err_no_more_often_than_one_at_their_level() -> None:
    """With a budget just below the true mean, which is the hardest."""
    generator = torch.Generator().manual_seed(0)
    wrong = once = 0
    for _ in range(1000):
        sums = torch.empty(ENOUGH).log_normal_(0.0, 0.5, generator=generator).tolist()
        first = bound(sums[:FEWEST], [1] * FEWEST, FIRST)
        second = bound(sums, [1] * ENOUGH, SECOND)
        wrong += min(first.upper, second.upper) < math.exp(0.125)
        once += bound(sums[:FEWEST], [1] * FEWEST).upper < math.exp(0.125)
    assert pytest.approx(1 - CONFIDENCE) == (1 - FIRST) + (1 - SECOND)
    assert 20 <= wrong <= once + 20  # more than 50 of both, as lognormal means are skewed


@pytest.mark.parametrize("found", [{}, {"": [[1, 5, 6, 7]] * 40}])
def test_more_text_is_asked_for_only_where_the_budget_may_bind(
    moved: folora.Prepared, found: dict[str, list[list[int]]]
) -> None:
    asked: list[bool] = []

    def more() -> dict[str, list[list[int]]]:
        asked.append(adapter_is_off(moved.model))
        return found

    texts = moved.samples.held_out
    assert kl_for_budget(moved.model, texts, 100.0, more)[1.0].sequences == len(texts)
    assert asked == []
    kl = kl_for_budget(moved.model, texts, 0.01, more)
    assert asked == [True] and kl[1.0].sequences == len(texts) + len(found.get("", []))
    if not found:  # one look after all
        assert kl[1.0] == kl_by_scale(moved.model, texts)[1.0]


def adapter_is_off(model: torch.nn.Module) -> bool:
    return all(m.disable_adapters for m in model.modules() if isinstance(m, LoraLayer))


def squares(level: float, power: float = 2.0) -> Callable[[float], Bound]:
    return lambda s: Bound(level * s**power, 1.3 * level * s**power)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("level", [0.001, 0.05, 3.0, 1e4])
def test_the_largest_scale_uses_the_budget_and_keeps_it(level: float, power: float) -> None:
    asked: list[float] = []

    def at(scale: float) -> Bound:
        asked.append(scale)
        return squares(level, power)(scale)

    fit = largest_scale(ByScale(at), 0.02)
    assert fit.kept.upper <= 0.02
    assert fit.scale == 1 or fit.kept.upper >= CLOSE * 0.02
    assert fit.readings == len(asked) <= MOST_READINGS
    assert fit.trained == at(1.0)


def test_an_adapter_that_is_not_finite_until_it_is_small_is_scaled_down() -> None:
    def at(scale: float) -> Bound:
        return squares(1.0)(scale) if scale < 0.3 else Bound(math.nan, math.inf)

    fit = largest_scale(ByScale(at), 0.01)
    assert 0 < fit.scale < 0.3 and fit.kept.upper <= 0.01


def test_a_kl_that_jumps_from_zero_is_found_by_bisection() -> None:
    """As of an adapter whose small updates are rounded away in bf16."""
    fit = largest_scale(ByScale(lambda s: Bound(0.0, 0.0) if s < 0.4 else Bound(1.0, 1.0)), 0.01)
    assert 0.35 < fit.scale < 0.4


def test_a_budget_that_no_scale_keeps_gives_scale_zero() -> None:
    fit = largest_scale(ByScale(lambda scale: Bound(1.0, 1.0)), 0.01)
    assert fit.scale == 0.0 and fit.kept == Bound(0.0, 0.0)


@pytest.fixture
def moved() -> folora.Prepared:
    """A tiny model whose adapter changes its distributions much."""
    p = folora.prepare(make_llama(), make_tokenizer(), rows(), tiny_config(budget=0.01))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in p.model.named_parameters():
            if "lora_B" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return p


def test_the_kl_of_a_fit_is_the_meters_and_falls_with_the_scale(moved: folora.Prepared) -> None:
    at = kl_by_scale(moved.model, moved.samples.held_out)
    assert at[1.0].mean == pytest.approx(moved.meter.read(moved.model).kl, rel=1e-5)
    assert at[0.0].mean == pytest.approx(0.0, abs=1e-6)
    assert at[0.25].mean < at[0.5].mean < at[1.0].mean


def test_an_export_with_a_budget_is_within_it(moved: folora.Prepared, tmp_path: object) -> None:
    from peft import PeftModel

    before = {name: s for name, (_, _, s) in lora_factors(moved.model).items()}
    assert moved.meter.read(moved.model).kl > 0.02
    fits = moved.budget_fits()
    assert [fit.budget for fit in fits] == [0.01, 0.005, 0.02]
    assert fits[1].scale < fits[0].scale < fits[2].scale < 1
    with pytest.raises(ConfigError, match="truncated to rank 2"):
        moved.export(f"{tmp_path}/adapter", rank=2)
    moved.export(f"{tmp_path}/adapter")
    loaded = PeftModel.from_pretrained(make_llama(), f"{tmp_path}/adapter")
    assert moved.more is not None
    with without_adapter(moved.model):
        texts = {"": [*moved.samples.held_out, *by_source(moved.more())["bos"]]}
    found = kl_by_scale(loaded, texts)[1.0]
    assert found.mean == pytest.approx(fits[0].kept.mean, rel=1e-3) and found.upper < 0.01
    assert found.sequences == fits[0].kept.sequences == ENOUGH
    assert found.mean > 0.8 * 0.01
    other = folora.sample(
        make_llama(), make_tokenizer(), moved.config.sampling.replace(num_sequences=200), seed=9
    )
    assert 0.007 < kl_by_scale(loaded, other.calibration)[1.0].mean < 0.01
    task_loss = moved.meter.task_loss(loaded)
    assert task_loss == pytest.approx(fits[0].task_loss, rel=1e-3)
    for name, (_, _, scaling) in lora_factors(moved.model).items():
        assert scaling == pytest.approx(before[name] * fits[0].scale)


def test_few_sequences_are_refused_before_training() -> None:
    p = folora.prepare(make_llama(), make_tokenizer(), rows(), tiny_config())
    with pytest.raises(DataError, match="at least 16 held-out sequences"):
        folora.fit_budget(p.model, p.samples.held_out[:15], 0.01)
    few = replace(p.samples, held_out=p.samples.held_out[:15])
    with pytest.raises(DataError, match="at least 16 held-out sequences"):
        assemble(make_llama(), p.bases, p.task, few, tiny_config(budget=0.01))


def test_an_anchor_without_a_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"anchor is 0\.1, but its KL has no weight"):
        tiny_config(anchor=0.1)
    assert tiny_config(budget=0.01).anchor_share == 0.08
    assert tiny_config(budget=0.01, anchor=0.0).anchor_share == 0
