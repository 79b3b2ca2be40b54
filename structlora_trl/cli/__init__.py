"""The command line, `structlora COMMAND`, also as `python -m structlora_trl.cli`.

Exit codes: 0 done, 1 something that the user can fix (the message says how), 2 a command line that cannot be
read.
"""

from .main import main

__all__ = ["main"]
