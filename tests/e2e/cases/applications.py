"""Real applications on a mount, each with its own means of checking itself.

Invariant: every case ends with another mount of the volume and with a read-only one from the store alone, and checks
there what it checked before. What the applications do lies in the `apps_*` modules.
"""

import apps_append
import apps_copies
import apps_databases
import apps_development

CASES = {
    "postgresql": apps_databases.postgresql,
    "sqlite": apps_databases.sqlite,
    "git": apps_development.git_case,
    "rsync": apps_copies.rsync,
    "tar": apps_copies.tar,
    "rust_build": apps_development.rust_build,
    "append_log": apps_append.append_log,
}


def main(directory, which):
    CASES[which](directory)
