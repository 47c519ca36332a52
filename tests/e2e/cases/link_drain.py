"""A backlog that gathered while the link was cut, sent when it is back: beside the same bytes sent plainly.

Invariant: both go through the same proxy at the same bandwidth and round trip, one after the other; the bytes are
counted by the proxy.
"""

import datetime
import hashlib
import hmac
import http.client
import os
import time
from concurrent.futures import ThreadPoolExecutor

from harness import FULL, MIB, Volume, check, s3_environment, s3_server, say, wait_until
from proxy import Proxy

BACKLOG = (1024 if FULL else 128) * MIB
BANDWIDTH = 50_000_000
# One way of the round trip.
DELAY = 0.0175
# Of the plain client's speed.
SPEED_MIN = 0.8
# Until the first segment goes: the longest pause between two attempts, and the attempt.
START_MAX = 8
# As the daemon does it: segments of this size, so many at once.
SEGMENT, AT_ONCE = 16 * MIB, 4


def put(port, environment, name, body):
    """One object into the bucket, signed as S3 demands; the body is not."""
    when = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    signed = {"host": f"127.0.0.1:{port}", "x-amz-content-sha256": "UNSIGNED-PAYLOAD", "x-amz-date": when}
    lines = "".join(f"{key}:{value}\n" for key, value in signed.items())
    request = f"PUT\n/land/{name}\n\n{lines}\n{';'.join(signed)}\nUNSIGNED-PAYLOAD"
    scope = [when[:8], environment["AWS_REGION"], "s3", "aws4_request"]
    text = f"AWS4-HMAC-SHA256\n{when}\n{'/'.join(scope)}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = b"AWS4" + environment["AWS_SECRET_ACCESS_KEY"].encode()
    for word in [*scope, text]:
        key = hmac.new(key, word.encode(), hashlib.sha256).digest()
    who = f"Credential={environment['AWS_ACCESS_KEY_ID']}/{'/'.join(scope)}"
    says = f"AWS4-HMAC-SHA256 {who},SignedHeaders={';'.join(signed)},Signature={key.hex()}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("PUT", f"/land/{name}", body, {**signed, "Authorization": says})
    answer = connection.getresponse()
    said = answer.read()
    connection.close()
    return answer.status, said


def plain_speed(proxy):
    """Bytes a second that a client without a file system gets through the link, with the same bytes in the same pieces."""
    body, environment = os.urandom(SEGMENT), s3_environment(proxy.port)
    begin = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        names = (f"plain-{n}" for n in range(BACKLOG // SEGMENT))
        answers = list(pool.map(lambda name: put(proxy.port, environment, name, body), names))
    took = time.monotonic() - begin
    check(all(status == 200 for status, _ in answers), "the plain client's puts succeed", str(answers[:1]))
    return BACKLOG / took


def unsent(home):
    return home.status()["unsent_bytes"]


def main(directory):
    with s3_server(directory) as (root, port):
        proxy = Proxy(port)
        direct = Volume(directory, "s3://land/drain", s3_environment(port))
        direct.init()
        volume = direct.at(direct.url, s3_environment(proxy.port))
        home = volume.mount("home", directory / "state", options=["protection=local"])
        proxy.set("cut")
        with open(home.point / "backlog", "wb") as out:
            for _ in range(BACKLOG // MIB):
                out.write(os.urandom(MIB))
            out.flush()
            os.fsync(out.fileno())
        wait_until(lambda: unsent(home) >= BACKLOG, 60, "the backlog is in the spool")
        proxy.set("pass", delay=DELAY, rate=BANDWIDTH)
        back, before = time.monotonic(), proxy.count()["up"]
        wait_until(lambda: proxy.count()["up"] > before + MIB, START_MAX, "it begins to drain", pause=0.01)
        begin, early = time.monotonic(), proxy.count()["up"]
        wait_until(lambda: unsent(home) == 0, 5 * BACKLOG / BANDWIDTH + 20, "it drains", pause=0.05)
        end = time.monotonic()
        speed = (proxy.count()["up"] - early) / (end - begin)
        say(f"{BACKLOG // MIB} MiB drained {end - back:.1f} s after the link was back: it began after "
            f"{begin - back:.1f} s, and went at {speed / 1e6:.1f} MB/s")  # fmt: skip
        plain = plain_speed(proxy)
        check(speed > SPEED_MIN * plain, f"that is {speed / plain:.2f} of the {plain / 1e6:.1f} MB/s of plain puts "
              f"through the same link ({BANDWIDTH / 1e6:.0f} MB/s, 35 ms)")  # fmt: skip
        sent = proxy.count()["up"]
        home.umount()
        embassy = direct.embassy()
        check((embassy.point / "backlog").stat().st_size == BACKLOG, f"the embassy has it ({sent >> 20} MiB went up)")
        embassy.umount()
        proxy.close()
