# Made by clients/python/generate_sync.py from _async/revisions.py; change that file instead.
"""Models and their revisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pollard.client import _convert
from pollard.client._names import choice_name, model_name, request_id_of, revision_name
from pollard.client._sync._manager import PAGE, SERVICE, ManagerClient
from pollard.client.types import Model, Revision
from pollard.models.v1 import model_service_pb2


class RevisionMethods(ManagerClient):
    """Methods of the models client that concern models and revisions."""

    def models(self, *, where: str = "", order_by: str = "", deleted: bool = False) -> list[Model]:
        """List all models, or some.

        Args:
            where: Filter over `name` and `labels`, a part of AIP-160, such as
                `labels.team = "eyes" AND labels:reviewed`; empty for all.
            order_by: "name", "create_time" or "update_time", with " desc" for the other way; empty
                for the name.
            deleted: Also those that are deleted and can be brought back.

        Raises:
            InvalidArgument: The filter or the order is none.
        """
        models: list[Model] = []
        token = ""
        while True:
            request = model_service_pb2.ListModelsRequest(
                page_size=PAGE,
                page_token=token,
                filter=where,
                order_by=order_by,
                show_deleted=deleted,
            )
            page = self._call(f"{SERVICE}/ListModels", self._stub.ListModels, request, None)
            models += [_convert.model(item) for item in page.models]
            token = page.next_page_token
            if not token:
                return models

    def model(self, model: str) -> Model:
        """Get one model with its aliases. Raises NotFound when there is none."""
        request = model_service_pb2.GetModelRequest(name=model_name(model))
        response = self._call(f"{SERVICE}/GetModel", self._stub.GetModel, request, None)
        return _convert.model(response.model)

    def revisions(
        self,
        model: str,
        *,
        bundle_sha256: str | None = None,
        where: str = "",
        order_by: str = "",
        deleted: bool = False,
    ) -> list[Revision]:
        """List all revisions of a model, or some.

        Args:
            model: Model name.
            bundle_sha256: Only those that have this bundle.
            where: Filter over `state`, `creator`, `bundle_sha256` and `labels`, as for `models`.
            order_by: "revision" or "create_time", with " desc" for the other way; empty for the
                newest first.
            deleted: Also those that are deleted and can be brought back.

        Raises:
            NotFound: There is no such model.
            InvalidArgument: The filter or the order is none.
        """
        terms = [where] if where else []
        if bundle_sha256:
            terms.append(f'bundle_sha256 = "{bundle_sha256}"')
        revisions: list[Revision] = []
        token = ""
        while True:
            request = model_service_pb2.ListRevisionsRequest(
                parent=model_name(model),
                page_size=PAGE,
                page_token=token,
                filter=" AND ".join(terms),
                order_by=order_by,
                show_deleted=deleted,
            )
            page = self._call(f"{SERVICE}/ListRevisions", self._stub.ListRevisions, request, None)
            revisions += [_convert.revision(item) for item in page.revisions]
            token = page.next_page_token
            if not token:
                return revisions

    def revision(
        self, model: str, *, revision: int | None = None, alias: str | None = None
    ) -> Revision:
        """Get one revision, by number or alias (by default "production"), with its variants."""
        request = model_service_pb2.GetRevisionRequest(name=choice_name(model, revision, alias))
        response = self._call(f"{SERVICE}/GetRevision", self._stub.GetRevision, request, None)
        return _convert.revision(response.revision)

    def update_model(
        self,
        model: str,
        *,
        description: str | None = None,
        labels: Mapping[str, str] | None = None,
        etag: str = "",
        request_id: str | None = None,
    ) -> Model:
        """Change the description or the labels of a model.

        Args:
            model: Model name.
            description: Free text; None leaves it as it is.
            labels: All labels that it is to have, at most 64; None leaves them as they are.
            etag: Guards against a change in between; empty for no guard.
            request_id: UUID of the request: the same one again, within a day, is carried out once;
                None makes one up.

        Raises:
            NotFound: There is no such model.
            Aborted: It changed in between.
        """
        request = model_service_pb2.UpdateModelRequest(
            model=model_service_pb2.Model(
                name=model_name(model), description=description or "", labels=labels, etag=etag
            ),
            request_id=request_id_of(request_id),
        )
        request.update_mask.paths.extend(_given(description=description, labels=labels))
        response = self._call(f"{SERVICE}/UpdateModel", self._stub.UpdateModel, request, None)
        return _convert.model(response.model)

    def update_revision(
        self,
        model: str,
        revision: int,
        *,
        notes: str | None = None,
        labels: Mapping[str, str] | None = None,
        etag: str = "",
        request_id: str | None = None,
    ) -> Revision:
        """Change the notes or the labels of a revision; nothing else of it ever changes.

        Args:
            model: Model name.
            revision: Revision number.
            notes: Free text; None leaves it as it is.
            labels: All labels that it is to have, at most 64; None leaves them as they are.
            etag: Guards against a change in between; empty for no guard.
            request_id: As for `update_model`.

        Raises:
            NotFound: There is no such model or revision.
            Aborted: It changed in between.
        """
        request = model_service_pb2.UpdateRevisionRequest(
            revision=model_service_pb2.Revision(
                name=revision_name(model, revision), notes=notes or "", labels=labels, etag=etag
            ),
            request_id=request_id_of(request_id),
        )
        request.update_mask.paths.extend(_given(notes=notes, labels=labels))
        response = self._call(f"{SERVICE}/UpdateRevision", self._stub.UpdateRevision, request, None)
        return _convert.revision(response.revision)

    def delete(
        self,
        model: str,
        *,
        revision: int | None = None,
        force: bool = False,
        etag: str = "",
        request_id: str | None = None,
    ) -> None:
        """Delete a revision, or without one the whole model.

        Args:
            model: Model name.
            revision: Revision to delete; None for the model with all its revisions.
            force: Stop serving the model first; only for a whole model.
            etag: Guards against a change in between; empty for no guard.
            request_id: As for `update_model`.

        Raises:
            NotFound: There is no such model or revision.
            FailedPrecondition: An alias points at it, or it is being drained.
        """
        if revision is not None and force:
            raise ValueError("force is for a whole model; move the alias away first")
        request_id = request_id_of(request_id)
        if revision is not None:
            self._call(
                f"{SERVICE}/DeleteRevision",
                self._stub.DeleteRevision,
                model_service_pb2.DeleteRevisionRequest(
                    name=revision_name(model, revision), etag=etag, request_id=request_id
                ),
                None,
            )
            return
        self._call(
            f"{SERVICE}/DeleteModel",
            self._stub.DeleteModel,
            model_service_pb2.DeleteModelRequest(
                name=model_name(model), force=force, etag=etag, request_id=request_id
            ),
            None,
        )

    def undelete(
        self, model: str, *, revision: int | None = None, request_id: str | None = None
    ) -> None:
        """Bring back a revision, or without one a whole model, that was deleted.

        A model comes back with the revisions that were deleted with it, and without aliases.

        Args:
            model: Model name.
            revision: Revision to bring back; None for the model.
            request_id: As for `update_model`.

        Raises:
            NotFound: There never was such a model or revision.
            FailedPrecondition: It is not deleted, or was more than 30 days ago.
        """
        request_id = request_id_of(request_id)
        if revision is not None:
            self._call(
                f"{SERVICE}/UndeleteRevision",
                self._stub.UndeleteRevision,
                model_service_pb2.UndeleteRevisionRequest(
                    name=revision_name(model, revision), request_id=request_id
                ),
                None,
            )
            return
        self._call(
            f"{SERVICE}/UndeleteModel",
            self._stub.UndeleteModel,
            model_service_pb2.UndeleteModelRequest(name=model_name(model), request_id=request_id),
            None,
        )


def _given(**values: object) -> Sequence[str]:
    """Return the fields that are to change."""
    given = [name for name, value in values.items() if value is not None]
    if not given:
        raise ValueError(f"nothing is to change: give {' or '.join(values)}")
    return given
