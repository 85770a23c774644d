"""Large tensors of a request's bytes, without a copy of them.

protobuf copies a tensor when it reads the message, and once more when it is asked for it. Here the
top level of the message is walked over, its tensors are left where they are, and protobuf reads the
rest.
"""

from __future__ import annotations

from pollard.inference import grpc_service_pb2 as pb

_RAW_FIELD = pb.ModelInferRequest.DESCRIPTOR.fields_by_name["raw_input_contents"].number
_RAW_TAG = _RAW_FIELD << 3 | 2
"""What stands before a tensor: its field, and that a length follows."""

_WORTH_BYTES = 64 << 10
"""protobuf copies what is smaller in less time than it takes to walk over the message."""

_MOST_FIELDS = 64
"""At the top level; walking over more would take longer than the copies do."""

_LONGEST_LENGTH = 5
"""Bytes of a length; a message has less than 2 GiB."""


def take_out_tensors(data: bytes) -> tuple[bytes, list[memoryview]] | None:
    """Return a ModelInferRequest without its raw contents, and those, which are parts of `data`.

    Args:
        data: The message as it came.

    Returns:
        None if that is not worth it, or the message is not as they usually are, or none at all:
        protobuf then reads all of it, and says what is wrong.
    """
    end = len(data)
    if end < _WORTH_BYTES:
        return None
    whole = memoryview(data)
    rest: list[bytes] = []
    tensors: list[memoryview] = []
    position = kept = fields = 0
    while position < end:
        tag, start = data[position], position + 1
        fields += 1
        # All fields that there are have a length, and a tag of one byte.
        if tag & 7 != 2 or tag > 0x7F or tag < 8 or fields > _MOST_FIELDS:
            return None
        size = shift = 0
        while True:
            if start >= end or shift >= 7 * _LONGEST_LENGTH:
                return None
            byte = data[start]
            start += 1
            size |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
        stop = start + size
        if stop > end:
            return None
        if tag == _RAW_TAG:
            rest.append(data[kept:position])
            tensors.append(whole[start:stop])
            kept = stop
        position = stop
    rest.append(data[kept:])
    return b"".join(rest), tensors
