"""An S3 server in memory, just enough for the program, whose answers a case decides: it refuses, is full, overwrites.

Invariant: what it answers with success it holds, also over a change of its mood; credentials are told by the key id
alone (signatures are not checked).
"""

import contextlib
import re
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class StubS3:
    """The server. `refuse` is None or (status, code, which methods); `overwrites` forgets put-if-absent; `keys` are the
    access key ids it knows (None: any); `readers` are those among them that may only get and list: `tried` has what else
    they asked for."""

    def __init__(self):
        self.objects, self.lock = {}, threading.Lock()
        self.refuse, self.overwrites, self.keys = None, False, None
        self.refused, self.puts = 0, []
        self.readers, self.tried = set(), []
        stub = self

        class Handler(Answers):
            server_of = stub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def refusing(self, status, code, methods=("PUT",)):
        """From now on these methods are answered so."""
        self.refuse = (status, code, methods)

    def willing(self):
        self.refuse = None

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Answers(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_of = None

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):
                self.wfile.write(body)

    def error(self, status, code):
        words = f"<Error><Code>{code}</Code><Message>the stub says so</Message></Error>"
        self.answer(status, words.encode(), Content_Type="application/xml")

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            raise ValueError("chunked bodies are not expected")
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def refused(self):
        """Answers a request that is not to be served; gives whether it did."""
        stub = self.server_of
        signed = re.search(r"Credential=([^/]+)/", self.headers.get("Authorization") or "")
        if stub.keys is not None and (not signed or signed.group(1) not in stub.keys):
            status, code = 403, "InvalidAccessKeyId"
        elif signed and signed.group(1) in stub.readers and self.command not in ("GET", "HEAD"):
            stub.tried.append(f"{self.command} {self.path}")
            status, code = 403, "AccessDenied"
        elif stub.refuse and self.command in stub.refuse[2]:
            status, code, _ = stub.refuse
        else:
            return False
        stub.refused += 1
        self.error(status, code)
        return True

    def name(self):
        """The object's name in the bucket; empty for the bucket itself."""
        path = unquote(urlsplit(self.path).path).lstrip("/")
        return path.partition("/")[2]

    def do_PUT(self):
        data, stub, name = self.body(), self.server_of, self.name()
        if self.refused():
            return
        with stub.lock:
            taken = name in stub.objects and self.headers.get("If-None-Match") == "*"
            if not taken or stub.overwrites:
                stub.objects[name] = data
                stub.puts.append(name)
                taken = False
        if taken:
            self.error(412, "PreconditionFailed")
        else:
            self.answer(200, ETag='"x"')

    def do_GET(self):
        self.body()
        if self.refused():
            return
        if not self.name():
            return self.list()
        data = self.server_of.objects.get(self.name())
        if data is None:
            return self.error(404, "NoSuchKey")
        told = {"Last_Modified": formatdate(usegmt=True), "ETag": '"x"'}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self.answer(200, data, **told)
        first, last = asked.groups()
        begin = int(first) if first else max(0, len(data) - int(last))
        end = min(int(last) + 1 if first and last else len(data), len(data))
        if begin >= end:
            return self.error(416, "InvalidRange")
        told["Content_Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        self.answer(206, data[begin:end], **told)

    do_HEAD = do_GET

    def do_DELETE(self):
        self.body()
        if not self.refused():
            self.server_of.objects.pop(self.name(), None)
            self.answer(204)

    def do_POST(self):
        # The only one there is: several deletions at once.
        asked = self.body().decode()
        if not self.refused():
            names = re.findall("<Key>(.*?)</Key>", asked)
            for name in names:
                self.server_of.objects.pop(name, None)
            gone = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
            self.answer(200, f"<DeleteResult>{gone}</DeleteResult>".encode(), Content_Type="application/xml")

    def list(self):
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        prefix, after = query.get("prefix", ""), query.get("start-after", "")
        with self.server_of.lock:
            found = sorted(n for n in self.server_of.objects if n.startswith(prefix) and n > after)
            sizes = {n: len(self.server_of.objects[n]) for n in found}
        entries = "".join(
            f"<Contents><Key>{escape(n)}</Key><Size>{sizes[n]}</Size><ETag>x</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for n in found
        )
        words = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        self.answer(200, words.encode(), Content_Type="application/xml")
