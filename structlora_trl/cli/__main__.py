"""`python -m structlora_trl.cli`, which launchers take as a module."""

import sys

from .main import main

sys.exit(main())
