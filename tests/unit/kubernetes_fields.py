"""Fields of the Kubernetes objects below deploy/, as their public references list them, and a strict check.

Sources: the KubeRay CRD API reference (fields of v1.6; `ray.io/v1`) and the Kubernetes API reference (v1.28: core/v1,
policy/v1, networking.k8s.io/v1). Encoded here because neither ships in the wheels, and `kubectl --dry-run` needs a
cluster. A table lists what may stand there; of the Kubernetes fields only those that we have a use for, so that a
misspelled key is refused. A trailing `!` marks a field that must be given.
"""

from __future__ import annotations

import re
from typing import Any

QUANTITY = re.compile(r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")


def quantity(value: str | int) -> float:
    """The number that a Kubernetes quantity ("9Gi", "500m") stands for."""
    assert QUANTITY.match(str(value)), f"{value!r} is no quantity"
    number, unit = re.match(r"([\d.]+)(.*)", str(value)).groups()
    scale = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    return float(number) * (scale[unit] if unit in scale else 1024 ** ("KMGT".index(unit[0]) + 1))


class Map:
    """An object with free keys and values of one type."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Enum:
    """One of several strings."""

    def __init__(self, *values: str) -> None:
        self.values = values


PORT = (int, str)
META = {"name": str, "labels": Map(str), "annotations": Map(str), "namespace": str}
LABELS = {"matchLabels": Map(str)}
AMOUNTS = Map(quantity)
RESOURCES = {"requests": AMOUNTS, "limits": AMOUNTS}
SECURITY = {
    "allowPrivilegeEscalation": bool, "capabilities": {"drop": [str], "add": [str]}, "readOnlyRootFilesystem": bool,
    "runAsNonRoot": bool, "runAsUser": int,
}  # fmt: skip
POD_SECURITY = {
    "runAsNonRoot": bool, "runAsUser": int, "runAsGroup": int, "fsGroup": int,
    "seccompProfile": {"type!": Enum("RuntimeDefault", "Localhost", "Unconfined")},
}  # fmt: skip
KEY = {"name!": str, "key!": str, "optional": bool}
ENV = {"name!": str, "value": str, "valueFrom": {"secretKeyRef": KEY, "configMapKeyRef": KEY}}
HANDLER = {"exec": {"command!": [str]}}
CONTAINER = {
    "name!": str, "image!": str, "imagePullPolicy": Enum("Always", "IfNotPresent", "Never"), "command": [str],
    "args": [str], "env": [ENV], "resources": RESOURCES, "securityContext": SECURITY,
    "ports": [{"name": str, "containerPort!": int, "protocol": Enum("TCP", "UDP")}],
    "lifecycle": {"preStop": HANDLER, "postStart": HANDLER},
    "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool}],
}  # fmt: skip
VOLUME = {
    "name!": str,
    "emptyDir": {"medium": Enum("", "Memory"), "sizeLimit": quantity},
    "secret": {"secretName": str},
}
TOLERATION = {"key": str, "operator": Enum("Exists", "Equal"), "value": str,
              "effect": Enum("NoSchedule", "PreferNoSchedule", "NoExecute")}  # fmt: skip
POD = {
    "metadata": META,
    "spec!": {
        "containers!": [CONTAINER], "volumes": [VOLUME], "serviceAccountName": str, "securityContext": POD_SECURITY,
        "automountServiceAccountToken": bool, "terminationGracePeriodSeconds": int, "tolerations": [TOLERATION],
        "nodeSelector": Map(str), "restartPolicy": Enum("Always", "OnFailure", "Never"),
    },
}  # fmt: skip

REDIS = {"value": str, "valueFrom": {"secretKeyRef": KEY}}
AUTOSCALER = {
    "resources": RESOURCES, "image": str, "imagePullPolicy": str, "securityContext": SECURITY,
    "version": Enum("v1", "v2"), "idleTimeoutSeconds": int, "env": [ENV],
    "upscalingMode": Enum("Default", "Aggressive", "Conservative"),
}  # fmt: skip
HEAD = {"template!": POD, "rayStartParams!": Map(str), "enableIngress": bool,
        "serviceType": Enum("ClusterIP", "NodePort", "LoadBalancer")}  # fmt: skip
WORKERS = {
    "groupName!": str, "replicas": int, "minReplicas!": int, "maxReplicas!": int, "numOfHosts": int, "suspend": bool,
    "idleTimeoutSeconds": int, "rayStartParams!": Map(str), "template!": POD,
    "scaleStrategy": {"workersToDelete": [str]},
}  # fmt: skip
RAY_CLUSTER = {
    "rayVersion": str, "suspend": bool, "managedBy": str, "enableInTreeAutoscaling": bool,
    "authOptions": {"mode": Enum("disabled", "token"), "secretName": str, "enableK8sTokenAuth": bool},
    "autoscalerOptions": AUTOSCALER, "headServiceAnnotations": Map(str), "headGroupSpec!": HEAD,
    "workerGroupSpecs": [WORKERS],
    "gcsFaultToleranceOptions": {"redisAddress": str, "redisUsername": REDIS, "redisPassword": REDIS,
                                 "externalStorageNamespace": str},
}  # fmt: skip
RAY_JOB = {
    "activeDeadlineSeconds": int, "backoffLimit": int, "rayClusterSpec": RAY_CLUSTER, "submitterPodTemplate": POD,
    "metadata": Map(str), "clusterSelector": Map(str), "submitterConfig": {"backoffLimit": int}, "managedBy": str,
    "entrypoint": str, "runtimeEnvYAML": str, "jobId": str, "entrypointResources": str, "entrypointNumCpus": float,
    "submissionMode": Enum("K8sJobMode", "HTTPMode", "InteractiveMode"), "entrypointNumGpus": float,
    "ttlSecondsAfterFinished": int, "shutdownAfterJobFinishes": bool, "suspend": bool,
}  # fmt: skip
RAY_SERVICE = {
    "serveConfigV2": str, "rayClusterConfig": RAY_CLUSTER, "excludeHeadPodFromServeSvc": bool,
    "upgradeStrategy": {"type": Enum("NewCluster", "None")},
}  # fmt: skip

PEER = {"podSelector": LABELS, "namespaceSelector": LABELS, "ipBlock": {"cidr!": str, "except": [str]}}
POLICY_PORT = {"protocol": Enum("TCP", "UDP", "SCTP"), "port": PORT, "endPort": int}
NETWORK_POLICY = {
    "podSelector!": LABELS, "policyTypes": [Enum("Ingress", "Egress")],
    "ingress": [{"from": [PEER], "ports": [POLICY_PORT]}], "egress": [{"to": [PEER], "ports": [POLICY_PORT]}],
}  # fmt: skip
BUDGET = {"minAvailable": PORT, "maxUnavailable": PORT, "selector!": LABELS}

KINDS = {
    ("ray.io/v1", "RayCluster"): {"spec!": RAY_CLUSTER},
    ("ray.io/v1", "RayJob"): {"spec!": RAY_JOB},
    ("ray.io/v1", "RayService"): {"spec!": RAY_SERVICE},
    ("networking.k8s.io/v1", "NetworkPolicy"): {"spec!": NETWORK_POLICY},
    ("policy/v1", "PodDisruptionBudget"): {"spec!": BUDGET},
    ("v1", "ServiceAccount"): {"automountServiceAccountToken": bool},
}


def check(document: dict[str, Any]) -> None:
    """Raise AssertionError, naming the path, unless every field of an object is known and of its type."""
    kind = document.get("apiVersion"), document.get("kind")
    assert kind in KINDS, f"{kind}: unknown kind"
    _check(document, {"apiVersion!": str, "kind!": str, "metadata!": {**META, "name!": str}, **KINDS[kind]}, kind[1])


def _check(value: Any, shape: Any, path: str) -> None:
    if isinstance(shape, dict):
        assert isinstance(value, dict), f"{path}: {value!r} is no object"
        fields = {name.rstrip("!"): part for name, part in shape.items()}
        for name, part in value.items():
            assert name in fields, f"{path}.{name}: unknown field; known: {sorted(fields)}"
            _check(part, fields[name], f"{path}.{name}")
        for name in shape:
            assert not name.endswith("!") or name[:-1] in value, f"{path}.{name[:-1]} is required"
    elif isinstance(shape, list):
        assert isinstance(value, list), f"{path}: {value!r} is no list"
        for number, part in enumerate(value):
            _check(part, shape[0], f"{path}[{number}]")
    elif isinstance(shape, Map):
        assert isinstance(value, dict), f"{path}: {value!r} is no object"
        for name, part in value.items():
            _check(part, shape.value, f"{path}.{name}")
    elif isinstance(shape, Enum):
        assert value in shape.values, f"{path}: {value!r}, expected one of {shape.values}"
    elif shape is quantity:
        quantity(value)
    else:
        kinds = shape if isinstance(shape, tuple) else (shape,)
        assert isinstance(value, (*kinds, int) if float in kinds else kinds), f"{path}: {value!r} is no {shape}"
        assert bool in kinds or not isinstance(value, bool), f"{path}: {value!r} is no {shape}"
