from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from pollard.compress import export
from pollard.compress.errors import ExportFailed
from pollard.compress.evaluate import session_predictor, torch_predictor
from pollard.compress.spec import InputSpec
from pollard.compress.zoo import find
from pollard.runtime.sessions import open_session

UNEVEN = InputSpec(12, 10, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _net(first: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        first or nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8 if first is None else 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32 if first is None else 12, 4),
    )
    net[1].running_mean += 0.3  # type: ignore[operator, union-attr]
    return net.eval()


def _export(net: nn.Module, spec: InputSpec = UNEVEN) -> onnx.ModelProto:
    return export.attach_pixels(export.export_core(net, spec), spec)


def test_normalisation_in_the_graph_is_exact_up_to_the_border() -> None:
    net = _net()
    model = _export(net)
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 10, 3), np.uint8)
    got = session_predictor(open_session(export.serialize(model)))(images)
    np.testing.assert_allclose(got, torch_predictor(net, UNEVEN)(images), rtol=1e-4, atol=1e-5)
    # The scaling has gone into the weights.
    assert [node.op_type for node in model.graph.node][:4] == ["Transpose", "Cast", "Sub", "Conv"]


def test_a_graph_that_does_not_begin_with_a_convolution_is_normalised_too() -> None:
    net = _net(nn.MaxPool2d(2))
    raw = export.serialize(_export(net))
    assert export.check_parity(raw, net, UNEVEN) < 1e-4


def test_scaling_alone_costs_one_cast() -> None:
    entry = find("small-cnn-28")
    model = _export(entry.build(10), entry.spec)
    assert [node.op_type for node in model.graph.node][:3] == ["Transpose", "Cast", "Conv"]


def test_the_file_takes_any_batch_of_pixels_and_states_its_opset() -> None:
    model = _export(_net())
    session = open_session(export.serialize(model))
    assert session.inputs[0].datatype == "UINT8"
    assert session.inputs[0].shape == (-1, 12, 10, 3)
    for batch in (1, 3, 17):
        logits = session.run({"image": np.zeros((batch, 12, 10, 3), np.uint8)})["logits"]
        assert logits.shape == (batch, 4)
    assert {(e.domain, e.version) for e in model.opset_import if not e.domain} == {("", 20)}


def test_nothing_says_where_the_model_was_made() -> None:
    raw = export.serialize(_export(_net()))
    for trace in (b"site-packages", b".py", b"/work", b"tests", b"File ", b"forward"):
        assert trace not in raw, trace


def test_no_batch_norm_is_left() -> None:
    model = _export(_net())
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}


def test_the_same_model_gives_the_same_bytes() -> None:
    assert export.serialize(_export(_net())) == export.serialize(_export(_net()))


def test_a_file_that_computes_something_else_is_refused() -> None:
    net = _net()
    raw = export.serialize(_export(net))
    with torch.no_grad():
        net[5].bias += 1  # type: ignore[operator, union-attr]
    with pytest.raises(ExportFailed, match="differs from the PyTorch model"):
        export.check_parity(raw, net, UNEVEN)


class _Undecided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0, 0, :4] if float(x.sum()) > 0 else x[:, 1, 0, :4]


def test_a_model_that_cannot_be_exported_is_refused() -> None:
    with pytest.raises(ExportFailed, match=r"data-dependent .* must become torch\.where"):
        export.export_core(_Undecided(), UNEVEN)


def test_the_line_that_cannot_be_followed_is_told_without_the_exporters_listing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ExportFailed, match=r"\(.*test_export\.py, line \d+: return x\["):
        export.export_core(_Undecided(), UNEVEN)
    assert capfd.readouterr().err == ""


class _Restless(nn.Module):
    """Drops some of its answers in evaluation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _net()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.net(x), 0.5)


def test_answers_that_change_from_call_to_call_are_told_as_that() -> None:
    with pytest.raises(ExportFailed, match=r"otherwise each time: .*training=self\.training"):
        export.try_export(_Restless().eval(), UNEVEN)
    export.try_export(_net(), UNEVEN)


class _FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.dense = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The length is a plain number to the exporter: that of its example.
        made: torch.Tensor = self.dense(self.convolution(x).reshape(len(x), 4, -1).mean(2))
        return made


def test_a_model_that_fixes_its_batch_is_refused() -> None:
    net = _FixedBatch().eval()
    raw = export.serialize(export.attach_pixels(export.export_core(net, UNEVEN), UNEVEN))
    with pytest.raises(ExportFailed, match="8 image"):
        export.check_parity(raw, net, UNEVEN)


def test_others_get_the_exporter_as_it_is() -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    before = vars(ONNXRegistry)["from_torchlib"]
    _export(_net())
    with pytest.raises(ExportFailed):
        export.export_core(_Undecided(), UNEVEN)
    assert vars(ONNXRegistry)["from_torchlib"] is before
    # Whoever adds operators to theirs does not add them to ours.
    assert ONNXRegistry.from_torchlib(18) is not ONNXRegistry.from_torchlib(18)
