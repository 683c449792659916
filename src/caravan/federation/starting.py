"""The start of Flower's app processes: they speak up while Flower itself is still being loaded.

A SuperLink or SuperNode gives a task to a process that it starts, and takes it back where it hears nothing for 30
seconds. Flower's process says its first word after seconds of imports, and on a machine with much other work these last
longer than that: then another process is started, which has still less processor time, and so on. This one says the
word first, with the standard library alone, and then becomes Flower's.
"""

import http.client
import itertools
import ssl
import sys
import threading
from contextlib import closing, suppress
from importlib.metadata import distribution

PROGRAMS = ("flwr-serverapp", "flwr-clientapp")

_HEARTBEAT = "/v1/runtime/send-task-heartbeat"  # its message has no field, hence no bytes
_PAUSE_SECONDS = 5.0  # the claim lasts six times as long
_ANSWER_SECONDS = 5.0  # as in Flower


def start(program: str, arguments: list[str]) -> None:
    """Become one of `PROGRAMS`, as Flower installs it, with its arguments."""
    given = dict(itertools.pairwise(arguments))
    loaded = threading.Event()
    _speak(given)
    threading.Thread(target=_speak_until, args=(loaded, given), daemon=True).start()
    found = distribution("flwr").entry_points.select(group="console_scripts", name=program)
    run = next(iter(found)).load()
    loaded.set()  # Flower's own heartbeat begins at once
    sys.argv = [program, *arguments]
    sys.exit(run())


def _speak_until(loaded: threading.Event, given: dict[str, str]) -> None:
    while not loaded.wait(_PAUSE_SECONDS):
        _speak(given)


def _speak(given: dict[str, str]) -> None:
    """Send one heartbeat; whatever goes wrong, Flower will meet it too, and has the words for it."""
    with suppress(OSError, http.client.HTTPException, KeyError, ValueError):
        host, _, port = given["--runtime-api-address"].rpartition(":")
        host, headers = host.strip("[]"), {"content-type": "application/protobuf", "flwr-task-token": given["--token"]}
        if certificates := given.get("--root-certificates"):
            context = ssl.create_default_context(cafile=certificates)
            connection = http.client.HTTPSConnection(host, int(port), timeout=_ANSWER_SECONDS, context=context)
        else:
            connection = http.client.HTTPConnection(host, int(port), timeout=_ANSWER_SECONDS)
        with closing(connection):
            connection.request("POST", _HEARTBEAT, body=b"", headers=headers)
            connection.getresponse().read()


if __name__ == "__main__":
    start(sys.argv[1], sys.argv[2:])
