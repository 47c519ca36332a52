"""A TCP proxy on loopback that can misbehave on demand, between the program and its S3 server.

Modes: "pass" (with `delay` seconds before each piece), "cut" (connections are reset and refused), "hang" (connections
are accepted and stay silent: what was under way stops in the middle).
"""

import contextlib
import socket
import threading
import time

PIECE = 1 << 16


class Proxy:
    """Accepts on `port`, forwards to `target`. Invariant: a mode counts for open connections from its next piece on."""

    def __init__(self, target):
        self.target, self.mode, self.delay, self.bytes = target, "pass", 0.0, 0
        self.open, self.lock, self.ended = set(), threading.Lock(), False
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def set(self, mode, delay=0.0):
        """Changes the mode; "cut" and "pass" end what is open, so that nothing of the old mode goes on."""
        self.mode, self.delay = mode, delay
        if mode in ("cut", "pass"):
            self.reset_all()

    def reset_all(self):
        with self.lock:
            connections, self.open = self.open, set()
        for connection in connections:
            with contextlib.suppress(OSError):
                # A reset instead of an orderly end.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                connection.shutdown(socket.SHUT_RDWR)
                connection.close()

    def accept(self):
        while not self.ended:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            if self.mode == "cut":
                with self.lock:
                    self.open.add(client)
                self.reset_all()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self.target), 5)
            except OSError:
                client.close()
                continue
            with self.lock:
                self.open |= {client, server}
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self.carry, args=(source, sink), daemon=True).start()

    def carry(self, source, sink):
        with contextlib.suppress(OSError):
            while piece := source.recv(PIECE):
                while self.mode == "hang":
                    time.sleep(0.02)
                    if source not in self.open:
                        return
                time.sleep(self.delay)
                sink.sendall(piece)
                self.bytes += len(piece)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
                end.close()
            with self.lock:
                self.open.discard(end)

    def close(self):
        self.ended = True
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()
        self.mode = "cut"
        self.reset_all()
