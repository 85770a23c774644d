"""The web page: its addresses, and what each of them answers."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import structlog
from aiohttp import web

from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common import status
from pollard.services.common.auth import Gate
from pollard.services.common.auth.callers import Caller, Role
from pollard.services.common.errors import ServiceError, Unauthenticated
from pollard.services.models import names
from pollard.services.models.blobs import Blobs
from pollard.services.models.fleet import Fleet
from pollard.services.models.servicer_fleet import FleetServicer
from pollard.services.models.servicer_models import ModelServicer
from pollard.services.models.store import Store
from pollard.services.models.watch import EventFeed
from pollard.services.models.web import forms, guard, reports, sessions
from pollard.services.models.web.asking import MODELS, Manager, Visitor
from pollard.services.models.web.live import Live
from pollard.services.models.web.rendering import Assets, Renderer
from pollard.services.models.web.sessions import Sessions
from pollard.services.models.web.trials import Trials
from pollard.services.models.web.views import View, Views
from pollard.services.models.web.vision import PREDICT, Vision

ROLLOUT_ACTIONS = {
    "pause": ("PauseRollout", pb.PauseRolloutRequest, pb.PauseRolloutResponse),
    "resume": ("ResumeRollout", pb.ResumeRolloutRequest, pb.ResumeRolloutResponse),
    "promote": ("PromoteRollout", pb.PromoteRolloutRequest, pb.PromoteRolloutResponse),
    "abort": ("AbortRollout", pb.AbortRolloutRequest, pb.AbortRolloutResponse),
}

_STATUSES = {
    "INVALID_ARGUMENT": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "FAILED_PRECONDITION": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}

NOBODY = Caller("", Role.SERVER, "certificate")
"""Who is not known yet: what a service may do to another, which is nothing that the page does."""

_log = structlog.get_logger("pollard.page")


@dataclass
class Visit:
    """One request with what is known of the visitor."""

    request: web.Request
    visitor: Visitor
    manager: Manager
    new_cookie: str = ""
    """The visit that begins with this request; empty when it had begun before."""
    visit: str = ""

    @property
    def model(self) -> str:
        """The model of the address.

        Raises:
            InvalidRequest: it is no name.
        """
        return names.check_model_id(self.request.match_info["model"])

    @property
    def number(self) -> int:
        """The number of the address."""
        return int(self.request.match_info["number"])


Handler = Callable[[Visit], Awaitable[web.StreamResponse]]


class WebPage:
    """Answers browsers.

    Args:
        models: Methods of ModelService, for all that is read and changed.
        fleet_methods: Methods of FleetService.
        store: Holds the registry.
        blobs: Holds the bundles.
        fleet: Knows the version of the desired state.
        feed: Says when something changes.
        gate: Tells who looks, and what they may do.
        vision: Answers about images.
        hosts: Names of this server beside the machine's own.
    """

    def __init__(
        self,
        models: ModelServicer,
        fleet_methods: FleetServicer,
        store: Store,
        blobs: Blobs,
        fleet: Fleet,
        feed: EventFeed,
        gate: Gate,
        vision: Vision,
        hosts: tuple[str, ...] = (),
    ) -> None:
        self._models = models
        self._fleet_methods = fleet_methods
        self._store = store
        self._blobs = blobs
        self._hosts = guard.Hosts(hosts)
        self._gate = gate
        self._sessions = Sessions(gate)
        self._assets = Assets()
        self._renderer = Renderer(self._assets)
        self._views = Views(store, blobs, fleet)
        self._vision = vision
        self._trials = Trials(vision)
        self.live = Live(feed, self._renderer)

    async def close(self) -> None:
        """Stop what runs in the background."""
        await self._views.close()
        await self._vision.close()

    def add_to(self, application: web.Application) -> None:
        """Add the page's addresses to an application."""
        add = application.router.add_route
        model, number = "/models/{model}", "{number:[1-9][0-9]{0,14}}"
        for path, look in (
            ("/", self._overview),
            (model, self._model),
            (f"{model}/revisions/{number}", self._revision),
            (f"{model}/revisions/{number}/report", self._report),
            (f"{model}/rollouts/{number}", self._rollout),
            (f"{model}/try", self._trial),
            ("/fleet", self._fleet),
            ("/log", self._log),
        ):
            add("GET", path, self._guarded(self._shown(look)))
        add("GET", "/login", self._guarded(self._login_form, known=False))
        add("POST", "/login", self._guarded(self._login, known=False))
        add("POST", "/logout", self._guarded(self._logout))
        add("GET", "/assets/{digest}/{name}", self._asset)
        add("GET", f"{model}/revisions/{number}/report.html", self._guarded(self._report_content))
        add("POST", f"{model}/try", self._guarded(self._try))
        add("POST", f"{model}/rollouts", self._guarded(self._create_rollout))
        add("POST", f"{model}/rollouts/{number}/{{action}}", self._guarded(self._change_rollout))
        add("POST", f"{model}/aliases/{{alias}}", self._guarded(self._set_alias))
        add("POST", f"{model}/aliases/{{alias}}/rollback", self._guarded(self._roll_back_alias))

    # What surrounds every answer

    def _guarded(
        self, handler: Handler, *, known: bool = True
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Let only those in who may come in, and say in words what went wrong.

        Args:
            handler: Answers.
            known: Only those who are known.
        """

        async def answer(request: web.Request) -> web.StreamResponse:
            visit: Visit | None = None
            try:
                if not self._sessions.enforced:
                    self._hosts.check(request)
                if request.method not in ("GET", "HEAD"):
                    guard.check_origin(request)
                if guard.comes_from_elsewhere(request):
                    # Its cookies were held back, as they should be; asked again from here, they
                    # are sent.
                    return self._again()
                visit = self._visit(request)
                response = await self._answer(visit, handler, known)
            except web.HTTPRedirection as redirection:
                response = redirection
            except web.HTTPException as error:
                response = self._problem(visit, error.status, error.text or error.reason)
                response.headers.update(
                    {key: error.headers[key] for key in ("Retry-After",) if key in error.headers}
                )
            except Exception as error:
                response = self._problem(visit, *_outcome(error))
            if visit is not None and visit.new_cookie and not response.prepared:
                _set_cookie(response, request, guard.cookie_name(request), visit.new_cookie)
            if isinstance(response, web.HTTPException):
                raise response
            return response

        return answer

    def _again(self) -> web.Response:
        text = '<!doctype html><title>Pollard</title><meta http-equiv="refresh" content="0">'
        return web.Response(text=text, content_type="text/html", headers=guard.PAGE_HEADERS)

    def _visit(self, request: web.Request) -> Visit:
        value = request.cookies.get(guard.cookie_name(request), "")
        new = "" if guard.is_visit(value) else guard.new_visit()
        visitor = Visitor(peer=_peer(request), csrf=guard.csrf_of(new or value), caller=NOBODY)
        manager = Manager(self._models, self._fleet_methods, visitor)
        return Visit(request, visitor, manager, new, new or value)

    async def _answer(self, visit: Visit, handler: Handler, known: bool) -> web.StreamResponse:
        """Answer, once it is known who looks."""
        if not known:
            return await handler(visit)
        request = visit.request
        try:
            who = self._sessions.who(request)
        except Unauthenticated:
            if "text/html" not in request.headers.get("Accept", "") or request.method != "GET":
                raise
            raise web.HTTPSeeOther(f"/login?next={quote(request.path_qs, safe='')}") from None
        visit.visitor = replace(
            visit.visitor,
            caller=who.caller,
            authorization=who.authorization,
            in_session=who.in_session,
        )
        visit.manager = Manager(self._models, self._fleet_methods, visit.visitor)
        live = "text/event-stream" in request.headers.get("Accept", "")
        with self._gate.enter(MODELS + ("WatchEvents" if live else "GetModel"), who.caller):
            return await handler(visit)

    def _is_still_in(self, visit: Visit) -> bool:
        """Tell whether who follows a page may still do so."""
        try:
            self._sessions.who(visit.request)
        except (ServiceError, web.HTTPException):
            return False
        return True

    def _shown(self, look: Callable[[Visit], Awaitable[View]]) -> Handler:
        """Answer with a page, or with what changes on it for those who ask for events."""

        async def answer(visit: Visit) -> web.StreamResponse:
            if "text/event-stream" in visit.request.headers.get("Accept", ""):
                return await self.live.serve(
                    visit.request,
                    visit.visitor,
                    look=lambda: look(visit),
                    is_still_in=lambda: self._is_still_in(visit),
                )
            return self._page(visit, await look(visit))

        return answer

    def _page(self, visit: Visit, view: View, code: int = 200) -> web.Response:
        theme = visit.request.cookies.get(guard.THEME_COOKIE, "")
        asked = visit.request
        text = self._renderer.page(
            view,
            visit.visitor,
            theme=theme if theme in ("dark", "light") else "",
            path=asked.path_qs if asked.method == "GET" else view.path,
        )
        return web.Response(
            text=text, status=code, content_type="text/html", headers=guard.PAGE_HEADERS
        )

    def _problem(self, visit: Visit | None, code: int, message: str) -> web.Response:
        title = HTTPStatus(code).phrase
        view = View("problem.html", title, {"code": code, "message": message})
        if visit is not None:
            return self._page(visit, view, code)
        text = self._renderer.page(view, Visitor(peer="", csrf="", caller=NOBODY))
        return web.Response(
            text=text, status=code, content_type="text/html", headers=guard.PAGE_HEADERS
        )

    # Signing in and out

    async def _login_form(self, visit: Visit) -> web.StreamResponse:
        following = _local(visit.request.query.get("next", ""))
        if self._is_still_in(visit):
            raise web.HTTPSeeOther(following)
        view = View("login.html", "Sign in", {"next": following}, place="login")
        return self._page(visit, view)

    async def _login(self, visit: Visit) -> web.StreamResponse:
        form = await self._form(visit)
        following = _local(form.get("next", ""))
        try:
            value = self._sessions.begin(form.get("token", "").strip())
        except ServiceError as error:
            code, message = _outcome(error)
            _log.warning("signing in was refused", peer=visit.visitor.peer, reason=error.reason)
            content = {"next": following, "said": message}
            return self._page(visit, View("login.html", "Sign in", content, place="login"), code)
        answer = web.HTTPSeeOther(following)
        _set_cookie(answer, visit.request, sessions.cookie_name(visit.request), value)
        # Whoever had a form before somebody signed in has none now.
        visit.new_cookie = guard.new_visit()
        raise answer

    async def _logout(self, visit: Visit) -> web.StreamResponse:
        await self._form(visit)
        self._sessions.end(visit.request)
        answer = web.HTTPSeeOther("/login")
        answer.del_cookie(
            sessions.cookie_name(visit.request),
            path="/",
            httponly=True,
            samesite="Strict",
            secure=visit.request.secure,
        )
        raise answer

    # Pages

    async def _overview(self, visit: Visit) -> View:
        return await self._views.overview(visit.manager, visit.request.query)

    async def _model(self, visit: Visit) -> View:
        return await self._views.model(visit.manager, visit.model, visit.request.query)

    async def _revision(self, visit: Visit) -> View:
        return await self._views.revision(visit.manager, visit.model, visit.number)

    async def _report(self, visit: Visit) -> View:
        return await self._views.report(visit.manager, visit.model, visit.number)

    async def _rollout(self, visit: Visit) -> View:
        return await self._views.rollout(visit.manager, visit.model, visit.number)

    async def _fleet(self, visit: Visit) -> View:
        return await self._views.fleet(visit.manager)

    async def _log(self, visit: Visit) -> View:
        return await self._views.log(visit.manager, visit.request.query)

    async def _trial(self, visit: Visit) -> View:
        view = await self._views.trial(visit.manager, visit.model, visit.request.query)
        return view.with_more(
            vision=await self._trials.address(visit.manager),
            may_predict=visit.visitor.may(PREDICT),
        )

    async def _try(self, visit: Visit) -> web.StreamResponse:
        def check(csrf: str) -> None:
            guard.check_csrf(csrf, visit.visit)

        model = visit.model
        upload, outcome = await self._trials.run(visit.request, visit.manager, model, check)
        if "X-Pollard-Part" in visit.request.headers:
            text = self._renderer.part(
                "trial.html", "part_outcome", visit.visitor, outcome=outcome, name=model
            )
            return web.Response(text=text, content_type="text/html", headers=guard.PAGE_HEADERS)
        view = await self._trial(visit)
        return self._page(
            visit, view.with_more(outcome=outcome, left=upload.left, right=upload.right)
        )

    async def _report_content(self, visit: Visit) -> web.StreamResponse:
        if visit.request.headers.get("Sec-Fetch-Dest", "iframe") != "iframe":
            # By itself it could lead its reader anywhere; in our frame it cannot.
            raise web.HTTPFound(f"/models/{visit.model}/revisions/{visit.number}/report")
        return await reports.send(
            visit.request, self._store, self._blobs, visit.model, visit.number
        )

    async def _asset(self, request: web.Request) -> web.Response:
        found = self._assets.find(request.match_info["digest"], request.match_info["name"])
        if found is None:
            return web.Response(status=404, text="no such file\n", headers=guard.ASSET_HEADERS)
        content, kind = found
        return web.Response(
            body=content, content_type=kind, charset="utf-8", headers=guard.ASSET_HEADERS
        )

    # Changes

    async def _create_rollout(self, visit: Visit) -> web.StreamResponse:
        form = await self._form(visit)
        model = visit.model

        async def change() -> str:
            request = forms.new_rollout(model, form, visit.visitor)
            answer = await visit.manager.ask("CreateRollout", request, pb.CreateRolloutResponse)
            return f"/{answer.rollout.name}"

        async def again() -> View:
            number = names.check_number(form.get("revision", ""), "revision")
            view = await self._views.revision(visit.manager, model, number)
            return view.with_more(form=view.content["form"] | form)

        return await self._changed(visit, change, again)

    async def _change_rollout(self, visit: Visit) -> web.StreamResponse:
        form = await self._form(visit)
        model, number, action = visit.model, visit.number, visit.request.match_info["action"]
        if action not in ROLLOUT_ACTIONS:
            raise web.HTTPNotFound(text="There is no such thing to do with a rollout.")
        method, kind, answer = ROLLOUT_ACTIONS[action]
        name = f"models/{model}/rollouts/{number}"

        async def change() -> str:
            # Without the etag as a guard: the step may go on while the button is pressed, and
            # what is wanted is the same then. It tells two presses from two wishes.
            request_id = visit.visitor.request_id(method, name, form.get("etag", ""))
            request: Any = kind(name=name, request_id=request_id)
            await visit.manager.ask(method, request, answer)
            return f"/{name}"

        return await self._changed(
            visit, change, lambda: self._views.rollout(visit.manager, model, number)
        )

    async def _set_alias(self, visit: Visit) -> web.StreamResponse:
        form = await self._form(visit)
        model = visit.model
        alias = names.check_alias_id(visit.request.match_info["alias"])

        async def change() -> str:
            request = forms.set_alias(model, alias, form, visit.visitor)
            await visit.manager.ask("SetAlias", request, pb.SetAliasResponse)
            return f"/models/{model}"

        async def again() -> View:
            number = names.check_number(form.get("revision", ""), "revision")
            return await self._views.revision(visit.manager, model, number)

        return await self._changed(visit, change, again)

    async def _roll_back_alias(self, visit: Visit) -> web.StreamResponse:
        form = await self._form(visit)
        model = visit.model
        alias = names.check_alias_id(visit.request.match_info["alias"])

        async def change() -> str:
            request = forms.roll_back_alias(model, alias, form, visit.visitor)
            await visit.manager.ask("RollbackAlias", request, pb.RollbackAliasResponse)
            return f"/models/{model}"

        return await self._changed(
            visit, change, lambda: self._views.model(visit.manager, model, {})
        )

    async def _form(self, visit: Visit) -> dict[str, str]:
        form = await forms.read_form(visit.request)
        guard.check_csrf(form.pop(guard.CSRF_FIELD, ""), visit.visit)
        return form

    async def _changed(
        self,
        visit: Visit,
        change: Callable[[], Awaitable[str]],
        again: Callable[[], Awaitable[View]],
    ) -> web.StreamResponse:
        """Make a change and go where it is seen; or show the page again, with what is wrong."""
        try:
            where = await change()
        except ServiceError as error:
            code, message = _outcome(error)
            try:
                view = await again()
            except ServiceError:
                raise error from None
            return self._page(visit, view.with_more(said=message), code)
        raise web.HTTPSeeOther(where)


def _outcome(error: BaseException) -> tuple[int, str]:
    """Return the status of HTTP and the words for an error; what nobody expected is logged."""
    outcome = status.describe(error)
    first, _, rest = outcome.message.partition(" ")
    # The name of a field or a method stays as it is.
    if first.isalpha():
        first = first[:1].upper() + first[1:]
    return _STATUSES.get(outcome.code.name, 500), f"{first} {rest}".strip()


def _local(path: str) -> str:
    """Return a path of this site; the start where it is none, or one of the way in."""
    if not re.fullmatch(r"/(?![/\\])[\x21-\x7e]*", path) or path.startswith("/login"):
        return "/"
    return path


def _set_cookie(response: web.StreamResponse, request: web.Request, name: str, value: str) -> None:
    response.set_cookie(
        name, value, path="/", httponly=True, samesite="Strict", secure=request.secure
    )


def _peer(request: web.Request) -> str:
    """Return the visitor's address as gRPC names peers."""
    found = request.transport.get_extra_info("peername") if request.transport else None
    if not isinstance(found, tuple):
        return "page"
    host, port = found[0], found[1]
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
