"""A small OpenAI-compatible server that streams, drops its connection or refuses, as a test's script says."""

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Handler(BaseHTTPRequestHandler):
    """Answers each request as the next of `server.script` says: pieces to send, then how to end."""

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((body, self.headers["Authorization"]))
        pieces, ending = self.server.script.pop(0)
        self.close_connection = True
        if ending == "no reply":
            return
        if isinstance(ending, int):
            text = json.dumps({"error": {"message": f"bad key {self.headers['Authorization']}", "type": "t"}}).encode()
            self.send_response(ending)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        if ending == "torn":
            self.send_header("Content-Length", "100000")
        self.end_headers()
        for piece in pieces:
            self._event({"delta": {"content": piece}, "finish_reason": None, "index": 0})
        if ending == "whole":
            self._event({"delta": {}, "finish_reason": "stop", "index": 0})
            self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, choice):
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.flush()


@contextmanager
def serving(*script):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.script, server.requests = list(script), []
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
