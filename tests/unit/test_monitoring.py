"""deploy/monitoring: the dashboard charts only metrics that somebody exports, and the files fit together."""

import json
import re
from pathlib import Path

import ray.dashboard.modules.metrics.dashboards as shipped
import yaml

from clipgap_ray.serving.guard import OPEN_PATHS, Meters
from clipgap_ray.stages import embed_metrics, progress, train_report

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy/monitoring"
DASHBOARD = json.loads((FOLDER / "grafana/clipgap.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
NAME = re.compile(r"\b((?:ray|clipgap)_[a-z0-9_]+)(?=[{\[)])")


def _charted():
    return {name for panel in PANELS for target in panel["targets"] for name in NAME.findall(target["expr"])}


def _ours():
    """Names of the samples that the service exports."""
    meters = Meters()
    meters.requests.labels("/v1/search", "200").inc()
    meters.seconds.labels("/v1/search").observe(0.01)
    return set(re.findall(r"^(clipgap_\w+)", meters.text().decode(), re.M))


def _rays():
    """Names in the dashboards that the installed Ray ships: what Ray's own charts are drawn from."""
    folder = Path(next(iter(shipped.__path__)))
    return {name for path in folder.glob("*_panels.py") for name in re.findall(r"\bray_[a-z0-9_]+", path.read_text())}


def test_the_service_exports_what_is_charted_and_nothing_is_forgotten():
    charted = {name for name in _charted() if name.startswith("clipgap_")}
    assert charted == {"clipgap_requests_total", "clipgap_request_seconds_bucket", "clipgap_degraded_answers_total"}
    assert charted <= _ours()


def test_stages_export_what_is_charted_and_nothing_is_forgotten():
    charted = {name for name in _charted() if name.startswith("ray_clipgap_")}
    counters = [*embed_metrics.COUNTERS, *progress.COUNTERS]
    gauges = [*embed_metrics.GAUGES, *progress.GAUGES, *train_report.GAUGES]
    exported = {f"ray_{name}_total" for name in counters} | {f"ray_{name}" for name in gauges}
    assert charted == exported
    documented = (ROOT / "docs/cluster.md").read_text()
    assert [name for name in sorted(exported) if f"`{name}`" not in documented] == []


def test_ray_exports_what_is_charted():
    charted = {name for name in _charted() if name.startswith("ray_") and not name.startswith("ray_clipgap_")}
    assert len(charted) > 15
    assert charted <= _rays()


def test_every_expression_charts_something():
    for panel in PANELS:
        for target in panel["targets"]:
            assert NAME.findall(target["expr"]), target["expr"]
            assert target["expr"].count("(") == target["expr"].count(")")


def test_each_part_of_the_work_has_its_row():
    titles = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    for word in ("embed", "score", "train", "serve"):
        assert any(word in title for title in titles), word
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_task_names_in_the_texts_exist():
    stages = "\n".join(path.read_text() for path in (ROOT / "clipgap_ray/stages").glob("*.py"))
    for name in re.findall(r"\b_[a-z_]+\b", " ".join(panel["description"] for panel in PANELS)):
        assert f"def {name}(" in stages, name


def test_panels_use_the_data_source_that_is_provisioned():
    (source,) = yaml.safe_load((FOLDER / "grafana/datasource.yaml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in PANELS} == {source["uid"]}
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    address = next(w for w in compose["prometheus"]["command"] if w.startswith("--web.listen-address="))
    assert source["url"] == "http://" + address.removeprefix("--web.listen-address=")


def test_prometheus_finds_rays_nodes_and_the_service():
    from ray._private import ray_constants

    jobs = {job["job_name"]: job for job in yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]}
    (file,) = jobs["ray"]["file_sd_configs"][0]["files"]
    assert Path(file).name == ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE
    assert "/metrics" not in OPEN_PATHS, "so Prometheus needs the token"
    assert jobs["clipgap"]["authorization"] == {"credentials_file": "clipgap_token"}
    assert "/deploy/monitoring/clipgap_token" in (ROOT / ".gitignore").read_text().splitlines()
    serve = yaml.safe_load((ROOT / "serve/config.yaml").read_text())["http_options"]
    assert jobs["clipgap"]["static_configs"][0]["targets"] == [f"{serve['host']}:{serve['port']}"]


def test_compose_mounts_files_that_exist_and_listens_on_loopback():
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    for service in services.values():
        assert "ports" not in service
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert source == "/tmp/ray" or source.startswith("${CLIPGAP_TOKEN_FILE") or (FOLDER / source).is_file()
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    provider = yaml.safe_load((FOLDER / "grafana/dashboards.yaml").read_text())["providers"][0]
    assert any(m.split(":")[1].startswith(provider["options"]["path"]) for m in services["grafana"]["volumes"])
