"""Models and their revisions."""

from __future__ import annotations

import uuid

from pollard.client import _convert
from pollard.client._async._manager import PAGE, SERVICE, AsyncManagerClient
from pollard.client._names import choice_name, model_name, revision_name
from pollard.client.types import Model, Revision
from pollard.models.v1 import model_service_pb2


class RevisionMethods(AsyncManagerClient):
    """Methods of the models client that concern models and revisions."""

    async def models(self) -> list[Model]:
        """List all models by name."""
        models: list[Model] = []
        token = ""
        while True:
            request = model_service_pb2.ListModelsRequest(page_size=PAGE, page_token=token)
            page = await self._call(f"{SERVICE}/ListModels", self._stub.ListModels, request, None)
            models += [_convert.model(item) for item in page.models]
            token = page.next_page_token
            if not token:
                return models

    async def model(self, model: str) -> Model:
        """Get one model with its aliases. Raises NotFound when there is none."""
        request = model_service_pb2.GetModelRequest(name=model_name(model))
        response = await self._call(f"{SERVICE}/GetModel", self._stub.GetModel, request, None)
        return _convert.model(response.model)

    async def revisions(self, model: str, *, bundle_sha256: str | None = None) -> list[Revision]:
        """List all revisions of a model, newest first; or only those that have a bundle."""
        revisions: list[Revision] = []
        token = ""
        while True:
            request = model_service_pb2.ListRevisionsRequest(
                parent=model_name(model),
                page_size=PAGE,
                page_token=token,
                filter=f'bundle_sha256 = "{bundle_sha256}"' if bundle_sha256 else "",
            )
            page = await self._call(
                f"{SERVICE}/ListRevisions", self._stub.ListRevisions, request, None
            )
            revisions += [_convert.revision(item) for item in page.revisions]
            token = page.next_page_token
            if not token:
                return revisions

    async def revision(
        self, model: str, *, revision: int | None = None, alias: str | None = None
    ) -> Revision:
        """Get one revision, by number or alias (by default "production"), with its variants."""
        request = model_service_pb2.GetRevisionRequest(name=choice_name(model, revision, alias))
        response = await self._call(f"{SERVICE}/GetRevision", self._stub.GetRevision, request, None)
        return _convert.revision(response.revision)

    async def delete(
        self, model: str, *, revision: int | None = None, force: bool = False, etag: str = ""
    ) -> None:
        """Delete a revision, or without one the whole model.

        Args:
            model: Model name.
            revision: Revision to delete; None for the model with all its revisions.
            force: Stop serving the model first; only for a whole model.
            etag: Guards against a change in between; empty for no guard.

        Raises:
            NotFound: There is no such model or revision.
            FailedPrecondition: An alias points at it, or it is being drained.
        """
        if revision is not None and force:
            raise ValueError("force is for a whole model; move the alias away first")
        request_id = str(uuid.uuid4())
        if revision is not None:
            await self._call(
                f"{SERVICE}/DeleteRevision",
                self._stub.DeleteRevision,
                model_service_pb2.DeleteRevisionRequest(
                    name=revision_name(model, revision), etag=etag, request_id=request_id
                ),
                None,
            )
            return
        await self._call(
            f"{SERVICE}/DeleteModel",
            self._stub.DeleteModel,
            model_service_pb2.DeleteModelRequest(
                name=model_name(model), force=force, etag=etag, request_id=request_id
            ),
            None,
        )

    async def undelete(self, model: str, *, revision: int | None = None) -> None:
        """Bring back a revision, or without one a whole model, that was deleted.

        A model comes back with the revisions that were deleted with it, and without aliases.

        Args:
            model: Model name.
            revision: Revision to bring back; None for the model.

        Raises:
            NotFound: There never was such a model or revision.
            FailedPrecondition: It is not deleted, or was more than 30 days ago.
        """
        request_id = str(uuid.uuid4())
        if revision is not None:
            await self._call(
                f"{SERVICE}/UndeleteRevision",
                self._stub.UndeleteRevision,
                model_service_pb2.UndeleteRevisionRequest(
                    name=revision_name(model, revision), request_id=request_id
                ),
                None,
            )
            return
        await self._call(
            f"{SERVICE}/UndeleteModel",
            self._stub.UndeleteModel,
            model_service_pb2.UndeleteModelRequest(name=model_name(model), request_id=request_id),
            None,
        )
