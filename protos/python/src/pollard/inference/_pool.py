"""The descriptor pool of the `inference` package."""

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
"""Holds the `inference` contracts apart from protobuf's default pool.

Other clients of the Open Inference Protocol register the same symbols in the default pool, and a
second definition there raises. No contract outside the package may import it, for the same reason.
"""
