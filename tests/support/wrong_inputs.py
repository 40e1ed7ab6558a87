"""A corpus of wrong inputs: the input, the required error message, and how early it is raised.

Every case is a command line (on top of one that works, see `test_wrong_inputs`) with the files it
needs. ``HERE`` in arguments and messages is the folder that these files are written to.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from transformers.modeling_outputs import CausalLMOutput

from benchmarks.tiny import CHAT, make_llama, make_tokenizer
from folora.runtime.storage import read_sealed, write_sealed

Found = Literal["options", "files", "model", "work"]
"""What must be read to detect it: the command line (and config file) only; data, tokenizer and
config.json; the weights; or the computation itself."""

Edit = Callable[[Path], None]


@dataclass(frozen=True)
class Wrong:
    """One wrong input.

    Attributes:
        name: What is wrong with it.
        arguments: Put behind a command line that works; with `alone`, all of them.
        message: Pattern that the message must contain; it names the option, the file or the layer.
        found: How far the command may come.
        command: Which.
        files: Written to HERE, by name.
        model: Changes a copy of the tiny model's folder, which is then the model.
        run: Changes a copy of a finished run's folder, which is then the output.
        alone: Whether the command line that works is left out.
        pipe: Whether HERE has a named pipe, ``pipe``, that nobody writes to.
    """

    name: str
    arguments: str
    message: str
    found: Found = "options"
    command: str = "run"
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    model: Edit | None = None
    run: Edit | None = None
    alone: bool = False
    pipe: bool = False


def value(option: str, given: str, message: str, **more: Any) -> Wrong:
    """A value that an option does not take; the message names the option."""
    named = option.replace(".", r"\.")
    given_name = given.strip("'")
    return Wrong(
        f"{option} {given_name}", f"--{option} {given}", f"{named} is .*(?:{message})", **more
    )


def file(name: str, content: str | bytes, message: str) -> Wrong:
    """A config file; the message names it."""
    return Wrong(
        name, "--config HERE/c.yaml", rf"c\.yaml.*{message}", files={"c.yaml": content}, alone=True
    )


def options_file(name: str, content: str, message: str) -> Wrong:
    """A config file of valid YAML with wrong options."""
    return Wrong(name, "--config HERE/c.yaml", message, files={"c.yaml": content}, alone=True)


def data(
    name: str,
    content: str | bytes,
    message: str,
    arguments: str = "",
    file: str = "rows.jsonl",
    found: Found = "files",
    **more: Any,
) -> Wrong:
    """A data file."""
    arguments = f"--dataset HERE/{file} {arguments}"
    return Wrong(name, arguments, message, found, files={file: content}, **more)


def chat(name: str, row: Any, message: str, template: str | None = CHAT) -> Wrong:
    """A chat, or an invalid one, and a tokenizer with a chat template."""
    return data(name, json.dumps(row), message, model=tokenizer(template=template))


# Changes of a model's folder.


def json_file(name: str, **changes: Any) -> Edit:
    """Set values in a JSON file; None removes them."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) | changes
        kept = {k: v for k, v in values.items() if v is not None}
        (folder / name).write_text(json.dumps(kept))

    return edit


def resealed(name: str, **changes: Any) -> Edit:
    """Set values in a sealed JSON file and update its checksum."""

    def edit(folder: Path) -> None:
        write_sealed(folder / name, read_sealed(folder / name) | changes)

    return edit


def content(name: str, text: str | bytes) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return edit


def removed(*patterns: str) -> Edit:
    def edit(folder: Path) -> None:
        for pattern in patterns:
            for path in sorted(folder.glob(pattern)):
                path.unlink()

    return edit


def cut(name: str, size: int) -> Edit:
    """Truncate a file to a size; a negative size removes bytes from the end."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def tokenizer(
    change: Callable[[PreTrainedTokenizerFast], Any] = lambda _: None,
    bos: bool = True,
    template: str | None = None,
) -> Edit:
    def edit(folder: Path) -> None:
        made = make_tokenizer(bos=bos)
        if template is not None:
            made.chat_template = template
        change(made)
        made.save_pretrained(folder)

    return edit


def without_bos(**changes: Any) -> Edit:
    """Neither tokenizer nor model has one; the default id of the config class is an ordinary token."""

    def edit(folder: Path) -> None:
        tokenizer(bos=False, **changes)(folder)
        json_file("config.json", bos_token_id=5)(folder)
        json_file("generation_config.json", bos_token_id=None)(folder)

    return edit


def another(make: Callable[[], PreTrainedModel], **config: Any) -> Edit:
    """Another model with the same tokenizer."""

    def edit(folder: Path) -> None:
        torch.manual_seed(0)
        make().save_pretrained(folder)
        json_file("config.json", **config)(folder)

    return edit


def t5() -> PreTrainedModel:
    shape = T5Config(vocab_size=51, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16)
    return T5ForConditionalGeneration(shape)


def bert() -> BertConfig:
    return BertConfig(
        vocab_size=51, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, initializer_range=0.5,
    )  # fmt: skip


def vit() -> PreTrainedModel:
    return ViTModel(
        ViTConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            image_size=16, patch_size=8,
        )
    )  # fmt: skip


class FlatConfig(PretrainedConfig):
    model_type = "flat"


class Flat(PreTrainedModel):
    """A causal LM that is only an embedding."""

    config_class = FlatConfig

    def __init__(self, config: FlatConfig) -> None:
        super().__init__(config)
        self.embedding = torch.nn.Embedding(51, 32)
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.embedding(input_ids) @ self.embedding.weight.T)  # type: ignore[arg-type]


AutoConfig.register("flat", FlatConfig)
AutoModelForCausalLM.register(FlatConfig, Flat)

UP, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
NORM = "model.layers.1.input_layernorm.weight"

# 1. The command line.

COMMANDS = [
    Wrong("no command", "", "Missing command.*folora --help", command="", alone=True),
    Wrong("a command with a typo", "", "No such command 'trian'. Did you mean 'train'", command="trian"),
    Wrong("an option for a command", "--r 4", "unknown option --r", command="", alone=True),
    Wrong("an unknown option", "--frobnicate 3", "unknown option --frobnicate"),
    Wrong("an option with a typo", "--spectrum.tua 3", r"did you mean '--spectrum\.tau'"),
    Wrong("an option without its section", "--tau 3", "unknown option --tau"),
    Wrong("an option in the wrong section", "--adapter.tau 3", r"unknown option --adapter\.tau"),
    Wrong("an option of an earlier version", "--adapter.init kaiming", r"'adapter\.init' was removed.*method"),
    Wrong("a removed option", "--spectrum.beyond floor", r"option 'spectrum\.beyond' was removed: "),
    Wrong("a shortened option", "--out x", r"unknown option --out \(did you mean '--output'"),
    Wrong("a section for an option", "--spectrum 3", r"unknown option --spectrum "),
    Wrong("an option below an option", "--spectrum.tau.x 3", r"unknown option --spectrum\.tau\.x"),
    Wrong("a dash too few", "-output x", "unknown option -o"),
    Wrong("a word too many", "rows.jsonl", r"unexpected extra argument \(rows\.jsonl\)"),
    Wrong("an option without its value", "--config", "'--config' requires an argument"),
    Wrong("a value that looks like a flag", "--output --r 3", "'--output' needs a value"),
    Wrong("an unknown preset", "--preset peper", "'--preset': 'peper' is not .*paper"),
    Wrong("an option that a stage does not use", "--training.learning_rate 1e-3",
          r"folora sample does not use --training\.learning_rate; leave it out", command="sample"),
    Wrong("a switch with a value", "--verbose=3", "'--verbose' does not take a value"),
    Wrong("an option of another command", "--methods lora", "unknown option --methods"),
    Wrong("rank outside of export", "--rank 2", "unknown option --rank"),
    Wrong("no model", "--dataset d --output o", "--model is required", alone=True),
    Wrong("no dataset", "--model m --output HERE", "--dataset is required", alone=True),
    Wrong("no output", "--model m --dataset d", "--output is required", alone=True),
    Wrong("no model for a plan", "", "--model is required", command="plan", alone=True),
    Wrong("an empty model", "--model ''", "--model is required"),
    Wrong("an empty output", "--output ''", "--output is required"),
    Wrong("a model of null", "--model null", "--model is required"),
    Wrong("a model named like a number", "--model 3", "model '3' cannot be loaded", "files"),
    Wrong("a model named like a comment", "--model 'm #1'", "model 'm #1' cannot be loaded", "files"),
    Wrong("a model named like a mapping", "--model '{a: 1}'", "model '{a: 1}' cannot be loaded", "files"),
    Wrong("a model named like no", "--model no", "model 'no' cannot be loaded", "files"),
    value("dtype", "float12", "'float32'"),
    value("quantize", "2bit", "'8bit' or '4bit'"),
    value("trust_remote_code", "perhaps", "boolean"),
    value("device", "cuda:77", "'cuda:77'|not compiled|CUDA"),
    value("device", "gpu", "Invalid device string|Expected one of"),
    value("device", "cpu:x", "Invalid device string"),
    value("device", "meta", "must be one that computes"),
    value("device", "'a[/red]'", r"a\[/red\]"),
    value("device", "0", "Invalid device string"),
]  # fmt: skip

# 2. Values outside their intervals, for every option that has one.

NUMBER = "valid number|valid integer|as an integer"
VALUES = [
    value("sampling.num_sequences", "31", ">= 32"),
    value("sampling.num_sequences", "many", NUMBER),
    value("sampling.num_sequences", "40.5", NUMBER),
    value("sampling.min_new_tokens", "0", ">= 1"),
    Wrong("min above max", "--sampling.min_new_tokens 99", r"max_new_tokens is 40.*min_new_tokens \(99\)"),
    value("sampling.max_new_tokens", "31", ">= "),
    Wrong("shorter than the filter allows",
          "--sampling.min_new_tokens 8 --sampling.max_new_tokens 16", "16, but must be >= 32"),
    value("sampling.batch_size", "0", ">= 1"),
    value("seed", "-1", r"\[0, "),
    value("seed", "4294967296", r"\[0, "),
    value("sampling.held_out", "0.5", r"\[0, 0\.5\)"),
    value("sampling.held_out", "-0.1", r"\[0, 0\.5\)"),
    value("sampling.held_out", "nan", r"\[0, 0\.5\)"),
    Wrong("a start token in brackets", "--sampling.start_token '[1]'", r"'\[1\]' is not a token", "files"),
    value("sampling.server", "localhost:8000", "begin with http:// or https://"),
    value("sampling.server", "http://", "begin with http:// or https:// and a host"),
    value("sampling.server", "[1]", "begin with http:// or https://"),
    value("data.chat_template", "perhaps", "boolean"),
    value("data.max_length", "1", ">= 2"),
    value("data.eval_rows", "-1", ">= 0"),
    value("statistics.task_examples", "0", ">= 1"),
    value("statistics.batch_size", "-8", ">= 1"),
    value("spectrum.tau", "-0.001", "finite and >= 0"),
    value("spectrum.tau", "nan", "finite and >= 0"),
    value("spectrum.tau", "inf", "finite and >= 0"),
    value("spectrum.tau", "small", NUMBER),
    value("spectrum.tau", "[1]", NUMBER),
    value("spectrum.tau", "1e", NUMBER),
    value("spectrum.lam", "-1", "finite and >= 0"),
    value("spectrum.lam", "nan", "finite and >= 0"),
    value("spectrum.lam", "inf", "finite and >= 0"),
    value("spectrum.s_min", "1.5", r"\[0, 1\]"),
    value("spectrum.s_min", "-0.1", r"\[0, 1\]"),
    value("spectrum.s_min", "nan", r"\[0, 1\]"),
    value("spectrum.directions", "0", ">= 1"),
    value("spectrum.directions", "most", "spectrum.directions is 'most': .*'all'"),
    value("spectrum.directions", "3", r">= adapter.r \(4\)"),
    value("sampling.tolerance", "0", "finite and > 0"),
    value("sampling.tolerance", "nan", "finite and > 0"),
    Wrong("a method that is none", "--method loar", "unknown method 'loar' .did you mean 'lora'"),
    Wrong("a method without a name", "--method '{init: eigen}'", "method is .* but must be a name"),
    value("method.basis", "identity", "'generalized'"),
    value("method.step_scale", "2", "'task' or 'paper'"),
    value("method.init", "eigenn", "'eigen'"),
    value("method.constraint", "hard", "'none' or 'oplora'"),
    value("method.protect", "0", ">= 1"),
    value("method.freeze_a", "2", "boolean"),
    value("method.optimizer", "sgd", "'sadam' or 'adamw'"),
    value("method.replay", "1", r"\[0, 1\)"),
    value("method.replay", "-0.1", r"\[0, 1\)"),
    value("method.kl_weight", "-1", "finite and >= 0"),
    value("method.kl_weight", "inf", "finite and >= 0"),
    value("method.masked_kl_weight", "nan", "finite and >= 0"),
    value("adapter.r", "0", ">= 1"),
    value("adapter.r", "-4", ">= 1"),
    value("adapter.r", "1.5", NUMBER),
    value("adapter.r", "yes", NUMBER),
    value("adapter.r", "1e99", NUMBER),
    value("adapter.alpha", "0", "> 0"),
    value("adapter.alpha", "inf", "> 0"),
    value("adapter.alpha", "nan", "> 0"),
    value("adapter.alpha", "on", NUMBER),
    value("adapter.target_modules", "'[]'", "not be empty"),
    value("adapter.target_modules", "'(q|k'", "no regular expression: missing \\)"),
    value("adapter.target_modules", "'[/b'", "no regular expression: unterminated"),
    Wrong("a target named like a number", "--adapter.target_modules 7", "'7' matches no layer", "files"),
    value("adapter.target_modules", "'[q_proj, 7]'", "valid string"),
    value("training.learning_rate", "0", "finite and > 0"),
    value("training.learning_rate", "nan", "finite and > 0"),
    value("training.learning_rate", "inf", "finite and > 0"),
    value("training.learning_rate", "on", NUMBER),
    value("training.lr_b_ratio", "-1", "finite and > 0"),
    value("training.weight_decay", "-0.1", "finite and >= 0"),
    Wrong("no epoch and no step", "--training.max_steps -1 --training.num_train_epochs 0",
          r"num_train_epochs is 0\.0, but must be finite and > 0"),
    Wrong("endless epochs", "--training.max_steps -1 --training.num_train_epochs inf",
          "num_train_epochs is inf, but must be finite"),
    value("training.max_steps", "few", NUMBER),
    value("training.per_device_train_batch_size", "0", ">= 1"),
    value("training.gradient_accumulation_steps", "0", ">= 1"),
    value("training.warmup_steps", "-0.5", "finite and >= 0"),
    value("training.adam_beta1", "2", r"\[0, 1\)"),
    value("training.adam_epsilon", "-1", "finite and >= 0"),
    value("training.save_total_limit", "0", ">= 1"),
    value("training.max_grad_norm", "-1", "finite and >= 0"),
    value("training.max_grad_norm", "nan", "finite and >= 0"),
    value("training.eval_steps", "-1", ">= 0"),
    value("training.save_steps", "0", ">= 1"),
    value("training.logging_steps", "0", ">= 1"),
    value("training.gradient_checkpointing", "often", "boolean"),
    value("training.bf16", "3", "boolean"),
    value("training.seed", "-1", r"\[0, "),
    value("training.seed", "4294967296", r"\[0, "),
    Wrong("a schedule that is none", "--training.lr_scheduler_type cosin",
          "training: cosin is not a valid SchedulerType.*'cosine'"),
    Wrong("an option of TRL with a typo", "--training.pakcing true",
          r"unknown option --training\.pakcing .did you mean '--training\.packing'"),
    value("training.neftune_noise_alpha", "x", "valid number"),
    value("training.lr_scheduler_kwargs", "7", "valid dictionary"),
    Wrong("a name twice in a mapping", "--training.lr_scheduler_kwargs '{a: 1, a: 2}'", "training: .*property name"),
    Wrong("a Trainer that makes flat vectors", "--training.deepspeed none.json", "DeepSpeed makes flat vectors"),
    Wrong("packing without a length", "--training.packing true", r"packing needs training\.max_length"),
    Wrong("packing into nothing", "--training.packing true --training.max_length 0",
          r"training\.max_length is 0, but must be >= 2"),
    Wrong("a length without packing", "--training.max_length 0", r"training\.max_length is for packing"),
    *(
        Wrong(f"training.{name} {given}", f"--training.{name} {given}", rf"training\.{name} {message}")
        for name, given, message in (
            ("push_to_hub", "true", "is not honoured"),
            ("load_best_model_at_end", "true", "is not honoured"),
            ("resume_from_checkpoint", "x", "is not honoured: folora resumes"),
            ("completion_only_loss", "false", "is not honoured"),
            ("assistant_only_loss", "true", "is not honoured"),
            ("dataset_text_field", "x", "is not honoured"),
            ("save_only_model", "true", "is not honoured"),
            ("eval_strategy", "epoch", r"is set by training\.eval_steps"),
            ("activation_checkpointing", "true", r"is set by training\.gradient_checkpointing"),
            ("optim", "sgdd", "is set by method"),
            ("per_device_eval_batch_size", "3", r"is set by statistics\.batch_size"),
            ("metric_for_best_model", "x", "is 'x', but must be one of loss, kl"),
            ("train_sampling_strategy", "x", "is 'x', but must be one of random"),
        )
    ),
    *(
        Wrong(f"training {given}", given, f"training.*{message}", "files")
        for given, message in (
            ("--training.report_to wandb", "wandb to be installed"),
            ("--training.report_to tensorboard", "tensorboard to be installed"),
            ("--training.use_liger_kernel true", "use_liger_kernel needs the package liger-kernel"),
            ("--training.packing true --training.max_length 64 --training.packing_strategy x", "packing strategy 'x'"),
            ("--training.lr_scheduler_kwargs '{x: 1}'", "unexpected keyword argument 'x'"),
            ("--training.dataloader_persistent_workers true", "needs num_workers > 0"),
            ("--training.router_aux_loss_coef 0.1", "needs a mixture-of-experts model"),
        )
    ),
    Wrong("a schedule that needs more", "--training.lr_scheduler_type warmup_stable_decay",
          "training: .*num_decay_steps", "files"),
    Wrong("a meter without rows", "--training.eval_steps 2 --data.eval_rows 0",
          r"eval_steps is 2, but no rows are held out of 40", "files"),
]  # fmt: skip

# 3. Config files.

FILES = [
    Wrong("no config file", "--config HERE/none.yaml", r"config file .*none\.yaml.*No such file"),
    Wrong("a folder for a config file", "--config HERE", "config file .*Is a directory"),
    Wrong("a config file named too long", f"--config {'x' * 300}", "config file x.*File name too long"),
    Wrong("a device for a config file", "--config /dev/zero", "config file /dev/zero: it is a named pipe or a device"),
    Wrong("a pipe for a config file", "--config HERE/pipe", "pipe: it is a named pipe or a device", pipe=True),
    Wrong("a pipe for a base file", "--base HERE/pipe", "pipe is a named pipe or a device", pipe=True),
    Wrong("a pipe for a data file", "--dataset HERE/pipe", "pipe is a named pipe or a device", pipe=True),
    options_file("a name of digits", "output: 2024\n", "output is 2024: .*valid string; put it in quotes"),
    options_file("a name that is a date", "model: 2024-01-01\n", "model is .*valid string; put it in quotes"),
    file("a list", "- a\n- b\n", "must hold names and values"),
    file("a word", "hello\n", "must hold names and values"),
    file("tabs", "spectrum:\n\ttau: 1\n", r"character '\\t'.*line 2"),
    file("an open bracket", "model: [a\n", r"expected ',' or '\]'"),
    file("brackets without end", "[" * 4000, "nested too deeply"),
    file("a name twice", "model: a\nmodel: b\n", "'model' is given twice.*line 2"),
    file("an option twice in a section", "spectrum: {tau: 1, tau: 2}", "'tau' is given twice"),
    file("a section twice", "spectrum: {tau: 1}\nmodel: m\nspectrum: {lam: 1}\n",
         "'spectrum' is given twice.*line 3"),
    file("aliases that grow", "a: &a [l, l]\nb: &b [*a, *a]\nmodel: [*b, *b]\n", "aliases are not allowed.*line 2"),
    file("a merge key", "spectrum: &s {tau: 1}\ntraining: {<<: *s}\n", "aliases are not allowed"),
    file("two documents", "model: a\n---\nmodel: b\n", "another document"),
    file("a tag of Python", "model: !!python/object/apply:os.getcwd []\n", "constructor for the tag"),
    file("a date that is none", "revision: 2020-13-45\n", "month must be in 1..12"),
    file("a list as a name", "? [a]\n: b\n", "unhashable key"),
    file("latin-1", b"model: caf\xe9\n", "utf-8.*can't decode"),
    file("utf-16", "model: m\n".encode("utf-16"), "utf-8.*can't decode"),
    file("zero bytes", b"\0\0\0", "special characters are not allowed"),
    file("a data set", b"# " + b"x" * 2**20, "more than 1048576 bytes"),
    options_file("an empty file", "", "--model is required"),
    options_file("comments alone", "# model: m\n", "--model is required"),
    options_file("an unknown section", "optimizer: {lr: 1}", "unknown option 'optimizer'"),
    options_file("an unknown option", "adapter: {rank: 4}", r"unknown option 'adapter\.rank'"),
    options_file("an option with a typo", "statistics: {batchsize: 4}", r"did you mean 'statistics\.batch_size'"),
    options_file("an option of TRL with a typo in a file", "model: m\noutput: o\ntraining: {pakcing: true}",
                 "no option 'pakcing' .did you mean 'packing'"),
    options_file("an option of an earlier version in a file", "training: {batch_size: 4}",
                 r"'training\.batch_size' was removed: give training\.per_device_train_batch_size"),
    options_file("a dotted name", "spectrum.tau: 3", "must be nested in a file: tau under spectrum"),
    options_file("a removed option", "spectrum: {storage: float32}", r"option 'spectrum\.storage' was removed: "),
    options_file("an option outside of its section", "tau: 1", "unknown option 'tau'"),
    options_file("a section in a section", "adapter: {spectrum: {tau: 1}}", r"unknown option 'adapter\.spectrum'"),
    options_file("a number for a section", "spectrum: 3", "spectrum is 3"),
    options_file("nothing for a section", "spectrum:\nmodel: m\n", "spectrum is None"),
    options_file("a list for a section", "adapter: [{r: 4}]", "adapter is "),
    options_file("a mapping for an option", "adapter: {r: {value: 4}}", r"adapter\.r is "),
    options_file("text for a number", "adapter: {r: four}", r"adapter\.r is 'four'"),
    options_file("yes for a number", "adapter: {r: yes}", r"adapter\.r is True, but must be a number"),
    options_file("a number for a name", "1: x", "1 is 'x': names of options should be strings"),
    options_file("null for a number", "adapter: {r: null}", r"adapter\.r is None"),
    options_file("not a number", "spectrum: {tau: .nan}", r"spectrum\.tau is nan"),
    options_file("a number for a model", "model: 7", "model is 7"),
    options_file("two at once", "spectrum: {tau: x}\nadapter: {r: y}\n", r"spectrum\.tau is 'x'.*adapter\.r is 'y'"),
    options_file("names among numbers", "adapter: {target_modules: [q_proj, 1]}", r"target_modules.* is 1"),
]  # fmt: skip

# 4. Data.

GOOD_ROW = '{"prompt": "1+1=", "completion": "2."}\n'
PACKED = gzip.compress(GOOD_ROW.encode() * 100)
DATA = [
    Wrong("no data file", "--dataset HERE/none.jsonl", r"none\.jsonl does not exist"),
    Wrong("no data file of its name here", "--dataset none.jsonl", r"none\.jsonl does not exist"),
    Wrong("no data folder", "--dataset HERE/none", "none does not exist"),
    Wrong("a folder for data", "--dataset HERE", "is a folder, but must be a file"),
    Wrong("a folder named like a file", "--dataset HERE/rows.jsonl", "is a folder, but must be a file",
          files={"rows.jsonl/x": ""}),
    Wrong("a data file named too long", f"--dataset {'x' * 300}.jsonl", r"x\.jsonl does not exist"),
    Wrong("an address", "--dataset http://example.org/rows.jsonl", "http.* does not exist"),
    Wrong("no such data set on the Hub", "--dataset nobody/nothing-of-this-name",
          r"'nobody/nothing-of-this-name' is neither a local .* nor available from the Hub", "files"),
    data("an empty file", "", r"rows\.jsonl is empty", found="options"),
    data("another ending", "a,b\n", r"rows\.csv must end in", file="rows.csv", found="options"),
    data("no ending", GOOD_ROW, "rows must end in", file="rows", found="options"),
    data("gz alone", PACKED, r"rows\.gz must end in", file="rows.gz", found="options"),
    data("white space alone", " \n\n", r"rows\.jsonl' has no rows"),
    data("an empty list", "[]", r"rows\.json' has no rows", file="rows.json"),
    data("half a row", '{"prompt": ', r"rows\.jsonl cannot be read as json: .*line 1"),
    data("half a row at the end", GOOD_ROW * 20 + '{"prompt": "a', "cannot be read as json: .*line 21"),
    data("text", "hello\n", "cannot be read as json: Expecting value: line 1"),
    data("Python instead of JSON", "{'prompt': 'a', 'completion': 'b'}", "double quotes: line 1"),
    data("a comma behind a row", GOOD_ROW.strip() + ",\n" + GOOD_ROW, "cannot be read as json: .*line 1"),
    data("numbers", "1\n2\n", "row 0 is 1, but must be an object"),
    data("a list of texts", '["a", "b"]', 'row 0 is "a", but must be an object', file="rows.json"),
    data("lists", '["a"]\n["b"]\n', r'row 0 is \["a"\], but must be an object'),
    data("null", "null\n", "row 0 is null, but must be an object"),
    data("null among rows", GOOD_ROW + "null\n", "row 1 is null, but must be an object"),
    data("brackets without end", "[" * 20000, "cannot be read as json: .*recursion"),
    data("a column twice", '{"prompt": "a", "prompt": "b", "completion": "c"}', "'prompt' is given twice"),
    data("latin-1", b'{"prompt": "\xe9", "completion": "b"}', r"rows\.jsonl cannot be read.*'utf-8' codec"),
    data("utf-16", GOOD_ROW.encode("utf-16"), r"rows\.jsonl cannot be read.*'utf-8' codec"),
    data("binary", bytes(range(256)), r"rows\.jsonl cannot be read"),
    data("gz that is none", GOOD_ROW, "Not a gzipped file", file="rows.jsonl.gz"),
    data("gz cut off", PACKED[:-20], r"rows\.jsonl\.gz cannot be read.*ended before", file="rows.jsonl.gz"),
    data("gz with a wrong byte", PACKED[:-6] + b"xx" + PACKED[-4:], "CRC check failed", file="rows.jsonl.gz"),
    data("gz of nothing", gzip.compress(b""), "has no rows", file="rows.jsonl.gz"),
    data("packed without saying so", PACKED, "cannot be read as json", file="rows.jsonl"),
    data("parquet that is none", GOOD_ROW, r"rows\.parquet cannot be read as parquet", file="rows.parquet"),
    data("parquet cut off", b"PAR1" + bytes(40), r"rows\.parquet cannot be read as parquet", file="rows.parquet"),
    data("no known columns", '{"a": "x", "b": "y"}', r"columns \['a', 'b'\]; known are"),
    data("no response", '{"prompt": "x"}', r"rows of prompt \(prompt alone\) are refused. .*completion"),
    data("no columns", "{}", r"columns \[\]; known are"),
    data("text beside its answer", '{"text": "x", "code": "y"}', r"text/code.*--data\.prompt_column text"),
    data("a list for a text", '{"text": ["x"]}', "row 0: column 'text' holds list, not text"),
    data("columns in capitals", '{"Prompt": "x", "Completion": "y"}', r"'Prompt'\]; known are"),
    data("a named column that is not there", GOOD_ROW,
         r"data\.prompt_column is 'promt'.*did you mean 'prompt'",
         "--data.prompt_column promt --data.response_column completion"),
    data("a named response that is not there", GOOD_ROW, r"data\.response_column is 'answer'",
         "--data.prompt_column prompt --data.response_column answer"),
    data("one column named", GOOD_ROW, r"both data\.prompt_column and data\.response_column",
         "--data.prompt_column prompt"),
    data("a number for a prompt", '{"prompt": 3, "completion": "y"}', "row 0: column 'prompt' holds int"),
    data("null for a prompt", '{"prompt": null, "completion": "y"}', r"columns \['completion'\]; known are"),
    data("a list for a response", '{"prompt": "x", "completion": ["y"]}', "'completion' holds list"),
    data("not a number for a response", '{"prompt": "x", "completion": NaN}', "'completion' holds float"),
    data("truth for an answer", '{"question": "x", "answer": true}', "'answer' holds bool"),
    data("a row without its column", GOOD_ROW * 3 + '{"prompt": "x"}\n', "row 3: column 'completion' holds NoneType"),
    data("rows of two kinds", GOOD_ROW + '{"question": "x", "answer": "y"}\n', "row 1: column 'prompt' holds NoneType"),
    data("a number further down", GOOD_ROW * 9 + '{"prompt": "x", "completion": 9}\n', "row 9: column 'completion' holds int"),
    data("half of a surrogate pair", r'{"prompt": "x", "completion": "\ud800"}', "row 0: column 'completion' .*surrogate"),
    data("an empty response", '{"prompt": "x", "completion": ""}', "row 0: the response is empty"),
    data("an empty answer", '{"question": "x", "answer": ""}', "row 0: the response is empty"),
    data("responses beyond the length", '{"prompt": "' + "x" * 99 + '", "completion": "y"}',
         r"data\.max_length = 64; raise it"),
    data("every token masked", GOOD_ROW, r"data\.max_length = 2; raise it", "--data.max_length 2"),
    data("a row longer than the context", '{"prompt": "' + "x" * 300 + '", "completion": "y"}',
         r"a row has 302 tokens, but the model's context is 256; set --data\.max_length 256",
         "--data.max_length 500"),
    data("a chat template that is not there", '{"question": "x", "answer": "y"}',
         r"data\.chat_template is true, but this tokenizer has no chat template", "--data.chat_template true"),
    data("nine rows to compare on", GOOD_ROW * 9, "none of the 9 rows are held out. Give at least 10", "--methods lora",
         command="compare", found="model"),
    data("no rows held out to compare on", GOOD_ROW * 20, r"held-out rows .*data\.eval_rows > 0",
         "--data.eval_rows 0", command="compare", found="model"),
]  # fmt: skip

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
NO_CHAT = r"row 0: a chat must be a list"
NO_ANSWER = "row 0: the chat has no message of the role 'assistant'"
CHATS = [
    chat("a chat without a template", {"messages": [USER, ANSWER]}, "row 0: .*no chat template", None),
    chat("an empty chat", {"messages": []}, NO_ANSWER),
    chat("a chat without an answer", {"messages": [USER]}, NO_ANSWER),
    chat("an answer by another name", {"messages": [USER, {**ANSWER, "role": "model"}]}, NO_ANSWER),
    chat("an answer in the prompt alone", {"prompt": [USER, ANSWER], "completion": [USER]}, NO_ANSWER),
    chat("text for a chat", {"messages": "hello"}, NO_CHAT),
    chat("null for a chat", {"messages": None}, r"columns \[\]; known are"),
    chat("a message for a chat", {"messages": USER}, NO_CHAT),
    chat("texts for messages", {"messages": ["a", "b"]}, NO_CHAT),
    chat("a message without a role", {"messages": [{"content": "a"}, ANSWER]}, NO_CHAT),
    chat("a number for a role", {"messages": [{**USER, "role": 3}, ANSWER]}, NO_CHAT),
    chat("a message without content", {"messages": [USER, {"role": "assistant"}]}, NO_CHAT),
    chat("null for content", {"messages": [USER, {**ANSWER, "content": None}]}, NO_CHAT),
    chat("pictures for content", {"messages": [{**USER, "content": [{"type": "image"}]}, ANSWER]}, NO_CHAT),
    chat("a chat with half of a surrogate pair", {"messages": [USER, {**ANSWER, "content": "\ud800"}]}, "row 0: the chat holds half of a surrogate"),
    chat("a chat before text", {"prompt": [USER], "completion": "b"}, "column 'prompt' holds list"),
    chat("a template that refuses", {"messages": [USER, ANSWER]}, "row 0: .*template refuses this chat: roles",
         "{{ raise_exception('roles') }}"),
    chat("a template that is no Jinja", {"messages": [USER, ANSWER]}, "row 0: .*template refuses this chat",
         "{% for %}"),
    chat("a template that counts", {"messages": [USER, ANSWER]}, "renders a turn differently",
         "{{ messages|length }}" + CHAT),
    chat("a template that says nothing", {"messages": [USER, ANSWER]},
         r"row 0: the chat template leaves out the content of message 0 \(user\), 'a'", "x"),
]  # fmt: skip

# 5. Models.


def model(name: str, edit: Edit, message: str, found: Found = "model", **more: Any) -> Wrong:
    """A model's folder."""
    return Wrong(name, more.pop("arguments", ""), message, found, model=edit, **more)


MODELS = [
    Wrong("no model folder", "--model HERE/none", "model folder HERE/none does not exist", "files"),
    Wrong("no model folder of many names", "--model a/b/c", "model folder a/b/c does not exist", "files"),
    Wrong("no such model on the Hub", "--model nobody/nothing-of-this-name",
          "'nobody/nothing-of-this-name' cannot be loaded.*HF_HUB_OFFLINE", "files"),
    Wrong("a model named too long", f"--model {'x' * 300}", "model 'x.*cannot be loaded", "files"),
    Wrong("a file for a model", "--model HERE/x", "model HERE/x is a file", "files", files={"x": ""}),
    Wrong("an empty folder for a model", "--model HERE", "HERE holds no model: config.json is missing", "files"),
    model("no config.json", removed("config.json"), "config.json is missing", "files"),
    model("half a config.json", content("config.json", "{"), "config.json' is not a valid JSON", "files"),
    model("a list for config.json", content("config.json", "[]"), "/model' cannot be loaded", "files"),
    model("an empty config.json", content("config.json", ""), "/model' cannot be loaded", "files"),
    model("a config of an unknown model", json_file("config.json", model_type="lama"),
          "cannot be loaded: .*`?lama`?", "files"),
    model("a config without its model", json_file("config.json", model_type=None), "`model_type`", "files"),
    model("a config with text for a number", json_file("config.json", hidden_size="big"),
          "cannot be loaded: .*'hidden_size'", "files"),
    model("heads that do not divide", json_file("config.json", num_attention_heads=5),
          "cannot be loaded: .*not a multiple of the number of attention heads", "files"),
    model("an activation that is none", json_file("config.json", hidden_act="gelv"), "cannot be loaded: .*gelv", "files"),
    model("no linear layers", another(lambda: Flat(FlatConfig())), "a Flat without an output layer", "files"),
    model("a plan without linear layers", another(lambda: Flat(FlatConfig())),
          "a Flat without an output layer", "files", command="plan"),
    model("no layers", json_file("config.json", num_hidden_layers=0), "matches no layer of .*lm_head", "files"),
    model("no weights", removed("model.safetensors"), "no file named model.safetensors"),
    model("empty weights", content("model.safetensors", b""), "/model' cannot be loaded: .*header"),
    model("weights of garbage", content("model.safetensors", b"x" * 500), "/model' cannot be loaded: .*header"),
    model("weights cut off in front", cut("model.safetensors", 99), "/model' cannot be loaded: .*header"),
    model("weights cut off", cut("model.safetensors", -99), "/model' cannot be loaded: .*not fully covered"),
    model("a weight that is not there", weights(lambda t: t.pop(DOWN)),
          rf"lacks 1 of the weights, such as {DOWN}"),
    model("a layer that is not there", json_file("config.json", num_hidden_layers=3),
          r"lacks 9 of the weights, such as model\.layers\.2"),
    model("a weight of another shape", weights(lambda t: t.update({UP: torch.ones(3, 3)})),
          rf"{UP} has shape \(3, 3\) in the checkpoint, but \(48, 32\)"),
    model("NaN in a weight", weights(lambda t: t[DOWN][0, 0].fill_(torch.nan)), f"parameter {DOWN} .*NaN"),
    model("Inf in a weight", weights(lambda t: t[UP][5, 2].fill_(torch.inf)), f"parameter {UP} .*Inf"),
    model("NaN in a norm", weights(lambda t: t[NORM][3].fill_(torch.nan)), f"parameter {NORM} .*NaN"),
    model("a weight beyond fp16", weights(lambda t: t[UP][0, 0].fill_(1e5)), f"parameter {UP} .*float32",
          arguments="--dtype float16"),
    model("an encoder and a decoder", another(t5), "is a T5ForConditionalGeneration, an encoder-decoder model, but must be a causal", "files"),
    model("an encoder and a decoder that hide it", another(t5, architectures=None),
          "is a model of type 't5', for which transformers has no causal LM", "files"),
    model("a masked model", another(lambda: BertForMaskedLM(bert())), "is a BertForMaskedLM", "files"),
    model("an encoder with a head", another(lambda: BertLMHeadModel(bert())),
          "BertLMHeadModel .* tokens that come after .*is_decoder", "files"),
    model("a classifier", another(lambda: LlamaForSequenceClassification(make_llama().config)),
          "is a LlamaForSequenceClassification", "files"),
    model("a classifier of tokens", another(lambda: LlamaForTokenClassification(make_llama().config)),
          "is a LlamaForTokenClassification", "files"),
    model("a model without its head",
          another(lambda: LlamaModel(make_llama().config), tie_word_embeddings=False), r"lacks 1 of the weights, such as lm_head\.weight"),
    model("a model of pictures", another(vit), "is a ViTModel, for which transformers has no causal LM", "files"),
    model("EOS that the model does not know", content("generation_config.json", '{"eos_token_id": [2, 99]}'),
          "ends sequences at token 99, but the model has 51"),
    model("a context shorter than a sample", json_file("config.json", max_position_embeddings=40),
          r"sampling\.max_new_tokens is 40, but the context of .* is 40 tokens", "files"),
    Wrong("samples longer than the context", "--sampling.max_new_tokens 256",
          r"sampling\.max_new_tokens is 256, but .* it must be < 256", "files"),
    Wrong("r beyond a width", "--r 33",
          r"adapter\.r is 33, but model\.layers\.0\.self_attn\.q_proj has d_in = 32.*\[1, 32\]", "files"),
    *(
        Wrong(f"r beyond the rank, {init}", f"--r 20 --method.init {init}",
              r"adapter\.r .* is 20, but .*k_proj has 16 singular values.*\[1, 16\]", "files")
        for init in ("minor_singular", "corda", "lora_null")
    ),
    Wrong("more protected than there is", "--method oplora --method.protect 17",
          r"method\.protect .* is 17, but .*k_proj has 16", "files"),
    Wrong("r protected by default", "--method oplora --r 20", r"method\.protect .* is 20", "files"),
    Wrong("targets that match nothing", "--adapter.target_modules 'foo.*'", "'foo.*' matches no layer of", "files"),
    Wrong("a target with a typo", "--adapter.target_modules '[q_prj]'",
          "'q_prj' matches no linear layer .did you mean 'q_proj'", "files"),
    Wrong("one target of two", "--adapter.target_modules '[q_proj, c_attn]'", "'c_attn' matches no linear layer", "files"),
    Wrong("an empty target", "--adapter.target_modules \"['']\"", "'' matches no linear layer", "files"),
    Wrong("an embedding as a target", "--adapter.target_modules '[embed_tokens]'",
          "'embed_tokens' matches no linear layer", "files"),
    Wrong("a norm as a target", "--adapter.target_modules '.*norm'", r"'\.\*norm' matches no layer", "files"),
    Wrong("a block as a target", "--adapter.target_modules '[mlp]'", "'mlp' matches no linear layer", "files"),
    Wrong("half a name as a target", "--adapter.target_modules '[proj]'", "'proj' matches no linear layer", "files"),
    Wrong("the tied output layer", "--adapter.target_modules '[q_proj, lm_head]'", "the output layer lm_head", "files"),
    Wrong("everything, output layer included", "--adapter.target_modules '.*'", "the output layer lm_head", "files"),
    Wrong("no server there", "--sampling.server http://127.0.0.1:9", "127.0.0.1:9.* does not answer", "files"),
    Wrong("a port that is none", "--sampling.server http://127.0.0.1:x", "does not answer", "files"),
    Wrong("no model for a sampler", "--sampling.sampler_model HERE/none", "HERE/none does not exist", "files"),
    model("a sampler with other tokens", tokenizer(lambda t: t.add_tokens(["Q"])), "another tokenizer", "files",
          arguments="--sampling.sampler_model HERE/model --model GOOD"),
    model("a sampler with other ids", tokenizer(bos=False, change=lambda t: t.add_tokens(["Q"])),
          "sampler model HERE/model has another tokenizer", "files",
          arguments="--sampling.sampler_model HERE/model --model GOOD"),
    model("NaN in a sampler", weights(lambda t: t[UP].fill_(torch.nan)), f"parameter {UP}", "work",
          arguments="--sampling.sampler_model HERE/model --model GOOD"),
    model("activations beyond fp32 in sampling", weights(lambda t: t[DOWN].fill_(1e37)),
          "logits are not finite", "work", command="sample"),
    model("activations whose squares are beyond fp32",
          weights(lambda t: (t[UP].mul_(1e25), t[DOWN].mul_(1e-25))),
          r"inputs of model\.layers\.0\.mlp\.down_proj are not finite or overflow", "work"),
    Wrong("gradients beyond fp32", "--lr 1e30 --training.max_grad_norm 0",
          r"step \d: \d+ gradients are not finite.*lower training\.learning_rate \(now 1e\+30\)", "work"),
    Wrong("a loss that TRL does not know", "--training.loss_type nlll", "training: .*nlll", "files"),
    model("no ridge for a basis that needs one", weights(lambda t: t[NORM][3].zero_()),
          r"model\.layers\.1\.self_attn\.q_proj: C_pre .* positive definite. Raise tau", "work",
          arguments="--spectrum.tau 0 --method.basis whitening"),
    model("nothing but dead layers", weights(lambda t: t["model.embed_tokens.weight"].zero_()),
          "passed the filter|is zero", "work"),
]  # fmt: skip

# 6. Tokenizers.

TOKENIZERS = [
    model("no tokenizer", removed("token*"), "the tokenizer of model .*/model' cannot be loaded", "files"),
    model("half a tokenizer", cut("tokenizer.json", 99), "the tokenizer of model .*/model' cannot be loaded", "files"),
    model("a tokenizer of garbage", content("tokenizer.json", "{}"), "the tokenizer of model .* cannot be loaded", "files"),
    model("half a tokenizer's config", content("tokenizer_config.json", "{"), "the tokenizer of model", "files"),
    model("no BOS", without_bos(template="{{ eos_token }}"), r"no BOS token .*--sampling\.start_token eos \(which is '</s>'", "files"),
    model("neither BOS nor EOS", without_bos(change=lambda t: setattr(t, "eos_token", None)),
          "no BOS token", "files"),
    model("no EOS to start from", tokenizer(lambda t: setattr(t, "eos_token", None)),
          r"sampling\.start_token is 'eos', but this tokenizer has no EOS", "files",
          arguments="--sampling.start_token eos"),
    model("neither padding nor EOS",
          tokenizer(lambda t: (setattr(t, "pad_token", None), setattr(t, "eos_token", None))),
          "neither a padding nor an EOS token", "files"),
    Wrong("a start token that is none", "--sampling.start_token '<|begin|>'",
          r"sampling\.start_token '<\|begin\|>' is not a token", "files"),
    Wrong("a start token of two", "--sampling.start_token 'ab'", "'ab' is not a token", "files"),
    model("more tokens than the model knows", tokenizer(lambda t: t.add_tokens(["0+", "1+", "2+"])),
          r"tokenizer gives '.\+' the id 5., but the model has 51", "files"),
    model("a model that knows fewer tokens", json_file("config.json", vocab_size=8),
          "but the model has 8 tokens", "files"),
    model("a padding token that the model does not know",
          tokenizer(lambda t: (t.add_tokens(["Q"]), t.add_special_tokens({"pad_token": "<new>"}))),
          "gives '<new>' the id 51", "files"),
    model("a BOS that the model does not know",
          tokenizer(lambda t: (t.add_tokens(["Q"]), t.add_special_tokens({"bos_token": "<new>"}))),
          "gives '<new>' the id 51", "files"),
    model("an EOS that the model does not know",
          tokenizer(lambda t: (t.add_tokens(["Q"]), t.add_special_tokens({"eos_token": "<new>"}))),
          "gives '<new>' the id 51", "files"),
]  # fmt: skip

# 7. The output folder and its contents.

OUTPUTS = [
    Wrong("a file for output", "--output HERE/x", "output HERE/x is a file", files={"x": ""}),
    Wrong("an output below a file", "--output HERE/x/run", "HERE/x is a file", files={"x": ""}),
    Wrong("an output deep below a file", "--output HERE/x/a/b/c", "HERE/x is a file", files={"x": ""}),
    Wrong("an output named too long", f"--output HERE/{'x' * 300}", "not a valid folder name"),
    options_file("an output with a zero byte", 'model: m\ndataset: d.jsonl\noutput: "a\\0b"\n',
                 "not a valid folder name"),
    *(
        Wrong(f"{command} before its turn", "--output HERE/new",
              rf"{part} is missing; run folora {before} first", "files", command=command)
        for command, part, before in (
            ("measure", "1-samples/set", "sample"),
            ("solve", "2-statistics/pre", "measure"),
            ("train", "1-samples/set", "sample"),
        )
    ),
    Wrong("export before its turn", "--output HERE/new",
          "4-training/result is missing; run folora train first", command="export"),
]  # fmt: skip


def damaged(
    name: str,
    edit: Edit,
    message: str,
    found: Found = "model",
    command: str = "run",
    arguments: str = "",
) -> Wrong:
    """A finished run with a modified file."""
    return Wrong(name, arguments, message, found, command=command, run=edit)


STAGES = {
    "1-samples/set": "measure",
    "2-statistics/pre": "solve",
    "2-statistics/task": "solve",
    "3-spectrum": "train",
    "4-training/result": "export",
}
OUTPUTS += [
    damaged(f"{what} in {part}", edit(f"{part}/manifest.json"), rf"{part}/manifest\.json.*{message}",
            "options" if command == "export" else "files", command)
    for part, command in STAGES.items()
    for what, edit, message in (
        ("an old format", lambda f: json_file(f, format_version=1), "format version 1, this folora reads 3"),
        ("another kind", lambda f: resealed(f, kind="other"), "holds 'other', but"),
        ("a changed word", lambda f: json_file(f, kind="other"), "is damaged: its checksum"),
        ("garbage", lambda f: content(f, b"\xff{"), "cannot be read"),
    )
]  # fmt: skip
OUTPUTS += [
    damaged(f"another model's {part}", resealed(f"{part}/manifest.json", model="0" * 64),
            f"{part} belongs to another model", "model", command)
    for part, command in STAGES.items()
    if command != "export"
]  # fmt: skip
OUTPUTS += [
    damaged("a list for a manifest", content("3-spectrum/manifest.json", "[]"), "3-spectrum/manifest.json has format version 1",
            "files"),
    damaged("half a request for samples", content("1-samples/request.json", "{"), r"request\.json cannot be read", "files"),
    damaged("samples cut off", cut("1-samples/set/tensors.safetensors", 99), "is damaged: its checksum", "model"),
    damaged("statistics without tensors", removed("2-statistics/pre/tensors.safetensors"),
            r"pre/tensors\.safetensors cannot be read.*No such file", "model", "solve"),
    damaged("a result of garbage", content("4-training/result/tensors.safetensors", "x"),
            "result/tensors.safetensors is damaged", "options", "export"),
    damaged("half a request for training", content("4-training/request.json", "{"),
            r"4-training/request\.json cannot be read", "files"),
]  # fmt: skip

# 8. Export, compare and plan.

NO_RESULT = "must be numbers with commas between"
OTHERS = [
    Wrong("export to rank 0", "--rank 0", r"export rank is 0, but must lie in \[1, 4\]", command="export"),
    Wrong("export to a negative rank", "--rank -2", "export rank is -2", command="export"),
    Wrong("export to more than there is", "--rank 5", r"export rank is 5, but must lie in \[1, 4\]", command="export"),
    Wrong("export to half a rank", "--rank 1.5", "'--rank': '1.5' is not a valid integer", command="export"),
    Wrong("a rank for merged weights", "--merged --rank 2", "--rank is for adapters only", command="export"),
    Wrong("export to a file", "--to HERE/x", "the export folder HERE/x .*is a file", command="export", files={"x": ""}),
    Wrong("export below a file", "--to HERE/x/y", "HERE/x is a file", command="export", files={"x": ""}),
    Wrong("export over other files", "--to HERE", "HERE holds 'precious.txt', and no folora.json",
          command="export", files={"precious.txt": "a"}),
    Wrong("export beside an adapter's files", "--to HERE", "HERE holds 'adapter_config.json', and no folora.json",
          command="export", files={"precious.txt": "a", "adapter_config.json": "{}"}),
    Wrong("merged weights over other files", "--merged --to HERE", "HERE holds 'precious.txt'",
          command="export", files={"precious.txt": "a"}),
    model("merged weights over the base", lambda _: None, "HERE/model holds 'config.json', and no folora.json",
          "options", command="export", arguments="--merged --to HERE/model"),
    model("merged weights of another model", another(lambda: make_llama(seed=1)),
          "is not the model that was trained in", command="export", arguments="--merged --to HERE/new"),
    Wrong("an unknown method", "--methods folora,loar", "unknown method 'loar'.*did you mean 'lora'", command="compare"),
    Wrong("no method", "--methods ''", "unknown method ''", command="compare"),
    Wrong("a comma too many", "--methods folora,", "unknown method ''", command="compare"),
    Wrong("learning rates in words", "--learning-rates low,high", f"--learning-rates is 'low,high', but {NO_RESULT}",
          command="compare"),
    Wrong("no learning rate", "--learning-rates ''", f"--learning-rates is '', but {NO_RESULT}", command="compare"),
    Wrong("learning rates between spaces", "--learning-rates '1e-3 1e-4'", NO_RESULT, command="compare"),
    Wrong("a learning rate of 0", "--learning-rates 1e-3,0", r"learning_rate is 0\.0", command="compare"),
    Wrong("an infinite learning rate", "--learning-rates inf", "learning_rate is inf", command="compare"),
    Wrong("half a seed", "--seeds 1.5", f"--seeds is '1.5', but {NO_RESULT}", command="compare"),
    Wrong("a negative seed", "--seeds 0,-1", r"training\.seed is -1", command="compare"),
    Wrong("a method too large for the model", "--r 20 --methods folora,milora",
          r"adapter\.r .*'minor_singular' is 20, but .*k_proj", "model", command="compare"),
    Wrong("compare with a method of one run", "--method lora --methods lora", "folora compare does not use --method",
          command="compare"),
    Wrong("plan for no process", "--processes 0", "--processes is 0, but must be >= 1", "files", command="plan"),
    Wrong("plan for half a process", "--processes 1.5", "'--processes': '1.5' is not a valid integer", command="plan"),
    Wrong("plan for no model", "--model HERE/none", "HERE/none does not exist", "files", command="plan"),
    Wrong("plan for no data", "--dataset HERE/none.jsonl", r"none\.jsonl does not exist", "files", command="plan"),
    Wrong("plan on no device", "--device cuda:77 ", "device is 'cuda:77'", "files", command="plan"),
    Wrong("plan with r beyond a width", "--r 33", r"adapter\.r is 33", "files", command="plan"),
    Wrong("plan with targets that match nothing", "--adapter.target_modules '[foo]'", "'foo' matches no", "files",
          command="plan"),
    Wrong("plan with the output layer", "--adapter.target_modules '[lm_head]'", "output layer lm_head", "files",
          command="plan"),
    model("plan for an encoder and a decoder", another(t5), "T5ForConditionalGeneration, an encoder-decoder model, but must", "files",
          command="plan"),
    model("plan for a model of pictures", another(vit), "is a ViTModel, for which transformers has no", "files", command="plan"),
    model("plan for a broken config", content("config.json", "{"), "not a valid JSON", "files", command="plan"),
    Wrong("an output layer for one stage", "--adapter.target_modules '[lm_head]'", "output layer lm_head", "files",
          command="sample"),
    Wrong("r beyond a width for one stage", "--r 33", r"adapter\.r is 33", "files", command="sample"),
    Wrong("no data for one stage", "--dataset HERE/none.jsonl", r"none\.jsonl does not exist", command="measure"),
]  # fmt: skip

KINDS = {
    "command line": COMMANDS,
    "value": VALUES,
    "config file": FILES,
    "data": DATA,
    "chat": CHATS,
    "model": MODELS,
    "tokenizer": TOKENIZERS,
    "output": OUTPUTS,
    "other": OTHERS,
}
