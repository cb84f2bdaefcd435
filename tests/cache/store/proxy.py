"""A proxy before the server of object storage: it counts requests in flight, slows them down, and loses some."""

import http.client
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Proxy:
    """lose(method, path, headers) : None, or what is lost: `request` or `answer`; then the connection is cut.
    seconds : that each request takes longer.  most : requests of a kind that were in flight at once, by method.
    """

    def __init__(self):
        self.lose = lambda method, path, headers: None
        self.seconds = 0.0
        self.most, self.now, self.lock = {}, {}, threading.Lock()

    @contextmanager
    def counting(self, method):
        with self.lock:
            self.now[method] = self.now.get(method, 0) + 1
            self.most[method] = max(self.most.get(method, 0), self.now[method])
        try:
            yield
        finally:
            with self.lock:
                self.now[method] -= 1


@contextmanager
def proxy(endpoint):
    """(Proxy, its endpoint)."""
    where = urlsplit(endpoint)
    state = Proxy()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            with state.counting(self.command):
                time.sleep(state.seconds)
                lost = state.lose(self.command, self.path, self.headers)
                if lost != "request":
                    server = http.client.HTTPConnection(where.hostname, where.port)
                    server.request(self.command, self.path, body, dict(self.headers))
                    answer = server.getresponse()
                    content = answer.read()
                    server.close()
            if lost:
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "server", "date", "content-length"):
                    self.send_header(name, value)
            length = answer.getheader("content-length") if self.command == "HEAD" else len(content)
            self.send_header("content-length", str(length or 0))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = forward

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield state, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
