"""ms-swift: `swift sft --external_plugins structlora_plugin.py --callbacks structlora`, where that file
imports this module.

ms-swift runs the file as a module of its own; options come as JSON or YAML in the variable STRUCTLORA, since
swift's arguments are closed to plugins: `STRUCTLORA='{beta: 0.5, edges: adjacency}'`.
"""

from __future__ import annotations

import os

from swift.callbacks import callbacks_map

from structlora_trl.errors import StructLoRAError
from structlora_trl.trainers.callback import StructLoRACallback
from structlora_trl.yaml_block import read_switch


class SwiftCallback(StructLoRACallback):
    """`StructLoRACallback`, built as ms-swift builds callbacks: from the training arguments and the trainer.

    Raises:
        StructLoRAError: an option in STRUCTLORA that is unknown or out of range; STRUCTLORA=false.
    """

    def __init__(self, args, trainer):
        config = read_switch(os.environ.get("STRUCTLORA", "true"))
        if config is None:
            raise StructLoRAError(
                "STRUCTLORA=false beside `--callbacks structlora`",
                "one answer",
                "drop one: without the callback it is plain LoRA",
            )
        super().__init__(config)


# ms-swift has no public way to register one (4.6.0; `upstream/ms-swift-callbacks.md`).
callbacks_map["structlora"] = SwiftCallback
