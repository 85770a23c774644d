from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from pollard.compress import export
from pollard.compress.data import Part
from pollard.compress.errors import QuantizeFailed
from pollard.compress.quantize import QuantizeConfig, prepare
from pollard.compress.spec import InputSpec
from pollard.compress.torch_graph import TorchGraph
from pollard.runtime.sessions import open_session

SPEC = InputSpec(32, 32, 3, (0.5,) * 3, (0.25,) * 3)

NAMES = ["mobilenet-v3", "densenet", "unet"]


@pytest.mark.parametrize("name", NAMES)
def test_pytorch_computes_what_onnxruntime_computes(
    name: str, architectures: dict[str, Callable[[], nn.Module]]
) -> None:
    torch.manual_seed(0)
    core = export.export_core(architectures[name]().eval(), SPEC)
    inputs = torch.randn(2, 3, 32, 32)
    want = open_session(export.serialize(core)).run({export.CORE_INPUT: inputs.numpy()})
    got = TorchGraph(core).run(inputs).numpy()
    np.testing.assert_allclose(got, want[export.OUTPUT], atol=1e-4 * np.ptp(want[export.OUTPUT]))


def test_a_quantized_graph_gives_the_same_numbers(
    depthwise_core: Callable[..., tuple[nn.Module, onnx.ModelProto, InputSpec]],
) -> None:
    _, core, spec = depthwise_core()
    part = Part("x", export.probe_images(spec, 16, seed=5), np.zeros(16, np.int64))
    prepared = prepare(core, spec, part, QuantizeConfig(reduce_range=True))
    model = prepared.build_core(prepared.collect().ranges("min-max"))
    feeds = prepared.read().get_next()
    assert feeds is not None
    want = open_session(export.serialize(model)).run(feeds)[export.OUTPUT]
    got = TorchGraph(model).run(torch.from_numpy(feeds[export.CORE_INPUT])).numpy()
    # A sum that falls between two steps may be rounded either way.
    assert np.abs(got - want).max() <= 0.02 * np.ptp(want)


def test_what_cannot_be_run_is_named() -> None:
    class Folded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cumsum(x, 1).flatten(1)

    core = export.export_core(Folded(), SPEC)
    with pytest.raises(QuantizeFailed, match="CumSum"):
        TorchGraph(core)
