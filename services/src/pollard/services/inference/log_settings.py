"""The protocol's settings of logs and traces, over the service's own logging."""

from __future__ import annotations

from pollard.inference import grpc_service_pb2 as pb
from pollard.services.common.logs import enabled_levels, set_enabled_levels
from pollard.services.inference.errors import FeatureNotOffered, RequestInvalid

_LEVELS = {"log_info": "info", "log_warning": "warning", "log_error": "error"}


def log_settings(request: pb.LogSettingsRequest) -> pb.LogSettingsResponse:
    """Change the settings that the request names, all or none, and return those in force.

    Raises:
        RequestInvalid: a setting is unknown, or its value is of the wrong type.
        FeatureNotOffered: the log cannot be moved to a file while the server runs.
    """
    levels = set(enabled_levels())
    for name, value in request.settings.items():
        kind = value.WhichOneof("parameter_choice")
        if name in _LEVELS:
            _expect(name, kind, "bool_param")
            _switch(levels, _LEVELS[name], value.bool_param)
        elif name == "log_verbose_level":
            _expect(name, kind, "uint32_param")
            _switch(levels, "debug", value.uint32_param > 0)
        elif name == "log_file":
            _expect(name, kind, "string_param")
            if value.string_param:
                raise FeatureNotOffered(
                    "log file location can not be updated through network protocol; the log goes "
                    "to standard error"
                )
        elif name == "log_format":
            _expect(name, kind, "string_param")
            if value.string_param not in ("default", "ISO8601"):
                raise RequestInvalid(
                    f"invalid argument for log_format: '{value.string_param}'; times are written "
                    "as ISO8601",
                    setting=name,
                )
        else:
            raise RequestInvalid(
                f"unknown log setting '{name}'; there are log_file, log_format, log_verbose_level, "
                f"{', '.join(_LEVELS)}",
                setting=name,
            )
    set_enabled_levels(levels)
    response = pb.LogSettingsResponse()
    response.settings["log_file"].string_param = ""
    response.settings["log_format"].string_param = "ISO8601"
    response.settings["log_verbose_level"].uint32_param = int("debug" in levels)
    for name, level in _LEVELS.items():
        response.settings[name].bool_param = level in levels
    return response


def trace_settings(request: pb.TraceSettingRequest) -> pb.TraceSettingResponse:
    """Return the trace settings: tracing is off and cannot be turned on.

    Raises:
        FeatureNotOffered: the request asks for traces.
        RequestInvalid: a setting is unknown.
    """
    settings = {
        "trace_level": "OFF",
        "trace_rate": "1000",
        "trace_count": "-1",
        "log_frequency": "0",
        "trace_file": "",
        "trace_mode": "triton",
    }
    for name, value in request.settings.items():
        if name not in settings:
            raise RequestInvalid(
                f"unknown trace setting '{name}'; there are {', '.join(settings)}", setting=name
            )
        if name == "trace_level" and any(level != "OFF" for level in value.value):
            raise FeatureNotOffered("the server does not support tracing by this protocol")
    response = pb.TraceSettingResponse()
    for name, text in settings.items():
        response.settings[name].value.append(text)
    return response


def _switch(levels: set[str], level: str, on: bool) -> None:
    if on:
        levels.add(level)
    else:
        levels.discard(level)


def _expect(name: str, kind: str | None, wanted: str) -> None:
    if kind != wanted:
        raise RequestInvalid(
            f"expect {wanted} for log setting '{name}', got {kind or 'nothing'}", setting=name
        )
