"""Images that are in the data more than once: in two parts, or in two classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pollard.compress.class_folders import Item, some

Seen = tuple[Item, bytes]
"""An image, and a digest of the pixels that a model is shown of it."""

_EXAMPLES = 3

# Later parts judge what earlier ones were used for.
_USES = (
    ("held-out", "train", "figures say too much of new images"),
    ("choose", "train", "what is chosen by it is chosen by what was learnt"),
    ("held-out", "choose", "figures say too much of new images"),
)


def find(parts: Mapping[str, Sequence[Seen]]) -> list[str]:
    """Say which images lie in two parts, and which in two classes.

    Args:
        parts: "train", "choose" and "held-out" → their images.

    Returns:
        Sentences without their full stop, beginning with a small letter.
    """
    where = {name: {digest: item for item, digest in seen} for name, seen in parts.items()}
    told: list[str] = []
    for later, earlier, why in _USES:
        both = [
            (item, where[earlier][digest])
            for item, digest in parts.get(later, ())
            if digest in where.get(earlier, ())
        ]
        if both:
            told.append(
                f"{len(both):,} of the {len(parts[later]):,} images that {_use(later)} are the "
                f"same as images that {_use(earlier)}, such as {_pairs(both)}: {why}; leave one "
                "of each in the data"
            )
    first: dict[bytes, Item] = {}
    contrary: list[tuple[Item, Item]] = []
    for seen in parts.values():
        for item, digest in seen:
            other = first.setdefault(digest, item)
            if other.label != item.label:
                contrary.append((item, other))
    if contrary:
        told.append(
            f"{len(contrary):,} image(s) lie in two classes, such as {_pairs(contrary)}: at least "
            "one of the two is wrong"
        )
    return told


def _use(part: str) -> str:
    uses = {"train": "are trained on", "choose": "choices are made by", "held-out": "judge"}
    return uses[part]


def _pairs(pairs: Sequence[tuple[Item, Item]]) -> str:
    return some(f"{one.path} = {other.path}" for one, other in pairs[:_EXAMPLES])
