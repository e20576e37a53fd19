"""U1: the suite runs with sockets other than loopback blocked and HF_HUB_OFFLINE=1."""

import os, socket, subprocess, sys

import pytest

REACH = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_STREAM); s.settimeout(5)
s.connect(("192.0.2.1", 9))
"""


def blocked(e):
    return "tests may not use the network" in str(e.value)


def test_connections_are_refused_here():
    with pytest.raises(OSError) as e, socket.socket() as s:
        s.connect(("192.0.2.1", 9))
    assert blocked(e)
    with pytest.raises(OSError) as e, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.sendto(b"x", ("192.0.2.1", 9))
    assert blocked(e)


def test_names_are_not_looked_up():
    for look in (
        lambda: socket.getaddrinfo("example.org", 443),
        lambda: socket.gethostbyname("example.org"),
        lambda: socket.create_connection(("example.org", 443), 5),
    ):
        with pytest.raises(OSError) as e:
            look()
        assert blocked(e)


def test_connections_are_refused_in_child_processes():
    done = subprocess.run([sys.executable, "-c", REACH], capture_output=True, text=True)
    assert done.returncode and "tests may not use the network" in done.stderr


def test_loopback_works():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with socket.create_connection(
            ("localhost" if not socket.has_ipv6 else "127.0.0.1", server.getsockname()[1]), 5
        ) as c:
            peer, _ = server.accept()
            with peer:
                peer.sendall(b"hello")
                assert c.recv(5) == b"hello"


def test_hugging_face_is_offline():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    from huggingface_hub import constants, hf_hub_download

    assert constants.HF_HUB_OFFLINE
    with pytest.raises(Exception) as e:
        hf_hub_download("nobody/nothing", "config.json")
    assert "offline" in str(e.value).lower() or "LocalEntryNotFound" in type(e.value).__name__
