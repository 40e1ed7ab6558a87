"""Second moments against a float64 reference; shared inputs are detected; hooks are always removed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.closeness import assert_near
from torch import nn
from transformers import PreTrainedModel

from benchmarks.tiny import make_gpt2, make_llama
from folora.calibration.inputs import find_groups, linear_dims, target_layers
from folora.calibration.moments import add_upper_gram, passes, second_moments
from folora.data.rows import batches, text_examples
from folora.errors import ConfigError, DataError, NumericsError
from folora.runtime.finiteness import check_finite_weights
from folora.spectral.groups import InputGroup


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def probe() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3).long()}


def groups_of(model: PreTrainedModel) -> Any:
    return find_groups(model, target_layers(model, "all-linear"), probe())


def reference(model: PreTrainedModel, name: str, rows: list[list[int]]) -> torch.Tensor:
    """Mean outer product over all tokens, one unpadded sequence at a time, in float64."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().double().reshape(-1, args[0].shape[-1]))
    )
    for row in rows:
        model(torch.tensor([row]))
    handle.remove()
    x = torch.cat(seen)
    return x.T @ x / len(x)


ROWS = [[1, *range(4, 4 + n)] for n in (3, 11, 7, 2, 19)]


def test_moments_match_the_reference_with_padding(model: PreTrainedModel) -> None:
    groups = groups_of(model)
    found = second_moments(model, groups, batches(text_examples(ROWS), 3))
    assert found.tokens == sum(map(len, ROWS))
    assert hooks(model) == 0
    for group in groups:
        matrix = found.matrices[group.name]
        assert matrix.shape == (group.d_in, group.d_in)
        assert matrix.dtype == torch.float32
        for layer in group.layers:  # inputs in a group are identical
            expected = reference(model, layer, ROWS)
            assert_near(matrix, expected)


def test_logits_are_computed_for_the_last_token_only(model: PreTrainedModel) -> None:
    seen: list[int] = []
    head = model.get_output_embeddings()
    assert head is not None
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    second_moments(model, groups_of(model), batches(text_examples(ROWS), 2))
    handle.remove()
    assert seen[-3:] == [1, 1, 1]  # the last token of each row


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 700))
def test_passes_cover_all_groups_in_order_and_fit_the_memory(widths: list[int], room: int) -> None:
    groups = [InputGroup((f"layer{i}",), d) for i, d in enumerate(widths)]
    parts = passes(groups, room)
    assert [g for part in parts for g in part] == groups
    sizes = [[4 * g.d_in**2 for g in part] for part in parts]
    assert all(sum(s) <= room or len(s) == 1 for s in sizes)
    # No pass has room for the next group.
    assert all(sum(a) + b[0] > room for a, b in itertools.pairwise(sizes))
    assert passes(groups, float("inf")) == [groups]


@pytest.mark.parametrize("d", [1, 3, 4, 7, 64])
def test_the_upper_triangle_of_a_gram_matrix_suffices(d: int) -> None:
    x, y = torch.randn(5, d, dtype=torch.float64), torch.randn(3, d, dtype=torch.float64)
    total = torch.zeros(d, d, dtype=torch.float64)
    add_upper_gram(total, x)
    add_upper_gram(total, y)
    assert_near(total.triu(), (x.T @ x + y.T @ y).triu())


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batching_does_not_change_moments(batch_size: int) -> None:
    model = make_llama()
    groups = groups_of(model)
    a = second_moments(model, groups, batches(text_examples(ROWS), 4))
    b = second_moments(model, groups, batches(text_examples(ROWS), batch_size, pad_id=7))
    for name, matrix in a.matrices.items():
        assert_near(matrix, b.matrices[name])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_halves_hold_every_other_sequence(batch_size: int) -> None:
    """Longest sequences come first at any batch size; halves do not change the bits of the full moments."""
    model = make_llama()
    groups = groups_of(model)
    asked = batches(text_examples(ROWS), batch_size)
    found = second_moments(model, groups, asked, apart=groups[1:3])
    alone = second_moments(model, groups, batches(text_examples(ROWS), batch_size))
    assert (alone.halves, alone.tokens) == ((), found.tokens)
    for name, matrix in alone.matrices.items():
        assert torch.equal(matrix, found.matrices[name])
    ordered = sorted(ROWS, key=len, reverse=True)
    for half, rows in zip(found.halves, (ordered[::2], ordered[1::2]), strict=True):
        assert half.tokens == sum(map(len, rows))
        assert list(half.matrices) == [group.name for group in groups[1:3]]
        for name, matrix in half.matrices.items():
            expected = reference(model, name, rows)
            assert_near(matrix, expected)


def test_packed_rows_count_every_token() -> None:
    """One packed row with restarting position_ids equals separate sequences."""
    model = make_llama()
    groups = groups_of(model)
    flat = torch.tensor([[t for row in ROWS for t in row]])
    positions = torch.tensor([[i for row in ROWS for i in range(len(row))]])
    found = second_moments(model, groups, [{"input_ids": flat, "position_ids": positions}])
    assert found.tokens == flat.numel()
    for group in groups:
        expected = reference(model, group.name, ROWS)
        assert_near(found.matrices[group.name], expected)


def test_shared_inputs_are_detected_during_a_forward_pass() -> None:
    llama = [[n.rsplit(".", 1)[-1] for n in g.layers] for g in groups_of(make_llama())]
    block = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert llama == block * 2
    gpt2 = groups_of(make_gpt2())
    assert len(gpt2) == 8
    assert [g.d_in for g in gpt2[:4]] == [32, 32, 32, 128]


class Inplace(nn.Module):
    """Two layers with the same input tensor, which is modified in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = torch.nn.functional.one_hot(input_ids, 4).float()
        y = self.a(x)
        x.add_(1)
        return y + self.b(x) + self.c(x)


def test_a_tensor_modified_in_place_is_not_shared() -> None:
    model = Inplace()
    layers = dict.fromkeys("abc", (4, 4))
    found = find_groups(model, layers, {"input_ids": torch.tensor([[1, 2]])})  # type: ignore[arg-type]
    assert [g.layers for g in found] == [("a",), ("b", "c")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_half_precision_models_are_float32(dtype: torch.dtype) -> None:
    model = make_llama().to(dtype)
    groups = groups_of(model)
    found = second_moments(model, groups, batches(text_examples(ROWS), 2))
    expected = reference(make_llama(), groups[0].name, ROWS)
    assert found.matrices[groups[0].name].dtype == torch.float32
    error = (found.matrices[groups[0].name].double() - expected).abs().max()
    assert error < 0.05 * expected.abs().max()


def test_hooks_are_removed_after_an_exception() -> None:
    model = make_llama()
    groups = groups_of(model)

    def bad_batches() -> Any:
        yield probe()
        raise KeyboardInterrupt

    model.train()
    with pytest.raises(KeyboardInterrupt):
        second_moments(model, groups, bad_batches())
    assert hooks(model) == 0
    assert model.training


def test_nan_inputs_are_reported_with_the_layer_named() -> None:
    model = make_llama()
    groups = groups_of(model)
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"layers\.1\.self_attn\.o_proj"):
        second_moments(model, groups, [probe()])
    with pytest.raises(NumericsError, match=r"layers\.1\.self_attn\.v_proj"):
        check_finite_weights(model)


def test_no_tokens_to_measure_is_an_error() -> None:
    model = make_llama()
    groups = groups_of(model)
    with pytest.raises(DataError, match="no tokens"):
        second_moments(model, groups, [])
    masked = {**probe(), "attention_mask": torch.zeros(1, 3).long()}
    with pytest.raises(DataError, match="no tokens"):
        second_moments(model, groups, [masked])


def test_target_layers_are_resolved() -> None:
    model = make_llama()
    assert len(target_layers(model, "all-linear")) == 14
    assert "lm_head" not in target_layers(model, "all-linear")
    assert len(target_layers(model, ["q_proj", "v_proj"])) == 4
    assert list(target_layers(model, r".*layers\.0\.mlp\.down_proj").values()) == [(48, 32)]
    assert linear_dims(make_gpt2().transformer.h[0].mlp.c_fc) == (32, 128)
    with pytest.raises(ConfigError, match="did you mean 'q_proj'"):
        target_layers(model, ["q_prj"])
    with pytest.raises(ConfigError, match="matches no layer"):
        target_layers(model, "nothing.*")


def test_an_unused_layer_is_named() -> None:
    model = make_llama()
    model.unused = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="unused"):
        groups_of(model)
