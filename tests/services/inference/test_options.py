"""What is set by hand goes before what is measured, and that before the defaults."""

from __future__ import annotations

import pytest

from pollard.runtime.machine import Machine
from pollard.runtime.sessions import open_session
from pollard.services.inference.description import ModelDescription, Outline
from pollard.services.inference.errors import LoadRefused
from pollard.services.inference.options import (
    EngineOptions,
    Given,
    Running,
    given_by,
    running,
    usable,
)
from pollard.services.inference.repository import Limits, ModelRepository, RepositoryModel
from pollard.services.inference.scheduling import Scheduling
from pollard.services.inference.tuning import Tuning


@pytest.fixture
def described(make_bundle, tmp_path):
    """Returns a function that gives outline and description of a model with a configuration."""
    model = make_bundle(1.0).model_path("cpu-fp32").read_bytes()

    def describe(config: str | None = None) -> tuple[Outline, ModelDescription]:
        folder = tmp_path / "models" / "adder" / "1"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.onnx").write_bytes(model)
        if config is not None:
            (folder.parent / "config.pbtxt").write_text(config)
        entry = ModelRepository(tmp_path / "models").read("adder")
        source = RepositoryModel(entry, 1, Limits(default_batch_size=8))
        outline = source.outline(Machine.detect())
        return outline, source.describe(open_session(folder / "model.onnx"))

    return describe


def threads(count: str) -> str:
    return f'parameters {{ key: "intra_op_thread_count" value {{ string_value: "{count}" }} }}'


OPTIONS = EngineOptions(workers=5, intra_op_threads=6, joined_batch=7)


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        (None, EngineOptions(), Given()),
        (None, OPTIONS, Given(5, 6, 7)),
        (threads("3"), EngineOptions(), Given(threads=3)),
        (threads("3"), OPTIONS, Given(5, 3, 7)),
        (threads("0"), OPTIONS, Given(5, 6, 7)),
        ("instance_group { count: 2 } instance_group { }", OPTIONS, Given(3, 6, 7)),
        ("max_batch_size: 8 dynamic_batching { }", EngineOptions(), Given(joined_batch=8)),
        (
            "max_batch_size: 8 dynamic_batching { preferred_batch_size: 4 }",
            EngineOptions(),
            Given(joined_batch=4),
        ),
        # With nothing to join there is nothing to decide.
        ("max_batch_size: 1", EngineOptions(), Given()),
        ("max_batch_size: 0", EngineOptions(), Given()),
        # The configuration has been written, and without dynamic batching nothing is joined.
        ("max_batch_size: 8", EngineOptions(), Given(joined_batch=1)),
    ],
)
def test_settings_of_a_model_go_before_those_of_the_server(
    described, config, options, expected
) -> None:
    outline, description = described(config)
    assert given_by(options, outline, description) == expected


@pytest.mark.parametrize("count", ["two", "-1", "", "1.5", "99999", "²"])
def test_a_number_of_threads_that_is_none_is_refused_with_words(described, count) -> None:
    with pytest.raises(LoadRefused, match="must be a number of threads"):
        described(threads(count))


def test_what_was_measured_goes_before_the_defaults(described) -> None:
    _, description = described()
    options = EngineOptions(inline_seconds=100e-6)
    tuning = Tuning(4, 1, 4, 40e-6)
    assert running(options, 4, Given(), description, None, 60e-6) == Running(4, 1, 8, 1, 100e-6)
    assert running(options, 4, Given(), description, tuning, 60e-6) == Running(1, 4, 4, 2, 100e-6)
    by_hand = Given(workers=3, threads=4, joined_batch=2)
    assert running(options, 4, by_hand, description, tuning, 60e-6) == Running(3, 4, 2, 2, 100e-6)
    # However many rows a batch that was measured had, no more than the model takes.
    larger = Tuning(1, 4, 64, 1.0)
    assert running(options, 4, Given(), description, larger, 60e-6) == Running(4, 1, 8, 0, 100e-6)


def test_requests_that_wait_for_others_are_not_run_where_they_are(described) -> None:
    _, description = described()
    waiting = ModelDescription(
        description.inputs,
        description.outputs,
        description.max_batch_size,
        scheduling=Scheduling(delay_seconds=0.01),
    )
    assert running(EngineOptions(), 1, Given(), waiting, None, 1e-6).inline_rows == 0


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        (Given(), True),
        (Given(threads=2, workers=1, joined_batch=3), True),
        (Given(threads=1), False),
        (Given(workers=2), False),
    ],
)
def test_a_measurement_counts_only_for_the_threads_and_workers_it_was_made_with(
    given, counts
) -> None:
    tuning = Tuning(2, 1, 8, 1e-3)
    assert usable(tuning, given) == (tuning if counts else None)
