"""A bucket in another region than the machine: both are asked on loopback, the answers compared."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from clipgap_ray import cli, filesystems, regions
from clipgap_ray.stages import nodes
from tests import made, s3_server


class _Instance(BaseHTTPRequestHandler):
    """The metadata service of an instance in eu-west-1b: a token first (IMDSv2), then the zone."""

    def do_PUT(self) -> None:
        self._say("token" if self.path == "/latest/api/token" else "")

    def do_GET(self) -> None:
        allowed = self.headers.get("x-aws-ec2-metadata-token") == "token"
        self._say("eu-west-1b" if allowed and "placement/availability-zone" in self.path else "")

    def _say(self, text: str) -> None:
        self.send_response(200 if text else 404)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def instance(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Instance)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("AWS_REGION", raising=False)
    yield
    server.shutdown()
    server.server_close()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[s3_server.S3Server]:
    """A bucket in us-east-1, on a server that stands for AWS: it is not named by --endpoint-url."""
    for name, value in s3_server.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(filesystems, "FIRST_PAUSE_S", 0.01)
    before = filesystems.options()
    with s3_server.running() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        shard = made.tar_shard(tmp_path / "0.tar", [("0.jpg", made.jpeg(0)), ("0.txt", b"a thing")])
        server.put("bucket", "pool/0.tar", Path(shard.uri).read_bytes())
        filesystems.configure(filesystems.StorageOptions())
        filesystems.filesystem("s3://bucket")[0].connect(refresh=True)
        yield server
    filesystems.configure(before)


def test_the_metadata_service_names_the_region(instance: None) -> None:
    assert regions.of_machine() == "eu-west-1"


def test_where_it_is_silent_the_container_s_variable_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("AWS_REGION", raising=False)
    assert regions.of_machine() == ""
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert regions.of_machine() == "eu-central-1"
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert regions.of_machine() == "eu-central-1"


def test_only_aws_is_asked_for_a_bucket_s_region(s3: s3_server.S3Server) -> None:
    assert regions.of_bucket("s3://bucket/pool/0.tar") == "us-east-1"
    assert regions.of_bucket("s3://absent/pool") == ""
    assert regions.of_bucket("/data/pool") == ""
    filesystems.configure(filesystems.StorageOptions(endpoint_url=s3.url))
    assert regions.of_bucket("s3://bucket/pool/0.tar") == ""


def test_doctor_warns_of_a_bucket_elsewhere(
    s3: s3_server.S3Server, instance: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["doctor", "s3://bucket/pool"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["region"] == "us-east-1"
    assert any("lies in us-east-1, this machine runs in eu-west-1" in problem for problem in report["problems"])
    monkeypatch.setattr(regions, "of_machine", lambda: "us-east-1")
    assert cli.main(["doctor", "s3://bucket/pool"]) == 0
    assert not any("lies in" in problem for problem in json.loads(capsys.readouterr().out)["problems"])


@pytest.mark.parametrize(("region", "code"), [("us-east-1", 0), ("", 0), ("eu-west-1", 1)])
def test_doctor_compares_every_node_with_the_bucket(
    s3: s3_server.S3Server, monkeypatch: pytest.MonkeyPatch, region: str, code: int
) -> None:
    monkeypatch.setattr(nodes, "connect", lambda: None)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    probe = {**nodes._prober()(()), "gpus": 0}
    monkeypatch.setattr(nodes, "_prober", lambda: lambda wheels: probe)
    monkeypatch.setattr(nodes, "ask_nodes", lambda timeout_s: [{**probe, "node": "10.0.0.2", "region": region}])
    report = nodes.run("s3://bucket/pool")
    assert report["exit_code"] == code
    assert [("10.0.0.2 runs in eu-west-1" in problem) for problem in report["problems"]] == [True] * code
