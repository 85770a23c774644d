"""Steps give the pixels of a plain Pillow pipeline, and impossible ones are refused at once."""

import io
import pickle
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime import transforms
from pollard.runtime.errors import ImageInvalid, ImageTooLarge, StepsInvalid, TensorInvalid
from pollard.runtime.images import ImageLimits
from pollard.runtime.transforms import (
    Pipeline,
    cast,
    center_crop,
    color_order,
    decode,
    five_crop,
    flip,
    normalize,
    pad,
    resize,
    rotate,
)

FILTERS = {
    bundle_pb2.INTERPOLATION_NEAREST: Image.Resampling.NEAREST,
    bundle_pb2.INTERPOLATION_BILINEAR: Image.Resampling.BILINEAR,
    bundle_pb2.INTERPOLATION_BICUBIC: Image.Resampling.BICUBIC,
    bundle_pb2.INTERPOLATION_BOX: Image.Resampling.BOX,
    bundle_pb2.INTERPOLATION_LANCZOS: Image.Resampling.LANCZOS,
}
SHORT_SIDE = bundle_pb2.RESIZE_MODE_SHORT_SIDE
LETTERBOX = bundle_pb2.RESIZE_MODE_LETTERBOX


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    noise = np.random.default_rng(1).integers(0, 256, (9, 12, 3), np.uint8)
    return Image.fromarray(noise).resize((123, 91), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def jpeg(picture) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=92)
    return file.getvalue()


def opened(jpeg: bytes) -> Image.Image:
    return Image.open(io.BytesIO(jpeg)).convert("RGB")


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("gray", [False, True])
def test_exact_resize_is_pillows(jpeg, interpolation, gray):
    steps = [decode(gray=gray), resize(64, 48, interpolation=interpolation)]
    pipeline = Pipeline(steps)
    source = opened(jpeg)
    if gray:
        source = Image.open(io.BytesIO(jpeg)).convert("L")
    expected = np.asarray(source.resize((64, 48), FILTERS[interpolation]))
    array = pipeline.apply(jpeg).array
    assert np.array_equal(array, expected.reshape(48, 64, -1))
    assert array.flags.c_contiguous
    assert array.shape == pipeline.output_shape
    assert array.dtype == pipeline.dtype == np.uint8


def test_short_side_and_centre_crop_are_the_classic_evaluation_pipeline(jpeg):
    pipeline = Pipeline([decode(), resize(0, 64, mode=SHORT_SIDE), center_crop(56, 56)])
    source = opened(jpeg)
    width, height = int(64 * 123 / 91), 64
    resized = source.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - 56) / 2), round((height - 56) / 2)
    expected = np.asarray(resized.crop((left, top, left + 56, top + 56)))
    assert np.array_equal(pipeline.apply(jpeg).array, expected)
    assert pipeline.output_shape == (56, 56, 3)


def test_short_side_of_a_portrait(jpeg):
    upright = np.ascontiguousarray(np.asarray(opened(jpeg)).transpose(1, 0, 2))
    result = Pipeline([decode(), resize(0, 64, mode=SHORT_SIDE)]).apply_pixels(upright)
    assert result.array.shape == (int(64 * 123 / 91), 64, 3)


def test_letterbox_keeps_the_aspect_ratio_and_fills_the_rest(jpeg):
    pipeline = Pipeline([decode(), resize(64, 64, mode=LETTERBOX, fill=(114, 1, 2))])
    array = pipeline.apply(jpeg).array
    inner = round(91 * 64 / 123)
    top = (64 - inner) // 2
    expected = opened(jpeg).resize((64, inner), Image.Resampling.BILINEAR)
    assert np.array_equal(array[top : top + inner], np.asarray(expected))
    assert (array[:top] == (114, 1, 2)).all()
    assert (array[top + inner :] == (114, 1, 2)).all()


def test_flip_rotate_pad_and_colour_order(jpeg):
    source = np.asarray(opened(jpeg))
    assert np.array_equal(
        Pipeline([decode(), flip(horizontal=True, vertical=True)]).apply(jpeg).array,
        source[::-1, ::-1],
    )
    for turns in range(4):
        assert np.array_equal(
            Pipeline([decode(), rotate(turns)]).apply(jpeg).array, np.rot90(source, turns)
        )
    padded = Pipeline([decode(), pad(1, 2, 3, 4, fill=(7, 8, 9))]).apply(jpeg).array
    assert padded.shape == (91 + 6, 123 + 4, 3)
    assert np.array_equal(padded[2:-4, 1:-3], source)
    assert (padded[0, 0] == (7, 8, 9)).all()
    assert np.array_equal(
        Pipeline([decode(), color_order("BGR")]).apply(jpeg).array, source[..., ::-1]
    )
    twice = Pipeline([decode(), color_order("BGR"), color_order("RGB")])
    assert np.array_equal(twice.apply(jpeg).array, source)


def test_cast_keeps_the_values(jpeg):
    pipeline = Pipeline([decode(), resize(8, 8), cast(bundle_pb2.DATA_TYPE_FP32)])
    plain = Pipeline([decode(), resize(8, 8)])
    array = pipeline.apply(jpeg).array
    assert array.dtype == pipeline.dtype == np.float32
    assert np.array_equal(array, plain.apply(jpeg).array)


def test_normalize_in_both_layouts(jpeg):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    plain = Pipeline([decode(), resize(16, 12)]).apply(jpeg).array
    expected = (plain / 255 - np.array(mean)) / np.array(std)
    nhwc = Pipeline([decode(), resize(16, 12), normalize(mean, std)])
    nchw = Pipeline([decode(), resize(16, 12), normalize(mean, std, layout="NCHW")])
    assert np.allclose(nhwc.apply(jpeg).array, expected, atol=1e-5)
    result = nchw.apply(jpeg).array
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    assert result.shape == nchw.output_shape == (3, 12, 16)
    assert np.array_equal(result.transpose(1, 2, 0), nhwc.apply(jpeg).array)


def test_decoded_pixels_give_what_their_png_gives(picture):
    pipeline = Pipeline([decode(gray=True), resize(28, 28)])
    file = io.BytesIO()
    picture.save(file, "PNG")
    from_file = pipeline.apply(file.getvalue())
    from_pixels = pipeline.apply_pixels(np.asarray(picture))
    assert np.array_equal(from_file.array, from_pixels.array)
    assert from_file.geometry == from_pixels.geometry
    luma = np.asarray(picture.convert("L"))
    assert np.array_equal(pipeline.apply_pixels(luma).array, from_file.array)
    assert np.array_equal(pipeline.apply_pixels(luma[..., None]).array, from_file.array)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_pixels_of_another_form_are_refused(pixels):
    with pytest.raises(TensorInvalid):
        Pipeline([decode(), resize(4, 4)]).apply_pixels(pixels)


STEP_CHOICES = st.one_of(
    st.builds(resize, st.integers(1, 40), st.integers(1, 40)),
    st.builds(resize, st.just(0), st.integers(1, 40), mode=st.just(SHORT_SIDE)),
    st.builds(resize, st.integers(1, 40), st.integers(1, 40), mode=st.just(LETTERBOX)),
    st.builds(pad, *[st.integers(0, 9)] * 4),
    st.builds(flip, horizontal=st.booleans(), vertical=st.booleans()),
    st.builds(rotate, st.integers(0, 3)),
)


@given(st.lists(STEP_CHOICES, max_size=6))
def test_geometry_maps_the_tensor_back_to_the_image(steps):
    # A corner of the image's coordinates, painted as a point, is followed by hand through the
    # same steps: the result must agree with the shape that the pipeline really gives.
    pixels = np.zeros((20, 30, 3), np.uint8)
    pipeline = Pipeline([decode(), *steps])
    result = pipeline.apply_pixels(pixels)
    if pipeline.output_shape is not None:
        assert result.array.shape == pipeline.output_shape
    points = [(0.0, 0.0), (30.0, 20.0), (7.0, 3.0)]
    moved = list(points)
    size = (30.0, 20.0)
    for step in steps:
        moved, size = follow(step, moved, size)
    assert result.array.shape[:2] == (size[1], size[0])
    for point, there in zip(points, moved, strict=True):
        assert result.geometry.to_image(*there) == pytest.approx(point, abs=1e-6)


def follow(step, points, size):
    width, height = size
    kind = step.WhichOneof("step")
    if kind == "resize":
        single = Pipeline([decode(), step]).apply_pixels(
            np.zeros((int(height), int(width), 3), np.uint8)
        )
        new_height, new_width = single.array.shape[:2]
        left = top = 0
        inner = (new_width, new_height)
        if step.resize.mode == LETTERBOX:
            scale = min(new_width / width, new_height / height)
            inner = (max(1, round(width * scale)), max(1, round(height * scale)))
            left, top = (new_width - inner[0]) // 2, (new_height - inner[1]) // 2
        return [(x * inner[0] / width + left, y * inner[1] / height + top) for x, y in points], (
            new_width,
            new_height,
        )
    if kind == "pad":
        p = step.pad
        return [(x + p.left, y + p.top) for x, y in points], (
            width + p.left + p.right,
            height + p.top + p.bottom,
        )
    if kind == "flip":
        return [
            (
                width - x if step.flip.horizontal else x,
                height - y if step.flip.vertical else y,
            )
            for x, y in points
        ], size
    for _ in range(step.rotate.quarter_turns):
        points = [(y, width - x) for x, y in points]
        width, height = height, width
    return points, (width, height)


def test_centre_crop_offsets_the_geometry(jpeg):
    geometry = Pipeline([decode(), center_crop(23, 21)]).apply(jpeg).geometry
    assert (geometry.width, geometry.height) == (123, 91)
    assert geometry.to_image(0, 0) == (50, 35)


def test_an_image_too_small_for_a_crop_is_refused(jpeg):
    with pytest.raises(ImageInvalid, match="123 × 91 where a crop of 200 × 50"):
        Pipeline([decode(), center_crop(200, 50)]).apply(jpeg)


def test_a_thin_image_cannot_grow_beyond_the_limit():
    thin = np.zeros((1, 30000, 3), np.uint8)
    pipeline = Pipeline([decode(), resize(0, 224, mode=SHORT_SIDE)])
    with pytest.raises(ImageTooLarge, match="would become 6720000 × 224"):
        pipeline.apply_pixels(thin)


def test_limits_reach_the_decoder(jpeg):
    with pytest.raises(ImageTooLarge):
        Pipeline([decode()], ImageLimits(max_pixels=1000)).apply(jpeg)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([], "no preprocessing steps"),
        ([resize(4, 4)], "step 1 must be decode"),
        ([decode(), decode()], "only the first"),
        ([decode(), bundle_pb2.PreprocessStep()], "empty or unknown"),
        ([decode(), resize(0, 4)], "width is 1 to"),
        ([decode(), resize(4, 20000)], "height is 1 to"),
        ([decode(), resize(4, 4, mode=bundle_pb2.RESIZE_MODE_UNSPECIFIED)], "mode is not set"),
        ([decode(), resize(9, 9), center_crop(10, 4)], "does not fit"),
        ([decode(), resize(9, 9), five_crop(10, 4)], "does not fit"),
        ([decode(), five_crop(9, 9), five_crop(4, 4)], "only one step"),
        ([decode(reduced_scale=True), five_crop(9, 9)], "needs a resize"),
        ([decode(background=(1, 2))], "3 values"),
        ([decode(background=(1, 2, 256))], "0 to 255"),
        ([decode(gray=True), pad(1, 1, 1, 1, fill=(1, 2, 3))], "1 values"),
        ([decode(), rotate(4)], "0 to 3"),
        ([decode(), color_order("GBR")], "RGB"),
        ([decode(gray=True), color_order("BGR")], "grey"),
        ([decode(), cast(bundle_pb2.DATA_TYPE_INT8)], "cannot hold pixels"),
        ([decode(), cast(bundle_pb2.DATA_TYPE_BYTES)], "cannot hold pixels"),
        ([decode(), cast(bundle_pb2.DATA_TYPE_FP32), flip(horizontal=True)], "must come before"),
        ([decode(), normalize([0.5], [0.5])], "3 values each"),
        ([decode(), normalize([0.5] * 3, [0.5, 0, 0.5])], "must not be 0"),
        ([decode(), normalize([float("nan")] * 3, [1] * 3)], "finite"),
        ([decode(), normalize([0] * 3, [1] * 3, layout="HW")], "layout"),
        (
            [decode(), normalize([0] * 3, [1] * 3), cast(bundle_pb2.DATA_TYPE_UINT8)],
            "fractions",
        ),
        ([decode()] + [flip()] * 64, "at most 64"),
    ],
)
def test_impossible_steps_are_refused_before_any_image(steps, words):
    with pytest.raises(StepsInvalid, match=words):
        Pipeline(steps)


def spec(shape, data_type=bundle_pb2.DATA_TYPE_UINT8) -> bundle_pb2.TensorSpec:
    return bundle_pb2.TensorSpec(name="image", data_type=data_type, shape=shape)


def test_check_fits_compares_shape_and_type():
    pipeline = Pipeline([decode(), resize(8, 6)])
    pipeline.check_fits(spec([-1, 6, 8, 3]))
    pipeline.check_fits(spec([1, -1, -1, 3]))
    with pytest.raises(StepsInvalid, match="takes"):
        pipeline.check_fits(spec([-1, 8, 6, 3]))
    with pytest.raises(StepsInvalid, match="FP32"):
        pipeline.check_fits(spec([-1, 6, 8, 3], bundle_pb2.DATA_TYPE_FP32))
    with pytest.raises(StepsInvalid):
        pipeline.check_fits(spec([6, 8, 3]))
    Pipeline([decode()]).check_fits(spec([-1, 224, 224, 3]))


def test_errors_survive_the_way_back_from_a_worker_process():
    with pytest.raises(ImageTooLarge) as caught:
        Pipeline([decode()], ImageLimits(max_bytes=2)).apply(b"xxx")
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own bytes
    assert str(again) == str(caught.value)
    assert again.metadata == caught.value.metadata


def test_exported_names():
    assert sorted(transforms.__all__) == [
        "Geometry",
        "Pipeline",
        "Transformed",
        "cast",
        "center_crop",
        "color_order",
        "decode",
        "five_crop",
        "flip",
        "normalize",
        "pad",
        "resize",
        "rotate",
    ]


def test_five_crops_are_the_corners_and_the_centre(jpeg):
    steps = [decode(), resize(60, 50), five_crop(20, 16), color_order("BGR")]
    pipeline = Pipeline(steps)
    result = pipeline.apply(jpeg)
    whole = np.asarray(opened(jpeg).resize((60, 50), Image.Resampling.BILINEAR))[:, :, ::-1]
    places = [(0, 0), (40, 0), (0, 34), (40, 34), (20, 17)]
    assert (pipeline.views, pipeline.output_shape) == (5, (16, 20, 3))
    assert result.array.shape == (5, 16, 20, 3)
    assert result.batch is result.array
    for view, (left, top) in zip(result.array, places, strict=True):
        assert np.array_equal(view, whole[top : top + 16, left : left + 20])
    for geometry, (left, top) in zip(result.geometries, places, strict=True):
        assert geometry.to_image(0, 0) == pytest.approx((left * 123 / 60, top * 91 / 50))
    assert result.geometry == result.geometries[4]
    centre = Pipeline([decode(), resize(60, 50), center_crop(20, 16), color_order("BGR")])
    assert np.array_equal(result.array[4], centre.apply(jpeg).array)


def test_five_crops_of_an_image_that_is_too_small(jpeg):
    with pytest.raises(ImageInvalid, match="too small"):
        Pipeline([decode(), five_crop(124, 10)]).apply(jpeg)


def test_one_view_has_a_batch_of_one(jpeg):
    result = Pipeline([decode(), resize(6, 5)]).apply(jpeg)
    assert result.batch.shape == (1, 5, 6, 3)


@pytest.mark.parametrize(
    ("step", "divisor"),
    [
        (resize(15, 11), 8),
        (resize(16, 12), 4),
        (resize(17, 11), 4),
        (resize(0, 20, mode=SHORT_SIDE), 4),
        (resize(40, 40, mode=LETTERBOX), 2),
        (resize(70, 70), 1),
    ],
)
def test_reduced_scale_lets_the_decoder_scale_no_further_than_the_resize(jpeg, step, divisor):
    drafted = Image.open(io.BytesIO(jpeg))
    drafted.draft(None, (123 // divisor, 91 // divisor))
    assert drafted.size == (-(-123 // divisor), -(-91 // divisor))
    result = Pipeline([decode(reduced_scale=True), step]).apply(jpeg)
    plain = Pipeline([decode(), step]).apply(jpeg)
    assert result.array.shape == plain.array.shape
    if step.resize.mode == bundle_pb2.RESIZE_MODE_EXACT:
        size = (step.resize.width, step.resize.height)
        expected = drafted.convert("RGB").resize(size, Image.Resampling.BILINEAR)
        assert np.array_equal(result.array, np.asarray(expected))
    assert (result.geometry.width, result.geometry.height) == (123, 91)
    height, width = result.array.shape[:2]
    for corner in ((0, 0), (width, height)):
        assert result.geometry.to_image(*corner) == pytest.approx(plain.geometry.to_image(*corner))


def test_reduced_scale_of_a_turned_jpeg_and_of_a_png(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture.save(file, "JPEG", exif=exif)
    result = Pipeline([decode(reduced_scale=True), resize(11, 15)]).apply(file.getvalue())
    assert (result.geometry.width, result.geometry.height) == (91, 123)
    assert result.array.shape == (15, 11, 3)
    drafted = Image.open(io.BytesIO(file.getvalue()))
    drafted.draft(None, (15, 11))
    turned = drafted.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(
        result.array, np.asarray(turned.resize((11, 15), Image.Resampling.BILINEAR))
    )
    file = io.BytesIO()
    picture.save(file, "PNG")
    steps = [resize(11, 15)]
    assert np.array_equal(
        Pipeline([decode(reduced_scale=True), *steps]).apply(file.getvalue()).array,
        Pipeline([decode(), *steps]).apply(file.getvalue()).array,
    )


OPENCV_AREA = bundle_pb2.INTERPOLATION_OPENCV_AREA


@pytest.mark.parametrize("gray", [False, True])
def test_opencv_area_is_opencvs(jpeg, gray):
    cv2 = pytest.importorskip("cv2", exc_type=ImportError)
    steps = [decode(gray=gray), resize(40, 30, interpolation=OPENCV_AREA)]
    pixels = np.asarray(opened(jpeg).convert("L" if gray else "RGB"))
    expected = cv2.resize(pixels, (40, 30), interpolation=cv2.INTER_AREA).reshape(30, 40, -1)
    assert np.array_equal(Pipeline(steps).apply(jpeg).array, expected)


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize(
    "after",
    [
        [center_crop(20, 10)],
        [five_crop(20, 10)],
        [center_crop(20, 10), flip(horizontal=True), rotate(1)],
        [pad(1, 2, 3, 4)],
        [center_crop(20, 10), normalize([0.5], [0.25], layout="NCHW")],
        [resize(10, 10), center_crop(5, 5)],
    ],
    ids=["crop", "five crops", "turns", "pad", "normalize", "resize again"],
)
def test_steps_after_opencvs_filter_give_what_they_give_for_its_pixels(jpeg, gray, after):
    """Whether pixels are held as an array or as an image on the way makes no difference."""
    pytest.importorskip("cv2", exc_type=ImportError)
    if not gray and after[-1].HasField("normalize"):
        after = [after[0], normalize([0.5] * 3, [0.25] * 3, layout="NCHW")]
    first = [decode(gray=gray), resize(40, 30, interpolation=OPENCV_AREA)]
    whole = Pipeline([*first, *after]).apply(jpeg)
    drawn = Pipeline(first).apply(jpeg).array
    expected = Pipeline([decode(gray=gray), *after]).apply_pixels(drawn)
    assert np.array_equal(whole.array, expected.array)
    assert whole.array.flags.c_contiguous
    assert whole.array.flags.writeable
    assert len(whole.geometries) == len(expected.geometries)


def test_without_opencv_its_filter_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(StepsInvalid, match=r"pollard-runtime\[opencv\]"):
        Pipeline([decode(), resize(40, 30, interpolation=OPENCV_AREA)])
