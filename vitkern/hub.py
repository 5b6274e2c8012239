"""Saving and loading in the manner of Hugging Face: a folder with config.json and weights."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from vitkern.model import ViT

Model = TypeVar("Model", bound="Pretrained")

# Weights that `load` reads; of the same in several containers, the first one is fetched.
_WEIGHTS = (".safetensors", ".npz", ".bin", ".pt", ".pth")


class Pretrained:
    """`save_pretrained`, `from_pretrained` and `push_to_hub`, for `ViT`."""

    def save_pretrained(self: Any, folder: str | os.PathLike[str]) -> Path:
        """Write config.json and model.safetensors into a folder, made if it isn't there.

        `from_pretrained` and `vitkern.load` read it; so does timm, where it has the network:
        ``timm.create_model("local-dir:FOLDER", pretrained=True)``.

        Raises:
            ModuleNotFoundError: without ``pip install 'vitkern[checkpoints]'``.
            NotADirectoryError: `folder` is a file.
        """
        from vitkern.checkpoint import save

        folder = Path(folder)
        if folder.is_file():
            raise NotADirectoryError(f"folder must be a directory, {str(folder)!r} is a file")
        folder.mkdir(parents=True, exist_ok=True)
        save(self, folder)
        return folder

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> "ViT":
        """The model of a local folder or file, or of a repository of the Hugging Face Hub.

        Whosever layout it has: vitkern's, timm's, transformers', open_clip's (see `vitkern.load`).

        Args:
            name: a path that exists, or "owner/name" on the Hub.
            revision, cache_dir, token, local_files_only: as huggingface_hub has them; for the Hub.
            overrides: any argument of `ViT`.

        Raises:
            ModuleNotFoundError: the Hub without ``pip install 'vitkern[hub]'``.
            FileNotFoundError: neither a path nor the name of a repository.
            CheckpointError: what is there is no ViT; the text says why.
        """
        from vitkern.checkpoint import load

        if os.path.exists(name):
            return load(name, **overrides)
        text = os.fspath(name)
        parts = text.split("/")
        if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
            raise FileNotFoundError(
                f"{text!r} is no file or folder here, nor 'owner/name' on the Hugging Face Hub"
            )
        try:
            from huggingface_hub import snapshot_download
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{text!r} is no folder here, and the Hugging Face Hub needs {error.name}: "
                "pip install 'vitkern[hub]'",
                name=error.name,
            ) from None
        folder = snapshot_download(
            text,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=_wanted(text, revision, token, local_files_only),
        )
        return load(folder, **overrides)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a Vision Transformer",
    ) -> str:
        """Upload what `save_pretrained` writes; the address of the commit.

        Raises:
            ModuleNotFoundError: without ``pip install 'vitkern[hub]'``.
        """
        import tempfile

        try:
            from huggingface_hub import HfApi
        except ModuleNotFoundError as error:
            text = f"the Hugging Face Hub needs {error.name}: pip install 'vitkern[hub]'"
            raise ModuleNotFoundError(text, name=error.name) from None
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=commit_message
            )
        return str(commit)


def _wanted(name: str, revision: str | None, token: Any, local_files_only: bool) -> list[str]:
    """Files of a repository to fetch; patterns for whatever is there if it can't be asked."""
    from huggingface_hub import HfApi

    anything = ["*.json", *(f"*{suffix}" for suffix in _WEIGHTS)]
    if local_files_only:
        return anything
    try:
        files = HfApi(token=token).list_repo_files(name, revision=revision)
    except Exception:  # offline, or no such repository: the download goes by the cache, or says so
        return anything
    top = [file for file in files if "/" not in file]
    for suffix in _WEIGHTS:
        weights = [file for file in top if file.endswith(suffix)]
        if weights:
            return [*(file for file in top if file.endswith(".json")), *weights]
    return anything
