"""Run a function as a user who may read only what everybody may read: root may read everything, and CI often
is root.
"""

import json, os, shutil, tempfile, traceback
from pathlib import Path


def as_nobody(fn):
    """What `fn()` returns (as JSON holds it) in a forked child that gave up root; what it needs must be
    imported before.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            said = {"value": fn()}
        except BaseException:
            said = {"error": traceback.format_exc()}
        os.write(write, json.dumps(said).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f:
        said = json.loads(f.read())
    os.waitpid(pid, 0)
    if "error" in said:
        raise AssertionError(said["error"])
    return said["value"]


class OpenFolder:
    "A temporary folder that every user may enter and write to, unlike pytest's."

    def __enter__(self):
        self.path = Path(tempfile.mkdtemp(prefix="open-"))
        self.path.chmod(0o777)
        return self.path

    def __exit__(self, *_):
        for root, dirs, _ in os.walk(self.path):
            for d in dirs:
                os.chmod(os.path.join(root, d), 0o755)
        shutil.rmtree(self.path)
