"""The dashboard's web server: the page, the JSON API (described at /openapi.json), the live stream, the metrics."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import segno
from fastapi import FastAPI, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel

from dtrain.experiments import dashboard_curves as curves
from dtrain.experiments import dashboard_reads as reads
from dtrain.experiments.dashboard_guard import Access, Guard
from dtrain.experiments.dashboard_history import History
from dtrain.experiments.dashboard_prometheus import CONTENT_TYPE, exposition
from dtrain.experiments.dashboard_results import Results
from dtrain.experiments.dashboard_rows import About, EventRow, Snapshot
from dtrain.experiments.dashboard_stream import MAX_CLIENTS, Hub
from dtrain.trainer.errors import DtrainError, UsageError

STATIC = Path(__file__).parent / "dashboard_static"
CURVES = ("eval_loss", "train_loss", "tokens_per_s", "exchange_s", "contributors")
MAX_POINTS = 5000

CurveName = Literal["eval_loss", "train_loss", "tokens_per_s", "exchange_s", "contributors"]
Axis = Literal["time", "round", "tokens"]
Action = Literal["pause", "resume", "finish"]


class Run(Protocol):
    """The run that is watched; see `dashboard_observer.Watcher`."""

    @property
    def history(self) -> History: ...

    @property
    def about(self) -> About: ...

    @property
    def invite(self) -> str: ...


class Workers(Protocol):
    """This machine's workers; see `dashboard_machine.Machine`."""

    def workers(self) -> list[dict[str, Any]]: ...
    def act(self, action: str, pid: int) -> dict[str, Any]: ...
    def set_limits(self, pid: int, changes: dict[str, Any]) -> dict[str, Any]: ...
    def log(self, pid: int, lines: int) -> list[dict[str, Any]]: ...


class WorkerRequest(BaseModel):
    """Which worker of this machine is meant."""

    pid: int


class LimitsRequest(WorkerRequest):
    """Limits to change; those that are left out stay."""

    limits: dict[str, float | bool | str]


def create_app(
    *,
    hub: Hub,
    access: Access,
    run: Run | None = None,
    results: Results | None = None,
    machine: Workers | None = None,
    show_invite: bool = True,
) -> FastAPI:
    """The application. Without a run it has the Experiments page only."""
    app = FastAPI(
        title="dtrain dashboard",
        description="A run as it is watched. All figures come from the run's own heartbeats and bulletins.",
        docs_url=None,  # that page loads its scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(Guard, access=access)
    _add_page(app)
    _add_run(app, hub, run, show_invite=show_invite, public=access.public, has_results=results is not None)
    _add_results(app, results)
    _add_workers(app, machine)

    @app.exception_handler(DtrainError)
    def refuse(_: Request, error: DtrainError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 400 if isinstance(error, UsageError) else 502)

    return app


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")


def _add_run(
    app: FastAPI, hub: Hub, run: Run | None, *, show_invite: bool, public: bool, has_results: bool
) -> None:
    @app.get("/api/info")
    def info() -> dict[str, Any]:
        """What this dashboard has: a run, results, controls; and how to join the run."""
        invite = run.invite if run is not None and show_invite else ""
        return {
            "run_id": run.about.run_id if run is not None else "",
            "has_results": has_results,
            "public": public,
            "invite": invite,
            "join": f"dtrain join {invite}" if invite else "",
        }

    @app.get("/api/invite.svg", include_in_schema=False)
    def invite_code() -> Response:
        if run is None or not show_invite or not run.invite:
            return _missing("there is no invite to show")
        image = io.BytesIO()
        segno.make(run.invite, error="l", micro=False).save(
            image, kind="svg", scale=3, border=2, light="#fff"
        )
        return Response(image.getvalue(), media_type="image/svg+xml")

    @app.get("/api/run", response_model=Snapshot)
    def snapshot() -> Response:
        """Everything that the run page shows but the curves."""
        return JSONResponse(hub.latest) if hub.latest is not None else _missing("no run is watched")

    @app.get("/api/curves/{name}")
    def curve(
        name: CurveName,
        axis: Annotated[Axis, Query(description="which of the columns `start` and `end` are of")] = "time",
        start: Annotated[float, Query(allow_inf_nan=False)] = 0.0,
        end: Annotated[float, Query(allow_inf_nan=False)] = 1e300,
        max_points: Annotated[int, Query(ge=2, le=MAX_POINTS)] = 800,
    ) -> Response:
        """Columns of a curve: time (Unix seconds), round, tokens, value. Long stretches are thinned to the lowest and
        highest value of equal parts."""
        if run is None:
            return _missing("no run is watched")
        with run.history.reader() as db:
            points = curves.read(db, name, axis=axis, start=start, end=end, max_points=max_points)
        columns = ("time", "round", "tokens", "value")
        return JSONResponse({name: [point[at] for point in points] for at, name in enumerate(columns)})

    @app.get("/api/events")
    def events(
        before: Annotated[int, Query(description="events with a smaller id")] = 2**62,
        limit: Annotated[int, Query(ge=1, le=500)] = 100,
    ) -> list[EventRow]:
        """What happened, newest first."""
        if run is None:
            return []
        with run.history.reader() as db:
            return reads.events(db, before, limit)

    @app.get("/api/stream")
    async def stream() -> Response:
        """Server-sent events: `snapshot` with what /api/run gives, whenever it changes; `alive` now and then."""
        if hub.clients >= MAX_CLIENTS:
            return PlainTextResponse("too many viewers", 503, {"retry-after": "30"})
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(hub.follow(), media_type="text/event-stream", headers=headers)

    @app.get("/metrics")
    def metrics() -> Response:
        """The figures for Prometheus."""
        return Response(exposition(hub.latest, hub.clients), media_type=CONTENT_TYPE)


def _add_results(app: FastAPI, results: Results | None) -> None:
    @app.get("/api/results")
    def folders() -> list[dict[str, Any]]:
        """Sweeps of `dtrain simulate` with a row per run."""
        return results.folders() if results is not None else []

    @app.get("/api/results/curve")
    def curve(
        folder: str, run: str, max_points: Annotated[int, Query(ge=10, le=MAX_POINTS)] = 2000
    ) -> Response:
        """The columns of one simulated run's rounds."""
        columns = results.curve(folder, run, max_points) if results is not None else None
        return JSONResponse(columns) if columns is not None else _missing("there is no such run")


def _add_workers(app: FastAPI, machine: Workers | None) -> None:
    @app.get("/api/worker")
    def workers() -> list[dict[str, Any]]:
        """This machine's workers. Needs the token, as all below does (see `Guard`)."""
        return machine.workers() if machine is not None else []

    @app.get("/api/worker/log")
    def log(pid: int, lines: Annotated[int, Query(ge=1, le=500)] = 200) -> list[dict[str, Any]]:
        """The last lines that a worker said."""
        return _machine(machine).log(pid, lines)

    @app.post("/api/worker/limits")
    def limits(request: LimitsRequest) -> dict[str, Any]:
        """Change limits of a worker; the status after it."""
        return _machine(machine).set_limits(request.pid, dict(request.limits))

    @app.post("/api/worker/{action}")
    def act(action: Annotated[Action, PathParameter()], request: WorkerRequest) -> dict[str, Any]:
        """Pause, resume, or finish (leave after the round under way); the status after it."""
        return _machine(machine).act(action, request.pid)


def _machine(machine: Workers | None) -> Workers:
    if machine is None:
        raise UsageError("this dashboard controls no workers")
    return machine


def _missing(reason: str) -> Response:
    return JSONResponse({"error": reason}, 404)
