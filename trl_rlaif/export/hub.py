"""Pushes a model to a Hub repository."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from trl_rlaif.errors import RunError, UserError

# Raised by requests without an answer: an exception of the client's HTTP library, whichever that is.
_Unanswered: type[Exception] = HfHubHTTPError.__bases__[0]
# A model's files: an adapter must not remain next to the merged model that replaces it.
_MODEL_FILES = ["adapter_*", "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"]


class HubRepo:
    """A repository, created if it does not exist.

    Args:
        name: ``user/model``, or only the model's name for the token's user.
        public: Whether a new repository is public; an existing one keeps its visibility.

    Raises:
        UserError: The name is invalid, or the Hub rejects it.
        RunError: The Hub cannot be reached.
    """

    def __init__(self, name: str, *, public: bool) -> None:
        self._api = HfApi()
        with _explained(name):
            self.id = self._api.create_repo(name, private=not public, exist_ok=True).repo_id

    def card(self) -> dict[str, Any]:
        """The metadata of the repository's card; {} if it has none."""
        with _explained(self.id):
            try:
                return ModelCard.load(self.id, ignore_metadata_errors=True).data.to_dict()
            except EntryNotFoundError:
                return {}

    def push(self, folder: Path, message: str) -> str:
        """Replace the model in the repository by that in a folder, in one commit; returns its URL.

        Other files, such as a LICENSE, are kept.
        """
        with _explained(self.id):
            self._api.upload_folder(
                repo_id=self.id, folder_path=folder, commit_message=message, delete_patterns=_MODEL_FILES
            )
        return f"{self._api.endpoint}/{self.id}"


@contextmanager
def _explained(name: str) -> Iterator[None]:
    fix = "Run: hf auth login, with a token that has write access."
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{error}", where=f"--repo {name}", fix="Write user/model.") from error
    except LocalTokenNotFoundError as error:
        raise UserError("There is no token for the Hub.", where=f"--repo {name}", fix=fix) from error
    except HfHubHTTPError as error:
        refused = error.response.status_code in (401, 403, 404)
        what = f"The Hub refused: {error.server_message or error}"
        raise (UserError if refused else RunError)(what, where=f"--repo {name}", fix=fix if refused else "") from error
    except (_Unanswered, OSError) as error:  # offline mode also raises a ConnectionError
        fix = "Check the network, HF_HUB_OFFLINE and HF_ENDPOINT."
        raise RunError(f"The Hub cannot be reached: {error}", where=f"--repo {name}", fix=fix) from error
