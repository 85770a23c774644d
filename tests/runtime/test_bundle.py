from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.bundle import (
    MANIFEST,
    Bundle,
    check_manifest,
    is_safe_path,
    parse_manifest,
    write_bundle,
)
from pollard.runtime.digests import sha256_bytes
from pollard.runtime.errors import BundleCorrupt, ManifestInvalid


def test_a_written_bundle_opens_again_with_the_same_digest(make_bundle):
    bundle = make_bundle(classes=4)
    again = Bundle.open(bundle.path)
    assert again.digest == bundle.digest
    assert again.digest == sha256_bytes((bundle.path / MANIFEST).read_bytes())
    assert again.labels == ["class 0", "class 1", "class 2", "class 3"]
    assert again.size_bytes == sum(
        path.stat().st_size
        for path in bundle.path.rglob("*")
        if path.is_file() and path.name != MANIFEST
    )


def test_golden_inputs_and_outputs_are_read_by_name(make_bundle):
    golden = make_bundle().golden("cpu-fp32")
    assert golden.inputs["image"].shape == (2, 8, 8, 1)
    assert golden.inputs["image"].dtype == np.uint8
    assert golden.outputs["scores"].shape == (2, 3)


def test_every_flipped_bit_is_found(make_bundle):
    bundle = make_bundle()
    for file in bundle.manifest.files:
        path = bundle.path / file.path
        good = path.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 0x10
        path.write_bytes(bad)
        with pytest.raises(BundleCorrupt, match="damaged") as caught:
            Bundle.open(bundle.path)
        assert caught.value.metadata["path"] == file.path
        path.write_bytes(good)
    Bundle.open(bundle.path)


def test_a_flipped_bit_in_the_manifest_is_found_by_the_expected_digest(make_bundle):
    bundle = make_bundle()
    raw = (bundle.path / MANIFEST).read_bytes()
    (bundle.path / MANIFEST).write_bytes(raw.replace(b'"linear"', b'"lineaR"'))
    with pytest.raises(BundleCorrupt, match="expected"):
        Bundle.open(bundle.path, expect=bundle.digest)


@pytest.mark.parametrize(
    "damage",
    [
        lambda root: (root / "labels.txt").unlink(),
        lambda root: (root / "labels.txt").write_bytes(b""),
        lambda root: (root / "extra").write_bytes(b"x"),
        lambda root: (root / "link").symlink_to("/etc/passwd"),
        lambda root: (root / "dirlink").symlink_to("/etc"),
    ],
    ids=["missing", "truncated", "unlisted", "link", "directory link"],
)
def test_missing_truncated_unlisted_and_linked_files_are_refused(make_bundle, damage):
    bundle = make_bundle()
    damage(bundle.path)
    with pytest.raises(BundleCorrupt):
        Bundle.open(bundle.path)


def test_a_listed_file_replaced_by_a_link_is_refused(make_bundle, tmp_path: Path):
    bundle = make_bundle()
    elsewhere = tmp_path / "elsewhere"
    os.rename(bundle.path / "labels.txt", elsewhere)
    (bundle.path / "labels.txt").symlink_to(elsewhere)
    with pytest.raises(BundleCorrupt, match="not a regular file"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"unknown_field": 1}'])
def test_a_manifest_that_cannot_be_parsed_is_refused(content):
    with pytest.raises(ManifestInvalid):
        parse_manifest(content)


def test_a_huge_manifest_is_refused_before_parsing():
    with pytest.raises(ManifestInvalid, match="longer"):
        parse_manifest(b" " * (5 * 1024 * 1024))


def test_a_deeply_nested_manifest_is_refused():
    with pytest.raises(ManifestInvalid):
        parse_manifest(b'{"variants":' * 5000)


def test_a_directory_without_manifest_is_not_a_bundle(tmp_path: Path):
    with pytest.raises(ManifestInvalid, match="not a bundle"):
        Bundle.open(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ManifestInvalid, match="not a directory"):
        Bundle.open(tmp_path / "file")


def _edit(bundle: Bundle, change) -> bundle_pb2.Manifest:
    manifest = bundle_pb2.Manifest()
    manifest.CopyFrom(bundle.manifest)
    change(manifest)
    return manifest


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda m: setattr(m, "schema_version", 0), "schema_version"),
        (lambda m: setattr(m, "schema_version", 2), "schema_version"),
        (lambda m: m.ClearField("variants"), "variants"),
        (lambda m: m.ClearField("inputs"), "inputs"),
        (lambda m: m.ClearField("outputs"), "outputs"),
        (lambda m: m.inputs.append(m.inputs[0]), "inputs"),
        (lambda m: setattr(m.inputs[0], "data_type", 0), "data_type"),
        (lambda m: m.inputs[0].shape.append(0), "shape"),
        (lambda m: m.inputs[0].shape.append(-2), "shape"),
        (lambda m: setattr(m.files[0], "path", "../up"), "files"),
        (lambda m: setattr(m.files[0], "path", "/etc/passwd"), "files"),
        (lambda m: setattr(m.files[0], "sha256", "XYZ"), "files"),
        (lambda m: m.files.append(m.files[0]), "files"),
        (lambda m: setattr(m.variants[0], "name", ""), "variants"),
        (lambda m: setattr(m.variants[0], "target", "abacus"), "target"),
        (lambda m: setattr(m.variants[0], "model_file", "absent"), "model_file"),
        (lambda m: setattr(m.variants[0], "golden_file", "absent"), "golden_file"),
        (lambda m: setattr(m.postprocess, "labels_file", "absent"), "labels_file"),
        (lambda m: setattr(m.postprocess.classification, "output", "no"), "classification.output"),
        (
            lambda m: setattr(m.postprocess.detection, "boxes_output", "no"),
            "detection.boxes_output",
        ),
        (lambda m: m.postprocess.detection.SetInParent(), "detection.boxes_output"),
        (lambda m: _detection(m, scores_output=""), "detection.scores_output"),
        (lambda m: _detection(m, boxes_output="scores"), "detection.boxes_output"),
        (lambda m: _detection(m, scores_output="boxes", labels_output="boxes"), "scores_output"),
        (lambda m: _detection(m, score_threshold=1.5), "detection.score_threshold"),
        (lambda m: _detection(m, iou_threshold=float("nan")), "detection.iou_threshold"),
        (lambda m: m.postprocess.segmentation.palette.extend([1, 2]), "segmentation.palette"),
        (lambda m: m.postprocess.segmentation.palette.extend([1, 2, 256]), "segmentation.palette"),
    ],
)
def test_an_impossible_manifest_is_refused_and_the_field_is_named(make_bundle, change, field):
    with pytest.raises(ManifestInvalid, match=field.replace(".", r"\.")):
        check_manifest(_edit(make_bundle(), change))


def _detection(manifest: bundle_pb2.Manifest, **fields) -> None:
    for name, shape in (("boxes", [-1, 9, 4]), ("all", [-1, 9, 3])):
        manifest.outputs.add(name=name, data_type=bundle_pb2.DATA_TYPE_FP32, shape=shape)
    settings = {"boxes_output": "boxes", "scores_output": "all", **fields}
    manifest.postprocess.detection.CopyFrom(bundle_pb2.Detection(**settings))


def test_a_detector_of_the_right_shapes_is_taken(make_bundle):
    check_manifest(_edit(make_bundle(), lambda m: _detection(m, iou_threshold=0.5)))


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "a/../b", "/a", "a//b", "a/", "./a", "a\\b", "a\0b", "../a", "a" * 256],
)
def test_unsafe_paths(path):
    assert not is_safe_path(path)


@pytest.mark.parametrize("path", ["a", "a/b.onnx", "cpu-int8/model.onnx", "ä/ö", "..a"])
def test_safe_paths(path):
    assert is_safe_path(path)


def test_writing_into_a_directory_that_holds_something_is_refused(make_bundle, tmp_path: Path):
    bundle = make_bundle()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        write_bundle(tmp_path / "full", bundle.manifest, {})
    assert (tmp_path / "full" / "x").read_text() == "mine"


def test_the_manifest_is_plain_json_with_the_contract_s_names(make_bundle):
    raw = json.loads((make_bundle().path / MANIFEST).read_text())
    assert raw["schema_version"] == 1
    assert raw["variants"][0]["model_file"] == "cpu-fp32/model.onnx"
