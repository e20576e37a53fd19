"""No network but loopback, in this Python process and in every one it starts (this folder is put on
PYTHONPATH).

An audit hook sees every connection that Python's socket module makes, cannot be removed, and costs nothing
otherwise.
"""

import os, sys

LOCAL = {"", "localhost", "localhost.localdomain", "ip6-localhost", "0.0.0.0", "::"}
WATCHED = {
    "socket.connect",
    "socket.sendto",
    "socket.sendmsg",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.gethostbyaddr",
}


class NetworkBlocked(OSError):
    "Raised where a test process reaches for anything but loopback."


def local(host):
    "Whether `host` is this machine: a loopback address, or its own name (looked up, never connected to)."
    host = host.decode() if isinstance(host, bytes) else str(host or "")
    return host in LOCAL or host.startswith(("127.", "::1", "::ffff:127.")) or host == os.uname().nodename


def hook(event, args):
    "Refuse what leaves the machine."
    if event not in WATCHED:
        return
    target = args[1] if event in ("socket.connect", "socket.sendto", "socket.sendmsg") else args[0]
    if isinstance(target, tuple):
        target = target[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        return  # a unix socket, or an address given before
    if not local(target):
        raise NetworkBlocked(f"tests may not use the network: {event} {target}")


if not getattr(sys, "_sdcourse_offline", False):
    sys.addaudithook(hook)
    sys._sdcourse_offline = True
