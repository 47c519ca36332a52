"""Our own checks of what an application may rely on, on a real mount: names, attributes, contents, mounting.

Invariant: where ext4 has an answer, the same calls are made on a plain directory and the answers must be equal.
"""

import posix_attributes
import posix_directories
import posix_files
import posix_mounting

PARTS = {
    "directories": posix_directories.main,
    "attributes": posix_attributes.main,
    "files": posix_files.main,
    "mounting": posix_mounting.main,
}


def main(directory, part):
    PARTS[part](directory)
