"""Where a bucket lies and where this machine runs: between regions of AWS every byte is billed.

Nothing is asked of servers that are not AWS (`--endpoint-url`), and what cannot be found out is "", never a problem.
"""

from __future__ import annotations

import os

from clipgap_ray import filesystems
from clipgap_ray.errors import StorageError

METADATA_WAIT_S = 1.0  # a laptop has no metadata service: nobody answers at its address


def of_bucket(uri: str) -> str:
    """Return the region of an S3 URI's bucket; "" elsewhere, and where the account may not ask.

    The server's header `x-amz-bucket-region` says it (HeadBucket, which needs s3:ListBucket).
    """
    if not uri.startswith(("s3://", "s3a://")) or filesystems.options().endpoint_url:
        return ""
    fs, path = filesystems.filesystem(uri)
    try:
        answer = filesystems.patiently(uri, lambda: fs.call_s3("head_bucket", Bucket=path.split("/", 1)[0]))
    except (FileNotFoundError, StorageError):
        return ""
    return str(answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region", ""))


def of_machine() -> str:
    """Return the region of the EC2 instance this runs on, by its metadata service (IMDSv2); else AWS_REGION or "".

    AWS_REGION is what EKS and ECS set in containers, which often may not ask the instance.
    """
    import botocore.exceptions as boto
    from botocore.utils import METADATA_BASE_URL, InstanceMetadataRegionFetcher

    # The fetcher reads no environment variable for the address; botocore's client for credentials reads this one.
    address = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or METADATA_BASE_URL
    try:
        found = InstanceMetadataRegionFetcher(timeout=METADATA_WAIT_S, base_url=address).retrieve_region()
    except boto.BotoCoreError:
        found = None
    return found or os.environ.get("AWS_REGION", "")


def problem(uri: str, bucket: str, machine: str, node: str) -> str | None:
    """Return what is wrong when a bucket and a machine are known to lie in different regions, with the next step.

    Args:
        uri: Something in the bucket.
        bucket: Its region, or "".
        machine: The machine's region, or "".
        node: How to name the machine.
    """
    if not bucket or not machine or bucket == machine:
        return None
    return (
        f"{uri} lies in {bucket}, {node} runs in {machine}: every byte between regions is billed, and waits; "
        f"start the nodes in {bucket} (provider.region in cluster.yaml), or copy the bucket"
    )
