"""Wrong output folders, damaged runs, and wrong inputs of export, compare and plan."""

from __future__ import annotations

from support.wrong_inputs.cases import Wrong, damaged, model, options_file
from support.wrong_inputs.edits import another, content, cut, json_file, removed, resealed, t5, vit

from benchmarks.tiny import make_llama

OUTPUTS = [
    Wrong("a file as output", "--output HERE/x", "output HERE/x is a file", files={"x": ""}),
    Wrong("an output below a file", "--output HERE/x/run", "HERE/x is a file", files={"x": ""}),
    Wrong("an output several folders below a file", "--output HERE/x/a/b/c", "HERE/x is a file", files={"x": ""}),
    Wrong("an output with too long a name", f"--output HERE/{'x' * 300}", "not a valid folder name"),
    options_file("an output with a null byte", 'model: m\ndataset: d.jsonl\noutput: "a\\0b"\n',
                 "not a valid folder name"),
    *(
        Wrong(f"{command} before its inputs exist", "--output HERE/new",
              rf"{part} is missing; run folora {before} first", "files", command=command)
        for command, part, before in (
            ("measure", "1-samples/set", "sample"),
            ("solve", "2-statistics/pre", "measure"),
            ("train", "1-samples/set", "sample"),
        )
    ),
    Wrong("export before its inputs exist", "--output HERE/new",
          "4-training/result is missing; run folora train first", command="export"),
]  # fmt: skip

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
        ("an old format version", lambda f: json_file(f, format_version=1), "format version 1, this folora reads 3"),
        ("another kind", lambda f: resealed(f, kind="other"), "holds 'other', but"),
        ("a modified value", lambda f: json_file(f, kind="other"), "is damaged: its checksum"),
        ("invalid bytes", lambda f: content(f, b"\xff{"), "cannot be read"),
    )
]  # fmt: skip
OUTPUTS += [
    damaged(f"another model's {part}", resealed(f"{part}/manifest.json", model="0" * 64),
            f"{part} belongs to another model", "model", command)
    for part, command in STAGES.items()
    if command != "export"
]  # fmt: skip
OUTPUTS += [
    damaged("a list as manifest", content("3-spectrum/manifest.json", "[]"), "3-spectrum/manifest.json has format version 1",
            "files"),
    damaged("a truncated sampling request", content("1-samples/request.json", "{"), r"request\.json cannot be read", "files"),
    damaged("truncated samples", cut("1-samples/set/tensors.safetensors", 99), "is damaged: its checksum", "model"),
    damaged("statistics without tensors", removed("2-statistics/pre/tensors.safetensors"),
            r"pre/tensors\.safetensors cannot be read.*No such file", "model", "solve"),
    damaged("an invalid training result", content("4-training/result/tensors.safetensors", "x"),
            "result/tensors.safetensors is damaged", "options", "export"),
    damaged("a truncated training request", content("4-training/request.json", "{"),
            r"4-training/request\.json cannot be read", "files"),
]  # fmt: skip

NO_RESULT = "must be numbers with commas between"
OTHERS = [
    Wrong("export to rank 0", "--rank 0", r"export rank is 0, but must lie in \[1, 4\]", command="export"),
    Wrong("export to a negative rank", "--rank -2", "export rank is -2", command="export"),
    Wrong("export to a rank above the adapter's", "--rank 5", r"export rank is 5, but must lie in \[1, 4\]", command="export"),
    Wrong("export to a fractional rank", "--rank 1.5", "'--rank': '1.5' is not a valid integer", command="export"),
    Wrong("a rank for a merged export", "--merged --rank 2", "--rank is for adapters only", command="export"),
    Wrong("export to a file", "--to HERE/x", "the export folder HERE/x .*is a file", command="export", files={"x": ""}),
    Wrong("export below a file", "--to HERE/x/y", "HERE/x is a file", command="export", files={"x": ""}),
    Wrong("export over other files", "--to HERE", "HERE holds 'precious.txt', and no folora.json",
          command="export", files={"precious.txt": "a"}),
    Wrong("export beside an adapter's files", "--to HERE", "HERE holds 'adapter_config.json', and no folora.json",
          command="export", files={"precious.txt": "a", "adapter_config.json": "{}"}),
    Wrong("a merged export over other files", "--merged --to HERE", "HERE holds 'precious.txt'",
          command="export", files={"precious.txt": "a"}),
    model("a merged export over the base", lambda _: None, "HERE/model holds 'config.json', and no folora.json",
          "options", command="export", arguments="--merged --to HERE/model"),
    model("a merged export of another model", another(lambda: make_llama(seed=1)),
          "is not the model that was trained in", command="export", arguments="--merged --to HERE/new"),
    Wrong("an unknown method", "--methods folora,loar", "unknown method 'loar'.*did you mean 'lora'", command="compare"),
    Wrong("no method", "--methods ''", "unknown method ''", command="compare"),
    Wrong("a trailing comma", "--methods folora,", "unknown method ''", command="compare"),
    Wrong("learning rates as words", "--learning-rates low,high", f"--learning-rates is 'low,high', but {NO_RESULT}",
          command="compare"),
    Wrong("no learning rate", "--learning-rates ''", f"--learning-rates is '', but {NO_RESULT}", command="compare"),
    Wrong("learning rates separated by spaces", "--learning-rates '1e-3 1e-4'", NO_RESULT, command="compare"),
    Wrong("a learning rate of 0", "--learning-rates 1e-3,0", r"learning_rate is 0\.0", command="compare"),
    Wrong("an infinite learning rate", "--learning-rates inf", "learning_rate is inf", command="compare"),
    Wrong("a fractional seed", "--seeds 1.5", f"--seeds is '1.5', but {NO_RESULT}", command="compare"),
    Wrong("a negative seed", "--seeds 0,-1", r"training\.seed is -1", command="compare"),
    Wrong("a method too large for the model", "--r 20 --methods folora,milora",
          r"adapter\.r .*'minor_singular' is 20, but .*k_proj", "model", command="compare"),
    Wrong("compare with an option of run", "--method lora --methods lora", "folora compare does not use --method",
          command="compare"),
    Wrong("plan for zero processes", "--processes 0", "--processes is 0, but must be >= 1", "files", command="plan"),
    Wrong("plan for a fractional number of processes", "--processes 1.5", "'--processes': '1.5' is not a valid integer", command="plan"),
    Wrong("plan for a missing model", "--model HERE/none", "HERE/none does not exist", "files", command="plan"),
    Wrong("plan for missing data", "--dataset HERE/none.jsonl", r"none\.jsonl does not exist", "files", command="plan"),
    Wrong("plan on an unavailable device", "--device cuda:77 ", "device is 'cuda:77'", "files", command="plan"),
    Wrong("plan with r above a layer's width", "--r 33", r"adapter\.r is 33", "files", command="plan"),
    Wrong("plan with target_modules that match nothing", "--adapter.target_modules '[foo]'", "'foo' matches no", "files",
          command="plan"),
    Wrong("plan with the output layer", "--adapter.target_modules '[lm_head]'", "output layer lm_head", "files",
          command="plan"),
    model("plan for an encoder-decoder", another(t5), "T5ForConditionalGeneration, an encoder-decoder model, but must", "files",
          command="plan"),
    model("plan for a vision model", another(vit), "is a ViTModel, for which transformers has no", "files", command="plan"),
    model("plan for a broken config", content("config.json", "{"), "not a valid JSON", "files", command="plan"),
    Wrong("the output layer as target module of sample", "--adapter.target_modules '[lm_head]'", "output layer lm_head", "files",
          command="sample"),
    Wrong("r above a layer's width in sample", "--r 33", r"adapter\.r is 33", "files", command="sample"),
    Wrong("no data for measure", "--dataset HERE/none.jsonl", r"none\.jsonl does not exist", command="measure"),
]  # fmt: skip
