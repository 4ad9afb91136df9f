"""`python -m flash_attention_testkit.bench`."""

import sys

from flash_attention_testkit.bench.cli import main

sys.exit(main())
