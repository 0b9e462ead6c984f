"""The status page at ``/`` and its data at ``/status``; ``headrace top`` reads the same data."""

from http import HTTPStatus

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server.cluster import Cluster
from server.generation import Generator
from server.openai.errors import HttpError
from server.page.data import Status, status_of
from server.page.experts import ExpertHeat
from server.page.files import HEADERS, PageFile, page_files
from server.page.samples import Samples

MAX_DIGITS = 12


def status_routes(cluster: Cluster, generator: Generator, samples: Samples) -> list[Route]:
    data = StatusEndpoint(cluster, generator, samples)
    pages = [
        Route(path, FileEndpoint(file).show, methods=["GET"]) for path, file in page_files().items()
    ]
    return [*pages, Route("/status", data.show, methods=["GET"])]


class StatusEndpoint:
    """Answers from memory: no worker is asked."""

    def __init__(self, cluster: Cluster, generator: Generator, samples: Samples) -> None:
        self._cluster = cluster
        self._generator = generator
        self._samples = samples
        self._heat = ExpertHeat(cluster)
        self._encoder = msgspec.json.Encoder()

    async def show(self, request: Request) -> Response:
        """``?after=N`` leaves out the samples up to number N, which the caller has.

        Raises:
            HttpError: ``after`` is not a number.
        """
        after = request.query_params.get("after", "0")
        if not (after.isascii() and after.isdigit() and len(after) <= MAX_DIGITS):
            raise HttpError(
                HTTPStatus.BAD_REQUEST, f"after must be a number of at most {MAX_DIGITS} digits"
            )
        body = self._encoder.encode(await self.status(int(after)))
        headers = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
        return Response(body, headers=headers, media_type="application/json")

    async def status(self, after: int) -> Status:
        return status_of(
            self._cluster,
            self._generator.readiness(),
            experts=await self._heat.groups(),
            samples=self._samples.after(after),
        )


class FileEndpoint:
    def __init__(self, file: PageFile) -> None:
        self._file = file

    async def show(self, _request: Request) -> Response:
        headers = {**HEADERS, "content-type": self._file.content_type}
        return Response(self._file.content, headers=headers)
