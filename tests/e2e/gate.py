"""One winner: a gate before the test's S3 server, which by itself looks whether an object is there, and then writes it,
in two steps, so that of two puts at once both may be told that they were first.

Invariant: conditional puts of one object pass one after the other, each with its answer. All else passes as it is.
"""

import asyncio
import collections
import contextlib
import json
import re
import sys

PIECE = 1 << 18


class Gate:
    def __init__(self, target):
        self.target, self.turns = target, collections.defaultdict(asyncio.Lock)

    async def accept(self, reader, writer):
        with contextlib.suppress(OSError, EOFError, ValueError):
            while await self.request(reader, writer):
                pass
        writer.close()

    async def request(self, reader, writer):
        """Passes one request, and its answer back; gives whether another can follow."""
        head = await reader.readuntil(b"\r\n\r\n")
        said = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        body = await reader.readexactly(int(said[1])) if said else b""
        conditional = head.startswith(b"PUT") and re.search(rb"(?i)\r\nif-none-match:", head)
        turn = self.turns[head.split(b" ", 2)[1]] if conditional else contextlib.nullcontext()
        async with turn:
            head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head)[:-2] + b"Connection: close\r\n\r\n"
            source, sink = await asyncio.open_connection("127.0.0.1", self.target, limit=PIECE)
            try:
                sink.write(head + body)
                await sink.drain()
                answer = await source.readuntil(b"\r\n\r\n")
                ends = re.search(rb"(?i)\r\n(content-length|transfer-encoding):", answer) or head.startswith(b"HEAD")
                answer = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", answer) if ends else answer
                if conditional:
                    answer += await source.read(-1)
                writer.write(answer)
                while piece := await source.read(PIECE):
                    writer.write(piece)
                    await writer.drain()
            finally:
                sink.close()
        await writer.drain()
        return ends


async def serve(target):
    """Says its port, and serves until its standard input ends."""
    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(Gate(target).accept, "127.0.0.1", 0, limit=PIECE, backlog=256)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
