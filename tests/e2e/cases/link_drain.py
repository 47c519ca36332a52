"""A backlog that gathered while the link was cut, sent when it is back: beside the same bytes sent plainly.

Invariant: both go through the same proxy at the same bandwidth and round trip, one after the other; what is compared is
bytes a second, each counted where it arrives.
"""

import http.client
import os
import time

from harness import FULL, MIB, Volume, check, run, s3_environment, s3_server, say, wait_until
from proxy import Proxy

BACKLOG = (1024 if FULL else 96) * MIB
BANDWIDTH = 50_000_000
DELAY = 0.0175
# What a drain may take longer than its bytes at the link's own speed: requests wait for each other's round trips.
RATIO = 1.35
PLAIN = 16 * MIB


def plain_speed(port, environment):
    """Bytes a second of one S3 client that puts objects of a segment's size, as many at once as the daemon does."""
    from concurrent.futures import ThreadPoolExecutor

    body = os.urandom(PLAIN)
    count = max(8, BACKLOG // PLAIN // 4)

    def put(n):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        words = ["curl", "-sS", "--fail", "--aws-sigv4", "aws:amz:us-east-1:s3"]
        del words
        connection.request("PUT", f"/plain-{n}", body)
        status = connection.getresponse().status
        connection.close()
        return status

    begin = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        statuses = set(pool.map(put, range(count)))
    return count * PLAIN / (time.monotonic() - begin), statuses
