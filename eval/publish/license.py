"""Licences as the hub names them, looked at before anything is sent, and the hub's own opinion of a card."""

import difflib
import json

from huggingface_hub import constants, get_session, get_token

from residual_saes.shared.errors import UserError

# Known without asking the hub; of others it is asked.
_KNOWN = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause cc
cc0-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-4.0 cc-by-nc-sa-4.0
cdla-permissive-2.0 wtfpl epl-2.0 eupl-1.2 agpl-3.0 gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc ms-pl mpl-2.0 odc-by odbl
osl-3.0 ofl-1.1 ncsa unlicense zlib pddl llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
"""


def require_license(name: str) -> None:
    """Raises UserError for a name that neither this program nor the hub knows."""
    if name in _KNOWN.split():
        return
    near = difflib.get_close_matches(name.lower().replace(" ", "-"), _KNOWN.split(), 1)
    instead = f"write {near[0]}" if near else "write its name there, such as apache-2.0 or mit, or other"
    try:
        require_valid(f"---\nlicense: {json.dumps(name)}\n---\n")
    except ValueError:
        raise UserError(f"{name!r} is no licence that the hub knows: {instead}") from None
    except Exception:  # offline, unreachable, or whatever a machine far away may say
        raise UserError(f"{name!r} is no licence that is known here, and the hub cannot be asked: {instead}") from None


def require_valid(card: str) -> None:
    """Ask the hub whether it would take a card. Raises ValueError with its words if not, and whatever its client raises."""
    body, token = {"repoType": "model", "content": card}, get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else None
    answer = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=body, headers=headers)
    if answer.status_code == 400:
        raise ValueError("; ".join(error["message"] for error in answer.json()["errors"]))
    answer.raise_for_status()
