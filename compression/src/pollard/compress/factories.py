"""Models of the caller's own: found by import path, built, and what is amiss said in a line."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from pollard.compress.errors import ModelUnknown, first_line


def build(module_name: str, attribute: str) -> nn.Module:
    """Call the factory of an import path.

    Raises:
        ModelUnknown: the module cannot be imported, or the factory gives no module; it says
            where in the caller's own code that was.
    """
    factory = _find(module_name, attribute)
    name = f"{module_name}:{attribute}"
    if isinstance(factory, nn.Module):
        raise ModelUnknown(
            f"{name} is a model already; name a function without arguments that returns it"
        )
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ModelUnknown(
            f"{name} is called without arguments, but: {error}. Name a function that gives them, "
            f"such as `def make(): return {attribute}(…)`"
        ) from error
    except ValueError:
        pass  # of builtins nothing is known
    try:
        model = factory()
    except MemoryError:
        raise
    except Exception as error:  # whatever its code raises
        raise ModelUnknown(f"{name} failed with {_told(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelUnknown(f"{name} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _find(module_name: str, attribute: str) -> Callable[[], Any]:
    # A script's own directory is not on the path of an installed command.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    path = Path(module_name)
    if (path.suffix == ".py" and path.is_file()) or {"/", "\\"} & set(module_name):
        raise ModelUnknown(
            f"{module_name} is a path; a module is named as `import` names it: in the folder "
            f"{path.parent} give {path.stem}:{attribute}"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        where = f"; it is looked for in {here} and on PYTHONPATH"
        missing = error.name is not None and f"{module_name}.".startswith(f"{error.name}.")
        raise ModelUnknown(
            f"cannot import {module_name!r}: {error}{where if missing else ''}"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # whatever its code raises
        raise ModelUnknown(f"cannot import {module_name!r}: {_told(error)}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ModelUnknown(f"{module_name} has no callable {attribute!r}")
    found: Callable[[], Any] = factory
    return found


def _told(error: Exception) -> str:
    """Return what was raised, and the line of the caller's code from which it came."""
    text = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, SyntaxError):
        return text  # names file and line itself
    libraries = tuple(str(Path(sys.modules[name].__file__ or "").parent) for name in ("torch",))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<", *libraries)) and frame.filename != __file__
    ]
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text
