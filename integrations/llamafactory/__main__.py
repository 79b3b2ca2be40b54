"""`python -m structlora_trl.integrations.llamafactory`: what torchrun starts in each process."""

import sys

from structlora_trl.integrations.llamafactory import main

sys.exit(main())
