"""Real applications on a mount, each with its own means of checking itself.

Invariant: every case ends with another mount of the volume and with a read-only one from the store alone, and checks
there what it checked before. What the applications do lies in the `apps_*` modules.
"""

import apps_databases

CASES = {
    "postgresql": apps_databases.postgresql,
    "sqlite": apps_databases.sqlite,
}


def main(directory, which):
    CASES[which](directory)
