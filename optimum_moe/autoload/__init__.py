"""What `import torch` calls, so that compressed checkpoints load with no import of ours.

Installed as a package of its own, `optimum_moe_autoload`, because torch imports it outside of any guard: a broken
`optimum_moe` must never break `import torch`.
"""

from __future__ import annotations

import logging
import os

SWITCH = "OPTIMUM_MOE_AUTOLOAD"


def autoload() -> None:
    """Install the import hook for compressed checkpoints, unless the environment says `OPTIMUM_MOE_AUTOLOAD=0`."""
    if os.environ.get(SWITCH) == "0":
        return
    try:
        import optimum_moe

        optimum_moe.install_import_hook()
    except Exception as error:
        # Logged, because a warning becomes an exception under `python -W error`.
        logging.getLogger(__name__).warning(
            "optimum_moe is installed but broken (%r): its checkpoints will not load. Reinstall it, or set %s=0.",
            error,
            SWITCH,
        )
