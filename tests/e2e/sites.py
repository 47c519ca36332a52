"""Home and embassy: two network namespaces with one cable between them, and the embassy's store behind a long link.

Invariant: whatever leaves home passes the proxy, which is 17.5 ms away in each direction; nothing of either site can be
reached from outside, and nothing is left of them at the end.
"""

import contextlib
import os
from pathlib import Path

from harness import Helper, empty_dir, run, s3_environment, s3_server
from proxy import Proxy

# Tallinn to Luxembourg and back: 35 ms.
ONE_WAY = 0.0175
NETWORK = "10.213.77"


class Sites:
    """Both sites. `home` and `embassy` are the words with which a command is run there."""

    def __init__(self, directory, stack, rate=None):
        tag = os.getpid()
        self.names = [f"efs-home-{tag}", f"efs-embassy-{tag}"]
        self.cable = [f"efsh{tag}", f"efse{tag}"]
        self.home, self.embassy = (["nsenter", f"--net=/run/netns/{name}", "--"] for name in self.names)
        stack.callback(self.tear_down)
        for name in self.names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        ends = [word for name, end in zip(self.names, self.cable, strict=True) for word in ("name", end, "netns", name)]
        run("ip", "link", "add", *ends[:4], "type", "veth", "peer", *ends[4:])
        for k, (name, end) in enumerate(zip(self.names, self.cable, strict=True), 1):
            run("ip", "-n", name, "address", "add", f"{NETWORK}.{k}/24", "dev", end)
            run("ip", "-n", name, "link", "set", end, "up")
        self.root, server = stack.enter_context(s3_server(empty_dir(directory / "abroad"), self.embassy))
        gate = stack.enter_context(contextlib.closing(Helper(Path(__file__).with_name("gate.py"), server, inside=self.embassy)))
        self.port = gate.first["port"]
        self.stack = stack
        self.link = self.another_link(rate)

    def another_link(self, rate=None):
        """A link that can be disturbed by itself."""
        link = Proxy(self.port, host=f"{NETWORK}.2", inside=self.embassy)
        self.stack.callback(link.close)
        link.set("pass", delay=ONE_WAY, rate=rate)
        return link

    def environment(self, at_home, link=None):
        """How the store is reached from a site."""
        return s3_environment((link or self.link).port, f"{NETWORK}.2") if at_home else s3_environment(self.port)

    def part(self):
        """The cable is pulled: home is heard no more."""
        run("ip", "-n", self.names[0], "link", "set", self.cable[0], "down")

    def join(self):
        run("ip", "-n", self.names[0], "link", "set", self.cable[0], "up")

    def tear_down(self):
        for name in self.names:
            run("ip", "netns", "delete", name, ok=None)
