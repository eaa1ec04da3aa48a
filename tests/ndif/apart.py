"""Run a command where there is no network but loopback: ``python tests/ndif/apart.py command ...`` (Linux).

The bed and what talks to it are put into a network namespace of their own, so that nothing can reach them and they can
reach nothing.
"""

import shlex
import shutil
import subprocess
import sys


def apart(command: list[str]) -> list[str]:
    """The command, in a network namespace whose loopback is up."""
    inside = f"ip link set lo up && exec {shlex.join(command)}"
    root = [] if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0 else ["-r"]
    return ["unshare", *root, "-n", "--", "sh", "-c", inside]


if __name__ == "__main__":
    if missing := [one for one in ("unshare", "ip") if shutil.which(one) is None]:
        sys.exit(f"There is no {' and no '.join(missing)}: the bed cannot be put apart.")
    sys.exit(subprocess.call(apart(sys.argv[1:])))
