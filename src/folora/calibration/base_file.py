"""The base file: a model's calibration set and C_pre in one file, to reuse for any task and to share.

Sampling takes most of a run's time and does not depend on the task. The file is safetensors: token ids, the
upper triangles of the second moments (lossless), and in the header a manifest with fingerprints and a
checksum.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from folora.calibration.calibration_set import CalibrationSet
from folora.config import BOS, LEAST_SHARE, FoLoraConfig, SamplingConfig
from folora.errors import ArtifactError, ConfigError, MismatchError
from folora.runtime.artifacts import check_manifest, read_tensors, software_versions
from folora.runtime.ownership import check_target
from folora.runtime.shapes import Float
from folora.runtime.storage import (
    Facts,
    check_regular_file,
    checked_depth,
    file_sha256,
    malformed_is_damaged,
    sealed,
    write_atomically,
)
from folora.spectral.groups import InputGroup, group_of
from folora.spectral.moments import Moments

logger = logging.getLogger(__name__)

KIND = "base"
HEADER = "folora"  # key of the manifest in the safetensors header
CONTENTS = "contents"  # of sources: SHA-256 of each file


@dataclass(frozen=True)
class BaseFile:
    """The contents of a base file.

    Attributes:
        samples: The calibration set.
        groups: The layer inputs that were measured.
        triangles: By group name, the upper triangle of C_pre, row by row, (d (d + 1) / 2,) float32.
        manifest: Fingerprints and counts.
        path: Path of the file.
    """

    samples: CalibrationSet
    groups: list[InputGroup]
    triangles: dict[str, Tensor]
    manifest: Facts
    path: Path

    def moments(self, groups: Sequence[InputGroup]) -> Moments:
        """C_pre of the groups; a group may be a subset of one in the file.

        Raises:
            ConfigError: The input of a group was not measured.
        """
        found = {}
        for group in groups:
            home = next((g for g in self.groups if {*group.layers} <= {*g.layers}), None)
            if home is None or home.d_in != group.d_in:
                raise ConfigError(
                    f"{self.path} has no C_pre of the input of {group.name}; it was made for other target "
                    "modules. Make one for these or for all layers: folora base"
                )
            found[group.name] = unpacked(self.triangles[home.name], group.d_in)
        return Moments(found, self.manifest["tokens"], tuple(groups))


def packed(matrix: Float[Tensor, "d d"]) -> Float[Tensor, " n"]:
    """The upper triangle of a symmetric matrix, row by row."""
    return matrix[torch.ones_like(matrix, dtype=torch.bool).triu()]


def unpacked(triangle: Float[Tensor, " n"], d: int) -> Float[Tensor, "d d"]:
    """The symmetric matrix with this upper triangle."""
    matrix = triangle.new_zeros(d, d)
    matrix[torch.ones_like(matrix, dtype=torch.bool).triu()] = triangle
    return matrix + matrix.triu(1).T


def write_base_file(
    path: Path,
    samples: CalibrationSet,
    moments: Moments,
    facts: Mapping[str, Any],
) -> None:
    """Write calibration set and C_pre atomically; `facts` identify model and tokenizer. Raises ArtifactError."""
    tensors, written = samples.to_artifact()
    tensors |= {f"{n}/c_pre": packed(m.cpu().float()) for n, m in moments.matrices.items()}
    manifest = {
        "kind": KIND,
        "sha256": tensors_sha256(tensors),
        "versions": software_versions(),
        "samples": written["fingerprint"],
        "held_out": len(samples.held_out),
        "rejected": samples.rejected,
        "sources": written["sources"],
        "shares": samples.shares,
        **moments.to_artifact()[1],
        **facts,
    }
    header = {HEADER: json.dumps(sealed(manifest))}
    write_atomically(path, lambda target: save_file(tensors, target, metadata=header))


def check_base_target(path: Path, source: Path | None) -> None:
    """Refuse a path that is not a regular file, is the base file that is read, or was not written by folora.

    Raises:
        ConfigError: With the reason.
    """
    check_target(path)
    if not path.exists():
        return
    if source is not None and source.exists() and source.samefile(path):
        raise ConfigError(f"{path} is the base file that is read; choose another path to write to")
    try:
        read_base_manifest(path)
    except ArtifactError as error:
        raise ConfigError(
            f"{path} would be replaced, but folora did not write it ({error}); move it away, or choose "
            "another path"
        ) from error


def read_base_manifest(path: Path, expected: Mapping[str, Any] | None = None) -> Facts:
    """Read and verify the manifest without reading the tensors.

    If `expected`, the `fingerprints.model_facts` of the model to adapt, has the same weights in another dtype,
    the file is accepted; samples and C_pre were then computed in that dtype.

    Raises:
        ArtifactError: Missing, damaged, or not a base file.
        MismatchError: Made from another model or tokenizer.
    """
    check_regular_file(path)
    try:
        with safe_open(path, "pt") as file:
            manifest = checked_depth(json.loads((file.metadata() or {}).get(HEADER, "null")))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; create it with folora base") from None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ArtifactError(f"{path} is not a base file: {error}") from error
    if manifest is None:
        raise ArtifactError(f"{path} is not a base file: its header has no entry {HEADER!r}")
    found = check_manifest(manifest, path, path, KIND)
    if expected and found.get("model") == expected["model"]:
        expected = {name: value for name, value in expected.items() if name != "dtype"}
    return check_manifest(manifest, path, path, KIND, expected)


def base_contents(config: FoLoraConfig) -> dict[str, str]:
    """The `CONTENTS` of a base file to write: of the files that ``sampling.sources`` names now, or of ``config.base``."""
    if config.base is not None:
        return read_base_manifest(Path(config.base)).get(CONTENTS, {})
    return _contents(config.sampling)


def _contents(config: SamplingConfig) -> dict[str, str]:
    files = {name: Path(name.partition(":")[2]) for name in config.sources or {} if ":" in name}
    return {name: file_sha256(file) for name, file in files.items() if file.is_file()}


def check_base_sources(manifest: Facts, config: SamplingConfig) -> None:
    """Refuse a base file made from other sources than the config asks for, other shares or contents of them.

    Files of earlier versions record no contents. Raises MismatchError.
    """
    has, asked = manifest.get("shares") or {BOS: 1.0}, config.sources  # before sources: bos alone
    if asked is None:
        return
    if unlike := unlike_shares(has, asked):
        found, wanted = unlike
    else:
        now = _contents(config)
        other = [name for name, sha in manifest.get(CONTENTS, {}).items() if now.get(name) != sha]
        if not other:
            return
        found, wanted = f"{other[0]} with other contents", "the present ones"
    raise MismatchError(
        f"{manifest.file} has text of {found}, but sampling.sources asks for {wanted}; leave sampling.sources out, "
        "or make another file with folora base"
    )


def unlike_shares(has: Mapping[str, float], asked: Mapping[str, float]) -> tuple[str, str] | None:
    """How text that has sources in these shares and what is asked for are called; None if they agree.

    Shares of accepted sequences may differ from those asked for by the least share.
    """
    if {*has} != {*asked}:
        return ", ".join(has), ", ".join(asked)
    if all(abs(has[name] - asked[name]) <= LEAST_SHARE for name in has):
        return None
    shown = [", ".join(f"{n} ({share:.0%})" for n, share in s.items()) for s in (has, asked)]
    return shown[0], shown[1]


def warn_of_dtype(manifest: Facts, dtype: str) -> None:
    """Log a warning if a base file was made in another dtype than `dtype`."""
    if manifest["dtype"] != dtype:
        logger.warning(
            "%s was made in %s, but the model is loaded in %s, so C_pre is rounded differently; use "
            "--dtype %s for identical numbers",
            manifest.file, manifest["dtype"], dtype, manifest["dtype"],
        )  # fmt: skip


def read_base_file(path: Path, expected: Mapping[str, Any] | None = None) -> BaseFile:
    """Read a base file and verify its manifest and checksum; see `read_base_manifest`."""
    manifest = read_base_manifest(path, expected)
    tensors = read_tensors(path)
    if (found := tensors_sha256(tensors)) != manifest["sha256"]:
        raise ArtifactError(
            f"{path} is damaged: its checksum is {found[:12]}, its header records "
            f"{str(manifest['sha256'])[:12]}. Download it again, or recreate it with folora base."
        )
    with malformed_is_damaged(path):
        groups = [group_of(fact) for fact in manifest["groups"]]
        if type(manifest["tokens"]) is not int:
            raise ValueError(f"the number of tokens is {manifest['tokens']!r:.80}")
        written = {**manifest, "sequences": [None, manifest["held_out"]]}
        samples = CalibrationSet.from_artifact(tensors, written)
        triangles = {g.name: tensors[f"{g.name}/c_pre"] for g in groups}
        for g in groups:
            triangle, size = triangles[g.name], g.d_in * (g.d_in + 1) // 2
            if triangle.shape != (size,) or triangle.dtype != torch.float32:
                raise ValueError(
                    f"the triangle of {g.name} has {tuple(triangle.shape)} values of {triangle.dtype}, "
                    f"but must have {size} of float32"
                )
    return BaseFile(samples, groups, triangles, manifest, path)


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    result = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        result.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        result.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()
