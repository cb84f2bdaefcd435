"""A server of object storage for tests: moto's, in a process of its own, so that writer processes share it.

python s3.py   prints its address and serves until its standard input ends
"""

import os
import subprocess
import sys
import uuid
from contextlib import contextmanager

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}


@contextmanager
def serve():
    """Environment variables by which obstore finds a server, which lives as long as this does."""
    environment = os.environ | ENVIRONMENT
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env=environment,
    )  # fmt: skip
    try:
        yield ENVIRONMENT | {"AWS_ENDPOINT_URL": server.stdout.readline().strip()}
    finally:
        server.stdin.close()
        server.wait(30)
        server.stdout.close()


def new_bucket(endpoint):
    """The name of a bucket that did not exist before."""
    import boto3

    name = f"lake-{uuid.uuid4().hex[:12]}"
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1"
    )
    client.create_bucket(Bucket=name)
    return name


if __name__ == "__main__":
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    print("http://{}:{}".format(*server.get_host_and_port()), flush=True)
    sys.stdin.read()
    server.stop()
