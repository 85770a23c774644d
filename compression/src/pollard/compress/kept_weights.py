"""The weights a bundle was made of, kept in it to train on: `pollard bundle --keep-weights`.

What a bundle serves is folded and fused; the network's own weights cannot be had from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from pollard.compress.errors import UsageInvalid, WeightsInvalid
from pollard.compress.models import read_state
from pollard.runtime.bundle import MANIFEST, Bundle
from pollard.runtime.errors import RuntimeFault

FILE = "training/weights.safetensors"


def files(module: nn.Module, keep: bool) -> Mapping[str, bytes]:
    """Return what a bundle holds beside its files, by path; nothing where nothing is kept."""
    if not keep:
        return {}
    # Copies, because modules that are shared appear under several names.
    state = {
        name: value.detach().clone().contiguous() for name, value in module.state_dict().items()
    }
    return {FILE: safetensors.torch.save(state)}


def weights_file(path: Path) -> Path:
    """Return the file to begin from: ``path`` itself, or what is kept in the bundle there.

    Raises:
        UsageInvalid: the bundle keeps no weights; the message says which file it was made from.
        WeightsInvalid: the bundle is damaged, or the directory is none.
    """
    if not path.is_dir():
        return path
    if not (path / MANIFEST).is_file():
        raise WeightsInvalid(f"{path} is a directory, and no bundle: it holds no {MANIFEST}")
    try:
        manifest = Bundle.open(path).manifest
    except RuntimeFault as error:
        raise WeightsInvalid(str(error)) from error
    if FILE in {file.path for file in manifest.files}:
        return path / FILE
    digest = manifest.provenance.parent_digest
    raise UsageInvalid(
        f"{path} is a bundle whose weights are folded for serving and cannot be trained: give the "
        ".safetensors or .pt file that it was made from"
        + (f" (its SHA-256 is {digest})" if digest else "")
        + ", or make the bundle with pollard bundle --keep-weights"
    )


def read(path: Path) -> dict[str, Tensor]:
    """Read the weights of a file, or those kept in a bundle.

    Raises:
        UsageInvalid, WeightsInvalid: as :func:`weights_file`, or the file is not a state dict.
    """
    return read_state(weights_file(path))
