"""The Kubernetes manifests: rendered by kubectl, validated, and held against the services."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pollard.services.common.http_server import HEALTH_PATHS

ROOT = Path(__file__).parents[2] / "deploy" / "kubernetes"
SUITES = ("base", "overlays/gpu", "overlays/fleet", "overlays/tls")
HEALTH = "grpc.health.v1.Health"
OURS = ("serving.kserve.io", "monitoring.coreos.com", "cert-manager.io")
"""Kinds that Kubernetes itself does not know."""

Object = dict[str, Any]


def render(folder: str | Path) -> list[Object]:
    """What `kubectl apply -k` would send."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed: apt-get install kubernetes-client")
    done = subprocess.run(
        [kubectl, "kustomize", str(ROOT / folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


@pytest.fixture(scope="module")
def rendered() -> Callable[[str], list[Object]]:
    """:func:`render`, once for each folder."""
    known: dict[str, list[Object]] = {}

    def get(folder: str) -> list[Object]:
        if folder not in known:
            known[folder] = render(folder)
        return known[folder]

    return get


@pytest.fixture(scope="module")
def validated() -> set[str]:
    """What is known to be valid."""
    return set()


def workloads(objects: list[Object]) -> Iterator[tuple[Object, Object, Object]]:
    """Each workload with its pod and its container."""
    for each in objects:
        if each["kind"] in ("Deployment", "StatefulSet"):
            pod = each["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            yield each, pod, container


def folders() -> list[str]:
    return sorted(str(file.parent.relative_to(ROOT)) for file in ROOT.glob("**/kustomization.yaml"))


@pytest.mark.parametrize("folder", folders())
def test_kubernetes_would_take_every_object(
    folder: str, rendered: Callable[[str], list[Object]], validated: set[str]
) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    objects = rendered(folder)
    assert objects
    for each in objects:
        # Most objects are the same in several folders, and each takes a while.
        text = yaml.safe_dump(each)
        if each["apiVersion"].partition("/")[0] not in OURS and text not in validated:
            validate.validate(each, validate.latest_version(), strict=True)
            validated.add(text)


def environment(container: Object) -> dict[str, str]:
    """Its variables; those that come from secrets and the pod have a value of the right kind."""
    known = {
        "pollard-database.url": "postgresql://user:word@db/pollard",
        "pollard-s3.blobs": "s3://bucket/prefix",
        "pollard-s3.endpoint": "",
        "pollard-s3.region": "eu-west-1",
        "metadata.name": "pollard-models-0",
        "status.podIP": "10.1.2.3",
    }
    found: dict[str, str] = {}
    for variable in container["env"]:
        assert variable["name"] not in found, f"{variable['name']} is set twice"
        source = variable.get("valueFrom", {})
        if not source:
            found[variable["name"]] = variable["value"]
        elif "fieldRef" in source:
            found[variable["name"]] = known[source["fieldRef"]["fieldPath"]]
        else:
            (reference,) = source.values()
            key = f"{reference['name']}.{reference['key']}"
            found[variable["name"]] = known.get(key, "secret")
    return found


@pytest.mark.parametrize("folder", SUITES)
def test_the_services_understand_what_they_are_told(
    folder: str,
    rendered: Callable[[str], list[Object]],
    settings_of: Callable[..., Any],
    would_listen: Callable[[Any], None],
    expand: Callable[..., dict[str, str]],
) -> None:
    managers, told = set(), set()
    for workload, pod, container in workloads(rendered(folder)):
        name = container["name"]
        found = settings_of(container["args"], expand(environment(container), {}))
        would_listen(found)
        assert container["args"] == ["serve", name]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports == {"grpc": found["port"], "http": found["http_port"]}
        notes = workload["spec"]["template"]["metadata"]["annotations"]
        assert notes["prometheus.io/port"] == str(found["http_port"])
        # What is written must be on a volume: the root file system is read-only.
        kept = Path(found["store" if name == "models" else "cache_dir"])
        mounts = {Path(mount["mountPath"]) for mount in container["volumeMounts"]}
        assert mounts & set(kept.parents), kept
        assert Path("/tmp") in mounts  # noqa: S108 - of the container
        drain = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert drain > found["grace_seconds"]
        assert pod["terminationGracePeriodSeconds"] > drain + found["grace_seconds"]
        if name == "models":
            service = workload["spec"]["serviceName"]
            managers = {
                f"{workload['metadata']['name']}-{number}.{service}:{found['port']}"
                for number in range(workload["spec"]["replicas"])
            }
            assert found["advertise"] in managers
            if len(managers) > 1:
                assert found["database_url"]
                assert found["blobs"].startswith("s3://")
        else:
            told.add(found["manager"])
            # Requests that came before everybody has heard of the stop are still answered.
            assert drain >= found["max_request_seconds"]
    assert {name for names in told for name in names.split(",")} == managers


@pytest.mark.parametrize("folder", SUITES)
def test_pods_may_do_nothing_that_they_need_not(
    folder: str, rendered: Callable[[str], list[Object]]
) -> None:
    for _, pod, container in workloads(rendered(folder)):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])


@pytest.mark.parametrize("folder", SUITES)
def test_probes_ask_whether_it_takes_requests_and_whether_it_lives(
    folder: str, rendered: Callable[[str], list[Object]]
) -> None:
    for _, _, container in workloads(rendered(folder)):
        ports = {each["name"]: each["containerPort"] for each in container["ports"]}
        ready, live = container["readinessProbe"], container["livenessProbe"]
        if folder == "overlays/tls":
            # Kubernetes' own gRPC probes speak no TLS.
            assert "grpc" not in ready
            assert "grpc" not in live
            found = [
                (probe["httpGet"]["path"], probe["httpGet"]["scheme"]) for probe in (ready, live)
            ]
            assert found == [("/health/ready", "HTTPS"), ("/health/live", "HTTPS")]
            assert {path for path, _ in found} == set(HEALTH_PATHS)
            assert {ready["httpGet"]["port"], live["httpGet"]["port"]} <= set(ports)
        else:
            assert ready["grpc"] == {"port": ports["grpc"]}
            # A server that waits for its manager, or drains, is not to be killed.
            assert live["grpc"] == {"port": ports["grpc"], "service": HEALTH}
        assert "startupProbe" in container


@pytest.mark.parametrize("folder", SUITES)
def test_services_budgets_and_policies_find_their_pods(
    folder: str, rendered: Callable[[str], list[Object]]
) -> None:
    objects = rendered(folder)
    pods = {
        container["name"]: (workload["spec"]["template"]["metadata"]["labels"], container)
        for workload, _, container in workloads(objects)
    }

    def selected(labels: dict[str, str]) -> set[str]:
        return {name for name, (has, _) in pods.items() if labels.items() <= has.items()}

    kinds: dict[str, list[Object]] = {}
    for each in objects:
        kinds.setdefault(each["kind"], []).append(each)
    for service in kinds["Service"]:
        (name,) = selected(service["spec"]["selector"])
        # Clients take the addresses behind it in turn.
        assert service["spec"]["clusterIP"] == "None"
        ports = {port["name"]: port["containerPort"] for port in pods[name][1]["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    covered = [
        selected(budget["spec"]["selector"]["matchLabels"])
        for budget in kinds["PodDisruptionBudget"]
    ]
    assert covered == [{"inference"}, {"models"}, {"preprocess"}]
    # What each service calls must be let out there and in here.
    for caller, called in (
        ("preprocess", "inference"),
        ("preprocess", "models"),
        ("inference", "models"),
        ("models", "models"),
        ("models", "preprocess"),
    ):
        port = pods[called][1]["ports"][0]["containerPort"]
        assert _allows(kinds["NetworkPolicy"], pods, "egress", caller, called, port)
        assert _allows(kinds["NetworkPolicy"], pods, "ingress", called, caller, port)
    assert not _allows(kinds["NetworkPolicy"], pods, "ingress", "preprocess", "inference", 8011)
    assert not _allows(kinds["NetworkPolicy"], pods, "ingress", "inference", "models", 8001)


def _allows(
    policies: list[Object], pods: Any, direction: str, of: str, other: str, port: int
) -> bool:
    """Whether a policy of `of` lets traffic with `other` pass at a port."""

    def matches(selector: Object, labels: dict[str, str]) -> bool:
        wanted = selector.get("matchLabels", {})
        if any(key not in labels for key in wanted):
            return False
        for rule in selector.get("matchExpressions", ()):
            assert rule["operator"] == "In"
            if labels.get(rule["key"]) not in rule["values"]:
                return False
        return bool(wanted.items() <= labels.items())

    for policy in policies:
        if not matches(policy["spec"]["podSelector"], pods[of][0]):
            continue
        for rule in policy["spec"].get(direction, ()):
            peers = rule.get("from" if direction == "ingress" else "to", [])
            ports = [each["port"] for each in rule["ports"]]
            if port in ports and any(
                "podSelector" in peer and matches(peer["podSelector"], pods[other][0])
                for peer in peers
            ):
                return True
    return False


def test_an_overlay_of_ones_own_takes_images_from_elsewhere(tmp_path: Path) -> None:
    page = (ROOT.parents[1] / "docs" / "deploy.md").read_text()
    (overlay,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    # Bases are named relative to the folder, which lies beside `deploy`.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kustomization.yaml").write_text(overlay)
    shutil.copytree(ROOT, tmp_path / "deploy" / "kubernetes")
    version = (ROOT.parents[1] / "VERSION").read_text().strip()
    images = {container["image"] for _, _, container in workloads(render(tmp_path / "mine"))}
    assert images == {f"registry.example/pollard-services:{version}"}


def test_what_the_fleet_is_to_be_given_is_said(
    rendered: Callable[[str], list[Object]],
) -> None:
    wanted: set[tuple[str, str]] = set()
    for _, pod, container in workloads(rendered("overlays/tls")):
        for variable in container["env"]:
            source = variable.get("valueFrom", {})
            for kind, resource in (("secretKeyRef", "secret"), ("configMapKeyRef", "configmap")):
                if kind in source:
                    wanted.add((resource, source[kind]["name"]))
        wanted |= {
            ("secret", volume["secret"]["secretName"])
            for volume in pod["volumes"]
            if "secret" in volume
        }
    said = "".join(
        (ROOT / "overlays" / name / "kustomization.yaml").read_text() for name in ("fleet", "tls")
    )
    assert wanted == {
        ("secret", "pollard-database"),
        ("secret", "pollard-s3"),
        ("configmap", "pollard-s3"),
        ("secret", "pollard-tls"),
    }
    for kind, name in wanted:
        words = f"create {kind} generic {name}" if kind == "secret" else f"create {kind} {name}"
        assert words in said
    certificate = yaml.safe_load((ROOT / "overlays/tls/certificate.yaml").read_text())
    assert certificate["spec"]["secretName"] == "pollard-tls"


def test_tls_leaves_no_port_open(
    rendered: Callable[[str], list[Object]], settings_of: Callable[..., Any]
) -> None:
    certificate = yaml.safe_load((ROOT / "overlays/tls/certificate.yaml").read_text())
    for _, pod, container in workloads(rendered("overlays/tls")):
        found = environment(container)
        settings = settings_of(container["args"], found)
        assert settings["insecure"] is False
        assert settings["tls_client_ca"]
        assert settings["tls_name"] in certificate["spec"]["dnsNames"]
        (mount,) = (each for each in container["volumeMounts"] if each["name"] == "tls")
        for name in ("tls_certificate", "tls_key", "tls_ca", "tls_client_ca"):
            path = Path(settings[name])
            assert str(path.parent) == mount["mountPath"]
            assert path.name in ("tls.crt", "tls.key", "ca.crt")
        assert any(volume["name"] == "tls" for volume in pod["volumes"])


def test_the_gpu_overlay_asks_for_one(rendered: Callable[[str], list[Object]]) -> None:
    found = {
        container["name"]: (container, pod)
        for _, pod, container in workloads(rendered("overlays/gpu"))
    }
    container, pod = found["inference"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["image"].startswith("pollard-services-gpu:")
    assert pod["tolerations"]
    assert "nvidia.com/gpu" not in found["preprocess"][0]["resources"]["limits"]


def test_kserve_starts_it_on_what_kserve_brings(
    rendered: Callable[[str], list[Object]], settings_of: Callable[..., Any]
) -> None:
    found = {each["kind"]: each for each in rendered("kserve")}
    runtime, service = found["ServingRuntime"], found["InferenceService"]
    assert runtime["apiVersion"] == "serving.kserve.io/v1alpha1"
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    (container,) = runtime["spec"]["containers"]
    # By this name KServe knows the container that serves.
    assert container["name"] == "kserve-container"
    settings = settings_of(container["args"], {})
    # Where KServe's storage initializer puts what storageUri names.
    assert settings["repository"] == "/mnt/models"
    assert container["ports"] == [
        {"name": "h2c", "containerPort": settings["port"], "protocol": "TCP"}
    ]
    assert container["readinessProbe"]["grpc"] == {"port": settings["port"]}
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert model["modelFormat"]["name"] in {
        each["name"] for each in runtime["spec"]["supportedModelFormats"]
    }
    grace = service["spec"]["predictor"]["terminationGracePeriodSeconds"]
    assert grace > settings["grace_seconds"]


def test_images_have_the_version_of_the_tree(rendered: Callable[[str], list[Object]]) -> None:
    version = (ROOT.parents[1] / "VERSION").read_text().strip()
    for folder in (*SUITES, "kserve"):
        for each in rendered(folder):
            spec = each.get("spec", {})
            pod = spec.get("template", {}).get("spec", spec)
            for container in pod.get("containers", ()):
                assert container["image"].rpartition(":")[2] == version
