"""Server reflection over services from more than one descriptor pool.

The `inference` contracts live in a pool of their own (`pollard.inference._pool`), the others in
protobuf's default pool. A reflection servicer reads one pool only and answers NOT_FOUND for what
lies in another, so the files of the services that a server offers are copied into one here.
"""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool

from pollard.inference._pool import POOL as _INFERENCE_POOL


def reflection_pool(service_names: Iterable[str]) -> DescriptorPool:
    """Return a pool with the contracts of the named services and all that they import.

    Pass it to `grpc_reflection.v1alpha.reflection.enable_server_reflection(names, server, pool)`.

    Args:
        service_names: Full names, such as "inference.GRPCInferenceService".

    Raises:
        KeyError: If no imported module defines a service of that name.
    """
    merged = DescriptorPool()
    added: set[str] = set()
    for name in service_names:
        _add(_file_of(name), merged, added)
    return merged


def _file_of(service_name: str) -> FileDescriptor:
    # The own pool comes first: another client of the protocol may have registered its copy of the
    # `inference` contracts in the default pool.
    try:
        return _INFERENCE_POOL.FindServiceByName(service_name).file
    except KeyError:
        return descriptor_pool.Default().FindServiceByName(service_name).file


def _add(file: FileDescriptor, merged: DescriptorPool, added: set[str]) -> None:
    """Add `file` after everything that it imports; a pool takes files in that order only."""
    if file.name in added:
        return
    added.add(file.name)
    for imported in file.dependencies:
        _add(imported, merged, added)
    merged.AddSerializedFile(file.serialized_pb)
