"""A local HTTP server that does everything wrong, by path; and the pictures that it sends."""

import http.server, io, os, threading
from collections import Counter
from contextlib import contextmanager

import numpy as np
from PIL import Image


def picture(w=120, h=80, seed=0, format="JPEG", mode="RGB", **kwargs):
    "A picture of noise as the bytes of a file."
    im = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)).convert(
        mode
    )
    out = io.BytesIO()
    im.save(out, format, **kwargs)
    return out.getvalue()


JPEG = picture()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, code=200, body=JPEG, length=None, **headers):
        self.send_response(code)
        if length is not False:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        for k, v in headers.items():
            self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.server.asked[path] += 1
        self.server.queries[path] = query
        self.server.cookies.append(self.headers.get("Cookie"))
        what, n = path.split("/")[1], self.server.asked[path]
        try:
            getattr(self, f"on_{what}", self.reply)(**({"n": n} if hasattr(self, f"on_{what}") else {}))
        except OSError:
            pass  # the client has left

    def on_stall(self, n):
        self.server.release.wait(60)

    def on_stallhalf(self, n):
        self.send_response(200)
        self.send_header("Content-Length", str(len(JPEG)))
        self.end_headers()
        self.wfile.write(JPEG[:500])
        self.wfile.flush()
        self.server.release.wait(60)

    def on_drip(self, n):
        self.send_response(200)
        self.end_headers()
        for i in range(len(JPEG)):
            self.wfile.write(JPEG[i : i + 1])
            self.wfile.flush()
            if self.server.release.wait(0.05):
                return

    def on_cut(self, n):
        self.reply(body=JPEG[: len(JPEG) // 2], length=len(JPEG))
        self.close_connection = True

    def on_cutonce(self, n):
        self.on_cut(n) if n == 1 else self.reply()

    def on_short(self, n):
        self.reply(length=len(JPEG) // 2)  # promises less than it sends: the picture arrives cut

    def on_long(self, n):
        self.reply(length=len(JPEG) + 1000)
        self.close_connection = True

    def on_nolength(self, n):
        self.reply(length=False)
        self.close_connection = True

    def on_oddlength(self, n):
        self.reply(length="many")
        self.close_connection = True

    def on_gone(self, n):
        self.reply(404, b"not here")

    def on_busy(self, n):
        self.reply(503, b"", Retry_After="0") if n < 3 else self.reply()

    def on_limited(self, n):
        self.reply(429, b"", Retry_After="1") if n < 2 else self.reply()

    def on_broken(self, n):
        self.reply(500, b"oh")

    def on_moved(self, n):
        self.reply(302, b"", Location="/good/moved")

    def on_circle(self, n):
        self.reply(302, b"", Location="/circle")

    def on_tofile(self, n):
        self.reply(302, b"", Location=f"file://{self.server.secret}")

    def on_toftp(self, n):
        self.reply(302, b"", Location="ftp://127.0.0.1/x")

    def on_tosocket(self, n):
        self.reply(302, b"", Location=f"ws://127.0.0.1:{self.server.server_port}/good/socket")

    def on_html(self, n):
        self.reply(body=b"<!DOCTYPE html><html>please log in</html>", Content_Type="text/html")

    def on_empty(self, n):
        self.reply(body=b"")

    def on_bomb(self, n):
        self.reply(body=self.server.bomb)

    def on_huge(self, n):
        self.reply(body=bytes(3_000_000))

    def on_endless(self, n):
        self.send_response(200)
        self.end_headers()
        while not self.server.release.is_set():
            self.wfile.write(bytes(1 << 16))

    def on_garbage(self, n):
        self.wfile.write(b"\xff\xfe not http at all\r\n\r\n")
        self.close_connection = True

    def on_hangup(self, n):
        self.close_connection = True

    def on_cmyk(self, n):
        self.reply(body=picture(mode="CMYK"))

    def on_png(self, n):
        self.reply(body=picture(format="PNG"))

    def on_cutpng(self, n):
        self.reply(body=picture(format="PNG")[:-3000])

    def on_slow(self, n):
        self.server.release.wait(0.3)
        self.reply()

    def on_cookie(self, n):
        self.reply(Set_Cookie=f"who={n}; Path=/")

    def on_endlessmove(self, n):
        self.send_response(302)
        self.send_header("Location", "/good/far")
        self.end_headers()
        while not self.server.release.is_set():
            self.wfile.write(bytes(1 << 16))


class Patient(Handler):
    "Answers on one connection until the other side has no more questions."

    protocol_version, disable_nagle_algorithm = (
        "HTTP/1.1",
        True,
    )  # as real servers: a body does not wait for the receipt of its headers


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    connections = 0

    def handle_error(self, *_):
        pass

    def get_request(self):
        self.connections += 1
        return super().get_request()


@contextmanager
def hostile_server(secret="", bomb=b"", handler=Handler):
    "The server's address in .url; what was asked in .asked, with which cookies, on how many connections."
    server = Server(("127.0.0.1", 0), handler)
    server.asked, server.queries, server.cookies, server.release, server.secret, server.bomb = (
        Counter(),
        {},
        [],
        threading.Event(),
        secret,
        bomb,
    )
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()


def lay_what_is_no_file(folder, kind):
    "Beside the pictures: a pipe, a link to a device, or a name that is not UTF-8."
    if kind == "pipe":
        os.mkfifo(folder / "c.png")
    elif kind == "device":
        (folder / "z.png").symlink_to("/dev/zero")
    else:
        with open(os.fsencode(folder) + b"/bad\xff\xfe.png", "wb") as file:
            file.write(picture(format="PNG"))
