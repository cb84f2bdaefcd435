"""A proxy of bytes before a service, which cuts answers short or gives its own."""

import socket
import threading
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

SILENCE = b"nothing at all"


class Proxy:
    """faults : of the next connections, one each, in their order; those after them are left alone.

    A fault is a number, of bytes of the answer after which the connection ends, or bytes, which are the answer; none, and
    the connection stays, for `SILENCE`.
    connections : how many there were.
    """

    def __init__(self, upstream):
        self.upstream = urlsplit(upstream)
        self.faults, self.connections, self.open = [], 0, []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"

    def run(self):
        while True:
            try:
                client, _ = self.listening.accept()
            except OSError:
                return
            self.connections += 1
            fault = self.faults.pop(0) if self.faults else None
            self.open.append(client)
            threading.Thread(target=self.serve, args=(client, fault), daemon=True).start()

    def serve(self, client, fault):
        with suppress(OSError), client:
            if isinstance(fault, bytes):
                client.recv(1 << 16)
                if fault != SILENCE:
                    client.sendall(fault)
                    client.shutdown(socket.SHUT_WR)
                while client.recv(1 << 16):
                    pass
                return
            with socket.create_connection((self.upstream.hostname, self.upstream.port)) as server:
                self.open.append(server)
                threading.Thread(target=self.copy, args=(client, server, None), daemon=True).start()
                self.copy(server, client, fault)

    @staticmethod
    def copy(source, target, most):
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if most is not None and len(data) >= most:
                    target.sendall(data[:most])
                    target.shutdown(socket.SHUT_RDWR)
                    return
                most = None if most is None else most - len(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@contextmanager
def proxy(upstream):
    found = Proxy(upstream)
    thread = threading.Thread(target=found.run, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.listening.shutdown(socket.SHUT_RDWR)
        found.listening.close()
        for one in found.open:
            with suppress(OSError):
                one.close()
        thread.join(10)


def answer(status, body=b"", **headers):
    """Bytes of an answer, after which the connection ends."""
    named = {"content-length": len(body), "connection": "close", **{k.replace("_", "-"): v for k, v in headers.items()}}
    lines = [f"HTTP/1.1 {status} x", *(f"{name}: {value}" for name, value in named.items()), "", ""]
    return "\r\n".join(lines).encode() + body
