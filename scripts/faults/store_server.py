"""A store on the loopback, in memory: `python scripts/faults/store_server.py s3|gs PORT`.

S3 is moto's server, Google's Cloud Storage is gcp-storage-emulator. That one knows nothing of
`ifGenerationMatch=0`, by which the real store makes an object only if there is none; here it does.
"""

import sys
from typing import Any

HOST = "127.0.0.1"
BUCKET = "bucket"


def serve_s3(port: int) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    run_simple(HOST, port, DomainDispatcherApplication(create_backend_app), threaded=True)


def serve_gs(port: int) -> None:
    from gcp_storage_emulator import server, storage

    class Storage(storage.Storage):
        is_new_wanted = False

        def create_file(self, bucket_name: str, file_name: str, *rest: Any) -> None:
            if self.is_new_wanted and file_name in self.objects.get(bucket_name, {}):
                raise TakenError
            super().create_file(bucket_name, file_name, *rest)

    class RequestHandler(server.RequestHandler):
        def do_POST(self) -> None:
            self.storage.is_new_wanted = "ifGenerationMatch=0" in self.path
            try:
                super().do_POST()
            except TakenError:
                self.send_response(412)
                self.send_header("Content-Length", "0")
                self.end_headers()

    server.Storage, server.RequestHandler = Storage, RequestHandler
    server.create_server(HOST, port, in_memory=True, default_bucket=BUCKET).run()


class TakenError(Exception):
    """An object is to be new, and is there."""


if __name__ == "__main__":
    {"s3": serve_s3, "gs": serve_gs}[sys.argv[1]](int(sys.argv[2]))
