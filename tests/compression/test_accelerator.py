"""Which device is chosen, what is said where there is none, and that nothing is left on one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from pollard.compress import accelerator
from pollard.compress.accelerator import CPU, find, in_full, moved, on
from pollard.compress.cli import register
from pollard.compress.errors import DeviceFailed, DeviceUnusable
from pollard.compress.evaluate import TorchPredictor
from pollard.compress.models import device_for, resolve
from pollard.compress.progress import Reporter
from pollard.compress.spec import InputSpec
from pollard.compress.train import TrainOptions, train

TESTS = Path(__file__).resolve().parents[1]

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class Told(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def invoke(*arguments: object) -> Result:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.long
@pytest.mark.timeout(600)
def test_training_and_compression_run_on_a_second_device() -> None:
    folder = TESTS / "accelerator"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", str(folder / "pytest.ini"), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def test_the_processor_computes_where_nothing_else_is_chosen() -> None:
    assert accelerator.used() == CPU
    assert find("cpu") == CPU
    with on(CPU):
        assert accelerator.used() == CPU


@needs_no_gpu
def test_without_a_gpu_auto_is_the_processor() -> None:
    assert find("auto") == CPU


@needs_no_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_asked_for_and_not_there_is_an_error_with_its_cure(name: str) -> None:
    with pytest.raises(DeviceUnusable, match=r"PyTorch \S+ finds no GPU here: .*--device cpu"):
        find(name)


@needs_no_gpu
def test_auto_is_the_processor_where_the_gpu_does_not_compute_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # PyTorch knows of a GPU, which it cannot use.
    monkeypatch.setattr(accelerator, "_accelerator", lambda: "cuda")
    source, told = resolve("small-cnn-28"), Told()
    assert device_for(source, "auto", told) == CPU
    why = "there is no GPU 0; PyTorch finds 0, which are numbered from 0"
    assert told.lines == [f"PyTorch computes on the processor: {why}"]
    with pytest.raises(DeviceUnusable, match=why):
        device_for(source, "cuda", told)
    # One of several processes would wait for the others, which are elsewhere.
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(DeviceUnusable, match="no GPU for process 1 of this machine"):
        device_for(source, "auto", told)
    assert len(told.lines) == 1


@needs_no_gpu
@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_says_where_it_computes(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "_accelerator", lambda: "cuda")
    monkeypatch.setenv("RANK", str(rank))
    told = Told()
    train(
        "small-cnn-28", "shapes:40", tmp_path / "w.safetensors", options=TrainOptions(epochs=1),
        spec=InputSpec(28, 28, 1, (0.5,), (0.25,)), reporter=told,
    )  # fmt: skip
    lines = [line for line in told.lines if line.startswith("PyTorch computes on")]
    assert len(lines) == (1 if rank == 0 else 0)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:0:1", "CUDA", "0"])
def test_what_is_no_device_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(DeviceUnusable, match="auto, cpu, cuda, or cuda:N"):
        find(name)


@needs_no_gpu
@pytest.mark.parametrize(
    "command",
    [
        ("train", "small-cnn-28", "--data", "shapes:40", "--out", "w.safetensors"),
        ("compress", "small-cnn-28", "--data", "shapes:40", "--out", "b", "--weights", "w.pt"),
        ("eval", "small-cnn-28", "--data", "shapes:40", "--weights", "w.pt"),
    ],
    ids=lambda command: command[0],
)
def test_commands_refuse_a_gpu_that_is_not_there_and_write_nothing(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*command, "--device", "cuda")
    assert done.exit_code == 2, done.output
    assert "finds no GPU here" in " ".join(done.output.split())
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_and_a_gpu_exclude_each_other(tmp_path: Path) -> None:
    done = invoke(
        "train", "small-cnn-28", "--data", "shapes:40", "--out", tmp_path / "w.safetensors",
        "--ray", "local", "--device", "cuda",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "torchrun" in done.output


def test_memory_that_is_short_is_told_with_its_cure() -> None:
    told = r"not enough memory: CUDA out of .*--batch-size"
    with pytest.raises(DeviceFailed, match=told), on(CPU):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")
    assert accelerator.used() == CPU


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (torch.AcceleratorError, "CUDA error: an illegal memory access was encountered"),
        (RuntimeError, "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"),
        (RuntimeError, "GET was unable to find an engine to execute this computation"),
    ],
)
def test_a_device_that_fails_is_told(kind: type[Exception], told: str) -> None:
    whole = re.escape(f"failed: {told}. Give --device cpu to do without it") + "$"
    with pytest.raises(DeviceFailed, match=whole), on(CPU):
        raise kind(told)


def test_what_is_no_fault_of_the_device_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"), on(CPU):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)")


@pytest.mark.parametrize("command", ["train", "compress", "eval"])
def test_commands_whose_device_fails_say_what_is_kept(
    command: str, digits_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(TorchPredictor, "__call__", fail)
    arguments, kept = {
        "train": (["--out", tmp_path / "w.safetensors"], "nothing was written"),
        "compress": (
            ["--out", tmp_path / "b", "--weights", digits_parent],
            "finished stages are kept, and the same command goes on from there",
        ),
        "eval": (["--weights", digits_parent], "nothing was written"),
    }[command]
    done = invoke(command, "small-cnn-28", "--data", "digits", "--device", "cpu", *arguments)
    assert done.exit_code == 1, done.output
    told = " ".join(done.output.split())
    assert told.endswith(f"Give --device cpu to do without it ({kept}).")


@pytest.mark.parametrize("caller", ["none", "tf32"])
def test_answers_are_whole_float32_whatever_the_caller_has_chosen(caller: str) -> None:
    operations = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    first = torch.backends.fp32_precision, *(each.fp32_precision for each in operations)
    try:
        torch.backends.fp32_precision = caller
        before = [each.fp32_precision for each in operations]
        with in_full(torch.device("cuda")):
            assert [each.fp32_precision for each in operations] == ["ieee", "ieee"]
        assert [each.fp32_precision for each in operations] == before
        with in_full(CPU):
            assert [each.fp32_precision for each in operations] == before
    finally:
        torch.backends.fp32_precision = first[0]
        for operation, precision in zip(operations, first[1:], strict=True):
            operation.fp32_precision = precision


def test_everything_within_a_batch_is_moved() -> None:
    tensor = torch.ones(2)
    batch = {"a": [tensor, 3], "b": (tensor, {"c": tensor}), "d": "text", "e": None}
    found = moved(batch, torch.device("meta"))
    assert found["a"][0].is_meta
    assert found["a"][1] == 3
    assert found["b"][0].is_meta
    assert found["b"][1]["c"].is_meta
    assert (found["d"], found["e"]) == ("text", None)
    assert isinstance(found["b"], tuple)
    assert not tensor.is_meta
