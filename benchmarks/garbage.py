"""A client that sends nothing that a server can use, until its standard input ends.

Decoding bombs, files cut short, requests of wrong names, types, shapes and sizes, bodies that are
too large, lying lengths, broken JSON and protobuf, and bytes that are no protocol at all, in an
order that its seed gives. Not among it are requests of no rows (shape ``[0, ...]``): tritonserver
2.51 does not answer them and may crash, whatever its models are. It then prints one JSON object:
how often each kind was sent, and how often something was answered as if it were right.
``benchmarks/soak.py`` runs two of it.

    python -m benchmarks.garbage (http | grpc) HOST:PORT MODEL PIPELINE [SEED]
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))

SECONDS = 60.0
"""Most time for an answer."""

LARGE = 48 << 20
"""Bytes of a body that is too large."""

Case = Callable[[], bool]
"""Sends one; whether it was answered as if it were right."""


def bombs() -> dict[str, bytes]:
    """Files that take a decoder without limits long, or much memory, and files that are none."""
    from image_bombs import chunk, encoded, png_of_size, png_with, progressive, tiff_bomb

    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    text = zlib.compress(bytes(64_000_000))
    return {
        "scans": progressive(8000, 7000),
        "deep": encoded(Image.fromarray(np.zeros((8000, 8000), np.uint16))),
        "row": encoded(Image.new("L", (60_000, 1))),
        "huge": png_of_size(100_000, 100_000),
        "text": png_with(chunk(b"zTXt", b"key\0\0" + text)),
        "profile": png_with(chunk(b"iCCP", b"key\0\0" + text)),
        "entries": tiff_bomb(),
        "cut": encoded(Image.fromarray(noise), "JPEG")[:1000],
        "empty": b"",
        "words": b"no image",
    }


ALLOWED = ("bomb row", "bomb text", "bomb profile", "bomb deep", "twice")
"""What may be answered: images within the limits, and a request with more bytes than tensors."""


class Http:
    """Requests over sockets of their own.

    Args:
        address: ``host:port``.
        model: Takes ``pixel_values``.
        pipeline: Takes ``image``.
        random: What is drawn at random.
    """

    def __init__(self, address: str, model: str, pipeline: str, random: random.Random) -> None:
        host, _, port = address.rpartition(":")
        self._at, self._random = (host, int(port)), random
        self._model, self._pipeline = model, pipeline

    def send(self, data: bytes) -> bool:
        """Whether the answer to these bytes is 200."""
        with contextlib.suppress(OSError), socket.create_connection(self._at, SECONDS) as line:
            line.sendall(data)
            line.shutdown(socket.SHUT_WR)
            return line.recv(64).startswith(b"HTTP/1.1 200")
        return False

    def post(self, path: str, body: bytes, **headers: object) -> bool:
        """One request; headers by name, with ``_`` for ``-``."""
        given = {"Host": "x", "Content-Length": len(body), "Connection": "close"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
        return self.send("\r\n".join([*lines, "", ""]).encode() + body)

    def infer(self, tensor: Mapping[str, Any], data: bytes, model: str = "", **more: Any) -> bool:
        """One request of a tensor, its size said as it is unless ``tensor`` says otherwise."""
        size = {"parameters": {"binary_data_size": len(data)}}
        header = json.dumps({"inputs": [{**size, **tensor}]}).encode()
        length = more.pop("length", len(header))
        path = f"/v2/models/{model or self._model}/infer"
        return self.post(path, header + data, Inference_Header_Content_Length=length, **more)

    def cases(self, shape: list[int]) -> dict[str, Case]:
        """Kind -> what sends one.

        Args:
            shape: Of the model's input without the batch.
        """
        pixels = {"name": "pixel_values", "shape": [1, *shape], "datatype": "FP32"}
        data = bytes(4 * int(np.prod(shape)))
        image = {"name": "image", "shape": [1, 1], "datatype": "BYTES"}

        def sized(size: object) -> Case:
            return lambda: self.infer({**pixels, "parameters": {"binary_data_size": size}}, data)

        def shaped(*dims: int) -> Case:
            return lambda: self.infer({**pixels, "shape": dims}, data)

        cases: dict[str, Case] = {
            f"bomb {name}": lambda file=file: self.infer(  # type: ignore[misc]
                image, struct.pack("<I", len(file)) + file, self._pipeline
            )
            for name, file in bombs().items()
        }
        path = f"/v2/models/{self._model}/infer"
        lengths = (-1, 1 << 40, "x", 3, 1 << 70)
        return cases | {
            "type": lambda: self.infer({**pixels, "datatype": "INT64"}, 2 * data),
            "no type": lambda: self.infer({**pixels, "datatype": "FP99"}, data),
            "name": lambda: self.infer({**pixels, "name": "x" * 10_000}, data),
            "no name": lambda: self.infer({**pixels, "name": None}, data),
            "image as numbers": lambda: self.infer({**image, "datatype": "FP32"}, bytes(4)),
            "image of a lying length": lambda: self.infer(
                image, struct.pack("<I", 1 << 31) + b"x", self._pipeline
            ),
            "many rows": shaped(1 << 20, *shape),
            "negative": shaped(-1, *shape),
            "overflow": shaped(1 << 62, 4, *shape),
            "scalar": shaped(),
            "rank": shaped(*[1] * 1000),
            **{f"size {size}": sized(size) for size in (-1, 0, 1, 1 << 62, 1 << 70, "x", None)},
            **{
                f"length {n}": lambda n=n: self.infer(pixels, data, length=n)  # type: ignore[misc]
                for n in lengths
            },
            "too large": lambda: self.infer(
                {**pixels, "shape": [LARGE // len(data), *shape]}, bytes(LARGE)
            ),
            "cut": lambda: self.infer(pixels, data, Content_Length=len(data) + 100_000),
            "gzip": lambda: self.infer(pixels, data, Content_Encoding="gzip"),
            "json": lambda: self.post(path, b'{"inputs": [{"name":'),
            "nested": lambda: self.post(path, b'{"inputs": ' + b"[" * 64 + b"]" * 64 + b"}"),
            "array": lambda: self.post(path, b"[]"),
            "utf8": lambda: self.post(path, b'{"inputs": "\xff\xfe"}'),
            "no model": lambda: self.post("/v2/models/none/infer", b"{}"),
            "no version": lambda: self.post(f"/v2/models/{self._model}/versions/x/infer", b"{}"),
            "path": lambda: self.post("/v2/../../etc/passwd", b""),
            "method": lambda: self.send(b"BREW /v2 HTTP/1.1\r\nHost: x\r\n\r\n"),
            "header": lambda: self.send(b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000 + b"\r\n\r\n"),
            "bytes": lambda: self.send(self._random.randbytes(500)),
            "silence": lambda: self.send(b"POST /v2/models"),
        }


class Grpc:
    """Requests over one channel, and bytes over sockets; see ``Http``."""

    def __init__(self, address: str, model: str, pipeline: str, random: random.Random) -> None:
        import grpc  # type: ignore[import-untyped,unused-ignore]

        self._grpc = grpc
        self._raw = Http(address, model, pipeline, random)
        self._random, self._model, self._pipeline = random, model, pipeline
        unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        self._channel = grpc.insecure_channel(address, unlimited)

    def call(self, data: bytes, method: str = "ModelInfer") -> bool:
        """Whether a method takes these bytes as its request."""
        call = self._channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        try:
            call(data, timeout=SECONDS)
        except self._grpc.RpcError:
            return False
        return True

    def infer(self, contents: list[bytes], model: str = "", **tensor: Any) -> bool:
        """One request of a tensor, and its bytes apart."""
        from tritonclient.grpc.service_pb2 import ModelInferRequest

        request = ModelInferRequest(model_name=model or self._model, raw_input_contents=contents)
        request.inputs.add(**tensor)
        return self.call(request.SerializeToString())

    def cases(self, shape: list[int]) -> dict[str, Case]:
        """See ``Http``."""
        data = bytes(4 * int(np.prod(shape)))
        pixels = {"name": "pixel_values", "shape": [1, *shape], "datatype": "FP32"}
        image: dict[str, Any] = {"name": "image", "shape": [1, 1], "datatype": "BYTES"}
        image["model"] = self._pipeline

        def pixel(contents: list[bytes], **changes: Any) -> Case:
            given: dict[str, Any] = {**pixels, **changes}
            return lambda: self.infer(contents, **given)

        def bomb(file: bytes) -> Case:
            return lambda: self.infer([struct.pack("<I", len(file)) + file], **image)

        large = [LARGE // len(data), *shape]
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        return {f"bomb {name}": bomb(file) for name, file in bombs().items()} | {
            "type": pixel([2 * data], datatype="INT64"),
            "no type": pixel([data], datatype="FP99"),
            "name": pixel([data], name="x" * 10_000),
            "many rows": pixel([data], shape=[1 << 20, *shape]),
            "negative": pixel([data], shape=[-1, *shape]),
            "overflow": pixel([data], shape=[1 << 62, 4, *shape]),
            "scalar": pixel([data], shape=[]),
            "cut": pixel([data[:-1]]),
            "none": pixel([]),
            "twice": pixel([data, data]),
            "too large": pixel([bytes(LARGE)], shape=large),
            "image of a lying length": lambda: self.infer([b"\xff\xff\xff\x7fx"], **image),
            "two images": lambda: self.infer([b"\0\0\0\0" * 2], **image),
            "no image": lambda: self.infer([b""], **image),
            "protobuf": lambda: self.call(self._random.randbytes(300)),
            "no method": lambda: self.call(b"", "None"),
            "no model": pixel([data], model="none"),
            "bytes": lambda: self._raw.send(self._random.randbytes(500)),
            "frames": lambda: self._raw.send(preface + self._random.randbytes(500)),
        }


def main(protocol: str, address: str, model: str, pipeline: str, seed: str = "0") -> int:
    draw = random.Random(seed)  # noqa: S311 (which garbage comes next)
    kind = {"http": Http, "grpc": Grpc}[protocol]
    client: Any = kind(address, model, pipeline, draw)
    shape = json.loads(sys.stdin.readline())
    cases: dict[str, Case] = client.cases(shape)
    sent: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    ended = threading.Event()

    def send() -> None:
        while not ended.is_set():
            for name in draw.sample(sorted(cases), len(cases)):
                if ended.is_set():
                    break
                sent[name] += 1
                answered[name] += cases[name]()

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    sys.stdin.read()
    ended.set()
    sender.join(SECONDS)
    wrong = {n: c for n, c in answered.items() if c and n not in ALLOWED}
    print(json.dumps({"sent": dict(sent), "answered": wrong}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
