"""What is in an image stays in memory: not in logs, not in files, not in answers."""

import asyncio
import base64
import contextlib
import io
import os
import signal
import tempfile

import grpc
import numpy as np
import pytest
from PIL import Image

from pollard.preprocess.v1 import preprocess_service_pb2 as preprocess_pb
from pollard.vision.v1 import vision_service_pb2 as vision_pb

MARK = b"MARK-8f2c61d07be94a35"
POSITION = (48.0, 12.0, 34.5)


def marked(kind: str) -> bytes:
    """Return a picture whose metadata hold the mark and a position, with a marked tail."""
    exif = Image.Exif()
    exif[0x010E] = MARK.decode()
    exif.get_ifd(0x8825)[2] = POSITION
    pixels = np.frombuffer((MARK * 400)[: 50 * 40 * 3], np.uint8).reshape(40, 50, 3)
    file = io.BytesIO()
    options = {"compress_level": 0} if kind == "PNG" else {}
    Image.fromarray(pixels).save(file, kind, exif=exif, **options)
    return file.getvalue() + MARK


def forms() -> list[bytes]:
    """Return what the mark may look like: as it is, as text, or as the inner part of base64."""
    inner = [base64.b64encode(b"\0" * shift + MARK)[4:-4] for shift in range(3)]
    return [MARK, MARK.hex().encode(), MARK[:12], *inner]


async def ask(replica, content: bytes) -> bytes:
    """Send an image by every method; return all that comes back, errors too."""
    image = preprocess_pb.Image(content=content)
    model = preprocess_pb.ModelSelector(model="linear")
    heard = b""

    async def one(request):
        yield request

    for call in (
        replica.vision.Predict(vision_pb.PredictRequest(model=model, image=image)),
        replica.vision.PredictBatch(vision_pb.PredictBatchRequest(model=model, images=[image])),
    ):
        try:
            heard += (await call).SerializeToString()
        except grpc.aio.AioRpcError as error:
            heard += repr(error).encode() + repr(error.trailing_metadata()).encode()
    stream = replica.vision.PredictStream(
        one(vision_pb.PredictStreamRequest(model=model, image=image))
    )
    async for answer in stream:
        heard += answer.SerializeToString()
    tensors = replica.preprocess.TransformStream(
        one(preprocess_pb.TransformStreamRequest(model=model, image=image))
    )
    async for answer in tensors:
        # The tensor is what was asked for.
        answer.response.tensor.content = b""
        heard += answer.SerializeToString()
    return heard


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A folder that every process takes for its temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
async def test_an_image_is_in_no_log_no_file_and_no_answer(
    temporary, tmp_path, capfd, caplog, suite
):
    # Before the log is listened to: Pillow tells what it writes into a file.
    pictures = [marked(kind) for kind in ("JPEG", "PNG", "WebP", "TIFF")]
    caplog.set_level("DEBUG")
    pool = suite.server.pool
    heard = b""
    for content in pictures:
        assert MARK in content
        heard += await ask(suite, content)
        heard += await ask(suite, content[: len(content) // 2])
        heard += await ask(suite, content[:20] + MARK * 100)
    for content in (MARK * 10, b"<svg>" + MARK, b"GIF89a" + MARK * 10, b"BM" + MARK * 10):
        heard += await ask(suite, content)
    # A worker that is killed with the image in its hands leaves nothing either.
    (pid,) = pool.pids
    os.kill(pid, signal.SIGSTOP)
    asked = asyncio.create_task(ask(suite, pictures[0]))
    async with asyncio.timeout(20):
        while not pool.in_work:
            await asyncio.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(grpc.aio.AioRpcError):
        heard += await asked
    out, err = capfd.readouterr()
    written = {"answers": heard, "logs": (out + err + caplog.text).encode()}
    assert "decode worker ended" in out + err
    for path in tmp_path.rglob("*"):
        if path.is_file():
            written[str(path)] = path.read_bytes()
    assert len(written) > 2
    for name, data in written.items():
        assert not [form for form in forms() if form in data], name
    assert not list(temporary.iterdir())
