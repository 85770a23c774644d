"""Ports, directories and command lines."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pollard.services.common.errors import StartupError
from pollard.services.common.tls_files import TlsFiles
from pollard.services.up import plan as plans_of_up
from pollard.services.up.plan import UpOptions, default_data_dir, make_plan


def _ports(options: UpOptions) -> dict[str, int]:
    return {plan.name: plan.port for plan in make_plan(options)[1]}


def test_free_ports_differ_and_can_be_had(tmp_path: Path) -> None:
    ports = _ports(UpOptions(data_dir=tmp_path, port_base=0))
    assert len(set(ports.values())) == 3
    for port in ports.values():
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port))
            server.listen()


def test_a_process_that_ends_lets_its_ports_go(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from pollard.services.up.plan import UpOptions, make_plan; "
        f"make_plan(UpOptions(data_dir=Path({str(tmp_path)!r}), port_base=0))"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stderr == ""


def test_two_that_look_for_ports_at_the_same_time_find_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both try the same ones in the same order; no service of the first has begun to listen.
    monkeypatch.setattr(plans_of_up.random, "sample", lambda ports, count: list(ports)[:count])
    plans = [
        plan for _ in range(2) for plan in make_plan(UpOptions(data_dir=tmp_path, port_base=0))[1]
    ]
    ports = [port for plan in plans for port in (plan.port, plan.http_port)]
    assert len(set(ports)) == 12


def test_ports_follow_their_base_unless_they_are_named(tmp_path: Path) -> None:
    free = _ports(UpOptions(data_dir=tmp_path, port_base=0))
    ports = _ports(
        UpOptions(
            data_dir=tmp_path, port_base=20100, inference_port=free["inference"], models_port=0
        )
    )
    assert ports["preprocess"] == 20111
    assert ports["inference"] == free["inference"]
    assert ports["models"] not in (0, 20121)


def test_a_port_in_use_names_service_port_and_way_out(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=rf"port {port} .* for models, is in use.*--models-"):
            make_plan(UpOptions(data_dir=tmp_path, port_base=0, models_port=port))


def test_an_address_of_another_machine_is_told(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"192\.0\.2\.1"):
        make_plan(UpOptions(data_dir=tmp_path, host="192.0.2.1"))


def test_each_service_knows_the_manager_and_its_own_folder(tmp_path: Path) -> None:
    data_dir, plans = make_plan(UpOptions(data_dir=tmp_path / "new", port_base=0, insecure=True))
    models, inference, preprocess = plans
    assert data_dir.is_dir()
    assert str(data_dir / "models") in models.arguments
    for plan in (inference, preprocess):
        assert models.address in plan.arguments
        assert str(data_dir / plan.name) in plan.arguments
    for plan in plans:
        assert "--insecure" in plan.arguments
        assert str(os.getpid()) in plan.command()


def test_replicas_have_ports_folders_and_caches_of_their_own(tmp_path: Path) -> None:
    options = UpOptions(data_dir=tmp_path, port_base=20100, replicas=3)
    _, plans = make_plan(options)
    ports = {plan.name: plan.port for plan in plans}
    assert ports == {
        "models": 20121,
        "inference": 20101,
        "inference-2": 20201,
        "inference-3": 20301,
        "preprocess": 20111,
    }
    replicas = [plan for plan in plans if plan.service == "inference"]
    for plan in replicas:
        assert "inference" in plan.command()
        assert str(tmp_path / plan.name) in plan.arguments
        assert plan.arguments[plan.arguments.index("--replicas") + 1] == "3"
    others = [plan for plan in plans if plan.service != "inference"]
    assert not any("--replicas" in plan.arguments for plan in others)
    assert len(set(_ports(UpOptions(data_dir=tmp_path, port_base=0, replicas=5)).values())) == 7


def test_the_balancer_has_the_port_that_clients_know(tmp_path: Path) -> None:
    pytest.importorskip("envoy")
    options = UpOptions(data_dir=tmp_path, port_base=20400, replicas=2, balance=True)
    _, plans = make_plan(options)
    ports = {plan.name: plan.port for plan in plans}
    assert (ports["balancer"], ports["inference"], ports["inference-2"]) == (20401, 20501, 20601)
    balancer = plans[-1]
    assert balancer.name == "balancer"
    told = json.loads(balancer.arguments[balancer.arguments.index("--config-yaml") + 1])
    (cluster,) = told["static_resources"]["clusters"]
    behind = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    found = [each["endpoint"]["address"]["socket_address"]["port_value"] for each in behind]
    assert found == [20501, 20601]


def test_the_balancer_and_tls_exclude_each_other(tmp_path: Path) -> None:
    files = TlsFiles(certificate=tmp_path / "c.pem", key=tmp_path / "k.pem", ca=tmp_path / "a.pem")
    with pytest.raises(StartupError, match="--balance and TLS exclude each other"):
        make_plan(UpOptions(data_dir=tmp_path, port_base=0, balance=True, tls=files))


def test_replicas_beyond_the_last_port_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="choose a lower --inference-port"):
        make_plan(UpOptions(data_dir=tmp_path, inference_port=65000, replicas=7))


@pytest.mark.parametrize(
    ("host", "address"), [("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("localhost", "localhost")]
)
def test_addresses_can_be_dialled(tmp_path: Path, host: str, address: str) -> None:
    from pollard.services.up.plan import ServicePlan

    assert ServicePlan("models", host, 5, ()).address == f"{address}:5"


def test_data_lies_in_the_users_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert default_data_dir() == Path("/somewhere/pollard")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_data_dir() == Path("/home/me/.local/state/pollard")


def test_http_has_the_port_after_each_services_unless_the_file_says_otherwise(
    tmp_path: Path,
) -> None:
    free = _ports(UpOptions(data_dir=tmp_path, port_base=0))
    file = tmp_path / "pollard.toml"
    file.write_text('[models]\nhttp_port = "off"\n')
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", free["preprocess"] + 1))
        taken.listen()
        options = UpOptions(
            data_dir=tmp_path,
            inference_port=free["inference"],
            preprocess_port=free["preprocess"],
            models_port=free["inference"] + 1,
            config=file,
        )
        plans = {plan.name: plan for plan in make_plan(options)[1]}
    assert plans["models"].http_port == 0
    assert "--http-port" not in plans["models"].arguments
    used = {free["inference"], free["preprocess"], free["inference"] + 1, free["preprocess"] + 1}
    for name in ("inference", "preprocess"):
        assert plans[name].http_port not in {0, *used}
        given = plans[name].arguments.index("--http-port") + 1
        assert plans[name].arguments[given] == str(plans[name].http_port)
