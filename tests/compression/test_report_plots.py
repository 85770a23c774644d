from __future__ import annotations

import json
import re
from typing import Any

from pollard.compress.report_plots import confusion_map, curves, front_plot


def layout(drawn: str) -> dict[str, Any]:
    """Return the layout of a plot: the second of the JSON values that it is drawn from."""
    decoder = json.JSONDecoder()
    begin = re.search(r'Plotly\.newPlot\(\s*"[^"]+",\s*', drawn)
    assert begin is not None
    _, end = decoder.raw_decode(drawn, begin.end())
    found, _ = decoder.raw_decode(drawn, drawn.index("{", end))
    assert isinstance(found, dict)
    return found


def test_a_map_of_many_classes_names_as_many_as_have_room() -> None:
    classes = [f"n{i:05d} great white shark, white shark, man-eater" for i in range(200)]
    matrix = [[0] * 200 for _ in classes]
    drawn = layout(confusion_map(classes, matrix, ""))
    for axis in ("xaxis", "yaxis"):
        assert len(drawn[axis]["tickvals"]) <= 24
        assert max(map(len, drawn[axis]["ticktext"])) <= 18
        assert drawn[axis]["ticktext"][0].endswith("…")


def test_a_map_of_few_classes_names_all() -> None:
    drawn = layout(confusion_map(["cat", "dog"], [[1, 2], [3, 4]], ""))
    assert drawn["xaxis"]["ticktext"] == drawn["yaxis"]["ticktext"] == ["cat", "dog"]


def test_counts_of_pixels_fit_into_their_cells() -> None:
    drawn = confusion_map(["a", "b"], [[9999, 33030], [0, 2_345_678]], "")
    written = [note["text"] for note in layout(drawn)["annotations"]]
    assert written == ["9999", "2.3M"]
    assert '"33k"' in drawn


def test_a_flat_curve_stays_within_what_can_be() -> None:
    recovery = {"start_accuracy": 0.97, "choose_accuracy": [0.97], "loss": [0.4]}
    drawn = layout(curves({"recovery": recovery}, "mIoU"))
    lower, upper = drawn["yaxis"]["range"]
    assert 0.9 < lower < 0.97 < upper < 1
    assert drawn["yaxis"]["title"]["text"] == "mIoU"


def test_a_search_is_drawn_by_its_own_metric() -> None:
    drawn = layout(front_plot({"trials": [], "front": [], "chosen": 0}, 1.0, "mAP"))
    assert drawn["yaxis"]["title"]["text"] == "mAP against the parent, points"
