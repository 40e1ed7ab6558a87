"""Everything of folora that parses a file: a valid file for each, what reads it, and how its checksums are mended."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pyarrow as pa
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from benchmarks.paper.recipe import read_recipe
from benchmarks.plan import Plan
from benchmarks.reliability.mutations import parts_of, tensors_of, with_metadata
from benchmarks.tiny import make_tokenizer, rows
from folora.calibration.base_file import HEADER, read_base_file, tensors_sha256, write_base_file
from folora.calibration.calibration_set import CalibrationSet
from folora.calibration.sampling import sample_sequences
from folora.compare.arms import checked_arm
from folora.compare.results import ResultFile, load_results, point_sets
from folora.config import FoLoraConfig
from folora.data.files import load_rows
from folora.data.rows import prepare_task
from folora.errors import ConfigError
from folora.pipeline.stages import KeepMoments, Samples, Solved, TaskMoments
from folora.pipeline.training import Trained, Training
from folora.runtime.artifacts import read_manifest
from folora.runtime.checkpoints import SEAL, latest_checkpoint
from folora.runtime.storage import CHECKSUM, read_sealed, sealed
from folora.spectral.layers import Spectrum, solve
from folora.spectral.moments import Moments

HERE = Path(__file__).parents[1]
PLAN, RECIPE = "plans/world_seeds.yaml", "paper/recipes/qwen3-1.7b-math.yaml"
RESULTS = "results/world_seeds.jsonl"
MODEL_FACTS = ("dtype", "model_config", "model", "tokenizer")

Files = dict[str, bytes]


@dataclass(frozen=True)
class Parser:
    """One of folora's parsers with files that it reads.

    Attributes:
        files: Valid files, by path in a folder.
        changed: Those of them that are changed, one at a time; what stands here twice, twice as often.
        parse: Reads the files in a folder; what it returns is compared.
        reseal: Makes the checksums right again after one file was changed: files before, files
            after, and its path; None if there are no checksums.
    """

    files: Files
    changed: Sequence[str]
    parse: Callable[[Path], object]
    reseal: Callable[[Files, Files, str], Files] | None = None


def parsers(run: Path) -> dict[str, Parser]:
    """All of them, by name.

    Args:
        run: The folder of a finished run of `benchmarks.tiny`, with its checkpoints.
    """
    return {
        **_data(make_tokenizer(chat=True)),
        **_artifacts(run),
        **_sampling(run),
        "checkpoint": _checkpoint(run),
        "base file": _base_file(run),
        **_comparisons(),
        "config (YAML)": _config(run),  # the slow ones last: they get what time is left
        "plan (YAML)": _plan(),
        "recipe (YAML)": _recipe(),
    }


def resealed(before: Files, after: Files, name: str) -> Files:
    """Checksums of a changed file put right wherever they stand, as whoever can write them could."""
    old, new = (hashlib.sha256(files[name]).hexdigest().encode() for files in (before, after))
    return {path: _sealed_again(content.replace(old, new)) for path, content in after.items()}


def _sealed_again(content: bytes) -> bytes:
    try:
        values = json.loads(content)
        if not isinstance(values, dict) or CHECKSUM not in values:
            return content
        del values[CHECKSUM]
        return json.dumps(sealed(values), indent=1).encode()
    except (ValueError, RecursionError):  # no JSON any more
        return content


def _config(run: Path) -> Parser:
    content = (run / "config.yaml").read_bytes()
    return Parser(
        {"config.yaml": content},
        ["config.yaml"],
        lambda folder: FoLoraConfig.from_yaml(folder / "config.yaml").to_yaml(),
    )


def _data(tokenizer: PreTrainedTokenizerBase) -> dict[str, Parser]:
    """Every format of data files, and every naming of columns."""
    sums = rows()[:12]
    asked = [
        {"instruction": "add", "input": r["prompt"], "response": r["completion"]} for r in sums
    ]
    chats = [
        {
            "messages": [
                {"role": "user", "content": r["prompt"]},
                {"role": "assistant", "content": r["completion"]},
            ]
        }
        for r in sums
    ]
    table = pa.table(
        {"question": [r["prompt"] for r in sums], "answer": ["yes"] * 12, "n": [*range(12)]}
    )
    packed = io.BytesIO()
    parquet.write_table(table, packed)
    lines = "".join(json.dumps(row) + "\n" for row in asked).encode()
    contents = {
        "rows.json": json.dumps(chats).encode(),
        "rows.jsonl": lines,
        "rows.jsonl.gz": gzip.compress(
            "".join(json.dumps(r) + "\n" for r in sums).encode(), mtime=0
        ),
        "rows.parquet": packed.getvalue(),
    }

    def parser(name: str, content: bytes) -> Parser:
        def parse(folder: Path) -> object:
            return prepare_task(load_rows(str(folder / name)), tokenizer, FoLoraConfig().data)

        return Parser({name: content}, [name], parse)

    return {f"data ({name[4:]})": parser(name, content) for name, content in contents.items()}


def _read(folder: Path, *names: str) -> Files:
    """Files of a folder, or all that are below it, by path."""
    paths = (
        [folder / n for n in names]
        if names
        else [p for p in sorted(folder.rglob("*")) if p.is_file()]
    )
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def _artifacts(run: Path) -> dict[str, Parser]:
    """The artifact of every stage, manifest and tensors, and what the next stage makes of it."""
    groups = Spectrum.load(run / Solved.path).groups

    def statistics(folder: Path) -> object:
        found = [Moments.load(folder / part) for part in ("pre", "task")]
        if any(moments.groups != groups for moments in found):
            return found  # as in the pipeline, which then refuses it
        first = (Moments(m.matrices, m.tokens, groups[:1]) for m in found)
        return found, solve(*first, tau=1e-3)

    both = ("manifest.json", "tensors.safetensors")
    parts = {
        f"{part}/{file}": (run / place / file).read_bytes()
        for part, place in (("pre", KeepMoments.path), ("task", TaskMoments.path))
        for file in both
    }
    one = {place: _read(run / place, *both) for place in (Solved.path, Training.path)}
    samples = _read(run / "1-samples", *(f"set/{file}" for file in both))
    return {
        "samples": Parser(
            samples, [*samples], lambda folder: CalibrationSet.load(folder / "set"), resealed
        ),
        "statistics": Parser(parts, [*parts], statistics, resealed),
        "spectrum": Parser(one[Solved.path], both, Spectrum.load, resealed),
        "training result": Parser(one[Training.path], both, Trained.load, resealed),
    }


def _drawn(numbers: Sequence[int]) -> list[list[int]]:
    """An engine that needs no model."""
    return [[Random(number).randint(4, 50) for _ in range(40)] for number in numbers]


def _sampling(run: Path) -> dict[str, Parser]:
    """A sampling that was interrupted, and is resumed."""
    folder = run / "1-samples"
    files = _read(folder, *(p.name for p in sorted(folder.glob("*.json"))))
    config = FoLoraConfig.from_yaml(run / "config.yaml").sampling

    def parse(found: Path) -> object:
        return sample_sequences(_drawn, 1, [2], config, found)

    shards = [name for name in files if name.startswith("shard")]
    return {
        "request": Parser(
            files, ["request.json"], lambda found: read_sealed(found / "request.json"), resealed
        ),
        "shard": Parser(files, shards, parse, resealed),
    }


def _checkpoint(run: Path) -> Parser:
    latest = latest_checkpoint(run / "4-training")
    if latest is None:
        raise ConfigError(f"{run} has no checkpoint to change")
    files = {f"{latest.name}/{name}": content for name, content in _read(latest).items()}

    def parse(folder: Path) -> object:
        """The files that training would go on from; the seal's blanks are not among them."""
        found = latest_checkpoint(folder)
        return found and {n: c for n, c in _read(found).items() if n != SEAL}

    seal = f"{latest.name}/{SEAL}"
    return Parser(files, [seal] * len(files) + [*files], parse, resealed)


def _base_file(run: Path) -> Parser:
    pre = Moments.load(run / KeepMoments.path)
    manifest = read_manifest(run / KeepMoments.path, KeepMoments.result.kind)
    facts = {name: manifest[name] for name in MODEL_FACTS}
    name = "base.safetensors"
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        write_base_file(path, CalibrationSet.load(run / Samples.path), pre, facts)
        content = path.read_bytes()

    def parse(folder: Path) -> object:
        found = read_base_file(folder / name)
        return found.samples, found.groups, found.manifest, found.moments(pre.groups)

    return Parser({name: content}, [name], parse, _base_resealed)


def _base_resealed(before: Files, after: Files, name: str) -> Files:
    """The checksum of the tensors, which stands in the manifest, and that of the manifest."""
    try:
        texts = parts_of(after[name])[0]["__metadata__"]
        old, new = (tensors_sha256(tensors_of(files[name])) for files in (before, after))
        text = _sealed_again(texts[HEADER].replace(old, new).encode()).decode()
        return {name: with_metadata(after[name], {**texts, HEADER: text})}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return after  # no base file any more


def _comparisons() -> dict[str, Parser]:
    """A file of results, as reports read it and as a comparison that resumes."""
    content = (HERE / RESULTS).read_bytes().splitlines(keepends=True)[0]
    config = FoLoraConfig().changed(json.loads(content)["config"])
    files = {"arms.jsonl": content}

    def resumed(folder: Path) -> object:
        lines = ResultFile(folder / "arms.jsonl").read().values()
        return [checked_arm(line, config) for line in lines]

    return {
        "result": Parser(
            files, [*files], lambda folder: point_sets(load_results(folder / "arms.jsonl"))
        ),
        "arm": Parser(files, [*files], resumed),
    }


def _plan() -> Parser:
    files = _read(HERE, PLAN, "plans/world_methods.yaml")

    def parse(folder: Path) -> object:
        plan = Plan.load(folder / PLAN)
        base = FoLoraConfig().changed(plan.base)
        return plan, [base.changed({"method": arm.method, **arm.changes}) for arm in plan.arms()]

    return Parser(files, [*files], parse)


def _recipe() -> Parser:
    parts = [str(p.relative_to(HERE)) for p in sorted((HERE / "paper/parts").glob("*.yaml"))]
    files = _read(HERE, RECIPE, *parts)

    def parse(folder: Path) -> object:
        recipe = read_recipe(folder / RECIPE)
        return recipe, recipe.arms()

    return Parser(files, [RECIPE] * len(parts) + parts, parse)
