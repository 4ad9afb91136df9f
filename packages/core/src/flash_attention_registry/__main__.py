"""`python -m flash_attention_registry` is the command `flash-attention`."""

import sys

from flash_attention_registry.cli import main

sys.exit(main())
