"""`python -m qemu_blkmig` is `qemu-blkmig`."""

import sys

from qemu_blkmig.cli.main import main

sys.exit(main())
