"""deploy/: every manifest against the fields of its kind, and what they say against each other and against the code.

No cluster runs these manifests here: what is tested is that they are well formed and consistent.
"""

import copy
import re
import shlex
from pathlib import Path

import pytest
import yaml

import clipgap_ray
from clipgap_ray.config.serve import TOKEN_VARIABLE, ServeSettings
from clipgap_ray.serving.switches import FOR_CLUSTERS
from tests.unit import kubernetes_fields as fields

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy/kuberay"
OURS = {"app.kubernetes.io/part-of": "clipgap"}


def _documents():
    return [d for path in sorted(FOLDER.glob("*.yaml")) for d in yaml.safe_load_all(path.read_text())]


def _one(kind):
    (found,) = [d for d in _documents() if d["kind"] == kind]
    return found["spec"]


def _clusters():
    return [_one("RayCluster"), _one("RayJob")["rayClusterSpec"], _one("RayService")["rayClusterConfig"]]


CLUSTER = _one("RayCluster")
GROUPS = {"head": CLUSTER["headGroupSpec"], **{group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}}


def _container(group):
    (container,) = GROUPS[group]["template"]["spec"]["containers"]
    return container


@pytest.mark.parametrize("document", _documents(), ids=lambda d: f"{d['kind']} {d['metadata']['name']}")
def test_every_manifest_has_only_fields_of_its_kind(document):
    fields.check(document)


def test_the_check_refuses_misspelled_missing_and_wrong_fields():
    (good,) = [d for d in _documents() if d["kind"] == "RayCluster"]
    for change, complaint in (
        (lambda s: s["workerGroupSpecs"][0].update(maxReplica=3), "maxReplica: unknown field"),
        (lambda s: s["workerGroupSpecs"][0].pop("groupName"), "groupName is required"),
        (lambda s: s["headGroupSpec"]["rayStartParams"].update(port=6379), "port: 6379 is no"),
        (lambda s: s["authOptions"].update(mode="tokens"), "expected one of"),
        (
            lambda s: s["headGroupSpec"]["template"]["spec"]["volumes"][0]["emptyDir"].update(sizeLimit="3 GB"),
            "quantity",
        ),
    ):
        bad = copy.deepcopy(good)
        change(bad["spec"])
        with pytest.raises(AssertionError, match=complaint):
            fields.check(bad)


def test_the_three_clusters_are_the_same():
    first, *others = _clusters()
    assert all(other == first for other in others)


def test_ray_start_knows_every_parameter():
    from ray.scripts.scripts import start

    known = {name.removeprefix("--") for option in start.params for name in option.opts}
    for name, group in GROUPS.items():
        assert set(group["rayStartParams"]) <= known, name


def test_versions_and_images():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert CLUSTER["rayVersion"] == pins["ray"]
    images = {name: _container(name)["image"] for name in GROUPS}
    cpu, cuda = (f"clipgap-ray:{clipgap_ray.__version__}-{kind}" for kind in ("cpu", "cuda"))
    assert images == {"head": cpu, "cpu": cpu, "gpu": cuda}
    for kind, image in (("cpu", cpu), ("cuda", cuda)):
        assert (
            f"docker build -f deploy/Dockerfile.{kind} -t {image} ." in (ROOT / f"deploy/Dockerfile.{kind}").read_text()
        )


@pytest.mark.parametrize(("kind", "extra"), [("cpu", "cpu"), ("cuda", "gpu")])
def test_dockerfiles_copy_what_exists_and_run_as_the_pods_user(kind, extra):
    text = (ROOT / f"deploy/Dockerfile.{kind}").read_text()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for words in re.findall(r"^COPY (.+)$", text, re.M):
        for source in words.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source in allowed, f"{source} is left out by .dockerignore"
    assert f'-c constraints.txt ".[{extra}]"' in text
    assert "PYTHONPATH=/app" in text, "serve.app:build_app is found there"
    assert re.findall(r"^USER (.+)$", text, re.M) == ["1000:1000"]
    user = GROUPS["head"]["template"]["spec"]["securityContext"]
    assert (user["runAsUser"], user["runAsGroup"]) == (1000, 1000)
    assert "wget" in text, "KubeRay's probes"


def test_both_images_have_the_same_python():
    bases = {re.search(r"^FROM (.+)$", (ROOT / f"deploy/Dockerfile.{k}").read_text(), re.M)[1] for k in ("cpu", "cuda")}
    assert len(bases) == 1


@pytest.mark.parametrize("name", GROUPS)
def test_no_pod_runs_as_root_or_may_become_it(name):
    pod = GROUPS[name]["template"]
    assert pod["metadata"]["labels"] == OURS, "the policies find the pods by it"
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["spec"]["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    if name != "head":
        assert pod["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", GROUPS)
def test_memory_and_disks_are_sized_to_fit(name):
    group, container = GROUPS[name], _container(name)
    volumes = {v["name"]: v["emptyDir"] for v in group["template"]["spec"]["volumes"]}
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    limits = {k: fields.quantity(v) for k, v in container["resources"]["limits"].items()}
    assert container["resources"]["requests"] == container["resources"]["limits"], "guaranteed: never evicted first"
    shm = volumes[mounts["/dev/shm"]]
    assert shm["medium"] == "Memory"
    store = int(group["rayStartParams"]["object-store-memory"])
    assert store <= fields.quantity(shm["sizeLimit"]), "else Ray puts the store on disk"
    assert fields.quantity(shm["sizeLimit"]) <= limits["memory"] / 2, "memory-backed volumes count as memory"
    spill = volumes[mounts[group["rayStartParams"]["object-spilling-directory"]]]
    assert "medium" not in spill
    assert fields.quantity(spill["sizeLimit"]) >= 2 * store
    on_disk = sum(fields.quantity(v["sizeLimit"]) for v in volumes.values() if "medium" not in v)
    assert on_disk < limits["ephemeral-storage"]
    cpus = float(group["rayStartParams"]["num-cpus"])
    assert cpus == (0 if name == "head" else limits["cpu"])


def test_node_groups_are_those_of_cluster_yaml():
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    for name, other in (("cpu", "cpu_worker"), ("gpu", "gpu_worker")):
        group = GROUPS[name]
        have = {
            "CPU": float(group["rayStartParams"]["num-cpus"]),
            "GPU": float(group["rayStartParams"].get("num-gpus", 0)),
        }
        assert set(types[other]["resources"]) == {key for key, value in have.items() if value}
        assert (group["minReplicas"], group["maxReplicas"]) == (0, types[other]["max_workers"])
    assert CLUSTER["autoscalerOptions"]["idleTimeoutSeconds"] == 300
    gpu = GROUPS["gpu"]["template"]["spec"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in gpu["tolerations"]
    assert _container("gpu")["resources"]["limits"]["nvidia.com/gpu"] == GROUPS["gpu"]["rayStartParams"]["num-gpus"]
    assert "tolerations" not in GROUPS["cpu"]["template"]["spec"]


def test_jobs_are_told_what_the_worker_groups_come_to_at_their_most():
    most = {"CPU": 0.0, "GPU": 0.0}
    for group in CLUSTER["workerGroupSpecs"]:
        for name in most:
            most[name] += group["maxReplicas"] * float(group["rayStartParams"].get(f"num-{name.lower()}s", 0))
    (said,) = [item["value"] for item in _container("head")["env"] if item["name"] == "CLIPGAP_LAUNCHABLE"]
    assert {name: float(amount) for name, amount in (part.split("=") for part in said.split(","))} == most


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_workers_drain_before_they_end(name):
    from ray.scripts.scripts import drain_node

    shell, flag, script = _container(name)["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, flag) == ("/bin/bash", "-c")
    drain, pause, stop = (shlex.split(part) for part in script.split(";"))
    assert drain[:2] == ["ray", "drain-node"]
    seen = drain_node.make_context("drain-node", drain[2:]).params
    assert stop[:2] == ["ray", "stop"]
    assert pause == ["sleep", str(seen["deadline_remaining_seconds"])]
    total = int(pause[1]) + int(stop[stop.index("--grace-period") + 1])
    assert total < GROUPS[name]["template"]["spec"]["terminationGracePeriodSeconds"], "else it is killed in the middle"


def _selects(selector, labels):
    return selector["matchLabels"].items() <= labels.items()


def _open_ports(policy_name):
    (policy,) = [d["spec"] for d in _documents() if d["metadata"]["name"] == policy_name]
    assert _selects(policy["podSelector"], OURS)
    ports = [port for rule in policy["ingress"] for port in rule["ports"]]
    return [(p.get("port", 1), p.get("endPort", p.get("port", 65535))) for p in ports]


def _is_open(policy_name, port):
    return any(first <= int(port) <= last for first, last in _open_ports(policy_name))


def test_nodes_reach_each_other_on_every_port_and_nobody_else_does():
    # Beside the ports of rayStartParams there are those that the kernel chooses: replicas (gRPC), gloo, NCCL.
    assert _open_ports("clipgap-nodes") == [(1, 65535)]
    (policy,) = [d["spec"] for d in _documents() if d["metadata"]["name"] == "clipgap-nodes"]
    (rule,) = policy["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": OURS}}]
    assert {port["protocol"] for port in rule["ports"]} == {"TCP"}
    assert {"to": rule["from"]} in policy["egress"], "what one may receive another may send"


def test_the_documented_redis_can_be_reached():
    documented = (ROOT / "docs/cluster.md").read_text()
    (port,) = re.findall(r"redisAddress: redis:(\d+)", documented)
    (policy,) = [d["spec"] for d in _documents() if d["metadata"]["name"] == "clipgap-nodes"]
    (rule,) = [r for r in policy["egress"] if {"protocol": "TCP", "port": int(port)} in r.get("ports", [])]
    ((label, value),) = rule["to"][0]["podSelector"]["matchLabels"].items()
    assert f"`{label}: {value}`" in documented


def test_clients_reach_the_proxy_and_nothing_else():
    assert _open_ports("clipgap-clients") == [(8000, 8000)]
    assert all(not _is_open(name, 8404) for name in ("clipgap-clients", "clipgap-metrics", "clipgap-operator"))
    (policy,) = [d["spec"] for d in _documents() if d["metadata"]["name"] == "clipgap-nodes"]
    assert policy["policyTypes"] == ["Ingress", "Egress"], "what is not listed is refused, both ways"
    for document in _documents():
        if document["kind"] == "NetworkPolicy":
            assert all(rule.get("from") for rule in document["spec"]["ingress"]), (
                "a rule without `from` lets in anybody"
            )


def test_prometheus_reaches_the_metrics_port():
    for group in GROUPS.values():
        assert _is_open("clipgap-metrics", group["rayStartParams"]["metrics-export-port"])


def test_container_ports_are_ports_that_somebody_listens_on():
    serve = yaml.safe_load(_one("RayService")["serveConfigV2"])
    listening = {"gcs": int(GROUPS["head"]["rayStartParams"]["port"]), "dashboard": 8265,
                 "metrics": int(GROUPS["head"]["rayStartParams"]["metrics-export-port"]),
                 "serve": serve["http_options"]["port"]}  # fmt: skip
    for name in GROUPS:
        for port in _container(name)["ports"]:
            assert port["containerPort"] == listening[port["name"]], port


def test_the_service_is_the_application_of_serve_config():
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

    config = yaml.safe_load(_one("RayService")["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    assert set(config) <= set(ServeDeploySchema.model_fields)
    (app,) = config["applications"]
    assert set(app) <= set(ServeApplicationSchema.model_fields)
    (local,) = yaml.safe_load((ROOT / "serve/config.yaml").read_text())["applications"]
    assert app["import_path"] == local["import_path"] == "serve.app:build_app"
    settings = ServeSettings.load(app["args"], "service.yaml")
    assert (settings.host, settings.port) == (config["http_options"]["host"], config["http_options"]["port"])
    assert settings.is_public
    assert {name for name in local["args"] if name.startswith(("encoder", "replicas"))} <= set(app["args"])
    switches = dict(switch.split("=") for switch in FOR_CLUSTERS.split())
    for group in GROUPS:
        assert switches.items() <= {e["name"]: e.get("value") for e in _container(group)["env"]}.items()
    tokens = [e for e in _container("cpu")["env"] if e["name"] == TOKEN_VARIABLE]
    assert tokens[0]["valueFrom"]["secretKeyRef"]["key"] == "token"


def test_the_study_is_a_job_that_exists():
    import tyro

    from clipgap_ray.config.study import RunSettings

    python, script, *words = shlex.split(_one("RayJob")["entrypoint"])
    assert python == "python"
    assert (ROOT / script.removeprefix("/app/")).is_file()
    settings = tyro.cli(RunSettings, args=words)
    assert (ROOT / settings.study.removeprefix("/app/")).is_file()
    job = _one("RayJob")
    assert job["shutdownAfterJobFinishes"] is True
    assert job["backoffLimit"] >= 1, "a new cluster goes on where the lost one stopped"


def test_secrets_are_referred_to_and_never_written():
    assert all(
        cluster["authOptions"] == {"mode": "token", "secretName": "clipgap-ray-token"} for cluster in _clusters()
    )
    assert not [d for d in _documents() if d["kind"] == "Secret"]
    for path in [*(ROOT / "deploy").rglob("*"), ROOT / "cluster.yaml", ROOT / "serve/config.yaml"]:
        if path.is_file():
            found = re.search(
                r"(?i)(AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|(password|secret_?key)\s*[:=]\s*\S)", path.read_text()
            )
            assert not found, f"{path}: {found}"
            assert not re.search(r"\b[0-9a-f]{32,}\b", path.read_text()), path
    for name in GROUPS:
        for variable in _container(name)["env"]:
            if re.search("TOKEN|SECRET|PASSWORD|KEY", variable["name"]):
                assert "value" not in variable, variable


def test_budgets_protect_the_head_and_let_workers_go_one_by_one():
    budgets = {d["metadata"]["name"]: d["spec"] for d in _documents() if d["kind"] == "PodDisruptionBudget"}
    head, workers = budgets["clipgap-head"], budgets["clipgap-workers"]
    assert (head["maxUnavailable"], workers["maxUnavailable"]) == (0, 1)
    for budget, kind in ((head, "head"), (workers, "worker")):
        assert _selects(budget["selector"], {**OURS, "ray.io/node-type": kind})


def test_pods_act_as_accounts_that_exist():
    accounts = {d["metadata"]["name"] for d in _documents() if d["kind"] == "ServiceAccount"}
    assert {group["template"]["spec"]["serviceAccountName"] for group in GROUPS.values()} == accounts
