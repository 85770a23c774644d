"""Boxes, masks and vectors over gRPC: in the place where the sent image has them."""

import io

import numpy as np
import onnx
import pytest
from grpc import StatusCode, aio
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from pollard.bundle.v1 import bundle_pb2
from pollard.client import AsyncVisionClient
from pollard.preprocess.v1 import preprocess_service_pb2 as preprocess_pb
from pollard.runtime.bundle import Bundle, write_bundle
from pollard.vision.v1 import vision_service_pb2 as vision_pb

INFERENCE, PREPROCESS = 1, 2
SIDE, CELL = 32, 4
CELLS = SIDE // CELL
PALETTE = [200, 0, 0, 0, 200, 0, 0, 0, 200]


def graph(nodes, outputs, constants=()) -> bytes:
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])
    made = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        *nodes,
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
        for name, shape in outputs.items()
    ]
    model = helper.make_model(
        helper.make_graph(made, "colours", [image], values, list(constants)),
        opset_imports=[helper.make_opsetid("", 18)],
    )
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model.SerializeToString()


def detector() -> bytes:
    """Finds colours: a box for each cell of 4 × 4 pixels, scored by its mean red, green, blue."""
    left, top = np.meshgrid(np.arange(CELLS) * CELL, np.arange(CELLS) * CELL)
    corners = np.stack([left, top, left + CELL, top + CELL], axis=-1).reshape(1, -1, 4)
    return graph(
        [
            helper.make_node(
                "AveragePool", ["planes"], ["cells"], kernel_shape=[CELL] * 2, strides=[CELL] * 2
            ),
            helper.make_node("Div", ["cells", "white"], ["shares"]),
            helper.make_node("Flatten", ["shares"], ["flat"], axis=2),
            helper.make_node("Reshape", ["shares", "shape"], ["rows"]),
            helper.make_node("Transpose", ["rows"], ["scores"], perm=[0, 2, 1]),
            # One set of boxes for each image of the batch.
            helper.make_node("Shape", ["image"], ["batch"], end=1),
            helper.make_node("Concat", ["batch", "one", "one"], ["times"], axis=0),
            helper.make_node("Tile", ["corners", "times"], ["boxes"]),
        ],
        {"boxes": [CELLS * CELLS, 4], "scores": [CELLS * CELLS, 3]},
        [
            numpy_helper.from_array(np.array(255, np.float32), "white"),
            numpy_helper.from_array(np.array([0, 3, -1], np.int64), "shape"),
            numpy_helper.from_array(np.array([1], np.int64), "one"),
            numpy_helper.from_array(corners.astype(np.float32), "corners"),
        ],
    )


def segmenter() -> bytes:
    """Classes are the colours: red, green and blue."""
    return graph([helper.make_node("Identity", ["planes"], ["mask"])], {"mask": [3, SIDE, SIDE]})


def embedder() -> bytes:
    return graph(
        [
            helper.make_node("GlobalAveragePool", ["planes"], ["means"]),
            helper.make_node("Flatten", ["means"], ["vector"]),
        ],
        {"vector": [3]},
    )


def bundle(path, model: bytes, outputs, postprocess, *, letterbox: bool = True) -> Bundle:
    manifest = bundle_pb2.Manifest(name="colours", postprocess=postprocess)
    manifest.postprocess.labels_file = "labels.txt"
    task = postprocess.WhichOneof("task")
    manifest.task = bundle_pb2.Task.Value(f"TASK_{task.upper()}")
    manifest.inputs.add(
        name="image", data_type=bundle_pb2.DATA_TYPE_UINT8, shape=[-1, SIDE, SIDE, 3], layout="NHWC"
    )
    for name, shape in outputs.items():
        manifest.outputs.add(name=name, data_type=bundle_pb2.DATA_TYPE_FP32, shape=[-1, *shape])
    manifest.preprocess.add().decode.apply_exif_orientation = True
    if letterbox:
        manifest.preprocess.add().resize.CopyFrom(
            bundle_pb2.Resize(
                mode=bundle_pb2.RESIZE_MODE_LETTERBOX,
                width=SIDE,
                height=SIDE,
                interpolation=bundle_pb2.INTERPOLATION_NEAREST,
            )
        )
    else:
        manifest.preprocess.add().center_crop.CopyFrom(
            bundle_pb2.CenterCrop(width=SIDE, height=SIDE)
        )
    variant = manifest.variants.add(
        name="cpu-fp32", target="cpu-fp32", model_file="model.onnx", max_batch_size=8
    )
    variant.requirements.opset = 18
    files = {"model.onnx": model, "labels.txt": b"red\ngreen\nblue\n"}
    return write_bundle(path, manifest, files)


def make(task: str, path, **options) -> Bundle:
    post = bundle_pb2.Postprocess()
    if task == "detection":
        post.detection.CopyFrom(
            bundle_pb2.Detection(
                boxes_output="boxes", scores_output="scores", score_threshold=0.9, iou_threshold=0.5
            )
        )
        outputs = {"boxes": [CELLS**2, 4], "scores": [CELLS**2, 3]}
        return bundle(path, detector(), outputs, post, **options)
    if task == "segmentation":
        post.segmentation.CopyFrom(bundle_pb2.Segmentation(output="mask", palette=PALETTE))
        return bundle(path, segmenter(), {"mask": [3, SIDE, SIDE]}, post, **options)
    post.embedding.CopyFrom(bundle_pb2.Embedding(output="vector", l2_normalize=True))
    return bundle(path, embedder(), {"vector": [3]}, post, **options)


@pytest.fixture
async def serve(manager, start_inference, start_preprocess, tmp_path):
    """Returns a function that serves a bundle as revision 1 of "colours"."""

    async def start(task: str, *, letterbox: bool = True, **settings):
        made = make(task, tmp_path / "colours", letterbox=letterbox)
        wanted = manager.set(INFERENCE, {1: made}, {"production": {1: 1}}, model="colours")
        inference = await start_inference()
        await manager.acknowledged(wanted, "inference-1")
        manager.set(
            PREPROCESS,
            {1: made},
            {"production": {1: 1}},
            model="colours",
            endpoints=(inference.address,),
        )
        replica = await start_preprocess(**settings)
        await manager.acknowledged(manager.version, "preprocess-1")
        return replica

    return start


def picture(pixels: np.ndarray, orientation: int = 1) -> bytes:
    """A PNG whose EXIF orientation makes a reader see `pixels`."""
    image = Image.fromarray(pixels)
    if orientation == 6:
        # To be turned clockwise by the reader.
        image = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    return file.getvalue()


def scene() -> np.ndarray:
    """Red, 64 × 48, with a blue block of 16 × 8 at (40, 8)."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :, 0] = 200
    pixels[8:16, 40:56] = (0, 0, 255)
    return pixels


def question(content: bytes, **options) -> vision_pb.PredictRequest:
    return vision_pb.PredictRequest(
        model=preprocess_pb.ModelSelector(model="colours"),
        image=preprocess_pb.Image(content=content),
        options=vision_pb.PredictOptions(**options),
    )


def corners(response: vision_pb.PredictResponse) -> set[tuple[float, ...]]:
    return {(o.x1, o.y1, o.x2, o.y2) for o in response.detection.objects}


BLUE = {(40, 8, 48, 16), (48, 8, 56, 16)}
"""The block covers two cells of the tensor, which is half as large as the image."""


@pytest.mark.parametrize("orientation", [1, 6])
async def test_boxes_lie_on_the_upright_image_that_was_sent(serve, orientation):
    replica = await serve("detection")
    response = await replica.vision.Predict(question(picture(scene(), orientation)))
    assert corners(response) == BLUE
    assert {(o.label.index, o.label.label) for o in response.detection.objects} == {(2, "blue")}
    assert (response.detection.width, response.detection.height) == (64, 48)
    assert response.WhichOneof("result") == "detection"


async def test_a_lower_threshold_shows_more(serve):
    replica = await serve("detection")
    content = picture(scene())
    all_of_them = await replica.vision.Predict(question(content, score_threshold=0.7))
    red = [o for o in all_of_them.detection.objects if o.label.label == "red"]
    # The image fills 32 × 24 pixels of the tensor; two of its cells are blue.
    assert len(red) == (SIDE // CELL) * (24 // CELL) - 2
    none = await replica.vision.Predict(question(content, score_threshold=1.0))
    assert corners(none) == BLUE
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(aio.AioRpcError, match="score_threshold") as raised:
            await replica.vision.Predict(question(content, score_threshold=wrong))
        assert raised.value.code() == StatusCode.INVALID_ARGUMENT


async def test_the_mirrored_view_finds_the_same_boxes(serve):
    replica = await serve("detection")
    response = await replica.vision.Predict(
        question(picture(scene()), augmentation=vision_pb.AUGMENTATION_FLIP)
    )
    assert corners(response) == BLUE


async def test_five_crops_find_what_the_centre_does_not_show(serve):
    replica = await serve("detection", letterbox=False)
    pixels = scene()
    pixels[0:4, 0:4] = (0, 255, 0)
    plain = await replica.vision.Predict(question(picture(pixels)))
    assert (0, 0, 4, 4) not in corners(plain)
    five = await replica.vision.Predict(
        question(picture(pixels), augmentation=vision_pb.AUGMENTATION_FIVE_CROP)
    )
    assert (0, 0, 4, 4) in corners(five)


@pytest.mark.parametrize("orientation", [1, 6])
async def test_a_mask_is_a_png_with_the_palette(serve, orientation):
    replica = await serve("segmentation")
    response = await replica.vision.Predict(question(picture(scene(), orientation)))
    found = response.segmentation
    image = Image.open(io.BytesIO(found.png))
    assert image.mode == "P"
    assert image.getpalette()[:9] == PALETTE
    mask = np.asarray(image)
    assert mask.shape == (48, 64) == (found.height, found.width)
    expected = np.where((scene() == (0, 0, 255)).all(axis=2), 2, 0)
    assert (mask == expected).mean() > 0.98
    assert [(area.index, area.label) for area in found.areas] == [(0, "red"), (2, "blue")]
    assert sum(area.score for area in found.areas) == pytest.approx(1)


async def test_a_mask_as_run_lengths_is_the_same(serve):
    replica = await serve("segmentation")
    content = picture(scene())
    png = await replica.vision.Predict(question(content))
    runs = await replica.vision.Predict(
        question(content, mask_encoding=vision_pb.MASK_ENCODING_RUN_LENGTH)
    )
    lengths = runs.segmentation.run_lengths
    mask = np.repeat(lengths.classes, lengths.lengths).reshape(48, 64)
    assert (mask == np.asarray(Image.open(io.BytesIO(png.segmentation.png)))).all()
    flipped = await replica.vision.Predict(
        question(content, augmentation=vision_pb.AUGMENTATION_FLIP)
    )
    assert flipped.segmentation.png == png.segmentation.png


async def test_pixels_that_a_crop_leaves_out_have_no_class(serve):
    replica = await serve("segmentation", letterbox=False)
    response = await replica.vision.Predict(question(picture(scene())))
    mask = np.asarray(Image.open(io.BytesIO(response.segmentation.png)))
    assert (mask[8:40, 16:48] != 255).all()
    assert (mask != 255).sum() == SIDE * SIDE
    with pytest.raises(aio.AioRpcError, match="five crops do not show the same pixels") as raised:
        await replica.vision.Predict(
            question(picture(scene()), augmentation=vision_pb.AUGMENTATION_FIVE_CROP)
        )
    assert raised.value.code() == StatusCode.FAILED_PRECONDITION


async def test_an_embedding_is_one_vector(serve):
    replica = await serve("embedding", letterbox=False)
    pixels = np.full((SIDE, SIDE, 3), (30, 40, 0), np.uint8)
    response = await replica.vision.Predict(question(picture(pixels)))
    assert list(response.embedding.values) == pytest.approx([0.6, 0.8, 0])


@pytest.mark.parametrize("task", ["detection", "segmentation"])
async def test_a_bad_image_among_several_gets_its_own_error(serve, task):
    replica = await serve(task)
    response = await replica.vision.PredictBatch(
        vision_pb.PredictBatchRequest(
            model=preprocess_pb.ModelSelector(model="colours"),
            images=[
                preprocess_pb.Image(content=each)
                for each in (picture(scene()), b"no image", picture(scene()[:, ::-1]))
            ],
        )
    )
    kinds = [result.WhichOneof("result") for result in response.results]
    assert kinds == ["response", "error", "response"]
    assert response.results[0].response != response.results[2].response
    assert response.results[0].response.WhichOneof("result") == task


@pytest.mark.parametrize("task", ["detection", "segmentation"])
async def test_the_python_client_understands_it(serve, task):
    replica = await serve(task)
    async with AsyncVisionClient(replica.server.address) as client:
        answer = await client.predict(picture(scene()), "colours", score_threshold=0.95)
    assert answer.size == (64, 48)
    if task == "detection":
        assert {(o.x1, o.y1, o.x2, o.y2) for o in answer.objects} == BLUE
        assert answer.mask is None
    else:
        assert answer.objects is None
        assert answer.mask.shape == (48, 64)
        assert set(np.unique(answer.mask)) == {0, 2}
        assert [area.label for area in answer.areas] == ["red", "blue"]


async def test_an_unknown_encoding_is_refused(serve):
    replica = await serve("segmentation")
    with pytest.raises(aio.AioRpcError, match="mask_encoding 9 is unknown"):
        await replica.vision.Predict(question(picture(scene()), mask_encoding=9))


async def test_a_mask_that_fits_into_no_answer_is_refused_in_words(serve):
    replica = await serve("segmentation", max_message_bytes=64 * 1024 + 100)
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    with pytest.raises(aio.AioRpcError, match="the mask takes") as raised:
        await replica.vision.Predict(question(picture(noise)))
    assert raised.value.code() == StatusCode.RESOURCE_EXHAUSTED
