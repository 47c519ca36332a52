"""A Garage cluster on loopback: three nodes, each object on all three, as a distributed store abroad would run.

Invariant: every node is a process of ours with its own directory and ports; nothing of it is left at the end.
"""

import os
import secrets
import subprocess

from harness import Failed, empty_dir, free_port, listens, run, tool, wait_until

VERSION = "2.5.0"
FLAGS = ("--no-default-features", "--features", "bundled-libs,lmdb")


class Garage:
    """The cluster; `nodes` are numbered from 0."""

    def __init__(self, directory, stack, nodes=3):
        self.program = os.environ.get("GARAGE") or tool("garage", VERSION, *FLAGS)
        self.directory, self.secret = empty_dir(directory), secrets.token_hex(32)
        self.s3 = [free_port() for _ in range(nodes)]
        self.rpc = [free_port() for _ in range(nodes)]
        self.processes = [None] * nodes
        stack.callback(self.close)
        for n in range(nodes):
            self.configure(n)
            self.start(n)
        self.join()

    def configure(self, n):
        place = empty_dir(self.directory / f"node{n}")
        (place / "garage.toml").write_text(
            f'metadata_dir = "{place}/meta"\ndata_dir = "{place}/data"\ndb_engine = "lmdb"\n'
            f'replication_factor = {len(self.s3)}\nconsistency_mode = "consistent"\n'
            f'rpc_bind_addr = "127.0.0.1:{self.rpc[n]}"\nrpc_public_addr = "127.0.0.1:{self.rpc[n]}"\n'
            f'rpc_secret = "{self.secret}"\n'
            f'[s3_api]\ns3_region = "us-east-1"\napi_bind_addr = "127.0.0.1:{self.s3[n]}"\n'
        )

    def start(self, n):
        place = self.directory / f"node{n}"
        with open(place / "log", "ab") as log:
            self.processes[n] = subprocess.Popen(
                [self.program, "-c", place / "garage.toml", "server"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "RUST_LOG": "garage=warn"},
            )  # fmt: skip
        wait_until(lambda: self.alive(n) and listens(self.s3[n]), 60, f"node {n} of Garage listens")

    def alive(self, n):
        if self.processes[n].poll() is not None:
            said = (self.directory / f"node{n}" / "log").read_text()[-1500:]
            raise Failed(f"node {n} of Garage ended with {self.processes[n].returncode}: {said}")
        return True

    def kill(self, n):
        """SIGKILL, as a machine that fails."""
        self.processes[n].kill()
        self.processes[n].wait(20)

    def order(self, *words, node=0, ok=True):
        return run(self.program, "-c", self.directory / f"node{node}" / "garage.toml", *words, ok=ok).stdout

    def join(self):
        """The nodes become one cluster, with a bucket and a key."""
        names = [self.order("node", "id", "-q", node=n).strip() for n in range(len(self.s3))]
        for name in names[1:]:
            self.order("node", "connect", name)
        for n, name in enumerate(names):
            self.order("layout", "assign", name.split("@")[0], "-z", f"zone{n}", "-c", "10G")
        self.order("layout", "apply", "--version", "1")
        wait_until(lambda: self.order("bucket", "create", "land", ok=None) is not None and self.has_bucket(), 60,
                   "the cluster takes a bucket")  # fmt: skip
        made = self.order("key", "create", "embassy")
        fields = dict(line.split(":", 1) for line in made.splitlines() if line.count(":") == 1)
        self.key = {name.strip(): value.strip() for name, value in fields.items()}
        self.order("bucket", "allow", "--read", "--write", "--owner", "land", "--key", "embassy")

    def has_bucket(self):
        return "land" in self.order("bucket", "list", ok=None)

    def environment(self, node=0):
        endpoint = f"http://127.0.0.1:{self.s3[node]}"
        return {
            "AWS_ENDPOINT_URL": endpoint, "AWS_ENDPOINT": endpoint, "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": self.key["Key ID"],
            "AWS_SECRET_ACCESS_KEY": self.key["Secret key"],
        }  # fmt: skip

    def close(self):
        for process in filter(None, self.processes):
            process.kill()
            process.wait(20)


