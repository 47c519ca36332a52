"""The link to the store, which can misbehave on demand: a proxy on loopback between the program and its S3 server.

Shape, for bytes that pass: `delay` seconds each way (pieces are delayed, not held up behind each other, so throughput
stays) and `rate` bytes a second each way for all connections together.

Modes: `pass`; `cut` (connections are reset and refused); `hang` (connections are accepted and stay silent, those that
are open stop in the middle); `trickle` (a few bytes a second); and, as they look at the requests: `reset` (in the
middle of each body), `500`, `503` (SlowDown), `403`, `garbage` (bytes that are no HTTP), `wrong` (objects are served
with other bytes), `lost` (puts take effect, and their answers are lost).

Invariant: one process, one thread, so a mode counts for all connections from one moment on; it never touches a mount.
"""

import asyncio
import collections
import contextlib
import json
import os
import re
import socket
import sys
import threading
import time

PIECE = 1 << 18
# Pieces on their way in one direction of a connection: more than any delay times any bandwidth that is tried.
PIECES = 64
TRICKLE = 20  # bytes a second
LOOKS = ("reset", "500", "503", "403", "garbage", "wrong", "lost")
ANSWERS = {
    "500": ("500 Internal Server Error", "InternalError", "We encountered an internal error."),
    "503": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "403": ("403 Forbidden", "AccessDenied", "Access Denied"),
}


class Link:
    """The proxy itself."""

    def __init__(self, target):
        self.target, self.mode, self.delay, self.rate = target, "pass", 0.0, None
        self.free = {"up": 0.0, "down": 0.0}
        self.open, self.silent, self.changed = set(), set(), asyncio.Event()
        self.count = collections.Counter()

    def obey(self, order):
        """Changes what is said; open connections are reset unless they go on in the new mode."""
        if "mode" in order:
            # A put that is cut off may have taken effect; where puts are to be left alone, nothing is cut off.
            keep = order["mode"] in ("hang", "trickle", "wrong", "lost") or order.get("open") == "resume"
            self.mode = order["mode"]
            self.delay, self.rate = order.get("delay", 0.0), order.get("rate")
            self.free = {"up": 0.0, "down": 0.0}
            if order.get("open") == "silent":
                self.silent |= self.open
            elif not keep:
                for writer in list(self.open):
                    self.reset(writer)
            self.changed.set()
            self.changed = asyncio.Event()
        return dict(self.count)

    def reset(self, writer):
        """A reset instead of an orderly end."""
        self.open.discard(writer)
        sock = writer.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()

    async def accept(self, reader, writer):
        self.count["connections"] += 1
        self.open.add(writer)
        ends, orderly = [writer], False
        try:
            if self.mode == "cut":
                self.count["cut"] += 1
            elif self.mode in LOOKS:
                orderly = await self.look(reader, writer)
            else:
                self.count[self.mode] += self.mode != "pass"
                await self.while_silent(writer)
                source, sink = await asyncio.open_connection("127.0.0.1", self.target, limit=PIECE)
                ends.append(sink)
                self.open.add(sink)
                both = (self.carry(reader, sink, "up"), self.carry(source, writer, "down"))
                await asyncio.gather(*both)
        except EOFError as end:  # one side is done (or, in the middle of a request, gone: IncompleteReadError)
            orderly = type(end) is EOFError
        except (OSError, ValueError):
            pass
        for end in ends:
            if orderly or end.is_closing():
                self.open.discard(end)
                end.close()  # what is in its buffer still goes out
            else:
                self.reset(end)

    async def while_silent(self, writer):
        while self.mode == "hang" or writer in self.silent:
            await self.changed.wait()

    async def carry(self, source, sink, way):
        """Brings pieces from one end to the other, each when its time has come."""
        on_the_way = asyncio.Queue(PIECES)
        out = asyncio.ensure_future(self.deliver(on_the_way, sink, way))
        try:
            while piece := await source.read(PIECE):
                now = time.monotonic()
                if self.rate:
                    self.free[way] = now = max(now, self.free[way]) + len(piece) / self.rate
                await on_the_way.put((now + self.delay, piece))
            await on_the_way.put(None)
            await out
        finally:
            out.cancel()
        raise EOFError  # the other direction ends with it

    async def deliver(self, on_the_way, sink, way):
        while arrival := await on_the_way.get():
            due, piece = arrival
            wait = due - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            await self.while_silent(sink)
            while piece and self.mode == "trickle" and not sink.is_closing():
                sink.write(piece[:1])
                piece = piece[1:]
                await asyncio.sleep(1 / TRICKLE)
            sink.write(piece)
            self.count[way] += len(piece)
            await sink.drain()
            if way == "down" and self.mode in LOOKS:
                return sink.close()  # the next request comes on a connection that is looked at

    async def look(self, reader, writer):
        """Requests one at a time, each answered as the mode says. Gives whether the last answer may arrive whole."""
        while self.mode in LOOKS:
            head = await reader.readuntil(b"\r\n\r\n")
            said = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            body = await reader.readexactly(int(said[1])) if said else b""
            mode = self.mode
            await asyncio.sleep(2 * self.delay)
            self.count[mode] += 1
            if mode == "garbage":
                writer.write(b"\x16\x03\x01" + os.urandom(200))
                return True
            if mode not in ANSWERS:
                return await self.forward(mode, head, body, writer)
            line, code, message = ANSWERS[mode]
            xml = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            kind = f"HTTP/1.1 {line}\r\nContent-Type: application/xml\r\nContent-Length: {len(xml)}\r\n\r\n"
            writer.write(kind.encode() + (b"" if head.startswith(b"HEAD") else xml))
            await writer.drain()
        return True

    async def forward(self, mode, head, body, writer):
        """Asks the server, and spoils the request or the answer on its way. As `look`."""
        get, put = head.startswith(b"GET"), head.startswith(b"PUT")
        head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head)[:-2] + b"Connection: close\r\n\r\n"
        source, sink = await asyncio.open_connection("127.0.0.1", self.target, limit=PIECE)
        self.open.add(sink)
        try:
            if mode == "reset" and put:
                sink.write(head + body[: len(body) // 2])
                await sink.drain()
                await asyncio.sleep(0.01)  # the reset must not overtake it
                return False
            sink.write(head + body)
            await sink.drain()
            answer_head = await source.readuntil(b"\r\n\r\n")
            answer = await source.read(-1)
        finally:
            self.reset(sink)
        if mode == "lost" and put:
            return False
        if mode == "reset":
            writer.write(answer_head + answer[: len(answer) // 2])
            await asyncio.sleep(0.01)
            return False
        if mode == "wrong" and get and b"list-type" not in head.split(b"\r\n")[0]:
            answer = os.urandom(len(answer))
        writer.write(answer_head + answer)
        return True


async def serve(target, host):
    """Says its port, then does what the lines on standard input say."""
    link, loop = Link(target), asyncio.get_running_loop()
    server = await asyncio.start_server(link.accept, host, 0, limit=PIECE, backlog=256)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)

    def listen():
        for line in sys.stdin:
            asyncio.run_coroutine_threadsafe(answer(json.loads(line)), loop).result()
        os._exit(0)

    async def answer(order):
        print(json.dumps(link.obey(order)), flush=True)

    threading.Thread(target=listen, daemon=True).start()
    await server.serve_forever()


class Proxy:
    """The proxy as a case sees it: listens on `port` of `host`, forwards to the port `target`. `inside`: the words with
    which a command is run where it is to be."""

    def __init__(self, target, host="127.0.0.1", inside=()):
        from harness import Helper

        self.helper = Helper(__file__, target, host, inside=inside)
        self.port = self.helper.first["port"]

    def set(self, mode, delay=0.0, rate=None, open="reset"):
        """`open`: connections that are open are reset, or `resume`, or stay `silent` for ever (`hang` and `trickle`
        take them as they are)."""
        self.helper.ask({"mode": mode, "delay": delay, "rate": rate, "open": open})

    def count(self):
        """Connections, bytes each way, and how often each fault was met."""
        return collections.Counter(self.helper.ask({}))

    @property
    def bytes(self):
        count = self.count()
        return count["up"] + count["down"]

    def close(self):
        self.helper.close()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), sys.argv[2]))
