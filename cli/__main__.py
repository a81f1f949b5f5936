"""``python -m tome_export.cli`` is ``tome-export``."""

import sys

from tome_export.cli.main import main

sys.exit(main())
