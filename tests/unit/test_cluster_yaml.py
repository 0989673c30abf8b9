"""cluster.yaml and deploy/aws/stack.yaml: Ray's schema, EC2's own model of a launch, and what the jobs ask for.

Ray's schema does not look into `provider`, `node_config`, commands or mounts; these tests do.
"""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROVIDER_KEYS = {"type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips"}
RAY_AMI = "latest_dlami"  # Ubuntu 18.04


def _load():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def _nodes():
    return {name: node["node_config"] for name, node in _load()["available_node_types"].items()}


class _Stack(yaml.SafeLoader):
    """CloudFormation's short tags (!Ref, !Sub, !GetAtt) as (tag, value)."""


_Stack.add_multi_constructor("!", lambda loader, suffix, node: (suffix, loader.construct_scalar(node)))


def _stack():
    return yaml.load((ROOT / "deploy/aws/stack.yaml").read_text(), _Stack)


def _policies(role):
    """Statements of a role: its own and those of the managed policy on both roles."""
    resources = _stack()["Resources"]
    own = [policy["PolicyDocument"] for policy in resources[role]["Properties"].get("Policies", [])]
    shared = [resources[name]["Properties"]["PolicyDocument"] for _, name in
              resources[role]["Properties"]["ManagedPolicyArns"]]  # fmt: skip
    return [statement for document in own + shared for statement in document["Statement"]]


def _actions(statements):
    return {a for s in statements for a in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])}


def test_ray_accepts_the_cluster_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(_load()))


def test_ray_refuses_a_misspelled_node_type_key():
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = _load()
    config["available_node_types"]["gpu_worker"]["max_worker"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(config))


def _launch(node_config):
    """Check a launch against EC2's model of RunInstances; returns the report, "" if there is nothing to say."""
    import botocore.session
    from botocore.validate import ParamValidator

    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    params = {**node_config, "SubnetId": node_config["SubnetIds"][0], "MinCount": 1, "MaxCount": 1}
    del params["SubnetIds"]  # Ray's own key: it picks one of them
    return ParamValidator().validate(params, shape).generate_report()


@pytest.mark.parametrize("name", ["head", "cpu_worker", "gpu_worker"])
def test_ec2_would_accept_every_launch(name):
    assert _launch(_nodes()[name]) == ""


def test_ec2_would_refuse_a_misspelled_launch_key():
    config = {**_nodes()["head"], "MetadataOptions": {"HttpToken": "required"}}
    assert "HttpToken" in _launch(config)


def test_the_provider_section_has_no_key_that_ray_ignores():
    provider = _load()["provider"]
    assert set(provider) <= PROVIDER_KEYS
    assert provider["availability_zone"].startswith(provider["region"])
    assert "," not in provider["availability_zone"], "one zone"


def test_the_head_schedules_no_work_and_workers_start_at_zero():
    types = _load()["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    workers = {name: node for name, node in types.items() if name != "head"}
    assert all(node["min_workers"] == 0 for node in workers.values())
    assert sum(node["max_workers"] for node in workers.values()) <= _load()["max_workers"]
    gpu = workers["gpu_worker"]
    assert (gpu["resources"]["GPU"], gpu["max_workers"]) == (1, 2)
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert _load()["idle_timeout_minutes"] == 5
    assert _load()["provider"]["cache_stopped_nodes"] is False


@pytest.mark.parametrize("name", ["head", "cpu_worker", "gpu_worker"])
def test_every_node_type_is_protected_and_paid_for_by_somebody(name):
    node = _nodes()[name]
    assert node["MetadataOptions"]["HttpTokens"] == "required"
    assert node["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
    assert all(disk["Ebs"]["Encrypted"] is True for disk in node["BlockDeviceMappings"])
    assert node["IamInstanceProfile"] == {"Name": "clipgap-head" if name == "head" else "clipgap-worker"}
    tagged = {spec["ResourceType"]: {tag["Key"] for tag in spec["Tags"]} for spec in node["TagSpecifications"]}
    assert tagged == {"instance": {"project", "cost-center"}, "volume": {"project", "cost-center"}}
    assert node["ImageId"] != RAY_AMI
    # Without these Ray makes a group that lets the whole internet reach port 22, and picks any subnet.
    assert node["SecurityGroupIds"] == ["sg-FILL-IN"]
    assert node["SubnetIds"] == ["subnet-FILL-IN"]


def test_secrets_stay_out_of_command_lines_and_the_dashboard_on_loopback():
    config = _load()
    start = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start[0]
    for command in start:
        assert "RAY_AUTH_MODE=token" in command
        assert "RAY_AUTH_TOKEN_PATH=~/.ray/auth_token" in command
    assert "~/.ray/auth_token" in config["file_mounts"]
    text = (ROOT / "cluster.yaml").read_text()
    assert not re.search(r"RAY_AUTH_TOKEN=|AKIA|aws_secret|password", text, re.I)


def test_resources_that_stages_ask_for_exist_in_a_worker_type():
    """Names in num_cpus=, num_gpus=, resources=, label_selector= of the library, against the node types."""
    asked, labels = set(), set()
    for path in [*(ROOT / "clipgap_ray/stages").glob("*.py"), *(ROOT / "clipgap_ray/serving").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg in ("num_cpus", "num_gpus"):
                asked.add(node.arg.removeprefix("num_").removesuffix("s").upper())
            if isinstance(node, ast.keyword) and node.arg in ("resources", "resources_per_worker"):
                keys = [key for part in ast.walk(node.value) if isinstance(part, ast.Dict) for key in part.keys]
                asked |= {key.value for key in keys if isinstance(key, ast.Constant)}
            if isinstance(node, ast.keyword) and node.arg == "label_selector" and isinstance(node.value, ast.Dict):
                labels |= {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
    workers = {n: t for n, t in _load()["available_node_types"].items() if n != "head"}
    assert {"CPU", "GPU"} <= asked
    assert asked <= {name for node in workers.values() for name in node["resources"]}
    assert labels <= {name for node in workers.values() for name in node["labels"]}


def test_the_ssh_range_has_no_default_and_cannot_be_everybody():
    ssh = _stack()["Parameters"]["SshCidr"]
    assert "Default" not in ssh
    allowed = re.compile(ssh["AllowedPattern"])
    assert allowed.match("203.0.113.7/32")
    for wide in ("0.0.0.0/0", "0.0.0.0/16", "10.0.0.0/8", "203.0.113.7", "::/0"):
        assert not allowed.match(wide), wide


def test_the_group_lets_in_ssh_from_the_range_and_the_nodes_themselves():
    resources = _stack()["Resources"]
    ingress = resources["Nodes"]["Properties"]["SecurityGroupIngress"]
    assert ingress == [{"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "CidrIp": ("Ref", "SshCidr")}]
    inside = resources["AmongThemselves"]["Properties"]
    assert inside["GroupId"] == inside["SourceSecurityGroupId"] == ("Ref", "Nodes")
    endpoint = resources["S3Endpoint"]["Properties"]
    assert endpoint["VpcEndpointType"] == "Gateway"
    assert endpoint["ServiceName"] == ("Sub", "com.amazonaws.${AWS::Region}.s3")
    assert endpoint["RouteTableIds"] == [("Ref", "RouteTableId")], "without it no route leads there"


def test_the_head_may_start_what_cluster_yaml_launches():
    statements = [s for s in _policies("HeadRole") if s["Action"] == "ec2:RunInstances"]
    allowed = [r for s in statements for r in (s["Resource"] if isinstance(s["Resource"], list) else [s["Resource"]])]
    kinds = {text.rsplit(":", 1)[1].split("/")[0] for _, text in allowed}
    needed = {"instance", "image", "volume", "network-interface", "key-pair", "subnet", "security-group"}
    if any(node.get("InstanceMarketOptions", {}).get("MarketType") == "spot" for node in _nodes().values()):
        needed.add("spot-instances-request")
        command = "aws iam create-service-linked-role --aws-service-name spot.amazonaws.com"
        for name in ("docs/cluster.md", "cluster.yaml"):
            assert command in (ROOT / name).read_text(), "an account without that role gets no spot node"
    assert kinds == needed


def test_profiles_are_those_of_cluster_yaml_and_least_privilege():
    resources = _stack()["Resources"]
    names = {r["Properties"]["InstanceProfileName"] for r in resources.values() if r["Type"].endswith("Profile")}
    assert names == {node["IamInstanceProfile"]["Name"] for node in _nodes().values()}
    data = {
        "s3:ListBucket", "s3:GetBucketLocation", "s3:GetObject", "s3:PutObject", "s3:DeleteObject",
        "s3:AbortMultipartUpload",
    }  # fmt: skip
    assert _actions(_policies("WorkerRole")) == data
    for role in ("WorkerRole", "HeadRole"):
        for statement in _policies(role):
            actions = _actions([statement])
            assert not any("*" in action for action in actions), statement
            assert statement["Resource"] != "*" or all(a.startswith("ec2:Describe") for a in actions), statement
    source = next(s for s in _policies("WorkerRole") if s["Sid"] == "ReadSource")
    assert source["Action"] == "s3:GetObject"
    started = next(s for s in _policies("HeadRole") if s["Sid"] == "StartTagged")
    tags = {tag["Key"]: tag["Value"] for tag in _nodes()["cpu_worker"]["TagSpecifications"][0]["Tags"]}
    assert started["Condition"]["StringEquals"]["aws:RequestTag/project"] == tags["project"]


@pytest.fixture
def ec2(monkeypatch):
    """A pretended AWS; Ray's caches of clients and subnets are emptied around it."""
    import boto3
    import moto
    from ray.autoscaler._private.aws import config as aws
    from ray.autoscaler._private.aws import utils

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    caches = [f for m in (aws, utils) for f in vars(m).values() if hasattr(f, "cache_clear")]
    for cache in caches:
        cache.cache_clear()
    with moto.mock_aws():
        yield boto3.client("ec2", region_name=_load()["provider"]["region"])
    for cache in caches:
        cache.cache_clear()


def _configure_network(config):
    from ray.autoscaler._private.aws import config as aws

    return aws._configure_security_group(aws._configure_subnet(config))


def _bootable(**ids):
    config = _load()
    for node in config["available_node_types"].values():
        node["node_config"] = {**node["node_config"], **ids}
    return config


def test_ray_up_is_refused_until_the_ids_are_filled_in(ec2, capsys):
    import click

    with pytest.raises((AssertionError, click.ClickException)):  # Ray asserts, then prints why
        _configure_network(_load())
    assert "SecurityGroupIds" in capsys.readouterr().err


def test_ray_up_with_our_group_opens_nothing_to_the_world(ec2):
    subnet = ec2.describe_subnets()["Subnets"][0]
    group = ec2.create_security_group(GroupName="nodes", Description="x", VpcId=subnet["VpcId"])["GroupId"]
    ec2.modify_subnet_attribute(SubnetId=subnet["SubnetId"], MapPublicIpOnLaunch={"Value": True})
    config = _bootable(SecurityGroupIds=[group], SubnetIds=[subnet["SubnetId"]])
    config["provider"]["availability_zone"] = subnet["AvailabilityZone"]
    done = _configure_network(config)
    assert {tuple(n["node_config"]["SecurityGroupIds"]) for n in done["available_node_types"].values()} == {(group,)}
    rules = [rule for g in ec2.describe_security_groups()["SecurityGroups"] for rule in g["IpPermissions"]]
    assert not any(r["CidrIp"] == "0.0.0.0/0" for rule in rules for r in rule["IpRanges"])


def test_without_our_group_ray_would_open_ssh_to_the_world(ec2):
    """Why `SecurityGroupIds` must never be left out."""
    subnet = ec2.describe_subnets()["Subnets"][0]
    ec2.modify_subnet_attribute(SubnetId=subnet["SubnetId"], MapPublicIpOnLaunch={"Value": True})
    config = _bootable(SubnetIds=[subnet["SubnetId"]])
    config["provider"]["availability_zone"] = subnet["AvailabilityZone"]
    for node in config["available_node_types"].values():
        del node["node_config"]["SecurityGroupIds"]
    _configure_network(config)
    rules = [rule for g in ec2.describe_security_groups()["SecurityGroups"] for rule in g["IpPermissions"]]
    assert any(rule.get("FromPort") == 22 and rule["IpRanges"][0]["CidrIp"] == "0.0.0.0/0" for rule in rules
               if rule["IpRanges"])  # fmt: skip
