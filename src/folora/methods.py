"""Fine-tuning methods: each a name and the ingredients that it is made of, as plain data.

A method is chosen by name (``--method lora``). Its ingredients are fields of `Method`; what it needs of
the user's options (such as the whole basis) stands in `Method.settings`, which an option given by the
user overrides. A new method is one entry in `METHODS`, plus a function in `adapters.initialization` if
it brings an initialization of its own.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from folora.errors import ConfigError, nearest

Init = Literal[
    "eigen", "null_space", "null_space_zero", "kaiming", "minor_singular", "corda", "lora_null"
]
"""Leading eigenvectors with B = 0; C_pre's null space with the paper's B, or with B = 0; LoRA's;
MiLoRA's; CorDA's; LoRA-Null's."""
Basis = Literal["generalized", "pretraining", "whitening"]
"""Eigenvectors of C_task v = gamma H v; of C_pre alone; H^(-1/2)."""
StepScale = Literal["task", "paper"]
"""Steps as long as AdamW's on the task's inputs, so that learning rates transfer from LoRA; or T as it is."""
Text = Literal["generated", "real"]
"""The calibration set; or text of the kind that pretraining had, which a comparison has to be given."""
Adapter = Literal["lora", "own"]
"""LoRA's pairs A, B; or another of PEFT's, which a comparison has to be given as a `compare.rivals.Rival`."""

Weight = Annotated[float, Field(ge=0)]
KL_WEIGHT = 10.0
"""Nats of task loss that a nat per token of KL is worth: on worlds 1 retains less at the same task accuracy, and 30 learns less."""


class Method(BaseModel):
    """What a fine-tuning method is made of.

    Attributes:
        name: How the option ``method`` calls it.
        title: How tables and plots call it.
        about: The paper, or what differs from another method.
        adapter: Kind of adapter.
        init: Initialization of A and B.
        basis: Basis in which A is stepped.
        step_scale: Scale of that basis.
        optimizer: ``"sadam"``, or ``"adamw"`` for plain LoRA training.
        constraint: ``"oplora"`` keeps the update off each weight's leading singular directions.
        protect: Number of singular directions that OPLoRA protects; None for ``adapter.r``.
        freeze_a: Train B alone.
        replay: Share of the training rows that are text to retain.
        replay_text: Which text that is.
        kl_weight: Weight of KL(base || adapted) on generated text, added to the loss.
        max_perplexity: Response tokens of a higher perplexity under the base bear no loss.
        masked_kl_weight: Weight of that KL on the task without the target token (Mask-the-Target).
        settings: Options by dotted name that the method changes the defaults of.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    title: str
    about: str
    adapter: Adapter = "lora"
    init: Init = "eigen"
    basis: Basis = "generalized"
    step_scale: StepScale = "task"
    optimizer: Literal["sadam", "adamw"] = "sadam"
    constraint: Literal["none", "oplora"] = "none"
    protect: Annotated[int, Field(ge=1)] | None = None
    freeze_a: bool = False
    replay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    replay_text: Text = "generated"
    kl_weight: Weight = 0.0
    masked_kl_weight: Weight = 0.0
    max_perplexity: Annotated[float, Field(ge=1)] | None = None
    settings: dict[str, Any] = {}


_LORA: dict[str, Any] = {"optimizer": "adamw", "init": "kaiming"}
_WHOLE: dict[str, Any] = {"spectrum.directions": "all"}


def _method(name: str, title: str, about: str, **ingredients: Any) -> Method:
    return Method(name=name, title=title, about=about, **ingredients)


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        _method("folora", "folora", "the defaults of this library"),
        _method("folora-null", "folora, null-space init", "the paper's initialization, at our step scale",
                init="null_space", settings=_WHOLE),
        _method("folora-paper", "FoLoRA as in the paper", "arXiv:2606.00132: null-space initialization, basis unscaled",
                init="null_space", step_scale="paper", settings={**_WHOLE, "spectrum.s_min": 0.3}),
        _method("lora", "LoRA", "arXiv:2106.09685", **_LORA),
        _method("lora-decay", "LoRA, weight decay", "decoupled decay of A and B",
                **_LORA, settings={"training.weight_decay": 1.0}),
        _method("lora-r2", "LoRA, rank 2", "a smaller adapter", **_LORA, settings={"adapter.r": 2}),
        _method("lora-mlp", "LoRA on the MLP", "layers in modules called mlp alone",
                **_LORA, settings={"adapter.target_modules": r".*\.mlp\..*"}),
        _method("lora-dft", "LoRA, DFT loss", "arXiv:2508.05629: every token's loss weighted by its probability",
                **_LORA, settings={"training.loss_type": "dft"}),
        _method("lora-stm", "LoRA, selective token masking", "arXiv:2501.14315: no loss on tokens whose perplexity under the base is above 2.5",
                **_LORA, max_perplexity=2.5),
        _method("milora", "MiLoRA", "arXiv:2406.09044", optimizer="adamw", init="minor_singular"),
        _method("corda", "CorDA (KPM)", "arXiv:2406.05223; tau is its damping, .01 as in PEFT",
                optimizer="adamw", init="corda", settings={"spectrum.tau": 0.01}),
        _method("lora-null", "LoRA-Null", "arXiv:2503.02659", optimizer="adamw", init="lora_null"),
        _method("lora-null-v2", "LoRA-Null v2", "arXiv:2503.02659 with A frozen",
                optimizer="adamw", init="lora_null", freeze_a=True),
        _method("oplora", "OPLoRA", "arXiv:2510.13003, k = r by default", **_LORA, constraint="oplora"),
        _method("kaiming-sadam", "SAdam, Kaiming init", "the optimizer alone", init="kaiming", settings=_WHOLE),
        _method("eigen-adamw", "AdamW, eigen init", "the default initialization alone", optimizer="adamw"),
        _method("null-adamw", "AdamW, null-space init", "the paper's initialization alone",
                optimizer="adamw", init="null_space"),
        _method("null-zero", "folora, A0 in the null space, B0 = 0", "the paper's directions without its B0",
                init="null_space_zero", settings=_WHOLE),
        _method("all-directions", "folora, all eigenvectors", "the whole basis instead of its first r columns",
                settings=_WHOLE),
        _method("gate-off", "folora, gate off", "all ones", settings={**_WHOLE, "spectrum.s_min": 1.0}),
        _method("gate-open", "folora, s_min 0", "no floor", settings={**_WHOLE, "spectrum.s_min": 0.0}),
        _method("basis-pretraining", "folora, basis of C_pre", "V Lambda^(-1/2)",
                basis="pretraining", settings=_WHOLE),
        _method("basis-whitening", "folora, T = H^(-1/2)", "no rotation", basis="whitening", settings=_WHOLE),
        _method("lora-fa", "LoRA-FA", "arXiv:2308.03303: A frozen at its initialization", **_LORA, freeze_a=True),
        _method("eigen-frozen", "eigen init, A frozen", "only B is trained, so that the update reads r chosen directions and no others",
                optimizer="adamw", freeze_a=True),
        _method("null-frozen", "null space, A frozen", "A0 on C_pre's smallest eigenvectors and frozen, B0 = 0",
                optimizer="adamw", init="null_space_zero", freeze_a=True),
        _method("lora-kl", "LoRA + KL", "KL to the base", **_LORA, kl_weight=KL_WEIGHT),
        _method("lora-masked-kl", "LoRA + Mask-the-Target", "arXiv:2605.29498", **_LORA, masked_kl_weight=1.0),
        _method("lora-replay", "LoRA + replay", "10 % of the rows are generated text", **_LORA, replay=0.1),
        _method("lora-replay-1", "LoRA + 1 % real text", "1 % of the rows are text of the kind that pretraining had",
                **_LORA, replay=0.01, replay_text="real"),
        _method("lora-replay-5", "LoRA + 5 % real text", "the same with 5 %",
                **_LORA, replay=0.05, replay_text="real"),
        _method("folora-kl", "folora + KL", "KL to the base", kl_weight=KL_WEIGHT),
        _method("folora-masked-kl", "folora + Mask-the-Target", "arXiv:2605.29498", masked_kl_weight=1.0),
        _method("folora-replay", "folora + replay", "10 % of the rows are generated text", replay=0.1),
    )
}  # fmt: skip


def method(name: str) -> Method:
    """A method by its name. Raises ConfigError, with the nearest right name."""
    if name not in METHODS:
        raise ConfigError(
            f"unknown method {name!r}{nearest(name, METHODS)}; there are {', '.join(METHODS)}"
        )
    return METHODS[name]
