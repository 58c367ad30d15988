"""`python -m echoatt_cli`: `echoatt` under a launcher, such as torchrun."""

import sys

from echoatt_cli import main

sys.exit(main())
