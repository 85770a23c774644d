"""numpy arrays survive the way there and back."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pollard.client import InvalidAnswer
from pollard.client._tensors import datatype_of, from_raw, to_raw

DTYPES = [
    np.bool_,
    *(np.dtype(f"{order}{kind}") for order in "<>" for kind in ("u1", "u2", "u4", "u8")),
    *(np.dtype(f"{order}{kind}") for order in "<>" for kind in ("i1", "i2", "i4", "i8")),
    *(np.dtype(f"{order}{kind}") for order in "<>" for kind in ("f2", "f4", "f8")),
]


@given(
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0))
    )
)
def test_every_number_survives(array: np.ndarray) -> None:
    back = from_raw(datatype_of(array), array.shape, to_raw(array))
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype.newbyteorder("<")


def test_arrays_that_are_not_contiguous_are_sent_in_row_major_order() -> None:
    array = np.arange(24, dtype=np.int32).reshape(2, 3, 4).transpose(2, 0, 1)
    np.testing.assert_array_equal(from_raw("INT32", array.shape, to_raw(array)), array)


@given(st.lists(st.binary(max_size=20), max_size=6))
def test_byte_strings_survive(elements: list[bytes]) -> None:
    array = np.array([*elements, None], dtype=np.object_)[:-1]
    assert list(from_raw("BYTES", [len(elements)], to_raw(array))) == elements


def test_text_is_sent_as_utf8() -> None:
    assert list(from_raw("BYTES", [2], to_raw(np.array(["ä", "b"])))) == ["ä".encode(), b"b"]


def test_bfloat16_is_sent_raw_and_comes_back_as_float32() -> None:
    array = np.array([[1.5, -2.0, 0.0]], dtype=ml_dtypes.bfloat16)
    assert datatype_of(array) == "BF16"
    back = from_raw("BF16", array.shape, to_raw(array))
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, array.astype(np.float32))


def test_types_that_the_protocol_lacks_are_refused() -> None:
    with pytest.raises(TypeError, match="complex64"):
        datatype_of(np.zeros(1, np.complex64))


@pytest.mark.parametrize(
    ("datatype", "shape", "raw"),
    [("FP32", [2], b"\0" * 7), ("NOPE", [1], b"\0"), ("BYTES", [1], b"\5\0\0\0ab")],
)
def test_bytes_that_do_not_fit_are_an_invalid_answer(
    datatype: str, shape: list[int], raw: bytes
) -> None:
    with pytest.raises(InvalidAnswer):
        from_raw(datatype, shape, raw)
