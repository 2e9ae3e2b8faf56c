"""Whether the model hub answers, and what to say when a model cannot be loaded.

Knows nothing of models: `encoders.vae` and `encoders.text` load them.
"""

from pathlib import Path

REPLY_TIMEOUT_S = 10.0


def is_out_of_reach(name_or_path: str) -> bool:
    """Whether `name_or_path` can only be loaded from this machine: a folder, or a hub name while there is no network.

    Asked first because the loaders try again for minutes before they give a dead network up.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if Path(name_or_path).is_dir():
        return True
    try:
        HfApi().model_info(name_or_path, timeout=REPLY_TIMEOUT_S)
    except (HfHubHTTPError, ValueError):
        return False  # it answers: the loader says what is wrong with the name
    except Exception:  # the network errors of whichever HTTP library is in use
        return True
    return False


def reason(name_or_path: str, error: BaseException, *, local: bool) -> str:
    """Why a loader failed, in a few words; `local` as `is_out_of_reach` said."""
    if local and not Path(name_or_path).is_dir():
        return "there is no such folder, and the hub cannot be reached"
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
