"""One service in this process, told what to do by flags, environment and file."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from pollard.services.common.redact import without_secrets

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from pollard.services.common.settings import ServiceSettings

_SETTINGS = {
    "inference": "InferenceSettings",
    "preprocess": "PreprocessSettings",
    "models": "ModelsSettings",
}


def settings_class(service: str) -> type[ServiceSettings]:
    """Return the settings class of a service."""
    module = importlib.import_module(f"pollard.services.{service}.settings")
    found: type[ServiceSettings] = getattr(module, _SETTINGS[service])
    return found


def serve_command(service: str, arguments: Sequence[str]) -> int:
    """Run `pollard serve SERVICE ARGUMENTS…` and return its exit code.

    Raises:
        StartupError: A setting is invalid.
    """
    app = service_app(service)
    result = app(args=list(arguments), prog_name=f"pollard serve {service}", standalone_mode=False)
    return result if isinstance(result, int) else 0


def service_app(service: str) -> typer.Typer:
    """Return the command that starts a service, with an option for each of its settings."""
    settings_type = settings_class(service)

    def run(config: Path | None, print_config: bool, **flags: Any) -> int:
        settings = settings_type.load(_without_unset(flags), config)
        if print_config:
            print(as_toml(settings), end="")
            return 0
        settings.prepare_process()
        main = importlib.import_module(f"pollard.services.{service}.main")
        code: int | None = main.run(settings)
        return code or 0

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(help=_help(settings_type))(_with_options(run, settings_type))
    return app


def as_toml(settings: ServiceSettings) -> str:
    """Return settings as the table of a TOML file that `--config` reads; passwords are left out."""
    lines = [f"[{settings.section}]"]
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if field.description:
            lines.append(f"# {field.description}")
        if value is None:
            lines.append(f"# {name} is not set")
        else:
            lines.append(f"{name} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple | set | frozenset):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        items = ", ".join(f"{json.dumps(str(k))} = {_toml_value(v)}" for k, v in value.items())
        return "{" + items + "}"
    # A JSON string is a TOML basic string, once it holds no raw control characters; json.dumps
    # escapes those.
    return json.dumps(without_secrets(str(value)), ensure_ascii=False)


def _help(settings_type: type[ServiceSettings]) -> str:
    prefix = f"POLLARD_{settings_type.section.upper()}_"
    return (
        f"Start the {settings_type.section} service, and keep it in the foreground. Each option is "
        f"also the environment variable {prefix}NAME, and the key of that name in the table "
        f"[{settings_type.section}] of the file given with --config; flags go before the "
        "environment, the environment before the file."
    )


def _with_options(function: Any, settings_type: type[ServiceSettings]) -> Any:
    """Give a function the parameters that typer makes options of, one for each setting."""
    parameters = [
        _parameter(
            "config",
            Path | None,
            typer.Option("--config", metavar="FILE", help="TOML file with settings."),
            None,
        ),
        _parameter(
            "print_config",
            bool,
            typer.Option("--print-config", help="Print the settings in force, and stop."),
            False,
        ),
    ]
    for name, field in settings_type.model_fields.items():
        parameters.append(_setting(name, field))

    def command(**values: Any) -> int:
        code: int = function(**values)
        return code

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # for typer
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    return command


def _setting(name: str, field: FieldInfo) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    default = field.get_default(call_default_factory=True, validated_data={})
    text = field.description or ""
    if default not in (None, "", ()):
        text = f"{text} Default: {default}."
    kinds = set(get_args(field.annotation) or [field.annotation])
    if kinds <= {bool, type(None)}:
        option = typer.Option(f"{flag}/--no-{flag[2:]}", help=text, show_default=False)
        return _parameter(name, bool | None, option, None)
    for kind in (int, float):
        if kinds <= {kind, type(None)}:
            option = typer.Option(flag, help=text, show_default=False)
            return _parameter(name, kind | None, option, None)
    if get_origin(field.annotation) in (list, tuple):
        option = typer.Option(flag, metavar="TEXT", help=text, show_default=False)
        return _parameter(name, list[str] | None, option, None)
    choices = [kind for kind in kinds if isinstance(kind, str)]
    for kind in kinds:
        if get_origin(kind) is Literal:
            choices += get_args(kind)
    if choices and int in kinds:
        choices.append("NUMBER")
    metavar = "|".join(sorted(choices)) if choices else "TEXT"
    option = typer.Option(flag, metavar=metavar, help=text, show_default=False)
    return _parameter(name, str | None, option, None)


def _parameter(name: str, kind: Any, option: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, option],
    )


def _without_unset(flags: dict[str, Any]) -> dict[str, Any]:
    # An option that may be repeated and was not given comes as an empty list.
    return {name: value for name, value in flags.items() if value is not None and value != []}
