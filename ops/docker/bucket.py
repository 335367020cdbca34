"""Make the bucket, once, and let it end uploads that a killed process left: bucket.py ENDPOINT BUCKET.

Credentials come from boto3's chain.  A bucket that is there already is left as it is, but for the rule.
"""

import sys

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

THERE = {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}
UNKNOWN = {"NotImplemented", "MethodNotAllowed"}  # stores without lifecycle rules
RULE = {
    "ID": "unfinished-uploads",
    "Status": "Enabled",
    "Filter": {"Prefix": ""},
    "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1},
}


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main(endpoint: str, bucket: str) -> None:
    path_style = Config(s3={"addressing_style": "path"}, retries={"max_attempts": 10, "mode": "standard"})
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", config=path_style)
    try:
        client.create_bucket(Bucket=bucket)
        say(f"{bucket}: made")
    except ClientError as e:
        if e.response["Error"]["Code"] not in THERE:
            raise
        say(f"{bucket}: there already")
    try:
        client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": [RULE]})
    except ClientError as e:
        if e.response["Error"]["Code"] not in UNKNOWN:
            raise
        say(f"{bucket}: this store has no lifecycle rules; unfinished uploads stay until they are aborted by hand")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
