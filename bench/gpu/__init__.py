"""The GPU path, measured in one command on a machine without network: `python -m bench.gpu`."""
