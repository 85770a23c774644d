"""Pack a trained model whose data are not here: checked as it is served, but not judged."""

from __future__ import annotations

import json
from pathlib import Path

from pollard.bundle.v1 import bundle_pb2
from pollard.compress import bundling, kept_weights
from pollard.compress.candidates import build
from pollard.compress.errors import UsageInvalid
from pollard.compress.models import load_model, resolve
from pollard.compress.pipeline import require_weights, torch_threads
from pollard.compress.progress import Reporter
from pollard.compress.spec import InputSpec
from pollard.runtime.bundle import Bundle
from pollard.runtime.digests import sha256_file

_MAX_LABELS_BYTES = 4 * 1024**2


def pack(
    model: str,
    labels: Path | str,
    out: Path | str,
    *,
    weights: str,
    spec: InputSpec | None = None,
    threads: int | None = None,
    force: bool = False,
    keep_weights: bool = False,
    reporter: Reporter | None = None,
) -> Bundle:
    """Write a float bundle of a model with its labels; no accuracy is claimed.

    The file is compared with PyTorch and run as a server would.

    Args:
        model: As for :func:`pollard.compress.models.resolve`.
        labels: Text file with one label a line, in the order of the logits.
        out: Directory of the bundle; it appears complete or not at all.
        weights: As for :func:`pollard.compress.models.load_model`.
        spec: What the model takes.
        threads: PyTorch's.
        force: Replace a bundle that is there.
        keep_weights: Keep the network's weights in it, to train on.
        reporter: Told of progress.

    Raises:
        CompressionError: model, weights, labels or output cannot be used.
        RuntimeFault: the bundle does not pass the checks of a server.
    """
    reporter, out = reporter or Reporter(), Path(out)
    bundling.check_output(out, force=force)
    source = resolve(model, spec)
    if keep_weights:
        source.require_pytorch("keeping weights to train on")
    require_weights(weights, source)
    names = read_labels(Path(labels))
    with torch_threads(threads), bundling.staging(out, force=force) as stage:
        loaded = load_model(source, weights, classes=len(names))
        work = stage / "work"
        work.mkdir()
        with reporter.step("Exporting", 1):
            (candidate,) = build("parent", loaded.module, source.spec, work)
        figures = bundle_pb2.Measurement(
            target=candidate.target,
            size_bytes=candidate.size_bytes,
            macs=candidate.macs,
            parameters=candidate.parameters,
        )
        recipe = {
            "model": source.reference,
            "weights": Path(weights).name,
            "labels_digest": sha256_file(Path(labels)),
        }
        origin = bundling.Origin(
            source.name, source.reference, json.dumps(recipe), 0, names, "", loaded.weights_digest,
            source.task,
        )  # fmt: skip
        bundling.write_variant(
            stage / bundling.BUNDLE, candidate, figures, None, origin, source.spec,
            kept_weights.files(loaded.module, keep_weights), candidate.target,
        )  # fmt: skip
    return Bundle(out, (out / "manifest.json").read_bytes())


def read_labels(path: Path) -> list[str]:
    """Read one label a line.

    Raises:
        UsageInvalid: the file cannot be read, is empty, or has an empty line in its midst.
    """
    try:
        if path.stat().st_size > _MAX_LABELS_BYTES:
            raise UsageInvalid(f"{path} is too large for labels ({path.stat().st_size:,} bytes)")
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageInvalid(f"the labels {path} cannot be read: {error}") from error
    while names and not names[-1]:
        names.pop()
    if len(names) < 2:
        raise UsageInvalid(f"{path} holds {len(names)} label(s); give one a line, at least two")
    if "" in names:
        raise UsageInvalid(f"line {names.index('') + 1} of {path} is empty; each is a label")
    return names
