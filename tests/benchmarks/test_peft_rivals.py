"""BD-LoRA and OFT in a comparison are PEFT's, and their readings are those of the true change of the weights."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig
from support.closeness import assert_near
from torch import Tensor, nn

import benchmarks.rivals
from benchmarks.plan import Plan
from benchmarks.rivals import RIVALS, block_size
from benchmarks.tiny import make_gpt2, make_llama, tiny_config, tiny_task
from folora.calibration.inputs import find_groups, target_layers
from folora.compare.arms import Arm
from folora.compare.comparison import Comparison
from folora.compare.rivals import Rival
from folora.config import FoLoraConfig
from folora.errors import ConfigError
from folora.pipeline.run import Run
from folora.spectral.layers import GroupBasis

IDS = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(5))
RATE = {"training.learning_rate": 1e-2}
BD_LORA, OFT = RIVALS
PLANS = Path(__file__).parents[2] / "benchmarks" / "plans"


def linears(model: nn.Module) -> dict[str, Tensor]:
    """W (d_out, d_in) of every linear layer but the output layer, in float64."""
    return {
        name: module.weight.detach().double()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def changes(adapted: Any, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """What merging the adapter by PEFT changes of every weight, in float64."""
    merged = linears(deepcopy(adapted).merge_and_unload())
    return {name: merged[name] - weight for name, weight in before.items()}


def adapted_by(rival: Rival, config: FoLoraConfig) -> Any:
    """The rival on all linear layers of the tiny model."""
    model = make_llama()
    groups = find_groups(model, target_layers(model, "all-linear"), {"input_ids": IDS})
    bases = [GroupBasis(g, torch.eye(g.d_in), torch.ones(g.d_in), 1.0) for g in groups]
    return rival.kind.adapt(model, bases, config)[0]


def moved(rival: Rival, config: FoLoraConfig) -> Any:
    """The rival on the tiny model, with random values in all that is trained."""
    adapted = adapted_by(rival, config)
    torch.manual_seed(1)
    for p in adapted.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return adapted


def in_two_blocks(factor: Tensor) -> bool:
    """Whether all outside of two equal blocks is zero, and the blocks are not."""
    (a, b), (c, d) = (half.chunk(2, dim=1) for half in factor.chunk(2))
    return bool(a.all() and d.all() and not b.any() and not c.any())


def test_bd_lora_is_that_of_pefts_own_comparison() -> None:
    """Whose lists of modules are the other way round than the examples in PEFT's descriptions of them."""
    config = tiny_config(adapter={"r": 4, "alpha": 8})
    own = adapted_by(BD_LORA, config)
    assert torch.equal(own(IDS).logits, make_llama()(IDS).logits)
    blocks = BdLoraConfig(
        target_modules_bd_a=["o_proj", "down_proj"],
        target_modules_bd_b=["q_proj", "v_proj", "k_proj", "up_proj", "gate_proj"],
        nblocks=2,
    )
    model = make_llama()
    torch.manual_seed(config.training_seed)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_bdlora=blocks)
    theirs = get_peft_model(model, lora).state_dict()
    assert all(torch.equal(p, theirs[name]) for name, p in own.state_dict().items())

    adapted = moved(BD_LORA, config)
    before, factors = linears(make_llama()), BD_LORA.kind.factors(adapted)
    assert factors.keys() == before.keys()
    for name, change in changes(adapted, before).items():
        a, b, kappa = factors[name]
        assert kappa == 2
        assert_near(kappa * b.double() @ a.double(), change, dtype=torch.float32)
        of_a = name.endswith(("o_proj", "down_proj"))
        assert (in_two_blocks(a), in_two_blocks(b)) == (of_a, not of_a)


def test_oft_rotates_every_input_in_blocks_and_a_part_of_it_is_a_rotation_too() -> None:
    config = tiny_config(adapter={"r": 2})
    before = linears(make_llama())
    adapted = moved(OFT, config)
    trained = [p.detach().clone() for p in adapted.parameters() if p.requires_grad]
    outputs = adapted(IDS).logits
    for scale in (1.0, 0.5, 0.0):
        with OFT.kind.scaled(adapted, scale):
            for name, change in changes(adapted, before).items():
                a, b, kappa = OFT.kind.factors(adapted)[name]
                # PEFT rounds R and W R' to float32.
                assert_near(kappa * b.double() @ a, change, dtype=torch.float32)
                rotation = a.T + torch.eye(len(a))
                assert_near(rotation @ rotation.T, torch.eye(len(a)), dtype=torch.float32)
                assert torch.linalg.det(rotation) > 0
                width = block_size(config)
                inside = torch.block_diag(*[torch.ones(width, width)] * (len(a) // width))
                assert torch.equal(rotation * inside, rotation)
                assert bool(a.any()) == (scale > 0)
    assert torch.equal(adapted(IDS).logits, outputs)
    left = [p for p in adapted.parameters() if p.requires_grad]
    assert all(map(torch.equal, left, trained))


@pytest.fixture(scope="module")
def run(model_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("rivals") / "run"
    paths = {"model": str(model_folder), "dataset": str(rows_file), "output": str(folder)}
    return Run(tiny_config(**paths))


def comparison(run: Run, file: Path, **options: Any) -> Comparison:
    rest: dict[str, Any] = {"stage": "tiny", "task": "sums", "command": "pytest", "rivals": RIVALS}
    return Comparison(run, file, **{**rest, **options})


def test_readings_are_those_of_the_true_change_of_the_weights(run: Run, tmp_path: Path) -> None:
    before, seen = linears(run.context.model), []
    logits = run.context.model(IDS).logits

    def score(model: Any) -> dict[str, dict[str, float]]:
        seen.append(changes(model, before))
        return {"task": {}, "kept": {}}

    asked = {"score": score, "read_at": (1.0,), "scales": (0.5,)}
    anchored = {"method.kl_weight": 10.0, "anchor": 0.3}
    chosen = [
        *(Arm(name, RATE) for name in ("bd-lora", "oft")),
        Arm("oft", {**RATE, **anchored}),
        Arm("bd-lora", {**RATE, "budget": 0.002}),
    ]
    file = tmp_path / "arms.jsonl"
    results = list(comparison(run, file, **asked).run_all(chosen))
    assert torch.equal(run.context.model(IDS).logits, logits)
    assert not any("lora" in n or "oft" in n for n, _ in run.context.model.named_parameters())

    keep, tau = run.share().keep.load(), run.config.spectrum.tau
    metric = {
        name: c.double() + tau * c.double().diag().mean() * torch.eye(len(c))
        for group in keep.groups
        for c in (keep.matrices[group.name],)
        for name in group.layers
    }
    readings = [reading for result in results for reading in result["readings"]]
    assert not any(change.any() for change in seen[0].values())  # of the base
    assert [r.get("scale", 1) for r in readings[:4]] == [1, 0.5, 1, 0.5] and len(readings) == 9
    for reading, change in zip(readings, seen[1:], strict=True):
        squares = [float((c @ h * c).sum()) for c, h in ((c, metric[n]) for n, c in change.items())]
        assert reading["h_norm"] == pytest.approx(sum(squares) ** 0.5, rel=1e-3)
        whole = sum(float(c.square().sum()) for c in change.values()) ** 0.5
        assert reading["frobenius"] == pytest.approx(whole, rel=1e-4)

    for result in results:
        assert result["base"]["kl"] == 0.0 and not result["diverged"]
        assert result["readings"][0]["task_loss"] < result["base"]["task_loss"]
        assert result["readings"][0]["kl"] > result["readings"][1]["kl"] > 0
        assert FoLoraConfig().changed(result["config"]).method.title == result["title"]
    plain, oft, kept, within = results
    assert oft["title"] == "OFT" and oft["name"] == "oft--learning_rate=0.01"
    assert plain["tokens"] == oft["tokens"]
    assert plain["tokens"]["task"] > 0 == plain["tokens"]["anchor"] == plain["tokens"]["setup"]
    assert kept["tokens"]["anchor"] > 0
    assert kept["readings"][0]["kl"] < 0.9 * oft["readings"][0]["kl"]
    assert within["readings"][-1]["kl"] <= 0.002 < within["readings"][0]["kl"]

    # Arms with a result are skipped.
    seen.clear()
    assert list(comparison(run, file, **asked).run_all(chosen)) == results and not seen


class OldLoraConfig(make_dataclass("OldLoraConfig", ["r"])):  # type: ignore[misc]
    """Of a PEFT before 0.19."""


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        (Arm("bd-lora", {"adapter.r": 3}), r"bd-lora: adapter\.r is 3, but must be a multiple of 2"),
        (Arm("oft", {"adapter.r": 3}), r"oft: adapter\.r is 3, for blocks of 12, but the width"),
        (Arm("oft", {"adapter.alpha": 8}), r"adapter\.alpha is 8.*, but oft has no such scale"),
        (Arm("oft", {"method.freeze_a": True}), r"method\.freeze_a is True, but oft has an adapter"),
        (Arm("bd-lora", {"method.init": "eigen"}), r"method\.init is 'eigen', but bd-lora has"),
        (Arm("bd-lorra"), "unknown method 'bd-lorra'"),
    ],
)  # fmt: skip
def test_what_a_rival_cannot_honour_is_refused_before_sampling(
    run: Run, tmp_path: Path, arm: Arm, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        comparison(run, tmp_path / "arms.jsonl").check([Arm("lora"), arm])


def test_an_older_peft_is_refused_by_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without BD-LoRA; OFT is in all supported versions."""
    monkeypatch.setattr(benchmarks.rivals, "LoraConfig", OldLoraConfig)
    monkeypatch.setattr(peft, "__version__", "0.17.1")
    here = comparison(run, tmp_path / "arms.jsonl")
    with pytest.raises(ConfigError, match=r"bd-lora needs PEFT 0\.19 or later, but 0\.17\.1 is"):
        here.check([Arm("oft"), Arm("bd-lora")])
    here.check([Arm("oft")])


def test_layers_that_neither_list_names_are_refused() -> None:
    model, config = make_gpt2(), tiny_config()
    with pytest.raises(
        ConfigError, match=r"bd-lora cannot adapt transformer\.h\.0\.attn\.c_attn: the tensor"
    ):
        BD_LORA.check(model, ["transformer.h.0.attn.c_attn"], config)
    with pytest.raises(ConfigError, match=r"oft cannot adapt .*, a Conv1D: it must be"):
        OFT.check(model, ["transformer.h.0.attn.c_attn"], config)


def test_a_comparison_without_rivals_has_no_such_method(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown method 'oft'"):
        comparison(run, tmp_path / "arms.jsonl", rivals=()).check([Arm("oft")])


@pytest.mark.parametrize("name", ["world_budget", "smollm2_severe_rivals"])
def test_plans_have_both_rivals(name: str) -> None:
    chosen = Plan.load(PLANS / f"{name}.yaml").arms(["bd-lora", "oft"])
    assert {arm.method for arm in chosen} == {"bd-lora", "oft"}


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.method.name)
def test_the_config_of_an_arm_is_refused_by_a_run(rival: Rival, tmp_path: Path) -> None:
    """It would train LoRA under the rival's title."""
    config = tiny_task(tmp_path)
    arm = Comparison(
        Run(config), tmp_path / "arms.jsonl", stage="tiny", task="s", command="", rivals=RIVALS
    ).config(Arm(rival.method.name))
    file = tmp_path / "arm.yaml"
    file.write_text(arm.to_yaml())
    with pytest.raises(ConfigError, match=f"{rival.method.name} has an adapter that only the"):
        Run(FoLoraConfig.from_yaml(file)).run()
    assert not Path(str(config.output)).exists()
