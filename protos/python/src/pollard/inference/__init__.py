"""Generated code of the Open Inference Protocol with Triton's extensions.

The messages live in a descriptor pool of their own (`_pool.POOL`), so that this package and
another client of the protocol, such as tritonclient, can be imported into one process.
"""
