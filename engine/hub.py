"""Models by name: in a folder, downloaded before, or on the hub, which is asked once."""

import sys
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from settings import UserError


def require_model(name: str) -> None:
    """UserError where there is no such folder, and the hub, asked once, gives no such model. Where
    it cannot be asked, what was downloaded before is used, and it is not asked again."""
    if Path(name).is_dir():
        return
    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # whatever a network can do
        why = str(error).strip().split("\n")[0]
        if not is_downloaded(name):
            raise UserError(
                f"no folder has that name, and the hub gives no such model ({why}): give a model's "
                "folder, or its name on the hub; without a network, one that was downloaded before"
            ) from None
        if not constants.HF_HUB_OFFLINE:
            print(f"{name}: as it was downloaded before ({why})", file=sys.stderr)
        constants.HF_HUB_OFFLINE = True


def is_downloaded(name: str) -> bool:
    with suppress(HFValidationError):  # a path
        files = ("config.json", "adapter_config.json")
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
    return False


def file_beside(name: str, file: str) -> Path | None:
    """A file that lies beside a model in its folder or on the hub, such as the prompt it was
    trained with; None where there is none, or the hub does not answer."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    known = None
    with suppress(Exception):  # whatever a network can do
        known = try_to_load_from_cache(name, file)
        if known is None:
            there = HfApi().model_info(name, timeout=10).siblings or []
            known = hf_hub_download(name, file) if file in {f.rfilename for f in there} else None
    return Path(known) if isinstance(known, str) else None
